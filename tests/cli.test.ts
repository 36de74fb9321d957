/** Goal: the program as users run it: arguments, exit status, streams, documents, signals, concurrent and killed runs. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { all, type Bed, endOf, testBed, until } from "./bed.ts";
import type { Fault } from "./ca.ts";
import { isRunning, listing, textOf } from "./faults.ts";
import { LEMATT, output } from "./programs.ts";
import { together } from "./together.ts";

const test = together("the program as users run it");

const ROOT = join(import.meta.dirname!, "..");

/** Runs lematt.ts with exactly these arguments, away from any configuration. */
const lematt = (...args: string[]) => output([...LEMATT, ...args], { cwd: "/" });

/** A bed with EC certificates only. */
const bedOf = (domains: string, actions = "", fault?: () => Fault | undefined) =>
  testBed({
    domains,
    actions,
    settings: "keyTypes: ec\nari: no\npreflight: no\ncommandTimeout: 30",
    ca: { fault },
  });

/** Whether the prepare command, which wrote its process id to HERE/prepare, is running. */
const isPrepared = ({ home }: Bed) => {
  const pid = Number(textOf(join(home, "prepare")));
  return pid > 0 && isRunning(pid);
};

// ---- arguments -------------------------------------------------------------------------------------------

test("invalid arguments are refused with exit status 2 and one line that names them", async () => {
  const table: [args: string, named: string][] = [
    ["", "--test or --prod"],
    ["--test --prod", "--prod"],
    ["--status", "--test or --prod"],
    ["--tset", "--tset"],
    ["--test=yes", "--test"],
    ["--test --config", "--config"],
    ["--test a b", "a and b"],
    ["--test --parallel 0", '"0"'],
    ["--test --parallel 1e2", '"1e2"'],
    ["--test --parallel 1.5", '"1.5"'],
    ["--test a.conf b.conf", "a.conf and b.conf"],
    ["--test --offline", "--status"],
    ["--test --yes", "--revoke"],
    ["--test --new-key", "--renew"],
    ["--test --status --plan", "--status"],
    ["--test --status --renew a", "--renew"],
    ["--test --revoke a --reason boredom", "keyCompromise"],
    ["--test --revoke a --json", "--json"],
    ["--test --accept a --plan --deliver b", "--deliver"],
    ["--test --accept a --only b", "--only"],
    ["--test --status --json --metrics", "--metrics"],
  ];
  await all(table.map(async ([args, named]) => {
    const { code, stdout, stderr } = await lematt(...args.split(" ").filter((word) => word !== ""));
    assert.deepEqual([code, stdout], [2, ""], args);
    assert.match(stderr, /^lematt: [^\n]+\ntry --help\n$/, args);
    assert.ok(stderr.includes(named), stderr);
  }));
});

test("--help fits a terminal of 80 columns and names the files that a run writes", async () => {
  const { code, stdout, stderr } = await lematt("--help");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.ok(stdout.split("\n").every((line) => line.length <= 80));
  for (const what of ["key", "cert-combined"]) {
    assert.ok(stdout.includes(`/example.com_www.example.com-${what}.rsa2048.pem`), what);
  }
  assert.match((await lematt("--version")).stdout, /^lematt \d+\.\d+\.\d+\n$/);
});

test("the configuration is found by its file, its directory, a bare argument, or in ./conf", async () => {
  await using bed = await bedOf("a.example.com");
  const ways: [string[], string][] = [
    [["--config", bed.path("lematt.conf")], "/"],
    [["--config", bed.conf], "/"],
    [[bed.conf], "/"],
    [["conf/lematt.conf"], bed.home],
    [[], bed.home],
  ];
  await all(ways.map(async ([args, cwd]) => {
    const { code, stdout } = await output([...LEMATT, "--check", ...args], { cwd });
    assert.equal(code, 0);
    assert.ok(stdout.includes(`${bed.path("lematt.conf")}: 1 line of domains`), stdout);
  }));
});

test("errors of all three files are printed together, with exit status 2 and no other effect; --cron sends an alert", async () => {
  await using bed = await testBed({
    domains: "a..example.com\n-b.example.com",
    actions: '[default]\nupdate: reload\nalert: ["{ echo SUBJECT; cat; } > alert"]\n',
    settings: "curve: round",
  });
  for (
    const args of [
      "--test",
      "--prod --status",
      "--check",
      "--test --revoke a.example.com --yes",
      "--test --cron",
    ]
  ) {
    const { code, stdout, stderr } = await bed.lematt(...args.split(" "));
    assert.deepEqual([code, stdout], [2, ""]);
    const places = [...stderr.matchAll(/^\S+:(?:\d+:)? /gm)].map(([place]) => place.trim());
    assert.deepEqual(places, ["lematt.conf:8:", "domains:1:", "domains:2:", "actions.conf:2:"], stderr);
    assert.equal(existsSync(join(bed.home, "alert")), args.includes("--cron"));
  }
  const [subject, ...text] = bed.take("alert");
  assert.ok(subject !== "" && text.some((line) => line.startsWith("domains:1: ")), text.join("\n"));
  // --cron records what it printed and alerted, so the next run does neither
  assert.deepEqual(listing(bed.conf), ["actions.conf", "domains", "lematt.conf", "test"]);
  assert.deepEqual(listing(bed.path("test")), [".configuration-error"]);
  const again = await bed.lematt("--test", "--cron");
  assert.deepEqual([again.code, again.stderr, bed.take("alert")], [2, "", []]);
  const nowhere = await lematt("--test", "--config", join(bed.home, "nowhere"));
  assert.equal(nowhere.code, 2);
  assert.match(nowhere.stderr, /nowhere/);
});

// ---- exit status and streams -----------------------------------------------------------------------------

test("a run exits with 0 on success, with 1 after a failure, with 2 if an option names an unknown line", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nuploadCerts: ["test -e HERE/up"]`);
  const first = await bed.lematt("--test");
  assert.equal(first.code, 1);
  assert.match(first.stdout, /^issued +a\.example\.com /m);
  assert.match(first.stderr, /^FAILED +\[default\] /m);
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  assert.equal((await bed.lematt("--test")).code, 0);
  const third = await bed.lematt("--test");
  assert.deepEqual([third.code, third.stderr], [0, ""]);
  assert.match(third.stdout, /next renewal \d{4}-\d\d-\d\d/);
  for (const option of ["--renew", "--only", "--deliver", "--accept", "--revoke"]) {
    const { code, stdout, stderr } = await bed.lematt("--test", option, "b.example.com");
    assert.deepEqual([code, stdout], [2, ""], option);
    assert.match(stderr, /^lematt: .*b\.example\.com.*\n$/, option);
  }
});

test("--plan changes nothing at the CA or on the disk, and groups its tasks by reason", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com", `[default]\nupdate: ["true"]`);
  const { code, stdout, stderr } = await bed.lematt("--test", "--plan");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.match(stdout, /^issue +2 lines: .*\n +a\.example\.com.*\n +b\.example\.com/m);
  const one = await bed.lematt("--test", "--plan", "--only", "a.example.com");
  assert.deepEqual(one.stdout.match(/[ab]\.example\.com/g), ["a.example.com"]);
  assert.equal((await bed.lematt("--test", "--plan", "--accept", "[default]")).code, 0);
  assert.deepEqual(listing(bed.conf), ["actions.conf", "domains", "lematt.conf"]);
  assert.equal(bed.ca.log.length, 0);
});

test("a run continues after the reader of its output has gone", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nupdate: ["touch HERE/delivered"]`,
  );
  await output(["/bin/sh", "-c", `{ "$@"; echo $? > code; } 2>&1 | true`, "sh", ...LEMATT, "--test"], {
    cwd: bed.home,
  });
  await until("the run has ended", () => existsSync(join(bed.home, "code")));
  assert.deepEqual(bed.take("code"), ["0"]);
  assert.ok(existsSync(join(bed.home, "delivered")));
});

test("--status exits with 1 if there is a problem, --metrics with 0; notices are not printed into documents", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nupdate: ["false"]`);
  await bed.lematt("--test");
  const table = await bed.lematt("--test", "--status", "--offline");
  assert.equal(table.code, 1);
  assert.match(table.stdout, /^1 problem:\n +\[default\] /);
  assert.equal((await bed.lematt("--test", "--status", "--json")).code, 1);
  const metrics = await bed.lematt("--test", "--status", "--metrics");
  assert.equal(metrics.code, 0);
  assert.match(metrics.stdout, /^lematt_problems\{.*\} 1$/m);

  const text = "{";
  Deno.writeTextFileSync(bed.path("test", "state.json"), text);
  const corrupt = await bed.lematt("--test", "--status", "--json");
  assert.match(corrupt.stderr, /cannot use test\/state\.json/);
  JSON.parse(corrupt.stdout);
  assert.equal(bed.text("test", "state.json"), text, "not changed");
});

test("--revoke and --prune do nothing without --yes if no terminal can be asked", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  await bed.lematt("--test");
  const asked = await bed.lematt("--test", "--revoke", "A.example.com");
  assert.equal(asked.code, 2);
  assert.match(asked.stdout, /[0-9a-f]{64}, valid until .*\n +for a\.example\.com\n$/);
  assert.equal(bed.ca.issued.some(({ revoked }) => revoked !== undefined), false);
  const done = await bed.lematt("--test", "--revoke", "a.example.com", "--reason", "superseded", "--yes");
  assert.deepEqual([done.code, done.stderr], [0, ""]);
  assert.deepEqual(bed.ca.issued.map(({ revoked }) => revoked?.reason).sort(), [4, undefined]);
  assert.equal((await bed.lematt("--test", "--status", "--offline")).code, 1, "revoked and still in use");

  bed.configure({ domains: "b.example.com" });
  const shown = await bed.lematt("--test", "--prune");
  assert.equal(shown.code, 2);
  assert.match(shown.stdout, /^ +cert\/a\.example\.com-cert-combined\.prime256v1\.test\.pem$/m);
  assert.equal((await bed.lematt("--test", "--prune", "--yes")).code, 0);
  assert.deepEqual(listing(bed.path("test", "cert")), ["b.example.com-cert-combined.prime256v1.test.pem"]);
});

// ---- concurrent and interrupted runs ---------------------------------------------------------------------

test("a second run exits with status 3 while one is in progress", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nupdate: ["echo $$ > HERE/started; read word < HERE/fifo"]`,
  );
  await output(["mkfifo", join(bed.home, "fifo")]);
  const first = bed.start("--test");
  await until("the first run delivers", () => existsSync(join(bed.home, "started")));
  const others = [
    "--test",
    "--test --cron",
    "--test --revoke a.example.com --yes",
    "--test --accept a.example.com",
  ];
  await all(others.map(async (args) => {
    const { code, stderr } = await bed.lematt(...args.split(" "));
    assert.equal(code, 3, args);
    assert.match(stderr, /^lematt: another --test run is in progress/);
  }));
  assert.equal((await bed.lematt("--test", "--plan")).code, 0);
  assert.equal((await bed.lematt("--test", "--status", "--offline")).code, 0);
  Deno.writeTextFileSync(join(bed.home, "fifo"), "go\n");
  assert.equal((await endOf(first)).code, 0);
  assert.equal((await bed.lematt("--test")).code, 0);
});

test("a signal during a validation leaves nothing behind, and the exit status is 1", async () => {
  await all((["SIGTERM", "SIGINT", "SIGHUP"] as const).map(async (signal) => {
    let hanging = true;
    const isPolled = () => bed.ca.log.at(-1)?.resource === "order";
    const fault = () => hanging && isPolled() ? { kind: "silence" } as const : undefined;
    const actions =
      `[default]\nprepare: ["echo $$ > HERE/prepare; exec cat"]\nupdate: ["touch HERE/delivered"]`;
    await using bed: Bed = await bedOf("a.example.com", actions, fault);
    const child = bed.start("--test");
    await until(
      "the order is polled",
      () => isPolled() && bed.dropped().length === 1 && isPrepared(bed),
    );
    child.kill(signal);
    const killed = performance.now();
    const { code, stderr } = await endOf(child);
    assert.ok(performance.now() - killed < 10_000, "at once");
    assert.deepEqual([code, stderr], [1, "lematt: interrupted\n"]);
    assert.deepEqual([bed.dropped(), isPrepared(bed), bed.take("delivered")], [[], false, []]);
    const left = ["", "cert", "csr", "key"].flatMap((directory) => listing(bed.path("test", directory)));
    assert.deepEqual(left.filter((name) => name.startsWith(".")), [".lock"]);
    assert.deepEqual(bed.state().failures, {}); // an interruption is not a failure
    hanging = false;
    assert.equal((await bed.lematt("--test")).code, 0);
  }));
});

test("the demo issues, delivers, and names the files that it made", async () => {
  const { tasks } = JSON.parse(await Deno.readTextFile(join(ROOT, "deno.json")));
  const { code, stdout, stderr } = await output(tasks.demo.replace(/^deno/, Deno.execPath()).split(" "), {
    cwd: ROOT,
  });
  assert.deepEqual([code, stderr], [0, ""], stdout);
  for (const text of ["mail.example.com-key.rsa2048.test.pem", "4 issued", "nothing due"]) {
    assert.ok(stdout.includes(text), `${text}: ${stdout}`);
  }
});
