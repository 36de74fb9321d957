/**
 * What to issue and why, what to keep and until when.
 *
 * Pure: the configuration, what was found on disk, what earlier runs left and the clock go in, a plan comes out. It reads nothing, asks nobody
 * and makes no sentences.
 */

import type { Config, Line } from "./config.ts";
import type { Entry, Failure, Finding } from "./store.ts";

/** Why a certificate is due now. */
export type Reason =
  | { readonly kind: "found"; readonly finding: Exclude<Finding, { kind: "present" }> }
  | { readonly kind: "revoked"; readonly at: Date }
  | { readonly kind: "expired"; readonly at: Date }
  | { readonly kind: "renewal"; readonly since: Date; readonly rule: Rule; readonly explanationUrl?: string };

/** What set the date of a renewal. */
export type Rule =
  /** generateNewCertsAfterDays */
  | "age"
  /** reauthorizeDays */
  | "expiry"
  /** reauthorizeDays would renew with more than two thirds of the life left, and was held back to that */
  | "expiry, capped"
  /** the CA suggested it (RFC 9773) */
  | "ari"
  /** generateNewCertsAfterDays is longer than the certificate lives, so reauthorizeDays is heeded */
  | "age beyond life";

/** One certificate that is due. */
export interface Due {
  readonly entry: Entry;
  readonly reason: Reason;
}

/** One certificate that is kept. */
export interface Kept {
  readonly entry: Entry;
  readonly renewAt: Date;
  readonly rule: Rule;
  readonly notAfter: Date;
}

/** One line of `domains` of which at least one certificate is due. */
export interface Task {
  readonly line: Line;
  readonly due: readonly Due[];
}

/** A task that has to wait: its line failed before, or the CA wants no orders now. */
export interface Waiting extends Task {
  readonly until: Date;
  readonly failure?: Failure;
}

/**
 * Everything of the inventory is in a task, waits or is kept. Tasks are sorted: soonest to expire first, new lines
 * last.
 */
export interface Plan {
  readonly tasks: readonly Task[];
  readonly waiting: readonly Waiting[];
  readonly kept: readonly Kept[];
}

/** What earlier runs left for this one to heed. */
export interface Memory {
  readonly failures: Readonly<Record<string, Failure>>;
  readonly revoked: Readonly<Record<string, string>>;
  /** Until when the CA wants no orders; epoch or earlier where it takes them. */
  readonly hold: Date;
  /** identifier of a certificate -> the moment drawn from the renewal window that the CA suggests */
  readonly suggested: ReadonlyMap<string, Suggestion>;
  /** When the next run is to be expected; a suggestion before that is due now (RFC 9773 §4.2). */
  readonly nextRun: Date;
}

/** A moment in the CA's renewal window. */
export interface Suggestion {
  readonly at: Date;
  readonly explanationUrl?: string;
}

const DAY_MS = 86_400_000;
/** While more of its life than this is left, reauthorizeDays does not renew a certificate. */
const MOST_LIFE_LEFT = 2 / 3;
/** The same of one that lives for less than ten days, which Let's Encrypt wants to be renewed at half its life. */
const MOST_SHORT_LIFE_LEFT = 1 / 2;
const SHORT_LIFE_DAYS = 10;
/** An age at which fewer days are left is too late to be tried more than once by a nightly run. */
const FEWEST_DAYS_LEFT = 3;
/** Where reauthorizeDays is not configured. */
const USUAL_DAYS_LEFT = 15;

/** Decides for every certificate of the inventory. */
export function plan(config: Config, inventory: readonly Entry[], now: Date, memory: Memory): Plan {
  const dues = new Map<Line, Due[]>();
  const kept: Kept[] = [];
  for (const entry of inventory) {
    const verdict = judge(config, entry, now, memory);
    if ("renewAt" in verdict) {
      kept.push(verdict);
      continue;
    }
    const due = dues.get(entry.line);
    if (due === undefined) dues.set(entry.line, [verdict]);
    else due.push(verdict);
  }
  const sorted = [...dues].map(([line, due]) => ({ line, due, expiry: soonestExpiry(due) }))
    .sort((a, b) => a.expiry - b.expiry || a.line.line - b.line.line);
  const tasks: Task[] = [];
  const waiting: Waiting[] = [];
  for (const { line, due } of sorted) {
    const failure = memory.failures[due[0]!.entry.stem];
    const until = new Date(Math.max(memory.hold.getTime(), Date.parse(failure?.retryAt ?? "1970-01-01")));
    if (until > now) waiting.push({ line, due, until, failure });
    else tasks.push({ line, due });
  }
  return { tasks, waiting, kept };
}

function judge(config: Config, entry: Entry, now: Date, { revoked, suggested, nextRun }: Memory): Due | Kept {
  const { finding } = entry;
  if (finding.kind !== "present") return { entry, reason: { kind: "found", finding } };
  const { notBefore, notAfter, id } = finding.certificate;
  const revokedAt = isEmpty(revoked) ? undefined : revoked[finding.certificate.fingerprint];
  if (revokedAt !== undefined) return { entry, reason: { kind: "revoked", at: new Date(revokedAt) } };
  if (notAfter <= now) return { entry, reason: { kind: "expired", at: notAfter } };
  const { renewAt, rule } = renewal(config, notBefore, notAfter);
  const suggestion = id === undefined ? undefined : suggested.get(id);
  if (suggestion !== undefined && suggestion.at < renewAt && renewAt > now) {
    const { at, explanationUrl } = suggestion;
    if (at > nextRun) return { entry, renewAt: at, rule: "ari", notAfter };
    return { entry, reason: { kind: "renewal", since: at, rule: "ari", explanationUrl } };
  }
  if (renewAt <= now) return { entry, reason: { kind: "renewal", since: renewAt, rule } };
  return { entry, renewAt, rule, notAfter };
}

/** Whether there is nothing to look up, which saves the fingerprints of all certificates on most days. */
function isEmpty(record: Readonly<Record<string, unknown>>): boolean {
  for (const _key in record) return false;
  return true;
}

/**
 * When a line that the CA refused for the n-th time in a row may be tried again: after 1, 10 and 100 minutes, then
 * daily. https://letsencrypt.org/docs/integration-guide/#retrying-failures
 */
export function retryAfterFailure(count: number, now: Date): Date {
  return new Date(now.getTime() + Math.min(60_000 * 10 ** (count - 1), DAY_MS));
}

/** When a certificate of this life is renewed, and by which setting. */
export function renewal(
  config: Pick<Config, "reauthorizeDays" | "generateNewCertsAfterDays">,
  notBefore: Date,
  notAfter: Date,
): { renewAt: Date; rule: Rule } {
  const [start, end] = [notBefore.getTime(), notAfter.getTime()];
  const byAge = start + config.generateNewCertsAfterDays * DAY_MS;
  const tooOld = end - FEWEST_DAYS_LEFT * DAY_MS;
  if (config.generateNewCertsAfterDays > 0 && byAge <= tooOld) {
    return { renewAt: new Date(byAge), rule: "age" };
  }
  const byExpiry = end - (config.reauthorizeDays ?? USUAL_DAYS_LEFT) * DAY_MS;
  const mostLeft = end - start < SHORT_LIFE_DAYS * DAY_MS ? MOST_SHORT_LIFE_LEFT : MOST_LIFE_LEFT;
  const earliest = end - (end - start) * mostLeft;
  const capped = byExpiry < earliest;
  const rule = config.generateNewCertsAfterDays > 0
    ? "age beyond life"
    : capped
    ? "expiry, capped"
    : "expiry";
  return { renewAt: new Date(capped ? earliest : byExpiry), rule };
}

/** Epoch milliseconds; a line without any certificate has nothing to lose and comes last. */
function soonestExpiry(due: readonly Due[]): number {
  const expiries = due.map(({ entry: { finding } }) =>
    "certificate" in finding ? finding.certificate.notAfter.getTime() : Infinity
  );
  return Math.min(...expiries);
}
