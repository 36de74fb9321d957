/** Goal: the CA is asked when it would like certificates to be renewed, as often as it likes, and nothing that it says does harm. */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { type Bed, faultAt, type Ran, refusing, testBed } from "./bed.ts";
import type { Fault, Switches } from "./ca.ts";

const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const NAME = "example.com";
const CERT = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;

/** A bed for one EC certificate of each line, already issued; renewal information can be given faults. */
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
/** The moment that is remembered of the one certificate. */
const drawnAt = (bed: Bed) => Object.values(bed.state().renewals)[0]!.window!.at;

// ---- asking ------------------------------------------------------------------------------------------------------

Deno.test("each certificate is asked about under the identifier that its CA knows, leading zeros included", async () => {
  await using bed = await issuedBed({ domains: "a.example\nb.example\nc.example\nd.example" });
  const ids = bed.ca.issued.map(({ certId }) => certId);
  const zeros = ids.filter((id) => /\.A[I-P]/.test(id));
  assert.equal(zeros.length, 2, "serials that begin with 00 8…: half of them");
  const ran = await bed.run();
  assert.deepEqual(asked(ran).map(({ path }) => path.replace("/renewal-info/", "")).sort(), ids.toSorted());
  assert.deepEqual(asked(ran).map(({ status }) => status), [200, 200, 200, 200]);
});

Deno.test("the CA is asked again when it says, within a minute and a day; after five hours if it does not say", async () => {
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

Deno.test("nobody is asked with `ari: no`, or about what has expired", async () => {
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

Deno.test("that a CA offers no renewal information is remembered for a day", async () => {
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

Deno.test("a CA that is gone keeps nobody from the rest of the run, and is not waited for", async () => {
  await using bed = await issuedBed();
  bed.ca.switches.fault = faultAt("directory", { kind: "status", status: 503 }, Infinity);
  bed.waits.length = 0;
  const ran = await bed.run();
  assert.deepEqual([ran.code, bed.waits, notes(ran).length], [0, [], 1]);
  bed.configure({ domains: `${NAME}\nother.example` });
  bed.ca.switches.fault = faultAt("directory", { kind: "status", status: 503 }, 3);
  assert.equal((await bed.run()).code, 0, "who depends on the CA tries harder");
});

Deno.test("a service that is down is not asked for each certificate; one answer that cannot be used leaves the others of use", async () => {
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

Deno.test("a certificate that does not name its authority's key is said to be, and goes by its dates", async () => {
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
  assert.match(foreign!, /^other\.example \(ec\): .* \(malformed\); its dates decide$/); // nobody ordered it
  bed.ca.violations.splice(0);
});

Deno.test("a moment is drawn once in a window, and anew in another one", async () => {
  await using bed = await issuedBed();
  const begun = bed.ca.now.getTime();
  const drawn = async (random: number) => {
    assert.equal((await bed.run({ random: () => random })).code, 0);
    bed.ca.advance(7 * HOUR);
    return Math.round((Date.parse(drawnAt(bed)) - begun) / HOUR);
  };
  suggest(bed, 40 * DAY, 50 * DAY);
  assert.equal(await drawn(0.25), 42.5 * 24);
  assert.equal(await drawn(0.75), 42.5 * 24, "drawn again");
  suggest(bed, begun + 30 * DAY - bed.ca.now.getTime(), begun + 50 * DAY - bed.ca.now.getTime());
  assert.equal(await drawn(0.75), 45 * 24);
});

Deno.test("what is no window is said, and the certificate's dates decide, or what the CA said before", async () => {
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
  let moment: string | undefined;
  for (const decides of ["its dates decide", "the earlier answer decides"]) {
    for (const [fault, why] of table) {
      injectInfo(bed, fault);
      const ran = await bed.run();
      assert.equal(ran.code, 0, ran.stdout);
      assert.deepEqual(notes(ran), [`example.com (ec): cannot ask when to renew: ${why}; ${decides}`]);
      assert.equal(asked(await bed.run()).length, 0, `${why}: left alone for a while`);
      if (moment !== undefined) assert.equal(drawnAt(bed), moment);
      bed.ca.advance(6 * HOUR + MINUTE);
    }
    injectInfo(bed, undefined);
    await bed.run();
    moment = drawnAt(bed);
    bed.ca.advance(7 * HOUR);
  }
});

Deno.test("a window may be longer than a life, or over: what is over means now", async () => {
  for (const [start, end] of [[-364, 1], [-20_000, -2000]] as const) {
    await using bed = await issuedBed();
    suggest(bed, start * DAY, end * DAY);
    assert.equal((await bed.run({ random: () => 0.5 })).code, 0);
    assert.equal(bed.ca.orders.length, 2);
  }
});

// ---- renewing ----------------------------------------------------------------------------------------------------

Deno.test("after a mass revocation the next run renews everything, and the runs of that day nothing more", async () => {
  await using bed = await testBed({ domains: `${NAME} www\nmail.example\nshop.example` });
  await bed.run();
  const before = bed.ca.issued.map(({ certId }) => certId);
  suggest(bed, -2 * HOUR, -HOUR, "https://ca.example/incident");
  const drill = await bed.run();
  assert.equal(drill.code, 0, drill.stderr);
  assert(drill.stdout.match(/^issued .*/gm)!.every((line) => line.includes("https://ca.example/incident")));
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
  assert.equal(bed.ca.orders.length, 18, "a day later the CA is heeded again");
});

Deno.test("why the CA suggests it is shown where it is a plain link, and nowhere else", async () => {
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

Deno.test("a renewal names its predecessor only where the same account ordered that", async () => {
  for (
    const [what, prepare, named] of [
      ["the same account", () => {}, true],
      ["another key, so another account", (bed: Bed) => Deno.remove(bed.path("account.key.test")), false],
      ["another program", async (bed: Bed) => {
        await Deno.remove(bed.path("test"), { recursive: true });
        await bed.plant();
      }, false],
      ["nobody knows: the state is lost", (bed: Bed) => Deno.remove(bed.path("test/state.json")), false],
    ] as const
  ) {
    await using bed = await issuedBed();
    const { certId } = bed.ca.issued[0]!;
    await prepare(bed);
    bed.ca.advance(80 * DAY);
    const ran = await bed.run();
    assert.equal(ran.code, 0, ran.stderr);
    assert.equal(bed.ca.issued.at(-1)!.replaces, named ? certId : undefined, what);
    bed.ca.violations.splice(0); // it is not to be asked for a certificate that it did not issue
  }
});

Deno.test("a CA that refuses a predecessor gets the same order without; a rate limit is one with and without", async () => {
  for (
    const [status, type, times] of [
      [409, "alreadyReplaced", 1],
      [403, "unauthorized", 1],
      [404, "malformed", 3],
      [500, "serverInternal", 4], // Pebble's, of a certificate that it does not know
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
