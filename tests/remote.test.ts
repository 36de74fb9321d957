/**
 * The remote half over a real sshd: what each key can do and cannot, how leforward ends, and the whole way of
 * certificates to a host that has no web server of its own for the challenge.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { limit } from "../lib/context.ts";
import { testBed, together, until } from "./bed.ts";
import { listing } from "./faults.ts";
import { adapt, lackOf, output, ROOT, run, shell, which } from "./programs.ts";
import { accepts, freePort, makeCertificate, startNginx, startServer } from "./tls.ts";

const KIT = join(ROOT, "conf/remote");
/** Changes of /etc/passwd lock it. */
const oneByOne = limit(1);
/** The URL that leforward is allowed to redirect to. */
const CENTRAL = "http://central.example.com";

const lacking = lackOf("ssh", "ssh-keygen", "sshd", "rsync", "rrsync", "scp", "nginx", "openssl");

/**
 * A remote host as conf/remote/README.md makes it, on loopback: a real sshd with the kit's own files, in which only names, paths
 * and ports are changed. The reload keys run `reload`. As root it has a user of its own, else that of the tests.
 */
async function startRemote(reload = "true") {
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
    await oneByOne(() => run("useradd", ...options, "--password", "*", user));
    stack.defer(async () => void await oneByOne(() => run("userdel", "--force", user)));
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
  const kill = `for pid in $(pgrep -P ${sshd.child.pid}); do pkill -KILL -P $pid sshd; kill -KILL $pid; done`;
  /** Kills the processes of its connections, not what they run. */
  const killSessions = async () => void await output(["sh", "-c", kill]);
  stack.defer(killSessions);
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

type Remote = Awaited<ReturnType<typeof startRemote>>;

const inTurn = together("the remote half");
const test = (name: string, fn: () => Promise<void>) => inTurn(name, fn, lacking);

const ssh = (remote: Remote, ...args: string[]) => output(["ssh", ...remote.ssh, ...args]);
const scp = (remote: Remote, ...args: string[]) => output(["scp", ...remote.ssh, "-O", ...args]);
const rsync = (remote: Remote, ...args: string[]) =>
  output(["rsync", "-e", `ssh ${remote.ssh.join(" ")}`, ...args]);

test("a key allows one action, whatever command the client sends: a reload, or a redirect that ends with the ssh session", async () => {
  await using remote = await startRemote("echo reloaded");
  for (const command of [[], ["$(id)"]]) {
    const { code, stdout } = await ssh(remote, "mail-reload-postfix", ...command);
    assert.deepEqual([code, stdout], [0, "reloaded\n"]);
  }
  const refused: [args: string[], code: number][] = [
    [["mail-forward"], 2],
    [["--", "mail-forward", `--baseurl ${CENTRAL}`], 2],
    [["mail-forward", `${CENTRAL}; id`], 2],
    [["mail-forward", `${CENTRAL}\nid`], 2],
    [["mail-forward", "http://elsewhere.example.com"], 2],
    [["-s", "mail-forward", "sftp"], 2],
    [["-W", "127.0.0.1:22", "mail-forward"], 255],
  ];
  await Promise.all(refused.map(async ([args, code]) => {
    const found = await ssh(remote, ...args);
    assert.deepEqual([found.code, found.stdout], [code, ""], `${args}: ${found.stderr}`);
  }));
  assert.equal(await accepts(remote.httpPort), false);

  const kill = (child: Deno.ChildProcess) => child.kill("SIGKILL");
  const ends = [
    ["the client is killed", "piped", kill],
    ["its sshd is killed", "piped", remote.killSessions],
    ["the client's input is closed", "piped", (child: Deno.ChildProcess) => child.stdin.close()],
    ["the client is killed, without input", "null", kill],
    ["its sshd is killed, without input", "null", remote.killSessions],
  ] as const;
  for (const [how, stdin, end] of ends) {
    const args = [...remote.ssh, "mail-forward", CENTRAL];
    const child = new Deno.Command("ssh", { args, stdin, stdout: "null", stderr: "null" }).spawn();
    await until("leforward answers", () => accepts(remote.httpPort));
    const path = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
    const answer = await fetch(`http://127.0.0.1:${remote.httpPort}${path}`, { redirect: "manual" });
    await answer.body?.cancel();
    assert.deepEqual([answer.status, answer.headers.get("location")], [301, CENTRAL + path]);
    await end(child);
    await until(`${how}: its port is free`, async () => !await accepts(remote.httpPort), 10);
    await child.status;
    if (stdin === "piped") await child.stdin.abort().catch(() => {});
  }
});

/** A new directory in which commands make files to upload. */
async function directoryOf({ directory }: Remote, commands: string): Promise<string> {
  const from = await Deno.makeTempDir({ dir: directory });
  await shell(commands, from);
  return from;
}

test("the upload key writes files, and links between them, into its directories with their modes, and does nothing else", async () => {
  await using remote = await startRemote();
  const { certificates } = remote;
  const outside = join(remote.directory, "outside");
  const from = await directoryOf(
    remote,
    `mkdir -m 777 ${outside}; echo > .hidden; ln -s a.pem b.pem; echo f > f
    ln -s ${outside} out; ln -s ../outside up; ln -s . dot; mkdir directory`,
  );
  for (const [directory, mode] of [[certificates, 0o644], [`${certificates}/private`, 0o640]] as const) {
    for (const text of ["first\n", "second\n"]) {
      await Deno.writeTextFile(`${from}/a.pem`, text);
      const options = ["-avz", `--chmod=F${mode.toString(8)}`, `${from}/a.pem`, `${from}/b.pem`];
      const { code, stderr } = await rsync(remote, ...options, `mail-upload:${directory}/`);
      assert.equal(code, 0, stderr);
      assert.equal(Deno.readLinkSync(`${directory}/b.pem`), "a.pem");
      assert.equal(Deno.readTextFileSync(`${directory}/b.pem`), text);
      assert.equal(Deno.statSync(`${directory}/a.pem`).mode! & 0o7777, mode);
    }
  }
  // S9: set-uid bits and what others may write are dropped, hidden files are not taken
  await run("chmod", "7666", `${from}/a.pem`);
  const to = `mail-upload:${certificates}/`;
  const ways = [
    (file: string) => rsync(remote, "-a", file, to),
    (file: string) => scp(remote, "-p", file, to),
  ];
  for (const upload of ways) {
    await Deno.remove(`${certificates}/a.pem`);
    await Deno.symlink("../outside/f", `${certificates}/a.pem`); // is replaced, and its target not written to
    const { code, stderr } = await upload(`${from}/a.pem`);
    assert.equal(code, 0, stderr);
    const { isFile, mode } = Deno.lstatSync(`${certificates}/a.pem`);
    assert.deepEqual([isFile, mode! & 0o7777], [true, 0o664]);
    assert.notEqual((await upload(`${from}/.hidden`)).code, 0);
  }
  assert.deepEqual(listing(certificates), ["a.pem", "b.pem", "private"]);

  await Deno.writeTextFile(`${certificates}/secret`, "secret\n");
  const server = "rsync --server -logDtpre.iLsfxCIvu";
  const commands = [
    "id",
    `${server} . ${outside}`,
    `${server} . ${certificates}/../outside`,
    `${server} . ${certificates} ${outside}`,
    `${server} --sender . ${certificates}`,
    `${server} --files-from=${certificates}/secret . ${certificates}`,
    `rsync --server; touch ${outside}/x; . ${certificates}`,
    `rsync --server -e.\ntouch ${outside}/x\n . ${certificates}`,
    `scp -t ${certificates}; touch ${outside}/x`,
    `scp -f ${certificates}/secret`,
    `scp -t -S/bin/sh ${certificates}`,
    `scp -t ${outside}`,
  ].map((command) => ["mail-upload", command]);
  const otherwise = [["mail-upload"], ["-tt", "mail-upload", "id"], ["-W", "127.0.0.1:22", "mail-upload"]];
  const transfers = [
    [`${to}secret`, from],
    ["-a", "--rsync-path=sh -c id; rsync", `${from}/f`, to],
    ["-a", `${from}/f`, `mail-upload:${outside}/`],
    ...["out", "up", "dot", "directory"].map((name) => ["-a", `${from}/${name}`, to]),
  ];
  // paths outside are taken for paths inside, or refused
  const options = ["--backup-dir", "--temp-dir", "--partial-dir", "--log-file", "--link-dest"];
  await Promise.all([
    ...[...commands, ...otherwise].map(async (args) => {
      const { code, stdout } = await ssh(remote, ...args);
      assert.deepEqual([code !== 0, stdout], [true, ""], args.join(" "));
    }),
    ...transfers.map(async (args) => assert.notEqual((await rsync(remote, ...args)).code, 0, args.join(" "))),
    ...options.map((option) => rsync(remote, "-a", `-M${option}=${outside}/x`, `${from}/f`, to)),
  ]);
  assert.deepEqual(listing(outside), []);
  assert.equal(await Deno.readTextFile(`${certificates}/secret`), "secret\n");
  const links = [...Deno.readDirSync(certificates)].filter(({ isSymlink }) => isSymlink);
  assert.deepEqual(links.map(({ name }) => name), ["b.pem"]);
});

test("S9: uploads are limited in size, and nothing is left of one that was refused or interrupted", async () => {
  await using remote = await startRemote();
  const { certificates, uploadOnly } = remote;
  const script = adapt(await Deno.readTextFile(uploadOnly), { "DIRECTORY_KIB=262144": "DIRECTORY_KIB=3000" });
  await Deno.writeTextFile(uploadOnly, script);
  const from = await directoryOf(
    remote,
    "head -c 1100K /dev/zero > large; head -c 1000K large | tee a b > c",
  );
  const upload = (options: string, ...names: string[]) => {
    const files = names.map((name) => join(from, name));
    return rsync(remote, ...options.split(" "), ...files, `mail-upload:${certificates}/`);
  };
  // rsync's client may end before it has shown what the host reports, unless the transfer is complete
  assert.notEqual((await upload("-az", "large")).code, 0);
  assert.notEqual((await upload("-a --bwlimit=2000", "a", "b", "c")).code, 0);
  const { code, stderr } = await upload("-az", "a", "b", "c");
  assert.equal(code, 11);
  assert.match(stderr, /nothing was taken; a file may have 1024 KiB, .* 3000 KiB/);
  await until("nothing is left", () => listing(certificates).length === 1);

  const arrives = () => listing(certificates).some((name) => name.startsWith(".incoming-"));
  // the script on the remote host, and the client
  for (const [signal, process] of [["TERM", `sh ${uploadOnly}`], ["KILL", `rsync .*--bwlimit=77 ${from}`]]) {
    const interrupted = upload("-a --bwlimit=77", "a");
    await until("something arrives", arrives);
    await run("pkill", `-${signal}`, "-f", process!);
    assert.notEqual((await interrupted).code, 0);
    await until("it is gone", () => !arrives());
    assert.deepEqual(listing(certificates), ["private"]);
  }
  // after a power failure, the next upload removes what is older than a day
  const left = `${certificates}/.incoming-0123456789`;
  await run("install", "-d", "-o", remote.user, left);
  await run("touch", "-d", "2 days ago", left);
  assert.equal((await upload("-a", "a")).code, 0);
  assert.deepEqual(listing(certificates), ["a", "private"]);
});

test("certificates are issued through the remote host and delivered to it; a host that is down fails alone", async () => {
  await using remote = await startRemote("kill -HUP $(cat HERE/pid)");
  const { directory, certificates, httpPort } = remote;
  const cert = `${certificates}/imap.example.com-cert-combined.prime256v1.test.pem`;
  const key = `${certificates}/private/imap.example.com-key.prime256v1.test.pem`;
  await makeCertificate(directory, "first", "ec", ["imap.example.com"]);
  await run("install", "-m", "644", `${directory}/first.pem`, cert);
  await run("install", "-m", "600", "-o", remote.user, `${directory}/first.key`, key);
  const tls = freePort();
  const server =
    `server { listen 127.0.0.1:${tls} ssl; ssl_certificate ${cert}; ssl_certificate_key ${key}; }`;
  const user = Deno.uid() === 0 ? remote.user : undefined;
  await using nginx = await startNginx(directory, tls, () => server, user);
  await Deno.writeTextFile(`${directory}/pid`, `${nginx.child.pid}`);

  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 }); // accepts connections and sends nothing
  await using bed = await testBed({
    domains: "mail.example.com imap.example.com\ndown.example.com\n",
    settings: "keyTypes: ec\n",
  });
  const hostname = "127.0.0.1";
  const portOf = (name: string) =>
    name.startsWith("central.") ? bed.web.port : name.startsWith("down.") ? 1 : httpPort;
  bed.ca.switches.httpPort = portOf;
  const ssh = `ssh ${remote.ssh.join(" ")}`;
  // the example in conf/actions.conf, which names what the kit makes
  const example = Deno.readTextFileSync(join(ROOT, "conf/actions.conf")).match(/^# \[mail\]\n(# .*\n)+/m)![0];
  const mail = adapt(example.replaceAll(/^# /gm, ""), {
    "ssh mail-": `${ssh} mail-`,
    "rsync -a": `rsync -a -e '${ssh}'`,
    "/etc/ssl/lematt": certificates,
    '"mail.example.com:465", "mail.example.com:25/smtp", "mail.example.com:143/imap"':
      `"127.0.0.1:${tls}#imap.example.com"`,
  });
  const down = `${ssh} -oPort=${silent.addr.port} -oConnectTimeout=1 mail-forward ${CENTRAL}`;
  bed.act(`${mail}\n[down]\ndomains: down.example.com\nprepare: ["${down}"]\n`);

  const { code, stdout, stderr } = await bed.run({
    sleep: (ms) => delay(Math.min(ms, 50)), // remote processes need some real time
    route: (name, port) =>
      Promise.resolve([{ address: hostname, port: name === hostname ? port : portOf(name) }]),
  });
  assert.equal(code, 1, stdout + stderr);
  assert.match(stderr, /^FAILED +down\.example\.com [\s\S]*timed out during banner exchange/m);
  assert.match(stdout, /^verified .* serves the newest certificate/m);
  assert.deepEqual(bed.ca.issued.map(({ names }) => names), [["mail.example.com", "imap.example.com"]]);
  const modes = [cert, key].map((path) => (Deno.statSync(path).mode! & 0o777).toString(8));
  assert.deepEqual([modes, bed.dropped()], [["644", "640"], []]);
  await until("leforward is gone", async () => !await accepts(httpPort));
});
