/** Goal: the conversation with a CA, right with a good one, patient with a bad day, on guard against a hostile one. */

import assert from "node:assert/strict";
import { generateKeyPairSync, type KeyObject } from "node:crypto";
import { join } from "node:path";
import {
  AcmeClient,
  AcmeError,
  describe,
  importAccountKey,
  keyAuthorization,
  type Order,
  parseRetryAfter,
  type Registration,
} from "../lib/acme.ts";
import { oneLine } from "../lib/text.ts";
import { createCsr } from "../lib/x509.ts";
import { type Bed, befalling, refusing, testBed, type TestWorld } from "./bed.ts";
import type { Exchange, Fault, Switches } from "./ca.ts";

const ecKey = (namedCurve: string) => generateKeyPairSync("ec", { namedCurve }).privateKey;
const pem = (key: KeyObject, type: "pkcs8" | "pkcs1" | "sec1" = "pkcs8") =>
  key.export({ type, format: "pem" }).toString();

const ACCOUNT = await importAccountKey(pem(ecKey("P-256")));
const CERTIFICATE_KEY = pem(ecKey("P-256"));
const NAME = "example.com";

/** A CA whose faults can be set as a test goes on. */
function faultyBed(ca: Switches = {}): Promise<Bed> {
  return testBed({ ca: { fault: () => undefined, ...ca } });
}

/** Opens a conversation; `more` are parts of the registration and of the world. */
async function connect(bed: Bed, more: Partial<Registration & TestWorld> = {}): Promise<AcmeClient> {
  const { known, contact = [], ...world } = more;
  return await AcmeClient.connect(
    bed.ca.directoryUrl,
    ACCOUNT,
    { known, contact },
    bed.world(world),
  );
}

/** Answers the challenges of an order by hand. */
async function answer(bed: Bed, client: AcmeClient, order: Order): Promise<void> {
  for (const url of order.authorizations) {
    const authorization = await client.getAuthorization(url);
    const challenge = authorization.challenges.find(({ type }) => type === "http-01")!;
    Deno.writeTextFileSync(join(bed.drop, challenge.token), keyAuthorization(challenge.token, client.key));
    await client.respondToChallenge(authorization, challenge);
  }
}

/** The whole way to a chain of certificates. */
async function obtain(bed: Bed, client: AcmeClient, name = NAME): Promise<string> {
  let order = await client.newOrder([name]);
  if (order.status === "pending") {
    await answer(bed, client, order);
    order = await client.awaitValidation(order);
  }
  order = await client.finalizeOrder(order, (await createCsr(CERTIFICATE_KEY, [name])).der);
  for await (const chain of client.downloadChains(order)) return chain;
  assert.fail("no chain");
}

/** The AcmeError with which `promise` must end. */
async function failure(promise: Promise<unknown>): Promise<AcmeError> {
  const error = await promise.then(() => assert.fail("succeeded"), (error) => error);
  assert(error instanceof AcmeError, error);
  return error;
}

const requests = ({ ca }: Bed, resource: Exchange["resource"]) =>
  ca.log.filter((entry) => entry.resource === resource).length;

// ---- keys --------------------------------------------------------------------------------------------------------

const RSA = generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey;
for (
  const [what, alg, text] of [
    ["RSA in PKCS#8", "RS256", pem(RSA)],
    ["RSA in PKCS#1", "RS256", pem(RSA, "pkcs1")],
    ["P-256 in PKCS#8", "ES256", pem(ecKey("P-256"))],
    ["P-256 in SEC1", "ES256", pem(ecKey("P-256"), "sec1")],
    ["P-384 in PKCS#8", "ES384", pem(ecKey("P-384"))],
    ["P-384 in SEC1", "ES384", pem(ecKey("P-384"), "sec1")],
    ["P-521 in PKCS#8", "ES512", pem(ecKey("P-521"))],
    ["P-521 in SEC1", "ES512", pem(ecKey("P-521"), "sec1")],
  ] as const
) {
  Deno.test(`an account key can be ${what}, and signs with ${alg}`, async () => {
    await using bed = await testBed({});
    const key = await importAccountKey(text);
    assert.equal(key.alg, alg);
    const registration = { contact: ["mailto:ops@example.com"] };
    const client = await AcmeClient.connect(bed.ca.directoryUrl, key, registration, bed.world());
    assert.equal((await client.newOrder([NAME])).status, "pending");
    assert.equal(bed.ca.accounts[0]!.key.thumbprint, key.thumbprint);
    assert.deepEqual(bed.ca.accounts[0]!.contact, ["mailto:ops@example.com"]);
  });
}

Deno.test("importAccountKey() throws where there is no key that ACME can use, and never shows it", async () => {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");
  const ec = ecKey("P-256");
  for (
    const text of [
      "",
      "no key",
      pem(privateKey),
      publicKey.export({ type: "spki", format: "pem" }).toString(),
      pem(ec).replace(/\n.{20}/, "\n"),
      ec.export({ type: "pkcs8", format: "pem", cipher: "aes-256-cbc", passphrase: "x" }).toString(),
    ]
  ) {
    await assert.rejects(
      importAccountKey(text),
      (error: Error) => !error.message.includes(text.slice(30, 60) || "?"),
    );
  }
});

// ---- requests ----------------------------------------------------------------------------------------------------

Deno.test("an account whose URL is remembered costs no request, a new one costs one however many ask", async () => {
  await using bed = await testBed({});
  const first = await connect(bed);
  first.concurrency = 5;
  const urls = await Promise.all(Array.from({ length: 5 }, () => first.account()));
  await Promise.all(
    ["a.example.com", "b.example.com", "c.example.com"].map((name) => first.newOrder([name])),
  );
  assert.deepEqual(new Set(urls), new Set([bed.ca.accounts[0]!.url]));
  const again = await connect(bed, { known: { url: urls[0]!, contact: [] } });
  await again.newOrder([NAME]);
  assert.equal(requests(bed, "newAccount"), 1);
});

Deno.test("an account that the CA has forgotten is registered anew, once, though many requests meet its loss", async () => {
  await using bed = await testBed({});
  const lost = `${bed.ca.origin}/account/99`;
  const client = await connect(bed, { known: { url: lost, contact: [] } });
  client.concurrency = 5;
  const names = ["a.example.com", "b.example.com", "c.example.com", "d.example.com", "e.example.com"];
  await Promise.all(names.map((name) => client.newOrder([name])));
  assert.equal(await client.account(), bed.ca.accounts[0]!.url);
  assert.equal(requests(bed, "newAccount"), 1);
  const blamed = new Set(bed.ca.violations.splice(0).map(({ type }) => type));
  assert.deepEqual(blamed, new Set(["accountDoesNotExist"])); // asking under the remembered URL is how it is noticed
});

Deno.test("an account whose contact has changed is told to the CA, whatever happens to the first try", async () => {
  await using bed = await faultyBed();
  const { ca } = bed;
  const url = await (await connect(bed, { contact: ["mailto:old@example.com"] })).account();
  const known = { url, contact: ["mailto:old@example.com"] };
  for (const [i, fault] of [undefined, { kind: "badNonce" }, { kind: "reset" }].entries()) {
    const contact = [`mailto:new${i}@example.com`];
    ca.switches.fault = fault && befalling("account", fault as Fault);
    const client = await connect(bed, { known, contact });
    assert.equal((await client.newOrder([NAME])).status, "pending");
    assert.deepEqual(ca.accounts.map(({ contact }) => contact), [contact]);
  }
  assert.equal(requests(bed, "newAccount"), 1);
});

Deno.test("an account that the CA has forgotten and whose contact has changed is registered with the new one", async () => {
  await using bed = await testBed({});
  const known = { url: `${bed.ca.origin}/account/99`, contact: [] };
  const client = await connect(bed, { known, contact: ["mailto:new@example.com"] });
  assert.equal(await client.account(), bed.ca.accounts[0]?.url);
  assert.deepEqual(bed.ca.accounts[0]!.contact, ["mailto:new@example.com"]);
  assert.deepEqual(bed.ca.violations.splice(0).map(({ type }) => type), ["accountDoesNotExist"]);
});

Deno.test("an account that is forgotten time and again ends in the CA's words, not in a loop", async () => {
  await using bed = await faultyBed();
  const url = await (await connect(bed)).account();
  const client = await connect(bed, { known: { url, contact: [] } });
  bed.ca.switches.fault = befalling(
    "newOrder",
    refusing(400, "accountDoesNotExist", "who are you?"),
    Infinity,
  );
  const error = await failure(client.newOrder([NAME]));
  assert.equal(error.message, "who are you? (accountDoesNotExist)");
  assert.deepEqual([requests(bed, "newAccount"), requests(bed, "newOrder")], [2, 2]);
});

for (
  const [what, refused, extra] of [
    [
      "every nonce is refused once",
      (() => {
        const seen = new Set<string>();
        return ({ url }: Exchange) => seen.size < seen.add(url).size;
      })(),
      6,
    ],
    ["every second request is refused", ({ n }: Exchange) => n % 2 === 0, 6],
    ["nonces are refused in a burst of 29", ({ n }: Exchange) => n >= 5 && n < 34, 29],
  ] as const
) {
  Deno.test(`a certificate is issued though ${what}`, async () => {
    await using bed = await testBed({
      ca: {
        fault: (exchange) =>
          exchange.method === "POST" && refused(exchange) ? { kind: "badNonce" } : undefined,
      },
    });
    const client = await connect(bed);
    assert.match(await obtain(bed, client), /^-----BEGIN CERTIFICATE-----/);
    assert.equal(requests(bed, "newNonce"), 1);
    assert(bed.ca.log.filter(({ status }) => status === 400).length >= extra);
    assert.equal(bed.waits.filter((ms) => ms > 100).length, 0, "bad nonces are not waited for");
  });
}

Deno.test("a nonce that is refused by a problem sent as application/json is one that is refused", async () => {
  const refused = { ...refusing(400, "badNonce", "again"), contentType: "application/json" } as Fault;
  await using bed = await testBed({ ca: { fault: befalling("newOrder", refused) } });
  assert.equal((await (await connect(bed)).newOrder([NAME])).status, "pending");
});

Deno.test("a CA that takes no nonce at all is asked 30 times, not for ever", async () => {
  await using bed = await testBed({ ca: { fault: befalling("newAccount", { kind: "badNonce" }, Infinity) } });
  const error = await failure((await connect(bed)).account());
  assert.equal(error.problem?.type, "badNonce");
  assert.equal(requests(bed, "newAccount"), 30);
});

Deno.test("answers without Replay-Nonce cost a request for a nonce each, and nothing else", async () => {
  await using bed = await testBed({
    ca: {
      fault: ({ method }) => method === "POST" ? { kind: "drop header", name: "replay-nonce" } : undefined,
    },
  });
  await obtain(bed, await connect(bed));
  assert.equal(requests(bed, "newNonce"), bed.ca.log.filter(({ method }) => method === "POST").length);
});

// ---- a bad day ---------------------------------------------------------------------------------------------------

/** With how often each may befall a request: a refusal takes the next connection along, and so costs two tries. */
const PASSING: readonly [string, Fault, number?][] = [
  ["a reset", { kind: "reset" }],
  ["a connection refused", { kind: "refuse" }, 1],
  ["an answer cut short", { kind: "reset mid-body" }],
  ["500", { kind: "status", status: 500 }],
  ["503 in HTML", { kind: "status", status: 503, contentType: "text/html", body: "<h1>busy</h1>" }],
  ["503 with Retry-After", refusing(503, "serverInternal", "busy", { headers: { "retry-after": "1" } })],
  ["429 with Retry-After", refusing(429, "rateLimited", "slow down", { headers: { "retry-after": "1" } })],
  ["a request that is handled and an answer that is lost", { kind: "after", fault: { kind: "reset" } }],
  ["a request that is handled and answered with 500", {
    kind: "after",
    fault: { kind: "status", status: 500 },
  }],
];
for (const [what, fault, most = 2] of PASSING) {
  Deno.test(`${what}, ${most === 1 ? "once" : "twice"} at every step, costs time alone`, async () => {
    await using bed = await faultyBed();
    const met = new Map<string, number>();
    bed.ca.switches.fault = ({ resource, method }) => {
      const times = met.get(resource) ?? 0;
      met.set(resource, times + 1);
      return times < (method === "HEAD" ? most - 1 : most) ? fault : undefined; // a nonce is part of its request
    };
    const chain = await obtain(bed, await connect(bed));
    assert.match(chain, /^-----BEGIN CERTIFICATE-----/);
    assert.deepEqual(
      [...met.keys()].sort(),
      [
        "authz",
        "certificate",
        "challenge",
        "directory",
        "finalize",
        "newAccount",
        "newNonce",
        "newOrder",
        "order",
      ],
    );
    assert.equal(bed.ca.issued.length, 1);
  });
}

Deno.test("pauses between tries grow threefold, and the fourth failure goes up", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed, { random: () => 0.5 });
  await client.account();
  bed.ca.switches.fault = befalling(
    "newOrder",
    { kind: "status", status: 500, contentType: "text/plain" },
    Infinity,
  );
  const error = await failure(client.newOrder([NAME]));
  assert.deepEqual([error.step, error.message], ["create an order", "HTTP status 500 (text/plain)"]);
  assert.deepEqual(bed.waits, [500, 1500, 4500]);
  assert.equal(requests(bed, "newOrder"), 4);
});

Deno.test("a CA that cannot be reached is an error that says why, after four tries", async () => {
  await using bed = await testBed({});
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const url = `https://127.0.0.1:${listener.addr.port}/dir`;
  listener.close();
  const registration = { contact: [] };
  const error = await failure(AcmeClient.connect(url, ACCOUNT, registration, bed.world()));
  assert.equal(error.step, "read the directory");
  assert.match(error.message, /Connection refused/);
  assert.equal(bed.waits.length, 3);
});

Deno.test("a CA that is silent is given up by the time-out, then asked again", async () => {
  await using bed = await faultyBed();
  const { fetch } = bed.world();
  let timeOut = new AbortController();
  const client = await connect(bed, {
    fetch(url, init) {
      timeOut = new AbortController();
      return fetch(url, { ...init, signal: AbortSignal.any([init.signal!, timeOut.signal]) });
    },
  });
  const silence = (times: number) => {
    const fault = befalling("newOrder", { kind: "silence" }, times);
    bed.ca.switches.fault = (exchange) => {
      const silent = fault(exchange);
      if (silent) timeOut.abort(new DOMException("no time left", "TimeoutError"));
      return silent;
    };
  };
  silence(2);
  assert.equal((await client.newOrder([NAME])).status, "pending");
  silence(4);
  const error = await failure(client.newOrder([NAME]));
  assert.deepEqual([error.step, error.message], ["create an order", "no answer within 30 s"]);
});

const NOW = new Date("2026-10-18T20:00:00Z");
for (
  const [value, seconds] of [
    ["120", 120],
    [" 7 ", 7],
    ["0", 1],
    ["86401", 86_400],
    ["99999999999999999999999", 86_400],
    ["9".repeat(400), 86_400],
    ["Sun, 18 Oct 2026 20:02:00 GMT", 120],
    ["Sun, 18 Oct 2026 19:00:00 GMT", 1],
    ["Sun, 18 Oct 2099 20:00:00 GMT", 86_400],
    ["soon", undefined],
    ["-5", undefined],
    ["1.5", undefined],
    ["", undefined],
    [undefined, undefined],
  ] as const
) {
  const meaning = seconds === undefined ? "nothing" : `${seconds} s`;
  Deno.test(`parseRetryAfter() takes ${JSON.stringify(value)?.slice(0, 40)} for ${meaning}`, () => {
    const headers = new Headers(value === undefined ? {} : { "retry-after": value });
    const at = parseRetryAfter(headers, NOW);
    assert.equal(at && (at.getTime() - NOW.getTime()) / 1000, seconds);
  });
}

for (
  const [header, heeded] of [
    ["2", true],
    [() => new Date(Date.now() + 10_000).toUTCString(), true],
    ["31", false],
    ["99999999999", false],
  ] as const
) {
  const value = typeof header === "string" ? header : "a date";
  Deno.test(`Retry-After: ${value} of a 503 is ${heeded ? "waited for" : "left to a later run"}`, async () => {
    await using bed = await faultyBed();
    const client = await connect(bed);
    await client.account();
    const headers = { "retry-after": typeof header === "string" ? header : header() };
    bed.ca.switches.fault = befalling("newOrder", refusing(503, "serverInternal", "busy", { headers }));
    const begun = bed.ca.now;
    if (heeded) {
      await client.newOrder([NAME]);
      const at = parseRetryAfter(new Headers(headers), begun)!;
      assert(bed.ca.now >= at, `asked again ${at.getTime() - bed.ca.now.getTime()} ms too soon`);
      assert.equal(bed.waits.length, 1);
    } else {
      const { retryAfter, message } = await failure(client.newOrder([NAME]));
      assert.equal(message, "busy (serverInternal)");
      const seconds = Math.round((retryAfter!.getTime() - begun.getTime()) / 1000);
      assert.equal(seconds, Math.min(Number(header), 86_400));
      assert.deepEqual(bed.waits, []);
    }
  });
}

const json = (body: string, headers = {}): Fault => ({
  kind: "status",
  status: 201,
  contentType: "application/json",
  headers,
  body,
});
for (
  const [what, fault, message] of [
    ["404", { kind: "status", status: 404, contentType: "text/html" }, /^HTTP status 404 \(text\/html\)$/],
    [
      "a problem that is cut short",
      { ...refusing(403, "unauthorized", "no"), body: '{"type":"ur' },
      /^HTTP status 403/,
    ],
    ["403", refusing(403, "unauthorized", "go away"), /^go away \(unauthorized\)$/],
    [
      "403 as plain JSON",
      { ...refusing(403, "unauthorized", "go away"), contentType: "application/json" },
      /^go away \(unauthorized\)$/,
    ],
    [
      "JSON that is no problem",
      { kind: "status", status: 403, contentType: "application/json", body: '{"message": "no"}' },
      /^HTTP status 403 \(application\/json\)$/,
    ],
    [
      "429 that does not say until when",
      refusing(429, "rateLimited", "too many"),
      /^too many \(rateLimited\)$/,
    ],
    [
      "429 in HTML",
      { kind: "status", status: 429, contentType: "text/html" },
      /^too many requests \(rateLimited\)$/,
    ],
    ["a redirect", { kind: "status", status: 302, headers: { location: "/dir" } }, /^HTTP status 302/],
    ["a page of a hotel", { kind: "html" }, /^not JSON but text\/html$/],
    ["JSON that is cut short", { kind: "truncate" }, /^broken JSON$/],
    ["JSON that is no order", { kind: "rewrite", rewrite: () => ({}) }, /^not an order$/],
    ["JSON that is no object", { kind: "rewrite", rewrite: () => 7 }, /^not a JSON object$/],
    ["an order without a URL", { kind: "drop header", name: "location" }, /^the answer has no Location$/],
    ["ten megabytes", json(`"${"x".repeat(10 << 20)}"`), /^an answer of more than 1048576 bytes$/],
  ] as [string, Fault, RegExp][]
) {
  Deno.test(`${what} for an answer is an error at once, and is not asked for again`, async () => {
    await using bed = await faultyBed();
    const client = await connect(bed);
    bed.ca.switches.fault = befalling("newOrder", fault, Infinity);
    const error = await failure(client.newOrder([NAME]));
    assert.equal(error.step, "create an order");
    assert.match(error.message, message);
    assert.deepEqual([requests(bed, "newOrder"), bed.waits], [1, []]);
  });
}

for (
  const [what, fault, message] of [
    ["HTML", { kind: "html" }, /^not JSON but text\/html$/],
    ["404", { kind: "status", status: 404, contentType: "text/plain" }, /^HTTP status 404 \(text\/plain\)$/],
    [
      "an array",
      { kind: "rewrite", rewrite: () => [] },
      /^not an ACME directory: no usable URL for newNonce$/,
    ],
    ["http URLs", {
      kind: "rewrite",
      rewrite: (body) => ({ ...body, newOrder: String(body.newOrder).replace("https", "http") }),
    }, /^not an ACME directory: no usable URL for newOrder$/],
  ] as [string, Fault, RegExp][]
) {
  Deno.test(`${what} for a directory is an error that says so`, async () => {
    await using bed = await testBed({ ca: { fault: befalling("directory", fault, Infinity) } });
    const error = await failure(connect(bed));
    assert.deepEqual([error.step, error.url], ["read the directory", bed.ca.directoryUrl]);
    assert.match(error.message, message);
    assert.equal(requests(bed, "directory"), 1);
  });
}

// ---- waiting -----------------------------------------------------------------------------------------------------

for (const retryAfterAsDate of [false, true]) {
  const form = retryAfterAsDate ? "a date" : "seconds";
  Deno.test(`an order is polled no sooner than Retry-After allows, validated and issued, given as ${form}`, async () => {
    // a poll that comes too soon is a violation; the first of the issuance heeds what finalize said
    await using bed = await testBed({
      ca: { retryAfterSeconds: 3, retryAfterAsDate, validationDelayMs: 50, processingMs: 100 },
    });
    await obtain(bed, await connect(bed));
    assert(bed.waits.filter((ms) => ms > 200 && ms <= 4000).length >= 3, `${bed.waits}`);
  });
}

Deno.test("polls without Retry-After come in growing pauses, and end after three minutes", async () => {
  await using bed = await testBed({ ca: { processingMs: Infinity } });
  const client = await connect(bed, { random: () => 0.5 });
  const begun = bed.ca.now;
  const error = await failure(obtain(bed, client));
  const elapsed = bed.ca.now.getTime() - begun.getTime();
  assert.equal(error.step, "issue the order");
  assert.equal(error.message, "still processing, and lematt waits no longer than 180 s");
  const waits = bed.waits.slice(bed.waits.lastIndexOf(20));
  assert.deepEqual(waits.slice(0, 7), [20, 60, 180, 540, 1620, 4860, 5000]);
  assert(waits.reduce((sum, ms) => sum + ms) <= 180_000);
  assert(elapsed > 175_000, `${elapsed} ms`);
});

Deno.test("an order that is to be asked for tomorrow is not waited for", async () => {
  await using bed = await testBed({ ca: { processingMs: Infinity, retryAfterSeconds: 90_000 } });
  const client = await connect(bed);
  const begun = bed.ca.now;
  const order = await client.newOrder([NAME]);
  await answer(bed, client, order);
  const error = await failure(
    client.awaitValidation(order).then((ready) =>
      createCsr(CERTIFICATE_KEY, [NAME]).then(({ der }) => client.finalizeOrder(ready, der))
    ),
  );
  assert.match(error.message, /^still (pending|processing), and lematt waits no longer/);
  assert.equal(Math.round((error.retryAfter!.getTime() - begun.getTime()) / 86_400_000), 1);
});

for (
  const [what, switches, fault] of [
    ["an order is polled", { processingMs: Infinity }, undefined],
    ["a try is awaited", {}, befalling("newOrder", { kind: "status", status: 500 }, Infinity)],
    ["an answer is awaited", {}, befalling("newOrder", { kind: "silence" })],
  ] as [string, Switches, Switches["fault"]][]
) {
  Deno.test(`the signal ends a conversation while ${what}`, async () => {
    await using bed = await faultyBed(switches);
    const stop = new AbortController();
    const reason = new DOMException("interrupted", "AbortError");
    // for this test only real waits, of which none may be sat out
    const client = await connect(bed, { signal: stop.signal, sleep: undefined });
    await client.account();
    bed.ca.switches.fault = (exchange) => {
      if (["newOrder", "finalize"].includes(exchange.resource)) setTimeout(() => stop.abort(reason), 100);
      return fault?.(exchange);
    };
    const begun = Date.now();
    await assert.rejects(obtain(bed, client), reason);
    assert(Date.now() - begun < 5000);
  });
}

// ---- lost answers ------------------------------------------------------------------------------------------------

for (
  const [resource, orders] of [["newAccount", 1], ["newOrder", 2], ["challenge", 1], ["finalize", 1]] as const
) {
  for (const kind of ["reset", "reset mid-body"] as const) {
    Deno.test(`the answer of ${resource} can be lost (${kind})`, async () => {
      const lost = { kind: "after", fault: { kind } } as const;
      await using bed = await testBed({ ca: { fault: befalling(resource, lost), processingMs: 20 } });
      assert.match(await obtain(bed, await connect(bed)), /^-----BEGIN CERTIFICATE-----/);
      assert.deepEqual([bed.ca.accounts.length, bed.ca.orders.length, bed.ca.issued.length], [1, orders, 1]);
    });
  }
}

Deno.test("finalize that is refused because the order is not ready, and that had not arrived, is an error", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  bed.ca.switches.fault = befalling("finalize", refusing(403, "orderNotReady", "not yet"), Infinity);
  const error = await failure(obtain(bed, client));
  assert.deepEqual([error.step, error.message], ["finalize the order", "not yet (orderNotReady)"]);
});

Deno.test("an answer to a challenge that had arrived, and is refused the second time, is no error", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  const faults: (Fault | undefined)[] = [
    { kind: "after", fault: { kind: "reset" } },
    refusing(400, "malformed", "the challenge is not pending"),
  ];
  bed.ca.switches.fault = ({ resource }) => resource === "challenge" ? faults.shift() : undefined;
  assert.match(await obtain(bed, client), /^-----BEGIN CERTIFICATE-----/);
  assert.equal(faults.length, 0);
});

Deno.test("an answer to a challenge that is refused, and that had not arrived, is an error", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  bed.ca.switches.fault = befalling("challenge", refusing(400, "malformed", "what?"), Infinity);
  const error = await failure(obtain(bed, client));
  assert.deepEqual([error.step, error.message], ["answer a challenge", "what? (malformed)"]);
});

// ---- a hostile CA ------------------------------------------------------------------------------------------------

const evil = (body: Record<string, unknown>, key: string, value: unknown) => ({ ...body, [key]: value });
const challenges = (
  body: Record<string, unknown>,
  change: (challenge: Record<string, unknown>) => unknown,
) => ({
  ...body,
  challenges: (body.challenges as Record<string, unknown>[]).map(change),
});
const BAD_URLS = [
  "http://localhost/x",
  "https://attacker.example/x",
  "https://localhost:1/x",
  "file:///etc/passwd",
  "javascript:alert(1)",
  "//localhost/x",
  "/order/1",
  "",
  7,
  null,
  ["https://localhost/x"],
  (origin: string) => `${origin}.attacker.example/x`,
  (origin: string) => origin.replace("https://", "https://attacker.example@"),
  (origin: string) => `${origin}/x\n\x1b[2Jhttps://attacker.example`,
  (origin: string) => `${origin}/${"x".repeat(3000)}`,
];
const PLACES: readonly [
  Exchange["resource"],
  string,
  (body: Record<string, unknown>, url: unknown) => unknown,
][] = [
  ["newOrder", "authorization", (body, url) => evil(body, "authorizations", [url])],
  ["newOrder", "finalize", (body, url) => evil(body, "finalize", url)],
  ["authz", "challenge", (body, url) => challenges(body, (challenge) => ({ ...challenge, url }))],
  ["finalize", "certificate", (body, url) => evil(body, "certificate", url)],
];
for (const [resource, what, put] of PLACES) {
  Deno.test(`a ${what} URL that is not the CA's, or no URL, is refused and not asked`, async () => {
    await using bed = await faultyBed();
    const client = await connect(bed);
    for (const [i, bad] of BAD_URLS.entries()) {
      const url = typeof bad === "function" ? bad(bed.ca.origin) : bad;
      const asked = bed.ca.log.length;
      bed.ca.switches.fault = befalling(resource, { kind: "rewrite", rewrite: (body) => put(body, url) });
      const error = await failure(obtain(bed, client, `n${i}.example.com`));
      assert.match(error.message, /^the CA named an unusable URL "/, `${url}`);
      // deno-lint-ignore no-control-regex
      assert.doesNotMatch(error.message + error.url, /[\x00-\x1f\x7f]/);
      assert(bed.ca.log.slice(asked).every(({ resource }) => resource !== "unknown"), `${url} was asked`);
    }
  });
}

Deno.test("a Location that is not the CA's is refused", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  for (const location of ["http://localhost/order/1", "https://attacker.example/order/1", "order/1"]) {
    const order = { status: "ready", authorizations: [], finalize: `${bed.ca.origin}/order/1/finalize` };
    bed.ca.switches.fault = befalling("newOrder", json(JSON.stringify(order), { location }));
    const error = await failure(client.newOrder([NAME]));
    assert.equal(error.message, `the CA named an unusable URL ${JSON.stringify(location)}`);
  }
});

Deno.test("a token that is not base64url, is too short or too long is refused", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  const good = "A".repeat(22);
  const tokens = [
    "../../../etc/cron.d/x",
    `..%2f${good}`,
    `${good}/x`,
    `${good}\n${good}`,
    `${good}\0`,
    `${good}.html`,
    `.${good}`,
    `$(touch ${good})`,
    `${good}=`,
    "A".repeat(21),
    "A".repeat(201),
    "A".repeat(100_000),
    good.replace("A", "Ä"),
  ];
  for (const token of tokens) {
    const order = await client.newOrder([NAME]);
    bed.ca.switches.fault = befalling("authz", {
      kind: "rewrite",
      rewrite: (body) => challenges(body, (challenge) => ({ ...challenge, token })),
    });
    const error = await failure(client.getAuthorization(order.authorizations[0]!));
    assert.equal(error.message, "the CA sent a token that is not base64url");
  }
});

Deno.test("challenges of types that are not known are passed over, whatever token they have", async () => {
  await using bed = await testBed({
    ca: {
      fault: befalling("authz", {
        kind: "rewrite",
        rewrite: (body) =>
          challenges(
            body,
            (challenge) =>
              challenge.type === "tls-alpn-01" ? { ...challenge, type: "x-02", token: "a b" } : challenge,
          ),
      }),
    },
  });
  const client = await connect(bed);
  const order = await client.newOrder([NAME]);
  const { challenges: offered } = await client.getAuthorization(order.authorizations[0]!);
  assert.deepEqual(
    offered.map(({ type, token }) => [type, token.length]),
    [["x-02", 0], ["dns-persist-01", 0], ["dns-01", 43], ["http-01", 43]],
  );
});

const ESCAPES =
  "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\n\u202efake\u2028line\0\x9b1m $(rm -rf ~) `id`; & | > <";
const CLEAN = "]0;owned [2J [31mred fake line 1m $(rm -rf ~) `id`; & | > <";

Deno.test("what the CA says reaches the message on one line, without what could steer a terminal", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  const subproblems = [
    { type: ESCAPES, detail: ESCAPES, identifier: { type: "dns", value: ESCAPES } },
    {
      type: "urn:ietf:params:acme:error:dns",
      detail: "no such name",
      identifier: { value: "b.example.com" },
    },
  ];
  bed.ca.switches.fault = befalling("newOrder", refusing(400, ESCAPES, ESCAPES, { subproblems }));
  const error = await failure(client.newOrder([NAME]));
  assert.equal(
    error.message,
    `${CLEAN} (${CLEAN}); ${CLEAN}: ${CLEAN} (${CLEAN}); b.example.com: no such name (dns)`,
  );
  bed.ca.switches.fault = befalling("newOrder", {
    kind: "status",
    status: 400,
    contentType: "text/ht\tml\x80x; charset=\u00ff",
  });
  assert.equal((await failure(client.newOrder([NAME]))).message, "HTTP status 400 (text/ht ml x)");
});

Deno.test("a problem can be strange, nested without end or huge, and is told within bounds", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  const nested = '{"subproblems":['.repeat(30_000) + "{}" + "]}".repeat(30_000);
  const many = JSON.stringify({
    detail: "x".repeat(5000),
    subproblems: Array(1000).fill({ detail: "y".repeat(900) }),
  });
  for (
    const [body, start] of [
      [nested, /^no detail \(about:blank\)/],
      [many, /^x{2000}… \(about:blank\); y/],
      ["{}", /^no detail \(about:blank\)$/],
      ['{"type":7,"detail":{"a":1},"subproblems":"none","identifier":[]}', /^\{"a":1\} \(7\)$/],
      ['{"subproblems":[null,7,"x"]}', /^no detail \(about:blank\)$/],
      ["null", /^HTTP status 400/],
      ["[]", /^no detail \(about:blank\)$/],
    ] as const
  ) {
    bed.ca.switches.fault = befalling("newOrder", { kind: "status", status: 400, body });
    const { message } = await failure(client.newOrder([NAME]));
    assert.match(message, start);
    assert(message.length < 250_000, `${message.length} characters`);
  }
});

Deno.test("a certificate that is none, or that the order does not name, is an error", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  bed.ca.switches.fault = befalling("certificate", { kind: "html" });
  assert.equal((await failure(obtain(bed, client))).message, "not a certificate but text/html");
  bed.ca.switches.fault = befalling("finalize", {
    kind: "rewrite",
    rewrite: ({ certificate: _, ...body }) => body,
  });
  assert.equal((await failure(obtain(bed, client))).message, "the order names no certificate");
});

for (
  const [text, clean] of [
    ["plain text, ümläuts, 日本語, 👍", "plain text, ümläuts, 日本語, 👍"],
    ["  a\tb\r\nc\0d  ", "a b c d"],
    ["\x1b[31mred\x1b[0m", "[31mred [0m"],
    ["a\u202eb\u2066c\u200bd\u2029e\ud800f", "a b c d e f"],
    ["x".repeat(2001), `${"x".repeat(2000)}…`],
  ] as const
) {
  Deno.test(`oneLine() makes ${JSON.stringify(clean).slice(0, 40)} of what it gets`, () => {
    assert.equal(oneLine(text), clean);
  });
}

Deno.test("describe() tells a problem with its subproblems and whom they are about", () => {
  assert.equal(
    describe({
      type: "compound",
      detail: "cannot validate",
      subproblems: [
        { type: "dns", detail: "NXDOMAIN", identifier: "a.example.com", subproblems: [] },
        { type: "unauthorized", detail: "", identifier: "b.example.com", subproblems: [] },
      ],
    }),
    "cannot validate (compound); a.example.com: NXDOMAIN (dns); b.example.com: no detail (unauthorized)",
  );
});
