/**
 * Measures the time and the memory of programs, and prints figures with their comparison and target.
 *
 * Processor time and peak memory are from GNU time. Single figures vary on a machine that is not idle, so programs that are
 * compared run in turns, and a ratio is the median of the ratios of all turns.
 */

import { existsSync } from "node:fs";
import { delimiter, join } from "node:path";

const GNU_TIME = "/usr/bin/time";

/** One run of a program to its end. */
export interface Cost {
  readonly wallSeconds: number;
  /** User and system time of the program and the children that it has waited for. */
  readonly cpuSeconds: number;
  /** The largest resident set. */
  readonly peakMegabytes: number;
}

/** A part cannot be measured on this host. The message says what is missing. */
export class Lacking extends Error {
  override readonly name = "Lacking";
}

/** Throws Lacking if one of the programs is not installed. */
export function need(...programs: readonly string[]): void {
  const missing = programs.filter((name) => which(name) === undefined);
  if (missing.length > 0) throw new Lacking(`not installed: ${missing.join(", ")}`);
}

/** The path of an installed program. The directories of system programs are searched as well as PATH. */
export function which(name: string): string | undefined {
  const directories = [...(Deno.env.get("PATH") ?? "").split(delimiter), "/usr/sbin", "/sbin"];
  return directories.map((directory) => join(directory, name)).find((path) => existsSync(path));
}

/** Runs a program and returns its cost. Throws if it fails, with its output. */
export async function measure(
  command: readonly string[],
  env: Readonly<Record<string, string>> = {},
): Promise<Cost> {
  if (!existsSync(GNU_TIME)) throw new Lacking("GNU time is not installed");
  const report = await Deno.makeTempFile({ prefix: "lematt-bench-" });
  try {
    const started = performance.now();
    const { code, stdout, stderr } = await new Deno.Command(GNU_TIME, {
      args: ["-q", "-o", report, "-f", "%U %S %M", ...command],
      env: { DENO_NO_UPDATE_CHECK: "1", ...env },
      stdin: "null",
    }).output();
    const wallSeconds = (performance.now() - started) / 1000;
    if (code !== 0) {
      const output = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes)).join("");
      throw new Error(`Cannot measure ${command.join(" ")}: status ${code}\n${output}`);
    }
    const [user, system, kilobytes] = (await Deno.readTextFile(report)).split(" ").map(Number);
    return { wallSeconds, cpuSeconds: user! + system!, peakMegabytes: kilobytes! / 1024 };
  } finally {
    await Deno.remove(report);
  }
}

/** Runs the functions in turns; returns `times` results of each. */
export async function inTurns<T>(times: number, ...functions: readonly (() => Promise<T>)[]): Promise<T[][]> {
  const results: T[][] = functions.map(() => []);
  for (let i = 0; i < times; i++) {
    for (const [index, run] of functions.entries()) results[index]!.push(await run());
  }
  return results;
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** The median of the ratios `ours / theirs` of all turns. */
export function ratio(ours: readonly number[], theirs: readonly number[]): number {
  return median(ours.map((value, i) => value / theirs[i]!));
}

/** A figure and its bound. */
export interface Target {
  readonly found: number;
  readonly atMost?: number;
  readonly atLeast?: number;
}

let missed = 0;

/** The number of targets missed so far. */
export function missedTargets(): number {
  return missed;
}

/** Prints a line: what was measured, the value, a comparison, and whether the target is met. */
export function printFigure(what: string, value: string, compared = "", target?: Target): void {
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
