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
import { validate } from "./ca-validate.ts";
import {
  type Answer,
  answerUnder,
  type Fault,
  listen,
  type Listener,
  malformed,
  Problem,
  type ProblemDocument,
  refusal,
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
/** The issuer domain name, for dns-persist-01. */
const ISSUER = "ca.example";
/** The profiles and their lifetimes, as at Let's Encrypt in 2026. The first one is the default. */
const LETS_ENCRYPT = { classic: 90 * DAY, tlsserver: 45 * DAY, shortlived: 160 * HOUR };

// ---- options -----------------------------------------------------------------------------------------------------

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

/** At most `count` in any `windowMs` of the CA's clock. */
interface Limit {
  readonly count: number;
  readonly windowMs: number;
}

/** How the CA behaves; a test may change it while it runs. */
export interface Switches {
  /** Port on which http-01 is fetched instead of 80. */
  httpPort?: number;
  /** The address of a name on loopback; throws if it does not resolve. Default: 127.0.0.1 and `httpPort`. */
  resolve?: (hostname: string) => { hostname: string; port: number };
  /** The TXT records at a name, for dns-01 and dns-persist-01, and the target of its CNAME. */
  txt?: (name: string) => Promise<readonly string[]>;
  cname?: (name: string) => Promise<string | undefined>;
  /** The delay before each validation. */
  validationDelayMs?: number;
  /**
   * What becomes invalid after a failed validation: the order too (default), only the authorization (acme2certifier), or
   * nothing: the challenge stays pending with its error and may be responded to again (step-ca, Caddy).
   */
  failure?: "order" | "authorization" | "challenge";
  /** Which authorizations of the account a new order reuses: none, valid ones (default), or pending ones too. */
  reuse?: "none" | "valid" | "pending";
  /** How long a valid authorization can be reused. Default 30 days. */
  authorizationLifetimeMs?: number;
  /** How long an order is `processing` after finalize. Default 0: finalize answers `valid`. */
  processingMs?: number;
  /** Retry-After while the CA is busy with an object; polling sooner is a violation. Default: not sent. */
  retryAfterSeconds?: number;
  /** The profiles, with the lifetime of each in milliseconds; {} for none. */
  profiles?: Readonly<Record<string, number>>;
  /** Whether the directory offers renewalInfo. Default true. */
  renewalInfo?: boolean;
  /** The reason why a name is rejected, or undefined. */
  reject?: (name: string) => string | undefined;
  limits?: {
    /** Orders of an account. */
    newOrder?: Limit;
    /** Requests to a resource within a second, from all clients together. */
    requestsPerSecond?: Partial<Record<Resource, number>>;
  };
  /** Returns the fault to inject into an exchange. A CA that is started without this function cannot break connections. */
  fault?: (exchange: Exchange) => Fault | undefined;
}

// ---- its objects -------------------------------------------------------------------------------------------------

/** RFC 8555 §7.1.2. */
interface Account {
  readonly url: string;
  contact: readonly string[];
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
  readonly wildcard: boolean;
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

/** An entry of the log. */
export interface LogEntry extends Exchange {
  readonly path: string;
  /** The same number for all requests of one connection. */
  readonly connection: number;
  /** The account that signed the request, after verification. */
  kid?: string;
  /** The status of the answer; 0 if there is none, or not yet. */
  status: number;
}

/** A request with a valid signature. */
interface Signed {
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
  const listener = await listenerCertificate();
  const directory = await Deno.makeTempDir({ prefix: "lematt-ca-" });
  return new Ca(
    switches,
    directory,
    issuer,
    { rootPem: rootPem!, intermediatePem: intermediatePem! },
    listener,
  );
}

/** A running CA. */
export class Ca implements AsyncDisposable {
  /** PEM of the root certificate of the HTTPS listener. */
  readonly caBundle: string;
  /** A file with `caBundle`, removed when the CA is closed. */
  readonly caBundleFile: string;
  /** PEM of the root and the intermediate certificate of issued certificates. */
  readonly rootPem: string;
  readonly intermediatePem: string;
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

  readonly #issuer: Authority;
  readonly #listener: Listener;
  readonly #nonces = new Set<string>();
  /** The last answer of each URL, for the fault `repeat`. */
  readonly #previous = new Map<string, Answer>();
  /** The earliest time of the next poll of each URL, by the CA's clock. */
  readonly #retryAfter = new Map<string, number>();
  readonly #byUrl = new Map<string, Order | Authorization | Issued>();
  /** The times of the requests that count for each limit, by the CA's clock. */
  readonly #uses = new Map<string, number[]>();
  readonly #validating = new Set<Promise<void>>();
  readonly #closing = new AbortController();
  #offsetMs = 0;

  constructor(
    readonly switches: Switches,
    readonly directory: string,
    issuer: Authority,
    { rootPem, intermediatePem }: { rootPem: string; intermediatePem: string },
    { certificate, key, root: caBundle }: Record<"certificate" | "key" | "root", string>,
  ) {
    this.#issuer = issuer;
    this.rootPem = rootPem;
    this.intermediatePem = intermediatePem;
    this.caBundle = caBundle;
    this.caBundleFile = `${directory}/ca-bundle.pem`;
    Deno.writeTextFileSync(this.caBundleFile, caBundle);
    const breakable = switches.fault !== undefined;
    this.#listener = listen(
      { cert: certificate, key, breakable },
      (request, connection) => this.#serve(request, connection),
    );
    this.origin = `https://localhost:${this.#listener.port}`;
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
    life: { notBefore: Date; notAfter: Date },
  ): Promise<string> {
    return await certify(
      { publicKey: createPublicKey(createPrivateKey(key)), names, ...life },
      this.#issuer,
    ) +
      this.intermediatePem;
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#listener.close();
    await Promise.all(this.#validating);
    await Deno.remove(this.directory, { recursive: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  // ---- an exchange -------------------------------------------------------------------------------------------------

  async #serve(request: Request, connection: number): Promise<Response> {
    const { pathname: path } = new URL(request.url);
    const resource = (Object.keys(ROUTES) as Resource[]).find((name) => ROUTES[name].test(path))!;
    const { method } = request;
    const n = this.log.length + 1;
    const entry: LogEntry = { n, method, url: this.origin + path, resource, path, connection, status: 0 };
    this.log.push(entry);

    const fault = this.switches.fault?.(entry);
    const previous = this.#previous.get(entry.url);
    const { answer, response } = await answerUnder(fault, {
      handle: () => this.#handle(request, entry, ROUTES[resource].exec(path)![1] ?? ""),
      break: (alsoNext) => this.#listener.break(connection, alsoNext),
      closing: this.#closing.signal,
      badNonce: () => this.#finish(problem(refusal(400, "badNonce", "injected")), method),
      previous,
    });
    entry.status = answer?.status ?? 0;
    response.headers.set("date", this.now.toUTCString());
    return response;
  }

  async #handle(request: Request, entry: LogEntry, part: string): Promise<Answer> {
    let answer: Answer;
    try {
      answer = await this.#answer(request, entry, part);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.isViolation) this.#addViolation(entry, error.type, error.message);
      answer = problem(error);
    }
    this.#finish(answer, entry.method);
    if (this.switches.fault !== undefined) {
      this.#previous.set(entry.url, { ...answer, headers: new Headers(answer.headers) });
    }
    return answer;
  }

  #addViolation({ n, method, url, resource }: LogEntry, type: string, detail: string): void {
    this.violations.push({ n, method, url, resource, type, detail });
  }

  /** Adds the headers of every answer (RFC 8555 §6.5, §7.1). */
  #finish(answer: Answer, method: string): Answer {
    answer.headers.append("link", `<${this.directoryUrl}>;rel="index"`);
    if (method !== "GET") answer.headers.set("replay-nonce", this.#newNonce());
    return answer;
  }

  #newNonce(): string {
    const nonce = randomBytes(16).toString("base64url");
    this.#nonces.add(nonce);
    return nonce;
  }

  async #answer(request: Request, entry: LogEntry, part: string): Promise<Answer> {
    const { resource, method, path } = entry;
    const count = this.switches.limits?.requestsPerSecond?.[resource];
    if (count !== undefined) this.#use(`requests to ${resource} within a second`, { count, windowMs: 1000 });
    if (resource === "unknown") throw violation(404, "malformed", `there is nothing at ${path}`);
    const allowed = { directory: "GET", newNonce: "HEAD", renewalInfo: "GET" }[resource as string] ?? "POST";
    if (method !== allowed) throw violation(405, "malformed", `${method} is not for ${resource}`);
    switch (resource) {
      case "directory":
        return this.#describe();
      case "newNonce":
        return { status: 200, headers: new Headers({ "cache-control": "no-store" }) };
      case "renewalInfo":
        return this.#renewalInfo(entry, part);
    }
    const signed = await this.#authenticate(request, entry);
    if (resource === "newAccount") return this.#newAccount(signed);
    if (resource === "revokeCert") return await this.#revoke(signed);
    const { account, payload } = signed;
    if (account === undefined) throw malformed(`${resource} is signed by kid`);
    const url = this.origin + part;
    switch (resource) {
      case "newOrder": {
        const order = this.#createOrder(account, parseObject(payload));
        return json(201, showOrder(order), { location: order.url });
      }
      case "keyChange":
        return await this.#changeKey(account, payload);
      case "account":
        if (url !== account.url) throw violation(403, "unauthorized", `${url} is another account`);
        if (payload !== "") account.contact = parseObject(payload).contact as string[];
        return showAccount(account, 200);
      case "challenge":
        return this.#challenge(this.#find<Authorization>(url, account), entry, payload);
      case "finalize": {
        const order = this.#find<Order>(url, account);
        await this.#finalize(order, parseObject(payload).csr as string);
        return this.#order(order, entry);
      }
    }
    if (payload !== "") throw malformed("POST-as-GET has an empty payload"); // RFC 8555 §6.3
    switch (resource) {
      case "authz": {
        const authorization = this.#find<Authorization>(url, account);
        return this.#withRetryAfter(
          json(200, showAuthorization(authorization)),
          entry,
          url,
          isValidating(authorization),
        );
      }
      case "order":
        return this.#order(this.#find<Order>(url, account), entry);
      case "certificate": {
        const headers = new Headers({ "content-type": "application/pem-certificate-chain" });
        const { pem } = this.#find<Issued>(url, account);
        return { status: 200, headers, body: pem + this.intermediatePem };
      }
    }
  }

  /** RFC 8555 §6.2 to §6.5. */
  async #authenticate(request: Request, entry: LogEntry): Promise<Signed> {
    if (request.headers.get("content-type") !== "application/jose+json") {
      throw violation(415, "malformed", "the content type is not application/jose+json");
    }
    const text = await request.text().catch(() => {
      throw refusal(400, "malformed", "the client went away in the middle of its request");
    });
    const jws = parseObject(text) as unknown as jose.FlattenedJWSInput;
    const { nonce, url, kid, jwk } = headerOf(jws);
    if (!this.#nonces.delete(nonce!)) {
      throw violation(400, "badNonce", "the nonce was used before, or is not from here");
    }
    if (url !== entry.url) throw violation(403, "unauthorized", `the signed URL is ${url}, not ${entry.url}`);
    if ((jwk === undefined) === (kid === undefined)) throw malformed("the header needs either jwk or kid");
    if (jwk !== undefined) return await verified(jws);
    const account = this.accounts.find(({ url }) => url === kid);
    if (account === undefined) {
      throw violation(400, "accountDoesNotExist", `there is no account ${JSON.stringify(kid)}`);
    }
    const { payload, key } = await verified(jws, account.key);
    entry.kid = kid;
    return { payload, key, account };
  }

  /** Counts a request for a limit; throws `rateLimited` if the limit is exceeded. */
  #use(subject: string, { count, windowMs }: Limit): void {
    const now = this.now.getTime();
    const uses = (this.#uses.get(subject) ?? []).filter((at) => at > now - windowMs);
    this.#uses.set(subject, uses);
    if (uses.length < count) return void uses.push(now);
    const seconds = Math.ceil((uses[uses.length - count]! + windowMs - now) / 1000);
    const headers = { "retry-after": `${seconds}` };
    throw refusal(429, "rateLimited", `too many ${subject} (${count})`, {}, headers);
  }

  /** The object at a URL, which must belong to the account; its kind follows from the route. */
  #find<Kind extends Order | Authorization | Issued>(url: string, account: Account): Kind {
    const found = this.#byUrl.get(url);
    if (found === undefined) throw violation(404, "malformed", `there is nothing at ${url}`);
    if (found.account !== account) throw violation(403, "unauthorized", `${url} belongs to another account`);
    return found as Kind;
  }

  /** Adds Retry-After to the answer if the CA is busy with the object. Polling too soon is a violation. */
  #withRetryAfter(
    answer: Answer,
    entry: LogEntry,
    url: string,
    isBusy: boolean,
    seconds = this.switches.retryAfterSeconds,
  ): Answer {
    const now = this.now.getTime();
    const until = this.#retryAfter.get(url) ?? 0;
    this.#retryAfter.delete(url);
    if (entry.url === url && now < until) {
      this.#addViolation(entry, "tooSoon", `${until - now} ms before Retry-After`);
    }
    if (!isBusy || seconds === undefined) return answer;
    answer.headers.set("retry-after", `${seconds}`);
    this.#retryAfter.set(url, now + seconds * 1000);
    return answer;
  }

  /** RFC 8555 §7.1.1. */
  #describe(): Answer {
    const { renewalInfo, profiles = LETS_ENCRYPT } = this.switches;
    const at = (path: string) => this.origin + path;
    const offered = Object.keys(profiles).map((name) => [name, `https://localhost/profiles#${name}`]);
    return json(200, {
      newNonce: at("/new-nonce"),
      newAccount: at("/new-account"),
      newOrder: at("/new-order"),
      revokeCert: at("/revoke-cert"),
      keyChange: at("/key-change"),
      renewalInfo: renewalInfo === false ? undefined : at("/renewal-info"),
      meta: {
        termsOfService: at("/terms"),
        caaIdentities: [ISSUER],
        profiles: offered.length > 0 ? Object.fromEntries(offered) : undefined,
      },
    });
  }

  // ---- accounts (RFC 8555 §7.3) ------------------------------------------------------------------------------------

  #accountOf({ thumbprint }: SigningKey): Account | undefined {
    return this.accounts.find(({ key }) => key.thumbprint === thumbprint);
  }

  #newAccount({ account, payload, key }: Signed): Answer {
    if (account !== undefined) throw malformed("newAccount is signed by jwk");
    const { onlyReturnExisting, contact = [] } = parseObject(payload);
    const existing = this.#accountOf(key);
    if (existing !== undefined) return showAccount(existing, 200);
    if (onlyReturnExisting) throw refusal(400, "accountDoesNotExist", "there is no account with this key");
    const url = `${this.origin}/account/${this.accounts.length + 1}`;
    const created: Account = { url, contact: contact as string[], key, authorizations: new Map() };
    this.accounts.push(created);
    return showAccount(created, 201);
  }

  /** §7.3.5: the outer JWS is signed with the old key, the inner JWS with the new one. */
  async #changeKey(account: Account, payload: string): Promise<Answer> {
    const inner = await verified(parseObject(payload) as unknown as jose.FlattenedJWSInput);
    const change = parseObject(inner.payload);
    const old = await jose.calculateJwkThumbprint(change.oldKey as jose.JWK);
    if (change.account !== account.url || old !== account.key.thumbprint) {
      throw malformed("the inner payload names another account or another old key");
    }
    account.key = inner.key;
    return showAccount(account, 200);
  }

  // ---- orders (§7.4) -----------------------------------------------------------------------------------------------

  #createOrder(account: Account, request: Record<string, unknown>): Order {
    const identifiers = request.identifiers as Identifier[];
    const { limits, profiles = LETS_ENCRYPT, reject } = this.switches;
    const profile = (request.profile ?? Object.keys(profiles)[0]) as string | undefined;
    if (profile !== undefined && !Object.hasOwn(profiles, profile)) {
      throw violation(400, "invalidProfile", `there is no profile ${JSON.stringify(profile)}`);
    }
    const rejected = identifiers.filter(({ value }) => reject?.(value) !== undefined)
      .map((identifier) => refusal(400, "rejectedIdentifier", reject!(identifier.value)!, { identifier }));
    if (rejected.length > 0) {
      const subproblems = rejected.map(({ document }) => document);
      throw refusal(400, "rejectedIdentifier", "the policy forbids it", { subproblems });
    }
    const replaces = request.replaces as string | undefined;
    if (replaces !== undefined && this.#findByCertId(replaces).account !== account) {
      throw violation(403, "unauthorized", "the certificate to be replaced belongs to another account");
    }
    // orders with `replaces` are exempt, as at Let's Encrypt
    if (replaces === undefined && limits?.newOrder) {
      this.#use(`new orders of ${account.url}`, limits.newOrder);
    }

    const order: Order = {
      url: `${this.origin}/order/${this.orders.length + 1}`,
      account,
      identifiers,
      authorizations: identifiers.map((identifier) => this.#authorize(account, identifier)),
      profile,
      replaces,
      status: "pending",
    };
    this.orders.push(order);
    this.#byUrl.set(order.url, order);
    this.#update(order);
    return order;
  }

  /** The authorization of a new order for a name: an existing one if `reuse` allows it, otherwise a new one. */
  #authorize(account: Account, { type, value }: Identifier): Authorization {
    const last = account.authorizations.get(value);
    const { reuse = "valid" } = this.switches;
    if (last !== undefined && reuse !== "none" && last.expires > this.now) {
      if (last.status === "valid" || last.status === "pending" && reuse === "pending") return last;
    }
    const wildcard = value.startsWith("*.");
    const url = `${this.origin}/authz/${this.#byUrl.size + 1}`;
    const types = ["tls-alpn-01", "dns-persist-01", "dns-01", "http-01"].filter((challenge) =>
      type === "ip" ? !challenge.startsWith("dns") : !wildcard || challenge.startsWith("dns")
    );
    const authorization: Authorization = {
      url,
      account,
      identifier: { type, value: wildcard ? value.slice(2) : value },
      wildcard,
      challenges: types.map((type) => ({
        url: `${url}/${type}`,
        type,
        token: randomBytes(32).toString("base64url"),
        status: "pending",
      })),
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
  #update(order: Order): void {
    const { status, authorizations } = order;
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
    if (order.status === "processing" && performance.now() >= order.doneAt!) await this.#issue(order);
    this.#update(order);
    // Boulder sends Location after finalize as well
    const answer = json(200, showOrder(order), entry.resource === "finalize" ? { location: order.url } : {});
    const isBusy = order.status === "processing" ||
      order.status === "pending" && order.authorizations.some(isValidating);
    return this.#withRetryAfter(answer, entry, order.url, isBusy);
  }

  // ---- challenges (§7.5.1) -----------------------------------------------------------------------------------------

  #challenge(authorization: Authorization, entry: LogEntry, payload: string): Answer {
    const challenge = authorization.challenges.find(({ url }) => url === entry.url);
    if (challenge === undefined) throw violation(404, "malformed", `there is nothing at ${entry.path}`);
    if (payload !== "{}") throw malformed("the answer to a challenge is {}");
    if (challenge.status === "pending") {
      if (authorization.status !== "pending" || isValidating(authorization)) {
        throw malformed(`the authorization is ${authorization.status} and no challenge is expected`);
      }
      challenge.status = "processing";
      const done = this.#validate(authorization, challenge).finally(() => this.#validating.delete(done));
      this.#validating.add(done);
    }
    const shown = showChallenge(challenge, authorization);
    const answer = json(200, shown, { link: `<${authorization.url}>;rel="up"` });
    return this.#withRetryAfter(answer, entry, challenge.url, challenge.status === "processing");
  }

  async #validate(authorization: Authorization, challenge: Challenge): Promise<void> {
    const { account, identifier, wildcard } = authorization;
    const { type, token } = challenge;
    const name = wildcard ? `*.${identifier.value}` : identifier.value;
    const { switches, now } = this;
    const closing = this.#closing.signal;
    const { validationDelayMs, authorizationLifetimeMs = 30 * DAY } = switches;
    try {
      if (validationDelayMs) await delay(validationDelayMs, undefined, { signal: closing });
      const keyAuthorization = `${token}.${account.key.thumbprint}`;
      const of = { type, identifier, wildcard, token, keyAuthorization, accountUrl: account.url };
      await validate({ ...of, issuer: ISSUER }, switches, closing);
      challenge.status = authorization.status = "valid";
      challenge.error = undefined;
      authorization.expires = new Date(now.getTime() + authorizationLifetimeMs);
      this.validations.push({ type, name });
    } catch (error) {
      if (closing.aborted) return;
      if (!(error instanceof Problem)) throw error;
      if (switches.failure === "challenge") challenge.status = "pending";
      else challenge.status = authorization.status = "invalid";
      challenge.error = error.document;
      this.validations.push({ type, name, error: error.document });
    }
  }

  // ---- certificates (§7.4, §7.6, RFC 9773) -------------------------------------------------------------------------

  /** Accepts the CSR (base64url) of an order that is ready; it must have exactly the names of the order. */
  async #finalize(order: Order, csr: string): Promise<void> {
    this.#update(order);
    if (order.status !== "ready") {
      // a correct client repeats finalize if the answer is lost
      const problemOf = order.csr === csr ? refusal : violation;
      throw problemOf(403, "orderNotReady", `the order is ${order.status}`);
    }
    const request = await readRequest(new Uint8Array(Buffer.from(csr, "base64url"))).catch((error) => {
      throw violation(400, "badCSR", `the CSR cannot be read: ${error.message}`);
    });
    const [asked, ordered] = [request.identifiers, order.identifiers].map(byValue);
    if (asked !== ordered) {
      throw violation(400, "badCSR", `the CSR is for ${asked}, the order for ${ordered}`);
    }
    order.request = request;
    order.csr = csr;
    order.status = "processing";
    order.doneAt = performance.now() + (this.switches.processingMs ?? 0);
  }

  async #issue(order: Order): Promise<void> {
    const { account, identifiers, profile, replaces, request } = order;
    const { commonNames, publicKey } = request!;
    const names = identifiers.map(({ value }) => value);
    const profiles: Readonly<Record<string, number>> = this.switches.profiles ?? LETS_ENCRYPT;
    // backdated by an hour, as at other CAs; the first and the last second belong to the lifetime
    const notBefore = new Date(Math.floor(this.now.getTime() / 1000) * 1000 - HOUR);
    const notAfter = new Date(notBefore.getTime() + (profiles[profile ?? ""] ?? 90 * DAY) - 1000);
    // every second serial begins with a set bit: in DER, and so in the certID, it needs a zero octet before it
    const serial = Buffer.concat([Uint8Array.of(this.issued.length % 2 ? 0x4e : 0xce), randomBytes(15)]);
    const derSerial = this.issued.length % 2 ? serial : Buffer.concat([Uint8Array.of(0), serial]);
    const commonName = profile === "classic" || profile === undefined ? commonNames[0] : undefined;
    const hex = serial.toString("hex").toUpperCase();
    const issued: Issued = {
      url: `${this.origin}/certificate/${hex}`,
      account,
      serial: hex,
      certId: `${base64url(this.#issuer.keyId)}.${base64url(derSerial)}`,
      names,
      keyType: publicKey.asymmetricKeyType === "rsa" ? "rsa" : "ec",
      profile,
      replaces,
      notBefore,
      notAfter,
      pem: await certify({ publicKey, commonName, names, notBefore, notAfter, serial: hex }, this.#issuer),
    };
    if (order.certificate !== undefined) return; // another request has been quicker
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
    const isOwn = certId.startsWith(base64url(this.#issuer.keyId));
    throw (isOwn ? violation : refusal)(404, "malformed", `no certificate has the certID ${certId}`);
  }

  /** The renewal window: the one that was set; in the past for a revoked certificate; otherwise by lifetime. */
  #renewalInfo(entry: LogEntry, certId: string): Answer {
    const { renewalWindow, revoked, notBefore, notAfter } = this.#findByCertId(certId);
    // around a third of the lifetime before expiry, or a half for short lifetimes, as Let's Encrypt recommends
    const lifetime = notAfter.getTime() - notBefore.getTime();
    const middle = notAfter.getTime() - lifetime / (lifetime < 10 * DAY ? 2 : 3);
    const [start, end] = revoked
      ? [revoked.at.getTime() - HOUR, revoked.at.getTime()]
      : [middle - lifetime / 50, middle + lifetime / 50];
    const { explanationURL, ...suggestedWindow }: NonNullable<Issued["renewalWindow"]> = renewalWindow ??
      { start: new Date(start), end: new Date(end) };
    const answer = json(200, { suggestedWindow, explanationURL });
    return this.#withRetryAfter(answer, entry, entry.url, true, 6 * 3600); // as Let's Encrypt
  }

  /** RFC 8555 §7.6: signed by the account that ordered the certificate, or with the certificate's own key. */
  async #revoke({ account, payload, key }: Signed): Promise<Answer> {
    const { certificate, reason = 0 } = parseObject(payload) as { certificate: string; reason?: number };
    const leaf = new X509Certificate(Buffer.from(certificate, "base64url"));
    const issued = this.issued.find(({ serial }) => serial === leaf.serialNumber);
    if (issued === undefined) throw violation(404, "malformed", "the certificate is not from here");
    const own = await keyOf(leaf.publicKey.export({ format: "jwk" }) as jose.JWK);
    const isAllowed = account ? issued.account === account : own.thumbprint === key.thumbprint;
    if (!isAllowed) {
      throw violation(
        403,
        "unauthorized",
        "neither the account that ordered the certificate nor its own key",
      );
    }
    if (issued.revoked !== undefined) {
      throw refusal(400, "alreadyRevoked", "the certificate is revoked already");
    }
    issued.revoked = { at: this.now, reason };
    return { status: 200, headers: new Headers() };
  }
}

// ---- signatures ----------------------------------------------------------------------------------------------------

function parseObject(json: string): Record<string, unknown> {
  try {
    return { ...JSON.parse(json) };
  } catch {
    throw malformed("no JSON");
  }
}

function headerOf(
  jws: jose.FlattenedJWSInput,
): { nonce?: string; url?: string; kid?: string; jwk?: jose.JWK } {
  try {
    return jose.decodeProtectedHeader(jws);
  } catch {
    throw malformed("no protected header");
  }
}

const keyOf = async (jwk: jose.JWK): Promise<SigningKey> => ({
  jwk,
  thumbprint: await jose.calculateJwkThumbprint(jwk),
});

/** Verifies a signature with the account's key, or with the key in the header. */
async function verified(jws: jose.FlattenedJWSInput, key?: SigningKey): Promise<Omit<Signed, "account">> {
  try {
    const { payload, protectedHeader } = key === undefined
      ? await jose.flattenedVerify(jws, jose.EmbeddedJWK)
      : await jose.flattenedVerify(jws, ({ alg } = {}) => jose.importJWK(key.jwk, alg));
    return {
      payload: new TextDecoder().decode(payload),
      key: key ?? await keyOf(protectedHeader!.jwk as jose.JWK),
    };
  } catch (error) {
    throw malformed(`the signature does not verify: ${(error as Error).message}`);
  }
}

// ---- rendering -----------------------------------------------------------------------------------------------------

function json(status: number, body: unknown, headers: Record<string, string> = {}): Answer {
  const type = { "content-type": "application/json" };
  return { status, headers: new Headers({ ...type, ...headers }), body: JSON.stringify(body) };
}

const problem = ({ status, document, headers }: Problem): Answer =>
  json(status, document, { "content-type": "application/problem+json", ...headers });

const showAccount = ({ url, contact }: Account, status: 200 | 201): Answer =>
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

function showAuthorization(authorization: Authorization) {
  const { status, expires, identifier, wildcard, challenges } = authorization;
  // a valid authorization shows only the challenge that was validated (§7.1.4)
  const shown = challenges.filter((challenge) => status === "pending" || challenge.status !== "pending");
  return {
    status,
    expires,
    identifier,
    wildcard: wildcard || undefined,
    challenges: shown.map((challenge) => showChallenge(challenge, authorization)),
  };
}

function showChallenge({ type, url, status, token, error }: Challenge, { account }: Authorization) {
  const proof = type === "dns-persist-01"
    ? { accounturi: account.url, "issuer-domain-names": [ISSUER] }
    : { token };
  return { type, url, status, ...proof, error };
}

const base64url = (value: string | Uint8Array): string =>
  (typeof value === "string" ? Buffer.from(value, "hex") : Buffer.from(value)).toString("base64url");

const byValue = (identifiers: readonly Identifier[]) =>
  identifiers.map(({ type, value }) => `${type}:${value}`).sort().join();

/** Whether a validation is running. */
const isValidating = ({ challenges }: Authorization): boolean =>
  challenges.some(({ status }) => status === "processing");

/** The error of an order: that of its only failure, or a compound of several (RFC 8555 §6.7.1). */
function summary(failed: readonly Authorization[]): ProblemDocument {
  const subproblems = failed.map(({ challenges, identifier }): ProblemDocument => ({
    ...challenges.find(({ error }) => error !== undefined)!.error!,
    identifier,
  }));
  if (subproblems.length === 1) return { ...subproblems[0]!, identifier: undefined };
  return refusal(403, "compound", "several names cannot be validated", { subproblems }).document;
}
