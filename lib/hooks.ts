/**
 * Runs the commands of actions.conf by /bin/sh, each in a process group of its own, and shares `prepare` commands while
 * they are in use. Alone imports zx, and only when there is a command to run.
 *
 * A command line is split at its placeholders, and zx puts in the values. They are harmless by construction: host names,
 * base64url, and paths below a directory whose own path was checked. Any other value is a bug and reaches no line.
 */

import { Buffer } from "node:buffer";
import { setTimeout as delay } from "node:timers/promises";
import type { ProcessPromise } from "zx";
import type { Mode } from "./config.ts";
import { oneLine, ownLines } from "./names.ts";

/** Placeholder -> what it stands for. A list becomes words. */
export type Values = Readonly<Record<string, string | readonly string[]>>;

export interface CommandOptions {
  /** Becomes LEMATT_MODE. */
  readonly mode: Mode;
  readonly timeoutSeconds: number;
  /** Ends the command when it aborts. */
  readonly signal?: AbortSignal;
  /** Its standard input; without it /dev/null. */
  readonly stdin?: string;
  /** Gets what the command prints, as it comes, made safe to show. */
  readonly onOutput?: (text: string) => void;
}

/** A command that succeeded. */
export interface Outcome {
  /** The line as it was run; of several parts the first. */
  readonly command: string;
  /** The end of what it printed on both streams. */
  readonly output: string;
  readonly seconds: number;
}

/** A command that could not be started, failed, was killed or ran out of time. */
export class CommandError extends Error {
  override readonly name = "CommandError";
  /** null: it did not start, ran out of time, or was ended by `signal`. */
  readonly exitCode: number | null;
  readonly signal?: string;
  readonly timedOut: boolean;
  /** The end of what it printed on both streams. */
  readonly output: string;

  constructor(
    readonly command: string,
    reason: string,
    ending: { exitCode?: number | null; signal?: string | null; timedOut?: boolean; output?: string } = {},
  ) {
    const line = ownLines(command);
    // both ends: the host that an upload is for stands last
    const short = line.length > 200 ? `${line.slice(0, 100)} … ${line.slice(-100)}` : line;
    super(`cannot run ${JSON.stringify(short)}: ${reason}`);
    this.exitCode = ending.exitCode ?? null;
    this.signal = ending.signal ?? undefined;
    this.timedOut = ending.timedOut ?? false;
    this.output = ending.output ?? "";
  }
}

/** Longest command line, and longest variable: Linux takes 128 KiB in one string (MAX_ARG_STRLEN, execve(2)). */
const STRING_BYTES = 96 * 1024;
/** How much is kept of what a command prints, in characters: the end, where errors stand. */
const OUTPUT_LENGTH = 64 * 1024;
/** From TERM to KILL: enough for ssh to close its connection. */
const TERM_SECONDS = 5;
/** How long to wait after KILL before giving up on what runs as another user. */
const KILL_SECONDS = 0.5;
/** How long to read on when the shell has ended: a daemon that it started may hold its output open for good. */
const LINGER_MS = 500;
/** Longest delay of setTimeout; anything beyond fires at once. */
const LONGEST_DELAY_MS = 2 ** 31 - 1;

// ---- command lines -----------------------------------------------------------------------------------------------

/** Whole words. Behind `$`, `{` or a backslash they are the shell's. */
const WORD = /(?<![\w$\\{])\w+/g;
/** A word outside quotes, or what is passed over to find it: a string in quotes, what is behind a backslash. */
const PART = /(\\(?:\w+|.)|'[^']*'|"(?:\\.|[^"\\])*"|(?<![\w$\\{])\w+)/s;
/** Means itself everywhere in a command line, even in one that this line hands to another shell. */
const PLAIN = /^[\w./:@%+,-]+$/;
/** Means itself in quotes: wildcards, and the blanks and brackets of an alert's subject. */
const PLAIN_IN_QUOTES = /^[\w./:@%+,*[\] -]+$/;

/** A command line as zx takes it: the pieces of its text, and the values that stand between them. */
function split(template: string, values: Values): { pieces: string[]; words: Values[string][] } {
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

  /** No quotes for a wildcard here: they would show, since most of what is in quotes is data, as in "DOMAIN". */
  function inQuotes(word: string): string {
    return Object.hasOwn(values, word) ? [values[word]!].flat().map(checked).join(" ") : word;
  }
}

/** The values whose placeholders are in a command line. */
function usedIn(template: string, values: Values): Values {
  const words = new Set<string>(template.match(WORD));
  return Object.fromEntries(Object.entries(values).filter(([name]) => words.has(name)));
}

/** What zx puts in for one word. */
function quote(word: string): string {
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
 * Goes before a `prepare` command: ends its group when its standard input closes, that is, when we are gone, however that
 * came about. A command that does not look at its input would keep its port, and the next run could not have it.
 */
const GUARD = "exec 3<&0; { cat <&3; kill 0; } >/dev/null 2>&1 & exec 3<&-; ";

/** What zx would keep of the output, which may be gigabytes. */
const NOTHING = Object.assign([] as string[], { push: () => 0 });

/** Aborts when nothing may run any longer. */
const killing = new AbortController();

/** Kills all commands at once, with their process groups, and has none start any more: for a second interrupt. */
export function killAll(): void {
  killing.abort(new DOMException("interrupted", "AbortError"));
}

/**
 * Makes a command, to be run later; several where the line or a variable would be too long for the system. Each of these
 * has its own part of every list, in the line and as LEMATT_<NAME> in the environment.
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
    quote,
    // all that a ZX_… variable could change is set here
    shell: "/bin/sh",
    prefix: stdin === "open" ? GUARD : "",
    postfix: "",
    detached: true, // a session of its own: one group to be ended as a whole, and no terminal to ask at
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
  if (command.output) throw command.output.cause; // what quote() has thrown

  const strings = [command.cmd, ...variables.map(([, value]) => value)];
  const isTooLong = strings.some((text) => Buffer.byteLength(text) > STRING_BYTES);
  if (!isTooLong || Object.values(values).every((value) => [value].flat().length < 2)) return [command];
  return [
    ...await make(template, half(values, "first"), mode, stdin),
    ...await make(template, half(values, "second"), mode, stdin),
  ];
}

/** A process group: a shell that was started, and what it starts. */
interface Group {
  /** Settles when the shell has ended and its output has been read; with why it failed. */
  readonly ended: Promise<CommandError | undefined>;
  /** The end of what it has printed so far, whole lines only where something is missing. */
  output(): string;
  /** Ends all of it; false where something runs on, as another user. */
  end(): Promise<boolean>;
}

function start(command: ProcessPromise, onOutput?: (text: string) => void): Group {
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
    return new CommandError(command.cmd, reason, { exitCode, signal, output: output() });
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
  child.stdin?.on("error", () => {}); // EPIPE: a command need not read what it is given
  child.once("exit", () => {
    const lingering = setTimeout(() => streams.forEach((stream) => stream.destroy()), LINGER_MS);
    ended.then(() => clearTimeout(lingering));
  });

  const group = -child.pid;
  const end = async () => {
    child.stdin?.destroy(); // what runs as another user (sudo) gets no signal of ours, but sees this
    send(group, "SIGTERM");
    await within(TERM_SECONDS, async () => killing.signal.aborted || await isGone(group));
    send(group, "SIGKILL");
    await within(KILL_SECONDS, () => isGone(group));
    await within(KILL_SECONDS, () => command.output !== null);
    return send(group, 0) !== "EPERM";
  };
  return { ended, output, end };
}

/** Waits until `condition` holds, or so many seconds. */
async function within(seconds: number, condition: () => boolean | Promise<boolean>): Promise<void> {
  const deadline = performance.now() + seconds * 1000;
  for (let pause = 1; !await condition() && performance.now() < deadline; pause = Math.min(pause * 2, 100)) {
    await delay(pause);
  }
}

/**
 * Whether nothing of a group runs. It may be there for longer, as zombies, where process 1 reaps late or never (in a
 * container); proc(5) is asked through a shell because Deno opens nothing there.
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

/** Sends a signal to a process group, given as its negative id; why not where that fails. */
function send(group: number, name: Deno.Signal | 0): "ESRCH" | "EPERM" | undefined {
  try {
    Deno.kill(group, name);
  } catch (error) {
    return error instanceof Deno.errors.NotFound ? "ESRCH" : "EPERM"; // Deno's own error has no code
  }
}

// ---- running -----------------------------------------------------------------------------------------------------

/**
 * Runs a command line by `/bin/sh -c` in the directory where lematt was started, and waits for its end; where it would be
 * too long, in several parts one after the other, each with the whole time. A daemon that it leaves behind is left alone.
 *
 * @throws CommandError unless it exits with 0 in time; the signal's reason when that aborts
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
  return { command: parts[0]?.cmd ?? "", output, seconds: (performance.now() - begun) / 1000 };
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
    const reason = `timed out after ${timeoutSeconds} s${await end() ? "" : ", and could not be ended"}`;
    interrupt.throwIfAborted();
    throw new CommandError(command.cmd, reason, { timedOut: true, output: output() });
  } finally {
    clearTimeout(timer);
    interrupt.removeEventListener("abort", stop);
  }
}

/** A `prepare` command in use; to be disposed of when it is needed no longer. */
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
 * The `prepare` commands in use. Identical command lines are one process group, started for the first user and ended with
 * the last; its environment has only the values that are in the line, since it serves other lines of `domains`, too. Its
 * standard input is a pipe that is never written. A command that exits with 0 has done its work (opened a port of a
 * firewall, say); any other early end is a failure, of which `warn` hears once, and the next user starts it anew.
 */
export class PrepareCommands implements AsyncDisposable {
  readonly #shared = new Map<string, Shared>();

  constructor(
    private readonly warn: (text: string) => void,
    private readonly onOutput?: (text: string) => void,
  ) {}

  /** Resolves as soon as the command has been started: the self-check of the challenge shows whether it works. */
  async start(template: string, values: Values, mode: Mode): Promise<Running> {
    const [command] = await make(template, usedIn(template, values), mode, "open");
    const line = command!.cmd;
    while (this.#shared.get(line)?.stopped) await this.#shared.get(line)!.stopped; // whose port it may need
    const shared = this.#shared.get(line) ?? this.#start(line, command!);
    shared.users++;
    const stack = new AsyncDisposableStack();
    stack.defer(async () => {
      if (--shared.users === 0) await this.#stop(line, shared);
    });
    return { failed: shared.failed.signal, [Symbol.asyncDispose]: () => stack.disposeAsync() };
  }

  /** Ends all. */
  async [Symbol.asyncDispose]() {
    await Promise.all([...this.#shared].map(([line, shared]) => this.#stop(line, shared)));
  }

  #start(line: string, command: ProcessPromise): Shared {
    killing.signal.throwIfAborted();
    const group = start(command, this.onOutput);
    const shared: Shared = { users: 0, group, failed: new AbortController() };
    this.#shared.set(line, shared);
    group.ended.then((error) => {
      if (error === undefined || shared.stopped) return;
      const lastLine = oneLine(error.output.trimEnd().split("\n").at(-1)!);
      this.warn(`prepare: ${error.message}${lastLine && `: ${lastLine}`}`);
      shared.failed.abort(error);
      this.#stop(line, shared); // what it has started and left behind
    });
    return shared;
  }

  #stop(line: string, shared: Shared): Promise<unknown> {
    return shared.stopped ??= shared.group.end().finally(() => this.#shared.delete(line));
  }
}
