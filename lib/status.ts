/** The status as text: a table for people, a JSON document, Prometheus metrics. */

import type { Config } from "./config.ts";
import { isGood, isRight, type JudgedSight } from "./endpoints.ts";
import type { Plan } from "./plan.ts";
import { certificateOf, moment } from "./renewal.ts";
import { certificateJson, deliveryJson, endpointJson, jsonText, problemJson } from "./report.ts";
import type { Entry } from "./store.ts";
import { printable } from "./names.ts";
import {
  count,
  dateText,
  durationText,
  nameText,
  pendingText,
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

/** Exit status: 1 if there is a problem. */
export function exitStatus({ plan }: Status): 0 | 1 {
  return plan.problems.length > 0 ? 1 : 0;
}

/** When each certificate is renewed and why, and since when it is due (or will be) by its dates. */
function nextOf({ tasks, waiting, kept }: Plan): Map<Entry, { at?: Date; text: string }> {
  const next = new Map<Entry, { at?: Date; text: string }>();
  const all = [
    ...tasks.map(({ due }) => ({ due, when: "next run" })),
    ...waiting.map(({ due, until }) => ({ due, when: timeText(until) })),
  ];
  for (const { due, when } of all) {
    for (const { entry, reason, since } of due) {
      next.set(entry, { at: since, text: `${when}: ${reasonText(reason)}` });
    }
  }
  for (const { entry, renewAt, rule } of kept) {
    next.set(entry, { at: renewAt, text: `${dateText(renewAt)}, ${RULE_TEXT[rule]}` });
  }
  return next;
}

/** Least width of the last column of a table. */
const NARROWEST = 20;

/** A table as wide as the terminal; problems first. Names are not broken. */
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
    lines.push(...wrapped(`note: ${warningText(warning)}`, columns, "", "  "));
  }
  const next = nextOf(plan);
  const left = (entry: Entry) => (certificateOf(entry)?.notAfter.getTime() ?? 0) - now.getTime();
  const byLine = [...Map.groupBy(inventory, ({ line }) => line).values()]
    .map((entries) => ({ entries, first: Math.min(...entries.map(left)) }))
    .sort((a, b) => a.first - b.first);
  table(
    ["CERTIFICATE", "KEY", "EXPIRES IN", "RENEWS"],
    byLine.flatMap(({ entries }) => entries).map((entry) => [
      nameText(entry.line.names),
      entry.keyType,
      certificateOf(entry) === undefined ? "none" : left(entry) <= 0 ? "EXPIRED" : durationText(left(entry)),
      next.get(entry)?.text ?? "",
    ]),
  );
  table(
    ["PENDING DELIVERY", "CERTIFICATES", "WHEN", "WHY"],
    plan.deliveries.map((delivery) => [
      `[${delivery.section.name}]`,
      String(delivery.pending.length),
      delivery.until === undefined ? "next run" : timeText(delivery.until),
      pendingText(delivery),
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
 * Columns side by side, the last one wrapped. If the terminal is too narrow, or the column of the first cell, the
 * first cell gets a line of its own.
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

/** Words on lines of at most `columns`; a longer word stays whole, so that it can be copied. */
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

/** One value of a metric; a date is written in Unix seconds, and a value that is unknown is left out. */
type Sample = readonly [labels: Record<string, string>, value: number | Date | undefined];

/** The status in the Prometheus text format (version 0.0.4), for a textfile collector. */
export function statusMetrics(status: Status): string {
  const lines: string[] = [];
  for (const [name, help, samples] of metricsOf(status)) {
    lines.push(`# HELP lematt_${name} ${help}`, `# TYPE lematt_${name} gauge`);
    const series = new Map<string, number>(); // an address may answer in several ways: the lowest counts
    for (const [labels, value] of samples) {
      if (value === undefined) continue;
      const number = typeof value === "number" ? value : Math.floor(value.getTime() / 1000);
      const text = Object.entries({ mode: status.config.mode, ...labels })
        .map(([key, text]) => `${key}="${escaped(text)}"`).join(",");
      series.set(text, Math.min(number, series.get(text) ?? Infinity));
    }
    for (const [labels, value] of series) lines.push(`lematt_${name}{${labels}} ${value}`);
  }
  return `${lines.join("\n")}\n`;
}

/** All metrics: name, help, samples. */
function metricsOf({ now, plan, inventory, orphans }: Status): [string, string, Sample[]][] {
  const next = nextOf(plan);
  const ofCertificates = (of: (entry: Entry) => Date | undefined) =>
    inventory.map((entry): Sample => [labelsOf(entry), of(entry)]);
  const failing = [...plan.tasks, ...plan.waiting].filter(({ failure }) => failure !== undefined);
  const ofAddresses = (of: (sight: JudgedSight) => readonly [Record<string, string>, Sample[1]]) =>
    plan.endpoints.flatMap(({ endpoint, keyType, sights }) =>
      sights.map((sight): Sample => {
        const [labels, value] = of(sight);
        const { address } = sight;
        return [{ endpoint: endpoint.text, address, key_type: keyType, ...labels }, value];
      })
    );
  const problems = Map.groupBy(plan.problems, ({ kind }) => kind);
  return [
    [
      "certificate_not_before_seconds",
      "When the validity of the certificate begins.",
      ofCertificates((entry) => certificateOf(entry)?.notBefore),
    ],
    [
      "certificate_not_after_seconds",
      "When the certificate expires.",
      ofCertificates((entry) => certificateOf(entry)?.notAfter),
    ],
    [
      "certificate_renew_at_seconds",
      "When the certificate is due for renewal; in the past if it is overdue.",
      ofCertificates((entry) => next.get(entry)?.at),
    ],
    [
      "certificate_failing_since_seconds",
      "Since when the certificate cannot be issued.",
      failing.flatMap(({ due, failure }) =>
        due.map(({ entry }): Sample => [labelsOf(entry), moment(failure?.since)])
      ),
    ],
    [
      "delivery_pending_certificates",
      "Certificates to be delivered to a section.",
      plan.deliveries.map(({ section, pending }) => [{ section: section.name }, pending.length]),
    ],
    [
      "delivery_failing_since_seconds",
      "Since when a delivery fails.",
      plan.deliveries.map(({ section, failure }) => [{ section: section.name }, moment(failure?.since)]),
    ],
    [
      "endpoint_right",
      "Whether an endpoint serves the newest certificate.",
      ofAddresses((sight) => [{ state: sight.verdict }, isGood(sight) ? 1 : 0]),
    ],
    [
      "endpoint_not_before_seconds",
      "When the validity of the served certificate begins.",
      ofAddresses(({ certificate }) => [{}, moment(certificate?.notBefore)]),
    ],
    [
      "endpoint_not_after_seconds",
      "When the served certificate expires.",
      ofAddresses(({ certificate }) => [{}, moment(certificate?.notAfter)]),
    ],
    [
      "endpoint_probed_seconds",
      "When an endpoint was last probed.",
      plan.endpoints.map(({ endpoint, keyType, record }) => [
        { endpoint: endpoint.text, key_type: keyType },
        moment(record?.at),
      ]),
    ],
    ["orphaned_files", "Files that belong to no line.", [[{}, orphans.length]]],
    ["problems", "Problems by kind.", [
      [{ kind: "all" }, plan.problems.length],
      ...[...problems].map(([kind, { length }]): Sample => [{ kind }, length]),
    ]],
    ["last_run_seconds", "When the last full run began.", [[{}, plan.lastRun]]],
    ["run_interval_seconds", "How long it usually takes from one full run to the next.", [
      [{}, Math.round(plan.intervalMs / 1000)],
    ]],
    ["status_seconds", "When this was written.", [[{}, now]]],
  ];
}

function labelsOf({ line, keyType, stem }: Entry): Record<string, string> {
  return { name: line.names[0]!, stem, key_type: keyType };
}

function escaped(text: string): string {
  return text.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");
}
