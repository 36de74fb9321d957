/**
 * A remote host as conf/remote/README.md makes it, on loopback: a real sshd with the kit's own files, in which only names, paths
 * and ports are changed. As root it has a user of its own, else that of the tests.
 */

import { join } from "node:path";
import { limit } from "../lib/context.ts";
import { which } from "./bench-measure.ts";
import { adapt, ROOT } from "./documents.ts";
import { run } from "./install.ts";
import { output } from "./programs.ts";
import { freePort, startServer } from "./tls.ts";
import { lackOf } from "./together.ts";

const KIT = join(ROOT, "conf/remote");
/** Changes of /etc/passwd lock it. */
const inTurn = limit(1);
/** The URL that leforward is allowed to redirect to. */
export const CENTRAL = "http://central.example.com";

/** What a remote host and its tests need and this machine lacks. */
export const lacking = lackOf("ssh", "ssh-keygen", "sshd", "rsync", "rrsync", "scp", "nginx", "openssl");

/** Starts a remote host, whose reload key runs `reload`. */
export async function startRemote(reload = "true") {
  await using stack = new AsyncDisposableStack();
  const directory = await Deno.makeTempDir({ prefix: "lematt-remote-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const [certificates, bin] = [join(directory, "ssl"), join(directory, "bin")];
  await Deno.chmod(directory, 0o755);
  for (const path of [bin, certificates, join(certificates, "private")]) await Deno.mkdir(path);

  const root = Deno.uid() === 0;
  const user = root ? `lematt-${directory.slice(-8)}`.toLowerCase() : (await run("id", "-un")).trim();
  if (root) {
    await Deno.mkdir("/run/sshd", { recursive: true });
    // "*" rather than no password: without PAM, sshd takes an account without one for locked
    const options = ["--system", "--no-create-home", "--home-dir", directory, "--shell", "/bin/sh"];
    await inTurn(() => run("useradd", ...options, "--password", "*", user));
    stack.defer(async () => void await inTurn(() => run("userdel", "--force", user)));
    await run("chown", "-R", user, certificates);
  }

  // deno may be where only its owner can read it
  await Deno.link(Deno.execPath(), `${bin}/deno`).catch(() => Deno.copyFile(Deno.execPath(), `${bin}/deno`));
  await run("install", "-m", "755", join(ROOT, "leforward.ts"), join(KIT, "upload-only"), bin);
  const [port, httpPort] = [freePort(), freePort()];
  const keys = ["host_key", "forward", "upload", "reload-postfix", "reload-dovecot"];
  for (const key of keys) await run("ssh-keygen", "-qt", "ed25519", "-N", "", "-f", join(directory, key));
  const publicKey = (key: string) => Deno.readTextFileSync(join(directory, `${key}.pub`)).trim();
  const kit = (file: string, words: Record<string, string>) =>
    adapt(Deno.readTextFileSync(join(KIT, file)), words);
  const files = {
    known_hosts: `remote ${publicKey("host_key")}\n`,
    authorized_keys: kit("authorized_keys", {
      ...Object.fromEntries(keys.slice(1).map((key) => [`@${key}@`, publicKey(key)])),
      "/usr/local/lib/lematt:/usr/bin": `${bin}:/usr/bin`,
      "/usr/local/bin": bin,
      "/etc/ssl/lematt": certificates,
      [CENTRAL]: `${CENTRAL} --port ${httpPort} --host 127.0.0.1`,
      "exec sudo -n /usr/sbin/service postfix reload": reload.replaceAll("HERE", directory),
      "exec sudo -n /usr/sbin/service dovecot reload": reload.replaceAll("HERE", directory),
    }),
    ssh_config: kit("ssh_config", {
      "mail.example.com": "127.0.0.1",
      "User certmaint":
        `User ${user}\nPort ${port}\nHostKeyAlias remote\nUserKnownHostsFile ${directory}/known_hosts`,
      "~/.ssh": directory,
    }),
    // StrictModes no: the directory is below /tmp, where everyone can write; the default key exchange takes 0.3 s longer
    sshd_config: `Port ${port}
ListenAddress 127.0.0.1
HostKey ${directory}/host_key
PidFile none
AuthorizedKeysFile ${directory}/authorized_keys
StrictModes no
UsePAM no
MaxStartups 100
KexAlgorithms curve25519-sha256
SetEnv PATH=/usr/local/bin:/usr/bin:/bin DENO_DIR=${directory}/deno
Subsystem sftp internal-sftp\n`,
  };
  for (const [name, text] of Object.entries(files)) await Deno.writeTextFile(join(directory, name), text);
  const sshd = await startServer(which("sshd")!, ["-D", "-e", "-f", join(directory, "sshd_config")], port);
  stack.use(sshd);
  /** Kills the processes of its connections, not what they run. */
  const killSessions = () =>
    output([
      "sh",
      "-c",
      `for pid in $(pgrep -P ${sshd.child.pid}); do pkill -KILL -P $pid sshd; kill -KILL $pid; done`,
    ]);
  stack.defer(async () => void await killSessions());
  const cleanup = stack.move();
  return {
    ...{ directory, user, httpPort, killSessions },
    /** upload-only as it is installed, and where uploads go, with `private` below it. */
    ...{ uploadOnly: join(bin, "upload-only"), certificates },
    /** Arguments that make ssh and scp find the aliases: mail-forward, mail-upload, mail-reload-postfix, … */
    ssh: ["-F", join(directory, "ssh_config")],
    [Symbol.asyncDispose]: () => cleanup.disposeAsync(),
  };
}

export type Remote = Awaited<ReturnType<typeof startRemote>>;
