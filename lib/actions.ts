/**
 * Runs the commands of actions.conf and holds its `prepare` commands. Alone imports zx, and only when there
 * is a command to run: a run with nothing to do does not pay for it.
 *
 * It knows /bin/sh (POSIX XCU §2), processes and their groups. It does not know what a command is for, when
 * it is due or what its failure means, and it never prints. What it puts into a command line is quoted for
 * the place where it stands; what a command printed is cleaned of everything that could steer a terminal.
 */

import { Buffer } from "node:buffer";
import { setTimeout as delay } from "node:timers/promises";
import { ownLines } from "./text.ts";

/** Placeholder name -> what it stands for. A list becomes words with blanks between them. */
export type Values = Readonly<Record<string, string | readonly string[]>>;

/** A command line for /bin/sh, and the values that it finds in its environment as `LEMATT_<NAME>`. */
export interface CommandLine {
  readonly command: string;
  readonly values: Values;
}

export interface RunOptions {
  readonly timeoutSeconds: number;
  /** Its standard input; without it /dev/null. */
  readonly stdin?: string;
  /** Ends the command's process group when it aborts. */
  readonly signal?: AbortSignal;
}

/** A command that succeeded. */
export interface Outcome {
  readonly command: string;
  /** The end of what it printed on both streams, see OUTPUT_BYTES. */
  readonly output: string;
  readonly seconds: number;
}

/** A command that could not be started, failed, was killed or ran out of time. */
export class CommandError extends Error {
  override readonly name = "CommandError";
  readonly command: string;
  /** null: it did not start, was ended by `signal`, or its end was not seen. */
  readonly exitCode: number | null;
  readonly signal?: string;
  readonly timedOut: boolean;
  /** The end of what it printed on both streams, see OUTPUT_BYTES. */
  readonly output: string;

  constructor(command: string, reason: string, ending: Partial<Ending & { timedOut: boolean }> = {}) {
    super(`Cannot run ${JSON.stringify(abbreviated(ownLines(command)))}: ${reason}`);
    this.command = command;
    this.exitCode = ending.exitCode ?? null;
    this.signal = ending.signal;
    this.timedOut = ending.timedOut ?? false;
    this.output = ending.output ?? "";
  }
}

/** For one argument, and for all LEMATT_… together; Linux takes 128 KiB in one string (MAX_ARG_STRLEN). */
const LINE_BYTES = 96 * 1024;
/** How much is kept of what a command prints: the end, where errors stand. */
const OUTPUT_BYTES = 64 * 1024;
/** From TERM to KILL: enough for ssh to take leave, not enough for anyone to notice. */
const TERM_SECONDS = 5;
/** From KILL to looking no longer: what is then still there is another user's, or not ours to reap. */
const KILL_SECONDS = 0.5;
/** How long the output of a shell that has ended is read on; what holds it then is a daemon. */
const LINGER_MS = 500;
/** Longest delay of setTimeout; beyond it fires at once. */
const LONGEST_DELAY_MS = 2 ** 31 - 1;

// ---- command lines -------------------------------------------------------------------------------

/** A word that means itself in every place of a command line, and to the shells that the line may start. */
const ORDINARY = /^[\w./:@%+,-]+$/;

/**
 * The pieces of a command line. Runs of [A-Za-z0-9_] are taken whole, so that DOMAIN is not found in
 * DOMAINS_CN or LEMATT_DOMAIN; `$CERTS`, `${CERTS}` and `\CERTS` are the shell's and left alone.
 */
const PIECE = {
  outside: /\\[^]|\$\{\w+\}|\$\{\w*|\$[(']|\$[$\w]\w*|\w+|<<|(?<![^\s;&|()])#|[^]/y,
  '"': /\\[^]|\$\{\w+\}|\$\{\w*|\$\(|\$[$\w]\w*|\w+|[^]/y,
  "'": /\w+|[^]/y,
};

/**
 * The command with each placeholder of `values` replaced, in one pass: values are not searched for
 * placeholders.
 *
 * A value is quoted for the place where its placeholder stands: outside quotes each word stays one word,
 * within quotes it is the plain text (and a shell that the quoted text is meant for reads it as that). From
 * where it takes a whole shell to tell what is quoted and what is not (backquotes, `${x:-…}`, `$'…'`,
 * comments, here-documents, a `case` within `$(…)`), only values of ordinary characters can stand.
 *
 * @throws CommandError where another value stands there
 */
export function expand(command: string, values: Values): string {
  /** What is open at this point, innermost last: a quote, or "(" for a subshell or substitution. */
  const open: string[] = [];
  let unsure = false;
  let line = "";
  for (let at = 0; at < command.length;) {
    const place = open.at(-1);
    const pattern = place === "'" || place === '"' ? PIECE[place] : PIECE.outside;
    pattern.lastIndex = at;
    const piece = pattern.exec(command)![0]; // [^] matches, whatever comes
    at += piece.length;
    if (Object.hasOwn(values, piece)) {
      line += unsure ? ordinary(command, piece, values[piece]!) : quoted(values[piece]!, place);
      continue;
    }
    line += piece;
    if (place === "'") {
      if (piece === "'") open.pop();
    } else if (piece === '"') {
      place === '"' ? open.pop() : open.push(piece);
    } else if (piece === "$(") {
      open.push("(");
    } else if (piece === "`" || /^\$\{\w*$/.test(piece)) {
      unsure = true;
    } else if (place !== '"') {
      if (piece === "'" || piece === "(") open.push(piece);
      else if (piece === ")") open.pop();
      else if (piece === "$'" || piece === "<<" || piece === "#") unsure = true;
      else if (piece === "case" && place === "(") unsure = true; // its patterns end in an unpaired ")"
    }
  }
  return line;
}

function quoted(value: string | readonly string[], place: string | undefined): string {
  const words = [value].flat();
  if (place === "'") return words.join(" ").replaceAll("'", `'\\''`);
  if (place === '"') return words.join(" ").replace(/[\\"$`]/g, "\\$&");
  return words.map((word) => ORDINARY.test(word) ? word : `'${word.replaceAll("'", `'\\''`)}'`).join(" ");
}

function ordinary(command: string, name: string, value: string | readonly string[]): string {
  const words = [value].flat();
  const strange = words.find((word) => !ORDINARY.test(word));
  if (strange === undefined) return words.join(" ");
  throw new CommandError(command, `${name} cannot be quoted where it stands, use "$LEMATT_${name}" for it`);
}

/**
 * The command expanded, as several lines where one would be too long for the system: the longest list in it
 * is halved until each line fits, and each line has its own part of the list in its environment.
 *
 * @throws CommandError as expand()
 */
export function commandLines(command: string, values: Values): CommandLine[] {
  const line = { command: expand(command, values), values };
  if (Buffer.byteLength(line.command) <= LINE_BYTES) return [line];
  const sizes = Object.entries(values).flatMap(([name, value]) =>
    typeof value !== "string" && value.length > 1 && expand(command, { [name]: [] }) !== command
      ? [{ name, value, size: value.join(" ").length }]
      : []
  );
  if (sizes.length === 0) return [line]; // nothing to divide: the system will say that it is too long
  const { name, value } = sizes.reduce((longest, next) => next.size > longest.size ? next : longest);
  const half = value.length >> 1;
  return [value.slice(0, half), value.slice(half)]
    .flatMap((part) => commandLines(command, { ...values, [name]: part }));
}

/** Our environment and the values as LEMATT_…, those left out that would make it too large for the system. */
function environment(values: Values): Record<string, string> {
  const variables = Deno.env.toObject();
  let room = LINE_BYTES;
  for (const [name, value] of Object.entries(values)) {
    const text = [value].flat().join(" ");
    const size = Buffer.byteLength(text);
    if (size > room) continue;
    room -= size;
    variables[`LEMATT_${name}`] = text;
  }
  return variables;
}

// ---- processes -----------------------------------------------------------------------------------

/** How a command ended; neither exit code nor signal where its end was not seen. */
interface Ending {
  readonly exitCode: number | null;
  readonly signal?: string;
  readonly output: string;
  /** Why it did not start. */
  readonly fault?: string;
}

/** A shell that runs, as the leader of a process group (and session) of its own. */
interface Running {
  /** Settles when the shell is gone and its output has ended, at most LINGER_MS after the shell or end(). */
  readonly ended: Promise<Ending>;
  /** Ends the whole group. False: another user's process is left of it. */
  end(): Promise<boolean>;
}

/**
 * Ends the process group of a held command when its standard input closes, that is, when we are gone: an ssh whose other
 * end has not started yet would go on without us.
 */
const GUARD = "exec 3<&0\n{ cat <&3; kill 0; } >/dev/null 2>&1 &\nexec 3<&-\n";

/** Starts a command. Its standard input is a text, `open` and never written, or /dev/null. */
async function start(line: CommandLine, stdin: { text: string } | "open" | "none"): Promise<Running> {
  const { $ } = await import("zx");
  const printed = new Tail(OUTPUT_BYTES);
  const shell = $({
    // all that a ZX_… variable could change is set here
    shell: "/bin/sh",
    prefix: "",
    postfix: "",
    quote: (text) => text, // zx's own is bash's $'…'; expand() has quoted what needs it
    detached: true,
    nothrow: true,
    quiet: true,
    verbose: false,
    timeout: 0,
    preferLocal: false,
    cwd: Deno.cwd(),
    env: environment(line.values),
    stdio: [stdin === "none" ? "ignore" : "pipe", "pipe", "pipe"],
    input: typeof stdin === "object" ? stdin.text : undefined,
    store: { stdout: new Tail(0), stderr: new Tail(0), stdall: printed },
  })`${stdin === "open" ? GUARD + line.command : line.command}`;

  const ended = Promise.withResolvers<Ending>();
  const settle = (exitCode: number | null, signal?: string | null, fault?: string) =>
    ended.resolve({ exitCode, signal: signal ?? undefined, output: printed.text(), fault });
  shell.then(({ exitCode, signal, cause }) => {
    clearTimeout(lingering);
    settle(exitCode, signal, cause?.message);
  });

  let lingering: ReturnType<typeof setTimeout> | undefined;
  const { child } = shell;
  if (child?.pid === undefined) return { ended: ended.promise, end: () => Promise.resolve(true) };

  const group = -child.pid;
  let groupIsEmpty = false;
  const linger = () => {
    lingering ??= setTimeout(() => {
      child.stdout!.destroy();
      child.stderr!.destroy();
      child.unref();
      settle(child.exitCode, child.signalCode);
    }, LINGER_MS);
  };
  child.stdin?.on("error", () => {}); // EPIPE: a command need not read what it is given
  child.once("exit", () => {
    groupIsEmpty = !exists(group); // asked now, since the number of an empty group may be given away again
    linger();
  });
  return {
    ended: ended.promise,
    async end() {
      child.stdin?.destroy(); // what runs as another user (sudo) gets no signal of ours, but sees this
      const gone = groupIsEmpty || await endGroup(group);
      linger();
      await ended.promise;
      return gone;
    },
  };
}

/** Ends a process group, given as its negative id, with TERM, then KILL; false where that is not allowed. */
async function endGroup(group: number): Promise<boolean> {
  for (const [signal, seconds] of [["SIGTERM", TERM_SECONDS], ["SIGKILL", KILL_SECONDS]] as const) {
    send(group, signal);
    // The end of a grandchild is reported to nobody, so it is asked for; most go at once
    const deadline = performance.now() + seconds * 1000;
    for (let pause = 2; exists(group) && performance.now() < deadline; pause = Math.min(pause * 2, 100)) {
      await delay(pause);
      if (pause > 10 && await hasEnded(group)) return true;
    }
    if (!exists(group)) return true;
  }
  return send(group, 0) !== "EPERM"; // what was killed and is still there waits for its parent to take notice
}

/**
 * Whether all of a group has ended, and only waits for process 1 to take notice, which it may do late (or never, in a
 * container). Asked of proc(5), through a shell: to us Deno opens nothing there. False where there is no such thing.
 */
async function hasEnded(group: number): Promise<boolean> {
  const { stdout } = await new Deno.Command("/bin/sh", {
    args: ["-c", "cat /proc/[0-9]*/stat"],
    stdin: "null",
    stderr: "null",
  }).output();
  const states = [...new TextDecoder().decode(stdout).matchAll(/\) (\S) \d+ (\d+) /g)]
    .filter(([, , of]) => Number(of) === -group).map(([, state]) => state);
  return states.length > 0 && states.every((state) => state === "Z");
}

function exists(group: number): boolean {
  return send(group, 0) !== "ESRCH";
}

/** Sends a signal to a process group; why not where that fails (Deno's own error has no code). */
function send(group: number, signal: Deno.Signal | 0): "ESRCH" | "EPERM" | undefined {
  try {
    Deno.kill(group, signal);
  } catch (error) {
    return error instanceof Deno.errors.NotFound ? "ESRCH" : "EPERM";
  }
}

/** The last chunks of a stream that hold `limit` bytes. An array, as zx wants what it pushes to. */
class Tail extends Array<string | Buffer> {
  #bytes = 0;
  #dropped = false;
  readonly #limit: number;

  constructor(limit: number) {
    super();
    this.#limit = limit;
  }

  override push(chunk: string | Buffer): number {
    super.push(chunk);
    this.#bytes += chunk.length;
    while (this.length > 0 && this.#bytes - this[0]!.length >= this.#limit) {
      this.#bytes -= this.shift()!.length;
      this.#dropped = true;
    }
    return this.length;
  }

  /** Whole lines only, where something was dropped. */
  text(): string {
    const bytes = Buffer.concat(Array.from(this, (chunk) => Buffer.from(chunk as string)));
    const cut = this.#dropped || bytes.length > this.#limit;
    const text = ownLines(bytes.subarray(-this.#limit).toString());
    return cut ? `[…]\n${text.slice(text.indexOf("\n") + 1)}` : text;
  }
}

function abbreviated(command: string): string {
  return command.length > 200 ? `${command.slice(0, 200)}…` : command;
}

// ---- running and holding -------------------------------------------------------------------------

/**
 * Runs a command line by `/bin/sh -c` in the directory where lematt was started, and waits for its end. A
 * time-out or an abort ends its whole process group; a daemon that it leaves behind is left alone. The values
 * are in its environment as LEMATT_<NAME>, lists with blanks between their words, as far as the system has
 * room.
 *
 * @throws CommandError unless it exits with 0 in time; the signal's reason when that aborts
 */
export async function runCommand(line: CommandLine, options: RunOptions): Promise<Outcome> {
  const { timeoutSeconds, stdin, signal } = options;
  signal?.throwIfAborted();
  const begun = performance.now();
  const running = await start(line, stdin ? { text: stdin } : "none");

  const cut = Promise.withResolvers<"time-out" | "abort">();
  const abort = () => cut.resolve("abort");
  const timer = setTimeout(() => cut.resolve("time-out"), Math.min(timeoutSeconds * 1000, LONGEST_DELAY_MS));
  signal?.addEventListener("abort", abort);
  if (signal?.aborted) abort();
  try {
    const cause = await Promise.race([running.ended, cut.promise]);
    if (typeof cause === "string") {
      const gone = await running.end();
      if (cause === "abort") throw signal!.reason;
      const reason = `timed out after ${timeoutSeconds} s${gone ? "" : ", and could not be ended"}`;
      throw new CommandError(line.command, reason, { ...await running.ended, timedOut: true });
    }
    const reason = failure(cause);
    if (reason) throw new CommandError(line.command, reason, cause);
    return { command: line.command, output: cause.output, seconds: (performance.now() - begun) / 1000 };
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", abort);
  }
}

/** Why an ending is a failure, or undefined for success. */
function failure({ exitCode, signal, fault }: Ending): string | undefined {
  if (fault !== undefined) return ownLines(fault);
  if (exitCode === null) return `ended by ${signal}`;
  if (exitCode === 0) return undefined;
  const meaning = exitCode === 127 ? " (command not found)" : exitCode === 126 ? " (not executable)" : "";
  return `exit status ${exitCode}${meaning}`;
}

/** A prepare command in use; to be disposed of when it is no longer needed. */
export interface Held extends AsyncDisposable {
  /** Rejects with a CommandError if the command fails while it is held; for races, may be left unheard. */
  readonly failed: Promise<never>;
}

interface Shared {
  users: number;
  readonly running: Promise<Running>;
  readonly failed: Promise<never>;
  stopped?: Promise<boolean>;
}

/**
 * The `prepare` commands in use. Identical command lines are one process group, started for the first user
 * and ended with the last; LEMATT_… is the first user's. Their standard input is a pipe that is never
 * written: it closes when we are gone, however that came about. One that exits with 0 has done its work
 * (opened a port of a firewall, say); any other early end is a failure, and the next user starts it anew.
 */
export class PrepareCommands implements AsyncDisposable {
  readonly #shared = new Map<string, Shared>();

  /**
   * Resolves as soon as the command has been started: whether it does what it should, the preflight shows.
   *
   * @throws CommandError as expand()
   */
  async hold(command: string, values: Values): Promise<Held> {
    const line = { command: expand(command, values), values };
    let shared = this.#shared.get(line.command);
    while (shared?.stopped) { // its successor may need the same port
      await shared.stopped;
      shared = this.#shared.get(line.command);
    }
    shared ??= this.#start(line);
    shared.users++;
    await shared.running;

    const held = shared;
    let disposed = false;
    return {
      failed: held.failed,
      [Symbol.asyncDispose]: async () => {
        if (!disposed) held.users--;
        disposed = true;
        if (held.users === 0) await this.#stop(line.command, held);
      },
    };
  }

  /** Stops all. */
  async [Symbol.asyncDispose]() {
    await Promise.all([...this.#shared].map(([command, shared]) => this.#stop(command, shared)));
  }

  #start(line: CommandLine): Shared {
    const failed = Promise.withResolvers<never>();
    failed.promise.catch(() => {});
    const shared: Shared = { users: 0, running: start(line, "open"), failed: failed.promise };
    this.#shared.set(line.command, shared);
    shared.running.then(({ ended }) => ended).then((ending) => {
      const reason = shared.stopped ? undefined : failure(ending);
      if (!reason) return;
      failed.reject(new CommandError(line.command, reason, ending));
      this.#stop(line.command, shared); // whatever it started and left behind
    });
    return shared;
  }

  #stop(command: string, shared: Shared): Promise<boolean> {
    return shared.stopped ??= shared.running.then((running) => running.end())
      .finally(() => this.#shared.delete(command));
  }
}
