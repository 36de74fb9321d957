// What an endpoint serves: real certificates, served by nginx and by openssl s_server on loopback, one server
// silent, one that speaks no TLS, and one that speaks SMTP first.

import assert from "node:assert/strict";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { connect, createServer, type Server, type Socket } from "node:net";
import { CommandError } from "../lib/actions.ts";
import { systemRoute } from "../lib/context.ts";

const resolveAddresses = async (host: string) => (await systemRoute(host, 0)).map(({ address }) => address);
import { probe, type Served, type Target, verifyUntil } from "../lib/verify.ts";
import { type Certificate, readCertificate } from "../lib/x509.ts";

type KeyType = "rsa" | "ec";

const world = { resolve: resolveAddresses, timeoutSeconds: 10 };
const NEEDS_NGINX = { ignore: !existsSync("/usr/sbin/nginx") };

async function openssl(...args: string[]) {
  const { success, stderr } = await new Deno.Command("openssl", { args, stdin: "null" }).output();
  assert.ok(success, new TextDecoder().decode(stderr));
}

/** Makes `<directory>/<file>.key` and `.pem`, self-signed for `names`; what its certificate says. */
async function makeCertificate(
  directory: string,
  file: string,
  keyType: KeyType,
  names: string[],
): Promise<Certificate> {
  const path = `${directory}/${file}`;
  const newKey = keyType === "rsa" ? ["rsa:2048"] : ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"];
  const san = `subjectAltName=${names.map((name) => `DNS:${name}`).join(",")}`;
  await openssl(
    ...["req", "-x509", "-newkey", ...newKey, "-nodes", "-keyout", `${path}.key`, "-out", `${path}.pem`],
    ...["-days", "30", "-subj", "/CN=test", "-addext", san],
  );
  return readCertificate(await Deno.readTextFile(`${path}.pem`));
}

/** The certificates of these tests, made once: RSA keys take their time. */
const directory = await Deno.makeTempDir();
addEventListener("unload", () => Deno.removeSync(directory, { recursive: true }));
const [oldRsa, oldEc, rsa, ec, otherEc] = await Promise.all([
  makeCertificate(directory, "old-rsa", "rsa", ["www.example.com", "example.com"]),
  makeCertificate(directory, "old-ec", "ec", ["www.example.com", "example.com", "more.example.com"]),
  makeCertificate(directory, "rsa", "rsa", ["example.com", "www.example.com"]),
  makeCertificate(directory, "ec", "ec", ["example.com", "www.example.com"]),
  makeCertificate(directory, "other-ec", "ec", ["other.example.com"]),
]);
/** Made within the same second or two; here they are of different days. */
const expected = ([["rsa", rsa], ["ec", ec]] as const).map(([keyType, certificate]) => ({
  keyType,
  certificate: Object.create(certificate, {
    notBefore: { value: new Date(certificate.notBefore.getTime() + 86400_000) },
  }) as Certificate,
}));

function target(host: string, port: number, options: Partial<Target["endpoint"]> = {}): Target {
  return { endpoint: { text: `${host}:${port}`, host, port, ...options }, expected };
}

/** Findings in few words. */
function brief(served: Served[]): string[] {
  const files: [string, Certificate][] = [
    ["old-rsa", oldRsa],
    ["old-ec", oldEc],
    ["rsa", rsa],
    ["ec", ec],
    ["other-ec", otherEc],
  ];
  return served.map(({ address, keyType, state, certificate, detail }) => {
    const file = files.find(([, { fingerprint }]) => fingerprint === certificate?.fingerprint)?.[0];
    return `${address} ${keyType}: ${state}, ${file ?? detail}`;
  });
}

function freePort(hostname = "127.0.0.1"): number {
  using listener = Deno.listen({ hostname, port: 0 });
  return listener.addr.port;
}

async function until(condition: () => boolean | Promise<boolean>, what: string) {
  for (const deadline = Date.now() + 5000; !await condition();) {
    assert.ok(Date.now() < deadline, `not within 5 s: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

async function accepts(hostname: string, port: number): Promise<boolean> {
  return await Deno.connect({ hostname, port }).then((connection) => (connection.close(), true), () => false);
}

/** A TCP server on loopback that gives every connection to `serve`. */
async function tcpServer(serve: (socket: Socket) => void) {
  const sockets = new Set<Socket>();
  const server: Server = createServer((socket) => {
    sockets.add(socket);
    socket.on("error", () => socket.destroy());
    serve(socket);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  return {
    port: (server.address() as { port: number }).port,
    async [Symbol.asyncDispose]() {
      for (const socket of sockets) socket.destroy();
      server.close();
      await once(server, "close");
    },
  };
}

/** nginx with the given servers; `pair("x")` names the files x.pem and x.key of its directory. */
async function nginx(servers: (pair: (file: string) => string) => string, ...ports: number[]) {
  const prefix = await Deno.makeTempDir({ dir: directory });
  const pair = (file: string) => `ssl_certificate ../${file}.pem; ssl_certificate_key ../${file}.key;`;
  const configure = async (servers: string) => {
    const own = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((what) =>
      `${what}_temp_path ${what};`
    );
    await Deno.writeTextFile(
      `${prefix}/nginx.conf`,
      `daemon off; pid nginx.pid; error_log error.log; events {} http { access_log off; ${
        own.join(" ")
      } ${servers} }`,
    );
  };
  await configure(servers(pair));
  const process = new Deno.Command("/usr/sbin/nginx", {
    args: ["-p", prefix, "-c", "nginx.conf"],
    stderr: "null",
  })
    .spawn();
  for (const port of ports) await until(() => accepts("127.0.0.1", port), "nginx listens");
  return {
    async reload(servers: (pair: (file: string) => string) => string) {
      await configure(servers(pair));
      process.kill("SIGHUP");
    },
    async [Symbol.asyncDispose]() {
      process.kill("SIGTERM");
      await process.status;
    },
  };
}

for (const protocol of ["TLSv1.2", "TLSv1.3"]) {
  Deno.test(`probe() finds both certificates of a server with ${protocol} (nginx)`, NEEDS_NGINX, async () => {
    const port = freePort();
    await using _ = await nginx(
      (pair) =>
        `server { listen 127.0.0.1:${port} ssl; ssl_protocols ${protocol}; ${pair("rsa")} ${pair("ec")} }`,
      port,
    );
    const [servedRsa, servedEc] = await probe([target("127.0.0.1", port)], world);
    const { endpoint, address, keyType, state, certificate } = servedRsa!;
    assert.deepEqual([endpoint, address, keyType, state], [
      `127.0.0.1:${port}`,
      "127.0.0.1",
      "rsa",
      "current",
    ]);
    assert.equal(certificate!.fingerprint, rsa.fingerprint);
    assert.equal(servedEc!.state, "current");
    assert.equal(servedEc!.certificate!.fingerprint, ec.fingerprint);
  });

  Deno.test(`probe() sees a certificate that a server with ${protocol} does not have (s_server)`, async () => {
    const port = freePort();
    await using server = new Deno.Command("openssl", {
      args: [
        ...["s_server", "-accept", `127.0.0.1:${port}`, protocol === "TLSv1.2" ? "-tls1_2" : "-tls1_3"],
        ...["-cert", `${directory}/ec.pem`, "-key", `${directory}/ec.key`, "-quiet"],
      ],
      stdin: "null",
      stdout: "null",
      stderr: "null",
    }).spawn();
    await until(() => accepts("127.0.0.1", port), "s_server listens");
    assert.deepEqual(brief(await probe([target("127.0.0.1", port)], world)), [
      "127.0.0.1 rsa: other, no certificate of this type",
      "127.0.0.1 ec: current, ec",
    ]);
    server.kill();
  });
}

Deno.test(
  "probe() catches the old ECDSA certificate beside the new RSA one (nginx)",
  NEEDS_NGINX,
  async () => {
    const port = freePort();
    await using _ = await nginx(
      (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("rsa")} ${pair("old-ec")} }`,
      port,
    );
    const served = await probe([target("127.0.0.1", port)], world);
    assert.deepEqual(brief(served), ["127.0.0.1 rsa: current, rsa", "127.0.0.1 ec: old, old-ec"]);
    assert.equal(served[1]!.certificate!.fingerprint, oldEc.fingerprint);
  },
);

Deno.test("probe() looks at every address of a name (nginx)", NEEDS_NGINX, async () => {
  const port = freePort();
  await using _ = await nginx(
    (pair) => `
      server { listen 127.0.0.1:${port} ssl; ${pair("rsa")} ${pair("ec")} }
      server { listen [::1]:${port} ssl; ${pair("old-rsa")} ${pair("ec")} }`,
    port,
  );
  const resolve = (host: string) => {
    assert.equal(host, "www.example.com");
    return Promise.resolve(["127.0.0.1", "::1"]);
  };
  assert.deepEqual(brief(await probe([target("www.example.com", port)], { ...world, resolve })), [
    "127.0.0.1 rsa: current, rsa",
    "127.0.0.1 ec: current, ec",
    "::1 rsa: old, old-rsa",
    "::1 ec: current, ec",
  ]);
});

Deno.test(
  "probe() asks for the host's name, or for the one that the endpoint names (nginx)",
  NEEDS_NGINX,
  async () => {
    const port = freePort();
    await using _ = await nginx(
      (pair) => `
      server { listen 127.0.0.1:${port} ssl default_server; ${pair("other-ec")} ${pair("rsa")} }
      server { listen 127.0.0.1:${port} ssl; server_name www.example.com; ${pair("rsa")} ${pair("ec")} }`,
      port,
    );
    const resolve = () => Promise.resolve(["127.0.0.1"]);
    const targets = [
      target("www.example.com", port),
      target("mail.example.com", port),
      target("mail.example.com", port, { sni: "www.example.com" }),
      target("127.0.0.1", port),
      target("127.0.0.1", port, { sni: "www.example.com" }),
    ];
    const served = await probe(targets, { ...world, resolve });
    assert.deepEqual(brief(served.filter(({ keyType }) => keyType === "ec")), [
      "127.0.0.1 ec: current, ec",
      "127.0.0.1 ec: other, other-ec",
      "127.0.0.1 ec: current, ec",
      "127.0.0.1 ec: other, other-ec",
      "127.0.0.1 ec: current, ec",
    ]);
  },
);

Deno.test(
  "probe() sees the certificate of a server that wants one of ours (nginx)",
  NEEDS_NGINX,
  async () => {
    const port = freePort();
    await using _ = await nginx(
      (pair) =>
        `server { listen 127.0.0.1:${port} ssl; ssl_verify_client on; ssl_client_certificate ../ec.pem;
      ${pair("rsa")} ${pair("ec")} }`,
      port,
    );
    assert.deepEqual(brief(await probe([target("127.0.0.1", port)], world)), [
      "127.0.0.1 rsa: current, rsa",
      "127.0.0.1 ec: current, ec",
    ]);
  },
);

/** An SMTP server, as far as STARTTLS; what follows it is for the TLS server at `tlsPort`. */
function smtpServer(tlsPort: number, offers: string[]) {
  return tcpServer((socket) => {
    socket.write("220 mail.example.com ESMTP\r\n");
    socket.on("data", function answer(line) {
      const [verb] = line.toString().trim().split(" ");
      if (verb === "EHLO") {
        const lines = ["mail.example.com", ...offers];
        socket.write(lines.map((text, n) => `250${n < lines.length - 1 ? "-" : " "}${text}\r\n`).join(""));
      } else if (verb === "STARTTLS" && offers.includes("STARTTLS")) {
        socket.off("data", answer);
        socket.write("220 go ahead\r\n");
        const tls = connect(tlsPort, "127.0.0.1").on("error", () => socket.destroy());
        socket.pipe(tls).pipe(socket);
      } else {
        socket.write("502 what?\r\n");
      }
    });
  });
}

Deno.test("probe() speaks STARTTLS (nginx behind SMTP)", NEEDS_NGINX, async () => {
  const port = freePort();
  await using _ = await nginx(
    (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("rsa")} ${pair("ec")} }`,
    port,
  );
  await using smtp = await smtpServer(port, ["PIPELINING", "STARTTLS"]);
  await using without = await smtpServer(port, ["PIPELINING"]);
  const targets = [smtp, without].map(({ port }) => target("127.0.0.1", port, { starttls: "smtp" }));
  assert.deepEqual(brief(await probe(targets, world)), [
    "127.0.0.1 rsa: current, rsa",
    "127.0.0.1 ec: current, ec",
    "127.0.0.1 rsa: unreachable, STARTTLS is not offered",
    "127.0.0.1 ec: unreachable, STARTTLS is not offered",
  ]);
});

Deno.test("probe() says why an endpoint cannot be reached", async () => {
  await using silent = await tcpServer(() => {});
  await using http = await tcpServer((socket) => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n"));
  await using closing = await tcpServer((socket) => socket.end());
  const targets = [
    target("127.0.0.1", freePort()),
    target("127.0.0.1", silent.port),
    target("127.0.0.1", http.port),
    target("127.0.0.1", closing.port),
    target("nowhere.example.com", 443),
    target("empty.example.com", 443),
  ];
  const served = await probe(targets, {
    timeoutSeconds: 1,
    resolve: async (host) => {
      if (host === "nowhere.example.com") throw new Error("the zone is on holiday");
      return host === "empty.example.com" ? [] : await resolveAddresses(host);
    },
  });
  assert.deepEqual(brief(served.filter(({ keyType }) => keyType === "rsa")), [
    "127.0.0.1 rsa: unreachable, Connection refused",
    "127.0.0.1 rsa: unreachable, no answer within 1 s",
    "127.0.0.1 rsa: unreachable, wrong version number",
    "127.0.0.1 rsa: unreachable, unexpected eof while reading",
    " rsa: unreachable, no address: the zone is on holiday",
    " rsa: unreachable, no address",
  ]);
});

Deno.test(
  "a younger certificate, or one that lacks a name, is not called old (nginx)",
  NEEDS_NGINX,
  async () => {
    const port = freePort();
    await using _ = await nginx((pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("old-ec")} }`, port);
    const stateBeside = async (certificate: Certificate) => {
      const [served] = await probe([{
        ...target("127.0.0.1", port),
        expected: [{ keyType: "ec", certificate }],
      }], world);
      return served!.state;
    };
    const notBefore = new Date(oldEc.notBefore.getTime() + 1000);
    assert.equal(await stateBeside({ ...ec, notBefore }), "old");
    assert.equal(await stateBeside({ ...ec, notBefore: new Date(0) }), "other");
    assert.equal(await stateBeside({ ...ec, notBefore, names: [...ec.names, "new.example.com"] }), "other");
  },
);

Deno.test("verifyUntil() waits until the new certificates are served (nginx)", NEEDS_NGINX, async () => {
  const port = freePort();
  const servers = (rsa: string, ec: string) => (pair: (file: string) => string) =>
    `server { listen 127.0.0.1:${port} ssl; ${pair(rsa)} ${pair(ec)} }`;
  await using web = await nginx(servers("rsa", "old-ec"), port);
  let begun = 0, ended = 0;
  await using door = await tcpServer((socket) => {
    begun++;
    socket.pipe(connect(port, "127.0.0.1")).pipe(socket).on("close", () => ended++);
  });
  const verifying = verifyUntil([target("127.0.0.1", door.port)], world, 10);
  await until(() => ended === 2, "it has looked once");
  await web.reload(servers("rsa", "ec"));
  assert.deepEqual(brief(await verifying), ["127.0.0.1 rsa: current, rsa", "127.0.0.1 ec: current, ec"]);
  assert.ok(begun > 2);
});

Deno.test("verifyUntil() tells at its deadline what is served instead (nginx)", NEEDS_NGINX, async () => {
  const port = freePort();
  await using _ = await nginx(
    (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("rsa")} ${pair("old-ec")} }`,
    port,
  );
  const begun = performance.now();
  const served = await verifyUntil([target("127.0.0.1", port), target("127.0.0.1", freePort())], world, 1);
  assert.deepEqual(brief(served), [
    "127.0.0.1 rsa: current, rsa",
    "127.0.0.1 ec: old, old-ec",
    "127.0.0.1 rsa: unreachable, Connection refused",
    "127.0.0.1 ec: unreachable, Connection refused",
  ]);
  assert.ok(performance.now() - begun < 5000);
});

Deno.test("verifyUntil() ends when its signal aborts", async () => {
  await using silent = await tcpServer(() => controller.abort(new Error("interrupted")));
  const controller = new AbortController();
  await assert.rejects(
    verifyUntil([target("127.0.0.1", silent.port)], { ...world, signal: controller.signal }),
    {
      message: "interrupted",
    },
  );
});

Deno.test("probe() says that there is no openssl", async () => {
  const path = Deno.env.get("PATH")!;
  Deno.env.set("PATH", directory);
  try {
    await assert.rejects(probe([target("127.0.0.1", 1)], world), (error: Error) => {
      assert.ok(error instanceof CommandError);
      assert.match(
        error.message,
        /^Cannot run "exec openssl s_client .*": exit status 127 \(command not found\)$/,
      );
      return true;
    });
  } finally {
    Deno.env.set("PATH", path);
  }
});

Deno.test("resolveAddresses() knows addresses, and names in /etc/hosts", async () => {
  assert.deepEqual(await resolveAddresses("2001:db8::7"), ["2001:db8::7"]);
  assert.deepEqual(await resolveAddresses("192.0.2.1"), ["192.0.2.1"]);
  assert.ok(
    (await resolveAddresses("localhost")).some((address) => address === "127.0.0.1" || address === "::1"),
  );
  await assert.rejects(resolveAddresses("nowhere.invalid"), { code: "ENOTFOUND" });
});
