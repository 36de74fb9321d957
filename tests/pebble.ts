/**
 * Pebble, Let's Encrypt's own test CA (https://github.com/letsencrypt/pebble), as a process on loopback: an independent
 * implementation. It resolves names with the DNS server of ca-dns.ts, where a name exists after a test has set it.
 *
 * It runs the `pebble` on PATH: the newest (`go install`), or Debian's 2.4, which implements RFC 8555 and nothing later.
 */
import { existsSync, readFileSync } from "node:fs";
import { delimiter, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { Context } from "../lib/context.ts";
import type { Bed, Ran } from "./bed.ts";
import { type Dns, type Further, startDns } from "./ca-dns.ts";
import { listenerCertificate } from "./ca-x509.ts";
import { freePort } from "./tls.ts";

/** How Pebble behaves. */
export interface PebbleOptions {
  /** Port on which http-01 is fetched instead of 80. */
  readonly httpPort: number;
  /**
   * Members of the object "pebble" of its configuration file. An old Pebble ignores unknown members. With
   * `domainBlocklist` it breaks the connection on names with fewer labels.
   */
  readonly config?: Readonly<Record<string, unknown>>;
  /** PEBBLE_VA_NOSLEEP is 1 here, which is not its own default. */
  readonly env?: Readonly<Record<string, string>>;
  /** Records in addition to those of `dns`. */
  readonly records?: Further;
}

/** A running Pebble. */
export interface Pebble extends AsyncDisposable {
  readonly directoryUrl: string;
  /** A file with the root certificate of its listeners. */
  readonly caBundleFile: string;
  /** Its name server; names have no address until `dns.set(name, "A", "127.0.0.1")`. */
  readonly dns: Dns;
  /** PEM of the root of issued certificates; `chain` counts PEBBLE_ALTERNATE_ROOTS. */
  rootPem(chain?: number): Promise<string>;
  /** Sends a request to its management interface, a POST if there is a body. Throws if the status is not 2xx. */
  manage(path: string, body?: unknown): Promise<string>;
}

const BINARY = (Deno.env.get("PATH") ?? "").split(delimiter)
  .map((directory) => join(directory, "pebble")).find((path) => existsSync(path));
/** A Pebble newer than RFC 8555 contains the name of this challenge; no option prints what it supports. */
const MODERN = BINARY !== undefined && readFileSync(BINARY).includes("dns-persist-01");
const READY_WITHIN_MS = 30_000;

/** Deno.test() with Pebble; `modern` needs more than RFC 8555. The name of a skipped test contains the reason. */
export function pebbleTest(name: string, body: () => Promise<void>, { modern = false } = {}): void {
  const lack = BINARY === undefined
    ? "no pebble on PATH"
    : modern && !MODERN
    ? "pebble is too old"
    : undefined;
  Deno.test({ name: lack ? `${name} (${lack})` : name, ignore: lack !== undefined, fn: body });
}

/** Starts Pebble on free loopback ports and waits until it answers. Throws with its log if it does not. */
export async function startPebble({ httpPort, config, env, records }: PebbleOptions): Promise<Pebble> {
  await using stack = new AsyncDisposableStack();
  const dns = stack.use(await startDns(records));
  const directory = await Deno.makeTempDir({ prefix: "lematt-pebble-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const { root, certificate, key } = await listenerCertificate();
  const files = { "root.pem": root, "listener.pem": certificate, "listener.key": key };
  for (const [name, text] of Object.entries(files)) await Deno.writeTextFile(join(directory, name), text);
  const launch = async (tries: number): Promise<Running & { management: string }> => {
    const [acme, management] = [freePort(), freePort()].map((port) => `127.0.0.1:${port}`) as [
      string,
      string,
    ];
    const pebble = {
      listenAddress: acme,
      managementListenAddress: management,
      certificate: "listener.pem",
      privateKey: "listener.key",
      httpPort,
      keyAlgorithm: "ecdsa", // starts faster
      ...config,
    };
    await Deno.writeTextFile(join(directory, "pebble.json"), JSON.stringify({ pebble }));
    const command = [BINARY!, "-config", "pebble.json", "-dnsserver", `127.0.0.1:${dns.port}`];
    const urls = [`https://${acme}/dir`, `https://${management}/roots/0`];
    const variables = { PEBBLE_VA_NOSLEEP: "1", ...env };
    try {
      return { management, ...await startProgram(directory, command, urls, () => root, variables) };
    } catch (error) {
      if (tries === 1 || !(error as Error).message.includes("address already in use")) throw error;
      return await launch(tries - 1); // another process has taken a port meanwhile
    }
  };
  const { management, directoryUrl, stop } = await launch(3);
  stack.defer(stop);

  const client = stack.use(Deno.createHttpClient({ caCerts: [root] }));
  const manage = async (path: string, body?: unknown) => {
    const init = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    const response = await fetch(`https://${management}${path}`, { ...init, client });
    const text = await response.text();
    if (!response.ok) throw new Error(`cannot ask Pebble for ${path}: ${response.status} ${text}`);
    return text;
  };
  const open = stack.move();
  return {
    directoryUrl,
    caBundleFile: join(directory, "root.pem"),
    dns,
    rootPem: (chain = 0) => manage(`/roots/${chain}`),
    manage,
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

/** A run in this process with another CA. Waits are cut to a twentieth, since that CA needs some real time. */
export async function runAt(bed: Bed, context: Partial<Context> = {}): Promise<Ran> {
  return await bed.run({
    retry: true,
    async sleep(ms) {
      await delay(ms / 20);
      bed.ca.advance(ms);
    },
    ...context,
  });
}

/** A running CA program. */
export interface Running {
  readonly directoryUrl: string;
  /** PEM of the root certificate of its listener. */
  readonly root: string;
  stop(): Promise<void>;
}

/** Starts a CA program and waits until it answers at all URLs, of which the first is the directory. */
export async function startProgram(
  directory: string,
  [program, ...args]: readonly string[],
  urls: readonly string[],
  root: () => string,
  env: Readonly<Record<string, string>> = {},
): Promise<Running> {
  const child = new Deno.Command(program!, {
    args,
    cwd: directory,
    env: { HOME: directory, ...env },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const log = Promise.all([child.stdout, child.stderr].map((stream) => new Response(stream).text()));
  const ended = new AbortController();
  child.status.then(() => ended.abort());
  const stop = async () => {
    if (!ended.signal.aborted) child.kill("SIGKILL");
    await log;
  };
  for (const deadline = Date.now() + READY_WITHIN_MS;;) {
    try {
      using client = Deno.createHttpClient({ caCerts: [root()] });
      const signal = AbortSignal.any([ended.signal, AbortSignal.timeout(5000)]); // another program may have the port
      for (const url of urls) await (await fetch(url, { client, signal })).text();
      return { directoryUrl: urls[0]!, root: root(), stop };
    } catch (error) {
      if (ended.signal.aborted || Date.now() > deadline) {
        await stop();
        throw new Error(`cannot start ${program}: ${(await log).join("").slice(-2000)}`, { cause: error });
      }
      await delay(20);
    }
  }
}
