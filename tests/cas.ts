/**
 * The life cycle of certificates at step-ca, Caddy's acme_server and acme2certifier; prints a table with the time of each step.
 *
 *     deno run --no-prompt -P=tests tests/cas.ts [step-ca] [caddy] [acme2certifier]
 *
 * Needs root on Linux, since it runs in its own network namespace, with its own DNS server and the web server of http-01 on
 * port 80. CAs that are not installed are skipped:
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

/** One step of the life cycle: the configuration, the options of lematt, and the expected result. */
interface Step {
  readonly what: string;
  readonly domains?: string;
  readonly args?: readonly string[];
  readonly code?: number;
  readonly prints?: RegExp;
}

const ONE = "one.example.com";
const HUNDRED = Array.from({ length: 100 }, (_, i) => `h${i}.example.com`).join(" ");
const LINES = `${ONE}\n${HUNDRED}\n*.wild.example.com wild.example.com\n`;
const CHANGED = LINES.replace(ONE, `${ONE} two.example.com`);

function lifeCycle({ keepsKeys = false }: Server): Step[] {
  return [
    { what: "first issue, one name", domains: `${ONE}\n`, prints: /^issued /m },
    { what: "first issue, 100 names", domains: `${ONE}\n${HUNDRED}\n`, prints: /^issued /m },
    { what: "first issue, wildcard by dns-01", domains: LINES, prints: /^issued /m },
    { what: "nothing due", prints: /^nothing due/m },
    { what: "renewal", args: ["--renew", ONE], prints: /^issued /m },
    { what: "changed names", domains: CHANGED, prints: /^issued /m },
    {
      what: "a failed validation",
      domains: `${CHANGED}lost.example.com\n`,
      code: 1,
      prints: /cannot validate the order: lost\.example\.com: .+/,
    },
    { what: "revocation", domains: CHANGED, args: ["--revoke", ONE, "--yes"] },
    { what: "replacement after revocation", prints: /^issued /m },
    keepsKeys
      ? { what: "rollover", args: ["--rollover", "--yes"], code: 1, prints: /the CA does not offer it/ }
      : { what: "rollover", args: ["--rollover", "--yes"], prints: /^changed /m },
    { what: "renewal after rollover", args: ["--renew", ONE], prints: /^issued /m },
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

/** Runs the life cycle at a CA and prints a line for each step. Returns the number of failed steps. */
async function runLifeCycle(name: string, server: Server, home: string): Promise<number> {
  const directory = join(home, name);
  for (const path of [directory, join(directory, "ca")]) Deno.mkdirSync(path);
  let failed = 0;
  const step = async (conf: string, { what, domains, args = [], code = 0, prints = /^/ }: Step) => {
    if (domains !== undefined) await Deno.writeTextFile(join(conf, "domains"), domains);
    const [program, ...rest] = LEMATT;
    const started = performance.now();
    const options: Deno.CommandOptions = { args: [...rest, "--test", ...args, conf], stdin: "null" };
    const ended = await new Deno.Command(program!, options).output();
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    const output = new TextDecoder().decode(ended.stdout) + new TextDecoder().decode(ended.stderr);
    const passed = ended.code === code && prints.test(output);
    console.log(
      `${name.padEnd(15)} ${what.padEnd(34)} ${seconds.padStart(6)} s  ${passed ? "ok" : "FAILED"}`,
    );
    if (passed) return;
    failed++;
    console.log(output.replace(/^/gm, "    "));
  };

  let ca = await server.start(join(directory, "ca"));
  const conf = join(directory, "conf");
  await configure(conf, home, ca.directoryUrl, ca.root, server.settings);
  for (const each of lifeCycle(server)) await step(conf, each);
  {
    // every answer comes a second later; the relay has another URL, so this is another account
    await using relay = await startRelay(new URL(ca.directoryUrl).origin, ca.root, async (_, ask) => {
      await delay(1000);
      return await ask();
    });
    const slow = join(directory, "slow");
    const url = relay.origin + new URL(ca.directoryUrl).pathname;
    await configure(slow, home, url, relay.root, server.settings);
    await step(slow, {
      what: "a slow CA (1 s an answer)",
      domains: "slow.example.com\n",
      prints: /^issued /m,
    });
  }
  await ca.stop();
  await step(conf, { what: "nothing due, the CA stopped", domains: CHANGED, prints: /^nothing due/m });
  const stopped = { domains: `${CHANGED}later.example.com\n`, code: 1, prints: /Connection refused/ };
  await step(conf, { what: "something due, the CA stopped", ...stopped });
  ca = await server.start(join(directory, "ca"));
  await step(conf, { what: "the CA is back", args: ["--retry"], prints: /^issued .*later/m });
  await ca.stop();
  return failed;
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
    let failed = 0;
    for (const name of wanted.length > 0 ? wanted : Object.keys(SERVERS)) {
      const server = SERVERS[name]!;
      if (server.lack !== undefined) console.log(`${name.padEnd(15)} skipped: ${server.lack}`);
      else failed += await runLifeCycle(name, server, home);
    }
    return failed;
  } finally {
    await new Deno.Command("umount", { args: ["/etc/resolv.conf"] }).output();
    await Deno.remove(home, { recursive: true });
  }
}

if (Deno.args.includes(INSIDE)) Deno.exit(await main() === 0 ? 0 : 1);
const own = `${Deno.execPath()} run -q --no-prompt -P=tests ${import.meta.filename} ${INSIDE}`.split(" ");
const args = ["--net", "--mount", "--", ...own, ...Deno.args];
Deno.exit((await new Deno.Command("unshare", { args }).spawn().status).code);
