/**
 * The wire of the test CA: its HTTPS listener, and the faults that befall an exchange on its way.
 *
 * It knows sockets and answers, nothing of ACME. Deno.serve cannot drop a connection, so where faults are
 * wanted a byte-copying relay stands before it, and tearing is done there; without faults nothing stands
 * between.
 */

/** An answer before it is put on the wire. `body` is JSON text, PEM, or absent. */
export interface Answer {
  readonly status: number;
  readonly headers: Headers;
  readonly body?: string;
}

/**
 * What befalls one exchange.
 *
 * Never handled by the CA: `reset` (torn before an answer), `refuse` (the same, and the next connection is
 * torn as well), `silence` (no answer until the CA closes), `status`, `html` (200), `badNonce`, `repeat` (the
 * last answer given to the same URL; handled if there was none).
 * Handled first: `reset mid-body`, `truncate` (JSON or PEM cut in half, well framed), `drop header`,
 * `rewrite` and `rewrite text` (get the parsed JSON or the text, and return what is sent instead), and `after`:
 * the CA's state changes, then its answer is lost to the fault within.
 */
export type Fault =
  | { kind: "reset" | "refuse" | "silence" | "reset mid-body" | "badNonce" | "truncate" | "html" | "repeat" }
  | { kind: "status"; status: number; headers?: Record<string, string>; body?: string; contentType?: string }
  | { kind: "drop header"; name: string }
  | { kind: "rewrite"; rewrite: (body: Record<string, unknown>) => unknown }
  | { kind: "rewrite text"; rewrite: (body: string) => string }
  | { kind: "after"; fault: Fault };

/** What a fault may need of the CA and of the connection that carries the exchange. */
export interface Scene {
  /** Handles the request as if nothing were wrong. */
  handle(): Promise<Answer>;
  /** Tears the connection; `andNext`: the next one too. */
  tear(andNext: boolean): void;
  /** Aborted when the CA closes. */
  readonly closing: AbortSignal;
  badNonce(): Answer;
  /** The last answer given to this URL. */
  readonly previous: Answer | undefined;
}

/**
 * Lets `fault` befall an exchange; gives the answer that was made (or pretended) and what goes onto the wire.
 */
export async function befall(
  fault: Fault | undefined,
  scene: Scene,
): Promise<{ answer?: Answer; response: Response }> {
  const answered = (answer: Answer) => ({ answer, response: responseOf(answer) });
  switch (fault?.kind) {
    case undefined:
      return answered(await scene.handle());
    case "reset":
    case "refuse":
      scene.tear(fault.kind === "refuse");
      return { response: new Response(null, { status: 500 }) }; // goes nowhere
    case "silence":
      await new Promise((resolve) => scene.closing.addEventListener("abort", resolve, { once: true }));
      return { response: new Response(null, { status: 503 }) };
    case "status": {
      const { status, body, contentType = "application/problem+json" } = fault;
      return answered({
        status,
        headers: new Headers({ "content-type": contentType, ...fault.headers }),
        body,
      });
    }
    case "html": {
      const headers = new Headers({ "content-type": "text/html; charset=utf-8" });
      return answered({
        status: 200,
        headers,
        body: "<!doctype html><title>Sign in</title><h1>Hotel Wi-Fi</h1>",
      });
    }
    case "badNonce":
      return answered(scene.badNonce());
    case "repeat":
      return answered(scene.previous ?? await scene.handle());
    case "truncate": {
      const answer = await scene.handle();
      return answered({ ...answer, body: answer.body?.slice(0, answer.body.length / 2) });
    }
    case "drop header": {
      const answer = await scene.handle();
      answer.headers.delete(fault.name);
      return answered(answer);
    }
    case "rewrite": {
      const answer = await scene.handle();
      return answered({ ...answer, body: JSON.stringify(fault.rewrite(JSON.parse(answer.body ?? "{}"))) });
    }
    case "rewrite text": {
      const answer = await scene.handle();
      return answered({ ...answer, body: fault.rewrite(answer.body ?? "") });
    }
    case "reset mid-body": {
      const answer = await scene.handle();
      return { answer, response: halfOf(answer) };
    }
    case "after": {
      const answer = await scene.handle();
      const { response } = await befall(fault.fault, { ...scene, handle: () => Promise.resolve(answer) });
      return { answer, response };
    }
  }
}

function responseOf({ status, headers, body }: Answer): Response {
  return new Response(body, { status, headers });
}

/**
 * An answer that ends before the length it announced: with HTTP/1.1 the connection is closed in the middle,
 * with HTTP/2 the stream is broken. (A stream that errors does the same, but Deno.serve prints that.)
 */
function halfOf({ status, headers, body = "" }: Answer): Response {
  const bytes = new TextEncoder().encode(body);
  const half = ReadableStream.from([bytes.subarray(0, bytes.length / 2)]);
  return new Response(half, {
    status,
    headers: new Headers([...headers, ["content-length", `${bytes.length}`]]),
  });
}

/** A listening HTTPS server on loopback. */
export interface Listener {
  readonly port: number;
  /** Tears the connection that `handler` knows under this number; only where `tearable`. */
  tear(connection: number, andNext: boolean): void;
  close(): Promise<void>;
}

/**
 * Listens with HTTP/2 and HTTP/1.1 on 127.0.0.1; port 0 takes a free one. `handler` gets a number that is the
 * same for all requests of one connection.
 */
export function listen(
  options: { port: number; cert: string; key: string; tearable: boolean },
  handler: (request: Request, connection: number) => Promise<Response>,
): Listener {
  const { cert, key } = options;
  const port = options.tearable ? 0 : options.port;
  const stop = new AbortController();
  const server = Deno.serve(
    { hostname: "127.0.0.1", port, cert, key, signal: stop.signal, onListen: () => {} },
    (request, info) => handler(request, info.remoteAddr.port),
  );
  const close = async () => {
    stop.abort(); // not shutdown(), which waits for clients that never say anything
    await server.finished;
  };
  if (!options.tearable) {
    return {
      port: server.addr.port,
      tear() {
        throw new Error("a CA that was started without `fault` cannot tear connections");
      },
      close,
    };
  }
  const relay = startRelay(options.port, server.addr.port);
  return {
    ...relay,
    async close() {
      await relay.close();
      await close();
    },
  };
}

/**
 * Copies bytes between clients and the server behind; the numbers of connections are the server's view of
 * them.
 */
function startRelay(port: number, behind: number): Listener {
  const listener = Deno.listen({ hostname: "127.0.0.1", port });
  const open = new Map<number, () => void>();
  let refusals = 0;

  async function carry(client: Deno.TcpConn): Promise<void> {
    if (refusals > 0) {
      refusals--;
      return client.close();
    }
    const server = await Deno.connect({ hostname: "127.0.0.1", port: behind }).catch(() => undefined);
    if (server === undefined) return client.close(); // it is closing
    const stop = new AbortController();
    open.set(server.localAddr.port, () => stop.abort());
    // Either direction may end first or break; what is wrong with a torn connection is nobody's concern here.
    const copy = (from: Deno.TcpConn, to: Deno.TcpConn) =>
      from.readable.pipeTo(to.writable, { signal: stop.signal }).catch(() => stop.abort());
    await Promise.all([copy(client, server), copy(server, client)]);
    open.delete(server.localAddr.port);
  }

  const carried = new Set<Promise<void>>();
  const accepting = (async () => {
    for await (const client of listener) {
      const done = carry(client).finally(() => carried.delete(done));
      carried.add(done);
    }
  })();
  return {
    port: listener.addr.port,
    tear(connection, andNext) {
      if (andNext) refusals++;
      open.get(connection)?.();
    },
    async close() {
      listener.close();
      for (const stop of open.values()) stop();
      await Promise.all([accepting, ...carried]);
    },
  };
}
