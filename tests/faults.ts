/**
 * What the fault tests share: the points at which a fault is injected, the subject, and what must hold after the fault and
 * after one undisturbed run.
 *
 * By default a spread of the points is tried, the same each time (`LEMATT_SEED` picks another); with `LEMATT_FAULTS=all`,
 * as in `deno task test:faults`, every point is tried and the counts are printed, with `LEMATT_FAULTS=0.1` a tenth of them.
 */

import assert from "node:assert/strict";
import { basename, join } from "node:path";
import { ConfigError } from "../lib/config.ts";
import { type Context, limit, within } from "../lib/context.ts";
import { errorText, isSystemError } from "../lib/text.ts";
import { preview } from "../lib/run.ts";
import { type Entry, LockedError, orphans, readInventory, readState, Store } from "../lib/store.ts";
import { isPrivateKey } from "../lib/x509.ts";
import { type Bed, ifThere, type Ran, testBed, until } from "./bed.ts";
import type { Switches } from "./ca.ts";
import { type Ended, run } from "./programs.ts";

const WANTED = Deno.env.get("LEMATT_FAULTS");
/** The fraction of the points to try; 0 means a few. */
export const SHARE = WANTED === "all" ? 1 : Number(WANTED ?? 0);
export const SEED = Number(Deno.env.get("LEMATT_SEED") ?? 2026);
/** Limit for one fault and the recovery from it. */
const LONGEST_MS = 60_000;
/** An attempt mostly waits: for commands, for the CA, for strace. */
const inTurn = limit(4);

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
 * Lets `attempt` inject a fault at each point, or at `some` of them, and fails with all points after which lematt did not
 * recover. An attempt that returns false has injected nothing (the run was over before its point); if all do, others are
 * tried, and the sweep fails if that helps nothing.
 */
export async function sweep<Point>(
  what: string,
  points: readonly Point[],
  some: number,
  attempt: (point: Point) => Promise<boolean | void>,
): Promise<void> {
  const random = randomFrom();
  const shuffled = points.map((point) => ({ point, at: random(2 ** 31) })).sort((a, b) => a.at - b.at);
  const share = Math.max(some, Math.ceil(points.length * SHARE));
  const failures: string[] = [];
  let injected = 0;
  for (let round = 1; round <= 3 && injected + failures.length === 0; round++) {
    const chosen = shuffled.splice(0, share);
    await Promise.all(chosen.map(({ point }) =>
      inTurn(async () => {
        try {
          if (await within(AbortSignal.timeout(LONGEST_MS), attempt(point)) !== false) injected++;
        } catch (error) {
          failures.push(`${JSON.stringify(point)}: ${Deno.inspect(error)}`);
        }
      })
    ));
  }
  const tried = points.length - shuffled.length;
  const counts = `${what}: ${injected} faults at ${tried} of ${points.length} points`;
  assert.equal(failures.length, 0, `${counts} (seed ${SEED}); not recovered from:\n${failures.join("\n\n")}`);
  assert(injected > 0, counts);
  if (SHARE > 0) console.log(`${counts}, recovered from all`);
}

export function pairs<A, B>(these: readonly A[], those: readonly B[]): (readonly [A, B])[] {
  return these.flatMap((a) => those.map((b) => [a, b] as const));
}

export function upTo(count: number): number[] {
  return Array.from({ length: count }, (_, index) => index + 1);
}

// ---- the subject -------------------------------------------------------------------------------------------------

/** Settings for the program itself, which cannot resolve the tests' names. */
export const PROGRAM = "keyTypes: ec\npreflight: no";

/**
 * A test bed for a line of two names and a line of one, whose certificates are delivered by copying them to `served`,
 * and whose challenges need a `prepare` command. Its process ids are in the file `prepared` of the bed's home.
 */
export class Subject implements AsyncDisposable {
  readonly served: string;
  #ordersBefore = 0;
  #keys: Readonly<Record<string, string>> = {};

  private constructor(readonly bed: Bed) {
    this.served = join(bed.home, "served");
    Deno.mkdirSync(this.served);
    this.configure();
  }

  static async create({ ca = {}, settings = "keyTypes: ec" }: { ca?: Switches; settings?: string } = {}) {
    return new Subject(await testBed({ domains: "example.com www\nsolo.example.org\n", settings, ca }));
  }

  configure({ prepare = "exec cat >/dev/null", upload = "cp -L CERTS HERE/served", more = "" } = {}): void {
    this.bed.act(`[default]
prepare: [${JSON.stringify(`echo $$ >> HERE/prepared; ${prepare}`)}]
uploadCerts: [${JSON.stringify(upload)}]
uploadKeys: ["cp -L KEYS HERE/served"]
update: ["echo >> HERE/updated"]
${more}`);
  }

  inventory(): Entry[] {
    return readInventory(this.bed.config());
  }

  /** Orders are counted from here on, and private keys must not change, except those that are revoked. */
  begin(): void {
    this.#ordersBefore = this.bed.ca.orders.length;
    const kept = this.inventory().filter(({ finding }) => finding.kind !== "revoked");
    this.#keys = Object.fromEntries(kept.map(({ files: { key } }) => [key, textOf(key)]));
  }

  /** A run in this process; errors that the program reports in one line are reported as it does. */
  async attempt(context: Partial<Context> = {}): Promise<Ended> {
    try {
      return await this.bed.run({ retry: true, ...context });
    } catch (error) {
      if (error instanceof ConfigError) return { code: 2, stdout: "", stderr: error.message };
      const { name } = error as Error;
      if (!isSystemError(error as Error) && !["AbortError", "StateError"].includes(name)) throw error;
      return { code: 1, stdout: "", stderr: errorText(error as Error) };
    }
  }

  /** Removes the states that were set aside because they could not be used. */
  dropUnusable(): void {
    const unusable = listing(this.bed.path("test")).filter((name) => name.startsWith("state.json.unusable-"));
    for (const name of unusable) Deno.removeSync(this.bed.path("test", name), { recursive: true });
  }

  prepared(): number[] {
    return textOf(join(this.bed.home, "prepared")).split("\n").slice(0, -1).map(Number);
  }

  /** What must hold right after a fault: no command runs on, no key can be read by others, and the output can be read. */
  async afterFault({ stdout = "", stderr = "" }: Partial<Ended> = {}): Promise<void> {
    presentable(stdout + stderr);
    await until("the prepare commands have ended", () => !this.prepared().some(isRunning));
    assert.deepEqual(await this.#secrets("-perm", "/077"), [], "open to others");
  }

  /** The directory of keys and the files with secrets that meet these conditions of find(1). */
  async #secrets(...conditions: string[]): Promise<string[]> {
    const { conf } = this.bed;
    const secret = `( -path ${conf}/test/key* -o -name account.key* -o -name state.json )`.split(" ");
    const found = await run("find", conf, "-xdev", ...secret, "!", "-type", "l", ...conditions);
    return found.split("\n").slice(0, -1);
  }

  /**
   * One undisturbed run, and all that must hold after it. The fault may have cost each line `orders` orders, and the keys at
   * or below the path `lost`.
   */
  async recover({ orders = 1, lost = "none" } = {}): Promise<Ran> {
    const { bed } = this;
    bed.ca.switches.fault = undefined;
    const ran = await bed.run({ retry: true });
    assert.equal(ran.code, 0, `the undisturbed run failed:\n${ran.stdout}${ran.stderr}`);
    await this.afterFault(ran);
    assert.equal((await this.#secrets()).length, 5, "key, its two files, account.key.test, state.json");
    await this.#checkFiles();
    for (const [path, key] of Object.entries(this.#keys)) {
      if (key !== "" && !path.startsWith(lost)) assert.equal(textOf(path), key, `another key: ${path}`);
    }
    const config = bed.config();
    const { state, unusable } = readState(config, bed.ca.now);
    const { failures, deliveries, orders: unfinished, published } = state;
    const left = [failures, deliveries, unfinished, published].flatMap(Object.entries);
    assert.deepEqual([unusable, left], [undefined, []]);
    const plan = preview(config, { parallel: 1, retry: false }, bed.context(), () => {});
    assert.deepEqual([plan.tasks, plan.waiting, plan.deliveries], [[], [], []]);
    const made = bed.ca.orders.slice(this.#ordersBefore).map(({ identifiers }) => identifiers);
    for (const [line, { length }] of Map.groupBy(made, (identifiers) => JSON.stringify(identifiers))) {
      assert(length <= config.keyTypes.length + orders, `${length} orders for ${line}`);
    }
    return ran;
  }

  /** Every certificate is there and delivered, and nothing else: no temporary, no challenge, no lock. */
  async #checkFiles(): Promise<void> {
    const { bed } = this;
    const config = bed.config();
    const inventory = readInventory(config);
    for (const { stem, keyType, finding, files } of inventory) {
      assert.equal(finding.kind, "present", `${stem} ${keyType}`);
      for (const path of [files.cert, files.key]) {
        assert.equal(textOf(join(this.served, basename(path))), textOf(path), `delivered: ${basename(path)}`);
      }
    }
    assert.deepEqual([orphans(config, inventory), bed.dropped()], [[], []]);
    const own = ["account.key.test", "actions.conf", "domains", "lematt.conf", "test"];
    assert.deepEqual(listing(bed.conf), own);
    const kept = listing(bed.path("test")).filter((name) => name !== "revoked-keys");
    assert.deepEqual(kept, [".lock", "cert", "csr", "key", "state.json"]);
    const names = ["key", "csr", "cert"].flatMap((directory) => listing(bed.path("test", directory)));
    assert.deepEqual(names.filter((name) => name.startsWith(".")), [], "temporaries");
    assert(isPrivateKey(bed.text("account.key.test")));
    assert.equal(bed.ca.accounts.length, 1);
    // a command that another bed of this process starts inherits the open lock until its exec()
    await until("the lock is free", async () => {
      using store = await Store.open(config, bed.ca.now).catch((error) => {
        if (!(error instanceof LockedError)) throw error;
        return undefined;
      });
      return store !== undefined;
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.bed[Symbol.asyncDispose]();
  }
}

/** Fails unless what was printed is lines of text, without a stack trace and without anything that a terminal acts on. */
export function presentable(text: string): void {
  // deno-lint-ignore no-control-regex
  assert.doesNotMatch(text, /[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/);
  assert.doesNotMatch(text, /\n\s+at .*:\d+:\d+|undefined|\[object /);
}

/** The text of a file; empty if it is not there. */
export function textOf(path: string): string {
  return ifThere(() => Deno.readTextFileSync(path), "");
}

/** The names in a directory; empty if it is not there. */
export function listing(path: string): string[] {
  return ifThere(() => [...Deno.readDirSync(path)].map(({ name }) => name).sort(), []);
}

/** Whether a process is running; a zombie is not. */
export function isRunning(pid: number): boolean {
  // Deno itself may not read /proc
  const { stdout } = new Deno.Command("ps", { args: ["-o", "stat=", "-p", `${pid}`] }).outputSync();
  return /^[^Z]/.test(new TextDecoder().decode(stdout));
}
