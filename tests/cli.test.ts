/**
 * Goal: the program as it is used: arguments, exit status, streams, signals, terminals, and the demo. The ways to start
 * it are in start.test.ts.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import type { State } from "../lib/state.ts";
import { type Bed, type Ended, testBed, until } from "./bed.ts";
import type { Fault } from "./ca.ts";

const ROOT = join(import.meta.dirname!, "..");
const PROGRAM = join(ROOT, "lematt.ts");
const DENO = ["run", "-q", "--no-prompt", "-P=lematt"];

/** Runs a command to its end, without standard input. */
async function output(
  command: string,
  args: readonly string[],
  options: Deno.CommandOptions = {},
): Promise<Ended> {
  const { code, stdout, stderr } = await new Deno.Command(command, {
    stdin: "null",
    ...options,
    args: [...args],
  }).output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** Runs lematt.ts with exactly these arguments, away from any configuration. */
function lematt(...args: string[]): Promise<Ended> {
  return output(Deno.execPath(), [...DENO, PROGRAM, ...args], { cwd: "/" });
}

/** A bed with EC certificates only; HERE in its actions is its home directory. */
async function bedOf(
  domains: string,
  actions = "",
  { settings = "", fault }: { settings?: string; fault?: () => Fault | undefined } = {},
): Promise<Bed> {
  const bed = await testBed({ domains, settings: `keyTypes: ec\nari: no\n${settings}`, ca: { fault } });
  bed.configure({ actions: actions.replaceAll("HERE", bed.home) });
  return bed;
}

function stateOf(bed: Bed): State {
  return JSON.parse(bed.text("test", "state.json"));
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
  assert.deepEqual(left.filter((name) => name.endsWith(".new")), []);
}

/** The process whose number a command has written into HERE/<name>. */
function running(bed: Bed, name: string): boolean {
  try {
    process.kill(Number(Deno.readTextFileSync(join(bed.home, name))), 0);
    return true;
  } catch {
    return false;
  }
}

// ---- arguments -----------------------------------------------------------------------------------

Deno.test("what cannot be asked for is refused in one line, with exit status 2", async () => {
  const table: [args: string, said: RegExp][] = [
    ["", /say either --test or --prod/],
    ["--test --prod", /say either --test or --prod/],
    ["--status", /say either --test or --prod/],
    ["--tset", /Unknown option '--tset'/],
    ["--test --force", /Unknown option '--force'/],
    ["--test=yes", /'--test' does not take an argument/],
    ["--test --config", /'--config <value>' argument missing/],
    ["--test a b", /one configuration at a time, not a and b/],
    ["--test a --config b", /one configuration at a time, not a and b/],
    ["--test --parallel 0", /--parallel takes a number from 1 to 100, not "0"/],
    ["--test --parallel 1e2", /--parallel takes a number from 1 to 100, not "1e2"/],
    ["--test --offline", /--offline goes with --status/],
    ["--test --metrics", /--metrics goes with --status/],
    ["--test --yes", /--yes goes with --revoke/],
    ["--test --status --plan", /one of .* at a time/],
    ["--test --check --status", /one of .* at a time/],
    ["--test --revoke", /'--revoke <value>' argument missing/],
    ["--test --revoke a --reason boredom", /--reason takes one of unspecified, keyCompromise, /],
    ["--test --revoke a --json", /--json goes with a run, --plan or --status/],
    ["--test --status --json --metrics", /one of --json and --metrics at a time/],
  ];
  await Promise.all(table.map(async ([args, said]) => {
    const { code, stdout, stderr } = await lematt(...args.split(" ").filter((word) => word !== ""));
    assert.deepEqual([code, stdout], [2, ""], args);
    assert.match(stderr, new RegExp(`^lematt: .*${said.source}.*\ntry --help\n$`), args);
  }));
});

Deno.test("--help fits a screen and names the files that a run makes", async () => {
  const { code, stdout, stderr } = await lematt("--help");
  assert.deepEqual([code, stderr], [0, ""]);
  const lines = stdout.trimEnd().split("\n");
  assert.ok(lines.length <= 40 && lines.every((line) => line.length <= 80));
  for (
    const name of [
      "prod/key/example.com_www.example.com-key.rsa2048.pem",
      "prod/cert/example.com_www.example.com-cert-combined.rsa2048.pem",
      "prod/csr/",
      "prime256v1",
      ".test.pem",
    ]
  ) {
    assert.ok(stdout.includes(name), name);
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
  for (const [args, cwd] of ways) {
    const { code, stdout } = await output(Deno.execPath(), [...DENO, PROGRAM, "--check", ...args], { cwd });
    assert.equal(code, 0);
    assert.ok(stdout.endsWith(`${bed.path("lematt.conf")}: 1 line of domains, no faults\n`), stdout);
  }
});

Deno.test("faults of all three files are told together, with exit status 2 and nothing touched", async () => {
  await using bed = await bedOf("a..example.com\n-b.example.com", "[default]\nupdate: reload\nupdaet: []\n", {
    settings: "curve: round",
  });
  for (
    const args of [["--test"], ["--prod", "--status"], ["--check"], [
      "--test",
      "--revoke",
      "a.example.com",
      "--yes",
    ]]
  ) {
    const { code, stdout, stderr } = await bed.lematt(...args);
    assert.deepEqual([code, stdout], [2, ""]);
    const places = [...stderr.matchAll(/^([\w.]+):\d+: /gm)].map(([, file]) => file);
    assert.deepEqual(places, ["lematt.conf", "domains", "domains", "actions.conf", "actions.conf"], stderr);
  }
  assert.deepEqual(listing(bed.conf), ["actions.conf", "domains", "lematt.conf"]);
  const { code, stderr } = await lematt("--test", "--config", join(bed.home, "nowhere"));
  assert.equal(code, 2);
  assert.match(stderr, /nowhere/);
});

// ---- exit status and streams ---------------------------------------------------------------------

Deno.test("a run exits with 0 when all is well, and with 1 when something failed, waits or is owed", async () => {
  await using bed = await bedOf("a.example.com", `[default]\nuploadCerts: ["test -e HERE/up"]`);
  const first = await bed.lematt("--test");
  assert.equal(first.code, 1);
  assert.match(
    first.stdout,
    /^made .*account\.key, the account key \(P-256\); keep a copy of it\nissued {2}a\.example\.com .*\n1 issued, 0 kept, 1 delivery owed\n$/,
  );
  assert.match(first.stderr, /^FAILED {2}\[default\]\n.*\nowed {4}\[default\] owes 1 certificate/);
  Deno.writeTextFileSync(join(bed.home, "up"), "");
  assert.equal((await bed.lematt("--test")).code, 0);
  const third = await bed.lematt("--test");
  assert.deepEqual([third.code, third.stderr], [0, ""]);
  assert.match(third.stdout, /^nothing due, 1 kept, next renewal \d{4}-\d\d-\d\d \(a\.example\.com ec\)\n$/);
});

Deno.test("--test and --prod are fully apart", async () => {
  await using bed = await bedOf("a.example.com");
  await bed.lematt("--test");
  assert.equal(existsSync(bed.path("prod")), false);
  const { stdout } = await bed.lematt("--prod");
  assert.match(stdout, /^issued /m);
  assert.deepEqual(listing(bed.path("prod", "cert")), ["a.example.com-cert-combined.prime256v1.pem"]);
  assert.deepEqual(listing(bed.path("test", "cert")), ["a.example.com-cert-combined.prime256v1.test.pem"]);
});

Deno.test("--plan touches neither the CA nor the disk, and exits with 0", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com");
  const { code, stdout, stderr } = await bed.lematt("--test", "--plan");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.match(stdout, /^issue .*no certificate yet\nissue .*no certificate yet\n2 due, 0 kept\n$/);
  assert.equal(JSON.parse((await bed.lematt("--test", "--plan", "--json")).stdout).due.length, 2);
  assert.deepEqual(listing(bed.conf), ["actions.conf", "domains", "lematt.conf"]);
  assert.equal(bed.ca.log.length, 0);
});

Deno.test("--cron says nothing while nothing changes, warnings or not, and failures on standard error", async () => {
  await using bed = await testBed({
    domains: "a.example.com",
    settings: "keyTypes: ec\nari: no\ngenerateNewCertsAfterDays: 1",
    ca: { reject: (name) => name === "bad.example.com" ? "not this one" : undefined },
  });
  await bed.lematt("--test");
  assert.match((await bed.lematt("--test")).stdout, /^note {4}lematt\.conf:\d+: /);
  for (const args of [["--cron"], ["--cron", "--json"]]) {
    assert.deepEqual(await bed.lematt("--test", ...args), { code: 0, stdout: "", stderr: "" });
  }
  bed.configure({ domains: "a.example.com\nbad.example.com" });
  const { code, stdout, stderr } = await bed.lematt("--test", "--cron");
  assert.deepEqual([code, stdout], [1, ""]);
  assert.match(stderr, /^FAILED {2}bad\.example\.com \(ec\)\n +cannot create an order: .*not this one.*\n$/);
});

Deno.test("--json is one document, for a run and for its failures", async () => {
  const refused = new Set(["bad.example.com"]);
  await using bed = await testBed({
    domains: "a.example.com\nbad.example.com",
    settings: "keyTypes: ec",
    ca: { reject: (name) => refused.has(name) ? "not this one" : undefined },
  });
  const { code, stdout } = await bed.lematt("--test", "--json");
  assert.equal(code, 1);
  const document = JSON.parse(stdout);
  assert.deepEqual(Object.keys(document), [
    "mode",
    "notes",
    "due",
    "issued",
    "failed",
    "kept",
    "waiting",
    "deliveries",
    "alerts",
    "owed",
  ]);
  assert.deepEqual(document.issued.map(({ names }: { names: string[] }) => names), [["a.example.com"]]);
  assert.deepEqual(
    document.failed.map((
      { names, problem }: { names: string[]; problem: { type: string } },
    ) => [names[0], problem.type]),
    [["bad.example.com", "rejectedIdentifier"]],
  );
});

Deno.test("a reader that goes away does not stop a run", async () => {
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nupdate: ["touch HERE/delivered"]`,
  );
  const command = `{ "$@"; echo $? > code; } 2>&1 | true`;
  await output("/bin/sh", ["-c", command, "sh", Deno.execPath(), ...DENO, PROGRAM, "--test"], {
    cwd: bed.home,
  });
  await until("the run has ended", () => existsSync(join(bed.home, "code")));
  assert.equal(Deno.readTextFileSync(join(bed.home, "code")), "0\n");
  assert.ok(existsSync(join(bed.home, "delivered")));
});

Deno.test("--status is told in three ways, and a spoilt state on standard error alone", async () => {
  await using bed = await bedOf("a.example.com\nb.example.com", `[default]\nupdate: ["false"]`);
  await bed.plant({ age: 91 });
  await bed.lematt("--test");
  const table = await bed.lematt("--test", "--status", "--offline");
  assert.equal(table.code, 1);
  assert.match(
    table.stdout,
    /^CERTIFICATE .*\na\.example\.com .* ec {2}########## +\d+ d {2}\d{4}-\d\d-\d\d by expiry\n/,
  );
  assert.match(
    table.stdout,
    /^OWED BY .*\n\[default\] .*\n {2}Cannot run "false": exit status 1\n\n1 thing needs a person\n$/m,
  );
  assert.equal(JSON.parse((await bed.lematt("--test", "--status", "--json")).stdout).troubles, 1);
  assert.match(
    (await bed.lematt("--test", "--status", "--metrics")).stdout,
    /^lematt_troubles\{mode="test"\} 1$/m,
  );

  Deno.writeTextFileSync(bed.path("test", "state.json"), "{");
  for (const form of ["--json", "--metrics"]) {
    const { stdout, stderr } = await bed.lematt("--test", "--status", form);
    assert.match(stderr, /^lematt: cannot use test\/state\.json: not JSON\n$/);
    if (form === "--json") JSON.parse(stdout);
    else assert.doesNotMatch(stdout, /^(?!# (HELP|TYPE) |lematt_)./m);
  }
  assert.match(
    (await bed.lematt("--test", "--plan")).stdout,
    /^note {4}cannot use test\/state\.json: not JSON$/m,
  );
  assert.equal(bed.text("test", "state.json"), "{");
});

// ---- revocation ----------------------------------------------------------------------------------

Deno.test("--revoke asks before it revokes, unless --yes, and the next run replaces under a new key", async () => {
  await using bed = await bedOf("a.example.com");
  await bed.lematt("--test");
  const key = bed.text("test", "key", "a.example.com-key.prime256v1.test.pem");
  const revoked = () => bed.ca.issued.map((issued) => issued.revoked?.reason);

  const asked = await bed.lematt("--test", "--revoke", "A.example.com");
  assert.equal(asked.code, 2);
  assert.match(
    asked.stdout,
    /^These certificates of --test are to be revoked for good:\n {2}ec {2}[0-9a-f]{16}, until \d{4}-\d\d-\d\d, for a\.example\.com\n$/,
  );
  assert.equal(asked.stderr, "lematt: nothing was revoked; --yes revokes without asking\n");
  assert.deepEqual(revoked(), [undefined]);

  const unknown = await bed.lematt("--test", "--revoke", "b.example.com", "--yes");
  assert.deepEqual([unknown.code, unknown.stdout], [2, ""]);
  assert.match(
    unknown.stderr,
    /^lematt: cannot tell what to revoke for "b\.example\.com": no line of domains has that name\n$/,
  );

  const done = await bed.lematt("--test", "--revoke", "a.example.com", "--reason", "superseded", "--yes");
  assert.deepEqual([done.code, done.stderr], [0, ""]);
  assert.match(done.stdout, /\nrevoked; the next run with --test replaces them under new keys\n$/);
  assert.deepEqual(revoked(), [4]);

  assert.match((await bed.lematt("--test")).stdout, /^issued .* \(revoked \d{4}-\d\d-\d\d\)$/m);
  assert.notEqual(bed.text("test", "key", "a.example.com-key.prime256v1.test.pem"), key);
  assert.deepEqual(revoked(), [4, undefined]);
});

// ---- at a terminal -------------------------------------------------------------------------------

const NEEDS_SCRIPT = { ignore: !existsSync("/usr/bin/script") };

/** Runs the program at a pseudo terminal on which `typed` is typed; returns what is to be seen there. */
async function atTerminal(
  bed: Bed,
  args: string,
  { typed = "", env = {} }: { typed?: string; env?: Record<string, string> } = {},
) {
  const command = `exec '${Deno.execPath()}' run -q -P=lematt '${PROGRAM}' ${args}`;
  const child = new Deno.Command("/usr/bin/script", {
    args: ["-qec", command, "/dev/null"],
    cwd: bed.home,
    env: { TERM: "xterm", SHELL: "/bin/sh", NO_COLOR: "", ...env },
    stdin: "piped",
    stdout: "piped",
    stderr: "null",
  }).spawn();
  let seen = "";
  const reading = child.stdout.pipeThrough(new TextDecoderStream()).pipeTo(
    new WritableStream({ write: (text) => void (seen += text) }),
  );
  const keyboard = child.stdin.getWriter();
  if (typed !== "") {
    await until("it asks", () => seen.includes("Revoke?"));
    await keyboard.write(new TextEncoder().encode(typed));
  }
  const [{ code }] = await Promise.all([child.status, reading]);
  await keyboard.close().catch(() => {});
  return { code, seen };
}

Deno.test(
  "at a terminal one line counts while certificates are made, and FAILED is red unless NO_COLOR",
  NEEDS_SCRIPT,
  async () => {
    await using bed = await testBed({
      domains: "a.example.com\nb.example.com\nbad.example.com",
      settings: "keyTypes: ec",
      ca: { reject: (name) => name === "bad.example.com" ? "not this one" : undefined },
    });
    const { seen, code } = await atTerminal(bed, "--test --parallel 1");
    assert.equal(code, 1);
    assert.ok(seen.includes("1 of 3 lines done, 0 in flight, 0 failed\r\x1b[K"), seen);
    assert.ok(seen.includes("\x1b[31mFAILED\x1b[0m  bad.example.com"), seen);
    assert.doesNotMatch(
      seen.split("\r\n").map((line) => line.split("\r\x1b[K").at(-1)).join("\n"),
      /in flight/,
    );

    const plain = await atTerminal(bed, "--test --retry", { env: { NO_COLOR: "1" } });
    assert.ok(plain.seen.includes("FAILED  bad.example.com"));
    assert.ok(!plain.seen.includes("\x1b[31m"));
  },
);

Deno.test("at a terminal --revoke takes yes for yes and anything else for no", NEEDS_SCRIPT, async () => {
  await using bed = await bedOf("a.example.com");
  await bed.lematt("--test");
  assert.equal((await atTerminal(bed, "--test --revoke a.example.com", { typed: "n\n" })).code, 2);
  assert.equal(bed.ca.issued[0]!.revoked, undefined);
  assert.equal((await atTerminal(bed, "--test --revoke a.example.com", { typed: "y\n" })).code, 0);
  assert.equal(bed.ca.issued[0]!.revoked!.reason, 0);
});

// ---- two at once, and the end of one -------------------------------------------------------------

Deno.test("a second run is turned away with exit status 3 while one is under way", async () => {
  await using bed = await bedOf(
    "a.example.com",
    `[default]\nupdate: ["echo $$ > HERE/started; read word < HERE/fifo"]`,
  );
  await output("mkfifo", [join(bed.home, "fifo")]);
  const first = bed.start("--test");
  await until("the first run delivers", () => existsSync(join(bed.home, "started")));
  for (
    const args of [["--test"], ["--test", "--cron"], ["--test", "--revoke", "a.example.com", "--yes"], [
      "--test",
      "--rollover",
    ]]
  ) {
    const { code, stderr } = await bed.lematt(...args);
    assert.equal(code, 3, args.join(" "));
    assert.equal(stderr, `lematt: another --test run is under way (it holds ${bed.path("test", ".lock")})\n`);
  }
  assert.equal((await bed.lematt("--test", "--plan")).code, 0);
  assert.equal((await bed.lematt("--test", "--status", "--offline")).code, 0);
  Deno.writeTextFileSync(join(bed.home, "fifo"), "go\n");
  assert.equal((await endOf(first)).code, 0);
  assert.equal((await bed.lematt("--test")).code, 0);
});

for (const signal of ["SIGTERM", "SIGINT", "SIGHUP"] as const) {
  Deno.test(`${signal} in the middle of a validation leaves nothing behind`, async () => {
    let hanging = true;
    const fault = () =>
      hanging && bed.ca.log.at(-1)?.resource === "order" ? { kind: "silence" } as const : undefined;
    await using bed = await bedOf(
      "a.example.com",
      `[default]\nprepare: ["echo $$ > HERE/prepare; exec cat"]\nupdate: ["touch HERE/delivered"]`,
      { settings: "preflight: no", fault },
    );
    const child = bed.start("--test");
    await until(
      "the order is polled",
      () => bed.ca.log.at(-1)?.resource === "order" && bed.dropped().length === 1,
    );
    await until("prepare is held", () => running(bed, "prepare"));
    child.kill(signal);
    const killed = performance.now();
    const { code, stderr } = await endOf(child);
    assert.ok(performance.now() - killed < 4000, "at once");
    assert.equal(code, 1);
    assert.match(stderr, /interrupted/);
    assert.doesNotMatch(stderr, /^ +at |Uncaught/m);
    assertClean(bed);
    assert.equal(running(bed, "prepare"), false);
    assert.equal(existsSync(join(bed.home, "delivered")), false);
    assert.deepEqual(stateOf(bed).failures, {}); // nobody's failure
    hanging = false;
    assert.equal((await bed.lematt("--test")).code, 0);
  });
}

Deno.test("SIGTERM ends commands of deliveries, and what they carried stays owed", async () => {
  let hanging = false;
  const fault = () =>
    hanging && bed.ca.log.at(-1)?.resource === "order" ? { kind: "silence" } as const : undefined;
  await using bed = await bedOf("a.example.com", `[default]\nuploadCerts: ["exit 1"]`, { fault });
  await bed.lematt("--test");
  await output("mkfifo", [join(bed.home, "fifo")]);
  hanging = true;
  bed.configure({
    domains: "a.example.com\nb.example.com",
    actions: `[default]\nuploadCerts: ["echo $$ > ${bed.home}/upload; exec cat < ${bed.home}/fifo"]`,
  });
  const child = bed.start("--test");
  await until(
    "it uploads and issues",
    () => running(bed, "upload") && bed.ca.log.at(-1)?.resource === "order",
  );
  child.kill("SIGTERM");
  const { code, stderr } = await endOf(child);
  assert.equal(code, 1);
  assert.doesNotMatch(stderr, /^ +at |Uncaught/m);
  assertClean(bed);
  assert.equal(running(bed, "upload"), false);
  assert.deepEqual(Object.keys(stateOf(bed).deliveries), ["default"]);
});

for (
  const [what, actions] of [
    [
      "before its key and certificate are carried",
      `uploadCerts: [KILL, "cp CERTS HERE/host/"]\nuploadKeys: ["cp KEYS HERE/host/"]`,
    ],
    [
      "between the certificate and the key",
      `uploadCerts: ["cp CERTS HERE/host/"]\nuploadKeys: [KILL, "cp KEYS HERE/host/"]`,
    ],
    [
      "before the service is reloaded",
      `uploadCerts: ["cp CERTS HERE/host/"]\nuploadKeys: ["cp KEYS HERE/host/"]\nupdate: [KILL]`,
    ],
  ] as const
) {
  Deno.test(`a run killed ${what} leaves it all to the next`, async () => {
    const kill = `"test -e HERE/killed || { touch HERE/killed; kill -9 $PPID; exit 1; }"`;
    await using bed = await bedOf("a.example.com", `[default]\n${actions.replace("KILL", kill)}`);
    await Deno.mkdir(join(bed.home, "host"));
    const killed = await bed.lematt("--test");
    assert.equal(killed.code, 128 + 9);
    assert.equal(bed.ca.issued.length, 1);

    const { code, stdout, stderr } = await bed.lematt("--test");
    assert.deepEqual([code, stderr], [0, ""]);
    assert.match(stdout, /^nothing due, 1 kept/m);
    assert.equal(bed.ca.issued.length, 1);
    const names = [
      "a.example.com-cert-combined.prime256v1.test.pem",
      "a.example.com-key.prime256v1.test.pem",
    ];
    assert.deepEqual(listing(join(bed.home, "host")), names);
    assert.equal(
      Deno.readTextFileSync(join(bed.home, "host", names[1]!)),
      bed.text("test", "key", names[1]!),
    );
    assert.deepEqual(stateOf(bed).owed, {});
    assertClean(bed);
  });
}

Deno.test("a run killed while it issues other lines leaves it to the next to deliver what was issued", async () => {
  let hanging = true;
  const orders = () => bed.ca.log.filter(({ resource }) => resource === "newOrder").length;
  const fault = () => hanging && orders() === 2 ? { kind: "silence" } as const : undefined;
  await using bed = await bedOf(
    "a.example.com\nb.example.com",
    `[default]\nupdate: ["echo DOMAINS_CN >> HERE/delivered"]`,
    { fault },
  );
  const child = bed.start("--test", "--parallel", "1");
  await until("the second line is being ordered", () => orders() === 2);
  child.kill("SIGKILL");
  await endOf(child);
  assert.deepEqual(listing(bed.path("test", "cert")), ["a.example.com-cert-combined.prime256v1.test.pem"]);
  hanging = false;
  bed.configure({ domains: "a.example.com" });
  const { code, stdout } = await bed.lematt("--test");
  assert.equal(code, 0);
  assert.match(stdout, /^nothing due, 1 kept/m);
  assert.equal(Deno.readTextFileSync(join(bed.home, "delivered")), "a.example.com\n");
});

Deno.test("the demo issues, delivers, and names the files that it made", async () => {
  const { code, stdout, stderr } = await output(Deno.execPath(), [
    "run",
    "-q",
    "--no-prompt",
    "-P=tests",
    join(ROOT, "tests", "demo.ts"),
  ], { cwd: ROOT });
  assert.deepEqual([code, stderr], [0, ""], stdout);
  for (
    const text of [
      "conf/test/key/mail.example.com-key.rsa2048.test.pem (0600)",
      "conf/test/cert/www.example.com-cert-combined.prime256v1.test.pem -> example.com_shop.example.com_www.example.com-cert-combined.prime256v1.test.pem",
      "4 issued, 0 kept",
      "nothing due, 4 kept",
      "found no fault with any request",
    ]
  ) assert.ok(stdout.includes(text), text);
});
