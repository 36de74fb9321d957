/**
 * Goal: odd files and directories, another user's files, runs at the same time, commands that go wrong and any umask
 * cost at most a line of text, and one undisturbed run later all is as it should be.
 *
 * What a command can do to lematt is in actions.test.ts (it prints 1 GB, forks a daemon, ignores TERM, closes its
 * output, hangs); here is what comes of a run.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { type Bed, until } from "./bed.ts";
import { ALL, isRunning, pairs, presentable, Subject, sweep, textOf } from "./faults.ts";
import { missing as noStrace } from "./faults-strace.ts";
import { LEMATT } from "./programs.ts";

/** ari: no, since what lematt forgets with its state it asks again too soon, which the CA would hold against it. */
const EC = { settings: "keyTypes: ec\nari: no" };
/** For the program itself, which finds no name of a test on the network. */
const PROGRAM = { settings: `${EC.settings}\npreflight: no` };

// ---- files -------------------------------------------------------------------------------------------------------

const SOLO = "solo.example.org";
const IN_THE_WAY: readonly string[] = [
  `test/cert/${SOLO}-cert-combined.prime256v1.test.pem`,
  `test/key/${SOLO}-key.prime256v1.test.pem`,
  `test/csr/${SOLO}-csr.prime256v1.test.csr`,
  "test/cert/www.example.com-cert-combined.prime256v1.test.pem",
  "test/key/www.example.com-key.prime256v1.test.pem",
  "test/state.json",
  "test/.lock",
  "test/.cleanup",
  "account.key",
  "test/cert",
  "test/key",
  "test",
];
const OBSTACLES: Readonly<Record<string, (path: string, victim: string) => void>> = {
  "a directory"(path) {
    Deno.mkdirSync(path);
    Deno.writeTextFileSync(join(path, "in-use"), "");
  },
  "a link to nowhere": (path) => Deno.symlinkSync("/nowhere/at/all", path),
  "a link to itself": (path) => Deno.symlinkSync(path, path),
  "a link to another's file": (path, victim) => Deno.symlinkSync(victim, path),
  "an empty file": (path) => Deno.writeTextFileSync(path, ""),
};

Deno.test("whatever stands in the way of a file is told, harms nothing else, and is no harm once it is gone", async () => {
  const points = pairs(IN_THE_WAY, Object.keys(OBSTACLES));
  await sweep("in the way of a file", points, 4, async ([what, obstacle]) => {
    await using subject = await Subject.create(EC);
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
    await Deno.remove(path, { recursive: true }).catch(() => {}); // as one would who does not know what it was
    if (what === "account.key") Deno.renameSync(aside, path);
    await subject.recover();
  });
});

Deno.test("a drop directory that vanishes during a run fails what needs it, and nothing else", async () => {
  await using subject = await Subject.create(EC);
  const { bed } = subject;
  bed.ca.switches.fault = ({ resource }) => {
    if (resource === "authz" && existsSync(bed.drop)) Deno.removeSync(bed.drop);
    return undefined;
  };
  const ran = await subject.attempt();
  Deno.mkdirSync(bed.drop);
  await subject.afterFault(ran);
  assert.equal(ran.code, 1);
  assert.match(ran.stderr, /FAILED {2}solo\.example\.org \(ec\)\n +No such file or directory .*\/drop\//);
  await subject.recover();
});

Deno.test({
  name: "a report that cannot be written keeps no certificate from being issued and delivered",
  ignore: Deno.build.os !== "linux", // which has /dev/full
  async fn() {
    await using subject = await Subject.create(PROGRAM);
    const shell = ["/bin/sh", "-c", 'exec "$@" >/dev/full', "sh"];
    const ran = await subject.program(shell, "--test");
    assert.deepEqual([ran.code, ran.stdout], [1, ""]);
    assert.match(ran.stderr, /^lematt: cannot write what there is to say: No space left on device.*\n$/);
    const again = await subject.recover();
    assert.match(again.stdout, /^nothing due/);
  },
});

// ---- another user's files ----------------------------------------------------------------------------------------

/** Root is refused nothing, unless that is taken from it. */
const AS_ANYBODY = Deno.uid() === 0
  ? ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
  : [];

const NOT_OURS: Readonly<Record<string, readonly [(bed: Bed) => void, RegExp]>> = {
  "a certificate directory that cannot be written to": [
    (bed) => Deno.chmodSync(bed.path("test/cert"), 0o555),
    /^FAILED .*\n +Permission denied .*test\/cert/,
  ],
  "a key that cannot be read": [
    (bed) => Deno.chmodSync(bed.path(IN_THE_WAY[1]!), 0),
    /^FAILED {2}solo\.example\.org \(ec\)\n +Permission denied.*solo\.example\.org-key/,
  ],
  "a state that cannot be written": [
    (bed) => Deno.chmodSync(bed.path("test"), 0o555),
    /Permission denied .*test\//,
  ],
};

Deno.test("what another user has closed is told, and costs the CA no order", async () => {
  await sweep("another user's files", Object.keys(NOT_OURS), 2, async (what) => {
    const [close, told] = NOT_OURS[what]!;
    await using subject = await Subject.create(PROGRAM);
    const { bed } = subject;
    await bed.run();
    Deno.removeSync(bed.path(IN_THE_WAY[0]!)); // so that something is due
    subject.countOrders();
    const before = bed.ca.orders.length;
    close(bed);
    const ran = await subject.program(AS_ANYBODY, "--test");
    presentable(ran.stdout + ran.stderr);
    assert.match(ran.stderr, told);
    assert.equal(bed.ca.orders.length, before);
    for (const path of [bed.drop, bed.path("test"), bed.path("test/cert")]) Deno.chmodSync(path, 0o755);
    Deno.chmodSync(bed.path(IN_THE_WAY[1]!), 0o600);
    await subject.recover();
  });
});

Deno.test("keys are nobody else's and certificates everybody's, whatever the umask, below a setgid directory, too", async () => {
  await sweep("umask", pairs([0o000, 0o022, 0o077], [0o755, 0o2777]), 2, async ([umask, mode]) => {
    await using subject = await Subject.create(EC);
    const { bed } = subject;
    for (const path of [bed.conf, bed.drop, bed.path("test")]) Deno.chmodSync(path, mode);
    const modes: (number | null)[] = [];
    bed.ca.switches.fault = ({ resource }) => {
      if (resource === "challenge") {
        modes.push(...bed.dropped().map((name) => Deno.statSync(join(bed.drop, name)).mode));
      }
      return undefined;
    };
    const before = Deno.umask(umask);
    try {
      assert.equal((await bed.run()).code, 0);
    } finally {
      Deno.umask(before);
    }
    assert(modes.length > 0 && modes.every((mode) => (mode! & 0o777) === 0o644), "challenge files");
    for (const { name } of Deno.readDirSync(bed.path("test/cert"))) {
      assert.equal(Deno.statSync(bed.path("test/cert", name)).mode! & 0o777, 0o644, name);
    }
    await subject.recover();
  });
});

// ---- at the same time --------------------------------------------------------------------------------------------

Deno.test("of runs started together one does the work, and the others say so", async () => {
  await using subject = await Subject.create(PROGRAM);
  const gate = join(subject.bed.home, "gate");
  subject.configure({ upload: `until [ -e ${gate} ]; do sleep 0.05; done; cp -L CERTS ${subject.served}` });
  let refused = 0;
  const runs = [1, 2, 3].map(async () => {
    const { code, stderr } = await subject.program([], "--test");
    if (code === 0) return;
    assert.match(stderr, /^lematt: another --test run is under way .*\n$/);
    assert.equal(code, 3);
    refused++;
  });
  const all = Promise.all(runs);
  await Promise.race([all, until("two runs have given up", () => refused === 2, 30)]);
  Deno.writeTextFileSync(gate, "");
  await all;
  assert.deepEqual([refused, subject.bed.ca.orders.length], [2, 2]);
  subject.configure();
  await subject.recover();
});

Deno.test("a run that finds another one at work leaves its prepare command and its challenges alone", async () => {
  await using subject = await Subject.create(PROGRAM);
  const { bed } = subject;
  const gate = Promise.withResolvers<void>();
  await using slow = Deno.serve({ port: 0, onListen: () => {} }, async ({ url }) => {
    await gate.promise;
    return await fetch(new URL(new URL(url).pathname, `http://127.0.0.1:${bed.web.port}`));
  });
  bed.ca.switches.httpPort = slow.addr.port;
  const first = subject.program([], "--test");
  await until("challenges are waiting", () => bed.dropped().length === 3 && subject.prepared().length === 1);
  assert.equal((await subject.program([], "--test", "--retry")).code, 3);
  assert(subject.prepared().every(isRunning));
  assert.equal(bed.dropped().length, 3);
  gate.resolve();
  assert.equal((await first).code, 0);
  await subject.recover();
});

Deno.test("a first run with --test and one with --prod make one account key between them", async () => {
  await using subject = await Subject.create(PROGRAM);
  const { bed } = subject;
  const runs = await Promise.all(["--test", "--prod"].map((mode) => subject.program([], mode)));
  for (const { code, stderr } of runs) assert.equal(code, 0, stderr);
  assert.equal(bed.ca.accounts.length, 1);
  Deno.removeSync(bed.path("prod"), { recursive: true });
  subject.countOrders();
  await subject.recover();
});

Deno.test("the lock file of a run that died is no lock", async () => {
  await using subject = await Subject.create(EC);
  Deno.writeTextFileSync(subject.bed.path("test/.lock"), "4711\n");
  await subject.recover();
});

Deno.test({
  name: "a file system without locks is told in a line, and nothing is done there",
  ignore: noStrace !== undefined,
  async fn() {
    await sweep("no locks", ["ENOLCK", "EOPNOTSUPP", "EINVAL", "ENOSYS", "EIO"], 1, async (error) => {
      await using subject = await Subject.create(PROGRAM);
      const strace = ["strace", "-f", "-o", "/dev/null", `-einject=flock:error=${error}`];
      const ran = await subject.program(strace, "--test");
      assert.equal(ran.code, 1);
      assert.match(
        ran.stderr,
        /^lematt: .*: lock '.*\/test\/\.lock', on a file system that must support locks\n$/,
      );
      assert.equal(subject.bed.ca.log.length, 0);
      await subject.recover();
    });
  },
});

// ---- the clock ---------------------------------------------------------------------------------------------------

Deno.test("what a clock has put off that was a year ahead waits no longer once the clock is right", async () => {
  await using subject = await Subject.create(EC);
  const { bed } = subject;
  const [alerts, days] = [join(bed.home, "alerts"), 86_400_000];
  subject.configure({ upload: "exit 1", more: `alert: ["cat >> ${alerts}"]` });
  const ahead = () => new Date(bed.ca.now.getTime() + 365 * days);
  await bed.run();
  for (let times = 1; times <= 2; times++) presentable((await bed.run({ now: ahead, retry: true })).stderr);
  assert.match(textOf(alerts), /exit status 1/);
  Deno.removeSync(alerts);

  bed.ca.advance(2 * days);
  assert.equal((await bed.run()).code, 1);
  assert.match(textOf(alerts), /exit status 1/);
  bed.ca.advance(2 * days);
  subject.configure();
  const { code, stderr } = await bed.run();
  assert.deepEqual([code, stderr], [0, ""]);
  await subject.recover({ orders: 2 });
});

Deno.test("a clock that is a year behind costs each line an order, and no more once it is right", async () => {
  await using subject = await Subject.create(EC);
  const { bed } = subject;
  const behind = () => new Date(bed.ca.now.getTime() - 365 * 86_400_000);
  for (let times = 1; times <= 3; times++) presentable((await bed.run({ now: behind })).stderr);
  assert.equal(bed.ca.orders.length, 2);
  await subject.recover();
});

// ---- commands ----------------------------------------------------------------------------------------------------

/** What ignores TERM gets five seconds. */
const isQuick = (what: string) => ALL || !what.includes("TERM");

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
  "takes everything away": "rm -rf CONF/test",
  "runs lematt itself": `${LEMATT.join(" ")} --test --config CONF`,
};

Deno.test("an upload that goes wrong in any way is owed, and made good once it works", async () => {
  await sweep("uploads that go wrong", Object.keys(UPLOADS).filter(isQuick), 2, async (what) => {
    await using subject = await Subject.create({ settings: `${PROGRAM.settings}\ncommandTimeout: 1` });
    subject.configure({ upload: UPLOADS[what]!.replace("CONF", subject.bed.conf) });
    const ran = await subject.program([], "--test");
    presentable(ran.stdout + ran.stderr);
    assert.notEqual(ran.code, 0);
    assert.deepEqual([...Deno.readDirSync(subject.served)], []);
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
  "dies during the validation": "until ls DROP/* 2>/dev/null; do sleep 0.01; done; kill -KILL $$",
  "dies after the validation": "cat >/dev/null; kill -KILL $$",
  "ignores TERM and its input": "trap '' TERM; while :; do sleep 0.1; done",
};

Deno.test("a prepare command that goes wrong in any way leaves nothing behind", async () => {
  await sweep("prepare commands that go wrong", Object.keys(PREPARES).filter(isQuick), 2, async (what) => {
    const asProgram = what.endsWith("lematt");
    await using subject = await Subject.create(asProgram ? PROGRAM : EC);
    const { bed } = subject;
    subject.configure({ prepare: PREPARES[what]!.replace("DROP", bed.drop) });
    await subject.afterFault(await (asProgram ? subject.program([], "--test") : subject.attempt()));
    if (what !== "kills lematt") assert.deepEqual(bed.dropped(), []);
    subject.configure();
    await subject.recover();
  });
});
