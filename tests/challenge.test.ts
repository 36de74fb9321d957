/** Goal: a challenge can be answered when the CA is told so, and nothing of it is left however a run ends. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import type { Route } from "../lib/context.ts";
import { type Bed, befalling, refusing, testBed, until } from "./bed.ts";
import { type Exchange, startWebroot, type Switches } from "./ca.ts";

const NAME = "example.com";

/** A bed for one EC certificate of NAME; `prepare` are commands, in which HOME is the bed's. */
async function bedFor(
  ca: Switches = {},
  { prepare = [] as readonly string[], settings = "" } = {},
): Promise<Bed> {
  const bed = await testBed({
    domains: NAME,
    settings: `keyTypes: ec\n${settings}`,
    ca: { fault: () => undefined, ...ca },
  });
  const commands = prepare.map((command) => command.replaceAll("HOME", bed.home));
  bed.configure({ actions: `[default]\nprepare: ${JSON.stringify(commands)}` });
  return bed;
}

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

// ---- files -------------------------------------------------------------------------------------------------------

for (const umask of [0o000, 0o077]) {
  Deno.test(`a challenge file is complete and readable for all when the CA is asked (umask ${umask.toString(8)})`, async () => {
    await using bed = await bedFor();
    const { ca, drop } = bed;
    const seen: unknown[] = [];
    ca.switches.fault = when("challenge", () => {
      for (const name of bed.dropped()) {
        const { mode, isFile } = Deno.lstatSync(join(drop, name));
        seen.push([
          isFile,
          mode! & 0o777,
          Deno.readTextFileSync(join(drop, name)) === `${name}.${ca.accounts[0]!.key.thumbprint}`,
        ]);
      }
    });
    const before = Deno.umask(umask);
    try {
      assert.equal((await bed.run()).code, 0);
    } finally {
      Deno.umask(before);
    }
    assert.deepEqual(seen, [[true, 0o644, true]]);
    assert.deepEqual(bed.dropped(), []);
  });
}

for (
  const [what, ca] of [
    ["the CA could not validate", {
      resolve() {
        throw new Error("NXDOMAIN");
      },
    }],
    ["the CA wanted no answer", { fault: befalling("challenge", refusing(403, "unauthorized", "no")) }],
    ["the CA was gone", { fault: befalling("challenge", { kind: "reset" }, Infinity) }],
    ["the CA was gone while it was asked whether it is done", {
      fault: befalling("order", { kind: "reset" }, Infinity),
    }],
  ] as [string, Switches][]
) {
  Deno.test(`no challenge file is left where ${what}`, async () => {
    await using bed = await bedFor(ca);
    const { fault } = bed.ca.switches;
    let count = 0;
    bed.ca.switches.fault = (exchange) => {
      if (exchange.resource === "challenge") count = bed.dropped().length;
      return fault!(exchange);
    };
    assert.equal((await bed.run()).code, 1);
    assert.deepEqual([count, bed.dropped()], [1, []]);
  });
}

Deno.test("no challenge file is left where the run is interrupted", async () => {
  await using bed = await bedFor({ validationDelayMs: 60_000 });
  const stop = new AbortController();
  bed.ca.switches.fault = when("order", () => stop.abort(new DOMException("interrupted", "AbortError")));
  await assert.rejects(bed.run({ signal: stop.signal }), { name: "AbortError" });
  assert.deepEqual(bed.dropped(), []);
});

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  Deno.test(`the program ended by ${signal} leaves no challenge file`, async () => {
    await using bed = await bedFor({ validationDelayMs: 60_000 });
    const program = bed.start("--test");
    await until("a challenge file is there", () => bed.dropped().length > 0);
    program.kill(signal);
    const { code } = await program.output();
    assert.deepEqual([code, bed.dropped()], [1, []]);
  });
}

Deno.test("what a killed run left in the drop directory is removed by the next, and nothing else", async () => {
  await using bed = await bedFor({ validationDelayMs: 60_000 });
  const { ca, drop, home } = bed;
  await Deno.writeTextFile(join(drop, "of-another-client"), "stays");
  await Deno.writeTextFile(join(home, "victim"), "stays");
  const program = bed.start("--test");
  await until("a challenge file is there", () => bed.dropped().length > 1);
  program.kill("SIGKILL");
  await program.output();

  const state = JSON.parse(bed.text("test/state.json"));
  assert.equal(state.published.length, 1);
  state.published.push(...["../victim", "..", "", `x/../../victim`].map((token) => ({ token })));
  await Deno.writeTextFile(bed.path("test/state.json"), JSON.stringify(state));

  ca.switches.validationDelayMs = 0;
  const ran = await bed.run();
  assert.equal(ran.code, 0, ran.stderr);
  assert.deepEqual(bed.dropped(), ["of-another-client"]);
  assert(existsSync(join(home, "victim")));
  assert.deepEqual(JSON.parse(bed.text("test/state.json")).published, []);
});

Deno.test("a file that stands where the challenge belongs is replaced, a link not followed", async () => {
  await using bed = await bedFor();
  const { ca, drop, home } = bed;
  const victim = join(home, "victim");
  await Deno.writeTextFile(victim, "precious");
  let place = "";
  for (const plant of [() => Deno.symlinkSync(victim, place), () => Deno.writeTextFileSync(place, "stale")]) {
    ca.switches.fault = befalling("authz", {
      kind: "rewrite",
      rewrite(body) {
        const challenges = body.challenges as { type: string; token: string }[];
        place = join(drop, challenges.find(({ type }) => type === "http-01")!.token);
        plant();
        return body;
      },
    });
    const ran = await bed.run();
    assert.equal(ran.code, 0, ran.stderr);
    assert.equal(await Deno.readTextFile(victim), "precious");
    assert.deepEqual(bed.dropped(), []);
    bed.configure({ domains: "www.example.com" });
  }
});

for (const moment of ["authz", "challenge"] as const) {
  Deno.test(`a drop directory that vanishes before ${moment} is a line, and the next run is none the worse`, async () => {
    await using bed = await bedFor();
    const { ca, drop } = bed;
    ca.switches.fault = when(moment, () => Deno.removeSync(drop, { recursive: true }));
    const ran = await bed.run();
    assert.equal(ran.code, 1);
    const expected = moment === "authz"
      ? drop
      : `${NAME}: 127.0.0.1: http://${NAME}/.well-known/acme-challenge/`;
    assert(ran.stderr.includes(expected), ran.stderr);
    assert.doesNotMatch(ran.stderr, /\n +at /, "a stack trace");
    await Deno.mkdir(drop);
    assert.equal((await bed.run({ retry: true })).code, 0);
  });
}

for (
  const [what, change, offered] of [
    [
      "only others",
      (all: { type: string }[]) => all.filter(({ type }) => type !== "http-01"),
      "tls-alpn-01, dns-persist-01, dns-01",
    ],
    ["none at all", () => [], "nothing"],
    ["types with escapes in them", () => [{ type: "\x1b[2Jx\n", url: "URL" }], "[2Jx"],
  ] as const
) {
  Deno.test(`a CA that offers ${what} instead of http-01 is told apart from a failed validation`, async () => {
    await using bed = await bedFor();
    bed.ca.switches.fault = befalling("authz", {
      kind: "rewrite",
      rewrite: (body) => {
        const challenges = JSON.stringify(change(body.challenges as { type: string }[])).replace(
          "URL",
          bed.ca.directoryUrl,
        );
        return { ...body, challenges: JSON.parse(challenges) };
      },
    });
    const ran = await bed.run();
    assert(ran.stderr.includes(`the CA does not offer http-01 for ${NAME}, only ${offered}\n`), ran.stderr);
    assert(!asked(bed));
  });
}

// ---- prepare and preflight ---------------------------------------------------------------------------------------

/** Every name at one port, once `ready` (what a prepare command does); and a count of how often that was asked. */
function counted(port: number, ready = (_host: string) => true): Route & { calls: number } {
  const route = Object.assign(async (host: string) => {
    route.calls++;
    await until("prepare is under way", () => ready(host));
    return [{ address: "127.0.0.1", port }];
  }, { calls: 0 });
  return route;
}

/** The prepare command of the tests that look for its process. */
const HELD = "echo $$ > HOME/new; mv HOME/new HOME/pid; exec cat";
const isHeld = ({ home }: Bed) => existsSync(join(home, "pid"));
const pidOf = ({ home }: Bed) => Number(Deno.readTextFileSync(join(home, "pid")));

Deno.test("the CA is asked when the challenge can be seen through the name, and prepare is ended then", async () => {
  await using bed = await bedFor({}, {
    prepare: [
      "until [ -e HOME/go ]; do sleep 0.01; done; ln -s HOME/drop HOME/site",
      HELD,
    ],
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
  assert.deepEqual([statuses[0], statuses.at(-1)], [404, 200]);
  assert.equal(statuses.indexOf(200), statuses.length - 1);
  assert(!isRunning(pidOf(bed)));
});

Deno.test("the CA is not asked while the challenge cannot be seen, and after 30 s the line fails with the hop", async () => {
  await using bed = await bedFor({}, { prepare: [HELD] });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const begun = bed.ca.now;
  const ran = await bed.run({ route: counted(elsewhere.port, () => isHeld(bed)) });
  assert.equal(ran.code, 1);
  assert.match(
    ran.stderr,
    new RegExp(`http://${NAME}/.well-known/acme-challenge/\\S+ at 127.0.0.1 answered 404\n`),
  );
  assert(!asked(bed));
  assert.deepEqual(bed.dropped(), []);
  assert(bed.ca.now.getTime() - begun.getTime() > 29_000);
  assert(bed.waits.reduce((sum, ms) => sum + ms) < 31_000);
  assert(!isRunning(pidOf(bed)));
});

Deno.test("preflight: warn has the CA asked all the same, and says what was seen", async () => {
  await using bed = await bedFor({}, { prepare: ["exec cat"], settings: "preflight: warn" });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const ran = await bed.run({ route: counted(elsewhere.port) });
  assert.equal(ran.code, 0, ran.stderr);
  assert.match(ran.stdout, /^note .*example\.com.* answered 404$/m);
});

for (
  const [what, wishes] of [
    ["preflight: no", { prepare: ["exec cat"], settings: "preflight: no" }],
    ["no prepare command", {}],
  ] as const
) {
  Deno.test(`with ${what} nothing is looked at`, async () => {
    await using bed = await bedFor({}, wishes);
    const route = counted(bed.web.port);
    assert.equal((await bed.run({ route })).code, 0);
    assert.equal(route.calls, 0);
  });
}

Deno.test("a prepare command that dies before the challenge can be seen fails its line at once, with its output", async () => {
  await using bed = await bedFor({}, {
    prepare: ["if [ DOMAIN = bad.example.com ]; then echo 'no route' >&2; exit 3; fi; exec cat"],
  });
  bed.configure({ domains: `${NAME}\nbad.example.com` });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const ran = await bed.run({
    route: (host) =>
      Promise.resolve([{ address: "127.0.0.1", port: host === NAME ? bed.web.port : elsewhere.port }]),
  });
  assert.match(ran.stderr, /^FAILED +bad\.example\.com \(ec\)\n.*exit status 3\n.*\| no route\n$/);
  assert.deepEqual(bed.ca.issued.map(({ names }) => names[0]), [NAME]);
  assert(bed.waits.reduce((sum, ms) => sum + ms, 0) < 10_000, `${bed.waits}`);
});

for (
  const [what, command, moment] of [
    ["at once, with success", "true", undefined],
    ["at once, but what it does is done", "exit 1", undefined],
    ["while the CA validates", HELD, "challenge"],
    ["after the CA has validated", HELD, "order"],
  ] as const
) {
  Deno.test(`a prepare command may end ${what}`, async () => {
    await using bed = await bedFor({}, { prepare: [command] });
    if (moment !== undefined) {
      bed.ca.switches.fault = when(
        moment,
        () => process.kill(pidOf(bed), "SIGKILL"),
      );
    }
    const ran = await bed.run({ route: counted(bed.web.port, () => moment === undefined || isHeld(bed)) });
    assert.equal(ran.code, 0, ran.stderr);
  });
}

Deno.test("one prepare command serves all names and lines that have the same, and DOMAIN tells them apart", async () => {
  await using bed = await bedFor({}, {
    prepare: ["echo all >> HOME/log; exec cat", "echo DOMAIN >> HOME/log; exec cat"],
  });
  bed.configure({ domains: "a.example.com b.example.com\nc.example.com" });
  await Deno.writeTextFile(join(bed.home, "log"), "");
  const lines = () => Deno.readTextFileSync(join(bed.home, "log")).split("\n");
  const ran = await bed.run({
    route: counted(bed.web.port, (host) => lines().includes("all") && lines().includes(host)),
  });
  assert.equal(ran.code, 0, ran.stderr);
  const log = lines().filter((line) => line !== "").sort();
  assert.deepEqual(log.filter((line) => line !== "all"), ["a.example.com", "b.example.com", "c.example.com"]);
  assert(log.filter((line) => line === "all").length <= 2, `${log}`); // two where one line was done before the other began
});

Deno.test("an interrupted run stops looking, even at a silent server, and its prepare commands", async () => {
  await using bed = await bedFor({}, { prepare: [HELD] });
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const stop = new AbortController();
  const running = bed.run({
    route: counted(silent.addr.port, () => isHeld(bed)),
    signal: stop.signal,
    sleep: undefined,
  });
  using _connection = await silent.accept();
  const begun = Date.now();
  stop.abort(new DOMException("interrupted", "AbortError"));
  await assert.rejects(running, { name: "AbortError" });
  assert(Date.now() - begun < 5000);
  assert(!asked(bed));
  assert(!isRunning(pidOf(bed)));
});

Deno.test("preflight: warn asks the CA though prepare has died", async () => {
  await using bed = await bedFor({}, { prepare: ["exit 3"], settings: "preflight: warn" });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const ran = await bed.run({ route: counted(elsewhere.port) });
  assert.equal(ran.code, 0, ran.stderr);
});

Deno.test("lines that are given the same pending authorization are both issued", async () => {
  await using bed = await bedFor({ reuse: "pending", validationDelayMs: 50 });
  bed.configure({ domains: "a.example.com shared.example.com\nb.example.com shared.example.com" });
  const ran = await bed.run();
  assert.equal(ran.code, 0, ran.stderr);
  assert.deepEqual([bed.ca.validations.length, bed.dropped()], [3, []]);
});

Deno.test("no name of a line is asked about before all of them can be answered", async () => {
  // else the CA might be validating the one while the files are removed on account of the other
  await using bed = await bedFor({}, {
    prepare: ["if [ DOMAIN = b.example.com ]; then exit 7; fi; exec cat"],
  });
  bed.configure({ domains: "a.example.com b.example.com" });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const ran = await bed.run({
    route: (host) =>
      Promise.resolve([{
        address: "127.0.0.1",
        port: host === "b.example.com" ? elsewhere.port : bed.web.port,
      }]),
  });
  assert.equal(ran.code, 1);
  assert(!asked(bed));
});

Deno.test("a line that fails on account of one name has come to its end for all others", async () => {
  await using bed = await bedFor({}, {
    prepare: ["if [ DOMAIN = a.example.com ]; then exit 7; fi; exec cat"],
  });
  bed.configure({ domains: "a.example.com b.example.com" });
  await using elsewhere = startWebroot(join(bed.home, "conf"));
  const ran = await bed.run({ route: counted(elsewhere.port) });
  assert.match(ran.stderr, /exit status 7/);
  assert.deepEqual(bed.dropped(), []);
  const looked = elsewhere.log.length;
  await bed.run({ retry: true, route: counted(bed.web.port) });
  assert.equal(elsewhere.log.length, looked);
});
