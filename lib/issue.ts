/**
 * The conversation with the CA of a configuration: the account, and one line of `domains` -> its certificates, in the order
 * of RFC 8555 §7.4: order, authorizations, challenges, finalize, download.
 *
 * The names of a line are authorized once. Its key types follow each other to the point where their order is ready and then
 * go on side by side; their keys and CSRs are made while the CA is waited for. What comes out has been checked against what
 * was asked for; putting it in its place is not done here. What a later run has to know is in the state: accounts, renewal
 * windows, orders that the CA has not finished, failures, and until when the CA accepts no orders.
 */

import { AcmeClient, type Authorization, type Order } from "./acme.ts";
import { ChallengeError, Challenges, type Presented } from "./challenge.ts";
import type { Config, Line } from "./config.ts";
import { type Context, limit, settled } from "./context.ts";
import { CommandError, PrepareCommands } from "./hooks.ts";
import { type AccountKey, AcmeError, describe, importKey, isProblem } from "./http.ts";
import { type Due, expiryOf, retryLineAt, type Task } from "./renewal.ts";
import type { Account, Failure, State } from "./state.ts";
import { type Entry, type Issued, readIfPresent, type Store } from "./store.ts";
import {
  certificateDer,
  ChainError,
  checkChain,
  createCsr,
  generateKey,
  type KeySpec,
  keySpecOf,
  pemBlocks,
  publicKeyHash,
  rootOf,
} from "./x509.ts";

/** What happens while lines are issued. */
export type IssueEvent =
  | { readonly kind: "account key"; readonly path: string; readonly how: "made" | "changed" }
  | { readonly kind: "task"; readonly task: Task }
  | { readonly kind: "no CA"; readonly error: Error; readonly tasks: readonly Task[] }
  | { readonly kind: "failed"; readonly due: readonly Due[]; readonly error: Error }
  | { readonly kind: "end"; readonly task: Task };

/** What an issuer needs. */
export interface IssuerOptions {
  readonly config: Config;
  readonly store: Store;
  readonly context: Context;
  /** Lines at a time. */
  readonly parallel: number;
  /** What was asked for gets a new key. */
  readonly newKey: boolean;
  readonly emit: (event: IssueEvent) => void;
}

/** What is handed to the CA for a certificate. */
interface Request {
  readonly keyPem: string;
  readonly csr: { readonly der: Uint8Array; readonly pem: string };
  /** The key was made for this certificate. */
  readonly isNew: boolean;
}

/** Challenges that the CA has been asked to check. */
type Answers = Presented["answers"];

const MINUTE_MS = 60_000, HOUR_MS = 60 * MINUTE_MS, DAY_MS = 24 * HOUR_MS;

/** How long an order may be validated or issued; Let's Encrypt needs seconds. */
const ORDER_DEADLINE_MS = 3 * MINUTE_MS;
/**
 * Pauses before the authorizations of a pending order are read, since some CAs leave it pending when a validation has failed:
 * where the answer to the response said so (step-ca, Caddy), where it did not, and where other challenges wait for these. Each
 * next pause is twice as long, up to the longest.
 */
const WRONG_PAUSE_MS = 1_500, FIRST_PAUSE_MS = 5_000, SOON_PAUSE_MS = 250, LONGEST_PAUSE_MS = 8_000;
/** How often a CA is asked to check a challenge that it has found wrong: for a quarter of a minute. */
const MOST_RESPONSES = 4;
/** An order that is seen to be ready so often after it was finalized is finalized again; the first polls take a second. */
const READY_POLLS = 4;
/** Let's Encrypt's orders expire after a week. */
const ORDER_LIFE_MS = 7 * DAY_MS;
/** How long the CA is left alone where it set a limit and did not say until when. */
const UNSTATED_HOLD_MS = HOUR_MS;
/** What the CA says of a hundred names need not be in the state, and in every alert, whole. */
const LONGEST_REMEMBERED = 2_000;
/** A clock that differs by more makes certificates due that are not, and limits of the CA are used up on them. */
const MOST_SKEW_MS = DAY_MS;

/** RFC 9773 §4.3.2: Retry-After is heeded within these bounds, and is six hours where the CA says nothing. */
const SOONEST_ASK_MS = MINUTE_MS, LATEST_ASK_MS = DAY_MS, USUAL_ASK_MS = 6 * HOUR_MS;

/** The conversation with one CA, opened by whoever first needs it. */
export class Issuer {
  #connected: Promise<AcmeClient> | undefined;
  #client: AcmeClient | undefined;
  #opened: Promise<AcmeClient> | undefined;
  #successor: Promise<void> | undefined;
  #challenges: Challenges | undefined;

  constructor(private readonly options: IssuerOptions) {}

  // ---- the account -----------------------------------------------------------------------------------------------

  #connect(hurry = false): Promise<AcmeClient> {
    const { config: { directoryUrl }, context, parallel } = this.options;
    return this.#connected ??= AcmeClient.connect(directoryUrl, context, parallel, { hurry })
      .then((client) => this.#client = client);
  }

  /** By how much this clock is ahead of the CA's, in milliseconds, as far as an answer showed. */
  get aheadMs(): number {
    return this.#client?.aheadMs ?? 0;
  }

  /** The conversation under an account that exists; throws AcmeError. */
  open(): Promise<AcmeClient> {
    return this.#opened ??= this.#open();
  }

  async #open(): Promise<AcmeClient> {
    const { config, store, store: { state }, emit } = this.options;
    const connecting = this.#connect(); // while the key is made ready
    connecting.catch(() => {}); // awaited below
    const path = accountKeyPath(config);
    const cutOff = readIfPresent(newKeyPath(config));
    if (cutOff !== undefined) {
      // a change of key that the CA may have heard of or not
      const account = await (await connecting).findAccount(await importKey(cutOff));
      if (account === undefined) Deno.removeSync(newKeyPath(config));
      else this.#putNewKey();
    }
    let key = await readAccountKey(config, state);
    if (key === undefined) {
      const pem = await generateKey({ type: "ec", curve: "P-256" });
      try {
        await store.createSecret(path, pem);
        emit({ kind: "account key", path, how: "made" });
        key = await importKey(pem);
      } catch (error) {
        // as with the original, the key that is there may be where this user can only read: it serves both modes then
        const shared = readIfPresent(config.accountKey);
        if (!["EACCES", "EPERM", "EROFS"].includes((error as { code?: string }).code ?? "") || !shared) {
          throw error;
        }
        key = await importKey(shared);
      }
    }
    const client = await connecting;
    await this.#register(client, key);
    return client;
  }

  /** Makes sure that the key has an account; the one that is remembered is not asked for. */
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
        await this.#underAccount(client, () => client.updateContact(config.contact));
        contact = [...config.contact];
      } catch (error) {
        if (!isProblem(error, "invalidContact", "unsupportedContact")) throw error;
        context.warn(`the CA refuses the contact: ${error.message}`); // no reason to let certificates expire
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

  /** A request under the account, which is registered anew, once, where the CA has forgotten the remembered one. */
  async #underAccount<T>(client: AcmeClient, request: () => Promise<T>): Promise<T> {
    const { isNew, key } = client.account;
    try {
      return await request();
    } catch (error) {
      if (isNew || !isProblem(error, "accountDoesNotExist")) throw error;
      const { config } = this.options;
      await (this.#successor ??= client.newAccount(key, config).then(async (account) => {
        client.account = account;
        await this.#remember(client, config.contact);
      }));
      return await request();
    }
  }

  /**
   * Gives the account a new key (RFC 8555 §7.3.5). It is on disk before the CA hears of it, so that no moment exists at which
   * a crash loses the account: `open` finds out which of the two the CA knows.
   */
  async rollover(): Promise<void> {
    const { config, store } = this.options;
    const client = await this.open();
    const old = accountName(config, client.account.key);
    const pem = await generateKey({ type: "ec", curve: "P-256" });
    const key = await importKey(pem);
    await store.createSecret(newKeyPath(config), pem);
    try {
      await this.#underAccount(client, () => client.changeKey(key));
    } catch (error) {
      // where the answer was lost, it was asked again, and refused: the account has the new key
      if (await client.findAccount(key) === undefined) {
        Deno.removeSync(newKeyPath(config));
        throw error;
      }
    }
    this.#putNewKey();
    const { state } = store;
    const name = accountName(config, key);
    state.accounts[name] = state.accounts[old]!;
    delete state.accounts[old];
    for (const one of [...Object.values(state.renewals), ...Object.values(state.orders)]) {
      if (one.account === old) one.account = name;
    }
    await store.saveState();
  }

  #putNewKey(): void {
    const { config, emit } = this.options;
    const path = accountKeyPath(config);
    Deno.renameSync(newKeyPath(config), path);
    emit({ kind: "account key", path, how: "changed" });
  }

  /**
   * Revokes a certificate; `reason` is a CRLReason. Its own key, where that is at hand, signs for it where no account is
   * known, or the CA says that the account has no say (RFC 8555 §7.6).
   */
  async revoke(pem: string, reason: number, keyPem?: string): Promise<void> {
    const { config, store: { state } } = this.options;
    const der = certificateDer(pem);
    const signer = keyPem === undefined ? undefined : { key: await importKey(keyPem) };
    const known = await rememberedAccount(config, state);
    if (known === undefined && signer !== undefined) {
      return await (await this.#connect()).revokeCertificate(der, reason, signer);
    }
    const client = await this.open();
    try {
      await this.#underAccount(client, () => client.revokeCertificate(der, reason));
    } catch (error) {
      if (signer === undefined || !isProblem(error, "unauthorized")) throw error;
      await client.revokeCertificate(der, reason, signer);
    }
  }

  // ---- renewal information ---------------------------------------------------------------------------------------

  /**
   * Asks the CA when it would like certificates to be renewed (RFC 9773), as far as it may be asked again, and remembers a
   * moment drawn in each window. Never fails a run.
   */
  async askRenewalWindows(inventory: readonly Entry[]): Promise<void> {
    const { config, store, context } = this.options;
    const { state } = store;
    const now = context.now();
    const without = state.withoutRenewalInfo[config.directoryUrl];
    if (!config.ari || (without !== undefined && now.getTime() - Date.parse(without) < DAY_MS)) return;
    const inUse = inventory.filter(({ finding }) =>
      finding.kind === "present" && finding.certificate.notAfter > now
    );
    const nameless = inUse.filter((entry) => idOf(entry) === undefined);
    const asked = inUse.filter((entry) => {
      const { account, askAt } = state.renewals[idOf(entry) ?? ""] ?? {};
      // of another CA's certificate this one knows nothing
      const isOurs = account === undefined || account.startsWith(`${config.directoryUrl} `);
      return idOf(entry) !== undefined && isOurs && !(new Date(askAt ?? 0) > now);
    });
    if (asked.length + nameless.length === 0) return;
    let client: AcmeClient;
    try {
      client = await this.#connect(true);
    } catch (error) {
      this.#connected = undefined; // who depends on the CA tries harder
      context.signal.throwIfAborted();
      return context.warn(`cannot ask the CA when to renew: ${messageOf(error)}`);
    }
    if (client.directory.renewalInfo === undefined) {
      state.withoutRenewalInfo[config.directoryUrl] = now.toISOString();
      return await store.saveState();
    }
    delete state.withoutRenewalInfo[config.directoryUrl];
    const warn = ({ line, keyType }: Entry, text: string) =>
      context.warn(`${line.names[0]} (${keyType}): ${text}`);
    for (const entry of nameless) {
      warn(entry, "cannot ask when to renew: it does not name its authority's key; its dates decide");
    }
    let answers = true;
    const slot = limit(this.options.parallel);
    await Promise.all(asked.map((entry) =>
      slot(async () => {
        if (!answers || context.signal.aborted) return;
        try {
          await this.#askRenewalWindow(client, idOf(entry)!);
        } catch (error) {
          if (!answers || context.signal.aborted) return;
          const known = state.renewals[idOf(entry)!]?.window;
          const decides = known === undefined ? "its dates decide" : "what the CA said before decides";
          warn(entry, `${messageOf(error)}; ${decides}`);
          // a service that is down is not waited for once for every certificate; the next run asks about the others
          answers = !(error instanceof AcmeError && error.isTransient) && !isProblem(error, "rateLimited");
        }
      })
    ));
    await store.saveState();
  }

  /** Throws AcmeError; even then the CA is left alone for a while, and what it said before stays remembered. */
  async #askRenewalWindow(client: AcmeClient, id: string): Promise<void> {
    const { store: { state }, context } = this.options;
    const renewal = state.renewals[id] ??= {};
    const later = (ms: number) => new Date(context.now().getTime() + ms).toISOString();
    renewal.askAt = later(USUAL_ASK_MS);
    const { start, end, explanationUrl, retryAfter } = await client.renewalInfo(id);
    const wait = retryAfter === undefined ? USUAL_ASK_MS : retryAfter.getTime() - context.now().getTime();
    renewal.askAt = later(Math.min(Math.max(wait, SOONEST_ASK_MS), LATEST_ASK_MS));
    const window = { start: start.toISOString(), end: end.toISOString() };
    // drawn once for a window, or certificates would gather at its end
    const drawn = renewal.window?.start === window.start && renewal.window.end === window.end
      ? renewal.window.at
      : new Date(start.getTime() + context.random() * (end.getTime() - start.getTime())).toISOString();
    renewal.window = { ...window, at: drawn, explanationUrl };
  }

  // ---- lines -----------------------------------------------------------------------------------------------------

  /**
   * Issues every task, in their order, some at a time; `keep` puts a certificate in its place, `done` hears of each line that
   * has come to an end.
   */
  async issueAll(
    tasks: readonly Task[],
    keep: (due: Due, issued: Issued, seconds: number) => Promise<void>,
    done: (task: Task) => void = () => {},
  ): Promise<void> {
    if (tasks.length === 0) return;
    const { config, store, context, parallel, emit } = this.options;
    let closed: Error | undefined;
    // one after the other: what goes on behind the end of a run makes account keys without the lock
    const opened = store.ensureWritable().then(() => this.open()).then((client) => {
      if (Math.abs(client.aheadMs) > MOST_SKEW_MS) throw wrongClock(client, config, context.now());
      delete store.state.holds[config.directoryUrl];
      return client;
    }).catch((error) => {
      closed = error;
    });
    await using prepare = new PrepareCommands(context.warn, (text) => context.onOutput?.(text, "prepare"));
    this.#challenges = new Challenges(config, context, prepare, store);
    const slot = limit(parallel);
    await Promise.all(tasks.map((task) =>
      slot(async () => {
        if (context.signal.aborted || closed !== undefined) return;
        const requests = task.due.map((due) => this.#request(due)); // made while the CA is waited for
        for (const request of requests) request.catch(() => {}); // heard where it is needed
        const client = await opened;
        if (client === undefined) return;
        if (this.limitedUntil() === undefined) await this.#issueTask(task, client, requests, keep);
        done(task);
      })
    ));
    context.signal.throwIfAborted();
    if (closed === undefined) return;
    emit({ kind: "no CA", error: closed, tasks });
    for (const task of tasks) this.#rememberFailure(task, closed, { shared: true });
    for (const task of tasks) done(task);
  }

  /** Until when the CA accepts no orders; undefined where it accepts them. */
  limitedUntil(): Date | undefined {
    const { config, store, context } = this.options;
    const hold = store.state.holds[config.directoryUrl];
    return hold !== undefined && new Date(hold) > context.now() ? new Date(hold) : undefined;
  }

  /** Issues one line, hands on the certificates, reports and remembers failures. */
  async #issueTask(
    task: Task,
    client: AcmeClient,
    requests: readonly Promise<Request>[],
    keep: (due: Due, issued: Issued, seconds: number) => Promise<void>,
  ): Promise<void> {
    const { store, context, emit } = this.options;
    emit({ kind: "task", task });
    const begun = context.now().getTime();
    let unkept = false; // a certificate was issued, and could not be put in its place
    const results = await Promise.allSettled(
      this.#issueLine(task, client, requests).map(async (promise, index) => {
        const due = task.due[index]!;
        const issued = await promise;
        this.#rememberRenewal(due, issued, client);
        try {
          await keep(due, issued, (context.now().getTime() - begun) / 1000);
        } catch (error) {
          unkept = true;
          await store.keepPendingKey(due.entry, issued.keyPem).catch(() => {}); // its disk, too, may be full
          throw error;
        }
        this.#forgetOrder(due.entry);
      }),
    );
    // an error that both key types share is reported once
    const failures = new Map<Error, Due[]>();
    for (const [index, result] of results.entries()) {
      if (result.status === "fulfilled") continue;
      failures.set(result.reason, [...failures.get(result.reason) ?? [], task.due[index]!]);
    }
    const errors = [...failures.keys()];
    const waits = errors.every((error) => limitsAccount(error, task.line.names));
    if (errors.length === 0) delete store.state.failures[task.due[0]!.entry.stem];
    else if (!context.signal.aborted) {
      if (!waits) { for (const [error, due] of failures) emit({ kind: "failed", due, error }); }
      this.#rememberFailure(task, errors[0]!, { unkept });
    }
    emit({ kind: "end", task });
  }

  /** Remembers why a line could not be issued, or until when the CA accepts no orders at all. */
  #rememberFailure(task: Task, error: Error, how: { shared?: boolean; unkept?: boolean }): void {
    const { config, store: { state: { holds, failures } }, context } = this.options;
    const { stem } = task.due[0]!.entry;
    if (limitsAccount(error, task.line.names)) {
      const until = error.retryAfter ?? new Date(context.now().getTime() + UNSTATED_HOLD_MS);
      holds[config.directoryUrl] = until.toISOString();
    } else {
      failures[stem] = failureAfter(failures[stem], error, context.now(), task, how);
    }
  }

  /** Remembers who ordered a certificate, and whether that was the CA's wish. */
  #rememberRenewal({ reason }: Due, { certificate: { id } }: Issued, client: AcmeClient): void {
    const { config, store: { state }, context } = this.options;
    if (id === undefined || !config.ari) return;
    const suggested = reason.kind === "renewal" && reason.rule === "ari";
    state.renewals[id] = {
      account: accountName(config, client.account.key),
      ...(suggested && { suggestedAt: context.now().toISOString() }),
    };
  }

  /** Starts the certificates of one line; one promise for each that is due, in that order. */
  #issueLine(
    { line, due }: Task,
    client: AcmeClient,
    requests: readonly Promise<Request>[],
  ): Promise<Issued>[] {
    let authorized: Promise<unknown> = Promise.resolve();
    return due.map(async ({ entry }, index) => {
      const request = requests[index]!;
      await Promise.race([request, undefined]); // a key that is there and cannot be read stops no other
      const issued = await this.#takeUp(line, entry, client, request);
      if (issued !== undefined) return issued;
      const ready = authorized.then(() => this.#readyOrder(line, entry, client));
      authorized = ready;
      return await this.#finish(line, entry, client, await ready, await request);
    });
  }

  /** The key that is there, unless there has to be a new one; and its CSR. */
  async #request({ entry, reason }: Due): Promise<Request> {
    const { config, store, newKey } = this.options;
    const isUsable = (pem: string | undefined) =>
      pem !== undefined && isEqual(keySpecOf(pem), wantedSpec(entry, config));
    const ofOrder = store.state.orders[entry.file] && store.pendingKey(entry);
    const anew = config.alwaysGenerateNewKeys || (newKey && reason.kind === "asked for") ||
      (reason.kind === "found" && reason.finding.kind === "revoked");
    const live = anew ? undefined : store.keyOf(entry);
    return await this.#requestFor(entry, [ofOrder, live].find(isUsable));
  }

  async #requestFor(entry: Entry, present?: string): Promise<Request> {
    const keyPem = present ?? await generateKey(wantedSpec(entry, this.options.config));
    return { keyPem, csr: await createCsr(keyPem, entry.line.names), isNew: present === undefined };
  }

  // ---- orders ----------------------------------------------------------------------------------------------------

  /** What has become of an order that an earlier run left; undefined where there is none, or it is of no use. */
  async #takeUp(
    line: Line,
    entry: Entry,
    client: AcmeClient,
    request: Promise<Request>,
  ): Promise<Issued | undefined> {
    const { config, store: { state }, context } = this.options;
    const order = state.orders[entry.file];
    if (order === undefined) return undefined;
    const age = context.now().getTime() - Date.parse(order.since);
    if (age < ORDER_LIFE_MS && order.account === accountName(config, client.account.key)) {
      try {
        const current = await client.getOrder(order.url);
        const issued = current.status === "pending" || current.status === "invalid"
          ? undefined
          : await this.#finish(line, entry, client, current, await request);
        const { finding } = entry;
        const present = "certificate" in finding ? finding.certificate.fingerprint : undefined;
        if (issued !== undefined && issued.certificate.fingerprint !== present) return issued;
      } catch (error) {
        if (!(error instanceof AcmeError) || !(error.isOrderLost || isRefusal(error))) throw error;
      }
    }
    this.#forgetOrder(entry);
  }

  /** An order whose names have all been authorized. */
  async #readyOrder(line: Line, entry: Entry, client: AcmeClient): Promise<Order> {
    const options = { profile: line.profile, replaces: this.#replaced(entry, client) };
    const order = await this.#underAccount(client, () => client.newOrder(line.names, options));
    return order.status === "pending" ? await this.#authorize(line, order, client) : order;
  }

  /** Identifier of the certificate that a new one replaces (RFC 9773 §5), where the same account ordered it. */
  #replaced(entry: Entry, client: AcmeClient): string | undefined {
    const { config, store: { state } } = this.options;
    const id = idOf(entry);
    if (id === undefined || !config.ari || client.directory.renewalInfo === undefined) return undefined;
    return state.renewals[id]?.account === accountName(config, client.account.key) ? id : undefined;
  }

  /** Answers the challenges of a pending order, and waits until the CA has found all of them right. */
  async #authorize(line: Line, order: Order, client: AcmeClient): Promise<Order> {
    const authorizations = await settled(order.authorizations.map((url) => client.getAuthorization(url)));
    let pending: readonly Authorization[] = authorizations.filter((one) => isPending(one, line));
    let current = order;
    do {
      // the CA is asked to check none before all are there: where one cannot be made so, the others vanish with it, and a CA
      // that was fetching them by then would count failures
      await using presented = await this.#challenges!.present(pending, client.account);
      const { answers, later } = presented;
      current = await this.#validated(order, answers, later.length === 0, client);
      pending = later;
    } while (pending.length > 0);
    return current;
  }

  /** The order once these challenges are found right, or, with the last of them, once it is no longer pending. */
  async #validated(order: Order, answers: Answers, areLast: boolean, client: AcmeClient): Promise<Order> {
    const { context } = this.options;
    const step = "validate the order";
    const later = (ms: number) => new Date(context.now().getTime() + ms);
    const respond = (open: Answers) =>
      settled(
        open.map(({ authorization, challenge }) => client.respondToChallenge(authorization, challenge)),
      );
    const isWrong = (await respond(answers)).includes(true);
    let open = answers;
    let responses = 1;
    let pause = isWrong ? WRONG_PAUSE_MS : areLast ? FIRST_PAUSE_MS : SOON_PAUSE_MS;
    let readAt = later(isWrong ? 0 : pause);
    for await (const current of client.watch(step, order, later(ORDER_DEADLINE_MS))) {
      if (current.status === "invalid") {
        const all = await settled(order.authorizations.map((url) => client.getAuthorization(url)));
        throw validationError(current, all);
      }
      if (current.status !== "pending") return current;
      if (context.now() < readAt) continue;
      open = (await settled(open.map((answer) => readAgain(answer, client))))
        .filter(({ authorization: { status } }) => status !== "valid");
      if (open.length === 0 && !areLast) return current;
      // found wrong, and to be found right if it is asked for again (RFC 8555 §8.2)
      const wrong = open.filter(({ challenge: { status, error } }) =>
        status === "pending" && error !== undefined
      );
      const failed = open.some(({ authorization: { status } }) => status !== "pending");
      if (failed || (wrong.length > 0 && responses === MOST_RESPONSES)) {
        throw validationError(current, open.map(({ authorization }) => authorization));
      }
      if (wrong.length > 0 && responses++ === 1) {
        const [error] = errorsOf(wrong.map(({ authorization }) => authorization));
        context.warn(`${error!.text}; the CA is asked to check it again`);
      }
      await respond(wrong);
      readAt = later(pause);
      pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
    }
    const errors = errorsOf(open.map(({ authorization }) => authorization)).map(({ text }) => text);
    const text = `order still pending after ${ORDER_DEADLINE_MS / 1000} s`;
    throw new AcmeError(step, [text, ...errors].join("; "), order.url, { isOrderLost: true });
  }

  /** Has an order issued that is ready, or that an earlier run has finalized, and fetches the certificate. */
  async #finish(
    line: Line,
    entry: Entry,
    client: AcmeClient,
    ready: Order,
    first: Request,
  ): Promise<Issued> {
    const { config, store, context } = this.options;
    const { orders } = store.state;
    const { file } = entry;
    const step = "issue the order";
    let [order, request] = [ready, first];
    // from here on a certificate may be made; until that is in its place, the order and its key are kept
    const since = orders[file]?.url === order.url ? orders[file].since : context.now().toISOString();
    orders[file] = { url: order.url, account: accountName(config, client.account.key), since };
    try {
      if (order.status === "ready") [order, request] = await this.#finalize(entry, client, order, request);
      const deadline = new Date(context.now().getTime() + ORDER_DEADLINE_MS);
      let polls = 0;
      for await (const polled of client.watch(step, order, deadline)) {
        order = polled;
        // a replica has said that it was finalized, and was wrong
        if (order.status === "ready" && ++polls % READY_POLLS === 0) {
          order = await client.finalizeOrder(order, request.csr.der).catch((error) => {
            if (isProblem(error, "orderNotReady")) return polled;
            throw error;
          });
        }
        if (order.status === "valid") return await this.#fetch(line, client, order, request);
        if (order.status !== "invalid") continue;
        const message = order.error
          ? describe(order.error)
          : "the order became invalid, and the CA gives no reason";
        throw new AcmeError(step, message, order.url, { problem: order.error, isOrderLost: true });
      }
      const text = `order still ${order.status} after ${
        ORDER_DEADLINE_MS / 1000
      } s; the next run goes on with it`;
      throw new AcmeError(step, text, order.url);
    } catch (error) {
      if (error instanceof AcmeError && error.isOrderLost) this.#forgetOrder(entry);
      else if (store.keyOf(entry) !== request.keyPem) await store.keepPendingKey(entry, request.keyPem);
      throw error;
    }
  }

  /** Finalizes an order, under a new key where the CA refuses the one that is there, which is never used again then. */
  async #finalize(
    entry: Entry,
    client: AcmeClient,
    order: Order,
    request: Request,
  ): Promise<[Order, Request]> {
    try {
      return [await client.finalizeOrder(order, request.csr.der), request];
    } catch (error) {
      if (!(error instanceof AcmeError) || !isRefusal(error)) throw error;
      const refusal = new AcmeError(error.step, error.message, error.url, { ...error, isOrderLost: true });
      // Let's Encrypt says badCSR of a key that it has blocked
      if (request.isNew || !isProblem(error, "badPublicKey", "badCSR")) throw refusal;
      const other = await this.#requestFor(entry);
      const finalized = await client.finalizeOrder(order, other.csr.der).catch(() => {
        throw refusal; // it was not the key
      });
      await this.options.store.revoke(publicKeyHash(request.keyPem));
      return [finalized, other];
    }
  }

  /** The certificate of a valid order, checked. */
  async #fetch(line: Line, client: AcmeClient, order: Order, { keyPem, csr }: Request): Promise<Issued> {
    const { context } = this.options;
    const received = await this.#chainOf(order, line, client);
    try {
      const { leaf, chainPem } = checkChain(received, line.names, keyPem, context.now());
      if (pemBlocks(chainPem).length === 1 && !leaf.selfSigned) {
        context.warn(`the CA sent no certificate of an issuer for ${line.names[0]}; clients may miss it`);
      }
      return { keyPem, csrPem: csr.pem, chainPem, certificate: leaf };
    } catch (error) {
      if (!(error instanceof ChainError)) throw error;
      const clock = error.isDated ? `, the CA's ${caTime(client, context.now())}` : "";
      throw new AcmeError("check the certificate", error.message + clock, order.url, { isOrderLost: true });
    }
  }

  /** The chain that leads to the preferred root, or the default one. */
  async #chainOf(order: Order, line: Line, client: AcmeClient): Promise<string> {
    const { config: { preferredChain }, context } = this.options;
    let first: string | undefined;
    let why = "";
    try {
      for await (const chain of client.downloadChains(order)) {
        first ??= chain;
        if (preferredChain === undefined || rootOf(chain) === preferredChain) return chain;
      }
    } catch (error) {
      // a certificate in hand is not given up for an alternate that cannot be had
      if (first === undefined || !(error instanceof AcmeError)) throw error;
      why = ` (${error.message})`;
    }
    const wanted = JSON.stringify(preferredChain);
    context.warn(`no chain of ${line.names[0]} leads to ${wanted}${why}: the default one is taken`);
    return first!;
  }

  #forgetOrder(entry: Entry): void {
    const { store } = this.options;
    if (store.state.orders[entry.file] === undefined) return;
    delete store.state.orders[entry.file];
    store.dropPendingKey(entry);
  }
}

// ---- the account's key -------------------------------------------------------------------------------------------

/**
 * The file of the account key. --test has one of its own: the two CAs may be provisioners of one that knows each key once
 * (step-ca), and the key of one is changed without the other.
 */
function accountKeyPath({ accountKey, mode }: Config): string {
  return mode === "test" ? `${accountKey}.test` : accountKey;
}

/** A key that the CA may or may not know yet. */
function newKeyPath(config: Config): string {
  return `${accountKeyPath(config)}.new`;
}

/**
 * The account key on disk; undefined where there is none yet. Until 0.1.0 both modes shared one: --test goes on with that
 * where it has an account under it. Throws AcmeError.
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

/** An account belongs to one CA and one key; its name in the state. */
function accountName({ directoryUrl }: Config, key: AccountKey): string {
  return `${directoryUrl} ${key.thumbprint}`;
}

/** The account that is remembered for the key on disk; undefined before the first run. */
export async function rememberedAccount(
  config: Config,
  state: State,
): Promise<Account | undefined> {
  const key = await readAccountKey(config, state);
  return key && state.accounts[accountName(config, key)];
}

// ---- keys, challenges, failures ----------------------------------------------------------------------------------

function wantedSpec({ keyType }: Entry, config: Config): KeySpec {
  return keyType === "rsa" ? { type: "rsa", bits: config.keyBitsRSA } : { type: "ec", curve: config.curve };
}

function isEqual(one: unknown, other: unknown): boolean {
  return JSON.stringify(one) === JSON.stringify(other);
}

/** The identifier of the certificate that is there (RFC 9773 §4.1). */
function idOf({ finding }: Entry): string | undefined {
  return "certificate" in finding ? finding.certificate.id : undefined;
}

function isPending({ name, status, url, challenges }: Authorization, line: Line): boolean {
  const step = "read an authorization";
  if (!line.names.includes(name)) {
    throw new AcmeError(step, `the CA asks for ${name}, which was not ordered`, url);
  }
  switch (status) {
    case "pending":
      return true;
    case "valid": // found right before, and remembered by the CA
      return false;
    case "invalid":
    case "deactivated":
    case "expired":
    case "revoked": {
      const errors = errorsOf([{ name, challenges }]).map(({ text }) => text);
      const text = [`the authorization of ${name} is ${status}`, ...errors].join("; ");
      throw new AcmeError(step, text, url, { isOrderLost: true });
    }
    default:
      return status satisfies never;
  }
}

/** A challenge as the CA now has it. */
async function readAgain(
  { authorization, challenge }: Answers[number],
  client: AcmeClient,
): Promise<Answers[number]> {
  const current = await client.getAuthorization(authorization.url);
  const own = current.challenges.find(({ url }) => url === challenge.url);
  return { authorization: current, challenge: own ?? challenge };
}

/** What the CA has found wrong with challenges, which says more than an order does. */
function errorsOf(authorizations: readonly Pick<Authorization, "name" | "challenges">[]) {
  return authorizations.flatMap(({ name, challenges }) =>
    challenges.flatMap(({ error }) =>
      error === undefined ? [] : [{ problem: error, text: `${name}: ${describe(error)}` }]
    )
  );
}

/** Why the names of an order could not be validated. */
function validationError({ url, error }: Order, authorizations: readonly Authorization[]): AcmeError {
  const errors = errorsOf(authorizations);
  const failed = authorizations.filter(({ status }) => status !== "valid" && status !== "pending");
  const message = errors.map(({ text }) => text).join("; ") || (error && describe(error)) ||
    failed.map(({ name, status }) => `${name}: ${status}, and the CA gives no reason`).join("; ") ||
    "the order became invalid, and the CA gives no reason";
  const problem = errors[0]?.problem ?? error;
  return new AcmeError("validate the order", message, url, { problem, isOrderLost: true });
}

/** Whether the CA has refused something for good, as far as that can be known. */
function isRefusal({ status = 0, isTransient }: AcmeError): boolean {
  return status >= 400 && status !== 429 && !isTransient;
}

/**
 * Whether the CA accepts no more orders from this account, whatever their names. The type of the problem does not say, so its
 * identifiers do, or the names in its detail, or the chapter of Let's Encrypt's documentation that it refers to
 * (https://letsencrypt.org/docs/rate-limits/).
 */
function limitsAccount(error: Error, names: readonly string[]): error is AcmeError {
  if (!isProblem(error, "rateLimited")) return false;
  const about = [error.problem!, ...error.problem!.subproblems];
  const chapter =
    /#(new-certificates-per|authorization-failures-per|consecutive-authorization-failures-per)-/;
  return !about.some(({ identifier, detail }) =>
    identifier !== undefined || chapter.test(detail) || names.some((name) => detail.includes(name))
  );
}

/**
 * What is remembered of a line that failed. What cost the CA an order, a validation or a certificate keeps the line
 * waiting; a connection that broke, an answer that made no sense or a disk that was full before does not.
 */
function failureAfter(
  before: Failure | undefined,
  error: Error,
  now: Date,
  { due }: Task,
  { shared = false, unkept = false },
): Failure {
  const count = (before?.count ?? 0) + 1;
  const refused = error instanceof AcmeError && (error.problem !== undefined || error.isOrderLost);
  const asked = error instanceof AcmeError ? error.retryAfter : undefined;
  const costly = unkept || refused || error instanceof ChallengeError || error instanceof CommandError;
  const retryAt = asked ?? (costly ? retryLineAt(count, now, expiryOf(due)) : undefined);
  return {
    count,
    since: before?.since ?? now.toISOString(),
    at: now.toISOString(),
    error: messageOf(error).split("\n")[0]!.slice(0, LONGEST_REMEMBERED),
    retryAt: retryAt?.toISOString(),
    ...(shared && { shared }),
  };
}

function wrongClock(client: AcmeClient, { directoryUrl }: Config, now: Date): AcmeError {
  const times = `this host's clock says ${now.toISOString()}, the CA's ${caTime(client, now)}`;
  return new AcmeError("issue certificates", times, directoryUrl);
}

/** The time by the CA's clock. */
function caTime({ aheadMs }: AcmeClient, now: Date): string {
  return new Date(now.getTime() - aheadMs).toISOString();
}

/** What is said of an error of the CA's: the step first. */
function messageOf(error: unknown): string {
  if (error instanceof AcmeError) return `cannot ${error.step}: ${error.message}`;
  return error instanceof Error ? error.message : String(error);
}
