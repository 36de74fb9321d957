/** Goal: the program as users run it: arguments, configuration, exit status, streams, concurrent and interrupted runs. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { all, testBed, together, until } from "./bed.ts";
import { isRunning, listing, textOf } from "./faults.ts";
import { endOf, LEMATT, output, ROOT } from "./programs.ts";

const test = together("the program as users run it");

const bedOf = (domains: string, actions = "") =>
  testBed({ domains, actions, settings: "keyTypes: ec\nari: no\npreflight: no" });

/** Runs lematt.ts with exactly these arguments, by default away from any configuration. */
function lematt(args: string, cwd = "/") {
  return output([...LEMATT, ...args.split(" ").filter(Boolean)], { cwd });
}

test("invalid arguments are refused with exit status 2 and one line that names them", async () => {
  const table: [args: string, named: string][] = [
    ["", "--test or --prod"],
    ["--tset", "--tset"],
    ["--test --parallel 1.5", '"1.5"'],
    ["--test a.conf b.conf", "a.conf and b.conf"],
    ["--test --offline", "--status"],
    ["--test --new-key", "--renew"],
    ["--test --status --plan", "--status"],
    ["--test --revoke a --reason boredom", "keyCompromise"],
    ["--test --accept a --plan --deliver b", "--deliver"],
    ["--test --status --json --metrics", "--metrics"],
  ];
  await all(table.map(async ([args, named]) => {
    const { code, stdout, stderr } = await lematt(args);
    assert.deepEqual([code, stdout], [2, ""], args);
    assert.match(stderr, /^lematt: [^\n]+\ntry --help\n$/, args);
    assert.ok(stderr.includes(named), stderr);
  }));
});

test("--help fits a terminal of 80 columns and names the files that a run writes", async () => {
  const { code, stdout, stderr } = await lematt("--help");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.ok(stdout.split("\n").every((line) => line.length <= 80));
  assert.match(stdout, /key\/example.com_www.example.com-key.rsa2048.pem.*\n.*cert-combined.rsa2048.pem/);
  assert.match((await lematt("--version")).stdout, /^lematt \d+\.\d+\.\d+\n$/);
});

test("the configuration is a file, a directory or a link, else ./conf of the same user, else conf beside the program", async () => {
  await using bed = await bedOf("a.example.com");
  await Deno.symlink(bed.conf, join(bed.home, "link"));
  await Deno.symlink(bed.path("lematt.conf"), join(bed.home, "link.conf"));
  const ways = [`--config ${bed.path("lematt.conf")}`, `--config ${bed.conf}`, "link", "link.conf", ""];
  await all(ways.map(async (way) => {
    const { code, stdout } = await lematt(`--check ${way}`, bed.home);
    assert.deepEqual([code, stdout], [0, `${bed.path("lematt.conf")}: 1 line of domains, no errors\n`]);
  }));
  bed.act("[default]\ncolour: blue");
  for (const args of ["--check", "--test --plan"]) {
    const { stdout } = await lematt(`${args} ${bed.conf}`);
    assert.match(stdout, /^(note +)?actions\.conf:2: unknown key "colour" is ignored$/m);
  }
  const missing = await lematt("--check missing.conf", bed.home);
  assert.deepEqual([missing.code, missing.stderr.includes('"missing.conf"')], [2, true]);

  if (Deno.uid() === 0) await Deno.chown(bed.conf, 65534, 65534); // S5: its commands would run as root
  const samples = await lematt("--check", Deno.uid() === 0 ? bed.home : "/");
  assert.deepEqual([samples.code, samples.stderr.includes(`no names in ${ROOT}/conf/domains`)], [2, true]);
  assert.match(samples.stderr, /since no --config names another/); // T11
});

test("every command prints all errors of the configuration, and does nothing else", async () => {
  await using bed = await bedOf("a..b\n-b.c", "[default]\nupdate: reload\n");
  bed.configure({ settings: "curve: round" });
  await all(["--test", "--prod --status", "--check", "--test --revoke a.b --yes"].map(async (args) => {
    const { code, stdout, stderr } = await lematt(args, bed.home);
    assert.deepEqual([code, stdout], [2, ""]);
    const places = stderr.match(/^\S+:\d+:/gm);
    assert.deepEqual(places, ["lematt.conf:8:", "domains:1:", "domains:2:", "actions.conf:2:"], stderr);
  }));
  assert.deepEqual(listing(bed.conf), ["actions.conf", "domains", "lematt.conf"]);
});

test("each command has its exit status: 0, 1 if there is a problem, 2 for what does not exist", async () => {
  const actions =
    `[constructor]\ndomains: a.example.com b.example.com\nupdate: ["echo hello; echo >> HERE/log; false"]`; // S8
  await using bed = await bedOf("a.example.com\nb.example.com", actions);
  const run = (args = "") => lematt(`--test ${bed.conf} ${args}`);
  const planned = await run("--plan");
  assert.deepEqual([planned.code, planned.stderr], [0, ""]);
  assert.match(planned.stdout, /^issue +2 lines: .*\n +a\.example\.com.*\n +b\.example\.com/m);
  assert.deepEqual((await run("--plan --only a.example.com")).stdout.match(/[ab]\.example/g), ["a.example"]);
  assert.equal((await run("--plan --accept [constructor]")).code, 0);
  assert.deepEqual([listing(bed.conf).length, bed.ca.log.length], [3, 0], "--plan changes nothing");

  const first = await run("--verbose");
  assert.equal(first.code, 1);
  assert.match(first.stdout, /\[constructor\] \| hello$/m);
  assert.match(first.stdout, /^issued +a\.example\.com /m);
  assert.match(first.stderr, /^FAILED +\[constructor\] /m);
  const table = await run("--status --offline");
  assert.equal(table.code, 1);
  assert.match(table.stdout, /^1 problem:\n +\[constructor\] /);
  assert.equal((await run("--status --json")).code, 1);
  const metrics = await run("--status --metrics");
  assert.equal(metrics.code, 0, "R14: or the file of metrics would not be replaced");
  assert.match(metrics.stdout, /^lematt_problems\{.*\} 1$/m);

  const accepted = await run("--accept [constructor]");
  assert.deepEqual([accepted.code, accepted.stdout.split(";")[0]], [0, "2 certificates noted as delivered"]);
  const last = await run();
  assert.deepEqual([last.code, last.stderr], [0, ""]);
  assert.equal(bed.take().length, 1, "no command runs again");
  assert.match(last.stdout, /^nothing due.* next renewal \d{4}-\d\d-\d\d.*\n$/);
  await all(["--renew", "--only", "--deliver", "--accept", "--revoke"].map(async (option) => {
    const { code, stdout, stderr } = await run(`${option} c.example.com`);
    assert.deepEqual([code, stdout], [2, ""], option);
    assert.match(stderr, /^lematt: .*c\.example\.com.*\n$/, option);
  }));

  Deno.writeTextFileSync(bed.path("test", "state.json"), "{");
  const corrupt = await run("--status --json");
  assert.match(corrupt.stderr, /cannot use test\/state\.json/);
  JSON.parse(corrupt.stdout); // without the notice
  assert.equal(bed.text("test", "state.json"), "{", "--status changes nothing");
});

test("without a terminal --revoke and --prune show what they would change, and need --yes", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  const run = (args = "") => lematt(`--test ${bed.conf} ${args}`);
  await run();
  const asked = await run("--revoke A.example.com");
  assert.equal(asked.code, 2);
  assert.match(asked.stdout, /[0-9a-f]{64}, valid until .*\n +for a\.example\.com\n$/);
  assert.equal(bed.ca.issued.some(({ revoked }) => revoked !== undefined), false);
  assert.equal((await run("--revoke a.example.com --reason superseded --yes")).code, 0);
  assert.deepEqual(bed.ca.issued.map(({ revoked }) => revoked?.reason).sort(), [4, undefined]);
  bed.configure({ domains: "b.example.com" });
  const shown = await run("--prune");
  assert.equal(shown.code, 2);
  assert.match(shown.stdout, /^ +cert\/a\.example\.com-cert-combined\.prime256v1\.test\.pem$/m);
  assert.equal((await run("--prune --yes")).code, 0);
  assert.deepEqual(listing(bed.path("test", "cert")), ["b.example.com-cert-combined.prime256v1.test.pem"]);
});

test("a run continues after the reader of its output has gone", async () => {
  const actions = `[default]\nupdate: ["touch HERE/delivered"]`;
  await using bed = await bedOf("a.example.com\nb.example.com", actions);
  const script = `{ "$@"; echo $? > code; } 2>&1 | true`;
  await output(["/bin/sh", "-c", script, "sh", ...LEMATT, "--test"], { cwd: bed.home });
  const status = () => textOf(join(bed.home, "code"));
  await until("the run has ended", () => status() !== "");
  assert.equal(status(), "0\n");
  assert.ok(existsSync(join(bed.home, "delivered")));
});

test("a second run exits with status 3 while one is in progress; a signal ends that one at once, with status 1", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nupdate: ["echo $$ > HERE/pid; exec sleep 600"]`);
  const first = bed.start("--test");
  const pid = () => Number(textOf(join(bed.home, "pid")));
  await until("the first run delivers", () => pid() > 0);
  await all(["", "--cron", "--revoke a.example.com --yes", "--accept a.example.com"].map(async (args) => {
    const { code, stderr } = await lematt(`--test ${bed.conf} ${args}`);
    assert.equal(code, 3, args);
    assert.match(stderr, /^lematt: another --test run is in progress/);
  }));
  for (const args of ["--plan", "--status --offline"]) {
    assert.equal((await lematt(`--test ${bed.conf} ${args}`)).code, 0, args);
  }
  const ends = async (run: Deno.ChildProcess, signal: Deno.Signal) => {
    run.kill(signal);
    const killed = performance.now();
    const { code, stderr } = await endOf(run);
    assert.ok(performance.now() - killed < 10_000);
    assert.deepEqual([code, stderr, isRunning(pid())], [1, "lematt: interrupted\n", false], signal);
  };
  await ends(first, "SIGTERM");
  Deno.removeSync(join(bed.home, "pid"));
  const next = bed.start("--test");
  await until("the next run delivers", () => pid() > 0);
  await ends(next, "SIGHUP");
});

test("the demo issues, delivers, and names the files that it made", async () => {
  const { tasks } = JSON.parse(await Deno.readTextFile(join(ROOT, "deno.json")));
  const command = tasks.demo.replace(/^deno/, Deno.execPath()).split(" ");
  const { code, stdout, stderr } = await output(command, { cwd: ROOT });
  assert.deepEqual([code, stderr], [0, ""], stdout);
  for (const text of ["mail.example.com-key.rsa2048.test.pem", "4 issued", "nothing due"]) {
    assert.ok(stdout.includes(text), `${text}: ${stdout}`);
  }
});
