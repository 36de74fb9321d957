/** Goal: a hook runs its line with the placeholders replaced, and no process of it outlives its use. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import process from "node:process";
import { CommandError, type CommandOptions, PrepareCommands, runCommand, type Values } from "../lib/hooks.ts";
import { all, testBed, together, until } from "./bed.ts";
import { isRunning, textOf } from "./faults.ts";
import { temporaryDirectory } from "./programs.ts";

const run = (template: string, values: Values = {}, options: Partial<CommandOptions> = {}) =>
  runCommand(template, values, { mode: "test", timeoutSeconds: 60, ...options });

async function failureOf(promise: Promise<unknown>): Promise<CommandError> {
  const error = await promise.then(() => assert.fail("succeeded"), (error) => error);
  assert.ok(error instanceof CommandError, error);
  return error;
}

const linesOf = (path: string) => textOf(path).split("\n").slice(0, -1);
const running = (log: string) => linesOf(log).map(Number).filter(isRunning).length;

const VALUES = {
  DOMAIN: "example.com",
  DOMAINS_CN: ["a.example", "b.example"],
  DOMAINS_ALL: ["a.example", "*.b.example"],
  CERTS: ["/etc/ssl/a,b:c@d+e%f.pem", "/srv/DOMAIN.pem"],
  SUBJECT: "lematt: [web] is unreachable",
  NONE: [],
};
const PRINTED = {
  // only whole words are replaced, and none inside values
  "printf '<%s>' DOMAIN /etc/DOMAIN.pem:DOMAIN CERTS":
    "<example.com></etc/example.com.pem:example.com></etc/ssl/a,b:c@d+e%f.pem></srv/DOMAIN.pem>",
  "echo DOMAINS_CN XDOMAIN DOMAINS DOMAIN_ DOMAIN2": "a.example b.example XDOMAIN DOMAINS DOMAIN_ DOMAIN2\n",
  "printf '<%s>' a NONE b 'NONE' RECORD constructor": "<a><b><><RECORD><constructor>",
  // shell syntax is left to the shell
  'echo "$DOMAIN" ${DOMAIN-y} "$LEMATT_DOMAIN" "${LEMATT_CERTS#* }"': " y example.com /srv/DOMAIN.pem\n",
  "echo \\DOMAIN '\\DOMAIN' \\xDOMAIN \\$DOMAIN": "DOMAIN \\DOMAIN xDOMAIN $DOMAIN\n",
  // a wildcard is not expanded, in quotes or outside
  "printf '<%s>' DOMAINS_ALL 'lematt: DOMAINS_ALL'":
    "<a.example><*.b.example><lematt: a.example *.b.example>",
  [`printf '<%s>' "it's \\"DOMAINS_ALL" 'a"b' \\" \\' DOMAINS_ALL`]:
    `<it's "a.example *.b.example><a"b><"><'><a.example><*.b.example>`,
  // also in nested commands, and on every line
  'echo `echo DOMAIN` "$(echo "DOMAIN")" ${x:-DOMAIN}': "example.com example.com example.com\n",
  [`cd /; sh -c "for name in DOMAINS_ALL; do echo \\$name; done"`]: "a.example\n*.b.example\n",
  "echo DOMAIN\necho 'DOMAIN\nDOMAIN'": "example.com\nexample.com\nexample.com\n",
};
Deno.test("placeholders are replaced, and shell syntax is left to the shell", async () => {
  await using directory = await temporaryDirectory();
  Deno.writeTextFileSync(`${directory.path}/w.b.example`, ""); // which "*.b.example" would match
  await all(
    Object.entries(PRINTED).map(async ([template, expected]) => {
      assert.equal((await run(`cd ${directory.path}; ${template}`, VALUES)).output, expected, template);
    }),
  );
});

Deno.test("an unsafe value is a bug, and reaches no command line", async () => {
  for (const value of ["", "a\nb", ..."\t$`'\"\\;|&<>(){}?^~#!=\u00a0ü"]) {
    for (const template of ["echo DOMAIN", "echo 'DOMAIN'", 'echo "DOMAIN"']) {
      await assert.rejects(run(template, { DOMAIN: ["a", value] }), { name: "Error" });
    }
  }
});

Deno.test("4,000 paths are passed to a command in disjoint parts, up to the part that fails", async () => {
  const CERTS = Array.from({ length: 4000 }, (_, n) => `/etc/${"x".repeat(60)}/${n}.pem`);
  const KEYS = CERTS.map((path) => path.replace("etc", "key"));
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  const template =
    `printf '%s\\n' CERTS >> ${log}.1; printf '%s\\n' $LEMATT_KEYS >> ${log}.2; echo x >> ${log}.3`;
  await run(template, { CERTS, KEYS, DOMAINS_CN: ["example.com"] });
  assert.deepEqual(linesOf(`${log}.1`), CERTS);
  assert.deepEqual(linesOf(`${log}.2`), KEYS);
  assert.equal(linesOf(`${log}.3`).length, 4, "4,000 paths of 74 bytes in lines of 96 KiB");
  await run(`printf '%s\\n' $LEMATT_CERTS >> ${log}.4`, { CERTS });
  assert.deepEqual(linesOf(`${log}.4`), CERTS, "a variable alone is too long");
  const error = await failureOf(run("set CERTS; echo $1; exit 1", { CERTS }));
  assert.equal(error.output, `${CERTS[0]}\n`);
  assert.ok(error.command.length < 128 * 1024 && error.message.length < 300, error.message);
  const whole = await failureOf(run("echo DOMAIN", { DOMAIN: "x".repeat(200_000) })); // cannot be divided
  assert.match(whole.message, /Argument list too long/);
});

Deno.test("a command has our environment, our directory, the values and its input; the end of its output is kept, cleaned for a terminal", async () => {
  const variables = 'echo "$PATH"; pwd; echo "$LEMATT_MODE $LEMATT_DOMAINS_CN $LEMATT_SUBJECT MODE"';
  const values = "test a.example b.example lematt: [web] is unreachable MODE";
  const table: [command: string, output: string | RegExp, stdin?: string][] = [
    ["false | cat; echo $UNSET_VARIABLE-; false; echo on", "-\non\n"], // no options of a shell are set
    [variables, `${Deno.env.get("PATH")}\n${Deno.cwd()}\n${values}\n`],
    [" \n", ""],
    ["cat", "report\n", "report\n"],
    ["cat; readlink /proc/self/fd/0", "/dev/null\n", ""],
    ["echo done", "done\n", "x".repeat(5_000_000)], // which it does not read
    [`printf 'a\\033[31mb\\007\\033]0;title\\007\\tc\\r\\n\\302\\233x'`, "ab\tc\nx"],
    ["echo first; yes 2345678 | head -c 3000000; echo last", /^\[…\]\n(2345678\n){8190,8192}last\n$/],
    ["head -c 3000000 /dev/zero | tr '\\0' x; printf end", /^\[…\]\nx{65530,65536}end$/],
  ];
  for (const [command, expected, stdin] of table) {
    let shown = "";
    const { output } = await run(command, VALUES, { stdin, onOutput: (text) => shown += text });
    if (typeof expected === "string") assert.deepEqual([output, shown], [expected, expected], command);
    else assert.match(output, expected);
  }
});

Deno.test("a command that failed is reported with the reason and its output", async () => {
  const table: [command: string, reason: string, output: RegExp][] = [
    ["echo why >&2; exit 3", "exit status 3", /^why\n$/],
    ["no-such-command-here", "exit status 127 (command not found)", /not found/],
    ["/dev/null", "exit status 126 (not executable)", /denied/],
    ["sleep 30 & kill -TERM 0", "ended by SIGTERM", /^$/],
  ];
  for (const [command, reason, output] of table) {
    const error = await failureOf(run(command));
    assert.ok(error.message.endsWith(`${JSON.stringify(command)}: ${reason}`), error.message);
    assert.match(error.output, output);
  }
});

const test = together("commands are ended", 9);

test("a command that ignores SIGTERM is killed, with all that it started", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  const child = `sh -c 'trap "" TERM; echo $$ >> ${log}; sleep 60'`;
  const command = `${child} & sleep 60 & echo $! >> ${log}; echo began; wait`;
  const error = await failureOf(run(command, {}, { timeoutSeconds: 2 }));
  assert.match(error.message, /: timed out after 2 s$/);
  assert.deepEqual([error.output, linesOf(log).length], ["began\n", 2]);
  await until("both have ended", () => running(log) === 0);
});

test("when its signal aborts, a command has time to clean up, even if its shell ends at once; none starts afterwards", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  const trap = `trap "sleep 0.2; echo closed >> ${log}; exit" TERM`;
  const inner = `sh -c '${trap}; echo open >> ${log}; while :; do sleep 0.05; done' >/dev/null 2>&1`;
  for (const command of [inner, `${inner} & wait`]) {
    const stop = new AbortController();
    const { signal } = stop;
    const running = run(command, {}, { signal });
    await until("the command runs", () => textOf(log) === "open\n");
    stop.abort(new Error("interrupted"));
    await assert.rejects(running, { message: "interrupted" });
    await assert.rejects(run(`echo again >> ${log}`, {}, { signal }), { message: "interrupted" });
    assert.equal(textOf(log), "open\nclosed\n");
    Deno.removeSync(log);
  }
});

test("a daemon that keeps its output open is not waited for, and not ended", async () => {
  const { output, seconds } = await run("sleep 60 & echo $!");
  assert.ok(seconds < 30);
  assert.ok(isRunning(Number(output)));
  process.kill(Number(output));
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
  await until("the command has ended", () => running(log) === 0);
});

test("a prepare command, even one that goes on in the background, runs once for all lines as long as any needs it", async () => {
  await using directory = await temporaryDirectory();
  const [log, port] = [`${directory.path}/log`, `${directory.path}/port`];
  // it occupies the "port" until it has ended
  const command = `trap 'sleep 0.3; rmdir ${port}; exit' TERM; mkdir ${port} || exit 1
    echo "$LEMATT_MODE \${LEMATT_DOMAIN-no name}" >> ${log}; while :; do sleep 0.05; echo >> ${log}.ticks; done`;
  for (const template of [command, `{ ${command}; } >/dev/null 2>&1 & exit 0`]) {
    await using prepare = new PrepareCommands({ warn: assert.fail });
    const start = (name: string) => prepare.start(template, { DOMAIN: name }, "test");
    const [first, second] = await Promise.all(["a.example", "b.example"].map(start));
    await until("it runs", () => textOf(log) === "test no name\n");
    await first![Symbol.asyncDispose]();
    await first![Symbol.asyncDispose](); // counts once
    const ticks = linesOf(`${log}.ticks`).length;
    await until("it runs on", () => linesOf(`${log}.ticks`).length > ticks + 10);
    const stopping = second![Symbol.asyncDispose]();
    const third = await start("c.example");
    await stopping;
    await until("it runs again", () => textOf(log) === "test no name\ntest no name\n");
    await third[Symbol.asyncDispose]();
    assert.ok(!existsSync(port));
    Deno.removeSync(log);
  }
});

test("a prepare command that dies fails for all its users, is reported once, and is started again for the next", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  const warnings: string[] = [];
  await using prepare = new PrepareCommands({ warn: (text) => warnings.push(text) });
  const start = () => prepare.start(`echo run >> ${log}; echo port taken >&2; exit 7`, {}, "test");
  for (const { failed } of await Promise.all([start(), start()])) {
    await until("it has failed", () => failed.aborted);
    assert.equal((failed.reason as CommandError).output, "port taken\n");
  }
  assert.match(warnings.join(), /^prepare: [^,]*"echo run .*": exit status 7: port taken$/);
  const { failed } = await start();
  await until("it has failed again", () => failed.aborted);
  assert.equal(textOf(log), "run\nrun\n");
});
