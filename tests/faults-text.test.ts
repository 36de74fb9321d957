/**
 * Goal: whatever text is in a file that lematt reads, or arrives at leforward's socket, the result is a report or a
 * run: no stack trace, no hang, nothing that a terminal would act on.
 *
 * Texts are mutations of valid ones: pieces inserted, removed and doubled, JSON values replaced.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { setImmediate } from "node:timers/promises";
import { removeLeftovers } from "../lib/challenge.ts";
import { type Config, ConfigError, loadConfig } from "../lib/config.ts";
import { planText, Report } from "../lib/report.ts";
import { preview, status } from "../lib/run.ts";
import { emptyState } from "../lib/state.ts";
import { statusJson, statusMetrics, statusTable } from "../lib/status.ts";
import { noticeText, problemText } from "../lib/text.ts";
import { readInventory } from "../lib/store.ts";
import { testBed } from "./bed.ts";
import { listing, presentable, randomFrom, SEED, SHARE, Subject } from "./faults.ts";
import { startLeforward } from "./programs.ts";

/** Inputs for each reader. */
const INPUTS = Math.max(200, 20_000 * SHARE);
/** An input takes a few milliseconds; the rest is for a busy machine. */
const LONGEST_MS = 5_000;

/** Text with a meaning for one of the readers, a shell, a terminal, a path or an object. */
const PIECES: readonly string[] = [
  ...`[]{}":,=%#;\\*./-_ \n\r\t\0\x1b\x7f\x9b\u00e4\u202e\ud800\ufeff`,
  ...["\n ", "%(x)s", "%(accountKey)s", "[DEFAULT]\n", "[every]\n", "[x]\ndomains: example.com\n"],
  ...["__proto__", "constructor", "xn--", "::", "*.example.com ", "9".repeat(400), "-1e999", "null", "true"],
  ...["../../", "$(id)", "MIIB", "AAAA", "-----BEGIN CERTIFICATE-----\n", "-----END CERTIFICATE-----\n"],
  ...["-----BEGIN PRIVATE KEY-----\n", "-----BEGIN EC PRIVATE KEY-----\n"],
  ...["+275760-09-13T00:00:00.000Z", "-271821-04-20T00:00:00.000Z"],
];

type Random = (below: number) => number;

/** Changes a text in up to four places. */
function mutated(text: string, random: Random): string {
  let changed = text;
  for (let times = 1 + random(4); times > 0; times--) {
    const at = random(changed.length + 1);
    const length = random(random(8) === 0 ? 400 : 4);
    const piece = random(4) === 0 ? changed.slice(at, at + length).repeat(2) : PIECES[random(PIECES.length)]!;
    changed = changed.slice(0, at) + (random(4) === 0 ? "" : piece) + changed.slice(at + length);
  }
  return changed;
}

const OTHER_VALUES = [null, true, 0, -1, 1e308, 2 ** 53, "", [], {}, [[]], "2026-01-01", ...PIECES.slice(-2)];

/** Removes a value of a JSON document, gives it another key, even `__proto__`, or replaces it. */
function mutatedJson(text: string, random: Random): string {
  const document = JSON.parse(text);
  for (let at = document;;) {
    const keys = Object.keys(at);
    const key = keys[random(keys.length)];
    if (key === undefined) break;
    const value = at[key];
    if (typeof value === "object" && value !== null && random(4) > 0) {
      at = value;
      continue;
    }
    const how = random(4);
    if (how < 2) delete at[key];
    const name = PIECES[random(PIECES.length)]!;
    if (how === 1) Object.defineProperty(at, name, { value, enumerable: true, configurable: true });
    if (how > 1) at[key] = OTHER_VALUES[random(OTHER_VALUES.length)];
    break;
  }
  return JSON.stringify(document);
}

/** Runs `input` with many random sources; a failure names the source. */
async function tryInputs(what: string, input: (random: Random) => Promise<void> | void) {
  for (let n = 0; n < INPUTS; n++) {
    const begun = performance.now();
    try {
      await input(randomFrom(SEED + n));
    } catch (error) {
      throw new Error(`${what}, LEMATT_SEED=${SEED + n}: ${Deno.inspect(error)}`);
    }
    const took = performance.now() - begun;
    assert(took < LONGEST_MS, `${what}, LEMATT_SEED=${SEED + n}: ${took} ms`);
    if (n % 100 === 0) await setImmediate(); // lets the event loop release closed resources
  }
  if (SHARE > 0) console.log(`${what}: ${INPUTS} texts, all answered`);
}

/** All output that needs no run, for people and for machines. */
async function describe({ bed }: Subject, config: Config, json: boolean): Promise<void> {
  const printed: string[] = [];
  const print = (text: string) => printed.push(text);
  const report = new Report({
    ...{ mode: "test", cron: false, color: false, json, now: () => bed.ca.now, out: print, err: print },
  });
  const options = { parallel: 1, retry: false };
  const plan = preview(config, options, bed.context(), (event) => report.emit(event));
  report.finish({ plan, issued: 0, delivered: 0, known: new Set() });
  print(planText(plan, [], bed.ca.now));
  for (const problem of plan.problems) print(problemText(problem));
  const found = await status(config, true, bed.context(), (event) => report.emit(event));
  for (const text of json ? [statusJson(found), statusMetrics(found)] : [statusTable(found)]) print(text);
  presentable(withoutControls(printed.join("")));
}

/** Runs write only cleaned texts to the state; these tests write others as well. */
function withoutControls(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]/g, "");
}

Deno.test("any text in the configuration files gives a configuration or a list of errors", async () => {
  await using bed = await testBed({
    domains: "example.com www *\n\u00e4.example.org 192.0.2.1 2001:db8::1 # x\n# y\n\nsolo.example.net\n",
    settings:
      "reauthorizeDays: 15\ncurve: P-384\nrsaTag: r%(accountKey)s\ncontact: a@b.c\ndnsWait: 5\nprofile: classic\n",
    actions: `[default]
update: ["a %%", "b
  c"]
[every]
alert = ["mail"]
uploadEach: ["push KEY_FILE"]
[x]
domains: example.com www.example.com *.example.com
challenge: dns-01
dnsPresent: ["x RECORD VALUE"]
dnsCleanup: ["y RECORD VALUE"]
keyTypes: ec
verify: ["[::1]:443/smtp#a.b", "DOMAIN:25", "a.b:25#DOMAIN"]
`,
  });
  const names = ["lematt.conf", "domains", "actions.conf"];
  const texts = new Map(names.map((name) => [name, bed.text(name)]));
  await tryInputs("configurations", (random) => {
    for (const [name, text] of texts) {
      Deno.writeTextFileSync(bed.path(name), random(2) === 0 ? text : mutated(text, random));
    }
    let notices;
    try {
      notices = loadConfig("test", bed.conf).warnings;
    } catch (error) {
      if (!(error instanceof ConfigError)) throw error;
      assert(error.problems.length > 0);
      notices = error.problems;
    }
    presentable(`${notices.map(noticeText).join("\n")}\n`.replaceAll("undefined", ""));
  });
});

Deno.test("any text in the files of certificates and keys is classified without an exception", async () => {
  await using subject = await Subject.create({ settings: "keyTypes: rsa ec" });
  const { bed } = subject;
  await bed.run();
  const config = bed.config();
  const paths = subject.inventory().flatMap(({ files: { key, cert } }) => [key, cert]);
  const texts = paths.map((path) => Deno.readTextFileSync(path));
  await tryInputs("certificates and keys", async (random) => {
    const at = random(paths.length);
    const other = texts[random(paths.length)]!;
    Deno.writeTextFileSync(paths[at]!, random(10) === 0 ? other : mutated(texts[at]!, random));
    if (random(50) === 0) await describe(subject, config, random(2) === 0);
    else readInventory(config);
    Deno.writeTextFileSync(paths[at]!, texts[at]!);
  });
});

Deno.test("any text in state.json is used or set aside, and the next run continues", async () => {
  await using subject = await Subject.create({ ca: { renewalInfo: false } });
  const { bed } = subject;
  bed.ca.refused.add("www.example.com");
  subject.configure({ upload: "exit 1", more: 'alert: ["cat"]\nverify: ["DOMAIN:1"]' });
  await bed.run();
  bed.ca.refused.clear();
  const path = bed.path("test/state.json");
  const at = bed.ca.now.toISOString();
  const window = { start: at, end: "2099-01-01T00:00:00Z", at: "2098-01-01T00:00:00Z" };
  const dates = { notBefore: at, notAfter: at };
  const certificate = { fingerprint: "f", names: ["a.b"], ...dates, selfSigned: true, issuer: "i" };
  const sights = [{ address: "", kind: "served", certificate }, {
    address: "::1",
    kind: "unreachable",
    detail: "d",
  }];
  const receipt = { digest: "d", fingerprint: "f", at, repairs: 3 };
  const state = JSON.stringify({
    ...JSON.parse(Deno.readTextFileSync(path)),
    renewals: { "a.b": { account: "x", window, askAt: window.end, suggestedAt: window.start } },
    holds: { [bed.ca.directoryUrl]: window.start },
    orders: { x: { url: bed.ca.directoryUrl, account: "x", since: at } },
    receipts: {
      default: { "solo.example.org-cert-combined.prime256v1.test.pem": receipt },
      gone: { x: receipt },
    },
    probes: { "solo.example.org:1 ec": { at, confirmed: true, badSince: at, sights } },
    alerts: { default: { CA: { at, what: "x" } } },
    reported: { CA: at },
    published: [{ token: "a-token-of-a-challenge-that-was" }, { name: "a.b", value: "v" }],
  });
  const runAnyway = async () => {
    const { stdout, stderr } = await subject.attempt();
    presentable(withoutControls(stdout + stderr));
    subject.dropUnusable();
  };
  const config = bed.config();
  await tryInputs("states", async (random) => {
    Deno.writeTextFileSync(path, random(2) === 0 ? mutatedJson(state, random) : mutated(state, random));
    try {
      await describe(subject, config, random(2) === 0);
    } catch (error) {
      if ((error as Error).name !== "StateError") throw error; // a newer version
    }
    if (random(100) === 0) await runAnyway();
  });
  Deno.writeTextFileSync(path, "{");
  subject.configure();
  await runAnyway();
  subject.countOrders();
  await subject.recover();
});

Deno.test("any recorded challenge is removed or skipped, and nothing else is removed", async () => {
  await using bed = await testBed({ domains: "example.com" });
  const config = bed.config();
  Deno.writeTextFileSync(join(bed.home, "victim"), "precious");
  const token = "a-token-of-a-challenge-that-was";
  const warnings: string[] = [];
  const context = bed.context({ warn: (text) => warnings.push(text) });
  await tryInputs("challenges", async (random) => {
    Deno.writeTextFileSync(join(bed.drop, token), "");
    const path = `${"../".repeat(random(3))}victim`;
    const state = emptyState();
    state.published = [
      { token: random(3) === 0 ? path : mutated(token, random) },
      { name: mutated("example.com", random), value: mutated("value", random) },
    ];
    await removeLeftovers(config, context, { state, saveState: () => Promise.resolve() });
  });
  presentable(warnings.join("\n"));
  assert.equal(Deno.readTextFileSync(join(bed.home, "victim")), "precious");
  assert.deepEqual(listing(bed.home), ["conf", "drop", "victim"]);
});

Deno.test("any bytes at leforward's socket are answered with a redirect or 404", async () => {
  await using running = await startLeforward(["--baseurl", "http://central.example"], { stdin: "null" });
  const { port, child, stderr } = running;
  const path = "/.well-known/acme-challenge/LoqXcYV8q5ONbJQxbmR7SCTNo3tiAXDfowyjxAjEuX0";
  const request = `GET ${path} HTTP/1.1\r\nHost: example.com\r\nUser-Agent: a CA\r\nAccept: */*\r\n\r\n`;
  const expected =
    /^HTTP\/1\.1 (301 Moved Permanently\r\nLocation: http:\/\/central\.example\/\.well-known\/acme-challenge\/[\w-]+|404 Not Found)\r\nContent-Length: 0\r\nConnection: close\r\n\r\n$/;
  await tryInputs("requests to leforward", async (random) => {
    using connection = await Deno.connect({ hostname: "127.0.0.1", port });
    const bytes = Uint8Array.from(`${mutated(request, random)}\r\n\r\n`, (char) => char.charCodeAt(0));
    await connection.write(bytes);
    if (random(20) === 0) return; // gone before the answer
    assert.match(await new Response(connection.readable).text(), expected);
  });
  child.kill("SIGTERM");
  assert.equal(await stderr, "leforward: ended: SIGTERM\n");
});
