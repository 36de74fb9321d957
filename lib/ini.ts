/**
 * The dialect of Python's `configparser.ConfigParser` with its defaults: text -> sections, keys and values, each
 * with its line number, and every fault of the text rather than the first.
 *
 * Knows no file, no key and no section but `[DEFAULT]`. Accepts what Python accepts and refuses what it refuses
 * (docs.python.org/3/library/configparser.html, "Supported INI File Structure"), but for a byte order mark, which
 * is skipped, and for substitutions that would grow without bound.
 */
import { printable, quote } from "./text.ts";

/** What is wrong with one line. */
export interface Fault {
  readonly line: number;
  readonly text: string;
  readonly hint?: string;
}

export interface Entry {
  readonly key: string; // lower case, as it is looked up
  readonly spelling: string; // as written
  readonly line: number; // 0 for a built-in fallback
  readonly raw: string; // before substitution, its lines joined by "\n"
  readonly lines: readonly number[]; // the line number of each line of `raw`; comments between them leave gaps
}

export interface Section {
  readonly name: string;
  readonly line: number; // of its header; 0 if there is none
  readonly entries: ReadonlyMap<string, Entry>; // its own, by key
}

export interface Ini {
  /** In the order of the file, without [DEFAULT]. A name stands here twice only if that is among the faults. */
  readonly sections: readonly Section[];
  /** `[DEFAULT]`: what every section falls back to. */
  readonly defaults: Section;
  /** Keys that a `%(key)s` has asked for so far: variables, whatever their name. Grows with `valueOf`. */
  readonly used: Set<string>;
  readonly faults: readonly Fault[];
}

export interface Value {
  readonly entry: Entry;
  readonly text: string; // after substitution
  readonly fault?: Fault; // why it cannot be substituted; `text` is then to be ignored
}

/** Python's MAX_INTERPOLATION_DEPTH. */
const MAX_DEPTH = 10;
/** Characters that one value may take in while it is substituted; ours, Python has no bound. */
const MAX_GROWTH = 1 << 20;

// What Python takes for white space: JavaScript's \s and five controls, without the byte order mark.
// deno-lint-ignore no-control-regex
const SPACE = /(?!\ufeff)[\s\x1c-\x1f\x85]/;
const REFERENCE = /%\(([^)]+)\)s/y;

/**
 * Reads the text of a file. `fallbacks` are built-in keys of `[DEFAULT]`, which the text overrides.
 * Never throws: what cannot be read is in `faults`, in the order of the lines.
 */
export function parseIni(text: string, fallbacks: Readonly<Record<string, string>> = {}): Ini {
  const faults: Fault[] = [];
  const sections: OpenSection[] = [];
  const begun = new Map<string, OpenSection>();
  const defaults: OpenSection = { name: "DEFAULT", line: 0, entries: new Map() };
  for (const [spelling, value] of Object.entries(fallbacks)) {
    const entry = newEntry(spelling, 0, value);
    defaults.entries.set(entry.key, entry);
  }

  let section: OpenSection | undefined;
  let entry: OpenEntry | undefined; // the value that an indented line would continue
  let indent = 0;
  let headless = false;

  text.replace(/^\ufeff/, "").split(/\r\n|\r|\n/).forEach((full, index) => {
    const line = index + 1;
    const content = strip(full);
    if (content.startsWith("#") || content.startsWith(";")) return;
    if (content === "") {
      entry?.parts.push("");
      entry?.lines.push(line);
      return;
    }
    const depth = full.indexOf(content);
    if (entry && depth > indent) {
      entry.parts.push(content);
      entry.lines.push(line);
      return;
    }
    indent = depth;

    const close = content.startsWith("[") ? content.lastIndexOf("]") : -1;
    if (close > 1) {
      const name = content.slice(1, close);
      const first = begun.get(name);
      if (name === defaults.name) section = defaults;
      else {
        section = { name, line, entries: new Map() };
        sections.push(section);
        if (first) {
          faults.push({
            line,
            text: `Cannot use section [${printable(name)}] twice: it began in line ${first.line}`,
            hint: "give each section a name of its own",
          });
        } else begun.set(name, section);
      }
      if (section === defaults && !defaults.line) defaults.line = line;
      entry = undefined;
      return;
    }
    if (!section) {
      if (!headless) {
        faults.push({
          line,
          text: `Cannot read ${quote(content)}: it stands before any [section]`,
          hint: "put the [section] that it belongs to in a line above it",
        });
      }
      headless = true;
      return;
    }

    const delimiter = content.search(/[=:]/);
    if (delimiter < 0) {
      faults.push({
        line,
        text: `Cannot read ${quote(content)}: neither a [section] nor a "key: value"`,
        hint: entry && `indent it if it continues "${printable(entry.spelling)}" of line ${entry.line}`,
      });
      return;
    }
    const spelling = strip(content.slice(0, delimiter));
    if (!spelling) {
      faults.push({ line, text: `Cannot read ${quote(content)}: there is no key before the delimiter` });
      entry = undefined;
      return;
    }
    entry = newEntry(spelling, line, strip(content.slice(delimiter + 1)));
    const first = section.entries.get(entry.key);
    if (first && first.line > 0) {
      faults.push({
        line,
        text: `Cannot use key ${quote(spelling)} twice in one section: it is in line ${first.line} already`,
      });
    } else section.entries.set(entry.key, entry);
  });

  for (const { entries } of [defaults, ...sections]) {
    for (const entry of entries.values()) {
      while (entry.parts.at(-1) === "") entry.parts.pop();
      entry.raw = entry.parts.join("\n");
    }
  }
  return { sections, defaults, used: new Set(), faults };
}

/**
 * The value of a key (in lower case) as ConfigParser's `get` gives it: the section's own or that of `[DEFAULT]`,
 * with `%(name)s` and `%%` substituted. Undefined if neither has the key.
 */
export function valueOf(ini: Ini, section: Section, key: string): Value | undefined {
  const find = (key: string) => section.entries.get(key) ?? ini.defaults.entries.get(key);
  const entry = find(key);
  if (!entry) return undefined;
  let fault: Omit<Fault, "line"> | undefined;
  let growth = 0;

  const substitute = (text: string, depth: number): string => {
    if (depth > MAX_DEPTH && text.includes("%")) {
      fault = { text: `its %(…)s go deeper than ${MAX_DEPTH} steps, or in a circle` };
    }
    let result = "";
    let at = 0;
    while (!fault) {
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
        fault = { text: `a lone "%" in it`, hint: `write "%%" for a percent sign` };
        break;
      }
      const key = name.toLowerCase();
      ini.used.add(key);
      const found = find(key);
      growth += 1 + (found?.raw.length ?? 0);
      if (!found) {
        fault = {
          text: `no key ${quote(name)} for ${quote(all)}`,
          hint: `write it in this section or in [DEFAULT], or "%%" for a percent sign`,
        };
      } else if (growth > MAX_GROWTH) fault = { text: "its %(…)s make it longer than a megabyte" };
      else result += substitute(found.raw, depth + 1);
      at = percent + all.length;
    }
    return result;
  };

  const text = substitute(entry.raw, 1);
  if (!fault) return { entry, text };
  return {
    entry,
    text: "",
    fault: { line: entry.line, ...fault, text: cannotRead(entry.spelling, fault.text) },
  };
}

/** Tells the line number of a character of `value.text` by its offset. */
export function lineFinder({ entry, text }: Value): (offset: number) => number {
  const breaks = Array.from(text.matchAll(/\n/g), ({ index }) => index);
  // A substituted value may bring line breaks along; then only its first line is sure.
  if (breaks.length >= entry.raw.split("\n").length) return () => entry.line;
  return (offset) => {
    let [low, high] = [0, breaks.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (breaks[middle]! < offset) low = middle + 1;
      else high = middle;
    }
    return entry.lines[low] ?? entry.line;
  };
}

/** How a fault of a key's value begins. */
export function cannotRead(key: string, why: string): string {
  return `Cannot read ${quote(key)}: ${why}`;
}

interface OpenEntry {
  key: string;
  spelling: string;
  line: number;
  raw: string;
  lines: number[];
  parts: string[];
}

interface OpenSection {
  name: string;
  line: number;
  entries: Map<string, OpenEntry>;
}

function newEntry(spelling: string, line: number, value: string): OpenEntry {
  return { key: spelling.toLowerCase(), spelling, line, raw: value, lines: [line], parts: [value] };
}

/** Python's str.strip(). A loop, since a regular expression takes quadratic time over inner white space. */
function strip(text: string): string {
  let start = 0;
  let end = text.length;
  while (start < end && SPACE.test(text[start]!)) start++;
  while (end > start && SPACE.test(text[end - 1]!)) end--;
  return text.slice(start, end);
}
