/**
 * A plain web server over a drop directory, as a site's own server would have it: `dir` is served below
 * /.well-known/acme-challenge/, all else is 404. For the tests and the demo.
 */

/** A request that the web server answered. */
export interface Hit {
  readonly method: string;
  readonly host: string;
  readonly path: string;
  readonly status: number;
}

export interface Webroot extends AsyncDisposable {
  readonly port: number;
  readonly log: readonly Hit[];
  close(): Promise<void>;
}

/** Serves `dir` on a loopback address; port 0 takes a free one. */
export function startWebroot(dir: string, { hostname = "127.0.0.1", port = 0 } = {}): Webroot {
  const log: Hit[] = [];
  const stop = new AbortController();
  const server = Deno.serve({ hostname, port, signal: stop.signal, onListen: () => {} }, async (request) => {
    const { pathname: path } = new URL(request.url);
    const [, token] = /^\/\.well-known\/acme-challenge\/([A-Za-z0-9_-]+)$/.exec(path) ?? [];
    const content = token === undefined
      ? undefined
      : await Deno.readTextFile(`${dir}/${token}`).catch(() => undefined);
    const status = content === undefined ? 404 : 200;
    log.push({ method: request.method, host: request.headers.get("host") ?? "", path, status });
    return new Response(content ?? "not found\n", { status, headers: { "content-type": "text/plain" } });
  });
  const close = async () => {
    stop.abort(); // not shutdown(), which waits for clients that never say anything
    await server.finished;
  };
  return { port: server.addr.port, log, close, [Symbol.asyncDispose]: close };
}
