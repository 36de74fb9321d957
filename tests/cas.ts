/**
 * The life cycle of certificates at step-ca (also in stepca.test.ts), Caddy's acme_server and acme2certifier; prints each step.
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

import assert from "node:assert/strict";
import { join } from "node:path";
import { testBed } from "./bed.ts";
import { startWebroot } from "./ca.ts";
import { startDns } from "./ca-dns.ts";
import { writeListener } from "./ca-x509.ts";
import { listing } from "./faults.ts";
import { runAt } from "./pebble.ts";
import { shell, which } from "./programs.ts";
import { startServer } from "./tls.ts";

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
    authority: { provisioners: [{ type: "ACME", name: "acme" }] },
    address: `127.0.0.1:${ca}`,
    dnsNames: ["127.0.0.1"],
  };
  return {
    "step-ca": {
      program: which("step-ca"),
      args: `--insecure --acme-http-port ${http} --resolver 127.0.0.1:${dns} ca.json`,
      files: { "ca.json": JSON.stringify(step) },
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

async function startCa(name: Name, directory: string, ports: typeof PORTS) {
  const { program, args, files, path, root } = serversIn(directory, ports)[name];
  await Deno.mkdir(join(directory, "certs"), { recursive: true });
  await shell(AUTHORITY, directory); // by openssl, whose key identifiers all three accept
  await writeListener(directory);
  for (const [file, text] of Object.entries(files)) await Deno.writeTextFile(join(directory, file), text);
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
const ISSUED = /^issued /m, IDLE = /^nothing due/m;

/** Runs the life cycle at a CA; `passed` is called after each step. For DNS and HTTP, port 0 takes a free one. */
export async function lifeCycle(name: Name, ports: typeof PORTS, passed = (_step: string) => {}) {
  await using bed = await testBed({
    actions: `[wild]\ndomains: ${WILD}\nchallenge: dns-01\ndnsCleanup: ["rm HERE/zone/RECORD/VALUE"]\n` +
      `dnsPresent: ["mkdir -p HERE/zone/RECORD && touch HERE/zone/RECORD/VALUE"]\n`,
  });
  await using web = startWebroot(bed.drop, { port: ports.http });
  await using dns = await startDns((name, type) => {
    if (type === "TXT") return listing(join(bed.home, "zone", name));
    return type === "A" && /(?<!lost)\.example\.com$/.test(name) ? ["127.0.0.1"] : [];
  }, ports.dns);
  for (const type of ["NS", "SOA"] as const) dns.set("example.com", type, "ns.example.com");
  const directory = join(bed.home, "ca");
  await using ca = await startCa(name, directory, { ca: ports.ca, dns: dns.port, http: web.port });
  await Deno.writeTextFile(bed.path("root.pem"), ca.root);
  // with the SQLite of acme2certifier, simultaneous validations fail
  const parallel = name === "acme2certifier" ? 1 : 10;
  const own = `testDirectory: ${ca.directoryUrl}\ncaBundle: root.pem\npreflight: no`;
  bed.configure({ settings: `${own}\ncontact: ops@example.com\nparallel: ${parallel}` });

  const step = async (what: string, domains: string, args: string, prints: RegExp, code = 0) => {
    bed.configure({ domains });
    const ended = await bed.lematt("--test", ...args.split(" ").filter(Boolean));
    assert.match(ended.stdout + ended.stderr, prints, what);
    assert.equal(ended.code, code, what);
    passed(what);
  };
  await step("first issue, one name", ONE, "", ISSUED);
  await step("first issue, 100 names", `${ONE}\n${HUNDRED}`, "", ISSUED);
  await step("first issue, wildcard by dns-01", LINES, "", ISSUED);
  await step("nothing due", LINES, "", IDLE);
  await step("renewal", LINES, `--renew ${ONE}`, ISSUED);
  await step("changed names", CHANGED, "", ISSUED);
  await step("revocation", CHANGED, `--revoke ${ONE} --yes`, /^revoked/m);
  await step("replacement after revocation", CHANGED, "", ISSUED);
  const { changesKeys } = serversIn("", ports)[name];
  const [printed, code] = changesKeys
    ? [/^changed /m, 0] as const
    : [/the CA does not offer it$/m, 1] as const;
  await step("rollover", CHANGED, "--rollover --yes", printed, code);
  await step("renewal after rollover", CHANGED, `--renew ${ONE}`, ISSUED);

  // in this process, where waits are short
  bed.configure({ domains: `${CHANGED}lost.example.com` });
  using client = Deno.createHttpClient({ caCerts: [ca.root] });
  const { code: failed, stderr } = await runAt(bed, {
    fetch: (url, init) => fetch(url, { ...init, client }),
  });
  assert.match(stderr, /^FAILED +lost\.[^]*cannot validate the order: lost\.example\.com: /m);
  assert.equal(failed, 1);
  assert.deepEqual(bed.dropped(), []);
  passed("a failed validation");
}

if (import.meta.main) {
  if (Deno.args[0] === "inside") {
    const wanted = Deno.args.slice(1);
    for (const [name, { program }] of Object.entries(serversIn("", PORTS))) {
      if (wanted.length > 0 && !wanted.includes(name)) continue;
      if (program === undefined) console.log(name.padEnd(15), "skipped: not installed");
      else await lifeCycle(name as Name, PORTS, (step) => console.log(name.padEnd(15), step));
    }
    Deno.exit();
  }
  const enter = "ip link set lo up; file=$(mktemp); echo nameserver 127.0.0.1 > $file\n" +
    'mount --bind $file /etc/resolv.conf; rm $file; exec "$@"';
  const own = [Deno.execPath(), "run", "-q", "--no-prompt", "-P=tests", import.meta.filename!, "inside"];
  const args = ["--net", "--mount", "sh", "-euc", enter, "sh", ...own, ...Deno.args];
  Deno.exit((await new Deno.Command("unshare", { args }).spawn().status).code);
}
