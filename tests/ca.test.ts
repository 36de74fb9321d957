/**
 * The judge judged: tests/ca.ts accepts a correct conversation, and names each mistake by its problem type.
 */
import "reflect-metadata";
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash, generateKeyPairSync, X509Certificate } from "node:crypto";
import { Pkcs10CertificateRequestGenerator, SubjectAlternativeNameExtension } from "@peculiar/x509";
import {
  calculateJwkThumbprint,
  exportJWK,
  type FlattenedJWS,
  FlattenedSign,
  generateKeyPair,
  type JWK,
  type JWTHeaderParameters,
} from "jose";
import {
  type Ca,
  type Exchange,
  type Fault,
  type Identifier,
  startCa,
  startDns,
  startWebroot,
  type Switches,
} from "./ca.ts";

const DAY = 24 * 3600_000;

interface Failure {
  type: string;
  detail: string;
  identifier: Identifier;
  subproblems: Failure[];
}

interface Challenge {
  url: string;
  type: string;
  status: string;
  token: string;
  accounturi?: string;
  "issuer-domain-names"?: string[];
  error?: Failure;
}

/** The members of an order, an authorization, a challenge, an account or a problem, whichever came. */
interface Body extends Challenge, Failure {
  finalize: string;
  authorizations: [string, ...string[]];
  certificate: string;
  profile?: string;
  replaces?: string;
  wildcard?: boolean;
  challenges: [Challenge, ...Challenge[]];
  contact: string[];
  orders: string;
  suggestedWindow: { start: string; end: string };
}

interface Directory {
  newNonce: string;
  newAccount: string;
  newOrder: string;
  revokeCert: string;
  keyChange: string;
  renewalInfo: string;
  meta: { profiles?: Record<string, string>; externalAccountRequired: boolean };
}

interface Reply {
  status: number;
  headers: Headers;
  body: Body;
  text: string;
}

/** A client of a few lines that does as it is told, right or wrong. */
class Client implements Disposable {
  kid?: string;
  nonce = "";
  private constructor(
    readonly ca: Ca,
    readonly http: Deno.HttpClient,
    readonly alg: string,
    public keys: CryptoKeyPair,
    public jwk: JWK,
    readonly directory: Directory,
  ) {}

  static async of(ca: Ca, alg = "ES256"): Promise<Client> {
    const http = Deno.createHttpClient({ caCerts: [ca.caBundle] });
    const directory = await (await fetch(ca.directoryUrl, { client: http })).json();
    const keys = await generateKeyPair(alg, { extractable: true });
    return new Client(ca, http, alg, keys, await exportJWK(keys.publicKey), directory);
  }

  [Symbol.dispose]() {
    this.http.close();
  }

  async fetch(url: string, init: RequestInit = {}): Promise<Reply> {
    const response = await fetch(url, { ...init, client: this.http });
    this.nonce = response.headers.get("replay-nonce") ?? this.nonce;
    const text = await response.text();
    const isJson = response.headers.get("content-type")?.includes("json") ?? false;
    return {
      status: response.status,
      headers: response.headers,
      text,
      body: isJson && text ? JSON.parse(text) : undefined,
    };
  }

  async freshNonce(): Promise<string> {
    if (this.nonce === "") await this.fetch(this.directory.newNonce, { method: "HEAD" });
    const nonce = this.nonce;
    this.nonce = "";
    return nonce;
  }

  async sign(
    payload: unknown,
    header: Record<string, unknown>,
    key = this.keys.privateKey,
  ): Promise<FlattenedJWS> {
    const text = payload === undefined ? "" : JSON.stringify(payload);
    return await new FlattenedSign(new TextEncoder().encode(text)).setProtectedHeader(
      header as JWTHeaderParameters,
    ).sign(key);
  }

  async post(url: string, payload?: unknown, tamper: Tamper = {}): Promise<Reply> {
    const who = this.kid === undefined ? { jwk: this.jwk } : { kid: this.kid };
    const nonce = await this.freshNonce();
    const header: Record<string, unknown> = { alg: this.alg, nonce, url, ...who, ...tamper.header };
    for (const name of tamper.without ?? []) delete header[name];
    const jws = await this.sign(payload, header);
    const headers = { "content-type": "application/jose+json", ...tamper.http };
    return await this.fetch(url, { method: "POST", headers, body: JSON.stringify(tamper.jws?.(jws) ?? jws) });
  }

  async register(extra: object = {}): Promise<Reply> {
    const reply = await this.post(this.directory.newAccount, { termsOfServiceAgreed: true, ...extra });
    this.kid = reply.headers.get("location") ?? undefined;
    return reply;
  }

  order(...names: string[]): Promise<Reply> {
    const identifiers = names.map(identifierOf);
    return this.post(this.directory.newOrder, { identifiers });
  }

  async keyAuthorization(token: string): Promise<string> {
    return `${token}.${await calculateJwkThumbprint(this.jwk)}`;
  }

  /** Polls until the status is another one. */
  async settled(url: string, ...pending: string[]): Promise<Reply> {
    const deadline = Date.now() + 5000;
    for (;;) {
      const reply = await this.post(url);
      if (!pending.includes(reply.body.status)) return reply;
      assert(Date.now() < deadline, `still ${reply.text}`);
    }
  }
}

const isHttp = ({ type }: Challenge) => type === "http-01";

function identifierOf(value: string): { type: "ip" | "dns"; value: string } {
  return { type: /^[\d.]+$|:/.test(value) ? "ip" : "dns", value };
}

interface Tamper {
  header?: Record<string, unknown>;
  without?: string[];
  http?: Record<string, string>;
  jws?: (jws: FlattenedJWS) => unknown;
}

async function csrFor(
  names: string[],
  { commonName = "", alg = "ES256" as string, keys }: {
    commonName?: string;
    alg?: string;
    keys?: CryptoKeyPair;
  } = {},
) {
  keys ??= await generateKeyPair(alg, { extractable: true });
  const csr = await Pkcs10CertificateRequestGenerator.create({
    name: commonName && `CN=${commonName}`,
    keys,
    signingAlgorithm: alg.startsWith("ES")
      ? { name: "ECDSA", hash: "SHA-256" }
      : { name: "RSASSA-PKCS1-v1_5", hash: "SHA-256" },
    extensions: [
      new SubjectAlternativeNameExtension(
        names.map(identifierOf),
      ),
    ],
  });
  return { csr: new Uint8Array(csr.rawData).toBase64({ alphabet: "base64url", omitPadding: true }), keys };
}

/** A CA, a web root and a registered client, with the whole way to a certificate. */
async function scene(switches: Switches = {}) {
  const stack = new AsyncDisposableStack();
  const dir = await Deno.makeTempDir();
  stack.defer(() => Deno.remove(dir, { recursive: true }));
  const web = stack.use(startWebroot(dir));
  const ca = stack.use(await startCa({ httpPort: web.port, ...switches }));
  const client = stack.use(await Client.of(ca));
  await client.register();

  /** Orders and proves by http-01; returns the order as it then stands. */
  async function proven(...names: string[]): Promise<Reply & { url: string }> {
    const order = await client.order(...names);
    assert.equal(order.status, 201, order.text);
    for (const url of order.body.authorizations) {
      const { body } = await client.post(url);
      if (body.status === "valid") continue;
      const challenge = body.challenges.find(isHttp)!;
      await Deno.writeTextFile(
        `${dir}/${challenge.token}`,
        await client.keyAuthorization(challenge.token) + "\n",
      );
      await client.post(challenge.url, {});
    }
    const url = order.headers.get("location")!;
    return { ...await client.settled(url, "pending"), url };
  }

  async function issue(...names: string[]) {
    const order = await proven(...names);
    assert.equal(order.body.status, "ready", order.text);
    const { csr, keys } = await csrFor(names);
    await client.post(order.body.finalize, { csr });
    const done = await client.settled(order.url, "processing");
    return { order: done.body, chain: (await client.post(done.body.certificate)).text, keys };
  }
  return { ca, web, dir, client, proven, issue, [Symbol.asyncDispose]: () => stack.disposeAsync() };
}

Deno.test("a correct client walks from the directory to a certificate that openssl verifies", async () => {
  await using stage = await scene({ chainLength: 2 });
  const { ca, client, issue, dir } = stage;
  const { order, chain } = await issue("example.com", "www.example.com");
  assert.deepEqual([order.status, order.profile], ["valid", "classic"]);

  await Deno.writeTextFile(`${dir}/root.pem`, ca.rootPem);
  await Deno.writeTextFile(`${dir}/chain.pem`, chain);
  const openssl = await new Deno.Command("openssl", {
    args: [
      "verify",
      "-x509_strict",
      "-purpose",
      "sslserver",
      "-verify_hostname",
      "www.example.com",
      "-CAfile",
      "root.pem",
      "-untrusted",
      "chain.pem",
      "chain.pem",
    ],
    cwd: dir,
  }).output();
  assert.equal(
    new TextDecoder().decode(openssl.stdout),
    "chain.pem: OK\n",
    new TextDecoder().decode(openssl.stderr),
  );
  const leaf = new X509Certificate(chain);
  assert.equal(leaf.subjectAltName, "DNS:example.com, DNS:www.example.com");
  assert.equal(leaf.serialNumber, ca.issued[0]!.serial);
  assert.deepEqual(ca.violations, []);
  assert.deepEqual(ca.log.map(({ resource }) => resource).slice(0, 5), [
    "directory",
    "newNonce",
    "newAccount",
    "newOrder",
    "authz",
  ]);
  assert.equal(ca.log.at(-1)!.kid, client.kid);
});

// -------------------------------------------------------------------------------------------------- mistakes

const URN = "urn:ietf:params:acme:error:";

/**
 * Asserts that `reply` is this problem, that it carries a fresh nonce, and whether the client was blamed for
 * it.
 */
function assertProblem({ ca }: { ca: Ca }, reply: Reply, status: number, type: string, blamed = true) {
  assert.deepEqual([reply.status, reply.body?.type], [status, URN + type], reply.text);
  assert.equal(reply.headers.get("content-type"), "application/problem+json");
  assert.deepEqual(ca.violations.splice(0).map(({ type }) => type), blamed ? [type] : []);
}

const flip = (text: string) => (text[0] === "A" ? "B" : "A") + text.slice(1);

Deno.test("a request that breaks RFC 8555 §6 gets its problem, and stands in ca.violations", async () => {
  await using stage = await scene();
  const { ca, client } = stage;
  const { newOrder, newAccount } = client.directory;
  const wish = { identifiers: [{ type: "dns", value: "example.com" }] };
  const used = client.nonce;
  await client.post(newOrder, wish);

  const table: [string, Tamper, number, string][] = [
    ["the wrong content type", { http: { "content-type": "application/json" } }, 415, "malformed"],
    ["no User-Agent", { http: { "user-agent": "" } }, 400, "malformed"],
    ["a nonce used twice", { header: { nonce: used } }, 400, "badNonce"],
    ["a nonce from elsewhere", { header: { nonce: "AAAA" } }, 400, "badNonce"],
    ["a nonce that is not base64url", { header: { nonce: "a+b/" } }, 400, "malformed"],
    ["no nonce", { without: ["nonce"] }, 400, "malformed"],
    ["the URL of another resource", { header: { url: newAccount } }, 403, "unauthorized"],
    ["no URL", { without: ["url"] }, 400, "malformed"],
    ["both jwk and kid", { header: { jwk: client.jwk } }, 400, "malformed"],
    ["neither jwk nor kid", { without: ["kid"] }, 400, "malformed"],
    ["a jwk where kid is due", { header: { jwk: client.jwk }, without: ["kid"] }, 400, "malformed"],
    ["an unknown account", { header: { kid: `${ca.origin}/account/99` } }, 400, "accountDoesNotExist"],
    ["a broken signature", { jws: (jws) => ({ ...jws, signature: flip(jws.signature) }) }, 400, "malformed"],
    ["another payload", { jws: (jws) => ({ ...jws, payload: "e30" }) }, 400, "malformed"],
    ["padding", { jws: (jws) => ({ ...jws, payload: jws.payload + "=" }) }, 400, "malformed"],
    ["an unprotected header", { jws: (jws) => ({ ...jws, header: {} }) }, 400, "malformed"],
    [
      "the general form",
      { jws: ({ payload, ...rest }) => ({ payload, signatures: [rest] }) },
      400,
      "malformed",
    ],
    ["no JSON object", { jws: (jws) => [jws] }, 400, "malformed"],
    [
      "no signature",
      { jws: (jws) => ({ ...jws, protected: reheader(jws.protected!, { alg: "none" }), signature: "" }) },
      400,
      "badSignatureAlgorithm",
    ],
    [
      "another key's algorithm",
      { jws: (jws) => ({ ...jws, protected: reheader(jws.protected!, { alg: "RS256" }) }) },
      400,
      "badSignatureAlgorithm",
    ],
    [
      "a critical header",
      { jws: (jws) => ({ ...jws, protected: reheader(jws.protected!, { crit: ["exp"] }) }) },
      400,
      "malformed",
    ],
  ];
  for (const [mistake, tamper, status, type] of table) {
    const reply = await client.post(newOrder, wish, tamper);
    assert(reply.headers.get("replay-nonce"), mistake);
    assertProblem(stage, reply, status, type);
  }
  assert.equal(ca.orders.length, 1);
});

/** A protected header with some members replaced. */
function reheader(header: string, change: object): string {
  const json = JSON.parse(atob(header.replaceAll("-", "+").replaceAll("_", "/")));
  return btoa(JSON.stringify({ ...json, ...change })).replaceAll("+", "-").replaceAll("/", "_").replaceAll(
    "=",
    "",
  );
}

Deno.test("a resource refuses methods and payloads that are not for it", async () => {
  await using stage = await scene();
  const { ca, client } = stage;
  const { newOrder, newNonce, renewalInfo, newAccount } = client.directory;
  const order = await client.order("example.com");
  const url = order.headers.get("location")!;
  const [authz] = order.body.authorizations;
  const { body: { challenges } } = await client.post(authz);
  const { url: challenge } = challenges.find(isHttp)!;
  using other = await Client.of(ca);
  await other.register();

  const table: [string, () => Promise<Reply>, number, string][] = [
    ["GET of an order", () => client.fetch(url), 405, "malformed"],
    ["GET of newOrder", () => client.fetch(newOrder), 405, "malformed"],
    ["POST to the directory", () => client.post(ca.directoryUrl), 405, "malformed"],
    ["POST to newNonce", () => client.post(newNonce), 405, "malformed"],
    ["POST to renewalInfo", () => client.post(`${renewalInfo}/a.b`), 405, "malformed"],
    ["POST-as-GET with {}", () => client.post(url, {}), 400, "malformed"],
    ["newOrder without payload", () => client.post(newOrder), 400, "malformed"],
    ["newOrder with a list", () => client.post(newOrder, []), 400, "malformed"],
    [
      "a challenge answered with the old keyAuthorization",
      () => client.post(challenge, { keyAuthorization: "x" }),
      400,
      "malformed",
    ],
    ["tls-alpn-01 taken up", () => client.post(challenges[0].url, {}), 400, "malformed"],
    ["an unknown path", () => client.post(`${ca.origin}/nowhere`), 404, "malformed"],
    ["an unknown order", () => client.post(`${ca.origin}/order/99`), 404, "malformed"],
    ["an unknown authorization", () => client.post(`${ca.origin}/authz/99`), 404, "malformed"],
    ["an unknown challenge", () => client.post(`${authz}/dns-02`, {}), 404, "malformed"],
    ["an unknown certificate", () => client.post(`${ca.origin}/certificate/AB`), 404, "malformed"],
    ["another account's order", () => other.post(url), 403, "unauthorized"],
    ["another account's authorization", () => other.post(authz), 403, "unauthorized"],
    ["another account's page", () => other.post(client.kid!), 403, "unauthorized"],
    ["newAccount signed by kid", () => client.post(newAccount, {}), 400, "malformed"],
  ];
  for (const [mistake, make, status, type] of table) {
    const reply = await make();
    assertProblem(stage, reply, status, type);
    assert.equal(reply.headers.get("link"), `<${ca.directoryUrl}>;rel="index"`, mistake);
  }
});

Deno.test("every URL begins with ca.origin, so that a relay can stand before the CA", async () => {
  await using ca = await startCa();
  ca.origin = `https://127.0.0.1:${ca.port}`;
  using client = await Client.of(ca);
  await client.register();
  const order = await client.order("example.com");
  const urls = [client.directory.newOrder, client.kid!, order.headers.get("location")!, order.body.finalize];
  assert(urls.every((url) => url.startsWith(`${ca.origin}/`)), urls.join());
  assert.equal((await client.post(order.body.authorizations[0])).status, 200);
  assert.deepEqual(ca.violations, []);
});

Deno.test("newNonce answers HEAD with 200 and GET with 204, uncached and with a nonce", async () => {
  await using ca = await startCa();
  using client = await Client.of(ca);
  for (const [method, status] of [["HEAD", 200], ["GET", 204]] as const) {
    const reply = await client.fetch(client.directory.newNonce, { method });
    assert.equal(reply.status, status);
    assert.equal(reply.headers.get("cache-control"), "no-store");
    assert.match(reply.headers.get("replay-nonce")!, /^[A-Za-z0-9_-]{20,}$/);
  }
  assert.deepEqual(ca.violations, []);
});

// -------------------------------------------------------------------------------------------------- accounts

for (const alg of ["RS256", "ES256", "ES384", "ES512"]) {
  Deno.test(`an account with a key for ${alg} is made, found again and updated`, async () => {
    await using ca = await startCa();
    using client = await Client.of(ca, alg);
    const made = await client.register({ contact: ["mailto:ops@example.com"] });
    assert.deepEqual([made.status, made.body.status, made.body.contact], [201, "valid", [
      "mailto:ops@example.com",
    ]]);
    const { kid } = client;
    client.kid = undefined;
    const found = await client.post(client.directory.newAccount, { onlyReturnExisting: true });
    assert.deepEqual([found.status, found.headers.get("location")], [200, kid]);
    client.kid = kid;
    const updated = await client.post(kid!, { contact: ["mailto:it@example.com"] });
    assert.deepEqual([updated.status, updated.body.contact], [200, ["mailto:it@example.com"]]);
    assert.deepEqual((await client.post(updated.body.orders)).body, { orders: [] });
    assert.deepEqual(ca.violations, []);
  });
}

Deno.test("newAccount refuses what RFC 8555 §7.3 refuses", async () => {
  await using ca = await startCa();
  const agreed = { termsOfServiceAgreed: true };
  const table: [object, number, string, boolean][] = [
    [{}, 403, "userActionRequired", true],
    [{ onlyReturnExisting: true }, 400, "accountDoesNotExist", false],
    [{ ...agreed, contact: "mailto:a@example.com" }, 400, "malformed", true],
    [{ ...agreed, contact: ["tel:+123"] }, 400, "unsupportedContact", true],
    [{ ...agreed, contact: ["mailto:a@example.com,b@example.com"] }, 400, "invalidContact", true],
    [{ ...agreed, contact: ["mailto:a@example.com?subject=x"] }, 400, "invalidContact", true],
  ];
  for (const [payload, status, type, blamed] of table) {
    using client = await Client.of(ca);
    assertProblem({ ca }, await client.post(client.directory.newAccount, payload), status, type, blamed);
  }
  using client = await Client.of(ca);
  const weak = await crypto.subtle.generateKey(
    {
      name: "RSASSA-PKCS1-v1_5",
      hash: "SHA-256",
      modulusLength: 1024,
      publicExponent: Uint8Array.of(1, 0, 1),
    },
    true,
    ["sign", "verify"],
  );
  const keys: [JWK, string][] = [
    [await exportJWK(weak.publicKey), "badPublicKey"],
    [{ ...client.jwk, y: client.jwk.x }, "badPublicKey"],
    [{ ...client.jwk, d: client.jwk.x }, "malformed"],
    [{ kty: "oct", k: "AAAA" }, "badPublicKey"],
  ];
  for (const [jwk, type] of keys) {
    const reply = await client.post(client.directory.newAccount, agreed, { header: { jwk } });
    assertProblem({ ca }, reply, 400, type);
  }
  assert.equal(ca.accounts.length, 0);
});

Deno.test("a deactivated account is refused with 401", async () => {
  await using stage = await scene();
  const { client } = stage;
  assert.equal((await client.post(client.kid!, { status: "deactivated" })).body.status, "deactivated");
  assertProblem(stage, await client.order("example.com"), 401, "unauthorized", false);
});

Deno.test("an external account binding is demanded, verified and kept", async () => {
  const secret = crypto.getRandomValues(new Uint8Array(32));
  const base64url = { alphabet: "base64url", omitPadding: true } as const;
  await using ca = await startCa({ externalAccounts: { kid1: secret.toBase64(base64url) } });
  using client = await Client.of(ca);
  const url = client.directory.newAccount;
  const bind = (key: unknown, header: object, mac = secret) =>
    new FlattenedSign(new TextEncoder().encode(JSON.stringify(key)))
      .setProtectedHeader({ alg: "HS256", url, kid: "kid1", ...header }).sign(mac);
  const { publicKey } = await generateKeyPair("ES256", { extractable: true });

  assert.equal(client.directory.meta.externalAccountRequired, true);
  assertProblem({ ca }, await client.register(), 403, "externalAccountRequired", false);
  const table: [FlattenedJWS, number, string, boolean][] = [
    [await bind(client.jwk, {}, new Uint8Array(32)), 403, "unauthorized", true],
    [await bind(client.jwk, { kid: "kid2" }), 403, "unauthorized", false],
    [await bind(client.jwk, { url: ca.directoryUrl }), 400, "malformed", true],
    [await bind(client.jwk, { nonce: "AAAA" }), 400, "malformed", true],
    [await bind(await exportJWK(publicKey), {}), 400, "malformed", true],
  ];
  for (const [externalAccountBinding, status, type, blamed] of table) {
    assertProblem({ ca }, await client.register({ externalAccountBinding }), status, type, blamed);
  }
  const made = await client.register({ externalAccountBinding: await bind(client.jwk, {}) });
  assert.equal(made.status, 201, made.text);
  assert.equal(ca.accounts[0]!.externalAccount, "kid1");
});

Deno.test("keyChange needs both signatures, and moves the account to the new key", async () => {
  await using stage = await scene();
  const { ca, client } = stage;
  const url = client.directory.keyChange;
  const next = await generateKeyPair("ES384", { extractable: true });
  const jwk = await exportJWK(next.publicKey);
  const inner = (payload: object, header: object = {}, key = next.privateKey) =>
    client.sign({ account: client.kid, oldKey: client.jwk, ...payload }, {
      alg: "ES384",
      jwk,
      url,
      ...header,
    }, key);
  using other = await Client.of(ca);
  await other.register();

  const table: [FlattenedJWS, number, string, boolean][] = [
    [await inner({ account: other.kid }), 400, "malformed", true],
    [await inner({ oldKey: other.jwk }), 400, "malformed", true],
    [await inner({}, { nonce: "AAAA" }), 400, "malformed", true],
    [await inner({}, { url: ca.directoryUrl }), 400, "malformed", true],
    [await inner({}, { alg: "ES256", jwk: client.jwk }, other.keys.privateKey), 400, "malformed", true],
    [await inner({}, { alg: "ES256", jwk: other.jwk }, other.keys.privateKey), 409, "malformed", false],
  ];
  for (const [payload, status, type, blamed] of table) {
    assertProblem(stage, await client.post(url, payload), status, type, blamed);
  }
  assert.equal((await client.post(url, await inner({}))).status, 200);
  assertProblem(stage, await client.post(client.kid!), 400, "badSignatureAlgorithm");
  const found = await client.post(client.directory.newAccount, { onlyReturnExisting: true }, {
    without: ["kid"],
    header: { jwk: client.jwk },
  });
  assertProblem(stage, found, 400, "accountDoesNotExist", false);
});

// ---------------------------------------------------------------------------------------------------- orders

Deno.test("newOrder refuses identifiers, profiles and dates that are not in order", async () => {
  await using stage = await scene({
    reject: (name) => name.endsWith(".example") ? "reserved by RFC 2606" : undefined,
  });
  const { client } = stage;
  const dns = (...names: string[]) => ({ identifiers: names.map((value) => ({ type: "dns", value })) });
  const ip = (value: string) => ({ identifiers: [{ type: "ip", value }], profile: "shortlived" });
  const many = (count: number) => Array.from({ length: count }, (_, i) => `n${i}.example.com`);
  const table: [object, string, boolean?][] = [
    [{}, "malformed"],
    [{ identifiers: [] }, "malformed"],
    [{ identifiers: [null] }, "unsupportedIdentifier"],
    [{ identifiers: [{ type: "email", value: "a@example.com" }] }, "unsupportedIdentifier"],
    [dns("Example.com"), "malformed"],
    [dns("example.com."), "malformed"],
    [dns("localhost"), "malformed"],
    [dns("-a.example.com"), "malformed"],
    [dns("a_b.example.com"), "malformed"],
    [dns("a.*.example.com"), "malformed"],
    [dns("192.0.2.1"), "malformed"],
    [dns(`${"a".repeat(64)}.com`), "malformed"],
    [dns(Array(64).fill("abc").join(".") + ".com"), "malformed"],
    [dns("example.com", "example.com"), "malformed"],
    [dns(...many(101)), "malformed"],
    [{ ...dns(...many(26)), profile: "tlsserver" }, "malformed"],
    [{ ...dns("example.com"), profile: "toString" }, "invalidProfile"],
    [{ ...dns("example.com"), notAfter: "2030-01-01T00:00:00Z" }, "malformed"],
    [ip("192.0.2.01"), "malformed"],
    [ip("2001:DB8::1"), "malformed"],
    [ip("2001:db8:0::1"), "malformed"],
    [{ ...ip("192.0.2.1"), profile: "classic" }, "rejectedIdentifier", false],
    [dns("a.example", "example.com"), "rejectedIdentifier", false],
  ];
  for (const [wish, type, blamed] of table) {
    assertProblem(stage, await client.post(client.directory.newOrder, wish), 400, type, blamed);
  }
  for (const names of [many(100), ["xn--mnchen-3ya.de", "*.xn--mnchen-3ya.de"]]) {
    assert.equal((await client.order(...names)).status, 201);
  }
  const two = await client.order("a.example", "b.example", "example.com");
  assert.deepEqual(two.body.subproblems.map(({ identifier }) => identifier.value), [
    "a.example",
    "b.example",
  ]);
});

Deno.test("finalize takes a CSR for exactly the order's names, when the order is ready", async () => {
  await using stage = await scene({ refuseP521: true });
  const { client, proven } = stage;
  const pending = await client.order("pending.example.com");
  const { csr } = await csrFor(["pending.example.com"]);
  assertProblem(stage, await client.post(pending.body.finalize, { csr }), 403, "orderNotReady");

  const names = ["example.com", "www.example.com"];
  const order = await proven(...names);
  assert.equal(order.body.status, "ready");
  const good = (await csrFor(names)).csr;
  const damaged = good.slice(0, -8) + flip(good.slice(-8));
  const table: [string, string, string][] = [
    ["a name missing", (await csrFor(["example.com"])).csr, "badCSR"],
    ["a name too many", (await csrFor([...names, "mail.example.com"])).csr, "badCSR"],
    ["a name twice", (await csrFor([...names, "example.com"])).csr, "badCSR"],
    ["a common name of its own", (await csrFor(names, { commonName: "mail.example.com" })).csr, "badCSR"],
    ["the account's key", (await csrFor(names, { keys: client.keys })).csr, "badCSR"],
    ["a curve that is refused", (await csrFor(names, { alg: "ES512" })).csr, "badCSR"],
    ["a broken signature", damaged, "badCSR"],
    ["no CSR", "AAAA", "badCSR"],
    ["PEM", "-----BEGIN CERTIFICATE REQUEST-----", "malformed"],
  ];
  for (const [mistake, csr, type] of table) {
    assertProblem(stage, await client.post(order.body.finalize, { csr }), 400, type);
    assert.equal((await client.post(order.url)).body.status, "ready", mistake);
  }
  const { csr: rsa } = await csrFor(names, { alg: "RS256", commonName: "example.com" });
  const done = await client.post(order.body.finalize, { csr: rsa });
  assert.deepEqual([done.status, done.body.status, done.headers.get("location")], [200, "valid", order.url]);
  // Said again after a lost answer it is no mistake; another CSR is.
  assertProblem(stage, await client.post(order.body.finalize, { csr: rsa }), 403, "orderNotReady", false);
  assertProblem(stage, await client.post(order.body.finalize, { csr: good }), 403, "orderNotReady");
});

// ------------------------------------------------------------------------------------------------ validation

/** Asks for the validation of a name by one challenge type; returns the authorization as it ends. */
async function prove(
  client: Client,
  name: string,
  type: string,
  prepare?: (challenge: Challenge) => Promise<void>,
): Promise<Body> {
  const order = await client.order(name);
  const [url] = order.body.authorizations;
  const { body } = await client.post(url);
  const challenge = body.challenges.find((candidate) => candidate.type === type);
  assert(challenge, `no ${type} for ${name}`);
  await prepare?.(challenge);
  assert.equal((await client.post(challenge.url, {})).status, 200);
  return (await client.settled(url, "pending")).body;
}

Deno.test("http-01 asks the named host on httpPort, and forgives whitespace at the end only", async () => {
  await using stage = await scene();
  const { client, dir, web, ca } = stage;
  const table: [string, (right: string) => string, string][] = [
    ["right.example.com", (right) => right, "valid"],
    ["newline.example.com", (right) => `${right}\r\n\t `, "valid"],
    ["192.0.2.7", (right) => right, "valid"],
    ["2001:db8::7", (right) => right, "valid"],
    ["leading.example.com", (right) => ` ${right}`, "invalid"],
    ["token.example.com", (right) => right.split(".")[0]!, "invalid"],
    ["empty.example.com", () => "", "invalid"],
    ["endless.example.com", (right) => right + " ".repeat(10_000), "invalid"],
  ];
  const { newOrder } = client.directory;
  client.order = (...names) =>
    client.post(newOrder, { identifiers: names.map(identifierOf), profile: "shortlived" });
  for (const [name, body, status] of table) {
    const { status: found } = await prove(client, name, "http-01", async ({ token }) => {
      await Deno.writeTextFile(`${dir}/${token}`, body(await client.keyAuthorization(token)));
    });
    assert.equal(found, status, name);
    assert.equal(web.log.at(-1)!.host, `${name.includes(":") ? `[${name}]` : name}`);
  }
  assert.equal(web.log.length, table.length);
  assert.deepEqual(
    ca.validations.map(({ error }) => error === undefined),
    table.map(([, , status]) => status === "valid"),
  );
  assert.deepEqual(ca.violations, []);
});

Deno.test("http-01 follows ten redirects, to any port and to https, but not away from loopback", async () => {
  await using stage = await scene();
  const { ca, client, web, dir } = stage;
  const { publicKey, privateKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const cert = ca.forge({
    publicKey,
    commonName: "somebody else",
    notBefore: new Date(0),
    notAfter: new Date(1),
  });
  const key = privateKey.export({ format: "pem", type: "pkcs8" }).toString();
  let hops = 0, limit = 0, target = "";
  const redirect = (request: Request) => {
    const { pathname } = new URL(request.url);
    const location = hops++ < limit ? pathname : target + pathname;
    return new Response(null, { status: 301, headers: { location } });
  };
  const at = { hostname: "127.0.0.1", port: 0, onListen: () => {} };
  await using plain = Deno.serve(at, redirect);
  await using secure = Deno.serve({ ...at, cert, key }, async (request) => {
    const token = new URL(request.url).pathname.split("/").at(-1);
    return new Response(await Deno.readTextFile(`${dir}/${token}`));
  });
  ca.switches.resolve = (hostname) => {
    if (hostname === "gone.example.com") throw new Error("NXDOMAIN");
    return { hostname: hostname === "away.example.com" ? "192.0.2.1" : "127.0.0.1", port: plain.addr.port };
  };
  const here = `http://central.example.com:${web.port}`;
  const table: [string, number, string, string, string?][] = [
    ["one.example.com", 0, here, "valid"],
    ["ten.example.com", 9, here, "valid"],
    ["address.example.com", 0, `http://127.0.0.1:${web.port}`, "valid"],
    ["secure.example.com", 0, `https://central.example.com:${secure.addr.port}`, "valid"],
    ["eleven.example.com", 10, here, "invalid", "connection"],
    ["nowhere.example.com", 0, "http://gone.example.com", "invalid", "dns"],
    ["scheme.example.com", 0, "ftp://central.example.com", "invalid", "connection"],
    ["away.example.com", 0, here, "invalid", "dns"],
    ["gone.example.com", 0, here, "invalid", "dns"],
    ["refused.example.com", 0, "http://127.0.0.1:1", "invalid", "connection"],
  ];
  for (const [name, count, to, status, type] of table) {
    [hops, limit, target] = [0, count, to];
    const { status: found, challenges } = await prove(client, name, "http-01", async ({ token }) => {
      await Deno.writeTextFile(`${dir}/${token}`, await client.keyAuthorization(token));
    });
    assert.deepEqual(
      [found, challenges[0].error?.type],
      [status, type && URN + type],
      JSON.stringify(challenges),
    );
  }
});

Deno.test("http-01 gives up on a silent server after its time-out, or when the CA closes", async () => {
  await using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const accepted: Deno.Conn[] = [];
  const accepting = (async () => {
    for await (const connection of silent) accepted.push(connection);
  })();
  {
    await using stage = await scene({ httpPort: silent.addr.port, validationTimeoutMs: 50 });
    const { challenges } = await prove(stage.client, "silent.example.com", "http-01");
    assert.match(challenges[0].error!.detail, /silent\.example\.com.*no answer in time/);
    stage.ca.switches.validationTimeoutMs = 60_000;
    const order = await stage.client.order("silent.example.com");
    const { body } = await stage.client.post(order.body.authorizations[0]);
    await stage.client.post(body.challenges.find(isHttp)!.url, {});
  }
  silent.close();
  await accepting;
  for (const connection of accepted) connection.close();
});

Deno.test("dns-01 finds its value among several, behind CNAMEs, and for wildcards too", async () => {
  const records = new Map<string, string[]>();
  const aliases = new Map([
    ["_acme-challenge.aliased.example.com", "a.delegated.example.org."],
    ["a.delegated.example.org", "b.delegated.example.org"],
    ["_acme-challenge.loop.example.com", "_acme-challenge.loop.example.com"],
  ]);
  await using stage = await scene({
    txt: (name) =>
      name.includes("broken")
        ? Promise.reject(new Error("SERVFAIL"))
        : Promise.resolve(records.get(name) ?? []),
    cname: (name) => Promise.resolve(aliases.get(name)),
  });
  const { client, ca } = stage;
  const table: [string, string, (right: string) => string[], string, string?][] = [
    ["example.com", "_acme-challenge.example.com", (right) => ["other", right], "valid"],
    ["*.example.com", "_acme-challenge.example.com", (right) => ["other", right], "valid"],
    ["aliased.example.com", "b.delegated.example.org", (right) => [right], "valid"],
    ["wrong.example.com", "_acme-challenge.wrong.example.com", () => ["other"], "invalid", "unauthorized"],
    ["none.example.com", "none.example.com", (right) => [right], "invalid", "unauthorized"],
    ["loop.example.com", "_acme-challenge.loop.example.com", (right) => [right], "invalid", "dns"],
    ["broken.example.com", "_acme-challenge.broken.example.com", (right) => [right], "invalid", "dns"],
  ];
  for (const [name, at, values, status, type] of table) {
    const { status: found, challenges, wildcard, identifier } = await prove(
      client,
      name,
      "dns-01",
      async ({ token }) => {
        const digest = createHash("sha256").update(await client.keyAuthorization(token)).digest("base64url");
        records.set(at, values(digest));
      },
    );
    assert.deepEqual(
      [found, challenges[0].error?.type],
      [status, type && URN + type],
      JSON.stringify(challenges),
    );
    assert.deepEqual([wildcard, identifier.value], [
      name.startsWith("*.") || undefined,
      name.replace("*.", ""),
    ]);
  }
  const wildcard = await client.order("*.example.net");
  const { body } = await client.post(wildcard.body.authorizations[0]);
  assert.deepEqual(body.challenges.map(({ type }) => type).toSorted(), ["dns-01", "dns-persist-01"]);
  assert.deepEqual(ca.violations, []);
});

Deno.test("the DNS server answers over UDP and TCP, follows CNAMEs, and serves the CA", async () => {
  await using dns = await startDns();
  const nameServer = { ipAddr: "127.0.0.1", port: dns.port };
  const ask = (name: string, type: "A" | "AAAA" | "NS") => Deno.resolveDns(name, type, { nameServer });
  const askText = async (name: string) =>
    (await Deno.resolveDns(name, "TXT", { nameServer })).map((parts) => parts.join(""));
  dns.set("example.com", "A", "127.0.0.1", "127.0.0.2");
  dns.set("example.com", "AAAA", "::1");
  dns.set("example.com", "NS", "ns1.example.com", "ns2.example.com");
  dns.set("_acme-challenge.example.com", "CNAME", "a.example.org");
  dns.set("a.example.org", "TXT", "one", "x".repeat(300));
  dns.set("long.example.com", "TXT", ...Array.from({ length: 20 }, (_, i) => `${i}`.padEnd(200)));
  assert.deepEqual(await ask("example.com", "A"), ["127.0.0.1", "127.0.0.2"]);
  assert.deepEqual(await ask("example.com", "AAAA"), ["::1"]);
  assert.deepEqual((await ask("example.com", "NS")).toSorted(), ["ns1.example.com.", "ns2.example.com."]);
  assert.deepEqual(await askText("_acme-challenge.example.com"), ["one", "x".repeat(300)]);
  assert.equal((await askText("long.example.com")).length, 20);
  assert.equal(dns.log.filter((line) => line === "TXT long.example.com").length, 2); // once more over TCP
  await assert.rejects(ask("nothing.example.com", "A"), Deno.errors.NotFound);

  await using stage = await scene({ txt: dns.txt, cname: dns.cname });
  const { client } = stage;
  const { status } = await prove(client, "*.example.com", "dns-01", async ({ token }) => {
    const digest = createHash("sha256").update(await client.keyAuthorization(token)).digest("base64url");
    dns.set("a.example.org", "TXT", digest);
  });
  assert.equal(status, "valid");
  dns.set("a.example.org", "TXT");
  assert.deepEqual(dns.get("a.example.org", "TXT"), []);
});

Deno.test("dns-persist-01 judges records as Pebble does", async () => {
  let records: string[] = [];
  const asked: string[] = [];
  await using stage = await scene({
    caaIdentities: ["ca.example", "other.example"],
    reuse: "none",
    txt: (name) => Promise.resolve(asked.push(name) ? records : []),
  });
  const { client, ca } = stage;
  const account = `accounturi=${client.kid}`;
  const table: [string, string[], string, string?][] = [
    ["example.com", [`ca.example; ${account}`], "valid"],
    ["example.com", [
      "v=spf1 -all",
      "third.example",
      `other.example;${account.replace("uri=", "URI = ")};unknown=1`,
    ], "valid"],
    ["*.example.com", [`ca.example; ${account}; policy=WildCard`], "valid"],
    ["example.com", [`ca.example; ${account}; persistUntil=4102444800`], "valid"],
    ["example.com", ["ca.example", `ca.example; ${account}`], "valid"],
    ["example.com", [], "invalid", "unauthorized"],
    ["example.com", [`third.example; ${account}`], "invalid", "unauthorized"],
    ["example.com", [`ca.example; ${account}0`], "invalid", "unauthorized"],
    ["*.example.com", [`ca.example; ${account}`], "invalid", "unauthorized"],
    ["*.example.com", [`ca.example; ${account}; policy=other`], "invalid", "unauthorized"],
    ["example.com", [`ca.example; ${account}; persistUntil=1`], "invalid", "unauthorized"],
    ["example.com", ["ca.example"], "invalid", "malformed"],
    ["example.com", [`ca.example; ${account};`], "invalid", "malformed"],
    ["example.com", [`ca.example; ${account}; ${account}`], "invalid", "malformed"],
    ["example.com", [`ca.example; ${account}; persistUntil=soon`], "invalid", "malformed"],
    ["example.com", [`ca.example; ${account}0`, "ca.example; accounturi"], "invalid", "malformed"],
  ];
  for (const [name, values, status, type] of table) {
    records = values;
    const { status: found, challenges } = await prove(client, name, "dns-persist-01", (challenge) => {
      assert.deepEqual([challenge.accounturi, challenge["issuer-domain-names"], challenge.token], [
        client.kid,
        ["ca.example", "other.example"],
        undefined,
      ]);
      return Promise.resolve();
    });
    assert.deepEqual([found, challenges[0].error?.type], [status, type && URN + type], values.join(" | "));
    assert.equal(asked.at(-1), "_validation-persist.example.com");
  }
  assert.deepEqual(ca.violations, []);
});

Deno.test("an order whose names fail is invalid, and names every failure", async () => {
  await using stage = await scene();
  const { client, proven, dir, ca } = stage;
  await proven("good.example.com");
  const order = await client.order("one.example.com", "good.example.com", "two.example.com");
  assert.equal(order.body.status, "pending");
  for (const url of order.body.authorizations) {
    const { body } = await client.post(url);
    if (body.status === "valid") continue;
    await client.post(body.challenges.find(isHttp)!.url, {});
  }
  const { body } = await client.settled(order.headers.get("location")!, "pending");
  assert.deepEqual([body.status, body.error!.type], ["invalid", `${URN}compound`]);
  assert.deepEqual(body.error!.subproblems.map(({ identifier, type }) => [identifier.value, type]), [
    ["one.example.com", `${URN}unauthorized`],
    ["two.example.com", `${URN}unauthorized`],
  ]);
  const { body: single } = await proven("three.example.com").finally(() =>
    Deno.remove(dir, { recursive: true }).then(() => Deno.mkdir(dir))
  );
  assert.equal(single.status, "ready");
  const lonely = await prove(client, "four.example.com", "http-01");
  assert.match(lonely.challenges[0].error!.detail, /four\.example\.com\/\.well-known.* answered 404/);
  assert.deepEqual(ca.violations, []);
});

// -------------------------------------------------------------------------------------- orders as they go on

Deno.test("authorizations are taken over as `reuse` says, until they expire", async () => {
  await using stage = await scene();
  const { client, proven, ca } = stage;
  const [first] = (await proven("example.com")).body.authorizations;
  const born = await client.order("example.com");
  assert.deepEqual([born.body.status, born.body.authorizations], ["ready", [first]]);

  const pending = (await client.order("www.example.com")).body.authorizations[0];
  assert.notEqual((await client.order("www.example.com")).body.authorizations[0], pending);
  ca.switches.reuse = "pending";
  const [shared] = (await client.order("www.example.com")).body.authorizations;
  assert.deepEqual((await client.order("www.example.com")).body.authorizations, [shared]);
  ca.switches.reuse = "none";
  assert.equal((await client.order("example.com")).body.status, "pending");
  ca.switches.reuse = "valid";
  await proven("example.com");
  ca.advance(31 * DAY);
  assert.equal((await client.order("example.com")).body.status, "pending");

  const { body } = await client.post(shared, { status: "deactivated" });
  assert.equal(body.status, "deactivated");
  assert.deepEqual(ca.violations, []);
});

Deno.test("work that takes time is announced by Retry-After, and polling sooner is a violation", async () => {
  await using stage = await scene({ validationDelayMs: 60_000, retryAfterSeconds: 30, reuse: "none" });
  const { client, ca } = stage;
  const order = await client.order("example.com");
  const url = order.headers.get("location")!;
  assert.equal((await client.post(url)).headers.get("retry-after"), null); // nothing is being worked on yet
  const [authz] = order.body.authorizations;
  const { body } = await client.post(authz);
  const challenge = body.challenges.find(isHttp)!.url;
  assert.equal((await client.post(challenge, {})).body.status, "processing");
  for (const polled of [challenge, authz, url]) {
    assert.equal((await client.post(polled)).headers.get("retry-after"), "30");
  }
  assert.deepEqual(ca.violations.splice(0).map(({ url, type }) => [url, type]), [[challenge, "tooSoon"]]);
  ca.advance(30_000);
  ca.switches.retryAfterAsDate = true;
  const date = Date.parse((await client.post(url)).headers.get("retry-after")!);
  assert(Math.abs(date - ca.now.getTime() - 30_000) < 2000);
  assert.deepEqual(ca.violations, []);
  await client.post(url);
  assert.deepEqual(ca.violations.map(({ url, resource, type }) => [url, resource, type]), [[
    url,
    "order",
    "tooSoon",
  ]]);
});

Deno.test("an order can be processing for a while, or for ever", async () => {
  await using stage = await scene({ processingMs: Infinity });
  const { client, ca, proven } = stage;
  for (const processingMs of [20, Infinity]) {
    ca.switches.processingMs = processingMs;
    const order = await proven("example.com");
    const { csr } = await csrFor(["example.com"]);
    const finalized = await client.post(order.body.finalize, { csr });
    assert.deepEqual([finalized.body.status, finalized.body.certificate], ["processing", undefined]);
    if (processingMs === 20) {
      assert.equal((await client.settled(order.url, "processing")).body.status, "valid");
    } else assert.equal((await client.post(order.url)).body.status, "processing");
  }
  assert.equal(ca.issued.length, 1);
  assert.deepEqual(ca.violations, []);
});

Deno.test("limits answer 429 with Retry-After, and follow the CA's clock", async () => {
  const hour = 3600_000;
  await using stage = await scene({
    limits: {
      newOrder: { count: 4, windowMs: 3 * hour },
      failedValidations: { count: 2, windowMs: hour, retryAfterSeconds: 77 },
      sameNames: { count: 1, windowMs: 7 * DAY },
      requestsPerSecond: { newNonce: 3 },
    },
  });
  const { client, ca, issue } = stage;
  const limited = (reply: Reply, seconds: number) => {
    assertProblem(stage, reply, 429, "rateLimited", false);
    assert(
      Math.abs(Number(reply.headers.get("retry-after")) - seconds) <= 1,
      reply.headers.get("retry-after")!,
    );
  };
  await issue("example.com");
  limited(await client.order("example.com"), 7 * 24 * 3600);
  for (let i = 0; i < 2; i++) {
    assert.equal((await prove(client, "bad.example.com", "http-01")).status, "invalid");
  }
  limited(await client.order("bad.example.com", "example.org"), 77);
  ca.advance(hour);
  assert.equal((await client.order("bad.example.com")).status, 201);
  limited(await client.order("www.example.com"), 2 * 3600);
  ca.advance(2 * hour);
  assert.equal((await client.order("www.example.com")).status, 201);

  const { newNonce } = client.directory;
  ca.advance(1000);
  const statuses = [];
  for (let i = 0; i < 5; i++) statuses.push((await client.fetch(newNonce, { method: "HEAD" })).status);
  assert.deepEqual(statuses, [200, 200, 200, 429, 429]);
});

Deno.test("a paused name is refused with the page where it is resumed", async () => {
  await using stage = await scene();
  const { client, ca } = stage;
  ca.paused.add("example.com");
  const reply = await client.order("example.com", "www.example.com");
  assert.match(
    reply.body.detail,
    /example\.com is paused .* https:\/\/localhost:\d+\/sfe\/v1\/unpause\?jwt=\S+$/,
  );
  assertProblem(stage, reply, 429, "rateLimited", false);
  ca.paused.clear();
  assert.equal((await client.order("example.com", "www.example.com")).status, 201);
});

// ---------------------------------------------------------------------------------------------- certificates

Deno.test("profiles decide lifetime, common name and IP addresses, and need not exist", async () => {
  await using stage = await scene();
  const { client, ca, proven } = stage;
  assert.deepEqual(Object.keys(client.directory.meta.profiles!), ["classic", "tlsserver", "shortlived"]);
  const names = ["192.0.2.7", "2001:db8::7", "example.com"];
  const { newOrder } = client.directory;
  for (
    const [profile, of, days, subject] of [
      ["classic", ["example.com"], 90, "CN=example.com"],
      ["tlsserver", ["example.com"], 45, undefined],
      ["shortlived", names, 160 / 24, undefined],
    ] as const
  ) {
    client.order = (...names) => client.post(newOrder, { identifiers: names.map(identifierOf), profile });
    const order = await proven(...of);
    assert.equal(order.body.profile, profile);
    const { csr } = await csrFor([...of], { commonName: "example.com" });
    const { body } = await client.post(order.body.finalize, { csr });
    const leaf = new X509Certificate((await client.post(body.certificate)).text);
    const lifetime = Date.parse(leaf.validTo) - Date.parse(leaf.validFrom) + 1000;
    assert.deepEqual([lifetime / DAY, leaf.subject], [days, subject]);
    assert(Date.parse(leaf.validFrom) < ca.now.getTime());
    if (of === names) {
      assert.match(leaf.subjectAltName!, /IP Address:192\.0\.2\.7, IP Address:2001:db8::7/);
    }
  }
  await using plain = await startCa({ profiles: {}, renewalInfo: false });
  using guest = await Client.of(plain);
  await guest.register();
  assert.deepEqual([guest.directory.meta.profiles, guest.directory.renewalInfo], [undefined, undefined]);
  assert.equal((await guest.order("192.0.2.7")).body.profile, undefined);
});

Deno.test("alternate chains are linked, and each verifies under its own root", async () => {
  await using stage = await scene({ alternateRoots: 2, chainLength: 2 });
  const { client, ca, issue } = stage;
  const { order, chain } = await issue("example.com");
  const links = (reply: Reply) =>
    [...reply.headers.get("link")!.matchAll(/<([^>]+)>;rel="alternate"/g)].map((match) => match[1]!);
  const first = await client.post(order.certificate);
  assert.deepEqual(links(first), [1, 2].map((i) => `${order.certificate}/${i}`));
  const roots = [ca.rootPem, ...ca.alternateRootPems].map((pem) => new X509Certificate(pem));
  for (const [i, url] of [order.certificate, ...links(first)].entries()) {
    const reply = await client.post(url);
    assert.equal(reply.headers.get("content-type"), "application/pem-certificate-chain");
    const certificates = reply.text.match(/-----BEGIN[^]+?-----END CERTIFICATE-----\n/g)!.map((pem) =>
      new X509Certificate(pem)
    );
    assert.equal(certificates.length, 3);
    [...certificates.slice(1), roots[i]!].forEach((issuer, n) => {
      assert(certificates[n]!.verify(issuer.publicKey) && certificates[n]!.checkIssued(issuer));
    });
    assert.equal(links(reply).length, 2);
  }
  assert.equal(chain, ca.issued[0]!.chains[0]);
  assertProblem(stage, await client.post(`${order.certificate}/3`), 404, "malformed");
});

Deno.test("renewalInfo wants a strict certID, and follows lifetime, revocation and what a test sets", async () => {
  await using stage = await scene({ renewalInfoRetryAfterSeconds: 60 });
  const { client, ca, issue } = stage;
  await issue("a.example.com"); // its serial needs a zero octet in DER
  await issue("b.example.com"); // this one does not
  const { renewalInfo, revokeCert } = client.directory;
  for (const { pem, certId, serial, notBefore, notAfter } of ca.issued) {
    const ours = await new Deno.Command("openssl", {
      args: ["x509", "-noout", "-serial", "-ext", "authorityKeyIdentifier"],
      stdin: "piped",
      stdout: "piped",
    }).spawn();
    const writer = ours.stdin.getWriter();
    await writer.write(new TextEncoder().encode(pem));
    await writer.close();
    const shown = new TextDecoder().decode((await ours.output()).stdout);
    assert(shown.includes(`serial=${serial}`));
    const keyId = /([0-9A-F]{2}(:[0-9A-F]{2}){19})/.exec(shown)![1]!.replaceAll(":", "");
    const der = (parseInt(serial[0]!, 16) >= 8 ? "00" : "") + serial;
    assert.equal(certId, [keyId, der].map((hex) => Buffer.from(hex, "hex").toString("base64url")).join("."));

    const reply = await client.fetch(`${renewalInfo}/${certId}`);
    assert.deepEqual([reply.status, reply.headers.get("retry-after")], [200, "60"]);
    const [start, end] = [reply.body.suggestedWindow.start, reply.body.suggestedWindow.end].map((text) =>
      Date.parse(text)
    );
    const life = notAfter.getTime() - notBefore.getTime();
    const share = (at = 0) => (at - notBefore.getTime()) / life;
    assert(share(start) > 0.6 && share(start) < share(end) && share(end) < 0.7);
  }
  const [issued] = ca.issued;
  const [keyId, serial] = issued!.certId.split(".") as [string, string];
  const table: [string, number, boolean][] = [
    ["", 400, true],
    [keyId, 400, true],
    [`${issued!.certId}.x`, 400, true],
    [`${keyId}=.${serial}`, 400, true],
    // The zero octet that DER needs before the serial is lost.
    [`${keyId}.${Buffer.from(serial, "base64url").subarray(1).toString("base64url")}`, 404, true],
    [`${keyId.replace(/^./, keyId[0] === "A" ? "B" : "A")}.${serial}`, 404, false],
  ];
  for (const [certId, status, blamed] of table) {
    const reply = await client.fetch(`${renewalInfo}/${certId}`);
    assertProblem(stage, reply, status, "malformed", blamed);
  }
  const url = `${renewalInfo}/${issued!.certId}`;
  await client.fetch(url);
  assert.deepEqual(ca.violations.splice(0).map(({ type }) => type), ["tooSoon"]);
  ca.advance(60_000);
  const window = { start: new Date(0), end: new Date(1000), explanationURL: "https://ca.example/incident" };
  ca.setRenewalWindow(issued!.serial, window);
  assert.deepEqual((await client.fetch(url)).body, {
    suggestedWindow: { start: "1970-01-01T00:00:00.000Z", end: "1970-01-01T00:00:01.000Z" },
    explanationURL: window.explanationURL,
  });
  ca.advance(60_000);
  const certificate = Buffer.from(new X509Certificate(ca.issued[1]!.pem).raw).toString("base64url");
  await client.post(revokeCert, { certificate });
  const { body } = await client.fetch(`${renewalInfo}/${ca.issued[1]!.certId}`);
  assert(Date.parse(body.suggestedWindow.end) <= ca.now.getTime());
  assert.deepEqual(ca.violations, []);
});

Deno.test("`replaces` names an unreplaced certificate of the account that shares a name", async () => {
  await using stage = await scene();
  const { client, ca, issue } = stage;
  await issue("example.com", "www.example.com");
  const { certId } = ca.issued[0]!;
  const replace = (by: Client, name: string, replaces: unknown) =>
    by.post(by.directory.newOrder, { identifiers: [{ type: "dns", value: name }], replaces });
  using other = await Client.of(ca);
  await other.register();

  assertProblem(stage, await replace(client, "example.com", 7), 400, "malformed");
  assertProblem(stage, await replace(client, "example.com", `${certId}=`), 400, "malformed");
  assertProblem(stage, await replace(client, "example.org", certId), 400, "malformed");
  assertProblem(stage, await replace(other, "example.com", certId), 403, "unauthorized");
  for (
    const [type, status] of [["alreadyReplaced", 409], ["unauthorized", 403], ["malformed", 400]] as const
  ) {
    ca.switches.refuseReplaces = type;
    assertProblem(stage, await replace(client, "example.com", certId), status, type, false);
  }
  ca.switches.refuseReplaces = undefined;

  ca.switches.reuse = "none";
  const failed = await replace(client, "www.example.com", certId);
  assertProblem(stage, await replace(client, "example.com", certId), 409, "alreadyReplaced", false);
  await client.post(failed.body.authorizations[0], { status: "deactivated" });
  const order = await replace(client, "example.com", certId);
  assert.deepEqual([order.status, order.body.replaces], [201, certId]);
});

Deno.test("revokeCert takes the account's or the certificate's key, and a subscriber's reason, once", async () => {
  await using stage = await scene();
  const { client, ca, issue } = stage;
  const url = client.directory.revokeCert;
  const raw = ({ chain }: { chain: string }) =>
    Buffer.from(new X509Certificate(chain).raw).toString("base64url");
  const one = await issue("one.example.com");
  const two = await issue("two.example.com");
  using other = await Client.of(ca);
  await other.register();

  assertProblem(stage, await client.post(url, { certificate: "AAAA" }), 404, "malformed");
  assertProblem(
    stage,
    await client.post(url, { certificate: raw(one), reason: 2 }),
    400,
    "badRevocationReason",
  );
  assertProblem(stage, await other.post(url, { certificate: raw(one) }), 403, "unauthorized");
  assert.equal((await client.post(url, { certificate: raw(one), reason: 4 })).status, 200);
  assert.equal(ca.issued[0]!.revoked?.reason, 4);
  assertProblem(stage, await client.post(url, { certificate: raw(one) }), 400, "alreadyRevoked", false);

  const sign = async (keys: CryptoKeyPair) => {
    const jwk = await exportJWK(keys.publicKey);
    const header = { alg: "ES256", nonce: await client.freshNonce(), url, jwk };
    const body = JSON.stringify(
      await client.sign({ certificate: raw(two), reason: 1 }, header, keys.privateKey),
    );
    return await client.fetch(url, {
      method: "POST",
      headers: { "content-type": "application/jose+json" },
      body,
    });
  };
  assertProblem(stage, await sign(one.keys), 403, "unauthorized");
  assert.equal((await sign(two.keys)).status, 200);
  assert.equal(ca.issued[1]!.revoked?.reason, 1);
});

// ---------------------------------------------------------------------------------------------------- faults

/** A CA in which `fault` befalls the next request to newOrder, and nothing else. */
async function faulty() {
  let next: Fault | undefined;
  const seen: Exchange[] = [];
  const stage = await scene({
    fault: (exchange) => {
      seen.push(exchange);
      if (exchange.resource !== "newOrder") return undefined;
      const fault = next;
      next = undefined;
      return fault;
    },
  });
  return Object.assign(stage, { seen, befall: (fault: Fault) => void (next = fault) });
}

Deno.test("a fault befalls exactly the exchange it was chosen for, handled or not as it says", async () => {
  await using stage = await faulty();
  const { client, ca, befall, seen } = stage;
  await client.order("example.com");
  const before = () => ca.orders.length;
  const table: [Fault, boolean, (reply: Reply) => void][] = [
    [{ kind: "status", status: 503, headers: { "retry-after": "7" } }, false, ({ status, headers, text }) => {
      assert.deepEqual([status, headers.get("retry-after"), text], [503, "7", ""]);
    }],
    [
      { kind: "status", status: 500, body: "oops", contentType: "text/plain" },
      false,
      ({ status, headers, text }) => {
        assert.deepEqual([status, headers.get("content-type"), text], [500, "text/plain", "oops"]);
      },
    ],
    [{ kind: "html" }, false, ({ status, headers }) => {
      assert.deepEqual([status, headers.get("content-type")], [200, "text/html; charset=utf-8"]);
    }],
    [{ kind: "badNonce" }, false, ({ status, body, headers }) => {
      assert.deepEqual([status, body.type], [400, `${URN}badNonce`]);
      assert(headers.get("replay-nonce"));
    }],
    [{ kind: "drop header", name: "Location" }, true, ({ status, headers }) => {
      assert.deepEqual([status, headers.get("location")], [201, null]);
    }],
    [{ kind: "drop header", name: "replay-nonce" }, true, ({ headers }) => {
      assert.equal(headers.get("replay-nonce"), null);
    }],
    [{ kind: "rewrite", rewrite: (order) => ({ ...order, finalize: "http://evil" }) }, true, ({ body }) => {
      assert.deepEqual([body.status, body.finalize], ["pending", "http://evil"]);
    }],
    [{ kind: "repeat" }, false, ({ headers }) => {
      assert.equal(headers.get("location"), ca.orders.at(-1)!.url);
    }],
    [{ kind: "after", fault: { kind: "status", status: 502 } }, true, ({ status }) => {
      assert.equal(status, 502);
    }],
  ];
  for (const [fault, handled, check] of table) {
    const count = before();
    befall(fault);
    client.nonce = "";
    check(await client.order("example.com"));
    assert.equal(before() - count, handled ? 1 : 0, JSON.stringify(fault));
    assert.equal((await client.order("example.com")).status, 201);
  }
  await client.post(client.kid!);
  befall({ kind: "repeat" });
  await client.order("example.com"); // brings back the nonce that was used for the account
  assertProblem(stage, await client.order("example.com"), 400, "badNonce", false);
  assert.deepEqual(seen.map(({ n }) => n), seen.map((_, i) => i + 1));
  assert.deepEqual(ca.violations, []);
});

Deno.test("a downloaded certificate can be a forged one, for the same key and under the same root", async () => {
  await using stage = await scene({
    fault: ({ resource }) =>
      resource === "certificate" ? { kind: "rewrite text", rewrite: () => forge() } : undefined,
  });
  const { ca, issue } = stage;
  const expired = { notBefore: new Date(0), notAfter: new Date(1000) };
  const forge = () =>
    ca.forge({
      publicKey: ca.orders[0]!.request!.publicKey,
      identifiers: [{ type: "dns", value: "evil.example.com" }],
      ...expired,
    });
  const { chain, keys } = await issue("example.com");
  const leaf = new X509Certificate(chain);
  assert.equal(leaf.subjectAltName, "DNS:evil.example.com");
  assert.equal(leaf.validToDate.getTime(), 1000);
  assert(leaf.verify(new X509Certificate(ca.intermediatePem).publicKey));
  assert.deepEqual(leaf.publicKey.export({ format: "jwk" }).x, (await exportJWK(keys.publicKey)).x);
});

Deno.test("a torn exchange fails at the client, and the next one finds the CA again", async () => {
  await using stage = await faulty();
  const { client, ca, befall } = stage;
  const table: [Fault, boolean][] = [
    [{ kind: "reset" }, false],
    [{ kind: "refuse" }, false],
    [{ kind: "reset mid-body" }, true],
    [{ kind: "truncate" }, true],
    [{ kind: "after", fault: { kind: "reset" } }, true],
    [{ kind: "after", fault: { kind: "reset mid-body" } }, true],
  ];
  for (const [fault, handled] of table) {
    const count = ca.orders.length;
    client.nonce = "";
    await client.freshNonce().then((nonce) => client.nonce = nonce);
    befall(fault);
    await assert.rejects(client.order("example.com"), JSON.stringify(fault));
    assert.equal(ca.orders.length - count, handled ? 1 : 0, JSON.stringify(fault));
    assert.equal(ca.log.at(-1)!.status, handled ? 201 : 0);
    client.nonce = "";
    if (fault.kind === "refuse") await assert.rejects(client.freshNonce(), TypeError);
    assert.equal((await client.order("example.com")).status, 201);
  }
  assert.deepEqual(ca.violations, []);
});

Deno.test("a silent exchange lasts until the client gives up or the CA closes", async () => {
  const stage = await faulty();
  const { client, befall, ca } = stage;
  befall({ kind: "silence" });
  const nonce = await client.freshNonce();
  const impatient = fetch(client.directory.newOrder, {
    method: "POST",
    client: client.http,
    signal: AbortSignal.timeout(50),
    body: nonce,
  });
  await assert.rejects(impatient, { name: "TimeoutError" });
  befall({ kind: "silence" });
  const patient = fetch(client.directory.newOrder, { method: "POST", client: client.http }).then(
    (response) => response.status,
    () => 0,
  );
  const deadline = Date.now() + 5000;
  while (ca.log.filter(({ resource }) => resource === "newOrder").length < 2) {
    assert(Date.now() < deadline);
    await client.fetch(client.directory.newNonce);
  }
  await stage[Symbol.asyncDispose]();
  assert.notEqual(await patient, 201);
});

Deno.test("a client that says nothing, or half of what it meant, keeps no CA from closing", async () => {
  for (const fault of [undefined, () => undefined]) {
    const ca = await startCa({ fault });
    using _silent = await Deno.connect({ hostname: "127.0.0.1", port: ca.port });
    using halting = await Deno.connectTls({ hostname: "localhost", port: ca.port, caCerts: [ca.caBundle] });
    const head = "POST /new-order HTTP/1.1\r\nHost: localhost\r\nUser-Agent: test\r\nContent-Length: 100\r\n";
    await halting.write(new TextEncoder().encode(`${head}Content-Type: application/jose+json\r\n\r\n{`));
    const deadline = Date.now() + 5000;
    while (ca.log.length === 0) {
      assert(Date.now() < deadline);
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
    await ca.close();
    assert.deepEqual(ca.violations, []);
  }
});

Deno.test("many CAs start at once, each in a moment, and leave nothing behind", async () => {
  const begun = performance.now();
  const cas = await Promise.all(Array.from({ length: 20 }, () => startCa({ fault: () => undefined })));
  assert(performance.now() - begun < 20 * 300, `${performance.now() - begun} ms`);
  assert.equal(new Set(cas.map(({ port }) => port)).size, 20);
  assert.equal(Deno.readTextFileSync(cas[0]!.caBundleFile), cas[0]!.caBundle);
  for (const ca of cas) await ca.close();
  assert.throws(() => Deno.statSync(cas[0]!.caBundleFile), Deno.errors.NotFound);
});
