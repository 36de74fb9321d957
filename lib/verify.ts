/**
 * Tells which certificate an endpoint serves: at each of its addresses, for each type of key, by TLS or
 * STARTTLS.
 *
 * `openssl s_client` does the talking: nothing else at hand can ask a server for its RSA or its ECDSA
 * certificate, and it knows the STARTTLS of many protocols. Chains are not judged here, only whether the
 * certificate is the one that was delivered. This file knows neither when to look nor what follows from what
 * was seen.
 *
 * RFC 8446 §4.2.3 (signature algorithms choose the certificate), RFC 5246 §7.4.2 (so does the cipher suite),
 * RFC 6066 §3 (SNI), RFC 3207 (STARTTLS of SMTP).
 */

import { setTimeout as delay } from "node:timers/promises";
import { CommandError, expand, runCommand } from "./actions.ts";
import type { Endpoint, KeyType } from "./config.ts";
import { isIP } from "./names.ts";
import { type Certificate, readCertificate } from "./x509.ts";

/** A certificate that an endpoint should serve to those who ask for its type of key. */
export interface Expected {
  readonly keyType: KeyType;
  readonly certificate: Certificate;
}

/** An endpoint, and what is expected of it: one certificate for each type of key. */
export interface Target {
  /** Its words DOMAIN and DOMAINS_ALL replaced. */
  readonly endpoint: Endpoint;
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
  /** What should be served. */
  readonly expected: Certificate;
  /** Why there is no certificate. */
  readonly detail?: string;
}

/** What probes need of the world. */
export interface World {
  /** Addresses of a name; in production reach.ts's resolveAddresses(). Rejects, or is empty, where there are none. */
  readonly resolve: (host: string) => Promise<readonly string[]>;
  /** How long one connection may take. */
  readonly timeoutSeconds: number;
  readonly signal?: AbortSignal;
}

/** How many connections are open at once, each a process of some 10 MB. */
const CONNECTIONS = 8;
/** How long a service gets to serve what it was given: most reload in a second, some restart in a minute. */
const DEADLINE_SECONDS = 60;
/** Pauses between looks. */
const FIRST_PAUSE_SECONDS = 0.5;
const LONGEST_PAUSE_SECONDS = 8;

/**
 * What makes a server choose its certificate of one type: the signature algorithms in TLS 1.3, the cipher
 * suites in TLS 1.2. PKCS#1 signatures stand with ECDSA for the sake of servers that also look at how the
 * certificate itself was signed, which may be with the RSA key of a CA; TLS 1.3 uses them for nothing else.
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
 * Connects once to every address of every target for each certificate expected there, some at once.
 *
 * @returns findings in the order of the targets
 * @throws CommandError where there is no openssl; the signal's reason when that aborts
 */
export async function probe(targets: readonly Target[], world: World): Promise<Served[]> {
  return await lookAll(await looksAt(targets, world), world);
}

/**
 * Probes the targets until all serve what is expected, again and again with growing pauses, or until the
 * deadline.
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
  const looks = await looksAt(targets, world);
  const found = new Map<Look, Served>(); // keeps the order in which its keys were first set
  let behind = looks;
  for (let pause = FIRST_PAUSE_SECONDS;; pause = Math.min(pause * 2, LONGEST_PAUSE_SECONDS)) {
    for (const [n, served] of (await lookAll(behind, world)).entries()) found.set(behind[n]!, served);
    behind = looks.filter((look) => look.address !== "" && found.get(look)!.state !== "current");
    if (behind.length === 0 || performance.now() + pause * 1000 > deadline) return [...found.values()];
    await delay(pause * 1000, undefined, { signal: world.signal });
  }
}

/** One connection to make: to one address, for one type of key. */
interface Look {
  readonly endpoint: Endpoint;
  /** Empty where the name has none; `fault` says why. */
  readonly address: string;
  readonly fault?: string;
  readonly expected: Expected;
}

async function looksAt(targets: readonly Target[], world: World): Promise<Look[]> {
  const looks = targets.map(async ({ endpoint, expected }) => {
    const places = await placesOf(endpoint.host, world);
    return places.flatMap((place) => expected.map((expected) => ({ endpoint, ...place, expected })));
  });
  return (await Promise.all(looks)).flat();
}

async function placesOf(host: string, world: World): Promise<Pick<Look, "address" | "fault">[]> {
  try {
    const addresses = await world.resolve(host);
    return addresses.length > 0
      ? addresses.map((address) => ({ address }))
      : [{ address: "", fault: "no address" }];
  } catch (error) {
    return [{ address: "", fault: `no address: ${(error as Error).message}` }];
  }
}

async function lookAll(looks: readonly Look[], world: World): Promise<Served[]> {
  const found: Served[] = [];
  const queue = looks.entries(); // shared by the workers: each takes the next
  const work = async () => {
    for (const [n, look] of queue) found[n] = await lookOnce(look, world);
  };
  const workers = await Promise.allSettled(Array.from({ length: CONNECTIONS }, work)); // none outlives this
  for (const worker of workers) if (worker.status === "rejected") throw worker.reason;
  return found;
}

async function lookOnce({ endpoint, address, fault, expected }: Look, world: World): Promise<Served> {
  const { keyType, certificate: wanted } = expected;
  const place = { endpoint: endpoint.text, address, keyType, expected: wanted };
  if (fault !== undefined) return { ...place, state: "unreachable", detail: fault };

  const sni = endpoint.sni ?? (isIP(endpoint.host) ? undefined : endpoint.host);
  const command = expand("exec openssl s_client -connect PLACE SNI STARTTLS ASK_FOR", {
    PLACE: `${isIP(address) === 6 ? `[${address}]` : address}:${endpoint.port}`,
    SNI: sni === undefined ? ["-noservername"] : ["-servername", sni],
    STARTTLS: endpoint.starttls === undefined ? [] : ["-starttls", endpoint.starttls],
    ASK_FOR: ASK_FOR[keyType],
  });
  const ending = await runCommand({ command, values: {} }, world).catch((error) => {
    if (error instanceof CommandError && error.exitCode !== 127) return error;
    throw error;
  });

  // A certificate counts even where openssl fails after it, as with a server that wants one of ours
  if (ending.output.includes("-----BEGIN CERTIFICATE-----")) {
    try {
      const certificate = readCertificate(ending.output);
      return { ...place, state: compare(certificate, wanted), certificate };
    } catch {
      return { ...place, state: "other", detail: "a certificate that cannot be read" };
    }
  }
  if (ending instanceof CommandError && ending.timedOut) {
    return { ...place, state: "unreachable", detail: `no answer within ${world.timeoutSeconds} s` };
  }
  return { ...place, ...refusal(ending.output) };
}

function compare(served: Certificate, expected: Certificate): Served["state"] {
  if (served.fingerprint === expected.fingerprint) return "current";
  const names = new Set(served.names);
  const isOlder = served.notBefore <= expected.notBefore && expected.names.every((name) => names.has(name));
  return isOlder ? "old" : "other";
}

/** Why openssl got no certificate, from what it printed. */
function refusal(output: string): Pick<Served, "state" | "detail"> {
  if (/^Didn't find STARTTLS/m.test(output)) {
    return { state: "unreachable", detail: "STARTTLS is not offered" };
  }
  // "<thread>:error:<code>:<library>:<function>:<reason>:<file>:<line>:…", the first being the cause
  const reason = /:error:[^:]*:[^:]*:[^:]*:([^:\n]+)/.exec(output)?.[1] ?? "no certificate";
  if (/alert handshake failure/.test(reason)) {
    return { state: "other", detail: "no certificate of this type" };
  }
  return { state: / alert /.test(reason) ? "other" : "unreachable", detail: reason };
}
