/** Goal: the certificates of a line are issued with few requests; a failure affects that line alone, and its cause is reported. */

import assert from "node:assert/strict";
import { createPrivateKey, X509Certificate } from "node:crypto";
import { existsSync } from "node:fs";
import { likeLetsEncrypt, runUntilDone } from "./bench.ts";
import { type Bed, faultAt, type Ran, refusing, testBed, until } from "./bed.ts";
import type { Exchange, Fault, Order, Resource, Switches } from "./ca.ts";

const DAY = 86_400_000;
const NAME = "example.com";
const CERT = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;
const KEY = `test/key/${NAME}-key.prime256v1.test.pem`;

/** How many requests each resource got. */
function counts(requests: readonly Exchange[]): Partial<Record<Resource, number>> {
  const counted: Partial<Record<Resource, number>> = {};
  for (const { resource } of requests) counted[resource] = (counted[resource] ?? 0) + 1;
  return counted;
}

/** The messages of the failures of a run. */
function failures({ events }: Ran): string[] {
  return events.flatMap((event) => event.kind === "failed" ? [event.error.message] : []);
}

const oneCertificate = (ca: Switches = {}, domains = NAME) =>
  testBed({ domains, settings: "keyTypes: ec", ca });

/** Each wait ends as soon as the CA has finished what it does, and the clock is advanced. */
function quick({ ca, waits }: Bed) {
  const isBusy = ({ status, doneAt, authorizations }: Order) =>
    status === "processing" && doneAt! < Infinity && performance.now() < doneAt! ||
    authorizations.some(({ challenges }) => challenges.some(({ status }) => status === "processing"));
  return {
    async sleep(ms: number) {
      waits.push(ms);
      await until("the CA has finished", () => !ca.orders.some(isBusy));
      ca.advance(ms);
    },
  };
}

/** Renews the certificate. */
const reissue = (bed: Bed) => bed.run({ named: { renew: [NAME] }, ...quick(bed) });

/** Replaces members of the answer. */
const put = (more: object): Fault => ({ kind: "rewrite", rewrite: (body) => ({ ...body, ...more }) });

const after = (fault: Fault): Fault => ({ kind: "after", fault });

const numbered = (count: number) => Array.from({ length: count }, (_, i) => `n${i}.example.com`);

Deno.test("a line with RSA and EC takes 2 requests per name and 9 per line, up to 20 or two per line at once", async () => {
  for (const [count, parallel, most] of [[12, 3, 6], [40, 40, 20]] as const) {
    await using bed = await testBed({ domains: numbered(count).join(" "), ca: { processingMs: 5 } });
    let [now, peak] = [0, 0];
    const { fetch } = bed.context();
    const { requests, code } = await bed.run({
      parallel,
      ...quick(bed),
      fetch: (url, init) => {
        peak = Math.max(peak, ++now);
        return fetch(url, init).finally(() => now--);
      },
    });
    const { newNonce, ...rest } = counts(requests);
    assert.equal(code, 0);
    assert(newNonce! <= most, `${newNonce} nonces`);
    assert(peak <= most && peak > most / 2, `${peak} requests at once`);
    const perLine = { newOrder: 2, order: 1 + 2, finalize: 2, certificate: 2 };
    assert.deepEqual(rest, { directory: 1, newAccount: 1, authz: count, challenge: count, ...perLine });
    assert.deepEqual(bed.ca.issued.map(({ keyType }) => keyType).sort(), ["ec", "rsa"]);
  }
});

Deno.test("lines share account, connection and nonces; a name that is still authorized is not validated again", async () => {
  const names = numbered(8);
  await using bed = await oneCertificate({}, names.join("\n"));
  const first = await bed.run({ parallel: 4 });
  const { directory, newNonce, newAccount } = counts(first.requests);
  assert.deepEqual([first.code, directory, newAccount, newNonce! <= 8], [0, 1, 1, true]);
  assert.equal(new Set(first.requests.map(({ connection }) => connection)).size, 1);
  bed.act(`[default]\nprepare: ["exit 7"]`);
  const second = await bed.run({ parallel: 4, named: { renew: names } });
  assert.deepEqual([second.code, second.stderr], [0, ""]);
  const { newNonce: _, ...rest } = counts(second.requests);
  assert.deepEqual(rest, { directory: 1, renewalInfo: 8, newOrder: 8, finalize: 8, certificate: 8 });
});

Deno.test("40 lines at 10 orders in three hours take four runs without a superfluous order, the soonest expiry first", async () => {
  const orders = 10, parallel = 8;
  const names = numbered(40);
  const limits = likeLetsEncrypt(orders);
  await using bed = await testBed({ settings: "keyTypes: ec\nari: no", ca: { limits } });
  bed.configure({ domains: names.slice(-10).join("\n") });
  await bed.plant({ age: 85 });
  bed.configure({ domains: names.join("\n") });
  const refused = await runUntilDone(bed, parallel);
  assert.deepEqual([refused.length, bed.ca.orders.length], [4, 40]);
  assert(Math.max(...refused) <= parallel, `refused: ${refused}`);
  assert(Math.max(...bed.waits) <= 30_000, "no run waits for the limit to pass");
  const first = bed.ca.issued.slice(0, orders).filter(({ names: [name] }) => names.indexOf(name!) >= 30);
  assert(first.length > orders - parallel, `${first.length} of the last lines in the first run`);
});

Deno.test("a transient error at every step delays the certificate but does not prevent it", async () => {
  const table = [
    [{ kind: "refuse" }, 1], // breaks the next connection as well
    [{ kind: "reset mid-body" }, 2],
    [refusing(429, "rateLimited", "slow down", { headers: { "retry-after": "1" } }), 2],
    [after({ kind: "reset" }), 2],
    [after({ kind: "status", status: 503, contentType: "text/html", body: "<h1>busy</h1>" }), 2],
  ] as const;
  for (const [fault, most] of table) {
    const met = new Map<string, number>();
    await using bed = await oneCertificate({
      fault({ resource }) {
        const times = met.get(resource) ?? 0;
        met.set(resource, times + 1);
        return times < most ? fault : undefined;
      },
    });
    const { code, stderr } = await bed.run(quick(bed));
    assert.deepEqual([code, stderr, met.size], [0, "", 9], JSON.stringify(fault));
    assert.deepEqual([bed.ca.accounts.length, bed.ca.issued.length], [1, 1]);
  }
});

// ---- key types, profiles, keys -----------------------------------------------------------------------------------

Deno.test("a certificate is issued even if the one of the other key type is refused, or the key of that cannot be read", async () => {
  const fault = faultAt("finalize", refusing(400, "badCSR", "no RSA today"));
  await using bed = await testBed({ domains: "other.example", ca: { fault } });
  const refused = await bed.run();
  assert.deepEqual([refused.code, failures(refused)], [1, ["no RSA today (badCSR)"]]);
  bed.configure({ domains: NAME });
  await Deno.mkdir(bed.path(`test/key/${NAME}-key.rsa2048.test.pem`));
  const unreadable = await bed.run();
  assert.equal(unreadable.code, 1);
  assert.match(failures(unreadable).join(), /^(EISDIR|Is a directory)/);
  assert.deepEqual(bed.ca.issued.map(({ names }) => names[0]), ["other.example", NAME]);
});

Deno.test("a line whose profile the CA does not offer is not ordered, and the error lists those that it offers", async () => {
  await using bed = await oneCertificate();
  bed.configure({ settings: "keyTypes: ec\nprofile: tlsclient" });
  const ran = await bed.run();
  const message = 'the CA has no profile "tlsclient"; it offers: classic, tlsserver, shortlived';
  assert.deepEqual([ran.code, failures(ran), bed.ca.orders.length], [1, [message], 0]);
});

Deno.test("a key of the configured type is used again, unless alwaysGenerateNewKeys is set", async () => {
  await using bed = await oneCertificate();
  const keyAfter = async (settings: string, key = KEY) => {
    bed.configure({ settings });
    assert.equal((await reissue(bed)).code, 0);
    return bed.text(key);
  };
  const first = await keyAfter("keyTypes: ec");
  assert.equal(await keyAfter("keyTypes: ec"), first);
  assert.notEqual(await keyAfter("keyTypes: ec\nalwaysGenerateNewKeys: yes"), first);
  const other = await keyAfter("keyTypes: ec\ncurve: secp384r1\ncurveTag: prime256v1");
  assert.equal(createPrivateKey(other).asymmetricKeyDetails!.namedCurve, "secp384r1");
  const slot = `test/key/${NAME}-key.rsa2048.test.pem`;
  await Deno.writeTextFile(bed.path(slot), other);
  assert.equal(createPrivateKey(await keyAfter("keyTypes: rsa", slot)).asymmetricKeyType, "rsa");
});

Deno.test("a key that the CA refuses is replaced and never used again; it is kept if the CA refuses every key", async () => {
  for (const type of ["badPublicKey", "badCSR"]) {
    await using bed = await oneCertificate();
    await bed.run();
    const blocked = bed.text(KEY);
    bed.ca.switches.fault = faultAt("finalize", refusing(400, type, "the key is on a list of weak keys"));
    const { code, requests } = await reissue(bed);
    assert.deepEqual([code, counts(requests).newOrder], [0, 1]);
    const second = bed.text(KEY);
    await Deno.writeTextFile(bed.path(KEY), blocked);
    await reissue(bed);
    const third = bed.text(KEY);
    assert.equal(new Set([blocked, second, third]).size, 3);
    bed.ca.switches.fault = faultAt("finalize", refusing(400, type, "not on a Friday"), Infinity);
    assert.deepEqual(failures(await reissue(bed)), [`not on a Friday (${type})`]);
    bed.ca.switches.fault = undefined;
    await reissue(bed);
    assert.equal(bed.text(KEY), third);
  }
});

// ---- orders that the CA does not finish --------------------------------------------------------------------------

/** The number of unfinished orders in state.json, and whether there is a pending key. */
function unfinished(bed: Bed): [orders: number, key: boolean] {
  const pendingKey = `test/key/.${NAME}-key.prime256v1.test.pem.pending`;
  return [Object.keys(bed.state().orders).length, existsSync(bed.path(pendingKey))];
}

Deno.test("an order that is not finished or downloaded in time is continued by the next run; until then the old key stays", async () => {
  for (const what of ["processing", "interrupted", "not found"]) {
    await using bed = await oneCertificate();
    await bed.run();
    const old = bed.text(KEY);
    bed.configure({ settings: "keyTypes: ec\nalwaysGenerateNewKeys: yes" });
    if (what === "processing") bed.ca.switches.processingMs = Infinity;
    const stop = new AbortController();
    bed.ca.switches.fault = ({ resource }) => {
      if (resource !== "certificate") return undefined;
      if (what === "interrupted") stop.abort();
      return what === "not found" ? refusing(404, "malformed", "gone") : undefined;
    };
    const ran = bed.run({ named: { renew: [NAME] }, signal: stop.signal, ...quick(bed) });
    if (what === "interrupted") await assert.rejects(ran, { name: "AbortError" });
    else assert.equal((await ran).code, 1, what);
    assert.deepEqual([unfinished(bed), bed.text(KEY)], [[1, true], old], what);

    bed.ca.switches.fault = undefined;
    bed.ca.orders[1]!.doneAt = 0;
    const { code, requests } = await reissue(bed);
    assert.equal(code, 0, what);
    const { newNonce: _, renewalInfo: __, ...rest } = counts(requests);
    assert.deepEqual(rest, { directory: 1, order: 1, certificate: 1 });
    assert.deepEqual([unfinished(bed), bed.text(KEY) !== old], [[0, false], true]);
    assert.equal(new X509Certificate(bed.text(CERT)).serialNumber, bed.ca.issued[1]!.serial);
  }
});

Deno.test("a certificate that cannot be written is not ordered again, but put in place by a later run", async () => {
  await using bed = await oneCertificate();
  await Deno.mkdir(bed.path(CERT, "x"), { recursive: true });
  for (let time = 0; time < 3; time++) assert.equal((await bed.run({ retry: true })).code, 1);
  await Deno.remove(bed.path(CERT), { recursive: true });
  assert.equal((await bed.run({ retry: true })).code, 0);
  assert.deepEqual([unfinished(bed), bed.ca.orders.length], [[0, false], 1]);
});

Deno.test("an unfinished order is replaced if it is invalid, unknown to the CA or a week old, or its key or account is lost", async () => {
  const gone = refusing(404, "malformed", "no such order");
  const table: [string, (bed: Bed) => unknown][] = [
    ["it is invalid", ({ ca }) => ca.orders[0]!.status = "invalid"],
    ["it is unknown to the CA", ({ ca }) => ca.switches.fault = faultAt("order", gone, 6)],
    ["it is a week old", ({ ca }) => ca.advance(8 * DAY)],
    ["its key is lost", (bed) => Deno.remove(bed.path(`test/key/.${NAME}-key.prime256v1.test.pem.pending`))],
    ["its account is lost", (bed) => Deno.remove(bed.path("account.key.test"))],
  ];
  for (const [what, lose] of table) {
    await using bed = await oneCertificate({ processingMs: Infinity });
    await bed.run(quick(bed));
    bed.ca.switches.processingMs = 0;
    bed.ca.orders[0]!.doneAt = 0;
    await lose(bed);
    const { code, stderr } = await bed.run({ retry: true, ...quick(bed) });
    assert.equal(code, 0, `${what}: ${stderr}`);
    assert.deepEqual([bed.ca.orders.length, unfinished(bed)], [2, [0, false]], what);
  }
});

Deno.test("C1, C7: an order goes on if replicas lag, problems are plain JSON, or a lost response is refused the second time", async () => {
  const unknown = refusing(404, "malformed", "not on this replica");
  const headers = { "content-type": "application/json" };
  const plain = refusing(400, "badNonce", "another replica has it", { headers });
  const faults: Partial<Record<Resource, Fault[]>> = {
    directory: [unknown],
    newNonce: [unknown],
    newAccount: [unknown, plain],
    newOrder: [unknown, plain, refusing(400, "accountDoesNotExist", "it is new")],
    authz: [put({ challenges: [] }), unknown, plain], // acme2certifier makes challenges later
    challenge: [unknown, plain, after({ kind: "reset" }), refusing(400, "malformed", "it is not pending")],
    order: [put({ status: "pending" }), unknown, plain, put({ status: "processing" })],
    finalize: [unknown, plain, refusing(403, "orderNotReady", "it is pending")],
    certificate: [unknown, plain],
  };
  await using bed = await oneCertificate({ fault: ({ resource }) => faults[resource]?.shift() });
  const { code, stderr } = await bed.run(quick(bed));
  assert.deepEqual([code, stderr, Object.values(faults).flat()], [0, "", []]);
});

// ---- orders that fail --------------------------------------------------------------------------------------------

function lost(): never {
  throw new Error("NXDOMAIN");
}

Deno.test("a failed validation is reported soon and once, wherever the CA shows it, and the other key type is not ordered", async () => {
  for (const [failure, limit] of [["order", 5], ["authorization", 15], ["challenge", 60]] as const) {
    await using bed = await testBed({ domains: `${NAME} www`, ca: { httpPort: lost, failure } });
    const ran = await bed.run(quick(bed));
    const all = [NAME, `www.${NAME}`].map((name) => `${name}: cannot reach ${name}: NXDOMAIN (connection)`);
    assert.deepEqual([ran.code, failures(ran), counts(ran.requests).newOrder], [1, [all.join("; ")], 1]);
    assert.match(ran.stderr, /^FAILED +example\.com \+1 \((rsa, ec|ec, rsa)\)\n/);
    const seconds = bed.waits.reduce((sum, ms) => sum + ms, 0) / 1000;
    assert(seconds < limit, `${failure}: ${seconds} s`);
    assert.deepEqual(bed.dropped(), []);
  }
});

Deno.test("a challenge that is still pending after a failed validation is responded to again until it is valid", async () => {
  let misses = 3;
  const httpPort = () => misses-- > 0 ? lost() : bed.web.port;
  await using bed: Bed = await oneCertificate({ httpPort, failure: "challenge" });
  const { code, requests } = await bed.run(quick(bed));
  assert.deepEqual([code, counts(requests).challenge], [0, 4]);
});

Deno.test("an order that fails at any step fails with the messages of the CA, and leaves no challenge file", async () => {
  const subproblems = ["a", "b"].map((value) => (
    { type: "urn:ietf:params:acme:error:caa", detail: "forbidden", identifier: { type: "dns", value } }
  ));
  const said = "two names (compound); a: forbidden (caa); b: forbidden (caa)";
  const compound = { type: "urn:ietf:params:acme:error:compound", detail: "two names", subproblems };
  const refused = refusing(403, "compound", "two names", { subproblems });
  const invalid = put({ status: "invalid", error: compound });
  const other = { type: "dns", value: "\x1b[2Jx\n" };
  const always = (resource: Resource, fault: Fault) => faultAt(resource, fault, Infinity);
  const sinceFinalize = (fault: Fault) => {
    let injected: Fault | undefined;
    return ({ resource }: Exchange) => injected ??= resource === "finalize" ? fault : undefined;
  };
  const table = [
    [always("newOrder", refused), `create an order: ${said}`],
    [always("newOrder", invalid), `issue the order: ${said}`],
    [always("authz", put({ status: "revoked" })), "read an authorization: the authorization of exam"],
    [always("authz", put({ wildcard: true })), "read an authorization: the CA asks for *.example.com"],
    [always("authz", put({ identifier: other })), "read an authorization: the CA asks for [2jx, which"],
    [always("authz", put({ identifier: null })), "read an authorization: not an authorization"],
    [always("challenge", refusing(400, "malformed", "what?")), "answer a challenge: what? (malformed)"],
    [always("order", invalid), `validate the order: ${said}`],
    [always("order", put({ status: "invalid" })), "validate the order: the order became invalid, and"],
    [always("order", put({ status: "pending" })), "validate the order: order still pending after 180"],
    [always("finalize", refused), `finalize the order: ${said}`],
    [sinceFinalize(invalid), `issue the order: ${said}`],
    [sinceFinalize(put({ status: "ready" })), "issue the order: order still ready after 180 s; the next"],
    [sinceFinalize(put({ certificate: undefined })), "download the certificate: the order names no"],
    [always("certificate", { kind: "html" }), "download the certificate: not a certificate but text"],
  ] as const;
  for (const [fault, expected] of table) {
    await using bed = await oneCertificate({ fault });
    const { code, stderr } = await bed.run(quick(bed));
    assert.equal(code, 1, expected);
    assert(stderr.includes(`cannot ${expected}`), stderr);
    assert.deepEqual(bed.dropped(), []);
  }
});

Deno.test("a certificate that does not match the order is rejected, and the old certificate and key stay", async () => {
  await using bed = await oneCertificate();
  await bed.run();
  const before = [bed.text(CERT), bed.text(KEY)];
  const answered = (rewrite: (chain: string) => string) =>
    faultAt("certificate", { kind: "rewrite text", rewrite });
  // what else can be wrong with a chain is in x509.test.ts
  const clock = /this host's clock says \S+, the CA's \S+$/;
  for (const [newKey, days, message] of [[true, 0, /another key/], [false, 91, clock]] as const) {
    bed.ca.advance(days * DAY);
    bed.ca.switches.fault = answered(() => before[0]!);
    const ran = await bed.run({ named: { renew: [NAME], newKey } });
    assert.match(failures(ran).join(), message);
    assert.deepEqual([ran.code, bed.text(CERT), bed.text(KEY)], [1, ...before]);
  }
  bed.ca.switches.fault = answered((chain) => chain.slice(0, chain.indexOf("-----END") + 26));
  const { code, stdout } = await reissue(bed);
  assert.equal(code, 0);
  assert.match(stdout, /^note .*no intermediate certificate for example\.com/m); // the issuer may be a root
});
