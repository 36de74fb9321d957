/**
 * Certificates from Pebble: how long they take when the CA is far away, and what they cost when it is near; beside lego
 * where that is installed.
 *
 * Both have an account from before. lego is started once for each certificate, as many at a time as lematt works on
 * lines.
 */

import { join } from "node:path";
import {
  type Cost,
  inTurns,
  measure,
  median,
  need,
  ratio,
  seconds,
  tell,
  times,
  which,
} from "./bench-measure.ts";
import { LEMATT } from "./programs.ts";
import { startRelay } from "./bench-relay.ts";
import { startWebroot } from "./ca.ts";
import { startPebble } from "./pebble.ts";

const AT_ONCE = 10;
const ROUND_TRIP_MS = 150;

/**
 * The exchanges of which none can begin before the one before it has ended, for one line and two key types at a CA that
 * has each order polled once: what no client can be faster than.
 */
const IN_SEQUENCE = [
  "directory",
  "newNonce",
  "newOrder",
  "authorization",
  "challenge",
  "order",
  // the second key type: only now is its order born ready
  "newOrder",
  "finalize",
  "order",
  "certificate",
];
/** With so many names, those of each name come in as many rounds as there are requests at once (20). */
const inSequence = (names: number) => IN_SEQUENCE.length + 2 * (Math.ceil(names / 20) - 1);

/** Ten lines of a name, and a line of a hundred; both key types, 150 ms of round trip added. */
export async function latency(): Promise<void> {
  await using bed = await issuingBed();
  await using relay = await startRelay(bed.port, ROUND_TRIP_MS / 2);
  const server = `https://127.0.0.1:${relay.port}/dir`;
  // TCP and TLS take two round trips, or three where the CA wants a key exchange of which Deno sent no share at first
  const connecting = await bed.roundTrips(server, ROUND_TRIP_MS) - 1;
  for (
    const { what, lines, names, turns, floorRatio, legoRatio } of [
      { what: "10 names", lines: 10, names: 1, turns: 5, floorRatio: 1.35, legoRatio: 0.62 },
      // lego takes minutes for that, and is not waited for more than once
      { what: "one line of 100 names", lines: 1, names: 100, turns: 1, floorRatio: 1.5, legoRatio: 0.62 },
    ]
  ) {
    const exchanges = inSequence(names);
    const floor = (connecting + exchanges) * ROUND_TRIP_MS / 1000;
    tell(`${what}: floor`, seconds(floor), `${connecting} round trips to connect, ${exchanges} exchanges`);
    const connections = async (work: () => Promise<Cost>) => {
      const before = relay.connections;
      const { wallSeconds } = await work();
      return { wallSeconds, connections: relay.connections - before };
    };
    const rivals = bed.clients.map((client) => () => connections(() => client.issue(lines, server, names)));
    const found = await inTurns(turns, ...rivals);
    const [ours, theirs] = found.map((costs) => costs.map(({ wallSeconds }) => wallSeconds));
    const [own, legos] = found.map((costs) => costs.at(-1)!.connections);
    const floors = median(ours!) / floor;
    tell("lematt", seconds(median(ours!)), `${times(floors)} the floor`, {
      found: floors,
      atMost: floorRatio,
    });
    tell("its connections", `${own}`);
    if (theirs === undefined) {
      tell("lego", "not installed");
      continue;
    }
    const than = ratio(ours!, theirs);
    const target = { found: than, atMost: legoRatio };
    tell("lego", seconds(median(theirs)), `lematt takes ${times(than)} that`, target);
    tell("its connections", `${legos}`);
  }
}

/** 20 names, both key types, the CA at hand. */
export async function throughput(): Promise<void> {
  await using bed = await issuingBed();
  const server = `https://127.0.0.1:${bed.port}/dir`;
  const names = 20, certificates = 2 * names;
  const turns = await inTurns(3, ...bed.clients.map((client) => () => client.issue(names, server)));
  const [ours, theirs] = turns.map((costs) => costs.map(({ wallSeconds }) => wallSeconds));
  tell(
    "lematt",
    seconds(median(ours!)),
    `${(certificates / median(ours!)).toFixed(1)} certificates a second`,
  );
  if (theirs === undefined) tell("lego", "not installed");
  else {
    const found = ratio(ours!, theirs);
    tell("lego", seconds(median(theirs)), `lematt takes ${times(found)} that`, { found, atMost: 1 });
  }

  // To make an RSA key takes now half, now twice the time, so the rest is measured where the keys are there.
  const cpuOf = (costs: readonly Cost[]) => median(costs.map(({ cpuSeconds }) => cpuSeconds)) / certificates;
  const [again] = await inTurns(3, () => bed.reissue());
  const found = cpuOf(again!) * 1000;
  tell("processor time a certificate", `${found.toFixed(1)} ms`, "its key aside, start-up included", {
    found,
    atMost: 30,
  });
  tell("", seconds(cpuOf(turns[0]!)), "with the keys, half of them RSA");
}

/** Issues two certificates of each of so many new lines of so many names at a server, and tells what that cost. */
interface Client {
  issue(lines: number, server: string, names?: number): Promise<Cost>;
}

/** A Pebble without moods, a web server, lematt, and lego where it is installed. */
async function issuingBed() {
  need("pebble");
  await using stack = new AsyncDisposableStack();
  const home = await Deno.makeTempDir({ prefix: "lematt-bench-issue-" });
  stack.defer(() => Deno.remove(home, { recursive: true }));
  const drop = join(home, "webroot/.well-known/acme-challenge");
  await Deno.mkdir(drop, { recursive: true });
  const web = stack.use(startWebroot(drop));
  const env = { PEBBLE_WFE_NONCEREJECT: "0", PEBBLE_AUTHZREUSE: "100" };
  const pebble = stack.use(await startPebble({ httpPort: web.port, env }));
  let round = 0;
  const newLines = (lines: number, names: number) =>
    Array.from({ length: lines }, () => {
      round++;
      const line = Array.from({ length: names }, (_, i) => `n${i}.round${round}.example.com`);
      for (const name of line) pebble.dns.set(name, "A", "127.0.0.1");
      return line;
    });

  const lematt = new Lematt(home, drop, pebble.caBundleFile, newLines);
  const open = stack.move();
  return {
    port: Number(new URL(pebble.directoryUrl).port),
    clients: which("lego") === undefined
      ? [lematt]
      : [lematt, new Lego(home, pebble.caBundleFile, newLines)] as Client[],
    reissue: () => lematt.reissue(),
    /** How many round trips of so many milliseconds go by until a new connection has brought the directory. */
    async roundTrips(server: string, roundTripMs: number): Promise<number> {
      using client = Deno.createHttpClient({ caCerts: [await Deno.readTextFile(pebble.caBundleFile)] });
      const begun = performance.now();
      await (await fetch(server, { client })).text();
      return Math.floor((performance.now() - begun) / roundTripMs);
    },
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

type NewLines = (lines: number, names: number) => readonly (readonly string[])[];

class Lematt implements Client {
  /** Server -> a configuration directory with an account there. */
  readonly #accounts = new Map<string, string>();
  #last = "";

  constructor(
    private readonly home: string,
    private readonly drop: string,
    private readonly caBundle: string,
    private readonly newLines: NewLines,
  ) {}

  async issue(lines: number, server: string, names = 1): Promise<Cost> {
    if (!this.#accounts.has(server)) {
      const first = await this.#configure(1, 1, server);
      await this.#run(first);
      this.#accounts.set(server, first);
    }
    this.#last = await this.#configure(lines, names, server, this.#accounts.get(server));
    return await this.#run(this.#last);
  }

  /** The last job once more by a new account, which has to prove every name, but with the keys that there are. */
  async reissue(): Promise<Cost> {
    for (const what of ["test/cert", "test/state.json", "account.key.test"]) {
      await Deno.remove(join(this.#last, what), { recursive: true });
    }
    return await this.#run(this.#last);
  }

  #run(conf: string): Promise<Cost> {
    return measure([...LEMATT, "--test", "--parallel", `${AT_ONCE}`, conf]);
  }

  /** A configuration directory, with the account of another one. */
  async #configure(lines: number, names: number, server: string, account?: string): Promise<string> {
    const conf = await Deno.makeTempDir({ dir: this.home, prefix: "lematt-" });
    const write = (name: string, lines: readonly string[]) =>
      Deno.writeTextFile(join(conf, name), `${lines.join("\n")}\n`);
    await write("domains", this.newLines(lines, names).map((line) => line.join(" ")));
    await write("actions.conf", []);
    await write("lematt.conf", [
      "[config]",
      "accountKey: account.key",
      `challengeDropDir: ${this.drop}`,
      `caBundle: ${this.caBundle}`,
      `testDirectory: ${server}`,
    ]);
    await Deno.mkdir(join(conf, "test"));
    for (const file of account === undefined ? [] : ["account.key.test", "test/state.json"]) {
      await Deno.copyFile(join(account!, file), join(conf, file));
    }
    return conf;
  }
}

class Lego implements Client {
  /** Server -> a directory with an account there. */
  readonly #accounts = new Map<string, string>();

  constructor(
    private readonly home: string,
    private readonly caBundle: string,
    private readonly newLines: NewLines,
  ) {}

  /** The certificates of a name one after the other, each key type in a directory of its own, as lego needs it. */
  async issue(lines: number, server: string, names = 1): Promise<Cost> {
    if (!this.#accounts.has(server)) {
      const first = await Deno.makeTempDir({ dir: this.home, prefix: "lego-" });
      await this.#run(server, first, this.newLines(1, 1)[0]!, "ec256");
      this.#accounts.set(server, first);
    }
    const directories: [string, string][] = [];
    for (const keyType of ["rsa2048", "ec256"]) {
      const directory = await Deno.makeTempDir({ dir: this.home, prefix: "lego-" });
      const accounts = join(this.#accounts.get(server)!, "accounts");
      await new Deno.Command("cp", { args: ["-a", accounts, directory] }).output();
      directories.push([keyType, directory]);
    }
    const queue = this.newLines(lines, names).values();
    const costs: Cost[] = [];
    const begun = performance.now();
    await Promise.all(Array.from({ length: AT_ONCE }, async () => {
      for (const line of queue) {
        for (const [keyType, directory] of directories) {
          costs.push(await this.#run(server, directory, line, keyType));
        }
      }
    }));
    return {
      wallSeconds: (performance.now() - begun) / 1000,
      cpuSeconds: costs.reduce((sum, { cpuSeconds }) => sum + cpuSeconds, 0),
      peakMegabytes: Math.max(...costs.map(({ peakMegabytes }) => peakMegabytes)),
    };
  }

  #run(server: string, path: string, names: readonly string[], keyType: string): Promise<Cost> {
    const options = { server, path, email: "bench@example.com", "key-type": keyType };
    return measure([
      which("lego")!,
      ...Object.entries(options).map(([option, value]) => `--${option}=${value}`),
      ...names.map((name) => `--domains=${name}`),
      "--accept-tos",
      "--http",
      `--http.webroot=${join(this.home, "webroot")}`,
      "run",
    ], { LEGO_CA_CERTIFICATES: this.caBundle });
  }
}
