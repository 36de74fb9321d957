/** X.509 for the test CA: reads certificate requests, writes certificates. */
import "reflect-metadata";
import * as x509 from "@peculiar/x509";
import { Buffer } from "node:buffer";
import { createHash, createPublicKey, generateKeyPairSync, type KeyObject } from "node:crypto";
import { isIP } from "node:net";

/** An identifier of orders and authorizations (RFC 8555 §9.7.7, RFC 8738). */
export interface Identifier {
  readonly type: "dns" | "ip";
  readonly value: string;
}

export interface Request {
  readonly identifiers: readonly Identifier[];
  readonly commonNames: readonly string[];
  readonly publicKey: KeyObject;
}

/** Reads a CSR and verifies its signature. */
export async function readRequest(der: Uint8Array<ArrayBuffer>): Promise<Request> {
  const request = new x509.Pkcs10CertificateRequest(der);
  if (!await request.verify()) throw new Error("the signature does not verify");
  const { names } = request.getExtension("2.5.29.17") as x509.SubjectAlternativeNameExtension;
  return {
    identifiers: names.toJSON().map(({ type, value }) => {
      if (type !== "dns" && type !== "ip") throw new Error(`a name of type ${type}`);
      return { type, value: isIP(value) === 6 ? new URL(`http://[${value}]/`).hostname.slice(1, -1) : value };
    }),
    commonNames: request.subjectName.getField("CN"),
    publicKey: createPublicKey({ key: Buffer.from(request.publicKey.rawData), format: "der", type: "spki" }),
  };
}

export type Authority = ReturnType<typeof createAuthority>;

/** A name and a P-256 key that sign certificates; `keyId` is the subject key identifier in hexadecimal. */
export function createAuthority(commonName: string) {
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  return { commonName, privateKey, publicKey, keyId: keyIdOf(publicKey) };
}

const spkiOf = (key: KeyObject) => key.export({ format: "der", type: "spki" });
const keyIdOf = (key: KeyObject) => createHash("sha256").update(spkiOf(key)).digest("hex").slice(0, 40);

export interface Life {
  readonly notBefore: Date;
  readonly notAfter: Date;
}

export interface Contents extends Life {
  readonly publicKey: KeyObject;
  readonly commonName?: string;
  readonly names?: readonly string[];
  /** In hexadecimal; random by default. */
  readonly serial?: string;
  readonly authority?: boolean;
}

export async function certify(contents: Contents, issuer: Authority): Promise<string> {
  const { publicKey, commonName, names = [], notBefore, notAfter, serial, authority = false } = contents;
  const { keyCertSign, digitalSignature } = x509.KeyUsageFlags;
  const extensions: x509.Extension[] = [
    new x509.AuthorityKeyIdentifierExtension(issuer.keyId),
    new x509.KeyUsagesExtension(authority ? keyCertSign : digitalSignature, true),
    new x509.BasicConstraintsExtension(authority, undefined, true),
    authority
      ? new x509.SubjectKeyIdentifierExtension(keyIdOf(publicKey))
      : new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage.serverAuth]),
  ];
  if (names.length > 0) {
    const identifiers = names.map((value) => ({ type: isIP(value) ? "ip" : "dns", value }) as const);
    extensions.push(new x509.SubjectAlternativeNameExtension(identifiers, commonName === undefined));
  }
  const nameOf = (name?: string) => new x509.Name(name === undefined ? [] : [{ CN: [name] }]);
  const certificate = await x509.X509CertificateGenerator.create({
    serialNumber: serial,
    subject: nameOf(commonName),
    issuer: nameOf(issuer.commonName),
    notBefore,
    notAfter,
    publicKey: Uint8Array.from(spkiOf(publicKey)),
    signingKey: issuer.privateKey.toCryptoKey({ name: "ECDSA", namedCurve: "P-256" }, false, ["sign"]),
    signingAlgorithm: { name: "ECDSA", hash: "SHA-256" },
    extensions,
  });
  return `${certificate.toString("pem")}\n`;
}

let listener: Promise<Record<"root" | "certificate" | "key", string>> | undefined;

/** A certificate for localhost and 127.0.0.1 with its own root, as PEM; the same for all servers of this process. */
export function listenerCertificate(): NonNullable<typeof listener> {
  return listener ??= (async () => {
    const authority = createAuthority("lematt test listener root");
    const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
    const life = { notBefore: new Date(Date.now() - 86_400_000), notAfter: new Date(Date.now() + 1e12) };
    return {
      root: await certify({ ...authority, authority: true, ...life }, authority),
      certificate: await certify({ publicKey, names: ["localhost", "127.0.0.1"], ...life }, authority),
      key: privateKey.export({ format: "pem", type: "pkcs8" }) as string,
    };
  })();
}

/** Writes it to `listener.pem` and `listener.key`, and its root to `listener-root.pem`; returns the root. */
export async function writeListener(directory: string): Promise<string> {
  const { root, certificate, key } = await listenerCertificate();
  await Deno.writeTextFile(`${directory}/listener-root.pem`, root);
  await Deno.writeTextFile(`${directory}/listener.pem`, certificate);
  await Deno.writeTextFile(`${directory}/listener.key`, key);
  return root;
}
