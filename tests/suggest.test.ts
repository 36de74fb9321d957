/** Goal: a certificate is renewed when the CA suggests it, and nothing that the CA says of it does harm (RFC 9773). */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { join } from "node:path";
import { type Bed, befalling, type Ran, refusing, testBed } from "./bed.ts";
import type { Fault, Switches } from "./ca.ts";

const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE, DAY = 24 * HOUR;
const NAME = "example.com";

/** A bed for one EC certificate of each line, already issued; renewal information can be given faults. */
async function issuedBed(
  { domains = NAME, ...switches }: Switches & { domains?: string } = {},
): Promise<Bed> {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(
    await testBed({ domains, settings: "keyTypes: ec", ca: { fault: () => undefined, ...switches } }),
  );
  const { code, stderr } = await bed.run();
  assert.equal(code, 0, stderr);
  stack.move();
  return bed;
}

/** Suggests the window from `start` to `end` (from now) for every certificate that has been issued. */
function suggest({ ca }: Bed, start: number, end: number, explanationURL?: string) {
  const at = (ms: number) => new Date(ca.now.getTime() + ms);
  for (const { serial } of ca.issued) {
    ca.setRenewalWindow(serial, { start: at(start), end: at(end), explanationURL });
  }
}

/** Answers about renewal like this. */
function answering(body: unknown, headers: Record<string, string> = {}): Fault {
  const text = typeof body === "string" ? body : JSON.stringify(body);
  return { kind: "status", status: 200, headers, body: text, contentType: "application/json" };
}

const window = (start: string | number, end: string | number) => ({ suggestedWindow: { start, end } });
const befallInfo = (fault: Fault | undefined): Switches["fault"] => ({ resource }) =>
  resource === "renewalInfo" ? fault : undefined;
const asked = ({ requests }: Ran) => requests.filter(({ resource }) => resource === "renewalInfo");
const notes = ({ stdout }: Ran) => stdout.split("\n").filter((line) => line.startsWith("note "));

/** When the one certificate of a bed is to be renewed, and by which rule, as a run now tells it. */
async function renewal(bed: Bed, world: Parameters<Bed["run"]>[0] = {}): Promise<[string, string]> {
  const ran = await bed.run({ json: true, ...world });
  assert.equal(ran.code, 0, ran.stderr);
  const { kept, issued } = JSON.parse(ran.stdout);
  assert.equal(issued.length, 0, ran.stdout);
  return [kept[0].renewAt, kept[0].rule];
}

// ---- asking ------------------------------------------------------------------------------------------------------

Deno.test("each certificate is asked about under the identifier that its CA knows, leading zeros included", async () => {
  await using bed = await issuedBed({ domains: "a.example\nb.example\nc.example\nd.example" });
  const ids = bed.ca.issued.map(({ certId }) => certId);
  assert.equal(
    ids.filter((id) => /\.A[I-P]/.test(id)).length,
    2,
    "serials that begin with 00 8…: half of them",
  );
  const ran = await bed.run();
  assert.deepEqual(asked(ran).map(({ path }) => path.replace("/renewal-info/", "")).sort(), ids.toSorted());
  assert.deepEqual(asked(ran).map(({ status }) => status), [200, 200, 200, 200]);
});

for (
  const [header, ms] of [
    [undefined, 6 * HOUR],
    ["21600", 6 * HOUR],
    ["7200", 2 * HOUR],
    ["1", MINUTE],
    ["0", MINUTE],
    ["604800", DAY],
    ["99999999999999999999", DAY],
    ["Fri, 31 Dec 2100 23:59:59 GMT", DAY],
    ["Thu, 01 Jan 1970 00:00:00 GMT", MINUTE],
    ["soon", 6 * HOUR],
    ["-5", 6 * HOUR],
  ] as const
) {
  Deno.test(`the CA is asked again after ${ms / MINUTE} minutes where Retry-After is ${header}`, async () => {
    await using bed = await issuedBed();
    const { start, end } = { start: new Date(Date.now() + 50 * DAY), end: new Date(Date.now() + 51 * DAY) };
    const headers: Record<string, string> = header === undefined ? {} : { "retry-after": header };
    bed.ca.switches.fault = befallInfo(answering({ suggestedWindow: { start, end } }, headers));
    assert.equal(asked(await bed.run()).length, 1);
    bed.ca.advance(ms - 10 * SECOND);
    assert.equal(asked(await bed.run()).length, 0);
    bed.ca.advance(20 * SECOND);
    assert.equal(asked(await bed.run()).length, 1);
  });
}

Deno.test("nobody is asked with `ari: no`, where the CA does not offer it, or about what has expired", async () => {
  for (const why of ["ari: no", "not offered", "expired"]) {
    await using bed = await issuedBed({ renewalInfo: why !== "not offered" });
    suggest(bed, -2 * HOUR, -HOUR);
    if (why === "ari: no") bed.configure({ settings: "keyTypes: ec\nari: no" });
    if (why === "expired") bed.ca.advance(91 * DAY);
    const ran = await bed.run();
    assert.deepEqual([asked(ran).length, ran.code], [0, 0], why);
    assert.equal(bed.ca.orders.length, why === "expired" ? 2 : 1, why);
    assert.equal(bed.ca.orders.at(-1)!.replaces, undefined, why);
  }
});

Deno.test("a certificate that does not name its authority's key is told, and goes by its dates", async () => {
  await using bed = await testBed({ domains: `${NAME}\nother.example`, settings: "keyTypes: ec" });
  await bed.plant();
  const certificate = join("test", "cert", `${NAME}-cert-combined.prime256v1.test.pem`);
  await Deno.writeTextFile(
    bed.path("bare.cnf"),
    "[req]\ndistinguished_name = dn\nx509_extensions = v3\nprompt = no\n[dn]\nCN = x\n" +
      `[v3]\nsubjectAltName = DNS:${NAME}\nsubjectKeyIdentifier = none\n`,
  );
  const { code, stderr } = await new Deno.Command("openssl", {
    args: ["req", "-x509", "-days", "90", "-config", bed.path("bare.cnf"), "-out", bed.path(certificate)]
      .concat("-key", bed.path("test", "key", `${NAME}-key.prime256v1.test.pem`)),
  }).output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
  const ran = await bed.run();
  assert.deepEqual(notes(ran), [
    "note    example.com (ec): cannot ask when to renew: it does not name its authority's key; its dates decide",
    // for nobody ordered it
    "note    other.example (ec): cannot ask when to renew: no certificate has the certID " +
    `${asked(ran)[0]!.path.replace("/renewal-info/", "")} (malformed); its dates decide`,
  ]);
  assert.match(ran.stdout, /^nothing due, 2 kept/m);
  bed.ca.violations.splice(0);
});

// ---- the moment --------------------------------------------------------------------------------------------------

Deno.test("a moment is drawn once in a window, and anew in another one", async () => {
  await using bed = await issuedBed();
  const begun = bed.ca.now.getTime();
  const drawn = async (random: number) => {
    const [at, rule] = await renewal(bed, { random: () => random });
    assert.equal(rule, "ari");
    bed.ca.advance(7 * HOUR);
    return Math.round((Date.parse(at) - begun) / HOUR);
  };
  suggest(bed, 40 * DAY, 50 * DAY);
  assert.equal(await drawn(0.25), 42.5 * 24);
  assert.equal(await drawn(0.75), 42.5 * 24, "drawn again");
  const state = JSON.parse(bed.text("test", "state.json"));
  assert.deepEqual(Object.keys(state.renewals), [bed.ca.issued[0]!.certId]);
  suggest(bed, begun + 30 * DAY - bed.ca.now.getTime(), begun + 50 * DAY - bed.ca.now.getTime());
  assert.equal(await drawn(0.75), 45 * 24);
});

for (
  const [what, interval, moment, due] of [
    ["in the past", DAY, -30 * DAY, true],
    ["a minute ago", DAY, -MINUTE, true],
    ["before the next night", DAY, 23 * HOUR, true],
    ["after the next night", DAY, 25 * HOUR, false],
    ["before the next hourly run", HOUR, 50 * MINUTE, true],
    ["after the next hourly run", HOUR, 70 * MINUTE, false],
    ["within the next night, after a week without a run", 7 * DAY, 23 * HOUR, true],
    ["two nights away, after a week without a run", 7 * DAY, 2 * DAY, false],
    ["in the next hour, just after another run", MINUTE, 59 * MINUTE, true],
  ] as const
) {
  Deno.test(`a moment ${what} ${due ? "is now" : "is waited for"}`, async () => {
    await using bed = await issuedBed();
    bed.ca.advance(interval);
    suggest(bed, moment - SECOND, moment + SECOND);
    const ran = await bed.run();
    assert.deepEqual([ran.code, bed.ca.orders.length], [0, due ? 2 : 1], ran.stderr);
    if (due) assert.match(ran.stdout, /^issued .*\(the CA suggests \d{4}-\d\d-\d\d\)$/m);
  });
}

Deno.test("the user's own settings renew where they come before the suggestion", async () => {
  await using bed = await issuedBed();
  bed.ca.advance(30 * DAY);
  suggest(bed, 55 * DAY, 56 * DAY);
  assert.equal((await renewal(bed))[1], "expiry"); // 15 days before the end: at day 75
  bed.ca.advance(46 * DAY);
  const { stdout } = await bed.run();
  assert.match(stdout, /^issued .*\(due since \S+ by reauthorizeDays\)$/m);
});

Deno.test("a suggestion is for its own certificate, not for the one that follows it", async () => {
  await using bed = await issuedBed();
  suggest(bed, -2 * HOUR, -HOUR);
  await Deno.remove(bed.path("test/cert"), { recursive: true });
  await bed.run(); // another certificate, of the same names and key
  bed.ca.advance(7 * HOUR);
  const [, rule] = await renewal(bed);
  assert.deepEqual([rule, bed.ca.orders.length], ["ari", 2]); // its own window, two thirds into its life
});

Deno.test("why the CA suggests it is shown where it is a plain link, and nowhere else", async () => {
  for (
    const [url, shown] of [
      ["https://ca.example/incident-7?id=1", ", see https://ca.example/incident-7?id=1"],
      ["javascript:alert(1)", ""],
      ["https://ca.example/\x1b[2Jowned", ""],
      ["https://ca.example/ $(id)", ""],
    ] as const
  ) {
    await using bed = await issuedBed();
    suggest(bed, -2 * HOUR, -HOUR, url);
    const { stdout } = await bed.run();
    const [, told] = /\(the CA suggests \d{4}-\d\d-\d\d(.*)\)$/m.exec(stdout) ?? [];
    assert.equal(told, shown);
  }
});

// ---- answers that are none ---------------------------------------------------------------------------------------

const inDays = (days: number) => new Date(Date.now() + days * DAY).toISOString();
for (
  const [what, fault, why] of [
    [
      "a reversed window",
      answering(window(inDays(2), inDays(1))),
      "the renewal window ends before it starts",
    ],
    ["an empty window", answering(window(inDays(1), inDays(1))), "the renewal window ends before it starts"],
    [
      "a window of a century",
      answering(window("1990-01-01T00:00:00Z", "2090-01-01T00:00:00Z")),
      "the renewal window is longer than the certificate's life",
    ],
    ["no window", answering({}), "no renewal window in the answer"],
    ["null", answering("null"), "not a JSON object"],
    ["a window of null", answering({ suggestedWindow: null }), "no renewal window in the answer"],
    ["numbers", answering(window(0, 1)), "no renewal window in the answer"],
    ["words", answering(window("yesterday", "1 \x1b[2J")), "no renewal window in the answer"],
    ["half a JSON text", answering(`{"suggestedWindow": {"sta`), "broken JSON"],
    ["HTML", { kind: "html" }, "not JSON but text/html"],
    ["404", refusing(404, "malformed", "never heard of it"), "never heard of it (malformed)"],
    ["500", { kind: "status", status: 500, contentType: "text/plain" }, "HTTP status 500 (text/plain)"],
  ] as [string, Fault, string][]
) {
  Deno.test(`${what} instead of a window is told, and the certificate's dates decide`, async () => {
    await using bed = await issuedBed();
    bed.ca.switches.fault = befallInfo(fault);
    const ran = await bed.run();
    assert.equal(ran.code, 0);
    assert.deepEqual(notes(ran), [
      `note    example.com (ec): cannot ask when to renew: ${why}; its dates decide`,
    ]);
    assert.match(ran.stdout, /^nothing due, 1 kept/m);
    const again = await bed.run({ cron: true });
    assert.deepEqual([asked(again).length, again.stdout, again.stderr], [0, "", ""]);
    bed.ca.advance(6 * HOUR + MINUTE);
    bed.ca.switches.fault = undefined;
    assert.equal((await renewal(bed))[1], "ari");

    bed.ca.switches.fault = befallInfo(fault);
    bed.ca.advance(7 * HOUR);
    const later = await bed.run();
    assert.match(notes(later)[0]!, /; what the CA said before decides$/);
    assert.equal((await renewal(bed))[1], "ari");
  });
}

Deno.test("a window that is over means now, however long it was", async () => {
  await using bed = await issuedBed();
  bed.ca.switches.fault = befallInfo(answering(window("1970-01-01T00:00:00Z", "2020-01-01T00:00:00Z")));
  assert.equal((await bed.run()).code, 0);
  assert.equal(bed.ca.orders.length, 2);
});

Deno.test("one answer that cannot be used leaves the others of use", async () => {
  await using bed = await issuedBed({ domains: "a.example\nb.example\nc.example" });
  suggest(bed, -2 * HOUR, -HOUR);
  const [first] = bed.ca.issued;
  bed.ca.switches.fault = ({ url }) =>
    url.endsWith(first!.certId) ? answering(window(inDays(2), inDays(1))) : undefined;
  const ran = await bed.run();
  assert.deepEqual([ran.code, bed.ca.orders.length, notes(ran).length], [0, 3 + 2, 1]);
});

Deno.test("a service that is down is not waited for once for every certificate", async () => {
  const domains = Array.from({ length: 30 }, (_, i) => `n${i}.example`).join("\n");
  await using bed = await issuedBed({ domains });
  bed.ca.switches.fault = befallInfo({ kind: "status", status: 503 });
  const ran = await bed.run({ parallel: 3 });
  assert.deepEqual([ran.code, notes(ran).length], [0, 1]);
  assert(asked(ran).length <= 3 * 4, `${asked(ran).length} requests`);
  bed.ca.switches.fault = undefined;
  assert.equal(asked(await bed.run()).length, 30 - 3);
});

Deno.test("a CA that is gone keeps nobody from the rest of the run", async () => {
  await using bed = await issuedBed();
  bed.ca.switches.fault = ({ resource }) =>
    resource === "directory" ? { kind: "status", status: 503 } : undefined;
  const ran = await bed.run();
  assert.equal(ran.code, 0);
  assert.match(
    notes(ran)[0]!,
    /^note {4}cannot ask the CA when to renew: cannot read the directory: HTTP status 503/,
  );
  assert.match(ran.stdout, /^nothing due, 1 kept/m);
});

// ---- renewing ----------------------------------------------------------------------------------------------------

Deno.test("after a mass revocation the next run renews and delivers everything, and the runs of that day nothing more", async () => {
  await using bed = await testBed({ domains: `${NAME} www\nmail.example\nshop.example` });
  const log = join(bed.home, "log");
  bed.configure({
    actions: `[default]\nupdate: ["echo default DOMAINS_CN >> ${log}"]\n` +
      `[mail]\ndomains: mail.example\nupdate: ["echo mail DOMAINS_CN >> ${log}"]\n`,
  });
  await bed.run();
  await Deno.remove(log);
  const before = bed.ca.issued.map(({ certId }) => certId);

  suggest(bed, -2 * HOUR, -HOUR, "https://ca.example/incident");
  const drill = await bed.run();
  assert.equal(drill.code, 0, drill.stderr);
  assert.equal(
    drill.stdout.match(/^issued .*rsa ec .*the CA suggests .*incident\)$/gm)?.length,
    3,
    drill.stdout,
  );
  assert.deepEqual(bed.ca.issued.slice(6).map(({ replaces }) => replaces).sort(), before.sort());
  const names = (section: string, text: string) =>
    text.split("\n").filter((line) => line.startsWith(section)).flatMap((line) => line.split(" ").slice(1));
  const ran = await Deno.readTextFile(log);
  assert.deepEqual(names("default", ran).sort(), [NAME, "shop.example"]);
  assert.deepEqual(names("mail", ran), ["mail.example"]);

  for (let hour = 1; hour < 24; hour++) {
    suggest(bed, -2 * HOUR, -HOUR);
    bed.ca.advance(HOUR);
    const again = await bed.run({ cron: true });
    assert.deepEqual([again.code, again.stdout, again.stderr], [0, "", ""], `hour ${hour}`);
  }
  assert.equal(bed.ca.orders.length, 12);
  bed.ca.advance(HOUR);
  await bed.run();
  assert.equal(bed.ca.orders.length, 18, "a day later the CA is heeded again");
});

Deno.test("a renewal names its predecessor only where the same account ordered that", async () => {
  for (
    const [what, prepare, named] of [
      ["the same account", () => Promise.resolve(), true],
      ["another key, so another account", (bed: Bed) => Deno.remove(bed.path("account.key")), false],
      ["another program", async (bed: Bed) => {
        await Deno.remove(bed.path("test"), { recursive: true });
        await bed.plant();
      }, false],
      ["nobody knows: the state is lost", (bed: Bed) => Deno.remove(bed.path("test/state.json")), false],
    ] as [string, (bed: Bed) => Promise<void>, boolean][]
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

for (
  const [status, type] of [
    [409, "alreadyReplaced"],
    [403, "unauthorized"],
    [400, "malformed"],
    [404, "malformed"],
    [409, "conflict"],
    [500, "serverInternal"], // Pebble's, of a certificate that it does not know
  ] as const
) {
  Deno.test(`a CA that refuses a predecessor with ${status} ${type} gets the same order without`, async () => {
    await using bed = await issuedBed();
    const { ca } = bed;
    ca.advance(80 * DAY);
    ca.switches.fault = befalling("newOrder", refusing(status, type, "no"), status === 500 ? 4 : 1);
    const ran = await bed.run();
    assert.deepEqual([ran.code, ran.stderr], [0, ""]);
    assert.deepEqual(ca.orders.slice(1).map(({ replaces }) => replaces), [undefined]);
    const pem = bed.text(`test/cert/${NAME}-cert-combined.prime256v1.test.pem`);
    assert.equal(new X509Certificate(pem).serialNumber, ca.issued[1]!.serial);
  });
}

Deno.test("a rate limit is a limit with and without a predecessor: the order is not sent again", async () => {
  await using bed = await issuedBed();
  bed.ca.advance(80 * DAY);
  bed.ca.switches.fault = ({ resource }) =>
    resource === "newOrder"
      ? refusing(429, "rateLimited", "too many", { headers: { "retry-after": "3600" } })
      : undefined;
  const ran = await bed.run();
  assert.equal(ran.code, 1);
  assert.equal(ran.requests.filter(({ resource }) => resource === "newOrder").length, 1);
});
