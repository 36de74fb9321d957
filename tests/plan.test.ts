/**
 * Goal: every decision, as tables: what is renewed, what waits, what is delivered and why, what an endpoint's certificate
 * means, what is a problem, and who is alerted.
 */

import assert from "node:assert/strict";
import type { Config, Endpoint, KeyType, Line, Section } from "../lib/config.ts";
import { dueAlerts } from "../lib/deliver.ts";
import { recordOf } from "../lib/endpoints.ts";
import { listsDigest, plan as planOn, planSection } from "../lib/plan.ts";
import { adoptReceipts, forgetUnknown as forget } from "../lib/receipts.ts";
import {
  byLine,
  type PlanOptions,
  renewal,
  retryDeliveryAt,
  retryLineAt,
  usualInterval,
} from "../lib/renewal.ts";
import {
  type DeliveryFailure,
  emptyState,
  type Failure,
  parseState,
  type ProbeRecord,
  type Receipt,
  record,
  type ServedCertificate,
  type Sight,
  type State,
} from "../lib/state.ts";
import type { Entry, Finding } from "../lib/store.ts";
import type { KeySpec } from "../lib/x509.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const START = Date.UTC(2026, 0, 1);
const day = (days: number) => new Date(START + days * DAY);
const iso = (days: number) => day(days).toISOString();
const daysOf = (date: Date | undefined) => date && Number(((date.getTime() - START) / DAY).toFixed(6));
/** Seven runs, so many nights apart, of which the last begins at day `last`. */
const runsTo = (last: number, nights = 1) =>
  [6, 5, 4, 3, 2, 1, 0].map((n) => ({ at: iso(last - n * nights) }));

// ---- configurations, certificates and states, as literals --------------------------------------------------------

function section(name: string, part: Partial<Section> = {}): Section {
  const none = { domains: [], prepare: [], uploadCerts: [], uploadKeys: [], uploadEach: [], update: [] };
  const rest = { line: 1, rehearse: false, verifyWaitSeconds: 0, dnsPresent: [], dnsCleanup: [] };
  return { ...none, ...rest, name, keyTypes: ["rsa"], verify: [], alert: [], dnsParallel: false, ...part };
}

let lineNumber = 0;
function line(names: string, sections: readonly Section[] = [], ...more: KeyType[]): Line {
  const keyTypes: KeyType[] = ["rsa", ...more];
  return { line: ++lineNumber, names: names.split(" "), sections, keyTypes, formerNames: [] };
}

function configure(lines: readonly Line[], part: Partial<Config> = {}): Config {
  const sections = [...new Set(lines.flatMap(({ sections }) => sections))];
  const settings = { mode: "prod", generateNewCertsAfterDays: 0, ari: true, directoryUrl: "https://ca" };
  return { ...settings, sections, lines, ...part } as Config;
}

/** `host:port[/protocol][#sni]`, several with blanks between them */
function endpoints(texts: string): Endpoint[] {
  return texts.split(" ").map((text) => {
    const [, host, port, starttls, sni] = /^(.*?):(\d+)(?:\/(\w+))?(?:#(.*))?$/.exec(text)!;
    return { text, host: host!, port: Number(port), starttls: starttls as Endpoint["starttls"], sni };
  });
}

/** A certificate from day `from` to day `to`; `is` is its fingerprint. */
function certificate(names: readonly string[], { from = 0, to = 90, is = "new" } = {}) {
  const dates = { notBefore: day(from), notAfter: day(to) };
  return { names, ...dates, fingerprint: is, id: `id of ${is}`, issuer: "CA", selfSigned: false };
}

function entry(line: Line, finding: Finding, part: Partial<Entry> = {}): Entry {
  const { keyType = "rsa" } = part;
  const stem = line.names.join("_");
  const files = { key: `/key/${stem}`, csr: `/csr/${stem}`, cert: `/cert/${stem}` };
  return { line, keyType, stem, files, file: `${stem}-cert.${keyType}.pem`, finding, ...part };
}

function present(line: Line, dates: Parameters<typeof certificate>[1] = {}, keyType: KeyType = "rsa"): Entry {
  return entry(line, { kind: "present", certificate: certificate(line.names, dates) }, { keyType });
}

const MISSING: Finding = { kind: "missing", what: "certificate" };
/** What the first name of a line still links to. */
const FORMER = {
  former: { certificate: certificate(["www.example.com"]), file: "www.example.com-cert.rsa.pem" },
};

function stateOf(part: Partial<State> = {}): State {
  return { ...emptyState(), ...part };
}

function plan(config: Config, inventory: Entry[], state: State, now: Date, options: PlanOptions = {}) {
  return planOn({ config, certificates: byLine(inventory), state, now, options });
}

function forgetUnknown(config: Config, inventory: Entry[], state: State, now: Date, orphans: string[] = []) {
  forget({ config, certificates: byLine(inventory), state, now, options: {} }, () => new Set(orphans));
}

function failure(part: Partial<Failure> = {}): Failure {
  return { count: 1, since: iso(1), at: iso(1), error: "refused", ...part };
}

/** What `--only`, `--renew`, `--deliver` name. */
function selection(named: { only?: Line[]; renew?: Line[]; deliver?: (Line | string)[] }) {
  const { only = [], renew = [], deliver = [] } = named;
  const all = [...only, ...renew, ...deliver];
  const lines = new Set(all.filter((one) => typeof one !== "string"));
  const sections = new Set(all.filter((one) => typeof one === "string"));
  return { selection: { lines, sections, renew: new Set(renew), newKey: false, deliver: new Set(deliver) } };
}

// ---- renewal -----------------------------------------------------------------------------------------------------

Deno.test("renewal() follows the settings as far as the lifetime and the interval between runs allow", () => {
  const table: [what: string, reauthorize: number | undefined, age: number, life: number, number, string][] =
    [
      // what                                               days       age  life  renewed at day, by
      ["not configured: a third of the lifetime", undefined, 0, 90, 60, "life"],
      ["not configured, ten days: a third of the lifetime", undefined, 0, 15, 10, "life"],
      ["not configured, below ten days: half of it", undefined, 0, 9, 4.5, "life"],
      ["15 days before the end", 15, 0, 90, 75, "expiry"],
      ["15 days before the end of 45", 15, 0, 45, 30, "expiry"],
      ["a fraction of a day", 3.5, 0, 45, 41.5, "expiry"],
      ["60 days before the end of 90: as far as the cap", 60, 0, 90, 30, "expiry"],
      ["60 days before the end of 45 would mean every night", 60, 0, 45, 15, "expiry, capped"],
      ["15 days before the end of eight", 15, 0, 8, 4, "expiry, capped"],
      ["2 days before the end leave no night for another try", 2, 0, 90, 87, "runs"],
      ["at the very end", 0, 0, 90, 87, "runs"],
      ["three nights before the end of six days", undefined, 0, 6, 3, "life"],
      ["half of four days is less than three nights", undefined, 0, 4, 4 / 3, "runs"],
      ["but never in the first third", undefined, 0, 3, 1, "runs"],
      ["a lifetime that is too short for nightly runs", undefined, 0, 1, 1 / 3, "runs"],
      ["by age", 15, 7, 90, 7, "age"],
      ["by age instead of an earlier reauthorizeDays", 60, 50, 90, 50, "age"],
      ["by age instead of a later reauthorizeDays", 5, 80, 90, 80, "age"],
      ["by age, with a lifetime of a day", undefined, 0.25, 1, 0.25, "age"],
      ["an age that leaves no night for another try", 15, 88, 90, 87, "runs"],
      ["an age beyond the lifetime", 15, 60, 45, 30, "expiry"],
    ];
  for (const [what, reauthorizeDays, generateNewCertsAfterDays, life, at, rule] of table) {
    const found = renewal({ reauthorizeDays, generateNewCertsAfterDays }, day(0), day(life), DAY);
    assert.deepEqual([daysOf(found.renewAt), found.rule], [Number(at.toFixed(6)), rule], what);
  }
});

Deno.test("certificates of 15 minutes to 400 days are renewed in time by runs that are frequent enough, and not in every run", () => {
  for (const life of [15 * MINUTE, HOUR, 12 * HOUR, DAY, 6 * DAY, 10 * DAY, 45 * DAY, 90 * DAY, 400 * DAY]) {
    for (const runs of [3, 4, 5, 9, 30, 1000]) {
      const interval = life / runs;
      const { renewAt } = renewal({ generateNewCertsAfterDays: 0 }, day(0), new Date(START + life), interval);
      const waited = renewAt.getTime() - START;
      assert(waited >= life / 3 - 1, `${life} ms, ${runs} runs: in the first third`);
      const left = runs - Math.ceil(waited / interval);
      assert(left >= (runs >= 5 ? 2 : 1), `${life} ms, ${runs} runs: ${left} runs are left`);
    }
  }
});

Deno.test("usualInterval() is the second longest interval of the last twelve runs, so that one outage does not count", () => {
  const table: [string, readonly number[], number][] = [
    ["never run", [], 1],
    ["one run", [3], 1],
    ["two runs are too few", [3, 3.5], 1],
    ["every night", [0, 1, 2, 3, 4, 5], 1],
    ["every eight hours", [0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], 1 / 3],
    ["an outage of nine days", [0, 1, 10, 11, 12, 13], 1],
    ["two outages", [0, 1, 10, 11, 20, 21], 9],
    ["what was long ago does not count", [0, 30, ...Array.from({ length: 12 }, (_, night) => 60 + night)], 1],
    [
      "three runs in every night",
      [0, 1, 2, 3].flatMap((day) => [day, day + 1 / 24, day + 2 / 24]),
      22 / 24,
    ],
    ["a clock that was put back", [4, 5, 3, 2, 1, 0], 1],
  ];
  for (const [what, days, expected] of table) {
    assert.equal(
      usualInterval(days.map((day) => ({ at: iso(day) }))),
      Math.round(expected * DAY),
      what,
    );
  }
});

/** The decision about one certificate: the day of its renewal and the rule, or the reason why it is due. */
function decisionOn(one: Entry, now: number, state: Partial<State> = {}, part: Partial<Config> = {}): string {
  const { kept, tasks } = plan(configure([one.line], part), [one], stateOf(state), day(now));
  if (kept[0] !== undefined) return `day ${daysOf(kept[0].renewAt)}: ${kept[0].rule}`;
  const { reason } = tasks[0]!.due[0]!;
  return reason.kind === "found"
    ? reason.finding.kind
    : reason.kind === "renewal"
    ? reason.rule
    : reason.kind;
}

Deno.test("a certificate is kept until its renewal is due, and issued at once if it is missing or not as configured", () => {
  const one = present(line("example.com"));
  const decisions = [74.999, 75, 89.999, 90].map((now) => decisionOn(one, now, {}, { reauthorizeDays: 15 }));
  assert.deepEqual(decisions, ["day 75: expiry", "expiry", "expiry", "expired"]);
  const other = certificate(["example.com"]);
  const findings: Finding[] = [
    ...[MISSING, { kind: "missing", what: "key" } as const],
    { kind: "unreadable", what: "certificate", detail: "EACCES" },
    ...(["other names", "other key", "revoked"] as const).map((kind) => ({ kind, certificate: other })),
  ];
  const on = line("example.com www.example.com");
  for (const finding of findings) assert.equal(decisionOn(entry(on, finding), 1), finding.kind);
  assert.equal(decisionOn(entry(on, MISSING, FORMER), 1), "other names");
});

Deno.test("plan() warns of lifetimes too short for the runs, and of keys that are missing or not as configured", () => {
  const names = ["short.example.com", "small.example.com", "good.example.com", "keyless.example.com"];
  const lines = names.map((name) => line(name));
  const rsa = (bits: number): KeySpec => ({ type: "rsa", bits });
  const kept = (line: Line, to: number, bits: number) => {
    const facts = { ...certificate(line.names, { to }), keySpec: rsa(bits) };
    return entry(line, { kind: "present", certificate: facts });
  };
  const inventory = [
    ...[kept(lines[0]!, 2, 2048), kept(lines[1]!, 90, 2048), kept(lines[2]!, 90, 3072)],
    entry(lines[3]!, { kind: "missing", what: "key" }),
  ];
  const { warnings } = plan(
    configure(lines, { keyBitsRSA: 3072, curve: "P-256" }),
    inventory,
    stateOf(),
    day(1),
  );
  assert.deepEqual(warnings.map((one) => [one.kind, "entry" in one && one.entry.line.names[0]]), [
    ["short life", "short.example.com"],
    ["other key", "short.example.com"],
    ["other key", "small.example.com"],
    ["no key", "keyless.example.com"],
  ]);
});

Deno.test("plan() warns of a certificate that a section has received and that its line no longer has", () => {
  const receipt = (to: number) => ({ digest: "", fingerprint: "", at: iso(0), notAfter: iso(to) });
  const files = record({
    "www.example.com-cert-combined.rsa2048.pem": receipt(30),
    "gone.example.com-cert-combined.rsa2048.pem": receipt(30), // its line was removed, too
  });
  for (const [now, expected] of [[29, ["www.example.com-cert-combined.rsa2048.pem"]], [31, []]] as const) {
    const state = stateOf({ receipts: record({ web: files }) });
    const { warnings } = plan(configure([SITE]), [present(SITE)], state, day(now));
    assert.deepEqual(warnings.flatMap((one) => one.kind === "not renewed" ? one.file : []), expected);
  }
});

Deno.test("the lifetime of a short-lived certificate counts from its issuance, not from an earlier notBefore", () => {
  const one = present(line("example.com"), { from: -1 / 24, to: 1 / 24 }); // issued an hour after it begins
  const state = { runs: runsTo(0, 1 / 96) }; // every 15 minutes
  assert.equal(decisionOn(one, 0.001, state), "life");
  assert.equal(decisionOn({ ...one, issuedAt: day(0) }, 0.001, state), "day 0.013889: runs");
});

Deno.test("the CA's suggested time of renewal is used if it is earlier than the configured one", () => {
  const table: [what: string, at: number, now: number, fate: string, part?: object, config?: object][] = [
    ["before the dates", 50, 10, "day 50: ari"],
    ["before the next run", 50, 49.5, "ari"],
    ["after the next run", 50, 48.5, "day 50: ari"],
    ["in the past", -300, 10, "ari"],
    ["behind the dates", 70, 10, "day 60: life"],
    ["in the past, as the dates are, too", -300, 61, "life"],
    ["that led to this very certificate half a day ago", 5, 10, "day 60: life", { suggestedAt: iso(9.5) }],
    ["that led to it half a day ago, and is due by its dates", 50, 60.4, "life", { suggestedAt: iso(59.9) }],
    ["that led to it two days ago", 5, 10, "ari", { suggestedAt: iso(8) }],
    ["with ari: no", 5, 10, "day 60: life", {}, { ari: false }],
  ];
  for (const [what, at, now, expected, part, config] of table) {
    const renewal = { window: { start: iso(at), end: iso(at + 1), at: iso(at) }, ...part };
    const state = { renewals: record({ "id of new": renewal }), runs: runsTo(now) };
    assert.equal(decisionOn(present(line("example.com")), now, state, config), expected, what);
  }
});

Deno.test("both certificates of a line are one task; tasks are ordered by expiry, new lines last", () => {
  const [a, b, c, d] = ["a.example", "b.example", "c.example", "d.example"].map((name) => line(name));
  const inventory = [
    entry(a!, MISSING),
    entry(a!, MISSING, { keyType: "ec" }),
    present(b!, { to: 90 }),
    present(b!, { to: 80 }, "ec"),
    present(c!, { to: 70 }),
    present(c!, { from: 65, to: 155 }, "ec"),
    entry(d!, MISSING, { former: { certificate: certificate(["d.example"], { to: 75 }), file: "x" } }),
  ];
  const { tasks, kept } = plan(configure([a!, b!, c!, d!]), inventory, stateOf(), day(69));
  const texts = tasks.map(({ line, due }) =>
    [line.names[0], ...due.map(({ entry }) => entry.keyType)].join(" ")
  );
  assert.deepEqual(texts, ["c.example rsa", "d.example rsa", "b.example rsa ec", "a.example rsa ec"]);
  assert.deepEqual(kept.map(({ entry }) => [entry.line, entry.keyType]), [[c, "ec"]]);
});

Deno.test("a line waits after a failure, all lines wait while rate-limited; --retry ignores both", () => {
  const [a, b] = [line("a.example"), line("b.example")];
  const failed = { failures: record({ "a.example": failure({ retryAt: iso(2) }) }) };
  const limited = { holds: record({ "https://ca": iso(3), "https://another": iso(9) }) };
  const renew = selection({ renew: [a] });
  const table: [string, Partial<State>, number, PlanOptions, string][] = [
    ["back-off", failed, 1.9, {}, "b, not a"],
    ["back-off over", failed, 2, {}, "a b, not "],
    ["back-off with --retry", failed, 1.9, { retry: true }, "a b, not "],
    ["back-off with --renew", failed, 1.9, renew, "a, not "],
    ["rate-limited", limited, 2.9, {}, ", not a b"],
    ["rate-limited, with --renew", limited, 2.9, renew, ", not a"],
    ["rate-limited, with --retry", limited, 2.9, { retry: true }, "a b, not "],
    ["rate-limited no more", limited, 3, {}, "a b, not "],
  ];
  const letters = (lines: readonly { line: Line }[]) => lines.map(({ line }) => line.names[0]![0]).join(" ");
  for (const [what, state, now, options, expected] of table) {
    const inventory = [entry(a, MISSING), entry(b, MISSING)];
    const { tasks, waiting } = plan(configure([a, b]), inventory, stateOf(state), day(now), options);
    assert.equal(`${letters(tasks)}, not ${letters(waiting)}`, expected, what);
  }
});

Deno.test("back-offs grow, skip no nightly run, and take at most an eighth of the time that is left", () => {
  const minutes = (date: Date | undefined) => date && (date.getTime() - START) / MINUTE;
  const lines = [1, 2, 3, 4, 5, 400].map((count) => minutes(retryLineAt(count, day(0))));
  assert.deepEqual(lines, [1, 10, 100, 1000, 1200, 1200]);
  const deliveries = [1, 2, 3, 4, 5, 6, 7, 400].map((count) => minutes(retryDeliveryAt(count, day(0))));
  assert.deepEqual(deliveries, [undefined, 60, 120, 240, 480, 960, 1200, 1200]);
  for (const retryAt of [retryLineAt, retryDeliveryAt]) {
    assert.equal(minutes(retryAt(9, day(0), day(90))), 1200);
    assert.equal(minutes(retryAt(9, day(0), day(1 / 3))), 60);
    assert.equal(minutes(retryAt(9, day(0), day(-1))), 60, "expired: an hour");
  }
});

// ---- deliveries --------------------------------------------------------------------------------------------------

const WEB = section("web", { update: ["reload"] });
const SITE = line("www.example.com", [WEB]);
const NEVER = "[web] first delivery";
const NEW = "[web] new certificate (urgent)";

/** A state with receipts of these sections for the certificate of `SITE`. */
function receipts(sections: readonly Section[], part: Partial<Receipt> = {}): Partial<State> {
  const receiptOf = (section: Section): Receipt => (
    { digest: listsDigest(section, "prod"), fingerprint: "new", at: iso(1), ...part }
  );
  const file = "www.example.com-cert.rsa.pem";
  return {
    receipts: record(
      Object.fromEntries(sections.map((one) => [one.name, record({ [file]: receiptOf(one) })])),
    ),
  };
}

type Case = PlanOptions & { now?: number; inventory?: Entry[]; mode?: "test"; sections?: Section[] };

/** What is pending for a line whose certificate is present: `[web] new certificate, drift (urgent); …` */
function pending(on: Line, state: Partial<State> = {}, given: Case = {}): string {
  const { now = 2, inventory = [present(on)], mode = "prod", sections = on.sections, ...options } = given;
  const config = configure([on], { mode, sections });
  const adopted = stateOf(state);
  adoptReceipts(config, adopted);
  return plan(config, inventory, adopted, day(now), options).deliveries.map(
    ({ section, pending, urgent, until }) => {
      const reasons = [...new Set(pending.map(({ reason }) => reason))].join(", ");
      const wait = until === undefined ? "" : ` until day ${daysOf(until)}`;
      return `[${section.name}] ${reasons}${urgent ? " (urgent)" : ""}${wait}`;
    },
  ).join("; ");
}

Deno.test("plan() finds each pending delivery, its reason, and whether it is urgent", () => {
  const former = { ...WEB, name: "former" };
  const done = receipts([WEB]);
  const file = "www.example.com-cert.rsa.pem";
  const bySection = selection({ deliver: ["web"] });
  const table: [what: string, state: Partial<State>, pending: string, options?: PlanOptions][] = [
    ["delivered", done, ""],
    ["first delivery: a rollout", {}, NEVER],
    ["issued just now", {}, NEW, { issued: new Set([file]) }],
    ["renewed", receipts([WEB], { fingerprint: "old" }), NEW],
    ["commands changed", receipts([WEB], { digest: "x" }), "[web] commands changed"],
    ["--deliver its name", done, "[web] asked for (urgent)", selection({ deliver: [SITE] })],
    ["--deliver its section", done, "[web] asked for (urgent)", bySection],
    ["--deliver, and done in this run", done, "", { ...bySection, delivered: new Set([`web/${file}`]) }],
    ["--only it", {}, NEVER, selection({ only: [SITE] })],
    ["--only another", {}, "", selection({ only: [line("other.example")] })],
    ["renamed", receipts([former]), ""],
    ["renamed before the new certificate was delivered", receipts([former], { fingerprint: "old" }), NEW],
    ["renamed, and its commands changed", receipts([{ ...former, update: ["restart"] }]), NEVER],
  ];
  for (const [what, state, expected, options] of table) {
    assert.equal(pending(SITE, state, options), expected, what);
  }
});

Deno.test("a line whose names change and change back is not delivered again", () => {
  const wider = line("www.example.com more.example.com", [WEB]);
  const state = stateOf(receipts([WEB]));
  forgetUnknown(configure([wider]), [entry(wider, MISSING, FORMER)], state, day(2));
  assert.equal(pending(SITE, state), "");
});

Deno.test("a failed delivery waits; another certificate, other commands or other endpoints end the wait", () => {
  const { key } = plan(configure([SITE]), [present(SITE)], stateOf(), day(1)).deliveries[0]!;
  const failed: DeliveryFailure = { ...failure({ retryAt: iso(3) }), key, urgent: true };
  const table: [what: string, section: Partial<Section>, given: Case, string][] = [
    ["nothing changed", {}, {}, `${NEVER} (urgent) until day 3`],
    ["the back-off is over", {}, { now: 3 }, `${NEVER} (urgent)`],
    ["--retry", {}, { retry: true }, `${NEVER} (urgent)`],
    ["--deliver", {}, selection({ deliver: ["web"] }), "[web] asked for (urgent)"],
    ["another certificate", {}, { inventory: [present(SITE, { is: "newer" })] }, NEVER],
    ["other commands", { update: ["restart"] }, {}, NEVER],
    ["other endpoints", { verify: endpoints("www.example.com:443") }, {}, NEVER],
    [
      "settings without effect on deliveries",
      { prepare: ["x"], alert: ["y"] },
      {},
      `${NEVER} (urgent) until day 3`,
    ],
  ];
  for (const [what, part, given, expected] of table) {
    const on = what === "another certificate" ? SITE : line("www.example.com", [{ ...WEB, ...part }]);
    assert.equal(pending(on, { deliveries: record({ web: failed }) }, given), expected, what);
  }
});

// ---- endpoints ---------------------------------------------------------------------------------------------------

type Served = Partial<ServedCertificate> | Sight["kind"];

/** A certificate as it is served, by default an older one of `SITE`; or that none is. */
function sight(part: Served, address = "192.0.2.1"): Sight {
  if (typeof part === "string") return { address, kind: part };
  const old = { fingerprint: "old", names: ["www.example.com"], notBefore: iso(-60), notAfter: iso(30) };
  return { address, kind: "served", certificate: { ...old, selfSigned: false, issuer: "CA", ...part } };
}

const RIGHT = sight({ fingerprint: "new" });
const OLD = sight({});
const SILENT = sight("unreachable");

/** What was seen at `www.example.com:443` on day 2. */
function seen(sights: readonly Sight[], part: Partial<ProbeRecord> = {}): Partial<State> {
  return { probes: record({ "www.example.com:443 rsa": { at: iso(2), sights: [...sights], ...part } }) };
}

const TWICE = { confirmed: true, badSince: iso(2) };
const WATCHED = { ...WEB, verify: endpoints("www.example.com:443") };
const WATCHED_SITE = line("www.example.com", [WATCHED]);

/** The verdict on what one address of `www.example.com:443` serves. */
function verdictOn(part: Served, mode: "test" | "prod", others: readonly Entry[]): string {
  const config = configure([WATCHED_SITE], { mode });
  const options = { counterpart: () => others };
  const found = plan(config, [present(WATCHED_SITE)], stateOf(seen([sight(part)])), day(2), options);
  return found.endpoints[0]!.sights[0]!.verdict;
}

Deno.test("drift is repaired three times at once, then once in 20 hours, and only if it is certain", () => {
  const drift = "[web] drift (urgent)";
  const old = seen([OLD], TWICE);
  const table: [what: string, probes: Partial<State>, receipt: Partial<Receipt>, now: number, string][] = [
    ["an older certificate", old, {}, 2.1, drift],
    ["seen once", seen([OLD], { badSince: iso(2) }), {}, 2.1, ""],
    ["on one of two addresses", seen([RIGHT, sight({}, "192.0.2.2")], TWICE), {}, 2.1, drift],
    ["seen before the delivery", old, { at: iso(2.05) }, 2.1, ""],
    ["seen in the moment of the delivery", old, { at: iso(2) }, 2.1, ""],
    ["from elsewhere", seen([sight({ issuer: "another CA" })], TWICE), {}, 2.1, ""],
    ["unreachable", seen([SILENT], TWICE), {}, 2.1, ""],
    ["repaired twice", old, { at: iso(1.95), repairs: 2 }, 2.1, drift],
    ["repaired three times", old, { at: iso(1.5), repairs: 3 }, 2.25, `${drift} until day 2.333333`],
    ["20 hours after that", old, { at: iso(1.5), repairs: 3 }, 2.4, drift],
    ["renewed after that", old, { repairs: 3, fingerprint: "x" }, 2.1, NEW],
    ["commands changed after that", old, { repairs: 3, digest: "x" }, 2.1, "[web] commands changed (urgent)"],
  ];
  for (const [what, probes, part, now, expected] of table) {
    assert.equal(pending(WATCHED_SITE, { ...receipts([WATCHED], part), ...probes }, { now }), expected, what);
  }
  assert.equal(
    pending(WATCHED_SITE, old, { now: 2.1 }),
    "[web] first delivery (urgent)",
    "the state is lost",
  );
  const state = { ...receipts([WATCHED], { repairs: 3 }), ...old };
  const config = configure([WATCHED_SITE]);
  const { key } = plan(config, [present(WATCHED_SITE)], stateOf(state), day(2.1)).deliveries[0]!;
  const deliveries = record({ web: { ...failure({ retryAt: iso(3) }), key, urgent: true } });
  const failing = pending(WATCHED_SITE, { ...state, deliveries }, { now: 2.1 });
  assert.equal(failing, `${drift} until day 3`, "a repair that fails backs off, too");
});

Deno.test("a rehearsal repairs nothing, even if its certificate is in the place of production's", () => {
  const state = { ...receipts([WATCHED]), ...seen([RIGHT], TWICE) };
  const counterpart = () => [present(WATCHED_SITE, { is: "production's" })];
  assert.equal(pending(WATCHED_SITE, state, { mode: "test", counterpart }), "");
});

/** Where the certificates of these lines are probed -> the first names of the lines of which one must be served there. */
function places(...lines: readonly Line[]): Record<string, string> {
  const inventory = lines.map((on) => present(on));
  const { endpoints } = plan(configure(lines), inventory, stateOf(), day(1));
  const namesOf = (entries: readonly Entry[]) => entries.map(({ line }) => line.names[0]).join();
  return Object.fromEntries(endpoints.map(({ key, wanted }) => [key.replace(/ rsa$/, ""), namesOf(wanted)]));
}

Deno.test("endpoints are those configured, with DOMAIN and DOMAINS_ALL replaced by the names of the lines", () => {
  const table: [verify: string, names: string, places: string][] = [
    ["DOMAIN:443", "a.example b.a.example", "a.example:443"],
    ["DOMAINS_ALL:443", "a.example b.a.example", "a.example:443 b.a.example:443"],
    ["DOMAIN:25/smtp", "a.example", "a.example:25/smtp"],
    ["DOMAIN:443#DOMAIN", "a.example", "a.example:443#a.example"],
    ["DOMAINS_ALL:443#DOMAINS_ALL", "a.example b.example", "a.example:443#a.example b.example:443#b.example"],
    ["192.0.2.1:443#DOMAINS_ALL", "a.example b.example", "192.0.2.1:443#a.example 192.0.2.1:443#b.example"],
    ["DOMAINS_ALL:443", "*.a.example a.example", "a.example:443"],
    ["DOMAIN:443", "*.a.example", ""],
    ["w.a.example:443", "*.a.example", "w.a.example:443"],
    ["w.x.a.example:443", "*.a.example", "w.x.a.example:443#www.a.example"],
    ["192.0.2.1:443 web1.internal:443", "a.example", "192.0.2.1:443#a.example web1.internal:443#a.example"],
    ["web1:443#other.example", "a.example", "web1:443#a.example"],
    ["192.0.2.1:443", "192.0.2.1", "192.0.2.1:443"],
    ["192.0.2.7:443", "192.0.2.1", "192.0.2.7:443"],
    ["192.0.2.7:443", "192.0.2.1 a.example", "192.0.2.7:443#a.example"],
    ["DOMAIN:443", "2001:db8::1", "[2001:db8::1]:443"],
    ["web1:443#DOMAINS_ALL", "a.example 192.0.2.1", "web1:443#a.example web1:443"],
  ];
  for (const [verify, names, expected] of table) {
    const on = line(names, [section("s", { verify: endpoints(verify) })]);
    assert.equal(Object.keys(places(on)).join(" "), expected, `${verify} for ${names}`);
  }
});

Deno.test("an endpoint is right with any current certificate for its name, of whichever line and section", () => {
  const host = section("host", { verify: endpoints("w.example.com:443 192.0.2.1:443") });
  const [wild, own] = [line("*.example.com", [host]), line("w.example.com", [WEB])];
  const expected = {
    "w.example.com:443": "w.example.com,*.example.com",
    "192.0.2.1:443#www.example.com": "*.example.com",
  };
  assert.deepEqual(places(wild, own), expected);
  const certificates = new Map([wild, own].map((on) => [on, [present(on)]] as const));
  const basis = { config: configure([wild, own]), certificates, state: stateOf(), now: day(1), options: {} };
  const alone = planSection(basis, host);
  assert.deepEqual(alone.endpoints.map(({ key }) => key.replace(" rsa", "")), Object.keys(expected));
  assert.deepEqual(alone.endpoints[0]!.wanted.map(({ line }) => line), [own, wild]);
});

Deno.test("each endpoint is probed once for each key type, however many sections name it", () => {
  const verify = endpoints("a.example:443 web1:443");
  const one = section("one", { verify, keyTypes: ["rsa", "ec"] });
  const on = line("a.example", [one, section("two", { verify, keyTypes: ["ec"] })], "ec");
  const { endpoints: found } = plan(configure([on]), [present(on), present(on, {}, "ec")], stateOf(), day(1));
  assert.deepEqual(found.map(({ key, sections }) => `${key} ${sections.map(({ name }) => name)}`), [
    "a.example:443 rsa one",
    "a.example:443 ec one,two",
    "web1:443#a.example rsa one",
    "web1:443#a.example ec one,two",
  ]);
  for (const { keyType, wanted } of found) assert.deepEqual(wanted.map(({ keyType }) => keyType), [keyType]);
});

Deno.test("an endpoint is probed until it is right, and again once that is more than five hours ago", () => {
  const table: [string, Partial<State>, now: number, due: boolean][] = [
    ["never probed", {}, 2, true],
    ["right a moment ago", seen([RIGHT]), 2, false],
    ["right five hours ago", seen([RIGHT]), 2.2, false],
    ["right in the run before, six hours ago", seen([RIGHT]), 2.249, true],
    ["wrong a moment ago", seen([OLD]), 2, true],
    ["one of two addresses is wrong", seen([RIGHT, SILENT]), 2, true],
    ["an address family that this host lacks", seen([RIGHT, sight("passed over")]), 2, false],
    ["nothing was seen", seen([]), 2, true],
  ];
  for (const [what, state, now, due] of table) {
    const found = plan(configure([WATCHED_SITE]), [present(WATCHED_SITE)], stateOf(state), day(now));
    assert.deepEqual(found.endpoints.map(({ due }) => due), [due], what);
  }
});

Deno.test("the certificate that an endpoint serves is current, ours and wrong, or foreign", () => {
  const staging = [present(WATCHED_SITE, { is: "staging" })];
  const table: [what: string, Served, verdict: string][] = [
    ["the newest", { fingerprint: "new" }, "current"],
    ["an older one from the same CA", {}, "older"],
    ["an older one that has expired", { notAfter: iso(1) }, "invalid"],
    ["a self-signed one", { selfSigned: true, issuer: "www.example.com" }, "invalid"],
    ["a self-signed one for another name", { selfSigned: true, names: ["localhost"] }, "mismatched"],
    ["an older one from another CA", { issuer: "another CA" }, "foreign"],
    ["a newer one from the same CA", { notBefore: iso(1), notAfter: iso(91) }, "foreign"],
    ["one of a wildcard from elsewhere", { names: ["*.example.com"], issuer: "CDN" }, "foreign"],
    ["one for other names", { names: ["example.com", "www.example.org"] }, "mismatched"],
    ["an expired one for other names", { names: ["x.example"], notAfter: iso(1) }, "mismatched"],
    ["one without any name", { names: [] }, "mismatched"],
    ["that of --test", { fingerprint: "staging" }, "staging"],
    ["none of this key type", "refused", "refused"],
    ["a handshake that fails", "unfinished", "unfinished"],
    ["no answer", "unreachable", "unreachable"],
    ["no route", "passed over", "passed over"],
  ];
  for (const [what, part, verdict] of table) assert.equal(verdictOn(part, "prod", staging), verdict, what);
});

Deno.test("under --test any handshake is right, except with the staging certificate in the place of production's", () => {
  const production = [present(WATCHED_SITE, { is: "production's" })];
  const staging = { fingerprint: "new" };
  const table: [Served, production: readonly Entry[], verdict: string][] = [
    [{ fingerprint: "production's" }, production, "answers"],
    [{ selfSigned: true, names: ["localhost"] }, production, "answers"],
    [staging, production, "staging"],
    [staging, [], "current"],
    [staging, [present(line("b.example"))], "current"],
    ["unreachable", production, "unreachable"],
  ];
  for (const [part, others, verdict] of table) assert.equal(verdictOn(part, "test", others), verdict);
});

Deno.test("an endpoint without a name is checked against all names of its lines", () => {
  const on = line("192.0.2.1", [section("host", { verify: endpoints("web1.internal:443") })]);
  const verdicts = [["192.0.2.1"], ["192.0.2.7"]].map((names) => {
    const probes = { "web1.internal:443 rsa": { at: iso(2), sights: [sight({ names })] } };
    return plan(configure([on]), [present(on)], stateOf({ probes }), day(2)).endpoints[0]!.sights[0]!.verdict;
  });
  assert.deepEqual(verdicts, ["older", "mismatched"]);
});

Deno.test("recordOf() records since when an endpoint is wrong, and whether our own delivery broke it", () => {
  const [since, now] = [{ badSince: iso(1) }, { badSince: iso(2) }];
  const broken = { ...since, brokenByDelivery: true };
  const before = (sight: Sight, part: Partial<ProbeRecord> = {}) => ({
    at: iso(1),
    sights: [sight],
    ...part,
  });
  const table: [what: string, before: ProbeRecord | undefined, Sight, after: boolean, object][] = [
    ["right", before(OLD, since), RIGHT, false, {}],
    ["wrong now", before(RIGHT), OLD, false, now],
    ["wrong still", before(OLD, since), OLD, false, since],
    ["silent now", before(RIGHT), SILENT, false, now],
    ["silent after our delivery", before(RIGHT), SILENT, true, { ...now, brokenByDelivery: true }],
    ["no TLS after it", before(RIGHT), sight("unfinished"), true, { ...now, brokenByDelivery: true }],
    ["silent before it, too", before(OLD, since), SILENT, true, since],
    ["never probed before it", undefined, SILENT, true, now],
    ["still broken by it", before(SILENT, broken), SILENT, false, broken],
  ];
  const config = configure([WATCHED_SITE]);
  for (const [what, before, sight, afterDelivery, expected] of table) {
    const state = stateOf(before && { probes: { "www.example.com:443 rsa": before } });
    const [status] = plan(config, [present(WATCHED_SITE)], state, day(2)).endpoints;
    const basis = { config, certificates: byLine([]), state, now: day(2), options: {} };
    const found = recordOf(status!, [sight], basis, { confirmed: false, afterDelivery });
    assert.deepEqual(found, { at: iso(2), sights: [sight], ...expected }, what);
  }
});

// ---- problems and alerts -----------------------------------------------------------------------------------------

Deno.test("plan() finds each problem, and whether it causes an alert", () => {
  const config = configure([WATCHED_SITE]);
  const delivered = receipts([WATCHED]);
  const failing = (part: Partial<Failure>) => ({ failures: record({ "www.example.com": failure(part) }) });
  const { key } = plan(config, [present(WATCHED_SITE)], stateOf(), day(1)).deliveries[0]!;
  const stuck = (since: number) => (
    { deliveries: record({ web: { ...failure({ since: iso(since) }), key, urgent: true } }) }
  );
  const wrong = (part: Served, since: number, more: Partial<ProbeRecord> = {}) => (
    { ...delivered, ...seen([sight(part)], { badSince: iso(since), ...more }) }
  );
  const window = { start: iso(-300), end: iso(3), at: iso(-200) };
  const [failed, overdue] = ["failing www.example.com", "overdue www.example.com-cert.rsa.pem!"];
  const endpoint = "endpoint www.example.com:443 rsa 192.0.2.1";
  const unreachable = "endpoint www.example.com:443 192.0.2.1"; // of any key type
  // an exclamation mark means an alert
  const table: [what: string, state: Partial<State>, now: number, problems: string, found?: Entry][] = [
    ["all is well", delivered, 2, ""],
    ["the first delivery is pending", {}, 2, ""],
    ["a line failed", failing({}), 61, failed],
    ["a line failed three times", failing({ count: 3 }), 61, `${failed}!`],
    ["a line failed, and is overdue", failing({}), 63, `${failed}!`],
    ["a failure of a line that is no longer due", failing({ count: 9 }), 2, ""],
    ["the CA is unreachable", failing({ shared: true }), 61, "CA"],
    ["the CA is unreachable three times", failing({ shared: true, count: 3 }), 61, "CA!"],
    ["the CA accepts no orders", { holds: { "https://ca": iso(62) } }, 61, "rate-limited"],
    ["due since last night", { runs: runsTo(60) }, 60.9, ""],
    ["due for more than two runs", { runs: runsTo(62) }, 62.1, overdue],
    ["due for more than two weekly runs", { runs: runsTo(70, 7) }, 75, overdue],
    ["due for less than two weekly runs", { runs: runsTo(70, 7) }, 73, ""],
    ["expired", { runs: runsTo(90) }, 90, overdue],
    [
      "revoked, and not replaced",
      {},
      2,
      overdue,
      entry(WATCHED_SITE, {
        kind: "revoked",
        certificate: certificate(WATCHED_SITE.names),
      }),
    ],
    ["expired, while its names cannot be changed", {}, 91, overdue, entry(WATCHED_SITE, MISSING, FORMER)],
    ["never issued", {}, 91, "", entry(WATCHED_SITE, MISSING)],
    ["due by a window that began long ago", { renewals: { "id of new": { window } } }, 2, ""],
    ["a delivery failed", stuck(1.9), 2, "delivery web"],
    ["a delivery is pending for 20 hours", stuck(1), 2, "delivery web!"],
    ["a failure of a delivery that is no longer pending", { ...stuck(1), ...delivered }, 2, ""],
    ["renewed since an endpoint was right", { ...receipts([WATCHED]), ...seen([OLD]) }, 2.1, ""],
    ["an endpoint is wrong", wrong({}, 2), 2.1, endpoint],
    ["an endpoint is wrong for 20 hours", wrong({}, 1), 2.1, `${endpoint}!`],
    ["an endpoint is unreachable", wrong("unreachable", 2), 2.1, unreachable],
    ["an endpoint is unreachable for 20 hours", wrong("unreachable", 1), 2.1, `${unreachable}!`],
    ["an expired certificate is served", wrong({ notAfter: iso(1) }, 2), 2.1, `${endpoint}!`],
    ["one for other names is served", wrong({ names: ["x.example"] }, 2), 2.1, `${endpoint}!`],
    ["our delivery broke an endpoint", wrong("refused", 2, { brokenByDelivery: true }), 2.1, `${endpoint}!`],
    ["this host lacks an address family", wrong("passed over", 2), 2.1, ""],
    ["not run for less than two days", { runs: runsTo(10) }, 12, ""],
    ["not run for three nights", { runs: runsTo(10) }, 13.1, "not run!"],
    ["run every 8 hours, and not for 25", { runs: runsTo(10, 1 / 3) }, 11.1, ""],
    ["run every 8 hours, and not for two days", { runs: runsTo(10, 1 / 3) }, 12.1, "not run!"],
    ["run weekly, and not for two weeks", { runs: runsTo(10, 7) }, 24, ""],
    ["run weekly, and not for three", { runs: runsTo(10, 7) }, 31.1, "not run!"],
    ["a certificate that begins within the hour", {}, -1 / 25, ""],
    ["a certificate that begins tomorrow", {}, -1, "clock!"],
    ["a run recorded for tomorrow", { ...delivered, runs: runsTo(3) }, 2, "clock!"],
  ];
  for (const [what, state, now, expected, found = present(WATCHED_SITE)] of table) {
    const { problems } = plan(config, [found], stateOf(state), day(now));
    assert.equal(problems.map(({ key, alert }) => `${key}${alert ? "!" : ""}`).join(), expected, what);
  }
  const problemsOf = (part: Partial<Config>, options: PlanOptions) =>
    plan(configure([SITE], part), [present(SITE)], stateOf({ runs: runsTo(10) }), day(12.5), options)
      .problems;
  assert.deepEqual(problemsOf({ mode: "test" }, {}), [], "only production has to run");
  const full = { writeError: () => new Error("No space left on device") };
  assert.deepEqual(problemsOf({}, full).map(({ kind, alert }) => [kind, alert]), [["disk", true]]);
  for (const [hours, expected] of [[0.9, []], [1.1, ["clock"]], [-1.1, ["clock"]]] as const) {
    assert.deepEqual(problemsOf({}, { aheadMs: () => hours * HOUR }).map(({ kind }) => kind), expected);
  }
});

Deno.test("an alert goes to a problem's sections and to [every], once in 20 hours and once when it is over", () => {
  const alert = ["mail"];
  const [web, mail, silent] = [section("web", { alert }), section("mail", { alert }), section("silent")];
  const every = section("every", { alert });
  const lines = [
    line("a.example", [web, every]),
    line("b.example", [mail, every]),
    line("c.example", [silent, every]),
  ];
  const config = configure(lines);
  const alerts = (failing: string, sent: State["alerts"], now: number) => {
    const names = failing.split(" ").map((letter) => [`${letter}.example`, failure({ count: 3 })]);
    const state = stateOf({ failures: record(Object.fromEntries(names)), alerts: sent });
    const { problems } = plan(config, lines.map((on) => entry(on, MISSING)), state, day(now));
    return dueAlerts(config, problems, state, day(now)).map(({ section, problems, resolved }) =>
      `${section.name}: ${[...problems.map(({ lines }) => lines[0]!.names[0]![0]), ...resolved].join(" ")}`
    ).join(", ");
  };
  const sent = { "failing a.example": { at: iso(2), what: "not-a" } };
  const both = record({ web: record(sent), every: record(sent) });
  assert.equal(alerts("a c", {}, 2), "web: a, every: a c");
  assert.equal(alerts("a c", both, 2.5), "every: c", "sent twelve hours ago");
  assert.equal(alerts("a c", both, 2.84), "web: a, every: a c", "sent twenty hours ago");
  assert.equal(alerts("c", both, 2.5), "web: not-a, every: c not-a", "well again");
  assert.equal(alerts("", {}, 2.5), "", "no alert was sent, so none is sent when it is over");
});

// ---- the state ---------------------------------------------------------------------------------------------------

Deno.test("the digest of a section's lists is the same in every version of lematt", () => {
  const lists = { uploadCerts: ["a"], uploadKeys: ["b"], uploadEach: ["c"], update: ["d", "ü"] };
  const one = section("x", lists);
  assert.equal(listsDigest(one, "prod"), "362b80b2e043edfc");
  assert.equal(listsDigest({ ...one, rehearse: true }, "test"), "362b80b2e043edfc");
  assert.equal(listsDigest(one, "test"), listsDigest({ ...one, uploadEach: [] }, "prod"));
});

Deno.test("a section that was renamed, and renamed back after a renewal, is not delivered again", () => {
  const state = stateOf(receipts([WEB], { fingerprint: "old", at: iso(0) }));
  const renamed = { ...WEB, name: "renamed" };
  const after = { ...state, receipts: { ...state.receipts, ...receipts([renamed]).receipts } };
  assert.equal(pending(SITE, after, { sections: [WEB, renamed] }), NEW, "both are there");
  assert.equal(pending(SITE, after), "");
});

Deno.test("an unreachable endpoint is one problem, whatever key types are probed", () => {
  const verify = endpoints("www.example.com:443");
  const on = line("www.example.com", [section("web", { verify, keyTypes: ["rsa", "ec"] })], "ec");
  const inventory = [present(on), present(on, {}, "ec")];
  const problems = (...kinds: [rsa: Sight["kind"], ec: Sight["kind"]]) => {
    const record = (kind: Sight["kind"], since: number) => ({
      at: iso(2),
      badSince: iso(since),
      sights: [sight(kind as Served)],
    });
    const probes = {
      "www.example.com:443 rsa": record(kinds[0], 1.9),
      "www.example.com:443 ec": record(kinds[1], 1),
    };
    return plan(configure([on]), inventory, stateOf({ probes }), day(2)).problems;
  };
  const [both, ...none] = problems("unreachable", "unreachable");
  assert.deepEqual(none, []);
  assert(both?.kind === "endpoint" && both.alert && both.since.getTime() === day(1).getTime());
  assert.deepEqual(both.endpoints.map(({ keyType }) => keyType), ["rsa", "ec"]);
  assert.equal(problems("unreachable", "refused").length, 2);
});

Deno.test("forgetUnknown() keeps what is still used, and drops what no longer exists", () => {
  const on = line("www.example.com", [{ ...WATCHED, alert: ["mail"] }]);
  const both = <T>(known: string, value: T) => ({ [known]: value, unknown: value });
  const state = stateOf({
    renewals: both("id of new", {}),
    failures: both("www.example.com", failure()),
    orders: both("www.example.com-cert.rsa.pem", { url: "https://ca/1", account: "a", since: iso(1) }),
    deliveries: both("web", { key: "k", ...failure(), urgent: true }),
    alerts: both("web", {
      "endpoint www.example.com:443 rsa 192.0.2.1": { at: iso(1), what: "x" },
      "endpoint removed.example:443 192.0.2.1": { at: iso(1), what: "is not configured any more" },
    }),
    probes: both("www.example.com:443 rsa", { at: iso(1), sights: [] }),
    receipts: both("web", { "www.example.com-cert.rsa.pem": {} as Receipt }),
  });
  state.receipts.unknown = { unknown: {} as Receipt };
  const config = configure([on]);
  // it is due, and its delivery is pending
  state.deliveries.web!.key = plan(config, [present(on)], state, day(61)).deliveries[0]!.key;
  forgetUnknown(config, [present(on)], state, day(61));
  for (const [what, kept] of Object.entries(state)) {
    if (typeof kept === "object") assert(!Object.hasOwn(kept, "unknown"), what);
  }
  const kinds = ["renewals", "failures", "orders", "deliveries", "alerts", "probes", "receipts"] as const;
  for (const kind of kinds) assert.equal(Object.keys(state[kind]).length, 1, kind);
  assert.deepEqual(Object.keys(state.alerts.web!), ["endpoint www.example.com:443 rsa 192.0.2.1"]);
  Object.assign(state, receipts([WATCHED]));
  forgetUnknown(config, [present(on)], state, day(2));
  assert.deepEqual(
    [Object.keys(state.failures), Object.keys(state.deliveries)],
    [[], []],
    "not due, not pending",
  );
});

Deno.test("names may equal properties of every object, such as `constructor`", () => {
  for (const name of ["constructor", "__proto__", "toString", "hasOwnProperty"]) {
    const own = section(name, { update: ["x"], alert: ["mail"], verify: endpoints("web1:443") });
    const on = line(name, [own]);
    const config = configure([on]);
    assert.equal(pending(on), `[${name}] first delivery`);
    const receipt = { digest: listsDigest(own, "prod"), fingerprint: "new", at: iso(1) };
    const text = JSON.stringify({
      ...emptyState(),
      receipts: { X: { [present(on).file]: receipt } },
      failures: { X: failure({ count: 3 }) },
      deliveries: { X: { ...failure(), key: "k", urgent: true } },
    });
    const state = parseState(text.replaceAll('"X"', `"${name}"`), day(2)) as State;
    assert.equal(pending(on, state), "");
    const { problems } = plan(config, [entry(on, MISSING)], state, day(2));
    assert.equal(dueAlerts(config, problems, state, day(2))[0]?.section, own);
    forgetUnknown(config, [entry(on, MISSING)], state, day(2));
    assert.deepEqual([Object.keys(state.receipts), Object.keys(state.failures)], [[name], [name]]);
  }
});
