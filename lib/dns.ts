/**
 * Looks at TXT records where a CA does: at the authoritative servers of their zone, behind any CNAME.
 *
 * RFC 8555 §8.4 (dns-01), RFC 1034 §3.6.2 (CNAME). Reads the DNS and changes nothing; an answer is compared and quoted,
 * never obeyed.
 */

import type { Query } from "./context.ts";
import { oneLine } from "./text.ts";

/** A delegation by CNAME has one step, two at the most; what is longer is a loop. */
const MOST_ALIASES = 8;

/**
 * Undefined where every authoritative server of `name` that answers has a TXT record that is `wanted`, else which of them
 * has not. One address of a server that answers right is enough; a CA passes over a server that is down, and so do we.
 */
export async function txtFault(
  name: string,
  wanted: (text: string) => boolean,
  query: Query,
): Promise<string | undefined> {
  try {
    const target = await aliasOf(name, query);
    const servers = await authoritativeServers(target, query);
    const looks = await Promise.all(
      servers.map(({ server, addresses }) => look(server, addresses, target, wanted, query)),
    );
    const answers = looks.filter(({ answered }) => answered);
    const fault = (answers.length > 0 ? answers : looks).find(({ fault }) => fault !== undefined)?.fault;
    return fault && oneLine(fault);
  } catch (error) {
    return `cannot look up ${name}: ${oneLine((error as Error).message)}`;
  }
}

/** What one server has at a name, and whether it answered at all. */
async function look(
  server: string,
  addresses: readonly string[],
  name: string,
  wanted: (text: string) => boolean,
  query: Query,
): Promise<{ answered: boolean; fault?: string }> {
  let answered = false;
  let fault = `${server} has no address`;
  for (const address of addresses) {
    try {
      const texts = await query(name, "TXT", { address, port: 53 });
      if (texts.some(wanted)) return { answered: true };
      answered = true;
      fault = `${server} has ${texts.length === 0 ? "no TXT record" : "other TXT records"} at ${name}`;
    } catch {
      if (!answered) fault = `${server} (${address}) does not answer`;
    }
  }
  return { answered, fault };
}

/** Where a name leads to by CNAME, itself where it leads nowhere. */
async function aliasOf(name: string, query: Query): Promise<string> {
  let target = name;
  for (let step = 0; step < MOST_ALIASES; step++) {
    const [next] = await query(target, "CNAME");
    if (next === undefined) return target;
    target = next.replace(/\.$/, "");
  }
  throw new Error(`more than ${MOST_ALIASES} CNAMEs in a row`);
}

/** The servers of the closest zone above a name, each with its addresses. */
async function authoritativeServers(
  name: string,
  query: Query,
): Promise<{ server: string; addresses: string[] }[]> {
  for (let zone = name; zone.includes("."); zone = zone.slice(zone.indexOf(".") + 1)) {
    const servers = await query(zone, "NS");
    // an alias (www.example.com, say) is no zone, though a resolver that is asked for NS answers with its target's
    if (servers.length === 0 || (await query(zone, "CNAME")).length > 0) continue;
    return await Promise.all(servers.map(async (entry) => {
      const server = entry.replace(/\.$/, "");
      const families = (["A", "AAAA"] as const).map((type) => query(server, type).catch(() => []));
      return { server, addresses: (await Promise.all(families)).flat() };
    }));
  }
  throw new Error("no name servers");
}
