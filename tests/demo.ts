/**
 * `deno task demo`: lematt on this host alone. Runs lematt.ts twice with the CA of ca.ts and a web server for a drop
 * directory, and shows the files that it wrote and the commands that it ran.
 */
import { join, relative } from "node:path";
import { testBed } from "./bed.ts";

const COMMANDS = `[default]
uploadCerts: ["cp -P CERTS HERE/hosts/web/"]
uploadKeys: ["cp -P KEYS HERE/hosts/web/"]
update: ["echo reloading nginx for DOMAINS_CN >> HERE/reloads"]

[mailserver]
domains: mail.example.com
prepare: ["echo port 80 of DOMAIN is open >> HERE/reloads; cat"]
uploadCerts: ["cp CERTS HERE/hosts/mail/"]
uploadKeys: ["cp KEYS HERE/hosts/mail/"]
update: ["echo reloading postfix >> HERE/reloads", "echo reloading dovecot >> HERE/reloads"]

[every]
uploadCerts: ["cp -P CERTS HERE/hosts/manager/"]
`;

await using bed = await testBed({
  domains: "mail.example.com\nexample.com www shop\n",
  actions: COMMANDS,
  settings: "# these names exist only for the CA of this demo\npreflight: no",
});
const hosts = join(bed.home, "hosts");
for (const host of ["web", "mail", "manager"]) await Deno.mkdir(join(hosts, host), { recursive: true });

function show(title: string, text: string): void {
  console.log(Deno.noColor || !Deno.stdout.isTerminal() ? `\n${title}` : `\n\x1b[1m${title}\x1b[0m`);
  console.log(text.trimEnd().replaceAll(bed.home, "~"));
}

async function lematt(...args: string[]): Promise<number> {
  const { code, stdout, stderr } = await bed.lematt(...args);
  show(`lematt.ts ${args.join(" ")} --config ~/conf`, stdout + stderr);
  return code;
}

/** Every file below a directory, with the target of a link, or the permissions. */
function* tree(directory: string): Iterable<string> {
  const entries = [...Deno.readDirSync(directory)].sort((a, b) => a.name < b.name ? -1 : 1);
  for (const { name, isDirectory, isSymlink } of entries) {
    const path = join(directory, name);
    if (isDirectory) {
      yield* tree(path);
      continue;
    }
    const mode = (Deno.lstatSync(path).mode! & 0o777).toString(8).padStart(4, "0");
    yield `  ${relative(bed.home, path)} ${isSymlink ? `-> ${Deno.readLinkSync(path)}` : `(${mode})`}`;
  }
}

for (const name of ["lematt.conf", "domains", "actions.conf"]) show(`conf/${name}`, bed.text(name));
const first = await lematt("--test");
show("The files", [...tree(bed.path("test"))].join("\n"));
const delivered = ["mail", "manager", "web"].map((host) => [host, [...tree(join(hosts, host))].length]);
show(
  "Files that commands have delivered",
  delivered.map(([host, count]) => `  ${host}: ${count}`).join("\n"),
);
show("What the commands have written", await Deno.readTextFile(join(bed.home, "reloads")));
const second = await lematt("--test");
await lematt("--test", "--plan");
if (first !== 0 || second !== 0 || bed.ca.issued.length !== 4) throw new Error("the demo failed");
console.log(`
The CA has issued 4 certificates, and every request was correct. All files are removed.
Next: README.md explains how to begin, the samples in conf/ explain every setting; lematt.ts --help.`);
