/** Goal: one account at each CA, whatever changes, and never a moment at which a crash loses it. */

import assert from "node:assert/strict";
import { generateKeyPairSync, randomBytes } from "node:crypto";
import type { Mode } from "../lib/config.ts";
import { rollover } from "../lib/run.ts";
import { type Bed, befalling, refusing, testBed, type TestWorld, until } from "./bed.ts";
import { type Ca, type Fault, startCa, type Switches } from "./ca.ts";

const DAY = 86_400_000;
const NAME = "example.com";

/** A bed for one EC certificate, whose CA can be given faults. */
function bedFor(ca: Switches = {}, settings = ""): Promise<Bed> {
  return testBed({
    domains: NAME,
    settings: `keyTypes: ec\n${settings}`,
    ca: { fault: () => undefined, ...ca },
  });
}

/** Changes the account key in this process. Returns what was told of it. */
async function roll(bed: Bed, mode: Mode = "test", world: Partial<TestWorld> = {}): Promise<string[]> {
  const told: string[] = [];
  await rollover(bed.config(mode), bed.world(world), (event) => {
    told.push(event.kind === "account key" ? event.how : event.kind);
  });
  return told;
}

/** Makes the certificate due again. */
function discard(bed: Bed, mode: Mode = "test") {
  Deno.removeSync(bed.path(mode, "cert"), { recursive: true });
}

/** A run that orders and is issued a certificate; returns how often it asked for which resource of accounts. */
async function issue(
  bed: Bed,
  { mode = "test" as Mode, ...world }: { mode?: Mode } & Partial<TestWorld> = {},
) {
  const ran = await bed.run({ mode, ...world });
  assert.deepEqual([ran.code, ran.stderr], [0, ""]);
  const count = (wanted: string) => ran.requests.filter(({ resource }) => resource === wanted).length;
  assert.equal(ran.events.filter(({ kind }) => kind === "issued").length, 1, ran.stdout);
  return { newAccount: count("newAccount"), account: count("account"), keyChange: count("keyChange") };
}

/** The files of account keys, each with its mode, and thumbprints as `<thumbprint>`. */
function keyFiles(bed: Bed): string[] {
  return [...Deno.readDirSync(bed.conf)].filter(({ name }) => name.startsWith("account.key")).map(
    ({ name }) => {
      const mode = Deno.statSync(bed.path(name)).mode! & 0o777;
      return `${name.replace(/(?<=old-)[\w-]{43}$/, "*").replace(/(?<=new-)[0-9a-f]{8}$/, "*")} ${
        mode.toString(8)
      }`;
    },
  ).sort();
}
const ONE_KEY = ["account.key 600"];
const CHANGED = ["account.key 600", "account.key.old-* 600"];
const PENDING = ["account.key 600", "account.key.new-* 600"];

/** A second CA for --prod, and a fetch() that trusts both. */
async function secondCa(bed: Bed) {
  await using stack = new AsyncDisposableStack();
  const ca = stack.use(await startCa({ httpPort: bed.web.port, fault: () => undefined }));
  const caCerts = [bed.ca.caBundle, ca.caBundle];
  const client = stack.adopt(Deno.createHttpClient({ caCerts }), (client) => client.close());
  await Deno.writeTextFile(bed.path("both.pem"), caCerts.join(""));
  bed.configure({ settings: `keyTypes: ec\ndirectory: ${ca.directoryUrl}\ncaBundle: both.pem` });
  const open = stack.move();
  const fetchFrom: TestWorld["fetch"] = (url, init) => fetch(url, { ...init, client });
  return { ca, fetch: fetchFrom, [Symbol.asyncDispose]: () => open.disposeAsync() };
}

/** The identity of a CA's only account, and that of its key. */
function only(ca: Ca): { url: string; thumbprint: string } {
  assert.equal(ca.accounts.length, 1, "a second account was registered");
  const { url, key: { thumbprint } } = ca.accounts[0]!;
  return { url, thumbprint };
}

// ---- registration ------------------------------------------------------------------------------------------------

const MAC = randomBytes(32).toString("base64url");
for (
  const [what, keyId, mac, expected] of [
    ["none", undefined, undefined, "the CA wants an external account: set eabKeyId and eabHmacKey"],
    ["an unknown one", "kid-2", MAC, `there is no external account "kid-2" (unauthorized)`],
    ["one with another key", "kid-1", randomBytes(32).toString("base64url"), /\((malformed|unauthorized)\)/],
    ["the right one", "kid-1", MAC, undefined],
    ["the right one, padded", "kid-1", `${MAC}=\n`, undefined],
  ] as const
) {
  Deno.test(`a CA that wants an external account gets ${what}`, async () => {
    await using bed = await bedFor({ externalAccounts: { "kid-1": MAC } });
    if (keyId !== undefined) {
      await Deno.writeTextFile(bed.path("eab"), mac, { mode: 0o600 });
      bed.configure({ settings: `keyTypes: ec\neabKeyId: ${keyId}\neabHmacKey: eab` });
    }
    const ran = await bed.run();
    if (expected === undefined) {
      assert.deepEqual([ran.code, bed.ca.accounts[0]?.externalAccount], [0, "kid-1"], ran.stderr);
      discard(bed);
      assert.deepEqual(await issue(bed), { newAccount: 0, account: 0, keyChange: 0 });
    } else {
      assert.deepEqual([ran.code, bed.ca.accounts.length], [1, 0]);
      assert.match(
        ran.stderr,
        /^FAILED {2}1 line of domains, from example\.com on\n {8}cannot register the account: /,
      );
      assert(
        typeof expected === "string" ? ran.stderr.includes(expected) : expected.test(ran.stderr),
        ran.stderr,
      );
      if (mac !== undefined) assert(!ran.stderr.includes(mac));
      bed.ca.violations.splice(0);
    }
  });
}

Deno.test("a contact that has changed is told to the CA, once", async () => {
  await using bed = await bedFor({}, "contact: old@example.com");
  await issue(bed);
  bed.configure({ settings: "keyTypes: ec\ncontact: new@example.com more@example.com" });
  discard(bed);
  assert.deepEqual(await issue(bed), { newAccount: 0, account: 1, keyChange: 0 });
  assert.deepEqual(bed.ca.accounts.map(({ contact }) => contact), [[
    "mailto:new@example.com",
    "mailto:more@example.com",
  ]]);
  discard(bed);
  assert.deepEqual(await issue(bed), { newAccount: 0, account: 0, keyChange: 0 });
});

Deno.test("a contact that the CA refuses stops no certificate, and is told again the next time", async () => {
  await using bed = await bedFor({}, "contact: old@example.com");
  await issue(bed);
  bed.configure({ settings: "keyTypes: ec\ncontact: ops@nowhere.invalid" });
  for (let night = 0; night < 2; night++) {
    discard(bed);
    bed.ca.switches.fault = befalling("account", refusing(400, "invalidContact", "no such domain"));
    const ran = await bed.run();
    assert.equal(ran.code, 0, ran.stderr);
    assert.match(ran.stdout, /the CA refuses the contact: no such domain \(invalidContact\)/);
  }
});

Deno.test("a changed CA leads to a new registration there, and the first is remembered", async () => {
  await using bed = await bedFor();
  await using second = await secondCa(bed);
  const { fetch } = second;
  await issue(bed, { fetch });
  const settings = (ca: Ca) => ({
    settings: `keyTypes: ec\ncaBundle: both.pem\ntestDirectory: ${ca.directoryUrl}`,
  });

  bed.configure(settings(second.ca));
  const idle = await bed.run({ fetch });
  assert.deepEqual(
    [idle.code, idle.stderr, second.ca.log.length],
    [0, "", 0],
    "not asked about another's certificate",
  );
  discard(bed);
  assert.deepEqual((await bed.run({ fetch })).code, 0);
  only(second.ca);
  assert.equal(second.ca.issued[0]?.replaces, undefined);

  bed.configure(settings(bed.ca));
  discard(bed);
  assert.deepEqual(await issue(bed, { fetch }), { newAccount: 0, account: 0, keyChange: 0 });
  only(bed.ca);
});

Deno.test("a changed account key leads to a new registration, and its former account is remembered", async () => {
  await using bed = await bedFor();
  await issue(bed);
  const first = bed.text("account.key");
  const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
  await Deno.writeTextFile(
    bed.path("account.key"),
    privateKey.export({ type: "pkcs8", format: "pem" }) as string,
  );
  discard(bed);
  assert.deepEqual(await issue(bed), { newAccount: 1, account: 0, keyChange: 0 });
  assert.equal(bed.ca.accounts.length, 2);
  await Deno.writeTextFile(bed.path("account.key"), first);
  discard(bed);
  assert.deepEqual(await issue(bed), { newAccount: 0, account: 0, keyChange: 0 });
});

// ---- another key -------------------------------------------------------------------------------------------------

Deno.test("--rollover gives the account another key, and everything goes on under it", async () => {
  await using bed = await bedFor();
  await issue(bed);
  const before = only(bed.ca);
  const old = bed.text("account.key");
  const { code, stdout, stderr } = await bed.lematt("--test", "--rollover");
  assert.deepEqual([code, stderr], [0, ""]);
  assert.match(stdout, /^changed .*account\.key, the account key \(P-256\); keep a copy of it\n$/);
  const after = only(bed.ca);
  assert.equal(after.url, before.url);
  assert.notEqual(after.thumbprint, before.thumbprint);
  assert.deepEqual(keyFiles(bed), CHANGED);
  assert.equal(bed.text(`account.key.old-${before.thumbprint}`), old);
  const { accounts } = JSON.parse(bed.text("test/state.json"));
  assert.deepEqual(Object.keys(accounts), [`${bed.ca.directoryUrl} ${after.thumbprint}`]);

  bed.ca.advance(80 * DAY);
  assert.deepEqual(await issue(bed), { newAccount: 0, account: 0, keyChange: 0 });
  assert.equal(bed.ca.issued[1]!.replaces, bed.ca.issued[0]!.certId, "it is the same account still");
});

Deno.test("--rollover replaces an RSA key, and registers an account that is not there yet", async () => {
  await using bed = await bedFor();
  const { privateKey } = generateKeyPairSync("rsa", { modulusLength: 2048 });
  const pem = privateKey.export({ type: "pkcs1", format: "pem" }) as string;
  await Deno.writeTextFile(bed.path("account.key"), pem, { mode: 0o600 });
  assert.deepEqual(await roll(bed), ["changed"]);
  only(bed.ca);
  assert.match(bed.text("account.key"), /^-----BEGIN PRIVATE KEY-----/);
  assert.deepEqual(keyFiles(bed), CHANGED);
  await issue(bed);
});

for (
  const [what, fault, message] of [
    [
      "refuses",
      befalling("keyChange", refusing(403, "unauthorized", "not today")),
      "not today (unauthorized)",
    ],
    [
      "has an account with that key",
      befalling("keyChange", { kind: "status", status: 409, contentType: "text/plain" }),
      "HTTP status 409 (text/plain)",
    ],
    [
      "is down",
      befalling("keyChange", { kind: "status", status: 500 }, 9),
      "HTTP status 500 (application/problem+json)",
    ],
    [
      "does not offer it",
      befalling("directory", {
        kind: "rewrite",
        rewrite: ({ keyChange: _, ...rest }) => rest,
      }),
      "the CA does not offer it",
    ],
  ] as [string, Switches["fault"], string][]
) {
  Deno.test(`where the CA ${what}, --rollover changes nothing, and the next run finds nothing amiss`, async () => {
    await using bed = await bedFor();
    await issue(bed);
    const before = only(bed.ca);
    const key = bed.text("account.key");
    bed.ca.switches.fault = fault;
    await assert.rejects(roll(bed), { name: "AcmeError", message });
    bed.ca.switches.fault = undefined;
    assert.equal(bed.text("account.key"), key);
    discard(bed);
    await issue(bed);
    assert.deepEqual(only(bed.ca), before);
    assert.deepEqual(keyFiles(bed), ONE_KEY);
  });
}

/** How an answer is lost, or does not come at all. */
const LOST: readonly [string, Fault][] = [
  ["torn", { kind: "reset" }],
  ["500", { kind: "status", status: 500 }],
  ["HTML", { kind: "status", status: 502, contentType: "text/html", body: "<h1>Bad gateway" }],
  ["a refusal that makes no sense", refusing(400, "malformed", "what?")],
];
for (const [what, fault] of LOST) {
  Deno.test(`where the CA has changed the key and the answer is lost (${what}), --rollover finds out`, async () => {
    await using bed = await bedFor();
    await issue(bed);
    bed.ca.switches.fault = befalling("keyChange", { kind: "after", fault });
    assert.deepEqual(await roll(bed), ["changed"]);
    bed.ca.violations.splice(0); // the second try, signed with a key that is the account's no more
    discard(bed);
    assert.deepEqual(await issue(bed), { newAccount: 0, account: 0, keyChange: 0 });
    only(bed.ca);
    assert.deepEqual(keyFiles(bed), CHANGED);
  });
}

Deno.test("where the CA has changed the key and is gone then, the next run finds out", async () => {
  await using bed = await bedFor();
  await issue(bed);
  let told = false;
  bed.ca.switches.fault = ({ resource }) => {
    const gone: Fault = { kind: "status", status: 503 };
    if (told) return gone;
    told = resource === "keyChange";
    return told ? { kind: "after", fault: gone } : undefined;
  };
  await assert.rejects(roll(bed), { name: "AcmeError" });
  assert.deepEqual(keyFiles(bed), PENDING);
  bed.ca.switches.fault = undefined;
  discard(bed);
  assert.deepEqual((await bed.run()).code, 0);
  only(bed.ca);
  assert.deepEqual(keyFiles(bed), CHANGED);
});

const HELD: Fault = { kind: "silence" };
for (
  const [what, fault, copied, expected] of [
    ["before the CA is told", HELD, false, ONE_KEY],
    ["after the CA was told", { kind: "after", fault: HELD }, false, CHANGED],
    ["before the keys change places", { kind: "after", fault: HELD }, true, CHANGED],
  ] as [string, Fault, boolean, string[]][]
) {
  Deno.test(`--rollover killed ${what} loses no account`, async () => {
    await using bed = await bedFor();
    await issue(bed);
    const { url, thumbprint } = only(bed.ca);
    bed.ca.switches.fault = befalling("keyChange", fault);
    const program = bed.start("--test", "--rollover");
    await until("the CA is asked", () => bed.ca.log.some(({ resource }) => resource === "keyChange"));
    if (fault !== HELD) await until("it has done it", () => only(bed.ca).thumbprint !== thumbprint);
    program.kill("SIGKILL");
    await program.output();
    assert.deepEqual(keyFiles(bed), PENDING);
    if (copied) await Deno.copyFile(bed.path("account.key"), bed.path(`account.key.old-${thumbprint}`));
    bed.ca.switches.fault = undefined;

    discard(bed);
    await issue(bed);
    assert.equal(only(bed.ca).url, url);
    assert.deepEqual(keyFiles(bed), expected);
    discard(bed);
    assert.deepEqual(await issue(bed), { newAccount: 0, account: 0, keyChange: 0 });
  });
}

Deno.test("a run that was cut off between the keys in place and the state written goes on under the same account", async () => {
  await using bed = await bedFor();
  await issue(bed);
  const state = bed.text("test/state.json");
  await roll(bed);
  await Deno.writeTextFile(bed.path("test/state.json"), state);
  const { url } = only(bed.ca);
  discard(bed);
  await issue(bed);
  assert.equal(only(bed.ca).url, url);
  assert.deepEqual(keyFiles(bed), CHANGED);
});

// ---- one key at two CAs ------------------------------------------------------------------------------------------

Deno.test("a key that was changed at one CA, twice, is changed at the other in its next run", async () => {
  await using bed = await bedFor();
  await using second = await secondCa(bed);
  const { fetch } = second;
  await issue(bed, { fetch });
  assert.equal((await bed.run({ mode: "prod", fetch })).code, 0);
  const before = only(second.ca);
  assert.equal(only(bed.ca).thumbprint, before.thumbprint);

  await roll(bed, "test", { fetch });
  await roll(bed, "test", { fetch });
  assert.deepEqual(only(second.ca), before);
  discard(bed, "prod");
  assert.equal((await bed.run({ mode: "prod", fetch })).code, 0);
  assert.equal(only(second.ca).url, before.url);
  assert.equal(only(second.ca).thumbprint, only(bed.ca).thumbprint);
  const { accounts } = JSON.parse(bed.text("prod/state.json"));
  assert.equal(Object.keys(accounts).length, 1);
});

Deno.test("the account key, changed at two CAs at the same moment, loses the account of neither", async () => {
  await using bed = await bedFor();
  await using second = await secondCa(bed);
  const { fetch } = second;
  const modes = ["test", "prod"] as const;
  for (const mode of modes) await issue(bed, { mode, fetch });
  const before = [bed.ca, second.ca].map((ca) => only(ca).url);
  const gate = Promise.withResolvers<void>();
  let told = 0;
  const together: TestWorld["fetch"] = async (url, init) => {
    const response = await fetch(url, init);
    if (new URL(url).pathname === "/key-change" && ++told === modes.length) gate.resolve();
    if (new URL(url).pathname === "/key-change") await gate.promise;
    return response;
  };
  await Promise.all(modes.map((mode) => roll(bed, mode, { fetch: together })));
  for (const mode of modes) {
    discard(bed, mode);
    await issue(bed, { mode, fetch });
  }
  assert.deepEqual([bed.ca, second.ca].map((ca) => only(ca).url), before);
});

Deno.test("a change of key that was cut off at one CA is none of the other's business", async () => {
  await using bed = await bedFor();
  await using second = await secondCa(bed);
  const { ca, fetch } = second;
  await issue(bed, { fetch });
  await bed.run({ mode: "prod", fetch });
  const { url } = only(ca);
  let told = false;
  ca.switches.fault = ({ resource }) => {
    if (told) return { kind: "status", status: 503 };
    told = resource === "keyChange";
    return told ? { kind: "after", fault: { kind: "reset" } } : undefined;
  };
  await assert.rejects(roll(bed, "prod", { fetch }));
  ca.switches.fault = undefined;

  // the other CA knows nothing of that key, which is no reason to throw it away
  discard(bed);
  assert.deepEqual(await issue(bed, { fetch }), { newAccount: 0, account: 0, keyChange: 0 });
  await roll(bed, "test", { fetch });
  discard(bed, "prod");
  assert.equal((await bed.run({ mode: "prod", fetch })).code, 0);
  assert.equal(only(ca).url, url);
  discard(bed);
  assert.deepEqual(await issue(bed, { fetch }), { newAccount: 1, account: 0, keyChange: 1 }); // the 1 only looks
  assert.equal(only(ca).thumbprint, only(bed.ca).thumbprint);
});

for (
  const [what, fault, runs] of [
    ["an answer that is lost", befalling("keyChange", { kind: "after", fault: { kind: "reset" } }), [1, 0]],
    ["a CA that refuses for now", befalling("keyChange", refusing(429, "rateLimited", "later")), [1, 0]],
    ["a CA that changes no keys", ({ resource }) =>
      resource !== "directory" ? undefined : {
        kind: "rewrite",
        rewrite: ({ keyChange: _, ...rest }) => rest,
      }, [0]],
  ] as [string, Switches["fault"], number[]][]
) {
  Deno.test(`${what} costs no account where the key was changed at another CA`, async () => {
    await using bed = await bedFor();
    await using second = await secondCa(bed);
    const { ca, fetch } = second;
    await issue(bed, { fetch });
    await bed.run({ mode: "prod", fetch });
    const { url } = only(ca);
    await roll(bed, "test", { fetch });
    ca.switches.fault = fault;
    discard(bed, "prod");
    const codes: number[] = [];
    for (const _ of runs) codes.push((await bed.run({ mode: "prod", fetch, retry: true })).code);
    assert.deepEqual(codes, runs);
    assert.equal(only(ca).url, url);
    assert.equal(ca.issued.length, 2);
  });
}

Deno.test("an account that the other CA has forgotten is registered anew, under the present key", async () => {
  await using bed = await bedFor();
  await using second = await secondCa(bed);
  const { ca, fetch } = second;
  await issue(bed, { fetch });
  await bed.run({ mode: "prod", fetch });
  await roll(bed, "test", { fetch });

  const state = JSON.parse(bed.text("prod/state.json"));
  for (const name of Object.keys(state.accounts)) state.accounts[name].url = `${ca.origin}/account/99`;
  await Deno.writeTextFile(bed.path("prod/state.json"), JSON.stringify(state));
  Object.assign(ca.accounts[0]!.key, { thumbprint: "of nobody" });

  discard(bed, "prod");
  const ran = await bed.run({ mode: "prod", fetch });
  assert.equal(ran.code, 0, ran.stderr);
  assert.deepEqual(ca.accounts.slice(1).map(({ key }) => key.thumbprint), [only(bed.ca).thumbprint]);
  ca.violations.splice(0); // asked under the remembered URL, which is how the loss is noticed
});
