/**
 * Where a host is reached: its addresses as this system sees them. What a look at the outside world starts from
 * (preflight.ts, verify.ts), so that tests can put the world on loopback.
 */

import { isIP } from "./names.ts";

/** One address of a host with the port to dial there. */
export interface Destination {
  readonly address: string;
  readonly port: number;
}

/** Where `port` of a host is reached. Throws where the host has no address. */
export type Route = (host: string, port: number) => Promise<readonly Destination[]>;

/**
 * The IPv4 and IPv6 addresses of a name as this system sees them (/etc/hosts included); an address is its
 * own.
 *
 * @throws where there are none, or the resolver fails
 */
export async function resolveAddresses(host: string): Promise<string[]> {
  if (isIP(host)) return [host];
  const { lookup } = await import("node:dns/promises");
  const found = await lookup(host, { all: true });
  return [...new Set(found.map(({ address }) => address))];
}

/** Every address of the host, under the port itself. */
export const systemRoute: Route = async (host, port) =>
  (await resolveAddresses(host)).map((address) => ({ address, port }));
