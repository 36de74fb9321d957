/**
 * Parses the dialect of Python's `configparser.ConfigParser` with its defaults
 * (docs.python.org/3/library/configparser.html, "Supported INI File Structure"): text -> sections, keys and values with
 * their line numbers, and all problems.
 *
 * It accepts and refuses the same files as Python, except that it skips a byte order mark and limits the growth of
 * substitutions. Messages quote no line, since a line may be a secret.
 */
import { type Invalid, printable, quote } from "./names.ts";

export interface Problem {
  readonly line: number;
  readonly text: string;
  readonly hint?: string;
}

export interface Entry {
  readonly key: string; // lower case, as it is looked up
  readonly spelling: string; // as written
  readonly line: number; // 0 for a built-in fallback
  readonly parts: string[]; // the lines of the value, before substitution
  readonly lines: number[]; // the line number of each part; comments between them leave gaps
}

export interface Section {
  readonly name: string;
  readonly line: number; // of its header; 0 if there is none
  readonly entries: Map<string, Entry>; // its own, by key
}

export interface Ini {
  /** In the order of the file, without [DEFAULT]. A name is there twice only if that is among the problems. */
  readonly sections: readonly Section[];
  /** `[DEFAULT]`: the defaults of every section. */
  readonly defaults: Section;
  /** Keys that a `%(key)s` has used so far. Grows with `valueOf`. */
  readonly used: Set<string>;
  readonly problems: readonly Problem[];
}

export interface Value {
  readonly entry: Entry;
  readonly text: string; // after substitution
  readonly problem?: Invalid; // why the substitution failed; ignore `text` then
}

/** Python's MAX_INTERPOLATION_DEPTH. */
const MAX_DEPTH = 10;
/** Characters that substitution may add to one value; Python has no limit. */
const MAX_GROWTH = 1 << 20;

// White space in Python: JavaScript's \s and five controls, without the byte order mark.
// deno-lint-ignore no-control-regex
const SPACE = /(?!\ufeff)[\s\x1c-\x1f\x85]/;
const REFERENCE = /%\(([^)]+)\)s/y;

/** Parses a file; never throws. `fallbacks` are built-in keys of `[DEFAULT]`, which the text overrides. */
export function parseIni(text: string, fallbacks: Readonly<Record<string, string>> = {}): Ini {
  const problems: Problem[] = [];
  const problem = (line: number, text: string, hint?: string) => problems.push({ line, text, hint });
  const sections: Section[] = [];
  const first = new Map<string, number>(); // section -> the line where it begins
  let defaults = newSection("DEFAULT", 0);
  for (const [spelling, value] of Object.entries(fallbacks)) {
    const entry = newEntry(spelling, 0, value);
    defaults.entries.set(entry.key, entry);
  }

  const beginSection = (name: string, line: number): Section => {
    if (name === defaults.name) return defaults = { ...defaults, line: defaults.line || line };
    const section = newSection(name, line);
    sections.push(section);
    const before = first.get(name);
    if (before === undefined) first.set(name, line);
    else {
      const hint = "give each section a name of its own";
      problem(line, `second section [${printable(name)}], the first is in line ${before}`, hint);
    }
    return section;
  };

  /** Reads `key: value`. Returns the entry that an indented next line would continue. */
  const readEntry = (content: string, line: number, section: Section, last?: Entry): Entry | undefined => {
    const delimiter = content.search(/[=:]/);
    if (delimiter < 0) {
      const hint = last && `indent it if it continues ${keyText(last.spelling)} of line ${last.line}`;
      problem(line, `neither a [section] nor a "key: value"`, hint);
      return last;
    }
    const spelling = strip(content.slice(0, delimiter));
    if (!spelling) return void problem(line, `no key before the "${content[delimiter]}"`);
    const entry = newEntry(spelling, line, strip(content.slice(delimiter + 1)));
    const before = section.entries.get(entry.key)?.line;
    if (before) problem(line, `second ${keyText(spelling)} in one section, the first is in line ${before}`);
    else section.entries.set(entry.key, entry);
    return entry;
  };

  let section: Section | undefined;
  let entry: Entry | undefined;
  let indent = 0;
  let headless = false;
  text.replace(/^\ufeff/, "").split(/\r\n|\r|\n/).forEach((full, index) => {
    const line = index + 1;
    const content = strip(full);
    if (content.startsWith("#") || content.startsWith(";")) return;
    const depth = full.indexOf(content);
    if (content === "" || (entry && depth > indent)) {
      entry?.parts.push(content);
      entry?.lines.push(line);
      return;
    }
    indent = depth;
    const close = content.startsWith("[") ? content.lastIndexOf("]") : -1;
    if (close > 1) {
      section = beginSection(content.slice(1, close), line);
      entry = undefined;
    } else if (section) {
      entry = readEntry(content, line, section, entry);
    } else {
      if (!headless) problem(line, "text before any [section]", "put its [section] in a line above");
      headless = true;
    }
  });

  for (const { entries } of [defaults, ...sections]) {
    for (const { parts, lines } of entries.values()) {
      while (parts.at(-1) === "" && parts.length > 1) parts.pop(), lines.pop();
    }
  }
  return { sections, defaults, used: new Set(), problems };
}

/**
 * The value of a key (in lower case) as ConfigParser's `get` gives it: the section's own or that of `[DEFAULT]`,
 * with `%(name)s` and `%%` substituted. Undefined if neither has the key.
 */
export function valueOf(ini: Ini, section: Section, key: string): Value | undefined {
  const find = (key: string) => section.entries.get(key) ?? ini.defaults.entries.get(key);
  const entry = find(key);
  if (!entry) return undefined;
  let problem: Invalid | undefined;
  let growth = 0;

  const substitute = ({ parts }: Entry, depth: number): string => {
    const text = parts.join("\n");
    if (depth > 1) growth += 1 + text.length;
    if (depth > MAX_DEPTH && text.includes("%")) {
      problem = { why: `its %(…)s go deeper than ${MAX_DEPTH} steps, or in a circle` };
    } else if (growth > MAX_GROWTH) problem = { why: "its %(…)s make it longer than a megabyte" };
    let result = "";
    let at = 0;
    while (!problem) {
      const percent = text.indexOf("%", at);
      if (percent < 0) return result + text.slice(at);
      result += text.slice(at, percent);
      if (text[percent + 1] === "%") {
        result += "%";
        at = percent + 2;
        continue;
      }
      REFERENCE.lastIndex = percent;
      const [all, name] = REFERENCE.exec(text) ?? [];
      if (!all || !name) {
        problem = { why: `lone "%"`, hint: `write "%%" for a percent sign` };
        break;
      }
      const found = find(name.toLowerCase());
      ini.used.add(name.toLowerCase());
      if (found) result += substitute(found, depth + 1);
      else {
        const hint = `write it in this section or in [DEFAULT], or "%%" for a percent sign`;
        problem = { why: `no key for ${quote(all)}`, hint };
      }
      at = percent + all.length;
    }
    return "";
  };

  return { entry, text: substitute(entry, 1), problem };
}

/** The lines of a value with their numbers; after a substitution with line breaks only the first is known. */
export function linesOf({ entry, text }: Value): { text: string; line: number }[] {
  const parts = text.split("\n");
  const known = parts.length === entry.lines.length;
  return parts.map((text, index) => ({ text, line: known ? entry.lines[index]! : entry.line }));
}

/** A key as messages show it; a long one is not shown, since it may be part of a secret. */
export function keyText(spelling: string): string {
  return spelling.length > 30 ? "a key of more than 30 characters" : quote(spelling);
}

function newSection(name: string, line: number): Section {
  return { name, line, entries: new Map() };
}

function newEntry(spelling: string, line: number, value: string): Entry {
  return { key: spelling.toLowerCase(), spelling, line, parts: [value], lines: [line] };
}

/** Python's str.strip(). A loop, since a regular expression takes quadratic time over inner white space. */
function strip(text: string): string {
  let start = 0;
  let end = text.length;
  while (start < end && SPACE.test(text[start]!)) start++;
  while (end > start && SPACE.test(text[end - 1]!)) end--;
  return text.slice(start, end);
}
