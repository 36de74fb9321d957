/** Goal: what one run leaves for the next, what a restricted run leaves alone, and what becomes of a state that is lost. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { prunable, prune, revocable, revoke, select } from "../lib/run.ts";
import { all, type Bed, befalling, type Ran, refusing, testBed, until } from "./bed.ts";
import type { Switches } from "./ca.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;

/** A bed with EC certificates only, in which the CA refuses the names that are put into `refused`. */
async function bedOf(domains: string, switches: Switches = {}, actions = "") {
  const refused = new Set<string>();
  const reject = (name: string) => refused.has(name) ? "not this one" : undefined;
  const bed = await testBed({ domains, settings: "keyTypes: ec\nari: no", ca: { reject, ...switches } });
  bed.act(actions);
  return Object.assign(bed, { refused });
}

const ordersOf = ({ requests }: Ran) => requests.filter(({ resource }) => resource === "newOrder").length;
const certOf = (bed: Bed, stem: string) =>
  bed.path("test", "cert", `${stem}-cert-combined.prime256v1.test.pem`);
const keyOf = (bed: Bed, stem: string) => bed.text("test", "key", `${stem}-key.prime256v1.test.pem`);

// ---- failures and limits ---------------------------------------------------------------------------------

Deno.test("a line that the CA refuses waits 1, 10, 100, 1000 minutes, then 20 hours, and is a problem meanwhile", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  bed.refused.add("a.example.com");
  const first = await bed.run();
  assert.deepEqual([first.code, ordersOf(first)], [1, 2]);
  assert.match(first.stdout, /^issued +b\.example\.com /m);
  for (const minutes of [1, 10, 100, 1000, 1200, 1200]) {
    bed.ca.advance(minutes * MINUTE - 30_000);
    const early = await bed.run();
    assert.deepEqual([early.requests.length, early.code], [0, 1], `before ${minutes} minutes`);
    assert.match(early.stderr, /^problem +a\.example\.com failed.*not this one.*--retry/m);
    bed.ca.advance(30_000);
    assert.equal(ordersOf(await bed.run()), 1, `after ${minutes} minutes`);
  }
  assert.equal(ordersOf(await bed.run({ retry: true })), 1, "--retry");
  bed.refused.clear();
  assert.equal((await bed.run({ retry: true })).code, 0);
  assert.deepEqual(bed.state().failures, {});
});

Deno.test("a failure is forgotten with its line", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  bed.refused.add("a.example.com");
  await bed.run();
  bed.configure({ domains: "b.example.com" });
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.state().failures, {});
});

Deno.test("a CA that cannot be reached is asked by every run, and is one problem", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  for (const count of [1, 2, 3]) {
    const { code, stderr } = await bed.run({
      fetch: () => Promise.reject(new TypeError("no route to host")),
    });
    assert.equal(code, 1);
    assert.match(stderr, /^FAILED +2 lines of domains\n +.*no route to host/);
    const failures = Object.values(bed.state().failures);
    assert.deepEqual(failures.map(({ count, retryAt }) => [count, retryAt]), [[count, undefined], [
      count,
      undefined,
    ]]);
  }
  assert.equal((await bed.run()).code, 0);
});

Deno.test("a limit on orders holds all lines until Retry-After, and no request is wasted meanwhile", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", {
    limits: { newOrder: { count: 1, windowMs: 3 * HOUR } },
  });
  const night = await bed.run({ parallel: 1 });
  assert.deepEqual([night.code, ordersOf(night), bed.ca.issued.length], [1, 2, 1]);
  bed.ca.advance(2 * HOUR);
  const early = await bed.run();
  assert.deepEqual([early.code, early.requests.length], [1, 0]);
  assert.match(early.stderr, /^problem +2 lines rate-limited by the CA until /m);
  bed.ca.advance(2 * HOUR);
  await bed.run({ parallel: 1 });
  bed.ca.advance(4 * HOUR);
  assert.deepEqual([(await bed.run()).code, bed.ca.issued.length], [0, 3]);
  assert.deepEqual(bed.state().holds, {});
});

Deno.test("a limit that names a line holds that line until Retry-After, and no other", async () => {
  const until = new Date(Date.now() + 5 * HOUR);
  const refusal = refusing(429, "rateLimited", "too many certificates already issued for a.example.com", {
    headers: { "retry-after": until.toUTCString() },
  });
  await using bed = await bedOf("a.example.com\nb.example.com", { fault: befalling("newOrder", refusal) });
  const { code, stdout } = await bed.run({ parallel: 1 });
  assert.equal(code, 1);
  assert.match(stdout, /^issued +b\.example\.com /m);
  bed.ca.advance(4 * HOUR);
  assert.equal((await bed.run()).requests.length, 0);
  bed.ca.advance(HOUR + MINUTE);
  assert.equal((await bed.run()).code, 0);
});

Deno.test("the whole address at which a paused account goes on reaches the user, in this run and in later ones", async () => {
  const unpause = `https://portal.example.org/sfe/v1/unpause?jwt=${"x".repeat(900)}.${"y".repeat(300)}`;
  const refusal = refusing(429, "rateLimited", `paused for a.example.com. Please visit: ${unpause}`);
  await using bed = await bedOf("a.example.com", { fault: befalling("newOrder", refusal) });
  assert.ok((await bed.run()).stderr.includes(unpause));
  assert.ok((await bed.run()).stderr.includes(unpause));
});

Deno.test("nothing is left of a run but its files: no temporaries, no challenge", async () => {
  await using bed = await bedOf("a.example.com www");
  await bed.run();
  assert.deepEqual(bed.dropped(), []);
  const names = [...Deno.readDirSync(bed.path("test"))].map(({ name }) => name).sort();
  assert.deepEqual(names, [".lock", "cert", "csr", "key", "state.json"]);
  assert.deepEqual(
    [...Deno.readDirSync(bed.path("test", "key"))].filter(({ name }) => name.startsWith(".")),
    [],
  );
});

// ---- restricted runs -------------------------------------------------------------------------------------

Deno.test("--renew issues the lines that it names, --new-key under new keys, --only forces nothing", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com\nc.example.com");
  await bed.run();
  bed.configure({ domains: "a.example.com www\nb.example.com\nc.example.com\nd.example.com" });
  const keys = () => ["a.example.com_www.a.example.com", "b.example.com"].map((stem) => keyOf(bed, stem));
  const issued = async (named: Parameters<typeof select>[1]) => {
    const before = bed.ca.issued.length;
    assert.equal((await bed.run({ named })).code, 0);
    return bed.ca.issued.slice(before).map(({ names }) => names[0]);
  };
  const [a, b] = keys();
  assert.deepEqual(await issued({ renew: ["www.a.example.com"] }), ["a.example.com"]);
  assert.deepEqual(keys(), [a, b]);
  assert.deepEqual(await issued({ renew: ["B.example.com"], newKey: true }), ["b.example.com"]);
  assert.equal(keys()[0], a);
  assert.notEqual(keys()[1], b);
  assert.deepEqual(await issued({ only: ["c.example.com"] }), []);
  assert.deepEqual(await issued({ only: ["c.example.com", "d.example.com"] }), ["d.example.com"]);
  assert.deepEqual(await issued({}), []);
});

Deno.test("a restricted run delivers only what it names, and has the problems of that alone", async () => {
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
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), ["b"]);
});

Deno.test("what an option names must exist", async () => {
  await using bed = await bedOf("a.example.com", {}, `[mail]\ndomains: a.example.com\nupdate: ["true"]`);
  const config = bed.config();
  const table: Parameters<typeof select>[1][] = [
    { renew: ["b.example.com"] },
    { only: ["a.example.com", "*.example.com"] },
    { deliver: ["[web]"] },
    { deliver: ["mail"] },
    { deliver: ["[]"] },
    { accept: ["\x1b[31m"] },
    { renew: ["[mail]"] },
    { deliver: ["[constructor]"] },
  ];
  for (const named of table) {
    assert.throws(
      () => select(config, named),
      { name: "SelectionError", message: /^[\x20-\x7e]*$/ },
      JSON.stringify(named),
    );
  }
  assert.equal(select(config, {}), undefined);
  assert.equal(select(config, { deliver: ["[mail]", "A.Example.com"] })!.lines.size, 1);
});

Deno.test("--deliver says where there is nothing to deliver", async () => {
  await using bed = await bedOf("a.example.com", {}, `[mail]\ndomains: a.example.com`);
  await bed.plant();
  for (const [what, name] of [["[mail]", "[mail]"], ["a.example.com", "a.example.com"]] as const) {
    const { stdout } = await bed.run({ named: { deliver: [what] } });
    assert.ok(stdout.startsWith(`note      nothing to deliver for ${name}: `), stdout);
  }
});

// ---- interrupted -----------------------------------------------------------------------------------------

Deno.test("a run that is interrupted ends with the signal's reason, wherever it is, and nobody is to blame", async () => {
  const stopAt = (resource: string) => {
    const stop = new AbortController();
    let bed: Bed | undefined;
    const fault = () => {
      if (bed?.ca.log.at(-1)?.resource === resource) {
        stop.abort(new DOMException("interrupted", "AbortError"));
      }
      return undefined;
    };
    return { stop, fault, use: (one: Bed) => void (bed = one) };
  };
  for (const resource of ["directory", "renewalInfo", "newOrder", "challenge", "finalize"]) {
    const { stop, fault, use } = stopAt(resource);
    await using bed = await testBed({
      domains: "a.example.com\nb.example.com",
      settings: "keyTypes: ec",
      ca: { fault },
    });
    bed.act(`[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`);
    bed.configure({ domains: "a.example.com" });
    await bed.run();
    bed.take();
    bed.configure({ domains: "a.example.com\nb.example.com" });
    bed.ca.advance(DAY);
    use(bed);
    await assert.rejects(bed.run({ signal: stop.signal }), { name: "AbortError" }, resource);
    assert.deepEqual([bed.take(), bed.dropped()], [[], []], resource);
    assert.deepEqual(bed.state().failures, {}, resource);
    bed.ca.violations.splice(0);
  }
});

Deno.test("an interrupted delivery ends its commands, keeps its back-off, and is pending for the next run", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    {},
    `[a]\ndomains: a.example.com\nupdate: ["echo a >> HERE/log"]
[b]\ndomains: b.example.com\nupdate: ["echo $$ > HERE/b; sleep 60"]`,
  );
  const stop = new AbortController();
  const running = bed.run({ signal: stop.signal });
  await until(
    "[b] runs, and [a] has been delivered",
    () => existsSync(join(bed.home, "b")) && Object.hasOwn(bed.state().receipts, "a"),
  );
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
  const [pid] = bed.take("b");
  assert.throws(() => Deno.kill(Number(pid), "SIGCONT"));
  assert.deepEqual(bed.take(), ["a"]);
  bed.act(
    `[a]\ndomains: a.example.com\nupdate: ["echo a >> HERE/log"]\n[b]\ndomains: b.example.com\nupdate: ["echo b >> HERE/log"]`,
  );
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), ["b"]);
});

// ---- the state -------------------------------------------------------------------------------------------

const LOG = `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`;

Deno.test("a state that is lost, cut short or spoilt is begun anew: all is delivered once more, and nothing issued", async () => {
  const spoilt: Record<string, string | undefined> = {
    deleted: undefined,
    "cut short": `{"version":2,"receipts":{"defa`,
    empty: "",
    "of another kind": "[1,2]",
    "edited by hand": `{"version":2,"receipts":{"default":{"a":{"digest":1}}}}`,
  };
  await all(
    Object.entries(spoilt).map(async ([what, text]) => {
      await using bed = await bedOf("a.example.com\nb.example.com", {}, LOG);
      await bed.run();
      bed.take();
      const path = bed.path("test", "state.json");
      if (text === undefined) Deno.removeSync(path);
      else Deno.writeTextFileSync(path, text);
      const { code, stdout, requests } = await bed.run({ cron: true });
      assert.deepEqual([code, ordersOf({ requests } as Ran), bed.take()], [0, 0, [
        "a.example.com b.example.com",
      ]], what);
      if (text !== undefined) {
        const [, aside] = /set aside as (\S+), begun anew/.exec(stdout) ?? [];
        assert.equal(bed.text("test", aside!), text, what);
      }
      const next = await bed.run({ cron: true });
      assert.deepEqual([next.code, next.stdout, next.stderr, bed.take()], [0, "", "", []], what);
    }),
  );
});

Deno.test("a state of a newer version, or one that may not be read, is left alone and ends the run", async () => {
  await using bed = await bedOf("a.example.com", {}, LOG);
  await bed.run();
  bed.take();
  const path = bed.path("test", "state.json");
  const text = `{"version":3,"receipts":[]}`;
  Deno.writeTextFileSync(path, text);
  await assert.rejects(bed.run(), { name: "StateError", message: /newer/ });
  assert.equal(Deno.readTextFileSync(path), text);
  Deno.removeSync(path);
  Deno.mkdirSync(path); // also root cannot read it
  await assert.rejects(bed.run(), { name: "StateError" });
  assert.deepEqual(bed.take(), []);
});

Deno.test("a directory of 0.1.0 is taken over with what it had not delivered yet, and nothing else is delivered", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    {},
    `${LOG}\n[every]\nupdate: ["echo every >> HERE/log"]`,
  );
  await bed.plant();
  const { fingerprint } = revocable(bed.config(), "b.example.com")[0]!.certificate;
  const owed = {
    default: {
      since: "2026-01-01T00:00:00.000Z",
      certificates: { "b.example.com-cert-combined.prime256v1.test.pem": fingerprint },
      attempts: 2,
      retryAt: "2026-01-02T00:00:00.000Z",
    },
  };
  const state = {
    version: 1,
    accounts: {},
    renewals: {},
    failures: {},
    holds: {},
    owed,
    revoked: {},
    alerts: {},
  };
  Deno.writeTextFileSync(bed.path("test", "state.json"), JSON.stringify(state));
  const { code } = await bed.run();
  assert.deepEqual([code, bed.take()], [0, ["b.example.com"]]);
  assert.equal((await bed.run(), bed.take().length), 0);
});

Deno.test("a clock that was a year ahead delays nothing and loses nothing", async () => {
  await using bed = await bedOf(
    "a.example.com",
    {},
    `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log; test -e HERE/up"]`,
  );
  await bed.plant({ life: 900 });
  const ahead = { now: () => new Date(bed.ca.now.getTime() + 365 * DAY) };
  for (let n = 0; n < 3; n++) await bed.run({ ...ahead, retry: true });
  bed.take();
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(bed.take(), ["a.example.com"]);
  assert.equal((await bed.run(), bed.take().length), 0);
});

Deno.test("300 lines that are taken over are delivered once, the sections in their order, and nothing is issued", async () => {
  const names = Array.from({ length: 300 }, (_, n) => `host${n}.example.com`);
  const hosts = Array.from({ length: 30 }, (_, n) => names.slice(10 * n, 10 * n + 10));
  const section = (own: string[], n: number) =>
    `[h${n}]\ndomains: ${
      own.join(" ")
    }\nuploadCerts: ["echo CERTS | wc -w >> HERE/words"]\nupdate: ["echo h${n} >> HERE/log"]`;
  await using bed = await bedOf(names.join("\n"), {}, hosts.map(section).join("\n"));
  await bed.plant({ age: 10 });
  const begun = performance.now();
  const { code, requests } = await bed.run();
  assert.ok(performance.now() - begun < 20_000);
  assert.deepEqual([code, requests.length], [0, 0]);
  assert.deepEqual(bed.take(), hosts.map((_, n) => `h${n}`));
  assert.deepEqual(new Set(bed.take("words").map((word) => word.trim())), new Set(["10"]));
  assert.equal((await bed.run(), bed.take().length), 0);
});

// ---- revocation ------------------------------------------------------------------------------------------

const revokeAll = (bed: Bed, what: string, reason = 0) => {
  const config = bed.config();
  return revoke(config, revocable(config, what), reason, bed.world(), () => {});
};

Deno.test("revoked certificates are a problem until the next run has replaced them under new keys", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com");
  await bed.run();
  const before = keyOf(bed, "a.example.com_www.a.example.com");
  await revokeAll(bed, "www.a.example.com", 4);
  assert.deepEqual(bed.ca.issued.map(({ revoked }) => revoked?.reason).sort(), [4, undefined]);
  bed.refused.add("a.example.com");
  const failed = await bed.run();
  assert.equal(failed.code, 1);
  bed.refused.clear();
  const { code, stdout } = await bed.run({ retry: true });
  assert.equal(code, 0);
  assert.match(stdout, /^issued +a\.example\.com \+1 .*revoked/m);
  assert.notEqual(keyOf(bed, "a.example.com_www.a.example.com"), before);
});

Deno.test("a key of a revoked certificate is never used again, though its certificate is removed", async () => {
  await using bed = await bedOf("a.example.com");
  await bed.run();
  const before = keyOf(bed, "a.example.com");
  await revokeAll(bed, "a.example.com", 1);
  Deno.removeSync(certOf(bed, "a.example.com"));
  assert.equal((await bed.run()).code, 0);
  assert.notEqual(keyOf(bed, "a.example.com"), before);
});

Deno.test("what was shown is what is revoked, though a renewal comes in between", async () => {
  await using bed = await bedOf("a.example.com");
  await bed.run();
  const config = bed.config();
  const shown = revocable(config, "a.example.com");
  assert.equal((await bed.run({ named: { renew: ["a.example.com"] } })).code, 0); // no lock is held
  await revoke(config, shown, 1, bed.world(), () => {});
  assert.deepEqual(bed.ca.issued.map(({ revoked }) => revoked?.reason), [1, undefined]);
});

Deno.test("a certificate is revoked by its path, also of a line that is gone, or one that another account ordered", async () => {
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

Deno.test("--revoke wants to know exactly what is meant", async () => {
  await using bed = await bedOf(
    "a.example.com shop.example.com\nb.example.com shop.example.com\nc.example.com\nd.example.com",
  );
  await bed.plant();
  Deno.removeSync(certOf(bed, "d.example.com"));
  const config = bed.config();
  const chosen = (name: string) =>
    revocable(config, name).map(({ certificate }) => certificate.names.join(" "));
  assert.deepEqual(chosen("a.example.com"), ["a.example.com shop.example.com"]);
  assert.deepEqual(chosen("C.Example.COM"), ["c.example.com"]);
  const table: [string, RegExp][] = [
    ["x.example.com", /"x\.example\.com" is neither a name in "domains" nor the path/],
    ["shop.example.com", /is in line 1 \(a\..*\) and line 2 \(b\..*\)/],
    ["d.example.com", /^no certificate of d\.example\.com/],
    ["\x1b[31m", /neither a name/],
    [bed.path("lematt.conf"), /holds no certificate/],
  ];
  for (const [name, message] of table) assert.throws(() => chosen(name), { name: "SelectionError", message });
});

// ---- orphans ---------------------------------------------------------------------------------------------

Deno.test("--prune shows files that belong to no line and moves them to orphaned/, links included, and deletes nothing", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com");
  await bed.run();
  bed.configure({ domains: "b.example.com" });
  const config = bed.config();
  const paths = prunable(config);
  const bundle = "a.example.com_www.a.example.com";
  assert.equal(paths.filter((path) => path.startsWith("cert/")).length, 3);
  assert.equal(paths.length, 7);
  const texts = [certOf(bed, "www.a.example.com"), certOf(bed, bundle)].map((path) =>
    Deno.readTextFileSync(path)
  );
  bed.configure({ domains: "b.example.com\na.example.com www" });
  await prune(bed.config(), paths, bed.world(), () => {}); // the line is back: nothing is orphaned any more
  assert.equal(Deno.readTextFileSync(certOf(bed, bundle)), texts[1]);
  bed.configure({ domains: "b.example.com" });
  await prune(bed.config(), paths, bed.world(), () => {});
  assert.deepEqual(prunable(config), []);
  const moved = [...Deno.readDirSync(bed.path("test", "orphaned", "cert"))].map(({ name }) => name);
  assert.equal(moved.length, 3);
  // what a link leads to has moved with it
  assert.equal(
    bed.text("test", "orphaned", "cert", "www.a.example.com-cert-combined.prime256v1.test.pem"),
    texts[0],
  );
  assert.equal((await bed.run()).code, 0);
});

// ---- --cron ----------------------------------------------------------------------------------------------

Deno.test("--cron prints nothing unless something changed or failed, and a failure again after 20 hours", async () => {
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

Deno.test("after an outage of lematt itself, the next run says since when it has not run", async () => {
  await using bed = await bedOf("a.example.com");
  await bed.run({ mode: "prod" });
  bed.ca.advance(30 * DAY);
  assert.match((await bed.run({ mode: "prod", cron: true })).stdout, /has not run since /);
  assert.equal((await bed.run({ mode: "prod", cron: true })).stdout, "");
});
