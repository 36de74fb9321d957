/**
 * Goal: the certificates of real services are seen, the old ones before a renewal and the new ones after it, by the commands
 * that administrators use to have them reloaded. What is not installed is passed over.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import type { Endpoint, KeyType } from "../lib/config.ts";
import { systemContext } from "../lib/context.ts";
import { probe } from "../lib/probe.ts";
import type { Certificate } from "../lib/x509.ts";
import { which } from "./bench-measure.ts";
import { run } from "./install.ts";
import {
  postgres,
  type Running,
  startDovecot,
  startHaproxy,
  startPostfix,
  startPostgres,
} from "./services.ts";
import { freePort, makeCertificate, startNginx, startServer } from "./tls.ts";

/** A service that runs in `home`, where `rsa.pem`, `rsa.key`, `ec.pem` and `ec.key` are its certificates and keys. */
interface Service {
  readonly name: string;
  readonly program: string;
  readonly starttls?: Endpoint["starttls"];
  /** The certificates that it can have at once. */
  readonly keyTypes: readonly KeyType[];
  /** What comes of asking for another type. */
  readonly otherwise?: string;
  readonly start: (home: string, port: number) => Promise<Running>;
  /** Has the new files read, where that needs no restart. */
  readonly reload?: (running: Running, home: string) => Promise<unknown> | void;
}

const hangUp = ({ child }: Running) => child.kill("SIGHUP");
const BOTH: readonly KeyType[] = ["rsa", "ec"];

const services: readonly Service[] = [
  {
    name: "nginx",
    program: "nginx",
    keyTypes: BOTH,
    start: (home, port) =>
      startNginx(home, port, (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("rsa", "ec")} }`),
    reload: hangUp,
  },
  {
    name: "HAProxy, one file for certificate and key,",
    program: "haproxy",
    keyTypes: BOTH,
    async start(home, port) {
      await bundle(home);
      return await startHaproxy(home, port, `bind 127.0.0.1:${port} ssl crt ${home}/site.pem`);
    },
    async reload({ child }, home) {
      await bundle(home);
      child.kill("SIGUSR2");
    },
  },
  {
    name: "Postfix",
    program: "postfix",
    starttls: "smtp",
    keyTypes: BOTH,
    start: (home, port) =>
      startPostfix(
        home,
        port,
        `smtpd_tls_chain_files = ${home}/rsa.key, ${home}/rsa.pem, ${home}/ec.key, ${home}/ec.pem`,
      ),
    reload: (_, home) => run(which("postfix")!, "-c", home, "reload"),
  },
  ...(["imap", "pop3"] as const).map((starttls): Service => ({
    name: `Dovecot, ${starttls},`,
    program: "dovecot",
    starttls,
    keyTypes: BOTH,
    start: (home, port) =>
      startDovecot(
        home,
        port,
        starttls,
        `ssl_cert = <${home}/rsa.pem
ssl_key = <${home}/rsa.key
ssl_alt_cert = <${home}/ec.pem
ssl_alt_key = <${home}/ec.key`,
      ),
    reload: hangUp,
  })),
  {
    name: "PostgreSQL",
    program: "postgres",
    starttls: "postgres",
    keyTypes: ["rsa"],
    start: (home, port) =>
      startPostgres(
        home,
        port,
        `ssl = on\nssl_cert_file = '${home}/rsa.pem'\nssl_key_file = '${home}/rsa.key'`,
      ),
    reload: hangUp,
  },
  {
    name: "OpenLDAP",
    program: "slapd",
    starttls: "ldap",
    keyTypes: ["rsa"],
    otherwise: "unreachable: closes the connection in the handshake",
    async start(home, port) {
      await Deno.writeTextFile(
        join(home, "slapd.conf"),
        `TLSCertificateFile ${home}/rsa.pem\nTLSCertificateKeyFile ${home}/rsa.key\npidfile ${home}/pid\n`,
      );
      return await startServer(which("slapd")!, [
        "-d",
        "0",
        "-f",
        `${home}/slapd.conf`,
        "-h",
        `ldap://127.0.0.1:${port}`,
      ], port);
    },
  },
  {
    name: "vsftpd",
    program: "vsftpd",
    starttls: "ftp",
    keyTypes: ["rsa"],
    async start(home, port) {
      await Deno.writeTextFile(
        join(home, "vsftpd.conf"),
        `background=NO\nlisten=YES\nlisten_address=127.0.0.1\nlisten_port=${port}\nsecure_chroot_dir=${home}\n` +
          `ssl_enable=YES\nallow_anon_ssl=YES\nrsa_cert_file=${home}/rsa.pem\nrsa_private_key_file=${home}/rsa.key\n`,
      );
      return await startServer(which("vsftpd")!, [join(home, "vsftpd.conf")], port);
    },
  },
];

/** Writes the files that HAProxy takes for site.pem. */
async function bundle(home: string): Promise<void> {
  for (const [file, ending] of [["rsa", "rsa"], ["ec", "ecdsa"]]) {
    const parts = await Promise.all(
      ["pem", "key"].map((kind) => Deno.readTextFile(join(home, `${file}.${kind}`))),
    );
    await Deno.writeTextFile(join(home, `site.pem.${ending}`), parts.join(""));
  }
}

/** Certificates before and after a renewal, made once. */
const directory = await Deno.makeTempDir({ prefix: "lematt-services-" });
addEventListener("unload", () => Deno.removeSync(directory, { recursive: true }));
const certificates: Record<string, Certificate> = {};
await Promise.all(["old", "new"].flatMap((age) =>
  BOTH.map(async (keyType) => {
    certificates[`${age} ${keyType}`] = await makeCertificate(directory, `${age}-${keyType}`, keyType, [
      "localhost",
    ]);
  })
));

async function install(age: "old" | "new", home: string): Promise<void> {
  for (const file of BOTH.flatMap((keyType) => [`${keyType}.pem`, `${keyType}.key`])) {
    // as root writes them over what is there: owner and mode stay
    await Deno.writeTextFile(join(home, file), await Deno.readTextFile(join(directory, `${age}-${file}`)), {
      mode: 0o600,
    });
  }
}

async function see(port: number, starttls: Endpoint["starttls"]): Promise<string[]> {
  const context = systemContext({
    fetch,
    userAgent: "",
    signal: new AbortController().signal,
    warn: assert.fail,
  });
  const endpoint = { text: "service", host: "127.0.0.1", port, starttls, sni: "localhost" };
  const sights = await probe(BOTH.map((keyType) => ({ endpoint, keyType })), context, 3);
  return sights.map(({ kind, certificate, detail }) => {
    const which = Object.keys(certificates).find((key) =>
      certificates[key]!.fingerprint === certificate?.fingerprint
    );
    return which ?? `${kind}: ${detail}`;
  });
}

for (const { name, program, starttls, keyTypes, otherwise, start, reload } of services) {
  const missing = [program, "openssl"].find((name) =>
    (name === "postgres" ? postgres : which(name)) === undefined
  );
  const reason = missing !== undefined
    ? `${missing} is not installed`
    : Deno.uid() !== 0
    ? "root is needed"
    : undefined;
  if (reason !== undefined) console.log(`${name} is not tested: ${reason}`);
  Deno.test(`${name} is seen to serve its old certificates, then its new ones`, {
    ignore: reason !== undefined,
  }, async () => {
    const home = join(directory, crypto.randomUUID());
    await Deno.mkdir(home);
    await Deno.chmod(directory, 0o755);
    await install("old", home);
    const port = freePort();
    await using running = await start(home, port);
    const expected = (age: string) =>
      BOTH.map((keyType) =>
        keyTypes.includes(keyType) ? `${age} ${keyType}` : otherwise ?? "refused: no certificate of this type"
      );
    assert.deepEqual(await see(port, starttls), expected("old"));
    if (reload === undefined) return;
    await install("new", home);
    await reload(running, home);
    let seen: string[] = [];
    for (
      const deadline = Date.now() + 10_000;
      Date.now() < deadline && seen.join() !== expected("new").join();
    ) {
      seen = await see(port, starttls);
    }
    assert.deepEqual(seen, expected("new"));
  });
}
