/** Goal: after being killed at any moment, or with a disk that fails at any moment, lematt recovers in the next run. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { settled } from "../lib/context.ts";
import { readInventory } from "../lib/store.ts";
import { testBed } from "./bed.ts";
import { pairs, PROGRAM, randomFrom, SHARE, Subject, sweep, textOf, upTo } from "./faults.ts";
import { missing, pointsIn, SITUATIONS, subjectIn, traced } from "./faults-strace.ts";
import { LEFORWARD } from "./programs.ts";

const ignore = missing !== undefined;
if (ignore) {
  console.warn(`faults-process.test.ts: no system call can be made to fail, by strace: ${missing}`);
}

/** Disk full, over quota, broken, no permission, read-only, or on a file server that is gone. */
const ERRORS = ["ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS", "ESTALE"];
/** The same for reading, and no file descriptors left. */
const READING_ERRORS = ["EIO", "EACCES", "ESTALE", "EMFILE"];

/** Makes the system calls at these points fail in these ways, in each situation; by default one per situation. */
async function sweepCalls(
  what: string,
  situations: readonly string[],
  injections: readonly string[],
  reads: boolean,
): Promise<void> {
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
}

Deno.test(
  "lematt recovers after being killed at any change that it makes to a file",
  { ignore },
  async () => {
    await sweepCalls("SIGKILL", SITUATIONS, ["signal=SIGKILL"], false);
  },
);

Deno.test("lematt recovers after any change to a file has failed", { ignore }, async () => {
  await sweepCalls("a failing disk", SITUATIONS, ERRORS.map((error) => `error=${error}`), false);
});

Deno.test("lematt recovers after any file that it reads could not be read", { ignore }, async () => {
  const injections = READING_ERRORS.map((error) => `error=${error}`);
  await sweepCalls("a file out of reach", ["renewal", "delivery"], injections, true);
});

Deno.test("lematt can be interrupted at any moment, and leaves no prepare command running", async () => {
  const random = randomFrom();
  const signals = ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"] as const;
  const points = pairs(upTo(SHARE > 0 ? 25 : 1), signals);
  await sweep("signals at random moments", points, 2, async ([, signal]) => {
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
      interrupted = false; // it had ended before
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

/** What each section runs. */
const WORK = {
  uploadCerts: "cp -L CERTS HERE/SECTION",
  uploadKeys: "cp -L KEYS HERE/SECTION",
  uploadEach: "cp CERT_FILE HERE/SECTION/KEY_TYPE.pem",
  update: "echo >> HERE/SECTION/updated",
};
const SECTIONS = ["site", "mail", "every"] as const;
const NAMES = { site: "example.com", mail: "mail.example.com" };

/** A section whose commands kill lematt before or after their work, where a file of that name is there. */
function sectionOf(section: typeof SECTIONS[number]): string {
  const kill = (when: string) =>
    `if rm HERE/${section}-${when} 2>/dev/null; then kill -KILL $PPID; exit 1; fi`;
  const lists = Object.entries(WORK).map(([list, work]) => {
    const command = `${kill(`${list}-before`)}; ${work}; ${kill(`${list}-after`)}`;
    return `${list}: ${JSON.stringify([command.replaceAll("SECTION", section)])}`;
  });
  const domains = section === "every" ? [] : [`domains: ${NAMES[section]}`];
  return [`[${section}]`, ...domains, "rehearse: yes", ...lists].join("\n");
}

Deno.test("after being killed at any moment of a delivery, lematt delivers the rest in the next run, and repeats nothing", async () => {
  const steps = SECTIONS.flatMap((section) => Object.keys(WORK).map((list) => ({ section, list })));
  const moments = pairs(steps, ["before", "after"]);
  await sweep(
    "SIGKILL in a delivery",
    pairs(moments, ["a rollout", "new certificates"]),
    3,
    async (point) => {
      const [[{ section: killed, list }, when], situation] = point;
      // without renewal information, as the CA does not know what is planted
      const domains = Object.values(NAMES).join("\n");
      await using bed = await testBed({ domains, settings: `${PROGRAM}\nari: no` });
      for (const section of SECTIONS) Deno.mkdirSync(join(bed.home, section));
      bed.act(SECTIONS.map(sectionOf).join("\n\n"));
      if (situation === "a rollout") await bed.plant();
      const moment = join(bed.home, `${killed}-${list}-${when}`);
      Deno.writeTextFileSync(moment, "");
      assert.equal((await bed.lematt("--test")).code, 128 + 9);
      assert(!existsSync(moment));
      const done = existsSync(bed.path("test/state.json")) ? Object.keys(bed.state().receipts) : [];
      assert(!done.includes(killed));

      const again = await bed.lematt("--test");
      assert.equal(again.code, 0, again.stderr);
      const inventory = readInventory(bed.config());
      for (const section of SECTIONS) {
        assert.equal(again.stdout.includes(`[${section}] `), !done.includes(section), again.stdout);
        for (const { line, files } of inventory) {
          if (!line.sections.some(({ name }) => name === section)) continue;
          for (const path of [files.cert, files.key]) {
            assert.equal(textOf(join(bed.home, section, path.split("/").at(-1)!)), textOf(path));
          }
        }
      }
      assert.equal((await bed.lematt("--test")).stdout.includes("delivered"), false);
      assert(bed.ca.orders.length <= (situation === "a rollout" ? 0 : 3), `${bed.ca.orders.length} orders`);
    },
  );
});
