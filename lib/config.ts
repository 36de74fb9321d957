/**
 * The three files of a configuration directory (`lematt.conf`, `domains`, `actions.conf`) -> one validated, frozen
 * `Config`, or every fault of all three at once, each with its file, line and, where the mend is knowable, a hint.
 *
 * Reads files and never writes, asks no network, shows no key material. lematt.conf is read in settings.ts; here are
 * the other two, and what all three must be together. Whatever leaves this file may stand in a file name, in a request
 * to the CA and, quoted, in a command. Challenges: RFC 8555 §8.
 */
import { basename, dirname, join } from "node:path";
import { isIP, toHost, toIdentifier, toIPv6 } from "./names.ts";
import {
  CONFIG_KEYS,
  isLetsEncrypt,
  type KeyType,
  MAX_SECONDS,
  type Mode,
  openSettings,
  readKeyTypes,
  readSettings,
  type Settings,
} from "./settings.ts";
import { isMistake, type Mistake, printable, quote, shellWord } from "./text.ts";
import { closest, defined, exists, Keys, type Notice, Page, whyNot, type Word } from "./values.ts";

export type { Curve, KeyType, Mode } from "./settings.ts";
export type { Notice } from "./values.ts";
export type ChallengeType = "http-01" | "dns-01" | "dns-persist-01";

/** One section of actions.conf. Command lists keep their order; absent = []. */
export interface Section {
  readonly name: string; // "default", "every" or an override's name
  readonly line: number; // line number of its header in actions.conf
  readonly domains: readonly string[]; // empty for default and every; normalised like `domains`
  readonly prepare: readonly string[];
  readonly uploadCerts: readonly string[];
  readonly uploadKeys: readonly string[];
  readonly uploadEach: readonly string[];
  readonly update: readonly string[];
  readonly rehearse: boolean; // whether uploadEach runs under --test
  readonly keyTypes: readonly KeyType[]; // which certificates are delivered here: its own, else lematt.conf's
  readonly verify: readonly Endpoint[];
  readonly verifyWaitSeconds: number; // its own, else lematt.conf's
  readonly alert: readonly string[];
  readonly challenge?: ChallengeType;
  readonly dnsPresent: readonly string[];
  readonly dnsCleanup: readonly string[];
  readonly dnsParallel: boolean;
  readonly profile?: string;
}

/** `host:port[/protocol][#sni]`; host and sni may be the words DOMAIN or DOMAINS_ALL, replaced per certificate. */
export interface Endpoint {
  readonly text: string; // as written
  readonly host: string; // name, IPv4, IPv6 without brackets, or DOMAIN / DOMAINS_ALL
  readonly port: number;
  readonly starttls?: "smtp" | "imap" | "pop3" | "ldap" | "ftp" | "postgres";
  readonly sni?: string; // after '#'; absent = host when it is a name
}

/** One line of `domains`: one certificate for each key type. */
export interface Line {
  readonly line: number; // in the file `domains`
  /** Primary first; the rest de-duplicated and sorted by reversed labels without the last one (ties: by the name). */
  readonly names: readonly string[];
  /** Those that deliver it: overrides naming any of its names, default if any is in no override, every last. */
  readonly sections: readonly Section[];
  /** Of all that its sections want; lematt.conf's where only [every] delivers it, which widens nothing. */
  readonly keyTypes: readonly KeyType[];
  readonly profile?: string; // from its sections, else [config]
  /** The names as the Python original would have put them into a file name, where that differs. */
  readonly formerNames: readonly (readonly string[])[];
}

/** The configuration for one mode. */
export interface Config extends Settings {
  readonly mode: Mode;
  readonly base: string; // `directory`/`mode`, where keys and certificates are
  readonly directory: string; // absolute real path of the configuration directory
  readonly file: string; // absolute path of lematt.conf
  readonly sections: readonly Section[];
  readonly lines: readonly Line[];
  readonly warnings: readonly Notice[];
}

/** Every problem of the three files, in the order lematt.conf, domains, actions.conf and of their lines. */
export class ConfigError extends Error {
  override readonly name = "ConfigError";
  constructor(
    readonly problems: readonly Notice[],
    /** What could be read of the commands that send alerts, by the names of their sections. */
    readonly alerts: readonly { readonly section: string; readonly commands: readonly string[] }[] = [],
  ) {
    const textOf = ({ file, line, text }: Notice) => [file, line, ` ${text}`].filter(Boolean).join(":");
    super(problems.map(textOf).join("\n"));
  }
}

/**
 * Reads and validates all three files for one mode. `path` is lematt.conf or its directory; without it ./conf is taken, then
 * `beside`, the conf beside the program. Relative paths in the files are relative to the directory that holds the
 * real lematt.conf, as in the original. Throws ConfigError with every fault of all three.
 */
export function loadConfig(mode: Mode, path?: string, beside?: string): Config {
  const file = locate(path, beside);
  const directory = dirname(file);
  const faults: Notice[] = [];
  const warnings: Notice[] = [];
  const page = (name: string) => new Page(join(directory, name), faults, warnings);
  const settingsPage = page(basename(file));
  const domainsPage = page("domains");
  const actionsPage = page("actions.conf");

  const keys = openSettings(settingsPage);
  const settings = keys && readSettings(keys, directory, mode);
  for (const each of keys ? [keys, keys.defaults()] : []) {
    each.refuseOthers(CONFIG_KEYS, SECTION_KEYS, "a section of actions.conf");
  }
  const { sections, named } = readActions(actionsPage, settings);
  const lines = assign(readDomains(domainsPage), sections, domainsPage, settings);
  warnOfUnused(actionsPage, named, lines);

  const byHttp = (name: string) => prove(sections, name) === "http-01";
  const proven = lines.find(({ names }) => names.some(byHttp))?.names.find(byHttp);
  if (proven && keys && !keys.has("challengeDropDir")) {
    const served = `http://${proven}/.well-known/acme-challenge/`; // RFC 8555 §8.3
    keys.missing("challengeDropDir", `name the directory that is served as ${served}`);
  }

  const order = [settingsPage, domainsPage, actionsPage].map(({ name }) => name);
  const tell = (notices: Notice[]) =>
    // What several sections take over from [DEFAULT] is told once.
    [...new Map(notices.map((notice) => [JSON.stringify(notice), notice])).values()]
      .sort((a, b) => order.indexOf(a.file) - order.indexOf(b.file) || (a.line ?? 0) - (b.line ?? 0));
  if (!settings || faults.length) {
    const alerts = sections.map(({ name, alert }) => ({ section: name, commands: alert }));
    throw new ConfigError(tell(faults), alerts.filter(({ commands }) => commands.length));
  }
  return Object.freeze({
    ...settings,
    mode,
    base: join(directory, mode),
    directory,
    file,
    sections: Object.freeze(sections),
    lines: Object.freeze(lines),
    warnings: Object.freeze(tell(warnings)),
  });
}

/** Sections that apply to one name: the overrides naming it, else default; then every. For prepare and challenge. */
export function sectionsOf(config: Config, name: string): readonly Section[] {
  return routes(config.sections)(name);
}

/** How `name` is proven: by the challenge of its sections, else http-01. */
export function challengeOf(config: Config, name: string): ChallengeType {
  return prove(config.sections, name);
}

// --------------------------------------------------------------------------------------------- actions.conf

const COMMAND_KEYS = "prepare uploadCerts uploadKeys uploadEach update alert dnsPresent dnsCleanup".split(
  " ",
);
const SECTION_KEYS = COMMAND_KEYS.concat(
  "domains rehearse keyTypes verify verifyWait challenge dnsParallel profile ocspStapleRequired".split(" "),
);
const CHALLENGES = ["http-01", "dns-01", "dns-persist-01"] as const;
const STARTTLS = ["smtp", "imap", "pop3", "ldap", "ftp", "postgres"] as const;

/** The sections, and the names of their `domains` with the lines where they stand. */
function readActions(
  page: Page,
  settings: Settings | undefined,
): { sections: readonly Section[]; named: readonly Word[] } {
  const text = page.read(`an empty file will do to begin with: touch ${shellWord(page.path)}`);
  if (text === undefined) return { sections: [], named: [] };
  const ini = page.parse(text);
  const named: Word[] = [];
  const sections = ini.sections.map((section) => readSection(new Keys(page, ini, section), named, settings));
  for (const section of [ini.defaults, ...ini.sections]) {
    new Keys(page, ini, section).refuseOthers(SECTION_KEYS, CONFIG_KEYS, "[config] of lematt.conf");
  }
  const fallback = COMMAND_KEYS.some((key) => ini.defaults.entries.has(key.toLowerCase()));
  if (fallback && !sections.some(({ name }) => name === "default")) {
    const hint = "write [default] for what is to be run for names of no other section";
    page.warn("[DEFAULT] is what all sections fall back to, and none by itself", ini.defaults.line, hint);
  }

  const proof = new Map<string, Section>();
  for (const section of sections) {
    for (const domain of section.challenge ? section.domains : []) {
      const other = proof.get(domain) ?? section;
      proof.set(domain, other);
      if (other.challenge === section.challenge) continue;
      const ways = [other, section].map(({ name, challenge }) => `by ${challenge} in [${printable(name)}]`);
      page.fault(`Cannot tell how to prove ${quote(domain)}: ${ways.join(" or ")}`, section.line);
    }
  }
  return { sections, named };
}

function readSection(keys: Keys, named: Word[], settings: Settings | undefined): Section {
  const { name, line } = keys.section;
  if (/\p{Cc}/u.test(name)) {
    keys.page.fault(`Cannot use section [${printable(name)}]: a control character in its name`, line);
  }
  const domains: string[] = [];
  if (name === "default" || name === "every") {
    const why = name === "every" ? "it is for every name" : "it is for the names of no other section";
    if (keys.has("domains")) {
      keys.page.fault(`Cannot use "domains" in [${name}]: ${why}`, keys.line("domains"));
    }
  } else if (!keys.has("domains")) {
    const meant = closest(name, ["default", "every"]);
    keys.missing("domains", meant ? `did you mean [${meant}]?` : `such as "domains: www.example.com"`);
  } else {
    for (const { text, line } of keys.words("domains")) {
      const domain = toIdentifier(text);
      if (isMistake(domain)) keys.fault("domains", `${quote(text)}: ${domain.why}`, domain.hint, line);
      else domains.push(domain), named.push({ text: domain, line });
    }
  }
  if (keys.boolean("ocspStapleRequired")) {
    const why = "CAs have ended OCSP, and refuse to issue a certificate that demands a staple";
    keys.fault("ocspStapleRequired", why, "take the line out");
  }
  const commands = (key: string) => keys.list(key).map(({ text }) => text);
  const challenge = keys.oneOf("challenge", CHALLENGES);
  if (challenge === "dns-01" && !keys.has("dnsPresent")) {
    keys.fault("challenge", `"dns-01" needs "dnsPresent" in the same section`, `dnsPresent: ["…"]`);
  }
  if (keys.has("dnsPresent") && challenge !== "dns-01") {
    keys.warn("dnsPresent", `it is not used without "challenge: dns-01" in the same section`);
  }
  return Object.freeze(defined({
    name,
    line,
    domains: [...new Set(domains)],
    prepare: commands("prepare"),
    uploadCerts: commands("uploadCerts"),
    uploadKeys: commands("uploadKeys"),
    uploadEach: commands("uploadEach"),
    update: commands("update"),
    rehearse: keys.boolean("rehearse"),
    keyTypes: keys.has("keyTypes") ? readKeyTypes(keys) : settings?.keyTypes ?? [],
    verify: keys.list("verify").flatMap(({ text, line }) => {
      const endpoint = toEndpoint(text);
      if (!isMistake(endpoint)) return [endpoint];
      keys.fault("verify", `${quote(text)}: ${endpoint.why}`, endpoint.hint, line);
      return [];
    }),
    verifyWaitSeconds: keys.has("verifyWait")
      ? keys.number("verifyWait", { max: MAX_SECONDS })
      : settings?.verifyWaitSeconds ?? 0,
    alert: commands("alert"),
    challenge,
    dnsPresent: commands("dnsPresent"),
    dnsCleanup: commands("dnsCleanup"),
    dnsParallel: keys.boolean("dnsParallel"),
    profile: keys.word("profile"),
  }));
}

/** `host:port[/protocol][#sni]`. */
function toEndpoint(text: string): Endpoint | Mistake {
  const parts = /^(\[[^\]]*\]|[^:/#]*)(?::([^:/#]*))?(?:\/([^/#]*))?(?:#(.*))?$/s.exec(text);
  if (!parts) return { why: "not host:port", hint: "an IPv6 address stands in brackets: [2001:db8::7]:443" };
  const [, hostText = "", portText, protocol, sniText] = parts;
  if (portText === undefined) return { why: "it has no port", hint: `such as "${printable(hostText)}:443"` };
  const port = /^\d{1,5}$/.test(portText) ? Number(portText) : 0;
  if (port < 1 || port > 65535) return { why: `${quote(portText)} is no port` };
  const starttls = STARTTLS.find((known) => known === protocol);
  if (protocol !== undefined && !starttls) {
    return {
      why: `${quote(protocol)} is no protocol with STARTTLS that is known here`,
      hint: `${STARTTLS.join(", ")}; none for TLS from the start`,
    };
  }
  const bracketed = /^\[(.*)\]$/s.exec(hostText);
  const host = bracketed
    ? toIPv6(bracketed[1]!) ?? { why: "no IPv6 address in its brackets" }
    : toHost(hostText);
  if (isMistake(host)) return host;
  const sni = sniText === undefined ? undefined : toHost(sniText);
  if (isMistake(sni)) return { ...sni, why: `behind "#", ${sni.why}` };
  if (sni !== undefined && isIP(sni)) return { why: `behind "#", an address cannot be a server name` };
  return Object.freeze(defined({ text, host, port, starttls, sni }));
}

// -------------------------------------------------------------------------------------------------- domains

/** At most so many names in one certificate: Let's Encrypt's limit for its profile `classic`. */
const MAX_NAMES = 100;
/** letsencrypt.org/docs/profiles, "Max Names". */
const PROFILE_MAX_NAMES: ReadonlyMap<string, number> = new Map([["tlsserver", 25], ["shortlived", 25]]);

interface ParsedLine {
  readonly line: number;
  readonly names: readonly string[];
}

function readDomains(page: Page): readonly ParsedLine[] {
  const hint = "one line a certificate, such as: example.com www";
  const text = page.read(hint);
  if (text === undefined) return [];
  const lines: ParsedLine[] = [];
  const same = new Map<string, number>(); // names, which make the stem -> line
  const alone = new Map<string, number>(); // the name of a line that has no other -> line
  let empty = true;
  text.split(/\r\n|\r|\n/).forEach((full, index) => {
    const content = full.trim();
    if (content === "" || content.startsWith("#")) return;
    empty = false;
    const line = index + 1;
    const names = readNames(page, content.split(/\s+/), line);
    if (!names) return;
    const stem = names.join(" ");
    const other = same.get(stem);
    if (other) {
      return page.fault(`Cannot use the names of line ${other} twice`, line, "take one of the lines out");
    }
    same.set(stem, line);
    if (names.length === 1) alone.set(stem, line);
    lines.push({ line, names });
  });
  if (empty) page.fault("Cannot find a name in it", undefined, hint);

  for (const { line, names } of lines) {
    for (const name of names.length > 1 ? names : []) {
      const own = alone.get(name);
      if (own === undefined) continue;
      const whose = "its files are that line's, not links to this one's";
      page.warn(`${quote(name)} is also alone in line ${own}: ${whose}`, line);
    }
  }
  return lines;
}

/** The names of one line, in the order that makes its stem; undefined after a fault. */
function readNames(page: Page, words: readonly string[], line: number): string[] | undefined {
  const names = new Set<string>();
  let primary: string | Mistake | undefined;
  let faulty = false;
  for (const word of words) {
    const name: string | Mistake = primary === undefined
      ? toIdentifier(word)
      : toMember(word, words[0]!, primary);
    primary ??= name;
    if (typeof name === "string") names.add(name);
    else {
      page.fault(`Cannot use the name ${quote(word)}: ${name.why}`, line, name.hint);
      faulty = true;
    }
  }
  if (names.size > MAX_NAMES) {
    const why = `${MAX_NAMES} is the most`;
    page.fault(`Cannot put ${names.size} names into one certificate: ${why}`, line, "make it two lines");
    faulty = true;
  }
  if (faulty) return undefined;
  const [first, ...rest] = names;
  return [first!, ...bySubdomain(rest)];
}

/** A further name of a line: one without a dot is a subdomain of the first, `*` the wildcard below it. */
function toMember(word: string, first: string, primary: string | Mistake): string | Mistake {
  if (word.includes(".") || word.includes(":")) return toIdentifier(word);
  // The first name's own fault is told already, not again for each word that is short for a subdomain of it.
  if (isMistake(primary)) return toIdentifier(`${word}.example.com`);
  if (!primary.startsWith("*.") && !isIP(primary)) return toIdentifier(`${word}.${first}`);
  return { why: `${quote(first)} has no subdomains to be short for`, hint: "write the name in full" };
}

/** The order of names within a stem: by labels from the right, without the last one; ties by the whole name. */
function bySubdomain(names: string[]): string[] {
  if (names.length < 2) return names;
  const compare = (a: string, b: string) => a < b ? -1 : a > b ? 1 : 0;
  return names.map((name) => ({
    name,
    key: name.slice(0, name.lastIndexOf(".")).split(".").reverse().join("\0"),
  }))
    .sort((a, b) => compare(a.key, b.key) || compare(a.name, b.name))
    .map(({ name }) => name);
}

/** Joins each line with what actions.conf has for its names; faults where a name cannot be proven as that says. */
function assign(
  parsed: readonly ParsedLine[],
  sections: readonly Section[],
  page: Page,
  settings?: Settings,
): Line[] {
  const of = routes(sections);
  const profiles = new Map<readonly Section[], readonly string[]>(); // most lines share their sections
  return parsed.map(({ line, names }) => {
    const delivering = deliverers(names, of);
    const own = profiles.get(delivering) ?? profilesOf(delivering);
    profiles.set(delivering, own);
    if (own.length > 1) {
      page.fault(`Cannot choose a profile: its names' sections say ${own.map(quote).join(" and ")}`, line);
    }
    const profile = own[0] ?? settings?.profile;
    const most = PROFILE_MAX_NAMES.get(profile ?? "") ?? MAX_NAMES;
    if (names.length > most) {
      const why = `${most} is the most of profile "${profile}"`;
      page.fault(`Cannot put ${names.length} names into one certificate: ${why}`, line);
    }
    for (const name of names) {
      const wildcard = name.startsWith("*.");
      if (!wildcard && !isIP(name)) continue;
      const challenge = prove(sections, name);
      if (wildcard && challenge === "http-01") {
        const by = of(name.slice(2)).find(({ challenge }) => challenge);
        const hint = by?.domains.length
          ? `add ${name} to "domains" of [${printable(by.name)}]`
          : `name it in a section of actions.conf with "challenge: dns-01"`;
        const why = "a wildcard needs dns-01 or dns-persist-01";
        page.fault(`Cannot prove ${quote(name)} by http-01: ${why}`, line, hint);
      }
      if (!wildcard && challenge !== "http-01") {
        const hint = `name it in a section of actions.conf with "challenge: http-01"`;
        page.fault(`Cannot prove ${quote(name)} by ${challenge}: an IP address needs http-01`, line, hint);
      }
      if (!wildcard && profile !== "shortlived" && settings && isLetsEncrypt(settings)) {
        const text = `Let's Encrypt certifies IP addresses in its profile "shortlived" alone`;
        page.warn(text, line, "profile: shortlived");
      }
    }
    const wanted = new Set(
      delivering.filter(({ name }) => name !== "every").flatMap(({ keyTypes }) => keyTypes),
    );
    const all = settings?.keyTypes ?? [];
    const keyTypes = wanted.size ? (["rsa", "ec"] as const).filter((type) => wanted.has(type)) : all;
    const made = { line, names: Object.freeze(names), sections: delivering, keyTypes, formerNames: [] };
    return Object.freeze(profile === undefined ? made : { ...made, profile });
  });
}

/** The profiles of a line's sections, of which there should be one at most; that of [every] only if no other has one. */
function profilesOf(sections: readonly Section[]): readonly string[] {
  const of = (those: readonly Section[]) => [...new Set(those.flatMap(({ profile }) => profile ?? []))];
  const own = of(sections.filter(({ name }) => name !== "every"));
  return own.length ? own : of(sections);
}

type Route = (name: string) => readonly Section[];
const routed = new WeakMap<readonly Section[], Route>();

/** Finds the sections of a name: see sectionsOf. */
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

function prove(sections: readonly Section[], name: string): ChallengeType {
  return routes(sections)(name).find(({ challenge }) => challenge)?.challenge ?? "http-01";
}

/** The sections of all names, each once: overrides in the order of the file, default, every. */
function deliverers(names: readonly string[], of: Route): readonly Section[] {
  const first = of(names[0]!);
  if (names.every((name) => of(name) === first)) return first; // shared by most lines
  const rank = ({ name, line }: Section) =>
    name === "every" ? Infinity : name === "default" ? Number.MAX_VALUE : line;
  return Object.freeze([...new Set(names.flatMap(of))].sort((a, b) => rank(a) - rank(b)));
}

/** A name of a section that no certificate has is most often misspelt. */
function warnOfUnused(page: Page, named: readonly Word[], lines: readonly ParsedLine[]) {
  if (!named.length) return;
  const issued = new Set(lines.flatMap(({ names }) => names));
  for (const { text, line } of named) {
    if (issued.has(text)) continue;
    const wildcard = text.replace(/^[^.]*/, "*");
    const hint = issued.has(wildcard) ? `name ${wildcard}, which is` : undefined;
    page.warn(`${quote(text)} is in no line of "domains", so this section does nothing for it`, line, hint);
  }
}

// ---------------------------------------------------------------------------------------------------- files

/** The real path of lematt.conf. */
function locate(path: string | undefined, beside: string | undefined): string {
  const places = path !== undefined ? [path] : ["conf", ...(beside === undefined ? [] : [beside])];
  const reasons: string[] = [];
  for (const place of places) {
    try {
      const directory = Deno.statSync(place).isDirectory;
      const file = directory ? join(place, "lematt.conf") : place;
      // Without it, a directory that was named has two other files to be read.
      return exists(file) || !directory || !path
        ? Deno.realPathSync(file)
        : join(Deno.realPathSync(place), "lematt.conf");
    } catch (error) {
      reasons.push(`${quote(place)}: ${whyNot(error)}`);
    }
  }
  const text = `Cannot find it in ${reasons.join(", or in ")}`;
  const hint = "name lematt.conf, or its directory, with --config";
  throw new ConfigError([{ file: "lematt.conf", text, hint }]);
}
