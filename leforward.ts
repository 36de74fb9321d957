#!/usr/bin/env -S DENO_NO_UPDATE_CHECK=1 deno run -q --no-prompt -N -E=SSH_ORIGINAL_COMMAND --v8-flags=--max-semi-space-size=1
/**
 * leforward: a redirect server for a host that has no web server of its own.
 *
 * It redirects requests for http-01 challenges (RFC 8555 §8.3) to the host where lematt runs. Written to be the forced
 * command of an ssh key (conf/remote/authorized_keys), so it trusts neither side: the base URL must be one plain word,
 * and only a valid token of a request gets into the answer.
 *
 * One file without imports: copying it is installing it. It only listens: it opens no file and no connection.
 * Deno.serve would be shorter, but it never closes silent connections, and ends when file descriptors run out.
 * The V8 flag above keeps a flood of requests from doubling the memory (54 MB, else 117).
 */

const HELP = `leforward: send ACME http-01 challenges of this host on to another one

  leforward.ts --baseurl URL [--port N] [--host ADDRESS] [--allow URL]... [--lifetime MINUTES]

  --baseurl URL       where the challenges are served, such as http://central.example.com;
                      without it: the one word of SSH_ORIGINAL_COMMAND (for a forced command)
  --allow URL         accept this base URL and no other; may be repeated
  --port N            port to listen on; default 80, the one that a CA asks
  --host ADDRESS      address to listen on; default :: (every address, IPv6 and IPv4)
  --lifetime MINUTES  end after this time; default 60; 0 for a service: never

  http://here/.well-known/acme-challenge/TOKEN  ->  301  URL/.well-known/acme-challenge/TOKEN
  anything else                                 ->  404

It ends on INT, TERM and HUP, when its standard input closes and when its parent goes away.
Exit status: 0 ended as asked, 1 cannot listen on the port, 2 usage.`;

const MAX_HEAD = 8192; // bytes of a request; a CA's has about 300
const MAX_OPEN = 900; // connections; under 1024, a usual limit of open files, which Deno does not survive
const MAX_AGE_MS = 5_000; // of a connection; a CA sends its request immediately
const WATCH_MS = 200; // how often parent and connections are checked

// safe in a header: no user, query, fragment, blank, control character or shell text
const BASE_URL = /^https?:\/\/(\[[\da-f:.]+\]|[\w.-]+)(:\d+)?(\/[\w.~%/-]*)?$/i;
// origin form and absolute form (RFC 9112 §3.2); a token is base64url
const REQUEST =
  /^(?:GET|HEAD) (?:https?:\/\/[^\s/]+)?(\/\.well-known\/acme-challenge\/[\w-]+) HTTP\/1\.[01]\r?\n/;

function exit(status: number, text: string): never {
  console.error(`leforward: ${text}`);
  Deno.exit(status);
}

/** In quotes, and safe to print. */
function quoted(text: string): string {
  return JSON.stringify(text.slice(0, 200)).replace(/[^ -~]/g, "?");
}

const pause = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** The base URL without its last slash. */
function toBaseUrl(text: string): string {
  const url = BASE_URL.test(text) ? URL.parse(text) : null;
  if (!url) {
    exit(2, `cannot redirect to ${quoted(text)}: not an http(s) URL without user, query and fragment`);
  }
  return url.href.replace(/\/+$/, "");
}

function toNumber(text: string, option: string, most: number, form = /^\d{1,5}$/): number {
  const value = form.test(text) ? Number(text) : NaN;
  if (!(value <= most)) exit(2, `cannot use --${option} ${quoted(text)}: not a number from 0 to ${most}`);
  return value;
}

function readOptions(args: readonly string[], sshCommand: string | undefined) {
  const given: Record<string, string> = { port: "80", host: "::", lifetime: "60" };
  const allowed: string[] = [];
  for (let i = 0; i < args.length; i++) {
    const [, name, inline] = /^--(baseurl|allow|port|host|lifetime)(?:=(.*))?$/s.exec(args[i]!) ?? [];
    if (!name) exit(2, `cannot use ${quoted(args[i]!)}: not an option (see --help)`);
    const value = inline ?? args[++i];
    if (!value) exit(2, `cannot use --${name}: it needs a value (see --help)`);
    if (name === "allow") allowed.push(toBaseUrl(value));
    else given[name] = value;
  }
  const text = given.baseurl ?? sshCommand;
  if (!text) exit(2, "cannot redirect: neither --baseurl nor SSH_ORIGINAL_COMMAND names a URL (see --help)");
  const baseUrl = toBaseUrl(text);
  if (allowed.length > 0 && !allowed.includes(baseUrl)) {
    exit(2, `cannot redirect to ${quoted(baseUrl)}: --allow does not name it`);
  }
  return {
    baseUrl,
    port: toNumber(given.port!, "port", 65_535),
    hostname: given.host!,
    // setTimeout takes 35,791 minutes at most
    lifetimeMs: toNumber(given.lifetime!, "lifetime", 30_000, /^\d{1,5}(\.\d{1,3})?$/) * 60_000,
  };
}

/** Listens; if that fails, ends with a line that explains what to do. */
async function listen(hostname: string, port: number): Promise<Deno.TcpListener> {
  const deadline = Date.now() + 2000; // by then, one whose session is over has ended
  while (true) {
    try {
      return Deno.listen({ hostname, port });
    } catch (error) {
      const { code, message } = error as Error & { code?: string };
      const where = `cannot listen on port ${port} of ${quoted(hostname)}`;
      if (hostname === "::" && code === "EAFNOSUPPORT") {
        hostname = "0.0.0.0";
      } else if (code === "EADDRINUSE") {
        if (Date.now() < deadline) await pause(WATCH_MS);
        else {exit(
            1,
            `${where}: in use by another leforward, or by a web server, which can redirect by itself`,
          );}
      } else if (code === "EACCES") {
        exit(
          1,
          `${where}: it needs cap_net_bind_service; see conf/remote/README.md`,
        );
      } else {
        exit(1, `${where}: ${message}`);
      }
    }
  }
}

const connections = new Map<Deno.Conn, number>(); // -> time of arrival, oldest first

function close(connection: Deno.Conn): void {
  if (connections.delete(connection)) connection.close();
}

function closeOldest(): void {
  for (const connection of connections.keys()) return close(connection);
}

/** Buffers of connections that have ended, to be used again: the collection of new ones would cost more than the reading. */
const buffers: Uint8Array<ArrayBuffer>[] = [];

const latin1 = new TextDecoder("latin1");
const utf8 = new TextEncoder();

/** Reads one request, answers it and closes. An error ends this connection only. */
async function answer(connection: Deno.Conn, baseUrl: string): Promise<void> {
  connections.set(connection, Date.now());
  const bytes = buffers.pop() ?? new Uint8Array(2048);
  try {
    let head = "";
    while (!/\n\r?\n/.test(head)) {
      const length = await connection.read(bytes);
      if (length === null || head.length > MAX_HEAD) return;
      head += latin1.decode(bytes.subarray(0, length));
    }
    const path = REQUEST.exec(head)?.[1];
    const status = path ? `301 Moved Permanently\r\nLocation: ${baseUrl}${path}` : "404 Not Found";
    await connection.write(
      utf8.encode(`HTTP/1.1 ${status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n`),
    );
  } catch {
    // reset by the client, or too old and closed
  } finally {
    close(connection);
    buffers.push(bytes);
  }
}

function end(why: string): never {
  exit(0, `ended: ${why}`);
}

/** Ends the process when its session is over, with or without a terminal. */
function watch(lifetimeMs: number, overSsh: boolean): void {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    Deno.addSignalListener(signal, () => end(signal));
  }
  if (lifetimeMs > 0) setTimeout(() => end("its lifetime is over"), lifetimeMs);

  // sshd does not end a command that has no terminal: the parent changes when sshd ends. If that happened before
  // the next line, the parent is process 1 from the start.
  const parent = Deno.ppid;
  setInterval(() => {
    if (Deno.ppid !== parent || (overSsh && parent === 1)) end("its parent is gone");
    for (const [connection, since] of connections) {
      if (Date.now() - since < MAX_AGE_MS) break;
      close(connection);
    }
  }, WATCH_MS);
}

/**
 * Ends the process when standard input closes, unless it was closed from the start (cron, systemd, `ssh -n`; that
 * shows within a millisecond). A terminal is not read: its end is a HUP, and reading it in the background would stop
 * the process.
 */
async function watchInput(): Promise<void> {
  if (Deno.stdin.isTerminal()) return;
  const ignored = new Uint8Array(512);
  const closed = (async () => {
    while (await Deno.stdin.read(ignored).catch(() => null) !== null);
  })();
  const open = await Promise.race([pause(100).then(() => true), closed.then(() => false)]);
  if (open) closed.then(() => end("its standard input is closed"));
}

if (Deno.args.includes("--help")) {
  console.log(HELP);
  Deno.exit(0);
}
const sshCommand = Deno.env.get("SSH_ORIGINAL_COMMAND");
const { baseUrl, port, hostname, lifetimeMs } = readOptions(Deno.args, sshCommand);
watch(lifetimeMs, sshCommand !== undefined);
await watchInput();
const listener = await listen(hostname, port);
console.log(`leforward: port ${listener.addr.port} redirects to ${baseUrl}`);
while (true) {
  try {
    answer(await listener.accept(), baseUrl);
    if (connections.size > MAX_OPEN) closeOldest();
  } catch (error) {
    // an error of one connection, such as one that was reset before it was accepted, is ignored; if files or memory
    // have run out (accept(2)), the connection stays in the queue
    if (!/^E(MFILE|NFILE|NOBUFS|NOMEM)$/.test((error as { code?: string }).code ?? "")) continue;
    closeOldest();
    await pause(1);
  }
}
