/**
 * When the CA would like certificates to be renewed (RFC 9773): asks it as often as it likes to be asked, draws a
 * moment in each window, and remembers both.
 *
 * What follows from a moment is for plan.ts to say.
 */

import { type AcmeClient, AcmeError } from "./acme.ts";
import type { Suggestion } from "./plan.ts";
import type { Entry, Renewal, State } from "./store.ts";

/** RFC 9773 §4.3.2: Retry-After is heeded within these bounds, and is six hours where the CA says nothing. */
const SOONEST_MS = 60_000;
const LATEST_MS = 86_400_000;
const USUAL_MS = 6 * 3_600_000;
/** A certificate that the CA's suggestion led to heeds no other for a day, whatever the CA says. */
const REST_MS = 86_400_000;
/** How long until the next run, where the last one does not tell: a nightly cron. */
const USUAL_INTERVAL_MS = 86_400_000;
const SHORTEST_INTERVAL_MS = 3_600_000;

/** A certificate of the inventory with its identifier. */
export interface Identified {
  readonly entry: Entry;
  readonly id: string;
}

/** The certificates that a CA can be asked about: those that are in use and name their authority's key. */
export function identified(inventory: readonly Entry[], now: Date): Identified[] {
  return inventory.flatMap((entry) => {
    const { finding } = entry;
    if (finding.kind !== "present" || finding.certificate.notAfter <= now) return [];
    const { id } = finding.certificate;
    return id === undefined ? [] : [{ entry, id }];
  });
}

/** Of these, the ones about which the CA may be asked again. */
export function toAsk(certificates: readonly Identified[], state: State, now: Date): Identified[] {
  return certificates.filter(({ id }) => !(new Date(state.renewals[id]?.askAt ?? 0) > now));
}

/** Asks about one certificate and remembers the answer. Throws AcmeError; even then the CA is left alone for a while. */
export async function ask(
  id: string,
  client: AcmeClient,
  state: State,
  now: Date,
  random: number,
): Promise<void> {
  const renewal: Renewal = state.renewals[id] ??= {};
  renewal.askAt = new Date(now.getTime() + USUAL_MS).toISOString();
  const { start, end, explanationUrl, retryAfter } = await client.renewalInfo(id).catch((error) => {
    if (error instanceof AcmeError) delete renewal.window;
    throw error;
  });
  const wait = retryAfter === undefined ? USUAL_MS : retryAfter.getTime() - now.getTime();
  renewal.askAt = new Date(now.getTime() + Math.min(Math.max(wait, SOONEST_MS), LATEST_MS)).toISOString();
  const window = { start: start.toISOString(), end: end.toISOString() };
  // drawn once for a window, or certificates would gather at its end
  const drawn = renewal.window?.start === window.start && renewal.window.end === window.end
    ? renewal.window.at
    : new Date(start.getTime() + random * (end.getTime() - start.getTime())).toISOString();
  renewal.window = { ...window, at: drawn, explanationUrl };
}

/** The moments that are remembered for these certificates, by identifier. */
export function suggestions(
  certificates: readonly Identified[],
  state: State,
  now: Date,
): ReadonlyMap<string, Suggestion> {
  const moments = new Map<string, Suggestion>();
  for (const { id } of certificates) {
    const { window, suggestedAt } = state.renewals[id] ?? {};
    const rests = suggestedAt !== undefined && now.getTime() - Date.parse(suggestedAt) < REST_MS;
    if (window === undefined || rests) continue;
    moments.set(id, { at: new Date(window.at), explanationUrl: window.explanationUrl });
  }
  return moments;
}

/** When the next run is to be expected: after as long as it took from the last one to this. */
export function nextRun(state: State, now: Date): Date {
  const interval = state.lastRun === undefined
    ? USUAL_INTERVAL_MS
    : now.getTime() - Date.parse(state.lastRun);
  return new Date(now.getTime() + Math.min(Math.max(interval, SHORTEST_INTERVAL_MS), USUAL_INTERVAL_MS));
}
