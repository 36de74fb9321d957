/**
 * Pebble, Let's Encrypt's own test CA (https://github.com/letsencrypt/pebble), as a process on loopback: the judge that
 * nobody here wrote. It resolves names by the DNS server of ca-dns.ts, where a name exists once a test has put it.
 *
 * It runs the `pebble` on PATH, whichever that is: the newest (`go install`), or Debian's 2.4, which knows RFC 8555 and
 * nothing that came after it.
 */
import { existsSync, readFileSync } from "node:fs";
import { delimiter, join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { Context } from "../lib/context.ts";
import type { Bed, Ran } from "./bed.ts";
import { type Dns, type Further, startDns } from "./ca-dns.ts";
import { listenerCertificate } from "./ca-x509.ts";
import { freePort } from "./tls.ts";

/** How a Pebble is to behave. */
export interface PebbleOptions {
  /** Port on which http-01 is fetched instead of 80. */
  readonly httpPort: number;
  /**
   * Members of the object "pebble" of its configuration file. An old Pebble passes over what it does not know. With
   * `domainBlocklist` it breaks the connection on names with fewer labels.
   */
  readonly config?: Readonly<Record<string, unknown>>;
  /** PEBBLE_VA_NOSLEEP is 1 here, which is not its own default. */
  readonly env?: Readonly<Record<string, string>>;
  /** Records that it can resolve beside those of `dns`. */
  readonly records?: Further;
}

/** A running Pebble. */
export interface Pebble extends AsyncDisposable {
  readonly directoryUrl: string;
  /** A file with the root of its listeners: what a client must trust to talk to it. */
  readonly caBundleFile: string;
  /** All that it can resolve; names have no address until `dns.set(name, "A", "127.0.0.1")`. */
  readonly dns: Dns;
  /** PEM of the root of issued certificates; `chain` counts PEBBLE_ALTERNATE_ROOTS. */
  rootPem(chain?: number): Promise<string>;
  /** Asks its management interface, by POST where there is a body. Throws what is not 200. */
  manage(path: string, body?: unknown): Promise<string>;
}

const BINARY = (Deno.env.get("PATH") ?? "").split(delimiter)
  .map((directory) => join(directory, "pebble")).find((path) => existsSync(path));
/** A binary cannot be asked what it can do; but the newest challenge that it knows is named in it. */
const MODERN = BINARY !== undefined && readFileSync(BINARY).includes("dns-persist-01");
const READY_WITHIN_MS = 30_000;

/** Deno.test() for what needs Pebble, `modern` if by more than RFC 8555; a test that cannot run says why in its name. */
export function pebbleTest(name: string, body: () => Promise<void>, { modern = false } = {}): void {
  const lack = BINARY === undefined
    ? "no pebble on PATH"
    : modern && !MODERN
    ? "pebble is too old"
    : undefined;
  Deno.test({ name: lack ? `${name} (${lack})` : name, ignore: lack !== undefined, fn: body });
}

/** Starts Pebble on free loopback ports; it answers when this returns. Throws, with its log, if it does not. */
export async function startPebble({ httpPort, config, env, records }: PebbleOptions): Promise<Pebble> {
  await using stack = new AsyncDisposableStack();
  const dns = stack.use(await startDns(records));
  const directory = await Deno.makeTempDir({ prefix: "lematt-pebble-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const { root, certificate, key } = listenerCertificate();
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
      keyAlgorithm: "ecdsa", // for a start in no time
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
      return await launch(tries - 1); // another process has taken a port in between
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

/**
 * A run in this process at a CA that is another one, whose listener has this root (PEM). Its waits are cut to a twentieth: that CA
 * needs some of them.
 */
export async function runAt(root: string, bed: Bed, world: Partial<Context> = {}): Promise<Ran> {
  using client = Deno.createHttpClient({ caCerts: [root] });
  return await bed.run({
    retry: true,
    fetch: (url, init) => fetch(url, { ...init, client }),
    async sleep(ms) {
      await delay(ms / 20);
      bed.ca.advance(ms);
    },
    ...world,
  });
}

/** A program of a CA. */
export interface Running {
  readonly directoryUrl: string;
  /** PEM of what its own certificate is issued by. */
  readonly root: string;
  stop(): Promise<void>;
}

/** Starts the program of a CA, which answers at all URLs when this returns; the first is that of its directory. */
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
      const signal = AbortSignal.any([ended.signal, AbortSignal.timeout(5000)]); // it may be another's port
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
