/** Goal: names are proven by TXT records, placed by hooks or persistent, and the CA is asked once it will find them. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { checkChallenges } from "../lib/challenge.ts";
import { type Query, systemQuery } from "../lib/context.ts";
import { all, faultAt, type Ran, testBed } from "./bed.ts";
import { startDns, type Switches } from "./ca.ts";
import { listing } from "./faults.ts";

const NAME = "example.com";
const RECORD = `_acme-challenge.${NAME}`;
const PRESENT = "mkdir -p ZONE/RECORD && touch ZONE/RECORD/VALUE";
const CLEANUP = "rm ZONE/RECORD/VALUE";

/** Answers a query; if it returns undefined, the DNS server answers. */
type Ask = (...query: Parameters<Query>) => string[] | Promise<string[]> | undefined;

/**
 * A bed with a DNS server, which is ns1.example.com and ns2.example.com, for the CA and for `run()`. Its zone is a directory of
 * files `<record>/<TXT value>`, in which hooks write: ZONE in actions.
 */
async function dnsBed({ domains = NAME, settings = "", actions = dns01(), ca = {} as Switches } = {}) {
  await using stack = new AsyncDisposableStack();
  let zone = "";
  const files = (name: string) => listing(join(zone, name));
  const dns = stack.use(await startDns((name, type) => type === "TXT" ? files(name) : []));
  settings = `keyTypes: ec\n${settings}`;
  const bed = stack.use(await testBed({ domains, settings, ca: { dnsPort: dns.port, ...ca } }));
  zone = join(bed.home, "zone");
  bed.act(actions.replaceAll("ZONE", zone));
  const delegate = (zone: string, ...servers: string[]) => {
    dns.set(zone, "SOA", `ns1.${zone}`);
    dns.set(zone, "NS", ...servers.map((server) => `${server}.${zone}`));
    for (const [i, server] of servers.entries()) dns.set(`${server}.${zone}`, "A", `127.0.0.${i + 1}`);
  };
  delegate(NAME, "ns1", "ns2");
  const query = (ask: Ask): Query => async (name, type, server) =>
    await ask(name, type, server) ?? await systemQuery(name, type, { address: "127.0.0.1", port: dns.port });
  const run = (ask: Ask = () => undefined, options: { retry?: boolean } = {}) =>
    bed.run({ query: query(ask), ...options });
  /** The problems that `--check --challenges` reports. */
  const check = async (account?: Parameters<typeof checkChallenges>[2]) => {
    const context = bed.context({ query: query(() => undefined) });
    return (await checkChallenges(bed.config(), context, account)).map(({ problem = "" }) => problem);
  };
  const placed = () => listing(zone).flatMap(files);
  const open = stack.move();
  return { bed, dns, delegate, run, check, placed, [Symbol.asyncDispose]: () => open.disposeAsync() };
}

/** A section with dns-01. */
function dns01({ domains = `${NAME} *.${NAME}`, present = PRESENT, cleanup = CLEANUP, more = "" } = {}) {
  const [dnsPresent, dnsCleanup] = [present, cleanup].map((command) => JSON.stringify([command]));
  return `[dns]\ndomains: ${domains}\nchallenge: dns-01\ndnsPresent: ${dnsPresent}\ndnsCleanup: ${dnsCleanup}\n${more}`;
}

const succeeded = ({ code, stderr }: Ran) => assert.deepEqual([code, stderr], [0, ""]);
const asked = ({ requests }: Ran) => requests.filter(({ resource }) => resource === "challenge").length;

Deno.test("hooks place the values of dns-01, also behind a CNAME, and the CA is asked once every name server of that zone has them", async () => {
  const hook = (what: string, command: string) =>
    command.replaceAll("RECORD", "RECORD.www.acme.example.net") +
    ` && [ VALUE = "$LEMATT_VALUE" ] && echo ${what} DOMAIN "$LEMATT_DOMAIN" $LEMATT_RECORD RECORD >> HERE/log`;
  await using at = await dnsBed({
    domains: `${NAME} www *`,
    actions: dns01({ present: hook("present", PRESENT), cleanup: hook("cleanup", CLEANUP) }),
  });
  const { bed, dns } = at;
  dns.set(RECORD, "CNAME", "step.example.net");
  dns.set("step.example.net", "CNAME", `${RECORD}.www.acme.example.net.`);
  at.delegate("acme.example.net", "ns1", "ns2");
  dns.set("www.acme.example.net", "CNAME", "cdn.example.org"); // an alias is in another zone than the records below it
  at.delegate("cdn.example.org", "elsewhere");
  const late: unknown[] = [];
  const ran = await at.run((name, type, server) => {
    if (type !== "TXT") return undefined;
    assert(name === `${RECORD}.www.acme.example.net` && server !== undefined);
    if (server.address !== "127.0.0.2" || late.length === 3) return undefined;
    late.push([at.placed().length, bed.ca.log.some(({ resource }) => resource === "challenge")]);
    return ["an older value"];
  });
  succeeded(ran);
  assert.equal(ran.stdout.match(/^note.*/gm), null);
  assert.deepEqual([late, bed.waits.filter((ms) => ms === 2000).length], [Array(3).fill([2, false]), 3]);
  const proven = bed.ca.validations.map(({ type, name }) => `${name} ${type}`).sort();
  assert.deepEqual(proven, [`*.${NAME} dns-01`, `${NAME} dns-01`, `www.${NAME} http-01`]);
  const words = [`*.${NAME}`, NAME].map((name) => `${name} ${name} ${RECORD} ${RECORD}`);
  const hooks = ["cleanup", "present"].flatMap((what) => words.map((one) => `${what} ${one}`));
  assert.deepEqual([bed.take().sort(), at.placed(), bed.dropped()], [hooks, [], []]);
  assert.deepEqual([await at.check(), bed.take()], [["", "", ""], []]);
});

Deno.test("C10: hooks of all lines run one after the other, without deadlock, or in parallel with dnsParallel: yes", async () => {
  const table: [dnsParallel: string, around: string][] = [
    ["no", "mkdir HERE/busy && sleep 0.05 && HOOK && rmdir HERE/busy"],
    ["yes", "touch HERE/x.DOMAIN; until [ $(ls HERE | grep -c ^x) = 4 ]; do sleep 0.01; done; HOOK"],
  ];
  await all(table.map(async ([dnsParallel, around]) => {
    const [present, cleanup] = [PRESENT, CLEANUP].map((hook) => around.replace("HOOK", hook));
    const domains = "a.example *.a.example b.example *.b.example";
    await using at = await dnsBed({
      domains: "a.example b.example\n*.b.example *.a.example",
      actions: dns01({ domains, present, cleanup, more: `dnsParallel: ${dnsParallel}` }),
    });
    for (const zone of ["a.example", "b.example"]) at.delegate(zone, "ns1");
    succeeded(await at.run());
    assert.deepEqual([at.bed.ca.issued.length, at.placed()], [2, []]);
  }));
});

Deno.test("C10: a name and its wildcard, on one line or on two, work with a provider that keeps one value per record", async () => {
  const present = `rm -rf ZONE/RECORD; ${PRESENT} && echo present >> HERE/log`;
  const cleanup = "rm -r ZONE/RECORD && echo cleanup >> HERE/log";
  const table = [
    [`${NAME} *`, "", "present present cleanup present cleanup"],
    [`${NAME} *`, "preflight: no", "present cleanup present cleanup"],
    [`${NAME}\n*.${NAME}`, "", "present cleanup present cleanup"],
  ] as const;
  await all(table.map(async ([domains, settings, hooks]) => {
    await using at = await dnsBed({ domains, settings, actions: dns01({ present, cleanup }) });
    succeeded(await at.run());
    assert.deepEqual(at.bed.ca.validations.map(({ name }) => name).sort(), [`*.${NAME}`, NAME]);
    assert.deepEqual([at.bed.take().join(" "), at.placed(), at.bed.state().published], [hooks, [], []]);
  }));
});

Deno.test("while a name server answers otherwise or is silent the CA is not asked; after dnsWait the line fails, and the error says why", async () => {
  const txt = (of: string, values: string[]): Ask => (_, type, server) =>
    type === "TXT" && server?.address === of ? values : undefined;
  const escapes: Ask = (_, type) =>
    type === "NS" ? ["\x1b[2J\n.example.com"] : type === "TXT" ? [] : undefined;
  const silence: Ask = (_, type) => type === "TXT" ? new Promise(() => {}) : undefined;
  const table: [ask: Ask, dnsWait: number, ...expected: string[]][] = [
    [txt("127.0.0.2", []), 20, `ns2.${NAME}`, "no TXT record"],
    [txt("127.0.0.1", ["x"]), 20, `ns1.${NAME}`, "other TXT records"],
    [(_, type) => type === "CNAME" ? [RECORD] : undefined, 20, "8 CNAMEs"],
    [escapes, 20, "([2J .example.com)"],
    [silence, 1, "no answer in time"], // S2
  ];
  await all(table.map(async ([ask, dnsWait, ...expected]) => {
    await using at = await dnsBed({ settings: `dnsWait: ${dnsWait}` });
    let begun = Infinity;
    const ran = await at.run((...query) => {
      begun = Math.min(begun, performance.now());
      return ask(...query);
    });
    assert(performance.now() - begun < 12_000, "one check takes up to 15 s, unless dnsWait is less");
    assert.deepEqual([ran.code, asked(ran), at.placed()], [1, 0, []]);
    for (const text of [NAME, RECORD, ...expected]) assert(ran.stderr.includes(text), ran.stderr);
    const waited = at.bed.waits.reduce((sum, ms) => sum + ms, 0);
    // what a check takes counts, too
    assert(waited <= dnsWait * 1000 && (dnsWait === 1) === (waited === 0), `${waited} ms`);
  }));
});

Deno.test("a failed cleanup, and name servers that only the system's resolver reaches, are noted and cost no certificate", async () => {
  await using at = await dnsBed({ actions: dns01({ cleanup: "exit 4" }) });
  const ran = await at.run((_, _type, server) => server && Promise.reject(new Error("timed out")));
  succeeded(ran);
  assert.match(ran.stdout, /^note .*example\.com.*ns[12]/m);
  assert.match(ran.stdout, /^note .*_acme-challenge\.example\.com: .*: exit status 4$/m);
});

Deno.test("a hook that fails fails only its line, and what it may have placed is removed", async () => {
  const present = `${PRESENT}; echo "no such \x1b[2Jzone" >&2; exit 3`;
  const actions = dns01({ present, cleanup: `${CLEANUP}; echo cleanup RECORD >> HERE/log` });
  await using at = await dnsBed({ domains: `${NAME}\nother.example`, actions });
  const ran = await at.run();
  assert.match(ran.stderr, /: exit status 3\n *\| no such zone\n/);
  assert.deepEqual(at.bed.ca.issued.map(({ names }) => names[0]), ["other.example"]);
  assert.deepEqual([at.bed.take(), at.placed()], [[`cleanup ${RECORD}`], []]);
});

Deno.test("dns-persist-01 needs the one record that errors, --plan and --check print, and runs no command", async () => {
  const actions = `[persistent]\ndomains: ${NAME} *.${NAME}\nchallenge: dns-persist-01\n`;
  await using at = await dnsBed({ domains: `${NAME} *`, actions, ca: { reuse: "none" } });
  const { bed } = at;
  const record = `_validation-persist.${NAME}`;
  const accounturi = "https://ca.example/other/1"; // C17: a challenge may name another account
  const rewrite = (body: Record<string, unknown>) => (
    { ...body, challenges: (body.challenges as object[]).map((one) => ({ ...one, accounturi })) }
  );
  bed.ca.switches.fault = faultAt("authz", { kind: "rewrite", rewrite }, 2);
  const first = await at.run();
  assert.deepEqual([first.code, asked(first)], [1, 0]);
  const place = `place this one: ${record}. IN TXT "ca.example; accounturi=`;
  assert(first.stderr.includes(place + accounturi), first.stderr);

  const { url } = bed.ca.accounts[0]!;
  const good = `ca.example; accounturi=${url}`, wildcard = "; policy=wildcard";
  await all(["--plan", "--check"].map(async (option) => {
    const { code, stdout, stderr } = await bed.lematt("--test", option);
    assert.deepEqual([code, stderr], [0, ""]);
    assert(stdout.includes(`${record}. IN TXT "${good}${wildcard}"`), stdout);
    assert.equal(stdout.match(/^place/gm)?.length, 1, stdout);
  }));
  assert.match((await at.check())[0]!, /account/); // which is not known before the first run
  const account = { url, issuers: ["ca.example"] };
  const table: [text: string, provesName: boolean, provesWildcard: boolean][] = [
    [`${good}; accounturi=${url}${wildcard}`, false, false],
    [`${good}; policy=specific`, true, false],
    [`${good}${wildcard}; persistUntil=1600000000`, false, false],
    [`${good}${wildcard}; persistUntil=soon`, false, false],
    [`${good}1${wildcard}`, false, false],
    ["ca.example", false, false],
    [good.replace("ca", "other"), false, false],
    [`  ca.example ;\tAccountURI = ${url} ; policy=Wildcard; persistUntil=4102444800`, true, true],
  ];
  for (const [text, ...proves] of table) {
    at.dns.set(record, "TXT", "v=spf1 -all", text);
    const problems = await at.check(account);
    assert.deepEqual(problems.map((problem) => problem === ""), proves, text);
    assert(problems.every((problem) => problem === "" || problem.includes(place + url)), `${problems}`);
  }
  for (const issued of [1, 2]) {
    succeeded(await at.run(undefined, { retry: true }));
    assert.equal(bed.ca.issued.length, issued);
    bed.ca.advance(80 * 86_400_000);
  }
  assert(bed.ca.validations.every(({ type }) => type === "dns-persist-01"));
});
