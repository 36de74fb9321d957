/**
 * Pebble, Let's Encrypt's own test CA (https://github.com/letsencrypt/pebble), as a process on loopback: an independent
 * implementation. It resolves names with the DNS server of ca-dns.ts, where a name exists after a test has set it.
 *
 * It runs the `pebble` on PATH: the newest (`go install`), or Debian's 2.4, which implements RFC 8555 and nothing later.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { type Bed, type Ran, until } from "./bed.ts";
import { type Further, startDns } from "./ca-dns.ts";
import { writeListener } from "./ca-x509.ts";
import { temporaryDirectory, which } from "./programs.ts";
import { accepts, freePort, startServer } from "./tls.ts";
import type { Context } from "../lib/context.ts";

export interface PebbleOptions {
  /** Port on which http-01 is fetched instead of 80. */
  readonly httpPort: number;
  /** Members of the object "pebble" of its configuration file. */
  readonly config?: Readonly<Record<string, unknown>>;
  readonly env?: Readonly<Record<string, string>>;
  /** Records in addition to those of its name server, in which names have no address until a test sets it. */
  readonly records?: Further;
}

const BINARY = which("pebble");
/** A Pebble newer than RFC 8555 contains the name of this challenge; no option prints what it supports. */
const isModern = BINARY !== undefined && readFileSync(BINARY).includes("dns-persist-01");

/** Deno.test() with Pebble; `modern` needs more than RFC 8555. The name of a skipped test contains the reason. */
export function pebbleTest(name: string, body: () => Promise<void>, { modern = false } = {}): void {
  const lack = BINARY === undefined
    ? " (no pebble on PATH)"
    : modern && !isModern
    ? " (pebble is too old)"
    : "";
  Deno.test({ name: name + lack, ignore: lack !== "", fn: body });
}

export async function startPebble({ httpPort, config, env, records }: PebbleOptions) {
  await using stack = new AsyncDisposableStack();
  const dns = stack.use(await startDns(records));
  const { path: directory } = stack.use(await temporaryDirectory());
  const caBundleFile = join(directory, "listener-root.pem");
  const root = await writeListener(directory);
  const [port, managementPort] = [freePort(), freePort()];
  const [acme, management] = [`127.0.0.1:${port}`, `127.0.0.1:${managementPort}`];
  const addresses = { listenAddress: acme, managementListenAddress: management };
  const identity = { certificate: "listener.pem", privateKey: "listener.key", keyAlgorithm: "ecdsa" };
  const pebble = { ...addresses, ...identity, httpPort, ...config };
  await Deno.writeTextFile(join(directory, "pebble.json"), JSON.stringify({ pebble }));
  const args = ["-config", "pebble.json", "-dnsserver", `127.0.0.1:${dns.port}`];
  const options = { cwd: directory, env: { PEBBLE_VA_NOSLEEP: "1", ...env } };
  stack.use(await startServer(BINARY!, args, port, options));
  await until("its management interface listens", () => accepts(managementPort));
  const client = stack.use(Deno.createHttpClient({ caCerts: [root] }));
  const manage = async (path: string, body?: unknown) => {
    const init = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
    const response = await fetch(`https://${management}${path}`, { ...init, client });
    const text = await response.text();
    if (!response.ok) throw new Error(`cannot ask Pebble for ${path}: ${response.status} ${text}`);
    return text;
  };
  /** PEM of the root of issued certificates; `chain` counts PEBBLE_ALTERNATE_ROOTS. */
  const rootPem = (chain = 0) => manage(`/roots/${chain}`);
  const open = stack.move();
  const close = () => open.disposeAsync();
  return {
    directoryUrl: `https://${acme}/dir`,
    caBundleFile,
    dns,
    rootPem,
    manage,
    [Symbol.asyncDispose]: close,
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
