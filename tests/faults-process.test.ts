/** Goal: killed at any moment, or with a disk that fails at any moment, lematt leaves nothing that the next run does not put right. */

import assert from "node:assert/strict";
import { setTimeout as delay } from "node:timers/promises";
import { ALL, pairs, randomFrom, Subject, sweep, upTo } from "./faults.ts";
import { missing, pointsOf, readingPointsOf, SITUATIONS, subjectIn, traced } from "./faults-strace.ts";
import { LEFORWARD } from "./programs.ts";

const ignore = missing !== undefined;
if (ignore) {
  console.warn(`faults-process.test.ts: no system call is tampered with, for strace says: ${missing}`);
}

/** A disk that is full, above quota, broken, not for this user, for nobody, or that of another machine and gone. */
const ERRORS = ["ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS", "ESTALE"];

/** Most of the time of a program under strace is waiting, for the CA and for strace. */
const AT_ONCE = 3;

for (const situation of SITUATIONS) {
  Deno.test({
    name: `lematt can be killed at any change that it makes to a file (${situation})`,
    ignore,
    async fn() {
      await sweep(`SIGKILL, ${situation}`, await pointsOf(situation), 1, async (point) => {
        await using subject = await subjectIn(situation);
        const { befell } = await traced(subject, situation, [point], "signal=SIGKILL");
        await subject.afterFault();
        await subject.recover();
        return befell;
      }, AT_ONCE);
    },
  });

  Deno.test({
    name: `any change that lematt makes to a file can fail (${situation})`,
    ignore,
    async fn() {
      const points = pairs(ERRORS, await pointsOf(situation));
      await sweep(`a failing disk, ${situation}`, points, 1, async ([error, point]) => {
        await using subject = await subjectIn(situation);
        const ran = await traced(subject, situation, [point], `error=${error}`);
        await subject.afterFault(ran);
        await subject.recover();
        return ran.befell;
      }, AT_ONCE);
    },
  });
}

/** A disk that is broken, for others, or that of another machine and gone; a system that is out of files. */
const READING_ERRORS = ["EIO", "EACCES", "ESTALE", "EMFILE"];

for (const situation of ["renewal", "delivery owed"]) {
  Deno.test({
    name: `any file that lematt reads can be out of reach (${situation})`,
    ignore,
    async fn() {
      const points = pairs(READING_ERRORS, await readingPointsOf(situation));
      await sweep(`a file out of reach, ${situation}`, points, 1, async ([error, point]) => {
        await using subject = await subjectIn(situation);
        const account = subject.bed.text("account.key");
        const ran = await traced(subject, situation, [point], `error=${error}`);
        await subject.afterFault(ran);
        assert.equal(subject.bed.text("account.key"), account);
        subject.dropUnusable();
        await subject.recover();
        return ran.befell;
      }, AT_ONCE);
    },
  });
}

Deno.test("lematt can be interrupted at any moment, and no prepare command listens on", async () => {
  const random = randomFrom();
  const signals = ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"] as const;
  await sweep("signals at random moments", pairs(upTo(ALL ? 25 : 1), signals), 2, async ([, signal]) => {
    await using subject = await Subject.create({
      settings: "keyTypes: ec\npreflight: no\nari: no",
      ca: { validationDelayMs: 500 },
    });
    const { bed } = subject;
    const port = Deno.listen({ port: 0 });
    const options = ["--baseurl", `http://127.0.0.1:${bed.web.port}`, "--port", `${port.addr.port}`];
    port.close();
    subject.configure({ prepare: `exec ${[...LEFORWARD, ...options].join(" ")}` });
    bed.ca.switches.httpPort = port.addr.port;

    const child = bed.start("--test");
    const output = child.output();
    await delay(random(1500));
    let interrupted = true;
    try {
      child.kill(signal);
    } catch {
      interrupted = false; // it was done before
    }
    const { stderr } = await output;
    await subject.afterFault({ stderr: new TextDecoder().decode(stderr) });
    Deno.listen({ port: port.addr.port }).close();
    if (signal !== "SIGKILL") assert.deepEqual(bed.dropped(), []);
    subject.configure();
    bed.ca.switches.httpPort = bed.web.port;
    await subject.recover();
    return interrupted;
  });
});
