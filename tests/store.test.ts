/** Goal: the names of the original, files that are whole or not there, and a directory of the original taken over. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createPrivateKey, createPublicKey } from "node:crypto";
import { basename, join } from "node:path";
import type { Config, KeyType, Line } from "../lib/config.ts";
import { plan } from "../lib/plan.ts";
import {
  createSecret,
  emptyState,
  type Entry,
  filesOf,
  readInventory,
  readState,
  stemOf,
  Store,
} from "../lib/store.ts";
import { generateKey, readCertificate } from "../lib/x509.ts";
import { type Ca, startCa } from "./ca.ts";

const NOW = new Date();
const DAY = 86_400_000;
const NOTHING = { failures: {}, revoked: {}, hold: new Date(0), suggested: new Map(), nextRun: NOW };

/** A configuration over a temporary directory that is removed with it. */
function configure(...lines: string[][]): Config & Disposable {
  return configureFor("prod", lines);
}

function configureFor(mode: "test" | "prod", lines: string[][]): Config & Disposable {
  const directory = Deno.makeTempDirSync({ prefix: "lematt-store-" });
  return {
    mode,
    base: join(directory, mode),
    directory,
    accountKey: join(directory, "account.key"),
    rsaTag: "rsa2048",
    curveTag: "prime256v1",
    keyTypes: ["rsa", "ec"],
    reauthorizeDays: 15,
    generateNewCertsAfterDays: 0,
    lines: lines.map((names, index): Line => ({
      line: index + 1,
      names,
      sections: [],
      keyTypes: ["rsa", "ec"],
      formerNames: [],
    })),
    [Symbol.dispose]: () => Deno.removeSync(directory, { recursive: true }),
  } as unknown as Config & Disposable;
}

async function issue(ca: Ca, names: readonly string[], keyType: KeyType, keyPem?: string) {
  keyPem ??= await generateKey(
    keyType === "rsa" ? { type: "rsa", bits: 2048 } : { type: "ec", curve: "P-256" },
  );
  const chainPem = ca.forge({
    publicKey: createPublicKey(createPrivateKey(keyPem)),
    identifiers: names.map((value) => ({ type: "dns", value })),
    notBefore: new Date(NOW.getTime() - DAY),
    notAfter: new Date(NOW.getTime() + 89 * DAY),
  });
  return { keyPem, chainPem, csrPem: "a request\n", certificate: readCertificate(chainPem) };
}

const kinds = (inventory: readonly Entry[]) => inventory.map(({ finding }) => finding.kind);
const modeOf = (path: string) => Deno.lstatSync(path).mode! & 0o777;

Deno.test("stemOf() joins the names, and shortens what no file name can hold", () => {
  using config = configure();
  const stem = (...names: string[]) => stemOf(config, names);
  assert.equal(stem("example.com"), "example.com");
  assert.equal(stem("example.com", "www.example.com"), "example.com_www.example.com");
  assert.equal(stem("*.example.com", "2001:db8::7"), "_wildcard.example.com_2001-db8--7");
  const end = "-cert-combined.prime256v1.pem".length;
  const fits = `${"a".repeat(60)}.${"b".repeat(255 - end - 61)}`;
  assert.equal(stem(fits), fits);
  assert.match(stem("example.com", `${fits}`), /^example\.com_2names_[0-9a-f]{12}$/);
  const long = stem(`${fits}c`);
  assert.match(long, /^a{60}\.b+_1names_[0-9a-f]{12}$/);
  assert.equal(long.length + end, 255);
});

Deno.test("a commit makes the original's files, links and modes, whatever the umask", async () => {
  await using ca = await startCa();
  for (const umask of [0o000, 0o022, 0o077]) {
    using config = configureFor("test", [["example.com", "www.example.com"]]);
    const before = Deno.umask(umask);
    try {
      using store = Store.open(config, NOW);
      for (const entry of readInventory(config)) {
        await store.commit(entry, await issue(ca, entry.line.names, entry.keyType));
      }
    } finally {
      Deno.umask(before);
    }
    assert.deepEqual(kinds(readInventory(config)), ["present", "present"]);
    const base = join(config.directory, "test");
    assert.equal(modeOf(join(base, "key")), 0o700);
    const stem = "example.com_www.example.com";
    for (const tag of ["rsa2048", "prime256v1"]) {
      assert.equal(modeOf(join(base, `key/${stem}-key.${tag}.test.pem`)), 0o600);
      assert.equal(modeOf(join(base, `cert/${stem}-cert-combined.${tag}.test.pem`)), 0o644);
      assert.equal(modeOf(join(base, `csr/${stem}-csr.${tag}.test.csr`)), 0o644);
      for (const name of ["example.com", "www.example.com"]) {
        assert.equal(
          Deno.readLinkSync(join(base, `key/${name}-key.${tag}.test.pem`)),
          `${stem}-key.${tag}.test.pem`,
        );
        assert.equal(
          Deno.readLinkSync(join(base, `cert/${name}-cert-combined.${tag}.test.pem`)),
          `${stem}-cert-combined.${tag}.test.pem`,
        );
      }
    }
    const files = ["key", "cert", "csr"].flatMap((name) => [...Deno.readDirSync(join(base, name))]);
    assert.equal(files.length, 6 + 6 + 2, "nothing else is left");
  }
});

Deno.test("an inventory tells what is wrong with each pair of files", async () => {
  await using ca = await startCa();
  using config = configure(["example.com"]);
  const [entry] = readInventory(config);
  const files = filesOf(config, entry!);
  using store = Store.open(config, NOW);
  const issued = await issue(ca, ["example.com"], "rsa");
  const finding = () => readInventory(config)[0]!.finding;
  assert.deepEqual(finding(), { kind: "missing", what: "certificate" });
  await store.commit(entry!, issued);
  assert.equal(finding().kind, "present");

  Deno.writeTextFileSync(files.key, (await issue(ca, ["example.com"], "rsa")).keyPem);
  assert.equal(finding().kind, "other key");
  Deno.writeTextFileSync(files.key, issued.keyPem.slice(0, 300));
  assert.deepEqual(finding(), {
    kind: "unreadable",
    what: "key",
    detail: "not an unencrypted PEM private key",
  });
  Deno.removeSync(files.key);
  assert.deepEqual(finding(), { kind: "missing", what: "key" });
  Deno.writeTextFileSync(files.key, issued.keyPem);
  Deno.writeTextFileSync(files.cert, (await issue(ca, ["a.example.com"], "rsa", issued.keyPem)).chainPem);
  assert.equal(finding().kind, "other names");
  Deno.writeTextFileSync(files.cert, "");
  assert.deepEqual(finding(), { kind: "unreadable", what: "certificate", detail: "not a PEM certificate" });
  Deno.removeSync(files.cert);
  Deno.mkdirSync(files.cert);
  assert.deepEqual(finding(), { kind: "unreadable", what: "certificate", detail: "EISDIR" });
});

Deno.test("a directory that the original wrote is taken over: nothing is due and no file changes", async () => {
  await using ca = await startCa();
  // what differs in the last label alone stood in any order there
  using config = configure(
    ["mail.example.com"],
    ["example.com", "www.example.com", "shop.example.com"],
    ["example.de", "example.net", "example.org"],
  );
  const base = join(config.directory, "prod");
  for (const name of ["key", "csr", "cert"]) Deno.mkdirSync(join(base, name), { recursive: true });
  for (
    const names of [config.lines[0]!.names, config.lines[1]!.names, [
      "example.de",
      "example.org",
      "example.net",
    ]]
  ) {
    for (const [keyType, tag] of [["rsa", "rsa2048"], ["ec", "prime256v1"]] as const) {
      // as `openssl genrsa` and `openssl ecparam -genkey` wrote them
      const keyPem = execFileSync(
        "openssl",
        keyType === "rsa"
          ? ["genrsa", "-traditional", "2048"]
          : ["ecparam", "-genkey", "-name", "prime256v1"],
        { encoding: "utf8", stdio: "pipe" },
      );
      const { chainPem } = await issue(ca, names, keyType, keyPem);
      const stem = names.join("_");
      const [key, cert] = [`${stem}-key.${tag}.pem`, `${stem}-cert-combined.${tag}.pem`];
      Deno.writeTextFileSync(join(base, "key", key), keyPem, { mode: 0o600 });
      Deno.writeTextFileSync(join(base, "cert", cert), chainPem);
      if (names.length === 1) continue;
      for (const name of names) {
        Deno.symlinkSync(key, join(base, "key", `${name}-key.${tag}.pem`));
        Deno.symlinkSync(cert, join(base, "cert", `${name}-cert-combined.${tag}.pem`));
      }
    }
  }
  const listing = () =>
    execFileSync("ls", ["-lR", "--time-style=full-iso", join(base, "key"), join(base, "cert")]);
  const before = listing();
  {
    using store = Store.open(config, NOW);
    const inventory = readInventory(config);
    for (const entry of inventory) store.link(entry);
    const { tasks, kept } = plan(config, inventory, NOW, NOTHING);
    assert.equal(tasks.length, 0);
    assert.equal(kept.length, 6);
  }
  assert.deepEqual(listing(), before);
});

Deno.test("a name that has a line of its own keeps its file; of two lines of several, the first has the link", async () => {
  await using ca = await startCa();
  using config = configure(["a.example", "b.example"], ["b.example"], ["c.example", "a.example"]);
  using store = Store.open(config, NOW);
  for (const entry of readInventory(config).toReversed()) {
    await store.commit(entry, await issue(ca, entry.line.names, entry.keyType));
  }
  const certs = join(config.directory, "prod/cert");
  const what = (name: string) => {
    const path = join(certs, `${name}-cert-combined.prime256v1.pem`);
    return Deno.lstatSync(path).isSymlink ? Deno.readLinkSync(path).split("-cert")[0] : "file";
  };
  assert.deepEqual(["a.example", "b.example", "c.example"].map(what), [
    "a.example_b.example",
    "file",
    "c.example_a.example",
  ]);
  const [rsa] = readInventory(config);
  assert.deepEqual(store.pathsOf(rsa!).certs.map((path) => basename(path)), [
    "a.example_b.example-cert-combined.rsa2048.pem",
    "a.example-cert-combined.rsa2048.pem",
  ]);
});

Deno.test("a link is no key of its own: a name that gets a line of its own gets a key of its own", async () => {
  await using ca = await startCa();
  using before = configure(["example.com", "www.example.com"]);
  {
    using store = Store.open(before, NOW);
    for (const entry of readInventory(before)) {
      await store.commit(entry, await issue(ca, entry.line.names, entry.keyType));
    }
  }
  const after: Config = {
    ...before,
    lines: [{ line: 1, names: ["www.example.com"], sections: [], keyTypes: ["rsa", "ec"], formerNames: [] }],
  };
  using store = Store.open(after, NOW);
  const [entry] = readInventory(after);
  assert.equal(entry!.finding.kind, "other names");
  assert.equal(store.keyOf(entry!), undefined);
});

Deno.test("a run cut off between its two renames is completed by the next, one cut off before is undone", async () => {
  await using ca = await startCa();
  using config = configure(["example.com"]);
  const [entry] = readInventory(config);
  const files = filesOf(config, entry!);
  const [first, second] = [await issue(ca, ["example.com"], "rsa"), await issue(ca, ["example.com"], "rsa")];
  const fingerprint = () => {
    const { finding } = readInventory(config)[0]!;
    return finding.kind === "present" ? finding.certificate.fingerprint : finding.kind;
  };
  const temporaries = () =>
    [...Deno.readDirSync(join(config.directory, "prod/cert"))].map(({ name }) => name);

  const failing = async (path: string, issued: typeof first) => {
    // a directory where the file should be lets the rename fail, and leaves what a run cut off there would leave
    Deno.removeSync(path);
    Deno.mkdirSync(path);
    using store = Store.open(config, NOW);
    await assert.rejects(store.commit(entry!, issued));
    Deno.removeSync(path);
  };
  {
    using store = Store.open(config, NOW);
    await store.commit(entry!, first);
  }
  await failing(files.cert, second);
  assert.equal(temporaries().length, 1);
  assert.equal(fingerprint(), "missing");
  Store.open(config, NOW)[Symbol.dispose]();
  assert.equal(
    fingerprint(),
    second.certificate.fingerprint,
    "the new key was in place, so the certificate follows",
  );

  await failing(files.key, first);
  Deno.writeTextFileSync(files.key, second.keyPem, { mode: 0o600 });
  assert.equal(fingerprint(), second.certificate.fingerprint);
  Store.open(config, NOW)[Symbol.dispose]();
  assert.equal(fingerprint(), first.certificate.fingerprint, "both were complete, so both take their place");
  assert.deepEqual(temporaries(), [basename(files.cert)]);

  const lone = join(config.directory, "prod/key/.0123456789abcdef.new");
  Deno.writeTextFileSync(lone, first.keyPem);
  Store.open(config, NOW)[Symbol.dispose]();
  assert.throws(() => Deno.statSync(lone), Deno.errors.NotFound, "half of a pair is removed");
});

Deno.test("state is kept for the next run; one that cannot be used is set aside and said aloud", async () => {
  using config = configureFor("test", [["example.com"]]);
  {
    using store = Store.open(config, NOW);
    store.state.accounts["https://ca key"] = { url: "https://ca/account/1", contact: [], issuers: [] };
    await Promise.all([store.saveState(), store.saveState(), store.saveState()]);
    store.state.accounts["https://ca other"] = { url: "https://ca/account/2", contact: [], issuers: [] };
    await store.saveState();
  }
  const accounts = {
    "https://ca key": { url: "https://ca/account/1", contact: [], issuers: [] },
    "https://ca other": { url: "https://ca/account/2", contact: [], issuers: [] },
  };
  assert.deepEqual(readState(config), { ...emptyState(), accounts });
  const path = join(config.directory, "test/state.json");
  assert.equal(modeOf(path), 0o600);
  const unusable: [string, RegExp][] = [
    ["", /not JSON/],
    ['{"version": 1, "owed": {', /not JSON/],
    ["[]", /version/],
    ['{"version": 2}', /version 2 is not known here/],
    ['{"version": 1, "accounts": {"a": 1}}', /not as lematt writes it/],
    ['{"version": 1, "owed": {"mail": {"since": "yesterday"}}}', /not as lematt writes it/],
  ];
  for (const [index, [text, why]] of unusable.entries()) {
    Deno.writeTextFileSync(path, text);
    using store = Store.open(config, new Date(NOW.getTime() + index));
    assert.match(store.notices.join(), why);
    assert.deepEqual(store.state, emptyState());
    const aside = /set aside as (\S+),/.exec(store.notices.join())![1]!;
    assert.equal(Deno.readTextFileSync(join(config.directory, "test", aside)), text);
  }
});

Deno.test("the lock keeps a second run out, and goes with its process", () => {
  using config = configureFor("test", [["example.com"]]);
  {
    using _store = Store.open(config, NOW);
    assert.throws(() => Store.open(config, NOW), { name: "LockedError" });
    Store.open({ ...config, mode: "prod", base: join(config.directory, "prod") }, NOW)[Symbol.dispose]();
  }
  Store.open(config, NOW)[Symbol.dispose]();
});

Deno.test("createSecret() never replaces what is there", async () => {
  using config = configure();
  const path = join(config.directory, "private/account.key");
  await createSecret(path, "one\n");
  assert.equal(modeOf(path), 0o600);
  assert.equal(modeOf(join(config.directory, "private")), 0o700);
  await assert.rejects(createSecret(path, "two\n"), Deno.errors.AlreadyExists);
  assert.equal(Deno.readTextFileSync(path), "one\n");
  assert.deepEqual([...Deno.readDirSync(join(config.directory, "private"))].map(({ name }) => name), [
    "account.key",
  ]);
});
