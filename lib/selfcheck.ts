/**
 * Self-checks of challenges, before the CA is asked (RFC 8555 §8.3, §8.4): a file of http-01 is fetched as Let's
 * Encrypt fetches it, TXT records are looked up at the name servers of their zone. Each check ends when its signal
 * aborts.
 */

import http from "node:http";
import { BlockList, connect } from "node:net";
import { connect as connectTls } from "node:tls";
import { type Context, type Destination, isUnrouted, within } from "./context.ts";
import { isIP, oneLine } from "./names.ts";

/** `fault`: why the CA would not find the challenge; `note`: what could not be checked completely. */
export interface CheckResult {
  readonly fault?: string;
  readonly note?: string;
}

/** For each host and address family. */
const MOST_ADDRESSES = 4;
/** For each zone; the root has 13. */
const MOST_NAME_SERVERS = 13;

// ---- files -------------------------------------------------------------------------------------------------------

/** https://letsencrypt.org/docs/challenge-types/#http-01-challenge */
const MOST_REDIRECTS = 10;
const PORTS: Readonly<Record<string, number>> = { "http:": 80, "https:": 443 };
/** In one check; 8 addresses that redirect to https and then to 8 others need 24. */
const MOST_REQUESTS = 50;
const LONGEST_BODY = 4096;
/** A router may not let this host connect to its own public address. */
const NAT_HINT = "if only this host cannot connect there (NAT without hairpin), set preflight: warn";

/**
 * Private networks, link-local networks, and this host (RFC 6890). A name in the Internet must not redirect the check
 * to a nearer network, where a request could do harm.
 */
const NEARNESS = [
  ["10.0.0.0/8", "100.64.0.0/10", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"],
  ["169.254.0.0/16", "fe80::/10", "224.0.0.0/4", "ff00::/8"],
  ["0.0.0.0/8", "127.0.0.0/8", "::/127"],
].map((networks) => {
  const list = new BlockList();
  for (const network of networks) {
    const [address, bits] = network.split("/") as [string, string];
    list.addSubnet(address, Number(bits), isIP(address) === 6 ? "ipv6" : "ipv4");
  }
  return list;
});

/** 0 for an address in the Internet, 1 to 3 for those of NEARNESS. */
function nearness(address: string): number {
  return 1 + NEARNESS.findLastIndex((list) => list.check(address, isIP(address) === 6 ? "ipv6" : "ipv4"));
}

interface Answer {
  readonly status: number;
  readonly location?: string;
  readonly body: string;
}

/**
 * Checks that `url` serves `expected` at every address of its host, and of the hosts to which it redirects, since the
 * CA uses any of them. Addresses without a route from this host are skipped.
 */
export async function checkFile(
  url: string,
  expected: string,
  context: Context,
  signal: AbortSignal,
): Promise<CheckResult> {
  const { fault, seen } = await new FileCheck(url, expected, context, signal).check();
  if (fault !== undefined) return { fault };
  if (!seen) return { note: `not checked: this host has no route to ${new URL(url).hostname}` };
  return {};
}

/** `seen`: at least one address answered. */
interface Page {
  readonly fault?: string;
  readonly seen: boolean;
}

class FileCheck {
  readonly #start: URL;
  /** By "<number of redirects> <URL>". */
  readonly #pages = new Map<string, Promise<Page>>();
  #requests = 0;
  /** The least nearness of all addresses of the name that is validated. */
  #nearness = 0;

  constructor(
    url: string,
    private readonly expected: string,
    private readonly context: Context,
    private readonly signal: AbortSignal,
  ) {
    this.#start = new URL(url);
  }

  check(): Promise<Page> {
    return this.#page(this.#start, 0);
  }

  /** Fetches a page once, even if several addresses redirect to it. `from`: which page redirects. */
  #page(url: URL, redirects: number, from = ""): Promise<Page> {
    const key = `${redirects} ${url.href}`;
    const page = this.#pages.get(key) ?? this.#atAllAddresses(url, redirects, from);
    this.#pages.set(key, page);
    return page;
  }

  async #atAllAddresses(url: URL, redirects: number, from: string): Promise<Page> {
    const { hostname, protocol, port } = url;
    let found: readonly Destination[];
    try {
      const route = this.context.route(bare(hostname), Number(port || PORTS[protocol]));
      found = await within(this.signal, route);
      if (found.length === 0) throw new Error("none");
    } catch {
      const why = this.signal.aborted ? "could not be looked up in time" : "has no address";
      return bad(
        redirects === 0 ? `${hostname} ${why}` : `${from} redirects to ${url.href}, but ${hostname} ${why}`,
      );
    }
    const distances = found.map(({ address }) => nearness(address));
    if (redirects === 0) this.#nearness = Math.min(...distances);
    const near = found[distances.findIndex((distance) => distance > this.#nearness)];
    if (near !== undefined && !this.#isHarmless(url)) {
      return bad(`${from} redirects to ${url.href}, which is at ${near.address}: not followed`);
    }
    const chosen = [4, 6].flatMap((family) =>
      found.filter(({ address }) => isIP(address) === family).slice(0, MOST_ADDRESSES)
    );
    const pages = await Promise.all(
      chosen.map((destination) => this.#atAddress(url, destination, redirects)),
    );
    return pages.find(({ fault }) => fault !== undefined) ?? { seen: pages.some(({ seen }) => seen) };
  }

  /**
   * Whether a redirect to a nearer network is followed: to a name (/etc/hosts may have this host's own at 127.0.1.1),
   * for the challenge itself, so that nobody chooses what is requested there. CAs do not follow redirects to addresses.
   */
  #isHarmless({ hostname, pathname, search }: URL): boolean {
    return isIP(bare(hostname)) === 0 && hostname.includes(".") &&
      pathname === this.#start.pathname && search === "";
  }

  async #atAddress(url: URL, { address, port }: Destination, redirects: number): Promise<Page> {
    const at = `${url.href} at ${address}`;
    if (++this.#requests > MOST_REQUESTS) {
      return bad(`${at}: more than ${MOST_REQUESTS} requests in one check`);
    }
    let answer: Answer;
    try {
      answer = await get(url, address, port, this.signal);
    } catch (error) {
      if (await isUnrouted(address, error)) return { seen: false };
      const { message, syscall } = error as Error & { syscall?: string };
      if (this.signal.aborted) return bad(`${at}: no answer in time; ${NAT_HINT}`);
      return bad(`${at}: ${oneLine(message)}${syscall === "connect" ? `; ${NAT_HINT}` : ""}`);
    }
    const { status, location, body } = answer;
    if (location === undefined) {
      if (status === 200 && body.trimEnd() === this.expected) return { seen: true };
      return bad(`${at} answered ${status}${status === 200 ? " with something else" : ""}`);
    }
    if (redirects === MOST_REDIRECTS) {
      return bad(`${this.#start.href}: more than ${MOST_REDIRECTS} redirects`);
    }
    const target = URL.parse(location, url);
    if (target === null || !(target.protocol in PORTS) || !["", "80", "443"].includes(target.port)) {
      return bad(`${at} redirects to ${oneLine(location)}, where the CA does not follow`);
    }
    return await this.#page(target, redirects + 1, at);
  }
}

function bad(fault: string): Page {
  return { fault, seen: true };
}

function get(url: URL, address: string, port: number, signal: AbortSignal): Promise<Answer> {
  const name = bare(url.hostname);
  const dial = () =>
    url.protocol === "http:" ? connect(port, address) : connectTls({
      host: address,
      port,
      servername: isIP(name) ? "" : name,
      ALPNProtocols: ["http/1.1"],
      rejectUnauthorized: false, // only the content matters, and the first certificate is still missing
      ca: [], // or the system's would be read, without need and permission
    });
  const options = {
    createConnection: dial,
    path: url.pathname + url.search,
    headers: { host: url.host, "user-agent": "lematt preflight", connection: "close" },
    signal,
  };
  return new Promise((resolve, reject) => {
    const sent = http.get(options, (response) => {
      const status = response.statusCode ?? 0;
      const location = status >= 300 && status < 400 ? response.headers.location : undefined;
      let body = "";
      response.on("error", reject);
      response.on("close", () => resolve({ status, location, body }));
      if (location !== undefined) return void response.destroy(); // the body of a redirect is not needed
      response.setEncoding("utf8");
      response.on("data", (chunk: string) => {
        body += chunk;
        if (body.length > LONGEST_BODY) response.destroy(new Error(`more than ${LONGEST_BODY} bytes`));
      });
    });
    sent.on("error", reject);
  });
}

/** The host of a URL without the brackets of an IPv6 address. */
function bare(hostname: string): string {
  return hostname.startsWith("[") ? hostname.slice(1, -1) : hostname;
}

// ---- TXT records -------------------------------------------------------------------------------------------------

/** A delegation by CNAME has one or two steps; more are a loop. */
const MOST_ALIASES = 8;
/** The default of resolvers: resolv.conf(5). */
const SERVER_TIMEOUT_MS = 5_000;

/** The TXT records of a name at each server that answered. */
export class Records {
  constructor(
    /** After CNAMEs. */
    readonly name: string,
    readonly answers: readonly { readonly server: string; readonly texts: readonly string[] }[],
    /** Why the name servers of the zone did not answer. */
    readonly note?: string,
  ) {}

  /** A server without a `wanted` record, as a message. */
  fault(wanted: (text: string) => boolean): string | undefined {
    const without = this.answers.find(({ texts }) => !texts.some(wanted));
    if (without === undefined) return undefined;
    const what = without.texts.length === 0 ? "no TXT record" : "other TXT records";
    const why = this.note === undefined ? "" : `${this.note}, and `;
    return oneLine(`${why}${without.server} has ${what} at ${this.name}`);
  }
}

/** Looks up the TXT records at a name; `judge` returns their fault. */
export async function checkRecords(
  name: string,
  judge: (records: Records) => string | undefined,
  context: Context,
  signal: AbortSignal,
): Promise<CheckResult> {
  let records: Records;
  try {
    records = await findRecords(name, context, signal);
  } catch (error) {
    const why = signal.aborted ? "no answer in time" : oneLine((error as Error).message);
    return { fault: `cannot look up ${name}: ${why}` };
  }
  return { fault: judge(records), note: records.note };
}

/**
 * Asks every name server of the zone. Those that are lame or do not answer are skipped, as a resolver does; if all are,
 * the system's resolver is asked. Throws if that does not answer either.
 */
async function findRecords(name: string, context: Context, signal: AbortSignal): Promise<Records> {
  const query: Context["query"] = (name, type) =>
    within(signal, context.query(name, type, undefined, signal));
  const target = await aliasOf(name, query);
  const { zone, servers } = await zoneOf(target, query);
  const asked = await Promise.all(
    servers.slice(0, MOST_NAME_SERVERS).map(async (server) => {
      try {
        return [{ server, texts: await textsAt(server, zone, target, context, signal) }];
      } catch {
        return [];
      }
    }),
  );
  const answers = asked.flat();
  if (answers.length > 0) return new Records(target, answers);
  const note = servers.length === 0
    ? `${target} is in no zone that has name servers`
    : `no name server of ${zone} answers for it (${oneLine(servers.join(", "))})`;
  const texts = await query(target, "TXT");
  return new Records(target, [{ server: "the system's resolver", texts }], note);
}

/** The TXT records of a name at one server of its zone, from the first address that answers. Throws if none does. */
async function textsAt(
  server: string,
  zone: string,
  name: string,
  { query }: Context,
  signal: AbortSignal,
): Promise<string[]> {
  const deadline = AbortSignal.any([signal, AbortSignal.timeout(SERVER_TIMEOUT_MS)]);
  const addresses = await Promise.all(
    (["A", "AAAA"] as const).map(async (type) => {
      const found = await within(deadline, query(server, type, undefined, deadline)).catch(() => []);
      return found.slice(0, MOST_ADDRESSES);
    }),
  );
  return await Promise.any(
    addresses.flat().map(async (address) => {
      const at = { address, port: 53 };
      const ask = (name: string, type: "SOA" | "TXT") => within(deadline, query(name, type, at, deadline));
      const [soa, texts] = await Promise.all([ask(zone, "SOA"), ask(name, "TXT")]);
      // REFUSED, SERVFAIL (an expired zone), NOTIMP and NXDOMAIN look the same here; a server of the zone has its SOA
      if (soa.length === 0 && texts.length === 0) throw new Error("lame");
      return texts;
    }),
  );
}

/** The target of a name after CNAMEs (RFC 1034 §3.6.2), or the name itself. */
async function aliasOf(name: string, query: Context["query"]): Promise<string> {
  let target = name;
  for (let step = 0; step < MOST_ALIASES; step++) {
    const [next] = await query(target, "CNAME");
    if (next === undefined) return target;
    target = next.replace(/\.$/, "");
  }
  throw new Error(`more than ${MOST_ALIASES} CNAMEs in a row`);
}

/** The closest zone of a name, with its name servers. */
async function zoneOf(
  name: string,
  query: Context["query"],
): Promise<{ zone: string; servers: readonly string[] }> {
  for (let zone = name; zone.includes("."); zone = zone.slice(zone.indexOf(".") + 1)) {
    const servers = await query(zone, "NS");
    // an alias (such as www.example.com) is not a zone, but a resolver answers with the NS records of its target
    if (servers.length === 0 || (await query(zone, "CNAME")).length > 0) continue;
    return { zone, servers: servers.map((server) => server.replace(/\.$/, "")) };
  }
  return { zone: "", servers: [] };
}
