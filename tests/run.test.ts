/** Goal: what a run leaves for the next one, what a restricted run leaves alone, and what a lost state costs. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { prunable, prune, revocable, revoke, select } from "../lib/run.ts";
import { type Bed, faultAt, type Ran, refusing, testBed, until } from "./bed.ts";
import { isRunning } from "./faults.ts";
import type { Switches } from "./ca.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

/** A bed with EC certificates only. */
const bedOf = (domains: string, ca: Switches = {}, actions = "") =>
  testBed({ domains, settings: "keyTypes: ec\nari: no", ca, actions });

const ordersOf = ({ requests }: Ran) => requests.filter(({ resource }) => resource === "newOrder").length;
const certOf = (bed: Bed, stem: string) =>
  bed.path("test", "cert", `${stem}-cert-combined.prime256v1.test.pem`);
const keyOf = (bed: Bed, stem: string) => bed.text("test", "key", `${stem}-key.prime256v1.test.pem`);

// ---- failures and limits ---------------------------------------------------------------------------------

Deno.test("a line that the CA refuses waits 1, 10, 100, 1000 minutes, then 20 hours, and is a problem meanwhile", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  bed.refused.add("a.example.com");
  const first = await bed.run();
  assert.deepEqual([first.code, ordersOf(first), bed.ca.issued.length], [1, 2, 1]);
  for (const minutes of [1, 10, 100, 1000, 1200, 1200]) {
    bed.ca.advance(minutes * MINUTE - 30_000);
    const early = await bed.run();
    assert.deepEqual([early.requests.length, early.code], [0, 1], `before ${minutes} minutes`);
    assert.match(early.stderr, /^problem +a\.example\.com .*not this one.*--retry/m);
    bed.ca.advance(30_000);
    assert.equal(ordersOf(await bed.run()), 1, `after ${minutes} minutes`);
  }
  bed.refused.clear();
  assert.equal((await bed.run({ retry: true })).code, 0);
  assert.deepEqual(bed.state().failures, {});
});

Deno.test("a rate limit that names a line delays only that line, until Retry-After", async () => {
  const headers = { "retry-after": new Date(Date.now() + 5 * HOUR).toUTCString() };
  const refusal = refusing(429, "rateLimited", "too many certificates already issued for a.example.com", {
    headers,
  });
  await using bed = await bedOf("a.example.com\nb.example.com", { fault: faultAt("newOrder", refusal) });
  assert.equal((await bed.run({ parallel: 1 })).code, 1);
  assert.deepEqual(bed.ca.issued.map(({ names }) => names[0]), ["b.example.com"]);
  bed.ca.advance(4 * HOUR);
  assert.equal((await bed.run()).requests.length, 0);
  bed.ca.advance(HOUR + MINUTE);
  assert.equal((await bed.run()).code, 0);
});

Deno.test("the complete URL to unpause an account is printed, in this run and in later ones", async () => {
  const unpause = `https://portal.example.org/sfe/v1/unpause?jwt=${"x".repeat(900)}.${"y".repeat(300)}`;
  const refusal = refusing(429, "rateLimited", `paused for a.example.com. Please visit: ${unpause}`);
  await using bed = await bedOf("a.example.com", { fault: faultAt("newOrder", refusal) });
  for (let run = 0; run < 2; run++) assert.ok((await bed.run()).stderr.includes(unpause));
});

// ---- restricted runs -------------------------------------------------------------------------------------

Deno.test("--renew issues the lines that it names, with --new-key under new keys; --only forces nothing", async () => {
  const three = "a.example.com www\nb.example.com\nc.example.com";
  await using bed = await bedOf(three);
  await bed.run();
  bed.configure({ domains: `${three}\nd.example.com` });
  const keys = () => ["a.example.com_www.a.example.com", "b.example.com"].map((stem) => keyOf(bed, stem));
  const [a, b] = keys();
  const table: [named: Parameters<typeof select>[1], issued: string[]][] = [
    [{ renew: ["www.a.example.com"] }, ["a.example.com"]],
    [{ renew: ["B.example.com"], newKey: true }, ["b.example.com"]],
    [{ only: ["c.example.com"] }, []],
    [{ only: ["c.example.com", "d.example.com"] }, ["d.example.com"]],
    [{}, []],
  ];
  for (const [named, issued] of table) {
    const before = bed.ca.issued.length;
    assert.equal((await bed.run({ named })).code, 0);
    assert.deepEqual(bed.ca.issued.slice(before).map(({ names }) => names[0]), issued, JSON.stringify(named));
  }
  assert.deepEqual(keys().map((key, i) => key === [a, b][i]), [true, false]);
});

Deno.test("a restricted run delivers only what it names, and reports only the problems of that", async () => {
  const failing = (name: string) =>
    `[${name}]\ndomains: ${name}.example.com\nupdate: ["echo ${name} >> HERE/log; test -e HERE/up"]\n`;
  await using bed = await bedOf("a.example.com\nb.example.com", {}, failing("a") + failing("b"));
  await bed.run();
  bed.take();
  const { code, stderr } = await bed.run({ named: { only: ["a.example.com"] }, retry: true });
  assert.deepEqual([code, bed.take()], [1, ["a"]]);
  assert.doesNotMatch(stderr, /\[b\]/);
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  assert.equal((await bed.run({ named: { renew: ["a.example.com"] } })).code, 0);
  assert.deepEqual(bed.take(), ["a"]);
  const { stdout } = await bed.run({ named: { deliver: ["[b]"] } });
  assert.match(stdout, /\n1 section delivered\n$/, "no count of certificates, which are left aside");
  assert.deepEqual(bed.take(), ["b"]);
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), []);
});

Deno.test("lines and sections that an option names must exist", async () => {
  await using bed = await bedOf("a.example.com", {}, `[mail]\ndomains: a.example.com\nupdate: ["true"]`);
  const config = bed.config();
  const wrong = ["b.example.com", "*.example.com", "[web]", "mail", "[]", "\x1b[31m", "[constructor]"];
  for (
    const named of [...wrong.map((name) => ({ deliver: [name] })), { renew: ["[mail]"] }, {
      only: ["b.example.com"],
    }]
  ) {
    const refusal = { name: "SelectionError", message: /^[\x20-\x7e]*$/ };
    assert.throws(() => select(config, named), refusal, JSON.stringify(named));
  }
  assert.equal(select(config, {}), undefined);
  assert.equal(select(config, { deliver: ["[mail]", "A.Example.com"] })!.lines.size, 1);
});

// ---- interrupted -----------------------------------------------------------------------------------------

Deno.test("a run that is interrupted while it fetches renewal information records no failure", async () => {
  const stop = new AbortController();
  await using bed = await testBed({ domains: "a.example.com", settings: "keyTypes: ec" });
  await bed.run();
  bed.ca.advance(DAY);
  bed.ca.switches.fault = ({ resource }) => {
    if (resource === "renewalInfo") stop.abort(new DOMException("interrupted", "AbortError"));
    return undefined;
  };
  await assert.rejects(bed.run({ signal: stop.signal }), { name: "AbortError" });
  assert.deepEqual(bed.state().failures, {});
});

Deno.test("an interrupted delivery ends its commands, keeps its back-off, and stays pending for the next run", async () => {
  const actions = (b: string) =>
    `[a]\ndomains: a.example.com\nupdate: ["echo a >> HERE/log"]\n[b]\ndomains: b.example.com\nupdate: ["${b}"]`;
  await using bed = await bedOf("a.example.com\nb.example.com", {}, actions("echo $$ > HERE/b; sleep 60"));
  const stop = new AbortController();
  const running = bed.run({ signal: stop.signal });
  await until(
    "[b] runs, and [a] has been delivered",
    () => existsSync(join(bed.home, "b")) && Object.hasOwn(bed.state().receipts, "a"),
  );
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
  const [pid] = bed.take("b");
  assert.equal(isRunning(Number(pid)), false);
  assert.deepEqual(bed.take(), ["a"]);
  bed.act(actions("echo b >> HERE/log"));
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), ["b"]);
});

// ---- the state -------------------------------------------------------------------------------------------

const LOG = `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`;

Deno.test("after a state is lost or corrupt, everything is delivered once more, and nothing is issued", async () => {
  for (const text of [undefined, `{"version":2,"receipts":{"defa`, `{"version":2,"receipts":[1]}`]) {
    await using bed = await bedOf("a.example.com\nb.example.com", {}, LOG);
    await bed.run();
    bed.take();
    const path = bed.path("test", "state.json");
    if (text === undefined) Deno.removeSync(path);
    else Deno.writeTextFileSync(path, text);
    const { code, stdout, requests } = await bed.run({ cron: true });
    assert.deepEqual([code, requests, bed.take()], [0, [], ["a.example.com b.example.com"]], text);
    if (text !== undefined) {
      const [, aside] = /set aside as (\S+),/.exec(stdout)!;
      assert.equal(bed.text("test", aside!), text);
    }
    const next = await bed.run({ cron: true });
    assert.deepEqual([next.code, next.stdout, next.stderr, bed.take()], [0, "", "", []], text);
  }
});

Deno.test("a directory of 0.1.0 is taken over with its pending deliveries, and nothing else is delivered", async () => {
  const actions = `${LOG}\n[every]\nupdate: ["echo every >> HERE/log"]`;
  await using bed = await bedOf("a.example.com\nb.example.com", {}, actions);
  await bed.plant();
  const { fingerprint } = revocable(bed.config(), "b.example.com")[0]!.certificate;
  const certificates = { "b.example.com-cert-combined.prime256v1.test.pem": fingerprint };
  const owed = { default: { since: "2026-01-01T00:00:00.000Z", certificates, attempts: 2 } };
  Deno.writeTextFileSync(bed.path("test", "state.json"), JSON.stringify({ version: 1, owed }));
  assert.deepEqual([(await bed.run()).code, bed.take()], [0, ["b.example.com"]]);
  assert.equal((await bed.run(), bed.take().length), 0);
});

// ---- revocation ------------------------------------------------------------------------------------------

const revokeAll = (bed: Bed, what: string, reason = 0) => {
  const config = bed.config();
  return revoke(config, revocable(config, what), reason, bed.context(), () => {});
};

Deno.test("a revoked certificate is a problem until it is replaced, with a new key even if its files are gone", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com");
  await bed.run();
  const stem = "a.example.com_www.a.example.com";
  const before = keyOf(bed, stem);
  await revokeAll(bed, "www.a.example.com", 4);
  assert.deepEqual(bed.ca.issued.map(({ revoked }) => revoked?.reason).sort(), [4, undefined]);
  bed.refused.add("a.example.com");
  assert.equal((await bed.run()).code, 1);
  bed.refused.clear();
  Deno.removeSync(certOf(bed, stem));
  assert.equal((await bed.run({ retry: true })).code, 0);
  assert.notEqual(keyOf(bed, stem), before);
});

Deno.test("the certificate that was shown is revoked, even if it is renewed in between", async () => {
  await using bed = await bedOf("a.example.com");
  await bed.run();
  const config = bed.config();
  const shown = revocable(config, "a.example.com");
  assert.equal((await bed.run({ named: { renew: ["a.example.com"] } })).code, 0); // the lock is free
  await revoke(config, shown, 1, bed.context(), () => {});
  assert.deepEqual(bed.ca.issued.map(({ revoked }) => revoked?.reason), [1, undefined]);
});

Deno.test("a certificate can be revoked by its path, also if its line is gone or another account ordered it", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com");
  await bed.run();
  bed.configure({ domains: "c.example.com" });
  await revokeAll(bed, certOf(bed, "a.example.com"));
  Deno.removeSync(bed.path("account.key.test"));
  await revokeAll(bed, certOf(bed, "b.example.com"));
  assert.deepEqual(
    bed.ca.issued.filter(({ revoked }) => revoked !== undefined).map(({ names }) => names[0]).sort(),
    ["a.example.com", "b.example.com"],
  );
});

Deno.test("--revoke refuses a name that is unknown or on two lines, and a file that is no certificate", async () => {
  await using bed = await bedOf(
    "a.example.com shop.example.com\nb.example.com shop.example.com\nc.example.com\nd.example.com",
  );
  await bed.plant();
  Deno.removeSync(certOf(bed, "d.example.com"));
  const config = bed.config();
  const chosen = (name: string) => revocable(config, name).map(({ certificate }) => certificate.names[0]);
  assert.deepEqual(chosen("a.example.com"), ["a.example.com"]);
  assert.deepEqual(chosen("C.Example.COM"), ["c.example.com"]);
  for (
    const name of ["x.example.com", "shop.example.com", "d.example.com", "\x1b[31m", bed.path("lematt.conf")]
  ) {
    assert.throws(() => chosen(name), { name: "SelectionError" }, name);
  }
});

// ---- orphans ---------------------------------------------------------------------------------------------

Deno.test("--prune moves orphaned files and writes links as files; a line that is back keeps its files", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com");
  await bed.run();
  bed.configure({ domains: "b.example.com" });
  const paths = prunable(bed.config());
  assert.deepEqual(paths.map((path) => path.split("/")[0]).join(" "), "cert cert cert csr key key key");
  const text = Deno.readTextFileSync(certOf(bed, "www.a.example.com"));
  for (const domains of ["b.example.com\na.example.com www", "b.example.com"]) {
    bed.configure({ domains });
    await prune(bed.config(), paths, bed.context(), () => {});
    const isBack = domains.includes("www");
    assert.equal(existsSync(certOf(bed, "www.a.example.com")), isBack);
    if (isBack) continue;
    const link = bed.text("test", "orphaned", "cert", "www.a.example.com-cert-combined.prime256v1.test.pem");
    assert.equal(link, text);
  }
  assert.deepEqual(prunable(bed.config()), []);
  assert.equal((await bed.run()).code, 0);
});

// ---- --cron ----------------------------------------------------------------------------------------------

Deno.test("--cron prints nothing unless something changed or failed, and repeats a failure after 20 hours", async () => {
  await using bed = await bedOf("a.example.com", {}, `[default]\nupdate: ["test ! -e HERE/down"]`);
  const printed = async () => {
    const { stdout, stderr } = await bed.run({ cron: true, retry: true });
    return [stdout !== "", stderr !== ""];
  };
  assert.deepEqual(await printed(), [true, false]);
  assert.deepEqual(await printed(), [false, false]);
  Deno.writeTextFileSync(join(bed.home, "down"), "");
  bed.refused.add("b.example.com");
  bed.configure({ domains: "a.example.com\nb.example.com" });
  bed.act(`[default]\nupdate: ["echo >> HERE/log; test ! -e HERE/down"]`);
  assert.deepEqual(await printed(), [false, true]);
  for (const hours of [1, 10, 8]) {
    bed.ca.advance(hours * HOUR);
    assert.deepEqual(await printed(), [false, false], `${hours} h later`);
  }
  assert.equal(bed.take().length, 4, "tried all the same");
  bed.ca.advance(2 * HOUR);
  assert.deepEqual(await printed(), [false, true]);
  Deno.removeSync(join(bed.home, "down"));
  bed.refused.clear();
  assert.deepEqual(await printed(), [true, false]);
});

Deno.test("a restricted run does not count as having printed the problems of other lines", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  bed.refused.add("b.example.com");
  assert.match((await bed.run({ cron: true })).stderr, /b\.example\.com/);
  bed.ca.advance(19 * HOUR);
  const only = { named: { only: ["a.example.com"] } };
  assert.equal((await bed.run(only)).stderr, "");
  assert.equal((await bed.run({ cron: true })).stderr, "", "printed 19 hours ago");
  bed.ca.advance(2 * HOUR);
  assert.equal((await bed.run(only)).stderr, "");
  assert.match((await bed.run({ cron: true })).stderr, /b\.example\.com/);
  bed.ca.advance(2 * HOUR);
  assert.equal((await bed.run({ cron: true })).stderr, "");
});
