/** Goal: requests are repeated after transient errors, as often as the CA accepts; nothing that a CA sends is trusted. */

import assert from "node:assert/strict";
import { AcmeClient } from "../lib/acme.ts";
import { AcmeError, importKey, linksOf, parseRetryAfter } from "../lib/http.ts";
import type { Context } from "../lib/context.ts";
import { generateKey } from "../lib/x509.ts";
import { type Bed, faultAt, refusing, testBed } from "./bed.ts";
import type { Fault, Resource } from "./ca.ts";

const KEY = await importKey(await generateKey({ type: "ec", curve: "P-256" }));
const NAME = "example.com";

/** A client with a new account, whose pauses have no jitter. */
async function connect(bed: Bed, context: Partial<Context> = {}): Promise<AcmeClient> {
  const steady = bed.context({ random: () => 0.5, ...context });
  const client = await AcmeClient.connect(bed.ca.directoryUrl, steady, 10);
  client.account = await client.newAccount(KEY, { contact: [] });
  return client;
}

async function failure(promise: Promise<unknown>): Promise<AcmeError> {
  const error = await promise.then(() => assert.fail("succeeded"), (error) => error);
  assert(error instanceof AcmeError, error);
  return error;
}

const requestCount = ({ ca }: Bed, resource: Resource) =>
  ca.log.filter((entry) => entry.resource === resource).length;

/** A bed, a client with a new account, and an order. */
async function conversation() {
  const bed = await testBed();
  const client = await connect(bed);
  const order = await client.newOrder([NAME]);
  const requests: Partial<Record<Resource, () => Promise<unknown>>> = {
    directory: () => connect(bed),
    newOrder: () => client.newOrder([NAME]),
    authz: () => client.getAuthorization(order.authorizations[0]!),
    order: () => client.getOrder(order.url),
    finalize: () => client.finalizeOrder(order, new Uint8Array()),
    renewalInfo: () => client.renewalInfo("AAAA.AAAA"),
  };

  /** The error of a request to which every answer has the fault, the number of attempts, and the seconds between them. */
  async function refused(resource: Resource, fault: Fault) {
    bed.ca.switches.fault = faultAt(resource, fault, Infinity);
    bed.waits.length = 0;
    const before = requestCount(bed, resource);
    const { message, step, url } = await failure(requests[resource]!());
    const seconds = bed.waits.reduce((sum, ms) => sum + ms, 0) / 1000;
    return { message, step, url, tries: requestCount(bed, resource) - before, seconds };
  }

  return { bed, client, order, refused, [Symbol.asyncDispose]: () => bed[Symbol.asyncDispose]() };
}

const status = (status: number, contentType = "text/plain", body = "", headers = {}): Fault => (
  { kind: "status", status, contentType, headers, body }
);
const JSON_TYPE = "application/json", PROBLEM = "application/problem+json";
const limited = (status: number, type: string, retryAfter: string): Fault =>
  refusing(status, type, "wait", { headers: { "retry-after": retryAfter } });
type Body = Record<string, unknown>;
const rewrite = (rewrite: (body: Body) => unknown): Fault => ({ kind: "rewrite", rewrite });
const put = (more: Body) => rewrite((body) => ({ ...body, ...more }));

// ---- repeated requests -------------------------------------------------------------------------------------------

Deno.test("each error has its own number of attempts and pauses", async () => {
  const unknownAccount = refusing(400, "accountDoesNotExist", "who are you?");
  const notFound = refusing(404, "malformed", "no such thing");
  await using at = await conversation();
  const table = [
    ["newOrder", { kind: "badNonce" }, 30, 0],
    ["newOrder", status(500), 4, 0.5 + 1.5 + 4.5],
    ["newOrder", limited(503, "serverInternal", "30"), 4, 90],
    ["newOrder", limited(503, "serverInternal", "31"), 1, 0],
    ["newOrder", status(429, "text/html"), 1, 0],
    ["newOrder", status(501), 1, 0],
    // a replica of the CA may not know yet what was just created
    ["authz", notFound, 6, 0.25 + 0.5 + 1 + 2 + 4],
    ["order", notFound, 6, 7.75],
    ["newOrder", unknownAccount, 6, 7.75],
    ["finalize", refusing(403, "orderNotReady", "pending"), 6, 7.75],
    ["newOrder", notFound, 3, 0.75],
    ["directory", notFound, 3, 0.75],
    ["renewalInfo", notFound, 1, 0],
  ] as const;
  for (const [resource, fault, tries, seconds] of table) {
    const refused = await at.refused(resource, fault);
    const what = `${resource} ${JSON.stringify(fault)}: ${refused.seconds} s`;
    assert.equal(refused.tries, tries, what);
    assert(Math.abs(refused.seconds - seconds) < 1, what);
  }
});

Deno.test("a CA that is unreachable, untrusted or silent: the error has the cause; with `hurry` there is one attempt", async () => {
  await using bed = await testBed({ ca: { fault: faultAt("directory", { kind: "silence" }, Infinity) } });
  const url = "https://127.0.0.1:2/dir"; // nothing listens on this port
  const { fetch: trusting } = bed.context();
  const impatient: Context["fetch"] = (url, init) =>
    trusting(url, { ...init, signal: AbortSignal.timeout(200) });
  const table = [
    [url, trusting, true, /Connection refused/],
    [url, trusting, false, /Connection refused/],
    [bed.ca.directoryUrl, globalThis.fetch, true, /UnknownIssuer; .* caBundle$/],
    [bed.ca.directoryUrl, impatient, false, /^no answer within 30 s$/],
  ] as const;
  for (const [directory, fetch, hurry, message] of table) {
    bed.waits.length = 0;
    const error = await failure(AcmeClient.connect(directory, bed.context({ fetch }), 10, { hurry }));
    assert.equal(error.step, `read the directory ${directory}`);
    assert.match(error.message, message);
    assert.equal(bed.waits.length, hurry ? 0 : 3);
  }
});

Deno.test("parseRetryAfter() reads seconds and dates, limited to between a second and a day; anything else is undefined", () => {
  const now = new Date("2026-10-18T20:00:00Z");
  const read = (value: string) => {
    const at = parseRetryAfter(new Headers({ "retry-after": value }), now);
    return at && (at.getTime() - now.getTime()) / 1000;
  };
  assert.deepEqual([" 120 ", "0", "9".repeat(400)].map(read), [120, 1, 86_400]);
  const dates = ["2026 20:02:00", "2026 19:00:00", "2099 20:00:00"].map((date) => `Sun, 18 Oct ${date} GMT`);
  assert.deepEqual(dates.map(read), [120, 1, 86_400]);
  assert.deepEqual(["soon", "-5", "1.5", ""].map(read), Array(4).fill(undefined));
});

Deno.test("an order is polled when Retry-After allows, or at growing intervals if that is after the deadline", async () => {
  await using at = await conversation();
  const { bed: { ca } } = at;
  const waits: number[] = [];
  const sleep = async (ms: number) => {
    waits.push(ms);
    await Promise.resolve(ca.advance(ms));
  };
  const client = await connect(at.bed, { sleep });
  const body = JSON.stringify({ ...at.order, status: "processing" });
  const growing = [20, 60, 180, 540, 1620, 4860, 5000, 5000];
  const table = [["7", [20, ...Array(7).fill(7000)]], ["600", growing], ["soon", growing]] as const;
  for (const [retryAfter, pauses] of table) {
    const fault = status(200, JSON_TYPE, body, { "retry-after": retryAfter });
    ca.switches.fault = faultAt("order", fault, Infinity);
    waits.length = 0;
    const started = ca.now.getTime();
    let last = 0;
    for await (const _ of client.watch("wait", at.order, new Date(started + 180_000))) {
      last = ca.now.getTime() - started;
    }
    const rounded = waits.slice(0, 8).map((ms) => ms > 5000 ? Math.round(ms / 1000) * 1000 : ms);
    assert.deepEqual(rounded, pauses, retryAfter);
    assert(last >= 180_000 && waits.reduce((sum, ms) => sum + ms, 0) <= 180_000, "not at the deadline");
  }
});

Deno.test("while a CA rate-limits every request, one of the waiting requests is retried, not all of them", async () => {
  for (const [resource, most] of [["newNonce", 20 + 9], ["newOrder", 50 + 9]] as const) {
    await using at = await conversation();
    const { bed, client } = at;
    bed.ca.switches.fault = faultAt(resource, limited(429, "rateLimited", "3"), Infinity);
    const before = requestCount(bed, resource);
    const names = Array.from({ length: 50 }, (_, i) => `n${i}.example.com`);
    const results = await Promise.allSettled(names.map((name) => client.newOrder([name])));
    const reasons = results.flatMap((result) => result.status === "rejected" ? [result.reason] : []);
    assert(reasons.length > 0);
    for (const { problem } of reasons) assert.equal(problem.type, "rateLimited");
    const tries = requestCount(bed, resource) - before;
    assert(tries <= most, `${tries} requests`);
  }
});

// ---- what a CA may answer ----------------------------------------------------------------------------------------

const ESCAPES = "\x1b]0;owned\x07\x1b[2Jred\r\n\u202efake\u2028line\0\x9b1m $(rm -rf ~) `id`; & | > <";
const CLEAN = "]0;owned [2Jred fake line 1m $(rm -rf ~) `id`; & | > <";
const HOSTILE = `${CLEAN}: ${CLEAN} (${CLEAN})`;

Deno.test("a refusal or an invalid answer is an error of one line of limited length without control characters", async () => {
  await using at = await conversation();
  const { bed, order } = at;
  const elsewhere = { location: "https://attacker.example/order/1" };
  const problem = (document: unknown, type = PROBLEM, headers = {}): Fault =>
    status(403, type, typeof document === "string" ? document : JSON.stringify(document), headers);
  const refused = { type: "urn:ietf:params:acme:error:unauthorized", detail: "go away" };
  const changed = { type: "urn:ietf:params:acme:error:userActionRequired", detail: "terms have changed" };
  const instance = "https://ca.example/agree?to=v8";
  const headers = { link: '</terms/v8>;rel="terms-of-service", </dir>;rel="index"' };
  const hostile = { type: ESCAPES, detail: ESCAPES, identifier: { type: "dns", value: ESCAPES } };
  const subproblems = [hostile, { detail: "no such name", identifier: { value: "b.example.com" } }];
  const many = { detail: "x".repeat(5000), subproblems: Array(1000).fill({ detail: "y".repeat(900) }) };
  const table: [Fault, string | RegExp][] = [
    [problem(refused), "go away (unauthorized)"],
    [problem(refused, JSON_TYPE), "go away (unauthorized)"],
    [problem({ message: "no" }, JSON_TYPE), "HTTP status 403 (application/json)"],
    [problem("", "text/ht\tml\x80x; charset=\u00ff"), "HTTP status 403 (text/ht ml x)"],
    [problem('{"type":"ur'), /^HTTP status 403/],
    [
      problem({ ...changed, instance }, PROBLEM, headers),
      `terms have changed (userActionRequired), see ${instance}, see ${bed.ca.origin}/terms/v8`,
    ],
    [
      problem({ ...hostile, instance: "javascript:alert(1)", subproblems }),
      `${HOSTILE}; ${HOSTILE}; b.example.com: no such name (about:blank)`,
    ],
    [problem(many), /^x{2000}… \(about:blank\); y/],
    [problem('{"subproblems":['.repeat(30_000) + "{}" + "]}".repeat(30_000)), /^no detail \(about:blank\)/],
    [problem({ type: 7, detail: { a: 1 }, subproblems: [null, 7], identifier: [] }), /^{"a":1} \(7\)/],
    [status(302, JSON_TYPE, "", { location: "/dir" }), /^HTTP status 302/],
    [{ kind: "html" }, "not JSON but text/html"],
    [{ kind: "truncate" }, "broken JSON"],
    [rewrite(() => ({})), "not an order"],
    [rewrite(() => 7), "not a JSON object"],
    [put({ authorizations: Array(1200).fill(order.authorizations[0]) }), /asks for 1200 authorizations$/],
    [
      status(201, JSON_TYPE, JSON.stringify(order), elsewhere),
      `the CA named an unusable URL "${elsewhere.location}"`,
    ],
    [{ kind: "drop header", name: "location" }, "the answer has no Location"],
    [status(201, JSON_TYPE, `"${"x".repeat(2 << 20)}"`), "an answer of more than 1048576 bytes"],
  ];
  for (const [fault, expected] of table) {
    const { message, step, tries } = await at.refused("newOrder", fault);
    assert.deepEqual([step, tries], ["create an order", 1]);
    if (typeof expected === "string") assert.equal(message, expected);
    else assert.match(message, expected);
    assert(message.length <= 20_001, `${message.length} characters`);
  }
  const { message, step } = await at.refused("directory", put({ newOrder: "http://localhost/" }));
  assert.equal(step, `read the directory ${bed.ca.directoryUrl}`);
  assert.equal(message, "not an ACME directory: no usable URL for newOrder");
});

Deno.test("linksOf() reads a Link header in linear time", () => {
  const links = (link: string) =>
    linksOf({ headers: new Headers({ link }), text: "" }, "alternate", "https://ca.example/c/1");
  const two = '</dir>;rel="index", </c/2>; rel="alternate";x=1,<https://a.example/3>;rel=alternate';
  assert.deepEqual(links(two), ["https://ca.example/c/2", "https://a.example/3"]);
  const started = performance.now();
  for (const piece of ["<", "<x", "<>;;rel", "<a>;rel=alternate,"]) links(piece.repeat(100_000));
  assert(performance.now() - started < 20_000); // minutes if the pattern backtracks
});

const inChallenges = (more: Body) =>
  rewrite(({ challenges, ...body }) => (
    { ...body, challenges: (challenges as Body[]).map((one) => ({ ...one, ...more })) }
  ));

Deno.test("an invalid URL, or one of another host, is refused wherever it is, and not requested", async () => {
  await using at = await conversation();
  const { origin, log } = at.bed.ca;
  const urls = [
    "http://localhost/x",
    "https://attacker.example/x",
    `${origin}.attacker.example/x`,
    origin.replace("https://", "https://attacker.example@"),
    `${origin}/x\n\x1b[2Jhttps://attacker.example`,
    `${origin}/${"x".repeat(3000)}`,
    "/order/1",
    null,
  ];
  for (const url of urls) {
    const table = [
      ["newOrder", put({ authorizations: [url] })],
      ["order", put({ finalize: url })],
      ["order", put({ certificate: url })],
      ["authz", inChallenges({ url })],
    ] as const;
    for (const [resource, fault] of table) {
      const { message, url: requested } = await at.refused(resource, fault);
      assert.match(message, /^the CA named an unusable URL [ -~…]*$/, `${url}`);
      assert.equal(requested, "");
    }
  }
  assert(log.every(({ resource }) => resource !== "unknown"));
});

Deno.test("a token that is not base64url, is too short or too long is refused, unless its challenge is of an unknown type", async () => {
  await using at = await conversation();
  const good = "A".repeat(22);
  const hostile = [`../${good}`, `${good}/x`, `${good}\n${good}`, `$(touch ${good})`, `${good}=`];
  for (const token of [...hostile, "A".repeat(21), "A".repeat(201)]) {
    const { message } = await at.refused("authz", inChallenges({ token }));
    assert.equal(message, "the CA sent a token that is not base64url");
  }
  at.bed.ca.switches.fault = faultAt("authz", inChallenges({ type: "x-02", token: "a b" }));
  const { challenges: [unknown] } = await at.client.getAuthorization(at.order.authorizations[0]!);
  assert.deepEqual([unknown!.type, unknown!.token], ["x-02", ""]);
});
