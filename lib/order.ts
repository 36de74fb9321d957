/**
 * Orders of one line of `domains`, from order to certificate (RFC 8555 §7.4): order, authorizations, challenges,
 * finalize, download.
 *
 * The names of a line are authorized once: its key types create their orders one after the other, and then go on side
 * by side. If the CA does not finish an order in time, the next run goes on with it: it is in the state, and its key on
 * disk. Both are written when lematt gives up; if it is killed before, the next run makes another order.
 */

import { accountName, type CaAccount } from "./account.ts";
import type { AcmeClient, Authorization, Order } from "./acme.ts";
import type { Challenges, Presented } from "./challenge.ts";
import type { Config, Line } from "./config.ts";
import { type Context, settled } from "./context.ts";
import { AcmeError, describe, isProblem } from "./http.ts";
import { DAY_MS, type Due, type Task } from "./renewal.ts";
import type { Entry, Issued, Store } from "./store.ts";
import {
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

/** A key and its CSR. */
export interface Request {
  readonly keyPem: string;
  readonly csr: { readonly der: Uint8Array; readonly pem: string };
  /** The key was made for this certificate. */
  readonly isNew: boolean;
}

export interface OrderOptions {
  readonly config: Config;
  readonly store: Store;
  readonly context: Context;
  /** Certificates of `--renew` get a new key. */
  readonly newKey: boolean;
}

type Answers = Presented["answers"];

const MINUTE_MS = 60_000;

/** How long an order may be validated or issued; Let's Encrypt needs seconds. */
const ORDER_DEADLINE_MS = 3 * MINUTE_MS;
/** Let's Encrypt's orders expire after a week. */
const ORDER_LIFE_MS = 7 * DAY_MS;
/**
 * Pauses before the authorizations of a pending order are read, since some CAs leave it pending after a failed
 * validation. The first is for CAs that report the failure in their answer to the response (step-ca, Caddy), the third
 * for challenges for which others wait. Each next pause is twice the last, up to the longest.
 */
const FAILED_PAUSE_MS = 1_500, FIRST_PAUSE_MS = 5_000, SOON_PAUSE_MS = 250, LONGEST_READ_PAUSE_MS = 8_000;
/** How often the CA is asked to validate a challenge that has failed: for 15 s. */
const MOST_RESPONSES = 4;
/** After so many polls that show an order still ready, it is finalized again; the first of them take a second. */
const READY_POLLS = 4;

/** The key and CSR of a certificate, made while the CA is waited for: the key on disk, or a new one. */
export async function requestFor(
  { entry, reason }: Due,
  { config, store, newKey }: OrderOptions,
): Promise<Request> {
  const wanted = JSON.stringify(wantedSpec(entry, config));
  const isUsable = (pem: string | undefined) =>
    pem !== undefined && JSON.stringify(keySpecOf(pem)) === wanted;
  const ofOrder = store.state.orders[entry.file] && store.pendingKey(entry);
  const mustBeNew = config.alwaysGenerateNewKeys || (newKey && reason.kind === "asked for") ||
    (reason.kind === "found" && reason.finding.kind === "revoked");
  const present = [ofOrder, mustBeNew ? undefined : store.keyOf(entry)].find(isUsable);
  return present === undefined
    ? await newRequest(entry, config)
    : { keyPem: present, csr: await createCsr(present, entry.line.names), isNew: false };
}

async function newRequest(entry: Entry, config: Config): Promise<Request> {
  const keyPem = await generateKey(wantedSpec(entry, config));
  return { keyPem, csr: await createCsr(keyPem, entry.line.names), isNew: true };
}

function wantedSpec({ keyType }: Entry, config: Config): KeySpec {
  return keyType === "rsa" ? { type: "rsa", bits: config.keyBitsRSA } : { type: "ec", curve: config.curve };
}

/** Orders at one CA. */
export class Orders {
  constructor(
    private readonly client: AcmeClient,
    private readonly account: CaAccount,
    private readonly challenges: Challenges,
    private readonly options: OrderOptions,
  ) {}

  /** The certificates of one line; one promise for each that is due, in that order. */
  issue({ due }: Task, requests: readonly Promise<Request>[]): Promise<Issued>[] {
    let authorized: Promise<unknown> = Promise.resolve();
    return due.map(async ({ entry }, index) => {
      const request = requests[index]!;
      await Promise.race([request, undefined]); // throws now if a key could not be read, before anything is ordered
      const issued = await this.#resume(entry, request);
      if (issued !== undefined) return issued;
      const ready = authorized.then(() => this.#readyOrder(entry));
      authorized = ready;
      return await this.#finish(entry, await ready, await request);
    });
  }

  /** Removes an order from the state, and its key. */
  forget(entry: Entry): void {
    const { store } = this.options;
    if (store.state.orders[entry.file] === undefined) return;
    delete store.state.orders[entry.file];
    store.dropPendingKey(entry);
  }

  /** See accountName() of account.ts. */
  get accountName(): string {
    return accountName(this.options.config, this.client.account.key);
  }

  /** The certificate of an order of an earlier run; undefined if there is none, or it cannot be finished. */
  async #resume(entry: Entry, request: Promise<Request>): Promise<Issued | undefined> {
    const { store: { state }, context } = this.options;
    const order = state.orders[entry.file];
    if (order === undefined) return undefined;
    const age = context.now().getTime() - Date.parse(order.since);
    if (age < ORDER_LIFE_MS && order.account === this.accountName) {
      try {
        const current = await this.client.getOrder(order.url);
        const issued = current.status === "pending" || current.status === "invalid"
          ? undefined
          : await this.#finish(entry, current, await request);
        const { finding } = entry;
        const present = "certificate" in finding ? finding.certificate.fingerprint : undefined;
        if (issued !== undefined && issued.certificate.fingerprint !== present) return issued;
      } catch (error) {
        if (!(error instanceof AcmeError) || !(error.isOrderLost || isRefusal(error))) throw error;
      }
    }
    this.forget(entry);
  }

  /** A new order whose names have all been authorized. */
  async #readyOrder(entry: Entry): Promise<Order> {
    const { line } = entry;
    const options = { profile: line.profile, replaces: this.#replaced(entry) };
    const order = await this.account.withAccount(
      this.client,
      () => this.client.newOrder(line.names, options),
    );
    return order.status === "pending" ? await this.#authorize(line, order) : order;
  }

  /** The identifier of the certificate that will be replaced (RFC 9773 §5), if this account ordered it. */
  #replaced(entry: Entry): string | undefined {
    const { config, store: { state } } = this.options;
    const id = certificateIdOf(entry);
    if (id === undefined || !config.ari || this.client.directory.renewalInfo === undefined) return undefined;
    return state.renewals[id]?.account === this.accountName ? id : undefined;
  }

  /** Presents the challenges of a pending order, and waits until all are valid. */
  async #authorize(line: Line, order: Order): Promise<Order> {
    const authorizations = await settled(
      order.authorizations.map((url) => this.client.getAuthorization(url)),
    );
    let pending: readonly Authorization[] = authorizations.filter((one) => isPending(one, line));
    let current = order;
    do {
      // The CA is asked after all are presented. If one fails, the others are removed; a CA that is already fetching
      // them would count failed validations.
      await using presented = await this.challenges.present(pending, this.client.account);
      const { answers, later } = presented;
      current = await this.#validate(order, answers, later.length === 0);
      pending = later;
    } while (pending.length > 0);
    return current;
  }

  /** Waits until these challenges are valid; with the last of them, until the order is no longer pending. */
  async #validate(order: Order, answers: Answers, areLast: boolean): Promise<Order> {
    const { client, options: { context } } = this;
    const step = "validate the order";
    const later = (ms: number) => new Date(context.now().getTime() + ms);
    const respond = (open: Answers) =>
      settled(
        open.map(({ authorization, challenge }) => client.respondToChallenge(authorization, challenge)),
      );
    const hasFailed = (await respond(answers)).includes(true);
    let open = answers;
    let responses = 1;
    let pause = hasFailed ? FAILED_PAUSE_MS : areLast ? FIRST_PAUSE_MS : SOON_PAUSE_MS;
    let readAt = later(hasFailed ? 0 : pause);
    for await (const current of client.watch(step, order, later(ORDER_DEADLINE_MS))) {
      if (current.status === "invalid") {
        const all = await settled(order.authorizations.map((url) => client.getAuthorization(url)));
        throw validationError(current, all);
      }
      if (current.status !== "pending") return current;
      if (context.now() < readAt) continue;
      open = (await settled(open.map((answer) => this.#readAgain(answer))))
        .filter(({ authorization: { status } }) => status !== "valid");
      if (open.length === 0 && !areLast) return current;
      // a pending challenge with an error can be retried by another response (RFC 8555 §8.2)
      const failed = open.filter(({ challenge: { status, error } }) =>
        status === "pending" && error !== undefined
      );
      const isOver = open.some(({ authorization: { status } }) => status !== "pending");
      if (isOver || (failed.length > 0 && responses === MOST_RESPONSES)) {
        throw validationError(current, open.map(({ authorization }) => authorization));
      }
      if (failed.length > 0 && responses++ === 1) {
        const [error] = errorsOf(failed.map(({ authorization }) => authorization));
        context.warn(`${error!.text}; the CA is asked to check it again`);
      }
      await respond(failed);
      readAt = later(pause);
      pause = Math.min(2 * pause, LONGEST_READ_PAUSE_MS);
    }
    const errors = errorsOf(open.map(({ authorization }) => authorization)).map(({ text }) => text);
    const text = `order still pending after ${ORDER_DEADLINE_MS / 1000} s`;
    throw new AcmeError(step, [text, ...errors].join("; "), order.url, { isOrderLost: true });
  }

  async #readAgain({ authorization, challenge }: Answers[number]): Promise<Answers[number]> {
    const current = await this.client.getAuthorization(authorization.url);
    const own = current.challenges.find(({ url }) => url === challenge.url);
    return { authorization: current, challenge: own ?? challenge };
  }

  /** Finalizes an order, unless an earlier run has, and downloads the certificate. */
  async #finish(entry: Entry, ready: Order, first: Request): Promise<Issued> {
    const { client, options: { store, context } } = this;
    const { orders } = store.state;
    const { file } = entry;
    const step = "issue the order";
    let [order, request] = [ready, first];
    // from here on the CA may issue; if the certificate does not get into place, the order and its key are kept
    const since = orders[file]?.url === order.url ? orders[file].since : context.now().toISOString();
    orders[file] = { url: order.url, account: this.accountName, since };
    try {
      if (order.status === "ready") [order, request] = await this.#finalize(entry, order, request);
      const deadline = new Date(context.now().getTime() + ORDER_DEADLINE_MS);
      let polls = 0;
      for await (const polled of client.watch(step, order, deadline)) {
        order = polled;
        // a replica reported it as finalized, and was wrong
        if (order.status === "ready" && ++polls % READY_POLLS === 0) {
          order = await client.finalizeOrder(order, request.csr.der).catch((error) => {
            if (isProblem(error, "orderNotReady")) return polled;
            throw error;
          });
        }
        if (order.status === "valid") return await this.#download(entry, order, request);
        if (order.status !== "invalid") continue;
        const message = order.error ? describe(order.error) : INVALID_ORDER;
        throw new AcmeError(step, message, order.url, { problem: order.error, isOrderLost: true });
      }
      const waited = `order still ${order.status} after ${ORDER_DEADLINE_MS / 1000} s`;
      throw new AcmeError(step, `${waited}; the next run goes on with it`, order.url);
    } catch (error) {
      if (error instanceof AcmeError && error.isOrderLost) this.forget(entry);
      else if (store.keyOf(entry) !== request.keyPem) await store.keepPendingKey(entry, request.keyPem);
      throw error;
    }
  }

  /** Finalizes an order. If the CA refuses the existing key and accepts a new one, the old one is never used again. */
  async #finalize(entry: Entry, order: Order, request: Request): Promise<[Order, Request]> {
    const { client, options: { config, store } } = this;
    try {
      return [await client.finalizeOrder(order, request.csr.der), request];
    } catch (error) {
      if (!(error instanceof AcmeError) || !isRefusal(error)) throw error;
      const refusal = new AcmeError(error.step, error.message, error.url, { ...error, isOrderLost: true });
      // Let's Encrypt sends badCSR for a key that it has blocked
      if (request.isNew || !isProblem(error, "badPublicKey", "badCSR")) throw refusal;
      const other = await newRequest(entry, config);
      const finalized = await client.finalizeOrder(order, other.csr.der).catch(() => {
        throw refusal; // it was not the key
      });
      await store.revoke(publicKeyHash(request.keyPem));
      return [finalized, other];
    }
  }

  /** Downloads the certificate of a valid order, with the chain to the preferred root or the default one. */
  async #download({ line }: Entry, order: Order, request: Request): Promise<Issued> {
    const { config: { preferredChain }, context } = this.options;
    let first: Issued | undefined;
    let why = "";
    try {
      for await (const chain of this.client.downloadChains(order)) {
        const issued = this.#checked(chain, line, order, request);
        first ??= issued;
        if (preferredChain === undefined || rootOf(issued.chainPem) === preferredChain) return issued;
      }
    } catch (error) {
      if (first === undefined || !(error instanceof AcmeError)) throw error; // else the default chain is enough
      why = ` (${error.message})`;
    }
    const wanted = JSON.stringify(preferredChain);
    context.warn(`no chain of ${line.names[0]} leads to ${wanted}${why}; using the default chain`);
    return first!;
  }

  #checked(received: string, line: Line, order: Order, { keyPem, csr }: Request): Issued {
    const { client, options: { context } } = this;
    try {
      const { leaf, chainPem } = checkChain(received, line.names, keyPem, context.now());
      if (pemBlocks(chainPem).length === 1 && !leaf.selfSigned) {
        context.warn(`the CA sent no intermediate certificate for ${line.names[0]}; clients may reject it`);
      }
      return { keyPem, csrPem: csr.pem, chainPem, certificate: leaf };
    } catch (error) {
      if (!(error instanceof ChainError)) throw error;
      const clock = error.isDated ? `, the CA's ${caTime(client, context.now())}` : "";
      throw new AcmeError("check the certificate", error.message + clock, order.url, { isOrderLost: true });
    }
  }
}

/** The time by the CA's clock. */
export function caTime({ aheadMs }: { readonly aheadMs: number }, now: Date): string {
  return new Date(now.getTime() - aheadMs).toISOString();
}

// ---- authorizations and errors -----------------------------------------------------------------------------------

const INVALID_ORDER = "the order became invalid, and the CA gives no reason";

function isPending({ name, status, url, challenges }: Authorization, line: Line): boolean {
  const step = "read an authorization";
  if (!line.names.includes(name)) {
    throw new AcmeError(step, `the CA asks for ${name}, which was not ordered`, url);
  }
  switch (status) {
    case "pending":
      return true;
    case "valid": // from an earlier order
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

/** The errors of challenges; they say more than that of the order. */
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
    INVALID_ORDER;
  const problem = errors[0]?.problem ?? error;
  return new AcmeError("validate the order", message, url, { problem, isOrderLost: true });
}

/** Whether a refusal is permanent, as far as is known. */
function isRefusal({ status = 0, isTransient }: AcmeError): boolean {
  return status >= 400 && status !== 429 && !isTransient;
}

/** The identifier of the certificate on disk (RFC 9773 §4.1), if it has one. */
export function certificateIdOf({ finding }: Entry): string | undefined {
  return "certificate" in finding ? finding.certificate.id : undefined;
}
