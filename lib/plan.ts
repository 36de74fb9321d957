/**
 * What a run has to do and why: the difference between what the configuration wants and what is there.
 *
 * Pure: configuration, files found, remembered state and the clock go in; certificates to issue, deliveries pending,
 * endpoints to probe and problems come out. Status, metrics, alerts, `--plan` and the exit status are views of this one
 * answer, so they cannot disagree. It reads nothing, asks nobody and makes no sentences.
 */

import type { Config, Endpoint, KeyType, Line, Section } from "./config.ts";
import { isIP } from "./names.ts";
import type { DeliveryFailure, Failure, ProbeRecord, Receipt, RunRecord, Sight, State } from "./state.ts";
import type { Entry, Finding } from "./store.ts";
import { sha256 } from "./x509.ts";

/** Everything that there is to do, and everything that is wrong. */
export interface Plan {
  /** Lines to issue now: soonest to expire first, lines without a certificate last. */
  readonly tasks: readonly Task[];
  /** Lines that have to wait: they failed before, or the CA accepts no orders now. */
  readonly waiting: readonly Waiting[];
  readonly kept: readonly Kept[];
  /** In the order of the sections, `[every]` last. */
  readonly deliveries: readonly Delivery[];
  readonly endpoints: readonly EndpointStatus[];
  readonly problems: readonly Problem[];
  readonly warnings: readonly Warning[];
  /** How long it usually takes from one run to the next, in milliseconds. */
  readonly intervalMs: number;
  readonly lastRun?: Date;
  /** The last full runs, oldest first. */
  readonly runs: readonly RunRecord[];
}

/** What a plan is made of besides configuration, files, state and clock. */
export interface PlanOptions {
  /** Ignores back-offs. */
  readonly retry?: boolean;
  readonly selection?: Selection;
  /** Files of certificates issued in this run. */
  readonly issued?: ReadonlySet<string>;
  /** Files of certificates, and names of sections with them, that `--deliver` has had delivered in this run. */
  readonly delivered?: Set<string>;
  /** Why nothing can be remembered or put in place. */
  readonly writeError?: () => Error | undefined;
  /** By how much this clock is ahead of the CA's, in milliseconds, as far as the CA has answered. */
  readonly aheadMs?: () => number;
  /** The certificates of the other mode. */
  readonly counterpart?: () => readonly Entry[];
  /** When a rehearsal last delivered something, which may be served where production's certificates belong. */
  readonly rehearsedAt?: () => Date | undefined;
}

/** To what `--renew`, `--only`, `--deliver` and `--accept` restrict a run, and what they force. */
export interface Selection {
  /** Lines that are issued where due, and delivered in all their sections. */
  readonly lines: ReadonlySet<Line>;
  /** Sections in which all lines are delivered. */
  readonly sections: ReadonlySet<string>;
  /** Lines that are issued whatever their dates. */
  readonly renew: ReadonlySet<Line>;
  readonly newKey: boolean;
  /** Lines and sections that are delivered whatever their receipts. */
  readonly deliver: ReadonlySet<Line | string>;
}

/** What a person should know. */
export type Warning =
  /** its life is too short for the interval between runs */
  | {
    readonly kind: "short life";
    readonly entry: Entry;
    readonly lifeMs: number;
    readonly intervalMs: number;
  }
  /** its key is not as configured, until the next renewal */
  | { readonly kind: "other key"; readonly entry: Entry }
  /** a section was given this, and nothing replaces it */
  | {
    readonly kind: "not renewed";
    readonly section: string;
    readonly file: string;
    readonly notAfter: Date;
  }
  /** what `--deliver` names has no command to run, or no certificate */
  | { readonly kind: "nothing to deliver"; readonly what: Line | string };

/** One line of `domains` of which at least one certificate is due. */
export interface Task {
  readonly line: Line;
  readonly due: readonly Due[];
  /** How it failed the last time. */
  readonly failure?: Failure;
}

export interface Waiting extends Task {
  readonly until: Date;
  /** The CA accepts no orders; else it waits since it failed. */
  readonly limited: boolean;
}

/** A certificate that is due now. */
export interface Due {
  readonly entry: Entry;
  readonly reason: Reason;
  /** Since when by its dates: a window of the CA may begin long before it is known. */
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
  /** reauthorizeDays, held back to two thirds of the life left (half, below ten days) */
  | "expiry, capped"
  /** nothing is configured: a third of the life left (half, below ten days) */
  | "life"
  /** early enough for two more runs */
  | "runs"
  /** the CA suggested it (RFC 9773) */
  | "ari";

/** A certificate that is kept. */
export interface Kept {
  readonly entry: Entry;
  readonly renewAt: Date;
  readonly rule: Rule;
  readonly notAfter: Date;
}

/** Certificates that a section has to be given. */
export interface Delivery {
  readonly section: Section;
  /** A line is delivered whole: with those pending come the other key types of their lines. */
  readonly entries: readonly Entry[];
  readonly pending: readonly { readonly entry: Entry; readonly reason: DeliveryReason }[];
  /** New certificates and drift go side by side; anything else is a rollout, one section at a time. */
  readonly urgent: boolean;
  /** What identifies this very delivery: another one starts without back-off. */
  readonly key: string;
  readonly failure?: DeliveryFailure;
  /** Not to be tried before. */
  readonly until?: Date;
  /** When the first of the certificates expires that were delivered before. */
  readonly formerNotAfter?: Date;
}

export type DeliveryReason =
  | "new certificate"
  | "drift"
  | "commands changed"
  | "first delivery"
  | "asked for";

/** A place to probe for one key type, and what is known of it. */
export interface EndpointStatus extends Target {
  /** What it is remembered by: `host:port/starttls#name keyType`. */
  readonly key: string;
  /** The sections that name it. */
  readonly sections: readonly Section[];
  /** The certificates of which one must be served. */
  readonly wanted: readonly Entry[];
  readonly record?: ProbeRecord;
  /** What each address served when it was last probed. */
  readonly sights: readonly (Sight & { readonly verdict: Verdict })[];
  /** Whether this run has to probe it. */
  readonly due: boolean;
}

/** An endpoint with its placeholders replaced, and the type of key that is asked for. */
export interface Target {
  readonly endpoint: Endpoint;
  readonly keyType: KeyType;
}

/** What a sight means. The first three are drift: certainly ours and certainly wrong. */
export type Verdict =
  /** an earlier certificate of the line, from the same CA */
  | "older"
  /** expired or self-signed, for the right names */
  | "invalid"
  /** lematt's own staging certificate */
  | "staging"
  | "current"
  /** a finished handshake, which is all that a rehearsal asks for */
  | "answers"
  /** valid for the name, but newer or from elsewhere */
  | "foreign"
  /** for other names */
  | "mismatched"
  /** the server has no certificate of this key type */
  | "refused"
  /** the server showed a certificate and did not finish the handshake */
  | "unfinished"
  | "unreachable"
  /** this host lacks the address family */
  | "passed over";

const DRIFT: readonly Verdict[] = ["older", "invalid", "staging"];
/** No TLS for those who ask for this type of key. */
const SILENT: readonly Verdict[] = ["refused", "unfinished", "unreachable"];

/** Something that is wrong. `key` stays the same for as long as it lasts. */
export type Problem = ProblemKind & {
  readonly key: string;
  /** Whether an alert goes out for it. */
  readonly alert: boolean;
  /** The sections that it concerns; `[every]` hears of everything. */
  readonly sections: readonly string[];
  /** The lines that it concerns. */
  readonly lines: readonly Line[];
};

export type ProblemKind =
  | { readonly kind: "CA"; readonly failure: Failure; readonly notAfter?: Date }
  | { readonly kind: "disk"; readonly error: Error; readonly notAfter?: Date }
  | { readonly kind: "clock"; readonly now: Date; readonly evidence: ClockEvidence; readonly notAfter?: Date }
  | { readonly kind: "failing"; readonly failure: Failure; readonly notAfter?: Date }
  | { readonly kind: "rate-limited"; readonly until: Date }
  | { readonly kind: "overdue"; readonly entry: Entry; readonly notAfter: Date }
  | {
    readonly kind: "delivery";
    readonly delivery: Delivery;
    readonly failure: DeliveryFailure;
    /** When the first certificate expires that its endpoints still serve, or that was delivered before. */
    readonly servedUntil?: Date;
  }
  | {
    readonly kind: "endpoint";
    readonly endpoint: EndpointStatus;
    readonly sight: Sight & { readonly verdict: Verdict };
    readonly since: Date;
  }
  | { readonly kind: "not run"; readonly since: Date };

/** What shows that this clock is wrong: the CA's clock, the start of a certificate, or a run in the future. */
export interface ClockEvidence {
  readonly of: "CA" | "certificate" | "run";
  readonly at: Date;
}

const HOUR_MS = 3_600_000;
const DAY_MS = 24 * HOUR_MS;
/** A clock that differs by less is nobody's fault: certificates are back-dated by an hour. */
const CLOCK_SKEW_MS = HOUR_MS;
/** Nothing waits longer, so that a nightly run is never skipped: two runs may be a little less than a day apart. */
export const LONGEST_PAUSE_MS = 20 * HOUR_MS;

// ---------------------------------------------------------------------------------------------- the whole

/** Decides everything. */
export function plan(
  config: Config,
  inventory: readonly Entry[],
  state: State,
  now: Date,
  options: PlanOptions = {},
): Plan {
  const runs = state.runs.filter(({ at }) => Date.parse(at) <= now.getTime());
  const intervalMs = usualInterval(runs);
  const lastRun = moment(runs.at(-1)?.at);
  const entries = groupBy(inventory.map((entry) => [entry.line, entry]));
  const issuing = planIssuing(config, inventory, state, now, intervalMs, options);
  const endpoints = planEndpoints(config, config.sections, entries, state, now, options);
  const deliveries = planDeliveries(config, entries, state, now, endpoints, options);
  const warnings = [
    ...inventory.flatMap((entry) => warningsOf(entry, config, intervalMs)),
    ...undeliverable(issuing.tasks, deliveries, options),
    ...unrenewed(inventory, state, now),
  ];
  const rest = { ...issuing, endpoints, deliveries, warnings, intervalMs, lastRun, runs };
  const clock = clockEvidence(inventory, state, now, options.aheadMs?.());
  return { ...rest, problems: findProblems(config, rest, now, options.writeError?.(), clock) };
}

/** Why this clock must be wrong: certificates would expire unseen. */
function clockEvidence(
  inventory: readonly Entry[],
  { runs }: State,
  now: Date,
  aheadMs = 0,
): ClockEvidence | undefined {
  const starts = inventory.map((entry) => inUse(entry)?.notBefore).filter((date) => date !== undefined);
  const evidence: ClockEvidence[] = [
    { of: "CA", at: new Date(now.getTime() - aheadMs) },
    ...starts.map((at) => ({ of: "certificate" as const, at })),
    ...runs.map(({ at }) => ({ of: "run" as const, at: new Date(at) })),
  ];
  return evidence.find(({ of, at }) => {
    const ahead = at.getTime() - now.getTime();
    return (of === "CA" ? Math.abs(ahead) : ahead) > CLOCK_SKEW_MS;
  });
}

/**
 * How long it usually takes from one full run to the next: the second longest interval between the last six, so that one
 * outage does not count; a day where it is not known.
 */
export function usualInterval(runs: readonly RunRecord[]): number {
  const times = runs.map(({ at }) => Date.parse(at)).sort((a, b) => a - b).slice(-6);
  const intervals = times.slice(1).map((time, index) => time - times[index]!).sort((a, b) => b - a);
  return intervals[1] ?? DAY_MS;
}

// ---------------------------------------------------------------------------------------------- issuing

function planIssuing(
  config: Config,
  inventory: readonly Entry[],
  state: State,
  now: Date,
  intervalMs: number,
  { retry = false, selection, issued }: PlanOptions,
): Pick<Plan, "tasks" | "waiting" | "kept"> {
  const dues = new Map<Line, Due[]>();
  const kept: Kept[] = [];
  for (const entry of inventory) {
    if (selection !== undefined && !selection.lines.has(entry.line)) continue;
    const asked = selection?.renew.has(entry.line) && !issued?.has(entry.file);
    const verdict = asked
      ? { entry, reason: { kind: "asked for" } as const }
      : judge(config, entry, state, now, intervalMs);
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
  const hold = moment(retry ? undefined : state.holds[config.directoryUrl]);
  const tasks: Task[] = [];
  const waiting: Waiting[] = [];
  for (const { line, due } of sorted) {
    const failure = state.failures[due[0]!.entry.stem];
    const ignored = retry || (selection?.renew.has(line) ?? false);
    const backOff = ignored ? undefined : moment(failure?.retryAt);
    if (hold !== undefined && hold > now) waiting.push({ line, due, failure, until: hold, limited: true });
    else if (backOff !== undefined && backOff > now) {
      waiting.push({ line, due, failure, until: backOff, limited: false });
    } else tasks.push({ line, due, failure });
  }
  return { tasks, waiting, kept };
}

function judge(config: Config, entry: Entry, state: State, now: Date, intervalMs: number): Due | Kept {
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
  if (suggestion !== undefined && suggestion.at < renewAt && renewAt > now) {
    const { at, explanationUrl } = suggestion;
    // RFC 9773 §4.2: now, if the moment comes before the next run
    if (at.getTime() > now.getTime() + intervalMs) return { entry, renewAt: at, rule: "ari", notAfter };
    return { entry, reason: { kind: "renewal", at, rule: "ari", explanationUrl } };
  }
  if (renewAt <= now) return { entry, reason: { kind: "renewal", at: renewAt, rule }, since: renewAt };
  return { entry, renewAt, rule, notAfter };
}

/** The moment that was drawn from the CA's renewal window, unless that led to this very certificate within a day. */
function suggested(state: State, id: string, now: Date): { at: Date; explanationUrl?: string } | undefined {
  const { window, suggestedAt } = state.renewals[id] ?? {};
  const rests = suggestedAt !== undefined && now.getTime() - Date.parse(suggestedAt) < DAY_MS;
  return window === undefined || rests
    ? undefined
    : { at: new Date(window.at), explanationUrl: window.explanationUrl };
}

/** Lives below this are renewed when half is left. https://letsencrypt.org/docs/integration-guide/#when-to-renew */
const SHORT_LIFE_MS = 10 * DAY_MS;

/**
 * When a certificate is renewed, and by which rule: as configured, or with a third of its life left (half, below ten
 * days); but early enough for two more runs, if that leaves it the first third of its life.
 */
export function renewal(
  config: Pick<Config, "reauthorizeDays" | "generateNewCertsAfterDays">,
  notBefore: Date,
  notAfter: Date,
  intervalMs: number,
): { renewAt: Date; rule: Rule } {
  const [start, end] = [notBefore.getTime(), notAfter.getTime()];
  const life = end - start;
  const runs = Math.max(end - 3 * intervalMs, start + life / 3);
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
  const late = runs < wanted.at;
  return { renewAt: new Date(late ? runs : wanted.at), rule: late ? "runs" : wanted.rule };
}

/** What `--deliver` names, and nothing can come of. */
function undeliverable(
  tasks: readonly Task[],
  deliveries: readonly Delivery[],
  { selection }: PlanOptions,
): Warning[] {
  const whats = [...selection?.deliver ?? []].filter((one) =>
    typeof one === "string"
      ? !deliveries.some(({ section }) => section.name === one) &&
        !tasks.some(({ line }) => line.sections.some(({ name }) => name === one))
      : !deliveries.some(({ entries }) => entries.some(({ line }) => line === one)) &&
        !tasks.some(({ line }) => line === one)
  );
  return whats.map((what) => ({ kind: "nothing to deliver", what }));
}

/** Certificates of a type, or under a tag, that a line no longer has: a service that was given one may go on serving it. */
function unrenewed(inventory: readonly Entry[], { receipts }: State, now: Date): Warning[] {
  const present = new Set(inventory.map(({ file }) => file));
  const stems = new Set(inventory.map(({ stem }) => stem));
  return Object.entries(receipts).flatMap(([section, files]) =>
    Object.entries(files).flatMap(([file, receipt]) => {
      const notAfter = moment(receipt.notAfter);
      const isLeft = !present.has(file) && stems.has(file.replace(/-cert-combined\..*$/, ""));
      return !isLeft || notAfter === undefined || notAfter <= now
        ? []
        : [{ kind: "not renewed" as const, section, file, notAfter }];
    })
  );
}

function warningsOf(entry: Entry, config: Config, intervalMs: number): Warning[] {
  const { finding, issuedAt, keyType } = entry;
  if (finding.kind !== "present") return [];
  const { notBefore, notAfter, keySpec } = finding.certificate;
  const lifeMs = notAfter.getTime() - (issuedAt ?? notBefore).getTime();
  const isAsConfigured = keyType === "rsa"
    ? keySpec?.type === "rsa" && keySpec.bits === config.keyBitsRSA
    : keySpec?.type === "ec" && keySpec.curve === config.curve;
  return [
    ...(fitsRuns(lifeMs, intervalMs) ? [] : [{ kind: "short life" as const, entry, lifeMs, intervalMs }]),
    ...(isAsConfigured ? [] : [{ kind: "other key" as const, entry }]),
  ];
}

/** Whether certificates of this life can be renewed by runs that are so far apart, and one of them may fail. */
function fitsRuns(lifeMs: number, intervalMs: number): boolean {
  return lifeMs >= 3 * intervalMs;
}

/**
 * When a line that the CA refused for the n-th time in a row may be tried again: after 1, 10, 100, 1000 minutes, then 20
 * hours, but after at most an eighth of what is left of its certificate, and an hour where that has expired.
 * https://letsencrypt.org/docs/integration-guide/#retrying-failures
 */
export function retryLineAt(count: number, now: Date, notAfter?: Date): Date {
  return backOff(60_000 * 10 ** (count - 1), now, notAfter);
}

/** The same of a delivery, which the next run tries again once, then after 1, 2, 4, … hours. */
export function retryDeliveryAt(count: number, now: Date, notAfter?: Date): Date | undefined {
  return count < 2 ? undefined : backOff(HOUR_MS * 2 ** (count - 2), now, notAfter);
}

function backOff(ms: number, now: Date, notAfter?: Date): Date {
  const left = notAfter === undefined ? Infinity : notAfter.getTime() - now.getTime();
  return new Date(now.getTime() + Math.min(ms, LONGEST_PAUSE_MS, left > 0 ? left / 8 : HOUR_MS));
}

/** Epoch milliseconds; a line without any certificate has nothing to lose and comes last. */
function soonestExpiry(due: readonly Due[]): number {
  return Math.min(...due.map(({ entry }) => lastsUntil(entry)?.getTime() ?? Infinity));
}

/** The end of the certificate that is in use for an entry, be it for the names that the line had before. */
export function lastsUntil(entry: Entry): Date | undefined {
  return lastOf(entry)?.notAfter;
}

/** The beginning of the same. */
export function validSince(entry: Entry): Date | undefined {
  return lastOf(entry)?.notBefore;
}

function lastOf({ finding, former }: Entry) {
  return "certificate" in finding ? finding.certificate : former?.certificate;
}

// ---------------------------------------------------------------------------------------------- deliveries

/** The lists that deliver a certificate; `uploadEach` runs in no rehearsal that does not ask for it. */
function listsOf({ uploadCerts, uploadKeys, uploadEach, update, rehearse }: Section, mode: Config["mode"]) {
  return [uploadCerts, uploadKeys, mode === "prod" || rehearse ? uploadEach : [], update];
}

/** Whether a section has anything to run for a certificate. */
export function delivers(section: Section, mode: Config["mode"]): boolean {
  return listsOf(section, mode).flat().some((command) => command.trim() !== "");
}

/** What a receipt says that has been run: the four lists as parsed. The same in every version of lematt. */
export function listsDigest(section: Section, mode: Config["mode"]): string {
  return sha256(JSON.stringify(listsOf(section, mode))).slice(0, 16);
}

/** The receipts of a section; where it is new, those of vanished sections with the same lists: it was renamed. */
function receiptsOf(section: Section, digest: string, config: Config, state: State) {
  const own = state.receipts[section.name];
  if (own !== undefined) return own;
  const names = new Set(config.sections.map(({ name }) => name));
  const inherited: State["receipts"][string] = Object.create(null);
  for (const [name, receipts] of Object.entries(state.receipts)) {
    if (names.has(name)) continue;
    for (const [file, receipt] of Object.entries(receipts)) {
      if (receipt.digest === digest) inherited[file] = receipt;
    }
  }
  return inherited;
}

/** Gives sections that were renamed the receipts that they had under their old name. */
export function adoptReceipts(config: Config, state: State): void {
  for (const section of config.sections) {
    if (state.receipts[section.name] !== undefined || !delivers(section, config.mode)) continue;
    const inherited = receiptsOf(section, listsDigest(section, config.mode), config, state);
    if (Object.keys(inherited).length > 0) state.receipts[section.name] = inherited;
  }
}

/**
 * Forgets what is remembered of lines, certificates, sections and endpoints that are no more, and failures of what is no
 * longer due or pending. Receipts stay for as long as their certificate is on disk: a line or section that is away for
 * one run is not delivered again. `orphans` lists the base names of certificates that belong to no line.
 */
export function forgetUnknown(
  config: Config,
  inventory: readonly Entry[],
  state: State,
  now: Date,
  orphans: () => ReadonlySet<string>,
  options: PlanOptions = {},
): void {
  const { tasks, waiting, deliveries, endpoints } = plan(config, inventory, state, now, options);
  const keep = (entries: Record<string, unknown>, isKnown: (key: string) => boolean) => {
    for (const key of Object.keys(entries)) if (!isKnown(key)) delete entries[key];
  };
  const ids = new Set(
    inventory.map(({ finding }) => finding.kind === "present" ? finding.certificate.id : undefined),
  );
  keep(state.renewals, (id) => ids.has(id));
  const due = new Set([...tasks, ...waiting].flatMap(({ due }) => due.map(({ entry }) => entry.stem)));
  keep(state.failures, (stem) => due.has(stem));
  const files = new Set(
    inventory.flatMap(({ file, former }) => former === undefined ? file : [file, former.file]),
  );
  keep(state.orders, (file) => files.has(file));
  for (const receipts of Object.values(state.receipts)) {
    keep(receipts, (file) => files.has(file) || orphans().has(file));
  }
  keep(state.receipts, (name) => Object.keys(state.receipts[name]!).length > 0);
  const failed = new Set(deliveries.filter(({ failure }) => failure).map(({ section }) => section.name));
  keep(state.deliveries, (name) => failed.has(name));
  const sections = new Map(config.sections.map((section) => [section.name, section]));
  keep(state.alerts, (name) => (sections.get(name)?.alert.length ?? 0) > 0);
  const keys = new Set(endpoints.map(({ key }) => key));
  keep(state.probes, (key) => keys.has(key));
}

/** How often the commands are repeated for drift at once; then once in 20 hours. */
const MOST_REPAIRS = 3;

function planDeliveries(
  config: Config,
  entries: ByLine,
  state: State,
  now: Date,
  endpoints: readonly EndpointStatus[],
  options: PlanOptions,
): Delivery[] {
  const drift = driftSeen(endpoints, config);
  const deliveries = config.sections.map((section) =>
    planDelivery(section, entries, config, state, now, drift.get(section), options)
  ).filter((delivery) => delivery !== undefined);
  const isEvery = ({ section }: Delivery) => Number(section.name === "every");
  return deliveries.sort((a, b) => isEvery(a) - isEvery(b));
}

/** What one section has to be given, and which of its endpoints are to be probed. */
export function planSection(
  section: Section,
  entries: ByLine,
  config: Config,
  state: State,
  now: Date,
  options: PlanOptions = {},
): { delivery?: Delivery; endpoints: readonly EndpointStatus[] } {
  const endpoints = planEndpoints(config, [section], entries, state, now, options);
  const drift = driftSeen(endpoints, config).get(section);
  return { endpoints, delivery: planDelivery(section, entries, config, state, now, drift, options) };
}

function planDelivery(
  section: Section,
  byLine: ByLine,
  config: Config,
  state: State,
  now: Date,
  drift: ReadonlyMap<Entry, number> = new Map(),
  { retry = false, selection, issued, delivered }: PlanOptions,
): Delivery | undefined {
  const entries = linesOf(config, section).flatMap((line) => byLine.get(line) ?? [])
    .filter(({ finding, keyType }) => finding.kind === "present" && section.keyTypes.includes(keyType));
  if (entries.length === 0 || !delivers(section, config.mode)) return undefined;
  const digest = listsDigest(section, config.mode);
  const receipts = receiptsOf(section, digest, config, state);
  const pending: { entry: Entry; reason: DeliveryReason; until?: Date }[] = [];
  let isWrong = false;
  for (const entry of entries) {
    const { line, file, finding } = entry;
    if (!inScope(selection, line, section) || finding.kind !== "present") continue;
    const receipt = receipts[file];
    const isDrift = (drift.get(entry) ?? -Infinity) > (receipt === undefined ? 0 : Date.parse(receipt.at));
    isWrong ||= isDrift;
    const asked = selection?.deliver.has(line) || selection?.deliver.has(section.name);
    if (asked && !delivered?.has(`${section.name}/${file}`)) pending.push({ entry, reason: "asked for" });
    else if (receipt === undefined) {
      pending.push({ entry, reason: issued?.has(file) ? "new certificate" : "first delivery" });
    } else if (receipt.fingerprint !== finding.certificate.fingerprint) {
      pending.push({ entry, reason: "new certificate" });
    } else if (receipt.digest !== digest) pending.push({ entry, reason: "commands changed" });
    else if (isDrift) {
      const rests = (receipt.repairs ?? 0) >= MOST_REPAIRS;
      const until = rests ? new Date(Date.parse(receipt.at) + LONGEST_PAUSE_MS) : undefined;
      pending.push({ entry, reason: "drift", until });
    }
  }
  if (pending.length === 0) return undefined;
  const lines = new Set(pending.map(({ entry }) => entry.line));
  const key = deliveryKey(section, digest, pending.map(({ entry }) => entry));
  const last = state.deliveries[section.name];
  const failure = last?.key === key ? last : undefined;
  const rollout: readonly DeliveryReason[] = ["first delivery", "commands changed"];
  const rests = pending.every(({ until }) => until !== undefined);
  const moments = [
    failure?.retryAt === undefined ? 0 : Date.parse(failure.retryAt),
    rests ? Math.min(...pending.map(({ until }) => until!.getTime())) : 0,
  ];
  const until = new Date(Math.max(...moments));
  const waits = !retry && until > now && !pending.some(({ reason }) => reason === "asked for");
  return {
    section,
    entries: entries.filter(({ line }) => lines.has(line)),
    pending,
    urgent: isWrong || failure?.urgent === true || pending.some(({ reason }) => !rollout.includes(reason)),
    key,
    failure,
    until: waits ? until : undefined,
    formerNotAfter: firstOf(pending.map(({ entry }) => moment(receipts[entry.file]?.notAfter))),
  };
}

function firstOf(dates: readonly (Date | undefined)[]): Date | undefined {
  return dates.reduce((a, b) => a === undefined || (b !== undefined && b < a) ? b : a, undefined);
}

/** Whether a run that is restricted delivers this line in this section. */
function inScope(selection: Selection | undefined, line: Line, section: Section): boolean {
  return selection === undefined || selection.lines.has(line) || selection.sections.has(section.name);
}

/** The certificates of each line, as they are on disk. */
export type ByLine = ReadonlyMap<Line, readonly Entry[]>;

interface Index {
  readonly byName: ReadonlyMap<string, readonly Line[]>;
  readonly bySection: ReadonlyMap<Section, readonly Line[]>;
}

/** A configuration never changes, and may have thousands of lines. */
const indexes = new WeakMap<Config["lines"], Index>();

function indexOf({ lines }: Config): Index {
  const known = indexes.get(lines);
  if (known !== undefined) return known;
  const index = {
    byName: groupBy(lines.flatMap((line) => line.names.map((name) => [name, line] as const))),
    bySection: groupBy(lines.flatMap((line) => line.sections.map((section) => [section, line] as const))),
  };
  indexes.set(lines, index);
  return index;
}

function linesOf(config: Config, section: Section): readonly Line[] {
  return indexOf(config).bySection.get(section) ?? [];
}

/** Map.groupBy() of pairs: key and member. */
export function groupBy<K, V>(pairs: Iterable<readonly [K, V]>): Map<K, V[]> {
  const groups = new Map<K, V[]>();
  for (const [key, value] of pairs) {
    const group = groups.get(key);
    if (group === undefined) groups.set(key, [value]);
    else group.push(value);
  }
  return groups;
}

/** What identifies a delivery: its lists, its endpoints and its certificates. */
function deliveryKey({ verify }: Section, digest: string, entries: readonly Entry[]): string {
  const fingerprints = entries.map(({ finding }) =>
    "certificate" in finding && finding.certificate.fingerprint
  );
  return sha256(JSON.stringify([digest, verify.map(({ text }) => text), fingerprints])).slice(0, 16);
}

/**
 * Endpoints that certainly serve what is ours and wrong, seen twice. A rehearsal repairs nothing: where it has put its
 * certificate in the place of production's, the next run with --prod does.
 */
export function drifted(endpoints: readonly EndpointStatus[], { mode }: Config): EndpointStatus[] {
  return endpoints.filter(({ record, sights }) =>
    mode === "prod" && record?.confirmed === true && sights.some(({ verdict }) => DRIFT.includes(verdict))
  );
}

/** Section -> certificate -> when an endpoint was last seen to serve something else that is certainly wrong. */
function driftSeen(endpoints: readonly EndpointStatus[], config: Config): Map<Section, Map<Entry, number>> {
  const seen = new Map<Section, Map<Entry, number>>();
  for (const { sections, wanted, record } of drifted(endpoints, config)) {
    for (const section of sections) {
      const entries = seen.get(section) ?? new Map<Entry, number>();
      seen.set(section, entries);
      for (const entry of wanted) {
        entries.set(entry, Math.max(entries.get(entry) ?? -Infinity, Date.parse(record!.at)));
      }
    }
  }
  return seen;
}

// ---------------------------------------------------------------------------------------------- endpoints

/** After so long a good probe has to be repeated. */
const GOOD_PROBE_MS = 6 * HOUR_MS;

function planEndpoints(
  config: Config,
  sections: readonly Section[],
  entries: ByLine,
  state: State,
  now: Date,
  { selection, counterpart, rehearsedAt }: PlanOptions,
): EndpointStatus[] {
  const { byName } = indexOf(config);
  const ownersOf = (name: string) => [name, wildcardOf(name)].flatMap((known) => byName.get(known) ?? []);
  const found = new Map<string, { target: Target; sections: Set<Section>; wanted: Set<Entry> }>();
  for (const section of sections.filter(({ verify }) => verify.length > 0)) {
    const own = linesOf(config, section).filter((line) => inScope(selection, line, section));
    for (const { endpoint, lines } of own.flatMap((line) => placesOf(section, line, ownersOf))) {
      for (const keyType of section.keyTypes) {
        const wanted = lines.flatMap((line) => entries.get(line) ?? [])
          .filter((entry) => entry.keyType === keyType && inUse(entry) !== undefined);
        if (wanted.length === 0) continue;
        const key = `${endpoint.text} ${keyType}`;
        const known = found.get(key) ??
          { target: { endpoint, keyType }, sections: new Set(), wanted: new Set() };
        found.set(key, known);
        known.sections.add(section);
        for (const entry of wanted) known.wanted.add(entry);
      }
    }
  }
  return [...found].map(([key, { target, ...sets }]) => {
    const [sections, wanted] = [[...sets.sections], [...sets.wanted]];
    const record = state.probes[key];
    const sights = (record?.sights ?? []).map((sight) => ({
      ...sight,
      verdict: verdictOn(sight, target, wanted, config, now, counterpart),
    }));
    const isGoodNow = sights.length > 0 && sights.every(({ verdict }) => isGood(verdict));
    const probedAt = new Date(record?.at ?? 0);
    const due = !isGoodNow || now.getTime() - probedAt.getTime() > GOOD_PROBE_MS ||
      (rehearsedAt?.() ?? 0) > probedAt;
    return { ...target, key, sections, wanted, record, sights, due };
  });
}

export function isGood(verdict: Verdict): boolean {
  return verdict === "current" || verdict === "answers" || verdict === "passed over";
}

/** The certificate that may be served for an entry. */
function inUse({ finding, former }: Entry) {
  return finding.kind === "present" ? finding.certificate : former?.certificate;
}

function covers(names: readonly string[], name: string): boolean {
  return names.includes(name) || names.includes(wildcardOf(name));
}

function wildcardOf(name: string): string {
  return name.replace(/^[^.]+/, "*");
}

/** Where to probe, and the lines of which a certificate must be served there. */
interface Place {
  readonly endpoint: Endpoint;
  readonly lines: readonly Line[];
}

/**
 * The endpoints of a section with the names of a line for DOMAIN and DOMAINS_ALL. One that bears the name of no line is
 * probed with the line's first name.
 */
function placesOf(section: Section, line: Line, ownersOf: (name: string) => readonly Line[]): Place[] {
  const names = line.names.filter((name) => !name.startsWith("*."));
  const namesFor = (word: string) =>
    word === "DOMAIN" ? names.slice(0, 1) : word === "DOMAINS_ALL" ? names : [word];
  return section.verify.flatMap((endpoint) =>
    namesFor(endpoint.host).flatMap((host) => {
      // the same word on both sides means the same name
      const snis = endpoint.sni === undefined
        ? [undefined]
        : endpoint.sni === endpoint.host
        ? [host]
        : namesFor(endpoint.sni);
      return snis.map((given) => {
        const owners = ownersOf(given ?? host);
        const bears = owners.length > 0;
        const name = bears ? given : serverNameFor(line);
        const sni = name === undefined || isIP(name) ? undefined : name; // RFC 6066 §3
        const { port, starttls } = endpoint;
        const bracketed = isIP(host) === 6 ? `[${host}]` : host;
        const text = `${bracketed}:${port}${starttls === undefined ? "" : `/${starttls}`}${
          sni === undefined ? "" : `#${sni}`
        }`;
        const lines = bears ? owners : sni === undefined ? [line] : ownersOf(sni);
        return { endpoint: { ...endpoint, text, host, sni }, lines };
      });
    })
  );
}

/** A name by which a server finds the certificate of a line; none where it has addresses alone. */
function serverNameFor({ names }: Line): string | undefined {
  const all = names.filter((name) => !isIP(name));
  return all.find((name) => !name.startsWith("*.")) ?? all[0]?.replace("*", "www");
}

/** What it means that an endpoint serves this. */
export function verdictOn(
  sight: Sight,
  { endpoint }: Target,
  wanted: readonly Entry[],
  { mode }: Pick<Config, "mode">,
  now: Date,
  counterpart: () => readonly Entry[] = () => [],
): Verdict {
  if (sight.kind !== "served") return sight.kind;
  const served = sight.certificate!;
  const right = wanted.map(inUse).filter((certificate) => certificate !== undefined);
  const isOurs = right.some(({ fingerprint }) => fingerprint === served.fingerprint);
  const other = () => counterpart().map(inUse).filter((certificate) => certificate !== undefined);
  if (mode === "test") {
    // endpoints go on serving production; the staging certificate is wrong where production's belongs
    const lines = new Set(wanted.map(({ line }) => line.names.join()));
    const production = () =>
      counterpart().some((entry) => lines.has(entry.line.names.join()) && inUse(entry) !== undefined);
    if (!isOurs) return "answers";
    return production() ? "staging" : "current";
  }
  if (isOurs) return "current";
  if (other().some(({ fingerprint }) => fingerprint === served.fingerprint)) return "staging";
  const name = endpoint.sni ?? endpoint.host;
  const lines = wanted.map(({ line }) => line);
  const names = lines.some((line) => covers(line.names, name)) ? [name] : lines.flatMap(({ names }) => names);
  if (!names.some((name) => covers(served.names, name))) return "mismatched";
  if (served.selfSigned || new Date(served.notAfter) <= now) return "invalid";
  const older = right.some((certificate) =>
    certificate.issuer === served.issuer && new Date(served.notBefore) < certificate.notBefore
  );
  return older ? "older" : "foreign";
}

/** What is remembered of a probe; `confirmed`: what is not right was seen twice. */
export function recordOf(
  { record, wanted, ...target }: EndpointStatus,
  sights: readonly Sight[],
  config: Config,
  now: Date,
  { confirmed, afterDelivery, counterpart }: {
    confirmed: boolean;
    afterDelivery: boolean;
    counterpart?: () => readonly Entry[];
  },
): ProbeRecord {
  const at = now.toISOString();
  const verdicts = sights.map((sight) => verdictOn(sight, target, wanted, config, now, counterpart));
  if (verdicts.every(isGood)) return { at, sights: [...sights] };
  const wasRight = record !== undefined && record.badSince === undefined;
  const isSilent = verdicts.some((verdict) => SILENT.includes(verdict));
  const broken = record?.brokenByDelivery === true || (afterDelivery && wasRight && isSilent);
  return {
    at,
    badSince: record?.badSince ?? at,
    ...(confirmed && { confirmed }),
    ...(broken && { brokenByDelivery: true }),
    sights: [...sights],
  };
}

// ---------------------------------------------------------------------------------------------- problems

/** How often a line has to fail, and how long a delivery or an endpoint has to be bad, before an alert goes out. */
const ALERT_FAILURES = 3;
const ALERT_AFTER_MS = 20 * HOUR_MS;
/** Production that has not run for this many usual intervals, and for two days, does not run any more. */
const MISSED_RUNS = 3;

function findProblems(
  config: Config,
  decided: Omit<Plan, "problems">,
  now: Date,
  writeError: Error | undefined,
  clock: ClockEvidence | undefined,
): Problem[] {
  const { tasks, waiting, deliveries, endpoints, intervalMs, lastRun } = decided;
  const problems: Problem[] = [];
  const add = (
    problem: ProblemKind,
    key: string,
    alert: boolean,
    lines: readonly Line[],
    sections?: readonly Section[],
  ) =>
    problems.push({
      ...problem,
      key,
      alert,
      lines,
      sections: (sections ?? [...new Set(lines.flatMap((line) => line.sections))]).map(({ name }) => name),
    });
  const isOld = (since: Date) => now.getTime() - since.getTime() >= ALERT_AFTER_MS;

  const expiryOf = (due: readonly Due[]) => firstOf(due.map(({ entry }) => lastsUntil(entry)));

  // one cause, however many lines it keeps from being issued
  const down = [...tasks, ...waiting].filter(({ failure }) => failure?.shared);
  const notAfter = expiryOf(down.flatMap(({ due }) => due));
  if (writeError !== undefined) {
    add({ kind: "disk", error: writeError, notAfter }, "disk", true, [], config.sections);
  }
  if (clock !== undefined) {
    add({ kind: "clock", now, evidence: clock, notAfter }, "clock", true, [], config.sections);
  }
  const limited = waiting.filter(({ limited }) => limited);
  if (limited.length > 0) {
    const { until } = limited[0]!;
    add({ kind: "rate-limited", until }, "rate-limited", false, limited.map(({ line }) => line));
  }
  const isOverdue = ({ entry, since }: Due) => {
    const notAfter = lastsUntil(entry);
    if (notAfter === undefined) return false; // one that could never be issued is failing, not overdue
    const late = since !== undefined && isLate(since, notAfter, now, intervalMs);
    return late || notAfter <= now || entry.finding.kind === "revoked";
  };
  if (down.length > 0 && writeError === undefined && clock?.of !== "CA") {
    const failure = down.map(({ failure }) => failure!).reduce((a, b) => a.count >= b.count ? a : b);
    const alert = failure.count >= ALERT_FAILURES || down.some(({ due }) => due.some(isOverdue));
    add({ kind: "CA", failure, notAfter }, "CA", alert, down.map(({ line }) => line));
  }
  for (const { line, due, failure } of [...tasks, ...waiting]) {
    if (failure?.shared) continue;
    if (failure !== undefined) {
      const alert = failure.count >= ALERT_FAILURES || due.some(isOverdue);
      const key = `failing ${line.names.join(" ")}`;
      add({ kind: "failing", failure, notAfter: expiryOf(due) }, key, alert, [line]);
      continue;
    }
    for (const { entry } of due.filter(isOverdue)) {
      add({ kind: "overdue", entry, notAfter: lastsUntil(entry)! }, `overdue ${entry.file}`, true, [line]);
    }
  }
  for (const delivery of deliveries) {
    const { section, failure, pending } = delivery;
    if (failure === undefined) continue;
    const lines = [...new Set(pending.map(({ entry }) => entry.line))];
    const key = `delivery ${section.name}`;
    const served = endpoints.filter(({ sections }) => sections.includes(section)).flatMap(({ sights }) =>
      sights
    );
    const servedUntil = firstOf(
      served.map(({ certificate }) => certificate && new Date(certificate.notAfter)),
    ) ?? delivery.formerNotAfter;
    add({ kind: "delivery", delivery, failure, servedUntil }, key, isOld(new Date(failure.since)), lines, [
      section,
    ]);
  }
  for (const endpoint of endpoints) {
    const { sights, record, sections, wanted } = endpoint;
    const lines = [...new Set(wanted.map(({ line }) => line))];
    if (record?.badSince === undefined) continue; // it was right, whatever has been issued since
    for (const sight of sights) {
      if (isGood(sight.verdict)) continue;
      const since = new Date(record.badSince);
      const expired = sight.certificate !== undefined && new Date(sight.certificate.notAfter) <= now;
      const alert = expired || sight.verdict === "mismatched" || record.brokenByDelivery === true ||
        isOld(since);
      const key = `endpoint ${endpoint.key} ${sight.address}`;
      add({ kind: "endpoint", endpoint, sight, since }, key, alert, lines, sections);
    }
  }
  if (config.mode === "prod" && lastRun !== undefined) {
    const silence = now.getTime() - lastRun.getTime();
    if (silence > Math.max(MISSED_RUNS * intervalMs, 2 * DAY_MS)) {
      add({ kind: "not run", since: lastRun }, "not run", true, [], config.sections);
    }
  }
  return problems;
}

/**
 * Whether runs have passed by a renewal: after two usual intervals; but where these are short after some runs by hand, after
 * two days, or half of the time that was left.
 */
function isLate(since: Date, notAfter: Date, now: Date, intervalMs: number): boolean {
  const left = notAfter.getTime() - since.getTime();
  return now.getTime() - since.getTime() > Math.max(2 * intervalMs, Math.min(2 * DAY_MS, left / 2));
}

/** One alert of one section. */
export interface Alert {
  readonly section: Section;
  /** Those of which this section was not alerted in the last 20 hours. */
  readonly problems: readonly Problem[];
  /** What is well again. */
  readonly resolved: readonly string[];
}

/** The alerts that are to be sent now: each problem once in 20 hours, and once when it is well again. */
export function dueAlerts(
  { sections }: Config,
  problems: readonly Problem[],
  state: State,
  now: Date,
): Alert[] {
  const present = new Set(problems.map(({ key }) => key));
  return sections.filter(({ alert }) => alert.some((command) => command.trim() !== "")).flatMap((section) => {
    const sent = state.alerts[section.name] ?? {};
    const due = problems.filter(({ key, alert, sections }) => {
      const last = sent[key];
      return alert && (section.name === "every" || sections.includes(section.name)) &&
        (last === undefined || now.getTime() - Date.parse(last.at) >= LONGEST_PAUSE_MS);
    });
    const resolved = Object.entries(sent).filter(([key]) => !present.has(key)).map(([, { what }]) => what);
    return due.length + resolved.length > 0 ? [{ section, problems: due, resolved }] : [];
  });
}

/**
 * Makes receipts of what version 1 of the state remembered: everything that it did not hold to be pending had been
 * delivered.
 */
export function takeOver(config: Config, inventory: readonly Entry[], state: State, now: Date): void {
  const { owed } = state;
  if (owed === undefined) return;
  delete state.owed;
  for (const { line, file, finding } of inventory) {
    for (const section of line.sections) {
      if (finding.kind !== "present" || !delivers(section, config.mode)) continue;
      if (Object.hasOwn(owed, section.name) && Object.hasOwn(owed[section.name]!, file)) continue;
      const receipts = state.receipts[section.name] ??= Object.create(null) as Record<string, Receipt>;
      const digest = listsDigest(section, config.mode);
      receipts[file] = { digest, fingerprint: finding.certificate.fingerprint, at: now.toISOString() };
    }
  }
}

/** A remembered moment; that it does not lie in a wrong clock's future was made sure of when the state was read. */
function moment(text: string | undefined): Date | undefined {
  return text === undefined ? undefined : new Date(text);
}
