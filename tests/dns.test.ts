/** Goal: names are proven by TXT records that hooks place or that stand, and the CA is asked when it will find them. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { checkChallenges } from "../lib/challenge.ts";
import { type Query, systemQuery } from "../lib/context.ts";
import { befalling, type Ran, testBed, until } from "./bed.ts";
import { type Dns, startDns, type Switches } from "./ca.ts";

const NAME = "example.com";
const RECORD = `_acme-challenge.${NAME}`;
const PRESENT = "mkdir -p ZONE/RECORD && touch ZONE/RECORD/VALUE";
const CLEANUP = "rm ZONE/RECORD/VALUE";

/** What a bed has beside its texts; in commands and texts ZONE is the directory of TXT records, HOME the bed's. */
interface Setting {
  domains?: string;
  settings?: string;
  /** The whole of actions.conf; without it NAME and its wildcard are proven by dns-01 with these hooks. */
  actions?: string;
  present?: string;
  cleanup?: string;
  ca?: Switches;
}

/**
 * A bed whose names are proven through the DNS. Its zone is a directory of files `<record>/<TXT value>`, in which hooks
 * write; one DNS server, which is ns1.example.com and ns2.example.com, serves that to the CA and to `query`.
 */
async function dnsBed({ domains = NAME, settings = "", ca = {}, ...hooks }: Setting = {}) {
  await using stack = new AsyncDisposableStack();
  let zone = "";
  const files = (name: string) => existsSync(join(zone, name)) ? readdirSync(join(zone, name)) : [];
  const dns = stack.use(await startDns((name, type) => type === "TXT" ? files(name) : []));
  const { txt, cname } = dns;
  const bed = stack.use(
    await testBed({ domains, settings: `keyTypes: ec\n${settings}`, ca: { txt, cname, ...ca } }),
  );
  zone = join(bed.home, "zone");
  const { present = PRESENT, cleanup = CLEANUP } = hooks;
  const list = (command: string) => JSON.stringify([command]).replaceAll("%", "%%");
  const actions = hooks.actions ?? `[dns]\ndomains: ${NAME} *.${NAME}\nchallenge: dns-01\n` +
      `dnsPresent: ${list(present)}\ndnsCleanup: ${list(cleanup)}\n`;
  bed.configure({ actions: actions.replaceAll("ZONE", zone).replaceAll("HOME", bed.home) });
  delegate(dns, NAME, "ns1", "ns2");

  const placed = () => existsSync(zone) ? readdirSync(zone).flatMap((name) => files(name)) : [];
  const open = stack.move();
  return {
    bed,
    dns,
    query: asking(dns),
    /** The TXT values that are in the zone. */
    placed,
    /** Lines that commands have written to HOME/log. */
    log: () =>
      existsSync(join(bed.home, "log")) ? Deno.readTextFileSync(join(bed.home, "log")).split("\n") : [],
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

/** Makes a zone with these name servers in it. */
function delegate(dns: Dns, zone: string, ...servers: string[]) {
  dns.set(zone, "SOA", `ns1.${zone}`);
  dns.set(zone, "NS", ...servers.map((server) => `${server}.${zone}`));
  for (const [i, server] of servers.entries()) dns.set(`${server}.${zone}`, "A", `127.0.0.${i + 1}`);
}

/** Queries as they are made, but every server is this one; `ask` can answer instead. */
function asking(
  { port }: Dns,
  ask: (...query: Parameters<Query>) => string[] | undefined = () => undefined,
): Query {
  return async (name, type, server) =>
    ask(name, type, server) ?? await systemQuery(name, type, { address: "127.0.0.1", port });
}

const asked = ({ requests }: Ran) => requests.filter(({ resource }) => resource === "challenge").length;

// ---- dns-01 ------------------------------------------------------------------------------------------------------

Deno.test("a hook gets record, value and name, the CA finds the value there, and it is taken away again", async () => {
  const tell = (what: string) =>
    `echo "${what} $LEMATT_RECORD $LEMATT_VALUE $LEMATT_DOMAIN" RECORD VALUE DOMAIN >> HOME/log`;
  await using at = await dnsBed({
    present: `${PRESENT} && ${tell("present")}`,
    cleanup: `${CLEANUP} && ${tell("cleanup")}`,
  });
  const ran = await at.bed.run({ query: at.query });
  assert.deepEqual([ran.code, ran.stderr, ran.stdout.match(/^note.*/gm)], [0, "", null]);
  assert.deepEqual(at.bed.ca.validations, [{ type: "dns-01", name: NAME }]);
  const { token } = at.bed.ca.orders[0]!.authorizations[0]!.challenges.find(({ type }) => type === "dns-01")!;
  const content = `${token}.${at.bed.ca.accounts[0]!.key.thumbprint}`;
  const words = `${RECORD} ${createHash("sha256").update(content).digest("base64url")} ${NAME}`;
  assert.deepEqual(at.log(), [`present ${words} ${words}`, `cleanup ${words} ${words}`, ""]);
  assert.deepEqual(at.placed(), []);
});

Deno.test("a name and its wildcard have a value each at one record at once", async () => {
  let most = 0;
  await using at = await dnsBed({
    domains: `${NAME} *`,
    ca: { fault: () => void (most = Math.max(most, at.placed().length)) },
  });
  const ran = await at.bed.run({ query: at.query });
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  assert.deepEqual(at.bed.ca.validations.map(({ name }) => name).sort(), [`*.${NAME}`, NAME]);
  assert.deepEqual([most, at.placed()], [2, []]);
});

for (
  const [dnsParallel, around] of [
    ["no", "mkdir HOME/busy && HOOK && rmdir HOME/busy"],
    ["yes", "touch HOME/DOMAIN; until [ -e HOME/a.example -a -e HOME/b.example ]; do sleep 0.01; done; HOOK"],
  ] as const
) {
  Deno.test(`hooks of all lines run ${dnsParallel === "no" ? "one after the other" : "side by side"} with dnsParallel: ${dnsParallel}`, async () => {
    const [present, cleanup] = [PRESENT, CLEANUP].map((hook) => around.replace("HOOK", hook));
    await using at = await dnsBed({
      domains: "a.example\nb.example *",
      actions: `[dns]\ndomains: a.example b.example *.b.example\nchallenge: dns-01\n` +
        `dnsParallel: ${dnsParallel}\ndnsPresent: ["${present}"]\ndnsCleanup: ["${cleanup}"]\n`,
    });
    for (const zone of ["a.example", "b.example"]) delegate(at.dns, zone, "ns1");
    const ran = await at.bed.run({ query: at.query });
    assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  });
}

/** What hooks do at a provider that keeps one value a name: the last one, and whoever removes one removes all. */
const ONE_VALUE = {
  present: "rm -rf ZONE/RECORD; mkdir -p ZONE/RECORD && touch ZONE/RECORD/VALUE && echo present >> HOME/log",
  cleanup: "rm -r ZONE/RECORD && echo cleanup >> HOME/log",
};
for (
  const [domains, settings, hooks] of [
    [`${NAME} *`, "", "present present cleanup present cleanup"],
    [`${NAME} *`, "preflight: no", "present cleanup present cleanup"],
    [`${NAME}\n*.${NAME}`, "", "present cleanup present cleanup"],
  ] as const
) {
  Deno.test(`a provider that keeps one value a name serves ${JSON.stringify(domains)} ${settings}`, async () => {
    await using at = await dnsBed({ domains, settings, ...ONE_VALUE });
    const ran = await at.bed.run({ query: at.query });
    assert.deepEqual([ran.code, ran.stderr, ran.stdout.match(/^note.*/gm)], [0, "", null]);
    assert.deepEqual(at.bed.ca.validations.map(({ name }) => name).sort(), [`*.${NAME}`, NAME]);
    assert.deepEqual([at.log().join(" ").trim(), at.placed()], [hooks, []]);
    assert.deepEqual(JSON.parse(at.bed.text("test/state.json")).published, []);
  });
}

Deno.test("two lines that need each other's records in turn do not wait for each other for ever", async () => {
  const names = ["a.example", "b.example"];
  await using at = await dnsBed({
    domains: "a.example b.example\n*.b.example *.a.example",
    actions:
      `[dns]\ndomains: ${names.flatMap((name) => [name, `*.${name}`]).join(" ")}\nchallenge: dns-01\n` +
      `dnsPresent: ["${ONE_VALUE.present}"]\ndnsCleanup: ["${ONE_VALUE.cleanup}"]\n`,
  });
  for (const zone of names) delegate(at.dns, zone, "ns1");
  const ran = await at.bed.run({ query: at.query });
  assert.deepEqual([ran.code, ran.stderr, at.bed.ca.issued.length, at.placed()], [0, "", 2, []]);
});

Deno.test("a mixed line proves each name by the challenge of its section", async () => {
  await using at = await dnsBed({
    domains: `${NAME} www *`,
    actions:
      `[wild]\ndomains: *.${NAME}\nchallenge: dns-01\ndnsPresent: ["${PRESENT}"]\ndnsCleanup: ["${CLEANUP}"]\n`,
  });
  const ran = await at.bed.run({ query: at.query });
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  const proven = at.bed.ca.validations.map(({ type, name }) => `${name} ${type}`).sort();
  assert.deepEqual(proven, [`*.${NAME} dns-01`, `${NAME} http-01`, `www.${NAME} http-01`]);
  assert.deepEqual([at.placed(), at.bed.dropped()], [[], []]);
});

Deno.test("a record may be delegated by CNAME to a zone of its own, whose servers are the ones to be asked", async () => {
  const target = "DOMAIN.acme.example.net";
  await using at = await dnsBed({
    present: `mkdir -p ZONE/${target} && touch ZONE/${target}/VALUE`,
    cleanup: `rm ZONE/${target}/VALUE`,
  });
  at.dns.set(RECORD, "CNAME", `step.example.net`);
  at.dns.set("step.example.net", "CNAME", `${NAME}.acme.example.net.`);
  delegate(at.dns, "acme.example.net", "ns3");
  const servers = new Set<unknown>();
  const query = asking(at.dns, (name, _type, server) => {
    if (server) servers.add([name, server.address].join());
    return undefined;
  });
  const ran = await at.bed.run({ query });
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  assert.deepEqual([...servers], ["acme.example.net,127.0.0.1", `${NAME}.acme.example.net,127.0.0.1`]);
});

Deno.test("the CA is not asked before every server has the value, which may take some looks", async () => {
  await using at = await dnsBed();
  let looks = 0;
  const query = asking(at.dns, (_name, type, server) => {
    const late = type === "TXT" && server?.address === "127.0.0.2" && ++looks < 4;
    assert(!late || at.bed.ca.log.every(({ resource }) => resource !== "challenge"));
    return late ? ["what was there before"] : undefined;
  });
  const ran = await at.bed.run({ query });
  assert.deepEqual([ran.code, ran.stderr, looks], [0, "", 4]);
  assert.equal(at.bed.waits.filter((ms) => ms === 2000).length, 3);
});

for (
  const [what, ask, fault] of [
    [
      "has nothing",
      (_, type, server) => type === "TXT" && server?.address === "127.0.0.2" ? [] : undefined,
      `ns2.${NAME} has no TXT record at ${RECORD}`,
    ],
    [
      "has something else",
      (_, type, server) => type === "TXT" && server?.address === "127.0.0.1" ? ["x"] : undefined,
      `ns1.${NAME} has other TXT records at ${RECORD}`,
    ],
    [
      "leads in a circle",
      (_, type) => type === "CNAME" ? [RECORD] : undefined,
      `cannot look up ${RECORD}: more than 8 CNAMEs in a row`,
    ],
    [
      "has a name with escapes in it, and no address",
      (_, type) => type === "NS" ? ["\x1b[2J\n.example.com"] : type === "TXT" ? [] : undefined,
      `no name server of ${RECORD} answers for it ([2J .example.com), and the system's resolver has no TXT record at`,
    ],
  ] as [string, (...query: Parameters<Query>) => string[] | undefined, string][]
) {
  Deno.test(`the CA is not asked where a name server ${what}; after dnsWait the line fails and says so`, async () => {
    await using at = await dnsBed({ settings: "dnsWait: 20" });
    const ran = await at.bed.run({ query: asking(at.dns, ask) });
    assert.deepEqual([ran.code, asked(ran), at.placed()], [1, 0, []]);
    assert(ran.stderr.includes(`self-check of the challenge for ${NAME} failed: ${fault}`), ran.stderr);
    assert.equal(at.bed.waits.reduce((sum, ms) => sum + ms, 0), 18_000);
  });
}

Deno.test("dnsWait limits also one self-check, in which name servers are silent", async () => {
  await using at = await dnsBed({ settings: "dnsWait: 1" });
  const begun = Date.now();
  const ran = await at.bed.run({
    query: (name, type) => type === "TXT" ? new Promise(() => {}) : at.query(name, type),
  });
  assert.match(ran.stderr, /cannot look up _acme-challenge\.example\.com: no answer in time/);
  assert(Date.now() - begun < 4_000);
});

Deno.test("the servers of the zone are asked, not those of an alias on the way to it", async () => {
  await using at = await dnsBed();
  at.dns.set("www.example.com", "CNAME", "cdn.example.net");
  delegate(at.dns, "cdn.example.net", "elsewhere");
  at.bed.configure({
    domains: "www.example.com",
    actions: at.bed.text("actions.conf").replace(NAME, `www.${NAME}`),
  });
  const query = asking(at.dns, (name, type, server) => {
    assert(!name.includes("elsewhere") && (type !== "TXT" || server !== undefined));
    return undefined;
  });
  const ran = await at.bed.run({ query });
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
});

Deno.test("where no name server can be asked the system's resolver is; preflight: warn asks the CA whatever is seen", async () => {
  await using at = await dnsBed();
  const closed: Query = (name, type, server) =>
    server ? Promise.reject(new Error("timed out")) : at.query(name, type);
  const ran = await at.bed.run({ query: closed });
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  const check = "^note +self-check of the challenge for ";
  const nobody = `no name server of example.com answers for it \\(ns[12]`;
  assert.match(ran.stdout, new RegExp(`${check}${NAME}: ${nobody}`, "m"));

  at.bed.configure({ settings: "keyTypes: ec\npreflight: warn\ndnsWait: 0", domains: `*.${NAME}` });
  const blind = await at.bed.run({ query: asking(at.dns, () => []) });
  assert.equal(blind.code, 0, blind.stderr);
  assert.match(
    blind.stdout,
    new RegExp(`${check}\\*.${NAME} failed: .* is in no zone that has name servers, and `, "m"),
  );
});

// ---- hooks that fail ---------------------------------------------------------------------------------------------

for (
  const [what, present, told] of [
    ["fails", `${PRESENT}; echo "no such \x1b[2Jzone" >&2; exit 3`, /: exit status 3\n *\| no such zone\n/],
    ["does not exist", "nsupdate-with-a-typo RECORD VALUE", /: exit status 127 \(command not found\)\n/],
    ["hangs", `${PRESENT} && sleep 600`, /: timed out after 1 s\n/],
  ] as const
) {
  Deno.test(`a dns hook that ${what} fails its line alone, and what it may have placed is taken away`, async () => {
    await using at = await dnsBed({
      domains: `${NAME}\nother.example`,
      present,
      cleanup: "rm -f ZONE/RECORD/VALUE; echo cleanup RECORD >> HOME/log",
      settings: what === "hangs" ? "commandTimeout: 1" : "",
    });
    const ran = await at.bed.run({ query: at.query });
    assert.equal(ran.code, 1);
    assert.match(ran.stderr, told);
    assert.deepEqual(at.bed.ca.issued.map(({ names }) => names[0]), ["other.example"]);
    assert.deepEqual([at.log(), at.placed()], [[`cleanup ${RECORD}`, ""], []]);
  });
}

Deno.test("a cleanup that fails is told, and costs no certificate", async () => {
  await using at = await dnsBed({ cleanup: "echo cleanup >> HOME/log; exit 4" });
  const ran = await at.bed.run({ query: at.query });
  assert.deepEqual([ran.code, ran.stderr, at.bed.ca.issued.length], [0, "", 1]);
  assert.match(ran.stdout, /^note +cannot clean up _acme-challenge\.example\.com: .*: exit status 4$/m);
});

Deno.test("an interrupted run waits for no hook that hangs, and takes away what it may have placed", async () => {
  await using at = await dnsBed({ present: `${PRESENT} && touch HOME/hanging && sleep 600` });
  const stop = new AbortController();
  const running = at.bed.run({ query: at.query, signal: stop.signal });
  await until("the hook hangs", () => existsSync(join(at.bed.home, "hanging")));
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
  assert.deepEqual(at.placed(), []);
});

Deno.test("what a killed run has placed is removed by the next", async () => {
  await using at = await dnsBed({
    domains: `${NAME} *`,
    cleanup: `${CLEANUP} && echo cleanup RECORD VALUE DOMAIN >> HOME/log`,
    settings: "preflight: no",
    ca: { validationDelayMs: 60_000 },
  });
  const { bed } = at;
  const program = bed.start("--test");
  await until("the CA was asked", () => bed.ca.log.some(({ resource }) => resource === "challenge"));
  program.kill("SIGKILL");
  await program.output();
  const [value] = at.placed();

  bed.configure({ domains: "www.example" });
  bed.ca.switches.validationDelayMs = 0;
  const ran = await bed.run();
  assert.deepEqual([ran.code, ran.stderr, at.placed()], [0, "", []]);
  assert.match(at.log()[0]!, new RegExp(`^cleanup ${RECORD} ${value} (\\*\\.)?${NAME}$`));
  assert.deepEqual(JSON.parse(bed.text("test/state.json")).published, []);
});

// ---- dns-persist-01 ----------------------------------------------------------------------------------------------

const PERSISTENT = `[persistent]\ndomains: ${NAME} *.${NAME}\nchallenge: dns-persist-01\n`;

Deno.test("dns-persist-01 needs the one record that --plan and --check print, and no command ever", async () => {
  await using at = await dnsBed({ domains: `${NAME} *`, actions: PERSISTENT });
  const { bed, dns, query } = at;
  const first = await bed.run({ query });
  assert.deepEqual([first.code, asked(first)], [1, 0]);
  assert.match(
    first.stderr,
    /has no TXT record at _validation-persist\.example\.com; place this one: _validation/,
  );

  const place = /^.*place:? +(\S+)\. IN TXT "([^"]*)"/gm;
  const told = await Promise.all(["--plan", "--check"].map(async (option) => {
    const { code, stdout, stderr } = await bed.lematt("--test", option);
    assert.deepEqual([code, stderr], [0, ""]);
    return [...stdout.matchAll(place)].map(([, record, value]) => ({ record, value }));
  }));
  const value = `ca.example; accounturi=${bed.ca.accounts[0]!.url}; policy=wildcard`;
  const record = `_validation-persist.${NAME}`;
  assert.deepEqual(told, [[{ record, value }], [{ record, value }]]);

  dns.set(record, "TXT", value);
  bed.ca.switches.reuse = "none";
  for (const issued of [1, 2]) {
    const ran = await bed.run({ query, retry: true });
    assert.deepEqual([ran.code, ran.stderr, bed.ca.issued.length], [0, "", issued]);
    bed.ca.advance(80 * 86_400_000);
  }
  assert(bed.ca.validations.every(({ type }) => type === "dns-persist-01"));
});

Deno.test("a record of dns-persist-01 proves a name where the CA says so, too", async () => {
  await using at = await dnsBed({ domains: NAME, actions: PERSISTENT, ca: { reuse: "none" } });
  const { bed, query } = at;
  for (
    const [text, name, good] of [
      ["ca.example;accounturi=URL", NAME, true],
      ["  ca.example ;\tAccountURI = URL ; policy=Wildcard", `*.${NAME}`, true],
      ["ca.example; accounturi=URL; policy=wildcard; persistUntil=4102444800", NAME, true],
      ["ca.example; accounturi=URL; policy=something", NAME, true],
      ["ca.example; accounturi=URL", `*.${NAME}`, false],
      ["ca.example; accounturi=URL; policy=specific", `*.${NAME}`, false],
      ["ca.example; accounturi=URL1", NAME, false],
      ["ca.example", NAME, false],
      ["other.example; accounturi=URL", NAME, false],
      ["ca.example; accounturi=URL; persistUntil=1600000000", NAME, false],
      ["ca.example; accounturi=URL; persistUntil=soon", NAME, false],
      ["ca.example; accounturi=URL;", NAME, false],
      ["ca.example; accounturi=URL; accounturi=URL", NAME, false],
    ] as const
  ) {
    at.dns.set(
      `_validation-persist.${NAME}`,
      "TXT",
      "v=spf1 -all",
      text.replace("URL", `${bed.ca.origin}/account/1`),
    );
    for (const preflight of good ? ["yes", "no"] : ["yes"]) {
      bed.configure({ settings: `keyTypes: ec\npreflight: ${preflight}`, domains: name });
      await Deno.remove(bed.path("test/cert"), { recursive: true }).catch(() => {});
      const ran = await bed.run({ query, retry: true });
      assert.equal(ran.code, good ? 0 : 1, `${text} ${name} ${preflight} ${ran.stderr}`);
      assert.equal(asked(ran), good ? 1 : 0);
    }
  }
});

Deno.test("a record of dns-persist-01 names the account that the challenge names", async () => {
  await using at = await dnsBed({ domains: NAME, actions: PERSISTENT });
  at.bed.ca.switches.fault = befalling("authz", {
    kind: "rewrite",
    rewrite(body) {
      for (const challenge of body.challenges as Record<string, unknown>[]) {
        if (challenge.type === "dns-persist-01") challenge.accounturi = "https://ca.example/other/1";
      }
      return body;
    },
  });
  const ran = await at.bed.run({ query: at.query });
  assert.match(ran.stderr, /TXT "ca\.example; accounturi=https:\/\/ca\.example\/other\/1"\n/);
});

Deno.test("checkChallenges() checks records of dns-persist-01 and runs no hooks", async () => {
  const persistent = PERSISTENT.replace(` *.${NAME}`, "");
  await using at = await dnsBed({
    domains: `${NAME} *`,
    actions: `${persistent}[dns]\ndomains: *.${NAME}\nchallenge: dns-01\n` +
      `dnsPresent: ["touch HOME/log"]\ndnsCleanup: ["touch HOME/log"]\n`,
  });
  const account = { url: "https://ca.example/account/1", issuers: ["ca.example"] };
  const check = async (known?: typeof account) => {
    const findings = await checkChallenges(at.bed.config(), at.bed.world({ query: at.query }), known);
    return findings.map(({ name, problem }) => `${name}: ${problem}`);
  };
  const [unknown, dns] = await check();
  assert.match(unknown!, /first run/);
  assert.equal(dns, `*.${NAME}: undefined`);
  assert.match(
    (await check(account))[0]!,
    /no TXT record at _validation-persist\.example\.com; place this one: /,
  );
  at.dns.set(`_validation-persist.${NAME}`, "TXT", `ca.example; accounturi=${account.url}`);
  assert.equal((await check(account))[0], `${NAME}: undefined`);
  assert(!existsSync(join(at.bed.home, "log")));
});

// ---- queries -----------------------------------------------------------------------------------------------------

Deno.test("systemQuery() reads records of each type, long texts whole, and tells none from no answer", async () => {
  await using dns = await startDns();
  const long = "x".repeat(600);
  dns.set("a.example", "A", "127.0.0.1", "127.0.0.2");
  dns.set("a.example", "AAAA", "::1");
  dns.set("a.example", "TXT", "short", long);
  dns.set("a.example", "NS", "ns.a.example");
  dns.set("a.example", "SOA", "ns.a.example");
  dns.set("alias.example", "CNAME", "a.example");
  const server = { address: "127.0.0.1", port: dns.port };
  const table: [string, Parameters<Query>[1], string[]][] = [
    ["a.example", "A", ["127.0.0.1", "127.0.0.2"]],
    ["a.example", "AAAA", ["::1"]],
    ["a.example", "TXT", ["short", long]],
    ["a.example", "NS", ["ns.a.example."]],
    ["a.example", "SOA", ["ns.a.example."]],
    ["alias.example", "CNAME", ["a.example."]],
    ["a.example", "CNAME", []],
    ["none.example", "TXT", []],
  ];
  for (const [name, type, expected] of table) {
    assert.deepEqual((await systemQuery(name, type, server)).sort(), expected.toSorted(), `${type} ${name}`);
  }
});
