/**
 * The remote half over a real sshd: what each key can do and cannot, how leforward ends, and the whole way of
 * certificates to a host that has no web server of its own for the challenge.
 */
import assert from "node:assert/strict";
import { startCa, startWebroot, type Switches } from "./ca.ts";
import {
  accepts,
  find,
  freePort,
  kill,
  missing,
  type Remote,
  replaceAll,
  run,
  startRemote,
  until,
} from "./sshd.ts";

const CENTRAL = "http://central.example.com";
const CHALLENGE = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";

const ACTIONS = Deno.readTextFileSync(new URL("../conf/actions.conf", import.meta.url));

const ignore = missing.length > 0;
if (ignore) console.warn(`remote.test.ts: nothing is tested, for lack of ${missing.join(", ")}`);

/** Runs a program to its end. */
async function attempt(program: string, ...args: string[]) {
  const { code, stdout, stderr } = await new Deno.Command(find(program)!, { args, stdin: "null" }).output();
  return { code, stdout: new TextDecoder().decode(stdout), stderr: new TextDecoder().decode(stderr) };
}

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
  await until(() => accepts(remote.httpPort), `leforward does not answer: ${remote.log()}`);
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

Deno.test({
  name: "the forward key redirects challenges as long as its session lasts, and can do nothing else",
  ignore,
  async fn() {
    await using remote = await startRemote({ baseUrl: CENTRAL });
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
    assert.match(second.stderr, /Cannot listen on port \d+ .*taken.*another leforward/);
  },
});

Deno.test({
  name: "the upload key puts files, and links between them, into its directories with their modes",
  ignore,
  async fn() {
    await using remote = await startRemote({ baseUrl: CENTRAL });
    const from = `${remote.directory}/from`;
    await Deno.mkdir(from);
    await Deno.symlink("a.pem", `${from}/b.pem`);
    const places: [directory: string, mode: number][] = [
      [remote.certificates, 0o644],
      [`${remote.certificates}/private`, 0o640],
    ];
    for (const [directory, mode] of places) {
      for (const text of ["first\n", "second\n"]) {
        await Deno.writeTextFile(`${from}/a.pem`, text);
        const options = ["-avz", `--chmod=F${mode.toString(8)}`, `${from}/a.pem`, `${from}/b.pem`];
        const { code, stderr } = await rsync(remote, ...options, `mail-upload:${directory}/`);
        assert.equal(code, 0, stderr);
        assert.equal(Deno.readLinkSync(`${directory}/b.pem`), "a.pem");
        assert.equal(Deno.readTextFileSync(`${directory}/b.pem`), text);
        assert.equal(Deno.statSync(`${directory}/a.pem`).mode! & 0o7777, mode);
        const files = [...Deno.readDirSync(directory)].map(({ name }) => name).sort();
        assert.deepEqual(files.filter((name) => name !== "private"), ["a.pem", "b.pem"]);
      }
    }
    await Deno.writeTextFile(`${from}/a.pem`, "third\n");
    const args = [...remote.ssh, "-O", `${from}/a.pem`, `mail-upload:${remote.certificates}`];
    const { code, stderr } = await attempt("scp", ...args);
    assert.equal(code, 0, stderr);
    assert.equal(Deno.readTextFileSync(`${remote.certificates}/b.pem`), "third\n");
  },
});

Deno.test({
  name: "the upload key cannot write elsewhere, read, delete or get a shell",
  ignore,
  async fn() {
    await using remote = await startRemote({ baseUrl: CENTRAL });
    const { certificates } = remote;
    const [from, outside] = [`${remote.directory}/from`, `${remote.directory}/outside`];
    for (const path of [from, outside]) {
      await Deno.mkdir(path);
      await Deno.chmod(path, 0o777);
    }
    await Deno.writeTextFile(`${certificates}/secret`, "secret\n");
    await Deno.writeTextFile(`${from}/f`, "f\n");
    await Deno.symlink(outside, `${from}/out`);
    await Deno.symlink("../outside", `${from}/up`);
    await Deno.symlink(".", `${from}/dot`);
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
    ];
    const to = `mail-upload:${certificates}/`;
    await Promise.all([
      ...[
        ...commands.map((command) => ["mail-upload", command]),
        ["mail-upload"],
        ["-tt", "mail-upload", "id"],
        ["-s", "mail-upload", "sftp"],
        ["-W", "127.0.0.1:22", "mail-upload"],
      ].map(async (args) => {
        const { code, stdout } = await attempt("ssh", ...remote.ssh, ...args);
        assert.deepEqual([code !== 0, stdout], [true, ""], args.join(" "));
      }),
      ...[
        [`${to}secret`, from],
        ["-a", "--rsync-path=sh -c id; rsync", `${from}/f`, to],
        ["-a", `${from}/f`, `mail-upload:${outside}/`],
        ["-a", `${from}/out`, to],
        ["-a", `${from}/up`, to],
        ["-a", `${from}/dot`, to],
        ["-a", `${from}/directory`, to],
        ["-aR", "--no-implied-dirs", `${from}/./directory/g`, to],
      ].map(async (args) => {
        const { code } = await rsync(remote, ...args);
        assert.notEqual(code, 0, args.join(" "));
      }),
      // paths outside mean paths inside, or are refused
      ...["--backup-dir", "--temp-dir", "--partial-dir", "--log-file", "--link-dest"].map((option) =>
        rsync(remote, "-a", `-M${option}=${outside}/x`, `${from}/f`, to)
      ),
    ]);

    // a link that lies there is replaced, never written through
    for (
      const upload of [() => rsync(remote, "-a", "--inplace", `${from}/f`, to), () => {
        return attempt("scp", ...remote.ssh, "-O", `${from}/f`, to);
      }]
    ) {
      await Deno.remove(`${certificates}/f`).catch(() => {});
      await Deno.symlink(`${outside}/f`, `${certificates}/f`);
      const { code, stderr } = await upload();
      assert.equal(code, 0, stderr);
      assert.ok(Deno.lstatSync(`${certificates}/f`).isFile);
    }
    assert.deepEqual([...Deno.readDirSync(outside)], []);
    assert.equal(await Deno.readTextFile(`${certificates}/secret`), "secret\n");
    const links = [...Deno.readDirSync(certificates)].filter(({ isSymlink }) => isSymlink);
    assert.deepEqual(links, []);
  },
});

/** The names in a directory. */
function listing(directory: string): string[] {
  return [...Deno.readDirSync(directory)].map(({ name }) => name).sort();
}

Deno.test({
  name: "an upload drops set-uid bits and what others may write, and takes no hidden file",
  ignore,
  async fn() {
    await using remote = await startRemote({ baseUrl: CENTRAL });
    const { certificates } = remote;
    const from = `${remote.directory}/from`;
    await Deno.mkdir(from);
    await Deno.writeTextFile(`${from}/a.pem`, "a\n");
    await Deno.writeTextFile(`${from}/.hidden`, "a\n");
    await run("chmod", "7666", `${from}/a.pem`);
    const scp = (...files: string[]) =>
      attempt("scp", ...remote.ssh, "-O", "-p", ...files, `mail-upload:${certificates}`);
    for (
      const upload of [
        () => rsync(remote, "-a", `${from}/a.pem`, `mail-upload:${certificates}/`),
        () => scp(`${from}/a.pem`),
      ]
    ) {
      const { code, stderr } = await upload();
      assert.equal(code, 0, stderr);
      assert.equal(Deno.statSync(`${certificates}/a.pem`).mode! & 0o7777, 0o664);
      await Deno.remove(`${certificates}/a.pem`);
    }
    assert.notEqual((await rsync(remote, "-a", `${from}/.hidden`, `mail-upload:${certificates}/`)).code, 0);
    assert.notEqual((await scp(`${from}/.hidden`)).code, 0);
    assert.deepEqual(listing(certificates), ["private"]);
  },
});

Deno.test({
  name: "an upload is bounded: each file, and all that is in the directory",
  ignore,
  async fn() {
    await using remote = await startRemote({ baseUrl: CENTRAL });
    const { certificates, uploadOnly } = remote;
    const script = await Deno.readTextFile(uploadOnly);
    await Deno.writeTextFile(
      uploadOnly,
      replaceAll(script, { "DIRECTORY_KIB=262144": "DIRECTORY_KIB=3000" }),
    );
    const from = `${remote.directory}/from`;
    await Deno.mkdir(from);
    const sizes = { "large.pem": 1100, "a.pem": 1000, "b.pem": 1000, "c.pem": 1000 };
    for (const [name, kib] of Object.entries(sizes)) {
      await Deno.writeFile(`${from}/${name}`, new Uint8Array(kib * 1024));
    }
    const upload = (...args: string[]) => rsync(remote, "-az", ...args, `mail-upload:${certificates}/`);
    const large = await upload(`${from}/large.pem`);
    assert.notEqual(large.code, 0);
    assert.match(large.stderr, /File too large/);
    // known at the end of a fast transfer, during a slow one
    for (const options of [[], ["--no-compress", "--bwlimit=1000"]]) {
      const { code, stderr } = await upload(
        ...options,
        ...["a", "b", "c"].map((name) => `${from}/${name}.pem`),
      );
      assert.notEqual(code, 0);
      assert.match(stderr, /nothing was taken; a file may have 1024 KiB, .* 3000 KiB/);
    }
    await until(() => listing(certificates).length === 1, "something is left");
    assert.equal((await upload(`${from}/a.pem`)).code, 0);
  },
});

Deno.test({
  name: "nothing is left of an upload that was cut off, whoever was ended",
  ignore,
  async fn(t) {
    await using remote = await startRemote({ baseUrl: CENTRAL });
    const { certificates, uploadOnly } = remote;
    const from = `${remote.directory}/key.pem`;
    await Deno.writeFile(from, new Uint8Array(1000 * 1024));
    const arrives = () => listing(certificates).some((name) => name.startsWith(".incoming-"));
    const victims: [who: string, signal: Deno.Signal, commandLine: string][] = [
      ["upload-only", "SIGTERM", `sh ${uploadOnly}`],
      ["upload-only", "SIGHUP", `sh ${uploadOnly}`],
      ["the client", "SIGKILL", `rsync .*--bwlimit=77 ${from}`],
    ];
    for (const [who, signal, commandLine] of victims) {
      await t.step(`${who} by ${signal}`, async () => {
        const upload = rsync(remote, "-a", "--bwlimit=77", from, `mail-upload:${certificates}/`);
        await until(arrives, "nothing arrives");
        const pids = (await run("pgrep", "-f", commandLine)).trim().split("\n");
        for (const pid of pids) kill(Number(pid), signal);
        assert.notEqual((await upload).code, 0);
        await until(() => !arrives(), "it is still there");
        assert.deepEqual(listing(certificates), ["private"]);
      });
    }
    await t.step("upload-only by SIGKILL: the next upload removes it, a day later", async () => {
      const left = `${certificates}/.incoming-0123456789`;
      await run("install", "-d", "-o", remote.user, left);
      await run("touch", "-d", "2 days ago", left);
      await Deno.writeTextFile(from, "key\n");
      assert.equal((await rsync(remote, "-a", from, `mail-upload:${certificates}/`)).code, 0);
      assert.deepEqual(listing(certificates), ["key.pem", "private"]);
    });
  },
});

Deno.test({
  name: "a reload key runs its one command, whatever the client asks for",
  ignore,
  async fn() {
    await using remote = await startRemote({ baseUrl: CENTRAL, reload: () => "echo reloaded" });
    await Promise.all([[], ["id"], ["$(id)"]].map(async (command) => {
      const { code, stdout } = await attempt("ssh", ...remote.ssh, "mail-reload-postfix", ...command);
      assert.deepEqual([code, stdout], [0, "reloaded\n"]);
    }));
  },
});

Deno.test({
  name: "leforward never outlives its ssh session: its port is free within two seconds",
  ignore,
  async fn(t) {
    await using remote = await startRemote({
      baseUrl: CENTRAL,
      keys: (text) => text.replace("restrict,command", "restrict,pty,command"), // the first, which is forward
    });
    await using relay = startRelay(remote.port);
    type Session = Awaited<ReturnType<typeof forward>>;
    const killClient = ({ child }: Session) => kill(child.pid, "SIGKILL");
    const endClient = ({ child }: Session) => kill(child.pid, "SIGTERM");
    const dropConnection = () => relay.drop();
    const killServer = async () => (await remote.sessions()).forEach((pid) => kill(pid, "SIGKILL"));
    const closeInput = ({ child }: Session) => child.stdin.close();
    const ways: [string, string[], "piped" | "null", (session: Session) => void | Promise<void>][] = [
      ["the client is killed", [], "piped", killClient],
      ["the client is ended", [], "piped", endClient],
      ["the connection is dropped", [], "piped", dropConnection],
      ["its sshd is killed", [], "piped", killServer],
      ["whoever holds the client's input goes away", [], "piped", closeInput],
      ["the client is killed, which had no input", ["-n"], "null", killClient],
      ["the connection is dropped, without input", ["-n"], "null", dropConnection],
      ["its sshd is killed, without input", ["-n"], "null", killServer],
      ["the client is killed, with a terminal", ["-tt"], "piped", killClient],
      ["the client is ended, with a terminal", ["-tt"], "piped", endClient],
      ["the connection is dropped, with a terminal", ["-tt"], "piped", dropConnection],
      ["its sshd is killed, with a terminal", ["-tt"], "piped", killServer],
    ];
    for (const [name, options, stdin, end] of ways) {
      await t.step({
        name,
        ignore: options.includes("-tt") && Deno.uid() !== 0, // sshd gives a terminal only as root
        async fn() {
          await using session = await forward(remote, [`-oPort=${relay.port}`, ...options], stdin);
          await end(session);
          const taken = await until(async () => !await accepts(remote.httpPort), "leforward is still there");
          assert.ok(taken < 2000, `${taken} ms`);
        },
      });
    }
  },
});

/** nginx as the remote user, with what was uploaded: by RSA and EC, one server a name. */
async function startNginx(remote: Remote, port: number, names: readonly string[]) {
  const { directory, certificates } = remote;
  const home = `${directory}/nginx`;
  await Deno.mkdir(home);
  const servers = names.map((name) =>
    `server { listen 127.0.0.1:${port} ssl; server_name ${name};` +
    ["rsa2048", "prime256v1"].map((tag) => `
      ssl_certificate ${certificates}/${name}-cert-combined.${tag}.test.pem;
      ssl_certificate_key ${certificates}/private/${name}-key.${tag}.test.pem;`).join("") + " }"
  );
  const paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"];
  await Deno.writeTextFile(
    `${home}/nginx.conf`,
    `pid ${home}/pid; error_log ${home}/error.log; daemon off;
events {}
http { access_log off; ${paths.map((path) => `${path}_temp_path ${home}/${path};`).join(" ")}
  ${servers.join("\n  ")} }
`,
  );
  // something to start with, as a host has that gets its first certificate
  for (const [tag, key] of [["rsa2048", "rsa:2048"], ["prime256v1", "ec"]] as const) {
    const options = key === "ec"
      ? ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
      : ["-newkey", key];
    for (const name of names) {
      const out = [
        `${certificates}/private/${name}-key.${tag}.test.pem`,
        `${certificates}/${name}-cert-combined.${tag}.test.pem`,
      ] as const;
      await run(
        "openssl",
        "req",
        "-x509",
        "-nodes",
        ...options,
        "-subj",
        "/CN=old",
        "-keyout",
        out[0],
        "-out",
        out[1],
      );
    }
  }
  await run("chown", "-R", remote.user, home, certificates);
  const child = new Deno.Command(find("nginx")!, {
    args: ["-c", `${home}/nginx.conf`, "-e", `${home}/error.log`],
    uid: Number(await run("id", "-u", remote.user)),
    stdin: "null",
  }).spawn();
  await until(() => accepts(port), "nginx does not answer");
  return {
    async [Symbol.asyncDispose]() {
      kill(child.pid, "SIGTERM");
      await child.status;
    },
  };
}

/** The serial number of the certificate that `name` is served with, of one key type. */
async function served(port: number, name: string, keyType: "RSA" | "ECDSA"): Promise<bigint> {
  // in TLS 1.2 the cipher names the key type
  const shown = await run(
    "sh",
    "-c",
    `openssl s_client -connect 127.0.0.1:${port} -servername ${name} -tls1_2 ` +
      `-cipher ECDHE-${keyType}-AES128-GCM-SHA256 </dev/null 2>/dev/null | openssl x509 -noout -serial`,
  );
  return BigInt(`0x${shown.trim().replace("serial=", "")}`);
}

Deno.test({
  name: "certificates go the whole way, and again with new keys; a host that is down fails alone",
  ignore,
  async fn(t) {
    const tls = freePort();
    await using remote = await startRemote({
      baseUrl: CENTRAL,
      reload: (home) =>
        `exec ${find("nginx")} -q -s reload -c ${home}/nginx/nginx.conf -e ${home}/nginx/error.log`,
    });
    const { certificates, directory } = remote;
    const names = ["mail.example.com", "imap.example.com", "smtp.example.com"];
    await using _nginx = await startNginx(remote, tls, names);
    await Deno.mkdir(`${directory}/drop`);
    await Deno.mkdir(`${directory}/conf`);
    await using webroot = startWebroot(`${directory}/drop`);
    using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 }); // accepts connections and says nothing
    const ports: Record<string, number> = {
      "central.example.com": webroot.port,
      "down.example.com": freePort(),
    };
    const switches: Switches = {
      resolve: (name) => ({ hostname: "127.0.0.1", port: ports[name] ?? remote.httpPort }),
      authorizationLifetimeMs: 86400_000, // each run is validated anew
    };
    await using ca = await startCa(switches);
    const ssh = `ssh ${remote.ssh.join(" ")}`;
    const files = {
      "lematt.conf": `[config]
challengeDropDir: ${directory}/drop
accountKey: account.key
alwaysGenerateNewKeys: yes
generateNewCertsAfterDays: 4
testDirectory: ${ca.directoryUrl}
caBundle: ${ca.caBundleFile}
`,
      domains: "mail.example.com\nimap.example.com smtp.example.com\ndown.example.com\n",
      // the example in conf/actions.conf, which names what the kit makes
      "actions.conf": `${
        replaceAll(ACTIONS.match(/^# \[mail\]\n(# .*\n)+/m)![0].replaceAll(/^# /gm, ""), {
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
`,
    };
    for (const [name, text] of Object.entries(files)) {
      await Deno.writeTextFile(`${directory}/conf/${name}`, text);
    }
    // the program with the world put on loopback
    await Deno.writeTextFile(
      `${directory}/lematt.ts`,
      `import { main } from ${JSON.stringify(new URL("../lematt.ts", import.meta.url).href)};
const ports = ${JSON.stringify(ports)};
const [days, ...args] = Deno.args;
const reached = (host, port) => host === "127.0.0.1" ? port : ports[host] ?? ${remote.httpPort};
Deno.exit(await main(args, {
  route: (host, port) => Promise.resolve([{ address: "127.0.0.1", port: reached(host, port) }]),
  now: () => new Date(Date.now() + Number(days) * 86400_000),
}));
`,
    );
    const lematt = (days: number) => {
      const config = new URL("../deno.json", import.meta.url).pathname;
      const args = ["run", "-q", "--no-prompt", "--config", config, "-P=lematt", `${directory}/lematt.ts`];
      return new Deno.Command(Deno.execPath(), {
        args: [...args, `${days}`, "--test", "--config", `${directory}/conf`],
        stdin: "null",
        stdout: "piped",
        stderr: "piped",
      }).spawn();
    };

    const keys = () =>
      [...Deno.readDirSync(`${certificates}/private`)].filter(({ isFile }) => isFile)
        .map(({ name }) => Deno.readTextFileSync(`${certificates}/private/${name}`));
    let [before, keysBefore]: [bigint[], string[]] = [[], []];
    for (const days of [0, 5]) {
      await t.step(days === 0 ? "first certificates" : "renewal with new keys", async () => {
        ca.advance(days * 86400_000);
        const { code, stdout, stderr } = await lematt(days).output();
        const told = new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
        assert.equal(code, 1, told);
        assert.match(told, /^FAILED +down\.example\.com [\s\S]*timed out during banner exchange/m);
        assert.equal(ca.issued.length, 4 * (days === 0 ? 1 : 2), told); // 2 lines, 2 key types
        const after: bigint[] = [];
        for (const name of names) {
          for (const keyType of ["RSA", "ECDSA"] as const) after.push(await served(tls, name, keyType));
        }
        const issued = ca.issued.slice(-4).map(({ serial }) => BigInt(`0x${serial}`));
        assert.deepEqual(new Set(after), new Set(issued), told);
        assert.ok(before.every((serial) => !after.includes(serial)));
        assert.ok(keysBefore.every((key) => !keys().includes(key)));
        [before, keysBefore] = [after, keys()];
        for (const { name, isFile } of Deno.readDirSync(certificates)) {
          if (isFile) assert.equal(Deno.statSync(`${certificates}/${name}`).mode! & 0o777, 0o644, name);
        }
        for (const { name, isFile } of Deno.readDirSync(`${certificates}/private`)) {
          if (isFile) {
            assert.equal(Deno.statSync(`${certificates}/private/${name}`).mode! & 0o777, 0o640, name);
          }
        }
        assert.deepEqual([...Deno.readDirSync(`${directory}/drop`)], []);
        await until(async () => !await accepts(remote.httpPort), "leforward is still there");
      });
    }

    await t.step("lematt is killed while it holds the redirect", async () => {
      ca.advance(5 * 86400_000);
      switches.validationDelayMs = 10_000;
      const seen = webroot.log.length;
      const child = lematt(10);
      await until(() => webroot.log.length > seen, "no challenge came through leforward");
      child.kill("SIGKILL");
      await child.output();
      const taken = await until(async () => !await accepts(remote.httpPort), "leforward is still there");
      assert.ok(taken < 2000, `${taken} ms`);
    });
    assert.deepEqual(ca.violations, []);
  },
});
