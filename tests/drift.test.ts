/**
 * Goal: every run checks what endpoints serve. What is certainly ours and certainly wrong is repaired and reported;
 * anything else that is wrong is a problem for a person.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { readCertificate } from "../lib/x509.ts";
import { type Ran, testBed, until } from "./bed.ts";
import { RELOAD, type Site, siteTest, startBalancer, startSite, UPLOAD } from "./site.ts";
import { makeCertificate, tcpServer } from "./tls.ts";

const HOUR = 3600_000, DAY = 24 * HOUR;
const CERT = "www.example.com.ec.pem", KEY = "www.example.com.ec.key";

const kinds = ({ events }: Ran) =>
  events.map(({ kind }) => kind).filter((kind) => kind === "drift" || kind === "delivery");

/** A context in which the site's port is found at these ports of 127.0.0.1 or of another `address`. */
function routed({ port }: Site, ...found: readonly { port: number; address?: string }[]) {
  const addresses = found.map(({ port, address = "127.0.0.1" }) => ({ address, port }));
  const route = (_: string, at: number) =>
    Promise.resolve(at === port ? addresses : [{ address: "127.0.0.1", port: at }]);
  return { route };
}

siteTest(
  "a delivery is verified at each endpoint, for each key type",
  async () => {
    await using site = await startSite({ keyTypes: ["rsa", "ec"], age: 80 });
    const { code, stdout, stderr } = await site.run();
    assert.deepEqual([code, stderr], [0, ""], stdout);
    for (const type of ["rsa", "ec"]) {
      assert.match(stdout, new RegExp(`^verified .* \\(${type}\\) serves the newest .* valid until `, "m"));
    }
  },
);

siteTest("R9: a section is verified only for the key types that it configures", async () => {
  const actions =
    `[pg]\ndomains: www.example.com\nkeyTypes: rsa\n${UPLOAD}\n${RELOAD}\nverify: ["127.0.0.1:PORT#DOMAIN"]
[every]\nkeyTypes: rsa ec\nupdate: ["true"]`;
  await using site = await startSite({ age: 80, actions, keyTypes: ["rsa"] });
  const { code, stdout } = await site.run();
  assert.deepEqual([code, stdout.match(/^verified /gm)!.length], [0, 1]);
});

siteTest("a service that got only its RSA certificate replaced is reported", async () => {
  const actions = `[default]
uploadEach: ["test KEY_TYPE = ec || { cp CERT_FILE HERE/web/DOMAIN.KEY_TYPE.pem && cp KEY_FILE HERE/web/DOMAIN.KEY_TYPE.key; }"]
${RELOAD}\nverify: ["127.0.0.1:PORT#DOMAIN"]`;
  await using site = await startSite({
    ...{ age: 80, actions, keyTypes: ["rsa", "ec"], settings: "verifyWait: 5" },
  });
  const { code, stdout, stderr } = await site.run();
  assert.equal(code, 1);
  assert.match(stdout, /^verified .* \(rsa\) serves the newest/m);
  assert.match(stderr, /^WRONG .* \(ec\) serves an older/m);
});

siteTest(
  "R5: old files restored a week later are detected by the next run, replaced, and reported by --cron",
  async () => {
    await using site = await startSite({ age: 80 });
    const { bed, run } = site;
    const old = site.save();
    await run();
    bed.ca.advance(DAY);
    assert.deepEqual([(await run({ cron: true })).stdout], [""]);
    await site.restore(old);
    const soon = await run({ cron: true }); // the last good probe is younger than five hours
    assert.deepEqual([soon.code, soon.stdout, soon.stderr], [0, "", ""]);
    bed.ca.advance(7 * HOUR);
    const { code, stdout, requests } = await run({ cron: true });
    assert.deepEqual([code, requests.length], [0, 0]);
    assert.match(stdout, /^drift +\[default\] .*#www\.example\.com \(ec\) serves an older certificate/m);
    assert.match(stdout, /^delivered \[default\] 1 certificate: drift$/m);
    assert.match(stdout, /^verified /m);
    assert.deepEqual([(await run({ cron: true })).stdout], [""]);
  },
);

siteTest(
  "when a section receives a new certificate, its other lines are probed as well",
  async () => {
    await using site = await startSite({ domains: "www.example.com\nother.example.com", age: 30 });
    const { bed, run } = site;
    const old = site.save();
    await run({ named: { renew: ["www.example.com"] } });
    await run();
    await site.restore(old);
    bed.ca.advance(7 * HOUR);
    Deno.removeSync(bed.path("prod", "cert", "other.example.com-cert-combined.prime256v1.pem"));
    const { stdout } = await run();
    assert.match(stdout, /^issued +other/m);
    assert.match(stdout, /^drift .*#www\.example\.com \(ec\) serves an older certificate/m);
  },
);

siteTest(
  "an expired or self-signed certificate is repaired; a newer or foreign one, or one for other names, is left alone",
  async () => {
    await using site = await startSite();
    const { bed, run } = site;
    await run();
    const key = site.save()[KEY]!;
    const forge = async (name: string, since: number, until = 90 * DAY) => {
      const [notBefore, notAfter] = [since, until].map((ms) => new Date(bed.ca.now.getTime() + ms));
      const chain = await bed.ca.forge(key, [name], { notBefore: notBefore!, notAfter: notAfter! });
      return { [CERT]: chain, [KEY]: key };
    };
    await makeCertificate(bed.home, "self", "ec", ["www.example.com"]);
    const [pem, selfKey] = ["pem", "key"].map((end) => Deno.readTextFileSync(join(bed.home, `self.${end}`)));
    const repaired: [Record<string, string>, message: string][] = [
      [await forge("www.example.com", -90 * DAY, -DAY), "serves an expired certificate"],
      [{ [CERT]: pem!, [KEY]: selfKey! }, "serves a self-signed certificate"],
    ];
    for (const [files, message] of repaired) {
      await site.restore(files);
      bed.ca.advance(7 * HOUR);
      const ran = await run();
      assert.deepEqual([ran.code, kinds(ran)], [0, ["drift", "delivery"]], message);
      assert.ok(ran.stdout.includes(message), ran.stdout);
      await site.settle();
    }
    const leftAlone: [Record<string, string>, message: RegExp][] = [
      [await forge("www.example.com", HOUR), /serves a certificate that lematt did not deliver/],
      [await forge("*.example.com", HOUR), /serves a certificate that lematt did not deliver/],
      [await forge("other.example.com", -HOUR), /serves a certificate for other\.example\.com/],
      [await forge("\x1b[31m\r\u0085www.example.com", -HOUR), /serves a certificate for /],
    ];
    for (const [files, message] of leftAlone) {
      await site.restore(files);
      bed.ca.advance(7 * HOUR);
      const ran = await run({ cron: true });
      assert.deepEqual([ran.code, kinds(ran)], [1, []], ran.stderr);
      assert.match(ran.stderr, message);
      assert.doesNotMatch(ran.stderr, /[^\x20-\x7e\n]/);
      assert.equal((await run({ cron: true })).stderr, "", "reported once a day");
      await run({ named: { deliver: ["[default]"] } });
      bed.ca.advance(21 * HOUR);
    }
  },
);

siteTest("a service that does not answer is a problem, but not a reason to deliver", async () => {
  await using site = await startSite();
  const { bed, run } = site;
  await run();
  bed.ca.advance(7 * HOUR);
  const ran = await run(routed(site, { port: 1 }));
  assert.deepEqual([ran.code, kinds(ran)], [1, []]);
  assert.match(ran.stderr, /^problem .*unreachable at 127\.0\.0\.1: /m);
  const well = await run(); // an endpoint with a problem is probed by every run
  assert.deepEqual([well.code, kinds(well)], [0, []]);
});

siteTest("an address of two that serves the old certificate is detected, named and repaired", async () => {
  await using site = await startSite({ age: 80 });
  const { bed, run, port } = site;
  const context = routed(site, { address: "127.0.0.2", port }, { port: await site.startStale() });
  const { code, stdout, stderr } = await run(context);
  assert.equal(code, 1);
  assert.match(stdout, /^verified .* at 127\.0\.0\.2/m);
  assert.match(stderr, /^WRONG .*serves an older certificate at 127\.0\.0\.1/m);
  // the commands cannot repair it: they are run three times, then once a day, and only after another probe
  const repeated: number[] = [];
  for (let n = 0; n < 5; n++) {
    repeated.push(kinds(await run(context)).filter((kind) => kind === "delivery").length);
  }
  assert.deepEqual(repeated, [1, 1, 1, 0, 0]);
  bed.ca.advance(20 * HOUR);
  assert.equal(kinds(await run(context)).length, 2);
});

siteTest("R8: a stale server behind a load balancer is detected every time", async () => {
  await using site = await startSite({ age: 80, settings: "verifyWait: 5" });
  await using balancer = await startBalancer(site.port, await site.startStale());
  for (let n = 1; n <= 3; n++) {
    const { code, stderr } = await site.run(routed(site, balancer));
    assert.equal(code, 1);
    assert.match(stderr, /^(WRONG|problem) .*serves an older certificate/m);
  }
});

siteTest(
  "a reload without effect is detected; a service that was only slow is not reloaded again",
  async () => {
    const actions =
      `[default]\n${UPLOAD}\nupdate: ["echo reload >> HERE/log"]\nverify: ["127.0.0.1:PORT#DOMAIN"]`;
    await using site = await startSite({ age: 80, actions, settings: "verifyWait: 1" });
    const night = await site.run();
    assert.deepEqual([night.code, site.bed.take()], [1, ["reload"]]);
    assert.match(night.stderr, /^WRONG .*serves an older certificate/m);
    await site.reload();
    const morning = await site.run();
    assert.deepEqual([morning.code, site.bed.take(), morning.stderr], [0, [], ""]);
  },
);

siteTest(
  "R7: an endpoint in two sections is probed once; one without a line's name is probed for the section's names",
  async () => {
    const actions =
      `[default]\n${UPLOAD}\n${RELOAD}\nverify: ["127.0.0.1:PORT", "127.0.0.1:PORT#web1.internal.example"]
[every]\nverify: ["127.0.0.1:PORT#DOMAIN"]`;
    await using site = await startSite({ actions });
    const { bed, run, port } = site;
    await using relay = await startBalancer(port);
    assert.equal((await run()).code, 0);
    assert.deepEqual(Object.keys(bed.state("prod").probes), [`127.0.0.1:${port}#www.example.com ec`]);
    bed.ca.advance(7 * HOUR);
    assert.equal((await run({ ...routed(site, relay), random: () => 0.9 })).code, 0);
    assert.equal(relay.counts.connections, 2, "one to see whether it answers, one for the certificate");
  },
);

siteTest(
  "R10: --test accepts production's certificate at an endpoint and reports its own there; the next --prod repairs that",
  async () => {
    await using site = await startSite({ settings: "verifyWait: 2" });
    const { bed, run, port } = site;
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
    // now it overwrites what is served
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
  },
);

siteTest("S2: an endpoint that never answers delays no other section", async () => {
  await using silent = await tcpServer(() => {});
  const actions = `[silent]\ndomains: www.example.com\nverify: ["127.0.0.1:${silent.port}"]\nupdate: ["true"]
[b]\ndomains: b.example.com\nupdate: ["touch HERE/b"]`;
  const domains = "www.example.com\nb.example.com";
  await using site = await startSite({ domains, actions, settings: "verifyWait: 0" });
  const { bed, run } = site;
  Deno.removeSync(bed.path("prod", "cert", "b.example.com-cert-combined.prime256v1.pem"));
  const stop = new AbortController();
  const running = run({ signal: stop.signal });
  await until("[b] is delivered", () => existsSync(join(bed.home, "b")), 8); // a probe waits for 10 s
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
});

Deno.test("R16: a line whose names change reports its old certificate's expiry until the new one is in place", async () => {
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
  const { notAfter } = readCertificate(bed.text("prod/cert/a.example.com-cert-combined.prime256v1.pem"));
  const again = await bed.run({ mode: "prod" });
  assert.ok(again.stderr.includes(`expires ${notAfter.toISOString().slice(0, 10)}`), again.stderr);
});
