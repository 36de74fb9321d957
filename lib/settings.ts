/**
 * lematt.conf: its section [config] -> Settings, with what each key means where it is silent, and with what is
 * known to go wrong with it.
 *
 * Reads the files that it names (account key, CA bundle, EAB key) and never writes; shows no key material. It does
 * not know what the other two files say.
 */
import { dirname } from "node:path";
import { isMistake, printable, quote, shellWord } from "./text.ts";
import { closest, defined, exists, Keys, Page, readText, whyNot } from "./values.ts";
import { type KeySpec, keySpecOf, pemBlocks, readCertificate } from "./x509.ts";

export type Mode = "test" | "prod";
export type KeyType = "rsa" | "ec";
export type Curve = "P-256" | "P-384" | "P-521";

/** What [config] says; a part of Config. */
export interface Settings {
  readonly reauthorizeDays?: number; // absent: not configured
  readonly generateNewCertsAfterDays: number; // 0 = off
  readonly challengeDropDir?: string; // absolute
  readonly accountKey: string; // absolute path; the file need not exist yet
  readonly keyTypes: readonly KeyType[];
  readonly keyBitsRSA: number;
  readonly curve: Curve;
  readonly rsaTag: string;
  readonly curveTag: string;
  readonly alwaysGenerateNewKeys: boolean;
  readonly directoryUrl: string; // of this mode's CA: `directory` or `testDirectory`
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
}

/** What `[config]` means where it is silent; read by the same rules as what is written. */
const DEFAULTS = {
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
/** Every key of [config], as it is documented. */
export const CONFIG_KEYS = Object.keys(DEFAULTS).concat(
  "reauthorizeDays challengeDropDir accountKey rsaTag curveTag caBundle contact profile preferredChain eabKeyId eabHmacKey"
    .split(" "),
);

/** OpenSSL's, the SEC's and NIST's names, in lower case. */
const CURVES: ReadonlyMap<string, Curve> = new Map([
  ...["prime256v1", "secp256r1", "p-256"].map((name) => [name, "P-256"] as const),
  ...["secp384r1", "p-384"].map((name) => [name, "P-384"] as const),
  ...["secp521r1", "p-521"].map((name) => [name, "P-521"] as const),
]);
/** A timer of more milliseconds than a signed 32-bit number holds fires at once. */
export const MAX_SECONDS = Math.floor((2 ** 31 - 1) / 1000);
const MAX_DAYS = 36_500; // a century: what is more is a slip
/** letsencrypt.org/docs/rate-limits, "New Certificates per Exact Set of Identifiers". */
const SAME_NAMES_PER_WEEK = 5;

/** The keys of [config], none of them read as yet; undefined if there is no such section. */
export function openSettings(page: Page): Keys | undefined {
  const text = page.read("copy the conf/lematt.conf that comes with lematt, and adapt it");
  if (text === undefined) return undefined;
  const ini = page.parse(text, DEFAULTS);
  for (const { name, line } of ini.sections) {
    if (name === "config") continue;
    const hint = closest(name, ["config"]) ? "write [config]" : "sections of commands belong in actions.conf";
    page.fault(`Cannot use section [${printable(name)}]: the only one here is [config]`, line, hint);
  }
  const section = ini.sections.find(({ name }) => name === "config");
  if (!section) {
    page.fault("Cannot find section [config]", undefined, "put [config] in a line above the keys");
  }
  return section && new Keys(page, ini, section);
}

/** Reads every key; relative paths are below `directory`. What is faulty has some value of the right type. */
export function readSettings(keys: Keys, directory: string, mode: Mode): Settings {
  const reauthorizeDays = keys.has("reauthorizeDays")
    ? keys.number("reauthorizeDays", { max: MAX_DAYS })
    : undefined;
  const generateNewCertsAfterDays = keys.number("generateNewCertsAfterDays", { max: MAX_DAYS });
  const keyTypes = readKeyTypes(keys);
  const keyBitsRSA = keys.number("keyBitsRSA", { min: 2048, max: 8192, step: 8 });
  const curveText = keys.text("curve") ?? "";
  const curve = CURVES.get(curveText.toLowerCase());
  if (curveText && !curve) {
    const hint = "prime256v1, secp384r1 or secp521r1";
    keys.fault("curve", `${quote(curveText)} is no curve that is known here`, hint);
  }
  const rsaTag = readTag(keys, "rsaTag") ?? `rsa${keyBitsRSA}`;
  const curveTag = readTag(keys, "curveTag") ?? curveText;
  // Compared as a file system would that does not tell cases apart.
  if (rsaTag.toLowerCase() === curveTag.toLowerCase()) {
    const later = keys.line("rsaTag") > keys.line("curveTag") ? "rsaTag" : "curveTag";
    const hint = "make rsaTag and curveTag differ";
    keys.fault(later, "the files of both key types would have the same names", hint);
  }
  const directories = { prod: readUrl(keys, "directory"), test: readUrl(keys, "testDirectory") };
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
    keyTypes,
    keyBitsRSA,
    curve: curve ?? "P-256",
    rsaTag,
    curveTag,
    alwaysGenerateNewKeys: keys.boolean("alwaysGenerateNewKeys"),
    directoryUrl: directories[mode],
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
  warnOfRenewal(keys, settings);
  if (isLetsEncrypt(settings)) warnOfKeys(keys, settings, accountKey);
  return defined(settings);
}

/** The kinds of key, each once; empty where the key is absent. */
export function readKeyTypes(keys: Keys): KeyType[] {
  const keyTypes = keys.words("keyTypes").flatMap(({ text }): KeyType[] => {
    if (text === "rsa" || text === "ec") return [text];
    keys.fault("keyTypes", `${quote(text)} is neither "rsa" nor "ec"`);
    return [];
  });
  return [...new Set(keyTypes)];
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
  } else if (age === 0 && reauthorizeDays! > 30) {
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

/** Whether its rules and limits are the ones to warn of. */
export function isLetsEncrypt({ directoryUrl }: Settings): boolean {
  return /^https:\/\/[^/]*\.letsencrypt\.org\//.test(directoryUrl);
}

function readTag(keys: Keys, key: string): string | undefined {
  const tag = keys.text(key);
  if (tag !== undefined && !/^[A-Za-z0-9._-]{1,64}$/.test(tag)) {
    const hint = "up to 64 letters, digits, dots, dashes, underscores";
    keys.fault(key, `${quote(tag)} cannot stand in a file name`, hint);
  }
  return tag;
}

function readUrl(keys: Keys, key: string): string {
  const text = keys.text(key) ?? "";
  const url = URL.parse(text);
  if (text && (!url || url.protocol !== "https:" || url.username || url.password || url.hash)) {
    keys.fault(key, `${text.includes("@") ? "what is there" : quote(text)} is not a plain https URL`);
  }
  return url?.href ?? "";
}

/** RFC 8555 §7.3: one address a URL, no header fields. */
function readContact(keys: Keys, text: string, line: number): string {
  const address = text.replace(/^mailto:/i, "");
  if (!/^[\w.!#$&'*+/=^`{|}~-]{1,64}@[A-Za-z0-9.-]{1,255}$/.test(address)) {
    const hint = "write addresses with blanks between them";
    keys.fault("contact", `${quote(text)} is no mail address`, hint, line);
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
  let key: KeySpec | string;
  try {
    key = keySpecOf(block.pem);
  } catch { // its message may quote what it read
    return fault("holds a private key that cannot be decoded");
  }
  if (typeof key === "string") {
    return fault(`is a key of type ${key}; an account needs RSA, P-256, P-384 or P-521`);
  }
  if (key.type === "ec") return key.curve;
  return key.bits < 2048 ? fault(`is an RSA key of ${key.bits} bits; 2048 are the least`) : `${key.bits}`;
}

function warnOfReaders(keys: Keys, key: string, path: string) {
  const mode = Deno.statSync(path).mode! & 0o777;
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
      readCertificate(pem);
    } catch {
      keys.fault("caBundle", `certificate ${index + 1} in ${quote(path)} cannot be decoded`);
    }
  });
  return certificates.map(({ pem }) => pem + "\n").join("");
}

/** External account binding, RFC 8555 §7.3.4. */
function readEab(keys: Keys, directory: string): Settings["eab"] {
  const keyId = keys.word("eabKeyId");
  const path = keys.path("eabHmacKey", directory);
  for (const [one, other] of [["eabKeyId", "eabHmacKey"], ["eabHmacKey", "eabKeyId"]] as const) {
    if (keys.has(one) && !keys.has(other)) keys.fault(one, `it needs "${other}" beside it`);
  }
  if (!keyId || !path) return undefined;
  const fault = (why: string, hint: string) => keys.fault("eabHmacKey", `${quote(path)}${why}`, hint);
  const text = readText(path);
  if (isMistake(text)) return fault(`: ${text.why}`, "it is the path of a file that holds the key");
  warnOfReaders(keys, "eabHmacKey", path);
  try {
    const hmacKey = Uint8Array.fromBase64(text.trim(), { alphabet: "base64url" });
    if (hmacKey.length) return { keyId, hmacKey };
  } catch { /* told below, without what was read */ }
  return fault(" holds no base64url text", "copy the key as the CA shows it");
}

/**
 * Why no file can be made in the directory; undefined if it can, as far as that is known beforehand: to which groups this
 * user belongs is not, nor what the mode stands for where there are access control lists.
 */
function notWritable(directory: string): string | undefined {
  try {
    const { isDirectory, mode, uid } = Deno.statSync(directory);
    if (!isDirectory) return "it is not a directory";
    const us = Deno.uid();
    if (us === 0 || us === null || mode === null) return undefined;
    const [owner, group, others] = [mode >> 6, mode >> 3, mode];
    const classes = us === uid ? [owner] : [group, others];
    return classes.some((bits) => (bits & 0o3) === 0o3) ? undefined : "permission denied";
  } catch (error) {
    return whyNot(error);
  }
}
