/**
 * What lematt needs of its environment, as one value that is passed down whole: clock, randomness, network, DNS,
 * and the signal that ends the run. Tests replace parts of it. And three functions to wait for promises.
 */

import { setTimeout as delay } from "node:timers/promises";
import { isIP } from "./names.ts";

export interface Context {
  /** For requests to the CA; trusts the roots of `caBundle`, too. */
  readonly fetch: (url: string, init: RequestInit) => Promise<Response>;
  readonly now: () => Date;
  /** Uniform in [0, 1). */
  readonly random: () => number;
  /** Resolves after `ms`; rejects with the reason of `signal`. */
  readonly sleep: (ms: number) => Promise<void>;
  readonly route: Route;
  readonly query: Query;
  readonly userAgent: string;
  /** Ends the run: every wait, request and command stops when it aborts. */
  readonly signal: AbortSignal;
  /** Prints a warning: a sentence for the user. */
  readonly warn: (text: string) => void;
  /** With --verbose: prints the output of a command; `whose` is `[mail]` or `prepare`. */
  readonly onOutput?: (text: string, whose: string) => void;
}

/** One address of a host, and the port to connect to. */
export interface Destination {
  readonly address: string;
  readonly port: number;
}

/** Where `port` of a host is reached. Throws if the host has no address. */
export type Route = (host: string, port: number) => Promise<readonly Destination[]>;

/**
 * Records of one type at a name: the parts of a TXT joined, of an SOA the primary. Empty if there are none or a
 * server answers with an error (Deno makes no difference). Throws without an answer, or the signal's reason.
 */
export type Query = (
  name: string,
  type: "A" | "AAAA" | "CNAME" | "NS" | "SOA" | "TXT",
  server?: Destination,
  signal?: AbortSignal,
) => Promise<string[]>;

/** The context of a real run; `fetch`, `userAgent`, `signal` and `warn` are the program's. */
export function systemContext(
  own: Pick<Context, "fetch" | "userAgent" | "signal" | "warn"> & Partial<Context>,
): Context {
  const sleep = async (ms: number) => {
    await delay(ms, undefined, { signal: own.signal }).catch(() => own.signal.throwIfAborted());
  };
  return {
    // monotonic: no wait gets longer or shorter because the host's clock is set
    now: () => new Date(performance.timeOrigin + performance.now()),
    random: Math.random,
    sleep,
    route: systemRoute,
    query: systemQuery,
    ...own,
  };
}

/** All addresses of a host as this system resolves it (/etc/hosts included), with the same port. */
export const systemRoute: Route = async (host, port) => {
  if (isIP(host)) return [{ address: host, port }];
  const { lookup } = await import("node:dns/promises");
  const found = await lookup(host, { all: true });
  return [...new Set(found.map(({ address }) => address))].map((address) => ({ address, port }));
};

/** Asks the system's resolver, or one server. */
export const systemQuery: Query = async (name, type, server, signal) => {
  const nameServer = server && { ipAddr: server.address, port: server.port };
  try {
    const options = { nameServer, signal };
    if (type === "SOA") return (await Deno.resolveDns(`${name}.`, type, options)).map(({ mname }) => mname);
    const records = await Deno.resolveDns(`${name}.`, type as "TXT", options);
    return records.map((record) => [record].flat().join(""));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return [];
    // Deno gives up if resolv.conf has an option that it does not know, such as no-aaaa of glibc 2.36
    if (server === undefined && (error as Error).message.includes("resolv.conf")) {
      const text = await Deno.readTextFile("/etc/resolv.conf");
      const [, address] = /^nameserver\s+([\da-f.:]+)/im.exec(text) ?? [];
      if (address !== undefined) return await systemQuery(name, type, { address, port: 53 }, signal);
    }
    throw error;
  }
};

/** Errors of connect() without a route; a router may report some of them for a host that is down. */
const NO_ROUTE = [
  "ENETUNREACH",
  "EHOSTUNREACH",
  "EADDRNOTAVAIL",
  "EAFNOSUPPORT",
  "EINVAL",
  "EACCES",
  "EPERM",
];

/**
 * Whether connecting failed because this host has no route to the address: no IPv6 at all, IPv6 that is disabled,
 * or routes that are unreachable or prohibited.
 */
export async function isUnrouted(address: string, error: unknown): Promise<boolean> {
  if (!NO_ROUTE.includes((error as { code?: string }).code ?? "")) return false;
  const { createSocket } = await import("node:dgram");
  const socket = createSocket(isIP(address) === 6 ? "udp6" : "udp4");
  try {
    return await new Promise((resolve) => {
      socket.on("error", () => resolve(true));
      // only the kernel decides whether a datagram leaves; port 9 is discard (RFC 863)
      socket.send(new Uint8Array(0), 9, address, (error) => resolve(error !== null));
    });
  } finally {
    socket.close();
  }
}

/** Resolves like `promise`, or rejects with the signal's reason when that aborts. The work itself may continue. */
export async function within<T>(signal: AbortSignal, promise: Promise<T>): Promise<T> {
  const { promise: aborted, reject } = Promise.withResolvers<never>();
  const abort = () => reject(signal.reason);
  signal.addEventListener("abort", abort);
  if (signal.aborted) abort();
  try {
    return await Promise.race([aborted, promise]);
  } finally {
    signal.removeEventListener("abort", abort);
  }
}

/** All values, or the first error; in both cases after every promise has settled. */
export async function settled<T>(promises: readonly Promise<T>[]): Promise<T[]> {
  const results = await Promise.allSettled(promises);
  return results.map((result) => {
    if (result.status === "rejected") throw result.reason;
    return result.value;
  });
}

/** Runs at most `most` tasks at once; the others wait, in order. */
export function limit(most: number): <T>(task: () => Promise<T>) => Promise<T> {
  let free = most;
  const waiting: (() => void)[] = [];
  return async (task) => {
    if (free > 0) free--;
    else await new Promise<void>((resolve) => waiting.push(resolve));
    try {
      return await task();
    } finally {
      const next = waiting.shift();
      if (next === undefined) free++;
      else next();
    }
  };
}
