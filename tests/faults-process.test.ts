/** Goal: after being killed at any moment, or with a disk that fails at any moment, lematt recovers in the next run. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { basename, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { settled } from "../lib/context.ts";
import { readInventory } from "../lib/store.ts";
import { testBed } from "./bed.ts";
import { missing, pointsIn, SITUATIONS, subjectIn, traced } from "./faults-strace.ts";
import { pairs, PROGRAM, randomFrom, SHARE, Subject, sweep, textOf, upTo } from "./faults.ts";
import { endOf } from "./programs.ts";

const ignore = missing !== undefined;
if (ignore) console.warn(`faults-process.test.ts: skipped: strace cannot inject faults: ${missing}`);

/** Disk full, over quota, broken, no permission, read-only, or on a file server that is gone. */
const WRITING = ["ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS", "ESTALE"].map((error) => `error=${error}`);
/** The same for reading, and no file descriptors left. */
const READING = ["EIO", "EACCES", "ESTALE", "EMFILE"].map((error) => `error=${error}`);

const SWEEPS = [
  ["SIGKILL", "SIGKILL at any change to a file", SITUATIONS, ["signal=SIGKILL"], false],
  ["a failing disk", "a failed change to a file", SITUATIONS, WRITING, false],
  ["a file out of reach", "a failed read of a file", ["renewal", "delivery"], READING, true],
] as const;
for (const [what, fault, situations, injections, reads] of SWEEPS) {
  Deno.test(`lematt recovers from ${fault}`, { ignore }, async () => {
    await settled(situations.map(async (situation) => {
      const points = (await pointsIn(situation)).filter((point) => point.reads === reads);
      await sweep(`${what}, ${situation}`, pairs(injections, points), 1, async ([injection, point]) => {
        await using subject = await subjectIn(situation);
        const account = textOf(subject.bed.path("account.key.test"));
        const ran = await traced(subject, situation, [point], injection);
        await subject.afterFault(ran);
        if (reads) assert.equal(subject.bed.text("account.key.test"), account);
        await subject.recover();
        return ran.injected;
      });
    }));
  });
}

Deno.test("lematt can be interrupted at any moment, and leaves no prepare command running", async () => {
  const random = randomFrom();
  const points = pairs(upTo(SHARE > 0 ? 25 : 1), ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"] as const);
  await sweep("signals at random moments", points, 2, async ([, signal]) => {
    const ca = { validationDelayMs: 500 };
    await using subject = await Subject.create({ settings: `${PROGRAM}\nari: no`, ca });
    const child = subject.bed.start("--test");
    const ended = endOf(child);
    await delay(random(1500));
    let interrupted = true;
    try {
      child.kill(signal);
    } catch {
      interrupted = false; // it had ended before
    }
    await subject.afterFault(await ended);
    if (signal !== "SIGKILL") assert.deepEqual(subject.bed.dropped(), []);
    await subject.recover();
    return interrupted;
  });
});

/** What each section runs. */
const LISTS = {
  uploadCerts: "cp -L CERTS HERE/SECTION",
  uploadKeys: "cp -L KEYS HERE/SECTION",
  uploadEach: "cp CERT_FILE HERE/SECTION/KEY_TYPE.pem",
  update: "echo >> HERE/SECTION/updated",
};
const SECTIONS = ["site", "mail", "every"];

/** A section whose lists kill lematt before or after their work, where a file of that name is there. */
function sectionText(section: string): string {
  const kill = (at: string) => `if rm HERE/SECTION-${at} 2>/dev/null; then kill -KILL $PPID; exit 1; fi`;
  const lists = Object.entries(LISTS).map(([list, work]) => {
    const command = `${kill(`${list}-before`)}; ${work}; ${kill(`${list}-after`)}`;
    return `${list}: ${JSON.stringify([command.replaceAll("SECTION", section)])}\n`;
  });
  const domains = section === "every" ? "" : `domains: ${section}.example.com\n`;
  return `[${section}]\n${domains}rehearse: yes\n${lists.join("")}`;
}

Deno.test("after being killed at any moment of a delivery, lematt delivers the rest in the next run, and repeats nothing", async () => {
  const moments = pairs(Object.keys(LISTS), ["before", "after"]).map((moment) => moment.join("-"));
  const points = pairs(SECTIONS, pairs(moments, ["a rollout", "new certificates"]));
  await sweep("SIGKILL in a delivery", points, 3, async ([killed, [when, situation]]) => {
    // without renewal information, as the CA does not know what is planted
    const domains = "site.example.com\nmail.example.com";
    await using bed = await testBed({ domains, settings: `${PROGRAM}\nari: no` });
    bed.act(SECTIONS.map(sectionText).join("\n"));
    for (const section of SECTIONS) Deno.mkdirSync(join(bed.home, section));
    if (situation === "a rollout") await bed.plant();
    const moment = join(bed.home, `${killed}-${when}`);
    Deno.writeTextFileSync(moment, "");
    assert.equal((await bed.lematt("--test")).code, 128 + 9);
    assert(!existsSync(moment));
    const done = existsSync(bed.path("test/state.json")) ? Object.keys(bed.state().receipts) : [];
    assert(!done.includes(killed));

    const again = await bed.lematt("--test");
    assert.equal(again.code, 0, again.stderr);
    for (const section of SECTIONS) {
      assert.equal(again.stdout.includes(`[${section}] `), !done.includes(section), again.stdout);
    }
    for (const { line: { sections }, files: { cert, key } } of readInventory(bed.config())) {
      for (const [{ name }, path] of pairs(sections, [cert, key])) {
        assert.equal(textOf(join(bed.home, name, basename(path))), textOf(path));
      }
    }
    assert.equal((await bed.lematt("--test")).stdout.includes("delivered"), false);
    assert(bed.ca.orders.length <= (situation === "a rollout" ? 0 : 3), `${bed.ca.orders.length} orders`);
  });
});
