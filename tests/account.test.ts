/** Goal: lematt has one account at each CA, and a crash at any moment does not lose it. */

import assert from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { existsSync } from "node:fs";
import type { Mode } from "../lib/config.ts";
import { revocable, revoke, rollover } from "../lib/run.ts";
import type { Context } from "../lib/context.ts";
import { type Bed, faultAt, refusing, testBed, until } from "./bed.ts";
import { type Ca, type Fault, startCa } from "./ca.ts";

const DAY = 86_400_000;
const NAME = "example.com";
const CERTIFICATE = `test/cert/${NAME}-cert-combined.prime256v1.test.pem`;
const KEY = `test/key/${NAME}-key.prime256v1.test.pem`;

/** A bed for one EC certificate, whose CA can be given faults. */
function bedFor(settings = ""): Promise<Bed> {
  return testBed({ domains: NAME, settings: `keyTypes: ec\n${settings}`, ca: { fault: () => undefined } });
}

/** Changes the account key in this process. Returns what is reported about account keys. */
async function roll(bed: Bed, mode: Mode = "test", context: Partial<Context> = {}): Promise<string[]> {
  const reported: string[] = [];
  await rollover(bed.config(mode), bed.context(context), (event) => {
    reported.push(event.kind === "account key" ? event.how : event.kind);
  });
  return reported;
}

/** Makes certificates due again. */
function discard(bed: Bed, mode: Mode = "test") {
  if (existsSync(bed.path(mode))) Deno.removeSync(bed.path(mode, "cert"), { recursive: true });
}

/** A run that orders the certificate again; returns how many requests it sent to each resource of accounts. */
async function issue(bed: Bed, options: { mode?: Mode } & Partial<Context> = {}) {
  discard(bed, options.mode);
  const ran = await bed.run(options);
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  const count = (wanted: string) => ran.requests.filter(({ resource }) => resource === wanted).length;
  assert.equal(ran.events.filter(({ kind }) => kind === "issued").length, 1, ran.stdout);
  return { newAccount: count("newAccount"), account: count("account"), keyChange: count("keyChange") };
}
const NOTHING = { newAccount: 0, account: 0, keyChange: 0 };

/** The files of account keys, each with its mode. */
function keyFiles(bed: Bed): string[] {
  return [...Deno.readDirSync(bed.conf)].filter(({ name }) => name.startsWith("account.key"))
    .map(({ name }) => `${name} ${(Deno.statSync(bed.path(name)).mode! & 0o777).toString(8)}`).sort();
}
const ONE_KEY = ["account.key.test 600"];
const PENDING = ["account.key.test 600", "account.key.test.new 600"];

const newKey = () =>
  generateKeyPairSync("ec", { namedCurve: "P-384" }).privateKey.export({
    type: "sec1",
    format: "pem",
  }) as string;

/** The URL of a CA's only account, and the thumbprint of its key. */
function only(ca: Ca): { url: string; thumbprint: string } {
  assert.equal(ca.accounts.length, 1, "a second account was registered");
  const { url, key: { thumbprint } } = ca.accounts[0]!;
  return { url, thumbprint };
}

// ---- registration ------------------------------------------------------------------------------------------------

Deno.test("a changed contact is sent to the CA once; if the CA refuses it, certificates are issued all the same", async () => {
  await using bed = await bedFor("contact: old@example.com");
  await issue(bed);
  bed.configure({ settings: "keyTypes: ec\ncontact: new@example.com more@example.com" });
  for (const account of [1, 0]) {
    assert.deepEqual(await issue(bed), { ...NOTHING, account });
  }
  const contact = ["mailto:new@example.com", "mailto:more@example.com"];
  assert.deepEqual(bed.ca.accounts.map(({ contact }) => contact), [contact]);
  bed.configure({ settings: "keyTypes: ec\ncontact: ops@nowhere.invalid" });
  for (let night = 0; night < 2; night++) {
    discard(bed);
    bed.ca.switches.fault = faultAt("account", refusing(400, "invalidContact", "no such domain"));
    const ran = await bed.run();
    assert.equal(ran.code, 0, ran.stderr);
    assert.match(ran.stdout, /the CA refuses the contact: no such domain \(invalidContact\)/);
  }
});

Deno.test("another CA or another key means another account, and the former account is remembered", async () => {
  await using bed = await bedFor();
  await using second = await startCa({ httpPort: bed.web.port });
  const caCerts = [bed.ca.caBundle, second.caBundle];
  using client = Deno.createHttpClient({ caCerts });
  const fetchBoth: Context["fetch"] = (url, init) => fetch(url, { ...init, client });
  await Deno.writeTextFile(bed.path("both.pem"), caCerts.join(""));
  const settings = (ca: Ca) => ({
    settings: `keyTypes: ec\ncaBundle: both.pem\ntestDirectory: ${ca.directoryUrl}`,
  });
  await issue(bed, { fetch: fetchBoth });
  const key = bed.text("account.key.test");

  bed.configure(settings(second));
  await bed.run({ fetch: fetchBoth });
  assert.equal(second.log.length, 0, "not asked about a certificate of another CA");
  assert.deepEqual(await issue(bed, { fetch: fetchBoth }), NOTHING); // requests at the first CA
  only(second);
  assert.equal(second.issued[0]?.replaces, undefined);

  bed.configure(settings(bed.ca));
  await Deno.writeTextFile(bed.path("account.key.test"), newKey());
  for (const [pem, newAccount] of [[newKey(), 1], [key, 0]] as const) {
    await Deno.writeTextFile(bed.path("account.key.test"), pem);
    assert.deepEqual(await issue(bed, { fetch: fetchBoth }), { ...NOTHING, newAccount });
  }
});

Deno.test("each mode has its own account key; --test keeps using the one of --prod if 0.1.0 has registered it", async () => {
  await using bed = await bedFor();
  for (const mode of ["prod", "test"] as const) await issue(bed, { mode });
  assert.deepEqual([keyFiles(bed), bed.ca.accounts.length], [["account.key 600", ...ONE_KEY], 2]);

  await Deno.rename(bed.path("account.key.test"), bed.path("account.key"));
  assert.deepEqual(await issue(bed), NOTHING);
  assert.deepEqual(keyFiles(bed), ["account.key 600"]);
  assert.deepEqual(await roll(bed), ["changed"]);
  assert.deepEqual(keyFiles(bed), ["account.key 600", ...ONE_KEY]);
});

Deno.test("--test uses the key of --prod if its user cannot write to the directory of the key", async () => {
  await using bed = await bedFor();
  const directory = bed.path("keys"), key = bed.path("keys", "account.key");
  await Deno.mkdir(directory);
  await Deno.writeTextFile(key, newKey(), { mode: 0o600 });
  await Deno.chmod(directory, 0o555);
  bed.configure({ settings: `accountKey: ${key}\nkeyTypes: ec\npreflight: no` });
  // root may write everywhere unless it loses this capability
  const by = Deno.uid() === 0 ? ["setpriv", "--bounding-set=-dac_override"] : [];
  for (const pattern of [/^issued /m, /^nothing due/m]) {
    const { code, stdout, stderr } = await bed.lemattBy(by, "--test");
    assert.deepEqual([code, stderr], [0, ""]);
    assert.match(stdout, pattern);
  }
  assert.deepEqual([bed.ca.accounts.length, [...Deno.readDirSync(directory)].length], [1, 1]);
});

Deno.test("an account that the CA has forgotten is registered again, once for all lines", async () => {
  await using bed = await bedFor("contact: new@example.com");
  await issue(bed);
  const state = bed.text("test/state.json").replace("/account/1", "/account/99");
  Object.assign(bed.ca.accounts[0]!.key, { thumbprint: "unknown" });
  bed.configure({ domains: "a.example.com\nb.example.com\nc.example.com" });
  for (const wanted of [false, true]) {
    await Deno.writeTextFile(bed.path("test/state.json"), state);
    const refusal = refusing(403, "unauthorized", "no new accounts");
    bed.ca.switches.fault = wanted ? undefined : faultAt("newAccount", refusal, Infinity);
    const ran = await bed.run();
    assert.equal(ran.code, wanted ? 0 : 1, ran.stderr);
    assert.equal(ran.requests.filter(({ resource }) => resource === "newAccount").length, 1);
    if (!wanted) assert.equal(ran.stderr.match(/no new accounts \(unauthorized\)/g)?.length, 3);
  }
  assert.deepEqual(bed.ca.accounts[1]!.contact, ["mailto:new@example.com"]);
  const types = new Set(bed.ca.violations.splice(0).map(({ type }) => type));
  assert.deepEqual(types, new Set(["accountDoesNotExist"])); // of the requests under the remembered URL
});

// ---- rollover ----------------------------------------------------------------------------------------------------

Deno.test("--rollover gives the account another key, which later runs use", async () => {
  await using bed = await bedFor();
  await Deno.writeTextFile(bed.path("account.key.test"), newKey(), { mode: 0o600 });
  await issue(bed);
  const before = only(bed.ca);
  const { code, stdout, stderr } = await bed.lematt("--test", "--rollover", "--yes");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.match(stdout, /^changed .*account\.key\.test, the account key/);
  const after = only(bed.ca);
  assert.equal(after.url, before.url);
  assert.notEqual(after.thumbprint, before.thumbprint);
  assert.deepEqual(keyFiles(bed), ONE_KEY);
  assert.match(bed.text("account.key.test"), /^-----BEGIN PRIVATE KEY-----/);
  const { accounts } = JSON.parse(bed.text("test/state.json"));
  assert.deepEqual(Object.keys(accounts), [`${bed.ca.directoryUrl} ${after.thumbprint}`]);

  bed.ca.advance(80 * DAY);
  assert.equal((await bed.run()).code, 0);
  assert.equal(bed.ca.issued[1]!.replaces, bed.ca.issued[0]!.certId, "still the same account");
});

Deno.test("if the CA refuses, is down or offers no key change, --rollover changes no key and leaves no file behind", async () => {
  await using bed = await bedFor();
  await issue(bed);
  const before = only(bed.ca);
  const key = bed.text("account.key.test");
  const withoutKeyChange: Fault = { kind: "rewrite", rewrite: ({ keyChange: _, ...rest }) => rest };
  for (
    const [fault, message] of [
      [faultAt("keyChange", refusing(403, "unauthorized", "not today")), /^not today \(unauthorized\)$/],
      [
        faultAt("keyChange", { kind: "status", status: 409, contentType: "text/plain" }),
        /^HTTP status 409/,
      ],
      [faultAt("keyChange", { kind: "status", status: 500 }, 9), /^HTTP status 500/],
      [faultAt("keyChange", { kind: "status", status: 501 }, 2), /^the CA does not offer it$/],
      [faultAt("directory", withoutKeyChange), /^the CA does not offer it$/],
    ] as const
  ) {
    bed.ca.switches.fault = fault;
    await assert.rejects(roll(bed), { name: "AcmeError", step: "change the account key", message });
    bed.ca.switches.fault = undefined;
    assert.deepEqual([bed.text("account.key.test"), keyFiles(bed)], [key, ONE_KEY]);
    assert.deepEqual([await issue(bed), only(bed.ca)], [NOTHING, before]);
  }
  assert.equal(bed.ca.log.filter(({ status }) => status === 501).length, 1);
});

Deno.test("if the CA has changed the key and the answer is lost, --rollover finds out", async () => {
  await using bed = await bedFor();
  await issue(bed);
  for (
    const fault of [
      { kind: "reset" },
      { kind: "status", status: 500 },
      { kind: "status", status: 502, contentType: "text/html", body: "<h1>Bad gateway" },
      refusing(400, "malformed", "what?"),
    ] as Fault[]
  ) {
    bed.ca.switches.fault = faultAt("keyChange", { kind: "after", fault });
    assert.deepEqual(await roll(bed), ["changed"]);
    bed.ca.violations.splice(0); // the second try is signed with the old key
    assert.deepEqual([await issue(bed), keyFiles(bed)], [NOTHING, ONE_KEY]);
    only(bed.ca);
  }
});

const SILENT: Fault = { kind: "silence" };
for (
  const [what, fault] of [
    ["before the CA has the request", SILENT],
    ["after the CA has changed the key", { kind: "after", fault: SILENT }],
  ] as [string, Fault][]
) {
  Deno.test(`--rollover that is killed ${what} does not lose the account`, async () => {
    await using bed = await bedFor();
    await issue(bed);
    const { url, thumbprint } = only(bed.ca);
    bed.ca.switches.fault = faultAt("keyChange", fault);
    const program = bed.start("--test", "--rollover", "--yes");
    await until("the CA is asked", () => bed.ca.log.some(({ resource }) => resource === "keyChange"));
    if (fault !== SILENT) await until("the key is changed", () => only(bed.ca).thumbprint !== thumbprint);
    program.kill("SIGKILL");
    await program.output();
    assert.deepEqual(keyFiles(bed), PENDING);
    bed.ca.switches.fault = undefined;
    await issue(bed);
    assert.deepEqual([only(bed.ca).url, keyFiles(bed)], [url, ONE_KEY]);
    assert.deepEqual(await issue(bed), NOTHING);
  });
}

Deno.test("a rollover that was interrupted between writing the key and writing the state keeps the account", async () => {
  await using bed = await bedFor();
  await issue(bed);
  const state = bed.text("test/state.json");
  await roll(bed);
  await Deno.writeTextFile(bed.path("test/state.json"), state);
  await issue(bed);
  only(bed.ca);
});

// ---- revocation --------------------------------------------------------------------------------------------------

/** Revokes the certificate in this process. */
async function revokeIt(bed: Bed): Promise<void> {
  const config = bed.config();
  await revoke(config, revocable(config, NAME), 1, bed.context(), () => {});
}

for (const what of ["the account that ordered it", "its own key if no account is known"]) {
  Deno.test(`a certificate is revoked with ${what}, and its key is never used again`, async () => {
    await using bed = await bedFor();
    await issue(bed);
    const byAccount = what.startsWith("the account");
    for (const file of byAccount ? [] : ["test/state.json", "account.key.test"]) {
      Deno.removeSync(bed.path(file));
    }
    await revokeIt(bed);
    assert.equal(bed.ca.issued[0]!.revoked?.reason, 1);
    const request = bed.ca.log.find(({ resource }) => resource === "revokeCert");
    assert.equal(request?.kid !== undefined, byAccount);
    await revokeIt(bed); // to revoke it again is not an error
    const key = bed.text(KEY);
    assert.equal((await bed.run()).code, 0);
    assert.notEqual(bed.text(KEY), key);
  });
}

Deno.test("a certificate of another account is revoked with its own key; without the key, the error is that of the CA", async () => {
  await using bed = await bedFor();
  await issue(bed);
  await Deno.writeTextFile(bed.path("account.key.test"), newKey());
  bed.configure({ domains: `${NAME}\nother.example` });
  await bed.run(); // under another account
  assert.equal(bed.ca.accounts.length, 2);
  await Deno.rename(bed.path(KEY), bed.path(`${KEY}.aside`));
  const file = revocable(bed.config(), bed.path(CERTIFICATE));
  await assert.rejects(
    revoke(bed.config(), file, 1, bed.context(), () => {}),
    /neither the account that ordered the certificate/,
  );
  await Deno.rename(bed.path(`${KEY}.aside`), bed.path(KEY));
  await revokeIt(bed);
  assert.notEqual(bed.ca.issued[0]!.revoked, undefined);
  bed.ca.violations.splice(0);
});
