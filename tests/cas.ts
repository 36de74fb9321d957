/**
 * The life cycle of certificates at step-ca, Caddy's acme_server and acme2certifier; prints each step with its time.
 *
 *     deno run -q --no-prompt -P=tests tests/cas.ts [step-ca] [caddy] [acme2certifier]
 *
 * Needs root on Linux, since it runs in its own network namespace, with its own DNS server and the web server of http-01 on
 * port 80. CAs that are not installed are skipped:
 *
 *     go install github.com/smallstep/certificates/cmd/step-ca@v0.30.2      # apt-get install libpcsclite-dev pkg-config
 *     go install github.com/caddyserver/caddy/v2/cmd/caddy@v2.11.9
 *     python3 -m venv VENV; VENV/bin/pip install acme2certifier; export ACME2CERTIFIER=VENV/bin/python
 */

import { existsSync } from "node:fs";
import { join } from "node:path";
import { testBed } from "./bed.ts";
import { startDns } from "./ca-dns.ts";
import { listenerCertificate } from "./ca-x509.ts";
import { startWebroot } from "./ca.ts";
import { listing } from "./faults.ts";
import { shell, which } from "./programs.ts";
import { distant, startServer } from "./tls.ts";

/** Ports of the CA, of the DNS server, and of the web server of http-01. */
const PORTS = { ca: 9443, dns: 53, http: 80 };

const AUTHORITY = `
new="openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 999"
new="$new -addext keyUsage=critical,keyCertSign,cRLSign"
$new -subj /CN=cas-root -keyout root.key -out root.pem
$new -subj /CN=cas-intermediate -keyout key.pem -out intermediate.pem -CA root.pem -CAkey root.key`;

/** acme2certifier as a TLS server with a thread for each connection. */
const WSGI = `
import os, ssl, sys
os.environ["ACME_SRV_CONFIGFILE"] = "acme.cfg"
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server
from acme2certifier.share.acme2certifier_wsgi import application, get_handler_cls
Server = type("Server", (ThreadingMixIn, WSGIServer), {})
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("listener.pem", "listener.key")
server = make_server("127.0.0.1", int(sys.argv[1]), application, Server, get_handler_cls())
server.base_environ["HTTPS"] = "on"
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
`;

/** The CAs with their files in `directory`; `root` is that with the root certificate of the listener. */
function serversIn(directory: string, { ca, dns, http }: typeof PORTS) {
  const step = {
    root: "root.pem",
    crt: "intermediate.pem",
    key: "key.pem",
    db: { type: "bbolt", dataSource: "db" },
  };
  const authority = { provisioners: [{ type: "ACME", name: "acme" }] };
  return {
    "step-ca": {
      program: which("step-ca"),
      args: `--insecure --acme-http-port ${http} --resolver 127.0.0.1:${dns} ca.json`,
      files: {
        "ca.json": JSON.stringify({
          ...step,
          authority,
          address: `127.0.0.1:${ca}`,
          dnsNames: ["127.0.0.1"],
        }),
      },
      path: "/acme/acme/directory",
      root: "root.pem",
      changesKeys: false,
    },
    "caddy": {
      program: which("caddy"),
      args: "run --config Caddyfile",
      files: {
        Caddyfile: "{\nadmin off\nskip_install_trust\nstorage file_system ./data\nhttp_port 9081\n" +
          `https_port ${ca}\n}\nhttps://127.0.0.1:${ca} {\ntls internal\n` +
          `acme_server {\nlifetime 12h\nresolvers 127.0.0.1:${dns}\n}\n}\n`,
      },
      path: "/acme/local/directory",
      root: "data/pki/authorities/local/root.crt",
      changesKeys: false,
    },
    "acme2certifier": {
      program: Deno.env.get("ACME2CERTIFIER"),
      args: `server.py ${ca}`,
      files: {
        "server.py": WSGI,
        "acme.cfg": "[CAhandler]\nhandler_module: acme2certifier.cahandlers.openssl_ca_handler\n" +
          `issuing_ca_key: ${directory}/key.pem\nissuing_ca_cert: ${directory}/intermediate.pem\n` +
          `issuing_ca_crl: ${directory}/crl.pem\nca_cert_chain_list: ["${directory}/root.pem"]\n` +
          `cert_save_path: ${directory}/certs\ncert_validity_days: 30\n[DBhandler]\nhandler: wsgi\n` +
          `dbfile: ${directory}/acme.db\n[Order]\nidentifier_limit: 100\n` +
          `[Challenge]\ndns_server_list: ["127.0.0.1"]\n`,
      },
      path: "/directory",
      root: "listener-root.pem",
      changesKeys: true,
    },
  };
}

type Name = keyof ReturnType<typeof serversIn>;
const SERVERS = serversIn("", PORTS);

/** Starts a CA with its files in `directory`. The second time, it continues with what it has issued. */
export async function startCa(name: Name, directory: string, ports = PORTS) {
  const { program, args, files, path, root } = serversIn(directory, ports)[name];
  if (!existsSync(directory)) {
    await Deno.mkdir(join(directory, "certs"), { recursive: true });
    await shell(AUTHORITY, directory); // by openssl, whose key identifiers all three accept
    const { root, certificate, key } = await listenerCertificate();
    const listener = { "listener-root.pem": root, "listener.pem": certificate, "listener.key": key };
    for (const [file, text] of Object.entries({ ...listener, ...files })) {
      await Deno.writeTextFile(join(directory, file), text);
    }
  }
  const options = { cwd: directory, env: { HOME: directory } };
  const server = await startServer(program!, args.split(" "), ports.ca, options);
  const directoryUrl = `https://127.0.0.1:${ports.ca}${path}`;
  return Object.assign(server, { directoryUrl, root: await Deno.readTextFile(join(directory, root)) });
}

// ---- the life cycle ----------------------------------------------------------------------------------------------

const ONE = "one.example.com";
const HUNDRED = Array.from({ length: 100 }, (_, i) => `h${i}.example.com`).join(" ");
const WILD = "*.wild.example.com wild.example.com";
const LINES = `${ONE}\n${HUNDRED}\n${WILD}\n`;
const CHANGED = LINES.replace(ONE, `${ONE} two.example.com`);
const ISSUED = /^issued /m, IDLE = /^nothing due/m, CHANGES = /^changed /m;
const INVALID = /cannot validate the order: lost\.example\.com: .+/, NOT_OFFERED = /the CA does not offer it/;

/** Runs the life cycle at a CA and prints a line for each step. Returns the number of failed steps. */
async function lifeCycle(name: Name): Promise<number> {
  const { program, changesKeys } = SERVERS[name];
  if (program === undefined) {
    console.log(name.padEnd(15), "skipped: not installed");
    return 0;
  }
  await using bed = await testBed({
    actions: `[wild]\ndomains: ${WILD}\nchallenge: dns-01\ndnsCleanup: ["rm HERE/zone/RECORD/VALUE"]\n` +
      `dnsPresent: ["mkdir -p HERE/zone/RECORD && touch HERE/zone/RECORD/VALUE"]\n`,
  });
  await using _web = startWebroot(bed.drop, { port: PORTS.http });
  await using dns = await startDns((name, type) => {
    if (type === "TXT") return listing(join(bed.home, "zone", name));
    return type === "A" && /(?<!lost)\.example\.com$/.test(name) ? ["127.0.0.1"] : [];
  }, PORTS.dns);
  for (const type of ["NS", "SOA"] as const) dns.set("example.com", type, "ns.example.com");
  let failed = 0;
  const step = async (what: string, domains: string, args: string, prints: RegExp, code = 0) => {
    bed.configure({ domains: `${domains}\n` });
    const started = performance.now();
    const { stdout, stderr, ...ended } = await bed.lematt("--test", ...args.split(" ").filter(Boolean));
    const seconds = ((performance.now() - started) / 1000).toFixed(1);
    const passed = ended.code === code && prints.test(stdout + stderr);
    console.log(name.padEnd(15), what.padEnd(34), seconds.padStart(6), "s ", passed ? "ok" : "FAILED");
    if (passed) return;
    failed++;
    console.log((stdout + stderr).replace(/^/gm, "    "));
  };
  // with the SQLite of acme2certifier, simultaneous validations fail
  const parallel = name === "acme2certifier" ? 1 : 10;
  const use = async (url: string, root: string) => {
    await Deno.writeTextFile(bed.path("root.pem"), root);
    const own = `testDirectory: ${url}\ncaBundle: root.pem\naccountKey: ${new URL(url).port}.key`;
    bed.configure({ settings: `${own}\ncontact: ops@example.com\ndnsWait: 20\nparallel: ${parallel}` });
  };

  let ca = await startCa(name, join(bed.home, "ca"));
  await use(ca.directoryUrl, ca.root);
  await step("first issue, one name", ONE, "", ISSUED);
  await step("first issue, 100 names", `${ONE}\n${HUNDRED}`, "", ISSUED);
  await step("first issue, wildcard by dns-01", LINES, "", ISSUED);
  await step("nothing due", LINES, "", IDLE);
  await step("renewal", LINES, `--renew ${ONE}`, ISSUED);
  await step("changed names", CHANGED, "", ISSUED);
  await step("a failed validation", `${CHANGED}lost.example.com`, "", INVALID, 1);
  await step("revocation", CHANGED, `--revoke ${ONE} --yes`, /^revoked/m);
  await step("replacement after revocation", CHANGED, "", ISSUED);
  const [printed, code] = changesKeys ? [CHANGES, 0] as const : [NOT_OFFERED, 1] as const;
  await step("rollover", CHANGED, "--rollover --yes", printed, code);
  await step("renewal after rollover", CHANGED, `--renew ${ONE}`, ISSUED);
  const relay = await distant(PORTS.ca, 500);
  await use(Object.assign(new URL(ca.directoryUrl), { port: relay.port }).href, ca.root);
  await step("a slow CA (1 s an answer)", "slow.example.com", "", ISSUED);
  await relay[Symbol.asyncDispose]();
  await use(ca.directoryUrl, ca.root);
  await ca[Symbol.asyncDispose]();
  await step("nothing due, the CA stopped", CHANGED, "", IDLE);
  await step("something due, the CA stopped", `${CHANGED}later.example.com`, "", /Connection refused/, 1);
  ca = await startCa(name, join(bed.home, "ca"));
  await step("the CA is back", `${CHANGED}later.example.com`, "--retry", /^issued .*later/m);
  await ca[Symbol.asyncDispose]();
  return failed;
}

if (import.meta.main) {
  if (Deno.args[0] === "inside") {
    const names = Deno.args.length > 1 ? Deno.args.slice(1) : Object.keys(SERVERS);
    let failed = 0;
    for (const name of names as Name[]) failed += await lifeCycle(name);
    Deno.exit(failed > 0 ? 1 : 0);
  }
  const enter = "ip link set lo up; file=$(mktemp); echo nameserver 127.0.0.1 > $file\n" +
    'mount --bind $file /etc/resolv.conf; rm $file; exec "$@"';
  const own = [Deno.execPath(), "run", "-q", "--no-prompt", "-P=tests", import.meta.filename!, "inside"];
  const args = ["--net", "--mount", "sh", "-euc", enter, "sh", ...own, ...Deno.args];
  Deno.exit((await new Deno.Command("unshare", { args }).spawn().status).code);
}
