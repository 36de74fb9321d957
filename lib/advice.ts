/**
 * What to do outside lematt, and what is coming: DNS records to place, settings that shorter certificates will overrule.
 *
 * Pure. Faults and warnings of what is written are config.ts's; this is about what is not written anywhere yet.
 */

import { standingRecord } from "./challenge.ts";
import { challengeOf, type Config } from "./config.ts";
import { renewal } from "./plan.ts";
import type { Account } from "./store.ts";

const DAY_MS = 86_400_000;

/**
 * How long Let's Encrypt's default certificates will live, by the day from which they do.
 * https://letsencrypt.org/2025/12/02/from-90-to-45
 */
const LIVES = [{ from: "2027-02-10", days: 64 }, { from: "2028-02-16", days: 45 }];

const UNKNOWN_ACCOUNT = "<URL of the account, known after the first run>";
const UNKNOWN_ISSUER = "<domain name of the CA, known after the first run>";

/** TXT records that must stand for the names proven by dns-persist-01, as lines of a zone file. */
export function recordsToPlace(config: Config, account: Account | undefined): string[] {
  const all = config.lines.flatMap(({ names }) => names);
  const standing = new Set(all.filter((name) => challengeOf(config, name) === "dns-persist-01"));
  // a wildcard's record proves the name itself, too
  const needed = [...standing].filter((name) => !standing.has(`*.${name}`));
  return needed.map((name) => {
    const issuer = account?.issuers[0] ?? UNKNOWN_ISSUER;
    const { record, value } = standingRecord(name, issuer, account?.url ?? UNKNOWN_ACCOUNT);
    return `${record}. IN TXT "${value}"`;
  });
}

/** A CAA record (RFC 8657) that lets nobody but this account have certificates, and only by the ways of proof in use. */
export function caaRecord(config: Config, account: Account): string {
  const methods = new Set(
    config.lines.flatMap(({ names }) => names.map((name) => challengeOf(config, name))),
  );
  const value = `${account.issuers[0] ?? UNKNOWN_ISSUER}; accounturi=${account.url}`;
  return `CAA 0 issue "${value}; validationmethods=${[...methods].join(",")}"`;
}

/** Renewal settings that certificates of the coming lives will overrule, with the day from which they do. */
export function comingLives(config: Config): string[] {
  const isDefault = config.lines.some(({ profile }) => profile === undefined || profile === "classic");
  if (!/\.letsencrypt\.org\//.test(config.directoryUrl) || !isDefault) return [];
  return LIVES.flatMap(({ from, days }) => {
    const { renewAt, rule } = renewal(config, new Date(0), new Date(days * DAY_MS));
    const age = `they are renewed when they are ${Math.round(renewAt.getTime() / DAY_MS)} days old`;
    const lives = `from ${from} on Let's Encrypt's certificates live ${days} days`;
    switch (rule) {
      case "age beyond life":
        return [
          `${lives}, so generateNewCertsAfterDays: ${config.generateNewCertsAfterDays} comes too late: ${age}`,
        ];
      case "expiry, capped":
        return [`${lives}, so reauthorizeDays: ${config.reauthorizeDays} comes too soon: ${age}`];
      default:
        return [];
    }
  });
}
