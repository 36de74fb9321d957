/**
 * lematt as it is installed on a host: deno, sources and packages below one directory, for one user, who may not be able
 * to read the tests' own copies.
 */

import { dirname, join } from "node:path";
import { output } from "./programs.ts";

const ROOT = join(import.meta.dirname!, "..");

/** A user that every system has and that owns nothing. */
export const NOBODY = 65534;

export interface Installation {
  /** Where deno is. */
  readonly bin: string;
  /** Where lematt.ts, leforward.ts and deno.json are; they belong to the user who runs the tests. */
  readonly program: string;
  /** The user's home, with the packages in Deno's cache. */
  readonly home: string;
  /** The user's environment, with deno in PATH. */
  readonly env: Readonly<Record<string, string>>;
  /** The command, run as the user. */
  as(...command: string[]): string[];
}

/** Installs lematt for the user `uid` below `directory`, which all may read then; without `packages`, the cache is empty. */
export async function install(
  directory: string,
  uid = Deno.uid()!,
  { packages = true } = {},
): Promise<Installation> {
  const [bin, program, home] = [`${directory}/bin`, `${directory}/program`, `${directory}/home`];
  await run("mkdir", "-p", bin, program, `${home}/.cache/deno`);
  await Deno.chmod(directory, 0o755);
  await run("sh", "-c", 'ln "$0" "$1" || cp "$0" "$1"', Deno.execPath(), `${bin}/deno`);
  const files = ["deno.json", "deno.lock", "lematt.ts", "leforward.ts", "lib"];
  await run("cp", "-r", ...files.map((file) => join(ROOT, file)), program);
  const { npmPackages } = JSON.parse(await run(Deno.execPath(), "info", "--json", join(ROOT, "lematt.ts")));
  for (const { localPath } of Object.values<{ localPath: string }>(packages ? npmPackages : {})) {
    const [cache, path] = dirname(localPath).split("/npm/");
    await run("env", "-C", cache!, "cp", "-r", "--parents", `npm/${path}`, `${home}/.cache/deno`);
  }
  const other = uid !== Deno.uid();
  if (other) await run("chown", "-R", `${uid}:${uid}`, home);
  const user = other ? ["setpriv", `--reuid=${uid}`, `--regid=${uid}`, "--clear-groups"] : [];
  const env = { HOME: home, PATH: `${bin}:/usr/bin:/bin` };
  return { bin, program, home, env, as: (...command) => [...user, ...command] };
}

/** Runs a command to its end and returns its standard output; throws if it fails. */
export async function run(command: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await output([command, ...args]);
  if (code !== 0) throw new Error(`${command} ${args.join(" ")}: ${stderr}`);
  return stdout;
}
