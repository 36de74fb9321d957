/**
 * lematt with Pebble, an independent CA: with the random errors that Pebble injects, and with protocols newer than RFC 8555. The certificates are checked with openssl and node:crypto.
 */
import assert from "node:assert/strict";
import { createPrivateKey, X509Certificate } from "node:crypto";
import { join } from "node:path";
import { generateKey, type KeySpec, rootOf } from "../lib/x509.ts";
import { testBed } from "./bed.ts";
import { startWebroot } from "./ca.ts";
import { listing } from "./faults.ts";
import { output } from "./programs.ts";
import { type PebbleOptions, pebbleTest, runAt, startPebble } from "./pebble.ts";

const HOUR = 3600_000, DAY = 24 * HOUR;
const NAME = "example.com";
const CERT = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;
const MODERN = { modern: true };

/**
 * A bed with Pebble as the CA, which resolves all names of `domains`. In actions, ZONE is a directory of files
 * `<record>/<TXT value>`, which are served to Pebble by DNS.
 */
async function pebbleBed(
  { domains, settings = "keyTypes: ec", actions = "", accountKey, ...options }:
    & { domains: string; settings?: string; actions?: string; accountKey?: KeySpec }
    & Partial<PebbleOptions>,
) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({ domains }));
  const zone = join(bed.home, "zone");
  const records = (name: string, type: string) => type === "TXT" ? listing(join(zone, name)) : [];
  const pebble = stack.use(await startPebble({ httpPort: bed.web.port, records, ...options }));
  for (const name of domains.split(/\s+/)) pebble.dns.set(name, "A", "127.0.0.1");
  const ca = `testDirectory: ${pebble.directoryUrl}\ncaBundle: ${pebble.caBundleFile}\n`;
  const set = (settings: string) => bed.configure({ settings: ca + settings });
  set(settings);
  bed.act(actions.replaceAll("ZONE", zone));
  if (accountKey) await Deno.writeTextFile(bed.path("account.key.test"), await generateKey(accountKey));

  /** Output and errors of the program, and its exit status if that is not 0. Throws if it leaves a challenge file. */
  async function lematt(...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await bed.lematt("--test", ...args);
    assert.deepEqual(bed.dropped(), []);
    return stdout + stderr + (code === 0 ? "" : `exit status ${code}\n`);
  }

  /** The certificates, each as `<key type> <names>`; throws unless openssl accepts the chain, and the key is the right one. */
  async function issued(): Promise<Map<string, X509Certificate>> {
    const root = join(bed.home, "root.pem");
    await Deno.writeTextFile(root, await pebble.rootPem());
    const found = new Map<string, X509Certificate>();
    for (const { name, isFile } of Deno.readDirSync(bed.path("test/cert"))) {
      if (!isFile) continue;
      const file = bed.path("test/cert", name);
      const leaf = new X509Certificate(await Deno.readTextFile(file));
      const verify = "verify -x509_strict -purpose sslserver -CAfile".split(" ");
      const args = [...verify, root, "-untrusted", file, file];
      assert.equal((await output(["openssl", ...args])).stderr, "");
      const key = bed.text("test/key", name.replace("-cert-combined.", "-key."));
      assert(leaf.checkPrivateKey(createPrivateKey(key)), `${name} is for another key`);
      const names = leaf.subjectAltName!.split(", ").map((entry) => entry.replace(/^(DNS|IP Address):/, ""));
      found.set([leaf.publicKey.asymmetricKeyType, ...names.sort()].join(" "), leaf);
    }
    return found;
  }

  const open = stack.move();
  return { bed, pebble, set, lematt, issued, [Symbol.asyncDispose]: () => open.disposeAsync() };
}

// ---- RFC 8555 ----------------------------------------------------------------------------------------------------

pebbleTest("lines are issued in spite of refused nonces, unless a name is refused or lost", async () => {
  const many = Array.from({ length: 40 }, (_, i) => `many${i}.example.com`).sort().join(" ");
  const good = ["a.example.com", "b.example.com c.example.com", many];
  await using ca = await pebbleBed({
    domains: [...good, "d.example.com blocked.example.com", "lost.example.com"].join("\n"),
    settings: "keyTypes: rsa ec",
    accountKey: { type: "rsa", bits: 2048 },
    config: { retryAfter: { authz: 1, order: 1 }, domainBlocklist: ["blocked.example.com"] },
    env: { PEBBLE_WFE_NONCEREJECT: "50", PEBBLE_CHAIN_LENGTH: "3" },
  });
  ca.pebble.dns.set("lost.example.com", "A");
  const output = await ca.lematt();
  assert.match(output, /"blocked\.example\.com" \(rejectedIdentifier\)[^]*exit status 1$/m);
  assert.match(output, /lost\.example\.com: .* \(connection\)/);
  const issued = [...(await ca.issued()).keys()].sort();
  assert.deepEqual(issued, ["ec", "rsa"].flatMap((type) => good.map((names) => `${type} ${names}`)));
  assert.equal(ca.bed.text(CERT.replace(NAME, "a.example.com")).match(/BEGIN/g)!.length, 4);
});

pebbleTest("the default chain is used unless an alternate chain leads to the preferred root", async () => {
  await using ca = await pebbleBed({ domains: NAME, env: { PEBBLE_ALTERNATE_ROOTS: "2" } });
  const { bed } = ca;
  const roots = await Promise.all([0, 1, 2].map(async (chain) => rootOf(await ca.pebble.rootPem(chain))!));
  const missing = () => new Response(null, { status: 404 });
  const invalid = (body: string, headers: Headers) =>
    new Response(body.replace(/^MI[^-]*/gm, "AAAA\n"), { headers });
  const linked = (link: string) => (body: string, headers: Headers) => {
    headers.set("link", link);
    return new Response(body, { headers });
  };
  const elsewhere = linked('<https://elsewhere.example/chain>;rel="alternate"');
  const many = linked('<>;rel="alternate",'.repeat(100));
  const table: [wanted: string, changed: RegExp | undefined, change: typeof invalid, expected: string][] = [
    [roots[0]!, /\/alternate/, missing, roots[0]!],
    [roots[2]!, undefined, missing, roots[2]!],
    [roots[2]!.slice(0, -1), undefined, missing, roots[0]!], // not a root of this CA
    [roots[2]!, /\/alternate/, missing, roots[0]!],
    [roots[2]!, /\/alternate/, invalid, roots[0]!],
    [roots[2]!, /\/certZ\//, elsewhere, roots[0]!],
    [roots[2]!, /\/certZ\//, many, roots[0]!],
  ];
  const { fetch } = bed.context();
  for (const [wanted, changed, change, expected] of table) {
    ca.set(`ari: no\nkeyTypes: ec\npreferredChain: ${wanted}`);
    let downloads = 0;
    const { code, stdout, stderr } = await runAt(bed, {
      async fetch(url, init) {
        downloads += Number(url.includes("/certZ/"));
        const response = await fetch(url, init);
        if (!response.ok || !changed?.test(url)) return response; // Pebble rejects some nonces
        return change(await response.text(), new Headers(response.headers));
      },
    });
    assert.deepEqual([code, stderr], [0, ""]);
    assert(downloads <= 12, `${downloads} downloads`);
    assert.equal(rootOf(bed.text(CERT)), expected, wanted);
    assert.equal(new RegExp(`^note .*"${wanted}"`, "m").test(stdout), expected !== wanted, stdout);
    await Deno.remove(bed.path("test/cert"), { recursive: true });
  }
});

// ---- newer than RFC 8555 -----------------------------------------------------------------------------------------

pebbleTest("certificates for IP addresses are issued with a profile of six days, and kept", async () => {
  await using ca = await pebbleBed({
    domains: "127.0.0.1 ::1",
    settings: "keyTypes: ec\nprofile: shortlived",
    config: { profiles: { shortlived: { description: "six days", validityPeriod: 6 * 86_400 } } },
  });
  await using _six = startWebroot(ca.bed.drop, { hostname: "::1", port: ca.bed.web.port });
  assert.match(await ca.lematt(), /^issued +127\.0\.0\.1 \+1/m);
  const { subject, validToDate, validFromDate } = (await ca.issued()).get("ec 127.0.0.1 ::1")!;
  const days = (validToDate.getTime() - validFromDate.getTime()) / DAY;
  assert.deepEqual([subject, Math.round(days)], [undefined, 6]);
  assert.match(await ca.lematt(), /^nothing due, 1 kept/m);
}, MODERN);

pebbleTest("dns-01 with one value per record, and dns-persist-01, are validated", async () => {
  const actions = `[dns]\ndomains: ${NAME} *.${NAME}\nchallenge: dns-01\n` +
    // as at a provider with one value per name
    `dnsPresent: ["rm -rf ZONE/RECORD; mkdir -p ZONE/RECORD; touch ZONE/RECORD/VALUE"]\n` +
    `dnsCleanup: ["rm -f ZONE/RECORD/VALUE"]\n` +
    "[persistent]\ndomains: *.example.org\nchallenge: dns-persist-01\n";
  await using ca = await pebbleBed({
    domains: `${NAME} *.${NAME}\n*.example.org www.example.org`,
    actions,
    accountKey: { type: "ec", curve: "P-384" },
    settings: "keyTypes: ec\npreflight: no", // the self-check would ask the resolver of this host
    config: { caaIdentities: ["pebble.example"] },
    env: { PEBBLE_AUTHZREUSE: "0" },
  });
  const output = await ca.lematt();
  assert.match(output, /^issued +example\.com \+1 [^]*^FAILED +\*\.example\.org \+1 /m);
  const [, record, value] = /^place +(\S+)\. IN TXT "(.*)"$/m.exec(await ca.lematt("--plan"))!;
  assert.match(value!, /^pebble\.example; accounturi=https:\/\/\S+; policy=wildcard$/);
  ca.pebble.dns.set(record!, "TXT", value!);
  assert.match(await ca.lematt("--retry"), /^issued +\*\.example\.org \+1/m);
  const names = [`ec *.${NAME} ${NAME}`, "ec *.example.org www.example.org"];
  assert.deepEqual([...(await ca.issued()).keys()].sort(), names);
}, MODERN);

pebbleTest(
  "an account is bound, its contact and key are changed; a certificate is renewed early, and revoked",
  async () => {
    const mac = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
    await using ca = await pebbleBed({
      domains: NAME,
      accountKey: { type: "ec", curve: "P-521" },
      config: { externalAccountBindingRequired: true, externalAccountMACKeys: { "kid-1": mac } },
    });
    const { bed, pebble } = ca;
    assert.match(await ca.lematt(), /set eabKeyId and eabHmacKey/);
    const eab = "keyTypes: ec\neabKeyId: kid-1\neabHmacKey: eab\n";
    const other = "YW5vdGhlciBrZXkgb2YgdGhlIHJpZ2h0IGxlbmd0aA";
    await Deno.writeTextFile(bed.path("eab"), other, { mode: 0o600 });
    ca.set(eab);
    const output = await ca.lematt("--retry");
    assert.match(output, /cannot register the account: .*\nexit status 1/);
    assert(!output.includes(other), output);
    await Deno.writeTextFile(bed.path("eab"), mac);
    assert.match(await ca.lematt("--retry"), /^issued /m);
    ca.set(`${eab}contact: new@example.com`);
    assert.match(await ca.lematt("--renew", NAME), /^issued /m);

    const suggestedWindow = { start: new Date(Date.now() - 2 * HOUR), end: new Date(Date.now() - HOUR) };
    const ARIResponse = JSON.stringify({
      suggestedWindow,
      explanationURL: "https://pebble.example/incident",
    });
    const Certificate = new X509Certificate(bed.text(CERT)).toString();
    await pebble.manage("/set-renewal-info/", { Certificate, ARIResponse });
    assert.match(await ca.lematt(), /^issued .*https:\/\/pebble\.example\/incident/m);
    assert.match(await ca.lematt(), /^nothing due, 1 kept/m);

    const revoked = new X509Certificate(bed.text(CERT));
    assert.match(await ca.lematt("--rollover", "--yes"), /^changed /m);
    assert.match(await ca.lematt("--revoke", NAME, "--yes", "--reason", "superseded"), /^revoked/m);
    const status = await pebble.manage(`/cert-status-by-serial/${revoked.serialNumber.toLowerCase()}`);
    assert.equal(JSON.parse(status).Status, "Revoked");
    assert.match(await ca.lematt(), /^issued /m);
    assert(!new X509Certificate(bed.text(CERT)).publicKey.equals(revoked.publicKey));
  },
  MODERN,
);
