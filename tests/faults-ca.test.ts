/**
 * Goal: whatever fails in any one exchange with the CA, and whatever value of an answer is false, one undisturbed run later
 * everything is in order; nothing that the CA sends reaches a shell, a path or the terminal unchecked.
 *
 * Single false answers and the errors they cause are in acme.test.ts and issue.test.ts.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { refusing } from "./bed.ts";
import type { Fault } from "./ca.ts";
import { pairs, Subject, sweep, upTo } from "./faults.ts";

const DAYS = 86_400_000;
/** As many exchanges as a run of two lines has, and some more. */
const EXCHANGES = upTo(26);

const after = (fault: Fault): Fault => ({ kind: "after", fault });
const status = (status: number, headers?: Record<string, string>): Fault => (
  { kind: "status", status, headers, contentType: "text/plain" }
);
const limited = (retryAfter: string) =>
  refusing(429, "rateLimited", "slow down", { headers: { "retry-after": retryAfter } });

const FAULTS: Readonly<Record<string, Fault>> = {
  "connection refused": { kind: "refuse" },
  "reset": { kind: "reset" },
  "reset after it was handled": after({ kind: "reset" }),
  "reset mid-body": { kind: "reset mid-body" },
  "silence": { kind: "silence" },
  "silence after it was handled": after({ kind: "silence" }),
  "500": status(500),
  "500 after it was handled": after(status(500)),
  "404": refusing(404, "malformed", "not found on this replica"),
  "503, Retry-After in seconds": status(503, { "retry-after": "20" }),
  "503, Retry-After as a date": status(503, { "retry-after": new Date(Date.now() + 20_000).toUTCString() }),
  "503, absurd Retry-After": status(503, { "retry-after": "99999999999999" }),
  "429": refusing(429, "rateLimited", "slow down"),
  "429, Retry-After in seconds": limited("20"),
  "429, Retry-After in hours": limited("9999"),
  "429, absurd Retry-After": limited("99999999999999"),
  "badNonce": { kind: "badNonce" },
  "truncated": { kind: "truncate" },
  "HTML with 200": { kind: "html" },
  "redirect": status(307, { location: "https://localhost/" }),
  "no Replay-Nonce": { kind: "drop header", name: "replay-nonce" },
  "no Location": { kind: "drop header", name: "location" },
  "no Content-Type": { kind: "drop header", name: "content-type" },
  "the same answer twice": { kind: "repeat" },
};

/** A subject before its first run, or when all its certificates are due. */
async function subjectFor(run: "first run" | "renewal"): Promise<Subject> {
  const subject = await Subject.create();
  if (run === "first run") return subject;
  await subject.bed.run();
  subject.bed.ca.advance(85 * DAYS); // which is past the CA's suggestion, too
  subject.countOrders();
  return subject;
}

/** A run with a fault in its n-th exchange; false if it has fewer. A silent CA is given up after 500 ms. */
async function runWithFault(subject: Subject, n: number, fault: Fault): Promise<boolean> {
  const { bed } = subject;
  const before = bed.ca.log.length;
  bed.ca.switches.fault = (exchange) => exchange.n === before + n ? fault : undefined;
  const { fetch } = bed.context();
  const withTimeout = (url: string, init: RequestInit) =>
    fetch(url, { ...init, signal: AbortSignal.any([init.signal!, AbortSignal.timeout(500)]) });
  const silent = JSON.stringify(fault).includes("silence");
  const ran = await bed.run({ retry: true, ...(silent && { fetch: withTimeout }) });
  await subject.afterFault(ran);
  assert.deepEqual(bed.dropped(), [], "challenge files");
  return ran.requests.length >= n;
}

for (const run of ["first run", "renewal"] as const) {
  Deno.test(`the next run recovers from any fault in any exchange of a ${run}`, async () => {
    await sweep(`wire, ${run}`, pairs(Object.keys(FAULTS), EXCHANGES), 5, async ([kind, n]) => {
      await using subject = await subjectFor(run);
      const injected = await runWithFault(subject, n, FAULTS[kind]!);
      // allowed are only: asking again too soon after a lost answer, and any violation after a wrong answer was repeated
      const violations = subject.bed.ca.violations.splice(0);
      assert.deepEqual(
        violations.filter(({ type }) => type !== "tooSoon" && !kind.startsWith("the same")),
        [],
      );
      await subject.recover();
      return injected;
    });
  });
}

Deno.test("after a CA answered a new order with an old one, it is not asked again when to renew", async () => {
  for (const n of [6, 7]) { // the orders of both key types
    await using subject = await subjectFor("renewal");
    await runWithFault(subject, n, { kind: "repeat" });
    subject.bed.ca.violations.splice(0);
    await subject.recover();
    assert.deepEqual(subject.bed.ca.violations, []);
  }
});

Deno.test("a run interrupted at any exchange leaves nothing behind, and the next run continues", async () => {
  await sweep("interrupted at an exchange", EXCHANGES, 2, async (n) => {
    await using subject = await subjectFor("first run");
    const { bed } = subject;
    const stop = new AbortController();
    bed.ca.switches.fault = (exchange) => {
      if (exchange.n === n) stop.abort(new DOMException("interrupted", "AbortError"));
      return undefined;
    };
    const ran = await subject.attempt({ signal: stop.signal });
    await subject.afterFault(ran);
    assert.deepEqual(bed.dropped(), [], "challenge files");
    if (stop.signal.aborted) assert.equal(ran.code, 1);
    await subject.recover();
    return stop.signal.aborted;
  });
});

// ---- false answers -----------------------------------------------------------------------------------------------

/** Replace values in the CA's answers; CANARY is a file that must not be created. */
const FALSE_VALUES: readonly unknown[] = [
  "$(touch CANARY); touch CANARY; `touch CANARY` | touch CANARY\n touch CANARY #",
  "../../../../../../../../CANARY",
  "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nissued  \u202eeverything\u2066\0",
  "https://bank.example/acme/order/1",
  "file:///etc/passwd",
  "http://localhost/",
  "A".repeat(10 << 20),
  "--config=CANARY",
  "",
  "__proto__",
  null,
  -1e308,
  "+275760-09-13T00:00:00Z",
  [["https://localhost/"]],
  { type: "valid", status: "valid", value: "CANARY" },
  { toString: "valid", valueOf: 1, toJSON: null, length: -1, constructor: null },
];

/** A renewal with a fault in its n-th exchange, and the checks after it. `value` is the text of one of FALSE_VALUES. */
async function deceived(n: number, value: unknown, fault: (json: string) => Fault): Promise<boolean> {
  await using subject = await subjectFor("renewal");
  const { bed } = subject;
  const canary = join(bed.home, "canary");
  const injected = await runWithFault(subject, n, fault(JSON.stringify(value).replaceAll("CANARY", canary)));
  for (const { stem, finding } of subject.inventory()) assert.equal(finding.kind, "present", stem);
  const violations = bed.ca.violations.splice(0).filter(({ url }) =>
    !/bank|CANARY/.test(new URL(url).pathname)
  );
  await subject.recover();
  assert(!existsSync(canary), "the canary was made");
  assert.deepEqual(violations, []);
  return injected;
}

/** A JSON value with its n-th value that is neither list nor object replaced. */
function rewritten(body: unknown, n: number, value: unknown): unknown {
  let left = n;
  const walk = (part: unknown): unknown => {
    if (typeof part !== "object" || part === null) return --left === 0 ? value : part;
    if (Array.isArray(part)) return part.map(walk);
    return Object.fromEntries(Object.entries(part).map(([key, value]) => [key, walk(value)]));
  };
  return walk(body);
}

Deno.test("a false value anywhere in an answer causes an error, and the next run recovers", async () => {
  const points = pairs(EXCHANGES, upTo(20)).map(([n, word], i) => ({ n, word, i: i % FALSE_VALUES.length }));
  await sweep("false values", points, 4, async ({ n, word, i }) => {
    let changed = false;
    await deceived(n, FALSE_VALUES[i], (json) => ({
      kind: "rewrite text",
      rewrite(body) {
        const isJson = body.startsWith("{");
        const answer = isJson ? JSON.stringify(rewritten(JSON.parse(body), word, JSON.parse(json))) : json;
        changed = answer !== body;
        return answer;
      },
    }));
    return changed; // most answers have fewer words
  });
});

Deno.test("a refusal with hostile text is printed harmlessly, whichever request it answers", async () => {
  await sweep("hostile refusals", pairs(EXCHANGES, FALSE_VALUES.keys().toArray()), 3, async ([n, i]) => {
    return await deceived(n, FALSE_VALUES[i], (json) => {
      const text = json.length < 1 << 19 ? JSON.parse(json) : "A".repeat(1 << 18);
      const problem = { type: text, detail: text, identifier: { type: text, value: text }, instance: text };
      const body = JSON.stringify({ ...problem, status: text, subproblems: [problem, text] });
      return { kind: "status", status: 403, body };
    });
  });
});
