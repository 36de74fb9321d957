/** Goal: keys and CSRs that openssl agrees with, and a chain that is refused for whatever is wrong with it. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createHash, createPrivateKey, createPublicKey, randomBytes, X509Certificate } from "node:crypto";
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
  sha256,
} from "../lib/x509.ts";
import { startCa } from "./ca.ts";
import { certify, createAuthority, pem } from "./ca-x509.ts";

const KEYS: KeySpec[] = [
  { type: "rsa", bits: 2048 },
  { type: "rsa", bits: 3072 },
  { type: "ec", curve: "P-256" },
  { type: "ec", curve: "P-384" },
  { type: "ec", curve: "P-521" },
];
const NOW = new Date();
const DAY = 86_400_000;

const openssl = (args: string, input = "") =>
  execFileSync("openssl", args.split(" "), { input, encoding: "utf8", stdio: "pipe" });
const publicKeyOf = (keyPem: string) => createPublicKey(createPrivateKey(keyPem));
const read = (keyPem: string, names: string[]) => ({
  publicKey: publicKeyOf(keyPem),
  identifiers: names.map((value) => ({ type: "dns" as const, value })),
});

Deno.test("createCsr() makes what openssl verifies: every kind of key, names and addresses, the primary as common name", async () => {
  for (const spec of KEYS) {
    const { pem } = await createCsr(await generateKey(spec), [
      "example.com",
      "*.example.com",
      "192.0.2.1",
      "2001:db8::7",
    ]);
    const text = openssl("req -noout -verify -text", pem);
    assert.match(text, /Subject: CN = example\.com/);
    assert.match(
      text,
      /DNS:example\.com, DNS:\*\.example\.com, IP Address:192\.0\.2\.1, IP Address:2001:DB8:0:0:0:0:0:7\n/,
      JSON.stringify(spec),
    );
    assert.match(
      text,
      new RegExp(`Public-Key: \\(${spec.type === "rsa" ? spec.bits : spec.curve.slice(2)} bit\\)`),
    );
  }
});

Deno.test("createCsr() takes a hundred names, and has no common name where the primary cannot be one", async () => {
  const key = await generateKey({ type: "ec", curve: "P-256" });
  const hundred = Array.from({ length: 100 }, (_, i) => `n${i}.example.com`);
  assert.equal(openssl("req -noout -text", (await createCsr(key, hundred)).pem).match(/DNS:/g)!.length, 100);
  for (const name of [`${"a".repeat(60)}.example.com`, "192.0.2.1"]) {
    assert.match(openssl("req -noout -subject", (await createCsr(key, [name])).pem), /subject=\s*$/);
  }
});

Deno.test("isKeyOf() knows a key in PKCS#8, PKCS#1 and SEC1, with its parameters before it or its public half left out", async () => {
  await using ca = await startCa();
  const others = await Promise.all(KEYS.map(generateKey));
  for (const [index, keyPem] of (await Promise.all(KEYS.map(generateKey))).entries()) {
    const pem = ca.forge({
      ...read(keyPem, ["example.com"]),
      notBefore: NOW,
      notAfter: new Date(NOW.getTime() + DAY),
    });
    const forms = [keyPem, openssl("pkey -traditional", keyPem)];
    if (KEYS[index]!.type === "ec") {
      forms.push(`-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n${forms[1]}`);
      forms.push(openssl("ec -no_public", keyPem));
    }
    for (const form of forms) assert.ok(isKeyOf(form, pem), form.split("\n")[0]);
    assert.ok(!isKeyOf(others[index]!, pem));
    for (const broken of ["", "no key", keyPem.slice(0, 200), keyPem.replace(/\n(.{64})\n/, "\n")]) {
      assert.throws(() => isKeyOf(broken, pem));
    }
  }
});

Deno.test("readCertificate() states names, dates and fingerprint as openssl does", async () => {
  await using ca = await startCa();
  const pem = ca.forge({
    publicKey: publicKeyOf(await generateKey({ type: "ec", curve: "P-256" })),
    identifiers: [{ type: "dns", value: "example.com" }, { type: "ip", value: "2001:db8::7" }],
    notBefore: new Date("2026-01-02T03:04:05Z"),
    notAfter: new Date("2056-01-02T03:04:05Z"),
  });
  const certificate = readCertificate(pem);
  assert.deepEqual(certificate.names, ["example.com", "2001:db8::7"]);
  assert.equal(certificate.notBefore.toISOString(), "2026-01-02T03:04:05.000Z");
  assert.equal(certificate.notAfter.toISOString(), "2056-01-02T03:04:05.000Z");
  const fingerprint = openssl("x509 -noout -fingerprint -sha256", pem).trim().split("=")[1]!;
  assert.equal(certificate.fingerprint, fingerprint.replaceAll(":", "").toLowerCase());
  assert.ok(coversExactly(certificate, ["2001:db8::7", "example.com"]));
  assert.ok(!coversExactly(certificate, ["example.com"]));
  assert.ok(!coversExactly(certificate, ["example.com", "2001:db8::7", "www.example.com"]));
});

Deno.test("readCertificate() states what node:crypto does, whatever the names and whenever, and takes nothing that is cut short", async () => {
  await using ca = await startCa();
  const publicKey = publicKeyOf(await generateKey({ type: "ec", curve: "P-256" }));
  const identifiers = [
    ["dns", "*.example.com"],
    ["dns", "xn--bcher-kva.example"],
    ["ip", "192.0.2.255"],
    ["ip", "::"],
    ["ip", "2001:db8:0:1::"],
  ].map(([type, value]) => ({ type: type as "dns" | "ip", value: value! }));
  const lives = [
    ["1999-12-31T23:59:59Z", "2049-12-31T23:59:59Z"],
    ["2050-02-28T00:00:00Z", "9999-12-31T23:59:59Z"],
  ];
  for (const [from, to] of lives) {
    const pem = ca.forge({ publicKey, identifiers, notBefore: new Date(from!), notAfter: new Date(to!) });
    const [judge, read] = [new X509Certificate(pem), readCertificate(pem)];
    assert.deepEqual(read.names, identifiers.map(({ value }) => value));
    assert.equal(read.notBefore.getTime(), Date.parse(judge.validFrom));
    assert.equal(read.notAfter.getTime(), Date.parse(judge.validTo));
    assert.equal(read.fingerprint, judge.fingerprint256.replaceAll(":", "").toLowerCase());
    const der = judge.raw;
    for (let length = 0; length < der.length; length++) {
      const cut = `-----BEGIN CERTIFICATE-----\n${
        der.subarray(0, length).toString("base64")
      }\n-----END CERTIFICATE-----\n`;
      assert.throws(() => readCertificate(cut), `${length} of ${der.length} bytes`);
    }
  }
});

Deno.test("keySpecOf() knows each kind of key in each of its forms, and names those that are of no use", async () => {
  for (const spec of KEYS) {
    const keyPem = await generateKey(spec);
    const forms = [keyPem, openssl("pkey -traditional", keyPem)];
    if (spec.type === "ec") forms.push(openssl("ec -no_public", keyPem));
    for (const form of forms) assert.deepEqual(keySpecOf(form), spec, form.split("\n")[0]);
    assert.throws(() => keySpecOf(keyPem.replace(/\n(.{64})\n/, "\n")));
  }
  assert.deepEqual(keySpecOf(openssl("genrsa 1023")), { type: "rsa", bits: 1023 });
  assert.equal(keySpecOf(openssl("genpkey -algorithm ed25519")), "ed25519");
  assert.equal(keySpecOf(openssl("ecparam -name secp256k1 -genkey -noout")), "secp256k1");
  assert.throws(() => keySpecOf("no key"));
});

Deno.test("checkChain() refuses a chain for whatever is wrong with it", async () => {
  await using ca = await startCa();
  await using stranger = await startCa();
  const key = await generateKey({ type: "ec", curve: "P-256" });
  const other = await generateKey({ type: "ec", curve: "P-256" });
  const life = { notBefore: new Date(NOW.getTime() - DAY), notAfter: new Date(NOW.getTime() + DAY) };
  const good = ca.forge({ ...read(key, ["example.com", "www.example.com"]), ...life });
  const leaf = good.slice(0, good.indexOf("-----END") + 26);
  const names = ["example.com", "www.example.com"];
  const request = await createCsr(key, names);
  const table: [string, string, string[], string, RegExp][] = [
    ["no certificate at all", "<html>", names, key, /no certificate in the answer/],
    ["a private key before it", other + good, names, key, /^a PRIVATE KEY among the certificates$/],
    ["a private key behind it", good + other, names, key, /^a PRIVATE KEY among the certificates$/],
    ["a request within it", `${leaf}${request.pem}${good}`, names, key, /^a CERTIFICATE REQUEST among the/],
    ["text before it", `subject=CN = x\n${good}`, names, key, /^text between the certificates$/],
    ["text within it", `${leaf}x${good}`, names, key, /^text between the certificates$/],
    ["text behind it", `${good}-----BEGIN PRIVATE`, names, key, /^text after the certificates$/],
    ["garbage in the armour", good.replace(/MII/, "AAA"), names, key, /cannot be parsed/],
    ["another key", good, names, other, /for another key/],
    ["a name more", good, ["example.com"], key, /for other names: example.com www.example.com/],
    ["a name less", good, [...names, "x.example.com"], key, /for other names/],
    ["another CA's intermediate", leaf + stranger.intermediatePem, names, key, /broken chain: certificate 1/],
    ["the leaf twice", leaf + good, names, key, /broken chain: certificate 1/],
    [
      "expired",
      ca.forge({ ...read(key, names), notBefore: life.notBefore, notAfter: NOW }),
      names,
      key,
      /expired at/,
    ],
    [
      "not valid yet",
      ca.forge({
        ...read(key, names),
        notBefore: life.notAfter,
        notAfter: new Date(NOW.getTime() + 2 * DAY),
      }),
      names,
      key,
      /not valid before/,
    ],
  ];
  const checked = checkChain(good.replaceAll("\n", "\r\n\r\n") + " ", names.toReversed(), key, NOW);
  assert.deepEqual([checked.leaf.names, checked.chainPem], [names, good], "written anew");
  for (const [what, chain, expected, keyPem, message] of table) {
    assert.throws(() => checkChain(chain, expected, keyPem, NOW), { name: "ChainError", message }, what);
  }
});

Deno.test("checkChain() refuses a leaf that is no server's, weak signatures, and issuers that are none", async () => {
  const directory = await Deno.makeTempDir({ prefix: "lematt-x509-" });
  try {
    const key = await generateKey({ type: "ec", curve: "P-256" });
    const root = createAuthority("root");
    const middle = createAuthority("middle");
    const from = new Date(NOW.getTime() - DAY);
    const { publicKey } = middle;
    const intermediate = (more: { authority?: boolean; notAfter?: Date; commonName?: string } = {}) =>
      certify({
        commonName: "middle",
        publicKey,
        authority: true,
        notBefore: from,
        notAfter: new Date(NOW.getTime() + 9 * DAY),
        ...more,
      }, root);
    const file = (name: string, text: string) => {
      Deno.writeTextFileSync(join(directory, name), text);
      return join(directory, name);
    };
    const signer = middle.privateKey.export({ type: "pkcs8", format: "pem" }) as string;
    /** A leaf that openssl makes, with these extensions and this digest. */
    const leaf = (extensions: string, digest = "-sha256") =>
      openssl(
        `x509 -req -in ${file("csr", openssl(`req -new -key ${file("key", key)} -subj /CN=example.com`))} ` +
          `-CA ${file("ca", intermediate())} -CAkey ${file("cakey", signer)} -days 5 ${digest} ` +
          `-extfile ${file("ext", `subjectAltName=DNS:example.com\n${extensions}`)}`,
      );
    const good = leaf("extendedKeyUsage=serverAuth,clientAuth");
    const check = (chain: string) => checkChain(chain, ["example.com"], key, NOW);
    for (const fine of ["", "extendedKeyUsage=anyExtendedKeyUsage", "basicConstraints=critical,CA:FALSE"]) {
      assert.deepEqual(check(leaf(fine) + intermediate()).leaf.names, ["example.com"], fine);
    }
    assert.deepEqual(check(good).leaf.keySpec, { type: "ec", curve: "P-256" }, "the issuer may be a root");
    for (
      const [what, chain, message] of [
        ["CA:TRUE", leaf("basicConstraints=CA:TRUE"), /^the certificate is a CA certificate$/],
        ["for mail", leaf("extendedKeyUsage=emailProtection"), /^the certificate is not for TLS servers$/],
        ["SHA-1", leaf("", "-sha1"), /^the certificate is signed with SHA-1 or MD5$/],
        [
          "an issuer that is no authority",
          good + intermediate({ authority: false }),
          /^certificate 2 of the chain is not a CA certificate$|^broken chain/,
        ],
        [
          "an issuer that has expired",
          good + intermediate({ notAfter: NOW }),
          /^certificate 2 of the chain expired at /,
        ],
        [
          "an issuer of another name",
          good + intermediate({ commonName: "other" }),
          /^broken chain: certificate 1 is not issued by certificate 2$/,
        ],
        ["a chain without end", good + intermediate().repeat(1300), /^a chain of 1301 certificates$/],
      ] as [string, string, RegExp][]
    ) {
      assert.throws(() => check(chain), { name: "ChainError", message }, what);
    }
  } finally {
    await Deno.remove(directory, { recursive: true });
  }
});

Deno.test("an empty public key is nobody's", async () => {
  const seq = (tag: number, ...parts: Uint8Array[]): Uint8Array => {
    const content = Buffer.concat(parts);
    return Buffer.concat([Uint8Array.of(tag, content.length), content]);
  };
  const empty = seq(0x30);
  const time = seq(0x17, new TextEncoder().encode("260101000000Z"));
  const spki = seq(0x30, seq(0x30, seq(0x06, Uint8Array.of(42))), seq(0x03, Uint8Array.of(0)));
  const tbs = seq(0x30, seq(0x02, Uint8Array.of(1)), empty, empty, seq(0x30, time, time), empty, spki);
  const bare = pem("CERTIFICATE", seq(0x30, tbs, empty, seq(0x03, Uint8Array.of(0))));
  assert.equal(readCertificate(bare).keySpec, undefined);
  assert.equal(isKeyOf(await generateKey({ type: "ec", curve: "P-256" }), bare), false);
});

Deno.test("readCertificate() states the kind of key, who issued it, and whether that was itself", async () => {
  await using ca = await startCa();
  const life = { notBefore: NOW, notAfter: new Date(NOW.getTime() + DAY) };
  for (const spec of KEYS) {
    const keyPem = await generateKey(spec);
    const certificate = readCertificate(ca.forge({ ...read(keyPem, ["example.com"]), ...life }));
    assert.deepEqual(certificate.keySpec, spec);
    assert.deepEqual([certificate.issuer, certificate.selfSigned], ["lematt test intermediate", false]);
  }
  const own = readCertificate(ca.rootPem);
  assert.deepEqual([own.issuer, own.selfSigned], ["lematt test root 1", true]);
});

Deno.test("publicKeyHash() is the same of a certificate and of its key in any form, as openssl has it", async () => {
  await using ca = await startCa();
  for (const spec of KEYS) {
    const keyPem = await generateKey(spec);
    const life = { notBefore: NOW, notAfter: new Date(NOW.getTime() + DAY) };
    const certificate = ca.forge({ ...read(keyPem, ["example.com"]), ...life });
    const spki = publicKeyOf(keyPem).export({ type: "spki", format: "der" });
    const expected = createHash("sha256").update(spki).digest("hex");
    const forms = [certificate, keyPem, openssl("pkey -traditional", keyPem)];
    assert.deepEqual(forms.map(publicKeyHash), [expected, expected, expected]);
  }
});

Deno.test("sha256() is what node:crypto says, of texts and of bytes of every length", () => {
  const judge = (data: string | Uint8Array) => createHash("sha256").update(data).digest("hex");
  for (let length = 0; length < 200; length++) {
    const bytes = randomBytes(length);
    assert.equal(sha256(bytes), judge(bytes));
  }
  for (const text of ["", "abc", "ümläut 日本語 👍".repeat(1000)]) assert.equal(sha256(text), judge(text));
});
