/**
 * lematt with step-ca: a CA that leaves orders pending after a failed validation, offers neither key change nor renewal
 * information, and issues for a day. tests/cas.ts runs the whole life cycle at this and other CAs.
 */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { testBed } from "./bed.ts";
import { startDns } from "./ca-dns.ts";
import { startServer } from "./cas.ts";
import { runAt } from "./pebble.ts";
import { freePort } from "./tls.ts";
import { lackOf } from "./together.ts";

const lack = lackOf("step-ca", "openssl");
const NAME = "one.example.com";
const CERT = `test/cert/${NAME}_two.example.com-cert-combined.prime256v1.test.pem`;

if (lack !== undefined) console.log(`step-ca is not tested: ${lack}`);
Deno.test({
  name: "certificates are issued, renewed and revoked by step-ca, and failures are reported",
  ignore: lack !== undefined,
  async fn() {
    await using stack = new AsyncDisposableStack();
    const bed = stack.use(await testBed({ domains: `${NAME} two.example.com` }));
    const dns = stack.use(await startDns());
    for (const name of [NAME, "two.example.com"]) dns.set(name, "A", "127.0.0.1");
    const ports = { ca: freePort(), dns: dns.port, http: bed.web.port };
    const ca = await startServer("step-ca", `${bed.home}/step-ca`, ports);
    stack.defer(() => ca.stop());
    await Deno.writeTextFile(bed.path("root.pem"), ca.root);
    bed.configure({ settings: `testDirectory: ${ca.directoryUrl}\ncaBundle: root.pem\nkeyTypes: ec\n` });
    const serials = new Set<string>();
    for (
      const [args, code, expected] of [
        [[], 0, /^issued /m],
        [[], 0, /^nothing due, 1 kept/m],
        [["--renew", NAME], 0, /^issued /m],
        [["--rollover", "--yes"], 1, /the CA does not offer it$/m],
        [["--revoke", NAME, "--yes"], 0, /^revoked/m],
        [[], 0, /^issued /m],
      ] as const
    ) {
      const ended = await bed.lematt("--test", ...args);
      assert.equal(ended.code, code, ended.stderr);
      assert.match(ended.stdout + ended.stderr, expected);
      serials.add(new X509Certificate(bed.text(CERT)).serialNumber);
    }
    assert.equal(serials.size, 3);
    const keys = [...Deno.readDirSync(bed.conf)].filter(({ name }) => name.startsWith("account"));
    assert.deepEqual(keys.map(({ name }) => name), ["account.key.test"]);

    // in this process, where waits are short
    bed.configure({ domains: `${NAME} two.example.com\nlost.example.com` });
    using client = Deno.createHttpClient({ caCerts: [ca.root] });
    const ran = await runAt(bed, { fetch: (url, init) => fetch(url, { ...init, client }) });
    assert.equal(ran.code, 1);
    assert.match(
      ran.stderr,
      /^FAILED +lost\.example\.com [^]*cannot validate the order: lost\.example\.com: /m,
    );
    assert.deepEqual(bed.dropped(), []);
  },
});
