/** Goal: what a run leaves for the next one, what a restricted run leaves alone, and what a lost state costs. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { revocable, revoke, select } from "../lib/run.ts";
import { type Bed, faultAt, refusing, testBed, until } from "./bed.ts";
import { isRunning } from "./faults.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE;

const bedOf = (domains: string, actions = "", settings = "ari: no") =>
  testBed({ domains, actions, settings: `keyTypes: ec\n${settings}` });

const certOf = (bed: Bed, stem: string) =>
  bed.path("test", "cert", `${stem}-cert-combined.prime256v1.test.pem`);
const keyOf = (bed: Bed, stem: string) => bed.text("test", "key", `${stem}-key.prime256v1.test.pem`);
const issuedBy = (bed: Bed) => bed.ca.issued.map(({ names }) => names[0]);

Deno.test("a line that the CA refuses waits 1, 10, 100, 1000 minutes, then 20 hours, and is a problem meanwhile; other lines do not wait", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  bed.ca.refused.add("a.example.com");
  assert.deepEqual([(await bed.run()).code, issuedBy(bed)], [1, ["b.example.com"]]);
  for (const minutes of [1, 10, 100, 1000, 1200, 1200]) {
    bed.ca.advance(minutes * MINUTE - 30_000);
    const early = await bed.run();
    assert.deepEqual([early.requests.length, early.code], [0, 1], `before ${minutes} minutes`);
    assert.match(early.stderr, /^problem +a\.example\.com .*not this one.*--retry/m);
    bed.ca.advance(30_000);
    assert.ok((await bed.run()).requests.length > 0, `after ${minutes} minutes`);
  }
  bed.ca.refused.clear();
  // a rate limit ends at Retry-After
  const unpause = `https://portal.example.org/sfe/v1/unpause?jwt=${"x".repeat(900)}.${"y".repeat(300)}`;
  const headers = { "retry-after": new Date(bed.ca.now.getTime() + 5 * HOUR).toUTCString() };
  const refusal = refusing(429, "rateLimited", `too many for a.example.com. Visit: ${unpause}`, { headers });
  bed.ca.switches.fault = faultAt("newOrder", refusal);
  bed.configure({ domains: "a.example.com\nc.example.com" });
  const limited = await bed.run({ retry: true, parallel: 1 });
  bed.ca.advance(4 * HOUR);
  const later = await bed.run();
  for (const { stderr } of [limited, later]) assert.ok(stderr.includes(unpause), "the whole URL");
  assert.deepEqual([issuedBy(bed), later.requests.length], [["b.example.com", "c.example.com"], 0]);
  bed.ca.advance(HOUR + MINUTE);
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.state().failures, {});
  // one that names no line is for all
  bed.ca.switches.fault = faultAt("newOrder", refusing(429, "rateLimited", "too many orders"), Infinity);
  bed.configure({ domains: "d.example.com\ne.example.com" });
  const { requests } = await bed.run({ parallel: 1 });
  assert.equal(requests.filter(({ resource }) => resource === "newOrder").length, 1);
});

Deno.test("--renew issues the lines that it names, with --new-key under new keys; --only forces nothing", async () => {
  const three = "a.example.com www\nb.example.com\nc.example.com";
  await using bed = await bedOf(three);
  await bed.run();
  bed.configure({ domains: `${three}\nd.example.com` });
  const keys = () => ["a.example.com_www.a.example.com", "b.example.com"].map((stem) => keyOf(bed, stem));
  const before = keys();
  const table: [named: Parameters<typeof select>[1], issued: string[]][] = [
    [{ renew: ["www.a.example.com"] }, ["a.example.com"]],
    [{ renew: ["B.example.com"], newKey: true }, ["b.example.com"]],
    [{ only: ["c.example.com"] }, []],
    [{ only: ["c.example.com", "d.example.com"] }, ["d.example.com"]],
    [{}, []],
  ];
  for (const [named, issued] of table) {
    const count = bed.ca.issued.length;
    assert.equal((await bed.run({ named })).code, 0);
    assert.deepEqual(issuedBy(bed).slice(count), issued, JSON.stringify(named));
  }
  assert.deepEqual(keys().map((key, index) => key === before[index]), [true, false]);
  assert.equal(bed.state().runs.length, 2, "restricted runs do not count for the usual interval");
});

Deno.test("--cron repeats a failure after 20 hours; a restricted run delivers and prints only what it names, and reports no other recovery", async () => {
  const failing = (name: string) =>
    `[${name}]\ndomains: ${name}.example.com\nupdate: ["echo ${name} >> HERE/log; test -e HERE/up"]\n`;
  const every = `[every]\nalert: ["cat >> HERE/alerts"]`;
  await using bed = await bedOf("a.example.com\nb.example.com", failing("a") + failing("b") + every);
  const alerts = () => bed.take("alerts").join("\n").match(/^(resolved: )?\[\w+\]/gm);
  await bed.run();
  bed.ca.advance(19 * HOUR);
  const early = await bed.run({ cron: true });
  assert.deepEqual([early.code, early.stdout, early.stderr], [1, "", ""]);
  assert.deepEqual(bed.take().sort(), ["a", "a", "b", "b"]);
  bed.ca.advance(HOUR);
  const only = await bed.run({ named: { only: ["a.example.com"] }, retry: true, cron: true });
  assert.deepEqual([only.code, bed.take(), alerts()], [1, ["a"], ["[a]", "[b]"]]);
  assert.doesNotMatch(only.stderr, /\[b\]/);
  const all = await bed.run({ cron: true, retry: true });
  assert.match(all.stderr, /\[b\]/, "not counted as printed by the restricted run");
  bed.take();
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  await bed.run({ named: { renew: ["a.example.com"] } });
  assert.deepEqual([bed.take(), alerts()], [["a"], ["resolved: [a]"]]);
  const { code, stdout } = await bed.run({ named: { deliver: ["[b]"] } });
  assert.deepEqual([code, bed.take(), alerts()], [0, ["b"], ["resolved: [b]"]]);
  assert.match(stdout, /\n1 section delivered\n$/, "no count of certificates, which are left aside");
  await bed.run({ named: { deliver: ["b.example.com"] } });
  assert.deepEqual([bed.take(), (await bed.run()).code, bed.take()], [["b"], 0, []]);
});

Deno.test("R15: an interrupted run ends its commands, records no failure, and leaves the rest to the next run", async () => {
  const actions = (b: string) =>
    `[a]\ndomains: a.example.com\nupdate: ["echo a >> HERE/log"]\n[b]\ndomains: b.example.com\nupdate: ["${b}"]`;
  await using bed = await bedOf("a.example.com\nb.example.com", actions("echo $$ > HERE/b; sleep 60"), "");
  const stop = new AbortController();
  const running = bed.run({ signal: stop.signal });
  const isDelivered = (name: string) => Object.hasOwn(bed.state().receipts, name);
  await until("[b] runs, and [a] is done", () => existsSync(join(bed.home, "b")) && isDelivered("a"));
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
  assert.equal(isRunning(Number(bed.take("b")[0])), false);
  assert.deepEqual(bed.take(), ["a"]);
  bed.act(actions("echo b >> HERE/log"));
  assert.deepEqual([(await bed.run()).code, bed.take()], [0, ["b"]]);

  bed.ca.advance(24 * HOUR);
  const again = new AbortController();
  bed.ca.switches.fault = ({ resource }) => {
    if (resource === "renewalInfo") again.abort(new DOMException("interrupted", "AbortError"));
    return undefined;
  };
  await assert.rejects(bed.run({ signal: again.signal }), { name: "AbortError" });
  assert.deepEqual([bed.state().failures, bed.state().deliveries], [{}, {}]);
});

const LOG = `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`;

Deno.test("after a state is lost or corrupt, everything is delivered once more, and nothing is issued", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com", LOG);
  await bed.plant();
  await bed.run();
  const path = bed.path("test", "state.json");
  const corrupt = [`{"version":2,"receipts":{"defa`, `{"version":2,"runs":[{"at":"yesterday"}]}`];
  for (const text of [undefined, ...corrupt]) {
    bed.take();
    if (text === undefined) Deno.removeSync(path);
    else Deno.writeTextFileSync(path, text);
    bed.ca.advance(1000);
    const { code, stdout, requests } = await bed.run({ cron: true });
    assert.deepEqual([code, requests, bed.take()], [0, [], ["a.example.com b.example.com"]], text);
    if (text !== undefined) assert.equal(bed.text("test", /set aside as (\S+),/.exec(stdout)![1]!), text);
    const next = await bed.run({ cron: true });
    assert.deepEqual([next.code, next.stdout, next.stderr, bed.take()], [0, "", "", []], text);
  }
});

Deno.test("a directory of 0.1.0 is taken over with its pending deliveries and revoked certificates", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", LOG);
  await bed.plant();
  const key = keyOf(bed, "c.example.com");
  const fingerprint = (name: string) => revocable(bed.config(), name)[0]!.certificate.fingerprint;
  const certificates = { "b.example.com-cert-combined.prime256v1.test.pem": fingerprint("b.example.com") };
  const at = "2026-01-01T00:00:00.000Z";
  const owed = { default: { since: at, certificates, attempts: 2 } };
  const revoked = { [fingerprint("c.example.com")]: at };
  const failures = { "c.example.com": { count: 2, at, error: "refused" } };
  const state = JSON.stringify({ version: 1, owed, revoked, failures });
  Deno.writeTextFileSync(bed.path("test", "state.json"), state);
  assert.deepEqual([(await bed.run()).code, bed.take()], [0, ["b.example.com c.example.com"]]);
  assert.notEqual(keyOf(bed, "c.example.com"), key);
  assert.equal((await bed.run(), bed.take().length), 0);
});

Deno.test("R4, R19: the certificate that was shown is revoked, and then replaced under a new key, whatever happens in between", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com");
  await bed.run();
  const config = bed.config();
  const shown = revocable(config, "www.a.example.com");
  await bed.run({ named: { renew: ["a.example.com"] } }); // the lock is free
  for (let twice = 0; twice < 2; twice++) await revoke(config, shown, 4, bed.context(), () => {});
  assert.match(bed.text("test", "revoked-keys"), /^[0-9a-f]{64}\n$/);
  const revoked = bed.ca.issued.filter(({ revoked }) => revoked !== undefined);
  assert.deepEqual(revoked.map(({ names, revoked }) => [names.length, revoked!.reason]), [[2, 4]]);
  assert.ok(bed.ca.issued.indexOf(revoked[0]!) < 2, "not the renewed one");
  const stem = "a.example.com_www.a.example.com";
  const key = keyOf(bed, stem);
  bed.ca.refused.add("a.example.com");
  assert.equal((await bed.run()).code, 1);
  bed.ca.refused.clear();
  Deno.removeSync(certOf(bed, stem));
  assert.equal((await bed.run({ retry: true })).code, 0);
  assert.notEqual(keyOf(bed, stem), key);
});

Deno.test("what an option names must exist: lines, sections, certificates by a path or a name that is on one line", async () => {
  const lines = ["a.example.com shop.example.com", "b.example.com shop.example.com", "c.example.com"];
  await using bed = await bedOf(lines.join("\n"), `[mail]\ndomains: a.example.com\nupdate: ["true"]`);
  await bed.plant();
  bed.configure({ domains: `${lines.slice(0, 2).join("\n")}\nd.example.com` });
  const config = bed.config();
  assert.equal(select(config, { deliver: ["[mail]", "A.Example.com"] })!.lines.size, 1);
  const refusal = { name: "SelectionError", message: /^[\x20-\x7e]*$/ };
  for (const name of ["x.example.com", "*.example.com", "[web]", "mail", "[]", "\x1b[31m", "[constructor]"]) {
    assert.throws(() => select(config, { deliver: [name] }), refusal, name);
  }
  assert.throws(() => select(config, { renew: ["[mail]"] }), refusal);
  const chosen = (what: string) => revocable(config, what).map(({ certificate }) => certificate.names[0]);
  assert.deepEqual(chosen(certOf(bed, "c.example.com")), ["c.example.com"]);
  const wrong = ["x.example.com", "shop.example.com", "d.example.com", "\x1b[31m", bed.path("lematt.conf")];
  for (const what of wrong) assert.throws(() => chosen(what), refusal, what);
});
