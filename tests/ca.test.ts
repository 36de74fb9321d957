/**
 * Goal: the test CA is a strict judge. It accepts a correct client, and names each violation by its problem type; what
 * happens to correct clients as well is refused without blame.
 */
import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { createHash, generateKeyPairSync, type KeyObject, sign, X509Certificate } from "node:crypto";
import { type Ca, type Fault, startCa, startWebroot, type Switches } from "./ca.ts";
import { importKey } from "./ca-jws.ts";

type Json = Record<string, unknown>;
// deno-lint-ignore no-explicit-any
type Body = any;

interface Reply {
  status: number;
  headers: Headers;
  text: string;
  body: Body;
}

/** How a request differs from a correct one. */
interface Change {
  header?: Json;
  without?: string[];
  http?: Record<string, string>;
  jws?: (jws: Record<string, string>) => unknown;
}

const base64url = (data: string | Uint8Array) => Buffer.from(data).toString("base64url");
const newKey = (namedCurve = "P-256") => generateKeyPairSync("ec", { namedCurve }).privateKey;
const weakKey = () => generateKeyPairSync("rsa", { modulusLength: 1024 }).privateKey;
const jwkOf = (key: KeyObject): Json => {
  const { d: _, ...jwk } = key.export({ format: "jwk" });
  return jwk as Json;
};
const flip = (text: string) => (text[0] === "A" ? "B" : "A") + text.slice(1);
const identifier = (value: string) => ({ type: /^[\d.]+$|:/.test(value) ? "ip" : "dns", value });

function signed(payload: unknown, header: Json, key: KeyObject): Record<string, string> {
  const [head, body] = [base64url(JSON.stringify(header)), base64url(JSON.stringify(payload) ?? "")];
  const hash = header.alg === "ES384" ? "sha384" : "sha256";
  const signature = base64url(sign(hash, Buffer.from(`${head}.${body}`), { key, dsaEncoding: "ieee-p1363" }));
  return { protected: head, payload: body, signature };
}

/** A client of a few lines that sends what it is given, right or wrong. */
class Client implements Disposable {
  kid?: string;
  nonce = "";
  readonly key = newKey();
  readonly jwk = jwkOf(this.key);
  readonly #http: Deno.HttpClient;
  constructor(readonly ca: Ca) {
    this.#http = Deno.createHttpClient({ caCerts: [ca.caBundle] });
  }

  url = (path: string) => this.ca.origin + path;

  [Symbol.dispose]() {
    this.#http.close();
  }

  async fetch(path: string, init: RequestInit = {}): Promise<Reply> {
    const response = await fetch(new URL(path, this.ca.origin), { ...init, client: this.#http });
    const { status, headers } = response;
    this.nonce = headers.get("replay-nonce") ?? this.nonce;
    const text = await response.text();
    const isJson = headers.get("content-type")?.includes("json") && text !== "";
    return { status, headers, text, body: isJson ? JSON.parse(text) : undefined };
  }

  async post(path: string, payload?: unknown, change: Change = {}, key = this.key): Promise<Reply> {
    if (this.nonce === "") await this.fetch("/new-nonce", { method: "HEAD" });
    const who = this.kid === undefined ? { jwk: jwkOf(key) } : { kid: this.kid };
    const url = new URL(path, this.ca.origin).href;
    const header: Json = { alg: "ES256", nonce: this.nonce, url, ...who, ...change.header };
    for (const name of change.without ?? []) delete header[name];
    this.nonce = "";
    const jws = signed(payload, header, key);
    const headers = { "content-type": "application/jose+json", ...change.http };
    return await this.fetch(path, {
      method: "POST",
      headers,
      body: JSON.stringify(change.jws?.(jws) ?? jws),
    });
  }

  async register(): Promise<this> {
    const { headers } = await this.post("/new-account", { termsOfServiceAgreed: true });
    this.kid = headers.get("location")!;
    return this;
  }

  order(names: readonly string[], more: Json = {}): Promise<Reply> {
    return this.post("/new-order", { identifiers: names.map(identifier), ...more });
  }

  /** Polls until a validation is over. */
  async settled(url: string): Promise<Body> {
    for (;;) {
      const { body } = await this.post(url);
      if (body.status !== "pending") return body;
    }
  }

  /** Has the first authorization of an order validated by a challenge of this type; the challenge as it ends. */
  async respond(order: Body, type: string, publish: (token: string, proof: string) => void): Promise<Body> {
    const url = order.authorizations[0];
    const of = ({ challenges }: Body) => challenges.find((challenge: Body) => challenge.type === type);
    const challenge = of((await this.post(url)).body);
    publish(challenge.token, `${challenge.token}.${importKey(this.jwk).thumbprint}`);
    await this.post(challenge.url, {});
    return of(await this.settled(url));
  }
}

/** A CA, a web server and a registered client. */
async function scene(switches: Switches = {}) {
  const stack = new AsyncDisposableStack();
  const dir = await Deno.makeTempDir({ prefix: "lematt-ca-test-" });
  stack.defer(() => Deno.remove(dir, { recursive: true }));
  const web = stack.use(startWebroot(dir));
  const ca = stack.use(await startCa({ httpPort: web.port, ...switches }));
  const client = await stack.use(new Client(ca)).register();
  const other = await stack.use(new Client(ca)).register();
  const key = newKey();

  async function openssl(...args: string[]): Promise<string> {
    const { stdout, stderr } = await new Deno.Command("openssl", { args, cwd: dir }).output();
    return new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
  }
  async function csrFor(names: readonly string[], { by = key, subject = "/" } = {}): Promise<string> {
    await Deno.writeTextFile(`${dir}/key.pem`, `${by.export({ format: "pem", type: "pkcs8" })}`);
    const san = `subjectAltName=${names.map((name) => `DNS:${name}`)}`;
    const args = ["-key", "key.pem", "-subj", subject, "-addext", san, "-outform", "DER", "-out", "csr.der"];
    await openssl("req", "-new", ...args);
    return base64url(await Deno.readFile(`${dir}/csr.der`));
  }
  const serve = (token: string, proof: string) => Deno.writeTextFileSync(`${dir}/${token}`, `${proof}\n`);
  /** An order of one name that is ready. */
  async function ready(name: string): Promise<Body> {
    const { body, headers } = await client.order([name]);
    if (body.status === "pending") {
      assert.equal((await client.respond(body, "http-01", serve)).status, "valid");
    }
    const url = headers.get("location")!;
    return { ...(await client.post(url)).body, url };
  }
  async function issue(name: string): Promise<string> {
    const { finalize } = await ready(name);
    const { body } = await client.post(finalize, { csr: await csrFor([name]) });
    return (await client.post(body.certificate)).text;
  }
  /** Asserts that `reply` is this problem, with a fresh nonce, and whether it counts as a violation. */
  function refused(what: unknown, reply: Reply, expected: string, isViolation = true) {
    const [, status = "400", type] = /^(?:(\d+) )?(\w+)$/.exec(expected)!;
    const about = `${JSON.stringify(what)}: ${reply.text}`;
    assert.deepEqual(
      [`${reply.status}`, reply.body?.type],
      [status, `urn:ietf:params:acme:error:${type}`],
      about,
    );
    assert.equal(reply.headers.get("content-type"), "application/problem+json");
    assert.deepEqual(ca.violations.splice(0).map(({ type }) => type), isViolation ? [type] : [], about);
  }
  const close = () => stack.disposeAsync();
  return { ca, client, other, dir, openssl, csrFor, ready, issue, refused, [Symbol.asyncDispose]: close };
}

Deno.test("a correct client gets a certificate that openssl verifies, and chains to each root", async () => {
  await using at = await scene({ alternateRoots: 1 });
  const { ca, client, dir } = at;
  const chain = await at.issue("example.com");
  await Deno.writeTextFile(`${dir}/root.pem`, ca.rootPem);
  await Deno.writeTextFile(`${dir}/chain.pem`, chain);
  const args = "-x509_strict -purpose sslserver -verify_hostname example.com -CAfile root.pem".split(" ");
  const said = await at.openssl("verify", ...args, "-untrusted", "chain.pem", "chain.pem");
  assert.equal(said, "chain.pem: OK\n");
  const [issued] = ca.issued;
  assert.equal(new X509Certificate(chain).serialNumber, issued!.serial);

  const first = await client.post(issued!.url);
  const [, link] = /<([^>]+)>;rel="alternate"/.exec(first.headers.get("link")!)!;
  const pems = (await client.post(link!)).text.match(/-----BEGIN[^]+?-----END CERTIFICATE-----/g)!;
  assert.equal(new X509Certificate(pems[1]!).issuer, "CN=lematt test root 2");
  assert.deepEqual([(await client.order(["example.com"])).body.status, ca.violations], ["ready", []]);
});

Deno.test("a request that breaks RFC 8555 §6 is a violation", async () => {
  await using at = await scene();
  const { ca, client } = at;
  const used = client.nonce;
  await client.order(["example.com"]);
  const table: [string, Change, string][] = [
    ["content type", { http: { "content-type": "application/json" } }, "415 malformed"],
    ["no User-Agent", { http: { "user-agent": "" } }, "malformed"],
    ["a nonce used twice", { header: { nonce: used } }, "badNonce"],
    ["a nonce from elsewhere", { header: { nonce: "AAAA" } }, "badNonce"],
    ["a nonce that is not base64url", { header: { nonce: "a+b/" } }, "malformed"],
    ["no nonce", { without: ["nonce"] }, "malformed"],
    ["another URL", { header: { url: client.url("/new-account") } }, "403 unauthorized"],
    ["no URL", { without: ["url"] }, "malformed"],
    ["both jwk and kid", { header: { jwk: client.jwk } }, "malformed"],
    ["neither jwk nor kid", { without: ["kid"] }, "malformed"],
    ["a jwk for a kid", { header: { jwk: client.jwk }, without: ["kid"] }, "malformed"],
    ["an unknown account", { header: { kid: client.url("/account/99") } }, "accountDoesNotExist"],
    ["a broken signature", { jws: (jws) => ({ ...jws, signature: flip(jws.signature!) }) }, "malformed"],
    ["another payload", { jws: (jws) => ({ ...jws, payload: "e30" }) }, "malformed"],
    ["padding", { jws: (jws) => ({ ...jws, payload: `${jws.payload}=` }) }, "malformed"],
    ["an unprotected header", { jws: (jws) => ({ ...jws, header: {} }) }, "malformed"],
    ["no object", { jws: (jws) => [jws] }, "malformed"],
    ["a critical header", { header: { crit: ["exp"] } }, "malformed"],
    ["no algorithm", { header: { alg: "none" } }, "badSignatureAlgorithm"],
    ["a MAC", { header: { alg: "HS256" } }, "badSignatureAlgorithm"],
  ];
  for (const [what, change, problem] of table) {
    const payload = { identifiers: [identifier("example.com")] };
    const reply = await client.post("/new-order", payload, change);
    assert(reply.headers.get("replay-nonce"), what);
    at.refused(what, reply, problem);
  }
  assert.equal(ca.orders.length, 1);
});

Deno.test("a method, a payload or an account that is not for a resource is a violation", async () => {
  await using at = await scene();
  const { client, other } = at;
  const { body, headers } = await client.order(["example.com"]);
  const order = headers.get("location")!;
  const [authz] = body.authorizations;
  await at.issue("issued.example.com");
  const { url: certificate } = at.ca.issued[0]!;
  const table: [string, () => Promise<Reply>, string][] = [
    ["GET of an order", () => client.fetch(order), "405 malformed"],
    ["POST to the directory", () => client.post("/dir"), "405 malformed"],
    ["POST to newNonce", () => client.post("/new-nonce"), "405 malformed"],
    ["POST to renewalInfo", () => client.post("/renewal-info/a.b"), "405 malformed"],
    ["POST-as-GET with {}", () => client.post(order, {}), "malformed"],
    ["newOrder without payload", () => client.post("/new-order"), "malformed"],
    ["a keyAuthorization", () => client.post(`${authz}/http-01`, { keyAuthorization: "" }), "malformed"],
    ["tls-alpn-01", () => client.post(`${authz}/tls-alpn-01`, {}), "malformed"],
    ["an unknown path", () => client.post("/nowhere"), "404 malformed"],
    ["an unknown order", () => client.post("/order/99"), "404 malformed"],
    ["an unknown challenge", () => client.post(`${authz}/dns-02`, {}), "404 malformed"],
    ["an unknown chain", () => client.post(`${certificate}/1`), "404 malformed"],
    ["another's order", () => other.post(order), "403 unauthorized"],
    ["another's authorization", () => other.post(authz), "403 unauthorized"],
    ["another's certificate", () => other.post(certificate), "403 unauthorized"],
    ["another's account", () => other.post(client.kid!), "403 unauthorized"],
    ["newAccount by kid", () => client.post("/new-account", {}), "malformed"],
  ];
  for (const [what, ask, problem] of table) at.refused(what, await ask(), problem);
});

Deno.test("newAccount and keyChange take what RFC 8555 §7.3 allows, and each algorithm", async () => {
  await using at = await scene();
  const { ca, client, other } = at;
  const agreed = { termsOfServiceAgreed: true };
  const contact = (...contact: string[]) => ({ ...agreed, contact });
  using guest = new Client(ca);
  const accounts: [Json, Change, string, boolean?][] = [
    [{}, {}, "403 userActionRequired"],
    [{ onlyReturnExisting: true }, {}, "accountDoesNotExist", false],
    [contact("tel:+123"), {}, "invalidContact"],
    [contact("mailto:a@example.com,b@example.com"), {}, "invalidContact"],
    [{ ...agreed, contact: "mailto:a@example.com" }, {}, "malformed"],
    [agreed, { header: { jwk: jwkOf(weakKey()) } }, "badPublicKey"],
    [agreed, { header: { jwk: { ...guest.jwk, y: guest.jwk.x } } }, "badPublicKey"],
    [agreed, { header: { jwk: { ...guest.jwk, d: guest.jwk.x } } }, "malformed"],
  ];
  for (const [payload, change, problem, isViolation] of accounts) {
    at.refused(payload, await guest.post("/new-account", payload, change), problem, isViolation);
  }

  const next = newKey("P-384");
  const inner = (payload: Json, header: Json = {}, key = next) => {
    const url = client.url("/key-change");
    const change = { account: client.kid, oldKey: client.jwk, ...payload };
    return signed(change, { alg: "ES384", jwk: jwkOf(key), url, ...header }, key);
  };
  const changes: [Json, string, boolean?][] = [
    [inner({ account: other.kid }), "malformed"],
    [inner({ oldKey: other.jwk }), "malformed"],
    [inner({}, { nonce: "AAAA" }), "malformed"],
    [inner({}, { url: client.url("/dir") }), "malformed"],
    [inner({}, { jwk: jwkOf(newKey("P-384")) }), "malformed"],
    [inner({}, { alg: "ES256" }, other.key), "409 malformed", false],
  ];
  for (const [payload, problem, isViolation] of changes) {
    at.refused(payload, await client.post("/key-change", payload), problem, isViolation);
  }
  assert.equal((await client.post("/key-change", inner({}))).status, 200);
  at.refused("the old key", await client.post(client.kid!), "badSignatureAlgorithm");
  assert.equal((await client.post(client.kid!, {}, { header: { alg: "ES384" } }, next)).status, 200);
  assert.deepEqual(ca.violations, []);
});

Deno.test("newOrder refuses identifiers, profiles and validities", async () => {
  await using at = await scene({ reject: (name) => name.endsWith(".example") ? "reserved" : undefined });
  const many = (count: number) => Array.from({ length: count }, (_, i) => `n${i}.example.com`);
  const table: [string[], Json, string, boolean?][] = [
    [[], {}, "malformed"],
    [[], { identifiers: [{ type: "email", value: "a@example.com" }] }, "unsupportedIdentifier"],
    ...["Example.com", "example.com.", "localhost", "-a.example.com", "a_b.example.com", "a.*.example.com"]
      .concat(`${"a".repeat(64)}.com`, `${"abc.".repeat(64)}com`)
      .map((name): [string[], Json, string] => [[name], {}, "malformed"]),
    [[], { identifiers: [{ type: "dns", value: "192.0.2.1" }] }, "malformed"],
    [["2001:DB8::1"], { profile: "shortlived" }, "malformed"],
    [["192.0.2.01"], { profile: "shortlived" }, "malformed"],
    [["example.com", "example.com"], {}, "malformed"],
    [many(26), { profile: "tlsserver" }, "malformed"],
    [["example.com"], { profile: "toString" }, "invalidProfile"],
    [["example.com"], { notAfter: "2030-01-01T00:00:00Z" }, "malformed"],
    [["192.0.2.1"], { profile: "classic" }, "rejectedIdentifier", false],
    [["a.example", "example.com"], {}, "rejectedIdentifier", false],
  ];
  for (const [names, more, type, isViolation] of table) {
    at.refused(names, await at.client.order(names, more), type, isViolation);
  }
  for (const names of [many(100), ["xn--mnchen-3ya.de", "*.xn--mnchen-3ya.de"]]) {
    assert.equal((await at.client.order(names)).status, 201);
  }
});

Deno.test("finalize takes a CSR for exactly the order's names, when the order is ready", async () => {
  await using at = await scene();
  const { client, csrFor } = at;
  const NAME = "example.com";
  const csr = await csrFor([NAME]);
  const pending = await client.order(["pending.example.com"]);
  at.refused("pending", await client.post(pending.body.finalize, { csr }), "403 orderNotReady");
  const order = await at.ready(NAME);
  const table: [string, string, string][] = [
    ["no name", await csrFor(["mail.example.com"]), "badCSR"],
    ["a name too many", await csrFor([NAME, "mail.example.com"]), "badCSR"],
    ["a name twice", await csrFor([NAME, NAME]), "badCSR"],
    ["another common name", await csrFor([NAME], { subject: "/CN=mail.example.com" }), "badCSR"],
    ["the account's key", await csrFor([NAME], { by: client.key }), "badCSR"],
    ["a weak key", await csrFor([NAME], { by: weakKey() }), "badPublicKey"],
    ["a broken signature", csr.slice(0, -8) + flip(csr.slice(-8)), "badCSR"],
    ["no CSR", "AAAA", "badCSR"],
    ["PEM", "-----BEGIN CERTIFICATE REQUEST-----", "malformed"],
  ];
  for (const [what, csr, type] of table) {
    at.refused(what, await client.post(order.finalize, { csr }), type);
    assert.equal((await client.post(order.url)).body.status, "ready", what);
  }
  assert.equal((await client.post(order.finalize, { csr })).body.status, "valid");
  at.refused("after a lost answer", await client.post(order.finalize, { csr }), "403 orderNotReady", false);
  at.refused("another", await client.post(order.finalize, { csr: table[0]![1] }), "403 orderNotReady");
});

Deno.test("a challenge is valid only where the proof is right", async () => {
  const records = new Map<string, string[]>();
  await using at = await scene({ txt: (name) => Promise.resolve(records.get(name) ?? []) });
  const { client, dir } = at;
  const web = (change: (proof: string) => string) => (token: string, proof: string) =>
    Deno.writeTextFileSync(`${dir}/${token}`, change(proof));
  const dns = (change: (value: string) => string[]) => (_token: string, proof: string) => {
    const value = createHash("sha256").update(proof).digest("base64url");
    records.set("_acme-challenge.example.com", change(value));
  };
  const table: [string, (token: string, proof: string) => void, string | undefined][] = [
    ["http-01", web((proof) => proof.split(".")[0]!), "unauthorized"],
    ["http-01", web((proof) => ` ${proof}`), "unauthorized"],
    ["http-01", web((proof) => proof + " ".repeat(10_000)), "connection"],
    ["http-01", () => {}, "unauthorized"],
    ["dns-01", dns(() => ["other"]), "unauthorized"],
    ["dns-01", dns(() => []), "unauthorized"],
    ["dns-01", dns((value) => ["other", value]), undefined],
  ];
  for (const [type, publish, error] of table) {
    const { body } = await client.order(["example.com"]);
    const challenge = await client.respond(body, type, publish);
    assert.equal(challenge.error?.type, error && `urn:ietf:params:acme:error:${error}`);
    assert.equal(challenge.status, error ? "invalid" : "valid");
  }
  assert.deepEqual(at.ca.violations, []);
});

Deno.test("polling before Retry-After is a violation", async () => {
  await using at = await scene({ processingMs: Infinity, retryAfterSeconds: 30 });
  const { client, ca } = at;
  const { finalize, url } = await at.ready("example.com");
  ca.violations.splice(0); // its own haste
  await client.post(finalize, { csr: await at.csrFor(["example.com"]) });
  ca.advance(30_000);
  assert.equal((await client.post(url)).headers.get("retry-after"), "30");
  assert.deepEqual(ca.violations, []);
  await client.post(url);
  assert.deepEqual(ca.violations.map(({ url, type }) => [url, type]), [[url, "tooSoon"]]);
});

Deno.test("certIDs, `replaces` and revocations are judged", async () => {
  await using at = await scene();
  const { client, other, ca } = at;
  const one = await at.issue("one.example.com"); // its serial needs a zero octet in DER
  await at.issue("two.example.com");
  const { certId } = ca.issued[0]!;
  const [keyId, serial] = certId.split(".") as [string, string];
  const withoutZero = base64url(Buffer.from(serial, "base64url").subarray(1));
  const info = (certId: string) => client.fetch(`/renewal-info/${certId}`);
  const replace = (name: string, by = client) => by.order([name], { replaces: certId });
  const raw = (pem: string) => base64url(new X509Certificate(pem).raw);
  const revoke = (reason: number, by = client) => by.post("/revoke-cert", { certificate: raw(one), reason });
  const byKey = async () => {
    using stranger = new Client(ca);
    return await stranger.post("/revoke-cert", { certificate: raw(one) });
  };
  assert.equal((await info(certId)).status, 200);
  assert.equal((await replace("one.example.com")).status, 201);
  assert.deepEqual(ca.violations, []);

  const table: [string, () => Promise<Reply>, string, boolean?][] = [
    ["half a certID", () => info(keyId), "malformed"],
    ["padding", () => info(`${keyId}=.${serial}`), "malformed"],
    ["a serial without its zero octet", () => info(`${keyId}.${withoutZero}`), "404 malformed"],
    ["a certificate of another CA", () => info(`${flip(keyId)}.${serial}`), "404 malformed", false],
    ["replaces another name", () => replace("three.example.com"), "malformed"],
    ["replaces another's", () => replace("one.example.com", other), "403 unauthorized"],
    ["replaces twice", () => replace("one.example.com"), "409 alreadyReplaced", false],
    ["revokes no certificate", () => client.post("/revoke-cert", { certificate: "AAAA" }), "404 malformed"],
    ["revokes with a CA's reason", () => revoke(2), "badRevocationReason"],
    ["revokes another's", () => revoke(1, other), "403 unauthorized"],
    ["revokes by another key", byKey, "403 unauthorized"],
    ["revokes twice", () => revoke(4).then(() => revoke(4)), "alreadyRevoked", false],
  ];
  for (const [what, ask, problem, isViolation] of table) {
    at.refused(what, await ask(), problem, isViolation);
  }
  await info(certId);
  assert.deepEqual(ca.violations.map(({ type }) => type), ["tooSoon"]);
});

Deno.test("a fault comes in the exchange it was chosen for, and the CA has handled that or not as it says", async () => {
  let next: Fault | undefined;
  await using at = await scene({
    fault({ resource }) {
      if (resource !== "newOrder") return undefined;
      const fault = next;
      next = undefined;
      return fault;
    },
  });
  const { client, ca } = at;
  /** Undefined where the client gets no answer. */
  const table: [Fault, boolean, RegExp | undefined][] = [
    [{ kind: "status", status: 503, headers: { "retry-after": "7" } }, false, /^503 .*retry-after,7/],
    [{ kind: "html" }, false, /^200 .*text\/html/],
    [{ kind: "badNonce" }, false, /^400 .*:badNonce"/],
    [{ kind: "drop header", name: "location" }, true, /^201 (?!.*location)/],
    [{ kind: "rewrite", rewrite: (order) => ({ ...order, x: 1 }) }, true, /"x":1/],
    [{ kind: "repeat" }, false, /^201 /],
    [{ kind: "after", fault: { kind: "status", status: 502 } }, true, /^502 /],
    [{ kind: "reset" }, false, undefined],
    [{ kind: "refuse" }, false, undefined],
    [{ kind: "reset mid-body" }, true, undefined],
    [{ kind: "truncate" }, true, undefined],
    [{ kind: "after", fault: { kind: "reset" } }, true, undefined],
  ];
  for (const [fault, isHandled, expected] of table) {
    assert.equal((await client.order(["example.com"])).status, 201, "what `repeat` gives again");
    const [before, what] = [ca.orders.length, JSON.stringify(fault)];
    client.nonce = "";
    await client.fetch("/new-nonce");
    next = fault;
    const asking = client.order(["example.com"])
      .then(({ status, headers, text }) => `${status} ${[...headers]} ${text}`);
    if (expected === undefined) await assert.rejects(asking, what);
    else assert.match(await asking, expected, what);
    assert.equal(ca.orders.length - before, isHandled ? 1 : 0, what);
    client.nonce = "";
    if (fault.kind === "refuse") await assert.rejects(client.fetch("/new-nonce"), TypeError);
  }
  assert.deepEqual(ca.violations, []);
});

Deno.test("a client that says nothing, and an exchange that is silent, keep no CA from closing", async () => {
  await using stack = new AsyncDisposableStack();
  const ca = await startCa({ fault: () => ({ kind: "silence" }) });
  using _silent = await Deno.connect({ hostname: "127.0.0.1", port: Number(new URL(ca.origin).port) });
  const client = stack.use(new Client(ca));
  const asking = client.fetch("/dir").then(({ status }) => status, () => 0);
  while (ca.log.length === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  await ca.close();
  assert.notEqual(await asking, 200);
});
