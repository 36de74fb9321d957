/**
 * The signatures of ACME for the test CA: flattened JWS (RFC 7515 §7.2.2) under the restrictions of RFC 8555
 * §6.2.
 *
 * It says whether a message is well-formed and whose key signed it, and throws the RFC's problem when it is
 * not. Nonces, accounts and URLs are the CA's business. Written on node:crypto alone, because `lib/` signs
 * with jose and a judge should not share the party's library.
 */
import { Buffer } from "node:buffer";
import {
  createHash,
  createHmac,
  createPublicKey,
  type JsonWebKey,
  type KeyObject,
  timingSafeEqual,
  verify,
} from "node:crypto";
import { mistake } from "./ca-problem.ts";

/** The protected header, as far as ACME knows it. */
export interface Header {
  readonly alg: string;
  readonly url: string;
  readonly nonce?: string;
  readonly kid?: string;
  readonly jwk?: unknown;
}

/** A parsed, not yet verified message. */
export interface Jws {
  readonly header: Header;
  /** The decoded payload, "" for POST-as-GET. */
  readonly payload: string;
  readonly signed: string;
  readonly signature: Uint8Array;
}

/** A public key that may sign requests: imported once, then kept with its account. */
export interface SigningKey {
  readonly key: KeyObject;
  readonly alg: string;
  /** RFC 7638, base64url. */
  readonly thumbprint: string;
}

const HASHES: Readonly<Record<string, string>> = {
  RS256: "sha256",
  ES256: "sha256",
  ES384: "sha384",
  ES512: "sha512",
};
const EC_ALGORITHMS: Readonly<Record<string, string>> = {
  "P-256": "ES256",
  "P-384": "ES384",
  "P-521": "ES512",
};

/** Decodes base64url without padding (RFC 8555 §6.1); anything else is the client's mistake. */
export function fromBase64url(value: unknown, what: string): Buffer {
  if (typeof value === "string" && /^[A-Za-z0-9_-]*$/.test(value) && value.length % 4 !== 1) {
    const bytes = Buffer.from(value, "base64url");
    if (bytes.toString("base64url") === value) return bytes;
  }
  throw mistake(400, "malformed", `${what} is not base64url without padding`);
}

/** Parses JSON that must be an object. */
export function parseObject(json: string, what: string): Record<string, unknown> {
  let value: unknown;
  try {
    value = JSON.parse(json);
  } catch {
    throw mistake(400, "malformed", `${what} is not JSON`);
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw mistake(400, "malformed", `${what} is not a JSON object`);
  }
  return value as Record<string, unknown>;
}

/** Takes a flattened JWS apart: `message` is the request's text or, for nested ones, an object. */
export function parseJws(message: string | Record<string, unknown>, what = "the JWS"): Jws {
  const jws = typeof message === "string" ? parseObject(message, what) : message;
  if (Object.keys(jws).sort().join() !== "payload,protected,signature") {
    throw mistake(400, "malformed", `${what} must have exactly the members protected, payload and signature`);
  }
  const header = parseObject(
    fromBase64url(jws.protected, "the protected header").toString(),
    "the protected header",
  );
  for (const name of ["crit", "b64"]) {
    if (name in header) throw mistake(400, "malformed", `the header "${name}" is not understood here`);
  }
  for (const name of ["alg", "url"]) {
    if (typeof header[name] !== "string") {
      throw mistake(400, "malformed", `the protected header lacks "${name}"`);
    }
  }
  return {
    header: header as unknown as Header,
    payload: fromBase64url(jws.payload, "the payload").toString(),
    signed: `${jws.protected}.${jws.payload}`,
    signature: fromBase64url(jws.signature, "the signature"),
  };
}

/**
 * Imports the public key of a `jwk` header; throws badPublicKey or malformed for what no client should send.
 */
export function importKey(jwk: unknown): SigningKey {
  if (typeof jwk !== "object" || jwk === null || "d" in jwk) {
    throw mistake(400, "malformed", "the header jwk is not a public key");
  }
  let key: KeyObject;
  try {
    key = createPublicKey({ key: jwk as JsonWebKey, format: "jwk" });
  } catch {
    throw mistake(400, "badPublicKey", "the key cannot be read");
  }
  const { kty, crv, n, e, x, y } = key.export({ format: "jwk" });
  const sent = jwk as JsonWebKey;
  if (sent.n !== n || sent.e !== e || sent.x !== x || sent.y !== y) {
    throw mistake(400, "badPublicKey", "the key's numbers are not in their canonical form (RFC 7518 §6)");
  }
  const members = kty === "RSA" ? { e, kty, n } : { crv, kty, x, y };
  const alg = kty === "RSA" ? "RS256" : EC_ALGORITHMS[crv ?? ""];
  const bits = key.asymmetricKeyDetails?.modulusLength ?? 2048;
  if (alg === undefined || bits < 2048 || bits > 8192) {
    throw mistake(400, "badPublicKey", `a key of ${crv ?? `${bits} bits`} is not allowed`);
  }
  return { key, alg, thumbprint: createHash("sha256").update(JSON.stringify(members)).digest("base64url") };
}

/** Refuses algorithms that no key here could have (RFC 8555 §6.2): `none`, MACs, RSA-PSS. */
export function checkAlgorithm({ header }: Jws): void {
  if (!(header.alg in HASHES)) {
    const algorithms = Object.keys(HASHES);
    throw mistake(
      400,
      "badSignatureAlgorithm",
      `the algorithm ${JSON.stringify(header.alg)} is not allowed`,
      { algorithms },
    );
  }
}

/** Verifies the signature of `jws` under `key`; throws the problem if it does not hold. */
export function verifyJws(jws: Jws, key: SigningKey): void {
  checkAlgorithm(jws);
  if (jws.header.alg !== key.alg) {
    throw mistake(
      400,
      "badSignatureAlgorithm",
      `${jws.header.alg} does not fit the key, which needs ${key.alg}`,
      {
        algorithms: [key.alg],
      },
    );
  }
  const how = { key: key.key, dsaEncoding: "ieee-p1363" as const };
  if (!verify(HASHES[key.alg], Buffer.from(jws.signed), how, jws.signature)) {
    throw mistake(400, "malformed", "the signature does not verify");
  }
}

/** Verifies the MAC of an external account binding (RFC 8555 §7.3.4). `secret` is the decoded MAC key. */
export function verifyMac(jws: Jws, secret: Uint8Array): void {
  const hash = { HS256: "sha256", HS384: "sha384", HS512: "sha512" }[jws.header.alg];
  if (hash === undefined) {
    throw mistake(400, "badSignatureAlgorithm", "the account binding is not signed with a MAC");
  }
  const expected = createHmac(hash, secret).update(jws.signed).digest();
  if (expected.length !== jws.signature.length || !timingSafeEqual(expected, jws.signature)) {
    throw mistake(403, "unauthorized", "the account binding's MAC does not verify");
  }
}
