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

/**
 * Installs lematt for the user `uid` below `directory`, which all may read then. Its packages come from Deno's cache of
 * the user who runs the tests; without them, the user has an empty one.
 */
export async function install(
  directory: string,
  uid = Deno.uid()!,
  { packages = true } = {},
): Promise<Installation> {
  const [bin, program, home] = [join(directory, "bin"), join(directory, "program"), join(directory, "home")];
  for (const path of [bin, program, home]) await Deno.mkdir(path);
  await Deno.chmod(directory, 0o755);
  await Deno.link(Deno.execPath(), join(bin, "deno"))
    .catch(() => Deno.copyFile(Deno.execPath(), join(bin, "deno")));
  const files = ["deno.json", "deno.lock", "lematt.ts", "leforward.ts", "lib"];
  await run("cp", "-r", ...files.map((file) => join(ROOT, file)), program);
  const { npmPackages } = JSON.parse(await run(Deno.execPath(), "info", "--json", join(ROOT, "lematt.ts")));
  for (
    const { name, localPath, registryUrl } of Object.values<Record<string, string>>(
      packages ? npmPackages : {},
    )
  ) {
    const at = join(home, ".cache/deno/npm", new URL(registryUrl!).hostname, dirname(name!));
    await Deno.mkdir(at, { recursive: true });
    await run("cp", "-r", dirname(localPath!), at);
  }
  const other = uid !== Deno.uid();
  if (other) await run("chown", "-R", `${uid}:${uid}`, home);
  return {
    bin,
    program,
    home,
    env: { HOME: home, PATH: `${bin}:/usr/bin:/bin` },
    as: (...command) =>
      other ? ["setpriv", `--reuid=${uid}`, `--regid=${uid}`, "--clear-groups", ...command] : command,
  };
}

/** Runs a command to its end and returns its standard output; throws if it fails. */
export async function run(command: string, ...args: readonly string[]): Promise<string> {
  const { code, stdout, stderr } = await output([command, ...args]);
  if (code !== 0) throw new Error(`${command} ${args.join(" ")}: ${stderr}`);
  return stdout;
}
