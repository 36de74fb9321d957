/**
 * Makes challenges answerable and cleans up after them: http-01 (RFC 8555 §8.3) by files in the drop directory, dns-01
 * (§8.4) by the commands of a section, dns-persist-01 (draft-ietf-acme-dns-persist) by a record that stays.
 *
 * Tokens reach this file checked for base64url (acme.ts), so they can be file names. Whatever is made is noted first;
 * the next run undoes what a run that was cut off could not.
 */

import defer * as nodeCrypto from "node:crypto";
import { basename, dirname, join } from "node:path";
import {
  type AccountKey,
  type Authorization,
  type Challenge,
  type Clock,
  keyAuthorization,
  pause,
} from "./acme.ts";
import { challengeOf, type Config, type Section, sectionsOf } from "./config.ts";
import type { Query } from "./context.ts";
import { txtFault } from "./dns.ts";
import { type PrepareCommands, runCommand } from "./hooks.ts";
import { isIP } from "./names.ts";
import type { Route } from "./context.ts";

/** A challenge that the CA can check until this is disposed of. */
export interface Answer extends AsyncDisposable {
  readonly challenge: Challenge;
}

/** A challenge that could not be made answerable; nothing was asked of the CA. */
export class ChallengeError extends Error {
  override readonly name = "ChallengeError";
}

/** What answering challenges needs of the run. */
export interface Answering extends Clock {
  readonly config: Config;
  readonly prepare: PrepareCommands;
  readonly route: Route;
  readonly query: Query;
  /** Remembers what has to be undone even if this run is cut off; see `Store.note`. */
  note(text: string): void;
  /** Called when it has been undone. */
  forget(text: string): void;
  /** Told of what is odd but stops nothing. */
  warn(text: string): void;
}

/** A TXT record of dns-01, to be placed for one name. */
interface Placed {
  readonly name: string;
  readonly record: string;
  readonly value: string;
}

/** What the CA gets to see is looked at for this long before it is asked to look. */
const PREFLIGHT_SECONDS = 30;
/** A file name in the drop directory, RFC 8555 §8.3. */
const TOKEN = /^[A-Za-z0-9_-]+$/;
/** Pauses between looks: of a web server, and of name servers, which answer from caches for a while. */
const HTTP_PAUSE_MS = 250;
const DNS_PAUSE_MS = 2_000;

/** Answers challenges as the configuration says. */
export class Challenges {
  /** Record -> the last command at it: several values at one name are placed one after the other. */
  readonly #busy = new Map<string, Promise<unknown>>();

  constructor(private readonly answering: Answering) {}

  /** Makes the configured challenge of an authorization answerable, and makes sure of it. */
  async present(authorization: Authorization, key: AccountKey, accountUrl: string): Promise<Answer> {
    const { name } = authorization;
    const wanted = challengeOf(this.answering.config, name);
    const challenge = authorization.challenges.find(({ type }) => type === wanted);
    if (challenge === undefined || (challenge.token === "" && wanted !== "dns-persist-01")) {
      const offered = authorization.challenges.map(({ type }) => type).join(", ");
      throw new ChallengeError(`the CA does not offer ${wanted} for ${name}, only ${offered || "nothing"}`);
    }
    await using stack = new AsyncDisposableStack();
    switch (wanted) {
      case "http-01":
        await this.#presentFile(name, challenge, keyAuthorization(challenge.token, key), stack);
        break;
      case "dns-01":
        await this.#presentRecord(name, keyAuthorization(challenge.token, key), stack);
        break;
      case "dns-persist-01":
        await this.#checkStandingRecord(name, challenge, accountUrl);
        break;
      default:
        wanted satisfies never;
    }
    const ready = stack.move();
    return { challenge, [Symbol.asyncDispose]: () => ready.disposeAsync() };
  }

  async #presentFile(
    name: string,
    challenge: Challenge,
    content: string,
    stack: AsyncDisposableStack,
  ): Promise<void> {
    const { config, prepare } = this.answering;
    const commands = sectionsOf(config, name).flatMap((section) => section.prepare);
    const failed: AbortSignal[] = [];
    for (const command of commands) {
      failed.push(stack.use(await prepare.start(command, { DOMAIN: name }, config.mode)).failed);
    }
    const path = join(config.challengeDropDir!, challenge.token);
    const note = JSON.stringify({ file: path });
    this.answering.note(note);
    stack.defer(() => this.#undo(note, path, () => removeIfThere(path)));
    dropFile(path, content);
    if (commands.length === 0) return;
    const { fetchAsCa } = await import("./preflight.ts"); // http and TLS, which most runs do without
    const url = `http://${
      isIP(name) === 6 ? `[${name}]` : name
    }/.well-known/acme-challenge/${challenge.token}`;
    await this.#preflight(name, PREFLIGHT_SECONDS, HTTP_PAUSE_MS, async () => {
      const fault = await fetchAsCa(url, content, this.answering.route, this.answering.signal);
      if (fault !== undefined && config.preflight !== "warn") AbortSignal.any(failed).throwIfAborted();
      return fault;
    });
  }

  async #presentRecord(name: string, content: string, stack: AsyncDisposableStack): Promise<void> {
    const { config } = this.answering;
    const record = `_acme-challenge.${name.replace(/^\*\./, "")}`;
    const value = nodeCrypto.createHash("sha256").update(content).digest("base64url");
    const placed = { name, record, value };
    const sections = dnsSections(config, name);
    const note = JSON.stringify({ dns: placed });
    this.answering.note(note);
    stack.defer(() =>
      this.#undo(note, record, () => this.#alone(record, () => remove(sections, placed, config)))
    );
    const { signal } = this.answering;
    const present = sections.flatMap(({ dnsPresent }) => dnsPresent);
    await this.#alone(record, () => runAll(present, placed, config, signal));
    await this.#preflight(
      name,
      config.dnsWaitSeconds,
      DNS_PAUSE_MS,
      () => txtFault(record, (text) => text === value, this.answering.query),
    );
  }

  async #checkStandingRecord(name: string, challenge: Challenge, accountUrl: string): Promise<void> {
    const issuers = challenge.issuerDomainNames;
    const { record, value } = standingRecord(name, issuers[0] ?? "", accountUrl);
    const proves = (text: string) =>
      issuers.some((issuer) => isStanding(text, name, issuer, accountUrl, this.answering.now()));
    await this.#preflight(name, 0, DNS_PAUSE_MS, async () => {
      const fault = await txtFault(record, proves, this.answering.query);
      return fault && `${fault}; place this one: ${record}. IN TXT "${value}"`;
    });
  }

  /** Undoes what was noted; what cannot be undone stays noted, for the next run. */
  async #undo(note: string, what: string, undo: () => void | Promise<void>): Promise<void> {
    try {
      await undo();
      this.answering.forget(note);
    } catch (error) {
      this.answering.warn(`cannot clean up ${what}: ${(error as Error).message}`);
    }
  }

  /** Looks again and again until nothing is wrong or time is up; then `preflight` says whether that stops the line. */
  async #preflight(
    name: string,
    seconds: number,
    pauseMs: number,
    look: () => Promise<string | undefined>,
  ): Promise<void> {
    const { config, warn } = this.answering;
    if (config.preflight === "no") return;
    const deadline = this.answering.now().getTime() + seconds * 1000;
    for (;;) {
      const fault = await look();
      if (fault === undefined) return;
      if (this.answering.now().getTime() >= deadline) {
        const text = `the CA would not see the challenge of ${name}: ${fault}`;
        if (config.preflight !== "warn") throw new ChallengeError(text);
        return warn(text);
      }
      await pause(pauseMs, this.answering);
    }
  }

  /** Runs one thing at a time for each record. */
  #alone<T>(record: string, task: () => Promise<T>): Promise<T> {
    const turn = (this.#busy.get(record) ?? Promise.resolve()).then(task, task);
    this.#busy.set(record, turn.catch(() => {}));
    return turn;
  }
}

/**
 * The record by which dns-persist-01 proves a name for as long as it stands, in the form of the draft that Pebble
 * implements (draft-ietf-acme-dns-persist-00 §3): an issue-value of RFC 8659 that names CA and account.
 */
export function standingRecord(
  name: string,
  issuerDomainName: string,
  accountUrl: string,
): { readonly record: string; readonly value: string } {
  const wildcard = name.startsWith("*.");
  return {
    record: `_validation-persist.${wildcard ? name.slice(2) : name}`,
    value: `${issuerDomainName}; accounturi=${accountUrl}${wildcard ? "; policy=wildcard" : ""}`,
  };
}

/** Whether a record that was found is such a one, which may also say until when it holds. */
function isStanding(text: string, name: string, issuer: string, accountUrl: string, now: Date): boolean {
  const [found, ...parameters] = text.split(";").map((part) => part.trim());
  const values = new Map(parameters.map((parameter) => {
    const [, tag = "", value = ""] = /^(.*?)\s*=\s*(.*)$/.exec(parameter) ?? [];
    return [tag.toLowerCase(), value];
  }));
  const policy = values.get("policy")?.toLowerCase();
  const until = Number(values.get("persistuntil") ?? Infinity) * 1000;
  return found === issuer && values.get("accounturi") === accountUrl && until >= now.getTime() &&
    (policy === "wildcard" || !name.startsWith("*."));
}

/** Undoes what an earlier run has noted and could not undo; false where it is to be tried again. */
export async function cleanUp(config: Config, note: string, warn: Answering["warn"]): Promise<boolean> {
  const { file, dns } = parseNote(note);
  try {
    if (dns !== undefined) await remove(dnsSections(config, dns.name), dns, config);
    // believed only as far as this program could have written it
    if (file !== undefined && dirname(file) === config.challengeDropDir && TOKEN.test(basename(file))) {
      removeIfThere(file);
    }
    return true;
  } catch (error) {
    warn(`cannot clean up ${dns?.record ?? file}: ${(error as Error).message}`);
    return dns !== undefined; // which may never have been placed
  }
}

/** A note as it was written; one that was cut off in the middle, or is none of ours, says nothing. */
function parseNote(note: string): { file?: string; dns?: Placed } {
  try {
    const { file, dns } = JSON.parse(note);
    const texts = dns === undefined ? [file] : [dns.name, dns.record, dns.value];
    return texts.every((text) => typeof text === "string") ? { file, dns } : {};
  } catch {
    return {};
  }
}

/** The sections whose commands prove a name by dns-01. */
function dnsSections(config: Config, name: string): readonly Section[] {
  return sectionsOf(config, name).filter(({ challenge }) => challenge === "dns-01");
}

function remove(sections: readonly Section[], placed: Placed, config: Config): Promise<void> {
  return runAll(sections.flatMap(({ dnsCleanup }) => dnsCleanup), placed, config);
}

async function runAll(
  commands: readonly string[],
  { name, record, value }: Placed,
  config: Config,
  signal?: AbortSignal,
): Promise<void> {
  for (const command of commands) {
    const values = { DOMAIN: name, RECORD: record, VALUE: value };
    await runCommand(command, values, {
      mode: config.mode,
      timeoutSeconds: config.commandTimeoutSeconds,
      signal,
    });
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
