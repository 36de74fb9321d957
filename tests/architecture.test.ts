/** Goal: the structure stays simple: imports point downwards, and each package and side effect belongs to one file. */

import assert from "node:assert/strict";
import { basename, join } from "node:path";
import { ROOT, run } from "./programs.ts";

/** From the lowest to the highest. */
const LAYERS = [
  ...["names", "ini trust files", "context", "x509", "selfcheck http state", "settings", "config"],
  ...["hooks probe acme", "store challenge", "renewal account", "endpoints", "order", "issue", "plan"],
  ...["receipts text", "deliver", "report", "status", "run", "lematt"],
].map((layer) => layer.split(" "));

const textOf = (...names: string[]) => Deno.readTextFileSync(join(ROOT, ...names));
const { version, permissions, tasks, imports: packages } = JSON.parse(textOf("deno.json"));

/** Base name without its ending -> its text without comments. */
const sources = new Map(["leforward", ...LAYERS.flat()].map((name) => {
  const path = /^le/.test(name) ? `${name}.ts` : `lib/${name}.ts`;
  return [name, textOf(path).replace(/\/\*[^]*?\*\/|(?<=^|\s)\/\/.*/g, "")];
}));

interface Module {
  specifier: string;
  dependencies?: { specifier: string; code?: unknown }[]; // without `code` only types are imported
}
const graph = await run(Deno.execPath(), "info", "--json", join(ROOT, "lematt.ts"));
const imports = (JSON.parse(graph).modules as Module[]).flatMap(({ specifier, dependencies = [] }) => {
  const file = basename(specifier, ".ts");
  return dependencies.map(({ specifier, code }) => ({ file, from: specifier, types: code === undefined }));
});

Deno.test("a file imports only from lower layers, also if it imports only types", () => {
  const layerOf = (name: string) => LAYERS.findIndex((layer) => layer.includes(name));
  for (const { name } of Deno.readDirSync(join(ROOT, "lib"))) {
    assert.ok(sources.has(basename(name, ".ts")), name);
  }
  for (const { file, from } of imports.filter(({ from }) => from.startsWith("."))) {
    assert.ok(layerOf(basename(from, ".ts")) < layerOf(file), `${file}.ts must not import ${from}`);
  }
});

Deno.test("modules that decide are pure: they read no files and no clock, and import nothing that does", () => {
  const allowed = {
    renewal: ["./x509.ts"],
    endpoints: ["./names.ts", "./renewal.ts"],
    plan: ["./endpoints.ts", "./renewal.ts", "./x509.ts"],
  };
  for (const [name, expected] of Object.entries(allowed)) {
    const found = imports.filter(({ file, types }) => file === name && !types).map(({ from }) => from);
    assert.deepEqual(found.sort(), expected);
    assert.doesNotMatch(sources.get(name)!, /\bDeno\.|new Date\(\)|Date\.now|Math\.random/);
    assert.doesNotMatch(sources.get(name)!, /\bdelete |\?\?= |\bstate\.[\w.[\]]+ = /, "they change no state");
  }
});

Deno.test("each package is imported by one file, and only when it is needed, since that is slow; leforward.ts imports nothing", () => {
  const used = imports.filter(({ from, types }) => !/^(\.|node:)/.test(from) && !types);
  assert.deepEqual(used.map(({ file, from }) => `${file}: ${from}`).sort(), [
    "hooks: zx",
    "http: jose",
    "x509: @peculiar/x509",
    "x509: reflect-metadata",
  ]);
  assert.deepEqual(used.map(({ from }) => from).sort(), Object.keys(packages).sort());
  for (const source of sources.values()) {
    assert.doesNotMatch(source, /^import (?!type )[^;]*from "(jose|zx|@peculiar\/x509|reflect-metadata)";/m);
  }
  assert.doesNotMatch(sources.get("leforward")!, /^import |\bimport\(/m);
  assert.doesNotMatch(
    sources.get("lematt")!,
    /^import (?!type )[^;]*from "(?!node:)/m,
    "else an older Deno fails",
  );
});

Deno.test("permissions, version and V8 flags are the same in deno.json and the programs", () => {
  assert.deepEqual(Object.keys(permissions.lematt).sort(), ["env", "net", "read", "run", "sys", "write"]);
  assert.deepEqual(permissions.leforward, { net: true, env: ["SSH_ORIGINAL_COMMAND"] });
  assert.deepEqual(permissions.tests, permissions.lematt);
  assert.equal(/^const VERSION = "(.*)";$/m.exec(textOf("lematt.ts"))?.[1], version);
  const begin = "^#!/usr/bin/env -S DENO_NO_UPDATE_CHECK=1 deno run -q --no-prompt";
  const flags = { lematt: "-P=lematt", leforward: "-N -E=SSH_ORIGINAL_COMMAND" };
  for (const [name, own] of Object.entries(flags)) {
    const [line] = textOf(`${name}.ts`).split("\n", 1);
    assert.match(line!, new RegExp(`${begin} .*${own} `));
    assert.deepEqual(tasks[`compile:${name}`].match(/--v8-flags=\S+/g), line!.match(/--v8-flags=\S+/g));
  }
});

Deno.test("only the programs read arguments, print and exit; only hooks and probe run commands", () => {
  const owners: [RegExp, ...string[]][] = [
    [/\bDeno\.(args|exit|std(in|out|err))\b|\bconsole\.|\bprocess\./, "leforward", "lematt"],
    [/\bDeno\.(Command|kill)\b/, "hooks", "probe"],
    [/\bMath\.random\b/, "context"],
  ];
  for (const [pattern, ...files] of owners) {
    const found = [...sources].filter(([, source]) => pattern.test(source)).map(([name]) => name);
    assert.deepEqual(found.sort(), files);
  }
});

Deno.test("no test changes what files that run in parallel share: working directory, umask, environment", () => {
  for (const { name } of Deno.readDirSync(import.meta.dirname!)) {
    assert.doesNotMatch(textOf("tests", name), /\b(Deno|process)\.(chdir|umask|env\.(set|delete))\(/, name);
  }
});
