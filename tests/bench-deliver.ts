/**
 * Delivery: the processor time per command, apart from its shell, for 200 sections with `cp` as upload and `true` as update;
 * how soon a new certificate is delivered while another line waits for a silent host; and probes of 500 endpoints, compared with the same number of plain `openssl s_client`, and with 50 silent ones among them.
 */

import { existsSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { testBed, until } from "./bed.ts";
import { figure, inTurns, measure, median } from "./bench-measure.ts";
import { endOf, LEMATT, output, spawn } from "./programs.ts";
import { freePort, startNginx, tcpServer } from "./tls.ts";

const SECTIONS = 200;

export async function deliveries(): Promise<void> {
  const names = Array.from({ length: SECTIONS }, (_, i) => `host${i}.example.com`);
  await using bed = await testBed({ domains: names.join("\n"), settings: "keyTypes: ec\nari: no" });
  await bed.plant();
  const lists = `uploadCerts: ["cp CERTS HERE/drop/"]\nupdate: ["true"]\n`;
  const run = (lists: string) => async () => {
    bed.act(names.map((name) => `[${name}]\ndomains: ${name}\n${lists}`).join(""));
    await Deno.remove(bed.path("test/state.json")).catch(() => {});
    return (await measure(...LEMATT, "--test", bed.conf)).cpuSeconds;
  };
  const pair = `sh -c 'cp ${bed.path("domains")} ${bed.drop}/'; sh -c true`;
  const shells = () => measure("sh", "-c", `for i in $(seq ${SECTIONS}); do ${pair}; done`);
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

const ENDPOINTS = 500;
const SILENT = 50;
const TIMEOUT_SECONDS = 10;

export async function probes(): Promise<void> {
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
