/**
 * Goal: every run checks what a real nginx serves. What is certainly ours and certainly wrong is repaired and reported, any
 * other error is a problem for a person, and no renewed certificate expires unnoticed on the host that uses it.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { status } from "../lib/run.ts";
import { exitStatus, statusMetrics } from "../lib/status.ts";
import { type Ran, testBed, until } from "./bed.ts";
import { violations } from "./schema.ts";
import { ACTIONS, NAME, type Site, startSite, VERIFY } from "./site.ts";
import { makeCertificate, nginxTest as test, startBalancer, startHttps, tcpServer } from "./tls.ts";

const HOUR = 3_600_000, DAY = 24 * HOUR;

/** Options of a run that finds the site's port at these ports of 127.0.0.1 or of another `address`. */
function routed({ port }: Site, ...found: readonly { port: number; address?: string }[]) {
  const addresses = found.map(({ port, address = "127.0.0.1" }) => ({ address, port }));
  const route = (_: string, at: number) =>
    Promise.resolve(at === port ? addresses : [{ address: "127.0.0.1", port: at }]);
  return { route };
}

const kinds = ({ events }: Ran) =>
  events.map(({ kind }) => kind).filter((kind) => kind === "drift" || kind === "delivery");

test("R5: old files that are restored a week later are replaced, and reported by --cron", async () => {
  await using site = await startSite({ domains: `${NAME}\nother.example.com`, age: 80 });
  const { bed, run } = site;
  site.save("old");
  await run();
  bed.ca.advance(DAY);
  assert.equal((await run({ cron: true })).stdout, "");
  await site.restore("old");
  const soon = await run({ cron: true }); // the last good probe is younger than five hours
  assert.deepEqual([soon.code, soon.stdout, soon.stderr], [0, "", ""]);
  bed.ca.advance(7 * HOUR);
  const { code, stdout, requests } = await run({ cron: true });
  assert.deepEqual([code, requests.length], [0, 0]);
  assert.match(stdout, /^drift +\[default\] .*#www\.example\.com \(ec\) serves an older certificate/m);
  assert.deepEqual(stdout.match(/^delivered .*/gm), ["delivered [default] 1 certificate: drift"]);
  assert.match(stdout, /^verified /m);
  assert.doesNotMatch(bed.text("prod/state.json"), /"repairs"/);
  assert.equal((await run({ cron: true })).stdout, "");

  // a new certificate of another line of the section has the first one probed as well
  await site.restore("old");
  bed.ca.advance(7 * HOUR);
  Deno.removeSync(bed.path("prod", "cert", "other.example.com-cert-combined.prime256v1.pem"));
  const document = JSON.parse((await run({ json: true })).stdout);
  assert.deepEqual(violations(document, "run"), []);
  assert.deepEqual([document.issued[0].names, document.drift.length], [["other.example.com"], 1]);
});

test("a self-signed certificate is replaced; one from elsewhere is reported once a day", async () => {
  await using site = await startSite();
  const { bed, run, web } = site;
  await run();
  await makeCertificate(web, "self", "ec", [NAME]);
  await site.restore("self");
  bed.ca.advance(7 * HOUR);
  const repaired = await run();
  assert.deepEqual([repaired.code, kinds(repaired)], [0, ["drift", "delivery"]]);
  assert.match(repaired.stdout, /serves a self-signed certificate/);

  for (const name of [NAME, "\x1b[31m\r\u0085www.example.com"]) {
    const key = Deno.readTextFileSync(join(web, `${NAME}.ec.key`));
    const life = { notBefore: bed.ca.now, notAfter: new Date(bed.ca.now.getTime() + 90 * DAY) };
    Deno.writeTextFileSync(join(web, "other.pem"), await bed.ca.forge(key, [name], life));
    Deno.writeTextFileSync(join(web, "other.key"), key);
    await site.restore("other");
    bed.ca.advance(21 * HOUR);
    const wrong = await run({ cron: true });
    assert.deepEqual([wrong.code, kinds(wrong)], [1, []]);
    assert.match(
      wrong.stderr,
      name === NAME ? /certificate that lematt did not deliver/ : /certificate for /,
    );
    assert.doesNotMatch(wrong.stderr, /[^\x20-\x7e\n]/);
    assert.equal((await run({ cron: true })).stderr, "");
  }
});

test("R8: an old certificate is found at each of several servers, and delivered again three times, then once in 20 hours", async () => {
  await using site = await startSite({ age: 80 });
  const { bed, run, port, web } = site;
  site.save("stale");
  await using stale = await startHttps(web, "stale");
  await run();
  bed.ca.advance(7 * HOUR);
  const down = await run(routed(site, { port: 1 }));
  assert.deepEqual([down.code, kinds(down)], [1, []]);
  assert.match(down.stderr, /^problem .*unreachable at 127\.0\.0\.1: /m);
  const up = await run(); // an endpoint with a problem is probed by every run
  assert.deepEqual([up.code, kinds(up)], [0, []]);

  site.act(`${ACTIONS}verifyWait: 0`);
  await using balancer = await startBalancer(port, stale.port);
  for (let n = 1; n <= 3; n++) {
    const { code, stderr } = await run({ ...routed(site, balancer), named: { deliver: ["[default]"] } });
    assert.equal(code, 1);
    assert.match(stderr, /^WRONG .*serves an older certificate/m);
  }
  assert.deepEqual(kinds(await run()), [], "right without another delivery");
  bed.ca.advance(7 * HOUR);
  const answers = [stale, { port }];
  const mixed = await run({
    route: () => routed(site, answers.length > 1 ? answers.shift()! : site).route("", port),
  });
  assert.deepEqual([mixed.code, kinds(mixed)], [1, []], "wrong once, then right: a problem, and no drift");
  assert.equal((await run()).code, 0);
  bed.ca.advance(7 * HOUR);
  const two = routed(site, { address: "127.0.0.2", port }, stale);
  const repairs: number[] = [];
  for (let n = 0; n < 5; n++) {
    const ran = await run(two);
    repairs.push(kinds(ran).filter((kind) => kind === "delivery").length);
    assert.match(ran.stderr, /serves an older certificate at 127\.0\.0\.1, valid until /);
    if (n === 0) assert.match(ran.stdout, /^verified .* at 127\.0\.0\.2/m);
  }
  assert.deepEqual(repairs, [1, 1, 1, 0, 0]);
  bed.ca.advance(20 * HOUR);
  assert.deepEqual(kinds(await run(two)), ["drift", "delivery"]);
});

test("R7: an endpoint of two sections is probed once, by a name of the section if it has none", async () => {
  const unnamed = `verify: ["127.0.0.1:PORT", "127.0.0.1:PORT#web1.internal.example"]`;
  await using site = await startSite({ actions: `${ACTIONS.replace(VERIFY, unnamed)}[every]\n${VERIFY}` });
  const { bed, run, port } = site;
  await using relay = await startBalancer(port);
  assert.equal((await run()).code, 0);
  assert.deepEqual(Object.keys(bed.state("prod").probes), [`127.0.0.1:${port}#www.example.com ec`]);
  bed.ca.advance(7 * HOUR);
  assert.equal((await run({ ...routed(site, relay), random: () => 0.9 })).code, 0);
  assert.equal(relay.counts.connections, 2, "one to see whether it answers, one for the certificate");
});

test("R10: --test reports its own certificate in production's place; --prod repairs that", async () => {
  await using site = await startSite();
  const { run, settle } = site;
  assert.equal((await run()).code, 0);
  const rehearsal = await run({ mode: "test" });
  assert.deepEqual([rehearsal.code, rehearsal.stderr], [0, ""]);
  assert.match(rehearsal.stdout, /^verified .*finishes the handshake/m);
  const after = await run();
  assert.deepEqual([after.code, kinds(after)], [0, []]);

  site.act(`${ACTIONS}rehearse: yes\nverifyWait: 0`);
  const wrong = await run({ mode: "test", sleep: settle });
  assert.equal(wrong.code, 1);
  assert.match(wrong.stderr, /^WRONG .*serves the certificate of --test/m);
  site.act(ACTIONS);
  const repaired = await run();
  assert.equal(repaired.code, 0, repaired.stderr);
  assert.match(repaired.stdout, /^drift .*serves the certificate of --test/m);
  assert.match(repaired.stdout, /^verified /m);
});

Deno.test("S2: an endpoint that never answers delays no other section; an interruption ends its probe", async () => {
  let connections = 0;
  await using silent = await tcpServer((socket) => {
    connections++;
    socket.write("220 mail.example.com ESMTP\r\n");
  });
  const verify = `verify: ["127.0.0.1:${silent.port}/smtp"]`;
  await using bed = await testBed({
    domains: "www.example.com\nb.example.com",
    actions:
      `[silent]\ndomains: www.example.com\n${verify}\n[b]\ndomains: b.example.com\nupdate: ["touch HERE/b"]`,
    settings: "keyTypes: ec\nari: no",
  });
  await bed.plant({ mode: "prod" });
  Deno.removeSync(bed.path("prod", "cert", "b.example.com-cert-combined.prime256v1.pem"));
  const stop = new AbortController();
  const running = bed.run({ mode: "prod", signal: stop.signal, random: () => 0.9 });
  const isDelivered = () => existsSync(join(bed.home, "b"));
  await until("openssl waits, and [b] is delivered", () => connections === 2 && isDelivered());
  const at = performance.now();
  stop.abort();
  await assert.rejects(running, { name: "AbortError" });
  assert(performance.now() - at < 8000, "openssl has 10 s");
});

test("R2: a failing upload is reported every night although state or section have gone", async () => {
  const upload = "test ! -e HERE/down || { echo no route to host >&2; exit 255; }; cp";
  const alert = `alert: ["{ echo SUBJECT; cat; } >> HERE/alerts"]\n`;
  const actions = ACTIONS.replace("cp", upload) + alert;
  await using site = await startSite({ age: 58.5, actions }); // due in the second night
  const { bed } = site;
  const night = async () => {
    bed.ca.advance(DAY - 60_000);
    const { code, stdout, stderr } = await site.run({ cron: true });
    return { code, output: stdout + stderr, alerts: bed.take("alerts").join("\n") };
  };
  const failedNight = async () => {
    const { code, output, alerts } = await night();
    assert.equal(code, 1);
    assert.match(output, /^FAILED .*\n.*exit status 255\n +\| no route to host$/m);
    assert.match(output, /^problem .*serves an older certificate at 127\.0\.0\.1, valid until /m);
    return alerts;
  };
  // 1: the certificate is not due
  assert.deepEqual({ ...await night(), output: "" }, { code: 0, output: "", alerts: "" });
  // 2: it is renewed, and the upload fails
  Deno.writeTextFileSync(join(bed.home, "down"), "");
  let alerts = await failedNight();
  // 3: the state is lost
  Deno.removeSync(bed.path("prod", "state.json"));
  alerts += await failedNight();
  // 4: another section has the commands
  site.act(actions.replace("[default]", `[web]\ndomains: ${NAME}`));
  alerts += await failedNight();
  assert.match(alerts, /^\d problems?: .*\n.*serves an older certificate/);
  // 5: the upload succeeds
  Deno.removeSync(join(bed.home, "down"));
  const last = await night();
  assert.equal(last.code, 0);
  assert.match(last.output, /^delivered \[web\] 1 certificate: /m);
  assert.match(last.alerts, /^resolved/);
  assert.equal(site.served(), bed.text("prod/cert/www.example.com-cert-combined.prime256v1.pem"));
  assert.deepEqual(await night(), { code: 0, output: "", alerts: "" });
});

test("R14: after a month without a run, metrics and the next run say so", async () => {
  await using site = await startSite();
  const { bed, run } = site;
  for (const days of [1, 29]) {
    assert.equal((await run()).code, 0);
    bed.ca.advance(days * DAY);
  }
  const found = await status(bed.config("prod"), true, bed.context(), () => {});
  assert.equal(exitStatus(found), 1);
  assert.match(statusMetrics(found), /^lematt_endpoint_right\{.*"current"\} 1\n[^]*kind="not run"\} 1$/m);
  const late = await run({ cron: true });
  assert.equal(late.code, 0);
  assert.match(late.stdout + late.stderr, /has not run since /);
});
