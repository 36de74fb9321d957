/**
 * The story of a run: configuration, inventory, plan, issue, commit, deliver, report.
 *
 * Everything that happens is told as an event; sentences are made in report.ts. Clock, network and randomness come in
 * from outside. One line that fails stops no other.
 */

import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { type AccountKey, AcmeClient, AcmeError, importAccountKey, limitsNames } from "./acme.ts";
import { PrepareCommands } from "./actions.ts";
import { dueAlerts, expiring, send } from "./alert.ts";
import { Challenges, cleanUp } from "./challenge.ts";
import type { Config, Mode } from "./config.ts";
import { Deliveries, dropForgotten, LOOK_TIMEOUT_SECONDS, owe, owing, targetsOf } from "./deliver.ts";
import { issueLine, type Issuing } from "./issue.ts";
import { type Due, type Memory, plan, retryAfterFailure, type Task, type Waiting } from "./plan.ts";
import type { Route } from "./reach.ts";
import { alertText, errorText, type Event, type Summary } from "./report.ts";
import type { Status } from "./status.ts";
import {
  createSecret,
  emptyState,
  type Entry,
  type Failure,
  filesOf,
  type Issued,
  readInventory,
  readState,
  type State,
  Store,
  strayFiles,
} from "./store.ts";
import { probe } from "./verify.ts";
import { generateKey } from "./x509.ts";

/** How long the CA is left alone where it set a limit and did not say until when. */
const UNSTATED_HOLD_MS = 3_600_000;

/** The world outside, as a run needs it. */
export interface World {
  /** For requests to the CA; `caBundle` is its business. */
  readonly fetch: (url: string, init: RequestInit) => Promise<Response>;
  readonly now: () => Date;
  /** Uniform in [0, 1). */
  readonly random: () => number;
  /** Where hosts are reached, for a look at what the CA and the world will see. */
  readonly route: Route;
  readonly userAgent: string;
  /** Ends the run in good order. */
  readonly signal: AbortSignal;
}

/** Told as it happens. */
export type Tell = (event: Event) => void;

/** What a run would do. Touches neither the CA nor the disk. */
export function preview(
  config: Config,
  mode: Mode,
  retry: boolean,
  world: Pick<World, "now">,
  tell: Tell,
): Summary {
  const state = stateToRead(config, mode, tell);
  const decided = plan(
    config,
    readInventory(config, mode),
    world.now(),
    memoryOf(state, config, mode, retry),
  );
  tell({ kind: "plan", plan: decided, owed: state.owed });
  return { issued: 0, failed: 0, ...decided, owed: state.owed };
}

/** How everything stands. Looks at the endpoints unless `offline`; changes nothing. */
export async function status(
  config: Config,
  mode: Mode,
  offline: boolean,
  world: Pick<World, "now" | "route" | "signal">,
  tell: Tell,
): Promise<Status> {
  const now = world.now();
  const state = stateToRead(config, mode, tell);
  const inventory = readInventory(config, mode);
  const served = offline ? [] : config.sections.map(async (section) => {
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
    mode,
    now,
    plan: plan(config, inventory, now, memoryOf(state, config, mode, false)),
    state,
    expiring: (entry) => expiring(entry, config, now),
    served: (await Promise.all(served)).flat(),
    strays: strayFiles(config, mode, inventory),
  };
}

/** The state for those who only look: what cannot be used is said, and left where it is. */
function stateToRead(config: Config, mode: Mode, tell: Tell): State {
  const state = readState(config, mode);
  if (!("unusable" in state)) return state;
  tell({ kind: "notice", text: `cannot use ${mode}/state.json: ${state.unusable}` });
  return emptyState();
}

/** What the plan heeds of the state; `retry` has it forget that something should wait. */
function memoryOf(state: State, config: Config, mode: Mode, retry: boolean): Memory {
  const { revoked, failures, holds } = state;
  if (retry) return { revoked, failures: {}, hold: new Date(0) };
  return { revoked, failures, hold: new Date(holds[config.acmeDirectory[mode]] ?? 0) };
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
  mode: Mode,
  { parallel, retry }: RunOptions,
  world: World,
  tell: Tell,
): Promise<Summary> {
  using store = Store.open(config, mode, world.now());
  const { state } = store;
  for (const text of store.notices) tell({ kind: "notice", text });
  cleanUp(config, store.notes());
  store.clearNotes();

  const inventory = readInventory(config, mode);
  for (const entry of inventory) if (entry.finding.kind === "present") store.link(entry);
  const certFile = (entry: Entry) => basename(filesOf(config, mode, entry).cert);
  for (const what of dropForgotten(state, config, new Set(inventory.map(certFile)))) {
    tell({ kind: "notice", text: `nothing is owed any more for ${what}: it is not in the configuration` });
  }
  dropUnknown(state, config, inventory);

  const renewed = new Map<Entry, Entry>();
  const current = () => inventory.map((entry) => renewed.get(entry) ?? entry);
  const deliveries = new Deliveries({
    config,
    mode,
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

  const decided = plan(config, inventory, world.now(), memoryOf(state, config, mode, retry));
  const fresh = new Set<string>();
  const keep = async ({ entry }: Due, issued: Issued) => {
    owe(state, entry.line, certFile(entry), issued.certificate.fingerprint, world.now());
    await store.saveState();
    await store.commit(entry, issued);
    renewed.set(entry, { ...entry, finding: { kind: "present", certificate: issued.certificate } });
    for (const { name } of entry.line.sections) fresh.add(name);
  };
  const { failed, held } = await issueAll(decided.tasks, {
    config,
    mode,
    parallel,
    store,
    world,
    tell,
    keep,
  });
  store.clearNotes();
  await overdue;
  await carry([...fresh]);
  const unsent = await alert(config, current(), store, world, tell);
  await store.saveState();
  const waiting = [...decided.waiting, ...held];
  return { issued: renewed.size, failed: failed + unsent, kept: decided.kept, waiting, owed: state.owed };
}

/** Forgets what is remembered of lines, certificates and sections that are no more. */
function dropUnknown(state: State, config: Config, inventory: readonly Entry[]): void {
  const stems = new Set(inventory.map(({ stem }) => stem));
  const fingerprints = new Set(
    inventory.map(({ finding }) => "certificate" in finding && finding.certificate.fingerprint),
  );
  const alerting = new Set(config.sections.filter(({ alert }) => alert.length > 0).map(({ name }) => name));
  for (const stem of Object.keys(state.failures)) if (!stems.has(stem)) delete state.failures[stem];
  for (const one of Object.keys(state.revoked)) if (!fingerprints.has(one)) delete state.revoked[one];
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
    const error = await send(due, alertText(due.causes), config, store.state, world.now(), world.signal);
    tell({ kind: "alert", section: due.section.name, causes: due.causes, error });
    if (error !== undefined) unsent++;
  }
  return unsent;
}

/** The certificates of a line that can be revoked. Throws where `name` does not say which line is meant. */
export function revocable(config: Config, mode: Mode, name: string): Entry[] {
  const inventory = readInventory(config, mode);
  const lines = config.lines.filter(({ names }) => names.includes(name));
  const chosen = lines.filter(({ names }) => lines.length === 1 || names[0] === name);
  if (chosen.length !== 1) {
    const many = lines.map(({ line, names }) => `line ${line} (${names.join(" ")})`).join(", ");
    const why = lines.length === 0
      ? "no line of domains has that name"
      : `it is in ${many}; name a first name`;
    throw new SelectionError(`cannot tell what to revoke for ${JSON.stringify(name)}: ${why}`);
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
  mode: Mode,
  entries: readonly Entry[],
  reason: number,
  world: World,
  tell: Tell,
): Promise<void> {
  using store = Store.open(config, mode, world.now());
  for (const text of store.notices) tell({ kind: "notice", text });
  const client = await connect(1, { config, mode, store, world, tell });
  for (const { finding } of entries) {
    if (!("certificate" in finding)) continue;
    const { der, fingerprint } = finding.certificate;
    await client.revokeCertificate(der, reason);
    store.state.revoked[fingerprint] = world.now().toISOString();
    await store.saveState();
  }
}

/** What issuing many lines needs. */
interface Issuance extends Connecting {
  readonly parallel: number;
  /** Puts a certificate in its place. */
  keep(due: Due, issued: Issued): Promise<void>;
}

/** What a conversation with the CA needs. */
interface Connecting {
  readonly config: Config;
  readonly mode: Mode;
  readonly store: Store;
  readonly world: World;
  readonly tell: Tell;
}

/** Issues every task; returns how many certificates failed, and which tasks the CA's limits leave for a later run. */
async function issueAll(
  tasks: readonly Task[],
  issuance: Issuance,
): Promise<{ failed: number; held: readonly Waiting[] }> {
  if (tasks.length === 0) return { failed: 0, held: [] };
  const { config, mode, parallel, store, world, tell } = issuance;
  tell({ kind: "begin", tasks });
  let client: AcmeClient;
  try {
    client = await connect(Math.min(parallel, tasks.length), issuance);
  } catch (error) {
    tell({ kind: "no CA", error: error as Error, tasks });
    return { failed: tasks.flatMap(({ due }) => due).length, held: [] };
  }

  await using prepare = new PrepareCommands();
  const warn = (text: string) => tell({ kind: "notice", text });
  const challenges = new Challenges(config, prepare, store, world.route, warn);
  const issuing = {
    client,
    challenges,
    now: world.now,
    privateKey: (due: Due) => privateKey(config, store, due),
  };
  const directoryUrl = config.acmeDirectory[mode];
  const held: Waiting[] = [];
  let failed = 0;
  const queue = tasks.values();
  const worker = async () => {
    for (const task of queue) {
      if (world.signal.aborted) return;
      const hold = store.state.holds[directoryUrl];
      if (hold !== undefined && new Date(hold) > world.now()) held.push({ ...task, until: new Date(hold) });
      else failed += await issueTask(task, issuing, issuance);
    }
  };
  delete store.state.holds[directoryUrl];
  try {
    await Promise.all(Array.from({ length: Math.min(parallel, tasks.length) }, worker));
  } finally {
    store.state.accounts[accountName(config, mode, client.key)] = await client.account();
    await store.saveState();
  }
  return { failed, held };
}

/** Issues one line, keeps what comes, tells and remembers what failed, and returns for how many certificates it did. */
async function issueTask(task: Task, issuing: Issuing, issuance: Issuance): Promise<number> {
  const { config, mode, store, world, tell, keep } = issuance;
  tell({ kind: "task", task });
  const begun = world.now().getTime();
  const results = await Promise.allSettled(
    issueLine(task, issuing).map(async (promise, index) => {
      const due = task.due[index]!;
      const issued = await promise;
      await keep(due, issued);
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
  const { stem } = task.due[0]!.entry;
  if (failures.size === 0) delete store.state.failures[stem];
  for (const [error, due] of failures) {
    tell({ kind: "failed", due, error });
    if (world.signal.aborted) continue; // ended by us, which is nobody's failure
    const limit = error instanceof AcmeError && error.problem?.type === "rateLimited" ? error : undefined;
    if (limit !== undefined && !limitsNames(limit.problem!, task.line.names)) {
      const until = limit.retryAfter ?? new Date(world.now().getTime() + UNSTATED_HOLD_MS);
      store.state.holds[config.acmeDirectory[mode]] = until.toISOString();
    } else {
      store.state.failures[stem] = failureAfter(store.state.failures[stem], error, world.now());
    }
  }
  tell({ kind: "end", task });
  return [...failures.values()].flat().length;
}

/**
 * What is remembered of a line that failed. Whatever costs the CA a validation or an order keeps it waiting; a
 * connection that broke or an answer that made no sense does not.
 */
function failureAfter(before: Failure | undefined, error: Error, now: Date): Failure {
  const count = (before?.count ?? 0) + 1;
  const free = error instanceof AcmeError && error.problem === undefined;
  const asked = error instanceof AcmeError ? error.retryAfter : undefined;
  const retryAt = asked ?? (free ? undefined : retryAfterFailure(count, now));
  return {
    count,
    at: now.toISOString(),
    error: errorText(error).split("\n")[0]!,
    retryAt: retryAt?.toISOString(),
  };
}

/** Opens the conversation with the CA, under the account that is remembered or a new one. */
async function connect(concurrency: number, connecting: Connecting): Promise<AcmeClient> {
  const { config, mode, store, world, tell } = connecting;
  const key = await importAccountKey(await accountKey(config, tell));
  const accountUrl = store.state.accounts[accountName(config, mode, key)];
  const registration = { accountUrl, contact: config.contact, concurrency };
  const client = await AcmeClient.connect(config.acmeDirectory[mode], key, registration, world);
  await client.account();
  return client;
}

/** An account belongs to one CA and one key. */
function accountName(config: Config, mode: Mode, key: AccountKey): string {
  return `${config.acmeDirectory[mode]} ${key.thumbprint}`;
}

/** The account key, made where there is none yet. */
async function accountKey(config: Config, tell: Tell): Promise<string> {
  try {
    return readFileSync(config.accountKey, "utf8");
  } catch (error) {
    if ((error as { code?: string }).code !== "ENOENT") throw error;
  }
  const pem = await generateKey({ type: "ec", curve: "P-256" });
  await createSecret(config.accountKey, pem);
  tell({ kind: "account key", path: config.accountKey });
  return pem;
}

/** The key to certify: the one that is there, unless there is none or each certificate shall have its own. */
async function privateKey(config: Config, store: Store, { entry, reason }: Due): Promise<string> {
  const anew = config.alwaysGenerateNewKeys || reason.kind === "revoked";
  const present = anew ? undefined : store.keyOf(entry);
  if (present !== undefined) return present;
  return await generateKey(
    entry.keyType === "rsa" ? { type: "rsa", bits: config.keyBitsRSA } : { type: "ec", curve: config.curve },
  );
}
