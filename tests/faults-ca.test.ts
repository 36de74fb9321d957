/**
 * Goal: a CA that lies in any word of any answer gets nothing but an error: the old certificates and keys stay, nothing
 * that it says reaches a shell, a path or the terminal as it is.
 *
 * The single lies and what is said of each are in acme.test.ts (tokens, URLs, problems, bodies, endless processing) and
 * in issue.test.ts (authorizations, orders that turn invalid at every step, certificates that are not what was ordered).
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Fault } from "./ca.ts";
import { pairs, Subject, sweep, upTo } from "./faults.ts";

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
  [["https://localhost/"]],
  { type: "valid", status: "valid", value: "CANARY" },
  { toString: "valid", valueOf: 1, toJSON: null, length: -1, constructor: null },
];

/** A run whose n-th exchange goes wrong, of a subject whose certificates are due; and what must hold then. */
async function lied(n: number, fault: (canary: string) => Fault): Promise<boolean> {
  await using subject = await Subject.create();
  const { bed } = subject;
  await bed.run();
  bed.ca.advance(85 * 86_400_000);
  subject.countOrders();
  const canary = join(bed.home, "canary");
  const before = bed.ca.log.length;
  const lie = fault(canary);
  bed.ca.switches.fault = (exchange) => exchange.n === before + n ? lie : undefined;
  const ran = await bed.run({ retry: true });
  await subject.afterFault(ran);
  for (const { stem, finding } of subject.inventory()) assert.equal(finding.kind, "present", stem);
  assert.deepEqual(bed.dropped(), [], "challenge files");
  assert(!existsSync(canary), "the canary was made");
  const blame = bed.ca.violations.splice(0).filter(({ url }) => !new URL(url).pathname.match(/bank|CANARY/));
  await subject.recover();
  assert(!existsSync(canary), "the canary was made");
  assert.deepEqual(blame, []);
  return ran.requests.length >= n;
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
  const points = pairs(upTo(24), upTo(20)).map(([n, word], i) => ({ n, word, lie: i % LIES.length }));
  await sweep("lies in a word", points, 3, async ({ n, word, lie }) => {
    let told = false;
    await lied(n, (canary) => ({
      kind: "rewrite text",
      rewrite(body) {
        const text = JSON.stringify(LIES[lie]).replaceAll("CANARY", canary);
        const answer = body.startsWith("{")
          ? JSON.stringify(rewritten(JSON.parse(body), word, JSON.parse(text)))
          : text;
        told = answer !== body;
        return answer;
      },
    }));
    return told; // most answers have fewer words
  });
});

Deno.test("a refusal in hostile words is told in harmless ones, whatever was asked", async () => {
  await sweep("hostile refusals", pairs(upTo(24), LIES.keys().toArray()), 2, async ([n, lie]) => {
    return await lied(n, (canary) => {
      const lies = JSON.stringify(LIES[lie]).replaceAll("CANARY", canary);
      const text = lies.length < 1 << 19 ? JSON.parse(lies) : "A".repeat(1 << 18);
      const problem = { type: text, detail: text, identifier: { type: text, value: text } };
      const body = JSON.stringify({ ...problem, status: text, subproblems: [problem, text] });
      return { kind: "status", status: 403, body };
    });
  });
});
