/**
 * step-ca where it is on PATH: a CA that leaves orders pending when a validation has failed, changes no account keys, says nothing
 * of renewal, and issues for a day. tests/cas.ts has the whole life, there and at others.
 */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { testBed } from "./bed.ts";
import { SERVERS } from "./cas-servers.ts";
import { startDns } from "./ca-dns.ts";

const { lack, start } = SERVERS["step-ca"]!;
const NAME = "one.example.com";

Deno.test({
  name: `step-ca issues, renews, revokes, and says why it does not${lack === undefined ? "" : ` (${lack})`}`,
  ignore: lack !== undefined,
  async fn() {
    await using bed = await testBed({ domains: `${NAME} two.example.com` });
    await using dns = await startDns((name, type) =>
      type === "A" && /^(one|two)\./.test(name) ? ["127.0.0.1"] : []
    );
    await Deno.mkdir(`${bed.home}/step-ca`);
    const ca = await start(`${bed.home}/step-ca`, { dnsPort: dns.port, httpPort: bed.web.port });
    try {
      await Deno.writeTextFile(bed.path("root.pem"), ca.root);
      bed.configure({ settings: `testDirectory: ${ca.directoryUrl}\ncaBundle: root.pem\nkeyTypes: ec\n` });
      /** What the program says, and its exit status. */
      const lematt = async (...args: string[]) => {
        const { code, stdout, stderr } = await bed.lematt("--test", ...args);
        return `${stdout}${stderr}exit status ${code}\n`;
      };
      const serial = () =>
        new X509Certificate(bed.text(`test/cert/${NAME}_two.example.com-cert-combined.prime256v1.test.pem`))
          .serialNumber;

      assert.match(await lematt(), /^issued .*\n[^]*exit status 0$/m);
      const first = serial();
      assert.match(await lematt(), /^nothing due, 1 kept[^]*exit status 0$/m);
      assert.match(await lematt("--renew", NAME), /^issued .*\n[^]*exit status 0$/m);
      const second = serial();
      assert.notEqual(second, first);
      assert.match(await lematt("--rollover", "--yes"), /the CA does not offer it\nexit status 1$/m);
      assert.deepEqual(
        [...Deno.readDirSync(bed.conf)].map(({ name }) => name).filter((name) => /account/.test(name)),
        [
          "account.key.test",
        ],
      );
      assert.match(await lematt("--revoke", NAME, "--yes"), /exit status 0$/m);
      assert.match(await lematt(), /^issued .*\n[^]*exit status 0$/m);

      bed.configure({ domains: `${NAME} two.example.com\nlost.example.com` });
      const begun = performance.now();
      const failed = await lematt();
      assert.match(
        failed,
        /cannot validate the order: lost\.example\.com: .*lookup|no such host|lost\.example\.com/,
      );
      assert.match(failed, /exit status 1$/m);
      assert(performance.now() - begun < 90_000);
      assert.deepEqual(bed.dropped(), []);
    } finally {
      await ca.stop();
    }
  },
});
