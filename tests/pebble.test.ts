/**
 * lematt with Pebble, an independent CA: with the random errors that Pebble injects, with a relay that changes answers, and
 * with protocols newer than RFC 8555. The certificates are checked with openssl and node:crypto.
 */
import assert from "node:assert/strict";
import { createPrivateKey, generateKeyPairSync, X509Certificate } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { systemQuery } from "../lib/context.ts";
import { rootOf } from "../lib/x509.ts";
import { testBed } from "./bed.ts";
import { startWebroot } from "./ca.ts";
import { type PebbleOptions, pebbleTest, runAt, startPebble } from "./pebble.ts";
import { type Answer, startRelay } from "./relay.ts";

const HOUR = 3600_000, DAY = 24 * HOUR;
const NAME = "example.com";
const CERT = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;

/**
 * A bed with Pebble as the CA, which resolves all names of `domains`. In actions, HOME is the home of the bed and ZONE a
 * directory of files `<record>/<TXT value>`, which are served to Pebble by DNS.
 */
async function pebbleBed(
  { domains, settings = "", actions = "", ...options }:
    & { domains: string; settings?: string; actions?: string }
    & Partial<PebbleOptions>,
) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({ domains }));
  const zone = join(bed.home, "zone");
  const files = (name: string) => existsSync(join(zone, name)) ? readdirSync(join(zone, name)) : [];
  const records = (name: string, type: string) => type === "TXT" ? files(name) : [];
  const pebble = stack.use(await startPebble({ httpPort: bed.web.port, records, ...options }));
  for (const name of domains.split(/\s+/)) pebble.dns.set(name, "A", "127.0.0.1");
  const act = (text: string) =>
    bed.configure({ actions: text.replaceAll("ZONE", zone).replaceAll("HOME", bed.home) });
  const set = (settings: string, { directoryUrl, caBundleFile } = pebble) =>
    bed.configure({ settings: `testDirectory: ${directoryUrl}\ncaBundle: ${caBundleFile}\n${settings}` });
  set(settings);
  act(actions);

  /** Output and errors of the program, and its exit status if that is not 0. Throws if it leaves a challenge file. */
  async function lematt(...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await bed.lematt("--test", ...args);
    assert.deepEqual(bed.dropped(), []);
    return stdout + stderr + (code === 0 ? "" : `exit status ${code}\n`);
  }

  /** The certificates; throws unless chain and key of each are valid. */
  async function certificates(): Promise<Certificate[]> {
    const root = join(bed.home, "root.pem");
    await Deno.writeTextFile(root, await pebble.rootPem());
    const files = [...Deno.readDirSync(bed.path("test/cert"))].filter(({ isFile }) => isFile);
    return await Promise.all(files.map(({ name }) => inspect(bed.path("test/cert", name), root)));
  }

  /** Throws unless there is a certificate of each line and key type, and no other. */
  async function assertIssued(lines: readonly string[], keyTypes = ["ec", "rsa"]) {
    const shown = (await certificates()).map(({ names, keyType }) => `${keyType} ${names.join(" ")}`);
    const sorted = lines.map((line) => line.split(" ").sort().join(" "));
    const expected = sorted.flatMap((names) => keyTypes.map((type) => `${type} ${names}`));
    assert.deepEqual(shown.sort(), expected.sort());
  }

  const open = stack.move();
  const close = () => open.disposeAsync();
  return { bed, pebble, set, act, lematt, certificates, assertIssued, [Symbol.asyncDispose]: close };
}

interface Certificate {
  readonly names: readonly string[];
  readonly keyType: string;
  /** The number of certificates in the file. */
  readonly length: number;
  readonly leaf: X509Certificate;
}

/** Reads a bundle; throws unless openssl accepts it under `root` and the private key beside it fits. */
async function inspect(bundle: string, root: string): Promise<Certificate> {
  const text = await Deno.readTextFile(bundle);
  const leaf = new X509Certificate(text);
  const { stderr } = await new Deno.Command("openssl", {
    args: ["verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", root, "-untrusted", bundle, bundle],
  }).output();
  assert.equal(new TextDecoder().decode(stderr), "");
  const key = await Deno.readTextFile(bundle.replace("/cert/", "/key/").replace("-cert-combined.", "-key."));
  assert.ok(leaf.checkPrivateKey(createPrivateKey(key)), `${bundle} is for another key`);
  return {
    names: leaf.subjectAltName!.split(", ").map((entry) => entry.replace(/^(DNS|IP Address):/, "")).sort(),
    keyType: leaf.publicKey.asymmetricKeyType!,
    length: text.split("-----BEGIN CERTIFICATE-----").length - 1,
    leaf,
  };
}

const rsaKey = () =>
  generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey.export({ type: "pkcs1", format: "pem" });
const ecKey = () =>
  generateKeyPairSync("ec", { namedCurve: "P-384" }).privateKey.export({ type: "sec1", format: "pem" });

// ---- RFC 8555 ----------------------------------------------------------------------------------------------------

pebbleTest(
  "certificates are issued if every second nonce is refused, some authorizations are reused, and answers have Retry-After",
  async () => {
    const many = Array.from({ length: 40 }, (_, i) => `many${i}.example.com`).join(" ");
    const lines = ["mail.example.com", "example.com www.example.com shop.example.com", many];
    await using ca = await pebbleBed({
      domains: lines.join("\n"),
      config: { retryAfter: { authz: 1, order: 1 } },
      env: { PEBBLE_WFE_NONCEREJECT: "50", PEBBLE_CHAIN_LENGTH: "3" },
    });
    assert.match(await ca.lematt(), /^issued (?![^]*exit status)/m);
    await ca.assertIssued(lines);
    assert.deepEqual((await ca.certificates()).map(({ length }) => length), Array(6).fill(4));
    assert.match(await ca.lematt(), /^nothing due, 6 kept/m);
  },
);

pebbleTest("other lines are issued if Pebble refuses a name and cannot resolve another one", async () => {
  const domains = "a.example.com\nb.example.com blocked.example.com\nlost.example.com";
  await using ca = await pebbleBed({ domains, config: { domainBlocklist: ["blocked.example.com"] } });
  ca.pebble.dns.set("lost.example.com", "A");
  await Deno.writeTextFile(ca.bed.path("account.key"), rsaKey().toString());
  const output = await ca.lematt();
  assert.match(output, /"blocked\.example\.com" \(rejectedIdentifier\)[^]*exit status 1$/m);
  assert.match(output, /lost\.example\.com: .* \(connection\)/);
  await ca.assertIssued(["a.example.com"]);
});

/** The paths of Pebble for each kind of request. */
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
const problem = (status: number, type: string, contentType = "application/json"): Change => (answer) => ({
  status,
  headers: { ...answer.headers, "content-type": contentType },
  body: JSON.stringify({ type: `urn:ietf:params:acme:error:${type}`, detail: "a replica lags", status }),
});
const stale = (status: string): Change => (answer) => ({
  ...answer,
  body: JSON.stringify({ ...JSON.parse(answer.body), status, certificate: undefined }),
});
const tomorrow: Change = (answer) => ({ ...answer, headers: { ...answer.headers, "retry-after": "86400" } });
const notFound = problem(404, "malformed", "application/problem+json");
const badNonce = problem(400, "badNonce");

pebbleTest(
  "no line fails if requests meet a lagging replica, a Retry-After of a day, and a problem as application/json",
  async () => {
    const lines = ["a.example.com", "b.example.com c.example.com"];
    const env = { PEBBLE_WFE_NONCEREJECT: "0", PEBBLE_AUTHZREUSE: "100" };
    await using ca = await pebbleBed({ domains: lines.join("\n"), env });
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
    await using relay = await startRelay(new URL(ca.pebble.directoryUrl).origin, root, async (path, ask) => {
      const [kind] = Object.entries(KINDS).find(([, pattern]) => pattern.test(path))!;
      const answer = await ask();
      return left.get(kind)!.shift()?.(answer) ?? answer;
    });
    ca.set("ari: no", { ...ca.pebble, directoryUrl: `${relay.origin}/dir` });
    const { code, stderr } = await runAt(relay.root, ca.bed);
    assert.deepEqual([code, stderr], [0, ""]);
    await ca.assertIssued(lines);
    assert.deepEqual([...left].filter(([, changes]) => changes.length > 0), []);
  },
);

pebbleTest(
  "the default chain is used unless an alternate chain leads to the preferred root",
  async () => {
    await using ca = await pebbleBed({ domains: NAME, env: { PEBBLE_ALTERNATE_ROOTS: "2" } });
    const roots = await Promise.all([0, 1, 2].map(async (chain) => rootOf(await ca.pebble.rootPem(chain))!));
    const elsewhere: Change = (answer) => ({
      ...answer,
      headers: { ...answer.headers, link: '<https://elsewhere.example/chain>;rel="alternate"' },
    });
    const invalid: Change = (answer) => ({
      ...answer,
      body: "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    });
    let change: Change;
    let changed: RegExp;
    const root = Deno.readTextFileSync(ca.pebble.caBundleFile);
    await using relay = await startRelay(new URL(ca.pebble.directoryUrl).origin, root, async (path, ask) => {
      const answer = await ask();
      return changed.test(path) ? change(answer) : answer;
    });
    const ALTERNATE = /\/certZ\/.*\/alternate/;
    const table: [string | undefined, Change, RegExp, string, boolean][] = [
      [undefined, notFound, ALTERNATE, roots[0]!, false],
      [roots[0], notFound, ALTERNATE, roots[0]!, false],
      [roots[2], notFound, /^$/, roots[2]!, false],
      ["ISRG Root X9", notFound, /^$/, roots[0]!, true],
      [roots[2]!.slice(0, -1), notFound, /^$/, roots[0]!, true], // half the name
      [roots[2], notFound, ALTERNATE, roots[0]!, true],
      [roots[2], invalid, ALTERNATE, roots[0]!, true],
      [roots[2], elsewhere, /\/certZ\//, roots[0]!, true],
    ];
    for (const [wanted, newChange, paths, expected, noted] of table) {
      [change, changed] = [newChange, paths];
      const preferred = wanted === undefined ? "" : `\npreferredChain: ${wanted}`;
      ca.set(`ari: no\nkeyTypes: ec${preferred}`, { ...ca.pebble, directoryUrl: `${relay.origin}/dir` });
      await Deno.remove(ca.bed.path("test/cert"), { recursive: true }).catch(() => {});
      const { code, stdout, stderr } = await runAt(relay.root, ca.bed);
      assert.deepEqual([code, stderr], [0, ""]);
      assert.equal(rootOf(ca.bed.text(CERT)), expected, wanted);
      assert.equal(new RegExp(`^note .*"${wanted}"`, "m").test(stdout), noted, `${wanted}: ${stdout}`);
    }
  },
);

// ---- newer than RFC 8555 -----------------------------------------------------------------------------------------

const MODERN = { modern: true };

pebbleTest(
  "the renewal windows of Pebble are respected unless they are invalid; a mass revocation renews and delivers everything",
  async () => {
    await using ca = await pebbleBed({
      domains: "a.example.com\nb.example.com www.b.example.com",
      settings: "keyTypes: ec",
      actions: `[default]\nupdate: ["echo DOMAINS_CN >> HOME/log"]\n`,
    });
    const { bed, pebble } = ca;
    await ca.lematt();
    bed.take();
    const before = (await ca.certificates()).map(({ leaf }) => leaf);
    const window = (start: number, end: number) =>
      JSON.stringify({
        suggestedWindow: { start: new Date(Date.now() + start), end: new Date(Date.now() + end) },
        explanationURL: "https://pebble.example/incident",
      });
    /** Sets the renewal information of each certificate, and makes the next run ask for it. */
    const suggest = async (...answers: string[]) => {
      for (const [i, ARIResponse] of answers.entries()) {
        await pebble.manage("/set-renewal-info/", { Certificate: before[i]!.toString(), ARIResponse });
      }
      const state = bed.state();
      for (const renewal of Object.values(state.renewals)) Object.assign(renewal, { askAt: undefined });
      Deno.writeTextFileSync(bed.path("test/state.json"), JSON.stringify(state));
    };

    await suggest(window(DAY, -DAY), `{"suggested`);
    const kept = await ca.lematt();
    assert.equal(kept.match(/^note .*its dates decide$/gm)?.length, 2, kept);
    assert.match(kept, /^nothing due, 2 kept/m);
    await suggest(window(40 * DAY, 41 * DAY), window(40 * DAY, 41 * DAY));
    await ca.lematt();
    assert.match(await ca.lematt("--plan"), /^keep .*as the CA suggests/m);
    await suggest(window(-2 * HOUR, -HOUR), window(-2 * HOUR, -HOUR));
    const renewed = await ca.lematt();
    assert.equal(renewed.match(/^issued .*https:\/\/pebble\.example\/incident/gm)?.length, 2, renewed);
    assert.deepEqual(bed.take().join(" ").split(" ").sort(), ["a.example.com", "b.example.com"]);
    const after = (await ca.certificates()).map(({ leaf }) => leaf.serialNumber);
    assert(before.every(({ serialNumber }) => !after.includes(serialNumber)));
    assert.match(await ca.lematt(), /^nothing due, 2 kept/m);
  },
  MODERN,
);

pebbleTest("certificates for IP addresses are issued with a profile of six days", async () => {
  const profiles = { shortlived: { description: "six days", validityPeriod: 6 * 86_400 } };
  await using ca = await pebbleBed({
    domains: "127.0.0.1 ::1",
    settings: "keyTypes: ec\nprofile: shortlived",
    config: { profiles },
  });
  await using _six = startWebroot(ca.bed.drop, { hostname: "::1", port: ca.bed.web.port });
  assert.match(await ca.lematt(), /^issued +127\.0\.0\.1 \+1/m);
  const [{ names, leaf }] = await ca.certificates() as [Certificate];
  assert.deepEqual([names, leaf.subject], [["127.0.0.1", "::1"], undefined]);
  const life = leaf.validToDate.getTime() - leaf.validFromDate.getTime();
  assert.equal(Math.round(life / DAY), 6);
}, MODERN);

const DNS = `[dns]\ndomains: ${NAME} *.${NAME}\nchallenge: dns-01\n` +
  // as at a provider with one value per name
  `dnsPresent: ["rm -rf ZONE/RECORD; mkdir -p ZONE/RECORD; touch ZONE/RECORD/VALUE"]\n` +
  `dnsCleanup: ["rm -f ZONE/RECORD/VALUE"]\n` +
  "[persistent]\ndomains: *.example.org\nchallenge: dns-persist-01\n";

pebbleTest(
  "dns-01 with one value per record and behind a CNAME, and dns-persist-01, are validated",
  async () => {
    await using ca = await pebbleBed({
      domains: `${NAME} *.${NAME}\n*.example.org www.example.org`,
      actions: DNS,
      settings: "keyTypes: ec\npreflight: no", // the self-check would ask the resolver of this host
      config: { caaIdentities: ["pebble.example"] },
      env: { PEBBLE_AUTHZREUSE: "0" },
    });
    const { bed, pebble: { dns, caBundleFile } } = ca;
    await Deno.writeTextFile(bed.path("account.key"), ecKey().toString());
    const output = await ca.lematt();
    assert.match(output, new RegExp(`^issued +${NAME} \\+1 `, "m"));
    assert.match(output, /^FAILED +\*\.example\.org \+1 /m);
    const [, record, value] = /^place +(\S+)\. IN TXT "(.*)"$/m.exec(await ca.lematt("--plan"))!;
    assert.match(value!, /^pebble\.example; accounturi=https:\/\/\S+; policy=wildcard$/);
    dns.set(record!, "TXT", value!);
    assert.match(await ca.lematt("--retry"), /^issued +\*\.example\.org \+1/m);
    await ca.assertIssued([`${NAME} *.${NAME}`, "*.example.org www.example.org"], ["ec"]);

    // again with a self-check at the name servers of the zone, which is possible in this process only
    await Deno.remove(bed.path("test/cert"), { recursive: true });
    for (const zone of [NAME, "example.org", "acme.example.net"]) dns.set(zone, "NS", "ns.example.net");
    dns.set("ns.example.net", "A", "127.0.0.1");
    dns.set(`_acme-challenge.${NAME}`, "CNAME", `${NAME}.acme.example.net`);
    ca.set("keyTypes: ec");
    ca.act(DNS.replaceAll("ZONE/RECORD", "ZONE/DOMAIN.acme.example.net").replace(` *.${NAME}`, ""));
    bed.configure({ domains: `${NAME}\n*.example.org www.example.org\n` });
    const ran = await runAt(await Deno.readTextFile(caBundleFile), bed, {
      now: () => new Date(),
      query: (name, type) => systemQuery(name, type, { address: "127.0.0.1", port: dns.port }),
    });
    assert.deepEqual([ran.code, ran.stderr, (await ca.certificates()).length], [0, "", 2]);
  },
  MODERN,
);

pebbleTest("an account is bound, its contact and key are changed, and a certificate is revoked", async () => {
  const mac = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
  await using ca = await pebbleBed({
    domains: NAME,
    settings: "keyTypes: ec",
    config: { externalAccountBindingRequired: true, externalAccountMACKeys: { "kid-1": mac } },
  });
  const { bed, pebble } = ca;
  assert.match(await ca.lematt(), /set eabKeyId and eabHmacKey/);
  const eab = "keyTypes: ec\neabKeyId: kid-1\neabHmacKey: eab\n";
  const other = "YW5vdGhlciBrZXkgb2YgdGhlIHJpZ2h0IGxlbmd0aA";
  await Deno.writeTextFile(bed.path("eab"), other, { mode: 0o600 });
  for (const settings of [eab.replace("kid-1", "kid-2"), eab]) { // an unknown key identifier, then a wrong key
    ca.set(settings);
    const output = await ca.lematt("--retry");
    assert.match(output, /cannot register the account: .*\nexit status 1/);
    assert(!output.includes(other), output);
  }
  await Deno.writeTextFile(bed.path("eab"), mac);
  assert.match(await ca.lematt("--retry"), /^issued /m);
  ca.set(`${eab}contact: new@example.com`);
  assert.match(await ca.lematt("--renew", NAME), /^issued /m);
  const { serialNumber } = new X509Certificate(bed.text(CERT));

  assert.match(await ca.lematt("--rollover", "--yes"), /^changed /m);
  assert.match(await ca.lematt("--revoke", NAME, "--yes", "--reason", "superseded"), /^revoked/m);
  const status = await pebble.manage(`/cert-status-by-serial/${serialNumber.toLowerCase()}`);
  assert.equal(JSON.parse(status).Status, "Revoked");
  const key = readFileSync(bed.path(`test/key/${NAME}-key.prime256v1.test.pem`), "utf8");
  assert.match(await ca.lematt(), /^issued /m);
  assert.notEqual(readFileSync(bed.path(`test/key/${NAME}-key.prime256v1.test.pem`), "utf8"), key);
  assert.notEqual(new X509Certificate(bed.text(CERT)).serialNumber, serialNumber);
}, MODERN);
