/** Goal: what is owed is carried in the right order, by the right files, until it is paid, and proven where asked for. */

import assert from "node:assert/strict";
import { createPublicKey } from "node:crypto";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type Config, loadConfig } from "../lib/config.ts";
import { retryAfterAttempt, targetsOf } from "../lib/deliver.ts";
import type { Entry, State } from "../lib/store.ts";
import { type Certificate, readCertificate } from "../lib/x509.ts";
import { type Bed, testBed, until } from "./bed.ts";

const HOUR = 3_600_000, DAY = 24 * HOUR;
const NEEDS_NGINX = { ignore: !existsSync("/usr/sbin/nginx") };

/** A bed with EC certificates unless `settings` say otherwise; HERE in its commands is its home directory. */
async function bedOf(domains: string, actions: string, settings = "keyTypes: ec"): Promise<Bed> {
  const bed = await testBed({ domains, settings: `commandTimeout: 5\nari: no\n${settings}` });
  act(bed, actions);
  return bed;
}

function act(bed: Bed, actions: string): void {
  bed.configure({ actions: actions.replaceAll("HERE", bed.home) });
}

/** What commands have written into HERE/log; forgotten once it has been asked for. */
function takeLog(bed: Bed): string[] {
  const path = join(bed.home, "log");
  if (!existsSync(path)) return [];
  const lines = Deno.readTextFileSync(path).split("\n").slice(0, -1);
  Deno.removeSync(path);
  return lines;
}

function stateOf(bed: Bed): State {
  return JSON.parse(bed.text("test", "state.json"));
}

function certificateOf(bed: Bed, stem: string, tag = "prime256v1"): Certificate {
  return readCertificate(bed.text("test", "cert", `${stem}-cert-combined.${tag}.test.pem`));
}

async function makeFifo(bed: Bed): Promise<void> {
  await new Deno.Command("mkfifo", { args: [join(bed.home, "fifo")] }).output();
}

// ---- order ---------------------------------------------------------------------------------------

Deno.test("a section uploads certificates, then keys, then updates, each in the order of its list", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]
update: ["echo update 1 >> HERE/log", "echo update 2 >> HERE/log"]
uploadKeys: ["echo keys >> HERE/log"]
uploadCerts: ["echo certs 1 >> HERE/log", "echo certs 2 >> HERE/log"]`,
  );
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(takeLog(bed), ["certs 1", "certs 2", "keys", "update 1", "update 2"]);
  assert.deepEqual(stateOf(bed).owed, {});
});

Deno.test("[every] comes behind the others, wherever it stands and however long they take", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[every]
uploadCerts: ["echo every uploads >> HERE/log"]
update: ["echo every updates >> HERE/log"]
[b]
domains: b.example.com
uploadCerts: ["read word < HERE/fifo", "echo b uploads >> HERE/log"]
update: ["true", "true", "echo b updates >> HERE/log"]
[default]
uploadCerts: ["echo default uploads >> HERE/log"]
update: ["echo default updates >> HERE/log; echo go > HERE/fifo"]`,
  );
  await makeFifo(bed);
  assert.equal((await bed.run()).code, 0);
  const log = takeLog(bed);
  assert.deepEqual(log.slice(0, 3), ["default uploads", "default updates", "b uploads"]);
  assert.deepEqual(log.slice(3, 5).sort(), ["b updates", "every uploads"]);
  assert.deepEqual(log.slice(5), ["every updates"]);
});

Deno.test("a failed upload skips the update of its own section only", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[a]
domains: a.example.com
uploadCerts: ["echo a certs >> HERE/log; echo no route to host >&2; exit 7"]
uploadKeys: ["echo a keys >> HERE/log"]
update: ["echo a update >> HERE/log"]
[b]
domains: b.example.com
uploadCerts: ["echo b certs >> HERE/log"]
update: ["echo b update >> HERE/log"]`,
  );
  const { code, stdout, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.deepEqual(takeLog(bed).sort(), ["a certs", "b certs", "b update"]);
  assert.deepEqual(Object.keys(stateOf(bed).owed), ["a"]);
  assert.match(stdout, /^ran {5}\[b\] echo b update/m);
  assert.match(
    stderr,
    /^FAILED {2}\[a\]\n +Cannot run "echo a certs .*": exit status 7\n +\| no route to host$/m,
  );
  assert.match(
    stderr,
    /^owed {4}\[a\] owes 1 certificate since \d{4}-\d\d-\d\d, tried again: next run; Cannot run/m,
  );
});

Deno.test("identical update lines run once, when every section that has them has uploaded", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com\nc.example.com",
    `[DEFAULT]
update: ["echo reload >> HERE/log"]
[a]
domains: a.example.com
uploadCerts: ["read word < HERE/fifo; echo a >> HERE/log"]
[b]
domains: b.example.com
uploadCerts: ["echo b >> HERE/log; echo go > HERE/fifo"]
[c]
domains: c.example.com
uploadCerts: ["echo c >> HERE/log; exit 1"]`,
  );
  await makeFifo(bed);
  const { stdout } = await bed.run();
  assert.deepEqual(takeLog(bed).sort().join(" "), "a b c reload");
  assert.equal(stdout.match(/echo reload/g)!.length, 1);
  assert.deepEqual(Object.keys(stateOf(bed).owed), ["c"]);
});

Deno.test("an update that differs only after its words are replaced runs for each section", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[DEFAULT]
update: ["echo DOMAINS_CN >> HERE/log"]
[a]
domains: a.example.com
[b]
domains: b.example.com`,
  );
  await bed.run();
  assert.deepEqual(takeLog(bed).sort(), ["a.example.com", "b.example.com"]);
});

Deno.test("a section that hangs delays nobody else", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[a]
domains: a.example.com
uploadCerts: ["read word < HERE/fifo"]
[b]
domains: b.example.com
uploadCerts: ["true"]
update: ["echo go > HERE/fifo"]`,
  );
  await makeFifo(bed);
  // a is only let go by b's last command
  assert.equal((await bed.run()).code, 0);
});

Deno.test("an old debt that hangs delays the delivery of new certificates no more", async () => {
  await using bed = await bedOf("a.example.com", `[a]\ndomains: a.example.com\nuploadCerts: ["exit 1"]`);
  await bed.run();
  await makeFifo(bed);
  bed.configure({ domains: "a.example.com\nb.example.com" });
  act(
    bed,
    `[a]
domains: a.example.com
uploadCerts: ["read word < HERE/fifo"]
[b]
domains: b.example.com
update: ["echo go > HERE/fifo"]`,
  );
  assert.equal((await bed.run()).code, 0);
});

Deno.test("a command that cannot be made fails its section only", async () => {
  await using bed = await bedOf("a.example.com\n*.b.example.com", "");
  bed.configure({
    actions: `[a]\ndomains: a.example.com\nupdate: ["echo a >> ${bed.home}/log"]
[b]\ndomains: *.b.example.com\nchallenge: dns-01\ndnsPresent: ["true"]\nupdate: ["echo \`echo DOMAINS_ALL\`"]`,
  });
  await bed.plant();
  await owe(bed, ["a", "a.example.com"], ["b", "_wildcard.b.example.com"]);
  const { code, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.deepEqual(takeLog(bed), ["a"]);
  assert.match(stderr, /FAILED {2}\[b\]\n +Cannot run ".*": DOMAINS_ALL cannot be quoted where it stands/);
  assert.deepEqual(Object.keys(stateOf(bed).owed), ["b"]);
});

/** Writes into state.json, as a run that was cut off leaves it, that `section` owes the certificate of `stem`. */
async function owe(bed: Bed, ...debts: [section: string, stem: string][]): Promise<void> {
  await bed.run(); // begins a state
  const state = stateOf(bed);
  for (const [section, stem] of debts) {
    const debt = state.owed[section] ??= { since: bed.ca.now.toISOString(), certificates: {}, attempts: 0 };
    debt.certificates[`${stem}-cert-combined.prime256v1.test.pem`] = certificateOf(bed, stem).fingerprint;
  }
  Deno.writeTextFileSync(bed.path("test", "state.json"), JSON.stringify(state));
}

// ---- the ledger ----------------------------------------------------------------------------------

Deno.test("what a section owes is on disk, by fingerprint, before its first command runs", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nuploadCerts: ["cp HERE/conf/test/state.json HERE/seen"]`,
  );
  await bed.run();
  const { owed } = JSON.parse(Deno.readTextFileSync(join(bed.home, "seen"))) as State;
  const { since, ...debt } = owed.default!;
  assert.ok(Math.abs(Date.parse(since) - Date.now()) < DAY);
  assert.deepEqual(debt, {
    certificates: {
      "a.example.com-cert-combined.prime256v1.test.pem": certificateOf(bed, "a.example.com").fingerprint,
      "b.example.com-cert-combined.prime256v1.test.pem": certificateOf(bed, "b.example.com").fingerprint,
    },
    attempts: 0,
  });
  assert.deepEqual(stateOf(bed).owed, {});
});

Deno.test("what failed on the night of the renewal is delivered by the next run, though nothing is due", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nuploadCerts: ["test -e HERE/up"]\nuploadKeys: ["echo KEYS >> HERE/log"]`,
  );
  await bed.plant({ age: 80 });
  const night = await bed.run();
  assert.deepEqual([night.code, takeLog(bed).length], [1, 0]);

  Deno.writeTextFileSync(join(bed.home, "up"), "");
  const morning = await bed.run();
  assert.deepEqual([morning.code, morning.stderr, morning.requests.length], [0, "", 0]);
  assert.match(
    morning.stdout,
    /^ran {5}\[default\] test -e .*\nran {5}\[default\] echo KEYS .*\nnothing due, 1 kept/,
  );
  assert.deepEqual(takeLog(bed), [bed.path("test", "key", "a.example.com-key.prime256v1.test.pem")]);
  assert.match((await bed.run()).stdout, /^nothing due, 1 kept/);
});

Deno.test("what is owed is delivered though the CA cannot be reached", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`,
  );
  await bed.plant();
  await owe(bed, ["default", "a.example.com"]);
  Deno.removeSync(bed.path("test", "cert", "b.example.com-cert-combined.prime256v1.test.pem"));
  const { code, stderr } = await bed.run({ fetch: () => Promise.reject(new TypeError("the cable is out")) });
  assert.equal(code, 1);
  assert.match(stderr, /the cable is out/);
  assert.deepEqual(takeLog(bed), ["a.example.com"]);
  assert.deepEqual(stateOf(bed).owed, {});
});

Deno.test("a debt is tried again by the next run, then after 1, 2, 4 … 24 hours", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nuploadCerts: ["echo tried >> HERE/log; exit 1"]`,
  );
  const tries = async () => (await bed.run(), takeLog(bed).length);
  assert.equal(await tries(), 1);
  assert.equal(await tries(), 1);
  for (const hours of [1, 2, 4, 8, 16, 24, 24]) {
    bed.ca.advance(hours * HOUR - 60_000);
    assert.equal(await tries(), 0, `before ${hours} h`);
    bed.ca.advance(60_000);
    assert.equal(await tries(), 1, `after ${hours} h`);
  }
  const { code, stderr } = await bed.run();
  assert.equal(code, 1); // said though it is not tried
  assert.match(
    stderr,
    /^owed {4}\[default\] owes 1 certificate since .* not before \d{4}-\d\d-\d\d \d\d:\d\d UTC; Cannot run/,
  );
  assert.equal((await bed.run({ retry: true }), takeLog(bed).length), 1, "--retry");
});

Deno.test("retryAfterAttempt() pauses for a day at most, however often it failed", () => {
  const now = new Date();
  assert.equal(retryAfterAttempt(1, now), undefined);
  assert.equal(retryAfterAttempt(10_000, now)!.getTime() - now.getTime(), DAY);
});

Deno.test("a newly issued certificate has its section tried at once, with all that it owes", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nuploadCerts: ["cp HERE/conf/test/state.json HERE/seen; echo DOMAINS_CN >> HERE/log; test -e HERE/up"]`,
  );
  for (let n = 0; n < 5; n++) await bed.run({ retry: true });
  assert.ok(stateOf(bed).owed.default!.retryAt !== undefined);
  takeLog(bed);

  bed.configure({ domains: "a.example.com\nb.example.com" });
  await bed.run();
  assert.deepEqual(takeLog(bed), ["a.example.com b.example.com"]);
  const seen: State = JSON.parse(Deno.readTextFileSync(join(bed.home, "seen")));
  for (const [state, attempts] of [[seen, 0], [stateOf(bed), 1]] as const) {
    assert.equal(state.owed.default!.attempts, attempts);
    assert.equal(state.owed.default!.retryAt, undefined);
  }
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  assert.equal((await bed.run()).code, 0);
});

Deno.test("a certificate renewed while its predecessor is being carried is carried, too", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nuploadCerts: ["exit 1"]`);
  await bed.run();
  const old = certificateOf(bed, "a.example.com").fingerprint;
  bed.ca.advance(80 * DAY);
  await makeFifo(bed);
  bed.configure({ domains: "a.example.com\nb.example.com" });
  // the old debt is being carried until the fifo is written; a line is being issued until its gate opens
  act(
    bed,
    `[default]
prepare: ["cat"]
uploadCerts: ["cat CERTS >> HERE/carried; test -e HERE/seen || { touch HERE/seen; read word < HERE/fifo; touch HERE/done; }"]
[b]
domains: b.example.com
prepare: ["cat"]`,
  );
  const gates = { a: Promise.withResolvers<void>(), b: Promise.withResolvers<void>() };
  const route = async (host: string) => {
    await gates[host[0] as "a" | "b"].promise;
    return [{ address: "127.0.0.1", port: bed.web.port }];
  };
  const running = bed.run({ route });
  const fifo = await Deno.open(join(bed.home, "fifo"), { write: true }); // which waits for the reader
  gates.a.resolve();
  await until("a is renewed and owed", () => {
    const [owed] = Object.values(stateOf(bed).owed.default?.certificates ?? {});
    return owed !== old && owed === certificateOf(bed, "a.example.com").fingerprint;
  });
  fifo.writeSync(new TextEncoder().encode("go\n"));
  fifo.close();
  await until("the old debt has been carried", () => existsSync(join(bed.home, "done")));
  gates.b.resolve();
  assert.equal((await running).code, 0);
  const renewed = bed.text("test", "cert", "a.example.com-cert-combined.prime256v1.test.pem");
  assert.ok(Deno.readTextFileSync(join(bed.home, "carried")).endsWith(renewed));
  assert.deepEqual(stateOf(bed).owed, {});
});

Deno.test("debts of sections, lines and names that left the configuration are dropped with a line", async () => {
  const failing = `update: ["echo DOMAINS_CN >> HERE/log; exit 1"]`;
  const before =
    `[gone]\ndomains: a.example.com\n${failing}\n[smaller]\ndomains: b.example.com c.example.com d.example.com\n${failing}`;
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com\nd.example.com", before);
  await bed.run();
  takeLog(bed);

  // gone has gone, c is no more, d belongs to nobody
  bed.configure({ domains: "a.example.com\nb.example.com\nd.example.com" });
  act(bed, `[smaller]\ndomains: b.example.com\n${failing}`);
  const { stdout } = await bed.run();
  const dropped = [...stdout.matchAll(/^note {4}nothing is owed any more for (.*): /gm)].map(([, what]) =>
    what
  );
  assert.deepEqual(dropped.sort(), [
    "c.example.com-cert-combined.prime256v1.test.pem in section [smaller]",
    "d.example.com-cert-combined.prime256v1.test.pem in section [smaller]",
    "section [gone]",
  ]);
  assert.deepEqual(takeLog(bed), ["b.example.com"]);
  assert.deepEqual(Object.keys(stateOf(bed).owed), ["smaller"]);
});

Deno.test("a debt whose fingerprint is not that of the certificate is paid by what there is", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nuploadCerts: ["echo CERTS >> HERE/log"]`);
  await bed.plant();
  await owe(bed, ["default", "a.example.com"]);
  const state = stateOf(bed);
  state.owed.default!.certificates = { "a.example.com-cert-combined.prime256v1.test.pem": "0".repeat(64) };
  Deno.writeTextFileSync(bed.path("test", "state.json"), JSON.stringify(state));
  assert.equal((await bed.run()).code, 0);
  assert.equal(takeLog(bed).length, 1);
});

// ---- words ---------------------------------------------------------------------------------------

Deno.test("CERTS and KEYS are the files and links of what was updated, and of nothing that only looks like it", async () => {
  await using bed = await bedOf(
    "example.com\nexample.com.au\nexample.com-old.net\nweb.example.com www shop",
    `[default]
uploadCerts: ["for file in CERTS; do echo $file >> HERE/log; done"]
uploadKeys: ["for file in KEYS; do echo $file >> HERE/log; done"]
update: ["echo DOMAINS_CN / DOMAINS_ALL / $LEMATT_DOMAINS_ALL >> HERE/log"]`,
  );
  const files = (...stems: string[]) =>
    (["cert-combined", "key"] as const).flatMap((what) =>
      stems.map((stem) =>
        bed.path("test", what.slice(0, 4).replace("-", ""), `${stem}-${what}.prime256v1.test.pem`)
      )
    );
  await bed.plant();
  Deno.removeSync(bed.path("test", "cert", "example.com-cert-combined.prime256v1.test.pem"));
  await bed.run();
  assert.deepEqual(takeLog(bed), [...files("example.com"), "example.com / example.com / example.com"]);

  const bundle = "web.example.com_shop.web.example.com_www.web.example.com";
  Deno.removeSync(bed.path("test", "cert", `${bundle}-cert-combined.prime256v1.test.pem`));
  await bed.run();
  const names = ["web.example.com", "shop.web.example.com", "www.web.example.com"];
  const log = takeLog(bed);
  assert.deepEqual(log.slice(0, -1), files(bundle, ...names));
  assert.equal(log.at(-1), `web.example.com / ${names.join(" ")} / ${names.join(" ")}`);
  for (const file of log.slice(0, -1)) assert.ok(Deno.statSync(file).isFile);
});

Deno.test("a list too long for one command line is carried by several", async () => {
  const names = (line: number) =>
    Array.from({ length: 100 }, (_, n) => `${"x".repeat(60)}.${"y".repeat(60)}.${n}.${line}.example.com`);
  await using bed = await bedOf(
    Array.from({ length: 6 }, (_, line) => names(line).join(" ")).join("\n"),
    `[default]
uploadCerts: ["for file in CERTS; do echo $file; done >> HERE/log"]
update: ["echo update >> HERE/log"]`,
  );
  await bed.plant();
  await owe(bed, ...bed.config().lines.map((_, line): [string, string] => ["default", stemsOf(bed)[line]!]));
  const { code, events } = await bed.run();
  assert.equal(code, 0);
  const log = takeLog(bed);
  assert.equal(log.pop(), "update");
  assert.deepEqual(
    log.sort(),
    [...Deno.readDirSync(bed.path("test", "cert"))].map(({ name }) => bed.path("test", "cert", name)).sort(),
  );
  const [delivery] = events.flatMap((event) => event.kind === "delivery" ? [event.delivery] : []);
  assert.ok(delivery!.commands.length > 2);
});

function stemsOf(bed: Bed): string[] {
  return [...Deno.readDirSync(bed.path("test", "cert"))].filter(({ isFile }) => isFile)
    .map(({ name }) => name.replace(/-cert-combined.*/, ""));
}

// ---- what is served ------------------------------------------------------------------------------

/** nginx over the files in `<home>/web`, which it reads at its start and on SIGHUP; its number is in HERE/nginx.pid. */
async function startNginx(bed: Bed, servers: (pair: (stem: string, tag: string) => string) => string) {
  const pair = (stem: string, tag: string) =>
    `ssl_certificate web/${stem}-cert-combined.${tag}.test.pem; ssl_certificate_key web/${stem}-key.${tag}.test.pem;`;
  const temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((what) =>
    `${what}_temp_path tmp-${what};`
  );
  await Deno.writeTextFile(
    join(bed.home, "nginx.conf"),
    `daemon off; pid nginx.pid; error_log error.log; events {}
    http { access_log off; ${temporary.join(" ")} ${servers(pair)} }`,
  );
  const nginx = new Deno.Command("/usr/sbin/nginx", {
    args: ["-p", bed.home, "-c", "nginx.conf"],
    stderr: "null",
  }).spawn();
  await until("nginx has started", () => existsSync(join(bed.home, "nginx.pid")));
  return {
    async [Symbol.asyncDispose]() {
      nginx.kill("SIGTERM");
      await nginx.status;
    },
  };
}

function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

/** Puts certificates of `age` days in their places, and copies of them in `<home>/web`. */
async function plantServed(bed: Bed, age: number): Promise<void> {
  await bed.plant({ age });
  await Deno.mkdir(join(bed.home, "web"), { recursive: true });
  for (const what of ["cert", "key"]) {
    for (const { name } of Deno.readDirSync(bed.path("test", what))) {
      await Deno.copyFile(bed.path("test", what, name), join(bed.home, "web", name));
    }
  }
}

const UPLOADS = `uploadCerts: ["cp CERTS HERE/web/"]\nuploadKeys: ["cp KEYS HERE/web/"]`;
const short = ({ fingerprint }: Certificate) => fingerprint.slice(0, 16);

Deno.test(
  "a service that is not reloaded is found out, and named with what it serves and what it should",
  NEEDS_NGINX,
  async () => {
    const port = freePort();
    await using bed = await bedOf(
      "www.example.com",
      `[default]\n${UPLOADS}\nverify: ["DOMAIN:${port}"]`,
      "verifyWait: 0",
    );
    await plantServed(bed, 80);
    const before = {
      rsa: certificateOf(bed, "www.example.com", "rsa2048"),
      ec: certificateOf(bed, "www.example.com"),
    };
    await using _ = await startNginx(
      bed,
      (pair) =>
        `server { listen 127.0.0.1:${port} ssl; ${pair("www.example.com", "rsa2048")} ${
          pair("www.example.com", "prime256v1")
        } }`,
    );

    const night = await bed.run();
    assert.equal(night.code, 1);
    const after = {
      rsa: certificateOf(bed, "www.example.com", "rsa2048"),
      ec: certificateOf(bed, "www.example.com"),
    };
    for (const keyType of ["rsa", "ec"] as const) {
      const until = before[keyType].notAfter.toISOString().slice(0, 10);
      const line =
        `WRONG   [default] www.example.com:${port} ${keyType}  old at 127.0.0.1: ${
          short(before[keyType])
        }, ` +
        `until ${until}; expected ${short(after[keyType])}\n`;
      assert.ok(night.stderr.includes(line), night.stderr);
    }
    assert.match(
      night.stderr,
      new RegExp(`^owed .* www.example.com:${port} does not serve the newest certificate$`, "m"),
    );

    bed.configure({ settings: "ari: no\nverifyWait: 10" });
    act(
      bed,
      `[default]\n${UPLOADS}\nupdate: ["kill -HUP $(cat HERE/nginx.pid)"]\nverify: ["DOMAIN:${port}"]`,
    );
    const morning = await bed.run();
    assert.deepEqual([morning.code, morning.stderr, morning.requests.length], [0, "", 0]);
    assert.match(
      morning.stdout,
      new RegExp(`^serves .* rsa  current at 127.0.0.1: ${short(after.rsa)}`, "m"),
    );
    assert.match(morning.stdout, new RegExp(`^serves .* ec  current at 127.0.0.1: ${short(after.ec)}`, "m"));
  },
);

Deno.test(
  "an endpoint that serves the new RSA and the old EC certificate is caught",
  NEEDS_NGINX,
  async () => {
    const port = freePort();
    const onlyRsa = (files: string) =>
      `"for file in ${files}; do case $file in *rsa*) cp $file HERE/web/;; esac; done"`;
    await using bed = await bedOf(
      "www.example.com",
      `[default]
uploadCerts: [${onlyRsa("CERTS")}]
uploadKeys: [${onlyRsa("KEYS")}]
update: ["kill -HUP $(cat HERE/nginx.pid)"]
verify: ["DOMAIN:${port}"]`,
      "verifyWait: 2",
    );
    await plantServed(bed, 80);
    await using _ = await startNginx(
      bed,
      (pair) =>
        `server { listen 127.0.0.1:${port} ssl; ${pair("www.example.com", "rsa2048")} ${
          pair("www.example.com", "prime256v1")
        } }`,
    );
    const { code, stdout, stderr } = await bed.run();
    assert.equal(code, 1);
    assert.match(stdout, /^serves .* rsa {2}current/m);
    assert.match(stderr, /^WRONG .* ec {2}old/m);
    assert.deepEqual(Object.keys(stateOf(bed).owed), ["default"]);
  },
);

Deno.test("an endpoint is asked with the name after its #, or without any", NEEDS_NGINX, async () => {
  const port = freePort();
  await using bed = await bedOf(
    "www.example.com\nother.example.com",
    `[www]\ndomains: www.example.com\nverify: ["127.0.0.1:${port}", "127.0.0.1:${port}#DOMAIN"]`,
    "keyTypes: ec\nverifyWait: 0",
  );
  await plantServed(bed, 0);
  await owe(bed, ["www", "www.example.com"]);
  await using _ = await startNginx(
    bed,
    (pair) =>
      `server { listen 127.0.0.1:${port} ssl default_server; ${pair("other.example.com", "prime256v1")} }
    server { listen 127.0.0.1:${port} ssl; server_name www.example.com; ${
        pair("www.example.com", "prime256v1")
      } }`,
  );
  const { stdout, stderr } = await bed.run();
  assert.match(stdout, new RegExp(`^serves  \\[www\\] 127.0.0.1:${port}#www.example.com ec  current`, "m"));
  assert.match(
    stderr,
    new RegExp(`^WRONG   \\[www\\] 127.0.0.1:${port} ec  other at 127.0.0.1: .* for other.example.com`, "m"),
  );
});

Deno.test("what a stranger's certificate says of itself cannot steer the terminal", NEEDS_NGINX, async () => {
  const port = freePort();
  await using bed = await bedOf(
    "www.example.com",
    `[default]\nverify: ["DOMAIN:${port}"]`,
    "keyTypes: ec\nverifyWait: 0",
  );
  await plantServed(bed, 0);
  await owe(bed, ["default", "www.example.com"]);
  const key = await Deno.readTextFile(join(bed.home, "web", "www.example.com-key.prime256v1.test.pem"));
  const stranger = bed.ca.forge({
    publicKey: createPublicKey(key),
    identifiers: [{ type: "dns", value: "\x1b[31m\r\u0085www.example.com" }],
    notBefore: new Date(0),
    notAfter: new Date(Date.now() + DAY),
  });
  await Deno.writeTextFile(
    join(bed.home, "web", "www.example.com-cert-combined.prime256v1.test.pem"),
    stranger,
  );
  await using _ = await startNginx(
    bed,
    (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("www.example.com", "prime256v1")} }`,
  );
  const { stderr } = await bed.run();
  assert.match(stderr, /^WRONG .* ec {2}other at 127\.0\.0\.1: [0-9a-f]{16} for \\u\{1b\}\[31m/m);
  assert.doesNotMatch(stderr, /[^\x20-\x7e\n]/);
});

Deno.test("an endpoint that nobody answers at is named, and the other sections are delivered", async () => {
  const port = freePort();
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[a]\ndomains: a.example.com\nverify: ["DOMAIN:${port}"]\n[b]\ndomains: b.example.com\nupdate: ["true"]`,
    "keyTypes: ec\nverifyWait: 0",
  );
  await bed.plant();
  await owe(bed, ["a", "a.example.com"], ["b", "b.example.com"]);
  const { code, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.match(
    stderr,
    new RegExp(
      `^WRONG   \\[a\\] a.example.com:${port} ec  unreachable at 127.0.0.1: Connection refused; expected [0-9a-f]{16}$`,
      "m",
    ),
  );
  assert.deepEqual(Object.keys(stateOf(bed).owed), ["a"]);
});

/** The targets of the section [mail] in few words, for lines of which each has the certificates of its first name. */
function targets(domains: string, verify: string[], delivered?: string[]): string[] {
  const directory = Deno.makeTempDirSync();
  let config: Config;
  try {
    const files = {
      "lematt.conf": `[config]\naccountKey: account.key\nchallengeDropDir: .`,
      domains,
      "actions.conf": `[mail]\ndomains: ${
        domains.replaceAll("\n", " ")
      }\nchallenge: dns-01\ndnsPresent: ["true"]\nverify: ${JSON.stringify(verify)}`,
    };
    for (const [name, text] of Object.entries(files)) Deno.writeTextFileSync(join(directory, name), text);
    config = loadConfig("test", directory);
  } finally {
    Deno.removeSync(directory, { recursive: true });
  }
  const inventory = config.lines.flatMap((line) =>
    config.keyTypes.map((keyType): Entry => ({
      line,
      keyType,
      stem: "",
      finding: {
        kind: "present",
        certificate: { fingerprint: `${line.names[0]} ${keyType}` } as Certificate,
      },
    }))
  );
  const lines = config.lines.filter(({ names }) => delivered?.includes(names[0]!) ?? true);
  const section = config.sections.find(({ name }) => name === "mail")!;
  return targetsOf(section, lines, inventory).map(({ endpoint, expected }) => {
    const sni = endpoint.sni === undefined ? "" : ` as ${endpoint.sni}`;
    const certificates = expected.map(({ certificate }) => certificate.fingerprint).join(", ");
    return `${endpoint.text}: ${endpoint.host} ${endpoint.port}${sni}: ${certificates}`;
  });
}

Deno.test("targetsOf() finds for each endpoint the certificates that it should serve", () => {
  const two = "a.example.com\nb.example.com";
  const table: [string, string[], string[]][] = [
    [two, ["a.example.com:443"], [
      "a.example.com:443: a.example.com 443: a.example.com rsa, a.example.com ec",
    ]],
    [two, ["DOMAIN:25/smtp"], [
      "a.example.com:25/smtp: a.example.com 25: a.example.com rsa, a.example.com ec",
      "b.example.com:25/smtp: b.example.com 25: b.example.com rsa, b.example.com ec",
    ]],
    ["a.example.com b.example.com", ["DOMAINS_ALL:443"], [
      "a.example.com:443: a.example.com 443: a.example.com rsa, a.example.com ec",
      "b.example.com:443: b.example.com 443: a.example.com rsa, a.example.com ec",
    ]],
    [two, ["192.0.2.7:443#DOMAIN"], [
      "192.0.2.7:443#a.example.com: 192.0.2.7 443 as a.example.com: a.example.com rsa, a.example.com ec",
      "192.0.2.7:443#b.example.com: 192.0.2.7 443 as b.example.com: b.example.com rsa, b.example.com ec",
    ]],
    ["a.example.com b.example.com", ["DOMAINS_ALL:443#DOMAINS_ALL"], [
      "a.example.com:443#a.example.com: a.example.com 443 as a.example.com: a.example.com rsa, a.example.com ec",
      "b.example.com:443#b.example.com: b.example.com 443 as b.example.com: a.example.com rsa, a.example.com ec",
    ]],
    ["a.example.com", ["[2001:db8::7]:443"], [
      "[2001:db8::7]:443: 2001:db8::7 443: a.example.com rsa, a.example.com ec",
    ]],
    ["a.example.com", ["lb.example.net:443"], [
      "lb.example.net:443: lb.example.net 443: a.example.com rsa, a.example.com ec",
    ]],
    [two, ["lb.example.net:443"], []], // it cannot be known whose certificate that serves
    ["a.example.com b.example.com\nb.example.com", ["DOMAINS_ALL:443", "b.example.com:443"], [
      "a.example.com:443: a.example.com 443: a.example.com rsa, a.example.com ec",
      "b.example.com:443: b.example.com 443: b.example.com rsa, b.example.com ec",
    ]],
    ["*.example.com\nwww.example.com", ["www.example.com:443"], [
      "www.example.com:443: www.example.com 443: www.example.com rsa, www.example.com ec",
    ]],
    ["*.example.com example.com", ["DOMAINS_ALL:443", "www.example.com:443"], [
      "example.com:443: example.com 443: *.example.com rsa, *.example.com ec",
      "www.example.com:443: www.example.com 443: *.example.com rsa, *.example.com ec",
    ]],
  ];
  for (const [domains, verify, expected] of table) {
    assert.deepEqual(targets(domains, verify), expected, verify.join());
  }
});

Deno.test("targetsOf() passes over endpoints of lines that were not delivered", () => {
  const verify = ["a.example.com:443", "b.example.com:443"];
  assert.deepEqual(targets("a.example.com\nb.example.com", verify, ["b.example.com"]), [
    "b.example.com:443: b.example.com 443: b.example.com rsa, b.example.com ec",
  ]);
});
