/**
 * The remote half over a real sshd: what each key can do and cannot, how leforward ends, and the whole way of
 * certificates to a host that has no web server of its own for the challenge.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { which } from "./bench-measure.ts";
import { testBed, until } from "./bed.ts";
import { adapt, ROOT } from "./documents.ts";
import { listing } from "./faults.ts";
import { run } from "./install.ts";
import { output } from "./programs.ts";
import { CENTRAL, lacking, type Remote, startRemote } from "./sshd.ts";
import { accepts, freePort, makeCertificate, startServer } from "./tls.ts";
import { together } from "./together.ts";

const inTurn = together("the remote half");
const test = (name: string, fn: () => Promise<void>) => inTurn(name, fn, lacking);

const ssh = (remote: Remote, ...args: string[]) => output(["ssh", ...remote.ssh, ...args]);
const scp = (remote: Remote, ...args: string[]) => output(["scp", ...remote.ssh, "-O", ...args]);
const rsync = (remote: Remote, ...args: string[]) =>
  output(["rsync", "-e", `ssh ${remote.ssh.join(" ")}`, ...args]);

/** An ssh client with the forward key, once its leforward answers. */
async function forward({ ssh, httpPort }: Remote, stdin: "piped" | "null" = "piped") {
  const args = [...ssh, "mail-forward", CENTRAL];
  const child = new Deno.Command("ssh", { args, stdin, stdout: "null", stderr: "null" }).spawn();
  await until("leforward answers", () => accepts(httpPort));
  return {
    child,
    async [Symbol.asyncDispose]() {
      try {
        child.kill("SIGKILL");
      } catch { /* it has ended already */ }
      if (stdin === "piped") await child.stdin.abort().catch(() => {});
      await child.status;
    },
  };
}

test("a key allows one action, redirecting challenges or a reload, whatever command the client sends", async () => {
  await using remote = await startRemote("echo reloaded");
  for (const command of [[], ["$(id)"]]) {
    const { code, stdout } = await ssh(remote, "mail-reload-postfix", ...command);
    assert.deepEqual([code, stdout], [0, "reloaded\n"]);
  }
  const refused: [args: string[], code: number][] = [
    [["mail-forward"], 2],
    [["mail-forward", "id"], 2],
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

  await using _session = await forward(remote);
  const path = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
  const answer = await fetch(`http://127.0.0.1:${remote.httpPort}${path}`, { redirect: "manual" });
  assert.deepEqual([answer.status, answer.headers.get("location")], [301, CENTRAL + path]);
  const second = await ssh(remote, "mail-forward", CENTRAL);
  assert.equal(second.code, 1);
  assert.match(second.stderr, /listen on port \d+ /);
});

test("leforward never outlives its ssh session, with or without an input", async () => {
  await using remote = await startRemote();
  type End = readonly [how: string, stdin: "piped" | "null", end: (child: Deno.ChildProcess) => unknown];
  const ends: readonly End[] = [
    ["the client is killed", "piped", (child) => child.kill("SIGKILL")],
    ["its sshd is killed", "piped", remote.killSessions],
    ["the client's input is closed", "piped", (child) => child.stdin.close()],
    ["the client is killed", "null", (child) => child.kill("SIGKILL")],
    ["its sshd is killed", "null", remote.killSessions],
  ];
  for (const [how, stdin, end] of ends) {
    await using session = await forward(remote, stdin);
    await end(session.child);
    await until(`${how} (${stdin}): its port is free`, async () => !await accepts(remote.httpPort), 10);
  }
});

/** A directory of files to upload. */
async function filesOf(remote: Remote, files: Record<string, string | Uint8Array>): Promise<string> {
  const from = await Deno.makeTempDir({ dir: remote.directory });
  for (const [name, text] of Object.entries(files)) {
    if (typeof text === "string") await Deno.writeTextFile(join(from, name), text);
    else await Deno.writeFile(join(from, name), text);
  }
  return from;
}

test("the upload key writes files, and links between them, into its directories with their modes", async () => {
  await using remote = await startRemote();
  const { certificates } = remote;
  const from = await filesOf(remote, { ".hidden": "hidden\n" });
  await Deno.symlink("a.pem", `${from}/b.pem`);
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
    const { code, stderr } = await upload(`${from}/a.pem`);
    assert.equal(code, 0, stderr);
    assert.equal(Deno.statSync(`${certificates}/a.pem`).mode! & 0o7777, 0o664);
    assert.notEqual((await upload(`${from}/.hidden`)).code, 0);
  }
  assert.deepEqual(listing(certificates), ["a.pem", "b.pem", "private"]);
  // an existing link is replaced, and its target not written to
  for (const upload of ways) {
    await Deno.remove(`${certificates}/a.pem`);
    await Deno.symlink(`${from}/.hidden`, `${certificates}/a.pem`);
    assert.equal((await upload(`${from}/a.pem`)).code, 0);
    assert.ok(Deno.lstatSync(`${certificates}/a.pem`).isFile);
  }
  assert.equal(Deno.readTextFileSync(`${from}/.hidden`), "hidden\n");
});

test("the upload key cannot write elsewhere, read, delete or get a shell", async () => {
  await using remote = await startRemote();
  const { certificates } = remote;
  const from = await filesOf(remote, { f: "f\n" });
  const outside = join(remote.directory, "outside");
  await Deno.mkdir(outside);
  await Deno.chmod(outside, 0o777);
  await Deno.writeTextFile(`${certificates}/secret`, "secret\n");
  for (const [name, target] of [["out", outside], ["up", "../outside"], ["dot", "."]]) {
    await Deno.symlink(target!, `${from}/${name}`);
  }
  await Deno.mkdir(`${from}/directory`);

  const server = "rsync --server -logDtpre.iLsfxCIvu";
  const commands = [
    "id",
    `${server} . ${outside}`,
    `${server} . ${certificates}/../outside`,
    `${server} . ${certificates} ${outside}`,
    `${server} --daemon . ${certificates}`,
    `${server} --sender . ${certificates}`,
    `${server} --files-from=${certificates}/secret . ${certificates}`,
    `rsync --server; touch ${outside}/x; . ${certificates}`,
    `rsync --server $(touch ${outside}/x) . ${certificates}`,
    `rsync --server -e.\ntouch ${outside}/x\n . ${certificates}`,
    `scp -t ${certificates}; touch ${outside}/x`,
    `scp -f ${certificates}/secret`,
    `scp -t -S/bin/sh ${certificates}`,
    `scp -t ${outside}`,
  ].map((command) => ["mail-upload", command]);
  const otherwise = [["mail-upload"], ["-tt", "mail-upload", "id"], ["-W", "127.0.0.1:22", "mail-upload"]];
  const to = `mail-upload:${certificates}/`;
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
  assert.deepEqual([...Deno.readDirSync(certificates)].filter(({ isSymlink }) => isSymlink), []);
});

test("S9: uploads are limited in size, and nothing is left of one that was refused or interrupted", async () => {
  await using remote = await startRemote();
  const { certificates, uploadOnly } = remote;
  const script = adapt(await Deno.readTextFile(uploadOnly), { "DIRECTORY_KIB=262144": "DIRECTORY_KIB=3000" });
  await Deno.writeTextFile(uploadOnly, script);
  const kib = (size: number) => new Uint8Array(size * 1024);
  const sizes = { large: kib(1100), a: kib(1000), b: kib(1000), c: kib(1000) };
  const from = await filesOf(remote, sizes);
  const upload = (options: string, ...names: string[]) => {
    const files = names.map((name) => join(from, name));
    return rsync(remote, ...options.split(" "), ...files, `mail-upload:${certificates}/`);
  };
  assert.match((await upload("-az", "large")).stderr, /File too large/);
  // detected at the end of a fast transfer, and during a slow one
  for (const options of ["-az", "-a --bwlimit=2000"]) {
    const { code, stderr } = await upload(options, "a", "b", "c");
    assert.notEqual(code, 0);
    assert.match(stderr, /nothing was taken; a file may have 1024 KiB, .* 3000 KiB/);
  }
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

const TYPES = [["rsa", "rsa2048"], ["ec", "prime256v1"]] as const;

/** nginx as the remote user, with what is uploaded for this name, which are self-signed certificates at first. */
async function startNginx({ directory, certificates, user }: Remote, port: number, name: string) {
  const home = join(directory, "nginx");
  await Deno.mkdir(home);
  let pairs = "";
  for (const [type, tag] of TYPES) {
    await makeCertificate(home, type, type, [name]);
    const cert = `${certificates}/${name}-cert-combined.${tag}.test.pem`;
    const key = `${certificates}/private/${name}-key.${tag}.test.pem`;
    await Deno.copyFile(join(home, `${type}.pem`), cert);
    await Deno.copyFile(join(home, `${type}.key`), key);
    pairs += `ssl_certificate ${cert}; ssl_certificate_key ${key};\n`;
  }
  const own = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((what) =>
    `${what}_temp_path ${home}/${what};`
  );
  await Deno.writeTextFile(
    join(home, "nginx.conf"),
    `pid ${home}/pid; error_log ${home}/error.log; daemon off; events {}
http { access_log off; ${own.join(" ")} server { listen 127.0.0.1:${port} ssl; ${pairs} } }\n`,
  );
  await run("chown", "-R", user, home, certificates);
  const as = Deno.uid() === 0 ? ["setpriv", "--reuid", user, "--clear-groups"] : ["env"];
  const args = [...as.slice(1), which("nginx")!, "-c", `${home}/nginx.conf`, "-e", `${home}/error.log`];
  return await startServer(as[0]!, args, port);
}

test("certificates are issued through the remote host and delivered to it, twice with new keys; a host that is down fails alone", async () => {
  await using remote = await startRemote(
    `exec ${which("nginx")} -q -s reload -c HERE/nginx/nginx.conf -e HERE/nginx/error.log`,
  );
  const { certificates, httpPort } = remote;
  const tls = freePort();
  await using _nginx = await startNginx(remote, tls, "imap.example.com");
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 }); // accepts connections and sends nothing
  const settings = "alwaysGenerateNewKeys: yes\ngenerateNewCertsAfterDays: 4\nari: no\n";
  await using bed = await testBed({
    domains: "mail.example.com imap.example.com\ndown.example.com\n",
    settings,
  });
  const hostname = "127.0.0.1";
  const ports: Record<string, number> = {
    "central.example.com": bed.web.port,
    "down.example.com": freePort(),
  };
  const portOf = (name: string) => ports[name] ?? httpPort;
  Object.assign(bed.ca.switches, {
    resolve: (name: string) => ({ hostname, port: portOf(name) }),
    reuse: "none", // each run validates again
  });
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

  // lematt is killed while the redirect is active
  bed.ca.switches.validationDelayMs = 10_000;
  bed.configure({ settings: `${settings}preflight: no\n` });
  const child = bed.start("--test", "--only", "mail.example.com");
  await until("leforward answers", () => accepts(httpPort));
  child.kill("SIGKILL");
  await child.output();
  await until("leforward is gone", async () => !await accepts(httpPort), 10);
  bed.ca.switches.validationDelayMs = undefined;
  bed.configure({ settings });

  const context = {
    sleep: (ms: number) => delay(Math.min(ms, 50)), // remote processes need some real time
    route: (name: string, port: number) =>
      Promise.resolve([{ address: hostname, port: name === hostname ? port : portOf(name) }]),
  };
  const files = () =>
    TYPES.flatMap(([, tag]) => [
      [`${certificates}/imap.example.com-cert-combined.${tag}.test.pem`, 0o644] as const,
      [`${certificates}/private/imap.example.com-key.${tag}.test.pem`, 0o640] as const,
    ]).map(([path, mode]) => {
      assert.equal(Deno.statSync(path).mode! & 0o777, mode, path);
      return Deno.readTextFileSync(path);
    });
  const seen = new Set<string>();
  for (let round = 1; round <= 2; round++) {
    const { code, stdout, stderr } = await bed.run(context);
    assert.equal(code, 1, stdout + stderr);
    assert.match(stderr, /^FAILED +down\.example\.com [\s\S]*timed out during banner exchange/m);
    assert.equal(bed.ca.issued.length, 2 * round, stderr);
    assert.equal(stdout.match(/^verified .* serves the newest certificate/gm)?.length, 2, stdout + stderr);
    for (const text of files()) seen.add(text);
    assert.equal(seen.size, 4 * round, "all certificates and keys are new");
    assert.deepEqual(bed.dropped(), []);
    await until("leforward is gone", async () => !await accepts(httpPort));
    bed.ca.advance(5 * 86_400_000);
  }
});
