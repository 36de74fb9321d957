/**
 * The story of a run: configuration, inventory, plan, issue, commit, deliver, report.
 *
 * Everything that happens is told as an event; sentences are made in report.ts. Clock, network and randomness come in
 * from outside. One line that fails stops no other.
 */

import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { type AccountKey, AcmeClient, importAccountKey } from "./acme.ts";
import { PrepareCommands } from "./actions.ts";
import { Challenges, cleanUp } from "./challenge.ts";
import type { Config, Mode } from "./config.ts";
import { Deliveries, dropForgotten, owe, owing } from "./deliver.ts";
import { issueLine, type Issuing } from "./issue.ts";
import { type Due, plan, type Task } from "./plan.ts";
import type { Route } from "./preflight.ts";
import type { Event, Summary } from "./report.ts";
import { createSecret, type Entry, filesOf, type Issued, readInventory, readState, Store } from "./store.ts";
import { generateKey } from "./x509.ts";

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
export function preview(config: Config, mode: Mode, world: Pick<World, "now">, tell: Tell): Summary {
  const state = readState(config, mode);
  if ("unusable" in state) tell({ kind: "notice", text: `cannot use ${mode}/state.json: ${state.unusable}` });
  const decided = plan(config, readInventory(config, mode), world.now());
  const owed = "unusable" in state ? {} : state.owed;
  tell({ kind: "plan", plan: decided, owed });
  return { issued: 0, failed: 0, kept: decided.kept, owed };
}

/** A whole run, `parallel` lines at a time. Throws LockedError where another is under way. */
export async function run(
  config: Config,
  mode: Mode,
  parallel: number,
  world: World,
  tell: Tell,
): Promise<Summary> {
  using store = Store.open(config, mode, world.now());
  for (const text of store.notices) tell({ kind: "notice", text });
  cleanUp(config, store.notes());
  store.clearNotes();

  const inventory = readInventory(config, mode);
  for (const entry of inventory) if (entry.finding.kind === "present") store.link(entry);
  const certFile = (entry: Entry) => basename(filesOf(config, mode, entry).cert);
  for (const what of dropForgotten(store.state, config, new Set(inventory.map(certFile)))) {
    tell({ kind: "notice", text: `nothing is owed any more for ${what}: it is not in the configuration` });
  }

  const renewed = new Map<Entry, Entry>();
  const deliveries = new Deliveries({
    config,
    mode,
    store,
    inventory: () => inventory.map((entry) => renewed.get(entry) ?? entry),
    now: world.now,
    signal: world.signal,
  });
  const carry = async (sections: readonly string[]) => {
    for (const delivery of await deliveries.deliver(sections)) tell({ kind: "delivery", delivery });
  };
  const overdue = carry(owing(store.state, world.now()));

  const decided = plan(config, inventory, world.now());
  const fresh = new Set<string>();
  const keep = async ({ entry }: Due, issued: Issued) => {
    owe(store.state, entry.line, certFile(entry), issued.certificate.fingerprint, world.now());
    await store.saveState();
    await store.commit(entry, issued);
    renewed.set(entry, { ...entry, finding: { kind: "present", certificate: issued.certificate } });
    for (const { name } of entry.line.sections) fresh.add(name);
  };
  const failed = await issueAll(decided.tasks, { config, mode, parallel, store, world, tell, keep });
  store.clearNotes();
  await overdue;
  await carry([...fresh]);
  return { issued: renewed.size, failed, kept: decided.kept, owed: store.state.owed };
}

/** What issuing many lines needs. */
interface Issuance {
  readonly config: Config;
  readonly mode: Mode;
  readonly parallel: number;
  readonly store: Store;
  readonly world: World;
  readonly tell: Tell;
  /** Puts a certificate in its place. */
  keep(due: Due, issued: Issued): Promise<void>;
}

/** Issues every task and returns how many certificates failed. */
async function issueAll(tasks: readonly Task[], issuance: Issuance): Promise<number> {
  if (tasks.length === 0) return 0;
  const { config, mode, parallel, store, world, tell } = issuance;
  tell({ kind: "begin", tasks });
  let client: AcmeClient;
  try {
    client = await connect(tasks, issuance);
  } catch (error) {
    tell({ kind: "no CA", error: error as Error, tasks });
    return tasks.flatMap(({ due }) => due).length;
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
  let failed = 0;
  const queue = tasks.values();
  const worker = async () => {
    for (const task of queue) {
      if (world.signal.aborted) return;
      failed += await issueTask(task, issuing, issuance);
    }
  };
  try {
    await Promise.all(Array.from({ length: Math.min(parallel, tasks.length) }, worker));
  } finally {
    const account = await client.account();
    const name = accountName(config, mode, client.key);
    if (store.state.accounts[name] !== account) {
      store.state.accounts[name] = account;
      await store.saveState();
    }
  }
  return failed;
}

/** Issues one line, keeps what comes, tells what failed, and returns for how many certificates it did. */
async function issueTask(task: Task, issuing: Issuing, { world, tell, keep }: Issuance): Promise<number> {
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
  for (const [error, due] of failures) tell({ kind: "failed", due, error });
  tell({ kind: "end", task });
  return [...failures.values()].flat().length;
}

/** Opens the conversation with the CA, under the account that is remembered or a new one. */
async function connect(tasks: readonly Task[], issuance: Issuance): Promise<AcmeClient> {
  const { config, mode, parallel, store, world, tell } = issuance;
  const key = await importAccountKey(await accountKey(config, tell));
  const accountUrl = store.state.accounts[accountName(config, mode, key)];
  const registration = { accountUrl, contact: config.contact, concurrency: Math.min(parallel, tasks.length) };
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
async function privateKey(config: Config, store: Store, { entry }: Due): Promise<string> {
  const present = config.alwaysGenerateNewKeys ? undefined : store.keyOf(entry);
  if (present !== undefined) return present;
  return await generateKey(
    entry.keyType === "rsa" ? { type: "rsa", bits: config.keyBitsRSA } : { type: "ec", curve: config.curve },
  );
}
