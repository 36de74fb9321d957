/**
 * Asks the CA when to renew (RFC 9773), and issues the lines of `domains` that are due, some at a time. Failures are put
 * into the state, with the time of the next attempt. Certificates are checked here, but put in place by the caller.
 */

import type { AccountOptions, CaAccount } from "./account.ts";
import type { AcmeClient } from "./acme.ts";
import { ChallengeError, Challenges } from "./challenge.ts";
import { type Context, limit, settled } from "./context.ts";
import { CommandError, PrepareCommands } from "./hooks.ts";
import { AcmeError, isProblem, messageOf } from "./http.ts";
import { caTime, certificateIdOf, type OrderOptions, Orders, type Request, requestFor } from "./order.ts";
import { DAY_MS, type Due, expiryOf, HOUR_MS, retryLineAt, type Task } from "./renewal.ts";
import type { Failure } from "./state.ts";
import type { Entry, Issued, Store } from "./store.ts";

export type IssueEvent =
  | { readonly kind: "task"; readonly task: Task }
  | { readonly kind: "no CA"; readonly error: Error; readonly tasks: readonly Task[] }
  | { readonly kind: "failed"; readonly due: readonly Due[]; readonly error: Error }
  | { readonly kind: "end"; readonly task: Task };

export interface IssuerOptions extends OrderOptions {
  /** Lines at a time. */
  readonly parallel: number;
  readonly emit: (event: IssueEvent) => void;
}

/** Puts a certificate in place. */
type Install = (due: Due, issued: Issued, seconds: number) => Promise<void>;

/** How long no orders are made if the CA limits them without a Retry-After. */
const UNSTATED_HOLD_MS = HOUR_MS;
/** Characters of an error in the state, and so in alerts; a CA may write a sentence for each of a hundred names. */
const LONGEST_REMEMBERED = 2_000;
/** With a clock that is more wrong, certificates seem due that are not, and orders for them use up the CA's limits. */
const MOST_SKEW_MS = DAY_MS;

/** Issues lines by one account. */
export class Issuer {
  constructor(private readonly account: CaAccount, private readonly options: IssuerOptions) {}

  /** Issues every task, in their order. `done` is called when a line is issued or has failed. */
  async issueAll(tasks: readonly Task[], install: Install, done: (task: Task) => void): Promise<void> {
    if (tasks.length === 0) return;
    const { config, context, parallel, emit } = this.options;
    await using prepare = new PrepareCommands(context);
    let noCa: Error | undefined;
    const opened = this.#open(prepare).catch((error) => {
      noCa = error;
    });
    const slot = limit(parallel);
    await Promise.all(tasks.map((task) =>
      slot(async () => {
        if (context.signal.aborted || noCa !== undefined) return;
        const requests = task.due.map((due) => requestFor(due, this.options));
        for (const request of requests) request.catch(() => {}); // awaited later
        const orders = await opened;
        if (orders === undefined) return;
        const hold = this.options.store.state.holds[config.directoryUrl];
        const isLimited = hold !== undefined && new Date(hold) > context.now();
        if (!isLimited) await this.#issueTask(task, orders, requests, install);
        done(task);
      })
    ));
    context.signal.throwIfAborted();
    if (noCa === undefined) return;
    emit({ kind: "no CA", error: noCa, tasks });
    for (const task of tasks) this.#rememberFailure(task, noCa, { shared: true });
    for (const task of tasks) done(task);
  }

  async #open(prepare: PrepareCommands): Promise<Orders> {
    const { account, options } = this;
    const { config, store, context } = options;
    // both to their end: nothing goes on after a run, without the lock
    await settled<unknown>([store.ensureWritable(), account.connect()]);
    const client = await account.open();
    if (Math.abs(client.aheadMs) > MOST_SKEW_MS) {
      const now = context.now();
      const times = `this host's clock says ${now.toISOString()}, the CA's ${caTime(client, now)}`;
      throw new AcmeError("issue certificates", times, config.directoryUrl);
    }
    delete store.state.holds[config.directoryUrl];
    return new Orders(client, account, new Challenges(config, context, prepare, store), options);
  }

  /** Issues one line, and installs its certificates. */
  async #issueTask(
    task: Task,
    orders: Orders,
    requests: readonly Promise<Request>[],
    install: Install,
  ): Promise<void> {
    const { store, context, emit } = this.options;
    emit({ kind: "task", task });
    const begun = context.now().getTime();
    let isNotInstalled = false; // a certificate was issued, and could not be installed
    const results = await Promise.allSettled(
      orders.issue(task, requests).map(async (promise, index) => {
        const due = task.due[index]!;
        const issued = await promise;
        this.#rememberRenewal(due, issued, orders.accountName);
        try {
          await install(due, issued, (context.now().getTime() - begun) / 1000);
        } catch (error) {
          isNotInstalled = true;
          await store.keepPendingKey(due.entry, issued.keyPem).catch(() => {}); // the disk may be full
          throw error;
        }
        orders.forget(due.entry);
      }),
    );
    // an error that both key types share is reported once
    const failures = new Map<Error, Due[]>();
    for (const [index, result] of results.entries()) {
      if (result.status === "fulfilled") continue;
      failures.set(result.reason, [...failures.get(result.reason) ?? [], task.due[index]!]);
    }
    const [first] = failures.keys();
    if (first === undefined) delete store.state.failures[task.due[0]!.entry.stem];
    else if (!context.signal.aborted) {
      const isLimited = [...failures.keys()].every((error) => limitsAccount(error, task.line.names));
      for (const [error, due] of isLimited ? [] : failures) emit({ kind: "failed", due, error });
      this.#rememberFailure(task, first, { isNotInstalled });
    }
    emit({ kind: "end", task });
  }

  /** Puts into the state why a line failed, or until when the CA accepts no orders at all. */
  #rememberFailure(task: Task, error: Error, how: { shared?: boolean; isNotInstalled?: boolean }): void {
    const { config, store: { state: { holds, failures } }, context } = this.options;
    const { stem } = task.due[0]!.entry;
    if (limitsAccount(error, task.line.names)) {
      const until = error.retryAfter ?? new Date(context.now().getTime() + UNSTATED_HOLD_MS);
      holds[config.directoryUrl] = until.toISOString();
    } else {
      failures[stem] = failureAfter(failures[stem], error, context.now(), task, how);
    }
  }

  /** Puts into the state which account ordered a certificate, and whether the CA had suggested it. */
  #rememberRenewal({ reason }: Due, { certificate: { id } }: Issued, account: string): void {
    const { config, store: { state }, context } = this.options;
    if (id === undefined || !config.ari) return;
    const isSuggested = reason.kind === "renewal" && reason.rule === "ari";
    state.renewals[id] = {
      ...state.renewals[id],
      account,
      ...(isSuggested && { suggestedAt: context.now().toISOString() }),
    };
  }
}

/**
 * Whether the CA limits all orders of this account, not those of these names. The type of the problem does not say, but its
 * identifiers do, or names in its detail, or the section of Let's Encrypt's documentation that it links to
 * (https://letsencrypt.org/docs/rate-limits/).
 */
function limitsAccount(error: Error, names: readonly string[]): error is AcmeError {
  if (!isProblem(error, "rateLimited")) return false;
  const about = [error.problem!, ...error.problem!.subproblems];
  const section =
    /#(new-certificates-per|authorization-failures-per|consecutive-authorization-failures-per)-/;
  return !about.some(({ identifier, detail }) =>
    identifier !== undefined || section.test(detail) || names.some((name) => detail.includes(name))
  );
}

/**
 * The failure of a line in the state. The line waits if the attempt may have cost the CA an order, a validation or a
 * certificate; after a broken connection, an unusable answer or a full disk the next run tries again.
 */
function failureAfter(
  before: Failure | undefined,
  error: Error,
  now: Date,
  { due }: Task,
  { shared = false, isNotInstalled = false },
): Failure {
  const count = (before?.count ?? 0) + 1;
  const isRefused = error instanceof AcmeError &&
    (error.problem !== undefined || error.isOrderLost === true);
  const isCostly = isNotInstalled || isRefused || error instanceof ChallengeError ||
    error instanceof CommandError;
  const retryAfter = error instanceof AcmeError ? error.retryAfter : undefined;
  const retryAt = retryAfter ?? (isCostly ? retryLineAt(count, now, expiryOf(due)) : undefined);
  return {
    count,
    since: before?.since ?? now.toISOString(),
    at: now.toISOString(),
    error: messageOf(error).split("\n")[0]!.slice(0, LONGEST_REMEMBERED),
    retryAt: retryAt?.toISOString(),
    ...(shared && { shared }),
  };
}

// ---- renewal information (RFC 9773) -------------------------------------------------------------------

/** RFC 9773 §4.3.2: bounds of Retry-After. Its default is ours (the RFC's is six hours): runs every six hours meet it. */
const SOONEST_ASK_MS = 60_000, LATEST_ASK_MS = DAY_MS, USUAL_ASK_MS = 5 * HOUR_MS;

/**
 * Asks for the renewal window of each certificate, unless it is too early to ask again, and puts a random time within it in
 * the state. Errors are warnings: then the earlier window or the dates of the certificate decide.
 */
export async function askRenewalWindows(
  inventory: readonly Entry[],
  account: CaAccount,
  { config, store, context, parallel }: AccountOptions,
): Promise<void> {
  const { state } = store;
  const now = context.now();
  const without = state.withoutRenewalInfo[config.directoryUrl];
  if (!config.ari || (without !== undefined && now.getTime() - Date.parse(without) < DAY_MS)) return;
  const valid = inventory.filter(({ finding }) =>
    finding.kind === "present" && finding.certificate.notAfter > now
  );
  const nameless = valid.filter((entry) => certificateIdOf(entry) === undefined);
  const due = valid.filter((entry) => {
    const id = certificateIdOf(entry);
    const { account: orderedBy, askAt } = state.renewals[id ?? ""] ?? {};
    const isOurs = orderedBy === undefined || orderedBy.startsWith(`${config.directoryUrl} `); // not another CA's
    return id !== undefined && isOurs && !(new Date(askAt ?? 0) > now);
  });
  if (due.length + nameless.length === 0) return;
  let client: AcmeClient;
  try {
    client = await account.connect(true);
  } catch (error) {
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
    warn(entry, "cannot ask when to renew: it has no authority key identifier; its dates decide");
  }
  let isUp = true;
  const slot = limit(parallel);
  await Promise.all(due.map((entry) =>
    slot(async () => {
      if (!isUp || context.signal.aborted) return;
      const id = certificateIdOf(entry)!;
      try {
        await askRenewalWindow(id, client, store, context);
      } catch (error) {
        if (!isUp || context.signal.aborted) return;
        const isKnown = state.renewals[id]?.window !== undefined;
        warn(entry, `${messageOf(error)}; ${isKnown ? "the earlier answer decides" : "its dates decide"}`);
        // a service that is down is not asked about every certificate; the next run does
        isUp = !(error instanceof AcmeError && error.isTransient) && !isProblem(error, "rateLimited");
      }
    })
  ));
  await store.saveState();
}

/** Throws AcmeError; the state has the time of the next request then, and keeps the earlier window. */
async function askRenewalWindow(
  id: string,
  client: AcmeClient,
  { state }: Store,
  context: Context,
): Promise<void> {
  const renewal = state.renewals[id] ??= {};
  const later = (ms: number) => new Date(context.now().getTime() + ms).toISOString();
  renewal.askAt = later(USUAL_ASK_MS);
  const { start, end, explanationUrl, retryAfter } = await client.renewalInfo(id);
  const wait = retryAfter === undefined ? USUAL_ASK_MS : retryAfter.getTime() - context.now().getTime();
  renewal.askAt = later(Math.min(Math.max(wait, SOONEST_ASK_MS), LATEST_ASK_MS));
  const window = { start: start.toISOString(), end: end.toISOString() };
  // drawn once for each window: drawn in every run, the times would gather at its end
  const drawn = renewal.window?.start === window.start && renewal.window.end === window.end
    ? renewal.window.at
    : new Date(start.getTime() + context.random() * (end.getTime() - start.getTime())).toISOString();
  renewal.window = { ...window, at: drawn, explanationUrl };
}
