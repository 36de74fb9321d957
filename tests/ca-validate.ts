/** How the test CA validates challenges (RFC 8555 §8), on loopback only. */
import { createHash } from "node:crypto";
import { isIP } from "node:net";
import type { Authorization, Challenge, Switches } from "./ca.ts";
import { refusal } from "./ca-wire.ts";

/** The issuer domain name, for dns-persist-01. */
export const ISSUER = "ca.example";
const TIMEOUT_MS = 10_000;
const MAX_REDIRECTS = 10; // as in Boulder

const unauthorized = (detail: string) => refusal(403, "unauthorized", detail);
const noConnection = (detail: string) => refusal(400, "connection", detail);

/** Throws the problem of the challenge if validation fails; `closing` aborts it. */
export async function validate(
  authorization: Authorization,
  { type, token }: Challenge,
  switches: Switches,
  closing: AbortSignal,
): Promise<void> {
  const name = authorization.identifier.value;
  const keyAuthorization = `${token}.${authorization.account.key.thumbprint}`;
  if (type === "http-01") {
    const url = `http://${isIP(name) === 6 ? `[${name}]` : name}/.well-known/acme-challenge/${token}`;
    const found = await fetchFile(new URL(url), switches, closing);
    if (found.trimEnd() === keyAuthorization) return;
    throw unauthorized(`${url} holds ${JSON.stringify(found.slice(0, 100))}`);
  }
  const record = `${type === "dns-01" ? "_acme-challenge" : "_validation-persist"}.${name}`;
  const nameServer = { ipAddr: "127.0.0.1", port: switches.dnsPort };
  const records = await Deno.resolveDns(`${record}.`, "TXT", { nameServer }).catch(() => []);
  const digest = createHash("sha256").update(keyAuthorization).digest("base64url");
  const proves = (value: string) => type === "dns-01" ? value === digest : isPersistent(value, authorization);
  if (records.some((parts) => proves(parts.join("")))) return;
  throw unauthorized(`none of the ${records.length} TXT records at ${record} proves it`);
}

/** RFC 8555 §8.3: follows redirects. Names are at `httpPort`; addresses are where they say. */
async function fetchFile(url: URL, { httpPort = 80 }: Switches, closing: AbortSignal): Promise<string> {
  using client = Deno.createHttpClient({ allowHost: true, poolMaxIdlePerHost: 0 });
  const signal = AbortSignal.any([closing, AbortSignal.timeout(TIMEOUT_MS)]);
  const get = async ({ host, hostname, pathname }: URL) => {
    const port = () => typeof httpPort === "number" ? httpPort : httpPort(hostname);
    const at = /^127\.|^\[/.test(hostname) ? host : `127.0.0.1:${port()}`;
    const init = { client, headers: { host }, redirect: "manual", signal } as const;
    const response = await fetch(`http://${at}${pathname}`, init);
    return { response, text: await response.text() };
  };
  for (let redirects = 0; redirects <= MAX_REDIRECTS; redirects++) {
    const { response: { status, headers }, text } = await get(url).catch((error) => {
      throw noConnection(`cannot reach ${url.hostname}: ${error.message}`);
    });
    if (status === 200) return text;
    const target = URL.parse(headers.get("location") ?? "", url);
    if (status < 300 || status >= 400 || target === null) throw unauthorized(`${url} answered ${status}`);
    if (target.protocol !== "http:") throw noConnection(`${url} redirects to ${target}`);
    url = target;
  }
  throw noConnection(`more than ${MAX_REDIRECTS} redirects, the last to ${url}`);
}

/** draft-ietf-acme-dns-persist: `ca.example; accounturi=https://…; policy=wildcard`. Pebble checks the syntax more strictly. */
function isPersistent(record: string, { account, wildcard }: Authorization): boolean {
  const [issuer, ...parameters] = record.split(";").map((part) => part.trim());
  const values = new Map(parameters.map((parameter) => {
    const [tag = "", value] = parameter.split("=").map((part) => part.trim());
    return [tag.toLowerCase(), value];
  }));
  return issuer === ISSUER && values.get("accounturi") === account.url &&
    (!wildcard || values.get("policy")?.toLowerCase() === "wildcard");
}
