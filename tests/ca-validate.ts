/**
 * How the test CA validates: it looks for the proof where a CA would (RFC 8555 §8), and never leaves loopback.
 */
import { Buffer } from "node:buffer";
import { createHash } from "node:crypto";
import { type IncomingMessage, request as startRequest } from "node:http";
import { isIP } from "node:net";
import { type Identifier, refusal } from "./ca-jws.ts";
import type { Switches } from "./ca-switches.ts";

/** What has to be proven. */
export interface Proof {
  readonly type: string;
  readonly identifier: Identifier;
  readonly wildcard: boolean;
  readonly token: string;
  /** `<token>.<thumbprint>` (RFC 8555 §8.1). */
  readonly keyAuthorization: string;
  readonly accountUrl: string;
  /** The issuer domain names that a dns-persist-01 record may name. */
  readonly issuers: readonly string[];
}

const TIMEOUT_MS = 10_000;
const MAX_REDIRECTS = 10; // as Boulder has it
const MAX_BODY_BYTES = 4096;
const MAX_CNAMES = 10;

const unauthorized = (detail: string) => refusal(403, "unauthorized", detail);
const noConnection = (detail: string) => refusal(400, "connection", detail);

/** Throws the problem of the challenge where the proof does not hold; `closing` ends it. */
export async function validate(proof: Proof, switches: Switches, closing: AbortSignal): Promise<void> {
  if (proof.type === "http-01") return await validateHttp(proof, switches, closing);
  const persistent = proof.type === "dns-persist-01";
  const name = `${persistent ? "_validation-persist" : "_acme-challenge"}.${proof.identifier.value}`;
  const records = await lookUp(name, switches);
  if (persistent) return checkPersistent(records, name, proof);
  const expected = createHash("sha256").update(proof.keyAuthorization).digest("base64url");
  if (records.length === 0) throw unauthorized(`no TXT record at ${name}`);
  if (!records.includes(expected)) {
    throw unauthorized(`none of the ${records.length} TXT records at ${name} is ${expected}`);
  }
}

/** RFC 8555 §8.3: redirects are followed, and trailing whitespace is forgiven. */
async function validateHttp(proof: Proof, switches: Switches, closing: AbortSignal): Promise<void> {
  const { value } = proof.identifier;
  const host = isIP(value) === 6 ? `[${value}]` : value;
  let url = new URL(`http://${host}/.well-known/acme-challenge/${proof.token}`);
  for (let redirects = 0; redirects <= MAX_REDIRECTS; redirects++) {
    const { status, location, body, from } = await get(url, switches, closing);
    if (location !== undefined) {
      const target = URL.parse(location, url);
      if (target?.protocol !== "http:") throw noConnection(`${url} redirects to ${JSON.stringify(location)}`);
      url = target;
      continue;
    }
    if (status !== 200) throw unauthorized(`${from}: ${url} answered ${status}`);
    if (body.trimEnd() === proof.keyAuthorization) return;
    const found = JSON.stringify(body.slice(0, 100));
    throw unauthorized(`${from}: ${url} holds ${found} instead of ${proof.keyAuthorization}`);
  }
  throw noConnection(`more than ${MAX_REDIRECTS} redirects, the last to ${url}`);
}

/** By node:http, as it connects where it is told and still sends the Host that the URL names; fetch() does not. */
async function get(url: URL, switches: Switches, closing: AbortSignal) {
  const name = url.hostname.replace(/^\[|\]$/g, "");
  const at = isLoopback(name) ? { hostname: name, port: 80 } : whereIs(name, switches);
  if (!isLoopback(at.hostname)) throw refusal(400, "dns", `${name} is not on loopback`);
  const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>();
  const request = startRequest({
    host: at.hostname,
    port: url.port === "" ? at.port : Number(url.port),
    path: url.pathname + url.search,
    headers: { host: url.host, "user-agent": "lematt-test-ca", connection: "close" },
    signal: closing,
  });
  const timer = setTimeout(() => request.destroy(new Error("no answer in time")), TIMEOUT_MS);
  request.once("response", resolve).once("error", reject).end();
  try {
    const response = await promise;
    const status = response.statusCode ?? 0;
    const location = status >= 300 && status < 400 ? response.headers.location : undefined;
    const chunks: Buffer[] = [];
    let size = 0;
    for await (const chunk of response) {
      chunks.push(chunk);
      if ((size += chunk.length) > MAX_BODY_BYTES) throw new Error(`more than ${MAX_BODY_BYTES} bytes`);
    }
    return { status, location, body: Buffer.concat(chunks).toString(), from: at.hostname };
  } catch (error) {
    throw noConnection(`${at.hostname}: cannot fetch ${url}: ${(error as Error).message}`);
  } finally {
    clearTimeout(timer);
    request.destroy();
  }
}

const isLoopback = (address: string) => address === "::1" || /^127\.\d+\.\d+\.\d+$/.test(address);

function whereIs(name: string, { resolve, httpPort = 80 }: Switches): { hostname: string; port: number } {
  try {
    return resolve?.(name) ?? { hostname: "127.0.0.1", port: httpPort };
  } catch (error) {
    throw refusal(400, "dns", `cannot look up ${name}: ${(error as Error).message}`);
  }
}

/** The TXT values at `name`, at the end of its CNAMEs. */
async function lookUp(name: string, { txt, cname }: Switches): Promise<readonly string[]> {
  try {
    for (let links = 0; links < MAX_CNAMES; links++) {
      const target = await cname?.(name);
      if (target === undefined) return await txt?.(name) ?? [];
      name = target.replace(/\.$/, "");
    }
  } catch (error) {
    throw refusal(400, "dns", `cannot look up the TXT records of ${name}: ${(error as Error).message}`);
  }
  throw refusal(400, "dns", `too many CNAMEs, the last at ${name}`);
}

/**
 * draft-ietf-acme-dns-persist: a TXT record of the form of a CAA issue value (RFC 8659 §4.2), `ca.example;
 * accounturi=https://…; policy=wildcard`. Pebble judges the form more strictly.
 */
function checkPersistent(records: readonly string[], name: string, proof: Proof): void {
  const isProof = records.some((record) => {
    const [issuer = "", ...parameters] = record.split(";").map((part) => part.trim());
    const values = new Map(parameters.map((parameter) => {
      const [tag = "", value] = parameter.split("=").map((part) => part.trim());
      return [tag.toLowerCase(), value];
    }));
    return proof.issuers.includes(issuer) && values.get("accounturi") === proof.accountUrl &&
      (!proof.wildcard || values.get("policy")?.toLowerCase() === "wildcard");
  });
  if (!isProof) throw unauthorized(`no TXT record at ${name} names this CA, the account and what it may`);
}
