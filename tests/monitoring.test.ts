/** Goal: what is below conf/monitoring does what its README says, over real documents of lematt. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { page, type Status } from "../conf/monitoring/page.ts";
import { testBed, together } from "./bed.ts";
import { adapt, blocks, lackOf, LEMATT, output, ROOT, shell, temporaryDirectory } from "./programs.ts";

const HERE = join(ROOT, "conf/monitoring");
const README = "conf/monitoring/README.md";
const text = (name: string) => Deno.readTextFileSync(join(HERE, name));
const test = together("conf/monitoring");

const ACTIONS = `[mail]
domains: mail.example.com
update: ["echo 'no route | to <b>mail</b>' >&2; exit 7"]
verify: ["127.0.0.1:1#DOMAIN"]
`;

/** A bed after a first run, and the commands of documents for it: lematt, its configuration and user are the bed's. */
async function ranBed(actions = ACTIONS) {
  const settings = "keyTypes: ec\npreflight: no";
  const bed = await testBed({ domains: "example.com www\nmail.example.com", actions, settings });
  await bed.run({ mode: "prod" });
  const lematt = join(bed.home, "lematt.ts");
  await Deno.writeTextFile(lematt, `#!/bin/sh\nexec ${LEMATT.join(" ")} "$@"\n`, { mode: 0o755 });
  const here = (command: string) =>
    adapt(command, { "/opt/lematt/lematt.ts": lematt, "/etc/lematt": bed.conf })
      .replaceAll("/opt/lematt/conf/monitoring", HERE).replaceAll("su - certmaint -c", "sh -c");
  return { bed, lematt, here, [Symbol.asyncDispose]: () => bed[Symbol.asyncDispose]() };
}

test("alert rules fire when they should, and not before", async () => {
  await shell("promtool test rules conf/monitoring/lematt.rules.test.yml", ROOT);
}, lackOf("promtool"));

test("the commands of timer and cron write all metrics that the rules use, complete or not at all", async () => {
  await using ran = await ranBed();
  const [, unit] = /^ExecStart=\/bin\/sh -c '(.*)'$/m.exec(text("lematt-metrics.service"))!;
  const [, cron] = /^\S+ \* \* \* \* certmaint cd \/var\/lib\/lematt && (.*)$/m.exec(text("crontab"))!;
  assert.equal(cron, unit);
  await shell(ran.here(unit!), ran.bed.home);
  const file = join(ran.bed.home, "lematt.prom");
  const metrics = await Deno.readTextFile(file);
  const written = new Set(metrics.match(/(?<=^# TYPE )lematt_\w+/gm));
  const used = new Set(text("lematt.rules.yml").match(/\blematt_\w+/g));
  assert.deepEqual([...used].filter((name) => !written.has(name)), []);

  ran.bed.configure({ domains: "-.example.com" });
  await assert.rejects(shell(ran.here(unit!), ran.bed.home), /domains:1: /);
  assert.equal(await Deno.readTextFile(file), metrics);
});

test("the commands for Prometheus install files where it finds them", async () => {
  await using temporary = await temporaryDirectory();
  const { path } = temporary;
  const commands = adapt(blocks(README, "Prometheus").join(""), {
    "/etc/systemd/system": `${path}/units`,
    "/etc/cron.d": `${path}/cron.d`,
    "/var/lib/lematt": `${path}/lematt`,
    "/var/lib/prometheus/node-exporter": `${path}/collector`,
    "/etc/prometheus": `${path}/prometheus`,
    " -o certmaint": "",
  });
  await shell(`mkdir units cron.d collector prometheus`, path);
  // systemd is not running everywhere, so whether it reads the installed files is not tested
  await shell(`systemctl() { :; }\n${commands}`, ROOT);
  await Deno.writeTextFile(join(path, "lematt/lematt.prom"), "metrics");
  assert.equal(await Deno.readTextFile(join(path, "collector/lematt.prom")), "metrics");
  assert.equal(await shell("ls units", path), "lematt-metrics.service\nlematt-metrics.timer\n");
}, lackOf("promtool"));

test("check_lematt exits with 0 without problems, 1 with a problem, 2 with one that causes alerts, 3 without a status", async () => {
  await using ran = await ranBed("");
  const { bed } = ran;
  const check = async (...args: string[]) => {
    const command = [join(HERE, "check_lematt"), "--config", bed.conf, ...args];
    const { code, stdout } = await output(command, { env: { LEMATT: ran.lematt } });
    return `${code} ${stdout}`;
  };
  assert.equal(await check(), "0 LEMATT OK: no problems | problems=0\n");
  bed.act(ACTIONS);
  await bed.run({ mode: "prod" });
  const warning = /^1 LEMATT WARNING: \[mail\] delivery of [^|]* \| problems=2\n127\.0\.0\.1:1#.*unreachable/;
  assert.match(await check("--offline"), warning);
  const state = bed.state("prod");
  state.deliveries.mail = { ...state.deliveries.mail!, since: new Date(0).toISOString() };
  await Deno.writeTextFile(bed.path("prod", "state.json"), JSON.stringify(state));
  assert.match(await check("--offline"), /^2 LEMATT CRITICAL: /);
  assert.match(await check("--no-such-option"), /^3 LEMATT UNKNOWN: lematt: /);
});

test("the example for jq lists what expires within two weeks", async () => {
  await using ran = await ranBed("");
  await ran.bed.plant({ mode: "prod", age: 80 });
  const [command] = blocks(README, "Programs of your own");
  assert.match(await shell(ran.here(command!), ran.bed.home), /^(\S+Z (mail\.)?example\.com\n){2}$/);
}, lackOf("jq"));

/** The text that a browser shows. */
function shown(html: string): string {
  return html.replaceAll(/<(style|script)>[^<]*<\/\1>|<[^>]*>/g, " ").replaceAll(/\s+/g, " ")
    .replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&quot;", '"');
}

test("the page shows a real status, refuses any other document, loads nothing from elsewhere, and escapes all data", async () => {
  await using ran = await ranBed();
  const [command] = blocks(README, "A page");
  await shell(ran.here(command!), ran.bed.home);
  const seen = shown(await Deno.readTextFile(join(ran.bed.home, "status.html")));
  assert.match(seen, /2 problems as of \d{4}-.*example\.com ec · www\.example\.com 89 days \d{4}-/);
  assert.match(seen, /127\.0\.0\.1:1#mail\.example\.com .*unreachable at 127\.0\.0\.1: /);
  assert.match(seen, /\[mail\] 1 certificate: .*exit status 7 no route \| to <b>mail<\/b> /);
  for (const input of ["", "null", '{"command":"run","version":1}', '{"command":"status","version":2}']) {
    const { code, stdout, stderr } = await output(["sh", "-c", `echo '${input}' | ${HERE}/page.ts`]);
    assert.deepEqual([code, stdout], [1, ""], input);
    assert.match(stderr, /^page\.ts: standard input is not .*\n$/);
  }

  const { stdout } = await ran.bed.lematt("--prod", "--status", "--offline", "--json");
  const status: Status = JSON.parse(stdout);
  const hostile =
    `"'><script>alert(1)</script><img src=x onerror=alert(1)>&lt; \u202e\0\x1b[2J \ud800 javascript:`;
  const isDate = (value: unknown) => /^\d{4}-\d\d-\d\dT/.test(String(value));
  const poison = (_: string, value: unknown) =>
    typeof value === "string" && !isDate(value) ? value + hostile : value;
  const poisoned = JSON.stringify({ ...status, orphans: ["cert/old.pem"] }, poison);
  const html = await page(JSON.parse(poisoned));
  assert.equal(html.match(/<script/g)?.length, 1);
  for (const [, value] of html.matchAll(/<[a-z][^<>]* href="([^"]*)"/g)) {
    assert.match(value!, /^(#[a-z]+$|data:image\/svg\+xml,)/);
  }
  const markup = html.replaceAll(/"[^"]*"/g, "");
  assert.doesNotMatch(markup, /<(img|iframe|object|form|base)\b|<[a-z][^<>]* (on\w+|style|src)=/);
  assert(["\0", "\x1b", "\u202e"].every((character) => !html.includes(character)));
  assert.doesNotMatch(html, /@import|url\(|https?:\/\/(?!www\.w3\.org\/2000\/svg)/);
  assert.match(html, /http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;;/);
  assert.equal(html.isWellFormed(), true);

  const day = (number: number) => new Date(Date.parse(status.at) + number * 86_400_000).toISOString();
  const pageOf = (dates: readonly object[]) => {
    const certificates = dates.map((dates, n) => ({ names: [`x${n}`], keyType: "ec", ...dates }));
    return page({ ...status, problems: [], certificates });
  };
  assert.match(shown(await pageOf([])), /No problems as of /);
  const unprobed = { endpoint: "x:443", keyType: "ec", addresses: [] };
  assert.match(shown(await page({ ...status, endpoints: [unprobed] })), / 0 of 1 /);
  const ofDay = (n: number) => ({ notBefore: day(-60), notAfter: day(n + 30), renewAt: day(n) });
  const many = Array.from({ length: 2000 }, (_, n) => ofDay(n % 60));
  assert.match(shown(await pageOf(many)), /all 2,000 lines .* 1,960 more lines /);
  const odd = await pageOf([
    {},
    { notBefore: day(-90), notAfter: day(-1) },
    { notBefore: "+010000-01-01T00:00:00.000Z", notAfter: "+020000-01-01T00:00:00.000Z" },
  ]);
  assert.match(shown(odd), / x1 ec expired .* x0 ec none /);
  assert.doesNotMatch(odd, /NaN|Infinity|undefined|Invalid Date/);
});
