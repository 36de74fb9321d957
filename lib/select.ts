/** What NAME, WHAT and paths on the command line mean: lines, sections, certificates. */

import type { Config, Line } from "./config.ts";
import { quote, toIdentifier } from "./names.ts";
import type { Selection } from "./renewal.ts";
import { readInventory } from "./store.ts";
import { type Certificate, isKeyOf, readCertificate } from "./x509.ts";

/** What the command line names does not exist, or is ambiguous. */
export class SelectionError extends Error {
  override readonly name = "SelectionError";
}

/** What `--renew`, `--only`, `--deliver` and `--accept` name; undefined if none of them is given. */
export function select(
  config: Config,
  { renew = [], only = [], deliver = [], accept = [], newKey = false }: {
    renew?: readonly string[];
    only?: readonly string[];
    deliver?: readonly string[];
    accept?: readonly string[];
    newKey?: boolean;
  },
): Selection | undefined {
  if (renew.length + only.length + deliver.length + accept.length === 0) return undefined;
  const linesOf = (written: string): Line[] => {
    const lines = linesNamed(config, written);
    if (lines.length === 0) throw new SelectionError(`no line of "domains" has the name ${quote(written)}`);
    return lines;
  };
  const whats = [...deliver, ...accept].map((what): readonly (Line | string)[] => {
    const section = /^\[(.*)\]$/s.exec(what)?.[1];
    if (section === undefined) return linesOf(what);
    if (config.sections.some(({ name }) => name === section)) return [section];
    throw new SelectionError(`no section ${quote(what)} in actions.conf`);
  });
  const isLine = (one: Line | string) => typeof one !== "string";
  const renewed = new Set(renew.flatMap(linesOf));
  return {
    renew: renewed,
    newKey,
    lines: new Set([...renewed, ...only.flatMap(linesOf), ...whats.flat().filter(isLine)]),
    sections: new Set(whats.flat().filter((one) => typeof one === "string")),
    deliver: new Set(whats.slice(0, deliver.length).flat()),
  };
}

/** The lines that have a name, however it is written. */
function linesNamed({ lines }: Config, written: string): Line[] {
  const name = toIdentifier(written);
  return typeof name === "string" ? lines.filter(({ names }) => names.includes(name)) : [];
}

function exists(path: string): boolean {
  try {
    return Deno.statSync(path).isFile;
  } catch {
    return false;
  }
}

/** A certificate that can be revoked, as it was when it was shown. */
export interface Revocable {
  readonly path: string;
  readonly pem: string;
  readonly certificate: Certificate;
  /** Its private key if it is beside it, which may revoke what another account ordered (RFC 8555 §7.6). */
  readonly keyPem?: string;
}

/** The certificates of a line, or the one in a file. Throws SelectionError if `what` is neither. */
export function revocable(config: Config, what: string): Revocable[] {
  const named = linesNamed(config, what);
  if (named.length === 0) {
    if (exists(what)) return [readRevocable(what, keyPathBeside(what))];
    throw new SelectionError(
      `nothing to revoke: ${quote(what)} is neither a name in "domains" nor the path of a certificate`,
    );
  }
  const first = named.filter(({ names }) => names[0] === toIdentifier(what));
  const lines = first.length > 0 ? first : named;
  if (lines.length > 1) {
    const texts = lines.map(({ line, names }) => `line ${line} (${names.join(" ")})`);
    throw new SelectionError(`${quote(what)} is in ${texts.join(" and ")}; give the path of the certificate`);
  }
  const found = readInventory(config)
    .filter(({ line, finding }) => line === lines[0] && "certificate" in finding)
    .map(({ files }) => readRevocable(files.cert, files.key));
  if (found.length === 0) throw new SelectionError(`no certificate of ${what} to revoke`);
  return found;
}

function keyPathBeside(path: string): string {
  return path.replace(/(^|\/)cert\/(?=[^/]*$)/, "$1key/").replace("-cert-combined.", "-key.");
}

function readRevocable(path: string, key: string): Revocable {
  const pem = Deno.readTextFileSync(path);
  let certificate: Certificate;
  try {
    certificate = readCertificate(pem);
  } catch {
    throw new SelectionError(`no certificate in ${path}`);
  }
  try {
    const keyPem = Deno.readTextFileSync(key);
    return { path, pem, certificate, keyPem: isKeyOf(keyPem, pem) ? keyPem : undefined };
  } catch {
    return { path, pem, certificate };
  }
}
