/**
 * Keys, certificate signing requests, and the facts that a certificate states.
 *
 * Works on text and bytes alone: it knows neither files nor the network. A run reads all certificates and mostly has
 * nothing else to do, so what stands in them is read here, byte by byte: X509Certificate of `node:crypto` takes twice as
 * long, and does not know the authority's key identifier. Whether it is true, and all that keys do, is left to `node:crypto`
 * and to `@peculiar/x509`, which no other file imports; both are loaded when they are first needed.
 *
 * RFC 5280 (certificates), RFC 2986 (CSRs), RFC 5958 (PKCS#8), RFC 9773 §4.1 (certificate identifiers).
 */

import type { KeyObject } from "node:crypto";
import defer * as nodeCrypto from "node:crypto";
import { limit } from "./context.ts";
import { isIP, toIPv6 } from "./names.ts";

/** What kind of key. */
export type KeySpec = { readonly type: "rsa"; readonly bits: number } | {
  readonly type: "ec";
  readonly curve: Curve;
};
export type Curve = typeof CURVES[number]["curve"];

/**
 * The curves under each name that they have here: NIST's, the object identifier (SEC 2 §A.2, in hexadecimal), OpenSSL's and
 * the SEC's; with the digest that goes with each (FIPS 186-5) and the algorithm of its signatures (RFC 7518 §3.4).
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

/** What a certificate says of itself, read once. */
export interface Certificate {
  /** DNS names and IP addresses of the subjectAltName, lower-case, in the certificate's order. */
  readonly names: readonly string[];
  readonly notBefore: Date;
  readonly notAfter: Date;
  /**
   * The identifier under which a CA is asked for renewal information (RFC 9773 §4.1): key identifier of the authority
   * and serial number, as they stand in the certificate, leading zero included. Absent where it names no authority key.
   */
  readonly id?: string;
  /** SHA-256 of the DER, lower-case hexadecimal without colons. */
  readonly fingerprint: string;
  /** Absent where its key is of another kind. */
  readonly keySpec?: KeySpec;
  /** Issuer and subject are the same. */
  readonly selfSigned: boolean;
  /** The organization that issued it, or its common name where it names none. */
  readonly issuer: string;
}

/** A chain from the CA that is not what was asked for; the message says in which respect. */
export class ChainError extends Error {
  override readonly name = "ChainError";
  /** `isDated`: one of the two clocks may be wrong. */
  constructor(message: string, readonly isDated = false) {
    super(message);
  }
}

const PEM_BEGIN = "-----BEGIN CERTIFICATE-----";
const PEM_END = "-----END CERTIFICATE-----";

/** Of a DNS name 253 characters are possible (RFC 1035 §3.1), of an organization 64 (RFC 5280 A.1). */
const LONGEST_NAME = 300;
/** An EC point of P-256, compressed. */
const SHORTEST_KEY = 33;
/** Let's Encrypt's longest chains have had four certificates. */
const LONGEST_CHAIN = 10;
/** What cannot be delivered everywhere before it expires is of no use. */
const LEAST_LIFE_MINUTES = 5;
/** How far the CA's clock may be ahead of ours: an hour, which is what Let's Encrypt back-dates by. */
const CLOCK_SKEW_MINUTES = 60;
/** id-kp-serverAuth and anyExtendedKeyUsage (RFC 5280 §4.2.1.12), in hexadecimal. */
const FOR_SERVERS = ["2b06010505070301", "551d2500"];
/** RSA with SHA-1 and with MD5, ECDSA with SHA-1 (RFC 3279 §2.2), in hexadecimal. */
const WEAK_SIGNATURES = ["2a864886f70d010105", "2a864886f70d010104", "2a8648ce3d0401"];

// ---- PEM ---------------------------------------------------------------------------------------------------------

/** One block of a PEM text (RFC 7468), `pem` from its first marker to its last, which begins at `start`. */
export interface PemBlock {
  readonly label: string;
  readonly pem: string;
  readonly start: number;
}

/** The blocks of a PEM text, from one marker to the next: no pattern over the whole, which a large file would defeat. */
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

/** DER of the first certificate in `pem`. Throws where there is none in base64. */
export function certificateDer(pem: string): Uint8Array {
  const start = pem.indexOf(PEM_BEGIN); // pemBlocks() takes three times as long
  const end = pem.indexOf(PEM_END, start);
  if (start < 0 || end < 0) throw new Error("not a PEM certificate");
  return Uint8Array.fromBase64(pem.slice(start + PEM_BEGIN.length, end));
}

/** The bytes of the PEM private key, of which it is only made sure that none are missing or left over. */
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

/** What the first certificate in `pem` says of itself. Throws where there is none that can be read. */
export function readCertificate(pem: string): Certificate {
  return factsOf(certificateDer(pem));
}

function factsOf(der: Uint8Array): Certificate {
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

/** RFC 5280 §4.2.1.6; harmless for a terminal, since any stranger's certificate may be read here. */
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

/** See `Certificate.id`. */
function certificateId(der: Uint8Array, serial: Element, extensions?: Element): string | undefined {
  const base64url = ({ start, end }: Element) =>
    der.subarray(start, end).toBase64({ alphabet: "base64url", omitPadding: true });
  const authority = extensionOf(der, extensions, AUTHORITY_KEY_IDENTIFIER);
  const identifier = authority && children(der, authority).find(({ tag }) => tag === 0x80);
  return identifier && `${base64url(identifier)}.${base64url(serial)}`;
}

const decoder = new TextDecoder();

/** The first attribute of a kind in a name (RFC 5280 §4.1.2.4), harmless for a terminal. */
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

/** A certificate of a chain: its bytes, what it says, and node:crypto's view of it. */
interface Link {
  readonly der: Uint8Array;
  readonly facts: Certificate;
  readonly judge: nodeCrypto.X509Certificate;
}

/**
 * Makes sure that a chain received is what was asked for, as far as that shows without a list of roots: its leaf is for
 * exactly `names`, for `keyPem` and for TLS servers; each certificate is valid now, for some time still, and issued by the
 * next, which is an authority. Returns the leaf, and the chain written anew; throws ChainError.
 */
export function checkChain(
  text: string,
  names: readonly string[],
  keyPem: string,
  now: Date,
): { readonly leaf: Certificate; readonly chainPem: string } {
  const chain = readChain(text);
  const chainPem = chain.map(({ judge }) => toPem("CERTIFICATE", judge.raw)).join("");
  const { der, facts: leaf, judge } = chain[0]!;
  if (!isKeyOf(keyPem, chainPem)) throw new ChainError("the certificate is for another key");
  if (!coversExactly(leaf, names)) {
    const more = leaf.names.length > 10 ? ` and ${leaf.names.length - 10} more` : "";
    throw new ChainError(`the certificate is for other names: ${leaf.names.slice(0, 10).join(" ")}${more}`);
  }
  if (judge.ca) throw new ChainError("the certificate is that of an authority");
  const usage = extensionOf(der, certificateFields(der).extensions, EXTENDED_KEY_USAGE);
  if (usage !== undefined && !children(der, usage).some((one) => FOR_SERVERS.includes(hexOf(der, one)))) {
    throw new ChainError("the certificate is not for TLS servers");
  }
  chain.forEach((each, index) => checkLink(each, chain[index + 1], index, now));
  return { leaf, chainPem };
}

/**
 * The certificates of a chain as the CA sent it (RFC 8555 §9.1): nothing but white space stands around them, since
 * whatever else were kept would be delivered with them, a private key of the CA's choice first of all (§11.4).
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
  if (text.slice(end).trim() !== "") throw new ChainError("text behind the certificates");
  try {
    return blocks.map(({ pem }) => {
      const der = certificateDer(pem);
      return { der, facts: factsOf(der), judge: new nodeCrypto.X509Certificate(pem) };
    });
  } catch {
    throw new ChainError("a certificate that cannot be parsed");
  }
}

/** One certificate of a chain and the one behind it, its issuer. */
function checkLink({ der, facts, judge }: Link, issuer: Link | undefined, index: number, now: Date): void {
  const what = index === 0 ? "the certificate" : `certificate ${index + 1} of the chain`;
  const { notBefore, notAfter, selfSigned } = facts;
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
  if (index > 0 && !judge.ca) throw new ChainError(`${what} is not that of an authority`);
  const [algorithm] = children(der, certificateFields(der).algorithm);
  if (algorithm && WEAK_SIGNATURES.includes(hexOf(der, algorithm)) && !selfSigned) {
    throw new ChainError(`${what} is signed with SHA-1 or MD5`);
  }
  if (issuer === undefined) return;
  if (!judge.checkIssued(issuer.judge) || !isSignedBy(judge, issuer.judge)) {
    throw new ChainError(`broken chain: certificate ${index + 1} is not issued by certificate ${index + 2}`);
  }
}

/** Whether the signature is right; taken for right where Deno cannot check it (P-521, RSASSA-PSS). */
function isSignedBy(certificate: nodeCrypto.X509Certificate, issuer: nodeCrypto.X509Certificate): boolean {
  try {
    return certificate.verify(issuer.publicKey);
  } catch {
    return true;
  }
}

/** Common name of the issuer of the last certificate of a chain, the root by which it is known. */
export function rootOf(chainPem: string): string | undefined {
  const last = pemBlocks(chainPem).at(-1);
  try {
    const der = certificateDer(last?.pem ?? "");
    return attributeOf(der, certificateFields(der).issuer, COMMON_NAME);
  } catch {
    return undefined; // checkChain says what is wrong with it
  }
}

// ---- keys --------------------------------------------------------------------------------------------------------

/**
 * Whether `keyPem` (PKCS#8, PKCS#1 or SEC1) is the private key of the first certificate in `certPem`. Throws where one of
 * them cannot be read.
 *
 * Every one of those formats normally holds the public half as the very bytes that stand in the certificate, so
 * searching for them decides almost always; only where they are absent is the key itself built, which costs a hundred
 * times more.
 */
export function isKeyOf(keyPem: string, certPem: string): boolean {
  const der = certificateDer(certPem);
  const { publicKey } = certificateFields(der);
  const bits = publicBits(der, publicKey);
  if (privateKeyDer(keyPem).includes(bits)) return bits.length >= SHORTEST_KEY; // nothing is included everywhere
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

/** Of a SubjectPublicKeyInfo, what a private key repeats: an EC point, or modulus and exponent of RSA. */
function publicBits(der: Uint8Array, spki: Element): Uint8Array {
  const bitString = element(der, element(der, spki.start).end);
  const bits = bitString.start + 1; // behind the count of unused bits
  return der.subarray(der[bits] === 0x30 ? element(der, bits).start : bits, bitString.end);
}

/** Whether `pem` is an unencrypted private key that can be used. */
export function isPrivateKey(pem: string): boolean {
  try {
    return ["rsa", "ec"].includes(nodeCrypto.createPrivateKey(pem).asymmetricKeyType ?? "");
  } catch {
    return false;
  }
}

/**
 * What kind of key is in `pem` (PKCS#8, PKCS#1 or SEC1), or the name of the kind where it is one that neither
 * certificates nor accounts have here. Throws where it cannot be decoded.
 */
export function keySpecOf(pem: string): KeySpec | string {
  const spec = declaredKeySpec(privateKeyDer(pem));
  if (spec !== undefined) return spec;
  const { asymmetricKeyType: type, asymmetricKeyDetails } = nodeCrypto.createPrivateKey(pem);
  const { modulusLength, namedCurve } = asymmetricKeyDetails ?? {};
  const curve = CURVES.find(({ names: [name] }) => name === namedCurve)?.curve;
  if (type === "rsa" && modulusLength !== undefined) return { type, bits: modulusLength };
  return curve === undefined ? namedCurve ?? type! : { type: "ec", curve };
}

/** What a private key says that it is (RFC 5208, RFC 8017 A.1.2, RFC 5915), which is hardly ever left out. */
function declaredKeySpec(der: Uint8Array): KeySpec | undefined {
  const [, second, third] = children(der, element(der, 0));
  if (second?.tag === 0x02) return rsaSpec(der, second);
  if (second === undefined || third === undefined) return undefined;
  if (second.tag === 0x04) return third.tag === 0xa0 ? ecSpec(der, children(der, third)[0]) : undefined;
  return algorithmSpec(der, second, () => children(der, element(der, third.start))[1]);
}

/** The kind of key in a SubjectPublicKeyInfo. */
function publicKeySpec(der: Uint8Array, spki: Element): KeySpec | undefined {
  const [algorithm, bits] = children(der, spki);
  if (algorithm === undefined || bits === undefined) return undefined;
  return algorithmSpec(der, algorithm, () => children(der, element(der, bits.start + 1))[0]);
}

/** By an AlgorithmIdentifier (RFC 3279 §2.3), in which a curve stands; an RSA modulus stands elsewhere. */
function algorithmSpec(
  der: Uint8Array,
  algorithm: Element,
  modulus: () => Element | undefined,
): KeySpec | undefined {
  const [id, parameters] = children(der, algorithm);
  const hex = id && hexOf(der, id);
  if (hex === "2a864886f70d010101") return rsaSpec(der, modulus());
  if (hex === "2a8648ce3d0201") return ecSpec(der, parameters);
}

function rsaSpec(der: Uint8Array, modulus: Element | undefined): KeySpec | undefined {
  if (modulus === undefined) return undefined;
  let { start } = modulus;
  while (der[start] === 0 && start < modulus.end) start++;
  return { type: "rsa", bits: 8 * (modulus.end - start) + 24 - Math.clz32(der[start]!) };
}

function ecSpec(der: Uint8Array, id: Element | undefined): KeySpec | undefined {
  const known = id && CURVES.find((one) => one.id === hexOf(der, id));
  return known && { type: "ec", curve: known.curve };
}

/** One for each processor: were all RSA keys made at once, nothing else would get its turn. */
const makers = limit(navigator.hardwareConcurrency);

/** A new private key in PKCS#8 PEM. RSA is slow (0.1 s and more) but is made off the main thread. */
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

/** Private and public half of a PEM private key in any of the three formats. Throws where it is no RSA or EC key. */
async function importKeyPair(keyPem: string): Promise<{ keys: CryptoKeyPair; hash: string }> {
  const key = nodeCrypto.createPrivateKey(keyPem);
  const curve = CURVES.find(({ names: [name] }) => name === key.asymmetricKeyDetails?.namedCurve);
  if (key.asymmetricKeyType !== "rsa" && curve === undefined) throw new Error("neither an RSA nor an EC key");
  const hash = curve?.hash ?? "SHA-256"; // for RSA of any size
  const algorithm = curve === undefined
    ? { name: "RSASSA-PKCS1-v1_5", hash }
    : { name: "ECDSA", namedCurve: curve.curve };
  const half = (kind: "pkcs8" | "spki", from: KeyObject, usage: KeyUsage) =>
    crypto.subtle.importKey(
      kind,
      Uint8Array.from(from.export({ type: kind, format: "der" } as never) as unknown as Uint8Array),
      algorithm,
      true,
      [usage],
    );
  const [privateKey, publicKey] = await Promise.all([
    half("pkcs8", key, "sign"),
    half("spki", nodeCrypto.createPublicKey(key), "verify"),
  ]);
  return { keys: { privateKey, publicKey }, hash };
}

/**
 * A CSR for `names` (DNS names and IP addresses) signed by `keyPem`, as DER for the CA and PEM for the file.
 * The first name is also the common name where it can be one: a DNS name of at most 64 characters (RFC 5280 A.1).
 */
export async function createCsr(
  keyPem: string,
  names: readonly string[],
): Promise<{ der: Uint8Array; pem: string }> {
  await import("reflect-metadata");
  const x509 = await import("@peculiar/x509");
  const { keys, hash } = await importKeyPair(keyPem);
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

/** The parts of a certificate that are needed here (RFC 5280 §4.1). */
function certificateFields(der: Uint8Array) {
  const certificate = element(der, 0);
  const fields = children(der, element(der, certificate.start));
  // the version, tagged [0], may be left out; the fields up to the public key may not
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

/** What an extension holds. */
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

/** A DER element: its tag, where it begins, and where its content starts and ends. */
interface Element {
  readonly tag: number;
  readonly offset: number;
  readonly start: number;
  readonly end: number;
}

/** The elements within one. */
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

/** The DER element at `offset` (X.690 §8.1.3; lengths below 16 MiB). Throws where it is not there whole. */
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
