/**
 * Keys, certificate signing requests, and the facts that a certificate states.
 *
 * Works on text and bytes alone: it knows neither files nor the network. A run reads all certificates and mostly has
 * nothing else to do, so what stands in them is read here, byte by byte; whether it is true, and all that keys do, is
 * left to `node:crypto` and to `@peculiar/x509`, which no other file imports; both are loaded when they are first needed.
 *
 * RFC 5280 (certificates), RFC 2986 (CSRs), RFC 5958 (PKCS#8), RFC 9773 §4.1 (certificate identifiers).
 */

import type { KeyObject } from "node:crypto";
import defer * as nodeCrypto from "node:crypto";
import { isIP, toIPv6 } from "./names.ts";

/** What key to make. */
export type KeySpec = { readonly type: "rsa"; readonly bits: number } | {
  readonly type: "ec";
  readonly curve: "P-256" | "P-384" | "P-521";
};

/** What a certificate says of itself. */
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
  /** Issuer and subject are the same. */
  readonly selfSigned: boolean;
  /** The organization that issued it, or its common name where it names none. */
  readonly issuer: string;
}

/** A chain from the CA that is not what was asked for; the message says in which respect. */
export class ChainError extends Error {
  override readonly name = "ChainError";
}

const PEM_BEGIN = "-----BEGIN CERTIFICATE-----";
const PEM_END = "-----END CERTIFICATE-----";
const PEM_PRIVATE_KEY = /-----BEGIN ((?:RSA |EC )?PRIVATE KEY)-----([^-]+)-----END \1-----/;

/** How far the CA's clock may be ahead of ours: an hour, which is what Let's Encrypt back-dates by. */
const CLOCK_SKEW_MS = 3600_000;

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

/** What the first certificate in `pem` says of itself. Throws where there is none that can be read. */
export function readCertificate(pem: string): Certificate {
  const der = certificateDer(pem);
  const { serial, issuer, validity, subject, extensions } = certificateFields(der);
  const [notBefore, notAfter] = children(der, validity).map((time) => timeOf(der, time));
  if (notBefore === undefined || notAfter === undefined) throw new Error("a certificate without dates");
  const names = extensionOf(der, extensions, SUBJECT_ALT_NAME);
  return {
    names: names === undefined ? [] : children(der, names).map((name) => generalName(der, name)),
    notBefore,
    notAfter,
    id: certificateId(der, serial, extensions),
    fingerprint: sha256(der),
    selfSigned: hexOf(der, issuer) === hexOf(der, subject),
    issuer: attributeOf(der, issuer, ORGANIZATION) ?? attributeOf(der, issuer, COMMON_NAME) ?? "",
  };
}

/** SHA-256 in lower-case hexadecimal. */
export function sha256(data: string | Uint8Array): string {
  return nodeCrypto.createHash("sha256").update(data).digest("hex");
}

/** SHA-256 of the public key (SubjectPublicKeyInfo) of a certificate or a private key, in hexadecimal. */
export function publicKeyHash(pem: string): string {
  const key = pem.includes(PEM_BEGIN)
    ? new nodeCrypto.X509Certificate(pem).publicKey
    : nodeCrypto.createPublicKey(pem);
  return sha256(key.export({ type: "spki", format: "der" }));
}

function hexOf(der: Uint8Array, { start, end }: Element): string {
  return der.subarray(start, end).toHex();
}

/** The last octets of id-at-commonName (2.5.4.3) and id-at-organizationName (2.5.4.10). */
const COMMON_NAME = 3, ORGANIZATION = 10;

/** The first attribute of a kind in a name (RFC 5280 §4.1.2.4), harmless for a terminal. */
function attributeOf(der: Uint8Array, name: Element, last: number): string | undefined {
  for (const attribute of children(der, name).flatMap((set) => children(der, set))) {
    const [oid, value] = children(der, attribute);
    const { start, end } = oid!;
    if (end - start === 3 && der[start] === 0x55 && der[start + 1] === 4 && der[start + 2] === last) {
      return new TextDecoder().decode(der.subarray(value!.start, value!.end)).replace(/\p{C}/gu, "?").slice(
        0,
        100,
      );
    }
  }
}

/** DER of the first certificate in `pem`. Throws where there is none in base64. */
export function certificateDer(pem: string): Uint8Array {
  const start = pem.indexOf(PEM_BEGIN);
  const end = pem.indexOf(PEM_END, start);
  if (start < 0 || end < 0) throw new Error("not a PEM certificate");
  return Uint8Array.fromBase64(pem.slice(start + PEM_BEGIN.length, end));
}

/** RFC 5280 §4.2.1.6; harmless for a terminal, since any stranger's certificate may be read here. */
function generalName(der: Uint8Array, { tag, start, end }: Element): string {
  const bytes = der.subarray(start, end);
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

function ascii(bytes: Uint8Array): string {
  return String.fromCharCode(...bytes);
}

/** Whether `certificate` is for exactly `names`, whatever their order. */
export function coversExactly(certificate: Certificate, names: readonly string[]): boolean {
  const certified = new Set(certificate.names);
  return certified.size === names.length && names.every((name) => certified.has(name));
}

/**
 * Whether `keyPem` (PKCS#8, PKCS#1 or SEC1) is the private key of the certificate. Throws where it is no readable key.
 *
 * Every one of those formats normally holds the public half as the very bytes that stand in the certificate, so
 * looking for them decides almost always; only where they are absent is the key itself built, which costs a hundred
 * times more.
 */
export function isKeyOf(keyPem: string, certPem: string): boolean {
  const der = certificateDer(certPem);
  const spki = certificateFields(der).publicKey;
  if (privateKeyDer(keyPem).includes(publicBits(der, spki))) return true;
  const own = nodeCrypto.createPublicKey(nodeCrypto.createPrivateKey(keyPem)).export({
    type: "spki",
    format: "der",
  });
  return own.equals(der.subarray(spki.offset, spki.end));
}

/** The curves by their identifiers (SEC 2 §A.2, in hexadecimal) and by OpenSSL's names. */
const CURVES = [
  { curve: "P-256", id: "2a8648ce3d030107", name: "prime256v1" },
  { curve: "P-384", id: "2b81040022", name: "secp384r1" },
  { curve: "P-521", id: "2b81040023", name: "secp521r1" },
] as const;

/**
 * What kind of key is in `pem` (PKCS#8, PKCS#1 or SEC1), or the name of the kind where it is one that neither
 * certificates nor accounts have here. Throws where it cannot be decoded.
 */
export function keySpecOf(pem: string): KeySpec | string {
  const spec = declaredKeySpec(privateKeyDer(pem));
  if (spec !== undefined) return spec;
  const { asymmetricKeyType: type, asymmetricKeyDetails } = nodeCrypto.createPrivateKey(pem);
  const { modulusLength, namedCurve } = asymmetricKeyDetails ?? {};
  const curve = CURVES.find(({ name }) => name === namedCurve)?.curve;
  if (type === "rsa" && modulusLength !== undefined) return { type, bits: modulusLength };
  return curve === undefined ? namedCurve ?? type! : { type: "ec", curve };
}

/** What a private key says that it is (RFC 5208, RFC 8017 A.1.2, RFC 5915), which is hardly ever left out. */
function declaredKeySpec(der: Uint8Array): KeySpec | undefined {
  const hex = (one: Element | undefined) => one && der.subarray(one.start, one.end).toHex();
  const rsa = (modulus: Element | undefined): KeySpec | undefined =>
    modulus && { type: "rsa", bits: BigInt(`0x${hex(modulus)}`).toString(2).length };
  const ec = (id: Element | undefined): KeySpec | undefined => {
    const known = CURVES.find((one) => one.id === hex(id));
    return known && { type: "ec", curve: known.curve };
  };
  const [, second, third] = children(der, element(der, 0));
  if (second?.tag === 0x02) return rsa(second);
  if (second === undefined || third === undefined) return undefined;
  if (second.tag === 0x04) return ec(third.tag === 0xa0 ? children(der, third)[0] : undefined);
  const [algorithm, parameters] = children(der, second);
  if (hex(algorithm) === "2a864886f70d010101") return rsa(children(der, element(der, third.start))[1]);
  if (hex(algorithm) === "2a8648ce3d0201") return ec(parameters);
}

/** Whether `pem` is an unencrypted private key that can be used. */
export function isPrivateKey(pem: string): boolean {
  try {
    return ["rsa", "ec"].includes(nodeCrypto.createPrivateKey(pem).asymmetricKeyType ?? "");
  } catch {
    return false;
  }
}

/** The parts of a certificate that are needed here (RFC 5280 §4.1). */
function certificateFields(
  der: Uint8Array,
): {
  serial: Element;
  issuer: Element;
  validity: Element;
  subject: Element;
  publicKey: Element;
  extensions?: Element;
} {
  const certificate = element(der, 0);
  const fields = children(der, element(der, certificate.start));
  // the version, tagged [0], may be left out; the fields up to the public key may not
  const first = fields[0]?.tag === 0xa0 ? 1 : 0;
  const [serial, , issuer, validity, subject, publicKey] = fields.slice(first);
  if (serial === undefined || !issuer || !validity || !subject || publicKey === undefined) {
    throw new Error("not a certificate");
  }
  const tagged = fields.find(({ tag }) => tag === 0xa3);
  return { serial, issuer, validity, subject, publicKey, extensions: tagged && element(der, tagged.start) };
}

/** The last octets of id-ce-subjectAltName (2.5.29.17) and id-ce-authorityKeyIdentifier (2.5.29.35). */
const SUBJECT_ALT_NAME = 17, AUTHORITY_KEY_IDENTIFIER = 35;

/** What an extension holds. */
function extensionOf(der: Uint8Array, extensions: Element | undefined, last: number): Element | undefined {
  for (const extension of extensions === undefined ? [] : children(der, extensions)) {
    const [oid, ...rest] = children(der, extension);
    const { start, end } = oid!;
    if (end - start === 3 && der[start] === 0x55 && der[start + 1] === 0x1d && der[start + 2] === last) {
      return element(der, rest.at(-1)!.start); // within an OCTET STRING
    }
  }
}

/** See `Certificate.id`. */
function certificateId(der: Uint8Array, serial: Element, extensions?: Element): string | undefined {
  const base64url = ({ start, end }: Element) =>
    der.subarray(start, end).toBase64({ alphabet: "base64url", omitPadding: true });
  const authority = extensionOf(der, extensions, AUTHORITY_KEY_IDENTIFIER);
  const identifier = authority && children(der, authority).find(({ tag }) => tag === 0x80);
  return identifier && `${base64url(identifier)}.${base64url(serial)}`;
}

/** The bytes of the PEM private key, of which it is only made sure that none are missing or left over. */
function privateKeyDer(pem: string): Uint8Array & { includes(bytes: Uint8Array): boolean } {
  const encoded = PEM_PRIVATE_KEY.exec(pem)?.[2];
  if (encoded === undefined) throw new Error("not an unencrypted PEM private key");
  const der = Buffer.from(encoded, "base64");
  if (der[0] !== 0x30 || element(der, 0).end !== der.length) throw new Error("truncated private key");
  return der as unknown as Uint8Array & { includes(bytes: Uint8Array): boolean };
}

/** Of a SubjectPublicKeyInfo, what a private key repeats: an EC point, or modulus and exponent of RSA. */
function publicBits(der: Uint8Array, spki: Element): Uint8Array {
  const bitString = element(der, element(der, spki.start).end);
  const bits = bitString.start + 1; // behind the count of unused bits
  return der.subarray(der[bits] === 0x30 ? element(der, bits).start : bits, bitString.end);
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

/** One for each processor: were all RSA keys made at once, nothing else would get its turn. */
const makers = Array.from({ length: navigator.hardwareConcurrency }, () => Promise.resolve());
let nextMaker = 0;

/** A new private key in PKCS#8 PEM. RSA is slow (0.1 s and more) but is made off the main thread. */
export function generateKey(spec: KeySpec): Promise<string> {
  if (spec.type === "ec") return makeKey(spec);
  const maker = nextMaker++ % makers.length;
  const key = makers[maker]!.then(() => makeKey(spec));
  makers[maker] = key.then(() => {}, () => {});
  return key;
}

async function makeKey(spec: KeySpec): Promise<string> {
  const pair = await crypto.subtle.generateKey(keyAlgorithm(spec), true, ["sign", "verify"]) as CryptoKeyPair;
  return pem("PRIVATE KEY", await crypto.subtle.exportKey("pkcs8", pair.privateKey));
}

function keyAlgorithm(spec: KeySpec) {
  return spec.type === "ec" ? { name: "ECDSA", namedCurve: spec.curve } : {
    name: "RSASSA-PKCS1-v1_5",
    modulusLength: spec.bits,
    publicExponent: new Uint8Array([1, 0, 1]),
    hash: "SHA-256",
  };
}

/** Private and public half of a PEM private key in any of the three formats. Throws where it is no RSA or EC key. */
async function importKeyPair(keyPem: string): Promise<{ keys: CryptoKeyPair; hash: string }> {
  const key = nodeCrypto.createPrivateKey(keyPem);
  const curve = CURVES.find(({ name }) => name === key.asymmetricKeyDetails?.namedCurve)?.curve;
  if (key.asymmetricKeyType !== "rsa" && curve === undefined) throw new Error("neither an RSA nor an EC key");
  // the digest that goes with the curve (FIPS 186-5); SHA-256 for RSA of any size
  const hash = curve === "P-384" ? "SHA-384" : curve === "P-521" ? "SHA-512" : "SHA-256";
  const algorithm = curve === undefined
    ? { name: "RSASSA-PKCS1-v1_5", hash }
    : { name: "ECDSA", namedCurve: curve };
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
  return { der: new Uint8Array(csr.rawData), pem: pem("CERTIFICATE REQUEST", csr.rawData) };
}

/**
 * The certificates of a chain as the CA sent it (RFC 8555 §9.1): nothing but white space stands around them, since
 * whatever else were kept would be delivered with them, a private key of the CA's choice first of all (§11.4).
 */
function readChain(text: string): nodeCrypto.X509Certificate[] {
  const blocks = pemBlocks(text);
  if (blocks.length === 0) throw new ChainError("no certificate in the answer");
  let end = 0;
  for (const { label, pem, start } of blocks) {
    if (label !== "CERTIFICATE") throw new ChainError(`a ${label} among the certificates`);
    if (text.slice(end, start).trim() !== "") throw new ChainError("text between the certificates");
    end = start + pem.length;
  }
  if (text.slice(end).trim() !== "") throw new ChainError("text behind the certificates");
  try {
    return blocks.map(({ pem }) => new nodeCrypto.X509Certificate(pem));
  } catch {
    throw new ChainError("a certificate that cannot be parsed");
  }
}

/**
 * Makes sure that a chain received is what was asked for: it parses, its leaf is for exactly `names` and for `keyPem`
 * and valid now, and each certificate is signed by the next. Returns the leaf, and the chain written anew; throws
 * ChainError.
 */
export function checkChain(
  text: string,
  names: readonly string[],
  keyPem: string,
  now: Date,
): { readonly leaf: Certificate; readonly chainPem: string } {
  const chain = readChain(text);
  const chainPem = chain.map(({ raw }) => pem("CERTIFICATE", raw)).join("");
  const leaf = readCertificate(chainPem);
  if (!isKeyOf(keyPem, chainPem)) throw new ChainError("the certificate is for another key");
  if (!coversExactly(leaf, names)) {
    throw new ChainError(`the certificate is for other names: ${leaf.names.join(" ")}`);
  }
  if (leaf.notAfter <= now) throw new ChainError(`the certificate expired at ${leaf.notAfter.toISOString()}`);
  if (leaf.notBefore.getTime() > now.getTime() + CLOCK_SKEW_MS) {
    throw new ChainError(
      `the certificate is not valid before ${leaf.notBefore.toISOString()}; is this clock right?`,
    );
  }
  for (let i = 0; i + 1 < chain.length; i++) {
    const [subject, issuer] = [chain[i]!, chain[i + 1]!];
    if (!subject.checkIssued(issuer) || !subject.verify(issuer.publicKey)) {
      throw new ChainError(`broken chain: certificate ${i + 1} is not issued by certificate ${i + 2}`);
    }
  }
  return { leaf, chainPem };
}

/** Common name of the issuer of the last certificate of a chain, the root by which it is known. */
export function rootOf(chainPem: string): string | undefined {
  const last = pemBlocks(chainPem).at(-1);
  if (last === undefined) return undefined;
  try {
    return /^CN=(.*)$/m.exec(new nodeCrypto.X509Certificate(last.pem).issuer)?.[1];
  } catch {
    return undefined; // checkChain says what is wrong with it
  }
}

function pem(label: string, der: ArrayBuffer | Uint8Array): string {
  const lines = Buffer.from(der as ArrayBuffer).toString("base64").match(/.{1,64}/g) ?? [];
  return `-----BEGIN ${label}-----\n${lines.join("\n")}\n-----END ${label}-----\n`;
}
