/**
 * What a run prints: lines while it is running, its end, the plan, alerts, and the JSON documents of run and plan.
 *
 * Reads no files and no network. Texts from outside have been made safe to print where they came in.
 */

import type { AlertEvent, Delivered, DeliverEvent } from "./deliver.ts";
import type { Mode } from "./config.ts";
import { type EndpointStatus, isGood, isRight, wrongSights } from "./endpoints.ts";
import type { AccountEvent } from "./account.ts";
import type { IssueEvent } from "./issue.ts";
import type { Delivery, Plan, Problem } from "./plan.ts";
import { certificateOf, type Due, type Kept, type Task } from "./renewal.ts";
import type { Entry } from "./store.ts";
import {
  count,
  endpointText,
  entryText,
  errorText,
  outputOf,
  pendingText,
  problemLines,
  problemText,
  reasonText,
  RULE_TEXT,
  sightText,
  subjectText,
  timeText,
  untilText,
  warningText,
} from "./text.ts";

/** What happens in a run, as it happens. */
export type Event =
  | AccountEvent
  | IssueEvent
  | DeliverEvent
  /** `changed`: something has changed, so that --cron prints it, too. */
  | { readonly kind: "notice"; readonly text: string; readonly changed?: boolean }
  | { readonly kind: "begin"; readonly tasks: readonly Task[] }
  | { readonly kind: "issued"; readonly due: Due; readonly certificate: Entry; readonly seconds: number }
  | { readonly kind: "output"; readonly whose: string; readonly text: string }
  | AlertEvent;

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
  /** Problems that were printed in the last 20 hours, which `--cron` does not print again. */
  readonly known: ReadonlySet<string>;
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
      case "delivery":
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
    const { name } = delivery.section;
    for (const { template, seconds } of commands) {
      const text = `ran       [${name}] ${template} (${seconds.toFixed(1)} s)`;
      if (errors.length > 0) this.#print(text); // the failure is what --cron prints
      else this.#printChange(text);
    }
    if (errors.length > 0) {
      const failed = count(delivery.entries.length - entries.length, "certificate");
      this.#printErrors(`delivery ${name}`, `[${name}] delivery of ${failed}`, errors);
    } else {
      const what = count(entries.length, "certificate");
      this.#printChange(`delivered [${name}] ${what}: ${pendingText(delivery)}`);
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
  #printAlert({ alert: { section, problems, resolved }, subject, error }: AlertEvent) {
    if (error !== undefined) {
      this.#hasAlertFailed = true;
      return this.#printErrors("", `[${section.name}] alert`, [error]);
    }
    const texts = [...problems.length > 0 ? [subject] : [], ...resolved.map((what) => `resolved: ${what}`)];
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
    // not if only sections were selected
    const hasLines = tasks.length + waiting.length + kept.length > 0;
    const parts = [
      issued > 0 ? `${issued} issued` : hasLines && tasks.length + waiting.length === 0 ? "nothing due" : "",
      delivered > 0 ? `${count(delivered, "section")} delivered` : "",
      deliveries.length > 0 ? `${count(deliveries.length, "section")} pending` : "",
      hasLines ? `${Math.max(0, kept.length - issued)} kept` : "",
      problems.length > 0 ? count(problems.length, "problem") : "",
      next === undefined ? "" : `next renewal ${untilText(next.renewAt, now())} (${entryText(next.entry)})`,
    ];
    this.#print(parts.filter((part) => part !== "").join(", ") || "nothing to do");
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

/** How many members of a group are listed at most. */
const MOST_LISTED = 10;

/** One thing that a run would do, and why. */
interface Step {
  readonly verb: string;
  readonly what: string;
  /** What several of them are called. */
  readonly noun: string;
  readonly reason: string;
}

/** What a run would do, grouped by reason; with `accepts`, what --accept would note as delivered. */
export function planText(plan: Plan, records: readonly string[], now: Date, accepts = false): string {
  const lines = accepts ? grouped(plan.deliveries.map((one) => deliveryStep(one, "accept"))) : [
    ...grouped(stepsOf(plan, now)),
    ...plan.warnings.map((warning) => `note      ${warningText(warning)}`),
    ...records.map((record) => `place     ${record}`),
    ...plan.problems.map((problem) => `problem   ${problemText(problem)}`),
  ];
  if (lines.length === 0) lines.push(accepts ? "nothing that --accept would change" : "nothing to do");
  return `${lines.join("\n")}\n`;
}

function stepsOf({ tasks, waiting, deliveries, endpoints, kept }: Plan, now: Date): Step[] {
  const deliver = deliveries.map((one) =>
    deliveryStep(one, one.until !== undefined ? "wait" : one.urgent ? "deliver" : "roll out")
  );
  const ofVerb = (verb: string) => deliver.filter((step) => step.verb === verb);
  return [
    ...tasks.flatMap((task) => issueSteps(task, "issue", "")),
    ...waiting.flatMap((task) => {
      const why = task.limited ? "rate-limited by the CA" : `failed: ${task.failure?.error}`;
      return issueSteps(task, "wait", `; until ${timeText(task.until)}, ${why}`);
    }),
    ...["deliver", "roll out", "wait"].flatMap(ofVerb),
    ...endpoints.filter(({ due }) => due).map((one) => (
      { verb: "probe", what: endpointText([one]), noun: "endpoint", reason: probeReason(one) }
    )),
    ...kept.map(({ entry, renewAt, rule }) => {
      const reason = `renews ${untilText(renewAt, now)}, ${RULE_TEXT[rule]}`;
      return { verb: "keep", what: entryText(entry), noun: "certificate", reason };
    }),
  ];
}

function issueSteps({ line, due }: Task, verb: string, more: string): Step[] {
  return [...Map.groupBy(due, ({ reason }) => reasonText(reason))].map(([reason, due]) => {
    const what = subjectText(line.names, due.map(({ entry }) => entry.keyType));
    return { verb, what, noun: "line", reason: reason + more };
  });
}

function deliveryStep(delivery: Delivery, verb: string): Step {
  const { section, until } = delivery;
  const wait = verb === "wait" ? `; until ${timeText(until!)}` : "";
  return { verb, what: `[${section.name}]`, noun: "section", reason: pendingText(delivery) + wait };
}

/** A line for each step, or for all steps with the same reason, followed by their list. */
function grouped(steps: readonly Step[]): string[] {
  const groups = Map.groupBy(steps, ({ verb, noun, reason }) => `${verb} ${noun} ${reason}`);
  return [...groups.values()].flatMap((group) => {
    const { verb, what, noun, reason } = group[0]!;
    if (group.length === 1) return [`${verb.padEnd(9)} ${what}: ${reason}`];
    const more = group.length > MOST_LISTED ? [`and ${group.length - MOST_LISTED} more`] : [];
    const listed = [...group.slice(0, MOST_LISTED).map(({ what }) => what), ...more];
    const head = `${verb.padEnd(9)} ${count(group.length, noun)}: ${reason}`;
    return [head, ...listed.map((text) => `            ${text}`)];
  });
}

function probeReason(endpoint: EndpointStatus): string {
  if (endpoint.record === undefined) return "not probed yet";
  if (endpoint.record.badSince !== undefined) return "not right when last probed";
  return isRight(endpoint)
    ? "probed more than five hours ago"
    : "not probed since its certificate was issued";
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
    delivered: of("delivery").map(({ delivered: { delivery, entries, commands, errors, endpoints } }) => ({
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
