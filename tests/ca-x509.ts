/**
 * X.509 for the test CA: reads certificate requests (RFC 2986), writes certificates (RFC 5280). The latter without
 * @peculiar/x509, which signs asynchronously.
 */
import { Buffer } from "node:buffer";
import {
  createHash,
  createPublicKey,
  generateKeyPairSync,
  type KeyObject,
  randomBytes,
  sign,
} from "node:crypto";
import { isIP } from "node:net";

/** An identifier of orders and authorizations (RFC 8555 §9.7.7, RFC 8738). */
export interface Identifier {
  readonly type: "dns" | "ip";
  readonly value: string;
}

// ---- requests ----------------------------------------------------------------------------------------------------

/** The contents of a CSR. */
export interface Request {
  readonly identifiers: readonly Identifier[];
  readonly commonNames: readonly string[];
  readonly publicKey: KeyObject;
}

/** Reads a CSR and verifies its signature. */
export async function readRequest(der: Uint8Array<ArrayBuffer>): Promise<Request> {
  await import("reflect-metadata");
  const { Pkcs10CertificateRequest, SubjectAlternativeNameExtension } = await import("@peculiar/x509");
  const request = new Pkcs10CertificateRequest(der);
  if (!await request.verify()) throw new Error("the signature does not verify");
  const { names } = request.extensions.find((extension) =>
    extension instanceof SubjectAlternativeNameExtension
  )!;
  return {
    identifiers: names.toJSON().map(({ type, value }) => {
      if (type === "ip") return { type, value: canonicalIp(value) };
      if (type !== "dns") throw new Error(`a name of type ${type}`);
      return { type, value };
    }),
    commonNames: request.subjectName.getField("CN"),
    publicKey: createPublicKey({
      key: Buffer.from(request.publicKey.rawData),
      format: "der",
      type: "spki",
    }),
  };
}

/** An IP address in the form of identifiers: dotted decimal, or RFC 5952. */
const canonicalIp = (address: string) =>
  isIP(address) === 6 ? new URL(`http://[${address}]/`).hostname.slice(1, -1) : address;

/** The octets of an IP address. */
export function ipOctets(address: string): Uint8Array {
  if (isIP(address) === 4) return Uint8Array.from(address.split("."), Number);
  const [head = "", tail = ""] = canonicalIp(address).split("::");
  const groups = (part: string) => part === "" ? [] : part.split(":").map((group) => parseInt(group, 16));
  const left = groups(head), right = groups(tail);
  const all = [...left, ...Array<number>(8 - left.length - right.length).fill(0), ...right];
  return Uint8Array.from(all.flatMap((group) => [group >> 8, group & 0xff]));
}

// ---- certificates ------------------------------------------------------------------------------------------------

/** A name and a P-256 key that sign certificates. */
export interface Authority {
  readonly commonName: string;
  readonly privateKey: KeyObject;
  readonly publicKey: KeyObject;
  /** The 20 octets of its subject key identifier (RFC 7093 §2, method 1). */
  readonly keyId: Buffer;
}

export function createAuthority(commonName: string): Authority {
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  return { commonName, privateKey, publicKey, keyId: keyIdOf(publicKey) };
}

/** The contents of a certificate. The default `serial` is random; `authority: true` is for a CA certificate. */
export interface Contents {
  readonly publicKey: KeyObject;
  readonly commonName?: string;
  readonly identifiers?: readonly Identifier[];
  readonly notBefore: Date;
  readonly notAfter: Date;
  /** A positive big-endian integer without a leading zero octet. */
  readonly serial?: Uint8Array;
  readonly authority?: boolean;
}

const SEQUENCE = 0x30, SET = 0x31, INTEGER = 0x02, BIT_STRING = 0x03, OCTET_STRING = 0x04;
const TRUE = Uint8Array.of(0x01, 0x01, 0xff);
/** Object identifiers in DER. */
const OIDS = {
  commonName: "0603550403",
  subjectKeyIdentifier: "0603551d0e",
  keyUsage: "0603551d0f",
  subjectAltName: "0603551d11",
  basicConstraints: "0603551d13",
  authorityKeyIdentifier: "0603551d23",
  extendedKeyUsage: "0603551d25",
  serverAuth: "06082b06010505070301",
  ecdsaWithSha256: "06082a8648ce3d040302",
} as const;
const oid = (name: keyof typeof OIDS) => Buffer.from(OIDS[name], "hex");

function der(tag: number, ...parts: readonly (Uint8Array | string)[]): Buffer {
  const content = Buffer.concat(parts.map((part) => typeof part === "string" ? Buffer.from(part) : part));
  const size = content.length;
  const length = size < 0x80 ? [size] : size < 0x100 ? [0x81, size] : [0x82, size >> 8, size & 0xff];
  return Buffer.concat([Uint8Array.of(tag, ...length), content]);
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

/** A random serial number; its first octet is between 0x40 and 0x7f, so DER needs no zero octet before it. */
export function newSerial(): Buffer {
  const serial = randomBytes(16);
  serial[0] = serial[0]! & 0x3f | 0x40;
  return serial;
}

/** The content octets of a serial number as a DER INTEGER: with a zero octet before a first octet of 0x80 or more. */
export const derSerial = (serial: Uint8Array): Buffer =>
  Buffer.from(serial[0]! >= 0x80 ? [0, ...serial] : serial);

function extensionsOf({ authority, commonName, publicKey, identifiers = [] }: Contents, issuer: Authority) {
  const extension = (name: keyof typeof OIDS, critical: boolean, value: Uint8Array) =>
    der(SEQUENCE, oid(name), ...(critical ? [TRUE] : []), der(OCTET_STRING, value));
  const list = [extension("authorityKeyIdentifier", false, der(SEQUENCE, der(0x80, issuer.keyId)))];
  // keyCertSign and cRLSign, or digitalSignature
  const usage = der(BIT_STRING, Uint8Array.from(authority ? [1, 0x06] : [7, 0x80]));
  list.push(extension("keyUsage", true, usage));
  list.push(extension("basicConstraints", true, der(SEQUENCE, ...(authority ? [TRUE] : []))));
  if (authority) list.push(extension("subjectKeyIdentifier", false, der(OCTET_STRING, keyIdOf(publicKey))));
  else list.push(extension("extendedKeyUsage", false, der(SEQUENCE, oid("serverAuth"))));
  if (identifiers.length > 0) {
    const names = identifiers.map(({ type, value }) =>
      type === "dns" ? der(0x82, value) : der(0x87, ipOctets(value))
    );
    list.push(extension("subjectAltName", commonName === undefined, der(SEQUENCE, ...names)));
  }
  return list;
}

const nameOf = (commonName: string | undefined) =>
  der(
    SEQUENCE,
    ...commonName === undefined ? [] : [der(SET, der(SEQUENCE, oid("commonName"), der(0x0c, commonName)))],
  );

function time(instant: Date): Buffer {
  const digits = instant.toISOString().replace(/[-:T]|\.\d+/g, ""); // 20260131235959Z
  return instant.getUTCFullYear() < 2050 ? der(0x17, digits.slice(2)) : der(0x18, digits); // RFC 5280 §4.1.2.5
}

const spkiOf = (key: KeyObject) => key.export({ format: "der", type: "spki" });

/** The key identifier of a P-256 key; the point is the last 65 octets. */
const keyIdOf = (publicKey: KeyObject) =>
  createHash("sha256").update(spkiOf(publicKey).subarray(-65)).digest().subarray(0, 20);

/** Wraps DER in PEM. */
export function pem(label: string, bytes: Uint8Array): string {
  const lines = Buffer.from(bytes).toString("base64").match(/.{1,64}/g)!.join("\n");
  return `-----BEGIN ${label}-----\n${lines}\n-----END ${label}-----\n`;
}

let listener: { root: string; certificate: string; key: string } | undefined;

/** A certificate for localhost and 127.0.0.1 with its own root, as PEM; the same for all servers of this process. */
export function listenerCertificate(): NonNullable<typeof listener> {
  if (listener !== undefined) return listener;
  const authority = createAuthority("lematt test listener root");
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const valid = { notBefore: new Date(Date.now() - 86_400_000), notAfter: new Date(Date.now() + 1e12) };
  const { commonName } = authority;
  const identifiers = [{ type: "dns", value: "localhost" }, { type: "ip", value: "127.0.0.1" }] as const;
  return listener = {
    root: certify({ commonName, publicKey: authority.publicKey, authority: true, ...valid }, authority),
    certificate: certify({ publicKey, identifiers, ...valid }, authority),
    key: privateKey.export({ format: "pem", type: "pkcs8" }) as string,
  };
}
