/**
 * Text from outside, made harmless for a terminal and for the eye, in the three ways that it is shown: a value from
 * a file escaped, so that what is wrong with it is seen; what a CA or another host says on one line of ours; what a
 * command printed in its own lines. And the form of the answer that a text is not what it should be.
 *
 * Knows nothing of where the text comes from. Nothing here quotes for a shell that will run it.
 */

/** Text from a file as messages show it: `printable`, in double quotes. */
export function quote(text: string): string {
  return `"${printable(text)}"`;
}

/** Text from a file, shortened, with everything escaped that a terminal might act on or that the eye cannot see. */
export function printable(text: string, most = 80): string {
  const shown = text.length > most ? `${text.slice(0, most - 1)}…` : text;
  return shown.toWellFormed().replaceAll("\n", "\\n").replaceAll("\t", "\\t")
    .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (char) => `\\u{${char.codePointAt(0)!.toString(16)}}`);
}

/** What a CA or another host said, on one line of bounded length, without control, format or direction characters. */
export function oneLine(text: string): string {
  const clean = text.slice(0, 4000).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]+/gu, " ").trim();
  return clean.length > 2000 ? `${clean.slice(0, 2000)}…` : clean; // room for Let's Encrypt's links to unpause
}

/** What a command printed, in its own lines: without escapes (ECMA-48), controls or changes of direction. */
export function ownLines(text: string): string {
  return text
    // deno-lint-ignore no-control-regex
    .replace(/\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/]*[0-~])?/g, "")
    .replace(/\r\n?/g, "\n")
    // deno-lint-ignore no-control-regex
    .replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, "");
}

/** A path for a command line that is shown, to be copied. */
export function shellWord(path: string): string {
  return /^[\w@%+=:,./-]+$/.test(path) ? path : `'${printable(path, 200).replaceAll("'", `'\\''`)}'`;
}

/** Why a piece of text is not what it should be. */
export interface Mistake {
  readonly why: string;
  readonly hint?: string;
}

export function isMistake(value: unknown): value is Mistake {
  return typeof value === "object" && value !== null && "why" in value;
}
