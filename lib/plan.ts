/**
 * What a run has to do and why: the difference between what the configuration wants and what is there.
 *
 * Pure: configuration, files found, remembered state and the clock go in; certificates to issue (renewal.ts),
 * endpoints to probe (endpoints.ts), pending deliveries and problems come out. Status, metrics, alerts, `--plan`
 * and the exit status are views of this one answer, so they cannot disagree. It reads nothing and makes no
 * sentences.
 */

import type { Config, Line, Section } from "./config.ts";
import {
  drifted,
  type EndpointStatus,
  inScope,
  inUse,
  type JudgedSight,
  linesOf,
  planEndpoints,
  wrongSights,
} from "./endpoints.ts";
import {
  type Basis,
  certificateOf,
  DAY_MS,
  type Due,
  earliest,
  expiryOf,
  HOUR_MS,
  inventoryOf,
  type Kept,
  LONGEST_PAUSE_MS,
  moment,
  planIssuing,
  type PlanOptions,
  type Task,
  usualInterval,
  type Waiting,
} from "./renewal.ts";
import type { DeliveryFailure, Failure, Receipt, RunRecord, State } from "./state.ts";
import type { Entry } from "./store.ts";
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

/** Certificates to be delivered to a section. */
export interface Delivery {
  readonly section: Section;
  /** The pending ones, and the other key types of their lines: a line is delivered whole. */
  readonly entries: readonly Entry[];
  readonly pending: readonly { readonly entry: Entry; readonly reason: DeliveryReason }[];
  /** New certificates and drift are delivered in parallel; anything else is a rollout, one section at a time. */
  readonly urgent: boolean;
  /** Identifies the delivery: another one starts without back-off. */
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

/** Something that is wrong. `key` stays the same for as long as it lasts. */
export type Problem = ProblemKind & {
  readonly key: string;
  /** Whether an alert is sent for it. */
  readonly alert: boolean;
  /** The sections that it concerns; `[every]` is alerted of everything. */
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
    /** The same endpoint, for each key type that it concerns. */
    readonly endpoints: readonly EndpointStatus[];
    readonly sight: JudgedSight;
    readonly since: Date;
  }
  | { readonly kind: "not run"; readonly since: Date };

/** What shows that this clock is wrong: the CA's clock, the start of a certificate, or a run in the future. */
export interface ClockEvidence {
  readonly of: "CA" | "certificate" | "run";
  readonly at: Date;
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
  /** its key is missing, so that it is issued again */
  | { readonly kind: "no key"; readonly entry: Entry }
  /** a certificate that a section was given is no longer renewed */
  | {
    readonly kind: "not renewed";
    readonly section: string;
    readonly file: string;
    readonly notAfter: Date;
  }
  /** what `--deliver` names has no command to run, or no certificate */
  | { readonly kind: "nothing to deliver"; readonly what: Line | string };

/** Decides everything. */
export function plan(basis: Basis): Plan {
  const { config, state, now, options } = basis;
  const inventory = inventoryOf(basis);
  const runs = state.runs.filter(({ at }) => Date.parse(at) <= now.getTime());
  const intervalMs = usualInterval(runs);
  const issuing = planIssuing(basis, intervalMs);
  const endpoints = planEndpoints(basis, config.sections);
  const deliveries = planDeliveries(basis, endpoints);
  const warnings = [
    ...inventory.flatMap((entry) => warningsOf(entry, config, intervalMs)),
    ...undeliverable(issuing.tasks, deliveries, options),
    ...unrenewed(inventory, state, now),
  ];
  const lastRun = moment(runs.at(-1)?.at);
  const decided = { ...issuing, endpoints, deliveries, warnings, intervalMs, lastRun, runs };
  return { ...decided, problems: findProblems(basis, inventory, decided) };
}

// ---- deliveries -----------------------------------------------------------------------------------------

/** How often in a row the commands are repeated for drift without a pause; then once in 20 hours. */
const MOST_REPAIRS = 3;
const ROLLOUT: readonly DeliveryReason[] = ["first delivery", "commands changed"];

function planDeliveries(basis: Basis, endpoints: readonly EndpointStatus[]): Delivery[] {
  const { config } = basis;
  const wrong = drifted(endpoints, config);
  const deliveries = config.sections.map((section) => planDelivery(basis, section, wrong))
    .filter((delivery) => delivery !== undefined);
  const isEvery = ({ section }: Delivery) => Number(section.name === "every");
  return deliveries.sort((a, b) => isEvery(a) - isEvery(b));
}

/** What is pending for one section, and which of its endpoints are to be probed. */
export function planSection(
  basis: Basis,
  section: Section,
): { delivery?: Delivery; endpoints: readonly EndpointStatus[] } {
  const endpoints = planEndpoints(basis, [section]);
  return { endpoints, delivery: planDelivery(basis, section, drifted(endpoints, basis.config)) };
}

/** The certificates on disk that a section is given. */
export function entriesOf(
  section: Section,
  config: Config,
  certificates: Basis["certificates"],
): readonly Entry[] {
  return linesOf(config, section).flatMap((line) => certificates.get(line) ?? [])
    .filter(({ finding, keyType }) => finding.kind === "present" && section.keyTypes.includes(keyType));
}

function planDelivery(
  { config, certificates, state, now, options }: Basis,
  section: Section,
  wrong: readonly EndpointStatus[],
): Delivery | undefined {
  const entries = entriesOf(section, config, certificates);
  if (entries.length === 0 || !delivers(section, config.mode)) return undefined;
  const digest = listsDigest(section, config.mode);
  const receipts = state.receipts[section.name] ?? {};
  const drift = driftSeen(section, wrong);
  const isDrift = (entry: Entry) => (drift.get(entry) ?? 0) > Number(moment(receipts[entry.file]?.at) ?? 0); // seen after the delivery
  const inScopeNow = entries.filter(({ line }) => inScope(options.selection, line, section));
  const pending = inScopeNow.flatMap((entry) => {
    const reason = reasonOf(entry, section, digest, receipts[entry.file], options) ??
      (isDrift(entry) ? "drift" : undefined);
    return reason === undefined ? [] : [{ entry, reason }];
  });
  if (pending.length === 0) return undefined;
  const isUrgent = pending.some(({ reason }) => !ROLLOUT.includes(reason)) ||
    inScopeNow.some(isDrift);
  const key = deliveryKey(section, digest, pending.map(({ entry }) => entry));
  const last = state.deliveries[section.name];
  const failure = last?.key === key ? last : undefined;
  const pauses = pending.map(({ entry, reason }) =>
    reason === "drift" ? repairPause(receipts[entry.file]!) : undefined
  );
  const pause = pauses.includes(undefined) ? undefined : earliest(pauses);
  const until = new Date(Math.max(Number(moment(failure?.retryAt) ?? 0), Number(pause ?? 0)));
  const waits = !options.retry && until > now && !pending.some(({ reason }) => reason === "asked for");
  const lines = new Set(pending.map(({ entry }) => entry.line));
  return {
    section,
    entries: entries.filter(({ line }) => lines.has(line)),
    pending,
    urgent: isUrgent || failure?.urgent === true,
    key,
    failure,
    until: waits ? until : undefined,
    formerNotAfter: earliest(pending.map(({ entry }) => moment(receipts[entry.file]?.notAfter))),
  };
}

/** Why a certificate has to be delivered, whatever endpoints serve. */
function reasonOf(
  entry: Entry,
  section: Section,
  digest: string,
  receipt: Receipt | undefined,
  { selection, issued, delivered }: PlanOptions,
): DeliveryReason | undefined {
  const { line, file } = entry;
  const isAskedFor = selection?.deliver.has(line) || selection?.deliver.has(section.name);
  if (isAskedFor && !delivered?.has(`${section.name}/${file}`)) return "asked for";
  if (receipt === undefined) return issued?.has(file) ? "new certificate" : "first delivery";
  if (receipt.fingerprint !== certificateOf(entry)?.fingerprint) return "new certificate";
  return receipt.digest !== digest ? "commands changed" : undefined;
}

/** Until when drift is not repaired again; undefined if it is now. */
function repairPause({ at, repairs = 0 }: Receipt): Date | undefined {
  return repairs < MOST_REPAIRS ? undefined : new Date(Date.parse(at) + LONGEST_PAUSE_MS);
}

/** Certificate -> when an endpoint of this section was last seen to serve another one that is certainly wrong. */
function driftSeen(section: Section, wrong: readonly EndpointStatus[]): Map<Entry, number> {
  const seen = new Map<Entry, number>();
  for (const { sections, wanted, record } of wrong) {
    if (!sections.includes(section)) continue;
    for (const entry of wanted) seen.set(entry, Math.max(seen.get(entry) ?? 0, Date.parse(record!.at)));
  }
  return seen;
}

/** Identifies a delivery by its lists, its endpoints and its certificates. */
function deliveryKey({ verify }: Section, digest: string, entries: readonly Entry[]): string {
  const fingerprints = entries.map((entry) => certificateOf(entry)?.fingerprint);
  return sha256(JSON.stringify([digest, verify.map(({ text }) => text), fingerprints])).slice(0, 16);
}

/**
 * The lists that deliver a certificate: `uploadCerts`, `uploadKeys`, `uploadEach`, `update`. A rehearsal runs
 * `uploadEach` only if the section says so: it chooses its own file names, and could put the staging certificate
 * into production.
 */
export function listsOf(section: Section, mode: Config["mode"]) {
  const { uploadCerts, uploadKeys, uploadEach, update, rehearse } = section;
  return [uploadCerts, uploadKeys, mode === "prod" || rehearse ? uploadEach : [], update] as const;
}

/** Whether a section has anything to run for a certificate. */
export function delivers(section: Section, mode: Config["mode"]): boolean {
  return listsOf(section, mode).flat().some((command) => command.trim() !== "");
}

/** The four lists as parsed, in a receipt. Must not change between versions: all receipts would be lost. */
export function listsDigest(section: Section, mode: Config["mode"]): string {
  return sha256(JSON.stringify(listsOf(section, mode))).slice(0, 16);
}

// ---- warnings -------------------------------------------------------------------------------------------

function warningsOf(entry: Entry, config: Config, intervalMs: number): Warning[] {
  const { finding, issuedAt, keyType } = entry;
  if (finding.kind === "missing" && finding.what === "key") return [{ kind: "no key", entry }];
  if (finding.kind !== "present") return [];
  const { notBefore, notAfter, keySpec } = finding.certificate;
  const lifeMs = notAfter.getTime() - (issuedAt ?? notBefore).getTime();
  const isAsConfigured = keyType === "rsa"
    ? keySpec?.type === "rsa" && keySpec.bits === config.keyBitsRSA
    : keySpec?.type === "ec" && keySpec.curve === config.curve;
  // one run to renew it, one that may fail
  const isLongEnough = lifeMs >= 3 * intervalMs;
  return [
    ...(isLongEnough ? [] : [{ kind: "short life" as const, entry, lifeMs, intervalMs }]),
    ...(isAsConfigured ? [] : [{ kind: "other key" as const, entry }]),
  ];
}

/** What `--deliver` names and cannot be delivered. */
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

/** Certificates that sections received, of a key type or tag that their line no longer has: they may be served. */
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

// ---- problems -------------------------------------------------------------------------------------------

/** An alert is sent after so many failures of a line, and when a delivery or an endpoint is wrong for so long. */
const ALERT_FAILURES = 3;
const ALERT_AFTER_MS = 20 * HOUR_MS;
/** After this many usual intervals, and two days, it is a problem that production has not run. */
const MISSED_RUNS = 3;
/** A smaller difference between clocks is no problem: CAs back-date certificates by an hour. */
const CLOCK_SKEW_MS = HOUR_MS;

type Decided = Omit<Plan, "problems">;

function findProblems(basis: Basis, inventory: readonly Entry[], decided: Decided): Problem[] {
  const isOld = (since: Date) => basis.now.getTime() - since.getTime() >= ALERT_AFTER_MS;
  return [
    ...issuingProblems(basis, inventory, decided),
    ...decided.deliveries.flatMap((delivery) => deliveryProblem(delivery, decided.endpoints, isOld)),
    ...endpointProblems(decided.endpoints, basis.now, isOld),
    ...missedRuns(basis, decided),
  ];
}

function problemOf(
  problem: ProblemKind,
  key: string,
  alert: boolean,
  lines: readonly Line[],
  sections: readonly Section[] = [...new Set(lines.flatMap(({ sections }) => sections))],
): Problem {
  return { ...problem, key, alert, lines, sections: sections.map(({ name }) => name) };
}

function issuingProblems(basis: Basis, inventory: readonly Entry[], decided: Decided): Problem[] {
  const { config: { sections }, now, options } = basis;
  const tasks = [...decided.tasks, ...decided.waiting];
  const isOverdue = (due: Due) => isLate(due, now, decided.intervalMs);
  const problems: Problem[] = [];

  // one cause, however many lines it keeps from being issued
  const down = tasks.filter(({ failure }) => failure?.shared);
  const notAfter = expiryOf(down.flatMap(({ due }) => due));
  const error = options.writeError?.();
  if (error !== undefined) {
    problems.push(problemOf({ kind: "disk", error, notAfter }, "disk", true, [], sections));
  }
  const evidence = clockEvidence(basis, inventory);
  if (evidence !== undefined) {
    problems.push(problemOf({ kind: "clock", now, evidence, notAfter }, "clock", true, [], sections));
  }
  const limited = decided.waiting.filter(({ limited }) => limited);
  if (limited.length > 0) {
    const { until } = limited[0]!;
    const lines = limited.map(({ line }) => line);
    problems.push(problemOf({ kind: "rate-limited", until }, "rate-limited", false, lines));
  }
  if (down.length > 0 && error === undefined && evidence?.of !== "CA") {
    const failure = down.map(({ failure }) => failure!).reduce((a, b) => a.count >= b.count ? a : b);
    const alert = failure.count >= ALERT_FAILURES || down.some(({ due }) => due.some(isOverdue));
    problems.push(problemOf({ kind: "CA", failure, notAfter }, "CA", alert, down.map(({ line }) => line)));
  }

  for (const { line, due, failure } of tasks) {
    if (failure?.shared) continue;
    if (failure !== undefined) {
      const alert = failure.count >= ALERT_FAILURES || due.some(isOverdue);
      const key = `failing ${line.names.join(" ")}`;
      problems.push(problemOf({ kind: "failing", failure, notAfter: expiryOf(due) }, key, alert, [line]));
      continue;
    }
    for (const { entry } of due.filter(isOverdue)) {
      const { notAfter } = certificateOf(entry)!;
      problems.push(problemOf({ kind: "overdue", entry, notAfter }, `overdue ${entry.file}`, true, [line]));
    }
  }
  return problems;
}

/**
 * Whether a certificate is overdue: it has expired or was revoked, or two usual intervals have passed since it was
 * due. Where these are short, after some runs by hand, two days or half of the time that was left have to pass.
 */
function isLate({ entry, since }: Due, now: Date, intervalMs: number): boolean {
  const notAfter = certificateOf(entry)?.notAfter;
  if (notAfter === undefined) return false; // one that could never be issued is failing, not overdue
  if (notAfter <= now || entry.finding.kind === "revoked") return true;
  if (since === undefined) return false;
  const left = notAfter.getTime() - since.getTime();
  return now.getTime() - since.getTime() > Math.max(2 * intervalMs, Math.min(2 * DAY_MS, left / 2));
}

/** What shows that this clock is wrong, so that certificates would expire unnoticed. */
function clockEvidence(
  { state, now, options }: Basis,
  inventory: readonly Entry[],
): ClockEvidence | undefined {
  const starts = inventory.map((entry) => inUse(entry)?.notBefore).filter((date) => date !== undefined);
  const evidence: ClockEvidence[] = [
    { of: "CA", at: new Date(now.getTime() - (options.aheadMs?.() ?? 0)) },
    ...starts.map((at) => ({ of: "certificate" as const, at })),
    ...state.runs.map(({ at }) => ({ of: "run" as const, at: new Date(at) })),
  ];
  return evidence.find(({ of, at }) => {
    const ahead = at.getTime() - now.getTime();
    return (of === "CA" ? Math.abs(ahead) : ahead) > CLOCK_SKEW_MS;
  });
}

function deliveryProblem(
  delivery: Delivery,
  endpoints: readonly EndpointStatus[],
  isOld: (since: Date) => boolean,
): Problem[] {
  const { section, failure, pending, formerNotAfter } = delivery;
  if (failure === undefined) return [];
  const served = endpoints.filter(({ sections }) => sections.includes(section))
    .flatMap(({ sights }) => sights.map(({ certificate }) => moment(certificate?.notAfter)));
  const servedUntil = earliest(served) ?? formerNotAfter;
  const lines = [...new Set(pending.map(({ entry }) => entry.line))];
  const problem: ProblemKind = { kind: "delivery", delivery, failure, servedUntil };
  return [problemOf(problem, `delivery ${section.name}`, isOld(new Date(failure.since)), lines, [section])];
}

function endpointProblems(
  endpoints: readonly EndpointStatus[],
  now: Date,
  isOld: (since: Date) => boolean,
): Problem[] {
  // one that was right counts as right until the next probe, whatever has been issued since
  const wrong = endpoints.filter(({ record }) => record?.badSince !== undefined);
  return wrongSights(wrong).map(({ key, endpoints, sight }) => {
    const since = earliest(endpoints.map(({ record }) => moment(record?.badSince)))!;
    const isExpired = sight.certificate !== undefined && new Date(sight.certificate.notAfter) <= now;
    const isBroken = endpoints.some(({ record }) => record?.brokenByDelivery);
    const alert = isExpired || isBroken || sight.verdict === "mismatched" || isOld(since);
    const lines = [...new Set(endpoints.flatMap(({ wanted }) => wanted.map(({ line }) => line)))];
    const sections = [...new Set(endpoints.flatMap(({ sections }) => sections))];
    return problemOf({ kind: "endpoint", endpoints, sight, since }, key, alert, lines, sections);
  });
}

function missedRuns({ config: { mode, sections }, now }: Basis, { lastRun, intervalMs }: Decided): Problem[] {
  if (mode !== "prod" || lastRun === undefined) return [];
  const isMissed = now.getTime() - lastRun.getTime() > Math.max(MISSED_RUNS * intervalMs, 2 * DAY_MS);
  return isMissed ? [problemOf({ kind: "not run", since: lastRun }, "not run", true, [], sections)] : [];
}
