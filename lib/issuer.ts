/** Issues the lines that are due: the account, the CA's limits, and what is remembered of each line. */

import { accountName, connect, type Connecting, register, rememberedAccount, rollOver } from "./account.ts";
import { type AcmeClient, AcmeError, limitsNames } from "./acme.ts";
import { ChallengeError, Challenges } from "./challenge.ts";
import type { Config } from "./config.ts";
import { type Context, limit } from "./context.ts";
import { CommandError, PrepareCommands } from "./hooks.ts";
import { issueLine, type Issuing, type KeyAndCsr } from "./issue.ts";
import { type Due, lastsUntil, retryLineAt, type Task } from "./plan.ts";
import type { Failure } from "./state.ts";
import type { Entry, Issued, Store } from "./store.ts";
import { ask, identified, toAsk, unidentified } from "./suggest.ts";
import { certificateDer, createCsr, generateKey } from "./x509.ts";

export { rememberedAccount };

/** How long the CA is left alone where it set a limit and did not say until when. */
const UNSTATED_HOLD_MS = 3_600_000;

/** What happens while lines are issued. */
export type IssueEvent =
  | { readonly kind: "account key"; readonly path: string; readonly how: "made" | "changed" }
  | { readonly kind: "task"; readonly task: Task }
  | { readonly kind: "no CA"; readonly error: Error; readonly tasks: readonly Task[] }
  | { readonly kind: "failed"; readonly due: readonly Due[]; readonly error: Error }
  | { readonly kind: "end"; readonly task: Task };

export interface IssuerOptions {
  readonly config: Config;
  readonly store: Store;
  readonly context: Context;
  readonly parallel: number;
  readonly newKey: boolean;
  readonly tell: (event: IssueEvent) => void;
}

export class Issuer {
  readonly #connecting: Connecting;
  #client: Promise<AcmeClient> | undefined;

  constructor(private readonly options: IssuerOptions) {
    const { config, store, context, tell } = options;
    this.#connecting = {
      config,
      store,
      world: context,
      madeKey: (path, how) => tell({ kind: "account key", path, how }),
      warn: context.warn,
    };
  }

  #connected(): Promise<AcmeClient> {
    return this.#client ??= connect(this.#connecting);
  }

  /** Asks the CA when it would like certificates to be renewed, as far as it may be asked again. Never fails a run. */
  async askRenewalWindows(inventory: readonly Entry[]): Promise<void> {
    const { config, store, context, parallel } = this.options;
    const certificates = identified(inventory, context.now());
    const nameless = unidentified(inventory, context.now());
    const asked = toAsk(certificates, store.state, config.directoryUrl, context.now());
    if (!config.ari || asked.length + nameless.length === 0) return;
    let client: AcmeClient;
    try {
      client = await this.#connected();
    } catch (error) {
      return context.warn(`cannot ask the CA when to renew: ${(error as Error).message}`);
    }
    if (client.directory.renewalInfo === undefined) return;
    const note = ({ line, keyType }: Entry, text: string) =>
      context.warn(`${line.names[0]} (${keyType}): ${text}`);
    for (const entry of nameless) {
      note(entry, "cannot ask when to renew: it does not name its authority's key; its dates decide");
    }
    let answers = true;
    const slot = limit(parallel);
    await Promise.all(asked.map((certificate) =>
      slot(async () => {
        if (!answers || context.signal.aborted) return;
        try {
          await ask(certificate, client, store.state, context.now(), context.random());
        } catch (error) {
          if (!answers) return;
          const decides = store.state.renewals[certificate.id]?.window === undefined
            ? "its dates decide"
            : "what the CA said before decides";
          note(certificate.entry, `${(error as Error).message}; ${decides}`);
          // a service that is down is not waited for once for every certificate; the next run asks about the others
          answers = !(error instanceof AcmeError && (error.passing || error.problem?.type === "rateLimited"));
        }
      })
    ));
    await store.saveState();
  }

  /** Issues every task, in their order, some at a time; `keep` puts a certificate in its place, `done` hears of each line. */
  async issueAll(
    tasks: readonly Task[],
    keep: (due: Due, issued: Issued, seconds: number) => Promise<void>,
    done: (task: Task) => void,
  ): Promise<void> {
    if (tasks.length === 0) return;
    const { config, store, context, parallel, tell } = this.options;
    // what the first lines need is made while the CA is reached for
    const early = new Map(
      tasks.slice(0, parallel).flatMap(({ due }) => due).map((due) => [due, this.#requestFor(due)]),
    );
    for (const request of early.values()) request.catch(() => {}); // heard by the line that needs it
    let client: AcmeClient;
    try {
      client = await this.#connected();
      await register(client, this.#connecting);
      await store.ensureWritable();
    } catch (error) {
      context.signal.throwIfAborted();
      tell({ kind: "no CA", error: error as Error, tasks });
      for (const task of tasks) this.#rememberFailure(task, error as Error, true);
      for (const task of tasks) done(task);
      return;
    }
    client.concurrency = Math.min(parallel, tasks.length);

    await using prepare = new PrepareCommands(context.warn);
    const account = accountName(config, client.key);
    const issuing: Issuing = {
      client,
      challenges: new Challenges(config, context, prepare, store),
      context,
      request: (due) => early.get(due) ?? this.#requestFor(due),
      replaces: ({ entry: { finding } }) => {
        const id = "certificate" in finding ? finding.certificate.id : undefined;
        const offered = config.ari && client.directory.renewalInfo !== undefined;
        return offered && id !== undefined && store.state.renewals[id]?.account === account ? id : undefined;
      },
      preferredChain: config.preferredChain,
    };
    const remember = async (due: Due, issued: Issued, seconds: number) => {
      const { id } = issued.certificate;
      const suggested = due.reason.kind === "renewal" && due.reason.rule === "ari";
      if (id !== undefined && config.ari) {
        const suggestedAt = context.now().toISOString();
        store.state.renewals[id] = { account, ...(suggested && { suggestedAt }) };
      }
      await keep(due, issued, seconds);
    };
    delete store.state.holds[config.directoryUrl];
    const slot = limit(parallel);
    await Promise.all(tasks.map((task) =>
      slot(async () => {
        if (context.signal.aborted) return;
        if (this.#heldUntil() === undefined) await this.#issueTask(task, issuing, remember);
        done(task);
      })
    ));
    context.signal.throwIfAborted();
    await register(client, this.#connecting); // the CA may have forgotten the account, and been told anew
  }

  async #issueTask(
    task: Task,
    issuing: Issuing,
    keep: (due: Due, issued: Issued, seconds: number) => Promise<void>,
  ): Promise<void> {
    const { context, tell, store } = this.options;
    tell({ kind: "task", task });
    const begun = context.now().getTime();
    const results = await Promise.allSettled(
      issueLine(task, issuing).map(async (promise, index) => {
        const issued = await promise;
        await keep(task.due[index]!, issued, (context.now().getTime() - begun) / 1000);
      }),
    );
    // an error that both key types share is told once
    const failures = new Map<Error, Due[]>();
    for (const [index, result] of results.entries()) {
      if (result.status === "fulfilled") continue;
      failures.set(result.reason, [...failures.get(result.reason) ?? [], task.due[index]!]);
    }
    const errors = [...failures.keys()];
    const waits = errors.length > 0 && this.#heldUntil() !== undefined &&
      errors.every((error) => limitsAccount(error, task.line.names));
    if (errors.length === 0) delete store.state.failures[task.due[0]!.entry.stem];
    else if (!waits && !context.signal.aborted) {
      for (const [error, due] of failures) tell({ kind: "failed", due, error });
      this.#rememberFailure(task, errors[0]!, false);
    }
    tell({ kind: "end", task });
  }

  /** Until when the CA wants no orders; undefined where it takes them. */
  #heldUntil(): Date | undefined {
    const { config, store, context } = this.options;
    const hold = store.state.holds[config.directoryUrl];
    return hold !== undefined && new Date(hold) > context.now() ? new Date(hold) : undefined;
  }

  /** Remembers why a line could not be issued, or until when the CA wants no orders at all. */
  #rememberFailure(task: Task, error: Error, shared: boolean): void {
    const { config, store, context } = this.options;
    const { holds, failures } = store.state;
    const { stem } = task.due[0]!.entry;
    const now = context.now();
    if (limitsAccount(error, task.line.names)) {
      const until = error.retryAfter ?? new Date(now.getTime() + UNSTATED_HOLD_MS);
      holds[config.directoryUrl] = until.toISOString();
    } else {
      failures[stem] = failureAfter(failures[stem], error, now, task, shared);
    }
  }

  /** The key that is there, unless each certificate shall have its own, or a new one; and its CSR. */
  async #requestFor({ entry, reason }: Due): Promise<KeyAndCsr> {
    const { config, store, newKey } = this.options;
    const anew = config.alwaysGenerateNewKeys || (newKey && reason.kind === "asked for") ||
      (reason.kind === "found" && reason.finding.kind === "revoked");
    const present = anew ? undefined : store.keyOf(entry);
    const keyPem = present ?? await generateKey(
      entry.keyType === "rsa"
        ? { type: "rsa", bits: config.keyBitsRSA }
        : { type: "ec", curve: config.curve },
    );
    return { keyPem, csr: await createCsr(keyPem, entry.line.names) };
  }

  /** Revokes a certificate; `reason` is a CRLReason. */
  async revoke(pem: string, reason: number, _keyPem?: string): Promise<void> {
    const client = await this.#connected();
    await register(client, this.#connecting);
    await client.revokeCertificate(certificateDer(pem), reason);
  }

  /** Gives the account a new key. */
  async rollover(): Promise<void> {
    await rollOver(this.#connecting);
  }
}

/** Whether the CA wants no more orders from this account, whatever their names. */
function limitsAccount(error: Error, names: readonly string[]): error is AcmeError {
  return error instanceof AcmeError && error.problem?.type === "rateLimited" &&
    !limitsNames(error.problem, names);
}

/**
 * What is remembered of a line that failed. What cost the CA an order or a validation keeps the line waiting; a
 * connection that broke, an answer that made no sense or a full disk does not.
 */
function failureAfter(
  before: Failure | undefined,
  error: Error,
  now: Date,
  { due }: Task,
  shared: boolean,
): Failure {
  const count = (before?.count ?? 0) + 1;
  const refused = error instanceof AcmeError && (error.problem !== undefined || error.spent);
  const asked = error instanceof AcmeError ? error.retryAfter : undefined;
  const costly = refused || error instanceof ChallengeError || error instanceof CommandError;
  const ends = due.map(({ entry }) => lastsUntil(entry)).filter((date) => date !== undefined);
  const notAfter = ends.length === 0 ? undefined : ends.reduce((a, b) => a < b ? a : b);
  const retryAt = asked ?? (costly ? retryLineAt(count, now, notAfter) : undefined);
  return {
    count,
    since: before?.since ?? now.toISOString(),
    at: now.toISOString(),
    error: error.message.split("\n")[0]!,
    retryAt: retryAt?.toISOString(),
    ...(shared && { shared }),
  };
}
