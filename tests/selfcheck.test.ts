/** Goal: a self-check fetches a file as a CA does, within limits, and its error names the hop that is wrong. */

import assert from "node:assert/strict";
import { type Route, systemContext } from "../lib/context.ts";
import { checkFile } from "../lib/selfcheck.ts";
import { listenerCertificate } from "./ca-x509.ts";
import { freePort } from "./tls.ts";

const PATH = "/.well-known/acme-challenge/token";
const EXPECTED = "token.thumbprint";
const URL_80 = `http://example.com${PATH}`;

type Handler = (request: Request) => Response;

const right: Handler = () => new Response(EXPECTED);
const redirect = (location: string, status = 302, body: string | null = null): Handler => () =>
  new Response(body, { status, headers: { location } });

/** The fault that one check of `url` finds; an empty text if there is none. */
async function faultOf(route: Route, { url = URL_80, signal = AbortSignal.timeout(10_000) } = {}) {
  const unused = () => assert.fail("not asked for");
  const context = systemContext({ fetch: unused, userAgent: "", signal, warn: unused, route });
  const { fault = "", note } = await checkFile(url, EXPECTED, context, signal);
  assert.equal(note, undefined);
  return fault;
}

/** A web server on loopback. */
function serve(handler: Handler, options: Partial<Deno.TlsCertifiedKeyPem> & { hostname?: string } = {}) {
  const server = Deno.serve({ hostname: "127.0.0.1", port: 0, onListen: () => {}, ...options }, handler);
  return { port: server.addr.port, [Symbol.asyncDispose]: () => server.shutdown() };
}

/** Resolves every host to 127.0.0.1, with its ports 80 and 443 at these. */
const all = (http: number, https = 0): Route => (_host, port) =>
  Promise.resolve([{ address: "127.0.0.1", port: port === 80 ? http : https }]);

/** Resolves every host to these places. */
const at = (...places: (readonly [address: string, port: number])[]): Route => () =>
  Promise.resolve(places.map(([address, port]) => ({ address, port })));

Deno.test("only the right answer passes; the error has the kind of answer, the URL and the address", async () => {
  const table: [body: string | null, status: number, fault: string][] = [
    [EXPECTED, 200, ""],
    [`${EXPECTED} \r\n\t`, 200, ""],
    [null, 301, "answered 301"],
    ["no", 404, "answered 404"],
    ["other.thumbprint", 200, "something else"],
    [EXPECTED + " ".repeat(10 << 20), 200, "more than 4096 bytes"],
  ];
  for (const [body, status, expected] of table) {
    await using web = serve(({ url, method }) => {
      assert.deepEqual([method, url], ["GET", URL_80]);
      return new Response(body, { status });
    });
    const fault = await faultOf(all(web.port));
    assert.equal(fault.startsWith(`${URL_80} at 127.0.0.1`), expected !== "", fault);
    assert(fault.includes(expected), fault);
  }
});

Deno.test("ten redirects of any kind are followed, also to https whatever the certificate, but not eleven", async () => {
  const { certificate, key } = await listenerCertificate(); // of an unknown CA, and for another name
  const counted: Handler = (request) => {
    const left = Number(new URL(request.url).pathname.slice(1));
    const location = `https://elsewhere.example/${left - 1}`;
    const status = [301, 302, 303, 307, 308][left % 5];
    return left > 0 ? redirect(location, status, "x".repeat(100_000))(request) : right(request);
  };
  await using web = serve(counted);
  await using secure = serve(counted, { cert: certificate, key });
  const route = all(web.port, secure.port);
  assert.equal(await faultOf(route, { url: "http://example.com/10" }), "");
  assert.match(await faultOf(route, { url: "http://example.com/11" }), /10 redirects/);
});

Deno.test("redirects are followed only where a CA follows them: http and https at their standard ports", async () => {
  const table: [location: string, asked?: string][] = [
    ["http://elsewhere.example:443/x", "elsewhere.example:443"],
    ["https://elsewhere.example:80/x", "elsewhere.example:80"],
    ["//[::1]/x", "::1:80"],
    ["http://elsewhere.example:8080/x"],
    ["ftp://elsewhere.example/x"],
    ["http://[nonsense/x"],
  ];
  for (const [location, asked] of table) {
    await using web = serve(redirect(location));
    const hosts: string[] = [];
    const fault = await faultOf((host, port) => {
      if (hosts.push(`${host}:${port}`) > 1) throw new Error("far enough");
      return all(web.port)(host, port);
    });
    assert.deepEqual(hosts, ["example.com:80", ...(asked ? [asked] : [])]);
    assert(fault.startsWith(`${URL_80} at 127.0.0.1 redirects to `), fault);
  }
});

Deno.test("S2: one deadline limits a check, however many silent addresses and redirects there are", async () => {
  using silent = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  await using web = serve(redirect(`https://example.com${PATH}`));
  const places = Array.from({ length: 4000 }, () => ["127.0.0.1", silent.addr.port] as const);
  for (const [route, connections] of [[all(web.port, silent.addr.port), 1], [at(...places), 4]] as const) {
    const stop = new AbortController();
    const checking = faultOf(route, { signal: stop.signal });
    const connected: Deno.Conn[] = [];
    while (connected.length < connections) connected.push(await silent.accept());
    stop.abort();
    assert.match(await checking, /no answer in time/);
    for (const connection of connected) connection.close();
  }
  const more = silent.accept();
  silent.close();
  await assert.rejects(more, "few addresses of a family are asked");
  const unanswered = await faultOf(() => new Promise(() => {}), { signal: AbortSignal.timeout(50) });
  assert.match(unanswered, /^example\.com .*in time$/);
});

Deno.test("every address must serve the challenge, as the CA may choose any; a common redirect target is fetched once", async () => {
  const six = `http://[2001:db8::7]${PATH}`;
  let count = 0;
  await using four = serve((request) => (count++, right(request)));
  await using other = serve(({ url }) => new Response(url === six ? EXPECTED : "default page"), {
    hostname: "::1",
  });
  await using web = serve(redirect(`http://central.example${PATH}`));
  const [v4, v6] = [["127.0.0.1", four.port], ["::1", other.port]] as const;
  assert.equal(await faultOf(at(v4, v6), { url: six }), "");
  assert.match(await faultOf(at(v4, v6)), /at ::1 answered 200/);
  const refused = await faultOf(at(v4, ["127.0.0.1", freePort()]));
  assert.match(refused, /^http:\S+ at 127\.0\.0\.1: .*refused.*; .*preflight: warn$/i);
  assert.match(await faultOf(() => Promise.reject(new Error("ENOTFOUND"))), /^example\.com has no address/);
  count = 0;
  const redirecting = at(["127.0.0.1", web.port], ["127.0.0.1", web.port]);
  assert.equal(await faultOf((...to) => (to[0] === "example.com" ? redirecting : at(v4))(...to)), "");
  assert.equal(count, 1);
  count = 0;
  await using maze = serve((request) => redirect(`/${++count}`)(request));
  const entrances = at(...Array.from({ length: 4 }, () => ["127.0.0.1", maze.port] as const));
  assert.match(await faultOf(entrances, { signal: AbortSignal.timeout(5000) }), /more than 50 requests/);
});
