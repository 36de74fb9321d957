/**
 * Certificates from Pebble, compared with lego: the time with a distant CA, and the cost with a CA on this host. Both have an
 * account already. lego is started once for each certificate, as many processes at once as lematt handles lines.
 */

import { testBed } from "./bed.ts";
import { figure, inTurns, measure, median, ratio } from "./bench-measure.ts";
import { startPebble } from "./pebble.ts";
import { LEMATT, run, shell } from "./programs.ts";
import { distant } from "./tls.ts";

const AT_ONCE = 10;
const ROUND_TRIP_MS = 150;
/**
 * The exchanges that each need the result of the one before, for one line and two key types with one poll per order: the
 * minimum for any client. The order of the second key type is ready at once only after the validation for the first.
 */
const IN_SEQUENCE =
  "directory newNonce newOrder authorization challenge order newOrder finalize order certificate";

export async function latency(): Promise<void> {
  await using clients = await startClients(ROUND_TRIP_MS / 2);
  const connecting = await clients.roundTrips(ROUND_TRIP_MS) - 1;
  const cases = [
    { what: "10 names", lines: 10, names: 1, turns: 5, atMost: 1.35 },
    { what: "100 names", lines: 1, names: 100, turns: 1, atMost: 1.5 }, // lego takes minutes
  ];
  for (const { what, lines, names, turns, atMost } of cases) {
    // with more than 20 names, the two requests of each name take several rounds of 20 at once
    const trips = connecting + IN_SEQUENCE.split(" ").length + 2 * (Math.ceil(names / 20) - 1);
    const [ours, theirs] = await clients.compare(turns, lines, names);
    figure(`${what}: lematt`, median(ours), "s");
    figure(
      `${what}: beside its ${trips} round trips`,
      median(ours) * 1000 / ROUND_TRIP_MS / trips,
      "x",
      atMost,
    );
    figure(`${what}: lego`, median(theirs), "s");
    figure(`${what}: lematt beside lego`, ratio(ours, theirs), "x", 0.62);
  }
}

export async function throughput(): Promise<void> {
  await using clients = await startClients();
  const [lines, certificates] = [20, 40];
  const [ours, theirs] = await clients.compare(3, lines, 1);
  figure("certificates per second", certificates / median(ours), "/s");
  figure("lego: certificates per second", certificates / median(theirs), "/s");
  figure("time of lematt beside lego", ratio(ours, theirs), "x", 1);
  // the time to make an RSA key varies by a factor of four, so this is measured with existing keys
  const [cpuSeconds] = await inTurns(3, clients.reissue);
  const each = median(cpuSeconds!) * 1000 / certificates;
  figure("processor time per certificate, without its key", each, "ms", 30);
}

/** Pebble without random errors, `oneWayMs` away, with lematt and lego; each issues two certificates for each line. */
async function startClients(oneWayMs?: number) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed());
  const pebble = stack.use(
    await startPebble({
      httpPort: bed.web.port,
      env: { PEBBLE_WFE_NONCEREJECT: "0", PEBBLE_AUTHZREUSE: "100" },
      records: (_, type) => type === "A" ? ["127.0.0.1"] : [],
    }),
  );
  const near = Number(new URL(pebble.directoryUrl).port);
  const port = oneWayMs === undefined ? near : stack.use(await distant(near, oneWayMs)).port;
  const server = `https://127.0.0.1:${port}/dir`;
  bed.configure({ settings: `testDirectory: ${server}\ncaBundle: ${pebble.caBundleFile}` });
  await shell("mkdir -p web/.well-known; ln -s ../../drop web/.well-known/acme-challenge", bed.home);

  let round = 0;
  const newLines = (lines: number, names: number) =>
    Array.from({ length: lines }, () => {
      round++;
      return Array.from({ length: names }, (_, i) => `n${i}.round${round}.example.com`);
    });
  const issue = () => measure(...LEMATT, "--test", bed.conf);
  async function lematt(lines: number, names: number): Promise<number> {
    bed.configure({ domains: newLines(lines, names).map((line) => `${line.join(" ")}\n`).join("") });
    return (await issue()).seconds;
  }
  async function lego(lines: number, names: number): Promise<number> {
    const started = performance.now();
    const queue = newLines(lines, names).values();
    await Promise.all(Array.from({ length: AT_ONCE }, async () => {
      for (const line of queue) {
        for (const type of ["rsa2048", "ec256"]) {
          const common = `-s ${server} -a -m a@example.com --path ${bed.home}/${type} -k ${type}`.split(" ");
          const http = [
            "--http",
            "--http.webroot",
            `${bed.home}/web`,
            ...line.flatMap((name) => ["-d", name]),
          ];
          await run("env", `LEGO_CA_CERTIFICATES=${pebble.caBundleFile}`, "lego", ...common, ...http, "run");
        }
      }
    }));
    return (performance.now() - started) / 1000;
  }
  for (const register of [lematt, lego]) await register(1, 1);
  const open = stack.move();
  return {
    compare: (turns: number, lines: number, names: number) =>
      inTurns(turns, () => lematt(lines, names), () => lego(lines, names)) as Promise<[number[], number[]]>,
    /** Issues the last certificates again with a new account, which has to validate every name; returns processor time. */
    async reissue(): Promise<number> {
      for (const what of ["test/cert", "test/state.json", "account.key.test"]) {
        await Deno.remove(bed.path(what), { recursive: true });
      }
      return (await issue()).cpuSeconds;
    },
    /** The number of round trips until a new connection has returned the directory; TLS takes one or two of them. */
    async roundTrips(milliseconds: number): Promise<number> {
      using client = Deno.createHttpClient({ caCerts: [await Deno.readTextFile(pebble.caBundleFile)] });
      const started = performance.now();
      await (await fetch(server, { client })).text();
      return Math.floor((performance.now() - started) / milliseconds);
    },
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}
