/**
 * Goal: whatever text is in a file that lematt reads, the result is a report or a run: no stack trace, no hang, nothing that
 * a terminal would act on. Texts are mutations of valid ones: pieces inserted, removed and doubled, JSON values replaced.
 */

import assert from "node:assert/strict";
import { setImmediate } from "node:timers/promises";
import { ConfigError, loadConfig } from "../lib/config.ts";
import { planText } from "../lib/report.ts";
import { preview, status } from "../lib/run.ts";
import { statusJson, statusMetrics, statusTable } from "../lib/status.ts";
import { noticeText, problemText } from "../lib/text.ts";
import { testBed } from "./bed.ts";
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

/** Runs write only cleaned texts to the state; these tests write others as well. */
function withoutControls(text: string): string {
  // deno-lint-ignore no-control-regex
  return text.replace(/[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]/g, "");
}

Deno.test("any text in the configuration files gives a configuration or a list of errors", async () => {
  await using bed = await testBed({
    domains: "example.com www *\n\u00e4.example.org 192.0.2.1 2001:db8::1 # x\n\nsolo.example.net\n",
    settings: "reauthorizeDays: 15\ncurve: P-384\nrsaTag: r%(accountKey)s\ncontact: a@b.c\ndnsWait: 5\n",
    actions:
      `[default]\nupdate: ["a %%", "b\n  c"]\n[every]\nalert = ["mail"]\nuploadEach: ["push KEY_FILE"]\n` +
      "[x]\ndomains: example.com www.example.com *.example.com\nchallenge: dns-01\nkeyTypes: ec\n" +
      `dnsPresent: ["x RECORD VALUE"]\ndnsCleanup: ["y VALUE"]\nverify: ["[::1]:443/smtp#a.b", "a.b:25#DOMAIN"]\n`,
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

Deno.test("any text in a certificate, a key or state.json is used, reported or set aside, and the next run continues", async () => {
  await using subject = await Subject.create({ settings: "keyTypes: ec", ca: { renewalInfo: false } });
  const { bed } = subject;
  bed.ca.refused.add("www.example.com");
  subject.configure({ upload: "exit 1", more: 'alert: ["cat"]\nverify: ["DOMAIN:1"]' });
  await bed.run();
  bed.ca.refused.clear();
  const config = bed.config();
  const statePath = bed.path("test/state.json");
  const at = bed.ca.now.toISOString(), later = "2099-01-01T00:00:00Z";
  const account = "x", url = bed.ca.directoryUrl;
  const certificate = {
    fingerprint: "f",
    names: ["a.b"],
    notBefore: at,
    notAfter: at,
    selfSigned: true,
    issuer: "i",
  };
  const served = { address: "", kind: "served", certificate };
  const unreachable = { address: "::1", kind: "unreachable", detail: "d" };
  const receipt = { x: { digest: "d", fingerprint: "f", at, repairs: 3 } };
  const state = JSON.stringify({
    ...bed.state(),
    renewals: {
      "a.b": { account, window: { start: at, end: later, at: later }, askAt: later, suggestedAt: at },
    },
    holds: { [url]: at },
    orders: { x: { url, account, since: at } },
    receipts: { default: receipt, gone: receipt },
    probes: { "solo.example.org:1 ec": { at, confirmed: true, badSince: at, sights: [served, unreachable] } },
    alerts: { default: { CA: { at, what: "x" } } },
    reported: { CA: at },
    published: [{ token: "a-token-of-a-challenge-that-was" }, { name: "a.b", value: "v" }],
  });
  const present = subject.inventory().filter(({ finding }) => finding.kind === "present");
  const paths = present.flatMap(({ files: { key, cert } }) => [key, cert]);
  const texts = paths.map((path) => Deno.readTextFileSync(path));
  const runAnyway = async () => {
    const { stdout, stderr } = await subject.attempt();
    presentable(withoutControls(stdout + stderr));
    subject.dropUnusable();
  };
  await tryInputs("certificates, keys and states", async (random) => {
    const n = random(paths.length);
    const isState = random(2) === 0;
    const text = isState ? state : texts[random(10) === 0 ? random(paths.length) : n]!;
    const changed = isState && random(2) === 0 ? mutatedJson(text, random) : mutated(text, random);
    Deno.writeTextFileSync(isState ? statePath : paths[n]!, changed);
    try {
      const plan = preview(config, { parallel: 1, retry: false }, bed.context(), () => {});
      const found = await status(config, true, bed.context(), () => {});
      const printed = [planText(plan, [], bed.ca.now), ...plan.problems.map(problemText), statusTable(found)];
      presentable(withoutControls([...printed, statusJson(found), statusMetrics(found)].join("\n")));
    } catch (error) {
      if ((error as Error).name !== "StateError") throw error; // a newer version
    }
    if (isState && random(50) === 0) await runAnyway();
    Deno.writeTextFileSync(paths[n]!, texts[n]!);
  });
  Deno.writeTextFileSync(statePath, "{");
  subject.configure();
  await runAnyway();
  subject.countOrders();
  await subject.recover();
});
