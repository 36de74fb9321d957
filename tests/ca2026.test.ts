/**
 * Goal: what CAs offer since RFC 8555 is used as they mean it: profiles, addresses, chains; and all of it holds
 * before Pebble, which nobody here wrote.
 */

import assert from "node:assert/strict";
import { X509Certificate } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { systemQuery } from "../lib/context.ts";
import { rootOf } from "../lib/x509.ts";
import { type Bed, refusing, testBed, type TestWorld } from "./bed.ts";
import { type Fault, startWebroot, type Switches } from "./ca.ts";
import { type PebbleOptions, pebbleTest, startPebble } from "./pebble.ts";

const HOUR = 3600_000, DAY = 24 * HOUR;
const NAME = "example.com";

/** The certificates of --test, by the names of their files. */
function certificates(bed: Bed): Map<string, X509Certificate> {
  const directory = bed.path("test/cert");
  const files = readdirSync(directory, { withFileTypes: true }).filter((entry) => entry.isFile());
  return new Map(files.map(({ name }) => [name, new X509Certificate(readFileSync(join(directory, name)))]));
}

const lifeOf = ({ validFrom, validTo }: X509Certificate) => Date.parse(validTo) - Date.parse(validFrom);

// ---- profiles ----------------------------------------------------------------------------------------------------

Deno.test("a line is ordered under the profile of its section, else of [config], else of the CA's choice", async () => {
  const actions = "[a]\ndomains: a.example\nprofile: tlsserver\n";
  await using bed = await testBed({ domains: "a.example\nb.example", actions, settings: "keyTypes: ec" });
  const profiles = async (settings: string) => {
    bed.configure({ settings: `keyTypes: ec\n${settings}` });
    const { code, stderr } = await bed.run();
    assert.deepEqual([code, stderr], [0, ""]);
    await Deno.remove(bed.path("test"), { recursive: true });
    return Object.fromEntries(bed.ca.issued.slice(-2).map(({ names, profile }) => [names[0], profile]));
  };
  assert.deepEqual(await profiles(""), { "a.example": "tlsserver", "b.example": "classic" });
  assert.deepEqual(await profiles("profile: shortlived"), {
    "a.example": "tlsserver",
    "b.example": "shortlived",
  });
});

for (
  const [what, ca, offered] of [
    ["with other profiles", {}, "classic, tlsserver, shortlived"],
    ["without profiles", { profiles: {} }, "none"],
  ] as [string, Switches, string][]
) {
  Deno.test(`a CA ${what} is not asked for one that it does not have; the other lines go on`, async () => {
    const actions = "[a]\ndomains: a.example\nprofile: tlsclient\n";
    await using bed = await testBed({
      domains: "a.example\nb.example",
      actions,
      settings: "keyTypes: ec",
      ca,
    });
    const { code, stderr } = await bed.run();
    const why = `cannot create an order: the CA has no profile "tlsclient"; it offers: ${offered}`;
    assert.deepEqual([code, stderr.replace(/\s+/g, " ")], [1, `FAILED a.example (ec) ${why} `]);
    assert.deepEqual(bed.ca.orders.map(({ identifiers }) => identifiers[0]!.value), ["b.example"]);
    bed.configure({ actions: "" });
    assert.equal((await bed.run()).code, 0, "it need not wait: the CA was not bothered");
  });
}

// ---- addresses ---------------------------------------------------------------------------------------------------

Deno.test("addresses are certified as addresses, without a common name, and what was issued is found in place", async () => {
  const domains = "192.0.2.1 2001:DB8:0::7\n2001:db8::8\nmail.example 192.0.2.2";
  await using bed = await testBed({ domains, settings: "keyTypes: ec\nprofile: shortlived" });
  const { code, stderr } = await bed.run();
  assert.deepEqual([code, stderr], [0, ""]);
  const requested = bed.ca.orders.map(({ request }) => {
    const { identifiers, commonNames } = request!;
    return `${identifiers.map(({ type, value }) => `${type} ${value}`).join(", ")}; CN ${commonNames}`;
  });
  assert.deepEqual(
    requested.sort(),
    [
      "dns mail.example, ip 192.0.2.2; CN mail.example",
      "ip 192.0.2.1, ip 2001:db8::7; CN ",
      "ip 2001:db8::8; CN ",
    ],
  );
  const hosts = new Set(bed.web.log.map(({ host }) => host));
  assert.deepEqual(
    hosts,
    new Set(["192.0.2.1", "[2001:db8::7]", "[2001:db8::8]", "mail.example", "192.0.2.2"]),
  );
  assert.deepEqual([...certificates(bed).keys()].sort(), [
    "192.0.2.1_2001-db8--7-cert-combined.prime256v1.test.pem",
    "2001-db8--8-cert-combined.prime256v1.test.pem",
    "mail.example_192.0.2.2-cert-combined.prime256v1.test.pem",
  ]);
  assert.match((await bed.run()).stdout, /^nothing due, 3 kept/m);
});

Deno.test("a challenge of an address is self-checked under the address before the CA is asked", async () => {
  await using bed = await testBed({
    domains: "2001:db8::7",
    settings: "keyTypes: ec\nprofile: shortlived",
  });
  bed.configure({ actions: `[default]\nprepare: ["echo DOMAIN > ${bed.home}/prepared; cat"]` });
  const seen: string[] = [];
  const ran = await bed.run({
    route(host) {
      seen.push(host);
      return Promise.resolve([{ address: "127.0.0.1", port: bed.web.port }]);
    },
  });
  assert.deepEqual([ran.code, ran.stderr, new Set(seen)], [0, "", new Set(["2001:db8::7"])]);
  assert.equal(readFileSync(join(bed.home, "prepared"), "utf8"), "2001:db8::7\n");
});

Deno.test("a profile that allows no addresses is reported in the CA's words, each address with its reason", async () => {
  await using bed = await testBed({ domains: "192.0.2.1 192.0.2.2", settings: "profile: tlsserver" });
  const { code, stderr } = await bed.run();
  assert.equal(code, 1);
  assert.match(
    stderr,
    /192\.0\.2\.1: the profile allows no IP addresses.*192\.0\.2\.2: the profile allows no IP/,
  );
});

// ---- chains ------------------------------------------------------------------------------------------------------

const NO_CHAIN = /^note +no chain of example\.com leads to "(.*)"(.*): the default one is taken$/m;
for (
  const [what, preferred, fault, root, note] of [
    ["without a wish", undefined, undefined, 1, undefined],
    ["where it is wished for", "lematt test root 1", undefined, 1, undefined],
    ["unless an alternate is wished for", "lematt test root 3", undefined, 3, undefined],
    ["where no alternate is the one wished for", "lematt test root 9", undefined, 1, ""],
    ["where a wish is only half the name", "lematt test root", undefined, 1, ""],
    [
      "where the alternates cannot be had",
      "lematt test root 3",
      refusing(404, "malformed", "gone"),
      1,
      " (gone (malformed))",
    ],
    [
      "where an alternate is of no use",
      "lematt test root 2",
      {
        kind: "rewrite text",
        rewrite: () => "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
      },
      1,
      "",
    ],
  ] as [string, string | undefined, Fault | undefined, number, string | undefined][]
) {
  Deno.test(`the default chain is taken ${what}`, async () => {
    const settings = preferred === undefined ? "" : `preferredChain: ${preferred}`;
    await using bed = await testBed({
      domains: NAME,
      settings: `keyTypes: ec\n${settings}`,
      ca: {
        alternateRoots: 2,
        fault: ({ url }) => /\/certificate\/.*\/\d+$/.test(url) ? fault : undefined,
      },
    });
    const { code, stdout, stderr } = await bed.run();
    assert.deepEqual([code, stderr], [0, ""]);
    const [, wish, why] = NO_CHAIN.exec(stdout) ?? [];
    assert.deepEqual([wish, why], note === undefined ? [undefined, undefined] : [preferred, note]);
    const chain = bed.text(`test/cert/${NAME}-cert-combined.prime256v1.test.pem`);
    assert.equal(rootOf(chain), `lematt test root ${root}`);
  });
}

Deno.test("an alternate chain at another host is not asked for", async () => {
  await using bed = await testBed({
    domains: NAME,
    settings: "keyTypes: ec\npreferredChain: Elsewhere",
  });
  const fetchAs: TestWorld["fetch"] = async (url, init) => {
    const response = await bed.world().fetch(url, init);
    if (!url.includes("/certificate/")) return response;
    const headers = new Headers(response.headers);
    headers.append("link", `<https://elsewhere.example/chain>;rel="alternate"`);
    return new Response(response.body, { status: response.status, headers });
  };
  const { code, stdout } = await bed.run({ fetch: fetchAs });
  assert.equal(code, 0);
  assert.match(
    stdout,
    /leads to "Elsewhere" \(the CA named an unusable URL "https:\/\/elsewhere\.example\/chain"\)/,
  );
});

// ---- Pebble ------------------------------------------------------------------------------------------------------

/**
 * A bed whose CA is the newest Pebble, with hooks for dns-01 in a section `dns`, whose `domains` are given. In texts
 * ZONE is a directory of files `<record>/<TXT value>`, which Pebble's resolver serves, and HOME the bed's.
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
  const configure = (texts: { settings?: string; actions?: string }) => {
    const { directoryUrl, caBundleFile } = pebble;
    const ca = `keyTypes: ec\ntestDirectory: ${directoryUrl}\ncaBundle: ${caBundleFile}\n`;
    bed.configure({
      ...(texts.settings !== undefined && { settings: ca + texts.settings }),
      ...(texts.actions !== undefined &&
        { actions: texts.actions.replaceAll("ZONE", zone).replaceAll("HOME", bed.home) }),
    });
  };
  configure({ settings, actions });

  /** Runs the program; returns what it said on both streams, and its exit status where that is not 0. */
  async function lematt(...args: string[]): Promise<string> {
    const { code, stdout, stderr } = await bed.lematt("--test", ...args);
    return stdout + stderr + (code === 0 ? "" : `exit status ${code}\n`);
  }

  const open = stack.move();
  return { bed, pebble, configure, lematt, [Symbol.asyncDispose]: () => open.disposeAsync() };
}

/** What `openssl x509 -text` says of a certificate. */
async function textOf(certificate: X509Certificate): Promise<string> {
  const file = await Deno.makeTempFile();
  await Deno.writeTextFile(file, certificate.toString());
  const { stdout } = await new Deno.Command("openssl", { args: ["x509", "-noout", "-text", "-in", file] })
    .output();
  await Deno.remove(file);
  return new TextDecoder().decode(stdout);
}

pebbleTest(
  "Pebble's suggestions are heeded, unless they make no sense; a drill renews and delivers everything",
  async () => {
    await using ca = await pebbleBed({
      domains: "a.example.com\nb.example.com www.b.example.com",
      actions: `[default]\nupdate: ["echo DOMAINS_CN >> HOME/log"]\n`,
    });
    const { bed, pebble } = ca;
    await ca.lematt();
    await Deno.remove(join(bed.home, "log"));
    const before = [...certificates(bed).values()];
    const window = (start: number, end: number) => ({
      suggestedWindow: { start: new Date(Date.now() + start), end: new Date(Date.now() + end) },
      explanationURL: "https://pebble.example/incident",
    });
    const suggest = async (...answers: unknown[]) => {
      for (const [i, answer] of answers.entries()) {
        const ARIResponse = typeof answer === "string" ? answer : JSON.stringify(answer);
        await pebble.manage("/set-renewal-info/", { Certificate: before[i]!.toString(), ARIResponse });
      }
    };
    const askAgain = () => {
      const state = JSON.parse(bed.text("test/state.json"));
      for (const renewal of Object.values<{ askAt?: string }>(state.renewals)) delete renewal.askAt;
      Deno.writeTextFileSync(bed.path("test/state.json"), JSON.stringify(state));
    };

    await suggest(window(DAY, -DAY), `{"suggested`);
    const odd = await ca.lematt();
    assert.match(
      odd,
      /^note +a\.example\.com \(ec\): .*the renewal window ends before it starts; its dates decide$/m,
    );
    assert.match(odd, /^note +b\.example\.com \(ec\): .*broken JSON; its dates decide$/m);
    assert.match(odd, /^nothing due, 2 kept/m);
    askAgain();
    await suggest(window(40 * DAY, 41 * DAY), window(40 * DAY, 41 * DAY));
    await ca.lematt();
    assert.match(await ca.lematt("--plan"), /^keep .*as the CA suggests/m);

    askAgain();
    await suggest(window(-2 * HOUR, -HOUR), window(-2 * HOUR, -HOUR));
    const drill = await ca.lematt();
    const issued = /^issued .*as the CA suggests.*https:\/\/pebble\.example\/incident/gm;
    assert.equal(drill.match(issued)?.length, 2, drill);
    assert.deepEqual(readFileSync(join(bed.home, "log"), "utf8").split(/\s/).sort(), [
      "",
      "a.example.com",
      "b.example.com",
    ]);
    const after = [...certificates(bed).values()].map(({ serialNumber }) => serialNumber);
    assert(before.every(({ serialNumber }) => !after.includes(serialNumber)));
    assert.match(await ca.lematt(), /^nothing due, 2 kept/m);
  },
  { modern: true },
);

pebbleTest("Pebble issues for addresses under a profile of six days", async () => {
  const domains = "127.0.0.1 ::1";
  await using ca = await pebbleBed({
    domains,
    settings: "profile: shortlived",
    config: {
      profiles: {
        default: { description: "ninety days", validityPeriod: 90 * 86_400 },
        shortlived: { description: "six days", validityPeriod: 6 * 86_400 },
      },
    },
  });
  await using _six = startWebroot(ca.bed.drop, { hostname: "::1", port: ca.bed.web.port });
  const said = await ca.lematt();
  assert.match(said, /^issued +127\.0\.0\.1 \+1/m);
  const [certificate] = [...certificates(ca.bed).values()];
  const text = await textOf(certificate!);
  assert.match(text, /IP Address:127\.0\.0\.1, IP Address:0:0:0:0:0:0:0:1\n/);
  assert.match(text, /Subject: *\n/, "a common name");
  assert.equal(Math.round(lifeOf(certificate!) / DAY), 6);
  ca.configure({ settings: "profile: tlsserver\nari: no" });
  await Deno.remove(ca.bed.path("test/cert"), { recursive: true });
  assert.match(
    await ca.lematt(),
    /the CA has no profile "tlsserver"; it offers: (default, shortlived|shortlived, default)$/m,
  );
}, { modern: true });

const HOOKS =
  `dnsPresent: ["mkdir -p ZONE/RECORD && touch ZONE/RECORD/VALUE"]\ndnsCleanup: ["rm ZONE/RECORD/VALUE"]\n`;
const DNS = `[dns]\ndomains: ${NAME} *.${NAME}\nchallenge: dns-01\n${HOOKS}` +
  "[persistent]\ndomains: *.example.org\nchallenge: dns-persist-01\n";

pebbleTest(
  "Pebble finds the values of dns-01, behind a CNAME too, and a persistent record of dns-persist-01",
  async () => {
    const domains = `${NAME} *.${NAME}\n*.example.org www.example.org\n`;
    const config = { caaIdentities: ["pebble.example"] };
    const env = { PEBBLE_AUTHZREUSE: "0" };
    await using ca = await pebbleBed({ domains, actions: DNS, settings: "preflight: no", config, env });
    const { bed, pebble: { dns, caBundleFile } } = ca;
    const persistent = "_validation-persist.example.org";
    const refused = await ca.lematt();
    assert.match(refused, new RegExp(`^issued +${NAME} \\+1 `, "m"));
    assert.match(refused, /^FAILED +\*\.example\.org \+1 .*\n.*DNS-PERSIST-01 challenge/m);
    const [, value] = /^place +_validation-persist\.example\.org\. IN TXT "(.*)"$/m.exec(
      await ca.lematt("--plan"),
    )!;
    assert.match(value!, /^pebble\.example; accounturi=https:\/\/\S+; policy=wildcard$/);
    dns.set(persistent, "TXT", value!);
    assert.match(await ca.lematt("--retry"), /^issued +\*\.example\.org \+1/m);
    const names = [...certificates(bed).values()].map(({ subjectAltName }) => subjectAltName).sort();
    assert.deepEqual(names, ["DNS:*.example.org, DNS:www.example.org", `DNS:${NAME}, DNS:*.${NAME}`]);

    // and again with a self-check at the zone's servers before, which is possible in this process only
    await Deno.remove(bed.path("test/cert"), { recursive: true });
    for (const zone of [NAME, "example.org"]) dns.set(zone, "NS", "ns.example.net");
    dns.set("ns.example.net", "A", "127.0.0.1");
    ca.configure({
      settings: "",
      actions: DNS.replaceAll("ZONE/RECORD", "ZONE/DOMAIN.acme.example.net").replace("*.example.com", ""),
    });
    bed.configure({ domains: `${NAME}\n*.example.org www.example.org\n` });
    dns.set(`_acme-challenge.${NAME}`, "CNAME", `${NAME}.acme.example.net`);
    dns.set("acme.example.net", "NS", "ns.example.net");
    using client = Deno.createHttpClient({ caCerts: [await Deno.readTextFile(caBundleFile)] });
    const ran = await bed.run({
      fetch: (url, init) => fetch(url, { ...init, client }),
      now: () => new Date(),
      query: (name, type) => systemQuery(name, type, { address: "127.0.0.1", port: dns.port }),
    });
    assert.deepEqual([ran.code, ran.stderr, certificates(bed).size], [0, "", 2]);
  },
  { modern: true },
);

pebbleTest("Pebble binds an account, offers chains, changes contact and key, and revokes", async () => {
  const mac = "zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W";
  await using ca = await pebbleBed({
    domains: NAME,
    config: { externalAccountBindingRequired: true, externalAccountMACKeys: { "kid-1": mac } },
    env: { PEBBLE_ALTERNATE_ROOTS: "2" },
  });
  const { bed, pebble } = ca;
  assert.match(
    await ca.lematt(),
    /cannot register the account: the CA wants an external account: set eabKeyId and eabHmacKey/,
  );
  const eab = "eabKeyId: kid-1\neabHmacKey: eab\n";
  const other = "YW5vdGhlciBrZXkgb2YgdGhlIHJpZ2h0IGxlbmd0aA";
  await Deno.writeTextFile(bed.path("eab"), other, { mode: 0o600 });
  for (const settings of [eab.replace("kid-1", "kid-2"), eab]) { // an unknown account, and the wrong key
    ca.configure({ settings });
    const said = await ca.lematt("--retry");
    assert.match(said, /cannot register the account: .*\n/);
    assert(!said.includes(other), said);
  }
  await Deno.writeTextFile(bed.path("eab"), mac);

  const root = rootOf(await pebble.rootPem(2))!;
  ca.configure({ settings: `${eab}preferredChain: ${root}\n` });
  assert.match(await ca.lematt("--retry"), /^issued /m);
  const file = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;
  assert.equal(rootOf(bed.text(file)), root);

  ca.configure({
    settings:
      `${eab}preferredChain: ISRG Root X9\ncontact: new@example.com\ngenerateNewCertsAfterDays: 0.000001`,
  });
  const renewed = await ca.lematt();
  assert.match(
    renewed,
    /^note +no chain of example\.com leads to "ISRG Root X9": the default one is taken$/m,
  );
  assert.match(renewed, /^issued /m);
  const serial = new X509Certificate(bed.text(file)).serialNumber;

  assert.match(await ca.lematt("--rollover", "--yes"), /^changed /m);
  assert.match(
    await ca.lematt("--revoke", NAME, "--yes", "--reason", "superseded"),
    /^revoked; the next run/m,
  );
  assert.equal(
    JSON.parse(await pebble.manage(`/cert-status-by-serial/${serial.toLowerCase()}`)).Status,
    "Revoked",
  );
  const last = await ca.lematt();
  assert.match(last, /^issued .*its key was revoked$/m);
  assert.notEqual(new X509Certificate(bed.text(file)).serialNumber, serial);
}, { modern: true });
