/**
 * The program under strace, which kills it at a system call or has the call fail (`strace -e inject`, strace(1)).
 *
 * strace counts calls by thread, and Deno changes files in threads that it chooses as it likes. So a point is named by
 * what is certain: the situation in which the program starts, the file, the call, and the how-manieth it is, which can
 * be more than the first in the main thread alone. What other threads do to one file several times (to state.json,
 * mostly) is met in situations that begin between one time and the next.
 */

import assert from "node:assert/strict";
import { join, relative } from "node:path";
import { AcmeClient, importAccountKey } from "../lib/acme.ts";
import { certFile, owe } from "../lib/deliver.ts";
import { filesOf, type State, Store } from "../lib/store.ts";
import type { Ended } from "./bed.ts";
import { Subject, textOf } from "./faults.ts";

/** Every call that changes a file or a directory; not all exist on all machines, hence the question marks. */
const CHANGING = [
  "openat write pwrite64 fsync fdatasync ftruncate fchmod chmod fchmodat rename renameat renameat2",
  "link linkat symlink symlinkat unlink unlinkat rmdir mkdir mkdirat",
].flatMap((names) => names.split(" ")).map((name) => `?${name}`).join();

/** Why strace cannot be used here; undefined where it can. */
export const missing = await (async () => {
  try {
    const args = ["-f", "-o", "/dev/null", "-e", "inject=fsync:error=EIO", "true"];
    const { success, stderr } = await new Deno.Command("strace", { args }).output();
    return success ? undefined : new TextDecoder().decode(stderr).trim();
  } catch (error) {
    return (error as Error).message;
  }
})();

/** A system call of the program. */
export interface Point {
  readonly situation: string;
  /** Relative to the test bed's home; a challenge file by its name instead of its token. */
  readonly path: string;
  readonly call: string;
  /** The how-manieth such call for that path of the thread that makes it. */
  readonly when: number;
}

/** What the program finds when it starts. */
const PREPARED: Readonly<Record<string, (subject: Subject) => Promise<void>>> = {
  /** No account, no certificate, no state. */
  "first run": () => Promise.resolve(),
  /** Everything is there, and new keys are due for all. */
  "renewal": renewal,
  /** Nothing is due, and a delivery is owed. */
  async "delivery owed"(subject) {
    await subject.bed.run();
    await inState(subject, (state, now) => {
      for (const { line, keyType, stem, finding } of subject.inventory()) {
        assert(finding.kind === "present");
        const name = certFile(subject.bed.config(), "test", { stem, keyType });
        owe(state, line, name, finding.certificate.fingerprint, now);
      }
    });
  },
  /** A renewal was killed with its new key in place and the new certificate not yet. */
  async "cut off in a commit"(subject) {
    await renewal(subject);
    const [commit] = (await pointsOf("renewal"))
      .filter(({ call, path }) => call.startsWith("rename") && path.startsWith("conf/test/cert/."));
    await traced(subject, commit!, "signal=SIGKILL");
    await subject.afterFault();
  },
  /** The account gets another key; a certificate is missing, for the next run to speak to the CA. */
  async "rollover"(subject) {
    await subject.bed.run();
    const [, solo] = subject.inventory();
    Deno.removeSync(filesOf(subject.bed.config(), "test", solo!).cert);
  },
};

export const SITUATIONS = Object.keys(PREPARED);

/** A subject in a situation. */
export async function subjectIn(situation: string): Promise<Subject> {
  const subject = await Subject.create({
    settings: "keyTypes: ec\npreflight: no",
    ca: { reuse: "none", renewalInfo: false }, // who is killed forgets when to ask again
  });
  await PREPARED[situation]!(subject);
  subject.countOrders();
  return subject;
}

async function renewal(subject: Subject): Promise<void> {
  await subject.bed.run();
  await inState(subject, (state, now) => {
    for (const { finding } of subject.inventory()) {
      assert(finding.kind === "present");
      state.revoked[finding.certificate.fingerprint] = now.toISOString();
    }
  });
  // the CA will offer the challenges of these orders again, so that the names of challenge files are known
  const { ca } = subject.bed;
  const key = await importAccountKey(subject.bed.text("account.key"));
  const client = await AcmeClient.connect(ca.directoryUrl, key, { contact: [] }, subject.bed.world());
  await Promise.all(subject.bed.config().lines.map(({ names }) => client.newOrder(names)));
  ca.switches.reuse = "pending";
}

async function inState(subject: Subject, change: (state: State, now: Date) => void): Promise<void> {
  const { bed } = subject;
  using store = Store.open(bed.config(), "test", bed.ca.now);
  change(store.state, bed.ca.now);
  await store.saveState();
}

/** name -> token of its pending http-01 challenge */
function tokens({ bed: { ca } }: Subject): Map<string, string> {
  const authorizations = ca.orders.flatMap(({ authorizations }) => authorizations);
  return new Map(
    authorizations.filter(({ status }) => status === "pending").map(({ identifier, challenges }) => [
      identifier.value,
      challenges.find(({ type }) => type === "http-01")!.token,
    ]),
  );
}

/** The calls by which the program changes files when it starts in that situation. */
export function pointsOf(situation: string): Promise<readonly Point[]> {
  return found[situation] ??= findPoints(situation);
}
const found: Record<string, Promise<readonly Point[]>> = {};

async function findPoints(situation: string): Promise<Point[]> {
  await using subject = await subjectIn(situation);
  const { home } = subject.bed;
  const names = new Map([...tokens(subject)].map(([name, token]) => [`drop/${token}`, `drop/${name}`]));
  const ended = await traced(subject, { situation });
  assert.equal(ended.code, 0, ended.stderr);
  const points = new Map<string, Point>();
  const counts = new Map<string, number>();
  const main = /^\d+/.exec(ended.trace)![0];
  for (const line of ended.trace.split("\n")) {
    const [, thread, call, rest] = /^(\d+) +(\w+)\((.*)/.exec(line) ?? [];
    const file = /["<](\/[^">]*)/.exec(rest?.replace(/^AT_FDCWD<.*?>/, "") ?? "")?.[1] ?? "";
    const inHome = relative(home, file);
    if (!/^(conf|drop)\b/.test(inHome)) continue;
    const path = names.get(inHome) ?? inHome;
    if (/^drop\/[^.]+$/.test(path)) continue; // will have another name the next time
    const counted = `${thread} ${call} ${path}`;
    const when = (counts.get(counted) ?? 0) + 1;
    counts.set(counted, when);
    if (call === "openat" && !rest!.includes("O_CREAT")) continue;
    if (when > 1 && thread !== main) continue;
    points.set(`${call} ${path} ${when}`, { situation, path, call: call!, when });
  }
  return [...points.values()];
}

/** Runs the program to its end, with `inject` (strace's word for what is to be done) at a point. */
export async function traced(
  subject: Subject,
  point: Point | Pick<Point, "situation">,
  inject?: string,
): Promise<Ended & { trace: string; befell: boolean }> {
  const { bed } = subject;
  const output = join(bed.home, "trace");
  const at = !("path" in point) ? [] : [
    "-P",
    join(bed.home, point.path.replace(/(?<=^drop\/).*/, (name) => tokens(subject).get(name) ?? name)),
    "-e",
    `inject=${point.call}:${inject}:when=${point.when}`,
  ];
  const options = ["-f", "-qq", "-y", "-s0", "-esignal=none", "-o", output, `-etrace=${CHANGING}`];
  const ended = await subject.program(
    ["strace", ...options, ...at],
    "--test",
    point.situation === "rollover" ? "--rollover" : "--retry",
  );
  const trace = textOf(output);
  return { ...ended, trace, befell: trace.includes("(INJECTED)") || ended.code === 128 + 9 };
}
