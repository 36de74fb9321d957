/**
 * Goal: what is served is seen in every run; what is certainly ours and certainly wrong is repaired and said, and anything
 * else is a problem for a person.
 */

import assert from "node:assert/strict";
import { createPublicKey } from "node:crypto";
import { existsSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { readCertificate } from "../lib/x509.ts";
import { type Ran, testBed, until } from "./bed.ts";
import { NEEDS_NGINX, RELOAD, UPLOAD, withSite } from "./site.ts";
import { freePort, makeCertificate, startNginx, tcpServer } from "./tls.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const kinds = ({ events }: Ran) =>
  events.map(({ kind }) => kind).filter((kind) => kind === "drift" || kind === "delivered");

Deno.test(
  "a delivery is verified at each endpoint, for each type of key, and remembered as served",
  NEEDS_NGINX,
  async () => {
    await withSite({ keyTypes: ["rsa", "ec"], age: 80 }, async ({ run }) => {
      const { code, stdout, stderr } = await run();
      assert.deepEqual([code, stderr], [0, ""], stdout);
      assert.match(
        stdout,
        /^verified .* \(rsa\) serves the newest certificate at 127\.0\.0\.1, valid until /m,
      );
      assert.match(
        stdout,
        /^verified .* \(ec\) serves the newest certificate at 127\.0\.0\.1, valid until /m,
      );
    });
  },
);

Deno.test(
  "old files that are restored a week later are seen by the next run, replaced, and said with --cron",
  NEEDS_NGINX,
  async () => {
    await withSite({ age: 80 }, async ({ bed, run, save, restore }) => {
      const old = await save();
      await run();
      bed.ca.advance(DAY);
      assert.deepEqual([(await run({ cron: true })).stdout], [""]);
      await restore(old);
      const soon = await run({ cron: true }); // the last good probe is younger than six hours
      assert.deepEqual([soon.code, soon.stdout, soon.stderr], [0, "", ""]);
      bed.ca.advance(6 * HOUR + MINUTE);
      const { code, stdout, requests } = await run({ cron: true });
      assert.deepEqual([code, requests.length], [0, 0]);
      assert.match(
        stdout,
        /^drift +\[default\] 127\.0\.0\.1:\d+#www\.example\.com \(ec\) serves an older certificate/m,
      );
      assert.match(stdout, /^delivered \[default\] 1 certificate: drift$/m);
      assert.match(stdout, /^verified /m);
      assert.deepEqual([(await run({ cron: true })).stdout], [""]);
    });
  },
);

Deno.test(
  "what a section serves of other lines is seen, too, when it is given a new certificate",
  NEEDS_NGINX,
  async () => {
    const domains = "www.example.com\nother.example.com";
    await withSite({ domains, age: 30 }, async ({ bed, run, save, restore }) => {
      const old = await save();
      await run({ named: { renew: ["www.example.com"] } });
      await run();
      await restore(old);
      bed.ca.advance(7 * HOUR);
      Deno.removeSync(bed.path("prod", "cert", "other.example.com-cert-combined.prime256v1.pem"));
      const { stdout } = await run();
      assert.match(stdout, /^issued +other/m);
      assert.match(stdout, /^drift .*#www\.example\.com \(ec\) serves an older certificate/m);
    });
  },
);

Deno.test("an expired or self-signed certificate for the name is repaired, too", NEEDS_NGINX, async () => {
  await withSite({ age: 80 }, async ({ bed, run, restore }) => {
    await run();
    const home = join(bed.home, "web");
    const key = Deno.readTextFileSync(join(home, "www.example.com.ec.key"));
    const expired = bed.ca.forge({
      publicKey: createPublicKey(key),
      identifiers: [{ type: "dns", value: "www.example.com" }],
      notBefore: new Date(0),
      notAfter: new Date(DAY),
    });
    await makeCertificate(bed.home, "self", "ec", ["www.example.com"]);
    const self = ["pem", "key"].map((end) => Deno.readTextFileSync(join(bed.home, `self.${end}`)));
    for (
      const [cert, keyPem, said] of [[expired, key, "an expired"], [
        self[0]!,
        self[1]!,
        "a self-signed",
      ]] as const
    ) {
      await restore({ "www.example.com.ec.pem": cert, "www.example.com.ec.key": keyPem });
      bed.ca.advance(7 * HOUR);
      const { code, stdout } = await run();
      assert.equal(code, 0, said);
      assert.ok(stdout.includes(`serves ${said} certificate`), stdout);
      assert.match(stdout, /^delivered \[default\] 1 certificate: drift$/m);
    }
  });
});

Deno.test(
  "a newer certificate, another's, or one for other names is left alone and is a problem",
  NEEDS_NGINX,
  async () => {
    await withSite({}, async ({ bed, run, restore }) => {
      await run();
      const web = join(bed.home, "web");
      const key = Deno.readTextFileSync(join(web, "www.example.com.ec.key"));
      const forge = (name: string, hours: number) =>
        bed.ca.forge({
          publicKey: createPublicKey(key),
          identifiers: [{ type: "dns", value: name }],
          notBefore: new Date(bed.ca.now.getTime() + hours * HOUR),
          notAfter: new Date(bed.ca.now.getTime() + 90 * DAY),
        });
      const table = [
        ["newer", forge("www.example.com", 1), /serves a certificate that lematt did not deliver/],
        ["other names", forge("other.example.com", -1), /serves a certificate for other\.example\.com/],
        ["a wildcard", forge("*.example.com", 1), /serves a certificate that lematt did not deliver/],
      ] as const;
      for (const [what, pem, said] of table) {
        await restore({ "www.example.com.ec.pem": pem });
        bed.ca.advance(7 * HOUR);
        const ran = await run({ cron: true });
        assert.deepEqual([ran.code, kinds(ran)], [1, []], what);
        assert.match(ran.stderr, said, what);
        assert.equal((await run({ cron: true })).stderr, "", `${what}: said once a day`);
        await run({ named: { deliver: ["[default]"] } });
        bed.ca.advance(21 * HOUR);
      }
    });
  },
);

Deno.test(
  "a service that nobody answers for is a problem, and no reason to deliver",
  NEEDS_NGINX,
  async () => {
    await withSite({}, async ({ bed, run, port }) => {
      await run();
      bed.ca.advance(7 * HOUR);
      const route = (_: string, at: number) =>
        Promise.resolve([{ address: "127.0.0.1", port: at === port ? 1 : at }]);
      const ran = await run({ route });
      assert.deepEqual([ran.code, kinds(ran)], [1, []]);
      assert.match(ran.stderr, /^problem .*unreachable at 127\.0\.0\.1: /m);
      const well = await run(); // what is not right is probed by the next run, however soon
      assert.deepEqual([well.code, kinds(well)], [0, []]);
    });
  },
);

Deno.test(
  "one of two addresses that serves the old certificate is found, named and repaired",
  NEEDS_NGINX,
  async () => {
    await withSite({ age: 80 }, async ({ bed, run, save, port }) => {
      const stale = freePort();
      const old = join(bed.home, "old");
      await Deno.mkdir(old);
      for (const [name, text] of Object.entries(await save())) Deno.writeTextFileSync(join(old, name), text);
      await using _ = await startNginx(
        old,
        stale,
        (pair) => `server { listen 127.0.0.1:${stale} ssl; ${pair("www.example.com.ec")} }`,
      );
      const route = (_: string, at: number) =>
        Promise.resolve(
          at === port
            ? [{ address: "127.0.0.2", port }, { address: "127.0.0.1", port: stale }]
            : [{ address: "127.0.0.1", port: at }],
        );
      const { code, stdout, stderr } = await run({ route });
      assert.equal(code, 1);
      assert.match(stdout, /^verified .* at 127\.0\.0\.2/m);
      assert.match(stderr, /^WRONG .*serves an older certificate at 127\.0\.0\.1/m);
      // its commands cannot help: they are repeated three times, then once a day, and only after another probe
      const repeated: number[] = [];
      for (let n = 0; n < 5; n++) {
        repeated.push(
          kinds(await run({ route })).filter((kind) => kind === "delivered").length,
        );
      }
      assert.deepEqual(repeated, [1, 1, 1, 0, 0]);
      bed.ca.advance(20 * HOUR);
      assert.equal(kinds(await run({ route })).length, 2);
    });
  },
);

Deno.test(
  "a reload that does nothing is found out; a service that was only slow is not reloaded again",
  NEEDS_NGINX,
  async () => {
    const actions =
      `[default]\n${UPLOAD}\nupdate: ["echo reload >> HERE/log"]\nverify: ["127.0.0.1:PORT#DOMAIN"]`;
    await withSite({ age: 80, actions, settings: "verifyWait: 1" }, async ({ bed, run, reload }) => {
      const night = await run();
      assert.deepEqual([night.code, bed.take()], [1, ["reload"]]);
      assert.match(night.stderr, /^WRONG .*serves an older certificate/m);
      await reload();
      const morning = await run();
      assert.deepEqual([morning.code, bed.take(), morning.stderr], [0, [], ""]);
    });
  },
);

Deno.test("a service of which only the RSA certificate was replaced is caught", NEEDS_NGINX, async () => {
  const actions = `[default]
uploadEach: ["test KEY_TYPE = ec || { cp CERT_FILE HERE/web/DOMAIN.KEY_TYPE.pem && cp KEY_FILE HERE/web/DOMAIN.KEY_TYPE.key; }"]
${RELOAD}\nverify: ["127.0.0.1:PORT#DOMAIN"]`;
  await withSite(
    { age: 80, actions, keyTypes: ["rsa", "ec"], settings: "verifyWait: 5" },
    async ({ run }) => {
      const { code, stdout, stderr } = await run();
      assert.equal(code, 1);
      assert.match(stdout, /^verified .* \(rsa\) serves the newest/m);
      assert.match(stderr, /^WRONG .* \(ec\) serves an older/m);
    },
  );
});

Deno.test("a section is verified for the types of keys that it asks for", NEEDS_NGINX, async () => {
  const actions =
    `[pg]\ndomains: www.example.com\nkeyTypes: rsa\n${UPLOAD}\n${RELOAD}\nverify: ["127.0.0.1:PORT#DOMAIN"]
[every]\nkeyTypes: rsa ec\nupdate: ["true"]`;
  await withSite({ age: 80, actions, keyTypes: ["rsa"] }, async ({ run }) => {
    const { code, stdout } = await run();
    assert.equal(code, 0);
    assert.equal(stdout.match(/^verified /gm)!.length, 1);
  });
});

Deno.test("a balancer before one fresh and one stale server is not right by luck", NEEDS_NGINX, async () => {
  await withSite({ age: 80, settings: "verifyWait: 5" }, async ({ bed, run, save, port }) => {
    const stale = freePort();
    const old = join(bed.home, "old");
    await Deno.mkdir(old);
    for (const [name, text] of Object.entries(await save())) Deno.writeTextFileSync(join(old, name), text);
    await using _ = await startNginx(
      old,
      stale,
      (pair) => `server { listen 127.0.0.1:${stale} ssl; ${pair("www.example.com.ec")} }`,
    );
    let turn = 0;
    await using balancer = await tcpServer((client) => {
      const server = connect(turn++ % 2 === 0 ? port : stale, "127.0.0.1");
      server.on("error", () => client.destroy());
      client.pipe(server).pipe(client);
    });
    const route = (_: string, at: number) =>
      Promise.resolve([{ address: "127.0.0.1", port: at === port ? balancer.port : at }]);
    const { code, stderr } = await run({ route });
    assert.equal(code, 1);
    assert.match(stderr, /^WRONG .*serves an older certificate/m);
  });
});

Deno.test(
  "an endpoint that two sections name is probed once; one that bears no line's name is asked for the section's",
  NEEDS_NGINX,
  async () => {
    const actions =
      `[default]\n${UPLOAD}\n${RELOAD}\nverify: ["127.0.0.1:PORT", "127.0.0.1:PORT#web1.internal.example"]
[every]\nverify: ["127.0.0.1:PORT#DOMAIN"]`;
    await withSite({ actions }, async ({ bed, run, port }) => {
      let connections = 0;
      await using counter = await tcpServer((client) => {
        connections++;
        const server = connect(port, "127.0.0.1");
        server.on("error", () => client.destroy());
        client.on("error", () => server.destroy());
        client.pipe(server).pipe(client);
      });
      const route = (_: string, at: number) =>
        Promise.resolve([{ address: "127.0.0.1", port: at === port ? counter.port : at }]);
      assert.equal((await run()).code, 0);
      assert.deepEqual(Object.keys(bed.state("prod").probes), [`127.0.0.1:${port}#www.example.com ec`]);
      bed.ca.advance(7 * HOUR);
      assert.equal((await run({ route, random: () => 0.9 })).code, 0);
      assert.equal(connections, 2, "one to see whether it answers, one for the certificate");
    });
  },
);

Deno.test(
  "--test passes where production is served, finds its own certificate there, and the next --prod repairs that",
  NEEDS_NGINX,
  async () => {
    await withSite({ settings: "verifyWait: 2" }, async ({ bed, run, port }) => {
      assert.equal((await run()).code, 0);
      // the rehearsal puts its files elsewhere
      bed.act(`[default]
uploadCerts: ["cp CERTS HERE/$LEMATT_MODE.pem"]
uploadEach: ["cp CERT_FILE HERE/web/DOMAIN.KEY_TYPE.pem && cp KEY_FILE HERE/web/DOMAIN.KEY_TYPE.key"]
${RELOAD}\nverify: ["127.0.0.1:${port}#DOMAIN"]`);
      const rehearsal = await run({ mode: "test" });
      assert.equal(rehearsal.code, 0, rehearsal.stderr);
      assert.match(rehearsal.stdout, /^verified .*finishes the handshake/m);
      assert.deepEqual([(await run()).code, kinds(await run())], [0, []]);
      // it overwrites what is served
      bed.act(`[default]\n${UPLOAD}\n${RELOAD}\nverify: ["127.0.0.1:${port}#DOMAIN"]`);
      await run();
      const wrong = await run({ mode: "test", sleep: (ms) => delay(ms / 4) });
      assert.equal(wrong.code, 1);
      assert.match(wrong.stderr, /^WRONG .*serves the certificate of --test/m);
      bed.configure({ settings: "keyTypes: ec\nari: no\nverifyWait: 30" });
      const repaired = await run();
      assert.equal(repaired.code, 0, repaired.stderr);
      assert.match(repaired.stdout, /^drift .*serves the certificate of --test/m);
      assert.match(repaired.stdout, /^verified /m);
    });
  },
);

Deno.test(
  "what a certificate of somebody else says of itself cannot steer the terminal",
  NEEDS_NGINX,
  async () => {
    await withSite({}, async ({ bed, run, restore }) => {
      const key = Deno.readTextFileSync(join(bed.home, "web", "www.example.com.ec.key"));
      await run();
      await restore({
        "www.example.com.ec.pem": bed.ca.forge({
          publicKey: createPublicKey(key),
          identifiers: [{ type: "dns", value: "\x1b[31m\r\u0085www.example.com" }],
          notBefore: new Date(0),
          notAfter: new Date(bed.ca.now.getTime() + 30 * DAY),
        }),
      });
      bed.ca.advance(7 * HOUR);
      const { stderr } = await run();
      assert.match(stderr, /serves a certificate for /);
      assert.doesNotMatch(stderr, /[^\x20-\x7e\n]/);
    });
  },
);

Deno.test(
  "an endpoint that never answers delays no other section",
  NEEDS_NGINX,
  async () => {
    await using silent = await tcpServer(() => {});
    const actions =
      `[silent]\ndomains: www.example.com\nverify: ["127.0.0.1:${silent.port}"]\nupdate: ["true"]
[b]\ndomains: b.example.com\nupdate: ["touch HERE/b"]`;
    await withSite(
      { domains: "www.example.com\nb.example.com", actions, settings: "verifyWait: 0" },
      async ({ bed, run }) => {
        Deno.removeSync(bed.path("prod", "cert", "b.example.com-cert-combined.prime256v1.pem"));
        const stop = new AbortController();
        const running = run({ signal: stop.signal });
        await until("[b] is delivered", () => existsSync(join(bed.home, "b")), 5); // a probe waits for 10 s
        stop.abort(new DOMException("interrupted", "AbortError"));
        await assert.rejects(running, { name: "AbortError" });
      },
    );
  },
);

Deno.test("the certificates of a line whose names change stay in view until the new one is in place", async () => {
  await using bed = await testBed({
    domains: "a.example.com b.example.com",
    settings: "keyTypes: ec\nari: no",
    ca: { reject: (name) => name === "new.example.com" ? "not this one" : undefined },
  });
  await bed.plant({ mode: "prod", age: 80 });
  bed.configure({ domains: "a.example.com b.example.com new.example.com" });
  const { code, stderr } = await bed.run({ mode: "prod" });
  assert.equal(code, 1);
  assert.match(stderr, /FAILED +a\.example\.com \+2/);
  const file = bed.path("prod", "cert", "a.example.com-cert-combined.prime256v1.pem");
  const { notAfter } = readCertificate(Deno.readTextFileSync(file));
  const again = await bed.run({ mode: "prod" });
  assert.ok(
    again.stderr.includes(`its certificate expires ${notAfter.toISOString().slice(0, 10)}`),
    again.stderr,
  );
});
