/** Goal: a challenge can be answered when the CA is asked to, and nothing of it is left however a run ends. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { checkChallenges } from "../lib/challenge.ts";
import type { Route } from "../lib/context.ts";
import { all, type Bed, faultAt, testBed, until } from "./bed.ts";
import { type Exchange, startWebroot, type Switches } from "./ca.ts";
import { together } from "./together.ts";

const test = together("challenges are answered");

const NAME = "example.com";

/** A bed for one EC certificate of NAME; `prepare` are commands, in which HERE is the bed's home. */
const bedFor = (ca: Switches = {}, { prepare = [] as string[], settings = "", domains = NAME } = {}) =>
  testBed({
    domains,
    settings: `keyTypes: ec\n${settings}`,
    actions: `[default]\nprepare: ${JSON.stringify(prepare)}`,
    ca,
  });

/** Does something when a resource is asked for, the first time, before the CA takes notice. */
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
const isRunning = (pid: number) => {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
};

/** The prepare command of the tests that look for its process. */
const HELD = "echo $$ > HERE/new; mv HERE/new HERE/pid; exec cat";
const isHeld = ({ home }: Bed) => existsSync(join(home, "pid"));
const pidOf = ({ home }: Bed) => Number(Deno.readTextFileSync(join(home, "pid")));

// ---- files -------------------------------------------------------------------------------------------------------

test("a challenge file is complete and readable for all when the CA is asked, whatever the umask", async () => {
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

test("what a killed run left in the drop directory is removed by the next; its prepare commands end with it", async () => {
  const prepare = ["echo $$ > HERE/new; mv HERE/new HERE/pid; sleep 1000"]; // which never looks at its input
  await using bed = await bedFor({ validationDelayMs: 60_000 }, { prepare, settings: "preflight: no" });
  await Deno.writeTextFile(join(bed.drop, "of-another-client"), "stays");
  await Deno.writeTextFile(join(bed.home, "victim"), "stays");
  const program = bed.start("--test");
  await until("a challenge file is there", () => bed.dropped().length > 1 && isHeld(bed));
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

test("a file that is where the challenge belongs is replaced, a link not followed", async () => {
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

test("a CA that does not offer http-01 is asked nothing, and what it offers is said", async () => {
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

test("lines that are given the same pending authorization are both issued", async () => {
  await using bed = await bedFor({ reuse: "pending", validationDelayMs: 50 }, {
    domains: "a.example.com shared.example.com\nb.example.com shared.example.com",
  });
  const ran = await bed.run();
  assert.equal(ran.code, 0, ran.stderr);
  assert.deepEqual([bed.ca.validations.length, bed.dropped()], [3, []]);
});

// ---- prepare and the self-check ----------------------------------------------------------------------------------

/** Every name at one port, once `ready` (what a prepare command does); and a count of how often that was asked. */
function counted(port: number, ready = (_host: string) => true): Route & { calls: number } {
  const route = Object.assign(async (host: string) => {
    route.calls++;
    await until("prepare is under way", () => ready(host));
    return [{ address: "127.0.0.1", port }];
  }, { calls: 0 });
  return route;
}

test("the CA is asked when the challenge can be seen through the name, and prepare is ended then", async () => {
  await using bed = await bedFor({}, {
    prepare: ["until [ -e HERE/go ]; do sleep 0.01; done; ln -s HERE/drop HERE/site", HELD],
  });
  const { ca, home } = bed;
  await using site = startWebroot(join(home, "site"));
  let statuses: number[] = [];
  ca.switches.httpPort = site.port;
  ca.switches.fault = when("challenge", () => {
    statuses = site.log.map(({ status }) => status);
    assert(isRunning(pidOf(bed)));
  });
  const running = bed.run({ route: counted(site.port, () => isHeld(bed)) });
  await until("the name was looked at", () => site.log.length > 0);
  await Deno.writeTextFile(join(home, "go"), "");
  const ran = await running;
  assert.equal(ran.code, 0, ran.stderr);
  assert.deepEqual([statuses[0], statuses.indexOf(200)], [404, statuses.length - 1]);
  assert(!isRunning(pidOf(bed)));
});

test("the CA is not asked while the challenge cannot be seen, and after 30 s the line fails with the hop", async () => {
  await using bed = await bedFor({}, { prepare: [HELD] });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const ran = await bed.run({ route: counted(elsewhere.port, () => isHeld(bed)) });
  assert.equal(ran.code, 1);
  assert.match(
    ran.stderr,
    /http:\/\/example\.com\/\.well-known\/acme-challenge\/\S+ at 127\.0\.0\.1 answered 404\n/,
  );
  assert.deepEqual([asked(bed), bed.dropped(), isRunning(pidOf(bed))], [false, [], false]);
  const waited = bed.waits.reduce((sum, ms) => sum + ms);
  assert(waited > 20_000 && waited < 31_000, `${waited}`);
});

test("preflight: warn has the CA asked though prepare does not help, and says what was seen", async () => {
  await all(["exec cat", "echo oops >&2; exit 3"].map(async (command) => {
    await using bed = await bedFor({}, { prepare: [command], settings: "preflight: warn" });
    await using elsewhere = startWebroot(join(bed.home, "conf"));
    const ran = await bed.run({ route: counted(elsewhere.port) });
    assert.equal(ran.code, 0, ran.stderr);
    assert.match(ran.stdout, /^note .*example\.com.* answered 404$/m);
  }));
});

test("with preflight: no, or without a prepare command, nothing is checked; a prepare that fails is reported", async () => {
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

test("a prepare command may end at any time, so long as what it does is done", async () => {
  const table: [command: string, moment?: Exchange["resource"]][] = [
    ["true"],
    ["exit 1"],
    [HELD, "challenge"], // while the CA validates
    [HELD, "order"], // after the CA has validated
  ];
  await all(table.map(async ([command, moment]) => {
    await using bed = await bedFor({}, { prepare: [command] });
    if (moment !== undefined) bed.ca.switches.fault = when(moment, () => process.kill(pidOf(bed), "SIGKILL"));
    const ran = await bed.run({ route: counted(bed.web.port, () => moment === undefined || isHeld(bed)) });
    assert.equal(ran.code, 0, ran.stderr);
  }));
});

test("a prepare command that fails before the challenge can be seen fails its line, of which the CA hears nothing", async () => {
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
  const looked = elsewhere.log.length;
  await bed.run({ retry: true, route: counted(bed.web.port) });
  assert.equal(elsewhere.log.length, looked, "a check went on behind the end of the run");
});

test("one prepare command serves all names and lines that have the same, and DOMAIN tells them apart", async () => {
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
  assert(all <= 2, `${all}`); // two where one line was done before the other began
});

test("an interrupted run stops checking, even at a silent server, and its prepare commands", async () => {
  await using bed = await bedFor({}, { prepare: [HELD] });
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const stop = new AbortController();
  const running = bed.run({ route: counted(silent.addr.port, () => isHeld(bed)), signal: stop.signal });
  using _connection = await silent.accept();
  const begun = Date.now();
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
  assert(Date.now() - begun < 5000);
  assert.deepEqual([asked(bed), bed.dropped(), isRunning(pidOf(bed))], [false, [], false]);
});

// ---- --check --challenges ----------------------------------------------------------------------------------------

test("checkChallenges() says which name is served from elsewhere, by which address, and leaves nothing", async () => {
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
  // a check that was killed two hours ago, one that is running, and a token
  const kept = ["lematt-check-new", "token"];
  for (const name of ["lematt-check-old", ...kept]) Deno.writeTextFileSync(join(bed.drop, name), "");
  const before = new Date(bed.ca.now.getTime() - 2 * 3_600_000);
  for (const name of ["lematt-check-old", "token"]) Deno.utimeSync(join(bed.drop, name), before, before);
  const found = await problems();
  assert.deepEqual(bed.dropped().toSorted(), kept);
  for (const name of kept) Deno.removeSync(join(bed.drop, name));
  assert.deepEqual([found[NAME], found["remote.example.com"]], [undefined, undefined]);
  const url = `http://www.${NAME}/.well-known/acme-challenge/`;
  for (const told of [bed.drop, url, "127.0.0.1", "404"]) {
    assert(found[`www.${NAME}`]!.includes(told), found[`www.${NAME}`]);
  }
  assert.match(found["bad.example.com"]!, /exit status 3/);
  assert.deepEqual([bed.dropped(), bed.ca.log], [[], []]);
  await Deno.remove(bed.drop);
  assert((await problems())[NAME]!.includes(bed.drop));
  await Deno.mkdir(bed.drop);
});
