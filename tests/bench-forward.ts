/** leforward compared with an nginx that sends the same redirects: one connection per request, as from a CA. */

import { figure, inTurns, median, ratio } from "./bench-measure.ts";
import { run, startLeforward, startResets, temporaryDirectory } from "./programs.ts";
import { freePort, startNginx } from "./tls.ts";

const PATH = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
const TO = "http://central.example.com";
const TURNS = 5;
const SILENT = 500;
const RESETS = 1000;

export async function forward(): Promise<void> {
  await using home = await temporaryDirectory();
  await using ours = await startLeforward(["--baseurl", TO, "--host", "127.0.0.1"], { stdin: "null" });
  const port = freePort();
  const redirect = `location /.well-known/acme-challenge/ { return 301 ${TO}$request_uri; }`;
  const server = `server { listen 127.0.0.1:${port}; keepalive_timeout 0; ${redirect} }`;
  await using _nginx = await startNginx(home.path, port, () => server);

  const perSecond = (port: number) => async () => (await load(port, 50)).perSecond;
  const [redirects, theirs] = await inTurns(TURNS, perSecond(ours.port), perSecond(port));
  figure("leforward, redirects", median(redirects!), "/s");
  figure("nginx with one worker, redirects", median(theirs!), "/s");
  figure("nginx beside leforward", ratio(theirs!, redirects!), "x", 1.1);

  // few connections at once, as from a CA: with many, wrk would measure its own queue
  const p99 = async (port: number) => (await load(port, 4)).p99Ms;
  const flooded = (port: number) => async () => {
    await using _resets = await startResets(port, RESETS);
    return await p99(port);
  };
  const [slow, theirSlow] = await inTurns(TURNS, flooded(ours.port), flooded(port));
  figure(`p99 at ${RESETS} resets per second`, median(slow!), "ms");
  figure(`p99 at ${RESETS} resets per second, beside nginx`, ratio(slow!, theirSlow!), "x", 2);
  const [behind] = await inTurns(TURNS, async () => {
    const silent = await Promise.all(
      Array.from({ length: SILENT }, () => Deno.connect({ hostname: "127.0.0.1", port: ours.port })),
    );
    const found = await p99(ours.port);
    for (const connection of silent) connection.close();
    return found;
  });
  figure(`p99 with ${SILENT} silent connections`, median(behind!), "ms", 5);
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
