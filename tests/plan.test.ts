/** Goal: every decision, as tables: what is renewed, delivered and probed, what waits, and what is a problem. */

import assert from "node:assert/strict";
import type { Config, Endpoint, KeyType, Line, Section } from "../lib/config.ts";
import { recordOf } from "../lib/endpoints.ts";
import { listsDigest, plan as planOn } from "../lib/plan.ts";
import { adoptReceipts, forgetUnknown, writeReceipts } from "../lib/receipts.ts";
import * as renewals from "../lib/renewal.ts";
import type { Basis, PlanOptions, Selection, Task } from "../lib/renewal.ts";
import { emptyState, record } from "../lib/state.ts";
import type { Failure, ProbeRecord, Receipt, ServedCertificate, Sight, State } from "../lib/state.ts";
import type { Entry, Finding } from "../lib/store.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const START = Date.UTC(2026, 0, 1);
const day = (days: number) => new Date(START + days * DAY);
const iso = (days: number) => day(days).toISOString();
const daysOf = (date: Date | undefined) => date && Number(((date.getTime() - START) / DAY).toFixed(6));
/** Seven runs, so many nights apart, of which the last begins at day `last`. */
const runsTo = (last: number, nights = 1) =>
  [6, 5, 4, 3, 2, 1, 0].map((n) => ({ at: iso(last - n * nights) }));

function section(name: string, part: Partial<Section> = {}): Section {
  const none = { domains: [], prepare: [], uploadCerts: [], uploadKeys: [], uploadEach: [], update: [] };
  const rest = { line: 1, rehearse: false, verifyWaitSeconds: 0, dnsPresent: [], dnsCleanup: [] };
  return { ...none, ...rest, name, keyTypes: ["rsa"], verify: [], alert: [], dnsParallel: false, ...part };
}

let lineNumber = 0;
function line(names: string, sections: readonly Section[] = [], keyTypes: KeyType[] = ["rsa"]): Line {
  return { line: ++lineNumber, names: names.split(" "), sections, keyTypes, formerNames: [] };
}

function configure(lines: readonly Line[], part: Partial<Config> = {}): Config {
  const sections = [...new Set(lines.flatMap(({ sections }) => sections))];
  const settings = { mode: "prod", generateNewCertsAfterDays: 0, ari: true, directoryUrl: "https://ca" };
  return { ...settings, keyBitsRSA: 3072, sections, lines, ...part } as Config;
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
  const keySpec = { type: "rsa", bits: 3072 } as const;
  const dates = { notBefore: day(from), notAfter: day(to) };
  return { names, ...dates, keySpec, fingerprint: is, id: `id of ${is}`, issuer: "CA", selfSigned: false };
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

const WEB = section("web", { update: ["reload"], verify: endpoints("www.example.com:443") });
const SITE = line("www.example.com", [WEB]);
const FILE = "www.example.com-cert.rsa.pem";
const MISSING: Finding = { kind: "missing", what: "certificate" };
/** What the first name of a line still links to. */
const FORMER = { former: { certificate: certificate(SITE.names), file: FILE } };

interface Given extends PlanOptions {
  on?: readonly Line[];
  found?: readonly Entry[];
  state?: Partial<State>;
  now?: number;
  config?: Partial<Config>;
}

function basisOf({ on = [SITE], found, state, now = 2, config, ...options }: Given): Basis {
  const certificates = renewals.byLine(found ?? on.map((one) => present(one)));
  return {
    config: configure(on, config),
    certificates,
    state: { ...emptyState(), ...state },
    now: day(now),
    options,
  };
}

const plan = (given: Given) => planOn(basisOf(given));

function failure(part: Partial<Failure> = {}): Failure {
  return { count: 1, since: iso(1), at: iso(1), error: "refused", ...part };
}

/** A selection that names nothing. */
const none = new Set<never>();
const NOTHING: Selection = { lines: none, sections: none, renew: none, deliver: none, newKey: false };

// ---- renewal -----------------------------------------------------------------------------------------------------

Deno.test("renewal() follows the settings as far as the lifetime and the interval between runs allow", () => {
  type Days = number | undefined;
  const table: [what: string, reauthorize: Days, age: number, life: number, at: number, rule: string][] = [
    ["not configured: a third of the lifetime", undefined, 0, 90, 60, "life"],
    ["not configured, below ten days: half of it", undefined, 0, 9, 4.5, "life"],
    ["15 days before the end", 15, 0, 90, 75, "expiry"],
    ["60 days before the end of 45 would mean every night", 60, 0, 45, 15, "expiry, capped"],
    ["15 days before the end of eight", 15, 0, 8, 4, "expiry, capped"],
    ["2 days before the end leave no night for another try", 2, 0, 90, 87, "runs"],
    ["C4: but never in the first third", undefined, 0, 3, 1, "runs"],
    ["by age instead of reauthorizeDays", 60, 50, 90, 50, "age"],
    ["C4: by age, with a lifetime of a day", undefined, 0.25, 1, 0.25, "age"],
  ];
  for (const [what, reauthorizeDays, generateNewCertsAfterDays, life, at, rule] of table) {
    const found = renewals.renewal({ reauthorizeDays, generateNewCertsAfterDays }, day(0), day(life), DAY);
    assert.deepEqual([daysOf(found.renewAt), found.rule], [at, rule], what);
  }
});

Deno.test("usualInterval() is the second longest interval of the last twelve runs, so that one outage does not count", () => {
  const intervalOf = (...days: number[]) =>
    renewals.usualInterval(days.map((day) => ({ at: iso(day) }))) / DAY;
  assert.equal(intervalOf(3, 3.5), 1, "two runs are too few");
  assert.equal(intervalOf(0, 1, 10, 11, 12, 13), 1);
  assert.equal(intervalOf(0, 30, 60, ...Array.from({ length: 12 }, (_, n) => 90 + n)), 1, "long ago");
  assert.equal(intervalOf(4, 5, 3, 2, 1, 0), 1, "a clock that was put back");
});

Deno.test("a certificate is renewed by the earlier of its dates and the CA's suggestion, and issued at once if it is not as configured", () => {
  const suggested = (at: number, part = {}) => {
    const window = { start: iso(at), end: iso(at + 1), at: iso(at) };
    return { renewals: record({ "id of new": { window, ...part } }) };
  };
  const hour = present(SITE, { from: -1 / 24, to: 1 / 24 }); // an hour, and begins an hour before it is issued
  const quarters = { runs: runsTo(0, 1 / 96) };
  const table: [what: string, now: number, expected: string, state?: Partial<State>, Entry?, object?][] = [
    ["kept", 59.999, "day 60: life"],
    ["due", 60, "life"],
    ["expired", 90, "expired"],
    ["missing", 1, "missing", {}, entry(SITE, MISSING)],
    ["other names", 1, "other names", {}, entry(SITE, MISSING, FORMER)],
    ["C18: an hour that begins an hour before it is issued", 0.001, "life", quarters, hour],
    ["issued then", 0.001, "day 0.013889: runs", quarters, { ...hour, issuedAt: day(0) }],
    ["suggested after the next run", 48.5, "day 50: ari", suggested(50)],
    ["suggested before the next run", 49.5, "ari", suggested(50)],
    ["suggested in the past", 10, "ari", suggested(-300)],
    ["suggested behind the dates", 10, "day 60: life", suggested(70)],
    ["suggested half a day before", 10, "day 60: life", suggested(5, { suggestedAt: iso(9.5) })],
    ["suggested two days before", 10, "ari", suggested(5, { suggestedAt: iso(8) })],
    ["suggested, with ari: no", 10, "day 60: life", suggested(5), undefined, { ari: false }],
  ];
  for (const [what, now, expected, state = {}, one = present(SITE), config] of table) {
    const { kept, tasks } = plan({ found: [one], state: { runs: runsTo(now), ...state }, now, config });
    const reason = tasks[0]?.due[0]?.reason;
    const cause = reason?.kind === "found" ? reason.finding : reason;
    const why = cause && ("rule" in cause ? cause.rule : cause.kind);
    assert.equal(why ?? `day ${daysOf(kept[0]!.renewAt)}: ${kept[0]!.rule}`, expected, what);
  }
});

Deno.test("certificates of a line are one task, soonest to expire first; failures and rate limits delay tasks", () => {
  const [a, b, c] = ["a", "b", "c"].map((name) => line(`${name}.example`)) as [Line, Line, Line];
  const former = { certificate: certificate(c.names, { to: 80 }), file: "x" };
  const found = [entry(a, MISSING), entry(a, MISSING, { keyType: "ec" }), entry(c, MISSING, { former })];
  found.push(present(b, { to: 70 }), present(b, { from: 65, to: 155 }, "ec"));
  const failed = { failures: record({ "b.example": failure({ retryAt: iso(70) }) }) };
  const limited = { holds: record({ "https://ca": iso(70), "https://another": iso(99) }) };
  const renew = { selection: { ...NOTHING, lines: new Set([b]), renew: new Set([b]) } };
  const all = "b rsa, c rsa, a rsa ec";
  const table: [string, Partial<State>, PlanOptions, tasks: string, waiting: string][] = [
    ["none", {}, {}, all, ""],
    ["back-off", failed, {}, "c rsa, a rsa ec", "b rsa"],
    ["back-off with --renew", failed, renew, "b rsa ec", ""],
    ["rate-limited, with --renew", limited, renew, "", "b rsa ec"],
    ["rate-limited, with --retry", limited, { retry: true }, all, ""],
  ];
  const textOf = ({ line, due }: Task) =>
    `${line.names[0]![0]} ${due.map((one) => one.entry.keyType).join(" ")}`;
  for (const [what, state, options, ...expected] of table) {
    const { tasks, waiting } = plan({ on: [a, b, c], found, state, now: 69, ...options });
    assert.deepEqual([tasks, waiting].map((those) => those.map(textOf).join(", ")), expected, what);
  }
});

Deno.test("C5: back-offs take at most 20 hours, and an eighth of the time that is left", () => {
  for (const retryAt of [renewals.retryLineAt, renewals.retryDeliveryAt]) {
    const found = [undefined, day(90), day(1 / 3), day(-1)].map((end) => retryAt(9, day(0), end));
    assert.deepEqual(found.map((date) => date!.getTime() - START), [20 * HOUR, 20 * HOUR, HOUR, HOUR]);
  }
});

Deno.test("plan() warns of short lifetimes, of keys not as configured or missing, and of what is delivered and not renewed", () => {
  const on = ["short", "small", "keyless"].map((name) => line(`${name}.example`));
  const [short, small, keyless] = on as [Line, Line, Line];
  const smallKey = { ...certificate(small.names), keySpec: { type: "rsa", bits: 2048 } as const };
  const found = [
    present(short, { to: 2 }),
    entry(small, { kind: "present", certificate: smallKey }),
    entry(keyless, { kind: "missing", what: "key" }),
  ];
  const receipt = { digest: "", fingerprint: "", at: iso(0), notAfter: iso(30) };
  const web = record({
    "small.example-cert-combined.old.pem": receipt,
    "small.example-cert-combined.older.pem": { ...receipt, notAfter: iso(1) }, // it has expired
    "gone.example-cert-combined.rsa2048.pem": receipt, // its line was removed, too
  });
  const selection = { ...NOTHING, deliver: new Set(["web"]) };
  const { warnings } = plan({ on, found, state: { receipts: record({ web }) }, now: 1, selection });
  const subject = (one: typeof warnings[number]) =>
    "entry" in one ? one.entry.stem : "file" in one ? one.file : one.what;
  assert.deepEqual(warnings.map((one) => `${one.kind}: ${subject(one)}`), [
    "short life: short.example",
    "other key: small.example",
    "no key: keyless.example",
    "nothing to deliver: web",
    "not renewed: small.example-cert-combined.old.pem",
  ]);
});

// ---- deliveries --------------------------------------------------------------------------------------------------

const NEVER = "[web] first delivery";
const NEW = "[web] new certificate (urgent)";

/** A receipt of a section for the certificate of `SITE`. */
function receipts(part: Partial<Receipt> = {}, of = WEB): Partial<State> {
  const receipt = { digest: listsDigest(of, "prod"), fingerprint: "new", at: iso(1), ...part };
  return { receipts: record({ [of.name]: record({ [FILE]: receipt }) }) };
}

/** What is pending: `[web] new certificate, drift (urgent) until day 3; …` */
function pending(state: Partial<State>, given: Given = {}): string {
  const basis = basisOf({ ...given, state });
  adoptReceipts(basis.config, basis.state);
  return planOn(basis).deliveries.map(({ section, pending, urgent, until }) => {
    const reasons = [...new Set(pending.map(({ reason }) => reason))].join(", ");
    const wait = until === undefined ? "" : ` until day ${daysOf(until)}`;
    return `[${section.name}] ${reasons}${urgent ? " (urgent)" : ""}${wait}`;
  }).join("; ");
}

Deno.test("a delivery that is new or asked for is urgent; one that failed waits until its certificate or section changes", () => {
  const old = { fingerprint: "old", at: iso(0) };
  const former = receipts({}, { ...WEB, name: "former" }).receipts;
  const both = { receipts: { ...receipts(old).receipts, ...former } };
  const { key } = plan({}).deliveries[0]!;
  const failed = { deliveries: record({ web: { ...failure({ retryAt: iso(3) }), key, urgent: true } }) };
  const deliver = { selection: { ...NOTHING, sections: new Set(["web"]), deliver: new Set(["web"]) } };
  const changed = (part: Partial<Section>) => ({ on: [line("www.example.com", [{ ...WEB, ...part }])] });
  const table: [what: string, state: Partial<State>, pending: string, given?: Given][] = [
    ["first delivery: a rollout", {}, NEVER],
    ["renewed", receipts(old), NEW],
    ["commands changed", receipts({ digest: "x" }), "[web] commands changed"],
    ["--deliver, done", receipts(), "", { ...deliver, delivered: new Set([`web/${FILE}`]) }],
    ["R2: renamed, and renamed back after a renewal", both, ""],
    ["failed, and another setting", failed, `${NEVER} (urgent) until day 3`, changed({ alert: [] })],
    ["failed, and another certificate", failed, NEVER, { found: [present(SITE, { is: "newer" })] }],
    ["R20: failed, and other commands", failed, NEVER, changed({ update: ["restart"] })],
    ["failed, and other endpoints", failed, NEVER, changed({ verify: endpoints("www.example.com:444") })],
  ];
  for (const [what, state, expected, given] of table) assert.equal(pending(state, given), expected, what);
});

Deno.test("the digest of a section's lists is the same in every version of lematt", () => {
  const lists = { uploadCerts: ["a"], uploadKeys: ["b"], uploadEach: ["c"], update: ["d", "ü"] };
  const one = section("x", lists);
  assert.equal(listsDigest(one, "prod"), "362b80b2e043edfc");
  assert.equal(listsDigest({ ...one, rehearse: true }, "test"), "362b80b2e043edfc");
  assert.equal(listsDigest(one, "test"), listsDigest({ ...one, uploadEach: [] }, "prod"));
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
const ENDPOINT = "www.example.com:443";
const REHEARSAL: Given = { config: { mode: "test" }, counterpart: () => [present(SITE, { is: "live" })] };

/** What was seen at the endpoint of `SITE` on day 2. */
function seen(sights: Sight[], part: Partial<ProbeRecord> = {}): Partial<State> {
  return { probes: record({ [`${ENDPOINT} rsa`]: { at: iso(2), sights, ...part } }) };
}

Deno.test("endpoints are those configured, with DOMAIN and DOMAINS_ALL replaced by the names of the lines", () => {
  const table: [verify: string, names: string, places: string][] = [
    ["DOMAINS_ALL:443", "*.a.example a.example b.a.example", "a.example:443 b.a.example:443"],
    ["DOMAIN:25/smtp", "a.example b.a.example", "a.example:25/smtp"],
    ["DOMAINS_ALL:443#DOMAINS_ALL", "a.example b.example", "a.example:443#a.example b.example:443#b.example"],
    ["192.0.2.1:443#DOMAINS_ALL", "a.example b.example", "192.0.2.1:443#a.example 192.0.2.1:443#b.example"],
    ["DOMAIN:443", "*.a.example", ""],
    ["w.x.a.example:443", "*.a.example", "w.x.a.example:443#www.a.example"],
    ["192.0.2.1:443 web1.internal:443", "a.example", "192.0.2.1:443#a.example web1.internal:443#a.example"],
    ["192.0.2.7:443", "192.0.2.1", "192.0.2.7:443"],
    ["web1:443#DOMAINS_ALL", "a.example 192.0.2.1", "web1:443#a.example web1:443"],
  ];
  for (const [verify, names, expected] of table) {
    const { endpoints: found } = plan({ on: [line(names, [section("s", { verify: endpoints(verify) })])] });
    const keys = found.map(({ key }) => key.replace(" rsa", ""));
    assert.equal(keys.join(" "), expected, `${verify} for ${names}`);
  }
  const host = section("host", { verify: endpoints("w.example.com:443 192.0.2.1:443") });
  const on = [line("*.example.com", [host]), line("w.example.com")];
  const isDue = (hours: number) => plan({ state: seen([RIGHT]), now: 2 + hours / 24 }).endpoints[0]!.due;
  assert.deepEqual([4.9, 5.1].map(isDue), [false, true], "again after five hours");
  const revoked = entry(SITE, { kind: "revoked", certificate: certificate(SITE.names) });
  assert.deepEqual(plan({ found: [revoked] }).endpoints, [], "a revoked certificate is right nowhere");
  const wanted = plan({ on }).endpoints.map(({ wanted }) => wanted.map(({ stem }) => stem));
  assert.deepEqual(wanted, [["w.example.com", "*.example.com"], ["*.example.com"]], "of whichever line");
});

Deno.test("R9: each endpoint is probed once for each key type, however many sections name it", () => {
  const verify = endpoints("a.example:443");
  const sections = [
    section("one", { verify, keyTypes: ["rsa", "ec"] }),
    section("two", { verify, keyTypes: ["ec"] }),
  ];
  const on = [line("a.example", sections, ["rsa", "ec"])];
  const { endpoints: found } = plan({ on, found: [present(on[0]!), present(on[0]!, {}, "ec")] });
  const texts = found.map(({ key, sections, wanted }) =>
    `${key} in ${sections.map(({ name }) => name)}: ${wanted.map(({ keyType }) => keyType)}`
  );
  assert.deepEqual(texts, ["a.example:443 rsa in one: rsa", "a.example:443 ec in one,two: ec"]);
});

Deno.test("a served certificate is current, certainly wrong, or foreign; under --test wrong only in the place of production's", () => {
  const beside = { counterpart: () => [present(SITE, { is: "staging" })] };
  const another = { counterpart: () => [present(line("b.example"))] };
  const byAddress = { on: [line("192.0.2.1", [WEB])] };
  const table: [what: string, Served, verdict: string, given?: Given][] = [
    ["the newest", { fingerprint: "new" }, "current"],
    ["an older one from the same CA", {}, "older"],
    ["an older one that has expired", { notAfter: iso(1) }, "invalid"],
    ["a self-signed one", { selfSigned: true, issuer: "www.example.com" }, "invalid"],
    ["a self-signed one for another name", { selfSigned: true, names: ["localhost"] }, "mismatched"],
    ["an older one from another CA", { issuer: "another CA" }, "foreign"],
    ["a newer one from the same CA", { notBefore: iso(1), notAfter: iso(91) }, "foreign"],
    ["one of a wildcard from elsewhere", { names: ["*.example.com"], issuer: "CDN" }, "foreign"],
    ["one for other names", { names: ["example.com", "www.example.org"] }, "mismatched"],
    ["one for its address", { names: ["192.0.2.1"] }, "older", byAddress],
    ["one for another address", { names: ["192.0.2.7"] }, "mismatched", byAddress],
    ["that of --test", { fingerprint: "staging" }, "staging", beside],
    ["none of this key type", "refused", "refused"],
    ["--test: production's", { fingerprint: "live" }, "answers", REHEARSAL],
    ["--test: its own for production's", { fingerprint: "new" }, "staging", REHEARSAL],
    ["--test: its own", { fingerprint: "new" }, "current", { ...REHEARSAL, ...another }],
  ];
  for (const [what, part, verdict, given] of table) {
    const seenThere = { at: iso(2), sights: [sight(part)] };
    const probes = { [`${ENDPOINT} rsa`]: seenThere, [`${ENDPOINT}#www.example.com rsa`]: seenThere };
    assert.equal(plan({ state: { probes }, ...given }).endpoints[0]!.sights[0]!.verdict, verdict, what);
  }
});

Deno.test("drift is repaired three times at once, then once in 20 hours, and only if it is certain", () => {
  const drift = "[web] drift (urgent)";
  const twice = { confirmed: true, badSince: iso(2) };
  const old = seen([OLD], twice);
  const thrice = receipts({ repairs: 3, at: iso(1.5) });
  const mail = section("mail", { update: ["reload"] });
  const both = { receipts: { ...receipts().receipts, ...receipts({}, mail).receipts } };
  const two = { on: [line("www.example.com", [WEB, mail])] };
  const { key } = plan({ state: { ...receipts(), ...old } }).deliveries[0]!;
  const failed = { deliveries: record({ web: { ...failure({ retryAt: iso(3) }), key, urgent: true } }) };
  const table: [what: string, Partial<State>, now: number, pending: string, Given?][] = [
    ["an older certificate", { ...receipts(), ...old }, 2.1, drift],
    ["at an endpoint of one section of two", { ...both, ...old }, 2.1, drift, two],
    ["seen in the moment of the delivery", { ...receipts({ at: iso(2) }), ...old }, 2.1, ""],
    ["repaired three times", { ...thrice, ...old }, 2.25, `${drift} until day 2.333333`],
    [
      "repaired three times, and renewed",
      { ...receipts({ repairs: 3, fingerprint: "x" }), ...old },
      2.1,
      NEW,
    ],
    ["the state is lost", old, 2.1, `${NEVER} (urgent)`],
    ["a repair that failed", { ...receipts(), ...old, ...failed }, 2.1, `${drift} until day 3`],
    ["a rehearsal repairs nothing", { ...receipts(), ...seen([RIGHT], twice) }, 2.1, "", REHEARSAL],
  ];
  for (const [what, state, now, expected, given] of table) {
    assert.equal(pending(state, { now, ...given }), expected, what);
  }
  const { config, state } = basisOf({ state: receipts({ repairs: 3 }) });
  writeReceipts(WEB, [present(SITE)], undefined, config, state, day(2));
  assert.equal(state.receipts.web![FILE]!.repairs, undefined, "delivered for another reason");
});

Deno.test("recordOf() records since when an endpoint is wrong, and whether our own delivery broke it", () => {
  const [since, now] = [{ badSince: iso(1) }, { badSince: iso(2) }];
  const broken = { brokenByDelivery: true };
  const before = (sight: Sight, part: object = {}): ProbeRecord => ({ at: iso(1), sights: [sight], ...part });
  const table: [what: string, before: ProbeRecord | undefined, Sight, afterDelivery: boolean, object][] = [
    ["right now", before(OLD, since), RIGHT, false, {}],
    ["wrong now", before(RIGHT), OLD, false, now],
    ["wrong still", before(OLD, since), OLD, false, since],
    ["no TLS after our delivery", before(RIGHT), sight("unfinished"), true, { ...now, ...broken }],
    ["silent without a delivery", before(RIGHT), SILENT, false, now],
    ["silent before it, too", before(OLD, since), SILENT, true, since],
    ["never probed before it", undefined, SILENT, true, now],
    ["still broken by it", before(SILENT, { ...since, ...broken }), SILENT, false, { ...since, ...broken }],
  ];
  for (const [what, before, sight, afterDelivery, expected] of table) {
    const basis = basisOf({ state: before && { probes: { [`${ENDPOINT} rsa`]: before } } });
    const found = recordOf(planOn(basis).endpoints[0]!, [sight], basis, { confirmed: false, afterDelivery });
    assert.deepEqual(found, { at: iso(2), sights: [sight], ...expected }, what);
  }
});

// ---- problems ----------------------------------------------------------------------------------------------------

Deno.test("plan() finds each problem, and whether it causes an alert", () => {
  const { key } = plan({}).deliveries[0]!;
  const failing = (part: Partial<Failure>) => ({ failures: record({ "www.example.com": failure(part) }) });
  const stuck = { deliveries: record({ web: { ...failure(), key, urgent: true } }) };
  const wrong = (part: Served, since: number) => (
    { ...receipts(), ...seen([sight(part)], { badSince: iso(since) }) }
  );
  const pair = [line("www.example.com", [{ ...WEB, keyTypes: ["rsa", "ec"] }], ["rsa", "ec"])];
  const both: Given = { on: pair, found: [present(pair[0]!), present(pair[0]!, {}, "ec")] };
  const since = (days: number, part: Served) => ({ at: iso(2), badSince: iso(days), sights: [sight(part)] });
  const ofBoth = (rsa: Served, ec: Served) => (
    { probes: { [`${ENDPOINT} rsa`]: since(2, rsa), [`${ENDPOINT} ec`]: since(1, ec) } }
  );
  const runs = (last: number, nights = 1) => ({ runs: runsTo(last, nights) });
  const window = { start: iso(-300), end: iso(3), at: iso(-200) };
  const revoked = entry(SITE, { kind: "revoked", certificate: certificate(SITE.names) });
  const [failed, overdue] = ["failing www.example.com", `overdue ${FILE}!`];
  const oneDay = { found: [present(SITE, { to: 1 })] };
  const [unreachable, endpoint] = [ENDPOINT, `${ENDPOINT} rsa`].map((what) => `endpoint ${what} 192.0.2.1`);
  // an exclamation mark means an alert
  const table: [what: string, state: Partial<State>, now: number, problems: string, given?: Given][] = [
    ["a line failed three times", failing({ count: 3 }), 61, `${failed}!`],
    ["a line failed, and is overdue", failing({}), 63, `${failed}!`],
    ["a failure of a line that is no longer due", failing({ count: 9 }), 2, ""],
    ["the CA accepts no orders", { holds: { "https://ca": iso(62) } }, 61, "rate-limited"],
    ["due for more than two weekly runs", runs(70, 7), 75, overdue],
    ["due for a day, and run each hour", runs(61, 1 / 24), 61, ""],
    ["of one day, due for seven hours, and run each hour", runs(0.8, 1 / 24), 0.8, overdue, oneDay],
    ["revoked, and not replaced", {}, 2, overdue, { found: [revoked] }],
    ["R16: expired, with other names", {}, 91, overdue, { found: [entry(SITE, MISSING, FORMER)] }],
    ["never issued", {}, 91, "", { found: [entry(SITE, MISSING)] }],
    ["due by a window that began long ago", { renewals: { "id of new": { window } } }, 2, ""],
    ["a failure of a delivery that is no longer pending", { ...stuck, ...receipts() }, 2, ""],
    ["renewed since an endpoint was right", { ...receipts(), ...seen([OLD]) }, 2.1, ""],
    ["an endpoint is wrong for 20 hours", wrong({}, 1), 2.1, `${endpoint}!`],
    ["an expired certificate is served", wrong({ notAfter: iso(1) }, 2), 2.1, `${endpoint}!`],
    ["unreachable for both key types", ofBoth("unreachable", "unreachable"), 2, `${unreachable}!`, both],
    ["unreachable for one of them", ofBoth("unreachable", "passed over"), 2, unreachable!, both],
    ["not run for less than two days", runs(10), 12, ""],
    ["not run for three nights", runs(10), 13.1, "not run!"],
    ["run every 8 hours, and not for two days", runs(10, 1 / 3), 12.1, "not run!"],
    ["run every 8 hours, and not since yesterday", runs(10, 1 / 3), 11.9, ""],
    ["a certificate that begins within the hour", {}, -1 / 25, ""],
    ["a run recorded for tomorrow", runs(3), 2, "clock!"],
    ["a clock 54 minutes ahead of the CA's", {}, 2, "", { aheadMs: () => 0.9 * HOUR }],
    ["a clock more than an hour behind the CA's", {}, 2, "clock!", { aheadMs: () => -1.1 * HOUR }],
  ];
  for (const [what, state, now, expected, given] of table) {
    const { problems } = plan({ state, now, ...given });
    assert.equal(problems.map(({ key, alert }) => `${key}${alert ? "!" : ""}`).join(), expected, what);
  }
});

// ---- the state ---------------------------------------------------------------------------------------------------

Deno.test("forgetUnknown() keeps what is still used, and drops what no longer exists", () => {
  const { key } = plan({ now: 61 }).deliveries[0]!;
  const both = <T>(known: string, value: T) => ({ [known]: value, unknown: value });
  const kept = {
    renewals: both("id of new", {}),
    failures: both("www.example.com", failure()),
    orders: both(FILE, { url: "https://ca/1", account: "a", since: iso(1) }),
    deliveries: both("web", { key, ...failure(), urgent: true }),
    probes: both(`${ENDPOINT} rsa`, { at: iso(1), sights: [] }),
    receipts: record({ web: both(FILE, {} as Receipt), unknown: { unknown: {} as Receipt } }),
  };
  const basis = basisOf({ state: kept, now: 61 }); // it is due, and its delivery is pending
  forgetUnknown(basis, () => new Set());
  for (const [what, found] of Object.entries(kept)) assert.equal(Object.keys(found).length, 1, what);
  Object.assign(basis.state, receipts());
  forgetUnknown({ ...basis, now: day(2) }, () => new Set());
  assert.deepEqual([basis.state.failures, basis.state.deliveries], [{}, {}], "neither due nor pending");
});
