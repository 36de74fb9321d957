/**
 * What a program costs, and how a figure is told: beside what it is compared with.
 *
 * Wall time is taken here, processor time and peak memory by GNU time. Single figures mean little on a machine that does
 * other things too, so everything that is compared runs in turns, and the ratio told is the median of the turns' ratios.
 */

import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";

const GNU_TIME = "/usr/bin/time";

/** One run of a program to its end. */
export interface Cost {
  readonly wallSeconds: number;
  /** User and system, of the program and all whose end it has awaited. */
  readonly cpuSeconds: number;
  /** The largest resident set. */
  readonly peakMegabytes: number;
}

/** Why a part cannot be measured here; the other parts can. */
export class Lacking extends Error {
  override readonly name = "Lacking";
}

/** Throws Lacking where one of the programs is not installed. */
export function need(...programs: readonly string[]): void {
  const missing = programs.filter((name) => which(name) === undefined);
  if (missing.length > 0) throw new Lacking(`not installed: ${missing.join(", ")}`);
}

/** The path of an installed program; administrators' directories are searched whatever PATH says. */
export function which(name: string): string | undefined {
  const directories = [...(Deno.env.get("PATH") ?? "").split(delimiter), "/usr/sbin", "/sbin"];
  return directories.map((directory) => join(directory, name)).find((path) => existsSync(path));
}

/** Runs a program and says what it cost. Throws where it fails, with what it said. */
export async function measure(
  command: readonly string[],
  env: Readonly<Record<string, string>> = {},
): Promise<Cost> {
  if (!existsSync(GNU_TIME)) throw new Lacking("GNU time is not installed");
  const report = await Deno.makeTempFile({ prefix: "lematt-bench-" });
  try {
    const begun = performance.now();
    const { code, stdout, stderr } = await new Deno.Command(GNU_TIME, {
      args: ["-q", "-o", report, "-f", "%U %S %M", ...command],
      env: { DENO_NO_UPDATE_CHECK: "1", ...env },
      stdin: "null",
    }).output();
    const wallSeconds = (performance.now() - begun) / 1000;
    if (code !== 0) {
      const said = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes)).join("");
      throw new Error(`Cannot measure ${command.join(" ")}: status ${code}\n${said}`);
    }
    const [user, system, kilobytes] = (await Deno.readTextFile(report)).split(" ").map(Number);
    return { wallSeconds, cpuSeconds: user! + system!, peakMegabytes: kilobytes! / 1024 };
  } finally {
    await Deno.remove(report);
  }
}

/** Runs things in turns: `times` results of each, in the order of `rivals`. */
export async function inTurns<T>(times: number, ...rivals: readonly (() => Promise<T>)[]): Promise<T[][]> {
  const results: T[][] = rivals.map(() => []);
  for (let i = 0; i < times; i++) {
    for (const [index, rival] of rivals.entries()) results[index]!.push(await rival());
  }
  return results;
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** The median over the turns of how many times `ours` is of `theirs`. */
export function ratio(ours: readonly number[], theirs: readonly number[]): number {
  return median(ours.map((value, i) => value / theirs[i]!));
}

/** A bound and what was found. */
export interface Target {
  readonly found: number;
  readonly atMost?: number;
  readonly atLeast?: number;
}

let missed = 0;

/** How many targets were missed so far. */
export function missedTargets(): number {
  return missed;
}

/** Prints a figure: what, how much, compared with what, and whether that is what is aimed at. */
export function tell(what: string, value: string, compared = "", target?: Target): void {
  let verdict = "";
  if (target !== undefined) {
    const { found, atMost = Infinity, atLeast = -Infinity } = target;
    const met = found <= atMost && found >= atLeast;
    if (!met) missed++;
    const bound = target.atMost === undefined ? `at least ${atLeast}` : `at most ${atMost}`;
    verdict = `[${bound}: ${met ? "yes" : "NO"}]`;
  }
  console.log(["  " + what.padEnd(38), value.padStart(12), ` ${compared}`, verdict].join(" ").trimEnd());
}

export const seconds = (value: number): string =>
  value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(2)} s`;
export const megabytes = (value: number): string => `${value.toFixed(0)} MB`;
export const times = (value: number): string => `${value.toFixed(2)} x`;
