/**
 * The three files of a configuration directory (`lematt.conf`, `domains`, `actions.conf`) -> one validated, frozen
 * `Config`, or every fault of all three at once, each with its file, line and, where the mend is knowable, a hint.
 *
 * Reads files and never writes, asks no network, shows no key material. What a name, a list, a path or a number must
 * look like is decided here and nowhere else: whatever leaves this file may stand in a file name, in a request to the
 * CA and, quoted, in a command.
 *
 * Host names: RFC 1123 §2.1, A-labels by UTS 46; IP addresses: RFC 8738, RFC 5952; challenges: RFC 8555 §8.
 */
import { createPrivateKey, type KeyObject, X509Certificate } from "node:crypto";
import { accessSync, constants, readFileSync, realpathSync, statSync } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { domainToASCII, domainToUnicode } from "node:url";
import {
  cannotRead,
  type Ini,
  lineFinder,
  parseIni,
  printable,
  quote,
  type Section as IniSection,
  type Value,
  valueOf,
} from "./ini.ts";

export type Mode = "test" | "prod";
export type KeyType = "rsa" | "ec";
export type Curve = "P-256" | "P-384" | "P-521";
export type ChallengeType = "http-01" | "dns-01" | "dns-persist-01";

/** One section of actions.conf. Command lists keep their order; absent = []. */
export interface Section {
  readonly name: string; // "default", "every" or an override's name
  readonly line: number; // line number of its header in actions.conf
  readonly domains: readonly string[]; // empty for default and every; normalised like `domains`
  readonly prepare: readonly string[];
  readonly uploadCerts: readonly string[];
  readonly uploadKeys: readonly string[];
  readonly update: readonly string[];
  readonly verify: readonly Endpoint[];
  readonly alert: readonly string[];
  readonly challenge?: ChallengeType;
  readonly dnsPresent: readonly string[];
  readonly dnsCleanup: readonly string[];
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
  readonly profile?: string; // from its sections, else [config]
}

export interface Config {
  readonly directory: string; // absolute real path of the configuration directory
  readonly file: string; // absolute path of lematt.conf
  readonly reauthorizeDays: number;
  readonly generateNewCertsAfterDays: number; // 0 = off
  readonly challengeDropDir?: string; // absolute
  readonly accountKey: string; // absolute path; the file need not exist yet
  readonly keyTypes: readonly KeyType[];
  readonly keyBitsRSA: number;
  readonly curve: Curve;
  readonly rsaTag: string;
  readonly curveTag: string;
  readonly alwaysGenerateNewKeys: boolean;
  readonly acmeDirectory: Readonly<Record<Mode, string>>; // prod: `directory`, test: `testDirectory`
  readonly caBundle?: string; // PEM text of certificates
  readonly contact: readonly string[]; // mailto: URLs
  readonly parallel: number;
  readonly preflight: "yes" | "no" | "warn";
  readonly commandTimeoutSeconds: number;
  readonly ari: boolean;
  readonly profile?: string;
  readonly preferredChain?: string;
  readonly eab?: { readonly keyId: string; readonly hmacKey: Uint8Array };
  readonly dnsWaitSeconds: number;
  readonly verifyWaitSeconds: number;
  readonly sections: readonly Section[];
  readonly lines: readonly Line[];
  readonly warnings: readonly Notice[];
}

/** A fault or a warning: `file:line: text`, with an optional hint. */
export interface Notice {
  readonly file: string; // base name
  readonly line?: number; // absent if it is the whole file's
  readonly text: string;
  readonly hint?: string;
}

/** Every fault of the three files, in the order lematt.conf, domains, actions.conf and of their lines. */
export class ConfigError extends Error {
  override readonly name = "ConfigError";
  constructor(readonly faults: readonly Notice[]) {
    super(
      faults.map(({ file, line, text }) => [file, line, " " + text].filter(Boolean).join(":")).join("\n"),
    );
  }
}

/**
 * Reads and validates all three files. `path` is lematt.conf or its directory; without it ./conf is taken, then
 * `beside`, the conf beside the program. Relative paths in the files are relative to the directory that holds the
 * real lematt.conf, as in the original. Throws ConfigError with every fault of all three.
 */
export function loadConfig(path?: string, beside?: string): Config {
  const file = locate(path, beside);
  const directory = dirname(file);
  const faults: Notice[] = [];
  const warnings: Notice[] = [];
  const page = (name: string) => new Page(join(directory, name), faults, warnings);
  const [settingsPage, domainsPage, actionsPage] = [
    page(basename(file)),
    page("domains"),
    page("actions.conf"),
  ];

  const keys = openSettings(settingsPage);
  const settings = keys && readSettings(keys, directory);
  const { sections, named } = readActions(actionsPage);
  const lines = assign(readDomains(domainsPage), sections, domainsPage, settings);
  warnOfUnused(actionsPage, named, lines);

  const byHttp = (name: string) => prove(sections, name) === "http-01";
  const proven = lines.find(({ names }) => names.some(byHttp))?.names.find(byHttp);
  if (proven && keys && !keys.has("challengeDropDir")) {
    keys.missing(
      "challengeDropDir",
      `name the directory that is served as http://${proven}${CHALLENGE_PATH}`,
    );
  }

  const order = [settingsPage, domainsPage, actionsPage].map(({ name }) => name);
  const tell = (notices: Notice[]) =>
    // What several sections take over from [DEFAULT] is told once.
    [...new Map(notices.map((notice) => [JSON.stringify(notice), notice])).values()]
      .sort((a, b) => order.indexOf(a.file) - order.indexOf(b.file) || (a.line ?? 0) - (b.line ?? 0));
  if (!settings || faults.length) throw new ConfigError(tell(faults));
  return Object.freeze({
    ...settings,
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

function prove(sections: readonly Section[], name: string): ChallengeType {
  return routes(sections)(name).find(({ challenge }) => challenge)?.challenge ?? "http-01";
}

// ---------------------------------------------------------------------------------------------- lematt.conf

/** What `[config]` means where it is silent; read by the same rules as what is written. */
const DEFAULTS = {
  reauthorizeDays: "15",
  generateNewCertsAfterDays: "0",
  keyTypes: "rsa ec",
  keyBitsRSA: "2048",
  curve: "prime256v1",
  alwaysGenerateNewKeys: "no",
  directory: "https://acme-v02.api.letsencrypt.org/directory",
  testDirectory: "https://acme-staging-v02.api.letsencrypt.org/directory",
  parallel: "10",
  preflight: "yes",
  commandTimeout: "600",
  ari: "yes",
  dnsWait: "120",
  verifyWait: "60",
};
const CONFIG_KEYS = Object.keys(DEFAULTS).concat(
  "challengeDropDir accountKey rsaTag curveTag caBundle contact profile preferredChain eabKeyId eabHmacKey"
    .split(" "),
);
const COMMAND_KEYS = "prepare uploadCerts uploadKeys update alert dnsPresent dnsCleanup".split(" ");
const SECTION_KEYS = COMMAND_KEYS.concat("domains verify challenge profile ocspStapleRequired".split(" "));

/** OpenSSL's, the SEC's and NIST's names, in lower case. */
const CURVES: ReadonlyMap<string, Curve> = new Map([
  ...["prime256v1", "secp256r1", "p-256"].map((name) => [name, "P-256"] as const),
  ...["secp384r1", "p-384"].map((name) => [name, "P-384"] as const),
  ...["secp521r1", "p-521"].map((name) => [name, "P-521"] as const),
]);
const CHALLENGES = ["http-01", "dns-01", "dns-persist-01"] as const;
const CHALLENGE_PATH = "/.well-known/acme-challenge/"; // RFC 8555 §8.3
/** A timer of more milliseconds than a signed 32-bit number holds fires at once. */
const MAX_SECONDS = Math.floor((2 ** 31 - 1) / 1000);
const MAX_DAYS = 36_500; // a century: what is more is a slip
/** letsencrypt.org/docs/rate-limits, "New Certificates per Exact Set of Identifiers". */
const SAME_NAMES_PER_WEEK = 5;

type Settings = Omit<Config, "directory" | "file" | "sections" | "lines" | "warnings">;

function openSettings(page: Page): Keys | undefined {
  const text = page.read("copy the conf/lematt.conf that comes with lematt, and adapt it");
  if (text === undefined) return undefined;
  const ini = page.parse(text, DEFAULTS);
  for (const { name, line } of ini.sections) {
    if (name === "config") continue;
    page.fault(
      `Cannot use section [${printable(name)}]: the only one here is [config]`,
      line,
      closest(name, ["config"]) ? "write [config]" : "sections of commands belong in actions.conf",
    );
  }
  const section = ini.sections.find(({ name }) => name === "config");
  if (!section) {
    page.fault("Cannot find section [config]", undefined, "put [config] in a line above the keys");
  }
  return section && new Keys(page, ini, section);
}

function readSettings(keys: Keys, directory: string): Settings {
  const reauthorizeDays = keys.number("reauthorizeDays", { max: MAX_DAYS });
  const generateNewCertsAfterDays = keys.number("generateNewCertsAfterDays", { max: MAX_DAYS });
  const keyTypes = keys.words("keyTypes").flatMap(({ text }): KeyType[] => {
    if (text === "rsa" || text === "ec") return [text];
    keys.fault("keyTypes", `${quote(text)} is neither "rsa" nor "ec"`);
    return [];
  });
  const keyBitsRSA = keys.number("keyBitsRSA", { min: 2048, max: 8192, step: 8 });
  const curveText = keys.text("curve") ?? "";
  const curve = CURVES.get(curveText.toLowerCase());
  if (curveText && !curve) {
    keys.fault(
      "curve",
      `${quote(curveText)} is no curve that is known here`,
      "prime256v1, secp384r1 or secp521r1",
    );
  }
  const rsaTag = readTag(keys, "rsaTag") ?? `rsa${keyBitsRSA}`;
  const curveTag = readTag(keys, "curveTag") ?? curveText;
  // Compared as a file system would that does not tell cases apart.
  if (rsaTag.toLowerCase() === curveTag.toLowerCase()) {
    const later = keys.line("rsaTag") > keys.line("curveTag") ? "rsaTag" : "curveTag";
    keys.fault(
      later,
      "the files of both key types would have the same names",
      "make rsaTag and curveTag differ",
    );
  }
  const acmeDirectory = { prod: readUrl(keys, "directory"), test: readUrl(keys, "testDirectory") };
  const accountKeyFile = keys.path("accountKey", directory);
  if (!keys.has("accountKey")) {
    keys.missing("accountKey", "name the file of your account key; lematt makes the key if there is none");
  }
  const accountKey = accountKeyFile && readAccountKey(keys, accountKeyFile);
  const dropDir = keys.path("challengeDropDir", directory);
  if (dropDir) checkDropDir(keys, dropDir);

  const settings: Settings = {
    reauthorizeDays,
    generateNewCertsAfterDays,
    challengeDropDir: dropDir,
    accountKey: accountKeyFile ?? "",
    keyTypes: [...new Set(keyTypes)],
    keyBitsRSA,
    curve: curve ?? "P-256",
    rsaTag,
    curveTag,
    alwaysGenerateNewKeys: keys.boolean("alwaysGenerateNewKeys"),
    acmeDirectory,
    caBundle: readCaBundle(keys, directory),
    contact: keys.words("contact").map(({ text, line }) => readContact(keys, text, line)),
    parallel: keys.number("parallel", { min: 1, max: 100, step: 1 }),
    preflight: keys.text("preflight")?.toLowerCase() === "warn"
      ? "warn"
      : keys.boolean("preflight", ", or warn")
      ? "yes"
      : "no",
    commandTimeoutSeconds: keys.number("commandTimeout", { above: 0, max: MAX_SECONDS }),
    ari: keys.boolean("ari"),
    profile: keys.word("profile"),
    preferredChain: keys.text("preferredChain"),
    eab: readEab(keys, directory),
    dnsWaitSeconds: keys.number("dnsWait", { max: MAX_SECONDS }),
    verifyWaitSeconds: keys.number("verifyWait", { max: MAX_SECONDS }),
  };
  for (const each of [keys, new Keys(keys.page, keys.ini, keys.ini.defaults)]) {
    each.refuseOthers(CONFIG_KEYS, SECTION_KEYS, "a section of actions.conf");
  }
  warnOfRenewal(keys, settings);
  if (isLetsEncrypt(settings)) warnOfKeys(keys, settings, accountKey);
  return defined(settings);
}

function warnOfRenewal(keys: Keys, { reauthorizeDays, generateNewCertsAfterDays: age, keyTypes }: Settings) {
  // A run renews all key types of a line, so as many runs fit into a week as whole sets fit into the limit.
  const least = 7 / Math.floor(SAME_NAMES_PER_WEEK / Math.max(1, keyTypes.length));
  if (age > 0 && age < least) {
    const pair = keyTypes.length > 1 ? ", and a pair of RSA and EC takes two" : "";
    keys.warn(
      "generateNewCertsAfterDays",
      `fewer than ${least} days: Let's Encrypt issues ${SAME_NAMES_PER_WEEK} certificates a week for one set of names${pair}`,
    );
  }
  if (age > 0 && keys.has("reauthorizeDays")) {
    keys.warn(
      "generateNewCertsAfterDays",
      `certificates are renewed at this age, "reauthorizeDays" is passed over`,
    );
  } else if (age === 0 && reauthorizeDays > 30) {
    keys.warn(
      "reauthorizeDays",
      "more than two thirds of a 45-day certificate's life, so such a one is renewed when 30 days are left",
      "15 is right for certificates of 45 days",
    );
  } else if (age === 0 && reauthorizeDays === 0) {
    keys.warn("reauthorizeDays", "with 0, a certificate is renewed only when it has expired");
  }
}

/** Keys that Let's Encrypt refuses, certificates' and accounts' alike (its CP/CPS, "DV-SSL Subscriber Certificate"). */
function warnOfKeys(keys: Keys, { keyTypes, keyBitsRSA, curve }: Settings, account: string | undefined) {
  const accepted = ["2048", "3072", "4096", "P-256", "P-384"];
  const refuses = (key: string) =>
    `Let's Encrypt takes RSA keys of 2048, 3072 and 4096 bits, P-256 and P-384, not ${key}`;
  if (keyTypes.includes("rsa") && !accepted.includes(`${keyBitsRSA}`)) {
    keys.warn("keyBitsRSA", refuses(`${keyBitsRSA}`));
  }
  if (keyTypes.includes("ec") && !accepted.includes(curve)) keys.warn("curve", refuses(curve));
  if (account && !accepted.includes(account)) keys.warn("accountKey", refuses(account));
}

function isLetsEncrypt({ acmeDirectory }: Settings): boolean {
  return /^https:\/\/[^/]*\.letsencrypt\.org\//.test(acmeDirectory.prod);
}

function readTag(keys: Keys, key: string): string | undefined {
  const tag = keys.text(key);
  if (tag !== undefined && !/^[A-Za-z0-9._-]{1,64}$/.test(tag)) {
    keys.fault(
      key,
      `${quote(tag)} cannot stand in a file name`,
      "up to 64 letters, digits, dots, dashes, underscores",
    );
  }
  return tag;
}

function readUrl(keys: Keys, key: string): string {
  const text = keys.text(key) ?? "";
  const url = URL.parse(text);
  if (text && (!url || url.protocol !== "https:" || url.username || url.password || url.hash)) {
    keys.fault(
      key,
      `${text.includes("@") ? "what is there" : quote(text)} is not a plain https URL`,
    );
  }
  return url?.href ?? "";
}

/** RFC 8555 §7.3: one address a URL, no header fields. */
function readContact(keys: Keys, text: string, line: number): string {
  const address = text.replace(/^mailto:/i, "");
  if (!/^[\w.!#$&'*+/=^`{|}~-]{1,64}@[A-Za-z0-9.-]{1,255}$/.test(address)) {
    keys.fault(
      "contact",
      `${quote(text)} is no mail address`,
      "write addresses with blanks between them",
      line,
    );
  }
  return `mailto:${address}`;
}

/** The size or curve of the account key, such as "2048" or "P-256"; undefined if there is none yet, or it is faulty. */
function readAccountKey(keys: Keys, path: string): string | undefined {
  const fault = (why: string, hint?: string) => keys.fault("accountKey", `${quote(path)} ${why}`, hint);
  if (!exists(path)) {
    let parent = dirname(path);
    while (!exists(parent)) parent = dirname(parent);
    const why = notWritable(parent);
    if (why) fault(`does not exist and cannot be made: ${quote(parent)}: ${why}`);
    return undefined;
  }
  const text = readText(path);
  if (isMistake(text)) return fault(`cannot be read: ${text.why}`);
  warnOfReaders(keys, "accountKey", path);

  const blocks = pemBlocks(text);
  const block = blocks.find(({ label }) => /^((RSA|EC|ENCRYPTED) )?PRIVATE KEY$/.test(label));
  if (!block) {
    return fault(`holds ${blocks[0] ? `a ${blocks[0].label}` : "nothing in PEM"}, but no private key`);
  }
  if (block.label.startsWith("ENCRYPTED") || block.pem.includes("Proc-Type: 4,ENCRYPTED")) {
    return fault("is encrypted", `openssl pkey -in ${shellWord(path)} -out FILE`);
  }
  let key: KeyObject;
  try {
    key = createPrivateKey(block.pem);
  } catch { // its message may quote what it read
    return fault("holds a private key that cannot be decoded");
  }
  const { modulusLength, namedCurve } = key.asymmetricKeyDetails ?? {};
  if (key.asymmetricKeyType === "rsa" && modulusLength) {
    return modulusLength < 2048
      ? fault(`is an RSA key of ${modulusLength} bits; 2048 are the least`)
      : `${modulusLength}`;
  }
  return CURVES.get(namedCurve ?? "") ??
    fault(
      `is a key of type ${namedCurve ?? key.asymmetricKeyType}; an account needs RSA, P-256, P-384 or P-521`,
    );
}

function warnOfReaders(keys: Keys, key: string, path: string) {
  const mode = statSync(path).mode & 0o777;
  if (mode & 0o077) {
    const text = `others may read ${quote(path)}, its mode is ${mode.toString(8).padStart(4, "0")}`;
    keys.warn(key, text, `chmod 600 ${shellWord(path)}`);
  }
}

function checkDropDir(keys: Keys, path: string) {
  const fault = (why: string, hint: string) => keys.fault("challengeDropDir", `${quote(path)}: ${why}`, hint);
  if (!exists(path)) return fault("it does not exist", `mkdir -p ${shellWord(path)}`);
  const why = notWritable(path);
  if (why) fault(why, "lematt, as the user that runs it, must be able to write files there");
}

/** Its certificates alone: whatever else is in the file goes no further. */
function readCaBundle(keys: Keys, directory: string): string | undefined {
  const path = keys.path("caBundle", directory);
  if (!path) return undefined;
  const text = readText(path);
  if (isMistake(text)) return keys.fault("caBundle", `${quote(path)}: ${text.why}`);
  const certificates = pemBlocks(text).filter(({ label }) => label === "CERTIFICATE");
  if (!certificates.length) return keys.fault("caBundle", `${quote(path)} holds no certificate in PEM`);
  certificates.forEach(({ pem }, index) => {
    try {
      new X509Certificate(pem);
    } catch {
      keys.fault("caBundle", `certificate ${index + 1} in ${quote(path)} cannot be decoded`);
    }
  });
  return certificates.map(({ pem }) => pem + "\n").join("");
}

/** External account binding, RFC 8555 §7.3.4. */
function readEab(keys: Keys, directory: string): Config["eab"] {
  const keyId = keys.word("eabKeyId");
  const path = keys.path("eabHmacKey", directory);
  for (const [one, other] of [["eabKeyId", "eabHmacKey"], ["eabHmacKey", "eabKeyId"]] as const) {
    if (keys.has(one) && !keys.has(other)) keys.fault(one, `it needs "${other}" beside it`);
  }
  if (!keyId || !path) return undefined;
  const text = readText(path);
  if (isMistake(text)) {
    return keys.fault(
      "eabHmacKey",
      `${quote(path)}: ${text.why}`,
      "it is the path of a file that holds the key",
    );
  }
  warnOfReaders(keys, "eabHmacKey", path);
  try {
    const hmacKey = Uint8Array.fromBase64(text.trim(), { alphabet: "base64url" });
    if (hmacKey.length) return { keyId, hmacKey };
  } catch { /* told below, without what was read */ }
  return keys.fault(
    "eabHmacKey",
    `${quote(path)} holds no base64url text`,
    "copy the key as the CA shows it",
  );
}

// --------------------------------------------------------------------------------------------- actions.conf

const STARTTLS = ["smtp", "imap", "pop3", "ldap", "ftp", "postgres"] as const;

/** The sections, and the names of their `domains` with the lines where they stand. */
function readActions(page: Page): { sections: readonly Section[]; named: readonly Word[] } {
  const text = page.read(`an empty file will do to begin with: touch ${shellWord(page.path)}`);
  if (text === undefined) return { sections: [], named: [] };
  const ini = page.parse(text);
  const named: Word[] = [];
  const sections = ini.sections.map((section) => readSection(new Keys(page, ini, section), named));
  for (const section of [ini.defaults, ...ini.sections]) {
    new Keys(page, ini, section).refuseOthers(SECTION_KEYS, CONFIG_KEYS, "[config] of lematt.conf");
  }
  const fallback = COMMAND_KEYS.some((key) => ini.defaults.entries.has(key.toLowerCase()));
  if (fallback && !sections.some(({ name }) => name === "default")) {
    page.warn(
      "[DEFAULT] is what all sections fall back to, and none by itself",
      ini.defaults.line,
      "write [default] for what is to be run for names of no other section",
    );
  }

  const proof = new Map<string, Section>();
  for (const section of sections) {
    for (const domain of section.challenge ? section.domains : []) {
      const other = proof.get(domain) ?? section;
      proof.set(domain, other);
      if (other.challenge === section.challenge) continue;
      page.fault(
        `Cannot tell how to prove ${quote(domain)}: by ${other.challenge} in [${printable(other.name)}] ` +
          `or by ${section.challenge} in [${printable(section.name)}]`,
        section.line,
      );
    }
  }
  return { sections, named };
}

function readSection(keys: Keys, named: Word[]): Section {
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
    keys.fault(
      "ocspStapleRequired",
      "CAs have ended OCSP, and refuse to issue a certificate that demands a staple",
      "take the line out",
    );
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
    update: commands("update"),
    verify: keys.list("verify").flatMap(({ text, line }) => {
      const endpoint = toEndpoint(text);
      if (!isMistake(endpoint)) return [endpoint];
      keys.fault("verify", `${quote(text)}: ${endpoint.why}`, endpoint.hint, line);
      return [];
    }),
    alert: commands("alert"),
    challenge,
    dnsPresent: commands("dnsPresent"),
    dnsCleanup: commands("dnsCleanup"),
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
  if (sni !== undefined && isAddress(sni)) return { why: `behind "#", an address cannot be a server name` };
  return Object.freeze(defined({ text, host, port, starttls, sni }));
}

/** Where a service is reached: a placeholder, an IPv4 address or a name, which may be one without a dot. */
function toHost(text: string): string | Mistake {
  if (text === "DOMAIN" || text === "DOMAINS_ALL") return text;
  if (text === "") return { why: "there is no name" };
  if (LABEL_ALONE.test(text)) return text.toLowerCase();
  return text.startsWith("*") ? { why: "a wildcard is no host" } : toIdentifier(text);
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
      page.warn(
        `${quote(name)} is also alone in line ${own}: its files are that line's, not links to this one's`,
        line,
      );
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
    page.fault(
      `Cannot put ${names.size} names into one certificate: ${MAX_NAMES} is the most`,
      line,
      "make it two lines",
    );
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
  if (!primary.startsWith("*.") && !isAddress(primary)) return toIdentifier(`${word}.${first}`);
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
      page.fault(
        `Cannot put ${names.length} names into one certificate: ${most} is the most of profile "${profile}"`,
        line,
      );
    }
    for (const name of names) {
      const wildcard = name.startsWith("*.");
      if (!wildcard && !isAddress(name)) continue;
      const challenge = prove(sections, name);
      if (wildcard && challenge === "http-01") {
        const by = of(name.slice(2)).find(({ challenge }) => challenge);
        page.fault(
          `Cannot prove ${quote(name)} by http-01: a wildcard needs dns-01 or dns-persist-01`,
          line,
          by?.domains.length
            ? `add ${name} to "domains" of [${printable(by.name)}]`
            : `name it in a section of actions.conf with "challenge: dns-01"`,
        );
      }
      if (!wildcard && challenge !== "http-01") {
        const hint = `name it in a section of actions.conf with "challenge: http-01"`;
        page.fault(`Cannot prove ${quote(name)} by ${challenge}: an IP address needs http-01`, line, hint);
      }
      if (!wildcard && profile !== "shortlived" && settings && isLetsEncrypt(settings)) {
        page.warn(
          `Let's Encrypt certifies IP addresses in its profile "shortlived" alone`,
          line,
          "profile: shortlived",
        );
      }
    }
    const made = { line, names: Object.freeze(names), sections: delivering };
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
const known = new WeakMap<readonly Section[], Route>();

/** Finds the sections of a name: see sectionsOf. */
function routes(sections: readonly Section[]): Route {
  let route = known.get(sections);
  if (!route) {
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
    route = (name) => overrides.get(name) ?? others;
    known.set(sections, route);
  }
  return route;
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
    page.warn(
      `${quote(text)} is in no line of "domains", so this section does nothing for it`,
      line,
      issued.has(wildcard) ? `name ${wildcard}, which is` : undefined,
    );
  }
}

// ------------------------------------------------------------------------------------- names and addresses

const LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?";
const LABEL_ALONE = new RegExp(`^(?![0-9]+$)${LABEL}$`, "i");
/** Two labels at least, the last not a number: it would be taken for an IPv4 address. */
const HOST = new RegExp(`^(?:${LABEL}\\.)+(?![0-9]+$)${LABEL}$`);
const OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])";
const IPV4 = new RegExp(`^${OCTET}(?:\\.${OCTET}){3}$`);

function isAddress(name: string): boolean {
  return name.includes(":") || IPV4.test(name);
}

/**
 * A host name, wildcard or IP address in the one form in which it is compared, stored and sent to the CA: lower case,
 * A-labels, RFC 5952 text; or why it is none. A trailing dot is refused rather than dropped: one name, one spelling.
 */
function toIdentifier(written: string): string | Mistake {
  // Before the conversion too, which takes quadratic time.
  const name = written.length > 253 || !/[^!-~]/.test(written) ? written.toLowerCase() : toAscii(written);
  if (isMistake(name)) return name;
  if (name.length > 253) return { why: "it has more than 253 characters" };
  const host = name.startsWith("*.") ? name.slice(2) : name;
  if (HOST.test(host)) {
    if (!host.includes("xn--") || domainToASCII(host) === host) return name;
    return { why: `it has an "xn--" label that stands for nothing` };
  }
  if (IPV4.test(name)) return name;
  const address = toIPv6(name);
  if (address?.startsWith("::ffff:")) {
    return { why: "it is an IPv4 address in IPv6 clothes", hint: "write it as IPv4" };
  }
  return address ?? whyNoHost(host);
}

/** A-labels for what is not ASCII, if and only if the way back leads to the same name. */
function toAscii(written: string): string | Mistake {
  if (/[\p{C}\p{Z}]/u.test(written)) return { why: "it has a character that cannot be seen" };
  const labels = written.normalize("NFC").split(".");
  for (const [index, label] of labels.entries()) {
    const foreign = /[^!-~]/.test(label);
    const ascii = foreign ? domainToASCII(label) : label.toLowerCase();
    if (!ascii) return { why: `${quote(label)} has no form in the DNS` };
    const back = domainToUnicode(ascii);
    if (foreign && (back === ascii || back !== label.toLowerCase())) {
      return { why: `${quote(label)} would become ${quote(back)}`, hint: "write that if you mean it" };
    }
    labels[index] = ascii;
  }
  return labels.join(".");
}

/** Canonical text by RFC 5952, which is what URLs have too; undefined if it is none. */
function toIPv6(text: string): string | undefined {
  return /^[0-9a-f:.]{2,45}$/i.test(text) && text.includes(":")
    ? URL.parse(`http://[${text}]/`)?.hostname.slice(1, -1)
    : undefined;
}

function whyNoHost(name: string): Mistake {
  const odd = name.includes("/") ? "/" : /[^a-z0-9.-]/.exec(name)?.[0];
  if (odd === "*") return { why: `"*" may only be the whole first label` };
  if (odd === "," || odd === ";") {
    return { why: `${quote(odd)} cannot stand in a name`, hint: "separate names by blanks" };
  }
  if (odd === "#") return { why: `"#" cannot stand in a name`, hint: "a comment needs a line of its own" };
  if (odd === "/") return { why: `"/" cannot stand in a name`, hint: "write the name alone, not a URL" };
  if (odd) return { why: `${quote(odd)} cannot stand in a ${odd === ":" ? "name or IP address" : "name"}` };
  if (name.endsWith(".")) return { why: "it ends in a dot", hint: "leave the dot out" };
  const labels = name.split(".");
  if (labels.includes("")) return { why: "an empty label, where two dots meet or a dot begins it" };
  const long = labels.find((label) => label.length > 63);
  if (long) return { why: `the label ${quote(long)} has more than 63 characters` };
  const dash = labels.find((label) => /^-|-$/.test(label));
  if (dash) return { why: `the label ${quote(dash)} begins or ends with a dash` };
  if (labels.length < 2) return { why: "it has no dot", hint: "write the name in full" };
  return { why: "its last label is a number, but it is no IP address" };
}

// ------------------------------------------------------------------------------------------- reading values

/** Why a piece of text is not what it should be. */
interface Mistake {
  readonly why: string;
  readonly hint?: string;
}

interface Word {
  readonly text: string;
  readonly line: number;
}

function isMistake(value: unknown): value is Mistake {
  return typeof value === "object" && value !== null && "why" in value;
}

/** One of the three files, and the faults and warnings found in it. */
class Page {
  readonly name: string;
  constructor(readonly path: string, readonly faults: Notice[], readonly warnings: Notice[]) {
    this.name = basename(path);
  }

  fault(text: string, line?: number, hint?: string): undefined {
    this.faults.push(defined({ file: this.name, line, text, hint }));
  }

  warn(text: string, line?: number, hint?: string) {
    this.warnings.push(defined({ file: this.name, line, text, hint }));
  }

  read(hintIfMissing: string): string | undefined {
    const text = readText(this.path);
    if (isMistake(text)) {
      const hint = exists(this.path) ? undefined : hintIfMissing;
      return this.fault(`Cannot read ${quote(this.path)}: ${text.why}`, undefined, hint);
    }
    const lost = text.indexOf("\ufffd"); // what the decoder puts for bytes that are no UTF-8
    if (lost >= 0) this.fault("Cannot read it: not UTF-8", text.slice(0, lost).split(/\r\n|\r|\n/).length);
    return text;
  }

  parse(text: string, fallbacks?: Readonly<Record<string, string>>): Ini {
    const ini = parseIni(text, fallbacks);
    for (const { line, text, hint } of ini.faults) this.fault(text, line, hint);
    return ini;
  }
}

interface Range {
  readonly min?: number; // 0 without it
  readonly above?: number; // instead of min: itself excluded
  readonly max: number;
  readonly step?: number; // 1: whole numbers
}

/**
 * The keys of one section, each read as what it is to be. What is wrong becomes a fault of its line, and reads as
 * something harmless, so that the rest is read as well.
 */
class Keys {
  readonly #values = new Map<string, Value | undefined>();

  constructor(readonly page: Page, readonly ini: Ini, readonly section: IniSection) {}

  /** Whether it was written, in the section or in [DEFAULT]. */
  has(key: string): boolean {
    return this.line(key) > 0;
  }

  line(key: string): number {
    return this.#value(key)?.entry.line ?? 0;
  }

  fault(key: string, why: string, hint?: string, line = this.line(key)): undefined {
    const comment = /\s[#;]/.test(this.#value(key)?.text.slice(0, 1000) ?? "");
    this.page.fault(cannotRead(key, why), line, comment ? "a comment needs a line of its own" : hint);
  }

  missing(key: string, hint: string) {
    this.page.fault(
      `Cannot find ${quote(key)} in [${printable(this.section.name)}]`,
      this.section.line,
      hint,
    );
  }

  warn(key: string, text: string, hint?: string) {
    this.page.warn(`${quote(key)}: ${text}`, this.line(key) || this.section.line, hint);
  }

  /** A value of one line that is not empty. */
  text(key: string): string | undefined {
    const value = this.#value(key);
    if (!value || value.fault) return undefined;
    const text = value.text.trim();
    if (text === "") return this.fault(key, "there is no value", "take the line out, or write one");
    if (text.includes("\n")) {
      const next = value.entry.lines[value.text.trimEnd().indexOf("\n") >= 0 ? 1 : 0];
      return this.fault(
        key,
        "it goes over several lines",
        `line ${next} is indented, so it continues this one`,
      );
    }
    if (/\p{Cc}/u.test(text)) return this.fault(key, "a control character in it");
    return text;
  }

  word(key: string): string | undefined {
    const text = this.text(key);
    return text && /\s/.test(text) ? this.fault(key, `${quote(text)} is more than one word`) : text;
  }

  /** ConfigParser's getboolean; false if absent. */
  boolean(key: string, or = ""): boolean {
    const text = this.text(key)?.toLowerCase();
    if (text === undefined || ["no", "false", "off", "0"].includes(text)) return false;
    if (!["yes", "true", "on", "1"].includes(text)) {
      this.fault(key, `${quote(text)} is neither yes nor no${or}`);
    }
    return true;
  }

  number(key: string, { min = 0, above, max, step }: Range): number {
    const text = this.text(key);
    if (text === undefined) return 0;
    const number = /^(?:\d+\.?\d*|\.\d+)$/.test(text) ? Number(text) : NaN;
    if (number >= min && number > (above ?? -1) && number <= max && (!step || number % step === 0)) {
      return number;
    }
    const kind = !step ? "a number" : step === 1 ? "a whole number" : `a multiple of ${step}`;
    this.fault(
      key,
      `${quote(text)} is not ${kind} ${above === undefined ? `from ${min}` : `above ${above}`} to ${max}`,
    );
    return 0;
  }

  oneOf<T extends string>(key: string, choices: readonly T[]): T | undefined {
    const text = this.text(key);
    const choice = choices.find((known) => known === text);
    if (text !== undefined && !choice) this.fault(key, `${quote(text)} is none of ${choices.join(", ")}`);
    return choice;
  }

  /** An absolute path; in the file it may be relative to the configuration directory. */
  path(key: string, directory: string): string | undefined {
    const text = this.text(key);
    if (text && /^[~$]/.test(text)) {
      return this.fault(key, `no shell reads ${quote(text)}`, "write the path in full");
    }
    return text && resolve(directory, text);
  }

  /** Words with blanks between them, on one line or several; at least one, if the key is there. */
  words(key: string): Word[] {
    const value = this.#value(key);
    if (!value || value.fault) return [];
    const lineOf = lineFinder(value);
    const words = Array.from(
      value.text.matchAll(/\S+/g),
      ({ 0: text, index }) => ({ text, line: lineOf(index) }),
    );
    if (!words.length) this.fault(key, "there is no value", "take the line out, or write one");
    return words;
  }

  /** A JSON array of strings that can each be a command line. */
  list(key: string): Word[] {
    const value = this.#value(key);
    if (!value || value.fault) return [];
    const lineOf = lineFinder(value);
    const told = (why: string, hint: string | undefined, line: number) =>
      this.page.fault(`Cannot read list ${quote(key)}: ${why}`, line, hint);
    const items = parseList(value.text);
    if (isMistake(items)) {
      told(items.why, items.hint, lineOf(items.at));
      return [];
    }
    return items.map(({ text, at }) => {
      const line = lineOf(at);
      if (!text.trim()) told("an empty string in it", "take it out", line);
      // A command line is an argument of the shell: no NUL can be in it, and no half of a surrogate pair.
      if (/[\0\r\n]/.test(text) || !text.isWellFormed()) {
        told(`a line break or NUL in ${quote(text)}`, undefined, line);
      }
      return { text, line };
    });
  }

  /**
   * Refuses every key of the section but these, and those that a %(…)s asks for; so it is to be called when the values
   * of all sections were read.
   */
  refuseOthers(keys: readonly string[], elsewhere: readonly string[], place: string) {
    const known = new Set(keys.map((key) => key.toLowerCase()));
    for (const { key, spelling, line } of this.section.entries.values()) {
      if (known.has(key) || this.ini.used.has(key)) continue;
      const meant = closest(key, keys);
      const there = elsewhere.find((other) => other.toLowerCase() === key);
      const hint = there ? `it belongs in ${place}` : meant && `did you mean "${meant}"?`;
      this.page.fault(`Cannot use key ${quote(spelling)}: it is unknown`, line, hint);
    }
  }

  #value(key: string): Value | undefined {
    if (!this.#values.has(key)) {
      const value = valueOf(this.ini, this.section, key.toLowerCase());
      this.#values.set(key, value);
      if (value?.fault) this.page.fault(value.fault.text, value.fault.line, value.fault.hint);
    }
    return this.#values.get(key);
  }
}

/** A JSON array of strings with the offset of each; or what is wrong where, more clearly than JSON.parse tells it. */
function parseList(text: string): { text: string; at: number }[] | Mistake & { at: number } {
  const items: { text: string; at: number }[] = [];
  let at = 0;
  const next = () => {
    while (" \t\r\n".includes(text[at] ?? "-")) at++;
    return text[at];
  };
  const wrong = (why: string, hint?: string) => ({
    why: `not JSON, ${why}`,
    hint,
    at: Math.min(at, text.length - 1),
  });

  if (next() !== "[") {
    return wrong(
      `it does not begin with "["`,
      `write ${text.trim() ? printable(JSON.stringify([text.trim()])) : "[]"}`,
    );
  }
  at++;
  if (next() !== "]") {
    for (;;) {
      const quoteMark = next();
      if (quoteMark !== '"') {
        return quoteMark === "]" && items.length
          ? wrong(`a "," before its "]"`)
          : wrong(`no string in double quotes ${before(text, at)}`);
      }
      let end = at + 1;
      while (end < text.length && text[end] !== '"') end += text[end] === "\\" ? 2 : 1;
      if (end >= text.length) return wrong(`the string ${quote(text.slice(at))} does not end`);
      try {
        items.push({ text: JSON.parse(text.slice(at, end + 1)), at });
      } catch {
        return wrong(
          `the string ${quote(text.slice(at, end + 1))} has a line break or an unknown "\\" in it`,
        );
      }
      at = end + 1;
      const delimiter = next();
      if (delimiter === "]") break;
      if (delimiter !== ",") return wrong(`no "," or "]" ${before(text, at)}`);
      at++;
    }
  }
  at++;
  const more = next();
  if (more === undefined) return items;
  return wrong(`text behind its "]"`, /[#;]/.test(more) ? "a comment needs a line of its own" : undefined);
}

function before(text: string, at: number): string {
  return at < text.length ? `before ${quote(text.slice(at, at + 20))}` : "at its end";
}

/** The word that was meant, if one differs by case, dashes, or two slips at most. */
function closest(word: string, choices: readonly string[]): string | undefined {
  const plain = (text: string) => text.toLowerCase().replace(/[-_\s]/g, "");
  if (word.length > 40) return undefined;
  return choices.map((choice) => ({ choice, slips: distance(plain(word), plain(choice)) }))
    .filter(({ choice, slips }) => slips <= Math.min(2, choice.length / 3))
    .sort((a, b) => a.slips - b.slips)[0]?.choice;
}

/** Levenshtein's: letters put in, left out or replaced. */
function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, index) => index);
  for (const [i, letter] of [...a].entries()) {
    const above = row;
    row = [i + 1];
    for (let j = 1; j <= b.length; j++) {
      row.push(Math.min(above[j]! + 1, row[j - 1]! + 1, above[j - 1]! + (letter === b[j - 1] ? 0 : 1)));
    }
  }
  return row[b.length]!;
}

/** Without the keys that are undefined, so that absent is absent. */
function defined<T extends object>(record: T): T {
  return Object.fromEntries(Object.entries(record).filter(([, value]) => value !== undefined)) as T;
}

// ---------------------------------------------------------------------------------------------------- files

/** The real path of lematt.conf. */
function locate(path: string | undefined, beside: string | undefined): string {
  const places = path !== undefined ? [path] : ["conf", ...(beside === undefined ? [] : [beside])];
  const reasons: string[] = [];
  for (const place of places) {
    try {
      const directory = statSync(place).isDirectory();
      const file = directory ? join(place, "lematt.conf") : place;
      // Without it, a directory that was named has two other files to be read.
      return exists(file) || !directory || !path
        ? realpathSync(file)
        : join(realpathSync(place), "lematt.conf");
    } catch (error) {
      reasons.push(`${quote(place)}: ${whyNot(error)}`);
    }
  }
  const hint = "name lematt.conf, or its directory, with --config";
  throw new ConfigError([{
    file: "lematt.conf",
    text: `Cannot find it in ${reasons.join(", or in ")}`,
    hint,
  }]);
}

/** Whether something stands there, be it out of reach. */
function exists(path: string): boolean {
  try {
    statSync(path);
  } catch (error) {
    return !/^(ENOENT|ENOTDIR)$/.test(codeOf(error));
  }
  return true;
}

/** Why no file can be made in the directory; undefined if it can. */
function notWritable(directory: string): string | undefined {
  try {
    if (!statSync(directory).isDirectory()) return "it is not a directory";
    accessSync(directory, constants.W_OK | constants.X_OK);
  } catch (error) {
    return whyNot(error);
  }
}

function readText(path: string): string | Mistake {
  try {
    // A pipe or a device might never end.
    return statSync(path).isFile()
      ? new TextDecoder().decode(readFileSync(path))
      : { why: "it is not a file" };
  } catch (error) {
    return { why: whyNot(error) };
  }
}

function codeOf(error: unknown): string {
  return error instanceof Error && "code" in error ? String(error.code) : "";
}

function whyNot(error: unknown): string {
  const code = codeOf(error);
  if (code === "ENOENT") return "it does not exist";
  if (code === "EACCES" || code === "EPERM") return "permission denied";
  return printable(error instanceof Error ? error.message : String(error), 200);
}

/** The blocks of a PEM file, from one marker to the next: no pattern over the whole, which a large file would defeat. */
function pemBlocks(text: string): { label: string; pem: string }[] {
  const blocks: { label: string; pem: string }[] = [];
  let begin: RegExpExecArray | undefined;
  for (const marker of text.matchAll(/-----(BEGIN|END) ([A-Z0-9 ]{1,40})-----/g)) {
    if (marker[1] === "END" && begin?.[2] === marker[2]) {
      blocks.push({ label: marker[2]!, pem: text.slice(begin!.index, marker.index + marker[0].length) });
    }
    begin = marker[1] === "BEGIN" ? marker : undefined;
  }
  return blocks;
}

/** A path for a command line that is shown, to be copied. */
function shellWord(path: string): string {
  return /^[\w@%+=:,./-]+$/.test(path) ? path : `'${printable(path, 200).replaceAll("'", `'\\''`)}'`;
}
