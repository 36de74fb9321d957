/** Goal: a problem that needs a person causes an alert, early, with the facts, once in 20 hours, and one when it is over. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { join } from "node:path";
import { which } from "./bench-measure.ts";
import { type Bed, testBed } from "./bed.ts";
import { freePort, makeCertificate, startNginx } from "./tls.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const AS_ROOT = { ignore: Deno.uid() !== 0 };
const NEEDS_NGINX = { ignore: which("nginx") === undefined };

/** A bed with EC certificates only. */
const bedOf = (domains: string, actions: string, settings = "") =>
  testBed({ domains, actions, settings: `keyTypes: ec\nari: no\n${settings}` });

/** Writes subject and names of an alert, then its text, into HERE/alerts. */
const ALERT = `alert: ["{ echo 'SUBJECT (DOMAINS_ALL)'; cat; } >> HERE/alerts"]`;
const takeAlerts = (bed: Bed) => bed.take("alerts").join("\n");

Deno.test("a line that failed in three runs causes an alert, another after 20 hours, and one when it is issued", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com", `[a]\ndomains: a.example.com\n${ALERT}`);
  await bed.plant({ age: 61 });
  bed.refused.add("www.a.example.com");
  const alerts = async () => (await bed.run({ retry: true }), takeAlerts(bed));
  assert.deepEqual([await alerts(), await alerts()], ["", ""]);
  const [subject, text] = (await alerts()).split("\n");
  assert.equal(subject, "1 problem: a.example.com (a.example.com www.a.example.com)");
  for (const part of ["3 times", "not this one", "expires 20"]) assert.ok(text!.includes(part), text);
  bed.ca.advance(19 * HOUR);
  assert.equal(await alerts(), "");
  bed.ca.advance(HOUR + MINUTE);
  assert.match(await alerts(), /5 times/);
  bed.refused.clear();
  const well = await bed.run({ retry: true, cron: true });
  assert.equal(well.code, 0);
  assert.match(well.stdout, /^alert +\[a\] well again: .*a\.example\.com/m);
  assert.match(takeAlerts(bed), /^well again .*\nwell again: .*a\.example\.com/);
  assert.equal(await alerts(), "");
});

Deno.test("a CA that is down for three runs causes one alert for each section and one for [every]", async () => {
  const each = (name: string) =>
    `[${name}]\n${name === "every" ? "" : `domains: ${name}.example.com\n`}${ALERT}\n`;
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", each("a") + each("every"));
  for (let run = 0; run < 3; run++) {
    await bed.run({ fetch: () => Promise.reject(new TypeError("no route to host")) });
    if (run < 2) assert.equal(takeAlerts(bed), "");
  }
  const text = takeAlerts(bed);
  const subject = /^1 problem: a\.example\.com \(a\.example\.com b\.example\.com c\.example\.com\)$/gm;
  assert.equal(text.match(subject)?.length, 2, text);
  assert.equal(text.match(/3 times .*no route to host/g)?.length, 2, text);
  await bed.run();
  assert.equal(takeAlerts(bed).match(/^well again /gm)?.length, 2);
});

Deno.test("an alert for a delivery pending for 20 hours has the command, its output and the old certificate's expiry", async () => {
  const command = "echo connecting to mail1.example.net; echo no route to host >&2; test -e HERE/up";
  await using bed = await bedOf(
    "a.example.com",
    `[mail]\ndomains: a.example.com\nuploadCerts: ["${command}"]\n${ALERT}`,
  );
  await bed.plant({ age: 30 });
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  await bed.run();
  Deno.removeSync(join(bed.home, "up"));
  const expiry = new Date(bed.ca.now.getTime() + 60 * DAY).toISOString().slice(0, 10);
  await bed.run({ named: { renew: ["a.example.com"] } });
  bed.ca.advance(19 * HOUR);
  assert.equal((await bed.run(), takeAlerts(bed)), "");
  bed.ca.advance(2 * HOUR);
  await bed.run({ retry: true });
  const [subject, what, ...output] = takeAlerts(bed).split("\n");
  assert.equal(subject, "1 problem: a.example.com (a.example.com)");
  for (const part of ["[mail]", "echo connecting", "exit status 1", `expires ${expiry}`]) {
    assert.ok(what!.includes(part), what);
  }
  assert.deepEqual(output.slice(0, 2), ["  | connecting to mail1.example.net", "  | no route to host"]);
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  await bed.run({ retry: true });
  assert.match(takeAlerts(bed), /^well again .*\nwell again: \[mail\]/);
});

Deno.test("a delivery that fails every night causes an alert although each night adds another certificate", async () => {
  await using bed = await bedOf("", `[default]\nuploadCerts: ["exit 1"]\n${ALERT}`);
  const names = ["a.example.com", "b.example.com", "c.example.com"];
  for (const nights of [1, 2, 3]) {
    assert.equal(takeAlerts(bed), "");
    bed.configure({ domains: names.slice(0, nights).join("\n") });
    await bed.run();
    bed.ca.advance(12 * HOUR);
  }
  assert.match(takeAlerts(bed), /^1 problem: .*\n\[default\] .*3 certificates pending since /);
  // delivering one of the certificates does not end the problem
  bed.act(`[default]\nuploadCerts: ["test DOMAINS_CN = a.example.com"]\n${ALERT}`);
  bed.ca.advance(DAY);
  await bed.run({ named: { deliver: ["a.example.com"] } });
  await bed.run();
  assert.doesNotMatch(takeAlerts(bed), /well again/);
});

Deno.test("a restricted run reports no recovery of the lines that it leaves aside", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com", `[default]\n${ALERT}`);
  bed.refused.add("a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  takeAlerts(bed);
  await bed.run({ named: { only: ["b.example.com"] } });
  assert.equal(takeAlerts(bed), "");
  bed.refused.clear();
  await bed.run({ named: { renew: ["a.example.com"] } });
  assert.match(takeAlerts(bed), /^well again/);
});

// ---- the commands ----------------------------------------------------------------------------------------

Deno.test("a failed alert command is a failure; the other commands still run, and the alert is not repeated", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nalert: ["exit 5", "cat >> HERE/alerts"]`);
  bed.refused.add("a.example.com");
  for (let run = 0; run < 2; run++) await bed.run({ retry: true });
  const { code, stderr } = await bed.run({ retry: true });
  assert.equal(code, 1);
  assert.match(stderr, /^FAILED +\[default\] alert\n.*"exit 5"/m);
  assert.match(takeAlerts(bed), /3 times/);
  assert.equal((await bed.run({ retry: true }), takeAlerts(bed)), "");
});

Deno.test("the subject of an alert is never empty, as SUBJECT and in the environment, also for wildcards", async () => {
  await using bed = await bedOf(
    "*.a.example.com",
    `[a]\ndomains: *.a.example.com\nchallenge: dns-01\ndnsPresent: ["true"]
alert: ["printf '%%s\\\\n' 'lematt: SUBJECT' \\"$LEMATT_SUBJECT\\" >> HERE/alerts"]`,
  );
  bed.refused.add("*.a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.deepEqual(bed.take("alerts"), ["lematt: 1 problem: *.a.example.com", "1 problem: *.a.example.com"]);
});

// ---- endpoints -------------------------------------------------------------------------------------------

Deno.test(
  "an endpoint that fails its clients, or that a delivery broke, causes an alert at once",
  NEEDS_NGINX,
  async () => {
    const port = freePort();
    await using bed = await bedOf("www.example.com", "", "verifyWait: 0");
    await bed.plant({ mode: "prod" });
    const web = join(bed.home, "web");
    await Deno.mkdir(web);
    Deno.copyFileSync(
      bed.path("prod", "cert", "www.example.com-cert-combined.prime256v1.pem"),
      join(web, "right.pem"),
    );
    Deno.copyFileSync(bed.path("prod", "key", "www.example.com-key.prime256v1.pem"), join(web, "right.key"));
    await makeCertificate(web, "other", "ec", ["other.example.com"]);
    const start = (file: string) =>
      startNginx(web, port, (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair(file)} }`);
    const verify = `verify: ["127.0.0.1:${port}#DOMAIN"]\n${ALERT}`;
    const alerts = async () => (await bed.run({ mode: "prod" }), takeAlerts(bed));
    bed.act(`[default]\n${verify}`);
    {
      await using _ = await start("other");
      assert.match(await alerts(), /other\.example\.com at 127\.0\.0\.1, valid until /);
    }
    await using nginx = await start("right");
    assert.match(await alerts(), /^well again .*\nwell again: 127\.0\.0\.1:\d+#www\.example\.com/);
    const end = `kill ${nginx.child.pid}; while kill -0 ${nginx.child.pid}; do sleep 0.01; done`;
    bed.act(`[default]\nupdate: ["${end}"]\n${verify}`); // a reload that ends the server
    assert.match(await alerts(), /unreachable at 127\.0\.0\.1/);
  },
);

Deno.test("an error that ends a run causes an alert, once in 20 hours", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nupdate: ["true"]\nverify: ["127.0.0.1:1"]\n${ALERT}`,
  );
  await bed.plant();
  const sleep = () => Promise.reject(new TypeError("a bug"));
  for (const count of [1, 0]) {
    await assert.rejects(bed.run({ named: { deliver: ["[default]"] }, sleep }), { message: "a bug" });
    assert.equal(takeAlerts(bed).match(/TypeError: a bug/g)?.length ?? 0, count);
  }
  bed.act(`[default]\nupdate: ["true"]\n${ALERT}`);
  await bed.run();
  assert.match(takeAlerts(bed), /^well again/);
});

// ---- when nothing can be written -------------------------------------------------------------------------

/** Calls `use` with a bed whose directory of --prod is a file system of its own. */
async function onDisk(options: string, use: (bed: Bed, mount: (...args: string[]) => void) => Promise<void>) {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
  const path = bed.path("prod");
  await Deno.mkdir(path);
  const mount = (...args: string[]) => void execFileSync("mount", [...args, path]);
  mount("-t", "tmpfs", "-o", `${options},mode=755`, "tmpfs");
  try {
    await use(bed, mount);
  } finally {
    execFileSync("umount", [path]);
  }
}

Deno.test(
  "a full disk causes an alert that says what it prevents",
  AS_ROOT,
  () =>
    onDisk("size=512k", async (bed) => {
      await bed.plant({ mode: "prod", age: 88 });
      const filler = Deno.openSync(bed.path("prod", "filler"), { write: true, create: true });
      try {
        for (;;) filler.writeSync(new Uint8Array(4096));
      } catch {
        filler.close();
      }
      const { code, stderr } = await bed.run({ mode: "prod" });
      assert.equal(code, 1);
      assert.match(stderr, /No space left on device/);
      const text = takeAlerts(bed);
      assert.match(text, /No space left on device/);
      assert.match(text, /expires \d{4}-\d\d-\d\d/);
      Deno.removeSync(bed.path("prod", "filler"));
      const resources = new Set(bed.ca.log.map(({ resource }) => resource));
      assert.ok(
        !resources.has("newAccount") && !resources.has("newOrder"),
        "no order for a certificate that could not be stored",
      );
      assert.equal((await bed.run({ mode: "prod" })).code, 0);
    }),
);

Deno.test(
  "a read-only disk or a state of a newer version causes an alert",
  AS_ROOT,
  () =>
    onDisk("size=1m", async (bed, mount) => {
      await bed.run({ mode: "prod" });
      const text = bed.text("prod", "state.json");
      Deno.writeTextFileSync(bed.path("prod", "state.json"), `{"version": 9}`);
      await assert.rejects(bed.run({ mode: "prod" }), { name: "StateError" });
      assert.match(takeAlerts(bed), /^1 problem: .*\n.*newer lematt/);
      Deno.writeTextFileSync(bed.path("prod", "state.json"), text);
      mount("-o", "remount,ro");
      await assert.rejects(bed.run({ mode: "prod" }));
      assert.match(takeAlerts(bed), /Read-only file system/);
    }),
);

Deno.test("configuration errors cause output and an alert of --cron once in 20 hours, and again after a valid configuration", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
  const valid = bed.text("domains");
  const alertsOf = async (domains: string) => {
    Deno.writeTextFileSync(bed.path("domains"), domains);
    const { code, stderr } = await bed.lematt("--test", "--cron");
    const alerts = takeAlerts(bed);
    assert.deepEqual([code, stderr !== ""], [domains === valid ? 0 : 2, alerts !== ""]);
    if (alerts !== "") assert.equal(alerts.split("\n").slice(1).join("\n").trim(), stderr.trim());
    return alerts;
  };
  // the directory of the state does not exist yet
  assert.match(await alertsOf("a_b.example.com\n"), /^configuration not valid .*\ndomains:1: /);
  assert.equal(await alertsOf("a_b.example.com\n"), "");
  assert.equal(await alertsOf(valid), "");
  assert.match(await alertsOf("a_b.example.com\n"), /^configuration not valid .*\ndomains:1: /);
  assert.equal(await alertsOf("a_b.example.com\n"), "");
  assert.match(await alertsOf("c_d.example.com\n"), /c_d/);
  const yesterday = new Date(Date.now() - 20 * HOUR - MINUTE);
  Deno.utimeSync(bed.path("test/.configuration-error"), yesterday, yesterday);
  assert.match(await alertsOf("c_d.example.com\n"), /c_d/);
  assert.equal(await alertsOf(valid), "");
  assert.match(await alertsOf("c_d.example.com\n"), /c_d/);
});
