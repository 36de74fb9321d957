/**
 * An ACME CA in this process, for the tests, `deno task demo` and the benchmarks: those parts of RFC 8555 (and 8738, 9773,
 * profiles, dns-persist-01) that lematt uses, with a clock that tests can advance, and with faults that tests inject. It
 * imports nothing from lib/. Pebble (pebble.ts) is stricter, but has neither this clock nor these faults.
 *
 * Every exchange is in `ca.log`; requests that a correct client never sends are in `ca.violations`, which tests expect to be
 * empty.
 */
import { Buffer } from "node:buffer";
import { createPrivateKey, createPublicKey, randomBytes, X509Certificate } from "node:crypto";
import { once } from "node:events";
import { dirname } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import * as jose from "jose";
import { ISSUER, validate } from "./ca-validate.ts";
import * as wire from "./ca-wire.ts";
import { type Answer, type Fault, json, malformed, refusal, violation } from "./ca-wire.ts";
import * as x509 from "./ca-x509.ts";

export { type Dns, startDns } from "./ca-dns.ts";
export { type Fault, startWebroot, type Webroot } from "./ca-wire.ts";

const HOUR = 3600_000, DAY = 24 * HOUR;
/** The profiles and their lifetimes, as at Let's Encrypt in 2026. */
const PROFILES: Readonly<Record<string, number>> = {
  classic: 90 * DAY,
  tlsserver: 45 * DAY,
  shortlived: 160 * HOUR,
};

/** Each is the first segment of a path. */
const RESOURCES = [
  ...["directory", "newNonce", "newAccount", "newOrder", "revokeCert", "keyChange", "renewalInfo"] as const,
  ...["account", "authz", "challenge", "order", "finalize", "certificate", "unknown"] as const,
];
export type Resource = typeof RESOURCES[number];

/** A request and its answer; `n` counts the requests to this CA, from 1. */
export interface Exchange {
  readonly n: number;
  readonly method: string;
  readonly url: string;
  readonly resource: Resource;
  /** The same number for all requests of one connection. */
  readonly connection: number;
  /** The status of the answer; 0 if there is none, or not yet. */
  status: number;
  /** Whether the answer is as the CA wants it: no fault has changed it. */
  isTrue: boolean;
}

export interface Switches {
  /** Port of 127.0.0.1 on which http-01 is fetched for all names, or for each; throws if the name does not resolve. */
  httpPort?: number | ((name: string) => number);
  /** Port of the DNS server on 127.0.0.1, for dns-01 and dns-persist-01. */
  dnsPort?: number;
  validationDelayMs?: number;
  /**
   * What becomes invalid after a failed validation: the order too (default), only the authorization (acme2certifier), or
   * nothing: the challenge stays pending with its error and may be responded to again (step-ca, Caddy).
   */
  failure?: "order" | "authorization" | "challenge";
  /** Which authorizations of the account a new order reuses: none, valid ones (default), or pending ones too. */
  reuse?: "none" | "valid" | "pending";
  processingMs?: number;
  /** At most `count` requests in any `windowMs` of the CA's clock. */
  limits?: Partial<Record<Resource, { readonly count: number; readonly windowMs: number }>>;
  fault?: (exchange: Exchange) => Fault | undefined;
}

interface Account {
  readonly url: string;
  contact: unknown;
  key: SigningKey;
}

type SigningKey = Awaited<ReturnType<typeof keyOf>>;

export interface Order {
  readonly url: string;
  readonly account: Account;
  readonly identifiers: readonly x509.Identifier[];
  readonly authorizations: readonly Authorization[];
  readonly profile: string;
  readonly replaces?: string;
  status: "pending" | "ready" | "processing" | "valid" | "invalid";
  error?: wire.ProblemDocument;
  /** The CSR that finalize accepted, in base64url and parsed. */
  csr?: string;
  request?: x509.Request;
  /** When `processing` ends, by performance.now(). */
  doneAt?: number;
  certificate?: string;
}

export interface Authorization {
  readonly url: string;
  readonly account: Account;
  readonly identifier: x509.Identifier;
  readonly wildcard?: true;
  readonly challenges: readonly Challenge[];
  status: "pending" | "valid" | "invalid";
  expires: Date;
}

/** RFC 8555 §8, as it is shown. */
export interface Challenge {
  readonly url: string;
  readonly type: string;
  readonly token?: string;
  status: "pending" | "processing" | "valid" | "invalid";
  error?: wire.ProblemDocument;
}

interface Issued {
  readonly account: Account;
  /** Upper-case hexadecimal, as node:crypto and openssl show it. */
  readonly serial: string;
  /** RFC 9773 §4.1. */
  readonly certId: string;
  readonly names: readonly string[];
  readonly keyType: "rsa" | "ec";
  readonly replaces?: string;
  readonly pem: string;
  revoked?: { readonly reason: number };
  /** The renewal information (RFC 9773 §4.2); a test may change it. */
  renewalWindow: { readonly start: Date; readonly end: Date; readonly explanationURL?: string };
}

/** A request with a valid signature; `account` only if it was signed with `kid`. */
type Signed = Omit<Awaited<ReturnType<typeof verified>>, "header"> & { readonly account?: Account };

// ---- the CA ------------------------------------------------------------------------------------------------------

export async function startCa(switches: Switches = {}): Promise<Ca> {
  const life = { notBefore: new Date(Date.now() - DAY), notAfter: new Date(Date.now() + 1e12) };
  const [root, issuer] = ["lematt test root 1", "lematt test intermediate"].map(x509.createAuthority);
  const chain = await x509.certify({ ...issuer!, ...life, authority: true }, root!);
  const listener = await x509.listenerCertificate();
  const server = await wire.listen(listener, (request, connection) => ca.serve(request, connection));
  // in a directory of its own, which a test may open to another user
  const caBundleFile = `${await Deno.makeTempDir({ prefix: "lematt-ca-" })}/bundle.pem`;
  await Deno.writeTextFile(caBundleFile, listener.root);
  const ca = new Ca(switches, listener.root, caBundleFile, server, issuer!, chain);
  return ca;
}

export class Ca implements AsyncDisposable {
  readonly origin: string;
  readonly directoryUrl: string;
  readonly refused = new Set<string>();
  readonly log: Exchange[] = [];
  /** Requests that a correct client never sends; `type` is that of the problem, or `tooSoon` for asking before Retry-After. */
  readonly violations: (Exchange & { readonly type: string; readonly detail: string })[] = [];
  readonly accounts: Account[] = [];
  readonly orders: Order[] = [];
  readonly issued: Issued[] = [];
  /** The validations, also those that failed; `name` begins with `*.` for a wildcard. */
  readonly validations: { readonly type: string; readonly name: string }[] = [];

  readonly #nonces = new Set<string>();
  /** The connection by which each signed request came first. */
  readonly #signed = new Map<string, number>();
  /** The last answer of each URL, for the fault `repeat`. */
  readonly #previous = new Map<string, Answer>();
  /** The earliest time of the next request for each renewal information, by the CA's clock. */
  readonly #askAt = new Map<string, number>();
  readonly #authorizations: Authorization[] = [];
  /** The times of the requests that count for each limit, by the CA's clock. */
  readonly #uses: Partial<Record<Resource, number[]>> = {};
  readonly #validating = new Set<Promise<void>>();
  readonly #closing = new AbortController();
  #offsetMs = 0;

  constructor(
    readonly switches: Switches,
    /** PEM of the root certificate of the listener, and a file with it. */
    readonly caBundle: string,
    readonly caBundleFile: string,
    private readonly server: wire.Server,
    private readonly issuer: x509.Authority,
    private readonly chain: string,
  ) {
    this.origin = `https://localhost:${server.port}`;
    this.directoryUrl = `${this.origin}/directory`;
  }

  /** The CA's clock, used for certificates, expiry and limits. */
  get now(): Date {
    return new Date(Date.now() + this.#offsetMs);
  }

  advance(ms: number): void {
    this.#offsetMs += ms;
  }

  /** A certificate for a private key (PEM) without an order, with its chain (PEM). */
  async forge(key: string, names: readonly string[], life: x509.Life): Promise<string> {
    const publicKey = createPublicKey(createPrivateKey(key));
    return await x509.certify({ publicKey, names, ...life }, this.issuer) + this.chain;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort();
    await this.server[Symbol.asyncDispose]();
    await Promise.all(this.#validating);
    await Deno.remove(dirname(this.caBundleFile), { recursive: true });
  }

  // ---- an exchange -------------------------------------------------------------------------------------------------

  async serve(request: Request, connection: number): Promise<Response> {
    const { pathname } = new URL(request.url);
    const [, first, id = ""] = pathname.split("/");
    const resource = RESOURCES.find((name) => name === first) ?? "unknown";
    const [n, method, url] = [this.log.length + 1, request.method, this.origin + pathname];
    const entry: Exchange = { n, method, url, resource, connection, status: 0, isTrue: false };
    this.log.push(entry);
    let own: Answer | undefined;
    const handle = async () => own = await this.#handle(request, entry, id);
    const answer = await this.#answerUnder(this.switches.fault?.(entry), entry, handle);
    if (answer === undefined) return new Response(null, { status: 503 }); // the connection is broken
    entry.status = answer.status;
    entry.isTrue = answer === own;
    return wire.respond(answer, this.now);
  }

  /** The answer under a fault; undefined if the client gets none. */
  async #answerUnder(
    fault: Fault | undefined,
    entry: Exchange,
    handle: () => Promise<Answer>,
  ): Promise<Answer | undefined> {
    const rewritten = async (rewrite: (body: string) => string | Promise<string>) => {
      const answer = await handle();
      return { ...answer, body: await rewrite(answer.body ?? "") };
    };
    switch (fault?.kind) {
      case undefined:
        return await handle();
      case "reset":
      case "refuse":
        return void this.server.break(entry.connection, fault.kind === "refuse");
      case "silence":
        return void await once(this.#closing.signal, "abort");
      case "status": {
        const { status, body, contentType = "application/problem+json", headers } = fault;
        return { status, headers: { "content-type": contentType, ...headers }, body };
      }
      case "html":
        return { status: 200, headers: { "content-type": "text/html; charset=utf-8" }, body: wire.HTML };
      case "badNonce":
        return this.#refuse(refusal(400, "badNonce", "injected"), entry);
      case "repeat":
        return this.#previous.get(entry.url) ?? await handle();
      case "truncate":
        return await rewritten((body) => body.slice(0, body.length / 2));
      case "drop header": {
        const answer = await handle();
        const { [fault.name]: dropped, ...headers } = answer.headers;
        return dropped === undefined ? answer : { ...answer, headers };
      }
      case "rewrite":
        return await rewritten((body) => JSON.stringify(fault.rewrite(JSON.parse(body || "{}"))));
      case "rewrite text":
        return await rewritten(fault.rewrite);
      case "reset mid-body":
        return { ...await handle(), isCut: true };
      case "after": {
        const answer = await handle();
        return await this.#answerUnder(fault.fault, entry, () => Promise.resolve(answer));
      }
    }
  }

  async #handle(request: Request, entry: Exchange, id: string): Promise<Answer> {
    let answer: Answer;
    try {
      answer = this.#finish(await this.#answer(request, entry, id), entry);
    } catch (error) {
      if (!(error instanceof wire.Problem)) throw error;
      answer = this.#refuse(error, entry);
    }
    this.#previous.set(entry.url, answer);
    return answer;
  }

  #refuse({ status, type, message, document, headers, isViolation }: wire.Problem, entry: Exchange): Answer {
    if (isViolation) this.violations.push({ ...entry, type, detail: message });
    const contentType = { "content-type": "application/problem+json" };
    return this.#finish(json(status, document, { ...contentType, ...headers }), entry);
  }

  /** Adds the headers of every answer (RFC 8555 §6.5, §7.1). */
  #finish(answer: Answer, { method }: Exchange): Answer {
    const index = `<${this.directoryUrl}>;rel="index"`;
    const headers = { ...answer.headers, link: [answer.headers.link ?? [], index].flat().join() };
    if (method === "GET") return { ...answer, headers };
    const nonce = randomBytes(16).toString("base64url");
    this.#nonces.add(nonce);
    return { ...answer, headers: { ...headers, "replay-nonce": nonce } };
  }

  async #answer(request: Request, entry: Exchange, id: string): Promise<Answer> {
    const { resource, url } = entry;
    if (resource === "unknown") throw violation(404, "malformed", `there is nothing at ${url}`);
    if (resource !== "newOrder") this.#use(resource);
    if (resource === "directory") return this.#directory();
    if (resource === "newNonce") return { status: 200, headers: { "cache-control": "no-store" } };
    if (resource === "renewalInfo") return this.#renewalInfo(entry, id);

    const signed = await this.#authenticate(request, entry);
    if (resource === "newAccount") return this.#newAccount(signed);
    if (resource === "revokeCert") return await this.#revoke(signed);
    const { account, payload } = signed;
    if (account === undefined) throw malformed(`${resource} is signed by kid`);
    switch (resource) {
      case "newOrder":
        return await this.#newOrder(account, parsed(payload));
      case "keyChange":
        return await this.#changeKey(account, payload);
      case "account":
        if (url !== account.url) throw violation(403, "unauthorized", `${url} is another account`);
        if (payload !== "") account.contact = parsed(payload).contact;
        return showAccount(account);
      case "challenge":
        return this.#challenge(own(this.#authorizations, id, account), entry, payload);
      case "finalize":
        await this.#finalize(own(this.orders, id, account), `${parsed(payload).csr}`);
        return await this.#order(own(this.orders, id, account));
    }
    if (payload !== "") throw malformed("POST-as-GET has an empty payload"); // RFC 8555 §6.3
    if (resource === "order") return await this.#order(own(this.orders, id, account));
    if (resource === "authz") return json(200, showAuthorization(own(this.#authorizations, id, account)));
    const headers = { "content-type": "application/pem-certificate-chain" };
    return { status: 200, headers, body: own(this.issued, id, account).pem };
  }

  /** RFC 8555 §6.2 to §6.5. */
  async #authenticate(request: Request, entry: Exchange): Promise<Signed> {
    if (request.headers.get("content-type") !== "application/jose+json") {
      throw violation(415, "malformed", "the content type is not application/jose+json");
    }
    const text = await request.text().catch(() => {
      throw refusal(400, "malformed", "the client went away in the middle of its request");
    });
    const { connection } = entry;
    const first = this.#signed.get(text) ?? connection;
    // not by the client, which would sign it again: fetch() itself repeats a request if the connection breaks
    if (first !== connection) throw refusal(400, "badNonce", "the same request came by another connection");
    this.#signed.set(text, connection);
    const { header: { nonce, url, kid }, ...signed } = await verified(text, (kid) => {
      const account = this.accounts.find(({ url }) => url === kid);
      if (account === undefined) throw violation(400, "accountDoesNotExist", `there is no account ${kid}`);
      return account.key;
    });
    if (!this.#nonces.delete(`${nonce}`)) {
      throw violation(400, "badNonce", "the nonce was used before, or is not from here");
    }
    if (url !== entry.url) throw violation(403, "unauthorized", `the signed URL is ${url}, not ${entry.url}`);
    return { ...signed, account: this.accounts.find(({ url }) => url === kid) };
  }

  /** Counts a request; throws `rateLimited` if its limit is exceeded. */
  #use(resource: Resource): void {
    const { count, windowMs } = this.switches.limits?.[resource] ?? { count: Infinity, windowMs: 0 };
    const now = this.now.getTime();
    const uses = this.#uses[resource] = (this.#uses[resource] ?? []).filter((at) => at > now - windowMs);
    if (uses.length < count) return void uses.push(now);
    const seconds = Math.ceil((uses[uses.length - count]! + windowMs - now) / 1000);
    throw refusal(429, "rateLimited", `too many ${resource} (${count})`, { "retry-after": `${seconds}` });
  }

  #directory(): Answer {
    const offered = RESOURCES.slice(1, 7).map((name) => [name, `${this.origin}/${name}`]);
    const profiles = Object.keys(PROFILES).map((name) => [name, `https://localhost/profiles#${name}`]);
    const meta = { caaIdentities: [ISSUER], profiles: Object.fromEntries(profiles) };
    return json(200, { ...Object.fromEntries(offered), meta });
  }

  // ---- accounts (RFC 8555 §7.3) ------------------------------------------------------------------------------------

  #newAccount({ account, payload, key }: Signed): Answer {
    if (account !== undefined) throw malformed("newAccount is signed by jwk");
    const { onlyReturnExisting, contact = [] } = parsed(payload);
    const existing = this.accounts.find((known) => known.key.thumbprint === key.thumbprint);
    if (existing !== undefined) return showAccount(existing);
    if (onlyReturnExisting) throw refusal(400, "accountDoesNotExist", "there is no account with this key");
    const created: Account = { url: `${this.origin}/account/${this.accounts.length + 1}`, contact, key };
    this.accounts.push(created);
    return showAccount(created, 201);
  }

  /** §7.3.5: the outer JWS is signed with the old key, the inner JWS with the new one. */
  async #changeKey(account: Account, payload: string): Promise<Answer> {
    const inner = await verified(payload, () => account.key);
    const change = parsed(inner.payload);
    const old = await jose.calculateJwkThumbprint(change.oldKey as jose.JWK);
    if (change.account !== account.url || old !== account.key.thumbprint) {
      throw malformed("the inner payload names another account or another old key");
    }
    account.key = inner.key;
    return showAccount(account);
  }

  // ---- orders (§7.4) -----------------------------------------------------------------------------------------------

  async #newOrder(account: Account, request: Record<string, unknown>): Promise<Answer> {
    const identifiers = request.identifiers as x509.Identifier[];
    const { profile = "classic" } = request as { profile?: string };
    if (!(profile in PROFILES)) throw violation(400, "invalidProfile", `there is no profile ${profile}`);
    const refused = identifiers.filter(({ value }) => this.refused.has(value));
    if (refused.length > 0) {
      const problem = refusal(400, "rejectedIdentifier", "the policy forbids it");
      const { document } = refusal(400, "rejectedIdentifier", "not this one");
      problem.document.subproblems = refused.map((identifier) => ({ ...document, identifier }));
      throw problem;
    }
    const replaces = request.replaces as string | undefined;
    if (replaces === undefined) this.#use("newOrder"); // others are exempt, as at Let's Encrypt
    else if (this.#findByCertId(replaces).account !== account) {
      throw violation(403, "unauthorized", "the certificate to be replaced belongs to another account");
    }
    const url = `${this.origin}/order/${this.orders.length}`;
    const authorizations = identifiers.map((identifier) => this.#authorize(account, identifier));
    const order: Order = { url, account, identifiers, authorizations, profile, replaces, status: "pending" };
    this.orders.push(order);
    await this.#update(order);
    return json(201, showOrder(order), { location: url });
  }

  /** The authorization of a new order for a name: an existing one if `reuse` allows it, otherwise a new one. */
  #authorize(account: Account, { type, value }: x509.Identifier): Authorization {
    const isWildcard = value.startsWith("*.");
    const name = value.replace(/^\*\./, "");
    const last = this.#authorizations.findLast((known) =>
      known.account === account && known.identifier.value === name &&
      known.wildcard === (isWildcard || undefined)
    );
    const { reuse = "valid" } = this.switches;
    if (last !== undefined && reuse !== "none" && last.expires > this.now) {
      if (last.status === "valid" || last.status === "pending" && reuse === "pending") return last;
    }
    const id = this.#authorizations.length;
    const types = ["tls-alpn-01", "dns-persist-01", "dns-01", "http-01"].filter((challenge) =>
      challenge.startsWith("dns") ? type === "dns" : !isWildcard
    );
    const persistent = { accounturi: account.url, "issuer-domain-names": [ISSUER] };
    const token = () => ({ token: randomBytes(32).toString("base64url") });
    const authorization: Authorization = {
      url: `${this.origin}/authz/${id}`,
      account,
      identifier: { type, value: name },
      wildcard: isWildcard || undefined,
      challenges: types.map((type) => {
        const proof = type === "dns-persist-01" ? persistent : token();
        return { url: `${this.origin}/challenge/${id}/${type}`, type, ...proof, status: "pending" };
      }),
      status: "pending",
      expires: new Date(this.now.getTime() + 7 * DAY),
    };
    this.#authorizations.push(authorization);
    return authorization;
  }

  /**
   * Updates the status of an order from its authorizations and the clock (RFC 8555 §7.1.6). It becomes invalid only after
   * the last validation, so that its error contains every failure.
   */
  async #update(order: Order): Promise<void> {
    const { status, authorizations } = order;
    if (status === "processing" && performance.now() >= order.doneAt!) await this.#issue(order);
    if (status !== "pending" || authorizations.some(isValidating)) return;
    const failed = authorizations.filter(({ status }) => status === "invalid");
    if (failed.length > 0 && this.switches.failure !== "authorization") {
      order.status = "invalid";
      order.error = summary(failed);
    } else if (authorizations.every(({ status }) => status === "valid")) {
      order.status = "ready";
    }
  }

  async #order(order: Order): Promise<Answer> {
    await this.#update(order);
    return json(200, showOrder(order), { location: order.url }); // also after finalize, as Boulder does
  }

  // ---- challenges (§7.5.1) -----------------------------------------------------------------------------------------

  #challenge(authorization: Authorization, entry: Exchange, payload: string): Answer {
    const challenge = authorization.challenges.find(({ url }) => url === entry.url);
    if (challenge === undefined) throw violation(404, "malformed", `there is nothing at ${entry.url}`);
    if (payload !== "{}") throw malformed("the answer to a challenge is {}");
    if (challenge.status === "pending") {
      if (authorization.status !== "pending" || isValidating(authorization)) {
        throw malformed(`the authorization is ${authorization.status} and no challenge is expected`);
      }
      challenge.status = "processing";
      const done = this.#validate(authorization, challenge).finally(() => this.#validating.delete(done));
      this.#validating.add(done);
    }
    return json(200, challenge, { link: `<${authorization.url}>;rel="up"` });
  }

  async #validate(authorization: Authorization, challenge: Challenge): Promise<void> {
    const { identifier: { value: name }, wildcard } = authorization;
    const { switches, now } = this;
    const { signal } = this.#closing;
    try {
      if (switches.validationDelayMs) await delay(switches.validationDelayMs, undefined, { signal });
      await validate(authorization, challenge, switches, signal);
      challenge.status = authorization.status = "valid";
      challenge.error = undefined;
      authorization.expires = new Date(now.getTime() + 30 * DAY);
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof wire.Problem)) throw error;
      if (switches.failure === "challenge") challenge.status = "pending";
      else challenge.status = authorization.status = "invalid";
      challenge.error = error.document;
    }
    this.validations.push({ type: challenge.type, name: wildcard ? `*.${name}` : name });
  }

  // ---- certificates (§7.4, §7.6, RFC 9773) -------------------------------------------------------------------------

  /** Accepts the CSR (base64url) of an order that is ready; it must have exactly the names of the order. */
  async #finalize(order: Order, csr: string): Promise<void> {
    await this.#update(order);
    if (order.status !== "ready") {
      // a correct client repeats finalize if the answer is lost
      const problemOf = order.csr === csr ? refusal : violation;
      throw problemOf(403, "orderNotReady", `the order is ${order.status}`);
    }
    const request = await x509.readRequest(new Uint8Array(Buffer.from(csr, "base64url"))).catch((error) => {
      throw violation(400, "badCSR", `the CSR cannot be read: ${error.message}`);
    });
    const [asked, ordered] = [request, order].map(({ identifiers }) =>
      identifiers.map(({ type, value }) => `${type}:${value}`).sort().join()
    );
    if (asked !== ordered) {
      throw violation(400, "badCSR", `the CSR is for ${asked}, the order for ${ordered}`);
    }
    const doneAt = performance.now() + (this.switches.processingMs ?? 0);
    Object.assign(order, { request, csr, status: "processing", doneAt });
  }

  async #issue(order: Order): Promise<void> {
    order.doneAt = Infinity; // another request for this order does not issue as well
    const { account, identifiers, profile, replaces, request } = order;
    const { commonNames, publicKey } = request!;
    const names = identifiers.map(({ value }) => value);
    // backdated by an hour, as at other CAs; the first and the last second belong to the lifetime
    const notBefore = new Date(Math.floor(this.now.getTime() / 1000) * 1000 - HOUR);
    const lifetime = PROFILES[profile]!;
    const notAfter = new Date(notBefore.getTime() + lifetime - 1000);
    // every second serial begins with a set bit: in DER, and so in the certID, it needs a zero octet before it
    const isHigh = this.orders.indexOf(order) % 2 === 0;
    const serial = (isHigh ? "CE" : "4E") + randomBytes(15).toString("hex").toUpperCase();
    const commonName = profile === "classic" ? commonNames[0] : undefined;
    const contents = { publicKey, commonName, names, serial, notBefore, notAfter };
    // around a third of the lifetime before expiry, or a half for short lifetimes, as Let's Encrypt recommends
    const middle = notAfter.getTime() - lifetime / (lifetime < 10 * DAY ? 2 : 3);
    const [start, end] = [-1, 1].map((side) => new Date(middle + side * lifetime / 50));
    const issued: Issued = {
      account,
      serial,
      certId: `${base64url(this.issuer.keyId)}.${base64url((isHigh ? "00" : "") + serial)}`,
      names,
      keyType: publicKey.asymmetricKeyType === "rsa" ? "rsa" : "ec",
      replaces,
      pem: await x509.certify(contents, this.issuer) + this.chain,
      renewalWindow: { start: start!, end: end! },
    };
    order.certificate = `${this.origin}/certificate/${this.issued.push(issued) - 1}`;
    order.status = "valid";
  }

  #findByCertId(certId: string): Issued {
    const issued = this.issued.find((issued) => issued.certId === certId);
    if (issued !== undefined) return issued;
    // with the key identifier of this CA, the client has encoded the serial wrongly; otherwise the certificate is of another CA
    const isOwn = certId.startsWith(base64url(this.issuer.keyId));
    throw (isOwn ? violation : refusal)(404, "malformed", `no certificate has the certID ${certId}`);
  }

  #renewalInfo(entry: Exchange, certId: string): Answer {
    const { explanationURL, ...suggestedWindow } = this.#findByCertId(certId).renewalWindow;
    const now = this.now.getTime();
    const early = (this.#askAt.get(certId) ?? 0) - now;
    if (early > 0) {
      this.violations.push({ ...entry, type: "tooSoon", detail: `${early} ms before Retry-After` });
    }
    this.#askAt.set(certId, now + 6 * HOUR); // as Let's Encrypt
    return json(200, { suggestedWindow, explanationURL }, { "retry-after": `${6 * 3600}` });
  }

  /** RFC 8555 §7.6: signed by the account that ordered the certificate, or with the certificate's own key. */
  async #revoke({ account, payload, key }: Signed): Promise<Answer> {
    const { certificate, reason = 0 } = parsed(payload) as { certificate: string; reason?: number };
    const leaf = new X509Certificate(Buffer.from(certificate, "base64url"));
    const issued = this.issued.find(({ serial }) => serial === leaf.serialNumber);
    if (issued === undefined) throw violation(404, "malformed", "the certificate is not from here");
    const leafKey = await keyOf(leaf.publicKey.export({ format: "jwk" }) as jose.JWK);
    const isAllowed = account ? issued.account === account : leafKey.thumbprint === key.thumbprint;
    if (!isAllowed) {
      const detail = "neither the account that ordered the certificate nor its own key";
      throw violation(403, "unauthorized", detail);
    }
    if (issued.revoked) throw refusal(400, "alreadyRevoked", "the certificate is revoked already");
    issued.revoked = { reason };
    issued.renewalWindow = { start: new Date(this.now.getTime() - HOUR), end: this.now };
    return { status: 200, headers: {} };
  }
}

// ---- signatures ----------------------------------------------------------------------------------------------------

function parsed(text: string): Record<string, unknown> {
  try {
    return { ...JSON.parse(text) };
  } catch {
    throw malformed("no JSON");
  }
}

const keyOf = async (jwk: jose.JWK) => ({ jwk, thumbprint: await jose.calculateJwkThumbprint(jwk) });

/** Verifies a flattened JWS with the key that `keyFor` returns for its `kid`, or with the key in its header. */
async function verified(text: string, keyFor: (kid: string) => SigningKey) {
  try {
    const jws = JSON.parse(text);
    const { kid, jwk } = jose.decodeProtectedHeader(jws);
    const key = typeof kid === "string" ? keyFor(kid) : await keyOf(jwk as jose.JWK);
    const find = ({ alg }: jose.JWSHeaderParameters = {}) => jose.importJWK(key.jwk, alg);
    const { payload, protectedHeader: header } = await jose.flattenedVerify(jws, find);
    return { payload: new TextDecoder().decode(payload), key, header: header! };
  } catch (error) {
    if (error instanceof wire.Problem) throw error;
    throw malformed(`the JWS cannot be verified: ${(error as Error).message}`);
  }
}

// ---- rendering -----------------------------------------------------------------------------------------------------

const base64url = (hex: string): string => Buffer.from(hex, "hex").toString("base64url");

const showAccount = ({ url, contact }: Account, status = 200): Answer =>
  json(status, { status: "valid", contact }, { location: url });

const showOrder = ({ url, authorizations, certificate, status, identifiers, profile, error }: Order) => {
  const urls = authorizations.map(({ url }) => url);
  const finalize = url.replace("/order/", "/finalize/");
  return { status, identifiers, profile, authorizations: urls, finalize, certificate, error };
};

/** A valid authorization shows only the challenge that was validated (§7.1.4). */
function showAuthorization({ url: _, account: __, challenges, ...shown }: Authorization) {
  const isShown = ({ status }: Challenge) => shown.status === "pending" || status !== "pending";
  return { ...shown, challenges: challenges.filter(isShown) };
}

function own<T extends { readonly account: Account }>(list: readonly T[], id: string, account: Account): T {
  const found = list[Number(id)];
  if (found?.account === account) return found;
  throw violation(404, "malformed", "this account has nothing at this URL");
}

const isValidating = ({ challenges }: Authorization): boolean =>
  challenges.some(({ status }) => status === "processing");

/** The error of an order: that of its only failure, or a compound of several (RFC 8555 §6.7.1). */
function summary(failed: readonly Authorization[]): wire.ProblemDocument {
  const errors = failed.map(({ challenges }) => challenges.find(({ error }) => error !== undefined)!.error!);
  if (errors.length === 1) return errors[0]!;
  const subproblems = errors.map((error, i) => ({ ...error, identifier: failed[i]!.identifier }));
  return { ...refusal(403, "compound", "several names cannot be validated").document, subproblems };
}
