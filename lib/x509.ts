/**
 * Keys, certificate signing requests, and the contents of certificates. Works on text and bytes; uses no files or
 * network.
 *
 * A run reads all certificates and often does nothing else, so their DER is parsed here: X509Certificate of
 * `node:crypto` takes twice as long, and lacks the authority's key identifier. Signatures and keys are left to
 * `node:crypto` and `@peculiar/x509`, which no other file imports; both are loaded when first needed.
 *
 * RFC 5280 (certificates), RFC 2986 (CSRs), RFC 5958 (PKCS#8), RFC 9773 §4.1 (certificate identifiers).
 */

import defer * as nodeCrypto from "node:crypto";
import { limit } from "./context.ts";
import { isIP, toIPv6 } from "./names.ts";

/** Type and size of a key. */
export type KeySpec = { readonly type: "rsa"; readonly bits: number } | {
  readonly type: "ec";
  readonly curve: Curve;
};
export type Curve = typeof CURVES[number]["curve"];

/**
 * The curves: NIST's name, object identifier (SEC 2 §A.2, in hexadecimal), names of OpenSSL and the SEC; the digest for
 * each (FIPS 186-5), and the JOSE algorithm (RFC 7518 §3.4).
 */
export const CURVES = [
  {
    curve: "P-256",
    id: "2a8648ce3d030107",
    names: ["prime256v1", "secp256r1"],
    hash: "SHA-256",
    alg: "ES256",
  },
  { curve: "P-384", id: "2b81040022", names: ["secp384r1"], hash: "SHA-384", alg: "ES384" },
  { curve: "P-521", id: "2b81040023", names: ["secp521r1"], hash: "SHA-512", alg: "ES512" },
] as const;

/** A shorter lifetime is short: https://letsencrypt.org/docs/integration-guide/#when-to-renew */
export const SHORT_LIFE_MS = 10 * 86_400_000;

/** The contents of a certificate, as far as they are used. */
export interface Certificate {
  /** DNS names and IP addresses of the subjectAltName, lower-case, in the certificate's order. */
  readonly names: readonly string[];
  readonly notBefore: Date;
  readonly notAfter: Date;
  /** Its identifier for renewal information (RFC 9773 §4.1); absent if it has no authority key identifier. */
  readonly id?: string;
  /** SHA-256 of the DER, lower-case hexadecimal without colons. */
  readonly fingerprint: string;
  /** Absent for other types of keys. */
  readonly keySpec?: KeySpec;
  /** Issuer and subject are the same. */
  readonly selfSigned: boolean;
  /** Organization of the issuer, or its common name. */
  readonly issuer: string;
}

/** A chain from the CA that cannot be accepted. */
export class ChainError extends Error {
  override readonly name = "ChainError";
  /** `isDated`: because of its dates, so one of the two clocks may be wrong. */
  constructor(message: string, readonly isDated = false) {
    super(message);
  }
}

const PEM_BEGIN = "-----BEGIN CERTIFICATE-----";
const PEM_END = "-----END CERTIFICATE-----";

/** A DNS name has up to 253 characters (RFC 1035 §3.1), an organization 64 (RFC 5280 A.1). */
const LONGEST_NAME = 300;
/** A compressed point of P-256. */
const SHORTEST_KEY = 33;
/** Let's Encrypt's longest chains have had four certificates. */
const LONGEST_CHAIN = 10;
/** Delivery takes time, too. */
const LEAST_LIFE_MINUTES = 5;
/** How far the CA's clock may be ahead of ours; Let's Encrypt back-dates by as much. */
const CLOCK_SKEW_MINUTES = 60;
/** id-kp-serverAuth and anyExtendedKeyUsage (RFC 5280 §4.2.1.12), in hexadecimal. */
const FOR_SERVERS = ["2b06010505070301", "551d2500"];
/** RSA with SHA-1 and with MD5, ECDSA with SHA-1 (RFC 3279 §2.2), in hexadecimal. */
const WEAK_SIGNATURES = ["2a864886f70d010105", "2a864886f70d010104", "2a8648ce3d0401"];

// ---- PEM ---------------------------------------------------------------------------------------------------------

/** One block of a PEM text (RFC 7468) with its markers, and its offset in the text. */
interface PemBlock {
  readonly label: string;
  readonly pem: string;
  readonly start: number;
}

/** The blocks of a PEM text. Each marker is matched alone: a pattern for whole blocks fails for large files. */
export function pemBlocks(text: string): PemBlock[] {
  const blocks: PemBlock[] = [];
  let begin: RegExpExecArray | undefined;
  for (const marker of text.matchAll(/-----(BEGIN|END) ([A-Z0-9 ]{1,40})-----/g)) {
    if (marker[1] === "END" && begin?.[2] === marker[2]) {
      const start = begin!.index;
      blocks.push({ label: marker[2]!, pem: text.slice(start, marker.index + marker[0].length), start });
    }
    begin = marker[1] === "BEGIN" ? marker : undefined;
  }
  return blocks;
}

/** DER of the first certificate in `pem`; throws if there is none. */
export function certificateDer(pem: string): Uint8Array {
  const start = pem.indexOf(PEM_BEGIN); // pemBlocks() takes three times as long
  const end = pem.indexOf(PEM_END, start);
  if (start < 0 || end < 0) throw new Error("not a PEM certificate");
  return Uint8Array.fromBase64(pem.slice(start + PEM_BEGIN.length, end));
}

/** DER of a private key in PEM; throws if it is truncated. */
function privateKeyDer(pem: string): Uint8Array & { includes(bytes: Uint8Array): boolean } {
  const block = pemBlocks(pem).find(({ label }) => /^(?:RSA |EC )?PRIVATE KEY$/.test(label));
  if (block === undefined) throw new Error("not an unencrypted PEM private key");
  const der = Buffer.from(block.pem.replace(/-----.*?-----/g, ""), "base64");
  if (der[0] !== 0x30 || element(der, 0).end !== der.length) throw new Error("truncated private key");
  return der as ReturnType<typeof privateKeyDer>;
}

function toPem(label: string, der: ArrayBuffer | Uint8Array): string {
  const lines = Buffer.from(der as ArrayBuffer).toString("base64").match(/.{1,64}/g) ?? [];
  return `-----BEGIN ${label}-----\n${lines.join("\n")}\n-----END ${label}-----\n`;
}

// ---- certificates ------------------------------------------------------------------------------------------------

/** Parses the first certificate in `pem`; throws if there is none that can be parsed. */
export function readCertificate(pem: string): Certificate {
  return parseCertificate(certificateDer(pem));
}

function parseCertificate(der: Uint8Array): Certificate {
  const { serial, issuer, validity, subject, publicKey, extensions } = certificateFields(der);
  const [notBefore, notAfter] = children(der, validity).map((time) => timeOf(der, time));
  if (notBefore === undefined || notAfter === undefined) throw new Error("a certificate without dates");
  const names = extensionOf(der, extensions, SUBJECT_ALT_NAME);
  return {
    names: names === undefined ? [] : children(der, names).map((name) => generalName(der, name)),
    notBefore,
    notAfter,
    id: certificateId(der, serial, extensions),
    fingerprint: sha256(der),
    keySpec: publicKeySpec(der, publicKey),
    selfSigned: hexOf(der, issuer) === hexOf(der, subject),
    issuer: attributeOf(der, issuer, ORGANIZATION) ?? attributeOf(der, issuer, COMMON_NAME) ?? "",
  };
}

/** RFC 5280 §4.2.1.6; safe to print, since the certificate may be any server's. */
function generalName(der: Uint8Array, { tag, start, end }: Element): string {
  const bytes = der.subarray(start, Math.min(end, start + LONGEST_NAME));
  if (tag === 0x82) {
    return ascii(bytes).replace(/[^!-~]/g, (char) => `\\u{${char.charCodeAt(0).toString(16)}}`).toLowerCase();
  }
  if (tag === 0x87 && bytes.length === 4) return bytes.join(".");
  const groups = bytes.toHex().match(/.{4}/g) ?? [];
  if (tag === 0x87 && groups.length === 8) return toIPv6(groups.join(":"))!;
  return `(a name of type ${tag & 0x1f})`;
}

/** RFC 5280 §4.1.2.5: two digits of the year until 2049, four from then on. */
function timeOf(der: Uint8Array, { tag, start, end }: Element): Date {
  const text = ascii(der.subarray(start, end));
  const century = tag === 0x18 ? "" : text < "50" ? "20" : "19";
  const [, year, ...rest] = /^(\d{4})(\d\d)(\d\d)(\d\d)(\d\d)(\d\d)Z$/.exec(century + text) ?? [];
  const [month, day, hour, minute, second] = rest;
  const time = new Date(`${year}-${month}-${day}T${hour}:${minute}:${second}Z`);
  if (Number.isNaN(time.getTime())) throw new Error("a certificate with an impossible date");
  return time;
}

/** See `Certificate.id`: base64url of the authority key identifier and of the serial number, leading zero included. */
function certificateId(der: Uint8Array, serial: Element, extensions?: Element): string | undefined {
  const base64url = ({ start, end }: Element) =>
    der.subarray(start, end).toBase64({ alphabet: "base64url", omitPadding: true });
  const authority = extensionOf(der, extensions, AUTHORITY_KEY_IDENTIFIER);
  const identifier = authority && children(der, authority).find(({ tag }) => tag === 0x80);
  return identifier && `${base64url(identifier)}.${base64url(serial)}`;
}

const decoder = new TextDecoder();

/** The first attribute of a type in a name (RFC 5280 §4.1.2.4), safe to print. */
function attributeOf(der: Uint8Array, name: Element, id: string): string | undefined {
  for (const attribute of children(der, name).flatMap((set) => children(der, set))) {
    const [oid, value] = children(der, attribute);
    if (oid === undefined || value === undefined || hexOf(der, oid) !== id) continue;
    const bytes = der.subarray(value.start, Math.min(value.end, value.start + LONGEST_NAME));
    return decoder.decode(bytes).replace(/\p{C}/gu, "?");
  }
}

/** Whether `certificate` is for exactly `names`, whatever their order. */
export function coversExactly(certificate: Certificate, names: readonly string[]): boolean {
  const certified = new Set(certificate.names);
  return certified.size === names.length && names.every((name) => certified.has(name));
}

// ---- chains ------------------------------------------------------------------------------------------------------

/** A certificate of a chain. */
interface Link {
  readonly der: Uint8Array;
  readonly parsed: Certificate;
  readonly x509: nodeCrypto.X509Certificate;
}

/**
 * Checks a chain from the CA, except for its root: the leaf is for exactly `names`, for `keyPem` and for TLS servers;
 * each certificate is valid now and for some more time, and issued by the next one, a CA certificate. Returns the leaf,
 * and the chain encoded again; throws ChainError.
 */
export function checkChain(
  text: string,
  names: readonly string[],
  keyPem: string,
  now: Date,
): { readonly leaf: Certificate; readonly chainPem: string } {
  const chain = readChain(text);
  const chainPem = chain.map(({ x509 }) => toPem("CERTIFICATE", x509.raw)).join("");
  const { der, parsed: leaf, x509 } = chain[0]!;
  if (!isKeyOf(keyPem, chainPem)) throw new ChainError("the certificate is for another key");
  if (!coversExactly(leaf, names)) {
    const more = leaf.names.length > 10 ? ` and ${leaf.names.length - 10} more` : "";
    throw new ChainError(`the certificate is for other names: ${leaf.names.slice(0, 10).join(" ")}${more}`);
  }
  if (x509.ca) throw new ChainError("the certificate is a CA certificate");
  const usage = extensionOf(der, certificateFields(der).extensions, EXTENDED_KEY_USAGE);
  if (usage !== undefined && !children(der, usage).some((one) => FOR_SERVERS.includes(hexOf(der, one)))) {
    throw new ChainError("the certificate is not for TLS servers");
  }
  chain.forEach((each, index) => checkLink(each, chain[index + 1], index, now));
  return { leaf, chainPem };
}

/**
 * The certificates of a chain as the CA sent it (RFC 8555 §9.1). Anything else in the text is refused: it could be a
 * private key chosen by the CA (§11.4).
 */
function readChain(text: string): Link[] {
  const blocks = pemBlocks(text);
  if (blocks.length === 0) throw new ChainError("no certificate in the answer");
  if (blocks.length > LONGEST_CHAIN) throw new ChainError(`a chain of ${blocks.length} certificates`);
  let end = 0;
  for (const { label, pem, start } of blocks) {
    if (label !== "CERTIFICATE") throw new ChainError(`a ${label} among the certificates`);
    if (text.slice(end, start).trim() !== "") throw new ChainError("text between the certificates");
    end = start + pem.length;
  }
  if (text.slice(end).trim() !== "") throw new ChainError("text after the certificates");
  try {
    return blocks.map(({ pem }) => {
      const der = certificateDer(pem);
      return { der, parsed: parseCertificate(der), x509: new nodeCrypto.X509Certificate(pem) };
    });
  } catch {
    throw new ChainError("a certificate that cannot be parsed");
  }
}

/** Checks one certificate of a chain and its signature by the next. */
function checkLink({ der, parsed, x509 }: Link, issuer: Link | undefined, index: number, now: Date): void {
  const what = index === 0 ? "the certificate" : `certificate ${index + 1} of the chain`;
  const { notBefore, notAfter, selfSigned } = parsed;
  const minutesLeft = (notAfter.getTime() - now.getTime()) / 60_000;
  const minutesUntil = (notBefore.getTime() - now.getTime()) / 60_000;
  const date = minutesLeft <= 0
    ? `expired at ${notAfter.toISOString()}`
    : minutesLeft < LEAST_LIFE_MINUTES
    ? `expires at ${notAfter.toISOString()}, in less than ${LEAST_LIFE_MINUTES} minutes`
    : minutesUntil > CLOCK_SKEW_MINUTES
    ? `is not valid before ${notBefore.toISOString()}`
    : undefined;
  if (date !== undefined) {
    throw new ChainError(`${what} ${date}; this host's clock says ${now.toISOString()}`, true);
  }
  if (index > 0 && !x509.ca) throw new ChainError(`${what} is not a CA certificate`);
  const [algorithm] = children(der, certificateFields(der).algorithm);
  if (algorithm && WEAK_SIGNATURES.includes(hexOf(der, algorithm)) && !selfSigned) {
    throw new ChainError(`${what} is signed with SHA-1 or MD5`);
  }
  if (issuer !== undefined && !(x509.checkIssued(issuer.x509) && isSignedBy(x509, issuer.x509))) {
    throw new ChainError(`broken chain: certificate ${index + 1} is not issued by certificate ${index + 2}`);
  }
}

/** Whether the signature is right; true if Deno cannot check it (P-521, RSASSA-PSS). */
function isSignedBy(certificate: nodeCrypto.X509Certificate, issuer: nodeCrypto.X509Certificate): boolean {
  try {
    return certificate.verify(issuer.publicKey);
  } catch {
    return true;
  }
}

/** Common name of the root of a chain: the issuer of its last certificate. */
export function rootOf(chainPem: string): string | undefined {
  const last = pemBlocks(chainPem).at(-1);
  try {
    const der = certificateDer(last?.pem ?? "");
    return attributeOf(der, certificateFields(der).issuer, COMMON_NAME);
  } catch {
    return undefined; // checkChain() has the error
  }
}

// ---- keys --------------------------------------------------------------------------------------------------------

/**
 * Whether `keyPem` (PKCS#8, PKCS#1 or SEC1) is the private key of the first certificate in `certPem`. Throws if one of
 * them cannot be parsed.
 *
 * These formats normally contain the same bytes of the public key as the certificate. If they are found, the key need
 * not be imported, which costs a hundred times more.
 */
export function isKeyOf(keyPem: string, certPem: string): boolean {
  const der = certificateDer(certPem);
  const { publicKey } = certificateFields(der);
  const bits = publicBits(der, publicKey);
  if (privateKeyDer(keyPem).includes(bits)) return bits.length >= SHORTEST_KEY; // no bytes are found anywhere
  return publicKeyDer(keyPem).equals(der.subarray(publicKey.offset, publicKey.end));
}

/** SHA-256 of the public key (SubjectPublicKeyInfo) of a certificate or a private key in PEM, in hexadecimal. */
export function publicKeyHash(pem: string): string {
  if (!pem.includes(PEM_BEGIN)) return sha256(publicKeyDer(pem));
  const der = certificateDer(pem);
  const { offset, end } = certificateFields(der).publicKey;
  return sha256(der.subarray(offset, end));
}

function publicKeyDer(keyPem: string): Buffer {
  const key = nodeCrypto.createPublicKey(nodeCrypto.createPrivateKey(keyPem));
  return key.export({ type: "spki", format: "der" });
}

/** The part of a SubjectPublicKeyInfo that a private key repeats: an EC point, or modulus and exponent of RSA. */
function publicBits(der: Uint8Array, spki: Element): Uint8Array {
  const bitString = element(der, element(der, spki.start).end);
  const bits = bitString.start + 1; // after the number of unused bits
  return der.subarray(der[bits] === 0x30 ? element(der, bits).start : bits, bitString.end);
}

/** Whether `pem` is an unencrypted RSA or EC key. */
export function isPrivateKey(pem: string): boolean {
  try {
    return ["rsa", "ec"].includes(nodeCrypto.createPrivateKey(pem).asymmetricKeyType ?? "");
  } catch {
    return false;
  }
}

/**
 * Type and size of the key in `pem` (PKCS#8, PKCS#1 or SEC1); the name of its type or curve if it is another than those
 * used here. Throws if it cannot be parsed.
 */
export function keySpecOf(pem: string): KeySpec | string {
  const { asymmetricKeyType: type, asymmetricKeyDetails } = nodeCrypto.createPrivateKey(pem);
  const { modulusLength, namedCurve } = asymmetricKeyDetails ?? {};
  const curve = CURVES.find(({ names: [name] }) => name === namedCurve)?.curve;
  if (type === "rsa" && modulusLength !== undefined) return { type, bits: modulusLength };
  return curve === undefined ? namedCurve ?? type! : { type: "ec", curve };
}

/** Type and size of the key in a SubjectPublicKeyInfo (RFC 3279 §2.3). */
function publicKeySpec(der: Uint8Array, spki: Element): KeySpec | undefined {
  const [algorithm, bits] = children(der, spki);
  if (algorithm === undefined || bits === undefined) return undefined;
  const [id, parameters] = children(der, algorithm).map((element) => hexOf(der, element));
  if (id === ID_RSA) {
    const [modulus] = children(der, element(der, bits.start + 1));
    let { start, end } = modulus ?? bits;
    while (der[start] === 0 && start < end) start++;
    return { type: "rsa", bits: 8 * (end - start) + 24 - Math.clz32(der[start]!) };
  }
  const known = id === ID_EC ? CURVES.find(({ id }) => id === parameters) : undefined;
  return known && { type: "ec", curve: known.curve };
}

/** One RSA key at a time for each processor, so that other work is not held up. */
const makers = limit(navigator.hardwareConcurrency);

/** A new private key in PKCS#8 PEM. RSA takes 0.1 s and more, off the main thread. */
export function generateKey(spec: KeySpec): Promise<string> {
  return spec.type === "ec" ? makeKey(spec) : makers(() => makeKey(spec));
}

async function makeKey(spec: KeySpec): Promise<string> {
  const algorithm = spec.type === "ec" ? { name: "ECDSA", namedCurve: spec.curve } : {
    name: "RSASSA-PKCS1-v1_5",
    modulusLength: spec.bits,
    publicExponent: new Uint8Array([1, 0, 1]),
    hash: "SHA-256",
  };
  const pair = await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]) as CryptoKeyPair;
  return toPem("PRIVATE KEY", await crypto.subtle.exportKey("pkcs8", pair.privateKey));
}

/** A private key in any of the three formats as a pair for WebCrypto, and the digest to sign with. */
function cryptoKeys(keyPem: string): { keys: CryptoKeyPair; hash: string } {
  const key = nodeCrypto.createPrivateKey(keyPem);
  const curve = CURVES.find(({ names: [name] }) => name === key.asymmetricKeyDetails?.namedCurve);
  if (key.asymmetricKeyType !== "rsa" && curve === undefined) throw new Error("neither an RSA nor an EC key");
  const hash = curve?.hash ?? "SHA-256"; // for RSA of any size
  const algorithm = curve === undefined
    ? { name: "RSASSA-PKCS1-v1_5", hash }
    : { name: "ECDSA", namedCurve: curve.curve };
  const privateKey = key.toCryptoKey(algorithm, true, ["sign"]);
  const publicKey = nodeCrypto.createPublicKey(key).toCryptoKey(algorithm, true, ["verify"]);
  return { keys: { privateKey, publicKey }, hash };
}

/**
 * A CSR for `names` (DNS names and IP addresses) signed by `keyPem`. The first name is the common name, too, if it is a
 * DNS name of at most 64 characters (RFC 5280 A.1).
 */
export async function createCsr(
  keyPem: string,
  names: readonly string[],
): Promise<{ der: Uint8Array; pem: string }> {
  await import("reflect-metadata");
  const x509 = await import("@peculiar/x509");
  const { keys, hash } = cryptoKeys(keyPem);
  const alternativeNames = names.map((value) => ({
    type: isIP(value) ? "ip" as const : "dns" as const,
    value,
  }));
  const primary = alternativeNames[0]!;
  const csr = await x509.Pkcs10CertificateRequestGenerator.create({
    name: primary.type === "dns" && primary.value.length <= 64 ? [{ CN: [primary.value] }] : [],
    keys,
    signingAlgorithm: { ...keys.privateKey.algorithm, hash } as EcdsaParams,
    extensions: [new x509.SubjectAlternativeNameExtension(alternativeNames)],
  });
  return { der: new Uint8Array(csr.rawData), pem: toPem("CERTIFICATE REQUEST", csr.rawData) };
}

// ---- DER ---------------------------------------------------------------------------------------------------------

/** Fields of a certificate (RFC 5280 §4.1). */
function certificateFields(der: Uint8Array) {
  const certificate = element(der, 0);
  const fields = children(der, element(der, certificate.start));
  // the version, tagged [0], is optional; the fields up to the public key are not
  const [serial, algorithm, issuer, validity, subject, publicKey] = fields.slice(
    fields[0]?.tag === 0xa0 ? 1 : 0,
  );
  if (!serial || !algorithm || !issuer || !validity || !subject || !publicKey) {
    throw new Error("not a certificate");
  }
  const tagged = fields.find(({ tag }) => tag === 0xa3);
  const extensions = tagged && element(der, tagged.start);
  return { serial, algorithm, issuer, validity, subject, publicKey, extensions };
}

/** id-ce-subjectAltName, -authorityKeyIdentifier, -extKeyUsage; id-at-commonName, -organizationName; in hexadecimal. */
const SUBJECT_ALT_NAME = "551d11", AUTHORITY_KEY_IDENTIFIER = "551d23", EXTENDED_KEY_USAGE = "551d25";
const COMMON_NAME = "550403", ORGANIZATION = "55040a";
/** rsaEncryption, id-ecPublicKey (RFC 3279 §2.3), in hexadecimal. */
const ID_RSA = "2a864886f70d010101", ID_EC = "2a8648ce3d0201";

/** The value of an extension. */
function extensionOf(der: Uint8Array, extensions: Element | undefined, id: string): Element | undefined {
  for (const extension of extensions === undefined ? [] : children(der, extensions)) {
    const [oid, ...rest] = children(der, extension);
    const value = rest.at(-1); // an OCTET STRING
    if (oid !== undefined && value !== undefined && hexOf(der, oid) === id) return element(der, value.start);
  }
}

function ascii(bytes: Uint8Array): string {
  return String.fromCharCode(...bytes);
}

function hexOf(der: Uint8Array, { start, end }: Element): string {
  return der.subarray(start, end).toHex();
}

/** A DER element: its tag, its offset, and where its content starts and ends. */
interface Element {
  readonly tag: number;
  readonly offset: number;
  readonly start: number;
  readonly end: number;
}

/** The elements within `parent`. */
function children(der: Uint8Array, parent: Element): Element[] {
  const found: Element[] = [];
  for (let at = parent.start; at < parent.end;) {
    const child = element(der, at);
    if (child.end > parent.end) throw new Error("broken DER");
    found.push(child);
    at = child.end;
  }
  return found;
}

/** The DER element at `offset` (X.690 §8.1.3; lengths below 16 MiB); throws if it is not complete. */
function element(der: Uint8Array, offset: number): Element {
  const first = der[offset + 1] ?? 0;
  const octets = first < 0x80 ? 0 : first & 0x7f;
  let length = octets === 0 ? first : 0;
  for (let i = 0; i < octets && i < 4; i++) length = length * 256 + (der[offset + 2 + i] ?? 0);
  const start = offset + 2 + octets;
  if (octets > 3 || start + length > der.length) throw new Error("broken DER");
  return { tag: der[offset]!, offset, start, end: start + length };
}

/** SHA-256 in lower-case hexadecimal. */
export function sha256(data: string | Uint8Array): string {
  return nodeCrypto.hash("sha256", data, "hex");
}
