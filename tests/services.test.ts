/**
 * Goal: probes see the certificates of real services through their STARTTLS, and report what they refuse. Services with a
 * recipe are in recipes.test.ts. What is not installed is skipped.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import type { Endpoint } from "../lib/config.ts";
import { systemContext } from "../lib/context.ts";
import { probe } from "../lib/probe.ts";
import { which } from "./bench-measure.ts";
import { temporaryDirectory } from "./programs.ts";
import { type Running, startDovecot } from "./services.ts";
import { freePort, makeCertificate, startServer } from "./tls.ts";
import { lackOf, together } from "./together.ts";

/** A service that serves `home`/rsa.pem with `home`/rsa.key; what is seen of it, by RSA and by EC. */
interface Service {
  readonly program: string;
  readonly starttls: Endpoint["starttls"];
  readonly seen: readonly [string, string];
  readonly start: (home: string, port: number) => Promise<Running>;
}

const CLOSES = "unreachable: closes the connection in the handshake";

const services: readonly Service[] = [
  {
    program: "dovecot",
    starttls: "pop3",
    seen: ["rsa", CLOSES],
    start: (home, port) =>
      startDovecot(home, port, "pop3", `ssl_cert = <${home}/rsa.pem\nssl_key = <${home}/rsa.key`),
  },
  {
    program: "slapd",
    starttls: "ldap",
    seen: ["rsa", CLOSES],
    async start(home, port) {
      await Deno.writeTextFile(
        join(home, "slapd.conf"),
        `TLSCertificateFile ${home}/rsa.pem\nTLSCertificateKeyFile ${home}/rsa.key\npidfile ${home}/pid\n`,
      );
      const args = ["-d", "0", "-f", `${home}/slapd.conf`, "-h", `ldap://127.0.0.1:${port}`];
      return await startServer(which("slapd")!, args, port);
    },
  },
  {
    program: "vsftpd",
    starttls: "ftp",
    seen: ["rsa", "refused: no certificate of this type"],
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

const test = together("services");
for (const { program, starttls, seen, start } of services) {
  const lacking = lackOf(program, "openssl") ?? (Deno.uid() !== 0 ? "root is needed" : undefined);
  test(`probe() sees the certificate of ${program} through STARTTLS (${starttls})`, async () => {
    await using temporary = await temporaryDirectory();
    const home = temporary.path;
    const { fingerprint } = await makeCertificate(home, "rsa", "rsa", ["localhost"]);
    const port = freePort();
    await using _running = await start(home, port);
    const { signal } = new AbortController();
    const context = systemContext({ fetch, userAgent: "", signal, warn: assert.fail });
    const endpoint = { text: "service", host: "127.0.0.1", port, starttls, sni: "localhost" };
    const targets = (["rsa", "ec"] as const).map((keyType) => ({ endpoint, keyType }));
    const sights = await probe(targets, context, 3);
    assert.deepEqual(
      sights.map(({ kind, certificate, detail }) =>
        certificate?.fingerprint === fingerprint ? "rsa" : `${kind}: ${detail}`
      ),
      seen,
    );
  }, lacking);
}
