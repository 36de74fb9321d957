/**
 * The commands: run, plan, status, accept, prune, revoke, rollover. Each is a short script that reads top to
 * bottom.
 *
 * Everything that happens is an event; report.ts and status.ts make the sentences. A line or section that fails
 * does not stop the others.
 */

import { CaAccount, rememberedAccount } from "./account.ts";
import { type ChallengeFinding, checkChallenges, persistentRecord, removeLeftovers } from "./challenge.ts";
import { challengeOf, type Config, type Line, loadConfig } from "./config.ts";
import { type Context, settled } from "./context.ts";
import { probeAll, Sections, sendAlerts } from "./deliver.ts";
import { inScope } from "./endpoints.ts";
import { checkPackages } from "./http.ts";
import { askRenewalWindows, Issuer } from "./issue.ts";
import { quote, toIdentifier } from "./names.ts";
import { delivers, entriesOf, type Plan, plan, type Problem } from "./plan.ts";
import { forgetUnknown, takeOverReceipts, writeReceipts } from "./receipts.ts";
import {
  type Basis,
  byLine,
  inventoryOf,
  LONGEST_PAUSE_MS,
  type PlanOptions,
  RUNS,
  type Selection,
} from "./renewal.ts";
import type { Ended, Event } from "./report.ts";
import { emptyState, type RunRecord, type State } from "./state.ts";
import type { Status } from "./status.ts";
import { changingLinks, type Entry, LockedError, orphans, readInventory, readState, Store } from "./store.ts";
import { problemText, warningText } from "./text.ts";
import { type Certificate, isKeyOf, publicKeyHash, readCertificate } from "./x509.ts";
import { basename } from "node:path";

export type Emit = (event: Event) => void;

export interface RunOptions {
  /** Lines at a time. */
  readonly parallel: number;
  /** Ignores back-offs. */
  readonly retry: boolean;
  readonly selection?: Selection;
}

// ---- run ------------------------------------------------------------------------------------------------

/**
 * A whole run, or the part that `selection` names. Throws LockedError, StateError, and the signal's reason. Alerts
 * are sent even if it cannot begin or is cut off by an error.
 */
export async function run(
  config: Config,
  options: RunOptions,
  context: Context,
  emit: Emit,
): Promise<Ended> {
  using store = await openStore(config, context, emit).catch(async (error) => {
    if (!(error instanceof LockedError)) await alertEnd(error, undefined, config, context, emit);
    throw error;
  });
  try {
    return await runWith(store, config, options, context, emit);
  } catch (error) {
    if (!context.signal.aborted) await alertEnd(error as Error, store.state, config, context, emit);
    await store.saveState();
    throw error;
  }
}

async function runWith(
  store: Store,
  config: Config,
  { parallel, retry, selection }: RunOptions,
  context: Context,
  emit: Emit,
): Promise<Ended> {
  const { state } = store;
  const begun = context.now();
  const issued = new Set<string>();
  const ca = { config, store, context, parallel, emit };
  const account = new CaAccount(ca);
  const options: PlanOptions = {
    retry,
    selection,
    issued,
    delivered: new Set(),
    ...otherModeOf(config, begun),
    writeError: () => store.writeError,
    aheadMs: () => account.aheadMs,
  };
  const inventory = readInventory(config);
  const certificates = byLine(inventory);
  const basis = () => ({ config, certificates, state, now: context.now(), options });

  prepareState(basis(), inventory);
  for (const entry of inventory) linkTo(entry, store, emit);
  const selected = inventory.filter(({ line }) => selection?.lines.has(line) ?? true);
  await askRenewalWindows(selected, account, ca);
  context.signal.throwIfAborted();

  const decided = plan(basis());
  for (const warning of decided.warnings) emit({ kind: "notice", text: warningText(warning) });
  for (const problem of decided.problems.filter(endsWithThisRun)) {
    emit({ kind: "notice", text: problemText(problem), changed: true });
  }
  // before the first order or command; not in a run with nothing to do, for it takes time
  if (decided.tasks.length + decided.deliveries.length > 0) await checkPackages();
  if (decided.tasks.length > 0) emit({ kind: "begin", tasks: decided.tasks });

  const sections = new Sections({ store, context, basis }, emit);
  const issuer = new Issuer(account, { ...ca, newKey: selection?.newKey ?? false });
  const issuing = issuer.issueAll(decided.tasks, async (due, certificate, seconds) => {
    const entry = await store.commit(
      due.entry,
      certificate,
      (text) => emit({ kind: "notice", text, changed: true }),
    );
    const { line } = entry;
    certificates.set(line, certificates.get(line)!.map((one) => one.keyType === entry.keyType ? entry : one));
    issued.add(entry.file);
    emit({ kind: "issued", due, certificate: entry, seconds });
  }, (task) => sections.lineDone(task.line));
  await settled([issuing.finally(() => sections.allDone()), sections.run(decided)]);

  const ended = context.now();
  const counts = { issued: issued.size, delivered: sections.delivered };
  const record: RunRecord = {
    at: begun.toISOString(),
    seconds: Math.max(0, Math.round((ended.getTime() - begun.getTime()) / 1000)), // clocks are set back
    ...counts,
    problems: decided.problems.length, // mostly as after the last plan: then the state is written once
  };
  if (selection === undefined) state.runs = [...decided.runs, record].slice(-RUNS);
  await store.saveState(); // if this fails, the last plan reports it
  const final = plan(basis());
  record.problems = final.problems.length;
  // problems outside the selection are not resolved
  const whole = selection === undefined
    ? final
    : plan({ ...basis(), options: { ...options, selection: undefined } });
  await sendAlerts(whole, config, state, context, emit);
  const known = markPrinted(final.problems, whole.problems, state, context.now());
  await store.saveState();
  return { plan: final, ...counts, known };
}

/** Brings what is remembered in line with configuration and files. */
function prepareState(basis: Basis, inventory: readonly Entry[]): void {
  const { config, state, now, options } = basis;
  takeOverReceipts(config, inventory, state, now);
  if (options.selection !== undefined) return;
  let names: ReadonlySet<string> | undefined;
  forgetUnknown(basis, () => names ??= new Set(orphans(config, inventory).map((path) => basename(path))));
}

function endsWithThisRun(problem: Problem): boolean {
  return problem.kind === "not run" || (problem.kind === "clock" && problem.evidence.of === "run");
}

/** Alerts that a run ended with an error, and of all other problems that can be read. */
async function alertEnd(
  error: Error,
  known: State | undefined,
  config: Config,
  context: Context,
  emit: Emit,
): Promise<void> {
  const { counterpart } = otherModeOf(config, context.now());
  const options = { counterpart, writeError: () => error };
  const state = known ?? emptyState();
  let basis: Basis = { config, certificates: new Map(), state, now: context.now(), options };
  try {
    const seen = observe(config, context, () => {}, options);
    basis = { ...seen, state: known ?? seen.state };
  } catch {
    // the state cannot be read
  }
  await sendAlerts(plan(basis), config, basis.state, context, emit);
}

async function openStore(config: Config, context: Context, emit: Emit): Promise<Store> {
  const store = await Store.open(config, context.now());
  try {
    for (const text of store.notices) emit({ kind: "notice", text, changed: true });
    await removeLeftovers(config, context, store);
    return store;
  } catch (error) {
    store[Symbol.dispose]();
    throw error;
  }
}

function linkTo(entry: Entry, store: Store, emit: Emit): void {
  try {
    if (entry.finding.kind === "present") store.link(entry);
  } catch (error) {
    const text = `cannot link to the files of ${entry.stem}: ${(error as Error).message}`;
    emit({ kind: "notice", text, changed: true });
  }
}

/** The value of `find`, which is called when it is first needed; `fallback` if it throws. */
function whenNeeded<T>(find: () => T, fallback: T): () => T {
  let found: { value: T } | undefined;
  return () => {
    try {
      found ??= { value: find() };
    } catch {
      found = { value: fallback };
    }
    return found.value;
  };
}

/** What is to be known of the other mode; as if there were nothing if this user cannot read it. */
function otherModeOf(config: Config, now: Date) {
  let loaded: Config | undefined;
  const other = () => loaded ??= loadConfig(config.mode === "test" ? "prod" : "test", config.file);
  return {
    counterpart: whenNeeded<readonly Entry[]>(() => readInventory(other()), []),
    /** For production: when the last rehearsal delivered something. */
    rehearsedAt: whenNeeded<Date | undefined>(() => {
      if (config.mode === "test") return undefined;
      const receipts = Object.values(readState(other(), now).state.receipts);
      const times = receipts.flatMap((one) => Object.values(one)).map(({ at }) => Date.parse(at));
      return new Date(times.reduce((latest, time) => Math.max(latest, time), 0));
    }, undefined),
  };
}

/**
 * Remembers that the problems of this run are printed now. Returns which of all problems were printed in the last 20
 * hours, and forgets those that are no longer present.
 */
function markPrinted(own: readonly Problem[], all: readonly Problem[], state: State, now: Date): Set<string> {
  const printed = new Set(own.map(({ key }) => key));
  const known = new Set<string>();
  const reported: State["reported"] = Object.create(null);
  for (const { key } of all) {
    const at = state.reported[key];
    if (at !== undefined && now.getTime() - Date.parse(at) < LONGEST_PAUSE_MS) {
      known.add(key);
      reported[key] = at;
    } else if (printed.has(key)) reported[key] = now.toISOString();
  }
  state.reported = reported;
  return known;
}

// ---- advice ---------------------------------------------------------------------------------------------

/** TXT records that must be in the DNS for the names proven by dns-persist-01, as lines of a zone file. */
export async function records(config: Config, context: Context): Promise<string[]> {
  const names = config.lines.flatMap(({ names }) => names)
    .filter((name) => challengeOf(config, name) === "dns-persist-01");
  if (names.length === 0) return [];
  const account = await rememberedAccount(config, readState(config, context.now()).state);
  const all = new Set(names);
  // a wildcard's record proves the name itself, too
  return [...all].filter((name) => !all.has(`*.${name}`)).map((name) => {
    const issuer = account?.issuers[0] ?? "<domain name of the CA, known after the first run>";
    const url = account?.url ?? "<URL of the account, known after the first run>";
    const { record, value } = persistentRecord(name, issuer, url);
    return `${record}. IN TXT "${value}"`;
  });
}

/** What `--check` prints besides errors: records to place, links that will change, notes of the plan. */
export async function advice(config: Config, context: Context): Promise<string[]> {
  const { state } = readState(config, context.now());
  const account = await rememberedAccount(config, state);
  const flag = `(--${config.mode})`;
  const methods = [
    ...new Set(config.lines.flatMap(({ names }) => names.map((name) => challengeOf(config, name)))),
  ];
  const issuer = account?.issuers[0];
  // RFC 8657: only this account gets certificates, and only by the challenges in use
  const caa = issuer === undefined ? [] : [
    `advised: CAA 0 issue "${issuer}; accounturi=${account!.url}; validationmethods=${
      methods.join(",")
    }" ${flag}`,
  ];
  const inventory = readInventory(config);
  const basis = { config, certificates: byLine(inventory), state, now: context.now(), options: {} };
  return [
    ...(await records(config, context)).map((record) => `place: ${record} ${flag}`),
    ...caa,
    ...changingLinks(config, inventory).map((text) => `note: ${text} ${flag}`),
    ...plan(basis).warnings.map((warning) => `note: ${warningText(warning)} ${flag}`),
  ];
}

/** Checks each name's challenge as the CA would. */
export async function tryChallenges(config: Config, context: Context): Promise<ChallengeFinding[]> {
  const account = await rememberedAccount(config, readState(config, context.now()).state);
  return await checkChallenges(config, context, account);
}

// ---- plan, status ---------------------------------------------------------------------------------------

/** What a run would do, as far as is known without asking the CA or an endpoint. Changes nothing. */
export function preview(config: Config, options: RunOptions, context: Context, emit: Emit): Plan {
  const { retry, selection } = options;
  const { counterpart } = otherModeOf(config, context.now());
  const basis = observe(config, context, emit, { retry, selection, counterpart });
  for (const text of changingLinks(config, inventoryOf(basis))) emit({ kind: "notice", text });
  return plan(basis);
}

/** Certificates, endpoints, problems. Probes the endpoints unless `offline`; changes nothing. */
export async function status(
  config: Config,
  offline: boolean,
  context: Context,
  emit: Emit,
): Promise<Status> {
  const { counterpart } = otherModeOf(config, context.now());
  const basis = observe(config, context, emit, { counterpart });
  const now = () => ({ ...basis, now: context.now() });
  let decided = plan(basis);
  if (!offline && decided.endpoints.length > 0) {
    await probeAll(decided.endpoints, now, context);
    decided = plan(now());
  }
  const inventory = inventoryOf(basis);
  return { config, now: context.now(), plan: decided, inventory, orphans: orphans(config, inventory) };
}

/** What commands that change nothing decide on. */
function observe(config: Config, context: Context, emit: Emit, options: PlanOptions): Basis {
  const now = context.now();
  const { state, unusable } = readState(config, now);
  if (unusable !== undefined) {
    emit({ kind: "notice", text: `cannot use ${config.mode}/state.json: ${unusable}` });
  }
  const inventory = readInventory(config);
  takeOverReceipts(config, inventory, state, now);
  return { config, certificates: byLine(inventory), state, now, options };
}

// ---- accept, prune --------------------------------------------------------------------------------------

/** Writes receipts for what the selection names, as if it had been delivered; returns how many. */
export async function accept(
  config: Config,
  selection: Selection,
  context: Context,
  emit: Emit,
): Promise<number> {
  using store = await openStore(config, context, emit);
  const inventory = readInventory(config);
  const { state } = store;
  takeOverReceipts(config, inventory, state, context.now());
  const certificates = byLine(inventory);
  let count = 0;
  for (const section of config.sections.filter((section) => delivers(section, config.mode))) {
    const entries = entriesOf(section, config, certificates)
      .filter(({ line }) => inScope(selection, line, section));
    writeReceipts(section, entries, undefined, config, state, context.now());
    if (entries.length > 0) delete state.deliveries[section.name];
    count += entries.length;
  }
  await store.saveState();
  return count;
}

/** Files that belong to no line, relative to `prod/` or `test/`. */
export function prunable(config: Config): string[] {
  return orphans(config, readInventory(config));
}

/** Moves these files to `orphaned/`. */
export async function prune(
  config: Config,
  paths: readonly string[],
  context: Context,
  emit: Emit,
): Promise<void> {
  using store = await openStore(config, context, emit);
  const found = new Set(prunable(config)); // a run may have come in between
  store.moveOrphans(paths.filter((path) => found.has(path)));
}

// ---- revoke ---------------------------------------------------------------------------------------------

/** Revokes these certificates (`reason` is a CRLReason). The next run replaces them, under new keys. */
export async function revoke(
  config: Config,
  certificates: readonly Revocable[],
  reason: number,
  context: Context,
  emit: Emit,
): Promise<void> {
  using store = await openStore(config, context, emit);
  const account = new CaAccount({ config, store, context, parallel: 1, emit });
  for (const { pem, keyPem } of certificates) {
    await account.revoke(pem, reason, keyPem);
    await store.revoke(publicKeyHash(pem));
  }
}

// ---- rollover -------------------------------------------------------------------------------------------

/** Gives the account a new key, at the CA of this mode. */
export async function rollover(config: Config, context: Context, emit: Emit): Promise<void> {
  using store = await openStore(config, context, emit);
  await new CaAccount({ config, store, context, parallel: 1, emit }).rollover();
}

// ---- what the command line names ----------------------------------------------------------------------

/** What the command line names does not exist, or is ambiguous. */
export class SelectionError extends Error {
  override readonly name = "SelectionError";
}

/** What `--renew`, `--only`, `--deliver` and `--accept` name; undefined if none of them is given. */
export function select(
  config: Config,
  { renew = [], only = [], deliver = [], accept = [], newKey = false }: {
    renew?: readonly string[];
    only?: readonly string[];
    deliver?: readonly string[];
    accept?: readonly string[];
    newKey?: boolean;
  },
): Selection | undefined {
  if (renew.length + only.length + deliver.length + accept.length === 0) return undefined;
  const linesOf = (written: string): Line[] => {
    const lines = linesNamed(config, written);
    if (lines.length === 0) throw new SelectionError(`no line of "domains" has the name ${quote(written)}`);
    return lines;
  };
  const whats = [...deliver, ...accept].map((what): readonly (Line | string)[] => {
    const section = /^\[(.*)\]$/s.exec(what)?.[1];
    if (section === undefined) return linesOf(what);
    if (config.sections.some(({ name }) => name === section)) return [section];
    throw new SelectionError(`no section ${quote(what)} in actions.conf`);
  });
  const isLine = (one: Line | string) => typeof one !== "string";
  const renewed = new Set(renew.flatMap(linesOf));
  return {
    renew: renewed,
    newKey,
    lines: new Set([...renewed, ...only.flatMap(linesOf), ...whats.flat().filter(isLine)]),
    sections: new Set(whats.flat().filter((one) => typeof one === "string")),
    deliver: new Set(whats.slice(0, deliver.length).flat()),
  };
}

/** The lines that have a name, however it is written. */
function linesNamed({ lines }: Config, written: string): Line[] {
  const name = toIdentifier(written);
  return typeof name === "string" ? lines.filter(({ names }) => names.includes(name)) : [];
}

function isFile(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

/** A certificate that can be revoked, as it was when it was shown. */
export interface Revocable {
  readonly path: string;
  readonly pem: string;
  readonly certificate: Certificate;
  /** Its private key if it is beside it, which may revoke what another account ordered (RFC 8555 §7.6). */
  readonly keyPem?: string;
}

/** The certificates of a line, or the one in a file. Throws SelectionError if `what` is neither. */
export function revocable(config: Config, what: string): Revocable[] {
  const named = linesNamed(config, what);
  if (named.length === 0) {
    if (isFile(what)) return [readRevocable(what, keyPathBeside(what))];
    throw new SelectionError(
      `nothing to revoke: ${quote(what)} is neither a name in "domains" nor the path of a certificate`,
    );
  }
  const first = named.filter(({ names }) => names[0] === toIdentifier(what));
  const lines = first.length > 0 ? first : named;
  if (lines.length > 1) {
    const texts = lines.map(({ line, names }) => `line ${line} (${names.join(" ")})`);
    throw new SelectionError(`${quote(what)} is in ${texts.join(" and ")}; give the path of the certificate`);
  }
  const found = readInventory(config)
    .filter(({ line, finding }) => line === lines[0] && "certificate" in finding)
    .map(({ files }) => readRevocable(files.cert, files.key));
  if (found.length === 0) throw new SelectionError(`no certificate of ${what} to revoke`);
  return found;
}

function keyPathBeside(path: string): string {
  return path.replace(/(^|\/)cert\/(?=[^/]*$)/, "$1key/").replace("-cert-combined.", "-key.");
}

function readRevocable(path: string, key: string): Revocable {
  const pem = Deno.readTextFileSync(path);
  let certificate: Certificate;
  try {
    certificate = readCertificate(pem);
  } catch {
    throw new SelectionError(`no certificate in ${path}`);
  }
  try {
    const keyPem = Deno.readTextFileSync(key);
    return { path, pem, certificate, keyPem: isKeyOf(keyPem, pem) ? keyPem : undefined };
  } catch {
    return { path, pem, certificate };
  }
}
