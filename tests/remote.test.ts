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
import { CENTRAL, kill, lacking, type Remote, startRemote } from "./sshd.ts";
import { accepts, freePort, makeCertificate, startServer } from "./tls.ts";
import { together } from "./together.ts";

const CHALLENGE = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";

const inTurn = together("the remote half");
const test = (name: string, fn: () => Promise<void>) => inTurn(name, fn, lacking);

const attempt = (program: string, ...args: string[]) => output([which(program)!, ...args]);

/** rsync over the ssh of `remote`. */
function rsync(remote: Remote, ...args: string[]) {
  return attempt("rsync", "-e", `ssh ${remote.ssh.join(" ")}`, ...args);
}

/** An ssh client with the forward key, once its leforward answers. */
async function forward(remote: Remote, options: string[] = [], stdin: "piped" | "null" = "piped") {
  const child = new Deno.Command("ssh", {
    args: [...remote.ssh, ...options, "mail-forward", CENTRAL],
    stdin,
    stdout: "null",
    stderr: "null",
  }).spawn();
  await until(`leforward answers: ${remote.log()}`, () => accepts(remote.httpPort));
  return {
    child,
    async [Symbol.asyncDispose]() {
      kill(child.pid, "SIGKILL");
      if (stdin === "piped") await child.stdin.abort().catch(() => {});
      await child.status;
    },
  };
}

/** A relay to `port` of 127.0.0.1 that can drop its connections, as when a network goes away. */
function startRelay(port: number) {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  let dropping = new AbortController();
  const relaying = (async () => {
    for await (const client of listener) {
      const server = await Deno.connect({ hostname: "127.0.0.1", port });
      const { signal } = dropping;
      client.readable.pipeTo(server.writable, { signal }).catch(() => {});
      server.readable.pipeTo(client.writable, { signal }).catch(() => {});
    }
  })();
  const drop = () => {
    dropping.abort();
    dropping = new AbortController();
  };
  return {
    port: listener.addr.port,
    drop,
    async [Symbol.asyncDispose]() {
      listener.close();
      await relaying;
      drop();
    },
  };
}

test("a key allows one action, redirecting challenges or a reload, whatever command the client sends", async () => {
  await using remote = await startRemote({ reload: "echo reloaded" });
  await Promise.all([[], ["id"], ["$(id)"]].map(async (command) => {
    const { code, stdout } = await attempt("ssh", ...remote.ssh, "mail-reload-postfix", ...command);
    assert.deepEqual([code, stdout], [0, "reloaded\n"]);
  }));
  const refused: [args: string[], code: number][] = [
    [["mail-forward"], 2],
    [["mail-forward", "id"], 2],
    [["--", "mail-forward", "--help"], 2],
    [["--", "mail-forward", `--baseurl ${CENTRAL}`], 2],
    [["mail-forward", `${CENTRAL}; id`], 2],
    [["mail-forward", `${CENTRAL}\nid`], 2],
    [["mail-forward", "$(id)"], 2],
    [["mail-forward", "http://elsewhere.example.com"], 2],
    [["-s", "mail-forward", "sftp"], 2],
    [["-W", "127.0.0.1:22", "mail-forward"], 255],
  ];
  await Promise.all(refused.map(async ([args, code]) => {
    const found = await attempt("ssh", ...remote.ssh, ...args);
    assert.deepEqual([found.code, found.stdout], [code, ""], `${args}: ${found.stderr}`);
  }));
  assert.equal(await accepts(remote.httpPort), false);

  await using _session = await forward(remote);
  const answer = await fetch(`http://127.0.0.1:${remote.httpPort}${CHALLENGE}`, { redirect: "manual" });
  assert.deepEqual([answer.status, answer.headers.get("location")], [301, CENTRAL + CHALLENGE]);
  const second = await attempt("ssh", ...remote.ssh, "mail-forward", CENTRAL);
  assert.equal(second.code, 1);
  assert.match(second.stderr, /listen on port \d+ /);
});

test("the upload key writes files, and links between them, into its directories with their modes", async () => {
  await using remote = await startRemote();
  const { certificates } = remote;
  const from = join(remote.directory, "from");
  await Deno.mkdir(from);
  await Deno.symlink("a.pem", `${from}/b.pem`);
  await Deno.writeTextFile(`${from}/.hidden`, "hidden\n");
  const scp = (...files: string[]) =>
    attempt("scp", ...remote.ssh, "-O", "-p", ...files, `mail-upload:${certificates}`);
  for (const [directory, mode] of [[certificates, 0o644], [`${certificates}/private`, 0o640]] as const) {
    for (const text of ["first\n", "second\n"]) {
      await Deno.writeTextFile(`${from}/a.pem`, text);
      const options = ["-avz", `--chmod=F${mode.toString(8)}`, `${from}/a.pem`, `${from}/b.pem`];
      const { code, stderr } = await rsync(remote, ...options, `mail-upload:${directory}/`);
      assert.equal(code, 0, stderr);
      assert.equal(Deno.readLinkSync(`${directory}/b.pem`), "a.pem");
      assert.equal(Deno.readTextFileSync(`${directory}/b.pem`), text);
      assert.equal(Deno.statSync(`${directory}/a.pem`).mode! & 0o7777, mode);
      assert.deepEqual(listing(directory).filter((name) => name !== "private"), ["a.pem", "b.pem"]);
    }
  }
  // S9: set-uid bits and what others may write are dropped, hidden files are not taken
  await run("chmod", "7666", `${from}/a.pem`);
  for (
    const upload of [
      () => rsync(remote, "-a", `${from}/a.pem`, `mail-upload:${certificates}/`),
      () => scp(`${from}/a.pem`),
    ]
  ) {
    await Deno.remove(`${certificates}/a.pem`);
    const { code, stderr } = await upload();
    assert.equal(code, 0, stderr);
    assert.equal(Deno.readTextFileSync(`${certificates}/b.pem`), "second\n");
    assert.equal(Deno.statSync(`${certificates}/a.pem`).mode! & 0o7777, 0o664);
  }
  assert.notEqual((await rsync(remote, "-a", `${from}/.hidden`, `mail-upload:${certificates}/`)).code, 0);
  assert.notEqual((await scp(`${from}/.hidden`)).code, 0);
  assert.deepEqual(listing(certificates), ["a.pem", "b.pem", "private"]);
});

test("the upload key cannot write elsewhere, read, delete or get a shell", async () => {
  await using remote = await startRemote();
  const { certificates } = remote;
  const [from, outside] = [join(remote.directory, "from"), join(remote.directory, "outside")];
  for (const path of [from, outside]) {
    await Deno.mkdir(path);
    await Deno.chmod(path, 0o777);
  }
  await Deno.writeTextFile(`${certificates}/secret`, "secret\n");
  await Deno.writeTextFile(`${from}/f`, "f\n");
  for (const [name, target] of [["out", outside], ["up", "../outside"], ["dot", "."]]) {
    await Deno.symlink(target!, `${from}/${name}`);
  }
  await Deno.mkdir(`${from}/directory`);
  await Deno.writeTextFile(`${from}/directory/g`, "g\n");

  const server = "rsync --server -logDtpre.iLsfxCIvu";
  const commands = [
    "id",
    `${server} . ${outside}`,
    `${server} . ${certificates}/../outside`,
    `${server} . ${certificates} ${outside}`,
    `${server} --daemon . ${certificates}`,
    `${server} --sender . ${certificates}`,
    `${server} --files-from=${certificates}/secret . ${certificates}`,
    `${server} --write-devices . ${certificates}`,
    `rsync --server; touch ${outside}/x; . ${certificates}`,
    `rsync --server $(touch ${outside}/x) . ${certificates}`,
    `rsync --server \`touch ${outside}/x\` . ${certificates}`,
    `rsync --server -e.\ntouch ${outside}/x\n . ${certificates}`,
    `touch ${outside}/x; scp -t ${certificates}`,
    `scp -t ${certificates}; touch ${outside}/x`,
    `scp -f ${certificates}/secret`,
    `scp -r -t ${certificates}`,
    `scp -t -S/bin/sh ${certificates}`,
    `scp -t ${outside}`,
  ].map((command) => ["mail-upload", command]);
  const otherwise = [
    ["mail-upload"],
    ["-tt", "mail-upload", "id"],
    ["-s", "mail-upload", "sftp"],
    ["-W", "127.0.0.1:22", "mail-upload"],
  ];
  const to = `mail-upload:${certificates}/`;
  const transfers = [
    [`${to}secret`, from],
    ["-a", "--rsync-path=sh -c id; rsync", `${from}/f`, to],
    ["-a", `${from}/f`, `mail-upload:${outside}/`],
    ["-a", `${from}/out`, to],
    ["-a", `${from}/up`, to],
    ["-a", `${from}/dot`, to],
    ["-a", `${from}/directory`, to],
    ["-aR", "--no-implied-dirs", `${from}/./directory/g`, to],
  ];
  // paths outside are taken for paths inside, or refused
  const options = ["--backup-dir", "--temp-dir", "--partial-dir", "--log-file", "--link-dest"];
  await Promise.all([
    ...[...commands, ...otherwise].map(async (args) => {
      const { code, stdout } = await attempt("ssh", ...remote.ssh, ...args);
      assert.deepEqual([code !== 0, stdout], [true, ""], args.join(" "));
    }),
    ...transfers.map(async (args) => assert.notEqual((await rsync(remote, ...args)).code, 0, args.join(" "))),
    ...options.map((option) => rsync(remote, "-a", `-M${option}=${outside}/x`, `${from}/f`, to)),
  ]);

  // an existing link is replaced, and its target not written to
  for (
    const upload of [
      () => rsync(remote, "-a", "--inplace", `${from}/f`, to),
      () => attempt("scp", ...remote.ssh, "-O", `${from}/f`, to),
    ]
  ) {
    await Deno.remove(`${certificates}/f`).catch(() => {});
    await Deno.symlink(`${outside}/f`, `${certificates}/f`);
    const { code, stderr } = await upload();
    assert.equal(code, 0, stderr);
    assert.ok(Deno.lstatSync(`${certificates}/f`).isFile);
  }
  assert.deepEqual(listing(outside), []);
  assert.equal(await Deno.readTextFile(`${certificates}/secret`), "secret\n");
  assert.deepEqual([...Deno.readDirSync(certificates)].filter(({ isSymlink }) => isSymlink), []);
});

test("S9: uploads are limited: the size of each file, and the size of the directory", async () => {
  await using remote = await startRemote();
  const { certificates, uploadOnly } = remote;
  const script = adapt(await Deno.readTextFile(uploadOnly), { "DIRECTORY_KIB=262144": "DIRECTORY_KIB=3000" });
  await Deno.writeTextFile(uploadOnly, script);
  const from = join(remote.directory, "from");
  await Deno.mkdir(from);
  const sizes = { "large.pem": 1100, "a.pem": 1000, "b.pem": 1000, "c.pem": 1000 };
  for (const [name, kib] of Object.entries(sizes)) {
    await Deno.writeFile(`${from}/${name}`, new Uint8Array(kib * 1024));
  }
  const upload = (...args: string[]) => rsync(remote, "-az", ...args, `mail-upload:${certificates}/`);
  const large = await upload(`${from}/large.pem`);
  assert.notEqual(large.code, 0);
  assert.match(large.stderr, /File too large/);
  // detected at the end of a fast transfer, and during a slow one
  const files = ["a", "b", "c"].map((name) => `${from}/${name}.pem`);
  for (const options of [[], ["--no-compress", "--bwlimit=2000"]]) {
    const { code, stderr } = await upload(...options, ...files);
    assert.notEqual(code, 0);
    assert.match(stderr, /nothing was taken; a file may have 1024 KiB, .* 3000 KiB/);
  }
  await until("nothing is left", () => listing(certificates).length === 1);
  assert.equal((await upload(`${from}/a.pem`)).code, 0);
});

test("S9: nothing is left of an interrupted upload, whichever process was ended", async () => {
  await using remote = await startRemote();
  const { certificates, uploadOnly } = remote;
  const from = join(remote.directory, "key.pem");
  await Deno.writeFile(from, new Uint8Array(1000 * 1024));
  const arrives = () => listing(certificates).some((name) => name.startsWith(".incoming-"));
  const victims: [signal: Deno.Signal, commandLine: string][] = [
    ["SIGTERM", `sh ${uploadOnly}`],
    ["SIGHUP", `sh ${uploadOnly}`],
    ["SIGKILL", `rsync .*--bwlimit=77 ${from}`], // the client
  ];
  for (const [signal, commandLine] of victims) {
    const upload = rsync(remote, "-a", "--bwlimit=77", from, `mail-upload:${certificates}/`);
    await until("something arrives", arrives);
    for (const pid of (await run("pgrep", "-f", commandLine)).trim().split("\n")) kill(Number(pid), signal);
    assert.notEqual((await upload).code, 0);
    await until("it is gone", () => !arrives());
    assert.deepEqual(listing(certificates), ["private"]);
  }
  // after SIGKILL, the next upload removes what is older than a day
  const left = `${certificates}/.incoming-0123456789`;
  await run("install", "-d", "-o", remote.user, left);
  await run("touch", "-d", "2 days ago", left);
  await Deno.writeTextFile(from, "key\n");
  assert.equal((await rsync(remote, "-a", from, `mail-upload:${certificates}/`)).code, 0);
  assert.deepEqual(listing(certificates), ["key.pem", "private"]);
});

test("leforward never outlives its ssh session", async () => {
  await using remote = await startRemote({
    keys: (text) => text.replace("restrict,command", "restrict,pty,command"), // the first, which is forward
  });
  await using relay = startRelay(remote.port);
  type Session = Awaited<ReturnType<typeof forward>>;
  const ends: Record<string, (session: Session) => void | Promise<void>> = {
    "the client is killed": ({ child }) => kill(child.pid, "SIGKILL"),
    "the client is ended": ({ child }) => kill(child.pid, "SIGTERM"),
    "the connection is dropped": () => relay.drop(),
    "its sshd is killed": async () => (await remote.sessions()).forEach((pid) => kill(pid, "SIGKILL")),
    "the client's input is closed": ({ child }) => child.stdin.close(),
  };
  const [killed, ended, dropped, served] = Object.keys(ends);
  const ways: [options: string[], ends: string[]][] = [
    [[], Object.keys(ends)],
    [["-n"], [killed!, dropped!, served!]], // without input
    [["-tt"], Deno.uid() === 0 ? [killed!, ended!, dropped!, served!] : []], // sshd gives a terminal only as root
  ];
  for (const [options, names] of ways) {
    for (const name of names) {
      const stdin = options.includes("-n") ? "null" : "piped";
      await using session = await forward(remote, [`-oPort=${relay.port}`, ...options], stdin);
      await ends[name]!(session);
      await until(`${name}, ${options}: its port is free`, async () => !await accepts(remote.httpPort), 4);
    }
  }
});

/** nginx as the remote user, with what is uploaded under these names, which are self-signed certificates at first. */
async function startNginx({ directory, certificates, user }: Remote, port: number, names: readonly string[]) {
  const home = join(directory, "nginx");
  await Deno.mkdir(home);
  const types = [["rsa", "rsa2048"], ["ec", "prime256v1"]] as const;
  for (const [type, tag] of types) {
    await makeCertificate(home, type, type, names);
    for (const name of names) {
      await Deno.copyFile(join(home, `${type}.pem`), `${certificates}/${name}-cert-combined.${tag}.test.pem`);
      await Deno.copyFile(join(home, `${type}.key`), `${certificates}/private/${name}-key.${tag}.test.pem`);
    }
  }
  const servers = names.map((name) =>
    `server { listen 127.0.0.1:${port} ssl; server_name ${name};` +
    types.map(([, tag]) =>
      `ssl_certificate ${certificates}/${name}-cert-combined.${tag}.test.pem;
       ssl_certificate_key ${certificates}/private/${name}-key.${tag}.test.pem;`
    ).join("") + " }\n"
  );
  const own = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((what) =>
    `${what}_temp_path ${home}/${what};`
  );
  await Deno.writeTextFile(
    join(home, "nginx.conf"),
    `pid ${home}/pid; error_log ${home}/error.log; daemon off; events {}
http { access_log off; ${own.join(" ")} ${servers.join("")} }\n`,
  );
  await run("chown", "-R", user, home, certificates);
  const as = Deno.uid() === 0 ? ["setpriv", "--reuid", user, "--clear-groups"] : ["env"];
  const command = [...as, which("nginx")!, "-c", `${home}/nginx.conf`, "-e", `${home}/error.log`];
  return await startServer(command[0]!, command.slice(1), port);
}

test("certificates are issued through the remote host and delivered to it, twice with new keys; a host that is down fails alone", async () => {
  const reload = `exec ${which("nginx")} -q -s reload -c HERE/nginx/nginx.conf -e HERE/nginx/error.log`;
  await using remote = await startRemote({ reload });
  const { certificates, httpPort } = remote;
  const names = ["mail.example.com", "imap.example.com", "smtp.example.com"];
  const tls = freePort();
  await using _nginx = await startNginx(remote, tls, names);
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 }); // accepts connections and sends nothing
  const settings = "alwaysGenerateNewKeys: yes\ngenerateNewCertsAfterDays: 4\nari: no\n";
  await using bed = await testBed({
    domains: "mail.example.com\nimap.example.com smtp.example.com\ndown.example.com\n",
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
  bed.act(`${
    adapt(example.replaceAll(/^# /gm, ""), {
      "domains: mail.example.com": `domains: ${names.join(" ")}`,
      "ssh mail-": `${ssh} mail-`,
      "rsync -a": `rsync -a -e '${ssh}'`,
      "/etc/ssl/lematt": certificates,
      '"mail.example.com:465", "mail.example.com:25/smtp", "mail.example.com:143/imap"': names
        .map((name) => `"127.0.0.1:${tls}#${name}"`).join(", "),
    })
  }
[down]
domains: down.example.com
prepare: ["${ssh} -oPort=${silent.addr.port} -oConnectTimeout=1 mail-forward ${CENTRAL}"]
`);
  // lematt is killed while the redirect is active
  bed.ca.switches.validationDelayMs = 10_000;
  bed.configure({ settings: `${settings}preflight: no\n` });
  const child = bed.start("--test", "--only", "mail.example.com");
  await until("leforward answers", () => accepts(httpPort));
  child.kill("SIGKILL");
  await child.output();
  await until("leforward is gone", async () => !await accepts(httpPort), 4);
  bed.ca.switches.validationDelayMs = undefined;
  bed.configure({ settings });

  const context = {
    // remote processes need some real time
    sleep: (ms: number) => delay(Math.min(ms, 50)),
    route: (name: string, port: number) =>
      Promise.resolve([{ address: hostname, port: name === hostname ? port : portOf(name) }]),
  };
  const directories: [directory: string, mode: number][] = [[certificates, 0o644], [
    join(certificates, "private"),
    0o640,
  ]];
  const textsIn = (directory: string) =>
    listing(directory).filter((name) => /\.pem$/.test(name)).map((name) =>
      Deno.readTextFileSync(join(directory, name))
    );
  let before: string[] = [];
  for (let round = 1; round <= 2; round++) {
    const { code, stdout, stderr } = await bed.run(context);
    assert.equal(code, 1, stdout + stderr);
    assert.match(stderr, /^FAILED +down\.example\.com [\s\S]*timed out during banner exchange/m);
    assert.equal(bed.ca.issued.length, 4 * round, stderr); // 2 lines, 2 key types
    assert.equal(stdout.match(/^verified .* serves the newest certificate/gm)?.length, 6, stdout + stderr);
    for (const [directory, mode] of directories) {
      for (const name of listing(directory).filter((name) => name !== "private")) {
        assert.equal(Deno.statSync(join(directory, name)).mode! & 0o777, mode, name);
      }
    }
    const after = directories.flatMap(([directory]) => textsIn(directory));
    assert.ok(after.every((text) => !before.includes(text)), "all certificates and keys are new");
    before = after;
    assert.deepEqual(bed.dropped(), []);
    await until("leforward is gone", async () => !await accepts(httpPort));
    bed.ca.advance(5 * 86_400_000);
  }
});
