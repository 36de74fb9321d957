/** How the test CA validates challenges (RFC 8555 §8), on loopback only. */
import { createHash } from "node:crypto";
import { isIP } from "node:net";
import type { Switches } from "./ca.ts";
import { refusal } from "./ca-wire.ts";
import type { Identifier } from "./ca-x509.ts";

/** The challenge to validate. */
export interface Proof {
  readonly type: string;
  readonly identifier: Identifier;
  readonly wildcard: boolean;
  readonly token: string;
  /** `<token>.<thumbprint>` (RFC 8555 §8.1). */
  readonly keyAuthorization: string;
  readonly accountUrl: string;
  /** The issuer domain name in a dns-persist-01 record. */
  readonly issuer: string;
}

const TIMEOUT_MS = 10_000;
const MAX_REDIRECTS = 10; // as in Boulder
const MAX_CNAMES = 10;

const unauthorized = (detail: string) => refusal(403, "unauthorized", detail);
const noConnection = (detail: string) => refusal(400, "connection", detail);

/** Throws the problem of the challenge if validation fails; `closing` aborts it. */
export async function validate(proof: Proof, switches: Switches, closing: AbortSignal): Promise<void> {
  if (proof.type === "http-01") return await validateHttp(proof, switches, closing);
  const persistent = proof.type === "dns-persist-01";
  const name = `${persistent ? "_validation-persist" : "_acme-challenge"}.${proof.identifier.value}`;
  const records = await lookUp(name, switches);
  const expected = createHash("sha256").update(proof.keyAuthorization).digest("base64url");
  if (persistent ? records.some((record) => isPersistent(record, proof)) : records.includes(expected)) return;
  throw unauthorized(`none of the ${records.length} TXT records at ${name} proves it`);
}

/** RFC 8555 §8.3: follows redirects, and ignores trailing whitespace. */
async function validateHttp(proof: Proof, switches: Switches, closing: AbortSignal): Promise<void> {
  const { value } = proof.identifier;
  let url = new URL(
    `http://${isIP(value) === 6 ? `[${value}]` : value}/.well-known/acme-challenge/${proof.token}`,
  );
  using client = Deno.createHttpClient({ allowHost: true, poolMaxIdlePerHost: 0 });
  const signal = AbortSignal.any([closing, AbortSignal.timeout(TIMEOUT_MS)]);
  for (let redirects = 0; redirects <= MAX_REDIRECTS; redirects++) {
    const { hostname, port } = whereIs(url, switches);
    const init = { client, headers: { host: url.host }, redirect: "manual", signal } as const;
    const [{ status, headers }, body] = await fetch(`http://${hostname}:${port}${url.pathname}`, init)
      .then(async (response) => [response, await response.text()] as const)
      .catch((error) => {
        throw noConnection(`${hostname}: cannot fetch ${url}: ${error.message}`);
      });
    const location = headers.get("location");
    if (status >= 300 && status < 400 && location !== null) {
      const target = URL.parse(location, url);
      if (target?.protocol !== "http:") throw noConnection(`${url} redirects to ${JSON.stringify(location)}`);
      url = target;
      continue;
    }
    if (status !== 200) throw unauthorized(`${hostname}: ${url} answered ${status}`);
    if (body.trimEnd() === proof.keyAuthorization) return;
    throw unauthorized(`${hostname}: ${url} holds ${JSON.stringify(body.slice(0, 100))}`);
  }
  throw noConnection(`more than ${MAX_REDIRECTS} redirects, the last to ${url}`);
}

function whereIs(url: URL, { resolve, httpPort = 80 }: Switches): { hostname: string; port: number } {
  const port = Number(url.port || 80);
  if (/^127\.\d+\.\d+\.\d+$|^\[::1\]$/.test(url.hostname)) return { hostname: url.hostname, port };
  try {
    const at = resolve?.(url.hostname) ?? { hostname: "127.0.0.1", port: httpPort };
    return url.port === "" ? at : { ...at, port };
  } catch (error) {
    throw refusal(400, "dns", `cannot look up ${url.hostname}: ${(error as Error).message}`);
  }
}

/** The TXT values at `name`, after following its CNAMEs. */
async function lookUp(name: string, { txt, cname }: Switches): Promise<readonly string[]> {
  for (let links = 0; links < MAX_CNAMES; links++) {
    const target = await cname?.(name);
    if (target === undefined) return await txt?.(name) ?? [];
    name = target.replace(/\.$/, "");
  }
  throw refusal(400, "dns", `too many CNAMEs, the last at ${name}`);
}

/** draft-ietf-acme-dns-persist: `ca.example; accounturi=https://…; policy=wildcard`. Pebble checks the syntax more strictly. */
function isPersistent(record: string, { issuer, accountUrl, wildcard }: Proof): boolean {
  const [named, ...parameters] = record.split(";").map((part) => part.trim());
  const values = new Map(parameters.map((parameter) => {
    const [tag = "", value] = parameter.split("=").map((part) => part.trim());
    return [tag.toLowerCase(), value];
  }));
  return named === issuer && values.get("accounturi") === accountUrl &&
    (!wildcard || values.get("policy")?.toLowerCase() === "wildcard");
}
