/**
 * The ACME conversation (RFC 8555): directory, nonces, account, orders, authorizations, challenges, certificates.
 *
 * Speaks to the CA and returns typed values; it knows no files, no configuration and no sentences for people. `jose`,
 * imported here and nowhere else, signs the requests. Nothing that the CA sends is trusted: bodies are bounded, URLs
 * must be https and of a host that the directory names, tokens must be base64url, and every text is stripped of control
 * characters before it goes any further.
 */

import defer * as nodeCrypto from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";
import type { CryptoKey, JWK } from "jose";
import { isIP } from "./names.ts";
import { oneLine } from "./text.ts";

/** RFC 8555 §9.7.7, RFC 8738. */
export interface Identifier {
  readonly type: "dns" | "ip";
  readonly value: string;
}

/** RFC 8555 §6.7, RFC 7807. `type` is without the prefix `urn:ietf:params:acme:error:`. */
export interface Problem {
  readonly type: string;
  readonly detail: string;
  readonly identifier?: string;
  readonly subproblems: readonly Problem[];
}

/** RFC 8555 §7.1.3. */
export interface Order {
  readonly url: string;
  readonly status: "pending" | "ready" | "processing" | "valid" | "invalid";
  readonly identifiers: readonly Identifier[];
  readonly authorizations: readonly string[];
  readonly finalize: string;
  readonly certificate?: string;
  readonly error?: Problem;
}

/** RFC 8555 §7.1.4. `name` is the identifier with `*.` before it where the authorization is for a wildcard. */
export interface Authorization {
  readonly url: string;
  readonly status: "pending" | "valid" | "invalid" | "deactivated" | "expired" | "revoked";
  readonly name: string;
  readonly challenges: readonly Challenge[];
}

/** RFC 8555 §7.1.5, §8. Types without a token, or not known here, have the empty one; only dns-persist-01 names issuers. */
export interface Challenge {
  readonly type: string;
  readonly url: string;
  readonly status: "pending" | "processing" | "valid" | "invalid";
  readonly token: string;
  readonly issuerDomainNames: readonly string[];
  /** Of dns-persist-01: the account that its record has to name, where that is not the account's URL. */
  readonly accountUri?: string;
  readonly error?: Problem;
}

/** RFC 8555 §7.1.1, with RFC 9773's renewalInfo and the profiles of draft-aaron-acme-profiles. */
export interface Directory {
  readonly newNonce: string;
  readonly newAccount: string;
  readonly newOrder: string;
  readonly revokeCert?: string;
  readonly keyChange?: string;
  readonly renewalInfo?: string;
  /** Names of the profiles on offer. */
  readonly profiles: readonly string[];
  readonly externalAccountRequired: boolean;
  /** Names by which CAA records and dns-persist-01 refer to the CA. */
  readonly caaIdentities: readonly string[];
}

/** RFC 9773 §4.2: when the CA would like a certificate to be renewed. */
export interface RenewalInfo {
  readonly start: Date;
  readonly end: Date;
  readonly explanationUrl?: string;
  /** When to ask again; undefined where the CA does not say. */
  readonly retryAfter?: Date;
}

/** Time as it passes here; tests have one that passes faster. */
export interface Clock {
  now(): Date;
  /** Resolves after `ms`, or rejects with the signal's reason. Without it the system's timer is used. */
  sleep?(ms: number, signal?: AbortSignal): Promise<void>;
  /** Ends every wait. */
  readonly signal?: AbortSignal;
}

/** The world as this file needs it; tests hand in their own. The signal ends every request, too. */
export interface Transport extends Clock {
  fetch(url: string, init: RequestInit): Promise<Response>;
  /** Uniform in [0, 1), for jitter. */
  random(): number;
  readonly userAgent: string;
}

/**
 * What the CA refused, an answer that cannot be used, or none at all. `step` and `url` say of what, `problem` what the
 * CA said, `retryAfter` when it wants to be asked again; `passing` that the same request may succeed in a moment;
 * `spent` that an order came to nothing.
 */
export class AcmeError extends Error {
  override readonly name = "AcmeError";
  readonly problem?: Problem;
  readonly retryAfter?: Date;
  readonly passing: boolean;
  readonly spent: boolean;
  constructor(
    readonly step: string,
    message: string,
    readonly url: string,
    evidence: { problem?: Problem; retryAfter?: Date; passing?: boolean; spent?: boolean } = {},
  ) {
    super(message);
    this.problem = evidence.problem;
    this.retryAfter = evidence.retryAfter;
    this.passing = evidence.passing ?? false;
    this.spent = evidence.spent ?? false;
  }
}

/** One answer of the CA may take this long; Let's Encrypt's own gateway gives up after some 30 s. */
const REQUEST_TIMEOUT_MS = 30_000;
/** How often one request is tried where connection, time-out or server (5xx) failed. */
const ATTEMPTS = 4;
/** badNonce comes in bursts and costs nothing but a round trip; Pebble can be told to refuse every second nonce. */
const BAD_NONCE_ATTEMPTS = 30;
/** A shorter Retry-After is waited for; with a longer one the error goes up, for a later run to heed. */
const LONGEST_WAIT_MS = 30_000;
/** The first poll of an order; each next waits three times as long, up to the longest. */
const FIRST_POLL_MS = 20;
const LONGEST_POLL_MS = 5_000;
/** How long an order may be validated or issued; Let's Encrypt needs seconds. */
export const ORDER_DEADLINE_MS = 180_000;
/** A chain of ten RSA-4096 certificates with 100 names is well below; so is every other resource. */
const LARGEST_BODY = 1 << 20;

/** Let's Encrypt has offered two alternate chains at the most. */
const MOST_ALTERNATES = 5;

const ERROR_PREFIX = "urn:ietf:params:acme:error:";
/** RFC 8555 §8: at least 128 bits in base64url; the upper bound keeps it a file name. */
const TOKEN = /^[A-Za-z0-9_-]{22,200}$/;
const TOKEN_TYPES = ["http-01", "dns-01"];

/** An account key (PEM in PKCS#8, PKCS#1 or SEC1; RSA or EC) made ready for signing. */
export interface AccountKey {
  readonly alg: "RS256" | "ES256" | "ES384" | "ES512";
  readonly privateKey: CryptoKey;
  readonly publicJwk: JWK;
  /** RFC 7638, base64url of SHA-256. */
  readonly thumbprint: string;
}

/** Reads an account key; throws where `pem` is none. */
export async function importAccountKey(pem: string): Promise<AccountKey> {
  const key = nodeCrypto.createPrivateKey(pem);
  const algorithms = { prime256v1: "ES256", secp384r1: "ES384", secp521r1: "ES512" } as const;
  const curve = key.asymmetricKeyDetails?.namedCurve as keyof typeof algorithms | undefined;
  const alg = key.asymmetricKeyType === "rsa" ? "RS256" : curve && algorithms[curve];
  if (alg === undefined) throw new Error("neither an RSA nor an EC key");
  const { calculateJwkThumbprint, importPKCS8 } = await import("jose");
  const jwk = key.export({ format: "jwk" }) as JWK;
  const publicJwk: JWK = jwk.kty === "RSA"
    ? { kty: "RSA", n: jwk.n!, e: jwk.e! }
    : { kty: "EC", crv: jwk.crv!, x: jwk.x!, y: jwk.y! };
  return {
    alg,
    privateKey: await importPKCS8(key.export({ type: "pkcs8", format: "pem" }) as string, alg),
    publicJwk,
    thumbprint: await calculateJwkThumbprint(publicJwk),
  };
}

/** RFC 8555 §8.1. */
export function keyAuthorization(token: string, key: AccountKey): string {
  return `${token}.${key.thumbprint}`;
}

/** A name of the configuration as the CA is asked for it. */
export function identifierOf(name: string): Identifier {
  return { type: isIP(name) ? "ip" : "dns", value: name };
}

/** A conversation with one CA under one account key. */
export class AcmeClient {
  readonly #nonces: Nonces;
  readonly #hosts: Set<string>;
  #account: Promise<string> | undefined;
  /** Why the CA keeps the contact that it had. */
  contactRefusal: AcmeError | undefined;
  /** The account that took the place of one that the CA has forgotten. */
  #successor: Promise<string> | undefined;

  private constructor(
    readonly directory: Directory,
    directoryUrl: string,
    readonly key: AccountKey,
    private readonly registration: Registration,
    private readonly transport: Transport,
  ) {
    const urls = [directoryUrl, ...Object.values(directory)].filter(isHttps);
    this.#hosts = new Set(urls.map((url) => new URL(url).host));
    this.#nonces = new Nonces(() => this.#newNonce());
  }

  /** RFC 8555 §7.1.1: one request. */
  static async connect(
    directoryUrl: string,
    key: AccountKey,
    registration: Registration,
    transport: Transport,
  ): Promise<AcmeClient> {
    const step = "read the directory";
    const body = await withRetries(transport, async () => {
      const response = await exchange(step, directoryUrl, { method: "GET" }, transport);
      if (!response.ok) throw refusal(step, directoryUrl, response, transport);
      return jsonObject(step, directoryUrl, response);
    });
    const url = (name: string, needed: boolean) => {
      const value = body[name];
      if (value === undefined && !needed) return undefined;
      if (isHttps(value)) return value;
      throw new AcmeError(step, `not an ACME directory: no usable URL for ${name}`, directoryUrl);
    };
    const directory: Directory = {
      newNonce: url("newNonce", true)!,
      newAccount: url("newAccount", true)!,
      newOrder: url("newOrder", true)!,
      revokeCert: url("revokeCert", false),
      keyChange: url("keyChange", false),
      renewalInfo: url("renewalInfo", false),
      ...metadata(body.meta),
    };
    return new AcmeClient(directory, directoryUrl, key, registration, transport);
  }

  /** How many requests may be under way at once, one to begin with; at most as many nonces are asked for. */
  set concurrency(most: number) {
    this.#nonces.most = most;
  }

  /**
   * The account's URL: the remembered one, or that of newAccount (RFC 8555 §7.3), asked for once. A remembered account
   * whose contact is not the configured one any more is updated (§7.3.2).
   */
  account(): Promise<string> {
    return this.#account ??= this.#rememberedAccount();
  }

  async #rememberedAccount(): Promise<string> {
    const { known, contact } = this.registration;
    if (known === undefined) return await this.#newAccount();
    if (known.contact.join() === contact.join()) return known.url;
    try {
      await this.#post("update the account", known.url, { contact }, { kid: known.url });
    } catch (error) {
      const type = error instanceof AcmeError ? error.problem?.type : undefined;
      if (type === "accountDoesNotExist") return await this.#newAccount();
      if (type !== "invalidContact" && type !== "unsupportedContact") throw error;
      this.contactRefusal = error as AcmeError; // no reason to let certificates expire
    }
    return known.url;
  }

  async #newAccount(): Promise<string> {
    const step = "register the account";
    const { newAccount, externalAccountRequired } = this.directory;
    const { contact, eab } = this.registration;
    if (externalAccountRequired && eab === undefined) {
      throw new AcmeError(step, "the CA wants an external account: set eabKeyId and eabHmacKey", newAccount);
    }
    const response = await this.#post(step, newAccount, {
      termsOfServiceAgreed: true,
      ...(contact.length > 0 && { contact }),
      ...(eab !== undefined &&
        { externalAccountBinding: await bindExternalAccount(eab, this.key, newAccount) }),
    }, "jwk");
    return this.#location(step, newAccount, response);
  }

  /** The URL of the account that this key has at the CA, without making one (RFC 8555 §7.3.1). */
  async findAccount(): Promise<string | undefined> {
    const step = "look for the account";
    const { newAccount } = this.directory;
    try {
      const response = await this.#post(step, newAccount, { onlyReturnExisting: true }, "jwk");
      return this.#location(step, newAccount, response);
    } catch (error) {
      if (error instanceof AcmeError && error.problem?.type === "accountDoesNotExist") return undefined;
      throw error;
    }
  }

  /** RFC 8555 §7.3.5: gives the account another key. The client goes on to sign with the old one. */
  async changeKey(newKey: AccountKey): Promise<void> {
    const step = "change the account key";
    const url = this.directory.keyChange;
    if (url === undefined) throw new AcmeError(step, "the CA does not offer it", "");
    const payload = { account: await this.account(), oldKey: this.key.publicJwk };
    await this.#post(step, url, await sign(newKey, payload, { alg: newKey.alg, jwk: newKey.publicJwk, url }));
  }

  /**
   * RFC 8555 §7.4. The order comes back `pending`, or `ready` where every name is already proven. `profile` must be
   * one that the directory lists. `replaces` (RFC 9773 §5) is a hint: a CA that does not like it gets the same order
   * without it.
   */
  async newOrder(
    names: readonly string[],
    { profile, replaces }: { profile?: string; replaces?: string } = {},
  ): Promise<Order> {
    const step = "create an order";
    const { newOrder, profiles } = this.directory;
    if (profile !== undefined && !profiles.includes(profile)) {
      const offered = profiles.length === 0 ? "none" : profiles.join(", ");
      throw new AcmeError(
        step,
        `the CA has no profile ${JSON.stringify(profile)}; it offers: ${offered}`,
        newOrder,
      );
    }
    const payload = { identifiers: names.map(identifierOf), ...(profile !== undefined && { profile }) };
    let response: Answer;
    try {
      response = await this.#post(step, newOrder, {
        ...payload,
        ...(replaces !== undefined && { replaces }),
      });
    } catch (error) {
      // which of the two it refused cannot be told from the type; a limit is a limit with and without
      const refused = error instanceof AcmeError && error.problem !== undefined &&
        error.problem.type !== "rateLimited";
      if (replaces === undefined || !refused) throw error;
      response = await this.#post(step, newOrder, payload);
    }
    return this.#order(step, this.#location(step, newOrder, response), response);
  }

  /** RFC 9773 §4.1: what the CA says of the renewal of a certificate (by `certificateId` of x509.ts). Not signed. */
  async renewalInfo(certificateId: string): Promise<RenewalInfo> {
    const step = "ask when to renew";
    const url = `${this.directory.renewalInfo}/${certificateId}`;
    return await withRetries(this.transport, async () => {
      const response = await exchange(step, url, { method: "GET" }, this.transport);
      if (!response.ok) throw refusal(step, url, response, this.transport);
      const body = jsonObject(step, url, response);
      const { start, end } = (body.suggestedWindow ?? {}) as Record<string, unknown>;
      const window = { start: instant(start), end: instant(end) };
      if (window.start === undefined || window.end === undefined) {
        throw new AcmeError(step, "no renewal window in the answer", url);
      }
      if (window.start >= window.end) {
        throw new AcmeError(step, "the renewal window ends before it starts", url);
      }
      const explanationUrl = isHttps(body.explanationURL) ? oneLine(body.explanationURL) : undefined;
      return {
        start: window.start,
        end: window.end,
        explanationUrl,
        retryAfter: parseRetryAfter(response.headers, this.transport.now()),
      };
    });
  }

  /** RFC 8555 §7.5. */
  async getAuthorization(url: string): Promise<Authorization> {
    const step = "read an authorization";
    return this.#authorization(step, url, await this.#postAsGet(step, url));
  }

  /** RFC 8555 §7.5.1: tells the CA that a challenge of this authorization can be checked now. */
  async respondToChallenge(authorization: Authorization, challenge: Challenge): Promise<void> {
    const step = "answer a challenge";
    try {
      jsonObject(step, challenge.url, await this.#post(step, challenge.url, {}));
    } catch (error) {
      // as in finalizeOrder: the second try of a request that had arrived meets a challenge under way
      if (!(error instanceof AcmeError) || error.problem?.type !== "malformed") throw error;
      const { status, challenges } = await this.getAuthorization(authorization.url);
      const untouched = challenges.some(({ url, status }) => url === challenge.url && status === "pending");
      if (status !== "valid" && untouched) throw error;
    }
  }

  /** Polls a `pending` order until it is something else (RFC 8555 §7.1.6, §7.5.1). */
  awaitValidation(order: Order): Promise<Order> {
    return this.#poll("validate", order, "pending");
  }

  /** RFC 8555 §7.4, finalize: hands in the CSR of a `ready` order and polls until the CA has issued or refused. */
  async finalizeOrder(order: Order, csr: Uint8Array): Promise<Order> {
    const step = "finalize the order";
    let finalized: Order;
    let retryAfter: Date | undefined;
    try {
      const response = await this.#post(step, order.finalize, { csr: base64url(csr) });
      retryAfter = parseRetryAfter(response.headers, this.transport.now());
      finalized = this.#order(step, order.url, response);
    } catch (error) {
      // an answer lost on its way makes the second try meet an order that is no longer ready, which is no failure
      if (!(error instanceof AcmeError) || error.problem?.type !== "orderNotReady") throw error;
      finalized = await this.#getOrder(step, order.url);
      if (finalized.status === "ready") throw error;
    }
    if (finalized.status !== "processing") return finalized;
    return await this.#poll("issue", finalized, "processing", retryAfter);
  }

  /**
   * RFC 8555 §7.4.2: the chains of a `valid` order, PEM, leaf first: the default one, then the alternates, each fetched
   * when it is asked for.
   */
  async *downloadChains(order: Order): AsyncGenerator<string> {
    const step = "download the certificate";
    if (order.certificate === undefined) {
      throw new AcmeError(step, "the order names no certificate", order.url);
    }
    const urls = [order.certificate];
    for (const url of urls) {
      const response = await this.#postAsGet(
        step,
        this.#checkUrl(step, url),
        "application/pem-certificate-chain",
      );
      if (mediaType(response) !== "application/pem-certificate-chain") {
        throw new AcmeError(step, `not a certificate but ${mediaType(response)}`, url);
      }
      if (urls.length === 1) urls.push(...alternates(response, url).slice(0, MOST_ALTERNATES));
      yield response.text;
    }
  }

  /** RFC 8555 §7.6, signed by the account. `reason` is a CRLReason (RFC 5280 §5.3.1). Revoked before counts as done. */
  async revokeCertificate(der: Uint8Array, reason: number): Promise<void> {
    const step = "revoke the certificate";
    const url = this.directory.revokeCert;
    if (url === undefined) throw new AcmeError(step, "the CA does not offer revocation", "");
    try {
      await this.#post(step, url, { certificate: base64url(der), reason });
    } catch (error) {
      if (!(error instanceof AcmeError) || error.problem?.type !== "alreadyRevoked") throw error;
    }
  }

  async #getOrder(step: string, url: string): Promise<Order> {
    return this.#order(step, url, await this.#postAsGet(step, url));
  }

  /** Asks for an order until it has left `status`, first at `retryAfter` where the CA has said so. */
  async #poll(what: string, order: Order, status: Order["status"], retryAfter?: Date): Promise<Order> {
    const { transport } = this;
    const deadline = transport.now().getTime() + ORDER_DEADLINE_MS;
    const step = `${what} the order`;
    let current = order;
    for (let next = FIRST_POLL_MS; current.status === status; next = Math.min(next * 3, LONGEST_POLL_MS)) {
      const now = transport.now().getTime();
      const wait = retryAfter === undefined ? jittered(next, transport) : retryAfter.getTime() - now;
      if (now + wait > deadline) {
        const text = `still ${status}, and lematt waits no longer than ${ORDER_DEADLINE_MS / 1000} s`;
        throw new AcmeError(step, text, order.url, { retryAfter, spent: true });
      }
      await pause(wait, transport);
      const response = await this.#postAsGet(step, order.url);
      retryAfter = parseRetryAfter(response.headers, transport.now());
      current = this.#order(step, order.url, response);
    }
    return current;
  }

  /** RFC 8555 §6.3: an empty payload, which is not the empty object. */
  #postAsGet(step: string, url: string, accept?: string): Promise<Answer> {
    return this.#post(step, url, undefined, "kid", accept);
  }

  /**
   * RFC 8555 §6.2: one signed request, with a fresh nonce for every try. `signer` is the account (of this client, or
   * a certain one) or the bare key. Throws AcmeError for whatever is not 2xx.
   */
  async #post(
    step: string,
    url: string,
    payload: object | undefined,
    signer: "kid" | { readonly kid: string } | "jwk" = "kid",
    accept?: string,
  ): Promise<Answer> {
    const { transport, key } = this;
    this.#checkUrl(step, url);
    let badNonces = 0;
    let registeredAnew = false;
    return await withRetries(transport, async () => {
      for (;;) {
        const account = signer === "kid" ? await this.account() : undefined;
        const response = await this.#nonces.use(async (nonce) => {
          const by = signer === "kid" ? { kid: account } : signer === "jwk" ? { jwk: key.publicJwk } : signer;
          const body = await sign(key, payload, { alg: key.alg, nonce, url, ...by });
          return await exchange(step, url, {
            method: "POST",
            headers: { "content-type": "application/jose+json", ...(accept && { accept }) },
            body: JSON.stringify(body),
          }, transport);
        });
        if (response.ok) return response;
        const error = refusal(step, url, response, transport);
        if (error.problem?.type === "badNonce" && ++badNonces < BAD_NONCE_ATTEMPTS) continue;
        // a remembered account that the CA no longer knows: register, once, and go on
        const forgotten = error.problem?.type === "accountDoesNotExist" && account !== undefined &&
          account === this.registration.known?.url;
        if (forgotten && !registeredAnew) {
          registeredAnew = true;
          this.#account = Promise.resolve(await (this.#successor ??= this.#newAccount()));
          continue;
        }
        throw error;
      }
    });
  }

  /** RFC 8555 §7.2, where no earlier answer left a nonce. */
  async #newNonce(): Promise<string> {
    const step = "get a nonce";
    const url = this.directory.newNonce;
    const response = await exchange(step, url, { method: "HEAD" }, this.transport);
    if (!response.ok) throw refusal(step, url, response, this.transport);
    const nonce = nonceOf(response);
    if (nonce === undefined) throw new AcmeError(step, "no nonce in the answer", url);
    return nonce;
  }

  #checkUrl(step: string, url: unknown): string {
    if (isHttps(url) && this.#hosts.has(new URL(url).host)) return url;
    throw new AcmeError(step, `the CA named an unusable URL ${JSON.stringify(words(url))}`, "");
  }

  #location(step: string, url: string, response: Answer): string {
    jsonObject(step, url, response); // or it is no answer of the CA at all
    const location = response.headers.get("location");
    if (location === null) throw new AcmeError(step, "the answer has no Location", url);
    return this.#checkUrl(step, location);
  }

  #order(step: string, url: string, response: Answer): Order {
    const body = jsonObject(step, url, response);
    const { authorizations } = body;
    const status = oneOf(["pending", "ready", "processing", "valid", "invalid"] as const, body.status);
    if (status === undefined || !Array.isArray(authorizations)) {
      throw new AcmeError(step, "not an order", url);
    }
    return {
      url,
      status,
      identifiers: (Array.isArray(body.identifiers) ? body.identifiers : []).map((entry) => ({
        type: entry?.type === "ip" ? "ip" : "dns",
        value: words(entry?.value),
      })),
      authorizations: authorizations.map((entry) => this.#checkUrl(step, entry)),
      finalize: this.#checkUrl(step, body.finalize),
      certificate: body.certificate === undefined ? undefined : this.#checkUrl(step, body.certificate),
      error: problemOf(body.error),
    };
  }

  #authorization(step: string, url: string, response: Answer): Authorization {
    const body = jsonObject(step, url, response);
    const identifier = body.identifier as { value?: unknown } | undefined;
    const status = oneOf(
      ["pending", "valid", "invalid", "deactivated", "expired", "revoked"] as const,
      body.status,
    );
    if (status === undefined || typeof identifier?.value !== "string" || !Array.isArray(body.challenges)) {
      throw new AcmeError(step, "not an authorization", url);
    }
    return {
      url,
      status,
      name: (body.wildcard === true ? "*." : "") + oneLine(identifier.value).toLowerCase(),
      challenges: body.challenges.map((entry) => ({
        type: words(entry?.type),
        url: this.#checkUrl(step, entry?.url),
        status: oneOf(["pending", "processing", "valid", "invalid"] as const, entry?.status) ?? "invalid",
        token: TOKEN_TYPES.includes(entry?.type) ? checkToken(step, url, entry.token) : "",
        issuerDomainNames: texts(entry?.["issuer-domain-names"]),
        accountUri: isHttps(entry?.accounturi) ? entry.accounturi : undefined,
        error: problemOf(entry?.error),
      })),
    };
  }
}

/** How the account is registered, and what is remembered where that was done before. */
export interface Registration {
  readonly known?: { readonly url: string; readonly contact: readonly string[] };
  /** External account binding (RFC 8555 §7.3.4). */
  readonly eab?: { readonly keyId: string; readonly hmacKey: Uint8Array };
  /** mailto: URLs. */
  readonly contact: readonly string[];
}

/**
 * The nonces in circulation (RFC 8555 §6.5): each answer brings the one for the next request, so that new ones are asked
 * for only until there are as many as requests may be under way.
 */
class Nonces {
  readonly #free: string[] = [];
  readonly #waiting: ((nonce: string | undefined) => void)[] = [];
  #circulating = 0;

  /** How many there may be. */
  most = 1;

  constructor(private readonly newNonce: () => Promise<string>) {}

  /** Makes a request with a nonce, and keeps the one that its answer brings. */
  async use(request: (nonce: string) => Promise<Answer>): Promise<Answer> {
    let next: string | undefined;
    try {
      const response = await request(await this.#take());
      next = nonceOf(response);
      return response;
    } finally {
      const waiting = this.#waiting.shift();
      if (waiting !== undefined) waiting(next);
      else if (next !== undefined) this.#free.push(next);
      else this.#circulating--;
    }
  }

  async #take(): Promise<string> {
    const free = this.#free.pop();
    if (free !== undefined) return free;
    if (this.#circulating >= this.most) {
      const passedOn = await new Promise<string | undefined>((resolve) => this.#waiting.push(resolve));
      return passedOn ?? await this.newNonce(); // the other's was lost: ask for one in its stead
    }
    this.#circulating++;
    return await this.newNonce();
  }
}

function nonceOf(response: Answer): string | undefined {
  const nonce = response.headers.get("replay-nonce") ?? "";
  return /^[A-Za-z0-9_-]{1,1000}$/.test(nonce) ? nonce : undefined;
}

/** An HTTP response whose body has been read whole. */
interface Answer {
  readonly ok: boolean;
  readonly status: number;
  readonly headers: Headers;
  readonly text: string;
}

async function exchange(step: string, url: string, init: RequestInit, transport: Transport): Promise<Answer> {
  const signals = [AbortSignal.timeout(REQUEST_TIMEOUT_MS), ...(transport.signal ? [transport.signal] : [])];
  try {
    const response = await transport.fetch(url, {
      ...init,
      redirect: "manual",
      signal: AbortSignal.any(signals),
      headers: { "user-agent": transport.userAgent, ...init.headers as Record<string, string> },
    });
    return {
      ok: response.ok,
      status: response.status,
      headers: response.headers,
      text: await boundedText(step, url, response),
    };
  } catch (cause) {
    if (cause instanceof AcmeError) throw cause;
    transport.signal?.throwIfAborted();
    const reason = cause instanceof DOMException && cause.name === "TimeoutError"
      ? `no answer within ${REQUEST_TIMEOUT_MS / 1000} s`
      : oneLine(innermost(cause).message);
    throw new AcmeError(step, reason, url, { passing: true });
  }
}

/** fetch() says "fetch failed", and why in the cause. */
function innermost(error: unknown): Error {
  if (!(error instanceof Error)) return new Error(String(error));
  return error.cause === undefined ? error : innermost(error.cause);
}

async function boundedText(step: string, url: string, response: Response): Promise<string> {
  const chunks: Uint8Array[] = [];
  let size = 0;
  for await (const chunk of response.body ?? []) {
    size += chunk.length;
    if (size > LARGEST_BODY) {
      throw new AcmeError(step, `an answer of more than ${LARGEST_BODY} bytes`, url);
    }
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

/**
 * Tries again, with growing pauses or when the CA says, what may pass; what the CA refused on purpose goes up. A limit on
 * requests a second lets through but a few of many lines each time, so being told when to come back is no failed try.
 */
async function withRetries<T>(transport: Transport, attempt: () => Promise<T>): Promise<T> {
  const deadline = transport.now().getTime() + ORDER_DEADLINE_MS;
  for (let failures = 0;;) {
    try {
      return await attempt();
    } catch (error) {
      if (!(error instanceof AcmeError) || !error.passing) throw error;
      const now = transport.now().getTime();
      const limited = error.problem?.type === "rateLimited" && error.retryAfter !== undefined;
      if (limited ? now > deadline : ++failures === ATTEMPTS) throw error;
      const wait = error.retryAfter === undefined
        ? jittered(500 * 3 ** (failures - 1), transport)
        : error.retryAfter.getTime() - now;
      if (wait > LONGEST_WAIT_MS) throw error;
      await pause(wait, transport);
    }
  }
}

function refusal(step: string, url: string, response: Answer, transport: Transport): AcmeError {
  const { status } = response;
  let problem: Problem | undefined;
  const type = mediaType(response);
  if (["application/problem+json", "application/json"].includes(type)) {
    problem = problemOf(parseJson(response.text));
    // some CAs send problems under the wrong type; other JSON says nothing that could be shown
    if (type === "application/json" && !problem?.detail && problem?.type === "about:blank") {
      problem = undefined;
    }
  }
  if (status === 429) problem ??= { type: "rateLimited", detail: "too many requests", subproblems: [] };
  const message = problem === undefined ? `HTTP status ${status} (${type})` : describe(problem);
  const retryAfter = parseRetryAfter(response.headers, transport.now());
  // a limit is worth waiting for only where the CA says how long
  const passing = status >= 500 || (problem?.type === "rateLimited" && retryAfter !== undefined);
  return new AcmeError(step, message, url, { problem, retryAfter, passing });
}

/** A problem in a sentence, its subproblems behind it. */
export function describe(problem: Problem): string {
  const about = problem.identifier === undefined ? "" : `${problem.identifier}: `;
  const own = `${about}${problem.detail || "no detail"} (${problem.type})`;
  return [own, ...problem.subproblems.map(describe)].join("; ");
}

/**
 * Whether a rate limit is about these names rather than about all that the account asks for. The type of the problem
 * does not tell, so its identifiers do, or the names in its detail, or the chapter of Let's Encrypt's documentation
 * that it refers to (https://letsencrypt.org/docs/rate-limits/).
 */
export function limitsNames(problem: Problem, names: readonly string[]): boolean {
  const about = [problem, ...problem.subproblems];
  if (about.some(({ identifier }) => identifier !== undefined)) return true;
  return about.some(({ detail }) =>
    /#(new-certificates-per|authorization-failures-per|consecutive-authorization-failures-per)-/.test(
      detail,
    ) ||
    names.some((name) => detail.includes(name))
  );
}

function problemOf(value: unknown, isSubproblem = false): Problem | undefined {
  if (typeof value !== "object" || value === null) return undefined;
  const { type, detail, identifier, subproblems } = value as Record<string, unknown>;
  const named = (identifier as { value?: unknown } | null | undefined)?.value;
  // one level, and at most one for each name (RFC 8555 §6.7.1)
  const listed = isSubproblem || !Array.isArray(subproblems) ? [] : subproblems.slice(0, 100);
  return {
    type: words(type ?? "about:blank").replace(ERROR_PREFIX, "").trim(),
    detail: words(detail ?? ""),
    identifier: named === undefined ? undefined : words(named),
    subproblems: listed.map((each) => problemOf(each, true)).filter((each) => each !== undefined),
  };
}

/**
 * The moment of a Retry-After header, in seconds or as an HTTP date (RFC 9110 §10.2.3): at least one second and at most
 * a day from `now`, since neither a date in the past nor a century is meant. Undefined without a usable header.
 */
export function parseRetryAfter(headers: Headers, now: Date): Date | undefined {
  const value = headers.get("retry-after")?.trim();
  if (!value) return undefined;
  // a date begins with its weekday; Date.parse alone would find one in "-5"
  const date = /^[a-z]{3}/i.test(value) ? Date.parse(value) : NaN;
  const at = /^\d+$/.test(value) ? now.getTime() + Number(value) * 1000 : date;
  if (Number.isNaN(at)) return undefined;
  return new Date(Math.min(Math.max(at, now.getTime() + 1000), now.getTime() + 86_400_000));
}

/** A moment in JSON (RFC 3339); undefined where it is none, which Date.parse alone is too good-natured to tell. */
function instant(value: unknown): Date | undefined {
  const date = new Date(typeof value === "string" && /^\d{4}-\d\d-\d\d[Tt ]/.test(value) ? value : NaN);
  return Number.isNaN(date.getTime()) ? undefined : date;
}

/** The `meta` of a directory (RFC 8555 §7.1.1), as far as it is used here. */
function metadata(meta: unknown): Pick<Directory, "profiles" | "externalAccountRequired" | "caaIdentities"> {
  const { profiles, externalAccountRequired, caaIdentities } = (meta ?? {}) as Record<string, unknown>;
  return {
    profiles: typeof profiles === "object" && profiles !== null ? Object.keys(profiles).map(oneLine) : [],
    externalAccountRequired: externalAccountRequired === true,
    caaIdentities: texts(caaIdentities),
  };
}

/** What stands where a text belongs, made harmless. String() would throw at `{"toString": 1}`. */
function words(value: unknown): string {
  return oneLine(typeof value === "string" ? value : JSON.stringify(value) ?? "");
}

/** The texts of a list, made harmless. */
function texts(value: unknown): string[] {
  return Array.isArray(value) ? value.filter((entry) => typeof entry === "string").map(oneLine) : [];
}

/** URLs of Link headers with rel="alternate" (RFC 8288). */
function alternates(response: Answer, base: string): string[] {
  return [...(response.headers.get("link") ?? "").matchAll(/<([^>]*)>([^,<]*)/g)]
    .filter(([, , parameters]) => /;\s*rel="?alternate"?/.test(parameters!))
    .map(([, url]) => URL.canParse(url!, base) ? new URL(url!, base).href : url!);
}

/** RFC 8555 §7.3.4: the account's public key, signed with the key that the CA gave out. */
async function bindExternalAccount(
  eab: NonNullable<Registration["eab"]>,
  key: AccountKey,
  url: string,
): Promise<object> {
  const { FlattenedSign } = await import("jose");
  return await new FlattenedSign(new TextEncoder().encode(JSON.stringify(key.publicJwk)))
    .setProtectedHeader({ alg: "HS256", kid: eab.keyId, url }).sign(eab.hmacKey);
}

function jsonObject(step: string, url: string, response: Answer): Record<string, unknown> {
  const type = mediaType(response);
  if (type !== "application/json") throw new AcmeError(step, `not JSON but ${type}`, url);
  const value = parseJson(response.text);
  if (typeof value === "object" && value !== null) return value as Record<string, unknown>;
  throw new AcmeError(step, value === undefined ? "broken JSON" : "not a JSON object", url);
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function mediaType(response: Answer): string {
  return oneLine(
    response.headers.get("content-type")?.split(";")[0]?.trim().toLowerCase() || "no content type",
  );
}

function checkToken(step: string, url: string, token: unknown): string {
  if (typeof token === "string" && TOKEN.test(token)) return token;
  throw new AcmeError(step, "the CA sent a token that is not base64url", url);
}

/** An https URL as it can stand in a request and in a message: printable ASCII, bounded, no credentials. */
function isHttps(value: unknown): value is string {
  return typeof value === "string" && value.length < 2000 && URL.canParse(value) &&
    /^https:\/\/[\w.:[\]-]+(?:[/?#][\x21-\x7e]*)?$/.test(value);
}

function oneOf<const T>(allowed: readonly T[], value: unknown): T | undefined {
  return allowed.find((entry) => entry === value);
}

function base64url(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString("base64url");
}

/** RFC 8555 §6.2: flattened JSON serialization; `undefined` is the empty payload. */
async function sign(key: AccountKey, payload: object | undefined, header: Record<string, unknown>) {
  const { FlattenedSign } = await import("jose");
  const bytes = new TextEncoder().encode(payload === undefined ? "" : JSON.stringify(payload));
  return await new FlattenedSign(bytes).setProtectedHeader(header as { alg: string }).sign(key.privateKey);
}

function jittered(ms: number, transport: Transport): number {
  return ms * (0.75 + transport.random() / 2);
}

/** Waits for `ms`. Throws the signal's reason where that aborts. */
export function pause(ms: number, { sleep = systemSleep, signal }: Clock): Promise<void> {
  return sleep(ms, signal);
}

async function systemSleep(ms: number, signal?: AbortSignal): Promise<void> {
  await delay(ms, undefined, { signal }).catch(() => signal?.throwIfAborted());
}
