/** Goal: keys and CSRs are accepted by openssl, and an invalid chain is rejected with its fault. */

import "reflect-metadata";
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createHash, createPublicKey, X509Certificate } from "node:crypto";
import { isIP } from "node:net";
import * as x509 from "@peculiar/x509";
import {
  checkChain,
  createCsr,
  generateKey,
  isKeyOf,
  type KeySpec,
  keySpecOf,
  publicKeyHash,
  readCertificate,
} from "../lib/x509.ts";

const NOW = new Date();
const after = (days: number) => new Date(NOW.getTime() + days * 86_400_000);
const CURVES = ["P-256", "P-384", "P-521"] as const;
const SPECS: KeySpec[] = [
  { type: "rsa", bits: 2048 },
  ...CURVES.map((curve) => ({ type: "ec" as const, curve })),
];
const keys = await Promise.all(SPECS.map(generateKey));
const [rsaKey, key] = keys as [string, string];
const EC = { name: "ECDSA", namedCurve: "P-256" };
const authority = await crypto.subtle.generateKey(EC, true, ["sign", "verify"]) as CryptoKeyPair;

const openssl = (args: string, input = "") =>
  execFileSync("openssl", args.split(" "), { input, encoding: "utf8", stdio: "pipe" });
const spkiOf = (key: string) => new Uint8Array(createPublicKey(key).export({ type: "spki", format: "der" }));

const NAMES = ["example.com", "www.example.com"];
const IS_CA = new x509.BasicConstraintsExtension(true);
/** A certificate, by default a leaf for `key`. */
async function certify(
  given: Partial<x509.X509CertificateCreateWithKeyParams> = {},
  names = NAMES,
  ...extensions: x509.Extension[]
): Promise<string> {
  const identifiers = names.map((value) => ({ type: isIP(value) ? "ip" as const : "dns" as const, value }));
  const certificate = await x509.X509CertificateGenerator.create({
    publicKey: spkiOf(key),
    subject: "CN=leaf",
    issuer: "O=Authority",
    notBefore: after(-1),
    notAfter: after(1),
    signingKey: authority.privateKey,
    signingAlgorithm: { ...EC, hash: "SHA-256" },
    extensions: [new x509.SubjectAlternativeNameExtension(identifiers), ...extensions],
    ...given,
  });
  return `${certificate.toString("pem")}\n`;
}

Deno.test("keys are read in PKCS#8, PKCS#1 and SEC1, also after EC PARAMETERS or without the public key, and openssl verifies their CSRs", async () => {
  for (const [index, keyPem] of keys.entries()) {
    const certPem = await certify({ publicKey: spkiOf(keyPem) });
    const forms = [keyPem, openssl("pkey -traditional", keyPem)];
    if (SPECS[index]!.type === "ec") {
      forms.push(`-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n${forms[1]}`);
      forms.push(openssl("ec -no_public", keyPem));
    }
    const { pem } = await createCsr(keyPem, ["example.com", "*.example.com", "192.0.2.1", "2001:db8::7"]);
    const request = openssl("req -noout -verify -text", pem);
    assert.match(request, /Subject: CN = example\.com\n/);
    assert.match(request, /DNS:example\.com, DNS:\*\.example\.com, IP .*:192\.0\.2\.1, IP .*:2001:DB8/);
    const hash = createHash("sha256").update(spkiOf(keyPem)).digest("hex");
    for (const form of forms) {
      const read = [isKeyOf(form, certPem), keySpecOf(form), publicKeyHash(form)];
      assert.deepEqual(read, [true, SPECS[index], hash], form);
    }
    assert.deepEqual([readCertificate(certPem).keySpec, publicKeyHash(certPem)], [SPECS[index], hash]);
    assert(!isKeyOf(keys.at(index - 1)!, certPem));
    const broken = keyPem.replace(/\n(.{64})\n/, "\n");
    assert.throws(() => isKeyOf(broken, certPem));
    assert.throws(() => keySpecOf(broken));
  }
  const tooLong = await createCsr(key, [`${"a".repeat(60)}.example.com`]);
  assert.match(openssl("req -noout -subject", tooLong.pem), /subject=\s*$/);
  assert.deepEqual(keySpecOf(openssl("genrsa 1023")), { type: "rsa", bits: 1023 });
  assert.equal(keySpecOf(openssl("ecparam -name secp256k1 -genkey -noout")), "secp256k1");
});

Deno.test("readCertificate() agrees with node:crypto about names, dates and fingerprint, and rejects truncated certificates", async () => {
  const names = ["*.example.com", "xn--bcher-kva.example", "192.0.2.255", "::", "2001:db8:0:1::"];
  const [notBefore, notAfter] = [new Date("1999-12-31T23:59:59Z"), new Date("2050-12-31T23:59:59Z")];
  const certPem = await certify({ notBefore, notAfter }, names);
  const [reference, read] = [new X509Certificate(certPem), readCertificate(certPem)];
  assert.deepEqual([read.names, read.notBefore, read.notAfter], [names, notBefore, notAfter]);
  assert.equal(read.fingerprint, reference.fingerprint256.replaceAll(":", "").toLowerCase());
  assert.deepEqual([read.issuer, read.selfSigned], ["Authority", false]);
  assert(readCertificate(await certify({ subject: "CN=self", issuer: "CN=self" })).selfSigned);
  for (let length = 1; length < reference.raw.length; length++) {
    const text = reference.raw.subarray(0, length).toString("base64");
    assert.throws(() => readCertificate(certPem.replace(/(-\n)[^-]*/, `$1${text}\n`)));
  }
});

Deno.test("S3, S6, S7: checkChain() accepts only certificates, each issued by the next, for this key, these names and servers", async () => {
  const leaf = await certify();
  const issuedBy = async (given: Parameters<typeof certify>[0], ...more: x509.Extension[]) =>
    leaf + await certify({ publicKey: authority.publicKey, subject: "O=Authority", ...given }, [], ...more);
  const good = await issuedBy({}, IS_CA);
  const issuer = good.slice(leaf.length);
  const other: typeof certify = async (...given) => await certify(...given) + issuer;
  const used = (...usages: string[]) => other({}, NAMES, new x509.ExtendedKeyUsageExtension(usages));
  const rejected: [what: string, chain: string, message: RegExp, names?: string[]][] = [
    ["no certificate at all", "<html>", /no certificate/],
    ["a private key", leaf + rsaKey + issuer, /PRIVATE KEY/],
    ["text before it", `subject=CN = x\n${good}`, /^text /],
    ["text after it", `${good}-----BEGIN PRIVATE`, /^text /],
    ["invalid DER", good.replace(/MII/, "AAA"), /parsed/],
    ["another key", await other({ publicKey: spkiOf(rsaKey) }), /another key/],
    ["an empty key", await other({ publicKey: Uint8Array.fromHex("3009300406022a03030100") }), /another key/],
    ["other names", good, /other names: example.com www.example.com/, ["example.com"]],
    ["another CA's issuer", await issuedBy({ publicKey: spkiOf(key) }, IS_CA), /broken chain/],
    ["expired", await other({ notAfter: NOW }), /^the certificate expired at /],
    ["about to expire", await other({ notAfter: after(1 / 300) }), /expires at .* in less than 5 minutes/],
    ["not valid yet", await other({ notBefore: after(0.5) }), /not valid before/],
    ["a CA", await other({}, NAMES, IS_CA), /is a CA certificate/],
    ["for mail", await used("1.3.6.1.5.5.7.3.4"), /not for TLS servers/],
    ["SHA-1", await other({ signingAlgorithm: { ...EC, hash: "SHA-1" } }), /SHA-1/],
    ["an issuer that is no CA", await issuedBy({}), /certificate 2 .* not a CA certificate|broken chain/],
    ["an expired issuer", await issuedBy({ notAfter: NOW }, IS_CA), /certificate 2 .*expired/],
    ["an issuer of another name", await issuedBy({ subject: "CN=x" }, IS_CA), /broken chain/],
    ["an endless chain", leaf + issuer.repeat(1300), /1301 certificates/],
  ];
  for (const [what, chain, message, names = NAMES] of rejected) {
    assert.throws(() => checkChain(chain, names, key, NOW), { name: "ChainError", message }, what);
  }
  // the issuer of a leaf may be a root; other usages are for clients as well, and any
  const usages = ["1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"];
  for (const chain of [good, leaf, await used(...usages), await used("2.5.29.37.0")]) {
    const checked = checkChain(chain.replaceAll("\n", "\r\n\r\n") + " ", NAMES.toReversed(), key, NOW);
    assert.deepEqual([checked.leaf.names, checked.chainPem], [NAMES, chain]);
  }
});
