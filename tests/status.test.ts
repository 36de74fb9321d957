/** Goal: the status, problems first, for a terminal of any width, and the same for machines. */

import assert from "node:assert/strict";
import { status } from "../lib/run.ts";
import { exitStatus, statusJson, statusMetrics, statusTable } from "../lib/status.ts";
import { type Bed, testBed } from "./bed.ts";
import { lackOf, shell } from "./programs.ts";
import { violations } from "./schema.ts";
import { freePort } from "./tls.ts";

const HOUR = 3_600_000;

const bedOf = (domains: string, actions = "") =>
  testBed({ domains, actions, settings: "keyTypes: ec\nari: no\nverifyWait: 0" });

const statusOf = (bed: Bed, offline = true) => status(bed.config("prod"), offline, bed.context(), () => {});
const tableOf = async (bed: Bed) => statusTable(await statusOf(bed));

Deno.test("R6: only a problem makes the exit status 1: not a renewal or a rollout that is merely due", async () => {
  await using bed = await bedOf("a.example.com");
  const run = () => bed.run({ mode: "prod" });
  const shows = async (code: 0 | 1, shown: RegExp) => {
    const found = await statusOf(bed);
    assert.match(statusTable(found), shown);
    const document = JSON.parse(statusJson(found));
    assert.deepEqual([exitStatus(found), document.problems.length], [code, code]);
    assert.deepEqual(violations(document, "status"), []);
  };
  await shows(0, /^no problems\n[^]*no full run yet/);
  bed.act(`[default]\nupdate: ["false"]`);
  await run();
  await shows(1, /^1 problem:\n +\[default\]/);
  bed.act(`[default]\nupdate: ["true"]`);
  await shows(0, /^\[default\] +1 +next run +first delivery$/m);
  await run();
  await bed.lematt("--prod", "--revoke", "a.example.com", "--yes");
  await shows(1, /was revoked/);
  await bed.plant({ mode: "prod", age: 61 });
  await shows(0, /^no problems\n/);
  await bed.plant({ mode: "prod", age: 63 });
  await shows(1, /^1 problem:\n +a\.example\.com \(ec\) is overdue[^]*^a\.example\.com +ec +(26|27) days/m);
  await bed.plant({ mode: "prod", age: 91 });
  await shows(1, /^a\.example\.com +ec +EXPIRED/m);
  await bed.plant({ mode: "prod", age: 0.1, life: 1 });
  await shows(0, /^a\.example\.com +ec +(20|21) hours/m);
});

Deno.test("what is missing, changed or orphaned is shown; R16: a line whose new names are refused keeps its old expiry in view", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com\nd.example.com www");
  await bed.plant({ mode: "prod", age: 80 });
  const file = (name: string) => bed.path("prod", "cert", `${name}-cert-combined.prime256v1.pem`);
  await Deno.copyFile(file("a.example.com"), file("b.example.com"));
  await Deno.remove(file("c.example.com"));
  bed.configure({ domains: "a.example.com\nb.example.com\nc.example.com\nd.example.com shop" });
  const found = await statusOf(bed);
  const { certificates } = JSON.parse(statusJson(found)) as { certificates: Record<string, string>[] };
  const states = certificates.map(({ state, notAfter }) => `${state}${notAfter ? " with dates" : ""}`);
  assert.equal(states.join(", "), "present with dates, other key with dates, missing, missing with dates");
  assert.match(statusTable(found), /^CERTIFICATE +KEY +EXPIRES IN +RENEWS$[^]*^a\.example\.com /m);
  assert.match(statusTable(found), /^ORPHANED FILES.*\n +cert\/www\.d\.example\.com-/m);

  bed.ca.refused.add("shop.d.example.com");
  await bed.run({ mode: "prod" });
  const expiry = certificates[3]!.notAfter!.slice(0, 10);
  const text = (await tableOf(bed)).replaceAll(/\s+/g, " ");
  assert.match(text, new RegExp(`d\\.example\\.com \\+1 failed: .* certificate expires ${expiry} `));
});

Deno.test("--offline shows the last probes with their age; otherwise endpoints are probed, and nothing is recorded", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nverify: ["127.0.0.1:${freePort()}#DOMAIN"]`);
  await bed.plant({ mode: "prod" });
  const live = await statusOf(bed, false);
  assert.equal(exitStatus(live), 1);
  assert.match(statusTable(live), /unreachable at 127\.0\.0\.1/);
  const offline = await statusOf(bed);
  assert.equal(exitStatus(offline), 0);
  assert.match(statusTable(offline), /not probed yet/);
  await bed.run({ mode: "prod" });
  bed.ca.advance(5 * HOUR);
  assert.match(await tableOf(bed), /127\.0\.0\.1:\d+#a\.example\.com +ec +5 hours ago +unreachable/);
});

Deno.test("a crowded status: a table that fits the terminal, a document as in its schema, metrics as Prometheus reads them", async () => {
  const long = `${`${"l".repeat(63)}.`.repeat(3)}example.com`;
  const many = Array.from({ length: 100 }, (_, n) => `${n}.of.a.line.of.a.hundred.names.example.com`);
  const section = `"quoted" \\${"s".repeat(60)}`;
  const endpoint = "[2001:db8:1111:2222:3333:4444:5555:6666]:443#short.example.com";
  const update = `update: ["echo ${"y".repeat(300)}; exit 1"]`;
  await using bed = await bedOf(
    `${long}\n${many.join(" ")}\nxn--bcher-kva.example\nshort.example.com\nbad.example.com`,
    `[default]\nverify: ["DOMAIN:443"]\n[${section}]\ndomains: short.example.com\n${update}\nverify: ["${endpoint}"]`,
  );
  await bed.plant({ mode: "prod", age: 0.5, life: 2 });
  Deno.removeSync(bed.path("prod", "cert", "bad.example.com-cert-combined.prime256v1.pem"));
  bed.ca.refused.add("bad.example.com");
  await bed.run({ mode: "prod", route: () => Promise.resolve([]) });
  Deno.writeTextFileSync(bed.path("prod", "key", `${"z".repeat(200)}\x1b[31m\n.pem`), "");
  const state = bed.state("prod");
  const at = bed.ca.now.toISOString();
  const certificate = { fingerprint: "1", names: ["x"], notBefore: at, selfSigned: false, issuer: "" };
  const served = ["2020-01-01T00:00:00.000Z", "2030-01-01T00:00:00.000Z"].map((notAfter) => (
    { address: "192.0.2.7", kind: "served" as const, certificate: { ...certificate, notAfter } }
  ));
  const unreachable = { address: "192.0.2.9", kind: "unreachable", detail: "no route to host" } as const;
  state.probes[`${endpoint} ec`] = { at, badSince: at, sights: [...served, unreachable] };
  Deno.writeTextFileSync(bed.path("prod", "state.json"), JSON.stringify(state));
  const found = await statusOf(bed);

  const words = [long, many[0]!, "xn--bcher-kva.example", `[${section}]`, endpoint, "z".repeat(200)];
  for (const columns of [40, 80, 200]) {
    const table = statusTable(found, columns);
    assert.match(table, /^\d+ problems:\n/);
    assert.doesNotMatch(table, /[^\x20-\x7e…\n]/);
    for (const word of words) assert.ok(table.includes(word), `${word} at ${columns}`);
    for (const line of table.split("\n").filter((line) => line.length > columns)) {
      // only words that are too long exceed the width
      assert.ok(line.trim().split(/\s+/).some((word) => word.length > columns - 12), `${columns}: ${line}`);
    }
  }

  const document = JSON.parse(statusJson(found));
  for (const key of ["certificates", "pending", "endpoints", "orphans", "problems", "runs"]) {
    assert.ok(document[key].length > 0, key);
  }
  assert.deepEqual(violations(document, "status"), []);
  const isAhead = ({ renewAt = "" }) => Date.parse(renewAt) > bed.ca.now.getTime();
  assert.ok(document.certificates.some(isAhead), "renewAt");

  const metrics = statusMetrics(found);
  const addressed = `{mode="prod",endpoint="${endpoint}",address=`;
  const samples = [
    `problems{mode="prod",kind="all"} ${document.problems.length}`,
    `last_run_seconds{mode="prod"} ${Math.floor(Date.parse(document.lastRun) / 1000)}`,
    `orphaned_files{mode="prod"} 1`,
    `delivery_pending_certificates{mode="prod",section="\\"quoted\\" \\\\${"s".repeat(60)}"} 1`,
    `endpoint_not_after_seconds${addressed}"192.0.2.7",key_type="ec"} 1577836800`, // the worst of two answers
    `endpoint_right${addressed}"192.0.2.9",key_type="ec",state="unreachable"} 0`,
  ];
  for (const sample of samples) assert.ok(metrics.includes(`\nlematt_${sample}\n`), sample);
  const series = metrics.match(/^lematt_.*(?= )/gm)!;
  assert.equal(new Set(series).size, series.length);
  if (lackOf("promtool") !== undefined) return;
  await shell(`printf %s "$METRICS" | promtool check metrics`, bed.home, { METRICS: metrics });
});
