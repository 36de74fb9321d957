/** Goal: what one run leaves for the next: failures that wait, limits that hold, revocations, a state that was spoilt. */

import assert from "node:assert/strict";
import { loadConfig } from "../lib/config.ts";
import { revocable, revoke } from "../lib/run.ts";
import { lastRun, type State } from "../lib/store.ts";
import { type Bed, befalling, refusing, testBed } from "./bed.ts";
import type { Switches } from "./ca.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE;

/** A bed with EC certificates only, in which the CA refuses the names that are put into `refused`. */
async function bedOf(domains: string, switches: Switches = {}) {
  const refused = new Set<string>();
  const reject = (name: string) => refused.has(name) ? "not this one" : undefined;
  const bed = await testBed({ domains, settings: "keyTypes: ec\nari: no", ca: { reject, ...switches } });
  return Object.assign(bed, { refused });
}

function stateOf(bed: Bed): State {
  return JSON.parse(bed.text("test", "state.json"));
}

/** How many orders a run has asked for. */
function ordersOf({ requests }: Awaited<ReturnType<Bed["run"]>>): number {
  return requests.filter(({ resource }) => resource === "newOrder").length;
}

// ---- failures ------------------------------------------------------------------------------------

Deno.test("a line that the CA refuses waits 1, 10, 100 minutes, then a day, and nothing is asked meanwhile", async () => {
  await using bed = await bedOf("a.example.com");
  bed.refused.add("a.example.com");
  assert.equal(ordersOf(await bed.run()), 1);
  for (
    const [times, minutes] of ["once", "2 times", "3 times", "4 times", "5 times"].map((times, n) =>
      [times, Math.min(10 ** n, 1440)] as const
    )
  ) {
    bed.ca.advance(minutes * MINUTE - 30_000);
    const early = await bed.run();
    assert.deepEqual([early.requests.length, early.code], [0, 1], `before ${minutes} minutes`);
    assert.match(
      early.stderr,
      new RegExp(
        `^waiting a.example.com: failed ${times}, tried again from \\d{4}-\\d\\d-\\d\\d \\d\\d:\\d\\d UTC \\(--retry tries now\\)\n$`,
      ),
    );
    assert.match(early.stdout, /^nothing due, 1 line waiting, 0 kept\n$/);
    bed.ca.advance(30_000);
    assert.equal(ordersOf(await bed.run()), 1, `after ${minutes} minutes`);
  }
  const { count, error } = stateOf(bed).failures["a.example.com"]!;
  assert.equal(count, 6);
  assert.match(error, /^cannot create an order: .*not this one/);
});

Deno.test("--retry ignores the waiting once, and success is the end of it", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  bed.refused.add("a.example.com");
  await bed.run();
  assert.equal(ordersOf(await bed.run()), 0);
  assert.equal(ordersOf(await bed.run({ retry: true })), 1);
  assert.equal(ordersOf(await bed.run()), 0);
  bed.refused.clear();
  assert.equal((await bed.run({ retry: true })).code, 0);
  assert.deepEqual(stateOf(bed).failures, {});
  assert.match((await bed.run()).stdout, /^nothing due, 2 kept/);
});

Deno.test("a line that waits keeps the others from nothing", async () => {
  await using bed = await bedOf("a.example.com");
  bed.refused.add("a.example.com");
  await bed.run();
  bed.configure({ domains: "a.example.com\nb.example.com" });
  const { code, stdout } = await bed.run();
  assert.equal(code, 1);
  assert.match(stdout, /^issued {2}b\.example\.com /m);
});

Deno.test("a validation that failed keeps its line waiting, too", async () => {
  await using bed = await bedOf("a.example.com", {
    resolve: () => {
      throw new Error("NXDOMAIN");
    },
  });
  const { stderr } = await bed.run();
  assert.match(stderr, /^FAILED {2}a\.example\.com \(ec\)\n +cannot validate: a\.example\.com: .*NXDOMAIN/);
  assert.equal((await bed.run()).requests.length, 0);
});

Deno.test("a certificate that does not stand its check keeps its line waiting, for the order is spent", async () => {
  await using bed = await bedOf("a.example.com");
  const slow = () => new Date(bed.ca.now.getTime() - 40 * 24 * HOUR);
  const { stderr } = await bed.run({ now: slow });
  assert.match(stderr, /^FAILED {2}a\.example\.com \(ec\)\n +cannot check the certificate: /);
  assert.equal((await bed.run({ now: slow })).requests.length, 0);
});

Deno.test("a CA that cannot be reached is asked by every run, and counted", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  const fetch = () => Promise.reject(new TypeError("no route to host"));
  for (const count of [1, 2, 3]) {
    const { code, stderr } = await bed.run({ fetch });
    assert.equal(code, 1);
    assert.match(
      stderr,
      /^FAILED {2}2 lines of domains, from a\.example\.com on\n +cannot read the directory: no route to host\n$/,
    );
    assert.deepEqual(Object.values(stateOf(bed).failures).map(({ count, retryAt }) => [count, retryAt]), [[
      count,
      undefined,
    ], [count, undefined]]);
  }
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(stateOf(bed).failures, {});
});

Deno.test("failures of lines that left the configuration are forgotten", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  bed.refused.add("a.example.com");
  await bed.run();
  bed.configure({ domains: "b.example.com" });
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual(stateOf(bed).failures, {});
});

// ---- limits --------------------------------------------------------------------------------------

Deno.test("a limit on orders holds all lines until Retry-After, and no request is wasted after it", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", {
    limits: { newOrder: { count: 1, windowMs: 3 * HOUR } },
  });
  const night = await bed.run({ parallel: 1 });
  assert.deepEqual([night.code, ordersOf(night), bed.ca.issued.length], [1, 2, 1]);
  assert.match(night.stderr, /too many new orders/);
  assert.match(
    night.stderr,
    /^waiting 1 line: the CA wants no orders before \d{4}-\d\d-\d\d \d\d:\d\d UTC \(--retry asks now\)$/m,
  );

  bed.ca.advance(2 * HOUR);
  const early = await bed.run({ parallel: 1 });
  assert.deepEqual([early.code, early.requests.length], [1, 0]);
  assert.match(early.stderr, /^waiting 2 lines: the CA wants no orders before /);
  assert.equal(ordersOf(await bed.run({ parallel: 1, retry: true })), 1);

  bed.ca.advance(4 * HOUR);
  assert.equal((await bed.run({ parallel: 1 }), bed.ca.issued.length), 2);
  bed.ca.advance(4 * HOUR);
  assert.deepEqual([(await bed.run()).code, bed.ca.issued.length], [0, 3]);
  assert.deepEqual(stateOf(bed).holds, {});
});

Deno.test("lines under way that meet the same limit wait like those behind them; the first one says why", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com\nd.example.com", {
    limits: { newOrder: { count: 1, windowMs: 3 * HOUR } },
  });
  const { code, stdout, stderr } = await bed.run({ parallel: 3 });
  assert.equal(code, 1);
  assert.equal(stderr.match(/^FAILED /gm)!.length, 1);
  assert.match(stderr, /^FAILED .*\n +cannot create an order: too many new orders/);
  assert.match(stderr, /^waiting 2 lines: the CA wants no orders before /m);
  assert.match(stdout, /^1 issued, 1 failed, 2 lines waiting, 0 kept/m);
  assert.deepEqual(stateOf(bed).failures, {});
});

Deno.test("a limit that names a line holds that line until Retry-After, and no other", async () => {
  const until = new Date(Date.now() + 5 * HOUR);
  const fault = befalling(
    "newOrder",
    refusing(429, "rateLimited", "too many certificates already issued for a.example.com", {
      headers: { "retry-after": until.toUTCString() },
    }),
  );
  await using bed = await bedOf("a.example.com\nb.example.com\nc.example.com", { fault });
  const { code, stdout } = await bed.run({ parallel: 1 });
  assert.equal(code, 1);
  assert.match(stdout, /^2 issued, 1 failed, 0 kept/m);
  const { failures, holds } = stateOf(bed);
  assert.deepEqual(holds, {});
  assert.ok(Math.abs(Date.parse(failures["a.example.com"]!.retryAt!) - until.getTime()) < 2000);
  bed.ca.advance(4 * HOUR);
  assert.equal((await bed.run()).requests.length, 0);
  bed.ca.advance(HOUR + MINUTE);
  assert.equal((await bed.run()).code, 0);
});

Deno.test("a limit without Retry-After holds for an hour", async () => {
  await using bed = await bedOf("a.example.com", {
    fault: befalling("newOrder", refusing(429, "rateLimited", "slow down")),
  });
  await bed.run();
  bed.ca.advance(59 * MINUTE);
  assert.equal((await bed.run()).requests.length, 0);
  bed.ca.advance(2 * MINUTE);
  assert.equal((await bed.run()).code, 0);
});

Deno.test("a limit on registrations holds all lines, too", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com", {
    fault: befalling(
      "newAccount",
      refusing(429, "rateLimited", "too many registrations for this IP", {
        headers: { "retry-after": "7200" },
      }),
    ),
  });
  assert.equal((await bed.run()).code, 1);
  const early = await bed.run();
  assert.deepEqual([early.code, early.requests.length], [1, 0]);
  bed.ca.advance(2 * HOUR + MINUTE);
  assert.equal((await bed.run()).code, 0);
});

Deno.test("a paused account is told with the whole address where it goes on", async () => {
  const unpause = `https://portal.example.org/sfe/v1/unpause?jwt=${"x".repeat(900)}.${"y".repeat(300)}`;
  await using bed = await bedOf("a.example.com", {
    fault: befalling(
      "newOrder",
      refusing(
        429,
        "rateLimited",
        `Your account is temporarily prevented from requesting certificates for a.example.com and possibly others. Please visit: ${unpause}`,
      ),
    ),
  });
  const { stderr } = await bed.run();
  assert.ok(stderr.includes(unpause));
  assert.ok(stateOf(bed).failures["a.example.com"]!.error.includes(unpause));
});

// ---- revocation ----------------------------------------------------------------------------------

Deno.test("revoke() revokes the certificates of a line, and the next run makes them anew under new keys", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com");
  bed.configure({ settings: "ari: no" });
  await bed.run();
  const keys = () =>
    ["rsa2048", "prime256v1"].map((tag) => bed.text("test", "key", `a.example.com-key.${tag}.test.pem`));
  const before = keys();
  const config = bed.config();
  await revoke(config, revocable(config, "www.a.example.com"), 4, bed.world(), () => {});
  const revoked = bed.ca.issued.filter((issued) => issued.revoked !== undefined);
  assert.deepEqual(
    revoked.map(({ names, keyType, revoked }) => `${names[0]} ${keyType} ${revoked!.reason}`).sort(),
    ["a.example.com ec 4", "a.example.com rsa 4"],
  );

  const { code, stdout } = await bed.run();
  assert.equal(code, 0);
  assert.match(stdout, /^issued {2}a\.example\.com \+1 .* rsa ec .*\(revoked \d{4}-\d\d-\d\d\)$/m);
  assert.equal(bed.ca.issued.length, 6);
  assert.equal(new Set([...before, ...keys()]).size, 4);
  assert.match((await bed.run()).stdout, /^nothing due, 4 kept/);
  assert.deepEqual(stateOf(bed).revoked, {});
});

Deno.test("revocable() wants to know exactly which line is meant", async () => {
  await using bed = await bedOf(
    "a.example.com shop.example.com\nb.example.com shop.example.com\nc.example.com\nd.example.com",
  );
  await bed.plant();
  Deno.removeSync(bed.path("test", "cert", "d.example.com-cert-combined.prime256v1.test.pem"));
  const config = bed.config();
  const chosen = (name: string) => revocable(config, name).map(({ stem }) => stem);
  assert.deepEqual(chosen("a.example.com"), ["a.example.com_shop.example.com"]);
  assert.deepEqual(chosen("C.Example.COM"), ["c.example.com"]);
  const table: [string, RegExp][] = [
    ["x.example.com", /^cannot tell what to revoke for "x\.example\.com": no line of domains has that name$/],
    [
      "shop.example.com",
      /^cannot tell what to revoke for "shop\.example\.com": it is in line 1 \(a\..*\), line 2 \(b\..*\); name a first name$/,
    ],
    ["d.example.com", /^there is no certificate of d\.example\.com to revoke$/],
    ["\x1b[31m", /^cannot revoke "\\u\{1b\}\[31m": it has a character/],
    ["example", /^cannot revoke "example": it has no dot$/],
  ];
  for (const [name, message] of table) {
    assert.throws(() => chosen(name), { name: "SelectionError", message });
  }
});

// ---- a state that was spoilt ---------------------------------------------------------------------

const SPOILT: [what: string, text: string, said: RegExp][] = [
  ["truncated", `{"version":1,"owed":{"defa`, /not JSON/],
  ["empty", "", /not JSON/],
  ["written by a newer version", `{"version":2,"owed":[]}`, /version 2 is not known here/],
  ["of another kind", `[1,2]`, /it has no version/],
  [
    "edited by hand",
    `{"version":1,"owed":{"default":{"since":"yesterday","certificates":{},"attempts":0}}}`,
    /not as lematt writes it/,
  ],
];

for (const [what, text, said] of SPOILT) {
  Deno.test(`a state that is ${what} is set aside whole and said, and everything is delivered again`, async () => {
    await using bed = await bedOf("a.example.com");
    await bed.run();
    bed.configure({ actions: `[default]\nupdate: ["echo DOMAINS_CN >> ${bed.home}/log"]` });
    Deno.writeTextFileSync(bed.path("test", "state.json"), text);
    const { code, stdout } = await bed.run({ cron: true });
    assert.equal(code, 0);
    assert.match(stdout, said);
    const [, aside] = /; set aside as (\S+), begun anew$/m.exec(stdout)!;
    assert.equal(bed.text("test", aside!), text);
    assert.equal(Deno.readTextFileSync(`${bed.home}/log`), "a.example.com\n");
    const next = await bed.run({ cron: true });
    assert.deepEqual([next.code, next.stdout, next.stderr], [0, "", ""]);
  });
}

Deno.test("a state that is spoilt before a revocation loses no debt either", async () => {
  await using bed = await bedOf("a.example.com");
  await bed.run();
  bed.configure({ actions: `[default]\nupdate: ["true"]` });
  Deno.writeTextFileSync(bed.path("test", "state.json"), "{");
  const config = bed.config();
  await revoke(config, revocable(config, "a.example.com"), 0, bed.world(), () => {});
  assert.deepEqual(Object.keys(stateOf(bed).owed), ["default"]);
});

Deno.test("a debt that is dropped is said, even with --cron", async () => {
  await using bed = await bedOf("a.example.com");
  bed.configure({ actions: `[gone]\ndomains: a.example.com\nupdate: ["false"]` });
  await bed.run();
  bed.configure({ actions: "" });
  const { code, stdout } = await bed.run({ cron: true });
  assert.equal(code, 0);
  assert.match(
    stdout,
    /^note {4}nothing is owed any more for section \[gone\]: it is not in the configuration\n/,
  );
});

Deno.test("nothing is left of a run but its files: no notes, no temporaries, no challenge", async () => {
  await using bed = await bedOf("a.example.com www");
  await bed.run();
  assert.deepEqual(bed.dropped(), []);
  assert.deepEqual([...Deno.readDirSync(bed.path("test"))].map(({ name }) => name).sort(), [
    ".lock",
    "cert",
    "csr",
    "key",
    "state.json",
  ]);
  assert.equal(loadConfig("test", bed.conf).lines.length, 1);
});

Deno.test("a run that has nothing to do writes no file, and remembers all the same when it was", async () => {
  await using bed = await bedOf("a.example.com www");
  await bed.run();
  const inode = () => Deno.statSync(bed.path("test", "state.json")).ino;
  const before = inode();
  bed.ca.advance(HOUR);
  assert.match((await bed.run()).stdout, /^nothing due/);
  assert.equal(inode(), before);
  const config = loadConfig("test", bed.conf);
  assert.ok(Math.abs(lastRun(config)!.getTime() - bed.ca.now.getTime()) < MINUTE);
  assert.equal(lastRun(loadConfig("prod", bed.conf)), undefined);
});
