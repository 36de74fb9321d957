/**
 * What stands below `conf/test` and `conf/prod`: the names of its files, what is found in them, and every change to them.
 *
 * The only writer there. Keeps the names of the Python original, so that its directories are taken over in place. Files
 * are written beside their target, flushed and renamed; an OS lock on `.lock` keeps a second run out. What to do about
 * what is found is for `plan.ts` to say.
 */

import defer * as nodeCrypto from "node:crypto";
import { basename, dirname, join } from "node:path";
import type { Config, KeyType, Line, Mode } from "./config.ts";
import {
  type Certificate,
  certificateDer,
  coversExactly,
  describeCertificate,
  isKeyOf,
  isPrivateKey,
} from "./x509.ts";

/** What was found of one certificate and its key. */
export type Finding =
  | { readonly kind: "present"; readonly certificate: Certificate }
  | { readonly kind: "missing"; readonly what: "certificate" | "key" }
  | { readonly kind: "unreadable"; readonly what: "certificate" | "key"; readonly detail: string }
  | { readonly kind: "other names"; readonly certificate: Certificate }
  | { readonly kind: "other key"; readonly certificate: Certificate };

/** One certificate of the configuration as it stands on disk. */
export interface Entry {
  readonly line: Line;
  readonly keyType: KeyType;
  /** What the names of its files begin with. */
  readonly stem: string;
  readonly finding: Finding;
}

/** A certificate received and checked, with what belongs to it. */
export interface Issued {
  /** PEM; the key that is on disk already, or a new one that replaces it. */
  readonly keyPem: string;
  readonly csrPem: string;
  readonly chainPem: string;
  readonly certificate: Certificate;
}

/** Absolute paths of the files of one certificate. */
export interface Files {
  readonly key: string;
  readonly csr: string;
  readonly cert: string;
}

/** What one section still has to deliver. Dates are ISO 8601. */
export interface Debt {
  since: string;
  /** base name of the certificate file -> fingerprint of the newest certificate that is owed */
  certificates: Record<string, string>;
  attempts: number;
  retryAt?: string;
  lastError?: string;
}

/** Why a line could not be issued, the last time. Dates are ISO 8601. */
export interface Failure {
  /** How often in a row. */
  count: number;
  at: string;
  error: string;
  /** Not to be tried before; absent where the next run may. */
  retryAt?: string;
}

/** An account at a CA. */
export interface Account {
  url: string;
  /** mailto: URLs, as the CA knows them */
  contact: string[];
  /** names by which CAA records and dns-persist-01 refer to the CA */
  issuers: string[];
}

/** What is known of the renewal of one certificate. Dates are ISO 8601. */
export interface Renewal {
  /** the account that ordered it, named as in `accounts`; absent where another program did */
  account?: string;
  /** the CA's window (RFC 9773), and the moment drawn in it */
  window?: { start: string; end: string; at: string; explanationUrl?: string };
  /** not to ask the CA again before */
  askAt?: string;
  /** when the CA's suggestion led to this certificate; it heeds no other for a day */
  suggestedAt?: string;
}

/** `state.json`: what one run tells the next. Dates are ISO 8601. */
export interface State {
  version: 1;
  /** "<directory URL> <thumbprint of the account key>" -> the account there */
  accounts: Record<string, Account>;
  /** name of a section -> what it owes */
  owed: Record<string, Debt>;
  /** stem of a line -> its last failure, until it succeeds */
  failures: Record<string, Failure>;
  /** directory URL -> until when the CA wants no new order from this account */
  holds: Record<string, string>;
  /** fingerprint of a certificate that was revoked and is to be replaced under a new key -> when */
  revoked: Record<string, string>;
  /** identifier of a certificate (RFC 9773 §4.1) -> what is known of its renewal */
  renewals: Record<string, Renewal>;
  /** name of a section -> cause of an alert -> when it was last told of it */
  alerts: Record<string, Record<string, string>>;
}

/** Another run holds the lock. */
export class LockedError extends Error {
  override readonly name = "LockedError";
}

const FILE_NAME_MAX = 255;
const TEMPORARY = ".new";

/** Directory of one mode's files. */
export function modeDirectory(config: Config): string {
  return config.base;
}

function statePath(config: Config): string {
  return join(modeDirectory(config), "state.json");
}

function lockPath(config: Config): string {
  return join(modeDirectory(config), ".lock");
}

/** Base names of the files of `stem`, those of the original. */
function fileNames(config: Config, stem: string, keyType: KeyType): Files {
  const tag = (keyType === "rsa" ? config.rsaTag : config.curveTag) + (config.mode === "test" ? ".test" : "");
  return {
    key: `${stem}-key.${tag}.pem`,
    csr: `${stem}-csr.${tag}.csr`,
    cert: `${stem}-cert-combined.${tag}.pem`,
  };
}

/** Absolute paths of the files of one certificate. */
export function filesOf(config: Config, entry: Pick<Entry, "stem" | "keyType">): Files {
  const names = fileNames(config, entry.stem, entry.keyType);
  const base = modeDirectory(config);
  return {
    key: `${base}/key/${names.key}`, // not join(), which takes its time to find nothing to normalize
    csr: `${base}/csr/${names.csr}`,
    cert: `${base}/cert/${names.cert}`,
  };
}

/**
 * What the file names of a certificate begin with: its names joined by `_`, the primary first. Where the longest file
 * name would exceed 255 bytes, the primary (cut if need be), the count of names and a digest of the whole.
 */
export function stemOf(config: Config, names: readonly string[]): string {
  const stem = names.map((name) => name.replace("*", "_wildcard").replaceAll(":", "-")).join("_");
  const longest = Math.max(
    ...(["rsa", "ec"] as const).map((type) => fileNames(config, "", type).cert.length),
  );
  if (stem.length + longest <= FILE_NAME_MAX) return stem;
  const rest = `_${names.length}names_${sha256(stem).slice(0, 12)}`;
  return names[0]!.replace("*", "_wildcard").slice(0, FILE_NAME_MAX - longest - rest.length) + rest;
}

/**
 * The line whose files a name's own file names stand for: the one that has this name alone, else the first that has it.
 * Each name of a line of several is linked to the bundle by the line that owns it.
 */
function linkOwners(config: Config): Map<string, Line> {
  const owners = new Map<string, Line>();
  for (const line of config.lines) if (line.names.length === 1) owners.set(line.names[0]!, line);
  for (const line of config.lines) {
    for (const name of line.names) if (!owners.has(name)) owners.set(name, line);
  }
  return owners;
}

/** What the file names of a certificate begin with, and the links by which its names find them. */
function stemAndLinks(config: Config, entry: Entry, owners: ReadonlyMap<string, Line>): string[] {
  const { line, stem } = entry;
  const linked = line.names.length === 1 ? [] : line.names.filter((name) => owners.get(name) === line);
  return [stem, ...linked.map((name) => stemOf(config, [name]))];
}

/** Files in the directories of keys, requests and certificates that belong to no line any more, relative to the mode's. */
export function strayFiles(config: Config, inventory: readonly Entry[]): string[] {
  const owners = linkOwners(config);
  const stems = { rsa: new Set<string>(), ec: new Set<string>() };
  for (const entry of inventory) {
    for (const stem of stemAndLinks(config, entry, owners)) stems[entry.keyType].add(stem);
  }
  return (["cert", "csr", "key"] as const).flatMap((directory) => {
    const ends = (["rsa", "ec"] as const).map((keyType) =>
      [fileNames(config, "", keyType)[directory], stems[keyType]] as const
    );
    const isKnown = (name: string) =>
      ends.some(([end, known]) => name.endsWith(end) && known.has(name.slice(0, -end.length)));
    return listing(join(modeDirectory(config), directory))
      .filter((name) => !name.startsWith(".") && !isKnown(name)).map((name) => `${directory}/${name}`);
  });
}

function listing(directory: string): string[] {
  try {
    return Array.from(Deno.readDirSync(directory), ({ name }) => name).sort();
  } catch (error) {
    if ((error as { code?: string }).code === "ENOENT") return [];
    throw error;
  }
}

/** Reads what is on disk for every certificate of the configuration, in the order of `domains`. Changes nothing. */
export function readInventory(config: Config): Entry[] {
  return config.lines.flatMap((line) => line.keyTypes.map((keyType) => readEntry(config, line, keyType)));
}

function readEntry(config: Config, line: Line, keyType: KeyType): Entry {
  const stem = stemOf(config, line.names);
  const entry = {
    line,
    keyType,
    stem,
    finding: inspect(filesOf(config, { stem, keyType }), line.names),
  };
  if (line.names.length < 3 || entry.finding.kind !== "missing") return entry;
  const other = stemInOtherOrder(config, line, keyType);
  if (other === undefined) return entry;
  return {
    ...entry,
    stem: other,
    finding: inspect(filesOf(config, { stem: other, keyType }), line.names),
  };
}

/**
 * The original left it to chance in which order names that differ in the last label alone (`example.net example.org`)
 * stand in a stem. The link of the primary tells which it was.
 */
function stemInOtherOrder(config: Config, line: Line, keyType: KeyType): string | undefined {
  const link = filesOf(config, { stem: stemOf(config, line.names.slice(0, 1)), keyType }).cert;
  const target = linkTarget(link);
  const end = fileNames(config, "", keyType).cert;
  if (target === undefined || target.includes("/") || !target.endsWith(end)) return undefined;
  const stem = target.slice(0, -end.length);
  const names = stem.split("_");
  return names.length === line.names.length && line.names.every((name) => names.includes(name))
    ? stem
    : undefined;
}

function inspect(files: Files, names: readonly string[]): Finding {
  const certPem = readIfThere(files.cert, "certificate");
  if (typeof certPem !== "string") return certPem;
  const keyPem = readIfThere(files.key, "key");
  if (typeof keyPem !== "string") return keyPem;
  let der: Uint8Array;
  let certificate: Certificate;
  try {
    der = certificateDer(certPem);
    certificate = describeCertificate(der, readerOf(files.cert));
  } catch {
    return { kind: "unreadable", what: "certificate", detail: "not a PEM certificate" };
  }
  try {
    if (!isKeyOf(keyPem, der)) return { kind: "other key", certificate };
  } catch {
    return { kind: "unreadable", what: "key", detail: "not an unencrypted PEM private key" };
  }
  return { kind: coversExactly(certificate, names) ? "present" : "other names", certificate };
}

/** Apart, since it is kept with every certificate, and would keep everything that stands around it, too. */
function readerOf(path: string): () => string {
  return () => Deno.readTextFileSync(path);
}

function readIfThere(path: string, what: "certificate" | "key"): string | Finding {
  try {
    return Deno.readTextFileSync(path); // a third faster than that of node:fs
  } catch (error) {
    const { code } = error as { code?: string };
    return code === "ENOENT"
      ? { kind: "missing", what }
      : { kind: "unreadable", what, detail: code ?? String(error) };
  }
}

function linkTarget(path: string): string | undefined {
  try {
    return Deno.readLinkSync(path);
  } catch {
    return undefined;
  }
}

/**
 * Where keys of the account are written before they take their place. Each mode has a place of its own: the lock of the
 * one does not keep the other out.
 */
export function accountTemporary(config: Config): string {
  const place = modeDirectory(config).replaceAll("/", "_").slice(-50); // of which each character may be four bytes
  return join(dirname(config.accountKey), `.${place}${TEMPORARY}`);
}

/** Makes a secret file that must not exist yet, and the directories to it. Throws Deno.errors.AlreadyExists. */
export async function createSecret(
  path: string,
  text: string,
  temporary = temporaryOf(path),
): Promise<void> {
  Deno.mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
  await writeTemporary(temporary, text, 0o600);
  try {
    Deno.linkSync(temporary, path); // unlike a rename, never replaces
  } finally {
    removeIfThere(temporary);
  }
  syncDirectory(dirname(path));
}

/** Puts a secret in a file, whole or not at all. */
export async function replaceSecret(
  path: string,
  text: string,
  temporary = temporaryOf(path),
): Promise<void> {
  await Deno.rename(await writeTemporary(temporary, text, 0o600), path);
  syncDirectory(dirname(path));
}

/** When the last run began, of which the time of its lock file tells. */
export function lastRun(config: Config): Date | undefined {
  try {
    return Deno.statSync(lockPath(config)).mtime ?? undefined;
  } catch {
    return undefined;
  }
}

/** What `state.json` holds, or why it cannot be used. Changes nothing. */
export function readState(config: Config): State | Unusable {
  return readStateFile(config).state;
}

interface Unusable {
  readonly unusable: string;
}

/** The state, and the text that it was read from. */
function readStateFile(config: Config): { text?: string; state: State | Unusable } {
  try {
    const text = readIfPresent(statePath(config));
    return { text, state: text === undefined ? emptyState() : parseState(text) };
  } catch (error) {
    return { state: { unusable: (error as Error).message } };
  }
}

function parseState(text: string): State | Unusable {
  try {
    const state = JSON.parse(text) as State;
    if (state?.version === undefined) return { unusable: "it has no version" };
    if (state.version !== 1) {
      return { unusable: `version ${JSON.stringify(state?.version)} is not known here` };
    }
    return checkedState(state) ?? { unusable: "not as lematt writes it" };
  } catch {
    return { unusable: "not JSON" };
  }
}

/** The state of a mode that never ran. */
export function emptyState(): State {
  return {
    version: 1,
    accounts: {},
    owed: {},
    failures: {},
    holds: {},
    revoked: {},
    renewals: {},
    alerts: {},
  };
}

/** Whether each value of a record is of one kind. */
function recordOf(value: unknown, check: (entry: unknown) => boolean): boolean {
  return isRecord(value) && Object.values(value).every(check);
}

function checkedState(state: State): State | undefined {
  const isText = (value: unknown) => typeof value === "string";
  const isOptional = (value: unknown, check: (value: unknown) => boolean) =>
    value === undefined || check(value);
  const isDebt = (debt: unknown) =>
    isRecord(debt) && isDate(debt.since) && recordOf(debt.certificates, isText) &&
    Number.isInteger(debt.attempts) &&
    isOptional(debt.retryAt, isDate) && isOptional(debt.lastError, isText);
  const isFailure = (failure: unknown) =>
    isRecord(failure) && Number.isInteger(failure.count) && isDate(failure.at) && isText(failure.error) &&
    isOptional(failure.retryAt, isDate);
  const isTexts = (value: unknown) => Array.isArray(value) && value.every(isText);
  const isAccount = (account: unknown) =>
    isRecord(account) && isText(account.url) && isTexts(account.contact) && isTexts(account.issuers);
  const isWindow = (window: unknown) =>
    isRecord(window) && isDate(window.start) && isDate(window.end) && isDate(window.at) &&
    isOptional(window.explanationUrl, isText);
  const isRenewal = (renewal: unknown) =>
    isRecord(renewal) && isOptional(renewal.account, isText) && isOptional(renewal.window, isWindow) &&
    isOptional(renewal.askAt, isDate) && isOptional(renewal.suggestedAt, isDate);
  const complete = { ...emptyState(), ...state };
  const sound = recordOf(complete.accounts, isAccount) && recordOf(complete.owed, isDebt) &&
    recordOf(complete.failures, isFailure) && recordOf(complete.holds, isDate) &&
    recordOf(complete.revoked, isDate) && recordOf(complete.renewals, isRenewal) &&
    recordOf(complete.alerts, (causes) => recordOf(causes, isDate));
  return sound ? complete : undefined;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isDate(value: unknown): boolean {
  return typeof value === "string" && !Number.isNaN(Date.parse(value));
}

/** One mode's directory, held under its lock until disposed of. */
export class Store implements Disposable {
  #written: Promise<void> = Promise.resolve();
  #waiting: Promise<void> | undefined;
  readonly #owners: Map<string, Line>;
  readonly #notes: Set<string>;

  private constructor(
    private readonly config: Config,
    private readonly lock: Deno.FsFile,
    /** Changed in memory, kept by `saveState`. */
    readonly state: State,
    /** What is in `state.json`. */
    private kept: string | undefined,
    /** Whether the state was begun anew, for what was there could not be used. */
    readonly begunAnew: boolean,
    /** What the caller should say. */
    readonly notices: string[],
  ) {
    this.#owners = linkOwners(config);
    this.#notes = new Set((readIfPresent(this.#notesPath) ?? "").split("\n").filter((line) => line !== ""));
  }

  /** Makes the directories, takes the lock (throws LockedError), and mends what a run that was cut off left behind. */
  static open(config: Config, now: Date): Store {
    const base = modeDirectory(config);
    makeDirectory(base, 0o755);
    const lock = takeLock(lockPath(config), config.mode);
    try {
      makeDirectory(join(base, "key"), 0o700);
      makeDirectory(join(base, "csr"), 0o755);
      makeDirectory(join(base, "cert"), 0o755);
      const notices: string[] = [];
      let { text, state } = readStateFile(config);
      if ("unusable" in state) {
        const aside = `state.json.unusable-${now.toISOString().replaceAll(":", "")}`;
        Deno.renameSync(statePath(config), join(base, aside));
        notices.push(
          `cannot use ${config.mode}/state.json: ${state.unusable}; set aside as ${aside}, begun anew`,
        );
        [text, state] = [undefined, emptyState()];
      }
      const store = new Store(config, lock, state, text, notices.length > 0, notices);
      store.#completeCommits();
      return store;
    } catch (error) {
      lock.close();
      throw error;
    }
  }

  [Symbol.dispose](): void {
    this.lock.close();
  }

  /** The private key that stands there, to be used again; a link is another certificate's, and so none of this one's. */
  keyOf(entry: Entry): string | undefined {
    const { key } = filesOf(this.config, entry);
    if (!isRegularFile(key)) return undefined;
    const keyPem = Deno.readTextFileSync(key);
    return isPrivateKey(keyPem) ? keyPem : undefined;
  }

  /**
   * Puts a certificate, and its key where that is new, in the place of the old. Both are complete on disk before the
   * first is renamed, so that a run cut off between the two renames is completed by the next. Returns the entry as it
   * stands then, which keeps nothing of the chain in memory.
   */
  async commit(entry: Entry, issued: Issued): Promise<Entry> {
    const files = filesOf(this.config, entry);
    const renames: [string, string][] = [];
    if (this.keyOf(entry) !== issued.keyPem) {
      renames.push([await writeTemporary(temporaryOf(files.key), issued.keyPem, 0o600), files.key]);
    }
    renames.push([await writeTemporary(temporaryOf(files.cert), issued.chainPem, 0o644), files.cert]);
    for (const [from, to] of renames) await Deno.rename(from, to);
    await Deno.rename(await writeTemporary(temporaryOf(files.csr), issued.csrPem, 0o644), files.csr);
    this.link(entry);
    for (const path of [files.key, files.cert]) syncDirectory(dirname(path));
    const certificate = describeCertificate(issued.certificate.der, readerOf(files.cert));
    return { ...entry, finding: { kind: "present", certificate } };
  }

  /** Makes sure, before a certificate is asked for, that it can be kept. */
  async ensureWritable(): Promise<void> {
    for (const directory of ["key", "csr", "cert"]) {
      const path = join(modeDirectory(this.config), directory, TEMPORARY);
      removeIfThere(await writeTemporary(path, "", 0o600));
    }
    this.kept = undefined;
    await this.saveState();
  }

  /** Remembers when this run began; at the worst, where that cannot be done, the next takes runs to be rare. */
  begin(now: Date): void {
    try {
      this.lock.utimeSync(now, now);
    } catch { /* another's file */ }
  }

  /** Makes the links by which each name of a line of several finds the bundle, where they are not right already. */
  link(entry: Entry): void {
    const { line, keyType } = entry;
    if (line.names.length === 1) return;
    const bundle = filesOf(this.config, entry);
    for (const name of line.names) {
      if (this.#owners.get(name) !== line) continue;
      const own = filesOf(this.config, { stem: stemOf(this.config, [name]), keyType });
      for (const what of ["key", "cert"] as const) linkTo(own[what], basename(bundle[what]));
    }
  }

  /** Every path under which a certificate and its key are found: the bundle first, then the links to it. */
  pathsOf(entry: Entry): { certs: string[]; keys: string[] } {
    const files = stemAndLinks(this.config, entry, this.#owners)
      .map((stem) => filesOf(this.config, { stem, keyType: entry.keyType }));
    return { certs: files.map(({ cert }) => cert), keys: files.map(({ key }) => key) };
  }

  /** Keeps `state` as it is now. Whoever asks while it is being written shares the next writing. */
  saveState(): Promise<void> {
    return this.#waiting ??= this.#written.catch(() => {}).then(() => {
      this.#waiting = undefined;
      return this.#written = this.#writeState();
    });
  }

  async #writeState(): Promise<void> {
    const text = JSON.stringify(this.state, undefined, 1) + "\n";
    if (text === this.kept) return;
    this.kept = undefined;
    await replaceSecret(statePath(this.config), text);
    this.kept = text;
  }

  /** What has been noted and not forgotten, by this run or by one before it that was cut off. */
  notes(): string[] {
    return [...this.#notes];
  }

  /** Remembers, before it is done, something outside that must be undone even if this run is cut off. One line of text. */
  note(text: string): void {
    // in a line of its own, even after one that a full disk has cut short
    Deno.writeTextFileSync(this.#notesPath, `\n${text}\n`, { append: true, mode: 0o600 });
    this.#notes.add(text);
  }

  /** Forgets a note, for what it tells of has been undone. */
  forget(text: string): void {
    this.#notes.delete(text);
  }

  /** Keeps for the next run what is still noted. */
  async keepNotes(): Promise<void> {
    if (this.#notes.size === 0) removeIfThere(this.#notesPath);
    else await replaceSecret(this.#notesPath, [...this.#notes, ""].join("\n"));
  }

  get #notesPath(): string {
    return join(modeDirectory(this.config), ".cleanup");
  }

  /**
   * After a run that was cut off: a complete pair of temporaries, or a certificate that is for the key already in place,
   * takes its place; whatever else was left half done is removed. What cannot take its place stays, and stops no other.
   */
  #completeCommits(): void {
    const base = modeDirectory(this.config);
    const left = ["key", "csr", "cert", "."].flatMap((directory) =>
      listing(join(base, directory)).filter((name) => name.endsWith(TEMPORARY))
        .map((name) => join(base, directory, name))
    );
    removeIfThere(accountTemporary(this.config));
    if (left.length === 0) return;
    const stuck: string[] = [];
    for (const entry of readInventory(this.config)) {
      const files = filesOf(this.config, entry);
      const [newKey, newCert] = [temporaryOf(files.key), temporaryOf(files.cert)];
      if (!left.includes(newCert)) continue;
      const keyIsNew = left.includes(newKey);
      const pair = { key: keyIsNew ? newKey : files.key, csr: files.csr, cert: newCert };
      if (inspect(pair, entry.line.names).kind !== "present") continue;
      try {
        if (keyIsNew) Deno.renameSync(newKey, files.key);
        Deno.renameSync(newCert, files.cert);
        this.link(entry);
      } catch (error) {
        this.notices.push(`cannot complete what a run left half done: ${(error as Error).message}`);
        stuck.push(newKey, newCert);
      }
    }
    left.filter((path) => !stuck.includes(path)).forEach(removeIfThere);
  }
}

function takeLock(path: string, mode: Mode): Deno.FsFile {
  using opened = new DisposableStack();
  let locked: boolean;
  let file: Deno.FsFile;
  try {
    file = opened.use(Deno.openSync(path, { write: true, create: true, mode: 0o600 }));
    locked = file.tryLockSync(true);
  } catch (error) {
    throw withPath(error as Error, `lock '${path}', on a file system that must support locks`);
  }
  if (!locked) throw new LockedError(`another --${mode} run is under way (it holds ${path})`);
  opened.move();
  return file;
}

function makeDirectory(path: string, mode: number): void {
  try {
    Deno.mkdirSync(path, { mode });
  } catch (error) {
    if (!(error instanceof Deno.errors.AlreadyExists)) throw error;
  }
}

/** Name beside `path`, derived, so that the next run finds it; that of `path` may use all 255 bytes. */
function temporaryOf(path: string): string {
  const name = basename(path);
  const short = name.length + 1 + TEMPORARY.length > FILE_NAME_MAX ? sha256(name) : name;
  return join(dirname(path), `.${short}${TEMPORARY}`);
}

/** Writes and flushes a new file, with exactly `mode` whatever the umask, and returns its path. */
async function writeTemporary(path: string, text: string, mode: number): Promise<string> {
  removeIfThere(path);
  using file = await Deno.open(path, { write: true, createNew: true, mode: 0o600 });
  if (mode !== 0o600) await Deno.chmod(path, mode); // before it is complete, and may be found and used
  try {
    const bytes = new TextEncoder().encode(text);
    for (let written = 0; written < bytes.length;) written += await file.write(bytes.subarray(written));
    await file.sync();
  } catch (error) {
    throw withPath(error as Error, `write '${path}'`);
  }
  return path;
}

/** Says with an error of the system which file it is about, as Deno mostly does unless that is open already. */
function withPath(error: Error, what: string): Error {
  if (!error.message.includes("'")) error.message += `: ${what}`;
  return error;
}

function linkTo(path: string, target: string): void {
  if (linkTarget(path) === target) return;
  const temporary = temporaryOf(path);
  removeIfThere(temporary);
  Deno.symlinkSync(target, temporary);
  Deno.renameSync(temporary, path);
}

/** A rename is on disk once its directory is. */
function syncDirectory(path: string): void {
  using directory = Deno.openSync(path);
  try {
    directory.syncSync();
  } catch (error) {
    throw withPath(error as Error, `sync '${path}'`);
  }
}

function isRegularFile(path: string): boolean {
  try {
    return Deno.lstatSync(path).isFile;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

/** The text of a file, undefined where there is none. */
export function readIfPresent(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path);
  } catch (error) {
    if ((error as { code?: string }).code === "ENOENT") return undefined;
    throw error;
  }
}

function removeIfThere(path: string): void {
  try {
    Deno.removeSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

function sha256(text: string): string {
  return nodeCrypto.createHash("sha256").update(text).digest("hex");
}
