/** Goal: every rule of renewal, as a table of certificates, settings and days. */

import assert from "node:assert/strict";
import type { Config, Line } from "../lib/config.ts";
import { type Memory, plan, renewal, retryAfterFailure } from "../lib/plan.ts";
import type { Entry, Finding } from "../lib/store.ts";

const DAY = 86_400_000;
const START = Date.UTC(2026, 0, 1);
const day = (days: number) => new Date(START + days * DAY);
const settings = (reauthorizeDays: number, generateNewCertsAfterDays = 0) =>
  ({ reauthorizeDays, generateNewCertsAfterDays }) as Config;

const NOTHING: Memory = {
  failures: {},
  revoked: {},
  hold: new Date(0),
  suggested: new Map(),
  nextRun: day(0),
};
const line = (number: number, ...names: string[]): Line => ({
  line: number,
  names,
  sections: [],
  keyTypes: ["rsa", "ec"],
  formerNames: [],
});
const present = (
  notBefore: Date,
  notAfter: Date,
  names = ["example.com"],
): Finding & { kind: "present" } => ({
  kind: "present",
  certificate: {
    names,
    notBefore,
    notAfter,
    id: "an identifier",
    fingerprint: "a fingerprint",
    der: new Uint8Array(),
  },
});
const entry = (finding: Finding, on = line(1, "example.com"), keyType: "rsa" | "ec" = "rsa"): Entry => ({
  line: on,
  keyType,
  stem: on.names.join("_"),
  finding,
});

Deno.test("renewal() follows the settings within what a certificate's life allows", () => {
  const table: [string, Config, number, number, string][] = [
    // what                                                settings          life  renewed at day, by
    ["90 days, 15 before the end", settings(15), 90, 75, "expiry"],
    ["45 days, 15 before the end", settings(15), 45, 30, "expiry"],
    ["a fraction of a day", settings(1.5), 45, 43.5, "expiry"],
    ["60 before the end of 90: exactly the cap", settings(60), 90, 30, "expiry"],
    ["60 before the end of 45 would mean every night", settings(60), 45, 15, "expiry, capped"],
    ["15 before the end of six days: half its life", settings(15), 6, 3, "expiry, capped"],
    ["2 before the end of six days", settings(2), 6, 4, "expiry"],
    ["by age", settings(15, 7), 90, 7, "age"],
    ["by age instead of an earlier reauthorizeDays", settings(60, 50), 90, 50, "age"],
    ["by age instead of a later reauthorizeDays", settings(5, 80), 90, 80, "age"],
    ["by age, twice a week", settings(15, 3.5), 90, 3.5, "age"],
    ["an age beyond its life", settings(15, 60), 45, 30, "age beyond life"],
    ["an age that leaves no night to try again", settings(15, 44), 45, 30, "age beyond life"],
  ];
  for (const [what, config, life, renewedAt, rule] of table) {
    const result = renewal(config, day(0), day(life));
    assert.deepEqual([(result.renewAt.getTime() - START) / DAY, result.rule], [renewedAt, rule], what);
  }
});

Deno.test("plan() keeps a certificate until its renewal is due, and not a moment longer", () => {
  const inventory = [entry(present(day(0), day(90)))];
  const at = (now: Date) => plan(settings(15), inventory, now, NOTHING);
  assert.equal(at(new Date(day(75).getTime() - 1)).tasks.length, 0);
  assert.deepEqual(at(day(74)).kept.map(({ renewAt }) => renewAt), [day(75)]);
  assert.deepEqual(at(day(75)).tasks[0]!.due[0]!.reason, { kind: "renewal", since: day(75), rule: "expiry" });
  assert.deepEqual(at(day(90)).tasks[0]!.due[0]!.reason, { kind: "expired", at: day(90) });
});

Deno.test("plan() renews a certificate whose names changed, whose key is another, or that cannot be read", () => {
  const { certificate } = present(day(0), day(90));
  const findings: Finding[] = [
    { kind: "missing", what: "certificate" },
    { kind: "missing", what: "key" },
    { kind: "unreadable", what: "certificate", detail: "" },
    { kind: "other names", certificate },
    { kind: "other key", certificate },
  ];
  for (const finding of findings) {
    const { tasks } = plan(settings(15), [entry(finding)], day(1), NOTHING);
    assert.deepEqual(tasks.map(({ due }) => due.map(({ reason }) => reason)), [[{ kind: "found", finding }]]);
  }
});

Deno.test("plan() puts both certificates of a line in one task, the soonest expiry first, new lines last", () => {
  const [a, b, c] = [line(1, "a.example"), line(2, "b.example"), line(3, "c.example")];
  const missing: Finding = { kind: "missing", what: "certificate" };
  const { tasks, kept } = plan(
    settings(15),
    [
      entry(missing, a, "rsa"),
      entry(missing, a, "ec"),
      entry(present(day(0), day(90)), b, "rsa"),
      entry(present(day(0), day(80)), b, "ec"),
      entry(present(day(0), day(70)), c, "rsa"),
      entry(present(day(60), day(150)), c, "ec"),
    ],
    day(76),
    NOTHING,
  );
  assert.deepEqual(
    tasks.map(({ line, due }) => [line.names[0], ...due.map(({ entry }) => entry.keyType)]),
    [["c.example", "rsa"], ["b.example", "rsa", "ec"], ["a.example", "rsa", "ec"]],
  );
  assert.deepEqual(kept.map(({ entry }) => [entry.line.names[0], entry.keyType]), [["c.example", "ec"]]);
});

Deno.test("plan() lets a line wait after a failure, and all lines while the CA wants no orders", () => {
  const [a, b] = [line(1, "a.example"), line(2, "b.example")];
  const missing: Finding = { kind: "missing", what: "certificate" };
  const inventory = [entry(missing, a, "rsa"), entry(missing, a, "ec"), entry(missing, b, "rsa")];
  const failure = { count: 2, at: day(1).toISOString(), error: "refused", retryAt: day(2).toISOString() };
  const names = (memory: Memory, now: Date) => {
    const { tasks, waiting } = plan(settings(15), inventory, now, memory);
    const of = (tasks: readonly { line: Line }[]) => tasks.map(({ line }) => line.names[0]);
    return [of(tasks), of(waiting)];
  };
  const failed = { ...NOTHING, failures: { "a.example": failure } };
  assert.deepEqual(names(failed, day(1)), [["b.example"], ["a.example"]]);
  assert.deepEqual(names(failed, day(2)), [["a.example", "b.example"], []]);
  const held = { ...NOTHING, hold: day(3) };
  assert.deepEqual(names(held, day(2)), [[], ["a.example", "b.example"]]);
  assert.deepEqual(names(held, day(3)), [["a.example", "b.example"], []]);
});

Deno.test("plan() replaces a certificate that was revoked", () => {
  const revoked = { ...NOTHING, revoked: { "a fingerprint": day(1).toISOString() } };
  const { tasks } = plan(settings(15), [entry(present(day(0), day(90)))], day(2), revoked);
  assert.deepEqual(tasks[0]!.due[0]!.reason, { kind: "revoked", at: day(1) });
});

Deno.test("retryAfterFailure() waits 1, 10 and 100 minutes, then a day", () => {
  const minutes = [1, 2, 3, 4, 5, 100].map((count) =>
    (retryAfterFailure(count, day(0)).getTime() - START) / 60_000
  );
  assert.deepEqual(minutes, [1, 10, 100, 1000, 1440, 1440]);
});

Deno.test("plan() heeds the CA's suggestion where it comes before the user's own settings", () => {
  const inventory = [entry(present(day(0), day(90)))];
  const suggest = (at: number, nextRun: number) => ({
    ...NOTHING,
    suggested: new Map([["an identifier", { at: day(at), explanationUrl: "https://ca.example/why" }]]),
    nextRun: day(nextRun),
  });
  const renewAt = (memory: Memory, now: number) => {
    const { kept, tasks } = plan(settings(15), inventory, day(now), memory);
    return kept[0] === undefined
      ? tasks[0]!.due[0]!.reason
      : [(kept[0].renewAt.getTime() - START) / DAY, kept[0].rule];
  };
  const suggested = (at: number) => ({
    kind: "renewal",
    since: day(at),
    rule: "ari",
    explanationUrl: "https://ca.example/why",
  });
  assert.deepEqual(renewAt(suggest(60, 11), 10), [60, "ari"]);
  assert.deepEqual(renewAt(suggest(60, 60), 59), suggested(60), "due when it comes before the next run");
  assert.deepEqual(renewAt(suggest(-5, 11), 10), suggested(-5), "a window in the past is due");
  assert.deepEqual(renewAt(suggest(80, 11), 10), [75, "expiry"], "the user's settings come first");
  assert.deepEqual(renewAt(suggest(60, 77), 76), { kind: "renewal", since: day(75), rule: "expiry" });
  assert.deepEqual(
    renewAt({ ...suggest(20, 11), suggested: new Map([["of another", { at: day(1) }]]) }, 10),
    [75, "expiry"],
  );
});
