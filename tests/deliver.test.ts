/** Goal: each section is given what is pending there, whole and in order, by the right files, until it has succeeded. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { accept, select } from "../lib/run.ts";
import { all, type Bed, testBed, until } from "./bed.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

/** A bed with EC certificates unless `settings` say otherwise; HERE in its actions is its home directory. */
async function bedOf(domains: string, actions: string, settings = "keyTypes: ec"): Promise<Bed> {
  const bed = await testBed({ domains, settings: `commandTimeout: 10\nari: no\n${settings}` });
  bed.act(actions);
  return bed;
}

async function makeFifo(bed: Bed): Promise<void> {
  await new Deno.Command("mkfifo", { args: [join(bed.home, "fifo")] }).output();
}

/** The certificates of all lines are there, and delivered. */
async function settle(bed: Bed): Promise<void> {
  await bed.plant();
  const { code, stderr } = await bed.run();
  assert.equal(code, 0, stderr);
  bed.take();
}

/** Section -> why something is pending there, as a run would find it. */
function reasonsIn({ events }: Awaited<ReturnType<Bed["run"]>>): Record<string, string[]> {
  return Object.fromEntries(events.flatMap((event) => {
    if (event.kind !== "delivered") return [];
    const { section, pending } = event.delivered.delivery;
    return [[section.name, [...new Set(pending.map(({ reason }) => reason))]]];
  }));
}

const path = (bed: Bed, what: "cert" | "key", stem: string, tag = "prime256v1") =>
  bed.path("test", what, `${stem}-${what === "cert" ? "cert-combined" : "key"}.${tag}.test.pem`);

// ---- the lists of a section ------------------------------------------------------------------------------

Deno.test("a section uploads certificates, keys, each certificate, then updates, each list whole and in order", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]
rehearse: yes
update: ["echo pause >> HERE/log", "echo reload a >> HERE/log", "", "echo pause >> HERE/log", "echo reload b >> HERE/log"]
uploadEach: ["echo each KEY_TYPE DOMAIN >> HERE/log"]
uploadKeys: ["echo keys >> HERE/log"]
uploadCerts: ["echo certs 1 >> HERE/log", "echo certs 2 >> HERE/log"]`,
    "",
  );
  const { code, stdout } = await bed.run();
  assert.equal(code, 0);
  assert.deepEqual(bed.take(), [
    ...["certs 1", "certs 2", "keys", "each rsa a.example.com", "each ec a.example.com"],
    ...["pause", "reload a", "pause", "reload b"],
  ]);
  assert.match(stdout, /^ran .*\[default\] echo certs 1/m);
});

Deno.test("sections with one update line run it each, after their own uploads, with their own names", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[DEFAULT]
update: ["echo build $LEMATT_DOMAINS_CN >> HERE/log.$LEMATT_DOMAINS_CN", "echo reload DOMAINS_CN >> HERE/log.DOMAINS_CN"]
[a]
domains: a.example.com
[b]
domains: b.example.com
uploadCerts: ["echo upload >> HERE/log.DOMAINS_CN"]`,
  );
  await bed.run();
  assert.deepEqual(bed.take("log.a.example.com"), ["build a.example.com", "reload a.example.com"]);
  assert.deepEqual(bed.take("log.b.example.com"), ["upload", "build b.example.com", "reload b.example.com"]);
});

Deno.test("a failed upload keeps the update of its own section from running, and shows what was printed", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[a]
domains: a.example.com
uploadCerts: ["echo a certs CERTS >> HERE/log; echo no route to host >&2; exit 7"]
uploadKeys: ["echo a keys >> HERE/log"]
update: ["echo a update >> HERE/log"]
[b]
domains: b.example.com
uploadCerts: ["true"]
update: ["echo b update >> HERE/log"]`,
  );
  const { code, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.deepEqual(bed.take().map((line) => line.split(" ", 2).join(" ")).sort(), ["a certs", "b update"]);
  assert.match(
    stderr,
    /^FAILED +\[a\] .*\n +cannot run "echo a certs .*": exit status 7\n +\| no route to host$/m,
  );
  assert.deepEqual(Object.keys(bed.state().receipts), ["b"]);
  assert.deepEqual(Object.keys(bed.state().deliveries), ["a"]);
});

Deno.test("uploadEach that fails for one certificate leaves that one pending and updates for the others", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com\nc.example.com",
    `[default]
rehearse: yes
uploadEach: ["echo DOMAIN $(basename CERT_FILE) $(basename KEY_FILE) >> HERE/log; test ! -e HERE/down || test DOMAIN != b.example.com"]
update: ["echo update DOMAINS_CN >> HERE/log"]`,
  );
  Deno.writeTextFileSync(join(bed.home, "down"), "");
  const first = await bed.run();
  assert.equal(first.code, 1);
  const uploaded = (name: string) =>
    `${name} ${name}-cert-combined.prime256v1.test.pem ${name}-key.prime256v1.test.pem`;
  assert.deepEqual(bed.take(), [
    ...["a.example.com", "b.example.com", "c.example.com"].map(uploaded),
    "update a.example.com c.example.com",
  ]);
  assert.match(first.stderr, /delivery of 1 certificate/);
  Deno.removeSync(join(bed.home, "down"));
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), [uploaded("b.example.com"), "update b.example.com"]);
});

Deno.test("uploadEach does not run in a rehearsal, unless its section says so", async () => {
  const actions =
    `[default]\nuploadEach: ["echo each >> HERE/log"]\nupdate: ["echo update $LEMATT_MODE >> HERE/log"]`;
  await using bed = await bedOf("a.example.com", actions);
  await bed.run();
  assert.deepEqual(bed.take(), ["update test"]);
  bed.act(`${actions}\nrehearse: yes`);
  await bed.run();
  assert.deepEqual(bed.take(), ["each", "update test"]);
  bed.act(actions);
  await bed.run({ mode: "prod" });
  assert.deepEqual(bed.take(), ["each", "update prod"]);
});

Deno.test("a section gets the types of keys that it asks for, and a line is delivered whole", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[pg]
domains: a.example.com
keyTypes: rsa
uploadCerts: ["echo pg CERTS >> HERE/log"]
[web]
domains: a.example.com
keyTypes: rsa ec
uploadKeys: ["echo web KEYS >> HERE/log"]`,
  );
  const [rsa, ec] = ["rsa2048", "prime256v1"] as const;
  const web = ["rsa2048", "prime256v1"].map((tag) => path(bed, "key", "a.example.com", tag)).join(" ");
  await bed.run();
  assert.deepEqual(bed.take().sort(), [`pg ${path(bed, "cert", "a.example.com", rsa)}`, `web ${web}`]);
  Deno.removeSync(path(bed, "cert", "a.example.com", ec));
  await bed.run();
  assert.deepEqual(bed.take(), [`web ${web}`]);
});

Deno.test("words and environment name the files and names of the pending lines, links included, and no others", async () => {
  await using bed = await bedOf(
    "example.com\nexample.com.au\nweb.example.com www shop",
    `[default]
uploadCerts: ["for file in CERTS; do echo $file >> HERE/log; done"]
uploadKeys: ["for file in KEYS; do echo $file >> HERE/log; done"]
update: ["echo DOMAINS_CN / DOMAINS_ALL / $LEMATT_DOMAINS_ALL >> HERE/log"]`,
  );
  await settle(bed);
  const bundle = "web.example.com_shop.web.example.com_www.web.example.com";
  Deno.removeSync(path(bed, "cert", bundle));
  await bed.run();
  const names = ["web.example.com", "shop.web.example.com", "www.web.example.com"];
  const files = (["cert", "key"] as const).flatMap((what) =>
    [bundle, ...names].map((stem) => path(bed, what, stem))
  );
  const log = bed.take();
  assert.deepEqual(log, [...files, `web.example.com / ${names.join(" ")} / ${names.join(" ")}`]);
  for (const file of log.slice(0, -1)) assert.ok(Deno.statSync(file).isFile);
});

Deno.test("--verbose shows what commands print", async () => {
  const actions = `[default]\nprepare: ["echo ready; exec cat"]\nupdate: ["echo hello; echo there >&2"]`;
  await using bed = await bedOf("a.example.com", actions, "keyTypes: ec\npreflight: no");
  const { stdout } = await bed.run({ verbose: true });
  assert.match(stdout, /prepare \| ready$/m);
  assert.match(stdout, /\[default\] \| hello$/m);
  assert.match(stdout, /\[default\] \| there$/m);
  await bed.plant();
  assert.doesNotMatch((await bed.run({ named: { deliver: ["[default]"] } })).stdout, /hello$/m);
});

// ---- order -----------------------------------------------------------------------------------------------

Deno.test("a section that hangs delays no other, and [every] comes when all others are done", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[every]
uploadCerts: ["echo every DOMAINS_CN >> HERE/log"]
[a]
domains: a.example.com
uploadCerts: ["read word < HERE/fifo; echo a >> HERE/log"]
[b]
domains: b.example.com
update: ["echo b >> HERE/log; echo go > HERE/fifo"]`,
  );
  await makeFifo(bed); // [a] is let go by the last command of [b]
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), ["b", "a", "every a.example.com b.example.com"]);
});

Deno.test("a line that is slow at its challenge delays no section but its own and [every]", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com\nc.example.com",
    `[DEFAULT]
update: ["echo DOMAINS_CN >> HERE/log"]
[every]
[slow]
domains: a.example.com
prepare: ["cat"]
[both]
domains: a.example.com b.example.com
[default]`,
  );
  const gate = Promise.withResolvers<void>();
  const route = async () => {
    await gate.promise;
    return [{ address: "127.0.0.1", port: bed.web.port }];
  };
  const running = bed.run({ route });
  await until("the others have been delivered", () => existsSync(join(bed.home, "log")));
  gate.resolve();
  await running;
  const [first, ...rest] = bed.take();
  assert.equal(first, "c.example.com");
  assert.deepEqual(rest.slice(0, 2).sort(), ["a.example.com", "a.example.com b.example.com"]);
  assert.deepEqual(rest.slice(2), ["a.example.com b.example.com c.example.com"]);
});

Deno.test("a rollout takes one section after the other and ends at the first failure, which comes last in the next", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", "");
  await settle(bed);
  const section = (name: string) =>
    `[${name}]\ndomains: ${name}.example.com\nupdate: ["echo ${name} >> HERE/log; ! test -e HERE/${name}"]\n`;
  bed.act(`${section("a")}${section("b")}${section("c")}[every]\nupdate: ["echo every >> HERE/log"]`);
  Deno.writeTextFileSync(join(bed.home, "b"), "");
  assert.equal((await bed.run()).code, 1);
  assert.deepEqual(bed.take(), ["a", "b"]);
  const second = await bed.run();
  assert.equal(second.code, 1);
  assert.deepEqual(bed.take(), ["c", "b"]);
  Deno.removeSync(join(bed.home, "b"));
  assert.equal((await bed.run({ retry: true })).code, 0);
  assert.deepEqual(bed.take(), ["b", "every"]);
});

Deno.test("twenty hosts that are given new commands are given them one at a time", async () => {
  const names = Array.from({ length: 20 }, (_, n) => `host${n}.example.com`);
  await using bed = await bedOf(names.join("\n"), "");
  await settle(bed);
  const update = `["mkdir HERE/one && rmdir HERE/one && echo DOMAINS_CN >> HERE/log"]`;
  bed.act(names.map((name) => `[${name}]\ndomains: ${name}\nupdate: ${update}`).join("\n"));
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), names);
});

Deno.test("at most eight sections are given new certificates at once", async () => {
  const names = Array.from({ length: 12 }, (_, n) => `host${n}.example.com`);
  // each waits until eight have begun, and says how many are at it
  const update =
    `["echo >> HERE/begun; mkdir -p HERE/at/DOMAINS_CN; until test $(wc -l < HERE/begun) -ge 8; do sleep 0.01; done", ` +
    `"ls HERE/at | wc -l >> HERE/log; sleep 0.02; rmdir HERE/at/DOMAINS_CN"]`;
  await using bed = await bedOf(
    names.join("\n"),
    names.map((name) => `[${name}]\ndomains: ${name}\nupdate: ${update}`).join("\n"),
  );
  assert.equal((await bed.run()).code, 0);
  const counts = bed.take().map(Number);
  assert.deepEqual([counts.length, Math.max(...counts)], [12, 8]);
});

Deno.test("new certificates go out side by side while a rollout waits for its turn", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", "");
  await settle(bed);
  await makeFifo(bed);
  Deno.removeSync(path(bed, "cert", "b.example.com"));
  Deno.removeSync(path(bed, "cert", "c.example.com"));
  // [a] is a rollout and [b] urgent: each would hang without the other, and without [c]
  bed.act(`[a]\ndomains: a.example.com\nupdate: ["read word < HERE/fifo"]
[b]\ndomains: b.example.com\nupdate: ["until test -e HERE/c; do sleep 0.01; done; echo go > HERE/fifo"]
[c]\ndomains: c.example.com\nupdate: ["touch HERE/c"]`);
  const ran = await bed.run();
  assert.equal(ran.code, 0);
  assert.deepEqual(reasonsIn(ran), {
    a: ["first delivery"],
    b: ["new certificate"],
    c: ["new certificate"],
  });
});

// ---- receipts --------------------------------------------------------------------------------------------

Deno.test("what is there and not delivered is delivered, whatever has led to it, and nothing else", async () => {
  const log = `update: ["echo DOMAINS_CN >> HERE/log"]`;
  const begin = `[web]\ndomains: a.example.com b.example.com\n${log}`;
  type Change = { domains?: string; actions?: string };
  const table: [what: string, change: Change, log: string[]][] = [
    ["a section is renamed", { actions: begin.replace("[web]", "[www]") }, []],
    ["a section is renamed and its commands change", {
      actions: `[www]\ndomains: a.example.com b.example.com\nupdate: ["echo new DOMAINS_CN >> HERE/log"]`,
    }, ["new a.example.com b.example.com"]],
    ["a line moves to another section", {
      actions:
        `[web]\ndomains: a.example.com\n${log}\n[other]\ndomains: b.example.com\nupdate: ["echo other DOMAINS_CN >> HERE/log"]`,
    }, ["other b.example.com"]],
    ["a second host is added", {
      actions:
        `${begin}\n[second]\ndomains: a.example.com\nuploadCerts: ["echo second DOMAINS_CN >> HERE/log"]`,
    }, ["second a.example.com"]],
    ["an endpoint is added", { actions: `${begin}\nalert: ["true"]\nverifyWait: 1` }, []],
    ["a section has no lists", { actions: `${begin}\n[none]\ndomains: a.example.com\nalert: ["true"]` }, []],
    ["a line is added", { domains: "a.example.com\nb.example.com\nc.example.com" }, []],
  ];
  await all(table.map(async ([what, { domains, actions }, expected]) => {
    await using bed = await bedOf("a.example.com\nb.example.com", begin);
    await settle(bed);
    if (domains !== undefined) bed.configure({ domains });
    if (actions !== undefined) bed.act(actions);
    const { code, stderr } = await bed.run();
    assert.deepEqual([code, bed.take()], [0, expected], `${what}: ${stderr}`);
    assert.equal((await bed.run(), bed.take().length), 0, `${what}: again`);
  }));
});

Deno.test("actions that are written after the first run are carried out by the second", async () => {
  await using bed = await bedOf("a.example.com", "");
  await bed.run();
  bed.act(`[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`);
  const { code, requests } = await bed.run();
  assert.deepEqual([code, requests.length, bed.take()], [0, 0, ["a.example.com"]]);
});

Deno.test("a line or a section that is away for one run is not delivered again, but what failed still is", async () => {
  const actions = `[a]\ndomains: a.example.com\nupdate: ["echo DOMAINS_CN >> HERE/log; test -e HERE/up"]
[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`;
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", actions);
  await bed.run();
  bed.take();
  bed.configure({ domains: "c.example.com" });
  bed.act("");
  await bed.run();
  bed.configure({ domains: "a.example.com\nb.example.com\nc.example.com" });
  bed.act(actions);
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), ["a.example.com"]);
});

Deno.test("--accept notes as delivered what is already in place, and runs nothing", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`,
  );
  await bed.plant();
  const config = bed.config();
  const selection = select(config, { accept: ["a.example.com"] })!;
  assert.equal(await accept(config, selection, bed.world(), () => {}), 1);
  assert.deepEqual(bed.take(), []);
  await bed.run();
  assert.deepEqual(bed.take(), ["b.example.com"]);
});

Deno.test("--deliver delivers again, once, what it names", async () => {
  const log = `update: ["echo $0 DOMAINS_CN >> HERE/log"]`;
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[a]\ndomains: a.example.com\n${log.replace("$0", "a")}\n[default]\n${log.replace("$0", "default")}
[every]\n${log.replace("$0", "every")}`,
  );
  await settle(bed);
  const delivered = async (...deliver: string[]) => {
    const { code } = await bed.run({ named: { deliver } });
    assert.equal(code, 0);
    return bed.take();
  };
  assert.deepEqual(await delivered("a.example.com"), ["a a.example.com", "every a.example.com"]);
  assert.deepEqual(await delivered("[every]"), ["every a.example.com b.example.com"]);
  const [every, ...sideBySide] = (await delivered("[a]", "b.example.com")).toReversed();
  assert.deepEqual([every, ...sideBySide.sort()], [
    "every b.example.com",
    "a a.example.com",
    "default b.example.com",
  ]);
  assert.deepEqual((await bed.run(), bed.take()), []);
});

// ---- what failed -----------------------------------------------------------------------------------------

Deno.test("a delivery that failed is tried by the next run, then after 1, 2, 4 … 20 hours", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nuploadCerts: ["echo tried >> HERE/log; exit 1"]`,
  );
  const tries = async () => (await bed.run(), bed.take().length);
  assert.equal(await tries(), 1);
  assert.equal(await tries(), 1);
  for (const hours of [1, 2, 4, 8, 16, 20, 20]) {
    bed.ca.advance(hours * HOUR - MINUTE);
    assert.equal(await tries(), 0, `before ${hours} h`);
    bed.ca.advance(MINUTE);
    assert.equal(await tries(), 1, `after ${hours} h`);
  }
  const waiting = await bed.run();
  assert.equal(waiting.code, 1); // a problem although it is not tried
  assert.match(waiting.stderr, /^problem +\[default\] .* pending since .*exit status 1.*--retry/m);
  assert.equal((await bed.run({ retry: true }), bed.take().length), 1, "--retry");
});

Deno.test("a host that is down for three nights is tried every night, and has its certificate when it is back", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nuploadCerts: ["echo tried >> HERE/log; test -e HERE/up"]`,
  );
  for (let night = 0; night < 3; night++) {
    assert.deepEqual([(await bed.run({ cron: true })).code, bed.take().length], [1, 1], `night ${night}`);
    bed.ca.advance(DAY - 1000); // a timer is not exact
  }
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  const { code, stdout, requests } = await bed.run({ cron: true });
  assert.deepEqual([code, requests.length], [0, 0]);
  assert.match(stdout, /^delivered \[default\] 1 certificate: /m);
  assert.deepEqual(bed.state().deliveries, {});
});

Deno.test("changed commands, changed endpoints, or a new certificate end the waiting", async () => {
  const failing = `[default]\nuploadCerts: ["echo DOMAINS_CN >> HERE/log; exit 1"]`;
  const changes: Record<string, (bed: Bed) => void> = {
    commands: (bed) => bed.act(failing.replace("exit 1", "exit 2")),
    endpoints: (bed) => bed.act(`${failing}\nverify: ["DOMAIN:1"]\nverifyWait: 0`),
    certificate: (bed) => bed.configure({ domains: "a.example.com\nb.example.com" }),
  };
  await all(
    Object.entries(changes).map(async ([what, change]) => {
      await using bed = await bedOf("a.example.com", failing);
      for (let run = 0; run < 5; run++) await bed.run({ retry: true });
      assert.equal((await bed.run(), bed.take().length), 5, "waits");
      change(bed);
      await bed.run();
      const expected = what === "certificate" ? "a.example.com b.example.com" : "a.example.com";
      assert.deepEqual(bed.take(), [expected], what);
      assert.equal(bed.state().deliveries.default!.retryAt, undefined, what);
    }),
  );
});

Deno.test("what is pending is delivered though the CA cannot be reached", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`,
  );
  await bed.plant();
  Deno.removeSync(path(bed, "cert", "b.example.com"));
  const { code, stderr } = await bed.run({ fetch: () => Promise.reject(new TypeError("the cable is out")) });
  assert.equal(code, 1);
  assert.match(stderr, /the cable is out/);
  assert.deepEqual(bed.take(), ["a.example.com"]);
});

Deno.test("a certificate that is renewed while its predecessor is being delivered is delivered, too", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nuploadCerts: ["exit 1"]`);
  await bed.run();
  bed.ca.advance(80 * DAY);
  bed.act(
    `[default]\nuploadCerts: ["cat CERTS > HERE/delivered"]\n[b]\ndomains: b.example.com\nupdate: ["true"]`,
  );
  bed.configure({ domains: "a.example.com\nb.example.com" });
  assert.equal((await bed.run()).code, 0);
  assert.equal(
    Deno.readTextFileSync(join(bed.home, "delivered")),
    Deno.readTextFileSync(path(bed, "cert", "a.example.com")),
  );
});

Deno.test("a target that is full is a failure like another, with what the command said", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nuploadCerts: ["cat CERTS > /dev/full"]`);
  const { code, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.match(stderr, /\| .*No space left on device/);
});
