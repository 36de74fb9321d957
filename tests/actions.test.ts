// Hook commands: every command here is a real /bin/sh with real children; nothing is slept for.

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import process from "node:process";
import {
  CommandError,
  commandLines,
  expand,
  PrepareCommands,
  runCommand,
  type Values,
} from "../lib/actions.ts";

/** What a shell makes of a command line that printf's its arguments: each between < and >. */
async function printed(command: string, shell = "/bin/sh"): Promise<string> {
  const { stdout, stderr } = await new Deno.Command(shell, { args: ["-c", command] }).output();
  return new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
}

async function run(
  command: string,
  options: { timeoutSeconds?: number; stdin?: string; values?: Values } = {},
) {
  return await runCommand({ command, values: options.values ?? {} }, { timeoutSeconds: 20, ...options });
}

async function failureOf(promise: Promise<unknown>): Promise<CommandError> {
  const error = await promise.then(() => assert.fail("succeeded"), (error) => error);
  assert.ok(error instanceof CommandError, error);
  return error;
}

/** Waits until `condition` holds, for 5 s at most. */
async function until(condition: () => boolean, what: string) {
  for (const deadline = Date.now() + 5000; !condition();) {
    assert.ok(Date.now() < deadline, `not within 5 s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

function text(path: string): string {
  try {
    return Deno.readTextFileSync(path);
  } catch {
    return "";
  }
}

async function temporaryDirectory() {
  const path = await Deno.makeTempDir();
  return { path, [Symbol.asyncDispose]: () => Deno.remove(path, { recursive: true }) };
}

// ---- expand() ------------------------------------------------------------------------------------

const VALUES = {
  DOMAIN: "example.com",
  DOMAINS_CN: ["a.example", "b.example"],
  DOMAINS_ALL: ["a.example", "*.b.example"],
  CERTS: ["/etc/ssl/a.pem", "/my files/b's.pem"],
  VALUE: 'it\'s $HOME `id` \\ "x"; *',
};

for (
  const [what, command, expanded] of [
    ["an ordinary value", "ssh DOMAIN reload", "ssh example.com reload"],
    ["a part of a word", "cp x /etc/DOMAIN.pem:DOMAIN", "cp x /etc/example.com.pem:example.com"],
    ["the longest name", "echo DOMAINS_CN DOMAIN", "echo a.example b.example example.com"],
    [
      "no part of an identifier",
      "echo XDOMAIN DOMAINS DOMAIN_ DOMAIN2",
      "echo XDOMAIN DOMAINS DOMAIN_ DOMAIN2",
    ],
    [
      "no variable of the shell",
      'echo $DOMAIN ${DOMAIN} "$LEMATT_DOMAIN"',
      'echo $DOMAIN ${DOMAIN} "$LEMATT_DOMAIN"',
    ],
    ["no name in ${…}", "echo ${DOMAIN:-x} $1DOMAIN", "echo ${DOMAIN:-x} $1DOMAIN"],
    ["nothing after a backslash", "echo \\DOMAIN", "echo \\DOMAIN"],
    ["no name without a value", "echo RECORD KEYS", "echo RECORD KEYS"],
    ["no name that every object has", "echo constructor toString", "echo constructor toString"],
    [
      "words of a list, each quoted if need be",
      "rsync CERTS h:/",
      "rsync /etc/ssl/a.pem '/my files/b'\\''s.pem' h:/",
    ],
    ["a wildcard, which is no glob", "echo DOMAINS_ALL", "echo a.example '*.b.example'"],
    [
      "a list within single quotes",
      "mail -s 'lematt: DOMAINS_CN' x",
      "mail -s 'lematt: a.example b.example' x",
    ],
    [
      "a wildcard within quotes",
      `echo "DOMAINS_ALL" 'DOMAINS_ALL'`,
      `echo "a.example *.b.example" 'a.example *.b.example'`,
    ],
    ["a value within double quotes", 'echo "<VALUE>"', 'echo "<it\'s \\$HOME \\`id\\` \\\\ \\"x\\"; *>"'],
    [
      "a value after a substitution",
      'echo "$(id -u) VALUE"',
      'echo "$(id -u) it\'s \\$HOME \\`id\\` \\\\ \\"x\\"; *"',
    ],
    ["a value within a subshell", "(echo DOMAINS_ALL)", "(echo a.example '*.b.example')"],
    [
      "ordinary values anywhere",
      "echo `echo DOMAIN` ${x:-DOMAIN} # DOMAIN",
      "echo `echo example.com` ${x:-example.com} # example.com",
    ],
    ["an empty list", "echo NONE.", "echo NONE."],
  ] as const
) {
  Deno.test(`expand() replaces ${what}`, () => assert.equal(expand(command, VALUES), expanded));
}

Deno.test("expand() makes one word of an empty value, and none of an empty list", () => {
  assert.equal(expand("echo DOMAIN x", { DOMAIN: "" }), "echo '' x");
  assert.equal(expand("echo CERTS x", { CERTS: [] }), "echo  x");
});

Deno.test("expand() does not look for placeholders in values", () => {
  assert.equal(expand("DOMAIN VALUE", { DOMAIN: "VALUE", VALUE: "DOMAIN" }), "VALUE DOMAIN");
});

for (
  const command of [
    "echo `echo VALUE`",
    'echo "`echo VALUE`"',
    "echo ${x:-VALUE}",
    'echo "${x:-VALUE}"',
    "echo $'a\\'VALUE'",
    "true # isn't VALUE",
    "cat <<EOF\nVALUE\nEOF",
    'echo "$(case x in x) echo VALUE;; esac)"',
  ]
) {
  Deno.test(`expand() refuses a value that cannot be quoted safely where it stands: ${command}`, () => {
    assert.throws(() => expand(command, VALUES), (error: Error) => {
      assert.ok(error instanceof CommandError);
      assert.match(error.message, /VALUE cannot be quoted where it stands, use "\$LEMATT_VALUE" for it$/);
      return true;
    });
  });
}

/** A small source of the same random numbers for the same seed (mulberry32). */
function random(seed: number) {
  return (below: number) => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

for (const shell of ["/bin/dash", "/bin/bash"]) {
  Deno.test({
    name: `expand() gives ${shell} exactly the value, wherever it stands and whatever it contains`,
    ignore: !existsSync(shell),
    async fn() {
      const seed = Date.now() % 1e9;
      const pick = random(seed);
      const characters = [
        ..."ab.*?[]{}~#=!%^&|;<>()'\"`$\\ \t\nä",
        "$(",
        "${",
        "$((",
        "DOMAIN",
        "$'",
        "\\\n",
        "--",
      ];
      const value = () => Array.from({ length: pick(9) }, () => characters[pick(characters.length)]).join("");
      /** A piece of a word, and what the shell must make of it for the value v. */
      const pieces: (readonly [string, (v: string) => string])[] = [
        ["=DOMAIN", (v) => `=${v}`],
        ["'DOMAIN'", (v) => v],
        ['"DOMAIN"', (v) => v],
        ["'a\\ DOMAIN-'", (v) => `a\\ ${v}-`],
        ['"a\\" DOMAIN $((1 + (2))) DOMAIN\\\\"', (v) => `a" ${v} 3 ${v}\\`],
        ["\\'.\\\"", () => "'.\""],
        ["/", () => "/"],
        ['"$(printf %s. DOMAIN)"', (v) => `${v}.`],
        [`"<$(printf %s. "DOMAIN" | (cat; printf ')'))DOMAIN>"`, (v) => `<${v}.)${v}>`],
        [`"$(printf %s. "$(printf %s. 'x'DOMAIN)'DOMAIN'")"`, (v) => `x${v}.'${v}'.`],
      ];
      const cases = Array.from({ length: 1000 }, () => {
        const word = Array.from({ length: 1 + pick(4) }, () => pieces[pick(pieces.length)]!);
        return {
          command: word.map(([text]) => text).join(""),
          make: word.map(([, make]) => make),
          value: value(),
        };
      });
      // One script for all; a value that breaks out of its case breaks those after it as well
      const script = cases.map(({ command, value }) =>
        `printf '<%s>\\0' ${expand(command, { DOMAIN: value })}\n`
      );
      const file = await Deno.makeTempFile();
      await Deno.writeTextFile(file, script.join(""));
      const { stdout, stderr } = await new Deno.Command(shell, { args: [file], cwd: "/" }).output();
      await Deno.remove(file);
      assert.equal(new TextDecoder().decode(stderr), "", `seed ${seed}`);
      const made = new TextDecoder().decode(stdout).split("\0");
      for (const [n, { make, value }] of cases.entries()) {
        assert.equal(made[n], `<${make.map((make) => make(value)).join("")}>`, `seed ${seed}: ${script[n]}`);
      }
    },
  });
}

Deno.test("expand() keeps injection attempts one word", async () => {
  for (
    const value of [
      "'; echo BAD; '",
      '"; echo BAD; "',
      "$(echo BAD)",
      "`echo BAD`",
      "x; echo BAD",
      "x\necho BAD",
      "* BAD",
      "&& echo BAD",
    ]
  ) {
    for (const command of ["printf '<%s>' DOMAIN", "printf '<%s>' 'DOMAIN'", `printf '<%s>' "DOMAIN"`]) {
      assert.equal(await printed(expand(command, { DOMAIN: value })), `<${value}>`);
    }
  }
});

// ---- commandLines() ------------------------------------------------------------------------------

Deno.test("commandLines() leaves a line alone that the system takes", () => {
  assert.deepEqual(commandLines("rsync CERTS h:/", { CERTS: ["a", "b"] }), [
    { command: "rsync a b h:/", values: { CERTS: ["a", "b"] } },
  ]);
});

Deno.test("commandLines() divides the longest list, and nothing is lost or said twice", async () => {
  const CERTS = Array.from({ length: 5000 }, (_, n) => `/etc/ssl/certificate ${n} ${"x".repeat(50)}.pem`);
  const values = { CERTS, DOMAIN: "example.com", UNUSED: CERTS.map((path) => path + path) };
  const lines = commandLines("printf '%s\\n' DOMAIN CERTS", values);
  assert.ok(lines.length > 3);
  const out: string[] = [];
  for (const line of lines) {
    assert.ok(line.command.length < 128 * 1024);
    const [first, ...rest] = (await printed(line.command)).trimEnd().split("\n");
    assert.equal(first, "example.com");
    assert.deepEqual(rest, line.values.CERTS);
    out.push(...rest);
  }
  assert.deepEqual(out, CERTS);
});

Deno.test("a line that cannot be divided fails with the system's reason", async () => {
  const [line, ...more] = commandLines("echo DOMAIN", { DOMAIN: "x".repeat(200_000) });
  assert.equal(more.length, 0);
  const error = await failureOf(runCommand(line!, { timeoutSeconds: 20 }));
  assert.match(error.message, /^Cannot run "echo x{195}…": .*Argument list too long/);
  assert.equal(error.exitCode, null);
});

// ---- runCommand() --------------------------------------------------------------------------------

Deno.test("runCommand() gives what was printed on both streams, cleaned for a terminal", async () => {
  const { output, seconds } = await run(
    `printf 'a\\033[31mb\\007\\033]0;title\\007\\tc\\r\\n\\302\\233x'; echo end >&2`,
  );
  assert.equal(output, "ab\tc\nxend\n");
  assert.ok(seconds > 0 && seconds < 20);
});

Deno.test("runCommand() is plain /bin/sh: no pipefail, no -u, no -e", async () => {
  assert.equal((await run("false | cat; echo $UNSET_VARIABLE-; false; echo on")).output, "-\non\n");
});

Deno.test("runCommand() passes our environment, directory and the values", async () => {
  const { output } = await run('echo "$PATH"; pwd; echo "$LEMATT_DOMAINS_CN/$LEMATT_VALUE"', {
    values: { DOMAINS_CN: ["a.example", "b.example"], VALUE: "it's `one`" },
  });
  assert.equal(output, `${Deno.env.get("PATH")}\n${Deno.cwd()}\na.example b.example/it's \`one\`\n`);
});

Deno.test("runCommand() leaves values out of the environment that are too large for it", async () => {
  const values = { CERTS: Array(20_000).fill("/etc/ssl/a.pem"), DOMAIN: "example.com" };
  assert.equal(
    (await run('echo "${LEMATT_CERTS-left out} $LEMATT_DOMAIN"', { values })).output,
    "left out example.com\n",
  );
});

Deno.test("runCommand() gives a command its standard input, or none", async () => {
  assert.equal((await run("cat", { stdin: "report\n" })).output, "report\n");
  assert.equal((await run("cat; readlink /proc/self/fd/0")).output, "/dev/null\n");
  assert.equal((await run("cat", { stdin: "" })).output, "");
});

Deno.test("runCommand() does not mind a command that leaves its input unread", async () => {
  assert.equal((await run("echo done", { stdin: "x".repeat(5_000_000) })).output, "done\n");
});

for (
  const [what, command, expected] of [
    ["exits with a status", "echo why >&2; exit 3", {
      exitCode: 3,
      signal: undefined,
      output: "why\n",
      reason: "exit status 3",
    }],
    ["is not there", "no-such-command-here", {
      exitCode: 127,
      signal: undefined,
      output: /not found/,
      reason: "exit status 127 (command not found)",
    }],
    ["is no program", "/dev/null", {
      exitCode: 126,
      signal: undefined,
      output: /denied/,
      reason: "exit status 126 (not executable)",
    }],
    ["is a syntax error", "echo 'open", {
      exitCode: 2,
      signal: undefined,
      output: /[Uu]nterminated|EOF/,
      reason: "exit status 2",
    }],
    ["kills itself", "kill -9 $$", {
      exitCode: null,
      signal: "SIGKILL",
      output: "",
      reason: "ended by SIGKILL",
    }],
    ["kills its group", "sleep 30 & kill -TERM 0", {
      exitCode: null,
      signal: "SIGTERM",
      output: "",
      reason: "ended by SIGTERM",
    }],
    ["closes its output and fails later", "exec >&- 2>&-; exit 4", {
      exitCode: 4,
      signal: undefined,
      output: "",
      reason: "exit status 4",
    }],
  ] as const
) {
  Deno.test(`runCommand() reports a command that ${what}`, async () => {
    const error = await failureOf(run(command));
    assert.equal(error.message, `Cannot run ${JSON.stringify(command)}: ${expected.reason}`);
    assert.equal(error.exitCode, expected.exitCode);
    assert.equal(error.signal, expected.signal);
    assert.equal(error.timedOut, false);
    if (typeof expected.output === "string") assert.equal(error.output, expected.output);
    else assert.match(error.output, expected.output);
  });
}

Deno.test("what ignores TERM is killed, with everything that it started", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  const stubborn =
    `sh -c 'trap "" TERM; echo $$ >> ${log}; sleep 60' & sleep 60 & echo $! >> ${log}; echo began; wait`;
  const begun = performance.now();

  await using prepare = new PrepareCommands();
  const held = await prepare.hold(`true; ${stubborn}`, {});
  await until(() => text(log).split("\n").length === 3, "the prepare command runs");
  const [error] = await Promise.all([
    failureOf(run(stubborn, { timeoutSeconds: 0.5 })),
    held[Symbol.asyncDispose](),
  ]);

  assert.equal(error.message, `Cannot run ${JSON.stringify(stubborn)}: timed out after 0.5 s`);
  assert.equal(error.timedOut, true);
  assert.equal(error.output, "began\n");
  const pids = text(log).trim().split("\n").map(Number);
  assert.equal(pids.length, 4);
  await until(() => !pids.some(isRunning), "all have ended");
  assert.ok(performance.now() - begun < 12_000);
});

Deno.test("runCommand() ends the group when its signal aborts, and throws the signal's reason", async () => {
  await using directory = await temporaryDirectory();
  const file = `${directory.path}/pid`;
  const controller = new AbortController();
  const running = runCommand({ command: `echo $$ > ${file}; exec sleep 60`, values: {} }, {
    timeoutSeconds: 60,
    signal: controller.signal,
  });
  await until(() => text(file).endsWith("\n"), "the command runs");
  controller.abort(new Error("interrupted"));
  await assert.rejects(running, { message: "interrupted" });
  await until(() => !isRunning(Number(text(file))), "it has ended");
  await assert.rejects(
    runCommand({ command: `echo again > ${file}`, values: {} }, {
      timeoutSeconds: 60,
      signal: controller.signal,
    }),
    { message: "interrupted" },
  );
  assert.notEqual(text(file), "again\n");
});

Deno.test("runCommand() reads a gigabyte, keeps its end and little memory", async () => {
  const before = Deno.memoryUsage().rss;
  const begun = performance.now();
  const { output } = await run("echo first; yes abcdefg | head -c 1000000000; echo last");
  assert.ok(output.length <= 64 * 1024 + 10);
  assert.match(output, /^\[…\]\nabcdefg\n/);
  assert.match(output, /\nabcdefg\nlast\n$/);
  assert.ok(performance.now() - begun < 15_000);
  assert.ok(Deno.memoryUsage().rss - before < 400e6);
});

Deno.test("runCommand() keeps the end of a long line", async () => {
  const { output } = await run("head -c 300000 /dev/zero | tr '\\0' x; printf end");
  assert.match(output, /^\[…\]\nx+end$/);
  assert.ok(output.length <= 64 * 1024 + 10);
});

Deno.test("runCommand() does not wait for a daemon that holds its output, and lets it live", async () => {
  const begun = performance.now();
  const { output } = await run("sleep 60 & echo $!");
  assert.ok(performance.now() - begun < 5000);
  assert.equal(isRunning(Number(output)), true);
  process.kill(Number(output));
});

// ---- PrepareCommands -----------------------------------------------------------------------------

Deno.test("identical prepare commands are one process, stopped with its last user", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  const command = `echo $$ >> ${log}; echo DOMAIN >> ${log}; exec sleep 60`;
  await using prepare = new PrepareCommands();
  const [first, second] = await Promise.all([1, 2].map(() => prepare.hold(command, { DOMAIN: "a.example" })));
  const other = await prepare.hold(command, { DOMAIN: "b.example" });
  await until(() => text(log).split("\n").length === 5, "both commands run");
  const pids = text(log).match(/^\d+$/gm)!.map(Number);
  const ofA = Number(/(\d+)\n(\d+\n)?a.example/.exec(text(log))![1]);
  const ofB = pids.find((pid) => pid !== ofA)!;

  await first![Symbol.asyncDispose]();
  await first![Symbol.asyncDispose](); // twice is once
  assert.deepEqual([isRunning(ofA), isRunning(ofB)], [true, true]);
  await second![Symbol.asyncDispose]();
  assert.deepEqual([isRunning(ofA), isRunning(ofB)], [false, true]);
  await other[Symbol.asyncDispose]();
  assert.equal(isRunning(ofB), false);
});

Deno.test("a prepare command that is wanted while it stops is started again after that", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  // It has the "port" until it has ended, and fails where the port is taken
  const command =
    `trap 'sleep 0.3; rmdir ${directory.path}/port; exit' TERM; mkdir ${directory.path}/port || exit 1
    echo up >> ${log}; while :; do sleep 0.05; done`;
  await using prepare = new PrepareCommands();
  const first = await prepare.hold(command, {});
  await until(() => text(log) === "up\n", "it runs");
  const stopping = first[Symbol.asyncDispose]();
  const [again, too] = await Promise.all([prepare.hold(command, {}), prepare.hold(command, {})]);
  await stopping;
  await until(() => text(log) === "up\nup\n", "it runs again");
  await again[Symbol.asyncDispose]();
  await too[Symbol.asyncDispose]();
  assert.equal(text(log), "up\nup\n");
});

Deno.test("a prepare command ends when lematt is killed, though it never looks at its input", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  const program = `
    import { PrepareCommands } from ${JSON.stringify(import.meta.resolve("../lib/actions.ts"))};
    await new PrepareCommands().hold("echo $$ > ${log}; sleep 1000", {});`;
  const file = `${directory.path}/holder.ts`;
  await Deno.writeTextFile(file, program);
  await using holder = new Deno.Command(Deno.execPath(), {
    args: [
      "run",
      "-q",
      "--no-prompt",
      "--config",
      new URL("../deno.json", import.meta.url).pathname,
      "-P=lematt",
      file,
    ],
  }).spawn();
  await until(() => text(log).endsWith("\n"), "it runs");
  const isAlive = () =>
    new Deno.Command("/bin/sh", { args: ["-c", `kill -0 ${text(log)}`] }).outputSync().success;
  assert(isAlive());
  holder.kill("SIGKILL");
  await until(() => !isAlive(), "it is gone");
});

Deno.test("a prepare command that dies tells all who hold it, and the next user starts it anew", async () => {
  await using directory = await temporaryDirectory();
  const go = `${directory.path}/go`;
  const log = `${directory.path}/log`;
  const command = `echo run >> ${log}; until test -e ${go}; do sleep 0.02; done; echo port taken >&2; exit 7`;
  await using prepare = new PrepareCommands();
  await using first = await prepare.hold(command, {});
  await using second = await prepare.hold(command, {});
  await until(() => text(log) === "run\n", "it runs");
  await Deno.writeTextFile(go, "");
  for (const held of [first, second]) {
    const error = await failureOf(held.failed);
    assert.equal(error.exitCode, 7);
    assert.equal(error.output, "port taken\n");
    assert.match(error.message, /: exit status 7$/);
  }
  await using third = await prepare.hold(command, {});
  await failureOf(third.failed);
  assert.equal(text(log), "run\nrun\n");
});

Deno.test("a prepare command that is done, like opening a port, is kept until its last user is done", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  await using prepare = new PrepareCommands();
  const command = `(sleep 60 & echo $! >> ${log}); exit 0`;
  const first = await prepare.hold(command, {});
  await until(() => text(log).endsWith("\n"), "it ran");
  const second = await prepare.hold(command, {});
  const failed = await Promise.race([first.failed, Promise.resolve("no")]);
  assert.equal(failed, "no");
  await first[Symbol.asyncDispose]();
  assert.equal(isRunning(Number(text(log))), true);
  await second[Symbol.asyncDispose]();
  await until(() => !isRunning(Number(text(log))), "what it left has ended");
});
