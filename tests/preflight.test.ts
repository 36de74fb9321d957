/** Goal: a challenge is looked at as a CA looks at it, and what is wrong is told with the hop where it is wrong. */

import assert from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { fetchAsCa } from "../lib/preflight.ts";
import type { Route } from "../lib/context.ts";
import { until } from "./bed.ts";
import { certify, createAuthority } from "./ca-x509.ts";

const PATH = "/.well-known/acme-challenge/token";
const EXPECTED = "token.thumbprint";
const URL_80 = `http://example.com${PATH}`;

type Handler = (request: Request) => Response;

const right: Handler = () => new Response(EXPECTED);
const redirect = (location: string, status = 302): Handler => () =>
  new Response(null, { status, headers: { location } });

/** A web server on loopback; with `tls` under a certificate that nobody has reason to trust. */
function serve(handler: Handler, { hostname = "127.0.0.1", tls = false } = {}) {
  const server = Deno.serve({ hostname, port: 0, onListen: () => {}, ...(tls && selfSigned()) }, handler);
  return { port: server.addr.port, [Symbol.asyncDispose]: () => server.shutdown() };
}

function selfSigned() {
  const { privateKey, publicKey } = generateKeyPairSync("ec", { namedCurve: "P-256" });
  const notBefore = new Date(0);
  const identifiers = [{ type: "dns", value: "other.example" } as const];
  const contents = { publicKey, identifiers, notBefore, notAfter: new Date(1e12) }; // expired, and for another name
  return {
    cert: certify(contents, createAuthority("nobody")),
    key: privateKey.export({ format: "pem", type: "pkcs8" }).toString(),
  };
}

/** Every host at 127.0.0.1, its ports 80 and 443 at these. */
const all = (http: number, https = 0): Route => (_host, port) =>
  Promise.resolve([{ address: "127.0.0.1", port: port === 80 ? http : https }]);

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

Deno.test("the right answer is right, under the Host of the name, with or without space at its end", async () => {
  const seen: string[] = [];
  for (const space of ["", "\n", " \r\n\t"]) {
    await using web = serve((request) => {
      seen.push(`${request.method} ${request.headers.get("host")} ${new URL(request.url).pathname}`);
      return new Response(EXPECTED + space);
    });
    assert.equal(await fetchAsCa(URL_80, EXPECTED, all(web.port)), undefined);
  }
  assert.deepEqual(new Set(seen), new Set([`GET example.com ${PATH}`]));
});

for (
  const [what, handler, answered] of [
    ["404", () => new Response("no", { status: 404 }), "404"],
    ["500", () => new Response(EXPECTED, { status: 500 }), "500"],
    ["another 2xx", () => new Response(EXPECTED, { status: 201 }), "201"],
    ["another token's answer", () => new Response("other.thumbprint"), "200 with something else"],
    ["space before the answer", () => new Response(` ${EXPECTED}`), "200 with something else"],
    ["a page around the answer", () => new Response(`<p>${EXPECTED}</p>`), "200 with something else"],
    ["nothing", () => new Response(""), "200 with something else"],
    ["a redirect to nowhere", () => new Response(null, { status: 301 }), "301"],
  ] as [string, Handler, string][]
) {
  Deno.test(`${what} is told as what it is, with URL and address`, async () => {
    await using web = serve(handler);
    const fault = await fetchAsCa(URL_80, EXPECTED, all(web.port));
    assert.equal(fault, `${URL_80} at 127.0.0.1 answered ${answered}`);
  });
}

Deno.test("the right answer with ten megabytes of space behind it is too long", async () => {
  await using web = serve(() => new Response(EXPECTED + " ".repeat(10 << 20)));
  const fault = await fetchAsCa(URL_80, EXPECTED, all(web.port));
  assert.equal(fault, `${URL_80} at 127.0.0.1: more than 4096 bytes`);
});

// ---- redirects ---------------------------------------------------------------------------------------------------

/** Redirects as often as its path says, then answers. */
const countdown: Handler = ({ url }) => {
  const left = Number(new URL(url).pathname.slice(1));
  return left > 0 ? redirect(`/${left - 1}`)(new Request(url)) : new Response(EXPECTED);
};
for (
  const [count, fault] of [[1, undefined], [10, undefined], [
    11,
    "http://example.com/11: more than 10 redirects",
  ]] as const
) {
  Deno.test(`${count} redirects are ${fault === undefined ? "followed" : "too many"}`, async () => {
    await using web = serve(countdown);
    assert.equal(await fetchAsCa(`http://example.com/${count}`, EXPECTED, all(web.port)), fault);
  });
}

Deno.test("every kind of redirect is followed, to other hosts and to https, whatever the certificate there", async () => {
  for (const status of [301, 302, 303, 307, 308]) {
    await using web = serve(redirect(`https://elsewhere.example${PATH}`, status));
    await using secure = serve(
      ({ headers }) => new Response(headers.get("host") === "elsewhere.example" ? EXPECTED : ""),
      {
        tls: true,
      },
    );
    const asked: string[] = [];
    const fault = await fetchAsCa(URL_80, EXPECTED, (host, port) => {
      asked.push(`${host}:${port}`);
      return all(web.port, secure.port)(host, port);
    });
    assert.equal(fault, undefined);
    assert.deepEqual(asked, ["example.com:80", "elsewhere.example:443"]);
  }
});

for (
  const [location, asked] of [
    ["http://elsewhere.example:80/x", "elsewhere.example:80"],
    ["http://elsewhere.example:443/x", "elsewhere.example:443"],
    ["https://elsewhere.example:80/x", "elsewhere.example:80"],
    ["//elsewhere.example/x", "elsewhere.example:80"],
    ["http://[::1]/x", "::1:80"],
  ] as const
) {
  Deno.test(`a redirect to ${location} leads to ${asked}`, async () => {
    await using web = serve(redirect(location));
    const hosts: string[] = [];
    const fault = await fetchAsCa(URL_80, EXPECTED, (host, port) => {
      if (hosts.push(`${host}:${port}`) > 1) throw new Error("far enough");
      return all(web.port)(host, port);
    });
    assert.match(
      fault!,
      /^http:\/\/example\.com\S* at 127\.0\.0\.1 redirects to \S+, but \S+ has no address$/,
    );
    assert.deepEqual(hosts, ["example.com:80", asked]);
  });
}

for (
  const location of [
    "http://elsewhere.example:8080/x",
    "https://elsewhere.example:8443/x",
    "http://elsewhere.example:22/",
    "ftp://elsewhere.example/x",
    "file:///etc/passwd",
    "javascript:alert(1)",
    "http://[nonsense/x",
  ]
) {
  Deno.test(`a redirect to ${location} is not followed`, async () => {
    await using web = serve(redirect(location));
    const fault = await fetchAsCa(URL_80, EXPECTED, all(web.port));
    assert.equal(fault, `${URL_80} at 127.0.0.1 redirects to ${location}, where the CA does not follow`);
  });
}

Deno.test("a redirect's text cannot steer a terminal", async () => {
  const head = "HTTP/1.1 302 Found\r\nLocation: ftp://x/\x9b31m\xad\r\nContent-Length: 0\r\n\r\n";
  await using web = serveBytes(Uint8Array.from(head, (char) => char.charCodeAt(0)));
  const fault = await fetchAsCa(URL_80, EXPECTED, all(web.port));
  // deno-lint-ignore no-control-regex
  assert.doesNotMatch(fault!, /[\x00-\x1f\x7f-\x9f\xad]/);
  assert.match(fault!, / redirects to ftp:\/\/x\/.*, where the CA does not follow$/);
});

// ---- connections -------------------------------------------------------------------------------------------------

Deno.test("what cannot be reached, breaks off or is no HTTP is told with its reason", async () => {
  const closed = serve(right);
  await closed[Symbol.asyncDispose]();
  assert.match(
    (await fetchAsCa(URL_80, EXPECTED, all(closed.port)))!,
    /^http:\/\/example\.com\S* at 127\.0\.0\.1: .*(ECONNREFUSED|Connection refused)/,
  );
  for (
    const text of [
      "",
      "SSH-2.0-OpenSSH_9.2\r\n",
      "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ntoken.thu",
      `HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n${EXPECTED}`,
    ]
  ) {
    await using web = serveBytes(new TextEncoder().encode(text));
    const fault = await fetchAsCa(URL_80, EXPECTED, all(web.port));
    assert.match(fault ?? "", /^http:\/\/example\.com\S* at 127\.0\.0\.1: ./, JSON.stringify(text));
  }
});

Deno.test("a name without an address is told as that", async () => {
  const fault = await fetchAsCa(URL_80, EXPECTED, () => Promise.reject(new Error("ENOTFOUND")));
  assert.equal(fault, "example.com has no address");
});

Deno.test("a look at a silent server ends with the signal, by http and by https", async () => {
  await using silent = serveBytes();
  await using web = serve(redirect(`https://example.com${PATH}`));
  for (const [route, at] of [[all(silent.port), "http:"], [all(web.port, silent.port), "https:"]] as const) {
    const before = silent.connected.length;
    const stop = new AbortController();
    const looking = fetchAsCa(URL_80, EXPECTED, route, stop.signal);
    await until("connected", () => silent.connected.length > before);
    const begun = Date.now();
    stop.abort();
    assert((await looking)!.startsWith(`${at}//example.com${PATH} at 127.0.0.1: `));
    assert(Date.now() - begun < 2000);
  }
});

Deno.test("IPv4 and IPv6 must both show the challenge, since the CA may choose either", async () => {
  await using four = serve(right);
  await using six = serve(right, { hostname: "::1" });
  await using wrong = serve(() => new Response("default page"), { hostname: "::1" });
  const closed = serve(right, { hostname: "::1" });
  await closed[Symbol.asyncDispose]();
  const at = (...places: [string, number][]): Route => () =>
    Promise.resolve(places.map(([address, port]) => ({ address, port })));
  for (
    const [places, fault] of [
      [[["127.0.0.1", four.port], ["::1", six.port]], undefined],
      [[["::1", six.port]], undefined],
      [[["127.0.0.1", closed.port], ["127.0.0.1", four.port]], undefined],
      [[["127.0.0.1", four.port], ["::1", wrong.port]], /at ::1 answered 200 with something else$/],
      [[["::1", wrong.port], ["127.0.0.1", four.port]], /at ::1 answered 200 with something else$/],
      [[["127.0.0.1", four.port], ["::1", closed.port]], /at ::1: .*refused/i],
      [[["127.0.0.1", closed.port], ["::1", six.port]], /at 127\.0\.0\.1: .*refused/i],
      [
        [["127.0.0.1", four.port], ["::1", closed.port], ["::1", wrong.port]],
        /at ::1, ::1 answered 200 with/,
      ],
    ] as [[string, number][], RegExp | undefined][]
  ) {
    const found = await fetchAsCa(URL_80, EXPECTED, at(...places));
    if (fault === undefined) assert.equal(found, undefined);
    else assert.match(found ?? "", fault);
  }
});

Deno.test("an IPv6 address is looked for under its own name", async () => {
  let host: string | null = null;
  await using web = serve((request) => {
    host = request.headers.get("host");
    return new Response(EXPECTED);
  }, { hostname: "::1" });
  const route: Route = (host, port) => {
    assert.deepEqual([host, port], ["2001:db8::7", 80]);
    return Promise.resolve([{ address: "::1", port: web.port }]);
  };
  assert.equal(await fetchAsCa(`http://[2001:db8::7]${PATH}`, EXPECTED, route), undefined);
  assert.equal(host, "[2001:db8::7]");
});
