/** Goal: a problem that needs a person causes an alert, early, with the facts, once in 20 hours, and one when it is over. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type Bed, testBed } from "./bed.ts";
import { startSite, VERIFY } from "./site.ts";
import { makeCertificate, nginxTest } from "./tls.ts";
import { AS_ROOT } from "./programs.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

const bedOf = (domains: string, actions: string) =>
  testBed({ domains, actions, settings: "keyTypes: ec\nari: no" });

/** Writes subject and names of an alert, then its text, into HERE/alerts. */
const ALERT = `alert: ["{ echo 'SUBJECT (DOMAINS_ALL)'; cat; } >> HERE/alerts"]`;
const takeAlerts = (bed: Bed) => bed.take("alerts").join("\n");

const ACTIONS = `[every]\n${ALERT}\n[b]\ndomains: b.example.com\nalert: ["touch HERE/b"]`;

Deno.test("a line that failed in three runs causes an alert, another after 20 hours, and one when it is issued", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com", ACTIONS.replace('["', '["exit 5", "'));
  await bed.plant({ age: 61 });
  bed.ca.refused.add("www.a.example.com");
  for (let run = 0; run < 2; run++) await bed.run({ retry: true });
  assert.equal(takeAlerts(bed), "");
  const third = await bed.run({ retry: true });
  assert.match(third.stderr, /^FAILED +\[every\] alert\n.*"exit 5"/m);
  const [subject, text] = takeAlerts(bed).split("\n");
  assert.equal(subject, "1 problem: a.example.com (a.example.com www.a.example.com)");
  assert.match(text!, /3 times.*not this one.*expires 20/);
  bed.ca.advance(19 * HOUR);
  assert.equal((await bed.run({ retry: true }), takeAlerts(bed)), "");
  bed.ca.advance(HOUR + MINUTE);
  assert.match((await bed.run({ retry: true }), takeAlerts(bed)), /5 times/);
  assert(!existsSync(join(bed.home, "b")), "a section hears of its own lines");
  bed.act(ACTIONS);
  bed.ca.refused.clear();
  const well = await bed.run({ retry: true, cron: true });
  assert.match(well.stdout, /^alert +\[every\] resolved: .*a\.example\.com/m);
  assert.match(takeAlerts(bed), /^resolved .*\nresolved: .*a\.example\.com/);
});

Deno.test("a CA that is down is one problem in one alert, to each section whose lines it concerns", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com", ACTIONS);
  for (let run = 0; run < 3; run++) {
    assert.equal(takeAlerts(bed), "");
    await bed.run({ fetch: () => Promise.reject(new TypeError("no route to host")) });
  }
  assert.match(takeAlerts(bed), /^1 problem: a\..*\n2 lines not issued, 3 times .*no route to host/);
  assert(existsSync(join(bed.home, "b")));
});

Deno.test("an error that ends the run causes an alert, once", async () => {
  const verified = `[default]\nupdate: ["true"]\nverify: ["127.0.0.1:1"]`;
  await using bed = await bedOf("a.example.com", `[every]\n${ALERT}\n${verified}`);
  await bed.plant();
  for (const count of [1, 0]) {
    const sleep = () => Promise.reject(new TypeError("a bug"));
    await assert.rejects(bed.run({ named: { deliver: ["[default]"] }, sleep }), { message: "a bug" });
    assert.equal(takeAlerts(bed).match(/TypeError: a bug/g)?.length ?? 0, count);
  }
});

Deno.test("R12: an alert for a delivery pending for 20 hours has command, output and the old certificate's expiry, even if certificates are added and delivered", async () => {
  const command = "echo connecting to mail1.example.net; echo no route to host >&2; test ! -e HERE/down";
  const actions = `[default]\nuploadCerts: ["${command}"]\n${ALERT}`;
  await using bed = await bedOf("a.example.com", actions);
  await bed.plant({ age: 30 });
  await bed.run();
  const expiry = new Date(bed.ca.now.getTime() + 60 * DAY).toISOString().slice(0, 10);
  Deno.writeTextFileSync(join(bed.home, "down"), "");
  await bed.run({ named: { renew: ["a.example.com"] } });
  bed.ca.advance(19 * HOUR);
  bed.configure({ domains: "a.example.com\nb.example.com" });
  assert.equal((await bed.run(), takeAlerts(bed)), "");
  bed.ca.advance(2 * HOUR);
  await bed.run({ retry: true });
  const [subject, what, ...output] = takeAlerts(bed).split("\n");
  assert.equal(subject, "1 problem: a.example.com (a.example.com b.example.com)");
  const pattern = `2 certificates pending since .*echo connecting.*exit status 1.*expires ${expiry}`;
  assert.match(what!, new RegExp(pattern));
  assert.deepEqual(output.slice(0, 2), ["  | connecting to mail1.example.net", "  | no route to host"]);
  bed.act(actions.replace("echo", "test DOMAINS_CN = a.example.com || echo"));
  await bed.run({ named: { deliver: ["a.example.com"] } });
  await bed.run();
  assert.doesNotMatch(takeAlerts(bed), /resolved/);
  Deno.removeSync(join(bed.home, "down"));
  await bed.run({ retry: true });
  assert.match(takeAlerts(bed), /^resolved .*\nresolved: \[default\]/);
});

nginxTest("an endpoint that fails its clients, or that a delivery broke, is alerted at once", async () => {
  const verify = `${VERIFY}\nverifyWait: 0\n${ALERT}`;
  await using site = await startSite({ actions: `[default]\n${verify}` });
  const { bed, run, web } = site;
  const alerts = async () => (await run(), takeAlerts(bed));
  site.save("right");
  await makeCertificate(web, "other", "ec", ["other.example.com"]);
  await site.restore("other");
  assert.match(await alerts(), /other\.example\.com at 127\.0\.0\.1, valid until /);
  await site.restore("right");
  assert.match(await alerts(), /^resolved [^]*\nresolved: 127\.0\.0\.1:\d+#www\.example\.com/);
  const end = "kill $(cat HERE/web/pid); while kill -0 $(cat HERE/web/pid); do sleep 0.01; done";
  site.act(`[default]\nupdate: ["${end}"]\n${verify}`); // a reload that ends the server
  assert.match(await alerts(), /unreachable at 127\.0\.0\.1/);
});

Deno.test(
  "a full or read-only disk causes an alert that says what it prevents (as root)",
  AS_ROOT,
  async () => {
    await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
    const prod = bed.path("prod");
    Deno.mkdirSync(prod);
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=512k,mode=755", "tmpfs", prod]);
    try {
      await bed.plant({ mode: "prod", age: 88 });
      const filler = join(prod, "filler");
      const file = Deno.openSync(filler, { write: true, create: true });
      assert.throws(() => {
        for (;;) file.writeSync(new Uint8Array(4096));
      });
      file.close();
      const { code, stderr } = await bed.run({ mode: "prod" });
      assert.equal(code, 1);
      assert.match(stderr, /No space left on device/);
      assert.match(takeAlerts(bed), /No space left on device[^]*expires \d{4}-\d\d-\d\d/);
      assert.ok(bed.ca.log.every(({ resource }) => resource !== "newOrder"), "it could not be stored");
      Deno.removeSync(filler);
      assert.equal((await bed.run({ mode: "prod" })).code, 0);
      takeAlerts(bed);

      execFileSync("mount", ["-o", "remount,ro", prod]);
      await assert.rejects(bed.run({ mode: "prod" }));
      assert.match(takeAlerts(bed), /Read-only file system/);
    } finally {
      execFileSync("umount", [prod]);
    }
  },
);

Deno.test("configuration errors are printed and alerted by --cron once in 20 hours, and again after a valid configuration", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
  const valid = bed.text("domains");
  const run = async (domains: string, isAlerted: boolean) => {
    Deno.writeTextFileSync(bed.path("domains"), domains);
    const { code, stderr } = await bed.lematt("--test", "--cron");
    const [subject, ...text] = takeAlerts(bed).split("\n");
    assert.deepEqual([code, text.join("\n").trim()], [domains === valid ? 0 : 2, stderr.trim()]);
    assert.equal(subject, isAlerted ? "configuration not valid ()" : "");
  };
  await run("a_b.example.com\n", true); // the directory of the state does not exist yet
  await run("a_b.example.com\n", false);
  await run(valid, false);
  await run("a_b.example.com\n", true);
  await run("c_d.example.com\n", true); // another error
  const yesterday = new Date(Date.now() - 20 * HOUR - MINUTE);
  Deno.utimeSync(bed.path("test/.configuration-error"), yesterday, yesterday);
  await run("c_d.example.com\n", true);
  bed.configure({ domains: "e_f.example.com", actions: `[default]\nalert: ["exit 5"]` });
  for (let run = 0; run < 2; run++) {
    assert.match((await bed.lematt("--test", "--cron")).stderr, /exit status 5/, "until it can be sent");
  }
});
