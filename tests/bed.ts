/**
 * A test bed: lematt over a temporary directory, with a CA and a web server of its own on loopback.
 *
 *     await using bed = await testBed({ domains: "example.com www", settings: "keyTypes: ec" });
 *     const { code, stderr } = await bed.run();
 *
 * `bed.run()` is a run in this process, whose context the test can change; `bed.lematt("--test")` is the program itself.
 * Configuration, requests, commands and certificates are real; only waiting is not: in this process client and CA share a
 * clock, which jumps ahead whenever the client waits. Disposing of a bed fails if the CA has recorded a violation.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { type Config, loadConfig, type Mode } from "../lib/config.ts";
import { codeOf } from "../lib/files.ts";
import { type Event, Report } from "../lib/report.ts";
import { type Context, limit } from "../lib/context.ts";
import { run, select } from "../lib/run.ts";
import type { State } from "../lib/state.ts";
import { readInventory, Store } from "../lib/store.ts";
import { generateKey, readCertificate } from "../lib/x509.ts";
import { type Ca, type Exchange, type Fault, type Resource, startCa, startWebroot } from "./ca.ts";
import type { Switches, Webroot } from "./ca.ts";
import { end, type Ended, LEMATT, output, spawn } from "./programs.ts";

export { settled as all } from "../lib/context.ts";

const DAY = 86_400_000;
/** The client waits only this fraction of the time it wants to wait. */
const WAIT_SCALE = 1 / 100;

/** The files `domains` and `actions.conf`, and lines for `[config]`. */
export interface Texts {
  domains?: string;
  actions?: string;
  settings?: string;
}

export interface Ran extends Ended {
  readonly events: readonly Event[];
  readonly requests: readonly Exchange[];
}

/** Options of a run; where the program gets `--only NAME`, `named` is `{ only: [NAME] }`. */
interface Options {
  mode?: Mode;
  parallel?: number;
  retry?: boolean;
  cron?: boolean;
  json?: boolean;
  verbose?: boolean;
  named?: Parameters<typeof select>[1];
}

/** Writes the configuration and starts the servers; `ca` are switches of the CA. */
export async function testBed({ ca = {}, ...texts }: Texts & { ca?: Switches } = {}): Promise<Bed> {
  const home = await Deno.makeTempDir({ prefix: "lematt-bed-" });
  for (const name of ["conf", "drop"]) await Deno.mkdir(join(home, name));
  const web = startWebroot(join(home, "drop"));
  const bed = new Bed(home, web, await startCa({ httpPort: web.port, ...ca }));
  bed.configure({ domains: "", actions: "", settings: "", ...texts });
  return bed;
}

export class Bed implements AsyncDisposable {
  readonly conf: string;
  readonly drop: string;
  /** How long the client wanted to wait each time, in milliseconds. */
  readonly waits: number[] = [];
  readonly #http: Deno.HttpClient;
  readonly #children: Deno.ChildProcess[] = [];

  constructor(readonly home: string, readonly web: Webroot, readonly ca: Ca) {
    this.conf = join(home, "conf");
    this.drop = join(home, "drop");
    this.#http = Deno.createHttpClient({ caCerts: [ca.caBundle] });
  }

  /** Rewrites the files whose text is given; HERE in actions is replaced by `home`. */
  configure({ domains, actions, settings }: Texts): void {
    const write = (name: string, text: string) => Deno.writeTextFileSync(join(this.conf, name), text);
    if (domains !== undefined) write("domains", domains);
    if (actions !== undefined) write("actions.conf", actions.replaceAll("HERE", this.home));
    if (settings === undefined) return;
    const defaults = {
      testDirectory: this.ca.directoryUrl,
      directory: this.ca.directoryUrl,
      caBundle: this.ca.caBundleFile,
      accountKey: "account.key",
      challengeDropDir: this.drop,
    };
    const lines = Object.entries(defaults).map(([key, value]) => `${key}: ${value}`);
    write("lematt.conf", ["[DEFAULT]", ...lines, "[config]", settings, ""].join("\n"));
  }

  config(mode: Mode = "test"): Config {
    return loadConfig(mode, this.conf);
  }

  /** Puts certificates of all lines in place, as if issued `age` days ago for `life` days. */
  async plant({ mode = "test", age = 0, life = 90 }: { mode?: Mode; age?: number; life?: number } = {}) {
    const config = this.config(mode);
    const notBefore = new Date(this.ca.now.getTime() - age * DAY);
    using store = await Store.open(config, this.ca.now);
    for (const entry of readInventory(config)) {
      const { keyBitsRSA: bits, curve } = config;
      const keyPem = await generateKey(
        entry.keyType === "rsa" ? { type: "rsa", bits } : { type: "ec", curve },
      );
      const notAfter = new Date(notBefore.getTime() + life * DAY);
      const chainPem = await this.ca.forge(keyPem, entry.line.names, { notBefore, notAfter });
      const certificate = readCertificate(chainPem);
      await store.commit(entry, { keyPem, csrPem: "", chainPem, certificate });
    }
  }

  path(...names: string[]): string {
    return join(this.conf, ...names);
  }

  text(...names: string[]): string {
    return Deno.readTextFileSync(this.path(...names));
  }

  state(mode: Mode = "test"): State {
    return JSON.parse(this.text(mode, "state.json"));
  }

  act(actions: string): void {
    this.configure({ actions });
  }

  /** Returns the lines that commands wrote to `<home>/<name>`, and removes the file. */
  take(name = "log"): string[] {
    const path = join(this.home, name);
    const text = ifThere(() => Deno.readTextFileSync(path), "");
    if (text !== "") Deno.removeSync(path);
    return text.split("\n").slice(0, -1);
  }

  /** The violations so far, such as "malformed newOrder", which fail the test no more. */
  takeViolations(): string[] {
    return this.ca.violations.splice(0).map(({ type, resource }) => `${type} ${resource}`);
  }

  dropped(): string[] {
    return [...Deno.readDirSync(this.drop)].map(({ name }) => name);
  }

  /** The context of runs in this process. Every name resolves to 127.0.0.1, with port 80 at `web`. */
  context(changes: Partial<Context> = {}): Context {
    const { ca, web, waits } = this;
    return {
      fetch: (url, init) => fetch(url, { ...init, client: this.#http }),
      now: () => ca.now,
      async sleep(ms) {
        const signal = changes.signal;
        waits.push(ms);
        await delay(ms * WAIT_SCALE, undefined, { signal }).catch(() => signal!.throwIfAborted());
        ca.advance(ms);
      },
      warn: () => {},
      random: Math.random,
      route: (_, port) => Promise.resolve([{ address: "127.0.0.1", port: port === 80 ? web.port : port }]),
      query: () => Promise.reject(new Error("no name server in this bed")),
      userAgent: "lematt/test",
      signal: new AbortController().signal,
      ...changes,
    };
  }

  /** A run in this process, with output as to a pipe. */
  async run(options: Options & Partial<Context> = {}): Promise<Ran> {
    const { mode = "test", parallel, retry = false, cron = false, json = false, ...rest } = options;
    const { verbose = false, named = {}, ...context } = rest;
    const { ca } = this;
    const [begun, events, out, err] = [ca.log.length, [] as Event[], [] as string[], [] as string[]];
    const report = new Report({
      ...{ mode, cron, json, color: false },
      now: () => ca.now,
      out: (text) => out.push(text),
      err: (text) => err.push(text),
    });
    const config = this.config(mode);
    const emit = (event: Event) => {
      events.push(event);
      report.emit(event);
    };
    const summary = await run(
      config,
      { parallel: parallel ?? config.parallel, retry, selection: select(config, named) },
      this.context({
        warn: (text) => emit({ kind: "notice", text }),
        ...context,
        ...(verbose && { onOutput: (text, whose) => emit({ kind: "output", text, whose }) }),
      }),
      emit,
    );
    const code = report.finish(summary);
    return { code, stdout: out.join(""), stderr: err.join(""), events, requests: ca.log.slice(begun) };
  }

  async lematt(...args: string[]): Promise<Ended> {
    return await this.lemattBy([], ...args);
  }

  /** Runs the program by a command that gets its command line as last arguments. */
  async lemattBy(by: readonly string[], ...args: string[]): Promise<Ended> {
    return await output([...by, ...LEMATT, ...args, "--config", this.conf], { cwd: this.home });
  }

  /** Starts the program, with its output piped. It is killed when the bed is disposed of. */
  start(...args: string[]): Deno.ChildProcess {
    const child = spawn([...LEMATT, ...args, "--config", this.conf], { cwd: this.home });
    this.#children.push(child);
    return child;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const child of this.#children) await end(child);
    this.#http.close();
    await Promise.all([this.ca, this.web].map((server) => server[Symbol.asyncDispose]()));
    await Deno.remove(this.home, { recursive: true });
    assert.deepEqual(this.ca.violations, []);
  }
}

/** What `read` returns; `empty` if the file or directory is not there. */
export function ifThere<T>(read: () => T, empty: T): T {
  try {
    return read();
  } catch (error) {
    if (!["ENOENT", "ENOTDIR", "ELOOP"].includes(codeOf(error)!)) throw error;
    return empty;
  }
}

export async function until(what: string, condition: () => boolean | Promise<boolean>, seconds = 30) {
  for (const deadline = Date.now() + seconds * 1000; !await condition();) {
    assert(Date.now() < deadline, `not within ${seconds} s: ${what}`);
    await delay(5);
  }
}

/**
 * A replacement for Deno.test() for tests that mostly wait, each with its own servers: they run in parallel, at most `most` at
 * once, as steps of one test of their file. One that is `lacking` something is skipped.
 */
export function together(name: string, most = 4) {
  const steps: Deno.TestStepDefinition[] = [];
  const inTurn = limit(most);
  const sanitizers = { sanitizeOps: false, sanitizeResources: false, sanitizeExit: false };
  Deno.test({
    name,
    ...sanitizers,
    sanitizeResources: true, // finds programs that any of the steps has left running
    async fn(t) {
      const passed = await Promise.all(steps.map((step) => t.step(step)));
      assert(passed.every((ok, index) => ok || steps[index]!.ignore));
    },
  });
  return (name: string, fn: () => Promise<void>, lacking?: string): void => {
    if (lacking !== undefined) console.log(`${name} is not tested: ${lacking}`);
    steps.push({ name, ignore: lacking !== undefined, fn: () => inTurn(fn), ...sanitizers });
  };
}

export function faultAt(resource: Resource, fault: Fault, times = 1): NonNullable<Switches["fault"]> {
  return (exchange) => exchange.resource === resource && times-- > 0 ? fault : undefined;
}

/** A refusal as a CA words it (RFC 7807), `type` without the URN of ACME. */
export function refusing(
  status: number,
  type: string,
  detail: string,
  { headers, ...rest }: { subproblems?: unknown; headers?: Record<string, string> } = {},
): Fault {
  const problem = { type: `urn:ietf:params:acme:error:${type}`, detail, status, ...rest };
  return { kind: "status", status, headers, body: JSON.stringify(problem) };
}
