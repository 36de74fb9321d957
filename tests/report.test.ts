/** Goal: what a person gets to read, in each manner of speaking. */

import assert from "node:assert/strict";
import { AcmeError } from "../lib/acme.ts";
import { CommandError } from "../lib/actions.ts";
import type { Cause } from "../lib/alert.ts";
import { VerificationError } from "../lib/deliver.ts";
import type { Due, Kept, Plan, Reason, Rule, Task } from "../lib/plan.ts";
import {
  alertText,
  errorText,
  type Event,
  type Manner,
  nameText,
  noticeText,
  reasonText,
  Report,
  revocationText,
  ruleText,
  servedText,
  type Summary,
} from "../lib/report.ts";
import type { Debt, Entry, Finding } from "../lib/store.ts";
import type { Served } from "../lib/verify.ts";
import type { Certificate } from "../lib/x509.ts";

const NOW = new Date("2026-03-01T12:00:00Z");
const inDays = (days: number) => new Date(NOW.getTime() + days * 86_400_000);

const certificate = {
  names: ["example.com", "www.example.com"],
  notBefore: inDays(-10),
  notAfter: inDays(80),
  fingerprint: "0123456789abcdef".repeat(4),
} as unknown as Certificate;
const entryOf = (
  names: string[],
  keyType: Entry["keyType"] = "rsa",
  finding: Finding = { kind: "present", certificate },
): Entry => ({
  line: { line: 1, names, sections: [], keyTypes: ["rsa", "ec"], formerNames: [] },
  keyType,
  stem: names.join("_"),
  finding,
});
const MISSING: Reason = { kind: "found", finding: { kind: "missing", what: "certificate" } };

/** A line with certificates of both key types that are due. */
function taskOf(...names: string[]): Task & { due: [Due, Due] } {
  const [rsa, ec] = [entryOf(names, "rsa"), entryOf(names, "ec")];
  const line = rsa.line;
  return { line, due: [{ entry: rsa, reason: MISSING }, { entry: { ...ec, line }, reason: MISSING }] };
}

/** A summary of nothing but `parts`. */
const summaryOf = (parts: Partial<Summary> = {}): Summary => ({
  due: 0,
  issued: 0,
  failed: 0,
  kept: [],
  waiting: [],
  owed: {},
  ...parts,
});
const kept = (rule: Rule = "expiry"): Kept => ({
  entry: entryOf(["example.com"]),
  renewAt: inDays(65),
  rule,
  notAfter: inDays(80),
});
const debt: Debt = {
  since: "2026-02-28T03:00:00.000Z",
  certificates: { a: "1", b: "2" },
  attempts: 2,
  retryAt: "2026-03-01T13:30:00.000Z",
  lastError: 'Cannot run "rsync": exit status 255',
};

/** What is said of `events` and `summary`, and the exit status. */
function spoken(manner: Partial<Manner>, events: readonly Event[], summary: Summary) {
  let [out, err] = ["", ""];
  const report = new Report({
    mode: "test",
    cron: false,
    json: false,
    terminal: false,
    color: false,
    now: () => NOW,
    out: (text) => out += text,
    err: (text) => err += text,
    ...manner,
  });
  for (const event of events) report.tell(event);
  const code = report.finish(summary);
  return { code, out, err };
}

// ---- sentences -----------------------------------------------------------------------------------

Deno.test("reasonText() says why a certificate is issued", () => {
  const found = (finding: Exclude<Finding, { kind: "present" }>): Reason => ({ kind: "found", finding });
  const table: [Reason, string][] = [
    [MISSING, "no certificate yet"],
    [found({ kind: "missing", what: "key" }), "its key is missing"],
    [found({ kind: "unreadable", what: "key", detail: "EACCES" }), "its key cannot be read: EACCES"],
    [
      found({ kind: "other names", certificate }),
      "the names changed, it was for example.com www.example.com",
    ],
    [found({ kind: "other key", certificate }), "it did not match its key"],
    [{ kind: "revoked", at: NOW }, "revoked 2026-03-01"],
    [{ kind: "expired", at: inDays(-1) }, "expired 2026-02-28"],
    [{ kind: "renewal", since: NOW, rule: "age" }, "due since 2026-03-01 by generateNewCertsAfterDays"],
    [{ kind: "renewal", since: NOW, rule: "ari" }, "the CA suggests 2026-03-01"],
    [
      { kind: "renewal", since: NOW, rule: "ari", explanationUrl: "https://ca.example/why" },
      "the CA suggests 2026-03-01, see https://ca.example/why",
    ],
  ];
  for (const [reason, text] of table) assert.equal(reasonText(reason), text);
});

Deno.test("ruleText() names the setting", () => {
  const table: [Rule, RegExp][] = [
    ["age", /^generateNewCertsAfterDays$/],
    ["expiry", /^reauthorizeDays$/],
    ["expiry, capped", /^reauthorizeDays, capped/],
    ["ari", /^the CA's suggestion$/],
    ["age beyond life", /^reauthorizeDays, since .* generateNewCertsAfterDays$/],
  ];
  for (const [rule, text] of table) assert.match(ruleText(rule), text);
});

Deno.test("nameText() keeps long lines short", () => {
  assert.equal(nameText(["example.com"]), "example.com");
  assert.equal(nameText(Array.from({ length: 100 }, (_, n) => `${n}.example.com`)), "0.example.com +99");
});

Deno.test("noticeText() puts the place before and the hint below", () => {
  assert.equal(
    noticeText({ file: "domains", line: 3, text: "Cannot read", hint: "do" }),
    "domains:3: Cannot read\n  hint: do",
  );
  assert.equal(noticeText({ file: "domains", text: "Cannot read" }), "domains: Cannot read");
});

Deno.test("errorText() shows what was expected in a line, and a bug with its stack", () => {
  const problem = { type: "connection", detail: "no route", subproblems: [] };
  const served = { endpoint: "mail.example.com:465" } as Served;
  const table: [Error, RegExp][] = [
    [
      new AcmeError("validate", "no route (connection)", "https://ca.example/1", { problem }),
      /^cannot validate: no route \(connection\)$/,
    ],
    [new CommandError("rsync x", "exit status 12"), /^Cannot run "rsync x": exit status 12$/],
    [new VerificationError([served]), /^mail\.example\.com:465 does not serve the newest certificate$/],
    [new DOMException("interrupted", "AbortError"), /^interrupted$/],
    [Object.assign(new Error("no space left on device"), { code: "ENOSPC" }), /^no space left on device$/],
    [new TypeError("x is undefined"), /^TypeError: x is undefined\n +at /],
  ];
  for (const [error, text] of table) assert.match(errorText(error), text);
});

Deno.test("alertText() has a line for each cause, and one for none", () => {
  const { line } = entryOf(["example.com", "www.example.com"]);
  const causes: Cause[] = [
    { kind: "failing", line, times: 3, error: "cannot validate: 403" },
    { kind: "expiring", entry: entryOf(["example.com"], "ec"), notAfter: inDays(5) },
    {
      kind: "owed",
      section: "mail",
      lines: [line],
      since: inDays(-2),
      error: 'Cannot run "rsync": exit status 255',
    },
  ];
  assert.equal(
    alertText("mail", causes),
    `example.com +1 failed 3 times in a row: cannot validate: 403
example.com (ec) expires 2026-03-06 12:00 UTC and is not renewed yet
[mail] owes a delivery since 2026-02-27 12:00 UTC: Cannot run "rsync": exit status 255
`,
  );
  assert.equal(alertText("mail", []), "[mail] all is well again\n");
});

Deno.test("servedText() names the certificate, or why there is none", () => {
  const base = { endpoint: "x", keyType: "rsa", address: "192.0.2.7", expected: certificate } as const;
  const table: [Served, string][] = [
    [{ ...base, state: "current", certificate }, "current at 192.0.2.7: 0123456789abcdef, until 2026-05-20"],
    [{ ...base, state: "old", certificate }, "old at 192.0.2.7: 0123456789abcdef, until 2026-05-20"],
    [
      { ...base, state: "other", certificate },
      "other at 192.0.2.7: 0123456789abcdef for example.com +1, until 2026-05-20",
    ],
    [
      { ...base, state: "other", detail: "no certificate of this type" },
      "other at 192.0.2.7: no certificate of this type",
    ],
    [{ ...base, state: "unreachable", address: "", detail: "no address" }, "unreachable: no address"],
  ];
  for (const [served, text] of table) assert.equal(servedText(served), text);
});

Deno.test("revocationText() shows each certificate with all its names", () => {
  assert.equal(
    revocationText("prod", [entryOf(["example.com", "www.example.com"], "ec")]),
    "These certificates of --prod are to be revoked for good:\n  ec  0123456789abcdef, until 2026-05-20, for example.com www.example.com\n",
  );
});

// ---- manners -------------------------------------------------------------------------------------

const [rsa, ec] = taskOf("example.com", "www.example.com").due;
const task: Task = { line: rsa.entry.line, due: [rsa, ec] };
const issued = (due: Due): Event => ({ kind: "issued", due, certificate, seconds: 1.5 });
const NOTICE: Event = { kind: "notice", text: "lematt.conf:3: a warning" };
const failure: Event = {
  kind: "failed",
  due: [rsa, ec],
  error: new AcmeError("validate", "no route (connection)", "https://ca.example/1"),
};

Deno.test("certificates of a line are told in one line where the same can be said of them", () => {
  const { out } = spoken({}, [
    { kind: "begin", tasks: [task] },
    { kind: "task", task },
    issued(ec),
    issued(rsa),
    { kind: "end", task },
  ], summaryOf({ issued: 2 }));
  assert.equal(
    out,
    "issued  example.com +1               rsa ec  until 2026-05-20 (no certificate yet)\n2 issued, 0 kept\n",
  );
});

Deno.test("a failure is told once for both key types, with what the command printed, on standard error", () => {
  const error = new CommandError("ssh mail", "exit status 255", { output: "ssh: no route\n\nbye\n" });
  const { out, err, code } = spoken({}, [{ kind: "task", task }, { kind: "failed", due: [rsa, ec], error }, {
    kind: "end",
    task,
  }], summaryOf({ failed: 2, kept: [kept()] }));
  assert.equal(
    err,
    `FAILED  example.com +1 (rsa, ec)\n        Cannot run "ssh mail": exit status 255\n        | ssh: no route\n        | bye\n`,
  );
  assert.equal(out, "2 failed, 1 kept, next renewal 2026-05-05 (example.com rsa)\n");
  assert.equal(code, 1);
});

Deno.test("a shared command that succeeded or failed is told once", () => {
  const outcome = { command: "reload", output: "", seconds: 0.2 };
  const error = new CommandError("reload", "exit status 1");
  const delivery = (section: string, error?: Error): Event => ({
    kind: "delivery",
    delivery: {
      section,
      entries: [rsa.entry],
      commands: [{ template: "reload", outcome }],
      served: [],
      error,
      since: NOW,
    },
  });
  const { out, err } = spoken(
    {},
    [delivery("a"), delivery("b"), delivery("c", error), delivery("d", error)],
    summaryOf(),
  );
  assert.equal(out, "ran     [a] reload (0.2 s)\nnothing due, 0 kept\n");
  assert.equal(err, `FAILED  [c]\n        Cannot run "reload": exit status 1\n`);
});

Deno.test("what waits and what is owed is told, and is no success", () => {
  const { out, err, code } = spoken(
    {},
    [],
    summaryOf({
      waiting: [
        { ...task, until: inDays(1), failure: { count: 1, at: NOW.toISOString(), error: "x" } },
        { ...task, until: inDays(1), failure: { count: 4, at: NOW.toISOString(), error: "x" } },
        { ...task, until: inDays(2) },
        { ...task, until: inDays(2) },
      ],
      owed: { mail: debt, web: { since: debt.since, certificates: { a: "1" }, attempts: 0 } },
    }),
  );
  assert.equal(
    err,
    `waiting 2 lines: the CA wants no orders before 2026-03-03 12:00 UTC (--retry asks now)
waiting example.com +1: failed once, tried again from 2026-03-02 12:00 UTC (--retry tries now)
waiting example.com +1: failed 4 times, tried again from 2026-03-02 12:00 UTC (--retry tries now)
owed    [mail] owes 2 certificates since 2026-02-28, tried again: not before 2026-03-01 13:30 UTC; Cannot run "rsync": exit status 255
owed    [web] owes 1 certificate since 2026-02-28, tried again: next run
`,
  );
  assert.equal(out, "nothing due, 4 lines waiting, 0 kept, 2 deliveries owed\n");
  assert.equal(code, 1);
});

Deno.test("a plan is told on standard output alone, and says how much is due", () => {
  const plan: Plan = {
    tasks: [task],
    waiting: [{
      ...task,
      until: inDays(1),
      failure: { count: 1, at: NOW.toISOString(), error: "cannot validate: 403" },
    }, { ...task, until: inDays(2) }],
    kept: [kept(), kept("expiry, capped")],
  };
  const events: Event[] = [{
    kind: "plan",
    plan,
    owed: { mail: debt },
    records: ["_acme-challenge.example.com. TXT"],
  }];
  const { out, err } = spoken({}, events, summaryOf({ due: 2, ...plan, owed: { mail: debt } }));
  assert.equal(err, "");
  assert.deepEqual(out.split("\n").map((line) => line.replace(/ {2,}/g, "  ")), [
    "issue  example.com +1  rsa  no certificate yet",
    "issue  example.com +1  ec  no certificate yet",
    "wait  example.com +1  rsa  no certificate yet; it failed (cannot validate: 403), not before 2026-03-02 12:00 UTC",
    "wait  example.com +1  ec  no certificate yet; it failed (cannot validate: 403), not before 2026-03-02 12:00 UTC",
    "wait  example.com +1  rsa  no certificate yet; the CA wants no orders before 2026-03-03 12:00 UTC",
    "wait  example.com +1  ec  no certificate yet; the CA wants no orders before 2026-03-03 12:00 UTC",
    "keep  example.com  rsa  until 2026-05-05, in 65 days (reauthorizeDays); expires 2026-05-20",
    "keep  example.com  rsa  until 2026-05-05, in 65 days (reauthorizeDays, capped); expires 2026-05-20",
    'deliver [mail] owes 2 certificates since 2026-02-28, tried again: not before 2026-03-01 13:30 UTC; Cannot run "rsync": exit status 255',
    "place  _acme-challenge.example.com. TXT",
    "note  reauthorizeDays is capped for 1 certificate: none is renewed with more than two thirds of its life left (half, if that is under ten days)",
    "2 due, 2 lines waiting, 2 kept, 1 delivery owed, next renewal 2026-05-05 (example.com rsa)",
    "",
  ]);
});

Deno.test("--cron says nothing of notices while nothing changes, and all of it once something does", () => {
  assert.deepEqual(spoken({ cron: true }, [NOTICE], summaryOf({ kept: [kept("expiry, capped")] })), {
    code: 0,
    out: "",
    err: "",
  });
  const { out } = spoken(
    { cron: true },
    [NOTICE, { kind: "task", task }, issued(rsa), { kind: "end", task }],
    summaryOf({ issued: 1 }),
  );
  assert.deepEqual(out.split("\n").map((line) => line.slice(0, 8)), ["note    ", "issued  ", "1 issued", ""]);
  const { out: changed } = spoken({ cron: true }, [{ ...NOTICE, changed: true }], summaryOf());
  assert.match(changed, /^note .*\nnothing due/);
  const failed = spoken({ cron: true }, [NOTICE, failure], summaryOf({ failed: 2 }));
  assert.deepEqual([failed.out, failed.err !== ""], ["", true]);
});

Deno.test("--json is one document, failures are told on standard error as well", () => {
  const events: Event[] = [
    NOTICE,
    { kind: "begin", tasks: [task] },
    { kind: "task", task },
    issued(rsa),
    failure,
    { kind: "end", task },
  ];
  const { out, err } = spoken(
    { json: true, terminal: false },
    events,
    summaryOf({ issued: 1, failed: 1, kept: [kept()], owed: { mail: debt } }),
  );
  const { mode, notes, issued: made, failed, kept: staying, owed } = JSON.parse(out);
  assert.equal(mode, "test");
  assert.deepEqual(notes, ["lematt.conf:3: a warning"]);
  assert.deepEqual(made, [{
    names: ["example.com", "www.example.com"],
    keyType: "rsa",
    reason: "no certificate yet",
    notAfter: "2026-05-20T12:00:00.000Z",
    fingerprint: certificate.fingerprint,
    seconds: 1.5,
  }]);
  assert.deepEqual(failed, [{
    names: ["example.com", "www.example.com"],
    keyTypes: ["rsa", "ec"],
    error: "cannot validate: no route (connection)",
  }]);
  assert.equal(staying[0].renewAt, inDays(65).toISOString());
  assert.deepEqual(owed, { mail: debt });
  assert.match(err, /^FAILED {2}example\.com \+1 \(rsa, ec\)\n/);
});

Deno.test("--json with --cron is silent, too, unless something changed or failed", () => {
  const manner = { json: true, cron: true };
  assert.deepEqual(spoken(manner, [NOTICE], summaryOf({ kept: [kept()] })), { code: 0, out: "", err: "" });
  for (
    const [events, summary] of [[[issued(rsa), { kind: "end", task }], { issued: 1 }], [[failure], {
      failed: 2,
    }], [[], { owed: { mail: debt } }]] as [Event[], Partial<Summary>][]
  ) {
    assert.equal(JSON.parse(spoken(manner, events, summaryOf(summary)).out).mode, "test");
  }
});

Deno.test("on a terminal one line counts, and is gone before anything else is written", () => {
  const other = taskOf("other.example.com");
  const events: Event[] = [
    { kind: "begin", tasks: [task, other] },
    { kind: "task", task },
    { kind: "task", task: other },
    issued(rsa),
    failure,
    { kind: "end", task },
    { kind: "end", task: other },
  ];
  let text = "";
  const write = (more: string) => {
    // the counting line ends without a line break, so whatever follows must clear it first
    if (!text.endsWith("\n") && !text.endsWith("\r\x1b[K") && text !== "") assert.equal(more, "\r\x1b[K");
    text += more;
  };
  spoken({ terminal: true, out: write, err: write }, events, summaryOf({ issued: 1, failed: 2 }));
  assert.ok(text.includes("0 of 2 lines done, 2 in flight, 0 failed\r\x1b[K"));
  assert.ok(text.includes("1 of 2 lines done, 1 in flight, 1 failed\r\x1b[K"));
  assert.ok(text.endsWith("1 issued, 2 failed, 0 kept\n"));
  const shown = text.split("\n").map((line) => line.split("\r\x1b[K").at(-1));
  assert.deepEqual(shown.filter((line) => line!.includes("in flight")), []);
});

Deno.test("a single line is not counted, nor is anything off a terminal", () => {
  for (
    const [terminal, tasks] of [[true, [task]], [false, [task, taskOf("other.example.com")]]] as [
      boolean,
      Task[],
    ][]
  ) {
    const { out } = spoken({ terminal }, [{ kind: "begin", tasks }, { kind: "task", task }], summaryOf());
    assert.ok(!out.includes("in flight") && !out.includes("\x1b"));
  }
});

Deno.test("only FAILED is coloured, and only where colour is wanted", () => {
  assert.ok(spoken({ color: true }, [failure], summaryOf()).err.startsWith("\x1b[31mFAILED\x1b[0m  example"));
  assert.ok(!spoken({}, [failure], summaryOf()).err.includes("\x1b"));
});

Deno.test("an alert is told, and its failure is a failure", () => {
  const { out, err } = spoken({}, [
    { kind: "alert", section: "mail", causes: [] },
    {
      kind: "alert",
      section: "web",
      causes: [{ kind: "owed", section: "web", lines: [], since: NOW }],
      error: new CommandError("mail", "exit status 1"),
    },
  ], summaryOf());
  assert.match(out, /^alert {3}\[mail\] all is well again\n/);
  assert.equal(err, `FAILED  [web] alert\n        Cannot run "mail": exit status 1\n`);
});
