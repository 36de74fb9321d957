/** Goal: a person is told of what needs one: soon enough, once a day, and once more when all is well. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { State } from "../lib/store.ts";
import { type Bed, testBed } from "./bed.ts";
import type { Switches } from "./ca.ts";

const HOUR = 3_600_000, DAY = 24 * HOUR;

/** A bed whose CA refuses the names that are put into `refused`; HERE in its actions is its home directory. */
async function bedOf(domains: string, actions: string, settings = "", switches: Switches = {}) {
  const refused = new Set<string>();
  const bed = await testBed({
    domains,
    settings: `keyTypes: ec\nari: no\n${settings}`,
    ca: { reject: (name) => refused.has(name) ? "not this one" : undefined, ...switches },
  });
  bed.configure({ actions: actions.replaceAll("HERE", bed.home) });
  return Object.assign(bed, { refused });
}

/** Writes what the alert has on its standard input, and its words, into HERE/alerts. */
const ALERT = `alert: ["{ echo 'to DOMAINS_CN (DOMAINS_ALL)'; cat; } >> HERE/alerts"]`;

/** What was written by ALERT; forgotten once it has been asked for. */
function takeAlerts(bed: Bed): string {
  const path = join(bed.home, "alerts");
  if (!existsSync(path)) return "";
  const text = Deno.readTextFileSync(path);
  Deno.removeSync(path);
  return text;
}

Deno.test("a line that failed in three runs is told, once a day, and once when all is well again", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com", `[a]\ndomains: a.example.com\n${ALERT}`);
  bed.refused.add("www.a.example.com");
  for (const runs of [1, 2]) {
    await bed.run({ retry: true });
    assert.equal(takeAlerts(bed), "", `after ${runs} runs`);
  }
  const { stdout, code } = await bed.run({ retry: true });
  assert.equal(code, 1);
  assert.match(
    stdout,
    /^alert {3}a\.example\.com \+1 failed 3 times in a row: cannot create an order: .*not this one/m,
  );
  assert.match(
    takeAlerts(bed),
    /^to a\.example\.com \(a\.example\.com www\.a\.example\.com\)\na\.example\.com \+1 failed 3 times in a row: cannot create an order: .*not this one.*\n$/,
  );

  bed.ca.advance(23 * HOUR);
  await bed.run({ retry: true });
  assert.equal(takeAlerts(bed), "");
  bed.ca.advance(HOUR);
  await bed.run();
  assert.match(takeAlerts(bed), /failed 4 times in a row/);

  bed.refused.clear();
  const well = await bed.run({ retry: true });
  assert.equal(well.code, 0);
  assert.match(well.stdout, /^alert {3}\[a\] all is well again$/m);
  assert.equal(takeAlerts(bed), "to  ()\n[a] all is well again\n");
  await bed.run();
  assert.equal(takeAlerts(bed), "");
});

Deno.test("a section is told of its own lines only, and one without alert of none", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com\nc.example.com",
    `[a]\ndomains: a.example.com\nalert: ["cat >> HERE/a"]\n[b]\ndomains: b.example.com\nalert: ["cat >> HERE/b"]\n[c]\ndomains: c.example.com\nupdate: ["true"]`,
  );
  for (const name of ["a.example.com", "c.example.com"]) bed.refused.add(name);
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.match(Deno.readTextFileSync(join(bed.home, "a")), /^a\.example\.com failed 3 times in a row: .*\n$/);
  assert.equal(existsSync(join(bed.home, "b")), false);
});

Deno.test("an overdue renewal is told once less than a third of the life is left", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`, "reauthorizeDays: 40");
  bed.refused.add("a.example.com");
  await bed.plant({ age: 59 });
  await bed.run();
  assert.equal(takeAlerts(bed), "");
  bed.ca.advance(2 * DAY);
  await bed.run();
  assert.match(
    takeAlerts(bed),
    /^to a\.example\.com \(a\.example\.com\)\na\.example\.com \(ec\) expires \d{4}-\d\d-\d\d \d\d:\d\d UTC and is not renewed yet\n$/,
  );
});

Deno.test("a certificate with little of its life left is no alarm where its renewal is later still", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`, "reauthorizeDays: 5");
  await bed.plant({ age: 80 });
  assert.equal((await bed.run()).code, 0);
  assert.equal(takeAlerts(bed), "");
});

Deno.test("a delivery owed for a day is told with the names of its certificates and the last error", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nuploadCerts: ["exit 4"]\n${ALERT}`,
  );
  await bed.run();
  bed.ca.advance(23 * HOUR);
  await bed.run();
  assert.equal(takeAlerts(bed), "");
  bed.ca.advance(2 * HOUR);
  await bed.run();
  assert.match(
    takeAlerts(bed),
    /^to a\.example\.com b\.example\.com \(a\.example\.com b\.example\.com\)\n\[default\] owes a delivery since \d{4}-\d\d-\d\d \d\d:\d\d UTC: Cannot run "exit 4": exit status 4\n$/,
  );
});

Deno.test("a new cause is told though another was told today", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nuploadCerts: ["exit 4"]\n${ALERT}`,
  );
  await bed.run();
  bed.ca.advance(25 * HOUR);
  await bed.run();
  assert.match(takeAlerts(bed), /owes a delivery/);
  bed.configure({ domains: "a.example.com\nb.example.com\nc.example.com" });
  bed.refused.add("c.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.match(takeAlerts(bed), /c\.example\.com failed 3 times in a row.*\n\[default\] owes a delivery/);
  await bed.run({ retry: true });
  assert.equal(takeAlerts(bed), "");
});

Deno.test("a CA that cannot be reached for three runs is told, though nothing was ever issued", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
  for (let run = 0; run < 3; run++) {
    await bed.run({ fetch: () => Promise.reject(new TypeError("no route to host")) });
  }
  assert.match(
    takeAlerts(bed),
    /a\.example\.com failed 3 times in a row: cannot read the directory: no route to host/,
  );
});

Deno.test("an alert that cannot be sent is a failure, and is sent again by the next run", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nalert: ["test -e HERE/mail && cat >> HERE/alerts"]`,
  );
  bed.refused.add("a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  const { code, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.match(stderr, /^FAILED {2}\[default\] alert\n +Cannot run "test -e .*": exit status 1$/m);
  Deno.writeTextFileSync(join(bed.home, "mail"), "");
  await bed.run();
  assert.match(takeAlerts(bed), /failed 3 times/);
});

Deno.test("an alert that fails one way is still sent the other, and not repeated for the first", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nalert: ["exit 1", "cat >> HERE/alerts"]`);
  bed.refused.add("a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.match(takeAlerts(bed), /failed 3 times/);
  await bed.run({ retry: true });
  assert.equal(takeAlerts(bed), "");
});

Deno.test("an alert that cannot be made does not keep the others from being sent", async () => {
  await using bed = await bedOf("*.a.example.com", "");
  bed.configure({
    actions:
      `[a]\ndomains: *.a.example.com\nchallenge: dns-01\ndnsPresent: ["true"]\nalert: ["echo \`echo DOMAINS_CN\`", "cat >> ${bed.home}/alerts"]`,
  });
  bed.refused.add("*.a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.match(takeAlerts(bed), /failed 3 times/);
});

Deno.test("what was told is forgotten with its section", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
  bed.refused.add("a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  const state = (): State => JSON.parse(bed.text("test", "state.json"));
  assert.deepEqual(Object.keys(state().alerts), ["default"]);
  bed.configure({ actions: "" });
  await bed.run();
  assert.deepEqual(state().alerts, {});
});

Deno.test("an alert with --cron is the only word of a run that has none of its own", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`, "reauthorizeDays: 40");
  await bed.plant({ age: 70 });
  bed.refused.add("a.example.com");
  await bed.run({ cron: true });
  takeAlerts(bed);
  bed.refused.clear();
  const { stdout } = await bed.run({ cron: true, retry: true });
  assert.match(stdout, /^alert {3}\[default\] all is well again$/m);
});
