/** Goal: whatever happens to any one exchange with the CA, one undisturbed run later all is as it should be. */

import assert from "node:assert/strict";
import { refusing } from "./bed.ts";
import type { Fault } from "./ca.ts";
import { pairs, Subject, sweep, upTo } from "./faults.ts";

const after = (fault: Fault): Fault => ({ kind: "after", fault });
const status = (status: number, headers?: Record<string, string>): Fault => ({
  kind: "status",
  status,
  headers,
  contentType: "text/plain",
});

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
  "503, Retry-After in seconds": status(503, { "retry-after": "20" }),
  "503, Retry-After as a date": status(503, { "retry-after": new Date(Date.now() + 20_000).toUTCString() }),
  "503, absurd Retry-After": status(503, { "retry-after": "99999999999999" }),
  "429": refusing(429, "rateLimited", "slow down"),
  "429, Retry-After in seconds": refusing(429, "rateLimited", "slow down", {
    headers: { "retry-after": "20" },
  }),
  "429, Retry-After in hours": refusing(429, "rateLimited", "slow down", {
    headers: { "retry-after": "9999" },
  }),
  "badNonce": { kind: "badNonce" },
  "truncated": { kind: "truncate" },
  "HTML with 200": { kind: "html" },
  "sent elsewhere": status(307, { location: "https://localhost/" }),
  "no Replay-Nonce": { kind: "drop header", name: "replay-nonce" },
  "no Location": { kind: "drop header", name: "location" },
  "no Content-Type": { kind: "drop header", name: "content-type" },
  "the same answer twice": { kind: "repeat" },
};

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
  // who never got the answer asks again too soon, and who got that to another question is misled; no more is forgiven
  const blame = bed.ca.violations.splice(0).filter(({ type }) =>
    type !== "tooSoon" && fault.kind !== "repeat"
  );
  assert.deepEqual(blame, []);
  return ran.requests.length >= n;
}

Deno.test("any fault of any exchange of a first run is made good by the next run", async () => {
  await sweep("wire, first run", pairs(Object.keys(FAULTS), upTo(26)), 6, async ([kind, n]) => {
    await using subject = await Subject.create();
    const befell = await disturbed(subject, n, FAULTS[kind]!);
    await subject.recover();
    return befell;
  });
});

Deno.test("any fault of any exchange of a renewal is made good by the next run", async () => {
  await sweep("wire, renewal", pairs(Object.keys(FAULTS), upTo(24)), 4, async ([kind, n]) => {
    await using subject = await Subject.create();
    const { bed } = subject;
    await bed.run();
    bed.ca.advance(85 * 86_400_000); // which is past the CA's suggestion, too
    subject.countOrders();
    const befell = await disturbed(subject, n, FAULTS[kind]!);
    await subject.recover();
    return befell;
  });
});

Deno.test("a run that is interrupted at any exchange leaves nothing behind, and the next run goes on", async () => {
  await sweep("interrupted at an exchange", upTo(24), 2, async (n) => {
    await using subject = await Subject.create();
    const { bed } = subject;
    const stop = new AbortController();
    bed.ca.switches.fault = (exchange) => {
      if (exchange.n === n) stop.abort(new DOMException("interrupted", "AbortError"));
      return undefined;
    };
    const ran = await subject.attempt({ signal: stop.signal });
    await subject.afterFault(ran);
    assert.deepEqual(bed.dropped(), [], "challenge files");
    await subject.recover({ orders: 2 }); // both key types' were under way
    return stop.signal.aborted;
  });
});
