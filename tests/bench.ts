/**
 * `deno task bench [PART]…`: measures lematt, and prints each figure with its comparison and its target. Exit status 1 if a
 * target is missed.
 *
 * Everything runs on loopback and is removed afterwards. A part whose programs are not installed is skipped, with a message.
 */

import { deliveries } from "./bench-deliver.ts";
import { forward } from "./bench-forward.ts";
import { idle } from "./bench-idle.ts";
import { latency, throughput } from "./bench-issue.ts";
import { limits } from "./bench-limits.ts";
import { Lacking, missedTargets, which } from "./bench-measure.ts";
import { probes } from "./bench-probe.ts";

const PARTS: Readonly<Record<string, { readonly what: string; readonly run: () => Promise<void> }>> = {
  latency: { what: "10 names and a line of 100, RSA and EC, a CA 150 ms away", run: latency },
  throughput: { what: "20 names, RSA and EC, 10 at once, a CA on this host", run: throughput },
  idle: { what: "nothing due", run: idle },
  limits: { what: "2,000 new lines at a CA with limits", run: limits },
  deliver: { what: "200 sections with an upload and an update", run: deliveries },
  probe: { what: "500 endpoints with RSA and EC certificates", run: probes },
  forward: { what: "leforward, one connection per request", run: forward },
};

/** The versions of the programs: that of the Debian package if the program does not print it. */
async function versions(): Promise<string> {
  const flags = { lego: "--version", pebble: "-version", nginx: "-v", wrk: "-v", openssl: "version" };
  const found = [`deno ${Deno.version.deno}`];
  for (const [name, flag] of Object.entries(flags)) {
    const path = which(name);
    if (path === undefined) continue;
    const text = await output(path, flag) +
      (which("dpkg-query") ? await output("dpkg-query", "-W", name) : "");
    found.push(`${name} ${/\d+\.\d+[\w.+-]*/.exec(text)?.[0] ?? "of unknown version"}`);
  }
  return found.join(", ");
}

async function output(command: string, ...args: string[]): Promise<string> {
  const { stdout, stderr } = await new Deno.Command(command, { args }).output();
  return [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes)).join("");
}

const wanted = Deno.args.length === 0 ? Object.keys(PARTS) : Deno.args;
const unknown = wanted.find((name) => !Object.hasOwn(PARTS, name));
if (unknown !== undefined) {
  console.error(`bench: unknown part ${JSON.stringify(unknown)}; known: ${Object.keys(PARTS).join(", ")}`);
  Deno.exit(2);
}
const processors = `${navigator.hardwareConcurrency} processors`;
console.log(`${new Date().toISOString().slice(0, 10)}, ${processors}, ${await versions()}`);
for (const name of wanted) {
  const { what, run } = PARTS[name]!;
  console.log(`\n${name}: ${what}`);
  try {
    await run();
  } catch (error) {
    if (!(error instanceof Lacking)) throw error;
    console.log(`  not measured: ${error.message}`);
  }
}
Deno.exit(missedTargets() > 0 ? 1 : 0);
