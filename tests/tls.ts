/**
 * Servers with certificates on loopback: certificates made by openssl, programs that listen, and TCP servers of a few lines.
 */

import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { type Certificate, readCertificate } from "../lib/x509.ts";
import { until } from "./bed.ts";
import { end, run, spawn, which } from "./programs.ts";

/** Makes `<directory>/<file>.key` and `.pem`, self-signed for `names`; returns the certificate. */
export async function makeCertificate(
  directory: string,
  file: string,
  keyType: "rsa" | "ec",
  names: readonly string[],
): Promise<Certificate> {
  const path = join(directory, file);
  const newKey = keyType === "rsa" ? "rsa:2048" : "ec -pkeyopt ec_paramgen_curve:P-256";
  const files = `-keyout ${path}.key -out ${path}.pem`;
  const san = `subjectAltName=${names.map((name) => `DNS:${name}`)}`;
  const command = `req -x509 -nodes -subj /CN=test -newkey ${newKey} ${files} -addext ${san}`;
  await run("openssl", ...command.split(" "));
  return readCertificate(await Deno.readTextFile(`${path}.pem`));
}

/** A free port below those that the system assigns by itself, so that nothing else that starts meanwhile gets it. */
export function freePort(): number {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 20_000);
    try {
      Deno.listen({ hostname: "127.0.0.1", port }).close();
      return port;
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
}

/** Starts a program and waits until something listens at the port. It is ended with TERM. */
export async function startServer(
  command: string,
  args: readonly string[],
  port: number,
  options: Deno.CommandOptions = {},
): Promise<AsyncDisposable & { readonly child: Deno.ChildProcess }> {
  const child = spawn([command, ...args], { ...options, stdout: "null" });
  const stderr = new Response(child.stderr).text();
  let ended = false;
  child.status.then(() => ended = true);
  try {
    await until(`${command} listens`, async () => await accepts(port) || ended, 60);
    if (ended) throw new Error(`Cannot start ${command}: ${await stderr}`);
  } catch (error) {
    await end(child);
    throw error;
  }
  const stop = async () => {
    await end(child, "SIGTERM");
    await stderr;
  };
  return { child, [Symbol.asyncDispose]: stop };
}

/** Whether connections are accepted at a port of 127.0.0.1. */
export async function accepts(port: number): Promise<boolean> {
  return await Deno.connect({ hostname: "127.0.0.1", port }).then(
    (connection) => (connection.close(), true),
    () => false,
  );
}

/** Deno.test() if nginx is installed. */
export function nginxTest(name: string, fn: () => Promise<void>): void {
  Deno.test({ name: `${name} (nginx)`, ignore: which("nginx") === undefined, fn });
}

/** nginx with these server blocks; `pair("x")` names the files x.pem and x.key of the directory. Root may give it a user. */
export async function startNginx(
  directory: string,
  port: number,
  servers: (pair: (...files: string[]) => string) => string,
  user?: string,
) {
  const prefix = await Deno.makeTempDir({ dir: directory });
  const pair = (...files: string[]) =>
    files.map((file) => `ssl_certificate ../${file}.pem; ssl_certificate_key ../${file}.key;`).join(" ");
  const config = `daemon off; worker_processes 1; pid nginx.pid; events { worker_connections 4096; }
http {
  access_log off; client_body_temp_path client_body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  ${servers(pair)}
}\n`;
  await Deno.writeTextFile(join(prefix, "nginx.conf"), config);
  const command = [which("nginx")!, "-p", prefix, "-c", "nginx.conf", "-e", "error.log"];
  if (user === undefined) return await startServer(command[0]!, command.slice(1), port);
  await run("chown", "-R", user, prefix);
  return await startServer("setpriv", ["--reuid", user, "--clear-groups", ...command], port);
}

/** nginx at a free port of 127.0.0.1 and 127.0.0.2, with the pairs x.pem and x.key of the directory. */
export async function startHttps(directory: string, ...files: readonly string[]) {
  const port = freePort();
  const listen = `listen 127.0.0.1:${port} ssl; listen 127.0.0.2:${port} ssl;`;
  const server = await startNginx(directory, port, (pair) => `server { ${listen} ${pair(...files)} }`);
  return Object.assign(server, { port });
}

/** A TCP server on loopback that gives every connection to `serve`. */
export async function tcpServer(serve: (socket: Socket) => void, hostname = "127.0.0.1") {
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.on("error", () => socket.destroy());
    socket.on("close", () => sockets.delete(socket));
    serve(socket);
  });
  server.listen(0, hostname);
  await once(server, "listening");
  return {
    port: (server.address() as { port: number }).port,
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy();
      server.close();
      await once(server, "close");
    },
  };
}

/** A server that forwards each connection to the next of the ports in turn, and counts them. */
export async function startBalancer(...ports: readonly number[]) {
  const counts = { connections: 0 };
  const server = await tcpServer((client) => {
    const upstream = connect(ports[counts.connections++ % ports.length]!, "127.0.0.1");
    upstream.on("error", () => client.destroy());
    client.on("close", () => upstream.destroy());
    client.pipe(upstream).pipe(client);
  });
  return Object.assign(server, { counts });
}

/** A relay to a port, `oneWayMs` away; the first data takes a round trip longer, as the handshake of TCP does. */
export function distant(to: number, oneWayMs: number) {
  return tcpServer((near) => {
    const far = connect(to, "127.0.0.1").setNoDelay();
    near.setNoDelay();
    const connected = performance.now() + 2 * oneWayMs;
    for (const [from, into] of [[near, far], [far, near]] as const) {
      let sent = Promise.resolve();
      const later = (act: () => void) => {
        const due = Math.max(performance.now(), connected) + oneWayMs;
        sent = sent.then(() => delay(Math.max(0, due - performance.now()))).then(act);
      };
      from.on("data", (piece) => later(() => into.write(piece)));
      from.on("close", () => later(() => into.destroy()));
      from.on("error", () => from.destroy());
    }
  });
}
