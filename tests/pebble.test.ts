/**
 * lematt.ts as a program against Pebble, with the moods that Pebble has by default and on request. What it issues is
 * judged by openssl and by node:crypto.
 */
import assert from "node:assert/strict";
import { createPrivateKey, generateKeyPairSync, X509Certificate } from "node:crypto";
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { testBed } from "./bed.ts";
import { type PebbleOptions, pebbleTest, startPebble } from "./pebble.ts";
import { type Answer, startRelay } from "./relay.ts";

/** A bed whose CA is a Pebble, which finds all names of `lines`. */
async function pebbleBed(
  lines: readonly (readonly string[])[],
  { settings = [], ...options }: Partial<PebbleOptions> & { settings?: readonly string[] } = {},
) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({ domains: lines.map((names) => `${names.join(" ")}\n`).join("") }));
  const pebble = stack.use(await startPebble({ httpPort: bed.web.port, ...options }));
  for (const name of lines.flat()) pebble.dns.set(name, "A", "127.0.0.1");
  const { directoryUrl, caBundleFile } = pebble;
  bed.configure({
    settings: [`testDirectory: ${directoryUrl}`, `caBundle: ${caBundleFile}`, ...settings].join("\n"),
  });

  /** Runs the program; whatever comes of it, no challenge is left behind. */
  async function lematt() {
    const ended = await bed.lematt("--test");
    assert.deepEqual(bed.dropped(), []);
    return ended;
  }

  /** A run that does not fail; returns what it said. */
  async function run(): Promise<string> {
    const { code, stdout, stderr } = await lematt();
    assert.deepEqual({ code, stderr }, { code: 0, stderr: "" });
    return stdout;
  }

  /** The certificates on disk, each found sound: chain, names and key. */
  async function certificates(): Promise<Certificate[]> {
    const root = join(bed.home, "root.pem");
    await Deno.writeTextFile(root, await pebble.rootPem());
    const directory = bed.path("test", "cert");
    const files = [...Deno.readDirSync(directory)].filter(({ isFile }) => isFile);
    return await Promise.all(files.map(({ name }) => inspect(join(directory, name), root)));
  }

  const open = stack.move();
  return { bed, pebble, lematt, run, certificates, [Symbol.asyncDispose]: () => open.disposeAsync() };
}

interface Certificate {
  readonly names: readonly string[];
  readonly keyType: string;
  readonly serial: string;
  /** Of the private key, PEM. */
  readonly key: string;
  /** How many certificates the file holds. */
  readonly length: number;
}

/** Reads a bundle; throws unless openssl accepts it under `root` and the private key beside it fits. */
async function inspect(bundle: string, root: string): Promise<Certificate> {
  const text = await Deno.readTextFile(bundle);
  const leaf = new X509Certificate(text);
  const names = leaf.subjectAltName!.split(", ").map((entry) => entry.replace("DNS:", ""));
  const { stderr } = await new Deno.Command("openssl", {
    args: ["verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", names[0]!]
      .concat("-CAfile", root, "-untrusted", bundle, bundle),
  }).output();
  assert.equal(new TextDecoder().decode(stderr), "");
  const key = await Deno.readTextFile(
    bundle.replace("/cert/", "/key/").replace("-cert-combined.", "-key."),
  );
  assert.ok(leaf.checkPrivateKey(createPrivateKey(key)), `${bundle} is for another key`);
  return {
    names: names.sort(),
    keyType: leaf.publicKey.asymmetricKeyType!,
    serial: leaf.serialNumber,
    key,
    length: text.split("-----BEGIN CERTIFICATE-----").length - 1,
  };
}

/** What `certificates` has to hold: each line once for each key type, in any order. */
function assertPairs(certificates: readonly Certificate[], lines: readonly (readonly string[])[]) {
  const shown = certificates.map(({ names, keyType }) => `${keyType} ${names.join(" ")}`);
  const expected = lines.flatMap((names) =>
    ["ec", "rsa"].map((type) => `${type} ${names.toSorted().join(" ")}`)
  );
  assert.deepEqual(shown.sort(), expected.sort());
}

const numbered = (count: number, prefix: string) =>
  Array.from({ length: count }, (_, i) => `${prefix}${i}.example.com`);

pebbleTest(
  "lematt issues from a Pebble with bad nonces, reused authorizations, delays and Retry-After",
  async () => {
    const lines = [["mail.example.com"], ["example.com", "www.example.com", "shop.example.com"]];
    await using ca = await pebbleBed(lines, {
      config: { retryAfter: { authz: 1, order: 1 } },
      env: { PEBBLE_VA_NOSLEEP: "0", PEBBLE_VA_SLEEPTIME: "2" },
    });
    await ca.run();
    assertPairs(await ca.certificates(), lines);
    assert.match(await ca.run(), /^nothing due, 4 kept/m);
  },
);

pebbleTest("lematt issues though Pebble refuses every second nonce", async () => {
  const lines = [["a.example.com"], ["b.example.com", "c.example.com"], ["d.example.com"]];
  await using ca = await pebbleBed(lines, { env: { PEBBLE_WFE_NONCEREJECT: "50" } });
  await ca.run();
  assertPairs(await ca.certificates(), lines);
});

pebbleTest("lematt keeps a chain of three intermediates whole", async () => {
  await using ca = await pebbleBed([["example.com"]], { env: { PEBBLE_CHAIN_LENGTH: "3" } });
  await ca.run();
  assert.deepEqual((await ca.certificates()).map(({ length }) => length), [4, 4]);
});

pebbleTest("lematt issues 20 single names and a line of 100 names, RSA and EC, in one run", async () => {
  const lines = [...numbered(20, "single").map((name) => [name]), numbered(100, "many")];
  await using ca = await pebbleBed(lines);
  await ca.run();
  assertPairs(await ca.certificates(), lines);
});

for (const [always, count, what] of [["yes", 4, "new keys"], ["no", 2, "the same keys"]] as const) {
  pebbleTest(
    `lematt renews at the configured age, with ${what} if alwaysGenerateNewKeys is ${always}`,
    async () => {
      const settings = ["generateNewCertsAfterDays: 0.000001", `alwaysGenerateNewKeys: ${always}`];
      const lines = [["example.com", "www.example.com"]];
      await using ca = await pebbleBed(lines, { settings });
      await ca.run();
      const before = await ca.certificates();
      await ca.run();
      const after = await ca.certificates();

      assertPairs(after, lines);
      const both = [...before, ...after];
      assert.equal(new Set(both.map(({ serial }) => serial)).size, 4);
      assert.equal(new Set(both.map(({ key }) => key)).size, count);
    },
  );
}

pebbleTest("a name that Pebble refuses, and one that it cannot find, leave the others issued", async () => {
  const lines = [["a.example.com"], ["b.example.com", "blocked.example.com"], ["lost.example.com"]];
  await using ca = await pebbleBed(lines, { config: { domainBlocklist: ["blocked.example.com"] } });
  ca.pebble.dns.set("lost.example.com", "A");
  const { code, stderr } = await ca.lematt();

  assert.equal(code, 1);
  assert.match(stderr, /issuance is forbidden by policy: "blocked\.example\.com" \(rejectedIdentifier\)/);
  assert.match(stderr, /lost\.example\.com: .* could not resolve URL .* \(connection\)/);
  assertPairs(await ca.certificates(), [["a.example.com"]]);
});

const ACCOUNT_KEYS = {
  "an RSA key in PKCS#1": generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey
    .export({ type: "pkcs1", format: "pem" }),
  "a P-384 key in SEC1": generateKeyPairSync("ec", { namedCurve: "P-384" }).privateKey
    .export({ type: "sec1", format: "pem" }),
};
for (const [what, pem] of Object.entries(ACCOUNT_KEYS)) {
  pebbleTest(`lematt speaks to Pebble under an account with ${what}`, async () => {
    await using ca = await pebbleBed([["example.com"]], { settings: ["keyTypes: ec"] });
    await Deno.writeTextFile(ca.bed.path("account.key"), pem.toString());
    await ca.run();
    assert.equal((await ca.certificates()).length, 1);
  });
}

pebbleTest(
  "lematt proves names and wildcards to Pebble by dns-persist-01, and by dns-01 with one value a record",
  async () => {
    const zone = await Deno.makeTempDir({ prefix: "lematt-zone-" });
    const texts = (name: string) => existsSync(join(zone, name)) ? readdirSync(join(zone, name)) : [];
    const lines = [["example.com", "*.example.com"], ["example.org", "*.example.org"]];
    await using ca = await pebbleBed(lines, {
      settings: ["keyTypes: ec", "preflight: no"], // which would ask this host's resolver
      records: (name, type) => type === "TXT" ? texts(name) : [],
    });
    const present = `rm -rf ${zone}/RECORD; mkdir ${zone}/RECORD; touch ${zone}/RECORD/VALUE`;
    ca.bed.configure({
      actions: `[persistent]\ndomains: example.org *.example.org\nchallenge: dns-persist-01\n` +
        `[dns]\ndomains: example.com *.example.com\nchallenge: dns-01\n` +
        `dnsPresent: ["${present}"]\ndnsCleanup: ["rm -r ${zone}/RECORD"]\n`,
    });
    const { stderr } = await ca.lematt();
    assert.match(stderr, /_validation-persist\.example\.org/);
    const { stdout } = await ca.bed.lematt("--test", "--plan");
    const [, record, value] = /place:? +(\S+)\. IN TXT "([^"]*)"/.exec(stdout) ?? [];
    ca.pebble.dns.set(record!, "TXT", value!);
    const { code, stderr: failures } = await ca.bed.lematt("--test", "--retry");
    assert.deepEqual([code, failures], [0, ""]);
    assert.deepEqual((await ca.certificates()).map(({ names }) => names.join(" ")).sort(), [
      "*.example.com example.com",
      "*.example.org example.org",
    ]);
    assert.deepEqual([...Deno.readDirSync(zone)], []);
    await Deno.remove(zone);
  },
  { modern: true },
);

/** Kinds of requests by Pebble's paths, and which of them make or ask for what has been made. */
const KINDS = {
  directory: /^\/dir$/,
  newNonce: /^\/nonce-plz$/,
  newAccount: /^\/sign-me-up$/,
  newOrder: /^\/order-plz$/,
  authorization: /^\/authZ\//,
  challenge: /^\/chalZ\//,
  order: /^\/my-order\//,
  finalize: /^\/finalize-order\//,
  certificate: /^\/certZ\//,
};
type Change = (answer: Answer) => Answer;
const problem =
  (status: number, type: string, contentType = "application/json"): Change => ({ headers }) => ({
    status,
    headers: { ...headers, "content-type": contentType },
    body: JSON.stringify({ type: `urn:ietf:params:acme:error:${type}`, detail: "a replica lags", status }),
  });
const stale = (status: string): Change => (answer) => ({
  ...answer,
  body: JSON.stringify({ ...JSON.parse(answer.body), status, certificate: undefined }),
});
const tomorrow: Change = (answer) => ({ ...answer, headers: { ...answer.headers, "retry-after": "86400" } });
const notFound = problem(404, "malformed", "application/problem+json");

pebbleTest(
  "no line fails where each kind of request is answered once by a replica that lags, by a Retry-After of a day, and by a problem as application/json",
  async () => {
    const lines = [["a.example.com"], ["b.example.com", "c.example.com"]];
    await using ca = await pebbleBed(lines, {
      env: { PEBBLE_WFE_NONCEREJECT: "0", PEBBLE_AUTHZREUSE: "100" },
    });
    const badNonce = problem(400, "badNonce");
    const left = new Map<string, Change[]>([
      ["directory", [notFound, tomorrow]],
      ["newNonce", [notFound, tomorrow]],
      ["newAccount", [notFound, badNonce, tomorrow]],
      ["newOrder", [notFound, badNonce, problem(400, "accountDoesNotExist"), tomorrow]],
      ["authorization", [notFound, badNonce, problem(404, "malformed"), tomorrow]],
      ["challenge", [notFound, badNonce, tomorrow]],
      ["order", [tomorrow, stale("pending"), notFound, badNonce, stale("pending"), stale("processing")]],
      ["finalize", [notFound, badNonce, problem(403, "orderNotReady"), tomorrow]],
      ["certificate", [notFound, badNonce, problem(404, "malformed"), tomorrow]],
    ]);
    const root = Deno.readTextFileSync(ca.pebble.caBundleFile);
    await using relay = startRelay(new URL(ca.pebble.directoryUrl).origin, root, async (path, ask) => {
      const [kind] = Object.entries(KINDS).find(([, pattern]) => pattern.test(path))!;
      const answer = await ask();
      return left.get(kind)!.shift()?.(answer) ?? answer;
    });
    await Deno.writeTextFile(ca.bed.path("relay.pem"), relay.root);
    ca.bed.configure({ settings: `testDirectory: ${relay.origin}/dir\ncaBundle: relay.pem\nari: no` });
    await ca.run();
    assertPairs(await ca.certificates(), lines);
    assert.deepEqual([...left].filter(([, changes]) => changes.length > 0), []);
  },
);
