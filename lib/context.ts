/**
 * What lematt needs of the outside, as one value that is handed down whole: clock, randomness, network, DNS, and the
 * signal that ends the run. Tests hand in parts of their own. And the one function that limits how much happens at once.
 */

import { setTimeout as delay } from "node:timers/promises";
import { isIP } from "./names.ts";

/** The outside. */
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
  /** Ends the run in good order: every wait, request and command heeds it. */
  readonly signal: AbortSignal;
  /** Takes what is odd but stops nothing: a sentence for the user. */
  readonly warn: (text: string) => void;
  /** With --verbose: takes what commands print, and whose they are, `[mail]` or `prepare`. */
  readonly onOutput?: (text: string, whose: string) => void;
}

/** One address of a host with the port to dial there. */
export interface Destination {
  readonly address: string;
  readonly port: number;
}

/** Where `port` of a host is reached. Throws where the host has no address. */
export type Route = (host: string, port: number) => Promise<readonly Destination[]>;

/**
 * Records of one type at a name: the parts of a TXT joined, of an SOA the primary. Empty where there are none, and where a
 * server answers with an error (Deno makes no difference). Throws where nobody answers, or the signal's reason.
 */
export type Query = (
  name: string,
  type: "A" | "AAAA" | "CNAME" | "NS" | "SOA" | "TXT",
  server?: Destination,
  signal?: AbortSignal,
) => Promise<string[]>;

/** The outside as it is; `fetch`, `userAgent`, `signal` and `warn` are the program's. */
export function systemContext(
  own: Pick<Context, "fetch" | "userAgent" | "signal" | "warn"> & Partial<Context>,
): Context {
  const sleep = async (ms: number) => {
    await delay(ms, undefined, { signal: own.signal }).catch(() => own.signal.throwIfAborted());
  };
  return {
    // one clock for the whole run: no wait gets longer or shorter because the host's is set meanwhile
    now: () => new Date(performance.timeOrigin + performance.now()),
    random: Math.random,
    sleep,
    route: systemRoute,
    query: systemQuery,
    ...own,
  };
}

/** Every address of a host as this system sees them (/etc/hosts included), under the port itself. */
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
    // Deno gives up where resolv.conf has an option that it does not know, such as no-aaaa of glibc 2.36
    if (server === undefined && (error as Error).message.includes("resolv.conf")) {
      const text = await Deno.readTextFile("/etc/resolv.conf");
      const [, address] = /^nameserver\s+([\da-f.:]+)/im.exec(text) ?? [];
      if (address !== undefined) return await systemQuery(name, type, { address, port: 53 }, signal);
    }
    throw error;
  }
};

/** What connect() says for lack of a route; a router may say some of it of a host that is down, so it is asked twice. */
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
 * Whether it was for lack of a route from this host that nobody could connect to an address: as to all IPv6 addresses
 * where there is no IPv6, where it is disabled, or where its routes are unreachable or prohibited.
 */
export async function isUnrouted(address: string, error: unknown): Promise<boolean> {
  if (!NO_ROUTE.includes((error as { code?: string }).code ?? "")) return false;
  const { createSocket } = await import("node:dgram");
  const socket = createSocket(isIP(address) === 6 ? "udp6" : "udp4");
  try {
    return await new Promise((resolve) => {
      socket.on("error", () => resolve(true));
      // nobody but the kernel has a say in whether a datagram leaves; port 9 is discard (RFC 863)
      socket.send(new Uint8Array(0), 9, address, (error) => resolve(error !== null));
    });
  } finally {
    socket.close();
  }
}

/** What a promise comes to, unless the signal aborts before: its reason then. What cannot be aborted goes on unheard. */
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

/** All of the values, or the first error once every promise has come to its end, so that nothing goes on behind it. */
export async function settled<T>(promises: readonly Promise<T>[]): Promise<T[]> {
  const results = await Promise.allSettled(promises);
  return results.map((result) => {
    if (result.status === "rejected") throw result.reason;
    return result.value;
  });
}

/** Has at most `most` tasks run at once; the others wait for their turn, in order. */
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
