/**
 * Goal: probes find what an endpoint serves, for each address and key type, and end in time whatever an endpoint does.
 */

import assert from "node:assert/strict";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import { type Context, type Destination, systemContext } from "../lib/context.ts";
import { probe, type Probed, type Target } from "../lib/probe.ts";
import type { Certificate } from "../lib/x509.ts";
import { all } from "./bed.ts";
import { which } from "./bench-measure.ts";
import { together } from "./together.ts";
import { freePort, makeCertificate, startNginx, startServer, tcpServer } from "./tls.ts";

const NEEDS_NGINX = { ignore: which("nginx") === undefined };
const hasNamespaces = Deno.uid() === 0 && which("ip") !== undefined &&
  new Deno.Command("unshare", { args: ["-n", "true"] }).outputSync().success;

const test = together("time limits and many endpoints", 3);

/** The certificates of these tests, made once: RSA keys take their time. */
const directory = await Deno.makeTempDir({ prefix: "lematt-probe-" });
addEventListener("unload", () => Deno.removeSync(directory, { recursive: true }));
const certificates: Record<string, Certificate> = {};
await Promise.all(["rsa", "ec", "old-ec", "no-san"].map(async (file) => {
  const names = file === "no-san" ? [] : ["www.example.com"];
  certificates[file] = await makeCertificate(directory, file, file === "rsa" ? "rsa" : "ec", names);
}));

function targets(
  host: string,
  port: number,
  more: Partial<Target["endpoint"]> = {},
  keyTypes = ["rsa", "ec"],
) {
  const endpoint = { text: `${host}:${port}`, host, port, ...more };
  return keyTypes.map((keyType) => ({ endpoint, keyType }) as Target);
}

function context(changes: Partial<Context> = {}): Context {
  const warn = (text: string) => assert.fail(text);
  return systemContext({ fetch, userAgent: "", signal: new AbortController().signal, warn, ...changes });
}

/** Results of a probe in short: "127.0.0.1 rsa served rsa". */
function brief(sights: readonly Probed[]): string[] {
  return sights.map(({ address, keyType, kind, certificate, detail }) => {
    const file = Object.keys(certificates).find((file) =>
      certificates[file]!.fingerprint === certificate?.fingerprint
    );
    return [address, keyType, kind, file, detail].filter(Boolean).join(" ");
  });
}

/** nginx on loopback with one server for each list of files. */
async function web(...files: string[][]) {
  const ports = files.map(() => freePort());
  const server = await startNginx(
    directory,
    ports[0]!,
    (pair) =>
      ports.map((port, i) => `server { listen 127.0.0.1:${port} ssl; ${pair(...files[i]!)} }`).join("\n"),
  );
  return { ports, port: ports[0]!, [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

async function sServer(file: string, ...more: string[]) {
  const port = freePort();
  const args = `s_server -accept 127.0.0.1:${port} -cert ${file}.pem -key ${file}.key -quiet`.split(" ");
  const server = await startServer("openssl", [...args, ...more], port, { cwd: directory });
  return { port, [Symbol.asyncDispose]: () => server[Symbol.asyncDispose]() };
}

/** The results of a probe of this port on loopback. */
const see = async (port: number, keyTypes?: string[]) =>
  brief(await probe(targets("127.0.0.1", port, {}, keyTypes), context()));

Deno.test("probe() sees both certificates, with TLS 1.2 and 1.3 (nginx)", NEEDS_NGINX, async () => {
  for (const protocol of ["TLSv1.2", "TLSv1.3"]) {
    const port = freePort();
    await using _ = await startNginx(
      directory,
      port,
      (pair) => `ssl_protocols ${protocol}; server { listen 127.0.0.1:${port} ssl; ${pair("rsa", "ec")} }`,
    );
    assert.deepEqual(await see(port), ["127.0.0.1 rsa served rsa", "127.0.0.1 ec served ec"], protocol);
  }
});

Deno.test("probe() sees which certificate a server lacks, with TLS 1.2 and 1.3 (s_server)", async () => {
  for (const protocol of ["-tls1_2", "-tls1_3"]) {
    await using server = await sServer("ec", protocol);
    const [rsa, ec] = await see(server.port);
    assert.match(rsa!, /^127\.0\.0\.1 rsa refused /);
    assert.equal(ec, "127.0.0.1 ec served ec");
  }
});

Deno.test("a server that demands a client certificate is probed all the same, if it has proven that it has its own key", async () => {
  const table = { "-tls1_3": "served", "-tls1_2": "served", "-tls1_2 -cipher kRSA": "unfinished" };
  for (const [args, kind] of Object.entries(table)) {
    await using server = await sServer("rsa", "-Verify", "1", "-verify_return_error", ...args.split(" "));
    const [sight] = await see(server.port, ["rsa"]);
    assert(sight!.startsWith(`127.0.0.1 rsa ${kind} rsa`), sight);
  }
});

Deno.test("a certificate that is sent without its key does not count as served (s_server behind a forger)", async () => {
  for (const file of ["rsa", "ec"]) {
    await using server = await sServer(file, "-tls1_2");
    await using forger = await tcpServer((socket) => {
      const behind = connect(server.port, "127.0.0.1").on("error", () => socket.destroy());
      socket.pipe(behind);
      behind.on("data", (data) => {
        // the last octet before ServerHelloDone (RFC 5246 §7.4.5) is the last of the signature
        const done = data.indexOf(Uint8Array.fromHex("16030300040e000000"));
        if (done > 0) data[done - 1]! ^= 1;
        socket.write(data);
      });
    });
    const [sight] = await see(forger.port, [file]);
    assert(sight!.startsWith(`127.0.0.1 ${file} unfinished ${file} `), sight);
  }
});

Deno.test("probe() probes every address of a name, and sends the name (nginx)", NEEDS_NGINX, async () => {
  const port = freePort();
  await using _ = await startNginx(directory, port, (pair) => `
    server { listen 127.0.0.1:${port} ssl; listen [::1]:${port} ssl; ${pair("old-ec")} }
    server { listen 127.0.0.1:${port} ssl; server_name www.example.com; ${pair("ec")} }
    server { listen [::1]:${port} ssl; server_name www.example.com; ${pair("no-san")} }`);
  const route = (host: string): Promise<Destination[]> =>
    Promise.resolve(
      (host.startsWith("127") ? [host] : ["127.0.0.1", "::1"]).map((address) => ({ address, port })),
    );
  const see = async (host: string, sni?: string) =>
    brief(await probe(targets(host, 443, { sni }, ["ec"]), context({ route })));
  assert.deepEqual(await see("www.example.com"), ["127.0.0.1 ec served ec", "::1 ec served no-san"]);
  assert.deepEqual(await see("mail.example.com"), ["127.0.0.1 ec served old-ec", "::1 ec served old-ec"]);
  assert.deepEqual(await see("mail.example.com", "www.example.com"), await see("www.example.com"));
  assert.deepEqual(await see("127.0.0.1"), ["127.0.0.1 ec served old-ec"]);
  assert.deepEqual(await see("127.0.0.1", "www.example.com"), ["127.0.0.1 ec served ec"]);
  const literal = brief(await probe(targets("::1", port, { sni: "www.example.com" }, ["ec"]), context()));
  assert.deepEqual(literal, ["::1 ec served no-san"]);
});

Deno.test("an endpoint of several targets is resolved and probed once (nginx)", NEEDS_NGINX, async () => {
  await using server = await web(["rsa", "ec"]);
  const connections: number[] = [], resolved: string[] = [];
  await using door = await tcpServer((socket) => {
    connections.push(1);
    relay(socket, server.port);
  });
  const route = (host: string) => {
    resolved.push(host);
    return Promise.resolve([{ address: "127.0.0.1", port: door.port }]);
  };
  const named = [{}, {}, { text: "with its name", sni: "www.example.com" }].flatMap((more) =>
    targets("www.example.com", 443, more)
  );
  const sights = await probe(named, context({ route, random: () => 0.9 }));
  assert.deepEqual(
    sights.map(({ endpoint, keyType, kind }) => `${endpoint} ${keyType} ${kind}`),
    ["www.example.com:443", "with its name"].flatMap((text) => [`${text} rsa served`, `${text} ec served`]),
  );
  assert.deepEqual(resolved, ["www.example.com"]);
  assert.equal(
    connections.length,
    3,
    "one connection to see whether it answers, and one probe for each key type",
  );
});

Deno.test(
  "a load balancer in step with the probes hides no server for long (nginx)",
  NEEDS_NGINX,
  async () => {
    await using server = await web(["ec"], ["rsa"]);
    let turn = 0;
    await using balancer = await tcpServer((socket) => relay(socket, server.ports[turn++ % 2]!));
    const random = () => turn < 2 ? 0.9 : 0.1;
    const look = async () =>
      brief(await probe(targets("127.0.0.1", balancer.port, {}, ["rsa"]), context({ random }))).join();
    assert.match(await look(), /rsa served rsa$/);
    assert.match(await look(), /rsa refused/);
  },
);

/** An SMTP server, as far as STARTTLS; what follows it is for the TLS server at `tlsPort`. */
function smtpServer(tlsPort: number, offers: string) {
  return tcpServer((socket) => {
    socket.write("220 mail.example.com ESMTP\r\n");
    socket.on("data", function answer(line) {
      const [verb] = line.toString().trim().split(" ");
      if (verb === "EHLO") socket.write(`250-mail.example.com\r\n250 ${offers}\r\n`);
      else if (verb === "STARTTLS" && offers === verb) {
        socket.off("data", answer);
        socket.write("220 go ahead\r\n");
        relay(socket, tlsPort);
      } else socket.write("502 what?\r\n");
    });
  });
}

function relay(socket: Socket, port: number) {
  socket.pipe(connect(port, "127.0.0.1").on("error", () => socket.destroy())).pipe(socket);
}

Deno.test("probe() uses STARTTLS, and reports if it is not offered (nginx)", NEEDS_NGINX, async () => {
  await using server = await web(["rsa", "ec"]);
  await using smtp = await smtpServer(server.port, "STARTTLS");
  await using without = await smtpServer(server.port, "PIPELINING");
  await using refusing = await tcpServer((socket) => socket.on("data", () => socket.write("N"))); // as PostgreSQL does
  const table: [port: number, starttls: "smtp" | "postgres" | "ldap", seen: string][] = [
    [smtp.port, "smtp", "served ec"],
    [without.port, "smtp", "unreachable STARTTLS is not offered"],
    [refusing.port, "postgres", "unreachable STARTTLS is not offered"],
    [refusing.port, "ldap", "unreachable STARTTLS is not offered"],
  ];
  for (const [port, starttls, seen] of table) {
    const sights = brief(await probe(targets("127.0.0.1", port, { starttls }, ["ec"]), context()));
    assert.deepEqual(sights, [`127.0.0.1 ec ${seen}`], starttls);
  }
});

test("probe() reports why an endpoint cannot be reached, within its time limit", async () => {
  await using http = await tcpServer((socket) => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n"));
  await using closing = await tcpServer((socket) => socket.end());
  await using silent = await tcpServer(() => {});
  /** Sends its greeting, and nothing after it. */
  await using halting = await tcpServer((socket) => socket.write("220 mail.example.com ESMTP\r\n"));
  const route = (host: string, port: number) =>
    host === "nowhere.example.com"
      ? Promise.reject(new Error("ENOTFOUND"))
      : host === "lost.example.com"
      ? new Promise<Destination[]>(() => {})
      : Promise.resolve(host === "empty.example.com" ? [] : [{ address: host, port }]);
  const table: [host: string, port: number, why: RegExp, starttls?: "smtp" | "ldap"][] = [
    ["127.0.0.1", freePort(), /refused/],
    ["127.0.0.1", silent.port, /silent for 2 s/],
    ["127.0.0.1", silent.port, /silent for 2 s/, "smtp"],
    ["127.0.0.1", silent.port, /silent for 2 s/, "ldap"],
    ["127.0.0.1", halting.port, /no handshake within 2 s/, "smtp"],
    ["127.0.0.1", http.port, /does not speak TLS/],
    ["127.0.0.1", closing.port, /closes the connection/],
    ["nowhere.example.com", 443, /ENOTFOUND/],
    ["empty.example.com", 443, /no address/],
    ["lost.example.com", 443, /no answer within 2 s/],
    ["*.example.com", 443, /no address/],
  ];
  const begun = performance.now();
  await all(table.map(async ([host, port, why, starttls]) => {
    const sights = await probe(targets(host, port, { starttls }), context({ route }), 3, 2);
    assert.deepEqual(sights.map(({ keyType, kind }) => `${keyType} ${kind}`), [
      "rsa unreachable",
      "ec unreachable",
    ]);
    for (const { detail } of sights) assert.match(detail!, why, host);
  }));
  assert(performance.now() - begun < 15_000);
});

Deno.test("many silent endpoints take one time-out together; of 4,000 addresses some are probed, and the rest is reported", async () => {
  await using silent = await tcpServer(() => {}, "0.0.0.0");
  const many = Array.from({ length: 60 }, (_, i) => targets(`127.0.0.${i + 1}`, silent.port)).flat();
  const begun = performance.now();
  const sights = await probe(many, context(), 3, 0.5);
  assert.deepEqual(new Set(sights.map(({ kind }) => kind)), new Set(["unreachable"]));
  assert(performance.now() - begun < 10_000, "60 time-outs would take 30 s");

  const port = freePort();
  const addresses = Array.from({ length: 4000 }, (_, i) => ({ address: `127.1.${i >> 8}.${i & 255}`, port }));
  const warnings: string[] = [];
  const changes = {
    route: () => Promise.resolve(addresses),
    warn: (text: string) => void warnings.push(text),
  };
  assert.equal((await probe(targets("www.example.com", 443), context(changes))).length, 2 * 32);
  assert.match(warnings.join(), /^www\.example\.com has 4000 addresses; 32 /);
});

Deno.test("probe() ends at once when its signal aborts, whatever it waits for", async () => {
  for (const waiting of ["knock", "openssl"]) {
    const controller = new AbortController();
    let connections = 0;
    await using server = await tcpServer((socket) => {
      if (waiting === "openssl") socket.write("220 mail.example.com ESMTP\r\n");
      if (++connections === (waiting === "knock" ? 1 : 2)) controller.abort(new Error("interrupted"));
    });
    const begun = performance.now();
    const at = context({ signal: controller.signal, random: () => 0.9 });
    const probing = probe(targets("127.0.0.1", server.port, { starttls: "smtp" }), at);
    await assert.rejects(probing, { message: "interrupted" });
    assert(performance.now() - begun < 5000);
  }
});

/** Runs a script with `probe`, `targets` and `context` in another process, and returns its output. */
async function elsewhere(
  script: string,
  env: Record<string, string> = {},
  within: string[] = [],
): Promise<string> {
  const url = (name: string) => JSON.stringify(import.meta.resolve(`../lib/${name}.ts`));
  const program = join(directory, `${crypto.randomUUID()}.js`);
  await Deno.writeTextFile(
    program,
    `import { probe } from ${url("probe")}; import { systemContext } from ${url("context")};
const context = (changes = {}) =>
  systemContext({ fetch, userAgent: "", signal: new AbortController().signal, warn: console.log, ...changes });
const targets = (host, port) => [{ endpoint: { text: host, host, port }, keyType: "ec" }];
${script}`,
  );
  const config = new URL("../deno.json", import.meta.url).pathname;
  const [command, ...args] = [...within, Deno.execPath()]
    .concat("run", "-q", "--no-check", "--no-prompt", "-P=tests", "--config", config, program);
  const { stdout, stderr } = await new Deno.Command(command!, { args, env, stdin: "null" }).output();
  return new TextDecoder().decode(stdout) + new TextDecoder().decode(stderr);
}

/** A directory for PATH with this openssl in it. */
async function withOpenssl(script?: string): Promise<Record<string, string>> {
  const bin = await Deno.makeTempDir({ dir: directory });
  if (script !== undefined) {
    await Deno.writeTextFile(join(bin, "openssl"), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  }
  return { PATH: script === undefined ? bin : `${bin}:${Deno.env.get("PATH")}` };
}

test("probe() reports an openssl that is missing or cannot be used", async () => {
  const script =
    `await probe(targets("127.0.0.1", 1), context()).catch((error) => console.log(error.name, error.message));`;
  const libre = "echo ' -connect host:port Who to connect to\n -no_servername  no SNI' >&2; exit 1";
  const [none, other] = await all(
    [undefined, libre].map(async (openssl) => elsewhere(script, await withOpenssl(openssl))),
  );
  assert.match(none!, /^ProbeError .*openssl/);
  assert.match(other!, /^ProbeError .*-sigalgs.*LibreSSL/);
});

Deno.test("at most 16 openssl run at once, however many calls there are (nginx)", NEEDS_NGINX, async () => {
  await using server = await web(["ec"]);
  const running = await Deno.makeTempDir({ dir: directory });
  const counting = `mkdir ${running}/$$; ls ${running} | wc -l >> ${running}.log
${which("openssl")} "$@"; status=$?; rmdir ${running}/$$; exit $status`;
  const script = `
const calls = [1, 2, 3, 4].map((call) => Array.from({ length: 10 }, (_, i) => targets(\`127.0.\${call}.\${i}\`, ${server.port})));
const route = () => Promise.resolve([{ address: "127.0.0.1", port: ${server.port} }]);
const sights = await Promise.all(calls.map((call) => probe(call.flat().map((target) =>
  ({ ...target, endpoint: { ...target.endpoint, host: target.endpoint.host + ".example" } })), context({ route }))));
console.log(sights.flat().filter(({ kind }) => kind === "served").length);`;
  assert.equal(await elsewhere(script, await withOpenssl(counting)), "40\n");
  const most = Math.max(...(await Deno.readTextFile(`${running}.log`)).trim().split("\n").map(Number));
  assert(most > 8 && most <= 16, `${most} at once`);
});

test("an address family that this host lacks is skipped", async () => {
  const script = `
const server = Deno.listen({ port: 4433, hostname: "127.0.0.1" });
(async () => { for await (const connection of server) connection.close(); })();
const see = async (...addresses) => {
  const route = () => Promise.resolve(addresses.map((address) => ({ address, port: 4433 })));
  const sights = await probe(targets("www.example.com", 443), context({ route }));
  return sights.map(({ address, kind }) => address + " " + kind).join(", ");
};
for (const seen of await Promise.all([see("127.0.0.1", "2001:db8::1"), see("2001:db8::1")])) console.log(seen);
Deno.exit();`;
  const reachable = "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up; " +
    "ip -6 addr add 2001:db8::2/64 dev v0 nodad; ";
  const lacking = "127.0.0.1 unreachable, 2001:db8::1 passed over\n2001:db8::1 unreachable\n";
  const down = "127.0.0.1 unreachable, 2001:db8::1 unreachable\n2001:db8::1 unreachable\n";
  const worlds: readonly (readonly [string, string])[] = [
    ["true", lacking],
    ["sysctl -qw net.ipv6.conf.all.disable_ipv6=1", lacking],
    ...["unreachable", "prohibit", "blackhole"].map((type) =>
      [`ip -6 route add ${type} default`, lacking] as const
    ),
    [`${reachable} ip -6 neigh add 2001:db8::1 dev v0 nud failed`, down],
  ];
  const seen = await Promise.all(
    worlds.map(([setup]) =>
      elsewhere(script, {}, ["unshare", "-n", "sh", "-c", `ip link set lo up; ${setup}; exec "$@"`, "sh"])
    ),
  );
  for (const [i, [setup, expected]] of worlds.entries()) assert.equal(seen[i], expected, setup);
}, hasNamespaces ? undefined : "no namespaces");
