/**
 * The files below `prod/` and `test/`: their names, their inventory, and every change to them. plan.ts decides what to
 * do about the inventory.
 *
 * File names are those of the Python original, so that its directories are taken over in place. Files are written
 * beside their target, flushed and renamed. An OS lock on `.lock` keeps a second run out.
 */

import { basename, dirname, join } from "node:path";
import type { Config, KeyType, Line } from "./config.ts";
import {
  codeOf,
  exists,
  giveTo,
  linkTarget,
  listing,
  makeDirectories,
  makeDirectory,
  readIfPresent,
  regularFile,
  removeIfPresent,
  setMode,
  syncDirectory,
  withPath,
} from "./files.ts";
import { emptyState, parseState, type State, StateError } from "./state.ts";
import {
  type Certificate,
  coversExactly,
  isKeyOf,
  isPrivateKey,
  publicKeyHash,
  readCertificate,
  sha256,
  SHORT_LIFE_MS,
} from "./x509.ts";

/** One certificate of the configuration, and what is on disk. */
export interface Entry {
  readonly line: Line;
  readonly keyType: KeyType;
  /** The beginning of its file names. */
  readonly stem: string;
  readonly files: Files;
  /** Base name of the certificate file, which is its key in the state. */
  readonly file: string;
  readonly finding: Finding;
  /** The certificate from before the names of the line changed, to which its first name still links. */
  readonly former?: { readonly certificate: Certificate; readonly file: string };
  /** When it was put in place; only if its life is so short that back-dating by the CA matters. */
  readonly issuedAt?: Date;
}

/** Absolute paths of the files of one certificate. */
export interface Files {
  readonly key: string;
  readonly csr: string;
  readonly cert: string;
}

/** State of a certificate and its key on disk. */
export type Finding =
  | { readonly kind: "present"; readonly certificate: Certificate }
  | { readonly kind: "missing"; readonly what: "certificate" | "key" }
  | { readonly kind: "unreadable"; readonly what: "certificate" | "key"; readonly detail: string }
  | { readonly kind: "other names"; readonly certificate: Certificate }
  | { readonly kind: "other key"; readonly certificate: Certificate }
  | { readonly kind: "revoked"; readonly certificate: Certificate };

/** A certificate that was received and checked, with its key and CSR. */
export interface Issued {
  /** The key on disk, or a new one that replaces it. */
  readonly keyPem: string;
  readonly csrPem: string;
  readonly chainPem: string;
  readonly certificate: Certificate;
}

/** Another run holds the lock. */
export class LockedError extends Error {
  override readonly name = "LockedError";
}

const KEY_TYPES: readonly KeyType[] = ["rsa", "ec"];
const FILE_NAME_MAX = 255;
const TEMPORARY = ".new";
const PENDING = ".pending";
/** Let's Encrypt back-dates by an hour. */
const LONGEST_BACK_DATING_MS = 2 * 3_600_000;
/** How long to wait for the lock of another run. */
const LOCK_WAIT_MS = 1_000;

// ---- names ----------------------------------------------------------------------------------------------

function filesOf(config: Config, stem: string, keyType: KeyType): Files {
  const { base } = config;
  const tag = tagOf(config, keyType);
  return {
    key: `${base}/key/${stem}-key.${tag}.pem`,
    csr: `${base}/csr/${stem}-csr.${tag}.csr`,
    cert: `${base}/cert/${stem}${certEnding(config, keyType)}`,
  };
}

function tagOf({ mode, rsaTag, curveTag }: Config, keyType: KeyType): string {
  return (keyType === "rsa" ? rsaTag : curveTag) + (mode === "test" ? ".test" : "");
}

function certEnding(config: Config, keyType: KeyType): string {
  return `-cert-combined.${tagOf(config, keyType)}.pem`;
}

/** The stem of a certificate file; undefined if it is not of this key type. */
function stemIn(file: string, config: Config, keyType: KeyType): string | undefined {
  const ending = certEnding(config, keyType);
  return file.endsWith(ending) ? file.slice(0, -ending.length) : undefined;
}

/**
 * The beginning of the file names of a certificate: its names joined by `_`, the primary first. If a file name would be
 * longer than 255 bytes: the primary (cut if needed), the number of names and a digest of the whole.
 */
export function stemOf(config: Config, names: readonly string[]): string {
  const stem = names.map(spelled).join("_");
  const longest = Math.max(...KEY_TYPES.map((keyType) => certEnding(config, keyType).length));
  if (stem.length + longest <= FILE_NAME_MAX) return stem;
  const rest = `_${names.length}names_${sha256(stem).slice(0, 12)}`;
  return spelled(names[0]!).slice(0, FILE_NAME_MAX - longest - rest.length) + rest;
}

function spelled(name: string): string {
  return name.replace("*", "_wildcard").replaceAll(":", "-");
}

/**
 * The line that owns the files and links of a name: the line with this name alone, else the first line that has it.
 * Each name of a line with several is a link to its bundle, if the line owns the name.
 */
function linkOwners(config: Config): Map<string, Line> {
  const owners = new Map<string, Line>();
  for (const line of config.lines) if (line.names.length === 1) owners.set(line.names[0]!, line);
  for (const line of config.lines) {
    for (const name of line.names) if (!owners.has(name)) owners.set(name, line);
  }
  return owners;
}

/** The links from the names of a line to its bundle; a bundle under an older spelling keeps links in that spelling. */
function linksOf(config: Config, { line, keyType, stem }: Entry, owners: ReadonlyMap<string, Line>): Files[] {
  if (line.names.length === 1) return [];
  const former = stem === stemOf(config, line.names) ? [] : line.formerNames.flat();
  return [...new Set([...line.names, ...former])].filter((name) => owners.get(name.toLowerCase()) === line)
    .map((name) => stemOf(config, [name])).filter((own) => own !== stem)
    .map((own) => filesOf(config, own, keyType));
}

// ---- inventory ------------------------------------------------------------------------------------------

/** Reads the files of every certificate of the configuration, in the order of `domains`. Changes nothing. */
export function readInventory(config: Config): Entry[] {
  const revoked = revokedHashes(config);
  const owners = linkOwners(config);
  return config.lines.flatMap((line) => {
    const isOwner = owners.get(line.names[0]!) === line;
    return line.keyTypes.map((keyType) => readEntry(config, line, keyType, revoked, isOwner));
  });
}

/** `isOwner`: whether the line owns its first name. */
function readEntry(
  config: Config,
  line: Line,
  keyType: KeyType,
  revoked: ReadonlySet<string>,
  isOwner: boolean,
): Entry {
  const entryAt = (stem: string) => {
    const files = filesOf(config, stem, keyType);
    return entryOf(line, keyType, stem, files, inspect(files, line.names, revoked));
  };
  const entry = entryAt(stemOf(config, line.names));
  const { finding } = entry;
  if (finding.kind !== "missing" || finding.what !== "certificate") return entry;
  const older = olderSpelling(config, line, keyType);
  if (older !== undefined) return entryAt(older);
  return isOwner ? { ...entry, former: formerOf(config, line, keyType) } : entry;
}

function entryOf(line: Line, keyType: KeyType, stem: string, files: Files, finding: Finding): Entry {
  const entry = { line, keyType, stem, files, file: basename(files.cert), finding };
  if (finding.kind !== "present") return entry;
  const { notBefore, notAfter } = finding.certificate;
  // in a short life, an hour of back-dating matters
  if (notAfter.getTime() - notBefore.getTime() >= SHORT_LIFE_MS) return entry;
  const { mtime } = Deno.statSync(files.cert);
  if (mtime === null || mtime <= notBefore || mtime >= notAfter) return entry;
  // a copied file is younger
  return {
    ...entry,
    issuedAt: new Date(Math.min(mtime.getTime(), notBefore.getTime() + LONGEST_BACK_DATING_MS)),
  };
}

/** The stem under which the Python original wrote the files of a line, if it is another and they exist. */
function olderSpelling(config: Config, line: Line, keyType: KeyType): string | undefined {
  const stems = line.formerNames.map((names) => stemOf(config, names));
  const found = stems.find((stem) => exists(filesOf(config, stem, keyType).cert));
  if (found !== undefined || line.names.length < 3) return found;
  // the original wrote names that differ in the last label only (`example.net example.org`) in random order; the link
  // of the primary has the order
  const target = linkTarget(ownFiles(config, line, keyType).cert) ?? "/";
  const stem = target.includes("/") ? undefined : stemIn(target, config, keyType);
  if (stem === undefined) return undefined;
  const asSet = (names: readonly string[]) => names.toSorted().join();
  const known = [line.names, ...line.formerNames].map((names) => asSet(names.map(spelled)));
  return known.includes(asSet(stem.split("_"))) ? stem : undefined;
}

/** The files, or links, of the first name of a line. */
function ownFiles(config: Config, { names }: Line, keyType: KeyType): Files {
  return filesOf(config, stemOf(config, names.slice(0, 1)), keyType);
}

/** The certificate that the first name has from before the names of the line changed. */
function formerOf(config: Config, line: Line, keyType: KeyType): Entry["former"] {
  const { cert } = ownFiles(config, line, keyType);
  try {
    const file = basename(linkTarget(cert) ?? cert);
    return { certificate: readCertificate(Deno.readTextFileSync(cert)), file };
  } catch {
    return undefined;
  }
}

function inspect(files: Files, names: readonly string[], revoked: ReadonlySet<string>): Finding {
  const certPem = readFor(files.cert, "certificate");
  if (typeof certPem !== "string") return certPem;
  const keyPem = readFor(files.key, "key");
  if (typeof keyPem !== "string") return keyPem;
  let certificate: Certificate;
  try {
    certificate = readCertificate(certPem);
  } catch {
    return { kind: "unreadable", what: "certificate", detail: "not a PEM certificate" };
  }
  try {
    if (!isKeyOf(keyPem, certPem)) return { kind: "other key", certificate };
    if (revoked.size > 0 && revoked.has(publicKeyHash(certPem))) return { kind: "revoked", certificate };
  } catch {
    return { kind: "unreadable", what: "key", detail: "not an unencrypted PEM private key" };
  }
  return { kind: coversExactly(certificate, names) ? "present" : "other names", certificate };
}

function readFor(path: string, what: "certificate" | "key"): string | Finding {
  try {
    return Deno.readTextFileSync(path); // a third faster than node:fs
  } catch (error) {
    const code = codeOf(error);
    return code === "ENOENT"
      ? { kind: "missing", what }
      : { kind: "unreadable", what, detail: code ?? String(error) };
  }
}

/** Files in `key`, `csr` and `cert` that belong to no line, relative to `config.base`. */
export function orphans(config: Config, inventory: readonly Entry[]): string[] {
  const owners = linkOwners(config);
  const known = new Set<string>();
  for (const entry of inventory) {
    const { files, former, keyType } = entry;
    const stem = former && stemIn(former.file, config, keyType);
    const formerFiles = stem === undefined ? [] : [filesOf(config, stem, keyType)];
    for (const { key, csr, cert } of [files, ...linksOf(config, entry, owners), ...formerFiles]) {
      known.add(key).add(csr).add(cert);
    }
  }
  return ["cert", "csr", "key"].flatMap((directory) =>
    listing(join(config.base, directory))
      .filter((name) => !name.startsWith(".") && !known.has(`${config.base}/${directory}/${name}`))
      .map((name) => `${directory}/${name}`)
  );
}

/** Warnings of links that the next run will point to another bundle. */
export function changingLinks(config: Config, inventory: readonly Entry[]): string[] {
  const owners = linkOwners(config);
  return inventory.filter(({ finding }) => finding.kind === "present").flatMap((entry) =>
    linksOf(config, entry, owners).flatMap(({ cert }) => {
      const target = linkTarget(cert);
      return target === undefined || target === entry.file
        ? []
        : [`${basename(cert)} will point to ${entry.file}, no longer to ${target}`];
    })
  );
}

// ---- state ----------------------------------------------------------------------------------------------

/**
 * The contents of `state.json`, parsed and as text. Changes nothing. Throws StateError if it cannot be read, or is of a
 * newer lematt.
 */
export function readState(config: Config, now: Date): { state: State; text?: string; unusable?: string } {
  const path = join(config.base, "state.json");
  try {
    const text = readIfPresent(path);
    if (text === undefined) return { state: emptyState() };
    const state = parseState(text, now);
    return "unusable" in state ? { state: emptyState(), ...state } : { state, text };
  } catch (error) {
    throw new StateError(`cannot read ${path}: ${(error as Error).message}`);
  }
}

/** Hashes of revoked public keys, one in each line. */
function revokedPath(config: Config): string {
  return join(config.base, "revoked-keys");
}

/** The errors of the configuration that --cron printed last; the first run with a valid configuration removes it. */
export function configErrorPath(base: string): string {
  return join(base, ".configuration-error");
}

function revokedHashes(config: Config): Set<string> {
  const hashes = new Set(readIfPresent(revokedPath(config))?.split("\n"));
  hashes.delete("");
  return hashes;
}

// ---- changes --------------------------------------------------------------------------------------------

/** One mode's directory, locked until disposed of. */
export class Store implements Disposable {
  #writing: Promise<void> = Promise.resolve();
  #waiting: Promise<void> | undefined;
  readonly #owners: Map<string, Line>;

  private constructor(
    private readonly config: Config,
    private readonly lock: Deno.FsFile,
    /** Changed in memory, written by `saveState`. */
    readonly state: State,
    /** The contents of `state.json`. */
    private written: string | undefined,
    /** Warnings. */
    readonly notices: string[],
  ) {
    this.#owners = linkOwners(config);
  }

  /** Makes the directories, takes the lock, repairs what an interrupted run left. Throws LockedError and StateError. */
  static async open(config: Config, now: Date): Promise<Store> {
    const { base, mode } = config;
    makeDirectory(base, 0o755, Deno.statSync(config.directory));
    const lock = await takeLock(join(base, ".lock"), mode);
    try {
      const owner = Deno.statSync(base);
      giveTo(join(base, ".lock"), owner);
      makeDirectory(join(base, "key"), 0o700, owner);
      for (const name of ["csr", "cert"]) makeDirectory(join(base, name), 0o755, owner);
      removeIfPresent(configErrorPath(base));
      const { state, text, unusable } = readState(config, now);
      const notices: string[] = [];
      if (unusable !== undefined) {
        const aside = `state.json.unusable-${now.toISOString().replaceAll(":", "")}`;
        Deno.renameSync(join(base, "state.json"), join(base, aside));
        notices.push(
          `cannot use ${mode}/state.json: ${unusable}; set aside as ${aside}, starting with an empty state`,
        );
      }
      const store = new Store(config, lock, state, text, notices);
      store.#completeCommits();
      await store.#takeOverRevoked();
      return store;
    } catch (error) {
      lock.close();
      throw error;
    }
  }

  [Symbol.dispose](): void {
    this.lock.close();
  }

  /** The private key in use. A link to a key beside it is another certificate's; other links are the user's. */
  keyOf({ files: { key } }: Entry): string | undefined {
    const target = linkTarget(key);
    return target !== undefined && !target.includes("/") ? undefined : this.#usableKey(key);
  }

  /** The key of an order that the CA has not finished. */
  pendingKey({ files: { key } }: Entry): string | undefined {
    return this.#usableKey(pendingOf(key));
  }

  #usableKey(path: string): string | undefined {
    const keyPem = readIfPresent(path);
    return keyPem !== undefined && isPrivateKey(keyPem) && !this.isRevoked(keyPem) ? keyPem : undefined;
  }

  async keepPendingKey({ files: { key } }: Entry, keyPem: string): Promise<void> {
    await this.#replace(pendingOf(key), keyPem, 0o600);
  }

  dropPendingKey({ files: { key } }: Entry): void {
    removeIfPresent(pendingOf(key));
  }

  /**
   * Puts a certificate, and its key if that is new, in place of the old. Both are complete on disk before the first is
   * renamed; if a run is killed between the two renames, the next run does the second. Returns the new entry; `warn`
   * is called for errors after both are in place.
   */
  async commit(
    entry: Entry,
    issued: Issued,
    warn: (text: string) => void = (text) => {
      throw new Error(text);
    },
  ): Promise<Entry> {
    const { files } = entry;
    await Deno.rename(await this.#temporary(files.csr, issued.csrPem, 0o644), files.csr);
    const renames: [string, string][] = [];
    if (this.keyOf(entry) !== issued.keyPem) {
      renames.push([await this.#temporary(files.key, issued.keyPem, 0o600), files.key]);
    }
    renames.push([await this.#temporary(files.cert, issued.chainPem, 0o644), files.cert]);
    for (const [from, to] of renames) await Deno.rename(from, to);
    try {
      this.link(entry);
      this.dropPendingKey(entry);
      for (const path of [files.key, files.cert]) syncDirectory(dirname(path));
    } catch (error) {
      warn(`${entry.file} is in place, but: ${(error as Error).message}`);
    }
    const { line, keyType, stem } = entry;
    return entryOf(line, keyType, stem, files, { kind: "present", certificate: issued.certificate });
  }

  /** Checks, before a certificate is ordered, that its files can be written. */
  async ensureWritable(): Promise<void> {
    for (const directory of ["key", "csr", "cert"]) {
      removeIfPresent(await this.#temporary(join(this.config.base, directory, "probe"), "", 0o600));
    }
    this.written = undefined;
    await this.saveState();
    if (this.writeError !== undefined) throw this.writeError;
  }

  /** Makes the links from the names of a line to its bundle, unless they are right already. */
  link(entry: Entry): void {
    for (const link of linksOf(this.config, entry, this.#owners)) {
      for (const what of ["key", "cert"] as const) this.#linkTo(link[what], basename(entry.files[what]));
    }
  }

  /** All paths of a certificate and its key: the bundle first, then the links to it. */
  pathsOf(entry: Entry): { certs: string[]; keys: string[] } {
    const files = [entry.files, ...linksOf(this.config, entry, this.#owners)];
    return { certs: files.map(({ cert }) => cert), keys: files.map(({ key }) => key) };
  }

  /** Moves files (relative to `config.base`) to `orphaned/`; never replaces one there. */
  moveOrphans(paths: readonly string[]): void {
    const { base } = this.config;
    for (const path of paths) {
      const orphaned = join(base, "orphaned", path);
      makeDirectories(dirname(orphaned));
      let target = orphaned;
      for (let number = 2; exists(target); number++) target = `${orphaned}.${number}`;
      Deno.renameSync(join(base, path), target);
    }
  }

  /** Adds a public key (see `publicKeyHash`) to those that are never used again. */
  async revoke(hash: string): Promise<void> {
    const known = revokedHashes(this.config);
    if (known.has(hash)) return;
    const text = [...known.add(hash)].map((known) => `${known}\n`).join("");
    await this.#replace(revokedPath(this.config), text, 0o600);
  }

  /** Version 1 of the state had revoked certificates instead of keys. */
  async #takeOverRevoked(): Promise<void> {
    const { revoked } = this.state;
    if (revoked === undefined) return;
    for (const { finding, files } of readInventory(this.config)) {
      if (finding.kind !== "present" || !revoked.includes(finding.certificate.fingerprint)) continue;
      await this.revoke(publicKeyHash(Deno.readTextFileSync(files.cert)));
    }
    delete this.state.revoked;
  }

  isRevoked(keyPem: string): boolean {
    const known = revokedHashes(this.config);
    return known.size > 0 && known.has(publicKeyHash(keyPem));
  }

  /**
   * Writes `state`. Calls during a write share the next one. Never fails, since deliveries and alerts go on without it:
   * see `writeError`.
   */
  saveState(): Promise<void> {
    return this.#waiting ??= this.#writing.then(() => {
      this.#waiting = undefined;
      return this.#writing = this.#writeState().then(
        () => void (this.writeError = undefined),
        (error) => void (this.writeError = error),
      );
    });
  }

  /** Why the last write of the state failed. */
  writeError: Error | undefined;

  async #writeState(): Promise<void> {
    const text = JSON.stringify(this.state, undefined, 1) + "\n";
    if (text === this.written) return;
    this.written = undefined;
    await this.#replace(join(this.config.base, "state.json"), text, 0o600);
    this.written = text;
  }

  /** Makes a secret file and its directories. Throws Deno.errors.AlreadyExists if it exists. */
  async createSecret(path: string, text: string): Promise<void> {
    makeDirectories(dirname(path));
    const temporary = await this.#temporary(path, text, 0o600);
    try {
      Deno.linkSync(temporary, path); // never replaces, unlike a rename
    } catch (error) {
      if (error instanceof Deno.errors.AlreadyExists || exists(path)) {
        throw new Deno.errors.AlreadyExists(path);
      }
      Deno.renameSync(temporary, path); // a file system without hard links
    } finally {
      removeIfPresent(temporary);
    }
    syncDirectory(dirname(path));
  }

  async #replace(path: string, text: string, mode: number): Promise<void> {
    await Deno.rename(await this.#temporary(path, text, mode), path);
    syncDirectory(dirname(path));
  }

  /**
   * Writes and flushes a new file beside `path`, and returns its path. It gets owner, group and mode of the file that
   * it will replace, else `mode`. A secret loses the permissions of others, and those of the group if that cannot be
   * kept.
   */
  async #temporary(path: string, text: string, mode: number): Promise<string> {
    const temporary = temporaryOf(path, this.config);
    removeIfPresent(temporary);
    const before = regularFile(path);
    const isSecret = mode === 0o600;
    const kept = before === undefined ? mode : before.mode! & (isSecret ? 0o770 : 0o777);
    using file = await Deno.open(temporary, { write: true, createNew: true, mode: kept });
    const isSameGroup = giveTo(temporary, before ?? Deno.statSync(dirname(path)));
    setMode(temporary, isSecret && !isSameGroup ? kept & 0o700 : kept); // while it is still incomplete
    try {
      const bytes = new TextEncoder().encode(text);
      for (let written = 0; written < bytes.length;) written += await file.write(bytes.subarray(written));
      await file.sync();
    } catch (error) {
      throw withPath(error as Error, `write '${temporary}'`);
    }
    return temporary;
  }

  #linkTo(path: string, target: string): void {
    if (linkTarget(path) === target) return;
    const temporary = temporaryOf(path, this.config);
    removeIfPresent(temporary);
    Deno.symlinkSync(target, temporary);
    giveTo(temporary, Deno.statSync(dirname(path)));
    Deno.renameSync(temporary, path);
  }

  /** Removes keys of orders that are no longer in the state. */
  #dropPendingKeys(): void {
    const { config, state: { orders } } = this;
    const known = KEY_TYPES.flatMap((keyType) =>
      Object.keys(orders).map((file) => stemIn(file, config, keyType)).filter((stem) => stem !== undefined)
        .map((stem) => pendingOf(filesOf(config, stem, keyType).key))
    );
    const directory = `${config.base}/key`;
    listing(directory).filter((name) => name.endsWith(PENDING)).map((name) => `${directory}/${name}`)
      .filter((path) => !known.includes(path)).forEach(removeIfPresent);
  }

  /**
   * Completes commits of a run that was killed: a complete pair of temporaries, or a certificate for the key in place.
   * All other temporaries are removed.
   */
  #completeCommits(): void {
    const { config } = this;
    const left = ["key", "csr", "cert", "."].flatMap((directory) =>
      listing(join(config.base, directory)).filter((name) => name.startsWith(".") && name.endsWith(TEMPORARY))
        .map((name) => join(config.base, directory, name))
    );
    for (const end of ["", ".new", ".test", ".test.new"]) { // the account keys of account.ts
      removeIfPresent(temporaryOf(config.accountKey + end, config));
    }
    this.#dropPendingKeys();
    if (left.length === 0) return;
    const stuck: string[] = [];
    for (const entry of readInventory(config)) {
      const { files } = entry;
      const [newKey, newCert] = [temporaryOf(files.key, config), temporaryOf(files.cert, config)];
      if (!left.includes(newCert)) continue;
      const keyIsNew = left.includes(newKey);
      const pair = { key: keyIsNew ? newKey : files.key, csr: files.csr, cert: newCert };
      if (inspect(pair, entry.line.names, new Set()).kind !== "present") continue;
      try {
        if (keyIsNew) Deno.renameSync(newKey, files.key);
        Deno.renameSync(newCert, files.cert);
        delete this.state.orders[entry.file];
        this.dropPendingKey(entry);
        this.link(entry);
      } catch (error) {
        this.notices.push(`cannot complete an interrupted run: ${(error as Error).message}`);
        stuck.push(newKey, newCert);
      }
    }
    left.filter((path) => !stuck.includes(path)).forEach(removeIfPresent);
  }
}

/** Takes the lock. Waits a moment for it, since commands other than a run need it only briefly. Throws LockedError. */
async function takeLock(path: string, mode: string): Promise<Deno.FsFile> {
  const deadline = performance.now() + LOCK_WAIT_MS;
  const file = Deno.openSync(path, { write: true, create: true, mode: 0o600 });
  try {
    while (!file.tryLockSync(true)) {
      if (performance.now() > deadline) {
        throw new LockedError(`another --${mode} run is in progress (it has locked ${path})`);
      }
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    return file;
  } catch (error) {
    file.close();
    if (error instanceof LockedError) throw error;
    throw withPath(error as Error, `lock '${path}', on a file system that must support locks`);
  }
}

/**
 * The path of a temporary, always the same, so that the next run finds it. Outside the mode's directory (account keys)
 * each mode has its own, since the lock of one does not keep the other out.
 */
function temporaryOf(path: string, { base, mode }: Config): string {
  return hidden(path, path.startsWith(`${base}/`) ? TEMPORARY : `.${mode}${TEMPORARY}`);
}

function pendingOf(key: string): string {
  return hidden(key, PENDING);
}

/** A hidden file beside `path`, with a digest as its name if it would be too long. */
function hidden(path: string, ending: string): string {
  const name = `.${basename(path)}${ending}`;
  return join(dirname(path), name.length > FILE_NAME_MAX ? `.${sha256(name)}${ending}` : name);
}
