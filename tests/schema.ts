/**
 * Validates documents by the JSON Schemas of conf/monitoring, by as much of JSON Schema 2020-12 as they use; in addition,
 * every key of a document must be described.
 */

import { join } from "node:path";

interface Schema {
  readonly $ref?: string;
  readonly $defs?: Readonly<Record<string, Schema>>;
  readonly type?: string;
  readonly format?: string;
  readonly const?: unknown;
  readonly enum?: readonly unknown[];
  readonly required?: readonly string[];
  readonly properties?: Readonly<Record<string, Schema>>;
  readonly items?: Schema;
  readonly allOf?: readonly Schema[];
  readonly [other: string]: unknown;
}

const KNOWN = new Set(
  "$schema $id $ref $defs title description type format const enum required properties items allOf".split(
    " ",
  ),
);

/** Where a document does not match the schema `<name>.schema.json`. */
export function violations(document: unknown, name: string): string[] {
  return [...check(document, read(`${name}.schema.json`), name, "$")];
}

function read(file: string): Schema {
  return JSON.parse(Deno.readTextFileSync(join(import.meta.dirname!, "../conf/monitoring", file)));
}

/** The schema itself, and all that it refers to or is made of, each with the file that it is in. */
function* partsOf(schema: Schema, file: string): Generator<readonly [Schema, string]> {
  yield [schema, file];
  for (const part of schema.allOf ?? []) yield* partsOf(part, file);
  if (schema.$ref === undefined) return;
  const [, other, name] = /^(?:(.*)\.schema\.json)?#\/\$defs\/(.*)$/.exec(schema.$ref)!;
  const target = read(`${other ?? file}.schema.json`).$defs![name!];
  if (target === undefined) throw new Error(`${file}: ${schema.$ref} leads nowhere`);
  yield* partsOf(target, other ?? file);
}

function* check(value: unknown, schema: Schema, file: string, path: string): Generator<string> {
  const described = new Set<string>();
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  const object = (isObject ? value : {}) as Record<string, unknown>;
  let open = false;
  for (const [part, home] of partsOf(schema, file)) {
    for (const keyword of Object.keys(part)) if (!KNOWN.has(keyword)) throw new Error(`${home}: ${keyword}?`);
    const { type, properties = {} } = part;
    const types = { object: isObject, array: Array.isArray(value), integer: Number.isInteger(value) };
    if (type !== undefined && !(types[type as keyof typeof types] ?? typeof value === type)) {
      yield `${path}: no ${type}`;
    }
    if (part.const !== undefined && value !== part.const) yield `${path}: not ${part.const}`;
    if (part.enum?.includes(value) === false) {
      yield `${path}: ${JSON.stringify(value)} is not one of ${part.enum}`;
    }
    if (part.format === "date-time" && !/^\d{4}-\d\d-\d\dT[\d:.]+Z$/.test(String(value))) {
      yield `${path}: no date`;
    }
    for (const key of part.required ?? []) {
      if (!Object.hasOwn(object, key)) yield `${path}: ${key} is missing`;
    }
    if (type === "object" && part.properties === undefined) open = true;
    for (const [key, property] of Object.entries(properties)) {
      described.add(key);
      if (Object.hasOwn(object, key)) yield* check(object[key], property, home, `${path}.${key}`);
    }
    if (part.items === undefined || !Array.isArray(value)) continue;
    for (const [index, item] of value.entries()) yield* check(item, part.items, home, `${path}[${index}]`);
  }
  if (open) return;
  for (const key of Object.keys(object)) if (!described.has(key)) yield `${path}: ${key} is not described`;
}
