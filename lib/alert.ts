/** Alerts: which are due, their texts, and sending them with the `alert` commands of the sections. */

import { join } from "node:path";
import type { Config, ConfigError, Line, Mode, Section } from "./config.ts";
import type { Context } from "./context.ts";
import { optionsFor } from "./deliver.ts";
import { readIfPresent } from "./files.ts";
import { CommandError, type CommandOptions, runCommand } from "./hooks.ts";
import type { Plan, Problem } from "./plan.ts";
import { LONGEST_PAUSE_MS } from "./renewal.ts";
import { record, type State } from "./state.ts";
import { configErrorPath } from "./store.ts";
import { count, problemLines, problemName } from "./text.ts";

/** One alert of one section. */
export interface Alert {
  readonly section: Section;
  /** Those of which this section was not alerted in the last 20 hours. */
  readonly problems: readonly Problem[];
  /** What is well again. */
  readonly resolved: readonly string[];
}

/** An alert was sent, or failed. */
export interface AlertEvent {
  readonly kind: "alert";
  readonly alert: Alert;
  readonly subject: string;
  readonly text: string;
  readonly error?: Error;
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
 * Sends the alerts that are due and remembers them. An alert counts as sent if one of its commands succeeded: whom
 * that one reached is not alerted again because another one failed.
 */
export async function sendAlerts(
  { problems }: Plan,
  config: Config,
  state: State,
  context: Context,
  emit: (event: AlertEvent) => void,
): Promise<void> {
  const names = new Map(problems.map((problem) => [problem.key, problemName(problem)]));
  for (const alert of dueAlerts(config, problems, state, context.now())) {
    const { section } = alert;
    const { subject, text } = alertText(config, alert);
    const at = context.now().toISOString();
    const lines = alert.problems.flatMap(({ lines }) => lines);
    const options = { ...optionsFor(section, config, context), stdin: text };
    const { errors, isSent } = await runAlertCommands(section.alert, subject, lines, options);
    if (isSent) {
      const sent = state.alerts[section.name] ??= record({});
      for (const key of Object.keys(sent)) if (!names.has(key)) delete sent[key];
      for (const { key } of alert.problems) sent[key] = { at, what: names.get(key)! };
    }
    emit({ kind: "alert", alert, subject: subject.join(" "), text, error: errors[0] });
  }
}

/**
 * Sends the errors of a configuration with the `alert` commands that could be read. The same errors are sent once in 20
 * hours: a file beside the state, which is not read then, has the last ones. Returns the errors of the commands.
 */
export async function alertConfigError(
  { directory, alerts }: ConfigError,
  text: string,
  mode: Mode,
): Promise<CommandError[]> {
  if (alerts.length === 0) return []; // as when others may write to the directory
  const path = configErrorPath(join(directory!, mode));
  const isSame = readIfPresent(path) === text;
  if (isSame && Date.now() - Deno.statSync(path).mtime!.getTime() < LONGEST_PAUSE_MS) return [];
  const options = { mode, timeoutSeconds: 60, stdin: text };
  const results = await Promise.all(
    alerts.map(({ commands }) => runAlertCommands(commands, ["configuration", "not", "valid"], [], options)),
  );
  if (results.some(({ isSent }) => isSent)) {
    try {
      Deno.writeTextFileSync(path, text, { mode: 0o600 });
    } catch { /* then the next run sends it again */ }
  }
  return results.flatMap(({ errors }) => errors);
}

/** Subject (as words) and text of an alert. */
function alertText({ mode }: Config, { problems, resolved }: Alert): { subject: string[]; text: string } {
  const first = problems[0];
  const subject = first === undefined
    ? ["well", "again"]
    : [...`${count(problems.length, "problem")}:`.split(" "), first.lines[0]?.names[0] ?? "lematt"];
  const texts = problems.map((problem) => problemLines(problem).join("\n  "));
  const lines = [...texts, ...resolved.map((what) => `well again: ${what}`)];
  return { subject, text: `${lines.join("\n")}\n\nlematt --${mode} --status shows all of it.\n` };
}

/** Runs each of these commands, with the text of the alert on its standard input. */
async function runAlertCommands(
  commands: readonly string[],
  subject: readonly string[],
  lines: readonly Line[],
  options: CommandOptions,
): Promise<{ errors: CommandError[]; isSent: boolean }> {
  const values = {
    SUBJECT: subject,
    DOMAINS_CN: [...new Set(lines.map(({ names }) => names[0]!))],
    DOMAINS_ALL: [...new Set(lines.flatMap(({ names }) => names))],
  };
  const errors: CommandError[] = [];
  const templates = commands.filter((command) => command.trim() !== "");
  for (const template of templates) {
    try {
      await runCommand(template, values, options);
    } catch (error) {
      if (!(error instanceof CommandError)) throw error;
      errors.push(error);
    }
  }
  return { errors, isSent: errors.length < templates.length };
}
