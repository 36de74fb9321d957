/**
 * What the fault tests share: the subject that faults befall, the points at which they do, and what must hold after a
 * fault and one undisturbed run.
 *
 * By default a spread of the points is tried, the same each time (`LEMATT_SEED` picks another); `LEMATT_FAULTS=all`,
 * as in `deno task test:faults`, tries every point and prints how many there were.
 */

import assert from "node:assert/strict";
import { basename, join } from "node:path";
import process from "node:process";
import { type Config, ConfigError } from "../lib/config.ts";
import { errorText, isSystemError } from "../lib/report.ts";
import { preview } from "../lib/run.ts";
import { type Entry, LockedError, orphans, readInventory, readState, Store } from "../lib/store.ts";
import { isPrivateKey } from "../lib/x509.ts";
import { type Bed, type Ended, type Ran, testBed, type TestWorld, until } from "./bed.ts";
import type { Switches } from "./ca.ts";

/** Whether every point is to be tried. */
export const ALL = Deno.env.get("LEMATT_FAULTS") === "all";
export const SEED = Number(Deno.env.get("LEMATT_SEED") ?? 2026);
/** How long one fault, with all that follows from it, may take; waits of the client are cut short in a test bed. */
const LONGEST_SECONDS = 60;

// ---- points ------------------------------------------------------------------------------------------------------

/** Random whole numbers below a bound, the same for the same seed (mulberry32). */
export function randomFrom(seed = SEED): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

/**
 * Lets `attempt` have a fault befall the program at each point, or at `some` of them, and fails with all the points at
 * which that was not survived. An attempt that returns false found no occasion (the run was over before), and does not
 * count. Several are made `atOnce` where most of one is waiting.
 */
export async function sweep<Point>(
  what: string,
  points: readonly Point[],
  some: number,
  attempt: (point: Point) => Promise<boolean | void>,
  atOnce = 1,
): Promise<void> {
  const random = randomFrom();
  const shuffled = points.map((point) => ({ point, at: random(2 ** 31) })).sort((a, b) => a.at - b.at);
  const chosen = ALL ? points : shuffled.slice(0, some).map(({ point }) => point);
  const failures: string[] = [];
  let befell = 0;
  const queue = chosen.values();
  const work = async () => {
    for (const point of queue) {
      const late = Promise.withResolvers<never>();
      const error = new Error(`not over after ${LONGEST_SECONDS} s`);
      const timer = setTimeout(() => late.reject(error), LONGEST_SECONDS * 1000);
      try {
        if (await Promise.race([attempt(point), late.promise]) !== false) befell++;
      } catch (error) {
        failures.push(`${JSON.stringify(point)}: ${Deno.inspect(error)}`);
        if (ALL) console.error(failures.at(-1));
      } finally {
        clearTimeout(timer);
      }
    }
  };
  await Promise.all(Array.from({ length: atOnce }, work));
  const counts = `${what}: ${befell} faults, at ${chosen.length} of ${points.length} points`;
  assert.equal(failures.length, 0, `${counts} (seed ${SEED}); not survived:\n${failures.join("\n\n")}`);
  if (!ALL) return;
  assert(befell > 0, counts);
  console.log(`${counts}, all survived`);
}

/** Every pair of one of these and one of those. */
export function pairs<A, B>(these: readonly A[], those: readonly B[]): (readonly [A, B])[] {
  return these.flatMap((a) => those.map((b) => [a, b] as const));
}

/** 1, 2, … count */
export function upTo(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index + 1);
}

// ---- the subject -------------------------------------------------------------------------------------------------

/** For the program itself, which finds no name of a test on the network. */
export const PROGRAM = "keyTypes: ec\npreflight: no";

/**
 * A test bed for a line of two names and a line of one, whose certificates are delivered by copying them to `served`,
 * and whose challenges need a `prepare` command. Its process numbers stand in the file `prepared` of the bed's home.
 */
export class Subject implements AsyncDisposable {
  readonly served: string;
  #ordersBefore = 0;

  private constructor(readonly bed: Bed) {
    this.served = join(bed.home, "served");
  }

  static async create({ ca = {}, settings = "keyTypes: ec" }: { ca?: Switches; settings?: string } = {}) {
    const domains = "example.com www\nsolo.example.org\n";
    const subject = new Subject(await testBed({ domains, settings, ca: { fault: () => undefined, ...ca } }));
    Deno.mkdirSync(subject.served);
    subject.configure();
    return subject;
  }

  /** Writes actions.conf, with other commands than the usual ones if there are any. */
  configure({ prepare = "exec cat >/dev/null", upload = "cp -L CERTS HERE/served", more = "" } = {}): void {
    this.bed.act(`[default]
prepare: [${JSON.stringify(`echo $$ >> HERE/prepared; ${prepare}`)}]
uploadCerts: [${JSON.stringify(upload)}]
uploadKeys: ["cp -L KEYS HERE/served"]
update: ["echo >> HERE/updated"]
${more}`);
  }

  inventory(config = this.bed.config()): Entry[] {
    return readInventory(config);
  }

  /** From here on are orders counted. */
  countOrders(): void {
    this.#ordersBefore = this.bed.ca.orders.length;
  }

  /** Has everything delivered once more. */
  async forgetReceipts(): Promise<void> {
    using store = await Store.open(this.bed.config(), this.bed.ca.now);
    for (const section of Object.keys(store.state.receipts)) delete store.state.receipts[section];
    await store.saveState();
  }

  /** A run in this process; errors that the program tells in a line are told as it does. */
  async attempt(world: Partial<TestWorld> = {}): Promise<Ended> {
    try {
      return await this.bed.run({ retry: true, ...world });
    } catch (error) {
      if (error instanceof ConfigError) return { code: 2, stdout: "", stderr: `${error.message}\n` };
      const { name } = error as Error;
      if (!isSystemError(error as Error) && !["AbortError", "StateError"].includes(name)) throw error;
      return { code: 1, stdout: "", stderr: `${errorText(error as Error)}\n` };
    }
  }

  /** Removes the states that have been set aside because they could not be used. */
  dropUnusable(): void {
    const path = this.bed.path("test");
    for (const name of listing(path)) {
      if (name.startsWith("state.json.unusable-")) Deno.removeSync(join(path, name), { recursive: true });
    }
  }

  /** Process numbers of the `prepare` commands so far. */
  prepared(): number[] {
    return textOf(join(this.bed.home, "prepared")).split("\n").filter((line) => line !== "").map(Number);
  }

  /** What must hold right after a fault: nothing runs on, no key can be read by others, and what was said can be read. */
  async afterFault({ stdout = "", stderr = "" }: Partial<Ended> = {}): Promise<void> {
    presentable(stdout + stderr);
    await until("the prepare commands have ended", () => !this.prepared().some(isRunning));
    this.#checkModes();
  }

  /** One undisturbed run, and all that must hold after it. The fault may have cost each line `orders` orders. */
  async recover({ orders = 1 } = {}): Promise<Ran> {
    const { bed } = this;
    bed.ca.switches.fault = () => undefined;
    const ran = await bed.run({ retry: true });
    assert.equal(ran.code, 0, `the undisturbed run failed:\n${ran.stdout}${ran.stderr}`);
    await this.afterFault(ran);
    await this.#checkFiles();
    this.#checkState();
    this.#checkOrders(orders);
    return ran;
  }

  #checkModes(): void {
    const { conf } = this.bed;
    const secret = [
      `( -path ${conf}/test/key -o -path ${conf}/test/key/* -o -name account.key* -o -name state.json )`,
    ];
    const args = [conf, "-xdev", ...secret.join(" ").split(" "), "!", "-type", "l", "-perm", "/077"];
    assert.equal(
      new TextDecoder().decode(new Deno.Command("find", { args }).outputSync().stdout),
      "",
      "for others",
    );
  }

  /** Every certificate is there and served, and nothing else: no temporary, no challenge, no lock that is held. */
  async #checkFiles(): Promise<void> {
    const { bed } = this;
    const config = bed.config();
    const inventory = this.inventory(config);
    for (const { stem, keyType, finding, files } of inventory) {
      assert.equal(finding.kind, "present", `${stem} ${keyType}`);
      for (const path of [files.cert, files.key]) {
        assert.equal(textOf(join(this.served, basename(path))), textOf(path), `delivered: ${basename(path)}`);
      }
    }
    assert.deepEqual(orphans(config, inventory), []);
    assert.deepEqual(bed.dropped(), [], "challenge files");
    assert.deepEqual(listing(bed.conf), [
      "account.key.test",
      "actions.conf",
      "domains",
      "lematt.conf",
      "test",
    ]);
    assert.deepEqual(listing(bed.path("test")).filter((name) => name !== "revoked-keys"), [
      ...[".lock", "cert", "csr", "key", "state.json"],
    ]);
    for (const directory of ["key", "csr", "cert"]) {
      assert.deepEqual(listing(bed.path("test", directory)).filter((name) => name.startsWith(".")), []);
    }
    assert(isPrivateKey(bed.text("account.key.test")));
    assert.equal(bed.ca.accounts.length, 1);
    // what another bed of this process is just starting has the lock's file open, too, until it is that command
    for (let free = false; !free;) free = await isFree(config, bed.ca.now);
  }

  /** Nothing is due or pending, and nothing failed. */
  #checkState(): void {
    const { bed } = this;
    const { state, unusable } = readState(bed.config(), bed.ca.now);
    assert.equal(unusable, undefined);
    for (const kind of ["failures", "deliveries", "orders", "published"] as const) {
      assert.deepEqual(Object.values(state[kind]), [], kind);
    }
    const { tasks, waiting, deliveries } = preview(
      bed.config(),
      { parallel: 1, retry: false },
      bed.world(),
      () => {},
    );
    assert.deepEqual([tasks, waiting, deliveries], [[], [], []]);
  }

  /** One order for each key type of a line, and those that a fault has cost. */
  #checkOrders(lost: number): void {
    const { keyTypes } = this.bed.config();
    const counts = new Map<string, number>();
    for (const { identifiers } of this.bed.ca.orders.slice(this.#ordersBefore)) {
      const names = identifiers.map(({ value }) => value).join(" ");
      counts.set(names, (counts.get(names) ?? 0) + 1);
    }
    for (const [names, count] of counts) {
      assert(count <= keyTypes.length + lost, `${count} orders for ${names}`);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.bed[Symbol.asyncDispose]();
  }
}

/** What lematt says is text in lines, without a stack trace and without anything that a terminal would act on. */
export function presentable(text: string): void {
  // deno-lint-ignore no-control-regex
  assert.doesNotMatch(text, /[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/);
  assert.doesNotMatch(text, /\n\s+at .*:\d+:\d+|undefined|\[object /);
}

/** The text of a file; empty where there is none. */
export function textOf(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch {
    return "";
  }
}

/** The names in a directory; none where there is no directory. */
export function listing(path: string): string[] {
  try {
    return [...Deno.readDirSync(path)].map(({ name }) => name).sort();
  } catch {
    return [];
  }
}

async function isFree(config: Config, now: Date): Promise<boolean> {
  try {
    (await Store.open(config, now))[Symbol.dispose]();
    return true;
  } catch (error) {
    if (error instanceof LockedError) return false;
    throw error;
  }
}

/** Whether a process runs; one that has ended and only waits for its parent to take notice does not. */
export function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
  } catch {
    return false;
  }
  return !/\) Z /.test(textOf(`/proc/${pid}/stat`));
}
