/**
 * What to issue and why, what to keep and until when.
 *
 * Pure: the configuration, what was found on disk and the clock go in, a plan comes out. It reads nothing, asks nobody
 * and makes no sentences.
 */

import type { Config, KeyType, Line } from "./config.ts";
import type { Entry, Finding } from "./store.ts";

/** Why a certificate is due now. */
export type Reason =
  | { readonly kind: "found"; readonly finding: Exclude<Finding, { kind: "present" }> }
  | { readonly kind: "expired"; readonly at: Date }
  | { readonly kind: "renewal"; readonly since: Date; readonly rule: Rule };

/** What set the date of a renewal. */
export type Rule =
  /** generateNewCertsAfterDays */
  | "age"
  /** reauthorizeDays */
  | "expiry"
  /** reauthorizeDays would renew with more than two thirds of the life left, and was held back to that */
  | "expiry, capped"
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

/** Everything of the inventory is either in a task or kept. Tasks are sorted: soonest to expire first, new lines last. */
export interface Plan {
  readonly tasks: readonly Task[];
  readonly kept: readonly Kept[];
}

const DAY_MS = 86_400_000;
/** Of its life, a certificate keeps at least this before reauthorizeDays may renew it. */
const MOST_LIFE_LEFT = 2 / 3;
/** An age at which fewer days are left is too late to be tried more than once by a nightly run. */
const FEWEST_DAYS_LEFT = 3;

/** Decides for every certificate of the inventory. */
export function plan(config: Config, inventory: readonly Entry[], now: Date): Plan {
  const tasks = new Map<Line, Due[]>();
  const kept: Kept[] = [];
  for (const entry of inventory) {
    const verdict = judge(config, entry, now);
    if ("renewAt" in verdict) {
      kept.push(verdict);
      continue;
    }
    const due = tasks.get(entry.line);
    if (due === undefined) tasks.set(entry.line, [verdict]);
    else due.push(verdict);
  }
  const sorted = [...tasks].map(([line, due]) => ({ line, due, expiry: soonestExpiry(due) }))
    .sort((a, b) => a.expiry - b.expiry || a.line.line - b.line.line);
  return { tasks: sorted.map(({ line, due }) => ({ line, due })), kept };
}

function judge(config: Config, entry: Entry, now: Date): Due | Kept {
  const { finding } = entry;
  if (finding.kind !== "present") return { entry, reason: { kind: "found", finding } };
  const { notBefore, notAfter } = finding.certificate;
  if (notAfter <= now) return { entry, reason: { kind: "expired", at: notAfter } };
  const { renewAt, rule } = renewal(config, notBefore, notAfter);
  if (renewAt <= now) return { entry, reason: { kind: "renewal", since: renewAt, rule } };
  return { entry, renewAt, rule, notAfter };
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
  const byExpiry = end - config.reauthorizeDays * DAY_MS;
  const earliest = end - (end - start) * MOST_LIFE_LEFT;
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

/** Key types of a task, in the order of `keyTypes`. */
export function keyTypesOf(task: Task): KeyType[] {
  return task.due.map(({ entry }) => entry.keyType);
}
