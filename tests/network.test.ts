/**
 * Goal: self-checks see what a CA would, on a host that lacks an address family, whose redirects lead to itself, and among
 * name servers that are lame. Runs itself in a network namespace of its own, where all addresses are on this host.
 */

import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { join } from "node:path";
import { type Context, type Route, systemContext, systemQuery } from "../lib/context.ts";
import { checkFile, checkRecords, type Records } from "../lib/selfcheck.ts";
import { until } from "./bed.ts";
import { output } from "./programs.ts";

/** Set within the namespace, to a directory of its own. */
const DIRECTORY = Deno.env.get("LEMATT_NAMESPACE");

const HERE = [
  "192.0.2.1",
  "198.51.100.1",
  "10.0.0.1",
  "10.0.0.2",
  "169.254.169.254",
  "2001:db8::1",
  "fd00::1",
];
/** The system's resolver, then the name servers. */
const RESOLVER = "127.0.0.53";
const SERVERS = {
  right: "192.0.2.53",
  alsoRight: "192.0.2.54",
  empty: "192.0.2.55",
  refusing: "192.0.2.56",
  expired: "192.0.2.57",
  denying: "192.0.2.58",
  silent: "192.0.2.59",
};

const run = async (command: string, env = {}) => {
  const { code, stdout, stderr } = await output(["sh", "-c", command], { env });
  if (code !== 0) throw new Error(`${command}: ${stdout}${stderr}`);
};

const has = (command: string) => run(command).then(() => true, () => false);

if (DIRECTORY === undefined) {
  const lack = !await has("unshare -rmn ip link set lo up")
    ? "no network namespaces"
    : !await has("command -v named")
    ? "no named (BIND)"
    : undefined;
  Deno.test({
    name: `self-checks in a network of their own${lack ? ` (${lack})` : ""}`,
    ignore: lack !== undefined,
    async fn() {
      const directory = await Deno.makeTempDir({ prefix: "lematt-network-" });
      const resolv = join(directory, "resolv.conf");
      await Deno.writeTextFile(resolv, `nameserver ${RESOLVER}\noptions edns0 no-aaaa\n`);
      const addresses = [...HERE, RESOLVER, ...Object.values(SERVERS)].map((address) =>
        `ip addr add ${address} dev lo`
      );
      const file = import.meta.filename!;
      await run(
        `exec unshare -rmn sh -c '
          ip link set lo up && ${addresses.join(" && ")} && mount --bind ${resolv} /etc/resolv.conf &&
          exec ${Deno.execPath()} test -q --no-prompt -P=tests --no-check ${file}'`,
        { LEMATT_NAMESPACE: directory, NO_COLOR: "1" },
      ).finally(() => Deno.remove(directory, { recursive: true }));
    },
  });
} else {
  inNamespace(DIRECTORY);
}

function context(changes: Partial<Context> = {}): Context {
  const unused = () => assert.fail("not asked for");
  const signal = new AbortController().signal;
  return systemContext({ fetch: unused, userAgent: "", signal, warn: unused, ...changes });
}

function inNamespace(directory: string) {
  const PATH = "/.well-known/acme-challenge/token";

  /** Checks http://example.com. Names resolve as the table says, and `handler` answers at every address. */
  async function check(table: Record<string, string[]>, handler: (request: Request) => Response) {
    const asked: string[] = [];
    const server = Deno.serve({ hostname: "::", port: 80, onListen: () => {} }, (request) => {
      asked.push(request.url);
      return handler(request);
    });
    const route: Route = (host, port) => Promise.resolve(table[host]!.map((address) => ({ address, port })));
    const verdict = await checkFile(
      `http://example.com${PATH}`,
      "right",
      context({ route }),
      AbortSignal.timeout(5_000),
    );
    await server.shutdown();
    return { ...verdict, asked };
  }
  const right = () => new Response("right");

  for (
    const [address, location, target, followed] of [
      ["192.0.2.1", "http://central.example/private", "127.0.0.1", false],
      ["192.0.2.1", "http://central.example/latest/", "169.254.169.254", false],
      ["192.0.2.1", "http://central.example/", "10.0.0.1", false],
      ["192.0.2.1", "http://central.example/", "::ffff:127.0.0.1", false],
      ["2001:db8::1", "http://central.example/", "fd00::1", false],
      ["10.0.0.1", "http://central.example/", "127.0.0.1", false],
      ["192.0.2.1 127.0.0.1", "http://central.example/", "127.0.0.1", false],
      ["192.0.2.1", `http://central.example${PATH}?x`, "127.0.0.1", false],
      ["192.0.2.1", `http://127.0.0.1${PATH}`, "127.0.0.1", false],
      ["192.0.2.1", `http://localhost${PATH}`, "127.0.0.1", false],
      ["192.0.2.1", `http://central.example${PATH}`, "127.0.0.1", true], // its own name, from /etc/hosts
      ["10.0.0.1", "http://central.example/", "10.0.0.2", true],
      ["127.0.0.1", "http://central.example/", "10.0.0.2", true],
      ["192.0.2.1", "http://central.example/", "198.51.100.1", true],
    ] as const
  ) {
    Deno.test(`${address} redirects to ${location} at ${target}: ${followed ? "followed" : "not followed"}`, async () => {
      const { hostname } = new URL(location);
      const { fault, asked } = await check(
        { "example.com": address.split(" "), [hostname]: [target] },
        (request) =>
          new URL(request.url).hostname === "example.com"
            ? new Response(null, { status: 302, headers: { location } })
            : right(),
      );
      assert.equal(asked.length, address.split(" ").length + (followed ? 1 : 0));
      if (followed) assert.equal(fault, undefined);
      else {assert.match(
          fault!,
          new RegExp(`^http://example.com${PATH} at ${address.split(" ")[0]} redirects to .*: not followed$`),
        );}
    });
  }

  const without = async (setup: string, undo: string, address = "2001:db8:1::1") => {
    await run(setup);
    try {
      const both = await check({ "example.com": ["192.0.2.1", address] }, right);
      assert.deepEqual([both.fault, both.note, both.asked.length], [undefined, undefined, 1]);
      const only = await check({ "example.com": [address] }, right);
      assert.equal(only.note, "not checked: this host has no route to example.com");
    } finally {
      await run(undo);
    }
  };
  for (const kind of ["unreachable", "prohibit", "blackhole"]) {
    const route = `-6 route KEY ${kind} 2001:db8:1::/48`;
    Deno.test(`IPv6 addresses behind a route that is "${kind}" are skipped`, () =>
      without(`ip ${route.replace("KEY", "add")}`, `ip ${route.replace("KEY", "del")}`));
  }
  Deno.test("addresses without a route are skipped", async () => {
    await without("true", "true");
    await without("true", "true", "203.0.113.1");
  });
  Deno.test("IPv6 addresses are skipped if IPv6 is disabled", () => {
    const disable = (value: number) => `echo ${value} > /proc/sys/net/ipv6/conf/all/disable_ipv6`;
    const again = HERE.filter((address) => address.includes(":")).map((address) =>
      `ip addr add ${address} dev lo`
    );
    return without(disable(1), [disable(0), ...again].join(" && "));
  });

  // ---- name servers ----------------------------------------------------------------------------------------------

  /** A BIND that is the resolver and all of SERVERS but the silent one; `servers` are those of example.com. */
  async function named(servers: readonly (keyof typeof SERVERS)[]) {
    const file = (name: string, text: string) => Deno.writeTextFile(join(directory, name), text);
    const head = "$TTL 1\n@ SOA ns hostmaster 1 60 60 60 60\n";
    const delegation = servers.map((name) => `@ NS ${name}\n${name} A ${SERVERS[name]}\n`).join("");
    const txt = `_acme-challenge TXT "value"\n`;
    await file("right", head + delegation + txt);
    await file("empty", head + delegation);
    await file("root", `$TTL 1\n. SOA ns. hostmaster. 1 60 60 60 60\n. NS ns.\nns. A 192.0.2.58\n`);
    const zone = (name: string, text: string) => `zone "${name}" { ${text} };`;
    const primary = (name: string) => zone("example.com", `type primary; file "${name}";`);
    const views: [string, string, string][] = [
      ["right", SERVERS.right, primary("right")],
      ["also-right", SERVERS.alsoRight, primary("right")],
      ["empty", SERVERS.empty, primary("empty")],
      ["refusing", SERVERS.refusing, ""],
      ["expired", SERVERS.expired, zone("example.com", "type secondary; primaries { 127.0.0.1 port 5; };")],
      ["denying", SERVERS.denying, zone(".", `type primary; file "root";`)],
      ["resolver", RESOLVER, primary("right")],
    ];
    const texts = views.map(([name, address, zones]) =>
      `view "${name}" { match-destinations { ${address}; }; recursion no; ${zones} };`
    );
    const listen = views.map(([, address]) => `${address};`).join(" ");
    await file(
      "named.conf",
      `options { directory "${directory}"; pid-file none; session-keyfile none; dnssec-validation no;
         listen-on { ${listen} }; listen-on-v6 { none; }; }; controls {};\n${texts.join("\n")}`,
    );
    const child = new Deno.Command("named", {
      args: ["-f", "-c", join(directory, "named.conf")],
      stdout: "null",
      stderr: "inherit",
    }).spawn();
    let serves = false;
    const at = { address: SERVERS.right, port: 53 };
    const ask = () =>
      systemQuery("example.com", "SOA", at).then(({ length }) => serves = length > 0, () => {});
    await until("BIND serves", () => (ask(), serves));
    const silent = createSocket("udp4").bind(53, SERVERS.silent);
    await once(silent, "listening");
    return {
      async [Symbol.asyncDispose]() {
        silent.close();
        child.kill();
        await child.status;
      },
    };
  }

  const lame = "no name server of example.com answers for it";
  for (
    const [servers, fault, note] of [
      [["right", "alsoRight"]],
      [["right", "refusing", "expired", "denying", "silent"]],
      [["right", "empty"], "empty.example.com has no TXT record at _acme-challenge.example.com"],
      [["refusing", "expired"], undefined, `${lame} (refusing.example.com, expired.example.com)`],
    ] as [(keyof typeof SERVERS)[], string?, string?][]
  ) {
    Deno.test(`a zone whose name servers are ${servers.join(", ")}: ${fault ?? note ?? "right"}`, async () => {
      await using _bind = await named(servers);
      const judge = (records: Records) => records.fault((text) => text === "value");
      const checked = await checkRecords(
        "_acme-challenge.example.com",
        judge,
        context(),
        AbortSignal.timeout(10_000),
      );
      if (note === undefined) assert.deepEqual(checked, { fault, note });
      else {assert.deepEqual(
          [checked.fault, checked.note?.split(", ").length],
          [undefined, 2],
          JSON.stringify(checked),
        );}
    });
  }

  Deno.test("options of resolv.conf that Deno does not know do not prevent look-ups", async () => {
    assert.match(Deno.readTextFileSync("/etc/resolv.conf"), /no-aaaa/);
    await using _bind = await named(["right"]);
    assert.deepEqual(await systemQuery("right.example.com", "A"), [SERVERS.right]);
  });
}
