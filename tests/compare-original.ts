/**
 * Runs lematt and the Python original side by side on generated configurations with Pebble, and lists what differs:
 *
 *     deno run -q --no-prompt -P=tests tests/compare-original.ts DIRECTORY_OF_ORIGINAL [COUNT [FIRST]]
 *
 * Files (names, kinds, modes, links), hook commands (order, arguments, environment, directory) and exit status are
 * compared. Then lematt takes over what the original has made: nothing may be issued, everything is delivered once.
 * Each difference must be one that conf/migrate/original.md documents; any other is printed and makes the exit status 1.
 * What lematt refuses is in config.test.ts. A prepare command that was ended before it could log itself, on a busy
 * machine, shows as a difference: run that one again. The original needs python3 and openssl; it runs from a copy that
 * is pointed at Pebble.
 */

import { existsSync } from "node:fs";
import { join, relative } from "node:path";
import { startWebroot } from "./ca.ts";
import { randomFrom } from "./faults.ts";
import { run } from "./install.ts";
import { startPebble } from "./pebble.ts";
import { LEMATT, output } from "./programs.ts";

const [source, count = "100", first = "1"] = Deno.args;
if (source === undefined) {
  console.error("usage: compare-original.ts DIRECTORY_OF_ORIGINAL [COUNT [FIRST]]");
  Deno.exit(2);
}

// ---- what is documented ------------------------------------------------------------------------------------------

const DOCUMENT = Deno.readTextFileSync(join(import.meta.dirname!, "../conf/migrate/original.md"));

/** Documented differences, and how often each was seen. */
const seen = new Map<string, number>();

/** Counts a difference that the document describes under this name. */
function documented(name: string): string {
  if (!DOCUMENT.includes(`\n| ${name} |`)) throw new Error(`conf/migrate/original.md does not have: ${name}`);
  seen.set(name, (seen.get(name) ?? 0) + 1);
  return name;
}

// ---- configurations ----------------------------------------------------------------------------------------------

/** A configuration, and its properties that lead to documented differences. */
interface Sample {
  readonly mode: "test" | "prod";
  readonly domains: string;
  readonly actions: string;
  /** Names of each line, as the original reads them. */
  readonly lines: readonly (readonly string[])[];
  /** Names in the `domains` of all override sections. */
  readonly named: readonly string[];
  /** A name that the CA cannot find. */
  readonly lost?: string;
  /** Whether file names are spelled differently: in upper case, or with the primary twice. */
  readonly spelled: boolean;
  /** Whether a command fails; a prepare command. */
  readonly failing: boolean;
  readonly failingPrepare: boolean;
}

/** Choices that are the same each time for a seed. */
function choices(seed: number) {
  const below = randomFrom(seed);
  return {
    below,
    chance: (percent: number) => below(100) < percent,
    pick: <T>(all: readonly T[]): T => all[below(all.length)]!,
    some<T>(all: readonly T[], most: number): T[] {
      const rest = [...all];
      const count = below(Math.min(most, all.length) + 1);
      return Array.from({ length: count }, () => rest.splice(below(rest.length), 1)[0]!);
    },
  };
}

const PRIMARIES =
  "example.com example.com.au example.org mail.example.org a-b.example.net xn--bcher-kva.example " +
  "deep.er.sub.example.com static.example.info";
const SUBDOMAINS = "www shop mail git wiki chat";

function sample(seed: number, hook: string): Sample {
  const { below, chance, pick, some } = choices(seed * 7919);
  const lines: string[][] = [];
  let spelled = false;
  const texts: string[] = [];
  const pool = PRIMARIES.split(" ");
  for (let left = 1 + below(4); left > 0; left--) {
    let [primary] = pool.splice(below(pool.length), 1);
    if (chance(5)) primary = primary!.replace(/^./, (letter) => letter.toUpperCase());
    const words = [primary!, ...some(SUBDOMAINS.split(" "), chance(50) ? 0 : 4)];
    if (words.length > 1 && chance(10)) words.push(primary!);
    spelled ||= /[A-Z]/.test(primary!) || words.lastIndexOf(primary!) > 0;
    if (words.length > 1 && chance(10)) words[1] = `${words[1]}.${primary}`;
    if (lines.length && chance(6)) words.push(lines[0]!.at(-1)!); // on two lines
    lines.push([...new Set(words.map((word) => word.includes(".") ? word : `${word}.${primary}`))]);
    texts.push(words.join(pick([" ", "  ", "\t"])));
    if (chance(10)) texts.push(texts.at(-1)!); // the same line twice
    if (chance(20)) texts.push(pick(["# example.net", ""]));
  }
  const names = lines.flat();
  const lost = chance(6) ? pick(names) : undefined;

  let failing = false, failingPrepare = false;
  const words = {
    prepare: ["DOMAIN"],
    certs: ["CERTS"],
    keys: ["KEYS"],
    update: ["DOMAINS_CN", "DOMAINS_ALL"],
  };
  const list = (section: string, kind: keyof typeof words) => {
    const commands = Array.from({ length: 1 + below(2) }, (_, index) => {
      const fails = chance(3);
      if (fails && kind === "prepare") failingPrepare = true;
      else if (fails) failing = true;
      const plain = `${hook} ${fails ? "fail" : "well"} ${section} ${kind} ${index} -- ${pick(words[kind])}`;
      if (kind === "prepare" || fails) return plain;
      return pick([
        plain,
        `${plain} && true`,
        `: "$HOME" | ${plain} 2>&1 | cat`,
        `printf '100%%%%\\n' >/dev/null; ${plain}`,
        `printf 'a\nb' >/dev/null\n${plain}`,
      ]);
    });
    if (chance(5) && kind !== "prepare") commands.splice(below(2), 0, "");
    return `[${commands.map((command) => JSON.stringify(command)).join(pick([", ", ",\n   "]))}]`;
  };
  const keysOf = (section: string) =>
    [
      ...chance(40) ? [`prepare: ${list(section, "prepare")}`] : [],
      ...chance(70) ? [`uploadCerts${pick([": ", " = ", ":"])}${list(section, "certs")}`] : [],
      ...chance(60) ? [`uploadKeys: ${list(section, "keys")}`] : [],
      ...chance(80) ? [`${pick(["update", "UPDATE"])}: ${list(section, "update")}`] : [],
    ].join("\n");
  const named: string[] = [];
  const sections = [`[default]\n${keysOf("default")}`, `[every]\n${chance(50) ? "" : keysOf("every")}`];
  for (const name of some(["mail", "web", "Extra-1", "constructor"], 3)) {
    const own = some(names, 3);
    if (chance(10)) own.push(pick(["elsewhere.example.com", "www", "x.example.com,"]));
    if (chance(5) && own[0]) own[0] = own[0].toUpperCase();
    named.push(...new Set(own));
    sections.push(
      `[${name}]\ndomains${pick([": ", " = "])}${own.join(pick([" ", "\n  "]))}\n${keysOf(name)}`,
    );
  }
  const [domains, actions] = [`${texts.join("\n")}\n`, `${sections.join("\n\n")}\n`];
  return {
    mode: pick(["test", "prod"]),
    domains,
    actions,
    lines,
    named,
    lost,
    spelled,
    failing,
    failingPrepare,
  };
}

// ---- the result of a run -----------------------------------------------------------------------------------------

interface Hook {
  readonly section: string;
  /** Kind and place in its list, such as `certs 0`. */
  readonly command: string;
  readonly args: readonly string[];
  readonly environment: string;
  readonly directory: string;
}

interface Outcome {
  readonly code: number;
  readonly output: string;
  readonly hooks: readonly Hook[];
  /** Path below the directory of the mode -> what is there. */
  readonly files: ReadonlyMap<string, string>;
  /** Contents of keys and certificates by path. */
  readonly contents: ReadonlyMap<string, string>;
}

const home = await Deno.makeTempDir({ prefix: "lematt-compare-" });
const HOOK = join(home, "hook"), LOG = join(home, "log"), DROP = join(home, "drop");
await Deno.mkdir(DROP);
await Deno.writeTextFile(
  HOOK,
  `#!/bin/sh
trap "" TERM # written at once and in any case: a prepare command may be ended at any moment
record=$(printf '%s\\037' "$PWD" "$@"; printf '\\036'; env -0 | tr '\\0' '\\037'; printf '\\035')
exec 9>>${LOG}; flock 9
printf %s "$record" >&9
[ "$1" != fail ]
`,
  { mode: 0o755 },
);

/** The hooks that ran, in order; `root` is the directory in which the run was started. */
function takeHooks(root: string): Hook[] {
  if (!existsSync(LOG)) return [];
  const text = Deno.readTextFileSync(LOG).replaceAll(root, "HERE");
  Deno.removeSync(LOG);
  const ours = /^(LEMATT_\w*|DENO_\w+|PYTHON\w+|_|PWD|OLDPWD|SHLVL)=/; // the latter three are shells'
  return text.split("\x1d").slice(0, -1).map((record) => {
    const [head, environment] = record.split("\x1e").map((part) => part.split("\x1f").slice(0, -1));
    const [directory, , section, kind, index, , ...args] = head!;
    return {
      section: section!,
      command: `${kind} ${index}`,
      args,
      environment: environment!.filter((variable) => !ours.test(variable)).sort().join("\n"),
      directory: directory!,
    };
  });
}

function* tree(directory: string, base = directory): Iterable<[string, string]> {
  if (!existsSync(directory)) return;
  for (const { name } of Deno.readDirSync(directory)) {
    const path = join(directory, name);
    const { isDirectory, isSymlink, mode } = Deno.lstatSync(path);
    const bits = (mode! & 0o7777).toString(8).padStart(4, "0");
    const kind = isSymlink
      ? `-> ${Deno.readLinkSync(path)}`
      : `${isDirectory ? "directory" : "file"} ${bits}`;
    yield [relative(base, path), kind];
    if (isDirectory) yield* tree(path, base);
  }
}

const environment = {
  PATH: Deno.env.get("PATH")!,
  HOME: Deno.env.get("HOME")!,
  LC_ALL: "C.UTF-8",
  OF_THE_USER: "a value  with blanks",
};

async function outcome(root: string, mode: string, command: readonly string[], env = {}): Promise<Outcome> {
  const { code, stdout, stderr } = await output(
    [...command, `--${mode}`, "--config", "conf/lematt.conf"],
    { cwd: root, env: { ...environment, ...env }, clearEnv: true },
  );
  const base = join(root, "conf", mode);
  const files = new Map(tree(base));
  const contents = new Map(
    [...files].filter(([path, kind]) => /^(cert|key)\//.test(path) && kind.startsWith("file"))
      .map(([path]) => [path, Deno.readTextFileSync(join(base, path))]),
  );
  return { code, output: stdout + stderr, hooks: takeHooks(root), files, contents };
}

// ---- comparing ---------------------------------------------------------------------------------------------------

const lowerCase = (names: readonly string[]) => names.map((name) => name.toLowerCase());
const isPrepare = ({ command }: Hook) => command.startsWith("prepare");

/** The documented differences that a configuration leads to. */
function applicable({ lines, named, lost, spelled, failing, failingPrepare }: Sample): Set<string> {
  const all = lines.flat();
  const areTwice = (names: readonly string[]) => new Set(lowerCase(names)).size < names.length;
  const table: Record<string, boolean> = {
    "an issuance that fails": lost !== undefined,
    "a command that fails": failing,
    "`prepare`": failingPrepare,
    "names in `domains` of a section": [...all, ...named].some((name) => name !== name.toLowerCase()),
    "names": spelled,
    "a name on two lines": areTwice(all),
    "several override sections for one name": areTwice(named),
  };
  return new Set(Object.keys(table).filter((name) => table[name]));
}

const FAILURES = ["an issuance that fails", "`prepare`", "a command that fails"];
const OF_FILES = ["an issuance that fails", "`prepare`", "names", "a name on two lines"];
const OF_SECTIONS = [
  "several override sections for one name",
  "names in `domains` of a section",
  "a name on two lines",
];

/** Differences that are not documented. */
function compare(sample: Sample, original: Outcome, here: Outcome): string[] {
  const found: string[] = [];
  const applies = applicable(sample);
  /** Records a difference; it counts as documented if one of these names applies. */
  const differ = (text: string, ...names: readonly string[]) => {
    const name = names.find((name) => applies.has(name));
    if (name === undefined) found.push(text);
    else documented(name);
  };
  if (original.code !== here.code) differ(`exit status ${original.code}, here ${here.code}`, ...FAILURES);
  for (const path of new Set([...original.files.keys(), ...here.files.keys()])) {
    const [there, now] = [original.files.get(path), here.files.get(path)];
    if (there === now) continue;
    if (/^(state\.json|\.lock)$/.test(path)) documented("files of its own");
    else if (path === "key" && now === "directory 0700") documented("directories of keys");
    else differ(`${path}: ${there ?? "nothing"}, here ${now ?? "nothing"}`, ...OF_FILES);
  }
  for (const section of new Set([...original.hooks, ...here.hooks].map(({ section }) => section))) {
    const [theirs, ours] = [original, here].map(({ hooks }) =>
      hooks.filter((hook) => hook.section === section)
    ) as [Hook[], Hook[]];
    const prepared = [theirs, ours].map((hooks) =>
      hooks.filter(isPrepare).map(({ command, args }) => `${command} ${lowerCase(args)}`).sort()
    );
    const once = prepared.map((list) => [...new Set(list)].join());
    if (once[0] !== once[1]) {
      differ(`[${section}] prepare: ${once[0]}, here ${once[1]}`, ...FAILURES, ...OF_SECTIONS);
    } else if (prepared[0]!.length !== prepared[1]!.length) documented("`prepare`");
    const [lists, own] = [theirs, ours].map((hooks) => hooks.filter((hook) => !isPrepare(hook)));
    const order = [lists!, own!].map((hooks) => hooks.map(({ command }) => command).join(", "));
    if (order[0] !== order[1]) {
      differ(`[${section}] ran ${order[0]}, here ${order[1]}`, ...FAILURES, ...OF_SECTIONS);
    }
    for (const hook of lists!) {
      const same = own!.find(({ command }) => command === hook.command);
      if (same !== undefined) compareHooks(sample, hook, same, found, differ);
    }
  }
  const [a, b] = [original, here].map(({ hooks }) => [
    ...new Set(hooks.filter((hook) => !isPrepare(hook)).map(({ section }) => section)),
  ]) as [string[], string[]];
  if (b.includes("every") && b.at(-1) !== "every") found.push(`[every] is not last: ${b.join(" ")}`);
  if (a.join() !== b.join() && a.toSorted().join() === b.toSorted().join()) documented("sections");
  return found;
}

/** The same command, run by both. */
function compareHooks(
  { lines }: Sample,
  theirs: Hook,
  ours: Hook,
  found: string[],
  differ: (text: string, ...names: readonly string[]) => void,
): void {
  const what = `[${theirs.section}] ${theirs.command}`;
  const [before, now] = [new Set(lowerCase(theirs.args)), new Set(lowerCase(ours.args))];
  const less = [...before.difference(now)], more = [...now.difference(before)];
  // paths that match only by the original's patterns belong to another line
  const nameOf = (path: string) => path.replace(/^.*\/|-(key|cert-combined)\..*|_.*/g, "");
  const mine = lines.map(lowerCase).filter((names) => [...now].some((path) => names.includes(nameOf(path))));
  const isPattern = /^(certs|keys)/.test(theirs.command) &&
    less.every((path) => path.endsWith("*") || !mine.flat().includes(nameOf(path)));
  const reasons = [...FAILURES.slice(0, 2), "names in `domains` of a section", "names"];
  if (less.length > 0 && isPattern) documented("`CERTS`, `KEYS`");
  else if (less.length > 0) differ(`${what} had ${less.join(" ")}`, ...reasons, "a name on two lines");
  if (more.length > 0) differ(`${what} has ${more.join(" ")} here`, ...reasons, ...OF_SECTIONS);
  if (theirs.environment !== ours.environment) {
    found.push(`${what}: environment\n${theirs.environment}\nhere\n${ours.environment}`);
  }
  if (theirs.directory !== ours.directory) {
    found.push(`${what}: run in ${theirs.directory}, here ${ours.directory}`);
  }
}

/** What is wrong after lematt has taken over a directory that the original made. */
function compareTakenOver(sample: Sample, before: Outcome, after: Outcome, fresh: Outcome): string[] {
  const found: string[] = [];
  const isShared = applicable(sample).has("a name on two lines");
  for (const [path, text] of before.contents) {
    if (after.contents.get(path) === text) continue;
    if (isShared) documented("a name on two lines");
    else found.push(`taken over: ${path} was issued again`);
  }
  if (isShared) return found;
  for (const [path, kind] of after.files) {
    if (before.files.has(path) || /^(state\.json|\.lock)$/.test(path)) continue;
    if (sample.spelled && kind.startsWith("->")) documented("names");
    else found.push(`taken over: ${path} is new`);
  }
  // under an older spelling it has the links of that, too
  const shown = (words: readonly string[]) =>
    lowerCase(words).map((word) => word.replace(/.*\//, ""))
      .filter((word) => !sample.spelled || !word.endsWith(".pem")).sort().join(" ");
  const [once, expected] = [after, fresh].map(({ hooks }) =>
    hooks.filter((hook) => !isPrepare(hook))
      .map(({ section, command, args }) => `[${section}] ${command} ${shown(args)}`).sort().join("\n")
  );
  if (once !== expected) found.push(`taken over: delivered\n${once}\nnot\n${expected}`);
  return found;
}

// ---- the programs --------------------------------------------------------------------------------------------------

await using web = startWebroot(DROP);
await using pebble = await startPebble({
  httpPort: web.port,
  env: { PEBBLE_WFE_NONCEREJECT: "0", PEBBLE_AUTHZREUSE: "0" },
});

/** A copy of the original that asks Pebble, waits less, and names the single name of a request as a SAN as well. */
const copy = join(home, "original");
await Deno.mkdir(copy);
/** The original gives up if Pebble lags behind its own answers. */
const AGAIN = `once = get_crt
def get_crt(*args, **named):
    for left in (2, 1, 0):
        try:
            return once(*args, **named)
        except Exception:
            if not left:
                raise

`;
const changes: Record<string, readonly (readonly [from: RegExp, to: string])[]> = {
  "lematt.py": [
    [/STAGING = ".*"/, `STAGING = "${pebble.directoryUrl}"`],
    [/PRODUCTION = ".*"/, `PRODUCTION = "${pebble.directoryUrl}"`],
    [/useSAN = len\(domains\) > 1/, "useSAN = True"],
  ],
  "acme_tiny.py": [
    [/disable_check=False,/, "disable_check=True,"], // names here are found by Pebble alone
    [/else 2\)/, "else 0.1)"],
    [/^(?=def main)/m, AGAIN],
  ],
};
for (const [file, replacements] of Object.entries(changes)) {
  let text = await Deno.readTextFile(join(source, file));
  for (const [from, to] of replacements) {
    if (!from.test(text)) throw new Error(`${file} has no ${from}`);
    text = text.replace(from, to);
  }
  await Deno.writeTextFile(join(copy, file), text);
}
// not a wrapper that adds variables of its own
const PYTHON = await run("python3", "-c", "import sys; print(sys.executable, end='')");
const account = join(home, "account.key");
await run("openssl", "genrsa", "-out", account, "2048");
await Deno.chmod(account, 0o600);

async function configure(root: string, { domains, actions }: Sample) {
  await Deno.mkdir(join(root, "conf"), { recursive: true });
  const files = {
    domains,
    "actions.conf": actions,
    "lets-encrypt-x3-cross-signed.pem": "", // else the original fetches it
    "lematt.conf": `[config]
accountKey: ${account}
challengeDropDir: ${DROP}
directory: ${pebble.directoryUrl}
testDirectory: ${pebble.directoryUrl}
caBundle: ${pebble.caBundleFile}
preflight: no
keyBitsRSA: 1024
`,
  };
  for (const [name, text] of Object.entries(files)) await Deno.writeTextFile(join(root, "conf", name), text);
}

const python = (root: string, mode: string) =>
  outcome(root, mode, [PYTHON, join(copy, "lematt.py")], {
    SSL_CERT_FILE: pebble.caBundleFile,
    PYTHONUNBUFFERED: "1", // its workers are killed before they flush their output
  });
const lematt = (root: string, mode: string) =>
  outcome(root, mode, LEMATT, { SSL_CERT_FILE: pebble.caBundleFile });

let wrong = 0, taken = 0;
for (let seed = Number(first); seed < Number(first) + Number(count); seed++) {
  const each = sample(seed, HOOK);
  for (const name of each.lines.flat()) {
    if (name !== each.lost) pebble.dns.set(name, "A", "127.0.0.1");
    else pebble.dns.set(name, "A");
  }
  const [theirs, ours] = ["theirs", "ours"].map((name) => join(home, String(seed), name));
  for (const root of [theirs!, ours!]) await configure(root, each);
  const here = await lematt(ours!, each.mode);
  const original = await python(theirs!, each.mode);
  const found = compare(each, original, here);
  if (original.code === 0 && here.code === 0) {
    const again = await lematt(ours!, each.mode);
    if (again.hooks.length || again.code) found.push(`a second run is not idle: ${again.output}`);
    taken++;
    found.push(...compareTakenOver(each, original, await lematt(theirs!, each.mode), here));
  }
  if (found.length) {
    wrong++;
    console.log(`--- configuration ${seed}, --${each.mode}\n${each.domains}\n${each.actions}`);
    const failures = original.output.split("\n").filter((line) => /FAILED|Error/.test(line)).join("\n");
    console.log(`the original: ${original.code}\n${failures}\nhere: ${here.code}\n${here.output}`);
    for (const text of found) console.log(`DIFFERENT ${text}`);
  } else console.error(`${seed}: as documented (${original.code}, ${here.code})`);
  await Deno.remove(join(home, String(seed)), { recursive: true });
}
await Deno.remove(home, { recursive: true });
console.log(
  `${count} configurations, ${taken} taken over, ${wrong} with differences that are not documented`,
);
for (const [name, times] of [...seen].sort((a, b) => b[1] - a[1])) {
  console.log(`${String(times).padStart(6)}  ${name}`);
}
Deno.exitCode = wrong ? 1 : 0;
