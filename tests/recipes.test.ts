/**
 * Goal: the recipes of conf/recipes work: lematt with their sections, the real service with their configuration; only paths,
 * ports and the way to reach the service differ. lematt itself verifies that new certificates are served. What is not
 * installed is skipped.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { systemQuery } from "../lib/context.ts";
import { type Bed, testBed, type Texts } from "./bed.ts";
import { which } from "./bench-measure.ts";
import type { Switches } from "./ca.ts";
import { adapt, blocks, ROOT, shell } from "./documents.ts";
import {
  postgres,
  type Running,
  startDovecot,
  startHaproxy,
  startPostfix,
  startPostgres,
} from "./services.ts";
import { freePort, makeCertificate, startNginx, startServer } from "./tls.ts";
import { lackOf, together } from "./together.ts";

/** The block of a recipe that begins with `start`. */
function block(file: string, start: string): string {
  const found = blocks(`conf/recipes/${file}`).find((text) => text.startsWith(start));
  assert(found !== undefined, `no block of ${file} begins with ${start}`);
  return found;
}

const test = together("recipes");

/** The test of a recipe, which needs programs. */
function recipeTest(
  name: string,
  programs: readonly string[],
  fn: () => Promise<void>,
  lack?: string,
): void {
  const none = lackOf(...programs.filter((program) => program !== "postgres" || postgres === undefined));
  test(name, fn, lack ?? none ?? (Deno.uid() !== 0 ? "root is needed" : undefined));
}

/** A bed that all users can read, with the directories for certificates (`/etc/ssl/lematt`). */
async function recipeBed(texts: Texts & { ca?: Switches }): Promise<Bed & { readonly ssl: string }> {
  const bed = await testBed(texts);
  await Deno.chmod(bed.home, 0o755);
  const ssl = join(bed.home, "ssl");
  await shell(
    adapt(block("README.md", "install -d"), {
      "/etc/ssl/lematt": ssl,
      certmaint: "root",
      "ssl-cert": "root",
    }),
    bed.home,
  );
  return Object.assign(bed, { ssl });
}

/** Self-signed certificates as a new host has them, under the names that lematt's will have in `ssl`. */
async function plantSelfSigned(ssl: string, name: string): Promise<void> {
  for (const [type, tag] of [["rsa", "rsa2048"], ["ec", "prime256v1"]] as const) {
    await makeCertificate(ssl, type, type, [name]);
    await Deno.rename(join(ssl, `${type}.pem`), join(ssl, `${name}-cert-combined.${tag}.pem`));
    const key = join(ssl, "private", `${name}-key.${tag}.pem`);
    await Deno.rename(join(ssl, `${type}.key`), key);
    await Deno.utime(key, 0, 0); // rsync skips a file of the same size and second
  }
}

/** A first run and a renewal, after each of which all endpoints serve the new certificates. */
async function deliverTwice(bed: Bed, name: string): Promise<void> {
  for (const more of [[], ["--renew", name]]) {
    const { code, stdout, stderr } = await bed.lematt("--prod", ...more);
    assert.deepEqual([code, stderr], [0, ""], stdout);
  }
  assert.equal((await bed.lematt("--prod", "--status")).code, 0);
}

// ---- services ----------------------------------------------------------------------------------------------------

const EXAMPLE = "example.com www.example.com";

recipeTest("recipe nginx", ["nginx", "openssl"], async () => {
  await using bed = await recipeBed({ domains: EXAMPLE });
  const { ssl } = bed;
  await plantSelfSigned(ssl, "example.com");
  const port = freePort();
  const config = adapt(block("nginx.md", "ssl_certificate "), { "/etc/ssl/lematt": ssl });
  const server = `server { listen 127.0.0.1:${port} ssl; ${config} }`;
  await using nginx = await startNginx(bed.home, port, () => server);
  const [prefix] = [...Deno.readDirSync(bed.home)].filter(({ name }) =>
    existsSync(join(bed.home, name, "nginx.conf"))
  );
  bed.configure({
    actions: adapt(block("nginx.md", "[web]"), {
      "/etc/ssl/lematt": ssl,
      "sudo nginx -t": `${which("nginx")} -t -q -p ${bed.home}/${prefix!.name} -c nginx.conf -e error.log`,
      "sudo service nginx reload": `kill -HUP ${nginx.child.pid}`,
      '"example.com:443"': `"127.0.0.1:${port}#example.com"`,
      "www.example.com:443": `127.0.0.1:${port}#www.example.com`,
    }),
  });
  await deliverTwice(bed, "example.com");
});

recipeTest("recipe HAProxy", ["haproxy", "openssl"], async () => {
  await using bed = await recipeBed({ domains: EXAMPLE });
  const certs = join(bed.home, "certs");
  await Deno.mkdir(certs);
  await plantSelfSigned(bed.ssl, "example.com");
  await shell(`cat ssl/*prime256v1.pem ssl/private/*prime256v1.pem > certs/example.com.ec.pem`, bed.home);
  const port = freePort();
  const words = { "/etc/haproxy/certs": certs };
  const bind = adapt(block("haproxy.md", "bind"), { ...words, ":443": `127.0.0.1:${port}` });
  await using haproxy = await startHaproxy(bed.home, port, bind);
  const section = block("haproxy.md", "[balancer]");
  const actions = (text: string) =>
    adapt(text, {
      ...words,
      "sudo haproxy": which("haproxy")!,
      "/etc/haproxy/haproxy.cfg": `${bed.home}/haproxy.cfg`,
      "sudo service haproxy reload": `kill -USR2 ${haproxy.child.pid}`,
      "example.com:443": `127.0.0.1:${port}#example.com`,
    });
  bed.configure({ actions: actions(section) });
  await deliverTwice(bed, "example.com");
  assert.deepEqual([...Deno.readDirSync(certs)].map(({ name }) => name).sort(), [
    "example.com.ec.pem",
    "example.com.rsa.pem",
  ]);

  // the same over ssh, with a script in place of client and server
  const forced = adapt(block("haproxy.md", "#!/bin/sh"), words);
  await Deno.writeTextFile(join(bed.home, "forced"), forced, { mode: 0o755 });
  const ssh = `#!/bin/sh\nshift\nSSH_ORIGINAL_COMMAND="$*" exec ${bed.home}/forced\n`;
  await Deno.writeTextFile(join(bed.home, "ssh"), ssh, { mode: 0o755 });
  const remote = adapt(block("haproxy.md", "uploadEach"), { "ssh lb-bundle": `${bed.home}/ssh lb-bundle` });
  bed.configure({ actions: actions(section).replace(/^uploadEach.*\n/m, remote) });
  await deliverTwice(bed, "example.com");
  await assert.rejects(() => shell(`echo half | ./ssh lb-bundle example.com.ec`, bed.home));
  await assert.rejects(() => shell(`cat certs/example.com.ec.pem | ./ssh lb-bundle ../x`, bed.home));
});

recipeTest("recipe Postfix and Dovecot", ["postfix", "dovecot", "openssl"], async () => {
  await using bed = await recipeBed({ domains: "mail.example.com" });
  const words = { "/etc/ssl/lematt": bed.ssl };
  await plantSelfSigned(bed.ssl, "mail.example.com");
  const [postfixPort, dovecotPort] = [freePort(), freePort()];
  const [postfixHome, dovecotHome] = [join(bed.home, "postfix"), join(bed.home, "dovecot")];
  for (const home of [postfixHome, dovecotHome]) await Deno.mkdir(home);
  const chains = adapt(block("mail.md", "smtpd_tls_chain_files"), words);
  await using _postfix = await startPostfix(postfixHome, postfixPort, chains);
  const pairs = adapt(block("mail.md", "ssl_cert ="), words);
  await using _dovecot = await startDovecot(dovecotHome, dovecotPort, "imap", pairs);
  bed.configure({
    actions: adapt(block("mail.md", "[mail]"), {
      ...words,
      "sudo postfix": `${which("postfix")} -c ${postfixHome}`,
      "sudo doveadm": `${which("doveadm")} -c ${dovecotHome}/dovecot.conf`,
      "mail.example.com:25/smtp": `127.0.0.1:${postfixPort}/smtp#mail.example.com`,
      "mail.example.com:143/imap": `127.0.0.1:${dovecotPort}/imap#mail.example.com`,
    }),
  });
  await deliverTwice(bed, "mail.example.com");
});

recipeTest("recipe PostgreSQL", ["postgres", "openssl"], async () => {
  await using bed = await recipeBed({ domains: "db.example.com" });
  const home = join(bed.home, "postgresql");
  await Deno.mkdir(home);
  await makeCertificate(home, "server", "ec", ["db.example.com"]);
  await Deno.rename(join(home, "server.pem"), join(home, "server.crt"));
  const words = { "/etc/postgresql": home };
  const port = freePort();
  await using running = await startPostgres(home, port, adapt(block("postgresql.md", "ssl = on"), words));
  bed.configure({
    actions: adapt(block("postgresql.md", "[database]"), {
      ...words,
      "sudo service postgresql reload": `kill -HUP ${running.child.pid}`,
      "sudo install": "install",
      "db.example.com:5432/postgres": `127.0.0.1:${port}/postgres#db.example.com`,
    }),
  });
  await deliverTwice(bed, "db.example.com");
  assert.equal([...Deno.readDirSync(bed.path("prod", "key"))].length, 1); // no RSA key: no section uses one
});

const TOMCAT = "/usr/share/tomcat10";
recipeTest("recipe Tomcat", ["java", "keytool", "openssl"], async () => {
  await using bed = await recipeBed({ domains: "app.example.com" });
  const base = join(bed.home, "tomcat");
  await shell(`mkdir -p tomcat/conf tomcat/logs tomcat/temp tomcat/webapps tomcat/work`, bed.home);
  const words = { "/etc/lematt/pkcs12-password": `${bed.home}/password` };
  await shell(adapt(block("tomcat.md", "umask"), words), bed.home);
  await makeCertificate(bed.ssl, "old", "rsa", ["app.example.com"]);
  const password = Deno.readTextFileSync(`${bed.home}/password`).trim();
  await shell(
    `openssl pkcs12 -export -in ssl/old.pem -inkey ssl/old.key -passout file:password -out tomcat/conf/app.p12`,
    bed.home,
  );
  const port = freePort();
  const connector = adapt(block("tomcat.md", "<Connector"), {
    'port="8443"': `port="${port}" address="127.0.0.1"`,
    PASSWORD: password,
  });
  await Deno.writeTextFile(
    join(base, "conf/server.xml"),
    `<Server port="-1"><Service name="Catalina">${connector}
    <Engine name="Catalina" defaultHost="localhost"><Host name="localhost" appBase="webapps" /></Engine>
    </Service></Server>\n`,
  );
  const start = `setsid java -Xmx64m -cp ${TOMCAT}/bin/bootstrap.jar:${TOMCAT}/bin/tomcat-juli.jar ` +
    `-Dcatalina.home=${TOMCAT} -Dcatalina.base=${base} -Djava.io.tmpdir=${base}/temp ` +
    `org.apache.catalina.startup.Bootstrap start > ${base}/logs/out 2>&1 < /dev/null & echo $! > ${base}/pid`;
  const stop = `kill $(cat ${base}/pid); while kill -0 $(cat ${base}/pid) 2> /dev/null; do sleep 0.1; done`;
  await Deno.writeTextFile(join(base, "restart"), `#!/bin/sh\n${stop}\n${start}\n`, { mode: 0o755 });
  bed.configure({
    actions: adapt(block("tomcat.md", "[java]"), {
      ...words,
      "/var/lib/tomcat10": base,
      "sudo service tomcat10 restart": `${base}/restart`,
      "app.example.com:8443": `127.0.0.1:${port}#app.example.com`,
    }),
  });
  await shell(start, bed.home);
  try {
    await deliverTwice(bed, "app.example.com");
  } finally {
    await shell(stop, bed.home);
  }
  const printed = await shell(adapt(block("tomcat.md", "openssl pkcs12"), words), join(base, "conf"));
  assert.match(printed, /friendlyName: app\.example\.com/);
  assert.match(printed, /^app\.example\.com, .*PrivateKeyEntry/m);
}, existsSync(TOMCAT) ? undefined : "tomcat10-common not installed");

recipeTest("recipe for servers behind a balancer: nothing is well until each of them serves it", [
  "nginx",
  "haproxy",
  "openssl",
], async () => {
  await using bed = await recipeBed({ domains: "www.example.com" });
  await using stack = new AsyncDisposableStack();
  const words: Record<string, string> = { "rsync -a": "rsync -a" };
  const ports: number[] = [];
  for (const server of ["web1", "web2"]) {
    const ssl = join(bed.home, server);
    await Deno.mkdir(join(ssl, "private"), { recursive: true });
    await plantSelfSigned(ssl, "www.example.com");
    const port = freePort();
    ports.push(port);
    const config = adapt(block("nginx.md", "ssl_certificate "), {
      "/etc/ssl/lematt": ssl,
      "/example.com-": "/www.example.com-",
    });
    const { child } = stack.use(
      await startNginx(ssl, port, () => `server { listen 127.0.0.1:${port} ssl; ${config} }`),
    );
    words[`${server}-upload:/etc/ssl/lematt`] = ssl;
    // the second server's reload does nothing at first
    words[`ssh ${server}-reload-nginx`] = server === "web1" ? `kill -HUP ${child.pid}` : `${bed.home}/reload`;
    await Deno.writeTextFile(join(bed.home, "reload"), "#!/bin/sh\n", { mode: 0o755 });
    await Deno.writeTextFile(join(bed.home, "working-reload"), `#!/bin/sh\nkill -HUP ${child.pid}\n`, {
      mode: 0o755,
    });
  }
  const front = freePort();
  const bind = `mode tcp\n  bind 127.0.0.1:${front}\n  default_backend webs\nbackend webs\n  mode tcp\n` +
    ports.map((port, index) => `  server web${index + 1} 127.0.0.1:${port}`).join("\n");
  stack.use(await startHaproxy(bed.home, front, bind));
  const actions = adapt(block("balancer.md", "[www]"), {
    ...words,
    "192.0.2.11:443": `127.0.0.1:${ports[0]}`,
    "192.0.2.12:443": `127.0.0.1:${ports[1]}`,
    '"www.example.com:443"': `"127.0.0.1:${front}#www.example.com"`,
  });
  bed.configure({ actions: `${actions}verifyWait: 1\n` });
  const first = await bed.lematt("--prod");
  assert.equal(first.code, 1);
  assert.match(first.stderr, new RegExp(`127\\.0\\.0\\.1:${ports[1]}`));
  await Deno.rename(join(bed.home, "working-reload"), join(bed.home, "reload"));
  bed.configure({ actions });
  await deliverTwice(bed, "www.example.com");
});

// ---- TLSA ---------------------------------------------------------------------------------------------------------

recipeTest("recipe TLSA: records survive a renewal, and a change of keys is known before", [
  "postfix",
  "openssl",
], async () => {
  await using bed = await recipeBed({ domains: "mail.example.com" });
  await plantSelfSigned(bed.ssl, "mail.example.com");
  const home = join(bed.home, "postfix");
  await Deno.mkdir(home);
  const port = freePort();
  const words = { "/etc/ssl/lematt": bed.ssl };
  await using _postfix = await startPostfix(
    home,
    port,
    adapt(block("mail.md", "smtpd_tls_chain_files"), words),
  );
  bed.configure({
    actions: adapt(block("mail.md", "[mail]"), {
      ...words,
      "sudo postfix": `${which("postfix")} -c ${home}`,
      ', "sudo doveadm reload"': "",
      "mail.example.com:25/smtp": `127.0.0.1:${port}/smtp#mail.example.com`,
      ', "mail.example.com:143/imap"': "",
    }),
  });
  const tlsa = (start: string, replaced: Record<string, string> = {}) =>
    shell(adapt(block("tlsa.md", start), replaced), bed.path());
  const records = () => tlsa("for key", { "/etc/lematt": bed.conf });
  assert.equal((await bed.lematt("--prod")).code, 0);
  const before = (await records()).split("\n");
  assert.equal((await bed.lematt("--prod", "--renew", "mail.example.com")).code, 0);
  assert.deepEqual((await records()).split("\n"), before);

  const next = (await tlsa("cd /etc/lematt", { "/etc/lematt": bed.conf })).trim();
  assert.ok(!before.includes(next));
  const printed = await tlsa("cp prod/key", { "/etc/lematt": bed.conf, "/opt/lematt": ROOT });
  assert.match(printed, /^issued .*\(ec\)/m);
  const after = (await records()).split("\n");
  assert.deepEqual([after.includes(next), after.filter((line) => before.includes(line)).length], [true, 2]); // RSA's and ""
  await tlsa("openssl s_client", {
    "-connect mail.example.com:25": `-verify_return_error -connect 127.0.0.1:${port}`,
  });
});

// ---- http-01 ------------------------------------------------------------------------------------------------------

for (const server of ["nginx", "apache2", "haproxy"] as const) {
  recipeTest(`recipe redirect, ${server}`, [server], async () => {
    const port = freePort();
    await using bed = await recipeBed({
      domains: "web.example.com",
      settings: "keyTypes: ec",
      ca: { httpPort: port },
    });
    // the CA of the tests finds every name at its port, but an address with a port there
    const central = { "http://central.example.com": `http://127.0.0.1:${bed.web.port}` };
    const start = async (): Promise<Running> => {
      if (server === "nginx") {
        const location = adapt(block("redirect.md", "location"), central);
        return await startNginx(bed.home, port, () => `server { listen 127.0.0.1:${port}; ${location} }`);
      }
      if (server === "haproxy") {
        const rule = adapt(block("redirect.md", "http-request"), central);
        return await startHaproxy(bed.home, port, `bind 127.0.0.1:${port}\n  ${rule}`);
      }
      const modules = ["mpm_event", "alias", "authz_core"].map((name) =>
        `LoadModule ${name}_module /usr/lib/apache2/modules/mod_${name}.so\n`
      );
      const rule = adapt(block("redirect.md", "Redirect"), central);
      const config = `ServerRoot ${bed.home}\nPidFile ${bed.home}/pid\nErrorLog ${bed.home}/error.log\n` +
        `ServerName localhost\nListen 127.0.0.1:${port}\n${modules.join("")}${rule}`;
      await Deno.writeTextFile(join(bed.home, "apache.conf"), config);
      return await startServer(
        which("apache2")!,
        ["-D", "FOREGROUND", "-f", join(bed.home, "apache.conf")],
        port,
      );
    };
    await using _server = await start();
    const { code, stderr } = await bed.lematt("--prod");
    assert.deepEqual([code, stderr], [0, ""]);
    assert.equal(bed.web.log.filter(({ status }) => status === 200).length, 1);
  });
}

// ---- dns-01 -------------------------------------------------------------------------------------------------------

/** BIND as nsupdate.md has it, with one zone, and a bed whose CA and lematt ask it. */
async function startBind() {
  await using stack = new AsyncDisposableStack();
  const port = freePort();
  const ask = (name: string, type: "TXT" | "CNAME") =>
    systemQuery(name, type, { address: "127.0.0.1", port }).catch(() => []);
  const bed = stack.use(
    await recipeBed({
      domains: "example.org *\nwww.example.org",
      settings: "keyTypes: ec",
      ca: { txt: (name) => ask(name, "TXT"), cname: async (name) => (await ask(name, "CNAME"))[0] },
    }),
  );
  const { home } = bed;
  await shell(adapt(block("nsupdate.md", "tsig-keygen"), { "/etc/bind": home }), home);
  await Deno.writeTextFile(
    join(home, "example.org"),
    "$TTL 60\n@ SOA ns1 root 1 3600 600 86400 60\n@ NS ns1\nns1 A 127.0.0.1\nwww A 127.0.0.1\n",
  );
  const zone = adapt(block("nsupdate.md", "include"), { "/etc/bind": home, "/var/lib/bind": home });
  await Deno.writeTextFile(
    join(home, "named.conf"),
    `options { directory "${home}"; listen-on port ${port} { 127.0.0.1; }; listen-on-v6 { none; }; pid-file none; ` +
      `session-keyfile "${home}/session.key"; recursion no; };\ncontrols { };\n${zone}`,
  );
  stack.use(await startServer(which("named")!, ["-c", join(home, "named.conf"), "-f"], port));
  const query: typeof systemQuery = (name, type) => systemQuery(name, type, { address: "127.0.0.1", port });
  const open = stack.move();
  return {
    bed,
    port,
    /** Issues for all names by these hooks, and leaves no record. */
    async issue(actions: string) {
      bed.configure({ actions });
      const { code, stderr } = await bed.run({ mode: "prod", query });
      assert.deepEqual([code, stderr], [0, ""]);
      assert.deepEqual(bed.ca.validations.map(({ type, name }) => `${type} ${name}`).sort(), [
        "dns-01 *.example.org",
        "dns-01 example.org",
        "dns-01 www.example.org",
      ]);
      for (const name of ["", "www."]) {
        assert.deepEqual(await ask(`_acme-challenge.${name}example.org`, "TXT"), []);
      }
    },
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

recipeTest("recipe nsupdate", ["named", "nsupdate", "tsig-keygen"], async () => {
  await using bind = await startBind();
  await bind.issue(adapt(block("nsupdate.md", "[dns]"), {
    "server ns1.example.org": `server 127.0.0.1 ${bind.port}`,
    "/etc/lematt/tsig.key": `${bind.bed.home}/lematt.key`,
  }));
});

const hasDdns = which("lexicon") !== undefined &&
  await shell(
    "lexicon ddns list example.org TXT --auth-token=hmac-sha256:x:eA== --ddns-server=127.0.0.1",
    "/",
  )
    .catch((error) => !/extra dependencies|invalid choice/.test(error.message));
recipeTest("recipe lexicon, by its provider ddns", ["named", "tsig-keygen", "lexicon"], async () => {
  await using bind = await startBind();
  const { home } = bind.bed;
  // it supports no port but 53
  const address = `127.53.${Math.floor(Math.random() * 256)}.1`;
  using listener = Deno.listen({ hostname: address, port: 53 });
  const relaying = (async () => {
    for await (const client of listener) {
      const server = await Deno.connect({ hostname: "127.0.0.1", port: bind.port });
      client.readable.pipeTo(server.writable).catch(() => {});
      server.readable.pipeTo(client.writable).catch(() => {});
    }
  })();
  const secret = /secret "(.*)"/.exec(Deno.readTextFileSync(join(home, "lematt.key")))![1];
  const env = adapt(block("lexicon.md", "export"), {
    "LEXICON_CLOUDFLARE_AUTH_TOKEN=...": `LEXICON_DDNS_AUTH_TOKEN=hmac-sha256:lematt:${secret} ` +
      `LEXICON_DDNS_DDNS_SERVER=${address}`,
  });
  await Deno.writeTextFile(join(home, "lexicon.env"), env);
  await bind.issue(adapt(block("lexicon.md", "[dns]"), {
    "/etc/lematt/lexicon.env": `${home}/lexicon.env`,
    "lexicon cloudflare": "lexicon ddns",
  }));
  listener.close();
  await relaying;
}, hasDdns ? undefined : "lexicon with ddns not installed");

const acmeSh = Deno.env.get("ACME_SH") ?? join(Deno.env.get("HOME") ?? "/", ".acme.sh");
recipeTest(
  "recipe acme.sh, by dns_nsupdate",
  ["named", "nsupdate", "tsig-keygen"],
  async () => {
    await using bind = await startBind();
    const { home } = bind.bed;
    await shell(`mkdir .acme.sh && cp -r ${acmeSh}/acme.sh ${acmeSh}/dnsapi .acme.sh`, home);
    const env = adapt(block("acme-sh.md", "export"), {
      "CF_Token=...": `NSUPDATE_SERVER=127.0.0.1 NSUPDATE_SERVER_PORT=${bind.port} ` +
        `NSUPDATE_KEY=${home}/lematt.key HOME=${home}`,
    });
    await Deno.writeTextFile(join(home, ".acme.sh", "lematt.env"), env);
    await bind.issue(
      adapt(block("acme-sh.md", "[dns]"), { "~/.acme.sh": `${home}/.acme.sh`, dns_cf: "dns_nsupdate" }),
    );
  },
  existsSync(join(acmeSh, "dnsapi", "dns_nsupdate.sh"))
    ? undefined
    : `no acme.sh in ${acmeSh}; ACME_SH names it`,
);
