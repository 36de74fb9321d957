/**
 * Many lines at a CA that limits its users as Let's Encrypt does: run after run until all have their
 * certificate. limits.test.ts asserts of fewer lines what is told of many here.
 */

import { type Bed, type Ran, testBed } from "./bed.ts";
import { type Cost, measure, megabytes, seconds, tell } from "./bench-measure.ts";
import type { Switches } from "./ca.ts";
import { program } from "./programs.ts";

const WINDOW_MS = 3 * 3600_000;

/** https://letsencrypt.org/docs/rate-limits/, where nonces are the endpoint that the fewest requests a second exhaust. */
export function likeLetsEncrypt(orders: number): NonNullable<Switches["limits"]> {
  return { newOrder: { count: orders, windowMs: WINDOW_MS }, requestsPerSecond: { newNonce: 20 } };
}

/** Runs every three hours until all is issued. Throws where a run ends for another reason than the limit. */
export async function runUntilDone(bed: Bed, parallel: number): Promise<Ran[]> {
  const runs: Ran[] = [];
  for (;;) {
    const ran = await bed.run({ parallel });
    runs.push(ran);
    if (ran.code === 0) return runs;
    const { holds } = JSON.parse(bed.text("test", "state.json"));
    if (!(bed.ca.directoryUrl in holds)) throw new Error(`Cannot go on: ${ran.stderr}`);
    bed.ca.advance(WINDOW_MS);
  }
}

/** How many orders a run was refused. */
export function refused({ requests }: Ran): number {
  return requests.filter(({ resource, status }) => resource === "newOrder" && status === 429).length;
}

const LINES = 2_000;
const ORDERS = 300;
const PARALLEL = 30;

/** Some megabytes more than a run with one line needs. */
const HEAP_MB = 24;

export async function limits(): Promise<void> {
  {
    await using bed = await testBed({
      domains: domains(LINES),
      settings: "keyTypes: ec",
      ca: { limits: likeLetsEncrypt(ORDERS) },
    });
    const begun = performance.now();
    const from = bed.ca.now.getTime();
    const runs = await runUntilDone(bed, PARALLEL);
    const took = (performance.now() - begun) / 1000;
    const hours = (bed.ca.now.getTime() - from) / 3600_000;
    const least = Math.ceil(LINES / ORDERS);
    tell(
      `${LINES} lines`,
      `${runs.length} runs`,
      `in ${hours.toFixed(1)} h of the CA's time, ${seconds(took)} here`,
      {
        found: runs.length,
        atMost: least,
      },
    );
    tell("orders", `${bed.ca.orders.length}`, "", { found: bed.ca.orders.length, atMost: LINES });
    const most = Math.max(...runs.map(refused));
    tell("orders refused a run", `${most}`, `with ${PARALLEL} lines at once`, {
      found: most,
      atMost: PARALLEL,
    });
    const wait = Math.max(...bed.waits) / 1000;
    tell("longest wait within a run", seconds(wait), "", { found: wait, atMost: 30 });
  }

  // With room for as much garbage as it likes, the heap tells nothing of what is kept; so both fill a small one.
  const few = await issueAtOnce(LINES / 8, HEAP_MB), many = await issueAtOnce(LINES / 2, HEAP_MB);
  tell(
    `${LINES / 8} lines in one run`,
    megabytes(few.peakMegabytes),
    `as a program, V8 held to ${HEAP_MB} MB`,
  );
  const kilobytes = (many.peakMegabytes - few.peakMegabytes) * 1024 / (LINES / 2 - LINES / 8);
  tell(
    `${LINES / 2} lines in one run`,
    megabytes(many.peakMegabytes),
    `${kilobytes.toFixed(1)} KB for each line more`,
    {
      found: kilobytes,
      atMost: 20,
    },
  );
}

/** What the program takes for the first issuance of so many lines in so large a heap. */
async function issueAtOnce(lines: number, heapMegabytes: number): Promise<Cost> {
  await using bed = await testBed({ domains: domains(lines), settings: "keyTypes: ec" });
  const heap = `--v8-flags=--max-old-space-size=${heapMegabytes}`;
  return await measure([...program("lematt.ts", heap), "--test", "--cron", bed.conf]);
}

function domains(lines: number): string {
  return Array.from({ length: lines }, (_, i) => `n${i}.example.com\n`).join("");
}
