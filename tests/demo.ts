/**
 * `deno task demo`: lematt on this host alone. Starts the CA of ca.ts and a web server for a drop directory, runs lematt.ts
 * with them twice, and shows the files that it wrote and the commands that it ran.
 */

import { join, relative } from "node:path";
import { startCa, startWebroot } from "./ca.ts";

const PROGRAM = join(import.meta.dirname!, "../lematt.ts");
const headline = (text: string) =>
  console.log(Deno.noColor || !Deno.stdout.isTerminal() ? `\n${text}` : `\n\x1b[1m${text}\x1b[0m`);

const home = await Deno.makeTempDir({ prefix: "lematt-demo-" });
const conf = join(home, "conf");
const hosts = join(home, "hosts");
await Deno.mkdir(conf);
for (const directory of ["challenges", "web", "mail", "manager"]) {
  await Deno.mkdir(join(directory === "challenges" ? home : hosts, directory), { recursive: true });
}

await using webroot = await startWebroot(join(home, "challenges"));
await using ca = await startCa({ httpPort: webroot.port });

const files = {
  "lematt.conf": `[config]
challengeDropDir: ${join(home, "challenges")}
accountKey: account.key
testDirectory: ${ca.directoryUrl}
caBundle: ${ca.caBundleFile}
# these names exist only for the CA of this demo
preflight: no
`,
  "domains": `mail.example.com
example.com www shop
`,
  "actions.conf": `[default]
uploadCerts: ["cp -P CERTS ${hosts}/web/"]
uploadKeys: ["cp -P KEYS ${hosts}/web/"]
update: ["echo reloading nginx for DOMAINS_CN >> ${home}/reloads"]

[mailserver]
domains: mail.example.com
prepare: ["echo port 80 of DOMAIN is open >> ${home}/reloads; cat"]
uploadCerts: ["cp CERTS ${hosts}/mail/"]
uploadKeys: ["cp KEYS ${hosts}/mail/"]
update: ["echo reloading postfix >> ${home}/reloads", "echo reloading dovecot >> ${home}/reloads"]

[every]
uploadCerts: ["cp -P CERTS ${hosts}/manager/"]
`,
};
for (const [name, text] of Object.entries(files)) {
  headline(`conf/${name}`);
  console.log(text.trimEnd().replaceAll(home, "~"));
  await Deno.writeTextFile(join(conf, name), text);
}

async function lematt(...args: string[]): Promise<number> {
  headline(`lematt.ts ${args.join(" ")} --config ~/conf`);
  const { code, stdout, stderr } = await new Deno.Command(Deno.execPath(), {
    args: ["run", "-q", "--no-prompt", "-P=lematt", PROGRAM, ...args, "--config", conf],
    cwd: home,
  }).output();
  for (const text of [stdout, stderr]) {
    if (text.length > 0) console.log(new TextDecoder().decode(text).trimEnd().replaceAll(home, "~"));
  }
  return code;
}

function* tree(directory: string): Iterable<string> {
  for (
    const { name, isDirectory } of [...Deno.readDirSync(directory)].sort((a, b) => a.name < b.name ? -1 : 1)
  ) {
    const path = join(directory, name);
    if (isDirectory) {
      yield* tree(path);
      continue;
    }
    const { mode } = Deno.lstatSync(path);
    const permissions = ((mode ?? 0) & 0o777).toString(8).padStart(4, "0");
    const link = Deno.lstatSync(path).isSymlink ? ` -> ${Deno.readLinkSync(path)}` : ` (${permissions})`;
    yield `${relative(home, path)}${link}`;
  }
}

const first = await lematt("--test");
headline("The files");
for (const line of tree(join(conf, "test"))) console.log(`  ${line}`);
headline("The files that commands have delivered to the three hosts");
for (const { name } of Deno.readDirSync(hosts)) {
  console.log(`  ${name}: ${[...tree(join(hosts, name))].length} files`);
}
headline("What the commands have written");
console.log((await Deno.readTextFile(join(home, "reloads"))).trimEnd());
const second = await lematt("--test");
headline("The plan for the next run");
await lematt("--test", "--plan");

await Deno.remove(home, { recursive: true });
const ok = first === 0 && second === 0 && ca.issued.length === 4 && ca.violations.length === 0;
console.log(
  ok
    ? "\nThe CA has issued 4 certificates, and every request was correct. All files are removed.\n" +
      "Next: README.md explains how to begin, the samples in conf/ explain every setting; lematt.ts --help."
    : `\nThe demo failed: ${JSON.stringify(ca.violations)}`,
);
Deno.exit(ok ? 0 : 1);
