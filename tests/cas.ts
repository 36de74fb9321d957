/**
 * The whole life of certificates at other CAs than the test suite's: step-ca, Caddy's acme_server and acme2certifier; prints a
 * table of what each step took.
 *
 *     deno run --no-prompt -P=tests tests/cas.ts [step-ca] [caddy] [acme2certifier]
 *
 * Needs root on Linux, for it runs in a network of its own, in which names are what its DNS server says and the web server of
 * http-01 has port 80. What is not there is left out:
 *
 *     go install github.com/smallstep/certificates/cmd/step-ca@v0.30.2      # apt-get install libpcsclite-dev pkg-config
 *     go install github.com/caddyserver/caddy/v2/cmd/caddy@v2.11.9
 *     python3 -m venv VENV; VENV/bin/pip install acme2certifier; export ACME2CERTIFIER=VENV/bin/python
 */

import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { startWebroot } from "./ca.ts";
import { startDns } from "./ca-dns.ts";
import { type Server, SERVERS } from "./cas-servers.ts";
import { LEMATT } from "./programs.ts";
import { startRelay } from "./relay.ts";

const INSIDE = "--inside";

/** One step of the life: what the configuration is then, how lematt is started, what has to come of it. */
interface Step {
  readonly what: string;
  readonly domains?: string;
  readonly args?: readonly string[];
  readonly code?: number;
  readonly says?: RegExp;
}

const ONE = "one.example.com";
const HUNDRED = Array.from({ length: 100 }, (_, i) => `h${i}.example.com`).join(" ");
const LINES = `${ONE}\n${HUNDRED}\n*.wild.example.com wild.example.com\n`;
const CHANGED = LINES.replace(ONE, `${ONE} two.example.com`);

function life({ keepsKeys = false }: Server): Step[] {
  return [
    { what: "first issue, one name", domains: `${ONE}\n`, says: /^issued /m },
    { what: "first issue, 100 names", domains: `${ONE}\n${HUNDRED}\n`, says: /^issued /m },
    { what: "first issue, wildcard by dns-01", domains: LINES, says: /^issued /m },
    { what: "nothing due", says: /^nothing due/m },
    { what: "renewal", args: ["--renew", ONE], says: /^issued /m },
    { what: "changed names", domains: CHANGED, says: /^issued /m },
    {
      what: "a failed validation",
      domains: `${CHANGED}lost.example.com\n`,
      code: 1,
      says: /cannot validate the order: lost\.example\.com: .+/,
    },
    { what: "revocation", domains: CHANGED, args: ["--revoke", ONE, "--yes"] },
    { what: "replaced after it", says: /^issued /m },
    keepsKeys
      ? { what: "rollover", args: ["--rollover", "--yes"], code: 1, says: /the CA does not offer it/ }
      : { what: "rollover", args: ["--rollover", "--yes"], says: /^changed /m },
    { what: "renewal after it", args: ["--renew", ONE], says: /^issued /m },
  ];
}

/** A configuration directory for the CA at a URL, with hooks that write TXT records into `home`/zone. */
async function configure(conf: string, home: string, url: string, root: string, settings = "") {
  const zone = join(home, "zone");
  const hooks = `dnsPresent: ["mkdir -p ${zone}/RECORD && touch ${zone}/RECORD/VALUE"]\n` +
    `dnsCleanup: ["rm ${zone}/RECORD/VALUE"]\n`;
  const names = "*.wild.example.com wild.example.com";
  await Deno.mkdir(conf, { recursive: true });
  await Deno.writeTextFile(
    join(conf, "actions.conf"),
    `[wild]\ndomains: ${names}\nchallenge: dns-01\n${hooks}`,
  );
  await Deno.writeTextFile(join(conf, "root.pem"), root);
  await Deno.writeTextFile(
    join(conf, "lematt.conf"),
    `[config]\naccountKey: account.key\nchallengeDropDir: ${home}/drop\ncaBundle: root.pem\n` +
      `testDirectory: ${url}\ndnsWait: 20\ncontact: ops@example.com\n${settings}`,
  );
}

/** Lives at a CA; prints a line for each step. Returns how many went wrong. */
async function live(name: string, server: Server, home: string): Promise<number> {
  const directory = join(home, name);
  for (const path of [directory, join(directory, "ca")]) Deno.mkdirSync(path);
  let wrong = 0;
  const step = async (conf: string, { what, domains, args = [], code = 0, says = /^/ }: Step) => {
    if (domains !== undefined) await Deno.writeTextFile(join(conf, "domains"), domains);
    const [program, ...rest] = LEMATT;
    const begun = performance.now();
    const options: Deno.CommandOptions = { args: [...rest, "--test", ...args, conf], stdin: "null" };
    const ended = await new Deno.Command(program!, options).output();
    const seconds = ((performance.now() - begun) / 1000).toFixed(1);
    const said = new TextDecoder().decode(ended.stdout) + new TextDecoder().decode(ended.stderr);
    const isRight = ended.code === code && says.test(said);
    console.log(
      `${name.padEnd(15)} ${what.padEnd(34)} ${seconds.padStart(6)} s  ${isRight ? "ok" : "WRONG"}`,
    );
    if (isRight) return;
    wrong++;
    console.log(said.replace(/^/gm, "    "));
  };

  let ca = await server.start(join(directory, "ca"));
  const own = join(directory, "conf");
  await configure(own, home, ca.directoryUrl, ca.root, server.settings);
  for (const each of life(server)) await step(own, each);
  {
    // every answer comes a second later, from another address; so to another account
    await using relay = startRelay(new URL(ca.directoryUrl).origin, ca.root, async (_, ask) => {
      await delay(1000);
      return await ask();
    });
    const slow = join(directory, "slow");
    const url = relay.origin + new URL(ca.directoryUrl).pathname;
    await configure(slow, home, url, relay.root, server.settings);
    await step(slow, { what: "a slow CA (1 s an answer)", domains: "slow.example.com\n", says: /^issued /m });
  }
  await ca.stop();
  await step(own, { what: "nothing due, the CA stopped", domains: CHANGED, says: /^nothing due/m });
  const stopped = { domains: `${CHANGED}later.example.com\n`, code: 1, says: /Connection refused/ };
  await step(own, { what: "something due, the CA stopped", ...stopped });
  ca = await server.start(join(directory, "ca"));
  await step(own, { what: "the CA is back", args: ["--retry"], says: /^issued .*later/m });
  await ca.stop();
  return wrong;
}

async function main(): Promise<number> {
  await new Deno.Command("ip", { args: ["link", "set", "lo", "up"] }).output();
  const home = await Deno.makeTempDir({ prefix: "lematt-cas-" });
  try {
    const resolv = join(home, "resolv.conf");
    await Deno.writeTextFile(resolv, "nameserver 127.0.0.1\n");
    const mounted = await new Deno.Command("mount", { args: ["--bind", resolv, "/etc/resolv.conf"] })
      .output();
    if (!mounted.success) throw new Error(new TextDecoder().decode(mounted.stderr));
    for (const name of ["drop", "zone"]) await Deno.mkdir(join(home, name));
    await using _web = startWebroot(join(home, "drop"), { port: 80 });
    const zone = join(home, "zone");
    const files = (name: string) => existsSync(join(zone, name)) ? readdirSync(join(zone, name)) : [];
    await using dns = await startDns((name, type) => {
      if (type === "TXT") return files(name);
      return type === "A" && name.endsWith(".example.com") && name !== "lost.example.com"
        ? ["127.0.0.1"]
        : [];
    }, 53);
    dns.set("example.com", "NS", "ns.example.com");
    dns.set("example.com", "SOA", "ns.example.com");
    const wanted = Deno.args.filter((arg) => arg in SERVERS);
    let wrong = 0;
    for (const name of wanted.length > 0 ? wanted : Object.keys(SERVERS)) {
      const server = SERVERS[name]!;
      if (server.lack !== undefined) console.log(`${name.padEnd(15)} left out: ${server.lack}`);
      else wrong += await live(name, server, home);
    }
    return wrong;
  } finally {
    await new Deno.Command("umount", { args: ["/etc/resolv.conf"] }).output();
    await Deno.remove(home, { recursive: true });
  }
}

if (Deno.args.includes(INSIDE)) Deno.exit(await main() === 0 ? 0 : 1);
const own = `${Deno.execPath()} run -q --no-prompt -P=tests ${import.meta.filename} ${INSIDE}`.split(" ");
const args = ["--net", "--mount", "--", ...own, ...Deno.args];
Deno.exit((await new Deno.Command("unshare", { args }).spawn().status).code);
