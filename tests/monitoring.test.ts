/**
 * Goal: what is below conf/monitoring does what its README says, over real documents of lematt: metrics and alert rules,
 * the timer's and cron's command, the check, the page, and that nothing from outside gets through to a reader of it.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { page, type Status } from "../conf/monitoring/page.ts";
import { type Bed, testBed } from "./bed.ts";
import { adapt, blocks, ROOT, shell } from "./documents.ts";
import { LEMATT, output, temporaryDirectory } from "./programs.ts";
import { lackOf, together } from "./together.ts";

const HERE = join(ROOT, "conf/monitoring");
const text = (name: string) => Deno.readTextFileSync(join(HERE, name));
const test = together("conf/monitoring");

const DOMAINS = "example.com www\nmail.example.com";
const ACTIONS = `[mail]
domains: mail.example.com
update: ["echo 'no route | to <b>mail</b>' >&2; exit 7"]
verify: ["127.0.0.1:1#DOMAIN"]
`;

/** A bed after a first run, and the commands of documents for it: lematt, its configuration and user are the bed's. */
async function ranBed(actions = "") {
  const bed = await testBed({ domains: DOMAINS, actions, settings: "keyTypes: ec\npreflight: no" });
  await bed.lematt("--prod");
  const lematt = join(bed.home, "lematt.ts");
  await Deno.writeTextFile(lematt, `#!/bin/sh\nexec ${LEMATT.join(" ")} "$@"\n`, { mode: 0o755 });
  const here = (command: string) =>
    adapt(command, { "/opt/lematt/lematt.ts": lematt, "/etc/lematt": bed.conf })
      .replaceAll("/opt/lematt/conf/monitoring", HERE).replaceAll("su - certmaint -c", "sh -c");
  return { bed, lematt, here, [Symbol.asyncDispose]: () => bed[Symbol.asyncDispose]() };
}

async function statusOf(bed: Bed): Promise<Status> {
  return JSON.parse((await bed.lematt("--prod", "--status", "--json")).stdout);
}

// ---- Prometheus -------------------------------------------------------------------------------------------

test("alert rules fire when they should, and not before", async () => {
  await shell("promtool test rules conf/monitoring/lematt.rules.test.yml", ROOT);
}, lackOf("promtool"));

test("the commands of timer and cron write metrics that promtool accepts and the rules use, complete or not at all", async () => {
  await using ran = await ranBed(ACTIONS);
  const [, unit] = /^ExecStart=\/bin\/sh -c '(.*)'$/m.exec(text("lematt-metrics.service"))!;
  const [, cron] = /^\S+ \* \* \* \* certmaint cd \/var\/lib\/lematt && (.*)$/m.exec(text("crontab"))!;
  assert.equal(cron, unit);
  await shell(ran.here(unit!), ran.bed.home);
  const file = join(ran.bed.home, "lematt.prom");
  const metrics = await Deno.readTextFile(file);
  if (lackOf("promtool") === undefined) await shell("promtool check metrics <lematt.prom", ran.bed.home);
  const written = new Set(metrics.matchAll(/^lematt_\w+/gm).map(([name]) => name));
  const used = new Set(text("lematt.rules.yml").matchAll(/\blematt_\w+/g).map(([name]) => name));
  // no line fails here, nothing is served
  for (const absent of ["certificate_failing_since", "endpoint_not_before", "endpoint_not_after"]) {
    assert(used.delete(`lematt_${absent}_seconds`));
    assert.match(metrics, new RegExp(`^# TYPE lematt_${absent}_seconds gauge$`, "m"));
  }
  assert.deepEqual([...used].filter((name) => !written.has(name)), []);

  ran.bed.configure({ domains: "-.example.com" });
  await assert.rejects(shell(ran.here(unit!), ran.bed.home), /domains:1: /);
  assert.equal(await Deno.readTextFile(file), metrics);
});

test("the commands for Prometheus install files where it finds them", async () => {
  await using temporary = await temporaryDirectory();
  const home = temporary.path;
  const places = {
    "/etc/systemd/system": `${home}/units`,
    "/etc/cron.d": `${home}/cron.d`,
    "/var/lib/lematt": `${home}/lematt`,
    "/var/lib/prometheus/node-exporter": `${home}/collector`,
    "/etc/prometheus": `${home}/prometheus`,
    " -o certmaint": "",
  };
  for (const directory of ["units", "cron.d", "collector", "prometheus"]) {
    await Deno.mkdir(join(home, directory));
  }
  // systemd is not running everywhere, so whether it reads the installed files is not tested
  const commands = blocks("conf/monitoring/README.md", "Prometheus").join("");
  await shell(`systemctl() { :; }\n${adapt(commands, places)}`, ROOT);
  await Deno.writeTextFile(join(home, "lematt/lematt.prom"), "metrics");
  assert.equal(await Deno.readTextFile(join(home, "collector/lematt.prom")), "metrics");
  const units = [...Deno.readDirSync(join(home, "units"))].map(({ name }) => name).sort();
  assert.deepEqual(units, ["lematt-metrics.service", "lematt-metrics.timer"]);
}, lackOf("promtool"));

// ---- Nagios -----------------------------------------------------------------------------------------------

test("check_lematt exits with 0 without problems, 1 with a problem, 2 with one that causes alerts, 3 without a status", async () => {
  await using ran = await ranBed();
  const check = async (...args: string[]) => {
    const command = [join(HERE, "check_lematt"), "--config", ran.bed.conf, ...args];
    const { code, stdout } = await output(command, { env: { LEMATT: ran.lematt } });
    return { code, lines: stdout.trimEnd().split("\n") };
  };
  assert.deepEqual(await check(), { code: 0, lines: ["LEMATT OK: no problems | problems=0"] });

  ran.bed.configure({ actions: ACTIONS });
  await ran.bed.lematt("--prod");
  const { code, lines } = await check("--offline");
  assert.equal(code, 1);
  assert.match(lines[0]!, /^LEMATT WARNING: \[mail\] delivery of [^|]* \| problems=2$/);
  assert.match(lines[1]!, /^127\.0\.0\.1:1#mail\.example\.com .*unreachable/);

  const state = JSON.parse(ran.bed.text("prod", "state.json"));
  state.deliveries.mail.since = new Date(Date.now() - 2 * 86_400_000).toISOString();
  await Deno.writeTextFile(ran.bed.path("prod", "state.json"), JSON.stringify(state));
  const later = await check("--offline");
  assert.equal(later.code, 2);
  assert.match(later.lines[0]!, /^LEMATT CRITICAL: /);

  ran.bed.configure({ actions: "[mail]\nupdate: reload" });
  assert.equal((await check()).code, 3);
  assert.match((await check("--no-such-option")).lines[0]!, /^LEMATT UNKNOWN: lematt: /);
});

// ---- the page ---------------------------------------------------------------------------------------------

/** The text that a browser shows. */
function shown(html: string): string {
  return html.replaceAll(/<(style|script)>[^<]*<\/\1>|<[^>]*>/g, " ").replaceAll(/\s+/g, " ")
    .replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&quot;", '"');
}

test("the page shows the problems, certificates, endpoints and pending deliveries of a real status", async () => {
  await using ran = await ranBed(ACTIONS);
  const [command] = blocks("conf/monitoring/README.md", "A page");
  await shell(ran.here(command!), ran.bed.home);
  const seen = shown(await Deno.readTextFile(join(ran.bed.home, "status.html")));
  for (
    const expected of [
      /2 problems as of \d{4}-/,
      /example\.com ec · www\.example\.com 89 days \d{4}-/,
      /127\.0\.0\.1:1#mail\.example\.com .*unreachable at 127\.0\.0\.1: /,
      /\[mail\] 1 certificate: .*exit status 7 no route \| to <b>mail<\/b> /,
    ]
  ) assert.match(seen, expected);
});

test("the page loads nothing from elsewhere, and all data is escaped", async () => {
  await using ran = await ranBed(ACTIONS);
  const hostile =
    `"'><script>alert(1)</script><img src=x onerror=alert(1)>&lt; \u202e\0\x1b[2J \ud800 javascript:`;
  const poison = (_: string, value: unknown) =>
    typeof value === "string" && !/^\d{4}-\d\d-\d\dT/.test(value) ? `${value}${hostile}` : value;
  const status = JSON.stringify({ ...await statusOf(ran.bed), orphans: ["cert/old.pem"] }, poison);
  const html = await page(JSON.parse(status) as Status);
  assert.deepEqual([html.match(/<script/g)?.length, html.match(/<(img|iframe|object|form|base)\b/g)], [
    1,
    null,
  ]);
  for (const [, value] of html.matchAll(/<[a-z][^<>]* href="([^"]*)"/g)) {
    assert.match(value!, /^(#[a-z]+$|data:image\/svg\+xml,)/);
  }
  assert.doesNotMatch(html.replaceAll(/"[^"]*"/g, ""), /<[a-z][^<>]* (on\w+|style|src)=/);
  for (const character of ["\0", "\x1b", "\u202e"]) assert(!html.includes(character));
  assert.doesNotMatch(html, /@import|url\(|https?:\/\/(?!www\.w3\.org\/2000\/svg)/);
  assert.match(html, /http-equiv="Content-Security-Policy" content="default-src &#39;none&#39;;/);
  assert.equal(html.isWellFormed(), true);
});

test("the page works without certificates, with 2,000 of them, and with extreme dates", async () => {
  await using bed = await testBed({ domains: "example.com" });
  const empty = { ...await statusOf(bed), certificates: [] };
  assert.match(shown(await page(empty)), /No problems as of /);
  const day = (number: number) => new Date(Date.parse(empty.at) + number * 86_400_000).toISOString();
  const certificates = Array.from({ length: 2000 }, (_, index) => ({
    names: [`host${index >> 1}.example.com`],
    keyType: index % 2 === 0 ? "rsa" : "ec",
    ...{ notBefore: day(-60), notAfter: day(index % 60 + 30), renewAt: day(index % 60), renewal: "soon" },
  }));
  assert.match(shown(await page({ ...empty, certificates })), /all 1,000 lines .* 960 more lines /);
  const edges = [
    {},
    { notBefore: day(-90), notAfter: day(-1) },
    { notBefore: day(1), notAfter: day(9000) },
    { notBefore: "+010000-01-01T00:00:00.000Z", notAfter: "+020000-01-01T00:00:00.000Z" },
  ];
  const odd = await page({
    ...empty,
    certificates: edges.map((dates, index) => ({ names: [`x${index}`], keyType: "ec", ...dates })),
  });
  assert.match(shown(odd), / x1 ec expired .* x0 ec none /);
  assert.doesNotMatch(odd, /NaN|Infinity|undefined|Invalid Date/);
});

test("page.ts refuses a document that is not a status, and writes nothing then", async () => {
  for (
    const input of ["", "null", "{}", '{"command":"run","version":1}', '{"command":"status","version":2}']
  ) {
    const script = `printf %s '${input}' | ${join(HERE, "page.ts")}`;
    const { code, stdout, stderr } = await output(["sh", "-c", script]);
    assert.deepEqual([code, stdout], [1, ""], input);
    assert.match(stderr, /^page\.ts: standard input is not .*\n$/);
  }
});

test("the example for jq lists what expires within two weeks", async () => {
  await using ran = await ranBed();
  await ran.bed.plant({ mode: "prod", age: 80 });
  const [command] = blocks("conf/monitoring/README.md", "Programs of your own");
  assert.match(await shell(ran.here(command!), ran.bed.home), /^(\S+Z (mail\.)?example\.com\n){2}$/);
}, lackOf("jq"));
