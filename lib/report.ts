/**
 * What is said of a run: lines while it goes on, its end, the plan, alerts, and the JSON documents of run and plan.
 *
 * Knows no files and no network. What came from outside has been made safe to print where it came in.
 */

import type { Config, Mode, Notice } from "./config.ts";
import type { Delivered, DeliverEvent } from "./deliver.ts";
import type { IssueEvent } from "./issue.ts";
import {
  type Alert,
  type Delivery,
  type Due,
  type EndpointStatus,
  isGood,
  type Kept,
  type Plan,
  type Problem,
  type Reason,
  type Rule,
  type Task,
  type Verdict,
  type Warning,
} from "./plan.ts";
import type { Sight } from "./state.ts";
import type { Entry } from "./store.ts";

/** What happens in a run, as it happens. */
export type Event =
  | IssueEvent
  | DeliverEvent
  /** `changed`: something is not as it was, which is worth a line even under --cron. */
  | { readonly kind: "notice"; readonly text: string; readonly changed?: boolean }
  | { readonly kind: "begin"; readonly tasks: readonly Task[] }
  | { readonly kind: "issued"; readonly due: Due; readonly certificate: Entry; readonly seconds: number }
  | { readonly kind: "output"; readonly whose: string; readonly text: string }
  | {
    readonly kind: "alert";
    readonly alert: Alert;
    readonly subject: string;
    readonly text: string;
    readonly error?: Error;
  };

/** How to print. */
export interface OutputOptions {
  readonly mode: Mode;
  /** Nothing unless something changed or failed. */
  readonly cron: boolean;
  readonly json: boolean;
  /** Width of the terminal where standard output is one: there is room for a progress line. */
  readonly columns?: number;
  readonly color: boolean;
  readonly now: () => Date;
  readonly out: (text: string) => void;
  readonly err: (text: string) => void;
}

/** How a run ended. */
export interface Ended {
  /** As everything is now. */
  readonly plan: Plan;
  readonly issued: number;
  readonly delivered: number;
  /** Problems whose reporting under `--cron` is not due, since it was done in the last 20 hours. */
  readonly known: ReadonlySet<string>;
}

const HOUR_MS = 3_600_000;
const DAY_MS = 24 * HOUR_MS;

// ---- words ------------------------------------------------------------------------------------------------

/** `lematt.conf:12: …`, and the hint on a line of its own. */
export function noticeText({ file, line, text, hint }: Notice): string {
  const where = line === undefined ? file : `${file}:${line}`;
  return `${where}: ${text}${hint === undefined ? "" : `\n  hint: ${hint}`}`;
}

/** A certificate's names, short: the primary and how many more there are. */
export function nameText(names: readonly string[]): string {
  if (names.length === 0) return "no name";
  return names.length === 1 ? names[0]! : `${names[0]} +${names.length - 1}`;
}

/** `www.example.com +1 (rsa, ec)` */
function subjectText(names: readonly string[], keyTypes: readonly string[]): string {
  return `${nameText(names)} (${keyTypes.join(", ")})`;
}

function entryText({ line, keyType }: Entry): string {
  return subjectText(line.names, [keyType]);
}

/** The day, in UTC. */
export function dateText(date: Date): string {
  return date.toISOString().slice(0, 10);
}

/** The minute, in UTC. */
export function timeText(date: Date): string {
  return `${date.toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

/** `12 days`, `5 hours`, `20 minutes`, `under a minute`: in the unit that is fine enough. */
export function durationText(ms: number): string {
  const of = (number: number, unit: string) => `${number} ${unit}${number === 1 ? "" : "s"}`;
  if (ms >= 3 * DAY_MS) return of(Math.floor(ms / DAY_MS), "day");
  if (ms >= 2 * HOUR_MS) return of(Math.floor(ms / HOUR_MS), "hour");
  return ms < 60_000 ? "under a minute" : of(Math.floor(ms / 60_000), "minute");
}

/** The moment, to the day where it is far enough. */
function untilText(date: Date, now: Date): string {
  return Math.abs(date.getTime() - now.getTime()) >= 10 * DAY_MS ? dateText(date) : timeText(date);
}

export function count(number: number, thing: string, things = `${thing}s`): string {
  return `${number} ${number === 1 ? thing : things}`;
}

/** Why a certificate is issued. */
export function reasonText(reason: Reason): string {
  switch (reason.kind) {
    case "found": {
      const { finding } = reason;
      switch (finding.kind) {
        case "missing":
          return finding.what === "certificate" ? "no certificate yet" : "its key is missing";
        case "unreadable":
          return `its ${finding.what} cannot be read: ${finding.detail}`;
        case "other names":
          return `the names changed, it was for ${finding.certificate.names.join(" ")}`;
        case "other key":
          return "it does not match its key";
        case "revoked":
          return "its key was revoked";
        default:
          return finding satisfies never;
      }
    }
    case "asked for":
      return "--renew";
    case "expired":
      return `expired ${timeText(reason.at)}`;
    case "renewal": {
      const why = reason.explanationUrl === undefined ? "" : `, see ${reason.explanationUrl}`;
      return `due since ${dateText(reason.at)}, ${ruleText(reason.rule)}${why}`;
    }
    default:
      return reason satisfies never;
  }
}

/** What decides on a renewal, in the words of the configuration. */
export function ruleText(rule: Rule): string {
  switch (rule) {
    case "age":
      return "by generateNewCertsAfterDays";
    case "expiry":
      return "by reauthorizeDays";
    case "expiry, capped":
      return "by reauthorizeDays, capped";
    case "life":
      return "by its lifetime";
    case "runs":
      return "early enough for two more runs";
    case "ari":
      return "as the CA suggests";
    default:
      return rule satisfies never;
  }
}

/** What a person should know of a certificate. */
export function warningText(warning: Warning): string {
  if (warning.kind === "nothing to deliver") {
    const { what } = warning;
    const name = typeof what === "string" ? `[${what}]` : what.names[0];
    return `nothing to deliver for ${name}: it has no command, or no certificate`;
  }
  if (warning.kind === "not renewed") {
    const { section, file, notAfter } = warning;
    return `[${section}] was given ${file}, which is no longer renewed and expires ${timeText(notAfter)} ` +
      "(--prune forgets it)";
  }
  const what = entryText(warning.entry);
  switch (warning.kind) {
    case "short life": {
      const { lifeMs, intervalMs } = warning;
      return `${what} lives ${durationText(lifeMs)}, but runs are ${
        durationText(intervalMs)
      } apart: run lematt more often`;
    }
    case "other key":
      return `the key of ${what} is not as configured; the next renewal makes one that is`;
    default:
      return warning satisfies never;
  }
}

/** What an address serves. */
export function sightText(sight: Sight & { verdict: Verdict }): string {
  const { verdict, certificate, detail, address } = sight;
  const at = address === "" ? "" : ` at ${address}`;
  const until = certificate === undefined ? "" : `, valid until ${timeText(new Date(certificate.notAfter))}`;
  switch (verdict) {
    case "current":
      return `serves the newest certificate${at}${until}`;
    case "answers":
      return `finishes the handshake${at}${until}`;
    case "older":
      return `serves an older certificate${at}${until}`;
    case "invalid":
      return `serves ${certificate?.selfSigned ? "a self-signed" : "an expired"} certificate${at}${until}`;
    case "staging":
      return `serves the certificate of --test${at}${until}`;
    case "foreign":
      return `serves a certificate that lematt did not deliver${at}, issued by ${
        certificate?.issuer || "an unnamed CA"
      }${until}`;
    case "mismatched":
      return `serves a certificate for ${nameText(certificate?.names ?? [])}${at}${until}`;
    case "refused":
      return `has no certificate of this key type${at}${detail === undefined ? "" : `: ${detail}`}`;
    case "unfinished":
      return `does not finish the handshake${at}${detail === undefined ? "" : `: ${detail}`}`;
    case "unreachable":
      return `unreachable${at}: ${detail ?? "no answer"}`;
    case "passed over":
      return `not probed${at}: this host has no route to that address family`;
    default:
      return verdict satisfies never;
  }
}

function expiryText(what: string, notAfter: Date | undefined): string {
  return notAfter === undefined ? "" : `; ${what} expires ${timeText(notAfter)}`;
}

/** A problem in a sentence; `short` names it without its cause. */
export function problemText(problem: Problem, form: "short" | "long" = "long"): string {
  const long = form === "long";
  switch (problem.kind) {
    case "CA": {
      const { failure, notAfter } = problem;
      const lines = count(problem.lines.length, "line");
      if (!long) return `issuance of ${lines}`;
      const times = failure.count === 1
        ? ""
        : `, ${failure.count} times since ${timeText(new Date(failure.since))}`;
      return `${lines} not issued${times}: ${failure.error}${expiryText("the first certificate", notAfter)}`;
    }
    case "disk": {
      const { error, notAfter } = problem;
      if (!long) return "writing files";
      if (!isSystemError(error)) return `cannot run: ${errorText(error)}`;
      return `cannot write files: ${errorText(error)}; nothing is issued until that is mended` +
        expiryText("the first certificate", notAfter);
    }
    case "clock": {
      const { now, evidence: { of, at }, notAfter } = problem;
      if (!long) return "this host's clock";
      const other = {
        CA: "the CA's",
        certificate: "but a certificate is valid from",
        run: "but lematt has run at",
      }[of];
      return `this host's clock says ${timeText(now)}, ${other} ${timeText(at)}` +
        expiryText("the first certificate", notAfter);
    }
    case "failing": {
      const name = nameText(problem.lines[0]!.names);
      if (!long) return `issuance of ${name}`;
      const { count, error, retryAt } = problem.failure;
      const times = count === 1 ? "failed" : `failed ${count} times in a row`;
      const next = retryAt === undefined
        ? ""
        : `; tried again from ${timeText(new Date(retryAt))} (--retry: now)`;
      const until = expiryText("its certificate", problem.notAfter);
      return `${name} ${times}: ${error}${next}${until}`;
    }
    case "rate-limited":
      return `${count(problem.lines.length, "line")} rate-limited by the CA` +
        (long ? ` until ${timeText(problem.until)} (--retry: now)` : "");
    case "overdue": {
      const name = entryText(problem.entry);
      if (!long) return `renewal of ${name}`;
      return problem.entry.finding.kind === "revoked"
        ? `${name} was revoked and is not replaced yet`
        : `${name} is overdue for renewal and expires ${timeText(problem.notAfter)}`;
    }
    case "delivery": {
      const { delivery: { section, pending }, failure, servedUntil } = problem;
      const what = `[${section.name}] delivery of ${count(pending.length, "certificate")}`;
      if (!long) return what;
      const next = failure.retryAt === undefined
        ? ""
        : `; tried again from ${timeText(new Date(failure.retryAt))} (--retry: now)`;
      return `${what} pending since ${timeText(new Date(failure.since))}: ${failure.error}${next}` +
        expiryText("the certificate that is served", servedUntil);
    }
    case "endpoint": {
      const { endpoint, sight, since } = problem;
      const what = `${endpoint.endpoint.text} (${endpoint.keyType})`;
      return long ? `${what} ${sightText(sight)}, wrong since ${timeText(since)}` : what;
    }
    case "not run":
      return long ? `lematt --prod has not run since ${timeText(problem.since)}` : "runs of lematt";
    default:
      return problem satisfies never;
  }
}

/** A problem, and the end of what a command printed that is its cause. */
export function problemLines(problem: Problem): string[] {
  return [problemText(problem), ...problem.kind === "delivery" ? outputOf(problem.failure.output ?? "") : []];
}

/** Errors whose message says all. */
const KNOWN_ERRORS = [
  "AbortError",
  "ChallengeError",
  "CommandError",
  "LockedError",
  "SelectionError",
  "StateError",
];

/** An error as a person should see it: the CA's words with their step; a bug with its stack. */
export function errorText(error: Error): string {
  const { name } = error;
  if (name === "AcmeError") return `cannot ${(error as Error & { step: string }).step}: ${error.message}`;
  const expected = KNOWN_ERRORS.includes(name) || isSystemError(error);
  return expected ? error.message : error.stack ?? String(error);
}

/** Whether the system refused something. Deno gives a code to most of that, but not to all: ENOLCK has none. */
export function isSystemError(error: Error): boolean {
  const { code } = error as { code?: string };
  return code !== undefined || error instanceof Deno.errors.NotFound ||
    /\(os error \d+\)/.test(error.message);
}

/** What an alert says: subject as words, and the text. */
export function alertOf(
  { mode }: Config,
  { problems, resolved }: Alert,
): { subject: string[]; text: string } {
  const first = problems[0];
  const about = first === undefined ? undefined : first.lines[0]?.names[0] ?? "lematt";
  const subject = first === undefined
    ? ["well", "again"]
    : [String(problems.length), problems.length === 1 ? "problem:" : "problems:", about!];
  const texts = problems.map((problem) => problemLines(problem).join("\n  "));
  const lines = [...texts, ...resolved.map((what) => `well again: ${what}`)];
  return { subject, text: `${lines.join("\n")}\n\nlematt --${mode} --status shows all of it.\n` };
}

/** What a failed command printed, set off from our own words. */
function outputOf(output: string): string[] {
  return output.trimEnd().split("\n").filter((line) => line !== "").slice(-20).map((line) => `| ${line}`);
}

// ---- lines ------------------------------------------------------------------------------------------------

/** Prints a run while it goes on, and its end. */
export class Report {
  /** Standard output that waits, under --cron, for something worth being read. */
  #held: string[] = [];
  #quiet: boolean;
  #progress = { tasks: 0, begun: 0, done: 0, failed: 0 };
  #progressShown = false;
  #issued: Extract<Event, { kind: "issued" }>[] = [];
  readonly #events: Event[] = [];
  /** What has been said; each round of probes says the same of an endpoint. */
  readonly #notices = new Set<string>();
  /** Problems whose failure has been printed as it happened. */
  readonly #printed = new Set<string>();
  #alertFailed = false;
  /** Under --cron: failures that are printed at the end, unless they were printed in the last 20 hours. */
  readonly #heldFailures: { readonly key: string; readonly text: string }[] = [];

  constructor(private readonly options: OutputOptions) {
    this.#quiet = options.cron;
  }

  /** Takes one event and prints what there is to say. */
  emit(event: Event): void {
    if (event.kind === "notice" && this.#notices.has(event.text)) return;
    if (event.kind === "notice") this.#notices.add(event.text);
    if (this.options.json) this.#events.push(event);
    this.#clearProgress();
    switch (event.kind) {
      case "notice":
        if (event.changed) this.#sayAloud(`note      ${event.text}`);
        else this.#say(`note      ${event.text}`);
        break;
      case "account key":
        this.#sayAloud(`${event.how.padEnd(10)}${event.path}, the account key (P-256); keep a copy of it`);
        break;
      case "begin":
        this.#progress.tasks = event.tasks.length;
        break;
      case "task":
        this.#progress.begun++;
        break;
      case "no CA": {
        this.#fail("CA", `${count(event.tasks.length, "line")} of domains`, [event.error]);
        break;
      }
      case "issued":
        this.#issued.push(event);
        break;
      case "failed": {
        this.#progress.failed++;
        const { line } = event.due[0]!.entry;
        const subject = subjectText(line.names, event.due.map(({ entry }) => entry.keyType));
        this.#fail(`failing ${line.names.join(" ")}`, subject, [event.error]);
        break;
      }
      case "end":
        this.#progress.done++;
        this.#sayIssued(event.task);
        break;
      case "drift":
        for (const { endpoint, keyType, sights } of event.endpoints) {
          for (const sight of sights.filter(({ verdict }) => !isGood(verdict))) {
            this.#sayAloud(`drift     [${event.section}] ${endpoint.text} (${keyType}) ${sightText(sight)}`);
          }
        }
        break;
      case "delivered":
        this.#sayDelivered(event.delivered);
        break;
      case "output":
        for (const line of event.text.trimEnd().split("\n")) {
          this.#say(`          ${event.whose} | ${line}`);
        }
        break;
      case "alert":
        this.#sayAlert(event);
        break;
      default:
        event satisfies never;
    }
    this.#showProgress();
  }

  /** One line for the certificates of a line of domains, where the same can be said of them. */
  #sayIssued(task: Task): void {
    const texts = new Map<string, string[]>();
    const own = this.#issued.filter(({ due }) => due.entry.line === task.line);
    for (const { due, certificate: { finding } } of own) {
      if (finding.kind !== "present") continue;
      const text = `until ${untilText(finding.certificate.notAfter, this.options.now())}: ${
        reasonText(due.reason)
      }`;
      texts.set(text, [...texts.get(text) ?? [], due.entry.keyType]);
    }
    this.#issued = this.#issued.filter((one) => !own.includes(one));
    for (const [text, keyTypes] of texts) {
      this.#sayAloud(`issued    ${subjectText(task.line.names, keyTypes.toSorted().toReversed())} ${text}`);
    }
  }

  #sayDelivered(
    { delivery: { section, pending, entries: all }, entries, commands, errors, endpoints }: Delivered,
  ): void {
    for (const { template, seconds } of commands) {
      const text = `ran       [${section.name}] ${template} (${seconds.toFixed(1)} s)`;
      if (errors.length > 0) this.#say(text); // the failure is said
      else this.#sayAloud(text);
    }
    if (errors.length > 0) {
      this.#fail(
        `delivery ${section.name}`,
        `[${section.name}] delivery of ${count(all.length - entries.length, "certificate")}`,
        errors,
      );
    } else {
      const reasons = [...new Set(pending.map(({ reason }) => reason))].join(", ");
      this.#sayAloud(`delivered [${section.name}] ${count(entries.length, "certificate")}: ${reasons}`);
    }
    for (const { key, endpoint, keyType, sights } of endpoints) {
      const wrong = new Set(sights.filter(({ verdict }) => !isGood(verdict)).map(({ address }) => address));
      for (const sight of sights) {
        const text = `[${section.name}] ${endpoint.text} (${keyType}) ${sightText(sight)}`;
        if (!isGood(sight.verdict)) {
          this.#sayFailure(`endpoint ${key} ${sight.address}`, `WRONG     ${text}\n`);
        } else if (!wrong.has(sight.address)) this.#sayAloud(`verified  ${text}`);
      }
    }
  }

  /** Whom an alert was sent to, and what it is about; the problems are printed anyway. */
  #sayAlert({ alert: { section, problems, resolved }, subject, error }: Extract<Event, { kind: "alert" }>) {
    if (error !== undefined) {
      this.#alertFailed = true;
      return this.#fail("", `[${section.name}] alert`, [error]);
    }
    const texts = [...problems.length > 0 ? [subject] : [], ...resolved.map((what) => `well again: ${what}`)];
    for (const text of texts) this.#sayAloud(`alert     [${section.name}] ${text}`);
  }

  /** Prints the end of a run and returns the exit status: 1 where there is a problem. */
  finish({ plan, issued, delivered, known }: Ended): 0 | 1 {
    this.#clearProgress();
    const { problems, kept, tasks, waiting, deliveries } = plan;
    for (const { key, text } of this.#heldFailures) if (!known.has(key)) this.options.err(text);
    for (const problem of problems) {
      if (this.#printed.has(problem.key) || (this.options.cron && known.has(problem.key))) continue;
      this.#sayError(`problem   ${problemLines(problem).join("\n          ")}`);
    }
    const next = soonest(kept);
    const parts = [
      issued > 0 ? `${issued} issued` : tasks.length + waiting.length === 0 ? "nothing due" : "",
      delivered > 0 ? `${count(delivered, "section")} delivered` : "",
      deliveries.length > 0 ? `${count(deliveries.length, "section")} pending` : "",
      `${Math.max(0, kept.length - issued)} kept`,
      problems.length > 0 ? count(problems.length, "problem") : "",
      next === undefined
        ? ""
        : `next renewal ${untilText(next.renewAt, this.options.now())} (${entryText(next.entry)})`,
    ];
    this.#say(parts.filter((part) => part !== "").join(", "));
    if (this.options.json && !(this.#quiet && problems.every(({ key }) => known.has(key)))) {
      this.options.out(runJson(this.options.mode, this.#events, plan));
    }
    return problems.length > 0 || this.#alertFailed ? 1 : 0;
  }

  /** Prints what --cron holds back of a run that does not come to its end. */
  interrupted(): void {
    for (const { text } of this.#heldFailures) this.options.err(text);
  }

  #sayError(text: string): void {
    this.options.err(`${text}\n`);
  }

  /** Standard output for people; held back under --cron until something has changed. */
  #say(text: string): void {
    if (this.options.json) return; // the document has it
    if (this.#quiet) this.#held.push(text);
    else this.options.out(`${text}\n`);
  }

  /** Something changed: this, and whatever was held back, is worth being read. */
  #sayAloud(text: string): void {
    this.#quiet = false;
    for (const line of this.#held.splice(0)) this.options.out(`${line}\n`);
    this.#say(text);
  }

  /** `key` is that of the problem that this leads to. */
  #fail(key: string, subject: string, errors: readonly Error[]): void {
    const label = this.options.color ? "\x1b[31mFAILED\x1b[0m" : "FAILED";
    const lines = errors.flatMap((error) => [
      ...errorText(error).split("\n"),
      ...outputOf((error as Error & { output?: string }).output ?? ""),
    ]);
    this.#sayFailure(key, `${label}    ${subject}\n${lines.map((line) => `          ${line}\n`).join("")}`);
  }

  #sayFailure(key: string, text: string): void {
    this.#printed.add(key);
    if (this.options.cron && key !== "") this.#heldFailures.push({ key, text });
    else this.options.err(text);
  }

  #showProgress(): void {
    const { tasks, begun, done, failed } = this.#progress;
    const { columns, cron } = this.options;
    if (columns === undefined || cron || tasks < 2 || done === tasks) return;
    const text = `${done} of ${tasks} lines done, ${begun - done} in progress, ${failed} failed`;
    this.options.out(text.slice(0, Math.max(0, columns - 1)));
    this.#progressShown = true;
  }

  #clearProgress(): void {
    if (this.#progressShown) this.options.out("\r\x1b[K");
    this.#progressShown = false;
  }
}

function soonest(kept: readonly Kept[]): Kept | undefined {
  return kept.reduce<Kept | undefined>(
    (a, b) => a !== undefined && a.renewAt <= b.renewAt ? a : b,
    undefined,
  );
}

// ---- plan -------------------------------------------------------------------------------------------------

/** How many members of a group are named. */
const MOST_NAMED = 10;

/** What a run would do, grouped by reason; or what `--accept` would note as delivered. */
export function planText(plan: Plan, records: readonly string[], now: Date, accepts = false): string {
  const lines: string[] = [];
  const group = (
    verb: string,
    members: readonly (readonly [reason: string, what: string])[],
    noun: string,
  ) => {
    const groups = Map.groupBy(members, ([reason]) => reason);
    for (const [reason, group] of groups) {
      const whats = group.map(([, what]) => what);
      if (whats.length === 1) {
        lines.push(`${verb.padEnd(9)} ${whats[0]}: ${reason}`);
        continue;
      }
      const more = whats.length > MOST_NAMED ? [`and ${whats.length - MOST_NAMED} more`] : [];
      lines.push(`${verb.padEnd(9)} ${count(whats.length, noun)}: ${reason}`);
      for (const what of [...whats.slice(0, MOST_NAMED), ...more]) lines.push(`            ${what}`);
    }
  };
  const dues = (tasks: readonly Task[]) =>
    tasks.flatMap(({ line, due }) => {
      const reasons = Map.groupBy(due, ({ reason }) => reasonText(reason));
      return [...reasons].map(([reason, due]) =>
        [reason, subjectText(line.names, due.map(({ entry }) => entry.keyType))] as const
      );
    });
  const reasonsOf = ({ pending }: Delivery) => [...new Set(pending.map(({ reason }) => reason))].join(", ");
  if (accepts) {
    group("accept", plan.deliveries.map((one) => [reasonsOf(one), `[${one.section.name}]`]), "section");
    return lines.length === 0 ? "nothing is pending\n" : `${lines.join("\n")}\n`;
  }
  group("issue", dues(plan.tasks), "line");
  for (const task of plan.waiting) {
    const why = task.limited ? "rate-limited by the CA" : `failed: ${task.failure?.error}`;
    group(
      "wait",
      dues([task]).map(([reason, what]) => [`${reason}; until ${timeText(task.until)}, ${why}`, what]),
      "line",
    );
  }
  const isNow = ({ until }: Delivery) => until === undefined;
  const sections = (deliveries: readonly Delivery[]) =>
    deliveries.map((one) => {
      const wait = one.until === undefined ? "" : `; until ${timeText(one.until)}`;
      return [`${reasonsOf(one)}${wait}`, `[${one.section.name}]`] as const;
    });
  group("deliver", sections(plan.deliveries.filter((one) => isNow(one) && one.urgent)), "section");
  group("roll out", sections(plan.deliveries.filter((one) => isNow(one) && !one.urgent)), "section");
  group("wait", sections(plan.deliveries.filter((one) => !isNow(one))), "section");
  const due = plan.endpoints.filter(({ due }) => due);
  group(
    "probe",
    due.map(({ endpoint, keyType, record }) => [
      record === undefined
        ? "not probed yet"
        : record.badSince === undefined
        ? "probed more than six hours ago"
        : "not right when last probed",
      `${endpoint.text} (${keyType})`,
    ]),
    "endpoint",
  );
  group(
    "keep",
    plan.kept.map(({ entry, renewAt, rule }) => [
      `renewed ${untilText(renewAt, now)}, ${ruleText(rule)}`,
      entryText(entry),
    ]),
    "certificate",
  );
  for (const warning of plan.warnings) lines.push(`note      ${warningText(warning)}`);
  for (const record of records) lines.push(`place     ${record}`);
  for (const problem of plan.problems) lines.push(`problem   ${problemText(problem)}`);
  if (lines.length === 0) lines.push("nothing to do");
  return `${lines.join("\n")}\n`;
}

// ---- JSON -------------------------------------------------------------------------------------------------

/** Version of the JSON documents; their keys stay. Dates are ISO 8601, fingerprints SHA-256 in hexadecimal. */
export const JSON_VERSION = 1;

export function jsonText(document: object): string {
  return `${JSON.stringify({ version: JSON_VERSION, ...document }, undefined, 2)}\n`;
}

/** The one form of a certificate; what is unknown is absent. */
export function certificateJson({ line, keyType, files, finding, former }: Entry): object {
  const certificate = "certificate" in finding ? finding.certificate : former?.certificate;
  return {
    names: line.names,
    keyType,
    state: finding.kind,
    files,
    notBefore: certificate?.notBefore,
    notAfter: certificate?.notAfter,
    fingerprint: certificate?.fingerprint,
    issuer: certificate?.issuer,
  };
}

export function problemJson(problem: Problem): object {
  const { kind, key, alert, sections, lines } = problem;
  return { kind, key, text: problemText(problem), alert, sections, names: lines.map(({ names }) => names) };
}

export function deliveryJson({ section, pending, urgent, until, failure }: Delivery): object {
  return {
    section: section.name,
    certificates: pending.map(({ entry, reason }) => ({
      names: entry.line.names,
      keyType: entry.keyType,
      reason,
    })),
    urgent,
    until,
    failure: failure && {
      count: failure.count,
      since: failure.since,
      at: failure.at,
      error: failure.error,
      output: failure.output,
    },
  };
}

export function endpointJson({ endpoint, keyType, sections, sights, record, due }: EndpointStatus): object {
  return {
    endpoint: endpoint.text,
    keyType,
    sections: sections.map(({ name }) => name),
    probedAt: record?.at,
    badSince: record?.badSince,
    due,
    addresses: sights.map((sight) => ({
      address: sight.address,
      state: sight.verdict,
      text: sightText(sight),
      fingerprint: sight.certificate?.fingerprint,
      notAfter: sight.certificate?.notAfter,
      detail: sight.detail,
    })),
  };
}

const dueJson = ({ entry, reason }: Due) => ({ ...certificateJson(entry), reason: reasonText(reason) });

/** The plan as a document. */
export function planJson(mode: Mode, plan: Plan, records: readonly string[]): string {
  return jsonText({
    command: "plan",
    mode,
    issue: plan.tasks.flatMap(({ due }) => due.map(dueJson)),
    waiting: plan.waiting.flatMap(({ due, until, failure }) =>
      due.map((one) => ({ ...dueJson(one), until, failure: failure?.error }))
    ),
    keep: plan.kept.map(({ entry, renewAt, rule }) => ({ ...certificateJson(entry), renewAt, rule })),
    deliver: plan.deliveries.map(deliveryJson),
    probe: plan.endpoints.filter(({ due }) => due).map(endpointJson),
    records,
    problems: plan.problems.map(problemJson),
  });
}

/** A run as a document. */
function runJson(mode: Mode, events: readonly Event[], plan: Plan): string {
  const of = <K extends Event["kind"]>(kind: K) =>
    events.filter((event) => event.kind === kind) as Extract<Event, { kind: K }>[];
  const errorJson = (error: Error) => ({
    error: errorText(error),
    problem: (error as { problem?: unknown }).problem,
  });
  const failed = [
    ...of("failed").map(({ due, error }) => ({ due, error })),
    ...of("no CA").flatMap(({ tasks, error }) => tasks.map(({ due }) => ({ due, error }))),
  ];
  return jsonText({
    command: "run",
    mode,
    notes: of("notice").map(({ text }) => text),
    issued: of("issued").map(({ due, certificate, seconds }) => ({
      ...certificateJson(certificate),
      reason: reasonText(due.reason),
      seconds,
    })),
    failed: failed.map(({ due, error }) => ({
      names: due[0]!.entry.line.names,
      keyTypes: due.map(({ entry }) => entry.keyType),
      ...errorJson(error),
    })),
    delivered: of("delivered").map(({ delivered: { delivery, entries, commands, errors, endpoints } }) => ({
      section: delivery.section.name,
      reasons: [...new Set(delivery.pending.map(({ reason }) => reason))],
      certificates: entries.map(certificateJson),
      commands: commands.map(({ template, seconds }) => ({ command: template, seconds })),
      errors: errors.map((error) => ({ ...errorJson(error), output: error.output })),
      endpoints: endpoints.map(endpointJson),
    })),
    drift: of("drift").flatMap(({ section, endpoints }) =>
      endpoints.map((endpoint) => ({ section, ...endpointJson(endpoint) }))
    ),
    alerts: of("alert").map(({ alert, subject, text, error }) => ({
      section: alert.section.name,
      subject,
      text,
      ...(error && errorJson(error)),
    })),
    keep: plan.kept.map(({ entry, renewAt, rule }) => ({ ...certificateJson(entry), renewAt, rule })),
    waiting: plan.waiting.flatMap(({ due, until, failure }) =>
      due.map((one) => ({ ...dueJson(one), until, failure: failure?.error }))
    ),
    pending: plan.deliveries.map(deliveryJson),
    problems: plan.problems.map(problemJson),
  });
}
