/**
 * The validation authority of the test CA: proves control of a name by really asking (RFC 8555 §8).
 *
 * It gets a challenge and where to find things; it returns if the proof holds and throws the problem to be
 * put into the challenge if it does not. It never leaves the loopback interface.
 */
import { createHash } from "node:crypto";
import { type IncomingMessage, request as startRequest } from "node:http";
import { isIP } from "node:net";
import { connect as connectTls } from "node:tls";
import { type Identifier, Problem, refusal } from "./ca-problem.ts";

/** How the CA finds what a real one finds by DNS. */
export interface Resolver {
  /** Where `hostname` is reached on port 80; the address must be of loopback. */
  resolve(hostname: string): { hostname: string; port: number };
  /** The values of the TXT records at `name`. */
  txt(name: string): Promise<readonly string[]>;
  /** The target of a CNAME at `name`, if there is one. */
  cname(name: string): Promise<string | undefined>;
  /** How long an answer may take. */
  readonly timeoutMs: number;
  /** Ends the validation when the CA closes. */
  readonly closing: AbortSignal;
}

/** One proof to be made. */
export interface Proof {
  readonly type: string;
  readonly identifier: Identifier;
  readonly wildcard: boolean;
  readonly token: string;
  /** `<token>.<thumbprint>` (RFC 8555 §8.1). */
  readonly keyAuthorization: string;
  readonly accountUrl: string;
  /** The issuer domain names that a dns-persist-01 record may name. */
  readonly issuerNames: readonly string[];
  readonly now: Date;
}

/** Makes the proof; throws a Problem with the reason if it does not hold. */
export async function validate(proof: Proof, resolver: Resolver): Promise<void> {
  switch (proof.type) {
    case "http-01":
      return await validateHttp(proof, resolver);
    case "dns-01":
      return await validateDns(proof, resolver);
    case "dns-persist-01":
      return await validatePersistentDns(proof, resolver);
    default:
      throw refusal(400, "malformed", `challenges of type ${proof.type} cannot be validated here`);
  }
}

// --------------------------------------------------------------------------------------------------- http-01

const MAX_REDIRECTS = 10; // as Boulder has it
const MAX_BODY_BYTES = 4096;

/** RFC 8555 §8.3: redirects are followed, and trailing whitespace is forgiven. */
async function validateHttp(proof: Proof, resolver: Resolver): Promise<void> {
  const { value } = proof.identifier;
  const host = isIP(value) === 6 ? `[${value}]` : value;
  let url = new URL(`http://${host}/.well-known/acme-challenge/${proof.token}`);
  for (let redirects = 0; redirects <= MAX_REDIRECTS; redirects++) {
    const answer = await get(url, resolver);
    if (answer.location !== undefined) {
      const target = URL.parse(answer.location, url);
      if (target === null || !/^https?:$/.test(target.protocol)) {
        throw refusal(
          400,
          "connection",
          `${url} redirects to ${JSON.stringify(answer.location)}, which cannot be followed`,
        );
      }
      url = target;
      continue;
    }
    if (answer.status !== 200) {
      throw refusal(403, "unauthorized", `${answer.from}: ${url} answered ${answer.status}`);
    }
    if (answer.body.trimEnd() !== proof.keyAuthorization) {
      const found = JSON.stringify(answer.body.slice(0, 100));
      throw refusal(
        403,
        "unauthorized",
        `${answer.from}: ${url} holds ${found} instead of ${proof.keyAuthorization}`,
      );
    }
    return;
  }
  throw refusal(400, "connection", `more than ${MAX_REDIRECTS} redirects, the last to ${url}`);
}

interface HttpAnswer {
  readonly status: number;
  readonly location?: string;
  readonly body: string;
  /** The address that answered. */
  readonly from: string;
}

/**
 * node:http rather than fetch(), for it connects where it is told and still sends the Host that the URL
 * names.
 */
async function get(url: URL, resolver: Resolver): Promise<HttpAnswer> {
  const name = url.hostname.replace(/^\[|\]$/g, "");
  const isLoopback = (address: string) => address === "::1" || /^127\.\d+\.\d+\.\d+$/.test(address);
  const at = isLoopback(name) ? { hostname: name, port: 80 } : whereIs(name, resolver);
  if (!isLoopback(at.hostname)) throw refusal(400, "dns", `${name} is not on loopback`);
  const secure = url.protocol === "https:";
  const port = url.port !== "" ? Number(url.port) : secure ? 443 : at.port;

  const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>();
  const request = startRequest({
    host: at.hostname,
    port,
    path: url.pathname + url.search,
    headers: { host: url.host, "user-agent": "lematt-test-ca", connection: "close" },
    signal: resolver.closing,
    // The content proves, not the certificate: the host cannot have a good one before this (RFC 8555 §8.3).
    // No node:https: its agent would read the system's certificates, for which tests have no permission.
    ...(secure && {
      createConnection: () =>
        connectTls({
          host: at.hostname,
          port,
          servername: isIP(name) === 0 ? name : "",
          ALPNProtocols: ["http/1.1"],
          rejectUnauthorized: false,
          ca: [],
        }),
    }),
  });
  const expired = setTimeout(() => request.destroy(new Error("no answer in time")), resolver.timeoutMs);
  request.once("response", resolve).once("error", reject).end();
  try {
    const response = await promise;
    const status = response.statusCode ?? 0;
    const location = status >= 300 && status < 400 ? response.headers.location : undefined;
    let body = "";
    for await (const chunk of response) {
      body += chunk;
      if (body.length > MAX_BODY_BYTES) throw new Error(`more than ${MAX_BODY_BYTES} bytes`);
    }
    return { status, location, body, from: at.hostname };
  } catch (error) {
    throw refusal(400, "connection", `${at.hostname}: cannot fetch ${url}: ${(error as Error).message}`);
  } finally {
    clearTimeout(expired);
    request.destroy();
  }
}

function whereIs(name: string, resolver: Resolver): { hostname: string; port: number } {
  try {
    return resolver.resolve(name);
  } catch (error) {
    throw refusal(400, "dns", `cannot look up ${name}: ${(error as Error).message}`);
  }
}

// ------------------------------------------------------------------------------------------------------- dns

/** The TXT values at `name`, at the end of its CNAMEs. */
async function lookUp(name: string, resolver: Resolver): Promise<readonly string[]> {
  try {
    for (let links = 0; links < 10; links++) {
      const target = await resolver.cname(name);
      if (target === undefined) return await resolver.txt(name);
      name = target.replace(/\.$/, "");
    }
  } catch (error) {
    throw refusal(400, "dns", `cannot look up the TXT records of ${name}: ${(error as Error).message}`);
  }
  throw refusal(400, "dns", `too many CNAMEs, the last at ${name}`);
}

/** RFC 8555 §8.4. */
async function validateDns(proof: Proof, resolver: Resolver): Promise<void> {
  const name = `_acme-challenge.${proof.identifier.value}`;
  const found = await lookUp(name, resolver);
  const expected = createHash("sha256").update(proof.keyAuthorization).digest("base64url");
  if (found.length === 0) throw refusal(403, "unauthorized", `no TXT record at ${name}`);
  if (!found.includes(expected)) {
    throw refusal(403, "unauthorized", `none of the ${found.length} TXT records at ${name} is ${expected}`);
  }
}

/**
 * draft-ietf-acme-dns-persist, as far as Pebble 2.10.1 implements it: a TXT record of the form of a CAA issue
 * value (RFC 8659 §4.2), `ca.example; accounturi=https://…; policy=wildcard; persistUntil=1767225600`.
 */
async function validatePersistentDns(proof: Proof, resolver: Resolver): Promise<void> {
  const name = `_validation-persist.${proof.identifier.value}`;
  const reasons: Problem[] = [];
  for (const record of await lookUp(name, resolver)) {
    const [issuer = "", ...parameters] = record.split(";").map((part) =>
      part.replace(/^[ \t]+|[ \t]+$/g, "")
    );
    if (!proof.issuerNames.includes(issuer)) continue; // meant for another CA
    const reason = judgePersistentRecord(parameters, proof);
    if (reason === undefined) return;
    reasons.push(reason);
  }
  // A record that cannot be read says more than one that names somebody else.
  throw reasons.find(({ document }) => document.type.endsWith(":malformed")) ?? reasons[0] ??
    refusal(403, "unauthorized", `no TXT record at ${name} names ${proof.issuerNames.join(" or ")}`);
}

/** Why a record does not authorize, or undefined if it does. */
function judgePersistentRecord(parameters: readonly string[], proof: Proof): Problem | undefined {
  const malformed = (detail: string) =>
    refusal(400, "malformed", `the TXT record for dns-persist-01: ${detail}`);
  const unauthorized = (detail: string) =>
    refusal(403, "unauthorized", `the TXT record for dns-persist-01: ${detail}`);
  const values = new Map<string, string>();
  for (const parameter of parameters) {
    const [, tag, value] = /^([^=]*?)[ \t]*=[ \t]*([\x21-\x3a\x3c-\x7e]*)$/.exec(parameter) ?? [];
    if (!tag || value === undefined) return malformed(`${JSON.stringify(parameter)} is not tag=value`);
    if (values.has(tag.toLowerCase())) return malformed(`"${tag}" stands in it twice`);
    values.set(tag.toLowerCase(), value);
  }
  const account = values.get("accounturi");
  const until = values.get("persistuntil");
  if (!account) return malformed(`it lacks "accounturi"`);
  if (until !== undefined && !/^[+-]?\d+$/.test(until)) return malformed(`persistUntil=${until} is no time`);
  if (account !== proof.accountUrl) {
    return unauthorized(`it names the account ${account}, not ${proof.accountUrl}`);
  }
  if (proof.wildcard && values.get("policy")?.toLowerCase() !== "wildcard") {
    return unauthorized("it lacks policy=wildcard");
  }
  if (until !== undefined && Number(until) * 1000 < proof.now.getTime()) {
    return unauthorized("it is past its persistUntil");
  }
}
