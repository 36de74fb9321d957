/** Programs as processes, started as their first lines say, and as installed; and commands out of documents. */

import { existsSync } from "node:fs";
import { delimiter, dirname, join } from "node:path";
import { within } from "../lib/context.ts";

/** Limit for a command that is run to its end. */
const LONGEST_MS = 300_000;

export const ROOT = join(import.meta.dirname!, "..");

/** The command in the first line of a program of this repository, with `more` flags. */
export function program(file: string, ...more: readonly string[]): readonly string[] {
  const path = join(ROOT, file);
  const flags = Deno.readTextFileSync(path).split("\n", 1)[0]!.replace(/^.* deno run /, "").split(" ");
  return [Deno.execPath(), "run", ...flags, ...more, path];
}

export const LEMATT = program("lematt.ts");
export const LEFORWARD = program("leforward.ts");

export function spawn([command, ...args]: readonly string[], options: Deno.CommandOptions = {}) {
  const piped = { stdin: "null", stdout: "piped", stderr: "piped" } as const;
  return new Deno.Command(command!, { ...piped, ...options, args }).spawn();
}

export type Ended = Awaited<ReturnType<typeof endOf>>;

/** Waits until a program whose output is piped has ended. */
export async function endOf(child: Deno.ChildProcess) {
  const ended = await child.output();
  const [stdout, stderr] = [ended.stdout, ended.stderr].map((bytes) => new TextDecoder().decode(bytes));
  return { code: ended.code, stdout: stdout!, stderr: stderr! };
}

export async function end(child: Deno.ChildProcess, signal: Deno.Signal = "SIGKILL"): Promise<void> {
  try {
    child.kill(signal);
  } catch {
    // it has ended already
  }
  await child.status;
}

/** Runs a command to its end, which must come within five minutes. */
export async function output(command: readonly string[], options?: Deno.CommandOptions): Promise<Ended> {
  const child = spawn(command, options);
  return await within(AbortSignal.timeout(LONGEST_MS), endOf(child)).catch(async (error) => {
    await end(child);
    throw new Error(`${command.join(" ")}: still running after ${LONGEST_MS / 1000} s`, { cause: error });
  });
}

/** Runs a command to its end and returns its standard output; throws if it fails. */
export async function run(...command: readonly string[]): Promise<string> {
  return await succeed(command);
}

/** The same for commands in /bin/sh, up to the first that fails. */
export async function shell(commands: string, cwd: string, env?: Record<string, string>): Promise<string> {
  return await succeed(["sh", "-euc", commands], { cwd, env });
}

async function succeed(command: readonly string[], options?: Deno.CommandOptions): Promise<string> {
  const { code, stdout, stderr } = await output(command, options);
  if (code !== 0) throw new Error(`${command.join(" ")}: status ${code}\n${stdout}${stderr}`);
  return stdout;
}

/** The path of an installed program. The directories of system programs are searched as well as PATH. */
export function which(name: string): string | undefined {
  const directories = [...(Deno.env.get("PATH") ?? "").split(delimiter), "/usr/sbin", "/sbin"];
  return directories.map((directory) => join(directory, name)).find((path) => existsSync(path));
}

/** For tests of what only root can do. */
export const AS_ROOT = { ignore: Deno.uid() !== 0 };

/** What of these programs is not installed, in words. */
export function lackOf(...programs: readonly string[]): string | undefined {
  const missing = programs.filter((program) => which(program) === undefined);
  return missing.length === 0 ? undefined : `${missing.join(", ")} not installed`;
}

export async function temporaryDirectory(): Promise<AsyncDisposable & { readonly path: string }> {
  const path = await Deno.makeTempDir({ prefix: "lematt-test-" });
  return { path, [Symbol.asyncDispose]: () => Deno.remove(path, { recursive: true }) };
}

// ---- leforward ---------------------------------------------------------------------------------------------------

/** A running leforward on a free port; `child.stdin` is open by default. */
export async function startLeforward(
  args: readonly string[],
  { stdin = "piped" as "piped" | "null", by = LEFORWARD } = {},
) {
  const child = spawn([...by, "--port", "0", ...args], { stdin });
  const reader = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  const port = Number(/^leforward: port (\d+) /.exec((await reader.read()).value ?? "")?.[1]);
  const stderr = new Response(child.stderr).text();
  if (!(port > 0)) throw new Error(`leforward did not start: ${await stderr}`);
  return {
    port,
    child,
    stderr,
    async [Symbol.asyncDispose]() {
      await end(child);
      if (stdin === "piped") await child.stdin.abort().catch(() => {});
      await Promise.all([reader.cancel(), stderr]);
    },
  };
}

/** Opens connections to `port` of 127.0.0.1 and resets each before it can be accepted; resolves when it has begun. */
export async function startResets(port: number, perSecond: number): Promise<AsyncDisposable> {
  // python3, as Deno has no SO_LINGER
  const script = `
import socket, struct, time
begun = time.time()
for count in range(10**9):
    time.sleep(max(0, begun + count / ${perSecond} - time.time()))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", ${port}))
    if count == 20:
        print("begun", flush=True)
`;
  const child = spawn(["python3", "-c", script], { stderr: "inherit" });
  const reader = child.stdout.getReader();
  await reader.read();
  return {
    async [Symbol.asyncDispose]() {
      await end(child);
      await reader.cancel();
    },
  };
}

// ---- an installation ---------------------------------------------------------------------------------------------

/** A user that every system has and that owns nothing. */
export const NOBODY = 65534;

/**
 * Installs deno in `bin`, the programs in `program`, and their packages in the cache of the user `uid` (none without
 * `packages`), all below `directory`, which everyone may read then. `as()` makes a command one of that user, who may not be
 * able to read the tests' own copies.
 */
export async function install(directory: string, uid = Deno.uid()!, { packages = true } = {}) {
  const [bin, program, home] = [`${directory}/bin`, `${directory}/program`, `${directory}/home`];
  await run("mkdir", "-p", bin, program, `${home}/.cache/deno`);
  await Deno.chmod(directory, 0o755);
  await run("sh", "-c", 'ln "$0" "$1" || cp "$0" "$1"', Deno.execPath(), `${bin}/deno`);
  const files = ["deno.json", "deno.lock", "lematt.ts", "leforward.ts", "lib"];
  await run("cp", "-r", ...files.map((file) => join(ROOT, file)), program);
  const info = packages ? await run(Deno.execPath(), "info", "--json", join(ROOT, "lematt.ts")) : "{}";
  for (const { localPath } of Object.values<{ localPath: string }>(JSON.parse(info).npmPackages ?? {})) {
    const [cache, path] = dirname(localPath).split("/npm/");
    await run("env", "-C", cache!, "cp", "-r", "--parents", `npm/${path}`, `${home}/.cache/deno`);
  }
  const other = uid !== Deno.uid();
  if (other) await run("chown", "-R", `${uid}:${uid}`, home);
  const user = other ? ["setpriv", `--reuid=${uid}`, `--regid=${uid}`, "--clear-groups"] : [];
  const env = { HOME: home, PATH: `${bin}:/usr/bin:/bin` };
  return { bin, program, home, env, as: (...command: string[]) => [...user, ...command] };
}

export type Installation = Awaited<ReturnType<typeof install>>;

// ---- documents ---------------------------------------------------------------------------------------------------

/** The indented blocks of a Markdown file of the repository, below the heading that contains `heading`. */
export function blocks(file: string, heading = ""): string[] {
  const text = Deno.readTextFileSync(join(ROOT, file));
  const parts = text.split(/^(?=#+ )/m);
  const part = heading === "" ? text : parts.find((part) => part.split("\n", 1)[0]!.includes(heading));
  if (part === undefined) throw new Error(`${file} has no heading ${JSON.stringify(heading)}`);
  return [...part.matchAll(/(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+/g)].map(([block]) =>
    block.replace(/^ {4}/gm, "")
  );
}

export function blockOf(file: string, start: string, heading = ""): string {
  const found = blocks(file, heading).find((text) => text.startsWith(start));
  if (found === undefined) throw new Error(`no block of ${file} begins with ${start}`);
  return found;
}

/** Text with words replaced, each of which must occur. */
export function adapt(text: string, words: Readonly<Record<string, string>>): string {
  for (const [word, replacement] of Object.entries(words)) {
    if (!text.includes(word)) throw new Error(`${JSON.stringify(word)} is not in: ${text}`);
    text = text.replaceAll(word, replacement);
  }
  return text;
}
