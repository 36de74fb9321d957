/** Goal: the picture of the house stays legible: arrows point downwards, and each effect and each package has one owner. */

import assert from "node:assert/strict";
import { basename, join } from "node:path";

const ROOT = join(import.meta.dirname!, "..");

/** From the ground up; a file may import files of lower floors only, their types included. */
const FLOORS = [
  "names",
  "ini trust files",
  "context",
  "x509",
  "selfcheck http state",
  "settings",
  "config",
  "hooks probe acme",
  "store challenge",
  "renewal account",
  "endpoints",
  "order",
  "issue",
  "plan",
  "receipts text",
  "deliver",
  "report",
  "status",
  "run",
  "lematt",
].map((floor) => floor.split(" "));

/** Base name without its ending -> its text without comments. */
const sources = new Map(
  [
    ...[...Deno.readDirSync(join(ROOT, "lib"))].map(({ name }) => join(ROOT, "lib", name)),
    ...["lematt.ts", "leforward.ts"].map((name) => join(ROOT, name)),
  ].map((
    path,
  ) => [basename(path, ".ts"), Deno.readTextFileSync(path).replace(/\/\*[^]*?\*\/|(?<=^|\s)\/\/.*/g, "")]),
);

/** What a source imports, and whether it takes no more than types. */
function importsOf(source: string): { from: string; typesOnly: boolean }[] {
  const lines = source.matchAll(/^(?:import|export)\s(?:defer\s)?(?:([^;"]*?)\sfrom\s)?"([^"]+)";/gm);
  const dynamic = source.matchAll(/\bimport\("([^"]+)"\)/g);
  return [
    ...Array.from(lines, ([, clause = "", from]) => {
      const names = /^\{([^}]*)\}$/.exec(clause)?.[1]?.split(",").map((name) => name.trim()).filter((name) =>
        name !== ""
      );
      const typesOnly = clause.startsWith("type ") ||
        (names?.every((name) => name.startsWith("type ")) ?? false);
      return { from: from!, typesOnly };
    }),
    ...Array.from(dynamic, ([, from]) => ({ from: from!, typesOnly: false })),
  ];
}

/** The files in which `pattern` is found. */
function filesWith(pattern: RegExp): string[] {
  return [...sources].filter(([, source]) => pattern.test(source)).map(([name]) => name).sort();
}

Deno.test("arrows point downwards only", () => {
  const floorOf = (name: string) => FLOORS.findIndex((floor) => floor.includes(name));
  for (const [name, source] of sources) {
    if (name === "leforward") continue;
    assert.notEqual(floorOf(name), -1, `${name}.ts has no floor yet`);
    for (const { from } of importsOf(source).filter(({ from }) => from.startsWith("."))) {
      const target = basename(from, ".ts");
      assert.ok(floorOf(target) < floorOf(name), `${name}.ts must not import ${target}.ts`);
    }
  }
});

Deno.test("leforward.ts imports nothing, so that copying it is installing it", () => {
  assert.deepEqual(importsOf(sources.get("leforward")!), []);
});

Deno.test("decisions are pure: they read nothing, ask nobody for the time, and import nothing that does", () => {
  const imports = {
    renewal: ["./x509.ts"],
    endpoints: ["./names.ts", "./renewal.ts"],
    plan: ["./endpoints.ts", "./renewal.ts", "./x509.ts"],
  };
  for (const [name, expected] of Object.entries(imports)) {
    const source = sources.get(name)!;
    const values = importsOf(source).filter(({ typesOnly }) => !typesOnly).map(({ from }) => from);
    assert.deepEqual(values.sort(), expected);
    assert.doesNotMatch(source, /\bDeno\.|new Date\(\)|Date\.now|Math\.random/);
    assert.doesNotMatch(source, /\bdelete |\?\?= |\bstate\.[\w.[\]]+ = /, "they change no state");
  }
});

Deno.test("each package is imported by one file", () => {
  for (
    const [name, owner] of [["jose", "http"], ["zx", "hooks"], ["@peculiar/x509", "x509"], [
      "reflect-metadata",
      "x509",
    ]]
  ) {
    const importers = [...sources].filter(([, source]) =>
      importsOf(source).some(({ from, typesOnly }) => from === name && !typesOnly)
    );
    assert.deepEqual(importers.map(([importer]) => importer), [owner], name);
  }
  const outside = [...sources.values()].flatMap(importsOf).map(({ from }) => from).filter((from) =>
    !/^(\.|node:)/.test(from)
  );
  const { imports } = JSON.parse(Deno.readTextFileSync(join(ROOT, "deno.json")));
  assert.deepEqual([...new Set(outside)].sort(), Object.keys(imports).sort());
});

Deno.test("what is expensive to load is loaded when it is needed", () => {
  for (const source of sources.values()) {
    assert.doesNotMatch(source, /^import (?!type )[^;]*from "(jose|zx|@peculiar\/x509|reflect-metadata)";/m);
  }
});

Deno.test("lematt.ts can be read by an older Deno, which then says that it is one", () => {
  const values = importsOf(sources.get("lematt")!.replace(/\bimport\(.*/g, "")).filter(({ typesOnly }) =>
    !typesOnly
  );
  assert.ok(values.every(({ from }) => from.startsWith("node:")));
});

Deno.test("each effect has its owners", () => {
  const owners: [what: string, pattern: RegExp, files: string[]][] = [
    ["arguments and the end of the process", /\bDeno\.(args|exit)\b|\bprocess\./, ["leforward", "lematt"]],
    ["standard streams", /\bconsole\.|\bDeno\.std(in|out|err)\b/, ["leforward", "lematt"]],
    ["signals to us", /\bDeno\.addSignalListener\b/, ["leforward", "lematt"]],
    ["other processes", /\bDeno\.(Command|kill)\b|child_process/, ["hooks", "probe"]],
    ["randomness", /\bMath\.random\b/, ["context"]],
  ];
  for (const [what, pattern, files] of owners) assert.deepEqual(filesWith(pattern), files, what);
});

Deno.test("the programs run with named permissions, and none has all", () => {
  const { permissions } = JSON.parse(Deno.readTextFileSync(join(ROOT, "deno.json")));
  assert.deepEqual(Object.keys(permissions.lematt).sort(), ["env", "net", "read", "run", "sys", "write"]);
  assert.deepEqual(Object.keys(permissions.leforward).sort(), ["env", "net"]);
  const firstLine = (name: string) => Deno.readTextFileSync(join(ROOT, name)).split("\n")[0]!;
  assert.match(firstLine("lematt.ts"), /^#!\/usr\/bin\/env -S .*deno run .*-P=lematt/);
  assert.match(firstLine("leforward.ts"), /^#!\/usr\/bin\/env -S .*deno run .*-N -E=SSH_ORIGINAL_COMMAND/); // it has no deno.json
  for (const name of ["lematt.ts", "leforward.ts"]) {
    assert.doesNotMatch(firstLine(name), / (-A|--allow-all)\b/);
  }
});

Deno.test("what is written twice is the same: version, flags of V8, permissions of lematt and of the tests", () => {
  const text = (name: string) => Deno.readTextFileSync(join(ROOT, name));
  const { version, permissions, tasks } = JSON.parse(text("deno.json"));
  assert.equal(/^const VERSION = "(.*)";$/m.exec(text("lematt.ts"))?.[1], version);
  const flagsOf = (text: string) => text.match(/--v8-flags=\S+/g);
  for (const name of ["lematt", "leforward"]) {
    const [line] = text(`${name}.ts`).split("\n");
    assert.equal(flagsOf(line!)?.length, 1);
    assert.deepEqual(flagsOf(tasks[`compile:${name}`]), flagsOf(line!));
  }
  assert.deepEqual(permissions.tests, permissions.lematt);
});
