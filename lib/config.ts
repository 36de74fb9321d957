/**
 * The three files of a configuration directory (`lematt.conf`, `domains`, `actions.conf`) -> one validated, frozen
 * `Config` for one mode, or every error of all three at once, each with its file, line and, where it is known, a hint.
 *
 * Reads files, never writes, uses no network, shows no secret. The values of a `Config` are safe in file names,
 * requests to the CA and commands. Challenges: RFC 8555 §8.
 */
import { basename, dirname, join, resolve } from "node:path";
import type * as ini from "./ini.ts";
import {
  covers,
  type Invalid,
  isInvalid,
  isIP,
  printable,
  quote,
  shellWord,
  toIdentifier,
  wildcardOf,
} from "./names.ts";
import { changeable, foreign, mayExist, statOf, whyNot } from "./trust.ts";
import {
  type ChallengeType,
  checkUnknown,
  closest,
  type KeyType,
  type Mode,
  type Notes,
  type Notice,
  readKeys,
  SECTION_KEYS,
  SETTINGS,
  type Settings,
  SourceFile,
  title,
  type Values,
  type Word,
} from "./settings.ts";

export type { ChallengeType, Endpoint, KeyType, Mode, Notice } from "./settings.ts";

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
  /**
   * The names as the Python original wrote them in file names, if different: in their case, with a repeated primary.
   */
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
    /** The `alert` commands that could be read; undefined if there is no directory, or other users may write to it. */
    readonly alerts?: readonly { readonly section: string; readonly commands: readonly string[] }[],
  ) {
    const textOf = ({ file, line, text }: Notice) => [file, line, ` ${text}`].filter(Boolean).join(":");
    super(problems.map(textOf).join("\n"));
  }
}

/**
 * Reads and validates all three files for one mode. `path` is lematt.conf or its directory; the defaults are ./conf,
 * then `beside`, the conf beside the program. Relative paths in the files are relative to the directory of the real
 * lematt.conf. Throws ConfigError with every error of all three.
 */
export function loadConfig(mode: Mode, path?: string, beside?: string): Config {
  const { file, skipped } = locate(path, beside);
  const directory = dirname(file);
  const base = join(directory, mode);
  const notes: Notes = { errors: [], warnings: [...skipped], advice: [] };
  const source = (name: string) => new SourceFile(directory, name, mode, notes);
  const sources = [source(basename(file)), source("domains"), source("actions.conf")] as const;
  const isTrusted = checkDirectories(directory, base, source(base));

  const { settings, missing } = readSettings(sources[0]);
  const { sections, named } = readActions(sources[2], settings);
  const lines = assign(readDomains(sources[1], path === undefined), sections, sources[1], settings);
  checkNames(named, lines, sources[2]);
  checkVerify(sections, lines, sources[2]);
  checkPrepare(sections, lines, sources[2]);
  const isHttp = (name: string) => challengeOf({ sections }, name) === "http-01";
  const name = lines.flatMap(({ names }) => names).find(isHttp);
  const served = `http://${name}/.well-known/acme-challenge/`; // RFC 8555 §8.3
  if (name) missing("challengeDropDir", `the directory that is served as ${served}`);

  const order = sources.map(({ name }) => name);
  const sorted = (notices: readonly Notice[]) =>
    // a value of [DEFAULT] is read for each section, its problems are shown once
    [...new Map(notices.map((notice) => [JSON.stringify(notice), notice])).values()]
      .sort((a, b) => order.indexOf(a.file) - order.indexOf(b.file) || (a.line ?? 0) - (b.line ?? 0));
  if (notes.errors.length) {
    const alerts = sections.filter(({ alert }) => alert.length)
      .map(({ name, alert }) => ({ section: name, commands: alert }));
    throw new ConfigError(sorted(notes.errors), directory, isTrusted ? alerts : undefined);
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

/** The real path of lematt.conf; `skipped` warns of a ./conf that belongs to another user. */
function locate(path?: string, beside?: string): { file: string; skipped: Notice[] } {
  const reasons: string[] = [];
  const skipped: Notice[] = [];
  for (const place of path !== undefined ? [path] : ["conf", ...beside === undefined ? [] : [beside]]) {
    try {
      const { isDirectory, uid } = Deno.statSync(place);
      if (path === undefined && place !== beside && uid !== 0 && uid !== Deno.uid()) {
        const text = `skipped: it belongs to user ${uid}`;
        const hint = `to use it: --config ${shellWord(place)}`;
        skipped.push({ file: resolve(Deno.cwd(), place), text, hint });
        continue;
      }
      const file = isDirectory ? join(place, "lematt.conf") : place;
      // in a directory that was named, the other two files are checked even if lematt.conf is missing
      const isMissing = path !== undefined && isDirectory && !mayExist(file);
      const real = isMissing ? join(Deno.realPathSync(place), "lematt.conf") : Deno.realPathSync(file);
      return { file: real, skipped };
    } catch (error) {
      reasons.push(`${quote(place)}: ${whyNot(error)}`);
    }
  }
  const text = `not found: ${reasons.join(", ")}`;
  const hint = "name lematt.conf, or its directory, with --config";
  throw new ConfigError([...skipped, { file: "lematt.conf", text, hint }]);
}

/**
 * Checks owner and mode of the configuration directory and of this mode's tree. Returns whether files in the directory
 * can be trusted.
 */
function checkDirectories(directory: string, base: string, source: SourceFile): boolean {
  if (!/^[A-Za-z0-9/._@+,:%-]+$/.test(directory)) {
    const why = `the path ${quote(directory)} has characters that are not safe in commands`;
    source.error(why, undefined, "letters, digits and / . _ - @ + , : % are");
  }
  const isTrusted = source.check(directory, changeable, foreign);
  const tree = [base, ...["key", "csr", "cert", "state.json"].map((name) => join(base, name))]
    .filter(mayExist);
  for (const path of tree) source.check(path, changeable);
  const us = Deno.uid();
  const other = tree.find((path) => statOf(path).uid !== us);
  if (other === undefined) return isTrusted;
  const { uid } = statOf(other);
  const hint = us === 0 ? `run lematt as user ${uid}` : `chown -R ${us} ${shellWord(base)}`;
  const why = uid === undefined ? "cannot be read" : `belongs to user ${uid}`;
  source.warn(`${quote(other)} ${why}`, undefined, hint);
  return isTrusted;
}

// --------------------------------------------------------------------------------------------- lematt.conf

/** letsencrypt.org/docs/rate-limits, "New Certificates per Exact Set of Identifiers". */
const SAME_NAMES_PER_WEEK = 5;

/** The settings, and a function that notes an error if a key is not written. */
function readSettings(source: SourceFile) {
  const text = source.read("copy the conf/lematt.conf that comes with lematt, and adapt it");
  const file = source.parse(text ?? "", SETTINGS);
  for (const other of file.sections.filter(({ name }) => name !== "config")) {
    const isMeant = closest(other.name, ["config"]);
    if (isMeant) source.error(`unknown section ${title(other)}`, other.line, "did you mean [config]?");
    else source.warn(`section ${title(other)} is ignored`, other.line, "commands belong in actions.conf");
  }
  const section = file.sections.find(({ name }) => name === "config");
  const { values: settings, written } = readKeys(SETTINGS, source, file, section ?? file.defaults);
  const missing = (key: string, hint: string) => {
    if (section && !written.has(key)) source.error(`no "${key}" in [config]`, section.line, hint);
  };
  if (section) {
    checkUnknown(source, file, [section, file.defaults], SETTINGS);
    missing("accountKey", "the file of your account key; lematt makes it if it is missing");
    if (written.has("eabKeyId")) missing("eabHmacKey", "required with eabKeyId");
    if (written.has("eabHmacKey")) missing("eabKeyId", "required with eabHmacKey");
    checkSettings(settings, written, source);
  } else if (text !== undefined) {
    source.error("no section [config]", undefined, "put [config] in a line above the keys");
  }
  return { settings, missing };
}

/** Warnings about values that are valid, but cause trouble. */
function checkSettings(settings: Settings, written: ReadonlyMap<string, number>, source: SourceFile) {
  const { rsaTag, curveTag, keyBitsRSA, curve, keyTypes, generateNewCertsAfterDays: age } = settings;
  const days = settings.reauthorizeDays ?? 15;
  if (rsaTag && rsaTag.toLowerCase() === curveTag?.toLowerCase()) { // some file systems ignore case
    const later = (written.get("rsaTag") ?? 0) > (written.get("curveTag") ?? 0) ? "rsaTag" : "curveTag";
    const why = "the files of both key types would have the same names";
    source.error(`${later}: ${why}`, written.get(later), "make rsaTag and curveTag differ");
  }
  const letsEncrypt = isLetsEncrypt(settings, source.mode);
  const half = written.has("directory") && !written.has("testDirectory") && !isLetsEncrypt(settings, "prod");
  const [rsa, ec] = [keyTypes.includes("rsa"), keyTypes.includes("ec")];
  // a renewal takes one certificate of each key type, all of which count
  const least = 7 / Math.floor(SAME_NAMES_PER_WEEK / keyTypes.length);
  const limit = `Let's Encrypt issues ${SAME_NAMES_PER_WEEK} certificates a week for the same names`;
  // its CP/CPS, "DV-SSL Subscriber Certificate"
  const accepted = "Let's Encrypt accepts RSA of 2048, 3072 and 4096 bits, P-256 and P-384 alone";
  const shown = "--test would send the names of a private CA to Let's Encrypt's staging";
  const late = "more than 30 has no effect on certificates of 45 days";
  const warnings: readonly (readonly [isSo: boolean, key: string, why: string, hint?: string])[] = [
    [age > 0 && written.has("reauthorizeDays"), "reauthorizeDays", "generateNewCertsAfterDays overrules it"],
    [age === 0 && days === 0, "reauthorizeDays", "with 0, a certificate is renewed when it has expired"],
    [letsEncrypt && age === 0 && days > 30, "reauthorizeDays", late, "use 15"],
    [letsEncrypt && age > 0 && age < least, "generateNewCertsAfterDays", `less than ${least}: ${limit}`],
    [letsEncrypt && rsa && ![2048, 3072, 4096].includes(keyBitsRSA), "keyBitsRSA", accepted],
    [letsEncrypt && ec && curve === "P-521", "curve", accepted],
    [rsa && keyBitsRSA < 2048, "keyBitsRSA", `RSA of ${keyBitsRSA} bits is not safe`],
    [half, "directory", shown, "write testDirectory too; it may be the same"],
  ];
  for (const [isSo, key, why, hint] of warnings) {
    if (isSo) source.warn(`${key}: ${why}`, written.get(key), hint);
  }
}

/** Whether Let's Encrypt's rules and limits apply. */
function isLetsEncrypt({ prodDirectory, testDirectory }: Settings, mode: Mode): boolean {
  return /^https:\/\/[^/]*\.letsencrypt\.org\//.test(mode === "prod" ? prodDirectory : testDirectory);
}

// --------------------------------------------------------------------------------------------- actions.conf

/** The sections, and the names of their `domains` with their lines. */
function readActions(source: SourceFile, settings: Settings) {
  const path = shellWord(join(source.directory, source.name));
  const text = source.read(`an empty file is enough to begin with: touch ${path}`);
  const file = source.parse(text ?? "", SECTION_KEYS);
  const named: Word[] = [];
  const sections = file.sections.map((section) => readSection(source, file, section, settings, named));
  checkUnknown(source, file, [file.defaults, ...file.sections], SECTION_KEYS);
  const { entries, line } = file.defaults;
  const hasKeys = [...entries.values()].some(({ key, line }) => line && !file.used.has(key));
  if (hasKeys && !sections.some(({ name }) => name === "default")) {
    const hint = "write [default] for names of no other section";
    source.warn("[DEFAULT] has defaults for all sections, and is no section itself", line, hint);
  }

  const first = new Map<string, Section>(); // by name, of those with a challenge
  for (const section of sections) {
    for (const domain of section.challenge ? section.domains : []) {
      const other = first.get(domain) ?? section;
      first.set(domain, other);
      if (other.challenge === section.challenge) continue;
      const ways = [other, section].map((each) => `${each.challenge} in ${title(each)}`);
      source.error(`conflicting challenges for ${quote(domain)}: ${ways.join(", ")}`, section.line);
    }
  }
  return { sections, named };
}

function readSection(
  source: SourceFile,
  file: ini.Ini,
  section: ini.Section,
  settings: Settings,
  named: Word[],
): Section {
  const { name, line } = section;
  const { values, written } = readKeys(SECTION_KEYS, source, file, section);
  const { domains = [], ocspStapleRequired, ...rest } = values;
  const { challenge } = rest;
  const error = (key: string, why: string, hint = "remove the line") =>
    source.error(`${key}: ${why}`, written.get(key), hint);
  if (/\p{Cc}/u.test(name)) source.error(`control character in the name of ${title(section)}`, line);
  if (name === "default" || name === "every") {
    const whose = name === "every" ? "every name" : "the names of no other section";
    if (written.has("domains")) error("domains", `[${name}] is for ${whose}`);
  } else if (!written.has("domains")) {
    const meant = closest(name, ["default", "every"]);
    const hint = meant ? `did you mean [${meant}]?` : "such as domains: www.example.com";
    source.error(`no "domains" in ${title(section)}`, line, hint);
  }
  const staple = "CAs no longer support OCSP, and refuse requests with it";
  if (ocspStapleRequired) error("ocspStapleRequired", staple);
  if (challenge === "dns-01" && !written.has("dnsPresent")) {
    error("challenge", `dns-01 needs "dnsPresent" in the same section`, `dnsPresent: ["…"]`);
  } else if (challenge !== "dns-01" && written.has("dnsPresent")) {
    const why = `dnsPresent: not used without "challenge: dns-01" in the same section`;
    source.warn(why, written.get("dnsPresent"));
  }
  const prepare = section.entries.get("prepare"); // that of [DEFAULT] is for all sections, of [every] for all names
  if (prepare && name !== "every" && challenge !== undefined && challenge !== "http-01") {
    source.warn(`prepare: not used with "challenge: ${challenge}" in the same section`, prepare.line);
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

function readDomains(source: SourceFile, isChosen: boolean): readonly ParsedLine[] {
  const hint = "a line for each certificate, such as: example.com www";
  const text = source.read(hint);
  const lines = new Map<string, ParsedLine>(); // by their names
  const sets = new Map<string, number>(); // names in alphabetical order -> line
  let isEmpty = true;
  (text ?? "").split(/\r\n|\r|\n/).forEach((full, index) => {
    const words = full.trim().split(/\s+/);
    if (words[0] === "" || words[0]!.startsWith("#")) return;
    isEmpty = false;
    const line = index + 1;
    const names = readNames(source, words, line);
    if (!names) return;
    const former = formerNames(words, names);
    const [key, set] = [names.join(" "), [...names].sort().join(" ")];
    const same = lines.get(key);
    if (same) source.warn(`same names as line ${same.line}`, line, "remove one of the lines");
    else if (sets.has(set)) {
      const why = `same names as line ${sets.get(set)} in another order, which makes two certificates`;
      source.warn(why, line, "remove one of the lines");
    } else sets.set(set, line);
    lines.set(key, { line, names, ...same, formerNames: [...same?.formerNames ?? [], ...former] });
  });
  if (text !== undefined && isEmpty) {
    const where = isChosen ? `; ${source.directory} is read since no --config names another` : "";
    source.error(`no names in ${join(source.directory, source.name)}`, undefined, hint + where);
  }
  for (const { line, names } of lines.values()) {
    for (const name of names.length > 1 ? names : []) {
      const own = lines.get(name);
      if (own) {
        source.warn(`${quote(name)} is also alone in line ${own.line}, whose files have its name`, line);
      }
    }
  }
  return [...lines.values()];
}

/** The names of one line, in the order of its stem; undefined after an error. */
function readNames(
  source: SourceFile,
  words: readonly string[],
  line: number,
): readonly string[] | undefined {
  const primary = toIdentifier(words[0]!);
  const all = words.map((word, index) => index ? toMember(word, words[0]!, primary) : primary);
  all.forEach((name, index) => {
    if (isInvalid(name)) source.error(`invalid name ${quote(words[index]!)}: ${name.why}`, line, name.hint);
  });
  const [first, ...rest] = new Set(all.filter((name) => typeof name === "string"));
  if (rest.length >= MAX_NAMES) {
    const why = `${rest.length + 1} names in one certificate; ${MAX_NAMES} is the most`;
    source.error(why, line, "make it two lines");
  } else if (!all.some(isInvalid)) return Object.freeze([first!, ...inStemOrder(rest)]);
}

/** A further name of a line: one without a dot is a subdomain of the first, `*` the wildcard below it. */
function toMember(word: string, first: string, primary: string | Invalid): string | Invalid {
  if (word.includes(".") || word.includes(":")) return toIdentifier(word);
  if (isInvalid(primary)) return toIdentifier(`${word}.example.com`); // its own error is noted already
  if (!primary.startsWith("*.") && !isIP(primary)) return toIdentifier(`${word}.${first}`);
  return { why: `a name without a dot cannot be below ${quote(first)}`, hint: "write the name in full" };
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
  source: SourceFile,
  settings: Settings,
): Line[] {
  const of = routes(sections);
  const letsEncrypt = isLetsEncrypt(settings, source.mode);
  const shared = new Map<readonly Section[], ReturnType<typeof wantedBy>>(); // most lines have the same sections
  return parsed.map(({ line, names, formerNames }) => {
    const delivering = deliverers(names, of);
    const made = shared.get(delivering) ?? wantedBy(delivering, settings, (text) => source.error(text, line));
    shared.set(delivering, made);
    const { profile = "" } = made;
    const most = PROFILE_MAX_NAMES.get(profile) ?? MAX_NAMES;
    if (letsEncrypt && names.length > most) {
      source.error(
        `${names.length} names in one certificate; ${most} is the most in profile ${profile}`,
        line,
      );
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
        source.error(`${quote(name)} cannot be proven by ${challenge}: ${needs}`, line, hint);
      }
      if (!wildcard && profile !== "shortlived" && letsEncrypt) {
        source.warn("Let's Encrypt needs profile shortlived for IP addresses", line, "profile: shortlived");
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

// --------------------------------------------------------------------------- parts of actions.conf without effect

/** Warns of names in `domains` of a section that no line has. */
function checkNames(named: readonly Word[], lines: readonly Line[], source: SourceFile) {
  const issued = new Set(lines.flatMap(({ names }) => names));
  for (const { text, line } of named) {
    if (issued.has(text)) continue;
    const hint = covers(issued, text) ? `name ${wildcardOf(text)}, which is` : undefined;
    source.warn(`${quote(text)} is in no line of domains, so it has no effect`, line, hint);
  }
}

/** Warns of endpoints that are not probed, or match no line; advises to have some. */
function checkVerify(sections: readonly Section[], lines: readonly Line[], source: SourceFile) {
  const isPlaceholder = (word?: string) => word === "DOMAIN" || word === "DOMAINS_ALL";
  const linesOf = new Map<Section, Line[]>(sections.map((section) => [section, []]));
  for (const line of lines) for (const section of line.sections) linesOf.get(section)!.push(line);
  for (const [section, lines] of linesOf) {
    const { name, line, verify, uploadCerts, uploadKeys, uploadEach, update } = section;
    const hasLists = [uploadCerts, uploadKeys, uploadEach, update].some(({ length }) => length);
    if (hasLists && lines.length && !verify.length && name !== "every") {
      const why = `deliveries of ${title(section)} are not verified`;
      source.advise(why, line, `such as verify: ["DOMAIN:443"]`);
    }
    const [wildcard] = lines.find(({ names }) => names.every((name) => name.startsWith("*.")))?.names ?? [];
    const needNames = verify.every(({ host, sni }) => isPlaceholder(host) || isPlaceholder(sni));
    if (wildcard && verify.length && needNames) {
      const why = `nothing is probed for ${wildcard}, since a wildcard has no address`;
      source.warn(`verify: ${why}`, line, `name a host, such as ${wildcard.replace("*", "www")}:443`);
    }
    const named = verify.filter(({ host, sni = host }) => !isPlaceholder(sni));
    if (lines.length < 2 || !named.length) continue;
    const names = new Set(lines.flatMap(({ names }) => names));
    for (const { text, host, sni = host } of named) {
      if (covers(names, sni)) continue;
      const why = `${quote(text)} matches no line of ${
        title(section)
      }, so any certificate of the section is accepted`;
      const hint = `name one, such as ${text.replace(/#.*/, "")}#${lines[0]!.names[0]}`;
      source.warn(`verify: ${why}`, line, hint);
    }
  }
}

/** Warns of names for which the `prepare` commands of their line do not run. */
function checkPrepare(sections: readonly Section[], lines: readonly Line[], source: SourceFile) {
  const isPreparing = ({ prepare, domains }: Section) => prepare.length > 0 && domains.length > 0;
  const of = routes(sections);
  const isLeftOut = (name: string) =>
    challengeOf({ sections }, name) === "http-01" &&
    !of(name).some(({ prepare, domains }) => prepare.length || domains.length);
  for (const { names } of sections.some(isPreparing) ? lines : []) {
    const by = names.flatMap(of).find(isPreparing);
    for (const name of by ? names.filter(isLeftOut) : []) {
      const why = `not run for ${quote(name)}, which is on a line with names of ${title(by!)}`;
      source.warn(`prepare: ${why}`, by!.line, `add ${name} to its "domains"`);
    }
  }
}
