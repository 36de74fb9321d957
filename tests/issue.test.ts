/** Goal: a line of domains becomes its certificates in few requests, or fails alone and says why. */

import assert from "node:assert/strict";
import { createPrivateKey, createPublicKey, generateKeyPairSync, X509Certificate } from "node:crypto";
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

Deno.test("a line of one name costs 7 requests for its first key type and 4 for its second", async () => {
  await using bed = await testBed({ domains: NAME, ca: { processingMs: 5 } });
  const { requests } = await bed.run(punctual(bed));
  const { directory, newNonce, newAccount, ...rest } = counts(requests);
  assert.deepEqual([directory, newNonce, newAccount], [1, 1, 1]);
  assert.deepEqual(rest, { newOrder: 2, authz: 1, challenge: 1, order: 1 + 2, finalize: 2, certificate: 2 });
});

Deno.test("a line of 100 names costs 2 requests a name and 5 for its first key type, 4 for its second", async () => {
  await using bed = await testBed({ domains: names(100).join(" "), ca: { processingMs: 5 } });
  const { requests, code, stderr } = await bed.run(punctual(bed));
  assert.equal(code, 0, stderr);
  const { directory, newNonce, newAccount, ...rest } = counts(requests);
  assert.deepEqual([directory, newNonce, newAccount], [1, 1, 1]);
  assert.deepEqual(rest, {
    newOrder: 2,
    authz: 100,
    challenge: 100,
    order: 1 + 2,
    finalize: 2,
    certificate: 2,
  });
});

Deno.test("many lines share directory, account and connection, and need a nonce for each line in flight", async () => {
  await using bed = await testBed({ domains: names(12).join("\n"), settings: "keyTypes: ec" });
  const { requests, code } = await bed.run({ parallel: 4 });
  assert.equal(code, 0);
  const { directory, newNonce, newAccount } = counts(requests);
  assert.deepEqual([directory, newAccount], [1, 1]);
  assert(newNonce! <= 4, `${newNonce} nonces`);
  assert.equal(new Set(requests.map(({ connection }) => connection)).size, 1);
  assert.equal(bed.ca.issued.length, 12);
});

Deno.test("a later run asks for no account, and for no proof of names that the CA still takes for proven", async () => {
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

  const { mtime } = await Deno.stat(bed.drop);
  for (const file of Deno.readDirSync(bed.path("test/cert"))) {
    Deno.removeSync(bed.path("test/cert", file.name));
  }
  const { requests, code } = await bed.run();
  assert.equal(code, 0);
  assert.deepEqual(counts(requests), { directory: 1, newNonce: 1, newOrder: 1, finalize: 1, certificate: 1 });
  assert.deepEqual((await Deno.stat(bed.drop)).mtime, mtime);
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

Deno.test("the second key type is not asked for where the first could not be validated, and the error is told once", async () => {
  const resolve = () => {
    throw new Error("NXDOMAIN");
  };
  await using bed = await testBed({ domains: NAME, ca: { resolve } });
  const ran = await bed.run();
  assert.equal(ran.code, 1);
  assert.equal(counts(ran.requests).newOrder, 1);
  assert.deepEqual(failures(ran), [`${NAME}: cannot look up ${NAME}: NXDOMAIN (dns)`]);
  assert.match(ran.stderr, /^FAILED {2}example\.com \((rsa, ec|ec, rsa)\)\n/);
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

// ---- refusals ----------------------------------------------------------------------------------------------------

const SUBPROBLEMS = ["a.example.com", "b.example.com"].map((value) => ({
  type: "urn:ietf:params:acme:error:caa",
  detail: `forbidden by the CAA of ${value}`,
  identifier: { type: "dns", value },
}));
const TOLD = "a.example.com: forbidden by the CAA of a.example.com (caa); " +
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

/** The fault, for polls of an order that has been finalized. */
function onceFinalized(fault: Fault): Switches["fault"] {
  let finalized = false;
  return ({ resource }) => {
    finalized ||= resource === "finalize";
    return finalized && resource === "order" ? fault : undefined;
  };
}

for (
  const [what, ca, step, message] of [
    [
      "created",
      { fault: befalling("newOrder", refused) },
      "create an order",
      `two names (compound); ${TOLD}`,
    ],
    [
      "created, and born invalid",
      { fault: befalling("newOrder", { kind: "rewrite", rewrite: invalid }) },
      "issue",
      `two names (compound); ${TOLD}`,
    ],
    [
      "validated",
      {
        resolve() {
          throw new Error("SERVFAIL");
        },
      },
      "validate",
      "a.example.com: cannot look up a.example.com: SERVFAIL (dns); " +
      "b.example.com: cannot look up b.example.com: SERVFAIL (dns)",
    ],
    [
      "validated, for a reason that is not a challenge's",
      { fault: befalling("order", { kind: "rewrite", rewrite: invalid }) },
      "validate",
      `two names (compound); ${TOLD}`,
    ],
    [
      "validated, for no reason",
      { fault: befalling("order", put({ status: "invalid" })) },
      "validate",
      "the order became invalid",
    ],
    [
      "finalized",
      { fault: befalling("finalize", refused) },
      "finalize the order",
      `two names (compound); ${TOLD}`,
    ],
    [
      "finalized, and invalid then",
      { fault: befalling("finalize", { kind: "rewrite", rewrite: invalid }) },
      "issue",
      `two names (compound); ${TOLD}`,
    ],
    [
      "finalized, and ready still",
      { fault: befalling("finalize", put({ status: "ready" })) },
      "issue",
      "the order is ready after it was finalized",
    ],
    [
      "issued",
      {
        processingMs: 20,
        fault: onceFinalized({ kind: "rewrite", rewrite: invalid }),
      },
      "issue",
      `two names (compound); ${TOLD}`,
    ],
    [
      "downloaded",
      { fault: befalling("certificate", refusing(404, "malformed", "gone")) },
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

Deno.test("names that the CA's policy rejects are told each with its reason", async () => {
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
    const [told] = failures(await bed.run());
    assert(told?.startsWith(message), told);
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

Deno.test("where the CA has forgotten the account and wants no other, every line says so and the run ends well", async () => {
  await using bed = await oneCertificate();
  await bed.run();
  const state = bed.text("test/state.json").replace("/account/1", "/account/99");
  await Deno.writeTextFile(bed.path("test/state.json"), state);
  bed.configure({ domains: "a.example.com\nb.example.com" });
  bed.ca.switches.fault = befalling("newAccount", refusing(403, "unauthorized", "no new accounts"), Infinity);
  const ran = await bed.run();
  assert.deepEqual([failures(ran), ran.code], [Array(2).fill("no new accounts (unauthorized)"), 1]);
  assert.equal(counts(ran.requests).newAccount, 1);
  bed.ca.violations.splice(0); // it was asked under the remembered account
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
  const [cert, key] = [
    `test/cert/${NAME}-cert-combined.prime256v1.test.pem`,
    `test/key/${NAME}-key.prime256v1.test.pem`,
  ];
  const publicKey = createPublicKey(createPrivateKey(bed.text(key)));
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
    const before = [bed.text(cert), bed.text(key)];
    ca.advance(80 * DAY);
    ca.switches.fault = befalling("certificate", { kind: "rewrite text", rewrite });
    const ran = await bed.run({ retry: true });
    assert.equal(ran.code, 1, what);
    assert.match(failures(ran)[0]!, message, what);
    assert.deepEqual([bed.text(cert), bed.text(key)], before, what);

    ca.switches.fault = undefined;
    assert.equal((await bed.run({ retry: true })).code, 0, what);
    assert.notEqual(bed.text(cert), before[0]);
    assert.equal(new X509Certificate(bed.text(cert)).serialNumber, ca.issued.at(-1)!.serial);
  }
});

Deno.test("a certificate that cannot be put in its place is not ordered again by every run", async () => {
  await using bed = await oneCertificate();
  await Deno.mkdir(bed.path(`test/cert/${NAME}-cert-combined.prime256v1.test.pem/x`), { recursive: true });
  const codes = [(await bed.run()).code, (await bed.run()).code];
  assert.deepEqual([codes, bed.ca.issued.length], [[1, 1], 1]);
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
