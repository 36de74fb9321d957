/** Goal: the structure stays simple: imports point downwards, and each side effect and each package belongs to one file. */

import assert from "node:assert/strict";
import { basename, join } from "node:path";

const ROOT = join(import.meta.dirname!, "..");

/** From the lowest layer to the highest; a file may import only from lower layers, also when it imports only types. */
const LAYERS = [
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
].map((layer) => layer.split(" "));

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

Deno.test("a file imports only from lower layers", () => {
  const layerOf = (name: string) => LAYERS.findIndex((layer) => layer.includes(name));
  for (const [name, source] of sources) {
    if (name === "leforward") continue;
    assert.notEqual(layerOf(name), -1, `${name}.ts has no layer yet`);
    for (const { from } of importsOf(source).filter(({ from }) => from.startsWith("."))) {
      const target = basename(from, ".ts");
      assert.ok(layerOf(target) < layerOf(name), `${name}.ts must not import ${target}.ts`);
    }
  }
});

Deno.test("leforward.ts imports nothing, so it is installed by copying one file", () => {
  assert.deepEqual(importsOf(sources.get("leforward")!), []);
});

Deno.test("modules that decide are pure: they read no files and no clock, and import nothing that does", () => {
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

Deno.test("modules that are slow to load are loaded only when they are needed", () => {
  for (const source of sources.values()) {
    assert.doesNotMatch(source, /^import (?!type )[^;]*from "(jose|zx|@peculiar\/x509|reflect-metadata)";/m);
  }
});

Deno.test("an older Deno can parse lematt.ts, which then reports that Deno is too old", () => {
  const values = importsOf(sources.get("lematt")!.replace(/\bimport\(.*/g, "")).filter(({ typesOnly }) =>
    !typesOnly
  );
  assert.ok(values.every(({ from }) => from.startsWith("node:")));
});

Deno.test("each side effect occurs only in the files that own it", () => {
  const owners: [what: string, pattern: RegExp, files: string[]][] = [
    ["arguments and the end of the process", /\bDeno\.(args|exit)\b|\bprocess\./, ["leforward", "lematt"]],
    ["standard streams", /\bconsole\.|\bDeno\.std(in|out|err)\b/, ["leforward", "lematt"]],
    ["signals to us", /\bDeno\.addSignalListener\b/, ["leforward", "lematt"]],
    ["other processes", /\bDeno\.(Command|kill)\b|child_process/, ["hooks", "probe"]],
    ["randomness", /\bMath\.random\b/, ["context"]],
  ];
  for (const [what, pattern, files] of owners) {
    const found = [...sources].filter(([, source]) => pattern.test(source)).map(([name]) => name);
    assert.deepEqual(found.sort(), files, what);
  }
});

Deno.test("the programs name their permissions, and none has all of them", () => {
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

Deno.test("values written in two places agree: version, V8 flags, permissions of lematt and of the tests", () => {
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

Deno.test("no test changes what all test files of a process share: directory, umask, environment", () => {
  for (const { name } of Deno.readDirSync(import.meta.dirname!)) {
    const text = Deno.readTextFileSync(join(import.meta.dirname!, name));
    assert.doesNotMatch(text, /\b(Deno|process)\.(chdir|umask|env\.(set|delete))\(/, name);
  }
});
