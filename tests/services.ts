/**
 * Real services on loopback with as little configuration as they take, for tests of what they serve. `tls` is the part of
 * their configuration that names certificates and keys.
 */

import { dirname, join } from "node:path";
import { run, which } from "./programs.ts";
import { startServer } from "./tls.ts";

export type Running = AsyncDisposable & { readonly child: Deno.ChildProcess };

/** Not in PATH on Debian. */
export const postgres = which("postgres") ??
  ["17", "16", "15", "14"].map((version) => which(`../lib/postgresql/${version}/bin/postgres`)).find(Boolean);
/** It refuses to run as root. */
const POSTGRES = ["--reuid", "postgres", "--regid", "postgres", "--clear-groups"];

/** HAProxy; SIGUSR2 makes it read its files again. `bind` is the line of its frontend. */
export async function startHaproxy(home: string, port: number, bind: string): Promise<Running> {
  const file = join(home, "haproxy.cfg");
  await Deno.writeTextFile(file, `defaults\n  mode http\nfrontend web\n  ${bind}\n`);
  return await startServer(which("haproxy")!, ["-W", "-f", file], port);
}

/** Postfix with `home` as its configuration directory. */
export async function startPostfix(home: string, port: number, tls: string): Promise<Running> {
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
      await running[Symbol.asyncDispose]();
    },
  };
}

/** Dovecot (IMAP) with `home`/dovecot.conf. */
export async function startDovecot(home: string, port: number, tls: string): Promise<Running> {
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
export async function startPostgres(home: string, port: number, tls: string): Promise<Running> {
  const data = join(home, "data");
  const initdb = join(dirname(await Deno.realPath(postgres!)), "initdb");
  await run("chown", "-R", "postgres", home);
  await run("setpriv", ...POSTGRES, initdb, "--no-sync", "-A", "trust", "-D", data);
  const settings =
    `port = ${port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '${data}'\n${tls}\n`;
  await Deno.writeTextFile(join(data, "postgresql.conf"), settings, { append: true });
  return await startServer("setpriv", [...POSTGRES, postgres!, "-D", data], port);
}
