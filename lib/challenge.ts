/**
 * Makes challenges answerable and cleans up after them: http-01 (RFC 8555 §8.3) by files in the drop directory.
 *
 * Tokens reach this file checked for base64url (acme.ts), so they can be file names. Every file is noted before it is
 * made; the next run removes what a run that was cut off could not.
 */

import { isIP } from "node:net";
import { basename, dirname, join } from "node:path";
import { type AccountKey, type Authorization, type Challenge, keyAuthorization } from "./acme.ts";
import type { PrepareCommands } from "./actions.ts";
import { challengeOf, type Config, sectionsOf } from "./config.ts";
import { fetchAsCa } from "./preflight.ts";
import type { Route } from "./reach.ts";

/** A challenge that the CA can check until this is disposed of. */
export interface Answer extends AsyncDisposable {
  readonly challenge: Challenge;
}

/** A challenge that could not be made answerable; nothing was asked of the CA. */
export class ChallengeError extends Error {
  override readonly name = "ChallengeError";
}

/** Where notes for the next run are kept; see `Store`. */
export interface Notes {
  note(text: string): void;
}

/** What the CA gets to see is looked at for this long before it is asked to look. */
const PREFLIGHT_DEADLINE_MS = 30_000;
const PREFLIGHT_PAUSE_MS = 250;

/** Answers challenges as the configuration says. */
export class Challenges {
  constructor(
    private readonly config: Config,
    private readonly prepare: PrepareCommands,
    private readonly notes: Notes,
    private readonly route: Route,
    /** Told of what is odd but stops nothing. */
    private readonly warn: (text: string) => void,
  ) {}

  /** Makes the configured challenge of an authorization answerable: prepare commands, the file, a look at it. */
  async present(authorization: Authorization, key: AccountKey): Promise<Answer> {
    const { name } = authorization;
    const type = challengeOf(this.config, name);
    const challenge = authorization.challenges.find((offered) => offered.type === type);
    if (challenge === undefined || challenge.token === "") {
      const offered = authorization.challenges.map((offered) => offered.type).join(", ");
      throw new ChallengeError(`the CA does not offer ${type} for ${name}, only ${offered || "nothing"}`);
    }
    await using stack = new AsyncDisposableStack();
    const commands = sectionsOf(this.config, name).flatMap((section) => section.prepare);
    const dead = new AbortController();
    for (const command of commands) {
      const held = stack.use(await this.prepare.hold(command, { DOMAIN: name }));
      held.failed.catch((error) => dead.abort(error));
    }
    const content = keyAuthorization(challenge.token, key);
    stack.use(dropFile(join(this.config.challengeDropDir!, challenge.token), content, this.notes));
    if (commands.length > 0) await this.#preflight(name, challenge.token, content, dead.signal);
    const ready = stack.move();
    return { challenge, [Symbol.asyncDispose]: () => ready.disposeAsync() };
  }

  /** Fetches the challenge through the name, as the CA will, until it is right or a prepare command has died. */
  async #preflight(name: string, token: string, expected: string, dead: AbortSignal): Promise<void> {
    if (this.config.preflight === "no") return;
    const deadline = Date.now() + PREFLIGHT_DEADLINE_MS;
    for (;;) {
      const url = `http://${isIP(name) === 6 ? `[${name}]` : name}/.well-known/acme-challenge/${token}`;
      const fault = await fetchAsCa(url, expected, this.route);
      if (fault === undefined) return;
      dead.throwIfAborted();
      if (Date.now() > deadline) {
        const text = `cannot see the challenge of ${name}: ${fault}`;
        if (this.config.preflight !== "warn") throw new ChallengeError(text);
        return this.warn(text);
      }
      await new Promise((resolve) => setTimeout(resolve, PREFLIGHT_PAUSE_MS));
    }
  }
}

/** Removes the challenge files that a run which was cut off left behind; `notes` are its own. */
export function cleanUp(config: Config, notes: readonly string[]): void {
  for (const path of notes) {
    // a note is believed only as far as this program could have written it
    if (dirname(path) !== config.challengeDropDir || !/^[A-Za-z0-9_-]+$/.test(basename(path))) continue;
    removeIfThere(path);
  }
}

/** The file by which http-01 is answered: new, and readable for the web server whatever the umask. */
function dropFile(path: string, content: string, notes: Notes): Disposable {
  notes.note(path);
  removeIfThere(path); // left by a run that was cut off: a CA offers a pending authorization's token again
  using file = Deno.openSync(path, { write: true, createNew: true, mode: 0o644 });
  file.writeSync(new TextEncoder().encode(content));
  Deno.chmodSync(path, 0o644);
  return { [Symbol.dispose]: () => removeIfThere(path) };
}

function removeIfThere(path: string): void {
  try {
    Deno.removeSync(path);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}
