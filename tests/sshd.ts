/**
 * A remote host as conf/remote/README.md makes it, on loopback: a real sshd with the kit's own files, in which
 * only names, paths and ports are changed. As root it has a user of its own, else that of the tests.
 */

import { join } from "node:path";
import { limit } from "../lib/context.ts";
import { which } from "./bench-measure.ts";
import { until } from "./bed.ts";
import { adapt, ROOT } from "./documents.ts";
import { run } from "./install.ts";
import { accepts, freePort } from "./tls.ts";
import { lackOf } from "./together.ts";

const KIT = join(ROOT, "conf/remote");
/** Changes of /etc/passwd lock it. */
const inTurn = limit(1);
/** The URL that leforward is allowed to redirect to. */
export const CENTRAL = "http://central.example.com";

/** What a remote host and its tests need and this machine lacks. */
export const lacking = lackOf("ssh", "ssh-keygen", "sshd", "rsync", "rrsync", "scp", "nginx", "openssl");

export interface Remote extends AsyncDisposable {
  /** Everything is below it; readable for all. */
  readonly directory: string;
  /** upload-only as it is installed. */
  readonly uploadOnly: string;
  /** Where uploads go, with `private` below it. */
  readonly certificates: string;
  /** The user that logs in. */
  readonly user: string;
  /** Where sshd listens. */
  readonly port: number;
  /** Where leforward listens. */
  readonly httpPort: number;
  /** Arguments that make ssh and scp find the aliases: mail-forward, mail-upload, mail-reload-postfix, … */
  readonly ssh: readonly ["-F", string];
  /** Ids of the processes of sshd's connections. */
  sessions(): Promise<number[]>;
  /** The log of sshd. */
  log(): string;
}

/** Starts a remote host. The reload keys run `reload`; `keys` edits authorized_keys. */
export async function startRemote(
  { reload = "true", keys = (text) => text }: { reload?: string; keys?: (text: string) => string } = {},
): Promise<Remote> {
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
  for (const path of [join(ROOT, "leforward.ts"), join(KIT, "upload-only")]) {
    await run("install", "-m", "755", path, bin);
  }
  const [sshPort, httpPort] = [freePort(), freePort()];
  let authorizedKeys = adapt(await Deno.readTextFile(join(KIT, "authorized_keys")), {
    "/usr/local/lib/lematt:/usr/bin": `${bin}:/usr/bin`,
    "/usr/local/bin": bin,
    "/etc/ssl/lematt": certificates,
    [CENTRAL]: `${CENTRAL} --port ${httpPort} --host 127.0.0.1`,
    "exec sudo -n /usr/sbin/service postfix reload": reload.replaceAll("HERE", directory),
    "exec sudo -n /usr/sbin/service dovecot reload": reload.replaceAll("HERE", directory),
  });
  for (const key of ["host_key", "forward", "upload", "reload-postfix", "reload-dovecot"]) {
    await run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", join(directory, key));
    const publicKey = (await Deno.readTextFile(join(directory, `${key}.pub`))).trim();
    if (key === "host_key") await Deno.writeTextFile(join(directory, "known_hosts"), `remote ${publicKey}\n`);
    else authorizedKeys = adapt(authorizedKeys, { [`@${key}@`]: publicKey });
  }
  await Deno.writeTextFile(join(directory, "authorized_keys"), keys(authorizedKeys));
  const config = adapt(await Deno.readTextFile(join(KIT, "ssh_config")), {
    "mail.example.com": "127.0.0.1",
    "User certmaint": `User ${user}
  Port ${sshPort}
  HostKeyAlias remote
  UserKnownHostsFile ${directory}/known_hosts`,
    "~/.ssh": directory,
  });
  await Deno.writeTextFile(join(directory, "ssh_config"), config);
  await Deno.writeTextFile(
    join(directory, "sshd_config"),
    `Port ${sshPort}
ListenAddress 127.0.0.1
HostKey ${directory}/host_key
PidFile none
AuthorizedKeysFile ${directory}/authorized_keys
# the directory is below /tmp, where everyone can write
StrictModes no
UsePAM no
PasswordAuthentication no
MaxStartups 100
KbdInteractiveAuthentication no
# the default takes a third of a second longer
KexAlgorithms curve25519-sha256
SetEnv PATH=/usr/local/bin:/usr/bin:/bin DENO_DIR=${directory}/deno
Subsystem sftp internal-sftp
`,
  );
  const child = new Deno.Command(which("sshd")!, {
    args: ["-D", "-e", "-f", join(directory, "sshd_config")],
    stdin: "null",
    stdout: "null",
    stderr: "piped",
  }).spawn();
  let log = "";
  const reading = child.stderr.pipeThrough(new TextDecoderStream()).pipeTo(
    new WritableStream({ write: (text) => void (log += text) }),
  );
  stack.defer(async () => {
    for (const session of await sessions(child.pid)) kill(session, "SIGTERM");
    kill(child.pid, "SIGTERM");
    await Promise.all([child.status, reading]);
  });
  await until(`sshd answers: ${log}`, () => accepts(sshPort));

  const cleanup = stack.move();
  return {
    directory,
    uploadOnly: join(bin, "upload-only"),
    certificates,
    user,
    port: sshPort,
    httpPort,
    ssh: ["-F", join(directory, "ssh_config")],
    sessions: () => sessions(child.pid),
    log: () => log,
    [Symbol.asyncDispose]: () => cleanup.disposeAsync(),
  };
}

/** Sends a signal to a process that may be gone. */
export function kill(pid: number, signal: Deno.Signal): void {
  try {
    Deno.kill(pid, signal);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

/** The sshd processes below `pid`, not what they run. */
async function sessions(pid: number): Promise<number[]> {
  const processes = (await run("ps", "-e", "-o", "pid=,ppid=,comm=")).trim().split("\n")
    .map((line) => line.trim().split(/ +/)).filter(([, , command]) => command?.startsWith("sshd"));
  const below = (parent: number): number[] =>
    processes.filter(([, ppid]) => Number(ppid) === parent).flatMap(([id]) => [
      Number(id),
      ...below(Number(id)),
    ]);
  return below(pid);
}
