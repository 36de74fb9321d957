/**
 * An HTTPS relay to a CA on loopback, on which answers can be changed on their way. The CA takes it for itself: it builds its
 * URLs from the name under which it is asked.
 */

import { request } from "node:https";
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
  const server = Deno.serve(
    { hostname: "127.0.0.1", port: 0, cert: certificate, key, onListen: () => {} },
    async (incoming) => {
      const body = new Uint8Array(await incoming.arrayBuffer());
      const { pathname } = new URL(incoming.url);
      const host = `127.0.0.1:${server.addr.port}`;
      const { status, headers, body: text } = await change(pathname, () => ask(incoming, body, host));
      return new Response(text === "" ? null : text, { status, headers });
    },
  );
  const ask = (incoming: Request, body: Uint8Array, host: string) =>
    new Promise<Answer>((resolve, reject) => {
      const { pathname, search } = new URL(incoming.url);
      const headers = { ...Object.fromEntries(incoming.headers), host };
      const outgoing = request(
        origin + pathname + search,
        { method: incoming.method, headers, ca },
        (answer) => {
          const chunks: Uint8Array[] = [];
          answer.on("data", (chunk) => chunks.push(chunk));
          answer.on("error", reject);
          answer.on("end", () => {
            const passed = Object.entries(answer.headers).filter(([name]) =>
              !["connection", "content-length", "transfer-encoding"].includes(name)
            );
            resolve({
              status: answer.statusCode!,
              headers: Object.fromEntries(passed.map(([name, value]) => [name, [value].flat().join(", ")])),
              body: Buffer.concat(chunks).toString(),
            });
          });
        },
      );
      outgoing.on("error", reject);
      outgoing.end(body);
    });
  return {
    origin: `https://127.0.0.1:${server.addr.port}`,
    root,
    [Symbol.asyncDispose]: () => server.shutdown(),
  };
}
