/** Servers on loopback: certificates made by openssl, TCP servers of a few lines, and real services. */

import { once } from "node:events";
import { connect, createServer, type Socket } from "node:net";
import { dirname, join } from "node:path";
import { pipeline } from "node:stream";
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

let lastPort = 10_000 + Math.floor(Math.random() * 20_000);

/**
 * A free port, another one each time, since its server starts later. The system assigns none of these by itself, but another
 * test file may: startServer() and its end fail if the program could not listen.
 */
export function freePort(): number {
  for (;;) {
    lastPort = lastPort < 30_000 ? lastPort + 1 : 10_000;
    try {
      Deno.listen({ hostname: "127.0.0.1", port: lastPort }).close();
      return lastPort;
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
}

type Server = AsyncDisposable & { readonly child: Deno.ChildProcess };

/** Starts a program and waits until something listens at the port. It is ended with TERM. */
export async function startServer(
  command: string,
  args: readonly string[],
  port: number,
  options: Deno.CommandOptions = {},
): Promise<Server> {
  const child = spawn([command, ...args], { ...options, stdout: "null" });
  const stderr = new Response(child.stderr).text();
  let ended: Deno.CommandStatus | undefined;
  child.status.then((status) => ended = status);
  try {
    await until(`${command} listens`, async () => await accepts(port) || ended !== undefined, 60);
    if (ended) throw new Error(`Cannot start ${command}: ${await stderr}`);
  } catch (error) {
    await end(child);
    throw error;
  }
  const stop = async () => {
    const hadFailed = ended?.success === false; // perhaps because another program listened at the port
    await end(child, "SIGTERM");
    if (hadFailed) throw new Error(`${command} has ended by itself: ${await stderr}`);
    await stderr;
  };
  return { child, [Symbol.asyncDispose]: stop };
}

export async function accepts(port: number): Promise<boolean> {
  return await Deno.connect({ hostname: "127.0.0.1", port }).then(
    (connection) => (connection.close(), true),
    () => false,
  );
}

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
    pipeline(client, upstream, client, () => {}); // closes one if the other breaks
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

// ---- services, with as little configuration as they take; `tls` is the part that names certificates and keys ------

/** Not in PATH on Debian. */
export const postgres = which("postgres") ??
  ["17", "16", "15", "14"].map((version) => which(`../lib/postgresql/${version}/bin/postgres`)).find(Boolean);
/** It refuses to run as root. */
const POSTGRES = ["--reuid", "postgres", "--regid", "postgres", "--clear-groups"];

/** HAProxy; SIGUSR2 makes it read its files again. `bind` is the line of its frontend. */
export async function startHaproxy(home: string, port: number, bind: string): Promise<Server> {
  const file = join(home, "haproxy.cfg");
  await Deno.writeTextFile(file, `defaults\n  mode http\nfrontend web\n  ${bind}\n`);
  return await startServer(which("haproxy")!, ["-W", "-f", file], port);
}

export async function startPostfix(home: string, port: number, tls: string): Promise<Server> {
  for (const name of ["queue", "data"]) await Deno.mkdir(join(home, name));
  await run("chown", "postfix", join(home, "data"));
  const settings = `compatibility_level = 3.6
queue_directory = ${home}/queue
data_directory = ${home}/data
maillog_file = /dev/stdout
inet_interfaces = loopback-only
local_recipient_maps =
smtpd_tls_security_level = may
${tls}\n`;
  await Deno.writeTextFile(join(home, "main.cf"), settings);
  const processes = `127.0.0.1:${port} inet n - n - - smtpd
tlsmgr unix - - n 1000? 1 tlsmgr
anvil unix - - n - 1 anvil
rewrite unix - - n - - trivial-rewrite
postlog unix-dgram n - n - 1 postlogd\n`;
  await Deno.writeTextFile(join(home, "master.cf"), processes);
  const running = await startServer(which("postfix")!, ["-c", home, "start-fg"], port);
  return {
    child: running.child,
    async [Symbol.asyncDispose]() {
      await run(which("postfix")!, "-c", home, "stop"); // its master outlives the process that started it
      await running.child.status;
    },
  };
}

export async function startDovecot(home: string, port: number, tls: string): Promise<Server> {
  const settings = `base_dir = ${home}/run
state_dir = ${home}/state
log_path = ${home}/log
protocols = imap
ssl = yes
${tls}
passdb {
  driver = static
}
service imap-login {
  inet_listener imap {
    address = 127.0.0.1
    port = ${port}
  }
  inet_listener imaps {
    port = 0
  }
}\n`;
  await Deno.writeTextFile(join(home, "dovecot.conf"), settings);
  return await startServer(which("dovecot")!, ["-F", "-c", join(home, "dovecot.conf")], port);
}

/** PostgreSQL; all of `home` belongs to its user then. SIGHUP makes it read its files again. */
export async function startPostgres(home: string, port: number, tls: string): Promise<Server> {
  const data = join(home, "data");
  const initdb = join(dirname(await Deno.realPath(postgres!)), "initdb");
  await run("chown", "-R", "postgres", home);
  await run("setpriv", ...POSTGRES, initdb, "--no-sync", "-A", "trust", "-D", data);
  const settings =
    `port = ${port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '${data}'\n${tls}\n`;
  await Deno.writeTextFile(join(data, "postgresql.conf"), settings, { append: true });
  return await startServer("setpriv", [...POSTGRES, postgres!, "-D", data], port);
}
