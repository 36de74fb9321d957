/**
 * Goal: unexpected files and directories, another user's files, runs of both modes, commands that go wrong and wrong clocks
 * cost at most a line of text, and one undisturbed run later everything is in order. See hooks.test.ts for commands alone.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { all } from "./bed.ts";
import { listing, pairs, presentable, PROGRAM, SHARE, Subject, sweep, textOf } from "./faults.ts";
import { missing as noStrace } from "./faults-strace.ts";
import { LEMATT } from "./programs.ts";

const DAYS = 86_400_000, YEAR = 365 * DAYS;
/** ari: no, as lematt would ask again too soon after its state is lost, which is a violation. */
const SETTINGS = `${PROGRAM}\nari: no`;
const create = () => Subject.create({ settings: SETTINGS });

const CERT = "test/cert/solo.example.org-cert-combined.prime256v1.test.pem";
const KEY = "test/key/solo.example.org-key.prime256v1.test.pem";
const IN_THE_WAY = [
  ...[CERT, KEY, "test/csr/solo.example.org-csr.prime256v1.test.csr"],
  ...[CERT, KEY].map((path) => path.replace("solo.example.org", "www.example.com")),
  ..."test/state.json test/revoked-keys test/.lock account.key.test test/cert test/key test".split(" "),
];
const OBSTACLES: Readonly<Record<string, (path: string, victim: string) => void>> = {
  "a directory": (path) => Deno.mkdirSync(join(path, "in-use"), { recursive: true }),
  "a link to nowhere": (path) => Deno.symlinkSync("/nowhere/at/all", path),
  "a link to itself": (path) => Deno.symlinkSync(path, path),
  "a link to another's file": (path, victim) => Deno.symlinkSync(victim, path),
  "an empty file": (path) => Deno.writeTextFileSync(path, ""),
};

Deno.test("anything in the place of a file is reported and harms nothing else, and lematt recovers once it is removed", async () => {
  const points = pairs(IN_THE_WAY, Object.keys(OBSTACLES));
  await sweep("in the way of a file", points, 4, async ([what, obstacle]) => {
    await using subject = await create();
    const { bed } = subject;
    await bed.run();
    subject.begin();
    const [path, aside, victim] = [bed.path(what), join(bed.home, "aside"), join(bed.home, "victim")];
    Deno.writeTextFileSync(victim, "precious");
    if (existsSync(path)) Deno.renameSync(path, aside);
    OBSTACLES[obstacle]!(path, victim);

    const ran = await subject.attempt();
    presentable(ran.stdout + ran.stderr);
    assert.equal(textOf(victim), "precious");
    if (/solo|www/.test(what)) {
      const others = subject.inventory().filter(({ stem }) => !what.includes(stem));
      assert(others.every(({ finding }) => finding.kind === "present"));
    }
    subject.dropUnusable();
    await Deno.remove(path, { recursive: true }).catch(() => {}); // as an administrator might, without looking inside
    if (what === "account.key.test") Deno.renameSync(aside, path);
    await subject.recover({ lost: path });
  });
});

Deno.test("another user's files and a file system without locks cost no order, and a report that cannot be written no delivery", async () => {
  // without these capabilities root is refused access as other users are
  const others = Deno.uid() === 0 ? ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"] : [];
  const table: [by: string[], path: string, mode: number, error: RegExp, code: number, orders?: number][] = [
    [others, "test/cert", 0o555, /Permission denied .*test\/cert/, 1],
    [others, KEY, 0, /solo\.example\.org \(ec\)\n +Permission denied.*solo\.example\.org-key/, 1],
    [others, "test", 0o555, /Permission denied .*test\//, 1],
    [others, "test/state.json", 0, /^lematt: cannot read .*test\/state\.json: Permission denied/, 2],
  ];
  const noLocks = /^lematt: .*: lock '.*\/test\/\.lock', on a file system that must support locks\n$/;
  for (const error of noStrace ? [] : ["ENOLCK", "EOPNOTSUPP", "EINVAL", "ENOSYS", "EIO"]) {
    const failing = ["strace", "-f", "-o", "/dev/null", `-einject=flock:error=${error}`];
    table.push([failing, "test", 0o755, noLocks, 1]);
  }
  if (Deno.build.os === "linux") {
    const full = ["/bin/sh", "-c", 'exec "$@" >/dev/full', "sh"];
    table.push([full, "test", 0o755, /^lematt: cannot write its output: No space left on device.*\n$/, 1, 1]);
  }
  await sweep("files, locks, the output", table, 4, async ([by, closed, mode, error, code, orders = 0]) => {
    await using subject = await create();
    const { bed } = subject;
    await bed.run();
    Deno.removeSync(bed.path(CERT)); // so that something is due
    subject.begin();
    const before = bed.ca.orders.length;
    const open = Deno.statSync(bed.path(closed)).mode!;
    Deno.chmodSync(bed.path(closed), mode);
    const ran = await bed.lemattBy(by, "--test");
    Deno.chmodSync(bed.path(closed), open);
    presentable(ran.stdout + ran.stderr);
    assert.match(ran.stderr, error);
    assert.deepEqual([ran.code, bed.ca.orders.length - before], [code, orders]);
    const { stdout } = await subject.recover();
    assert.equal(stdout.startsWith("nothing due"), orders > 0);
  });
});

Deno.test("a run of each mode at the same time does the work of its mode, with an account and files of its own", async () => {
  await using subject = await create();
  const { bed } = subject;
  for (const { code, stderr } of await all(["--test", "--prod"].map((mode) => bed.lematt(mode)))) {
    assert.deepEqual([code, stderr], [0, ""]);
  }
  assert.deepEqual([bed.ca.accounts.length, bed.ca.orders.length, bed.dropped()], [2, 4, []]);
  assert.deepEqual(listing(bed.path("prod")), [".lock", "cert", "csr", "key", "state.json"]);
  assert(bed.text("account.key") !== bed.text("account.key.test"));
});

Deno.test("a clock that is a year behind costs no order; what one a year ahead has postponed is done once it is right", async () => {
  await using subject = await create();
  const { bed } = subject;
  const clock = (offset: number) => () => new Date(bed.ca.now.getTime() + offset);
  for (let times = 1; times <= 3; times++) presentable((await bed.run({ now: clock(-YEAR) })).stderr);
  assert.equal(bed.ca.orders.length, 0);

  const alert = `alert: ["cat >> HERE/alerts"]`;
  subject.configure({ upload: "exit 1", more: alert });
  await bed.run();
  for (let times = 1; times <= 2; times++) {
    presentable((await bed.run({ now: clock(YEAR), retry: true })).stderr);
  }
  bed.take("alerts");
  for (let times = 1; times <= 2; times++) {
    bed.ca.advance(2 * DAYS);
    assert.equal((await bed.run()).code, 1);
  }
  assert.match(bed.take("alerts").join("\n"), /exit status 1/);
  bed.ca.advance(2 * DAYS);
  subject.configure({ more: alert });
  assert.equal((await bed.run()).code, 0);
  assert.match(bed.take("alerts").join("\n"), /resolved/);
  await subject.recover({ orders: 2 });
});

const COMMANDS: Readonly<Record<string, string>> = {
  "upload: hangs": "sleep 600",
  "upload: hangs and ignores TERM": "trap '' TERM; while :; do sleep 0.1; done",
  "upload: ends its process group": "kill -KILL 0",
  "upload: ends lematt": "kill -TERM $PPID; sleep 600",
  "upload: kills lematt": "kill -KILL $PPID",
  "upload: leaves a daemon and fails": "sleep 5 & exit 1",
  "upload: prints without end": "yes 'no use'",
  "upload: takes its certificates away": "rm -f CERTS; exit 1",
  "upload: takes everything away": "rm -rf HERE/conf/test",
  "upload: runs lematt itself": `${LEMATT.join(" ")} --test --config HERE/conf`,
  "prepare: never begins": "no-such-command",
  "prepare: ends lematt": "kill -TERM $PPID; cat >/dev/null",
  "prepare: kills lematt": "kill -KILL $PPID; cat >/dev/null",
  "prepare: takes the drop directory away": "rm -rf HERE/drop; cat >/dev/null",
  "prepare: dies during the validation":
    "until ls HERE/drop/* 2>/dev/null; do sleep 0.01; done; kill -KILL $$",
  "prepare: dies after the validation": "cat >/dev/null; kill -KILL $$",
  "prepare: ignores TERM and its input": "trap '' TERM; while :; do sleep 0.1; done",
};

Deno.test("a command that goes wrong in any way leaves nothing behind, and what it should have done is done once it works", async () => {
  // commands that ignore SIGTERM are killed only after five seconds
  const points = Object.keys(COMMANDS).filter((what) => SHARE > 0 || !what.includes("TERM"));
  await sweep("commands that go wrong", points, 5, async (what) => {
    const [list, how] = what.split(": ") as ["upload" | "prepare", string];
    await using subject = await Subject.create({ settings: `${SETTINGS}\ncommandTimeout: 1` });
    const { bed } = subject;
    subject.configure({ [list]: COMMANDS[what] });
    const ran = await bed.lematt("--test");
    await subject.afterFault(ran);
    if (list === "upload") assert.deepEqual([ran.code === 0, listing(subject.served)], [false, []]);
    else if (how !== "kills lematt") assert.deepEqual(listing(bed.drop), []);
    Deno.mkdirSync(bed.drop, { recursive: true });
    subject.configure();
    bed.configure({ settings: SETTINGS });
    if (list === "upload" && how.startsWith("takes")) subject.begin();
    await subject.recover();
  });
});
