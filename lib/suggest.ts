/**
 * When the CA would like certificates to be renewed (RFC 9773): asks it as often as it likes to be asked, draws a
 * moment in each window, and remembers both.
 *
 * What follows from a moment is for plan.ts to say.
 */

import type { AcmeClient } from "./acme.ts";
import type { Renewal, State } from "./state.ts";
import type { Entry } from "./store.ts";
import type { Certificate } from "./x509.ts";

/** RFC 9773 §4.3.2: Retry-After is heeded within these bounds, and is six hours where the CA says nothing. */
const SOONEST_MS = 60_000;
const LATEST_MS = 86_400_000;
const USUAL_MS = 6 * 3_600_000;

/** A certificate of the inventory with its identifier. */
export interface Identified {
  readonly entry: Entry;
  readonly certificate: Certificate;
  readonly id: string;
}

/** The certificates that a CA can be asked about: those that are in use and name their authority's key. */
export function identified(inventory: readonly Entry[], now: Date): Identified[] {
  return inventory.flatMap((entry) => {
    const certificate = certificateInUse(entry, now);
    return certificate?.id === undefined ? [] : [{ entry, certificate, id: certificate.id }];
  });
}

/** Those that no CA can be asked about, since they do not name their authority's key. */
export function unidentified(inventory: readonly Entry[], now: Date): Entry[] {
  return inventory.filter((entry) => {
    const certificate = certificateInUse(entry, now);
    return certificate !== undefined && certificate.id === undefined;
  });
}

function certificateInUse({ finding }: Entry, now: Date): Certificate | undefined {
  return finding.kind === "present" && finding.certificate.notAfter > now ? finding.certificate : undefined;
}

/** Of these, the ones about which the CA at `directoryUrl` may be asked again; another's it does not know. */
export function toAsk(
  certificates: readonly Identified[],
  state: State,
  directoryUrl: string,
  now: Date,
): Identified[] {
  return certificates.filter(({ id }) => {
    const { account, askAt } = state.renewals[id] ?? {};
    return (account ?? directoryUrl).split(" ")[0] === directoryUrl && !(new Date(askAt ?? 0) > now);
  });
}

/**
 * Asks about one certificate and remembers the answer. Throws AcmeError; even then the CA is left alone for a while, and
 * what it said before stays remembered.
 */
export async function ask(
  { id }: Identified,
  client: AcmeClient,
  state: State,
  now: Date,
  random: number,
): Promise<void> {
  const renewal: Renewal = state.renewals[id] ??= {};
  renewal.askAt = new Date(now.getTime() + USUAL_MS).toISOString();
  const { start, end, explanationUrl, retryAfter } = await client.renewalInfo(id);
  const wait = retryAfter === undefined ? USUAL_MS : retryAfter.getTime() - now.getTime();
  renewal.askAt = new Date(now.getTime() + Math.min(Math.max(wait, SOONEST_MS), LATEST_MS)).toISOString();
  const window = { start: start.toISOString(), end: end.toISOString() };
  // drawn once for a window, or certificates would gather at its end
  const drawn = renewal.window?.start === window.start && renewal.window.end === window.end
    ? renewal.window.at
    : new Date(start.getTime() + random * (end.getTime() - start.getTime())).toISOString();
  renewal.window = { ...window, at: drawn, explanationUrl };
}
