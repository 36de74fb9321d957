/**
 * `deno task bench [PART]…`: measures lematt, and prints each figure with its target. Exit status 1 if a target is missed.
 *
 * Everything runs on loopback and is removed afterwards. A part whose programs are not installed is skipped.
 */

import { deliveries, probes } from "./bench-deliver.ts";
import { forward } from "./bench-forward.ts";
import { idle } from "./bench-idle.ts";
import { latency, throughput } from "./bench-issue.ts";
import { limits } from "./bench-limits.ts";
import { missed } from "./bench-measure.ts";
import { lackOf, output } from "./programs.ts";

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
