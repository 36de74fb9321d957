/**
 * Other CA programs on loopback: step-ca, Caddy's acme_server, acme2certifier. For cas.ts, where DNS is on port 53 and web
 * servers are on port 80; step-ca can use other ports.
 */

import { existsSync } from "node:fs";
import { join } from "node:path";
import { listenerCertificate } from "./ca-x509.ts";
import { type Running, startProgram } from "./pebble.ts";
import { freePort } from "./tls.ts";

export interface Server {
  /** Why it cannot be started on this host. */
  readonly lack?: string;
  /** Whether it offers no key change. */
  readonly keepsKeys?: boolean;
  /** Lines for `[config]`. */
  readonly settings?: string;
  start(directory: string, network?: Network): Promise<Running>;
}

/** The ports for validation. */
export interface Network {
  /** The DNS server, on 127.0.0.1. */
  readonly dnsPort: number;
  readonly httpPort: number;
}
const STANDARD: Network = { dnsPort: 53, httpPort: 80 };

/** Makes `root.pem`, and `intermediate.pem` with its `key.pem`, in a directory. By openssl: all three CAs accept its key identifiers. */
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
/** acme2certifier as a TLS server with a thread for each connection. */
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

export const SERVERS: Readonly<Record<string, Server>> = {
  "step-ca": {
    lack: lacks("step-ca"),
    keepsKeys: true,
    async start(directory, { dnsPort, httpPort } = STANDARD) {
      if (!existsSync(join(directory, "root.pem"))) await makeAuthority(directory);
      const port = httpPort === 80 ? 9443 : freePort();
      const config = {
        root: "root.pem",
        crt: "intermediate.pem",
        key: "key.pem",
        address: `127.0.0.1:${port}`,
        dnsNames: ["127.0.0.1"],
        db: { type: "bbolt", dataSource: "db" },
        authority: { provisioners: [{ type: "ACME", name: "acme" }] },
      };
      await Deno.writeTextFile(join(directory, "ca.json"), JSON.stringify(config));
      const url = `https://127.0.0.1:${port}/acme/acme/directory`;
      const args = [
        "--insecure",
        "--acme-http-port",
        `${httpPort}`,
        "--resolver",
        `127.0.0.1:${dnsPort}`,
        "ca.json",
      ];
      return await startProgram(
        directory,
        [which("step-ca")!, ...args],
        [url],
        () => read(directory, "root.pem"),
      );
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
      return await startProgram(directory, command, ["https://127.0.0.1:9444/acme/local/directory"], root);
    },
  },
  "acme2certifier": {
    lack: PYTHON === undefined ? "ACME2CERTIFIER is not set" : undefined,
    settings: "parallel: 1\n", // with SQLite, simultaneous validations fail
    async start(directory) {
      if (!existsSync(join(directory, "root.pem"))) await makeAuthority(directory);
      const { root, certificate, key } = await listenerCertificate();
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
      return await startProgram(directory, command, ["https://127.0.0.1:9445/directory"], () => root);
    },
  },
};
