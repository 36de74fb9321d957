/**
 * Probes of 500 endpoints beside the same number of bare `openssl s_client`, and what 50 silent ones among them cost.
 */

import { setTimeout as delay } from "node:timers/promises";
import { systemContext } from "../lib/context.ts";
import { probe, type Target } from "../lib/probe.ts";
import { megabytes, need, seconds, tell, times } from "./bench-measure.ts";
import { freePort, makeCertificate, startNginx, tcpServer } from "./tls.ts";

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
    const right = await round(targets(port, port));
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
    const slow = await round(targets(port, silent.port));
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

/** Seconds for one round; the most openssl processes and the most megabytes, theirs and ours, that were seen at once. */
async function round(targets: readonly Target[]) {
  const signal = new AbortController().signal;
  const context = systemContext({ fetch, userAgent: "", signal, warn: console.log });
  let [ended, processes, peak] = [false, 0, 0];
  const watching = (async () => {
    while (!ended) {
      const { stdout } = await new Deno.Command("ps", { args: ["--ppid", `${Deno.pid}`, "-o", "rss=,comm="] })
        .output();
      const sizes = new TextDecoder().decode(stdout).match(/\d+(?= openssl)/g)?.map(Number) ?? [];
      processes = Math.max(processes, sizes.length);
      peak = Math.max(peak, sizes.reduce((sum, size) => sum + size / 1024, Deno.memoryUsage().rss / 2 ** 20));
      await delay(100);
    }
  })();
  const begun = performance.now();
  const sights = await probe(targets, context, TIMES, TIMEOUT_SECONDS);
  const took = (performance.now() - begun) / 1000;
  ended = true;
  await watching;
  const wrong = sights.filter(({ kind, detail }) =>
    kind !== "served" && detail !== `silent for ${TIMEOUT_SECONDS} s`
  );
  if (sights.length !== targets.length || wrong.length > 0) {
    throw new Error(`Cannot measure: ${sights.length} sights, ${JSON.stringify(wrong.slice(0, 3))}`);
  }
  return { took, processes, peak };
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
