/**
 * The books of the test CA: accounts, orders, authorizations, certificates, and the rules by which one leads
 * to the other (RFC 8555 §7.1.6 and §7.4, RFC 9773 §5). It knows no HTTP and no signatures of requests; it
 * throws problems.
 */
import { Buffer } from "node:buffer";
import { randomBytes } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import { fromBase64url, importKey, type SigningKey } from "./ca-jws.ts";
import { type Identifier, mistake, Problem, type ProblemDocument, refusal } from "./ca-problem.ts";
import { LETS_ENCRYPT_PROFILES, type Limit, NO_PROFILE, type Profile, type Switches } from "./ca-switches.ts";
import { validate } from "./ca-validate.ts";
import { type Authority, canonicalIp, certify, newSerial, readRequest, type Request } from "./ca-x509.ts";

const HOUR = 3600_000, DAY = 24 * HOUR;

// ----------------------------------------------------------------------------------------------- the entries

/** RFC 8555 §7.1.2. A test may set `status`. */
export interface Account {
  readonly url: string;
  status: "valid" | "deactivated" | "revoked";
  contact: readonly string[];
  key: SigningKey;
  /** Key identifier of the external account that it is bound to. */
  readonly externalAccount?: string;
  readonly orders: Order[];
  /** The newest authorization of each name. */
  readonly authorizations: Map<string, Authorization>;
}

/** RFC 8555 §7.1.3. */
export interface Order {
  readonly url: string;
  readonly account: Account;
  readonly identifiers: readonly Identifier[];
  readonly authorizations: readonly Authorization[];
  readonly expires: Date;
  readonly profile?: string;
  readonly replaces?: string;
  status: "pending" | "ready" | "processing" | "valid" | "invalid";
  error?: ProblemDocument;
  /** The CSR that finalize accepted: as it came, and read. */
  csr?: string;
  request?: Request;
  /** When `processing` ends, by performance.now(). */
  doneAt?: number;
  certificate?: Issued;
}

/** RFC 8555 §7.1.4. */
export interface Authorization {
  readonly url: string;
  readonly account: Account;
  readonly identifier: Identifier;
  readonly wildcard: boolean;
  readonly challenges: readonly Challenge[];
  status: "pending" | "valid" | "invalid" | "deactivated" | "expired";
  expires: Date;
}

/** RFC 8555 §8. */
export interface Challenge {
  readonly url: string;
  readonly type: string;
  /** "" for dns-persist-01, which has none. */
  readonly token: string;
  status: "pending" | "processing" | "valid" | "invalid";
  validated?: Date;
  error?: ProblemDocument;
}

/** When to renew (RFC 9773 §4.2). */
export interface RenewalWindow {
  readonly start: Date;
  readonly end: Date;
  readonly explanationURL?: string;
}

/** A certificate that was issued. */
export interface Issued {
  readonly url: string;
  /** Upper-case hexadecimal, as node:crypto and openssl show it. */
  readonly serial: string;
  /** RFC 9773 §4.1. */
  readonly certId: string;
  readonly names: readonly string[];
  readonly keyType: "rsa" | "ec";
  readonly order: Order;
  readonly profile?: string;
  readonly replaces?: string;
  readonly notBefore: Date;
  readonly notAfter: Date;
  /** The leaf alone. */
  readonly pem: string;
  /** The chains on offer, each beginning with the leaf; the first is the default. */
  readonly chains: readonly string[];
  revoked?: { readonly at: Date; readonly reason: number };
  renewalWindow?: RenewalWindow;
}

/** A validation that was made. */
export interface Validation {
  readonly type: string;
  /** With `*.` for a wildcard. */
  readonly name: string;
  /** Why it failed; absent if it did not. */
  readonly error?: ProblemDocument;
}

/** What a new order asks for, as it came. */
export interface Wish {
  readonly identifiers?: unknown;
  readonly profile?: unknown;
  readonly replaces?: unknown;
}

// ----------------------------------------------------------------------------------------------------- names

const DNS_NAME =
  /^(\*\.)?(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/;

/** Checks the identifiers of a new order (RFC 8555 §7.4, RFC 8738 §3). */
function readIdentifiers(list: unknown): Identifier[] {
  if (!Array.isArray(list) || list.length === 0) {
    throw mistake(400, "malformed", "an order needs identifiers");
  }
  const seen = new Set<string>();
  return list.map((entry: Partial<Identifier> | null) => {
    const { type, value } = entry ?? {};
    if (type !== "dns" && type !== "ip") {
      throw mistake(
        400,
        "unsupportedIdentifier",
        `identifiers of type ${JSON.stringify(type)} are not supported`,
      );
    }
    const good = typeof value === "string" &&
      (type === "dns" ? DNS_NAME.test(value) : canonicalIp(value) === value);
    if (!good) {
      throw mistake(400, "malformed", `${JSON.stringify(value)} is no valid identifier of type ${type}`);
    }
    if (seen.has(value)) throw mistake(400, "malformed", `${value} stands in the order twice`);
    seen.add(value);
    return { type, value };
  });
}

const byValue = (identifiers: readonly Identifier[]) =>
  identifiers.map(({ type, value }) => `${type}:${value}`).sort().join();

// ----------------------------------------------------------------------------------------------------- books

/** All that the CA has written down, and the pen. */
export class Book {
  readonly accounts: Account[] = [];
  readonly orders: Order[] = [];
  readonly issued: Issued[] = [];
  readonly validations: Validation[] = [];
  /** Names that may not be ordered until somebody visits the unpause page. */
  readonly paused = new Set<string>();
  /** All resources that have a URL of their own, by its path. */
  readonly #byPath = new Map<string, Account | Order | Authorization | Issued>();
  readonly #byCertId = new Map<string, Issued>();
  /** When a limited thing happened, by limit and subject, in the CA's clock. */
  readonly #uses = new Map<string, number[]>();
  readonly #validating = new Set<Promise<void>>();

  /**
   * `origin` begins every URL; `chains` are the certificates that follow a leaf, one text for each root;
   * `closing` ends validations.
   */
  constructor(
    readonly switches: Switches,
    readonly issuer: Authority,
    readonly chains: readonly string[],
    readonly clock: () => Date,
    readonly origin: () => string,
    readonly closing: AbortSignal,
  ) {}

  // -------------------------------------------------------------------------------------------------- limits

  /** Throws `rateLimited` if `subject` has used up `limit`. */
  check(limit: Limit | undefined, subject: string, what: string): void {
    if (limit === undefined) return;
    const now = this.clock().getTime();
    const uses = (this.#uses.get(subject) ?? []).filter((at) => at > now - limit.windowMs);
    this.#uses.set(subject, uses);
    if (uses.length < limit.count) return;
    const freeAt = uses[uses.length - limit.count]! + limit.windowMs;
    const seconds = limit.retryAfterSeconds ?? Math.ceil((freeAt - now) / 1000);
    const until = new Date(now + seconds * 1000).toISOString().slice(0, 19).replace("T", " ");
    throw refusal(429, "rateLimited", `too many ${what} (${limit.count}), retry after ${until} UTC`, {}, {
      "retry-after": `${seconds}`,
    });
  }

  /** Notes that a limited thing happened. */
  use(limit: Limit | undefined, subject: string): void {
    if (limit === undefined) return;
    const uses = this.#uses.get(subject) ?? [];
    this.#uses.set(subject, uses);
    uses.push(this.clock().getTime());
  }

  // ------------------------------------------------------------------------------------------------ accounts

  /** The account of a key that is in use. */
  accountOf(key: SigningKey): Account | undefined {
    return this.accounts.find((account) => account.key.thumbprint === key.thumbprint);
  }

  createAccount(key: SigningKey, contact: readonly string[], externalAccount?: string): Account {
    const url = `${this.origin()}/account/${this.accounts.length + 1}`;
    const account: Account = {
      url,
      status: "valid",
      contact,
      key,
      externalAccount,
      orders: [],
      authorizations: new Map(),
    };
    this.accounts.push(account);
    this.#byPath.set(new URL(url).pathname, account);
    return account;
  }

  /** What stands at `path`; the route says what kind it is. */
  at<Kind extends Account | Order | Authorization | Issued>(path: string): Kind | undefined {
    return this.#byPath.get(path) as Kind | undefined;
  }

  // -------------------------------------------------------------------------------------------------- orders

  profiles(): Readonly<Record<string, Profile>> {
    return this.switches.profiles ?? LETS_ENCRYPT_PROFILES;
  }

  createOrder(account: Account, wish: Wish): Order {
    const identifiers = readIdentifiers(wish.identifiers);
    const { name: profile, terms } = this.#profile(wish.profile);
    if (identifiers.length > terms.maxNames) {
      throw mistake(
        400,
        "malformed",
        `${identifiers.length} identifiers in an order, ${terms.maxNames} are allowed`,
      );
    }
    this.#checkPolicy(account, identifiers, terms);
    const replaces = wish.replaces === undefined
      ? undefined
      : this.#checkReplaces(account, identifiers, wish.replaces);
    const { newOrder, sameNames } = this.switches.limits ?? {};
    if (replaces === undefined) { // renewals that keep to renewalInfo are exempt, as at Let's Encrypt
      this.check(sameNames, `names ${byValue(identifiers)}`, "certificates for exactly these names");
      this.check(newOrder, `orders ${account.url}`, "new orders from this account");
      this.use(newOrder, `orders ${account.url}`);
    }

    const order: Order = {
      url: `${this.origin()}/order/${this.orders.length + 1}`,
      account,
      identifiers,
      authorizations: identifiers.map((identifier) => this.#authorize(account, identifier)),
      expires: new Date(this.clock().getTime() + 7 * DAY),
      profile,
      replaces,
      status: "pending",
    };
    this.orders.push(order);
    account.orders.push(order);
    this.#byPath.set(new URL(order.url).pathname, order);
    this.settle(order);
    return order;
  }

  #profile(wanted: unknown): { name?: string; terms: Profile } {
    const profiles = this.profiles();
    const name = wanted ?? Object.keys(profiles)[0];
    if (name === undefined) return { terms: NO_PROFILE };
    const terms = typeof name === "string" && Object.hasOwn(profiles, name) ? profiles[name] : undefined;
    if (terms === undefined) {
      throw mistake(400, "invalidProfile", `there is no profile ${JSON.stringify(wanted)}`);
    }
    return { name: name as string, terms };
  }

  /** Refuses names as a CA's policy does: every refused name gets its subproblem (RFC 8555 §6.7.1). */
  #checkPolicy(account: Account, identifiers: readonly Identifier[], terms: Profile): void {
    const subproblems = identifiers.flatMap((identifier) => {
      const reason = identifier.type === "ip" && !terms.ipAddresses
        ? "the profile allows no IP addresses"
        : this.switches.reject?.(identifier.value);
      return reason === undefined
        ? []
        : [refusal(400, "rejectedIdentifier", reason, { identifier }).document];
    });
    if (subproblems.length > 0) {
      const names = subproblems.map(({ identifier }) => identifier!.value).join(", ");
      const detail = subproblems.length === 1
        ? `cannot issue for ${names}: ${subproblems[0]!.detail}`
        : `cannot issue for ${names}`;
      throw refusal(400, "rejectedIdentifier", detail, { subproblems });
    }
    const paused = identifiers.filter(({ value }) => this.paused.has(value)).map(({ value }) => value);
    if (paused.length > 0) {
      const unpause = `${this.origin()}/sfe/v1/unpause?jwt=eyJhbGciOiJIUzI1NiJ9.e30.c2VsZi1zZXJ2aWNl`;
      throw refusal(
        429,
        "rateLimited",
        `issuance for ${paused.join(", ")} is paused for this account, resume it here: ${unpause}`,
      );
    }
    for (const { value } of identifiers) {
      this.check(
        this.switches.limits?.failedValidations,
        `failures ${account.url} ${value}`,
        `failed validations of ${value}`,
      );
    }
  }

  /** RFC 9773 §5: the predecessor is this account's, shares a name, and has no other successor. */
  #checkReplaces(account: Account, identifiers: readonly Identifier[], replaces: unknown): string {
    const predecessor = this.findByCertId(replaces);
    const { refuseReplaces } = this.switches;
    if (refuseReplaces !== undefined) {
      const status = { alreadyReplaced: 409, unauthorized: 403, malformed: 400 }[refuseReplaces];
      throw refusal(status, refuseReplaces, "this CA takes no replacements");
    }
    if (predecessor.order.account !== account) {
      throw mistake(403, "unauthorized", "the certificate to be replaced belongs to another account");
    }
    if (
      !predecessor.order.identifiers.some(({ value }) => identifiers.some((wanted) => wanted.value === value))
    ) {
      throw mistake(400, "malformed", "the certificate to be replaced shares no identifier with the order");
    }
    for (const order of account.orders) {
      if (order.replaces !== replaces) continue;
      this.settle(order);
      if (order.status !== "invalid") {
        throw refusal(409, "alreadyReplaced", `the certificate is already replaced by ${order.url}`);
      }
    }
    return replaces as string;
  }

  /** The authorization that a new order gets for a name: an old one, if `reuse` allows, or a new one. */
  #authorize(account: Account, { type, value }: Identifier): Authorization {
    const last = account.authorizations.get(value);
    if (last !== undefined) this.#expire(last);
    const { reuse = "valid" } = this.switches;
    if (last?.status === "valid" && reuse !== "none") return last;
    if (last?.status === "pending" && reuse === "pending") return last;

    const wildcard = value.startsWith("*.");
    const path = `/authz/${this.#byPath.size + 1}`;
    const url = this.origin() + path;
    const types = type === "ip"
      ? ["tls-alpn-01", "http-01"]
      : wildcard
      ? ["dns-persist-01", "dns-01"]
      : ["tls-alpn-01", "dns-persist-01", "dns-01", "http-01"];
    const authorization: Authorization = {
      url,
      account,
      identifier: { type, value: wildcard ? value.slice(2) : value },
      wildcard,
      challenges: types.map((type) => ({
        url: `${url}/${type}`,
        type,
        token: type === "dns-persist-01" ? "" : randomBytes(32).toString("base64url"),
        status: "pending",
      })),
      status: "pending",
      expires: new Date(this.clock().getTime() + 7 * DAY),
    };
    account.authorizations.set(value, authorization);
    this.#byPath.set(path, authorization);
    return authorization;
  }

  #expire(authorization: Authorization): void {
    const open = authorization.status === "pending" || authorization.status === "valid";
    if (open && authorization.expires < this.clock()) authorization.status = "expired";
  }

  /**
   * Brings an order's status up to date with its authorizations and the clock (RFC 8555 §7.1.6). It turns
   * invalid only when no validation is under way any more, so that its error names every failure.
   */
  settle(order: Order): void {
    if (order.status === "processing" && performance.now() >= order.doneAt!) this.#issue(order);
    if (order.status !== "pending" && order.status !== "ready") return;
    for (const authorization of order.authorizations) this.#expire(authorization);
    const of = (...statuses: Authorization["status"][]) =>
      order.authorizations.filter(({ status }) => statuses.includes(status));
    if (order.authorizations.some(isUnderWay)) return;
    const failed = of("invalid", "deactivated", "expired");
    if (failed.length > 0 && this.switches.failure !== "authorization") {
      order.status = "invalid";
      order.error = summary(failed);
    } else if (order.expires < this.clock()) {
      order.status = "invalid";
      order.error = refusal(403, "malformed", "the order has expired").document;
    } else if (of("valid").length === order.authorizations.length) {
      order.status = "ready";
    }
  }

  // ---------------------------------------------------------------------------------------------- validation

  /** Begins the validation that the client asked for; asked again, nothing happens. */
  respond(authorization: Authorization, challenge: Challenge): void {
    this.#expire(authorization);
    if (challenge.status !== "pending") return;
    if (authorization.status !== "pending" || isUnderWay(authorization)) {
      throw mistake(400, "malformed", `the authorization is ${authorization.status} and awaits no challenge`);
    }
    if (challenge.type === "tls-alpn-01") {
      throw mistake(400, "malformed", "tls-alpn-01 was asked for but is not understood");
    }
    challenge.status = "processing";
    const done = this.#validate(authorization, challenge).finally(() => this.#validating.delete(done));
    this.#validating.add(done);
  }

  async #validate(authorization: Authorization, challenge: Challenge): Promise<void> {
    const { account, identifier, wildcard } = authorization;
    const { type, token } = challenge;
    const name = wildcard ? `*.${identifier.value}` : identifier.value;
    const { switches, closing } = this;
    try {
      if (switches.validationDelayMs) await delay(switches.validationDelayMs, undefined, { signal: closing });
      await validate({
        type,
        identifier,
        wildcard,
        token,
        keyAuthorization: `${token}.${account.key.thumbprint}`,
        accountUrl: account.url,
        issuerNames: this.caaIdentities(),
        now: this.clock(),
      }, {
        resolve: switches.resolve ?? (() => ({ hostname: "127.0.0.1", port: switches.httpPort ?? 80 })),
        txt: switches.txt ?? (() => Promise.resolve([])),
        cname: switches.cname ?? (() => Promise.resolve(undefined)),
        timeoutMs: switches.validationTimeoutMs ?? 10_000,
        closing,
      });
      challenge.status = authorization.status = "valid";
      challenge.validated = this.clock();
      challenge.error = undefined;
      authorization.expires = new Date(
        this.clock().getTime() + (switches.authorizationLifetimeMs ?? 30 * DAY),
      );
      this.validations.push({ type, name });
    } catch (error) {
      if (closing.aborted) return;
      if (!(error instanceof Problem)) throw error;
      if (switches.failure === "challenge") challenge.status = "pending";
      else challenge.status = authorization.status = "invalid";
      challenge.error = error.document;
      this.use(switches.limits?.failedValidations, `failures ${account.url} ${name}`);
      this.validations.push({ type, name, error: error.document });
    }
  }

  /** Resolves when no validation is under way. */
  async idle(): Promise<void> {
    await Promise.all(this.#validating);
  }

  caaIdentities(): readonly string[] {
    return this.switches.caaIdentities ?? ["ca.example"];
  }

  // ------------------------------------------------------------------------------------------------ issuance

  /** RFC 8555 §7.4: takes the CSR (base64url) of an order that is ready. */
  finalize(order: Order, csr: string): void {
    this.settle(order);
    if (order.status !== "ready") {
      // Who repeats a finalize whose answer was lost is told so without blame.
      const refuse = order.csr === csr ? refusal : mistake;
      throw refuse(403, "orderNotReady", `the order is ${order.status}`);
    }
    order.request = this.#readCsr(order, csr);
    order.csr = csr;
    order.status = "processing";
    order.doneAt = performance.now() + (this.switches.processingMs ?? 0);
    this.settle(order);
  }

  /** Reads a CSR that must ask for exactly the order's names, under an acceptable key. */
  #readCsr(order: Order, csr: string): Request {
    const bad = (detail: string) => mistake(400, "badCSR", `the CSR ${detail}`);
    let request: Request;
    try {
      request = readRequest(fromBase64url(csr, "csr"));
    } catch (error) {
      throw error instanceof Problem ? error : bad(`cannot be read: ${(error as Error).message}`);
    }
    const { identifiers, commonNames, publicKey } = request;
    if (byValue(identifiers) !== byValue(order.identifiers)) {
      throw bad(`is for ${byValue(identifiers) || "no names"}, the order for ${byValue(order.identifiers)}`);
    }
    if (
      commonNames.length > 1 || commonNames.some((name) => !identifiers.some(({ value }) => value === name))
    ) {
      throw bad(`has a common name that is none of its names: ${commonNames.join(", ")}`);
    }
    const { modulusLength, namedCurve } = publicKey.asymmetricKeyDetails ?? {};
    const curves = ["prime256v1", "secp384r1", ...(this.switches.refuseP521 ? [] : ["secp521r1"])];
    const fits = publicKey.asymmetricKeyType === "rsa"
      ? modulusLength! >= 2048 && modulusLength! <= 8192 && modulusLength! % 8 === 0
      : publicKey.asymmetricKeyType === "ec" && curves.includes(namedCurve!);
    if (!fits) {
      throw bad(`has an unacceptable key: ${publicKey.asymmetricKeyType} ${namedCurve ?? modulusLength}`);
    }
    if (this.accountOf(importKey(publicKey.export({ format: "jwk" }))) !== undefined) {
      throw bad("has the key of an account"); // RFC 8555 §11.1
    }
    return request;
  }

  #issue(order: Order): void {
    const { identifiers, commonNames, publicKey } = order.request!;
    const { terms } = this.#profile(order.profile);
    // Backdated by an hour, as everywhere; both ends belong to the lifetime.
    const notBefore = new Date(Math.floor(this.clock().getTime() / 1000) * 1000 - HOUR);
    const notAfter = new Date(notBefore.getTime() + terms.lifetimeMs - 1000);
    // Every other serial begins with a set bit: its DER form needs the zero octet that a certID must keep.
    const serial = newSerial();
    if (this.issued.length % 2 === 0) serial[0]! |= 0x80;
    const commonName = terms.commonName ? commonNames[0] : undefined;
    const leaf = certify({ publicKey, commonName, identifiers, notBefore, notAfter, serial }, this.issuer);

    const derSerial = serial[0]! >= 0x80 ? Buffer.concat([Buffer.of(0), serial]) : serial;
    const hex = serial.toString("hex").toUpperCase();
    const path = `/certificate/${hex}`;
    const issued: Issued = {
      url: this.origin() + path,
      serial: hex,
      certId: `${Buffer.from(this.issuer.keyId).toString("base64url")}.${derSerial.toString("base64url")}`,
      names: order.identifiers.map(({ value }) => value),
      keyType: publicKey.asymmetricKeyType === "rsa" ? "rsa" : "ec",
      order,
      profile: order.profile,
      replaces: order.replaces,
      notBefore,
      notAfter,
      pem: leaf,
      chains: this.chains.map((chain) => leaf + chain),
    };
    this.issued.push(issued);
    this.#byPath.set(path, issued);
    this.#byCertId.set(issued.certId, issued);
    this.use(this.switches.limits?.sameNames, `names ${byValue(order.identifiers)}`);
    order.certificate = issued;
    order.status = "valid";
  }

  // ---------------------------------------------------------------------------------------- renewal, the end

  /** The certificate that a certID names (RFC 9773 §4.1). */
  findByCertId(certId: unknown): Issued {
    const [keyId, serial, ...more] = typeof certId === "string" ? certId.split(".") : [];
    if (!keyId || !serial || more.length > 0) {
      throw mistake(400, "malformed", `${JSON.stringify(certId)} is no certID`);
    }
    fromBase64url(keyId, "the key identifier of the certID");
    fromBase64url(serial, "the serial of the certID");
    const issued = this.#byCertId.get(certId as string);
    if (issued !== undefined) return issued;
    // Of this CA, but unknown, is a client that wrote the serial wrongly; of another CA, one that moved here.
    const ours = Buffer.from(this.issuer.keyId).toString("base64url") === keyId;
    throw (ours ? mistake : refusal)(404, "malformed", `no certificate has the certID ${certId}`);
  }

  /** The window in which to renew: what was set, the past for a revoked certificate, else by its lifetime. */
  renewalWindow(issued: Issued): RenewalWindow {
    if (issued.renewalWindow !== undefined) return issued.renewalWindow;
    if (issued.revoked !== undefined) {
      const at = issued.revoked.at.getTime();
      return { start: new Date(at - HOUR), end: new Date(at) };
    }
    // In its middle a third of the lifetime is left, or a half of a short one (Let's Encrypt's advice).
    const lifetime = issued.notAfter.getTime() - issued.notBefore.getTime();
    const middle = issued.notAfter.getTime() - lifetime / (lifetime < 10 * DAY ? 2 : 3);
    return { start: new Date(middle - lifetime / 50), end: new Date(middle + lifetime / 50) };
  }

  /** RFC 8555 §7.6; who may ask is decided before. */
  revoke(issued: Issued, reason: unknown = 0): void {
    // RFC 5280 §5.3.1, without the reasons that only a CA can have.
    if (typeof reason !== "number" || ![0, 1, 3, 4, 5].includes(reason)) {
      throw mistake(
        400,
        "badRevocationReason",
        `subscribers cannot give the reason ${JSON.stringify(reason)}`,
      );
    }
    if (issued.revoked !== undefined) {
      throw refusal(400, "alreadyRevoked", "the certificate is revoked already");
    }
    issued.revoked = { at: this.clock(), reason };
  }
}

/** Whether a validation of it is being made. */
export function isUnderWay({ challenges }: Authorization): boolean {
  return challenges.some(({ status }) => status === "processing");
}

/** The error of an order: the one failure's, or a compound of several (RFC 8555 §6.7.1). */
function summary(failed: readonly Authorization[]): ProblemDocument {
  const problems = failed.map(({ challenges, identifier, status }): ProblemDocument => {
    const reason = challenges.find(({ error }) => error !== undefined)?.error ??
      refusal(403, "unauthorized", `the authorization is ${status}`).document;
    return { ...reason, identifier };
  });
  const { identifier: _, ...first } = problems[0]!;
  if (problems.length === 1) return first;
  const names = problems.map(({ identifier }) => identifier!.value).join(", ");
  return refusal(403, "compound", `cannot validate ${names}`, { subproblems: problems }).document;
}
