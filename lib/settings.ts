/**
 * The keys of lematt.conf and actions.conf: the two tables, with type, spelling and default of each key, and the
 * parsers of their values.
 */

import { dirname, join, resolve } from "node:path";
import * as ini from "./ini.ts";
import {
  type Invalid,
  isInvalid,
  isIP,
  printable,
  quote,
  shellWord,
  toHost,
  toIdentifier,
  toIPv6,
} from "./names.ts";
import { changeable, foreign, mayExist, MISSING, notWritable, readText, statOf } from "./trust.ts";
import { type Curve, CURVES, type KeySpec, keySpecOf, pemBlocks, readCertificate } from "./x509.ts";

export type Mode = "test" | "prod";
export type KeyType = "rsa" | "ec";
export type ChallengeType = "http-01" | "dns-01" | "dns-persist-01";

/** An error, a warning or advice: `file:line: text`, with an optional hint. */
export interface Notice {
  readonly file: string; // base name of one of the three files, or the path of a directory
  readonly line?: number; // absent if the whole file is meant
  readonly text: string;
  readonly hint?: string;
}

/** `host:port[/protocol][#sni]`; host and sni may be the words DOMAIN or DOMAINS_ALL, replaced per certificate. */
export interface Endpoint {
  readonly text: string; // as written
  readonly host: string; // name, IPv4, IPv6 without brackets, or DOMAIN / DOMAINS_ALL
  readonly port: number;
  readonly starttls?: (typeof STARTTLS)[number];
  readonly sni?: string; // after '#'; absent = host when it is a name
}

// ---------------------------------------------------------------------------------------------- the tables

/** Parses a value. */
type Read<T> = (value: Value) => T | Invalid;

interface Setting<T> {
  readonly read: Read<T>;
  readonly fallback?: string;
  readonly spelling?: string; // in the file, if different from the name in the table
}

type Table = Readonly<Record<string, Setting<unknown>>>;
type TypeOf<S> = S extends Setting<infer T> ? T : never;
/** The values of a table; a key with a default always has one. */
export type Values<T> =
  & { readonly [N in keyof T as undefined extends TypeOf<T[N]> ? never : N]: TypeOf<T[N]> }
  & { readonly [N in keyof T as undefined extends TypeOf<T[N]> ? N : never]?: TypeOf<T[N]> };

function setting<T>(read: Read<T>, fallback: string, spelling?: string): Setting<T> {
  return { read, fallback, spelling };
}

function optional<T>(read: Read<T>, spelling?: string): Setting<T | undefined> {
  return { read, spelling };
}

/** A timer of more than 2^31 - 1 milliseconds fires immediately. */
const MAX_SECONDS = Math.floor((2 ** 31 - 1) / 1000);
const MAX_DAYS = 36_500; // a century; more is a typing error
const STARTTLS = ["smtp", "imap", "pop3", "ldap", "ftp", "postgres"] as const;
const YES = ["yes", "true", "on", "1"]; // ConfigParser's getboolean
const NO = ["no", "false", "off", "0"];
const boolean = oneOf<boolean>("yes or no", [true, ...YES], [false, ...NO]);

/** Placeholders to warn of in keys that do not replace them; RECORD and VALUE are too common for that. */
const PLACEHOLDERS = "DOMAIN DOMAINS_CN DOMAINS_ALL CERTS KEYS CERT_FILE KEY_FILE KEY_TYPE".split(" ");

/** [config] of lematt.conf. */
export const SETTINGS = {
  reauthorizeDays: optional(number(0, MAX_DAYS)), // before the end of a certificate
  generateNewCertsAfterDays: setting(number(0, MAX_DAYS), "0"), // 0 = off
  challengeDropDir: optional(dropDirectory), // absolute
  accountKey: optional(accountKeyFile),
  keyTypes: setting(keyTypes, "rsa ec"),
  keyBitsRSA: setting(number(1024, 8192, 8), "2048"),
  curve: setting(
    oneOf<Curve>(
      "prime256v1, secp384r1 or secp521r1",
      ...CURVES.map(({ curve, names }) => [curve, ...names, curve.toLowerCase()] as [Curve, ...string[]]),
    ),
    "prime256v1",
  ),
  rsaTag: setting(tag, "rsa%(keyBitsRSA)s"),
  curveTag: setting(tag, "%(curve)s"),
  alwaysGenerateNewKeys: setting(boolean, "no"),
  prodDirectory: setting(httpsUrl, "https://acme-v02.api.letsencrypt.org/directory", "directory"),
  testDirectory: setting(httpsUrl, "https://acme-staging-v02.api.letsencrypt.org/directory"),
  caBundle: optional(certificates), // PEM text of certificates
  contact: setting(mailUrls, ""),
  parallel: setting(number(1, 100, 1), "10"),
  preflight: setting(
    oneOf<"yes" | "no" | "warn">("yes, no or warn", ["yes", ...YES], ["no", ...NO], ["warn"]),
    "yes",
  ),
  commandTimeoutSeconds: setting(number(0.1, MAX_SECONDS), "600", "commandTimeout"),
  ari: setting(boolean, "yes"),
  profile: optional(word),
  preferredChain: optional(text),
  eabKeyId: optional(word),
  eabHmacKey: optional(hmacKey),
  dnsWaitSeconds: setting(number(0, MAX_SECONDS), "120", "dnsWait"),
  verifyWaitSeconds: setting(number(0, MAX_SECONDS), "60", "verifyWait"),
};
export type Settings = Values<typeof SETTINGS>;

/** Sections of actions.conf. */
export const SECTION_KEYS = {
  domains: optional(domains),
  prepare: setting(commands("DOMAIN"), "[]"),
  uploadCerts: setting(commands("CERTS"), "[]"),
  uploadKeys: setting(commands("KEYS"), "[]"),
  uploadEach: setting(commands("CERT_FILE", "KEY_FILE", "KEY_TYPE", "DOMAIN"), "[]"),
  update: setting(commands("DOMAINS_CN", "DOMAINS_ALL"), "[]"),
  rehearse: setting(boolean, "no"), // whether uploadEach runs under --test
  keyTypes: optional(keyTypes),
  verify: setting(endpoints, "[]"),
  verifyWaitSeconds: optional(number(0, MAX_SECONDS), "verifyWait"),
  alert: setting(commands("SUBJECT", "DOMAINS_CN", "DOMAINS_ALL"), "[]"),
  challenge: optional(
    oneOf<ChallengeType>("http-01, dns-01 or dns-persist-01", ["http-01"], ["dns-01"], ["dns-persist-01"]),
  ),
  dnsPresent: setting(commands("RECORD", "VALUE", "DOMAIN"), "[]"),
  dnsCleanup: setting(commands("RECORD", "VALUE", "DOMAIN"), "[]"),
  dnsParallel: setting(boolean, "no"),
  profile: optional(word),
  ocspStapleRequired: setting(boolean, "no"),
};

/** Part of a value, and its line in the file. */
export interface Word {
  readonly text: string;
  readonly line: number;
}

/** The text of one key, and the file where its problems are noted. A default has line 0 and no problems. */
class Value {
  readonly lines: readonly Word[];
  constructor(readonly source: SourceFile, readonly key: string, readonly text: string, value?: ini.Value) {
    this.lines = value ? ini.linesOf(value) : [{ text, line: 0 }];
  }

  error({ why, hint }: Invalid, line = this.lines[0]!.line) {
    if (line) this.source.error(`${this.key}: ${why}`, line, hint);
  }

  warn({ why, hint }: Invalid, line = this.lines[0]!.line) {
    if (line) this.source.warn(`${this.key}: ${why}`, line, hint);
  }

  /** Words with blanks between them, on one line or several. */
  words(): Word[] {
    return this.lines.flatMap(({ text, line }) => (text.match(/\S+/g) ?? []).map((text) => ({ text, line })));
  }
}

/** A section as messages show it. */
export function title({ name }: { readonly name: string }): string {
  return `[${printable(name)}]`;
}

/** The values of a section, and the lines of the keys that are written there or in [DEFAULT]. */
export function readKeys<T extends Table>(table: T, source: SourceFile, file: ini.Ini, section: ini.Section) {
  const values: Record<string, unknown> = {};
  const written = new Map<string, number>();
  for (const [name, { read, fallback = "", spelling: key = name }] of Object.entries(table)) {
    const found = ini.valueOf(file, section, key.toLowerCase());
    if (!found) continue;
    const { entry: { line }, text, problem } = found;
    if (line) written.set(key, line);
    const value = new Value(source, key, text, found);
    const result = problem ?? read(value);
    if (!isInvalid(result)) values[name] = result;
    else {
      const comment = /\s[#;]/.test(text.slice(0, 1000)) ? "a comment needs a line of its own" : undefined;
      value.error({ why: result.why, hint: result.hint ?? comment });
      // go on with its default, so that what depends on it is checked as well
      const usual = read(new Value(source, key, fallback));
      if (!isInvalid(usual)) values[name] = usual;
    }
  }
  return { values: values as Values<T>, written };
}

/**
 * Warns of keys that are not in `table` and that no %(…)s uses; for that, all values must have been read. The original
 * ignores them. One that resembles a known key is an error.
 */
export function checkUnknown(
  source: SourceFile,
  file: ini.Ini,
  sections: readonly ini.Section[],
  table: Table,
) {
  const [others, place] = table === SETTINGS
    ? [SECTION_KEYS, "a section of actions.conf"]
    : [SETTINGS, "[config] of lematt.conf"];
  const keysOf = (table: Table) => Object.entries(table).map(([name, { spelling = name }]) => spelling);
  const [known, elsewhere] = [keysOf(table), keysOf(others)];
  const isOneOf = (keys: readonly string[], key: string) => keys.some((each) => each.toLowerCase() === key);
  for (const { key, spelling, line } of sections.flatMap(({ entries }) => [...entries.values()])) {
    if (!line || isOneOf(known, key) || file.used.has(key)) continue;
    const unknown = `unknown key ${ini.keyText(spelling)}`;
    const meant = closest(key, known);
    if (isOneOf(elsewhere, key)) source.warn(`${unknown} is ignored`, line, `it belongs in ${place}`);
    else if (meant) source.error(unknown, line, `did you mean ${meant}?`);
    else source.warn(`${unknown} is ignored`, line);
  }
}

/** The choice that differs from `word` by case, dashes, or one or two letters in one place. */
export function closest(word: string, choices: readonly string[]): string | undefined {
  const plain = (text: string) => text.toLowerCase().replace(/[-_\s]/g, "");
  const a = plain(word.slice(0, 40));
  return choices.find((choice) => {
    const b = plain(choice);
    let [start, end] = [0, 0];
    while (start < a.length && a[start] === b[start]) start++;
    while (start + end < Math.min(a.length, b.length) && a.at(-1 - end) === b.at(-1 - end)) end++;
    return Math.max(a.length, b.length) - start - end <= Math.min(2, b.length / 3);
  });
}

export interface Notes {
  readonly errors: Notice[];
  readonly warnings: Notice[];
  readonly advice: Notice[];
}

/** One of the three files, or a directory, and where its problems are noted. */
export class SourceFile {
  constructor(
    readonly directory: string,
    readonly name: string,
    readonly mode: Mode,
    private readonly notes: Notes,
  ) {}

  error = (text: string, line?: number, hint?: string) => this.#note("errors", text, line, hint);
  warn = (text: string, line?: number, hint?: string) => this.#note("warnings", text, line, hint);
  advise = (text: string, line?: number, hint?: string) => this.#note("advice", text, line, hint);

  #note(kind: keyof Notes, text: string, line?: number, hint?: string) {
    const file = printable(this.name, 200);
    this.notes[kind].push({ file, ...line && { line }, text, ...hint !== undefined && { hint } });
  }

  /** Notes the problems of a file or directory; true if there are none. */
  check(path: string, ...checks: readonly ((path: string) => Invalid | undefined)[]): boolean {
    const found = checks.flatMap((check) => check(path) ?? []);
    for (const { why, hint } of found) this.error(why, undefined, hint);
    return found.length === 0;
  }

  /** The text of the file; undefined, after an error, if it cannot be read or trusted. */
  read(hintIfMissing: string): string | undefined {
    const path = join(this.directory, this.name);
    const text = readText(path);
    if (isInvalid(text)) {
      return void this.error(text.why, undefined, mayExist(path) ? undefined : hintIfMissing);
    }
    if (!this.check(path, changeable, ...this.name === "domains" ? [] : [foreign])) return undefined;
    const lost = text.indexOf("\ufffd"); // bytes that are not UTF-8
    if (lost >= 0) this.error("not UTF-8", text.slice(0, lost).split(/\r\n|\r|\n/).length);
    return text;
  }

  parse(text: string, table: Table): ini.Ini {
    const defaults = Object.entries(table).flatMap(([name, { spelling = name, fallback }]) =>
      fallback === undefined ? [] : [[spelling, fallback]]
    );
    const file = ini.parseIni(text, Object.fromEntries(defaults));
    for (const { text, line, hint } of file.problems) this.error(text, line, hint);
    return file;
  }
}

// ---------------------------------------------------------------------------------------- what a value can be

/** One line, not empty. */
function text({ text: written, lines }: Value): string | Invalid {
  const text = written.trim();
  if (text === "") return { why: "no value", hint: "write one, or remove the line" };
  if (text.includes("\n")) {
    const next = lines.find(({ line }) => line > lines[0]!.line);
    const hint = next && `line ${next.line} is indented, so it continues this one`;
    return { why: "more than one line", hint };
  }
  return /\p{Cc}/u.test(text) ? { why: "control character" } : text;
}

/** `read` applied to one line of text. */
function ofText<T>(value: Value, read: (text: string) => T | Invalid): T | Invalid {
  const found = text(value);
  return isInvalid(found) ? found : read(found);
}

function word(value: Value): string | Invalid {
  return ofText(value, (text) => /\s/.test(text) ? { why: `${quote(text)} is more than one word` } : text);
}

/** One of several values, each with its spellings; without any, it is spelled as it is. */
function oneOf<T>(names: string, ...choices: [value: T, ...spellings: string[]][]): Read<T> {
  return (value) =>
    ofText(value, (text) => {
      const spelling = text.toLowerCase();
      const choice = choices.find(([value, ...spellings]) =>
        spellings.length ? spellings.includes(spelling) : value === spelling
      );
      return choice ? choice[0] : { why: `${quote(text)} is not ${names}` };
    });
}

/** A number as Python's float() takes it, within a range. */
function number(min: number, max: number, step = 0): Read<number> {
  const kind = step === 0 ? "a number" : step === 1 ? "a whole number" : `a multiple of ${step}`;
  return (value) =>
    ofText(value, (text) => {
      const digits = text.replace(/(?<=\d)_(?=\d)/g, "");
      const number = /^\+?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?$/i.test(digits) ? Number(digits) : NaN;
      if (number >= min && number <= max && (!step || number % step === 0)) return number;
      return { why: `${quote(text)} is not ${kind} from ${min} to ${max}` };
    });
}

/** Part of a file name; safe in commands, like the path of the configuration directory. */
function tag(value: Value): string | Invalid {
  return ofText(value, (text) => {
    if (/^[A-Za-z0-9._@+,:%-]{1,64}$/.test(text)) return text;
    const hint = "up to 64 letters, digits and . _ - @ + , : %";
    return { why: `${quote(text)} cannot be part of a file name`, hint };
  });
}

function httpsUrl(value: Value): string | Invalid {
  return ofText(value, (text) => {
    const url = URL.parse(text);
    if (url?.protocol === "https:" && !url.username && !url.password && !url.hash) return url.href;
    return { why: `${text.includes("@") ? "it" : quote(text)} is not a plain https URL` }; // it may hold a password
  });
}

function keyTypes(value: Value): KeyType[] | Invalid {
  const words = value.words().map(({ text }) => text);
  const other = words.find((word) => word !== "rsa" && word !== "ec");
  if (words.length && !other) return [...new Set(words as KeyType[])];
  return { why: other ? `${quote(other)} is not rsa or ec` : "no value", hint: "rsa, ec or both" };
}

/** RFC 8555 §7.3: one address a URL, no header fields. */
function mailUrls(value: Value): string[] {
  return value.words().map(({ text, line }) => {
    const address = text.replace(/^mailto:/i, "");
    const isOne = /^[\w.!#$&'*+/=^`{|}~-]{1,64}@[A-Za-z0-9.-]{1,255}$/.test(address);
    const problem = { why: `${quote(text)} is not a mail address`, hint: "separate them by blanks" };
    if (!isOne) value.error(problem, line);
    return `mailto:${address}`;
  });
}

/** The names of a section. The original accepts any word here, and ignores those that no line has. */
function domains(value: Value): Word[] {
  const words = value.words();
  if (!words.length) value.warn({ why: "no names, so this section does nothing" });
  return words.flatMap(({ text, line }) => {
    const name = toIdentifier(text);
    if (!isInvalid(name)) return [{ text: name, line }];
    value.warn({ ...name, why: `invalid name ${quote(text)} is ignored: ${name.why}` }, line);
    return [];
  });
}

/** Command lines with these placeholders: whole words, not after `$`, `{` or a backslash. */
function commands(...replaced: string[]): Read<string[]> {
  const words = [...new Set([...PLACEHOLDERS, ...replaced])].join("|");
  const placeholder = new RegExp(`(?<![\\w\\\\])([$]?[{]|[$])?(${words})(?!\\w)`, "g");
  return (value) =>
    list(value).map(({ text, line }) => {
      const isArgument = !text.includes("\0") && text.isWellFormed();
      if (!isArgument) value.error({ why: `NUL or unpaired surrogate in ${quote(text)}` }, line);
      for (const [all, behind, word] of text.matchAll(placeholder)) {
        const isOurs = replaced.includes(word!);
        const hint = isOurs ? `write ${word}, or $LEMATT_${word}` : `here it is ${replaced.join(", ")}`;
        if (behind || !isOurs) value.warn({ why: `"${all}" is not replaced`, hint }, line);
      }
      return text;
    });
}

function endpoints(value: Value): Endpoint[] {
  return list(value).flatMap(({ text, line }) => {
    const endpoint = toEndpoint(text);
    if (!isInvalid(endpoint)) return [endpoint];
    value.error({ ...endpoint, why: `${quote(text)}: ${endpoint.why}` }, line);
    return [];
  });
}

/** `host:port[/protocol][#sni]`. */
function toEndpoint(text: string): Endpoint | Invalid {
  const parts = /^(\[[^\]]*\]|[^:/#]*)(?::([^:/#]*))?(?:\/([^/#]*))?(?:#(.*))?$/s.exec(text);
  if (!parts) return { why: "not host:port", hint: "write an IPv6 address in brackets: [2001:db8::7]:443" };
  const [, hostText = "", portText, protocol, sniText] = parts;
  if (portText === undefined) return { why: "no port", hint: `such as ${printable(hostText)}:443` };
  const port = /^\d{1,5}$/.test(portText) ? Number(portText) : 0;
  if (port < 1 || port > 65535) return { why: `${quote(portText)} is not a port` };
  const starttls = STARTTLS.find((known) => known === protocol);
  if (protocol !== undefined && !starttls) {
    const hint = `${STARTTLS.join(", ")}; none for TLS from the start`;
    return { why: `unknown protocol ${quote(protocol)} for STARTTLS`, hint };
  }
  const address = /^\[(.*)\]$/s.exec(hostText)?.[1];
  const host = address === undefined
    ? toHost(hostText)
    : toIPv6(address) ?? { why: "no IPv6 address in brackets" };
  if (isInvalid(host)) return host;
  const sni = sniText === undefined ? undefined : toHost(sniText);
  if (isInvalid(sni)) return { ...sni, why: `after "#": ${sni.why}` };
  if (sni !== undefined && isIP(sni)) return { why: `after "#": an address cannot be a server name` };
  return Object.freeze({ text, host, port, ...starttls && { starttls }, ...sni && { sni } });
}

const STRING = /"(?:[^"\\]|\\.)*"/g;
/** The longest beginning of a text that can be the beginning of a list of strings. */
const LIST_START = new RegExp(
  `^\\s*(?:\\[(?:\\s*STRING\\s*,)*(?:\\s*STRING)?\\s*(?:(?<!,\\s*)\\]\\s*)?)?`
    .replaceAll("STRING", `"(?:[^"\\\\\\x00-\\x1f]|\\\\(?:["\\\\/bfnrt]|u[0-9a-fA-F]{4}))*"`),
);

/** The items of a JSON array of strings; after an error, none. */
function list(value: Value): Word[] {
  try {
    const items: unknown = JSON.parse(value.text);
    if (Array.isArray(items) && items.every((item) => typeof item === "string")) {
      return value.lines.flatMap(({ text, line }) =>
        // a JSON string has no line breaks
        Array.from(text.matchAll(STRING), ([string]) => ({ text: JSON.parse(string), line }))
      );
    }
  } catch { /* whose message has a position only sometimes */ }
  const [done] = LIST_START.exec(value.text)!;
  const rest = value.text.slice(done.length).trimEnd();
  let why = rest ? `unexpected ${quote(rest.slice(0, 30))}` : `no "]" at its end`;
  let hint = 'a string is in double quotes, with \\\\ for \\ and \\" for " in it, and a comma between two';
  if (done.trim() === "") {
    const meant = value.lines.map(({ text }) => text.trim().replace(/^(["'])(.*)\1$/, "$2")).filter(Boolean);
    const list = `[${meant.map((line) => JSON.stringify(line)).join(", ")}]`.replaceAll("%", "%%");
    why = `no "[" at its beginning`;
    hint = `write ${list.length < 200 ? printable(list, 200) : '["…"]'}`;
  } else if (done.trimEnd().endsWith("]")) hint = "a comment needs a line of its own";
  const at = done.trim() === "" ? 0 : done.split("\n").length - 1;
  value.error({ why: `not a JSON list of strings: ${why}`, hint }, value.lines[at]!.line);
  return [];
}

// ------------------------------------------------------------------------------------------------ paths

/** An absolute path; if written as relative, then to the configuration directory. */
function path(value: Value): string | Invalid {
  return ofText(value, (text) => {
    if (/^[~$]/.test(text)) {
      return { why: `"${text[0]}" is not expanded here`, hint: "write the path in full" };
    }
    const path = resolve(value.source.directory, text);
    if (mayExist(path)) return path;
    // the original took paths as relative to the working directory
    const here = resolve(Deno.cwd(), text);
    const hint = `write ${shellWord(here)} if it is meant`;
    return path === here || !mayExist(here)
      ? path
      : { why: `no ${quote(text)} in ${value.source.directory}`, hint };
  });
}

/** `read` applied to a path. */
function ofPath<T>(value: Value, read: (path: string) => T | Invalid): T | Invalid {
  const found = path(value);
  return isInvalid(found) ? found : read(found);
}

/** `read` applied to the text of a secret file. */
function ofSecret<T>(value: Value, path: string, read: (text: string) => T | Invalid): T | Invalid {
  const content = readText(path);
  if (isInvalid(content)) return content;
  const isOpen = statOf(path).mode & 0o044;
  if (isOpen) value.warn({ why: `others may read ${quote(path)}`, hint: `chmod 600 ${shellWord(path)}` });
  return changeable(path) ?? read(content);
}

/** The directory for challenges. Who can write to it can get certificates for our names; a web server's group may. */
function dropDirectory(value: Value): string | Invalid {
  return ofPath(value, (path) => {
    if (!mayExist(path)) return { why: `${quote(path)}: ${MISSING}`, hint: `mkdir -p ${shellWord(path)}` };
    return notWritable(path) ?? changeable(path, "o-w") ?? path;
  });
}

/** The path of the account key; the first run makes the file if it is missing. */
function accountKeyFile(value: Value): string | Invalid {
  return ofPath(value, (path) => {
    const keyOfTest = `${path}.test`; // see accountKeyPath() of account.ts
    const found = value.source.mode === "test" && mayExist(keyOfTest) ? accountKey(value, keyOfTest) : path;
    if (isInvalid(found)) return found;
    if (mayExist(path)) return accountKey(value, path);
    let parent = dirname(path);
    while (!mayExist(parent)) parent = dirname(parent);
    return notWritable(parent) ?? path;
  });
}

/** `path`, if it holds a private key that an account can have. */
function accountKey(value: Value, path: string): string | Invalid {
  return ofSecret(value, path, (content) => {
    const error = (why: string, hint?: string) => ({ why: `${quote(path)} ${why}`, hint });
    const blocks = pemBlocks(content);
    const block = blocks.find(({ label }) => /^((RSA|EC|ENCRYPTED) )?PRIVATE KEY$/.test(label));
    if (!block) {
      return error(`holds ${blocks[0] ? `a ${blocks[0].label}` : "nothing in PEM"}, not a private key`);
    }
    if (block.label.startsWith("ENCRYPTED") || block.pem.includes("Proc-Type: 4,ENCRYPTED")) {
      return error("is encrypted", `openssl pkey -in ${shellWord(path)} -out FILE`);
    }
    let spec: KeySpec | string;
    try {
      spec = keySpecOf(block.pem);
    } catch { // its message may quote the key
      return error("holds a private key that cannot be decoded");
    }
    if (typeof spec === "object" && (spec.type === "ec" || spec.bits >= 2048)) return path;
    const type = typeof spec === "string" ? spec : "RSA of less than 2048 bits";
    return error(`is a key of type ${type}`, "an account needs RSA of 2048 bits, P-256, P-384 or P-521");
  });
}

/** The key for external account binding (RFC 8555 §7.3.4), in base64 of either alphabet. */
function hmacKey(value: Value): Uint8Array | Invalid {
  return ofPath(value, (path) => {
    // the value is not shown: it may be the key itself
    if (!mayExist(path)) {
      return { why: "no such file", hint: "write the key into a file, and its path here" };
    }
    return ofSecret(value, path, (content) => {
      try {
        const text = content.trim().replaceAll("+", "-").replaceAll("/", "_");
        const key = Uint8Array.fromBase64(text, { alphabet: "base64url" });
        if (key.length) return key;
      } catch { /* whose message may quote the key */ }
      return { why: `${quote(path)} holds no base64`, hint: "copy the key as the CA shows it" };
    });
  });
}

/** The certificates of a PEM file, without anything else that is in it. */
function certificates(value: Value): string | Invalid {
  return ofPath(value, (path) => {
    const content = readText(path);
    if (isInvalid(content)) return content;
    const pems = pemBlocks(content).flatMap(({ label, pem }) => label === "CERTIFICATE" ? [`${pem}\n`] : []);
    try {
      for (const pem of pems) readCertificate(pem);
    } catch {
      return { why: `${quote(path)} holds a certificate that cannot be decoded` };
    }
    return changeable(path) ?? (pems.join("") || { why: `${quote(path)} holds no certificate in PEM` });
  });
}
