/**
 * The account at the CA: its key file, its registration, the change of its key.
 *
 * Opens the conversation with the CA and remembers in the state under which account it went on. One key file serves
 * several CAs, staging and production at the least, which learn of a new key one after the other: it is on disk before
 * the first hears of it, and the old one stays for the others. No moment exists at which a crash loses an account.
 */

import defer * as nodeCrypto from "node:crypto";
import { type AccountKey, AcmeClient, importAccountKey, type Transport } from "./acme.ts";
import type { Config } from "./config.ts";
import { readIfPresent, type Store } from "./store.ts";
import type { State } from "./state.ts";
import { generateKey } from "./x509.ts";

/** What a conversation with the CA needs. */
export interface Connecting {
  readonly config: Config;
  readonly store: Store;
  readonly world: Transport;
  /** Told that an account key was made, or put in its place. */
  madeKey(path: string, how: "made" | "changed"): void;
  /** Told of what is odd but stops nothing. */
  warn(text: string): void;
}

/** An earlier key, under which accounts at other CAs may still be. */
function oldKeyPath({ accountKey }: Config, thumbprint: string): string {
  return `${accountKey}.old-${thumbprint}`;
}

/** A key that this CA, and no other, may or may not know yet. */
function newKeyPath({ accountKey, directoryUrl }: Config): string {
  const digest = nodeCrypto.createHash("sha256").update(directoryUrl).digest("hex");
  return `${accountKey}.new-${digest.slice(0, 8)}`;
}

/**
 * Opens the conversation: reads the directory, under the key that is there or a new one. Whether the account is
 * registered shows when `register` asks. A change of key that was cut off, or made at another CA, is made good here.
 */
export async function connect(connecting: Connecting): Promise<AcmeClient> {
  const newKey = newKeyPath(connecting.config);
  const pem = readIfPresent(newKey);
  if (pem !== undefined) {
    // cut off before the CA was told, or after
    if (await (await clientFor(pem, connecting)).findAccount() === undefined) Deno.removeSync(newKey);
    else await putNewKey(connecting);
  }
  return await bringAlong(await accountKey(connecting), connecting);
}

/**
 * A conversation under the present key, which an account gets that the CA knows under an earlier one; under the earlier
 * one where the CA changes no keys.
 */
async function bringAlong(pem: string, connecting: Connecting): Promise<AcmeClient> {
  const { config, store: { state } } = connecting;
  const key = await importAccountKey(pem);
  const name = accountName(config, key);
  const earlier = state.accounts[name] === undefined ? earlierAccount(connecting) : undefined;
  if (earlier !== undefined) {
    const client = await clientFor(earlier.pem, connecting);
    if (client.directory.keyChange === undefined) return client;
    // the CA does not find it where a run that was cut off has given it the present key
    if (await client.findAccount() !== undefined) await client.changeKey(key);
    renameAccount(state, earlier.name, name);
  }
  return await clientFor(pem, connecting);
}

/** An account at this CA under a key that was changed by `rollOver`, not by the user, who thereby chose another account. */
function earlierAccount(
  { config, store: { state } }: Connecting,
): { name: string; pem: string } | undefined {
  for (const name of Object.keys(state.accounts)) {
    const [directory, thumbprint] = name.split(" ") as [string, string];
    if (directory !== config.directoryUrl) continue;
    const pem = readIfPresent(oldKeyPath(config, thumbprint));
    if (pem !== undefined) return { name, pem };
  }
}

/** Makes sure that the account exists, and remembers it. Returns its URL. */
export async function register(client: AcmeClient, connecting: Connecting): Promise<string> {
  const { config, store, warn } = connecting;
  const url = await client.account();
  const name = accountName(config, client.key);
  const known = store.state.accounts[name];
  if (client.contactRefusal !== undefined) {
    warn(`the CA refuses the contact: ${client.contactRefusal.message}`);
  }
  const contact = client.contactRefusal === undefined ? config.contact : known?.contact ?? [];
  const account = { url, contact: [...contact], issuers: [...client.directory.caaIdentities] };
  if (JSON.stringify(known) !== JSON.stringify(account)) {
    store.state.accounts[name] = account;
    await store.saveState();
  }
  return url;
}

/** An account belongs to one CA and one key; its name in the state. */
export function accountName({ directoryUrl }: Config, key: AccountKey): string {
  return `${directoryUrl} ${key.thumbprint}`;
}

/** The account that is remembered for the key on disk; undefined before the first run. */
export async function rememberedAccount(
  config: Config,
  state: State,
): Promise<State["accounts"][string] | undefined> {
  const pem = readIfPresent(config.accountKey);
  return pem === undefined ? undefined : state.accounts[accountName(config, await importAccountKey(pem))];
}

/** The same account under another key. */
function renameAccount(state: State, from: string, to: string): void {
  state.accounts[to] = state.accounts[from]!;
  delete state.accounts[from];
  for (const renewal of Object.values(state.renewals)) if (renewal.account === from) renewal.account = to;
}

/**
 * Gives the account a new key (RFC 8555 §7.3.5) and puts the key in its place. The old one is kept beside it as
 * `<file>.old-<thumbprint>`: `connect` brings along the accounts that it has at other CAs.
 */
export async function rollOver(connecting: Connecting): Promise<void> {
  const { config, store } = connecting;
  const client = await connect(connecting);
  await register(client, connecting);
  const pem = await generateKey({ type: "ec", curve: "P-256" });
  const key = await importAccountKey(pem);
  await store.createSecret(newKeyPath(config), pem);
  try {
    await client.changeKey(key);
  } catch (error) {
    // where the answer was lost, it was asked again, and refused: the account has the new key. Else `connect` tidies up
    if (await (await clientFor(pem, connecting)).findAccount() === undefined) throw error;
  }
  await putNewKey(connecting);
  renameAccount(store.state, accountName(config, client.key), accountName(config, key));
  await store.saveState();
}

async function putNewKey({ config, store, madeKey }: Connecting): Promise<void> {
  using _locked = await lockedKey(config.accountKey);
  const old = readIfPresent(config.accountKey);
  if (old !== undefined) {
    const path = oldKeyPath(config, (await importAccountKey(old)).thumbprint);
    await store.replaceSecret(path, old);
  }
  Deno.renameSync(newKeyPath(config), config.accountKey);
  madeKey(config.accountKey, "changed");
}

/**
 * Keeps the account key from being replaced by the other mode, whose lock is another, between its being saved as an old
 * one and its being replaced here. Where it cannot be locked, that is left to chance.
 */
async function lockedKey(path: string): Promise<Deno.FsFile | undefined> {
  for (let attempts = 1;; attempts++) {
    let file: Deno.FsFile | undefined;
    try {
      file = await Deno.open(path, { read: true, write: true }); // NFS locks nothing for those who only read
      await file.lock(true);
      // on some network file systems a file has another number each time
      if ((await file.stat()).ino === (await Deno.stat(path)).ino || attempts === 10) return file;
      file.close(); // has been replaced meanwhile
    } catch {
      return file;
    }
  }
}

async function clientFor(pem: string, { config, store, world }: Connecting): Promise<AcmeClient> {
  const key = await importAccountKey(pem);
  const known = store.state.accounts[accountName(config, key)];
  const registration = { known, contact: config.contact, eab: config.eab };
  return await AcmeClient.connect(config.directoryUrl, key, registration, world);
}

/** The account key, made where there is none yet. */
async function accountKey({ config, store, madeKey }: Connecting): Promise<string> {
  const present = readIfPresent(config.accountKey);
  if (present !== undefined) return present;
  const pem = await generateKey({ type: "ec", curve: "P-256" });
  try {
    await store.createSecret(config.accountKey, pem);
  } catch (error) {
    if (!(error instanceof Deno.errors.AlreadyExists)) throw error;
    return Deno.readTextFileSync(config.accountKey); // a run of the other mode was quicker
  }
  madeKey(config.accountKey, "made");
  return pem;
}
