/** Goal: the test CA detects requests that a correct client never sends, so every test bed fails on them. Pebble is stricter. */
import assert from "node:assert/strict";
import { testBed } from "./bed.ts";
import type { Resource } from "./ca.ts";

type Jws = Record<"protected" | "payload" | "signature", string>;

const encode = (value: unknown) => btoa(JSON.stringify(value)).replaceAll("+", "-").replaceAll("/", "_");
const flip = (text: string) => (text.startsWith("A") ? "B" : "A") + text.slice(1);
/** Changes the protected header. The signature no longer matches, but the CA checks the header before the signature. */
const header = (change: (header: Record<string, unknown>) => unknown) => (jws: Jws) => {
  const text = atob(jws.protected.replaceAll("-", "+").replaceAll("_", "/"));
  return { ...jws, protected: encode(change(JSON.parse(text))).replace(/=+$/, "") };
};

const VIOLATIONS: readonly [what: string, resource: Resource, change: (jws: Jws) => unknown, type: string][] =
  [
    ["an unknown nonce", "newOrder", header((all) => ({ ...all, nonce: "AAAA" })), "badNonce"],
    ["another URL", "newOrder", header((all) => ({ ...all, url: "https://localhost/" })), "unauthorized"],
    ["neither jwk nor kid", "newOrder", header(({ kid: _, ...all }) => all), "malformed"],
    ["an unknown account", "newOrder", header((all) => ({ ...all, kid: "/1" })), "accountDoesNotExist"],
    ["no algorithm", "newOrder", header((all) => ({ ...all, alg: "none" })), "malformed"],
    ["another payload", "authz", (jws) => ({ ...jws, payload: "e30" }), "malformed"],
    ["a broken signature", "newAccount", (jws) => ({ ...jws, signature: flip(jws.signature) }), "malformed"],
    ["not a JWS", "finalize", () => [], "malformed"],
  ];

Deno.test("requests that break RFC 8555 are violations", async () => {
  for (const [what, resource, change, type] of VIOLATIONS) {
    await using bed = await testBed({ domains: "example.com", settings: "keyTypes: ec" });
    const { fetch } = bed.context();
    const path =
      { newOrder: "/new-order", newAccount: "/new-account", authz: /\/authz\/\d+$/ }[resource as string];
    const ran = await bed.run({
      fetch(url, init) {
        const isTarget = new RegExp(path ?? `/${resource}$`).test(url) && init.method === "POST";
        return fetch(
          url,
          isTarget ? { ...init, body: JSON.stringify(change(JSON.parse(`${init.body}`))) } : init,
        );
      },
    });
    assert.equal(ran.code, 1, what);
    const violations = bed.ca.violations.splice(0);
    assert(
      violations.some((violation) => violation.resource === resource && violation.type === type),
      `${what}: ${JSON.stringify(violations)}`,
    );
  }
});

Deno.test("polling before Retry-After and a certID without the zero octet are violations", async () => {
  await using bed = await testBed({
    domains: "example.com",
    settings: "keyTypes: ec",
    ca: { retryAfterSeconds: 9 },
  });
  await bed.run();
  const { ca } = bed;
  const violations = () => ca.violations.splice(0).map(({ resource, type }) => `${resource} ${type}`);
  assert.deepEqual(violations(), []);
  Object.assign(ca.switches, { processingMs: Infinity });
  const { fetch } = bed.context();
  await bed.run({
    named: { renew: ["example.com"] },
    sleep: (ms) => Promise.resolve(ca.advance(ms / 2)),
  });
  assert(violations().includes("order tooSoon"));
  const { certId } = ca.issued[0]!;
  const [keyId, serial] = certId.split(".");
  const short = Buffer.from(serial!, "base64url").subarray(1).toString("base64url");
  await (await fetch(`${ca.origin}/renewal-info/${keyId}.${short}`, {})).text();
  assert.deepEqual(violations(), ["renewalInfo malformed"]);
});
