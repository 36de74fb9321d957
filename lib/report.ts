/**
 * What a run prints: lines while it is running, its end, the plan, alerts, and the JSON documents of run and plan.
 *
 * Reads no files and no network. Texts from outside have been made safe to print where they came in.
 */

import type { Config, Mode, Notice } from "./config.ts";
import type { Delivered, DeliverEvent } from "./deliver.ts";
import { type EndpointStatus, isGood, type JudgedSight, wrongSights } from "./endpoints.ts";
import type { IssueEvent } from "./issue.ts";
import type { Alert, Delivery, Plan, Problem, Warning } from "./plan.ts";
import {
  certificateOf,
  DAY_MS,
  type Due,
  HOUR_MS,
  type Kept,
  type Reason,
  type Rule,
  type Task,
} from "./renewal.ts";
import type { Entry } from "./store.ts";

/** What happens in a run, as it happens. */
export type Event =
  | IssueEvent
  | DeliverEvent
  /** `changed`: something has changed, so that --cron prints it, too. */
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
  /** Width of standard output if it is a terminal, which shows a progress line. */
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
  /** Problems that `--cron` printed in the last 20 hours, and does not print again. */
  readonly known: ReadonlySet<string>;
}

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

/** `12 days`, `5 hours`, `20 minutes`, `under a minute` */
export function durationText(ms: number): string {
  if (ms >= 3 * DAY_MS) return count(Math.floor(ms / DAY_MS), "day");
  if (ms >= 2 * HOUR_MS) return count(Math.floor(ms / HOUR_MS), "hour");
  return ms < 60_000 ? "under a minute" : count(Math.floor(ms / 60_000), "minute");
}

/** The day, or the minute if it is less than ten days away. */
function untilText(date: Date, now: Date): string {
  return Math.abs(date.getTime() - now.getTime()) >= 10 * DAY_MS ? dateText(date) : timeText(date);
}

/** `1 line`, `2 lines` */
export function count(number: number, thing: string): string {
  return `${number} ${thing}${number === 1 ? "" : "s"}`;
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
      return `due since ${dateText(reason.at)}, ${RULE_TEXT[reason.rule]}${why}`;
    }
    default:
      return reason satisfies never;
  }
}

/** What set the date of a renewal, in the words of the configuration. */
export const RULE_TEXT: Readonly<Record<Rule, string>> = {
  "age": "by generateNewCertsAfterDays",
  "expiry": "by reauthorizeDays",
  "expiry, capped": "by reauthorizeDays, capped",
  "life": "by its lifetime",
  "runs": "early enough for two more runs",
  "ari": "as the CA suggests",
};

/** What a person should know, in a sentence. */
export function warningText(warning: Warning): string {
  switch (warning.kind) {
    case "short life": {
      const { entry, lifeMs, intervalMs } = warning;
      return `the lifetime of ${entryText(entry)} is ${durationText(lifeMs)}, but runs are ${
        durationText(intervalMs)
      } apart: run lematt more often`;
    }
    case "other key":
      return `the key of ${
        entryText(warning.entry)
      } is not as configured; the next renewal makes one that is`;
    case "no key":
      return `${warning.entry.files.key} is missing, so a new certificate is issued; ` +
        "a command that moves keys away makes every run do so";
    case "not renewed": {
      const { section, file, notAfter } = warning;
      return `[${section}] was given ${file}, which is no longer renewed and expires ${timeText(notAfter)} ` +
        "(--prune forgets it)";
    }
    case "nothing to deliver": {
      const { what } = warning;
      const name = typeof what === "string" ? `[${what}]` : what.names[0];
      return `nothing to deliver for ${name}: it has no command, or no certificate`;
    }
    default:
      return warning satisfies never;
  }
}

/** `www.example.com:443 (rsa, ec)` */
function endpointText(endpoints: readonly EndpointStatus[]): string {
  const keyTypes = [...new Set(endpoints.map(({ keyType }) => keyType))];
  return `${endpoints[0]!.endpoint.text} (${keyTypes.join(", ")})`;
}

/** What an address serves. */
export function sightText(sight: JudgedSight): string {
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

/** What a problem is about, without its cause. */
export function problemName(problem: Problem): string {
  switch (problem.kind) {
    case "CA":
      return `issuance of ${count(problem.lines.length, "line")}`;
    case "disk":
      return "writing files";
    case "clock":
      return "this host's clock";
    case "failing":
      return `issuance of ${nameText(problem.lines[0]!.names)}`;
    case "rate-limited":
      return `${count(problem.lines.length, "line")} rate-limited by the CA`;
    case "overdue":
      return `renewal of ${entryText(problem.entry)}`;
    case "delivery": {
      const { section, pending } = problem.delivery;
      return `[${section.name}] delivery of ${count(pending.length, "certificate")}`;
    }
    case "endpoint":
      return endpointText(problem.endpoints);
    case "not run":
      return "runs of lematt";
    default:
      return problem satisfies never;
  }
}

/** A problem in a sentence. */
export function problemText(problem: Problem): string {
  const name = problemName(problem);
  switch (problem.kind) {
    case "CA": {
      const { failure, lines, notAfter } = problem;
      const times = failure.count === 1
        ? ""
        : `, ${failure.count} times since ${timeText(new Date(failure.since))}`;
      return `${count(lines.length, "line")} not issued${times}: ${failure.error}` +
        expiryText("the first certificate", notAfter);
    }
    case "disk": {
      const { error, notAfter } = problem;
      if (!isSystemError(error)) return `cannot run: ${errorText(error)}`;
      return `cannot write files: ${errorText(error)}; nothing is issued until that is repaired` +
        expiryText("the first certificate", notAfter);
    }
    case "clock": {
      const { now, evidence: { of, at }, notAfter } = problem;
      const other = {
        CA: "the CA's",
        certificate: "but a certificate is valid from",
        run: "but lematt has run at",
      }[of];
      return `this host's clock says ${timeText(now)}, ${other} ${timeText(at)}` +
        expiryText("the first certificate", notAfter);
    }
    case "failing": {
      const { failure, lines, notAfter } = problem;
      const times = failure.count === 1 ? "failed" : `failed ${failure.count} times in a row`;
      return `${nameText(lines[0]!.names)} ${times}: ${failure.error}${retryText(failure)}` +
        expiryText("its certificate", notAfter);
    }
    case "rate-limited":
      return `${name} until ${timeText(problem.until)} (--retry: now)`;
    case "overdue":
      return problem.entry.finding.kind === "revoked"
        ? `${entryText(problem.entry)} was revoked and is not replaced yet`
        : `${entryText(problem.entry)} is overdue for renewal and expires ${timeText(problem.notAfter)}`;
    case "delivery": {
      const { failure, servedUntil } = problem;
      return `${name} pending since ${timeText(new Date(failure.since))}: ${failure.error}` +
        retryText(failure) + expiryText("the certificate that is served", servedUntil);
    }
    case "endpoint":
      return `${name} ${sightText(problem.sight)}, wrong since ${timeText(problem.since)}`;
    case "not run":
      return `lematt --prod has not run since ${timeText(problem.since)}`;
    default:
      return problem satisfies never;
  }
}

function retryText({ retryAt }: { readonly retryAt?: string }): string {
  return retryAt === undefined ? "" : `; tried again from ${timeText(new Date(retryAt))} (--retry: now)`;
}

/** A problem, and the end of what a command printed that is its cause. */
export function problemLines(problem: Problem): string[] {
  return [problemText(problem), ...problem.kind === "delivery" ? outputOf(problem.failure.output ?? "") : []];
}

/** Errors whose message is enough; of any other, a bug, the stack is shown. */
const EXPECTED_ERRORS = [
  "AbortError",
  "AcmeError",
  "ChallengeError",
  "CommandError",
  "LockedError",
  "SelectionError",
  "StateError",
];

export function isExpected(error: Error): boolean {
  return EXPECTED_ERRORS.includes(error.name) || isSystemError(error);
}

/** An error as a person should see it: the CA's words with their step; a bug with its stack. */
export function errorText(error: Error): string {
  const { name, message, stack } = error;
  if (name === "AcmeError") return `cannot ${(error as Error & { step: string }).step}: ${message}`;
  return isExpected(error) ? message : stack ?? String(error);
}

/** Whether the system refused something. Deno gives most of these errors a code, but not all: ENOLCK has none. */
export function isSystemError(error: Error): boolean {
  const { code } = error as { code?: string };
  return code !== undefined || error instanceof Deno.errors.NotFound ||
    /\(os error \d+\)/.test(error.message);
}

/** Subject (as words) and text of an alert. */
export function alertOf(
  { mode }: Config,
  { problems, resolved }: Alert,
): { subject: string[]; text: string } {
  const first = problems[0];
  const subject = first === undefined
    ? ["well", "again"]
    : [...`${count(problems.length, "problem")}:`.split(" "), first.lines[0]?.names[0] ?? "lematt"];
  const texts = problems.map((problem) => problemLines(problem).join("\n  "));
  const lines = [...texts, ...resolved.map((what) => `well again: ${what}`)];
  return { subject, text: `${lines.join("\n")}\n\nlematt --${mode} --status shows all of it.\n` };
}

/** The end of what a failed command printed, marked as such. */
function outputOf(output: string): string[] {
  return output.trimEnd().split("\n").filter((line) => line !== "").slice(-20).map((line) => `| ${line}`);
}

// ---- lines ------------------------------------------------------------------------------------------------

/** Prints a run while it is running, and its end. */
export class Report {
  /** Under --cron, until something changes: the lines that are printed then. */
  #unprinted: string[] | undefined;
  /** Under --cron: failures, printed at the end unless they were printed in the last 20 hours. */
  readonly #failures: { readonly key: string; readonly text: string }[] = [];
  /** Problems that need no line at the end, since their failure is printed. */
  readonly #reported = new Set<string>();
  /** Each round of probes may give the same notice. */
  readonly #notices = new Set<string>();
  readonly #events: Event[] = [];
  #issued: Extract<Event, { kind: "issued" }>[] = [];
  #progress = { tasks: 0, begun: 0, done: 0, failed: 0 };
  #isProgressShown = false;
  #hasAlertFailed = false;

  constructor(private readonly options: OutputOptions) {
    if (options.cron) this.#unprinted = [];
  }

  /** Takes one event and prints what a person should know of it. */
  emit(event: Event): void {
    if (event.kind === "notice" && this.#notices.has(event.text)) return;
    if (this.options.json) this.#events.push(event);
    this.#clearProgress();
    switch (event.kind) {
      case "notice":
        this.#notices.add(event.text);
        if (event.changed) this.#printChange(`note      ${event.text}`);
        else this.#print(`note      ${event.text}`);
        break;
      case "account key":
        this.#printChange(`${event.how.padEnd(10)}${event.path}, the account key (P-256); keep a copy of it`);
        break;
      case "begin":
        this.#progress.tasks = event.tasks.length;
        break;
      case "task":
        this.#progress.begun++;
        break;
      case "no CA":
        this.#printErrors("CA", `${count(event.tasks.length, "line")} of domains`, [event.error]);
        break;
      case "issued":
        this.#issued.push(event);
        break;
      case "failed": {
        this.#progress.failed++;
        const { line } = event.due[0]!.entry;
        const subject = subjectText(line.names, event.due.map(({ entry }) => entry.keyType));
        this.#printErrors(`failing ${line.names.join(" ")}`, subject, [event.error]);
        break;
      }
      case "end":
        this.#progress.done++;
        this.#printIssued(event.task);
        break;
      case "drift":
        for (const { endpoints, sight } of wrongSights(event.endpoints)) {
          this.#printChange(`drift     [${event.section}] ${endpointText(endpoints)} ${sightText(sight)}`);
        }
        break;
      case "delivered":
        this.#printDelivered(event.delivered);
        break;
      case "output":
        for (const line of event.text.trimEnd().split("\n")) {
          this.#print(`          ${event.whose} | ${line}`);
        }
        break;
      case "alert":
        this.#printAlert(event);
        break;
      default:
        event satisfies never;
    }
    this.#showProgress();
  }

  /** One line for the certificates of a line of domains that have the same dates and reason. */
  #printIssued(task: Task): void {
    const texts = new Map<string, string[]>();
    const own = this.#issued.filter(({ due }) => due.entry.line === task.line);
    for (const { due, certificate } of own) {
      const until = untilText(certificateOf(certificate)!.notAfter, this.options.now());
      const text = `until ${until}: ${reasonText(due.reason)}`;
      texts.set(text, [...texts.get(text) ?? [], due.entry.keyType]);
    }
    this.#issued = this.#issued.filter((one) => !own.includes(one));
    for (const [text, keyTypes] of texts) {
      this.#printChange(
        `issued    ${subjectText(task.line.names, keyTypes.toSorted().toReversed())} ${text}`,
      );
    }
  }

  #printDelivered({ delivery, entries, commands, errors, endpoints }: Delivered): void {
    const { section: { name }, pending } = delivery;
    for (const { template, seconds } of commands) {
      const text = `ran       [${name}] ${template} (${seconds.toFixed(1)} s)`;
      if (errors.length > 0) this.#print(text); // the failure is what --cron prints
      else this.#printChange(text);
    }
    if (errors.length > 0) {
      const failed = count(delivery.entries.length - entries.length, "certificate");
      this.#printErrors(`delivery ${name}`, `[${name}] delivery of ${failed}`, errors);
    } else {
      const reasons = [...new Set(pending.map(({ reason }) => reason))].join(", ");
      this.#printChange(`delivered [${name}] ${count(entries.length, "certificate")}: ${reasons}`);
    }
    for (const { key, endpoints: wrong, sight } of wrongSights(endpoints)) {
      this.#printFailure(key, `WRONG     [${name}] ${endpointText(wrong)} ${sightText(sight)}\n`);
    }
    for (const endpoint of endpoints) {
      const wrong = endpoint.sights.filter((sight) => !isGood(sight)).map(({ address }) => address);
      for (const sight of endpoint.sights.filter(({ address }) => !wrong.includes(address))) {
        this.#printChange(`verified  [${name}] ${endpointText([endpoint])} ${sightText(sight)}`);
      }
    }
  }

  /** The section that an alert was sent to, and its subject; the problems are printed anyway. */
  #printAlert({ alert: { section, problems, resolved }, subject, error }: Extract<Event, { kind: "alert" }>) {
    if (error !== undefined) {
      this.#hasAlertFailed = true;
      return this.#printErrors("", `[${section.name}] alert`, [error]);
    }
    const texts = [...problems.length > 0 ? [subject] : [], ...resolved.map((what) => `well again: ${what}`)];
    for (const text of texts) this.#printChange(`alert     [${section.name}] ${text}`);
  }

  /** Prints the end of a run and returns the exit status: 1 if there is a problem. */
  finish({ plan, issued, delivered, known }: Ended): 0 | 1 {
    const { mode, cron, json, now, out, err } = this.options;
    this.#clearProgress();
    const { problems, kept, tasks, waiting, deliveries } = plan;
    for (const { key, text } of this.#failures) if (!known.has(key)) err(text);
    for (const problem of problems) {
      if (this.#reported.has(problem.key) || (cron && known.has(problem.key))) continue;
      err(`problem   ${problemLines(problem).join("\n          ")}\n`);
    }
    const next = kept.reduce<Kept | undefined>((a, b) => a && a.renewAt <= b.renewAt ? a : b, undefined);
    const parts = [
      issued > 0 ? `${issued} issued` : tasks.length + waiting.length === 0 ? "nothing due" : "",
      delivered > 0 ? `${count(delivered, "section")} delivered` : "",
      deliveries.length > 0 ? `${count(deliveries.length, "section")} pending` : "",
      `${Math.max(0, kept.length - issued)} kept`,
      problems.length > 0 ? count(problems.length, "problem") : "",
      next === undefined ? "" : `next renewal ${untilText(next.renewAt, now())} (${entryText(next.entry)})`,
    ];
    this.#print(parts.filter((part) => part !== "").join(", "));
    const isQuiet = this.#unprinted !== undefined && problems.every(({ key }) => known.has(key));
    if (json && !isQuiet) out(runJson(mode, this.#events, plan));
    return problems.length > 0 || this.#hasAlertFailed ? 1 : 0;
  }

  /** Prints the failures so far of a run that does not come to its end. */
  interrupted(): void {
    for (const { text } of this.#failures) this.options.err(text);
  }

  /** A line for people; --cron prints it only if something changes. */
  #print(text: string): void {
    if (this.options.json) return; // the document has it
    if (this.#unprinted !== undefined) this.#unprinted.push(text);
    else this.options.out(`${text}\n`);
  }

  /** A change, which --cron prints, too, and all lines before it. */
  #printChange(text: string): void {
    for (const line of this.#unprinted ?? []) this.options.out(`${line}\n`);
    this.#unprinted = undefined;
    this.#print(text);
  }

  /** `key` is that of the problem that the errors lead to. */
  #printErrors(key: string, subject: string, errors: readonly Error[]): void {
    const label = this.options.color ? "\x1b[31mFAILED\x1b[0m" : "FAILED";
    const lines = errors.flatMap((error) => [
      ...errorText(error).split("\n"),
      ...outputOf((error as Error & { output?: string }).output ?? ""),
    ]);
    this.#printFailure(key, `${label}    ${subject}\n${lines.map((line) => `          ${line}\n`).join("")}`);
  }

  #printFailure(key: string, text: string): void {
    this.#reported.add(key);
    if (this.options.cron && key !== "") this.#failures.push({ key, text });
    else this.options.err(text);
  }

  #showProgress(): void {
    const { tasks, begun, done, failed } = this.#progress;
    const { columns, cron } = this.options;
    if (columns === undefined || cron || tasks < 2 || done === tasks) return;
    const text = `${done} of ${tasks} lines done, ${begun - done} in progress, ${failed} failed`;
    this.options.out(text.slice(0, Math.max(0, columns - 1)));
    this.#isProgressShown = true;
  }

  #clearProgress(): void {
    if (this.#isProgressShown) this.options.out("\r\x1b[K");
    this.#isProgressShown = false;
  }
}

// ---- plan -------------------------------------------------------------------------------------------------

/** How many members of a group are listed. */
const MOST_LISTED = 10;

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
      const more = whats.length > MOST_LISTED ? [`and ${whats.length - MOST_LISTED} more`] : [];
      lines.push(`${verb.padEnd(9)} ${count(whats.length, noun)}: ${reason}`);
      for (const what of [...whats.slice(0, MOST_LISTED), ...more]) lines.push(`            ${what}`);
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
      `renewed ${untilText(renewAt, now)}, ${RULE_TEXT[rule]}`,
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

/** A certificate in all documents; what is unknown is absent. */
export function certificateJson(entry: Entry): object {
  const { line, keyType, files, finding } = entry;
  const certificate = certificateOf(entry);
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

const waitingJson = ({ waiting }: Plan) =>
  waiting.flatMap(({ due, until, failure }) =>
    due.map((one) => ({ ...dueJson(one), until, failure: failure?.error }))
  );

const keptJson = ({ kept }: Plan) =>
  kept.map(({ entry, renewAt, rule }) => ({ ...certificateJson(entry), renewAt, rule }));

/** The plan as a document. */
export function planJson(mode: Mode, plan: Plan, records: readonly string[]): string {
  return jsonText({
    command: "plan",
    mode,
    issue: plan.tasks.flatMap(({ due }) => due.map(dueJson)),
    waiting: waitingJson(plan),
    keep: keptJson(plan),
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
    keep: keptJson(plan),
    waiting: waitingJson(plan),
    pending: plan.deliveries.map(deliveryJson),
    problems: plan.problems.map(problemJson),
  });
}
