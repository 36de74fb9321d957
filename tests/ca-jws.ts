/**
 * Requests of ACME as the test CA reads them: flattened JWS (RFC 7515 §7.2.2) as RFC 8555 §6.2 restricts it, and the
 * problems with which it refuses them (RFC 7807, RFC 8555 §6.7). On node:crypto alone, because `lib/` signs with jose.
 */
import { Buffer } from "node:buffer";
import { createHash, createPublicKey, type JsonWebKey, type KeyObject, verify } from "node:crypto";

/** An identifier of orders and authorizations (RFC 8555 §9.7.7, RFC 8738). */
export interface Identifier {
  readonly type: "dns" | "ip";
  readonly value: string;
}

/** The JSON form of a problem, as in answers, orders and challenges. */
export interface ProblemDocument {
  type: string;
  detail: string;
  status?: number;
  identifier?: Identifier;
  subproblems?: ProblemDocument[];
  algorithms?: string[];
}

/** A refusal on its way to the client; `type` without the URN prefix, `headers` go with the answer. */
export class Problem extends Error {
  override readonly name = "Problem";
  readonly document: ProblemDocument;
  constructor(
    /** Whether a correct client never provokes it: it is noted in `ca.violations` then. */
    readonly isViolation: boolean,
    readonly status: number,
    readonly type: string,
    detail: string,
    extra: Partial<ProblemDocument> = {},
    readonly headers: Readonly<Record<string, string>> = {},
  ) {
    super(`${type}: ${detail}`);
    this.document = { type: `urn:ietf:params:acme:error:${type}`, detail, status, ...extra };
  }
}

/** What a correct client never provokes. */
export const violation = (status: number, type: string, detail: string, extra?: Partial<ProblemDocument>) =>
  new Problem(true, status, type, detail, extra);
export const malformed = (detail: string) => violation(400, "malformed", detail);

/** The CA's own decision (limits, policy, a name that does not validate), which correct clients meet as well. */
export const refusal = (
  status: number,
  type: string,
  detail: string,
  extra?: Partial<ProblemDocument>,
  headers?: Record<string, string>,
) => new Problem(false, status, type, detail, extra, headers);

/** A parsed, not yet verified message. */
export interface Jws {
  /** The protected header, as far as ACME knows it. */
  readonly header: { alg: string; url: string; nonce?: string; kid?: string; jwk?: unknown };
  /** The decoded payload, "" for POST-as-GET. */
  readonly payload: string;
  readonly signed: string;
  readonly signature: Uint8Array;
}

/** A public key that may sign requests. */
export interface SigningKey {
  readonly key: KeyObject;
  readonly alg: string;
  /** RFC 7638, base64url. */
  readonly thumbprint: string;
}

const ALGORITHMS: Readonly<Record<string, string>> = { "P-256": "ES256", "P-384": "ES384", "P-521": "ES512" };

/** Decodes base64url without padding (RFC 8555 §6.1). */
export function fromBase64url(value: unknown, what: string): Buffer {
  const bytes = Buffer.from(typeof value === "string" ? value : "", "base64url");
  if (bytes.toString("base64url") !== value) throw malformed(`${what} is not base64url without padding`);
  return bytes;
}

/** Parses JSON that must be an object. */
export function parseObject(json: string, what = "the payload"): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(json);
  } catch {
    throw malformed(`${what} is not JSON`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw malformed(`${what} is not a JSON object`);
  }
  return value as Record<string, unknown>;
}

/** Takes a flattened JWS apart. */
export function parseJws(message: string, what = "the JWS"): Jws {
  const jws = parseObject(message, what);
  if (Object.keys(jws).sort().join() !== "payload,protected,signature") {
    throw malformed(`${what} must have exactly the members protected, payload and signature`);
  }
  const header = parseObject(`${fromBase64url(jws.protected, "the header")}`, "the protected header");
  if ("crit" in header) throw malformed("no critical header is understood here");
  for (const name of ["alg", "url"]) {
    if (typeof header[name] !== "string") throw malformed(`the protected header lacks "${name}"`);
  }
  return {
    header: header as unknown as Jws["header"],
    payload: fromBase64url(jws.payload, "the payload").toString(),
    signed: `${jws.protected}.${jws.payload}`,
    signature: fromBase64url(jws.signature, "the signature"),
  };
}

/** Imports a public JWK: RSA of 2048 bits or more, or one of the three curves. */
export function importKey(jwk: unknown): SigningKey {
  const sent = jwk as JsonWebKey;
  if (typeof jwk !== "object" || jwk === null || "d" in jwk) throw malformed("the jwk is not a public key");
  let key: KeyObject;
  try {
    key = createPublicKey({ key: sent, format: "jwk" });
  } catch {
    throw violation(400, "badPublicKey", "the key cannot be read");
  }
  const { kty, crv, n, e, x, y } = key.export({ format: "jwk" });
  if (sent.n !== n || sent.e !== e || sent.x !== x || sent.y !== y) {
    throw violation(400, "badPublicKey", "the key's numbers are not in their canonical form (RFC 7518 §6)");
  }
  const alg = kty === "RSA" ? "RS256" : ALGORITHMS[crv ?? ""];
  if (alg === undefined || (key.asymmetricKeyDetails?.modulusLength ?? 2048) < 2048) {
    throw violation(400, "badPublicKey", `a key of type ${kty} ${crv ?? ""} that is not allowed`);
  }
  const members = JSON.stringify(kty === "RSA" ? { e, kty, n } : { crv, kty, x, y });
  return { key, alg, thumbprint: createHash("sha256").update(members).digest("base64url") };
}

/** Verifies the signature; each key has one algorithm, so that `none` and MACs are refused as well. */
export function verifyJws(jws: Jws, { key, alg }: SigningKey): void {
  if (jws.header.alg !== alg) {
    const detail = `the algorithm ${JSON.stringify(jws.header.alg)} does not fit the key, which needs ${alg}`;
    throw violation(400, "badSignatureAlgorithm", detail, { algorithms: [alg] });
  }
  const hash = `sha${alg.slice(2)}`;
  if (!verify(hash, Buffer.from(jws.signed), { key, dsaEncoding: "ieee-p1363" }, jws.signature)) {
    throw malformed("the signature does not verify");
  }
}
