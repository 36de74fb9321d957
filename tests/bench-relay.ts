/**
 * Distance: a relay to a port on loopback over which everything takes as long as over a far network. A worker of its own,
 * so that what is measured does not hold it up.
 *
 * Each piece of data arrives `oneWayMs` after it was sent. A connection costs a round trip before its first data passes:
 * the handshake of TCP, which loopback gives for nothing. Nothing else of a network is imitated, neither its width nor
 * its losses.
 */

import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";

/** A running relay. */
export interface Relay extends AsyncDisposable {
  readonly port: number;
  /** How many connections it has taken so far. */
  readonly connections: number;
}

/** Starts a relay on a free port of 127.0.0.1 to another one there. */
export async function startRelay(to: number, oneWayMs: number): Promise<Relay> {
  const worker = new Worker(new URL(import.meta.url), { workerData: { to, oneWayMs } });
  let connections = 0;
  const port = await new Promise<number>((resolve, reject) => {
    worker.once("error", reject);
    worker.once("message", (port: number) => {
      resolve(port);
      worker.on("message", () => connections++);
    });
  });
  return {
    port,
    get connections() {
      return connections;
    },
    async [Symbol.asyncDispose]() {
      await worker.terminate();
    },
  };
}

/** Tells its port, then of each connection that it takes. */
async function serve(to: number, oneWayMs: number): Promise<void> {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  parentPort!.postMessage(listener.addr.port);
  for await (const near of listener) {
    parentPort!.postMessage("connection");
    carry(near, to, oneWayMs).catch(() => {}); // whichever end broke it, the other one notices
  }
}

async function carry(near: Deno.TcpConn, to: number, oneWayMs: number): Promise<void> {
  const shaken = performance.now() + 2 * oneWayMs;
  const far = await Deno.connect({ hostname: "127.0.0.1", port: to });
  near.setNoDelay();
  far.setNoDelay();
  await Promise.all([delayed(near, far, shaken, oneWayMs), delayed(far, near, shaken, oneWayMs)]);
}

/** Copies until the end, each piece after its time; reading goes on meanwhile. */
async function delayed(
  from: Deno.TcpConn,
  to: Deno.TcpConn,
  shaken: number,
  oneWayMs: number,
): Promise<void> {
  const writer = to.writable.getWriter();
  let written: Promise<void> = Promise.resolve();
  for await (const piece of from.readable) {
    const due = Math.max(performance.now(), shaken) + oneWayMs;
    written = written.then(() => until(due)).then(() => writer.write(piece));
    written.catch(() => {}); // awaited below
  }
  await written;
  await writer.close();
}

function until(due: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, Math.max(0, due - performance.now())));
}

if (!isMainThread && parentPort !== null) await serve(workerData.to, workerData.oneWayMs);
