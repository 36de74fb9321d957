/**
 * leforward compared with an nginx that sends the same redirects: one connection per request, as from a CA.
 */

import { join } from "node:path";
import { median, megabytes, need, printFigure, ratio, times, which } from "./bench-measure.ts";
import { startLeforward, startResets } from "./programs.ts";

const PATH = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
const TO = "http://central.example.com";
const TURNS = 5;
const SECONDS = 2;
const SILENT = 500;
const RESETS_PER_SECOND = 1000;

export async function forward(): Promise<void> {
  need("wrk");
  await using ours = await startLeforward(["--baseurl", TO, "--host", "127.0.0.1"], { stdin: "null" });
  const turns: number[] = [], nginxTurns: number[] = [];
  await using nginx = which("nginx") === undefined ? undefined : await startNginx();
  for (let i = 0; i < TURNS; i++) {
    turns.push((await load(ours.port, 50)).perSecond);
    if (nginx !== undefined) nginxTurns.push((await load(nginx.port, 50)).perSecond);
  }
  const milliseconds = (values: readonly number[]) => `${median(values).toFixed(2)} ms`;
  const perSecond = (values: readonly number[]) => `${(median(values) / 1000).toFixed(1)}k/s`;
  if (nginx === undefined) printFigure("leforward", perSecond(turns), "nginx is not installed");
  else {
    const found = ratio(turns, nginxTurns);
    printFigure("leforward", perSecond(turns), `${times(found)} nginx`, { found, atLeast: 0.9 });
    printFigure("nginx, one worker", perSecond(nginxTurns));
  }

  // few connections at once, as from a CA: with many, wrk would measure its own queue
  if (nginx !== undefined && which("python3") !== undefined) {
    const [flooded, nginxFlooded]: number[][] = [[], []];
    for (let i = 0; i < TURNS; i++) {
      for (const [port, found] of [[ours.port, flooded!], [nginx.port, nginxFlooded!]] as const) {
        await using _resets = await startResets(port, RESETS_PER_SECOND);
        found.push((await load(port, 4)).p99Ms);
      }
    }
    const found = ratio(flooded!, nginxFlooded!);
    printFigure(
      `p99 at ${RESETS_PER_SECOND} resets per second`,
      milliseconds(flooded!),
      `${times(found)} nginx`,
      {
        found,
        atMost: 2,
      },
    );
  } else printFigure("p99 during a flood of resets", "", "nginx or python3 is not installed");

  const p99: number[] = [];
  for (let i = 0; i < TURNS; i++) {
    using _silent = await openSilentConnections(ours.port);
    p99.push((await load(ours.port, 4)).p99Ms);
  }
  const found = median(p99);
  printFigure(`p99 with ${SILENT} silent connections`, milliseconds(p99), "", { found, atMost: 5 });
  const peak = await peakMegabytes(ours.child.pid);
  printFigure("largest resident set of leforward", megabytes(peak), "", { found: peak, atMost: 80 });
}

async function startNginx() {
  const home = await Deno.makeTempDir({ prefix: "lematt-bench-nginx-" });
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  listener.close();
  const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    .map((what) => `${what}_temp_path ${home}/${what};`).join(" ");
  await Deno.writeTextFile(
    join(home, "nginx.conf"),
    `daemon off; worker_processes 1; pid ${home}/pid; error_log ${home}/log;
events { worker_connections 4096; }
http { access_log off; keepalive_timeout 0; ${temporary}
  server { listen 127.0.0.1:${port}; location /.well-known/acme-challenge/ { return 301 ${TO}$request_uri; } } }\n`,
  );
  const child = new Deno.Command(which("nginx")!, {
    args: ["-c", join(home, "nginx.conf"), "-e", join(home, "log")],
    stdin: "null",
    stdout: "null",
    stderr: "null",
  }).spawn();
  for (const deadline = Date.now() + 5000;;) {
    try {
      (await Deno.connect({ hostname: "127.0.0.1", port })).close();
      break;
    } catch {
      if (Date.now() > deadline) {
        throw new Error(`Cannot start nginx: ${await Deno.readTextFile(join(home, "log"))}`);
      }
    }
  }
  return {
    port,
    async [Symbol.asyncDispose]() {
      child.kill();
      await child.status;
      await Deno.remove(home, { recursive: true });
    },
  };
}

/** Sends as many requests as possible, each on a new connection. Throws if an answer is not a redirect. */
async function load(port: number, atOnce: number): Promise<{ perSecond: number; p99Ms: number }> {
  const { stdout } = await new Deno.Command("wrk", {
    args: ["-t1", `-c${atOnce}`, `-d${SECONDS}s`, "--latency", "-H", "Connection: close"]
      .concat(`http://127.0.0.1:${port}${PATH}`),
  }).output();
  const output = new TextDecoder().decode(stdout);
  const [, p99, unit] = /99%\s+([\d.]+)(us|ms|s)/.exec(output) ?? [];
  const perSecond = Number(/Requests\/sec:\s+([\d.]+)/.exec(output)?.[1]);
  if (!(perSecond > 0) || output.includes("Non-2xx")) throw new Error(`Cannot measure redirects: ${output}`);
  return { perSecond, p99Ms: Number(p99) * ({ us: 0.001, ms: 1, s: 1000 }[unit!]!) };
}

/** Connections on which nothing is sent. */
async function openSilentConnections(port: number): Promise<Disposable> {
  const connections = await Promise.all(
    Array.from({ length: SILENT }, () => Deno.connect({ hostname: "127.0.0.1", port })),
  );
  return {
    [Symbol.dispose]() {
      for (const connection of connections) connection.close();
    },
  };
}

/** The largest resident set so far. Read by grep, since Deno needs all permissions for /proc. */
async function peakMegabytes(pid: number): Promise<number> {
  const { stdout } = await new Deno.Command("grep", { args: ["^VmHWM:", `/proc/${pid}/status`] }).output();
  return Number(/(\d+) kB/.exec(new TextDecoder().decode(stdout))![1]) / 1024;
}
