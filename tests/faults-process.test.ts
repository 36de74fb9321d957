/** Goal: killed at any moment, or with a disk that fails at any moment, lematt leaves nothing that the next run does not put right. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { readInventory } from "../lib/store.ts";
import { testBed } from "./bed.ts";
import { ALL, pairs, PROGRAM, randomFrom, Subject, sweep, upTo } from "./faults.ts";
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

for (const situation of ["renewal", "delivery"]) {
  Deno.test({
    name: `any file that lematt reads can be out of reach (${situation})`,
    ignore,
    async fn() {
      const points = pairs(READING_ERRORS, await readingPointsOf(situation));
      await sweep(`a file out of reach, ${situation}`, points, 1, async ([error, point]) => {
        await using subject = await subjectIn(situation);
        const account = subject.bed.text("account.key.test");
        const ran = await traced(subject, situation, [point], `error=${error}`);
        await subject.afterFault(ran);
        assert.equal(subject.bed.text("account.key.test"), account);
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
      settings: `${PROGRAM}\nari: no`,
      ca: { validationDelayMs: 500 },
    });
    const { bed } = subject;
    const hostname = `127.${1 + random(200)}.${random(250)}.${1 + random(200)}`; // where no other test listens
    const listener = Deno.listen({ hostname, port: 0 });
    const { port } = listener.addr;
    listener.close();
    const options = `--baseurl http://127.0.0.1:${bed.web.port} --host ${hostname} --port ${port}`;
    subject.configure({ prepare: `exec ${LEFORWARD.join(" ")} ${options}` });
    bed.ca.switches.resolve = () => ({ hostname, port });

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
    Deno.listen({ hostname, port }).close();
    if (signal !== "SIGKILL") assert.deepEqual(bed.dropped(), []);
    subject.configure();
    bed.ca.switches.resolve = undefined;
    await subject.recover();
    return interrupted;
  });
});

// ---- deliveries --------------------------------------------------------------------------------------------------

const LISTS = ["uploadCerts", "uploadKeys", "uploadEach", "update"];
const SECTIONS = ["site", "mail", "every"];
const MOMENTS = pairs(SECTIONS, LISTS).flatMap((step) => pairs([step], ["before", "after"]))
  .map(([[section, list], when]) => `${section}-${list}-${when}`);

Deno.test("killed at any moment of a delivery, lematt delivers everything in the next run, and nothing twice that was done", async () => {
  // a moment: each command of each section kills lematt before its work and after it
  const work: Record<string, string> = {
    uploadCerts: "cp -L CERTS HERE/SECTION",
    uploadKeys: "cp -L KEYS HERE/SECTION",
    uploadEach: "cp CERT_FILE HERE/SECTION/KEY_TYPE.pem",
    update: "echo >> HERE/SECTION/updated",
  };
  const points = pairs(MOMENTS, ["a rollout", "new certificates"]);
  await sweep("SIGKILL in a delivery", points, 3, async ([moment, situation]) => {
    const names = { site: "example.com", mail: "mail.example.com" };
    await using bed = await testBed({
      domains: Object.values(names).join("\n"),
      settings: `${PROGRAM}\nari: no`, // the CA does not know what is planted
    });
    const sections = SECTIONS.map((section) => {
      Deno.mkdirSync(join(bed.home, section));
      const kill = (when: string) =>
        `if rm HERE/${section}-${when} 2>/dev/null; then kill -KILL $PPID; exit 1; fi`;
      const lists = LISTS.map((list) => {
        const own = work[list]!.replaceAll("SECTION", section);
        return `${list}: ${JSON.stringify([`${kill(`${list}-before`)}; ${own}; ${kill(`${list}-after`)}`])}`;
      });
      const domains = section === "every" ? [] : [`domains: ${names[section as keyof typeof names]}`];
      return [`[${section}]`, ...domains, "rehearse: yes", ...lists].join("\n");
    });
    bed.act(sections.join("\n\n"));
    if (situation === "a rollout") await bed.plant();
    Deno.writeTextFileSync(join(bed.home, moment), "");
    const { code } = await bed.lemattBy([], "--test");
    assert.equal(code, 128 + 9);
    assert(!existsSync(join(bed.home, moment)));
    const isWritten = existsSync(bed.path("test/state.json"));
    const done = isWritten ? Object.keys(bed.state().receipts) : [];

    const again = await bed.lematt("--test");
    assert.equal(again.code, 0, again.stderr);
    const killed = moment.split("-")[0]!;
    assert(!done.includes(killed));
    for (const section of SECTIONS) {
      const updates = again.stdout.includes(`[${section}] `);
      assert.equal(updates, !done.includes(section), `[${section}] after ${moment}: ${again.stdout}`);
      for (const { line, files } of readInventory(bed.config())) {
        if (!line.sections.some(({ name }) => name === section)) continue;
        for (const path of [files.cert, files.key]) {
          const copy = join(bed.home, section, path.split("/").at(-1)!);
          assert.equal(Deno.readTextFileSync(copy), Deno.readTextFileSync(path));
        }
      }
    }
    assert.equal((await bed.lematt("--test")).stdout.includes("delivered"), false);
    assert(bed.ca.orders.length <= (situation === "a rollout" ? 0 : 3), `${bed.ca.orders.length} orders`);
  }, AT_ONCE);
});
