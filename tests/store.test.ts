/** Goal: files have the original's names, are complete or absent, and keep their owners; its directory is taken over. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { basename, join } from "node:path";
import type { Config, KeyType, Line } from "../lib/config.ts";
import { plan } from "../lib/plan.ts";
import { byLine } from "../lib/renewal.ts";
import { emptyState } from "../lib/state.ts";
import { changingLinks, type Entry, orphans, readInventory, stemOf, Store } from "../lib/store.ts";
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
  const notAfter = new Date(notBefore.getTime() + life);
  const chainPem = await ca.forge(keyPem, names, { notBefore, notAfter });
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

Deno.test("stemOf() joins the names, and shortens what is too long for a file name", () => {
  using config = configure();
  const stem = (...names: string[]) => stemOf({ ...config, mode: "prod" }, names);
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

Deno.test("a commit writes the original's files, links and modes, and leaves nothing else", async () => {
  using config = configure("example.com www.example.com");
  await issueAll(config);
  const tree = execFileSync("find", [config.base, "-mindepth", "1", "-printf", "%m %P%l\n"], {
    encoding: "utf8",
  });
  const [stem, key, cert] = [
    "example.com_www.example.com",
    "-key.prime256v1.test.pem",
    "-cert-combined.prime256v1.test.pem",
  ];
  assert.deepEqual(
    tree.replaceAll(stem, "STEM").trim().split("\n").filter((line) => !line.includes("/.")).sort(),
    [
      "600 .lock",
      `600 key/STEM${key}`,
      `644 cert/STEM${cert}`,
      "644 csr/STEM-csr.prime256v1.test.csr",
      "700 key",
      ...["755 cert", "755 csr"],
      ...["example.com", "www.example.com"].flatMap((name) => [`777 cert/${name}${cert}STEM${cert}`]),
      ...["example.com", "www.example.com"].flatMap((name) => [`777 key/${name}${key}STEM${key}`]),
    ],
  );
});

Deno.test("a directory that the original wrote is taken over: nothing is due and no file changes", async () => {
  // the original did not define the order of names that differ only in the last label
  const lines = ["mail.example.com", "example.com www.example.com shop.example.com", "a.de a.net a.org"];
  using config = configure(...lines);
  for (const name of ["key", "csr", "cert"]) Deno.mkdirSync(join(config.base, name), { recursive: true });
  for (const names of [...lines.slice(0, 2), "a.de a.org a.net"].map((names) => names.split(" "))) {
    const ecparam = ["ecparam", "-genkey", "-name", "prime256v1"]; // as the original made them
    const keyPem = execFileSync("openssl", ecparam, { encoding: "utf8", stdio: "pipe" });
    const texts = { key: keyPem, cert: (await issue(names, { keyPem })).chainPem };
    for (const what of ["key", "cert"] as const) {
      const end = `-${what === "key" ? what : "cert-combined"}.prime256v1.test.pem`;
      const at = (name: string) => join(config.base, what, name + end);
      Deno.writeTextFileSync(at(names.join("_")), texts[what], { mode: 0o600 });
      for (const name of names.length === 1 ? [] : names) Deno.symlinkSync(names.join("_") + end, at(name));
    }
  }
  const all = () =>
    execFileSync("find", [join(config.base, "key"), join(config.base, "cert"), "-ls"], { encoding: "utf8" });
  const before = all();
  {
    using store = await open(config);
    const inventory = readInventory(config);
    for (const entry of inventory) store.link(entry);
    const { tasks, kept } = plan({
      config,
      certificates: byLine(inventory),
      state: emptyState(),
      now: NOW,
      options: {},
    });
    assert.deepEqual([tasks.length, kept.length], [0, 3]);
    assert.deepEqual(orphans(config, inventory), []);
  }
  assert.deepEqual(all(), before);
});

Deno.test("files with the original's spelling are found, and renewed under it", async () => {
  using config = configure("example.com WWW.example.com");
  const [{ files }] = await issueAll(config) as [Entry];
  const [line] = linesOf("example.com www.example.com");
  const lower = { ...config, lines: [{ ...line!, formerNames: [["example.com", "WWW.example.com"]] }] };
  const [entry] = readInventory(lower);
  assert.deepEqual([entry!.finding.kind, entry!.files], ["present", files]);
  await issueAll(lower);
  assert.deepEqual([kinds(lower), listing(config.base, "csr").length], ["present", 1]);
  // files that services read under an old name are not orphaned, and are delivered
  assert.deepEqual(orphans(lower, [entry!]), []);
  using store = await open(lower);
  const stems = store.pathsOf(entry!).certs.map((path) => basename(path).split("-")[0]);
  assert.equal(stems.join(" "), "example.com_WWW.example.com example.com www.example.com WWW.example.com");
});

Deno.test("a name with a line of its own keeps its file; if it is on two other lines, the first has the link", async () => {
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
    /^a\.example-.* c\.example_a\.example-/,
  );
});

// ---- what is found -----------------------------------------------------------------------------------------------

Deno.test("an inventory shows what is wrong with each pair of files", async () => {
  using config = configure("example.com");
  const [{ files }] = await issueAll(config) as [Entry];
  const [keyPem, chainPem] = [files.key, files.cert].map((path) => Deno.readTextFileSync(path));
  const another = (await issue(["example.com"], { keyType: "rsa" })).keyPem;
  const other = await issue(["a.example.com"], { keyPem });
  const table: [key: string | undefined, cert: string | undefined, kind: string, what?: string][] = [
    [keyPem, chainPem, "present"],
    [keyPem, undefined, "missing", "certificate"],
    [undefined, chainPem, "missing", "key"],
    [another, chainPem, "other key"],
    [keyPem!.slice(0, 90), chainPem, "unreadable", "key"],
    [keyPem, other.chainPem, "other names"],
    [keyPem, "", "unreadable", "certificate"],
    [keyPem, chainPem!.slice(0, 90), "unreadable", "certificate"],
  ];
  const found = () => {
    const { finding } = readInventory(config)[0]!;
    return [finding.kind, "what" in finding ? finding.what : undefined];
  };
  for (const [key, cert, kind, what] of table) {
    for (const [path, text] of [[files.key, key], [files.cert, cert]] as const) {
      if (text === undefined) Deno.removeSync(path);
      else Deno.writeTextFileSync(path, text);
    }
    assert.deepEqual(found(), [kind, what]);
  }
  Deno.removeSync(files.cert);
  Deno.mkdirSync(files.cert);
  assert.deepEqual(found(), ["unreadable", "certificate"]);
});

Deno.test("the time of issuance of a short-lived certificate is known from its file, since its CA may have back-dated it", async () => {
  using config = configure("example.com");
  const [entry] = readInventory(config);
  using store = await open(config);
  const hoursAgo = async (life: number, age: number) => {
    await store.commit(entry!, await issue(["example.com"], { life, age }));
    const { issuedAt } = readInventory(config)[0]!;
    return issuedAt && Math.round((Date.now() - issuedAt.getTime()) / HOUR);
  };
  assert.equal(await hoursAgo(2 * HOUR, HOUR), 0);
  assert.equal(await hoursAgo(90 * DAY, HOUR), undefined);
  assert((await hoursAgo(6 * DAY, 5 * DAY))! > 4.8 * 24, "its file was copied");
  assert.equal(
    await hoursAgo(HOUR, 2 * HOUR),
    undefined,
    "its file is newer than its expiry, which shows nothing",
  );
});

Deno.test("--prune moves orphaned files to orphaned/, and replaces nothing there", async () => {
  using config = configure("a.example", "b.example www.b.example");
  await issueAll(config);
  const now = changed(config, "a.example");
  for (const text of ["first", "second"]) {
    Deno.writeTextFileSync(join(config.base, "key", "old.pem"), text, { mode: 0o640 });
    using store = await open(now);
    store.moveOrphans(orphans(now, readInventory(now)));
    assert.deepEqual(orphans(now, readInventory(now)), []);
  }
  const at = (name: string) => join(config.base, "orphaned", name);
  assert.deepEqual([modeOf(at("")), modeOf(at("key")), listing(at("cert")).length], ["700", "700", 3]);
  assert.deepEqual(["old.pem", "old.pem.2"].map((name) => Deno.readTextFileSync(at(`key/${name}`))), [
    "first",
    "second",
  ]);
  assert.equal(kinds(now), "present");
});

// ---- keys --------------------------------------------------------------------------------------------------------

Deno.test("a link to another certificate's key does not count as a key; a link to elsewhere is the user's, and is kept", async () => {
  using config = configure("example.com www.example.com");
  const [{ files }] = await issueAll(config) as [Entry];
  const alone = changed(config, "www.example.com");
  const [entry] = readInventory(alone);
  const store = await open(alone);
  assert.deepEqual([entry!.finding.kind, store.keyOf(entry!)], ["other names", undefined]);
  close(store);
  const pinned = join(config.directory, "pinned.pem");
  Deno.renameSync(files.key, pinned);
  Deno.symlinkSync("../../pinned.pem", files.key);
  const [linked] = readInventory(config);
  using again = await open(config);
  const keyPem = again.keyOf(linked!)!;
  await again.commit(linked!, await issue(linked!.line.names, { keyPem }));
  assert.deepEqual([Deno.readLinkSync(files.key), Deno.readTextFileSync(pinned)], [
    "../../pinned.pem",
    keyPem,
  ]);
  assert.equal(kinds(config), "present");
});

Deno.test("a revoked key is never used again, also if version 1 of the state recorded it", async () => {
  using config = configure("a.example", "b.example");
  const [a, b] = await issueAll(config) as [Entry, Entry];
  const keyPem = Deno.readTextFileSync(a.files.key);
  {
    using store = await open(config);
    await store.keepPendingKey(b, keyPem);
    for (let twice = 0; twice < 2; twice++) {
      await store.revoke(publicKeyHash(Deno.readTextFileSync(a.files.cert)));
    }
    assert.deepEqual([store.keyOf(a), store.pendingKey(b)], [undefined, undefined]);
  }
  assert.equal(kinds(config), "revoked,present");
  const path = join(config.base, "revoked-keys");
  assert.deepEqual([Deno.readTextFileSync(path), modeOf(path)], [`${publicKeyHash(keyPem)}\n`, "600"]);
  assert(b.finding.kind === "present");
  const old = { version: 1, revoked: { [b.finding.certificate.fingerprint]: NOW.toISOString() } };
  Deno.writeTextFileSync(join(config.base, "state.json"), JSON.stringify(old));
  close(await open(config));
  assert.equal(kinds(config), "revoked,revoked");
});

// ---- commits that were cut off, state, lock ----------------------------------------------------------------------

Deno.test("a run killed between its two renames is completed by the next one; a run killed before them is undone", async () => {
  using config = configure("example.com www.example.com");
  const [{ line, files: { key, cert } }] = await issueAll(config) as [Entry];
  const [first, second] = [await issue(line.names), await issue(line.names)];
  /** Leaves the files as a run that was killed there. */
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
    "the new key was in place: its certificate follows",
  );

  leave(key, first.keyPem);
  leave(cert, first.chainPem);
  close(await open(config));
  assert.equal(
    fingerprintOf(config),
    first.certificate.fingerprint,
    "both were complete: both take their place",
  );
  assert.equal(listing(config.base, "cert").length, 3, "and the links are there again");

  leave(key, second.keyPem);
  leave(cert, second.chainPem.slice(0, 400));
  close(await open(config));
  assert.equal(fingerprintOf(config), first.certificate.fingerprint, "half of a pair is removed");
  const left = ["key", "cert", "csr", "."].flatMap((name) => listing(config.base, name));
  assert.deepEqual(left.filter((name) => name.endsWith(".new")), []);
});

Deno.test("files that cannot be put in place stay for the next run, and stop no other certificate", async () => {
  using config = configure("a.example", "b.example");
  const [a, b] = await issueAll(config) as [Entry, Entry];
  for (const { line, files } of [a, b]) {
    const { keyPem, chainPem } = await issue(line.names);
    for (const [path, text] of [[files.key, keyPem], [files.cert, chainPem]] as const) {
      Deno.writeTextFileSync(join(path, "..", `.${basename(path)}.new`), text, { mode: 0o600 });
    }
  }
  Deno.renameSync(a.files.key, `${a.files.key}.aside`);
  Deno.mkdirSync(a.files.key);
  const store = await open(config);
  assert.match(store.notices.join(), /a\.example/);
  assert.equal(kinds(config), "unreadable,present");
  close(store);
  Deno.removeSync(a.files.key);
  close(await open(config));
  assert.equal(kinds(config), "present,present");
});

// ---- owners and modes --------------------------------------------------------------------------------------------

Deno.test("a replaced file keeps its mode, except for access of others to a key", async () => {
  using config = configure("example.com");
  const [{ files: { key, cert } }] = await issueAll(config) as [Entry];
  for (const modes of ["640 640 640 640", "644 664 640 664", "400 444 400 444", "666 600 660 600"]) {
    const [keyMode, certMode, ...expected] = modes.split(" ");
    Deno.chmodSync(key, parseInt(keyMode!, 8));
    Deno.chmodSync(cert, parseInt(certMode!, 8));
    await issueAll(config);
    assert.deepEqual([modeOf(key), modeOf(cert)], expected);
  }
});

Deno.test({
  name: "as root, replaced files keep owner and group, and new files get those of the directory",
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
  name: "a key is not readable by another group if its group cannot be kept",
  ignore: !isRoot,
  async fn() {
    using config = configure("example.com");
    const [entry] = await issueAll(config) as [Entry];
    const { key, cert } = entry.files;
    execFileSync("chown", ["-R", `${NOBODY}:${NOBODY}`, config.directory]);
    for (const path of [key, cert]) {
      Deno.chownSync(path, NOBODY, 1); // a group in which this user is not a member
      Deno.chmodSync(path, 0o640);
    }
    const script = `
      import { readInventory, Store } from ${JSON.stringify(import.meta.resolve("../lib/store.ts"))};
      import { readCertificate } from ${JSON.stringify(import.meta.resolve("../lib/x509.ts"))};
      const config = ${JSON.stringify(config)}, issued = ${JSON.stringify(await issue(["example.com"]))};
      using store = await Store.open(config, new Date());
      const certificate = readCertificate(issued.chainPem);
      await store.commit(readInventory(config)[0], { ...issued, certificate });`;
    const file = join(config.directory, "commit.ts");
    Deno.writeTextFileSync(file, script);
    const as =
      "--reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search";
    const options = ["run", "-q", "--no-prompt", "-R", "-W", "-E", "--allow-sys=uid", "--no-check"];
    execFileSync("setpriv", [...as.split(" "), Deno.execPath(), ...options, file], { stdio: "inherit" });
    assert.deepEqual([modeOf(key), Deno.statSync(key).gid], ["600", NOBODY]);
    assert.deepEqual([modeOf(cert), Deno.statSync(cert).gid], ["640", NOBODY]);
  },
});

const EC = "keyTypes: ec\npreflight: no";

Deno.test("keys are private and certificates readable by all, whatever the umask, also below a setgid directory", async () => {
  for (const [umask, mode] of [["077", 0o2755], ["000", 0o755]] as const) {
    await using bed = await testBed({ domains: "example.com www", settings: EC });
    Deno.chmodSync(bed.conf, mode);
    const by = ["/bin/sh", "-c", `umask ${umask}; exec "$@"`, "sh"];
    const { code, stderr } = await bed.lemattBy(by, "--test");
    assert.equal(code, 0, stderr);
    const find = ["test", "account.key.test", "-not", "-type", "l", "-printf", "%p %m\n"];
    for (const line of execFileSync("find", find, { cwd: bed.conf, encoding: "utf8" }).trim().split("\n")) {
      const [name, mode] = line.split(" ");
      const isPublic = /^test(\/(cert|csr))?$/.test(name!)
        ? "755"
        : /^test\/(cert|csr)\//.test(name!)
        ? "644"
        : "600";
      assert.equal(mode, name === "test/key" ? "700" : isPublic, name);
    }
  }
});

Deno.test({
  name: "a file system that cannot sync directories or make hard links can be used",
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
