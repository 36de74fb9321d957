/** Goal: the names of the original, files that are whole or not there, owned as before, and a directory of the original taken over. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { createPrivateKey, createPublicKey } from "node:crypto";
import { basename, join } from "node:path";
import type { Config, KeyType, Line } from "../lib/config.ts";
import { plan } from "../lib/plan.ts";
import { emptyState } from "../lib/state.ts";
import { changingLinks, type Entry, orphans, readInventory, readState, stemOf, Store } from "../lib/store.ts";
import { generateKey, publicKeyHash, readCertificate } from "../lib/x509.ts";
import { testBed } from "./bed.ts";
import { startCa } from "./ca.ts";
import { missing as noStrace } from "./faults-strace.ts";

const NOW = new Date();
const HOUR = 3_600_000;
const DAY = 24 * HOUR;
const NOBODY = 65534;
const isRoot = Deno.uid() === 0;

// ---- a configuration over a temporary directory ------------------------------------------------------------------

function configure(...lines: string[]): Config & Disposable {
  const directory = Deno.realPathSync(Deno.makeTempDirSync({ prefix: "lematt-store-" }));
  return {
    ...{ mode: "test", directory, base: join(directory, "test"), accountKey: join(directory, "account.key") },
    ...{ rsaTag: "rsa2048", curveTag: "prime256v1", directoryUrl: "https://ca", ari: true },
    ...{ sections: [], generateNewCertsAfterDays: 0, lines: linesOf(...lines) },
    [Symbol.dispose]: () => Deno.removeSync(directory, { recursive: true }),
  } as unknown as Config & Disposable;
}

function linesOf(...lines: string[]): Line[] {
  return lines.map((names, index) => (
    { line: index + 1, names: names.split(" "), sections: [], keyTypes: ["ec"], formerNames: [] }
  ));
}

/** The same directory with other lines. */
function changed(config: Config, ...lines: string[]): Config {
  return { ...config, lines: linesOf(...lines) };
}

const ca = await startCa();
addEventListener("unload", () => void ca.close());

async function issue(names: readonly string[], { keyType = "ec", keyPem, life = 90 * DAY, age = DAY }: {
  keyType?: KeyType;
  keyPem?: string;
  life?: number;
  age?: number;
} = {}) {
  keyPem ??= await generateKey(
    keyType === "rsa" ? { type: "rsa", bits: 2048 } : { type: "ec", curve: "P-256" },
  );
  const notBefore = new Date(NOW.getTime() - age);
  const chainPem = ca.forge({
    publicKey: createPublicKey(createPrivateKey(keyPem)),
    identifiers: names.map((value) => ({ type: "dns", value })),
    notBefore,
    notAfter: new Date(notBefore.getTime() + life),
  });
  return { keyPem, chainPem, csrPem: "a request\n", certificate: readCertificate(chainPem) };
}

/** Opens the store, puts a new certificate of every line in its place, and closes it. */
async function issueAll(config: Config): Promise<Entry[]> {
  using store = await Store.open(config, NOW);
  const committed: Entry[] = [];
  for (const entry of readInventory(config)) {
    committed.push(await store.commit(entry, await issue(entry.line.names, entry)));
  }
  return committed;
}

const open = (config: Config) => Store.open(config, NOW);
const close = (store: Store) => store[Symbol.dispose]();
const kinds = (config: Config) => readInventory(config).map(({ finding }) => finding.kind).join();
const modeOf = (path: string) => (Deno.lstatSync(path).mode! & 0o777).toString(8);
const listing = (...path: string[]) => [...Deno.readDirSync(join(...path))].map(({ name }) => name).sort();
function fingerprintOf(config: Config): string {
  const { finding } = readInventory(config)[0]!;
  return finding.kind === "present" ? finding.certificate.fingerprint : finding.kind;
}

// ---- names -------------------------------------------------------------------------------------------------------

Deno.test("stemOf() joins the names, and shortens what no file name can hold", () => {
  using config = configure();
  const stem = (...names: string[]) => stemOf({ ...config, mode: "prod" }, names);
  assert.equal(stem("example.com"), "example.com");
  assert.equal(stem("example.com", "www.example.com"), "example.com_www.example.com");
  assert.equal(stem("*.example.com", "2001:db8::7"), "_wildcard.example.com_2001-db8--7");
  const end = "-cert-combined.prime256v1.pem".length;
  const fits = `${"a".repeat(60)}.${"b".repeat(255 - end - 61)}`;
  assert.equal(stem(fits), fits);
  assert.match(stem("example.com", fits), /^example\.com_2names_[0-9a-f]{12}$/);
  const long = stem(`${fits}c`);
  assert.match(long, /^a{60}\.b+_1names_[0-9a-f]{12}$/);
  assert.equal(long.length + end, 255);
});

Deno.test("a commit makes the original's files, links and modes, and leaves nothing else", async () => {
  using config = configure("example.com www.example.com");
  const [entry] = await issueAll(config);
  assert.equal(kinds(config), "present");
  const at = (path: string) => join(config.base, path.replace("@", "prime256v1.test"));
  const stem = "example.com_www.example.com";
  assert.deepEqual(
    [entry!.files.key, entry!.files.cert, entry!.files.csr],
    [at(`key/${stem}-key.@.pem`), at(`cert/${stem}-cert-combined.@.pem`), at(`csr/${stem}-csr.@.csr`)],
  );
  assert.deepEqual(["key", "cert", "csr"].map((name) => modeOf(at(name))), ["700", "755", "755"]);
  const { key, cert, csr } = entry!.files;
  assert.deepEqual([key, cert, csr].map(modeOf), ["600", "644", "644"]);
  for (const name of ["example.com", "www.example.com"]) {
    assert.equal(Deno.readLinkSync(at(`key/${name}-key.@.pem`)), basename(key));
    assert.equal(Deno.readLinkSync(at(`cert/${name}-cert-combined.@.pem`)), basename(cert));
  }
  const counts = ["key", "cert", "csr"].map((name) => listing(config.base, name).length);
  assert.deepEqual(counts, [3, 3, 1]);
});

Deno.test("a directory that the original wrote is taken over: nothing is due and no file changes", async () => {
  // what differs in the last label alone stood in any order there
  const [single, bundle, chance] = [
    "mail.example.com",
    "example.com www.example.com shop.example.com",
    "a.de a.net a.org",
  ];
  using config = configure(single!, bundle!, chance!);
  for (const name of ["key", "csr", "cert"]) Deno.mkdirSync(join(config.base, name), { recursive: true });
  for (const names of [single!, bundle!, "a.de a.org a.net"].map((names) => names.split(" "))) {
    const ecparam = ["ecparam", "-genkey", "-name", "prime256v1"]; // as the original made them
    const keyPem = execFileSync("openssl", ecparam, { encoding: "utf8", stdio: "pipe" });
    const { chainPem } = await issue(names, { keyPem });
    const [key, cert] = ["key", "cert-combined"].map((what) => `-${what}.prime256v1.test.pem`);
    Deno.writeTextFileSync(join(config.base, "key", names.join("_") + key), keyPem, { mode: 0o600 });
    Deno.writeTextFileSync(join(config.base, "cert", names.join("_") + cert), chainPem);
    for (const name of names.length === 1 ? [] : names) {
      Deno.symlinkSync(names.join("_") + key, join(config.base, "key", name + key));
      Deno.symlinkSync(names.join("_") + cert, join(config.base, "cert", name + cert));
    }
  }
  const all = () =>
    execFileSync("ls", [
      "-lR",
      "--time-style=full-iso",
      ...["key", "cert"].map((name) => join(config.base, name)),
    ]);
  const before = all();
  {
    using store = await open(config);
    const inventory = readInventory(config);
    for (const entry of inventory) store.link(entry);
    const { tasks, kept } = plan(config, inventory, emptyState(), NOW);
    assert.deepEqual([tasks.length, kept.length], [0, 3]);
    assert.deepEqual(orphans(config, inventory), []);
  }
  assert.deepEqual(all(), before);
});

Deno.test("files under a spelling of the original's are found, and renewed under it", async () => {
  using config = configure("example.com WWW.example.com");
  const [{ files }] = await issueAll(config) as [Entry];
  const [line] = linesOf("example.com www.example.com");
  const lower = { ...config, lines: [{ ...line!, formerNames: [["example.com", "WWW.example.com"]] }] };
  const [entry] = readInventory(lower);
  assert.deepEqual(entry!.files, files);
  assert.equal(entry!.finding.kind, "present");
  await issueAll(lower);
  assert.equal(kinds(lower), "present");
  assert.equal(listing(config.base, "csr").length, 1);
  // what a service reads under an old name is neither an orphan nor left out of deliveries
  assert.deepEqual(orphans(lower, [entry!]), []);
  using store = await open(lower);
  assert.deepEqual(store.pathsOf(entry!).certs.map((path) => basename(path).split("-")[0]), [
    "example.com_WWW.example.com",
    "example.com",
    "www.example.com",
    "WWW.example.com",
  ]);
});

Deno.test("a name that has a line of its own keeps its file; of two lines of several, the first has the link", async () => {
  using config = configure("a.example b.example", "b.example", "c.example a.example");
  const [ab, b, ca] = await issueAll(config);
  const target = (name: string) => {
    const path = join(config.base, `cert/${name}-cert-combined.prime256v1.test.pem`);
    return Deno.lstatSync(path).isSymlink ? Deno.readLinkSync(path) : basename(path);
  };
  assert.deepEqual(["a.example", "b.example", "c.example"].map(target), [ab!.file, b!.file, ca!.file]);
  const swapped = changed(config, "c.example a.example", "a.example b.example", "b.example");
  assert.match(
    changingLinks(swapped, readInventory(swapped)).join(),
    /^a\.example-.* will point to c\.example_a\.example-/,
  );
  using store = await open(config);
  assert.deepEqual(store.pathsOf(ab!).certs.map((path) => basename(path).split("-")[0]), [
    "a.example_b.example",
    "a.example",
  ]);
});

// ---- what is found -----------------------------------------------------------------------------------------------

Deno.test("an inventory tells what is wrong with each pair of files", async () => {
  using config = configure("example.com");
  const [{ files }] = await issueAll(config) as [Entry];
  const [keyPem, chainPem] = [files.key, files.cert].map((path) => Deno.readTextFileSync(path));
  const rsa = await issue(["example.com"], { keyType: "rsa" });
  const other = await issue(["a.example.com"], { keyPem });
  const table: [what: string, key: string | undefined, cert: string | undefined, finding: object][] = [
    ["as it was", keyPem, chainPem, { kind: "present" }],
    ["no certificate", keyPem, undefined, { kind: "missing", what: "certificate" }],
    ["no key", undefined, chainPem, { kind: "missing", what: "key" }],
    ["another key", rsa.keyPem, chainPem, { kind: "other key" }],
    ["half a key", keyPem!.slice(0, 90), chainPem, { kind: "unreadable", what: "key" }],
    ["other names", keyPem, other.chainPem, { kind: "other names" }],
    ["no PEM", keyPem, "", { kind: "unreadable", what: "certificate" }],
    ["half a certificate", keyPem, chainPem!.slice(0, 90), { kind: "unreadable", what: "certificate" }],
  ];
  const put = (path: string, text: string | undefined) =>
    text === undefined ? Deno.removeSync(path) : Deno.writeTextFileSync(path, text);
  for (const [what, key, cert, expected] of table) {
    put(files.key, key);
    put(files.cert, cert);
    const { finding } = readInventory(config)[0]!;
    for (const [part, value] of Object.entries(expected)) assert.equal((finding as never)[part], value, what);
  }
  Deno.removeSync(files.cert);
  Deno.mkdirSync(files.cert);
  assert.deepEqual(readInventory(config)[0]!.finding, {
    kind: "unreadable",
    what: "certificate",
    detail: "EISDIR",
  });
});

Deno.test("when a short-lived certificate was put in place is known, since its CA may have back-dated it", async () => {
  using config = configure("example.com");
  const [entry] = readInventory(config);
  using store = await open(config);
  const issuedAt = async (life: number, age: number) => {
    await store.commit(entry!, await issue(["example.com"], { life, age }));
    return readInventory(config)[0]!.issuedAt;
  };
  const at = await issuedAt(2 * HOUR, HOUR);
  assert(at !== undefined && Math.abs(at.getTime() - Date.now()) < 60_000);
  assert.equal(await issuedAt(90 * DAY, HOUR), undefined);
  const copied = await issuedAt(6 * DAY, 5 * DAY);
  assert(copied !== undefined && Date.now() - copied.getTime() > 4.8 * DAY, "its file was copied");
  assert.equal(
    await issuedAt(HOUR, 2 * HOUR),
    undefined,
    "a file that is younger than its certificate's end says nothing",
  );
});

Deno.test("the certificate that a line had before its names changed stays in view until the new one is in place", async () => {
  using config = configure("example.com");
  const [{ finding, file }] = await issueAll(config) as [Entry];
  const former = (...lines: string[]) => {
    const now = changed(config, ...lines);
    return { now, inventory: readInventory(now), former: readInventory(now)[0]!.former };
  };
  const wider = former("example.com www.example.com");
  assert(finding.kind === "present");
  assert.equal(wider.former?.certificate.fingerprint, finding.certificate.fingerprint);
  assert.equal(wider.former?.file, file);
  assert.deepEqual(orphans(wider.now, wider.inventory), [], "neither certificate nor key are for --prune");
  assert.equal(
    former("example.com www.example.com", "example.com").former,
    undefined,
    "it is that of another line",
  );

  const [bundle] = await issueAll(wider.now);
  const wider2 = former("example.com mail.example.com www.example.com");
  assert.equal(wider2.former?.file, bundle!.file, "by the link of its first name");
  assert.deepEqual(orphans(wider2.now, wider2.inventory), []);
  assert.equal(kinds(changed(config, "example.com")), "other names");
  await issueAll(wider2.now);
  assert.deepEqual(orphans(wider2.now, readInventory(wider2.now)).map((path) => path.split("-")[0]), [
    "cert/example.com_www.example.com",
    "csr/example.com_www.example.com",
    "key/example.com_www.example.com",
  ]);
});

Deno.test("--prune moves what belongs to no line to orphaned/, and replaces nothing there", async () => {
  using config = configure("a.example", "b.example www.b.example");
  await issueAll(config);
  for (const text of ["first", "second"]) {
    Deno.writeTextFileSync(join(config.base, "key", "old.pem"), text, { mode: 0o640 });
    const now = changed(config, "a.example");
    using store = await open(now);
    store.moveOrphans(orphans(now, readInventory(now)));
    assert.deepEqual(orphans(now, readInventory(now)), []);
  }
  const orphaned = (name: string) => listing(config.base, "orphaned", name);
  assert.deepEqual([modeOf(join(config.base, "orphaned")), modeOf(join(config.base, "orphaned/key"))], [
    "700",
    "700",
  ]);
  assert.deepEqual(orphaned("cert").length, 3);
  assert.deepEqual(orphaned("key").filter((name) => name.startsWith("old")), ["old.pem", "old.pem.2"]);
  assert.equal(Deno.readTextFileSync(join(config.base, "orphaned/key/old.pem")), "first");
  assert.equal(kinds(changed(config, "a.example")), "present");
});

// ---- keys --------------------------------------------------------------------------------------------------------

Deno.test("a link to another certificate's key is no key of its own, one that leads elsewhere is the user's", async () => {
  using config = configure("example.com www.example.com");
  const [{ files }] = await issueAll(config) as [Entry];
  const alone = changed(config, "www.example.com");
  const [entry] = readInventory(alone);
  assert.equal(entry!.finding.kind, "other names");
  {
    using store = await open(alone);
    assert.equal(store.keyOf(entry!), undefined);
  }
  const pinned = join(config.directory, "pinned.pem");
  Deno.renameSync(files.key, pinned);
  Deno.symlinkSync("../../pinned.pem", files.key);
  const [linked] = readInventory(config);
  using store = await open(config);
  const keyPem = store.keyOf(linked!)!;
  await store.commit(linked!, await issue(linked!.line.names, { keyPem }));
  assert.deepEqual([Deno.readLinkSync(files.key), Deno.readTextFileSync(pinned)], [
    "../../pinned.pem",
    keyPem,
  ]);
  assert.equal(kinds(config), "present");
});

Deno.test("a key that was revoked is never used again", async () => {
  using config = configure("a.example", "b.example");
  const [a, b] = await issueAll(config);
  const keyPem = Deno.readTextFileSync(a!.files.key);
  {
    using store = await open(config);
    await store.keepPendingKey(b!, keyPem);
    assert.equal(store.pendingKey(b!), keyPem);
    for (let twice = 0; twice < 2; twice++) {
      await store.revoke(publicKeyHash(Deno.readTextFileSync(a!.files.cert)));
    }
    assert.deepEqual([store.keyOf(a!), store.pendingKey(b!)], [undefined, undefined]);
  }
  assert.equal(kinds(config), "revoked,present");
  const path = join(config.base, "revoked-keys");
  assert.deepEqual([Deno.readTextFileSync(path), modeOf(path)], [`${publicKeyHash(keyPem)}\n`, "600"]);

  assert(b!.finding.kind === "present");
  const old = { version: 1, revoked: { [b!.finding.certificate.fingerprint]: NOW.toISOString() } };
  Deno.writeTextFileSync(join(config.base, "state.json"), JSON.stringify(old));
  close(await open(config));
  assert.equal(
    kinds(config),
    "revoked,revoked",
    "what version 1 of the state remembered of it is taken over",
  );
});

Deno.test("a key of an order that is not finished stands beside the live one until that is replaced", async () => {
  using config = configure("example.com");
  const [entry] = await issueAll(config) as [Entry];
  const next = await issue(["example.com"]);
  {
    using store = await open(config);
    store.state.orders[entry.file] = { url: "https://ca/order", account: "", since: NOW.toISOString() };
    await store.keepPendingKey(entry, next.keyPem);
    await store.saveState();
  }
  const store = await open(config);
  assert.equal(store.pendingKey(entry), next.keyPem);
  assert.equal(kinds(config), "present");
  assert.deepEqual(listing(config.base, "key").map((name) => modeOf(join(config.base, "key", name))), [
    "600",
    "600",
  ]);
  await store.commit(entry, next);
  assert.equal(store.pendingKey(entry), undefined);
  await store.keepPendingKey(entry, next.keyPem);
  close(store);
  Deno.removeSync(join(config.base, "state.json"));
  close(await open(config));
  assert.equal(listing(config.base, "key").length, 1, "nothing is known of its order any more");
});

Deno.test("createSecret() never replaces what is there", async () => {
  using config = configure();
  using store = await open(config);
  const path = join(config.directory, "private/keys/account.key");
  await store.createSecret(path, "one\n");
  assert.deepEqual([path, join(path, ".."), join(path, "../..")].map(modeOf), ["600", "700", "700"]);
  await assert.rejects(store.createSecret(path, "two\n"), Deno.errors.AlreadyExists);
  assert.equal(Deno.readTextFileSync(path), "one\n");
  assert.deepEqual(listing(path, ".."), ["account.key"]);
});

// ---- commits that were cut off, state, lock ----------------------------------------------------------------------

Deno.test("a run cut off between its two renames is completed by the next, one cut off before is undone", async () => {
  using config = configure("example.com www.example.com");
  const [entry] = await issueAll(config) as [Entry];
  const { key, cert } = entry.files;
  const [first, second] = [await issue(entry.line.names), await issue(entry.line.names)];
  /** As a run would have left it that was killed there. */
  const leave = (path: string, text: string) =>
    Deno.writeTextFileSync(join(path, "..", `.${basename(path)}.new`), text, { mode: 0o600 });
  Deno.writeTextFileSync(key, second.keyPem);
  leave(cert, second.chainPem);
  assert.equal(fingerprintOf(config), "other key");
  Deno.removeSync(join(config.base, "cert/www.example.com-cert-combined.prime256v1.test.pem"));
  close(await open(config));
  assert.equal(
    fingerprintOf(config),
    second.certificate.fingerprint,
    "the new key was in place, so its certificate follows",
  );

  leave(key, first.keyPem);
  leave(cert, first.chainPem);
  close(await open(config));
  assert.equal(
    fingerprintOf(config),
    first.certificate.fingerprint,
    "both were complete, so both take their place",
  );
  assert.equal(listing(config.base, "cert").length, 3, "and the links are there again");

  leave(key, second.keyPem);
  leave(cert, second.chainPem.slice(0, 400));
  close(await open(config));
  assert.equal(fingerprintOf(config), first.certificate.fingerprint, "half of a pair is removed");
  assert.deepEqual(
    ["key", "cert", "csr", "."].flatMap((name) =>
      listing(config.base, name).filter((name) => /\.new$/.test(name))
    ),
    [],
  );
});

Deno.test("what cannot take its place stays for the next run, and stops no other certificate", async () => {
  using config = configure("a.example", "b.example");
  const [a, b] = await issueAll(config) as [Entry, Entry];
  const issued = new Map([[a, await issue(["a.example"])], [b, await issue(["b.example"])]]);
  for (const [{ files }, { keyPem, chainPem }] of issued) {
    Deno.writeTextFileSync(join(files.key, "..", `.${basename(files.key)}.new`), keyPem, { mode: 0o600 });
    Deno.writeTextFileSync(join(files.cert, "..", `.${basename(files.cert)}.new`), chainPem);
  }
  Deno.renameSync(a.files.key, `${a.files.key}.aside`);
  Deno.mkdirSync(a.files.key);
  const store = await open(config);
  assert.match(store.notices.join(), /^cannot complete an interrupted run: .*a\.example/);
  assert.equal(kinds(config), "unreadable,present");
  close(store);
  Deno.removeSync(a.files.key);
  close(await open(config));
  assert.equal(fingerprintOf(config), issued.get(a)!.certificate.fingerprint);
});

Deno.test("the state is kept for the next run; that it cannot be written ends no run, and is remembered", async () => {
  using config = configure("example.com");
  const path = join(config.base, "state.json");
  {
    using store = await open(config);
    store.state.holds.a = NOW.toISOString();
    await Promise.all([store.saveState(), store.saveState(), store.saveState()]);
    store.state.holds.b = NOW.toISOString();
    await store.saveState();
  }
  assert.equal(modeOf(path), "600");
  assert.deepEqual(Object.keys(readState(config, NOW).state.holds), ["a", "b"]);
  using store = await open(config);
  Deno.removeSync(path);
  Deno.mkdirSync(join(path, "in the way"), { recursive: true });
  delete store.state.holds.a;
  await store.saveState();
  assert.match(store.writeError!.message, /directory/);
  await assert.rejects(store.ensureWritable(), /directory/);
  Deno.removeSync(path, { recursive: true });
  await store.ensureWritable();
  assert.equal(store.writeError, undefined);
  assert.deepEqual(Object.keys(readState(config, NOW).state.holds), ["b"]);
});

Deno.test("the lock keeps a second run out, which waits for it for a second, and goes with its process", async () => {
  using config = configure("example.com");
  const first = await open(config);
  close(await Store.open({ ...config, mode: "prod", base: join(config.directory, "prod") }, NOW));
  const begun = performance.now();
  await assert.rejects(open(config), { name: "LockedError" });
  const waited = performance.now() - begun;
  assert(waited >= 1000 && waited < 5000, `${waited} ms`);
  const waiting = open(config);
  close(first);
  close(await waiting);

  const path = join(config.base, ".lock");
  await using holder = new Deno.Command("flock", {
    args: [path, "-c", "echo locked; exec cat"],
    stdin: "piped",
    stdout: "piped",
  }).spawn();
  await holder.stdout.getReader().read();
  await assert.rejects(open(config), { name: "LockedError" });
  Deno.kill(holder.pid, "SIGKILL");
  await holder.stdin.abort().catch(() => {});
});

// ---- whose the files are -----------------------------------------------------------------------------------------

Deno.test("a replaced file keeps its mode, less what others may do with a key", async () => {
  using config = configure("example.com");
  const [entry] = await issueAll(config) as [Entry];
  const { key, cert } = entry.files;
  const table: [key: number, cert: number, then: string][] = [
    [0o640, 0o640, "640 640"],
    [0o644, 0o664, "640 664"],
    [0o400, 0o444, "400 444"],
    [0o666, 0o600, "660 600"],
  ];
  for (const [keyMode, certMode, expected] of table) {
    Deno.chmodSync(key, keyMode);
    Deno.chmodSync(cert, certMode);
    using store = await open(config);
    await store.commit(entry, await issue(["example.com"]));
    assert.equal(`${modeOf(key)} ${modeOf(cert)}`, expected);
  }
});

Deno.test({
  name:
    "root keeps owner and group of what it replaces, and leaves what it makes to the owner of the directory",
  ignore: !isRoot,
  async fn() {
    using config = configure("example.com www.example.com", "other.example");
    const [entry] = await issueAll(config) as [Entry];
    execFileSync("chown", ["-R", `${NOBODY}:${NOBODY}`, config.directory]);
    Deno.chownSync(entry.files.key, NOBODY, 1);
    Deno.chmodSync(entry.files.key, 0o640);
    for (const { name } of Deno.readDirSync(config.base)) {
      if (name !== "key") Deno.removeSync(join(config.base, name), { recursive: true });
    }
    const victim = Deno.makeTempFileSync();
    Deno.symlinkSync(victim, join(config.base, ".lock"));
    await issueAll(config);
    {
      using store = await open(config);
      await store.createSecret(join(config.directory, "private/account.key"), "");
      store.moveOrphans(["csr/other.example-csr.prime256v1.test.csr"]);
      await store.saveState();
    }
    const owners = execFileSync("find", [config.directory, "-printf", "%u:%g %f\n"], { encoding: "utf8" });
    const others = owners.trimEnd().split("\n").filter((line) => !line.startsWith("nobody:nogroup "));
    assert.deepEqual(others, [`nobody:daemon ${basename(entry.files.key)}`]);
    assert.deepEqual(
      [modeOf(entry.files.key), Deno.statSync(victim).uid],
      ["640", 0],
      "nothing through a link",
    );
    Deno.removeSync(victim);
  },
});

Deno.test({
  name: "a key is not for the members of another group, where the one before cannot be kept",
  ignore: !isRoot,
  async fn() {
    using config = configure("example.com");
    const [entry] = await issueAll(config) as [Entry];
    const { key, cert } = entry.files;
    execFileSync("chown", ["-R", `${NOBODY}:${NOBODY}`, config.directory]);
    for (const path of [key, cert]) {
      Deno.chownSync(path, NOBODY, 1); // a group of which nobody is no member
      Deno.chmodSync(path, 0o640);
    }
    const script = `
      import { readInventory, Store } from ${JSON.stringify(import.meta.resolve("../lib/store.ts"))};
      import { readCertificate } from ${JSON.stringify(import.meta.resolve("../lib/x509.ts"))};
      const config = ${JSON.stringify(config)};
      using store = await Store.open(config, new Date());
      const issued = ${JSON.stringify(await issue(["example.com"]))};
      const certificate = readCertificate(issued.chainPem);
      await store.commit(readInventory(config)[0], { ...issued, certificate });`;
    const file = join(config.directory, "commit.ts");
    Deno.writeTextFileSync(file, script);
    const as =
      "--reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search";
    const { code, stderr } = await new Deno.Command("setpriv", {
      args: [
        ...as.split(" "),
        Deno.execPath(),
        "run",
        "-q",
        "--no-prompt",
        "-R",
        "-W",
        "-E",
        "--allow-sys=uid",
        file,
      ],
    }).output();
    assert.equal(code, 0, new TextDecoder().decode(stderr));
    assert.deepEqual([modeOf(key), Deno.statSync(key).gid], ["600", NOBODY]);
    assert.deepEqual([modeOf(cert), Deno.statSync(cert).gid], ["640", NOBODY]);
  },
});

const EC = "keyTypes: ec\npreflight: no";

Deno.test("--check says which keys are missing", async () => {
  await using bed = await testBed({ domains: "example.com", settings: EC });
  await bed.plant();
  const key = bed.path("test/key/example.com-key.prime256v1.test.pem");
  assert.doesNotMatch((await bed.lematt("--check", "--test")).stdout, /missing/);
  Deno.removeSync(key);
  const { code, stdout } = await bed.lematt("--check", "--test");
  assert.equal(code, 0);
  assert(stdout.includes(`${key} is missing, so the next run issues a new certificate`), stdout);
});

Deno.test("keys are nobody else's and certificates everybody's, whatever the umask, below a setgid directory, too", async () => {
  for (const [umask, mode] of [["077", 0o2755], ["000", 0o755]] as const) {
    await using bed = await testBed({ domains: "example.com www", settings: EC });
    Deno.chmodSync(bed.conf, mode);
    const { code, stderr } = await bed.lemattBy(
      ["/bin/sh", "-c", `umask ${umask}; exec "$@"`, "sh"],
      "--test",
    );
    assert.equal(code, 0, stderr);
    const files = execFileSync("find", [bed.conf, "-type", "f", "-printf", "%P %m\n"], { encoding: "utf8" });
    const modes = files.trimEnd().split("\n").map((line) => line.split(" ") as [string, string]);
    const directories = ["test", "test/cert", "test/csr", "test/key"].map((name) => modeOf(bed.path(name)));
    assert.deepEqual(directories, ["755", "755", "755", "700"]);
    for (const [name, mode] of modes) {
      const expected = /^test\/(cert|csr)\//.test(name) ? "644" : "600";
      if (name.startsWith("test/") || name.startsWith("account")) assert.equal(mode, expected, name);
    }
  }
});

Deno.test({
  name: "a file system that cannot sync directories or make hard links is not refused",
  ignore: noStrace !== undefined,
  async fn() {
    await using bed = await testBed({ domains: "example.com www", settings: EC });
    const directories = ["", "test", "test/key", "test/cert", "test/csr"].flatMap((
      name,
    ) => ["-P", bed.path(name)]);
    const inject = ["-e", "inject=fsync:error=EINVAL", "-e", "inject=link,linkat:error=EPERM"];
    const strace = ["strace", "-f", "-qq", "-y", "-o", join(bed.home, "trace"), ...directories, ...inject];
    const { code, stderr } = await bed.lemattBy(strace, "--test");
    assert.equal(code, 0, stderr);
    assert.match(Deno.readTextFileSync(join(bed.home, "trace")), /fsync\(.*INJECTED/);
  },
});
