/**
 * An HTTPS relay to a CA on loopback that can change answers. The CA puts the address of the relay into its URLs, since it
 * builds them from the Host header.
 */

import { listenerCertificate } from "./ca-x509.ts";

/** An answer of the CA, or the one that replaces it. */
export interface Answer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: string;
}

/** A running relay. */
export interface Relay extends AsyncDisposable {
  /** `https://127.0.0.1:PORT`. */
  readonly origin: string;
  /** PEM of the root certificate of its listener. */
  readonly root: string;
}

/**
 * Starts a relay to `origin`, whose listener has the root certificate `ca` (PEM). `ask()` gets the answer of the CA; the client
 * gets what `change()` returns.
 */
export async function startRelay(
  origin: string,
  ca: string,
  change: (path: string, ask: () => Promise<Answer>) => Promise<Answer>,
): Promise<Relay> {
  const { root, certificate, key } = await listenerCertificate();
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
        const { "content-length": _, ...forwarded } = Object.fromEntries(answer.headers);
        return { status: answer.status, headers: forwarded, body: await answer.text() };
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
