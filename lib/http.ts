/**
 * Requests to a CA, most of them signed (RFC 8555 §6): JWS, nonces, retries, problem documents. Only this file imports
 * `jose`.
 *
 * Nothing that the CA sends is trusted: bodies and headers are bounded, URLs must be https at hosts of its directory,
 * and control characters are removed from all text.
 */

import defer * as nodeCrypto from "node:crypto";
import type { CryptoKey, JWK } from "jose";
import { type Context, limit } from "./context.ts";
import { oneLine } from "./names.ts";
import { CURVES } from "./x509.ts";

/** RFC 8555 §6.7, RFC 7807. `type` is without the prefix `urn:ietf:params:acme:error:`. */
export interface Problem {
  readonly type: string;
  readonly detail: string;
  readonly identifier?: string;
  /** Where a user can read on, or has to do something: `instance`, and the terms of service (RFC 8555 §7.3.3). */
  readonly links: readonly string[];
  readonly subproblems: readonly Problem[];
}

/** A refusal by the CA, an unusable answer, or none at all, to the request for `step` at `url`. */
export class AcmeError extends Error {
  override readonly name = "AcmeError";
  /** HTTP status of the answer. */
  readonly status?: number;
  readonly problem?: Problem;
  /** When the CA wants to be asked again. */
  readonly retryAfter?: Date;
  /** The same request may succeed in a moment. */
  readonly isTransient?: boolean;
  /** The order failed. */
  readonly isOrderLost?: boolean;
  constructor(
    readonly step: string,
    message: string,
    readonly url: string,
    more: Pick<AcmeError, "status" | "problem" | "retryAfter" | "isTransient" | "isOrderLost"> = {},
  ) {
    super(message);
    Object.assign(this, more);
  }
}

/** The message of an error, with the step of an AcmeError. */
export function messageOf(error: unknown): string {
  if (error instanceof AcmeError) return `cannot ${error.step}: ${error.message}`;
  return error instanceof Error ? error.message : String(error);
}

/** Whether the CA refused something with a problem of this type. */
export function isProblem(error: unknown, ...types: string[]): error is AcmeError {
  return error instanceof AcmeError && types.includes(error.problem?.type ?? "");
}

/** An RSA or EC key for signing. */
export interface AccountKey {
  readonly alg: "RS256" | "ES256" | "ES384" | "ES512";
  readonly privateKey: CryptoKey;
  readonly publicJwk: JWK;
  /** RFC 7638, base64url of SHA-256. */
  readonly thumbprint: string;
}

/** A key, alone or of an account. */
export interface Signer {
  readonly key: AccountKey;
  /** The account's URL. */
  readonly url?: string;
  /** Just registered, so that some replicas of the CA may not know it yet. */
  readonly isNew?: boolean;
}

/** A complete HTTP answer of status 2xx. */
export interface Answer {
  readonly headers: Headers;
  readonly text: string;
}

/** Let's Encrypt's gateway gives up after some 30 s. */
const REQUEST_TIMEOUT_MS = 30_000;
/** The same for requests on which nothing depends. */
const HURRY_TIMEOUT_MS = 10_000;
/** Attempts after a broken connection, a time-out or a server error (5xx); each pause is three times the last. */
const ATTEMPTS = 4;
const FIRST_PAUSE_MS = 500;
/**
 * Attempts if a replica of the CA does not know yet what was just created (8 s in all, each pause is twice the last).
 */
export const LAG_ATTEMPTS = 6;
/** Attempts after 404 for anything else (0.75 s). */
const NOT_FOUND_ATTEMPTS = 3;
const FIRST_LAG_PAUSE_MS = 250;
/** badNonce comes in bursts; Pebble can be set to refuse every second nonce. */
const BAD_NONCE_ATTEMPTS = 30;
/** How often in a row a CA may refuse a request as rate-limited with a Retry-After. */
const MOST_REFUSALS = 8;
/** A longer Retry-After ends the request; a later run respects it. */
const LONGEST_WAIT_MS = 30_000;
/** Requests at once, of all lines; HTTP/2 servers allow 100 (RFC 9113 §6.5.2), some gateways fewer. */
const MOST_AT_ONCE = 20;

/** Ten RSA-4096 certificates with 100 names are well below. */
const LARGEST_BODY = 1 << 20;
const LONGEST_HEADER = 16 << 10;
const LONGEST_URL = 2000;
/** A problem with a sentence for each of 100 names. */
const LONGEST_MESSAGE = 20_000;

const ERROR_PREFIX = "urn:ietf:params:acme:error:";

/** Throws if a package is missing: Deno needs all of them when it loads the first. */
export async function checkPackages(): Promise<void> {
  await import("jose");
}

/** Imports the key of an account or a certificate (PKCS#8, PKCS#1 or SEC1); throws if `pem` is not an RSA or EC key. */
export async function importKey(pem: string): Promise<AccountKey> {
  const key = nodeCrypto.createPrivateKey(pem);
  const publicJwk = nodeCrypto.createPublicKey(key).export({ format: "jwk" }) as JWK;
  const alg = publicJwk.kty === "RSA" ? "RS256" : CURVES.find(({ curve }) => curve === publicJwk.crv)?.alg;
  if (alg === undefined) throw new Error("neither an RSA nor an EC key");
  const { calculateJwkThumbprint, importPKCS8 } = await import("jose");
  const pkcs8 = key.export({ type: "pkcs8", format: "pem" }) as string;
  const privateKey = await importPKCS8(pkcs8, alg);
  return { alg, privateKey, publicJwk, thumbprint: await calculateJwkThumbprint(publicJwk) };
}

/**
 * A URL at which the CA limits requests: they go there one at a time, each after the Retry-After of the last refusal.
 */
interface Limited {
  readonly turn: ReturnType<typeof limit>;
  /** Refusals in a row. */
  refusals: number;
  last: AcmeError;
}

/** The requests to one CA. */
export class Session {
  /** Unused nonces (RFC 8555 §6.5), the newest on top; every answer has one. */
  readonly #nonces: string[] = [];
  readonly #hosts = new Set<string>();
  readonly #limited = new Map<string, Limited>();
  readonly #slot: ReturnType<typeof limit>;
  #newNonceUrl = "";
  /** By how much this clock is ahead of the CA's, in milliseconds; 0 until the CA has answered. */
  aheadMs = 0;

  /** `parallel`: lines at a time. */
  constructor(readonly context: Context, parallel: number) {
    this.#slot = limit(Math.min(MOST_AT_ONCE, 2 * parallel));
  }

  /** Sets the URL for nonces, and the hosts of the CA: those of the URLs in its directory. */
  use(newNonceUrl: string, urls: readonly string[]): void {
    this.#newNonceUrl = newNonceUrl;
    for (const url of urls) this.#hosts.add(new URL(url).host);
  }

  /** An unsigned request. `hurry`: with one attempt and a short time-out; `mayBeMissing`: 404 is not tried again. */
  async get(step: string, url: string, { hurry = false, mayBeMissing = false } = {}): Promise<Answer> {
    const timeoutMs = hurry ? HURRY_TIMEOUT_MS : REQUEST_TIMEOUT_MS;
    const attempt = () => this.#slot(() => this.#exchange(step, url, { method: "GET" }, timeoutMs));
    return await (hurry ? attempt() : this.#retried(url, attempt, mayBeMissing ? () => 1 : undefined));
  }

  /**
   * A signed request (RFC 8555 §6.2), each attempt with a fresh nonce. `undefined` is the empty payload (§6.3), not the
   * empty object. `isNew`: the resource was just created. Throws AcmeError unless the status is 2xx.
   */
  async post(
    step: string,
    url: string,
    payload: object | undefined,
    signer: Signer,
    { accept, isNew = false }: { accept?: string; isNew?: boolean } = {},
  ): Promise<Answer> {
    this.checkUrl(step, url);
    const by = signer.url === undefined ? { jwk: signer.key.publicJwk } : { kid: signer.url };
    const lagAttempts = (error: AcmeError) => {
      if (error.problem?.type === "accountDoesNotExist") return signer.isNew ? LAG_ATTEMPTS : 1;
      return isNew && error.status === 404 ? LAG_ATTEMPTS : notFoundAttempts(error);
    };
    const attempt = async () => {
      for (let tries = 1;; tries++) {
        // taken within the slot, so that no more nonces are requested than there are requests at once
        const nonce = this.#nonces.pop() ?? await this.#newNonce();
        const body = JSON.stringify(await sign(signer.key, payload, { nonce, url, ...by }));
        const headers = { "content-type": "application/jose+json", ...(accept && { accept }) };
        try {
          return await this.#exchange(step, url, { method: "POST", headers, body });
        } catch (error) {
          if (!isProblem(error, "badNonce") || tries === BAD_NONCE_ATTEMPTS) throw error;
        }
      }
    };
    return await this.#retried(url, () => this.#slot(attempt), lagAttempts);
  }

  /** An https URL at a host of the directory; throws for any other. */
  checkUrl(step: string, url: unknown): string {
    if (isHttps(url) && this.#hosts.has(new URL(url).host)) return url;
    throw new AcmeError(step, `the CA named an unusable URL ${JSON.stringify(harmless(url))}`, "");
  }

  /** RFC 8555 §7.2. Called by a request that holds a slot. */
  async #newNonce(): Promise<string> {
    const [step, url] = ["get a nonce", this.#newNonceUrl];
    const answer = await this.#retried(url, () => this.#exchange(step, url, { method: "HEAD" }));
    const nonce = nonceOf(answer.headers);
    if (nonce === undefined) throw new AcmeError(step, "no nonce in the answer", url);
    return nonce;
  }

  /**
   * Makes a request again if that may help: when rate-limited, after a transient error, and if a replica may lag. Each
   * has its own number of attempts.
   */
  async #retried(
    url: string,
    attempt: () => Promise<Answer>,
    lagAttempts: (error: AcmeError) => number = notFoundAttempts,
  ): Promise<Answer> {
    const { context } = this;
    let first: AcmeError | undefined;
    for (let failures = 0, lagging = 0;;) {
      const limited = this.#limited.get(url);
      try {
        return await (limited ? limited.turn(() => this.#inTurn(limited, url, attempt)) : attempt());
      } catch (error) {
        // an error of another URL is that of newNonce, which was retried already
        if (!(error instanceof AcmeError) || error.url !== url) throw error;
        if (first !== undefined) error.cause ??= first; // the first error often says more than those that follow
        first ??= error;
        const wait = error.retryAfter && error.retryAfter.getTime() - context.now().getTime();
        if (wait !== undefined && wait > LONGEST_WAIT_MS) throw error;
        if (error.problem?.type === "rateLimited" && error.retryAfter !== undefined) {
          if (limited !== undefined && limited.refusals > MOST_REFUSALS) throw error;
          if (!this.#limited.has(url)) this.#limited.set(url, { turn: limit(1), refusals: 0, last: error });
        } else if (error.isTransient && ++failures < ATTEMPTS) {
          await context.sleep(wait ?? this.jittered(FIRST_PAUSE_MS * 3 ** (failures - 1)));
        } else if (++lagging < lagAttempts(error)) {
          await this.pauseForLag(lagging);
        } else {
          throw error;
        }
      }
    }
  }

  /** The pause after so many attempts at what a replica does not know yet. */
  async pauseForLag(attempts: number): Promise<void> {
    await this.context.sleep(this.jittered(FIRST_LAG_PAUSE_MS * 2 ** (attempts - 1)));
  }

  /** One attempt at a limited URL. After too many refusals the requests that still wait fail without an attempt. */
  async #inTurn(limited: Limited, url: string, attempt: () => Promise<Answer>): Promise<Answer> {
    const { context } = this;
    const wait = limited.last.retryAfter!.getTime() - context.now().getTime();
    if (wait > 0 && limited.refusals > MOST_REFUSALS) throw limited.last;
    if (wait > 0) await context.sleep(wait);
    try {
      const answer = await attempt();
      limited.refusals = 0;
      return answer;
    } catch (error) {
      if (isProblem(error, "rateLimited") && error.url === url && error.retryAfter !== undefined) {
        limited.refusals++;
        limited.last = error;
      }
      throw error;
    }
  }

  /** `ms`, up to a quarter more or less, so that requests do not return at the same moment. */
  jittered(ms: number): number {
    return ms * (0.75 + this.context.random() / 2);
  }

  async #exchange(
    step: string,
    url: string,
    init: RequestInit,
    timeoutMs = REQUEST_TIMEOUT_MS,
  ): Promise<Answer> {
    const { context } = this;
    let response: Response, text: string;
    try {
      response = await context.fetch(url, {
        ...init,
        redirect: "manual",
        signal: AbortSignal.any([AbortSignal.timeout(timeoutMs), context.signal]),
        headers: { "user-agent": context.userAgent, ...init.headers as Record<string, string> },
      });
      text = await boundedText(step, url, response);
    } catch (cause) {
      if (cause instanceof AcmeError) throw cause;
      context.signal.throwIfAborted();
      const reason = cause instanceof DOMException && cause.name === "TimeoutError"
        ? `no answer within ${timeoutMs / 1000} s`
        : oneLine(innermost(cause).message);
      throw new AcmeError(step, reason + this.#hint(reason), url, { isTransient: true });
    }
    const { headers } = response;
    // RFC 9111 §4.2.3: an answer from a cache is `age` seconds old
    const date = Date.parse(header(headers, "date")) + 1000 * (Number(header(headers, "age")) || 0);
    if (!Number.isNaN(date)) this.aheadMs = context.now().getTime() - date;
    const nonce = nonceOf(headers);
    if (nonce !== undefined && init.method !== "HEAD") this.#nonces.push(nonce);
    if (response.ok) return { headers, text };
    throw refusal(step, url, response.status, { headers, text }, context.now());
  }

  /** The setting, or the clock, to check if TLS fails. */
  #hint(reason: string): string {
    if (reason.includes("UnknownIssuer")) {
      return "; if the CA is yours, add the root of its TLS certificate to caBundle";
    }
    if (!/expired|not valid yet|NotValidYet/i.test(reason)) return "";
    return `; check this host's clock, which says ${this.context.now().toISOString()}`;
  }
}

/** RFC 8555 §6.2: flattened JSON serialization; also for the payloads of keyChange and external account binding. */
export async function sign(
  { alg, privateKey }: { readonly alg: string; readonly privateKey: CryptoKey | Uint8Array },
  payload: object | undefined,
  header: Record<string, unknown>,
): Promise<object> {
  const { FlattenedSign } = await import("jose");
  const bytes = new TextEncoder().encode(payload === undefined ? "" : JSON.stringify(payload));
  return await new FlattenedSign(bytes).setProtectedHeader({ alg, ...header }).sign(privateKey);
}

function notFoundAttempts({ status }: AcmeError): number {
  return status === 404 ? NOT_FOUND_ATTEMPTS : 1;
}

function nonceOf(headers: Headers): string | undefined {
  const nonce = headers.get("replay-nonce") ?? "";
  return /^[A-Za-z0-9_-]{1,1000}$/.test(nonce) ? nonce : undefined;
}

/** fetch() has the reason in the cause. */
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

function refusal(step: string, url: string, status: number, answer: Answer, now: Date): AcmeError {
  const type = mediaType(answer);
  let problem: Problem | undefined;
  if (type === "application/problem+json" || type === "application/json") {
    problem = problemOf(parseJson(answer.text));
    // some CAs send problems under the wrong type; other JSON has no message
    if (type === "application/json" && !problem?.detail && problem?.type === "about:blank") {
      problem = undefined;
    }
  }
  if (status === 429) {
    problem ??= { type: "rateLimited", detail: "too many requests", links: [], subproblems: [] };
  }
  if (problem?.type === "userActionRequired") { // RFC 8555 §7.3.3
    problem = { ...problem, links: [...problem.links, ...linksOf(answer, "terms-of-service", url)] };
  }
  const message = problem === undefined ? `HTTP status ${status} (${type})` : describe(problem);
  const retryAfter = parseRetryAfter(answer.headers, now);
  const isTransient = status >= 500 && status !== 501; // "not implemented" is permanent
  return new AcmeError(step, message, url, { status, problem, retryAfter, isTransient });
}

/** A problem and its subproblems as text. */
export function describe(problem: Problem): string {
  const text = sentences(problem).join("; ");
  return text.length > LONGEST_MESSAGE ? `${text.slice(0, LONGEST_MESSAGE)}…` : text;
}

function sentences({ identifier, detail, type, links, subproblems }: Problem): string[] {
  const about = identifier === undefined ? "" : `${identifier}: `;
  const see = links.map((link) => `, see ${link}`).join("");
  return [`${about}${detail || "no detail"} (${type})${see}`, ...subproblems.flatMap(sentences)];
}

/** Parses a problem document; undefined unless it is an object. */
export function problemOf(value: unknown, isSubproblem = false): Problem | undefined {
  if (typeof value !== "object" || value === null) return undefined;
  const { type, detail, identifier, instance, subproblems } = value as Record<string, unknown>;
  const named = (identifier as { value?: unknown } | null | undefined)?.value;
  // one level, and at most one for each name (RFC 8555 §6.7.1)
  const listed = isSubproblem || !Array.isArray(subproblems) ? [] : subproblems.slice(0, 100);
  return {
    type: harmless(type ?? "about:blank").replace(ERROR_PREFIX, "").trim(),
    detail: harmless(detail ?? ""),
    identifier: named === undefined ? undefined : harmless(named),
    links: isHttps(instance) ? [oneLine(instance)] : [],
    subproblems: listed.map((each) => problemOf(each, true)).filter((each) => each !== undefined),
  };
}

/** The time of a Retry-After header (RFC 9110 §10.2.3), at least a second and at most a day from `now`. */
export function parseRetryAfter(headers: Headers, now: Date): Date | undefined {
  const value = headers.get("retry-after")?.trim();
  if (!value) return undefined;
  // a date begins with its weekday; Date.parse alone would find one in "-5"
  const date = /^[a-z]{3}/i.test(value) ? Date.parse(value) : NaN;
  const at = /^\d+$/.test(value) ? now.getTime() + Number(value) * 1000 : date;
  if (Number.isNaN(at)) return undefined;
  return new Date(Math.min(Math.max(at, now.getTime() + 1000), now.getTime() + 86_400_000));
}

/** Any JSON value as text that is safe to print. String() would throw at `{"toString": 1}`. */
export function harmless(value: unknown): string {
  return oneLine(typeof value === "string" ? value : JSON.stringify(value) ?? "");
}

/** The URLs of Link headers with this relation (RFC 8288), absolute if they can be resolved. */
export function linksOf({ headers }: Answer, relation: string, base: string): string[] {
  return [...header(headers, "link").matchAll(/<([^<>]*)>([^<>,]*)/g)]
    .filter(([, , parameters]) =>
      parameters!.split(";").some((one) => one.trim().replaceAll('"', "") === `rel=${relation}`)
    )
    .map(([, url]) => URL.canParse(url!, base) ? new URL(url!, base).href : url!);
}

function header(headers: Headers, name: string): string {
  return (headers.get(name) ?? "").slice(0, LONGEST_HEADER);
}

/** The JSON object of an answer; throws if it is anything else. */
export function jsonObject(step: string, url: string, answer: Answer): Record<string, unknown> {
  const type = mediaType(answer);
  if (type !== "application/json") throw new AcmeError(step, `not JSON but ${type}`, url);
  const value = parseJson(answer.text);
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

export function mediaType({ headers }: Answer): string {
  return oneLine(header(headers, "content-type").split(";")[0]!.trim().toLowerCase() || "no content type");
}

/** Whether a value is an https URL that is safe to request and to print: printable ASCII, bounded, no credentials. */
export function isHttps(value: unknown): value is string {
  return typeof value === "string" && value.length < LONGEST_URL && URL.canParse(value) &&
    /^https:\/\/[\w.:[\]-]+(?:[/?#][\x21-\x7e]*)?$/.test(value);
}
