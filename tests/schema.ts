/** Validates documents by the JSON Schemas of conf/monitoring, as far as they use JSON Schema; every key must be described. */

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

const DATE = /^\d{4}-\d\d-\d\dT[\d:.]+Z$/;

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

function isOf(value: unknown, type: string): boolean {
  if (type === "array") return Array.isArray(value);
  if (type === "integer") return Number.isInteger(value);
  return typeof value === type && value !== null && !Array.isArray(value);
}

function* check(value: unknown, schema: Schema, path: string): Generator<string> {
  const parts = partsOf(schema);
  for (const { type, format, required = [], items, ...part } of parts) {
    if (type !== undefined && !isOf(value, type)) yield `${path}: not of type ${type}`;
    const allowed = "const" in part ? [part.const] : part.enum;
    if (allowed?.includes(value) === false) yield `${path}: ${value} is not one of ${allowed}`;
    if (format === "date-time" && !DATE.test(String(value))) yield `${path}: not a date`;
    for (const key of required) if (!Object.hasOwn(Object(value), key)) yield `${path}: ${key} is missing`;
    if (items === undefined || !Array.isArray(value)) continue;
    for (const [index, item] of value.entries()) yield* check(item, items, `${path}[${index}]`);
  }
  const described = parts.flatMap(({ properties = {} }) => Object.entries(properties));
  if (!isOf(value, "object") || described.length === 0) return;
  for (const [key, member] of Object.entries(Object(value))) {
    const schemas = described.filter(([name]) => name === key);
    if (schemas.length === 0) yield `${path}: ${key} is not described`;
    for (const [, property] of schemas) yield* check(member, property, `${path}.${key}`);
  }
}
