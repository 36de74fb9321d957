/**
 * Certificates from Pebble: how long they take when the CA is far away (issue 7, item 2), and what they cost when it is
 * near (item 3), beside lego where that is installed.
 *
 * lematt is always on its first run: it makes its account key and registers. lego gets its account beforehand, and is
 * started once for each certificate, as many at a time as lematt works on lines.
 */

import { join } from "node:path";
import {
  type Cost,
  inTurns,
  LEMATT,
  measure,
  median,
  need,
  ratio,
  seconds,
  tell,
  times,
  which,
} from "./bench-measure.ts";
import { startRelay } from "./bench-relay.ts";
import { startWebroot } from "./ca.ts";
import { type Pebble, startPebble } from "./pebble.ts";

const AT_ONCE = 10;
const ROUND_TRIP_MS = 150;

/**
 * The exchanges of which none can begin before the one before it has ended, for one line and two key types at a CA that
 * has each order polled once: what no client can be faster than.
 */
const FLOOR = [
  "TCP",
  "TLS",
  "directory",
  "newNonce",
  "newAccount",
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

/** Item 2: 10 names, both key types, 150 ms of round trip added. */
export async function latency(): Promise<void> {
  await using bed = await issuingBed();
  await using relay = await startRelay(bed.port, ROUND_TRIP_MS / 2);
  const server = `https://127.0.0.1:${relay.port}/dir`;
  const floor = FLOOR.length * ROUND_TRIP_MS / 1000;
  tell("floor", seconds(floor), `${FLOOR.length} round trips in a row: ${FLOOR.join(", ")}`);

  const connections = async (work: () => Promise<Cost>): Promise<Cost & { connections: number }> => {
    const before = relay.connections;
    return { ...await work(), connections: relay.connections - before };
  };
  const rivals = [
    () => bed.lematt(10, server),
    ...bed.lego === undefined ? [] : [() => bed.lego!(10, server)],
  ];
  const [ours, theirs] = await inTurns(3, ...rivals.map((rival) => () => connections(rival)));
  const walls = ours!.map(({ wallSeconds }) => wallSeconds);
  const found = median(walls) / floor;
  tell("lematt", seconds(median(walls)), `${times(found)} the floor`, { found, atMost: 1.25 });
  tell("", `${Math.max(...ours!.map(({ connections }) => connections))}`, "connections");
  if (theirs === undefined) return tell("lego", "not installed");
  const legos = theirs.map(({ wallSeconds }) => wallSeconds);
  const than = ratio(walls, legos);
  tell("lego", seconds(median(legos)), `lematt takes ${times(than)} that`, { found: than, atMost: 0.65 });
  tell("", `${Math.max(...theirs.map(({ connections }) => connections))}`, "connections");
}

/** Item 3: 20 names, both key types, the CA at hand. */
export async function throughput(): Promise<void> {
  await using bed = await issuingBed();
  const server = `https://127.0.0.1:${bed.port}/dir`;
  const names = 20, certificates = 2 * names;
  const rivals = [
    () => bed.lematt(names, server),
    ...bed.lego === undefined ? [] : [() => bed.lego!(names, server)],
  ];
  const [ours, theirs] = await inTurns(3, ...rivals);
  const walls = ours!.map(({ wallSeconds }) => wallSeconds);
  tell(
    "lematt",
    seconds(median(walls)),
    `${(certificates / median(walls)).toFixed(1)} certificates a second`,
  );
  if (theirs === undefined) tell("lego", "not installed");
  else {
    const legos = theirs.map(({ wallSeconds }) => wallSeconds);
    const than = ratio(walls, legos);
    tell("lego", seconds(median(legos)), `lematt takes ${times(than)} that`, { found: than, atMost: 1 });
  }

  // Making an RSA key takes now half, now double the time, so what the rest costs is measured where the keys are there.
  const again = await inTurns(3, () => bed.reissue());
  const rest = median(again[0]!.map(({ cpuSeconds }) => cpuSeconds)) / certificates;
  tell("processor time a certificate", seconds(rest), "its key aside, start-up included", {
    found: rest * 1000,
    atMost: 30,
  });
  const whole = median(ours!.map(({ cpuSeconds }) => cpuSeconds)) / certificates;
  tell("", seconds(whole), "with keys, half of them RSA");
}

/** A Pebble without moods, a web server, and programs that are given new names each time. */
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
  let last = "";

  function newNames(count: number): string[] {
    round++;
    const names = Array.from({ length: count }, (_, i) => `n${i}.round${round}.example.com`);
    for (const name of names) pebble.dns.set(name, "A", "127.0.0.1");
    return names;
  }

  const run = (conf: string) => measure([...LEMATT, "--test", "--parallel", `${AT_ONCE}`, conf]);

  async function lematt(count: number, server: string): Promise<Cost> {
    last = join(home, `conf${round}`);
    await Deno.mkdir(last);
    const write = (name: string, lines: readonly string[]) =>
      Deno.writeTextFile(join(last, name), `${lines.join("\n")}\n`);
    await write("domains", newNames(count));
    await write("actions.conf", []);
    await write("lematt.conf", [
      "[config]",
      "accountKey: account.key",
      `challengeDropDir: ${drop}`,
      `caBundle: ${pebble.caBundleFile}`,
      `testDirectory: ${server}`,
    ]);
    return await run(last);
  }

  /** The last job of lematt once more, by another account but with the keys that it made. */
  async function reissue(): Promise<Cost> {
    for (const what of ["test/cert", "test/state.json", "account.key"]) {
      await Deno.remove(join(last, what), { recursive: true });
    }
    return await run(last);
  }

  const lego = which("lego") === undefined ? undefined : new Lego(home, pebble);
  const open = stack.move();
  return {
    port: Number(new URL(pebble.directoryUrl).port),
    lematt,
    reissue,
    lego: lego && ((count: number, server: string) => lego.issue(newNames(count), server)),
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

/** lego, with a directory for each key type: it has one certificate of a name in each. */
class Lego {
  readonly #accounts = new Map<string, string>();

  constructor(private readonly home: string, private readonly pebble: Pebble) {}

  /** Two certificates of each name, those of a name one after the other. */
  async issue(names: readonly string[], server: string): Promise<Cost> {
    const account = await this.#accountAt(server);
    const path: Record<string, string> = {};
    for (const keyType of ["rsa2048", "ec256"]) {
      path[keyType] = await Deno.makeTempDir({ dir: this.home, prefix: "lego-" });
      await new Deno.Command("cp", { args: ["-a", join(account, "accounts"), path[keyType]] }).output();
    }
    const begun = performance.now();
    const costs: Cost[] = [];
    const queue = names.values();
    await Promise.all(Array.from({ length: AT_ONCE }, async () => {
      for (const name of queue) {
        for (const keyType of ["rsa2048", "ec256"]) {
          costs.push(await this.#run(server, path[keyType]!, name, keyType));
        }
      }
    }));
    return {
      wallSeconds: (performance.now() - begun) / 1000,
      cpuSeconds: costs.reduce((sum, { cpuSeconds }) => sum + cpuSeconds, 0),
      peakMegabytes: Math.max(...costs.map(({ peakMegabytes }) => peakMegabytes)),
    };
  }

  /** A directory with an account, for which lego has to get a certificate, too. */
  async #accountAt(server: string): Promise<string> {
    let path = this.#accounts.get(server);
    if (path === undefined) {
      path = await Deno.makeTempDir({ dir: this.home, prefix: "lego-" });
      this.pebble.dns.set("account.example.com", "A", "127.0.0.1");
      await this.#run(server, path, "account.example.com", "ec256");
      this.#accounts.set(server, path);
    }
    return path;
  }

  #run(server: string, path: string, name: string, keyType: string): Promise<Cost> {
    const options = { server, path, email: "bench@example.com", domains: name, "key-type": keyType };
    return measure([
      which("lego")!,
      ...Object.entries(options).map(([option, value]) => `--${option}=${value}`),
      "--accept-tos",
      "--http",
      `--http.webroot=${join(this.home, "webroot")}`,
      "run",
    ], { LEGO_CA_CERTIFICATES: this.pebble.caBundleFile });
  }
}
