/** Files of the configuration: whether they exist, can be read, and can be trusted. */

import { type Invalid, printable, quote, shellWord } from "./names.ts";

/**
 * Why a file or directory cannot be trusted: others than its owner and root may change it (as StrictModes of sshd).
 * A group with the number of the owner is the owner's own; with such groups, umask is often 002 (pam_umask).
 */
export function changeable(path: string, fix: "go-w" | "o-w" = "go-w"): Invalid | undefined {
  const { mode, uid, gid } = statOf(path);
  const byGroup = mode & 0o020 && fix === "go-w" && gid !== 0 && gid !== uid;
  if (!byGroup && !(mode & 0o002)) return undefined;
  const shown = (mode & 0o7777).toString(8).padStart(4, "0");
  const hint = `chmod ${fix} ${shellWord(path)}`;
  return { why: `others may write to ${quote(path)} (mode ${shown})`, hint };
}

/** Why root cannot trust a file: it belongs to another user (as sudo has it). */
export function foreign(path: string): Invalid | undefined {
  const { uid } = statOf(path);
  if (Deno.uid() !== 0 || uid === 0) return undefined;
  const why = `${quote(path)} belongs to user ${uid}, who could have root run anything`;
  return { why, hint: `run lematt as user ${uid}, or: chown root ${shellWord(path)}` };
}

/**
 * Why no file can be made in the directory, as far as its mode shows: groups and access control lists are not known.
 */
export function notWritable(directory: string): Invalid | undefined {
  const { isDirectory, mode, uid } = statOf(directory);
  if (!isDirectory) return { why: `${quote(directory)} is not a directory` };
  const us = Deno.uid();
  const classes = us === uid ? [mode >> 6] : [mode >> 3, mode];
  if (us === 0 || classes.some((bits) => (bits & 0o3) === 0o3)) return undefined;
  const hint = "the user who runs lematt must be able to write there";
  return { why: `${quote(directory)}: permission denied`, hint };
}

export const MISSING = "it does not exist";

/** Whether something is there, or cannot be reached. */
export function mayExist(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch (error) {
    return whyNot(error) !== MISSING;
  }
}

/** Of a file that exists; one that cannot be reached has no permissions. */
export function statOf(path: string): { isDirectory: boolean; mode: number; uid?: number; gid?: number } {
  try {
    return Deno.statSync(path) as Deno.FileInfo & { mode: number; uid: number; gid: number };
  } catch {
    return { isDirectory: true, mode: 0 };
  }
}

/** The text of a regular file, with U+FFFD for bytes that are not UTF-8. */
export function readText(path: string): string | Invalid {
  try {
    // reading a pipe or a device might never end
    if (Deno.statSync(path).isFile) return new TextDecoder().decode(Deno.readFileSync(path));
    return { why: `${quote(path)} is not a file` };
  } catch (error) {
    return { why: `${quote(path)}: ${whyNot(error)}` };
  }
}

/** An error of the system, in short. */
export function whyNot(error: unknown): string {
  const { code, message } = error as { code?: string; message: string };
  if (code === "ENOENT" || code === "ENOTDIR") return MISSING;
  return code === "EACCES" || code === "EPERM" ? "permission denied" : printable(message, 200);
}
