/**
 * Goal: probes find what an endpoint serves, for each address and key type, and end in time whatever an endpoint does.
 * STARTTLS of the services that have a recipe is in recipes.test.ts.
 */

import assert from "node:assert/strict";
import { connect } from "node:net";
import { join } from "node:path";
import { type Context, type Destination, systemContext } from "../lib/context.ts";
import { probe, type Target } from "../lib/probe.ts";
import type { Certificate } from "../lib/x509.ts";
import { all, testBed, together } from "./bed.ts";
import { lackOf, which } from "./programs.ts";
import {
  freePort,
  makeCertificate,
  nginxTest,
  startBalancer,
  startHttps,
  startNginx,
  startServer,
  tcpServer,
} from "./tls.ts";

const NAME = "www.example.com";
const LACKING = "refused no certificate of this type";

const test = together("time limits and many endpoints");

/** The certificates of these tests, made once: RSA keys take their time. */
const directory = await Deno.makeTempDir({ prefix: "lematt-probe-" });
addEventListener("unload", () => Deno.removeSync(directory, { recursive: true }));
const certificates: Record<string, Certificate> = {};
await Promise.all(["rsa", "ec", "old-ec"].map(async (file) => {
  certificates[file] = await makeCertificate(directory, file, file === "rsa" ? "rsa" : "ec", [NAME]);
}));

type KeyTypes = readonly Target["keyType"][];
type Where = Partial<Target["endpoint"]> & { port: number };

function targets(where: Where, keyTypes: KeyTypes = ["rsa", "ec"]): Target[] {
  const { host = "127.0.0.1", port } = where;
  return keyTypes.map((keyType) => ({ endpoint: { text: `${host}:${port}`, host, ...where }, keyType }));
}

function context(changes: Partial<Context> = {}): Context {
  const warn = (text: string) => assert.fail(text);
  return systemContext({ fetch, userAgent: "", signal: new AbortController().signal, warn, ...changes });
}

/** What a probe shows, in short: "127.0.0.1 rsa served rsa". */
async function see(where: Where, keyTypes?: KeyTypes, changes?: Partial<Context>, ...more: number[]) {
  const sights = await probe(targets(where, keyTypes), context(changes), ...more);
  return sights.map(({ address, keyType, kind, certificate, detail }) => {
    const isShown = ([, { fingerprint }]: [string, Certificate]) => fingerprint === certificate?.fingerprint;
    const [file] = Object.entries(certificates).find(isShown) ?? [];
    return [address, keyType, kind, file, detail].filter(Boolean).join(" ");
  });
}

nginxTest("both certificates of a server are seen, or which one it lacks, with TLS 1.2 and 1.3", async () => {
  for (const protocol of ["TLSv1.2", "TLSv1.3"]) {
    const [both, one] = [freePort(), freePort()];
    await using _ = await startNginx(directory, both, (pair) =>
      `ssl_protocols ${protocol};
      server { listen 127.0.0.1:${both} ssl; ${pair("rsa", "ec")} }
      server { listen 127.0.0.1:${one} ssl; ${pair("ec")} }`);
    const ec = "127.0.0.1 ec served ec";
    assert.deepEqual(await see({ port: both }), ["127.0.0.1 rsa served rsa", ec], protocol);
    assert.deepEqual(await see({ port: one }), [`127.0.0.1 rsa ${LACKING}`, ec], protocol);
  }
});

Deno.test("S11: a certificate counts as served if the server has proven that it has the key", async () => {
  const table: [args: string, kind: "served" | "unfinished", forged?: boolean][] = [
    ["-tls1_3", "served"],
    ["-tls1_2", "served"],
    ["-tls1_2 -cipher kRSA", "unfinished"],
    ["-tls1_2", "unfinished", true],
  ];
  for (const [args, kind, forged] of table) {
    const port = freePort();
    const pair = `-cert ${directory}/rsa.pem -key ${directory}/rsa.key`;
    const demand = forged ? "" : " -Verify 1 -verify_return_error";
    const command = `s_server -accept 127.0.0.1:${port} -quiet ${pair} ${args}${demand}`;
    await using _ = await startServer("openssl", command.split(" "), port);
    await using forger = await tcpServer((socket) => {
      const behind = connect(port, "127.0.0.1").on("error", () => socket.destroy());
      socket.pipe(behind);
      behind.on("data", (data) => {
        // the last octet before ServerHelloDone (RFC 5246 §7.4.5) is the last of the signature
        const done = data.indexOf(Uint8Array.fromHex("16030300040e000000"));
        if (done > 0) data[done - 1]! ^= 1;
        socket.write(data);
      });
    });
    const [sight] = await see({ port: forged ? forger.port : port }, ["rsa"]);
    assert(sight!.startsWith(`127.0.0.1 rsa ${kind} rsa`), `${args}: ${sight}`);
  }
});

nginxTest("every address of a name is probed, with the name or the one that is given", async () => {
  const port = freePort();
  await using _ = await startNginx(directory, port, (pair) => `
    server { listen 127.0.0.1:${port} ssl; listen [::1]:${port} ssl; ${pair("old-ec")} }
    server { listen 127.0.0.1:${port} ssl; server_name ${NAME}; ${pair("ec")} }
    server { listen [::1]:${port} ssl; server_name ${NAME}; ${pair("rsa")} }`);
  const table: [host: string, sni: string | undefined, seen: string][] = [
    [NAME, undefined, `127.0.0.1 ec served ec, ::1 ec ${LACKING}`],
    ["mail.example.com", NAME, `127.0.0.1 ec served ec, ::1 ec ${LACKING}`],
    ["mail.example.com", undefined, "127.0.0.1 ec served old-ec, ::1 ec served old-ec"],
    ["::1", undefined, "::1 ec served old-ec"],
    ["127.0.0.1", NAME, "127.0.0.1 ec served ec"],
  ];
  for (const [host, sni, seen] of table) {
    const addresses = host.includes("example") ? ["127.0.0.1", "::1"] : [host];
    const route = () => Promise.resolve(addresses.map((address) => ({ address, port })));
    assert.equal((await see({ host, port: 443, sni }, ["ec"], { route })).join(", "), seen);
  }
});

nginxTest("a load balancer in step with the probes hides no server for long", async () => {
  await using good = await startHttps(directory, "ec");
  await using other = await startHttps(directory, "rsa");
  await using balancer = await startBalancer(good.port, other.port);
  const random = () => balancer.counts.connections < 2 ? 0.9 : 0.1;
  for (const seen of ["served rsa", LACKING]) {
    assert.deepEqual(await see({ port: balancer.port }, ["rsa"], { random }), [`127.0.0.1 rsa ${seen}`]);
  }
});

test("why an endpoint cannot be reached is reported within the time limit", async () => {
  const answering = (text: string) => tcpServer((socket) => socket.on("data", () => socket.write(text)));
  await using http = await answering("HTTP/1.1 400 Bad Request\r\n\r\n");
  await using postgres = await answering("N");
  await using smtp = await tcpServer((socket) => {
    socket.write("220 mail.example.com ESMTP\r\n");
    socket.on("data", () => socket.write("250 mail.example.com\r\n"));
  });
  await using closing = await tcpServer((socket) => socket.end());
  await using silent = await tcpServer(() => {});
  await using halting = await tcpServer((socket) => socket.write("220 mail.example.com ESMTP\r\n"));
  type Starttls = "smtp" | "ldap" | "postgres";
  const table: [host: string, port: number, seconds: number, why: RegExp, starttls?: Starttls][] = [
    ["127.0.0.1", freePort(), 60, /refused/],
    ["127.0.0.1", silent.port, 3, /silent for 3 s/],
    ["127.0.0.1", halting.port, 3, /no handshake within 3 s/, "smtp"],
    ["127.0.0.1", http.port, 60, /does not speak TLS/],
    ["127.0.0.1", closing.port, 60, /closes the connection/],
    ["127.0.0.1", smtp.port, 60, /STARTTLS is not offered/, "smtp"],
    ["127.0.0.1", postgres.port, 60, /STARTTLS is not offered/, "postgres"],
    ["127.0.0.1", postgres.port, 60, /STARTTLS is not offered/, "ldap"],
    ["nowhere.example.com", 443, 60, /ENOTFOUND/],
    ["lost.example.com", 443, 3, /no answer within 3 s/],
    ["*.example.com", 443, 60, /no address/],
  ];
  const route = (host: string, port: number): Promise<Destination[]> => {
    if (host.startsWith("nowhere")) return Promise.reject(new Error("ENOTFOUND"));
    if (host.startsWith("lost")) return new Promise(() => {});
    return Promise.resolve([{ address: host, port }]);
  };
  await all(table.map(async ([host, port, seconds, why, starttls]) => {
    const [sight] = await see({ host, port, starttls }, ["ec"], { route }, 3, seconds);
    assert.match(sight!, /ec unreachable /);
    assert.match(sight!, why);
  }));
});

test("S2: many silent endpoints take one time-out together; of 4,000 addresses 32 are probed", async () => {
  const arrivals: number[] = [];
  await using silent = await tcpServer(() => void arrivals.push(performance.now()), "0.0.0.0");
  const many = Array.from({ length: 60 }, (_, i) => targets({ host: `127.0.0.${i + 1}`, port: silent.port }))
    .flat();
  const sights = await probe(many, context(), 3, 2);
  assert.deepEqual(new Set(sights.map(({ kind }) => kind)), new Set(["unreachable"]));
  assert.equal(arrivals.length, 60);
  assert(arrivals[59]! - arrivals[0]! < 2000, "the last is contacted before the time-out of the first");

  const port = freePort();
  const addresses = Array.from({ length: 4000 }, (_, i) => ({ address: `127.1.${i >> 8}.${i & 255}`, port }));
  const warnings: string[] = [];
  const route = () => Promise.resolve(addresses);
  const warn = (text: string) => void warnings.push(text);
  const two = ["a.example.com", "b.example.com"].flatMap((sni) => targets({ host: NAME, port, sni }, ["ec"]));
  assert.equal((await probe(two, context({ route, warn }))).length, 2 * 32);
  assert.equal(warnings.length, 1, "resolved once");
  assert.match(warnings[0]!, /^www\.example\.com has 4000 addresses; 32 /);
});

/** A new directory with a script as its openssl. */
async function withOpenssl(script: string): Promise<string> {
  const bin = await Deno.makeTempDir({ dir: directory });
  await Deno.writeTextFile(join(bin, "openssl"), `#!/bin/sh\n${script}\n`, { mode: 0o755 });
  return bin;
}

/** A bed with a certificate of --prod that is to be delivered. */
async function bedFor(actions: string, domains = NAME) {
  const bed = await testBed({ domains, settings: "keyTypes: ec\nari: no", actions });
  await bed.plant({ mode: "prod" });
  return bed;
}

test("an openssl that is missing or cannot be used is reported", async () => {
  await using bed = await bedFor(`[default]\nverify: ["127.0.0.1:1"]`);
  const libre = await withOpenssl(`echo ' -connect host:port Who to connect to' >&2; exit 1`);
  for (const [path, why] of [["/nowhere", /cannot find openssl/], [libre, /-sigalgs .*LibreSSL/]] as const) {
    const { code, stdout } = await bed.lemattBy(["env", `PATH=${path}`], "--prod", "--status", "--json");
    assert.equal(code, 1);
    assert.match(stdout, why);
  }
});

test("R17: at most 16 openssl run at once, however many sections are verified", async () => {
  await using server = await startHttps(directory, "ec");
  const names = Array.from({ length: 24 }, (_, i) => `n${i}.example.com`);
  const sections = [0, 6, 12, 18].map((from) => {
    const verify = names.slice(from, from + 6).map((name) => `127.0.0.1:${server.port}#${name}`);
    const texts = [`[from ${from}]`, "domains: n0.example.com", 'update: ["true"]', "verifyWait: 0"];
    return [...texts, `verify: ${JSON.stringify(verify)}\n`].join("\n");
  });
  await using bed = await bedFor(sections.join(""), names.join(" "));
  const running = await Deno.makeTempDir({ dir: directory });
  const bin = await withOpenssl(`test "$2" = -help && exec ${which("openssl")} "$@"
mkdir ${running}/$$; ls ${running} | wc -l >> ${running}.log; sleep 0.3
${which("openssl")} "$@"; status=$?; rmdir ${running}/$$; exit $status`);
  await bed.lemattBy(["env", `PATH=${bin}:${Deno.env.get("PATH")}`], "--prod");
  const most = Math.max(...(await Deno.readTextFile(`${running}.log`)).trim().split("\n").map(Number));
  assert(most > 4 && most <= 16, `${most} at once`);
}, lackOf("nginx"));

test("the certificate of slapd is seen through StartTLS of LDAP", async () => {
  const port = freePort();
  const files = `TLSCertificateFile ${directory}/rsa.pem\nTLSCertificateKeyFile ${directory}/rsa.key\n`;
  await Deno.writeTextFile(join(directory, "slapd.conf"), `${files}pidfile ${directory}/slapd.pid\n`);
  const args = `-d 0 -f ${directory}/slapd.conf -h ldap://127.0.0.1:${port}`.split(" ");
  await using _ = await startServer(which("slapd")!, args, port);
  const closes = "127.0.0.1 ec unreachable closes the connection in the handshake";
  assert.deepEqual(await see({ port, starttls: "ldap" }), ["127.0.0.1 rsa served rsa", closes]);
}, lackOf("slapd"));
