/**
 * Fetches an http-01 challenge as a CA does, to see whether the CA will find it.
 *
 * Follows redirects as Let's Encrypt does: at most ten, http and https, ports 80 and 443, certificates unverified. Each
 * address family under which the name is found must answer, since the CA may choose either. Sends no secret and
 * believes nothing but the expected content.
 */

import http from "node:http";
import { connect } from "node:net";
import { connect as connectTls } from "node:tls";
import type { Destination, Route } from "./context.ts";
import { isIP } from "./names.ts";
import { oneLine } from "./text.ts";

/** https://letsencrypt.org/docs/challenge-types/#http-01-challenge */
const MOST_REDIRECTS = 10;
const PORTS: Readonly<Record<string, number>> = { "http:": 80, "https:": 443 };
const HOP_TIMEOUT_MS = 10_000;
const LONGEST_BODY = 4096;

/** What one request was answered. */
interface Hop {
  readonly status: number;
  readonly location?: string;
  readonly body: string;
}

/**
 * Undefined where `url` shows `expected` under every family of its host's addresses, else which hop answered what.
 * `signal` ends the look, which is then a fault like another.
 */
export async function fetchAsCa(
  url: string,
  expected: string,
  route: Route,
  signal?: AbortSignal,
): Promise<string | undefined> {
  const { hostname } = new URL(url);
  let destinations: readonly Destination[];
  try {
    destinations = await route(bare(hostname), 80);
  } catch {
    return `${hostname} has no address`;
  }
  const families = [4, 6].map((family) => destinations.filter(({ address }) => isIP(address) === family));
  for (const family of families.filter(({ length }) => length > 0)) {
    const fault = await follow(new URL(url), expected, family, route, signal);
    // a host without IPv6 cannot look that way; the CA can, but this is no fault of the name's
    if (fault !== undefined && !(family !== families[0] && fault.includes("ENETUNREACH"))) return fault;
  }
}

async function follow(
  start: URL,
  expected: string,
  first: Destination[],
  route: Route,
  signal?: AbortSignal,
): Promise<string | undefined> {
  let url = start;
  let destinations: readonly Destination[] = first;
  for (let redirects = 0;; redirects++) {
    const at = `${url.href} at ${destinations.map(({ address }) => address).join(", ")}`;
    let hop: Hop;
    try {
      hop = await get(url, destinations, signal);
    } catch (error) {
      return `${at}: ${oneLine((error as Error).message)}`;
    }
    if (hop.location === undefined) {
      if (hop.status === 200 && hop.body.trimEnd() === expected) return undefined;
      return `${at} answered ${hop.status}${hop.status === 200 ? " with something else" : ""}`;
    }
    if (redirects === MOST_REDIRECTS) return `${start.href}: more than ${MOST_REDIRECTS} redirects`;
    const target = URL.canParse(hop.location, url) ? new URL(hop.location, url) : undefined;
    const port = PORTS[target?.protocol ?? ""];
    if (
      target === undefined || port === undefined || (target.port !== "" && ![80, 443].includes(+target.port))
    ) {
      return `${at} redirects to ${oneLine(hop.location)}, where the CA does not follow`;
    }
    try {
      destinations = await route(bare(target.hostname), Number(target.port || port));
    } catch {
      return `${at} redirects to ${target.href}, but ${target.hostname} has no address`;
    }
    url = target;
  }
}

/** One GET, of the first destination that can be connected to. */
async function get(url: URL, destinations: readonly Destination[], signal?: AbortSignal): Promise<Hop> {
  for (const [index, { address, port }] of destinations.entries()) {
    try {
      return await request(url, address, port, signal);
    } catch (error) {
      if (index === destinations.length - 1) throw error;
    }
  }
  throw new Error("no address");
}

function request(url: URL, address: string, port: number, signal?: AbortSignal): Promise<Hop> {
  const name = bare(url.hostname);
  const dial = () =>
    url.protocol === "http:" ? connect(port, address) : connectTls({
      host: address,
      port,
      servername: isIP(name) ? "" : name,
      ALPNProtocols: ["http/1.1"],
      rejectUnauthorized: false,
      ca: [], // the system's would be read, for which there is neither need nor permission
    });
  const options = {
    createConnection: dial,
    path: url.pathname + url.search,
    headers: { host: url.host, "user-agent": "lematt preflight", connection: "close" },
    signal: AbortSignal.any([AbortSignal.timeout(HOP_TIMEOUT_MS), ...(signal ? [signal] : [])]),
  };
  return new Promise((resolve, reject) => {
    const sent = http.get(options, (response) => {
      const status = response.statusCode ?? 0;
      const location = status >= 300 && status < 400 ? response.headers.location : undefined;
      let body = "";
      response.setEncoding("utf8");
      response.on("data", (chunk: string) => {
        body += chunk;
        if (body.length > LONGEST_BODY) response.destroy(new Error(`more than ${LONGEST_BODY} bytes`));
      });
      response.on("close", () => resolve({ status, location, body }));
      response.on("error", reject);
    });
    sent.on("error", reject);
  });
}

/** An IPv6 host without the brackets that it has in a URL. */
function bare(hostname: string): string {
  return hostname.startsWith("[") ? hostname.slice(1, -1) : hostname;
}
