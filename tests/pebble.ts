/**
 * Pebble, Let's Encrypt's own test CA (https://github.com/letsencrypt/pebble), as a process on loopback: the judge that
 * nobody here wrote. It resolves names by the DNS server of ca-dns.ts, where a name exists once a test has put it.
 *
 * It runs the `pebble` on PATH, whichever that is: the newest (`go install`), or Debian's 2.4, which knows RFC 8555 and
 * nothing that came after it. Nothing here knows lematt.
 */
import { existsSync, readFileSync } from "node:fs";
import { delimiter, join } from "node:path";
import { type Dns, type Further, startDns } from "./ca-dns.ts";
import { listenerCertificate } from "./ca-x509.ts";

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
const READY_WITHIN_MS = 20_000;

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
  const file = async (name: string, text: string) => {
    await Deno.writeTextFile(join(directory, name), text);
    return join(directory, name);
  };

  const listener = listenerCertificate();
  const caBundleFile = await file("root.pem", listener.root);
  const acme = freeAddress();
  let management = freeAddress();
  while (management === acme) management = freeAddress();
  const configuration = await file(
    "pebble.json",
    JSON.stringify({
      pebble: {
        listenAddress: acme,
        managementListenAddress: management,
        certificate: await file("listener.pem", listener.certificate),
        privateKey: await file("listener.key", listener.key),
        httpPort,
        keyAlgorithm: "ecdsa", // for a start in no time
        ...config,
      },
    }),
  );
  const child = new Deno.Command(BINARY!, {
    args: ["-config", configuration, "-dnsserver", `127.0.0.1:${dns.port}`],
    env: { PEBBLE_VA_NOSLEEP: "1", ...env },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const log = Promise.all([child.stdout, child.stderr].map((stream) => new Response(stream).text()));
  let ended = false;
  child.status.then(() => ended = true);
  stack.defer(async () => {
    if (!ended) child.kill();
    await log;
  });

  const client = stack.use(Deno.createHttpClient({ caCerts: [listener.root] }));
  const ask = async (url: string, body?: unknown) => {
    const init = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    const response = await fetch(url, { ...init, client });
    const text = await response.text();
    if (!response.ok) throw new Error(`Cannot ask Pebble for ${url}: ${response.status} ${text}`);
    return text;
  };
  const directoryUrl = `https://${acme}/dir`;
  const manage = (path: string, body?: unknown) => ask(`https://${management}${path}`, body);
  const rootPem = (chain = 0) => manage(`/roots/${chain}`);

  const deadline = Date.now() + READY_WITHIN_MS;
  for (;;) {
    try {
      await Promise.all([ask(directoryUrl), rootPem()]);
      break;
    } catch (error) {
      if (!ended && Date.now() < deadline) {
        await new Promise((resolve) => setTimeout(resolve, 10));
        continue;
      }
      if (!ended) child.kill();
      throw new Error(`Cannot start Pebble: ${(await log).join("")}`, { cause: error });
    }
  }
  const running = stack.move();
  return {
    directoryUrl,
    caBundleFile,
    dns,
    rootPem,
    manage,
    [Symbol.asyncDispose]: () => running.disposeAsync(),
  };
}

/**
 * A loopback address that was free a moment ago, for Pebble cannot choose its ports itself. It is below those that the
 * system gives away on its own, to whoever comes in between.
 */
export function freeAddress(): string {
  for (;;) {
    const port = 20_000 + Math.floor(Math.random() * 12_000);
    try {
      Deno.listen({ hostname: "127.0.0.1", port }).close();
      return `127.0.0.1:${port}`;
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
}
