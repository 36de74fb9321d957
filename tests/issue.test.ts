/** Goal: the certificates of a line are issued with few requests; a failure affects that line alone, and its cause is reported. */

import assert from "node:assert/strict";
import { createPrivateKey, X509Certificate } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { generateKey } from "../lib/x509.ts";
import { type Bed, faultAt, type Ran, refusing, testBed, until } from "./bed.ts";
import type { Exchange, Fault, LogEntry, Order, Switches } from "./ca.ts";

const DAY = 86_400_000;
const NAME = "example.com";
const CERT = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;
const KEY = `test/key/${NAME}-key.prime256v1.test.pem`;
const PENDING_KEY = `test/key/.${NAME}-key.prime256v1.test.pem.pending`;

type Resource = Exchange["resource"];

/** How many requests each resource got. */
function counts(requests: readonly LogEntry[]): Partial<Record<Resource, number>> {
  const counted: Partial<Record<Resource, number>> = {};
  for (const { resource } of requests) counted[resource] = (counted[resource] ?? 0) + 1;
  return counted;
}

const isValidating = ({ authorizations }: Order) =>
  authorizations.some(({ challenges }) => challenges.some(({ status }) => status === "processing"));

/** Replaces each wait by one for the CA to finish, so that everything takes exactly one poll. */
function waitingForCa({ ca }: Bed) {
  const isBusy = (order: Order) =>
    order.status === "processing" ? performance.now() < order.doneAt! : isValidating(order);
  return { sleep: () => until("the CA is done", () => !ca.orders.some(isBusy)) };
}

/** Advances the clock instead of waiting, except for 25 ms during a validation; for a CA that never finishes. */
function skippingWaits({ ca }: Bed) {
  return {
    async sleep(ms: number) {
      await delay(ca.orders.some(isValidating) ? 25 : 0);
      ca.advance(ms);
    },
  };
}

/** The messages of the failures of a run. */
function failures({ events }: Ran): string[] {
  return events.flatMap((event) => event.kind === "failed" ? [event.error.message] : []);
}

/** A bed for one EC certificate, whose CA can be given faults. */
function oneCertificate(ca: Switches = {}, domains = NAME): Promise<Bed> {
  return testBed({ domains, settings: "keyTypes: ec", ca: { fault: () => undefined, ...ca } });
}

const names = (count: number) => Array.from({ length: count }, (_, i) => `n${i}.example.com`);

// ---- requests ----------------------------------------------------------------------------------------------------

Deno.test("a new certificate takes the requests of RFC 8555, in that order, and no more", async () => {
  await using bed = await oneCertificate({ processingMs: 5 });
  const { requests, code } = await bed.run(waitingForCa(bed));
  assert.equal(code, 0);
  assert.equal(
    requests.map(({ resource }) => resource).join(" "),
    "directory newNonce newAccount newOrder authz challenge order finalize order certificate",
  );
  assert.equal(new Set(requests.map(({ connection }) => connection)).size, 1);
});

// at most 20 requests at once, and at most twice the number of lines at once
for (const [count, parallel, most] of [[1, 10, 2], [12, 3, 6], [100, 40, 20]] as const) {
  Deno.test(`a line of ${count} names, RSA and EC, takes 2 requests per name and 9 per line, up to ${most} at once`, async () => {
    await using bed = await testBed({ domains: names(count).join(" "), ca: { processingMs: 5 } });
    let [now, peak] = [0, 0];
    const { fetch } = bed.context();
    const { requests, code, stderr } = await bed.run({
      parallel,
      ...waitingForCa(bed),
      fetch: (url, init) => {
        peak = Math.max(peak, ++now);
        return fetch(url, init).finally(() => now--);
      },
    });
    assert.equal(code, 0, stderr);
    const { directory, newNonce, newAccount, ...rest } = counts(requests);
    assert.deepEqual([directory, newAccount, newNonce! <= most], [1, 1, true]);
    const expected = {
      newOrder: 2,
      authz: count,
      challenge: count,
      order: 1 + 2,
      finalize: 2,
      certificate: 2,
    };
    assert.deepEqual(rest, expected);
    assert(peak === most || count === 1, `${peak} at once`);
    assert.deepEqual(bed.ca.issued.map(({ keyType }) => keyType).sort(), ["ec", "rsa"]);
  });
}

Deno.test("all lines share the directory, the account, the connection and the nonces", async () => {
  await using bed = await testBed({ domains: names(12).join("\n"), settings: "keyTypes: ec" });
  const { requests, code } = await bed.run({ parallel: 4 });
  const { directory, newNonce, newAccount } = counts(requests);
  assert.deepEqual([code, directory, newAccount, newNonce! <= 4], [0, 1, 1, true]);
  assert.equal(new Set(requests.map(({ connection }) => connection)).size, 1);
  assert.equal(bed.ca.issued.length, 12);
});

Deno.test("a later run registers no account, and validates no name whose authorization is still valid", async () => {
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

Deno.test("RSA and EC certificates are issued by a CA that reuses no authorization", async () => {
  await using bed = await testBed({ domains: NAME, ca: { reuse: "none" } });
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual([bed.ca.validations.length, bed.dropped()], [2, []]);
});

Deno.test("the second key type is not ordered if validation failed for the first, and the error is reported once", async () => {
  await using bed = await testBed({ domains: NAME, ca: { resolve: lost } });
  const ran = await bed.run();
  assert.deepEqual([ran.code, counts(ran.requests).newOrder], [1, 1]);
  assert.deepEqual(failures(ran), [`${NAME}: cannot look up ${NAME}: NXDOMAIN (dns)`]);
  assert.match(ran.stderr, /^FAILED +example\.com \((rsa, ec|ec, rsa)\)\n/);
});

Deno.test("the second key type is issued even if the first is refused after validation", async () => {
  const fault = faultAt("finalize", refusing(400, "badCSR", "no RSA today"));
  await using bed = await testBed({ domains: NAME, ca: { fault } });
  const ran = await bed.run();
  assert.deepEqual([failures(ran), ran.code], [["no RSA today (badCSR)"], 1]);
  assert.equal(bed.ca.issued.length, 1);
});

// ---- profiles and addresses --------------------------------------------------------------------------------------

Deno.test("a line is ordered with the profile of its section, else of [config], else the default of the CA", async () => {
  const actions = "[a]\ndomains: a.example\nprofile: tlsserver\n";
  await using bed = await testBed({ domains: "a.example\nb.example", actions });
  for (const [settings, expected] of [["", "classic"], ["profile: shortlived", "shortlived"]] as const) {
    bed.configure({ settings: `keyTypes: ec\n${settings}` });
    assert.equal((await bed.run({ named: { renew: ["a.example", "b.example"] } })).code, 0);
    const profiles = bed.ca.issued.slice(-2).map(({ names, profile }) => `${names} ${profile}`);
    assert.deepEqual(profiles.sort(), ["a.example tlsserver", `b.example ${expected}`]);
  }
  for (const [profiles, offered] of [[undefined, "classic, tlsserver, shortlived"], [{}, "none"]] as const) {
    await Deno.remove(bed.path("test"), { recursive: true });
    bed.ca.switches.profiles = profiles;
    bed.configure({ settings: "keyTypes: ec", actions: actions.replace("tlsserver", "tlsclient") });
    const ran = await bed.run();
    assert.deepEqual([ran.code, failures(ran)], [1, [
      `the CA has no profile "tlsclient"; it offers: ${offered}`,
    ]]);
    assert.equal(bed.ca.orders.at(-1)!.identifiers[0]!.value, "b.example", "the other line is ordered");
    bed.configure({ actions: "" });
    assert.equal((await bed.run()).code, 0, "no back-off, since the CA was not asked");
  }
});

Deno.test("IP addresses are self-checked and certified, without a common name, and kept by the next run", async () => {
  const domains = "192.0.2.1 2001:DB8:0::7\nmail.example 192.0.2.2";
  await using bed = await testBed({ domains, settings: "keyTypes: ec\nprofile: shortlived" });
  const log = join(bed.home, "log");
  bed.configure({ actions: `[default]\nprepare: ["echo DOMAIN >> ${log}; cat"]` });
  const prepared = (host: string) => existsSync(log) && Deno.readTextFileSync(log).split("\n").includes(host);
  const checked = new Set<string>();
  const { code, stderr } = await bed.run({
    async route(host) {
      checked.add(host);
      await until(`prepare has run for ${host}`, () => prepared(host));
      return [{ address: "127.0.0.1", port: bed.web.port }];
    },
  });
  assert.deepEqual([code, stderr], [0, ""]);
  assert.deepEqual(checked, new Set(["192.0.2.1", "2001:db8::7", "192.0.2.2", "mail.example"]));
  const requested = bed.ca.orders.map(({ request }) => {
    const { identifiers, commonNames } = request!;
    return `${identifiers.map(({ type, value }) => `${type} ${value}`).join(", ")}; CN ${commonNames}`;
  });
  assert.deepEqual(requested.sort(), [
    "dns mail.example, ip 192.0.2.2; CN mail.example",
    "ip 192.0.2.1, ip 2001:db8::7; CN ",
  ]);
  const files = [...Deno.readDirSync(bed.path("test/cert"))].filter(({ isFile }) => isFile);
  assert.deepEqual(files.map(({ name }) => name).sort(), [
    "192.0.2.1_2001-db8--7-cert-combined.prime256v1.test.pem",
    "mail.example_192.0.2.2-cert-combined.prime256v1.test.pem",
  ]);
  assert.match((await bed.run()).stdout, /^nothing due, 2 kept/m);
});

// ---- keys --------------------------------------------------------------------------------------------------------

/** Renews the certificate. */
const reissue = (bed: Bed) => bed.run({ named: { renew: [NAME] } });

Deno.test("a key of the configured type is used again, unless alwaysGenerateNewKeys is set", async () => {
  await using bed = await oneCertificate();
  const keyOf = async (settings: string) => {
    bed.configure({ settings });
    assert.equal((await reissue(bed)).code, 0);
    return bed.text(KEY);
  };
  const first = await keyOf("keyTypes: ec");
  assert.equal(await keyOf("keyTypes: ec"), first);
  const second = await keyOf("keyTypes: ec\nalwaysGenerateNewKeys: yes");
  assert.notEqual(second, first);
  const third = await keyOf("keyTypes: ec\ncurve: secp384r1\ncurveTag: prime256v1");
  assert.equal(createPrivateKey(third).asymmetricKeyDetails?.namedCurve, "secp384r1");
  const rsa = bed.path(`test/key/${NAME}-key.rsa2048.test.pem`);
  await Deno.writeTextFile(rsa, third);
  bed.configure({ settings: "keyTypes: rsa" });
  await bed.run();
  const { asymmetricKeyType } = createPrivateKey(Deno.readTextFileSync(rsa));
  assert.equal(asymmetricKeyType, "rsa", "a key of another type is replaced");
});

Deno.test("an unreadable RSA key does not prevent the EC certificate", async () => {
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
    bed.ca.switches.fault = faultAt("finalize", refusing(400, type, "the key is on a list of weak keys"));
    assert.equal((await reissue(bed)).code, 0);
    const second = bed.text(KEY);
    assert.deepEqual([second !== blocked, bed.ca.orders.length], [true, 2]);
    await Deno.writeTextFile(bed.path(KEY), blocked);
    await reissue(bed);
    assert(![blocked, second].includes(bed.text(KEY)));
  });
}

Deno.test("a key is kept if the CA refuses the CSR with every key", async () => {
  await using bed = await oneCertificate();
  await bed.run();
  const key = bed.text(KEY);
  bed.ca.switches.fault = faultAt("finalize", refusing(400, "badCSR", "not on a Friday"), Infinity);
  assert.deepEqual(failures(await reissue(bed)), ["not on a Friday (badCSR)"]);
  bed.ca.switches.fault = undefined;
  await reissue(bed);
  assert.equal(bed.text(KEY), key);
});

// ---- orders that the CA does not finish --------------------------------------------------------------------------

/** The number of unfinished orders in state.json, and whether there is a pending key. */
function unfinished(bed: Bed): [orders: number, key: boolean] {
  return [Object.keys(bed.state().orders).length, existsSync(bed.path(PENDING_KEY))];
}

for (const [what, settings] of [["a new key", "alwaysGenerateNewKeys: yes"], ["the same key", ""]] as const) {
  Deno.test(`an order that the CA has not finished in time is continued by the next run, with ${what}`, async () => {
    await using bed = await testBed({ domains: NAME, settings: `keyTypes: ec\n${settings}` });
    await bed.run();
    const live = bed.text(KEY);
    bed.ca.switches.processingMs = Infinity;
    const slow = await bed.run({ named: { renew: [NAME] }, ...skippingWaits(bed) });
    assert.deepEqual(failures(slow), ["order still processing after 180 s; the next run goes on with it"]);
    assert.deepEqual([unfinished(bed), bed.text(KEY)], [[1, settings !== ""], live]);

    bed.ca.orders.at(-1)!.doneAt = 0;
    const { code, requests, stderr } = await reissue(bed);
    assert.deepEqual([code, stderr], [0, ""]);
    assert.deepEqual(counts(requests), { directory: 1, newNonce: 1, order: 1, certificate: 1 });
    assert.deepEqual([unfinished(bed), bed.ca.orders.length], [[0, false], 2]);
    assert.equal(new X509Certificate(bed.text(CERT)).serialNumber, bed.ca.issued[1]!.serial);
    assert.equal(bed.text(KEY) === live, settings === "");
  });
}

Deno.test("a certificate whose download failed is downloaded by the next run", async () => {
  for (const fault of [refusing(404, "malformed", "gone"), { kind: "reset" } as const]) {
    await using bed = await oneCertificate({ fault: faultAt("certificate", fault, Infinity) });
    assert.equal((await bed.run(skippingWaits(bed))).code, 1);
    assert.deepEqual(unfinished(bed), [1, true]);
    bed.ca.switches.fault = undefined;
    assert.equal((await bed.run({ retry: true })).code, 0);
    assert.deepEqual([unfinished(bed), bed.ca.issued.length], [[0, false], 1]);
  }
});

Deno.test("an order that was interrupted while the CA processed it is continued by the next run", async () => {
  const stop = new AbortController();
  await using bed = await oneCertificate({ processingMs: Infinity });
  bed.ca.switches.fault = ({ resource }) => {
    // the interruption comes during the wait after this answer
    if (resource === "order" && bed.ca.orders[0]!.status === "processing") {
      stop.abort(new DOMException("interrupted", "AbortError"));
    }
    return undefined;
  };
  await assert.rejects(bed.run({ signal: stop.signal }), { name: "AbortError" });
  assert.deepEqual(unfinished(bed), [1, true]);
  bed.ca.orders[0]!.doneAt = 0;
  assert.equal((await bed.run()).code, 0);
  assert.deepEqual([unfinished(bed), bed.ca.orders.length], [[0, false], 1]);
});

Deno.test("an unfinished order is replaced if it is invalid, unknown to the CA or a week old, or its key or account is lost", async () => {
  const table: [string, (bed: Bed) => unknown][] = [
    ["it is invalid", ({ ca }) => ca.orders[0]!.status = "invalid"],
    ["it is unknown to the CA", ({ ca }) => {
      const gone = refusing(404, "malformed", "no such order");
      ca.switches.fault = ({ url }) => url === ca.orders[0]!.url ? gone : undefined;
    }],
    ["it is a week old", ({ ca }) => ca.advance(8 * DAY)],
    ["its key is lost", (bed) => Deno.remove(bed.path(PENDING_KEY))],
    ["its account is lost", (bed) => Deno.remove(bed.path("account.key.test"))],
  ];
  for (const [what, lose] of table) {
    await using bed = await oneCertificate({ processingMs: Infinity });
    await bed.run(skippingWaits(bed));
    bed.ca.switches.processingMs = 0;
    bed.ca.orders[0]!.doneAt = 0;
    await lose(bed);
    const ran = await bed.run({ retry: true });
    assert.equal(ran.code, 0, `${what}: ${ran.stderr}`);
    assert.deepEqual([bed.ca.orders.length, unfinished(bed)], [2, [0, false]], what);
  }
});

Deno.test("a certificate that cannot be written is not ordered again, but downloaded again", async () => {
  await using bed = await oneCertificate();
  await Deno.mkdir(bed.path(CERT, "x"), { recursive: true });
  const codes = [(await bed.run()).code, (await bed.run()).code, (await bed.run({ retry: true })).code];
  assert.deepEqual([codes, bed.ca.issued.length], [[1, 1, 1], 1]);
  await Deno.remove(bed.path(CERT), { recursive: true });
  assert.deepEqual([(await bed.run({ retry: true })).code, bed.ca.issued.length], [0, 1]);
  assert.equal(new X509Certificate(bed.text(CERT)).serialNumber, bed.ca.issued[0]!.serial);
});

Deno.test("an order that is still ready although a lagging replica reported it as processing is finalized again", async () => {
  const wrongAnswers: [Resource, Fault][] = [
    ["finalize", refusing(403, "orderNotReady", "a replica lags")],
    ["order", put({ status: "processing" })],
  ];
  let ready = false;
  await using bed = await oneCertificate({
    fault: ({ resource }) => {
      ready ||= resource === "finalize";
      return ready && wrongAnswers[0]?.[0] === resource ? wrongAnswers.shift()![1] : undefined;
    },
  });
  const { code, stderr, requests } = await bed.run();
  assert.deepEqual([code, stderr, wrongAnswers.length], [0, "", 0]);
  assert.equal(counts(requests).finalize, 2);
});

// ---- failed validations ------------------------------------------------------------------------------------------

function lost(): never {
  throw new Error("NXDOMAIN");
}

for (const failure of ["order", "authorization", "challenge"] as const) {
  Deno.test(`a failed validation is reported soon and with its cause by a CA that shows it in the ${failure}`, async () => {
    await using bed = await oneCertificate({ resolve: lost, failure }, `${NAME} www`);
    const started = bed.ca.now.getTime();
    const ran = await bed.run();
    const all = [`${NAME}`, `www.${NAME}`].map((name) => `${name}: cannot look up ${name}: NXDOMAIN (dns)`);
    assert.deepEqual([ran.code, failures(ran)], [1, [all.join("; ")]]);
    const seconds = (bed.ca.now.getTime() - started) / 1000;
    assert(seconds < { order: 5, authorization: 15, challenge: 60 }[failure], `${seconds} s`);
    assert.deepEqual(bed.dropped(), []);
  });
}

Deno.test("a challenge that is still pending after a failed validation is responded to again until it is valid", async () => {
  let misses = 3;
  const resolve = () => misses-- > 0 ? lost() : { hostname: "127.0.0.1", port: bed.web.port };
  await using bed: Bed = await oneCertificate({ resolve, failure: "challenge" });
  const { code, requests } = await bed.run();
  assert.deepEqual([code, counts(requests).challenge], [0, 4]);
});

Deno.test("an order that stays pending fails after three minutes", async () => {
  await using bed = await oneCertificate({ validationDelayMs: 600_000 });
  assert.deepEqual(failures(await bed.run(skippingWaits(bed))), ["order still pending after 180 s"]);
  assert.deepEqual([bed.dropped(), unfinished(bed)], [[], [0, false]]);
});

// ---- refusals ----------------------------------------------------------------------------------------------------

const SUBPROBLEMS = ["a.example.com", "b.example.com"].map((value) => ({
  type: "urn:ietf:params:acme:error:caa",
  detail: `forbidden by the CAA of ${value}`,
  identifier: { type: "dns", value },
}));
const MESSAGE = "two names (compound); a.example.com: forbidden by the CAA of a.example.com (caa); " +
  "b.example.com: forbidden by the CAA of b.example.com (caa)";
const COMPOUND = {
  type: "urn:ietf:params:acme:error:compound",
  detail: "two names",
  subproblems: SUBPROBLEMS,
};
const refused = refusing(403, "compound", "two names", { subproblems: SUBPROBLEMS });

/** Replaces members of the answer. */
function put(more: Record<string, unknown>): Fault {
  return { kind: "rewrite", rewrite: (body) => ({ ...body, ...more }) };
}
const invalid = put({ status: "invalid", error: COMPOUND });

/** The fault, injected into finalize and later polls of the order. */
function finalizedThen(fault: Fault): Switches["fault"] {
  let finalized = false;
  return ({ resource }) => {
    finalized ||= resource === "finalize";
    return finalized && (resource === "order" || resource === "finalize") ? fault : undefined;
  };
}

const REFUSALS: readonly [string, Switches["fault"], string, string][] = [
  ["created", faultAt("newOrder", refused), "create an order", MESSAGE],
  ["created, and is invalid at once", faultAt("newOrder", invalid), "issue the order", MESSAGE],
  [
    "validated, for a reason other than a challenge",
    faultAt("order", invalid),
    "validate the order",
    MESSAGE,
  ],
  [
    "validated, without a reason",
    faultAt("order", put({ status: "invalid" })),
    "validate the order",
    "the order became invalid, and the CA gives no reason",
  ],
  ["finalized", faultAt("finalize", refused), "finalize the order", MESSAGE],
  ["finalized, and becomes invalid", finalizedThen(invalid), "issue the order", MESSAGE],
  [
    "finalized, and stays ready",
    finalizedThen(put({ status: "ready", certificate: undefined })),
    "issue the order",
    "order still ready after 180 s; the next run goes on with it",
  ],
  [
    "downloaded",
    faultAt("certificate", refusing(404, "malformed", "gone"), Infinity),
    "download the certificate",
    "gone (malformed)",
  ],
];
for (const [what, fault, step, message] of REFUSALS) {
  Deno.test(`an order that cannot be ${what}, fails with the message of the CA and leaves no challenge file`, async () => {
    await using bed = await oneCertificate({ fault }, "a.example.com b.example.com");
    const ran = await bed.run(skippingWaits(bed));
    assert.deepEqual([ran.code, failures(ran)], [1, [message]]);
    assert(ran.stderr.includes(`cannot ${step}: ${message}`), ran.stderr);
    assert.deepEqual(bed.dropped(), []);
  });
}

Deno.test("an authorization for another name, or one that is not pending, is an error, and its challenge gets no response", async () => {
  await using bed = await oneCertificate();
  for (
    const [more, message] of [
      ...["invalid", "deactivated", "expired", "revoked"].map((status) =>
        [{ status }, `the authorization of ${NAME} is ${status}`] as const
      ),
      [{ identifier: { type: "dns", value: "bank.example" } }, "the CA asks for bank.example, which"],
      [{ wildcard: true }, `the CA asks for *.${NAME}, which was not ordered`],
      [{ identifier: { type: "dns", value: "\x1b[2Jx\n" } }, "the CA asks for [2jx, which"],
      [{ identifier: null }, "not an authorization"],
      [{ status: "enlightened" }, "not an authorization"],
    ] as const
  ) {
    bed.ca.switches.fault = faultAt("authz", put(more));
    const [found] = failures(await bed.run({ retry: true }));
    assert(found?.startsWith(message), found);
    assert.equal(counts(bed.ca.log).challenge, undefined);
    assert.deepEqual(bed.dropped(), []);
  }
  bed.ca.switches.fault = faultAt("authz", put({ identifier: { type: "dns", value: "Example.COM" } }));
  assert.equal((await bed.run({ retry: true })).code, 0, "capital letters do not matter");
});

// ---- certificates that do not match the order --------------------------------------------------------------------

Deno.test("a certificate that does not match the order is rejected, and the old certificate and key stay", async () => {
  await using bed = await oneCertificate();
  const { ca } = bed;
  await bed.run();
  const before = [bed.text(CERT), bed.text(KEY)];
  const forge = async (key: string, life = 90 * DAY) => {
    const notBefore = new Date(ca.now.getTime() - DAY);
    return await ca.forge(key, [NAME], { notBefore, notAfter: new Date(ca.now.getTime() + life) });
  };
  const stranger = await generateKey({ type: "ec", curve: "P-256" });
  // what else can be wrong with a chain is in x509.test.ts
  const table: [string, (chain: string) => string | Promise<string>, RegExp][] = [
    ["another key", () => forge(stranger), /another key/],
    [
      "thirty seconds of validity",
      () => forge(bed.text(KEY), 30_000),
      /this host's clock says \S+, the CA's \S+$/,
    ],
    ["half a certificate", (chain) => chain.slice(0, chain.length / 4), /no certificate in the answer/],
    ["megabytes", (chain) => chain.repeat(1000), /more than 1048576 bytes/],
  ];
  for (const [what, rewrite, message] of table) {
    ca.advance(80 * DAY);
    ca.switches.fault = faultAt("certificate", { kind: "rewrite text", rewrite });
    const ran = await bed.run({ retry: true });
    assert.equal(ran.code, 1, what);
    assert.match(failures(ran)[0]!, message, what);
    assert.deepEqual([bed.text(CERT), bed.text(KEY)], before, what);
  }
  ca.switches.fault = undefined;
  assert.equal((await bed.run({ retry: true })).code, 0);
  assert.equal(new X509Certificate(bed.text(CERT)).serialNumber, ca.issued.at(-1)!.serial);
});

Deno.test("a chain without an issuer is accepted, since the issuer may be a root, and noted", async () => {
  const rewrite = (chain: string) => chain.slice(0, chain.indexOf("-----END") + 26);
  await using bed = await oneCertificate({
    fault: faultAt("certificate", { kind: "rewrite text", rewrite }),
  });
  const { code, stdout } = await bed.run();
  assert.equal(code, 0);
  assert.match(stdout, /^note .*no certificate of an issuer for example\.com/m);
});

// ---- faults ------------------------------------------------------------------------------------------------------

const STEPS = "directory newNonce newAccount newOrder authz challenge order finalize certificate".split(" ");
// broken connections are in acme.test.ts
for (const kind of ["truncate", "html", "repeat"] as const) {
  Deno.test(`after one fault (${kind}) at any step and a run without faults, the certificate is issued`, async () => {
    await using bed = await oneCertificate();
    for (const [i, step] of STEPS.entries()) {
      bed.configure({ domains: `n${i}.example.com` });
      bed.ca.switches.fault = faultAt(step as Resource, { kind });
      const { code } = await bed.run();
      assert.deepEqual(bed.dropped(), [], step);
      bed.ca.switches.fault = undefined;
      if (code !== 0) assert.equal((await bed.run({ retry: true })).code, 0, step);
      assert.equal(bed.ca.issued.at(-1)!.names[0], `n${i}.example.com`);
      await Deno.remove(bed.path("test"), { recursive: true });
    }
    assert(bed.ca.orders.length <= 2 * STEPS.length, "more than one superfluous order per line");
    if (kind === "repeat") bed.ca.violations.splice(0); // repeated answers bring nonces that were used before
  });
}
