/**
 * The HTTP side of the test CA: problems, answers, the faults injected into them, the HTTPS listener, and the web server for a
 * drop directory. Deno.serve cannot break a connection; so with faults, clients connect to a relay that copies bytes, and the
 * relay breaks connections.
 */
import type { Identifier } from "./ca-x509.ts";

/** The JSON form of a problem (RFC 7807), as in answers, orders and challenges. */
export interface ProblemDocument {
  type: string;
  detail: string;
  status?: number;
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
    /** Whether a correct client never causes it; then it is added to `ca.violations`. */
    readonly isViolation: boolean,
    readonly headers: Readonly<Record<string, string>> = {},
    extra: Partial<ProblemDocument> = {},
  ) {
    super(detail);
    this.document = { type: `urn:ietf:params:acme:error:${type}`, detail, status, ...extra };
  }
}

/** A problem that a correct client never causes. */
export const violation = (status: number, type: string, detail: string) =>
  new Problem(status, type, detail, true);
export const malformed = (detail: string) => violation(400, "malformed", detail);
/** A problem that correct clients get as well: limits, failed validations. */
export const refusal = (
  status: number,
  type: string,
  detail: string,
  extra?: Partial<ProblemDocument>,
  headers?: Record<string, string>,
) => new Problem(status, type, detail, false, headers, extra);

/** An answer before it is sent. `body` is JSON, PEM, or undefined. */
export interface Answer {
  readonly status: number;
  readonly headers: Headers;
  readonly body?: string;
}

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

/** What a fault uses of the CA and the connection. */
export interface Scene {
  /** Handles the request without a fault. */
  handle(): Promise<Answer>;
  /** Breaks the connection, and the next one too if `alsoNext`. */
  break(alsoNext: boolean): void;
  readonly closing: AbortSignal;
  badNonce(): Answer;
  /** The previous answer for this URL. */
  readonly previous: Answer | undefined;
}

/** Answers an exchange with `fault`. `answer` is for the log, `response` is sent. */
export async function answerUnder(
  fault: Fault | undefined,
  scene: Scene,
): Promise<{ answer?: Answer; response: Response }> {
  const sent = (answer: Answer) => {
    const { status, headers, body } = answer;
    return { answer, response: new Response(body, { status, headers }) };
  };
  const changed = async (change: (answer: Answer) => Partial<Answer> | Promise<Partial<Answer>>) => {
    const answer = await scene.handle();
    return sent({ ...answer, ...await change(answer) });
  };
  switch (fault?.kind) {
    case undefined:
      return sent(await scene.handle());
    case "reset":
    case "refuse":
      scene.break(fault.kind === "refuse");
      return { response: new Response(null, { status: 500 }) }; // never sent: the connection is broken
    case "silence":
      await new Promise((resolve) => scene.closing.addEventListener("abort", resolve, { once: true }));
      return { response: new Response(null, { status: 503 }) };
    case "status": {
      const { status, body, contentType = "application/problem+json", headers } = fault;
      return sent({ status, headers: new Headers({ "content-type": contentType, ...headers }), body });
    }
    case "html": {
      const headers = new Headers({ "content-type": "text/html; charset=utf-8" });
      return sent({
        status: 200,
        headers,
        body: "<!doctype html><title>Sign in</title><h1>Hotel Wi-Fi</h1>",
      });
    }
    case "badNonce":
      return sent(scene.badNonce());
    case "repeat":
      return sent(scene.previous ?? await scene.handle());
    case "truncate":
      return await changed(({ body = "" }) => ({ body: body.slice(0, body.length / 2) }));
    case "drop header":
      return await changed(({ headers }) => (headers.delete(fault.name), {}));
    case "rewrite":
      return await changed(({ body = "{}" }) => ({ body: JSON.stringify(fault.rewrite(JSON.parse(body))) }));
    case "rewrite text":
      return await changed(async ({ body = "" }) => ({ body: await fault.rewrite(body) }));
    case "reset mid-body": {
      // too short a body closes an HTTP/1.1 connection or resets an HTTP/2 stream; Deno.serve would print the error of a failing stream
      const answer = await scene.handle();
      const bytes = new TextEncoder().encode(answer.body);
      const headers = new Headers([...answer.headers, ["content-length", `${bytes.length}`]]);
      const half = ReadableStream.from([bytes.subarray(0, bytes.length / 2)]);
      return { answer, response: new Response(half, { status: answer.status, headers }) };
    }
    case "after": {
      const answer = await scene.handle();
      const { response } = await answerUnder(fault.fault, {
        ...scene,
        handle: () => Promise.resolve(answer),
      });
      return { answer, response };
    }
  }
}

/** A listening HTTPS server on loopback. */
export interface Listener {
  readonly port: number;
  /** Breaks the connection with the number that `handler` got; only if `breakable`. */
  break(connection: number, alsoNext: boolean): void;
  close(): Promise<void>;
}

/** Serves HTTP/2 and HTTP/1.1 on 127.0.0.1; `handler` gets the same number for all requests of one connection. */
export function listen(
  { cert, key, breakable }: { cert: string; key: string; breakable: boolean },
  handler: (request: Request, connection: number) => Promise<Response>,
): Listener {
  const stop = new AbortController();
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, cert, key, signal: stop.signal, onListen: () => {} },
    (request, info) => handler(request, info.remoteAddr.port),
  );
  const relay = breakable ? startRelay(server.addr.port) : undefined;
  return {
    port: relay?.port ?? server.addr.port,
    break(connection, alsoNext) {
      if (relay === undefined) {
        throw new Error("a CA that was started without `fault` cannot break connections");
      }
      relay.break(connection, alsoNext);
    },
    async close() {
      await relay?.close();
      stop.abort(); // not shutdown(), which waits for idle clients
      await server.finished;
    },
  };
}

/** Copies bytes between clients and the server on a port. The number of a connection is its port towards the server. */
function startRelay(serverPort: number): Listener {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const open = new Map<number, AbortController>();
  let refusals = 0;

  async function relay(client: Deno.TcpConn): Promise<void> {
    if (refusals > 0) {
      refusals--;
      return client.close();
    }
    const server = await Deno.connect({ hostname: "127.0.0.1", port: serverPort }).catch(() => undefined);
    if (server === undefined) return client.close(); // the server is closing
    const stop = new AbortController();
    open.set(server.localAddr.port, stop);
    const copy = (from: Deno.TcpConn, to: Deno.TcpConn) =>
      from.readable.pipeTo(to.writable, { signal: stop.signal }).catch(() => stop.abort());
    await Promise.all([copy(client, server), copy(server, client)]);
    open.delete(server.localAddr.port);
  }

  const relaying = new Set<Promise<void>>();
  const accepting = (async () => {
    for await (const client of listener) {
      const done = relay(client).finally(() => relaying.delete(done));
      relaying.add(done);
    }
  })();
  return {
    port: listener.addr.port,
    break(connection, alsoNext) {
      if (alsoNext) refusals++;
      open.get(connection)?.abort();
    },
    async close() {
      listener.close();
      for (const stop of open.values()) stop.abort();
      await Promise.all([accepting, ...relaying]);
    },
  };
}

/** A web server for a drop directory. */
export interface Webroot extends AsyncDisposable {
  readonly port: number;
  /** The requests. */
  readonly log: readonly { readonly status: number }[];
  close(): Promise<void>;
}

/** Serves `dir` on loopback below /.well-known/acme-challenge/, and 404 for all other paths. */
export function startWebroot(dir: string, { hostname = "127.0.0.1", port = 0 } = {}): Webroot {
  const log: Webroot["log"][number][] = [];
  const stop = new AbortController();
  const server = Deno.serve({ hostname, port, signal: stop.signal, onListen: () => {} }, async (request) => {
    const { pathname } = new URL(request.url);
    const [, token] = /^\/\.well-known\/acme-challenge\/([A-Za-z0-9_-]+)$/.exec(pathname) ?? [];
    const content = token && await Deno.readTextFile(`${dir}/${token}`).catch(() => undefined);
    const status = content === undefined ? 404 : 200;
    log.push({ status });
    return new Response(content ?? "not found\n", { status, headers: { "content-type": "text/plain" } });
  });
  const close = async () => {
    stop.abort();
    await server.finished;
  };
  return { port: server.addr.port, log, close, [Symbol.asyncDispose]: close };
}
