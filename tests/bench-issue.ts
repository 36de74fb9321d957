/**
 * Certificates from Pebble: the time with a distant CA, and the cost with a CA on this host; compared with lego if it is
 * installed.
 *
 * Both have an account already. lego is started once for each certificate, as many processes at once as lematt handles lines.
 */

import { join } from "node:path";
import {
  type Cost,
  inTurns,
  measure,
  median,
  need,
  printFigure,
  ratio,
  seconds,
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
 * The exchanges that each need the result of the one before, for one line and two key types with one poll per order: the
 * minimum for any client.
 */
const IN_SEQUENCE = [
  "directory",
  "newNonce",
  "newOrder",
  "authorization",
  "challenge",
  "order",
  // the second key type: its order is ready at once only after the validation for the first
  "newOrder",
  "finalize",
  "order",
  "certificate",
];

/** Ten lines of one name, and one line of 100 names; both key types, with a round trip of 150 ms. */
export async function latency(): Promise<void> {
  await using bed = await issuingBed();
  await using relay = await startRelay(bed.port, ROUND_TRIP_MS / 2);
  const server = `https://127.0.0.1:${relay.port}/dir`;
  // TCP and TLS take two round trips, or three if the CA asks for another key share
  const connecting = await bed.roundTrips(server, ROUND_TRIP_MS) - 1;
  for (
    const { what, lines, names, turns, floorRatio, legoRatio } of [
      { what: "10 names", lines: 10, names: 1, turns: 5, floorRatio: 1.35, legoRatio: 0.62 },
      // only one turn, since lego takes minutes
      { what: "one line of 100 names", lines: 1, names: 100, turns: 1, floorRatio: 1.5, legoRatio: 0.62 },
    ]
  ) {
    // with more than 20 names, the two requests of each name take several rounds of 20 at once
    const exchanges = IN_SEQUENCE.length + 2 * (Math.ceil(names / 20) - 1);
    const floor = (connecting + exchanges) * ROUND_TRIP_MS / 1000;
    printFigure(
      `${what}: floor`,
      seconds(floor),
      `${connecting} round trips to connect, ${exchanges} exchanges`,
    );
    const connections = async (work: () => Promise<Cost>) => {
      const before = relay.connections;
      const { wallSeconds } = await work();
      return { wallSeconds, connections: relay.connections - before };
    };
    const clients = bed.clients.map((client) => () => connections(() => client.issue(lines, server, names)));
    const costs = await inTurns(turns, ...clients);
    const [ours, theirs] = costs.map((turn) => turn.map(({ wallSeconds }) => wallSeconds));
    const [ourConnections, legoConnections] = costs.map((turn) => turn.at(-1)!.connections);
    const floors = median(ours!) / floor;
    printFigure("lematt", seconds(median(ours!)), `${times(floors)} the floor`, {
      found: floors,
      atMost: floorRatio,
    });
    printFigure("lematt: connections", `${ourConnections}`);
    if (theirs === undefined) {
      printFigure("lego", "not installed");
      continue;
    }
    const found = ratio(ours!, theirs);
    const target = { found, atMost: legoRatio };
    printFigure("lego", seconds(median(theirs)), `lematt takes ${times(found)} that`, target);
    printFigure("lego: connections", `${legoConnections}`);
  }
}

/** 20 names, both key types, the CA on this host. */
export async function throughput(): Promise<void> {
  await using bed = await issuingBed();
  const server = `https://127.0.0.1:${bed.port}/dir`;
  const names = 20, certificates = 2 * names;
  const turns = await inTurns(3, ...bed.clients.map((client) => () => client.issue(names, server)));
  const [ours, theirs] = turns.map((costs) => costs.map(({ wallSeconds }) => wallSeconds));
  printFigure(
    "lematt",
    seconds(median(ours!)),
    `${(certificates / median(ours!)).toFixed(1)} certificates per second`,
  );
  if (theirs === undefined) printFigure("lego", "not installed");
  else {
    const found = ratio(ours!, theirs);
    printFigure("lego", seconds(median(theirs)), `lematt takes ${times(found)} that`, { found, atMost: 1 });
  }

  // the time to make an RSA key varies by a factor of four, so this is measured with existing keys
  const cpuOf = (costs: readonly Cost[]) => median(costs.map(({ cpuSeconds }) => cpuSeconds)) / certificates;
  const [again] = await inTurns(3, () => bed.reissue());
  const found = cpuOf(again!) * 1000;
  printFigure("processor time per certificate", `${found.toFixed(1)} ms`, "without its key, with start-up", {
    found,
    atMost: 30,
  });
  printFigure("", seconds(cpuOf(turns[0]!)), "with its key, half of them RSA");
}

interface Client {
  /** Issues two certificates for each of `lines` new lines with `names` names at a server; returns the cost. */
  issue(lines: number, server: string, names?: number): Promise<Cost>;
}

/** Pebble without random errors, a web server, lematt, and lego if it is installed. */
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
    /** The number of round trips until a new connection has returned the directory. */
    async roundTrips(server: string, roundTripMs: number): Promise<number> {
      using client = Deno.createHttpClient({ caCerts: [await Deno.readTextFile(pebble.caBundleFile)] });
      const started = performance.now();
      await (await fetch(server, { client })).text();
      return Math.floor((performance.now() - started) / roundTripMs);
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

  /** Issues the last certificates again with a new account, which has to validate every name, and with the existing keys. */
  async reissue(): Promise<Cost> {
    for (const what of ["test/cert", "test/state.json", "account.key.test"]) {
      await Deno.remove(join(this.#last, what), { recursive: true });
    }
    return await this.#run(this.#last);
  }

  #run(conf: string): Promise<Cost> {
    return measure([...LEMATT, "--test", "--parallel", `${AT_ONCE}`, conf]);
  }

  /** Makes a configuration directory, with the account of another one if there is one. */
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

  /** One certificate of a line after the other; lego needs its own directory for each key type. */
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
    const started = performance.now();
    await Promise.all(Array.from({ length: AT_ONCE }, async () => {
      for (const line of queue) {
        for (const [keyType, directory] of directories) {
          costs.push(await this.#run(server, directory, line, keyType));
        }
      }
    }));
    return {
      wallSeconds: (performance.now() - started) / 1000,
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
