/** Goal: the challenge is in place when the CA is asked to validate, and is removed however a run ends. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { checkChallenges } from "../lib/challenge.ts";
import type { Route } from "../lib/context.ts";
import { all, type Bed, faultAt, testBed, until } from "./bed.ts";
import { type Exchange, startWebroot, type Switches } from "./ca.ts";
import { isRunning } from "./faults.ts";
import { together } from "./together.ts";

const test = together("challenges");

const NAME = "example.com";

/** A bed for one EC certificate of NAME; `prepare` are commands, in which HERE is the bed's home. */
const bedFor = (ca: Switches = {}, { prepare = [] as string[], settings = "", domains = NAME } = {}) =>
  testBed({
    domains,
    settings: `keyTypes: ec\n${settings}`,
    actions: `[default]\nprepare: ${JSON.stringify(prepare)}`,
    ca,
  });

/** Calls `act` at the first request for a resource, before the CA handles it. */
function when(resource: Exchange["resource"], act: () => void): NonNullable<Switches["fault"]> {
  let done = false;
  return (exchange) => {
    if (exchange.resource === resource && !done) {
      done = true;
      act();
    }
    return undefined;
  };
}

const asked = ({ ca }: Bed) => ca.log.some(({ resource }) => resource === "challenge");

/** A prepare command that records its process id and runs until its input is closed. */
const PREPARE = "echo $$ > HERE/new; mv HERE/new HERE/pid; exec cat";
const isPrepared = ({ home }: Bed) => existsSync(join(home, "pid"));
const pidOf = ({ home }: Bed) => Number(Deno.readTextFileSync(join(home, "pid")));

// ---- files -------------------------------------------------------------------------------------------------------

test("the challenge file is complete and readable by all when the CA is asked to validate, whatever the umask", async () => {
  await using bed = await bedFor();
  const { ca, drop } = bed;
  const seen: unknown[] = [];
  ca.switches.fault = when("challenge", () => {
    for (const name of bed.dropped()) {
      const { mode, isFile } = Deno.lstatSync(join(drop, name));
      const content = Deno.readTextFileSync(join(drop, name));
      seen.push([isFile, mode! & 0o777, content === `${name}.${ca.accounts[0]!.key.thumbprint}`]);
    }
  });
  const { code } = await bed.lemattBy(["/bin/sh", "-c", `umask 077; exec "$@"`, "sh"], "--test");
  assert.deepEqual([code, seen], [0, [[true, 0o644, true]]]);
  assert.deepEqual([bed.dropped(), bed.state().published], [[], []]);
});

test("the next run removes what a killed run left in the drop directory; its prepare commands end with it", async () => {
  const prepare = ["echo $$ > HERE/new; mv HERE/new HERE/pid; sleep 1000"]; // does not read its input
  await using bed = await bedFor({ validationDelayMs: 60_000 }, { prepare, settings: "preflight: no" });
  await Deno.writeTextFile(join(bed.drop, "of-another-client"), "stays");
  await Deno.writeTextFile(join(bed.home, "victim"), "stays");
  const program = bed.start("--test");
  await until("a challenge file is there", () => bed.dropped().length > 1 && isPrepared(bed));
  assert(isRunning(pidOf(bed)));
  program.kill("SIGKILL");
  await program.output();
  await until("prepare has ended", () => !isRunning(pidOf(bed)));
  bed.act("");

  const state = bed.state();
  assert.equal(state.published.length, 1);
  state.published.push(...["../victim", "..", "", "x/../../victim"].map((token) => ({ token })));
  await Deno.writeTextFile(bed.path("test/state.json"), JSON.stringify(state));

  bed.ca.switches.validationDelayMs = 0;
  const ran = await bed.run();
  assert.equal(ran.code, 0, ran.stderr);
  assert.deepEqual([bed.dropped(), bed.state().published], [["of-another-client"], []]);
  assert(existsSync(join(bed.home, "victim")));
});

test("a file or link in place of the challenge file is replaced; the link is not followed", async () => {
  await using bed = await bedFor();
  const victim = join(bed.home, "victim");
  await Deno.writeTextFile(victim, "precious");
  let place = "";
  for (const plant of [() => Deno.symlinkSync(victim, place), () => Deno.writeTextFileSync(place, "stale")]) {
    bed.ca.switches.fault = faultAt("authz", {
      kind: "rewrite",
      rewrite(body) {
        const challenges = body.challenges as { type: string; token: string }[];
        place = join(bed.drop, challenges.find(({ type }) => type === "http-01")!.token);
        plant();
        return body;
      },
    });
    const ran = await bed.run();
    assert.equal(ran.code, 0, ran.stderr);
    assert.deepEqual([await Deno.readTextFile(victim), bed.dropped()], ["precious", []]);
    bed.configure({ domains: "www.example.com" });
  }
});

test("a CA that does not offer http-01 is not asked to validate, and the error lists what it offers", async () => {
  await using bed = await bedFor();
  const others = (all: { type: string }[]) => all.filter(({ type }) => type !== "http-01");
  const table: [change: typeof others, offered: string][] = [
    [others, "tls-alpn-01, dns-persist-01, dns-01"],
    [() => [], "nothing"],
    [() => [{ type: "\x1b[2Jx\n", url: bed.ca.directoryUrl }], "[2Jx"],
  ];
  for (const [change, offered] of table) {
    const rewrite = (body: Record<string, unknown>) => (
      { ...body, challenges: change(body.challenges as { type: string }[]) }
    );
    bed.ca.switches.fault = faultAt("authz", { kind: "rewrite", rewrite }, 20);
    const ran = await bed.run({ retry: true });
    assert(ran.stderr.includes(`${NAME}, only ${offered}\n`), ran.stderr);
  }
  assert(!asked(bed));
});

test("lines that receive the same pending authorization are both issued", async () => {
  await using bed = await bedFor({ reuse: "pending", validationDelayMs: 50 }, {
    domains: "a.example.com shared.example.com\nb.example.com shared.example.com",
  });
  const ran = await bed.run();
  assert.equal(ran.code, 0, ran.stderr);
  assert.deepEqual([bed.ca.validations.length, bed.dropped()], [3, []]);
});

// ---- prepare and the self-check ----------------------------------------------------------------------------------

/** Resolves every name to one port, once `ready` (as after a prepare command), and counts the calls. */
function counted(port: number, ready = (_host: string) => true): Route & { calls: number } {
  const route = Object.assign(async (host: string) => {
    route.calls++;
    await until("prepare is running", () => ready(host));
    return [{ address: "127.0.0.1", port }];
  }, { calls: 0 });
  return route;
}

test("the CA is asked to validate once the challenge is visible through the name; prepare is ended afterwards", async () => {
  await using bed = await bedFor({}, {
    prepare: ["until [ -e HERE/go ]; do sleep 0.01; done; ln -s HERE/drop HERE/site", PREPARE],
  });
  const { ca, home } = bed;
  await using site = startWebroot(join(home, "site"));
  let statuses: number[] = [];
  ca.switches.httpPort = site.port;
  ca.switches.fault = when("challenge", () => {
    statuses = site.log.map(({ status }) => status);
    assert(isRunning(pidOf(bed)));
  });
  const running = bed.run({ route: counted(site.port, () => isPrepared(bed)) });
  await until("the name was checked", () => site.log.length > 0);
  await Deno.writeTextFile(join(home, "go"), "");
  const ran = await running;
  assert.equal(ran.code, 0, ran.stderr);
  assert.deepEqual([statuses[0], statuses.indexOf(200)], [404, statuses.length - 1]);
  assert(!isRunning(pidOf(bed)));
});

test("the CA is not asked while the challenge is not visible; after 30 s the line fails, and the error names the hop", async () => {
  await using bed = await bedFor({}, { prepare: [PREPARE] });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const ran = await bed.run({ route: counted(elsewhere.port, () => isPrepared(bed)) });
  assert.equal(ran.code, 1);
  assert.match(
    ran.stderr,
    /http:\/\/example\.com\/\.well-known\/acme-challenge\/\S+ at 127\.0\.0\.1 answered 404\n/,
  );
  assert.deepEqual([asked(bed), bed.dropped(), isRunning(pidOf(bed))], [false, [], false]);
  const waited = bed.waits.reduce((sum, ms) => sum + ms);
  assert(waited > 20_000 && waited < 31_000, `${waited}`);
});

test("with preflight: warn the CA is asked even if the self-check fails, and its result is printed", async () => {
  await all(["exec cat", "echo oops >&2; exit 3"].map(async (command) => {
    await using bed = await bedFor({}, { prepare: [command], settings: "preflight: warn" });
    await using elsewhere = startWebroot(join(bed.home, "conf"));
    const ran = await bed.run({ route: counted(elsewhere.port) });
    assert.equal(ran.code, 0, ran.stderr);
    assert.match(ran.stdout, /^note .*example\.com.* answered 404$/m);
  }));
});

test("no self-check runs with preflight: no or without a prepare command; a failed prepare command is reported", async () => {
  const table: [prepare: string[], settings: string, notes: RegExp][] = [
    [[], "", /^$/],
    [["", " "], "", /^$/],
    [["exec cat"], "preflight: no", /^$/],
    [["echo oops >&2; exit 3"], "preflight: no", /prepare: .*exit status 3: oops/],
  ];
  await all(table.map(async ([prepare, settings, notes]) => {
    await using bed = await bedFor({ validationDelayMs: 300 }, { prepare, settings });
    const route = counted(bed.web.port);
    const ran = await bed.run({ route });
    assert.deepEqual([ran.code, route.calls], [0, 0], ran.stderr);
    assert.match(ran.stdout.match(/^note.*/gm)?.join() ?? "", notes);
  }));
});

test("a prepare command may end at any time if the challenge is visible all the same", async () => {
  const table: [command: string, moment?: Exchange["resource"]][] = [
    ["true"],
    ["exit 1"],
    [PREPARE, "challenge"], // while the CA validates
    [PREPARE, "order"], // after the CA has validated
  ];
  await all(table.map(async ([command, moment]) => {
    await using bed = await bedFor({}, { prepare: [command] });
    if (moment !== undefined) bed.ca.switches.fault = when(moment, () => process.kill(pidOf(bed), "SIGKILL"));
    const ran = await bed.run({
      route: counted(bed.web.port, () => moment === undefined || isPrepared(bed)),
    });
    assert.equal(ran.code, 0, ran.stderr);
  }));
});

test("a prepare command that fails before the challenge is visible fails its line, and the CA is not asked", async () => {
  await using bed = await bedFor({}, {
    domains: `${NAME}\na.example.com bad.example.com`,
    prepare: ["if [ DOMAIN = bad.example.com ]; then echo 'no route' >&2; exit 3; fi; exec cat"],
  });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const portOf = (host: string) => host.startsWith("bad") ? elsewhere.port : bed.web.port;
  const ran = await bed.run({
    route: (host) => Promise.resolve([{ address: "127.0.0.1", port: portOf(host) }]),
  });
  assert.match(ran.stderr, /^FAILED +a\.example\.com .*\n.*exit status 3\n.*\| no route\n$/);
  assert.deepEqual(bed.ca.validations.map(({ name }) => name), [NAME]);
  assert(bed.waits.reduce((sum, ms) => sum + ms, 0) < 10_000, `${bed.waits}`);
  assert.deepEqual(bed.dropped(), []);
  const before = elsewhere.log.length;
  await bed.run({ retry: true, route: counted(bed.web.port) });
  assert.equal(elsewhere.log.length, before, "a self-check continued after the end of the run");
});

test("a prepare command runs once for all names and lines, or once for each name if it contains DOMAIN", async () => {
  await using bed = await bedFor({}, {
    domains: "a.example.com b.example.com\nc.example.com",
    prepare: ["echo all >> HERE/log; exec cat", "echo DOMAIN >> HERE/log; exec cat"],
  });
  const log = join(bed.home, "log");
  await Deno.writeTextFile(log, "");
  const lines = () => Deno.readTextFileSync(log).split("\n");
  const isUp = (host: string) => lines().includes("all") && lines().includes(host);
  const ran = await bed.run({ route: counted(bed.web.port, isUp) });
  assert.equal(ran.code, 0, ran.stderr);
  const names = lines().filter((line) => line.includes(".")).sort();
  assert.deepEqual(names, ["a.example.com", "b.example.com", "c.example.com"]);
  const all = lines().filter((line) => line === "all").length;
  assert(all <= 2, `${all}`); // 2 if one line was done before the other began
});

test("an interrupted run stops its self-checks, even of a silent server, and its prepare commands", async () => {
  await using bed = await bedFor({}, { prepare: [PREPARE] });
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const stop = new AbortController();
  const running = bed.run({ route: counted(silent.addr.port, () => isPrepared(bed)), signal: stop.signal });
  using _connection = await silent.accept();
  const begun = Date.now();
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
  assert(Date.now() - begun < 5000);
  assert.deepEqual([asked(bed), bed.dropped(), isRunning(pidOf(bed))], [false, [], false]);
});

// ---- --check --challenges ----------------------------------------------------------------------------------------

test("checkChallenges() reports which name is served from elsewhere, by which address, and leaves no files", async () => {
  await using bed = await bedFor({}, { domains: `${NAME} www.${NAME}\nremote.example.com\nbad.example.com` });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  bed.act(
    `[default]\n[remote]\ndomains: remote.example.com\nprepare: ["touch HERE/up; exec cat"]\n` +
      `[bad]\ndomains: bad.example.com\nprepare: ["echo no route >&2; exit 3"]\n`,
  );
  const route: Route = (host) => {
    const isHere = host === NAME || (host === "remote.example.com" && existsSync(join(bed.home, "up")));
    return Promise.resolve([{ address: "127.0.0.1", port: isHere ? bed.web.port : elsewhere.port }]);
  };
  const config = bed.config();
  const problems = async () => {
    const findings = await checkChallenges(config, bed.context({ route }));
    return Object.fromEntries(findings.map(({ name, problem }) => [name, problem]));
  };
  // files of a check that was killed two hours ago, of a running check, and of a challenge
  const kept = ["lematt-check-new", "token"];
  for (const name of ["lematt-check-old", ...kept]) Deno.writeTextFileSync(join(bed.drop, name), "");
  const before = new Date(bed.ca.now.getTime() - 2 * 3_600_000);
  for (const name of ["lematt-check-old", "token"]) Deno.utimeSync(join(bed.drop, name), before, before);
  const found = await problems();
  assert.deepEqual(bed.dropped().toSorted(), kept);
  for (const name of kept) Deno.removeSync(join(bed.drop, name));
  assert.deepEqual([found[NAME], found["remote.example.com"]], [undefined, undefined]);
  const url = `http://www.${NAME}/.well-known/acme-challenge/`;
  for (const part of [bed.drop, url, "127.0.0.1", "404"]) {
    assert(found[`www.${NAME}`]!.includes(part), found[`www.${NAME}`]);
  }
  assert.match(found["bad.example.com"]!, /exit status 3/);
  assert.deepEqual([bed.dropped(), bed.ca.log], [[], []]);
  await Deno.remove(bed.drop);
  assert((await problems())[NAME]!.includes(bed.drop));
  await Deno.mkdir(bed.drop);
});
