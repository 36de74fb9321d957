/**
 * Goal: unexpected files and directories, another user's files, concurrent runs, commands that go wrong and wrong clocks
 * cost at most a line of text, and one undisturbed run later everything is in order. See hooks.test.ts for commands alone.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { until } from "./bed.ts";
import { isRunning, listing, pairs, presentable, PROGRAM, SHARE, Subject, sweep, textOf } from "./faults.ts";
import { missing as noStrace } from "./faults-strace.ts";
import { LEMATT } from "./programs.ts";

const DAYS = 86_400_000;
/** ari: no, as lematt would ask again too soon after its state is lost, which is a violation. */
const NO_ARI = { settings: `${PROGRAM}\nari: no` };

// ---- files -------------------------------------------------------------------------------------------------------

const SOLO = "solo.example.org";
const SOLO_CERT = `test/cert/${SOLO}-cert-combined.prime256v1.test.pem`;
const SOLO_KEY = `test/key/${SOLO}-key.prime256v1.test.pem`;
const IN_THE_WAY: readonly string[] = [
  SOLO_CERT,
  SOLO_KEY,
  `test/csr/${SOLO}-csr.prime256v1.test.csr`,
  "test/cert/www.example.com-cert-combined.prime256v1.test.pem",
  "test/key/www.example.com-key.prime256v1.test.pem",
  "test/state.json",
  "test/revoked-keys",
  "test/.lock",
  "account.key.test",
  "test/cert",
  "test/key",
  "test",
];
const OBSTACLES: Readonly<Record<string, (path: string, victim: string) => void>> = {
  "a directory": (path) => Deno.mkdirSync(join(path, "in-use"), { recursive: true }),
  "a link to nowhere": (path) => Deno.symlinkSync("/nowhere/at/all", path),
  "a link to itself": (path) => Deno.symlinkSync(path, path),
  "a link to another's file": (path, victim) => Deno.symlinkSync(victim, path),
  "an empty file": (path) => Deno.writeTextFileSync(path, ""),
};

Deno.test("anything in the place of a file is reported and harms nothing else, and lematt recovers once it is removed", async () => {
  await sweep(
    "in the way of a file",
    pairs(IN_THE_WAY, Object.keys(OBSTACLES)),
    4,
    async ([what, obstacle]) => {
      await using subject = await Subject.create(NO_ARI);
      const { bed } = subject;
      await bed.run();
      subject.countOrders();
      const [path, aside, victim] = [bed.path(what), join(bed.home, "aside"), join(bed.home, "victim")];
      Deno.writeTextFileSync(victim, "precious");
      if (existsSync(path)) Deno.renameSync(path, aside);
      OBSTACLES[obstacle]!(path, victim);

      const ran = await subject.attempt();
      presentable(ran.stdout + ran.stderr);
      assert.equal(textOf(victim), "precious");
      if (what.includes(SOLO) || what.includes("www")) {
        const others = subject.inventory().filter(({ stem }) => !what.includes(stem));
        assert(others.every(({ finding }) => finding.kind === "present"));
      }

      subject.dropUnusable();
      await Deno.remove(path, { recursive: true }).catch(() => {}); // as an administrator might, without looking inside
      if (what === "account.key.test") Deno.renameSync(aside, path);
      await subject.recover();
    },
  );
});

Deno.test("a drop directory that disappears during a run fails only what needs it", async () => {
  await using subject = await Subject.create(NO_ARI);
  const { bed } = subject;
  bed.ca.switches.fault = ({ resource }) => {
    if (resource === "authz" && existsSync(bed.drop)) Deno.removeSync(bed.drop);
    return undefined;
  };
  const ran = await subject.attempt();
  Deno.mkdirSync(bed.drop);
  await subject.afterFault(ran);
  assert.equal(ran.code, 1);
  assert.match(ran.stderr, /solo\.example\.org \(ec\)\n +.*No such file or directory .*\/drop\//);
  await subject.recover();
});

Deno.test("certificates are issued and delivered even if the report cannot be written", {
  ignore: Deno.build.os !== "linux", // which has /dev/full
}, async () => {
  await using subject = await Subject.create(NO_ARI);
  const ran = await subject.bed.lemattBy(["/bin/sh", "-c", 'exec "$@" >/dev/full', "sh"], "--test");
  assert.deepEqual([ran.code, ran.stdout], [1, ""]);
  assert.match(ran.stderr, /^lematt: cannot write its output: No space left on device.*\n$/);
  assert.match((await subject.recover()).stdout, /^nothing due/);
});

// ---- another user's files ----------------------------------------------------------------------------------------

/** Without these capabilities root is refused access as other users are. */
const AS_ANYBODY = Deno.uid() === 0
  ? ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
  : [];

/** A path, the mode that it gets, the error, and the exit status. */
const CLOSED: readonly (readonly [path: string, mode: number, error: RegExp, code: number])[] = [
  ["test/cert", 0o555, /Permission denied .*test\/cert/, 1],
  [SOLO_KEY, 0, /solo\.example\.org \(ec\)\n +Permission denied.*solo\.example\.org-key/, 1],
  ["test", 0o555, /Permission denied .*test\//, 1],
  ["test/state.json", 0, /^lematt: cannot read .*test\/state\.json: Permission denied/, 2],
];

Deno.test("inaccessible files are reported, and cost no order", async () => {
  await sweep("another user's files", CLOSED, 2, async ([closed, mode, error, code]) => {
    await using subject = await Subject.create(NO_ARI);
    const { bed } = subject;
    await bed.run();
    Deno.removeSync(bed.path(SOLO_CERT)); // so that something is due
    subject.countOrders();
    const before = bed.ca.orders.length;
    const path = bed.path(closed);
    const open = Deno.statSync(path).mode!;
    Deno.chmodSync(path, mode);
    const ran = await bed.lemattBy(AS_ANYBODY, "--test");
    presentable(ran.stdout + ran.stderr);
    assert.match(ran.stderr, error);
    assert.deepEqual([ran.code, bed.ca.orders.length], [code, before]);
    Deno.chmodSync(path, open);
    await subject.recover();
  });
});

// ---- at the same time --------------------------------------------------------------------------------------------

Deno.test("of runs started together only one does the work; the others do not touch its challenges and prepare commands", async () => {
  await using subject = await Subject.create(NO_ARI);
  const { bed } = subject;
  const gate = Promise.withResolvers<void>();
  await using slow = Deno.serve({ port: 0, onListen: () => {} }, async ({ url }) => {
    await gate.promise;
    return await fetch(new URL(new URL(url).pathname, `http://127.0.0.1:${bed.web.port}`));
  });
  bed.ca.switches.httpPort = slow.addr.port;
  const first = bed.lematt("--test");
  await until("challenges are waiting", () => bed.dropped().length === 3 && subject.prepared().length === 1);
  for (const { code, stderr } of await Promise.all([bed.lematt("--test"), bed.lematt("--test", "--retry")])) {
    assert.match(stderr, /^lematt: another --test run is in progress .*\n$/);
    assert.equal(code, 3);
  }
  assert(subject.prepared().every(isRunning));
  assert.equal(bed.dropped().length, 3);
  gate.resolve();
  assert.equal((await first).code, 0);
  assert.equal(bed.ca.orders.length, 2);
  await subject.recover();
});

Deno.test("a first run with --test and one with --prod do not disturb each other", async () => {
  await using subject = await Subject.create(NO_ARI);
  const { bed } = subject;
  for (const { code, stderr } of await Promise.all(["--test", "--prod"].map((mode) => bed.lematt(mode)))) {
    assert.equal(code, 0, stderr);
  }
  assert.equal(bed.ca.accounts.length, 2);
  assert.deepEqual(listing(bed.path("prod")), [".lock", "cert", "csr", "key", "state.json"]);
  assert(bed.text("account.key") !== bed.text("account.key.test"));
});

Deno.test("a file system without locks is reported in one line, and nothing is done there", {
  ignore: noStrace !== undefined,
}, async () => {
  await sweep("no locks", ["ENOLCK", "EOPNOTSUPP", "EINVAL", "ENOSYS", "EIO"], 1, async (error) => {
    await using subject = await Subject.create(NO_ARI);
    const strace = ["strace", "-f", "-o", "/dev/null", `-einject=flock:error=${error}`];
    const { code, stderr } = await subject.bed.lemattBy(strace, "--test");
    assert.equal(code, 1);
    assert.match(
      stderr,
      /^lematt: .*: lock '.*\/test\/\.lock', on a file system that must support locks\n$/,
    );
    assert.equal(subject.bed.ca.log.length, 0);
    await subject.recover();
  });
});

// ---- the clock ---------------------------------------------------------------------------------------------------

Deno.test("what was postponed by a clock a year ahead is done once the clock is right", async () => {
  await using subject = await Subject.create(NO_ARI);
  const { bed } = subject;
  const alerts = join(bed.home, "alerts");
  subject.configure({ upload: "exit 1", more: `alert: ["cat >> ${alerts}"]` });
  const ahead = () => new Date(bed.ca.now.getTime() + 365 * DAYS);
  await bed.run();
  for (let times = 1; times <= 2; times++) presentable((await bed.run({ now: ahead, retry: true })).stderr);
  await Deno.remove(alerts).catch(() => {});

  bed.ca.advance(2 * DAYS);
  assert.equal((await bed.run()).code, 1);
  bed.ca.advance(2 * DAYS);
  assert.equal((await bed.run()).code, 1);
  assert.match(textOf(alerts), /exit status 1/);
  bed.ca.advance(2 * DAYS);
  subject.configure({ more: `alert: ["cat >> ${alerts}"]` });
  assert.equal((await bed.run()).code, 0);
  assert.match(textOf(alerts), /well again/);
  await subject.recover({ orders: 2 });
});

Deno.test("a clock that is a year behind costs no order, and lematt recovers once it is right", async () => {
  await using subject = await Subject.create(NO_ARI);
  const { bed } = subject;
  const behind = () => new Date(bed.ca.now.getTime() - 365 * DAYS);
  for (let times = 1; times <= 3; times++) presentable((await bed.run({ now: behind })).stderr);
  assert.equal(bed.ca.orders.length, 0);
  await subject.recover();
});

// ---- commands ----------------------------------------------------------------------------------------------------

/** Commands that ignore SIGTERM are killed only after five seconds. */
const isQuick = (what: string) => SHARE > 0 || !what.includes("TERM");

const UPLOADS: Readonly<Record<string, string>> = {
  "hangs": "sleep 600",
  "hangs and ignores TERM": "trap '' TERM; while :; do sleep 0.1; done",
  "ends by a signal": "kill -SEGV $$",
  "ends its process group": "kill -KILL 0",
  "ends lematt": "kill -TERM $PPID; sleep 600",
  "kills lematt": "kill -KILL $PPID",
  "closes its output and fails": "exec >&- 2>&-; exit 1",
  "leaves a daemon and fails": "sleep 5 & exit 1",
  "prints without end": "yes 'no use'",
  "takes its certificates away": "rm -f CERTS; exit 1",
  "takes everything away": "rm -rf HERE/conf/test",
  "runs lematt itself": `${LEMATT.join(" ")} --test --config HERE/conf`,
};

Deno.test("an upload that goes wrong in any way stays pending, and is delivered once it works", async () => {
  await sweep("uploads that go wrong", Object.keys(UPLOADS).filter(isQuick), 2, async (what) => {
    await using subject = await Subject.create({ settings: `${NO_ARI.settings}\ncommandTimeout: 1` });
    subject.configure({ upload: UPLOADS[what]! });
    const ran = await subject.bed.lematt("--test");
    presentable(ran.stdout + ran.stderr);
    assert.notEqual(ran.code, 0);
    assert.deepEqual(listing(subject.served), []);
    subject.configure();
    if (what.startsWith("takes")) subject.countOrders();
    await subject.recover();
  });
});

const PREPARES: Readonly<Record<string, string>> = {
  "never begins": "no-such-command",
  "ends lematt": "kill -TERM $PPID; cat >/dev/null",
  "kills lematt": "kill -KILL $PPID; cat >/dev/null",
  "dies before the validation": "exit 7",
  "dies during the validation": "until ls HERE/drop/* 2>/dev/null; do sleep 0.01; done; kill -KILL $$",
  "dies after the validation": "cat >/dev/null; kill -KILL $$",
  "ignores TERM and its input": "trap '' TERM; while :; do sleep 0.1; done",
};

Deno.test("a prepare command that goes wrong in any way leaves nothing behind", async () => {
  await sweep("prepare commands that go wrong", Object.keys(PREPARES).filter(isQuick), 2, async (what) => {
    await using subject = await Subject.create(NO_ARI);
    const { bed } = subject;
    subject.configure({ prepare: PREPARES[what]! });
    await subject.afterFault(await (what.endsWith("lematt") ? bed.lematt("--test") : subject.attempt()));
    if (what !== "kills lematt") assert.deepEqual(bed.dropped(), []);
    subject.configure();
    await subject.recover();
  });
});
