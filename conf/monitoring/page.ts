#!/usr/bin/env -S DENO_NO_UPDATE_CHECK=1 deno run -q --no-prompt --no-config

/**
 * Makes one HTML page of a status:
 *
 *     lematt.ts --prod --status --json | page.ts >status.html
 *
 * It needs no permissions, and the page loads nothing else. Texts may come from servers and commands: all are escaped, and a
 * Content-Security-Policy lets the page load and run nothing else.
 */

/** The parts of the document that are shown; status.schema.json describes all of it. */
export interface Status {
  readonly version: number;
  readonly command: string;
  readonly mode: string;
  readonly configuration: string;
  readonly at: string;
  readonly runs: readonly Run[];
  readonly intervalSeconds: number;
  readonly certificates: readonly Certificate[];
  readonly pending: readonly Pending[];
  readonly endpoints: readonly Endpoint[];
  readonly orphans: readonly string[];
  readonly problems: readonly Problem[];
}

interface Run {
  readonly at: string;
  readonly seconds?: number;
  readonly issued?: number;
  readonly delivered?: number;
  readonly problems?: number;
}

interface Certificate {
  readonly names: readonly string[];
  readonly keyType: string;
  readonly notBefore?: string;
  readonly notAfter?: string;
  readonly renewAt?: string;
  readonly renewal?: string;
}

interface Pending {
  readonly section: string;
  readonly certificates: readonly { readonly names: readonly string[]; readonly reason: string }[];
  readonly until?: string;
  readonly failure?: {
    readonly count: number;
    readonly since: string;
    readonly error: string;
    readonly output?: string;
  };
}

interface Endpoint {
  readonly endpoint: string;
  readonly keyType: string;
  readonly probedAt?: string;
  readonly badSince?: string;
  readonly addresses: readonly {
    readonly address: string;
    readonly state: string;
    readonly text: string;
    readonly notAfter?: string;
  }[];
}

interface Problem {
  readonly kind: string;
  readonly text: string;
  readonly alert: boolean;
}

// ---- text -------------------------------------------------------------------------------------------------

/** Text that is not escaped. */
class Markup {
  constructor(readonly text: string) {}
}

type Part = Markup | string | number | undefined | readonly Part[];

/** Markup with values inserted; values are escaped unless they are markup. The result is well-formed XML, too. */
function markup(texts: TemplateStringsArray, ...parts: readonly Part[]): Markup {
  return new Markup(texts.map((text, index) => text + textOf(parts[index])).join(""));
}

function textOf(part: Part): string {
  if (part instanceof Markup) return part.text;
  return typeof part === "object" ? part.map(textOf).join("") : escaped(String(part ?? ""));
}

/** Control characters, and those that change the direction of writing, are replaced. */
function escaped(text: string): string {
  return text.toWellFormed()
    // deno-lint-ignore no-control-regex
    .replace(/[\0-\x08\v-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]/g, "\ufffd")
    .replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;")
    .replaceAll('"', "&quot;").replaceAll("'", "&#39;");
}

const HOUR = 3_600_000;
const DAY = 24 * HOUR;

function number(value: number): string {
  return value.toLocaleString("en");
}

function count(value: number, thing: string): string {
  return `${number(value)} ${thing}${value === 1 ? "" : "s"}`;
}

/** `12 days`, `5 hours`, `20 minutes`, as lematt writes it. */
function duration(ms: number): string {
  if (ms >= 3 * DAY) return count(Math.floor(ms / DAY), "day");
  if (ms >= 2 * HOUR) return count(Math.floor(ms / HOUR), "hour");
  return count(Math.max(0, Math.floor(ms / 60_000)), "minute");
}

/** In UTC, like all times of lematt. */
const dayOf = (at: string) => at.slice(0, 10);
const minuteOf = (at: string) => at.slice(0, 16).replace("T", " ");

function momentOf(text: string | undefined): number {
  return text === undefined ? -Infinity : Date.parse(text);
}

/** Each value once, without empty ones. */
function list(values: readonly (string | undefined)[], separator = ", "): string {
  return [...new Set(values)].filter((value) => value !== undefined && value !== "").join(separator);
}

/** Some names, and how many more there are. */
function some(names: readonly string[], most: number): string {
  const more = names.length - most;
  return names.slice(0, most).join(", ") + (more > 0 ? ` and ${number(more)} more` : "");
}

/** The first rows; the others are hidden until a click, if there are many. */
function folded(rows: readonly Markup[], most: number, thing: string): Markup {
  const hidden = rows.length - most;
  if (hidden <= most / 4) return markup`${rows}`;
  return markup`${rows.slice(0, most)}<details><summary>${count(hidden, `more ${thing}`)}</summary>
${rows.slice(most)}</details>
`;
}

// ---- the page ---------------------------------------------------------------------------------------------

/** The whole page. */
export async function page(status: Status): Promise<string> {
  const { mode, at, problems, certificates, pending, runs, orphans, configuration } = status;
  const now = Date.parse(at);
  const axis = axisOf(certificates, now);
  const places = placesOf(status.endpoints);
  const headline = problems.length === 0 ? "No problems" : count(problems.length, "problem");
  const state = problems.some(({ alert }) => alert) ? "bad" : problems.length > 0 ? "warn" : "fine";
  const style = STYLE + gridOf(axis);
  const policy = `default-src 'none'; img-src data:; style-src '${await hashOf(style)}'; ` +
    `script-src '${await hashOf(SCRIPT)}'`;
  return markup`<!DOCTYPE html>
<html lang="en" data-at="${at}">
<head>
<meta charset="utf-8" />
<meta http-equiv="Content-Security-Policy" content="${policy}" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="color-scheme" content="light dark" />
<title>${headline} · lematt --${mode}</title>
<link rel="icon" href="${iconOf(state)}" />
<style>${new Markup(style)}</style>
</head>
<body>
<header>
<p class="brand">lematt <span>--${mode}</span></p>
<h1 class="${state}">${headline}</h1>
<p class="age">as of <time datetime="${at}">${minuteOf(at)} UTC</time><span id="age"></span></p>
<nav>
${figures(status, places, now)}</nav>
</header>
<main>
${section("problems", "Problems", problems.length, problemList(problems))}
${section("certificates", "Certificates", certificates.length, certificateList(certificates, axis))}
${section("endpoints", "Endpoints", places.length, placeList(places, now))}
${section("pending", "Pending deliveries", pending.length, pendingList(pending, now))}
${section("runs", "Last runs", runs.length, runList(status, now))}
${section("orphans", "Orphaned files", orphans.length, orphanList(orphans))}
</main>
<footer><p>${configuration} · all times are UTC</p></footer>
<script>${new Markup(SCRIPT)}</script>
</body>
</html>
`.text;
}

function section(id: string, title: string, size: number, content: Markup): Markup | undefined {
  if (size === 0) return undefined;
  return markup`<section id="${id}">
<h2>${title} <small>${number(size)}</small></h2>
${content}</section>`;
}

/** A few facts, each a link to its section. */
function figures(status: Status, places: readonly Place[], now: number): Markup[] {
  const { certificates, endpoints, pending, runs } = status;
  const all: Markup[] = [];
  const add = (target: string, label: string, value: string, more: string, state = "fine") =>
    all.push(
      markup`<a href="#${target}"><span>${label}</span> <b class="${state}">${value}</b> <span>${more}</span></a>
`,
    );
  const soonest = (key: "notAfter" | "renewAt", after: number) =>
    certificates.filter((one) => momentOf(one[key]) > after)
      .reduce<Certificate | undefined>((a, b) => a !== undefined && a[key]! <= b[key]! ? a : b, undefined);

  const first = soonest("notAfter", -Infinity);
  if (first !== undefined) {
    const left = momentOf(first.notAfter) - now;
    const label = left > 0 ? "first to expire in" : "expired";
    const value = left > 0 ? duration(left) : `${duration(-left)} ago`;
    add("certificates", label, value, first.names[0]!, stateOf(first, now));
  }
  const next = soonest("renewAt", now);
  if (next !== undefined) {
    add("certificates", "next renewal in", duration(momentOf(next.renewAt) - now), next.names[0]!);
  }
  if (places.length > 0) {
    const wrong = places.filter(({ isRight }) => !isRight).length;
    const value = `${number(places.length - wrong)} of ${number(places.length)}`;
    const [more, state] = wrong === 0
      ? [probedText(endpoints, now), "fine"]
      : [`${number(wrong)} not right`, "warn"];
    add("endpoints", "endpoints right", value, more, state);
  }
  if (pending.length > 0) {
    const failing = pending.filter(({ failure }) => failure !== undefined).length;
    const more = failing === 0 ? "none has failed" : `${number(failing)} failing`;
    add("pending", "pending deliveries", number(pending.length), more, failing === 0 ? "fine" : "warn");
  }
  const last = runs.at(-1);
  if (last !== undefined) {
    add("runs", "last run", `${duration(now - Date.parse(last.at))} ago`, minuteOf(last.at));
  }
  return all;
}

function problemList(problems: readonly Problem[]): Markup {
  const rows = problems.toSorted((a, b) => Number(b.alert) - Number(a.alert)).map(({ kind, text, alert }) =>
    markup`<p class="problem ${alert ? "bad" : "warn"}"><b>${kind}</b> <span>${text}</span></p>
`
  );
  return folded(rows, 12, "problem");
}

// ---- certificates -----------------------------------------------------------------------------------------

/** The time axis, from left to right. */
interface Axis {
  readonly start: number;
  readonly now: number;
  readonly end: number;
}

/** As far back and ahead as nine of ten certificates reach; the others are cut off. */
function axisOf(certificates: readonly Certificate[], now: number): Axis {
  const reach = (distances: readonly number[]) => {
    const sorted = distances.filter((distance) => distance > 0 && distance < Infinity).sort((a, b) => a - b);
    return sorted[Math.ceil((sorted.length - 1) * 0.9)] ?? DAY;
  };
  const back = reach(certificates.map(({ notBefore }) => now - momentOf(notBefore)));
  const ahead = reach(certificates.map(({ notAfter }) => momentOf(notAfter) - now));
  const [left, right] = [Math.max(back, ahead / 8), Math.max(ahead, back / 8)];
  const margin = (left + right) / 50;
  return { start: now - left - margin, now, end: now + right + margin };
}

/** Where a moment is on the axis, in percent. */
function placeOf(moment: number, { start, end }: Axis): number {
  const part = (moment - start) / (end - start);
  return Math.round(Math.min(1, Math.max(0, part)) * 10_000) / 100;
}

/** About six marks: days, months or years. */
function ticksOf({ start, end }: Axis): { moment: number; label: string }[] {
  const ticks: { moment: number; label: string }[] = [];
  const add = (moment: number, options: Intl.DateTimeFormatOptions) => {
    const label = new Date(moment).toLocaleDateString("en", { ...options, timeZone: "UTC" });
    if (moment >= start) ticks.push({ moment, label });
  };
  const days = (end - start) / DAY;
  if (days < 60) {
    const step = Math.ceil(days / 6) * DAY;
    for (let day = Math.ceil(start / step) * step; day < end; day += step) {
      add(day, { day: "numeric", month: "short" });
    }
    return ticks;
  }
  const step = [1, 2, 3, 6].find((step) => days / 30 / step < 8) ?? 12 * Math.ceil(days / 365 / 8);
  const year = new Date(start).getUTCFullYear();
  for (let month = 0; Date.UTC(year, month) < end; month += step) {
    add(Date.UTC(year, month), month % 12 === 0 ? { year: "numeric" } : { month: "short" });
  }
  return ticks;
}

/** A vertical line for each mark and for now, behind all rows. */
function gridOf(axis: Axis): string {
  const line = (color: string, moment: number) =>
    `linear-gradient(var(--${color}), var(--${color})) ${placeOf(moment, axis)}% 0 / 1px 100% no-repeat`;
  const lines = [line("now", axis.now), ...ticksOf(axis).map(({ moment }) => line("rule", moment))];
  return `.time { background: ${lines.join(", ")}; }\n`;
}

/** `warn`: due for renewal, or missing; `bad`: less than a tenth of its life left. */
function stateOf({ notBefore, notAfter, renewAt }: Certificate, now: number): "bad" | "warn" | "fine" {
  if (notBefore === undefined || notAfter === undefined) return "warn";
  const [start, end] = [Date.parse(notBefore), Date.parse(notAfter)];
  if (end > now && momentOf(renewAt) > now) return "fine";
  return end - now < (end - start) / 10 ? "bad" : "warn";
}

/** How many lines are shown before a click. */
const MOST_LINES = 40;

/** The certificates of a line in one row. First those that are late, then by remaining lifetime. */
function certificateList(certificates: readonly Certificate[], axis: Axis): Markup {
  const rank = (one: Certificate) => ["bad", "warn", "fine"].indexOf(stateOf(one, axis.now));
  const order = (a: Certificate, b: Certificate) =>
    rank(a) - rank(b) || Math.sign(momentOf(a.notAfter) - momentOf(b.notAfter)) ||
    (a.names[0]! < b.names[0]! ? -1 : 1);
  const lines = [...Map.groupBy(certificates, ({ names }) => names.join(" ")).values()]
    .map((line) => line.toSorted(order))
    .sort(([a], [b]) => order(a!, b!));
  const labels = ticksOf(axis).map(({ moment, label }) => ({ x: placeOf(moment, axis), label }))
    .filter(({ x }) => x < 95)
    .map(({ x, label }) => markup`<text x="${x}%" dx="4" y="30">${label}</text>`);
  const key = (kind: string, text: string) =>
    markup`<span><svg aria-hidden="true"><rect class="${kind}" width="22" height="6" y="3" /></svg> ${text}</span>
`;
  return markup`<input id="filter" type="search" placeholder="Find a name" aria-label="Find a name" hidden="hidden" />
<div class="row head">
<span class="names">name</span>
<svg class="time" aria-hidden="true">${labels}<text class="now" x="${
    placeOf(axis.now, axis)
  }%" dx="4" y="12">now</text></svg>
<span class="left">expires in</span>
<span class="next">renewal</span>
</div>
${lines.length > MOST_LINES ? overview(certificates, lines.length, axis) : ""}${
    folded(lines.map((line) => certificateRow(line, axis)), MOST_LINES, "line")
  }<p class="legend">${key("past", "used")}${key("ahead", "until it is due for renewal")}${
    key("margin", "until it expires")
  }</p>
`;
}

/** If there are many: how many are due on which day. */
function overview(certificates: readonly Certificate[], lines: number, axis: Axis): Markup {
  const dated = certificates.filter(({ renewAt }) => renewAt !== undefined);
  const days = Map.groupBy(dated, ({ renewAt }) => Math.floor(Math.max(axis.now, momentOf(renewAt)) / DAY));
  const most = Math.max(0, ...[...days.values()].map(({ length }) => length));
  const bars = [...days].map(([day, { length }]) => {
    const [x, end] = [placeOf(day * DAY, axis), placeOf((day + 1) * DAY, axis)];
    const height = Math.ceil(length / most * 48);
    return markup`<rect x="${x}%" y="${48 - height}" width="${
      ((end - x) * 0.8).toFixed(2)
    }%" height="${height}" />`;
  });
  return markup`<div class="row all">
<span class="names"><b>all ${count(lines, "line")}</b> <small>when they are due for renewal</small></span>
<span class="time"><svg class="ahead" height="48" aria-hidden="true">${bars}</svg></span>
<span class="left"></span>
<span class="next"><span>at most ${number(most)}</span> <small>certificates a day</small></span>
</div>
`;
}

function certificateRow(line: readonly Certificate[], axis: Axis): Markup {
  const { names, notAfter } = line[0]!;
  const types = line.map(({ keyType }) => keyType).toSorted().toReversed().join(", ");
  const renewals = [...Map.groupBy(line, ({ renewal = "" }) => renewal)].map(([text, group]) => {
    const [, when = "", why = text] = /^(.*?): (.*)$/s.exec(text) ?? [];
    const whose = group.length === line.length ? "" : `${group.map(({ keyType }) => keyType).join(", ")}: `;
    return markup`<span>${whose}${when}</span> <small>${why}</small> `;
  });
  return markup`<div class="row ${stateOf(line[0]!, axis.now)}">
<span class="names" title="${names.join(" ")}"><b>${names[0]}</b> <small>${
    list([types, some(names.slice(1), 3)], " · ")
  }</small></span>
<span class="time"><svg height="${line.length * 9 - 3}" aria-hidden="true">${
    line.map((one, lane) => bar(one, lane * 9, axis))
  }</svg></span>
${expiry(notAfter, "none", axis.now)}
<span class="next">${renewals}</span>
</div>
`;
}

function expiry(notAfter: string | undefined, unknown: string, now: number): Markup {
  const left = momentOf(notAfter) - now;
  return markup`<span class="left"><b>${
    notAfter === undefined ? unknown : left <= 0 ? "expired" : duration(left)
  }</b> <small>${dayOf(notAfter ?? "")}</small></span>`;
}

/** A lifetime in three parts: used, until it is due, until it expires. */
function bar({ notBefore, notAfter, renewAt }: Certificate, y: number, axis: Axis): Markup[] {
  const [start, end] = [momentOf(notBefore), momentOf(notAfter)];
  const due = Math.min(end, Math.max(axis.now, momentOf(renewAt)));
  const parts = [
    ["past", start, Math.min(end, axis.now)],
    ["ahead", axis.now, due],
    ["margin", due, end],
  ] as const;
  return parts.map(([kind, from, to]) => ({ kind, x: placeOf(from, axis), end: placeOf(to, axis) }))
    .filter(({ x, end }) => end > x)
    .map(({ kind, x, end }) =>
      markup`<rect class="${kind}" x="${x}%" y="${y}" width="${(end - x).toFixed(2)}%" height="6" />`
    );
}

// ---- endpoints --------------------------------------------------------------------------------------------

/** An endpoint with all its key types. */
interface Place {
  readonly endpoints: readonly Endpoint[];
  readonly isRight: boolean;
  /** When the first of the certificates that it serves expires. */
  readonly until?: string;
}

/** Short texts for the states that are right. */
const RIGHT: ReadonlyMap<string, string> = new Map([
  ["current", "the newest certificate"],
  ["answers", "finishes the handshake"],
  ["passed over", "not probed, no route from here"],
]);

/** First those that are not right, then by remaining lifetime. */
function placesOf(endpoints: readonly Endpoint[]): Place[] {
  const places = [...Map.groupBy(endpoints, ({ endpoint }) => endpoint).values()].map((endpoints) => {
    const dates = endpoints.flatMap(({ addresses }) => addresses.map(({ notAfter }) => notAfter));
    return {
      endpoints,
      isRight: endpoints.every(({ addresses }) =>
        addresses.length > 0 && addresses.every(({ state }) => RIGHT.has(state))
      ),
      until: dates.filter((date) => date !== undefined).sort()[0],
    };
  });
  return places.sort((a, b) =>
    Number(a.isRight) - Number(b.isRight) || Math.sign(momentOf(a.until) - momentOf(b.until))
  );
}

function placeList(places: readonly Place[], now: number): Markup {
  const wrong = places.filter(({ isRight }) => !isRight).length;
  return markup`<div class="row place head">
<span class="names">endpoint</span>
<span class="sights">serves</span>
<span class="left">expires in</span>
</div>
${folded(places.map((place) => placeRow(place, now)), Math.max(20, Math.min(wrong, 60)), "endpoint")}`;
}

/** How old the oldest probe is. */
function probedText(endpoints: readonly Endpoint[], now: number): string {
  const first = Math.min(...endpoints.map(({ probedAt }) => momentOf(probedAt)));
  return first === -Infinity ? "not all probed yet" : `probed ${duration(now - first)} ago`;
}

function placeRow({ endpoints, isRight, until }: Place, now: number): Markup {
  const sights = endpoints.flatMap(({ keyType, badSince, addresses }) => {
    const since = badSince === undefined ? "" : `for ${duration(now - Date.parse(badSince))}`;
    if (addresses.length === 0) return [{ what: "not probed yet", keyType, more: "", kind: "wrong" }];
    return addresses.map(({ state, text, address }) => {
      const short = RIGHT.get(state);
      return short === undefined
        ? { what: text, keyType, more: since, kind: "wrong" }
        : { what: short, keyType, more: address, kind: "right" };
    });
  });
  const texts = [...Map.groupBy(sights, ({ what }) => what)].map(([what, group]) =>
    markup`<span class="${group[0]!.kind}">${what}</span> <small>${
      list([list(group.map(({ keyType }) => keyType)), list(group.map(({ more }) => more))], " · ")
    }</small> `
  );
  return markup`<div class="row place ${isRight ? "fine" : "warn"}">
<span class="names"><b>${endpoints[0]!.endpoint}</b> <small>${probedText(endpoints, now)}</small></span>
<span class="sights">${texts}</span>
${expiry(until, "–", now)}
</div>
`;
}

// ---- the rest ---------------------------------------------------------------------------------------------

function pendingList(pending: readonly Pending[], now: number): Markup {
  const failing = ({ failure }: Pending) => Number(failure !== undefined);
  const rows = pending.toSorted((a, b) => failing(b) - failing(a)).map((delivery) => {
    const { section, certificates, until, failure } = delivery;
    const times = failure?.count === 1 ? "once" : `${failure?.count} times`;
    const facts = [
      `${count(certificates.length, "certificate")}: ${list(certificates.map(({ reason }) => reason))}`,
      failure && `failed ${times}, first ${duration(now - Date.parse(failure.since))} ago`,
      until === undefined ? "next run" : `not before ${minuteOf(until)}`,
    ];
    const names = [...new Set(certificates.map(({ names }) => names[0]!))];
    const error = failure && markup`<pre>${list([failure.error, failure.output], "\n")}</pre>
`;
    return markup`<div class="pending">
<p><b>[${section}]</b> ${list(facts, " · ")}</p>
<p><small>${some(names, 8)}</small></p>
${error}</div>
`;
  });
  return folded(rows, 20, "section");
}

function runList({ runs, intervalSeconds }: Status, now: number): Markup {
  const rows = runs.toReversed().map(({ at, seconds, issued = 0, delivered = 0, problems = 0 }) => {
    const did = list([
      issued > 0 ? `${number(issued)} issued` : "",
      delivered > 0 ? `${count(delivered, "section")} delivered` : "",
    ]);
    const wrong = problems > 0 ? markup`, <span class="wrong">${count(problems, "problem")}</span>` : "";
    return markup`<tr><td>${minuteOf(at)}</td><td>${duration(now - Date.parse(at))} ago</td><td>${
      seconds === undefined ? "" : seconds < 120 ? `${seconds} s` : duration(seconds * 1000)
    }</td><td>${did === "" ? "no changes" : did}${wrong}</td></tr>
`;
  });
  return markup`<table><tbody>
${rows}</tbody></table>
<p class="legend">usually ${duration(intervalSeconds * 1000)} apart</p>
`;
}

function orphanList(orphans: readonly string[]): Markup {
  return markup`<details><summary>belong to no line of domains; --prune moves them away</summary>
<pre>${orphans.join("\n")}</pre>
</details>
`;
}

// ---- how it appears ---------------------------------------------------------------------------------------

function iconOf(state: "bad" | "warn" | "fine"): string {
  const color = { bad: "b3372f", warn: "b8771b", fine: "2e7d6f" }[state];
  return "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E" +
    `%3Ccircle cx='8' cy='8' r='6' fill='%23${color}'/%3E%3C/svg%3E`;
}

async function hashOf(text: string): Promise<string> {
  const hash = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  return `sha256-${new Uint8Array(hash).toBase64()}`;
}

const STYLE = `
:root {
  color-scheme: light dark;
  --paper: #fdfcfa; --ink: #22262b; --soft: #626970; --rule: #e9e6e1; --now: #b4b0a8; --well: #f6f4f0;
  --past: #dcd9d3; --fine: #2e7d6f; --fine-2: #a5cdc4; --warn: #94600c; --warn-2: #e3b565; --bad: #b3372f;
  --bad-2: #dd8d84;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --ink: #e6e4e0; --soft: #979da4; --rule: #282b30; --now: #5c6168; --well: #1d2024;
    --past: #383c42; --fine: #5cb3a1; --fine-2: #2c5d54; --warn: #dfa84f; --warn-2: #9a6d1f; --bad: #ef8a80;
    --bad-2: #a8473e;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
:focus-visible { outline: 2px solid var(--fine); outline-offset: 2px; }
body {
  max-width: 72rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%;
}
p, h1, h2 { margin: 0; }
a { color: inherit; text-decoration: none; }
b, h1, h2 { font-weight: 600; letter-spacing: -.01em; }
small, .head, .legend, footer { font-size: .8125rem; line-height: 1.45; color: var(--soft); }
svg { display: block; width: 100%; }

.brand { font-weight: 600; }
.brand span { font-weight: 400; color: var(--soft); }
h1 { margin: 2rem 0 .25rem; font-size: clamp(2.25rem, 6vw, 3.25rem); line-height: 1.1; letter-spacing: -.025em; }
h1.fine { color: var(--fine); }
h1.warn, nav .warn, .wrong, .problem b, .warn > .left b { color: var(--warn); }
h1.bad, nav .bad, .problem.bad b, .bad > .left b, .stale .age { color: var(--bad); }
.age { color: var(--soft); }
.stale .age { font-weight: 600; }
nav { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.25rem 2rem; margin-top: 2.25rem; }
nav a { padding-top: .75rem; border-top: 1px solid var(--rule); }
nav a:hover { border-color: var(--soft); }
nav span { display: block; font-size: .8125rem; color: var(--soft); }
nav b { display: block; font-size: 1.375rem; line-height: 1.4; }

section { position: relative; margin-top: 3.5rem; }
h2 { margin-bottom: .75rem; font-size: 1.25rem; }
h2 small { margin-left: .2rem; font-size: 1rem; font-weight: 400; }
input {
  position: absolute; top: 0; right: 0; width: 15rem; padding: .3rem .7rem; border: 1px solid var(--rule);
  border-radius: .4rem; background: none; color: inherit; font: inherit; font-size: .9375rem;
}
.problem { display: grid; grid-template-columns: 6rem 1fr; gap: 0 1rem; padding: .6rem 0 .6rem 1rem; border-left: 3px solid var(--warn-2); }
.problem + .problem { margin-top: .5rem; }
.problem b { font-size: .875rem; line-height: 1.7; }
.problem.bad { border-color: var(--bad); }

.row { display: grid; grid-template-columns: minmax(12rem, 5fr) 7fr 6.5rem minmax(9rem, 3fr); column-gap: 1.5rem; border-top: 1px solid var(--rule); }
.place { grid-template-columns: minmax(12rem, 5fr) 8fr 6.5rem; }
.row span { min-width: 0; }
.row small { display: block; }
.row b { font-weight: 500; letter-spacing: 0; }
.names, .left, .next, .sights { padding: .6rem 0; }
.left { text-align: right; }
.time { display: flex; align-items: center; }
.head { position: sticky; top: 0; z-index: 1; align-items: end; border: 0; background: var(--paper); }
.head span { padding-bottom: .4rem; }
.head .time { height: 36px; fill: var(--soft); font-size: 12px; }
.head .now { fill: var(--ink); font-weight: 600; }
.past { fill: var(--past); }
.ahead { fill: var(--fine); }
.margin { fill: var(--fine-2); }
.warn .ahead, .warn .margin { fill: var(--warn-2); }
.bad .ahead, .bad .margin { fill: var(--bad); }
.bad .past { fill: var(--bad-2); }
.all .time { align-items: end; }
.legend { margin-top: .9rem; }
.legend span { display: inline-block; margin-right: 1rem; }
.legend svg { display: inline-block; width: 22px; height: 9px; }

.pending { padding: .7rem 0; border-top: 1px solid var(--rule); }
pre {
  margin: .6rem 0 0; padding: .8rem 1rem; border-radius: .4rem; background: var(--well); white-space: pre-wrap;
  font: .8125rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
table { width: 100%; border-collapse: collapse; }
td { padding: .5rem 1.5rem .5rem 0; border-top: 1px solid var(--rule); vertical-align: top; }
td:nth-child(2), td:nth-child(3) { color: var(--soft); }
td:not(:last-child) { white-space: nowrap; }
td:last-child { width: 50%; padding-right: 0; }
summary { padding: .7rem 0; border-top: 1px solid var(--rule); color: var(--soft); cursor: pointer; }
#problems summary, #orphans summary { border: 0; }
footer { margin-top: 4rem; }

@media (max-width: 46rem) {
  body { padding: 1.5rem 1.1rem 3rem; }
  h1 { margin-top: 1.25rem; }
  nav { grid-template-columns: 1fr 1fr; gap: 1.1rem 1.25rem; margin-top: 1.75rem; }
  section { margin-top: 2.75rem; }
  input { position: static; width: 100%; }
  .problem { grid-template-columns: 1fr; }
  .row { grid-template-columns: 1fr auto; column-gap: 1rem; padding: .6rem 0 .7rem; }
  .row .time, .row .next, .row .sights { grid-column: 1 / -1; order: 1; padding: 0; }
  .row .names, .row .left { padding: 0; }
  .row .time { min-height: 26px; margin: .3rem 0 .2rem; }
  .row .next { font-size: .8125rem; color: var(--soft); }
  .row .next small { display: inline; }
  .next > span::before { content: "renewal: "; }
  .next > span::after { content: ", "; }
  .row .time:has(svg:empty) { display: none; }
  .all .next > span::before, .all .next > span::after { content: none; }
  .row .sights { margin-top: .3rem; }
  .head span { display: none; }
  .row.head { padding: 0; }
  .head.place { display: none; }
  td { padding-right: .9rem; }
  td:nth-child(2) { display: none; }
}
@media print {
  .head { position: static; }
}
`;

/** The age of the page, since an old page may show that all is well; and a filter. */
const SCRIPT = `
const written = Date.parse(document.documentElement.dataset.at);
function showAge() {
  const minutes = Math.max(0, (Date.now() - written) / 60000);
  const units = [[1440, "day", 3], [60, "hour", 2], [1, "minute", 0]];
  const [size, unit] = units.find(([size, , least]) => minutes >= size * least);
  const number = Math.floor(minutes / size);
  document.getElementById("age").textContent = ", " + number + " " + unit + (number === 1 ? "" : "s") + " ago";
  document.body.classList.toggle("stale", minutes >= 1440);
}
showAge();
setInterval(showAge, 60000);
const filter = document.getElementById("filter");
if (filter !== null) {
  const section = document.getElementById("certificates");
  const rows = [...section.querySelectorAll(".row")].filter((row) => row.firstElementChild.title !== "");
  filter.hidden = 10 >= rows.length;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLowerCase();
    for (const details of section.querySelectorAll("details")) details.open = wanted !== "";
    for (const row of rows) row.hidden = !row.firstElementChild.title.includes(wanted);
  });
}
`;

// ---- the program ------------------------------------------------------------------------------------------

if (import.meta.main) {
  const text = await new Response(Deno.stdin.readable).text();
  let status: Partial<Status> = {};
  try {
    status = JSON.parse(text) ?? {};
  } catch {
    // not a status either
  }
  if (status.command === "status" && status.version === 1) {
    await new Blob([await page(status as Status)]).stream().pipeTo(Deno.stdout.writable);
  } else {
    console.error("page.ts: standard input is not what lematt.ts --status --json writes (version 1)");
    Deno.exit(1);
  }
}
