/**
 * Goal: whatever text is in a file that lematt reads, the result is a report or a run: no stack trace, no hang, nothing that
 * a terminal would act on. Texts are mutations of valid ones: pieces inserted, removed and doubled, JSON values replaced.
 */

import assert from "node:assert/strict";
import { setImmediate } from "node:timers/promises";
import { ConfigError, type Notice } from "../lib/config.ts";
import { planText } from "../lib/report.ts";
import { preview, status } from "../lib/run.ts";
import { statusJson, statusMetrics, statusTable } from "../lib/status.ts";
import { noticeText, problemText } from "../lib/text.ts";
import { faultAt } from "./bed.ts";
import { presentable, randomFrom, SEED, SHARE, Subject } from "./faults.ts";

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
  const places: [at: Record<string, unknown>, key: string][] = [];
  const document = JSON.parse(text, function (key, value) {
    places.push([this, key]);
    return value;
  });
  const [at, key] = places[random(places.length)]!;
  const how = random(4), name = PIECES[random(PIECES.length)]!;
  if (how === 1) Object.defineProperty(at, name, { value: at[key], enumerable: true, configurable: true });
  if (how < 2) delete at[key];
  else at[key] = OTHER_VALUES[random(OTHER_VALUES.length)];
  return JSON.stringify(document);
}

/** Runs `input` with many random sources; a failure names the source. */
async function tryInputs(what: string, input: (random: Random) => Promise<void> | void) {
  for (let n = 0; n < INPUTS; n++) {
    const begun = performance.now();
    try {
      await input(randomFrom(SEED + n));
      assert(performance.now() - begun < LONGEST_MS, `${performance.now() - begun} ms`);
    } catch (error) {
      throw new Error(`${what}, LEMATT_SEED=${SEED + n}: ${Deno.inspect(error)}`);
    }
    if (n % 100 === 0) await setImmediate(); // lets the event loop release closed resources
  }
  if (SHARE > 0) console.log(`${what}: ${INPUTS} texts, all answered`);
}

/** Files with much in them, whose names are below the configuration directory. */
function texts({ bed }: Subject): Record<string, string> {
  const at = bed.ca.now.toISOString(), later = "2099-01-01T00:00:00Z";
  const account = "x", url = bed.ca.directoryUrl;
  const dates = { notBefore: at, notAfter: at };
  const certificate = { fingerprint: "f", names: ["a.b"], ...dates, selfSigned: true, issuer: "i" };
  const served = { address: "", kind: "served", certificate };
  const sights = [served, { address: "::1", kind: "unreachable", detail: "d" }];
  const receipt = { x: { digest: "d", fingerprint: "f", at, repairs: 3 } };
  const window = { start: at, end: later, at: later };
  const state = {
    ...bed.state(),
    renewals: { "a.b": { account, window, askAt: later, suggestedAt: at } },
    holds: { [url]: at },
    orders: { x: { url, account, since: at } },
    receipts: { default: receipt, gone: receipt },
    probes: { "solo.example.org:1 ec": { at, confirmed: true, badSince: at, sights } },
    alerts: { default: { CA: { at, what: "x" } } },
    reported: { CA: at },
    published: [{ token: "a-token-of-a-challenge-that-was" }, { name: "a.b", value: "v" }],
  };
  const solo = "solo.example.org-", end = ".prime256v1.test.pem";
  const files = [`test/cert/${solo}cert-combined${end}`, `test/key/${solo}key${end}`];
  return {
    ...Object.fromEntries(files.map((path) => [path, bed.text(path)])),
    "test/state.json": JSON.stringify(state),
    "lematt.conf": `${
      bed.text("lematt.conf")
    }curve: P-384\nrsaTag: r%(accountKey)s\ncontact: a@b.c\ndnsWait: 5\n`,
    "domains": "example.com www *\n\u00e4.example.org 192.0.2.1 2001:db8::1 # x\n\nsolo.example.org\n",
    "actions.conf":
      `[default]\nupdate: ["a %%", "b\n  c"]\n[every]\nalert = ["mail"]\nuploadEach: ["push KEY_FILE"]\n` +
      "[x]\ndomains: example.com www.example.com *.example.com\nchallenge: dns-01\nkeyTypes: ec\n" +
      `dnsPresent: ["x RECORD VALUE"]\ndnsCleanup: ["y VALUE"]\nverify: ["[::1]:443/smtp#a.b", "a.b:25#DOMAIN"]\n`,
  };
}

Deno.test("any text in any file that lematt reads is used, reported or set aside, and the next run continues", async () => {
  await using subject = await Subject.create();
  const { bed } = subject;
  // it is not asked when to renew: it would be asked again too soon after its state is lost
  const rewrite = ({ renewalInfo: _, ...rest }: Record<string, unknown>) => rest;
  bed.ca.switches.fault = faultAt("directory", { kind: "rewrite", rewrite }, Infinity);
  bed.ca.refused.add("www.example.com");
  subject.configure({ upload: "exit 1", more: 'alert: ["cat"]\nverify: ["DOMAIN:1"]' });
  await bed.run();
  bed.ca.refused.clear();
  const rich = Object.entries(texts(subject));
  const plain = Object.fromEntries(rich.map(([path]) => [path, bed.text(path)]));
  /** Runs write only cleaned texts to the state; these tests write others as well. */
  const check = (text: string) =>
    // deno-lint-ignore no-control-regex
    presentable(text.replace(/[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]/g, ""));
  const runAnyway = async () => {
    const { stdout, stderr } = await subject.attempt();
    check(stdout + stderr);
    subject.dropUnusable();
  };
  await tryInputs("files", async (random) => {
    const [path, text] = rich[random(rich.length)]!;
    const isJson = path.endsWith(".json") && random(2) === 0;
    Deno.writeTextFileSync(bed.path(path), isJson ? mutatedJson(text, random) : mutated(text, random));
    let notices: readonly Notice[] = [];
    try {
      const config = bed.config();
      notices = config.warnings;
      const plan = preview(config, { parallel: 1, retry: false }, bed.context(), () => {});
      const found = await status(config, true, bed.context(), () => {});
      const printed = [planText(plan, [], bed.ca.now), ...plan.problems.map(problemText), statusTable(found)];
      check([...printed, statusJson(found), statusMetrics(found)].join("\n"));
    } catch (error) {
      if (error instanceof ConfigError) notices = error.problems;
      else if ((error as Error).name !== "StateError") throw error; // of a newer version
    }
    presentable(`${notices.map(noticeText).join("\n")}\n`.replaceAll("undefined", ""));
    if (path.endsWith(".json") && random(30) === 0) await runAnyway();
    Deno.writeTextFileSync(bed.path(path), plain[path]!);
  });
  Deno.writeTextFileSync(bed.path("test/state.json"), "{");
  subject.configure();
  await runAnyway();
  subject.begin();
  await subject.recover();
});
