/** Goal: keys and CSRs are accepted by openssl, and an invalid chain is rejected with its fault. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createHash, createPrivateKey, createPublicKey, X509Certificate } from "node:crypto";
import { join } from "node:path";
import {
  checkChain,
  coversExactly,
  createCsr,
  generateKey,
  isKeyOf,
  type KeySpec,
  keySpecOf,
  publicKeyHash,
  readCertificate,
} from "../lib/x509.ts";
import { startCa } from "./ca.ts";
import { certify, createAuthority } from "./ca-x509.ts";

const NOW = new Date();
const DAY = 86_400_000;
const SPECS: KeySpec[] = [
  ...[2048, 3072].map((bits) => ({ type: "rsa" as const, bits })),
  ...["P-256", "P-384", "P-521"].map((curve) => ({ type: "ec", curve }) as KeySpec),
];
const keys = await Promise.all(SPECS.map(generateKey));
const [, , key, , other] = keys as [string, string, string, string, string];
const ca = await startCa();
addEventListener("unload", () => void ca.close());

const openssl = (args: string, input = "") =>
  execFileSync("openssl", args.split(" "), { input, encoding: "utf8", stdio: "pipe" });
const pem = (der: Uint8Array) =>
  `-----BEGIN CERTIFICATE-----\n${Buffer.from(der).toString("base64")}\n-----END CERTIFICATE-----\n`;
const publicKeyOf = (keyPem: string) => createPublicKey(createPrivateKey(keyPem));
const life = { notBefore: new Date(NOW.getTime() - DAY), notAfter: new Date(NOW.getTime() + DAY) };
/** A chain for the key and the names, signed by the test CA. */
const forge = (keyPem: string, names: string[], dates = life) => ca.forge(keyPem, names, dates);

Deno.test("openssl verifies the CSRs of createCsr(): every key type, names and IP addresses, the first name as common name", async () => {
  for (const [index, keyPem] of keys.entries()) {
    const { pem } = await createCsr(keyPem, ["example.com", "*.example.com", "192.0.2.1", "2001:db8::7"]);
    const text = openssl("req -noout -verify -text", pem);
    assert.match(text, /Subject: CN = example\.com/);
    const names =
      "DNS:example.com, DNS:*.example.com, IP Address:192.0.2.1, IP Address:2001:DB8:0:0:0:0:0:7\n";
    assert(text.includes(names), text);
    const spec = SPECS[index]!;
    assert(text.includes(`Public-Key: (${spec.type === "rsa" ? spec.bits : spec.curve.slice(2)} bit)`), text);
  }
  const hundred = Array.from({ length: 100 }, (_, i) => `n${i}.example.com`);
  assert.equal(openssl("req -noout -text", (await createCsr(key, hundred)).pem).match(/DNS:/g)!.length, 100);
  for (const name of [`${"a".repeat(60)}.example.com`, "192.0.2.1"]) { // too long, or no name
    assert.match(openssl("req -noout -subject", (await createCsr(key, [name])).pem), /subject=\s*$/);
  }
});

Deno.test("keys are read in PKCS#8, PKCS#1 and SEC1, also after EC PARAMETERS, or without the public key", async () => {
  for (const [index, keyPem] of keys.entries()) {
    const chain = await forge(keyPem, ["example.com"]);
    const forms = [keyPem, openssl("pkey -traditional", keyPem)];
    if (SPECS[index]!.type === "ec") {
      forms.push(`-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n${forms[1]}`);
      forms.push(openssl("ec -no_public", keyPem));
    }
    const spki = publicKeyOf(keyPem).export({ type: "spki", format: "der" });
    const hash = createHash("sha256").update(spki).digest("hex");
    for (const form of forms) {
      assert.deepEqual([isKeyOf(form, chain), keySpecOf(form), publicKeyHash(form)], [
        true,
        SPECS[index],
        hash,
      ], form);
    }
    assert.equal(publicKeyHash(chain), hash);
    assert.deepEqual(readCertificate(chain).keySpec, SPECS[index]);
    assert(!isKeyOf(keys.at(index - 1)!, chain));
    for (const broken of ["", "no key", keyPem.slice(0, 200), keyPem.replace(/\n(.{64})\n/, "\n")]) {
      assert.throws(() => isKeyOf(broken, chain));
      assert.throws(() => keySpecOf(broken));
    }
  }
  assert.deepEqual(keySpecOf(openssl("genrsa 1023")), { type: "rsa", bits: 1023 });
  assert.equal(keySpecOf(openssl("genpkey -algorithm ed25519")), "ed25519");
  assert.equal(keySpecOf(openssl("ecparam -name secp256k1 -genkey -noout")), "secp256k1");
});

Deno.test("readCertificate() agrees with node:crypto about names, dates and fingerprint, and rejects truncated certificates", async () => {
  const names = ["*.example.com", "xn--bcher-kva.example", "192.0.2.255", "::", "2001:db8:0:1::"];
  const lives = [
    ["1999-12-31T23:59:59Z", "2049-12-31T23:59:59Z"],
    ["2050-02-28T00:00:00Z", "9999-12-31T23:59:59Z"],
  ];
  for (const [from, to] of lives) {
    const chain = await forge(key, names, { notBefore: new Date(from!), notAfter: new Date(to!) });
    const [reference, read] = [new X509Certificate(chain), readCertificate(chain)];
    assert.deepEqual(read.names, names);
    assert.equal(read.notBefore.getTime(), Date.parse(reference.validFrom));
    assert.equal(read.notAfter.getTime(), Date.parse(reference.validTo));
    assert.equal(read.fingerprint, reference.fingerprint256.replaceAll(":", "").toLowerCase());
    assert.deepEqual([read.issuer, read.selfSigned], ["lematt test intermediate", false]);
    assert(coversExactly(read, names.toReversed()));
    assert(!coversExactly(read, names.slice(1)) && !coversExactly(read, [...names, "www.example.com"]));
    for (let length = 1; length < reference.raw.length; length++) {
      const cut = pem(reference.raw.subarray(0, length));
      assert.throws(() => readCertificate(cut), `${length} of ${reference.raw.length} bytes`);
    }
  }
  const own = readCertificate(ca.rootPem);
  assert.deepEqual([own.issuer, own.selfSigned], ["lematt test root 1", true]);
});

Deno.test("checkChain() rejects invalid chains, with the reason", async () => {
  await using otherCa = await startCa();
  const names = ["example.com", "www.example.com"];
  const good = await forge(key, names);
  const leaf = good.slice(0, good.indexOf("-----END") + 26);
  const request = await createCsr(key, names);
  const past = { notBefore: life.notBefore, notAfter: NOW };
  const future = { notBefore: life.notAfter, notAfter: new Date(NOW.getTime() + 2 * DAY) };
  const table: [what: string, chain: string, message: RegExp, names?: string[], key?: string][] = [
    ["no certificate at all", "<html>", /no certificate/],
    ["a private key before it", other + good, /PRIVATE KEY/],
    ["a private key after it", good + other, /PRIVATE KEY/],
    ["a request within it", `${leaf}${request.pem}${good}`, /CERTIFICATE REQUEST/],
    ["text before it", `subject=CN = x\n${good}`, /^text /],
    ["text within it", `${leaf}x${good}`, /^text /],
    ["text after it", `${good}-----BEGIN PRIVATE`, /^text /],
    ["invalid DER in the PEM", good.replace(/MII/, "AAA"), /parsed/],
    ["another key", good, /another key/, names, other],
    ["an additional name", good, /other names: example.com www.example.com/, ["example.com"]],
    ["a missing name", good, /other names/, [...names, "x.example.com"]],
    ["another CA's intermediate", leaf + otherCa.intermediatePem, /broken chain/],
    ["the leaf twice", leaf + good, /broken chain/],
    ["expired", await forge(key, names, past), /expired at/],
    ["not valid yet", await forge(key, names, future), /not valid before/],
  ];
  const checked = checkChain(good.replaceAll("\n", "\r\n\r\n") + " ", names.toReversed(), key, NOW);
  assert.deepEqual([checked.leaf.names, checked.chainPem], [names, good], "line ends are normalized");
  for (const [what, chain, message, expected = names, keyPem = key] of table) {
    assert.throws(() => checkChain(chain, expected, keyPem, NOW), { name: "ChainError", message }, what);
  }
});

Deno.test("checkChain() rejects leaves that are not for servers, weak signatures, and invalid issuers", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lematt-x509-" });
  try {
    const root = createAuthority("root");
    const middle = createAuthority("middle");
    const { publicKey } = middle;
    const intermediate = (more: { authority?: boolean; notAfter?: Date; commonName?: string } = {}) =>
      certify({ commonName: "middle", publicKey, authority: true, ...life, ...more }, root);
    const file = (name: string, text: string) => {
      Deno.writeTextFileSync(join(directory, name), text);
      return join(directory, name);
    };
    const signer = middle.privateKey.export({ type: "pkcs8", format: "pem" }) as string;
    /** A leaf made by openssl. */
    const leaf = async (extensions: string, digest = "-sha256") =>
      openssl(
        `x509 -req -in ${file("csr", openssl(`req -new -key ${file("key", key)} -subj /CN=example.com`))} ` +
          `-CA ${file("ca", await intermediate())} -CAkey ${file("cakey", signer)} -days 5 ${digest} ` +
          `-extfile ${file("ext", `subjectAltName=DNS:example.com\n${extensions}`)}`,
      );
    const good = await leaf("extendedKeyUsage=serverAuth,clientAuth");
    const check = (chain: string) => checkChain(chain, ["example.com"], key, NOW);
    for (
      const extension of ["", "extendedKeyUsage=anyExtendedKeyUsage", "basicConstraints=critical,CA:FALSE"]
    ) {
      assert.deepEqual(
        check(await leaf(extension) + await intermediate()).leaf.names,
        ["example.com"],
        extension,
      );
    }
    assert.deepEqual(check(good).leaf.keySpec, { type: "ec", curve: "P-256" }, "the issuer may be a root");
    const table: [what: string, chain: string, message: RegExp][] = [
      ["CA:TRUE", await leaf("basicConstraints=CA:TRUE"), /CA/],
      ["for mail", await leaf("extendedKeyUsage=emailProtection"), /not for TLS servers/],
      ["SHA-1", await leaf("", "-sha1"), /SHA-1/],
      ["an issuer that is not a CA", good + await intermediate({ authority: false }), /CA|broken chain/],
      [
        "an issuer that has expired",
        good + await intermediate({ notAfter: NOW }),
        /certificate 2 .*expired at /,
      ],
      ["an issuer with another name", good + await intermediate({ commonName: "other" }), /broken chain/],
      ["an endless chain", good + (await intermediate()).repeat(1300), /1301 certificates/],
    ];
    for (const [what, chain, message] of table) {
      assert.throws(() => check(chain), { name: "ChainError", message }, what);
    }
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("an empty public key matches no private key", () => {
  const seq = (tag: number, ...parts: Uint8Array[]): Uint8Array => {
    const content = Buffer.concat(parts);
    return Buffer.concat([Uint8Array.of(tag, content.length), content]);
  };
  const empty = seq(0x30);
  const time = seq(0x17, new TextEncoder().encode("260101000000Z"));
  const spki = seq(0x30, seq(0x30, seq(0x06, Uint8Array.of(42))), seq(0x03, Uint8Array.of(0)));
  const tbs = seq(0x30, seq(0x02, Uint8Array.of(1)), empty, empty, seq(0x30, time, time), empty, spki);
  const bare = pem(seq(0x30, tbs, empty, seq(0x03, Uint8Array.of(0))));
  assert.equal(readCertificate(bare).keySpec, undefined);
  assert.equal(isKeyOf(key, bare), false);
});
