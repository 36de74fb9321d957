/** Goal: the CA is asked when to renew certificates (RFC 9773), no more often than it allows, and no answer does harm. */

import assert from "node:assert/strict";
import { type Bed, faultAt, type Ran, refusing, testBed } from "./bed.ts";
import type { Fault } from "./ca.ts";
import { run } from "./programs.ts";

const MINUTE = 60_000, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const NAME = "example.com";

/** A bed with an EC certificate issued for each line. */
async function issuedBed(domains = NAME): Promise<Bed> {
  const bed = await testBed({ domains, settings: "keyTypes: ec" });
  assert.equal((await bed.run()).code, 0);
  return bed;
}

const window = ({ ca: { now } }: Bed, start: number, end: number) => (
  { start: new Date(now.getTime() + start), end: new Date(now.getTime() + end) }
);

/** Suggests the window from `start` to `end` (from now) for every certificate that has been issued. */
function suggest(bed: Bed, start: number, end: number, explanationURL?: string) {
  for (const issued of bed.ca.issued) issued.renewalWindow = { ...window(bed, start, end), explanationURL };
}

function answering(body: unknown, retryAfter = "soon"): Fault {
  const headers = { "content-type": "application/json", "retry-after": retryAfter };
  return { kind: "status", status: 200, headers, body: JSON.stringify(body) };
}

const countOf = ({ requests }: Ran, wanted: string) =>
  requests.filter(({ resource }) => resource === wanted).length;
const notes = ({ stdout }: Ran) =>
  stdout.split("\n").filter((line) => line.startsWith("note")).map((line) => line.replace(/^note +/, ""));

Deno.test("the CA is asked again after Retry-After, within bounds, or after five hours; invalid windows are noted and do not count", async () => {
  await using bed = await issuedBed();
  const valid = { suggestedWindow: window(bed, 50 * DAY, 60 * DAY) };
  const refusal = refusing(404, "malformed", "never heard of it");
  const invalid: [Fault, number, string][] = [
    [answering({ suggestedWindow: window(bed, 1, 1) }), 5 * HOUR, "the renewal window ends before it starts"],
    [answering({ suggestedWindow: { start: "soon", end: 7 } }), 5 * HOUR, "no renewal window in the answer"],
    [answering({ suggestedWindow: null }, "7200"), 5 * HOUR, "no renewal window in the answer"],
    [answering(7), 5 * HOUR, "not a JSON object"],
    [refusal, 5 * HOUR, "never heard of it (malformed)"],
  ];
  const table: [Fault, number, string?][] = [
    ...invalid,
    [answering(valid, "soon"), 5 * HOUR],
    [answering(valid, "7200"), 2 * HOUR],
    [answering(valid, "1"), MINUTE],
    [answering(valid, "9".repeat(20)), DAY],
    ...invalid,
    [answering({ suggestedWindow: window(bed, 20 * DAY, 30 * DAY) }), 5 * HOUR],
  ];
  const times = new Set<string>();
  for (const [fault, ms, why] of table) {
    bed.ca.switches.fault = faultAt("renewalInfo", fault);
    const ran = await bed.run();
    assert.equal(countOf(ran, "renewalInfo"), 1);
    const decides = times.size === 0 ? "its dates decide" : "the earlier answer decides";
    const expected = `example.com (ec): cannot ask when to renew: ${why}; ${decides}`;
    assert.deepEqual(notes(ran), why === undefined ? [] : [expected]);
    const at = Object.values(bed.state().renewals)[0]!.window?.at;
    if (at !== undefined) times.add(at);
    bed.ca.advance(ms - 10_000);
    assert.equal(countOf(await bed.run(), "renewalInfo"), 0, "asked too soon");
    bed.ca.advance(20_000);
  }
  assert.equal(times.size, 2, "a random time is chosen once for each window");
});

Deno.test("the CA is not asked with `ari: no`, nor about an expired certificate, nor within a day if it offers no information", async () => {
  await using bed = await issuedBed();
  const requests = async (settings = "") => {
    bed.configure({ settings: `keyTypes: ec\n${settings}` });
    return (await bed.run()).requests.map(({ resource }) => resource);
  };
  suggest(bed, -2 * HOUR, -HOUR);
  assert.deepEqual(await requests("ari: no"), []);
  const withoutInfo: Fault = { kind: "rewrite", rewrite: ({ renewalInfo: _, ...rest }) => rest };
  bed.ca.switches.fault = faultAt("directory", withoutInfo);
  assert.deepEqual(await requests(), ["directory"]);
  bed.ca.advance(23 * HOUR);
  assert.deepEqual(await requests(), []);
  bed.ca.advance(2 * HOUR);
  suggest(bed, DAY, 2 * DAY);
  assert.deepEqual(await requests(), ["directory", "renewalInfo"]);
  bed.ca.advance(91 * DAY);
  assert(!(await requests()).includes("renewalInfo"));
  assert.equal(bed.ca.orders.length, 2);
});

Deno.test("a CA that is down causes one note and no pause if nothing is due, and is not asked about each certificate", async () => {
  await using bed = await issuedBed(Array.from({ length: 20 }, (_, i) => `n${i}.example`).join("\n"));
  const down: Fault = { kind: "status", status: 503 };
  bed.ca.switches.fault = faultAt("directory", down, Infinity);
  bed.waits.length = 0;
  const unreachable = await bed.run();
  assert.deepEqual([unreachable.code, bed.waits, notes(unreachable).length], [0, [], 1]);

  bed.ca.switches.fault = faultAt("renewalInfo", down, Infinity);
  const ran = await bed.run({ parallel: 2 });
  assert.deepEqual([ran.code, notes(ran).length], [0, 1]);
  assert.equal(
    countOf(ran, "renewalInfo"),
    2 * 4,
    "4 attempts for each of the 2 that were asked in parallel",
  );

  // the next run asks about the other 18
  suggest(bed, -2 * HOUR, -HOUR);
  const last = bed.ca.issued.find(({ names }) => names[0] === "n19.example")!.certId;
  bed.ca.switches.fault = ({ url }) => url.endsWith(last) ? answering({}) : undefined;
  const next = await bed.run();
  assert.equal(next.code, 0);
  assert.equal(countOf(next, "newOrder"), 17, "an invalid answer affects no other certificate");
});

Deno.test("a certificate without an authority key identifier, or of another CA, is noted, and its dates decide", async () => {
  await using bed = await testBed({ domains: `${NAME}\nother.example`, settings: "keyTypes: ec" });
  await bed.plant();
  const key = bed.path("test/key", `${NAME}-key.prime256v1.test.pem`);
  const certificate = bed.path("test/cert", `${NAME}-cert-combined.prime256v1.test.pem`);
  const args = "req -x509 -config /dev/null -days 90 -subj /CN=x -addext subjectAltName=DNS:example.com";
  await run("openssl", ...args.split(" "), "-key", key, "-out", certificate);
  const [bare, foreign] = notes(await bed.run());
  assert.match(bare!, /^example\.com \(ec\): .* no authority key identifier; its dates decide$/);
  assert.match(foreign!, /^other\.example \(ec\): .* \(malformed\); its dates decide$/);
  const state = bed.state();
  for (const id of Object.keys(state.renewals)) {
    state.renewals[id] = { account: "https://elsewhere.example/ x" };
  }
  Deno.writeTextFileSync(bed.path("test/state.json"), JSON.stringify(state));
  assert.deepEqual(notes(await bed.run()), [bare], "this CA did not issue the other one");
  assert.deepEqual(bed.takeViolations(), ["malformed renewalInfo"]);
});

Deno.test("a certificate is renewed if its time is past, and not again within a day; a plain https link explains it", async () => {
  const table = [
    [-364, 1, "https://ca.example/incident-7?id=1", true],
    [-20_000, -2000, "javascript:alert(1)", false],
  ] as const;
  for (const [start, end, url, isShown] of table) {
    await using bed = await issuedBed();
    for (const [hours, orders] of [[0, 2], [6, 2], [12, 2], [7, 3]] as const) {
      bed.ca.advance(hours * HOUR);
      suggest(bed, start * DAY, end * DAY, url);
      const { code, stdout } = await bed.run({ cron: true, random: () => 0.5 });
      assert.deepEqual([code, bed.ca.orders.length], [0, orders], `${start}, hour ${hours}`);
      assert.equal(stdout.includes(url), isShown && stdout !== "", stdout);
    }
  }
});

Deno.test("an order names the certificate that it replaces if this account ordered it, and is sent again without `replaces` if the CA refuses it", async () => {
  const limited = refusing(429, "rateLimited", "no", { headers: { "retry-after": "3600" } });
  const unknown = refusing(500, "serverInternal", "no"); // Pebble's answer for a certificate that it does not know
  const table = [
    ["the same", undefined, 0, 1, 1],
    ["another", undefined, 0, 1, 1],
    ["the same", refusing(409, "alreadyReplaced", "no"), 1, 2, 1],
    ["the same", unknown, 4, 5, 1],
    ["the same", limited, 1, 1, 0],
  ] as const;
  for (const [account, refusal, times, requests, orders] of table) {
    await using bed = await issuedBed();
    if (account === "another") await Deno.remove(bed.path("account.key.test"));
    bed.ca.advance(80 * DAY);
    if (refusal) bed.ca.switches.fault = faultAt("newOrder", refusal, times);
    assert.equal(countOf(await bed.run(), "newOrder"), requests);
    const isNamed = account === "the same" && requests === 1;
    const replaces = bed.ca.orders.slice(1).map(({ replaces }) => replaces);
    assert.deepEqual(replaces, Array(orders).fill(isNamed ? bed.ca.issued[0]!.certId : undefined));
  }
});
