/** Goal: the output of a run: two streams for people, with a progress line on a terminal, and one document for machines. */

import assert from "node:assert/strict";
import { join } from "node:path";
import type { Mode } from "../lib/config.ts";
import { type Event, type OutputOptions, planJson, planText, Report } from "../lib/report.ts";
import { preview, select } from "../lib/run.ts";
import { type Bed, testBed } from "./bed.ts";
import { violations } from "./schema.ts";
import { freePort, startNginx } from "./tls.ts";
import { which } from "./bench-measure.ts";

const DAY = 86_400_000;

/** A bed in which bad.example.com is refused. */
async function bedOf(domains: string, actions = "", settings = "") {
  const bed = await testBed({ domains, actions, settings: `keyTypes: ec\nari: no\n${settings}` });
  bed.refused.add("bad.example.com");
  return bed;
}

/** The output for these events, in order. */
function printed(options: Partial<OutputOptions>, events: readonly Event[]): string {
  const texts: string[] = [];
  const out = (text: string) => void texts.push(text);
  const defaults = {
    mode: "test",
    cron: false,
    json: false,
    color: false,
    now: () => new Date(),
    out,
    err: out,
  } as const;
  const report = new Report({ ...defaults, ...options });
  for (const event of events) report.emit(event);
  return texts.join("");
}

const planned = (bed: Bed, named: Parameters<typeof select>[1] = {}, mode: Mode = "test") => {
  const config = bed.config(mode);
  const options = { parallel: 1, retry: false, selection: select(config, named) };
  return preview(config, options, bed.context(), () => {});
};

// ---- for people ------------------------------------------------------------------------------------------

Deno.test("events are printed as they happen: certificates issued, commands run, failures on standard error", async () => {
  await using bed = await bedOf(
    "a.example.com www\nbad.example.com",
    `[default]\nupdate: ["true"]\n[every]\nupdate: ["echo out; echo err >&2; exit 3"]`,
  );
  const { code, stdout, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.match(stdout, /^issued +a\.example\.com \+1 \(ec\) until \d{4}-\d\d-\d\d: no certificate yet$/m);
  assert.match(stdout, /^ran +\[default\] true \(\d+\.\d s\)$/m);
  assert.match(stdout, /^delivered \[default\] 1 certificate: new certificate$/m);
  assert.match(stderr, /^FAILED +bad\.example\.com \(ec\)\n {10}cannot create an order: .*not this one/m);
  assert.match(
    stderr,
    /^FAILED +\[every\] delivery of 1 certificate\n {10}.*exit status 3\n {10}\| out\n {10}\| err$/m,
  );
  assert.ok(!(stdout + stderr).includes("\x1b"));
});

Deno.test("a terminal shows a progress line while several lines are issued; it is erased before other output", async () => {
  await using bed = await bedOf("a.example.com\nbad.example.com\nc.example.com");
  const { events } = await bed.run({ parallel: 1 });
  for (const columns of [80, 20]) {
    const text = printed({ columns, color: true }, events);
    const counting = text.split("\r\x1b[K").slice(0, -1).map((part) => part.split("\n").at(-1)!);
    assert.ok(counting.some((line) => line.startsWith("1 of 3 ")), text);
    assert.ok(counting.every((line) => line.length < columns), text);
    // what remains visible
    const seen = text.split("\n").map((line) => line.split("\r\x1b[K").at(-1)!);
    assert.ok(seen.every((line) => !/^\d of 3 /.test(line)), text);
    assert.ok(text.includes("\x1b[31mFAILED\x1b[0m"));
  }
  assert.ok(!printed({}, events).includes("\x1b"), "nor elsewhere");
  assert.ok(!printed({ columns: 80, cron: true }, events).includes(" of 3 "));
});

Deno.test("--plan groups by reason, names ten of each, and shows what waits until when", async () => {
  const names = Array.from({ length: 57 }, (_, n) => `host${n}.example.com`);
  const sections = names.map((name, n) => `[h${n}]\ndomains: ${name}\nupdate: ["true"]`).join("\n");
  await using bed = await bedOf(names.join("\n"), sections);
  await bed.plant();
  assert.equal((await bed.run()).code, 0);
  bed.act(sections.replaceAll("true", ":"));
  const text = planText(planned(bed), [], bed.ca.now);
  assert.match(text, /^keep +57 certificates: renews \d{4}-\d\d-\d\d, by its lifetime$/m);
  assert.match(text, /^roll out +57 sections: commands changed\n( +\[h\d+\]\n){10} +and 47 more\n/m);
  assert.ok(text.split("\n").length < 40);
  const one = planText(planned(bed, { deliver: ["[h3]"], renew: ["host5.example.com"] }), [], bed.ca.now);
  const accepted = planText(planned(bed, { accept: ["[h3]", "host4.example.com"] }), [], bed.ca.now, true);
  assert.match(accepted, /^accept +2 sections: commands changed\n +\[h3\]\n +\[h4\]\n$/);
  assert.match(one, /^issue +host5\.example\.com \(ec\): --renew$/m);
  assert.match(one, /^deliver +\[h3\]: asked for$/m);
  assert.doesNotMatch(one, /\[h4\]|^keep/m);
  bed.configure({ domains: "bad.example.com" });
  bed.act("");
  await bed.run();
  assert.match(
    planText(planned(bed), [], bed.ca.now),
    /^wait +bad\.example\.com .*until \d{4}-\d\d-\d\d \d\d:\d\d UTC/m,
  );
});

// ---- for machines ----------------------------------------------------------------------------------------

Deno.test("the documents of runs, plans and failures match the schemas of conf/monitoring", {
  ignore: which("nginx") === undefined,
}, async () => {
  const port = freePort();
  await using bed = await bedOf("a.example.com www\nb.example.com\nbad.example.com", "", "verifyWait: 0");
  bed.act(`[default]
update: ["true"]
verify: ["127.0.0.1:${port}#DOMAIN", "192.0.2.1.invalid:443"]
alert: ["exit 1"]
[b]
domains: b.example.com
uploadCerts: ["echo no; exit 1"]
alert: ["true"]`);
  await bed.plant({ mode: "prod", age: 5 });
  Deno.removeSync(bed.path("prod", "cert", "bad.example.com-cert-combined.prime256v1.pem"));
  Deno.removeSync(bed.path("prod", "cert", "b.example.com-cert-combined.prime256v1.pem"));
  await Deno.mkdir(join(bed.home, "web"));
  const key = bed.text("prod", "key", "a.example.com_www.a.example.com-key.prime256v1.pem");
  const old = await bed.ca.forge(key, ["a.example.com"], { notBefore: new Date(0), notAfter: new Date(DAY) });
  Deno.writeTextFileSync(join(bed.home, "web", "old.key"), key);
  Deno.writeTextFileSync(join(bed.home, "web", "old.pem"), old);
  await using _ = await startNginx(
    join(bed.home, "web"),
    port,
    (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("old")} }`,
  );

  const documents: Record<string, unknown>[] = [];
  for (let n = 0; n < 3; n++) {
    const { code, stdout, stderr } = await bed.run({ mode: "prod", json: true, retry: true });
    assert.equal(code, 1);
    assert.match(stderr, /^FAILED/m);
    documents.push(JSON.parse(stdout));
    assert.deepEqual(violations(documents.at(-1), "run"), []);
  }
  for (const key of ["issued", "failed", "delivered", "drift", "alerts", "keep", "problems", "pending"]) {
    assert.ok(documents.some((document) => (document[key] as unknown[]).length > 0), key);
  }
  const [{ names, problem }] = documents[0]!.failed as [{ names: string[]; problem: { type: string } }];
  assert.deepEqual([names, problem.type], [["bad.example.com"], "rejectedIdentifier"]);

  for (const named of [{}, { deliver: ["[b]"] }, { renew: ["a.example.com"] }]) {
    const plan = JSON.parse(planJson("prod", planned(bed, named, "prod"), ["x. IN TXT y"]));
    assert.deepEqual(violations(plan, "plan"), []);
  }
});

Deno.test("--json prints one document even if nothing happens, but none with --cron", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nupdate: ["test ! -e HERE/down"]`);
  const json = async (cron: boolean) => (await bed.run({ json: true, cron, retry: true })).stdout;
  assert.equal(JSON.parse(await json(true)).issued.length, 1);
  assert.equal(await json(true), "");
  assert.deepEqual(violations(JSON.parse(await json(false)), "run"), []);
  bed.act(`[default]\nupdate: ["false"]`);
  assert.equal(JSON.parse(await json(true)).problems[0].kind, "delivery");
  assert.equal(await json(true), "", "known");
});
