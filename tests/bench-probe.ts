/**
 * Probes of 500 endpoints beside the same number of bare `openssl s_client`, and what 50 silent ones among them cost.
 */

import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { systemContext } from "../lib/context.ts";
import { probe, type Target } from "../lib/probe.ts";
import { megabytes, need, seconds, tell, times } from "./bench-measure.ts";
import { program } from "./programs.ts";
import { freePort, makeCertificate, startNginx, tcpServer } from "./tls.ts";

const ROOT = join(import.meta.dirname!, "..");
const ENDPOINTS = 500;
const SILENT = 50;
/** As after a delivery. */
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
    // every address of 127.0.0.0/8 is an endpoint
    await using _nginx = await startNginx(
      home,
      port,
      (pair) => `server { listen ${port} ssl; ${pair("rsa", "ec")} }`,
    );
    await using silent = await tcpServer(() => {}, "0.0.0.0");

    const bare = await bareOpenssl(port);
    const right = await round(port, port);
    tell(
      `${ENDPOINTS} right ones, ${TIMES} times`,
      seconds(right.took),
      `${times(right.took / bare)} bare openssl`,
      {
        found: right.took,
        atMost: 20,
      },
    );
    tell("openssl alone, 16 at once", seconds(bare));
    tell("processes at once", `${right.processes}`, "", { found: right.processes, atMost: 16 });
    tell("resident sets at once, our own included", megabytes(right.peak), "", {
      found: right.peak,
      atMost: 250,
    });
    const slow = await round(port, silent.port);
    const longer = slow.took - right.took;
    tell(`${SILENT} of them silent`, seconds(slow.took), `${seconds(longer)} longer`, {
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

/** Probes in a process like lematt's: seconds, the most openssl processes and the most megabytes, theirs and its own, at once. */
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
      // a child that is not openssl yet still shares the memory of its parent
      const those = all.filter(([, pid, , name]) => Number(pid) === child.pid || name === "openssl");
      processes = Math.max(processes, those.length - 1);
      peak = Math.max(peak, those.reduce((sum, [, , size]) => sum + Number(size) / 1024, 0));
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
  const begun = performance.now();
  const sights = await probe(targets(port!, other!), context, TIMES, TIMEOUT_SECONDS);
  const took = (performance.now() - begun) / 1000;
  const wrong = sights.filter(({ kind, detail }) =>
    kind !== "served" && detail !== `silent for ${TIMEOUT_SECONDS} s`
  );
  console.log(JSON.stringify({ took, sights: sights.length, wrong: wrong.map(({ detail }) => detail) }));
}

async function bareOpenssl(port: number): Promise<number> {
  const command =
    "seq $1 | xargs -P 16 -I N openssl s_client -no-CAfile -no-CApath -no-CAstore -connect 127.0.0.1:$2 " +
    "-servername www.example.com >/dev/null 2>&1";
  const begun = performance.now();
  await new Deno.Command("sh", { args: ["-c", command, "sh", `${ENDPOINTS * 2 * TIMES}`, `${port}`] })
    .output();
  return (performance.now() - begun) / 1000;
}
