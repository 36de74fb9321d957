/**
 * The programs of this repository, started as their first lines say.
 */

import { join } from "node:path";

/** The command in the first line of a program of this repository, with `more` flags. */
export function program(file: string, ...more: readonly string[]): readonly string[] {
  const path = join(import.meta.dirname!, "..", file);
  const flags = Deno.readTextFileSync(path).split("\n", 1)[0]!.replace(/^.* deno run /, "").split(" ");
  return [Deno.execPath(), "run", ...flags, ...more, path];
}

/** Runs a command to its end. */
export async function output([command, ...args]: readonly string[], options: Deno.CommandOptions = {}) {
  const ended = await new Deno.Command(command!, { stdin: "null", ...options, args }).output();
  const [stdout, stderr] = [ended.stdout, ended.stderr].map((bytes) => new TextDecoder().decode(bytes));
  return { code: ended.code, stdout: stdout!, stderr: stderr! };
}

/** A directory that is removed with its block. */
export async function temporaryDirectory(): Promise<AsyncDisposable & { readonly path: string }> {
  const path = await Deno.makeTempDir({ prefix: "lematt-test-" });
  return { path, [Symbol.asyncDispose]: () => Deno.remove(path, { recursive: true }) };
}

export const LEMATT = program("lematt.ts");
export const LEFORWARD = program("leforward.ts");

/** A running leforward on a free port; `child.stdin` is open by default. */
export async function startLeforward(args: readonly string[], { stdin = "piped", by = LEFORWARD }: {
  stdin?: "piped" | "null";
  by?: readonly string[];
} = {}) {
  const [command, ...rest] = [...by, "--port", "0", ...args];
  const child = new Deno.Command(command!, { args: rest, stdin, stdout: "piped", stderr: "piped" }).spawn();
  const reader = child.stdout.pipeThrough(new TextDecoderStream()).getReader();
  const port = Number(/^leforward: port (\d+) /.exec((await reader.read()).value ?? "")?.[1]);
  const stderr = new Response(child.stderr).text();
  if (!(port > 0)) throw new Error(`leforward did not start: ${await stderr}`);
  return {
    port,
    child,
    stderr,
    async [Symbol.asyncDispose]() {
      try {
        child.kill("SIGKILL");
      } catch { /* it has ended already */ }
      if (stdin === "piped") await child.stdin.abort().catch(() => {});
      await Promise.all([reader.cancel(), child.status, stderr]);
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
  const child = new Deno.Command("python3", { args: ["-c", script], stdin: "null", stdout: "piped" }).spawn();
  const reader = child.stdout.getReader();
  await reader.read();
  return {
    async [Symbol.asyncDispose]() {
      child.kill();
      await Promise.all([reader.cancel(), child.status]);
    },
  };
}
