/** Goal: each kind of line is parsed, and Python's configparser agrees about thousands of generated files. */

import { deepStrictEqual as same, ok } from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { linesOf, parseIni, valueOf } from "../lib/ini.ts";
import { printable } from "../lib/names.ts";

type Read = Record<string, Record<string, string | null>> | null;

/** Sections -> keys -> values, in the form of Python; null for a value whose substitution fails. */
function read(text: string): Read {
  const ini = parseIni(text);
  if (ini.problems.length) return null;
  return Object.fromEntries(ini.sections.map((section) => {
    const keys = [...new Set([...ini.defaults.entries.keys(), ...section.entries.keys()])].sort();
    return [
      section.name,
      Object.fromEntries(keys.map((key) => {
        const { text, problem } = valueOf(ini, section, key)!;
        return [key, problem ? null : text];
      })),
    ];
  }));
}

const accepted: [text: string, sections: Read][] = [
  ["[a]\nx: 1\ny=2\nz  =  a:b=c\nZ2: # no\n", { a: { x: "1", y: "2", z: "a:b=c", z2: "# no" } }],
  ["# c\n[a]\n  ; c\nx: [\n  1,\n# c\n\n\t2 ]\n\n   # c\n", { a: { x: "[\n1,\n\n2 ]" } }],
  ["  [a]\n    x: 1\n    y: 2\n     z: 3\n", { a: { x: "1", y: "2\nz: 3" } }],
  ["[a] b] c\nx:\n[A]\n", { "a] b": { x: "" }, A: {} }],
  ["\ufeff[a]\r\nx: 1\ry: 2\r\n", { a: { x: "1", y: "2" } }],
  ["[DEFAULT]\nto: %(h)s:%%\n[a]\nh: 1\n[b]\nH: 2\n", { a: { h: "1", to: "1:%" }, b: { h: "2", to: "2:%" } }],
  ["[a]\nx: %(no)s\ny: 1\nz: 5%\nv: %()s\nw: %(v)s\n", { a: { v: null, w: null, x: null, y: "1", z: null } }],
  ["[__proto__]\nconstructor: 1\n", { ["__proto__"]: { constructor: "1" } }],
];
Deno.test("parseIni() reads each kind of line; a failed substitution affects that value alone", () => {
  for (const [text, sections] of accepted) same(read(text), sections, text);
});

const refused: [behaviour: string, text: string, lines: number[]][] = [
  ["a key before any section, reported once", "x: 1\ny: 2\n[a]\n", [1]],
  ["a duplicate section", "[a]\n[b]\n[a]\n", [3]],
  ["a duplicate key", "[a]\nx: 1\nX: 2\n[DEFAULT]\ny:\n[DEFAULT]\ny:\n", [3, 7]],
  ["a line that is neither section nor key", "[a]\nupdate: [\n  1,\n]\n", [4]],
  ["a value without a key", "[a]\n: 1\n  = 2\n", [2, 3]],
  ["every invalid line, not only the first", "x\n[]\n[a]\nx\n[a]\ny\n", [1, 4, 5, 6]],
];
Deno.test("parseIni() reports the line number of each problem", () => {
  for (const [behaviour, text, lines] of refused) {
    same(parseIni(text).problems.map(({ line }) => line), lines, behaviour);
  }
});

Deno.test("no problem of parseIni() quotes a line or a key that may be a secret", () => {
  const secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0";
  const { problems } = parseIni(`${secret}\n[a]\n${secret}\n${secret}==\n${secret}==\n${secret}\n`);
  same(problems.map(({ line }) => line), [1, 3, 5, 6]);
  ok(!JSON.stringify(problems).includes(secret.slice(0, 10)), JSON.stringify(problems));
});

Deno.test("parseIni() substitutes default values, which the text overrides", () => {
  const text = "[DEFAULT]\nbits: 4096\n[a]\ntag: rsa%(bits)s-%(curve)s\n";
  const ini = parseIni(text, { bits: "2048", Curve: "P-256" });
  same(ini.problems, []);
  same(valueOf(ini, ini.sections[0]!, "tag")!.text, "rsa4096-P-256");
  same([...ini.used], ["bits", "curve"]);
  same(valueOf(ini, ini.sections[0]!, "curve")!.entry.line, 0);
});

Deno.test("linesOf() returns the line number of each line of a value, with comments and blank lines between them", () => {
  const ini = parseIni("[a]\nx: one\n\n# comment\n  two\n  three\n\ny: %(x)s\n");
  const lines = (key: string) =>
    linesOf(valueOf(ini, ini.sections[0]!, key)!).map(({ text, line }) => `${line} ${text}`);
  same(lines("x"), ["2 one", "3 ", "5 two", "6 three"]);
  same(lines("y"), ["8 one", "8 ", "8 two", "8 three"]);
});

Deno.test("valueOf() limits the length of substitutions", () => {
  const levels = Array.from({ length: 9 }, (_, n) => `x${n}: ${`%(x${n + 1})s`.repeat(40)}`);
  for (const seed of ["seed", ""]) {
    const ini = parseIni(`[a]\n${levels.join("\n")}\nx9: ${seed}\n`);
    ok(valueOf(ini, ini.sections[0]!, "x0")!.problem?.why.includes("longer than a megabyte"));
  }
});

Deno.test("parseIni() reads hostile text in linear time", () => {
  for (const unit of [" ", "%(", "[", "]", "=", "\n", "\r", "x:\n", "[x]\n"]) {
    const ini = parseIni(`[a]\nx: a${unit.repeat(300_000)}b\n`);
    for (const key of ini.sections[0]?.entries.keys() ?? []) valueOf(ini, ini.sections[0]!, key);
  }
});

Deno.test("printable() escapes control characters and limits the length", () => {
  const text = "a\tb\nc\x1b[31m\x07\u202e\u2028\x9b\ud800é";
  same(printable(text), "a\\tb\\nc\\u{1b}[31m\\u{7}\\u{202e}\\u{2028}\\u{9b}\ufffdé");
  same(printable("x".repeat(100)).length, 80);
});

// one Python process reads all files
const PYTHON = `
import configparser, io, json, sys
def read(text):
    parser = configparser.ConfigParser()
    try:
        parser.read_file(io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8-sig"))
    except configparser.Error:
        return None
    def value(section, key):
        try: return parser.get(section, key)
        except configparser.InterpolationError: return None
    return {s: {k: value(s, k) for k in sorted(parser[s])} for s in parser.sections()}
json.dump([read(text) for text in json.load(sys.stdin)], sys.stdout)
`;

function python(texts: string[]): unknown[] {
  const options = { input: JSON.stringify(texts), maxBuffer: 2 ** 28 };
  return JSON.parse(spawnSync("python3", ["-c", PYTHON], options).stdout.toString());
}

const hasPython = spawnSync("python3", ["--version"]).status === 0;

Deno.test({
  name: `parseIni() agrees with Python's configparser${hasPython ? "" : " (skipped: no python3)"}`,
  ignore: !hasPython,
  fn() {
    const seed = Number(Deno.env.get("LEMATT_SEED") ?? Date.now() % 2 ** 31);
    const texts = [...chains(), ...generate(seed, 6000)];
    const fromPython = python(texts);
    for (const [index, text] of texts.entries()) {
      same(read(text), fromPython[index], `seed ${seed}, file ${index}: ${JSON.stringify(text)}`);
      assertLineNumbers(text);
    }
    const share = fromPython.filter((answer) => answer !== null).length / texts.length;
    ok(
      share > 0.25 && share < 0.75,
      `seed ${seed}: ${share} of the files are valid`,
    );
  },
});

/** Every line number of an entry is that of its text. */
function assertLineNumbers(text: string) {
  const lines = text.split(/\r\n|\r|\n/);
  for (const { entries } of parseIni(text).sections) {
    for (const { spelling, line, lines: numbers, parts } of entries.values()) {
      ok(lines[line - 1]!.includes(spelling));
      parts.forEach((part, index) => ok(lines[numbers[index]! - 1]!.includes(part), JSON.stringify(text)));
    }
  }
}

/** Chains of references, around the depth that is the limit of Python. */
function chains(): string[] {
  return [8, 9, 10, 11, 12].flatMap((length) =>
    ["end", "%%"].map((last) =>
      `[a]\n${Array.from({ length }, (_, n) => `x${n}: %(x${n + 1})s`).join("\n")}\nx${length}: ${last}\n`
    )
  );
}

/** Random files of usual and mistyped lines, every second one mutated. */
function generate(seed: number, count: number): string[] {
  const random = () => { // mulberry32
    seed = (seed + 0x6d2b79f5) | 0;
    let x = Math.imul(seed ^ (seed >>> 15), seed | 1);
    x = (x + Math.imul(x ^ (x >>> 7), x | 61)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
  const pick = <T>(choices: readonly T[]): T => choices[Math.floor(random() * choices.length)]!;
  const chance = (probability: number) => random() < probability;
  const many = (most: number, make: () => string) =>
    Array.from({ length: Math.floor(random() * (most + 1)) }, make).join("");
  const oneOf = (words: string) => () => pick(words.split("~"));

  const blank = oneOf("~~~ ~  ~\t~\u00a0~\u3000~\x1c~\x85~\f");
  const end = oneOf("\n~\n~\n~\n~\r\n~\r~ \n");
  const key = oneOf("x~X~y~Update~long key~é~ẞ~İx~a%b~uploadCerts~z1~z2");
  const text = '~a~[1]~yes~# no~; no~a:b~c=d~["x"]~]~[~é~\u2028~\ufeff~\x1d';
  const word = oneOf(`${text}~%%~%(x)s~%(Y)s~%(no)s~%~%(~%(x~%()s~%(x)d`);
  const value = () => many(3, () => word() + pick(["", " "]));
  const comment = () => `${blank()}${pick(["#", ";", "##", "; #"])}${value()}${end()}`;
  const empty = () => blank() + end();
  const indented = () => `${pick([" ", "  ", "\t", "    "])}${word()}${value()}${end()}`;
  const continuation = () => chance(0.2) ? empty() : chance(0.2) ? comment() : indented();
  const delimiter = () => chance(0.05) ? "" : blank() + pick([":", "=", ": ", " = "]);
  const indent = oneOf("~~~~ ~  ");
  const option = () => `${indent()}${key()}${delimiter()}${value()}${end()}${many(2, continuation)}`;
  const name = oneOf("a~b~c~d~a b~DEFAULT~default~]~A~[a~é");
  const header = () => `${pick(["", "", "", " "])}[${name()}]${pick(["", "", "", "x", "]"])}${end()}`;
  const section = () =>
    header() + many(4, () => (chance(0.8) ? option() : chance(0.5) ? comment() : empty()));
  const mutate = (text: string) => {
    const at = Math.floor(random() * (text.length + 1));
    const cut = Math.floor(random() * 4);
    return text.slice(0, at) + pick(["", " ", "\n", ":", "[", "]", "#", "%", "\t", "x", "\n ", "\r"]) +
      text.slice(at + cut);
  };
  return Array.from({ length: count }, (_, index) => {
    const text = pick(["", "", "", "", "\ufeff", "\n", "# c\n"]) + many(2, section) + section();
    return index % 2 ? mutate(text).toWellFormed() : text;
  });
}
