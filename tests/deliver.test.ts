/** Goal: each section receives its pending deliveries, complete and in order, from the right files, until they succeed. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { accept, select } from "../lib/run.ts";
import { all, type Bed, testBed, until } from "./bed.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

/** A bed with EC certificates unless `settings` say otherwise. */
const bedOf = (domains: string, actions: string, settings = "keyTypes: ec") =>
  testBed({ domains, actions, settings: `commandTimeout: 10\nari: no\n${settings}` });

async function makeFifo(bed: Bed): Promise<void> {
  await new Deno.Command("mkfifo", { args: [join(bed.home, "fifo")] }).output();
}

/** Puts certificates of all lines in place and delivers them. */
async function settle(bed: Bed): Promise<void> {
  await bed.plant();
  const { code, stderr } = await bed.run();
  assert.equal(code, 0, stderr);
  bed.take();
}

const path = (bed: Bed, what: "cert" | "key", stem: string, tag = "prime256v1") =>
  bed.path("test", what, `${stem}-${what === "cert" ? "cert-combined" : "key"}.${tag}.test.pem`);

// ---- the lists of a section ------------------------------------------------------------------------------

Deno.test("a section runs uploadCerts, uploadKeys, uploadEach and update in this order, each list complete", async () => {
  const echo = (...texts: string[]) =>
    JSON.stringify(texts.map((text) => text && `echo ${text} >> HERE/log`));
  const actions = `[default]
update: ${echo("pause", "reload a", "", "pause", "reload $LEMATT_MODE")}
uploadEach: ${echo("each KEY_TYPE DOMAIN")}
uploadKeys: ${echo("keys")}
uploadCerts: ${echo("certs 1", "certs 2")}
rehearse: `;
  await using bed = await bedOf("a.example.com", `${actions} yes`, "");
  assert.equal((await bed.run()).code, 0);
  const [before, each, after] = [
    ["certs 1", "certs 2", "keys"],
    ["each rsa a.example.com", "each ec a.example.com"],
    ["pause", "reload a", "pause"],
  ];
  assert.deepEqual(bed.take(), [...before!, ...each!, ...after!, "reload test"]);
  bed.act(`${actions} no`); // uploadEach chooses its own file names, which may be those of production
  await bed.run();
  assert.deepEqual(bed.take(), [...before!, ...after!, "reload test"]);
  await bed.run({ mode: "prod" });
  assert.deepEqual(bed.take(), [...before!, ...each!, ...after!, "reload prod"]);
});

Deno.test("sections with the same update command each run it, after their own uploads, with their own names", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[DEFAULT]
update: ["echo build $LEMATT_DOMAINS_CN >> HERE/DOMAINS_CN", "echo reload >> HERE/DOMAINS_CN"]
[a]
domains: a.example.com
[b]
domains: b.example.com
uploadCerts: ["echo upload >> HERE/DOMAINS_CN"]`,
  );
  await bed.run();
  assert.deepEqual(bed.take("a.example.com"), ["build a.example.com", "reload"]);
  assert.deepEqual(bed.take("b.example.com"), ["upload", "build b.example.com", "reload"]);
});

Deno.test("a failed upload skips the update of its own section, and its output is printed", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[a]
domains: a.example.com
uploadCerts: ["echo a certs >> HERE/log; echo no route to host >&2; exit 7"]
uploadKeys: ["echo a keys >> HERE/log"]
update: ["echo a update >> HERE/log"]
[b]
domains: b.example.com
update: ["echo b update >> HERE/log"]`,
  );
  const { code, stderr } = await bed.run();
  assert.deepEqual([code, bed.take().sort()], [1, ["a certs", "b update"]]);
  assert.match(stderr, /^FAILED +\[a\] .*\n.*"echo a certs .*": exit status 7\n +\| no route to host$/m);
  assert.deepEqual([Object.keys(bed.state().receipts), Object.keys(bed.state().deliveries)], [["b"], ["a"]]);
});

Deno.test("if uploadEach fails for one certificate, that one stays pending, and update runs for the others", async () => {
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

Deno.test("a section receives only the key types that it configures, and all certificates of a line together", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[pg]\ndomains: a.example.com\nkeyTypes: rsa\nuploadCerts: ["echo pg CERTS >> HERE/log"]
[web]\ndomains: a.example.com\nkeyTypes: rsa ec\nuploadKeys: ["echo web KEYS >> HERE/log"]`,
  );
  const web = ["rsa2048", "prime256v1"].map((tag) => path(bed, "key", "a.example.com", tag)).join(" ");
  await bed.run();
  assert.deepEqual(bed.take().sort(), [`pg ${path(bed, "cert", "a.example.com", "rsa2048")}`, `web ${web}`]);
  Deno.removeSync(path(bed, "cert", "a.example.com"));
  await bed.run();
  assert.deepEqual(bed.take(), [`web ${web}`]);
});

Deno.test("placeholders and environment have the files and names of the pending lines, links included, and no others", async () => {
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

Deno.test("--verbose prints the output of commands", async () => {
  const actions = `[default]\nprepare: ["echo ready; exec cat"]\nupdate: ["echo hello; echo there >&2"]`;
  await using bed = await bedOf("a.example.com", actions, "keyTypes: ec\npreflight: no");
  const { stdout } = await bed.run({ verbose: true });
  assert.deepEqual(stdout.match(/\| (ready|hello|there)$/gm), ["| ready", "| hello", "| there"]);
  assert.doesNotMatch((await bed.run({ named: { deliver: ["[default]"] } })).stdout, /hello$/m);
});

// ---- order -----------------------------------------------------------------------------------------------

Deno.test("a section that hangs delays no other, and [every] runs when all others are done", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[every]\nuploadCerts: ["echo every DOMAINS_CN >> HERE/log"]
[a]\ndomains: a.example.com\nuploadCerts: ["read word < HERE/fifo; echo a >> HERE/log"]
[b]\ndomains: b.example.com\nupdate: ["echo b >> HERE/log; echo go > HERE/fifo"]`,
  );
  await makeFifo(bed); // the last command of [b] releases [a]
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), ["b", "a", "every a.example.com b.example.com"]);
});

Deno.test("a line whose challenge is slow delays only its own section and [every]", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com\nc.example.com",
    `[DEFAULT]\nupdate: ["echo DOMAINS_CN >> HERE/log"]\n[every]\n[slow]\ndomains: a.example.com
prepare: ["cat"]\n[both]\ndomains: a.example.com b.example.com\n[default]`,
  );
  const gate = Promise.withResolvers<void>();
  const route = () => gate.promise.then(() => [{ address: "127.0.0.1", port: bed.web.port }]);
  const running = bed.run({ route });
  await until("the others have been delivered", () => existsSync(join(bed.home, "log")));
  gate.resolve();
  await running;
  const [first, ...rest] = bed.take();
  const both = "a.example.com b.example.com";
  assert.deepEqual([first, rest.pop()], ["c.example.com", `${both} c.example.com`]);
  assert.deepEqual(rest.sort(), ["a.example.com", both]);
});

Deno.test("a rollout delivers one section at a time and ends at the first failure; that section is last in the next rollout", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", "");
  await settle(bed);
  const section = (name: string) =>
    `[${name}]\ndomains: ${name}.example.com\n` +
    `update: ["mkdir HERE/one && rmdir HERE/one && echo ${name} >> HERE/log; ! test -e HERE/${name}"]\n`;
  bed.act(`${section("a")}${section("b")}${section("c")}[every]\nupdate: ["echo every >> HERE/log"]`);
  Deno.writeTextFileSync(join(bed.home, "b"), "");
  assert.deepEqual([(await bed.run()).code, bed.take()], [1, ["a", "b"]]);
  assert.deepEqual([(await bed.run()).code, bed.take()], [1, ["c", "b"]]);
  Deno.removeSync(join(bed.home, "b"));
  assert.deepEqual([(await bed.run({ retry: true })).code, bed.take()], [0, ["b", "every"]]);
});

Deno.test("at most eight sections receive new certificates at once", async () => {
  const names = Array.from({ length: 12 }, (_, n) => `host${n}.example.com`);
  // each waits until eight have begun, and logs how many are running
  const update = JSON.stringify([
    "echo >> HERE/begun; mkdir -p HERE/at/DOMAINS_CN; until test $(wc -l < HERE/begun) -ge 8; do sleep 0.01; done",
    "ls HERE/at | wc -l >> HERE/log; sleep 0.02; rmdir HERE/at/DOMAINS_CN",
  ]);
  const sections = names.map((name) => `[${name}]\ndomains: ${name}\nupdate: ${update}`);
  await using bed = await bedOf(names.join("\n"), sections.join("\n"));
  assert.equal((await bed.run()).code, 0);
  const counts = bed.take().map(Number);
  assert.deepEqual([counts.length, Math.max(...counts)], [12, 8]);
});

Deno.test("new certificates are delivered in parallel while a rollout waits for its turn", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", "");
  await settle(bed);
  await makeFifo(bed);
  for (const name of ["b.example.com", "c.example.com"]) Deno.removeSync(path(bed, "cert", name));
  // [a] is a rollout and [b] urgent: each would hang without the other, and without [c]
  bed.act(`[a]\ndomains: a.example.com\nupdate: ["read word < HERE/fifo"]
[b]\ndomains: b.example.com\nupdate: ["until test -e HERE/c; do sleep 0.01; done; echo go > HERE/fifo"]
[c]\ndomains: c.example.com\nupdate: ["touch HERE/c"]`);
  assert.equal((await bed.run()).code, 0);
});

// ---- receipts --------------------------------------------------------------------------------------------

Deno.test("a changed configuration delivers what a section has not received yet, and nothing else", async () => {
  const log = `update: ["echo DOMAINS_CN >> HERE/log"]`;
  const begin = `[web]\ndomains: a.example.com b.example.com\n${log}`;
  const table: [what: string, actions: string, log: string[], domains?: string][] = [
    ["a section is renamed", begin.replace("web", "www"), []],
    [
      "a section is renamed and its commands change",
      begin.replace("web", "www").replace("echo", "echo new"),
      ["new a.example.com b.example.com"],
    ],
    [
      "a line moves to another section",
      `[web]\ndomains: a.example.com\n${log}\n[b]\ndomains: b.example.com\n${log.replace("echo", "echo b")}`,
      ["b b.example.com"],
    ],
    ["a second host is added", `${begin}\n[2]\ndomains: a.example.com\n${log}`, ["a.example.com"]],
    ["a setting without effect on deliveries changes", `${begin}\nalert: ["true"]\nverifyWait: 1`, []],
    ["a line is added", begin, [], "a.example.com\nb.example.com\nc.example.com"],
  ];
  await all(table.map(async ([what, actions, expected, domains]) => {
    await using bed = await bedOf("a.example.com\nb.example.com", begin);
    await settle(bed);
    bed.configure({ domains });
    bed.act(actions);
    const { code, stderr } = await bed.run();
    assert.deepEqual([code, bed.take()], [0, expected], `${what}: ${stderr}`);
    assert.equal((await bed.run(), bed.take().length), 0, `${what}: again`);
  }));
});

Deno.test("a line or section that is absent for one run is not delivered again; a failed delivery still is", async () => {
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

Deno.test("--accept records as delivered what is already in place, and runs no command", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`,
  );
  await bed.plant();
  const config = bed.config();
  const selection = select(config, { accept: ["a.example.com"] })!;
  assert.equal(await accept(config, selection, bed.context(), () => {}), 1);
  assert.deepEqual(bed.take(), []);
  await bed.run();
  assert.deepEqual(bed.take(), ["b.example.com"]);
});

Deno.test("--deliver delivers what it names once more", async () => {
  const log = (name: string) => `update: ["echo ${name} DOMAINS_CN >> HERE/log"]\n`;
  const actions = `[a]\ndomains: a.example.com\n${log("a")}[default]\n${log("default")}[every]\n${
    log("every")
  }`;
  await using bed = await bedOf("a.example.com\nb.example.com", actions);
  await settle(bed);
  const table: [deliver: string[], log: string[]][] = [
    [["a.example.com"], ["a a.example.com", "every a.example.com"]],
    [["[every]"], ["every a.example.com b.example.com"]],
    [["[a]", "b.example.com"], ["a a.example.com", "default b.example.com", "every b.example.com"]],
    [[], []],
  ];
  for (const [deliver, expected] of table) {
    assert.equal((await bed.run({ named: { deliver } })).code, 0);
    const log = bed.take();
    assert.equal(log.at(-1), expected.at(-1), "[every] comes last");
    assert.deepEqual(log.sort(), expected);
  }
});

// ---- retries ---------------------------------------------------------------------------------------------

Deno.test("a failed delivery is retried by the next run, then after 1, 2, 4 … 20 hours, until the host is back", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nuploadCerts: ["echo >> HERE/log; test -e HERE/up"]`,
  );
  const tries = async () => (await bed.run(), bed.take().length);
  assert.deepEqual([await tries(), await tries()], [1, 1]);
  for (const hours of [1, 2, 4, 8, 16, 20, 20]) {
    bed.ca.advance(hours * HOUR - MINUTE);
    assert.equal(await tries(), 0, `before ${hours} h`);
    bed.ca.advance(MINUTE);
    assert.equal(await tries(), 1, `after ${hours} h`);
  }
  const waiting = await bed.run();
  assert.equal(waiting.code, 1); // still a problem, although this run does not retry it
  assert.match(waiting.stderr, /^problem +\[default\] .*exit status 1.*--retry/m);
  for (let night = 0; night < 2; night++) {
    bed.ca.advance(DAY - 1000); // a timer is not exact
    assert.equal(await tries(), 1, `night ${night}`);
  }
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  const { code, stdout, requests } = await bed.run({ retry: true });
  assert.deepEqual([code, requests.length, bed.state().deliveries], [0, 0, {}]);
  assert.match(stdout, /^delivered +\[default\] /m);
});

Deno.test("pending deliveries are made even if the CA is unreachable", async () => {
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
