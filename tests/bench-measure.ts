/**
 * Measures the time and the memory of programs, and prints figures with their targets.
 *
 * Processor time and peak memory are from GNU time. Single figures vary on a machine that is not idle, so programs that are
 * compared run in turns, and a ratio is the median of the ratios of all turns.
 */

import { output, which } from "./programs.ts";

/** One run of a program to its end, with the children that it has waited for. */
export interface Cost {
  readonly seconds: number;
  readonly cpuSeconds: number;
  /** The largest resident set. */
  readonly peakMegabytes: number;
}

/** Runs a program and returns its cost. Throws if it fails. */
export async function measure(...command: readonly string[]): Promise<Cost> {
  const started = performance.now();
  const { code, stdout, stderr } = await output([which("time")!, "-q", "-f", "%U %S %M", ...command]);
  const seconds = (performance.now() - started) / 1000;
  if (code !== 0) throw new Error(`${command.join(" ")}: status ${code}\n${stdout}${stderr}`);
  const [user, system, kilobytes] = stderr.trim().split("\n").at(-1)!.split(" ").map(Number);
  return { seconds, cpuSeconds: user! + system!, peakMegabytes: kilobytes! / 1024 };
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
  return (sorted[(sorted.length - 1) >> 1]! + sorted[sorted.length >> 1]!) / 2;
}

/** The median of the ratios `ours / theirs` of all turns. */
export function ratio(ours: readonly number[], theirs: readonly number[]): number {
  return median(ours.map((value, i) => value / theirs[i]!));
}

/** Whether a target has been missed so far. */
export let missed = false;

/** Prints what was measured, the value with its unit, and whether it meets its target. */
export function figure(what: string, value: number, unit: string, atMost?: number): void {
  const shown = `${Number(value.toPrecision(3)).toLocaleString("en")} ${unit}`;
  const met = atMost === undefined || value <= atMost;
  missed ||= !met;
  const verdict = atMost === undefined ? "" : `  [at most ${atMost}: ${met ? "yes" : "NO"}]`;
  console.log(`  ${what.padEnd(54)}${shown.padStart(12)}${verdict}`);
}
