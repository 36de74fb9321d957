/** Goal: a table that fits a screen and misses nothing, and the same for machines. */

import assert from "node:assert/strict";
import type { Mode } from "../lib/config.ts";
import type { Plan, Rule } from "../lib/plan.ts";
import { status } from "../lib/run.ts";
import { exitStatus, type Status, statusJson, statusMetrics, statusTable } from "../lib/status.ts";
import type { Debt, Entry, Failure, Finding } from "../lib/store.ts";
import type { Served } from "../lib/verify.ts";
import type { Certificate } from "../lib/x509.ts";
import { type Bed, testBed } from "./bed.ts";

const NOW = new Date("2026-03-01T12:00:00Z");
const inDays = (days: number) => new Date(NOW.getTime() + days * 86_400_000);

function certificateOf(names: string[], from: number, to: number): Certificate {
  return {
    names,
    notBefore: inDays(from),
    notAfter: inDays(to),
    fingerprint: "0123456789abcdef".repeat(4),
  } as unknown as Certificate;
}

function entryOf(
  names: string[],
  from: number,
  to: number,
  kind: "present" | "other names" | "other key" = "present",
): Entry {
  return {
    line: { line: 1, names, sections: [], keyTypes: ["rsa", "ec"], formerNames: [] },
    keyType: "rsa",
    stem: names[0]!,
    finding: { kind, certificate: certificateOf(names, from, to) },
  };
}

const kept = (names: string[], to: number, rule: Rule = "expiry") => ({
  entry: entryOf(names, to - 90, to),
  renewAt: inDays(to - 15),
  rule,
  notAfter: inDays(to),
});
const missing = (name: string, what: "certificate" | "key" = "certificate") => {
  const finding: Finding = { kind: "missing", what };
  const entry: Entry = {
    line: { line: 1, names: [name], sections: [], keyTypes: ["rsa", "ec"], formerNames: [] },
    keyType: "ec",
    stem: name,
    finding,
  };
  return { line: entry.line, due: [{ entry, reason: { kind: "found" as const, finding } }] };
};
const served = (endpoint: string, state: Served["state"], more: Partial<Status["served"][number]> = {}) => ({
  endpoint,
  address: "192.0.2.7",
  keyType: "rsa" as const,
  state,
  expected: certificateOf(["example.com"], 0, 90),
  section: "mail",
  ...more,
});

function statusOf(parts: Partial<Omit<Status, "plan">> & { plan?: Partial<Plan> } = {}): Status {
  return {
    mode: "prod",
    now: NOW,
    state: { failures: {}, owed: {} },
    expiring: () => undefined,
    served: [],
    strays: [],
    ...parts,
    plan: { tasks: [], waiting: [], kept: [], ...parts.plan },
  };
}

const failure = (more: Partial<Failure> = {}): Failure => ({
  count: 3,
  at: "2026-03-01T03:00:00.000Z",
  error: "cannot validate: no route",
  ...more,
});
const debt = (more: Partial<Debt> = {}): Debt => ({
  since: "2026-02-28T03:00:00.000Z",
  certificates: { a: "1", b: "2" },
  attempts: 2,
  ...more,
});

// ---- the table -----------------------------------------------------------------------------------

Deno.test("statusTable() shows certificates, debts, endpoints and strays, what needs a person first", () => {
  const found = statusOf({
    plan: {
      tasks: [missing("new.example.com")],
      kept: [kept(["fine.example.com"], 80), kept(["example.com", "www.example.com"], 40, "expiry, capped")],
      waiting: [{
        line: entryOf(["bad.example.com"], -80, 10).line,
        due: [{
          entry: entryOf(["bad.example.com"], -80, 10),
          reason: { kind: "renewal", since: inDays(-5), rule: "expiry" },
        }],
        until: inDays(1),
        failure: failure(),
      }],
    },
    state: {
      failures: { "bad.example.com": failure({ retryAt: "2026-03-02T12:00:00.000Z" }) },
      owed: {
        mail: debt({ lastError: 'Cannot run "rsync": exit status 255', retryAt: "2026-03-01T13:00:00.000Z" }),
        web: debt({ attempts: 0, certificates: { a: "1" } }),
      },
    },
    served: [
      served("mail.example.com:25/smtp", "current", {
        certificate: certificateOf(["mail.example.com"], 0, 90),
      }),
      served("mail.example.com:465", "old", { certificate: certificateOf(["mail.example.com"], -80, 10) }),
    ],
    strays: ["cert/gone.example.com-cert-combined.rsa2048.pem"],
  });
  assert.equal(
    statusTable(found),
    `CERTIFICATE                  KEY LIFE LEFT          RENEWS
bad.example.com              rsa ##........   10 d  2026-03-02 12:00 UTC: due
                                    since 2026-02-24 by reauthorizeDays
  failed 3 times, last 2026-03-01 03:00 UTC: cannot validate: no route; tried
  again from 2026-03-02 12:00 UTC
new.example.com              ec  none               next run: no certificate yet
example.com +1               rsa #####.....   40 d  2026-03-26 by expiry, capped
fine.example.com             rsa #########.   80 d  2026-05-05 by expiry

OWED BY                      SINCE        CERTIFICATES  TRIED AGAIN
[mail]                       2026-02-28   2             from 2026-03-01 13:00
                                    UTC
  Cannot run "rsync": exit status 255
[web]                        2026-02-28   1             by the next run

ENDPOINT                           KEY SERVES
mail.example.com:465               rsa old at 192.0.2.7: 0123456789abcdef, until
                                    2026-03-11
mail.example.com:25/smtp           rsa current at 192.0.2.7: 0123456789abcdef,
                                    until 2026-05-30

FILES OF NO LINE
  cert/gone.example.com-cert-combined.rsa2048.pem

3 things need a person
`,
  );
});

Deno.test("statusTable() fits 80 columns and shows names whole, whatever they are", () => {
  const label = "l".repeat(63);
  const long = `${label}.${label}.${label}.example.com`;
  const many = Array.from({ length: 100 }, (_, n) => `host-${n}.of.a.line.of.a.hundred.names.example.com`);
  const idn = "xn--bcher-kva.example";
  const url = `https://portal.example.org/unpause?jwt=${"x".repeat(900)}`;
  const found = statusOf({
    plan: {
      kept: [
        kept([long], 50),
        kept(many, 1),
        kept([idn], -3),
        kept(["x.example.com"], -400),
        kept(["y.example.com"], 40_000),
      ],
      tasks: [{
        line: entryOf(many, -10, 80).line,
        due: [{
          entry: entryOf(many, -10, 80, "other names"),
          reason: {
            kind: "found",
            finding: { kind: "other names", certificate: certificateOf([long, ...many], -10, 80) },
          },
        }],
      }],
    },
    state: {
      failures: { [idn]: failure({ count: 1, error: `paused, see ${url}` }) },
      owed: {
        [`section ${"s".repeat(90)}`]: debt({ lastError: `Cannot run "${"y".repeat(200)}": exit status 1` }),
      },
    },
    served: [
      served(`${long}:443`, "other", { certificate: certificateOf([long], 0, 90) }),
      served("[2001:db8:1111:2222:3333:4444:5555:6666]:443#www.example.com", "unreachable", {
        detail: "no answer within 10 s",
        address: "2001:db8:1111:2222:3333:4444:5555:6666",
      }),
    ],
    strays: [`cert/${"z".repeat(240)}.pem`, "key/\x1b[31m\n.pem"],
  });
  const table = statusTable(found);
  for (const line of table.split("\n")) {
    if (line.trim() !== url && line.trim() !== `${url};`) {
      assert.ok(line.length <= 80, `${line.length}: ${line}`);
    }
  }
  assert.doesNotMatch(table, /[^\x20-\x7e\n]/);
  const flat = table.replaceAll(/\n\s*/g, "");
  for (
    const text of [
      long,
      idn,
      url,
      `${long}:443`,
      "[2001:db8:1111:2222:3333:4444:5555:6666]:443#www.example.com",
      "z".repeat(240),
      many.at(-1)!,
    ]
  ) {
    assert.ok(flat.includes(text), text);
  }
});

Deno.test("statusTable() draws the life that is left, and never less than nothing", () => {
  const table: [from: number, to: number, drawn: string][] = [
    [0, 90, "##########   90 d"],
    [-45, 45, "#####.....   45 d"],
    [-89.9, 0.1, "#.........  0.1 d"],
    [-90, 0, "..........  0.0 d"],
    [-92.5, -2.5, ".......... -2.5 d"],
    [-190, -100, ".......... -100 d"],
  ];
  for (const [from, to, drawn] of table) {
    const entry = entryOf(["example.com"], from, to);
    const row = statusTable(
      statusOf({ plan: { kept: [{ entry, renewAt: NOW, rule: "expiry", notAfter: inDays(to) }] } }),
    ).split("\n")[1]!;
    assert.ok(row.includes(` ${drawn} `), row);
  }
});

Deno.test("a status without trouble says so, and one without anything, too", () => {
  assert.equal(statusTable(statusOf()), "\nall is well\n");
  assert.match(statusTable(statusOf({ plan: { kept: [kept(["example.com"], 80)] } })), /\n\nall is well\n$/);
});

// ---- what needs a person -------------------------------------------------------------------------

Deno.test("exitStatus() is 1 where a person is needed", () => {
  const waiting = { ...missing("a.example.com"), until: inDays(1) };
  const table: [what: string, Parameters<typeof statusOf>[0], 0 | 1][] = [
    ["nothing at all", {}, 0],
    ["a certificate that is kept", { plan: { kept: [kept(["a.example.com"], 80)] } }, 0],
    ["a certificate that the next run will make", { plan: { tasks: [missing("a.example.com")] } }, 0],
    ["a line that the CA's limits hold", { plan: { waiting: [waiting] } }, 0],
    ["a line that failed", {
      plan: { waiting: [waiting] },
      state: { failures: { "a.example.com": failure() }, owed: {} },
    }, 1],
    ["an expired certificate", { plan: { kept: [kept(["a.example.com"], 0)] } }, 1],
    ["an overdue renewal", { plan: { kept: [kept(["a.example.com"], 10)] }, expiring: () => inDays(10) }, 1],
    ["a debt not yet tried", { state: { failures: {}, owed: { mail: debt({ attempts: 0 }) } } }, 0],
    ["a debt that failed", { state: { failures: {}, owed: { mail: debt({ attempts: 1 }) } } }, 1],
    ["a current endpoint", { served: [served("a:1", "current")] }, 0],
    ["an old one", { served: [served("a:1", "old")] }, 1],
    ["another's", { served: [served("a:1", "other")] }, 1],
    ["none", { served: [served("a:1", "unreachable")] }, 1],
    ["a stray file", { strays: ["key/x.pem"] }, 0],
  ];
  for (const [what, parts, code] of table) assert.equal(exitStatus(statusOf(parts)), code, what);
});

// ---- for machines --------------------------------------------------------------------------------

Deno.test("statusJson() has the documented keys", () => {
  const found = statusOf({
    plan: { kept: [kept(["example.com"], 80)], tasks: [missing("new.example.com", "key")] },
    state: { failures: { "example.com": failure() }, owed: { mail: debt() } },
    served: [served("mail.example.com:465", "unreachable", { detail: "Connection refused" })],
    strays: ["key/x.pem"],
  });
  assert.deepEqual(JSON.parse(statusJson(found)), {
    mode: "prod",
    certificates: [{
      names: ["example.com"],
      keyType: "rsa",
      state: "present",
      notBefore: inDays(-10).toISOString(),
      notAfter: inDays(80).toISOString(),
      fingerprint: "0123456789abcdef".repeat(4),
      renewAt: inDays(65).toISOString(),
      why: "reauthorizeDays",
      failure: failure(),
    }, {
      names: ["new.example.com"],
      keyType: "ec",
      state: "missing",
      renewAt: NOW.toISOString(),
      why: "its key is missing",
    }],
    owed: { mail: debt() },
    endpoints: [{
      section: "mail",
      endpoint: "mail.example.com:465",
      address: "192.0.2.7",
      keyType: "rsa",
      state: "unreachable",
      detail: "Connection refused",
    }],
    strays: ["key/x.pem"],
    troubles: 3,
  });
});

/** Reads the Prometheus text format (version 0.0.4) as its grammar has it; series -> value. */
function readMetrics(text: string): Map<string, number> {
  assert.ok(text.endsWith("\n"));
  const series = new Map<string, number>();
  const typed = new Set<string>();
  let current = "";
  for (const line of text.slice(0, -1).split("\n")) {
    const [, help] = /^# HELP ([a-zA-Z_:][a-zA-Z0-9_:]*) (?:[^\\]|\\\\|\\n)*$/.exec(line) ?? [];
    const [, type] = /^# TYPE ([a-zA-Z_:][a-zA-Z0-9_:]*) gauge$/.exec(line) ?? [];
    const [, key, name] =
      /^(([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?:[a-zA-Z_]\w*="(?:[^"\\]|\\\\|\\"|\\n)*"(?:,|(?=\})))*\})) -?\d+$/
        .exec(line) ?? [];
    if (help !== undefined) current = help;
    else if (type !== undefined) {
      assert.ok(type === current && !typed.has(type), line);
      typed.add(type);
    } else {
      assert.ok(key !== undefined, `no metric: ${line}`);
      assert.equal(name, current);
      assert.ok(!series.has(key), `twice: ${key}`);
      series.set(key, Number(line.slice(key.length + 1)));
    }
  }
  return series;
}

Deno.test("statusMetrics() keeps to the grammar of Prometheus, whatever the names", () => {
  const found = statusOf({
    plan: { kept: [kept(["example.com"], 80)], tasks: [missing("new.example.com")] },
    state: { failures: { "new.example.com": failure() }, owed: { 'a "quoted" \\section': debt() } },
    served: [
      served("mail.example.com:465", "unreachable"),
      served("mail.example.com:465", "current", { keyType: "ec" }),
      served("mail.example.com:465", "unreachable", { section: "every" }),
    ],
    strays: ["a", "b"],
  });
  const series = readMetrics(statusMetrics(found));
  const seconds = (date: Date) => date.getTime() / 1000;
  const table: [string, number][] = [
    [
      `lematt_certificate_not_after_seconds{mode="prod",name="example.com",stem="example.com",key_type="rsa"}`,
      seconds(inDays(80)),
    ],
    [
      `lematt_certificate_renew_at_seconds{mode="prod",name="new.example.com",stem="new.example.com",key_type="ec"}`,
      seconds(NOW),
    ],
    [
      `lematt_certificate_failures{mode="prod",name="new.example.com",stem="new.example.com",key_type="ec"}`,
      3,
    ],
    [`lematt_certificate_failures{mode="prod",name="example.com",stem="example.com",key_type="rsa"}`, 0],
    [
      `lematt_delivery_owed_since_seconds{mode="prod",section="a \\"quoted\\" \\\\section"}`,
      seconds(new Date(debt().since)),
    ],
    [
      `lematt_endpoint_current{mode="prod",section="mail",endpoint="mail.example.com:465",address="192.0.2.7",key_type="rsa"}`,
      0,
    ],
    [
      `lematt_endpoint_current{mode="prod",section="mail",endpoint="mail.example.com:465",address="192.0.2.7",key_type="ec"}`,
      1,
    ],
    [`lematt_stray_files{mode="prod"}`, 2],
    [`lematt_troubles{mode="prod"}`, 4],
    [`lematt_status_seconds{mode="prod"}`, seconds(NOW)],
  ];
  for (const [key, value] of table) assert.equal(series.get(key), value, key);
  assert.equal(
    series.has(
      `lematt_certificate_not_after_seconds{mode="prod",name="new.example.com",stem="new.example.com",key_type="ec"}`,
    ),
    false,
  );
  readMetrics(statusMetrics(statusOf()));
});

// ---- what is found -------------------------------------------------------------------------------

async function found(bed: Bed, { mode = "test", offline = true }: { mode?: Mode; offline?: boolean } = {}) {
  const told: string[] = [];
  const status_ = await status(
    bed.config(mode),
    offline,
    bed.world(),
    (event) => told.push(event.kind === "notice" ? event.text : event.kind),
  );
  return { status: status_, told };
}

Deno.test("status() finds what is missing, changed, expired, unreadable and left over, and changes nothing", async () => {
  await using bed = await testBed({
    domains: "a.example.com\nb.example.com\nc.example.com\nd.example.com www\ngone.example.com",
    settings: "keyTypes: ec\nari: no",
  });
  await bed.plant({ age: 10 });
  const file = (name: string) => bed.path("test", "cert", `${name}-cert-combined.prime256v1.test.pem`);
  await Deno.copyFile(file("a.example.com"), file("b.example.com"));
  await Deno.remove(file("c.example.com"));
  bed.configure({ domains: "a.example.com\nb.example.com\nc.example.com\nd.example.com shop" });
  const before = [...Deno.readDirSync(bed.path("test"))].map(({ name }) => name).sort();

  const { status: { plan, strays } } = await found(bed);
  const due = plan.tasks.flatMap(({ due }) =>
    due.map(({ entry: { line, finding } }) => `${line.names[0]}: ${finding.kind}`)
  );
  assert.deepEqual(due.sort(), [
    "b.example.com: other key",
    "c.example.com: missing",
    "d.example.com: missing",
  ]);
  assert.deepEqual(plan.kept.map(({ entry }) => entry.line.names[0]), ["a.example.com"]);
  assert.deepEqual(strays, [
    "cert/d.example.com_www.d.example.com-cert-combined.prime256v1.test.pem",
    "cert/gone.example.com-cert-combined.prime256v1.test.pem",
    "cert/www.d.example.com-cert-combined.prime256v1.test.pem",
    "csr/d.example.com_www.d.example.com-csr.prime256v1.test.csr",
    "csr/gone.example.com-csr.prime256v1.test.csr",
    "key/d.example.com_www.d.example.com-key.prime256v1.test.pem",
    "key/gone.example.com-key.prime256v1.test.pem",
    "key/www.d.example.com-key.prime256v1.test.pem",
  ]);
  assert.deepEqual([...Deno.readDirSync(bed.path("test"))].map(({ name }) => name).sort(), before);
});

Deno.test("status() knows an overdue renewal from one that is merely due", async () => {
  await using bed = await testBed({
    domains: "a.example.com",
    settings: "keyTypes: ec\nari: no\nreauthorizeDays: 40",
  });
  await bed.plant({ age: 55 });
  assert.equal(exitStatus((await found(bed)).status), 0);
  await bed.plant({ age: 61 });
  assert.equal(exitStatus((await found(bed)).status), 1);
  bed.configure({ settings: "keyTypes: ec\nari: no\nreauthorizeDays: 15" });
  assert.equal(exitStatus((await found(bed)).status), 0);
});

Deno.test("status() looks at endpoints only where it may", async () => {
  await using bed = await testBed({ domains: "a.example.com", settings: "keyTypes: ec\nari: no" });
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  listener.close();
  bed.configure({ actions: `[default]\nverify: ["DOMAIN:${port}"]` });
  await bed.plant();
  assert.deepEqual((await found(bed)).status.served, []);
  const { served } = (await found(bed, { offline: false })).status;
  assert.deepEqual(
    served.map((
      { section, endpoint, address, keyType, state, detail },
    ) => [section, endpoint, address, keyType, state, detail]),
    [
      ["default", `a.example.com:${port}`, "127.0.0.1", "ec", "unreachable", "Connection refused"],
    ],
  );
});

Deno.test("status() says that it cannot use a state, and leaves it where it is", async () => {
  await using bed = await testBed({ domains: "a.example.com", settings: "keyTypes: ec\nari: no" });
  await bed.plant();
  Deno.writeTextFileSync(bed.path("test", "state.json"), "{");
  const { told } = await found(bed);
  assert.deepEqual(told, ["cannot use test/state.json: not JSON"]);
  assert.equal(bed.text("test", "state.json"), "{");
});
