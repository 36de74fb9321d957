/** Goal: the resources of a CA, right with a good one, patient with one that lags, on guard against a hostile one. */

import assert from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { join } from "node:path";
import { AcmeClient, keyAuthorization, type Order } from "../lib/acme.ts";
import { AcmeError, importKey } from "../lib/http.ts";
import { createCsr } from "../lib/x509.ts";
import { type Bed, befalling, refusing, testBed, type TestWorld } from "./bed.ts";
import type { Exchange, Fault, Switches } from "./ca.ts";

const key = () => {
  const { privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  return privateKey.export({ type: "pkcs8", format: "pem" }).toString();
};
const KEY = await importKey(key());
const CERTIFICATE_KEY = key();
const NAME = "example.com";

/** A CA whose faults can be set as a test goes on. */
const faultyBed = (ca: Switches = {}) => testBed({ ca: { fault: () => undefined, ...ca } });

/** A conversation under a new account. */
async function connect(bed: Bed, world: Partial<TestWorld> = {}): Promise<AcmeClient> {
  const client = await AcmeClient.connect(bed.ca.directoryUrl, bed.world(world), 10);
  client.account = await client.newAccount(KEY, { contact: [] });
  return client;
}

/** The order once it is no longer `status`. */
async function leaving(status: Order["status"], bed: Bed, client: AcmeClient, order: Order): Promise<Order> {
  const deadline = new Date(bed.ca.now.getTime() + 180_000);
  for await (const current of client.watch("watch the order", order, deadline)) {
    if (current.status !== status) return current;
  }
  assert.fail(`${status} for ever`);
}

/** An order that is ready, its challenges answered by hand. */
async function ready(bed: Bed, client: AcmeClient, name = NAME): Promise<Order> {
  const order = await client.newOrder([name]);
  if (order.status !== "pending") return order;
  const authorization = await client.getAuthorization(order.authorizations[0]!);
  const challenge = authorization.challenges.find(({ type }) => type === "http-01")!;
  const { token } = challenge;
  Deno.writeTextFileSync(join(bed.drop, token), keyAuthorization(token, client.account.key));
  await client.respondToChallenge(authorization, challenge);
  return await leaving("pending", bed, client, order);
}

/** The whole way to a chain of certificates. */
async function obtain(bed: Bed, client: AcmeClient, name = NAME): Promise<string> {
  let order = await ready(bed, client, name);
  order = await client.finalizeOrder(order, (await createCsr(CERTIFICATE_KEY, [name])).der);
  order = await leaving("processing", bed, client, order);
  for await (const chain of client.downloadChains(order)) return chain;
  assert.fail("no chain");
}

/** The AcmeError with which `promise` must end. */
async function failure(promise: Promise<unknown>): Promise<AcmeError> {
  const error = await promise.then(() => assert.fail("succeeded"), (error) => error);
  assert(error instanceof AcmeError, error);
  return error;
}

const asked = ({ ca }: Bed, resource: Exchange["resource"]) =>
  ca.log.filter((entry) => entry.resource === resource).length;
const PEM = /^-----BEGIN CERTIFICATE-----/;

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
    bed.ca.switches.fault = ({ resource }) => {
      const times = met.get(resource) ?? 0;
      met.set(resource, times + 1);
      return times < most ? fault : undefined;
    };
    assert.match(await obtain(bed, await connect(bed)), PEM);
    assert.equal(met.size, 9, [...met.keys()].join());
    assert.equal(bed.ca.issued.length, 1);
  });
}

const LAGGING: readonly [Exchange["resource"], Fault][] = [
  ["authz", refusing(404, "malformed", "no such authorization")],
  ["challenge", refusing(404, "malformed", "no such challenge")],
  ["order", refusing(404, "malformed", "no such order")],
  ["finalize", refusing(404, "malformed", "no such order")],
  ["finalize", refusing(403, "orderNotReady", "the order is pending")],
  ["certificate", refusing(404, "malformed", "no such certificate")],
  ["newOrder", refusing(400, "accountDoesNotExist", "who are you?")],
  ["authz", refusing(400, "accountDoesNotExist", "who are you?")],
];
for (const [resource, fault] of LAGGING) {
  const { status, body } = fault as { status: number; body: string };
  Deno.test(`a replica that lags, saying ${status} ${JSON.parse(body).type.split(":").at(-1)} at ${resource}, is asked again within seconds`, async () => {
    await using bed = await faultyBed({ processingMs: 5 });
    const client = await connect(bed);
    bed.ca.switches.fault = befalling(resource, fault, 3);
    assert.match(await obtain(bed, client), PEM);
    assert(bed.waits.reduce((sum, ms) => sum + ms, 0) < 6000);
    bed.ca.switches.fault = befalling(resource, fault, Infinity);
    const before = asked(bed, resource);
    assert.equal(
      (await failure(obtain(bed, client, "other.example.com"))).problem?.detail,
      JSON.parse(body).detail,
    );
    assert(asked(bed, resource) - before <= 6);
  });
}

Deno.test("an account that is remembered and that the CA does not know is an error at once, without another try", async () => {
  await using bed = await testBed({});
  const client = await connect(bed);
  client.account = { key: KEY, url: `${bed.ca.origin}/account/99` };
  assert.equal((await failure(client.newOrder([NAME]))).problem?.type, "accountDoesNotExist");
  assert.deepEqual([asked(bed, "newOrder"), bed.waits], [1, []]);
  bed.ca.violations.splice(0);
});

for (
  const [resource, orders] of [["newAccount", 1], ["newOrder", 2], ["challenge", 1], ["finalize", 1]] as const
) {
  for (const kind of ["reset", "reset mid-body"] as const) {
    Deno.test(`the answer of ${resource} can be lost (${kind})`, async () => {
      const lost = { kind: "after", fault: { kind } } as const;
      await using bed = await testBed({ ca: { fault: befalling(resource, lost), processingMs: 20 } });
      assert.match(await obtain(bed, await connect(bed)), PEM);
      assert.deepEqual([bed.ca.accounts.length, bed.ca.orders.length, bed.ca.issued.length], [1, orders, 1]);
    });
  }
}

Deno.test("an answer to a challenge that had arrived, and is refused the second time, is no error; one that had not is", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  const faults: Fault[] = [
    { kind: "after", fault: { kind: "reset" } },
    refusing(400, "malformed", "the challenge is not pending"),
  ];
  bed.ca.switches.fault = ({ resource }) => resource === "challenge" ? faults.shift() : undefined;
  assert.match(await obtain(bed, client), PEM);
  bed.ca.switches.fault = befalling("challenge", refusing(400, "malformed", "what?"), Infinity);
  const error = await failure(obtain(bed, client, "other.example.com"));
  assert.deepEqual([error.step, error.message], ["answer a challenge", "what? (malformed)"]);
});

// ---- waiting -----------------------------------------------------------------------------------------------------

Deno.test("an order is polled no sooner than Retry-After allows, while it is validated and while it is issued", async () => {
  // a poll that comes too soon is a violation; the first of the issuance heeds what finalize said
  await using bed = await testBed({ ca: { retryAfterSeconds: 3, validationDelayMs: 50, processingMs: 100 } });
  await obtain(bed, await connect(bed));
  assert(bed.waits.filter((ms) => ms > 200 && ms <= 4000).length >= 2, `${bed.waits}`);
});

for (const retryAfterSeconds of [86_400, 600, undefined]) {
  Deno.test(`an order is polled in growing pauses up to the deadline, and once then, with Retry-After: ${retryAfterSeconds}`, async () => {
    await using bed = await testBed({ ca: { processingMs: Infinity } });
    const client = await connect(bed, { random: () => 0.5 });
    const order = await ready(bed, client);
    bed.ca.switches.retryAfterSeconds = retryAfterSeconds;
    const finalized = await client.finalizeOrder(order, (await createCsr(CERTIFICATE_KEY, [NAME])).der);
    bed.waits.length = 0;
    const begun = bed.ca.now.getTime();
    let last = 0;
    for await (const { status } of client.watch("wait", finalized, new Date(begun + 180_000))) {
      assert.equal(status, "processing");
      last = bed.ca.now.getTime() - begun;
    }
    assert.deepEqual(bed.waits.slice(0, 7), [20, 60, 180, 540, 1620, 4860, 5000]);
    assert(last >= 180_000 && last < 181_000, `the last poll was at ${last} ms`);
    bed.ca.violations.splice(0); // it would be too late otherwise
  });
}

// ---- a hostile CA ------------------------------------------------------------------------------------------------

for (
  const [what, fault, message] of [
    ["HTML", { kind: "html" }, /^not JSON but text\/html$/],
    ["410", { kind: "status", status: 410, contentType: "text/plain" }, /^HTTP status 410 \(text\/plain\)$/],
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
  Deno.test(`${what} for a directory is an error that names its URL`, async () => {
    await using bed = await testBed({ ca: { fault: befalling("directory", fault, Infinity) } });
    const error = await failure(connect(bed));
    assert.equal(error.step, `read the directory ${bed.ca.directoryUrl}`);
    assert.match(error.message, message);
    assert.equal(asked(bed, "directory"), 1);
  });
}

Deno.test("404 is asked again, a few times within a second, but not of what need not be", async () => {
  const notFound: Fault = { kind: "status", status: 404, contentType: "text/plain" };
  await using bed = await faultyBed();
  const client = await connect(bed);
  for (const resource of ["directory", "newOrder"] as const) {
    const before = asked(bed, resource);
    bed.ca.switches.fault = befalling(resource, notFound, Infinity);
    const asking = resource === "directory" ? connect(bed) : client.newOrder([NAME]);
    assert.equal((await failure(asking)).message, "HTTP status 404 (text/plain)");
    assert.equal(asked(bed, resource) - before, 3);
  }
  bed.ca.switches.fault = befalling("renewalInfo", notFound, Infinity);
  await failure(client.renewalInfo("AAAA.AAAA"));
  assert.equal(asked(bed, "renewalInfo"), 1);
});

const challenges = (
  body: Record<string, unknown>,
  change: (challenge: Record<string, unknown>) => unknown,
) => ({ ...body, challenges: (body.challenges as Record<string, unknown>[]).map(change) });
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
  ["newOrder", "authorization", (body, url) => ({ ...body, authorizations: [url] })],
  ["newOrder", "finalize", (body, url) => ({ ...body, finalize: url })],
  ["authz", "challenge", (body, url) => challenges(body, (challenge) => ({ ...challenge, url }))],
  ["finalize", "certificate", (body, url) => ({ ...body, certificate: url })],
];
for (const [resource, what, put] of PLACES) {
  Deno.test(`a ${what} URL that is not the CA's, or no URL, is refused and not asked`, async () => {
    await using bed = await faultyBed();
    const client = await connect(bed);
    for (const [i, bad] of BAD_URLS.entries()) {
      const url = typeof bad === "function" ? bad(bed.ca.origin) : bad;
      const begun = bed.ca.log.length;
      bed.ca.switches.fault = befalling(resource, { kind: "rewrite", rewrite: (body) => put(body, url) });
      const error = await failure(obtain(bed, client, `n${i}.example.com`));
      assert.match(error.message, /^the CA named an unusable URL "/, `${url}`);
      // deno-lint-ignore no-control-regex
      assert.doesNotMatch(error.message + error.url, /[\x00-\x1f\x7f]/);
      assert(bed.ca.log.slice(begun).every(({ resource }) => resource !== "unknown"), `${url} was asked`);
    }
  });
}

Deno.test("a Location that is not the CA's is refused", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  for (const location of ["http://localhost/order/1", "https://attacker.example/order/1", "order/1"]) {
    const order = { status: "ready", authorizations: [], finalize: `${bed.ca.origin}/order/1/finalize` };
    bed.ca.switches.fault = befalling("newOrder", {
      kind: "status",
      status: 201,
      contentType: "application/json",
      headers: { location },
      body: JSON.stringify(order),
    });
    const error = await failure(client.newOrder([NAME]));
    assert.equal(error.message, `the CA named an unusable URL ${JSON.stringify(location)}`);
  }
});

Deno.test("more authorizations than names are refused", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  bed.ca.switches.fault = befalling("newOrder", {
    kind: "rewrite",
    rewrite: (body) => ({ ...body, authorizations: Array(1200).fill((body.authorizations as string[])[0]) }),
  });
  assert.equal((await failure(client.newOrder([NAME]))).message, "the CA asks for 1200 authorizations");
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
    `.${good}`,
    `$(touch ${good})`,
    `${good}=`,
    "A".repeat(21),
    "A".repeat(201),
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

Deno.test("challenges are read as far as they are known: types that are not, and how dns-persist-01 names CA and account", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  bed.ca.switches.fault = befalling("authz", {
    kind: "rewrite",
    rewrite: (body) =>
      challenges(body, (one) => one.type === "tls-alpn-01" ? { ...one, type: "x-02", token: "a b" } : one),
  });
  const order = await client.newOrder([NAME]);
  const { challenges: offered } = await client.getAuthorization(order.authorizations[0]!);
  assert.deepEqual(
    offered.map(({ type, token }) => [type, token.length]),
    [["x-02", 0], ["dns-persist-01", 0], ["dns-01", 43], ["http-01", 43]],
  );
  const { issuerDomainNames, accountUri } = offered[1]!;
  assert.deepEqual([issuerDomainNames, accountUri], [["ca.example"], client.account.url]);
});

Deno.test("a certificate that is none, or that the order does not name, is an error", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed);
  bed.ca.switches.fault = befalling("certificate", { kind: "html" });
  assert.equal((await failure(obtain(bed, client))).message, "not a certificate but text/html");
  const rewrite = ({ certificate: _, ...body }: Record<string, unknown>) => body;
  bed.ca.switches.fault = befalling("finalize", { kind: "rewrite", rewrite });
  assert.equal((await failure(obtain(bed, client))).message, "the order names no certificate");
});
