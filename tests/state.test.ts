/** Goal: whatever is in state.json, it is read as written, replaced by an empty state, or left alone with exit status 2. */

import assert from "node:assert/strict";
import { emptyState, parseState, type State } from "../lib/state.ts";
import { testBed } from "./bed.ts";

const NOW = new Date("2026-11-27T03:00:00.000Z");
const after = (days: number) => new Date(NOW.getTime() + days * 86_400_000).toISOString();
const [PAST, SOON, LATE, NEVER] = [after(-1), after(0.9), after(365), "1970-01-01T00:00:00.000Z"];

/** As plain objects, whose prototype does not count. */
const plain = (value: unknown) => JSON.parse(JSON.stringify(value));
const read = (value: unknown) => plain(parseState(JSON.stringify(value), NOW));

/** A state in which all happened at `at`, and what waits does so until `until`. */
function stateOf(at: string, until: string): State {
  const failure = { count: 3, since: at, at, error: "refused", retryAt: until };
  // dates that only a broken certificate or CA has
  const dates = { notBefore: new Date(-62e12).toISOString(), notAfter: new Date(8.64e15).toISOString() };
  const certificate = { fingerprint: "f", names: ["a.example"], ...dates, selfSigned: false, issuer: "CA" };
  const sights = [{ address: "192.0.2.1", kind: "served" as const, certificate }];
  return {
    ...emptyState(),
    renewals: { id: { account: "https://ca thumbprint", askAt: until, suggestedAt: at } },
    orders: { "a.pem": { url: "https://ca/order", account: "https://ca thumbprint", since: at } },
    failures: { "a.example": failure },
    holds: { "https://ca": until },
    withoutRenewalInfo: { "https://ca": at },
    receipts: { web: { "a.pem": { digest: "d", fingerprint: "f", at, repairs: 1 } } },
    deliveries: { web: { ...failure, key: "k", output: "no route", urgent: true } },
    probes: { "a.example:443 rsa": { at, badSince: at, sights } },
    alerts: { web: { CA: { at, what: "issuance of 3 lines" } } },
    reported: { CA: at },
    runs: [{ at }],
  };
}

Deno.test("S8: a state is read as it was written, and its records have no prototype", () => {
  const state = stateOf(PAST, SOON);
  assert.deepEqual(read(state), plain(state));
  assert.deepEqual(read({ version: 2 }), plain(emptyState()), "what is absent is empty");
  const { receipts, alerts } = parseState(JSON.stringify(state), NOW) as State;
  for (const one of [receipts, receipts.web, alerts, alerts.web]) {
    assert.equal(Object.getPrototypeOf(one), null);
  }
});

Deno.test("a time in the future does not count, and nothing waits longer than a day", () => {
  const ahead = stateOf(LATE, LATE);
  const now = NOW.toISOString();
  const { retryAt: _, ...failure } = { ...ahead.failures["a.example"]!, since: now, at: now };
  assert.deepEqual(read(ahead), {
    ...plain(emptyState()),
    renewals: { id: { account: "https://ca thumbprint" } },
    orders: { "a.pem": { ...ahead.orders["a.pem"], since: now } },
    failures: { "a.example": failure },
    receipts: { web: { "a.pem": { ...ahead.receipts.web!["a.pem"], at: NEVER } } }, // it still counts as delivered
    deliveries: { web: { ...failure, key: "k", output: "no route", urgent: true } },
    alerts: { web: { CA: { at: NEVER, what: "issuance of 3 lines" } } }, // so that its end is reported
    runs: ahead.runs, // they show that a clock was wrong
  });
});

Deno.test("with a state of a newer lematt, or one that cannot be read, the exit status is 2, and nothing is done but an alert", async () => {
  const actions = `[default]\nalert: ["cat >> HERE/alerts"]`;
  await using bed = await testBed({ domains: "example.com", settings: "preflight: no", actions });
  const path = bed.path("test/state.json");
  const ends = async (command: string[], error: RegExp) => {
    const { code, stderr } = await bed.lematt("--test", ...command);
    assert.equal(code, 2, stderr);
    assert.match(stderr, error);
  };
  Deno.mkdirSync(bed.path("test"));
  Deno.writeTextFileSync(path, '{"version": 3}');
  for (const command of [[], ["--status"]]) await ends(command, /^lematt: .*state\.json: .*newer.*\n$/);
  assert.equal(bed.text("test/state.json"), '{"version": 3}');
  assert.match(bed.take("alerts").join(), /newer lematt/);
  Deno.removeSync(path);
  Deno.mkdirSync(path);
  await ends([], /^lematt: .*state\.json: .*directory.*\n$/);
  assert.equal(bed.ca.log.length, 0);
});
