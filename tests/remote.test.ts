/**
 * The remote half over a real sshd: what each key can do and cannot, how leforward ends, and the whole way of a
 * certificate to a host without a web server of its own.
 */
import assert from "node:assert/strict";
import { accepts, find, kill, missing, type Remote, startRemote, until } from "./sshd.ts";

const CENTRAL = "http://central.example.com";
const CHALLENGE = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
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
    stderr: "piped",
  }).spawn();
  const stderr = new Response(child.stderr).text();
  await until(() => accepts(remote.httpPort), `leforward does not answer: ${remote.log()}`);
  return {
    pid: child.pid,
    child,
    async [Symbol.asyncDispose]() {
      kill(child.pid, "SIGKILL");
      if (stdin === "piped") await child.stdin.abort().catch(() => {});
      await Promise.all([child.status, stderr]);
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
    {
      await using _session = await forward(remote);
      const url = `http://127.0.0.1:${remote.httpPort}${CHALLENGE}`;
      const answer = await fetch(url, { redirect: "manual" });
      assert.deepEqual([answer.status, answer.headers.get("location")], [301, CENTRAL + CHALLENGE]);
      const second = await attempt("ssh", ...remote.ssh, "mail-forward", CENTRAL);
      assert.equal(second.code, 1);
      assert.match(second.stderr, /Cannot listen on port \d+ .* taken.*another leforward/);
    }
    for (
      const [args, code] of [
        [["mail-forward"], 2],
        ...[
          "id",
          "--help",
          `--baseurl ${CENTRAL}`,
          `${CENTRAL}; id`,
          `${CENTRAL}\nid`,
          "$(id)",
          "http://elsewhere.example.com",
        ].map((command) => [["--", "mail-forward", command], 2] as const),
        [["-s", "mail-forward", "sftp"], 2],
        [["-W", "127.0.0.1:22", "mail-forward"], 255],
      ] as const
    ) {
      const { code: found, stdout, stderr } = await attempt("ssh", ...remote.ssh, ...args);
      assert.deepEqual([found, stdout], [code, ""], `${args}: ${stderr}`);
    }
    assert.equal(await accepts(remote.httpPort), false);
  },
});

Deno.test({
  name:
    "the upload key puts files and the links between them into its directories, whole and with their modes",
  ignore,
  async fn() {
    await using remote = await startRemote({ baseUrl: CENTRAL });
    const from = `${remote.directory}/from`;
    await Deno.mkdir(from);
    await Deno.writeTextFile(`${from}/a.pem`, "first\n", { mode: 0o600 });
    await Deno.symlink("a.pem", `${from}/b.pem`);
    const files = [`${from}/a.pem`, `${from}/b.pem`];
    const arrived = (directory: string) => ({
      names: [...Deno.readDirSync(directory)].filter(({ isDirectory }) => !isDirectory).map(({ name }) =>
        name
      ),
      link: Deno.readLinkSync(`${directory}/b.pem`),
      mode: Deno.statSync(`${directory}/a.pem`).mode! & 0o7777,
      text: Deno.readTextFileSync(`${directory}/b.pem`),
    });
    const names = (found: { names: string[] }) => found.names.sort();
    for (
      const [directory, mode] of [[remote.certificates, 0o644], [
        `${remote.certificates}/private`,
        0o640,
      ]] as const
    ) {
      for (const text of ["first\n", "second\n"]) {
        await Deno.writeTextFile(`${from}/a.pem`, text);
        const options = ["-avz", `--chmod=F${mode.toString(8)}`];
        const { code, stderr } = await rsync(remote, ...options, ...files, `mail-upload:${directory}/`);
        assert.equal(code, 0, stderr);
        const found = arrived(directory);
        assert.deepEqual([names(found), found.link, found.mode, found.text], [
          ["a.pem", "b.pem"],
          "a.pem",
          mode,
          text,
        ]);
      }
    }
    await Deno.writeTextFile(`${from}/a.pem`, "third\n");
    const { code, stderr } = await attempt(
      "scp",
      ...remote.ssh,
      "-O",
      `${from}/a.pem`,
      `mail-upload:${remote.certificates}`,
    );
    assert.equal(code, 0, stderr);
    assert.equal(arrived(remote.certificates).text, "third\n");
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
    const bare = "rsync --server -logDtpre.iLsfxCIvu";

    for (
      const [what, code, program, ...args] of [
        ["a shell", 1, "ssh", ...remote.ssh, "mail-upload"],
        ["a terminal", 255, "ssh", ...remote.ssh, "-tt", "mail-upload", "id"],
        ["sftp", 1, "ssh", ...remote.ssh, "-s", "mail-upload", "sftp"],
        ["a forwarded port", 255, "ssh", ...remote.ssh, "-W", "127.0.0.1:22", "mail-upload"],
        ...[
          "id",
          `${bare} . ${outside}`,
          `${bare} . ${certificates}/../outside`,
          `${bare} . ${certificates} ${outside}`,
          `${bare} --daemon . ${certificates}`,
          `${bare} --sender . ${certificates}`,
          `${bare} --files-from=${certificates}/secret . ${certificates}`,
          `${bare} --write-devices . ${certificates}`,
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
        ].map((command) => [command, 1, "ssh", ...remote.ssh, "mail-upload", command]),
      ] as [string, number, string, ...string[]][]
    ) {
      const found = await attempt(program, ...args);
      assert.deepEqual([found.code, found.stdout], [code, ""], `${what}: ${found.stderr}`);
    }

    const to = `mail-upload:${certificates}/`;
    for (
      const args of [
        [to + "secret", from], // reading
        ["-a", "--rsync-path=sh -c id; rsync", `${from}/f`, to],
        ["-a", `${from}/f`, `mail-upload:${outside}/`],
        ["-a", `${from}/out`, to],
        ["-a", `${from}/up`, to],
        ["-a", `${from}/dot`, to],
        ["-a", `${from}/directory`, to],
        ["-aR", "--no-implied-dirs", `${from}/./directory/g`, to],
        ["-aL", `${from}/out/`, `mail-upload:${certificates}/private/../../outside/`],
      ]
    ) {
      const { code } = await rsync(remote, ...args);
      assert.notEqual(code, 0, args.join(" "));
    }
    for (const option of ["--backup-dir", "--temp-dir", "--partial-dir", "--log-file", "--link-dest"]) {
      await rsync(remote, "-a", `-M${option}=${outside}/x`, `${from}/f`, to);
    }
    // links that lay there before, made by whoever owns the directory
    await Deno.symlink(`${outside}/written`, `${certificates}/f`).catch(() => {});
    assert.equal((await rsync(remote, "-a", "--inplace", `${from}/f`, to)).code, 0);
    await Deno.remove(`${certificates}/f`);
    await Deno.symlink(`${outside}/written`, `${certificates}/f`);
    assert.equal((await attempt("scp", ...remote.ssh, "-O", `${from}/f`, to)).code, 0);

    assert.deepEqual([...Deno.readDirSync(outside)], []);
    const left = [...Deno.readDirSync(certificates)].map(({ name }) => name).sort();
    assert.deepEqual(left.filter((name) => !["x", "private"].includes(name)), ["f", "secret"]);
    assert.equal(await Deno.readTextFile(`${certificates}/f`), "f\n");
  },
});

Deno.test({
  name: "a reload key runs its one command, whatever the client asks for",
  ignore,
  async fn() {
    await using remote = await startRemote({ baseUrl: CENTRAL, reload: "echo reloaded" });
    for (const command of [[], ["id"], ["$(id)"]]) {
      const { code, stdout } = await attempt("ssh", ...remote.ssh, "mail-reload-nginx", ...command);
      assert.deepEqual([code, stdout], [0, "reloaded\n"]);
    }
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
    type Session = Awaited<ReturnType<typeof forward>>;
    const killClient = ({ pid }: Session) => kill(pid, "SIGKILL");
    const endClient = ({ pid }: Session) => kill(pid, "SIGTERM");
    const killServer = async () => (await remote.sessions()).forEach((pid) => kill(pid, "SIGKILL"));
    await using relay = startRelay(remote.port);
    const dropConnection = () => relay.drop();
    const closeInput = async ({ child }: Session) => {
      await new Promise((resolve) => setTimeout(resolve, 400)); // else it was never open
      await child.stdin.close();
    };
    for (
      const [name, options, stdin, end] of [
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
      ] as const
    ) {
      await t.step(name, async () => {
        await using session = await forward(remote, [`-oPort=${relay.port}`, ...options], stdin);
        await end(session);
        const milliseconds = await until(
          async () => !await accepts(remote.httpPort),
          `leforward is still there`,
        );
        assert.ok(milliseconds < 2000, `${milliseconds} ms`);
      });
    }
  },
});
