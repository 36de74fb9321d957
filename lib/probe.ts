/**
 * Which certificate an endpoint serves: at each of its addresses, for each type of key, by TLS or STARTTLS.
 *
 * Each address is first contacted by Deno itself, so that a silent host costs a socket and no process. If it
 * answers, `openssl s_client` asks for the certificate: Deno cannot ask for the RSA or the ECDSA one (its node:tls
 * ignores `sigalgs` and `ciphers`). Chains are not checked here; endpoints.ts decides when to probe and what the
 * result means.
 *
 * RFC 8446 §4.2.3 (signature algorithms choose the certificate), RFC 5246 §7.4.2 (so does the cipher suite), RFC
 * 6066 §3 (SNI).
 */

import type { Endpoint, KeyType } from "./config.ts";
import { type Context, type Destination, isUnrouted, limit, settled, within } from "./context.ts";
import { isIP, oneLine } from "./names.ts";
import type { Sight } from "./state.ts";
import { type Certificate, readCertificate } from "./x509.ts";

/** What to probe: an endpoint, its words DOMAIN and DOMAINS_ALL replaced, for one type of key. */
export interface Target {
  readonly endpoint: Endpoint;
  readonly keyType: KeyType;
}

/** What one address serves to a client that asks for one type of key. */
export interface Probed {
  /** The endpoint as written. */
  readonly endpoint: string;
  /** Its IP address, without brackets; empty if the host has none. */
  readonly address: string;
  /** What was asked for. */
  readonly keyType: KeyType;
  /**
   * `served`: a certificate, by a server that has its key. `unfinished`: a certificate, but the handshake failed.
   * `refused`: no certificate of this type. `unreachable`: no answer, or no TLS. `passed over`: not probed, since
   * this host has no route to this address family, and the endpoint has addresses of the other.
   */
  readonly kind: Sight["kind"];
  /** Present for `served` and `unfinished`. */
  readonly certificate?: Certificate;
  /** Why it is not `served`. */
  readonly detail?: string;
}

/** Nothing can be probed without a usable openssl. */
export class ProbeError extends Error {
  override readonly name = "ProbeError";
}

/** How long an address may be silent: more than mail servers wait before they greet (postscreen: 6 s). */
const TIMEOUT_SECONDS = 10;
/** How many addresses of a name are probed at most; 4,000 would be an attack. */
const MOST_ADDRESSES = 32;
/** Processes of openssl in the whole program, some 8 MB each. */
const processes = limit(16);
/** Connections and DNS queries, in the whole program; 1,024 files are open to most programs. */
const contacts = limit(128);
/** s_client prints some 10 KB, most of it what the server sent. */
const OUTPUT_BYTES = 256 * 1024;

/** What one handshake shows. */
type Seen = Pick<Probed, "kind" | "certificate" | "detail">;

/** What one address shows. */
interface Visit {
  readonly address: string;
  /** This host has no route to the address. */
  readonly unrouted: boolean;
  readonly seen: ReadonlyMap<KeyType, readonly Seen[]>;
}

/**
 * Probes each address of each endpoint for each type of key: once if several targets name it, but `times` times in
 * a row, since a balancer gives each connection to another server.
 *
 * @returns in the order of the targets; several results for one address and type of key if its answers differ
 * @throws ProbeError without a usable openssl; the reason of the context's signal when that aborts
 */
export async function probe(
  targets: readonly Target[],
  context: Context,
  times = 1,
  timeoutSeconds = TIMEOUT_SECONDS,
): Promise<Probed[]> {
  if (targets.length === 0) return [];
  const round = new Round(context, await findOpenssl(context.signal), times, timeoutSeconds);
  const services = Map.groupBy(targets, ({ endpoint }) => serviceOf(endpoint));
  const visits = new Map(
    await settled([...services].map(async ([service, targets]) => {
      const keyTypes = new Set(targets.map(({ keyType }) => keyType));
      return [service, await round.visitAll(targets[0]!.endpoint, keyTypes)] as const;
    })),
  );
  const reached = familiesReached([...visits.values()].flat());
  const found = new Map<string, Probed[]>(); // in the order of the targets, each once
  for (const { endpoint, keyType } of targets) {
    const service = serviceOf(endpoint);
    const here = visits.get(service)!;
    const isElsewhere = here.some(({ unrouted }) => !unrouted);
    const probed = here.flatMap(({ address, unrouted, seen }) => {
      const isPassedOver = unrouted && isElsewhere && !reached.has(isIP(address));
      const passedOver = isPassedOver ? { kind: "passed over" as const } : {};
      return seen.get(keyType)!.map((one) => ({
        endpoint: endpoint.text,
        address,
        keyType,
        ...one,
        ...passedOver,
      }));
    });
    found.set(`${service} ${endpoint.text} ${keyType}`, probed);
  }
  return [...found.values()].flat();
}

/** Identifies what is probed, however it is written. */
function serviceOf(endpoint: Endpoint): string {
  const { host, port, starttls = "" } = endpoint;
  return [host, port, starttls, serverName(endpoint)].join(" ");
}

function serverName({ host, sni }: Endpoint): string | undefined {
  return sni ?? (isIP(host) ? undefined : host);
}

/** The address families to which this host has routes, not counting those to itself. */
function familiesReached(visits: readonly Visit[]): Set<number> {
  const reached = visits.filter(({ address, unrouted }) => !unrouted && !/^(127\.|::1$)/.test(address));
  return new Set(reached.map(({ address }) => isIP(address)));
}

/** The probes of one call. */
class Round {
  readonly #routes = new Map<string, Promise<readonly Destination[]>>();

  constructor(
    private readonly context: Context,
    private readonly openssl: Openssl,
    private readonly times: number,
    private readonly seconds: number,
  ) {}

  /** Visits every address of an endpoint. */
  async visitAll(endpoint: Endpoint, keyTypes: ReadonlySet<KeyType>): Promise<Visit[]> {
    const failed = (address: string, detail: string, unrouted = false): Visit => {
      const seen = [{ kind: "unreachable" as const, detail }];
      return { address, unrouted, seen: new Map([...keyTypes].map((keyType) => [keyType, seen])) };
    };
    let destinations: readonly Destination[];
    try {
      destinations = await this.#route(endpoint);
    } catch (error) {
      this.context.signal.throwIfAborted();
      return [failed("", `no address: ${oneLine((error as Error).message)}`)];
    }
    return await settled(destinations.map(async (destination) => {
      const { address } = destination;
      let failure = await contacts(() => this.#contact(endpoint, destination));
      // at random once more: otherwise a balancer that takes turns could give every probe to the same server
      if (failure === undefined && this.context.random() < 0.5) {
        failure = await contacts(() => this.#contact(endpoint, destination));
      }
      if (failure !== undefined) return failed(address, failure.detail, failure.unrouted);
      return { address, unrouted: false, seen: await this.#ask(endpoint, destination, keyTypes) };
    }));
  }

  /** Where an endpoint is reached; each host and port is resolved once. Throws if it has no address. */
  #route({ host, port }: Endpoint): Promise<readonly Destination[]> {
    const known = this.#routes.get(`${host} ${port}`);
    if (known !== undefined) return known;
    const found = contacts(async () => {
      if (host.startsWith("*")) throw new Error("a wildcard cannot be probed");
      using deadline = this.#deadline();
      const destinations = await within(deadline.signal, this.context.route(host, port));
      if (destinations.length === 0) throw new Error("no A or AAAA record");
      if (destinations.length > MOST_ADDRESSES) {
        this.context.warn(
          `${host} has ${destinations.length} addresses; ${MOST_ADDRESSES} of them are probed`,
        );
      }
      return destinations.slice(0, MOST_ADDRESSES);
    });
    this.#routes.set(`${host} ${port}`, found);
    return found;
  }

  #deadline() {
    return deadlineIn(this.seconds, this.context.signal);
  }

  /** Waits for any first answer of an address; returns why there is none. */
  async #contact(
    endpoint: Endpoint,
    { address, port }: Destination,
  ): Promise<{ detail: string; unrouted?: boolean } | undefined> {
    using deadline = this.#deadline();
    let connection: Deno.Conn | undefined;
    const hangUp = () => {
      try {
        connection?.close();
      } catch {
        // it is closed
      }
    };
    deadline.signal.addEventListener("abort", hangUp);
    try {
      const plain = connection = await Deno.connect({ hostname: address, port, signal: deadline.signal });
      if (endpoint.starttls === undefined) {
        // any end of the handshake is an answer
        const tls = connection = await Deno.startTls(plain, { hostname: serverName(endpoint) ?? address });
        deadline.signal.throwIfAborted(); // it has closed the plain connection only
        await tls.handshake();
      } else {
        const first = FIRST_MESSAGE[endpoint.starttls];
        if (first !== undefined) await plain.write(first);
        await plain.read(new Uint8Array(1));
      }
    } catch (error) {
      this.context.signal.throwIfAborted();
      if (deadline.signal.aborted) {
        return {
          detail: connection ? `silent for ${this.seconds} s` : `no connection within ${this.seconds} s`,
        };
      }
      if (connection !== undefined) return undefined; // it has answered, if only with an error
      if (await isUnrouted(address, error)) {
        return { detail: "this host has no route to the address", unrouted: true };
      }
      return { detail: (error as Error).message.replace(/ \(os error \d+\)$/, "") };
    } finally {
      hangUp();
    }
  }

  /** Asks an address for one type of key after the other: alternating could match the turns of a balancer. */
  async #ask(endpoint: Endpoint, destination: Destination, keyTypes: ReadonlySet<KeyType>) {
    const all = new Map<KeyType, Seen[]>();
    let silent: Seen | undefined;
    for (const keyType of keyTypes) {
      const distinct = new Map<string, Seen>();
      for (let i = 0; i < this.times; i++) {
        const seen = silent ?? await processes(() => this.#askOnce(endpoint, destination, keyType)) ??
          (silent = { kind: "unreachable", detail: `no handshake within ${this.seconds} s` });
        distinct.set(`${seen.kind} ${seen.certificate?.fingerprint} ${seen.detail}`, seen);
        if (seen.kind === "unreachable") break;
      }
      all.set(keyType, [...distinct.values()]);
    }
    return all;
  }

  /** Undefined if there was no handshake in time. */
  async #askOnce(
    endpoint: Endpoint,
    { address, port }: Destination,
    keyType: KeyType,
  ): Promise<Seen | undefined> {
    const name = serverName(endpoint);
    using deadline = this.#deadline();
    const { stdout, stderr } = await this.openssl([
      ...["-connect", `${isIP(address) === 6 ? `[${address}]` : address}:${port}`],
      ...(name === undefined ? ["-noservername"] : ["-servername", name]),
      ...(endpoint.starttls === undefined ? [] : ["-starttls", endpoint.starttls]),
      ...ASK_FOR[keyType],
    ], deadline.signal);
    this.context.signal.throwIfAborted();
    return deadline.signal.aborted ? undefined : readOutput(stdout, stderr, endpoint);
  }
}

/** What the client sends first if the server waits: LDAP's StartTLS (RFC 4511 §4.14), PostgreSQL's SSLRequest. */
const FIRST_MESSAGE: Readonly<Record<string, Uint8Array<ArrayBuffer>>> = {
  ldap: Uint8Array.fromHex("301d02010177188016" + "312e332e362e312e342e312e313436362e3230303337"),
  postgres: Uint8Array.fromHex("0000000804d2162f"),
};

// ---- openssl ---------------------------------------------------------------------------------------

/** s_client with these arguments: what it prints until it ends or the signal aborts. */
type Openssl = (args: readonly string[], signal: AbortSignal) => Promise<{ stdout: string; stderr: string }>;

/**
 * A server chooses the type of its certificate by the signature algorithms in TLS 1.3, by the cipher suites in TLS
 * 1.2. PKCS#1 signatures are offered with ECDSA, too, for servers that check how the certificate itself was signed,
 * perhaps with the RSA key of a CA; TLS 1.3 uses them for nothing else. Level 0 also shows certificates too weak to
 * be trusted.
 */
const ASK_FOR: Readonly<Record<KeyType, readonly string[]>> = {
  rsa: [
    ...["-cipher", "aRSA:@SECLEVEL=0", "-sigalgs"],
    "RSA-PSS+SHA256:RSA-PSS+SHA384:RSA-PSS+SHA512:RSA+SHA256:RSA+SHA384:RSA+SHA512",
  ],
  ec: [
    ...["-cipher", "aECDSA:@SECLEVEL=0", "-sigalgs"],
    "ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512:RSA+SHA256:RSA+SHA384:RSA+SHA512",
  ],
};

/** The openssl of this host. Throws ProbeError if it cannot ask for a type of key. */
async function findOpenssl(signal: AbortSignal): Promise<Openssl> {
  using deadline = deadlineIn(TIMEOUT_SECONDS, signal);
  const { stdout, stderr } = await spawnOpenssl(["s_client", "-help"], deadline.signal);
  signal.throwIfAborted();
  const options = new Set((stdout + stderr).match(/(?<=^ +)-[\w-]+/gm));
  const lacking = ["-sigalgs", "-noservername", "-state"].filter((option) => !options.has(option));
  if (lacking.length > 0) {
    const which = `which lacks the options ${lacking.join(" ")} of s_client`;
    throw new ProbeError(
      `cannot probe with this openssl, ${which}: OpenSSL 1.1.1 or newer is needed, not LibreSSL`,
    );
  }
  // reading the trusted roots would take longer than the handshake
  const rootless = ["-no-CAfile", "-no-CApath", "-no-CAstore"].filter((option) => options.has(option));
  return (args, signal) => spawnOpenssl(["s_client", "-state", ...rootless, ...args], signal);
}

/** Runs openssl until it ends or the signal aborts. Throws ProbeError if it cannot be run. */
const spawnOpenssl: Openssl = async (args, signal) => {
  let child: Deno.ChildProcess;
  try {
    child = new Deno.Command("openssl", {
      args: [...args],
      stdin: "null", // s_client ends after the handshake
      stdout: "piped",
      stderr: "piped",
      signal,
    }).spawn();
  } catch (error) {
    throw new ProbeError(
      error instanceof Deno.errors.NotFound
        ? "cannot find openssl, which probes need"
        : `cannot run openssl, which probes need: ${(error as Error).message}`,
    );
  }
  const [stdout, stderr] = await Promise.all([
    readText(child.stdout, signal),
    readText(child.stderr, signal),
    child.status,
  ]);
  return { stdout, stderr };
};

async function readText(
  stream: ReadableStream<Uint8Array<ArrayBuffer>>,
  signal: AbortSignal,
): Promise<string> {
  const reader = stream.getReader({ mode: "byob" }); // with a small buffer instead of 64 KB for each chunk
  const cancel = () => void reader.cancel();
  signal.addEventListener("abort", cancel);
  const decoder = new TextDecoder();
  let text = "";
  for (let buffer = new Uint8Array(8192);;) {
    const { value, done } = await reader.read(buffer);
    if (done || value === undefined) break;
    if (text.length < OUTPUT_BYTES) text += decoder.decode(value, { stream: true });
    buffer = new Uint8Array(value.buffer);
  }
  signal.removeEventListener("abort", cancel);
  return text;
}

/**
 * What s_client printed. With `-state` it prints each message of the handshake that it has read and found good.
 *
 * A server has proven that it has the key when the handshake is finished, and also when it asks for a certificate
 * of ours and breaks off without it: its signature has been checked by then.
 */
function readOutput(stdout: string, stderr: string, { starttls }: Endpoint): Seen {
  const hasRead = (message: string) =>
    new RegExp(`^SSL_connect:(?!error).* read ${message}`, "m").test(stderr);
  // "<thread>:error:<code>:<library>:<function>:<reason>:<file>:<line>:SSL alert number <n>", the first being the cause
  const [, reason, rest = ""] = /:error:[^:]*:[^:]*:[^:]*:([^:\n]+)(.*)/.exec(stderr) ?? [];
  const alert = /SSL alert number (\d+)/.exec(rest)?.[1];
  const badSignature = /:bad signature:/.test(stderr)
    ? "signed by another key than the certificate's"
    : undefined;
  const pem = /-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/.exec(stdout)?.[0];
  // it has shown a certificate of a type that was not asked for
  const otherType = /^wrong (signature|certificate) type/.test(reason ?? "");
  if (pem !== undefined && !otherType) {
    let certificate: Certificate;
    try {
      certificate = readCertificate(pem);
    } catch (error) {
      return { kind: "refused", detail: `the certificate cannot be read: ${(error as Error).message}` };
    }
    const isProven = hasRead("finished") ||
      (hasRead("server certificate request") && hasRead("server key exchange"));
    return isProven ? { kind: "served", certificate } : {
      kind: "unfinished",
      certificate,
      detail: badSignature ?? reason ?? "the handshake was not finished",
    };
  }
  // 40: handshake_failure (RFC 8446 §6.2)
  if (otherType || alert === "40") return { kind: "refused", detail: "no certificate of this type" };
  if (alert !== undefined) return { kind: "refused", detail: reason };
  const isPlain = reason === "wrong version number" || reason === "packet length too long";
  if (starttls !== undefined && (isPlain || !/^SSL_connect:/m.test(stderr))) {
    return { kind: "unreachable", detail: "STARTTLS is not offered" };
  }
  if (isPlain) return { kind: "unreachable", detail: "does not speak TLS" };
  const isClosed = reason === undefined || reason.startsWith("unexpected eof");
  return { kind: "unreachable", detail: isClosed ? "closes the connection in the handshake" : reason };
}

// ---- waiting ---------------------------------------------------------------------------------------

/** A signal that aborts when time is up, or when `parent` does. AbortSignal.timeout() would leave its timer behind. */
function deadlineIn(seconds: number, parent: AbortSignal): Disposable & { readonly signal: AbortSignal } {
  parent.throwIfAborted();
  const controller = new AbortController();
  const abort = () => controller.abort(parent.reason ?? new Error(`no answer within ${seconds} s`));
  const timer = setTimeout(abort, seconds * 1000);
  parent.addEventListener("abort", abort);
  return {
    signal: controller.signal,
    [Symbol.dispose]() {
      clearTimeout(timer);
      parent.removeEventListener("abort", abort);
    },
  };
}
