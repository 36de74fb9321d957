/** Goal: the program as it is used: arguments, exit status, streams, documents, signals, two at once, and sudden ends. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { all, type Bed, type Ended, testBed, until } from "./bed.ts";
import type { Fault } from "./ca.ts";
import { LEMATT } from "./programs.ts";

const ROOT = join(import.meta.dirname!, "..");

/** Runs a command to its end, without standard input. */
async function output(command: readonly string[], options: Deno.CommandOptions = {}): Promise<Ended> {
  const [program, ...args] = command;
  const { code, stdout, stderr } = await new Deno.Command(program!, { stdin: "null", ...options, args })
    .output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** Runs lematt.ts with exactly these arguments, away from any configuration. */
const lematt = (...args: string[]) => output([...LEMATT, ...args], { cwd: "/" });

/** A bed with EC certificates only; HERE in its actions is its home directory. */
async function bedOf(domains: string, actions = "", fault?: () => Fault | undefined): Promise<Bed> {
  const bed = await testBed({ domains, settings: "keyTypes: ec\nari: no\npreflight: no", ca: { fault } });
  bed.act(actions);
  return bed;
}

async function endOf(child: Deno.ChildProcess): Promise<Ended> {
  const { code, stdout, stderr } = await child.output();
  return { code, stdout: new TextDecoder().decode(stdout), stderr: new TextDecoder().decode(stderr) };
}

/** The names in a directory, or none where it is not there. */
function listing(path: string): string[] {
  return existsSync(path) ? [...Deno.readDirSync(path)].map(({ name }) => name).sort() : [];
}

/** Asserts that a run which was cut off has left nothing that it should have taken away. */
function assertClean(bed: Bed): void {
  assert.deepEqual(bed.dropped(), []);
  const left = ["", "cert", "csr", "key"].flatMap((directory) => listing(bed.path("test", directory)));
  assert.deepEqual(left.filter((name) => name.startsWith(".") && name !== ".lock"), []);
}

/** Whether the process runs whose number a command has written into HERE/<name>. */
function runs(bed: Bed, name: string): boolean {
  try {
    process.kill(Number(Deno.readTextFileSync(join(bed.home, name))), 0);
    return true;
  } catch {
    return false;
  }
}

// ---- arguments -------------------------------------------------------------------------------------------

Deno.test("what cannot be asked for is refused in one line, with exit status 2", async () => {
  const table: [args: string, said: RegExp][] = [
    ["", /--test or --prod/],
    ["--test --prod", /--test does not go with --prod/],
    ["--status", /--test or --prod/],
    ["--tset", /'--tset'/],
    ["--test=yes", /'--test' does not take an argument/],
    ["--test --config", /'--config <value>' argument missing/],
    ["--test a b", /a and b/],
    ["--test --parallel 0", /"0"/],
    ["--test --parallel 1e2", /"1e2"/],
    ["--test --offline", /--status/],
    ["--test --yes", /--revoke/],
    ["--test --new-key", /--renew/],
    ["--test --status --plan", /--plan.*--status/],
    ["--test --status --renew a", /--renew/],
    ["--test --revoke", /'--revoke <value>' argument missing/],
    ["--test --revoke a --reason boredom", /keyCompromise/],
    ["--test --revoke a --json", /--json/],
    ["--test --status --json --metrics", /--metrics/],
  ];
  await all(table.map(async ([args, said]) => {
    const { code, stdout, stderr } = await lematt(...args.split(" ").filter((word) => word !== ""));
    assert.deepEqual([code, stdout], [2, ""], args);
    assert.match(stderr, new RegExp(`^lematt: .*${said.source}.*\ntry --help\n$`), args);
  }));
});

Deno.test("--help fits a terminal of 80 columns and names the files that a run makes", async () => {
  const { code, stdout, stderr } = await lematt("--help");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.ok(stdout.split("\n").every((line) => line.length <= 80));
  for (const what of ["key", "cert-combined"]) {
    assert.ok(stdout.includes(`/example.com_www.example.com-${what}.rsa2048.pem`), what);
  }
  assert.match((await lematt("--version")).stdout, /^lematt \d+\.\d+\.\d+\n$/);
});

Deno.test("the configuration is found by its file, its directory, a bare argument, or in ./conf", async () => {
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

Deno.test("errors of all three files are printed together, with exit status 2 and nothing touched", async () => {
  await using bed = await testBed({
    domains: "a..example.com\n-b.example.com",
    actions: "[default]\nupdate: reload\n",
    settings: "curve: round",
  });
  for (const args of ["--test", "--prod --status", "--check", "--test --revoke a.example.com --yes"]) {
    const { code, stdout, stderr } = await bed.lematt(...args.split(" "));
    assert.deepEqual([code, stdout], [2, ""]);
    const places = [...stderr.matchAll(/^\S+:(?:\d+:)? /gm)].map(([place]) => place.trim());
    assert.deepEqual(places, ["lematt.conf:8:", "domains:1:", "domains:2:", "actions.conf:2:"], stderr);
  }
  assert.deepEqual(listing(bed.conf), ["actions.conf", "domains", "lematt.conf"]);
  const nowhere = await lematt("--test", "--config", join(bed.home, "nowhere"));
  assert.equal(nowhere.code, 2);
  assert.match(nowhere.stderr, /nowhere/);
});

Deno.test("with --cron an error of the configuration goes to the alert commands that could be read", async () => {
  await using bed = await bedOf(
    "a..example.com",
    `[default]\nalert: ["{ echo 'SUBJECT'; cat; } > HERE/alert"]`,
  );
  assert.deepEqual([(await bed.lematt("--test")).code, bed.take("alert")], [2, []]);
  assert.equal((await bed.lematt("--test", "--cron")).code, 2);
  const [subject, ...text] = bed.take("alert");
  assert.ok(subject !== "");
  assert.match(text.join("\n"), /^domains:1: /m);
});

Deno.test("options that name what does not exist are refused before anything is done", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[mail]\ndomains: a.example.com\nupdate: ["touch HERE/ran"]`,
  );
  for (
    const args of [
      "--renew b.example.com",
      "--only b.example.com",
      "--deliver [web]",
      "--accept [web]",
      "--revoke b.example.com --yes",
    ]
  ) {
    const { code, stdout, stderr } = await bed.lematt("--test", ...args.split(" "));
    assert.deepEqual([code, stdout], [2, ""], args);
    assert.match(stderr, /^lematt: .*(b\.example\.com|\[web\]).*\n$/, args);
  }
  assert.equal(existsSync(bed.path("test", "cert")) && listing(bed.path("test", "cert")).length > 0, false);
});

// ---- exit status and streams -----------------------------------------------------------------------------

Deno.test("a run exits with 0 when all is well, and with 1 when something failed or is pending after a failure", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nuploadCerts: ["test -e HERE/up"]`);
  const first = await bed.lematt("--test");
  assert.equal(first.code, 1);
  assert.match(first.stdout, /^issued +a\.example\.com /m);
  assert.match(first.stderr, /^FAILED +\[default\] /m);
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  assert.equal((await bed.lematt("--test")).code, 0);
  const third = await bed.lematt("--test");
  assert.deepEqual([third.code, third.stderr], [0, ""]);
  assert.match(third.stdout, /^nothing due, .*next renewal \d{4}-\d\d-\d\d/);
});

Deno.test("--test and --prod are fully apart", async () => {
  await using bed = await bedOf("a.example.com");
  await bed.lematt("--test");
  assert.equal(existsSync(bed.path("prod")), false);
  await bed.lematt("--prod");
  assert.deepEqual(listing(bed.path("prod", "cert")), ["a.example.com-cert-combined.prime256v1.pem"]);
  assert.deepEqual(listing(bed.path("test", "cert")), ["a.example.com-cert-combined.prime256v1.test.pem"]);
});

Deno.test("--plan touches neither the CA nor the disk, and groups what it would do by reason", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com", `[default]\nupdate: ["true"]`);
  const { code, stdout, stderr } = await bed.lematt("--test", "--plan");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.match(stdout, /^issue +2 lines: .*\n +a\.example\.com.*\n +b\.example\.com/m);
  assert.equal(
    (await bed.lematt("--test", "--plan", "--accept", "[default]")).stdout,
    "nothing is pending\n",
  );
  const one = await bed.lematt("--test", "--plan", "--only", "a.example.com");
  assert.match(one.stdout, /a\.example\.com/);
  assert.doesNotMatch(one.stdout, /b\.example\.com/);
  assert.deepEqual(listing(bed.conf), ["actions.conf", "domains", "lematt.conf"]);
  assert.equal(bed.ca.log.length, 0);
});

Deno.test("--cron prints nothing while nothing changes, and failures on standard error", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nupdate: ["true"]`);
  await bed.lematt("--test");
  for (const args of [["--cron"], ["--cron", "--json"]]) {
    assert.deepEqual(await bed.lematt("--test", ...args), { code: 0, stdout: "", stderr: "" });
  }
  bed.act(`[default]\nupdate: ["false"]`);
  const { code, stdout, stderr } = await bed.lematt("--test", "--cron");
  assert.deepEqual([code, stdout], [1, ""]);
  assert.match(stderr, /^FAILED +\[default\] .*\n +cannot run "false": exit status 1\n$/);
});

Deno.test("a reader that goes away does not stop a run", async () => {
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

Deno.test("output that cannot be written is a failure", { ignore: Deno.build.os !== "linux" }, async () => {
  await using bed = await bedOf("a.example.com");
  const { code, stderr } = await output(["/bin/sh", "-c", `"$@" > /dev/full`, "sh", ...LEMATT, "--test"], {
    cwd: bed.home,
  });
  assert.equal(code, 1);
  assert.match(stderr, /cannot write its output: .*No space left/);
});

Deno.test("--status exits with 1 where there is a problem, --metrics with 0; notices stay out of documents", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nupdate: ["false"]`);
  await bed.lematt("--test");
  const table = await bed.lematt("--test", "--status", "--offline");
  assert.equal(table.code, 1);
  assert.match(table.stdout, /^1 problem:\n +\[default\] delivery of 1 certificate pending/);
  assert.equal((await bed.lematt("--test", "--status", "--json")).code, 1);
  const metrics = await bed.lematt("--test", "--status", "--metrics");
  assert.equal(metrics.code, 0);
  assert.match(metrics.stdout, /^lematt_problems\{.*\} 1$/m);

  const text = "{";
  Deno.writeTextFileSync(bed.path("test", "state.json"), text);
  const spoilt = await bed.lematt("--test", "--status", "--json");
  assert.match(spoilt.stderr, /cannot use test\/state\.json/);
  JSON.parse(spoilt.stdout);
  assert.equal(bed.text("test", "state.json"), text, "left as it is");
  Deno.writeTextFileSync(bed.path("test", "state.json"), `{"version":7}`);
  for (const args of [["--status"], ["--plan"], []]) {
    const { code, stderr } = await bed.lematt("--test", ...args);
    assert.equal(code, 2);
    assert.match(stderr, /newer lematt/);
  }
});

Deno.test("--revoke and --prune do nothing without --yes where nobody can be asked", async () => {
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

// ---- two at once, and the end of one ---------------------------------------------------------------------

Deno.test("a second run is turned away with exit status 3 while one is in progress", async () => {
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

for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"] as const) {
  Deno.test(`${signal} in the middle of a validation leaves nothing behind and is exit status 1`, async () => {
    let hanging = true;
    const isPolled = () => bed.ca.log.at(-1)?.resource === "order";
    const fault = () => hanging && isPolled() ? { kind: "silence" } as const : undefined;
    const actions =
      `[default]\nprepare: ["echo $$ > HERE/prepare; exec cat"]\nupdate: ["touch HERE/delivered"]`;
    await using bed = await bedOf("a.example.com", actions, fault);
    const child = bed.start("--test");
    await until(
      "the order is polled",
      () => isPolled() && bed.dropped().length === 1 && runs(bed, "prepare"),
    );
    child.kill(signal);
    const killed = performance.now();
    const { code, stderr } = await endOf(child);
    assert.ok(performance.now() - killed < 4000, "at once");
    assert.deepEqual([code, stderr], [1, "lematt: interrupted\n"]);
    assertClean(bed);
    assert.equal(runs(bed, "prepare") || existsSync(join(bed.home, "delivered")), false);
    assert.deepEqual(bed.state().failures, {}); // nobody's failure
    hanging = false;
    assert.equal((await bed.lematt("--test")).code, 0);
  });
}

const KILL = `"test -e HERE/killed || { touch HERE/killed; kill -9 $PPID; exit 1; }"`;
for (
  const [what, actions] of [
    [
      "before anything is uploaded",
      `uploadCerts: [${KILL}, "cp CERTS HERE/host/"]\nuploadKeys: ["cp KEYS HERE/host/"]`,
    ],
    [
      "between certificate and key",
      `uploadCerts: ["cp CERTS HERE/host/"]\nuploadKeys: [${KILL}, "cp KEYS HERE/host/"]`,
    ],
    [
      "before the update",
      `uploadCerts: ["cp CERTS HERE/host/"]\nuploadKeys: ["cp KEYS HERE/host/"]\nupdate: [${KILL}]`,
    ],
  ] as const
) {
  Deno.test(`a run that is killed ${what} leaves it all to the next`, async () => {
    await using bed = await bedOf("a.example.com", `[default]\n${actions}`);
    await Deno.mkdir(join(bed.home, "host"));
    assert.equal((await bed.lematt("--test")).code, 128 + 9);
    const { code, stderr } = await bed.lematt("--test");
    assert.deepEqual([code, stderr, bed.ca.issued.length], [0, "", 1]);
    for (const [directory, what] of [["cert", "cert-combined"], ["key", "key"]]) {
      const name = `a.example.com-${what}.prime256v1.test.pem`;
      assert.equal(Deno.readTextFileSync(join(bed.home, "host", name)), bed.text("test", directory!, name));
    }
    assertClean(bed);
  });
}

Deno.test("a run that is killed while it issues other lines leaves to the next what it has issued", async () => {
  let hanging = true;
  const orders = () => bed.ca.log.filter(({ resource }) => resource === "newOrder").length;
  const fault = () => hanging && orders() === 2 ? { kind: "silence" } as const : undefined;
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nupdate: ["echo DOMAINS_CN >> HERE/log"]`,
    fault,
  );
  const child = bed.start("--test", "--parallel", "1");
  await until("the second line is being ordered", () => orders() === 2);
  child.kill("SIGKILL");
  await endOf(child);
  hanging = false;
  bed.configure({ domains: "a.example.com" });
  assert.equal((await bed.lematt("--test")).code, 0);
  assert.deepEqual([bed.take(), bed.ca.issued.length], [["a.example.com"], 1]);
});

Deno.test("the demo issues, delivers, and names the files that it made", async () => {
  const { tasks } = JSON.parse(await Deno.readTextFile(join(ROOT, "deno.json")));
  const { code, stdout, stderr } = await output(tasks.demo.replace(/^deno/, Deno.execPath()).split(" "), {
    cwd: ROOT,
  });
  assert.deepEqual([code, stderr], [0, ""], stdout);
  for (const text of ["mail.example.com-key.rsa2048.test.pem", "4 issued", "nothing due"]) {
    assert.ok(stdout.includes(text), `${text}: ${stdout}`);
  }
});
