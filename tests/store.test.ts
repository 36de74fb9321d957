/** Goal: files have the original's names, are complete or absent, and keep their owners; its directory is taken over. */

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { existsSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import type { Config } from "../lib/config.ts";
import { prunable, prune } from "../lib/run.ts";
import { changingLinks, readInventory, stemOf, Store } from "../lib/store.ts";
import { generateKey } from "../lib/x509.ts";
import { type Bed, testBed } from "./bed.ts";
import { missing as noStrace } from "./faults-strace.ts";
import { AS_ROOT, install, NOBODY, output } from "./programs.ts";

const HOUR = 3_600_000, DAY = 24 * HOUR;
const STEM = "example.com_www.example.com";

const bedOf = (domains: string, settings = "", actions = "") =>
  testBed({ domains, actions, settings: `keyTypes: ec\npreflight: no\nari: no\n${settings}` });
const open = (bed: Bed) => Store.open(bed.config(), bed.ca.now);
const inventory = (bed: Bed) => readInventory(bed.config());
const kinds = (bed: Bed) => inventory(bed).map(({ finding }) => finding.kind).join();
const fileOf = (bed: Bed, what: "key" | "cert", stem: string) =>
  bed.path("test", what, `${stem}-${what === "key" ? what : "cert-combined"}.prime256v1.test.pem`);
const modeOf = (path: string) => (Deno.lstatSync(path).mode! & 0o777).toString(8);
/** What find(1) prints of a directory. */
const find = (path: string, format: string) =>
  execFileSync("find", [path, "-mindepth", "1", "-printf", `${format}\n`], { encoding: "utf8" })
    .trimEnd().split("\n").sort();

/** A certificate of 90 days, for a new key or for the given one. */
async function issue(bed: Bed, names: readonly string[], keyPem?: string) {
  keyPem ??= await generateKey({ type: "ec", curve: "P-256" });
  const life = { notBefore: bed.ca.now, notAfter: new Date(bed.ca.now.getTime() + 90 * DAY) };
  return { keyPem, chainPem: await bed.ca.forge(keyPem, names, life) };
}

Deno.test("stemOf() joins the names, and shortens what is too long for a file name", () => {
  const stem = (...names: string[]) =>
    stemOf({ mode: "prod", rsaTag: "rsa2048", curveTag: "prime256v1" } as Config, names);
  assert.equal(stem("*.example.com", "2001:db8::7"), "_wildcard.example.com_2001-db8--7");
  const end = "-cert-combined.prime256v1.pem".length;
  const fits = `${"a".repeat(60)}.${"b".repeat(255 - end - 61)}`;
  assert.equal(stem(fits), fits);
  assert.match(stem("example.com", fits), /^example\.com_2names_[0-9a-f]{12}$/);
  const long = stem(`${fits}c`);
  assert.match(long, /^a{60}\.b+_1names_[0-9a-f]{12}$/);
  assert.equal(long.length + end, 255);
});

Deno.test("files have the original's names; keys are private and certificates public, whatever the umask, also below a setgid directory", async () => {
  for (const [umask, mode] of [["077", 0o2755], ["000", 0o755]] as const) {
    await using bed = await bedOf("example.com www");
    Deno.chmodSync(bed.conf, mode);
    const by = ["/bin/sh", "-c", `umask ${umask}; exec "$@"`, "sh"];
    const { code, stderr } = await bed.lemattBy(by, "--test");
    assert.equal(code, 0, stderr);
    const files = (what: string, end: string, mode: number) => [
      `${mode} ${what}/${STEM}${end}`,
      ...["example.com", "www.example.com"].map((name) => `777 ${what}/${name}${end}${STEM}${end}`),
    ];
    const expected = [
      ...["600 .lock", "600 state.json", "700 key", "755 cert", "755 csr"],
      ...files("key", "-key.prime256v1.test.pem", 600),
      ...files("cert", "-cert-combined.prime256v1.test.pem", 644),
      `644 csr/${STEM}-csr.prime256v1.test.csr`,
    ];
    assert.deepEqual(find(bed.path("test"), "%m %P%l"), expected.sort());
    assert.deepEqual([modeOf(bed.path("test")), modeOf(bed.path("account.key.test"))], ["755", "600"]);
  }
});

Deno.test("a directory of the original is taken over: nothing is due, no file changes, and renewals keep its spelling", async () => {
  const actions = `[default]\nuploadCerts: ["basename -a CERTS >> HERE/log"]`;
  const domains = "mail.example.com\nexample.com WWW.example.com\na.de a.net a.org";
  await using bed = await bedOf(domains, "", actions);
  for (const name of ["key", "csr", "cert"]) Deno.mkdirSync(bed.path("test", name), { recursive: true });
  // the original did not define the order of names that differ only in the last label
  for (const stem of ["mail.example.com", "example.com_WWW.example.com", "a.de_a.org_a.net"]) {
    const args = ["ecparam", "-genkey", "-name", "prime256v1"]; // as the original made them
    const keyPem = execFileSync("openssl", args, { encoding: "utf8", stdio: "pipe" });
    const names = stem.split("_");
    const { chainPem } = await issue(bed, names.map((name) => name.toLowerCase()), keyPem);
    for (const [what, text] of [["key", keyPem], ["cert", chainPem]] as const) {
      Deno.writeTextFileSync(fileOf(bed, what, stem), text, { mode: 0o600 });
      for (const name of names.length === 1 ? [] : names) {
        Deno.symlinkSync(basename(fileOf(bed, what, stem)), fileOf(bed, what, name));
      }
    }
  }
  const all = () => ["key", "cert"].flatMap((name) => find(bed.path("test", name), "%f %l %i %T@ %m"));
  const before = all();
  const { code, requests } = await bed.run();
  assert.deepEqual([code, requests.length], [0, 0]);
  const after = all();
  assert.deepEqual(before.filter((file) => !after.includes(file)), []);
  const delivered = bed.take();
  const stems = delivered.map((file) => file.split("-")[0]).join(" ");
  assert.match(stems, /^mail\S+ example.com_WWW.example.com example.com www.example.com WWW.example.com a/);
  assert.equal((await bed.run({ named: { renew: ["www.example.com", "a.de"] } })).code, 0);
  assert.deepEqual([bed.take(), prunable(bed.config())], [delivered.slice(1), []]);
});

Deno.test("a name with a line of its own keeps its file; if it is on two other lines, the first has the link", async () => {
  await using bed = await bedOf("a.example b.example\nb.example\nc.example a.example");
  await bed.plant();
  const files = ["a.example", "b.example", "c.example"].map((name) => {
    const path = fileOf(bed, "cert", name);
    return Deno.lstatSync(path).isSymlink ? Deno.readLinkSync(path) : basename(path);
  });
  assert.deepEqual(files, inventory(bed).map(({ file }) => file));
  bed.configure({ domains: "c.example a.example\na.example b.example\nb.example" });
  const config = bed.config();
  assert.match(changingLinks(config, readInventory(config)).join(), /^a\.example-.* c\.example_a\.example-/);
});

Deno.test("an inventory shows what is wrong with each pair of files", async () => {
  await using bed = await bedOf("example.com");
  await bed.plant();
  const { files } = inventory(bed)[0]!;
  const [keyPem, chainPem] = [files.key, files.cert].map((path) => Deno.readTextFileSync(path));
  const [another, other] = await Promise.all([issue(bed, ["x.example"]), issue(bed, ["x.example"], keyPem)]);
  const found = (keyPem: string | undefined, chainPem: string | undefined) => {
    for (const [path, text] of [[files.key, keyPem], [files.cert, chainPem]] as const) {
      if (text === undefined) Deno.removeSync(path);
      else Deno.writeTextFileSync(path, text);
    }
    const { finding } = inventory(bed)[0]!;
    return "what" in finding ? `${finding.kind} ${finding.what}` : finding.kind;
  };
  assert.equal(found(keyPem, undefined), "missing certificate");
  assert.equal(found(undefined, chainPem), "missing key");
  assert.equal(found(another.keyPem, chainPem), "other key");
  assert.equal(found(keyPem!.slice(0, 90), chainPem), "unreadable key");
  assert.equal(found(keyPem, chainPem!.slice(0, 90)), "unreadable certificate");
  assert.equal(found(keyPem, other.chainPem), "other names");
});

Deno.test("C18: the time of issuance of a short-lived certificate is that of its file, since its CA may have back-dated it", async () => {
  await using bed = await bedOf("example.com");
  const issuedHoursAgo = async (life: number, age: number) => {
    await bed.plant({ life: life / 24, age: age / 24 });
    const { issuedAt } = inventory(bed)[0]!;
    return issuedAt && Math.round((Date.now() - issuedAt.getTime()) / HOUR);
  };
  assert.equal(await issuedHoursAgo(2, 1), 0);
  assert.equal(await issuedHoursAgo(90 * 24, 1), undefined);
  assert.equal(await issuedHoursAgo(144, 120), 118, "its file was copied");
  assert.equal(await issuedHoursAgo(1, 2), undefined, "its file is newer than its expiry");
});

Deno.test("--prune moves orphaned files and replaces none; a line that is back keeps its files", async () => {
  await using bed = await bedOf("a.example.com www\nb.example.com");
  await bed.plant();
  const link = "cert/www.a.example.com-cert-combined.prime256v1.test.pem";
  const text = bed.text("test", link);
  bed.configure({ domains: "b.example.com" });
  const old = bed.path("test/key/old.pem");
  Deno.writeTextFileSync(old, "first");
  const paths = prunable(bed.config());
  assert.equal(paths.map(dirname).join(" "), "cert cert cert csr key key key key");
  for (const domains of ["b.example.com\na.example.com www", "b.example.com"]) {
    bed.configure({ domains });
    await prune(bed.config(), paths, bed.context(), () => {});
    assert.equal(existsSync(bed.path("test", link)), domains.includes("www"));
  }
  Deno.writeTextFileSync(old, "second");
  await prune(bed.config(), prunable(bed.config()), bed.context(), () => {});
  const moved = [link, "key/old.pem", "key/old.pem.2"].map((path) => bed.text("test/orphaned", path));
  assert.deepEqual(moved, [text, "first", "second"]);
  assert.equal(modeOf(bed.path("test/orphaned/key")), "700");
  assert.deepEqual([prunable(bed.config()), kinds(bed)], [[], "present"]);
});

Deno.test("T4: a link to another certificate's key is no key; a link to elsewhere is the user's, and is kept", async () => {
  await using bed = await bedOf("example.com www");
  await bed.plant();
  const [entry] = inventory(bed);
  const { key } = entry!.files;
  const pinned = join(bed.home, "pinned.pem");
  Deno.renameSync(key, pinned);
  Deno.symlinkSync(pinned, key);
  const { code } = await bed.run({ named: { renew: ["example.com"] } });
  assert.deepEqual([code, Deno.readLinkSync(key), kinds(bed)], [0, pinned, "present"]);
  bed.configure({ domains: "www.example.com" });
  using store = await open(bed);
  assert.equal(store.keyOf(inventory(bed)[0]!), undefined);
});

Deno.test("a run killed between its renames is completed by the next one; a run killed before them is undone", async () => {
  await using bed = await bedOf("example.com www\nother.example");
  await bed.plant();
  const [key, cert] = [fileOf(bed, "key", STEM), fileOf(bed, "cert", STEM)];
  const { keyPem, chainPem } = await issue(bed, STEM.split("_"));
  const newOf = (path: string) => join(dirname(path), `.${basename(path)}.new`);
  const leave = (path: string, text: string) => Deno.writeTextFileSync(newOf(path), text, { mode: 0o600 });
  const notices = async () => {
    using store = await open(bed);
    return store.notices.join();
  };
  const placed = () => [kinds(bed), Deno.readTextFileSync(fileOf(bed, "cert", "www.example.com"))];
  const before = placed();
  leave(key, keyPem);
  leave(cert, chainPem.slice(0, 400));
  assert.deepEqual([await notices(), placed()], ["", before], "one of them was incomplete");

  leave(key, keyPem);
  leave(cert, chainPem);
  Deno.removeSync(key);
  Deno.mkdirSync(key); // so that it cannot be put in place
  assert.match(await notices(), /example\.com/);
  Deno.removeSync(key);
  Deno.renameSync(newOf(key), key);
  Deno.removeSync(fileOf(bed, "cert", "www.example.com"));
  assert.deepEqual([await notices(), placed()], ["", ["present,present", chainPem]]);
  assert.deepEqual(find(bed.path("test"), "%f").filter((name) => name.endsWith(".new")), []);
});

Deno.test("T5: a replaced file keeps its mode, except for access of others to a key", async () => {
  await using bed = await bedOf("example.com");
  await bed.plant();
  const { key, cert } = inventory(bed)[0]!.files;
  for (const modes of ["640 640 640 640", "400 444 400 444", "666 600 660 600"]) {
    const [keyMode, certMode, ...expected] = modes.split(" ");
    Deno.chmodSync(key, parseInt(keyMode!, 8));
    Deno.chmodSync(cert, parseInt(certMode!, 8));
    await bed.plant();
    assert.deepEqual([modeOf(key), modeOf(cert)], expected);
  }
});

Deno.test("T5, T6: as root, files keep their owner, and new ones get the directory's", AS_ROOT, async () => {
  const settings = "accountKey: keys/private/account.key\nalwaysGenerateNewKeys: yes";
  await using bed = await bedOf("example.com www", settings);
  await bed.plant();
  const { key } = inventory(bed)[0]!.files;
  Deno.mkdirSync(bed.path("keys"));
  execFileSync("chown", ["-R", `${NOBODY}:${NOBODY}`, bed.path("test"), bed.path("keys")]);
  Deno.chownSync(key, NOBODY, 1);
  Deno.chmodSync(key, 0o640);
  for (const name of ["cert", "csr", ".lock"]) Deno.removeSync(bed.path("test", name), { recursive: true });
  const victim = join(bed.home, "victim");
  Deno.writeTextFileSync(victim, "");
  Deno.symlinkSync(victim, bed.path("test/.lock"));
  assert.equal((await bed.run()).code, 0);
  Deno.writeTextFileSync(bed.path("test/csr/orphan"), "");
  Deno.chownSync(bed.path("test/csr/orphan"), NOBODY, NOBODY);
  await prune(bed.config(), prunable(bed.config()), bed.context(), () => {});
  const owners = ["test", "keys"].flatMap((name) => find(bed.path(name), "%u:%g %f"));
  const others = owners.filter((line) => !line.startsWith("nobody:nogroup "));
  assert.deepEqual(others, [`nobody:daemon ${basename(key)}`]);
  assert.deepEqual([modeOf(key), Deno.statSync(victim).uid], ["640", 0], "nothing through a link");
});

Deno.test(
  "a key is not readable by another group if its group cannot be kept (as root)",
  AS_ROOT,
  async () => {
    await using bed = await bedOf("example.com");
    await bed.plant();
    const { key, cert } = inventory(bed)[0]!.files;
    const { as, env, program } = await install(bed.home, NOBODY);
    execFileSync("chown", ["-R", `${NOBODY}:${NOBODY}`, bed.conf, bed.drop]);
    Deno.chmodSync(dirname(bed.ca.caBundleFile), 0o755);
    for (const path of [key, cert]) {
      Deno.chownSync(path, NOBODY, 1); // a group in which this user is not a member
      Deno.chmodSync(path, 0o640);
    }
    const args = ["--test", "--renew", "example.com", "--new-key", bed.conf];
    const { code, stderr } = await output(as(join(program, "lematt.ts"), ...args), { env, clearEnv: true });
    assert.equal(code, 0, stderr);
    const after = [key, cert].flatMap((path) => [modeOf(path), Deno.statSync(path).gid]);
    assert.deepEqual(after, ["600", NOBODY, "640", NOBODY]);
  },
);

const TRACED = { ignore: noStrace !== undefined };
Deno.test(
  "T8: a file system without hard links and syncs of directories can be used (strace)",
  TRACED,
  async () => {
    await using bed = await bedOf("example.com www");
    const paths = ["", "test", "test/key", "test/cert", "test/csr", "account.key.test"];
    const among = paths.flatMap((name) => ["-P", bed.path(name)]);
    const inject = ["-e", "inject=fsync:error=EINVAL", "-e", "inject=link,linkat:error=EPERM"];
    const strace = ["strace", "-f", "-qq", "-y", "-o", join(bed.home, "trace"), ...among, ...inject];
    const { code, stderr } = await bed.lemattBy(strace, "--test");
    assert.equal(code, 0, stderr);
    const injected = Deno.readTextFileSync(join(bed.home, "trace")).match(/(fsync|link(at)?)\(.*INJECTED/g)!;
    assert(
      ["fsync", "link"].every((call) => injected.some((line) => line.startsWith(call))),
      injected.join(),
    );
  },
);
