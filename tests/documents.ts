/**
 * Commands out of documents, for tests to run: the indented blocks of a Markdown file, with paths replaced.
 */

import { join } from "node:path";
import { output } from "./programs.ts";

export const ROOT = join(import.meta.dirname!, "..");

/** The indented blocks of a file, relative to the repository, below the heading that contains `heading`. */
export function blocks(file: string, heading = ""): string[] {
  const text = Deno.readTextFileSync(join(ROOT, file));
  const parts = text.split(/^(?=#+ )/m);
  const part = heading === "" ? text : parts.find((part) => part.split("\n", 1)[0]!.includes(heading));
  if (part === undefined) throw new Error(`${file} has no heading ${JSON.stringify(heading)}`);
  return [...part.matchAll(/(?<=\n\n)(?: {4}.*\n|\n(?= {4}))+/g)].map(([block]) =>
    block.replace(/^ {4}/gm, "")
  );
}

/** The block that begins with `start`. */
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

/** Runs commands in /bin/sh and returns their output; stops at the first that fails, and throws. */
export async function shell(
  commands: string,
  cwd: string,
  env: Record<string, string> = {},
): Promise<string> {
  const { code, stdout, stderr } = await output(["sh", "-euc", commands], { cwd, env });
  if (code !== 0) throw new Error(`${commands}\n${stdout}${stderr}`);
  return stdout;
}
