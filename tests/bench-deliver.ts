/**
 * Delivery: the processor time per command, apart from its shell, for 200 sections with `cp` as upload and `true` as update;
 * and the delay before a delivery while another line waits for a silent host.
 */

import { existsSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { inTurns, measure, median, need, printFigure, seconds } from "./bench-measure.ts";
import { type Bed, testBed, until } from "./bed.ts";
import { LEMATT } from "./programs.ts";

const SECTIONS = 200;
const TURNS = 3;

export async function deliveries(): Promise<void> {
  need("cp", "sh");
  await commands();
  await waiting();
}

async function commands(): Promise<void> {
  const names = Array.from({ length: SECTIONS }, (_, i) => `host${i}.example.com`);
  await using bed = await testBed({ domains: names.join("\n"), settings: "keyTypes: ec\nari: no" });
  await bed.plant();
  mkdirSync(join(bed.home, "out"));
  const withoutCommands = names.map((name) => `[${name}]\ndomains: ${name}\n`).join("");
  const lists = `uploadCerts: ["cp CERTS ${bed.home}/out/"]\nupdate: ["true"]\n`;
  const withCommands = names.map((name) => `[${name}]\ndomains: ${name}\n${lists}`).join("");
  const lematt = [...LEMATT, "--test", "--config", bed.conf];
  const shell = `for i in $(seq ${SECTIONS}); do /bin/sh -c 'cp ${bed.path("domains")} ${bed.home}/out/'; ` +
    "/bin/sh -c true; done";
  const cpu = async (command: readonly string[]) => (await measure(command)).cpuSeconds;
  const [delivering, idle, shells] = await inTurns(
    TURNS,
    async () => {
      bed.configure({ actions: withCommands });
      await Deno.remove(bed.path("test/state.json")).catch(() => {});
      return await cpu(lematt);
    },
    async () => {
      bed.configure({ actions: withoutCommands });
      return await cpu(lematt);
    },
    () => cpu(["/bin/sh", "-c", shell]),
  ) as [number[], number[], number[]];
  const own = median(delivering.map((all, i) => (all - idle[i]! - shells[i]!) / (2 * SECTIONS) * 1000));
  printFigure(
    `${2 * SECTIONS} commands, processor time`,
    seconds(median(delivering)),
    `shells ${seconds(median(shells))}`,
  );
  printFigure("lematt's own time per command", `${own.toFixed(2)} ms`, "", { found: own, atMost: 2 });
}

async function waiting(): Promise<void> {
  await using bed = await testBed({
    domains: "quick.example.com\nslow.example.com\n",
    settings: "keyTypes: ec",
  });
  bed.configure({
    actions: `[quick]\ndomains: quick.example.com\nupdate: ["echo > ${bed.home}/delivered"]\n` +
      `[slow]\ndomains: slow.example.com\nprepare: ["sleep 60"]\n`,
  });
  const done = await issuedAndDelivered(bed);
  printFigure("from issuance to delivery", seconds(done), "while another line waits", {
    found: done,
    atMost: 0.2,
  });
}

/** Seconds between the certificate of the quick line and its delivery, while the self-check of the other line hangs. */
async function issuedAndDelivered(bed: Bed): Promise<number> {
  const stop = new AbortController();
  const silent = () =>
    new Promise<never>((_, reject) =>
      stop.signal.addEventListener("abort", () => reject(stop.signal.reason))
    );
  const route = (host: string) =>
    host.startsWith("slow") ? silent() : Promise.resolve([{ address: "127.0.0.1", port: bed.web.port }]);
  const run = bed.run({ route, signal: stop.signal });
  run.catch(() => {}); // it is interrupted below
  const marker = join(bed.home, "delivered");
  const mtime = (path: string) => Deno.statSync(path).mtime!.getTime();
  await until("the delivery is made", () => existsSync(marker), 60);
  stop.abort(new DOMException("done", "AbortError"));
  await run.catch(() => {});
  const cert = bed.path("test/cert/quick.example.com-cert-combined.prime256v1.test.pem");
  return Math.max(0, mtime(marker) - mtime(cert)) / 1000;
}
