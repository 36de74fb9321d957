/**
 * Goal: self-checks and probes see what others would, on a host that lacks an address family, whose redirects lead to itself,
 * and among name servers that are lame. Runs itself in a network namespace of its own, where all addresses are on this host.
 */

import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { join } from "node:path";
import { type Route, systemContext, systemQuery } from "../lib/context.ts";
import { probe } from "../lib/probe.ts";
import { checkFile, checkRecords, type Records } from "../lib/selfcheck.ts";
import { until } from "./bed.ts";
import { lackOf, output, temporaryDirectory } from "./programs.ts";

/** Set within the namespace, to a directory of its own. */
const DIRECTORY = Deno.env.get("LEMATT_NAMESPACE");

const HERE = "192.0.2.1 198.51.100.1 10.0.0.1 10.0.0.2 169.254.169.254 2001:db8::1 fd00::1".split(" ");
/** The system's resolver, and name servers by their behaviour. */
const SERVERS = ["resolver", "right", "empty", "refusing", "expired", "denying", "silent"];
const addressOf = (server: string) => `192.0.2.${53 + SERVERS.indexOf(server)}`;

const run = async (command: string, env = {}) => {
  const { code, stdout, stderr } = await output(["sh", "-c", command], { env });
  if (code !== 0) throw new Error(`${command}: ${stdout}${stderr}`);
  return stdout;
};

if (DIRECTORY === undefined) {
  const hasNamespaces = await run("unshare -rmn ip link set lo up").then(() => true, () => false);
  const lack = hasNamespaces ? lackOf("named") : "no network namespaces";
  Deno.test({
    name: `self-checks and probes in a network of their own${lack ? ` (${lack})` : ""}`,
    ignore: lack !== undefined,
    async fn() {
      await using directory = await temporaryDirectory();
      const resolv = join(directory.path, "resolv.conf");
      await Deno.writeTextFile(resolv, `nameserver ${addressOf("resolver")}\noptions edns0 no-aaaa\n`);
      const addresses = [...HERE, ...SERVERS.map(addressOf)];
      const setUp = `ip link set lo up && mount --bind ${resolv} /etc/resolv.conf &&
        for address in ${addresses.join(" ")}; do ip addr add $address dev lo || exit; done`;
      const test = `${Deno.execPath()} test -q --no-prompt -P=tests --no-check ${import.meta.filename}`;
      const env = { LEMATT_NAMESPACE: directory.path, NO_COLOR: "1" };
      const result = await run(`exec unshare -rmn sh -c '${setUp} && exec ${test}'`, env);
      assert.match(result, /\b3 passed \| 0 failed/);
    },
  });
} else {
  inNamespace(DIRECTORY);
}

const { signal } = new AbortController();
const unused = () => assert.fail("not asked for");
const CONTEXT = systemContext({ fetch: unused, userAgent: "", signal, warn: unused });

function inNamespace(directory: string) {
  const URL_80 = "http://example.com/.well-known/acme-challenge/token";

  /** Checks URL_80. Names resolve as the table says; every address answers, and example.com redirects to `location`. */
  async function check(table: Record<string, string[]>, location?: string) {
    let asked = 0;
    const server = Deno.serve({ hostname: "::", port: 80, onListen: () => {} }, ({ url }) => {
      asked++;
      if (location === undefined || url !== URL_80) return new Response("right");
      return new Response(null, { status: 302, headers: { location } });
    });
    const route: Route = (host, port) => Promise.resolve(table[host]!.map((address) => ({ address, port })));
    const verdict = await checkFile(URL_80, "right", { ...CONTEXT, route }, AbortSignal.timeout(5_000));
    await server.shutdown();
    return { ...verdict, asked };
  }

  Deno.test("S10: a redirect to a nearer network is followed only for the challenge itself, by a name", async () => {
    const { pathname } = new URL(URL_80);
    const table: [address: string, location: string, target: string, followed: boolean][] = [
      ["192.0.2.1", "http://central.example/latest/", "169.254.169.254", false],
      ["192.0.2.1", "http://central.example/", "10.0.0.1", false],
      ["192.0.2.1", "http://central.example/", "::ffff:127.0.0.1", false],
      ["2001:db8::1", "http://central.example/", "fd00::1", false],
      ["192.0.2.1 127.0.0.1", "http://central.example/", "127.0.0.1", false],
      ["192.0.2.1", `http://central.example${pathname}?x`, "127.0.0.1", false],
      ["192.0.2.1", `http://localhost${pathname}`, "127.0.0.1", false],
      ["192.0.2.1", `http://central.example${pathname}`, "127.0.0.1", true], // its own name, from /etc/hosts
      ["10.0.0.1", "http://central.example/", "10.0.0.2", true],
      ["192.0.2.1", "http://central.example/", "198.51.100.1", true],
    ];
    for (const [address, location, target, followed] of table) {
      const addresses = address.split(" ");
      const names = { "example.com": addresses, [new URL(location).hostname]: [target] };
      const { fault = "", asked } = await check(names, location);
      assert.equal(asked, addresses.length + Number(followed), location);
      assert.equal(/ redirects to .*: not followed$/.test(fault), !followed, fault);
      assert.equal(fault === "", followed, fault);
    }
  });

  /** What probes show at each address. */
  async function probed(...addresses: string[]) {
    const route: Route = (_, port) => Promise.resolve(addresses.map((address) => ({ address, port })));
    const endpoint = { text: "example.com", host: "example.com", port: 443 };
    return (await probe([{ endpoint, keyType: "ec" }], { ...CONTEXT, route })).map(({ kind }) => kind);
  }

  Deno.test("R11, C11: addresses that this host has no route to are skipped, whatever the reason", async () => {
    const table: [address: string, setUp: string][] = [
      ["203.0.113.1", "true"],
      ["2001:db8:1::1", "ip -6 route add unreachable 2001:db8:1::/48"],
      ["2001:db8:2::1", "ip -6 route add prohibit 2001:db8:2::/48"],
      ["2001:db8:3::1", "ip -6 route add blackhole 2001:db8:3::/48"],
      ["2001:db8:4::1", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"],
    ];
    // a host that is down is not skipped
    const down = "2001:db8:5::1";
    await run(`ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up
      ip -6 addr add 2001:db8:5::2/64 dev v0 nodad; ip -6 neigh add ${down} dev v0 nud failed`);
    assert.deepEqual(await probed("192.0.2.1", down), ["unreachable", "unreachable"]);
    for (const [address, setUp] of table) {
      await run(setUp);
      assert.deepEqual(await check({ "example.com": ["192.0.2.1", address] }), { asked: 1 });
      const only = await check({ "example.com": [address] });
      assert.deepEqual(only, { note: "not checked: this host has no route to example.com", asked: 0 });
      const kind = address.includes(":") ? "passed over" : "unreachable"; // other addresses of IPv4 are reached
      assert.deepEqual(await probed("192.0.2.1", address), ["unreachable", kind]);
      assert.deepEqual(await probed(address), ["unreachable"]);
    }
  });

  Deno.test("C9: name servers that are lame or silent are skipped; without any other the system's resolver is asked", async () => {
    const table: [servers: string, result: RegExp][] = [
      ["right refusing expired denying silent", /^\{\}$/],
      ["right empty", /^\{"fault":"empty\.1\.example has no TXT record at _acme-challenge\.1\.example"\}$/],
      ["refusing expired", /^\{"note":"no name server of 2\.example answers for it \(.*, .*\)"\}$/],
    ];
    const file = (name: string, text: string) => Deno.writeTextFile(join(directory, name), text);
    const denying = `zone "." { type primary; file "root"; };`;
    const zones = { resolver: "", right: "", empty: "", refusing: "", expired: "", denying };
    await file("root", `$TTL 1\n. SOA ns. hostmaster. 1 60 60 60 60\n. NS ns.\nns. A 192.0.2.1\n`);
    for (const [i, [servers]] of table.entries()) {
      const delegations = servers.split(" ").map((name) => `@ NS ${name}\n${name} A ${addressOf(name)}\n`);
      const records = `$TTL 1\n@ SOA ns hostmaster 1 60 60 60 60\n${delegations.join("")}`;
      await file(`right${i}`, `${records}_acme-challenge TXT "value"\n`);
      await file(`empty${i}`, records);
      const zone = (text: string) => `zone "${i}.example" { type ${text}; };`;
      zones.resolver = zones.right += zone(`primary; file "right${i}"`);
      zones.empty += zone(`primary; file "empty${i}"`);
      zones.expired += zone("secondary; primaries { 127.0.0.1 port 5; }");
    }
    const views = Object.entries(zones).map(([name, text]) =>
      `view "${name}" { match-destinations { ${addressOf(name)}; }; recursion no; ${text} };\n`
    );
    await file(
      "named.conf",
      `options { directory "${directory}"; pid-file none; session-keyfile none; dnssec-validation no;
         listen-on { ${Object.keys(zones).map(addressOf).join("; ")}; }; listen-on-v6 { none; }; };
       controls {};\n${views.join("")}`,
    );
    const args = ["-f", "-c", join(directory, "named.conf")];
    const bind = new Deno.Command("named", { args, stdout: "null", stderr: "inherit" }).spawn();
    let serves = false;
    const ask = () =>
      systemQuery("2.example", "SOA").then(({ length }) => serves = length > 0).catch(() => {});
    await until("BIND serves", () => (ask(), serves));
    const silent = createSocket("udp4").bind(53, addressOf("silent"));
    await once(silent, "listening");

    for (const [i, [servers, expected]] of table.entries()) {
      const judge = (records: Records) => records.fault((text) => text === "value");
      const signal = AbortSignal.timeout(10_000);
      const checked = await checkRecords(`_acme-challenge.${i}.example`, judge, CONTEXT, signal);
      assert.match(JSON.stringify(checked), expected, servers);
    }
    // with options in resolv.conf that Deno does not know
    assert.deepEqual(await systemQuery("right.0.example", "A"), [addressOf("right")]);
    silent.close();
    bind.kill();
    await bind.status;
  });
}
