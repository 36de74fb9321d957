/**
 * Goal: the command in README fetches everything; every way of starting works from that alone,
 * without a network, for an ordinary user, from a cache that cannot be written. A Deno that is too old is named in one
 * line. Runs itself in a network namespace that has loopback alone.
 */

import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { testBed } from "./bed.ts";
import { install, type Installation, NOBODY, run } from "./install.ts";
import { output } from "./programs.ts";

const ROOT = join(import.meta.dirname!, "..");
const README = Deno.readTextFileSync(join(ROOT, "README.md"));
const [, INSTALL] = /^ {4}(cd \/opt\/lematt && deno install --frozen) /m.exec(README)!;
const [, CRON] = /^ {4}(?:\S+ +){5}(.* --cron .*)$/m.exec(README)!;
/** Set within the namespace, to a directory of its own. */
const DIRECTORY = Deno.env.get("LEMATT_OFFLINE");
const isRoot = Deno.uid() === 0;
const UID = isRoot ? NOBODY : Deno.uid()!;
const NAMESPACE = ["unshare", isRoot ? "-n" : "-rn"];

/** Runs a line for /bin/sh as the user of an installation, with no variables but its own and `more`. */
async function as({ as, env }: Installation, line: string, more: Record<string, string> = {}) {
  const own = { NO_COLOR: "1", ...more, ...env };
  return await output(as("/bin/sh", "-c", line), { cwd: "/", env: own, clearEnv: true });
}

/** All ways in which lematt is started. */
const WAYS = ["", "deno run -q -P=lematt ", "deno run -q -P=lematt --cached-only --frozen "];

if (DIRECTORY === undefined) {
  const lack = await run(NAMESPACE[0]!, NAMESPACE[1]!, "ip", "link", "set", "lo", "up").then(
    () => "",
    () => " (no network namespaces)",
  );
  Deno.test({ name: `without a network${lack}`, ignore: lack !== "" }, async () => {
    const directory = await Deno.makeTempDir({ prefix: "lematt-offline-" });
    try {
      const installation = await install(directory, UID, { packages: false });
      const { DENO_DIR: _, ...ours } = Deno.env.toObject(); // with what this host needs to reach the registry
      const fetched = await as(installation, INSTALL!.replace("/opt/lematt", installation.program), ours);
      if (/error sending request|client error/.test(fetched.stderr)) {
        return console.warn("offline.test.ts: no registry to fetch packages from");
      }
      assert.equal(fetched.code, 0, fetched.stderr);
      await Deno.writeTextFile(join(directory, "installation.json"), JSON.stringify(installation));
      const script = 'ip link set lo up && exec "$0" test --no-prompt -P=tests --no-check "$1" 2>&1';
      const command = [...NAMESPACE, "sh", "-c", script, Deno.execPath(), import.meta.filename!];
      const env = { LEMATT_OFFLINE: directory, NO_COLOR: "1" };
      const { code, stdout } = await output(command, { env });
      assert.equal(code, 0, stdout);
      assert.match(stdout, /4 passed/);
    } finally {
      await run("rm", "-rf", directory);
    }
  });
} else {
  offline(DIRECTORY);
}

function offline(directory: string) {
  const read: Omit<Installation, "as"> = JSON.parse(
    Deno.readTextFileSync(join(directory, "installation.json")),
  );
  const setpriv = ["setpriv", `--reuid=${UID}`, `--regid=${UID}`, "--clear-groups"];
  const host: Installation = { ...read, as: (...command) => isRoot ? [...setpriv, ...command] : command };
  const program = `${host.program}/lematt.ts`;
  const empty = { DENO_DIR: join(directory, "empty") }; // cannot be created either

  Deno.test("lematt issues and delivers without a network, started in every way, from one installation", async () => {
    await run("chmod", "-R", "a-w", join(host.home, ".cache"));
    await using bed = await testBed({ domains: "a.example.com", settings: "keyTypes: ec\npreflight: no" });
    bed.configure({ actions: `[default]\nprepare: ["exec cat"]\nupdate: ["touch ${bed.drop}/updated"]\n` });
    await run("chown", "-R", `${UID}`, bed.conf, bed.drop);
    await run("chmod", "755", bed.home, dirname(bed.ca.caBundleFile));
    await Deno.symlink(bed.conf, join(host.program, "conf"));
    const lines: [line: string, out: RegExp][] = [
      ...WAYS.flatMap((way): [string, RegExp][] => [
        [`${way}${program} --check`, /no errors/],
        [`${way}${program} --test --renew a.example.com`, /^issued .*a\.example\.com/m],
      ]),
      [
        CRON!.replace("/opt/lematt", host.program).replace("/etc/lematt", bed.conf),
        /^issued .*a\.example\.com/m,
      ],
    ];
    for (const [line, expected] of lines) {
      const { code, stdout, stderr } = await as(host, line);
      assert.deepEqual([code, stderr], [0, ""], `${line}: ${stdout}`);
      assert.match(stdout, expected, line);
    }
    await Deno.stat(join(bed.drop, "updated"));
    await Deno.remove(join(host.program, "conf"));
  });

  for (const way of ["", "deno run -q -P=leforward --cached-only --frozen "]) {
    Deno.test(`leforward needs no package, started by ${way || "its first line"}`, async () => {
      const { code, stdout, stderr } = await as(host, `${way}${host.program}/leforward.ts --help`, empty);
      assert.deepEqual([code, stderr], [0, ""]);
      assert.match(stdout, /--baseurl/);
    });
  }

  Deno.test("a Deno that is too old is reported in one line", async () => {
    const preload = join(directory, "old.ts");
    await Deno.writeTextFile(
      preload,
      `Object.defineProperty(Deno, "version", { value: { deno: "2.8.3" } });\n`,
    );
    const { code, stdout, stderr } = await as(
      host,
      `deno run -q -P=lematt --preload ${preload} ${program} --check`,
    );
    assert.deepEqual([code, stdout, stderr], [2, "", "lematt: Deno 2.9 or newer is needed; this is 2.8.3\n"]);
  });
}
