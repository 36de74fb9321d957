/** Goal: a self-check fetches a file as a CA does, within limits, and its error names the hop that is wrong. */

import assert from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { type Route, systemContext } from "../lib/context.ts";
import { checkFile } from "../lib/selfcheck.ts";
import { until } from "./bed.ts";
import { certify, createAuthority } from "./ca-x509.ts";
import { freePort } from "./tls.ts";

const PATH = "/.well-known/acme-challenge/token";
const EXPECTED = "token.thumbprint";
const URL_80 = `http://example.com${PATH}`;

type Handler = (request: Request) => Response;

const right: Handler = () => new Response(EXPECTED);
const redirect = (location: string, status = 302): Handler => () =>
  new Response(null, { status, headers: { location } });

/** One check of `url`. */
function check(route: Route, { url = URL_80, signal = AbortSignal.timeout(10_000) } = {}) {
  const unused = () => assert.fail("not asked for");
  const context = systemContext({ fetch: unused, userAgent: "", signal, warn: unused, route });
  return checkFile(url, EXPECTED, context, signal);
}

const faultOf = async (...args: Parameters<typeof check>) => (await check(...args)).fault;

/** A web server on loopback; with `tls` under a certificate that is expired and for another name. */
function serve(handler: Handler, { hostname = "127.0.0.1", tls = false } = {}) {
  const server = Deno.serve({ hostname, port: 0, onListen: () => {}, ...(tls && SELF_SIGNED) }, handler);
  return { port: server.addr.port, [Symbol.asyncDispose]: () => server.shutdown() };
}

const SELF_SIGNED = await (async () => {
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const contents = { publicKey, names: ["other.example"], notBefore: new Date(0), notAfter: new Date(1e12) };
  const key = privateKey.export({ format: "pem", type: "pkcs8" }).toString();
  return { cert: await certify(contents, createAuthority("unknown")), key };
})();

/** Resolves every host to 127.0.0.1, with its ports 80 and 443 at these. */
const all = (http: number, https = 0): Route => (_host, port) =>
  Promise.resolve([{ address: "127.0.0.1", port: port === 80 ? http : https }]);

/** Resolves every host to these places. */
const at = (...places: [address: string, port: number][]): Route => () =>
  Promise.resolve(places.map(([address, port]) => ({ address, port })));

/** Answers each connection with the same bytes and closes it; without any, stays silent until disposed of. */
function serveBytes(bytes?: Uint8Array<ArrayBuffer>) {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const open: Deno.TcpConn[] = [];
  const accepting = (async () => {
    for await (const connection of listener) {
      open.push(connection);
      if (bytes === undefined) continue;
      await connection.read(new Uint8Array(4096));
      await connection.write(bytes);
      connection.closeWrite();
    }
  })();
  return {
    port: listener.addr.port,
    connected: open,
    async [Symbol.asyncDispose]() {
      listener.close();
      await accepting;
      for (const connection of open) connection.close();
    },
  };
}

Deno.test("the right answer passes, requested with the name as Host, with or without white space at its end", async () => {
  const seen = new Set<string>();
  for (const space of ["", "\n", " \r\n\t"]) {
    await using web = serve((request) => {
      seen.add(`${request.method} ${request.headers.get("host")} ${new URL(request.url).pathname}`);
      return new Response(EXPECTED + space);
    });
    assert.deepEqual(await check(all(web.port)), {});
  }
  assert.deepEqual([...seen], [`GET example.com ${PATH}`]);
});

Deno.test("a wrong answer is reported with its kind, URL and address", async () => {
  const table: [Handler, expected: string][] = [
    [() => new Response("no", { status: 404 }), "404"],
    [() => new Response(EXPECTED, { status: 500 }), "500"],
    [() => new Response(EXPECTED, { status: 201 }), "201"],
    [() => new Response("other.thumbprint"), "something else"],
    [() => new Response(`<p>${EXPECTED}</p>`), "something else"],
    [() => new Response(null, { status: 301 }), "301"],
    [() => new Response(EXPECTED + " ".repeat(10 << 20)), "more than 4096 bytes"],
  ];
  for (const [handler, expected] of table) {
    await using web = serve(handler);
    const fault = await faultOf(all(web.port));
    assert(fault?.startsWith(`${URL_80} at 127.0.0.1`) && fault.includes(expected), fault);
  }
});

// ---- redirects ---------------------------------------------------------------------------------------------------

Deno.test("ten redirects are followed, but not eleven", async () => {
  await using web = serve((request) => {
    const left = Number(new URL(request.url).pathname.slice(1));
    return left > 0 ? redirect(`/${left - 1}`)(request) : right(request);
  });
  assert.equal(await faultOf(all(web.port), { url: "http://example.com/10" }), undefined);
  assert.match((await faultOf(all(web.port), { url: "http://example.com/11" }))!, /10 redirects/);
});

Deno.test("every kind of redirect is followed, to other hosts and to https, whatever its body and the certificate", async () => {
  for (const status of [301, 302, 303, 307, 308]) {
    const location = `https://elsewhere.example${PATH}`;
    await using web = serve(() => new Response("x".repeat(100_000), { status, headers: { location } }));
    const isElsewhere = ({ headers }: Request) => headers.get("host") === "elsewhere.example";
    await using secure = serve((request) => new Response(isElsewhere(request) ? EXPECTED : ""), {
      tls: true,
    });
    assert.equal(await faultOf(all(web.port, secure.port)), undefined);
  }
});

Deno.test("redirects are followed only where a CA follows them: http and https at their standard ports", async () => {
  const table: [location: string, asked?: string][] = [
    ["http://elsewhere.example:443/x", "elsewhere.example:443"],
    ["https://elsewhere.example:80/x", "elsewhere.example:80"],
    ["//elsewhere.example/x", "elsewhere.example:80"],
    ["http://[::1]/x", "::1:80"],
    ...["http://elsewhere.example:8080/x", "http://elsewhere.example:22/", "ftp://elsewhere.example/x"].map((
      one,
    ): [string] => [one]),
    ...["file:///etc/passwd", "http://[nonsense/x"].map((one): [string] => [one]),
  ];
  for (const [location, asked] of table) {
    await using web = serve(redirect(location));
    const hosts: string[] = [];
    const fault = await faultOf((host, port) => {
      if (hosts.push(`${host}:${port}`) > 1) throw new Error("far enough");
      return all(web.port)(host, port);
    });
    assert.deepEqual(hosts, ["example.com:80", ...(asked ? [asked] : [])]);
    assert(fault!.startsWith(`${URL_80} at 127.0.0.1 redirects to `), fault);
  }
});

// ---- connections -------------------------------------------------------------------------------------------------

Deno.test("a server that is unreachable, closes early or does not use HTTP is reported with the reason", async () => {
  const refused = await faultOf(all(freePort()));
  assert.match(refused!, /^http:\S+ at 127\.0\.0\.1: .*refused.*; .*preflight: warn$/i);
  const short = `HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n${EXPECTED}`;
  for (const text of ["", "SSH-2.0-OpenSSH_9.2\r\n", short]) {
    await using web = serveBytes(new TextEncoder().encode(text));
    assert.match(await faultOf(all(web.port)) ?? "", /^http:\S+ at 127\.0\.0\.1: ./, JSON.stringify(text));
  }
  assert.match(
    (await faultOf(() => Promise.reject(new Error("ENOTFOUND"))))!,
    /^example\.com has no address/,
  );
});

Deno.test("one deadline limits a check, however many silent addresses and redirects there are", async () => {
  await using silent = serveBytes();
  await using web = serve(redirect(`https://example.com${PATH}`));
  const places = Array.from({ length: 4000 }, (): [string, number] => ["127.0.0.1", silent.port]);
  for (const route of [all(silent.port), all(web.port, silent.port), at(...places)]) {
    const before = silent.connected.length;
    const stop = new AbortController();
    const checking = faultOf(route, { signal: stop.signal });
    await until("connected", () => silent.connected.length > before);
    const begun = Date.now();
    stop.abort();
    assert.match((await checking)!, /no answer in time/);
    assert(Date.now() - begun < 5000);
  }
  assert(silent.connected.length <= 6, "few addresses of a family are asked");
  const unanswered = await faultOf(() => new Promise(() => {}), { signal: AbortSignal.timeout(50) });
  assert.match(unanswered!, /^example\.com .*in time$/);
});

Deno.test("every address must serve the challenge, since the CA may choose any", async () => {
  await using four = serve(right);
  await using six = serve(right, { hostname: "::1" });
  await using wrong = serve(() => new Response("default page"), { hostname: "::1" });
  const [closed4, closed6] = [freePort(), freePort("::1")];
  const table: [[address: string, port: number][], fault: RegExp][] = [
    [[["127.0.0.1", four.port], ["::1", six.port]], /^$/],
    [[["::1", six.port]], /^$/],
    [[["127.0.0.1", four.port], ["127.0.0.1", closed4]], /at 127\.0\.0\.1: .*refused/i],
    [[["127.0.0.1", four.port], ["::1", wrong.port]], /at ::1 answered 200/],
    [[["::1", six.port], ["::1", wrong.port]], /at ::1 answered 200/],
    [[["127.0.0.1", four.port], ["::1", closed6]], /at ::1: .*refused/i],
  ];
  for (const [places, fault] of table) assert.match(await faultOf(at(...places)) ?? "", fault);
});

Deno.test("a URL to which several addresses redirect is fetched once", async () => {
  let count = 0;
  await using central = serve((request) => (count++, right(request)));
  await using web = serve(redirect(`http://central.example${PATH}`));
  const places = [1, 2, 3].map((): [string, number] => ["127.0.0.1", web.port]);
  const fault = await faultOf((host) =>
    host === "example.com" ? at(...places)(host, 80) : all(central.port)(host, 80)
  );
  assert.deepEqual([fault, count], [undefined, 1]);
});

Deno.test("the challenge of an IPv6 address is requested with the address as Host", async () => {
  const isRight = ({ headers }: Request) => headers.get("host") === "[2001:db8::7]";
  await using web = serve((request) => new Response(isRight(request) ? EXPECTED : ""), { hostname: "::1" });
  const route: Route = (host, port) => {
    assert.deepEqual([host, port], ["2001:db8::7", 80]);
    return at(["::1", web.port])(host, port);
  };
  assert.equal(await faultOf(route, { url: `http://[2001:db8::7]${PATH}` }), undefined);
});
