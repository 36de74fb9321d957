/** Goal: a CA that limits its users is asked no more than it takes, and many lines are issued over several runs. */

import assert from "node:assert/strict";
import { testBed } from "./bed.ts";
import { likeLetsEncrypt, refused, runUntilDone } from "./bench-limits.ts";

const LINES = 200;
const ORDERS = 30;
const PARALLEL = 25;

Deno.test("200 lines at 30 orders in three hours take seven runs, no order too many, soonest expiry first", async () => {
  await using bed = await testBed({
    settings: "keyTypes: ec\nari: no",
    ca: { limits: likeLetsEncrypt(ORDERS) },
  });
  const lines = (from: number, to: number) =>
    Array.from({ length: to - from }, (_, i) => `n${from + i}.example.com\n`).join("");
  // as they stand in the file: 140 new ones, 30 that expire in ten days, 30 that expire in five
  for (const [from, to, age] of [[140, 170, 80], [170, 200, 85]] as const) {
    bed.configure({ domains: lines(from, to) });
    await bed.plant({ age });
  }
  bed.configure({ domains: lines(0, LINES) });

  const runs = await runUntilDone(bed, PARALLEL);
  assert.equal(runs.length, Math.ceil(LINES / ORDERS));
  assert.equal(bed.ca.orders.length, LINES, "every order became a certificate");
  for (const run of runs) assert(refused(run) <= PARALLEL, `${refused(run)} orders refused`);
  assert(Math.max(...bed.waits) <= 30_000, "no run waits for the limit to pass");

  const order = bed.ca.issued.map(({ names }) => Number(/^n(\d+)/.exec(names[0]!)![1]));
  assert.equal(new Set(order).size, LINES);
  const expected = [...range(170, 200), ...range(140, 170), ...range(0, 140)];
  for (const [at, line] of order.entries()) {
    const shift = Math.abs(expected.indexOf(line) - at);
    assert(shift <= PARALLEL, `line ${line} came ${shift} places from its turn`);
  }
});

Deno.test("lines that a limit on requests a second turns away come back until all are issued, in one run", async () => {
  await using bed = await testBed({
    domains: range(0, 40).map((i) => `n${i}.example.com\n`).join(""),
    settings: "keyTypes: ec",
    ca: { limits: { requestsPerSecond: { newOrder: 5, newNonce: 20 } } },
  });
  /** All who wait for the same moment share one leap of the clock. */
  const sleep = async (ms: number) => {
    const until = bed.ca.now.getTime() + ms;
    await new Promise((resolve) => setTimeout(resolve, 5));
    bed.ca.advance(Math.max(0, until - bed.ca.now.getTime()));
  };
  const ran = await bed.run({ parallel: 40, sleep });
  assert.equal(ran.code, 0, ran.stderr);
  assert.equal(bed.ca.orders.length, 40);
});

function range(from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, i) => from + i);
}
