/**
 * `state.json`: what one run remembers for the next. Work is remembered as done, never as to do, so that a lost
 * state is harmless: everything is delivered once more.
 *
 * Knows the shape, reads and checks it; store.ts writes it. Dates are ISO 8601. Records have no prototype, since
 * their keys are names from outside (`[constructor]` is a section like another).
 */

// ---- checks ---------------------------------------------------------------------------------------------

type Check<T> = (value: unknown) => value is T;
type Checked<C> = C extends Check<infer T> ? T : never;
/** The object whose values pass these checks; a key whose value may be undefined may be absent. */
type Shape<C> =
  & { [K in keyof C as undefined extends Checked<C[K]> ? never : K]: Checked<C[K]> }
  & { [K in keyof C as undefined extends Checked<C[K]> ? K : never]?: Checked<C[K]> };

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isText(value: unknown): value is string {
  return typeof value === "string";
}

function isFlag(value: unknown): value is boolean {
  return typeof value === "boolean";
}

function isCount(value: unknown): value is number {
  return Number.isInteger(value) && (value as number) >= 0;
}

/** As toISOString() writes it, even for years that only a broken certificate or clock has. */
function isDate(value: unknown): value is string {
  return isText(value) && /^(\d{4}|[+-]\d{6})-\d\d-\d\dT/.test(value) && !Number.isNaN(Date.parse(value));
}

function oneOf<const T>(...values: readonly T[]): Check<T> {
  return (value): value is T => values.includes(value as T);
}

function optional<T>(check: Check<T>): Check<T | undefined> {
  return (value): value is T | undefined => value === undefined || check(value);
}

function listOf<T>(check: Check<T>): Check<T[]> {
  return (value): value is T[] => Array.isArray(value) && value.every(check);
}

function recordOf<T>(check: Check<T>): Check<Record<string, T>> {
  return (value): value is Record<string, T> => isRecord(value) && Object.values(value).every(check);
}

function shape<C extends Record<string, Check<unknown>>>(checks: C): Check<Shape<C>> {
  return (value): value is Shape<C> =>
    isRecord(value) && Object.entries(checks).every(([key, check]) => check(value[key]));
}

// ---- the shape ------------------------------------------------------------------------------------------

/** An account at a CA. */
export type Account = Checked<typeof isAccount>;
const isAccount = shape({
  url: isText,
  /** mailto: URLs, as the CA knows them */
  contact: listOf(isText),
  /** names by which CAA records and dns-persist-01 refer to the CA */
  issuers: listOf(isText),
});

/** What is known of the renewal of one certificate. */
export type Renewal = Checked<typeof isRenewal>;
const isRenewal = shape({
  /** the account that ordered it, named as in `accounts`; absent if another program did */
  account: optional(isText),
  /** the CA's window (RFC 9773), and the moment drawn in it */
  window: optional(shape({ start: isDate, end: isDate, at: isDate, explanationUrl: optional(isText) })),
  /** the CA is not asked again before this */
  askAt: optional(isDate),
  /** when the CA's suggestion led to this certificate; suggestions for it are ignored for a day */
  suggestedAt: optional(isDate),
});

/** A finalized order that the CA had not finished when the run ended. Its key is beside the live one. */
const isUnfinishedOrder = shape({
  url: isText,
  /** named as in `accounts` */
  account: isText,
  since: isDate,
});

const FAILURE = {
  /** how often in a row */
  count: isCount,
  since: isDate,
  at: isDate,
  error: isText,
  /** not to be tried before; absent if the next run may */
  retryAt: optional(isDate),
};

/** Why a line could not be issued, the last time. */
export type Failure = Checked<typeof isFailure>;
const isFailure = shape({
  ...FAILURE,
  /** the CA could not be reached: one cause for all lines */
  shared: optional(isFlag),
});

/** Why a section could not be delivered, the last time. */
export type DeliveryFailure = Checked<typeof isDeliveryFailure>;
const isDeliveryFailure = shape({
  ...FAILURE,
  /** identifies the delivery: see `Delivery` in plan.ts */
  key: isText,
  /** the end of what the command printed */
  output: optional(isText),
  urgent: isFlag,
});

/** These commands of a section have run for this certificate. */
export type Receipt = Checked<typeof isReceipt>;
const isReceipt = shape({
  /** of the lists, see `listsDigest` in plan.ts */
  digest: isText,
  /** of the certificate */
  fingerprint: isText,
  /** of the certificate */
  notAfter: optional(isDate),
  at: isDate,
  /** how often in a row the commands were repeated for this certificate, since an endpoint served another */
  repairs: optional(isCount),
});

/** What is remembered of a certificate that was served. */
export type ServedCertificate = Checked<typeof isServedCertificate>;
const isServedCertificate = shape({
  fingerprint: isText,
  names: listOf(isText),
  notBefore: isDate,
  notAfter: isDate,
  selfSigned: isFlag,
  issuer: isText,
});

/** What one address served for one type of key. */
export type Sight = Checked<typeof hasSightShape>;
const hasSightShape = shape({
  /** IP address without brackets; empty if the name has none */
  address: isText,
  /** `served`: in a finished handshake */
  kind: oneOf("served", "unfinished", "refused", "unreachable", "passed over"),
  certificate: optional(isServedCertificate),
  detail: optional(isText),
});
function isSight(value: unknown): value is Sight {
  return hasSightShape(value) && (value.kind !== "served" || value.certificate !== undefined);
}

/** What one probe of an endpoint found. */
export type ProbeRecord = Checked<typeof isProbeRecord>;
const isProbeRecord = shape({
  at: isDate,
  /** what is wrong was seen twice */
  confirmed: optional(isFlag),
  /** since when it is wrong */
  badSince: optional(isDate),
  /** it was right before a delivery, and stopped answering after it */
  brokenByDelivery: optional(isFlag),
  sights: listOf(isSight),
});

/** A full run that was not interrupted. */
export type RunRecord = Checked<typeof isRunRecord>;
const isRunRecord = shape({
  /** when it began */
  at: isDate,
  seconds: optional(isCount),
  /** certificates */
  issued: optional(isCount),
  /** sections */
  delivered: optional(isCount),
  /** at its end */
  problems: optional(isCount),
});

const isToken = shape({ token: isText });
const isTxt = shape({ name: isText, value: isText });
function isPublished(value: unknown): value is Checked<typeof isToken> | Checked<typeof isTxt> {
  return isToken(value) || isTxt(value);
}

const RECORDS = {
  /** "<directory URL> <thumbprint of the account key>" -> the account there */
  accounts: recordOf(isAccount),
  /** identifier of a certificate (RFC 9773 §4.1) -> what is known of its renewal */
  renewals: recordOf(isRenewal),
  /** base name of a certificate file -> its unfinished order */
  orders: recordOf(isUnfinishedOrder),
  /** stem of a line -> its last failure, until it succeeds */
  failures: recordOf(isFailure),
  /** directory URL -> until when the CA accepts no new order from this account */
  holds: recordOf(isDate),
  /** directory URL -> when it was last seen to offer no renewal information */
  withoutRenewalInfo: recordOf(isDate),
  /** name of a section -> base name of a certificate file -> what has been delivered */
  receipts: recordOf(recordOf(isReceipt)),
  /** name of a section -> its last failure, until it succeeds */
  deliveries: recordOf(isDeliveryFailure),
  /** `host:port/starttls#name keyType` -> what was served there when it was last probed */
  probes: recordOf(isProbeRecord),
  /** name of a section -> key of a problem -> the last alert for it, and what is printed when it is resolved */
  alerts: recordOf(recordOf(shape({ at: isDate, what: isText }))),
  /** key of a problem -> when a run printed it; with `--cron`, none prints it again for 20 hours */
  reported: recordOf(isDate),
};
const LISTS = {
  /** challenges to be removed: files by their token, TXT values by the name that they validate */
  published: listOf(isPublished),
  /** the last full runs */
  runs: listOf(isRunRecord),
};
const VERSION_1 = {
  /** of version 1, until taken over: section -> base name of a certificate file -> fingerprint not delivered yet */
  undelivered: optional(recordOf(recordOf(isText))),
  /** of version 1, until taken over: fingerprints of revoked certificates, to be replaced under new keys */
  revoked: optional(listOf(isText)),
};

/** What is remembered of one mode. */
export type State = { version: 2 } & Shape<typeof RECORDS> & Shape<typeof LISTS> & Shape<typeof VERSION_1>;

/** Records and lists that are absent are empty. */
const isState = shape({
  version: oneOf(2),
  ...Object.fromEntries(
    Object.entries({ ...RECORDS, ...LISTS, ...VERSION_1 }).map(([key, check]) =>
      [key, optional(check as Check<unknown>)] as const
    ),
  ),
});

// ---- reading --------------------------------------------------------------------------------------------

/** A state file that must not be replaced: it cannot be read, or a newer lematt wrote it. */
export class StateError extends Error {
  override readonly name = "StateError";
}

/** No CA keeps an order for longer than some weeks. */
const ORDER_FORGOTTEN_MS = 30 * 86_400_000;
const NEVER = "1970-01-01T00:00:00.000Z";

/** The state of a mode that never ran. */
export function emptyState(): State {
  const records = Object.fromEntries(Object.keys(RECORDS).map((key) => [key, record({})]));
  return { version: 2, published: [], runs: [], ...records } as unknown as State;
}

/**
 * Reads the text of a state file. What comes from the future (a clock was wrong) counts as absent.
 *
 * @returns the state, or why it cannot be used
 * @throws StateError if a newer lematt wrote it
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
  if (!isState(current)) {
    return { unusable: version === undefined ? "it has no version" : "not as lematt writes it" };
  }
  const state: State = { ...emptyState(), ...current };
  for (const key of Object.keys(RECORDS) as (keyof typeof RECORDS)[]) {
    Object.assign(state, { [key]: record<unknown>(state[key]) });
  }
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

/** Version 1 remembered what was not delivered yet; `receiptsFromVersion1` makes receipts of the rest. */
function fromVersion1(old: Record<string, unknown>): unknown {
  const state: Record<string, unknown> = { ...emptyState() };
  for (const key of ["accounts", "renewals", "holds"]) if (old[key] !== undefined) state[key] = old[key];
  if (isRecord(old.failures)) {
    state.failures = mapValues(old.failures, (one) => isRecord(one) ? { ...one, since: one.at } : one);
  }
  const sections = isRecord(old.owed) ? old.owed : {};
  state.undelivered = mapValues(sections, (one) => isRecord(one) ? one.certificates : undefined);
  if (isRecord(old.revoked)) state.revoked = Object.keys(old.revoked);
  return state;
}

function mapValues(entries: Record<string, unknown>, map: (value: unknown) => unknown) {
  return Object.fromEntries(Object.entries(entries).map(([key, value]) => [key, map(value)]));
}

/** Drops dates in the future (except of runs), and waits of more than a day, the longest that is set. */
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
  drop(state.orders, ({ since }) => Date.parse(since) < present - ORDER_FORGOTTEN_MS);
  drop(state.holds, waits);
  drop(state.withoutRenewalInfo, isFuture);
  drop(state.probes, ({ at, badSince }) => isFuture(at) || isFuture(badSince));
  drop(state.reported, isFuture);
  // what was delivered or sent stays so; only the time is unknown
  for (const records of [...Object.values(state.receipts), ...Object.values(state.alerts)]) {
    for (const one of Object.values(records)) if (isFuture(one.at)) one.at = NEVER;
  }
}
