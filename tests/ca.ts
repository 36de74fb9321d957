/**
 * An ACME CA in this process: strict to RFC 8555 (and 8738, 9773, profiles, dns-persist-01), so that a
 * client's mistake fails here and not at Let's Encrypt. It serves the tests, `deno task demo` and the
 * benchmarks.
 *
 * It is the independent judge: it imports nothing of lib/. This file is its front: it authenticates each
 * request, leads it to its resource (RFC 8555 §7.1) and renders the answer. Behind it stand the books
 * (ca-book.ts), the validator (ca-validate.ts), and the wire on which any exchange can go wrong on request
 * (ca-wire.ts); ca-switches.ts lists what can be set. Every exchange stands in `ca.log`; what a correct
 * client never does stands in `ca.violations`, which a test expects to be empty. State lives in memory.
 */
import { Buffer } from "node:buffer";
import { generateKeyPairSync, randomBytes, X509Certificate } from "node:crypto";
import type {
  Account,
  Authorization,
  Challenge,
  Issued,
  Order,
  RenewalWindow,
  Validation,
} from "./ca-book.ts";
import { Book, isUnderWay } from "./ca-book.ts";
import * as jws from "./ca-jws.ts";
import { type Identifier, mistake, Problem, refusal } from "./ca-problem.ts";
import type { Exchange, Resource, Switches } from "./ca-switches.ts";
import { type Answer, befall, listen, type Listener } from "./ca-wire.ts";
import { type Authority, certify, type Contents, createAuthority, pem } from "./ca-x509.ts";

export type {
  Account,
  Authorization,
  Challenge,
  Issued,
  Order,
  RenewalWindow,
  Validation,
} from "./ca-book.ts";
export type { Identifier, ProblemDocument } from "./ca-problem.ts";
export {
  type Exchange,
  LETS_ENCRYPT_PROFILES,
  type Limit,
  type Profile,
  type Switches,
} from "./ca-switches.ts";
export { type Dns, type RecordType, startDns } from "./ca-dns.ts";
export { type Hit, startWebroot, type Webroot } from "./ca-webroot.ts";
export type { Fault } from "./ca-wire.ts";

const DAY = 24 * 3600_000;

/** A line of the log. */
export interface LogEntry extends Exchange {
  readonly path: string;
  /** By the CA's clock. */
  readonly at: Date;
  /** The same number for all requests of one connection. */
  readonly connection: number;
  /** The account that signed, once that is verified. */
  kid?: string;
  /**
   * The status that was answered; 0 while there is no answer, and for ever if the request was torn unhandled.
   */
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
  readonly header: jws.Header;
  readonly key: jws.SigningKey;
}

/** A request that an account signed. */
interface FromAccount extends Signed {
  readonly account: Account;
}

const ROUTES: readonly (readonly [Resource, RegExp])[] = [
  ["directory", /^\/dir$/],
  ["newNonce", /^\/new-nonce$/],
  ["newAccount", /^\/new-account$/],
  ["newOrder", /^\/new-order$/],
  ["revokeCert", /^\/revoke-cert$/],
  ["keyChange", /^\/key-change$/],
  ["renewalInfo", /^\/renewal-info\/([^/]*)$/],
  ["account", /^(\/account\/\d+)$/],
  ["orders", /^(\/account\/\d+)\/orders$/],
  ["authz", /^(\/authz\/\d+)$/],
  ["challenge", /^(\/authz\/\d+)\/[a-z0-9-]+$/],
  ["order", /^(\/order\/\d+)$/],
  ["finalize", /^(\/order\/\d+)\/finalize$/],
  ["certificate", /^(\/certificate\/[0-9A-F]+)(?:\/(\d+))?$/],
];

/** Starts a CA on a loopback port; it is ready at once. */
export async function startCa(switches: Switches = {}): Promise<Ca> {
  return new Ca(switches, await Deno.makeTempDir({ prefix: "lematt-ca-" }));
}

/** A running CA. Close it, or hold it with `await using`. */
export class Ca implements AsyncDisposable {
  /** PEM of the root of the HTTPS listener: what a client must trust to talk to this CA. */
  readonly caBundle: string;
  /** A file that holds `caBundle` for as long as the CA runs. */
  readonly caBundleFile: string;
  /** PEM of the root of the default chain of issued certificates. */
  readonly rootPem: string;
  /** PEM of the intermediates of the default chain, the issuing one first. */
  readonly intermediatePem: string;
  /** PEM of the roots of the alternate chains, in their order. */
  readonly alternateRootPems: readonly string[];
  /**
   * How every URL begins, `https://localhost:PORT`. Set it before the first request if a relay stands
   * between.
   */
  origin: string;
  /** The port on which it listens itself. */
  readonly port: number;

  readonly log: LogEntry[] = [];
  readonly violations: Violation[] = [];
  readonly accounts: readonly Account[];
  readonly orders: readonly Order[];
  readonly issued: readonly Issued[];
  readonly validations: readonly Validation[];
  /** Names that are paused, as Let's Encrypt does after months of failures: put some in, take them out. */
  readonly paused: Set<string>;

  readonly #book: Book;
  readonly #issuer: Authority;
  readonly #listener: Listener;
  readonly #directory: string;
  readonly #nonces = new Set<string>();
  /** Nonces that the fault `repeat` gave out again: using them is not the client's fault. */
  readonly #repeatedNonces = new Set<string>();
  /** The last answer of each URL, kept for the fault `repeat`. */
  readonly #previous = new Map<string, Answer>();
  /** Until when a URL must not be polled again, by the CA's clock. */
  readonly #retryAfter = new Map<string, number>();
  readonly #closing = new AbortController();
  #offsetMs = 0;

  constructor(readonly switches: Switches, directory: string) {
    const validFor = (years: number) => ({
      notBefore: new Date(Date.now() - DAY),
      notAfter: new Date(Date.now() + years * 365 * DAY),
    });
    const admit = ({ commonName, publicKey }: Authority, issuer: Authority) =>
      certify({ commonName, publicKey, ...validFor(20), authority: true }, issuer);

    const intermediates = Array.from(
      { length: switches.chainLength ?? 1 },
      (_, i) => createAuthority(`lematt test intermediate ${i + 1}`),
    );
    const roots = Array.from(
      { length: 1 + (switches.alternateRoots ?? 0) },
      (_, i) => createAuthority(`lematt test root ${i + 1}`),
    );
    const chains = roots.map((root) =>
      intermediates.map((subject, i) => admit(subject, intermediates[i + 1] ?? root)).join("")
    );
    [this.rootPem = "", ...this.alternateRootPems] = roots.map((root) => admit(root, root));
    this.intermediatePem = chains[0]!;
    this.#issuer = intermediates[0]!;

    this.#book = new Book(
      switches,
      this.#issuer,
      chains,
      () => this.now,
      () => this.origin,
      this.#closing.signal,
    );
    ({
      accounts: this.accounts,
      orders: this.orders,
      issued: this.issued,
      validations: this.validations,
      paused: this.paused,
    } = this.#book);

    const listenerRoot = createAuthority("lematt test listener root");
    this.caBundle = admit(listenerRoot, listenerRoot);
    this.#directory = directory;
    this.caBundleFile = `${directory}/ca-bundle.pem`;
    Deno.writeTextFileSync(this.caBundleFile, this.caBundle);

    const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    const identifiers: Identifier[] = [
      { type: "dns", value: "localhost" },
      { type: "ip", value: "127.0.0.1" },
      { type: "ip", value: "::1" },
    ];
    this.#listener = listen({
      port: switches.port ?? 0,
      cert: certify({ publicKey, identifiers, ...validFor(10) }, listenerRoot),
      key: privateKey.export({ format: "pem", type: "pkcs8" }).toString(),
      tearable: switches.fault !== undefined,
    }, (request, connection) => this.#serve(request, connection));
    this.port = this.#listener.port;
    this.origin = `https://localhost:${this.port}`;
  }

  get directoryUrl(): string {
    return `${this.origin}/dir`;
  }

  /** The CA's clock, which certificates, expiries and limits follow. */
  get now(): Date {
    return new Date(Date.now() + this.#offsetMs);
  }

  /** Moves the CA's clock forward. */
  advance(ms: number): void {
    this.#offsetMs += ms;
  }

  /** Sets what renewalInfo suggests for a certificate, by its serial (upper-case hexadecimal). */
  setRenewalWindow(serial: string, window: RenewalWindow): void {
    const issued = this.issued.find((candidate) => candidate.serial === serial);
    if (issued === undefined) {
      throw new Error(`Cannot set a renewal window: no certificate ${serial} was issued`);
    }
    issued.renewalWindow = window;
  }

  /**
   * A certificate that nobody ordered, signed by this CA, and the default chain (PEM): for answers that lie.
   */
  forge(contents: Contents): string {
    return certify(contents, this.#issuer) + this.intermediatePem;
  }

  async close(): Promise<void> {
    this.#closing.abort();
    await this.#listener.close();
    await this.#book.idle();
    await Deno.remove(this.#directory, { recursive: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  // --------------------------------------------------------------------------------------------- an exchange

  async #serve(request: Request, connection: number): Promise<Response> {
    const { pathname: path, search } = new URL(request.url);
    const [resource, pattern] = ROUTES.find(([, pattern]) => pattern.test(path)) ?? ["unknown" as const, /^/];
    const entry: LogEntry = {
      n: this.log.length + 1,
      method: request.method,
      url: this.origin + path + search,
      resource,
      path,
      at: this.now,
      connection,
      status: 0,
    };
    this.log.push(entry);

    const fault = this.switches.fault?.(entry);
    const previous = this.#previous.get(entry.url);
    if (fault?.kind === "repeat" && previous) {
      this.#repeatedNonces.add(previous.headers.get("replay-nonce") ?? "");
    }
    const { answer, response } = await befall(fault, {
      handle: () => this.#handle(request, entry, pattern.exec(path)!.slice(1)),
      tear: (andNext) => this.#listener.tear(connection, andNext),
      closing: this.#closing.signal,
      badNonce: () => this.#finish(problem(refusal(400, "badNonce", "refused on purpose")), request),
      previous,
    });
    entry.status = answer?.status ?? 0;
    return response;
  }

  async #handle(request: Request, entry: LogEntry, args: readonly string[]): Promise<Answer> {
    let answer: Answer;
    try {
      answer = await this.#answer(request, entry, args);
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      if (error.clientsFault) this.#blame(entry, error.type, error.document.detail);
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

  /** What every answer carries (RFC 8555 §6.5, §7.1). */
  #finish(answer: Answer, request: Request): Answer {
    answer.headers.append("link", `<${this.directoryUrl}>;rel="index"`);
    answer.headers.set("date", this.now.toUTCString());
    if (request.method === "POST") answer.headers.set("replay-nonce", this.#newNonce());
    return answer;
  }

  #newNonce(): string {
    const nonce = randomBytes(16).toString("base64url");
    this.#nonces.add(nonce);
    return nonce;
  }

  async #answer(request: Request, entry: LogEntry, args: readonly string[]): Promise<Answer> {
    const { method } = request;
    const { resource } = entry;
    if (!request.headers.get("user-agent")) throw mistake(400, "malformed", "the request has no User-Agent");
    const perSecond = this.switches.limits?.requestsPerSecond?.[resource];
    if (perSecond !== undefined) {
      const limit = { count: perSecond, windowMs: 1000 };
      this.#book.check(limit, `requests ${resource}`, `requests to ${resource} within a second`);
      this.#book.use(limit, `requests ${resource}`);
    }
    const allow = (...methods: string[]) => {
      if (!methods.includes(method)) throw mistake(405, "malformed", `${method} is not for ${resource}`);
    };
    switch (resource) {
      case "unknown":
        throw mistake(404, "malformed", `there is nothing at ${entry.path}`);
      case "directory":
        allow("GET");
        return this.#describe();
      case "newNonce":
        allow("GET", "HEAD");
        return {
          status: method === "HEAD" ? 200 : 204, // RFC 8555 §7.2
          headers: new Headers({ "replay-nonce": this.#newNonce(), "cache-control": "no-store" }),
        };
      case "renewalInfo":
        allow("GET");
        return this.#renewalInfo(entry, args[0]!);
      case "newAccount":
        allow("POST");
        return this.#newAccount(await this.#authenticate(request, entry, "jwk"));
      case "revokeCert":
        allow("POST");
        return this.#revoke(await this.#authenticate(request, entry, "either"), entry);
    }
    allow("POST");
    const signed = await this.#authenticate(request, entry, "kid");
    const from: FromAccount = { ...signed, account: this.#accountOf(signed, entry) };
    switch (resource) {
      case "newOrder":
        return this.#newOrder(from);
      case "keyChange":
        return this.#changeKey(from, entry);
      case "account":
        return this.#account(from, args[0]!);
      case "orders":
        this.#account({ ...from, payload: expectEmpty(from) }, args[0]!);
        return json(200, { orders: from.account.orders.map(({ url }) => url) });
      case "authz":
        return this.#authorization(from, entry, args[0]!);
      case "challenge":
        return this.#challenge(from, entry, args[0]!);
      case "order":
        expectEmpty(from);
        return this.#order(this.#own<Order>(from, args[0]!), entry);
      case "finalize": {
        const order = this.#own<Order>(from, args[0]!);
        const { csr } = jws.parseObject(from.payload, "the payload");
        if (typeof csr !== "string") throw mistake(400, "malformed", "finalize needs a csr");
        this.#book.finalize(order, csr);
        return this.#order(order, entry);
      }
      case "certificate":
        return this.#certificate(from, args[0]!, args[1]);
    }
  }

  // ---------------------------------------------------------------------------- who asks (RFC 8555 §6.2–6.5)

  async #authenticate(request: Request, entry: LogEntry, by: "jwk" | "kid" | "either"): Promise<Signed> {
    if (request.headers.get("content-type") !== "application/jose+json") {
      throw mistake(415, "malformed", "the content type is not application/jose+json");
    }
    const text = await request.text().catch(() => {
      throw refusal(400, "malformed", "the client went away in the middle of its request");
    });
    const message = jws.parseJws(text);
    const { header, payload } = message;
    jws.checkAlgorithm(message);
    this.#takeNonce(header.nonce);
    if (header.url !== entry.url) {
      throw mistake(403, "unauthorized", `the signed URL is ${JSON.stringify(header.url)}, not ${entry.url}`);
    }
    const uses = ["jwk", "kid"].filter((name) => name in header);
    if (uses.length !== 1 || by !== "either" && uses[0] !== by) {
      throw mistake(
        400,
        "malformed",
        `the header has ${uses.join(" and ") || "neither jwk nor kid"}, not ${by}`,
      );
    }
    const key = uses[0] === "jwk" ? jws.importKey(header.jwk) : this.#byKid(header.kid).key;
    jws.verifyJws(message, key);
    return { payload, header, key };
  }

  #takeNonce(nonce: string | undefined): void {
    jws.fromBase64url(nonce, "the nonce");
    if (this.#nonces.delete(nonce!)) return;
    const refuse = this.#repeatedNonces.has(nonce!) ? refusal : mistake;
    throw refuse(400, "badNonce", "the nonce was used before, or is not from here");
  }

  #byKid(kid: unknown): Account {
    const account = this.accounts.find(({ url }) => url === kid);
    if (account === undefined) {
      throw mistake(400, "accountDoesNotExist", `there is no account ${JSON.stringify(kid)}`);
    }
    return account;
  }

  /** The account that signed, which must be in use (RFC 8555 §7.3.6). */
  #accountOf({ header }: Signed, entry: LogEntry): Account {
    const account = this.#byKid(header.kid);
    entry.kid = account.url;
    if (account.status !== "valid") throw refusal(401, "unauthorized", `the account is ${account.status}`);
    return account;
  }

  /** The resource at `path`, which must belong to the account. */
  #own<Kind extends Order | Authorization>({ account }: FromAccount, path: string): Kind {
    const found = this.#book.at<Kind>(path);
    if (found === undefined) throw mistake(404, "malformed", `there is nothing at ${path}`);
    if (found.account !== account) throw mistake(403, "unauthorized", `${path} belongs to another account`);
    return found;
  }

  // ----------------------------------------------------------------------------- directory (RFC 8555 §7.1.1)

  #describe(): Answer {
    const at = (path: string) => this.origin + path;
    const offered = Object.entries(this.#book.profiles());
    const profiles = Object.fromEntries(offered.map(([name, { description }]) => [name, description]));
    return json(200, {
      newNonce: at("/new-nonce"),
      newAccount: at("/new-account"),
      newOrder: at("/new-order"),
      revokeCert: at("/revoke-cert"),
      keyChange: at("/key-change"),
      ...(this.switches.renewalInfo !== false && { renewalInfo: at("/renewal-info") }),
      // Clients must pass over what they do not know.
      "x-nothing-to-see": "https://localhost/unknown-entries-are-passed-over",
      meta: {
        termsOfService: at("/terms"),
        website: at("/"),
        caaIdentities: this.#book.caaIdentities(),
        externalAccountRequired: this.switches.externalAccounts !== undefined,
        ...(offered.length > 0 && { profiles }),
      },
    });
  }

  // ----------------------------------------------------------------------------------------- accounts (§7.3)

  #newAccount(signed: Signed): Answer {
    const wish = jws.parseObject(signed.payload, "the payload");
    const existing = this.#book.accountOf(signed.key);
    if (existing !== undefined) {
      if (existing.status !== "valid") {
        throw refusal(401, "unauthorized", `the account is ${existing.status}`);
      }
      return showAccount(existing, 200);
    }
    if (wish.onlyReturnExisting === true) {
      throw refusal(400, "accountDoesNotExist", "there is no account with this key");
    }
    if (wish.termsOfServiceAgreed !== true) {
      throw mistake(403, "userActionRequired", "the terms of service must be agreed to");
    }
    const contact = readContact(wish.contact);
    const externalAccount = this.#bind(signed, wish.externalAccountBinding);
    return showAccount(this.#book.createAccount(signed.key, contact, externalAccount), 201);
  }

  /** Verifies an external account binding (§7.3.4); returns the external account's key identifier. */
  #bind(signed: Signed, binding: unknown): string | undefined {
    const { externalAccounts } = this.switches;
    if (externalAccounts === undefined) return undefined;
    if (binding === undefined) {
      throw refusal(403, "externalAccountRequired", "accounts here must be bound to an external account");
    }
    const inner = jws.parseJws(binding as Record<string, unknown>, "the account binding");
    const { kid, url, nonce } = inner.header;
    if (nonce !== undefined || url !== signed.header.url) {
      throw mistake(400, "malformed", "the account binding must repeat the URL and have no nonce");
    }
    if (typeof kid !== "string" || !Object.hasOwn(externalAccounts, kid)) {
      throw refusal(403, "unauthorized", `there is no external account ${JSON.stringify(kid)}`);
    }
    jws.verifyMac(inner, Buffer.from(externalAccounts[kid]!, "base64url"));
    if (jws.importKey(jws.parseObject(inner.payload, "the bound key")).thumbprint !== signed.key.thumbprint) {
      throw mistake(400, "malformed", "the account binding is for another key");
    }
    return kid;
  }

  /** §7.3.2 and §7.3.6: shows, updates or deactivates. */
  #account({ account, payload }: FromAccount, path: string): Answer {
    if (this.#book.at<Account>(path) !== account) {
      throw mistake(403, "unauthorized", `${path} is not the account that asks`);
    }
    if (payload !== "") {
      const { contact, status } = jws.parseObject(payload, "the payload");
      if (contact !== undefined) account.contact = readContact(contact);
      if (status === "deactivated") account.status = status;
    }
    return showAccount(account, 200);
  }

  /** §7.3.5: the outer message is signed with the old key, the inner one with the new. */
  #changeKey({ account, payload, header }: FromAccount, entry: LogEntry): Answer {
    const inner = jws.parseJws(payload, "the inner JWS");
    if (inner.header.nonce !== undefined || inner.header.url !== header.url || "kid" in inner.header) {
      throw mistake(400, "malformed", "the inner JWS must repeat the URL and have neither nonce nor kid");
    }
    const key = jws.importKey(inner.header.jwk);
    jws.verifyJws(inner, key);
    const change = jws.parseObject(inner.payload, "the inner payload");
    if (change.account !== entry.kid) {
      throw mistake(400, "malformed", "the inner payload names another account");
    }
    if (jws.importKey(change.oldKey).thumbprint !== account.key.thumbprint) {
      throw mistake(400, "malformed", "the inner payload names another old key");
    }
    const holder = this.#book.accountOf(key);
    if (holder !== undefined) {
      throw refusal(409, "malformed", "the new key is in use", {}, { location: holder.url });
    }
    account.key = key;
    return showAccount(account, 200);
  }

  // ------------------------------------------------------------------------------------- orders (§7.4, §7.5)

  #newOrder({ account, payload }: FromAccount): Answer {
    const wish = jws.parseObject(payload, "the payload");
    for (const name of ["notBefore", "notAfter"]) {
      if (name in wish) throw mistake(400, "malformed", `${name} is not for the client to choose here`);
    }
    const order = this.#book.createOrder(account, wish);
    const answer = json(201, showOrder(order));
    answer.headers.set("location", order.url);
    return answer;
  }

  #order(order: Order, entry: LogEntry): Answer {
    this.#book.settle(order);
    const answer = json(200, showOrder(order));
    // Finalize answers for the order, and says where it is (Boulder does, and clients may rely on it).
    if (entry.resource === "finalize") answer.headers.set("location", order.url);
    const working = order.status === "processing" ||
      order.status === "pending" && order.authorizations.some(isUnderWay);
    this.#askLater(answer, entry, order.url, working);
    return answer;
  }

  #authorization(from: FromAccount, entry: LogEntry, path: string): Answer {
    const authorization = this.#own<Authorization>(from, path);
    if (from.payload !== "") {
      const { status } = jws.parseObject(from.payload, "the payload");
      if (status !== "deactivated") {
        throw mistake(400, "malformed", "an authorization can only be deactivated (§7.5.2)");
      }
      authorization.status = status;
    }
    const answer = json(200, showAuthorization(authorization, this.#book.caaIdentities()));
    this.#askLater(answer, entry, authorization.url, isUnderWay(authorization));
    return answer;
  }

  /** §7.5.1: `{}` asks for the validation, an empty payload for the challenge as it stands. */
  #challenge(from: FromAccount, entry: LogEntry, path: string): Answer {
    const authorization = this.#own<Authorization>(from, path);
    const challenge = authorization.challenges.find(({ url }) => url === entry.url);
    if (challenge === undefined) throw mistake(404, "malformed", `there is nothing at ${entry.path}`);
    if (from.payload !== "") {
      if (Object.keys(jws.parseObject(from.payload, "the payload")).length > 0) {
        throw mistake(400, "malformed", "the answer to a challenge is {}");
      }
      this.#book.respond(authorization, challenge);
    }
    const answer = json(200, showChallenge(challenge, authorization, this.#book.caaIdentities()));
    answer.headers.append("link", `<${authorization.url}>;rel="up"`);
    this.#askLater(answer, entry, challenge.url, challenge.status === "processing");
    return answer;
  }

  /** Gives a Retry-After where something is being worked on, and notes who comes back too soon. */
  #askLater(
    answer: Answer,
    entry: LogEntry,
    url: string,
    working: boolean,
    seconds = this.switches.retryAfterSeconds,
  ) {
    const now = this.now.getTime();
    const until = this.#retryAfter.get(url) ?? 0;
    this.#retryAfter.delete(url);
    if (entry.url === url && now < until) {
      this.#blame(entry, "tooSoon", `${until - now} ms before Retry-After`);
    }
    if (!working || seconds === undefined) return;
    const asDate = this.switches.retryAfterAsDate && entry.resource !== "renewalInfo";
    // A date has whole seconds only: round up, so that it does not allow less than the seconds meant.
    const date = new Date(Math.ceil((now + seconds * 1000) / 1000) * 1000);
    answer.headers.set("retry-after", asDate ? date.toUTCString() : `${seconds}`);
    this.#retryAfter.set(url, now + seconds * 1000);
  }

  // ------------------------------------------------------------------- certificates (§7.4.2, §7.6, RFC 9773)

  #certificate(from: FromAccount, path: string, alternate: string | undefined): Answer {
    expectEmpty(from);
    const issued = this.#book.at<Issued>(path);
    const chain = issued?.chains[Number(alternate ?? 0)];
    if (issued === undefined || chain === undefined) {
      throw mistake(404, "malformed", `there is no certificate at ${path}`);
    }
    if (issued.order.account !== from.account) {
      throw mistake(403, "unauthorized", "the certificate is another account's");
    }
    const headers = new Headers({ "content-type": "application/pem-certificate-chain" });
    issued.chains.forEach((other, i) => {
      if (other !== chain) headers.append("link", `<${issued.url}/${i}>;rel="alternate"`);
    });
    return { status: 200, headers, body: chain };
  }

  #revoke(signed: Signed, entry: LogEntry): Answer {
    const { certificate, reason } = jws.parseObject(signed.payload, "the payload");
    const text = pem("CERTIFICATE", jws.fromBase64url(certificate, "certificate"));
    const issued = this.issued.find(({ pem }) => pem === text);
    if (issued === undefined) throw mistake(404, "malformed", "the certificate is not from here");
    if (signed.header.kid !== undefined) {
      const account = this.#accountOf(signed, entry);
      const controls = issued.names.every((name) => account.authorizations.get(name)?.status === "valid");
      if (issued.order.account !== account && !controls) {
        throw mistake(
          403,
          "unauthorized",
          "the account neither ordered the certificate nor controls its names",
        );
      }
    } else {
      const own = jws.importKey(new X509Certificate(text).publicKey.export({ format: "jwk" }));
      if (own.thumbprint !== signed.key.thumbprint) {
        throw mistake(403, "unauthorized", "this is not the certificate's key");
      }
    }
    this.#book.revoke(issued, reason);
    return { status: 200, headers: new Headers() };
  }

  #renewalInfo(entry: LogEntry, certId: string): Answer {
    if (this.switches.renewalInfo === false) throw mistake(404, "malformed", "renewalInfo is not offered");
    const { start, end, explanationURL } = this.#book.renewalWindow(this.#book.findByCertId(certId));
    const answer = json(200, { suggestedWindow: { start, end }, explanationURL });
    this.#askLater(answer, entry, entry.url, true, this.switches.renewalInfoRetryAfterSeconds ?? 6 * 3600);
    return answer;
  }
}

// ------------------------------------------------------------------------------------------------- rendering

function json(status: number, body: unknown): Answer {
  return { status, headers: new Headers({ "content-type": "application/json" }), body: JSON.stringify(body) };
}

function problem({ status, document, headers }: Problem): Answer {
  const type = { "content-type": "application/problem+json" };
  return { status, headers: new Headers({ ...type, ...headers }), body: JSON.stringify(document) };
}

/** RFC 3339, in whole seconds as most CAs write it. */
const instant = (date: Date | undefined) => date && `${date.toISOString().slice(0, 19)}Z`;

function showAccount({ url, status, contact }: Account, code: 200 | 201): Answer {
  const answer = json(code, { status, contact, termsOfServiceAgreed: true, orders: `${url}/orders` });
  answer.headers.set("location", url);
  return answer;
}

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
  return {
    status,
    expires: instant(expires),
    identifier,
    ...(wildcard && { wildcard }),
    // What was not used to prove a valid authorization is not shown (§7.1.4).
    challenges: challenges.filter((challenge) => status === "pending" || challenge.status !== "pending")
      .map((challenge) => showChallenge(challenge, authorization, issuers)),
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

// --------------------------------------------------------------------------------------------------- reading

/** POST-as-GET (RFC 8555 §6.3). */
function expectEmpty({ payload }: Signed): "" {
  if (payload !== "") throw mistake(400, "malformed", "POST-as-GET has an empty payload");
  return payload;
}

/** RFC 8555 §7.3: mailto URLs with one address and no header fields. */
function readContact(contact: unknown): readonly string[] {
  if (contact === undefined) return [];
  if (!Array.isArray(contact) || !contact.every((url) => typeof url === "string")) {
    throw mistake(400, "malformed", "contact is not an array of URLs");
  }
  for (const url of contact) {
    if (!url.startsWith("mailto:")) {
      throw mistake(400, "unsupportedContact", `${JSON.stringify(url)} is no mailto URL`);
    }
    if (!/^mailto:[^\s@,?]+@[^\s@,?]+\.[^\s@,?]+$/.test(url)) {
      throw mistake(400, "invalidContact", `${JSON.stringify(url)} is not one mail address`);
    }
  }
  return contact;
}
