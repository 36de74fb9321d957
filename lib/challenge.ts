/**
 * Makes challenges answerable and cleans up after them: http-01 (RFC 8555 §8.3) by files in the drop directory, dns-01
 * (§8.4) by the commands of a section, dns-persist-01 (draft-ietf-acme-dns-persist-01) by a record that stays.
 *
 * Tokens reach this file checked for base64url (acme.ts), so they can be file names. What is published is noted first;
 * the next run removes what a run that was cut off could not.
 */

import defer * as nodeCrypto from "node:crypto";
import { basename, join } from "node:path";
import { type Authorization, type Challenge, keyAuthorization } from "./acme.ts";
import { challengeOf, type ChallengeType, type Config, type Section, sectionsOf } from "./config.ts";
import { type Context, limit, settled, within } from "./context.ts";
import { PrepareCommands, runCommand } from "./hooks.ts";
import type { AccountKey } from "./http.ts";
import { isIP } from "./names.ts";
import type { Records, Verdict } from "./selfcheck.ts";

/** A challenge that could not be made answerable; nothing was asked of the CA. */
export class ChallengeError extends Error {
  override readonly name = "ChallengeError";
}

/** Challenges that the CA can check until this is disposed of. */
export interface Presented extends AsyncDisposable {
  readonly answers: readonly { readonly authorization: Authorization; readonly challenge: Challenge }[];
  /**
   * To be presented when those have been validated and disposed of: their TXT record is in use, and its provider may keep
   * one value a name. Never all of them.
   */
  readonly later: readonly Authorization[];
}

/** What is published and has to be removed: a file in the drop directory, or the value that proves a name by dns-01. */
export type Published = { readonly token: string } | { readonly name: string; readonly value: string };

/** The store: what is published is in its state before it is, in case that the run is killed. */
interface Journal {
  readonly state: { published: Published[] };
  saveState(): Promise<void>;
}

/** An authorization with the one of its challenges that the configuration wants. */
interface Wanted {
  readonly authorization: Authorization;
  readonly challenge: Challenge;
  readonly name: string;
  /** The key authorization of http-01, the TXT value of dns-01. */
  readonly content: string;
  /** Of dns-01. */
  readonly record?: string;
  readonly published?: Published;
}

/** How long a file of http-01 is waited for; `prepare` commands make it visible by ssh, in a second or two. */
const HTTP_WAIT_SECONDS = 30;
/** One self-check: two tries of a resolver take 10 s (resolv.conf(5)). */
const CHECK_SECONDS = 15;
/** Pauses between self-checks: of a web server, and of name servers, which answer from caches for a while. */
const HTTP_PAUSE_MS = 250;
const DNS_PAUSE_MS = 2_000;
/** Names that `--check --challenges` checks at once. */
const MOST_CHECKS = 20;
/** A file name in the drop directory, RFC 8555 §8.3. */
const TOKEN = /^[A-Za-z0-9_-]+$/;

/** Answers challenges as the configuration says. */
export class Challenges {
  /** TXT record -> settles when the line that has values there has removed them. */
  readonly #inUse = new Map<string, Promise<void>>();
  readonly #oneHook = limit(1);
  /** What could not be removed, and stays for the next run. */
  readonly #left = new Set<Published>();

  constructor(
    private readonly config: Config,
    private readonly context: Context,
    private readonly prepare: PrepareCommands,
    private readonly journal: Journal,
  ) {}

  /**
   * Makes the configured challenges answerable, and makes sure of it: of all authorizations but those that are `later`.
   * Throws ChallengeError or CommandError where one cannot be; then none is.
   */
  async present(
    authorizations: readonly Authorization[],
    account: { readonly key: AccountKey; readonly url: string },
  ): Promise<Presented> {
    const { state } = this.journal;
    const all = authorizations.map((authorization) => this.#wanted(authorization, account.key));
    await using stack = new AsyncDisposableStack();
    const now = await this.#claim(all, stack);
    const entries = now.flatMap(({ published }) => published ?? []);
    state.published.push(...entries);
    stack.defer(() => {
      state.published = state.published.filter((entry) => !entries.includes(entry) || this.#left.has(entry));
    });
    await this.journal.saveState();

    const groups = Map.groupBy(now, ({ record, authorization }) => record ?? authorization.url);
    const displaced = await settled([...groups.values()].map(async (group) => {
      const [wanted] = group as [Wanted];
      if (wanted.record !== undefined) return await this.#presentRecords(wanted.record, group, stack);
      if (wanted.published !== undefined) await this.#presentFile(wanted, stack);
      else await this.#checkPersistentRecord(wanted, account.url);
      return [];
    }));
    const answers = now.filter((wanted) => !displaced.flat().includes(wanted));
    const later = all.filter((wanted) => !answers.includes(wanted)).map(({ authorization }) => authorization);
    const ready = stack.move();
    return { answers, later, [Symbol.asyncDispose]: () => ready.disposeAsync() };
  }

  #wanted(authorization: Authorization, key: AccountKey): Wanted {
    const { name, challenges } = authorization;
    const wanted = challengeOf(this.config, name);
    const challenge = challenges.find(({ type }) => type === wanted);
    if (challenge === undefined || (challenge.token === "" && wanted !== "dns-persist-01")) {
      const offered = challenges.map(({ type }) => type).join(", ");
      throw new ChallengeError(`the CA does not offer ${wanted} for ${name}, only ${offered || "nothing"}`);
    }
    const { token } = challenge;
    const content = keyAuthorization(token, key);
    switch (wanted) {
      case "http-01":
        return { authorization, challenge, name, content, published: { token } };
      case "dns-01": {
        const value = nodeCrypto.createHash("sha256").update(content).digest("base64url");
        const published = { name, value };
        return { authorization, challenge, name, content: value, record: recordOf(name), published };
      }
      case "dns-persist-01":
        return { authorization, challenge, name, content };
    }
  }

  /**
   * Those whose record is free, which it is not then until the stack is disposed of; waits until there is one. No line has
   * a record while it waits for another, so that lines never wait for each other.
   */
  async #claim(all: readonly Wanted[], stack: AsyncDisposableStack): Promise<readonly Wanted[]> {
    const shared = (name: string) => dnsSections(this.config, name).every(({ dnsParallel }) => dnsParallel);
    for (;;) {
      const claimed = new Set<string>();
      const free = all.filter(({ record, name }) => {
        if (record === undefined || shared(name)) return true;
        // without a self-check nobody sees whether the second value displaces the first
        if (this.#inUse.has(record) || (this.config.preflight === "no" && claimed.has(record))) return false;
        claimed.add(record);
        return true;
      });
      for (const record of claimed) {
        const { promise, resolve } = Promise.withResolvers<void>();
        this.#inUse.set(record, promise);
        stack.defer(() => {
          this.#inUse.delete(record);
          resolve();
        });
      }
      if (free.length > 0 || all.length === 0) return free;
      await within(this.context.signal, Promise.race(all.map(({ record }) => this.#inUse.get(record!))));
    }
  }

  async #presentFile(
    { name, challenge: { token }, content, published }: Wanted,
    stack: AsyncDisposableStack,
  ): Promise<void> {
    const { config, context } = this;
    const failed = await startPrepare(name, config, this.prepare, stack);
    stack.defer(() => this.#remove(published!));
    dropFile(join(config.challengeDropDir!, token), content);
    if (failed === undefined) return;
    const check = fileCheck(name, token, content, context, config.preflight === "warn" ? undefined : failed);
    await this.#selfCheck(name, HTTP_WAIT_SECONDS, HTTP_PAUSE_MS, check);
  }

  /** Returns those whose value the last one has displaced, for the provider keeps one a name. */
  async #presentRecords(
    record: string,
    group: readonly Wanted[],
    stack: AsyncDisposableStack,
  ): Promise<readonly Wanted[]> {
    const { config, context } = this;
    const placed = new Set<Wanted>();
    stack.defer(async () => {
      for (const { published } of placed) await this.#remove(published!);
    });
    for (const wanted of group) {
      placed.add(wanted);
      await runHooks(
        "dnsPresent",
        wanted.name,
        wanted.content,
        config,
        context,
        this.#oneHook,
        context.signal,
      );
    }
    const last = group.at(-1)!;
    let displaced: readonly Wanted[] = [];
    const check = recordsCheck(record, context, (records) => {
      const isAt = ({ content }: Wanted) =>
        records.answers.filter(({ texts }) => texts.includes(content)).length;
      const everywhere = records.answers.length;
      displaced = isAt(last) === everywhere ? group.filter((wanted) => isAt(wanted) === 0) : [];
      const missing = group.find((wanted) => isAt(wanted) < everywhere && !displaced.includes(wanted));
      if (missing === undefined) return undefined;
      const fault = records.fault((text) => text === missing.content);
      return `${fault}; if the CA sees another DNS than this host, set preflight: warn`;
    });
    await this.#selfCheck(last.name, config.dnsWaitSeconds, DNS_PAUSE_MS, check);
    for (const wanted of displaced) placed.delete(wanted); // many a hook would remove what has taken its place
    return displaced;
  }

  async #checkPersistentRecord({ name, challenge }: Wanted, accountUrl: string): Promise<void> {
    const uri = challenge.accountUri ?? accountUrl;
    const check = persistentCheck(name, challenge.issuerDomainNames, uri, this.context);
    await this.#selfCheck(name, 0, DNS_PAUSE_MS, check);
  }

  /** Checks until nothing is wrong or time is up; then `preflight` says whether that stops the line. */
  async #selfCheck(name: string, seconds: number, pauseMs: number, check: Check): Promise<void> {
    const { config: { preflight }, context } = this;
    if (preflight === "no") return;
    const { fault, note } = await untilRight(seconds, pauseMs, check, context);
    const what = `self-check of the challenge for ${name}`;
    if (fault !== undefined && preflight !== "warn") throw new ChallengeError(`${what} failed: ${fault}`);
    if (fault !== undefined) context.warn(`${what} failed: ${fault}`);
    else if (note !== undefined) context.warn(`${what}: ${note}`);
  }

  async #remove(entry: Published): Promise<void> {
    if (!await unpublish(entry, this.config, this.context, this.#oneHook)) this.#left.add(entry);
  }
}

/** Removes what runs before this one were killed over. */
export async function removeLeftovers(config: Config, context: Context, store: Journal): Promise<void> {
  const { published } = store.state;
  if (published.length === 0) return;
  store.state.published = [];
  for (const entry of published) {
    const isRemoved = await unpublish(entry, config, context, limit(1));
    // a file can be tried again, a record may never have been placed
    if (!isRemoved && "token" in entry) store.state.published.push(entry);
  }
  await store.saveState();
}

// ---- checking without a CA ---------------------------------------------------------------------------------------

/** One name as `--check --challenges` sees it. */
export interface ChallengeFinding {
  readonly name: string;
  readonly challenge: ChallengeType;
  /** Why the CA would not find a challenge of it. */
  readonly problem?: string;
  /** What could not be seen fully. */
  readonly note?: string;
}

/**
 * Whether the CA would find the challenges of all names: fetches a file in the drop directory through each name of http-01,
 * with its `prepare` commands running; looks up the records of dns-persist-01, and the name servers of dns-01, whose hooks
 * are not run. Asks no CA. `account`: as far as it is known.
 */
export async function checkChallenges(
  config: Config,
  context: Context,
  account?: { readonly url: string; readonly issuers: readonly string[] },
): Promise<ChallengeFinding[]> {
  await using prepare = new PrepareCommands(context.warn, (text) => context.onOutput?.(text, "prepare"));
  const atOnce = limit(MOST_CHECKS);
  const names = [...new Set(config.lines.flatMap(({ names }) => names))];
  return await settled(names.map((name) =>
    atOnce(async () => {
      context.signal.throwIfAborted();
      const challenge = challengeOf(config, name);
      const { fault, note } = await checkName(name, challenge, config, context, prepare, account);
      return { name, challenge, problem: fault, note };
    })
  ));
}

async function checkName(
  name: string,
  challenge: ChallengeType,
  config: Config,
  context: Context,
  prepare: PrepareCommands,
  account?: { readonly url: string; readonly issuers: readonly string[] },
): Promise<Verdict> {
  switch (challenge) {
    case "http-01": {
      const { challengeDropDir } = config;
      const [token, content] = [16, 32].map((size) => nodeCrypto.randomBytes(size).toString("hex")) as [
        string,
        string,
      ];
      const path = join(challengeDropDir!, `lematt-check-${token}`);
      await using stack = new AsyncDisposableStack();
      try {
        const failed = await startPrepare(name, config, prepare, stack);
        stack.defer(() => removeIfThere(path));
        dropFile(path, content);
        const seconds = failed === undefined ? 0 : HTTP_WAIT_SECONDS;
        const check = fileCheck(name, basename(path), content, context, failed);
        const { fault, note } = await untilRight(seconds, HTTP_PAUSE_MS, check, context);
        return { fault: fault && `not served from ${challengeDropDir}: ${fault}`, note };
      } catch (error) {
        context.signal.throwIfAborted();
        return { fault: (error as Error).message }; // of a prepare command, or of the drop directory
      }
    }
    case "dns-01":
      return await untilRight(0, 0, recordsCheck(recordOf(name), context, () => undefined), context);
    case "dns-persist-01": {
      if (account === undefined) return { fault: "its record names the account, which the first run makes" };
      const check = persistentCheck(name, account.issuers, account.url, context);
      return await untilRight(0, 0, check, context);
    }
  }
}

// ---- parts -------------------------------------------------------------------------------------------------------

/** One self-check, which ends with the signal. */
type Check = (signal: AbortSignal) => Promise<Verdict>;

/** Checks again and again until nothing is wrong or `seconds` are over; with 0 once. */
async function untilRight(
  seconds: number,
  pauseMs: number,
  check: Check,
  context: Context,
): Promise<Verdict> {
  const deadline = context.now().getTime() + seconds * 1000;
  const left = () => deadline - context.now().getTime();
  let seen: Verdict | undefined;
  for (;;) {
    const most = CHECK_SECONDS * 1000;
    const cut = AbortSignal.timeout(seconds === 0 ? most : Math.max(0, Math.min(left(), most)));
    const verdict = await check(AbortSignal.any([context.signal, cut]));
    context.signal.throwIfAborted();
    if (verdict.fault === undefined) return verdict;
    // a check that was cut short says less than one that was not
    if (!cut.aborted) seen = verdict;
    if (left() <= pauseMs) return seen ?? verdict;
    await context.sleep(pauseMs);
  }
}

/** Fetches the file of a token through a name. Where `failed` aborts, for a prepare command has, a fault is that. */
function fileCheck(
  name: string,
  token: string,
  content: string,
  context: Context,
  failed?: AbortSignal,
): Check {
  const url = `http://${isIP(name) === 6 ? `[${name}]` : name}/.well-known/acme-challenge/${token}`;
  return async (signal) => {
    const { checkFile } = await import("./selfcheck.ts"); // with http and TLS, which most runs do without
    const verdict = await checkFile(url, content, context, signal);
    if (verdict.fault !== undefined) failed?.throwIfAborted();
    return verdict;
  };
}

function recordsCheck(
  record: string,
  context: Context,
  judge: (records: Records) => string | undefined,
): Check {
  return async (signal) => {
    const { checkRecords } = await import("./selfcheck.ts");
    return await checkRecords(record, judge, context, signal);
  };
}

/** Starts the `prepare` commands of a name; the signal aborts when one has failed. Undefined where there are none. */
async function startPrepare(
  name: string,
  config: Config,
  prepare: PrepareCommands,
  stack: AsyncDisposableStack,
): Promise<AbortSignal | undefined> {
  const failed: AbortSignal[] = [];
  for (const command of sectionsOf(config, name).flatMap((section) => section.prepare)) {
    failed.push(stack.use(await prepare.start(command, { DOMAIN: name }, config.mode)).failed);
  }
  return failed.length > 0 ? AbortSignal.any(failed) : undefined;
}

/** Where dns-01 looks for the value of a name. */
function recordOf(name: string): string {
  return `_acme-challenge.${name.replace(/^\*\./, "")}`;
}

/** The sections whose commands prove a name by dns-01. */
function dnsSections(config: Config, name: string): readonly Section[] {
  return sectionsOf(config, name).filter(({ challenge }) => challenge === "dns-01");
}

/** Runs the hooks of all sections of a name, within `oneHook` where they may not run side by side. */
async function runHooks(
  key: "dnsPresent" | "dnsCleanup",
  name: string,
  value: string,
  config: Config,
  { onOutput }: Context,
  oneHook: ReturnType<typeof limit>,
  signal?: AbortSignal,
): Promise<void> {
  const values = { DOMAIN: name, RECORD: recordOf(name), VALUE: value };
  for (const section of dnsSections(config, name)) {
    const options = {
      ...{ mode: config.mode, timeoutSeconds: config.commandTimeoutSeconds, signal },
      onOutput: (text: string) => onOutput?.(text, `[${section.name}]`),
    };
    const run = async () => {
      for (const command of section[key]) await runCommand(command, values, options);
    };
    await (section.dnsParallel ? run() : oneHook(run));
  }
}

/**
 * The record by which dns-persist-01 proves a name for as long as it stands: an issue-value of RFC 8659 that names CA and
 * account (draft-ietf-acme-dns-persist-01 §3). `accountUri` is the challenge's, or the account's URL.
 */
export function persistentRecord(
  name: string,
  issuerDomainName: string,
  accountUri: string,
): { readonly record: string; readonly value: string } {
  const wildcard = name.startsWith("*.");
  return {
    record: `_validation-persist.${wildcard ? name.slice(2) : name}`,
    value: `${issuerDomainName}; accounturi=${accountUri}${wildcard ? "; policy=wildcard" : ""}`,
  };
}

function persistentCheck(
  name: string,
  issuers: readonly string[],
  accountUri: string,
  context: Context,
): Check {
  const { record, value } = persistentRecord(name, issuers[0] ?? "", accountUri);
  return recordsCheck(record, context, (records) => {
    const fault = records.fault((text) => isPersistent(text, name, issuers, accountUri, context.now()));
    return fault && `${fault}; place this one: ${record}. IN TXT "${value}"`;
  });
}

/** Whether a record that was found is such a one, which may also say until when it holds. */
function isPersistent(
  text: string,
  name: string,
  issuers: readonly string[],
  accountUri: string,
  now: Date,
): boolean {
  const [issuer = "", ...parameters] = text.split(";").map((part) => part.trim());
  const values = new Map<string, string>();
  for (const parameter of parameters) {
    const [, tag, value] = /^([^\s=]+)[ \t]*=[ \t]*([\x21-\x7e]*)$/.exec(parameter) ?? [];
    if (tag === undefined || values.has(tag.toLowerCase())) return false;
    values.set(tag.toLowerCase(), value!);
  }
  const until = values.get("persistuntil");
  return issuers.includes(issuer) && values.get("accounturi") === accountUri &&
    (until === undefined || (/^\d+$/.test(until) && Number(until) * 1000 >= now.getTime())) &&
    (values.get("policy")?.toLowerCase() === "wildcard" || !name.startsWith("*."));
}

/** Whether that could be done; what could not stays in the journal, for the next run. */
async function unpublish(
  entry: Published,
  config: Config,
  context: Context,
  oneHook: ReturnType<typeof limit>,
): Promise<boolean> {
  try {
    if ("value" in entry) await runHooks("dnsCleanup", entry.name, entry.value, config, context, oneHook);
    else if (TOKEN.test(entry.token)) removeIfThere(join(config.challengeDropDir!, entry.token));
    return true;
  } catch (error) {
    const what = "value" in entry ? recordOf(entry.name) : entry.token;
    context.warn(`cannot clean up ${what}: ${(error as Error).message}`);
    return false;
  }
}

/** The file by which http-01 is answered: new, and readable for the web server whatever the umask. */
function dropFile(path: string, content: string): void {
  removeIfThere(path); // left by a run that was cut off: a CA offers a pending authorization's token again
  // sets the mode of what it has opened; by name it might be another's file by then, where others may write, too
  Deno.writeTextFileSync(path, content, { createNew: true, mode: 0o644 });
}

function removeIfThere(path: string): void {
  try {
    Deno.removeSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}
