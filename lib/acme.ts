/**
 * The resources of a CA: directory, account, order, authorization, challenge, certificate (RFC 8555 §7.1), renewal
 * information (RFC 9773), profiles (draft-ietf-acme-profiles).
 *
 * One method for each request, from typed values to typed values; order.ts decides their order. Each answer is checked:
 * known states, tokens in base64url, URLs of the CA, bounded lists.
 */

import {
  type AccountKey,
  AcmeError,
  type Answer,
  harmless,
  isHttps,
  isProblem,
  jsonObject,
  LAG_ATTEMPTS,
  linksOf,
  mediaType,
  parseRetryAfter,
  type Problem,
  problemOf,
  Session,
  sign,
  type Signer,
} from "./http.ts";
import type { Context } from "./context.ts";
import { isIP, oneLine } from "./names.ts";

/** An account with its key. `isNew`: registered by this run. */
export interface Account extends Signer {
  readonly url: string;
}

/** RFC 8555 §7.1.3. */
export interface Order {
  readonly url: string;
  readonly status: "pending" | "ready" | "processing" | "valid" | "invalid";
  readonly authorizations: readonly string[];
  readonly finalize: string;
  readonly certificate?: string;
  readonly error?: Problem;
  /** When the CA wants to be asked for it again. */
  readonly retryAfter?: Date;
}

/** RFC 8555 §7.1.4. `name` is the identifier with `*.` before it if the authorization is for a wildcard. */
export interface Authorization {
  readonly url: string;
  readonly status: "pending" | "valid" | "invalid" | "deactivated" | "expired" | "revoked";
  readonly name: string;
  readonly challenges: readonly Challenge[];
}

/** RFC 8555 §7.1.5, §8. `token` is empty for types that have none, or are not known here. */
export interface Challenge {
  readonly type: string;
  readonly url: string;
  readonly status: "pending" | "processing" | "valid" | "invalid";
  readonly token: string;
  /** Only of dns-persist-01: names of the CA in records, and the account that they must name. */
  readonly issuerDomainNames: readonly string[];
  readonly accountUri?: string;
  readonly error?: Problem;
}

/** RFC 8555 §7.1.1, with RFC 9773's renewalInfo and profiles. */
export interface Directory {
  readonly newNonce: string;
  readonly newAccount: string;
  readonly newOrder: string;
  readonly revokeCert?: string;
  readonly keyChange?: string;
  readonly renewalInfo?: string;
  /** Names of the profiles. */
  readonly profiles: readonly string[];
  readonly externalAccountRequired: boolean;
  /** Names of the CA in CAA records and dns-persist-01. */
  readonly caaIdentities: readonly string[];
}

/** RFC 9773 §4.2: when the CA would like a certificate to be renewed. */
export interface RenewalInfo {
  readonly start: Date;
  readonly end: Date;
  readonly explanationUrl?: string;
  /** When to ask again, if the CA sends that. */
  readonly retryAfter?: Date;
}

/** What an account is registered with. */
interface Registration {
  /** mailto: URLs. */
  readonly contact: readonly string[];
  /** External account binding (RFC 8555 §7.3.4). */
  readonly eab?: { readonly keyId: string; readonly hmacKey: Uint8Array };
}

/** The pause before the first poll of an order; each next one is three times as long, up to the longest. */
const FIRST_POLL_MS = 20;
const LONGEST_POLL_MS = 5_000;
/** Let's Encrypt has offered two alternate chains at the most, four profiles, four challenges, one CAA identity. */
const MOST_ALTERNATES = 5;
const MOST_LISTED = 20;

/** RFC 8555 §8: at least 128 bits in base64url; the upper bound keeps it a file name. */
const TOKEN = /^[A-Za-z0-9_-]{22,200}$/;
const TOKEN_TYPES = ["http-01", "dns-01"];

/** RFC 8555 §8.1. */
export function keyAuthorization(token: string, key: AccountKey): string {
  return `${token}.${key.thumbprint}`;
}

/** RFC 8555 §9.7.7, RFC 8738. */
function identifierOf(name: string): { type: "dns" | "ip"; value: string } {
  return { type: isIP(name) ? "ip" : "dns", value: name };
}

/** The client of one CA, for one account. */
export class AcmeClient {
  /** Signs requests; set before the first that needs it. */
  account!: Account;

  private constructor(private readonly session: Session, readonly directory: Directory) {}

  /** Reads the directory (RFC 8555 §7.1.1). `hurry`: nothing depends on it, so there is only one attempt. */
  static async connect(
    directoryUrl: string,
    context: Context,
    parallel: number,
    { hurry = false } = {},
  ): Promise<AcmeClient> {
    const step = `read the directory ${directoryUrl}`;
    const session = new Session(context, parallel);
    const body = jsonObject(step, directoryUrl, await session.get(step, directoryUrl, { hurry }));
    const url = (name: string, needed: boolean) => {
      const value = body[name];
      if (value === undefined && !needed) return undefined;
      if (isHttps(value)) return value;
      throw new AcmeError(step, `not an ACME directory: no usable URL for ${name}`, directoryUrl);
    };
    const urls = {
      newNonce: url("newNonce", true)!,
      newAccount: url("newAccount", true)!,
      newOrder: url("newOrder", true)!,
      revokeCert: url("revokeCert", false),
      keyChange: url("keyChange", false),
      renewalInfo: url("renewalInfo", false),
    };
    session.use(urls.newNonce, [directoryUrl, ...Object.values(urls).filter((url) => url !== undefined)]);
    return new AcmeClient(session, { ...urls, ...metadata(body.meta) });
  }

  /** See Session. */
  get aheadMs(): number {
    return this.session.aheadMs;
  }

  /** RFC 8555 §7.3: registers the key, or finds its account. */
  async newAccount(key: AccountKey, { contact, eab }: Registration): Promise<Account> {
    const step = "register the account";
    const { newAccount, externalAccountRequired } = this.directory;
    if (externalAccountRequired && eab === undefined) {
      throw new AcmeError(
        step,
        "the CA requires external account binding: set eabKeyId and eabHmacKey",
        newAccount,
      );
    }
    const answer = await this.session.post(step, newAccount, {
      termsOfServiceAgreed: true,
      ...(contact.length > 0 && { contact }),
      ...(eab !== undefined && { // RFC 8555 §7.3.4
        externalAccountBinding: await sign({ alg: "HS256", privateKey: eab.hmacKey }, key.publicJwk, {
          kid: eab.keyId,
          url: newAccount,
        }),
      }),
    }, { key });
    return { key, url: this.#location(step, newAccount, answer), isNew: true };
  }

  /** The account of a key, if it has one (RFC 8555 §7.3.1). */
  async findAccount(key: AccountKey): Promise<Account | undefined> {
    const step = "find the account";
    const { newAccount } = this.directory;
    try {
      const answer = await this.session.post(step, newAccount, { onlyReturnExisting: true }, { key });
      return { key, url: this.#location(step, newAccount, answer) };
    } catch (error) {
      if (isProblem(error, "accountDoesNotExist")) return undefined;
      throw error;
    }
  }

  /** RFC 8555 §7.3.2. */
  async updateContact(contact: readonly string[]): Promise<void> {
    await this.session.post("update the account", this.account.url, { contact }, this.account);
  }

  /** RFC 8555 §7.3.5: gives the account another key, which signs from then on. */
  async changeKey(key: AccountKey): Promise<void> {
    const step = "change the account key";
    const { keyChange: url } = this.directory;
    const unsupported = "the CA does not offer it";
    if (url === undefined) throw new AcmeError(step, unsupported, "");
    const { url: account, key: { publicJwk: oldKey } } = this.account;
    const inner = await sign(key, { account, oldKey }, { jwk: key.publicJwk, url });
    try {
      await this.session.post(step, url, inner, this.account);
    } catch (error) {
      const isUnsupported = error instanceof AcmeError && error.status === 501; // step-ca, Caddy
      throw isUnsupported ? new AcmeError(step, unsupported, url) : error;
    }
    this.account = { key, url: account, isNew: true };
  }

  /**
   * RFC 8555 §7.4. The new order is `pending`, or `ready` if all names are authorized already. `profile` must be in the
   * directory. If the CA refuses an order with `replaces` (RFC 9773 §5), it gets the same order without it.
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
    let answer: Answer;
    try {
      answer = await this.session.post(step, newOrder, {
        ...payload,
        ...(replaces !== undefined && { replaces }),
      }, this.account);
    } catch (error) {
      // the type does not say whether `replaces` was the reason; for these two it was not
      const refused = error instanceof AcmeError && error.problem !== undefined &&
        !isProblem(error, "rateLimited", "accountDoesNotExist");
      if (replaces === undefined || !refused) throw error;
      answer = await this.session.post(step, newOrder, payload, this.account);
    }
    const order = this.#order(step, this.#location(step, newOrder, answer), answer);
    if (order.authorizations.length <= names.length) return order;
    throw new AcmeError(step, `the CA asks for ${order.authorizations.length} authorizations`, order.url);
  }

  /** RFC 8555 §7.1.3. */
  async getOrder(url: string, step = "read the order"): Promise<Order> {
    return this.#order(step, url, await this.#postAsGet(step, url));
  }

  /** Yields the order now, then after each poll until the deadline, and once more at the deadline. */
  async *watch(step: string, order: Order, deadline: Date): AsyncGenerator<Order> {
    const { context } = this.session;
    for (let current = order, next = FIRST_POLL_MS;; next = Math.min(next * 3, LONGEST_POLL_MS)) {
      yield current;
      const now = context.now();
      if (now >= deadline) return;
      const { retryAfter } = current;
      const wait = retryAfter !== undefined && retryAfter <= deadline
        ? Math.max(retryAfter.getTime() - now.getTime(), 0)
        : this.session.jittered(next);
      await context.sleep(Math.min(wait, deadline.getTime() - now.getTime()));
      current = await this.getOrder(order.url, step);
    }
  }

  /** RFC 8555 §7.5. */
  async getAuthorization(url: string): Promise<Authorization> {
    const step = "read an authorization";
    for (let tries = 1;; tries++) {
      const authorization = this.#authorization(step, url, await this.#postAsGet(step, url));
      const { status, challenges } = authorization;
      // acme2certifier creates challenges after the authorization
      if (status !== "pending" || challenges.length > 0 || tries === LAG_ATTEMPTS) return authorization;
      await this.session.pauseForLag(tries);
    }
  }

  /** RFC 8555 §7.5.1: asks the CA to validate a challenge. Returns whether the CA reports a failure already. */
  async respondToChallenge(authorization: Authorization, { url }: Challenge): Promise<boolean> {
    const step = "answer a challenge";
    try {
      const answer = await this.session.post(step, url, {}, this.account, { isNew: true });
      const { status, error } = jsonObject(step, url, answer);
      return status === "invalid" || error !== undefined;
    } catch (error) {
      // if the first answer was lost, the second attempt meets a challenge that is being validated
      if (!isProblem(error, "malformed")) throw error;
      const { status, challenges } = await this.getAuthorization(authorization.url);
      const own = challenges.find((challenge) => challenge.url === url);
      if (status !== "valid" && own?.status === "pending" && own.error === undefined) throw error;
      return status === "invalid" || own?.error !== undefined;
    }
  }

  /** RFC 8555 §7.4: sends the CSR of a `ready` order. */
  async finalizeOrder(order: Order, csr: Uint8Array): Promise<Order> {
    const step = "finalize the order";
    const payload = { csr: Buffer.from(csr).toString("base64url") };
    for (let tries = 1;; tries++) {
      try {
        const answer = await this.session.post(step, order.finalize, payload, this.account, { isNew: true });
        return this.#order(step, order.url, answer);
      } catch (error) {
        if (!isProblem(error, "orderNotReady")) throw error;
        // either the first answer was lost, and the order is no longer ready, or a replica does not know yet that it is
        const current = await this.getOrder(order.url, step);
        if (current.status !== "ready" && current.status !== "pending") {
          const { problem } = error.cause instanceof AcmeError ? error.cause : {};
          return { ...current, error: current.error ?? problem };
        }
        if (tries === LAG_ATTEMPTS) throw error;
      }
      await this.session.pauseForLag(tries);
    }
  }

  /** RFC 8555 §7.4.2: the chains of a `valid` order, the default one first. Each is fetched when it is needed. */
  async *downloadChains(order: Order): AsyncGenerator<string> {
    const step = "download the certificate";
    if (order.certificate === undefined) {
      throw new AcmeError(step, "the order names no certificate", order.url);
    }
    const accept = "application/pem-certificate-chain";
    const urls = [order.certificate];
    for (const url of urls) {
      const answer = await this.#postAsGet(step, url, accept);
      const type = mediaType(answer);
      if (type !== accept) throw new AcmeError(step, `not a certificate but ${type}`, url);
      if (urls.length === 1) urls.push(...linksOf(answer, "alternate", url).slice(0, MOST_ALTERNATES));
      yield answer.text;
    }
  }

  /**
   * RFC 8555 §7.6, signed by the account or by the certificate's own key; no error if it is revoked already. `reason`
   * is a CRLReason (RFC 5280 §5.3.1).
   */
  async revokeCertificate(der: Uint8Array, reason: number, signer: Signer = this.account): Promise<void> {
    const step = "revoke the certificate";
    const url = this.directory.revokeCert;
    if (url === undefined) throw new AcmeError(step, "the CA does not offer revocation", "");
    try {
      const certificate = Buffer.from(der).toString("base64url");
      await this.session.post(step, url, { certificate, reason }, signer);
    } catch (error) {
      if (!isProblem(error, "alreadyRevoked")) throw error;
    }
  }

  /** RFC 9773 §4.1; the identifier is `Certificate.id` of x509.ts. */
  async renewalInfo(certificateId: string): Promise<RenewalInfo> {
    const step = "ask when to renew";
    const url = `${this.directory.renewalInfo}/${certificateId}`;
    const answer = await this.session.get(step, url, { mayBeMissing: true });
    const body = jsonObject(step, url, answer);
    const window = (body.suggestedWindow ?? {}) as Record<string, unknown>;
    const [start, end] = [instant(window.start), instant(window.end)];
    if (start === undefined || end === undefined) {
      throw new AcmeError(step, "no renewal window in the answer", url);
    }
    if (start >= end) throw new AcmeError(step, "the renewal window ends before it starts", url);
    const explanationUrl = isHttps(body.explanationURL) ? oneLine(body.explanationURL) : undefined;
    return { start, end, explanationUrl, retryAfter: this.#retryAfter(answer) };
  }

  /** RFC 8555 §6.3. */
  #postAsGet(step: string, url: string, accept?: string): Promise<Answer> {
    return this.session.post(step, url, undefined, this.account, { accept, isNew: true });
  }

  #location(step: string, url: string, answer: Answer): string {
    jsonObject(step, url, answer); // an answer of something else than the CA is an error
    const location = answer.headers.get("location");
    if (location === null) throw new AcmeError(step, "the answer has no Location", url);
    return this.session.checkUrl(step, location);
  }

  #retryAfter({ headers }: Answer): Date | undefined {
    return parseRetryAfter(headers, this.session.context.now());
  }

  #order(step: string, url: string, answer: Answer): Order {
    const body = jsonObject(step, url, answer);
    const { authorizations } = body;
    const status = known(["pending", "ready", "processing", "valid", "invalid"] as const, body.status);
    if (status === undefined || !Array.isArray(authorizations)) {
      throw new AcmeError(step, "not an order", url);
    }
    const own = (value: unknown) => this.session.checkUrl(step, value);
    return {
      url,
      status,
      authorizations: authorizations.map(own),
      finalize: own(body.finalize),
      certificate: body.certificate === undefined ? undefined : own(body.certificate),
      error: problemOf(body.error),
      retryAfter: this.#retryAfter(answer),
    };
  }

  #authorization(step: string, url: string, answer: Answer): Authorization {
    const body = jsonObject(step, url, answer);
    const identifier = body.identifier as { value?: unknown } | undefined;
    const status = known(
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
      challenges: body.challenges.slice(0, MOST_LISTED).map((entry) => ({
        type: harmless(entry?.type),
        url: this.session.checkUrl(step, entry?.url),
        status: known(["pending", "processing", "valid", "invalid"] as const, entry?.status) ?? "invalid",
        token: TOKEN_TYPES.includes(entry?.type) ? checkToken(step, url, entry.token) : "",
        issuerDomainNames: texts(entry?.["issuer-domain-names"]),
        accountUri: isHttps(entry?.accounturi) ? entry.accounturi : undefined,
        error: problemOf(entry?.error),
      })),
    };
  }
}

/** A time in JSON (RFC 3339). Date.parse alone accepts other texts, too. */
function instant(value: unknown): Date | undefined {
  const date = new Date(typeof value === "string" && /^\d{4}-\d\d-\d\d[Tt ]/.test(value) ? value : NaN);
  return Number.isNaN(date.getTime()) ? undefined : date;
}

/** The `meta` of a directory (RFC 8555 §7.1.1). */
function metadata(meta: unknown): Pick<Directory, "profiles" | "externalAccountRequired" | "caaIdentities"> {
  const { profiles, externalAccountRequired, caaIdentities } = (meta ?? {}) as Record<string, unknown>;
  return {
    profiles: typeof profiles === "object" && profiles !== null ? texts(Object.keys(profiles)) : [],
    externalAccountRequired: externalAccountRequired === true,
    caaIdentities: texts(caaIdentities),
  };
}

/** The first texts of a list, safe to print. */
function texts(value: unknown): string[] {
  if (!Array.isArray(value)) return [];
  return value.slice(0, MOST_LISTED).filter((entry) => typeof entry === "string").map(oneLine);
}

function checkToken(step: string, url: string, token: unknown): string {
  if (typeof token === "string" && TOKEN.test(token)) return token;
  throw new AcmeError(step, "the CA sent a token that is not base64url", url);
}

function known<const T>(values: readonly T[], value: unknown): T | undefined {
  return values.find((each) => each === value);
}
