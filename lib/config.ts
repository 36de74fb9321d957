/**
 * The three files of a configuration directory (`lematt.conf`, `domains`, `actions.conf`) -> one validated, frozen
 * `Config` for one mode, or every error of all three at once, each with its file, line and, where it is known, a hint.
 *
 * Reads files, never writes, uses no network, shows no secret. The values of a `Config` are safe in file names, requests
 * to the CA and commands. Challenges: RFC 8555 §8.
 */
import { basename, dirname, join, resolve } from "node:path";
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

/** One section of actions.conf: the keys of SECTION_KEYS, and: */
export interface Section
  extends
    Omit<Values<typeof SECTION_KEYS>, "domains" | "ocspStapleRequired" | "keyTypes" | "verifyWaitSeconds"> {
  readonly name: string; // "default", "every" or an override's name
  readonly line: number; // of its header
  readonly domains: readonly string[]; // empty for default and every; normalised like `domains`
  readonly keyTypes: readonly KeyType[]; // which certificates are delivered here: its own, else lematt.conf's
  readonly verifyWaitSeconds: number; // its own, else lematt.conf's
}

/** One line of `domains`: one certificate for each key type. */
export interface Line {
  readonly line: number; // in the file `domains`
  /** Primary first; the rest de-duplicated and sorted by reversed labels without the last one (ties: by the name). */
  readonly names: readonly string[];
  /** Those that deliver it: overrides with any of its names, default if any name is in no override, every last. */
  readonly sections: readonly Section[];
  /** All key types of its sections; those of lematt.conf if only [every] delivers it. */
  readonly keyTypes: readonly KeyType[];
  readonly profile?: string; // from its sections, else [config]
  /** The names as the Python original wrote them in file names, if different: in their case, with a repeated primary. */
  readonly formerNames: readonly (readonly string[])[];
}

/** The configuration for one mode: the keys of SETTINGS, and: */
export interface Config
  extends Omit<Settings, "prodDirectory" | "testDirectory" | "eabKeyId" | "eabHmacKey" | "accountKey"> {
  readonly mode: Mode;
  readonly directory: string; // absolute real path of the configuration directory
  readonly file: string; // absolute path of lematt.conf
  readonly base: string; // `directory`/`mode`, where keys and certificates are
  readonly accountKey: string; // absolute path; the file need not exist yet
  readonly directoryUrl: string; // of this mode's CA
  readonly eab?: { readonly keyId: string; readonly hmacKey: Uint8Array };
  readonly sections: readonly Section[];
  readonly lines: readonly Line[];
  readonly warnings: readonly Notice[]; // shown in every run
  readonly advice: readonly Notice[]; // shown by --check
}

/** All errors of the three files, sorted: lematt.conf, domains, actions.conf; each by line. */
export class ConfigError extends Error {
  override readonly name = "ConfigError";
  constructor(
    readonly problems: readonly Notice[],
    /** The configuration directory, if found. */
    readonly directory?: string,
    /** The `alert` commands that could be read; none if other users may write the configuration. */
    readonly alerts: readonly { readonly section: string; readonly commands: readonly string[] }[] = [],
  ) {
    const textOf = ({ file, line, text }: Notice) => [file, line, ` ${text}`].filter(Boolean).join(":");
    super(problems.map(textOf).join("\n"));
  }
}

/**
 * Reads and validates all three files for one mode. `path` is lematt.conf or its directory; the defaults are ./conf, then
 * `beside`, the conf beside the program. Relative paths in the files are relative to the directory of the real lematt.conf.
 * Throws ConfigError with every error of all three.
 */
export function loadConfig(mode: Mode, path?: string, beside?: string): Config {
  const { file, passedOver } = locate(path, beside);
  const directory = dirname(file);
  const base = join(directory, mode);
  const notes: Notes = { errors: [], warnings: [...passedOver], advice: [] };
  const page = (name: string) => new Page(directory, name, mode, notes);
  const pages = [page(basename(file)), page("domains"), page("actions.conf")] as const;
  const isTrusted = checkDirectories(directory, base, page(base));

  const { settings, missing } = readSettings(pages[0]);
  const { sections, named } = readActions(pages[2], settings);
  const lines = assign(readDomains(pages[1], path === undefined), sections, pages[1], settings);
  checkSections(sections, named, lines, pages[2]);
  const isHttp = (name: string) => challengeOf({ sections }, name) === "http-01";
  const name = lines.flatMap(({ names }) => names).find(isHttp);
  const served = `http://${name}/.well-known/acme-challenge/`; // RFC 8555 §8.3
  if (name) missing("challengeDropDir", `the directory that is served as ${served}`);

  const order = pages.map(({ name }) => name);
  const sorted = (notices: readonly Notice[]) =>
    // A value of [DEFAULT] is read for each section, its problems are shown once.
    [...new Map(notices.map((notice) => [JSON.stringify(notice), notice])).values()]
      .sort((a, b) => order.indexOf(a.file) - order.indexOf(b.file) || (a.line ?? 0) - (b.line ?? 0));
  if (notes.errors.length) {
    const alerting = isTrusted ? sections.filter(({ alert }) => alert.length) : [];
    const alerts = alerting.map(({ name, alert }) => ({ section: name, commands: alert }));
    throw new ConfigError(sorted(notes.errors), directory, alerts);
  }
  const { prodDirectory, testDirectory, eabKeyId: keyId, eabHmacKey: hmacKey, ...rest } = settings;
  return Object.freeze({
    ...rest,
    mode,
    directory,
    file,
    base,
    accountKey: rest.accountKey!,
    directoryUrl: { prod: prodDirectory, test: testDirectory }[mode],
    ...keyId && hmacKey && { eab: { keyId, hmacKey } },
    sections: Object.freeze(sections),
    lines: Object.freeze(lines),
    warnings: Object.freeze(sorted(notes.warnings)),
    advice: Object.freeze(sorted(notes.advice)),
  });
}

/** The sections of one name: the overrides that name it, else default; then every. */
export function sectionsOf({ sections }: Pick<Config, "sections">, name: string): readonly Section[] {
  return routes(sections)(name);
}

/** The challenge for `name`: that of its sections, else http-01. */
export function challengeOf(config: Pick<Config, "sections">, name: string): ChallengeType {
  return sectionsOf(config, name).find(({ challenge }) => challenge)?.challenge ?? "http-01";
}

// ------------------------------------------------------------------------------------------------ all the keys

/** Parses a value. */
type Read<T> = (value: Value) => T | Invalid;

interface Key<T> {
  readonly read: Read<T>;
  readonly or?: string; // the default
  readonly key?: string; // its name in the file, if another than in the table
}

type Table = Readonly<Record<string, Key<unknown>>>;
type TypeOf<K> = K extends Key<infer T> ? T : never;
/** The values of a table; a key with a default always has one. */
type Values<T> =
  & { readonly [N in keyof T as undefined extends TypeOf<T[N]> ? never : N]: TypeOf<T[N]> }
  & { readonly [N in keyof T as undefined extends TypeOf<T[N]> ? N : never]?: TypeOf<T[N]> };

function key<T>(read: Read<T>, or: string, key?: string): Key<T> {
  return { read, or, key };
}

function optional<T>(read: Read<T>, key?: string): Key<T | undefined> {
  return { read, key };
}

/** A timer of more than 2^31 - 1 milliseconds fires at once. */
const MAX_SECONDS = Math.floor((2 ** 31 - 1) / 1000);
const MAX_DAYS = 36_500; // a century; more is a typing error
const STARTTLS = ["smtp", "imap", "pop3", "ldap", "ftp", "postgres"] as const;
const YES = ["yes", "true", "on", "1"]; // ConfigParser's getboolean
const NO = ["no", "false", "off", "0"];
const boolean = oneOf<boolean>("yes or no", [true, ...YES], [false, ...NO]);

/** Placeholders to warn of in keys that do not replace them; RECORD and VALUE are too common for that. */
const PLACEHOLDERS = "DOMAIN DOMAINS_CN DOMAINS_ALL CERTS KEYS CERT_FILE KEY_FILE KEY_TYPE".split(" ");

/** [config] of lematt.conf. */
const SETTINGS = {
  reauthorizeDays: optional(number(0, MAX_DAYS)), // before the end of a certificate
  generateNewCertsAfterDays: key(number(0, MAX_DAYS), "0"), // 0 = off
  challengeDropDir: optional(dropDirectory), // absolute
  accountKey: optional(accountKeyFile),
  keyTypes: key(keyTypes, "rsa ec"),
  keyBitsRSA: key(number(1024, 8192, 8), "2048"),
  curve: key(
    oneOf<Curve>(
      "prime256v1, secp384r1 or secp521r1",
      ...CURVES.map(({ curve, names }) => [curve, ...names, curve.toLowerCase()] as [Curve, ...string[]]),
    ),
    "prime256v1",
  ),
  rsaTag: key(tag, "rsa%(keyBitsRSA)s"),
  curveTag: key(tag, "%(curve)s"),
  alwaysGenerateNewKeys: key(boolean, "no"),
  prodDirectory: key(httpsUrl, "https://acme-v02.api.letsencrypt.org/directory", "directory"),
  testDirectory: key(httpsUrl, "https://acme-staging-v02.api.letsencrypt.org/directory"),
  caBundle: optional(certificates), // PEM text of certificates
  contact: key(mailUrls, ""),
  parallel: key(number(1, 100, 1), "10"),
  preflight: key(
    oneOf<"yes" | "no" | "warn">("yes, no or warn", ["yes", ...YES], ["no", ...NO], ["warn", "warn"]),
    "yes",
  ),
  commandTimeoutSeconds: key(number(0.1, MAX_SECONDS), "600", "commandTimeout"),
  ari: key(boolean, "yes"),
  profile: optional(word),
  preferredChain: optional(text),
  eabKeyId: optional(word),
  eabHmacKey: optional(hmacKey),
  dnsWaitSeconds: key(number(0, MAX_SECONDS), "120", "dnsWait"),
  verifyWaitSeconds: key(number(0, MAX_SECONDS), "60", "verifyWait"),
};
type Settings = Values<typeof SETTINGS>;

/** Sections of actions.conf. */
const SECTION_KEYS = {
  domains: optional(domains),
  prepare: key(commands("DOMAIN"), "[]"),
  uploadCerts: key(commands("CERTS"), "[]"),
  uploadKeys: key(commands("KEYS"), "[]"),
  uploadEach: key(commands("CERT_FILE", "KEY_FILE", "KEY_TYPE", "DOMAIN"), "[]"),
  update: key(commands("DOMAINS_CN", "DOMAINS_ALL"), "[]"),
  rehearse: key(boolean, "no"), // whether uploadEach runs under --test
  keyTypes: optional(keyTypes),
  verify: key(endpoints, "[]"),
  verifyWaitSeconds: optional(number(0, MAX_SECONDS), "verifyWait"),
  alert: key(commands("SUBJECT", "DOMAINS_CN", "DOMAINS_ALL"), "[]"),
  challenge: optional(
    oneOf<ChallengeType>(
      "http-01, dns-01 or dns-persist-01",
      ["http-01", "http-01"],
      ["dns-01", "dns-01"],
      ["dns-persist-01", "dns-persist-01"],
    ),
  ),
  dnsPresent: key(commands("RECORD", "VALUE", "DOMAIN"), "[]"),
  dnsCleanup: key(commands("RECORD", "VALUE", "DOMAIN"), "[]"),
  dnsParallel: key(boolean, "no"),
  profile: optional(word),
  ocspStapleRequired: key(boolean, "no"),
};

/** Part of a value, and its line in the file. */
interface Word {
  readonly text: string;
  readonly line: number;
}

/** The text of one key, and the page where its problems are noted. A default has line 0 and no problems. */
class Value {
  readonly lines: readonly Word[];
  constructor(readonly page: Page, readonly key: string, readonly text: string, value?: ini.Value) {
    this.lines = value ? ini.linesOf(value) : [{ text, line: 0 }];
  }

  error({ why, hint }: Invalid, line = this.lines[0]!.line) {
    if (line) this.page.error(`${this.key}: ${why}`, line, hint);
  }

  warn({ why, hint }: Invalid, line = this.lines[0]!.line) {
    if (line) this.page.warn(`${this.key}: ${why}`, line, hint);
  }

  /** Words with blanks between them, on one line or several. */
  words(): Word[] {
    return this.lines.flatMap(({ text, line }) => (text.match(/\S+/g) ?? []).map((text) => ({ text, line })));
  }
}

/** A section as messages show it. */
function title({ name }: { readonly name: string }): string {
  return `[${printable(name)}]`;
}

/** The values of a section, and the lines of the keys that are written there or in [DEFAULT]. */
function readKeys<T extends Table>(table: T, page: Page, file: ini.Ini, section: ini.Section) {
  const values: Record<string, unknown> = {};
  const written = new Map<string, number>();
  for (const [name, { read, or = "", key = name }] of Object.entries(table)) {
    const found = ini.valueOf(file, section, key.toLowerCase());
    if (!found) continue;
    const { entry: { line }, text, problem } = found;
    if (line) written.set(key, line);
    const value = new Value(page, key, text, found);
    const result = problem ?? read(value);
    if (!isInvalid(result)) values[name] = result;
    else {
      const comment = /\s[#;]/.test(text.slice(0, 1000)) ? "a comment needs a line of its own" : undefined;
      value.error({ why: result.why, hint: result.hint ?? comment });
      // Go on with its default, so that what depends on it is checked as well.
      const usual = read(new Value(page, key, or));
      if (!isInvalid(usual)) values[name] = usual;
    }
  }
  return { values: values as Values<T>, written };
}

/**
 * Warns of keys that are not in `table` and that no %(…)s uses; for that, all values must have been read. The original
 * ignores them. One that resembles a known key is an error.
 */
function checkUnknown(page: Page, file: ini.Ini, sections: readonly ini.Section[], table: Table) {
  const [others, place] = table === SETTINGS
    ? [SECTION_KEYS, "a section of actions.conf"]
    : [SETTINGS, "[config] of lematt.conf"];
  const keysOf = (table: Table) => Object.entries(table).map(([name, { key }]) => key ?? name);
  const [known, elsewhere] = [keysOf(table), keysOf(others)];
  const isOneOf = (keys: readonly string[], key: string) => keys.some((each) => each.toLowerCase() === key);
  for (const { key, spelling, line } of sections.flatMap(({ entries }) => [...entries.values()])) {
    if (!line || isOneOf(known, key) || file.used.has(key)) continue;
    const unknown = `unknown key ${ini.keyText(spelling)}`;
    const meant = closest(key, known);
    if (isOneOf(elsewhere, key)) page.warn(`${unknown} is ignored`, line, `it belongs in ${place}`);
    else if (meant) page.error(unknown, line, `did you mean ${meant}?`);
    else page.warn(`${unknown} is ignored`, line);
  }
}

/** The choice that differs from `word` by case, dashes, or one or two letters in one place. */
function closest(word: string, choices: readonly string[]): string | undefined {
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

/** One of several values, each of which may be written in several ways. */
function oneOf<T>(said: string, ...choices: [value: T, ...spellings: string[]][]): Read<T> {
  return (value) =>
    ofText(value, (text) => {
      const choice = choices.find(([, ...spellings]) => spellings.includes(text.toLowerCase()));
      return choice ? choice[0] : { why: `${quote(text)} is not ${said}` };
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

/** Command lines with these placeholders: whole words, not behind `$`, `{` or a backslash. */
function commands(...replaced: string[]): Read<string[]> {
  const words = [...new Set([...PLACEHOLDERS, ...replaced])].join("|");
  const placeholder = new RegExp(`(?<![\\w\\\\])([$]?[{]|[$])?(${words})(?!\\w)`, "g");
  return (value) =>
    list(value).map(({ text, line }) => {
      const isArgument = !text.includes("\0") && text.isWellFormed();
      if (!isArgument) value.error({ why: `NUL, or half a character, in ${quote(text)}` }, line);
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

// ------------------------------------------------------------------------------------------- files and their owners

/** An absolute path; if written as relative, then to the configuration directory. */
function path(value: Value): string | Invalid {
  return ofText(value, (text) => {
    if (/^[~$]/.test(text)) {
      return { why: `no shell replaces "${text[0]}" here`, hint: "write the path in full" };
    }
    const path = resolve(value.page.directory, text);
    if (exists(path)) return path;
    // The original took paths as relative to the working directory.
    const here = resolve(Deno.cwd(), text);
    const hint = `write ${shellWord(here)} if it is meant`;
    return path === here || !exists(here)
      ? path
      : { why: `no ${quote(text)} in ${value.page.directory}`, hint };
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
    if (!exists(path)) return { why: `${quote(path)}: ${MISSING}`, hint: `mkdir -p ${shellWord(path)}` };
    return notWritable(path) ?? changeable(path, "o-w") ?? path;
  });
}

/** The path of the account key; the first run makes the file if it is missing. */
function accountKeyFile(value: Value): string | Invalid {
  return ofPath(value, (path) => {
    const keyOfTest = `${path}.test`; // see accountKeyPath() of issue.ts
    const found = value.page.mode === "test" && exists(keyOfTest) ? accountKey(value, keyOfTest) : path;
    if (isInvalid(found)) return found;
    if (exists(path)) return accountKey(value, path);
    let parent = dirname(path);
    while (!exists(parent)) parent = dirname(parent);
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
    // The value is not shown: it may be the key itself.
    if (!exists(path)) {
      return { why: "it names no file", hint: "write the key into a file, and its path here" };
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

/**
 * Why a file or directory cannot be trusted: others than its owner and root may change it (as StrictModes of sshd).
 * A group with the number of the owner is the owner's own; with such groups, umask is often 002 (pam_umask).
 */
function changeable(path: string, fix: "go-w" | "o-w" = "go-w"): Invalid | undefined {
  const { mode, uid, gid } = statOf(path);
  const byGroup = mode & 0o020 && fix === "go-w" && gid !== 0 && gid !== uid;
  if (!byGroup && !(mode & 0o002)) return undefined;
  const shown = (mode & 0o7777).toString(8).padStart(4, "0");
  const hint = `chmod ${fix} ${shellWord(path)}`;
  return { why: `others may write to ${quote(path)} (mode ${shown})`, hint };
}

/** Why root cannot trust a file: it belongs to another user (as sudo has it). */
function foreign(path: string): Invalid | undefined {
  const { uid } = statOf(path);
  if (Deno.uid() !== 0 || uid === 0) return undefined;
  const why = `${quote(path)} belongs to user ${uid}, who could have root run anything`;
  return { why, hint: `run lematt as user ${uid}, or: chown root ${shellWord(path)}` };
}

/**
 * Checks owner and mode of the configuration directory and of this mode's tree. Returns whether files in the directory can
 * be trusted.
 */
function checkDirectories(directory: string, base: string, page: Page): boolean {
  if (!/^[A-Za-z0-9/._@+,:%-]+$/.test(directory)) {
    const why = `the path ${quote(directory)} has characters that are not safe in commands`;
    page.error(why, undefined, "letters, digits and / . _ - @ + , : % are");
  }
  const isTrusted = page.check(directory, changeable, foreign);
  const tree = [base, ...["key", "csr", "cert", "state.json"].map((name) => join(base, name))].filter(exists);
  for (const path of tree) page.check(path, changeable);
  const us = Deno.uid();
  const other = tree.find((path) => statOf(path).uid !== us);
  if (other === undefined) return isTrusted;
  const { uid } = statOf(other);
  const hint = us === 0 ? `run lematt as user ${uid}` : `chown -R ${us} ${shellWord(base)}`;
  const why = uid === undefined ? "cannot be read" : `belongs to user ${uid}`;
  page.warn(`${quote(other)} ${why}`, undefined, hint);
  return isTrusted;
}

/** Why no file can be made in the directory, as far as its mode shows: groups and access control lists are not known. */
function notWritable(directory: string): Invalid | undefined {
  const { isDirectory, mode, uid } = statOf(directory);
  if (!isDirectory) return { why: `${quote(directory)} is not a directory` };
  const us = Deno.uid();
  const classes = us === uid ? [mode >> 6] : [mode >> 3, mode];
  if (us === 0 || classes.some((bits) => (bits & 0o3) === 0o3)) return undefined;
  const hint = "the user who runs lematt must be able to write there";
  return { why: `${quote(directory)}: permission denied`, hint };
}

const MISSING = "it does not exist";

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch (error) {
    return whyNot(error) !== MISSING; // it exists, but cannot be reached
  }
}

/** Of a file that exists; one that cannot be reached has no permissions. */
function statOf(path: string): { isDirectory: boolean; mode: number; uid?: number; gid?: number } {
  try {
    return Deno.statSync(path) as Deno.FileInfo & { mode: number; uid: number; gid: number };
  } catch {
    return { isDirectory: true, mode: 0 };
  }
}

/** The text of a regular file, with U+FFFD for bytes that are not UTF-8. */
function readText(path: string): string | Invalid {
  try {
    // Reading a pipe or a device might never end.
    if (Deno.statSync(path).isFile) return new TextDecoder().decode(Deno.readFileSync(path));
    return { why: `${quote(path)} is not a file` };
  } catch (error) {
    return { why: `${quote(path)}: ${whyNot(error)}` };
  }
}

/** An error of the system, in short. */
function whyNot(error: unknown): string {
  const { code, message } = error as { code?: string; message: string };
  if (code === "ENOENT" || code === "ENOTDIR") return MISSING;
  return code === "EACCES" || code === "EPERM" ? "permission denied" : printable(message, 200);
}

/** The real path of lematt.conf; `passedOver` warns of a ./conf that belongs to another user. */
function locate(path?: string, beside?: string): { file: string; passedOver: Notice[] } {
  const reasons: string[] = [];
  const passedOver: Notice[] = [];
  for (const place of path !== undefined ? [path] : ["conf", ...beside === undefined ? [] : [beside]]) {
    try {
      const { isDirectory, uid } = Deno.statSync(place);
      if (path === undefined && place !== beside && uid !== 0 && uid !== Deno.uid()) {
        const text = `passed over: it belongs to user ${uid}`;
        const hint = "name it with --config if it is meant";
        passedOver.push({ file: resolve(Deno.cwd(), place), text, hint });
        continue;
      }
      const file = isDirectory ? join(place, "lematt.conf") : place;
      // In a directory that was named, the other two files are checked even if lematt.conf is missing.
      const isMissing = path !== undefined && isDirectory && !exists(file);
      const real = isMissing ? join(Deno.realPathSync(place), "lematt.conf") : Deno.realPathSync(file);
      return { file: real, passedOver };
    } catch (error) {
      reasons.push(`${quote(place)}: ${whyNot(error)}`);
    }
  }
  const text = `not found: ${reasons.join(", ")}`;
  const hint = "name lematt.conf, or its directory, with --config";
  throw new ConfigError([...passedOver, { file: "lematt.conf", text, hint }]);
}

interface Notes {
  readonly errors: Notice[];
  readonly warnings: Notice[];
  readonly advice: Notice[];
}

/** One of the three files, or a directory, and where its problems are noted. */
class Page {
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
      return void this.error(text.why, undefined, exists(path) ? undefined : hintIfMissing);
    }
    if (!this.check(path, changeable, ...this.name === "domains" ? [] : [foreign])) return undefined;
    const lost = text.indexOf("\ufffd"); // bytes that are not UTF-8
    if (lost >= 0) this.error("not UTF-8", text.slice(0, lost).split(/\r\n|\r|\n/).length);
    return text;
  }

  parse(text: string, table: Table): ini.Ini {
    const defaults = Object.entries(table).flatMap(([name, { key = name, or }]) =>
      or === undefined ? [] : [[key, or]]
    );
    const file = ini.parseIni(text, Object.fromEntries(defaults));
    for (const { text, line, hint } of file.problems) this.error(text, line, hint);
    return file;
  }
}

// --------------------------------------------------------------------------------------------- lematt.conf

/** letsencrypt.org/docs/rate-limits, "New Certificates per Exact Set of Identifiers". */
const SAME_NAMES_PER_WEEK = 5;

/** The settings, and a function that notes an error if a key is not written. */
function readSettings(page: Page) {
  const text = page.read("copy the conf/lematt.conf that comes with lematt, and adapt it");
  const file = page.parse(text ?? "", SETTINGS);
  for (const other of file.sections.filter(({ name }) => name !== "config")) {
    const isMeant = closest(other.name, ["config"]);
    if (isMeant) page.error(`unknown section ${title(other)}`, other.line, "did you mean [config]?");
    else page.warn(`section ${title(other)} is ignored`, other.line, "commands belong in actions.conf");
  }
  const section = file.sections.find(({ name }) => name === "config");
  const { values: settings, written } = readKeys(SETTINGS, page, file, section ?? file.defaults);
  const missing = (key: string, hint: string) => {
    if (section && !written.has(key)) page.error(`no "${key}" in [config]`, section.line, hint);
  };
  if (section) {
    checkUnknown(page, file, [section, file.defaults], SETTINGS);
    missing("accountKey", "the file of your account key; lematt makes it if it is missing");
    if (written.has("eabKeyId")) missing("eabHmacKey", "it goes with eabKeyId");
    if (written.has("eabHmacKey")) missing("eabKeyId", "it goes with eabHmacKey");
    checkSettings(settings, written, page);
  } else if (text !== undefined) {
    page.error("no section [config]", undefined, "put [config] in a line above the keys");
  }
  return { settings, missing };
}

/** Warnings about values that are valid, but cause trouble. */
function checkSettings(settings: Settings, written: ReadonlyMap<string, number>, page: Page) {
  const { rsaTag, curveTag, keyBitsRSA, curve, keyTypes, generateNewCertsAfterDays: age } = settings;
  const days = settings.reauthorizeDays ?? 15;
  if (rsaTag?.toLowerCase() === curveTag?.toLowerCase()) { // some file systems ignore case
    const later = (written.get("rsaTag") ?? 0) > (written.get("curveTag") ?? 0) ? "rsaTag" : "curveTag";
    const why = "the files of both key types would have the same names";
    page.error(`${later}: ${why}`, written.get(later), "make rsaTag and curveTag differ");
  }
  const letsEncrypt = isLetsEncrypt(settings, page.mode);
  const half = written.has("directory") && !written.has("testDirectory") && !isLetsEncrypt(settings, "prod");
  const [rsa, ec] = [keyTypes.includes("rsa"), keyTypes.includes("ec")];
  // A run renews all key types of a line: so many runs a week as the limit allows whole sets.
  const least = 7 / Math.floor(SAME_NAMES_PER_WEEK / keyTypes.length);
  const limit = `Let's Encrypt issues ${SAME_NAMES_PER_WEEK} certificates a week for the same names`;
  // Its CP/CPS, "DV-SSL Subscriber Certificate".
  const accepted = "Let's Encrypt accepts RSA of 2048, 3072 and 4096 bits, P-256 and P-384 alone";
  const shown = "--test would send the names of a private CA to Let's Encrypt's staging";
  const late = "certificates of 45 days are renewed when 30 are left, whatever it says";
  const warnings: readonly (readonly [isSo: boolean, key: string, why: string, hint?: string])[] = [
    [age > 0 && written.has("reauthorizeDays"), "reauthorizeDays", "generateNewCertsAfterDays overrules it"],
    [age === 0 && days === 0, "reauthorizeDays", "with 0, a certificate is renewed when it has expired"],
    [letsEncrypt && age === 0 && days > 30, "reauthorizeDays", late, "15 is right for all"],
    [letsEncrypt && age > 0 && age < least, "generateNewCertsAfterDays", `less than ${least}: ${limit}`],
    [letsEncrypt && rsa && ![2048, 3072, 4096].includes(keyBitsRSA), "keyBitsRSA", accepted],
    [letsEncrypt && ec && curve === "P-521", "curve", accepted],
    [rsa && keyBitsRSA < 2048, "keyBitsRSA", `RSA of ${keyBitsRSA} bits is not safe`],
    [half, "directory", shown, "write testDirectory too; it may be the same"],
  ];
  for (const [isSo, key, why, hint] of warnings) {
    if (isSo) page.warn(`${key}: ${why}`, written.get(key), hint);
  }
}

/** Whether Let's Encrypt's rules and limits apply. */
function isLetsEncrypt({ prodDirectory, testDirectory }: Settings, mode: Mode): boolean {
  return /^https:\/\/[^/]*\.letsencrypt\.org\//.test(mode === "prod" ? prodDirectory : testDirectory);
}

// --------------------------------------------------------------------------------------------- actions.conf

/** The sections, and the names of their `domains` with their lines. */
function readActions(page: Page, settings: Settings) {
  const path = shellWord(join(page.directory, page.name));
  const text = page.read(`an empty file is enough to begin with: touch ${path}`);
  const file = page.parse(text ?? "", SECTION_KEYS);
  const named: Word[] = [];
  const sections = file.sections.map((section) => readSection(page, file, section, settings, named));
  checkUnknown(page, file, [file.defaults, ...file.sections], SECTION_KEYS);
  const { entries, line } = file.defaults;
  const hasKeys = [...entries.values()].some(({ key, line }) => line && !file.used.has(key));
  if (hasKeys && !sections.some(({ name }) => name === "default")) {
    const hint = "write [default] for names of no other section";
    page.warn("[DEFAULT] has defaults for all sections, and is no section itself", line, hint);
  }

  const first = new Map<string, Section>(); // by name, of those with a challenge
  for (const section of sections) {
    for (const domain of section.challenge ? section.domains : []) {
      const other = first.get(domain) ?? section;
      first.set(domain, other);
      if (other.challenge === section.challenge) continue;
      const ways = [other, section].map((each) => `${each.challenge} in ${title(each)}`);
      page.error(`conflicting challenges for ${quote(domain)}: ${ways.join(", ")}`, section.line);
    }
  }
  return { sections, named };
}

function readSection(
  page: Page,
  file: ini.Ini,
  section: ini.Section,
  settings: Settings,
  named: Word[],
): Section {
  const { name, line } = section;
  const { values, written } = readKeys(SECTION_KEYS, page, file, section);
  const { domains = [], ocspStapleRequired, ...rest } = values;
  const { challenge } = rest;
  const error = (key: string, why: string, hint = "remove the line") =>
    page.error(`${key}: ${why}`, written.get(key), hint);
  if (/\p{Cc}/u.test(name)) page.error(`control character in the name of ${title(section)}`, line);
  if (name === "default" || name === "every") {
    const whose = name === "every" ? "every name" : "the names of no other section";
    if (written.has("domains")) error("domains", `[${name}] is for ${whose}`);
  } else if (!written.has("domains")) {
    const meant = closest(name, ["default", "every"]);
    const hint = meant ? `did you mean [${meant}]?` : "such as domains: www.example.com";
    page.error(`no "domains" in ${title(section)}`, line, hint);
  }
  const staple = "CAs no longer support OCSP, and refuse requests with it";
  if (ocspStapleRequired) error("ocspStapleRequired", staple);
  if (challenge === "dns-01" && !written.has("dnsPresent")) {
    error("challenge", `dns-01 needs "dnsPresent" in the same section`, `dnsPresent: ["…"]`);
  } else if (challenge !== "dns-01" && written.has("dnsPresent")) {
    const why = `dnsPresent: not used without "challenge: dns-01" in the same section`;
    page.warn(why, written.get("dnsPresent"));
  }
  named.push(...domains);
  const { keyTypes, verifyWaitSeconds } = settings;
  const own = Object.freeze([...new Set(domains.map(({ text }) => text))]);
  return Object.freeze({ keyTypes, verifyWaitSeconds, ...rest, name, line, domains: own });
}

// -------------------------------------------------------------------------------------------------- domains

/** Names in one certificate, as in the original: the limit of Let's Encrypt's profile `classic`. */
const MAX_NAMES = 100;
/** Limits of other profiles: letsencrypt.org/docs/profiles. */
const PROFILE_MAX_NAMES: ReadonlyMap<string, number> = new Map([["tlsserver", 25], ["shortlived", 25]]);

type ParsedLine = Pick<Line, "line" | "names" | "formerNames">;

function readDomains(page: Page, isChosen: boolean): readonly ParsedLine[] {
  const hint = "a line for each certificate, such as: example.com www";
  const text = page.read(hint);
  const lines = new Map<string, ParsedLine>(); // by their names
  const sets = new Map<string, number>(); // names in alphabetical order -> line
  let isEmpty = true;
  (text ?? "").split(/\r\n|\r|\n/).forEach((full, index) => {
    const words = full.trim().split(/\s+/);
    if (words[0] === "" || words[0]!.startsWith("#")) return;
    isEmpty = false;
    const line = index + 1;
    const names = readNames(page, words, line);
    if (!names) return;
    const former = formerNames(words, names);
    const [key, set] = [names.join(" "), [...names].sort().join(" ")];
    const same = lines.get(key);
    if (same) page.warn(`same names as line ${same.line}`, line, "remove one of the lines");
    else if (sets.has(set)) {
      const why = `same names as line ${sets.get(set)} in another order, which makes two certificates`;
      page.warn(why, line, "remove one of the lines");
    } else sets.set(set, line);
    lines.set(key, { line, names, ...same, formerNames: [...same?.formerNames ?? [], ...former] });
  });
  if (text !== undefined && isEmpty) {
    const where = isChosen ? `; ${page.directory} is read since no --config names another` : "";
    page.error(`no names in ${join(page.directory, page.name)}`, undefined, hint + where);
  }
  for (const { line, names } of lines.values()) {
    for (const name of names.length > 1 ? names : []) {
      const own = lines.get(name);
      if (own) page.warn(`${quote(name)} is also alone in line ${own.line}, whose files have its name`, line);
    }
  }
  return [...lines.values()];
}

/** The names of one line, in the order of its stem; undefined after an error. */
function readNames(page: Page, words: readonly string[], line: number): readonly string[] | undefined {
  const primary = toIdentifier(words[0]!);
  const all = words.map((word, index) => index ? toMember(word, words[0]!, primary) : primary);
  all.forEach((name, index) => {
    if (isInvalid(name)) page.error(`invalid name ${quote(words[index]!)}: ${name.why}`, line, name.hint);
  });
  const [first, ...rest] = new Set(all.filter((name) => typeof name === "string"));
  if (rest.length >= MAX_NAMES) {
    const why = `${rest.length + 1} names in one certificate; ${MAX_NAMES} is the most`;
    page.error(why, line, "make it two lines");
  } else if (!all.some(isInvalid)) return Object.freeze([first!, ...inStemOrder(rest)]);
}

/** A further name of a line: one without a dot is a subdomain of the first, `*` the wildcard below it. */
function toMember(word: string, first: string, primary: string | Invalid): string | Invalid {
  if (word.includes(".") || word.includes(":")) return toIdentifier(word);
  if (isInvalid(primary)) return toIdentifier(`${word}.example.com`); // its own error is noted already
  if (!primary.startsWith("*.") && !isIP(primary)) return toIdentifier(`${word}.${first}`);
  return { why: `${quote(first)} has no subdomains to be short for`, hint: "write the name in full" };
}

/** The order of names within a stem: by labels from the right, without the last one; ties by the whole name. */
function inStemOrder(names: readonly string[]): readonly string[] {
  if (names.length < 2) return names;
  const compare = (a: string, b: string) => a < b ? -1 : a > b ? 1 : 0;
  const rank = (name: string) => name.slice(0, name.lastIndexOf(".")).split(".").reverse().join("\0");
  return names.map((name) => ({ name, rank: rank(name) }))
    .sort((a, b) => compare(a.rank, b.rank) || compare(a.name, b.name))
    .map(({ name }) => name);
}

/** See `Line.formerNames`; none for names that the original could not write. */
function formerNames(words: readonly string[], names: readonly string[]): (readonly string[])[] {
  const [first, ...rest] = words;
  const full = rest.map((word) => word.includes(".") ? word : `${word}.${first}`);
  const former = [first!, ...inStemOrder([...new Set(full)])];
  const isSame = former.length === names.length && former.every((name, index) => name === names[index]);
  return isSame || words.some((word) => /[^!-~]/.test(word)) ? [] : [former];
}

// ------------------------------------------------------------------------------------- lines and their sections

/** Joins each line with the sections of its names; checks profiles, and challenges of wildcards and IP addresses. */
function assign(
  parsed: readonly ParsedLine[],
  sections: readonly Section[],
  page: Page,
  settings: Settings,
): Line[] {
  const of = routes(sections);
  const letsEncrypt = isLetsEncrypt(settings, page.mode);
  const shared = new Map<readonly Section[], ReturnType<typeof wantedBy>>(); // most lines have the same sections
  return parsed.map(({ line, names, formerNames }) => {
    const delivering = deliverers(names, of);
    const made = shared.get(delivering) ?? wantedBy(delivering, settings, (text) => page.error(text, line));
    shared.set(delivering, made);
    const { profile = "" } = made;
    const most = PROFILE_MAX_NAMES.get(profile) ?? MAX_NAMES;
    if (letsEncrypt && names.length > most) {
      page.error(`${names.length} names in one certificate; ${most} is the most in profile ${profile}`, line);
    }
    for (const name of names) {
      const wildcard = name.startsWith("*.");
      if (!wildcard && !isIP(name)) continue;
      const challenge = challengeOf({ sections }, name);
      const needs = wildcard ? "a wildcard needs dns-01 or dns-persist-01" : "an IP address needs http-01";
      if (wildcard === (challenge === "http-01")) {
        const by = of(name.slice(2)).find(({ challenge, domains }) => challenge && domains.length);
        const section = `a section of actions.conf with "challenge: ${wildcard ? "dns-01" : "http-01"}"`;
        const hint = `add it to "domains" of ${by ? title(by) : section}`;
        page.error(`${quote(name)} cannot be proven by ${challenge}: ${needs}`, line, hint);
      }
      if (!wildcard && profile !== "shortlived" && letsEncrypt) {
        page.warn("Let's Encrypt needs profile shortlived for IP addresses", line, "profile: shortlived");
      }
    }
    return Object.freeze({ line, names, sections: delivering, ...made, formerNames });
  });
}

/** Key types and profile of the lines that these sections deliver. [every] counts only if no other section does. */
function wantedBy(sections: readonly Section[], settings: Settings, error: (text: string) => void) {
  const own = sections.filter(({ name }) => name !== "every");
  const types = own.length ? own.flatMap(({ keyTypes }) => keyTypes) : settings.keyTypes;
  const [mine, all] = [own, sections].map((those) => those.filter(({ profile }) => profile));
  const [one, ...others] = mine!.length ? mine! : all!;
  const other = others.find(({ profile }) => profile !== one!.profile);
  const ways = [one, other].map((each) => each && `${printable(each.profile!)} in ${title(each)}`);
  if (other) error(`conflicting profiles: ${ways.join(", ")}`);
  const profile = one ? one.profile : settings.profile;
  return { keyTypes: [...new Set(types)], ...profile && { profile } };
}

type Route = (name: string) => readonly Section[];
const routed = new WeakMap<readonly Section[], Route>();

/** `sectionsOf` for many names. */
function routes(sections: readonly Section[]): Route {
  const known = routed.get(sections);
  if (known) return known;
  const every = sections.filter(({ name }) => name === "every");
  const others = Object.freeze([...sections.filter(({ name }) => name === "default"), ...every]);
  const overrides = new Map<string, Section[]>();
  for (const section of sections) {
    for (const domain of section.domains) {
      const list = overrides.get(domain);
      if (list) list.push(section);
      else overrides.set(domain, [section]);
    }
  }
  for (const list of overrides.values()) list.push(...every);
  const route: Route = (name) => overrides.get(name) ?? others;
  routed.set(sections, route);
  return route;
}

/** The sections of all names, each once: overrides in the order of the file, default, every. */
function deliverers(names: readonly string[], of: Route): readonly Section[] {
  const first = of(names[0]!);
  if (names.every((name) => of(name) === first)) return first;
  const rank = ({ name, line }: Section) =>
    name === "every" ? Infinity : name === "default" ? Number.MAX_VALUE : line;
  return Object.freeze([...new Set(names.flatMap(of))].sort((a, b) => rank(a) - rank(b)));
}

/** Warns of names, endpoints and `prepare` commands that have no effect, and advises `verify`. */
function checkSections(
  sections: readonly Section[],
  named: readonly Word[],
  lines: readonly Line[],
  page: Page,
) {
  const issued = new Set(lines.flatMap(({ names }) => names));
  const covers = (names: ReadonlySet<string>, name: string) =>
    names.has(name) || names.has(name.replace(/^[^.]*/, "*"));
  for (const { text, line } of named) {
    if (issued.has(text)) continue;
    const hint = covers(issued, text) ? `name ${text.replace(/^[^.]*/, "*")}, which is` : undefined;
    page.warn(`${quote(text)} is in no line of domains, so it has no effect`, line, hint);
  }

  const linesOf = new Map<Section, Line[]>(sections.map((section) => [section, []]));
  for (const line of lines) for (const section of line.sections) linesOf.get(section)!.push(line);
  for (const [section, lines] of linesOf) {
    const { name, line, verify, uploadCerts, uploadKeys, uploadEach, update } = section;
    const hasLists = [uploadCerts, uploadKeys, uploadEach, update].some(({ length }) => length);
    if (hasLists && lines.length && !verify.length && name !== "every") {
      page.advise(`deliveries of ${title(section)} are not verified`, line, `such as verify: ["DOMAIN:443"]`);
    }
    const isNamedByLine = ({ host, sni }: Endpoint) =>
      [host, sni].some((word) => word === "DOMAIN" || word === "DOMAINS_ALL");
    const wild = lines.find(({ names }) => names.every((name) => name.startsWith("*.")));
    if (wild && verify.length && verify.every(isNamedByLine)) {
      const hint = `name a host, such as ${wild.names[0]!.replace("*", "www")}:443`;
      page.warn(
        `verify: nothing is probed for ${wild.names[0]}, since a wildcard has no address`,
        line,
        hint,
      );
    }
    const wanted = verify.filter(({ host, sni = host }) => sni !== "DOMAIN" && sni !== "DOMAINS_ALL");
    if (lines.length < 2 || !wanted.length) continue;
    const names = new Set(lines.flatMap(({ names }) => names));
    for (const { text, host, sni = host } of wanted) {
      if (covers(names, sni)) continue;
      const why = `${quote(text)} matches no line of ${title(section)}, so any of its certificates is right`;
      const hint = `name one, such as ${text.replace(/#.*/, "")}#${lines[0]!.names[0]}`;
      page.warn(`verify: ${why}`, line, hint);
    }
  }

  const isPreparing = ({ prepare, domains }: Section) => prepare.length > 0 && domains.length > 0;
  const of = routes(sections);
  const isLeftOut = (name: string) =>
    challengeOf({ sections }, name) === "http-01" &&
    !of(name).some(({ prepare, domains }) => prepare.length || domains.length);
  for (const { names } of sections.some(isPreparing) ? lines : []) {
    const by = names.flatMap(of).find(isPreparing);
    for (const name of by ? names.filter(isLeftOut) : []) {
      const why = `not run for ${quote(name)}, which is on a line with names of ${title(by!)}`;
      page.warn(`prepare: ${why}`, by!.line, `add ${name} to its "domains"`);
    }
  }
}
