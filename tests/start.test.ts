/**
 * Goal: both programs start in every way in which users start them, as root and as an ordinary user, and Deno never
 * prompts: on a terminal it would wait without end.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { settled } from "../lib/context.ts";
import { which } from "./bench-measure.ts";
import { testBed, until } from "./bed.ts";
import { adapt, blocks, ROOT } from "./documents.ts";
import { textOf } from "./faults.ts";
import { install, type Installation, NOBODY, run } from "./install.ts";
import { LEMATT, output, temporaryDirectory } from "./programs.ts";
import { freePort } from "./tls.ts";

const README = Deno.readTextFileSync(join(ROOT, "README.md"));
const SCRIPT = "/usr/bin/script";
if (!existsSync(SCRIPT)) {
  console.warn("start.test.ts: nothing is tested at a terminal without script (bsdutils)");
}

/** Whether cron can run here, with files of its own in the place of the system's. */
const CRON = which("cron") !== undefined &&
  await run("unshare", "--mount", "mount", "-t", "tmpfs", "none", "/run").then(() => true, () => false);
if (!CRON) {
  console.warn("start.test.ts: nothing is run by cron: it is not installed, or only root can start it");
}

const SYSTEMD = which("systemd-analyze") !== undefined;
if (!SYSTEMD) console.warn("start.test.ts: no units are checked without systemd-analyze");

/**
 * Runs a line for /bin/sh at a pseudo-terminal, as the user of an installation, and types each answer when its question
 * appears. Returns what is shown. It is ended by a prompt of Deno, or after a minute.
 */
async function atTerminal(
  { as, env }: Installation,
  line: string,
  answers: Readonly<Record<string, string>> = {},
) {
  const [command, ...args] = as(SCRIPT, "-qec", line, "/dev/null");
  const child = new Deno.Command(command!, {
    args,
    cwd: "/",
    env: { ...env, TERM: "xterm", SHELL: "/bin/sh", NO_COLOR: "1" },
    clearEnv: true,
    stdin: "piped",
    stdout: "piped",
    stderr: "null",
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
  return { code: (await child.status).code, seen };
}

/** A bed that belongs to a user, with commands of every kind; the last one serves what was issued. */
async function bedFor(uid: number) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({ domains: "a.example.com", settings: "keyTypes: ec\npreflight: no" }));
  const installation = await install(bed.home, uid);
  const host = join(bed.home, "host");
  await Deno.mkdir(host);
  const [port, file] = [freePort(), (what: string) => `${host}/a.example.com-${what}.prime256v1.pem`];
  const serve = `openssl s_server -quiet -accept 127.0.0.1:${port} -cert ${file("cert-combined")} -key ${
    file("key")
  }`;
  bed.configure({
    actions: `[default]
prepare: ["exec cat"]
uploadCerts: ["cp CERTS ${host}"]
uploadKeys: ["cp KEYS ${host}"]
update: ["${serve} </dev/null >/dev/null 2>&1 & touch ${host}/served"]
verify: ["127.0.0.1:${port}#DOMAIN"]
alert: ["cat"]
`,
  });
  stack.defer(() => run("pkill", "-f", `openssl s_server .* ${host}/`).then(() => {}, () => {})); // it may have ended
  await run("chown", "-R", `${uid}`, bed.conf, bed.drop, host);
  await run("chmod", "755", dirname(bed.ca.caBundleFile));
  await Deno.symlink(bed.conf, join(installation.program, "conf"));
  const cleanup = stack.move();
  return { bed, ...installation, [Symbol.asyncDispose]: () => cleanup.disposeAsync() };
}

/** Users and ways of starting, of which there is no need to try each with each. */
function starts(name: "lematt" | "leforward"): [uid: number, by: string][] {
  const ours = Deno.uid()!;
  const byPermissions = `deno run -P=${name} `;
  return ours === 0 ? [[0, ""], [NOBODY, ""], [NOBODY, byPermissions]] : [[ours, ""], [ours, byPermissions]];
}

type Command = [args: string, code: number, answers?: Record<string, string>];
const COMMANDS: readonly Command[] = [
  ["--help", 0],
  ["--check", 0],
  ["--prod --plan", 0],
  ["--prod", 0],
  ["--prod", 0],
  ["--prod --plan --renew a.example.com --deliver a.example.com", 0],
  ["--prod --accept a.example.com", 0],
  ["--prod --prune", 0],
  ["--prod --status", 0],
  ["--prod --status --offline --json", 0],
  ["--prod --status --metrics", 0],
  ["--prod --rollover", 0, { "[y/N]": "y\n" }],
  ["--prod --revoke a.example.com", 2, { "[y/N]": "n\n" }],
  ["--prod --revoke a.example.com", 0, { "[y/N]": "y\n" }],
];

Deno.test("on a terminal lematt asks only its own questions, for each user and way of starting", {
  ignore: !existsSync(SCRIPT),
}, async () => {
  await settled(
    starts("lematt").map(async ([uid, by]) => {
      await using host = await bedFor(uid);
      const { bed } = host;
      const show = async ([args, code, answers = {}]: Command) => {
        const ended = await atTerminal(host, `exec ${by}${host.program}/lematt.ts ${args}`, answers);
        assert.doesNotMatch(ended.seen, /Deno requests/, args);
        assert.equal(ended.code, code, `${args}: ${ended.seen}`);
        for (const question of Object.keys(answers)) assert(ended.seen.includes(question), ended.seen);
      };
      for (const command of COMMANDS) await show(command);
      assert.equal(Deno.statSync(join(bed.home, "host", "served")).uid, uid);
      bed.configure({ actions: "" }); // else the prepare command has 30 s to make the name answer
      await show(["--check --challenges", 1]);
    }),
  );
});

Deno.test("on a terminal leforward asks nothing and ends on Ctrl-C, for each user and way of starting", {
  ignore: !existsSync(SCRIPT),
}, async () => {
  await settled(
    starts("leforward").map(async ([uid, by]) => {
      await using temporary = await temporaryDirectory();
      const home = temporary.path;
      const installation = await install(home, uid);
      const line = `exec ${by}${installation.program}/leforward.ts --port 0 --baseurl http://c.example`;
      const { code, seen } = await atTerminal(installation, line, { "redirects to": "\x03" });
      assert.doesNotMatch(seen, /Deno requests/);
      assert.deepEqual([code, seen.includes("leforward: ended: SIGINT")], [0, true], seen);
    }),
  );
});

Deno.test("README's commands lead an ordinary user from nothing to the first certificate", async () => {
  await using bed = await testBed({ domains: "a.example.com", settings: "keyTypes: ec" });
  const uid = Deno.uid()! || NOBODY;
  const { as, env, program } = await install(bed.home, uid);
  const [etc, texts] = [join(bed.home, "etc"), join(bed.home, "texts")];
  await run("cp", "-r", join(ROOT, "conf"), program);
  await run("cp", "-r", bed.conf, texts);
  await run("mkdir", "-m", "700", etc);
  await run("chown", "-R", `${uid}`, etc, texts, bed.drop);
  await run("chmod", "755", dirname(bed.ca.caBundleFile));
  const commands = adapt(blocks("README.md", "First certificate")[0]!, {
    "/opt/lematt": program,
    "/etc/lematt": etc,
    "deno install --frozen": "test -f lematt.ts", // offline.test.ts runs it
    "editor ": `cp ${texts}/lematt.conf ${texts}/domains ${etc}; : `,
  });
  const { code, stdout, stderr } = await output(as("sh", "-euc", commands), {
    cwd: "/",
    env,
    clearEnv: true,
  });
  assert.deepEqual([code, stderr], [0, ""], stdout);
  assert.match(stdout, /^issued .*a\.example\.com[^]*^issued .*a\.example\.com/m);
  for (const name of ["cert/a.example.com-cert-combined", "key/a.example.com-key"]) {
    assert.equal(Deno.statSync(`${etc}/prod/${name}.prime256v1.pem`).uid, uid);
  }
});

/** Documented crontabs, and where they go. */
const CRONTABS: readonly (readonly [what: string, place: string, text: string])[] = [
  [
    "README.md",
    "/var/spool/cron/crontabs/certmaint",
    README.match(/(^ {4}.*\n)*^ {4}\d.* --cron\b.*\n/m)![0],
  ],
  ["conf/remote", "/etc/cron.d/lematt", await Deno.readTextFile(join(ROOT, "conf/remote/crontab"))],
];

for (const [what, place, text] of CRONTABS) {
  Deno.test(`the crontab of ${what} runs lematt under real cron, as an ordinary user`, {
    ignore: !CRON,
  }, async () => {
    await using host = await bedFor(NOBODY);
    const { bed, home } = host;
    const replacements = {
      "/opt/lematt": host.program,
      "/etc/lematt": bed.conf,
      "PATH=/usr/local/bin:": `PATH=${host.bin}:`,
    };
    // each command again, to run when cron starts
    const crontab = adapt(text, replacements).replace(
      /^ *(\S+ +){4}\S+ +(.* --cron\b.*)/m,
      (line, _, command) => `${line}\n@reboot ${command} >${home}/log 2>&1; echo $? >${home}/status`,
    );
    const passwd = `root:x:0:0::/:/bin/sh\ncertmaint:*:${NOBODY}:${NOBODY}::${home}:/bin/sh\n`;
    for (const [name, text] of Object.entries({ crontab, passwd, empty: "" })) {
      await Deno.writeTextFile(join(bed.home, name), text);
    }
    // a separate cron: other users, other crontabs, and no deno in cron's default PATH
    const script = `set -e; cd ${bed.home}
mount -t tmpfs none /run; mount -t tmpfs none /var/spool/cron; mount -t tmpfs none /etc/cron.d
mount --bind passwd /etc/passwd; mount --bind empty /etc/crontab
[ ! -e /usr/bin/deno ] || mount --bind empty /usr/bin/deno
mkdir -m 1730 /var/spool/cron/crontabs; install -m 600 -o ${
      place.startsWith("/etc") ? "root" : "certmaint"
    } crontab ${place}
exec cron -f -L 0`;
    const child = new Deno.Command("unshare", {
      args: ["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script],
      stdin: "null",
    }).spawn();
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

Deno.test(
  "systemd accepts the units, and rates their exposure as low",
  { ignore: !SYSTEMD },
  async () => {
    await using temporary = await temporaryDirectory();
    const directory = temporary.path;
    const places = ["conf/remote", "conf/monitoring"].map((place) => join(ROOT, place));
    const units = places.flatMap((place) =>
      [...Deno.readDirSync(place)].filter(({ name }) => /\.(service|timer)$/.test(name))
        .map(({ name }) => [join(place, name), name] as const)
    );
    assert.equal(units.length, 6);
    for (const [path, name] of units) {
      const text = await Deno.readTextFile(path);
      const programs = text.replace("/opt/lematt/lematt.ts", join(ROOT, "lematt.ts"))
        .replace("/usr/local/bin/leforward.ts", join(ROOT, "leforward.ts"));
      await Deno.writeTextFile(join(directory, name), programs);
    }
    // systemd-analyze prints what it rejects, and exits with 0
    const names = units.map(([, name]) => name);
    const { stderr } = await output(["systemd-analyze", "verify", ...names], { cwd: directory });
    const printed = stderr.split("\n")
      .filter((line) => [directory, ...names].some((name) => line.includes(name)));
    assert.deepEqual(printed, []);
    for (const name of ["lematt.service", "leforward.service"]) {
      await run("systemd-analyze", "security", "--offline=true", "--threshold=20", join(directory, name));
    }
  },
);

Deno.test("if packages were not fetched, lematt fetches none and reports in one line how to", async () => {
  await using bed = await testBed({ domains: "a.example.com" });
  const env = { DENO_DIR: join(bed.home, "empty") };
  for (const what of ["--check", "--test"]) {
    const { code, stderr } = await output([...LEMATT, what, "--config", bed.conf], { env });
    assert.equal(code, 2);
    assert.match(stderr, /^lematt: .* cd \/.* && deno install --frozen\n$/);
  }
});

Deno.test("deno task compile makes self-contained programs that never prompt", async () => {
  await using temporary = await temporaryDirectory();
  const directory = temporary.path;
  const latin1 = new TextDecoder("latin1");
  const { tasks } = JSON.parse(await Deno.readTextFile(join(ROOT, "deno.json")));
  for (const name of ["lematt", "leforward"]) {
    const command = tasks[`compile:${name}`].replace("-q ", "").replace("bin/", `${directory}/`);
    // denort, to which the program is appended, is not installed everywhere: any executable shows what is appended
    const env = { DENORT_BIN: await Deno.realPath("/bin/sh"), NO_COLOR: "1" };
    const compile = command.replace(/^deno/, `'${Deno.execPath()}'`);
    const { code, stderr: printed } = await output(["/bin/sh", "-c", compile], { cwd: ROOT, env });
    assert.equal(code, 0, printed);
    const appended = latin1.decode(await Deno.readFile(join(directory, name)));
    assert.match(appended, /"permissions":\{[^}]*"prompt":false\}/, name);
    if (name === "leforward") continue;
    const { modules } = JSON.parse(await run(Deno.execPath(), "info", "--json", join(ROOT, "lematt.ts")));
    for (const { local } of modules.filter(({ local }: { local?: string }) => local?.startsWith(ROOT))) {
      assert.ok(appended.includes(latin1.decode((await Deno.readFile(local)).subarray(0, 80))), local);
    }
    for (const name of ["jose", "zx", "x509", "reflect-metadata"]) {
      assert.match(printed, new RegExp(`${name}/([\\d.]+/)?\\*`), name);
    }
  }
});
