/**
 * Runs the commands of actions.conf in /bin/sh, each in its own process group, and shares `prepare` commands while they
 * are in use. Only this file imports zx, when there is a command to run.
 *
 * A command line is split at its placeholders, and zx inserts the values. These are host names, base64url, and paths
 * below a directory whose own path was checked. Any other value is a bug: it is refused.
 */

import { setTimeout as delay } from "node:timers/promises";
import type { ProcessPromise } from "zx";
import type { Config, Mode, Section } from "./config.ts";
import type { Context } from "./context.ts";
import { oneLine, ownLines } from "./names.ts";

/** Placeholder -> value. A list becomes several words. */
export type Values = Readonly<Record<string, string | readonly string[]>>;

export interface CommandOptions {
  /** LEMATT_MODE. */
  readonly mode: Mode;
  readonly timeoutSeconds: number;
  /** Ends the command when it aborts. */
  readonly signal?: AbortSignal;
  /** The default is /dev/null. */
  readonly stdin?: string;
  /** Called with the output of the command, safe to print. */
  readonly onOutput?: (text: string) => void;
}

/** How to run the commands of a section. */
export function optionsFor({ name }: Section, config: Config, context: Context): CommandOptions {
  return {
    mode: config.mode,
    timeoutSeconds: config.commandTimeoutSeconds,
    signal: context.signal,
    onOutput: (text: string) => context.onOutput?.(text, `[${name}]`),
  };
}

/** A command that succeeded; with the end of its output on both streams. */
export interface Outcome {
  readonly output: string;
  readonly seconds: number;
}

/** A command that could not be started, failed, was killed or timed out; with the end of its output on both streams. */
export class CommandError extends Error {
  override readonly name = "CommandError";
  constructor(readonly command: string, reason: string, readonly output: string) {
    const line = ownLines(command);
    // both ends, since the host of an upload is at the end
    const short = line.length > 200 ? `${line.slice(0, 100)} … ${line.slice(-100)}` : line;
    super(`cannot run ${JSON.stringify(short)}: ${reason}`);
  }
}

/** Longest command line or variable; Linux has 128 KiB for one string (MAX_ARG_STRLEN, execve(2)). */
const STRING_BYTES = 96 * 1024;
/** Characters kept of the output: the end, where errors are. */
const OUTPUT_LENGTH = 64 * 1024;
/** From TERM to KILL; ssh needs some time to close its connection. */
const TERM_SECONDS = 5;
/** How long to wait after KILL before giving up; processes of another user cannot be killed. */
const KILL_SECONDS = 0.5;
/** How long to read on after the shell has ended; a daemon that it started may keep its output open. */
const LINGER_MS = 500;
/** Longest delay of setTimeout; longer ones fire immediately. */
const LONGEST_DELAY_MS = 2 ** 31 - 1;

// ---- command lines -----------------------------------------------------------------------------------------------

/** Whole words, not after `$`, `{` or a backslash. */
const WORD = /(?<![\w$\\{])\w+/g;
/** A word outside quotes, or what is skipped: a string in quotes, text after a backslash. */
const PART = /(\\(?:\w+|.)|'[^']*'|"(?:\\.|[^"\\])*"|(?<![\w$\\{])\w+)/s;
/** Safe without quotes, even if the command passes it to another shell. */
const PLAIN = /^[\w./:@%+,-]+$/;
/** Safe in quotes: also wildcards, and the blanks and brackets of an alert's subject. */
const PLAIN_IN_QUOTES = /^[\w./:@%+,*[\] -]+$/;

/** A command line for zx: the pieces of its text, and the values between them. */
function split(template: string, values: Values): { pieces: string[]; words: Values[string][] } {
  /** A wildcard gets no quotes here: in "DOMAIN" they would become part of the text. */
  const inQuotes = (word: string) =>
    Object.hasOwn(values, word) ? [values[word]!].flat().map(checked).join(" ") : word;
  const pieces = [""];
  const words: Values[string][] = [];
  for (const [at, part] of template.split(PART).entries()) {
    if (at % 2 === 1 && Object.hasOwn(values, part)) {
      words.push(values[part]!);
      pieces.push("");
    } else {
      pieces.push(pieces.pop() + (/^['"]/.test(part) ? part.replace(WORD, inQuotes) : part));
    }
  }
  return { pieces, words };
}

/** The values whose placeholders are in a command line. */
function usedIn(template: string, values: Values): Values {
  const words = new Set<string>(template.match(WORD));
  return Object.fromEntries(Object.entries(values).filter(([name]) => words.has(name)));
}

/** One word as zx inserts it. */
function shellQuote(word: string): string {
  return PLAIN.test(word) ? word : `'${checked(word)}'`;
}

function checked(word: string): string {
  if (!PLAIN_IN_QUOTES.test(word)) throw new Error(`${JSON.stringify(word)} must not reach a command line`);
  return word;
}

/** Half of each list; a list of one is in both halves. */
function half(values: Values, which: "first" | "second"): Values {
  const halved = Object.entries(values).map(([name, value]) => {
    const middle = typeof value === "string" ? 0 : value.length >> 1;
    if (middle === 0) return [name, value];
    return [name, which === "first" ? value.slice(0, middle) : value.slice(middle)];
  });
  return Object.fromEntries(halved);
}

// ---- processes ---------------------------------------------------------------------------------------------------

/**
 * Put before a `prepare` command: a background process that reads the standard input and, when that closes because
 * lematt has ended, even by SIGKILL, ends the group. Otherwise the command could keep a port that the next run needs.
 */
const GUARD = "exec 3<&0; { cat <&3; kill 0; } >/dev/null 2>&1 & exec 3<&-; ";

/** For zx, so that it does not keep the output, which may be gigabytes. */
const NOTHING = Object.assign([] as string[], { push: () => 0 });

const killing = new AbortController();

/** Kills all commands with their process groups, and lets none start any more: for a second interrupt. */
export function killAll(): void {
  killing.abort(new DOMException("interrupted", "AbortError"));
}

/**
 * Prepares a command; several if the line or a variable would be too long for the system. Each of these has its own
 * part of every list, in the line and as LEMATT_<NAME> in the environment.
 */
async function make(
  template: string,
  values: Values,
  mode: Mode,
  stdin: { text?: string } | "open",
): Promise<ProcessPromise[]> {
  const { $ } = await import("zx");
  const { pieces, words } = split(template, values);
  const variables = Object.entries({ ...values, MODE: mode }).map(([name, value]) =>
    [`LEMATT_${name}`, [value].flat().join(" ")] as const
  );
  const input = stdin === "open" ? undefined : stdin.text;
  const command = $({
    halt: true,
    quote: shellQuote,
    // every option that a ZX_… variable could change is set here
    shell: "/bin/sh",
    prefix: stdin === "open" ? GUARD : "",
    postfix: "",
    detached: true, // its own session: one group that can be ended as a whole, and no terminal to ask at
    nothrow: true,
    timeout: 0,
    preferLocal: false,
    cwd: Deno.cwd(),
    env: { ...Deno.env.toObject(), ...Object.fromEntries(variables) },
    stdio: [stdin === "open" || input ? "pipe" : "ignore", "pipe", "pipe"],
    input,
    store: { stdout: NOTHING, stderr: NOTHING, stdall: NOTHING },
    log: () => {},
  })(pieces as unknown as TemplateStringsArray, ...words);
  if (command.output) throw command.output.cause; // thrown by shellQuote()

  const strings = [command.cmd, ...variables.map(([, value]) => value)];
  const isTooLong = strings.some((text) => Buffer.byteLength(text) > STRING_BYTES);
  if (!isTooLong || Object.values(values).every((value) => [value].flat().length < 2)) return [command];
  return [
    ...await make(template, half(values, "first"), mode, stdin),
    ...await make(template, half(values, "second"), mode, stdin),
  ];
}

/** A process group: a shell and its children. */
interface Group {
  /** Resolves when the shell has ended and its output has been read. */
  readonly ended: Promise<CommandError | undefined>;
  /** The end of its output so far; if it was shortened, from the beginning of a line. */
  output(): string;
  /** Ends the group; false if a process of another user goes on. */
  end(): Promise<boolean>;
}

/** With `keepsInput` its standard input stays open after the shell has ended, until the group is ended. */
function start(
  command: ProcessPromise,
  onOutput?: (text: string) => void,
  { keepsInput = false } = {},
): Group {
  let printed = "";
  const output = () => {
    const text = ownLines(printed.slice(-OUTPUT_LENGTH));
    return printed.length > OUTPUT_LENGTH ? `[…]\n${text.slice(text.indexOf("\n") + 1)}` : text;
  };
  const { child } = command.run();
  const ended = Promise.resolve(command).then(({ exitCode, signal, cause }) => {
    if (exitCode === 0 && !cause) return undefined;
    const meaning = exitCode === 127 ? " (command not found)" : exitCode === 126 ? " (not executable)" : "";
    const status = exitCode === null ? `ended by ${signal}` : `exit status ${exitCode}${meaning}`;
    const reason = cause instanceof Error ? oneLine(cause.message) : status;
    return new CommandError(command.cmd, reason, output());
  });
  if (child?.pid === undefined) return { ended, output, end: () => Promise.resolve(true) };

  const streams = [child.stdout!, child.stderr!];
  for (const stream of streams) {
    stream.setEncoding("utf8").on("data", (text: string) => {
      onOutput?.(ownLines(text));
      printed += text;
      if (printed.length > 16 * OUTPUT_LENGTH) printed = printed.slice(-OUTPUT_LENGTH - 1);
    });
  }
  const { stdin } = child;
  stdin?.on("error", () => {}); // EPIPE: a command need not read its input
  if (keepsInput) child.stdin = null; // or Deno closes it, and the guard ends what the shell has left behind
  child.once("exit", () => {
    const lingering = setTimeout(() => streams.forEach((stream) => stream.destroy()), LINGER_MS);
    ended.then(() => clearTimeout(lingering));
  });

  const group = -child.pid;
  const end = async () => {
    send(group, "SIGTERM"); // first: the guard sends SIGTERM when the input closes, and a second one could end the clean-up
    stdin?.destroy(); // processes of another user (sudo) get no signal, but notice this
    await waitUntil(async () => killing.signal.aborted || await isGone(group), TERM_SECONDS);
    send(group, "SIGKILL");
    await waitUntil(() => isGone(group), KILL_SECONDS);
    await waitUntil(() => command.output !== null, KILL_SECONDS);
    return send(group, 0) !== "EPERM";
  };
  return { ended, output, end };
}

/** Waits until a condition is true, at most so many seconds. */
async function waitUntil(condition: () => boolean | Promise<boolean>, seconds: number): Promise<void> {
  const deadline = performance.now() + seconds * 1000;
  for (let pause = 1; !await condition() && performance.now() < deadline; pause = Math.min(pause * 2, 100)) {
    await delay(pause);
  }
}

/**
 * Whether no process of a group runs. Zombies do not count: in a container process 1 may never reap them. A shell reads
 * proc(5), since Deno cannot.
 */
async function isGone(group: number): Promise<boolean> {
  if (send(group, 0) === "ESRCH") return true;
  const script = `cd /proc/self && ! cat /proc/[0-9]*/stat | grep -q ') [^ZX] [0-9]* ${-group} '`;
  const shell = new Deno.Command("/bin/sh", {
    args: ["-c", script],
    stdin: "null",
    stdout: "null",
    stderr: "null",
  });
  return (await shell.output()).success;
}

/** Sends a signal to a process group, given as its negative id; returns the error. */
function send(group: number, name: Deno.Signal | 0): "ESRCH" | "EPERM" | undefined {
  try {
    Deno.kill(group, name);
  } catch (error) {
    return error instanceof Deno.errors.NotFound ? "ESRCH" : "EPERM"; // the error has no code
  }
}

// ---- running -----------------------------------------------------------------------------------------------------

/**
 * Runs a command line with `/bin/sh -c` in the working directory, and waits for its end; a line that is too long runs
 * in several parts, one after the other, each with the whole time. A daemon that it starts is left alone.
 *
 * Throws CommandError unless it exits with 0 in time, and the signal's reason when that aborts.
 */
export async function runCommand(
  template: string,
  values: Values,
  options: CommandOptions,
): Promise<Outcome> {
  const begun = performance.now();
  const parts = template.trim() ? await make(template, values, options.mode, { text: options.stdin }) : [];
  let output = "";
  for (const part of parts) output += await runPart(part, options);
  return { output, seconds: (performance.now() - begun) / 1000 };
}

async function runPart(
  command: ProcessPromise,
  { timeoutSeconds, signal, onOutput }: CommandOptions,
): Promise<string> {
  const interrupt = AbortSignal.any(signal ? [signal, killing.signal] : [killing.signal]);
  interrupt.throwIfAborted();
  const { ended, output, end } = start(command, onOutput);
  const { promise: stopped, resolve } = Promise.withResolvers<"stopped">();
  const stop = () => resolve("stopped");
  const timer = setTimeout(stop, Math.min(timeoutSeconds * 1000, LONGEST_DELAY_MS));
  interrupt.addEventListener("abort", stop);
  try {
    const ending = await Promise.race([ended, stopped]);
    if (ending === undefined) return output();
    if (ending !== "stopped") throw ending;
    const reason = `timed out after ${timeoutSeconds} s${await end() ? "" : ", and could not be killed"}`;
    interrupt.throwIfAborted();
    throw new CommandError(command.cmd, reason, output());
  } finally {
    clearTimeout(timer);
    interrupt.removeEventListener("abort", stop);
  }
}

/** A `prepare` command in use, until disposed of. */
export interface Running extends AsyncDisposable {
  /** Aborts with a CommandError if the command fails while it is in use. */
  readonly failed: AbortSignal;
}

interface Shared {
  users: number;
  readonly group: Group;
  readonly failed: AbortController;
  stopped?: Promise<unknown>;
}

/**
 * The `prepare` commands in use. Identical command lines share one process group, from the first user to the last; its
 * environment has only the values in the line, since other lines of `domains` use it, too. Its standard input is a pipe
 * that is never written. A command that exits with 0 has done its work (such as opening a port of a firewall). Any
 * other early end is a failure: it is reported once, and the next user starts the command again.
 */
export class PrepareCommands implements AsyncDisposable {
  readonly #shared = new Map<string, Shared>();

  constructor(private readonly context: Pick<Context, "warn" | "onOutput">) {}

  /** Resolves when the command has been started; the self-check of the challenge shows whether it works. */
  async start(template: string, values: Values, mode: Mode): Promise<Running> {
    const [command] = await make(template, usedIn(template, values), mode, "open");
    const line = command!.cmd;
    while (this.#shared.get(line)?.stopped) await this.#shared.get(line)!.stopped; // its port may be needed
    const shared = this.#shared.get(line) ?? this.#start(line, command!);
    shared.users++;
    const stack = new AsyncDisposableStack();
    stack.defer(async () => {
      if (--shared.users === 0) await this.#stop(line, shared);
    });
    return { failed: shared.failed.signal, [Symbol.asyncDispose]: () => stack.disposeAsync() };
  }

  async [Symbol.asyncDispose]() {
    await Promise.all([...this.#shared].map(([line, shared]) => this.#stop(line, shared)));
  }

  #start(line: string, command: ProcessPromise): Shared {
    killing.signal.throwIfAborted();
    const group = start(command, (text) => this.context.onOutput?.(text, "prepare"), { keepsInput: true });
    const shared: Shared = { users: 0, group, failed: new AbortController() };
    this.#shared.set(line, shared);
    group.ended.then((error) => {
      if (error === undefined || shared.stopped) return;
      const lastLine = oneLine(error.output.trimEnd().split("\n").at(-1)!);
      this.context.warn(`prepare: ${error.message}${lastLine && `: ${lastLine}`}`);
      shared.failed.abort(error);
      this.#stop(line, shared); // processes that it has left behind
    });
    return shared;
  }

  #stop(line: string, shared: Shared): Promise<unknown> {
    return shared.stopped ??= shared.group.end().finally(() => this.#shared.delete(line));
  }
}
