/**
 * What stands below `prod/` and `test/`: the names of its files, what is found in them, and every change to them.
 *
 * The only writer there. Keeps the names of the Python original, so that its directories are taken over in place. Files
 * are written beside their target, flushed and renamed; an OS lock on `.lock` keeps a second run out. What to do about
 * what is found is decided in plan.ts.
 */

import defer * as nodeFs from "node:fs";
import { basename, dirname, join } from "node:path";
import type { Config, KeyType, Line } from "./config.ts";
import { emptyState, parseState, type State, StateError } from "./state.ts";
import {
  type Certificate,
  coversExactly,
  isKeyOf,
  isPrivateKey,
  publicKeyHash,
  readCertificate,
  sha256,
} from "./x509.ts";

/** One certificate of the configuration as it stands on disk. */
export interface Entry {
  readonly line: Line;
  readonly keyType: KeyType;
  /** What the names of its files begin with. */
  readonly stem: string;
  readonly files: Files;
  /** Base name of the certificate file, by which the state refers to it. */
  readonly file: string;
  readonly finding: Finding;
  /** The certificate that the first name of the line still links to, from before its names changed. */
  readonly former?: { readonly certificate: Certificate; readonly file: string };
  /** When it was put in place, where its life is so short that a CA's back-dating matters. */
  readonly issuedAt?: Date;
}

/** Absolute paths of the files of one certificate. */
export interface Files {
  readonly key: string;
  readonly csr: string;
  readonly cert: string;
}

/** What was found of one certificate and its key. */
export type Finding =
  | { readonly kind: "present"; readonly certificate: Certificate }
  | { readonly kind: "missing"; readonly what: "certificate" | "key" }
  | { readonly kind: "unreadable"; readonly what: "certificate" | "key"; readonly detail: string }
  | { readonly kind: "other names"; readonly certificate: Certificate }
  | { readonly kind: "other key"; readonly certificate: Certificate }
  | { readonly kind: "revoked"; readonly certificate: Certificate };

/** A certificate received and checked, with what belongs to it. */
export interface Issued {
  /** PEM; the key that is on disk already, or a new one that replaces it. */
  readonly keyPem: string;
  readonly csrPem: string;
  readonly chainPem: string;
  readonly certificate: Certificate;
}

/** Another run holds the lock. */
export class LockedError extends Error {
  override readonly name = "LockedError";
}

const FILE_NAME_MAX = 255;
const TEMPORARY = ".new";
const PENDING = ".pending";
/** Below this, a CA that back-dates by an hour would make a certificate look older than it is. */
const SHORT_LIFE_MS = 10 * 86_400_000;
/** Let's Encrypt back-dates by an hour. */
const LONGEST_BACK_DATING_MS = 2 * 3_600_000;
/** How long to wait for the lock of another run. */
const LOCK_WAIT_MS = 1_000;

// ---- names ----------------------------------------------------------------------------------------------

/** Base names of the files of `stem`, those of the original. */
function fileNames(config: Config, stem: string, keyType: KeyType): Files {
  const tag = (keyType === "rsa" ? config.rsaTag : config.curveTag) + (config.mode === "test" ? ".test" : "");
  return {
    key: `${stem}-key.${tag}.pem`,
    csr: `${stem}-csr.${tag}.csr`,
    cert: `${stem}-cert-combined.${tag}.pem`,
  };
}

function filesOf(config: Config, stem: string, keyType: KeyType): Files {
  const { key, csr, cert } = fileNames(config, stem, keyType);
  // not join(), which takes its time to find nothing to normalize
  return {
    key: `${config.base}/key/${key}`,
    csr: `${config.base}/csr/${csr}`,
    cert: `${config.base}/cert/${cert}`,
  };
}

/**
 * What the file names of a certificate begin with: its names joined by `_`, the primary first. Where the longest file
 * name would exceed 255 bytes, the primary (cut if need be), the count of names and a digest of the whole.
 */
export function stemOf(config: Config, names: readonly string[]): string {
  const stem = names.map(spelled).join("_");
  const longest = Math.max(
    ...(["rsa", "ec"] as const).map((type) => fileNames(config, "", type).cert.length),
  );
  if (stem.length + longest <= FILE_NAME_MAX) return stem;
  const rest = `_${names.length}names_${sha256(stem).slice(0, 12)}`;
  return spelled(names[0]!).slice(0, FILE_NAME_MAX - longest - rest.length) + rest;
}

function spelled(name: string): string {
  return name.replace("*", "_wildcard").replaceAll(":", "-");
}

/**
 * The line that a name's own files belong to: the one that has this name alone, else the first that has it. Each name of
 * a line of several is linked to the bundle by the line that owns it.
 */
function linkOwners(config: Config): Map<string, Line> {
  const owners = new Map<string, Line>();
  for (const line of config.lines) if (line.names.length === 1) owners.set(line.names[0]!, line);
  for (const line of config.lines) {
    for (const name of line.names) if (!owners.has(name)) owners.set(name, line);
  }
  return owners;
}

/** The files by which the names of a line of several find its bundle; those under an older spelling are kept with it. */
function linksOf(config: Config, { line, keyType, stem }: Entry, owners: ReadonlyMap<string, Line>): Files[] {
  if (line.names.length === 1) return [];
  const former = stem === stemOf(config, line.names) ? [] : line.formerNames.flat();
  return [...new Set([...line.names, ...former])].filter((name) => owners.get(name.toLowerCase()) === line)
    .map((name) => stemOf(config, [name])).filter((own) => own !== stem)
    .map((own) => filesOf(config, own, keyType));
}

// ---- inventory ------------------------------------------------------------------------------------------

/** Reads what is on disk for every certificate of the configuration, in the order of `domains`. Changes nothing. */
export function readInventory(config: Config): Entry[] {
  const revoked = new Set(
    (readIfPresent(revokedPath(config)) ?? "").split("\n").filter((line) => line !== ""),
  );
  const owners = linkOwners(config);
  return config.lines.flatMap((line) => {
    const isOwner = owners.get(line.names[0]!) === line;
    return line.keyTypes.map((keyType) => readEntry(config, line, keyType, revoked, isOwner));
  });
}

/** `isOwner`: what its first name finds is this line's, and no other's. */
function readEntry(
  config: Config,
  line: Line,
  keyType: KeyType,
  revoked: ReadonlySet<string>,
  isOwner: boolean,
): Entry {
  const stem = stemOf(config, line.names);
  const files = filesOf(config, stem, keyType);
  const finding = inspect(files, line.names, revoked);
  if (finding.kind === "missing" && finding.what === "certificate") {
    const older = olderSpelling(config, line, keyType);
    if (older !== undefined) {
      const files = filesOf(config, older, keyType);
      return entryOf(line, keyType, older, files, inspect(files, line.names, revoked));
    }
    const former = isOwner ? formerOf(config, line, keyType) : undefined;
    return { ...entryOf(line, keyType, stem, files, finding), former };
  }
  return entryOf(line, keyType, stem, files, finding);
}

function entryOf(line: Line, keyType: KeyType, stem: string, files: Files, finding: Finding): Entry {
  const entry = { line, keyType, stem, files, file: basename(files.cert), finding };
  if (finding.kind !== "present") return entry;
  const { notBefore, notAfter } = finding.certificate;
  if (notAfter.getTime() - notBefore.getTime() >= SHORT_LIFE_MS) return entry;
  const { mtime } = Deno.statSync(files.cert);
  if (mtime === null || mtime <= notBefore || mtime >= notAfter) return entry;
  // a file may also be younger because it was copied
  return {
    ...entry,
    issuedAt: new Date(Math.min(mtime.getTime(), notBefore.getTime() + LONGEST_BACK_DATING_MS)),
  };
}

/** The stem under which the Python original has the files of a line, where it is another and they are there. */
function olderSpelling(config: Config, line: Line, keyType: KeyType): string | undefined {
  const stems = line.formerNames.map((names) => stemOf(config, names));
  const found = stems.find((stem) => exists(filesOf(config, stem, keyType).cert));
  if (found !== undefined || line.names.length < 3) return found;
  // it left to chance in which order names that differ in the last label alone (`example.net example.org`) stand in a
  // stem; the link of the primary shows which it was
  const target = linkTarget(filesOf(config, stemOf(config, line.names.slice(0, 1)), keyType).cert);
  const end = fileNames(config, "", keyType).cert;
  if (target === undefined || target.includes("/") || !target.endsWith(end)) return undefined;
  const stem = target.slice(0, -end.length);
  const asSet = (names: readonly string[]) => names.toSorted().join();
  const known = [line.names, ...line.formerNames].map((names) => asSet(names.map(spelled)));
  return known.includes(asSet(stem.split("_"))) ? stem : undefined;
}

/** The certificate under the primary name, which is for other names: those that the line had before. */
function formerOf(config: Config, line: Line, keyType: KeyType): Entry["former"] {
  const { cert } = filesOf(config, stemOf(config, line.names.slice(0, 1)), keyType);
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
    return Deno.readTextFileSync(path); // a third faster than that of node:fs
  } catch (error) {
    const code = codeOf(error);
    return code === "ENOENT"
      ? { kind: "missing", what }
      : { kind: "unreadable", what, detail: code ?? String(error) };
  }
}

/** Files in the directories of keys, requests and certificates that belong to no line, relative to `config.base`. */
export function orphans(config: Config, inventory: readonly Entry[]): string[] {
  const owners = linkOwners(config);
  const known = new Set<string>();
  for (const entry of inventory) {
    for (const { key, csr, cert } of [entry.files, ...linksOf(config, entry, owners)]) {
      known.add(key).add(csr).add(cert);
    }
    const end = fileNames(config, "", entry.keyType).cert;
    if (!entry.former?.file.endsWith(end)) continue;
    const { key, csr, cert } = filesOf(config, entry.former.file.slice(0, -end.length), entry.keyType);
    known.add(key).add(csr).add(cert);
  }
  return ["cert", "csr", "key"].flatMap((directory) =>
    listing(join(config.base, directory))
      .filter((name) => !name.startsWith(".") && !known.has(`${config.base}/${directory}/${name}`))
      .map((name) => `${directory}/${name}`)
  );
}

/** Links to bundles that the next run will point to another line's, as sentences: somebody may use the old ones. */
export function changingLinks(config: Config, inventory: readonly Entry[]): string[] {
  const owners = linkOwners(config);
  return inventory.filter(({ finding }) => finding.kind === "present").flatMap((entry) =>
    linksOf(config, entry, owners).flatMap(({ cert }) => {
      const target = linkTarget(cert);
      return target === undefined || target === entry.file
        ? []
        : [`${basename(cert)} is going to point to ${entry.file}, not to ${target}`];
    })
  );
}

// ---- state ----------------------------------------------------------------------------------------------

/**
 * What `state.json` holds, and the text that it was read from. Changes nothing.
 *
 * @throws StateError where it may not be read, or a newer lematt wrote it: to begin anew would lose what it holds
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

/** Public keys that were revoked, a hash a line. */
function revokedPath(config: Config): string {
  return join(config.base, "revoked-keys");
}

// ---- changes --------------------------------------------------------------------------------------------

/** One mode's directory, locked until disposed of. */
export class Store implements Disposable {
  #written: Promise<void> = Promise.resolve();
  #waiting: Promise<void> | undefined;
  readonly #owners: Map<string, Line>;

  private constructor(
    private readonly config: Config,
    private readonly lock: Deno.FsFile,
    /** Changed in memory, kept by `saveState`. */
    readonly state: State,
    /** What is in `state.json`. */
    private kept: string | undefined,
    /** What the user should know. */
    readonly notices: string[],
  ) {
    this.#owners = linkOwners(config);
  }

  /**
   * Makes the directories, takes the lock, and completes or undoes what a run that was cut off left behind.
   *
   * @throws LockedError, StateError
   */
  static async open(config: Config, now: Date): Promise<Store> {
    const { base, mode } = config;
    makeDirectory(base, 0o755, ownerOf(config.directory));
    const lock = await takeLock(join(base, ".lock"), mode);
    try {
      const owner = ownerOf(base);
      giveTo(join(base, ".lock"), owner);
      makeDirectory(join(base, "key"), 0o700, owner);
      for (const name of ["csr", "cert"]) makeDirectory(join(base, name), 0o755, owner);
      const { state, text, unusable } = readState(config, now);
      const notices: string[] = [];
      if (unusable !== undefined) {
        const aside = `state.json.unusable-${now.toISOString().replaceAll(":", "")}`;
        Deno.renameSync(join(base, "state.json"), join(base, aside));
        notices.push(`cannot use ${mode}/state.json: ${unusable}; set aside as ${aside}, begun anew`);
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

  /**
   * The private key that stands there, to be used again. A link to another certificate's key is no key of this one; a link
   * that leads elsewhere is the user's, and followed.
   */
  keyOf({ files: { key } }: Entry): string | undefined {
    const target = linkTarget(key);
    if (target !== undefined && !target.includes("/")) return undefined;
    const keyPem = readIfPresent(key);
    return keyPem !== undefined && isPrivateKey(keyPem) && !this.isRevoked(keyPem) ? keyPem : undefined;
  }

  /** The key of an order that the CA had not finished, beside the live one. */
  pendingKey({ files: { key } }: Entry): string | undefined {
    const keyPem = readIfPresent(pendingOf(key));
    return keyPem !== undefined && isPrivateKey(keyPem) && !this.isRevoked(keyPem) ? keyPem : undefined;
  }

  async keepPendingKey({ files: { key } }: Entry, keyPem: string): Promise<void> {
    await this.#replace(pendingOf(key), keyPem, 0o600);
  }

  dropPendingKey({ files: { key } }: Entry): void {
    removeIfThere(pendingOf(key));
  }

  /**
   * Puts a certificate, and its key where that is new, in the place of the old. Both are complete on disk before the
   * first is renamed, so that a run cut off between the two renames is completed by the next. Returns the entry as it
   * stands then; `warn` takes what goes wrong when both are in place.
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
      warn(`${entry.file} is in its place, but: ${(error as Error).message}`);
    }
    const { line, keyType, stem } = entry;
    return entryOf(line, keyType, stem, files, { kind: "present", certificate: issued.certificate });
  }

  /** Makes sure, before a certificate is asked for, that it can be kept. */
  async ensureWritable(): Promise<void> {
    for (const directory of ["key", "csr", "cert"]) {
      removeIfThere(await this.#temporary(join(this.config.base, directory, "probe"), "", 0o600));
    }
    this.kept = undefined;
    await this.saveState();
    if (this.writeError !== undefined) throw this.writeError;
  }

  /** Makes the links by which each name of a line of several finds the bundle, where they are not right already. */
  link(entry: Entry): void {
    for (const link of linksOf(this.config, entry, this.#owners)) {
      for (const what of ["key", "cert"] as const) this.#linkTo(link[what], basename(entry.files[what]));
    }
  }

  /** Every path under which a certificate and its key are found: the bundle first, then the links to it. */
  pathsOf(entry: Entry): { certs: string[]; keys: string[] } {
    const files = [entry.files, ...linksOf(this.config, entry, this.#owners)];
    return { certs: files.map(({ cert }) => cert), keys: files.map(({ key }) => key) };
  }

  /** Moves files (relative to `config.base`) to `orphaned/`, where nothing is deleted. */
  moveOrphans(paths: readonly string[]): void {
    const owner = ownerOf(this.config.base);
    makeDirectory(join(this.config.base, "orphaned"), 0o700, owner);
    for (const path of paths) {
      const directory = join(this.config.base, "orphaned", dirname(path));
      makeDirectory(directory, 0o700, owner);
      let target = join(this.config.base, "orphaned", path);
      for (let number = 2; exists(target); number++) {
        target = `${join(this.config.base, "orphaned", path)}.${number}`;
      }
      Deno.renameSync(join(this.config.base, path), target);
    }
  }

  /** Remembers a public key (see `publicKeyHash`), which is never used again. */
  async revoke(hash: string): Promise<void> {
    const path = revokedPath(this.config);
    const known = readIfPresent(path) ?? "";
    if (!known.split("\n").includes(hash)) await this.#replace(path, `${known}${hash}\n`, 0o600);
  }

  /** Version 1 of the state remembered certificates in the place of keys. */
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
    const known = readIfPresent(revokedPath(this.config));
    return known !== undefined && known.split("\n").includes(publicKeyHash(keyPem));
  }

  /**
   * Keeps `state` as it is now. Whoever asks while it is being written shares the next writing. That it cannot be written
   * ends no run, since deliveries and alerts go on without: see `writeError`.
   */
  saveState(): Promise<void> {
    return this.#waiting ??= this.#written.then(() => {
      this.#waiting = undefined;
      return this.#written = this.#writeState().then(
        () => void (this.writeError = undefined),
        (error) => void (this.writeError = error),
      );
    });
  }

  /** Why the state could not be written the last time. */
  writeError: Error | undefined;

  async #writeState(): Promise<void> {
    const text = JSON.stringify(this.state, undefined, 1) + "\n";
    if (text === this.kept) return;
    this.kept = undefined;
    await this.#replace(join(this.config.base, "state.json"), text, 0o600);
    this.kept = text;
  }

  /** Makes a secret file that must not exist yet, and the directories to it. Throws Deno.errors.AlreadyExists. */
  async createSecret(path: string, text: string): Promise<void> {
    makeDirectories(dirname(path));
    const temporary = await this.#temporary(path, text, 0o600);
    try {
      Deno.linkSync(temporary, path); // unlike a rename, never replaces
    } catch (error) {
      if (error instanceof Deno.errors.AlreadyExists || exists(path)) {
        throw new Deno.errors.AlreadyExists(path);
      }
      Deno.renameSync(temporary, path); // a file system without hard links
    } finally {
      removeIfThere(temporary);
    }
    syncDirectory(dirname(path));
  }

  /** Puts a secret in a file, whole or not at all. */
  async replaceSecret(path: string, text: string): Promise<void> {
    await this.#replace(path, text, 0o600);
  }

  async #replace(path: string, text: string, mode: number): Promise<void> {
    await Deno.rename(await this.#temporary(path, text, mode), path);
    syncDirectory(dirname(path));
  }

  /**
   * Writes and flushes a new file beside `path`, and returns its path. It has the owner, group and mode of the file that
   * it is going to replace, less what others may do with a key, and its group where that is another then; `mode`,
   * whatever the umask, where there is none.
   */
  async #temporary(path: string, text: string, mode: number): Promise<string> {
    const temporary = temporaryOf(path, this.config);
    removeIfThere(temporary);
    const before = regularFile(path);
    const isSecret = mode === 0o600;
    const kept = before === undefined ? mode : before.mode! & (isSecret ? 0o770 : 0o777);
    using file = await Deno.open(temporary, { write: true, createNew: true, mode: kept });
    const isSameGroup = giveTo(temporary, before ?? ownerOf(dirname(path)));
    setMode(temporary, isSecret && !isSameGroup ? kept & 0o700 : kept); // before it is complete, and may be found and used
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
    removeIfThere(temporary);
    Deno.symlinkSync(target, temporary);
    giveTo(temporary, ownerOf(dirname(path)));
    Deno.renameSync(temporary, path);
  }

  /** Removes the keys of orders of which nothing is known any more. */
  #dropPendingKeys(): void {
    const { config, state: { orders } } = this;
    const known = (["rsa", "ec"] as const).flatMap((keyType) => {
      const end = fileNames(config, "", keyType).cert;
      return Object.keys(orders).filter((file) => file.endsWith(end))
        .map((file) => pendingOf(filesOf(config, file.slice(0, -end.length), keyType).key));
    });
    const directory = `${config.base}/key`;
    listing(directory).filter((name) => name.endsWith(PENDING)).map((name) => `${directory}/${name}`)
      .filter((path) => !known.includes(path)).forEach(removeIfThere);
  }

  /**
   * After a run that was cut off: a complete pair of temporaries, or a certificate that is for the key already in place,
   * takes its place; whatever else was left half done is removed. What cannot take its place stays, and stops no other.
   */
  #completeCommits(): void {
    const { config } = this;
    const left = ["key", "csr", "cert", "."].flatMap((directory) =>
      listing(join(config.base, directory)).filter((name) => name.startsWith(".") && name.endsWith(TEMPORARY))
        .map((name) => join(config.base, directory, name))
    );
    for (const end of ["", ".new", ".test", ".test.new"]) { // the account keys of issue.ts
      removeIfThere(temporaryOf(config.accountKey + end, config));
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
        this.notices.push(`cannot complete what a run left half done: ${(error as Error).message}`);
        stuck.push(newKey, newCert);
      }
    }
    left.filter((path) => !stuck.includes(path)).forEach(removeIfThere);
  }
}

/** Takes the lock, for which it waits a moment: status and the like hold it for no longer. Throws LockedError. */
async function takeLock(path: string, mode: string): Promise<Deno.FsFile> {
  const deadline = performance.now() + LOCK_WAIT_MS;
  for (;;) {
    using opened = new DisposableStack();
    let locked: boolean;
    let file: Deno.FsFile;
    try {
      file = opened.use(Deno.openSync(path, { write: true, create: true, mode: 0o600 }));
      locked = file.tryLockSync(true);
    } catch (error) {
      throw withPath(error as Error, `lock '${path}', on a file system that must support locks`);
    }
    if (locked) {
      opened.move();
      return file;
    }
    if (performance.now() > deadline) {
      throw new LockedError(`another --${mode} run is in progress (it holds ${path})`);
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

interface Owner {
  readonly uid: number | null;
  readonly gid: number | null;
}

function ownerOf(path: string): Owner {
  const { uid, gid } = Deno.statSync(path);
  return { uid, gid };
}

/** Root leaves what it makes to the owner of what is there; others keep the group where they may. False: they may not. */
function giveTo(path: string, owner: Owner): boolean {
  const isRoot = Deno.uid() === 0;
  const found = Deno.lstatSync(path);
  const [uid, gid] = [isRoot ? owner.uid : found.uid, owner.gid];
  if (uid === null || gid === null || (found.uid === uid && found.gid === gid)) return true;
  try {
    nodeFs.lchownSync(path, uid, gid); // unlike Deno's, never what a link leads to
    return true;
  } catch (error) {
    if (isRoot) throw error;
    return false;
  }
}

/** Gives a file or directory that was made just now the mode that the umask may have kept from it. */
function setMode(path: string, mode: number): void {
  if ((Deno.lstatSync(path).mode! & 0o777) !== mode) Deno.chmodSync(path, mode);
}

/** Makes a directory for secrets, and those above it. */
function makeDirectories(path: string): void {
  if (exists(path)) return;
  makeDirectories(dirname(path));
  makeDirectory(path, 0o700, ownerOf(dirname(path)));
}

/** Makes a directory with exactly this mode whatever the umask; one that is there stays as it is. */
function makeDirectory(path: string, mode: number, owner: Owner): void {
  try {
    Deno.mkdirSync(path, { mode });
  } catch (error) {
    if (error instanceof Deno.errors.AlreadyExists) return;
    throw error;
  }
  giveTo(path, owner);
  setMode(path, mode);
}

/**
 * Name beside `path`, derived, so that the next run finds it; that of `path` may use all 255 bytes. Outside the mode's
 * directory (the account key) each mode has a name of its own: the lock of the one does not keep the other out.
 */
function temporaryOf(path: string, { base, mode }: Config): string {
  const name = path.startsWith(`${base}/`) ? basename(path) : `${basename(path)}.${mode}`;
  const short = name.length + 1 + TEMPORARY.length > FILE_NAME_MAX ? sha256(name) : name;
  return join(dirname(path), `.${short}${TEMPORARY}`);
}

function pendingOf(key: string): string {
  const name = `.${basename(key)}${PENDING}`;
  return join(dirname(key), name.length > FILE_NAME_MAX ? `.${sha256(name)}${PENDING}` : name);
}

/** Adds to an error of the system which file it is about, as Deno mostly does unless that is open already. */
function withPath(error: Error, what: string): Error {
  if (!error.message.includes("'")) error.message += `: ${what}`;
  return error;
}

/** A rename is on disk once its directory is; some file systems (CIFS, FUSE) cannot do that, and are not refused. */
function syncDirectory(path: string): void {
  using directory = Deno.openSync(path);
  try {
    directory.syncSync();
  } catch (error) {
    if (["EINVAL", "ENOTSUP", "EBADF"].includes(codeOf(error) ?? "") || /os error 22/.test(String(error))) {
      return;
    }
    throw withPath(error as Error, `sync '${path}'`);
  }
}

function regularFile(path: string): Deno.FileInfo | undefined {
  try {
    const found = Deno.lstatSync(path);
    return found.isFile ? found : undefined;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return undefined;
    throw error;
  }
}

function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch {
    return false;
  }
}

function linkTarget(path: string): string | undefined {
  try {
    return Deno.readLinkSync(path);
  } catch {
    return undefined;
  }
}

function listing(directory: string): string[] {
  try {
    return Array.from(Deno.readDirSync(directory), ({ name }) => name).sort();
  } catch (error) {
    if (codeOf(error) === "ENOENT") return [];
    throw error;
  }
}

/** The text of a file, undefined where there is none. */
export function readIfPresent(path: string): string | undefined {
  try {
    return Deno.readTextFileSync(path);
  } catch (error) {
    if (codeOf(error) === "ENOENT") return undefined;
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

function codeOf(error: unknown): string | undefined {
  return (error as { code?: string }).code;
}
