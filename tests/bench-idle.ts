/**
 * The cost of a run with nothing due, for 1, 5,000 and 50,000 lines.
 *
 * The files are as after a run: for each line two certificates with their chains and keys, and renewal windows in state.json, so
 * that the CA is not asked. All lines have the same keys but different names, which are checked.
 */

import { generateKeyPairSync, type KeyObject } from "node:crypto";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type KeyType, loadConfig } from "../lib/config.ts";
import { emptyState, type Renewal } from "../lib/state.ts";
import { readInventory } from "../lib/store.ts";
import { readCertificate } from "../lib/x509.ts";
import { certify, createAuthority } from "./ca-x509.ts";
import { PemConverter } from "@peculiar/x509";
import {
  type Cost,
  inTurns,
  measure,
  median,
  megabytes,
  printFigure,
  ratio,
  seconds,
  times,
} from "./bench-measure.ts";
import { LEMATT } from "./programs.ts";

const DAY = 86_400_000;
const TURNS = 5;
const SIZES = [
  { lines: 5_000, atMostSeconds: 0.8, atMostMegabytes: 150 },
  { lines: 50_000, atMostSeconds: 8, atMostMegabytes: 800 },
];
const WAYS = [["--test", "--cron"], ["--test", "--plan"], ["--test", "--status", "--offline"]] as const;

export async function idle(): Promise<void> {
  const home = await Deno.makeTempDir({ prefix: "lematt-bench-idle-" });
  try {
    await oneLine(home);
    const walls: number[] = [];
    for (const size of SIZES) walls.push(await many(home, size));
    const [few, lots] = walls as [number, number];
    printFigure("--cron with 10 times as many lines", times(lots / few), "the time", {
      found: lots / few,
      atMost: 11,
    });
  } finally {
    await Deno.remove(home, { recursive: true });
  }
}

async function oneLine(home: string): Promise<void> {
  const conf = await makeTree(join(home, "1"), 1);
  const empty = join(home, "empty.ts");
  await Deno.writeTextFile(empty, "");
  const [nothing, help, ...costs] = await inTurns(
    3 * TURNS,
    () => measure([Deno.execPath(), "run", "-q", "--no-prompt", empty]),
    () => measure([...LEMATT, "--help"]),
    ...WAYS.map((way) => () => measure([...LEMATT, ...way, conf])),
  ) as [Cost[], Cost[], ...Cost[][]];
  const walls = (cost: readonly Cost[]) => cost.map(({ wallSeconds }) => wallSeconds);
  printFigure("deno run of an empty file", seconds(median(walls(nothing))));
  const printRatio = (what: string, cost: readonly Cost[]) => {
    const found = ratio(walls(cost), walls(nothing));
    printFigure(what, seconds(median(walls(cost))), `${times(found)} the empty file`, { found, atMost: 3.5 });
  };
  printRatio("lematt.ts --help", help);
  for (const [i, way] of WAYS.entries()) {
    printRatio(`1 line, nothing due, ${way.slice(1).join(" ")}`, costs[i]!);
  }
}

/** Returns the wall time of --cron. */
async function many(
  home: string,
  { lines, atMostSeconds, atMostMegabytes }: typeof SIZES[number],
): Promise<number> {
  const conf = await makeTree(join(home, `${lines}`), lines);
  const costs = await inTurns(TURNS, ...WAYS.map((way) => () => measure([...LEMATT, ...way, conf])));
  for (const [i, way] of WAYS.entries()) {
    const what = `${(2 * lines).toLocaleString("en")} certificates, ${way.slice(1).join(" ")}`;
    const wall = median(costs[i]!.map(({ wallSeconds }) => wallSeconds));
    const cpu = median(costs[i]!.map(({ cpuSeconds }) => cpuSeconds));
    const peak = median(costs[i]!.map(({ peakMegabytes }) => peakMegabytes));
    printFigure(what, seconds(wall), `${seconds(cpu)} of processor time`, {
      found: wall,
      atMost: atMostSeconds,
    });
    printFigure("", megabytes(peak), `${(peak * 1024 / lines).toFixed(1)} KB per line`, {
      found: peak,
      atMost: atMostMegabytes,
    });
  }
  return median(costs[0]!.map(({ wallSeconds }) => wallSeconds));
}

/** Makes a configuration directory with `lines` lines and all their certificates; returns its path. */
async function makeTree(conf: string, lines: number): Promise<string> {
  mkdirSync(conf);
  writeFileSync(
    join(conf, "lematt.conf"),
    "[config]\nchallengeDropDir: .\naccountKey: account.key\ntestDirectory: https://localhost:1/dir\n",
  );
  writeFileSync(join(conf, "actions.conf"), "");
  const labels = Array.from({ length: lines }, (_, i) => `${i}`.padStart(PLACE.length, "host0000000"));
  writeFileSync(join(conf, "domains"), labels.map((label) => `${label}.example.com\n`).join(""));
  const config = loadConfig("test", conf);

  const now = Date.now();
  const forge = await forger({ notBefore: new Date(now - DAY), notAfter: new Date(now + 89 * DAY) });
  for (const directory of ["test", "test/key", "test/csr", "test/cert"]) mkdirSync(join(conf, directory));
  const window = { start: at(now + 59 * DAY), end: at(now + 61 * DAY), at: at(now + 60 * DAY) };
  const renewals: Record<string, Renewal> = {};
  for (const entry of readInventory(config)) {
    const { chainPem, keyPem } = forge(entry.line.names[0]!.split(".")[0]!, entry.keyType);
    const files = entry.files;
    writeFileSync(files.cert, chainPem);
    writeFileSync(files.key, keyPem, { mode: 0o600 });
    renewals[readCertificate(chainPem).id!] = { account: ACCOUNT, window, askAt: at(now + DAY / 4) };
  }
  const state = { ...emptyState(), renewals };
  writeFileSync(join(conf, "test/state.json"), JSON.stringify(state, undefined, 1));
  return conf;
}

const ACCOUNT = "https://localhost:1/dir NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs";
const at = (ms: number) => new Date(ms).toISOString();

/** Placeholder in a certificate for the first label of its name and for its serial number. */
const PLACE = "host0000000";

/**
 * Makes certificates with chain and key twenty times faster than by signing: all certificates of a key type have the signature
 * of the first. It is invalid, but lematt checks names and key of a certificate on disk, not the signature.
 */
async function forger(valid: { readonly notBefore: Date; readonly notAfter: Date }) {
  const [root, issuer] = [createAuthority("lematt bench root"), createAuthority("lematt bench intermediate")];
  const { commonName, publicKey } = issuer;
  const chain = await certify({ commonName, publicKey, authority: true, ...valid }, root);
  const template = async ({ publicKey, privateKey }: { publicKey: KeyObject; privateKey: KeyObject }) => {
    const name = `${PLACE}.example.com`;
    const serial = Buffer.from(PLACE).toString("hex");
    const leafPem = await certify({ commonName: name, publicKey, names: [name], serial, ...valid }, issuer);
    const leaf = PemConverter.decodeFirst(leafPem);
    return { leaf, keyPem: privateKey.export({ format: "pem", type: "pkcs8" }) };
  };
  const templates = {
    rsa: await template(generateKeyPairSync("rsa", { modulusLength: 2048 })),
    ec: await template(generateKeyPairSync("ec", { namedCurve: "P-256" })),
  };
  return (label: string, keyType: KeyType) => {
    const { leaf, keyPem } = templates[keyType];
    const der = Buffer.from(Buffer.from(leaf).toString("latin1").replaceAll(PLACE, label), "latin1");
    return { chainPem: `${PemConverter.encode(der, "CERTIFICATE")}\n${chain}`, keyPem };
  };
}
