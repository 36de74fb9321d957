/**
 * The program under strace, which kills it at a system call or has the call fail (`strace -e inject`, strace(1)).
 *
 * strace counts calls by thread, and Deno changes files in threads that it chooses as it likes. So a point is named by
 * what is certain: the situation in which the program starts, the file, the call, and its number, which is more than the
 * first in the main thread alone. What other threads do to one file several times (to state.json, mostly) is met in
 * situations that begin between one time and the next.
 */

import assert from "node:assert/strict";
import { join, relative } from "node:path";
import { Store } from "../lib/store.ts";
import { publicKeyHash } from "../lib/x509.ts";
import { PROGRAM, Subject, textOf } from "./faults.ts";
import { type Ended, output } from "./programs.ts";

/** Every call that changes a file or a directory; not all exist on all machines, hence the question marks. */
const CHANGING =
  ("openat write pwrite64 fsync fdatasync ftruncate fchmod chmod fchmodat rename renameat renameat2 " +
    "link linkat symlink symlinkat unlink unlinkat rmdir mkdir mkdirat")
    .split(" ").map((call) => `?${call}`).join();

/** Stops the program only at the traced calls, which saves half the time; strace 6.1 sends no signals then. */
const QUICK = "--seccomp-bpf";

/** Why strace cannot be used here; undefined where it can. */
export const missing = await output(
  ["strace", "-f", QUICK, "-o", "/dev/null", "-e", "inject=fsync:error=EIO", "true"],
).then(({ code, stderr }) => code === 0 ? undefined : stderr.trim(), (error: Error) => error.message);

export interface Point {
  /** Relative to the test bed's home. */
  readonly path: string;
  readonly call: string;
  /** Its number among such calls for that path in its thread, from 1. */
  readonly when: number;
  readonly reads: boolean;
}

/** What the program finds when it starts. */
const PREPARED: Readonly<Record<string, (subject: Subject) => Promise<void>>> = {
  /** No account, no certificate, no state. */
  "first run": () => Promise.resolve(),
  /** Everything is there, and new keys are due for all. */
  "renewal": renewal,
  /** Nothing is due, and everything is to be delivered. */
  async "delivery"({ bed }) {
    await bed.run();
    Deno.writeTextFileSync(bed.path("test/state.json"), JSON.stringify({ ...bed.state(), receipts: {} }));
  },
  /** A renewal was killed with a new key in its place, and the certificate for it not yet. */
  async "cut off in a commit"(subject) {
    await renewal(subject);
    const points = (await pointsIn("renewal"))
      .filter(({ call, path }) => call.startsWith("rename") && path.startsWith("conf/test/cert/."));
    const { injected } = await traced(subject, "renewal", points, "signal=SIGKILL", "--parallel", "1");
    assert(injected);
    const leftIn = (directory: string) =>
      [...Deno.readDirSync(subject.bed.path("test", directory))].filter(({ name }) => name.endsWith(".new"));
    assert.deepEqual(["key", "cert"].map((one) => leftIn(one).length), [0, 1], "the key is renamed first");
    await subject.afterFault();
  },
  /** The account gets another key; a certificate is missing, so that the next run contacts the CA. */
  async "rollover"(subject) {
    await subject.bed.run();
    Deno.removeSync(subject.inventory()[1]!.files.cert);
  },
};

export const SITUATIONS = Object.keys(PREPARED);

export async function subjectIn(situation: string): Promise<Subject> {
  // after being killed it has forgotten when to ask again
  const subject = await Subject.create({ settings: `${PROGRAM}\nari: no`, ca: { reuse: "none" } });
  await PREPARED[situation]!(subject);
  subject.begin();
  return subject;
}

async function renewal(subject: Subject): Promise<void> {
  await subject.bed.run({ parallel: 1 }); // so that it is certain which line is first to expire
  using store = await Store.open(subject.bed.config(), subject.bed.ca.now);
  for (const { files } of subject.inventory()) await store.revoke(publicKeyHash(textOf(files.cert)));
}

const found: Record<string, Promise<readonly Point[]>> = {};

/** The calls by which the program changes files, or opens them to read, when it starts in that situation. */
export const pointsIn = (situation: string): Promise<readonly Point[]> =>
  found[situation] ??= findPoints(situation);

async function findPoints(situation: string): Promise<readonly Point[]> {
  await using subject = await subjectIn(situation);
  const ended = await traced(subject, situation);
  assert.equal(ended.code, 0, ended.stderr);
  const points = new Map<string, Point>();
  const counts = new Map<string, number>();
  const main = /^\d+/.exec(ended.trace)![0];
  for (const [, thread, call, rest] of ended.trace.matchAll(/^(\d+) +(\w+)\((.*)/gm)) {
    const file = /["<](\/[^">]*)/.exec(rest!.replace(/^AT_FDCWD<.*?>/, ""))?.[1] ?? "";
    const path = relative(subject.bed.home, file);
    if (!/^conf\b/.test(path)) continue; // challenge files have another name the next time
    const counted = `${thread} ${call} ${path}`;
    const when = (counts.get(counted) ?? 0) + 1;
    counts.set(counted, when);
    if (when > 1 && thread !== main) continue;
    const reads = call === "openat" && !rest!.includes("O_CREAT");
    points.set(`${call} ${path} ${when}`, { path, call: call!, when, reads });
  }
  const all = [...points.values()];
  const pathsOf = (call: string) =>
    new Set(all.filter((one) => one.call.startsWith(call) && !one.reads).map(({ path }) => path));
  const unflushed = pathsOf("openat").intersection(pathsOf("rename")).difference(pathsOf("fsync"));
  assert.deepEqual([...unflushed], [], "files are flushed before they are renamed");
  return all;
}

/**
 * Runs the program to its end, with `injection` (as strace has it, `signal=…` or `error=…`) at a point, or at the first
 * of several that it comes to, which must be the same call.
 */
export async function traced(
  subject: Subject,
  situation: string,
  points: readonly Point[] = [],
  injection = "",
  ...more: string[]
): Promise<Ended & { trace: string; injected: boolean }> {
  const { bed } = subject;
  const output = join(bed.home, "trace");
  const options = ["-f", "-qq", "-y", "-s0", "-esignal=none", "-o", output];
  if (!injection.startsWith("signal=")) options.push(QUICK);
  for (const { path } of points) options.push("-P", join(bed.home, path));
  const [first] = points;
  options.push("-e", first === undefined ? `trace=${CHANGING}` : `trace=${first.call}`);
  if (first !== undefined) options.push("-e", `inject=${first.call}:${injection}:when=${first.when}`);
  const task = situation === "rollover" ? ["--rollover", "--yes"] : ["--retry", ...more];
  const ended = await bed.lemattBy(["strace", ...options], "--test", ...task);
  const trace = textOf(output);
  return { ...ended, trace, injected: trace.includes("(INJECTED)") || ended.code === 128 + 9 };
}
