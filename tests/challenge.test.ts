/** Goal: the challenge is in place when the CA is asked to validate, and is removed however a run ends. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { checkChallenges } from "../lib/challenge.ts";
import type { Route } from "../lib/context.ts";
import { all, type Bed, testBed, together, until } from "./bed.ts";
import { startWebroot, type Switches } from "./ca.ts";
import { isRunning, textOf } from "./faults.ts";

const test = together("challenges");

const NAME = "example.com";

/** A bed for EC certificates; `prepare` are commands, in which HERE is the bed's home. */
const bedFor = (
  prepare: string[] = [],
  { domains = NAME, settings = "", more = "", ca = {} as Switches } = {},
) => {
  const actions = `[default]\nprepare: ${JSON.stringify(prepare)}\n${more}`;
  return testBed({ domains, settings: `keyTypes: ec\n${settings}`, actions, ca });
};

/** A section for dns.example, with dns-01. */
const dnsSection = (present: string) =>
  `[dns]\ndomains: dns.example\nchallenge: dns-01\ndnsPresent: ["${present}"]\n` +
  `dnsCleanup: ["rm HERE/record; echo cleanup RECORD DOMAIN VALUE >> HERE/log"]\n`;

/** A prepare command that records its process id and runs until its input is closed. */
const PREPARE = "echo $$ > HERE/pid; exec cat";
/** The process id that a command has recorded, or 0. */
const pidOf = ({ home }: Bed, name = "pid") => Number(textOf(join(home, name)));

/** Resolves every name to one port, once `ready`. */
const routeTo = (port: number, ready: (host: string) => unknown = () => true): Route => async (host) => {
  await until("prepare is running", () => Boolean(ready(host)));
  return [{ address: "127.0.0.1", port }];
};

test("the challenge file replaces what is in its place, and is complete and readable by all whatever the umask", async () => {
  await using bed = await bedFor([], { domains: `${NAME}\nother.example` });
  const { ca, drop, home } = bed;
  const victim = join(home, "victim");
  await Deno.writeTextFile(victim, "precious");
  const seen: unknown[] = [];
  const rewrite = (body: Record<string, unknown>) => {
    const challenges = body.challenges as { type: string; token: string }[];
    const [first, ...others] = challenges.toSorted((a) => a.type === "http-01" ? -1 : 1);
    if (JSON.stringify(body.identifier).includes("other.example")) return { ...body, challenges: others };
    if (seen.length === 0) Deno.symlinkSync(victim, join(drop, first!.token));
    return body;
  };
  ca.switches.fault = ({ resource }) => {
    for (const name of resource === "challenge" ? bed.dropped() : []) {
      const { mode, isFile } = Deno.lstatSync(join(drop, name));
      const content = Deno.readTextFileSync(join(drop, name));
      seen.push([isFile, mode! & 0o777, content === `${name}.${ca.accounts[0]!.key.thumbprint}`]);
    }
    return resource === "authz" ? { kind: "rewrite", rewrite } : undefined;
  };
  const { stderr } = await bed.lemattBy(["/bin/sh", "-c", `umask 077; exec "$@"`, "sh"], "--test");
  assert.match(stderr, /^FAILED .*\n.* other\.example, only \S+-01, \S+-01, \S+-01\n$/); // not asked without http-01
  assert.deepEqual([ca.issued.length, seen], [1, [[true, 0o644, true]]]);
  assert.deepEqual([bed.dropped(), bed.state().published], [[], []]);
  assert.equal(await Deno.readTextFile(victim), "precious");
});

test("the next run removes files and records that a killed run has left; its prepare commands end with it", async () => {
  const prepare = ["echo $$ > HERE/pid; sleep 1000"]; // does not read its input
  const more = dnsSection("echo VALUE > HERE/record");
  const options = { domains: `${NAME}\ndns.example`, settings: "preflight: no", more };
  await using bed = await bedFor(prepare, { ...options, ca: { validationDelayMs: 60_000 } });
  await Deno.writeTextFile(join(bed.drop, "of-another-client"), "stays");
  await Deno.mkdir(join(bed.drop, "no-file", "x"), { recursive: true });
  const program = bed.start("--test");
  const value = () => textOf(join(bed.home, "record")).trim();
  await until("all is placed", () => bed.dropped().length > 2 && pidOf(bed) > 0 && value() !== "");
  program.kill("SIGKILL");
  await program.output();
  await until("prepare has ended", () => !isRunning(pidOf(bed)));
  const state = bed.state();
  assert.equal(state.published.length, 2);
  // what is no token is skipped, what cannot be removed is tried again
  state.published.push(...["../drop/of-another-client", "..", "", "no-file"].map((token) => ({ token })));
  await Deno.writeTextFile(bed.path("test/state.json"), JSON.stringify(state));
  const cleanup = `cleanup _acme-challenge.dns.example dns.example ${value()}`;
  bed.configure({ domains: NAME, actions: more });
  bed.ca.switches.validationDelayMs = 0;
  const ran = await bed.run();
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  assert.deepEqual(bed.dropped().sort(), ["no-file", "of-another-client"]);
  assert.deepEqual([bed.take(), value()], [[cleanup], ""]);
  assert.deepEqual(bed.state().published, [{ token: "no-file" }]);
});

test("prepare runs once for all names and lines, or once per name with DOMAIN, from before the challenge is visible until the CA has validated it", async () => {
  const prepare = [
    "until [ -e HERE/go ]; do sleep 0.01; done; ln -s HERE/drop HERE/site",
    `echo all >> HERE/log; ${PREPARE}`,
    "echo DOMAIN >> HERE/log; exec cat",
  ];
  const domains = "a.example.com b.example.com\nc.example.com b.example.com"; // one authorization for both lines
  await using bed = await bedFor(prepare, { domains, ca: { reuse: "pending", validationDelayMs: 50 } });
  const { ca, home } = bed;
  await using site = startWebroot(join(home, "site"));
  const seen: object[] = [];
  ca.switches.httpPort = site.port;
  ca.switches.fault = ({ resource }) => {
    const statuses = site.log.map(({ status }) => status);
    if (resource === "challenge") {
      seen.push({ prepared: isRunning(pidOf(bed)), first: statuses[0], served: statuses.includes(200) });
    }
    return undefined;
  };
  const hosts = new Set<string>();
  const isUp = (host: string) => pidOf(bed) > 0 && textOf(join(home, "log")).includes(host);
  const running = bed.run({ route: routeTo(site.port, (host) => isUp(host) && hosts.add(host)) });
  await until("all names are being checked", () => hosts.size === 3 && site.log.length > 0);
  await Deno.writeTextFile(join(home, "go"), "");
  const ran = await running;
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  for (const one of seen) assert.deepEqual(one, { prepared: true, first: 404, served: true });
  assert(seen.length >= 3, `${seen.length}`);
  assert.deepEqual([bed.ca.validations.length, bed.dropped()], [3, []]);
  assert.deepEqual(bed.take().sort(), ["a.example.com", "all", "b.example.com", "c.example.com"]);
  assert(!isRunning(pidOf(bed)));
});

test("an interrupted run ends checks and hooks that hang, and its prepare commands", async () => {
  const more = dnsSection("echo VALUE > HERE/record; sleep 600");
  await using bed = await bedFor([PREPARE], { domains: `${NAME}\ndns.example`, more });
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const stop = new AbortController();
  const running = bed.run({ route: routeTo(silent.addr.port, () => pidOf(bed)), signal: stop.signal });
  using _connection = await silent.accept();
  await until("the hook hangs", () => existsSync(join(bed.home, "record")));
  stop.abort();
  const begun = Date.now();
  await assert.rejects(running, { name: "AbortError" });
  assert(Date.now() - begun < 10_000);
  assert.deepEqual([bed.ca.validations, bed.dropped(), isRunning(pidOf(bed))], [[], [], false]);
  assert.equal(existsSync(join(bed.home, "record")), false);
});

test("preflight and a prepare command that ends early decide whether there is a self-check, and what is noted", async () => {
  const failing = ["echo oops >&2; exit 3"]; // its end is noted before the CA is asked
  const table: [prepare: string[], preflight: string, visible: boolean, checked: boolean, notes: RegExp][] = [
    [["", " "], "yes", false, false, /^$/],
    [["exec cat"], "no", false, false, /^$/],
    [failing, "no", false, false, /^prepare: .*exit status 3: oops$/], // C14
    [["exec cat"], "warn", false, true, /example\.com.* answered 404$/m],
    [failing, "warn", false, true, /example\.com.* answered 404$/m],
    [failing, "yes", true, true, /^prepare: .*exit status 3: oops$/],
    [["true"], "yes", true, true, /^$/],
  ];
  await all(table.map(async ([prepare, preflight, visible, checked, notes]) => {
    await using bed = await bedFor(prepare, { settings: `preflight: ${preflight}` });
    await using elsewhere = startWebroot(join(bed.home, "conf"));
    let isChecked = false;
    const route = routeTo(visible ? bed.web.port : elsewhere.port, () => isChecked = true);
    const noted: string[] = [];
    const isNoted = () => prepare !== failing || noted.some((text) => text.startsWith("prepare: "));
    const { fetch } = bed.context();
    const ran = await bed.run({
      route,
      warn: (text) => noted.push(text),
      async fetch(url, init) {
        if (url.includes("/challenge/")) await until("the failure is noted", isNoted);
        return await fetch(url, init);
      },
    });
    assert.deepEqual([ran.code, isChecked], [0, checked], ran.stderr);
    assert.match(noted.join("\n"), notes);
  }));
});

test("the CA is not asked if prepare fails, or while the challenge is not visible; --check --challenges shows both without it", async () => {
  const command = "echo $$ > HERE/DOMAIN; case DOMAIN in bad*) echo no route >&2; exit 3;; esac; exec cat";
  await using bed = await bedFor([command], {
    domains: `${NAME}\na.example.com bad.example.com\nwww.example.com`,
  });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const route: Route = async (host) => {
    const pid = () => pidOf(bed, host);
    await until("prepare has run", () => pid() > 0 && !(host.startsWith("bad") && isRunning(pid())));
    return [{ address: "127.0.0.1", port: /^bad|^www/.test(host) ? elsewhere.port : bed.web.port }];
  };
  const hop = /http:\/\/www\.example\.com\/\.well-known\/acme-challenge\/\S+ at 127\.0\.0\.1 answered 404$/m;

  // files of a check that was killed two hours ago, of a running check, and of a challenge
  const before = new Date(bed.ca.now.getTime() - 2 * 3_600_000);
  for (const name of ["lematt-check-old", "lematt-check-new", "token"]) {
    Deno.writeTextFileSync(join(bed.drop, name), "");
    if (!name.endsWith("new")) Deno.utimeSync(join(bed.drop, name), before, before);
  }
  const findings = await checkChallenges(bed.config(), bed.context({ route }));
  const found = Object.fromEntries(findings.map(({ name, problem = "" }) => [name, problem]));
  assert.deepEqual(bed.dropped().toSorted(), ["lematt-check-new", "token"]);
  assert.deepEqual([found[NAME], found["a.example.com"]], ["", ""]);
  assert.match(found["bad.example.com"]!, /exit status 3/);
  assert.match(found["www.example.com"]!, hop);
  assert(found["www.example.com"]!.includes(bed.drop));
  assert.deepEqual(bed.ca.log, []);

  bed.waits.length = 0;
  const ran = await bed.run({ route });
  assert.equal(ran.code, 1);
  assert.match(ran.stderr, /^FAILED +a\.example\.com .*\n.*exit status 3\n.*\| no route$/m);
  assert.match(ran.stderr, hop);
  assert.deepEqual(bed.ca.validations.map(({ name }) => name), [NAME]);
  assert.deepEqual(bed.dropped().toSorted(), ["lematt-check-new", "token"]);
  const waited = bed.waits.reduce((sum, ms) => sum + ms);
  assert(waited > 20_000 && waited < 40_000, `${waited}`);
  const requests = elsewhere.log.length;
  await bed.run({ retry: true, route: routeTo(bed.web.port) });
  assert.equal(elsewhere.log.length, requests, "a self-check continued after the end of the run");
});
