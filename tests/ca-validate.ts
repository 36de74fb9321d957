/** How the test CA validates challenges (RFC 8555 §8), on loopback only. */
import { createHash } from "node:crypto";
import { isIP } from "node:net";
import type { Switches } from "./ca.ts";
import { refusal } from "./ca-wire.ts";

/** The challenge to validate. */
export interface Proof {
  readonly type: string;
  readonly name: string;
  readonly isWildcard: boolean;
  /** `<token>.<thumbprint>` (RFC 8555 §8.1). */
  readonly keyAuthorization: string;
  readonly account: string;
}

/** The issuer domain name, for dns-persist-01. */
export const ISSUER = "ca.example";
const TIMEOUT_MS = 10_000;
const MAX_REDIRECTS = 10; // as in Boulder

const unauthorized = (detail: string) => refusal(403, "unauthorized", detail);
const noConnection = (detail: string) => refusal(400, "connection", detail);

/** Throws the problem of the challenge if validation fails; `closing` aborts it. */
export async function validate(proof: Proof, switches: Switches, closing: AbortSignal): Promise<void> {
  const { type, name, keyAuthorization } = proof;
  if (type === "http-01") {
    const [token] = keyAuthorization.split(".");
    const url = `http://${isIP(name) === 6 ? `[${name}]` : name}/.well-known/acme-challenge/${token}`;
    const { found, at } = await fetchFile(new URL(url), switches, closing);
    if (found.trimEnd() === keyAuthorization) return;
    throw unauthorized(`${at} holds ${JSON.stringify(found.slice(0, 100))}`);
  }
  const record = `${type === "dns-01" ? "_acme-challenge" : "_validation-persist"}.${name}`;
  const nameServer = { ipAddr: "127.0.0.1", port: switches.dnsPort };
  const records = await Deno.resolveDns(`${record}.`, "TXT", { nameServer }).catch(() => []);
  const digest = createHash("sha256").update(keyAuthorization).digest("base64url");
  const proves = (value: string) => type === "dns-01" ? value === digest : isPersistent(value, proof);
  if (records.some((parts) => proves(parts.join("")))) return;
  throw unauthorized(`none of the ${records.length} TXT records at ${record} proves it`);
}

/** RFC 8555 §8.3: follows redirects. */
async function fetchFile(url: URL, switches: Switches, closing: AbortSignal) {
  using client = Deno.createHttpClient({ allowHost: true, poolMaxIdlePerHost: 0 });
  const signal = AbortSignal.any([closing, AbortSignal.timeout(TIMEOUT_MS)]);
  for (let redirects = 0; redirects <= MAX_REDIRECTS; redirects++) {
    const { hostname, port } = whereIs(url, switches);
    const at = `${hostname}: ${url}`;
    const init = { client, headers: { host: url.host }, redirect: "manual", signal } as const;
    const [{ status, headers }, found] = await fetch(`http://${hostname}:${port}${url.pathname}`, init)
      .then(async (response) => [response, await response.text()] as const)
      .catch((error) => {
        throw noConnection(`${hostname}: cannot fetch ${url}: ${error.message}`);
      });
    if (status === 200) return { found, at };
    const target = URL.parse(headers.get("location") ?? "", url);
    if (status < 300 || status >= 400 || target === null) throw unauthorized(`${at} answered ${status}`);
    if (target.protocol !== "http:") throw noConnection(`${url} redirects to ${target}`);
    url = target;
  }
  throw noConnection(`more than ${MAX_REDIRECTS} redirects, the last to ${url}`);
}

function whereIs({ hostname, port }: URL, { resolve, httpPort = 80 }: Switches) {
  if (/^127\.\d+\.\d+\.\d+$|^\[::1\]$/.test(hostname)) return { hostname, port: Number(port || 80) };
  try {
    const at = resolve?.(hostname) ?? { hostname: "127.0.0.1", port: httpPort };
    return port === "" ? at : { ...at, port };
  } catch (error) {
    throw refusal(400, "dns", `cannot look up ${hostname}: ${(error as Error).message}`);
  }
}

/** draft-ietf-acme-dns-persist: `ca.example; accounturi=https://…; policy=wildcard`. Pebble checks the syntax more strictly. */
function isPersistent(record: string, { account, isWildcard }: Proof): boolean {
  const [issuer, ...parameters] = record.split(";").map((part) => part.trim());
  const values = new Map(parameters.map((parameter) => {
    const [tag = "", value] = parameter.split("=").map((part) => part.trim());
    return [tag.toLowerCase(), value];
  }));
  return issuer === ISSUER && values.get("accounturi") === account &&
    (!isWildcard || values.get("policy")?.toLowerCase() === "wildcard");
}
