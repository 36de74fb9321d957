// Goal: a hook runs its line with the placeholders replaced, and no process of it outlives its use. Every command here is a
// real /bin/sh with real children; tests wait for conditions, not for time to pass.

import assert from "node:assert/strict";
import process from "node:process";
import { CommandError, type CommandOptions, PrepareCommands, runCommand, type Values } from "../lib/hooks.ts";
import { all, testBed, until } from "./bed.ts";
import { isRunning, textOf } from "./faults.ts";
import { output } from "./programs.ts";
import { together } from "./together.ts";

async function run(template: string, values: Values = {}, options: Partial<CommandOptions> = {}) {
  return await runCommand(template, values, { mode: "test", timeoutSeconds: 20, ...options });
}

async function failureOf(promise: Promise<unknown>): Promise<CommandError> {
  const error = await promise.then(() => assert.fail("succeeded"), (error) => error);
  assert.ok(error instanceof CommandError, error);
  return error;
}

async function ended(...pids: number[]): Promise<void> {
  await until(`the end of ${pids}`, () => !pids.some(isRunning));
}

async function temporaryDirectory() {
  const path = await Deno.makeTempDir();
  return { path, log: `${path}/log`, [Symbol.asyncDispose]: () => Deno.remove(path, { recursive: true }) };
}

// ---- placeholders ------------------------------------------------------------------------------------------------

const VALUES = {
  DOMAIN: "example.com",
  DOMAINS_CN: ["a.example", "b.example"],
  DOMAINS_ALL: ["a.example", "*.b.example"],
  CERTS: ["/etc/ssl/a,b:c@d+e%f.pem", "/srv/DOMAIN.pem"],
  VALUE: "-x_DOMAIN",
  SUBJECT: "lematt: [web] is unreachable",
  NONE: [],
};

const PRINTED = {
  // only whole words are replaced, and none inside values
  "printf '<%s>' DOMAIN /etc/DOMAIN.pem:DOMAIN": "<example.com></etc/example.com.pem:example.com>",
  "echo DOMAINS_CN DOMAIN": "a.example b.example example.com\n",
  "echo XDOMAIN DOMAINS DOMAIN_ DOMAIN2": "XDOMAIN DOMAINS DOMAIN_ DOMAIN2\n",
  "printf '<%s>' CERTS VALUE": "</etc/ssl/a,b:c@d+e%f.pem></srv/DOMAIN.pem><-x_DOMAIN>",
  "printf '<%s>' a NONE b 'NONE'": "<a><b><>",
  "echo RECORD constructor toString": "RECORD constructor toString\n",
  // shell syntax is left to the shell
  'echo "$DOMAIN" ${DOMAIN-y} "$LEMATT_DOMAIN" "${LEMATT_CERTS#* }"': " y example.com /srv/DOMAIN.pem\n",
  "echo \\DOMAIN '\\DOMAIN' \\xDOMAIN \\$DOMAIN": "DOMAIN \\DOMAIN xDOMAIN $DOMAIN\n",
  // a wildcard is not expanded, in quotes or outside
  "printf '<%s>' DOMAINS_ALL": "<a.example><*.b.example>",
  "printf '<%s>' 'lematt: DOMAINS_ALL'": "<lematt: a.example *.b.example>",
  [`printf '<%s>' "it's \\"DOMAINS_ALL"`]: `<it's "a.example *.b.example>`,
  [`printf '<%s>' "it's" 'a"b' \\" \\' DOMAINS_ALL`]: `<it's><a"b><"><'><a.example><*.b.example>`,
  [`printf '<%s>' SUBJECT "SUBJECT"`]: "<lematt: [web] is unreachable><lematt: [web] is unreachable>",
  // also in nested commands, and on every line
  'echo `echo DOMAIN` "$(echo "DOMAIN")" ${x:-DOMAIN}': "example.com example.com example.com\n",
  "sh -c 'for name in DOMAINS_CN; do echo $name; done'": "a.example\nb.example\n",
  [`cd /; sh -c "printf '<%s>' DOMAINS_ALL"`]: "<a.example><*.b.example>",
  "echo DOMAIN\necho 'DOMAIN\nDOMAIN'": "example.com\nexample.com\nexample.com\n",
};
Deno.test("runCommand() replaces placeholders, and leaves shell syntax to the shell", async () => {
  await using directory = await temporaryDirectory();
  Deno.writeTextFileSync(`${directory.path}/w.b.example`, ""); // which "*.b.example" would match
  await all(
    Object.entries(PRINTED).map(async ([template, expected]) => {
      assert.equal((await run(`cd ${directory.path}; ${template}`, VALUES)).output, expected, template);
    }),
  );
});

Deno.test("an unsafe value is a bug, and reaches no command line", async () => {
  const values = ["", "a\nb", "a\tb", ..."$`'\"\\;|&<>(){}?^~#!=\u00a0ü"];
  for (const value of values) {
    for (const template of ["echo DOMAIN", "echo 'DOMAIN'", 'echo "DOMAIN"']) {
      for (const DOMAIN of [value, ["a", value]]) {
        await assert.rejects(run(template, { DOMAIN }), { name: "Error" });
      }
    }
  }
});

// ---- parts -------------------------------------------------------------------------------------------------------

Deno.test("4,000 paths are passed to a command in disjoint parts, up to the part that fails", async () => {
  const CERTS = Array.from({ length: 4000 }, (_, n) => `/etc/${"x".repeat(60)}/${n}.pem`);
  const KEYS = CERTS.map((path) => path.replace("etc", "key"));
  for (const words of ["CERTS", "$LEMATT_CERTS"]) {
    await using directory = await temporaryDirectory();
    const template = `printf '%s\\n' ${words} >> LOG.1; echo $LEMATT_KEYS >> LOG.2; echo x >> LOG.3`;
    await run(template.replaceAll("LOG", directory.log), { CERTS, KEYS, DOMAINS_CN: ["example.com"] });
    assert.deepEqual(textOf(`${directory.log}.1`).trimEnd().split("\n"), CERTS);
    assert.deepEqual(textOf(`${directory.log}.2`).trimEnd().split(/[ \n]/), KEYS);
    assert.equal(textOf(`${directory.log}.3`), "x\n".repeat(4));
  }
  const error = await failureOf(run("set CERTS; echo $1; exit 1", { CERTS }));
  assert.equal(error.output, `${CERTS[0]}\n`);
  assert.ok(error.command.length < 128 * 1024 && error.message.length < 300, error.message);
  const whole = await failureOf(run("echo DOMAIN", { DOMAIN: "x".repeat(200_000) })); // cannot be divided
  assert.match(whole.message, /Argument list too long/);
});

// ---- running -----------------------------------------------------------------------------------------------------

Deno.test("runCommand() returns the output of both streams, cleaned for a terminal", async () => {
  const shown: string[] = [];
  const { output, seconds } = await run(
    `printf 'a\\033[31mb\\007\\033]0;title\\007\\tc\\r\\n\\302\\233x'; echo end >&2`,
    {},
    { onOutput: (text) => shown.push(text) },
  );
  assert.equal(output, "ab\tc\nxend\n");
  assert.equal(shown.join(""), output);
  assert.ok(seconds > 0 && seconds < 20);
});

Deno.test("runCommand() runs /bin/sh with our environment, our directory and the values; an empty command is skipped", async () => {
  assert.equal((await run("false | cat; echo $UNSET_VARIABLE-; false; echo on")).output, "-\non\n");
  const { output } = await run(
    'echo "$PATH"; pwd; echo "$LEMATT_MODE $LEMATT_DOMAINS_CN $LEMATT_SUBJECT MODE"',
    VALUES,
  );
  const values = "test a.example b.example lematt: [web] is unreachable MODE";
  assert.equal(output, `${Deno.env.get("PATH")}\n${Deno.cwd()}\n${values}\n`);
  for (const nothing of ["", " \n"]) assert.equal((await run(nothing)).output, "");
});

Deno.test("runCommand() gives a command its standard input, or none; the command need not read it", async () => {
  assert.equal((await run("cat", {}, { stdin: "report\n" })).output, "report\n");
  assert.equal((await run("cat; readlink /proc/self/fd/0", {}, { stdin: "" })).output, "/dev/null\n");
  assert.equal((await run("echo done", {}, { stdin: "x".repeat(5_000_000) })).output, "done\n");
});

Deno.test("runCommand() reports how a command failed, with its output", async () => {
  const table: [command: string, reason: string, output: RegExp][] = [
    ["echo why >&2; exit 3", "exit status 3", /^why\n$/],
    ["no-such-command-here", "exit status 127 (command not found)", /not found/],
    ["/dev/null", "exit status 126 (not executable)", /denied/],
    ["echo 'open", "exit status 2", /[Uu]nterminated|EOF/],
    ["kill -9 $$", "ended by SIGKILL", /^$/],
    ["sleep 30 & kill -TERM 0", "ended by SIGTERM", /^$/],
    ["exec >&- 2>&-; exit 4", "exit status 4", /^$/],
  ];
  for (const [command, reason, output] of table) {
    const error = await failureOf(run(command));
    assert.ok(error.message.endsWith(`${JSON.stringify(command)}: ${reason}`), error.message);
    assert.match(error.output, output);
  }
});

Deno.test("runCommand() keeps only the end of long output, also of one long line", async () => {
  // in a process of its own, since test files that run at the same time share the memory of this one
  const code = `import { runCommand } from "${new URL("../lib/hooks.ts", import.meta.url)}";
    const before = Deno.memoryUsage().rss;
    const template = "echo first; yes abcdefg | head -c 600000000; echo last";
    const { output } = await runCommand(template, {}, { mode: "test", timeoutSeconds: 20 });
    console.log(JSON.stringify({ output, grown: Deno.memoryUsage().rss - before }));`;
  const child = await output([Deno.execPath(), "eval", "--no-check", code], {
    cwd: new URL("..", import.meta.url),
  });
  const { output: kept, grown } = JSON.parse(child.stdout);
  assert.ok(kept.length <= 64 * 1024 + 10);
  assert.match(kept, /^\[…\]\nabcdefg\n[^]*\nabcdefg\nlast\n$/);
  assert.ok(grown < 400e6, `${grown}`);
  const line = (await run("head -c 300000 /dev/zero | tr '\\0' x; printf end")).output;
  assert.match(line, /^\[…\]\nx+end$/);
  assert.ok(line.length <= 64 * 1024 + 10);
});

// ---- prepare -----------------------------------------------------------------------------------------------------

Deno.test("identical prepare commands share one process, which ends with its last user", async () => {
  await using directory = await temporaryDirectory();
  const { log } = directory;
  const command = `echo $$ DOMAIN $LEMATT_DOMAIN $LEMATT_MODE >> ${log}; exec sleep 60`;
  await using prepare = new PrepareCommands({ warn: assert.fail });
  const start = (name: string) => prepare.start(command, { DOMAIN: name }, "test");
  const [first, second] = await Promise.all([start("a.example"), start("a.example")]);
  const other = await start("b.example");
  await until("both commands run", () => textOf(log).split("\n").length === 3);
  const pids = ["a.example", "b.example"].map((name) =>
    Number(RegExp(`^(\\d+) ${name} ${name} test$`, "m").exec(textOf(log))![1])
  );
  const running = () => pids.map(isRunning);

  await first![Symbol.asyncDispose]();
  await first![Symbol.asyncDispose](); // disposing twice counts once
  assert.deepEqual(running(), [true, true]);
  await second![Symbol.asyncDispose]();
  assert.deepEqual(running(), [false, true]);
  await other[Symbol.asyncDispose]();
  assert.deepEqual(running(), [false, false]);

  const shared = `echo "\${LEMATT_DOMAIN-none}" > ${log}.shared; exec cat`; // no name of its own, as several may share it
  await prepare.start(shared, { DOMAIN: "a.example" }, "test");
  await until("it runs", () => textOf(`${log}.shared`) === "none\n");
});

Deno.test("a prepare command that dies fails for all its users, is reported once, and is started again for the next", async () => {
  await using directory = await temporaryDirectory();
  const { path, log } = directory;
  const command =
    `echo run >> ${log}; until test -e ${path}/go; do sleep 0.02; done; echo port taken >&2; exit 7`;
  const warnings: string[] = [];
  await using prepare = new PrepareCommands({ warn: (text) => warnings.push(text) });
  const start = () => prepare.start(command, {}, "test");
  const both = [await start(), await start()];
  await until("it runs", () => textOf(log) === "run\n");
  await Deno.writeTextFile(`${path}/go`, "");
  for (const { failed } of both) {
    await until("it has failed", () => failed.aborted);
    assert.ok(failed.reason instanceof CommandError);
    assert.equal(failed.reason.output, "port taken\n");
  }
  assert.equal(warnings.length, 1);
  assert.match(warnings[0]!, /"echo run .*": exit status 7: port taken$/);
  const { failed } = await start();
  await until("it has failed again", () => failed.aborted);
  assert.equal(textOf(log), "run\nrun\n");
});

const test = together("commands are ended", 9);

test("a command that ignores SIGTERM is killed, with all that it started", async () => {
  await using directory = await temporaryDirectory();
  const { log } = directory;
  const stubborn =
    `sh -c 'trap "" TERM; echo $$ >> ${log}; sleep 60' & sleep 60 & echo $! >> ${log}; echo began; wait`;
  await using prepare = new PrepareCommands({ warn: assert.fail });
  const running = await prepare.start(`true; ${stubborn}`, {}, "test");
  await until("the prepare command runs", () => textOf(log).split("\n").length === 3);
  const [error] = await Promise.all([
    failureOf(run(stubborn, {}, { timeoutSeconds: 0.5 })),
    running[Symbol.asyncDispose](),
  ]);
  assert.match(error.message, /: timed out after 0\.5 s$/);
  assert.equal(error.output, "began\n");
  const pids = textOf(log).trim().split("\n").map(Number);
  assert.equal(pids.length, 4);
  await ended(...pids);
});

test("a command has time to clean up after SIGTERM, even if its shell ends at once", async () => {
  await using directory = await temporaryDirectory();
  const { log } = directory;
  const inner =
    `sh -c 'trap "sleep 0.2; echo closed >> ${log}; exit" TERM; echo open >> ${log}; while :; do sleep 0.05; done' >/dev/null 2>&1`;
  for (const command of [inner, `${inner} & wait`]) {
    await failureOf(run(command, {}, { timeoutSeconds: 0.5 }));
    assert.equal(textOf(log), "open\nclosed\n");
    Deno.removeSync(log);
  }
});

test("runCommand() ends the group when its signal aborts, and throws the signal's reason", async () => {
  await using directory = await temporaryDirectory();
  const { log } = directory;
  const controller = new AbortController();
  const { signal } = controller;
  const running = run(`echo $$ > ${log}; exec sleep 60`, {}, { timeoutSeconds: 60, signal });
  await until("the command runs", () => textOf(log).endsWith("\n"));
  controller.abort(new Error("interrupted"));
  await assert.rejects(running, { message: "interrupted" });
  assert.equal(isRunning(Number(textOf(log))), false);
  await assert.rejects(run(`echo again > ${log}`, {}, { signal }), { message: "interrupted" });
  assert.notEqual(textOf(log), "again\n");
});

test("runCommand() does not wait for a daemon that keeps its output open, and does not end it", async () => {
  const { output, seconds } = await run("sleep 60 & echo $!");
  assert.ok(seconds < 5);
  assert.equal(isRunning(Number(output)), true);
  process.kill(Number(output));
});

test("a prepare command that is needed again while it ends is started again afterwards", async () => {
  await using directory = await temporaryDirectory();
  const { path, log } = directory;
  // It occupies the "port" until it has ended, and fails if the port is taken
  const command = `trap 'sleep 0.3; rmdir ${path}/port; exit' TERM; mkdir ${path}/port || exit 1
    echo up >> ${log}; while :; do sleep 0.05; done`;
  await using prepare = new PrepareCommands({ warn: assert.fail });
  const start = () => prepare.start(command, {}, "test");
  const first = await start();
  await until("it runs", () => textOf(log) === "up\n");
  const stopping = first[Symbol.asyncDispose]();
  await Promise.all([start(), start()]);
  await stopping;
  await until("it runs again", () => textOf(log) === "up\nup\n");
});

test("a prepare command that exits after its work, such as opening a port, keeps its children until its last user is done", async () => {
  await using directory = await temporaryDirectory();
  const { log } = directory;
  await using prepare = new PrepareCommands({ warn: assert.fail });
  const start = () => prepare.start(`(sleep 60 & echo $! >> ${log}); exit 0`, {}, "test");
  const first = await start();
  await until("it ran", () => textOf(log).endsWith("\n"));
  const second = await start();
  await first[Symbol.asyncDispose]();
  assert.equal(isRunning(Number(textOf(log))), true);
  await second[Symbol.asyncDispose]();
  await ended(Number(textOf(log)));
});

test("a second Ctrl-C ends a run whose clean-up command hangs", async () => {
  await using bed = await testBed({ domains: "example.com", settings: "keyTypes: ec" });
  const log = `${bed.home}/log`;
  const hang = JSON.stringify([`trap '' TERM; echo $$ >> ${log}; while :; do sleep 0.1; done`]);
  bed.act(`[default]\nchallenge: dns-01\ndnsPresent: ["exit 1"]\ndnsCleanup: ${hang}\n`);
  const child = bed.start("--test");
  await until("the clean-up command hangs", () => textOf(log).endsWith("\n"));
  for (const stream of [child.stdout, child.stderr]) stream.cancel();
  child.kill("SIGINT");
  child.kill("SIGTERM"); // two equal signals could be merged into one
  const begun = performance.now();
  assert.equal((await child.status).code, 1);
  assert.ok(performance.now() - begun < 9000);
  await ended(...textOf(log).trim().split("\n").map(Number));
});
