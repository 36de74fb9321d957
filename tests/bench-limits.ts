/**
 * Many lines at a CA with the rate limits of Let's Encrypt: runs until all certificates are issued. limits.test.ts checks the
 * same with fewer lines.
 */

import { type Bed, type Ran, testBed } from "./bed.ts";
import { type Cost, measure, megabytes, printFigure, seconds } from "./bench-measure.ts";
import type { Switches } from "./ca.ts";
import { program } from "./programs.ts";

const WINDOW_MS = 3 * 3600_000;

/** https://letsencrypt.org/docs/rate-limits/; of the limits per second, the one for nonces is the lowest. */
export function likeLetsEncrypt(orders: number): NonNullable<Switches["limits"]> {
  return { newOrder: { count: orders, windowMs: WINDOW_MS }, newNonce: { count: 20, windowMs: 1000 } };
}

/** Runs every three hours until all certificates are issued. Throws if a run fails for another reason than a rate limit. */
export async function runUntilDone(bed: Bed, parallel: number): Promise<Ran[]> {
  const runs: Ran[] = [];
  for (;;) {
    const ran = await bed.run({ parallel });
    runs.push(ran);
    if (ran.code === 0) return runs;
    const { holds } = JSON.parse(bed.text("test", "state.json"));
    if (!(bed.ca.directoryUrl in holds)) throw new Error(`the run failed: ${ran.stderr}`);
    bed.ca.advance(WINDOW_MS);
  }
}

/** The number of orders of a run that were refused. */
export function refused({ requests }: Ran): number {
  return requests.filter(({ resource, status }) => resource === "newOrder" && status === 429).length;
}

const LINES = 2_000;
const ORDERS = 300;
const PARALLEL = 30;

/** A few megabytes more than a run with one line needs. */
const HEAP_MB = 24;

export async function limits(): Promise<void> {
  {
    await using bed = await testBed({
      domains: domains(LINES),
      settings: "keyTypes: ec",
      ca: { limits: likeLetsEncrypt(ORDERS) },
    });
    const started = performance.now();
    const from = bed.ca.now.getTime();
    const runs = await runUntilDone(bed, PARALLEL);
    const took = (performance.now() - started) / 1000;
    const hours = (bed.ca.now.getTime() - from) / 3600_000;
    const least = Math.ceil(LINES / ORDERS);
    printFigure(
      `${LINES} lines`,
      `${runs.length} runs`,
      `in ${hours.toFixed(1)} h of the CA's time, ${seconds(took)} here`,
      {
        found: runs.length,
        atMost: least,
      },
    );
    printFigure("orders", `${bed.ca.orders.length}`, "", { found: bed.ca.orders.length, atMost: LINES });
    const most = Math.max(...runs.map(refused));
    printFigure("orders refused per run", `${most}`, `with ${PARALLEL} lines at once`, {
      found: most,
      atMost: PARALLEL,
    });
    const wait = Math.max(...bed.waits) / 1000;
    printFigure("longest wait within a run", seconds(wait), "", { found: wait, atMost: 30 });
  }

  // a large heap contains mostly garbage, so the heap is limited to a size that both runs fill
  const few = await issueAtOnce(LINES / 8, HEAP_MB), many = await issueAtOnce(LINES / 2, HEAP_MB);
  printFigure(
    `${LINES / 8} lines in one run`,
    megabytes(few.peakMegabytes),
    `as a program, heap limited to ${HEAP_MB} MB`,
  );
  const kilobytes = (many.peakMegabytes - few.peakMegabytes) * 1024 / (LINES / 2 - LINES / 8);
  printFigure(
    `${LINES / 2} lines in one run`,
    megabytes(many.peakMegabytes),
    `${kilobytes.toFixed(1)} KB per additional line`,
    {
      found: kilobytes,
      atMost: 20,
    },
  );
}

/** The cost of the program for the first certificates of `lines` lines. */
async function issueAtOnce(lines: number, heapMegabytes: number): Promise<Cost> {
  await using bed = await testBed({ domains: domains(lines), settings: "keyTypes: ec" });
  const heap = `--v8-flags=--max-old-space-size=${heapMegabytes}`;
  return await measure([...program("lematt.ts", heap), "--test", "--cron", bed.conf]);
}

function domains(lines: number): string {
  return Array.from({ length: lines }, (_, i) => `n${i}.example.com\n`).join("");
}
