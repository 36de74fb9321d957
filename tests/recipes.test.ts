/** Goal: the sections and settings of conf/recipes work with the real services; lematt itself verifies what they serve. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { connect, createServer } from "node:net";
import { systemQuery } from "../lib/context.ts";
import { testBed, type Texts, together } from "./bed.ts";
import type { Switches } from "./ca.ts";
import { adapt, blockOf, lackOf, output, ROOT, shell, which } from "./programs.ts";
import { postgres, startDovecot, startHaproxy, startPostfix, startPostgres } from "./tls.ts";
import { freePort, makeCertificate, startBalancer, startNginx, startServer } from "./tls.ts";

const test = together("conf/recipes");

function recipeTest(name: string, programs: readonly string[], fn: () => Promise<void>, lack?: string): void {
  const needed = Deno.uid() === 0 ? lackOf("openssl", ...programs) : "root is needed";
  test(name, fn, needed ?? lack);
}

type Words = Record<string, string>;

/** A bed that all users can read; paths in blocks of recipes are replaced by `places` below its home. */
async function startHost(texts: Texts & { ca?: Switches }, places: Words = { "/etc/ssl/lematt": "/ssl" }) {
  const bed = await testBed({ settings: "ari: no", ...texts });
  const { home } = bed;
  await Deno.chmod(home, 0o755);
  const words = Object.entries(places).map(([path, place]) => [path, home + place] as const);
  /** The block of a recipe that begins with `start`, with other words. */
  const block = (file: string, start: string, strict: Words = {}) =>
    words.reduce(
      (text, [path, place]) => text.replaceAll(path, place),
      adapt(blockOf(`conf/recipes/${file}`, start), strict),
    );
  return Object.assign(bed, {
    block,
    /** Puts a certificate in the place of /etc/ssl/lematt, which the next one will replace. */
    async plantOld(ssl = `${home}/ssl`) {
      await bed.plant({ mode: "prod" });
      await shell(
        `mkdir -p ${ssl}/private && cp prod/cert/* ${ssl} && cp prod/key/* ${ssl}/private
        find ${ssl} -type f -exec touch -d @0 {} +`, // rsync skips a file of the same size and second
        bed.conf,
      );
    },
    /** Issues with a new key, which the section's endpoints must serve; `ports` are those of loopback in place of its own. */
    async deliver(file: string, ports: Record<string, number>, strict: Words) {
      const actions = block(file, "[", strict).replace(
        /"([a-z.]+):(\d+)(\/\w+)?"/g,
        (_, name, port, protocol = "") => `"127.0.0.1:${ports[port]}${protocol}#${name}"`,
      );
      bed.configure({ actions });
      const [name] = texts.domains!.split(" ");
      const { code, stdout, stderr } = await bed.lematt("--prod", "--renew", name!, "--new-key");
      assert.deepEqual([code, stderr], [0, ""], stdout);
    },
  });
}

const reload = ({ child }: { child: Deno.ChildProcess }, signal = "HUP") => `kill -${signal} ${child.pid}`;

const nginx = (directory: string, port: number, config: string) =>
  startNginx(directory, port, () => `server { listen 127.0.0.1:${port} ${config} }`);

recipeTest("recipes nginx, and servers behind a balancer", ["nginx"], async () => {
  await using host = await startHost({ domains: "example.com www.example.com" }, {});
  await using stack = new AsyncDisposableStack();
  const words: Words = {};
  const servers = [];
  for (const [name, address] of [["web1", "192.0.2.11"], ["web2", "192.0.2.12"]]) {
    const [ssl, port] = [`${host.home}/${name}`, freePort()];
    await host.plantOld(ssl);
    const tls = host.block("nginx.md", "ssl_certificate ", { "/etc/ssl/lematt": ssl });
    const server = { ssl, port, reload: reload(stack.use(await nginx(ssl, port, `ssl; ${tls}`))) };
    servers.push(server);
    words[`${name}-upload:/etc/ssl/lematt`] = ssl;
    words[`ssh ${name}-reload-nginx`] = server.reload;
    words[`${address}:443`] = `127.0.0.1:${port}`;
  }
  const front = stack.use(await startBalancer(...servers.map(({ port }) => port)));
  await host.deliver("balancer.md", { 443: front.port }, words);

  const [web] = servers;
  const prefix = `$(dirname ${web!.ssl}/*/nginx.conf)`;
  await host.deliver("nginx.md", { 443: web!.port }, {
    "/etc/ssl/lematt": web!.ssl,
    "sudo nginx -t": `${which("nginx")} -t -q -p ${prefix} -c nginx.conf -e error.log`,
    "sudo service nginx reload": web!.reload,
  });
});

recipeTest("recipe HAProxy, on this host and over ssh", ["haproxy"], async () => {
  const places = { "/etc/haproxy/certs": "/certs", "/etc/haproxy": "" };
  await using host = await startHost({ domains: "example.com www.example.com" }, places);
  const { home } = host;
  await host.plantOld();
  await shell("mkdir certs; cat ssl/*rsa2048.pem ssl/private/*rsa2048.pem > certs/example.com.rsa.pem", home);
  const port = freePort();
  const bind = host.block("haproxy.md", "bind", { ":443": `127.0.0.1:${port}` });
  await using haproxy = await startHaproxy(home, port, bind);
  const words = {
    "sudo haproxy": which("haproxy")!,
    "sudo service haproxy reload": reload(haproxy, "USR2"),
  };
  await host.deliver("haproxy.md", { 443: port }, words);

  await Deno.writeTextFile(`${home}/forced`, host.block("haproxy.md", "#!/bin/sh"), { mode: 0o755 });
  const ssh = `SSH_ORIGINAL_COMMAND=DOMAIN.KEY_TYPE ${home}/forced`;
  const remote = host.block("haproxy.md", "uploadEach", { "ssh lb-bundle DOMAIN.KEY_TYPE": ssh });
  const [local] = /uploadEach.*/.exec(blockOf("conf/recipes/haproxy.md", "["))!;
  await host.deliver("haproxy.md", { 443: port }, { ...words, [local]: remote });
  const files = Array.from(Deno.readDirSync(`${home}/certs`), ({ name }) => name);
  assert.deepEqual(files.sort(), ["example.com.ec.pem", "example.com.rsa.pem"]);
  for (const [name, input] of [["example.com.ec", "half"], ["../x", "$(cat certs/example.com.ec.pem)"]]) {
    await assert.rejects(shell(`echo "${input}" | SSH_ORIGINAL_COMMAND=${name} ./forced`, home));
  }
});

recipeTest("recipes Postfix, Dovecot and TLSA", ["postfix", "dovecot"], async () => {
  const places = { "/etc/ssl/lematt": "/ssl", "/etc/lematt": "/conf" };
  await using host = await startHost({ domains: "mail.example.com" }, places);
  await host.plantOld();
  const [smtp, imap] = [freePort(), freePort()];
  const [postfix, dovecot] = [`${host.home}/postfix`, `${host.home}/dovecot`];
  for (const directory of [postfix, dovecot]) await Deno.mkdir(directory);
  await using _postfix = await startPostfix(postfix, smtp, host.block("mail.md", "smtpd_tls_chain_files"));
  await using _dovecot = await startDovecot(dovecot, imap, host.block("mail.md", "ssl_cert ="));
  await host.deliver("mail.md", { 25: smtp, 143: imap }, {
    "sudo postfix": `${which("postfix")} -c ${postfix}`,
    "sudo doveadm": `${which("doveadm")} -c ${dovecot}/dovecot.conf`,
  });

  // records survive a renewal, and the record of the next key is known before
  const tlsa = (start: string, words?: Words) => shell(host.block("tlsa.md", start, words), host.conf);
  const before = await tlsa("for key");
  assert.equal((await host.lematt("--prod", "--renew", "mail.example.com")).code, 0);
  assert.equal(await tlsa("for key"), before);
  const next = await tlsa("cd /etc/lematt");
  assert.match(await tlsa("cp prod/key", { "/opt/lematt": ROOT }), /^issued .*\(ec\)/m);
  assert((await tlsa("for key")).includes(next) && !before.includes(next));
  const connect = `-verify_return_error -connect 127.0.0.1:${smtp}`;
  await tlsa("openssl s_client", { "-connect mail.example.com:25": connect });
});

recipeTest("recipe PostgreSQL", postgres === undefined ? ["postgres"] : [], async () => {
  await using host = await startHost({ domains: "db.example.com" }, { "/etc/postgresql": "/postgresql" });
  const home = `${host.home}/postgresql`;
  await Deno.mkdir(home);
  await makeCertificate(home, "server", "ec", ["db.example.com"]);
  await Deno.rename(`${home}/server.pem`, `${home}/server.crt`);
  const port = freePort();
  await using running = await startPostgres(home, port, host.block("postgresql.md", "ssl = on"));
  await host.deliver("postgresql.md", { 5432: port }, {
    "sudo service postgresql reload": reload(running),
    "sudo install": "install",
  });
  assert.equal([...Deno.readDirSync(host.path("prod", "key"))].length, 1); // no RSA key: no section uses one
});

const TOMCAT = "/usr/share/tomcat10";
recipeTest("recipe Tomcat", ["java", "keytool"], async () => {
  const places = { "/etc/lematt/pkcs12-password": "/password", "/var/lib/tomcat10": "/tomcat" };
  await using host = await startHost({ domains: "app.example.com" }, places);
  const base = `${host.home}/tomcat`;
  await shell("mkdir -p tomcat/conf tomcat/logs tomcat/temp tomcat/webapps tomcat/work", host.home);
  await shell(host.block("tomcat.md", "umask"), host.home);
  const port = freePort();
  const connector = host.block("tomcat.md", "<Connector", {
    'port="8443"': `port="${port}" address="127.0.0.1"`,
    PASSWORD: Deno.readTextFileSync(`${host.home}/password`).trim(),
  });
  await Deno.writeTextFile(
    `${base}/conf/server.xml`,
    `<Server port="-1"><Service name="Catalina">${connector}
    <Engine name="Catalina" defaultHost="localhost"><Host name="localhost" appBase="webapps" /></Engine>
    </Service></Server>\n`,
  );
  const stop = `cd ${base}; [ ! -f pid ] || { kill $(cat pid); tail -f --pid=$(cat pid) /dev/null; }`;
  const start = `setsid java -Xmx64m -cp ${TOMCAT}/bin/bootstrap.jar:${TOMCAT}/bin/tomcat-juli.jar \
-Dcatalina.home=${TOMCAT} -Dcatalina.base=${base} -Djava.io.tmpdir=${base}/temp \
org.apache.catalina.startup.Bootstrap start > logs/out 2>&1 < /dev/null & echo $! > pid`;
  await Deno.writeTextFile(`${base}/restart`, `#!/bin/sh\n${stop}\n${start}\n`, { mode: 0o755 });
  try {
    await host.deliver("tomcat.md", { 8443: port }, { "sudo service tomcat10 restart": `${base}/restart` });
  } finally {
    await shell(stop, host.home);
  }
  const printed = await shell(host.block("tomcat.md", "openssl pkcs12"), `${base}/conf`);
  assert.match(printed, /friendlyName: app\.example\.com[^]*^app\.example\.com, .*PrivateKeyEntry/m);
}, existsSync(TOMCAT) ? undefined : "tomcat10-common not installed");

recipeTest("recipe redirect: nginx, HAProxy and Apache", ["nginx", "haproxy", "apache2"], async () => {
  const port = freePort();
  await using host = await startHost({ settings: "keyTypes: ec", ca: { httpPort: port } });
  const { home } = host;
  // the CA of the tests finds every name at its port, but an address with a port there
  const central = { "http://central.example.com": `http://127.0.0.1:${host.web.port}` };
  const block = (start: string) => host.block("redirect.md", start, central);
  const modules = ["mpm_event", "alias", "authz_core"]
    .map((name) => `LoadModule ${name}_module /usr/lib/apache2/modules/mod_${name}.so\n`);
  await Deno.writeTextFile(
    `${home}/apache.conf`,
    `ServerRoot ${home}\nPidFile ${home}/pid\nErrorLog ${home}/error.log\nServerName localhost\n` +
      `Listen 127.0.0.1:${port}\n${modules.join("")}${block("Redirect")}`,
  );
  const servers = {
    nginx: () => nginx(home, port, `; ${block("location")}`),
    haproxy: () => startHaproxy(home, port, `bind 127.0.0.1:${port}\n  ${block("http-request")}`),
    apache: () => startServer(which("apache2")!, ["-D", "FOREGROUND", "-f", `${home}/apache.conf`], port),
  };
  for (const [name, start] of Object.entries(servers)) {
    await using _server = await start();
    host.configure({ domains: `${name}.example.com` });
    const { code, stderr } = await host.lematt("--prod");
    assert.deepEqual([code, stderr], [0, ""], name);
  }
  assert.equal(host.web.log.filter(({ status }) => status === 200).length, 3);
});

const ddns = "lexicon ddns list example.org TXT --auth-token=hmac-sha256:x:eA== --ddns-server=127.0.0.1";
const noDdns = /not found|extra dependencies|invalid choice/.test((await output(["sh", "-c", ddns])).stderr);
const acmeSh = Deno.env.get("ACME_SH") ?? `${Deno.env.get("HOME")}/.acme.sh`;
const noAcmeSh = !existsSync(`${acmeSh}/dnsapi/dns_nsupdate.sh`);
if (noDdns) console.log("recipe lexicon is not tested: lexicon with ddns is not installed");
if (noAcmeSh) console.log(`recipe acme.sh is not tested: it is not in ${acmeSh}; ACME_SH names it`);

recipeTest("recipes nsupdate, lexicon, acme.sh", ["named", "nsupdate", "tsig-keygen"], async () => {
  const port = freePort();
  const query = (name: string, type: "TXT" | "CNAME") =>
    systemQuery(name, type, { address: "127.0.0.1", port }).catch(() => []);
  await using host = await startHost({
    domains: "example.org *\nwww.example.org",
    settings: "keyTypes: ec",
    ca: { reuse: "none", dnsPort: port },
  }, {
    "/etc/bind": "",
    "/var/lib/bind": "",
    "/etc/lematt/tsig.key": "/lematt.key",
    "/etc/lematt/lexicon.env": "/lexicon.env",
    "~/.acme.sh": "/.acme.sh",
  });
  const { home, block } = host;
  await shell(block("nsupdate.md", "tsig-keygen"), home);
  const records = "@ SOA ns1 root 1 3600 600 86400 60\n@ NS ns1\nns1 A 127.0.0.1\nwww A 127.0.0.1\n";
  await Deno.writeTextFile(`${home}/example.org`, `$TTL 60\n${records}`);
  await Deno.writeTextFile(
    `${home}/named.conf`,
    `options { directory "${home}"; listen-on port ${port} { 127.0.0.1; }; listen-on-v6 { none; }; pid-file none;
session-keyfile "${home}/session.key"; recursion no; };\ncontrols { };\n${block("nsupdate.md", "include")}`,
  );
  await using _named = await startServer(which("named")!, ["-c", `${home}/named.conf`, "-f"], port);

  /** Issues by the hooks of a section for all names, and leaves no record. */
  const issue = async (file: string, words: Words) => {
    host.configure({ actions: block(file, "[", words) });
    const named = { renew: ["example.org", "www.example.org"] };
    const { code, stderr } = await host.run({ mode: "prod", query: query as typeof systemQuery, named });
    assert.deepEqual([code, stderr], [0, ""]);
    const validated = host.ca.validations.splice(0).map(({ type, name }) => `${type} ${name}`).sort();
    assert.deepEqual(validated, ["dns-01 *.example.org", "dns-01 example.org", "dns-01 www.example.org"]);
    for (const name of named.renew) assert.deepEqual(await query(`_acme-challenge.${name}`, "TXT"), []);
  };

  await issue("nsupdate.md", { "server ns1.example.org": `server 127.0.0.1 ${port}` });
  if (!noDdns) {
    const address = `127.53.${Math.floor(Math.random() * 256)}.1`; // lexicon supports no port but 53
    const relay = createServer((client) => void client.pipe(connect(port, "127.0.0.1")).pipe(client));
    await using _relay = relay.listen(53, address);
    const [, secret] = /secret "(.*)"/.exec(Deno.readTextFileSync(`${home}/lematt.key`))!;
    const token = `DDNS_AUTH_TOKEN=hmac-sha256:lematt:${secret} LEXICON_DDNS_DDNS_SERVER=${address}`;
    const env = block("lexicon.md", "export", { "CLOUDFLARE_AUTH_TOKEN=...": token });
    await Deno.writeTextFile(`${home}/lexicon.env`, env);
    await issue("lexicon.md", { "lexicon cloudflare": "lexicon ddns" });
  }
  if (!noAcmeSh) {
    await shell(`mkdir .acme.sh && cp -r ${acmeSh}/acme.sh ${acmeSh}/dnsapi .acme.sh`, home);
    const server = `NSUPDATE_SERVER=127.0.0.1 NSUPDATE_SERVER_PORT=${port}`;
    const credentials = `${server} NSUPDATE_KEY=${home}/lematt.key HOME=${home}`;
    const env = block("acme-sh.md", "export", { "CF_Token=...": credentials });
    await Deno.writeTextFile(`${home}/.acme.sh/lematt.env`, env);
    await issue("acme-sh.md", { dns_cf: "dns_nsupdate" });
  }
});
