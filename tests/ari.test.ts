/** Goal: the CA is asked when to renew certificates (RFC 9773), no more often than it allows, and no answer does harm. */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { type Bed, faultAt, type Ran, refusing, testBed } from "./bed.ts";
import type { Fault, Switches } from "./ca.ts";

const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const NAME = "example.com";
const CERT = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;

/** A bed with an EC certificate issued for each line, whose CA can be given faults. */
async function issuedBed(
  { domains = NAME, ...switches }: Switches & { domains?: string } = {},
): Promise<Bed> {
  await using stack = new AsyncDisposableStack();
  const ca = { fault: () => undefined, ...switches };
  const bed = stack.use(await testBed({ domains, settings: "keyTypes: ec", ca }));
  const { code, stderr } = await bed.run();
  assert.equal(code, 0, stderr);
  stack.move();
  return bed;
}

const window = (ca: Bed["ca"], start: number, end: number) => ({
  start: new Date(ca.now.getTime() + start),
  end: new Date(ca.now.getTime() + end),
});

/** Suggests the window from `start` to `end` (from now) for every certificate that has been issued. */
function suggest({ ca }: Bed, start: number, end: number, explanationURL?: string) {
  for (const issued of ca.issued) issued.renewalWindow = { ...window(ca, start, end), explanationURL };
}

/** Injects a fault into every answer about renewal. */
function injectInfo(bed: Bed, fault: Fault | undefined) {
  bed.ca.switches.fault = ({ resource }) => resource === "renewalInfo" ? fault : undefined;
}
function answering(body: unknown, headers: Record<string, string> = {}): Fault {
  const text = typeof body === "string" ? body : JSON.stringify(body);
  return { kind: "status", status: 200, headers, body: text, contentType: "application/json" };
}

const asked = ({ requests }: Ran) => requests.filter(({ resource }) => resource === "renewalInfo");
const notes = ({ stdout }: Ran) =>
  stdout.split("\n").filter((line) => line.startsWith("note")).map((line) => line.replace(/^note +/, ""));
/** The time of renewal that is remembered for the only certificate. */
const renewalTime = (bed: Bed) => Object.values(bed.state().renewals)[0]!.window!.at;

// ---- asking ------------------------------------------------------------------------------------------------------

Deno.test("renewal information is requested with the certificate identifier of RFC 9773, leading zeros included", async () => {
  await using bed = await issuedBed({ domains: "a.example\nb.example\nc.example\nd.example" });
  const ids = bed.ca.issued.map(({ certId }) => certId);
  const zeros = ids.filter((id) => /\.A[I-P]/.test(id));
  assert.equal(zeros.length, 2, "half of the serial numbers begin with 00 8…");
  const ran = await bed.run();
  assert.deepEqual(asked(ran).map(({ url }) => url.replace(/^.*[/]/, "")).sort(), ids.toSorted());
  assert.deepEqual(asked(ran).map(({ status }) => status), [200, 200, 200, 200]);
});

Deno.test("the CA is asked again after Retry-After, limited to between a minute and a day; without it after five hours", async () => {
  await using bed = await issuedBed();
  const suggestedWindow = window(bed.ca, 50 * DAY, 51 * DAY);
  for (
    const [header, ms] of [
      [undefined, 5 * HOUR],
      ["7200", 2 * HOUR],
      ["1", MINUTE],
      ["99999999999999999999", DAY],
      ["Fri, 31 Dec 2100 23:59:59 GMT", DAY],
      ["Thu, 01 Jan 1970 00:00:00 GMT", MINUTE],
      ["soon", 5 * HOUR],
    ] as const
  ) {
    injectInfo(bed, answering({ suggestedWindow }, header === undefined ? {} : { "retry-after": header }));
    assert.equal(asked(await bed.run()).length, 1, header);
    bed.ca.advance(ms - 10 * SECOND);
    assert.equal(asked(await bed.run()).length, 0, header);
    bed.ca.advance(20 * SECOND);
  }
});

Deno.test("the CA is not asked with `ari: no`, nor about an expired certificate", async () => {
  await using bed = await issuedBed();
  suggest(bed, -2 * HOUR, -HOUR);
  bed.configure({ settings: "keyTypes: ec\nari: no" });
  const off = await bed.run();
  assert.deepEqual([asked(off).length, off.code, bed.ca.orders.length], [0, 0, 1]);
  bed.configure({ settings: "keyTypes: ec" });
  bed.ca.advance(91 * DAY);
  const expired = await bed.run();
  assert.deepEqual([asked(expired).length, expired.code, bed.ca.orders.length], [0, 0, 2]);
});

Deno.test("a CA without renewal information is asked for it again after a day", async () => {
  await using bed = await issuedBed({ renewalInfo: false });
  const requests = async (hours: number) => {
    bed.ca.advance(hours * HOUR);
    return (await bed.run()).requests.map(({ resource }) => resource);
  };
  assert.deepEqual(await requests(0), ["directory"]);
  assert.deepEqual(await requests(23), []);
  bed.ca.switches.renewalInfo = true;
  assert.deepEqual(await requests(2), ["directory", "renewalInfo"]);
});

Deno.test("an unreachable CA is one note and no wait if no certificate is due; orders are retried", async () => {
  await using bed = await issuedBed();
  bed.ca.switches.fault = faultAt("directory", { kind: "status", status: 503 }, Infinity);
  bed.waits.length = 0;
  const ran = await bed.run();
  assert.deepEqual([ran.code, bed.waits, notes(ran).length], [0, [], 1]);
  bed.configure({ domains: `${NAME}\nother.example` });
  bed.ca.switches.fault = faultAt("directory", { kind: "status", status: 503 }, 3);
  assert.equal((await bed.run()).code, 0, "a run with an order failed");
});

Deno.test("a service that is down is not asked about each certificate; one invalid answer does not affect the others", async () => {
  const domains = Array.from({ length: 30 }, (_, i) => `n${i}.example`).join("\n");
  await using bed = await issuedBed({ domains });
  injectInfo(bed, { kind: "status", status: 503 });
  const down = await bed.run({ parallel: 3 });
  assert.deepEqual([down.code, notes(down).length], [0, 1]);
  assert(asked(down).length <= 3 * 4, `${asked(down).length} requests`);
  suggest(bed, -2 * HOUR, -HOUR);
  const odd = bed.ca.issued.at(-1)!.certId;
  const suggestedWindow = window(bed.ca, 2, 1);
  bed.ca.switches.fault = ({ url }) => url.endsWith(odd) ? answering({ suggestedWindow }) : undefined;
  const ran = await bed.run();
  assert.deepEqual([ran.code, asked(ran).length >= 26, notes(ran).length <= 1], [0, true, true]);
  assert(bed.ca.orders.length >= 30 + 26);
});

// ---- answers -----------------------------------------------------------------------------------------------------

Deno.test("a certificate without an authority key identifier is noted, and renewed by its dates", async () => {
  await using bed = await testBed({ domains: `${NAME}\nother.example`, settings: "keyTypes: ec" });
  await bed.plant();
  const config = "[req]\ndistinguished_name = dn\nx509_extensions = v3\nprompt = no\n[dn]\nCN = x\n" +
    `[v3]\nsubjectAltName = DNS:${NAME}\nsubjectKeyIdentifier = none\n`;
  await Deno.writeTextFile(bed.path("bare.cnf"), config);
  const { code } = await new Deno.Command("openssl", {
    args: ["req", "-x509", "-days", "90", "-config", bed.path("bare.cnf"), "-out", bed.path(CERT)]
      .concat("-key", bed.path("test", "key", `${NAME}-key.prime256v1.test.pem`)),
    stderr: "null",
  }).output();
  assert.equal(code, 0);
  const [bare, foreign] = notes(await bed.run());
  assert.match(bare!, /^example\.com \(ec\): .* no authority key identifier; its dates decide$/);
  assert.match(foreign!, /^other\.example \(ec\): .* \(malformed\); its dates decide$/); // of another CA
  bed.ca.violations.splice(0);
});

Deno.test("a random time is chosen once for a window, and again for another window", async () => {
  await using bed = await issuedBed();
  const started = bed.ca.now.getTime();
  const hoursUntilRenewal = async (random: number) => {
    assert.equal((await bed.run({ random: () => random })).code, 0);
    bed.ca.advance(7 * HOUR);
    return Math.round((Date.parse(renewalTime(bed)) - started) / HOUR);
  };
  suggest(bed, 40 * DAY, 50 * DAY);
  assert.equal(await hoursUntilRenewal(0.25), 42.5 * 24);
  assert.equal(await hoursUntilRenewal(0.75), 42.5 * 24, "chosen again");
  suggest(bed, started + 30 * DAY - bed.ca.now.getTime(), started + 50 * DAY - bed.ca.now.getTime());
  assert.equal(await hoursUntilRenewal(0.75), 45 * 24);
});

Deno.test("an invalid window is noted, and the certificate's dates decide, or an earlier answer of the CA", async () => {
  await using bed = await issuedBed();
  const table: [Fault, string][] = [
    [answering({ suggestedWindow: window(bed.ca, 1, 1) }), "the renewal window ends before it starts"],
    [answering({}), "no renewal window in the answer"],
    [answering("null"), "not a JSON object"],
    [answering({ suggestedWindow: null }), "no renewal window in the answer"],
    [
      answering({ suggestedWindow: { start: "yesterday", end: "\x1b[2J" } }),
      "no renewal window in the answer",
    ],
    [answering(`{"suggestedWindow": {"sta`), "broken JSON"],
    [{ kind: "html" }, "not JSON but text/html"],
    [refusing(404, "malformed", "never heard of it"), "never heard of it (malformed)"],
    [{ kind: "status", status: 500, contentType: "text/plain" }, "HTTP status 500 (text/plain)"],
  ];
  let earlier: string | undefined;
  for (const decides of ["its dates decide", "the earlier answer decides"]) {
    for (const [fault, why] of table) {
      injectInfo(bed, fault);
      const ran = await bed.run();
      assert.equal(ran.code, 0, ran.stdout);
      assert.deepEqual(notes(ran), [`example.com (ec): cannot ask when to renew: ${why}; ${decides}`]);
      assert.equal(asked(await bed.run()).length, 0, `${why}: asked too soon`);
      if (earlier !== undefined) assert.equal(renewalTime(bed), earlier);
      bed.ca.advance(6 * HOUR + MINUTE);
    }
    injectInfo(bed, undefined);
    await bed.run();
    earlier = renewalTime(bed);
    bed.ca.advance(7 * HOUR);
  }
});

Deno.test("a certificate is renewed at once if its time of renewal is past, however long ago the window began", async () => {
  for (const [start, end] of [[-364, 1], [-20_000, -2000]] as const) {
    await using bed = await issuedBed();
    suggest(bed, start * DAY, end * DAY);
    assert.equal((await bed.run({ random: () => 0.5 })).code, 0);
    assert.equal(bed.ca.orders.length, 2);
  }
});

// ---- renewing ----------------------------------------------------------------------------------------------------

Deno.test("after a mass revocation the next run renews everything, and later runs of that day renew nothing", async () => {
  await using bed = await testBed({ domains: `${NAME} www\nmail.example\nshop.example` });
  await bed.run();
  const before = bed.ca.issued.map(({ certId }) => certId);
  suggest(bed, -2 * HOUR, -HOUR, "https://ca.example/incident");
  const renewal = await bed.run();
  assert.equal(renewal.code, 0, renewal.stderr);
  assert(renewal.stdout.match(/^issued .*/gm)!.every((line) => line.includes("https://ca.example/incident")));
  assert.deepEqual(bed.ca.issued.slice(6).map(({ replaces }) => replaces).sort(), before.sort());
  for (let hour = 6; hour < 24; hour += 6) {
    suggest(bed, -2 * HOUR, -HOUR);
    bed.ca.advance(6 * HOUR);
    const again = await bed.run({ cron: true });
    assert.deepEqual([again.code, again.stdout, again.stderr], [0, "", ""], `hour ${hour}`);
  }
  assert.equal(bed.ca.orders.length, 12);
  bed.ca.advance(7 * HOUR);
  suggest(bed, -2 * HOUR, -HOUR);
  await bed.run();
  assert.equal(bed.ca.orders.length, 18, "a day later the window counts again");
});

Deno.test("the explanation of the CA is shown only if it is a plain https link", async () => {
  for (
    const [url, shown] of [
      ["https://ca.example/incident-7?id=1", true],
      ["javascript:alert(1)", false],
      ["https://ca.example/\x1b[2Jowned", false],
      ["https://ca.example/ $(id)", false],
    ] as const
  ) {
    await using bed = await issuedBed();
    suggest(bed, -2 * HOUR, -HOUR, url);
    const { stdout } = await bed.run();
    assert.equal(stdout.includes(url), shown, stdout);
    assert(shown || !/javascript|owned|\$\(id\)/.test(stdout));
  }
});

Deno.test("an order names the certificate that it replaces only if the same account ordered it", async () => {
  for (
    const [what, prepare, named] of [
      ["the same account", () => {}, true],
      ["another key, so another account", (bed: Bed) => Deno.remove(bed.path("account.key.test")), false],
      ["another program", async (bed: Bed) => {
        await Deno.remove(bed.path("test"), { recursive: true });
        await bed.plant();
      }, false],
      [
        "state.json is lost",
        (bed: Bed) => Deno.remove(bed.path("test/state.json")),
        false,
      ],
    ] as const
  ) {
    await using bed = await issuedBed();
    const { certId } = bed.ca.issued[0]!;
    await prepare(bed);
    bed.ca.advance(80 * DAY);
    const ran = await bed.run();
    assert.equal(ran.code, 0, ran.stderr);
    assert.equal(bed.ca.issued.at(-1)!.replaces, named ? certId : undefined, what);
    bed.ca.violations.splice(0); // the CA is also asked about a certificate that it did not issue
  }
});

Deno.test("an order is repeated without `replaces` if the CA refuses it, but not if it is rate-limited", async () => {
  for (
    const [status, type, times] of [
      [409, "alreadyReplaced", 1],
      [403, "unauthorized", 1],
      [404, "malformed", 3],
      [500, "serverInternal", 4], // Pebble's answer for a certificate that it does not know
    ] as const
  ) {
    await using bed = await issuedBed();
    bed.ca.advance(80 * DAY);
    bed.ca.switches.fault = faultAt("newOrder", refusing(status, type, "no"), times);
    assert.equal((await bed.run()).code, 0, type);
    assert.deepEqual(bed.ca.orders.slice(1).map(({ replaces }) => replaces), [undefined]);
    assert.equal(new X509Certificate(bed.text(CERT)).serialNumber, bed.ca.issued[1]!.serial);
  }
  await using bed = await issuedBed();
  bed.ca.advance(80 * DAY);
  const headers = { "retry-after": "3600" };
  bed.ca.switches.fault = faultAt("newOrder", refusing(429, "rateLimited", "no", { headers }));
  const { code, requests } = await bed.run();
  assert.deepEqual([code, requests.filter(({ resource }) => resource === "newOrder").length], [1, 1]);
});
