/** Goal: a person hears of what needs one: soon enough, once in 20 hours, with what helps, and once more when it is well again. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { which } from "./bench-measure.ts";
import { type Bed, testBed } from "./bed.ts";
import { freePort, makeCertificate, startNginx } from "./tls.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const AS_ROOT = { ignore: Deno.uid() !== 0 };
const NEEDS_NGINX = { ignore: which("nginx") === undefined };

/** A bed with EC certificates, whose CA refuses the names that are put into `refused`. */
async function bedOf(domains: string, actions: string, settings = "") {
  const refused = new Set<string>();
  const bed = await testBed({
    domains,
    settings: `keyTypes: ec\nari: no\n${settings}`,
    ca: { reject: (name) => refused.has(name) ? "not this one" : undefined },
  });
  bed.act(actions);
  return Object.assign(bed, { refused });
}

/** Writes subject and names of an alert, then its text, into HERE/<file>. */
const alertInto = (file: string) => `alert: ["{ echo 'SUBJECT (DOMAINS_ALL)'; cat; } >> HERE/${file}"]`;
const ALERT = alertInto("alerts");

/** The alerts written by ALERT since the last call, the last line (where to see it all) left out. */
function takeAlerts(bed: Bed, file = "alerts"): string {
  return bed.take(file).join("\n").replaceAll(/\n\nlematt --\w+ --status[^\n]*/g, "");
}

const unreachable = { fetch: () => Promise.reject(new TypeError("no route to host")) };

Deno.test("a line that failed in three runs is alerted, again after 20 hours, and once when it is well", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com", `[a]\ndomains: a.example.com\n${ALERT}`);
  await bed.plant({ age: 61 });
  bed.refused.add("www.a.example.com");
  for (const runs of [1, 2]) {
    assert.equal((await bed.run({ retry: true }), takeAlerts(bed)), "", `after ${runs} runs`);
  }
  const { stdout, code } = await bed.run({ retry: true });
  assert.equal(code, 1);
  assert.match(stdout, /^alert +\[a\] 1 problem: a\.example\.com$/m);
  assert.match(
    takeAlerts(bed),
    /^1 problem: a\.example\.com \(a\.example\.com www\.a\.example\.com\)\na\.example\.com \+1 failed 3 times in a row: .*not this one.*; its certificate expires \d{4}-\d\d-\d\d \d\d:\d\d UTC$/,
  );
  bed.ca.advance(19 * HOUR);
  assert.equal((await bed.run({ retry: true }), takeAlerts(bed)), "");
  bed.ca.advance(HOUR + MINUTE);
  assert.match((await bed.run({ retry: true }), takeAlerts(bed)), /failed 5 times in a row/);
  bed.refused.clear();
  const well = await bed.run({ retry: true, cron: true });
  assert.equal(well.code, 0);
  assert.match(well.stdout, /^alert +\[a\] well again: issuance of a\.example\.com \+1$/m);
  assert.equal(takeAlerts(bed), "well again ()\nwell again: issuance of a.example.com +1");
  assert.equal((await bed.run(), takeAlerts(bed)), "");
});

Deno.test("a section hears of its own lines, [every] of all, in one alert a run", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com\nc.example.com\nd.example.com",
    ["a", "b"].map((name) => `[${name}]\ndomains: ${name}.example.com\n${alertInto(name)}\n`).join("") +
      `[every]\n${alertInto("every")}\n[c]\ndomains: c.example.com\nupdate: ["true"]`,
  );
  for (const name of ["a.example.com", "c.example.com", "d.example.com"]) bed.refused.add(name);
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.match(
    takeAlerts(bed, "a"),
    /^1 problem: a\.example\.com \(a\.example\.com\)\na\.example\.com failed 3 times.*$/,
  );
  assert.equal(takeAlerts(bed, "b"), "");
  const [subject, ...lines] = takeAlerts(bed, "every").split("\n");
  assert.equal(subject, "3 problems: a.example.com (a.example.com c.example.com d.example.com)");
  assert.equal(lines.length, 3);
});

Deno.test("a CA that is down for three runs is one cause, whatever it keeps from being issued", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com", `[default]\n${ALERT}`);
  for (let run = 0; run < 3; run++) await bed.run(unreachable);
  assert.match(
    takeAlerts(bed),
    /^1 problem: a\.example\.com \(a\.example\.com b\.example\.com\)\n2 lines not issued, 3 times since .*: .*no route to host$/,
  );
  await bed.run();
  assert.equal(takeAlerts(bed), "well again ()\nwell again: issuance of 2 lines");
});

Deno.test("a renewal that is overdue is alerted with the end of the certificate, in good time", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`, "reauthorizeDays: 40");
  await bed.plant({ age: 51, mode: "prod" });
  assert.equal((await bed.run({ mode: "prod", ...unreachable }), takeAlerts(bed)), "");
  bed.ca.advance(DAY + HOUR);
  await bed.run({ mode: "prod", ...unreachable });
  assert.match(
    takeAlerts(bed),
    /no route to host; the first certificate expires \d{4}-\d\d-\d\d \d\d:\d\d UTC$/,
  );
});

Deno.test("a delivery that is pending for 20 hours is alerted with the command, its output, and until when the old one lives", async () => {
  const command =
    `"echo CERTS > HERE/last; echo connecting to mail1.example.net; echo no route to host >&2; test -e HERE/up"`;
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[mail]\ndomains: a.example.com\nuploadCerts: [${command}]\n${ALERT}`,
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
  assert.match(
    what!,
    /^\[mail\] delivery of 1 certificate pending since .*cannot run ".*mail1\.example\.net.*": exit status 1/,
  );
  assert.ok(what!.includes(`expires ${expiry}`), what);
  assert.deepEqual(output, ["  | connecting to mail1.example.net", "  | no route to host"]);
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  await bed.run({ retry: true });
  assert.equal(takeAlerts(bed), "well again ()\nwell again: [mail] delivery of 1 certificate");
});

Deno.test("a delivery that fails every night is alerted though there is another certificate every night", async () => {
  await using bed = await bedOf(
    "",
    `[default]\nuploadCerts: ["echo DOMAINS_CN >> HERE/log; exit 1"]\n${ALERT}`,
  );
  for (
    const domains of [
      "a.example.com",
      "a.example.com\nb.example.com",
      "a.example.com\nb.example.com\nc.example.com",
    ]
  ) {
    assert.equal(takeAlerts(bed), "");
    bed.configure({ domains });
    await bed.run();
    bed.ca.advance(12 * HOUR);
  }
  assert.match(takeAlerts(bed), /^1 problem: .*\n\[default\] delivery of 3 certificates pending since /);
  // a part that is delivered is not the end of it
  bed.act(`[default]\nuploadCerts: ["test DOMAINS_CN = a.example.com"]\n${ALERT}`);
  bed.ca.advance(DAY);
  await bed.run({ named: { deliver: ["a.example.com"] } });
  await bed.run();
  assert.doesNotMatch(takeAlerts(bed), /well again/);
});

Deno.test("a new cause is alerted though another was today", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nuploadCerts: ["exit 4"]\n${ALERT}`,
  );
  await bed.run();
  bed.ca.advance(21 * HOUR);
  assert.match((await bed.run(), takeAlerts(bed)), /delivery of 2 certificates/);
  bed.configure({ domains: "a.example.com\nb.example.com\nc.example.com" });
  bed.refused.add("c.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  const text = takeAlerts(bed);
  assert.match(text, /^1 problem: c\.example\.com/);
  assert.doesNotMatch(text, /delivery/);
});

Deno.test("a run that is restricted finds nothing well that it has left aside", async () => {
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

Deno.test("an all-clear is sent though the clock was a year ahead when the alert was", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
  const now = () => new Date(bed.ca.now.getTime() + 365 * DAY);
  await bed.run({ now });
  assert.match(takeAlerts(bed), /this host's clock says .*, the CA's /);
  await bed.run();
  assert.match(takeAlerts(bed), /^well again/);
});

// ---- the commands ----------------------------------------------------------------------------------------

Deno.test("an alert that cannot be sent is a failure, and is sent again by the next run", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nalert: ["test -e HERE/mail && cat >> HERE/alerts"]`,
  );
  bed.refused.add("a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  const { code, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.match(stderr, /^FAILED +\[default\] alert\n +cannot run "test -e .*": exit status 1$/m);
  Deno.writeTextFileSync(join(bed.home, "mail"), "");
  assert.match((await bed.run(), takeAlerts(bed)), /failed 3 times/);
  bed.refused.clear();
  Deno.removeSync(join(bed.home, "mail"));
  assert.equal((await bed.run({ retry: true })).code, 1, "nor can the all-clear");
});

Deno.test("an alert that fails one way is still sent the other, and not repeated for the first", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nalert: ["exit 1", "", "cat >> HERE/alerts"]`.replace(`"", `, ""),
  );
  bed.refused.add("a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.match(takeAlerts(bed), /failed 3 times/);
  assert.equal((await bed.run({ retry: true }), takeAlerts(bed)), "");
});

Deno.test("alerts have a subject that is never empty, as word and in the environment, wildcards included", async () => {
  await using bed = await bedOf("*.a.example.com", "");
  bed.act(`[a]\ndomains: *.a.example.com\nchallenge: dns-01\ndnsPresent: ["true"]
alert: ["printf '%%s\\\\n' 'lematt: SUBJECT' \\"$LEMATT_SUBJECT\\" >> HERE/alerts"]`);
  bed.refused.add("*.a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.deepEqual(bed.take("alerts"), ["lematt: 1 problem: *.a.example.com", "1 problem: *.a.example.com"]);
});

Deno.test("what was alerted is forgotten with its section", async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
  bed.refused.add("a.example.com");
  for (let run = 0; run < 3; run++) await bed.run({ retry: true });
  assert.deepEqual(Object.keys(bed.state().alerts), ["default"]);
  bed.act("");
  await bed.run();
  assert.deepEqual(bed.state().alerts, {});
});

// ---- endpoints -------------------------------------------------------------------------------------------

Deno.test(
  "an endpoint is alerted at once where it serves what breaks clients, or broke by our delivery, else after 20 hours",
  NEEDS_NGINX,
  async () => {
    const port = freePort();
    await using bed = await bedOf("www.example.com", "", "verifyWait: 0");
    await bed.plant({ mode: "prod" });
    await Deno.mkdir(join(bed.home, "web"));
    const web = (file: string) => join(bed.home, "web", file);
    Deno.copyFileSync(
      bed.path("prod", "cert", "www.example.com-cert-combined.prime256v1.pem"),
      web("right.pem"),
    );
    Deno.copyFileSync(bed.path("prod", "key", "www.example.com-key.prime256v1.pem"), web("right.key"));
    await makeCertificate(join(bed.home, "web"), "other", "ec", ["other.example.com"]);
    bed.act(`[default]\nverify: ["127.0.0.1:${port}#DOMAIN"]\n${ALERT}`);
    const alerted = async (file: string) => {
      await using _ = await startNginx(
        join(bed.home, "web"),
        port,
        (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair(file)} }`,
      );
      await bed.run({ mode: "prod" });
      return takeAlerts(bed);
    };
    assert.equal(await alerted("right"), "");
    bed.ca.advance(7 * HOUR);
    assert.match(
      await alerted("other"),
      /serves a certificate for other\.example\.com at 127\.0\.0\.1, valid until /,
    );
    assert.match(
      await alerted("right"),
      /^well again .*\nwell again: 127\.0\.0\.1:\d+#www\.example\.com \(ec\)/,
    );
    bed.ca.advance(7 * HOUR);
    assert.equal((await bed.run({ mode: "prod" }), takeAlerts(bed)), "", "nothing listens");
    bed.ca.advance(20 * HOUR);
    assert.match((await bed.run({ mode: "prod" }), takeAlerts(bed)), /unreachable at 127\.0\.0\.1: .*since /);
    await alerted("right");
    // a reload that ends the server
    await using nginx = await startNginx(
      join(bed.home, "web"),
      port,
      (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("right")} }`,
    );
    bed.act(
      `[default]\nupdate: ["kill ${nginx.child.pid}; while kill -0 ${nginx.child.pid}; do sleep 0.01; done"]\nverify: ["127.0.0.1:${port}#DOMAIN"]\n${ALERT}`,
    );
    await bed.run({ mode: "prod" });
    assert.match(takeAlerts(bed), /unreachable at 127\.0\.0\.1/);
  },
);

Deno.test("an error that ends a run is alerted, once in 20 hours", async () => {
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

async function mount(path: string, options: string): Promise<void> {
  const { success, stderr } = await new Deno.Command("mount", {
    args: ["-t", "tmpfs", "-o", options, "tmpfs", path],
  }).output();
  assert.ok(success, new TextDecoder().decode(stderr));
}

Deno.test("a full disk is alerted, with what it keeps from being done", AS_ROOT, async () => {
  await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
  await Deno.mkdir(bed.path("prod"));
  await mount(bed.path("prod"), "size=128k,mode=755");
  try {
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
    assert.equal((await bed.run({ mode: "prod" })).code, 0);
  } finally {
    await new Deno.Command("umount", { args: [bed.path("prod")] }).output();
  }
});

Deno.test(
  "a disk that has become read-only, or a state of a newer version, is alerted",
  AS_ROOT,
  async () => {
    await using bed = await bedOf("a.example.com", `[default]\n${ALERT}`);
    await Deno.mkdir(bed.path("prod"));
    await mount(bed.path("prod"), "size=1m,mode=755");
    try {
      await bed.run({ mode: "prod" });
      const text = bed.text("prod", "state.json");
      Deno.writeTextFileSync(bed.path("prod", "state.json"), `{"version": 9}`);
      await assert.rejects(bed.run({ mode: "prod" }), { name: "StateError" });
      assert.match(takeAlerts(bed), /^1 problem: .*\n.*newer lematt/);
      Deno.writeTextFileSync(bed.path("prod", "state.json"), text);
      await new Deno.Command("mount", { args: ["-o", "remount,ro", bed.path("prod")] }).output();
      await assert.rejects(bed.run({ mode: "prod" }));
      assert.match(takeAlerts(bed), /Read-only file system/);
    } finally {
      await new Deno.Command("umount", { args: [bed.path("prod")] }).output();
    }
  },
);
