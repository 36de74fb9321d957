/** Goal: lematt has one account at each CA, and a crash at any moment does not lose it. */

import assert from "node:assert/strict";
import type { Context } from "../lib/context.ts";
import { revocable, revoke, rollover } from "../lib/run.ts";
import { generateKey } from "../lib/x509.ts";
import { type Bed, faultAt, refusing, testBed } from "./bed.ts";
import { type Fault, startCa } from "./ca.ts";

const NAME = "example.com";
const KEY = `test/key/${NAME}-key.prime256v1.test.pem`;

const bedFor = (settings = "") => testBed({ domains: NAME, settings: `keyTypes: ec\n${settings}` });

/** Issues the certificate again; returns which requests about accounts that took. */
async function issue(bed: Bed, options: Parameters<Bed["run"]>[0] = {}): Promise<string[]> {
  const { code, stdout, stderr, requests } = await bed.run({ named: { renew: [NAME] }, ...options });
  assert.deepEqual([code, stderr], [0, ""]);
  assert.match(stdout, /^issued /m);
  return requests.map(({ resource }) => resource).filter((resource) => /account|keyChange/i.test(resource));
}

/** Changes the account key in this process. */
const roll = (bed: Bed, context: Partial<Context> = {}) =>
  rollover(bed.config(), bed.context(context), () => {});

/** The files of account keys, each with its mode. */
function keyFiles(bed: Bed): string[] {
  return [...Deno.readDirSync(bed.conf)].filter(({ name }) => name.startsWith("account.key"))
    .map(({ name }) => `${name} ${(Deno.statSync(bed.path(name)).mode! & 0o777).toString(8)}`).sort();
}
const ONE_KEY = ["account.key.test 600"];

const newKey = () => generateKey({ type: "ec", curve: "P-384" });

// ---- registration ------------------------------------------------------------------------------------------------

Deno.test("a changed contact is sent to the CA once; if the CA refuses it, certificates are issued all the same", async () => {
  await using bed = await bedFor("contact: old@example.com");
  assert.deepEqual(await issue(bed), ["newAccount"]);
  bed.configure({ settings: "keyTypes: ec\ncontact: new@example.com more@example.com" });
  assert.deepEqual([await issue(bed), await issue(bed)], [["account"], []]);
  assert.deepEqual(bed.ca.accounts[0]!.contact, ["mailto:new@example.com", "mailto:more@example.com"]);

  bed.configure({ settings: "keyTypes: ec\ncontact: ops@nowhere.invalid" });
  bed.ca.switches.fault = faultAt("account", refusing(400, "invalidContact", "no such domain"));
  const { code, stdout } = await bed.run({ named: { renew: [NAME] } });
  assert.equal(code, 0);
  assert.match(stdout, /the CA refuses the contact: no such domain \(invalidContact\)/);
});

Deno.test("another CA or another key means another account, and the former account is remembered", async () => {
  await using bed = await bedFor();
  await using second = await startCa({ httpPort: bed.web.port });
  using client = Deno.createHttpClient({ caCerts: [bed.ca.caBundle, second.caBundle] });
  const both: Partial<Context> = { fetch: (url, init) => fetch(url, { ...init, client }) };
  await issue(bed, both);
  const key = bed.text("account.key.test");

  bed.configure({ settings: `keyTypes: ec\ntestDirectory: ${second.directoryUrl}` });
  await bed.run(both);
  assert.equal(second.log.length, 0, "not asked about a certificate of another CA");
  await issue(bed, both);
  assert.deepEqual([second.accounts.length, second.issued[0]!.replaces], [1, undefined]);

  bed.configure({ settings: "keyTypes: ec" });
  for (const [pem, requests] of [[await newKey(), ["newAccount"]], [key, []]] as const) {
    await Deno.writeTextFile(bed.path("account.key.test"), pem);
    assert.deepEqual(await issue(bed, both), requests);
  }
});

Deno.test("each mode has its own account key; --test keeps using the one of --prod if 0.1.0 has registered it", async () => {
  await using bed = await bedFor();
  for (const mode of ["prod", "test"] as const) assert.deepEqual(await issue(bed, { mode }), ["newAccount"]);
  assert.deepEqual(keyFiles(bed), ["account.key 600", ...ONE_KEY]);

  await Deno.rename(bed.path("account.key.test"), bed.path("account.key"));
  assert.deepEqual(await issue(bed), []);
  assert.deepEqual(keyFiles(bed), ["account.key 600"]);
  await roll(bed);
  assert.deepEqual(keyFiles(bed), ["account.key 600", ...ONE_KEY]);
});

Deno.test("--test uses the key of --prod if its user cannot write to the directory of the key", async () => {
  await using bed = await bedFor();
  const keys = bed.path("keys");
  await Deno.mkdir(keys);
  await Deno.writeTextFile(`${keys}/account.key`, await newKey(), { mode: 0o600 });
  await Deno.chmod(keys, 0o555);
  using restoring = new DisposableStack();
  restoring.defer(() => Deno.chmodSync(keys, 0o755)); // or only root could remove it
  bed.configure({ settings: `accountKey: ${keys}/account.key\nkeyTypes: ec` });
  // root may write everywhere unless it loses this capability
  const by = Deno.uid() === 0 ? ["setpriv", "--bounding-set=-dac_override"] : [];
  for (const pattern of [/^issued /m, /^nothing due/m]) {
    const { code, stdout, stderr } = await bed.lemattBy(by, "--test");
    assert.deepEqual([code, stderr], [0, ""]);
    assert.match(stdout, pattern);
  }
  assert.deepEqual([bed.ca.accounts.length, [...Deno.readDirSync(keys)].length], [1, 1]);
});

Deno.test("an account that the CA has forgotten is registered again, once for all lines", async () => {
  await using bed = await bedFor("contact: new@example.com");
  await issue(bed);
  Object.assign(bed.ca.accounts[0]!.key, { thumbprint: "unknown" });
  const state = bed.text("test/state.json").replace("/account/1", "/account/99");
  await Deno.writeTextFile(bed.path("test/state.json"), state);
  bed.configure({ domains: `${NAME}\nb.example.com\nc.example.com` });
  assert.deepEqual(await issue(bed, { named: {} }), ["newAccount"]);
  assert.deepEqual(bed.ca.accounts[1]!.contact, ["mailto:new@example.com"]);
  const types = new Set(bed.ca.violations.splice(0).map(({ type }) => type));
  assert.deepEqual(types, new Set(["accountDoesNotExist"])); // of the requests under the remembered URL
});

// ---- rollover, revocation ----------------------------------------------------------------------------------------

Deno.test("if the CA refuses, is down or offers no key change, --rollover changes no key and leaves no file behind", async () => {
  await using bed = await bedFor();
  await issue(bed);
  const key = bed.text("account.key.test");
  const unsupported = "the CA does not offer it";
  const withoutKeyChange: Fault = { kind: "rewrite", rewrite: ({ keyChange: _, ...rest }) => rest };
  const table = [
    [faultAt("keyChange", refusing(403, "unauthorized", "not today")), "not today (unauthorized)"],
    [faultAt("keyChange", refusing(500, "serverInternal", "down"), 9), "down (serverInternal)"],
    [faultAt("keyChange", { kind: "status", status: 501 }), unsupported], // a second try would succeed
    [faultAt("directory", withoutKeyChange), unsupported],
  ] as const;
  for (const [fault, message] of table) {
    bed.ca.switches.fault = fault;
    await assert.rejects(roll(bed), { name: "AcmeError", step: "change the account key", message });
    bed.ca.switches.fault = undefined;
    assert.deepEqual([bed.text("account.key.test"), keyFiles(bed)], [key, ONE_KEY]);
    assert.deepEqual([await issue(bed), bed.ca.accounts.length], [[], 1]);
  }
});

Deno.test("a rollover whose answer is lost, or that is interrupted before or after the CA has changed the key, keeps the account", async () => {
  const after = (fault: Fault): Fault => ({ kind: "after", fault });
  const reset: Fault = { kind: "reset" };
  const table = [
    [after(reset), false, true],
    [after(refusing(400, "malformed", "what?")), false, true],
    [reset, true, false],
    [after(reset), true, true],
  ] as const;
  for (const [fault, isInterrupted, isChanged] of table) {
    await using bed = await bedFor();
    await issue(bed);
    const before = bed.ca.accounts[0]!.key.thumbprint;
    const stop = new AbortController();
    const inject = faultAt("keyChange", fault);
    bed.ca.switches.fault = (exchange) => {
      const injected = inject(exchange);
      if (injected && isInterrupted) stop.abort();
      return injected;
    };
    const rolling = roll(bed, { signal: stop.signal });
    if (isInterrupted) await assert.rejects(rolling, { name: "AbortError" });
    else await rolling;
    assert.deepEqual(keyFiles(bed), isInterrupted ? [...ONE_KEY, "account.key.test.new 600"] : ONE_KEY);
    await issue(bed);
    assert.deepEqual(await issue(bed), []);
    assert.deepEqual([bed.ca.accounts.length, keyFiles(bed)], [1, ONE_KEY]);
    assert.equal(bed.ca.accounts[0]!.key.thumbprint !== before, isChanged);
    if (!isInterrupted) assert.equal(bed.ca.issued[1]!.replaces, bed.ca.issued[0]!.certId);
    // a second try is signed with the old key
    for (const violation of bed.takeViolations()) assert.equal(violation, "malformed keyChange");
  }
});

Deno.test("a certificate is revoked with its own key if its account is not known or another; the key is never used again", async () => {
  await using bed = await bedFor();
  await issue(bed);
  const path = bed.path(`test/cert/${NAME}-cert-combined.prime256v1.test.pem`);
  const revokeIt = () => revoke(bed.config(), revocable(bed.config(), path), 1, bed.context(), () => {});
  const key = bed.text(KEY);
  for (const file of ["test/state.json", "account.key.test"]) Deno.removeSync(bed.path(file));
  for (let time = 0; time < 2; time++) await revokeIt(); // to revoke it again is not an error
  assert.deepEqual([bed.ca.accounts.length, bed.ca.issued[0]!.revoked!.reason], [1, 1]);
  assert.equal((await bed.run()).code, 0);
  assert.notEqual(bed.text(KEY), key);

  await Deno.writeTextFile(bed.path("account.key.test"), await newKey());
  bed.configure({ domains: `${NAME}\nother.example` });
  await bed.run(); // under another account
  await Deno.rename(bed.path(KEY), bed.path("aside"));
  await assert.rejects(revokeIt(), /neither the account that ordered the certificate/);
  await Deno.rename(bed.path("aside"), bed.path(KEY));
  await revokeIt();
  assert.equal(bed.ca.issued[1]!.revoked!.reason, 1);
  assert.equal(new Set(bed.text("test/revoked-keys").match(/^[0-9a-f]{64}$/gm)).size, 2);
  const refused = "unauthorized revokeCert"; // by another account
  assert.deepEqual(bed.takeViolations(), [refused, refused]);
});
