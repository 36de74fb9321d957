/**
 * What goes over the wire to and from the test CA: problems, answers, the faults injected into them, its HTTPS listener, and the
 * web server over a drop directory. Deno.serve cannot drop a connection, so where faults are wanted a relay that copies
 * bytes stands before it, and connections are torn there.
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

/** A refusal on its way to the client; `type` without the URN prefix. */
export class Problem extends Error {
  readonly document: ProblemDocument;
  constructor(
    readonly status: number,
    readonly type: string,
    detail: string,
    /** Whether a correct client never provokes it: it is noted in `ca.violations` then. */
    readonly isViolation: boolean,
    readonly headers: Readonly<Record<string, string>> = {},
    extra: Partial<ProblemDocument> = {},
  ) {
    super(detail);
    this.document = { type: `urn:ietf:params:acme:error:${type}`, detail, status, ...extra };
  }
}

/** What a correct client never provokes. */
export const violation = (status: number, type: string, detail: string) =>
  new Problem(status, type, detail, true);
export const malformed = (detail: string) => violation(400, "malformed", detail);
/** The CA's own decision (limits, a name that does not validate), which correct clients meet as well. */
export const refusal = (
  status: number,
  type: string,
  detail: string,
  extra?: Partial<ProblemDocument>,
  headers?: Record<string, string>,
) => new Problem(status, type, detail, false, headers, extra);

/** An answer before it is sent. `body` is JSON text, PEM, or absent. */
export interface Answer {
  readonly status: number;
  readonly headers: Headers;
  readonly body?: string;
}

/**
 * What goes wrong in one exchange.
 *
 * Never handled by the CA: `reset` (torn before an answer), `refuse` (the same, and the next connection is torn as
 * well), `silence` (no answer until the CA closes), `status`, `html` (200), `badNonce`, `repeat` (the last answer given
 * to the same URL; handled if there was none).
 * Handled first: `reset mid-body`, `truncate` (JSON or PEM cut in half, well framed), `drop header`, `rewrite` and
 * `rewrite text` (the parsed JSON or the text is changed), and `after`: the CA's state changes, then its answer is lost
 * to the fault within.
 */
export type Fault =
  | { kind: "reset" | "refuse" | "silence" | "reset mid-body" | "badNonce" | "truncate" | "html" | "repeat" }
  | { kind: "status"; status: number; headers?: Record<string, string>; body?: string; contentType?: string }
  | { kind: "drop header"; name: string }
  | { kind: "rewrite"; rewrite: (body: Record<string, unknown>) => unknown }
  | { kind: "rewrite text"; rewrite: (body: string) => string }
  | { kind: "after"; fault: Fault };

/** What a fault needs of the CA and of the connection. */
export interface Scene {
  /** Handles the request as if nothing were wrong. */
  handle(): Promise<Answer>;
  /** Tears the connection; `andNext`: the next one too. */
  tear(andNext: boolean): void;
  readonly closing: AbortSignal;
  badNonce(): Answer;
  /** The last answer given to this URL. */
  readonly previous: Answer | undefined;
}

/** Answers an exchange under `fault`: the answer that was made or pretended, and the response that is sent. */
export async function answerUnder(
  fault: Fault | undefined,
  scene: Scene,
): Promise<{ answer?: Answer; response: Response }> {
  const sent = (answer: Answer) => {
    const { status, headers, body } = answer;
    return { answer, response: new Response(body, { status, headers }) };
  };
  const changed = async (change: (answer: Answer) => Partial<Answer>) => {
    const answer = await scene.handle();
    return sent({ ...answer, ...change(answer) });
  };
  switch (fault?.kind) {
    case undefined:
      return sent(await scene.handle());
    case "reset":
    case "refuse":
      scene.tear(fault.kind === "refuse");
      return { response: new Response(null, { status: 500 }) }; // goes nowhere
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
      return await changed(({ body = "" }) => ({ body: fault.rewrite(body) }));
    case "reset mid-body": {
      // HTTP/1.1 closes the connection there, HTTP/2 breaks the stream; Deno.serve would print a stream that errors
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
  /** Tears the connection that `handler` knows under this number; only where `tearable`. */
  tear(connection: number, andNext: boolean): void;
  close(): Promise<void>;
}

/** Serves HTTP/2 and HTTP/1.1 on 127.0.0.1; `handler` gets the same number for all requests of one connection. */
export function listen(
  { cert, key, tearable }: { cert: string; key: string; tearable: boolean },
  handler: (request: Request, connection: number) => Promise<Response>,
): Listener {
  const stop = new AbortController();
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, cert, key, signal: stop.signal, onListen: () => {} },
    (request, info) => handler(request, info.remoteAddr.port),
  );
  const relay = tearable ? startRelay(server.addr.port) : undefined;
  return {
    port: relay?.port ?? server.addr.port,
    tear(connection, andNext) {
      if (relay === undefined) {
        throw new Error("a CA that was started without `fault` cannot tear connections");
      }
      relay.tear(connection, andNext);
    },
    async close() {
      await relay?.close();
      stop.abort(); // not shutdown(), which waits for clients that never say anything
      await server.finished;
    },
  };
}

/** Copies bytes between clients and the server behind; connections are numbered by its ports there. */
function startRelay(behind: number): Listener {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const open = new Map<number, AbortController>();
  let refusals = 0;

  async function relay(client: Deno.TcpConn): Promise<void> {
    if (refusals > 0) {
      refusals--;
      return client.close();
    }
    const server = await Deno.connect({ hostname: "127.0.0.1", port: behind }).catch(() => undefined);
    if (server === undefined) return client.close(); // it is closing
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
    tear(connection, andNext) {
      if (andNext) refusals++;
      open.get(connection)?.abort();
    },
    async close() {
      listener.close();
      for (const stop of open.values()) stop.abort();
      await Promise.all([accepting, ...relaying]);
    },
  };
}

/** A web server over a drop directory. */
export interface Webroot extends AsyncDisposable {
  readonly port: number;
  /** The requests that it answered. */
  readonly log: readonly { readonly status: number }[];
  close(): Promise<void>;
}

/** Serves `dir` on loopback below /.well-known/acme-challenge/, as a site's own server would; all else is 404. */
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
