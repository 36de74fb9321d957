/**
 * leforward beside nginx doing the same: one connection a request, as a CA asks.
 */

import { join } from "node:path";
import { median, megabytes, need, ratio, tell, times, which } from "./bench-measure.ts";
import { startLeforward, startResets } from "./programs.ts";

const PATH = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
const TO = "http://central.example.com";
const TURNS = 5;
const SECONDS = 2;
const SILENT = 500;
/** A second. */
const RESETS = 1000;

export async function forward(): Promise<void> {
  need("wrk");
  await using ours = await startLeforward(["--baseurl", TO, "--host", "127.0.0.1"], { stdin: "null" });
  const turns: number[] = [], rival: number[] = [];
  await using nginx = which("nginx") === undefined ? undefined : await startNginx();
  for (let i = 0; i < TURNS; i++) {
    turns.push((await load(ours.port, 50)).perSecond);
    if (nginx !== undefined) rival.push((await load(nginx.port, 50)).perSecond);
  }
  const milliseconds = (values: readonly number[]) => `${median(values).toFixed(2)} ms`;
  const perSecond = (values: readonly number[]) => `${(median(values) / 1000).toFixed(1)}k/s`;
  if (nginx === undefined) tell("leforward", perSecond(turns), "nginx is not installed");
  else {
    const found = ratio(turns, rival);
    tell("leforward", perSecond(turns), `${times(found)} nginx`, { found, atLeast: 0.9 });
    tell("nginx, one worker", perSecond(rival));
  }

  // Few at a time, as a CA asks: with many, this would be the queue that wrk itself makes.
  if (nginx !== undefined && which("python3") !== undefined) {
    const [flooded, rivalFlooded]: number[][] = [[], []];
    for (let i = 0; i < TURNS; i++) {
      for (const [port, found] of [[ours.port, flooded!], [nginx.port, rivalFlooded!]] as const) {
        await using _resets = await startResets(port, RESETS);
        found.push((await load(port, 4)).p99Ms);
      }
    }
    const found = ratio(flooded!, rivalFlooded!);
    tell(`99 of 100, beside ${RESETS} resets a second`, milliseconds(flooded!), `${times(found)} nginx`, {
      found,
      atMost: 2,
    });
  } else tell("99 of 100, beside a flood of resets", "", "nginx or python3 is not installed");

  const p99: number[] = [];
  for (let i = 0; i < TURNS; i++) {
    using _silent = await silence(ours.port);
    p99.push((await load(ours.port, 4)).p99Ms);
  }
  const found = median(p99);
  tell(`99 of 100, ${SILENT} silent connections`, milliseconds(p99), "", { found, atMost: 5 });
  const peak = await peakMegabytes(ours.child.pid);
  tell("leforward's largest resident set", megabytes(peak), "after all that", { found: peak, atMost: 80 });
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

/** Asks for as much as there is to have, on a new connection each time. Throws where an answer is no redirect. */
async function load(port: number, atOnce: number): Promise<{ perSecond: number; p99Ms: number }> {
  const { stdout } = await new Deno.Command("wrk", {
    args: ["-t1", `-c${atOnce}`, `-d${SECONDS}s`, "--latency", "-H", "Connection: close"]
      .concat(`http://127.0.0.1:${port}${PATH}`),
  }).output();
  const said = new TextDecoder().decode(stdout);
  const [, p99, unit] = /99%\s+([\d.]+)(us|ms|s)/.exec(said) ?? [];
  const perSecond = Number(/Requests\/sec:\s+([\d.]+)/.exec(said)?.[1]);
  if (!(perSecond > 0) || said.includes("Non-2xx")) throw new Error(`Cannot measure redirects: ${said}`);
  return { perSecond, p99Ms: Number(p99) * ({ us: 0.001, ms: 1, s: 1000 }[unit!]!) };
}

/** Connections that never say anything. */
async function silence(port: number): Promise<Disposable> {
  const connections = await Promise.all(
    Array.from({ length: SILENT }, () => Deno.connect({ hostname: "127.0.0.1", port })),
  );
  return {
    [Symbol.dispose]() {
      for (const connection of connections) connection.close();
    },
  };
}

/** The largest resident set so far; read by a program, as Deno wants every permission for /proc. */
async function peakMegabytes(pid: number): Promise<number> {
  const { stdout } = await new Deno.Command("grep", { args: ["^VmHWM:", `/proc/${pid}/status`] }).output();
  return Number(/(\d+) kB/.exec(new TextDecoder().decode(stdout))![1]) / 1024;
}
