/** Goal: requests reach the CA whatever the day is like, it is asked no more than it takes, and nothing that it sends does harm. */

import assert from "node:assert/strict";
import { generateKeyPairSync, type KeyObject } from "node:crypto";
import { AcmeClient } from "../lib/acme.ts";
import { AcmeError, describe, importKey, linksOf, parseRetryAfter } from "../lib/http.ts";
import { oneLine } from "../lib/names.ts";
import { type Bed, befalling, refusing, testBed, type TestWorld } from "./bed.ts";
import type { Exchange, Fault, Switches } from "./ca.ts";

const ecKey = (namedCurve: string) => generateKeyPairSync("ec", { namedCurve }).privateKey;
const pem = (key: KeyObject, type: "pkcs8" | "pkcs1" | "sec1" = "pkcs8") =>
  key.export({ type, format: "pem" }).toString();
const KEY = await importKey(pem(ecKey("P-256")));
const NAME = "example.com";

/** A CA whose faults can be set as a test goes on. */
const faultyBed = (ca: Switches = {}) => testBed({ ca: { fault: () => undefined, ...ca } });

/** A conversation under a new account. */
async function connect(bed: Bed, world: Partial<TestWorld> = {}, key = KEY): Promise<AcmeClient> {
  const client = await AcmeClient.connect(bed.ca.directoryUrl, bed.world(world), 10);
  client.account = await client.newAccount(key, { contact: [] });
  return client;
}

/** The AcmeError with which `promise` must end. */
async function failure(promise: Promise<unknown>): Promise<AcmeError> {
  const error = await promise.then(() => assert.fail("succeeded"), (error) => error);
  assert(error instanceof AcmeError, error);
  return error;
}

const asked = ({ ca }: Bed, resource: Exchange["resource"]) =>
  ca.log.filter((entry) => entry.resource === resource).length;
const numbered = (count: number) => Array.from({ length: count }, (_, i) => `n${i}.example.com`);

// ---- keys --------------------------------------------------------------------------------------------------------

Deno.test("importKey() takes RSA and the three curves in each of their forms, and the CA takes what they sign", async () => {
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

Deno.test("importKey() throws where there is no key that can sign, and never shows it", async () => {
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

for (
  const [what, refused, extra] of [
    [
      "every nonce is refused once",
      (() => {
        const seen = new Set<string>();
        return ({ url }: Exchange) => seen.size < seen.add(url).size;
      })(),
      2,
    ],
    ["every second request is refused", ({ n }: Exchange) => n % 2 === 0, 2],
    ["nonces are refused in a burst of 29", ({ n }: Exchange) => n >= 5 && n < 34, 29],
  ] as const
) {
  Deno.test(`orders are made though ${what}, without a pause`, async () => {
    const fault = (exchange: Exchange): Fault | undefined =>
      exchange.method === "POST" && refused(exchange) ? { kind: "badNonce" } : undefined;
    await using bed = await testBed({ ca: { fault } });
    const client = await connect(bed);
    for (const name of numbered(4)) await client.newOrder([name]);
    assert(bed.ca.log.filter(({ status }) => status === 400).length >= extra);
    assert.deepEqual([asked(bed, "newNonce"), bed.waits], [1, []]);
  });
}

Deno.test("a refused nonce is known for one where the problem is sent as application/json", async () => {
  const refused = { ...refusing(400, "badNonce", "again"), contentType: "application/json" } as Fault;
  await using bed = await testBed({ ca: { fault: befalling("newOrder", refused) } });
  assert.equal((await (await connect(bed)).newOrder([NAME])).status, "pending");
});

Deno.test("a CA that takes no nonce at all is asked 30 times, not for ever", async () => {
  await using bed = await testBed({ ca: { fault: befalling("newAccount", { kind: "badNonce" }, Infinity) } });
  assert.equal((await failure(connect(bed))).problem?.type, "badNonce");
  assert.equal(asked(bed, "newAccount"), 30);
});

Deno.test("nonces that come with answers are used again: no more are asked for than requests are made at once", async () => {
  await using bed = await testBed({});
  const client = await connect(bed);
  for (let round = 0; round < 2; round++) {
    await Promise.all(numbered(40).map((name) => client.newOrder([name])));
  }
  assert(asked(bed, "newNonce") <= 20, `${asked(bed, "newNonce")} nonces`);
});

Deno.test("answers without Replay-Nonce cost a request for a nonce each, and nothing else", async () => {
  const fault = ({ method }: Exchange): Fault | undefined =>
    method === "POST" ? { kind: "drop header", name: "replay-nonce" } : undefined;
  await using bed = await testBed({ ca: { fault } });
  const client = await connect(bed);
  for (const name of numbered(3)) await client.newOrder([name]);
  assert.deepEqual([asked(bed, "newNonce"), bed.ca.log.length], [4, 9]);
});

// ---- a bad day ---------------------------------------------------------------------------------------------------

Deno.test("pauses between tries grow threefold, and the fourth failure goes up", async () => {
  await using bed = await faultyBed();
  const client = await connect(bed, { random: () => 0.5 });
  const fault: Fault = { kind: "status", status: 500, contentType: "text/plain" };
  bed.ca.switches.fault = befalling("newOrder", fault, Infinity);
  const error = await failure(client.newOrder([NAME]));
  assert.deepEqual([error.step, error.message], ["create an order", "HTTP status 500 (text/plain)"]);
  assert.deepEqual(bed.waits, [500, 1500, 4500]);
  assert.equal(asked(bed, "newOrder"), 4);
});

Deno.test("a CA that cannot be reached is an error that says why, after four tries; or after one, in a hurry", async () => {
  await using bed = await testBed({});
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const url = `https://127.0.0.1:${listener.addr.port}/dir`;
  listener.close();
  for (const [hurry, pauses] of [[true, 0], [false, 3]] as const) {
    const error = await failure(AcmeClient.connect(url, bed.world(), 10, { hurry }));
    assert.equal(error.step, `read the directory ${url}`);
    assert.match(error.message, /Connection refused/);
    assert.equal(bed.waits.length, pauses);
  }
});

Deno.test("a CA whose own certificate is not trusted leads to caBundle", async () => {
  await using bed = await testBed({});
  const error = await failure(AcmeClient.connect(bed.ca.directoryUrl, bed.world({ fetch }), 10));
  assert.match(error.message, /UnknownIssuer; the root of the CA's own certificate belongs in caBundle$/);
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

Deno.test("the signal ends a conversation while a try is awaited, and while an answer is", async () => {
  for (const fault of [{ kind: "status", status: 500 }, { kind: "silence" }] as Fault[]) {
    await using bed = await faultyBed();
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

const NOW = new Date("2026-10-18T20:00:00Z");
Deno.test("parseRetryAfter() takes seconds and dates within a day, and nothing else", () => {
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

for (
  const [header, heeded] of [["2", true], ["a date", true], ["31", false], ["99999999999", false]] as const
) {
  Deno.test(`Retry-After: ${header} of a 503 is ${heeded ? "waited for" : "left to a later run"}`, async () => {
    await using bed = await faultyBed();
    const client = await connect(bed);
    const value = header === "a date" ? new Date(Date.now() + 10_000).toUTCString() : header;
    const headers = { "retry-after": value };
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
      assert.deepEqual([seconds, bed.waits], [Math.min(Number(header), 86_400), []]);
    }
  });
}

// ---- limits ------------------------------------------------------------------------------------------------------

const slowDown = refusing(429, "rateLimited", "slow down", { headers: { "retry-after": "3" } });

Deno.test("no more than 20 requests are made at once, and no more than twice as many as there are lines at once", async () => {
  for (const [parallel, most] of [[3, 6], [40, 20]] as const) {
    await using bed = await testBed({});
    let [now, peak] = [0, 0];
    const { fetch } = bed.world();
    const counting: TestWorld["fetch"] = async (url, init) => {
      peak = Math.max(peak, ++now);
      return await fetch(url, init).finally(() => now--);
    };
    const client = await AcmeClient.connect(bed.ca.directoryUrl, bed.world({ fetch: counting }), parallel);
    client.account = await client.newAccount(KEY, { contact: [] });
    await Promise.all(numbered(60).map((name) => client.newOrder([name])));
    assert.equal(peak, most);
  }
});

Deno.test("a CA that limits requests for ever is asked now and then by one of many who wait, not by each of them", async () => {
  for (const resource of ["newNonce", "newOrder"] as const) {
    await using bed = await faultyBed();
    const client = await connect(bed);
    bed.ca.switches.fault = befalling(resource, slowDown, Infinity);
    const before = asked(bed, resource);
    const results = await Promise.allSettled(numbered(50).map((name) => client.newOrder([name])));
    const refused = results.filter((result) => result.status === "rejected");
    assert(refused.length > 0);
    for (const { reason } of refused) assert.equal(reason.problem.type, "rateLimited");
    const tries = asked(bed, resource) - before;
    assert(tries <= (resource === "newNonce" ? 20 : 50) + 9, `${tries} requests`);
  }
});

Deno.test("who was turned away by a limit on requests a second comes back in turn", async () => {
  await using bed = await testBed({ ca: { limits: { requestsPerSecond: { newOrder: 5 } } } });
  const client = await connect(bed, { sleep: leaping(bed) });
  await Promise.all(numbered(60).map((name) => client.newOrder([name])));
  assert.equal(bed.ca.orders.length, 60);
  const refused = bed.ca.log.filter(({ status }) => status === 429).length;
  assert(refused <= 60 + 60 / 5, `${refused} refused: each once, then one a second`);
});

/** All who wait for the same moment share one leap of the clock. */
function leaping({ ca }: Bed): TestWorld["sleep"] {
  return async (ms) => {
    const until = ca.now.getTime() + ms;
    await new Promise((resolve) => setTimeout(resolve, 2));
    ca.advance(Math.max(0, until - ca.now.getTime()));
  };
}

// ---- answers that are none ---------------------------------------------------------------------------------------

const json = (body: string, headers = {}): Fault => ({
  kind: "status",
  status: 201,
  contentType: "application/json",
  headers,
  body,
});
for (
  const [what, fault, message] of [
    ["410", { kind: "status", status: 410, contentType: "text/html" }, /^HTTP status 410 \(text\/html\)$/],
    ["501", { kind: "status", status: 501, contentType: "text/html" }, /^HTTP status 501 \(text\/html\)$/],
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
    [
      "userActionRequired",
      {
        ...refusing(403, "userActionRequired", "terms have changed", {
          headers: { link: '</terms/v8>;rel="terms-of-service", </dir>;rel="index"' },
        }),
        body: JSON.stringify({
          type: "urn:ietf:params:acme:error:userActionRequired",
          detail: "terms have changed",
          instance: "https://ca.example/agree?to=v8",
        }),
      },
      /^terms have changed \(userActionRequired\), see https:\/\/ca\.example\/agree\?to=v8, see https:\/\/localhost:\d+\/terms\/v8$/,
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
    assert.deepEqual([asked(bed, "newOrder"), bed.waits], [1, []]);
  });
}

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
  assert.equal(
    (await failure(client.newOrder([NAME]))).message,
    `${CLEAN} (${CLEAN}); ${CLEAN}: ${CLEAN} (${CLEAN}); b.example.com: no such name (dns)`,
  );
  const contentType = "text/ht\tml\x80x; charset=\u00ff";
  bed.ca.switches.fault = befalling("newOrder", { kind: "status", status: 400, contentType });
  assert.equal((await failure(client.newOrder([NAME]))).message, "HTTP status 400 (text/ht ml x)");
});

Deno.test("a problem can be strange, nested without end or huge, and is shown within bounds", async () => {
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
      ['{"instance":"javascript:alert(1)"}', /^no detail \(about:blank\)$/],
      ["null", /^HTTP status 400/],
      ["[]", /^no detail \(about:blank\)$/],
    ] as const
  ) {
    bed.ca.switches.fault = befalling("newOrder", { kind: "status", status: 400, body });
    const { message } = await failure(client.newOrder([NAME]));
    assert.match(message, start);
    assert(message.length <= 20_001, `${message.length} characters`);
  }
});

Deno.test("linksOf() reads a Link header, be it ever so long, in no time", () => {
  const links = (link: string) =>
    linksOf({ headers: new Headers({ link }), text: "" }, "alternate", "https://ca.example/c/1");
  assert.deepEqual(
    links(
      '<https://ca.example/dir>;rel="index", </c/2>; rel="alternate";x=1,<https://a.example/3>;rel=alternate',
    ),
    ["https://ca.example/c/2", "https://a.example/3"],
  );
  assert.deepEqual(links('</c/2>;rel="alternates", </c/3>;x="rel=alternate"'), []);
  const begun = performance.now();
  for (const piece of ["<", "<x", "<>;", "<>;;rel", ", <", "<a>;rel=alternate,"]) {
    links(piece.repeat(100_000));
  }
  assert(performance.now() - begun < 1000);
});

Deno.test("oneLine() makes any text one line of bounded length, without what cannot be seen", () => {
  for (
    const [text, clean] of [
      ["plain text, ümläuts, 日本語, 👍", "plain text, ümläuts, 日本語, 👍"],
      ["  a\tb\r\nc\0d  ", "a b c d"],
      ["\x1b[31mred\x1b[0m", "[31mred [0m"],
      ["a\u202eb\u2066c\u200bd\u2029e\ud800f", "a b c d e f"],
      ["x".repeat(2001), `${"x".repeat(2000)}…`],
    ] as const
  ) {
    assert.equal(oneLine(text), clean);
  }
});

Deno.test("describe() shows a problem with its links, its subproblems and whom they are about", () => {
  assert.equal(
    describe({
      type: "compound",
      detail: "cannot validate",
      links: ["https://ca.example/why"],
      subproblems: [
        { type: "dns", detail: "NXDOMAIN", identifier: "a.example.com", links: [], subproblems: [] },
        { type: "unauthorized", detail: "", identifier: "b.example.com", links: [], subproblems: [] },
      ],
    }),
    "cannot validate (compound), see https://ca.example/why; a.example.com: NXDOMAIN (dns); " +
      "b.example.com: no detail (unauthorized)",
  );
});
