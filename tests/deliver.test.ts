/** Goal: each section receives its pending deliveries, complete and in order, from the right files, until they succeed. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type Bed, testBed, until } from "./bed.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE;

const bedOf = (domains: string, actions: string) =>
  testBed({ domains, actions, settings: "keyTypes: ec\ncommandTimeout: 30\nari: no" });

const touch = (bed: Bed, name: string) => Deno.writeTextFileSync(join(bed.home, name), "");
const removeCert = (bed: Bed, stem: string) =>
  Deno.removeSync(bed.path("test", "cert", `${stem}-cert-combined.prime256v1.test.pem`));

/** Puts certificates of all lines in place and delivers them. */
async function settle(bed: Bed): Promise<void> {
  await bed.plant();
  const { code, stderr } = await bed.run();
  assert.equal(code, 0, stderr);
  bed.take();
}

Deno.test("R3: each section runs its lists whole and in order, with its own names, whatever another section runs", async () => {
  const [a, b] = ["a.example.com", "b.example.com"] as const;
  const echo = (...texts: string[]) =>
    JSON.stringify(texts.map((text) => text && `echo ${text} >> HERE/DOMAINS_CN`));
  const actions = (rehearse: string) =>
    `[DEFAULT]
update: ${echo("pause", "reload", "", "pause", "reload $LEMATT_MODE $LEMATT_DOMAINS_CN")}
[a]
domains: ${a}
keyTypes: rsa ec
rehearse: ${rehearse}
uploadEach: ["echo each KEY_TYPE >> HERE/DOMAIN"]
uploadKeys: ${echo("keys")}
uploadCerts: ${echo("certs 1", "certs 2")}
[b]
domains: ${b}
uploadCerts: ${echo("certs")}`;
  await using bed = await bedOf(`${a}\n${b}`, actions("yes"));
  const updates = (name: string, mode = "test") => ["pause", "reload", "pause", `reload ${mode} ${name}`];
  const [before, each] = [["certs 1", "certs 2", "keys"], ["each rsa", "each ec"]];
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(b), ["certs", ...updates(b)]);
  assert.deepEqual(bed.take(a), [...before, ...each, ...updates(a)]);
  bed.act(actions("no")); // uploadEach chooses its own file names, which may be those of production
  await bed.run();
  assert.deepEqual([bed.take(b), bed.take(a)], [[], [...before, ...updates(a)]]);
  await bed.run({ mode: "prod" });
  assert.deepEqual(bed.take(a), [...before, ...each, ...updates(a, "prod")]);
});

Deno.test("a failed upload skips the rest of its section and is printed; uploadEach fails for its own certificate alone", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com\nc.example.com\nd.example.com",
    `[d]
domains: d.example.com
rehearse: yes
uploadEach: ["test ! -e HERE/down"]
update: ["echo update d >> HERE/a"]
[a]
domains: a.example.com
uploadCerts: ["{ seq 25; echo no route to host; } >&2; test ! -e HERE/down"]
update: ["echo update a >> HERE/a"]
[default]
rehearse: yes
uploadEach: ["echo each DOMAIN >> HERE/log; test ! -e HERE/down || test DOMAIN != b.example.com"]
update: ["echo hello; echo update DOMAINS_CN >> HERE/log"]`,
  );
  touch(bed, "down");
  const first = await bed.run({ verbose: true });
  assert.deepEqual([first.code, bed.take("a")], [1, []]);
  assert.match(first.stdout, /\| hello$/m);
  assert.match(
    first.stderr,
    /^FAILED +\[a\] .*\n.*"{ seq .*": exit status 1\n +\| 7\n[^]* \| no route to host$/m,
  );
  assert.deepEqual(bed.take(), ["each b.example.com", "each c.example.com", "update c.example.com"]);
  Deno.removeSync(join(bed.home, "down"));
  const second = await bed.run();
  const b = ["each b.example.com", "update b.example.com"];
  assert.deepEqual([second.code, bed.take("a").sort(), bed.take()], [0, ["update a", "update d"], b]);
  assert.doesNotMatch(second.stdout, /hello$/m);
});

Deno.test("R9: a section receives the pending lines whole, with the key types that it configures, links included, and no other lines", async () => {
  const names = ["web.example.com", "shop.web.example.com", "www.web.example.com"];
  const all = names.join(" ");
  await using bed = await bedOf(
    `example.com\nexample.com.au\n${all}`,
    `[DEFAULT]
uploadCerts: ["ls CERTS > /dev/null && basename -a CERTS >> HERE/log"]
[pg]
domains: ${names[0]}
keyTypes: rsa
[web]
domains: ${all}
keyTypes: rsa ec
uploadKeys: ["ls KEYS > /dev/null && basename -a KEYS >> HERE/log"]
update: ["echo DOMAINS_CN / DOMAINS_ALL / $LEMATT_DOMAINS_ALL >> HERE/log"]
[default]`,
  );
  await settle(bed);
  const stems = [names.join("_"), ...names];
  removeCert(bed, stems[0]!);
  assert.equal((await bed.run()).code, 0);
  const files = ["cert-combined", "key"].flatMap((what) =>
    ["rsa2048", "prime256v1"].flatMap((tag) => stems.map((stem) => `${stem}-${what}.${tag}.test.pem`))
  );
  assert.deepEqual(bed.take(), [...files, `${names[0]} / ${all} / ${all}`]);
  await bed.run({ named: { deliver: ["[pg]"] } });
  assert.deepEqual(bed.take(), stems.map((stem) => `${stem}-cert-combined.rsa2048.test.pem`));
});

Deno.test("S2: a line whose challenge is slow delays only its own section and [every], which is last", async () => {
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
  const sections = ["a", "b", "c"].map((name) =>
    `[${name}]\ndomains: ${name}.example.com\n` +
    `update: ["mkdir HERE/one && rmdir HERE/one && echo ${name} >> HERE/log; ! test -e HERE/${name}"]\n`
  );
  const all = `${sections.join("")}[every]\nupdate: ["echo every >> HERE/log"]`;
  bed.act(all);
  touch(bed, "b");
  assert.deepEqual([(await bed.run()).code, bed.take()], [1, ["a", "b"]]);
  assert.deepEqual([(await bed.run()).code, bed.take()], [1, ["c", "b"]]);
  Deno.removeSync(join(bed.home, "b"));
  assert.deepEqual([(await bed.run({ retry: true })).code, bed.take()], [0, ["b", "every"]]);
  bed.act(`[DEFAULT]\nverify: ["127.0.0.1:1"]\nverifyWait: 0\n${all.replaceAll("echo", "echo 2")}`);
  assert.equal((await bed.run()).code, 1);
  assert.equal(bed.take().length, 1, "an endpoint that is not right is a failure, too");
});

Deno.test("eight sections with new certificates and one rollout run in parallel", async () => {
  const names = Array.from({ length: 12 }, (_, n) => `host${n}.example.com`);
  await using bed = await bedOf(`${names.join("\n")}\nold.example.com`, "");
  await settle(bed);
  for (const name of names) removeCert(bed, name);
  // each waits until eight and the rollout have begun, and logs how many are running
  const update = JSON.stringify([
    "mkdir -p HERE/at/DOMAINS_CN; echo >> HERE/begun; until test $(wc -l < HERE/begun) -ge 9; do sleep 0.01; done",
    "ls HERE/at | wc -l >> HERE/log; sleep 0.02; rmdir HERE/at/DOMAINS_CN",
  ]);
  const rollout = `[old]\ndomains: old.example.com\nupdate: ["echo >> HERE/begun"]\n`;
  bed.act(rollout + names.map((name) => `[${name}]\ndomains: ${name}\nupdate: ${update}`).join("\n"));
  assert.equal((await bed.run()).code, 0);
  const counts = bed.take().map(Number);
  assert.deepEqual([counts.length, Math.max(...counts)], [12, 8]);
});

Deno.test("R2: whatever changes in the configuration, a section is delivered what it has not received, and nothing else", async () => {
  const [a, b] = ["a.example.com", "b.example.com"] as const;
  const log = (text = "") => `update: ["echo ${text}DOMAINS_CN >> HERE/log; test ! -e HERE/down"]\n`;
  const begin = `[web]\ndomains: ${a} ${b}\n${log()}`;
  await using bed = await bedOf(`${a}\n${b}`, begin);
  await settle(bed);
  const changed = begin.replace("web", "site").replace("echo", "echo new");
  const moved = `${changed.replace(` ${b}`, "")}[b]\ndomains: ${b}\n${log("b ")}`;
  const added = `${moved}[2]\ndomains: ${a}\n${log("2 ")}`;
  const steps: [what: string, actions: string, log: string[], domains?: string][] = [
    ["a section is renamed", begin.replace("web", "www"), []],
    ["it is renamed, and its commands change", changed, [`new ${a} ${b}`]],
    ["a line moves to another section", moved, [`b ${b}`]],
    ["a second host is added", added, [`2 ${a}`]],
    ["a setting without effect on deliveries changes", `${added}alert: ["true"]\nverifyWait: 1\n`, []],
    ["a line and all sections are absent", "", [], b],
    ["they are back, and a line is new", added, [], `${a}\n${b}\nc.example.com`],
  ];
  for (const [what, actions, expected, domains] of steps) {
    bed.configure({ actions, domains });
    const { code, stderr } = await bed.run();
    assert.deepEqual([code, bed.take()], [0, expected], `${what}: ${stderr}`);
    assert.equal((await bed.run(), bed.take().length), 0, `${what}: again`);
  }
  touch(bed, "down");
  bed.act(added.replace("2 ", "3 "));
  assert.deepEqual([(await bed.run()).code, bed.take()], [1, [`3 ${a}`]]);
  const { since } = bed.state().deliveries["2"]!;
  bed.act(added.replace("2 ", "4 "));
  bed.ca.advance(HOUR);
  assert.deepEqual([(await bed.run()).code, bed.take()], [1, [`4 ${a}`]]);
  assert.equal(bed.state().deliveries["2"]!.since, since, "other commands that fail, too: as old as before");
  Deno.removeSync(join(bed.home, "down"));
  bed.act("");
  await bed.run();
  bed.act(added.replace("2 ", "3 "));
  assert.deepEqual([(await bed.run()).code, bed.take()], [0, [`3 ${a}`]], "a failed delivery stays pending");
});

Deno.test("R13: a failed delivery is retried by the next run, then after 1, 2, 4 … 20 hours, also while the CA is unreachable", async () => {
  const actions = `[every]\nuploadCerts: ["echo DOMAINS_CN >> HERE/log; test -e HERE/up"]`;
  await using bed = await bedOf("a.example.com", actions);
  const tries = async () => (await bed.run(), bed.take().length);
  assert.deepEqual([await tries(), await tries()], [1, 1]);
  for (const hours of [1, 2, 4, 8, 16, 20, 20]) {
    bed.ca.advance(hours * HOUR - MINUTE);
    assert.equal(await tries(), 0, `before ${hours} h`);
    bed.ca.advance(MINUTE);
    assert.equal(await tries(), 1, `after ${hours} h`);
  }
  const waiting = await bed.run();
  assert.equal(waiting.code, 1);
  assert.match(waiting.stderr, /^problem +\[every\] .*exit status 1.*--retry/m);
  touch(bed, "up");
  bed.configure({ domains: "a.example.com\nb.example.com" });
  const fetch = () => Promise.reject(new TypeError("the cable is out"));
  const { code, stderr } = await bed.run({ retry: true, fetch });
  assert.deepEqual([code, bed.take(), bed.state().deliveries], [1, ["a.example.com"], {}]);
  assert.match(stderr, /the cable is out/);
});
