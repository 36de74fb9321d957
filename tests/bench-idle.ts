/**
 * The cost of a run with nothing due, for 1, 5,000 and 50,000 lines.
 *
 * The files are as after a run: for each line two certificates with their chains and keys, and renewal windows in state.json, so
 * that the CA is not asked. All lines have the same keys but different names, which are checked.
 */

import { PemConverter } from "@peculiar/x509";
import { X509Certificate } from "node:crypto";
import { emptyState } from "../lib/state.ts";
import { readInventory } from "../lib/store.ts";
import { generateKey, readCertificate } from "../lib/x509.ts";
import { type Bed, testBed } from "./bed.ts";
import { figure, inTurns, measure, median, ratio } from "./bench-measure.ts";
import { LEMATT } from "./programs.ts";

const DAY = 86_400_000;
const TURNS = 5;
const SIZES = [
  { lines: 5_000, seconds: 0.8, megabytes: 150 },
  { lines: 50_000, seconds: 8, megabytes: 800 },
];
const WAYS = ["--cron", "--plan", "--status --offline"];

export async function idle(): Promise<void> {
  await using bed = await testBed();
  const run = (way: string) => () => measure(...LEMATT, "--test", ...way.split(" "), bed.conf);
  await fill(bed, 1);
  await Deno.writeTextFile(`${bed.home}/empty.ts`, "");
  const empty = () => measure(Deno.execPath(), "run", "-q", "--no-prompt", `${bed.home}/empty.ts`);
  const turns = await inTurns(3 * TURNS, empty, run("--help"), ...WAYS.map(run));
  const [nothing, ...ours] = turns.map((costs) => costs.map(({ seconds }) => seconds));
  figure("an empty program", median(nothing!) * 1000, "ms");
  for (const [i, way] of ["--help", ...WAYS].entries()) {
    figure(`1 line, ${way}`, median(ours[i]!) * 1000, "ms");
    figure(`1 line, ${way}, beside the empty program`, ratio(ours[i]!, nothing!), "x", 3.5);
  }

  const cron: number[] = [];
  for (const { lines, seconds, megabytes } of SIZES) {
    await fill(bed, lines);
    for (const [i, costs] of (await inTurns(TURNS, ...WAYS.map(run))).entries()) {
      const what = `${(2 * lines).toLocaleString("en")} certificates, ${WAYS[i]}`;
      const found = median(costs.map(({ seconds }) => seconds));
      if (i === 0) cron.push(found);
      figure(what, found, "s", seconds);
      figure(what, median(costs.map(({ peakMegabytes }) => peakMegabytes)), "MB", megabytes);
    }
  }
  figure("--cron with 10 times as many lines", cron[1]! / cron[0]!, "x", 11);
}

/**
 * Puts all certificates of `lines` lines in place, twenty times faster than by signing: all of a key type have the signature of
 * the first. It is invalid, but lematt checks names and key of a certificate on disk, not the signature.
 */
async function fill(bed: Bed, lines: number): Promise<void> {
  const label = (line: number) => `host${`${line}`.padStart(7, "0")}`;
  bed.configure({
    domains: Array.from({ length: lines }, (_, i) => `${label(i + 1)}.example.com\n`).join(""),
  });
  const from = (days: number) => new Date(Date.now() + days * DAY);
  const templateOf = async (keyPem: string) => {
    const chain = await bed.ca.forge(keyPem, [`${label(0)}.example.com`], {
      notBefore: from(-1),
      notAfter: from(89),
    });
    const [leaf, ...issuers] = PemConverter.decode(chain).map((der) => Buffer.from(der).toString("latin1"));
    const serial = Buffer.from(new X509Certificate(chain).serialNumber, "hex").toString("latin1");
    return { keyPem, leaf: leaf!, serial, issuers };
  };
  const templates = {
    rsa: await templateOf(await generateKey({ type: "rsa", bits: 2048 })),
    ec: await templateOf(await generateKey({ type: "ec", curve: "P-256" })),
  };
  const state = emptyState();
  const window = { start: from(59).toISOString(), end: from(61).toISOString(), at: from(60).toISOString() };
  const account = `${bed.ca.directoryUrl} NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs`;
  for (const name of ["key", "csr", "cert"]) await Deno.mkdir(bed.path("test", name), { recursive: true });
  for (const { line, keyType, files } of readInventory(bed.config())) {
    const { keyPem, leaf, serial, issuers } = templates[keyType];
    const own = line.names[0]!.split(".")[0]!;
    const named = leaf.replaceAll(label(0), own).replace(serial, own.padEnd(serial.length));
    const ders = [named, ...issuers].map((der) => Buffer.from(der, "latin1"));
    const chainPem = PemConverter.encode(ders, "CERTIFICATE");
    Deno.writeTextFileSync(files.cert, chainPem);
    Deno.writeTextFileSync(files.key, keyPem, { mode: 0o600 });
    state.renewals[readCertificate(chainPem).id!] = { account, window, askAt: from(0.25).toISOString() };
  }
  await Deno.writeTextFile(bed.path("test/state.json"), JSON.stringify(state, undefined, 1));
}
