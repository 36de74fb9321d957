/**
 * Tells which certificate an endpoint serves: at each of its addresses, for each type of key, by TLS or STARTTLS.
 *
 * `openssl s_client` does the talking: no other tool at hand can ask a server for its RSA or its ECDSA certificate,
 * and it knows the STARTTLS of many protocols. Chains are not judged here, only whether the certificate is the one
 * that was delivered. This file knows neither when to look nor what follows from what was seen.
 *
 * RFC 8446 §4.2.3 (signature algorithms choose the certificate), RFC 5246 §7.4.2 (so does the cipher suite),
 * RFC 6066 §3 (SNI), RFC 3207 (STARTTLS of SMTP).
 */

import { lookup } from "node:dns/promises";
import { isIP } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { CommandError, expand, runCommand } from "./actions.ts";
import type { Endpoint, KeyType } from "./config.ts";
import { type Certificate, readCertificate } from "./x509.ts";

/** A certificate that an endpoint should serve to those who ask for its type of key. */
export interface Expected {
  readonly keyType: KeyType;
  readonly certificate: Certificate;
}

/** An endpoint, and what is expected of it: one certificate for each type of key. */
export interface Target {
  readonly endpoint: Pick<Endpoint, "text" | "host" | "port" | "starttls" | "sni">;
  readonly expected: readonly Expected[];
}

/** What one address serves to those who ask for one type of key. */
export interface Served {
  /** The endpoint as written. */
  readonly endpoint: string;
  /** Its IP address, without brackets; empty where the name has none. */
  readonly address: string;
  /** What was asked for. */
  readonly keyType: KeyType;
  /**
   * `current`: the certificate expected. `old`: one for the same names (and perhaps more) that is no younger.
   * `other`: another one, or none of this type. `unreachable`: no answer, or one that is not TLS.
   */
  readonly state: "current" | "old" | "other" | "unreachable";
  readonly certificate?: Certificate;
  /** Why there is no certificate. */
  readonly detail?: string;
}

/** What probes need of the world. */
export interface World {
  /** Addresses of a name; in production resolveAddresses(). Rejects, or is empty, where there are none. */
  readonly resolve: (host: string) => Promise<readonly string[]>;
  /** How long one connection may take. */
  readonly timeoutSeconds: number;
  readonly signal?: AbortSignal;
}

/** How many connections are open at once, each a process of some 10 MB. */
const CONNECTIONS = 8;
/** How long a service gets to serve what it was given: most reload within a second, some restart within a minute. */
const DEADLINE_SECONDS = 60;
/** Pauses between looks. */
const FIRST_PAUSE_SECONDS = 0.5;
const LONGEST_PAUSE_SECONDS = 8;

/**
 * What makes a server choose its certificate of one type: the signature algorithms in TLS 1.3, the cipher suites in
 * TLS 1.2. PKCS#1 signatures stand with ECDSA for the sake of servers that also look at how the certificate itself
 * was signed, which may be with the RSA key of a CA; TLS 1.3 uses them for nothing else.
 */
const ASK_FOR: Record<KeyType, readonly string[]> = {
  rsa: [
    "-cipher",
    "aRSA",
    "-sigalgs",
    "RSA-PSS+SHA256:RSA-PSS+SHA384:RSA-PSS+SHA512:RSA+SHA256:RSA+SHA384:RSA+SHA512",
  ],
  ec: [
    "-cipher",
    "aECDSA",
    "-sigalgs",
    "ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512:RSA+SHA256:RSA+SHA384:RSA+SHA512",
  ],
};

/**
 * The IPv4 and IPv6 addresses of a name as this system sees them (/etc/hosts included); an address is its own.
 *
 * @throws where there are none, or the resolver fails
 */
export async function resolveAddresses(host: string): Promise<string[]> {
  if (isIP(host)) return [host];
  const found = await lookup(host, { all: true });
  return [...new Set(found.map(({ address }) => address))];
}

/**
 * Connects once to every address of every target for each certificate expected there, some at once.
 *
 * @returns findings in the order of the targets
 * @throws CommandError where there is no openssl; the signal's reason when that aborts
 */
export async function probe(targets: readonly Target[], world: World): Promise<Served[]> {
  const looks = (await Promise.all(targets.map((target) => looksAt(target, world)))).flat();
  const found: Served[] = [];
  const queue = looks.entries(); // shared: each worker takes the next
  const worker = async () => {
    for (const [n, look] of queue) found[n] = await look();
  };
  await Promise.all(Array.from({ length: CONNECTIONS }, worker));
  return found;
}

/**
 * Probes the targets until all serve what is expected, again and again with growing pauses, or until the deadline.
 *
 * @returns what was found last, in the order of the targets
 * @throws as probe()
 */
export async function verifyUntil(
  targets: readonly Target[],
  world: World,
  deadlineSeconds = DEADLINE_SECONDS,
): Promise<Served[]> {
  const deadline = performance.now() + deadlineSeconds * 1000;
  const found = new Map<Target, Served[]>();
  let behind = targets;
  for (let pause = FIRST_PAUSE_SECONDS;; pause = Math.min(pause * 2, LONGEST_PAUSE_SECONDS)) {
    await Promise.all(behind.map(async (target) => found.set(target, await probe([target], world))));
    behind = targets.filter((target) => found.get(target)!.some(({ state }) => state !== "current"));
    if (behind.length === 0 || performance.now() + pause * 1000 > deadline) {
      return targets.flatMap((target) => found.get(target)!);
    }
    await delay(pause * 1000, undefined, { signal: world.signal });
  }
}
