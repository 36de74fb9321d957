/**
 * Probes of 500 endpoints, compared with the same number of plain `openssl s_client`, and with 50 silent endpoints among them.
 */

import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { systemContext } from "../lib/context.ts";
import { probe, type Target } from "../lib/probe.ts";
import { megabytes, need, printFigure, seconds, times } from "./bench-measure.ts";
import { program } from "./programs.ts";
import { freePort, makeCertificate, startNginx, tcpServer } from "./tls.ts";

const ROOT = join(import.meta.dirname!, "..");
const ENDPOINTS = 500;
const SILENT = 50;
/** The number of probes per endpoint and key type, as after a delivery. */
const TIMES = 3;
const TIMEOUT_SECONDS = 10;

export async function probes(): Promise<void> {
  need("nginx", "openssl", "xargs", "ps");
  const home = await Deno.makeTempDir({ prefix: "lematt-bench-probe-" });
  try {
    for (const keyType of ["rsa", "ec"] as const) {
      await makeCertificate(home, keyType, keyType, ["www.example.com"]);
    }
    const port = freePort();
    // all addresses of 127.0.0.0/8 reach it
    await using _nginx = await startNginx(
      home,
      port,
      (pair) => `server { listen ${port} ssl; ${pair("rsa", "ec")} }`,
    );
    await using silent = await tcpServer(() => {}, "0.0.0.0");

    const openssl = await plainOpenssl(port);
    const fast = await round(port, port);
    printFigure(
      `${ENDPOINTS} endpoints, ${TIMES} times`,
      seconds(fast.took),
      `${times(fast.took / openssl)} openssl alone`,
      {
        found: fast.took,
        atMost: 20,
      },
    );
    printFigure("openssl alone, 16 at once", seconds(openssl));
    printFigure("openssl processes at once", `${fast.processes}`, "", { found: fast.processes, atMost: 16 });
    printFigure("resident sets, with that of lematt", megabytes(fast.peak), "", {
      found: fast.peak,
      atMost: 250,
    });
    const slow = await round(port, silent.port);
    const longer = slow.took - fast.took;
    printFigure(`${SILENT} of them silent`, seconds(slow.took), `${seconds(longer)} longer`, {
      found: longer,
      atMost: TIMEOUT_SECONDS,
    });
  } finally {
    await Deno.remove(home, { recursive: true });
  }
}

function targets(port: number, other: number): Target[] {
  return Array.from({ length: ENDPOINTS }, (_, i) => {
    const host = `127.0.${1 + Math.floor(i / 250)}.${1 + i % 250}`;
    const endpoint = {
      text: host,
      host,
      port: i % (ENDPOINTS / SILENT) === 0 ? other : port,
      sni: "www.example.com",
    };
    return (["rsa", "ec"] as const).map((keyType) => ({ endpoint, keyType }));
  }).flat();
}

/** Probes in a process with the permissions of lematt; returns the seconds, and the peaks of openssl processes and megabytes. */
async function round(port: number, other: number) {
  const [command, ...rest] = program("lematt.ts").slice(0, -1);
  const child = new Deno.Command(command!, {
    args: [...rest, "--config", join(ROOT, "deno.json"), import.meta.filename!, `${port}`, `${other}`],
    stdin: "null",
    stdout: "piped",
  }).spawn();
  let [ended, processes, peak] = [false, 0, 0];
  const watching = (async () => {
    while (!ended) {
      const args = ["--pid", `${child.pid}`, "--ppid", `${child.pid}`, "-o", "pid=,rss=,comm="];
      const { stdout } = await new Deno.Command("ps", { args }).output();
      const all = [...new TextDecoder().decode(stdout).matchAll(/(\d+) +(\d+) (\w+)/g)];
      // a forked child shares the memory of its parent until it executes openssl
      const counted = all.filter(([, pid, , name]) => Number(pid) === child.pid || name === "openssl");
      processes = Math.max(processes, counted.length - 1);
      peak = Math.max(peak, counted.reduce((sum, [, , size]) => sum + Number(size) / 1024, 0));
      await delay(100);
    }
  })();
  const { stdout } = await child.output();
  ended = true;
  await watching;
  const { took, sights, wrong } = JSON.parse(new TextDecoder().decode(stdout));
  if (sights !== 2 * ENDPOINTS || wrong.length > 0) {
    throw new Error(`Cannot measure: ${sights} sights, ${wrong}`);
  }
  return { took, processes, peak };
}

if (import.meta.main) {
  const [port, other] = Deno.args.map(Number);
  const signal = new AbortController().signal;
  const context = systemContext({ fetch, userAgent: "", signal, warn: console.error });
  const started = performance.now();
  const sights = await probe(targets(port!, other!), context, TIMES, TIMEOUT_SECONDS);
  const took = (performance.now() - started) / 1000;
  const wrong = sights.filter(({ kind, detail }) =>
    kind !== "served" && detail !== `silent for ${TIMEOUT_SECONDS} s`
  );
  console.log(JSON.stringify({ took, sights: sights.length, wrong: wrong.map(({ detail }) => detail) }));
}

async function plainOpenssl(port: number): Promise<number> {
  const command =
    "seq $1 | xargs -P 16 -I N openssl s_client -no-CAfile -no-CApath -no-CAstore -connect 127.0.0.1:$2 " +
    "-servername www.example.com >/dev/null 2>&1";
  const started = performance.now();
  await new Deno.Command("sh", { args: ["-c", command, "sh", `${ENDPOINTS * 2 * TIMES}`, `${port}`] })
    .output();
  return (performance.now() - started) / 1000;
}
