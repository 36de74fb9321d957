/**
 * lematt with step-ca: a CA that leaves orders pending after a failed validation, offers neither key change nor renewal
 * information, and issues for a day. tests/cas.ts runs the whole life cycle at this and other CAs.
 */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { testBed } from "./bed.ts";
import { startDns } from "./ca-dns.ts";
import { startCa } from "./cas.ts";
import { runAt } from "./pebble.ts";
import { lackOf } from "./programs.ts";
import { freePort } from "./tls.ts";

const lack = lackOf("step-ca", "openssl");
const name = "certificates are issued, renewed and revoked by step-ca, and a failed validation is reported";
if (lack !== undefined) console.log(`${name} is not tested: ${lack}`);
Deno.test({ name, ignore: lack !== undefined }, async () => {
  await using bed = await testBed({ domains: "example.com" });
  await using dns = await startDns((name) => name === "example.com" ? ["127.0.0.1"] : []);
  const ports = { ca: freePort(), dns: dns.port, http: bed.web.port };
  await using ca = await startCa("step-ca", `${bed.home}/step-ca`, ports);
  await Deno.writeTextFile(bed.path("root.pem"), ca.root);
  bed.configure({ settings: `testDirectory: ${ca.directoryUrl}\ncaBundle: root.pem\nkeyTypes: ec\n` });
  const serials = new Set<string>();
  const steps = [
    ["", 0, /^issued /m],
    ["", 0, /^nothing due, 1 kept/m],
    ["--renew example.com", 0, /^issued /m],
    ["--rollover --yes", 1, /the CA does not offer it$/m],
    ["--revoke example.com --yes", 0, /^revoked/m],
    ["", 0, /^issued /m],
  ] as const;
  for (const [args, code, expected] of steps) {
    const ended = await bed.lematt("--test", ...args.split(" ").filter(Boolean));
    assert.equal(ended.code, code, ended.stderr);
    assert.match(ended.stdout + ended.stderr, expected);
    const chain = bed.text("test/cert/example.com-cert-combined.prime256v1.test.pem");
    serials.add(new X509Certificate(chain).serialNumber);
  }
  assert.equal(serials.size, 3);

  // in this process, where waits are short
  bed.configure({ domains: "example.com\nlost.example.com" });
  using client = Deno.createHttpClient({ caCerts: [ca.root] });
  const ran = await runAt(bed, { fetch: (url, init) => fetch(url, { ...init, client }) });
  assert.equal(ran.code, 1);
  assert.match(
    ran.stderr,
    /^FAILED +lost\.example\.com [^]*cannot validate the order: lost\.example\.com: /m,
  );
  assert.deepEqual(bed.dropped(), []);
});
