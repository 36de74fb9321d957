/** The HTTP side of the test CA: problems, answers, faults, the HTTPS listener, and the web server for a drop directory. */
import { once } from "node:events";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { pipeline } from "node:stream";
import type { Identifier } from "./ca-x509.ts";

/** The JSON form of a problem (RFC 7807), as in answers, orders and challenges. */
export interface ProblemDocument {
  type: string;
  detail: string;
  status: number;
  identifier?: Identifier;
  subproblems?: ProblemDocument[];
}

/** Thrown to answer with a problem; `type` without the URN prefix. */
export class Problem extends Error {
  readonly document: ProblemDocument;
  constructor(
    readonly status: number,
    readonly type: string,
    detail: string,
    /** Whether a correct client never causes it. */
    readonly isViolation: boolean,
    readonly headers: Readonly<Record<string, string>> = {},
  ) {
    super(detail);
    this.document = { type: `urn:ietf:params:acme:error:${type}`, detail, status };
  }
}

export const violation = (status: number, type: string, detail: string) =>
  new Problem(status, type, detail, true);
export const malformed = (detail: string) => violation(400, "malformed", detail);
/** A problem that correct clients get as well: limits, failed validations. */
export const refusal = (status: number, type: string, detail: string, headers?: Record<string, string>) =>
  new Problem(status, type, detail, false, headers);

export interface Answer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body?: string;
  readonly isCut?: boolean;
}

export const json = (status: number, body: unknown, headers: Record<string, string> = {}): Answer => ({
  status,
  headers: { "content-type": "application/json", ...headers },
  body: JSON.stringify(body),
});

/**
 * A fault in one exchange.
 *
 * Instead of handling the request: `reset` (breaks the connection before an answer), `refuse` (breaks the next connection as
 * well), `silence` (no answer until the CA closes), `status`, `html` (200), `badNonce`, `repeat` (the previous answer for the
 * same URL; handles the request if there is none).
 * After handling the request: `reset mid-body`, `truncate` (half of the JSON or PEM, with a valid content length), `drop header`,
 * `rewrite` (changes the parsed JSON), `rewrite text`, and `after` (the other fault, although the request was handled).
 */
export type Fault =
  | { kind: "reset" | "refuse" | "silence" | "reset mid-body" | "badNonce" | "truncate" | "html" | "repeat" }
  | { kind: "status"; status: number; headers?: Record<string, string>; body?: string; contentType?: string }
  | { kind: "drop header"; name: string }
  | { kind: "rewrite"; rewrite: (body: Record<string, unknown>) => unknown }
  | { kind: "rewrite text"; rewrite: (body: string) => string | Promise<string> }
  | { kind: "after"; fault: Fault };

export const HTML = "<!doctype html><title>Sign in</title><h1>Hotel Wi-Fi</h1>";

export function respond({ status, headers, body, isCut = false }: Answer, now: Date): Response {
  const all = { ...headers, date: now.toUTCString() };
  if (!isCut) return new Response(body, { status, headers: all });
  // too short a body breaks an HTTP/1.1 connection or an HTTP/2 stream
  const bytes = new TextEncoder().encode(body);
  const half = ReadableStream.from([bytes.subarray(0, bytes.length / 2)]);
  return new Response(half, { status, headers: { ...all, "content-length": `${bytes.length}` } });
}

export type Server = Awaited<ReturnType<typeof listen>>;

/**
 * Serves HTTP/2 and HTTP/1.1 on 127.0.0.1; `handler` gets the same number for all requests of one connection. Since
 * Deno.serve() cannot break a connection, clients connect to a relay that copies bytes.
 */
export async function listen(
  { certificate, key }: { certificate: string; key: string },
  handler: (request: Request, connection: number) => Promise<Response>,
) {
  const stop = new AbortController();
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, cert: certificate, key, signal: stop.signal, onListen: () => {} },
    (request, info) => handler(request, info.remoteAddr.port),
  );
  let refusals = 0;
  const open = new Map<number, Socket>();
  const relay = createServer({ noDelay: true }, (client) => {
    if (refusals > 0) {
      refusals--;
      return client.destroy();
    }
    const upstream = connect({ port: server.addr.port, host: "127.0.0.1", noDelay: true });
    upstream.on("connect", () => {
      const number = upstream.localPort!;
      open.set(number, client.on("close", () => open.delete(number)));
    });
    pipeline(client, upstream, client, () => {}); // closes one if the other breaks
  });
  relay.listen(0, "127.0.0.1");
  await once(relay, "listening");
  return {
    port: (relay.address() as AddressInfo).port,
    /** Breaks a connection, and the next one too if `alsoNext`. */
    break(connection: number, alsoNext: boolean) {
      if (alsoNext) refusals++;
      open.get(connection)?.destroy();
    },
    async [Symbol.asyncDispose]() {
      relay.close();
      for (const client of open.values()) client.destroy();
      stop.abort(); // not shutdown(), which waits for idle clients
      await server.finished;
    },
  };
}

export type Webroot = ReturnType<typeof startWebroot>;

/** Serves `dir` on loopback below /.well-known/acme-challenge/, and 404 for all other paths. */
export function startWebroot(dir: string, { hostname = "127.0.0.1", port = 0 } = {}) {
  const log: { readonly status: number }[] = [];
  const stop = new AbortController();
  const server = Deno.serve({ hostname, port, signal: stop.signal, onListen: () => {} }, async ({ url }) => {
    const [, token] = /\/\.well-known\/acme-challenge\/([A-Za-z0-9_-]+)$/.exec(url) ?? [];
    const content = token && await Deno.readTextFile(`${dir}/${token}`).catch(() => undefined);
    const status = content === undefined ? 404 : 200;
    log.push({ status });
    return new Response(content ?? "not found\n", { status });
  });
  const close = async () => {
    stop.abort();
    await server.finished;
  };
  return { port: server.addr.port, log, [Symbol.asyncDispose]: close };
}
