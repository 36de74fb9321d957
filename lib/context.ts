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
}

/** One address of a host with the port to dial there. */
export interface Destination {
  readonly address: string;
  readonly port: number;
}

/** Where `port` of a host is reached. Throws where the host has no address. */
export type Route = (host: string, port: number) => Promise<readonly Destination[]>;

/** Records of one type at a name, the parts of a TXT joined; empty where there are none. Throws where nobody answers. */
export type Query = (
  name: string,
  type: "A" | "AAAA" | "CNAME" | "NS" | "SOA" | "TXT",
  server?: Destination,
) => Promise<string[]>;

/** The outside as it is; `fetch`, `userAgent`, `signal` and `warn` are the program's. */
export function systemContext(
  own: Pick<Context, "fetch" | "userAgent" | "signal" | "warn"> & Partial<Context>,
): Context {
  const sleep = async (ms: number) => {
    await delay(ms, undefined, { signal: own.signal }).catch(() => own.signal.throwIfAborted());
  };
  return {
    now: () => new Date(),
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
export const systemQuery: Query = async (name, type, server) => {
  const options = server && { nameServer: { ipAddr: server.address, port: server.port } };
  try {
    const records = await Deno.resolveDns(`${name}.`, type as "TXT", options);
    // a TXT record is a list of strings, an SOA an object of which only the presence counts
    return records.map((record: unknown) => [record].flat().join(""));
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return [];
    throw error;
  }
};

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
