/** Goal: a line of domains becomes its certificates in few requests, or fails alone and says why. */

import assert from "node:assert/strict";
import { createPrivateKey, createPublicKey, generateKeyPairSync, X509Certificate } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type Bed, befalling, type Ran, refusing, testBed, until } from "./bed.ts";
import type { Exchange, Fault, LogEntry, Order, Switches } from "./ca.ts";

const DAY = 86_400_000;
const NAME = "example.com";

type Resource = Exchange["resource"];

/** How often each resource was asked for. */
function counts(requests: readonly LogEntry[]): Partial<Record<Resource, number>> {
  const counted: Partial<Record<Resource, number>> = {};
  for (const { resource } of requests) counted[resource] = (counted[resource] ?? 0) + 1;
  return counted;
}

/** Waits that end when the CA has done what it is at, so that everything takes exactly one poll. */
function punctual({ ca }: Bed) {
  const isBusy = ({ status, doneAt, authorizations }: Order) =>
    status === "processing"
      ? performance.now() < doneAt!
      : authorizations.some(({ challenges }) => challenges.some(({ status }) => status === "processing"));
  return { sleep: () => until("the CA is done", () => !ca.orders.some(isBusy)) };
}

/** What a run said of failures: the messages of its events. */
function failures({ events }: Ran): string[] {
  return events.flatMap((event) => event.kind === "failed" ? [event.error.message] : []);
}

/** A bed for one EC certificate, whose CA can be given faults. */
function oneCertificate(ca: Switches = {}, domains = NAME): Promise<Bed> {
  return testBed({ domains, settings: "keyTypes: ec", ca: { fault: () => undefined, ...ca } });
}

const CERT = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;
const KEY = `test/key/${NAME}-key.prime256v1.test.pem`;
const PENDING_KEY = `test/key/.${NAME}-key.prime256v1.test.pem.pending`;

const names = (count: number) => Array.from({ length: count }, (_, i) => `n${i}.example.com`);

// ---- requests ----------------------------------------------------------------------------------------------------

Deno.test("a new certificate takes the requests that RFC 8555 demands, in its order, and no more", async () => {
  await using bed = await oneCertificate({ processingMs: 5 });
  const { requests, code } = await bed.run(punctual(bed));
  assert.equal(code, 0);
  assert.deepEqual(requests.map(({ resource }) => resource), [
    "directory",
    "newNonce",
    "newAccount",
    "newOrder",
    "authz",
    "challenge",
    "order",
    "finalize",
    "order",
    "certificate",
  ]);
  assert.equal(new Set(requests.map(({ connection }) => connection)).size, 1);
});

Deno.test("a pair of one name costs 11 requests and at most two nonces, each order asked for once at each step", async () => {
  await using bed = await testBed({ domains: NAME, ca: { processingMs: 5 } });
  const { directory, newNonce, newAccount, ...rest } = counts((await bed.run(punctual(bed))).requests);
  assert.deepEqual([directory, newAccount, newNonce! <= 2], [1, 1, true]);
  assert.deepEqual(rest, { newOrder: 2, authz: 1, challenge: 1, order: 1 + 2, finalize: 2, certificate: 2 });
});

Deno.test("a line of 100 names costs 2 requests a name beside those of one name, 20 of them at once", async () => {
  await using bed = await testBed({ domains: names(100).join(" "), ca: { processingMs: 5 } });
  const { requests, code, stderr } = await bed.run(punctual(bed));
  assert.equal(code, 0, stderr);
  const { directory, newNonce, newAccount, ...rest } = counts(requests);
  assert.deepEqual([directory, newAccount, newNonce! <= 20], [1, 1, true]);
  assert.deepEqual(rest, {
    newOrder: 2,
    authz: 100,
    challenge: 100,
    order: 1 + 2,
    finalize: 2,
    certificate: 2,
  });
});

Deno.test("a line of 100 names, both key types, takes seconds though each answer takes 150 ms", async () => {
  await using bed = await testBed({ domains: names(100).join(" "), settings: "keyTypes: rsa ec" });
  const { fetch } = bed.world();
  const begun = performance.now();
  const ran = await bed.run({
    fetch: async (url, init) => {
      const response = await fetch(url, init);
      await delay(150);
      return response;
    },
  });
  assert.equal(ran.code, 0, ran.stderr);
  assert(performance.now() - begun < 8000, `${performance.now() - begun} ms`);
});

Deno.test("many lines share directory, account and connection, and nonces", async () => {
  await using bed = await testBed({ domains: names(12).join("\n"), settings: "keyTypes: ec" });
  const { requests, code } = await bed.run({ parallel: 4 });
  assert.equal(code, 0);
  const { directory, newNonce, newAccount } = counts(requests);
  assert.deepEqual([directory, newAccount, newNonce! <= 4], [1, 1, true]);
  assert.equal(new Set(requests.map(({ connection }) => connection)).size, 1);
  assert.equal(bed.ca.issued.length, 12);
});

Deno.test("a later run asks for no account, and for no validation of names that the CA remembers", async () => {
  await using bed = await testBed({ domains: NAME, settings: "keyTypes: ec" });
  const prepared = join(bed.home, "prepared");
  bed.configure({ actions: `[default]\nprepare: ["touch ${prepared}; exec cat"]` });
  await bed.run({
    async route() {
      await until("prepare has run", () => existsSync(prepared));
      return [{ address: "127.0.0.1", port: bed.web.port }];
    },
  });
  await Deno.remove(prepared);
  await Deno.remove(bed.path(CERT));
  const { requests, code } = await bed.run();
  assert.equal(code, 0);
  assert.deepEqual(counts(requests), { directory: 1, newNonce: 1, newOrder: 1, finalize: 1, certificate: 1 });
  assert(!existsSync(prepared));
});

// ---- key types ---------------------------------------------------------------------------------------------------

Deno.test("RSA and EC of a line share one validation of each name", async () => {
  await using bed = await testBed({ domains: `${NAME} www mail` });
  await bed.run();
  assert.deepEqual(bed.ca.issued.map(({ keyType }) => keyType).sort(), ["ec", "rsa"]);
  assert.equal(bed.ca.validations.length, 3);
  assert.equal(bed.web.log.length, 3);
});

Deno.test("RSA and EC are both issued by a CA that wants each order validated", async () => {
  await using bed = await testBed({ domains: NAME, ca: { reuse: "none" } });
  assert.equal((await bed.run()).code, 0);
  assert.equal(bed.ca.validations.length, 2);
  assert.deepEqual(bed.dropped(), []);
});

Deno.test("the second key type is not asked for where the first could not be validated, and the error is reported once", async () => {
  const resolve = () => {
    throw new Error("NXDOMAIN");
  };
  await using bed = await testBed({ domains: NAME, ca: { resolve } });
  const ran = await bed.run();
  assert.equal(ran.code, 1);
  assert.equal(counts(ran.requests).newOrder, 1);
  assert.deepEqual(failures(ran), [`${NAME}: cannot look up ${NAME}: NXDOMAIN (dns)`]);
  assert.match(ran.stderr, /^FAILED +example\.com \((rsa, ec|ec, rsa)\)\n/);
});

Deno.test("the second key type is issued though the first is refused after validation", async () => {
  await using bed = await testBed({
    domains: NAME,
    ca: { fault: befalling("finalize", refusing(400, "badCSR", "no RSA today")) },
  });
  const ran = await bed.run();
  assert.deepEqual([failures(ran), ran.code], [["no RSA today (badCSR)"], 1]);
  assert.equal(bed.ca.issued.length, 1);
});

Deno.test("a line that fails leaves the others alone", async () => {
  const resolve = (hostname: string) => {
    if (hostname === "bad.example.com") throw new Error("NXDOMAIN");
    return { hostname: "127.0.0.1", port: bed.web.port };
  };
  await using bed = await testBed({
    domains: "good.example.com\nbad.example.com\nbetter.example.com bad.example.com\nbest.example.com",
    settings: "keyTypes: ec",
    ca: { resolve },
  });
  const ran = await bed.run();
  assert.equal(ran.code, 1);
  assert.deepEqual(bed.ca.issued.map(({ names }) => names.join()).sort(), [
    "best.example.com",
    "good.example.com",
  ]);
  assert.equal(failures(ran).length, 2);
  assert.deepEqual(bed.dropped(), []);
});

// ---- keys --------------------------------------------------------------------------------------------------------

/** Has every certificate of the bed issued anew. */
async function reissue(bed: Bed): Promise<Ran> {
  for (const { name } of Deno.readDirSync(bed.path("test/cert"))) {
    Deno.removeSync(bed.path("test/cert", name));
  }
  return await bed.run({ retry: true });
}

Deno.test("a key is used again where it is of the wanted kind, and alwaysGenerateNewKeys does not say otherwise", async () => {
  await using bed = await oneCertificate();
  await bed.run();
  const first = bed.text(KEY);
  await reissue(bed);
  assert.equal(bed.text(KEY), first);
  bed.configure({ settings: "keyTypes: ec\nalwaysGenerateNewKeys: yes" });
  await reissue(bed);
  const second = bed.text(KEY);
  assert.notEqual(second, first);
  bed.configure({ settings: "keyTypes: ec\ncurve: secp384r1\ncurveTag: prime256v1" });
  await reissue(bed);
  assert.equal(createPrivateKey(bed.text(KEY)).asymmetricKeyDetails?.namedCurve, "secp384r1");
  const ec = createPrivateKey(bed.text(KEY)).export({ type: "pkcs8", format: "pem" });
  bed.configure({ settings: "keyTypes: rsa" });
  const rsa = bed.path(`test/key/${NAME}-key.rsa2048.test.pem`);
  await Deno.writeTextFile(rsa, ec as string);
  await bed.run();
  assert.equal(
    createPrivateKey(Deno.readTextFileSync(rsa)).asymmetricKeyType,
    "rsa",
    "whatever stood in its place",
  );
});

Deno.test("an RSA key that cannot be read stops no EC certificate", async () => {
  await using bed = await testBed({ domains: NAME });
  await Deno.mkdir(bed.path(`test/key/${NAME}-key.rsa2048.test.pem`), { recursive: true });
  const ran = await bed.run();
  assert.deepEqual([ran.code, bed.ca.issued.map(({ keyType }) => keyType)], [1, ["ec"]]);
  assert.match(failures(ran)[0]!, /EISDIR|Is a directory/);
});

for (const type of ["badPublicKey", "badCSR"]) {
  Deno.test(`a key that the CA refuses (${type}) is replaced, and never used again`, async () => {
    await using bed = await oneCertificate();
    await bed.run();
    const blocked = bed.text(KEY);
    bed.ca.switches.fault = befalling("finalize", refusing(400, type, "the key is on a list of weak keys"));
    assert.equal((await reissue(bed)).code, 0);
    const second = bed.text(KEY);
    assert.deepEqual([second !== blocked, bed.ca.orders.length], [true, 2]);
    await Deno.writeTextFile(bed.path(KEY), blocked);
    await reissue(bed);
    assert(![blocked, second].includes(bed.text(KEY)));
  });
}

Deno.test("a CSR that the CA refuses under any key costs the key nothing", async () => {
  await using bed = await oneCertificate();
  await bed.run();
  const key = bed.text(KEY);
  bed.ca.switches.fault = befalling("finalize", refusing(400, "badCSR", "not on a Friday"), Infinity);
  assert.deepEqual(failures(await reissue(bed)), ["not on a Friday (badCSR)"]);
  bed.ca.switches.fault = undefined;
  await reissue(bed);
  assert.equal(bed.text(KEY), key);
});

// ---- orders that the CA does not finish --------------------------------------------------------------------------

/** The orders that are remembered, and whether the key of one stands beside the live one. */
function unfinished(bed: Bed): [orders: number, key: boolean] {
  return [
    Object.keys(JSON.parse(bed.text("test/state.json")).orders).length,
    existsSync(bed.path(PENDING_KEY)),
  ];
}

for (const [what, settings] of [["a new key", "alwaysGenerateNewKeys: yes"], ["the live key", ""]] as const) {
  Deno.test(`an order that the CA has not finished in time is taken up by the next run, under ${what}`, async () => {
    await using bed = await testBed({ domains: NAME, settings: `keyTypes: ec\n${settings}` });
    await bed.run();
    const live = bed.text(KEY);
    bed.ca.switches.processingMs = Infinity;
    const slow = await bed.run({ named: { renew: [NAME] } });
    assert.deepEqual(failures(slow), ["order still processing after 180 s; the next run goes on with it"]);
    assert.deepEqual([unfinished(bed), bed.text(KEY)], [[1, settings !== ""], live]);

    const order = bed.ca.orders.at(-1)!;
    order.doneAt = 0;
    const { code, requests, stderr } = await bed.run({ named: { renew: [NAME] } });
    assert.deepEqual([code, stderr], [0, ""]);
    assert.deepEqual(counts(requests), { directory: 1, newNonce: 1, order: 1, certificate: 1 });
    assert.deepEqual([unfinished(bed), bed.ca.orders.length], [[0, false], 2]);
    assert.equal(new X509Certificate(bed.text(CERT)).serialNumber, bed.ca.issued[1]!.serial);
    assert.equal(bed.text(KEY) === live, settings === "");
  });
}

Deno.test("what was issued and could not be fetched is fetched by the next run", async () => {
  for (
    const fault of [refusing(404, "malformed", "gone"), refusing(500, "serverInternal", "oh"), {
      kind: "reset",
    }]
  ) {
    await using bed = await oneCertificate({ fault: befalling("certificate", fault as Fault, Infinity) });
    assert.equal((await bed.run()).code, 1);
    assert.deepEqual(unfinished(bed), [1, true]);
    bed.ca.switches.fault = undefined;
    assert.equal((await bed.run({ retry: true })).code, 0);
    assert.deepEqual([unfinished(bed), bed.ca.issued.length], [[0, false], 1]);
  }
});

Deno.test("an order that was interrupted while the CA was at it is taken up by the next run", async () => {
  const stop = new AbortController();
  await using bed = await oneCertificate({ processingMs: Infinity });
  bed.ca.switches.fault = ({ resource }) => {
    if (resource === "finalize") {
      setTimeout(() => stop.abort(new DOMException("interrupted", "AbortError")), 50);
    }
    return undefined;
  };
  await assert.rejects(bed.run({ signal: stop.signal }), { name: "AbortError" });
  assert.deepEqual(unfinished(bed), [1, true]);
  bed.ca.orders[0]!.doneAt = 0;
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual([unfinished(bed), bed.ca.orders.length], [[0, false], 1]);
});

Deno.test("an order is given up where the CA does, where it is a week old, or where its key or account is lost", async () => {
  const table: [string, (bed: Bed) => void | Promise<void>][] = [
    ["the CA calls it invalid", ({ ca }) => {
      ca.orders[0]!.status = "invalid";
    }],
    ["the CA knows nothing of it", ({ ca }) => {
      const gone = refusing(404, "malformed", "no such order");
      ca.switches.fault = ({ url }) => url === ca.orders[0]!.url ? gone : undefined;
    }],
    ["it is a week old", ({ ca }) => ca.advance(8 * DAY)],
    ["its key is lost", (bed) => Deno.remove(bed.path(PENDING_KEY))],
    ["its account is another's", (bed) => Deno.remove(bed.path("account.key.test"))],
  ];
  for (const [what, lose] of table) {
    await using bed = await oneCertificate({ processingMs: Infinity });
    await bed.run();
    bed.ca.switches.processingMs = 0;
    bed.ca.orders[0]!.doneAt = 0;
    await lose(bed);
    const ran = await bed.run({ retry: true });
    assert.equal(ran.code, 0, `${what}: ${ran.stderr}`);
    assert.deepEqual([bed.ca.orders.length, unfinished(bed)], [2, [0, false]], what);
  }
});

Deno.test("a certificate that cannot be put in its place is not ordered again, but fetched again", async () => {
  await using bed = await oneCertificate();
  await Deno.mkdir(bed.path(CERT, "x"), { recursive: true });
  const codes = [(await bed.run()).code, (await bed.run()).code, (await bed.run({ retry: true })).code];
  assert.deepEqual([codes, bed.ca.issued.length], [[1, 1, 1], 1]);
  await Deno.remove(bed.path(CERT), { recursive: true });
  assert.deepEqual([(await bed.run({ retry: true })).code, bed.ca.issued.length], [0, 1]);
  assert.equal(new X509Certificate(bed.text(CERT)).serialNumber, bed.ca.issued[0]!.serial);
});

// ---- validations that fail ---------------------------------------------------------------------------------------

const lost = () => {
  throw new Error("NXDOMAIN");
};
for (const failure of ["order", "authorization", "challenge"] as const) {
  Deno.test(`a validation that fails is known soon, with its cause, where the CA shows it in the ${failure}`, async () => {
    await using bed = await oneCertificate({ resolve: lost, failure }, `${NAME} www`);
    const begun = bed.ca.now.getTime();
    const ran = await bed.run();
    const all = [`${NAME}`, `www.${NAME}`].map((name) => `${name}: cannot look up ${name}: NXDOMAIN (dns)`);
    assert.deepEqual([ran.code, failures(ran)], [1, [all.join("; ")]]);
    const seconds = (bed.ca.now.getTime() - begun) / 1000;
    assert(seconds < { order: 5, authorization: 15, challenge: 60 }[failure], `${seconds} s`);
    assert.deepEqual(bed.dropped(), []);
  });
}

Deno.test("a challenge that the CA has found wrong and left pending is responded to again, until it is right", async () => {
  let misses = 3;
  const resolve = (name: string) =>
    misses-- > 0 ? lost() : { hostname: "127.0.0.1", port: bed.web.port, name };
  await using bed: Bed = await oneCertificate({ resolve, failure: "challenge" });
  const { code, requests } = await bed.run();
  assert.deepEqual([code, counts(requests).challenge], [0, 4]);
});

Deno.test("an order that stays pending is given up after three minutes, with what is known of its challenges", async () => {
  await using bed = await oneCertificate({ validationDelayMs: 600_000 });
  assert.deepEqual(failures(await bed.run()), ["order still pending after 180 s"]);
  assert.deepEqual([bed.dropped(), unfinished(bed)], [[], [0, false]]);
});

// ---- refusals ----------------------------------------------------------------------------------------------------

const SUBPROBLEMS = ["a.example.com", "b.example.com"].map((value) => ({
  type: "urn:ietf:params:acme:error:caa",
  detail: `forbidden by the CAA of ${value}`,
  identifier: { type: "dns", value },
}));
const SAID = "a.example.com: forbidden by the CAA of a.example.com (caa); " +
  "b.example.com: forbidden by the CAA of b.example.com (caa)";
const invalid = (body: Record<string, unknown>) => ({
  ...body,
  status: "invalid",
  error: { type: "urn:ietf:params:acme:error:compound", detail: "two names", subproblems: SUBPROBLEMS },
});
const refused = refusing(403, "compound", "two names", { subproblems: SUBPROBLEMS });
const put = (more: Record<string, unknown>): Fault => ({
  kind: "rewrite",
  rewrite: (body) => ({ ...body, ...more }),
});

Deno.test("an order that a replica took for finalized, and that is ready still, is finalized again", async () => {
  const lies: [Resource, Fault][] = [
    ["finalize", refusing(403, "orderNotReady", "a replica lags")],
    ["order", { kind: "rewrite", rewrite: (body) => ({ ...body, status: "processing" }) }],
  ];
  let ready = false;
  await using bed = await oneCertificate({
    fault: ({ resource }) => {
      ready ||= resource === "finalize";
      return ready && lies[0]?.[0] === resource ? lies.shift()![1] : undefined;
    },
  });
  const { code, stderr, requests } = await bed.run();
  assert.deepEqual([code, stderr, lies.length], [0, "", 0]);
  assert.equal(counts(requests).finalize, 2);
});

/** The fault, for polls of an order that has been finalized. */
function onceFinalized(fault: Fault): Switches["fault"] {
  let finalized = false;
  return ({ resource }) => {
    finalized ||= resource === "finalize";
    return finalized && resource === "order" ? fault : undefined;
  };
}

/** The fault, for finalize and what follows it. */
function finalizedThen(fault: Fault): Switches["fault"] {
  const polls = onceFinalized(fault)!;
  return (exchange) => polls(exchange) ?? (exchange.resource === "finalize" ? fault : undefined);
}

for (
  const [what, ca, step, message] of [
    [
      "created",
      { fault: befalling("newOrder", refused) },
      "create an order",
      `two names (compound); ${SAID}`,
    ],
    [
      "created, and born invalid",
      { fault: befalling("newOrder", { kind: "rewrite", rewrite: invalid }) },
      "issue the order",
      `two names (compound); ${SAID}`,
    ],
    [
      "validated",
      {
        resolve() {
          throw new Error("SERVFAIL");
        },
      },
      "validate the order",
      "a.example.com: cannot look up a.example.com: SERVFAIL (dns); " +
      "b.example.com: cannot look up b.example.com: SERVFAIL (dns)",
    ],
    [
      "validated, for a reason that is not a challenge's",
      { fault: befalling("order", { kind: "rewrite", rewrite: invalid }) },
      "validate the order",
      `two names (compound); ${SAID}`,
    ],
    [
      "validated, for no reason",
      { fault: befalling("order", put({ status: "invalid" })) },
      "validate the order",
      "the order became invalid, and the CA gives no reason",
    ],
    [
      "finalized",
      { fault: befalling("finalize", refused) },
      "finalize the order",
      `two names (compound); ${SAID}`,
    ],
    [
      "finalized, and invalid then",
      { fault: befalling("finalize", { kind: "rewrite", rewrite: invalid }) },
      "issue the order",
      `two names (compound); ${SAID}`,
    ],
    [
      "finalized, and ready still",
      { fault: finalizedThen(put({ status: "ready", certificate: undefined })) },
      "issue the order",
      "order still ready after 180 s; the next run goes on with it",
    ],
    [
      "issued",
      {
        processingMs: 20,
        fault: onceFinalized({ kind: "rewrite", rewrite: invalid }),
      },
      "issue the order",
      `two names (compound); ${SAID}`,
    ],
    [
      "downloaded",
      { fault: befalling("certificate", refusing(404, "malformed", "gone"), Infinity) },
      "download the certificate",
      "gone (malformed)",
    ],
  ] as [string, Switches, string, string][]
) {
  Deno.test(`an order that cannot be ${what} fails with what the CA says of it, and leaves nothing behind`, async () => {
    await using bed = await oneCertificate(ca, "a.example.com b.example.com");
    const ran = await bed.run();
    assert.equal(ran.code, 1);
    const [event] = ran.events.filter((event) => event.kind === "failed");
    assert.equal(event?.error.message, message);
    assert.equal((event.error as Error & { step: string }).step, step);
    assert(ran.stderr.includes(`cannot ${step}: ${message}`), ran.stderr);
    assert.deepEqual(bed.dropped(), []);
  });
}

Deno.test("names that the CA's policy rejects are reported, each with its reason", async () => {
  const reject = (name: string) => name.startsWith("www.") ? "high-risk name" : undefined;
  await using bed = await oneCertificate({ reject }, `${NAME} www www.test`);
  const [message] = failures(await bed.run());
  assert.match(message!, /www\.example\.com: high-risk name \(rejectedIdentifier\)/);
  assert.match(message!, /www\.test: high-risk name \(rejectedIdentifier\)/);
});

for (const status of ["invalid", "deactivated", "expired", "revoked"]) {
  Deno.test(`an authorization that comes ${status} is an error that names it`, async () => {
    await using bed = await oneCertificate({ fault: befalling("authz", put({ status })) });
    assert.deepEqual(failures(await bed.run()), [`the authorization of ${NAME} is ${status}`]);
    assert.equal(counts(bed.ca.log).challenge, undefined);
  });
}

for (
  const [what, more, message] of [
    [
      "another name",
      { identifier: { type: "dns", value: "bank.example" } },
      "the CA asks for bank.example, which",
    ],
    ["the wildcard of the name", { wildcard: true }, `the CA asks for *.${NAME}, which was not ordered`],
    [
      "a name with escapes",
      { identifier: { type: "dns", value: "\x1b[2Jx\n" } },
      "the CA asks for [2jx, which",
    ],
    ["no name", { identifier: null }, "not an authorization"],
    ["an unknown status", { status: "enlightened" }, "not an authorization"],
  ] as const
) {
  Deno.test(`an authorization for ${what} is not answered`, async () => {
    await using bed = await oneCertificate({ fault: befalling("authz", put(more)) });
    const [said] = failures(await bed.run());
    assert(said?.startsWith(message), said);
    assert.equal(counts(bed.ca.log).challenge, undefined);
    assert.deepEqual(bed.dropped(), []);
  });
}

Deno.test("an authorization whose name is written in capitals is the ordered one", async () => {
  await using bed = await oneCertificate({
    fault: befalling("authz", put({ identifier: { type: "dns", value: "Example.COM" } })),
  });
  assert.equal((await bed.run()).code, 0);
});

// ---- certificates that are not what was asked for ----------------------------------------------------------------

Deno.test("a certificate that is not what was asked for is not taken, and the old one and its key stay", async () => {
  await using bed = await testBed({
    domains: NAME,
    settings: "keyTypes: ec",
    ca: { fault: () => undefined },
  });
  const { ca } = bed;
  await bed.run();
  const publicKey = createPublicKey(createPrivateKey(bed.text(KEY)));
  const identifiers = [{ type: "dns", value: NAME } as const];
  const valid = () => ({
    notBefore: new Date(ca.now.getTime() - DAY),
    notAfter: new Date(ca.now.getTime() + 90 * DAY),
  });
  const stranger = () => generateKeyPairSync("ec", { namedCurve: "P-256" }).publicKey;

  const table: [string, (chain: string) => string, RegExp][] = [
    [
      "another key",
      () => ca.forge({ publicKey: stranger(), identifiers, ...valid() }),
      /^the certificate is for another key$/,
    ],
    [
      "other names",
      () => ca.forge({ publicKey, identifiers: [{ type: "dns", value: "bank.example" }], ...valid() }),
      /^the certificate is for other names: bank\.example$/,
    ],
    [
      "a name too many",
      () =>
        ca.forge({
          publicKey,
          identifiers: [...identifiers, { type: "dns", value: "bank.example" }],
          ...valid(),
        }),
      /^the certificate is for other names: example\.com bank\.example$/,
    ],
    [
      "one that is an authority",
      () => ca.forge({ publicKey, identifiers, ...valid(), authority: true }),
      /^the certificate is a CA certificate$/,
    ],
    [
      "thirty seconds of life",
      () => ca.forge({ publicKey, identifiers, ...valid(), notAfter: new Date(ca.now.getTime() + 30_000) }),
      /in less than 5 minutes; this host's clock says \S+, the CA's \S+$/,
    ],
    [
      "a chain without end",
      (chain) => chain + chain.replace(/^[^]*?(?<=END CERTIFICATE-----\n)/, "").repeat(20),
      /^a chain of 22 certificates$/,
    ],
    [
      "an expired one",
      () => ca.forge({ publicKey, identifiers, ...valid(), notAfter: new Date(ca.now.getTime() - 1000) }),
      /^the certificate expired at /,
    ],
    [
      "one of next week",
      () => ca.forge({ publicKey, identifiers, ...valid(), notBefore: new Date(ca.now.getTime() + 7 * DAY) }),
      /^the certificate is not valid before /,
    ],
    [
      "a broken chain",
      (chain) => chain.replace(/(?<=END CERTIFICATE-----\n)[^]*/, ca.caBundle),
      /^broken chain: /,
    ],
    [
      "a chain the wrong way round",
      (chain) => chain.split(/(?<=END CERTIFICATE-----\n)/).reverse().join(""),
      /another key/,
    ],
    [
      "a private key before it",
      (chain) =>
        generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey
          .export({ type: "pkcs8", format: "pem" }) + chain,
      /^a PRIVATE KEY among the certificates$/,
    ],
    ["half a certificate", (chain) => chain.slice(0, chain.length / 4), /^no certificate in the answer$/],
    [
      "no certificate",
      () => "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
      /^a certificate that cannot be parsed$/,
    ],
    ["an empty answer", () => "", /^no certificate in the answer$/],
    ["shell text", () => "$(touch /tmp/owned); `id`\x1b[2J", /^no certificate in the answer$/],
    ["megabytes", (chain) => chain.repeat(1000), /^an answer of more than 1048576 bytes$/],
  ];
  for (const [what, rewrite, message] of table) {
    const before = [bed.text(CERT), bed.text(KEY)];
    ca.advance(80 * DAY);
    ca.switches.fault = befalling("certificate", { kind: "rewrite text", rewrite });
    const ran = await bed.run({ retry: true });
    assert.equal(ran.code, 1, what);
    assert.match(failures(ran)[0]!, message, what);
    assert.deepEqual([bed.text(CERT), bed.text(KEY)], before, what);

    ca.switches.fault = undefined;
    assert.equal((await bed.run({ retry: true })).code, 0, what);
    assert.notEqual(bed.text(CERT), before[0]);
    assert.equal(new X509Certificate(bed.text(CERT)).serialNumber, ca.issued.at(-1)!.serial);
  }
});

Deno.test("a chain that holds no issuer is taken, since that may be a root, and is said", async () => {
  await using bed = await oneCertificate({
    fault: befalling("certificate", {
      kind: "rewrite text",
      rewrite: (chain) => chain.slice(0, chain.indexOf("-----END") + 26),
    }),
  });
  const { code, stdout } = await bed.run();
  assert.equal(code, 0);
  assert.match(stdout, /no certificate of an issuer for example\.com; clients may miss it/);
});

// ---- faults ------------------------------------------------------------------------------------------------------

const STEPS: readonly Resource[] = [
  "directory",
  "newNonce",
  "newAccount",
  "newOrder",
  "authz",
  "challenge",
  "order",
  "finalize",
  "certificate",
];
for (const kind of ["reset", "reset mid-body", "truncate", "html", "repeat"] as const) {
  Deno.test(`after one fault (${kind}) at any step, and one run without, the certificate is there`, async () => {
    await using bed = await oneCertificate();
    for (const [i, step] of STEPS.entries()) {
      bed.configure({ domains: `n${i}.example.com` });
      bed.ca.switches.fault = befalling(step, { kind });
      const first = await bed.run();
      assert(first.code === 0 || !kind.startsWith("reset"), `${step}: ${first.stderr}`);
      assert.deepEqual(bed.dropped(), [], step);
      bed.ca.switches.fault = undefined;
      const second = await bed.run({ retry: true });
      assert.equal(second.code, 0, `${step}: ${second.stderr}`);
      assert.equal(bed.ca.issued.at(-1)!.names[0], `n${i}.example.com`);
      await Deno.remove(bed.path("test"), { recursive: true });
    }
    assert(bed.ca.orders.length <= 2 * STEPS.length, "more orders than necessary plus one a line");
  });
}
