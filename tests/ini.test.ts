/** Goal: each kind of line is parsed, and Python's configparser agrees about thousands of random files. */

import { deepStrictEqual as same, ok } from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { parseIni, type Section, valueOf } from "../lib/ini.ts";
import { printable } from "../lib/names.ts";
import { which } from "./programs.ts";

type Read = Record<string, Record<string, string | null>> | null;

/** Sections -> keys -> values, in the form of Python; null for a value whose substitution fails. */
function read(text: string): Read {
  const ini = parseIni(text);
  if (ini.problems.length) return null;
  const valuesOf = (section: Section) => {
    const keys = [...new Set([...ini.defaults.entries.keys(), ...section.entries.keys()])].sort();
    return keys.map((key) => [key, valueOf(ini, section, key)!] as const)
      .map(([key, { text, problem }]) => [key, problem ? null : text]);
  };
  return Object.fromEntries(ini.sections.map((one) => [one.name, Object.fromEntries(valuesOf(one))]));
}

Deno.test("parseIni() reports the line number of each problem", () => {
  const refused: [behaviour: string, text: string, lines: number[]][] = [
    ["a key before any section, reported once", "x: 1\ny: 2\n[a]\n", [1]],
    ["a duplicate section", "[a]\n[b]\n[a]\n", [3]],
    ["a duplicate key", "[a]\nx: 1\nX: 2\n[DEFAULT]\ny:\n[DEFAULT]\ny:\n", [3, 7]],
    ["a line that is neither section nor key", "[a]\nupdate: [\n  1,\n]\n", [4]],
    ["a value without a key", "[a]\n: 1\n  = 2\n", [2, 3]],
  ];
  for (const [behaviour, text, lines] of refused) {
    same(parseIni(text).problems.map(({ line }) => line), lines, behaviour);
  }
});

Deno.test("valueOf() substitutes values up to a megabyte", () => {
  const levels = Array.from({ length: 9 }, (_, n) => `x${n}: ${`%(x${n + 1})s`.repeat(40)}\n`).join("");
  const bomb = parseIni(`[a]\n${levels}x9: \n`);
  ok(valueOf(bomb, bomb.sections[0]!, "x0")!.problem?.why.includes("longer than a megabyte"));
});

Deno.test("printable() escapes control characters and limits the length", () => {
  const text = "a\tb\nc\x1b[31m\x07\u202e\u2028\x9b\ud800é";
  same(printable(text), "a\\tb\\nc\\u{1b}[31m\\u{7}\\u{202e}\\u{2028}\\u{9b}\ufffdé");
  same(printable("x".repeat(100)).length, 80);
});

const PYTHON = `
import configparser, io, json, sys
def value(parser, section, key):
    try: return parser.get(section, key)
    except configparser.InterpolationError: return None
def read(text):
    parser = configparser.ConfigParser()
    try: parser.read_file(io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8-sig"))
    except configparser.Error: return None
    return {s: {k: value(parser, s, k) for k in sorted(parser[s])} for s in parser.sections()}
json.dump([read(text) for text in json.load(sys.stdin)], sys.stdout)
`;
/** Each kind of line. */
const KINDS = [
  "[a]\nx: 1\ny=2\nz  =  a:b=c\nZ2: # no\n",
  "# c\n[a]\n  ; c\nx: [\n  1,\n# c\n\n\t2 ]\n\n   # c\n",
  "  [a]\n    x: 1\n    y: 2\n     z: 3\n",
  "[a] b] c\nx:\n[A]\n[constructor]\ntoString: 1",
  "\ufeff[a]\r\nx: 1\ry: 2\r\n",
  "[DEFAULT]\nto: %(h)s:%%\n[a]\nh: 1\n[b]\nH: 2\n",
  "[a]\nx: %(no)s\ny: 1\nz: 5%\nv: %()s\nw: %(v)s\n",
];
const PIECES = 'x~X~y~Update~long key~é~İx~a%b~[x]~1~a:b=c~["x"]~[~]~%%~%(x)s~%(Y)s~%~%()s~# no~; no'.split(
  "~",
);
const BLANKS = ["", "", "", " ", "  ", "\t", "\u00a0", "\x1c", "\x85", "\u2028", "\ufeff"];
const HEADERS = ["[a]", "[b]x", " [c]", "[d e]]", "[DEFAULT]", "[default]", "[é]", "[]", "[a"];

/** A random file of usual and mistyped lines. */
function randomFile(seed: number): string {
  const bytes = createHash("shake256", { outputLength: 400 }).update(`${seed}`).digest().values();
  const pick = (texts: readonly string[]) => texts[bytes.next().value! % texts.length]!;
  const pair = () => pick(PIECES) + pick(BLANKS) + pick([":", "=", ":", ""]) + pick(BLANKS) + pick(PIECES);
  const other = () => pick(BLANKS) + pick(["", "", "#", ";", "# c: d", "x"]);
  const line = () => pick([pick(HEADERS), pair(), pair(), pair(), pair(), ` ${pair()}`, other()]);
  const lines = Array.from({ length: seed % 8 }, () => line() + pick(["\n", "\n", "\r\n", "\r"]));
  return `${pick(["", "\ufeff", "# c\n"])}[a]\n${lines.join("")}`;
}

/** References upon references, around the depth that is the limit of Python. */
const chain = (length: number) =>
  `[a]\n${Array.from({ length }, (_, n) => `x${n}: %(x${n + 1})s\n`).join("")}x${length}: %%\n`;

const ignore = which("python3") === undefined;
Deno.test("parseIni() agrees with Python's configparser, if python3 is installed", { ignore }, () => {
  const seed = Number(Deno.env.get("LEMATT_SEED") ?? 2026);
  const randomFiles = Array.from({ length: 6000 }, (_, n) => randomFile(seed + n));
  const texts = [...KINDS, ...[9, 10, 11].map(chain), ...randomFiles];
  const options = { input: JSON.stringify(texts), maxBuffer: 2 ** 28 };
  const fromPython: Read[] = JSON.parse(spawnSync("python3", ["-c", PYTHON], options).stdout.toString());
  for (const [index, text] of texts.entries()) {
    same(read(text), fromPython[index], `LEMATT_SEED=${seed}, file ${index}: ${JSON.stringify(text)}`);
    const lines = text.split(/\r\n|\r|\n/);
    const entries = parseIni(text).sections.flatMap(({ entries }) => [...entries.values()]);
    for (const { spelling, line, lines: numbers, parts } of entries) {
      const isRight = parts.every((part, n) => lines[numbers[n]! - 1]!.includes(part));
      ok(isRight && lines[line - 1]!.includes(spelling), JSON.stringify(text));
    }
  }
});
