/** Goal: the output of a run: two streams for people, with a progress line on a terminal, and one document for machines. */

import assert from "node:assert/strict";
import { type Event, type OutputOptions, planJson, planText, Report } from "../lib/report.ts";
import { preview, select } from "../lib/run.ts";
import { testBed } from "./bed.ts";
import { violations } from "./schema.ts";

/** A bed in which bad.example.com is refused. */
async function bedOf(domains: string, actions = "") {
  const bed = await testBed({ domains, actions, settings: "keyTypes: ec\nari: no\nverifyWait: 0" });
  bed.ca.refused.add("bad.example.com");
  return bed;
}

Deno.test("events are printed as they happen: certificates issued, commands run, failures on standard error", async () => {
  await using bed = await bedOf(
    "a.example.com www\nbad.example.com",
    `[default]\nupdate: ["true"]\n[every]\nupdate: ["date", "echo out; echo err >&2; exit 3"]`,
  );
  const { code, stdout, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.match(stdout, /^issued +a\.example\.com \+1 \(ec\) until \d{4}-\d\d-\d\d: no certificate yet$/m);
  assert.match(stdout, /^ran +\[default\] true \(\d+\.\d s\)$[^]*^ran +\[every\] date \(/m);
  assert.match(stdout, /^delivered \[default\] 1 certificate: new certificate$/m);
  assert.match(stderr, /^FAILED +bad\.example\.com \(ec\)\n {10}cannot create an order: .*not this one/m);
  const every =
    /^FAILED +\[every\] delivery of 1 certificate\n {10}.*exit status 3\n {10}\| out\n {10}\| err$/m;
  assert.match(stderr, every);
  assert.ok(!(stdout + stderr).includes("\x1b"));
});

Deno.test("a terminal shows a progress line while several lines are issued; it is erased before other output", async () => {
  await using bed = await bedOf("a.example.com\nbad.example.com\nc.example.com");
  const ran = await bed.run({ parallel: 1 });
  const events: Event[] = [{ kind: "notice", text: "of interest" }, ...ran.events];
  const printed = (options: Partial<OutputOptions>) => {
    let text = "";
    const out = (more: string) => void (text += more);
    const pipe = { mode: "test", cron: false, json: false, color: false, now: () => new Date() } as const;
    const report = new Report({ ...pipe, out, err: out, ...options });
    for (const event of events) report.emit(event);
    return text;
  };
  for (const columns of [80, 20]) {
    const text = printed({ columns, color: true });
    const progress = text.split("\r\x1b[K").slice(0, -1).map((part) => part.split("\n").at(-1)!);
    assert.ok(progress.some((line) => line.startsWith("1 of 3 ")), text);
    assert.ok(progress.every((line) => line.length < columns), text);
    const visible = text.split("\n").map((line) => line.split("\r\x1b[K").at(-1)!);
    assert.ok(visible.every((line) => !line.includes(" of 3 ")), text);
    assert.ok(text.includes("\x1b[31mFAILED\x1b[0m"));
  }
  const cron = printed({ columns: 80, cron: true });
  assert.match(cron, /^note +of interest\nmade .*\nissued /);
  assert.ok(!cron.includes(" of 3 "));
});

Deno.test("--plan groups by reason, names ten of each, and shows what waits until when", async () => {
  const names = Array.from({ length: 12 }, (_, n) => `host${n}.example.com`);
  const sections = names.map((name, n) => `[h${n}]\ndomains: ${name}\nupdate: ["true"]`).join("\n");
  await using bed = await bedOf(`${names.join("\n")}\nbad.example.com`, sections);
  await bed.plant();
  Deno.removeSync(bed.path("test", "cert", "bad.example.com-cert-combined.prime256v1.test.pem"));
  await bed.run();
  bed.act(sections.replaceAll("true", ":"));
  const planOf = (named: Parameters<typeof select>[1] = {}, accepts = false) => {
    const config = bed.config();
    const options = { parallel: 1, retry: false, selection: select(config, named) };
    const plan = preview(config, options, bed.context(), () => {});
    assert.deepEqual(violations(JSON.parse(planJson("test", plan, ["x. IN TXT y"])), "plan"), []);
    return planText(plan, [], bed.ca.now, accepts);
  };
  const text = planOf();
  assert.match(text, /^keep +12 certificates: renews \d{4}-\d\d-\d\d, by its lifetime$/m);
  assert.match(text, /^roll out +12 sections: commands changed\n( +\[h\d+\]\n){10} +and 2 more\n/m);
  assert.match(text, /^wait +bad\.example\.com .*until \d{4}-\d\d-\d\d \d\d:\d\d UTC/m);
  const accepted = planOf({ accept: ["[h3]", "host4.example.com"] }, true);
  assert.match(accepted, /^accept +2 sections: commands changed\n +\[h3\]\n +\[h4\]\n$/);
  const one = planOf({ deliver: ["[h3]"], renew: ["host5.example.com"] });
  assert.match(one, /^issue +host5\.example\.com \(ec\): --renew$/m);
  assert.match(one, /^deliver +\[h3\]: asked for$/m);
  assert.doesNotMatch(one, /\[h4\]|^keep/m);
});

Deno.test("--json prints one document, as in its schema, even if nothing happens, but with --cron only for news", async () => {
  const alert = `alert: ["exit 1"]`;
  await using bed = await bedOf(
    "a.example.com www\nb.example.com\nbad.example.com",
    `[default]\nupdate: ["true"]\nverify: ["127.0.0.1:1#DOMAIN", "no.invalid:443"]\n${alert}
[b]\ndomains: b.example.com\nuploadCerts: ["echo no; exit 1"]\nalert: ["true"]`,
  );
  const documents: Record<string, unknown[]>[] = [];
  const json = async (cron = false) => {
    const { stdout } = await bed.run({ json: true, cron, retry: true });
    if (stdout !== "") documents.push(JSON.parse(stdout));
    return stdout;
  };
  for (let n = 0; n < 3; n++) {
    await json();
    assert.deepEqual(violations(documents[n], "run"), []);
  }
  for (const key of ["issued", "failed", "delivered", "alerts", "keep", "problems", "pending"]) {
    assert.ok(documents.some((document) => document[key]!.length > 0), key);
  }
  const [{ names, problem }] = documents[0]!.failed as [{ names: string[]; problem: { type: string } }];
  assert.deepEqual([names, problem.type], [["bad.example.com"], "rejectedIdentifier"]);

  bed.configure({ domains: "a.example.com www" });
  bed.act(`[default]\nupdate: ["true"]`);
  await json(true);
  assert.equal(await json(true), "");
  assert.deepEqual(violations(JSON.parse(await json()), "run"), []);
  assert.deepEqual(bed.state().alerts, {}, "nobody is alerted any more");
  bed.act(`[default]\nupdate: ["false"]`);
  assert.equal(JSON.parse(await json(true)).problems[0].kind, "delivery");
  assert.equal(await json(true), "", "known");
});
