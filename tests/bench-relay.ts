/**
 * A relay to a port on loopback that adds the latency of a distant network. It runs in its own worker, so that the measured
 * program does not delay it.
 *
 * Each piece of data arrives `oneWayMs` after it was sent. The first data of a connection also waits for a round trip, for the TCP
 * handshake. Bandwidth and packet loss are not simulated.
 */

import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";

/** A running relay. */
export interface Relay extends AsyncDisposable {
  readonly port: number;
  /** The number of connections so far. */
  readonly connections: number;
}

/** Starts a relay on a free port of 127.0.0.1 to another port of it. */
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

/** Posts its port, then a message for each connection. */
async function serve(to: number, oneWayMs: number): Promise<void> {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  parentPort!.postMessage(listener.addr.port);
  for await (const near of listener) {
    parentPort!.postMessage("connection");
    relay(near, to, oneWayMs).catch(() => {}); // closed by one end; the other end notices
  }
}

async function relay(near: Deno.TcpConn, to: number, oneWayMs: number): Promise<void> {
  const connected = performance.now() + 2 * oneWayMs;
  const far = await Deno.connect({ hostname: "127.0.0.1", port: to });
  near.setNoDelay();
  far.setNoDelay();
  await Promise.all([delayed(near, far, connected, oneWayMs), delayed(far, near, connected, oneWayMs)]);
}

/** Copies each piece after its delay, and continues to read meanwhile. */
async function delayed(
  from: Deno.TcpConn,
  to: Deno.TcpConn,
  connected: number,
  oneWayMs: number,
): Promise<void> {
  const writer = to.writable.getWriter();
  let written: Promise<void> = Promise.resolve();
  for await (const piece of from.readable) {
    const due = Math.max(performance.now(), connected) + oneWayMs;
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
