/** Goal: whatever is in state.json, it is read as written, replaced by an empty state, or left alone with exit status 2. */

import assert from "node:assert/strict";
import { emptyState, parseState, type State, StateError } from "../lib/state.ts";
import { testBed } from "./bed.ts";

const NOW = new Date("2026-11-27T03:00:00.000Z");
const after = (days: number) => new Date(NOW.getTime() + days * 86_400_000).toISOString();
const [PAST, SOON, LATE] = [after(-1), after(0.9), after(365)];

/** A state with one of everything; `at` is when all of it happened, `until` is until when things wait. */
function full(at = PAST, until = SOON): State {
  const wait = { count: 3, since: at, at, error: "refused", retryAt: until };
  const certificate = {
    ...{ fingerprint: "f", names: ["a.example"], notBefore: PAST, notAfter: LATE, selfSigned: false },
    issuer: "CA",
  };
  const window = { start: PAST, end: LATE, at: LATE, explanationUrl: "https://ca/why" };
  return {
    version: 2,
    accounts: {
      "https://ca thumbprint": { url: "https://ca/1", contact: ["mailto:a@b.c"], issuers: ["ca"] },
    },
    renewals: { id: { account: "https://ca thumbprint", window, askAt: until, suggestedAt: at } },
    orders: { "a.pem": { url: "https://ca/order", account: "https://ca thumbprint", since: at } },
    failures: { "a.example": { ...wait, shared: true } },
    holds: { "https://ca": until },
    withoutRenewalInfo: { "https://ca": at },
    receipts: { web: { "a.pem": { digest: "d", fingerprint: "f", at, repairs: 1 } } },
    deliveries: { web: { ...wait, key: "k", output: "no route", urgent: true } },
    probes: {
      "a.example:443 rsa": {
        at,
        confirmed: true,
        badSince: at,
        brokenByDelivery: true,
        sights: [
          { address: "192.0.2.1", kind: "served", certificate },
          { address: "192.0.2.2", kind: "unfinished", certificate, detail: "bad signature" },
          { address: "", kind: "unreachable", detail: "no address" },
        ],
      },
    },
    alerts: { web: { CA: { at, what: "issuance of 3 lines" } } },
    reported: { CA: at },
    published: [{ token: "abc" }, { name: "a.example", value: "def" }],
    runs: [{ at: PAST }, { at }],
  };
}

/** As plain objects, whose prototype does not count. */
const plain = (value: unknown) => JSON.parse(JSON.stringify(value));
const read = (value: unknown, now = NOW) =>
  plain(parseState(typeof value === "string" ? value : JSON.stringify(value), now));

Deno.test("a state is read as it was written, and its records have no prototype", () => {
  assert.deepEqual(read(full()), plain(full()));
  assert.deepEqual(read(emptyState()), plain(emptyState()));
  assert.deepEqual(read({ version: 2 }), plain(emptyState()), "what is absent is empty");
  const { receipts, alerts } = parseState(JSON.stringify(full()), NOW) as State;
  for (const one of [receipts, receipts.web, alerts, alerts.web]) {
    assert.equal(Object.getPrototypeOf(one), null);
  }
});

Deno.test("dates that only a broken certificate or CA has are read back, too", () => {
  const state = full();
  state.renewals.id!.window!.end = new Date(8.64e15).toISOString();
  state.probes["a.example:443 rsa"]!.sights[0]!.certificate!.notBefore = new Date(-62e12).toISOString();
  assert.deepEqual(read(state), plain(state));
});

Deno.test("a state that was truncated or edited by hand is replaced by an empty one, with the reason", () => {
  const text = JSON.stringify(full());
  for (let length = 0; length < text.length; length += 7) assert("unusable" in read(text.slice(0, length)));
  const edited: unknown[] = [
    ...["[]", "null", "{}", { version: 0 }, { version: "2" }, { version: 2.5 }, { version: 2, receipts: [] }],
    ...["yesterday", "1764212400000"].map((at) => ({ version: 2, runs: [{ at }] })),
    { version: 1, owed: { web: { since: PAST } } },
  ];
  for (const state of edited) assert.match(read(state).unusable, /./, JSON.stringify(state));
});

Deno.test("a time in the future does not count, and nothing waits longer than a day", () => {
  const ahead = read(full(LATE, LATE));
  const now = NOW.toISOString();
  const never = "1970-01-01T00:00:00.000Z";
  const { account, window } = full().renewals.id!;
  assert.deepEqual(ahead, {
    ...plain(full()),
    renewals: { id: { account, window } },
    orders: { "a.pem": { ...full().orders["a.pem"], since: now } },
    failures: { "a.example": { count: 3, since: now, at: now, error: "refused", shared: true } },
    holds: {},
    withoutRenewalInfo: {},
    receipts: { web: { "a.pem": { ...full().receipts.web!["a.pem"], at: never } } }, // it still counts as delivered
    deliveries: {
      web: { count: 3, since: now, at: now, error: "refused", key: "k", output: "no route", urgent: true },
    },
    probes: {},
    alerts: { web: { CA: { at: never, what: "issuance of 3 lines" } } }, // so that its end is reported
    reported: {},
    runs: full(LATE, LATE).runs, // they show that a clock was wrong
  });
});

Deno.test("a state of version 1 is taken over; a newer version is not touched", () => {
  const { accounts, renewals, holds } = full();
  const failures = { a: { count: 2, at: PAST, error: "refused", retryAt: SOON } };
  const owed = { web: { since: PAST, certificates: { "a.pem": "f" }, attempts: 1, retryAt: SOON } };
  const version1 = { version: 1, accounts, renewals, holds, failures, owed, alerts: { web: { owed: PAST } } };
  assert.deepEqual(read(version1), {
    ...plain(emptyState()),
    ...{ accounts, renewals, holds },
    failures: { a: { ...failures.a, since: PAST } },
    undelivered: { web: { "a.pem": "f" } },
  });
  assert.throws(() => parseState(`{"version": 3, "news": {}}`, NOW), StateError);
});

Deno.test("with a state of a newer lematt, or one that cannot be read, the exit status is 2 and nothing is done", async () => {
  await using bed = await testBed({ domains: "example.com", settings: "keyTypes: ec\npreflight: no" });
  Deno.mkdirSync(bed.path("test"));
  const path = bed.path("test/state.json");
  const ends = (command: string[], named: RegExp) =>
    bed.lematt("--test", ...command).then(({ code, stderr }) => {
      assert.equal(code, 2, stderr);
      assert.match(stderr, named);
    });
  const commands = [[], ["--plan"], ["--status"], ["--rollover", "--yes"]];
  Deno.writeTextFileSync(path, '{"version": 3}');
  for (const command of commands) await ends(command, /^lematt: .*state\.json: .*newer.*\n$/);
  assert.equal(bed.text("test/state.json"), '{"version": 3}');
  Deno.removeSync(path);
  Deno.mkdirSync(path);
  for (const command of commands) await ends(command, /^lematt: .*state\.json: .*directory.*\n$/);
  assert.equal(bed.ca.log.length, 0);
});
