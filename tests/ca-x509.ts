/**
 * X.509 for the test CA: reads certificate requests (RFC 2986), writes certificates (RFC 5280). By hand, because the CA
 * judges what `lib/` makes with @peculiar/x509, and because a leaf then costs no more than its signature.
 */
import { Buffer } from "node:buffer";
import {
  createHash,
  createPublicKey,
  generateKeyPairSync,
  type KeyObject,
  randomBytes,
  sign,
  verify,
} from "node:crypto";
import { isIP } from "node:net";
import type { Identifier } from "./ca-jws.ts";

type Bytes = Uint8Array<ArrayBuffer>;

const SEQUENCE = 0x30, SET = 0x31, BOOLEAN = 0x01, INTEGER = 0x02, BIT_STRING = 0x03, OCTET_STRING = 0x04;
const OID = 0x06, UTF8_STRING = 0x0c, UTC_TIME = 0x17, GENERALIZED_TIME = 0x18;

/** Object identifiers by the hexadecimal form of their DER content. */
const OIDS = {
  commonName: "550403",
  subjectKeyIdentifier: "551d0e",
  keyUsage: "551d0f",
  subjectAltName: "551d11",
  basicConstraints: "551d13",
  authorityKeyIdentifier: "551d23",
  extendedKeyUsage: "551d25",
  serverAuth: "2b06010505070301",
  extensionRequest: "2a864886f70d01090e",
  ecdsaWithSha256: "2a8648ce3d040302",
} as const;

const HASH_OF_SIGNATURE: Readonly<Record<string, string>> = {
  "2a864886f70d01010b": "sha256", // sha256WithRSAEncryption
  "2a8648ce3d040302": "sha256", // ecdsa-with-SHA256
  "2a8648ce3d040303": "sha384",
  "2a8648ce3d040304": "sha512",
};

function der(tag: number, ...parts: readonly Uint8Array[]): Bytes {
  const size = parts.reduce((sum, part) => sum + part.length, 0);
  const length = size < 0x80 ? [size] : size < 0x100 ? [0x81, size] : [0x82, size >> 8, size & 0xff];
  if (size > 0xffff) throw new RangeError("DER value too long");
  return new Uint8Array(Buffer.concat([Uint8Array.of(tag, ...length), ...parts]));
}

const fromHex = (hex: string) => new Uint8Array(Buffer.from(hex, "hex"));
const toHex = (bytes: Uint8Array) => Buffer.from(bytes).toString("hex");
const text = (value: string) => new TextEncoder().encode(value);
const oid = (name: keyof typeof OIDS) => der(OID, fromHex(OIDS[name]));
const TRUE = der(BOOLEAN, Uint8Array.of(0xff));

interface Element {
  readonly tag: number;
  readonly content: Uint8Array;
  /** Tag and length included. */
  readonly whole: Uint8Array;
}

/** Splits DER into the elements that follow each other in it; throws what is no DER. */
function elements(bytes: Uint8Array): Element[] {
  const found: Element[] = [];
  for (let at = 0; at < bytes.length;) {
    const start = at;
    const tag = bytes[at++]!;
    let length = bytes[at++] ?? -1;
    if (length > 0x80 && length <= 0x83) {
      const octets = bytes.subarray(at, at += length & 0x7f);
      length = octets.reduce((value, octet) => value * 256 + octet, 0);
    }
    if (length < 0 || length === 0x80 || length > 0xffffff || at + length > bytes.length) {
      throw new Error("not DER");
    }
    found.push({ tag, content: bytes.subarray(at, at + length), whole: bytes.subarray(start, at + length) });
    at += length;
  }
  return found;
}

/** The elements inside `element`, which must have this tag. */
function inside(element: Element | undefined, tag: number): Element[] {
  if (element?.tag !== tag) throw new Error(`expected DER tag ${tag}, found ${element?.tag ?? "nothing"}`);
  return elements(element.content);
}

/** An IP address in the one form that identifiers use: dotted decimal, or RFC 5952; undefined if it is none. */
export function canonicalIp(value: string): string | undefined {
  if (isIP(value) === 4) return value; // isIP() refuses leading zeros
  return isIP(value) === 6 ? new URL(`http://[${value}]/`).hostname.slice(1, -1) : undefined;
}

/** The octets of an IP address. */
export function ipOctets(address: string): Uint8Array {
  if (isIP(address) === 4) return Uint8Array.from(address.split("."), Number);
  const [head = "", tail] = address.split("::");
  const groups = (part: string) => part === "" ? [] : part.split(":").map((group) => parseInt(group, 16));
  const left = groups(head), right = groups(tail ?? "");
  const all = [...left, ...Array<number>(8 - left.length - right.length).fill(0), ...right];
  return Uint8Array.from(all.flatMap((group) => [group >> 8, group & 0xff]));
}

function ipText(octets: Uint8Array): string {
  if (octets.length === 4) return octets.join(".");
  if (octets.length !== 16) throw new Error("an IP address of neither 4 nor 16 octets");
  return canonicalIp(toHex(octets).match(/.{4}/g)!.join(":"))!;
}

/** What a certificate request asks for. */
export interface Request {
  readonly commonNames: readonly string[];
  /** The subject alternative names, in their order; duplicates kept. */
  readonly identifiers: readonly Identifier[];
  readonly publicKey: KeyObject;
}

/** Reads a DER certificate request and verifies its own signature; throws an Error that says what is wrong. */
export function readRequest(bytes: Uint8Array): Request {
  const top = elements(bytes);
  if (top.length !== 1) throw new Error("not one DER value");
  const [info, algorithm, signature] = inside(top[0], SEQUENCE);
  const [version, subject, spki, attributes] = inside(info, SEQUENCE);
  if (version?.tag !== INTEGER || toHex(version.content) !== "00") {
    throw new Error("not version 1 of PKCS #10");
  }

  const publicKey = createPublicKey({ key: Buffer.from(spki!.whole), format: "der", type: "spki" });
  const hash = HASH_OF_SIGNATURE[toHex(inside(algorithm, SEQUENCE)[0]!.content)];
  if (hash === undefined) throw new Error("signed with an algorithm that is not allowed");
  if (signature?.tag !== BIT_STRING || !verify(hash, info!.whole, publicKey, signature.content.subarray(1))) {
    throw new Error("its signature does not verify");
  }

  const commonNames = inside(subject, SEQUENCE).flatMap((set) => inside(set, SET)).flatMap((attribute) => {
    const [type, value] = inside(attribute, SEQUENCE);
    return toHex(type!.content) === OIDS.commonName ? [new TextDecoder().decode(value!.content)] : [];
  });
  const identifiers = attributes === undefined ? [] : elements(attributes.content).flatMap((attribute) => {
    const [type, values] = inside(attribute, SEQUENCE);
    if (toHex(type!.content) !== OIDS.extensionRequest) return [];
    return inside(inside(values, SET)[0], SEQUENCE).flatMap(readAlternativeNames);
  });
  return { commonNames, identifiers, publicKey };
}

function readAlternativeNames(extension: Element): Identifier[] {
  const parts = inside(extension, SEQUENCE);
  if (toHex(parts[0]!.content) !== OIDS.subjectAltName) return [];
  return inside(elements(parts.at(-1)!.content)[0], SEQUENCE).map(({ tag, content }) => {
    if (tag === 0x82) return { type: "dns", value: new TextDecoder().decode(content) };
    if (tag === 0x87) return { type: "ip", value: ipText(content) };
    throw new Error(`a subject alternative name that is neither a DNS name nor an IP address (tag ${tag})`);
  });
}

/** A name and a P-256 key that sign certificates; the same authority can have several of its own (cross-signing). */
export interface Authority {
  readonly commonName: string;
  readonly privateKey: KeyObject;
  readonly publicKey: KeyObject;
  /** The 20 octets of its subject key identifier (RFC 7093 §2, method 1). */
  readonly keyId: Buffer;
}

/** A new authority with a new key. */
export function createAuthority(commonName: string): Authority {
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  return { commonName, privateKey, publicKey, keyId: keyIdOf(publicKey) };
}

function keyIdOf(publicKey: KeyObject): Buffer {
  const bits = elements(elements(spkiOf(publicKey))[0]!.content)[1]!.content.subarray(1);
  return createHash("sha256").update(bits).digest().subarray(0, 20);
}

/** What a certificate says. Without `serial` it gets a random one; `authority: true` makes it a CA's. */
export interface Contents {
  readonly publicKey: KeyObject;
  readonly commonName?: string;
  readonly identifiers?: readonly Identifier[];
  readonly notBefore: Date;
  readonly notAfter: Date;
  /** A positive big-endian integer, without the zero octet that DER may need before it. */
  readonly serial?: Uint8Array;
  readonly authority?: boolean;
}

/** Writes and signs a certificate; returns PEM. */
export function certify(contents: Contents, issuer: Authority): string {
  const algorithm = der(SEQUENCE, oid("ecdsaWithSha256"));
  const body = der(
    SEQUENCE,
    der(0xa0, der(INTEGER, Uint8Array.of(2))), // v3
    der(INTEGER, derSerial(contents.serial ?? newSerial())),
    algorithm,
    nameOf(issuer.commonName),
    der(SEQUENCE, time(contents.notBefore), time(contents.notAfter)),
    nameOf(contents.commonName),
    spkiOf(contents.publicKey),
    der(0xa3, der(SEQUENCE, ...extensionsOf(contents, issuer))),
  );
  const signature = sign("sha256", body, issuer.privateKey);
  return pem("CERTIFICATE", der(SEQUENCE, body, algorithm, der(BIT_STRING, Uint8Array.of(0), signature)));
}

/** A random serial number, whose first octet is neither zero nor, in DER, in need of a zero before it. */
export function newSerial(): Buffer {
  const serial = randomBytes(16);
  serial[0] = serial[0]! & 0x3f | 0x40;
  return serial;
}

/** The content of a serial number as DER INTEGER: a first octet of 0x80 or more gets a zero octet before it. */
export const derSerial = (serial: Uint8Array): Buffer =>
  Buffer.from(serial[0]! >= 0x80 ? [0, ...serial] : serial);

function extensionsOf(contents: Contents, issuer: Authority): Bytes[] {
  const identifiers = contents.identifiers ?? [];
  const extension = (name: keyof typeof OIDS, critical: boolean, value: Uint8Array) =>
    der(SEQUENCE, oid(name), ...(critical ? [TRUE] : []), der(OCTET_STRING, value));
  const usage = (unusedBits: number, bits: number) => der(BIT_STRING, Uint8Array.of(unusedBits, bits));

  const list = [extension("authorityKeyIdentifier", false, der(SEQUENCE, der(0x80, issuer.keyId)))];
  if (contents.authority) {
    list.push(extension("subjectKeyIdentifier", false, der(OCTET_STRING, keyIdOf(contents.publicKey))));
    list.push(extension("basicConstraints", true, der(SEQUENCE, TRUE)));
    list.push(extension("keyUsage", true, usage(1, 0x06))); // keyCertSign, cRLSign
  } else {
    list.push(extension("basicConstraints", true, der(SEQUENCE)));
    list.push(extension("keyUsage", true, usage(7, 0x80))); // digitalSignature
    list.push(extension("extendedKeyUsage", false, der(SEQUENCE, oid("serverAuth"))));
  }
  if (identifiers.length > 0) {
    const names = identifiers.map(({ type, value }) =>
      type === "dns" ? der(0x82, text(value)) : der(0x87, ipOctets(value))
    );
    list.push(extension("subjectAltName", contents.commonName === undefined, der(SEQUENCE, ...names)));
  }
  return list;
}

function nameOf(commonName: string | undefined): Bytes {
  if (commonName === undefined) return der(SEQUENCE);
  return der(SEQUENCE, der(SET, der(SEQUENCE, oid("commonName"), der(UTF8_STRING, text(commonName)))));
}

function time(instant: Date): Bytes {
  const digits = instant.toISOString().replace(/[-:T]|\.\d+/g, ""); // 20260131235959Z
  return instant.getUTCFullYear() < 2050
    ? der(UTC_TIME, text(digits.slice(2)))
    : der(GENERALIZED_TIME, text(digits)); // RFC 5280 §4.1.2.5
}

function spkiOf(key: KeyObject): Bytes {
  return new Uint8Array(key.export({ format: "der", type: "spki" }));
}

/** Wraps DER in PEM. */
export function pem(label: string, bytes: Uint8Array): string {
  const lines = Buffer.from(bytes).toString("base64").match(/.{1,64}/g)!.join("\n");
  return `-----BEGIN ${label}-----\n${lines}\n-----END ${label}-----\n`;
}
