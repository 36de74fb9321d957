/**
 * An ACME CA in this process, for the tests, `deno task demo` and the benchmarks: those parts of RFC 8555 (and 8738, 9773,
 * profiles, dns-persist-01) that lematt uses, with a clock that tests can advance, and with faults that tests inject. It imports
 * nothing from lib/.
 *
 * Every exchange is in `ca.log`; requests that a correct client never sends are in `ca.violations`, which tests expect to be
 * empty. Pebble (pebble.ts) is stricter, but has neither this clock nor these faults. State is in memory.
 */
import { Buffer } from "node:buffer";
import { createPrivateKey, createPublicKey, randomBytes, X509Certificate } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import * as jose from "jose";
import { ISSUER, validate } from "./ca-validate.ts";
import {
  type Answer,
  answerUnder,
  type Fault,
  json,
  listen,
  type Listener,
  malformed,
  Problem,
  type ProblemDocument,
  refusal,
  respond,
  violation,
} from "./ca-wire.ts";
import {
  type Authority,
  certify,
  createAuthority,
  type Identifier,
  listenerCertificate,
  readRequest,
  type Request as CertificateRequest,
} from "./ca-x509.ts";

export { type Dns, startDns } from "./ca-dns.ts";
export { type Fault, startWebroot, type Webroot } from "./ca-wire.ts";

const HOUR = 3600_000, DAY = 24 * HOUR;
/** The profiles and their lifetimes, as at Let's Encrypt in 2026. The first one is the default. */
const LETS_ENCRYPT: Readonly<Record<string, number>> = {
  classic: 90 * DAY,
  tlsserver: 45 * DAY,
  shortlived: 160 * HOUR,
};

/** The path of each resource; the group is the part of the path that identifies an object. */
const ROUTES = {
  directory: /^\/dir$/,
  newNonce: /^\/new-nonce$/,
  newAccount: /^\/new-account$/,
  newOrder: /^\/new-order$/,
  revokeCert: /^\/revoke-cert$/,
  keyChange: /^\/key-change$/,
  renewalInfo: /^\/renewal-info\/([^/]*)$/,
  account: /^(\/account\/\d+)$/,
  authz: /^(\/authz\/\d+)$/,
  challenge: /^(\/authz\/\d+)\/[a-z0-9-]+$/,
  order: /^(\/order\/\d+)$/,
  finalize: /^(\/order\/\d+)\/finalize$/,
  certificate: /^(\/certificate\/[0-9A-F]+)$/,
  unknown: /^/,
};
export type Resource = keyof typeof ROUTES;

/** A request; `n` counts the requests to this CA, from 1. */
export interface Exchange {
  readonly n: number;
  readonly method: string;
  readonly url: string;
  readonly resource: Resource;
}

/** An entry of the log. */
export interface LogEntry extends Exchange {
  /** The same number for all requests of one connection. */
  readonly connection: number;
  /** The account that signed the request, after verification. */
  kid?: string;
  /** The status of the answer; 0 if there is none, or not yet. */
  status: number;
}

/** How the CA behaves; a test may change it while it runs. */
export interface Switches {
  /** Port on which http-01 is fetched instead of 80. */
  httpPort?: number;
  /** The address of a name on loopback; throws if it does not resolve. Default: 127.0.0.1 and `httpPort`. */
  resolve?: (hostname: string) => { hostname: string; port: number };
  /** Port of the DNS server on 127.0.0.1, for dns-01 and dns-persist-01. */
  dnsPort?: number;
  /** The delay before each validation. */
  validationDelayMs?: number;
  /**
   * What becomes invalid after a failed validation: the order too (default), only the authorization (acme2certifier), or
   * nothing: the challenge stays pending with its error and may be responded to again (step-ca, Caddy).
   */
  failure?: "order" | "authorization" | "challenge";
  /** Which authorizations of the account a new order reuses: none, valid ones (default), or pending ones too. */
  reuse?: "none" | "valid" | "pending";
  /** How long an order is `processing` after finalize. */
  processingMs?: number;
  /** Retry-After while the CA is busy with an object; polling sooner is a violation. Default: not sent. */
  retryAfterSeconds?: number;
  /** The profiles, with the lifetime of each in milliseconds; {} for none. */
  profiles?: Readonly<Record<string, number>>;
  /** Whether the directory offers renewalInfo. Default true. */
  renewalInfo?: boolean;
  /** The reason why a name is rejected, or undefined. */
  reject?: (name: string) => string | undefined;
  /** At most `count` requests in any `windowMs` of the CA's clock. */
  limits?: Partial<Record<Resource, { readonly count: number; readonly windowMs: number }>>;
  /** Returns the fault to inject into an exchange. */
  fault?: (exchange: Exchange) => Fault | undefined;
}

// ---- its objects -------------------------------------------------------------------------------------------------

/** RFC 8555 §7.1.2. */
interface Account {
  readonly url: string;
  contact: unknown;
  key: SigningKey;
  /** The newest authorization of each name. */
  readonly authorizations: Map<string, Authorization>;
}

interface SigningKey {
  readonly jwk: jose.JWK;
  /** RFC 7638, base64url. */
  readonly thumbprint: string;
}

/** RFC 8555 §7.1.3. */
export interface Order {
  readonly url: string;
  readonly account: Account;
  readonly identifiers: readonly Identifier[];
  readonly authorizations: readonly Authorization[];
  readonly profile?: string;
  readonly replaces?: string;
  status: "pending" | "ready" | "processing" | "valid" | "invalid";
  error?: ProblemDocument;
  /** The CSR that finalize accepted, in base64url and parsed. */
  csr?: string;
  request?: CertificateRequest;
  /** When `processing` ends, by performance.now(). */
  doneAt?: number;
  certificate?: Issued;
}

/** RFC 8555 §7.1.4. */
interface Authorization {
  readonly url: string;
  readonly account: Account;
  readonly identifier: Identifier;
  readonly wildcard?: true;
  readonly challenges: readonly Challenge[];
  status: "pending" | "valid" | "invalid";
  expires: Date;
}

/** RFC 8555 §8. */
interface Challenge {
  readonly url: string;
  readonly type: string;
  readonly token: string;
  status: "pending" | "processing" | "valid" | "invalid";
  error?: ProblemDocument;
}

/** A certificate that was issued. */
interface Issued {
  readonly url: string;
  readonly account: Account;
  /** Upper-case hexadecimal, as node:crypto and openssl show it. */
  readonly serial: string;
  /** RFC 9773 §4.1. */
  readonly certId: string;
  readonly names: readonly string[];
  readonly keyType: "rsa" | "ec";
  readonly profile?: string;
  readonly replaces?: string;
  readonly notBefore: Date;
  readonly notAfter: Date;
  /** The leaf alone. */
  readonly pem: string;
  revoked?: { readonly at: Date; readonly reason: number };
  /** The renewal information (RFC 9773 §4.2), if a test has set it. */
  renewalWindow?: { readonly start: Date; readonly end: Date; readonly explanationURL?: string };
}

/** A request with a valid signature. */
interface Signed {
  /** JSON, or empty. */
  readonly payload: string;
  readonly key: SigningKey;
  /** Only if it was signed with `kid`. */
  readonly account?: Account;
}

// ---- the CA ------------------------------------------------------------------------------------------------------

/** Starts a CA on a free port of loopback. */
export async function startCa(switches: Switches = {}): Promise<Ca> {
  const life = { notBefore: new Date(Date.now() - DAY), notAfter: new Date(Date.now() + 20 * 365 * DAY) };
  const [root, issuer] = [createAuthority("lematt test root 1"), createAuthority("lematt test intermediate")];
  const [rootPem, intermediatePem] = await Promise.all(
    [root, issuer].map((subject) => certify({ ...subject, ...life, authority: true }, root)),
  );
  const identity = await listenerCertificate();
  const listener = await listen(identity, (request, connection) => ca.serve(request, connection));
  const directory = await Deno.makeTempDir({ prefix: "lematt-ca-" });
  const ca = new Ca(switches, listener, directory, identity.root, issuer, rootPem!, intermediatePem!);
  return ca;
}

/** A running CA. */
export class Ca implements AsyncDisposable {
  /** A file with `caBundle`, removed when the CA is closed. */
  readonly caBundleFile: string;
  /** `https://localhost:PORT` */
  readonly origin: string;
  readonly directoryUrl: string;

  readonly log: LogEntry[] = [];
  /** Requests that a correct client never sends; `type` is that of the problem, or `tooSoon` for polling before Retry-After. */
  readonly violations: (Exchange & { readonly type: string; readonly detail: string })[] = [];
  readonly accounts: Account[] = [];
  readonly orders: Order[] = [];
  readonly issued: Issued[] = [];
  /** The validations; `name` begins with `*.` for a wildcard, `error` is set if it failed. */
  readonly validations: { readonly type: string; readonly name: string; readonly error?: ProblemDocument }[] =
    [];

  readonly #nonces = new Set<string>();
  /** The last answer of each URL, for the fault `repeat`. */
  readonly #previous = new Map<string, Answer>();
  /** The earliest time of the next poll of each URL, by the CA's clock. */
  readonly #pollAt = new Map<string, number>();
  readonly #byUrl = new Map<string, Order | Authorization | Issued>();
  /** The times of the requests that count for each limit, by the CA's clock. */
  readonly #uses: Partial<Record<Resource, number[]>> = {};
  readonly #validating = new Set<Promise<void>>();
  readonly #closing = new AbortController();
  #offsetMs = 0;

  constructor(
    readonly switches: Switches,
    private readonly listener: Listener,
    private readonly directory: string,
    /** PEM of the root certificate of the HTTPS listener. */
    readonly caBundle: string,
    private readonly issuer: Authority,
    /** PEM of the root and the intermediate certificate of issued certificates. */
    readonly rootPem: string,
    readonly intermediatePem: string,
  ) {
    this.caBundleFile = `${directory}/ca-bundle.pem`;
    Deno.writeTextFileSync(this.caBundleFile, caBundle);
    this.origin = `https://localhost:${listener.port}`;
    this.directoryUrl = `${this.origin}/dir`;
  }

  /** The CA's clock, used for certificates, expiry and limits. */
  get now(): Date {
    return new Date(Date.now() + this.#offsetMs);
  }

  /** Moves the CA's clock forward. */
  advance(ms: number): void {
    this.#offsetMs += ms;
  }

  /** A certificate for a private key (PEM) without an order, signed by this CA, with its chain (PEM). */
  async forge(
    key: string,
    names: readonly string[],
    life: { readonly notBefore: Date; readonly notAfter: Date },
  ): Promise<string> {
    const publicKey = createPublicKey(createPrivateKey(key));
    return await certify({ publicKey, names, ...life }, this.issuer) + this.intermediatePem;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort();
    await this.listener[Symbol.asyncDispose]();
    await Promise.all(this.#validating);
    await Deno.remove(this.directory, { recursive: true });
  }

  // ---- an exchange -------------------------------------------------------------------------------------------------

  async serve(request: Request, connection: number): Promise<Response> {
    const { pathname } = new URL(request.url);
    const url = this.origin + pathname;
    const resource = (Object.keys(ROUTES) as Resource[]).find((name) => ROUTES[name].test(pathname))!;
    const [, part = ""] = ROUTES[resource].exec(pathname)!;
    const n = this.log.length + 1;
    const entry: LogEntry = { n, method: request.method, url, resource, connection, status: 0 };
    this.log.push(entry);
    const answer = await answerUnder(this.switches.fault?.(entry), {
      handle: () => this.#handle(request, entry, part),
      previous: this.#previous.get(url),
      badNonce: () => this.#refuse(refusal(400, "badNonce", "injected"), entry),
      break: (alsoNext) => this.listener.break(connection, alsoNext),
      closing: this.#closing.signal,
    });
    if (answer === undefined) return new Response(null, { status: 503 }); // the connection is broken
    entry.status = answer.status;
    const response = respond(answer);
    response.headers.set("date", this.now.toUTCString());
    return response;
  }

  async #handle(request: Request, entry: LogEntry, part: string): Promise<Answer> {
    let answer: Answer;
    try {
      answer = this.#finish(await this.#answer(request, entry, part), entry);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      answer = this.#refuse(error, entry);
    }
    this.#previous.set(entry.url, answer);
    return answer;
  }

  #refuse({ status, type, message, document, headers, isViolation }: Problem, entry: LogEntry): Answer {
    if (isViolation) this.violations.push({ ...entry, type, detail: message });
    const contentType = { "content-type": "application/problem+json" };
    return this.#finish(json(status, document, { ...contentType, ...headers }), entry);
  }

  /** Adds the headers of every answer (RFC 8555 §6.5, §7.1). */
  #finish(answer: Answer, { method }: LogEntry): Answer {
    const { link } = answer.headers;
    const index = `<${this.directoryUrl}>;rel="index"`;
    const headers = { ...answer.headers, link: link === undefined ? index : `${link}, ${index}` };
    if (method === "GET") return { ...answer, headers };
    const nonce = randomBytes(16).toString("base64url");
    this.#nonces.add(nonce);
    return { ...answer, headers: { ...headers, "replay-nonce": nonce } };
  }

  async #answer(request: Request, entry: LogEntry, part: string): Promise<Answer> {
    const { resource, method } = entry;
    const url = this.origin + part;
    if (resource === "unknown") throw violation(404, "malformed", `there is nothing at ${entry.url}`);
    const allowed = { directory: "GET", newNonce: "HEAD", renewalInfo: "GET" }[resource as string] ?? "POST";
    if (method !== allowed) throw violation(405, "malformed", `${method} is not for ${resource}`);
    if (resource !== "newOrder") this.#use(resource);
    if (resource === "directory") return this.#describe();
    if (resource === "newNonce") return { status: 200, headers: { "cache-control": "no-store" } };
    if (resource === "renewalInfo") return this.#renewalInfo(entry, part);

    const signed = await this.#authenticate(request, entry);
    if (resource === "newAccount") return this.#newAccount(signed);
    if (resource === "revokeCert") return await this.#revoke(signed);
    const { account, payload } = signed;
    if (account === undefined) throw malformed(`${resource} is signed by kid`);
    switch (resource) {
      case "newOrder":
        return await this.#createOrder(account, parsed(payload));
      case "keyChange":
        return await this.#changeKey(account, payload);
      case "account":
        if (url !== account.url) throw violation(403, "unauthorized", `${url} is another account`);
        if (payload !== "") account.contact = parsed(payload).contact;
        return showAccount(account);
      case "challenge":
        return this.#challenge(this.#find<Authorization>(url, account), entry, payload);
      case "finalize": {
        const order = this.#find<Order>(url, account);
        await this.#finalize(order, `${parsed(payload).csr}`);
        return await this.#order(order, entry);
      }
    }
    if (payload !== "") throw malformed("POST-as-GET has an empty payload"); // RFC 8555 §6.3
    if (resource === "order") return await this.#order(this.#find<Order>(url, account), entry);
    if (resource === "authz") {
      const authorization = this.#find<Authorization>(url, account);
      const retryAfter = this.#retryAfter(entry, url, isValidating(authorization));
      return json(200, showAuthorization(authorization), retryAfter);
    }
    const { pem } = this.#find<Issued>(url, account);
    const headers = { "content-type": "application/pem-certificate-chain" };
    return { status: 200, headers, body: pem + this.intermediatePem };
  }

  /** RFC 8555 §6.2 to §6.5. */
  async #authenticate(request: Request, entry: LogEntry): Promise<Signed> {
    if (request.headers.get("content-type") !== "application/jose+json") {
      throw violation(415, "malformed", "the content type is not application/jose+json");
    }
    const text = await request.text().catch(() => {
      throw refusal(400, "malformed", "the client went away in the middle of its request");
    });
    const { nonce, url, kid, jwk } = headerOf(text);
    if (!this.#nonces.delete(nonce!)) {
      throw violation(400, "badNonce", "the nonce was used before, or is not from here");
    }
    if (url !== entry.url) throw violation(403, "unauthorized", `the signed URL is ${url}, not ${entry.url}`);
    if ((jwk === undefined) === (kid === undefined)) throw malformed("the header needs either jwk or kid");
    if (jwk !== undefined) return await verified(text);
    const account = this.accounts.find(({ url }) => url === kid);
    if (account === undefined) throw violation(400, "accountDoesNotExist", `there is no account ${kid}`);
    const signed = await verified(text, account.key);
    entry.kid = kid;
    return { ...signed, account };
  }

  /** Counts a request; throws `rateLimited` if its limit is exceeded. */
  #use(resource: Resource): void {
    const limit = this.switches.limits?.[resource];
    if (limit === undefined) return;
    const { count, windowMs } = limit;
    const now = this.now.getTime();
    const uses = this.#uses[resource] = (this.#uses[resource] ?? []).filter((at) => at > now - windowMs);
    if (uses.length < count) return void uses.push(now);
    const seconds = Math.ceil((uses[uses.length - count]! + windowMs - now) / 1000);
    throw refusal(429, "rateLimited", `too many ${resource} (${count})`, { "retry-after": `${seconds}` });
  }

  /** The object at a URL, which must belong to the account; its kind follows from the route. */
  #find<Kind extends Order | Authorization | Issued>(url: string, account: Account): Kind {
    const found = this.#byUrl.get(url);
    if (found === undefined) throw violation(404, "malformed", `there is nothing at ${url}`);
    if (found.account !== account) throw violation(403, "unauthorized", `${url} belongs to another account`);
    return found as Kind;
  }

  /** The Retry-After of an answer about the object at `url`, if the CA is busy with it. Polling too soon is a violation. */
  #retryAfter(
    entry: LogEntry,
    url: string,
    isBusy: boolean,
    seconds = this.switches.retryAfterSeconds,
  ): Record<string, string> {
    const now = this.now.getTime();
    const early = (this.#pollAt.get(url) ?? now) - now;
    this.#pollAt.delete(url);
    if (entry.url === url && early > 0) {
      this.violations.push({ ...entry, type: "tooSoon", detail: `${early} ms before Retry-After` });
    }
    if (!isBusy || seconds === undefined) return {};
    this.#pollAt.set(url, now + seconds * 1000);
    return { "retry-after": `${seconds}` };
  }

  /** RFC 8555 §7.1.1. */
  #describe(): Answer {
    const { renewalInfo = true, profiles = LETS_ENCRYPT } = this.switches;
    const at = (path: string) => this.origin + path;
    const offered = Object.keys(profiles).map((name) => [name, `https://localhost/profiles#${name}`]);
    return json(200, {
      newNonce: at("/new-nonce"),
      newAccount: at("/new-account"),
      newOrder: at("/new-order"),
      revokeCert: at("/revoke-cert"),
      keyChange: at("/key-change"),
      renewalInfo: renewalInfo ? at("/renewal-info") : undefined,
      meta: {
        termsOfService: at("/terms"),
        caaIdentities: [ISSUER],
        profiles: offered.length > 0 ? Object.fromEntries(offered) : undefined,
      },
    });
  }

  // ---- accounts (RFC 8555 §7.3) ------------------------------------------------------------------------------------

  #newAccount({ account, payload, key }: Signed): Answer {
    if (account !== undefined) throw malformed("newAccount is signed by jwk");
    const { onlyReturnExisting, contact = [] } = parsed(payload);
    const existing = this.accounts.find((known) => known.key.thumbprint === key.thumbprint);
    if (existing !== undefined) return showAccount(existing);
    if (onlyReturnExisting) throw refusal(400, "accountDoesNotExist", "there is no account with this key");
    const url = `${this.origin}/account/${this.accounts.length + 1}`;
    const created: Account = { url, contact, key, authorizations: new Map() };
    this.accounts.push(created);
    return showAccount(created, 201);
  }

  /** §7.3.5: the outer JWS is signed with the old key, the inner JWS with the new one. */
  async #changeKey(account: Account, payload: string): Promise<Answer> {
    const inner = await verified(payload);
    const change = parsed(inner.payload);
    const old = await jose.calculateJwkThumbprint(change.oldKey as jose.JWK);
    if (change.account !== account.url || old !== account.key.thumbprint) {
      throw malformed("the inner payload names another account or another old key");
    }
    account.key = inner.key;
    return showAccount(account);
  }

  // ---- orders (§7.4) -----------------------------------------------------------------------------------------------

  async #createOrder(account: Account, request: Record<string, unknown>): Promise<Answer> {
    const identifiers = request.identifiers as Identifier[];
    const { profiles = LETS_ENCRYPT, reject = () => undefined } = this.switches;
    const profile = (request.profile ?? Object.keys(profiles)[0]) as string | undefined;
    if (profile !== undefined && !Object.hasOwn(profiles, profile)) {
      throw violation(400, "invalidProfile", `there is no profile ${JSON.stringify(profile)}`);
    }
    const rejected = identifiers.filter(({ value }) => reject(value) !== undefined);
    if (rejected.length > 0) {
      const problem = refusal(400, "rejectedIdentifier", "the policy forbids it");
      problem.document.subproblems = rejected.map((identifier) => {
        return { ...refusal(400, "rejectedIdentifier", reject(identifier.value)!).document, identifier };
      });
      throw problem;
    }
    const replaces = request.replaces as string | undefined;
    if (replaces === undefined) this.#use("newOrder"); // others are exempt, as at Let's Encrypt
    else if (this.#findByCertId(replaces).account !== account) {
      throw violation(403, "unauthorized", "the certificate to be replaced belongs to another account");
    }
    const url = `${this.origin}/order/${this.orders.length + 1}`;
    const authorizations = identifiers.map((identifier) => this.#authorize(account, identifier));
    const order: Order = { url, account, identifiers, authorizations, profile, replaces, status: "pending" };
    this.orders.push(order);
    this.#byUrl.set(url, order);
    await this.#update(order);
    return json(201, showOrder(order), { location: url });
  }

  /** The authorization of a new order for a name: an existing one if `reuse` allows it, otherwise a new one. */
  #authorize(account: Account, { type, value }: Identifier): Authorization {
    const last = account.authorizations.get(value);
    const { reuse = "valid" } = this.switches;
    if (last !== undefined && reuse !== "none" && last.expires > this.now) {
      if (last.status === "valid" || last.status === "pending" && reuse === "pending") return last;
    }
    const isWildcard = value.startsWith("*.");
    const url = `${this.origin}/authz/${this.#byUrl.size + 1}`;
    const types = ["tls-alpn-01", "dns-persist-01", "dns-01", "http-01"].filter((challenge) =>
      challenge.startsWith("dns") ? type === "dns" : !isWildcard
    );
    const token = () => randomBytes(32).toString("base64url");
    const authorization: Authorization = {
      url,
      account,
      identifier: { type, value: isWildcard ? value.slice(2) : value },
      wildcard: isWildcard || undefined,
      challenges: types.map((type) => ({ url: `${url}/${type}`, type, token: token(), status: "pending" })),
      status: "pending",
      expires: new Date(this.now.getTime() + 7 * DAY),
    };
    account.authorizations.set(value, authorization);
    this.#byUrl.set(url, authorization);
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

  async #order(order: Order, entry: LogEntry): Promise<Answer> {
    await this.#update(order);
    const { url, status, authorizations } = order;
    const isBusy = status === "processing" || status === "pending" && authorizations.some(isValidating);
    // Boulder sends Location after finalize as well
    return json(200, showOrder(order), { location: url, ...this.#retryAfter(entry, url, isBusy) });
  }

  // ---- challenges (§7.5.1) -----------------------------------------------------------------------------------------

  #challenge(authorization: Authorization, entry: LogEntry, payload: string): Answer {
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
    const headers = this.#retryAfter(entry, challenge.url, challenge.status === "processing");
    const link = `<${authorization.url}>;rel="up"`;
    return json(200, showChallenge(challenge, authorization), { link, ...headers });
  }

  async #validate(authorization: Authorization, challenge: Challenge): Promise<void> {
    const { account, identifier: { value: name }, wildcard: isWildcard = false } = authorization;
    const { type, token } = challenge;
    const { switches, now } = this;
    const closing = this.#closing.signal;
    const validation = { type, name: isWildcard ? `*.${name}` : name };
    const proof = {
      type,
      name,
      isWildcard,
      token,
      thumbprint: account.key.thumbprint,
      accountUrl: account.url,
    };
    try {
      if (switches.validationDelayMs) {
        await delay(switches.validationDelayMs, undefined, { signal: closing });
      }
      await validate(proof, switches, closing);
      challenge.status = authorization.status = "valid";
      challenge.error = undefined;
      authorization.expires = new Date(now.getTime() + 30 * DAY);
      this.validations.push(validation);
    } catch (error) {
      if (closing.aborted) return;
      if (!(error instanceof Problem)) throw error;
      if (switches.failure === "challenge") challenge.status = "pending";
      else challenge.status = authorization.status = "invalid";
      challenge.error = error.document;
      this.validations.push({ ...validation, error: error.document });
    }
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
    const request = await readRequest(new Uint8Array(Buffer.from(csr, "base64url"))).catch((error) => {
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
    const lifetime = (this.switches.profiles ?? LETS_ENCRYPT)[profile ?? ""] ?? 90 * DAY;
    const notAfter = new Date(notBefore.getTime() + lifetime - 1000);
    const life = { notBefore, notAfter };
    // every second serial begins with a set bit: in DER, and so in the certID, it needs a zero octet before it
    const isHigh = this.orders.indexOf(order) % 2 === 0;
    const serial = (isHigh ? "CE" : "4E") + randomBytes(15).toString("hex").toUpperCase();
    const commonName = profile === "classic" || profile === undefined ? commonNames[0] : undefined;
    const issued: Issued = {
      url: `${this.origin}/certificate/${serial}`,
      account,
      serial,
      certId: `${base64url(this.issuer.keyId)}.${base64url((isHigh ? "00" : "") + serial)}`,
      names,
      keyType: publicKey.asymmetricKeyType === "rsa" ? "rsa" : "ec",
      profile,
      replaces,
      ...life,
      pem: await certify({ publicKey, commonName, names, serial, ...life }, this.issuer),
    };
    this.issued.push(issued);
    this.#byUrl.set(issued.url, issued);
    order.certificate = issued;
    order.status = "valid";
  }

  /** The certificate with a certID (RFC 9773 §4.1). */
  #findByCertId(certId: string): Issued {
    const issued = this.issued.find((issued) => issued.certId === certId);
    if (issued !== undefined) return issued;
    // with the key identifier of this CA, the client has encoded the serial wrongly; otherwise the certificate is of another CA
    const isOwn = certId.startsWith(base64url(this.issuer.keyId));
    throw (isOwn ? violation : refusal)(404, "malformed", `no certificate has the certID ${certId}`);
  }

  /** The renewal window: the one that was set; in the past for a revoked certificate; otherwise by lifetime. */
  #renewalInfo(entry: LogEntry, certId: string): Answer {
    const { renewalWindow, revoked, notBefore, notAfter } = this.#findByCertId(certId);
    // around a third of the lifetime before expiry, or a half for short lifetimes, as Let's Encrypt recommends
    const lifetime = notAfter.getTime() - notBefore.getTime();
    const middle = revoked?.at.getTime() ?? notAfter.getTime() - lifetime / (lifetime < 10 * DAY ? 2 : 3);
    const [start, end] = revoked ? [middle - HOUR, middle] : [middle - lifetime / 50, middle + lifetime / 50];
    const { explanationURL, ...suggestedWindow }: NonNullable<Issued["renewalWindow"]> = renewalWindow ??
      { start: new Date(start), end: new Date(end) };
    const headers = this.#retryAfter(entry, entry.url, true, 6 * 3600); // as Let's Encrypt
    return json(200, { suggestedWindow, explanationURL }, headers);
  }

  /** RFC 8555 §7.6: signed by the account that ordered the certificate, or with the certificate's own key. */
  async #revoke({ account, payload, key }: Signed): Promise<Answer> {
    const { certificate, reason = 0 } = parsed(payload) as { certificate: string; reason?: number };
    const leaf = new X509Certificate(Buffer.from(certificate, "base64url"));
    const issued = this.issued.find(({ serial }) => serial === leaf.serialNumber);
    if (issued === undefined) throw violation(404, "malformed", "the certificate is not from here");
    const own = await keyOf(leaf.publicKey.export({ format: "jwk" }) as jose.JWK);
    const isAllowed = account ? issued.account === account : own.thumbprint === key.thumbprint;
    if (!isAllowed) {
      const detail = "neither the account that ordered the certificate nor its own key";
      throw violation(403, "unauthorized", detail);
    }
    if (issued.revoked) throw refusal(400, "alreadyRevoked", "the certificate is revoked already");
    issued.revoked = { at: this.now, reason };
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

function headerOf(jws: string): { nonce?: string; url?: string; kid?: string; jwk?: jose.JWK } {
  try {
    return jose.decodeProtectedHeader(parsed(jws));
  } catch {
    throw malformed("no protected header");
  }
}

const keyOf = async (jwk: jose.JWK): Promise<SigningKey> => ({
  jwk,
  thumbprint: await jose.calculateJwkThumbprint(jwk),
});

/** Verifies a flattened JWS with the account's key, or with the key in its header. */
async function verified(jws: string, key?: SigningKey): Promise<Signed> {
  try {
    const find: jose.FlattenedVerifyGetKey = (header, token) =>
      key === undefined ? jose.EmbeddedJWK(header, token) : jose.importJWK(key.jwk, header?.alg);
    const { payload, protectedHeader } = await jose.flattenedVerify(JSON.parse(jws), find);
    return { payload: new TextDecoder().decode(payload), key: key ?? await keyOf(protectedHeader!.jwk!) };
  } catch (error) {
    throw malformed(`the signature does not verify: ${(error as Error).message}`);
  }
}

// ---- rendering -----------------------------------------------------------------------------------------------------

const base64url = (hex: string): string => Buffer.from(hex, "hex").toString("base64url");

const showAccount = ({ url, contact }: Account, status = 200): Answer =>
  json(status, { status: "valid", contact, termsOfServiceAgreed: true }, { location: url });

const showOrder = ({ url, authorizations, certificate, status, identifiers, profile, error }: Order) => ({
  status,
  identifiers,
  profile,
  authorizations: authorizations.map(({ url }) => url),
  finalize: `${url}/finalize`,
  certificate: certificate?.url,
  error,
});

/** A valid authorization shows only the challenge that was validated (§7.1.4). */
function showAuthorization(authorization: Authorization) {
  const { status, expires, identifier, wildcard, challenges } = authorization;
  const shown = challenges.filter((challenge) => status === "pending" || challenge.status !== "pending")
    .map((challenge) => showChallenge(challenge, authorization));
  return { status, expires, identifier, wildcard, challenges: shown };
}

function showChallenge({ type, url, status, token, error }: Challenge, { account }: Authorization) {
  const proof = type === "dns-persist-01"
    ? { accounturi: account.url, "issuer-domain-names": [ISSUER] }
    : { token };
  return { type, url, status, ...proof, error };
}

/** Whether a validation is running. */
const isValidating = ({ challenges }: Authorization): boolean =>
  challenges.some(({ status }) => status === "processing");

/** The error of an order: that of its only failure, or a compound of several (RFC 8555 §6.7.1). */
function summary(failed: readonly Authorization[]): ProblemDocument {
  const errors = failed.map(({ challenges }) => challenges.find(({ error }) => error !== undefined)!.error!);
  if (errors.length === 1) return errors[0]!;
  const subproblems = errors.map((error, i) => ({ ...error, identifier: failed[i]!.identifier }));
  return { ...refusal(403, "compound", "several names cannot be validated").document, subproblems };
}
