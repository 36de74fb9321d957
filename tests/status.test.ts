/** Goal: the status, problems first, for a terminal of any width, and the same for machines. */

import assert from "node:assert/strict";
import { status } from "../lib/run.ts";
import type { Sight } from "../lib/state.ts";
import { exitStatus, statusJson, statusMetrics, statusTable } from "../lib/status.ts";
import { readInventory } from "../lib/store.ts";
import { all, type Bed, testBed } from "./bed.ts";
import { violations } from "./schema.ts";
import { freePort } from "./tls.ts";

const HOUR = 3_600_000, DAY = 24 * HOUR;

const bedOf = (domains: string, actions = "", settings = "") =>
  testBed({ domains, actions, settings: `keyTypes: ec\nari: no\n${settings}` });

const statusOf = (bed: Bed, offline = true) => status(bed.config("prod"), offline, bed.context(), () => {});

// ---- problems and exit status ----------------------------------------------------------------------------

Deno.test("status exits with 1 if there is a problem; a renewal that is merely due is not one", async () => {
  const run = (bed: Bed) => bed.run({ mode: "prod" });
  const shows = async (code: 0 | 1, shown: RegExp, arrange: (bed: Bed) => Promise<unknown>) => {
    await using bed = await bedOf("a.example.com");
    await arrange(bed);
    const found = await statusOf(bed);
    assert.match(statusTable(found), shown);
    assert.deepEqual([exitStatus(found), JSON.parse(statusJson(found)).problems.length], [code, code]);
  };
  await all([
    shows(0, /no full run yet/, () => Promise.resolve()),
    shows(0, /^no problems\n/, run),
    shows(0, /^no problems\n/, (bed) => bed.plant({ mode: "prod", age: 61 })), // due for a day
    shows(0, /^no problems\n/, async (bed) => { // due for a day, with runs by hand
      await bed.plant({ mode: "prod", age: 59 });
      for (let n = 0; n < 6; n++) await run(bed);
      bed.ca.advance(1.5 * DAY);
    }),
    shows(
      1,
      /^1 problem:\n +a\.example\.com \(ec\) is overdue/,
      (bed) => bed.plant({ mode: "prod", age: 63 }),
    ),
    shows(1, /a\.example\.com failed: [^]*not\s+this\s+one/, (bed) => {
      bed.refused.add("a.example.com");
      return run(bed);
    }),
    shows(0, /^\[default\] +1 +next run +first delivery$/m, async (bed) => {
      await run(bed);
      bed.act(`[default]\nupdate: ["true"]`);
    }),
    shows(1, /^1 problem:\n +\[default\]/, (bed) => {
      bed.act(`[default]\nupdate: ["false"]`);
      return run(bed);
    }),
    shows(1, /was revoked/, async (bed) => {
      await run(bed);
      await bed.lematt("--prod", "--revoke", "a.example.com", "--yes");
    }),
  ]);
});

Deno.test("status finds what is missing, changed or orphaned, and changes nothing", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com\nd.example.com www");
  await bed.plant({ mode: "prod", age: 10 });
  const file = (name: string) => bed.path("prod", "cert", `${name}-cert-combined.prime256v1.pem`);
  await Deno.copyFile(file("a.example.com"), file("b.example.com"));
  await Deno.remove(file("c.example.com"));
  bed.configure({ domains: "a.example.com\nb.example.com\nc.example.com\nd.example.com shop" });
  const listing = () => [...Deno.readDirSync(bed.path("prod"))].map(({ name }) => name).sort();
  const before = listing();
  const found = await statusOf(bed);
  const { certificates } = JSON.parse(statusJson(found)) as { certificates: Record<string, string>[] };
  assert.deepEqual(certificates.map(({ state, notAfter }) => `${state}${notAfter ? ", with dates" : ""}`), [
    ...["present, with dates", "other key, with dates", "missing"],
    "missing, with dates", // the one that is in use is still shown
  ]);
  assert.match(statusTable(found), /^CERTIFICATE +KEY +EXPIRES IN +RENEWS$[^]*^a\.example\.com .* 2\d{3}-/m);
  assert.match(statusTable(found), /^ORPHANED FILES.*\n +cert\/www\.d\.example\.com-/m);
  assert.deepEqual(listing(), before);
});

Deno.test("--offline shows the last probes with their age; otherwise endpoints are probed, and nothing is recorded", async () => {
  const port = freePort();
  await using bed = await bedOf("a.example.com", `[default]\nverify: ["127.0.0.1:${port}#DOMAIN"]`);
  await bed.plant({ mode: "prod" });
  assert.match(statusTable(await statusOf(bed)), /not probed yet/);
  assert.equal(exitStatus(await statusOf(bed)), 0);
  const live = await statusOf(bed, false);
  assert.equal(exitStatus(live), 1);
  assert.match(statusTable(live), /unreachable at 127\.0\.0\.1/);
  assert.match(statusTable(await statusOf(bed)), /not probed yet/);
  await bed.run({ mode: "prod" });
  bed.ca.advance(5 * HOUR);
  assert.match(
    statusTable(await statusOf(bed)),
    /127\.0\.0\.1:\d+#a\.example\.com +ec +5 hours ago +unreachable/,
  );
});

// ---- the table -------------------------------------------------------------------------------------------

/** A bed with names of all lengths, a problem of each kind, and endpoints in all states. */
async function crowded() {
  const label = "l".repeat(63);
  const long = `${label}.${label}.${label}.example.com`;
  const many = Array.from({ length: 100 }, (_, n) => `host-${n}.of.a.line.of.a.hundred.names.example.com`);
  const section = `s${"s".repeat(60)}`;
  const endpoint = "[2001:db8:1111:2222:3333:4444:5555:6666]:443#short.example.com";
  const bed = await bedOf(
    `${long}\n${many.join(" ")}\nxn--bcher-kva.example\nshort.example.com\nbad.example.com`,
    `[default]\nverify: ["DOMAIN:443"]\n[${section}]\ndomains: short.example.com\nupdate: ["echo ${
      "y".repeat(300)
    }; exit 1"]\nverify: ["${endpoint}"]`,
    "verifyWait: 0",
  );
  await bed.plant({ mode: "prod", age: 0.5, life: 2 });
  Deno.removeSync(bed.path("prod", "cert", "bad.example.com-cert-combined.prime256v1.pem"));
  bed.refused.add("bad.example.com");
  await bed.run({ mode: "prod", route: () => Promise.resolve([]) });
  Deno.writeTextFileSync(bed.path("prod", "key", `${"z".repeat(200)}\x1b[31m\n.pem`), "");
  const entries = readInventory(bed.config("prod"));
  const served = (line: number, address: string, change: object = {}): Sight => {
    const { finding } = entries[line]!;
    assert(finding.kind === "present");
    return JSON.parse(
      JSON.stringify({ address, kind: "served", certificate: { ...finding.certificate, ...change } }),
    );
  };
  const state = bed.state("prod");
  const at = bed.ca.now.toISOString();
  state.probes["xn--bcher-kva.example:443 ec"] = { at, sights: [served(2, "192.0.2.7")] };
  state.probes[`${endpoint} ec`] = {
    at,
    badSince: at,
    sights: [
      served(3, "192.0.2.7", { fingerprint: "1", names: ["other.example.com"] }),
      served(3, "192.0.2.7", { fingerprint: "2", notAfter: "2020-01-01T00:00:00.000Z" }),
      { address: "192.0.2.9", kind: "unreachable", detail: "no route to host" },
    ],
  };
  Deno.writeTextFileSync(bed.path("prod", "state.json"), JSON.stringify(state));
  return Object.assign(bed, { words: [long, many[0]!, "xn--bcher-kva.example", `[${section}]`, endpoint] });
}

Deno.test("the table lists problems first, fits 40, 80 and 200 columns, and breaks no name", async () => {
  await using bed = await crowded();
  const found = await statusOf(bed);
  for (const columns of [40, 80, 200]) {
    const table = statusTable(found, columns);
    assert.match(table, /^\d+ problems:\n/);
    assert.doesNotMatch(table, /[^\x20-\x7e…\n]/);
    for (const word of [...bed.words, "z".repeat(200)]) {
      assert.ok(table.includes(word), `${word} at ${columns}`);
    }
    for (const line of table.split("\n").filter((line) => line.length > columns)) {
      // only words that are too long exceed the width
      assert.ok(line.trim().split(/\s+/).some((word) => word.length > columns - 12), `${columns}: ${line}`);
    }
  }
  const lines = (columns: number) => statusTable(found, columns).split("\n").length;
  assert.ok(lines(200) < lines(80), "uses the width");
});

Deno.test("times are shown in hours if days are too coarse, and expired certificates are marked", async () => {
  const table: [age: number, life: number, shown: RegExp][] = [
    [0, 90, /^a\.example\.com +ec +(89|90) days/m],
    [0.5, 1, /^a\.example\.com +ec +(11|12) hours/m],
    [0.95, 1, /^a\.example\.com +ec +(71|72) minutes/m],
    [91, 90, /^a\.example\.com +ec +EXPIRED/m],
  ];
  await using bed = await bedOf("a.example.com");
  for (const [age, life, shown] of table) {
    await bed.plant({ mode: "prod", age, life });
    const table = statusTable(await statusOf(bed));
    assert.match(table, shown);
    assert.doesNotMatch(table, /\b0 (days|hours|minutes)/);
  }
});

// ---- for machines ----------------------------------------------------------------------------------------

Deno.test("the status document matches the schema of conf/monitoring", async () => {
  await using bed = await crowded();
  const document = JSON.parse(statusJson(await statusOf(bed)));
  assert.deepEqual(violations(document, "status"), []);
  for (const key of ["certificates", "pending", "endpoints", "orphans", "problems", "runs"]) {
    assert.ok(document[key].length > 0, key);
  }
  await using empty = await bedOf("a.example.com");
  assert.deepEqual(violations(JSON.parse(statusJson(await statusOf(empty))), "status"), []);
});

/** Reads the Prometheus text format (version 0.0.4) as its grammar has it; series -> value. */
function readMetrics(text: string): Map<string, number> {
  const series = new Map<string, number>();
  const name = "lematt_[a-z_]+", label = String.raw`[a-z_]+="(?:[^"\\]|\\\\|\\"|\\n)*"`;
  const metric = new RegExp(`^(${name})\\{(?:${label},)*${label}\\} (-?\\d+)$`);
  for (const family of text.split(/^(?=# HELP )/m)) {
    const [help, type, ...lines] = family.replace(/\n$/, "").split("\n");
    const [, of] = new RegExp(`^# TYPE (${name}) gauge$`).exec(type!)!;
    assert.match(help!, new RegExp(String.raw`^# HELP ${of} (?:[^\\]|\\\\|\\n)*$`));
    for (const line of lines) {
      const [, found, value] = metric.exec(line) ?? assert.fail(`no metric: ${line}`);
      const key = line.slice(0, line.lastIndexOf(" "));
      assert.ok(found === of && !series.has(key), line);
      series.set(key, Number(value));
    }
  }
  return series;
}

Deno.test("metrics follow the grammar of Prometheus, whatever is found", async () => {
  await using bed = await crowded();
  const found = await statusOf(bed);
  const series = readMetrics(statusMetrics(found));
  const of = (name: string) => [...series].filter(([key]) => key.startsWith(`lematt_${name}{`));
  const seconds = (date: Date) => Math.floor(date.getTime() / 1000);
  assert.equal(series.get(`lematt_problems{mode="prod",kind="all"}`), found.plan.problems.length);
  assert.equal(series.get(`lematt_last_run_seconds{mode="prod"}`), seconds(found.plan.lastRun!));
  assert.equal(series.get(`lematt_orphaned_files{mode="prod"}`), 1);
  assert.equal(of("certificate_not_after_seconds").length, 4);
  assert.equal(of("delivery_pending_certificates").length, 1);
  // of several answers at one address the worst counts
  const [, worst] = of("endpoint_not_after_seconds").find(([key]) => key.includes("2001:db8"))!;
  assert.equal(worst, seconds(new Date("2020-01-01T00:00:00Z")));
  assert.ok(of("endpoint_right").some(([key, value]) => key.includes("xn--bcher-kva") && value === 1));
  assert.ok(of("endpoint_right").some(([key, value]) => key.includes("192.0.2.9") && value === 0));

  await using quoted = await bedOf(
    "a.example.com",
    `[a "quoted" \\section]\ndomains: a.example.com\nupdate: ["false"]`,
  );
  await quoted.run({ mode: "prod" });
  readMetrics(statusMetrics(await statusOf(quoted)));
  await using empty = await bedOf("a.example.com");
  readMetrics(statusMetrics(await statusOf(empty)));
});
