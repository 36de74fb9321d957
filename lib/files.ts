/** Files and directories with the right owner and mode; files that need not exist. */

import defer * as nodeFs from "node:fs";
import { dirname } from "node:path";

type Owner = Pick<Deno.FileInfo, "uid" | "gid">;

/** Root gives a new file to `owner`; other users give it to the group only. False if they may not. */
export function giveTo(path: string, owner: Owner): boolean {
  const isRoot = Deno.uid() === 0;
  const found = Deno.lstatSync(path);
  const [uid, gid] = [isRoot ? owner.uid : found.uid, owner.gid];
  if (uid === null || gid === null || (found.uid === uid && found.gid === gid)) return true;
  try {
    nodeFs.lchownSync(path, uid, gid); // unlike Deno's, never what a link leads to
    return true;
  } catch (error) {
    if (isRoot) throw error;
    return false;
  }
}

/** Sets the mode of a new file or directory, which the umask may have changed. */
export function setMode(path: string, mode: number): void {
  if ((Deno.lstatSync(path).mode! & 0o777) !== mode) Deno.chmodSync(path, mode);
}

/** Makes a directory for secrets, and its parents. */
export function makeDirectories(path: string): void {
  if (exists(path)) return;
  makeDirectories(dirname(path));
  makeDirectory(path, 0o700, Deno.statSync(dirname(path)));
}

/** Makes a directory with exactly this mode; leaves an existing one as it is. */
export function makeDirectory(path: string, mode: number, owner: Owner): void {
  try {
    Deno.mkdirSync(path, { mode });
  } catch (error) {
    if (error instanceof Deno.errors.AlreadyExists) return;
    throw error;
  }
  giveTo(path, owner);
  setMode(path, mode);
}

/** Adds the path to an error of the system; Deno does not, for files that are open. */
export function withPath(error: Error, what: string): Error {
  if (!error.message.includes("'")) error.message += `: ${what}`;
  return error;
}

/** Flushes a directory, and so the renames in it. Some file systems (CIFS, FUSE) cannot; that is ignored. */
export function syncDirectory(path: string): void {
  using directory = Deno.openSync(path);
  try {
    directory.syncSync();
  } catch (error) {
    if (["EINVAL", "ENOTSUP", "EBADF"].includes(codeOf(error) ?? "") || /os error 22/.test(String(error))) {
      return;
    }
    throw withPath(error as Error, `sync '${path}'`);
  }
}

/** The result of `operation`, undefined if its file does not exist. */
function ifPresent<T>(operation: () => T): T | undefined {
  try {
    return operation();
  } catch (error) {
    if (codeOf(error) === "ENOENT") return undefined;
    throw error;
  }
}

/** The text of a file, undefined if it does not exist. */
export function readIfPresent(path: string): string | undefined {
  return ifPresent(() => Deno.readTextFileSync(path));
}

export function removeIfPresent(path: string): void {
  ifPresent(() => Deno.removeSync(path));
}

export function regularFile(path: string): Deno.FileInfo | undefined {
  const found = ifPresent(() => Deno.lstatSync(path));
  return found?.isFile ? found : undefined;
}

export function exists(path: string): boolean {
  return ifPresent(() => Deno.lstatSync(path)) !== undefined;
}

export function listing(directory: string): string[] {
  return ifPresent(() => Array.from(Deno.readDirSync(directory), ({ name }) => name).sort()) ?? [];
}

export function linkTarget(path: string): string | undefined {
  try {
    return Deno.readLinkSync(path);
  } catch {
    return undefined;
  }
}

export function codeOf(error: unknown): string | undefined {
  return (error as { code?: string }).code;
}
