/**
 * leforward as a program: started by its first line, queried over raw sockets, ended in every way.
 * What an ssh session does to it is in remote.test.ts.
 */
import assert from "node:assert/strict";
import { setTimeout as delay } from "node:timers/promises";
import { limit, settled } from "../lib/context.ts";
import { until } from "./bed.ts";
import { LEFORWARD, output, startLeforward as start, startResets, temporaryDirectory } from "./programs.ts";
import { lackOf, together } from "./together.ts";

const test = together("leforward");

const TOKEN = "LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
const CHALLENGE = `/.well-known/acme-challenge/${TOKEN}`;

/** Runs leforward to its end. */
const ended = (args: string[], env: Record<string, string> = {}, by = LEFORWARD) =>
  output([...by, ...args], { env });

/** Sends `request` verbatim, one byte a character, and returns the whole answer. */
async function ask(port: number, request: string, hostname = "127.0.0.1"): Promise<string> {
  using connection = await Deno.connect({ hostname, port });
  await connection.write(Uint8Array.from(request, (c) => c.charCodeAt(0)));
  return await new Response(connection.readable).text().catch(() => "");
}

/** Waits until nothing listens on `port` any more. */
async function untilFree(port: number): Promise<void> {
  await until("its port is free", () => {
    try {
      Deno.listen({ hostname: "::", port }).close();
      return true;
    } catch {
      return false;
    }
  }, 4);
}

const moved = (location: string) =>
  `HTTP/1.1 301 Moved Permanently\r\nLocation: ${location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n`;
const NOT_FOUND = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

test("leforward redirects a challenge by GET and HEAD, over IPv4 and IPv6, and nothing else", async () => {
  await using server = await start(["--baseurl", "http://central.example.com:8080/le/"]);
  const location = `http://central.example.com:8080/le${CHALLENGE}`;
  for (
    const [request, answer] of [
      [`GET ${CHALLENGE} HTTP/1.1\r\nHost: a.example\r\n\r\n`, moved(location)],
      [`HEAD ${CHALLENGE} HTTP/1.1\r\nHost: a.example\r\n\r\n`, moved(location)],
      [`GET ${CHALLENGE} HTTP/1.0\r\n\r\n`, moved(location)],
      [`GET ${CHALLENGE} HTTP/1.1\n\n`, moved(location)],
      [`GET http://a.example${CHALLENGE} HTTP/1.1\r\nHost: a.example\r\n\r\n`, moved(location)],
      [`GET ${CHALLENGE} HTTP/1.1\r\nX: ${"x".repeat(6000)}\r\n\r\n`, moved(location)],
      [`POST ${CHALLENGE} HTTP/1.1\r\n\r\n`, NOT_FOUND],
      [`get ${CHALLENGE} HTTP/1.1\r\n\r\n`, NOT_FOUND],
      [`GET ${CHALLENGE}\r\n\r\n`, NOT_FOUND],
      [`GET ${CHALLENGE} HTTP/2.0\r\n\r\n`, NOT_FOUND],
      [`GET ${CHALLENGE}/ HTTP/1.1\r\n\r\n`, NOT_FOUND],
      [`GET ${CHALLENGE}?a=b HTTP/1.1\r\n\r\n`, NOT_FOUND],
      [`GET ${CHALLENGE}%0d%0aSet-Cookie:x HTTP/1.1\r\n\r\n`, NOT_FOUND],
      [`GET ${CHALLENGE}\rSet-Cookie:x HTTP/1.1\r\n\r\n`, NOT_FOUND],
      [`GET /${CHALLENGE} HTTP/1.1\r\n\r\n`, NOT_FOUND],
      ["GET /.well-known/acme-challenge/ HTTP/1.1\r\n\r\n", NOT_FOUND],
      ["GET /.well-known/acme-challenge/../x HTTP/1.1\r\n\r\n", NOT_FOUND],
      ["GET /.well-known/acme-challenge/caf\xe9 HTTP/1.1\r\n\r\n", NOT_FOUND],
      ["GET / HTTP/1.1\r\n\r\n", NOT_FOUND],
      ["\0\xff\n\n", NOT_FOUND],
      ["\r\n\r\n", NOT_FOUND],
      [`GET ${CHALLENGE} HTTP/1.1\r\nHost: a.example\r\n`.repeat(300), ""], // never ends its header
    ] as const
  ) assert.equal(await ask(server.port, request), answer, JSON.stringify(request.slice(0, 100)));
  const request = `GET ${CHALLENGE} HTTP/1.1\r\n\r\n`;
  assert.equal(await ask(server.port, request, "::1"), moved(location), "IPv6");
  using connection = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
  connection.setNoDelay();
  for (const piece of request) await connection.write(new TextEncoder().encode(piece));
  assert.equal(await new Response(connection.readable).text(), moved(location), "in pieces");
});

test("silent and slow connections do not delay others, are limited in number and closed after five seconds", async () => {
  await using server = await start(["--baseurl", "http://c.example"]);
  const since = performance.now();
  const ended: Promise<number>[] = [];
  const connections = [];
  for (let n = 0; n < 1000; n++) {
    const connection = await Deno.connect({ hostname: "127.0.0.1", port: server.port });
    connections.push(connection);
    if (n % 2) await connection.write(new TextEncoder().encode(`GET ${CHALLENGE} HTTP/1.1\r\n`));
    ended.push(connection.read(new Uint8Array(1)).catch(() => null).then(() => performance.now() - since));
  }
  const opened = performance.now() - since;
  const asked = performance.now();
  assert.match(await ask(server.port, `GET ${CHALLENGE} HTTP/1.1\r\n\r\n`), / 301 /);
  assert.ok(performance.now() - asked < 4000, "the next request had to wait");
  const ages = await Promise.all(ended);
  assert.ok(ages[99]! < opened + 4000, "the oldest hundred are closed at once");
  assert.ok(ages[101]! > 4000, "the others are kept for their full time");
  assert.ok(Math.max(...ages) < opened + 9000, "but not longer");
  for (const connection of connections) connection.close();
});

/** Sends 50 requests in a row, which must be answered without delay. */
async function answersAtOnce(port: number): Promise<void> {
  const since = performance.now();
  for (let n = 0; n < 50; n++) {
    assert.match(await ask(port, `GET ${CHALLENGE} HTTP/1.1\r\n\r\n`), / 301 /);
    assert.ok(performance.now() - since < 5000, `request ${n} had to wait`);
  }
}

test("connections that were reset before they were accepted do not delay others", async () => {
  await using server = await start(["--baseurl", "http://c.example"]);
  await using _resets = await startResets(server.port, 1000);
  await answersAtOnce(server.port);
}, lackOf("python3"));

test("without free file descriptors the oldest connection is closed", async () => {
  const by = ["/bin/sh", "-c", 'ulimit -n 64; exec "$@"', "sh", ...LEFORWARD];
  await using server = await start(["--baseurl", "http://c.example"], { by });
  const silent = await Promise.all(
    Array.from({ length: 100 }, () => Deno.connect({ hostname: "127.0.0.1", port: server.port })),
  );
  await answersAtOnce(server.port);
  for (const connection of silent) connection.close();
});

const URL_NEEDED = "neither --baseurl nor SSH_ORIGINAL_COMMAND names a URL";
const NO_URL = "not an http(s) URL without user, query and fragment";
const NOT_ALLOWED = "--allow does not name it";
/** What is refused, and the part of the message that names it. */
const REFUSED: readonly (readonly [args: string[], command: string | undefined, named: string])[] = [
  [[], undefined, URL_NEEDED],
  [[], "", URL_NEEDED],
  [["--baseurl"], undefined, "--baseurl"],
  [["--baseurl="], "http://c.example", "--baseurl"],
  [["http://c.example"], undefined, '"http://c.example"'],
  [["--url", "http://c.example"], undefined, '"--url"'],
  [["--baseurl", "http://c.example", "--port", "80x"], undefined, '--port "80x"'],
  [["--baseurl", "http://c.example", "--port", "65536"], undefined, "--port"],
  [["--baseurl", "http://c.example", "--port", "80.5"], undefined, '--port "80.5"'],
  [["--baseurl", "http://c.example", "--lifetime", "36000"], undefined, "--lifetime"],
  [["--baseurl", "http://c.example", "--lifetime", "-1"], undefined, "--lifetime"],
  [["--allow", "c.example"], "http://c.example", NO_URL],
  [["--allow", "http://c.example"], "http://d.example", NOT_ALLOWED],
  [["--allow", "http://c.example"], "http://c.example/x", NOT_ALLOWED],
  [["--allow", "http://c.example"], "http://c.example.evil.example", NOT_ALLOWED],
  [[], "http://user:secret@c.example", NO_URL],
  [[], "http://c.example?x", NO_URL],
  [[], "http://c.example/#", NO_URL],
  [[], "http://c.example/\r\nSet-Cookie: x", NO_URL],
  [[], "http://c.example/\x1b[31m", NO_URL],
  [[], "http:\\\\c.example", NO_URL],
  [[], "ftp://c.example", NO_URL],
  [[], "file:///etc/passwd", NO_URL],
  [[], "http:///x", NO_URL],
  [[], "http://[::1", NO_URL],
  [[], "http://c.example:99999", NO_URL],
  [[], "c.example", NO_URL],
  [[], "http://c.example http://d.example", NO_URL],
  [[], "--port 8080", NO_URL],
  [[], "http://c.example;id", NO_URL],
  [[], "http://c.example/$(id)", NO_URL],
  [[], "http://c.example/`id`", NO_URL],
];

test("leforward takes its URL from --baseurl, else from the one word of SSH_ORIGINAL_COMMAND", async () => {
  const inTurn = limit(4);
  await settled(REFUSED.map(([args, command, named]) =>
    inTurn(async () => {
      const env: Record<string, string> = command === undefined ? {} : { SSH_ORIGINAL_COMMAND: command };
      const { code, stdout, stderr } = await ended(args, env);
      assert.deepEqual([code, stdout], [2, ""], `${args} ${command}: ${stderr}`);
      assert.ok(stderr.includes(named), stderr);
      assert.match(stderr, /^leforward: [ -~]+\n$/, "one line, nothing for the terminal to obey");
    })
  ));
});

test("leforward redirects to the allowed URL in any spelling, and prefers --baseurl to SSH_ORIGINAL_COMMAND", async () => {
  for (
    const [args, command, location] of [
      [["--allow", "http://c.example/"], "HTTP://C.example:80", "http://c.example"],
      [
        ["--allow", "http://x.example", "--allow=http://c.example/a"],
        "http://c.example/a/",
        "http://c.example/a",
      ],
      [["--baseurl", "https://c.example:8443"], "http://d.example", "https://c.example:8443"],
      [[], "http://[2001:db8::1]:8080", "http://[2001:db8::1]:8080"],
    ] as const
  ) {
    await using server = await start([...args], {
      by: ["/usr/bin/env", `SSH_ORIGINAL_COMMAND=${command}`, ...LEFORWARD],
    });
    assert.equal(
      await ask(server.port, `GET ${CHALLENGE} HTTP/1.1\r\n\r\n`),
      moved(location + CHALLENGE),
      command,
    );
  }
});

test("a port that is in use is reported in one line", async () => {
  await using first = await start(["--baseurl", "http://c.example"]);
  const { code, stderr } = await ended(["--baseurl", "http://c.example", "--port", `${first.port}`]);
  assert.equal(code, 1);
  assert.match(stderr, /^leforward: cannot listen on port \d+ of "::": it is taken, .*another leforward\n$/);
});

test("leforward waits for a port whose user is about to end", async () => {
  await using first = await start(["--baseurl", "http://c.example"]);
  const second = start(["--baseurl", "http://d.example", "--port", `${first.port}`]);
  first.child.kill("SIGTERM");
  await using server = await second;
  assert.match(
    await ask(server.port, `GET ${CHALLENGE} HTTP/1.1\r\n\r\n`),
    /Location: http:\/\/d\.example\//,
  );
});

test("a port that needs a privilege is reported in one line with the remedies", async () => {
  const by = Deno.uid() === 0 ? ["setpriv", "--bounding-set=-net_bind_service", ...LEFORWARD] : LEFORWARD;
  const args = ["--baseurl", "http://c.example", "--port", "1", "--lifetime", "0.01"];
  const { code, stdout, stderr } = await ended(args, {}, by);
  if (stdout) return; // every user may use every port on this machine
  assert.equal(code, 1);
  assert.match(
    stderr,
    /^leforward: cannot listen on port 1 .*cap_net_bind_service; conf\/remote\/README\.md .*\n$/,
  );
});

test("leforward ends on a signal, when its lifetime is over, and when its standard input is closed", async () => {
  type Server = Awaited<ReturnType<typeof start>>;
  const by = (signal: Deno.Signal) => ({ child }: Server) => child.kill(signal);
  const ends: [why: string, end: (server: Server) => unknown, ...args: string[]][] = [
    ["SIGINT", by("SIGINT")],
    ["SIGTERM", by("SIGTERM")],
    ["SIGHUP", by("SIGHUP")],
    ["its lifetime is over", () => {}, "--lifetime", "0.01"],
    ["its standard input is closed", async ({ child }) => {
      const writer = child.stdin.getWriter();
      await writer.write(new Uint8Array(100_000)); // it is ignored
      await writer.close();
    }],
  ];
  await settled(ends.map(async ([why, end, ...args]) => {
    await using server = await start(["--baseurl", "http://c.example", ...args]);
    await end(server);
    await untilFree(server.port);
    assert.deepEqual([(await server.child.status).code, await server.stderr], [
      0,
      `leforward: ended: ${why}\n`,
    ]);
  }));
});

test("leforward ends when its parent has ended, but not because its input was never open", async () => {
  // A shell gives a command in the background /dev/null as its input.
  const by = ["/bin/sh", "-c", '"$@" & wait', "sh", ...LEFORWARD];
  await using server = await start(["--baseurl", "http://c.example", "--lifetime", "0"], { by }); // 0: without end
  await delay(500);
  assert.match(await ask(server.port, `GET ${CHALLENGE} HTTP/1.1\r\n\r\n`), / 301 /);
  server.child.kill("SIGKILL");
  await untilFree(server.port);
  assert.equal(await server.stderr, "leforward: ended: its parent is gone\n");
});

test("leforward works as a single copied file, started by its first line", async () => {
  await using home = await temporaryDirectory();
  const directory = home.path;
  await Deno.copyFile(LEFORWARD.at(-1)!, `${directory}/leforward.ts`);
  await Deno.chmod(`${directory}/leforward.ts`, 0o755);
  const by = [`${directory}/leforward.ts`];
  const help = await ended(["--help"], {}, by);
  assert.deepEqual([help.code, help.stdout.includes("--baseurl"), help.stderr], [0, true, ""]);
  await using server = await start(["--baseurl", "http://c.example"], { by });
  assert.match(await ask(server.port, `GET ${CHALLENGE} HTTP/1.1\r\n\r\n`), / 301 /);
});
