/**
 * Pages, which are the files of a configuration, and Keys, which read one section's values as what each is to be:
 * a word, a number, a path, a list. What is wrong becomes a fault of its page and line, and reading goes on.
 *
 * Knows no key and no section by name. Reads files and never writes.
 */
import { basename, resolve } from "node:path";
import { cannotRead, type Ini, lineFinder, parseIni, type Section, type Value, valueOf } from "./ini.ts";
import { isMistake, type Mistake, printable, quote } from "./text.ts";

/** A fault or a warning: `file:line: text`, with an optional hint. */
export interface Notice {
  readonly file: string; // base name
  readonly line?: number; // absent if it is the whole file's
  readonly text: string;
  readonly hint?: string;
}

/** A piece of a value, and the line of the file where it stands. */
export interface Word {
  readonly text: string;
  readonly line: number;
}

/** One of the three files, and the faults and warnings found in it. */
export class Page {
  readonly name: string;
  constructor(readonly path: string, readonly faults: Notice[], readonly warnings: Notice[]) {
    this.name = basename(path);
  }

  fault(text: string, line?: number, hint?: string): undefined {
    this.faults.push(defined({ file: this.name, line, text, hint }));
  }

  warn(text: string, line?: number, hint?: string) {
    this.warnings.push(defined({ file: this.name, line, text, hint }));
  }

  read(hintIfMissing: string): string | undefined {
    const text = readText(this.path);
    if (isMistake(text)) {
      const hint = exists(this.path) ? undefined : hintIfMissing;
      return this.fault(`Cannot read ${quote(this.path)}: ${text.why}`, undefined, hint);
    }
    const lost = text.indexOf("\ufffd"); // what the decoder puts for bytes that are no UTF-8
    if (lost >= 0) this.fault("Cannot read it: not UTF-8", text.slice(0, lost).split(/\r\n|\r|\n/).length);
    return text;
  }

  parse(text: string, fallbacks?: Readonly<Record<string, string>>): Ini {
    const ini = parseIni(text, fallbacks);
    for (const { line, text, hint } of ini.faults) this.fault(text, line, hint);
    return ini;
  }
}

interface Range {
  readonly min?: number; // 0 without it
  readonly above?: number; // instead of min: itself excluded
  readonly max: number;
  readonly step?: number; // 1: whole numbers
}

/**
 * The keys of one section, each read as what it is to be. What is wrong becomes a fault of its line, and reads as
 * something harmless, so that the rest is read as well.
 */
export class Keys {
  readonly #values = new Map<string, Value | undefined>();

  constructor(readonly page: Page, readonly ini: Ini, readonly section: Section) {}

  /** Those of [DEFAULT]. */
  defaults(): Keys {
    return new Keys(this.page, this.ini, this.ini.defaults);
  }

  /** Whether it was written, in the section or in [DEFAULT]. */
  has(key: string): boolean {
    return this.line(key) > 0;
  }

  line(key: string): number {
    return this.#value(key)?.entry.line ?? 0;
  }

  fault(key: string, why: string, hint?: string, line = this.line(key)): undefined {
    const comment = /\s[#;]/.test(this.#value(key)?.text.slice(0, 1000) ?? "");
    this.page.fault(cannotRead(key, why), line, comment ? "a comment needs a line of its own" : hint);
  }

  missing(key: string, hint: string) {
    const { name, line } = this.section;
    this.page.fault(`Cannot find ${quote(key)} in [${printable(name)}]`, line, hint);
  }

  warn(key: string, text: string, hint?: string) {
    this.page.warn(`${quote(key)}: ${text}`, this.line(key) || this.section.line, hint);
  }

  /** A value of one line that is not empty. */
  text(key: string): string | undefined {
    const value = this.#value(key);
    if (!value || value.fault) return undefined;
    const text = value.text.trim();
    if (text === "") return this.fault(key, "there is no value", "take the line out, or write one");
    if (text.includes("\n")) {
      const next = value.entry.lines[1]; // none where a substitution brought the lines along
      const hint = next ? `line ${next} is indented, so it continues this one` : undefined;
      return this.fault(key, "it goes over several lines", hint);
    }
    if (/\p{Cc}/u.test(text)) return this.fault(key, "a control character in it");
    return text;
  }

  word(key: string): string | undefined {
    const text = this.text(key);
    return text && /\s/.test(text) ? this.fault(key, `${quote(text)} is more than one word`) : text;
  }

  /** ConfigParser's getboolean; false if absent. */
  boolean(key: string, or = ""): boolean {
    const text = this.text(key)?.toLowerCase();
    if (text === undefined || ["no", "false", "off", "0"].includes(text)) return false;
    if (!["yes", "true", "on", "1"].includes(text)) {
      this.fault(key, `${quote(text)} is neither yes nor no${or}`);
    }
    return true;
  }

  number(key: string, { min = 0, above, max, step }: Range): number {
    const text = this.text(key);
    if (text === undefined) return 0;
    const number = /^(?:\d+\.?\d*|\.\d+)$/.test(text) ? Number(text) : NaN;
    if (number >= min && number > (above ?? -1) && number <= max && (!step || number % step === 0)) {
      return number;
    }
    const kind = !step ? "a number" : step === 1 ? "a whole number" : `a multiple of ${step}`;
    const least = above === undefined ? `from ${min}` : `above ${above}`;
    this.fault(key, `${quote(text)} is not ${kind} ${least} to ${max}`);
    return 0;
  }

  oneOf<T extends string>(key: string, choices: readonly T[]): T | undefined {
    const text = this.text(key);
    const choice = choices.find((known) => known === text);
    if (text !== undefined && !choice) this.fault(key, `${quote(text)} is none of ${choices.join(", ")}`);
    return choice;
  }

  /** An absolute path; in the file it may be relative to the configuration directory. */
  path(key: string, directory: string): string | undefined {
    const text = this.text(key);
    if (text && /^[~$]/.test(text)) {
      return this.fault(key, `no shell reads ${quote(text)}`, "write the path in full");
    }
    return text && resolve(directory, text);
  }

  /** Words with blanks between them, on one line or several; at least one, if the key is there. */
  words(key: string): Word[] {
    const value = this.#value(key);
    if (!value || value.fault) return [];
    const lineOf = lineFinder(value);
    const words = [...value.text.matchAll(/\S+/g)]
      .map(({ 0: text, index }) => ({ text, line: lineOf(index) }));
    if (!words.length) this.fault(key, "there is no value", "take the line out, or write one");
    return words;
  }

  /** A JSON array of strings that can each be a command line. */
  list(key: string): Word[] {
    const value = this.#value(key);
    if (!value || value.fault) return [];
    const lineOf = lineFinder(value);
    const told = (why: string, hint: string | undefined, line: number) =>
      this.page.fault(`Cannot read list ${quote(key)}: ${why}`, line, hint);
    const items = parseList(value.text);
    if (isMistake(items)) {
      told(items.why, items.hint, lineOf(items.at));
      return [];
    }
    return items.map(({ text, at }) => {
      const line = lineOf(at);
      if (!text.trim()) told("an empty string in it", "take it out", line);
      // A command line is an argument of the shell: no NUL can be in it, and no half of a surrogate pair.
      if (/[\0\r\n]/.test(text) || !text.isWellFormed()) {
        told(`a line break or NUL in ${quote(text)}`, undefined, line);
      }
      return { text, line };
    });
  }

  /**
   * Refuses every key of the section but these, and those that a %(…)s asks for; so it is to be called when the values
   * of all sections were read.
   */
  refuseOthers(keys: readonly string[], elsewhere: readonly string[], place: string) {
    const known = new Set(keys.map((key) => key.toLowerCase()));
    for (const { key, spelling, line } of this.section.entries.values()) {
      if (known.has(key) || this.ini.used.has(key)) continue;
      const meant = closest(key, keys);
      const there = elsewhere.find((other) => other.toLowerCase() === key);
      const hint = there ? `it belongs in ${place}` : meant && `did you mean "${meant}"?`;
      this.page.fault(`Cannot use key ${quote(spelling)}: it is unknown`, line, hint);
    }
  }

  #value(key: string): Value | undefined {
    if (!this.#values.has(key)) {
      const value = valueOf(this.ini, this.section, key.toLowerCase());
      this.#values.set(key, value);
      if (value?.fault) this.page.fault(value.fault.text, value.fault.line, value.fault.hint);
    }
    return this.#values.get(key);
  }
}

/** A JSON array of strings with the offset of each; or what is wrong where, more clearly than JSON.parse tells it. */
function parseList(text: string): { text: string; at: number }[] | Mistake & { at: number } {
  const items: { text: string; at: number }[] = [];
  let at = 0;
  const next = () => {
    while (" \t\r\n".includes(text[at] ?? "-")) at++;
    return text[at];
  };
  const wrong = (why: string, hint?: string) => (
    { why: `not JSON, ${why}`, hint, at: Math.min(at, text.length - 1) }
  );

  if (next() !== "[") {
    const meant = text.trim() ? printable(JSON.stringify([text.trim()])) : "[]";
    return wrong(`it does not begin with "["`, `write ${meant}`);
  }
  at++;
  if (next() !== "]") {
    for (;;) {
      const quoteMark = next();
      if (quoteMark !== '"') {
        return quoteMark === "]" && items.length
          ? wrong(`a "," before its "]"`)
          : wrong(`no string in double quotes ${before(text, at)}`);
      }
      let end = at + 1;
      while (end < text.length && text[end] !== '"') end += text[end] === "\\" ? 2 : 1;
      const string = text.slice(at, end + 1);
      if (end >= text.length) return wrong(`the string ${quote(string)} does not end`);
      try {
        items.push({ text: JSON.parse(string), at });
      } catch {
        return wrong(`the string ${quote(string)} has a line break or an unknown "\\" in it`);
      }
      at = end + 1;
      const delimiter = next();
      if (delimiter === "]") break;
      if (delimiter !== ",") return wrong(`no "," or "]" ${before(text, at)}`);
      at++;
    }
  }
  at++;
  const more = next();
  if (more === undefined) return items;
  return wrong(`text behind its "]"`, /[#;]/.test(more) ? "a comment needs a line of its own" : undefined);
}

function before(text: string, at: number): string {
  return at < text.length ? `before ${quote(text.slice(at, at + 20))}` : "at its end";
}

/** The word that was meant, if one differs by case, dashes, or two slips at most. */
export function closest(word: string, choices: readonly string[]): string | undefined {
  const plain = (text: string) => text.toLowerCase().replace(/[-_\s]/g, "");
  if (word.length > 40) return undefined;
  return choices.map((choice) => ({ choice, slips: distance(plain(word), plain(choice)) }))
    .filter(({ choice, slips }) => slips <= Math.min(2, choice.length / 3))
    .sort((a, b) => a.slips - b.slips)[0]?.choice;
}

/** Levenshtein's: letters put in, left out or replaced. */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, index) => index);
  for (const [i, letter] of [...a].entries()) {
    const above = row;
    row = [i + 1];
    for (let j = 1; j <= b.length; j++) {
      row.push(Math.min(above[j]! + 1, row[j - 1]! + 1, above[j - 1]! + (letter === b[j - 1] ? 0 : 1)));
    }
  }
  return row[b.length]!;
}

/** Without the keys that are undefined, so that absent is absent. */
export function defined<T extends object>(record: T): T {
  return Object.fromEntries(Object.entries(record).filter(([, value]) => value !== undefined)) as T;
}

/** Whether something stands there, be it out of reach. */
export function exists(path: string): boolean {
  try {
    Deno.statSync(path);
  } catch (error) {
    return !/^(ENOENT|ENOTDIR)$/.test(codeOf(error));
  }
  return true;
}

/** The text of a regular file, U+FFFD where it is not UTF-8; or why it cannot be read. */
export function readText(path: string): string | Mistake {
  try {
    // A pipe or a device might never end.
    return Deno.statSync(path).isFile
      ? new TextDecoder().decode(Deno.readFileSync(path))
      : { why: "it is not a file" };
  } catch (error) {
    return { why: whyNot(error) };
  }
}

function codeOf(error: unknown): string {
  return error instanceof Error && "code" in error ? String(error.code) : "";
}

/** What the system has against a path, in words that fit behind its name. */
export function whyNot(error: unknown): string {
  const code = codeOf(error);
  if (code === "ENOENT") return "it does not exist";
  if (code === "EACCES" || code === "EPERM") return "permission denied";
  return printable(error instanceof Error ? error.message : String(error), 200);
}
