/**
 * Who is to be told that something needs a person: at most once a day for one cause, and once when all is well again.
 *
 * A cause is a line that failed three times in a row, a certificate that should have been renewed and has less than a
 * third of its life left, or a delivery owed for a day. The words of an alert are report.ts's; this file knows when it is due.
 */

import { CommandError, commandLines, runCommand } from "./actions.ts";
import type { Config, Line, Section } from "./config.ts";
import { renewal } from "./plan.ts";
import type { Entry, State } from "./store.ts";

/** Something that needs a person. */
export type Cause =
  | { readonly kind: "failing"; readonly line: Line; readonly times: number; readonly error: string }
  | { readonly kind: "expiring"; readonly entry: Entry; readonly notAfter: Date }
  | {
    readonly kind: "owed";
    readonly section: string;
    /** Those whose certificates are owed. */
    readonly lines: readonly Line[];
    readonly since: Date;
    readonly error?: string;
  };

/** What an alert of one section says. */
export interface Alert {
  readonly section: Section;
  /** Empty where all is well again. */
  readonly causes: readonly Cause[];
}

const MOST_FAILURES = 2;
const LEAST_LIFE_LEFT = 1 / 3;
const DAY_MS = 86_400_000;

/** What needs a person in the lines and the debts of one section. */
export function causesOf(
  section: Section,
  config: Config,
  inventory: readonly Entry[],
  state: State,
  now: Date,
): Cause[] {
  const causes: Cause[] = [];
  const failing = new Set<string>();
  for (const entry of inventory) {
    if (!entry.line.sections.includes(section)) continue;
    const failure = state.failures[entry.stem];
    if (failure !== undefined && failure.count > MOST_FAILURES && !failing.has(entry.stem)) {
      failing.add(entry.stem);
      causes.push({ kind: "failing", line: entry.line, times: failure.count, error: failure.error });
    }
    const notAfter = expiring(entry, config, now);
    if (notAfter !== undefined) causes.push({ kind: "expiring", entry, notAfter });
  }
  const debt = state.owed[section.name];
  if (debt !== undefined && now.getTime() - Date.parse(debt.since) > DAY_MS) {
    const owed = new Set(Object.values(debt.certificates));
    const lines = inventory.filter(({ line, finding }) =>
      line.sections.includes(section) && "certificate" in finding && owed.has(finding.certificate.fingerprint)
    ).map(({ line }) => line);
    const { since, lastError: error } = debt;
    causes.push({ kind: "owed", section: section.name, lines, since: new Date(since), error });
  }
  return causes;
}

/** The end of a certificate that should have been renewed and has less than a third of its life left. */
export function expiring({ finding }: Entry, config: Config, now: Date): Date | undefined {
  if (finding.kind !== "present") return undefined;
  const { notBefore, notAfter } = finding.certificate;
  const lifeLeft = (notAfter.getTime() - now.getTime()) / (notAfter.getTime() - notBefore.getTime());
  return lifeLeft < LEAST_LIFE_LEFT && renewal(config, notBefore, notAfter).renewAt <= now
    ? notAfter
    : undefined;
}

/** The alerts that are due now. */
export function dueAlerts(config: Config, inventory: readonly Entry[], state: State, now: Date): Alert[] {
  return config.sections.filter(({ alert }) => alert.length > 0).flatMap((section) => {
    const causes = causesOf(section, config, inventory, state, now);
    const told = state.alerts[section.name] ?? {};
    const isNew = (cause: Cause) => now.getTime() - Date.parse(told[nameOf(cause)] ?? "1970-01-01") >= DAY_MS;
    const wellAgain = causes.length === 0 && Object.keys(told).length > 0;
    return wellAgain || causes.some(isNew) ? [{ section, causes }] : [];
  });
}

/**
 * Runs the commands of an alert with `text` on their standard input, and remembers what was told unless all of them
 * failed: who was reached is not told again today because another could not be. Returns the first failure.
 */
export async function send(
  { section, causes }: Alert,
  text: string,
  config: Config,
  state: State,
  now: Date,
  signal: AbortSignal,
): Promise<CommandError | undefined> {
  const lines = causes.flatMap(linesOf);
  const values = {
    DOMAINS_CN: [...new Set(lines.map(({ names }) => names[0]!))],
    DOMAINS_ALL: [...new Set(lines.flatMap(({ names }) => names))],
  };
  const options = { timeoutSeconds: config.commandTimeoutSeconds, stdin: text, signal };
  const failures: CommandError[] = [];
  for (const command of section.alert) {
    try {
      for (const line of commandLines(command, values)) await runCommand(line, options);
    } catch (error) {
      if (!(error instanceof CommandError)) throw error;
      failures.push(error);
    }
  }
  if (failures.length < section.alert.length) {
    if (causes.length === 0) delete state.alerts[section.name];
    else {
      const told = causes.map((cause) => [nameOf(cause), now.toISOString()]);
      state.alerts[section.name] = Object.fromEntries(told);
    }
  }
  return failures[0];
}

/** The lines that a cause is about. */
function linesOf(cause: Cause): readonly Line[] {
  switch (cause.kind) {
    case "failing":
      return [cause.line];
    case "expiring":
      return [cause.entry.line];
    case "owed":
      return cause.lines;
    default:
      return cause satisfies never;
  }
}

/** What a cause is remembered by. */
function nameOf(cause: Cause): string {
  switch (cause.kind) {
    case "failing":
      return `failing ${cause.line.names.join(" ")}`;
    case "expiring":
      return `expiring ${cause.entry.keyType} ${cause.entry.line.names.join(" ")}`;
    case "owed":
      return "owed";
    default:
      return cause satisfies never;
  }
}
