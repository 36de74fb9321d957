/** leforward as a program, queried over raw sockets and ended in every way. Under sshd it is in remote.test.ts. */

import assert from "node:assert/strict";
import { limit, settled } from "../lib/context.ts";
import { together, until } from "./bed.ts";
import { textOf } from "./faults.ts";
import { missing as noStrace } from "./faults-strace.ts";
import {
  lackOf,
  LEFORWARD,
  output,
  startLeforward as start,
  startResets,
  temporaryDirectory,
} from "./programs.ts";
import { accepts } from "./tls.ts";

const test = together("leforward");

const TO = ["--baseurl", "http://c.example"];
const CHALLENGE = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
const GET = `GET ${CHALLENGE} HTTP/1.1\r\nHost: a.example\r\n\r\n`;
const CLOSE = "Content-Length: 0\r\nConnection: close\r\n\r\n";
const NOT_FOUND = `HTTP/1.1 404 Not Found\r\n${CLOSE}`;
const moved = (url: string) => `HTTP/1.1 301 Moved Permanently\r\nLocation: ${url}${CHALLENGE}\r\n${CLOSE}`;

const connect = (port: number, hostname = "127.0.0.1") => Deno.connect({ hostname, port });

/** Sends `request` in pieces and returns the whole answer. */
async function ask(port: number, request = GET, pieces = [request], hostname?: string): Promise<string> {
  using connection = await connect(port, hostname);
  connection.setNoDelay();
  for (const piece of pieces) await connection.write(Uint8Array.from(piece, (c) => c.charCodeAt(0)));
  return await new Response(connection.readable).text().catch(() => "");
}

test("leforward redirects a challenge by GET and HEAD, over IPv4 and IPv6, and nothing else", async () => {
  const url = "http://central.example.com:8080/le";
  await using server = await start(["--baseurl", `${url}/`]);
  const answers: Record<string, readonly string[]> = {
    [moved(url)]: [
      GET,
      `HEAD ${CHALLENGE} HTTP/1.0\r\n\r\n`,
      `GET ${CHALLENGE} HTTP/1.1\n\n`,
      `GET http://a.example${CHALLENGE} HTTP/1.1\r\nHost: a.example\r\n\r\n`,
      `GET ${CHALLENGE} HTTP/1.1\r\nX: ${"x".repeat(6000)}\r\n\r\n`,
    ],
    [NOT_FOUND]: [
      `POST ${CHALLENGE} HTTP/1.1\r\n\r\n`,
      `GET ${CHALLENGE} HTTP/2.0\r\n\r\n`,
      `GET ${CHALLENGE}/ HTTP/1.1\r\n\r\n`,
      `GET ${CHALLENGE}?a=b HTTP/1.1\r\n\r\n`,
      `GET ${CHALLENGE}\rSet-Cookie:x HTTP/1.1\r\n\r\n`,
      "GET /.well-known/acme-challenge/ HTTP/1.1\r\n\r\n",
      "\0\xff\n\n",
    ],
  };
  for (const [answer, requests] of Object.entries(answers)) {
    for (const request of requests) {
      assert.equal(await ask(server.port, request), answer, request.slice(0, 99));
    }
  }
  const since = performance.now();
  assert.equal(await ask(server.port, `GET ${CHALLENGE} HTTP/1.1\r\nHost: a.example\r\n`.repeat(300)), "");
  assert.ok(performance.now() - since < 4000, "a header without an end was read until it was too old");
  assert.equal(await ask(server.port, GET, [GET], "::1"), moved(url), "IPv6");
  assert.equal(await ask(server.port, GET, [...GET]), moved(url), "in pieces");
});

test("silent and slow connections do not delay others, are limited in number and closed after five seconds", async () => {
  await using server = await start(TO);
  const connections: Deno.Conn[] = [];
  const closedAt = new Map<number, number>();
  const since = performance.now();
  for (let n = 0; n < 1000; n++) {
    const connection = await connect(server.port);
    connections.push(connection);
    if (n % 2) await connection.write(new TextEncoder().encode(GET.slice(0, -4)));
    const end = () => closedAt.set(n, performance.now() - since);
    connection.read(new Uint8Array(1)).then(end, end);
  }
  assert.match(await ask(server.port), / 301 /);
  assert.ok(!closedAt.has(999), "the request was answered before the last one was closed");
  await until("all are closed", () => closedAt.size === 1000);
  assert.ok(closedAt.get(99)! < closedAt.get(101)! - 1000, "the oldest hundred are closed at once");
  assert.ok(closedAt.get(101)! > 4000, "the others are kept for their full time");
  for (const connection of connections) connection.close();
});

test("S1: connections that were reset before they were accepted do not delay others", async () => {
  await using server = await start(TO);
  await using _resets = await startResets(server.port, 1000);
  const since = performance.now();
  for (let n = 0; n < 50; n++) {
    assert.match(await ask(server.port), / 301 /);
    assert.ok(performance.now() - since < 20_000, `request ${n} had to wait`);
  }
}, lackOf("python3"));

test("without free file descriptors the oldest connection is closed", async () => {
  const by = ["/bin/sh", "-c", 'ulimit -n 64; exec "$@"', "sh", ...LEFORWARD];
  await using server = await start(TO, { by });
  const since = performance.now();
  const silent = await Promise.all(Array.from({ length: 100 }, () => connect(server.port)));
  assert.match(await ask(server.port), / 301 /);
  assert.ok(performance.now() - since < 5000, "answered before any connection was closed for its age");
  for (const connection of silent) connection.close();
});

/** Options, SSH_ORIGINAL_COMMAND, and what the message contains. */
const REFUSED: readonly (readonly [args: string, command: string | undefined, message: string])[] = [
  ["", undefined, "neither --baseurl nor SSH_ORIGINAL_COMMAND names a URL"],
  ["--baseurl=", "http://c.example", "--baseurl"],
  ["http://c.example", undefined, '"http://c.example"'],
  ["--url http://c.example", undefined, '"--url"'],
  ["--port 65536", "http://c.example", '--port "65536"'],
  ["--lifetime 36000", "http://c.example", "--lifetime"],
  ["--allow http://c.example", "http://c.example/x", "--allow does not name it"],
  ["--allow http://c.example", "http://c.example.evil.example", "--allow does not name it"],
  ...[
    ...[
      "http://user:secret@c.example",
      "http://c.example?x",
      "http://c.example/$(id)",
      "http://c.example id",
    ],
    ...["http://c.example/\r\nSet-Cookie: x", "http://[::1", "ftp://c.example", "http:\\\\c.example"],
  ].map((command) => ["", command, "not an http(s) URL without user, query and fragment"] as const),
];

test("leforward takes its URL from --baseurl, else from the one word of SSH_ORIGINAL_COMMAND, which --allow may limit", async () => {
  const inTurn = limit(4);
  await settled(REFUSED.map(([args, command, message]) =>
    inTurn(async () => {
      const env = command === undefined ? undefined : { SSH_ORIGINAL_COMMAND: command };
      const ended = await output([...LEFORWARD, ...args.split(" ").filter(Boolean)], { env });
      assert.deepEqual([ended.code, ended.stdout], [2, ""], `${args} ${command}: ${ended.stderr}`);
      assert.ok(ended.stderr.includes(message), ended.stderr);
      assert.match(ended.stderr, /^leforward: [ -~]+\n$/, "one line, nothing for the terminal to obey");
    })
  ));
  const redirects = [
    ["--allow=http://x.example --allow http://c.example/", "HTTP://C.example:80", "http://c.example"],
    ["--allow http://c.example/a", "http://c.example/a/", "http://c.example/a"],
    ["--baseurl https://c.example:8443", "http://d.example", "https://c.example:8443"],
    ["", "http://[2001:db8::1]:8080", "http://[2001:db8::1]:8080"],
  ] as const;
  for (const [args, command, url] of redirects) {
    const by = ["/usr/bin/env", `SSH_ORIGINAL_COMMAND=${command}`, ...LEFORWARD];
    await using server = await start(args.split(" ").filter(Boolean), { by });
    assert.equal(await ask(server.port), moved(url), command);
  }
});

test("leforward waits for a port whose user is about to end", async () => {
  await using directory = await temporaryDirectory();
  const log = `${directory.path}/log`;
  const by = ["strace", "-f", "-e", "trace=bind", "-o", log, ...LEFORWARD];
  const user = Deno.listen({ hostname: "::", port: 0 });
  const { port } = user.addr;
  const waiting = start([...TO, "--port", `${port}`], { by });
  await until("it has tried to listen", () => textOf(log).includes("EADDRINUSE"));
  user.close();
  await using _server = await waiting;
  assert.equal(await ask(port), moved("http://c.example"));
}, noStrace);

test("a port that leforward cannot have is reported in one line", async () => {
  const failure = async (by: readonly string[], port: number) => {
    const command = [...by, ...LEFORWARD, ...TO, `--port=${port}`, "--lifetime=1"];
    const { code, stdout, stderr } = await output(command);
    if (stdout) return; // every user may use every port on this machine
    assert.match(stderr, /^leforward: cannot listen on port \d+ of "::": .*\n$/);
    assert.equal(code, 1);
    return stderr;
  };
  const unprivileged = Deno.uid() === 0 ? ["setpriv", "--bounding-set=-net_bind_service"] : [];
  assert.match(await failure(unprivileged, 1) ?? "cap_net_bind_service", /cap_net_bind_service/);
  await using first = await start(TO);
  assert.match((await failure([], first.port))!, /in use by another leforward/);
});

test("leforward ends on a signal, when its lifetime is over, and when its input is closed or its parent gone", async () => {
  type Server = Awaited<ReturnType<typeof start>>;
  const by = (signal: Deno.Signal) => ({ child }: Server) => child.kill(signal);
  // A shell gives a command in the background /dev/null as its input, which ends nothing.
  const shell = ["/bin/sh", "-c", '"$@" & wait', "sh", ...LEFORWARD];
  const ends: [why: string, status: number, end: (server: Server) => unknown, by?: readonly string[]][] = [
    ["SIGTERM", 0, by("SIGTERM")],
    ["SIGHUP", 0, by("SIGHUP")],
    ["its lifetime is over", 0, () => {}, [...LEFORWARD, "--lifetime", "0.05"]],
    ["its standard input is closed", 0, async ({ child }) => {
      const writer = child.stdin.getWriter();
      await writer.write(new Uint8Array(100_000)); // it is ignored
      await writer.close();
    }],
    ["its parent is gone", 128 + 9, async ({ child, port }) => { // the shell's status
      assert.match(await ask(port), / 301 /);
      child.kill("SIGKILL");
    }, [...shell, "--lifetime", "0"]],
  ];
  await settled(ends.map(async ([why, status, end, by]) => {
    await using server = await start(TO, { by });
    await end(server);
    await until(`${why}: its port is free`, async () => !await accepts(server.port));
    assert.equal(await server.stderr, `leforward: ended: ${why}\n`);
    assert.equal((await server.child.status).code, status);
  }));
});
