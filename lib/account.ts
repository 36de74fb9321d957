/**
 * The account at the CA: its key, its registration and change of key (RFC 8555 §7.3), and revocation (§7.6).
 *
 * The key is a file beside the configuration. The state has the URL of the account, so that the CA need not be asked.
 */

import { AcmeClient } from "./acme.ts";
import type { Config } from "./config.ts";
import type { Context } from "./context.ts";
import { codeOf, readIfPresent } from "./files.ts";
import { type AccountKey, AcmeError, importKey, isProblem } from "./http.ts";
import type { Account, State } from "./state.ts";
import type { Store } from "./store.ts";
import { certificateDer, generateKey } from "./x509.ts";

export interface AccountEvent {
  readonly kind: "account key";
  readonly path: string;
  readonly how: "made" | "changed";
}

export interface AccountOptions {
  readonly config: Config;
  readonly store: Store;
  readonly context: Context;
  /** Lines at a time. */
  readonly parallel: number;
  readonly emit: (event: AccountEvent) => void;
}

/** The connection to the CA of a configuration, and the account there; both are opened when first needed. */
export class CaAccount {
  #connected: Promise<AcmeClient> | undefined;
  #client: AcmeClient | undefined;
  #opened: Promise<AcmeClient> | undefined;
  #reregistered: Promise<void> | undefined;

  constructor(private readonly options: AccountOptions) {}

  /** By how much this clock is ahead of the CA's, in milliseconds; 0 until the CA has answered. */
  get aheadMs(): number {
    return this.#client?.aheadMs ?? 0;
  }

  /** The client without an account. `hurry`: nothing depends on it. After a failure the next call tries again. */
  connect(hurry = false): Promise<AcmeClient> {
    const { config: { directoryUrl }, context, parallel } = this.options;
    return this.#connected ??= AcmeClient.connect(directoryUrl, context, parallel, { hurry }).then(
      (client) => this.#client = client,
      (error) => {
        this.#connected = undefined;
        throw error;
      },
    );
  }

  /** The client with the account, which is registered if necessary. Throws AcmeError. */
  open(): Promise<AcmeClient> {
    return this.#opened ??= this.#open();
  }

  async #open(): Promise<AcmeClient> {
    const { config, store } = this.options;
    const connecting = this.connect(); // while the key is read or made
    connecting.catch(() => {}); // awaited below
    await this.#finishRollover(connecting);
    const key = await readAccountKey(config, store.state) ?? await this.#makeKey();
    const client = await connecting;
    await this.#register(client, key);
    return client;
  }

  /** After a rollover that was killed: keeps the new key if the CA has it. */
  async #finishRollover(connecting: Promise<AcmeClient>): Promise<void> {
    const path = newKeyPath(this.options.config);
    const pem = readIfPresent(path);
    if (pem === undefined) return;
    const account = await (await connecting).findAccount(await importKey(pem));
    if (account === undefined) Deno.removeSync(path);
    else this.#installNewKey();
  }

  /** Makes the key file. If this user cannot write there, --test uses the account key of --prod. */
  async #makeKey(): Promise<AccountKey> {
    const { config, store, emit } = this.options;
    const path = accountKeyPath(config);
    const pem = await generateKey({ type: "ec", curve: "P-256" });
    try {
      await store.createSecret(path, pem);
    } catch (error) {
      const isDenied = ["EACCES", "EPERM", "EROFS"].includes(codeOf(error) ?? "");
      const shared = readIfPresent(config.accountKey);
      if (!isDenied || shared === undefined) throw error;
      return await importKey(shared);
    }
    emit({ kind: "account key", path, how: "made" });
    return await importKey(pem);
  }

  /** Registers the key, unless the state has its account. */
  async #register(client: AcmeClient, key: AccountKey): Promise<void> {
    const { config, store: { state }, context } = this.options;
    const known = state.accounts[accountName(config, key)];
    if (known === undefined) {
      client.account = await client.newAccount(key, config);
      return await this.#remember(client, config.contact);
    }
    client.account = { key, url: known.url };
    let { contact } = known;
    if (contact.join() !== config.contact.join()) {
      try {
        await this.withAccount(client, () => client.updateContact(config.contact));
        contact = [...config.contact];
      } catch (error) {
        if (!isProblem(error, "invalidContact", "unsupportedContact")) throw error;
        context.warn(`the CA refuses the contact: ${error.message}`); // certificates are more important
      }
    }
    await this.#remember(client, contact);
  }

  async #remember({ account, directory }: AcmeClient, contact: readonly string[]): Promise<void> {
    const { config, store } = this.options;
    const { accounts } = store.state;
    const name = accountName(config, account.key);
    const current = { url: account.url, contact: [...contact], issuers: [...directory.caaIdentities] };
    if (JSON.stringify(accounts[name]) === JSON.stringify(current)) return;
    accounts[name] = current;
    await store.saveState();
  }

  /** Makes a request; registers the account again, once, if the CA has lost it. */
  async withAccount<T>(client: AcmeClient, request: () => Promise<T>): Promise<T> {
    const { isNew, key } = client.account;
    try {
      return await request();
    } catch (error) {
      if (isNew || !isProblem(error, "accountDoesNotExist")) throw error;
      const { config } = this.options;
      await (this.#reregistered ??= client.newAccount(key, config).then(async (account) => {
        client.account = account;
        await this.#remember(client, config.contact);
      }));
      return await request();
    }
  }

  /**
   * Gives the account a new key (RFC 8555 §7.3.5). The new key is on disk before the CA gets it, so that a crash never
   * loses the account: `open` finds out which of the two the CA has.
   */
  async rollover(): Promise<void> {
    const { config, store } = this.options;
    const client = await this.open();
    const old = accountName(config, client.account.key);
    const pem = await generateKey({ type: "ec", curve: "P-256" });
    const key = await importKey(pem);
    await store.createSecret(newKeyPath(config), pem);
    try {
      await this.withAccount(client, () => client.changeKey(key));
    } catch (error) {
      // if the first answer was lost, the second attempt was refused, since the account has the new key
      if (await client.findAccount(key) === undefined) {
        Deno.removeSync(newKeyPath(config));
        throw error;
      }
    }
    this.#installNewKey();
    const { state } = store;
    const name = accountName(config, key);
    state.accounts[name] = state.accounts[old]!;
    delete state.accounts[old];
    for (const one of [...Object.values(state.renewals), ...Object.values(state.orders)]) {
      if (one.account === old) one.account = name;
    }
    await store.saveState();
  }

  #installNewKey(): void {
    const { config, emit } = this.options;
    const path = accountKeyPath(config);
    Deno.renameSync(newKeyPath(config), path);
    emit({ kind: "account key", path, how: "changed" });
  }

  /**
   * Revokes a certificate; `reason` is a CRLReason. `keyPem`, its own key, signs if there is no account yet, or if the
   * account is not authorized (RFC 8555 §7.6).
   */
  async revoke(pem: string, reason: number, keyPem?: string): Promise<void> {
    const { config, store: { state } } = this.options;
    const der = certificateDer(pem);
    const signer = keyPem === undefined ? undefined : { key: await importKey(keyPem) };
    if (signer !== undefined && await rememberedAccount(config, state) === undefined) {
      return await (await this.connect()).revokeCertificate(der, reason, signer);
    }
    const client = await this.open();
    try {
      await this.withAccount(client, () => client.revokeCertificate(der, reason));
    } catch (error) {
      if (signer === undefined || !isProblem(error, "unauthorized")) throw error;
      await client.revokeCertificate(der, reason, signer);
    }
  }
}

/**
 * The file of the account key. Each mode has its own: --rollover changes one of them, and a step-ca with two
 * provisioners accepts a key once.
 */
function accountKeyPath({ accountKey, mode }: Config): string {
  return mode === "test" ? `${accountKey}.test` : accountKey;
}

/** A key that the CA may not have yet. */
function newKeyPath(config: Config): string {
  return `${accountKeyPath(config)}.new`;
}

/**
 * The account key on disk, if there is one. Until 0.1.0 both modes had the same: --test goes on with that if it has an
 * account for it. Throws AcmeError.
 */
async function readAccountKey(config: Config, { accounts }: State): Promise<AccountKey | undefined> {
  const path = accountKeyPath(config);
  for (const file of new Set([path, config.accountKey])) {
    const pem = readIfPresent(file);
    if (pem === undefined) continue;
    const key = await importKey(pem).catch(() => {
      throw new AcmeError("read the account key", `no RSA or EC key in ${file} that can be used`, "");
    });
    if (file === path || Object.hasOwn(accounts, accountName(config, key))) return key;
  }
}

/** The key of an account in the state: it belongs to one CA and one key. */
export function accountName({ directoryUrl }: Config, key: AccountKey): string {
  return `${directoryUrl} ${key.thumbprint}`;
}

/** The account in the state for the key on disk; undefined before the first run. */
export async function rememberedAccount(config: Config, state: State): Promise<Account | undefined> {
  const key = await readAccountKey(config, state);
  return key && state.accounts[accountName(config, key)];
}
