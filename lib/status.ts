/**
 * How things stand: certificates, debts, endpoints and files that belong to nobody, as a table for a person, as JSON
 * and as Prometheus metrics.
 *
 * Makes text of what others found out; looks at nothing itself.
 */

import type { Mode } from "./config.ts";
import type { Plan, Rule } from "./plan.ts";
import { dateText, nameText, reasonText, ruleText, servedText, timeText } from "./report.ts";
import type { Entry, State } from "./store.ts";
import { printable } from "./text.ts";
import type { Served } from "./verify.ts";

/** Everything that a status tells of. */
export interface Status {
  readonly mode: Mode;
  readonly now: Date;
  readonly plan: Plan;
  readonly state: Pick<State, "failures" | "owed">;
  /** The end of a certificate whose renewal is overdue while less than a third of its life is left. */
  readonly expiring: (entry: Entry) => Date | undefined;
  /** Empty with --offline. */
  readonly served: readonly (Served & { readonly section: string })[];
  readonly strays: readonly string[];
}

/** One certificate in one row, whatever the plan says of it. */
interface Row {
  readonly entry: Entry;
  /** Of its life, in [0, 1]; undefined without a readable certificate. */
  readonly lifeLeft?: number;
  readonly daysLeft?: number;
  readonly notAfter?: Date;
  /** When it is renewed next, and why, in a few words. */
  readonly next: string;
  /** Why, in the configuration's words. */
  readonly why: string;
  readonly renewAt?: Date;
  readonly needsPerson: boolean;
  readonly failure?: State["failures"][string];
}

/** What decides on a renewal, in a word or two. */
const SHORT_RULES: Readonly<Record<Rule, string>> = {
  "age": "age",
  "expiry": "expiry",
  "expiry, capped": "expiry, capped",
  "ari": "the CA",
  "age beyond life": "expiry",
};

const DAY_MS = 86_400_000;
const WIDTH = 80;
const BAR = 10;

function rowsOf(status: Status): Row[] {
  const { plan, state, now } = status;
  const row = (entry: Entry, next: string, why: string, renewAt: Date): Row => {
    const { finding } = entry;
    const failure = state.failures[entry.stem];
    const base = {
      entry,
      next: `${next} ${why}`,
      why,
      renewAt,
      failure,
      needsPerson: needsPerson(entry, status),
    };
    if (!("certificate" in finding)) return base;
    const { notBefore, notAfter } = finding.certificate;
    const left = notAfter.getTime() - now.getTime();
    return {
      ...base,
      notAfter,
      daysLeft: left / DAY_MS,
      lifeLeft: Math.min(1, Math.max(0, left / (notAfter.getTime() - notBefore.getTime()))),
    };
  };
  const rows = [
    ...plan.tasks.flatMap(({ due }) =>
      due.map(({ entry, reason }) => row(entry, "next run:", reasonText(reason), now))
    ),
    ...plan.waiting.flatMap(({ due, until }) =>
      due.map(({ entry, reason }) => row(entry, `${timeText(until)}:`, reasonText(reason), until))
    ),
    ...plan.kept.map(({ entry, renewAt, rule }) => ({
      ...row(entry, "", ruleText(rule), renewAt),
      next: `${dateText(renewAt)} by ${SHORT_RULES[rule]}`,
    })),
  ];
  const rank = ({ needsPerson, daysLeft }: Row) => (needsPerson ? 0 : 1e6) + Math.floor(daysLeft ?? -1e3);
  return rows.sort((a, b) => rank(a) - rank(b));
}

function needsPerson(entry: Entry, { state, now, expiring }: Status): boolean {
  const { finding, stem } = entry;
  return state.failures[stem] !== undefined ||
    ("certificate" in finding && (finding.certificate.notAfter <= now || expiring(entry) !== undefined));
}

/** How many things need a person. */
function troubles(status: Status): number {
  const { tasks, waiting, kept } = status.plan;
  const due = [...tasks, ...waiting].flatMap(({ due }) => due);
  return [...due, ...kept].filter(({ entry }) => needsPerson(entry, status)).length +
    Object.values(status.state.owed).filter(({ attempts }) => attempts > 0).length +
    status.served.filter(({ state }) => state !== "current").length;
}

/** Exit status: 1 where anything needs a person. */
export function exitStatus(status: Status): 0 | 1 {
  return troubles(status) > 0 ? 1 : 0;
}

/** A table of at most 80 columns, what needs a person first. */
export function statusTable(status: Status): string {
  const rows = rowsOf(status);
  let lines: string[] = [];
  const table = (header: string, body: string[]) => {
    if (body.length > 0) lines = lines.concat(lines.length > 0 ? [""] : [], header, body);
  };
  table(
    `${"CERTIFICATE".padEnd(28)} ${"KEY".padEnd(4)}${"LIFE LEFT".padEnd(BAR + 8)} RENEWS`,
    rows.flatMap(({ entry, lifeLeft, daysLeft, next, failure }) => {
      const bar = lifeLeft === undefined
        ? "none".padEnd(BAR)
        : "#".repeat(Math.ceil(lifeLeft * BAR)).padEnd(BAR, ".");
      const days = daysLeft === undefined
        ? ""
        : `${Math.abs(daysLeft) < 10 ? daysLeft.toFixed(1) : Math.trunc(daysLeft)} d`;
      const columns = ` ${entry.keyType.padEnd(4)}${bar} ${days.padStart(6)}  `;
      return [
        ...tableRow(nameText(entry.line.names), 28, columns, next),
        ...failure === undefined ? [] : wrapped(
          "  ",
          `failed ${failure.count === 1 ? "once" : `${failure.count} times`}, last ` +
            `${timeText(new Date(failure.at))}: ${failure.error}; tried again ${
              failure.retryAt === undefined
                ? "by the next run"
                : `from ${timeText(new Date(failure.retryAt))}`
            }`,
        ),
      ];
    }),
  );
  table(
    `${"OWED BY".padEnd(28)} ${"SINCE".padEnd(12)} ${"CERTIFICATES".padEnd(13)} TRIED AGAIN`,
    Object.entries(status.state.owed).flatMap(([section, { since, certificates, retryAt, lastError }]) => {
      const count = String(Object.keys(certificates).length).padEnd(13);
      const next = retryAt === undefined ? "by the next run" : `from ${timeText(new Date(retryAt))}`;
      return [
        ...tableRow(`[${section}]`, 28, ` ${since.slice(0, 10).padEnd(12)} ${count} `, next),
        ...lastError === undefined ? [] : wrapped("  ", lastError),
      ];
    }),
  );
  table(
    `${"ENDPOINT".padEnd(34)} ${"KEY".padEnd(4)}SERVES`,
    status.served.toSorted((a, b) => Number(a.state === "current") - Number(b.state === "current"))
      .flatMap((served) => tableRow(served.endpoint, 34, ` ${served.keyType.padEnd(4)}`, servedText(served))),
  );
  table("FILES OF NO LINE", status.strays.flatMap((path) => wrapped("  ", printable(path, Infinity))));
  const count = troubles(status);
  const verdict = count === 0
    ? "all is well"
    : `${count} ${count === 1 ? "thing needs" : "things need"} a person`;
  return [...lines, "", verdict, ""].join("\n");
}

/** What a row is about, its columns and what there is to say; a name too long for its column has lines of its own. */
function tableRow(name: string, width: number, columns: string, text: string): string[] {
  if (name.length <= width) return wrapped(name.padEnd(width) + columns, text);
  return [...wrapped("", name), ...wrapped(" ".repeat(width) + columns, text)];
}

/** Text behind a head, going on below it where the line is full. A URL stays whole, so that it can be followed. */
function wrapped(head: string, text: string): string[] {
  if (head.length + text.length <= WIDTH) return [(head + text).trimEnd()].filter((line) => line !== "");
  const indent = " ".repeat(Math.min(head.length, 36));
  const lines = [head];
  const words = text.split(" ").flatMap((word) =>
    /^https?:/.test(word) ? [word] : word.match(new RegExp(`.{1,${WIDTH - indent.length}}`, "g")) ?? [""]
  );
  for (const [index, word] of words.entries()) {
    const line = index === 0 ? head + word : `${lines.at(-1)} ${word}`;
    if (line.length <= WIDTH) lines[lines.length - 1] = line;
    else lines.push(indent + word);
  }
  return lines.map((line) => line.trimEnd()).filter((line) => line !== "");
}

/**
 * The status as a JSON document, whose keys stay:
 * `{mode, certificates: [{names, keyType, state, notBefore, notAfter, fingerprint, renewAt, why, failure}],
 * owed: {section: {since, certificates, attempts, retryAt, lastError}}, endpoints: [{section, endpoint, address,
 * keyType, state, fingerprint, notAfter, detail}], strays, troubles}`. Dates are ISO 8601, fingerprints SHA-256 in
 * hexadecimal; what is unknown is absent.
 */
export function statusJson(status: Status): string {
  const rows = rowsOf(status);
  const document = {
    mode: status.mode,
    certificates: rows.map(({ entry, renewAt, why, failure }) => {
      const { finding } = entry;
      const certificate = "certificate" in finding ? finding.certificate : undefined;
      return {
        names: entry.line.names,
        keyType: entry.keyType,
        state: finding.kind,
        notBefore: certificate?.notBefore,
        notAfter: certificate?.notAfter,
        fingerprint: certificate?.fingerprint,
        renewAt,
        why,
        failure,
      };
    }),
    owed: status.state.owed,
    endpoints: status.served.map(({ section, endpoint, address, keyType, state, certificate, detail }) => ({
      section,
      endpoint,
      address,
      keyType,
      state,
      fingerprint: certificate?.fingerprint,
      notAfter: certificate?.notAfter,
      detail,
    })),
    strays: status.strays,
    troubles: troubles(status),
  };
  return `${JSON.stringify(document, undefined, 2)}\n`;
}

/** The status in the Prometheus text format (version 0.0.4), for a textfile collector. Times are Unix seconds. */
export function statusMetrics(status: Status): string {
  const rows = rowsOf(status);
  const lines: string[] = [];
  const gauge = (name: string, help: string, samples: [Record<string, string>, number][]) => {
    lines.push(`# HELP lematt_${name} ${help}`, `# TYPE lematt_${name} gauge`);
    for (const [labels, value] of samples) {
      const text = Object.entries({ mode: status.mode, ...labels }).map(([key, text]) =>
        `${key}="${escaped(text)}"`
      );
      lines.push(`lematt_${name}{${text.join(",")}} ${value}`);
    }
  };
  const seconds = (date: Date) => Math.floor(date.getTime() / 1000);
  const label = ({ entry }: Row) => ({
    name: entry.line.names[0]!,
    stem: entry.stem,
    key_type: entry.keyType,
  });
  const dated = (of: (row: Row) => Date | undefined) =>
    rows.flatMap((row): [Record<string, string>, number][] => {
      const date = of(row);
      return date === undefined ? [] : [[label(row), seconds(date)]];
    });
  gauge("certificate_not_after_seconds", "When the certificate expires.", dated(({ notAfter }) => notAfter));
  gauge("certificate_renew_at_seconds", "When it is renewed next.", dated(({ renewAt }) => renewAt));
  gauge(
    "certificate_failures",
    "How often in a row its line could not be issued.",
    rows.map((row) => [label(row), row.failure?.count ?? 0]),
  );
  gauge(
    "delivery_owed_since_seconds",
    "Since when a section owes a delivery.",
    Object.entries(status.state.owed).map(([section, { since }]) => [{ section }, seconds(new Date(since))]),
  );
  gauge(
    "endpoint_current",
    "Whether an endpoint serves the newest certificate.",
    status.served.map(({ section, endpoint, address, keyType, state }) => [
      { section, endpoint, address, key_type: keyType },
      state === "current" ? 1 : 0,
    ]),
  );
  gauge("stray_files", "Files that belong to no line.", [[{}, status.strays.length]]);
  gauge("troubles", "How many things need a person.", [[{}, troubles(status)]]);
  gauge("status_seconds", "When this was written.", [[{}, seconds(status.now)]]);
  return `${lines.join("\n")}\n`;
}

function escaped(text: string): string {
  return text.replaceAll("\\", "\\\\").replaceAll('"', '\\"').replaceAll("\n", "\\n");
}
