/**
 * `deno task demo`: lematt on this host alone. Runs lematt.ts twice with the CA of ca.ts and a web server for a drop
 * directory, and shows the files that it wrote and the commands that it ran.
 */
import { testBed } from "./bed.ts";
import { shell } from "./programs.ts";

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
await shell("mkdir -p hosts/web hosts/mail hosts/manager", bed.home);

function show(title: string, text: string): void {
  console.log(Deno.noColor || !Deno.stdout.isTerminal() ? `\n${title}` : `\n\x1b[1m${title}\x1b[0m`);
  console.log(text.trimEnd().replaceAll(bed.home, "~"));
}

async function lematt(...args: string[]): Promise<number> {
  const { code, stdout, stderr } = await bed.lematt(...args);
  show(`lematt.ts ${args.join(" ")} --config ~/conf`, stdout + stderr);
  return code;
}

for (const name of ["lematt.conf", "domains", "actions.conf"]) show(`conf/${name}`, bed.text(name));
const first = await lematt("--test");
show("The files", await shell("find conf/test ! -type d -exec ls -l {} +", bed.home));
const counts = 'for host in mail manager web; do echo "  $host: $(ls hosts/$host | wc -l)"; done';
show("Files that commands have delivered", await shell(counts, bed.home));
show("What the commands have written", await shell("cat reloads", bed.home));
const second = await lematt("--test");
await lematt("--test", "--plan");
if (first !== 0 || second !== 0 || bed.ca.issued.length !== 4) throw new Error("the demo failed");
console.log(`
The CA has issued 4 certificates, and every request was correct. All files are removed.
Next: README.md explains how to begin, the samples in conf/ explain every setting; lematt.ts --help.`);
