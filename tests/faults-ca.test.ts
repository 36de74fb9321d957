/**
 * Goal: whatever happens to any one exchange with the CA, and whatever lie is in any word of any answer, one undisturbed run
 * later all is as it should be; nothing that the CA says reaches a shell, a path or the terminal as it is.
 *
 * Single lies and what is said of each are in acme.test.ts and issue.test.ts.
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

/** Everything that can befall one exchange. */
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
  "sent elsewhere": status(307, { location: "https://localhost/" }),
  "no Replay-Nonce": { kind: "drop header", name: "replay-nonce" },
  "no Location": { kind: "drop header", name: "location" },
  "no Content-Type": { kind: "drop header", name: "content-type" },
  "the same answer twice": { kind: "repeat" },
};

/** A subject before its first run, or when all its certificates are due. */
async function subjectFor(run: string): Promise<Subject> {
  const subject = await Subject.create();
  if (run === "first run") return subject;
  await subject.bed.run();
  subject.bed.ca.advance(85 * DAYS); // which is past the CA's suggestion, too
  subject.countOrders();
  return subject;
}

/** A run, at the n-th exchange of which a fault befalls; false if it has fewer. Silence is not waited for in earnest. */
async function disturbed(subject: Subject, n: number, fault: Fault): Promise<boolean> {
  const { bed } = subject;
  const before = bed.ca.log.length;
  bed.ca.switches.fault = (exchange) => exchange.n === before + n ? fault : undefined;
  const { fetch } = bed.world();
  const impatient = (url: string, init: RequestInit) =>
    fetch(url, { ...init, signal: AbortSignal.any([init.signal!, AbortSignal.timeout(300)]) });
  const silent = JSON.stringify(fault).includes("silence");
  const ran = await bed.run({ retry: true, ...(silent && { fetch: impatient }) });
  await subject.afterFault(ran);
  assert.deepEqual(bed.dropped(), [], "challenge files");
  return ran.requests.length >= n;
}

for (const [run, some] of [["first run", 5], ["renewal", 4]] as const) {
  Deno.test(`any fault of any exchange of a ${run} is made good by the next run`, async () => {
    await sweep(`wire, ${run}`, pairs(Object.keys(FAULTS), EXCHANGES), some, async ([kind, n]) => {
      await using subject = await subjectFor(run);
      const befell = await disturbed(subject, n, FAULTS[kind]!);
      // who never got the answer asks again too soon, and who got that to another question is misled; no more is forgiven
      const blame = subject.bed.ca.violations.splice(0);
      assert.deepEqual(blame.filter(({ type }) => type !== "tooSoon" && !kind.startsWith("the same")), []);
      await subject.recover();
      return befell;
    });
  });
}

Deno.test("a run that is interrupted at any exchange leaves nothing behind, and the next run goes on", async () => {
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

// ---- lies --------------------------------------------------------------------------------------------------------

/** Goes in the place of whatever the CA says; CANARY is a file that nobody may make. */
const LIES: readonly unknown[] = [
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

/** A run whose n-th exchange goes wrong, of a subject whose certificates are due; and what must hold then. */
async function lied(n: number, fault: (canary: string) => Fault): Promise<boolean> {
  await using subject = await subjectFor("renewal");
  const { bed } = subject;
  const canary = join(bed.home, "canary");
  const befell = await disturbed(subject, n, fault(canary));
  for (const { stem, finding } of subject.inventory()) assert.equal(finding.kind, "present", stem);
  const blame = bed.ca.violations.splice(0).filter(({ url }) => !new URL(url).pathname.match(/bank|CANARY/));
  await subject.recover();
  assert(!existsSync(canary), "the canary was made");
  assert.deepEqual(blame, []);
  return befell;
}

/** A JSON text in which the n-th value that is no list and no object is another. */
function rewritten(body: unknown, n: number, lie: unknown): unknown {
  let left = n;
  const walk = (value: unknown): unknown => {
    if (typeof value !== "object" || value === null) return --left === 0 ? lie : value;
    if (Array.isArray(value)) return value.map(walk);
    return Object.fromEntries(Object.entries(value).map(([key, value]) => [key, walk(value)]));
  };
  return walk(body);
}

Deno.test("a lie in any word of any answer costs an error, and is made good by the next run", async () => {
  const points = pairs(EXCHANGES, upTo(20)).map(([n, word], i) => ({ n, word, lie: i % LIES.length }));
  await sweep("lies in a word", points, 3, async ({ n, word, lie }) => {
    let said = false;
    await lied(n, (canary) => ({
      kind: "rewrite text",
      rewrite(body) {
        const text = JSON.stringify(LIES[lie]).replaceAll("CANARY", canary);
        const isJson = body.startsWith("{");
        const answer = isJson ? JSON.stringify(rewritten(JSON.parse(body), word, JSON.parse(text))) : text;
        said = answer !== body;
        return answer;
      },
    }));
    return said; // most answers have fewer words
  });
});

Deno.test("a refusal in hostile words is reported in harmless ones, whatever was asked", async () => {
  await sweep("hostile refusals", pairs(EXCHANGES, LIES.keys().toArray()), 2, async ([n, lie]) => {
    return await lied(n, (canary) => {
      const lies = JSON.stringify(LIES[lie]).replaceAll("CANARY", canary);
      const text = lies.length < 1 << 19 ? JSON.parse(lies) : "A".repeat(1 << 18);
      const problem = { type: text, detail: text, identifier: { type: text, value: text }, instance: text };
      const body = JSON.stringify({ ...problem, status: text, subproblems: [problem, text] });
      return { kind: "status", status: 403, body };
    });
  });
});
