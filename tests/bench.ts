/**
 * `deno task bench [PART]…`: measures lematt, and prints each figure with its target. Exit status 1 if a target is missed.
 *
 * Everything runs on loopback and is removed afterwards. A part whose programs are not installed is skipped. Single figures
 * vary on a machine that is not idle, so programs that are compared run in turns, and a ratio is the median of the ratios of
 * all turns.
 */

import "reflect-metadata";
import { PemConverter } from "@peculiar/x509";
import { Buffer } from "node:buffer";
import { X509Certificate } from "node:crypto";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { emptyState } from "../lib/state.ts";
import { readInventory } from "../lib/store.ts";
import { generateKey, readCertificate } from "../lib/x509.ts";
import { type Bed, testBed, until } from "./bed.ts";
import type { Switches } from "./ca.ts";
import { startPebble } from "./pebble.ts";
import { endOf, lackOf, LEMATT, output, program, run, shell, spawn } from "./programs.ts";
import { startLeforward, startResets, temporaryDirectory, which } from "./programs.ts";
import { distant, freePort, startNginx, tcpServer } from "./tls.ts";

// ---- measuring ---------------------------------------------------------------------------------------------------

/** Runs a program to its end; returns what it cost with the children that it has waited for, by GNU time. */
async function measure(...command: readonly string[]) {
  const started = performance.now();
  const { code, stdout, stderr } = await output([which("time")!, "-q", "-f", "%U %S %M", ...command]);
  const seconds = (performance.now() - started) / 1000;
  if (code !== 0) throw new Error(`${command.join(" ")}: status ${code}\n${stdout}${stderr}`);
  const [user, system, kilobytes] = stderr.trim().split("\n").at(-1)!.split(" ").map(Number);
  return { seconds, cpuSeconds: user! + system!, peakMegabytes: kilobytes! / 1024 };
}

async function inTurns<T>(times: number, ...functions: readonly (() => Promise<T>)[]): Promise<T[][]> {
  const results: T[][] = functions.map(() => []);
  for (let i = 0; i < times; i++) {
    for (const [index, run] of functions.entries()) results[index]!.push(await run());
  }
  return results;
}

function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  return (sorted[(sorted.length - 1) >> 1]! + sorted[sorted.length >> 1]!) / 2;
}

function ratio(ours: readonly number[], theirs: readonly number[]): number {
  return median(ours.map((value, i) => value / theirs[i]!));
}

let missed = false;

/** Prints what was measured, the value with its unit, and whether it meets its target. */
function figure(what: string, value: number, unit: string, atMost?: number): void {
  const shown = `${Number(value.toPrecision(3)).toLocaleString("en")} ${unit}`;
  const met = atMost === undefined || value <= atMost;
  missed ||= !met;
  const verdict = atMost === undefined ? "" : `  [at most ${atMost}: ${met ? "yes" : "NO"}]`;
  console.log(`  ${what.padEnd(54)}${shown.padStart(12)}${verdict}`);
}

const names = (count: number) => Array.from({ length: count }, (_, i) => `n${i}.example.com`);

// ---- certificates from Pebble, compared with lego ----------------------------------------------------------------

/** How many lines lematt handles at once, and how many processes of lego run at once, each for one certificate. */
const AT_ONCE = 10;
const ROUND_TRIP_MS = 150;
/**
 * The exchanges that each need the result of the one before, for one line and two key types with one poll per order: the
 * minimum for any client. The order of the second key type is ready at once only after the validation for the first.
 */
const IN_SEQUENCE =
  "directory newNonce newOrder authorization challenge order newOrder finalize order certificate";

async function latency(): Promise<void> {
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
    const inTrips = median(ours) * 1000 / ROUND_TRIP_MS / trips;
    figure(`${what}: lematt`, median(ours), "s");
    figure(`${what}: beside its ${trips} round trips`, inTrips, "x", atMost);
    figure(`${what}: lego`, median(theirs), "s");
    figure(`${what}: lematt beside lego`, ratio(ours, theirs), "x", 0.62);
  }
}

async function throughput(): Promise<void> {
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

/** Pebble without random errors, `oneWayMs` away, and lematt and lego with accounts; each issues two certificates for each line. */
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

  let line = 0;
  const newLines = (lines: number, count: number) =>
    Array.from({ length: lines }, () => {
      line++;
      return names(count).map((name) => `line${line}.${name}`);
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
          const account = `-s ${server} -a -m a@example.com --path ${bed.home}/${type} -k ${type}`;
          const http = `--http --http.webroot ${bed.home}/web -d ${line.join(" -d ")}`;
          const lego = `LEGO_CA_CERTIFICATES=${pebble.caBundleFile} lego ${account} ${http} run`;
          await run("env", ...lego.split(" "));
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

// ---- nothing due -------------------------------------------------------------------------------------------------

const SIZES = [
  { lines: 5_000, seconds: 0.8, megabytes: 150 },
  { lines: 50_000, seconds: 8, megabytes: 800 },
];
const WAYS = ["--cron", "--plan", "--status --offline"];

async function idle(): Promise<void> {
  await using bed = await testBed();
  const run = (way: string) => () => measure(...LEMATT, "--test", ...way.split(" "), bed.conf);
  await fill(bed, 1);
  await Deno.writeTextFile(`${bed.home}/empty.ts`, "");
  const empty = () => measure(Deno.execPath(), "run", "-q", "--no-prompt", `${bed.home}/empty.ts`);
  const turns = await inTurns(15, empty, run("--help"), ...WAYS.map(run));
  const [nothing, ...ours] = turns.map((costs) => costs.map(({ seconds }) => seconds));
  figure("an empty program", median(nothing!) * 1000, "ms");
  for (const [i, way] of ["--help", ...WAYS].entries()) {
    figure(`1 line, ${way}`, median(ours[i]!) * 1000, "ms");
    figure(`1 line, ${way}, beside the empty program`, ratio(ours[i]!, nothing!), "x", 3.5);
  }

  const cron: number[] = [];
  for (const { lines, seconds, megabytes } of SIZES) {
    await fill(bed, lines);
    for (const [i, costs] of (await inTurns(5, ...WAYS.map(run))).entries()) {
      const what = `${(2 * lines).toLocaleString("en")} certificates, ${WAYS[i]}`;
      const found = median(costs.map(({ seconds }) => seconds));
      if (i === 0) cron.push(found);
      figure(what, found, "s", seconds);
      figure(what, median(costs.map(({ peakMegabytes }) => peakMegabytes)), "MB", megabytes);
    }
  }
  figure("--cron with 10 times as many lines", cron[1]! / cron[0]!, "x", 11);
}

/**
 * Puts all files of `lines` lines in place as they are after a run, with renewal windows in state.json, so that the CA is not
 * asked. All certificates of a key type have the key and the signature of the first, which takes a twentieth of the time of
 * signing them; lematt checks names and key of a certificate on disk, not the signature.
 */
async function fill(bed: Bed, lines: number): Promise<void> {
  const label = (line: number) => `host${`${line}`.padStart(7, "0")}`;
  bed.configure({
    domains: Array.from({ length: lines }, (_, i) => `${label(i + 1)}.example.com\n`).join(""),
  });
  const from = (days: number) => new Date(Date.now() + days * 86_400_000);
  const life = { notBefore: from(-1), notAfter: from(89) };
  const templateOf = async (keyPem: string) => {
    const chain = await bed.ca.forge(keyPem, [`${label(0)}.example.com`], life);
    const [leaf, ...issuers] = PemConverter.decode(chain).map((der) => Buffer.from(der).toString("latin1"));
    const serial = Buffer.from(new X509Certificate(chain).serialNumber, "hex").toString("latin1");
    return { keyPem, leaf: leaf!, serial, issuers };
  };
  const templates = {
    rsa: await templateOf(await generateKey({ type: "rsa", bits: 2048 })),
    ec: await templateOf(await generateKey({ type: "ec", curve: "P-256" })),
  };
  const state = emptyState();
  const window = { start: from(59).toISOString(), end: from(61).toISOString(), at: from(60).toISOString() };
  const account = `${bed.ca.directoryUrl} NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs`;
  for (const name of ["key", "csr", "cert"]) await Deno.mkdir(bed.path("test", name), { recursive: true });
  for (const { line, keyType, files } of readInventory(bed.config())) {
    const { keyPem, leaf, serial, issuers } = templates[keyType];
    const own = line.names[0]!.split(".")[0]!;
    const named = leaf.replaceAll(label(0), own).replace(serial, own.padEnd(serial.length));
    const ders = [named, ...issuers].map((der) => Buffer.from(der, "latin1"));
    const chainPem = PemConverter.encode(ders, "CERTIFICATE");
    Deno.writeTextFileSync(files.cert, chainPem);
    Deno.writeTextFileSync(files.key, keyPem, { mode: 0o600 });
    state.renewals[readCertificate(chainPem).id!] = { account, window, askAt: from(0.25).toISOString() };
  }
  await Deno.writeTextFile(bed.path("test/state.json"), JSON.stringify(state, undefined, 1));
}

// ---- a CA with the rate limits of Let's Encrypt ------------------------------------------------------------------

const WINDOW_MS = 3 * 3600_000;

/** https://letsencrypt.org/docs/rate-limits/; of the limits per second, the one for nonces is the lowest. */
export function likeLetsEncrypt(orders: number): Switches["limits"] {
  return { newOrder: { count: orders, windowMs: WINDOW_MS }, newNonce: { count: 20, windowMs: 1000 } };
}

/** Runs every three hours until all certificates are issued; returns the number of refused orders of each run. */
export async function runUntilDone(bed: Bed, parallel: number): Promise<number[]> {
  const refused: number[] = [];
  for (;;) {
    const { code, stderr, requests } = await bed.run({ parallel });
    refused.push(requests.filter(({ resource, status }) => resource === "newOrder" && status === 429).length);
    if (code === 0) return refused;
    if (!(bed.ca.directoryUrl in bed.state().holds)) throw new Error(`not a rate limit: ${stderr}`);
    bed.ca.advance(WINDOW_MS);
  }
}

const LINES = 2_000;
/** A few megabytes more than a run with one line needs. */
const HEAP_MB = 24;

async function limits(): Promise<void> {
  const [orders, parallel] = [300, 30];
  const ca = { limits: likeLetsEncrypt(orders) };
  await using bed = await testBed({ domains: names(LINES).join("\n"), settings: "keyTypes: ec", ca });
  const refused = await runUntilDone(bed, parallel);
  figure(`runs, every three hours, at ${orders} orders`, refused.length, "", Math.ceil(LINES / orders));
  figure("orders", bed.ca.orders.length, "", LINES);
  figure("orders refused in a run", Math.max(...refused), "", parallel);
  figure("longest wait within a run", Math.max(...bed.waits) / 1000, "s", 30);

  // a large heap contains mostly garbage, so the heap is limited to a size that both runs fill
  const lematt = program("lematt.ts", `--v8-flags=--max-old-space-size=${HEAP_MB}`);
  const megabytesOf = async (lines: number) => {
    await using bed = await testBed({ domains: names(lines).join("\n"), settings: "keyTypes: ec" });
    return (await measure(...lematt, "--test", "--cron", bed.conf)).peakMegabytes;
  };
  const few = await megabytesOf(LINES / 8), many = await megabytesOf(LINES / 2);
  figure(`${LINES / 2} lines in one run, heap limited to ${HEAP_MB} MB`, many, "MB");
  figure("memory per additional line", (many - few) * 1024 / (LINES / 2 - LINES / 8), "KB", 20);
}

// ---- delivery ----------------------------------------------------------------------------------------------------

const SECTIONS = 200;

/** The processor time per command, apart from its shell, for sections with `cp` as upload and `true` as update. */
async function deliveries(): Promise<void> {
  const lines = names(SECTIONS);
  await using bed = await testBed({ domains: lines.join("\n"), settings: "keyTypes: ec\nari: no" });
  await bed.plant();
  const run = (lists: string) => async () => {
    bed.act(lines.map((name) => `[${name}]\ndomains: ${name}\n${lists}`).join(""));
    await Deno.remove(bed.path("test/state.json")).catch(() => {});
    return (await measure(...LEMATT, "--test", bed.conf)).cpuSeconds;
  };
  const pair = `sh -c 'cp ${bed.path("domains")} ${bed.drop}/'; sh -c true`;
  const shells = () => measure("sh", "-c", `for i in $(seq ${SECTIONS}); do ${pair}; done`);
  const lists = `uploadCerts: ["cp CERTS HERE/drop/"]\nupdate: ["true"]\n`;
  const [all, idle, shell] = await inTurns(3, run(lists), run(""), async () => (await shells()).cpuSeconds);
  const each = (seconds: readonly number[]) => median(seconds) * 1000 / (2 * SECTIONS);
  figure("processor time of a command: its shell", each(shell!), "ms");
  const own = all!.map((seconds, i) => seconds - idle![i]! - shell![i]!);
  figure("processor time of a command: lematt", each(own), "ms", 2);
  figure("from a certificate to its delivery beside a silent host", await secondsToDeliver(), "s", 0.2);
}

async function secondsToDeliver(): Promise<number> {
  await using bed = await testBed({ domains: "a.example.com\nslow.example.com", settings: "keyTypes: ec" });
  bed.act(`[a]\ndomains: a.example.com\nupdate: ["touch HERE/delivered"]
[slow]\ndomains: slow.example.com\nprepare: ["sleep 60"]`);
  const stop = new AbortController();
  const { route } = bed.context();
  const running = bed.run({
    signal: stop.signal,
    // its self-check hangs, until the run is interrupted
    route: (host, port) => host.startsWith("slow") ? new Promise(() => {}) : route(host, port),
  });
  const delivered = join(bed.home, "delivered");
  await until("it is delivered", () => existsSync(delivered));
  stop.abort();
  await running.catch(() => {});
  const issued = bed.path("test/cert/a.example.com-cert-combined.prime256v1.test.pem");
  const [from, to] = [issued, delivered].map((path) => Deno.statSync(path).mtime!.getTime());
  return (to! - from!) / 1000;
}

// ---- probes ------------------------------------------------------------------------------------------------------

const ENDPOINTS = 500;
const SILENT = 50;
const TIMEOUT_SECONDS = 10;

/** Compared with the same number of plain `openssl s_client`, and with silent endpoints among them. */
async function probes(): Promise<void> {
  await using bed = await testBed({ domains: "www.example.com", settings: "ari: no\nverifyWait: 0" });
  await bed.plant({ mode: "prod" });
  const pairs = ["rsa2048", "prime256v1"].map((tag) =>
    `ssl_certificate ${bed.path(`prod/cert/www.example.com-cert-combined.${tag}.pem`)};` +
    `ssl_certificate_key ${bed.path(`prod/key/www.example.com-key.${tag}.pem`)};`
  );
  const port = freePort();
  // all addresses of 127.0.0.0/8 reach both servers
  const server = `server { listen ${port} ssl; ${pairs.join("")} }`;
  await using _nginx = await startNginx(bed.home, port, () => server);
  await using silent = await tcpServer(() => {}, "0.0.0.0");

  /** Delivers to a section with all endpoints, and so probes each three times by RSA and by EC. */
  async function round(other: number, expected: number) {
    const endpoints = Array.from({ length: ENDPOINTS }, (_, i) => {
      const host = `127.0.${1 + Math.floor(i / 250)}.${1 + i % 250}`;
      return `${host}:${i % (ENDPOINTS / SILENT) === 0 ? other : port}#www.example.com`;
    });
    bed.act(`[web]\ndomains: www.example.com\nupdate: ["true"]\nverify: ${JSON.stringify(endpoints)}\n`);
    const started = performance.now();
    const child = spawn([...LEMATT, "--prod", "--deliver", "[web]", bed.conf]);
    let [running, processes, megabytes] = [true, 0, 0];
    const ended = endOf(child).finally(() => running = false);
    while (running) {
      const { pid } = child;
      const { stdout } = await output(`ps --pid ${pid} --ppid ${pid} -o pid=,rss=,comm=`.split(" "));
      const all = [...stdout.matchAll(/(\d+) +(\d+) (\w+)/g)];
      // a forked child shares the memory of its parent until it executes openssl
      const counted = all.filter(([, id, , name]) => Number(id) === pid || name === "openssl");
      processes = Math.max(processes, counted.length - 1);
      megabytes = Math.max(megabytes, counted.reduce((sum, [, , size]) => sum + Number(size) / 1024, 0));
      await delay(100);
    }
    const { code, stderr } = await ended;
    if (code !== expected) throw new Error(stderr);
    return { seconds: (performance.now() - started) / 1000, processes, megabytes };
  }

  const plain =
    `seq ${6 * ENDPOINTS} | xargs -P 16 -I N openssl s_client -no-CAfile -no-CApath -no-CAstore ` +
    `-connect 127.0.0.1:${port} -servername www.example.com >/dev/null 2>&1`;
  const started = performance.now();
  await output(["sh", "-c", plain]);
  const openssl = (performance.now() - started) / 1000;
  const { seconds, processes, megabytes } = await round(port, 0);
  figure("openssl alone, 16 at once", openssl, "s");
  figure("lematt", seconds, "s", 20);
  figure("lematt beside openssl alone", seconds / openssl, "x");
  figure("openssl processes at once", processes, "", 16);
  figure("resident sets, with that of lematt", megabytes, "MB", 250);
  const longer = (await round(silent.port, 1)).seconds - seconds;
  figure(`longer with ${SILENT} silent endpoints`, longer, "s", TIMEOUT_SECONDS);
}

// ---- leforward ---------------------------------------------------------------------------------------------------

const PATH = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
const RESETS = 1000;
const IDLE_CONNECTIONS = 500;

/** Compared with an nginx that sends the same redirects: one connection per request, as from a CA. */
async function forward(): Promise<void> {
  await using home = await temporaryDirectory();
  const to = "http://central.example.com";
  await using ours = await startLeforward(["--baseurl", to, "--host", "127.0.0.1"], { stdin: "null" });
  const port = freePort();
  const redirect = `location /.well-known/acme-challenge/ { return 301 ${to}$request_uri; }`;
  const server = `server { listen 127.0.0.1:${port}; keepalive_timeout 0; ${redirect} }`;
  await using _nginx = await startNginx(home.path, port, () => server);

  const perSecond = (port: number) => async () => (await load(port, 50)).perSecond;
  const [redirects, theirs] = await inTurns(5, perSecond(ours.port), perSecond(port));
  figure("leforward, redirects", median(redirects!), "/s");
  figure("nginx with one worker, redirects", median(theirs!), "/s");
  figure("nginx beside leforward", ratio(theirs!, redirects!), "x", 1.1);

  // few connections at once, as from a CA: with many, wrk would measure its own queue
  const p99 = async (port: number) => (await load(port, 4)).p99Ms;
  const flooded = (port: number) => async () => {
    await using _resets = await startResets(port, RESETS);
    return await p99(port);
  };
  const [slow, theirSlow] = await inTurns(5, flooded(ours.port), flooded(port));
  figure(`p99 at ${RESETS} resets per second`, median(slow!), "ms");
  figure(`p99 at ${RESETS} resets per second, beside nginx`, ratio(slow!, theirSlow!), "x", 2);
  const [behind] = await inTurns(5, async () => {
    const silent = await Promise.all(
      Array.from(
        { length: IDLE_CONNECTIONS },
        () => Deno.connect({ hostname: "127.0.0.1", port: ours.port }),
      ),
    );
    const found = await p99(ours.port);
    for (const connection of silent) connection.close();
    return found;
  });
  figure(`p99 with ${IDLE_CONNECTIONS} silent connections`, median(behind!), "ms", 5);
  // read by grep, since Deno needs all permissions for /proc
  const peak = /(\d+) kB/.exec(await run("grep", "^VmHWM:", `/proc/${ours.child.pid}/status`))![1];
  figure("largest resident set of leforward", Number(peak) / 1024, "MB", 80);
}

/** Sends as many requests as possible for two seconds, each on a new connection. Throws if an answer is not a redirect. */
async function load(port: number, atOnce: number): Promise<{ perSecond: number; p99Ms: number }> {
  const options = ["-t1", `-c${atOnce}`, "-d2s", "--latency", "-H", "Connection: close"];
  const output = await run("wrk", ...options, `http://127.0.0.1:${port}${PATH}`);
  const [, p99, unit] = /99%\s+([\d.]+)(us|ms|s)/.exec(output) ?? [];
  const perSecond = Number(/Requests\/sec:\s+([\d.]+)/.exec(output)?.[1]);
  if (!(perSecond > 0) || output.includes("Non-2xx")) throw new Error(`cannot measure redirects: ${output}`);
  return { perSecond, p99Ms: Number(p99) * { us: 0.001, ms: 1, s: 1000 }[unit as "us"] };
}

// ---- the parts ---------------------------------------------------------------------------------------------------

type Part = readonly [what: string, run: () => Promise<void>, ...programs: string[]];
const PARTS: Readonly<Record<string, Part>> = {
  latency: ["10 names and a line of 100, RSA and EC, a CA 150 ms away", latency, "pebble", "lego"],
  throughput: ["20 names, RSA and EC, 10 at once, a CA on this host", throughput, "pebble", "lego"],
  idle: ["nothing due", idle],
  limits: ["2,000 new lines at a CA with limits", limits],
  deliver: ["200 sections with an upload and an update", deliveries],
  probe: ["500 endpoints with RSA and EC certificates, three probes each", probes, "nginx", "openssl"],
  forward: ["leforward and nginx, one connection per request", forward, "nginx", "wrk", "python3"],
};

if (import.meta.main) {
  const wanted = Deno.args.length === 0 ? Object.keys(PARTS) : Deno.args;
  const unknown = wanted.find((name) => !Object.hasOwn(PARTS, name));
  if (unknown !== undefined) {
    console.error(`bench: unknown part ${JSON.stringify(unknown)}; known: ${Object.keys(PARTS).join(", ")}`);
    Deno.exit(2);
  }
  const versions = await output(["sh", "-c", "dpkg-query -W lego pebble nginx wrk openssl 2>/dev/null"]);
  console.log(`deno ${Deno.version.deno}, ${navigator.hardwareConcurrency} processors\n${versions.stdout}`);
  for (const name of wanted) {
    const [what, run, ...programs] = PARTS[name]!;
    const lack = lackOf("time", ...programs);
    console.log(`${name}: ${what}${lack === undefined ? "" : `: ${lack}`}`);
    if (lack === undefined) await run();
  }
  Deno.exit(missed ? 1 : 0);
}
