/**
 * Presents challenges and cleans up after them: http-01 (RFC 8555 §8.3) by files in the drop directory, dns-01 (§8.4)
 * by the commands of a section, dns-persist-01 (draft-ietf-acme-dns-persist-01) by a permanent record.
 *
 * Whatever a run publishes is noted in the state first, so that the next run can remove what a killed run left behind.
 */

import defer * as nodeCrypto from "node:crypto";
import { join } from "node:path";
import { type Authorization, type Challenge, keyAuthorization } from "./acme.ts";
import { challengeOf, type ChallengeType, type Config, type Section, sectionsOf } from "./config.ts";
import { type Context, limit, settled, within } from "./context.ts";
import { listing, regularFile, removeIfPresent } from "./files.ts";
import { optionsFor, PrepareCommands, runCommand } from "./hooks.ts";
import type { AccountKey } from "./http.ts";
import { isIP } from "./names.ts";
import type { CheckResult, Records } from "./selfcheck.ts";
import type { State } from "./state.ts";

/** A challenge that could not be presented; the CA was not asked to validate anything. */
export class ChallengeError extends Error {
  override readonly name = "ChallengeError";
}

/** Challenges that the CA can validate until this is disposed of. */
export interface Presented extends AsyncDisposable {
  readonly answers: readonly { readonly authorization: Authorization; readonly challenge: Challenge }[];
  /** Authorizations to present afterwards, since their TXT record is in use now. Never all of them. */
  readonly later: readonly Authorization[];
}

type Published = State["published"][number];

/** The store, as far as it is needed here. */
interface Journal {
  readonly state: Pick<State, "published">;
  saveState(): Promise<void>;
}

/** An authorization and its challenge of the configured type. */
interface Wanted {
  readonly type: ChallengeType;
  readonly authorization: Authorization;
  readonly challenge: Challenge;
  readonly name: string;
  /** The key authorization of http-01, the TXT value of dns-01. */
  readonly content: string;
  /** The TXT record of dns-01. */
  readonly record?: string;
  /** The file or TXT value to remove afterwards. */
  readonly published?: Published;
}

/** `prepare` commands make a file visible by ssh, in a second or two. */
const HTTP_WAIT_SECONDS = 30;
/** One self-check: two attempts of a resolver take 10 s (resolv.conf(5)). */
const CHECK_SECONDS = 15;
/** Pauses between self-checks; name servers answer from caches for a while. */
const HTTP_PAUSE_MS = 250;
const DNS_PAUSE_MS = 2_000;
/** Names that `--check --challenges` checks at once. */
const MOST_CHECKS = 20;
/** RFC 8555 §8.3; acme.ts checks those of the CA, this is for those of the state. */
const TOKEN = /^[A-Za-z0-9_-]+$/;
/** Files of `--check --challenges` begin with it. */
const CHECK_TOKEN = "lematt-check-";
/** No check takes so long. */
const CHECK_IS_OVER_MS = 3_600_000;

/** Presents challenges as the configuration says. */
export class Challenges {
  /** TXT record -> resolves when the line that uses it has removed its values. */
  readonly #inUse = new Map<string, Promise<void>>();
  readonly #placer: Placer;
  /** What could not be removed; the next run tries again. */
  readonly #left = new Set<Published>();

  constructor(
    private readonly config: Config,
    private readonly context: Context,
    private readonly prepare: PrepareCommands,
    private readonly journal: Journal,
  ) {
    this.#placer = new Placer(config, context);
  }

  /**
   * Presents the challenges of all authorizations except those that are `later`, and checks that the CA will find them.
   * Throws ChallengeError or CommandError if one fails; then none is presented.
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
    const displaced = await settled([...groups.values()].map((group) => {
      const [wanted] = group as [Wanted];
      switch (wanted.type) {
        case "http-01":
          return this.#presentFile(wanted, stack);
        case "dns-01":
          return this.#presentRecords(wanted.record!, group, stack);
        case "dns-persist-01":
          return this.#checkPersistentRecord(wanted, account.url);
      }
    }));
    const answers = now.filter((wanted) => !displaced.flat().includes(wanted));
    const later = all.filter((wanted) => !answers.includes(wanted)).map(({ authorization }) => authorization);
    const ready = stack.move();
    return { answers, later, [Symbol.asyncDispose]: () => ready.disposeAsync() };
  }

  #wanted(authorization: Authorization, key: AccountKey): Wanted {
    const { name, challenges } = authorization;
    const type = challengeOf(this.config, name);
    const challenge = challenges.find((challenge) => challenge.type === type);
    if (challenge === undefined || (challenge.token === "" && type !== "dns-persist-01")) {
      const offered = challenges.map(({ type }) => type).join(", ");
      throw new ChallengeError(`the CA does not offer ${type} for ${name}, only ${offered || "nothing"}`);
    }
    const { token } = challenge;
    const content = keyAuthorization(token, key);
    const wanted = { type, authorization, challenge, name, content };
    switch (type) {
      case "http-01":
        return { ...wanted, published: { token } };
      case "dns-01": {
        const value = nodeCrypto.hash("sha256", content, "base64url");
        return { ...wanted, content: value, record: txtNameOf(name), published: { name, value } };
      }
      case "dns-persist-01":
        return wanted;
    }
  }

  /**
   * Claims the records that are free, until the stack is disposed of; waits if none is. A line has no record while it
   * waits, so there is no deadlock.
   */
  async #claim(all: readonly Wanted[], stack: AsyncDisposableStack): Promise<readonly Wanted[]> {
    const shared = (name: string) => dnsSections(this.config, name).every(({ dnsParallel }) => dnsParallel);
    for (;;) {
      const claimed = new Set<string>();
      const free = all.filter(({ record, name }) => {
        if (record === undefined || shared(name)) return true;
        // without self-checks it would not be seen whether a second value displaces the first
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
  ): Promise<[]> {
    const { config, context } = this;
    const failed = await startPrepare(name, config, this.prepare, stack);
    stack.defer(() => this.#remove(published!));
    dropFile(join(config.challengeDropDir!, token), content);
    if (failed === undefined) return [];
    const check = fileCheck(name, token, content, context, config.preflight === "warn" ? undefined : failed);
    await this.#selfCheck(name, HTTP_WAIT_SECONDS, HTTP_PAUSE_MS, check);
    return [];
  }

  /**
   * Returns the challenges whose value was displaced by the last one, since the provider keeps one value for a name.
   */
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
      await this.#placer.runHooks("dnsPresent", wanted.name, wanted.content, context.signal);
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
    for (const wanted of displaced) placed.delete(wanted); // many dnsCleanup commands would remove the new value
    return displaced;
  }

  async #checkPersistentRecord({ name, challenge }: Wanted, accountUrl: string): Promise<[]> {
    const uri = challenge.accountUri ?? accountUrl;
    const check = persistentCheck(name, challenge.issuerDomainNames, uri, this.context);
    await this.#selfCheck(name, 0, DNS_PAUSE_MS, check);
    return [];
  }

  /** Repeats a check until it succeeds or time is up; then `preflight` decides whether that is an error. */
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
    if (!await this.#placer.remove(entry)) this.#left.add(entry);
  }
}

/** Removes what earlier, killed runs left behind. */
export async function removeLeftovers(config: Config, context: Context, store: Journal): Promise<void> {
  const { published } = store.state;
  if (published.length === 0) return;
  const placer = new Placer(config, context);
  store.state.published = [];
  for (const entry of published) {
    const isRemoved = await placer.remove(entry);
    // a file is tried again; a record may never have been placed
    if (!isRemoved && "token" in entry) store.state.published.push(entry);
  }
  await store.saveState();
}

/** Runs DNS hooks, and removes what was published. */
class Placer {
  readonly #oneHook = limit(1);

  constructor(private readonly config: Config, private readonly context: Context) {}

  /** Runs the hooks of all sections of a name, one at a time unless a section allows more. */
  async runHooks(
    key: "dnsPresent" | "dnsCleanup",
    name: string,
    value: string,
    signal?: AbortSignal,
  ): Promise<void> {
    const { config, context } = this;
    const values = { DOMAIN: name, RECORD: txtNameOf(name), VALUE: value };
    for (const section of dnsSections(config, name)) {
      const options = { ...optionsFor(section, config, context), signal };
      const run = async () => {
        for (const command of section[key]) {
          await runCommand(command, values, options);
        }
      };
      await (section.dnsParallel ? run() : this.#oneHook(run));
    }
  }

  /** Returns false, after a warning, if it could not be removed. */
  async remove(entry: Published): Promise<boolean> {
    const { config: { challengeDropDir }, context } = this;
    try {
      if ("value" in entry) await this.runHooks("dnsCleanup", entry.name, entry.value);
      else if (challengeDropDir && TOKEN.test(entry.token)) {
        removeIfPresent(join(challengeDropDir, entry.token));
      }
      return true;
    } catch (error) {
      const what = "value" in entry ? txtNameOf(entry.name) : entry.token;
      context.warn(`cannot clean up ${what}: ${(error as Error).message}`);
      return false;
    }
  }
}

// ---- checking without a CA ---------------------------------------------------------------------------------------

/** The result of `--check --challenges` for one name. */
export interface ChallengeFinding {
  readonly name: string;
  readonly challenge: ChallengeType;
  /** Why the CA would not find a challenge. */
  readonly problem?: string;
  /** What could not be checked completely. */
  readonly note?: string;
}

/**
 * Checks whether the CA would find the challenges of all names, without asking it. http-01: fetches a file in the drop
 * directory through the name, with its `prepare` commands running. dns-01: asks the name servers; runs no hooks.
 * dns-persist-01: looks up the record for `account`, if that is known.
 */
export async function checkChallenges(
  config: Config,
  context: Context,
  account?: { readonly url: string; readonly issuers: readonly string[] },
): Promise<ChallengeFinding[]> {
  removeOldChecks(config, context.now());
  await using prepare = new PrepareCommands(context);
  const check = async (name: string, challenge: ChallengeType): Promise<CheckResult> => {
    switch (challenge) {
      case "http-01":
        return await checkDropDirectory(name, config, context, prepare);
      case "dns-01":
        return await untilRight(0, 0, recordsCheck(txtNameOf(name), context, () => undefined), context);
      case "dns-persist-01":
        if (account === undefined) {
          return { fault: "the record needs the URL of the account, which is known after the first run" };
        }
        return await untilRight(0, 0, persistentCheck(name, account.issuers, account.url, context), context);
    }
  };
  const atOnce = limit(MOST_CHECKS);
  const names = [...new Set(config.lines.flatMap(({ names }) => names))];
  return await settled(names.map((name) =>
    atOnce(async () => {
      context.signal.throwIfAborted();
      const challenge = challengeOf(config, name);
      const { fault, note } = await check(name, challenge);
      return { name, challenge, problem: fault, note };
    })
  ));
}

/** Removes the files of checks that were killed. */
function removeOldChecks({ challengeDropDir }: Config, now: Date): void {
  try {
    const names = challengeDropDir === undefined ? [] : listing(challengeDropDir);
    for (const name of names.filter((name) => name.startsWith(CHECK_TOKEN))) {
      const path = join(challengeDropDir!, name);
      const { uid, mtime } = regularFile(path) ?? {};
      const isOver = now.getTime() - (mtime ?? now).getTime() > CHECK_IS_OVER_MS;
      if (uid === Deno.uid() && isOver) removeIfPresent(path);
    }
  } catch { /* a directory that cannot be read; the checks report what else is wrong with it */ }
}

async function checkDropDirectory(
  name: string,
  config: Config,
  context: Context,
  prepare: PrepareCommands,
): Promise<CheckResult> {
  const token = CHECK_TOKEN + crypto.randomUUID(), content = crypto.randomUUID();
  const path = join(config.challengeDropDir!, token);
  await using stack = new AsyncDisposableStack();
  try {
    const failed = await startPrepare(name, config, prepare, stack);
    stack.defer(() => removeIfPresent(path));
    dropFile(path, content);
    const seconds = failed === undefined ? 0 : HTTP_WAIT_SECONDS;
    const check = fileCheck(name, token, content, context, failed);
    const { fault, note } = await untilRight(seconds, HTTP_PAUSE_MS, check, context);
    return { fault: fault && `not served from ${config.challengeDropDir}: ${fault}`, note };
  } catch (error) {
    context.signal.throwIfAborted();
    return { fault: (error as Error).message }; // of a prepare command or the drop directory
  }
}

// ---- parts -------------------------------------------------------------------------------------------------------

/** One self-check; it ends when the signal aborts. */
type Check = (signal: AbortSignal) => Promise<CheckResult>;

/** Repeats a check until there is no fault or `seconds` are over; with 0 it is made once. */
async function untilRight(
  seconds: number,
  pauseMs: number,
  check: Check,
  context: Context,
): Promise<CheckResult> {
  const deadline = context.now().getTime() + seconds * 1000;
  const left = () => deadline - context.now().getTime();
  let seen: CheckResult | undefined;
  for (;;) {
    const most = CHECK_SECONDS * 1000;
    const cut = AbortSignal.timeout(seconds === 0 ? most : Math.max(0, Math.min(left(), most)));
    const verdict = await check(AbortSignal.any([context.signal, cut]));
    context.signal.throwIfAborted();
    if (verdict.fault === undefined) return verdict;
    // the result of a complete check says more than that of an interrupted one
    if (!cut.aborted) seen = verdict;
    if (left() <= pauseMs) return seen ?? verdict;
    await context.sleep(pauseMs);
  }
}

/** Fetches the file of a token through a name. If a prepare command has failed, throws its error instead of a fault. */
function fileCheck(
  name: string,
  token: string,
  content: string,
  context: Context,
  failed?: AbortSignal,
): Check {
  const url = `http://${isIP(name) === 6 ? `[${name}]` : name}/.well-known/acme-challenge/${token}`;
  return async (signal) => {
    const { checkFile } = await import("./selfcheck.ts"); // with http and TLS, which most runs do not need
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

/** Starts the `prepare` commands of a name, if there are any; the signal aborts when one fails. */
async function startPrepare(
  name: string,
  config: Config,
  prepare: PrepareCommands,
  stack: AsyncDisposableStack,
): Promise<AbortSignal | undefined> {
  const failed: AbortSignal[] = [];
  for (const command of sectionsOf(config, name).flatMap((section) => section.prepare)) {
    if (command.trim() === "") continue;
    failed.push(stack.use(await prepare.start(command, { DOMAIN: name }, config.mode)).failed);
  }
  return failed.length > 0 ? AbortSignal.any(failed) : undefined;
}

/** The TXT record of dns-01. */
function txtNameOf(name: string): string {
  return `_acme-challenge.${name.replace(/^\*\./, "")}`;
}

/** The sections of a name with dns-01. */
function dnsSections(config: Config, name: string): readonly Section[] {
  return sectionsOf(config, name).filter(({ challenge }) => challenge === "dns-01");
}

/**
 * The permanent record of dns-persist-01: an issue-value of RFC 8659 that names CA and account
 * (draft-ietf-acme-dns-persist-01 §3). `accountUri` is that of the challenge, or the account's URL.
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

/** Whether a record is one of dns-persist-01 for this account that has not expired. */
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

/** Makes the file of http-01, readable for the web server whatever the umask. */
function dropFile(path: string, content: string): void {
  removeIfPresent(path); // of a killed run: a CA sends the token of a pending authorization again
  // sets the mode of the open file; chmod by name could change a file that somebody else has put there
  Deno.writeTextFileSync(path, content, { createNew: true, mode: 0o644 });
}
