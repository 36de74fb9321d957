/**
 * A remote host as conf/remote/README.md makes it, on loopback: a real sshd with the kit's own files, in which
 * only names, paths and ports are changed. As root it has a user of its own, else that of the tests.
 */

const KIT = new URL("../conf/remote/", import.meta.url).pathname;
const LEFORWARD = new URL("../leforward.ts", import.meta.url).pathname;

/** Programs that a remote host and its tests need and this machine lacks. */
export const missing = ["ssh", "ssh-keygen", "sshd", "rsync", "rrsync", "scp", "nginx", "openssl"].filter((
  name,
) => find(name) === undefined);

export interface RemoteOptions {
  /** The URL that leforward is allowed to redirect to. */
  readonly baseUrl: string;
  /** What the reload keys run, a line for /bin/sh; told the directory of the host. */
  readonly reload?: (directory: string) => string;
  /** Changes authorized_keys further. */
  readonly keys?: (text: string) => string;
}

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
  /** Process ids of what sshd has begun for its connections. */
  sessions(): Promise<number[]>;
  /** What sshd has said. */
  log(): string;
}

/** Starts one; throws with what went wrong. */
export async function startRemote(
  { baseUrl, reload = () => "true", keys = (text) => text }: RemoteOptions,
): Promise<
  Remote
> {
  await using stack = new AsyncDisposableStack();
  const directory = await Deno.makeTempDir({ prefix: "lematt-remote-" });
  stack.defer(() => Deno.remove(directory, { recursive: true }));
  const certificates = `${directory}/ssl`;
  const bin = `${directory}/bin`;
  await Deno.chmod(directory, 0o755);
  for (const path of [bin, certificates, `${certificates}/private`]) await Deno.mkdir(path);

  const root = Deno.uid() === 0;
  const user = root ? `lematt-${directory.slice(-8)}`.toLowerCase() : (await run("id", "-un")).trim();
  if (root) {
    await Deno.mkdir("/run/sshd", { recursive: true });
    // "*" rather than no password: without PAM, sshd takes an account without one for locked
    await run("useradd", "--system", "--no-create-home", "--home-dir", directory, "--shell", "/bin/sh", ...[
      "--password",
      "*",
      user,
    ]);
    stack.defer(async () => void await run("userdel", "--force", user));
    await run("chown", "-R", user, certificates);
  }

  // deno may stand where only its owner can read it
  await Deno.link(Deno.execPath(), `${bin}/deno`).catch(() => Deno.copyFile(Deno.execPath(), `${bin}/deno`));
  await install(LEFORWARD, `${bin}/leforward.ts`);
  await install(`${KIT}upload-only`, `${bin}/upload-only`);
  const [sshPort, httpPort] = [freePort(), freePort()];
  let authorizedKeys = replaceAll(await Deno.readTextFile(`${KIT}authorized_keys`), {
    "/usr/local/lib/lematt:/usr/bin": `${bin}:/usr/bin`,
    "/usr/local/bin": bin,
    "/etc/ssl/lematt": certificates,
    "http://central.example.com": `${baseUrl} --port ${httpPort} --host 127.0.0.1`,
    "exec sudo -n /usr/sbin/service postfix reload": reload(directory),
    "exec sudo -n /usr/sbin/service dovecot reload": reload(directory),
  });
  for (const key of ["forward", "upload", "reload-postfix", "reload-dovecot"]) {
    await run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", `${directory}/${key}`);
    const publicKey = (await Deno.readTextFile(`${directory}/${key}.pub`)).trim();
    authorizedKeys = replaceAll(authorizedKeys, { [`@${key}@`]: publicKey });
  }
  await Deno.writeTextFile(`${directory}/authorized_keys`, keys(authorizedKeys));

  await run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", `${directory}/host_key`);
  const hostKey = await Deno.readTextFile(`${directory}/host_key.pub`);
  await Deno.writeTextFile(`${directory}/known_hosts`, `remote ${hostKey}`);
  const config = replaceAll(await Deno.readTextFile(`${KIT}ssh_config`), {
    "mail.example.com": "127.0.0.1",
    "User certmaint": `User ${user}
  Port ${sshPort}
  HostKeyAlias remote
  UserKnownHostsFile ${directory}/known_hosts`,
    "~/.ssh": directory,
  });
  await Deno.writeTextFile(`${directory}/ssh_config`, config);

  await Deno.writeTextFile(
    `${directory}/sshd_config`,
    `Port ${sshPort}
ListenAddress 127.0.0.1
HostKey ${directory}/host_key
PidFile none
AuthorizedKeysFile ${directory}/authorized_keys
# the directory stands below /tmp, where anybody can write
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
  const child = new Deno.Command(find("sshd")!, {
    args: ["-D", "-e", "-f", `${directory}/sshd_config`],
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
  await until(() => accepts(sshPort), `sshd does not answer: ${log}`);

  const cleanup = stack.move();
  return {
    directory,
    uploadOnly: `${bin}/upload-only`,
    certificates,
    user,
    port: sshPort,
    httpPort,
    ssh: ["-F", `${directory}/ssh_config`],
    sessions: () => sessions(child.pid),
    log: () => log,
    [Symbol.asyncDispose]: () => cleanup.disposeAsync(),
  };
}

/** Where a program is, including where only root looks. */
export function find(program: string): string | undefined {
  const path = `${Deno.env.get("PATH")}:/usr/local/sbin:/usr/sbin:/sbin`;
  const { success, stdout } = new Deno.Command("/bin/sh", {
    args: ["-c", 'command -v -- "$1"', "sh", program],
    env: { PATH: path },
  }).outputSync();
  return success ? new TextDecoder().decode(stdout).trim() : undefined;
}

/** Runs a program to its end and returns its standard output; throws with its standard error. */
export async function run(program: string, ...args: string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(find(program) ?? program, {
    args,
    stdin: "null",
  })
    .output();
  if (!success) throw new Error(`${program} ${args.join(" ")}: ${new TextDecoder().decode(stderr)}`);
  return new TextDecoder().decode(stdout);
}

/** Sends a signal to a process that may be gone. */
export function kill(pid: number, signal: Deno.Signal): void {
  try {
    Deno.kill(pid, signal);
  } catch (error) {
    if (!(error instanceof Deno.errors.NotFound)) throw error;
  }
}

/** A TCP port of 127.0.0.1 that nobody listens on. */
export function freePort(): number {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  return listener.addr.port;
}

/** Whether somebody accepts connections on a port of 127.0.0.1. */
export async function accepts(port: number): Promise<boolean> {
  try {
    (await Deno.connect({ hostname: "127.0.0.1", port })).close();
    return true;
  } catch {
    return false;
  }
}

/** Waits until `condition` holds, ten seconds at most; returns after how many milliseconds. */
export async function until(condition: () => boolean | Promise<boolean>, otherwise: string): Promise<number> {
  const since = performance.now();
  while (!await condition()) {
    if (performance.now() - since > 10_000) throw new Error(otherwise);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return performance.now() - since;
}

async function install(from: string, to: string): Promise<void> {
  await Deno.copyFile(from, to);
  await Deno.chmod(to, 0o755);
}

/** Replaces words of the kit; throws where one is not there any more. */
export function replaceAll(text: string, replacements: Readonly<Record<string, string>>): string {
  for (const [from, to] of Object.entries(replacements)) {
    if (!text.includes(from)) throw new Error(`${from} is there no more`);
    text = text.replaceAll(from, to);
  }
  return text;
}

/** The sshd processes below `pid`, not what they run. */
async function sessions(pid: number): Promise<number[]> {
  const processes = (await run("ps", "-e", "-o", "pid=,ppid=,comm=")).trim().split("\n").map((line) => {
    const [id, parent, command] = line.trim().split(/ +/);
    return { id: Number(id), parent: Number(parent), command };
  });
  const below = (parent: number): number[] =>
    processes.filter((process) => process.parent === parent && process.command?.startsWith("sshd"))
      .flatMap(({ id }) => [id, ...below(id)]);
  return below(pid);
}
