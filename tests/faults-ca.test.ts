/**
 * Goal: whatever fails in any one exchange with the CA, and whatever value of an answer is false, one undisturbed run later
 * everything is in order; nothing that the CA sends reaches a shell, a path or the terminal unchecked.
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

const HOURS = { headers: { "retry-after": "9999" } };
const FAULTS: Readonly<Record<string, Fault | "interruption">> = {
  "connection refused": { kind: "refuse" },
  "reset": { kind: "reset" },
  "reset after it was handled": after({ kind: "reset" }),
  "reset mid-body": { kind: "reset mid-body" },
  "silence": { kind: "silence" },
  "silence after it was handled": after({ kind: "silence" }),
  "500": status(500),
  "500 after it was handled": after(status(500)),
  "404": refusing(404, "malformed", "not found on this replica"),
  "503, absurd Retry-After": status(503, { "retry-after": "99999999999999" }),
  "429, Retry-After in hours": refusing(429, "rateLimited", "slow down", HOURS),
  "badNonce": { kind: "badNonce" },
  "truncated": { kind: "truncate" },
  "HTML with 200": { kind: "html" },
  "redirect": status(307, { location: "https://localhost/" }),
  "no Replay-Nonce": { kind: "drop header", name: "replay-nonce" },
  "no Location": { kind: "drop header", name: "location" },
  "no Content-Type": { kind: "drop header", name: "content-type" },
  "the same answer twice": { kind: "repeat" },
  "interruption": "interruption",
};

/** A subject before its first run, or when all its certificates are due. */
async function subjectFor(run: "first run" | "renewal"): Promise<Subject> {
  const subject = await Subject.create();
  if (run === "first run") return subject;
  await subject.bed.run();
  subject.bed.ca.advance(85 * DAYS); // which is past the CA's suggestion, too
  subject.begin();
  return subject;
}

/** A run with a fault in its n-th exchange; false if it has fewer, or the answer nothing to change. */
async function runWithFault(subject: Subject, n: number, fault: Fault | "interruption"): Promise<boolean> {
  const { bed } = subject;
  const before = bed.ca.log.length;
  const stop = new AbortController();
  const isSilent = JSON.stringify(fault).includes("silence");
  let timeOut = new AbortController(); // of the requests up to a silence
  bed.ca.switches.fault = (exchange) => {
    if (exchange.n !== before + n) return undefined;
    if (isSilent) {
      const current = timeOut;
      setTimeout(() => current.abort(new DOMException("silence", "TimeoutError")), 1000);
      timeOut = new AbortController();
    }
    if (fault !== "interruption") return fault;
    stop.abort();
    return undefined;
  };
  const { fetch } = bed.context();
  const impatient: typeof fetch = (url, init) =>
    fetch(url, { ...init, signal: AbortSignal.any([init.signal!, timeOut.signal]) });
  const ran = fault === "interruption"
    ? await subject.attempt({ signal: stop.signal })
    : await bed.run({ retry: true, fetch: impatient });
  if (stop.signal.aborted) assert.equal(ran.code, 1);
  await subject.afterFault(ran);
  assert.deepEqual(bed.dropped(), [], "challenge files");
  return stop.signal.aborted || bed.ca.log[before + n - 1]?.isTrue === false;
}

for (const run of ["first run", "renewal"] as const) {
  Deno.test(`the next run recovers from any fault in any exchange of a ${run}`, async () => {
    const attempt = async ([kind, n]: readonly [string, number]) => {
      await using subject = await subjectFor(run);
      const injected = await runWithFault(subject, n, FAULTS[kind]!);
      // a lost answer may be asked for again too soon
      const violations = subject.bed.ca.violations.splice(0).filter(({ type }) => type !== "tooSoon");
      if (!kind.startsWith("the same")) assert.deepEqual(violations, []);
      await subject.recover();
      return injected;
    };
    await sweep(`wire, ${run}`, pairs(Object.keys(FAULTS), EXCHANGES), 5, attempt);
    // a new order that is answered with an old one must not make lematt ask for renewal information too early
    if (run === "renewal") await Promise.all([6, 7].map((n) => attempt(["the same answer twice", n])));
  });
}

// ---- false answers -----------------------------------------------------------------------------------------------

/** Replace values in the CA's answers; CANARY is a file that must not be created. */
const FALSE_VALUES: readonly unknown[] = [
  "$(touch CANARY); touch CANARY; `touch CANARY` | touch CANARY\n touch CANARY #",
  "../../../../../../../../CANARY",
  "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nissued  \u202eeverything\u2066\0",
  "https://bank.example/acme/order/1",
  "file:///etc/passwd",
  "A".repeat(10 << 20),
  "--config=CANARY",
  "",
  null,
  -1e308,
  "+275760-09-13T00:00:00Z",
  [["https://localhost/"]],
  { type: "valid", status: "valid", value: "CANARY" },
  { toString: "valid", valueOf: 1, toJSON: null, length: -1, constructor: null },
];

/** JSON with its n-th value that is neither list nor object replaced. */
function rewritten(json: string, n: number, value: unknown): string {
  const isWord = (part: unknown) => typeof part !== "object" || part === null;
  return JSON.stringify(JSON.parse(json, (_, part) => isWord(part) && --n === 0 ? value : part));
}

/** A refusal all of whose texts are this one, or as much of it as is read. */
function refusalIn(value: unknown): Fault {
  const text = JSON.stringify(value).length < 1 << 19 ? value : "A".repeat(1 << 18);
  const problem = { type: text, detail: text, identifier: { type: text, value: text }, instance: text };
  const body = JSON.stringify({ ...problem, status: text, subproblems: [problem, text] });
  return { kind: "status", status: 403, body };
}

Deno.test("a false value anywhere in an answer, or a refusal in hostile words, does no harm, and the next run recovers", async () => {
  const count = FALSE_VALUES.length;
  const points = [
    ...pairs(EXCHANGES, upTo(20)).map(([n, word], i) => ({ n, word, i: i % count })),
    ...pairs(EXCHANGES, upTo(count)).map(([n, i]) => ({ n, word: "refusal", i: i - 1 }) as const),
  ];
  await sweep("false values and hostile refusals", points, 7, async ({ n, word, i }) => {
    await using subject = await subjectFor("renewal");
    const { bed } = subject;
    const canary = join(bed.home, "canary");
    const value = JSON.parse(JSON.stringify(FALSE_VALUES[i]).replaceAll("CANARY", canary));
    let changed = word === "refusal";
    const rewrite = (body: string) => {
      const answer = body.startsWith("{") ? rewritten(body, Number(word), value) : JSON.stringify(value);
      changed = answer !== body;
      return answer;
    };
    const injected = await runWithFault(
      subject,
      n,
      word === "refusal" ? refusalIn(value) : { kind: "rewrite text", rewrite },
    );
    for (const { stem, finding } of subject.inventory()) assert.equal(finding.kind, "present", stem);
    const paths = bed.ca.violations.splice(0).map(({ url }) => new URL(url).pathname);
    assert.deepEqual(paths.filter((path) => !path.includes("bank")), []);
    await subject.recover();
    assert(!existsSync(canary), "the canary was made");
    return injected && changed; // most answers have fewer words
  });
});
