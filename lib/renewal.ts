/**
 * Which certificates to issue, and when: due, waiting or kept. And what all decisions are based on.
 *
 * Pure, like endpoints.ts and plan.ts, which decide the rest: it reads nothing and makes no sentences.
 */

import type { Config, Line } from "./config.ts";
import type { Failure, RunRecord, State } from "./state.ts";
import type { Entry, Finding } from "./store.ts";
import { SHORT_LIFE_MS } from "./x509.ts";

/** What a decision is based on. */
export interface Basis {
  readonly config: Config;
  readonly certificates: ByLine;
  readonly state: State;
  readonly now: Date;
  readonly options: PlanOptions;
}

/** The certificates of each line, as they are on disk. */
export type ByLine = ReadonlyMap<Line, readonly Entry[]>;

export function byLine(inventory: readonly Entry[]): Map<Line, readonly Entry[]> {
  return Map.groupBy(inventory, ({ line }) => line);
}

export function inventoryOf({ certificates }: Basis): Entry[] {
  return [...certificates.values()].flat();
}

/** What decisions are based on besides configuration, files, state and clock. */
export interface PlanOptions {
  /** Ignores back-offs. */
  readonly retry?: boolean;
  readonly selection?: Selection;
  /** Files of certificates issued in this run. */
  readonly issued?: ReadonlySet<string>;
  /** `section/file` of certificates that `--deliver` named and this run has delivered. */
  readonly delivered?: Set<string>;
  /** Why nothing can be written to disk. */
  readonly writeError?: () => Error | undefined;
  /** By how much this clock is ahead of the CA's, in milliseconds; 0 until the CA has answered. */
  readonly aheadMs?: () => number;
  /** The certificates of the other mode. */
  readonly counterpart?: () => readonly Entry[];
  /** When a rehearsal last delivered something: it may be served in place of production's certificate. */
  readonly rehearsedAt?: () => Date | undefined;
}

/** To what `--renew`, `--only`, `--deliver` and `--accept` restrict a run, and what they force. */
export interface Selection {
  /** Lines that are issued if due, and delivered in all their sections. */
  readonly lines: ReadonlySet<Line>;
  /** Sections in which all lines are delivered. */
  readonly sections: ReadonlySet<string>;
  /** Lines that are issued whatever their dates. */
  readonly renew: ReadonlySet<Line>;
  readonly newKey: boolean;
  /** Lines and sections that are delivered whatever their receipts. */
  readonly deliver: ReadonlySet<Line | string>;
}

/** One line of `domains` of which at least one certificate is due. */
export interface Task {
  readonly line: Line;
  readonly due: readonly Due[];
  /** How it failed the last time. */
  readonly failure?: Failure;
}

export interface Waiting extends Task {
  readonly until: Date;
  /** The CA accepts no orders now; otherwise the line is in back-off. */
  readonly limited: boolean;
}

/** A certificate that is due now. */
export interface Due {
  readonly entry: Entry;
  readonly reason: Reason;
  /** Since when, by its dates. Absent for a window of the CA, which may begin long before it is known. */
  readonly since?: Date;
}

/** Why a certificate is due. */
export type Reason =
  | { readonly kind: "found"; readonly finding: Exclude<Finding, { kind: "present" }> }
  | { readonly kind: "asked for" }
  | { readonly kind: "expired"; readonly at: Date }
  | { readonly kind: "renewal"; readonly at: Date; readonly rule: Rule; readonly explanationUrl?: string };

/** What set the date of a renewal. */
export type Rule =
  /** generateNewCertsAfterDays */
  | "age"
  /** reauthorizeDays */
  | "expiry"
  /** reauthorizeDays, limited to two thirds of the lifetime left (half, below ten days) */
  | "expiry, capped"
  /** nothing is configured: a third of the lifetime left (half, below ten days) */
  | "life"
  /** early enough for two more runs */
  | "runs"
  /** the CA suggested it (RFC 9773) */
  | "ari";

/** A certificate that is not due. */
export interface Kept {
  readonly entry: Entry;
  readonly renewAt: Date;
  readonly rule: Rule;
  readonly notAfter: Date;
}

export const HOUR_MS = 3_600_000;
export const DAY_MS = 24 * HOUR_MS;
/** Nothing waits longer, so that a nightly run is never skipped: two runs may be a little less than a day apart. */
export const LONGEST_PAUSE_MS = 20 * HOUR_MS;
/** As many runs are remembered as the usual interval is found from. */
export const RUNS = 12;

/**
 * How long it usually takes from one full run to the next: the second longest interval between the last twelve, so
 * that neither one outage nor a few runs in one night count; a day if it is not known.
 */
export function usualInterval(runs: readonly RunRecord[]): number {
  const times = runs.map(({ at }) => Date.parse(at)).sort((a, b) => a - b).slice(-RUNS);
  const intervals = times.slice(1).map((time, index) => time - times[index]!).sort((a, b) => b - a);
  return intervals[1] ?? DAY_MS;
}

/** Lines to issue now and lines that wait, soonest to expire first, those without a certificate last; the rest is kept. */
export function planIssuing(
  { config, certificates, state, now, options: { retry = false, selection, issued } }: Basis,
  intervalMs: number,
): { tasks: Task[]; waiting: Waiting[]; kept: Kept[] } {
  const tasks: Task[] = [];
  const waiting: Waiting[] = [];
  const kept: Kept[] = [];
  const hold = retry ? undefined : moment(state.holds[config.directoryUrl]);
  for (const [line, entries] of certificates) {
    if (selection !== undefined && !selection.lines.has(line)) continue;
    const isAskedFor = selection?.renew.has(line) ?? false;
    const due: Due[] = [];
    for (const entry of entries) {
      const verdict = isAskedFor && !issued?.has(entry.file)
        ? { entry, reason: { kind: "asked for" } as const }
        : judge(entry, config, state, now, intervalMs);
      if ("renewAt" in verdict) kept.push(verdict);
      else due.push(verdict);
    }
    if (due.length === 0) continue;
    const failure = state.failures[due[0]!.entry.stem];
    const backOff = retry || isAskedFor ? undefined : moment(failure?.retryAt);
    const task = { line, due, failure };
    if (hold !== undefined && hold > now) waiting.push({ ...task, until: hold, limited: true });
    else if (backOff !== undefined && backOff > now) {
      waiting.push({ ...task, until: backOff, limited: false });
    } else tasks.push(task);
  }
  return { tasks: soonestFirst(tasks), waiting: soonestFirst(waiting), kept };
}

function soonestFirst<T extends Task>(tasks: readonly T[]): T[] {
  return tasks.map((task) => ({ task, expiry: expiryOf(task.due)?.getTime() ?? Infinity }))
    .sort((a, b) => a.expiry === b.expiry ? a.task.line.line - b.task.line.line : a.expiry - b.expiry)
    .map(({ task }) => task);
}

function judge(entry: Entry, config: Config, state: State, now: Date, intervalMs: number): Due | Kept {
  const { finding, former } = entry;
  if (finding.kind !== "present") {
    const before = finding.kind === "missing" ? former?.certificate : undefined;
    const changed = before && { kind: "other names" as const, certificate: before };
    return { entry, reason: { kind: "found", finding: changed ?? finding } };
  }
  const { notBefore, notAfter, id } = finding.certificate;
  if (notAfter <= now) return { entry, reason: { kind: "expired", at: notAfter }, since: notAfter };
  const { renewAt, rule } = renewal(config, entry.issuedAt ?? notBefore, notAfter, intervalMs);
  const suggestion = id === undefined || !config.ari ? undefined : suggested(state, id, now);
  // the CA can only make it earlier
  if (suggestion !== undefined && suggestion.at < renewAt && renewAt > now) {
    const { at, explanationUrl } = suggestion;
    // RFC 9773 §4.2: now, if the moment comes before the next run
    if (at.getTime() > now.getTime() + intervalMs) return { entry, renewAt: at, rule: "ari", notAfter };
    return { entry, reason: { kind: "renewal", at, rule: "ari", explanationUrl } };
  }
  if (renewAt <= now) return { entry, reason: { kind: "renewal", at: renewAt, rule }, since: renewAt };
  return { entry, renewAt, rule, notAfter };
}

/** The moment drawn from the CA's renewal window, unless a window led to this very certificate in the last day. */
function suggested(state: State, id: string, now: Date): { at: Date; explanationUrl?: string } | undefined {
  const { window, suggestedAt } = state.renewals[id] ?? {};
  const isRecent = suggestedAt !== undefined && now.getTime() - Date.parse(suggestedAt) < DAY_MS;
  return window === undefined || isRecent
    ? undefined
    : { at: new Date(window.at), explanationUrl: window.explanationUrl };
}

/**
 * When a certificate is renewed, and by which rule: as configured, or with a third of its life left (half, below
 * ten days); but three intervals before its end, so that two more runs follow the first one that may renew it: the
 * rule "runs", which never leads to a date in the first third of its life.
 */
export function renewal(
  config: Pick<Config, "reauthorizeDays" | "generateNewCertsAfterDays">,
  notBefore: Date,
  notAfter: Date,
  intervalMs: number,
): { renewAt: Date; rule: Rule } {
  const [start, end] = [notBefore.getTime(), notAfter.getTime()];
  const life = end - start;
  const latest = Math.max(end - 3 * intervalMs, start + life / 3);
  const short = life < SHORT_LIFE_MS;
  const { reauthorizeDays, generateNewCertsAfterDays: age } = config;
  let wanted: { at: number; rule: Rule };
  if (age > 0 && start + age * DAY_MS < end) {
    wanted = { at: start + age * DAY_MS, rule: "age" };
  } else if (reauthorizeDays !== undefined) {
    const earliest = end - life * (short ? 1 / 2 : 2 / 3);
    const at = end - reauthorizeDays * DAY_MS;
    wanted = at < earliest ? { at: earliest, rule: "expiry, capped" } : { at, rule: "expiry" };
  } else {
    wanted = { at: end - life * (short ? 1 / 2 : 1 / 3), rule: "life" };
  }
  const { at, rule } = latest < wanted.at ? { at: latest, rule: "runs" as const } : wanted;
  return { renewAt: new Date(at), rule };
}

/**
 * When a line that the CA refused for the n-th time in a row may be tried again: after 1, 10, 100, 1000 minutes,
 * then 20 hours, but after at most an eighth of what is left of its certificate, and an hour if that has expired.
 * https://letsencrypt.org/docs/integration-guide/#retrying-failures
 */
export function retryLineAt(count: number, now: Date, notAfter?: Date): Date {
  return backOff(60_000 * 10 ** (count - 1), now, notAfter);
}

/** The same for a delivery, which the next run tries again once, then after 1, 2, 4, … hours. */
export function retryDeliveryAt(count: number, now: Date, notAfter?: Date): Date | undefined {
  return count < 2 ? undefined : backOff(HOUR_MS * 2 ** (count - 2), now, notAfter);
}

function backOff(ms: number, now: Date, notAfter?: Date): Date {
  const left = notAfter === undefined ? Infinity : notAfter.getTime() - now.getTime();
  return new Date(now.getTime() + Math.min(ms, LONGEST_PAUSE_MS, left > 0 ? left / 8 : HOUR_MS));
}

/** The certificate of an entry, whatever is wrong with it; else the one for the names that the line had before. */
export function certificateOf({ finding, former }: Entry) {
  return "certificate" in finding ? finding.certificate : former?.certificate;
}

/** When the first of these certificates expires; undefined if there is no certificate. */
export function expiryOf(due: readonly { readonly entry: Entry }[]): Date | undefined {
  return earliest(due.map(({ entry }) => certificateOf(entry)?.notAfter));
}

export function earliest(dates: readonly (Date | undefined)[]): Date | undefined {
  return dates.reduce((a, b) => a === undefined || (b !== undefined && b < a) ? b : a, undefined);
}

/** A remembered moment. `parseState` has dropped those that only a wrong clock can have set. */
export function moment(text: string | undefined): Date | undefined {
  return text === undefined ? undefined : new Date(text);
}
