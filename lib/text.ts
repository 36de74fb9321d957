/**
 * Sentences about reasons, certificates, endpoints, problems and errors: the same in what a run prints, in
 * --status, in alerts and in the JSON documents.
 */

import type { Notice } from "./config.ts";
import type { EndpointStatus, JudgedSight } from "./endpoints.ts";
import { codeOf } from "./files.ts";
import { messageOf } from "./http.ts";
import type { Delivery, Problem, Warning } from "./plan.ts";
import { DAY_MS, HOUR_MS, type Reason, type Rule } from "./renewal.ts";
import type { Entry } from "./store.ts";

/** `lematt.conf:12: …`, and the hint on a line of its own. */
export function noticeText({ file, line, text, hint }: Notice): string {
  const where = line === undefined ? file : `${file}:${line}`;
  return `${where}: ${text}${hint === undefined ? "" : `\n  hint: ${hint}`}`;
}

/** A certificate's names, short: the primary and how many more there are. */
export function nameText(names: readonly string[]): string {
  if (names.length === 0) return "no name";
  return names.length === 1 ? names[0]! : `${names[0]} +${names.length - 1}`;
}

/** `www.example.com +1 (rsa, ec)` */
export function subjectText(names: readonly string[], keyTypes: readonly string[]): string {
  return `${nameText(names)} (${keyTypes.join(", ")})`;
}

export function entryText({ line, keyType }: Entry): string {
  return subjectText(line.names, [keyType]);
}

/** The day, in UTC. */
export function dateText(date: Date): string {
  return date.toISOString().slice(0, 10);
}

/** The minute, in UTC. */
export function timeText(date: Date): string {
  return `${date.toISOString().slice(0, 16).replace("T", " ")} UTC`;
}

/** `12 days`, `5 hours`, `20 minutes`, `under a minute` */
export function durationText(ms: number): string {
  if (ms >= 3 * DAY_MS) return count(Math.floor(ms / DAY_MS), "day");
  if (ms >= 2 * HOUR_MS) return count(Math.floor(ms / HOUR_MS), "hour");
  return ms < 60_000 ? "under a minute" : count(Math.floor(ms / 60_000), "minute");
}

/** The day, or the minute if it is less than ten days away. */
export function untilText(date: Date, now: Date): string {
  return Math.abs(date.getTime() - now.getTime()) >= 10 * DAY_MS ? dateText(date) : timeText(date);
}

/** `1 line`, `2 lines` */
export function count(number: number, thing: string): string {
  return `${number} ${thing}${number === 1 ? "" : "s"}`;
}

/** Why a certificate is issued. */
export function reasonText(reason: Reason): string {
  switch (reason.kind) {
    case "found": {
      const { finding } = reason;
      switch (finding.kind) {
        case "missing":
          return finding.what === "certificate" ? "no certificate yet" : "its key is missing";
        case "unreadable":
          return `its ${finding.what} cannot be read: ${finding.detail}`;
        case "other names":
          return `the names changed, it was for ${finding.certificate.names.join(" ")}`;
        case "other key":
          return "it does not match its key";
        case "revoked":
          return "its key was revoked";
        default:
          return finding satisfies never;
      }
    }
    case "asked for":
      return "--renew";
    case "expired":
      return `expired ${timeText(reason.at)}`;
    case "renewal": {
      const why = reason.explanationUrl === undefined ? "" : `, see ${reason.explanationUrl}`;
      return `due since ${dateText(reason.at)}, ${RULE_TEXT[reason.rule]}${why}`;
    }
    default:
      return reason satisfies never;
  }
}

/** What set the date of a renewal, in the words of the configuration. */
export const RULE_TEXT: Readonly<Record<Rule, string>> = {
  "age": "by generateNewCertsAfterDays",
  "expiry": "by reauthorizeDays",
  "expiry, capped": "by reauthorizeDays, but not in the first third of its life",
  "life": "by its lifetime",
  "runs": "so that two more runs are possible before it expires",
  "ari": "as the CA suggests",
};

/** What a person should know, in a sentence. */
export function warningText(warning: Warning): string {
  switch (warning.kind) {
    case "short life": {
      const { entry, lifeMs, intervalMs } = warning;
      return `the lifetime of ${entryText(entry)} is ${durationText(lifeMs)}, but runs are ${
        durationText(intervalMs)
      } apart: run lematt more often`;
    }
    case "other key":
      return `the key of ${
        entryText(warning.entry)
      } is not as configured; the next renewal makes one that is`;
    case "no key":
      return `${warning.entry.files.key} is missing, so a new certificate is issued; ` +
        "if a command of yours moves keys away, every run issues again";
    case "not renewed": {
      const { section, file, notAfter } = warning;
      return `[${section}] was given ${file}, which is no longer renewed and expires ${timeText(notAfter)} ` +
        "(--prune moves it away)";
    }
    case "nothing to deliver": {
      const { what } = warning;
      const name = typeof what === "string" ? `[${what}]` : what.names[0];
      return `nothing to deliver for ${name}: it has no command, or no certificate`;
    }
    default:
      return warning satisfies never;
  }
}

/** `www.example.com:443 (rsa, ec)` */
export function endpointText(endpoints: readonly EndpointStatus[]): string {
  const keyTypes = [...new Set(endpoints.map(({ keyType }) => keyType))];
  return `${endpoints[0]!.endpoint.text} (${keyTypes.join(", ")})`;
}

/** What an address serves. */
export function sightText(sight: JudgedSight): string {
  const { verdict, certificate, detail, address } = sight;
  const at = address === "" ? "" : ` at ${address}`;
  const until = certificate === undefined ? "" : `, valid until ${timeText(new Date(certificate.notAfter))}`;
  switch (verdict) {
    case "current":
      return `serves the newest certificate${at}${until}`;
    case "answers":
      return `finishes the handshake${at}${until}`;
    case "older":
      return `serves an older certificate${at}${until}`;
    case "invalid":
      return `serves ${certificate?.selfSigned ? "a self-signed" : "an expired"} certificate${at}${until}`;
    case "staging":
      return `serves the certificate of --test${at}${until}`;
    case "foreign":
      return `serves a certificate that lematt did not deliver${at}, issued by ${
        certificate?.issuer || "an unnamed CA"
      }${until}`;
    case "mismatched":
      return `serves a certificate for ${nameText(certificate?.names ?? [])}${at}${until}`;
    case "refused":
      return `has no certificate of this key type${at}${detail === undefined ? "" : `: ${detail}`}`;
    case "unfinished":
      return `does not finish the handshake${at}${detail === undefined ? "" : `: ${detail}`}`;
    case "unreachable":
      return `unreachable${at}: ${detail ?? "no answer"}`;
    case "passed over":
      return `not probed${at}: this host has no route to that address family`;
    default:
      return verdict satisfies never;
  }
}

/** `new certificate, drift` */
export function pendingText({ pending }: Pick<Delivery, "pending">): string {
  return [...new Set(pending.map(({ reason }) => reason))].join(", ");
}

function expiryText(what: string, notAfter: Date | undefined): string {
  return notAfter === undefined ? "" : `; ${what} expires ${timeText(notAfter)}`;
}

/** What a problem is about, without its cause. */
export function problemName(problem: Problem): string {
  switch (problem.kind) {
    case "CA":
      return `issuance of ${count(problem.lines.length, "line")}`;
    case "disk":
      return "writing files";
    case "clock":
      return "this host's clock";
    case "failing":
      return `issuance of ${nameText(problem.lines[0]!.names)}`;
    case "rate-limited":
      return `${count(problem.lines.length, "line")} rate-limited by the CA`;
    case "overdue":
      return `renewal of ${entryText(problem.entry)}`;
    case "delivery": {
      const { section, pending } = problem.delivery;
      return `[${section.name}] delivery of ${count(pending.length, "certificate")}`;
    }
    case "endpoint":
      return endpointText(problem.endpoints);
    case "not run":
      return "runs of lematt";
    default:
      return problem satisfies never;
  }
}

/** A problem in a sentence. */
export function problemText(problem: Problem): string {
  const name = problemName(problem);
  switch (problem.kind) {
    case "CA": {
      const { failure, lines, notAfter } = problem;
      const times = failure.count === 1
        ? ""
        : `, ${failure.count} times since ${timeText(new Date(failure.since))}`;
      return `${count(lines.length, "line")} not issued${times}: ${failure.error}` +
        expiryText("the first certificate", notAfter);
    }
    case "disk": {
      const { error, notAfter } = problem;
      if (!isSystemError(error)) return `cannot run: ${errorText(error)}`;
      return `cannot write files: ${errorText(error)}; nothing is issued until that is repaired` +
        expiryText("the first certificate", notAfter);
    }
    case "clock": {
      const { now, evidence: { of, at }, notAfter } = problem;
      const other = {
        CA: "the CA's",
        certificate: "but a certificate is valid from",
        run: "but lematt has run at",
      }[of];
      return `this host's clock says ${timeText(now)}, ${other} ${timeText(at)}` +
        expiryText("the first certificate", notAfter);
    }
    case "failing": {
      const { failure, lines, notAfter } = problem;
      const times = failure.count === 1 ? "failed" : `failed ${failure.count} times in a row`;
      return `${nameText(lines[0]!.names)} ${times}: ${failure.error}${retryText(failure)}` +
        expiryText("its certificate", notAfter);
    }
    case "rate-limited":
      return `${name} until ${timeText(problem.until)} (--retry: now)`;
    case "overdue":
      return problem.entry.finding.kind === "revoked"
        ? `${entryText(problem.entry)} was revoked and is not replaced yet`
        : `${entryText(problem.entry)} is overdue for renewal and expires ${timeText(problem.notAfter)}`;
    case "delivery": {
      const { failure, servedUntil } = problem;
      return `${name} pending since ${timeText(new Date(failure.since))}: ${failure.error}` +
        retryText(failure) + expiryText("the certificate that is served", servedUntil);
    }
    case "endpoint":
      return `${name} ${sightText(problem.sight)}, wrong since ${timeText(problem.since)}`;
    case "not run":
      return `lematt --prod has not run since ${timeText(problem.since)}`;
    default:
      return problem satisfies never;
  }
}

function retryText({ retryAt }: { readonly retryAt?: string }): string {
  return retryAt === undefined ? "" : `; next attempt at ${timeText(new Date(retryAt))} (--retry: now)`;
}

/** A problem, and the end of what a command printed that is its cause. */
export function problemLines(problem: Problem): string[] {
  return [problemText(problem), ...problem.kind === "delivery" ? outputOf(problem.failure.output ?? "") : []];
}

/** Errors whose message is enough; of any other, a bug, the stack is shown. */
const EXPECTED_ERRORS = [
  "AbortError",
  "AcmeError",
  "ChallengeError",
  "CommandError",
  "LockedError",
  "SelectionError",
  "StateError",
];

export function isExpected(error: Error): boolean {
  return EXPECTED_ERRORS.includes(error.name) || isSystemError(error);
}

/** An error as a person should see it: the CA's words with their step; a bug with its stack. */
export function errorText(error: Error): string {
  return isExpected(error) ? messageOf(error) : error.stack ?? String(error);
}

/** Whether the system refused something. Deno gives most of these errors a code, but not all: ENOLCK has none. */
export function isSystemError(error: Error): boolean {
  return codeOf(error) !== undefined || error instanceof Deno.errors.NotFound ||
    /\(os error \d+\)/.test(error.message);
}

/** The end of what a failed command printed, marked as such. */
export function outputOf(output: string): string[] {
  return output.trimEnd().split("\n").filter((line) => line !== "").slice(-20).map((line) => `| ${line}`);
}
