/**
 * The story of a run: configuration, inventory, plan, issue, commit, deliver, report.
 *
 * Everything that happens is told as an event; sentences are made in report.ts. Clock, network and randomness come in
 * from outside. One line that fails stops no other.
 */

import { accountName, connect, type Connecting, register, rememberedAccount, rollOver } from "./account.ts";
import { type AcmeClient, AcmeError, limitsNames } from "./acme.ts";
import { CommandError, PrepareCommands } from "./actions.ts";
import { caaRecord, comingLives, recordsToPlace } from "./advice.ts";
import { dueAlerts, expiring, send } from "./alert.ts";
import { ChallengeError, Challenges, cleanUp } from "./challenge.ts";
import type { Config } from "./config.ts";
import {
  certFile,
  Deliveries,
  dropForgotten,
  LOOK_TIMEOUT_SECONDS,
  owe,
  owePresent,
  owing,
  targetsOf,
} from "./deliver.ts";
import type { Query } from "./context.ts";
import { issueLine, type Issuing, type KeyAndCsr } from "./issue.ts";
import { toIdentifier } from "./names.ts";
import { type Due, type Memory, plan, retryAfterFailure, type Task, type Waiting } from "./plan.ts";
import type { Route } from "./context.ts";
import { alertText, errorText, type Event, type Summary } from "./report.ts";
import type { Status } from "./status.ts";
import {
  emptyState,
  type Entry,
  type Failure,
  type Issued,
  lastRun,
  readInventory,
  readState,
  type State,
  Store,
  strayFiles,
} from "./store.ts";
import { ask, type Identified, identified, nextRun, suggestions, toAsk, unidentified } from "./suggest.ts";
import { isMistake, quote } from "./text.ts";
import { probe } from "./verify.ts";
import { createCsr, generateKey } from "./x509.ts";

/** How long the CA is left alone where it set a limit and did not say until when. */
const UNSTATED_HOLD_MS = 3_600_000;

/** Of all that waits for a moment: a Retry-After is cut to a day, as is every pause of lematt's own. */
const LONGEST_PAUSE_MS = 86_400_000;

/** The world outside, as a run needs it. */
export interface World {
  /** For requests to the CA; `caBundle` is its business. */
  readonly fetch: (url: string, init: RequestInit) => Promise<Response>;
  readonly now: () => Date;
  /** Uniform in [0, 1). */
  readonly random: () => number;
  /** Where hosts are reached, for a look at what the CA and the world will see. */
  readonly route: Route;
  /** Looks up records in the DNS. */
  readonly query: Query;
  readonly userAgent: string;
  /** Ends the run in good order. */
  readonly signal: AbortSignal;
}

/** Told as it happens. */
export type Tell = (event: Event) => void;

/** What a run would do. Touches neither the CA nor the disk. */
export async function preview(
  config: Config,
  retry: boolean,
  world: Pick<World, "now">,
  tell: Tell,
): Promise<Summary> {
  const now = world.now();
  const state = stateToRead(config, now, tell);
  const inventory = readInventory(config);
  const memory = memoryOf(state, config, identified(inventory, now), now, retry);
  const decided = plan(config, inventory, now, memory);
  const standing = config.sections.some(({ challenge }) => challenge === "dns-persist-01");
  const records = standing ? recordsToPlace(config, await rememberedAccount(config, state)) : [];
  tell({ kind: "plan", plan: decided, owed: state.owed, records });
  const due = decided.tasks.flatMap((task) => task.due).length;
  return { due, issued: 0, failed: 0, ...decided, owed: state.owed };
}

/** What to do outside lematt for one mode, and what is coming. */
export async function adviceFor(config: Config): Promise<string[]> {
  const state = readState(config);
  const account = "unusable" in state ? undefined : await rememberedAccount(config, state);
  return [
    ...comingLives(config).map((text) => `coming  ${text}`),
    ...recordsToPlace(config, account).map((record) => `place   ${record}  (--${config.mode})`),
    ...account === undefined
      ? []
      : [`advised ${caaRecord(config, account)}  (--${config.mode}, at each name)`],
  ];
}

/** How everything stands. Looks at the endpoints unless `offline`; changes nothing. */
export async function status(
  config: Config,
  offline: boolean,
  world: Pick<World, "now" | "route" | "signal">,
  tell: Tell,
): Promise<Status> {
  const now = world.now();
  const state = stateToRead(config, now, tell);
  const inventory = readInventory(config);
  const looked = offline ? [] : config.sections.filter(({ verify }) => verify.length > 0);
  const served = looked.map(async (section) => {
    const lines = config.lines.filter(({ sections }) => sections.includes(section));
    const look = {
      resolve: resolver(world.route),
      timeoutSeconds: LOOK_TIMEOUT_SECONDS,
      signal: world.signal,
    };
    const found = await probe(targetsOf(section, lines, inventory), look);
    return found.map((each) => ({ ...each, section: section.name }));
  });
  return {
    mode: config.mode,
    now,
    plan: plan(config, inventory, now, memoryOf(state, config, identified(inventory, now), now, false)),
    state,
    expiring: (entry) => expiring(entry, config, now),
    served: (await Promise.all(served)).flat(),
    strays: strayFiles(config, inventory),
  };
}

/** The state for those who only look: what cannot be used is said, and left where it is. */
function stateToRead(config: Config, now: Date, tell: Tell): State {
  const state = readState(config);
  if ("unusable" in state) {
    tell({ kind: "notice", text: `cannot use ${config.mode}/state.json: ${state.unusable}` });
    return emptyState();
  }
  dropPutOff(state, now);
  return state;
}

/** What the plan heeds of the state; `retry` has it forget that something should wait. */
function memoryOf(
  state: State,
  config: Config,
  certificates: readonly Identified[],
  now: Date,
  retry: boolean,
): Memory {
  const { revoked, failures, holds } = state;
  return {
    revoked,
    failures: retry ? {} : failures,
    hold: new Date(retry ? 0 : holds[config.directoryUrl] ?? 0),
    suggested: config.ari ? suggestions(certificates, state, now) : new Map(),
    nextRun: nextRun(lastRun(config), now),
  };
}

function resolver(route: Route): (host: string) => Promise<string[]> {
  return async (host) => (await route(host, 0)).map(({ address }) => address);
}

/** How to run. */
export interface RunOptions {
  /** Lines at a time. */
  readonly parallel: number;
  /** Tries again now what should wait. */
  readonly retry: boolean;
}

/** A whole run. Throws LockedError where another is under way. */
export async function run(
  config: Config,
  { parallel, retry }: RunOptions,
  world: World,
  tell: Tell,
): Promise<Summary> {
  using store = await openStore(config, world, tell);
  const { state } = store;
  for (const note of store.notes()) {
    if (await cleanUp(config, note, (text) => tell({ kind: "notice", text }))) store.forget(note);
  }
  await store.keepNotes();

  const inventory = readInventory(config);
  for (const entry of inventory) {
    try {
      if (entry.finding.kind === "present") store.link(entry);
    } catch (error) {
      const text = `cannot link to the files of ${entry.stem}: ${(error as Error).message}`;
      tell({ kind: "notice", text, changed: true });
    }
  }
  if (Object.keys(state.owed).length > 0) {
    const lines = new Map(inventory.map((entry) => [certFile(config, entry), entry.line]));
    for (const what of dropForgotten(state, config, lines)) {
      const text = `nothing is owed any more for ${what}: it is not in the configuration`;
      tell({ kind: "notice", text, changed: true });
    }
    owePresent(state, config, inventory);
  }
  const certificates = identified(inventory, world.now());
  dropUnknown(state, config, inventory, certificates);

  const renewed = new Map<Entry, Entry>();
  const current = () => inventory.map((entry) => renewed.get(entry) ?? entry);
  const deliveries = new Deliveries({
    config,
    store,
    inventory: current,
    now: world.now,
    resolve: resolver(world.route),
    signal: world.signal,
  });
  const carry = async (sections: readonly string[]) => {
    for (const delivery of await deliveries.deliver(sections)) tell({ kind: "delivery", delivery });
  };
  const overdue = carry(retry ? Object.keys(state.owed) : owing(state, world.now()));
  overdue.catch(() => {}); // heard below, once the issuing has come to its end, too

  const connecting = connectingFor(config, store, world, tell);
  let opened: Promise<AcmeClient> | undefined;
  const client = () => opened ??= connect(connecting);
  const running: Running = { config, parallel, store, world, tell, client, connecting };
  await askSuggestions(certificates, unidentified(inventory, world.now()), running);
  const memory = memoryOf(state, config, certificates, world.now(), retry);
  const decided = plan(config, inventory, world.now(), memory);
  store.begin(world.now());
  const fresh = new Set<string>();
  const keep = async ({ entry }: Due, issued: Issued) => {
    owe(state, entry.line, certFile(config, entry), issued.certificate.fingerprint, world.now());
    await store.saveState();
    renewed.set(entry, await store.commit(entry, issued));
    for (const { name } of entry.line.sections) fresh.add(name);
  };
  const issuing = issueAll(decided.tasks, running, keep).then(async (issued) => {
    await store.keepNotes();
    await carry([...fresh]);
    return issued;
  });
  await Promise.allSettled([overdue, issuing]);
  await overdue;
  const { failed, held } = await issuing;
  const unsent = await alert(config, current(), store, world, tell);
  await store.saveState();
  const waiting = [...decided.waiting, ...held];
  return {
    due: 0,
    issued: renewed.size,
    failed: failed + unsent,
    kept: decided.kept,
    waiting,
    owed: state.owed,
  };
}

/** Gives the account a new key, at the CA of this mode. */
export async function rollover(config: Config, world: World, tell: Tell): Promise<void> {
  using store = await openStore(config, world, tell);
  await rollOver(connectingFor(config, store, world, tell));
}

/**
 * Takes the lock. Where the state had to be begun anew, says so and owes every delivery: what the ledger held is not
 * known, and a delivery is repeated rather than forgotten.
 */
async function openStore(config: Config, world: World, tell: Tell): Promise<Store> {
  const store = Store.open(config, world.now());
  dropPutOff(store.state, world.now());
  for (const text of store.notices) tell({ kind: "notice", text, changed: true });
  if (!store.begunAnew) return store;
  for (const entry of readInventory(config)) {
    if (entry.finding.kind !== "present") continue;
    const { fingerprint } = entry.finding.certificate;
    owe(store.state, entry.line, certFile(config, entry), fingerprint, world.now());
  }
  await store.saveState();
  return store;
}

/** Forgets what a clock that was ahead has put off or told of: nothing that is remembered waits longer than a day. */
function dropPutOff(state: State, now: Date): void {
  const latest = new Date(now.getTime() + LONGEST_PAUSE_MS).toISOString();
  const isPutOff = (at: string | undefined) => at !== undefined && at > latest; // as texts, for there may be many
  for (const waiting of [...Object.values(state.failures), ...Object.values(state.owed)]) {
    if (isPutOff(waiting.retryAt)) delete waiting.retryAt;
  }
  for (const renewal of Object.values(state.renewals)) {
    if (isPutOff(renewal.askAt)) delete renewal.askAt;
    if (isPutOff(renewal.suggestedAt)) delete renewal.suggestedAt;
  }
  for (const moments of [state.holds, ...Object.values(state.alerts)]) {
    for (const [key, at] of Object.entries(moments)) if (isPutOff(at)) delete moments[key];
  }
}

/** Forgets what is remembered of lines, certificates and sections that are no more. */
function dropUnknown(
  state: State,
  config: Config,
  inventory: readonly Entry[],
  certificates: readonly Identified[],
): void {
  const ids = new Set(certificates.map(({ id }) => id));
  for (const id of Object.keys(state.renewals)) if (!ids.has(id)) delete state.renewals[id];
  const stems = new Set(inventory.map(({ stem }) => stem));
  const alerting = new Set(config.sections.filter(({ alert }) => alert.length > 0).map(({ name }) => name));
  for (const stem of Object.keys(state.failures)) if (!stems.has(stem)) delete state.failures[stem];
  if (Object.keys(state.revoked).length > 0) {
    const present = inventory.map(({ finding }) =>
      "certificate" in finding && finding.certificate.fingerprint
    );
    for (const one of Object.keys(state.revoked)) if (!present.includes(one)) delete state.revoked[one];
  }
  for (const section of Object.keys(state.alerts)) if (!alerting.has(section)) delete state.alerts[section];
}

/** Tells those who are to be told, and returns how many could not be. */
async function alert(
  config: Config,
  inventory: readonly Entry[],
  store: Store,
  world: World,
  tell: Tell,
): Promise<number> {
  let unsent = 0;
  for (const due of dueAlerts(config, inventory, store.state, world.now())) {
    const { section: { name: section }, causes } = due;
    const text = alertText(section, causes);
    const error = await send(due, text, config, store.state, world.now(), world.signal);
    tell({ kind: "alert", section, causes, error });
    if (error !== undefined) unsent++;
  }
  return unsent;
}

/** The certificates of a line that can be revoked. Throws where `name` does not say which line is meant. */
export function revocable(config: Config, written: string): Entry[] {
  const name = toIdentifier(written);
  if (isMistake(name)) throw new SelectionError(`cannot revoke ${quote(written)}: ${name.why}`);
  const inventory = readInventory(config);
  const lines = config.lines.filter(({ names }) => names.includes(name));
  const chosen = lines.filter(({ names }) => lines.length === 1 || names[0] === name);
  if (chosen.length !== 1) {
    const many = lines.map(({ line, names }) => `line ${line} (${names.join(" ")})`).join(", ");
    const why = lines.length === 0
      ? "no line of domains has that name"
      : `it is in ${many}; name a first name`;
    throw new SelectionError(`cannot tell what to revoke for ${quote(name)}: ${why}`);
  }
  const entries = inventory.filter(({ line, finding }) => line === chosen[0] && "certificate" in finding);
  if (entries.length === 0) throw new SelectionError(`there is no certificate of ${name} to revoke`);
  return entries;
}

/** What was asked for on the command line does not exist, or not unambiguously. */
export class SelectionError extends Error {
  override readonly name = "SelectionError";
}

/** Revokes certificates (`reason` is a CRLReason) and has the next run replace them under new keys. */
export async function revoke(
  config: Config,
  entries: readonly Entry[],
  reason: number,
  world: World,
  tell: Tell,
): Promise<void> {
  using store = await openStore(config, world, tell);
  const connecting = connectingFor(config, store, world, tell);
  const client = await connect(connecting);
  await register(client, connecting);
  for (const { finding } of entries) {
    if (!("certificate" in finding)) continue;
    const { der, fingerprint } = finding.certificate;
    await client.revokeCertificate(der, reason);
    store.state.revoked[fingerprint] = world.now().toISOString();
    await store.saveState();
  }
}

/** Everything that a run works with. */
interface Running {
  readonly config: Config;
  readonly parallel: number;
  readonly store: Store;
  readonly world: World;
  readonly tell: Tell;
  /** The conversation with the CA, opened by the first who needs it. */
  readonly client: () => Promise<AcmeClient>;
  readonly connecting: Connecting;
}

function connectingFor(config: Config, store: Store, world: World, tell: Tell): Connecting {
  return {
    config,
    store,
    world,
    madeKey: (path, how) => tell({ kind: "account key", path, how }),
    warn: (text) => tell({ kind: "notice", text }),
  };
}

/** Asks the CA when it would like certificates to be renewed, as far as it may be asked again. Never fails a run. */
async function askSuggestions(
  certificates: readonly Identified[],
  nameless: readonly Entry[],
  running: Running,
): Promise<void> {
  const { config, parallel, store, world, tell } = running;
  const asked = toAsk(certificates, store.state, config.directoryUrl, world.now());
  if (!config.ari || asked.length + nameless.length === 0) return;
  let client: AcmeClient;
  try {
    client = await running.client();
  } catch (error) {
    return tell({ kind: "notice", text: `cannot ask the CA when to renew: ${errorText(error as Error)}` });
  }
  if (client.directory.renewalInfo === undefined) return;
  const note = ({ line, keyType }: Entry, text: string) =>
    tell({ kind: "notice", text: `${line.names[0]} (${keyType}): ${text}` });
  for (const entry of nameless) {
    note(entry, "cannot ask when to renew: it does not name its authority's key; its dates decide");
  }
  let answers = true;
  await inParallel(asked, parallel, world.signal, async (certificate) => {
    if (!answers) return;
    try {
      await ask(certificate, client, store.state, world.now(), world.random());
    } catch (error) {
      if (!answers) return;
      const decides = store.state.renewals[certificate.id]?.window === undefined
        ? "its dates decide"
        : "what the CA said before decides";
      note(certificate.entry, `${errorText(error as Error)}; ${decides}`);
      // a service that is down is not waited for once for every certificate; the next run asks about the others
      answers = !(error instanceof AcmeError && (error.passing || error.problem?.type === "rateLimited"));
    }
  });
  await store.saveState();
}

/** Issues every task; returns how many certificates failed, and which tasks the CA's limits leave for a later run. */
async function issueAll(
  tasks: readonly Task[],
  running: Running,
  keep: (due: Due, issued: Issued) => Promise<void>,
): Promise<{ failed: number; held: readonly Waiting[] }> {
  if (tasks.length === 0) return { failed: 0, held: [] };
  const { config, parallel, store, world, tell } = running;
  tell({ kind: "begin", tasks });
  // what the first lines need is made while the CA is reached for
  const early = new Map(
    tasks.slice(0, parallel).flatMap(({ due }) => due).map((due) => [due, requestFor(due, config, store)]),
  );
  for (const request of early.values()) request.catch(() => {}); // heard by the line that needs it
  let client: AcmeClient;
  try {
    client = await running.client();
    await register(client, running.connecting);
    await store.ensureWritable();
  } catch (error) {
    tell({ kind: "no CA", error: error as Error, tasks });
    for (const task of tasks) rememberFailure(task, error as Error, running);
    await store.saveState();
    return { failed: tasks.flatMap(({ due }) => due).length, held: [] };
  }
  client.concurrency = Math.min(parallel, tasks.length);

  await using prepare = new PrepareCommands();
  const warn = (text: string) => tell({ kind: "notice", text });
  const note = (text: string) => store.note(text);
  const forget = (text: string) => store.forget(text);
  const account = accountName(config, client.key);
  const issuing: Issuing = {
    client,
    challenges: new Challenges({ ...world, config, prepare, note, forget, warn }),
    now: world.now,
    request: (due) => early.get(due) ?? requestFor(due, config, store),
    replaces: ({ entry: { finding } }) => {
      const id = "certificate" in finding ? finding.certificate.id : undefined;
      const offered = config.ari && client.directory.renewalInfo !== undefined;
      return offered && id !== undefined && store.state.renewals[id]?.account === account ? id : undefined;
    },
    preferredChain: config.preferredChain,
    warn,
  };
  const remember = async (due: Due, issued: Issued) => {
    const { id } = issued.certificate;
    const suggested = due.reason.kind === "renewal" && due.reason.rule === "ari";
    if (id !== undefined && config.ari) {
      store.state.renewals[id] = { account, ...(suggested && { suggestedAt: world.now().toISOString() }) };
    }
    await keep(due, issued);
  };
  const held: Waiting[] = [];
  let failed = 0;
  delete store.state.holds[config.directoryUrl];
  await inParallel(tasks, parallel, world.signal, async (task) => {
    const until = heldUntil(running);
    if (until !== undefined) {
      held.push({ ...task, until });
      return;
    }
    const left = await issueTask(task, issuing, running, remember);
    failed += left.failed;
    if (left.held !== undefined) held.push(left.held);
  });
  await register(client, running.connecting); // the CA may have forgotten the account, and been told anew
  await store.saveState();
  return { failed, held };
}

/**
 * Issues one line, keeps what comes, tells and remembers what failed. Returns for how many certificates it did; or what
 * waits, where the CA wants no more orders and another line has told of it.
 */
async function issueTask(
  task: Task,
  issuing: Issuing,
  running: Running,
  keep: (due: Due, issued: Issued) => Promise<void>,
): Promise<{ failed: number; held?: Waiting }> {
  const { world, tell } = running;
  tell({ kind: "task", task });
  const begun = world.now().getTime();
  let unkept = false; // a certificate was spent, and could not be put in its place
  const results = await Promise.allSettled(
    issueLine(task, issuing).map(async (promise, index) => {
      const due = task.due[index]!;
      const issued = await promise;
      await keep(due, issued).catch((error) => {
        unkept = true;
        throw error;
      });
      const seconds = (world.now().getTime() - begun) / 1000;
      tell({ kind: "issued", due, certificate: issued.certificate, seconds });
    }),
  );
  // an error that both key types share is told once
  const failures = new Map<Error, Due[]>();
  for (const [index, result] of results.entries()) {
    if (result.status === "fulfilled") continue;
    failures.set(result.reason, [...failures.get(result.reason) ?? [], task.due[index]!]);
  }
  const errors = [...failures.keys()], left = [...failures.values()].flat();
  const until = heldUntil(running);
  const waits = errors.length > 0 && until !== undefined &&
    errors.every((error) => limitsAccount(error, task.line.names));
  if (errors.length === 0) delete running.store.state.failures[task.due[0]!.entry.stem];
  else if (!waits) {
    for (const [error, due] of failures) tell({ kind: "failed", due, error });
    rememberFailure(task, errors[0]!, running, unkept);
  }
  tell({ kind: "end", task });
  return waits ? { failed: 0, held: { ...task, due: left, until } } : { failed: left.length };
}

/** Until when the CA wants no orders; undefined where it takes them. */
function heldUntil({ config, store, world }: Running): Date | undefined {
  const hold = store.state.holds[config.directoryUrl];
  return hold !== undefined && new Date(hold) > world.now() ? new Date(hold) : undefined;
}

/** Remembers why a line could not be issued, or until when the CA wants no orders at all. */
function rememberFailure(
  task: Task,
  error: Error,
  { config, store, world }: Running,
  costly = false,
): void {
  const { holds, failures } = store.state;
  const { stem } = task.due[0]!.entry;
  if (limitsAccount(error, task.line.names)) {
    const until = error.retryAfter ?? new Date(world.now().getTime() + UNSTATED_HOLD_MS);
    holds[config.directoryUrl] = until.toISOString();
  } else if (!world.signal.aborted) { // which would be our doing
    failures[stem] = failureAfter(failures[stem], error, world.now(), costly);
  }
}

/** Whether the CA wants no more orders from this account, whatever their names. */
function limitsAccount(error: Error, names: readonly string[]): error is AcmeError {
  return error instanceof AcmeError && error.problem?.type === "rateLimited" &&
    !limitsNames(error.problem, names);
}

/**
 * What is remembered of a line that failed. What cost the CA an order, a validation or a certificate keeps the line
 * waiting; a connection that broke, an answer that made no sense or a disk that was full before does not.
 */
function failureAfter(before: Failure | undefined, error: Error, now: Date, unkept: boolean): Failure {
  const count = (before?.count ?? 0) + 1;
  const refused = error instanceof AcmeError && (error.problem !== undefined || error.spent);
  const asked = error instanceof AcmeError ? error.retryAfter : undefined;
  const costly = unkept || refused || error instanceof ChallengeError || error instanceof CommandError;
  const retryAt = asked ?? (costly ? retryAfterFailure(count, now) : undefined);
  return {
    count,
    at: now.toISOString(),
    error: errorText(error).split("\n")[0]!,
    retryAt: retryAt?.toISOString(),
  };
}

/** Works on a number of things at a time, in their order, until all are done or the signal aborts. */
async function inParallel<T>(
  things: readonly T[],
  number: number,
  signal: AbortSignal,
  work: (thing: T) => Promise<void>,
): Promise<void> {
  const queue = things.values();
  const worker = async () => {
    for (const thing of queue) {
      if (signal.aborted) return;
      await work(thing);
    }
  };
  await Promise.all(Array.from({ length: Math.min(number, things.length) }, worker));
}

/** The key that is there, unless each certificate shall have its own, or a new one; and its CSR. */
async function requestFor({ entry, reason }: Due, config: Config, store: Store): Promise<KeyAndCsr> {
  const anew = config.alwaysGenerateNewKeys || reason.kind === "revoked";
  const present = anew ? undefined : store.keyOf(entry);
  const keyPem = present ?? await generateKey(
    entry.keyType === "rsa" ? { type: "rsa", bits: config.keyBitsRSA } : { type: "ec", curve: config.curve },
  );
  return { keyPem, csr: await createCsr(keyPem, entry.line.names) };
}
