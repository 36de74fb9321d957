/**
 * An ACME CA in this process, for the tests, `deno task demo` and the benchmarks. It is the independent judge: strict
 * to RFC 8555 (and 8738, 9773, profiles, dns-persist-01), and it imports nothing of lib/.
 *
 * This file authenticates each request, leads it to its resource (RFC 8555 §7.1) and renders the answer. Every exchange
 * is in `ca.log`; what a correct client never does is in `ca.violations`, which tests expect to be empty. State lives
 * in memory. ca-switches.ts lists what can be set, ca-wire.ts the faults.
 */
import { generateKeyPairSync, randomBytes, X509Certificate } from "node:crypto";
import {
  type Account,
  type Authorization,
  Book,
  type Challenge,
  type Issued,
  isUnderWay,
  type Order,
  type Validation,
} from "./ca-book.ts";
import * as jws from "./ca-jws.ts";
import { type Identifier, malformed, Problem, refusal, violation } from "./ca-jws.ts";
import { type Exchange, issuersOf, profilesOf, type Resource, type Switches } from "./ca-switches.ts";
import { type Answer, answerUnder, listen, type Listener } from "./ca-wire.ts";
import { type Authority, certify, type Contents, createAuthority, pem } from "./ca-x509.ts";

export type { Order } from "./ca-book.ts";
export { type Dns, startDns } from "./ca-dns.ts";
export type { Exchange, Switches } from "./ca-switches.ts";
export { type Fault, startWebroot, type Webroot } from "./ca-wire.ts";

const DAY = 24 * 3600_000;

/** A line of the log. */
export interface LogEntry extends Exchange {
  readonly path: string;
  /** The same number for all requests of one connection. */
  readonly connection: number;
  /** The account that signed, once that is verified. */
  kid?: string;
  /** The status that was answered; 0 while there is no answer, and for ever if the request was torn unhandled. */
  status: number;
}

/** Something that a correct client does not do. */
export interface Violation extends Exchange {
  /** The problem type without its URN prefix; `tooSoon` for polling before Retry-After. */
  readonly type: string;
  readonly detail: string;
}

/** A request whose signature holds. */
interface Signed {
  readonly payload: string;
  readonly header: jws.Jws["header"];
  readonly key: jws.SigningKey;
  /** Where it was signed by `kid`. */
  readonly account?: Account;
}

/** The resource of a path, and the part of the URL that names the thing. */
const ROUTES: readonly (readonly [Resource, RegExp])[] = [
  ["directory", /^\/dir$/],
  ["newNonce", /^\/new-nonce$/],
  ["newAccount", /^\/new-account$/],
  ["newOrder", /^\/new-order$/],
  ["revokeCert", /^\/revoke-cert$/],
  ["keyChange", /^\/key-change$/],
  ["renewalInfo", /^\/renewal-info\/([^/]*)$/],
  ["account", /^(\/account\/\d+)$/],
  ["authz", /^(\/authz\/\d+)$/],
  ["challenge", /^(\/authz\/\d+)\/[a-z0-9-]+$/],
  ["order", /^(\/order\/\d+)$/],
  ["finalize", /^(\/order\/\d+)\/finalize$/],
  ["certificate", /^(\/certificate\/[0-9A-F]+)(?:\/\d+)?$/],
  ["unknown", /^/],
];

/** Starts a CA on a free port of loopback. */
export async function startCa(switches: Switches = {}): Promise<Ca> {
  return new Ca(switches, await Deno.makeTempDir({ prefix: "lematt-ca-" }));
}

/** A running CA. */
export class Ca implements AsyncDisposable {
  /** PEM of the root of the HTTPS listener: what a client must trust to talk to this CA. */
  readonly caBundle: string;
  /** A file that holds `caBundle` as long as the CA runs. */
  readonly caBundleFile: string;
  /** PEM of the root of the default chain of issued certificates, and of the intermediate below it. */
  readonly rootPem: string;
  readonly intermediatePem: string;
  /** `https://localhost:PORT` */
  readonly origin: string;
  readonly directoryUrl: string;

  readonly log: LogEntry[] = [];
  readonly violations: Violation[] = [];
  readonly accounts: readonly Account[];
  readonly orders: readonly Order[];
  readonly issued: readonly Issued[];
  readonly validations: readonly Validation[];

  readonly #book: Book;
  readonly #issuer = createAuthority("lematt test intermediate");
  readonly #listener: Listener;
  readonly #nonces = new Set<string>();
  /** Nonces that the fault `repeat` gave out again: using them is no violation. */
  readonly #repeatedNonces = new Set<string>();
  /** The last answer of each URL, for the fault `repeat`. */
  readonly #previous = new Map<string, Answer>();
  /** Until when a URL must not be polled again, by the CA's clock. */
  readonly #retryAfter = new Map<string, number>();
  readonly #closing = new AbortController();
  #offsetMs = 0;

  constructor(readonly switches: Switches, readonly directory: string) {
    const life = { notBefore: new Date(Date.now() - DAY), notAfter: new Date(Date.now() + 20 * 365 * DAY) };
    const admit = ({ commonName, publicKey }: Authority, issuer: Authority) =>
      certify({ commonName, publicKey, ...life, authority: true }, issuer);
    const roots = Array.from(
      { length: 1 + (switches.alternateRoots ?? 0) },
      (_, i) => createAuthority(`lematt test root ${i + 1}`),
    );
    const chains = roots.map((root) => admit(this.#issuer, root));
    this.rootPem = admit(roots[0]!, roots[0]!);
    this.intermediatePem = chains[0]!;

    const listenerRoot = createAuthority("lematt test listener root");
    this.caBundle = admit(listenerRoot, listenerRoot);
    this.caBundleFile = `${directory}/ca-bundle.pem`;
    Deno.writeTextFileSync(this.caBundleFile, this.caBundle);
    const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    const identifiers: Identifier[] = [{ type: "dns", value: "localhost" }, {
      type: "ip",
      value: "127.0.0.1",
    }];
    this.#listener = listen({
      cert: certify({ publicKey, identifiers, ...life }, listenerRoot),
      key: privateKey.export({ format: "pem", type: "pkcs8" }).toString(),
      tearable: switches.fault !== undefined,
    }, (request, connection) => this.#serve(request, connection));
    this.origin = `https://localhost:${this.#listener.port}`;
    this.directoryUrl = `${this.origin}/dir`;

    const closing = this.#closing.signal;
    this.#book = new Book(switches, this.#issuer, chains, () => this.now, this.origin, closing);
    ({
      accounts: this.accounts,
      orders: this.orders,
      issued: this.issued,
      validations: this.validations,
    } = this.#book);
  }

  /** The CA's clock, which certificates, expiries and limits follow. */
  get now(): Date {
    return new Date(Date.now() + this.#offsetMs);
  }

  /** Moves the CA's clock forward. */
  advance(ms: number): void {
    this.#offsetMs += ms;
  }

  /** A certificate that nobody ordered, signed by this CA, and the default chain (PEM). */
  forge(contents: Contents): string {
    return certify(contents, this.#issuer) + this.intermediatePem;
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#listener.close();
    await this.#book.idle();
    await Deno.remove(this.directory, { recursive: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  // ---- an exchange -------------------------------------------------------------------------------------------------

  async #serve(request: Request, connection: number): Promise<Response> {
    const { pathname: path, search } = new URL(request.url);
    const [resource, pattern] = ROUTES.find(([, pattern]) => pattern.test(path))!;
    const entry: LogEntry = {
      n: this.log.length + 1,
      method: request.method,
      url: this.origin + path + search,
      resource,
      path,
      connection,
      status: 0,
    };
    this.log.push(entry);

    const fault = this.switches.fault?.(entry);
    const previous = this.#previous.get(entry.url);
    if (fault?.kind === "repeat" && previous) {
      this.#repeatedNonces.add(previous.headers.get("replay-nonce") ?? "");
    }
    const { answer, response } = await answerUnder(fault, {
      handle: () => this.#handle(request, entry, pattern.exec(path)![1] ?? ""),
      tear: (andNext) => this.#listener.tear(connection, andNext),
      closing: this.#closing.signal,
      badNonce: () => this.#finish(problem(refusal(400, "badNonce", "refused on purpose")), request),
      previous,
    });
    entry.status = answer?.status ?? 0;
    return response;
  }

  async #handle(request: Request, entry: LogEntry, part: string): Promise<Answer> {
    let answer: Answer;
    try {
      answer = await this.#answer(request, entry, part);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.isViolation) this.#blame(entry, error.type, error.document.detail);
      answer = problem(error);
    }
    this.#finish(answer, request);
    if (this.switches.fault !== undefined) {
      this.#previous.set(entry.url, { ...answer, headers: new Headers(answer.headers) });
    }
    return answer;
  }

  #blame({ n, method, url, resource }: LogEntry, type: string, detail: string): void {
    this.violations.push({ n, method, url, resource, type, detail });
  }

  /** Adds what every answer has (RFC 8555 §6.5, §7.1). */
  #finish(answer: Answer, { method }: Request): Answer {
    answer.headers.append("link", `<${this.directoryUrl}>;rel="index"`);
    answer.headers.set("date", this.now.toUTCString());
    if (method === "POST") answer.headers.set("replay-nonce", this.#newNonce());
    return answer;
  }

  #newNonce(): string {
    const nonce = randomBytes(16).toString("base64url");
    this.#nonces.add(nonce);
    return nonce;
  }

  async #answer(request: Request, entry: LogEntry, part: string): Promise<Answer> {
    const { method } = request;
    const { resource } = entry;
    if (!request.headers.get("user-agent")) throw malformed("the request has no User-Agent");
    const count = this.switches.limits?.requestsPerSecond?.[resource];
    if (count !== undefined) {
      this.#book.use(`requests to ${resource} within a second`, { count, windowMs: 1000 });
    }
    if (resource === "unknown") throw violation(404, "malformed", `there is nothing at ${entry.path}`);
    const methods = { directory: ["GET"], newNonce: ["GET", "HEAD"], renewalInfo: ["GET"] } as const;
    const allowed: readonly string[] = methods[resource as keyof typeof methods] ?? ["POST"];
    if (!allowed.includes(method)) throw violation(405, "malformed", `${method} is not for ${resource}`);
    switch (resource) {
      case "directory":
        return this.#describe();
      case "newNonce": {
        const headers = new Headers({ "replay-nonce": this.#newNonce(), "cache-control": "no-store" });
        return { status: method === "HEAD" ? 200 : 204, headers }; // RFC 8555 §7.2
      }
      case "renewalInfo":
        return this.#renewalInfo(entry, part);
    }
    const signed = await this.#authenticate(request, entry);
    if (resource === "newAccount") return this.#newAccount(signed);
    if (resource === "revokeCert") return this.#revoke(signed);
    const { account, payload } = signed;
    if (account === undefined) throw malformed(`${resource} is signed by kid`);
    const url = this.origin + part;
    switch (resource) {
      case "newOrder": {
        const order = this.#book.createOrder(account, jws.parseObject(payload));
        return json(201, showOrder(order), { location: order.url });
      }
      case "keyChange":
        return this.#changeKey(account, signed);
      case "account":
        if (url !== account.url) throw violation(403, "unauthorized", `${url} is another account`);
        if (payload !== "") account.contact = readContact(jws.parseObject(payload).contact);
        return showAccount(account, 200);
      case "challenge":
        return this.#challenge(this.#book.find<Authorization>(url, account), entry, payload);
      case "finalize": {
        const order = this.#book.find<Order>(url, account);
        this.#book.finalize(order, jws.parseObject(payload).csr);
        return this.#order(order, entry);
      }
    }
    if (payload !== "") throw malformed("POST-as-GET has an empty payload"); // RFC 8555 §6.3
    switch (resource) {
      case "authz": {
        const authorization = this.#book.find<Authorization>(url, account);
        const answer = json(200, showAuthorization(authorization, issuersOf(this.switches)));
        return this.#askLater(answer, entry, url, isUnderWay(authorization));
      }
      case "order":
        return this.#order(this.#book.find<Order>(url, account), entry);
      case "certificate":
        return this.#certificate(this.#book.find<Issued>(url, account), entry);
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
    const message = jws.parseJws(text);
    const { header, payload } = message;
    const { nonce, kid } = header;
    jws.fromBase64url(nonce, "the nonce");
    if (!this.#nonces.delete(nonce!)) {
      const refuse = this.#repeatedNonces.has(nonce!) ? refusal : violation;
      throw refuse(400, "badNonce", "the nonce was used before, or is not from here");
    }
    if (header.url !== entry.url) {
      throw violation(
        403,
        "unauthorized",
        `the signed URL is ${JSON.stringify(header.url)}, not ${entry.url}`,
      );
    }
    if ("jwk" in header === "kid" in header) throw malformed("the header needs either jwk or kid");
    if ("jwk" in header) {
      const key = jws.importKey(header.jwk);
      jws.verifyJws(message, key);
      return { payload, header, key };
    }
    const account = this.accounts.find(({ url }) => url === kid);
    if (account === undefined) {
      throw violation(400, "accountDoesNotExist", `there is no account ${JSON.stringify(kid)}`);
    }
    jws.verifyJws(message, account.key);
    entry.kid = kid;
    return { payload, header, key: account.key, account };
  }

  /** RFC 8555 §7.1.1. */
  #describe(): Answer {
    const at = (path: string) => this.origin + path;
    const offered = Object.keys(profilesOf(this.switches));
    const profiles = Object.fromEntries(offered.map((name) => [name, `https://localhost/profiles#${name}`]));
    return json(200, {
      newNonce: at("/new-nonce"),
      newAccount: at("/new-account"),
      newOrder: at("/new-order"),
      revokeCert: at("/revoke-cert"),
      keyChange: at("/key-change"),
      renewalInfo: this.switches.renewalInfo === false ? undefined : at("/renewal-info"),
      "x-unknown": "https://localhost/clients-ignore-unknown-entries",
      meta: {
        termsOfService: at("/terms"),
        caaIdentities: issuersOf(this.switches),
        profiles: offered.length > 0 ? profiles : undefined,
      },
    });
  }

  // ---- accounts (RFC 8555 §7.3) ------------------------------------------------------------------------------------

  #newAccount({ account, payload, key }: Signed): Answer {
    if (account !== undefined) throw malformed("newAccount is signed by jwk");
    const wish = jws.parseObject(payload);
    const existing = this.#book.accountOf(key);
    if (existing !== undefined) return showAccount(existing, 200);
    if (wish.onlyReturnExisting === true) {
      throw refusal(400, "accountDoesNotExist", "there is no account with this key");
    }
    if (wish.termsOfServiceAgreed !== true) {
      throw violation(403, "userActionRequired", "the terms of service must be agreed to");
    }
    return showAccount(this.#book.createAccount(key, readContact(wish.contact)), 201);
  }

  /** §7.3.5: the outer message is signed with the old key, the inner one with the new. */
  #changeKey(account: Account, { payload, header }: Signed): Answer {
    const inner = jws.parseJws(payload, "the inner JWS");
    if ("nonce" in inner.header || "kid" in inner.header || inner.header.url !== header.url) {
      throw malformed("the inner JWS must repeat the URL and have neither nonce nor kid");
    }
    const key = jws.importKey(inner.header.jwk);
    jws.verifyJws(inner, key);
    const change = jws.parseObject(inner.payload, "the inner payload");
    if (change.account !== account.url) throw malformed("the inner payload names another account");
    if (jws.importKey(change.oldKey).thumbprint !== account.key.thumbprint) {
      throw malformed("the inner payload names another old key");
    }
    const holder = this.#book.accountOf(key);
    if (holder) throw refusal(409, "malformed", "the new key is in use", {}, { location: holder.url });
    account.key = key;
    return showAccount(account, 200);
  }

  // ---- orders (§7.4, §7.5) -----------------------------------------------------------------------------------------

  #order(order: Order, entry: LogEntry): Answer {
    this.#book.settle(order);
    // where the order is, after finalize as well (Boulder says so, and clients may rely on it)
    const answer = json(200, showOrder(order), entry.resource === "finalize" ? { location: order.url } : {});
    const isBusy = order.status === "processing" ||
      order.status === "pending" && order.authorizations.some(isUnderWay);
    return this.#askLater(answer, entry, order.url, isBusy);
  }

  /** §7.5.1: `{}` asks for the validation, an empty payload for the challenge as it is. */
  #challenge(authorization: Authorization, entry: LogEntry, payload: string): Answer {
    const challenge = authorization.challenges.find(({ url }) => url === entry.url);
    if (challenge === undefined) throw violation(404, "malformed", `there is nothing at ${entry.path}`);
    if (payload !== "") {
      if (Object.keys(jws.parseObject(payload)).length > 0) {
        throw malformed("the answer to a challenge is {}");
      }
      this.#book.respond(authorization, challenge);
    }
    const shown = showChallenge(challenge, authorization, issuersOf(this.switches));
    const answer = json(200, shown, { link: `<${authorization.url}>;rel="up"` });
    return this.#askLater(answer, entry, challenge.url, challenge.status === "processing");
  }

  /** Adds a Retry-After where something is being worked on, and notes who comes back too soon. */
  #askLater(
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
      this.#blame(entry, "tooSoon", `${until - now} ms before Retry-After`);
    }
    if (!isBusy || seconds === undefined) return answer;
    const asDate = this.switches.retryAfterAsDate && entry.resource !== "renewalInfo";
    // a date has whole seconds only: round up, so that it does not allow less than the seconds meant
    const date = new Date(Math.ceil((now + seconds * 1000) / 1000) * 1000);
    answer.headers.set("retry-after", asDate ? date.toUTCString() : `${seconds}`);
    this.#retryAfter.set(url, now + seconds * 1000);
    return answer;
  }

  // ---- certificates (§7.4.2, §7.6, RFC 9773) -----------------------------------------------------------------------

  #certificate({ url, chains }: Issued, entry: LogEntry): Answer {
    const urls = chains.map((_, i) => i === 0 ? url : `${url}/${i}`);
    const chain = chains[urls.indexOf(entry.url)];
    if (chain === undefined) throw violation(404, "malformed", `there is no chain at ${entry.url}`);
    const headers = new Headers({ "content-type": "application/pem-certificate-chain" });
    for (const other of urls) if (other !== entry.url) headers.append("link", `<${other}>;rel="alternate"`);
    return { status: 200, headers, body: chain };
  }

  #revoke({ account, payload, key }: Signed): Answer {
    const { certificate, reason } = jws.parseObject(payload);
    const text = pem("CERTIFICATE", jws.fromBase64url(certificate, "certificate"));
    const issued = this.issued.find(({ pem }) => pem === text);
    if (issued === undefined) throw violation(404, "malformed", "the certificate is not from here");
    const isAllowed = account !== undefined
      ? issued.account === account
      : jws.importKey(new X509Certificate(text).publicKey.export({ format: "jwk" })).thumbprint ===
        key.thumbprint;
    if (!isAllowed) {
      throw violation(
        403,
        "unauthorized",
        "neither the account that ordered the certificate nor its own key",
      );
    }
    this.#book.revoke(issued, reason);
    return { status: 200, headers: new Headers() };
  }

  #renewalInfo(entry: LogEntry, certId: string): Answer {
    if (this.switches.renewalInfo === false) throw violation(404, "malformed", "renewalInfo is not offered");
    const { explanationURL, ...suggestedWindow } = this.#book.renewalWindow(this.#book.findByCertId(certId));
    const answer = json(200, { suggestedWindow, explanationURL });
    return this.#askLater(answer, entry, entry.url, true, 6 * 3600); // as Let's Encrypt
  }
}

// ---- rendering and reading -----------------------------------------------------------------------------------------

function json(status: number, body: unknown, headers: Record<string, string> = {}): Answer {
  const type = { "content-type": "application/json" };
  return { status, headers: new Headers({ ...type, ...headers }), body: JSON.stringify(body) };
}

const problem = ({ status, document, headers }: Problem): Answer =>
  json(status, document, { "content-type": "application/problem+json", ...headers });

/** RFC 3339, in whole seconds as most CAs write it. */
const instant = (date: Date | undefined) => date && `${date.toISOString().slice(0, 19)}Z`;

const showAccount = ({ url, contact }: Account, status: 200 | 201): Answer =>
  json(status, { status: "valid", contact, termsOfServiceAgreed: true }, { location: url });

function showOrder(order: Order): Record<string, unknown> {
  const { status, expires, identifiers, authorizations, profile, replaces, error, url, certificate } = order;
  return {
    status,
    expires: instant(expires),
    identifiers,
    profile,
    replaces,
    authorizations: authorizations.map(({ url }) => url),
    finalize: `${url}/finalize`,
    certificate: certificate?.url,
    error,
  };
}

function showAuthorization(
  authorization: Authorization,
  issuers: readonly string[],
): Record<string, unknown> {
  const { status, expires, identifier, wildcard, challenges } = authorization;
  // what was not used to prove a valid authorization is not shown (§7.1.4)
  const shown = challenges.filter((challenge) => status === "pending" || challenge.status !== "pending");
  return {
    status,
    expires: instant(expires),
    identifier,
    wildcard: wildcard || undefined,
    challenges: shown.map((challenge) => showChallenge(challenge, authorization, issuers)),
  };
}

function showChallenge(
  { type, url, status, token, validated, error }: Challenge,
  { account }: Authorization,
  issuers: readonly string[],
): Record<string, unknown> {
  const proof = type === "dns-persist-01"
    ? { accounturi: account.url, "issuer-domain-names": issuers }
    : { token };
  return { type, url, status, ...proof, validated: instant(validated), error };
}

/** RFC 8555 §7.3: mailto URLs with one address and no header fields. */
function readContact(contact: unknown = []): readonly string[] {
  if (!Array.isArray(contact)) throw malformed("contact is not an array of URLs");
  for (const url of contact) {
    if (!/^mailto:[^\s@,?]+@[^\s@,?]+\.[^\s@,?]+$/.test(url)) {
      throw violation(400, "invalidContact", `${JSON.stringify(url)} is not one mail address`);
    }
  }
  return contact;
}
