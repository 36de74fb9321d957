/**
 * `state.json`: what one run tells the next. Work is remembered as done, never as to do, so that a lost state is harmless:
 * everything is delivered once more.
 *
 * Knows the shape, reads and checks it; writing is store.ts's. Dates are ISO 8601. All records have no prototype, since
 * their keys are names from outside (`[constructor]` is a section like another).
 */

/** What is remembered of one mode. */
export interface State {
  version: 2;
  /** "<directory URL> <thumbprint of the account key>" -> the account there */
  accounts: Record<string, Account>;
  /** identifier of a certificate (RFC 9773 §4.1) -> what is known of its renewal */
  renewals: Record<string, Renewal>;
  /** base name of a certificate file -> its order that the CA has not finished */
  orders: Record<string, UnfinishedOrder>;
  /** stem of a line -> its last failure, until it succeeds */
  failures: Record<string, Failure>;
  /** directory URL -> until when the CA accepts no new order from this account */
  holds: Record<string, string>;
  /** directory URL -> when it was last seen to offer no renewal information */
  withoutRenewalInfo: Record<string, string>;
  /** name of a section -> base name of a certificate file -> what has been delivered */
  receipts: Record<string, Record<string, Receipt>>;
  /** name of a section -> its last failure, until it succeeds */
  deliveries: Record<string, DeliveryFailure>;
  /** `host:port/starttls#name keyType` -> what was served there when it was last probed */
  probes: Record<string, ProbeRecord>;
  /** name of a section -> key of a problem -> the last alert for it */
  alerts: Record<string, Record<string, SentAlert>>;
  /** key of a problem -> when `--cron` last printed it */
  reported: Record<string, string>;
  /** Challenges that are published and to be removed: files by their token, TXT values by the name that they prove. */
  published: ({ token: string } | { name: string; value: string })[];
  /** The last full runs, at most six. */
  runs: RunRecord[];
  /** Of version 1, until taken over: section -> base name of a certificate file -> fingerprint not delivered yet. */
  undelivered?: Record<string, Record<string, string>>;
  /** Of version 1, until taken over: fingerprints of revoked certificates, to be replaced under new keys. */
  revoked?: string[];
}

/** A full run that came to its end. */
export interface RunRecord {
  /** When it began. */
  at: string;
  /** How long it took. */
  seconds?: number;
  /** How many certificates it issued. */
  issued?: number;
  /** How many sections it delivered. */
  delivered?: number;
  /** How many problems there were at its end. */
  problems?: number;
}

/** An account at a CA. */
export interface Account {
  url: string;
  /** mailto: URLs, as the CA knows them */
  contact: string[];
  /** names by which CAA records and dns-persist-01 refer to the CA */
  issuers: string[];
}

/** What is known of the renewal of one certificate. */
export interface Renewal {
  /** the account that ordered it, named as in `accounts`; absent where another program did */
  account?: string;
  /** the CA's window (RFC 9773), and the moment drawn in it */
  window?: { start: string; end: string; at: string; explanationUrl?: string };
  /** not to ask the CA again before */
  askAt?: string;
  /** when the CA's suggestion led to this certificate; it heeds no other for a day */
  suggestedAt?: string;
}

/** An order that was finalized and that the CA had not finished when the run ended. Its key is beside the live one. */
export interface UnfinishedOrder {
  url: string;
  /** named as in `accounts` */
  account: string;
  since: string;
}

/** Why a line could not be issued, the last time. */
export interface Failure {
  /** How often in a row. */
  count: number;
  since: string;
  at: string;
  error: string;
  /** Not to be tried before; absent where the next run may. */
  retryAt?: string;
  /** The CA could not be spoken to: one cause for all lines. */
  shared?: boolean;
}

/** These commands of a section have run for this certificate. */
export interface Receipt {
  /** of the lists, see `listsDigest` in plan.ts */
  digest: string;
  /** of the certificate */
  fingerprint: string;
  /** of the certificate */
  notAfter?: string;
  at: string;
  /** How often in a row the commands were repeated for this certificate, since an endpoint served another. */
  repairs?: number;
}

/** Why a section could not be delivered, the last time. */
export interface DeliveryFailure {
  /** Identifies the delivery: see `Delivery` in plan.ts. */
  key: string;
  count: number;
  since: string;
  at: string;
  error: string;
  /** The end of what the command printed. */
  output?: string;
  retryAt?: string;
  urgent: boolean;
}

/** What one probe of an endpoint found. */
export interface ProbeRecord {
  at: string;
  /** What was not right was seen again. */
  confirmed?: boolean;
  /** Since when it is not right. */
  badSince?: string;
  /** It was right before a delivery, and stopped answering after it. */
  brokenByDelivery?: boolean;
  sights: Sight[];
}

/** What one address served for one type of key. */
export interface Sight {
  /** IP address without brackets; empty where the name has none. */
  address: string;
  /** `served`: in a finished handshake. */
  kind: "served" | "unfinished" | "refused" | "unreachable" | "passed over";
  certificate?: ServedCertificate;
  detail?: string;
}

/** What is kept of a certificate that was served. */
export interface ServedCertificate {
  fingerprint: string;
  names: string[];
  notBefore: string;
  notAfter: string;
  selfSigned: boolean;
  issuer: string;
}

export interface SentAlert {
  at: string;
  /** What is said when it is well again. */
  what: string;
}

/** A state that may not be begun anew: it cannot be read, or a newer lematt wrote it. */
export class StateError extends Error {
  override readonly name = "StateError";
}

/** No CA keeps an order for longer than some weeks. */
const ORDER_LIFE_MS = 30 * 86_400_000;

const NEVER = "1970-01-01T00:00:00.000Z";

const RECORDS = [
  "accounts",
  "renewals",
  "orders",
  "failures",
  "holds",
  "withoutRenewalInfo",
  "receipts",
  "deliveries",
  "probes",
  "alerts",
  "reported",
] as const;

/** The state of a mode that never ran. */
export function emptyState(): State {
  const records = Object.fromEntries(RECORDS.map((key) => [key, record({})]));
  return { version: 2, published: [], runs: [], ...records } as unknown as State;
}

/**
 * Reads the text of a state file. What comes from the future (a clock was wrong) counts as absent.
 *
 * @returns the state, or why it has to be begun anew
 * @throws StateError where a newer lematt wrote it
 */
export function parseState(text: string, now: Date): State | { readonly unusable: string } {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return { unusable: "not JSON" };
  }
  const version = isRecord(value) ? value.version : undefined;
  if (Number.isInteger(version) && (version as number) > 2) {
    throw new StateError(`version ${version} was written by a newer lematt`);
  }
  const current = version === 1 ? fromVersion1(value as Record<string, unknown>) : value;
  if (!STATE(current)) {
    return { unusable: version === undefined ? "it has no version" : "not as lematt writes it" };
  }
  const state = { ...emptyState(), ...current as State };
  for (const key of RECORDS) Object.assign(state, { [key]: record<unknown>(state[key]) });
  for (const key of ["receipts", "alerts"] as const) {
    for (const [name, entries] of Object.entries(state[key])) state[key][name] = record(entries) as never;
  }
  dropFuture(state, now);
  return state;
}

/** A record without a prototype. */
export function record<T>(entries: Record<string, T>): Record<string, T> {
  return Object.assign(Object.create(null), entries);
}

/** Version 1 remembered what was not delivered yet; `takeOver` in plan.ts makes receipts of the rest. */
function fromVersion1(old: Record<string, unknown>): unknown {
  const { accounts, renewals, holds } = old;
  const failures = isRecord(old.failures)
    ? Object.fromEntries(
      Object.entries(old.failures).map(([stem, failure]) => [
        stem,
        isRecord(failure) ? { ...failure, since: failure.at } : failure,
      ]),
    )
    : undefined;
  const sections = Object.entries(isRecord(old.owed) ? old.owed : {});
  const undelivered = sections.map(([name, part]) => [name, isRecord(part) ? part.certificates : undefined]);
  return {
    ...emptyState(),
    ...defined({ accounts, renewals, holds, failures }),
    undelivered: Object.fromEntries(undelivered),
    ...(isRecord(old.revoked) && { revoked: Object.keys(old.revoked) }),
  };
}

function defined(values: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));
}

/** Nothing that is remembered, but runs, lies in the future, or waits for longer than a day: the CA's Retry-After is cut to that. */
function dropFuture(state: State, now: Date): void {
  const present = now.getTime();
  const isAfter = (text: string | undefined, limit: number) => text !== undefined && Date.parse(text) > limit;
  const isFuture = (text: string | undefined) => isAfter(text, present);
  const waits = (text: string | undefined) => isAfter(text, present + 86_400_000);
  const drop = <T>(entries: Record<string, T>, isUnusable: (entry: T) => boolean) => {
    for (const [key, entry] of Object.entries(entries)) if (isUnusable(entry)) delete entries[key];
  };
  for (const failure of [...Object.values(state.failures), ...Object.values(state.deliveries)]) {
    if (waits(failure.retryAt)) delete failure.retryAt;
    for (const key of ["since", "at"] as const) if (isFuture(failure[key])) failure[key] = now.toISOString();
  }
  for (const renewal of Object.values(state.renewals)) {
    if (waits(renewal.askAt)) delete renewal.askAt;
    if (isFuture(renewal.suggestedAt)) delete renewal.suggestedAt;
  }
  for (const order of Object.values(state.orders)) {
    if (isFuture(order.since)) order.since = now.toISOString();
  }
  drop(state.orders, ({ since }) => Date.parse(since) < present - ORDER_LIFE_MS);
  drop(state.holds, waits);
  drop(state.withoutRenewalInfo, isFuture);
  drop(state.probes, ({ at, badSince }) => isFuture(at) || isFuture(badSince));
  drop(state.reported, isFuture);
  // what was delivered or sent stays so; only when is not known
  for (const records of [...Object.values(state.receipts), ...Object.values(state.alerts)]) {
    for (const one of Object.values(records)) if (isFuture(one.at)) one.at = NEVER;
  }
}

// ---- the shape ----------------------------------------------------------------------------------------

type Check = (value: unknown) => boolean;

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

const isText: Check = (value) => typeof value === "string";
const isFlag: Check = (value) => typeof value === "boolean";
const isCount: Check = (value) => Number.isInteger(value) && (value as number) >= 0;
/** As toISOString() writes it, be it of a year that only a certificate or a CA with a broken clock has. */
const isDate: Check = (value) =>
  typeof value === "string" && /^(\d{4}|[+-]\d{6})-\d\d-\d\dT/.test(value) &&
  !Number.isNaN(Date.parse(value));
const listOf = (check: Check): Check => (value) => Array.isArray(value) && value.every(check);
const recordOf = (check: Check): Check => (value) => isRecord(value) && Object.values(value).every(check);
const optional = (check: Check): Check => (value) => value === undefined || check(value);
const shape = (checks: Record<string, Check>): Check => (value) =>
  isRecord(value) && Object.entries(checks).every(([key, check]) => check(value[key]));

const WAIT = { count: isCount, since: isDate, at: isDate, error: isText, retryAt: optional(isDate) };
const CERTIFICATE = shape({
  fingerprint: isText,
  names: listOf(isText),
  notBefore: isDate,
  notAfter: isDate,
  selfSigned: isFlag,
  issuer: isText,
});
const isServed = shape({
  address: isText,
  kind: (kind) => kind === "served",
  certificate: CERTIFICATE,
  detail: optional(isText),
});
const isUnserved = shape({
  address: isText,
  kind: (kind) => ["unfinished", "refused", "unreachable", "passed over"].includes(kind as string),
  certificate: optional(CERTIFICATE),
  detail: optional(isText),
});
const isFile = shape({ token: isText });
const isRecordValue = shape({ name: isText, value: isText });
const STATE = shape({
  version: (version) => version === 2,
  accounts: optional(recordOf(shape({ url: isText, contact: listOf(isText), issuers: listOf(isText) }))),
  renewals: optional(recordOf(shape({
    account: optional(isText),
    window: optional(shape({ start: isDate, end: isDate, at: isDate, explanationUrl: optional(isText) })),
    askAt: optional(isDate),
    suggestedAt: optional(isDate),
  }))),
  orders: optional(recordOf(shape({ url: isText, account: isText, since: isDate }))),
  failures: optional(recordOf(shape({ ...WAIT, shared: optional(isFlag) }))),
  holds: optional(recordOf(isDate)),
  withoutRenewalInfo: optional(recordOf(isDate)),
  receipts: optional(recordOf(recordOf(shape({
    digest: isText,
    fingerprint: isText,
    notAfter: optional(isDate),
    at: isDate,
    repairs: optional(isCount),
  })))),
  deliveries: optional(recordOf(shape({ ...WAIT, key: isText, urgent: isFlag, output: optional(isText) }))),
  probes: optional(recordOf(shape({
    at: isDate,
    confirmed: optional(isFlag),
    badSince: optional(isDate),
    brokenByDelivery: optional(isFlag),
    sights: listOf((sight) => isServed(sight) || isUnserved(sight)),
  }))),
  alerts: optional(recordOf(recordOf(shape({ at: isDate, what: isText })))),
  reported: optional(recordOf(isDate)),
  published: optional(listOf((entry) => isFile(entry) || isRecordValue(entry))),
  runs: optional(listOf(shape({
    at: isDate,
    seconds: optional(isCount),
    issued: optional(isCount),
    delivered: optional(isCount),
    problems: optional(isCount),
  }))),
  undelivered: optional(recordOf(recordOf(isText))),
  revoked: optional(listOf(isText)),
});
