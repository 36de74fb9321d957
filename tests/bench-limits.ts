/** Many lines at a CA with the rate limits of Let's Encrypt. limits.test.ts checks the same with fewer lines. */

import { type Bed, testBed } from "./bed.ts";
import { figure, measure } from "./bench-measure.ts";
import type { Switches } from "./ca.ts";
import { program } from "./programs.ts";

const WINDOW_MS = 3 * 3600_000;

/** https://letsencrypt.org/docs/rate-limits/; of the limits per second, the one for nonces is the lowest. */
export function likeLetsEncrypt(orders: number): Switches["limits"] {
  return { newOrder: { count: orders, windowMs: WINDOW_MS }, newNonce: { count: 20, windowMs: 1000 } };
}

/** Runs every three hours until all certificates are issued; returns the number of refused orders of each run. */
export async function runUntilDone(bed: Bed, parallel: number): Promise<number[]> {
  const refused: number[] = [];
  for (;;) {
    const { code, stderr, requests } = await bed.run({ parallel });
    refused.push(requests.filter(({ resource, status }) => resource === "newOrder" && status === 429).length);
    if (code === 0) return refused;
    if (!(bed.ca.directoryUrl in bed.state().holds)) throw new Error(`not a rate limit: ${stderr}`);
    bed.ca.advance(WINDOW_MS);
  }
}

const LINES = 2_000;
const ORDERS = 300;
const PARALLEL = 30;
const domains = (lines: number) => Array.from({ length: lines }, (_, i) => `n${i}.example.com\n`).join("");
/** A few megabytes more than a run with one line needs. */
const HEAP_MB = 24;

export async function limits(): Promise<void> {
  await using bed = await testBed({
    domains: domains(LINES),
    settings: "keyTypes: ec",
    ca: { limits: likeLetsEncrypt(ORDERS) },
  });
  const refused = await runUntilDone(bed, PARALLEL);
  figure(`runs, every three hours, at ${ORDERS} orders`, refused.length, "", Math.ceil(LINES / ORDERS));
  figure("orders", bed.ca.orders.length, "", LINES);
  figure("orders refused in a run", Math.max(...refused), "", PARALLEL);
  figure("longest wait within a run", Math.max(...bed.waits) / 1000, "s", 30);

  // a large heap contains mostly garbage, so the heap is limited to a size that both runs fill
  const few = await megabytesOf(LINES / 8), many = await megabytesOf(LINES / 2);
  figure(`${LINES / 2} lines in one run, heap limited to ${HEAP_MB} MB`, many, "MB");
  const each = (many - few) * 1024 / (LINES / 2 - LINES / 8);
  figure("memory per additional line", each, "KB", 20);
}

/** The memory of the program that issues the first certificates of `lines` lines. */
async function megabytesOf(lines: number): Promise<number> {
  await using bed = await testBed({ domains: domains(lines), settings: "keyTypes: ec" });
  const lematt = program("lematt.ts", `--v8-flags=--max-old-space-size=${HEAP_MB}`);
  return (await measure(...lematt, "--test", "--cron", bed.conf)).peakMegabytes;
}
