/**
 * Goal: the recipes of conf/recipes work: lematt with their sections, the real service with their configuration; only paths,
 * ports and the way to reach the service differ. lematt itself verifies that new certificates are served.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { connect, createServer } from "node:net";
import { join } from "node:path";
import { systemQuery } from "../lib/context.ts";
import { testBed, type Texts } from "./bed.ts";
import { which } from "./bench-measure.ts";
import type { Switches } from "./ca.ts";
import { adapt, blockOf, ROOT, shell } from "./documents.ts";
import { output } from "./programs.ts";
import { postgres, startDovecot, startHaproxy, startPostfix, startPostgres } from "./services.ts";
import { startBalancer } from "./site.ts";
import { freePort, makeCertificate, startNginx, startServer } from "./tls.ts";
import { lackOf, together } from "./together.ts";

const test = together("conf/recipes");

function recipeTest(name: string, programs: readonly string[], fn: () => Promise<void>, lack?: string): void {
  const needed = Deno.uid() === 0 ? lackOf("openssl", ...programs) : "root is needed";
  test(name, fn, needed ?? lack);
}

/** A bed that all users can read, with a directory in the place of /etc/ssl/lematt. */
async function startHost(texts: Texts & { ca?: Switches }) {
  const bed = await testBed({ settings: "ari: no", ...texts });
  await Deno.chmod(bed.home, 0o755);
  const ssl = join(bed.home, "ssl");
  /** The block of a recipe that begins with `start`. */
  const block = (file: string, start: string, words: Record<string, string> = {}) =>
    adapt(blockOf(`conf/recipes/${file}`, start), words).replaceAll("/etc/ssl/lematt", ssl);
  return Object.assign(bed, {
    block,
    /** Puts a certificate in the place of /etc/ssl/lematt, which the next one will replace. */
    async plantOld(directory = ssl) {
      await bed.plant({ mode: "prod" });
      await shell(
        `mkdir -p ${directory}/private && cp prod/cert/* ${directory} && cp prod/key/* ${directory}/private
        find ${directory} -type f -exec touch -d @0 {} +`, // rsync skips a file of the same size and second
        bed.conf,
      );
    },
    /** Issues with a new key, which the endpoints of the section must serve; `ports` are those of loopback in place of its own. */
    async deliver(file: string, ports: Record<string, number>, words: Record<string, string>) {
      const actions = block(file, "[", words).replace(
        /"([a-z.]+):(\d+)(\/\w+)?"/g,
        (_, name, port, protocol = "") => `"127.0.0.1:${ports[port]}${protocol}#${name}"`,
      );
      bed.configure({ actions });
      const name = texts.domains!.split(" ", 1)[0]!;
      const { code, stdout, stderr } = await bed.lematt("--prod", "--renew", name, "--new-key");
      assert.deepEqual([code, stderr], [0, ""], stdout);
    },
  });
}

const reload = ({ child }: { child: Deno.ChildProcess }, signal = "HUP") => `kill -${signal} ${child.pid}`;

recipeTest("recipe nginx", ["nginx"], async () => {
  await using host = await startHost({ domains: "example.com www.example.com" });
  await host.plantOld();
  const port = freePort();
  const directory = join(host.home, "nginx");
  await Deno.mkdir(directory);
  const tls = host.block("nginx.md", "ssl_certificate ");
  await using nginx = await startNginx(
    directory,
    port,
    () => `server { listen 127.0.0.1:${port} ssl; ${tls} }`,
  );
  await host.deliver("nginx.md", { 443: port }, {
    "sudo nginx -t": `${which("nginx")} -t -q -p ${directory}/* -c nginx.conf -e error.log`,
    "sudo service nginx reload": reload(nginx),
  });
});

recipeTest("recipe HAProxy, on this host and over ssh", ["haproxy"], async () => {
  await using host = await startHost({ domains: "example.com www.example.com" });
  const certs = join(host.home, "certs");
  await Deno.mkdir(certs);
  await host.plantOld();
  await shell("cat ssl/*prime256v1.pem ssl/private/*prime256v1.pem > certs/example.com.ec.pem", host.home);
  const port = freePort();
  const words = { "/etc/haproxy/certs": certs };
  const bind = host.block("haproxy.md", "bind", { ...words, ":443": `127.0.0.1:${port}` });
  await using haproxy = await startHaproxy(host.home, port, bind);
  const local: Record<string, string> = {
    ...words,
    "sudo haproxy": which("haproxy")!,
    "/etc/haproxy/haproxy.cfg": `${host.home}/haproxy.cfg`,
    "sudo service haproxy reload": reload(haproxy, "USR2"),
  };
  await host.deliver("haproxy.md", { 443: port }, local);
  const files = Array.from(Deno.readDirSync(certs), ({ name }) => name).sort();
  assert.deepEqual(files, ["example.com.ec.pem", "example.com.rsa.pem"]);

  const ssh = `${host.home}/ssh lb-bundle`;
  const forced = `#!/bin/sh\nshift\nSSH_ORIGINAL_COMMAND="$*" exec ${host.home}/forced\n`;
  await Deno.writeTextFile(join(host.home, "ssh"), forced, { mode: 0o755 });
  await Deno.writeTextFile(join(host.home, "forced"), host.block("haproxy.md", "#!/bin/sh", words), {
    mode: 0o755,
  });
  const { "/etc/haproxy/certs": _, ...remote } = local;
  const [uploadEach] = /uploadEach.*/.exec(host.block("haproxy.md", "["))!;
  remote[uploadEach] = host.block("haproxy.md", "uploadEach", { "ssh lb-bundle": ssh });
  await host.deliver("haproxy.md", { 443: port }, remote);
  await assert.rejects(() => shell(`echo half | ${ssh} example.com.ec`, host.home));
  await assert.rejects(() => shell(`cat certs/example.com.ec.pem | ${ssh} ../x`, host.home));
});

recipeTest("recipes Postfix, Dovecot and TLSA", ["postfix", "dovecot"], async () => {
  await using host = await startHost({ domains: "mail.example.com" });
  await host.plantOld();
  const [smtp, imap] = [freePort(), freePort()];
  const [postfix, dovecot] = [join(host.home, "postfix"), join(host.home, "dovecot")];
  for (const directory of [postfix, dovecot]) await Deno.mkdir(directory);
  await using _postfix = await startPostfix(postfix, smtp, host.block("mail.md", "smtpd_tls_chain_files"));
  await using _dovecot = await startDovecot(dovecot, imap, "imap", host.block("mail.md", "ssl_cert ="));
  await host.deliver("mail.md", { 25: smtp, 143: imap }, {
    "sudo postfix": `${which("postfix")} -c ${postfix}`,
    "sudo doveadm": `${which("doveadm")} -c ${dovecot}/dovecot.conf`,
  });

  // records survive a renewal, and the record of the next key is known before
  const tlsa = (start: string, words: Record<string, string> = {}) =>
    shell(host.block("tlsa.md", start, words), host.conf);
  const records = async () => (await tlsa("for key", { "/etc/lematt": host.conf })).trim().split("\n");
  const [rsaOrEc, ecOrRsa] = await records();
  assert.equal((await host.lematt("--prod", "--renew", "mail.example.com")).code, 0);
  assert.deepEqual(await records(), [rsaOrEc, ecOrRsa]);
  const next = (await tlsa("cd /etc/lematt", { "/etc/lematt": host.conf })).trim();
  const printed = await tlsa("cp prod/key", { "/etc/lematt": host.conf, "/opt/lematt": ROOT });
  assert.match(printed, /^issued .*\(ec\)/m);
  assert((await records()).includes(next) && next !== rsaOrEc && next !== ecOrRsa);
  const connect = `-verify_return_error -connect 127.0.0.1:${smtp}`;
  await tlsa("openssl s_client", { "-connect mail.example.com:25": connect });
});

recipeTest("recipe PostgreSQL", postgres === undefined ? ["postgres"] : [], async () => {
  await using host = await startHost({ domains: "db.example.com" });
  const home = join(host.home, "postgresql");
  await Deno.mkdir(home);
  await makeCertificate(home, "server", "ec", ["db.example.com"]);
  await Deno.rename(join(home, "server.pem"), join(home, "server.crt"));
  const words = { "/etc/postgresql": home };
  const port = freePort();
  await using running = await startPostgres(home, port, host.block("postgresql.md", "ssl = on", words));
  await host.deliver("postgresql.md", { 5432: port }, {
    ...words,
    "sudo service postgresql reload": reload(running),
    "sudo install": "install",
  });
  assert.equal([...Deno.readDirSync(host.path("prod", "key"))].length, 1); // no RSA key: no section uses one
});

const TOMCAT = "/usr/share/tomcat10";
recipeTest("recipe Tomcat", ["java", "keytool"], async () => {
  await using host = await startHost({ domains: "app.example.com" });
  const base = join(host.home, "tomcat");
  await shell("mkdir -p tomcat/conf tomcat/logs tomcat/temp tomcat/webapps tomcat/work", host.home);
  const words = { "/etc/lematt/pkcs12-password": `${host.home}/password` };
  await shell(host.block("tomcat.md", "umask", words), host.home);
  const port = freePort();
  const connector = host.block("tomcat.md", "<Connector", {
    'port="8443"': `port="${port}" address="127.0.0.1"`,
    PASSWORD: Deno.readTextFileSync(`${host.home}/password`).trim(),
  });
  await Deno.writeTextFile(
    join(base, "conf/server.xml"),
    `<Server port="-1"><Service name="Catalina">${connector}
    <Engine name="Catalina" defaultHost="localhost"><Host name="localhost" appBase="webapps" /></Engine>
    </Service></Server>\n`,
  );
  const stop =
    `cd ${base}; [ ! -f pid ] || { kill $(cat pid); while kill -0 $(cat pid); do sleep 0.1; done; } 2> /dev/null`;
  const start = `setsid java -Xmx64m -cp ${TOMCAT}/bin/bootstrap.jar:${TOMCAT}/bin/tomcat-juli.jar \
-Dcatalina.home=${TOMCAT} -Dcatalina.base=${base} -Djava.io.tmpdir=${base}/temp \
org.apache.catalina.startup.Bootstrap start > logs/out 2>&1 < /dev/null & echo $! > pid`;
  await Deno.writeTextFile(join(base, "restart"), `#!/bin/sh\n${stop}\n${start}\n`, { mode: 0o755 });
  try {
    await host.deliver("tomcat.md", { 8443: port }, {
      ...words,
      "/var/lib/tomcat10": base,
      "sudo service tomcat10 restart": `${base}/restart`,
    });
  } finally {
    await shell(stop, host.home);
  }
  const printed = await shell(host.block("tomcat.md", "openssl pkcs12", words), join(base, "conf"));
  assert.match(printed, /friendlyName: app\.example\.com[^]*^app\.example\.com, .*PrivateKeyEntry/m);
}, existsSync(TOMCAT) ? undefined : "tomcat10-common not installed");

recipeTest("recipe for servers behind a balancer", ["nginx"], async () => {
  await using host = await startHost({ domains: "www.example.com" });
  await using stack = new AsyncDisposableStack();
  const words: Record<string, string> = {};
  const ports: number[] = [];
  for (const [server, address] of [["web1", "192.0.2.11"], ["web2", "192.0.2.12"]]) {
    const ssl = join(host.home, server!);
    await host.plantOld(ssl);
    const port = freePort();
    ports.push(port);
    const tls = host.block("nginx.md", "ssl_certificate ", {
      "/etc/ssl/lematt": ssl,
      "/example.com-": "/www.example.com-",
    });
    const nginx = stack.use(
      await startNginx(ssl, port, () => `server { listen 127.0.0.1:${port} ssl; ${tls} }`),
    );
    words[`${server}-upload:/etc/ssl/lematt`] = ssl;
    words[`ssh ${server}-reload-nginx`] = reload(nginx);
    words[`${address}:443`] = `127.0.0.1:${port}`;
  }
  const front = stack.use(await startBalancer(...ports));
  await host.deliver("balancer.md", { 443: front.port }, words);
});

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
    join(home, "apache.conf"),
    `ServerRoot ${home}\nPidFile ${home}/pid\nErrorLog ${home}/error.log\nServerName localhost\n` +
      `Listen 127.0.0.1:${port}\n${modules.join("")}${block("Redirect")}`,
  );
  const servers = {
    nginx: () => startNginx(home, port, () => `server { listen 127.0.0.1:${port}; ${block("location")} }`),
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
const acmeSh = Deno.env.get("ACME_SH") ?? join(Deno.env.get("HOME") ?? "/", ".acme.sh");
const noAcmeSh = !existsSync(join(acmeSh, "dnsapi", "dns_nsupdate.sh"));

recipeTest(
  "recipes for dns-01: nsupdate, lexicon, acme.sh",
  ["named", "nsupdate", "tsig-keygen"],
  async () => {
    const port = freePort();
    const query = (name: string, type: "TXT" | "CNAME") =>
      systemQuery(name, type, { address: "127.0.0.1", port }).catch(() => []);
    await using host = await startHost({
      domains: "example.org *\nwww.example.org",
      settings: "keyTypes: ec",
      ca: {
        reuse: "none",
        txt: (name) => query(name, "TXT"),
        cname: async (name) => (await query(name, "CNAME"))[0],
      },
    });
    const { home, block } = host;
    await shell(block("nsupdate.md", "tsig-keygen", { "/etc/bind": home }), home);
    await Deno.writeTextFile(
      join(home, "example.org"),
      "$TTL 60\n@ SOA ns1 root 1 3600 600 86400 60\n@ NS ns1\nns1 A 127.0.0.1\nwww A 127.0.0.1\n",
    );
    const zone = block("nsupdate.md", "include", { "/etc/bind": home, "/var/lib/bind": home });
    await Deno.writeTextFile(
      join(home, "named.conf"),
      `options { directory "${home}"; listen-on port ${port} { 127.0.0.1; }; listen-on-v6 { none; }; pid-file none;
session-keyfile "${home}/session.key"; recursion no; };\ncontrols { };\n${zone}`,
    );
    await using _named = await startServer(which("named")!, ["-c", join(home, "named.conf"), "-f"], port);

    /** Issues by these hooks for all names, and leaves no record. */
    const issue = async (actions: string) => {
      host.configure({ actions });
      const named = { renew: ["example.org", "www.example.org"] };
      const { code, stderr } = await host.run({ mode: "prod", query: query as typeof systemQuery, named });
      assert.deepEqual([code, stderr], [0, ""]);
      const validated = host.ca.validations.splice(0).map(({ type, name }) => `${type} ${name}`).sort();
      assert.deepEqual(validated, ["dns-01 *.example.org", "dns-01 example.org", "dns-01 www.example.org"]);
      for (const name of ["example.org", "www.example.org"]) {
        assert.deepEqual(await query(`_acme-challenge.${name}`, "TXT"), []);
      }
    };

    await issue(block("nsupdate.md", "[", {
      "server ns1.example.org": `server 127.0.0.1 ${port}`,
      "/etc/lematt/tsig.key": `${home}/lematt.key`,
    }));

    if (noDdns) console.log("recipe lexicon is not tested: lexicon with ddns is not installed");
    else {
      const address = `127.53.${Math.floor(Math.random() * 256)}.1`; // lexicon supports no port but 53
      const relay = createServer((client) => void client.pipe(connect(port, "127.0.0.1")).pipe(client));
      await using _relay = relay.listen(53, address);
      const secret = /secret "(.*)"/.exec(Deno.readTextFileSync(join(home, "lematt.key")))![1]!;
      const env = block("lexicon.md", "export", {
        "CLOUDFLARE_AUTH_TOKEN=...":
          `DDNS_AUTH_TOKEN=hmac-sha256:lematt:${secret} LEXICON_DDNS_DDNS_SERVER=${address}`,
      });
      await Deno.writeTextFile(join(home, "lexicon.env"), env);
      await issue(block("lexicon.md", "[", {
        "/etc/lematt/lexicon.env": `${home}/lexicon.env`,
        "lexicon cloudflare": "lexicon ddns",
      }));
    }

    if (noAcmeSh) console.log(`recipe acme.sh is not tested: it is not in ${acmeSh}; ACME_SH names it`);
    else {
      await shell(`mkdir .acme.sh && cp -r ${acmeSh}/acme.sh ${acmeSh}/dnsapi .acme.sh`, home);
      const env = block("acme-sh.md", "export", {
        "CF_Token=...":
          `NSUPDATE_SERVER=127.0.0.1 NSUPDATE_SERVER_PORT=${port} NSUPDATE_KEY=${home}/lematt.key HOME=${home}`,
      });
      await Deno.writeTextFile(join(home, ".acme.sh/lematt.env"), env);
      await issue(block("acme-sh.md", "[", { "~/.acme.sh": `${home}/.acme.sh`, dns_cf: "dns_nsupdate" }));
    }
  },
);
