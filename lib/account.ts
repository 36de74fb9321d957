/**
 * The account at the CA: its key file, its registration, the change of its key.
 *
 * Opens the conversation with the CA and remembers in the state under which account it went on. A new key is on disk
 * before the CA hears of it, so that no moment exists at which a crash loses the account.
 */

import { readFileSync } from "node:fs";
import { type AccountKey, AcmeClient, AcmeError, importAccountKey, type Transport } from "./acme.ts";
import type { Config, Mode } from "./config.ts";
import { createSecret, replaceSecret, type State, type Store } from "./store.ts";
import { generateKey } from "./x509.ts";

/** What a conversation with the CA needs. */
export interface Connecting {
  readonly config: Config;
  readonly mode: Mode;
  readonly store: Store;
  readonly world: Transport;
  /** Told that an account key was made, or put in its place. */
  madeKey(path: string, how: "made" | "changed"): void;
}

/** The key before the last change, with which accounts at other CAs are found. */
function oldKeyPath(config: Config): string {
  return `${config.accountKey}.old`;
}

/** A key that the CA may or may not know yet, beside the one that it replaces. */
function nextKeyPath(config: Config): string {
  return `${config.accountKey}.new`;
}

/**
 * Opens the conversation: reads the directory, under the key that is there or a new one. Whether the account is
 * registered shows when `register` asks.
 */
export async function connect(connecting: Connecting): Promise<AcmeClient> {
  const { config } = connecting;
  const next = readIfThere(nextKeyPath(config));
  if (next !== undefined) {
    // a change of key was cut off: the account is under the one or the other
    const client = await clientFor(next, connecting);
    if (await client.findAccount() === undefined) Deno.removeSync(nextKeyPath(config));
    else {
      await putNewKey(connecting);
      return client;
    }
  }
  const pem = await accountKey(connecting);
  await bringAlong(pem, connecting);
  return await clientFor(pem, connecting);
}

/** Where the key was changed at another CA, gives the account at this one the new key, too. */
async function bringAlong(pem: string, connecting: Connecting): Promise<void> {
  const { config, mode, store: { state } } = connecting;
  const old = readIfThere(oldKeyPath(config));
  if (old === undefined) return;
  const [key, oldKey] = await Promise.all([pem, old].map(importAccountKey)) as [AccountKey, AccountKey];
  const oldName = accountName(config, mode, oldKey);
  if (state.accounts[accountName(config, mode, key)] !== undefined || state.accounts[oldName] === undefined) {
    return;
  }
  try {
    await (await clientFor(old, connecting)).changeKey(key);
  } catch (error) {
    // an account that is gone, or has the new key since a run that was cut off: registering tells
    if (!(error instanceof AcmeError) || error.problem === undefined) throw error;
  }
  delete state.accounts[oldName];
}

/** Makes sure that the account exists, and remembers it. Returns its URL. */
export async function register(client: AcmeClient, { config, mode, store }: Connecting): Promise<string> {
  const url = await client.account();
  const name = accountName(config, mode, client.key);
  const account = { url, contact: [...config.contact], issuers: [...client.directory.caaIdentities] };
  if (JSON.stringify(store.state.accounts[name]) !== JSON.stringify(account)) {
    store.state.accounts[name] = account;
    await store.saveState();
  }
  return url;
}

/** An account belongs to one CA and one key; its name in the state. */
export function accountName(config: Config, mode: Mode, key: AccountKey): string {
  return `${config.acmeDirectory[mode]} ${key.thumbprint}`;
}

/** The account that is remembered for the key on disk; undefined before the first run. */
export async function rememberedAccount(
  config: Config,
  mode: Mode,
  state: State,
): Promise<State["accounts"][string] | undefined> {
  const pem = readIfThere(config.accountKey);
  return pem === undefined
    ? undefined
    : state.accounts[accountName(config, mode, await importAccountKey(pem))];
}

/**
 * Gives the account a new key (RFC 8555 §7.3.5) and puts the key in its place. The old one is kept beside it as
 * `<file>.old`: `connect` brings along the accounts that it has at other CAs.
 */
export async function rollOver(connecting: Connecting): Promise<void> {
  const { config, mode, store } = connecting;
  const client = await connect(connecting);
  await register(client, connecting);
  const pem = await generateKey({ type: "ec", curve: "P-256" });
  const key = await importAccountKey(pem);
  await createSecret(nextKeyPath(config), pem);
  try {
    await client.changeKey(key);
  } catch (error) {
    // the CA refused, and so knows only the old key; where no answer came, the next run asks
    if (error instanceof AcmeError && error.problem !== undefined) Deno.removeSync(nextKeyPath(config));
    throw error;
  }
  await putNewKey(connecting);
  delete store.state.accounts[accountName(config, mode, client.key)];
  await register(await clientFor(pem, connecting), connecting);
}

async function putNewKey({ config, madeKey }: Connecting): Promise<void> {
  await replaceSecret(oldKeyPath(config), readFileSync(config.accountKey, "utf8"));
  Deno.renameSync(nextKeyPath(config), config.accountKey);
  madeKey(config.accountKey, "changed");
}

async function clientFor(pem: string, { config, mode, store, world }: Connecting): Promise<AcmeClient> {
  const key = await importAccountKey(pem);
  const known = store.state.accounts[accountName(config, mode, key)];
  const registration = { known, contact: config.contact, eab: config.eab };
  return await AcmeClient.connect(config.acmeDirectory[mode], key, registration, world);
}

/** The account key, made where there is none yet. */
async function accountKey({ config, madeKey }: Connecting): Promise<string> {
  const present = readIfThere(config.accountKey);
  if (present !== undefined) return present;
  const pem = await generateKey({ type: "ec", curve: "P-256" });
  await createSecret(config.accountKey, pem);
  madeKey(config.accountKey, "made");
  return pem;
}

function readIfThere(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch (error) {
    if ((error as { code?: string }).code === "ENOENT") return undefined;
    throw error;
  }
}
