/**
 * The ledger of deliveries owed: which sections still have to carry which certificates, and the carrying.
 *
 * A section is the unit: what it owes is in the ledger before its first command runs, and leaves it only when all its
 * commands have succeeded and its endpoints serve the new certificates. A crash therefore repeats a delivery but never loses one.
 */

import { basename } from "node:path";
import {
  CommandError,
  type CommandLine,
  commandLines,
  type Outcome,
  runCommand,
  type Values,
} from "./actions.ts";
import type { Config, Endpoint, Line, Section } from "./config.ts";
import { type Expected, type Served, type Target, verifyUntil } from "./verify.ts";
import { type Debt, type Entry, filesOf, type State, type Store } from "./store.ts";

/** A command that succeeded, with the text that it has in actions.conf. */
export interface Ran {
  readonly template: string;
  readonly outcome: Outcome;
}

/** Endpoints that do not serve, or not yet, what was carried to them. */
export class VerificationError extends Error {
  override readonly name = "VerificationError";
  constructor(readonly wrong: readonly Served[]) {
    super(`${wrong[0]!.endpoint} does not serve the newest certificate`);
  }
}

/** One section's attempt to pay what it owes. */
export interface Delivery {
  readonly section: string;
  /** Names of the lines whose certificates were carried. */
  readonly entries: readonly Entry[];
  readonly commands: readonly Ran[];
  /** What its endpoints serve. */
  readonly served: readonly Served[];
  /** Absent where the debt is paid. */
  readonly error?: Error;
  /** Since when the section owes something. */
  readonly since: Date;
}

/** What delivering needs of the run. */
export interface Delivering {
  readonly config: Config;
  readonly store: Store;
  /** The certificates as they are on disk now. */
  inventory(): readonly Entry[];
  now(): Date;
  /** Addresses of a name. */
  readonly resolve: (host: string) => Promise<readonly string[]>;
  readonly signal?: AbortSignal;
}

/** How long one look at an endpoint may take. */
export const LOOK_TIMEOUT_SECONDS = 10;
/** Commands that run side by side; most of them wait for a network. */
const MOST_COMMANDS = 32;
const HOUR_MS = 3_600_000;
const LONGEST_PAUSE_MS = 24 * HOUR_MS;

/** What a certificate is called in the ledger: the base name of its file. */
export function certFile(config: Config, entry: Pick<Entry, "stem" | "keyType">): string {
  return basename(filesOf(config, entry).cert);
}

/** Notes what the sections of a line owe for a new certificate. To be kept before the certificate takes its place. */
export function owe(state: State, line: Line, file: string, fingerprint: string, now: Date): void {
  for (const section of line.sections.filter(carries)) {
    const debt = state.owed[section.name] ??= { since: now.toISOString(), certificates: {}, attempts: 0 };
    debt.certificates[file] = fingerprint;
    debt.attempts = 0;
    delete debt.retryAt;
  }
}

function carries(section: Section): boolean {
  const { uploadCerts, uploadKeys, update, verify } = section;
  return uploadCerts.length + uploadKeys.length + update.length + verify.length > 0;
}

/** Names of the sections that owe something and are to be tried now. */
export function owing(state: State, now: Date): string[] {
  return Object.entries(state.owed)
    .filter(([, { retryAt }]) => retryAt === undefined || new Date(retryAt) <= now)
    .map(([name]) => name);
}

/**
 * Drops debts that the configuration has no use for any more: of sections that are gone, of certificates that are gone,
 * and of certificates that have moved to other sections. `lines` are those of the certificates, by the base names of
 * their files. Returns what was dropped, in words of the configuration.
 */
export function dropForgotten(state: State, config: Config, lines: ReadonlyMap<string, Line>): string[] {
  const sections = new Map(config.sections.map((section) => [section.name, section]));
  const dropped: string[] = [];
  for (const [name, debt] of Object.entries(state.owed)) {
    const section = sections.get(name);
    if (section === undefined) {
      delete state.owed[name];
      dropped.push(`section [${name}]`);
      continue;
    }
    for (const file of Object.keys(debt.certificates)) {
      if (lines.get(file)?.sections.includes(section)) continue;
      delete debt.certificates[file];
      dropped.push(`${file} in section [${name}]`);
    }
    if (Object.keys(debt.certificates).length === 0) delete state.owed[name];
  }
  return dropped;
}

/**
 * Has every debt name the certificate that stands there: a run that was cut off, or a disk that was full, has noted one
 * that never took its place, and whether the one before had been delivered is not known any more.
 */
export function owePresent(state: State, config: Config, inventory: readonly Entry[]): void {
  for (const entry of inventory) {
    if (entry.finding.kind !== "present") continue;
    const file = certFile(config, entry);
    for (const { certificates } of Object.values(state.owed)) {
      if (file in certificates) certificates[file] = entry.finding.certificate.fingerprint;
    }
  }
}

/** When a debt that could not be paid for the n-th time is tried again; undefined means by the next run. */
export function retryAfterAttempt(attempts: number, now: Date): Date | undefined {
  if (attempts < 2) return undefined;
  return new Date(now.getTime() + Math.min(HOUR_MS * 2 ** (attempts - 2), LONGEST_PAUSE_MS));
}

/** A section on its way: what it carries, and when each of its halves is over. */
interface Carrying {
  readonly section: Section;
  readonly debt: Debt;
  readonly entries: readonly Entry[];
  /** What was owed when the carrying began. */
  readonly owed: Readonly<Record<string, string>>;
  readonly values: Values;
  readonly ran: Ran[];
  readonly served: Served[];
  uploaded: Promise<void>;
  updated: Promise<void>;
}

/** Carries what is owed. */
export class Deliveries {
  readonly #slots = new Slots(MOST_COMMANDS);
  /** Section -> its last delivery, which the next one has to wait for. */
  readonly #last = new Map<string, Promise<unknown>>();

  constructor(private readonly delivering: Delivering) {}

  /**
   * Carries what the named sections owe: sections side by side, `[every]` behind the others; in each `uploadCerts`,
   * `uploadKeys`, then `update`. An `update` command line that several sections share runs once, when all of them
   * have uploaded.
   */
  async deliver(names: readonly string[]): Promise<Delivery[]> {
    if (names.length === 0) return [];
    const { config, store } = this.delivering;
    const known = new Map(this.delivering.inventory().map((entry) => [certFile(config, entry), entry]));
    const carried = config.sections.filter(({ name }) =>
      names.includes(name) && store.state.owed[name] !== undefined
    )
      .map((section) => this.#carrying(section, known))
      .filter(({ entries }) => entries.length > 0);
    const others = carried.filter(({ section }) => section.name !== "every");
    const every = carried.filter(({ section }) => section.name === "every");
    const shared = new SharedCommands(carried, (line) => this.#run(line));
    for (const each of [...others, ...every]) {
      const before = each.section.name === "every" ? others : [];
      each.uploaded = Promise.allSettled([
        this.#last.get(each.section.name),
        ...before.map(({ uploaded }) => uploaded),
      ])
        .then(() => this.#upload(each));
      each.updated = Promise.allSettled([each.uploaded, ...before.map(({ updated }) => updated)])
        .then(() => each.uploaded)
        .then(() => this.#update(each, shared));
    }
    const deliveries = carried.map((each) => this.#settle(each));
    carried.forEach(({ section }, index) => this.#last.set(section.name, deliveries[index]!));
    const settled = await Promise.allSettled(deliveries); // no command outlives this
    return settled.map((result) => {
      if (result.status === "rejected") throw result.reason;
      return result.value;
    });
  }

  #carrying(section: Section, known: ReadonlyMap<string, Entry>): Carrying {
    const { store } = this.delivering;
    const debt = store.state.owed[section.name]!;
    // not what stands there instead of a certificate that could not be put in its place
    const entries = Object.entries(debt.certificates).flatMap(([file, fingerprint]) => {
      const entry = known.get(file);
      const there = entry?.finding.kind === "present" &&
        entry.finding.certificate.fingerprint === fingerprint;
      return there ? [entry] : [];
    });
    const paths = entries.map((entry) => store.pathsOf(entry));
    const values = {
      CERTS: paths.flatMap(({ certs }) => certs),
      KEYS: paths.flatMap(({ keys }) => keys),
      DOMAINS_CN: [...new Set(entries.map(({ line }) => line.names[0]!))],
      DOMAINS_ALL: [...new Set(entries.flatMap(({ line }) => line.names))],
    };
    const none = Promise.resolve();
    const owed = { ...debt.certificates };
    return { section, debt, entries, owed, values, ran: [], served: [], uploaded: none, updated: none };
  }

  async #upload({ section, values, ran }: Carrying): Promise<void> {
    for (const template of [...section.uploadCerts, ...section.uploadKeys]) {
      for (const line of commandLines(template, values)) {
        ran.push({ template, outcome: await this.#run(line) });
      }
    }
  }

  async #update({ section, values, ran }: Carrying, shared: SharedCommands): Promise<void> {
    for (const template of section.update) {
      for (const line of commandLines(template, values)) {
        ran.push({ template, outcome: await shared.run(line) });
      }
    }
  }

  /** Waits until the section's endpoints serve what was carried, and throws VerificationError if they do not. */
  async #verify({ section, entries, served }: Carrying): Promise<void> {
    const { config, resolve, signal } = this.delivering;
    const targets = targetsOf(section, entries.map(({ line }) => line), this.delivering.inventory());
    if (targets.length === 0) return;
    const world = { resolve, timeoutSeconds: LOOK_TIMEOUT_SECONDS, signal };
    served.push(...await verifyUntil(targets, world, config.verifyWaitSeconds));
    const wrong = served.filter(({ state }) => state !== "current");
    if (wrong.length > 0) throw new VerificationError(wrong);
  }

  #run(line: CommandLine): Promise<Outcome> {
    const { config, signal } = this.delivering;
    return this.#slots.use(() => runCommand(line, { timeoutSeconds: config.commandTimeoutSeconds, signal }));
  }

  /** Waits for a section and enters in the ledger what came of it. */
  async #settle(carrying: Carrying): Promise<Delivery> {
    const { section, debt, entries, owed, ran, served, updated } = carrying;
    const { config, store } = this.delivering;
    const since = new Date(debt.since);
    let error: Error | undefined;
    try {
      await updated;
      await this.#verify(carrying);
      for (const file of entries.map((entry) => certFile(config, entry))) {
        // one that has been renewed in the meantime is owed anew
        if (debt.certificates[file] === owed[file]) delete debt.certificates[file];
      }
      if (Object.keys(debt.certificates).length === 0) delete store.state.owed[section.name];
    } catch (reason) {
      if (!(reason instanceof CommandError || reason instanceof VerificationError)) throw reason;
      error = reason;
      debt.attempts++;
      debt.lastError = reason.message;
      debt.retryAt = retryAfterAttempt(debt.attempts, this.delivering.now())?.toISOString();
    }
    await store.saveState();
    return { section: section.name, entries, commands: ran, served, error, since };
  }
}

/**
 * The endpoints of a section that have to do with `lines`, each with what it should serve: the newest certificates, of
 * all key types, of the section's line that has the endpoint's name. One that bears no line's name is expected to serve
 * the section's only line.
 */
export function targetsOf(section: Section, lines: readonly Line[], inventory: readonly Entry[]): Target[] {
  if (section.verify.length === 0) return [];
  const all = [...new Set(inventory.map(({ line }) => line))].filter(({ sections }) =>
    sections.includes(section)
  );
  const owners = new Map<string, Line>();
  // as with the links to a bundle: the line that has a name alone, else the first
  for (const line of all.toSorted((a, b) => Number(b.names.length === 1) - Number(a.names.length === 1))) {
    for (const name of line.names) if (!owners.has(name)) owners.set(name, line);
  }
  const ownerOf = (name: string) => owners.get(name) ?? owners.get(name.replace(/^[^.]+/, "*"));

  const targets = new Map<string, Target>();
  for (const endpoint of section.verify) {
    for (const place of lines.flatMap((line) => placesOf(endpoint, line))) {
      const line = ownerOf(place.sni ?? place.host) ?? (all.length === 1 ? all[0] : undefined);
      if (line === undefined || !lines.includes(line) || targets.has(place.text)) continue;
      targets.set(place.text, { endpoint: place, expected: expectedOf(line, inventory) });
    }
  }
  return [...targets.values()];
}

/** An endpoint with the names of a line for the words DOMAIN and DOMAINS_ALL; a wildcard is no place. */
function placesOf(endpoint: Endpoint, { names }: Line): Endpoint[] {
  const namesFor = (word: string) =>
    (word === "DOMAIN" ? names.slice(0, 1) : word === "DOMAINS_ALL" ? names : [word])
      .filter((name) => !name.startsWith("*."));
  return namesFor(endpoint.host).flatMap((host) => {
    // the same word on both sides means the same name
    const snis = endpoint.sni === undefined
      ? [undefined]
      : endpoint.sni === endpoint.host
      ? [host]
      : namesFor(endpoint.sni);
    return snis.map((sni) => {
      const text = endpoint.text.replace(endpoint.host, host).replace(
        /#.*/s,
        sni === undefined ? "" : `#${sni}`,
      );
      return { ...endpoint, text, host, sni };
    });
  });
}

function expectedOf(line: Line, inventory: readonly Entry[]): Expected[] {
  return inventory.flatMap((entry) =>
    entry.line === line && entry.finding.kind === "present"
      ? [{ keyType: entry.keyType, certificate: entry.finding.certificate }]
      : []
  );
}

/** Runs each command line once, however many sections have it, when all of these have uploaded. */
class SharedCommands {
  readonly #runs = new Map<string, Promise<Outcome>>();
  readonly #users = new Map<string, Carrying[]>();

  constructor(carried: readonly Carrying[], private readonly start: (line: CommandLine) => Promise<Outcome>) {
    for (const each of carried) {
      for (const command of each.section.update.flatMap((update) => this.#commands(update, each.values))) {
        this.#users.set(command, [...this.#users.get(command) ?? [], each]);
      }
    }
  }

  /** None where the command cannot be made: the section itself meets that error in its turn. */
  #commands(update: string, values: Values): string[] {
    try {
      return commandLines(update, values).map(({ command }) => command);
    } catch (error) {
      if (error instanceof CommandError) return [];
      throw error;
    }
  }

  run(line: CommandLine): Promise<Outcome> {
    let run = this.#runs.get(line.command);
    if (run === undefined) {
      const users = this.#users.get(line.command) ?? [];
      run = Promise.allSettled(users.map(({ uploaded }) => uploaded)).then(() => this.start(line));
      this.#runs.set(line.command, run);
    }
    return run;
  }
}

/** Lets a number of things happen at a time. */
class Slots {
  readonly #waiting: (() => void)[] = [];
  constructor(private free: number) {}

  async use<T>(task: () => Promise<T>): Promise<T> {
    if (this.free > 0) this.free--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
    try {
      return await task();
    } finally {
      const next = this.#waiting.shift();
      if (next) next();
      else this.free++;
    }
  }
}
