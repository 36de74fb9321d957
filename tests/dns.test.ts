/** Goal: names are proven by TXT records, placed by hooks or persistent, and the CA is asked once it will find them. */

import assert from "node:assert/strict";
import { createHash } from "node:crypto";
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { checkChallenges } from "../lib/challenge.ts";
import { type Query, systemQuery } from "../lib/context.ts";
import { all, type Bed, faultAt, type Ran, testBed, until } from "./bed.ts";
import { type Dns, startDns, type Switches } from "./ca.ts";

const NAME = "example.com";
const RECORD = `_acme-challenge.${NAME}`;
const PRESENT = "mkdir -p ZONE/RECORD && touch ZONE/RECORD/VALUE";
const CLEANUP = "rm ZONE/RECORD/VALUE";

/** Options of dnsBed(). In commands ZONE is replaced by the directory of TXT records, HERE by the bed's home. */
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
  const actions = hooks.actions ?? dns01(`${NAME} *.${NAME}`, hooks.present, hooks.cleanup);
  bed.act(actions.replaceAll("ZONE", zone));
  delegate(dns, NAME, "ns1", "ns2");
  const open = stack.move();
  return {
    bed,
    dns,
    query: asking(dns),
    /** The TXT values that are in the zone. */
    placed: () => existsSync(zone) ? readdirSync(zone).flatMap((name) => files(name)) : [],
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

/** A section whose names are proven by dns-01 with these hooks. */
function dns01(domains: string, present = PRESENT, cleanup = CLEANUP): string {
  const list = (command: string) => JSON.stringify([command]).replaceAll("%", "%%");
  return `[dns]\ndomains: ${domains}\nchallenge: dns-01\n` +
    `dnsPresent: ${list(present)}\ndnsCleanup: ${list(cleanup)}\n`;
}

/** Makes a zone with these name servers in it. */
function delegate(dns: Dns, zone: string, ...servers: string[]) {
  dns.set(zone, "SOA", `ns1.${zone}`);
  dns.set(zone, "NS", ...servers.map((server) => `${server}.${zone}`));
  for (const [i, server] of servers.entries()) dns.set(`${server}.${zone}`, "A", `127.0.0.${i + 1}`);
}

/** Sends all queries to this server, unless `ask` answers them. */
function asking(
  { port }: Dns,
  ask: (...query: Parameters<Query>) => string[] | undefined = () => undefined,
): Query {
  return async (name, type, server) =>
    ask(name, type, server) ?? await systemQuery(name, type, { address: "127.0.0.1", port });
}

async function succeeds(bed: Bed, query: Query): Promise<void> {
  const { code, stderr } = await bed.run({ query });
  assert.deepEqual([code, stderr], [0, ""]);
}

const asked = ({ requests }: Ran) => requests.filter(({ resource }) => resource === "challenge").length;

// ---- dns-01 ------------------------------------------------------------------------------------------------------

Deno.test("a hook gets record, value and name; the CA finds the value; the cleanup hook removes it", async () => {
  const log = (what: string) =>
    `echo "${what} $LEMATT_RECORD $LEMATT_VALUE $LEMATT_DOMAIN" RECORD VALUE DOMAIN >> HERE/log`;
  await using at = await dnsBed({
    present: `${PRESENT} && ${log("present")}`,
    cleanup: `${CLEANUP} && ${log("cleanup")}`,
  });
  const ran = await at.bed.run({ query: at.query });
  assert.deepEqual([ran.code, ran.stderr, ran.stdout.match(/^note.*/gm)], [0, "", null]);
  assert.deepEqual(at.bed.ca.validations, [{ type: "dns-01", name: NAME }]);
  const { token } = at.bed.ca.orders[0]!.authorizations[0]!.challenges.find(({ type }) => type === "dns-01")!;
  const content = `${token}.${at.bed.ca.accounts[0]!.key.thumbprint}`;
  const words = `${RECORD} ${createHash("sha256").update(content).digest("base64url")} ${NAME}`;
  assert.deepEqual(at.bed.take(), [`present ${words} ${words}`, `cleanup ${words} ${words}`]);
  assert.deepEqual(at.placed(), []);
});

Deno.test("a name and its wildcard have one value each in the same record at the same time", async () => {
  let most = 0;
  await using at = await dnsBed({
    domains: `${NAME} *`,
    ca: { fault: () => void (most = Math.max(most, at.placed().length)) },
  });
  await succeeds(at.bed, at.query);
  assert.deepEqual(at.bed.ca.validations.map(({ name }) => name).sort(), [`*.${NAME}`, NAME]);
  assert.deepEqual([most, at.placed()], [2, []]);
});

Deno.test("hooks of all lines run one after the other, or in parallel with dnsParallel: yes", async () => {
  const ways = {
    no: "mkdir HERE/busy && HOOK && rmdir HERE/busy",
    yes: "touch HERE/DOMAIN; until [ -e HERE/a.example -a -e HERE/b.example ]; do sleep 0.01; done; HOOK",
  };
  await all(
    Object.entries(ways).map(async ([dnsParallel, around]) => {
      const [present, cleanup] = [PRESENT, CLEANUP].map((hook) => around.replace("HOOK", hook));
      const actions = dns01("a.example b.example *.b.example", present, cleanup);
      await using at = await dnsBed({
        domains: "a.example\nb.example *",
        actions: `${actions}dnsParallel: ${dnsParallel}\n`,
      });
      for (const zone of ["a.example", "b.example"]) delegate(at.dns, zone, "ns1");
      const ran = await at.bed.run({ query: at.query });
      assert.deepEqual([ran.code, ran.stderr], [0, ""]);
    }),
  );
});

/** Hooks of a provider that keeps only the last value of a record, and removes the whole record. */
const ONE_VALUE = {
  present: "rm -rf ZONE/RECORD; mkdir -p ZONE/RECORD && touch ZONE/RECORD/VALUE && echo present >> HERE/log",
  cleanup: "rm -r ZONE/RECORD && echo cleanup >> HERE/log",
};
Deno.test("a name and its wildcard, on one line or on two, work with a provider that keeps one value per record", async () => {
  const table = [
    [`${NAME} *`, "", "present present cleanup present cleanup"],
    [`${NAME} *`, "preflight: no", "present cleanup present cleanup"],
    [`${NAME}\n*.${NAME}`, "", "present cleanup present cleanup"],
  ] as const;
  await all(table.map(async ([domains, settings, hooks]) => {
    await using at = await dnsBed({ domains, settings, ...ONE_VALUE });
    const ran = await at.bed.run({ query: at.query });
    assert.deepEqual([ran.code, ran.stderr, ran.stdout.match(/^note.*/gm)], [0, "", null]);
    assert.deepEqual(at.bed.ca.validations.map(({ name }) => name).sort(), [`*.${NAME}`, NAME]);
    assert.deepEqual([at.bed.take().join(" "), at.placed(), at.bed.state().published], [hooks, [], []]);
  }));
});

Deno.test("two lines that need each other's records do not deadlock", async () => {
  await using at = await dnsBed({
    domains: "a.example b.example\n*.b.example *.a.example",
    actions: dns01("a.example *.a.example b.example *.b.example", ONE_VALUE.present, ONE_VALUE.cleanup),
  });
  for (const zone of ["a.example", "b.example"]) delegate(at.dns, zone, "ns1");
  const ran = await at.bed.run({ query: at.query });
  assert.deepEqual([ran.code, ran.stderr, at.bed.ca.issued.length, at.placed()], [0, "", 2, []]);
});

Deno.test("a line with different challenges proves each name by the challenge of its section", async () => {
  await using at = await dnsBed({ domains: `${NAME} www *`, actions: dns01(`*.${NAME}`) });
  await succeeds(at.bed, at.query);
  const proven = at.bed.ca.validations.map(({ type, name }) => `${name} ${type}`).sort();
  assert.deepEqual(proven, [`*.${NAME} dns-01`, `${NAME} http-01`, `www.${NAME} http-01`]);
  assert.deepEqual([at.placed(), at.bed.dropped()], [[], []]);
});

Deno.test("a record may be a CNAME into another zone, whose name servers are asked then", async () => {
  const target = "RECORD.acme.example.net"; // the same for a name and its wildcard, as conf/actions.conf has it
  await using at = await dnsBed({
    domains: `${NAME} *.${NAME}`,
    present: `mkdir -p ZONE/${target} && touch ZONE/${target}/VALUE`,
    cleanup: `rm ZONE/${target}/VALUE`,
  });
  at.dns.set(RECORD, "CNAME", `step.example.net`);
  at.dns.set("step.example.net", "CNAME", `${RECORD}.acme.example.net.`);
  delegate(at.dns, "acme.example.net", "ns3");
  const servers = new Set<unknown>();
  const query = asking(at.dns, (name, _type, server) => {
    if (server) servers.add([name, server.address].join());
    return undefined;
  });
  await succeeds(at.bed, query);
  assert.deepEqual([...servers], ["acme.example.net,127.0.0.1", `${RECORD}.acme.example.net,127.0.0.1`]);
});

Deno.test("the CA is not asked before every name server has the value, which may take several checks", async () => {
  await using at = await dnsBed();
  let checks = 0;
  const query = asking(at.dns, (_name, type, server) => {
    const late = type === "TXT" && server?.address === "127.0.0.2" && ++checks < 4;
    assert(!late || at.bed.ca.log.every(({ resource }) => resource !== "challenge"));
    return late ? ["an older value"] : undefined;
  });
  const ran = await at.bed.run({ query });
  assert.deepEqual([ran.code, ran.stderr, checks], [0, "", 4]);
  assert.equal(at.bed.waits.filter((ms) => ms === 2000).length, 3);
});

Deno.test("the CA is not asked while a name server answers otherwise; after dnsWait the line fails, and the error says why", async () => {
  type Ask = (...query: Parameters<Query>) => string[] | undefined;
  const txt = (of: string, values: string[]): Ask => (_, type, server) =>
    type === "TXT" && server?.address === of ? values : undefined;
  const escapes: Ask = (_, type) =>
    type === "NS" ? ["\x1b[2J\n.example.com"] : type === "TXT" ? [] : undefined;
  const table: [ask: Ask, ...expected: string[]][] = [
    [txt("127.0.0.2", []), `ns2.${NAME}`, "no TXT record"],
    [txt("127.0.0.1", ["x"]), `ns1.${NAME}`, "other TXT records"],
    [(_, type) => type === "CNAME" ? [RECORD] : undefined, "8 CNAMEs"],
    [escapes, "([2J .example.com)"],
  ];
  await all(table.map(async ([ask, ...expected]) => {
    await using at = await dnsBed({ settings: "dnsWait: 20" });
    const ran = await at.bed.run({ query: asking(at.dns, ask) });
    assert.deepEqual([ran.code, asked(ran), at.placed()], [1, 0, []]);
    for (const text of [NAME, RECORD, ...expected]) assert(ran.stderr.includes(text), ran.stderr);
    assert.equal(at.bed.waits.reduce((sum, ms) => sum + ms, 0), 18_000);
  }));
});

Deno.test("dnsWait also limits a single self-check with silent name servers", async () => {
  await using at = await dnsBed({ settings: "dnsWait: 1" });
  const begun = Date.now();
  const ran = await at.bed.run({
    query: (name, type) => type === "TXT" ? new Promise(() => {}) : at.query(name, type),
  });
  assert(ran.stderr.includes(RECORD), ran.stderr);
  assert(Date.now() - begun < 8_000);
});

Deno.test("the name servers of the zone are asked, not those of an alias of the name", async () => {
  await using at = await dnsBed({ domains: `www.${NAME}`, actions: dns01(`www.${NAME}`) });
  at.dns.set(`www.${NAME}`, "CNAME", "cdn.example.net");
  delegate(at.dns, "cdn.example.net", "elsewhere");
  const query = asking(at.dns, (name, type, server) => {
    assert(!name.includes("elsewhere") && (type !== "TXT" || server !== undefined));
    return undefined;
  });
  await succeeds(at.bed, query);
});

Deno.test("without a reachable name server the system's resolver is asked; preflight: warn asks the CA whatever it answers", async () => {
  await using at = await dnsBed();
  const closed: Query = (name, type, server) =>
    server ? Promise.reject(new Error("timed out")) : at.query(name, type);
  const ran = await at.bed.run({ query: closed });
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  assert.match(ran.stdout, /^note .*example\.com.*ns[12]/m);
  at.bed.configure({ settings: "keyTypes: ec\npreflight: warn\ndnsWait: 0", domains: `*.${NAME}` });
  const blind = await at.bed.run({ query: asking(at.dns, () => []) });
  assert.equal(blind.code, 0, blind.stderr);
  assert.match(blind.stdout, /^note .*\*\.example\.com failed: /m);
});

// ---- hooks that fail ---------------------------------------------------------------------------------------------

Deno.test("a dns hook that fails, hangs or is missing fails only its line, and what it may have placed is removed", async () => {
  const table: [present: string, error: RegExp][] = [
    [`${PRESENT}; echo "no such \x1b[2Jzone" >&2; exit 3`, /: exit status 3\n *\| no such zone\n/],
    ["nsupdate-with-a-typo RECORD VALUE", /: exit status 127 \(command not found\)\n/],
    [`${PRESENT} && sleep 600`, /: timed out after 1 s\n/],
  ];
  await all(table.map(async ([present, error]) => {
    await using at = await dnsBed({
      domains: `${NAME}\nother.example`,
      present,
      cleanup: "rm -f ZONE/RECORD/VALUE; echo cleanup RECORD >> HERE/log",
      settings: present.includes("sleep") ? "commandTimeout: 1" : "",
    });
    const ran = await at.bed.run({ query: at.query });
    assert.equal(ran.code, 1);
    assert.match(ran.stderr, error);
    assert.deepEqual(at.bed.ca.issued.map(({ names }) => names[0]), ["other.example"]);
    assert.deepEqual([at.bed.take(), at.placed()], [[`cleanup ${RECORD}`], []]);
  }));
});

Deno.test("a failed cleanup is reported, and costs no certificate", async () => {
  await using at = await dnsBed({ cleanup: "echo cleanup >> HERE/log; exit 4" });
  const ran = await at.bed.run({ query: at.query });
  assert.deepEqual([ran.code, ran.stderr, at.bed.ca.issued.length], [0, "", 1]);
  assert.match(ran.stdout, /^note .*_acme-challenge\.example\.com: .*: exit status 4$/m);
});

Deno.test("an interrupted run does not wait for a hook that hangs, and removes what it may have placed", async () => {
  await using at = await dnsBed({ present: `${PRESENT} && touch HERE/hanging && sleep 600` });
  const stop = new AbortController();
  const running = at.bed.run({ query: at.query, signal: stop.signal });
  await until("the hook hangs", () => existsSync(join(at.bed.home, "hanging")));
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
  assert.deepEqual(at.placed(), []);
});

Deno.test("records that a killed run has placed are removed by the next run", async () => {
  await using at = await dnsBed({
    domains: `${NAME} *`,
    cleanup: `${CLEANUP} && echo cleanup RECORD VALUE DOMAIN >> HERE/log`,
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
  assert(bed.take()[0]!.startsWith(`cleanup ${RECORD} ${value} `));
  assert.deepEqual(bed.state().published, []);
});

// ---- dns-persist-01 ----------------------------------------------------------------------------------------------

const PERSISTENT = `[persistent]\ndomains: ${NAME} *.${NAME}\nchallenge: dns-persist-01\n`;

Deno.test("dns-persist-01 needs the one record that --plan and --check print, and runs no command", async () => {
  await using at = await dnsBed({ domains: `${NAME} *`, actions: PERSISTENT });
  const { bed, dns, query } = at;
  const first = await bed.run({ query });
  assert.deepEqual([first.code, asked(first)], [1, 0]);
  assert.match(first.stderr, /place this one: _validation-persist\.example\.com/);

  const place = /^.*place:? +(\S+)\. IN TXT "([^"]*)"/gm;
  const printed = await Promise.all(["--plan", "--check"].map(async (option) => {
    const { code, stdout, stderr } = await bed.lematt("--test", option);
    assert.deepEqual([code, stderr], [0, ""]);
    return [...stdout.matchAll(place)].map(([, record, value]) => ({ record, value }));
  }));
  const value = `ca.example; accounturi=${bed.ca.accounts[0]!.url}; policy=wildcard`;
  const record = `_validation-persist.${NAME}`;
  assert.deepEqual(printed, [[{ record, value }], [{ record, value }]]);

  dns.set(record, "TXT", value);
  bed.ca.switches.reuse = "none";
  for (const issued of [1, 2]) {
    const ran = await bed.run({ query, retry: true });
    assert.deepEqual([ran.code, ran.stderr, bed.ca.issued.length], [0, "", issued]);
    bed.ca.advance(80 * 86_400_000);
  }
  assert(bed.ca.validations.every(({ type }) => type === "dns-persist-01"));
});

Deno.test("lematt and the CA agree on which records of dns-persist-01 prove a name", async () => {
  await using at = await dnsBed({ domains: NAME, actions: PERSISTENT, ca: { reuse: "none" } });
  const { bed, query } = at;
  const [good, wildcard] = ["ca.example; accounturi=URL", `*.${NAME}`];
  const table: [text: string, name: string, proves: boolean][] = [
    ["ca.example;accounturi=URL", NAME, true],
    ["  ca.example ;\tAccountURI = URL ; policy=Wildcard", wildcard, true],
    [`${good}; policy=wildcard; persistUntil=4102444800`, NAME, true],
    [`${good}; policy=something`, NAME, true],
    [good, wildcard, false],
    [`${good}; policy=specific`, wildcard, false],
    ["ca.example; accounturi=URL1", NAME, false],
    ["ca.example", NAME, false],
    ["other.example; accounturi=URL", NAME, false],
    [`${good}; persistUntil=1600000000`, NAME, false],
    [`${good}; persistUntil=soon`, NAME, false],
    [`${good};`, NAME, false],
    [`${good}; accounturi=URL`, NAME, false],
  ];
  for (const [text, name, proves] of table) {
    const value = text.replaceAll("URL", `${bed.ca.origin}/account/1`);
    at.dns.set(`_validation-persist.${NAME}`, "TXT", "v=spf1 -all", value);
    for (const preflight of proves ? ["yes", "no"] : ["yes"]) {
      bed.configure({ settings: `keyTypes: ec\npreflight: ${preflight}`, domains: name });
      await Deno.remove(bed.path("test/cert"), { recursive: true }).catch(() => {});
      const ran = await bed.run({ query, retry: true });
      assert.deepEqual(
        [ran.code, asked(ran)],
        proves ? [0, 1] : [1, 0],
        `${text} ${preflight} ${ran.stderr}`,
      );
    }
  }
});

Deno.test("the expected record of dns-persist-01 names the account that the challenge names", async () => {
  await using at = await dnsBed({ domains: NAME, actions: PERSISTENT });
  const accounturi = "https://ca.example/other/1";
  const rewrite = (body: Record<string, unknown>) => (
    { ...body, challenges: (body.challenges as object[]).map((one) => ({ ...one, accounturi })) }
  );
  at.bed.ca.switches.fault = faultAt("authz", { kind: "rewrite", rewrite });
  const ran = await at.bed.run({ query: at.query });
  assert(ran.stderr.includes(`TXT "ca.example; accounturi=${accounturi}"\n`), ran.stderr);
});

Deno.test("checkChallenges() checks records of dns-persist-01 and runs no hooks", async () => {
  await using at = await dnsBed({
    domains: `${NAME} *`,
    actions: PERSISTENT.replace(` *.${NAME}`, "") + dns01(`*.${NAME}`, "touch HERE/log", "touch HERE/log"),
  });
  const account = { url: "https://ca.example/account/1", issuers: ["ca.example"] };
  const check = async (known?: typeof account) => {
    const findings = await checkChallenges(at.bed.config(), at.bed.context({ query: at.query }), known);
    assert.deepEqual(findings.map(({ name }) => name), [NAME, `*.${NAME}`]);
    return findings.map(({ problem }) => problem);
  };
  const [unknown, dns] = await check();
  assert.deepEqual([typeof unknown, dns], ["string", undefined]);
  assert.match((await check(account))[0]!, /place this one: _validation-persist\.example\.com/);
  at.dns.set(`_validation-persist.${NAME}`, "TXT", `ca.example; accounturi=${account.url}`);
  assert.deepEqual(await check(account), [undefined, undefined]);
  assert(!existsSync(join(at.bed.home, "log")));
});
