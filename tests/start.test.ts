/** Goal: both programs start in every way in which users start them, also without a network, and Deno never prompts. */

import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { settled } from "../lib/context.ts";
import { testBed, until } from "./bed.ts";
import { textOf } from "./faults.ts";
import {
  adapt,
  blocks,
  install,
  type Installation,
  LEMATT,
  NOBODY,
  output,
  ROOT,
  run,
  temporaryDirectory,
} from "./programs.ts";
import { freePort } from "./tls.ts";

const README = Deno.readTextFileSync(join(ROOT, "README.md"));
const UID = Deno.uid()! || NOBODY;
const OFFLINE = Deno.uid() === 0 ? ["unshare", "-n"] : ["unshare", "-rn", "--map-current-user"];

/** Options of a test that needs what this command needs: a program, or the rights of root. */
async function needs(command: string): Promise<{ ignore: boolean }> {
  const ignore = await run("sh", "-c", command).then(() => false, () => true);
  if (ignore) console.log(`start.test.ts: a test is skipped, since this fails: ${command}`);
  return { ignore };
}

/** Runs a line for /bin/sh as the user of an installation, with no variables but the user's and `more`. */
function shell({ as, env }: Installation, line: string, more: Record<string, string>, ...by: string[]) {
  const options = { cwd: "/", env: { NO_COLOR: "1", ...more, ...env }, clearEnv: true };
  return output([...by, ...as("/bin/sh", "-euc", line)], options);
}

/** The same at a pseudo-terminal, where each answer is typed when its question appears. A prompt of Deno ends it. */
async function atTerminal({ as, env }: Installation, line: string, answers: Record<string, string> = {}) {
  const [command, ...args] = as("script", "-qec", line, "/dev/null");
  const child = new Deno.Command(command!, {
    ...{ args, cwd: "/", env: { ...env, TERM: "xterm", SHELL: "/bin/sh", NO_COLOR: "1" }, clearEnv: true },
    ...{ stdin: "piped", stdout: "piped", stderr: "null" },
  }).spawn();
  const keyboard = child.stdin.getWriter();
  const deadline = setTimeout(() => child.kill(), 60_000);
  const open = Object.entries(answers);
  let seen = "";
  for await (const text of child.stdout.pipeThrough(new TextDecoderStream())) {
    seen += text;
    if (seen.includes("Deno requests")) child.kill();
    if (open.length > 0 && seen.includes(open[0]![0])) {
      await keyboard.write(new TextEncoder().encode(open.shift()![1]));
    }
  }
  clearTimeout(deadline);
  await keyboard.close().catch(() => {});
  assert.doesNotMatch(seen, /Deno requests/, line);
  assert.deepEqual(open, [], seen);
  return { code: (await child.status).code, seen };
}

/** A bed that belongs to a user, with commands of every kind; the last one serves what was issued. */
async function bedFor(uid: number) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({ domains: "a.example.com", settings: "keyTypes: ec\npreflight: no" }));
  const installation = await install(bed.home, uid);
  const [host, port] = [join(bed.home, "host"), freePort()];
  await Deno.mkdir(host);
  const file = (what: string) => `${host}/a.example.com-${what}.prime256v1.pem`;
  const serve = `openssl s_server -quiet -accept 127.0.0.1:${port} -cert ${file("cert-combined")}`;
  bed.act(`[default]
prepare: ["exec cat"]
uploadCerts: ["cp CERTS ${host}"]
uploadKeys: ["cp KEYS ${host}"]
update: ["${serve} -key ${file("key")} </dev/null >/dev/null 2>&1 & touch ${host}/served"]
verify: ["127.0.0.1:${port}#DOMAIN"]
alert: ["cat"]
`);
  stack.defer(() => run("pkill", "-f", `openssl s_server .* ${host}/`).then(() => {}, () => {})); // it may have ended
  await run("chown", "-R", `${uid}`, bed.conf, bed.drop, host);
  await run("chmod", "755", dirname(bed.ca.caBundleFile));
  await Deno.symlink(bed.conf, join(installation.program, "conf"));
  const cleanup = stack.move();
  return { bed, ...installation, [Symbol.asyncDispose]: () => cleanup.disposeAsync() };
}

const terminal = await needs("command -v script");
Deno.test("R1: on a terminal the programs ask only their own questions", terminal, async () => {
  const commands: [args: string, code: number, answers?: Record<string, string>][] = [
    ["--check", 0],
    ["--prod --plan", 0],
    ["--prod", 0],
    ["--prod --prune", 0],
    ["--prod --status", 0],
    ["--prod --rollover", 0, { "[y/N]": "y\n" }],
    ["--prod --revoke a.example.com", 2, { "[y/N]": "n\n" }],
    ["--prod --revoke a.example.com", 0, { "[y/N]": "y\n" }],
  ];
  const starts = [[UID, "exec "], [Deno.uid()!, "exec deno run -P=NAME "]] as const;
  await settled(starts.map(async ([uid, by]) => {
    await using host = await bedFor(uid);
    const start = (name: string) => `${by.replace("NAME", name)}${host.program}/${name}.ts`;
    for (const [args, code, answers] of commands) {
      const ended = await atTerminal(host, `${start("lematt")} ${args}`, answers);
      assert.equal(ended.code, code, `${args}: ${ended.seen}`);
    }
    assert.equal(Deno.statSync(join(host.bed.home, "host", "served")).uid, uid);
    host.bed.act(""); // else the prepare command has 30 s to make the name answer
    const failed = await atTerminal(host, `${start("lematt")} --check --challenges`);
    assert.equal(failed.code, 1, failed.seen);
    const line = `${start("leforward")} --port 0 --baseurl http://c.example`;
    const { code, seen } = await atTerminal(host, line, { "redirects to": "\x03" });
    assert.deepEqual([code, seen.includes("leforward: ended: SIGINT")], [0, true], seen);
  }));
});

const namespaces = await needs(`${OFFLINE.join(" ")} true`);
Deno.test("README leads from nothing to a certificate, then also without a network", namespaces, async () => {
  await using bed = await testBed({ domains: "a.example.com", settings: "keyTypes: ec" });
  const host = await install(bed.home, UID, { packages: false });
  const [etc, texts, cache] = [join(bed.home, "etc"), join(bed.home, "texts"), join(host.home, ".cache")];
  await run("cp", "-r", join(ROOT, "conf"), host.program);
  await run("cp", "-r", bed.conf, texts);
  await run("mkdir", "-m", "700", etc);
  await run("chown", "-R", `${UID}`, etc, texts, bed.drop);
  await run("chmod", "755", dirname(bed.ca.caBundleFile));
  const commands = adapt(blocks("README.md", "First certificate")[0]!, {
    "/opt/lematt": host.program,
    "/etc/lematt": etc,
    "editor ": `cp ${texts}/lematt.conf ${texts}/domains ${etc}; : `,
  });
  const { DENO_DIR: _, ...ours } = Deno.env.toObject(); // with what this host needs to reach the registry
  const { code, stdout, stderr } = await shell(host, commands, ours);
  if (/error sending request|client error/.test(stderr)) {
    return console.warn("start.test.ts: there is no registry");
  }
  assert.equal(code, 0, stdout + stderr);
  assert.match(stdout, /^issued .*a\.example\.com[^]*^issued .*a\.example\.com/m);
  for (const name of ["cert/a.example.com-cert-combined", "key/a.example.com-key"]) {
    assert.equal(Deno.statSync(`${etc}/prod/${name}.prime256v1.pem`).uid, UID);
  }

  await run("chmod", "-R", "a-w", cache);
  await using restoring = new AsyncDisposableStack();
  restoring.defer(async () => void await run("chmod", "-R", "u+w", cache)); // or only root could remove it
  for (const way of ["", "deno run -q -P=lematt ", "deno run -q -P=lematt --cached-only --frozen "]) {
    const checked = await shell(host, `${way}${host.program}/lematt.ts --check ${etc}`, {}, ...OFFLINE);
    assert.deepEqual([checked.code, checked.stderr], [0, ""], `${way}: ${checked.stdout}`);
  }
  for (const way of ["", "deno run -q -P=leforward --cached-only --frozen "]) {
    const line = `${way}${host.program}/leforward.ts --help`;
    const helped = await shell(host, line, { DENO_DIR: "/nowhere" }, ...OFFLINE);
    assert.deepEqual([helped.code, helped.stdout.includes("--baseurl")], [0, true], way);
  }
});

Deno.test("missing packages and a Deno that is too old are reported in one line", async () => {
  await using temporary = await temporaryDirectory();
  const env = { DENO_DIR: join(temporary.path, "empty") };
  const missing = await output([...LEMATT, "--check"], { env });
  assert.equal(missing.code, 2);
  assert.match(missing.stderr, /^lematt: .* cd \/.* && deno install --frozen\n$/);
  const preload = join(temporary.path, "old.ts");
  await Deno.writeTextFile(preload, 'Object.defineProperty(Deno, "version", { value: { deno: "2.8.3" } });');
  const { code, stderr } = await output([...LEMATT.toSpliced(-1, 0, `--preload=${preload}`), "--check"]);
  assert.deepEqual([code, stderr], [2, "lematt: Deno 2.9 or newer is needed; this is 2.8.3\n"]);
});

const cron = await needs("command -v cron && unshare --mount mount -t tmpfs none /run");
const CRONTABS = {
  "/var/spool/cron/crontabs/certmaint": README.match(/(^ {4}.*\n)*^ {4}\d.* --cron\b.*\n/m)![0],
  "/etc/cron.d/lematt": Deno.readTextFileSync(join(ROOT, "conf/remote/crontab")),
};
for (const [place, text] of Object.entries(CRONTABS)) {
  Deno.test(`T7: the documented ${place} runs lematt under real cron, as a user`, cron, async () => {
    await using host = await bedFor(NOBODY);
    const { bed, home } = host;
    const path = "PATH=/usr/local/bin:";
    const words = { "/opt/lematt": host.program, "/etc/lematt": bed.conf, [path]: `PATH=${host.bin}:` };
    // each command again, to run when cron starts
    const crontab = adapt(text, words).replace(
      /^ *(\S+ +){4}\S+ +(.* --cron\b.*)/m,
      (line, _, command) => `${line}\n@reboot ${command} >${home}/log 2>&1; echo $? >${home}/status`,
    );
    await Deno.writeTextFile(join(bed.home, "crontab"), crontab);
    // a separate cron: other users, other crontabs, and no deno in cron's default PATH
    const script = `set -e; cd ${bed.home}; touch empty
printf 'root:x:0:0::/:/bin/sh\\ncertmaint:*:${NOBODY}:${NOBODY}::${home}:/bin/sh\\n' > passwd
mount -t tmpfs none /run; mount -t tmpfs none /var/spool/cron; mount -t tmpfs none /etc/cron.d
mount --bind passwd /etc/passwd; mount --bind empty /etc/crontab
[ ! -e /usr/bin/deno ] || mount --bind empty /usr/bin/deno
mkdir -m 1730 /var/spool/cron/crontabs; install -m 600 crontab ${place}
[ ${place} = /etc/cron.d/lematt ] || chown certmaint ${place}
exec cron -f -L 0`;
    const args = ["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script];
    const child = new Deno.Command("unshare", { args, stdin: "null" }).spawn();
    try {
      await until("the run has ended", () => textOf(join(home, "status")) !== "");
      const log = await Deno.readTextFile(join(home, "log"));
      assert.equal(textOf(join(home, "status")), "0\n", log);
      assert.match(log, /^issued .*a\.example\.com/m);
      assert.equal(Deno.statSync(join(bed.home, "host", "served")).uid, NOBODY);
    } finally {
      child.kill("SIGKILL");
      await child.status;
    }
  });
}

const systemd = await needs("command -v systemd-analyze");
Deno.test("systemd accepts the units, and rates their exposure as low", systemd, async () => {
  await using temporary = await temporaryDirectory();
  const script = `cd ${temporary.path} && cp ${ROOT}/conf/*/*.service ${ROOT}/conf/*/*.timer .
sed -i 's|/opt/lematt/|${ROOT}/|; s|/usr/local/bin/leforward|${ROOT}/leforward|' *.service
systemd-analyze verify * 2>&1
systemd-analyze security --offline=true --threshold=20 lematt.service leforward.service >&2; ls >&2`;
  const { code, stdout, stderr } = await output(["sh", "-euc", script]);
  const names = stderr.match(/^\S+\.(service|timer)$/gm);
  assert.deepEqual([code, names?.length], [0, 6], stderr);
  // it prints what it rejects, also in the units of this host, and exits with 0
  const isOurs = (line: string) => [temporary.path, ...names!].some((name) => line.includes(name));
  assert.deepEqual(stdout.split("\n").filter(isOurs), []);
});

Deno.test("deno task compile makes programs with all packages in them that never prompt", async () => {
  await using temporary = await temporaryDirectory();
  const { tasks } = JSON.parse(await Deno.readTextFile(join(ROOT, "deno.json")));
  // denort, to which the program is appended, is not installed everywhere: any executable shows what is appended
  const env = { DENORT_BIN: await Deno.realPath("/bin/sh"), NO_COLOR: "1" };
  const packages = { leforward: [], lematt: ["jose", "zx", "x509", "reflect-metadata"] };
  for (const [name, expected] of Object.entries(packages)) {
    const words = { "deno ": `${Deno.execPath()} `, " -q": "", "bin/l": `${temporary.path}/l` };
    const compile = adapt(tasks[`compile:${name}`], words);
    const { code, stderr } = await output(["sh", "-c", compile], { cwd: ROOT, env });
    assert.equal(code, 0, stderr);
    for (const one of expected) assert.match(stderr, new RegExp(`${one}/([\\d.]+/)?\\*`));
    const program = new TextDecoder("latin1").decode(await Deno.readFile(join(temporary.path, name)));
    assert.match(program, /"permissions":\{[^}]*"prompt":false\}/, name);
  }
});
