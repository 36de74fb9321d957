/**
 * Events and summaries become lines, JSON and a progress line: the only place where sentences for people are made.
 *
 * Knows no files and no network. What came from outside has been cleaned where it came in (acme.ts, actions.ts).
 */

import type { Mode, Notice } from "./config.ts";
import type { Delivery } from "./deliver.ts";
import type { Alert } from "./alert.ts";
import type { Due, Kept, Plan, Reason, Rule, Task, Waiting } from "./plan.ts";
import type { Debt, Entry } from "./store.ts";
import type { Served } from "./verify.ts";
import type { Certificate } from "./x509.ts";

/** What happens in a run, as it happens. */
export type Event =
  /** `changed`: something is not as it was, which is worth a word even under --cron. */
  | { readonly kind: "notice"; readonly text: string; readonly changed?: boolean }
  | { readonly kind: "account key"; readonly path: string; readonly how: "made" | "changed" }
  | {
    readonly kind: "plan";
    readonly plan: Plan;
    readonly owed: Readonly<Record<string, Debt>>;
    /** DNS records that must stand, as lines of a zone file. */
    readonly records: readonly string[];
  }
  | { readonly kind: "begin"; readonly tasks: readonly Task[] }
  | { readonly kind: "task"; readonly task: Task }
  | { readonly kind: "no CA"; readonly error: Error; readonly tasks: readonly Task[] }
  | {
    readonly kind: "issued";
    readonly due: Due;
    readonly certificate: Certificate;
    readonly seconds: number;
  }
  | { readonly kind: "failed"; readonly due: readonly Due[]; readonly error: Error }
  | { readonly kind: "end"; readonly task: Task }
  | { readonly kind: "delivery"; readonly delivery: Delivery }
  | {
    readonly kind: "alert";
    readonly section: string;
    readonly causes: Alert["causes"];
    readonly error?: Error;
  };

/** How a run ended, or in what state it would find everything. */
export interface Summary {
  /** Certificates that a run would issue now; 0 after one. */
  readonly due: number;
  readonly issued: number;
  readonly failed: number;
  readonly kept: readonly Kept[];
  readonly waiting: readonly Waiting[];
  readonly owed: Readonly<Record<string, Debt>>;
}

/** How to speak. */
export interface Manner {
  readonly mode: Mode;
  /** Nothing unless something changed or failed. */
  readonly cron: boolean;
  readonly json: boolean;
  /** Standard output is a terminal: a progress line is of use there. */
  readonly terminal: boolean;
  readonly color: boolean;
  readonly now: () => Date;
  readonly out: (text: string) => void;
  readonly err: (text: string) => void;
}

const DAY_MS = 86_400_000;

/** `lematt.conf:12: Cannot …`, and the hint on a line of its own. */
export function noticeText({ file, line, text, hint }: Notice): string {
  const where = line === undefined ? file : `${file}:${line}`;
  return `${where}: ${text}${hint === undefined ? "" : `\n  hint: ${hint}`}`;
}

/** A certificate's names, short: the primary and how many more there are. */
export function nameText(names: readonly string[]): string {
  return names.length === 1 ? names[0]! : `${names[0]} +${names.length - 1}`;
}

/** The certificates of one line, with their key types. */
function keyTypesText(due: readonly Due[]): string {
  return `${nameText(due[0]!.entry.line.names)} (${due.map(({ entry }) => entry.keyType).join(", ")})`;
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
          return "it did not match its key";
        default:
          return finding satisfies never;
      }
    }
    case "revoked":
      return `revoked ${dateText(reason.at)}`;
    case "expired":
      return `expired ${dateText(reason.at)}`;
    case "renewal":
      if (reason.rule === "ari") {
        const why = reason.explanationUrl === undefined ? "" : `, see ${reason.explanationUrl}`;
        return `the CA suggests ${dateText(reason.since)}${why}`;
      }
      return `due since ${dateText(reason.since)} by ${ruleText(reason.rule)}`;
    default:
      return reason satisfies never;
  }
}

/** Which setting decides, in the configuration's words. */
export function ruleText(rule: Rule): string {
  switch (rule) {
    case "age":
      return "generateNewCertsAfterDays";
    case "expiry":
      return "reauthorizeDays";
    case "expiry, capped":
      return "reauthorizeDays, capped";
    case "ari":
      return "the CA's suggestion";
    case "age beyond life":
      return "reauthorizeDays, since it does not live as long as generateNewCertsAfterDays";
    default:
      return rule satisfies never;
  }
}

/** The day, in UTC. */
export function dateText(date: Date): string {
  return date.toISOString().slice(0, 10);
}

/** The minute, in UTC. */
export function timeText(date: Date): string {
  return `${date.toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

function daysText(from: Date, to: Date): string {
  const days = (to.getTime() - from.getTime()) / DAY_MS;
  const count = days < 10 ? Math.round(days * 10) / 10 : Math.round(days);
  return `${count} ${count === 1 ? "day" : "days"}`;
}

function count(number: number, thing: string, things = `${thing}s`): string {
  return `${number} ${number === 1 ? thing : things}`;
}

/** Errors whose message says all. */
const KNOWN_ERRORS = [
  "AbortError",
  "ChallengeError",
  "CommandError",
  "LockedError",
  "SelectionError",
  "VerificationError",
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

/** What an alert says: a line for each cause, or that there is none any more in this section. */
export function alertText(section: string, causes: Alert["causes"]): string {
  if (causes.length === 0) return `[${section}] all is well again\n`;
  const lines = causes.map((cause) => {
    switch (cause.kind) {
      case "failing":
        return `${nameText(cause.line.names)} failed ${cause.times} times in a row: ${cause.error}`;
      case "expiring": {
        const { line, keyType } = cause.entry;
        return `${nameText(line.names)} (${keyType}) expires ${
          timeText(cause.notAfter)
        } and is not renewed yet`;
      }
      case "owed": {
        const error = cause.error === undefined ? "" : `: ${cause.error}`;
        return `[${cause.section}] owes a delivery since ${timeText(cause.since)}${error}`;
      }
      default:
        return cause satisfies never;
    }
  });
  return `${lines.join("\n")}\n`;
}

/** What a revocation is going to revoke. */
export function revocationText(mode: Mode, entries: readonly Entry[]): string {
  const lines = entries.map(({ line, keyType, finding }) => {
    if (!("certificate" in finding)) return "";
    const { fingerprint, notAfter } = finding.certificate;
    return `  ${keyType.padEnd(3)} ${fingerprint.slice(0, 16)}, until ${dateText(notAfter)}, for ${
      line.names.join(" ")
    }\n`;
  });
  return `These certificates of --${mode} are to be revoked for good:\n${lines.join("")}`;
}

/** What an endpoint serves, in words. */
export function servedText({ state, address, certificate, detail }: Served): string {
  const at = address === "" ? "" : ` at ${address}`;
  if (certificate === undefined) return `${state}${at}: ${detail ?? "no certificate"}`;
  const whose = state === "other" ? ` for ${nameText(certificate.names)}` : "";
  return `${state}${at}: ${certificate.fingerprint.slice(0, 16)}${whose}, until ${
    dateText(certificate.notAfter)
  }`;
}

/** What a failed command printed, set off from our own words. */
function outputOf(error: Error): string[] {
  const { output } = error as Error & { output?: string };
  return (output ?? "").trimEnd().split("\n").filter((line) => line !== "").slice(-20).map((line) =>
    `| ${line}`
  );
}

/** Speaks of a run while it goes on, and sums it up. */
export class Report {
  /** Standard output that waits, under --cron, for something worth being read. */
  #held: string[] = [];
  #quiet: boolean;
  #progress = { tasks: 0, begun: 0, done: 0, failed: 0 };
  #progressShown = false;
  /** Of lines that are not done yet. */
  #issued: Extract<Event, { kind: "issued" }>[] = [];
  readonly #events: Event[] = [];
  readonly #told = new Set<unknown>();
  /** What waits and what is owed has been told with the plan. */
  #planned = false;

  constructor(private readonly manner: Manner) {
    this.#quiet = manner.cron;
  }

  /** Takes in one event and says of it what there is to say. */
  tell(event: Event): void {
    if (this.manner.json) this.#events.push(event);
    this.#clearProgress();
    switch (event.kind) {
      case "notice":
        if (event.changed) this.#sayAloud(`note    ${event.text}`);
        else this.#say(`note    ${event.text}`);
        break;
      case "account key":
        this.#sayAloud(`${event.how.padEnd(8)}${event.path}, the account key (P-256); keep a copy of it`);
        break;
      case "plan":
        this.#planned = true;
        this.#sayPlan(event.plan, event.owed);
        for (const record of event.records) this.#say(`place   ${record}`);
        break;
      case "begin":
        this.#progress.tasks = event.tasks.length;
        break;
      case "task":
        this.#progress.begun++;
        break;
      case "no CA": {
        const [first] = event.tasks;
        const lines = `${count(event.tasks.length, "line")} of domains, from ${
          nameText(first!.line.names)
        } on`;
        this.#fail(lines, event.error);
        break;
      }
      case "issued":
        this.#issued.push(event);
        break;
      case "failed":
        this.#progress.failed++;
        this.#fail(keyTypesText(event.due), event.error);
        break;
      case "end":
        this.#progress.done++;
        this.#sayIssued(event.task);
        break;
      case "delivery":
        this.#sayDelivery(event.delivery);
        break;
      case "alert":
        if (event.error !== undefined) this.#fail(`[${event.section}] alert`, event.error);
        else {
          const text = alertText(event.section, event.causes);
          this.#sayAloud(`alert   ${text.trimEnd().replaceAll("\n", "\n        ")}`);
        }
        break;
      default:
        event satisfies never;
    }
    this.#showProgress();
  }

  /** One line for the certificates of a line of domains, where the same can be said of them. */
  #sayIssued(task: Task): void {
    const texts = new Map<string, string[]>();
    for (const { due, certificate } of this.#issued.filter(({ due }) => due.entry.line === task.line)) {
      const text = `until ${dateText(certificate.notAfter)} (${reasonText(due.reason)})`;
      texts.set(text, [...texts.get(text) ?? [], due.entry.keyType]);
    }
    this.#issued = this.#issued.filter(({ due }) => due.entry.line !== task.line);
    for (const [text, keyTypes] of texts) {
      this.#sayAloud(`issued  ${this.#subject(task.line.names, keyTypes.toSorted().toReversed())}  ${text}`);
    }
  }

  #sayDelivery({ section, commands, served, error }: Delivery): void {
    for (const { template, outcome } of commands) {
      if (this.#told.has(outcome)) continue; // shared with another section
      this.#told.add(outcome);
      this.#sayAloud(`ran     [${section}] ${template} (${outcome.seconds.toFixed(1)} s)`);
    }
    for (const each of served) {
      const text = `[${section}] ${each.endpoint} ${each.keyType}  ${servedText(each)}`;
      if (each.state === "current") this.#sayAloud(`serves  ${text}`);
      else this.#sayError(`WRONG   ${text}; expected ${each.expected.fingerprint.slice(0, 16)}`);
    }
    if (error === undefined || this.#told.has(error)) return;
    this.#told.add(error);
    this.#fail(`[${section}]`, error);
  }

  #sayPlan(plan: Plan, owed: Readonly<Record<string, Debt>>): void {
    for (const { line, due } of plan.tasks) {
      for (const { entry, reason } of due) {
        this.#say(`issue   ${this.#subject(line.names, [entry.keyType])}  ${reasonText(reason)}`);
      }
    }
    for (const { line, due, until, failure } of plan.waiting) {
      const why = failure === undefined
        ? "the CA wants no orders before"
        : `it failed (${failure.error}), not before`;
      for (const { entry, reason } of due) {
        this.#say(
          `wait    ${this.#subject(line.names, [entry.keyType])}  ${reasonText(reason)}; ${why} ${
            timeText(until)
          }`,
        );
      }
    }
    for (const { entry, renewAt, rule, notAfter } of plan.kept) {
      const when = `${dateText(renewAt)}, in ${daysText(this.manner.now(), renewAt)}`;
      this.#say(
        `keep    ${this.#subject(entry.line.names, [entry.keyType])}  ` +
          `until ${when} (${ruleText(rule)}); expires ${dateText(notAfter)}`,
      );
    }
    for (const [section, debt] of Object.entries(owed)) this.#say(`deliver ${this.#owedText(section, debt)}`);
  }

  #owedText(section: string, { certificates, since, retryAt, lastError }: Debt): string {
    const next = retryAt === undefined
      ? "next run"
      : `not before ${retryAt.slice(0, 16).replace("T", " ")} UTC`;
    const what = count(Object.keys(certificates).length, "certificate");
    return `[${section}] owes ${what} since ${since.slice(0, 10)}, tried again: ${next}` +
      (lastError === undefined ? "" : `; ${lastError}`);
  }

  #subject(names: readonly string[], keyTypes: readonly string[]): string {
    return `${nameText(names).padEnd(28)} ${keyTypes.join(" ").padEnd(6)}`;
  }

  /** Sums up and returns the exit status: 1 where something failed or is owed. */
  finish(summary: Summary): 0 | 1 {
    this.#clearProgress();
    const { due, issued, failed, kept, waiting, owed } = summary;
    const debts = Object.entries(owed);
    const capped = kept.filter(({ rule }) => rule === "expiry, capped").length;
    if (capped > 0) {
      this.#say(
        `note    reauthorizeDays is capped for ${count(capped, "certificate")}: none is renewed ` +
          `with more than two thirds of its life left (half, if that is under ten days)`,
      );
    }
    if (!this.#planned) {
      this.#sayWaiting(waiting);
      for (const [section, debt] of debts) this.#sayError(`owed    ${this.#owedText(section, debt)}`);
    }
    const next = kept.reduce<Kept | undefined>(
      (a, b) => a !== undefined && a.renewAt <= b.renewAt ? a : b,
      undefined,
    );
    const parts = [
      due > 0 ? `${due} due` : issued > 0 ? `${issued} issued` : failed > 0 ? "" : "nothing due",
      failed > 0 ? `${failed} failed` : "",
      waiting.length > 0 ? `${count(waiting.length, "line")} waiting` : "",
      `${kept.length} kept`,
      debts.length > 0 ? `${count(debts.length, "delivery", "deliveries")} owed` : "",
      next === undefined
        ? ""
        : `next renewal ${dateText(next.renewAt)} (${nameText(next.entry.line.names)} ${next.entry.keyType})`,
    ];
    this.#say(parts.filter((part) => part !== "").join(", "));
    const status = failed > 0 || waiting.length > 0 || debts.length > 0 ? 1 : 0;
    if (this.manner.json && !(this.#quiet && status === 0)) {
      this.manner.out(JSON.stringify(document(this.manner.mode, this.#events, summary), undefined, 2) + "\n");
    }
    return status;
  }

  /** Lines that wait, one by one where each has its own reason, together where the CA wants no orders. */
  #sayWaiting(waiting: readonly Waiting[]): void {
    const held = waiting.filter(({ failure }) => failure === undefined);
    if (held.length > 0) {
      const until = timeText(held[0]!.until);
      this.#sayError(
        `waiting ${count(held.length, "line")}: the CA wants no orders before ${until} (--retry asks now)`,
      );
    }
    for (const { line, until, failure } of waiting) {
      if (failure === undefined) continue;
      const again = `tried again from ${timeText(until)} (--retry tries now)`;
      this.#sayError(
        `waiting ${nameText(line.names)}: failed ${
          failure.count === 1 ? "once" : `${failure.count} times`
        }, ${again}`,
      );
    }
  }

  #sayError(text: string): void {
    this.manner.err(`${text}\n`);
  }

  /** Standard output for people; held back under --cron until something has changed. */
  #say(text: string): void {
    if (this.manner.json) return; // told by the document
    if (this.#quiet) this.#held.push(text);
    else this.manner.out(`${text}\n`);
  }

  /** Something changed: this, and whatever was held back, is worth being read. */
  #sayAloud(text: string): void {
    this.#quiet = false;
    for (const line of this.#held.splice(0)) this.manner.out(`${line}\n`);
    this.#say(text);
  }

  #fail(subject: string, error: Error): void {
    const label = this.manner.color ? "\x1b[31mFAILED\x1b[0m" : "FAILED";
    const lines = [...errorText(error).split("\n"), ...outputOf(error)];
    this.manner.err(`${label}  ${subject}\n${lines.map((line) => `        ${line}\n`).join("")}`);
  }

  #showProgress(): void {
    const { tasks, begun, done, failed } = this.#progress;
    if (!this.manner.terminal || this.manner.cron || tasks < 2 || done === tasks) return;
    const counts = `${done} of ${count(tasks, "line")} done, ${begun - done} in flight, ${failed} failed`;
    this.manner.out(counts);
    this.#progressShown = true;
  }

  #clearProgress(): void {
    if (this.#progressShown) this.manner.out("\r\x1b[K");
    this.#progressShown = false;
  }
}

/** The `--json` document. Dates are ISO 8601, fingerprints SHA-256 in hexadecimal. */
function document(mode: Mode, events: readonly Event[], { kept, waiting, owed }: Summary): object {
  const of = <K extends Event["kind"]>(kind: K) =>
    events.filter((event) => event.kind === kind) as Extract<Event, { kind: K }>[];
  const failure = (error: Error) => ({
    error: errorText(error),
    problem: (error as { problem?: unknown }).problem,
  });
  return {
    mode,
    notes: of("notice").map(({ text }) => text),
    due: of("plan").flatMap(({ plan }) => plan.tasks).flatMap(({ due }) => due).map(({ entry, reason }) => ({
      names: entry.line.names,
      keyType: entry.keyType,
      reason: reasonText(reason),
    })),
    issued: of("issued").map(({ due, certificate, seconds }) => ({
      names: due.entry.line.names,
      keyType: due.entry.keyType,
      reason: reasonText(due.reason),
      notAfter: certificate.notAfter,
      fingerprint: certificate.fingerprint,
      seconds,
    })),
    failed: [
      ...of("failed").map(({ due, error }) => ({
        names: due[0]!.entry.line.names,
        keyTypes: due.map(({ entry }) => entry.keyType),
        ...failure(error),
      })),
      ...of("no CA").flatMap(({ tasks, error }) =>
        tasks.map(({ line, due }) => ({
          names: line.names,
          keyTypes: due.map(({ entry }) => entry.keyType),
          ...failure(error),
        }))
      ),
    ],
    kept: kept.map(({ entry, renewAt, rule, notAfter }) => ({
      names: entry.line.names,
      keyType: entry.keyType,
      renewAt,
      rule,
      notAfter,
    })),
    waiting: waiting.map(({ line, due, until, failure }) => ({
      names: line.names,
      keyTypes: due.map(({ entry }) => entry.keyType),
      until,
      failure,
    })),
    deliveries: of("delivery").map(({ delivery: { section, entries, commands, served, error } }) => ({
      section,
      certificates: entries.map(({ line, keyType }) => ({ names: line.names, keyType })),
      commands: commands.map(({ outcome: { command, seconds } }) => ({ command, seconds })),
      endpoints: served.map(({ endpoint, address, keyType, state, certificate, detail }) => ({
        endpoint,
        address,
        keyType,
        state,
        fingerprint: certificate?.fingerprint,
        detail,
      })),
      ...(error !== undefined && failure(error)),
    })),
    alerts: of("alert").map(({ section, causes, error }) => ({
      section,
      text: alertText(section, causes),
      ...(error !== undefined && failure(error)),
    })),
    owed,
  };
}
