/**
 * What documents say, to be run by tests: the indented blocks of a Markdown file, and their commands with paths replaced.
 */

import { join } from "node:path";

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

/** Text with words replaced, each of which must occur. */
export function adapt(text: string, words: Readonly<Record<string, string>>): string {
  for (const [word, replacement] of Object.entries(words)) {
    if (!text.includes(word)) throw new Error(`${JSON.stringify(word)} is not in: ${text}`);
    text = text.replaceAll(word, replacement);
  }
  return text;
}

/** Runs commands by /bin/sh, which ends at the first that fails; throws then. Returns what they printed. */
export async function shell(
  commands: string,
  cwd: string,
  env: Record<string, string> = {},
): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command("sh", {
    args: ["-euc", commands],
    cwd,
    env,
    stdin: "null",
  }).output();
  const [out, err] = [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes));
  if (!success) throw new Error(`${commands}\n${out}${err}`);
  return out!;
}
