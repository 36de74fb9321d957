/**
 * lematt as it is installed on a host: deno, sources and packages below one directory, for one user, who may not be able
 * to read the tests' own copies.
 */

import { dirname, join } from "node:path";
import { output } from "./programs.ts";

const ROOT = join(import.meta.dirname!, "..");

/** A user that every system has and that owns nothing. */
export const NOBODY = 65534;

/**
 * Installs deno in `bin`, the programs in `program`, and their packages in the cache of the user `uid` (none without
 * `packages`), all below `directory`, which everyone may read then. `as()` makes a command one of that user.
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

/** Runs a command to its end and returns its standard output; throws if it fails. */
export async function run(command: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await output([command, ...args]);
  if (code !== 0) throw new Error(`${command} ${args.join(" ")}: ${stderr}`);
  return stdout;
}
