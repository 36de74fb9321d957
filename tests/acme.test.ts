/**
 * Goal: requests reach the CA in spite of transient errors, and are no more than the CA accepts; the client follows RFC 8555,
 * tolerates replicas that lag, and trusts nothing that a hostile CA sends.
 */

import assert from "node:assert/strict";
import { generateKeyPairSync, type KeyObject } from "node:crypto";
import { join } from "node:path";
import { AcmeClient, keyAuthorization, type Order } from "../lib/acme.ts";
import { AcmeError, importKey, linksOf, parseRetryAfter } from "../lib/http.ts";
import { createCsr } from "../lib/x509.ts";
import type { Context } from "../lib/context.ts";
import { type Bed, faultAt, refusing, testBed, until } from "./bed.ts";
import type { Exchange, Fault, Resource, Switches } from "./ca.ts";

const ecKey = (namedCurve: string) => generateKeyPairSync("ec", { namedCurve }).privateKey;
const pem = (key: KeyObject, type: "pkcs8" | "pkcs1" | "sec1" = "pkcs8") =>
  key.export({ type, format: "pem" }).toString();
const KEY = await importKey(pem(ecKey("P-256")));
const CERTIFICATE_KEY = pem(ecKey("P-256"));
const NAME = "example.com";
const PEM = /^-----BEGIN CERTIFICATE-----/;

/** A client with a new account. */
async function connect(bed: Bed, context: Partial<Context> = {}, key = KEY): Promise<AcmeClient> {
  const client = await AcmeClient.connect(bed.ca.directoryUrl, bed.context(context), 10);
  client.account = await client.newAccount(key, { contact: [] });
  return client;
}

/** A bed and a client with a new account; `inject()` sets the fault of the CA. */
async function conversation(ca: Switches = {}) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({ ca: { fault: () => undefined, ...ca } }));
  const client = await connect(bed);
  const open = stack.move();
  const inject = (...fault: Parameters<typeof faultAt>) => {
    bed.ca.switches.fault = faultAt(...fault);
  };
  return { bed, client, inject, [Symbol.asyncDispose]: () => open.disposeAsync() };
}

/** An order that is ready, its challenges answered by hand. */
async function ready(bed: Bed, client: AcmeClient, name = NAME): Promise<Order> {
  const order = await client.newOrder([name]);
  if (order.status !== "pending") return order;
  const authorization = await client.getAuthorization(order.authorizations[0]!);
  const challenge = authorization.challenges.find(({ type }) => type === "http-01")!;
  const { token } = challenge;
  await Deno.writeTextFile(join(bed.drop, token), keyAuthorization(token, client.account.key));
  await client.respondToChallenge(authorization, challenge);
  const isDone = () => bed.ca.validations.some((validation) => validation.name === name);
  if (!bed.ca.switches.validationDelayMs) await until("the CA has validated it", isDone);
  return await leaving("pending", bed, client, order);
}

/** The order once it is no longer `status`. */
async function leaving(status: Order["status"], bed: Bed, client: AcmeClient, order: Order): Promise<Order> {
  const deadline = new Date(bed.ca.now.getTime() + 180_000);
  for await (const current of client.watch("watch the order", order, deadline)) {
    if (current.status !== status) return current;
  }
  assert.fail(`still ${status} at the deadline`);
}

const csrFor = async (name: string) => (await createCsr(CERTIFICATE_KEY, [name])).der;

/** A certificate for the name, by all the steps of RFC 8555 §7.4. */
async function obtain(bed: Bed, client: AcmeClient, name = NAME): Promise<string> {
  const order = await client.finalizeOrder(await ready(bed, client, name), await csrFor(name));
  for await (const chain of client.downloadChains(await leaving("processing", bed, client, order))) {
    return chain;
  }
  assert.fail("no chain");
}

/** The AcmeError with which `promise` is rejected. */
async function failure(promise: Promise<unknown>): Promise<AcmeError> {
  const error = await promise.then(() => assert.fail("succeeded"), (error) => error);
  assert(error instanceof AcmeError, error);
  return error;
}

const requestCount = ({ ca }: Bed, resource: Resource) =>
  ca.log.filter((entry) => entry.resource === resource).length;
const numbered = (count: number) => Array.from({ length: count }, (_, i) => `n${i}.example.com`);
const status = (status: number, contentType = "text/plain", body?: string): Fault => ({
  kind: "status",
  status,
  contentType,
  body,
});
const after = (fault: Fault): Fault => ({ kind: "after", fault });

// ---- keys --------------------------------------------------------------------------------------------------------

Deno.test("importKey() reads RSA keys and EC keys of three curves in each PEM format, and the CA accepts their signatures", async () => {
  await using bed = await testBed({});
  const rsa = generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey;
  for (
    const [alg, key, forms] of [
      ["RS256", rsa, ["pkcs8", "pkcs1"]],
      ["ES256", ecKey("P-256"), ["pkcs8", "sec1"]],
      ["ES384", ecKey("P-384"), ["pkcs8", "sec1"]],
      ["ES512", ecKey("P-521"), ["pkcs8", "sec1"]],
    ] as const
  ) {
    for (const form of forms) {
      const read = await importKey(pem(key, form));
      assert.equal(read.alg, alg);
      await (await connect(bed, {}, read)).newOrder([NAME]);
      assert.equal(bed.ca.accounts.at(-1)!.key.thumbprint, read.thumbprint);
    }
  }
});

Deno.test("importKey() rejects text without a usable private key, and the error does not quote it", async () => {
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
      importKey(text),
      ({ message }: Error) => !message.includes(text.slice(30, 60) || "?"),
    );
  }
});

// ---- nonces ------------------------------------------------------------------------------------------------------

Deno.test("orders succeed without a pause if every nonce is refused once, or 29 in a row", async () => {
  const badNonce: Fault = { kind: "badNonce" };
  const asJson = { ...refusing(400, "badNonce", "again"), contentType: "application/json" } as Fault;
  for (
    const [fault, burst, nonces] of [[badNonce, false, 1], [badNonce, true, 1], [asJson, false, 3]] as const
  ) {
    const seen = new Set<string>();
    const isRefused = ({ n, url }: Exchange) => burst ? n >= 5 && n < 34 : seen.size < seen.add(url).size;
    await using bed = await testBed({
      ca: { fault: (exchange) => exchange.method === "POST" && isRefused(exchange) ? fault : undefined },
    });
    const client = await connect(bed);
    for (const name of numbered(4)) await client.newOrder([name]);
    const refused = bed.ca.log.filter(({ status }) => status === 400).length;
    assert.deepEqual([refused, bed.waits, requestCount(bed, "newNonce")], [burst ? 29 : 2, [], nonces]);
  }
});

Deno.test("a CA that accepts no nonce is asked 30 times", async () => {
  await using bed = await testBed({ ca: { fault: faultAt("newAccount", { kind: "badNonce" }, Infinity) } });
  assert.equal((await failure(connect(bed))).problem?.type, "badNonce");
  assert.equal(requestCount(bed, "newAccount"), 30);
});

Deno.test("the nonce of an answer signs the next request; an answer without one costs one more request", async () => {
  await using at = await conversation();
  const { bed, client } = at;
  for (let round = 0; round < 2; round++) {
    await Promise.all(numbered(40).map((name) => client.newOrder([name])));
  }
  assert(requestCount(bed, "newNonce") <= 20, `${requestCount(bed, "newNonce")} nonces`);

  const fault = ({ method }: Exchange): Fault | undefined =>
    method === "POST" ? { kind: "drop header", name: "replay-nonce" } : undefined;
  await using without = await conversation({ fault });
  for (const name of numbered(3)) await without.client.newOrder([name]);
  assert.deepEqual([requestCount(without.bed, "newNonce"), without.bed.ca.log.length], [4, 9]);
});

// ---- transient errors --------------------------------------------------------------------------------------------

/** With the number of times it is injected at each step: a refusal breaks the next connection as well, so it costs two tries. */
const TRANSIENT: readonly [string, Fault, number?][] = [
  ["a reset", { kind: "reset" }],
  ["a connection refused", { kind: "refuse" }, 1],
  ["a truncated answer", { kind: "reset mid-body" }],
  ["500", status(500)],
  ["503 in HTML", status(503, "text/html", "<h1>busy</h1>")],
  ["503 with Retry-After", refusing(503, "serverInternal", "busy", { headers: { "retry-after": "1" } })],
  ["429 with Retry-After", refusing(429, "rateLimited", "slow down", { headers: { "retry-after": "1" } })],
  ["a handled request whose answer is lost", after({ kind: "reset" })],
  ["a handled request that is answered with 500", after(status(500))],
];
for (const [what, fault, most = 2] of TRANSIENT) {
  Deno.test(`${what}, ${most === 1 ? "once" : "twice"} at every step, delays the certificate but does not prevent it`, async () => {
    const met = new Map<string, number>();
    await using bed = await testBed({
      ca: {
        fault({ resource }) {
          const times = met.get(resource) ?? 0;
          met.set(resource, times + 1);
          return times < most ? fault : undefined;
        },
      },
    });
    assert.match(await obtain(bed, await connect(bed)), PEM);
    assert.equal(met.size, 9, [...met.keys()].join());
    assert.deepEqual([bed.ca.accounts.length, bed.ca.issued.length], [1, 1]);
  });
}

Deno.test("each pause before a retry is three times the one before, and the fourth failure is an error", async () => {
  await using bed = await testBed({ ca: { fault: faultAt("newOrder", status(500), Infinity) } });
  const error = await failure((await connect(bed, { random: () => 0.5 })).newOrder([NAME]));
  assert.deepEqual([error.step, error.message], ["create an order", "HTTP status 500 (text/plain)"]);
  assert.deepEqual([bed.waits, requestCount(bed, "newOrder")], [[500, 1500, 4500], 4]);
});

Deno.test("a request that a lagging replica refuses is repeated a few times within seconds", async () => {
  const LAGGING: readonly [Resource, Fault][] = [
    ["authz", refusing(404, "malformed", "no such authorization")],
    ["challenge", refusing(404, "malformed", "no such challenge")],
    ["order", refusing(404, "malformed", "no such order")],
    ["finalize", refusing(404, "malformed", "no such order")],
    ["finalize", refusing(403, "orderNotReady", "the order is pending")],
    ["certificate", refusing(404, "malformed", "no such certificate")],
    ["newOrder", refusing(400, "accountDoesNotExist", "who are you?")],
    ["authz", refusing(400, "accountDoesNotExist", "who are you?")],
  ];
  for (const [i, [resource, fault]] of LAGGING.entries()) {
    await using at = await conversation({ processingMs: 5 });
    const { bed, client } = at;
    at.inject(resource, fault, 3);
    assert.match(await obtain(bed, client), PEM, resource);
    assert(bed.waits.reduce((sum, ms) => sum + ms, 0) < 6000, resource);
    at.inject(resource, fault, Infinity);
    const before = requestCount(bed, resource);
    await failure(obtain(bed, client, `n${i}.example.com`));
    assert(requestCount(bed, resource) - before <= 6, resource);
  }
});

Deno.test("a refused response to a challenge is an error, unless an earlier try has reached the CA", async () => {
  await using at = await conversation();
  const { bed, client } = at;
  const faults = [after({ kind: "reset" }), refusing(400, "malformed", "the challenge is not pending")];
  bed.ca.switches.fault = ({ resource }) => resource === "challenge" ? faults.shift() : undefined;
  assert.match(await obtain(bed, client), PEM);
  at.inject("challenge", refusing(400, "malformed", "what?"), Infinity);
  const error = await failure(obtain(bed, client, "other.example.com"));
  assert.deepEqual([error.step, error.message], ["answer a challenge", "what? (malformed)"]);
});

Deno.test("a request that gets 404 is repeated a few times within a second, except for renewal information", async () => {
  await using at = await conversation();
  const { bed, client } = at;
  const times = async (resource: Resource, ask: () => Promise<unknown>) => {
    const before = requestCount(bed, resource);
    at.inject(resource, status(404), Infinity);
    assert.equal((await failure(ask())).message, "HTTP status 404 (text/plain)");
    return requestCount(bed, resource) - before;
  };
  assert.equal(await times("directory", () => connect(bed)), 3);
  assert.equal(await times("newOrder", () => client.newOrder([NAME])), 3);
  assert.equal(await times("renewalInfo", () => client.renewalInfo("AAAA.AAAA")), 1);
});

Deno.test("an unreachable CA is an error with its cause after four tries, or after one in a hurry", async () => {
  await using bed = await testBed({});
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const url = `https://127.0.0.1:${listener.addr.port}/dir`;
  listener.close();
  for (const [hurry, pauses] of [[true, 0], [false, 3]] as const) {
    const error = await failure(AcmeClient.connect(url, bed.context(), 10, { hurry }));
    assert.equal(error.step, `read the directory ${url}`);
    assert.match(error.message, /Connection refused/);
    assert.equal(bed.waits.length, pauses);
  }
  const error = await failure(AcmeClient.connect(bed.ca.directoryUrl, bed.context({ fetch }), 10));
  assert.match(error.message, /UnknownIssuer; .* caBundle$/);
});

Deno.test("a request to a silent CA times out and is repeated", async () => {
  let timeOut = new AbortController();
  await using bed = await testBed({ ca: { fault: () => undefined } });
  const { fetch } = bed.context();
  const client = await connect(bed, {
    fetch(url, init) {
      timeOut = new AbortController();
      return fetch(url, { ...init, signal: AbortSignal.any([init.signal!, timeOut.signal]) });
    },
  });
  const silence = (times: number) => {
    const silent = faultAt("newOrder", { kind: "silence" }, times);
    bed.ca.switches.fault = (exchange) => {
      const fault = silent(exchange);
      if (fault) timeOut.abort(new DOMException("timed out", "TimeoutError"));
      return fault;
    };
  };
  silence(2);
  assert.equal((await client.newOrder([NAME])).status, "pending");
  silence(4);
  const error = await failure(client.newOrder([NAME]));
  assert.deepEqual([error.step, error.message], ["create an order", "no answer within 30 s"]);
});

Deno.test("the signal ends a pause between tries, and a wait for an answer", async () => {
  for (const fault of [status(500), { kind: "silence" } as Fault]) {
    await using bed = await testBed({ ca: { fault: () => undefined } });
    const stop = new AbortController();
    const reason = new DOMException("interrupted", "AbortError");
    const client = await connect(bed, { signal: stop.signal });
    bed.ca.switches.fault = ({ resource }) => {
      if (resource !== "newOrder") return undefined;
      setTimeout(() => stop.abort(reason), 20);
      return fault;
    };
    await assert.rejects(client.newOrder([NAME]), reason);
  }
});

// ---- waiting -----------------------------------------------------------------------------------------------------

const NOW = new Date("2026-10-18T20:00:00Z");
Deno.test("parseRetryAfter() reads seconds and dates, limited to between a second and a day; anything else is undefined", () => {
  for (
    const [value, seconds] of [
      ["120", 120],
      [" 7 ", 7],
      ["0", 1],
      ["86401", 86_400],
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
    const at = parseRetryAfter(new Headers(value === undefined ? {} : { "retry-after": value }), NOW);
    assert.equal(at && (at.getTime() - NOW.getTime()) / 1000, seconds, value);
  }
});

Deno.test("a 503 with Retry-After is retried at that time if it is at most 30 s ahead; otherwise it is an error", async () => {
  for (const value of ["2", new Date(Date.now() + 10_000).toUTCString(), "31", "99999999999"]) {
    await using at = await conversation();
    const { bed, client } = at;
    const headers = { "retry-after": value };
    at.inject("newOrder", refusing(503, "serverInternal", "busy", { headers }));
    const started = bed.ca.now;
    const until = parseRetryAfter(new Headers(headers), started)!;
    if (until.getTime() - started.getTime() < 31_000) {
      await client.newOrder([NAME]);
      assert.deepEqual([bed.ca.now >= until, bed.waits.length], [true, 1]);
    } else {
      const { retryAfter } = await failure(client.newOrder([NAME]));
      assert(Math.abs(retryAfter!.getTime() - until.getTime()) < 5000);
      assert.deepEqual(bed.waits, []);
    }
  }
});

Deno.test("an order is polled no sooner than Retry-After allows, during validation and during issuance", async () => {
  // polling too soon is a violation; Retry-After of finalize also counts for the first poll
  await using at = await conversation({ retryAfterSeconds: 3, validationDelayMs: 50, processingMs: 100 });
  await obtain(at.bed, at.client);
  assert(at.bed.waits.filter((ms) => ms > 200 && ms <= 4000).length >= 2, `${at.bed.waits}`);
});

for (const retryAfterSeconds of [86_400, 600, undefined]) {
  Deno.test(`an order is polled at growing intervals and again at the deadline, with Retry-After: ${retryAfterSeconds}`, async () => {
    await using bed = await testBed({ ca: { processingMs: Infinity } });
    const waits: number[] = [];
    const client = await connect(bed, {
      random: () => 0.5,
      async sleep(ms) {
        waits.push(ms);
        // a validation takes real time; waiting for an order that is never issued must not
        if (bed.ca.orders.every(({ status }) => status !== "processing")) await bed.context().sleep(ms);
        else bed.ca.advance(ms);
      },
    });
    const order = await ready(bed, client);
    bed.ca.switches.retryAfterSeconds = retryAfterSeconds;
    const finalized = await client.finalizeOrder(order, await csrFor(NAME));
    waits.length = 0;
    const started = bed.ca.now.getTime();
    let last = 0;
    for await (const { status } of client.watch("wait", finalized, new Date(started + 180_000))) {
      assert.equal(status, "processing");
      last = bed.ca.now.getTime() - started;
    }
    assert.deepEqual(waits.slice(0, 7), [20, 60, 180, 540, 1620, 4860, 5000]);
    assert(last >= 180_000 && last < 184_000, `the last poll was at ${last} ms`);
    bed.ca.violations.splice(0); // the last poll comes before Retry-After, which is after the deadline
  });
}

// ---- limits ------------------------------------------------------------------------------------------------------

Deno.test("while a CA rate-limits every request, one of the waiting requests is retried, not all of them", async () => {
  const slowDown = refusing(429, "rateLimited", "slow down", { headers: { "retry-after": "3" } });
  for (const resource of ["newNonce", "newOrder"] as const) {
    await using at = await conversation();
    const { bed, client } = at;
    at.inject(resource, slowDown, Infinity);
    const before = requestCount(bed, resource);
    const results = await Promise.allSettled(numbered(50).map((name) => client.newOrder([name])));
    const refused = results.filter((result) => result.status === "rejected");
    assert(refused.length > 0);
    for (const { reason } of refused) assert.equal(reason.problem.type, "rateLimited");
    const tries = requestCount(bed, resource) - before;
    assert(tries <= (resource === "newNonce" ? 20 : 50) + 9, `${tries} requests`);
  }
});

Deno.test("requests beyond the limit per second are retried one after the other", async () => {
  await using bed = await testBed({ ca: { limits: { newOrder: { count: 5, windowMs: 1000 } } } });
  const client = await connect(bed, {
    // requests that wait until the same time advance the clock only once
    async sleep(ms) {
      const until = bed.ca.now.getTime() + ms;
      await new Promise((resolve) => setTimeout(resolve, 2));
      bed.ca.advance(Math.max(0, until - bed.ca.now.getTime()));
    },
  });
  await Promise.all(numbered(60).map((name) => client.newOrder([name])));
  assert.equal(bed.ca.orders.length, 60);
  const refused = bed.ca.log.filter(({ status }) => status === 429).length;
  assert(refused <= 60 + 60 / 5, `${refused} refused: each once, then one a second`);
});

// ---- invalid answers ---------------------------------------------------------------------------------------------

Deno.test("an invalid answer or a refusal is an error, without a retry", async () => {
  const refused = refusing(403, "unauthorized", "go away");
  const terms = '</terms/v8>;rel="terms-of-service", </dir>;rel="index"';
  const changed = {
    type: "urn:ietf:params:acme:error:userActionRequired",
    detail: "terms have changed",
    instance: "https://ca.example/agree?to=v8",
  };
  await using at = await conversation();
  const { bed, client } = at;
  const table: [Fault, string | RegExp][] = [
    [status(410, "text/html"), "HTTP status 410 (text/html)"],
    [status(501, "text/html"), "HTTP status 501 (text/html)"],
    [{ ...refused, body: '{"type":"ur' } as Fault, /^HTTP status 403/],
    [refused, "go away (unauthorized)"],
    [{ ...refused, contentType: "application/json" } as Fault, "go away (unauthorized)"],
    [status(403, "application/json", '{"message": "no"}'), "HTTP status 403 (application/json)"],
    [refusing(429, "rateLimited", "too many"), "too many (rateLimited)"],
    [status(429, "text/html"), "too many requests (rateLimited)"],
    [
      {
        kind: "status",
        status: 403,
        headers: { link: terms },
        body: JSON.stringify(changed),
      },
      `terms have changed (userActionRequired), see ${changed.instance}, see ${bed.ca.origin}/terms/v8`,
    ],
    [{ kind: "status", status: 302, headers: { location: "/dir" } }, /^HTTP status 302/],
    [{ kind: "html" }, "not JSON but text/html"],
    [{ kind: "truncate" }, "broken JSON"],
    [{ kind: "rewrite", rewrite: () => ({}) }, "not an order"],
    [{ kind: "rewrite", rewrite: () => 7 }, "not a JSON object"],
    [{ kind: "drop header", name: "location" }, "the answer has no Location"],
    [
      status(201, "application/json", `"${"x".repeat(2 << 20)}"`),
      "an answer of more than 1048576 bytes",
    ],
  ];
  for (const [fault, message] of table) {
    const before = requestCount(bed, "newOrder");
    at.inject("newOrder", fault, Infinity);
    const error = await failure(client.newOrder([NAME]));
    assert.equal(error.step, "create an order");
    if (typeof message === "string") assert.equal(error.message, message);
    else assert.match(error.message, message);
    assert.deepEqual([requestCount(bed, "newOrder") - before, bed.waits], [1, []]);
  }
});

const ESCAPES =
  "\x1b]0;owned\x07\x1b[2J\x1b[31mred\r\n\u202efake\u2028line\0\x9b1m $(rm -rf ~) `id`; & | > <";
const CLEAN = "]0;owned [2J [31mred fake line 1m $(rm -rf ~) `id`; & | > <";

Deno.test("the CA's problem becomes one line of limited length without control characters", async () => {
  await using at = await conversation();
  const nested = '{"subproblems":['.repeat(30_000) + "{}" + "]}".repeat(30_000);
  const many = { detail: "x".repeat(5000), subproblems: Array(1000).fill({ detail: "y".repeat(900) }) };
  const hostile = {
    type: ESCAPES,
    detail: ESCAPES,
    subproblems: [
      { type: ESCAPES, detail: ESCAPES, identifier: { type: "dns", value: ESCAPES } },
      {
        type: "urn:ietf:params:acme:error:dns",
        detail: "no such name",
        identifier: { value: "b.example.com" },
      },
    ],
  };
  const table: [string, string | RegExp, string?][] = [
    [
      JSON.stringify(hostile),
      `${CLEAN} (${CLEAN}); ${CLEAN}: ${CLEAN} (${CLEAN}); b.example.com: no such name (dns)`,
    ],
    ["", "HTTP status 400 (text/ht ml x)", "text/ht\tml\x80x; charset=\u00ff"],
    [nested, /^no detail \(about:blank\)/],
    [JSON.stringify(many), /^x{2000}… \(about:blank\); y/],
    ['{"detail":"ümläuts, 日本語, 👍"}', "ümläuts, 日本語, 👍 (about:blank)"],
    ["{}", "no detail (about:blank)"],
    ['{"type":7,"detail":{"a":1},"subproblems":"none","identifier":[]}', '{"a":1} (7)'],
    ['{"subproblems":[null,7,"x"]}', "no detail (about:blank)"],
    ['{"instance":"javascript:alert(1)"}', "no detail (about:blank)"],
    ["null", /^HTTP status 400/],
    ["[]", "no detail (about:blank)"],
  ];
  for (const [body, expected, contentType = "application/problem+json"] of table) {
    at.inject("newOrder", status(400, contentType, body));
    const { message } = await failure(at.client.newOrder([NAME]));
    if (typeof expected === "string") assert.equal(message, expected);
    else assert.match(message, expected);
    assert(message.length <= 20_001, `${message.length} characters`);
  }
});

Deno.test("linksOf() reads a Link header in linear time", () => {
  const links = (link: string) =>
    linksOf({ headers: new Headers({ link }), text: "" }, "alternate", "https://ca.example/c/1");
  const two =
    '<https://ca.example/dir>;rel="index", </c/2>; rel="alternate";x=1,<https://a.example/3>;rel=alternate';
  assert.deepEqual(links(two), ["https://ca.example/c/2", "https://a.example/3"]);
  assert.deepEqual(links('</c/2>;rel="alternates", </c/3>;x="rel=alternate"'), []);
  const started = performance.now();
  for (const piece of ["<", "<x", "<>;", "<>;;rel", ", <", "<a>;rel=alternate,"]) {
    links(piece.repeat(100_000));
  }
  assert(performance.now() - started < 5000); // minutes if the pattern backtracks
});

// ---- a hostile CA ------------------------------------------------------------------------------------------------

type Body = Record<string, unknown>;
const rewrite = (rewrite: (body: Body) => unknown): Fault => ({ kind: "rewrite", rewrite });

Deno.test("an invalid directory is an error that names its URL", async () => {
  for (
    const [fault, message] of [
      [{ kind: "html" }, "not JSON but text/html"],
      [status(410), "HTTP status 410 (text/plain)"],
      [rewrite(() => []), "not an ACME directory: no usable URL for newNonce"],
      [
        rewrite((body) => ({ ...body, newOrder: String(body.newOrder).replace("https", "http") })),
        "not an ACME directory: no usable URL for newOrder",
      ],
    ] as [Fault, string][]
  ) {
    await using bed = await testBed({ ca: { fault: faultAt("directory", fault, Infinity) } });
    const error = await failure(connect(bed));
    const step = `read the directory ${bed.ca.directoryUrl}`;
    assert.deepEqual([error.step, error.message, requestCount(bed, "directory")], [step, message, 1]);
  }
});

const challenges = (body: Body, change: (challenge: Body) => unknown) => ({
  ...body,
  challenges: (body.challenges as Body[]).map(change),
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
const PLACES: readonly [Resource, string, (body: Body, url: unknown) => unknown][] = [
  ["newOrder", "authorization", (body, url) => ({ ...body, authorizations: [url] })],
  ["newOrder", "finalize", (body, url) => ({ ...body, finalize: url })],
  ["authz", "challenge", (body, url) => challenges(body, (challenge) => ({ ...challenge, url }))],
  ["finalize", "certificate", (body, url) => ({ ...body, certificate: url })],
];
for (const [resource, what, put] of PLACES) {
  Deno.test(`an invalid ${what} URL, or one of another host, is refused and not requested`, async () => {
    await using at = await conversation();
    const { bed, client } = at;
    for (const [i, bad] of BAD_URLS.entries()) {
      const url = typeof bad === "function" ? bad(bed.ca.origin) : bad;
      const started = bed.ca.log.length;
      at.inject(resource, rewrite((body) => put(body, url)));
      const error = await failure(obtain(bed, client, `n${i}.example.com`));
      assert.match(error.message, /^the CA named an unusable URL "/, `${url}`);
      // deno-lint-ignore no-control-regex
      assert.doesNotMatch(error.message + error.url, /[\x00-\x1f\x7f]/);
      assert(
        bed.ca.log.slice(started).every(({ resource }) => resource !== "unknown"),
        `${url} was requested`,
      );
    }
  });
}

Deno.test("an order with a Location that is not the CA's, or with more authorizations than names, is refused", async () => {
  await using at = await conversation();
  for (const location of ["http://localhost/order/1", "https://attacker.example/order/1", "order/1"]) {
    const order = { status: "ready", authorizations: [], finalize: `${at.bed.ca.origin}/order/1/finalize` };
    const fault = status(201, "application/json", JSON.stringify(order));
    at.inject("newOrder", { ...fault, headers: { location } } as Fault);
    const { message } = await failure(at.client.newOrder([NAME]));
    assert.equal(message, `the CA named an unusable URL ${JSON.stringify(location)}`);
  }
  const many = ({ authorizations, ...body }: Body) => (
    { ...body, authorizations: Array(1200).fill((authorizations as string[])[0]) }
  );
  at.inject("newOrder", rewrite(many));
  assert.match((await failure(at.client.newOrder([NAME]))).message, /1200 authorizations/);
});

Deno.test("a token that is not base64url, is too short or too long is refused", async () => {
  await using at = await conversation();
  const good = "A".repeat(22);
  const tokens = ["../../../etc/cron.d/x", `..%2f${good}`, `${good}/x`, `${good}\n${good}`, `${good}\0`]
    .concat(`.${good}`, `$(touch ${good})`, `${good}=`, "A".repeat(21), "A".repeat(201), `Ä${good}`);
  const [url] = (await at.client.newOrder([NAME])).authorizations;
  for (const token of tokens) {
    at.inject("authz", rewrite((body) => challenges(body, (challenge) => ({ ...challenge, token }))));
    const { message } = await failure(at.client.getAuthorization(url!));
    assert.equal(message, "the CA sent a token that is not base64url");
  }
});

Deno.test("getAuthorization() reads challenges of unknown types, and the issuer and account of dns-persist-01", async () => {
  await using at = await conversation();
  const unknown = (challenge: Body) =>
    challenge.type === "tls-alpn-01" ? { ...challenge, type: "x-02", token: "a b" } : challenge;
  at.inject("authz", rewrite((body) => challenges(body, unknown)));
  const order = await at.client.newOrder([NAME]);
  const { challenges: offered } = await at.client.getAuthorization(order.authorizations[0]!);
  assert.deepEqual(
    offered.map(({ type, token }) => [type, token.length]),
    [["x-02", 0], ["dns-persist-01", 0], ["dns-01", 43], ["http-01", 43]],
  );
  const { issuerDomainNames, accountUri } = offered[1]!;
  assert.deepEqual([issuerDomainNames, accountUri], [["ca.example"], at.client.account.url]);
});

Deno.test("an answer that is not a certificate, or an order without a certificate URL, is an error", async () => {
  await using at = await conversation();
  const { bed, client } = at;
  at.inject("certificate", { kind: "html" });
  assert.equal((await failure(obtain(bed, client))).message, "not a certificate but text/html");
  at.inject("finalize", rewrite(({ certificate: _, ...body }) => body));
  assert.equal((await failure(obtain(bed, client))).message, "the order names no certificate");
});
