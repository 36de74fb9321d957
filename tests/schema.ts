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
}

const KNOWN =
  /^(\$(schema|id|ref|defs)|title|description|type|format|const|enum|required|properties|items|allOf)$/;

/** Where a document does not match the schema `<name>.schema.json`. */
export function violations(document: unknown, name: string): string[] {
  return [...check(document, read(`${name}.schema.json`), "$")];
}

function read(file: string): Schema {
  const text = Deno.readTextFileSync(join(import.meta.dirname!, "../conf/monitoring", file));
  return JSON.parse(text.replaceAll(`"#/`, `"${file}#/`));
}

/** The schema itself, and all that it refers to or is made of. */
function partsOf(schema: Schema): Schema[] {
  const [file, name] = schema.$ref?.split("#/$defs/") ?? [];
  const parts = file === undefined ? schema.allOf : [read(file).$defs![name!]!];
  return [schema, ...(parts ?? []).flatMap(partsOf)];
}

function typesOf(value: unknown): string[] {
  if (Array.isArray(value)) return ["array"];
  return Number.isInteger(value) ? ["integer", "number"] : [value === null ? "null" : typeof value];
}

function* check(value: unknown, schema: Schema, path: string): Generator<string> {
  const parts = partsOf(schema);
  const types = typesOf(value);
  for (const part of parts) {
    const unknown = Object.keys(part).find((keyword) => !KNOWN.test(keyword));
    if (unknown !== undefined) throw new Error(`unknown keyword ${unknown}`);
    if (part.type !== undefined && !types.includes(part.type)) yield `${path}: not of type ${part.type}`;
    const allowed = "const" in part ? [part.const] : part.enum;
    if (allowed?.includes(value) === false) {
      yield `${path}: ${JSON.stringify(value)} is not one of ${allowed}`;
    }
    const isDate = /^\d{4}-\d\d-\d\dT[\d:.]+Z$/.test(String(value));
    if (part.format === "date-time" && !isDate) yield `${path}: not a date`;
    if (part.items !== undefined && Array.isArray(value)) {
      for (const [index, item] of value.entries()) yield* check(item, part.items, `${path}[${index}]`);
    }
  }
  if (!types.includes("object")) return;
  for (const key of parts.flatMap(({ required = [] }) => required)) {
    if (!Object.hasOwn(value as object, key)) yield `${path}: ${key} is missing`;
  }
  if (parts.every(({ properties }) => properties === undefined)) return; // of any shape
  for (const [key, member] of Object.entries(value as object)) {
    const described = parts.flatMap(({ properties }) => properties?.[key] ?? []);
    for (const property of described) yield* check(member, property, `${path}.${key}`);
    if (described.length === 0) yield `${path}: ${key} is not described`;
  }
}
