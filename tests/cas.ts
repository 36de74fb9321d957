/**
 * The whole life of certificates at other CAs than the test suite's: step-ca, Caddy's acme_server and acme2certifier, with
 * Pebble beside them; prints a table of what each step took.
 *
 *     deno run --no-prompt -P=tests tests/cas.ts [pebble] [step-ca] [caddy] [acme2certifier]
 *
 * Needs root on Linux, for it runs in a network of its own, in which names are what its DNS server says and the web server of
 * http-01 has port 80. What is not there is left out:
 *
 *     go install github.com/letsencrypt/pebble/v2/cmd/pebble@latest
 *     go install github.com/smallstep/certificates/cmd/step-ca@v0.30.2      # apt-get install libpcsclite-dev pkg-config
 *     go install github.com/caddyserver/caddy/v2/cmd/caddy@v2.11.9
 *     python3 -m venv VENV; VENV/bin/pip install acme2certifier; export ACME2CERTIFIER=VENV/bin/python
 */

import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { startWebroot } from "./ca.ts";
import { startDns } from "./ca-dns.ts";
import { listenerCertificate } from "./pebble.ts";
import { LEMATT } from "./programs.ts";
import { startRelay } from "./relay.ts";

const INSIDE = "--inside";

/** A CA that runs. */
interface Running {
  readonly directoryUrl: string;
  /** PEM of what its own certificate is issued by. */
  readonly root: string;
  stop(): Promise<void>;
}

interface Server {
  /** Why it cannot be started here. */
  readonly lack?: string;
  /** Whether it changes no account keys. */
  readonly keepsKeys?: boolean;
  /** Lines for `[config]`. */
  readonly settings?: string;
  start(directory: string): Promise<Running>;
}

/** A program of a CA, which answers when this resolves. */
async function startProgram(
  directory: string,
  command: readonly string[],
  directoryUrl: string,
  root: () => string,
  env: Record<string, string> = {},
): Promise<Running> {
  const [program, ...args] = command;
  const options = {
    cwd: directory,
    env: { HOME: directory, ...env },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  };
  const child = new Deno.Command(program!, { args, ...options } as Deno.CommandOptions).spawn();
  const log = Promise.all([child.stdout, child.stderr].map((stream) => new Response(stream).text()));
  let ended = false;
  child.status.then(() => ended = true);
  for (const deadline = Date.now() + 30_000;;) {
    try {
      using client = Deno.createHttpClient({ caCerts: [root()] });
      await (await fetch(directoryUrl, { client })).text();
      break;
    } catch (error) {
      if (ended || Date.now() > deadline) {
        if (!ended) child.kill("SIGKILL");
        throw new Error(`cannot start ${program}: ${(await log).join("").slice(-2000)}`, { cause: error });
      }
      await delay(100);
    }
  }
  const stop = async () => {
    if (!ended) child.kill("SIGKILL");
    await log;
  };
  return { directoryUrl, root: root(), stop };
}

/** Makes `root.pem`, and `intermediate.pem` with its `key.pem`, in a directory; by openssl, whose key identifiers all agree on. */
async function makeAuthority(directory: string): Promise<void> {
  const usage = "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n";
  await Deno.writeTextFile(join(directory, "extensions"), usage);
  const make =
    "set -e; for who in root key; do openssl ecparam -name prime256v1 -genkey -noout -out $who.sec1; " +
    "openssl pkcs8 -topk8 -nocrypt -in $who.sec1 -out $who.pem; done; mv root.pem root.key; " +
    "openssl req -x509 -new -key root.key -subj /CN=cas-root -days 999 -extensions v3_ca -out root.pem; " +
    "openssl req -new -key key.pem -subj /CN=cas-intermediate -out csr; " +
    "openssl x509 -req -in csr -CA root.pem -CAkey root.key -days 999 -extfile extensions -out intermediate.pem";
  const { success, stderr } = await new Deno.Command("sh", { args: ["-c", make], cwd: directory }).output();
  if (!success) throw new Error(new TextDecoder().decode(stderr));
}

const which = (name: string) =>
  (Deno.env.get("PATH") ?? "").split(":").map((path) => join(path, name)).find((path) => existsSync(path));
const lacks = (name: string) => which(name) === undefined ? `no ${name} on PATH` : undefined;
const read = (...path: string[]) => Deno.readTextFileSync(join(...path));

const PYTHON = Deno.env.get("ACME2CERTIFIER");
/** acme2certifier as a server with TLS, a thread for each connection. */
const WSGI = `
import os, ssl, sys, socketserver
config, port, cert, key = sys.argv[1:]
os.environ["ACME_SRV_CONFIGFILE"] = config
from wsgiref.simple_server import WSGIServer, make_server
from acme2certifier.share.acme2certifier_wsgi import application, get_handler_cls
class Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(cert, key)
server = make_server("127.0.0.1", int(port), application, Server, get_handler_cls())
server.base_environ["HTTPS"] = "on"
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
`;

const SERVERS: Readonly<Record<string, Server>> = {
  "pebble": {
    lack: lacks("pebble"),
    async start(directory) {
      const { root, certificate, key } = listenerCertificate();
      for (const [name, text] of Object.entries({ certificate, key })) {
        await Deno.writeTextFile(join(directory, `${name}.pem`), text);
      }
      const pebble = {
        listenAddress: "127.0.0.1:9440",
        managementListenAddress: "127.0.0.1:9439",
        certificate: "certificate.pem",
        privateKey: "key.pem",
        httpPort: 80,
      };
      await Deno.writeTextFile(join(directory, "pebble.json"), JSON.stringify({ pebble }));
      const command = [which("pebble")!, "-config", "pebble.json", "-dnsserver", "127.0.0.1:53"];
      return await startProgram(directory, command, "https://127.0.0.1:9440/dir", () => root, {
        PEBBLE_VA_NOSLEEP: "1",
      });
    },
  },
  "step-ca": {
    lack: lacks("step-ca"),
    keepsKeys: true,
    async start(directory) {
      if (!existsSync(join(directory, "root.pem"))) await makeAuthority(directory);
      const config = {
        root: "root.pem",
        crt: "intermediate.pem",
        key: "key.pem",
        address: "127.0.0.1:9443",
        dnsNames: ["127.0.0.1"],
        db: { type: "bbolt", dataSource: "db" },
        authority: { provisioners: [{ type: "ACME", name: "acme" }] },
      };
      await Deno.writeTextFile(join(directory, "ca.json"), JSON.stringify(config));
      const url = "https://127.0.0.1:9443/acme/acme/directory";
      const root = () => read(directory, "root.pem");
      return await startProgram(directory, [which("step-ca")!, "ca.json"], url, root);
    },
  },
  "caddy": {
    lack: lacks("caddy"),
    keepsKeys: true,
    async start(directory) {
      const caddyfile = "{\nadmin off\nskip_install_trust\nstorage file_system ./data\n" +
        "http_port 9081\nhttps_port 9444\n}\nhttps://127.0.0.1:9444 {\ntls internal\n" +
        "acme_server {\nlifetime 12h\nresolvers 127.0.0.1:53\n}\n}\n";
      await Deno.writeTextFile(join(directory, "Caddyfile"), caddyfile);
      const command = [which("caddy")!, "run", "--config", "Caddyfile"];
      const root = () => read(directory, "data/pki/authorities/local/root.crt");
      return await startProgram(directory, command, "https://127.0.0.1:9444/acme/local/directory", root);
    },
  },
  "acme2certifier": {
    lack: PYTHON === undefined ? "ACME2CERTIFIER is not set" : undefined,
    settings: "parallel: 1\n", // over SQLite it fails validations when many are made at once
    async start(directory) {
      if (!existsSync(join(directory, "root.pem"))) await makeAuthority(directory);
      const { root, certificate, key } = listenerCertificate();
      await Deno.writeTextFile(join(directory, "listener.pem"), certificate);
      await Deno.writeTextFile(join(directory, "listener.key"), key);
      await Deno.writeTextFile(join(directory, "server.py"), WSGI);
      const config = "[DEFAULT]\ndebug: False\n[CAhandler]\n" +
        "handler_module: acme2certifier.cahandlers.openssl_ca_handler\n" +
        `issuing_ca_key: ${directory}/key.pem\nissuing_ca_cert: ${directory}/intermediate.pem\n` +
        `cert_save_path: ${directory}/certs\nissuing_ca_crl: ${directory}/crl.pem\nca_cert_chain_list: ["${directory}/root.pem"]\n` +
        `cert_validity_days: 30\n[DBhandler]\nhandler: wsgi\ndbfile: ${directory}/acme.db\n` +
        `[Order]\nidentifier_limit: 100\n[Challenge]\ndns_server_list: ["127.0.0.1"]\n`;
      await Deno.mkdir(join(directory, "certs"), { recursive: true });
      await Deno.writeTextFile(join(directory, "acme.cfg"), config);
      const command = [PYTHON!, "server.py", "acme.cfg", "9445", "listener.pem", "listener.key"];
      return await startProgram(directory, command, "https://127.0.0.1:9445/directory", () => root);
    },
  },
};

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

/** A configuration directory with hooks that write TXT records into `zone`. */
class Directory {
  constructor(
    readonly conf: string,
    private readonly drop: string,
    zone: string,
    private readonly settings = "",
  ) {
    Deno.mkdirSync(conf);
    const hooks = `dnsPresent: ["mkdir -p ${zone}/RECORD && touch ${zone}/RECORD/VALUE"]\n` +
      `dnsCleanup: ["rm ${zone}/RECORD/VALUE"]\n`;
    const names = "*.wild.example.com wild.example.com";
    this.write("actions.conf", `[wild]\ndomains: ${names}\nchallenge: dns-01\n${hooks}`);
  }

  write(file: string, text: string): void {
    Deno.writeTextFileSync(join(this.conf, file), text);
  }

  use(directoryUrl: string, root: string): void {
    this.write("root.pem", root);
    this.write(
      "lematt.conf",
      `[config]\naccountKey: account.key\nchallengeDropDir: ${this.drop}\ncaBundle: root.pem\n` +
        `testDirectory: ${directoryUrl}\ndnsWait: 20\ncontact: ops@example.com\n${this.settings}`,
    );
  }
}

/** Lives at a CA; prints a line for each step. Returns how many went wrong. */
async function live(name: string, server: Server, home: string, zone: string): Promise<number> {
  const directory = join(home, name);
  for (const path of [directory, join(directory, "ca")]) Deno.mkdirSync(path);
  let wrong = 0;
  const step = async (at: Directory, { what, domains, args = [], code = 0, says = /^/ }: Step) => {
    if (domains !== undefined) at.write("domains", domains);
    const [program, ...rest] = LEMATT;
    const begun = performance.now();
    const options: Deno.CommandOptions = { args: [...rest, "--test", ...args, at.conf], stdin: "null" };
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
  const own = new Directory(join(directory, "conf"), join(home, "drop"), zone, server.settings);
  own.use(ca.directoryUrl, ca.root);
  for (const each of life(server)) await step(own, each);
  {
    // every answer comes a second later, from another address; so to another account
    await using relay = startRelay(new URL(ca.directoryUrl).origin, ca.root, async (_, ask) => {
      await delay(1000);
      return await ask();
    });
    const slow = new Directory(join(directory, "slow"), join(home, "drop"), zone, server.settings);
    slow.use(relay.origin + new URL(ca.directoryUrl).pathname, relay.root);
    await step(slow, { what: "a slow CA (1 s an answer)", domains: "slow.example.com\n", says: /^issued /m });
  }
  await ca.stop();
  await step(own, { what: "nothing due, the CA stopped", domains: CHANGED, says: /^nothing due/m });
  const stopped = { domains: `${CHANGED}later.example.com\n`, code: 1, says: /Connection refused/ };
  await step(own, { what: "something due, the CA stopped", ...stopped });
  ca = await server.start(join(directory, "ca"));
  own.use(ca.directoryUrl, ca.root);
  await step(own, { what: "the CA is back", args: ["--retry"], says: /^issued .*later/m });
  await ca.stop();
  return wrong;
}

async function main(): Promise<number> {
  for (const args of [["link", "set", "lo", "up"]]) await new Deno.Command("ip", { args }).output();
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
      else wrong += await live(name, server, home, zone);
    }
    return wrong;
  } finally {
    await new Deno.Command("umount", { args: ["/etc/resolv.conf"] }).output();
    await Deno.remove(home, { recursive: true });
  }
}

if (Deno.args.includes(INSIDE)) Deno.exit(await main() === 0 ? 0 : 1);
const own = [
  Deno.execPath(),
  "run",
  "-q",
  "--no-prompt",
  "-P=tests",
  import.meta.filename!,
  INSIDE,
  ...Deno.args,
];
const { code } = await new Deno.Command("unshare", { args: ["--net", "--mount", "--", ...own] }).spawn()
  .status;
Deno.exit(code);
