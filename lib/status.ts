/** The status as text: a table for people, a JSON document, Prometheus metrics. */

import type { Config } from "./config.ts";
import { isGood, isRight } from "./endpoints.ts";
import type { Plan } from "./plan.ts";
import { certificateOf } from "./renewal.ts";
import { certificateJson, deliveryJson, endpointJson, jsonText, problemJson } from "./report.ts";
import type { Entry } from "./store.ts";
import { printable } from "./names.ts";
import {
  count,
  dateText,
  durationText,
  nameText,
  problemLines,
  reasonText,
  RULE_TEXT,
  sightText,
  timeText,
  warningText,
} from "./text.ts";

/** All that a status shows. */
export interface Status {
  readonly config: Config;
  readonly now: Date;
  readonly plan: Plan;
  readonly inventory: readonly Entry[];
  /** Files that belong to no line, relative to `config.base`. */
  readonly orphans: readonly string[];
}

/** Exit status: 1 where there is a problem. */
export function exitStatus({ plan }: Status): 0 | 1 {
  return plan.problems.length > 0 ? 1 : 0;
}

/** What becomes of each certificate, and since when it is or will be due by its dates. */
function nextOf({ tasks, waiting, kept }: Plan): Map<Entry, { at?: Date; text: string }> {
  const next = new Map<Entry, { at?: Date; text: string }>();
  for (const { due } of tasks) {
    for (const { entry, reason, since } of due) {
      next.set(entry, { at: since, text: `next run: ${reasonText(reason)}` });
    }
  }
  for (const { due, until } of waiting) {
    for (const { entry, reason, since } of due) {
      next.set(entry, { at: since, text: `${timeText(until)}: ${reasonText(reason)}` });
    }
  }
  for (const { entry, renewAt, rule } of kept) {
    next.set(entry, { at: renewAt, text: `${dateText(renewAt)}, ${RULE_TEXT[rule]}` });
  }
  return next;
}

/** Least width of the last column of a table. */
const NARROWEST = 20;

/** A table as wide as the terminal; problems first. No name is broken: what does not fit goes on the next line. */
export function statusTable({ plan, inventory, orphans, now }: Status, columns = 80): string {
  const lines: string[] = [];
  const table = (head: readonly string[], rows: readonly (readonly string[])[]) => {
    if (rows.length === 0) return;
    const widths = head.map((title, column) =>
      Math.min(
        Math.max(title.length, ...rows.map((row) => row[column]!.length)),
        column === 0 ? Math.max(28, columns - 50) : Infinity,
      )
    );
    lines.push("", ...[head, ...rows].flatMap((row) => wrappedRow(row, widths, columns)));
  };
  const { problems, lastRun } = plan;
  lines.push(problems.length === 0 ? "no problems" : `${count(problems.length, "problem")}:`);
  for (const problem of problems) {
    const [text, ...output] = problemLines(problem);
    lines.push(...wrapped(text!, columns, "  ", "    "), ...output.map((line) => `    ${line}`));
  }

  for (const warning of plan.warnings) {
    lines.push(...wrapped(`warning: ${warningText(warning)}`, columns, "", "  "));
  }
  const next = nextOf(plan);
  const left = (entry: Entry) => (certificateOf(entry)?.notAfter.getTime() ?? 0) - now.getTime();
  const byLine = [...Map.groupBy(inventory, ({ line }) => line).values()]
    .map((entries) => ({ entries, first: Math.min(...entries.map(left)) }))
    .sort((a, b) => a.first - b.first);
  table(
    ["CERTIFICATE", "KEY", "EXPIRES IN", "RENEWED"],
    byLine.flatMap(({ entries }) => entries).map((entry) => [
      nameText(entry.line.names),
      entry.keyType,
      certificateOf(entry) === undefined ? "none" : left(entry) <= 0 ? "EXPIRED" : durationText(left(entry)),
      next.get(entry)?.text ?? "",
    ]),
  );
  table(
    ["PENDING DELIVERY", "CERTIFICATES", "WHEN", "WHY"],
    plan.deliveries.map(({ section, pending, until }) => [
      `[${section.name}]`,
      String(pending.length),
      until === undefined ? "next run" : timeText(until),
      [...new Set(pending.map(({ reason }) => reason))].join(", "),
    ]),
  );
  table(
    ["ENDPOINT", "KEY", "PROBED", "RESULT"],
    plan.endpoints.toSorted((a, b) => Number(isRight(a)) - Number(isRight(b))).flatMap((endpoint) =>
      (endpoint.sights.length === 0 ? ["not probed yet"] : endpoint.sights.map(sightText)).map((text) => [
        endpoint.endpoint.text,
        endpoint.keyType,
        endpoint.record === undefined
          ? "never"
          : `${durationText(now.getTime() - Date.parse(endpoint.record.at))} ago`,
        text,
      ])
    ),
  );
  if (orphans.length > 0) {
    lines.push(
      "",
      "ORPHANED FILES (--prune moves them away)",
      ...orphans.map((path) => `  ${printable(path, Infinity)}`),
    );
  }
  const run = lastRun === undefined
    ? "no full run yet"
    : `last full run ${timeText(lastRun)}, ${durationText(now.getTime() - lastRun.getTime())} ago`;
  return [...lines, "", ...wrapped(run, columns, "", "  "), ""].join("\n");
}

/**
 * Columns side by side, the last one wrapped. Where the terminal is too narrow for that, or the first cell for its column,
 * the first cell stands on a line of its own.
 */
function wrappedRow(row: readonly string[], widths: readonly number[], columns: number): string[] {
  const padded = row.slice(0, -1).map((text, column) => text.padEnd(widths[column]!));
  const last = row.at(-1)!;
  const indent = widths.slice(0, -1).reduce((sum, width) => sum + width + 2, 0);
  if (indent + NARROWEST > columns) {
    return [row[0]!, ...wrapped(`${padded.slice(1).join("  ")}  ${last}`, columns, "  ", "    ")];
  }
  const isTooLong = row[0]!.length > widths[0]!;
  const first = isTooLong ? " ".repeat(widths[0]!) : padded[0]!;
  const lines = wrapped(last, columns, `${[first, ...padded.slice(1)].join("  ")}  `, " ".repeat(indent));
  return isTooLong ? [row[0]!, ...lines] : lines;
}

/** Words on lines of at most `columns`; a word that is longer stands alone, whole, so that it can be copied. */
function wrapped(text: string, columns: number, first: string, hanging: string): string[] {
  const lines: string[] = [];
  let line = first;
  let isEmpty = true;
  for (const word of text.split(" ")) {
    if (!isEmpty && line.length + 1 + word.length > columns) {
      lines.push(line.trimEnd());
      line = hanging;
      isEmpty = true;
    }
    line += isEmpty ? word : ` ${word}`;
    isEmpty = false;
  }
  return [...lines, line.trimEnd()];
}

/** The status as a JSON document; see `JSON_VERSION`. */
export function statusJson({ config, now, plan, inventory, orphans }: Status): string {
  const next = nextOf(plan);
  return jsonText({
    command: "status",
    mode: config.mode,
    configuration: config.file,
    at: now,
    lastRun: plan.lastRun,
    runs: plan.runs,
    intervalSeconds: Math.round(plan.intervalMs / 1000),
    certificates: inventory.map((entry) => ({
      ...certificateJson(entry),
      renewAt: next.get(entry)?.at,
      renewal: next.get(entry)?.text,
      sections: entry.line.sections.map(({ name }) => name),
    })),
    pending: plan.deliveries.map(deliveryJson),
    endpoints: plan.endpoints.map(endpointJson),
    orphans,
    problems: plan.problems.map(problemJson),
  });
}

const ENDPOINT_DATES = [
  [
    "endpoint_not_before_seconds",
    "Since when the certificate is valid that an endpoint serves.",
    "notBefore",
  ],
  ["endpoint_not_after_seconds", "When the certificate expires that an endpoint serves.", "notAfter"],
] as const;

/** The status in the Prometheus text format (version 0.0.4), for a textfile collector. Times are Unix seconds. */
export function statusMetrics({ config, now, plan, inventory, orphans }: Status): string {
  const lines: string[] = [];
  type Sample = readonly [labels: Record<string, string>, value: number];
  const gauge = (name: string, help: string, samples: readonly Sample[]) => {
    lines.push(`# HELP lematt_${name} ${help}`, `# TYPE lematt_${name} gauge`);
    const series = new Map<string, number>(); // an address may answer in several ways: the lowest counts
    for (const [labels, value] of samples) {
      const text = Object.entries({ mode: config.mode, ...labels }).map(([key, text]) =>
        `${key}="${escaped(text)}"`
      );
      series.set(text.join(","), Math.min(value, series.get(text.join(",")) ?? Infinity));
    }
    for (const [labels, value] of series) lines.push(`lematt_${name}{${labels}} ${value}`);
  };
  const seconds = (date: Date) => Math.floor(date.getTime() / 1000);
  const label = ({ line, keyType, stem }: Entry) => ({ name: line.names[0]!, stem, key_type: keyType });
  const dated = (of: (entry: Entry) => Date | undefined) =>
    inventory.flatMap((entry): Sample[] => {
      const date = of(entry);
      return date === undefined ? [] : [[label(entry), seconds(date)]];
    });
  const next = nextOf(plan);
  const failing = [...plan.tasks, ...plan.waiting].flatMap(({ due, failure }) =>
    failure === undefined ? [] : due.map(({ entry }) => ({ entry, failure }))
  );
  const sights = plan.endpoints.flatMap((endpoint) => endpoint.sights.map((sight) => ({ endpoint, sight })));
  const place = ({ endpoint, sight }: typeof sights[number]) => ({
    endpoint: endpoint.endpoint.text,
    address: sight.address,
    key_type: endpoint.keyType,
  });
  gauge(
    "certificate_not_before_seconds",
    "Since when the certificate is valid.",
    dated((entry) => certificateOf(entry)?.notBefore),
  );
  gauge(
    "certificate_not_after_seconds",
    "When the certificate expires.",
    dated((entry) => certificateOf(entry)?.notAfter),
  );
  gauge(
    "certificate_renew_at_seconds",
    "When it is due for renewal; in the past where it is overdue.",
    dated((entry) => next.get(entry)?.at),
  );
  gauge(
    "certificate_failing_since_seconds",
    "Since when it cannot be issued.",
    failing.map(({ entry, failure }) => [label(entry), seconds(new Date(failure.since))]),
  );
  gauge(
    "delivery_pending_certificates",
    "Certificates that a section has to be given.",
    plan.deliveries.map(({ section, pending }) => [{ section: section.name }, pending.length]),
  );
  gauge(
    "delivery_failing_since_seconds",
    "Since when a delivery fails.",
    plan.deliveries.flatMap(({ section, failure }): Sample[] =>
      failure === undefined ? [] : [[{ section: section.name }, seconds(new Date(failure.since))]]
    ),
  );
  gauge(
    "endpoint_right",
    "Whether an endpoint serves the newest certificate.",
    sights.map((one) => [{ ...place(one), state: one.sight.verdict }, isGood(one.sight) ? 1 : 0]),
  );
  for (const [name, help, bound] of ENDPOINT_DATES) {
    gauge(
      name,
      help,
      sights.flatMap((one): Sample[] => {
        const { certificate } = one.sight;
        return certificate === undefined ? [] : [[place(one), seconds(new Date(certificate[bound]))]];
      }),
    );
  }
  gauge(
    "endpoint_probed_seconds",
    "When an endpoint was last probed.",
    plan.endpoints.flatMap(({ endpoint, keyType, record }): Sample[] =>
      record === undefined
        ? []
        : [[{ endpoint: endpoint.text, key_type: keyType }, seconds(new Date(record.at))]]
    ),
  );
  gauge("orphaned_files", "Files that belong to no line.", [[{}, orphans.length]]);
  const kinds = Map.groupBy(plan.problems, ({ kind }) => kind);
  gauge("problems", "Problems by kind.", [
    [{ kind: "all" }, plan.problems.length],
    ...[...kinds].map(([kind, problems]): Sample => [{ kind }, problems.length]),
  ]);
  gauge(
    "last_run_seconds",
    "When the last full run began.",
    plan.lastRun === undefined ? [] : [[{}, seconds(plan.lastRun)]],
  );
  gauge("run_interval_seconds", "How long it usually takes from one full run to the next.", [
    [{}, Math.round(plan.intervalMs / 1000)],
  ]);
  gauge("status_seconds", "When this was written.", [[{}, seconds(now)]]);
  return `${lines.join("\n")}\n`;
}

function escaped(text: string): string {
  return text.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");
}
