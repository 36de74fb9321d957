/**
 * An HTTPS relay to a CA on loopback, on which answers can be changed on their way. The CA takes it for itself: it builds its
 * URLs from the name under which it is asked.
 */

import { listenerCertificate } from "./ca-x509.ts";

/** An answer on its way. */
export interface Answer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: string;
}

/** A running relay. */
export interface Relay extends AsyncDisposable {
  /** `https://127.0.0.1:PORT`. */
  readonly origin: string;
  /** PEM of the root of its listener. */
  readonly root: string;
}

/**
 * Starts a relay to `origin`, whose listener has the root `ca` (PEM). `change` is asked what the client gets instead of what
 * `ask` gets from the CA.
 */
export function startRelay(
  origin: string,
  ca: string,
  change: (path: string, ask: () => Promise<Answer>) => Promise<Answer>,
): Relay {
  const { root, certificate, key } = listenerCertificate();
  const client = Deno.createHttpClient({ caCerts: [ca], allowHost: true, http2: false });
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, cert: certificate, key, onListen: () => {} },
    async ({ method, url, headers, body }) => {
      const { pathname, search } = new URL(url);
      const sent = method === "POST" ? await new Response(body).arrayBuffer() : undefined;
      const host = `127.0.0.1:${server.addr.port}`;
      const ask = async () => {
        const init = { client, method, headers: { ...Object.fromEntries(headers), host }, body: sent };
        const answer = await fetch(origin + pathname + search, { ...init, redirect: "manual" });
        const { "content-length": _, ...passed } = Object.fromEntries(answer.headers);
        return { status: answer.status, headers: passed, body: await answer.text() };
      };
      const { status, headers: changed, body: text } = await change(pathname, ask);
      return new Response(text === "" ? null : text, { status, headers: changed });
    },
  );
  return {
    origin: `https://127.0.0.1:${server.addr.port}`,
    root,
    async [Symbol.asyncDispose]() {
      await server.shutdown();
      client.close();
    },
  };
}
