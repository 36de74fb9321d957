/** Goal: with rate limits at the CA, many lines are issued over several runs, and the limits are respected. */

import assert from "node:assert/strict";
import { testBed } from "./bed.ts";
import { likeLetsEncrypt, runUntilDone } from "./bench.ts";

const LINES = 80;
const ORDERS = 20;
const PARALLEL = 15;

Deno.test("80 lines at 20 orders in three hours take four runs without a superfluous order, the soonest expiry first", async () => {
  await using bed = await testBed({
    settings: "keyTypes: ec\nari: no",
    ca: { limits: likeLetsEncrypt(ORDERS) },
  });
  const lines = (from: number, to: number) => range(from, to).map((i) => `n${i}.example.com\n`).join("");
  // in the order of the file: 40 new lines, 20 that expire in ten days, 20 that expire in five
  for (const [from, to, age] of [[40, 60, 80], [60, 80, 85]] as const) {
    bed.configure({ domains: lines(from, to) });
    await bed.plant({ age });
  }
  bed.configure({ domains: lines(0, LINES) });

  const refused = await runUntilDone(bed, PARALLEL);
  assert.equal(refused.length, Math.ceil(LINES / ORDERS));
  assert.equal(bed.ca.orders.length, LINES, "every order became a certificate");
  assert(Math.max(...refused) <= PARALLEL, `refused: ${refused}`);
  assert(Math.max(...bed.waits) <= 30_000, "no run waits for the limit to pass");

  const order = bed.ca.issued.map(({ names }) => Number(/^n(\d+)/.exec(names[0]!)![1]));
  assert.equal(new Set(order).size, LINES);
  const expected = [...range(60, 80), ...range(40, 60), ...range(0, 40)];
  for (const [at, line] of order.entries()) {
    const shift = Math.abs(expected.indexOf(line) - at);
    // lines of one run may change places; in the order of the file the shift would be up to 60
    assert(shift < ORDERS + PARALLEL, `line ${line} is ${shift} places off`);
  }
});

function range(from: number, to: number): number[] {
  return Array.from({ length: to - from }, (_, i) => from + i);
}
