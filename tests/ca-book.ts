/**
 * The books of the test CA: accounts, orders, authorizations, certificates, and the rules by which one leads to the
 * other (RFC 8555 §7.1.6 and §7.4, RFC 9773 §5). It knows no HTTP and no signatures of requests; it throws problems.
 */
import { randomBytes } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import {
  fromBase64url,
  type Identifier,
  importKey,
  malformed,
  Problem,
  type ProblemDocument,
  refusal,
  type SigningKey,
  violation,
} from "./ca-jws.ts";
import { issuersOf, type Limit, NO_PROFILE, type Profile, profilesOf, type Switches } from "./ca-switches.ts";
import { validate } from "./ca-validate.ts";
import {
  type Authority,
  canonicalIp,
  certify,
  derSerial,
  newSerial,
  readRequest,
  type Request,
} from "./ca-x509.ts";

const HOUR = 3600_000, DAY = 24 * HOUR;

/** RFC 8555 §7.1.2. */
export interface Account {
  readonly url: string;
  contact: readonly string[];
  key: SigningKey;
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
  status: "pending" | "valid" | "invalid" | "expired";
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

/** A certificate that was issued. */
export interface Issued {
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
  /** The chains on offer, each beginning with the leaf; the first is the default. */
  readonly chains: readonly string[];
  revoked?: { readonly at: Date; readonly reason: number };
  /** What renewalInfo suggests (RFC 9773 §4.2) where a test has set it. */
  renewalWindow?: { readonly start: Date; readonly end: Date; readonly explanationURL?: string };
}

/** A validation that was made; `name` with `*.` for a wildcard, `error` if it failed. */
export interface Validation {
  readonly type: string;
  readonly name: string;
  readonly error?: ProblemDocument;
}

const DNS_NAME =
  /^(\*\.)?(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/;

/** Checks the identifiers of a new order (RFC 8555 §7.4, RFC 8738 §3). */
function readIdentifiers(list: unknown): Identifier[] {
  if (!Array.isArray(list) || list.length === 0) throw malformed("an order needs identifiers");
  const seen = new Set<unknown>();
  return list.map((entry: Partial<Identifier> | null) => {
    const { type, value } = entry ?? {};
    if (type !== "dns" && type !== "ip") {
      throw violation(400, "unsupportedIdentifier", `no identifiers of type ${JSON.stringify(type)}`);
    }
    const isValid = typeof value === "string" &&
      (type === "dns" ? DNS_NAME.test(value) : canonicalIp(value) === value);
    if (!isValid) throw malformed(`${JSON.stringify(value)} is no valid identifier of type ${type}`);
    if (seen.size === seen.add(value).size) throw malformed(`${value} is in the order twice`);
    return { type, value };
  });
}

const byValue = (identifiers: readonly Identifier[]) =>
  identifiers.map(({ type, value }) => `${type}:${value}`).sort().join();

/** All that the CA has written down. */
export class Book {
  readonly accounts: Account[] = [];
  readonly orders: Order[] = [];
  readonly issued: Issued[] = [];
  readonly validations: Validation[] = [];
  readonly #byUrl = new Map<string, Order | Authorization | Issued>();
  readonly #byCertId = new Map<string, Issued>();
  /** When a limited thing happened, by the CA's clock. */
  readonly #uses = new Map<string, number[]>();
  readonly #validating = new Set<Promise<void>>();

  /** `chains` are the certificates that follow a leaf, one text for each root; `closing` ends validations. */
  constructor(
    readonly switches: Switches,
    readonly issuer: Authority,
    readonly chains: readonly string[],
    readonly now: () => Date,
    /** How every URL begins. */
    readonly origin: string,
    readonly closing: AbortSignal,
  ) {}

  /** Notes that a limited thing happens; throws `rateLimited` if it has happened too often. */
  use(subject: string, { count, windowMs }: Limit): void {
    const now = this.now().getTime();
    const uses = (this.#uses.get(subject) ?? []).filter((at) => at > now - windowMs);
    this.#uses.set(subject, uses);
    if (uses.length < count) return void uses.push(now);
    const seconds = Math.ceil((uses[uses.length - count]! + windowMs - now) / 1000);
    const until = new Date(now + seconds * 1000).toISOString().slice(0, 19).replace("T", " ");
    const detail = `too many ${subject} (${count}), retry after ${until} UTC`;
    throw refusal(429, "rateLimited", detail, {}, { "retry-after": `${seconds}` });
  }

  accountOf({ thumbprint }: SigningKey): Account | undefined {
    return this.accounts.find(({ key }) => key.thumbprint === thumbprint);
  }

  createAccount(key: SigningKey, contact: readonly string[]): Account {
    const url = `${this.origin}/account/${this.accounts.length + 1}`;
    const account: Account = { url, contact, key, authorizations: new Map() };
    this.accounts.push(account);
    return account;
  }

  /** What is at a URL, which must be the account's; the route says of what kind it is. */
  find<Kind extends Order | Authorization | Issued>(url: string, account: Account): Kind {
    const found = this.#byUrl.get(url);
    if (found === undefined) throw violation(404, "malformed", `there is nothing at ${url}`);
    if (found.account !== account) throw violation(403, "unauthorized", `${url} belongs to another account`);
    return found as Kind;
  }

  createOrder(account: Account, wish: Record<string, unknown>): Order {
    const identifiers = readIdentifiers(wish.identifiers);
    if ("notBefore" in wish || "notAfter" in wish) {
      throw malformed("the client cannot choose the validity here");
    }
    const { name: profile, terms } = this.#profile(wish.profile);
    if (identifiers.length > terms.maxNames) throw malformed(`more than ${terms.maxNames} identifiers`);
    this.#checkPolicy(identifiers, terms);
    const replaces = wish.replaces === undefined
      ? undefined
      : this.#checkReplaces(account, identifiers, wish.replaces);
    const { newOrder } = this.switches.limits ?? {};
    // renewals that keep to renewalInfo are exempt, as at Let's Encrypt
    if (newOrder && replaces === undefined) this.use(`new orders of ${account.url}`, newOrder);

    const order: Order = {
      url: `${this.origin}/order/${this.orders.length + 1}`,
      account,
      identifiers,
      authorizations: identifiers.map((identifier) => this.#authorize(account, identifier)),
      expires: new Date(this.now().getTime() + 7 * DAY),
      profile,
      replaces,
      status: "pending",
    };
    this.orders.push(order);
    this.#byUrl.set(order.url, order);
    this.settle(order);
    return order;
  }

  #profile(wanted: unknown): { name?: string; terms: Profile } {
    const profiles = profilesOf(this.switches);
    const name = wanted ?? Object.keys(profiles)[0];
    if (name === undefined) return { terms: NO_PROFILE };
    if (typeof name === "string" && Object.hasOwn(profiles, name)) return { name, terms: profiles[name]! };
    throw violation(400, "invalidProfile", `there is no profile ${JSON.stringify(wanted)}`);
  }

  /** Refuses names as a CA's policy does: every refused name gets its subproblem (RFC 8555 §6.7.1). */
  #checkPolicy(identifiers: readonly Identifier[], { ipAddresses }: Profile): void {
    const subproblems = identifiers.flatMap((identifier) => {
      const reason = identifier.type === "ip" && !ipAddresses
        ? "the profile allows no IP addresses"
        : this.switches.reject?.(identifier.value);
      return reason === undefined
        ? []
        : [refusal(400, "rejectedIdentifier", reason, { identifier }).document];
    });
    if (subproblems.length === 0) return;
    const names = subproblems.map(({ identifier }) => identifier!.value).join(", ");
    const reason = subproblems.length === 1 ? `: ${subproblems[0]!.detail}` : "";
    throw refusal(400, "rejectedIdentifier", `cannot issue for ${names}${reason}`, { subproblems });
  }

  /** RFC 9773 §5: the predecessor is this account's, shares a name, and has no other successor. */
  #checkReplaces(account: Account, identifiers: readonly Identifier[], replaces: unknown): string {
    const predecessor = this.findByCertId(replaces);
    if (predecessor.account !== account) {
      throw violation(403, "unauthorized", "the certificate to be replaced belongs to another account");
    }
    if (!identifiers.some(({ value }) => predecessor.names.includes(value))) {
      throw malformed("the certificate to be replaced shares no identifier with the order");
    }
    for (const order of this.orders.filter((order) => order.replaces === replaces)) {
      this.settle(order);
      if (order.status === "invalid") continue;
      throw refusal(409, "alreadyReplaced", `the certificate is already replaced by ${order.url}`);
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
    const url = `${this.origin}/authz/${this.#byUrl.size + 1}`;
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
      expires: new Date(this.now().getTime() + 7 * DAY),
    };
    account.authorizations.set(value, authorization);
    this.#byUrl.set(url, authorization);
    return authorization;
  }

  #expire(authorization: Authorization): void {
    const isOpen = authorization.status === "pending" || authorization.status === "valid";
    if (isOpen && authorization.expires < this.now()) authorization.status = "expired";
  }

  /**
   * Brings an order's status up to date with its authorizations and the clock (RFC 8555 §7.1.6). It turns invalid only
   * when no validation is under way any more, so that its error names every failure.
   */
  settle(order: Order): void {
    const { status, authorizations } = order;
    if (status === "processing" && performance.now() >= order.doneAt!) this.#issue(order);
    if (status !== "pending" && status !== "ready" || authorizations.some(isUnderWay)) return;
    for (const authorization of authorizations) this.#expire(authorization);
    const failed = authorizations.filter(({ status }) => status === "invalid" || status === "expired");
    if (failed.length > 0 && this.switches.failure !== "authorization") {
      order.status = "invalid";
      order.error = summary(failed);
    } else if (order.expires < this.now()) {
      order.status = "invalid";
      order.error = refusal(403, "malformed", "the order has expired").document;
    } else if (authorizations.every(({ status }) => status === "valid")) {
      order.status = "ready";
    }
  }

  /** Begins the validation that the client asked for; asked again, nothing happens. */
  respond(authorization: Authorization, challenge: Challenge): void {
    this.#expire(authorization);
    if (challenge.status !== "pending") return;
    if (authorization.status !== "pending" || isUnderWay(authorization)) {
      throw malformed(`the authorization is ${authorization.status} and waits for no challenge`);
    }
    if (challenge.type === "tls-alpn-01") throw malformed("tls-alpn-01 is not implemented by the client");
    challenge.status = "processing";
    const done = this.#validate(authorization, challenge).finally(() => this.#validating.delete(done));
    this.#validating.add(done);
  }

  async #validate(authorization: Authorization, challenge: Challenge): Promise<void> {
    const { account, identifier, wildcard } = authorization;
    const { type, token } = challenge;
    const name = wildcard ? `*.${identifier.value}` : identifier.value;
    const { switches, closing } = this;
    const { validationDelayMs, authorizationLifetimeMs = 30 * DAY } = switches;
    try {
      if (validationDelayMs) await delay(validationDelayMs, undefined, { signal: closing });
      const proof = {
        type,
        identifier,
        wildcard,
        token,
        keyAuthorization: `${token}.${account.key.thumbprint}`,
        accountUrl: account.url,
        issuers: issuersOf(switches),
      };
      await validate(proof, switches, closing);
      challenge.status = authorization.status = "valid";
      challenge.validated = this.now();
      challenge.error = undefined;
      authorization.expires = new Date(this.now().getTime() + authorizationLifetimeMs);
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

  /** Resolves when no validation is under way. */
  async idle(): Promise<void> {
    await Promise.all(this.#validating);
  }

  /** RFC 8555 §7.4: takes the CSR (base64url) of an order that is ready. */
  finalize(order: Order, csr: unknown): void {
    this.settle(order);
    if (order.status !== "ready") {
      // repeating a finalize whose answer was lost is no violation
      const refuse = order.csr === csr ? refusal : violation;
      throw refuse(403, "orderNotReady", `the order is ${order.status}`);
    }
    order.request = this.#readCsr(order, csr);
    order.csr = csr as string;
    order.status = "processing";
    order.doneAt = performance.now() + (this.switches.processingMs ?? 0);
    this.settle(order);
  }

  /** Reads a CSR that must ask for exactly the order's names, under an acceptable key. */
  #readCsr(order: Order, csr: unknown): Request {
    const bad = (detail: string) => violation(400, "badCSR", `the CSR ${detail}`);
    const bytes = fromBase64url(csr, "csr");
    let request: Request;
    try {
      request = readRequest(bytes);
    } catch (error) {
      throw bad(`cannot be read: ${(error as Error).message}`);
    }
    const { identifiers, commonNames, publicKey } = request;
    if (byValue(identifiers) !== byValue(order.identifiers)) {
      throw bad(`is for ${byValue(identifiers) || "no names"}, the order for ${byValue(order.identifiers)}`);
    }
    if (
      commonNames.length > 1 || !commonNames.every((name) => identifiers.some(({ value }) => value === name))
    ) {
      throw bad(`has a common name that is none of its names: ${commonNames.join(", ")}`);
    }
    if (this.accountOf(importKey(publicKey.export({ format: "jwk" }))) !== undefined) {
      throw bad("has the key of an account"); // RFC 8555 §11.1
    }
    return request;
  }

  #issue(order: Order): void {
    const { account, identifiers, profile, replaces, request } = order;
    const { commonNames, publicKey } = request!;
    const { terms } = this.#profile(profile);
    // backdated by an hour, as everywhere; both ends belong to the lifetime
    const notBefore = new Date(Math.floor(this.now().getTime() / 1000) * 1000 - HOUR);
    const notAfter = new Date(notBefore.getTime() + terms.lifetimeMs - 1000);
    // every other serial begins with a set bit: its DER form needs the zero octet that a certID must keep
    const serial = newSerial();
    if (this.issued.length % 2 === 0) serial[0]! |= 0x80;
    const commonName = terms.commonName ? commonNames[0] : undefined;
    const leaf = certify({ publicKey, commonName, identifiers, notBefore, notAfter, serial }, this.issuer);

    const hex = serial.toString("hex").toUpperCase();
    const issued: Issued = {
      url: `${this.origin}/certificate/${hex}`,
      account,
      serial: hex,
      certId: `${this.issuer.keyId.toString("base64url")}.${derSerial(serial).toString("base64url")}`,
      names: identifiers.map(({ value }) => value),
      keyType: publicKey.asymmetricKeyType === "rsa" ? "rsa" : "ec",
      profile,
      replaces,
      notBefore,
      notAfter,
      pem: leaf,
      chains: this.chains.map((chain) => leaf + chain),
    };
    this.issued.push(issued);
    this.#byUrl.set(issued.url, issued);
    this.#byCertId.set(issued.certId, issued);
    order.certificate = issued;
    order.status = "valid";
  }

  /** The certificate that a certID names (RFC 9773 §4.1). */
  findByCertId(certId: unknown): Issued {
    const [keyId, serial, ...more] = typeof certId === "string" ? certId.split(".") : [];
    if (!keyId || !serial || more.length > 0) throw malformed(`${JSON.stringify(certId)} is no certID`);
    fromBase64url(keyId, "the key identifier of the certID");
    fromBase64url(serial, "the serial of the certID");
    const issued = this.#byCertId.get(certId as string);
    if (issued !== undefined) return issued;
    // under this CA's key the client wrote the serial wrongly; under another it comes from another CA
    const refuse = this.issuer.keyId.toString("base64url") === keyId ? violation : refusal;
    throw refuse(404, "malformed", `no certificate has the certID ${certId}`);
  }

  /** The window in which to renew: what was set, the past for a revoked certificate, else by its lifetime. */
  renewalWindow({ renewalWindow, revoked, notBefore, notAfter }: Issued): Issued["renewalWindow"] & object {
    if (renewalWindow !== undefined) return renewalWindow;
    if (revoked !== undefined) return { start: new Date(revoked.at.getTime() - HOUR), end: revoked.at };
    // in its middle a third of the lifetime is left, or a half of a short one (Let's Encrypt's advice)
    const lifetime = notAfter.getTime() - notBefore.getTime();
    const middle = notAfter.getTime() - lifetime / (lifetime < 10 * DAY ? 2 : 3);
    return { start: new Date(middle - lifetime / 50), end: new Date(middle + lifetime / 50) };
  }

  /** RFC 8555 §7.6; who may ask is decided before. */
  revoke(issued: Issued, reason: unknown = 0): void {
    // RFC 5280 §5.3.1, without the reasons that only a CA can have
    if (typeof reason !== "number" || ![0, 1, 3, 4, 5].includes(reason)) {
      throw violation(
        400,
        "badRevocationReason",
        `subscribers cannot give the reason ${JSON.stringify(reason)}`,
      );
    }
    if (issued.revoked !== undefined) {
      throw refusal(400, "alreadyRevoked", "the certificate is revoked already");
    }
    issued.revoked = { at: this.now(), reason };
  }
}

/** Whether it is being validated. */
export const isUnderWay = ({ challenges }: Authorization): boolean =>
  challenges.some(({ status }) => status === "processing");

/** The error of an order: the one failure's, or a compound of several (RFC 8555 §6.7.1). */
function summary(failed: readonly Authorization[]): ProblemDocument {
  const subproblems = failed.map(({ challenges, identifier, status }): ProblemDocument => {
    const reason = challenges.find(({ error }) => error !== undefined)?.error ??
      refusal(403, "unauthorized", `the authorization is ${status}`).document;
    return { ...reason, identifier };
  });
  if (subproblems.length === 1) return { ...subproblems[0]!, identifier: undefined };
  const names = subproblems.map(({ identifier }) => identifier!.value).join(", ");
  return refusal(403, "compound", `cannot validate ${names}`, { subproblems }).document;
}
