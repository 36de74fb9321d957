/** Goal: the three files are read; every error and warning names its line; files of the original are accepted. */

import { deepStrictEqual as same, ok } from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { isIP as nodeIsIP } from "node:net";
import { join } from "node:path";
import { challengeOf, type Config, ConfigError, loadConfig, type Notice, sectionsOf } from "../lib/config.ts";
import { SECTION_KEYS, SETTINGS } from "../lib/settings.ts";
import { isIP } from "../lib/names.ts";

const base = await Deno.realPath(await Deno.makeTempDir({ prefix: "lematt-config-" }));
globalThis.addEventListener("unload", () => Deno.removeSync(base, { recursive: true }));

const pem = { type: "pkcs8", format: "pem" } as const;
const accountKey = generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey.export(pem) as string;
Deno.mkdirSync(join(base, "drop"));
const write = (name: string, text: string) => Deno.writeTextFileSync(join(base, name), text, { mode: 0o600 });
write("account.key", accountKey);
write("eab", "c2VjcmV0LXNlY3JldA\n");
write("eab-standard", "++//++//\n");
write("not-eab", "not base64!\n");

interface Files {
  settings?: string; // lines after the required ones of lematt.conf, from line 4
  conf?: string | null; // or the whole lematt.conf; null for no file
  domains?: string | null;
  actions?: string | null;
}

let count = 0;
/** A new configuration directory with these files, or with a minimal one for each that is not given. */
function directoryOf({ settings = "", conf, domains = "example.com\n", actions = "" }: Files = {}): string {
  const directory = join(base, `conf${count++}`);
  Deno.mkdirSync(directory);
  const needed = "[config]\naccountKey: ../account.key\nchallengeDropDir: ../drop\n";
  const texts = {
    "lematt.conf": conf === undefined ? needed + settings : conf,
    domains,
    "actions.conf": actions,
  };
  for (const [name, text] of Object.entries(texts)) {
    if (text !== null) Deno.writeTextFileSync(join(directory, name), text);
  }
  return directory;
}

const load = (files: Files): Config => loadConfig("prod", directoryOf(files));

function refusal(action: () => unknown): ConfigError {
  try {
    action();
  } catch (error) {
    if (error instanceof ConfigError) return error;
    throw error;
  }
  throw new Error("the configuration was accepted");
}

/** `file:line text [hint]` of each. */
function printed(notices: readonly Notice[]): string[] {
  return notices.map(({ file, line = "", text, hint }) =>
    `${file}:${line} ${text}${hint ? ` [${hint}]` : ""}`.replaceAll(base, "BASE").replace(/conf\d+/g, "CONF")
  );
}

/** `file:line` of each. */
const places = (notices: readonly Notice[]) => printed(notices).map((text) => text.split(" ")[0]);

/** Throws unless each notice begins with the first word of its pattern and contains the rest. */
function matches(notices: readonly Notice[], patterns: readonly string[]) {
  const found = printed(notices);
  const right = found.length === patterns.length && patterns.every((pattern, i) => {
    const [place, ...words] = pattern.split(" ");
    return found[i]!.startsWith(place!) && found[i]!.includes(words.join(" "));
  });
  ok(right, `${JSON.stringify(found, null, 1)} is not ${JSON.stringify(patterns, null, 1)}`);
}

/** Rows of a table: cells between " => ", in which ⏎ is a line break. A line that begins with "=>" continues the row. */
function rows({ raw }: TemplateStringsArray): string[][] {
  return raw[0]!.trim().split(/\n(?!\s*=>)/)
    .map((row) => row.trim().split(/\s+=> /).map((cell) => cell.replaceAll("⏎", "\n")));
}

/** The words of a text. */
const list = ({ raw }: TemplateStringsArray) => raw[0]!.trim().split(/\s+/);

/** Separates the cells that are files: "S: " lines of [config], "C: " lematt.conf, "D: " domains, "A: " actions.conf. */
function filesOf(cells: string[]): [files: Files, others: string[]] {
  const names: Record<string, string> = { S: "settings", D: "domains", A: "actions", C: "conf" };
  const isFile = (cell: string) => /^[SDAC]: /.test(cell);
  const files = cells.filter(isFile).map((cell) => [names[cell[0]!], cell.slice(3)]);
  return [Object.fromEntries(files), cells.filter((cell) => !isFile(cell))];
}

const words = (count: number) => Array.from({ length: count }, (_, i) => ` w${i}`).join("");

// ---- reading ---------------------------------------------------------------------------------------------

Deno.test("loadConfig() reads the three files of a user of the original", () => {
  const directory = directoryOf({
    settings:
      "# days, with fractions\nreauthorizeDays: 42.42\n#generateNewCertsAfterDays: 7\ncurve: prime256v1\n",
    domains: "# names\nexample.com www\n\nmail.example.com\ncorp.example.com internal hr\n",
    actions: `[default]
update: ["sudo service nginx reload"]
uploadCerts: ["rsync -avz --chmod=F644 CERTS /etc/ssl/"]

[every]
uploadKeys: ["rsync -avz --chmod=F640 KEYS manager:/srv/tls/"]

[override-mail]
domains: mail.example.com
prepare: ["ssh -t forward http://example.com"]
ocspStapleRequired: no
update: ["ssh reload-postfix", "ssh reload-dovecot"]`,
  });
  const { warnings, advice, sections, lines, ...rest } = loadConfig("prod", directory);
  const defaults = JSON.parse(`{"mode": "prod", "reauthorizeDays": 42.42, "generateNewCertsAfterDays": 0,
    "alwaysGenerateNewKeys": false, "keyTypes": ["rsa", "ec"], "keyBitsRSA": 2048, "curve": "P-256",
    "rsaTag": "rsa2048", "curveTag": "prime256v1", "contact": [], "parallel": 10, "preflight": "yes", "ari": true,
    "commandTimeoutSeconds": 600, "dnsWaitSeconds": 120, "verifyWaitSeconds": 60,
    "directoryUrl": "https://acme-v02.api.letsencrypt.org/directory"}`);
  const paths = { directory, file: `${directory}/lematt.conf`, base: `${directory}/prod` };
  same(rest, { ...defaults, ...paths, challengeDropDir: `${base}/drop`, accountKey: `${base}/account.key` });
  same([places(warnings), places(advice)], [["lematt.conf:5"], ["actions.conf:1", "actions.conf:8"]]);
  const lists = sections.map((section) =>
    list`domains prepare uploadCerts uploadKeys uploadEach update verify`
      .flatMap((key) => [section[key as keyof typeof section] as string[]].flat()).join("; ")
  );
  same(lists, [
    "rsync -avz --chmod=F644 CERTS /etc/ssl/; sudo service nginx reload",
    "rsync -avz --chmod=F640 KEYS manager:/srv/tls/",
    "mail.example.com; ssh -t forward http://example.com; ssh reload-postfix; ssh reload-dovecot",
  ]);
  same(
    lines.map(({ line, names, sections }) => [line, ...names, ...sections.map(({ name }) => name)].join(" ")),
    [
      "2 example.com www.example.com default every",
      "4 mail.example.com override-mail every",
      "5 corp.example.com hr.corp.example.com internal.corp.example.com default every",
    ],
  );
});

const settings = rows`
  reauthorizeDays = .5 => {"reauthorizeDays":0.5}
  reauthorizeDays: 1e1 => {"reauthorizeDays":10}
  reauthorizeDays: +1_5. => {"reauthorizeDays":15}
  GENERATENEWCERTSAFTERDAYS: 3.5 => {"generateNewCertsAfterDays":3.5}
  keyBitsRSA: 3072 => {"keyBitsRSA":3072,"rsaTag":"rsa3072"}
  keyBitsRSA: 1024 => {"keyBitsRSA":1024,"rsaTag":"rsa1024"}
  curve: secp256r1 => {"curve":"P-256","curveTag":"secp256r1"}
  curve: SECP384R1 => {"curve":"P-384","curveTag":"SECP384R1"}
  rsaTag: r-%(keyBitsRSA)s.x⏎curveTag: ec_1@a+b => {"rsaTag":"r-2048.x","curveTag":"ec_1@a+b"}
  [DEFAULT]⏎curve: p-521 => {"curve":"P-521"}
  alwaysGenerateNewKeys: On⏎keyTypes: ec rsa => {"alwaysGenerateNewKeys":true,"keyTypes":["ec","rsa"]}
  directory: https://ca.test:14000/dir⏎testDirectory: https://b => {"directoryUrl":"https://ca.test:14000/dir"}
  contact: a+b@c.com⏎  mailto:c@d.org => {"contact":["mailto:a+b@c.com","mailto:c@d.org"]}
  preflight: WARN⏎ari: 0 => {"preflight":"warn","ari":false}
  preflight: off⏎commandTimeout: 1.5 => {"preflight":"no","commandTimeoutSeconds":1.5}
  dnsWait: 0⏎verifyWait: 5 => {"dnsWaitSeconds":0,"verifyWaitSeconds":5}
  preferredChain: ISRG Root X1⏎profile: tlsserver => {"preferredChain":"ISRG Root X1","profile":"tlsserver"}`;
Deno.test("loadConfig() reads each setting", () => {
  for (const [text, expected] of settings) {
    const config = load({ settings: text });
    for (const [key, value] of Object.entries(JSON.parse(expected!))) {
      same(config[key as keyof Config], value, text);
    }
  }
});

Deno.test("loadConfig() reads eabHmacKey in base64 and base64url, and reauthorizeDays has no default", () => {
  const eab = (file: string) => load({ settings: `eabKeyId: kid-1\neabHmacKey: ../${file}` }).eab;
  same(eab("eab"), { keyId: "kid-1", hmacKey: new TextEncoder().encode("secret-secret") });
  same(eab("eab-standard")!.hmacKey, new Uint8Array([251, 239, 255, 251, 239, 255]));
  same(load({}).reauthorizeDays, undefined);
});

Deno.test("loadConfig() normalizes names, removes duplicates, and rejects names and lines that are too long", () => {
  const long = `${"a".repeat(49)}.`.repeat(5) + "com";
  const accepted: [line: string, names: string][] = [
    ["Example.COM WWW", "example.com www.example.com"],
    ["example.com www www.example.com example.com www", "example.com www.example.com"],
    ["b.org z.a.com a.org c.b.org b.a.com a.com a.net", "b.org a.com a.net a.org b.a.com z.a.com c.b.org"],
    ["  example.com\twww\u00a0mail  ", "example.com mail.example.com www.example.com"],
    ["Exämple.com ÄPFEL", "xn--exmple-cua.com xn--pfel-koa.xn--exmple-cua.com"],
    ["bu\u0308cher.de faß.de xn--fa-hia.de", "xn--bcher-kva.de xn--fa-hia.de"],
    ["192.0.2.1 2001:DB8:0:0:1:0:0:1", "192.0.2.1 2001:db8::1:0:0:1"],
    ["a-b.c--d.x1 3com \u212Aelvin.com", "a-b.c--d.x1 3com.a-b.c--d.x1 kelvin.com"],
    [`${"a".repeat(63)}.com`, `${"a".repeat(63)}.com`],
    [long, long],
  ];
  for (const [line, names] of accepted) {
    same(load({ domains: line }).lines.map(({ names }) => names.join(" ")), [names]);
  }
  for (const line of [`${"a".repeat(64)}.com`, `${"a.".repeat(126)}com`, `a.com${words(100)}`]) {
    same(places(refusal(() => load({ domains: line })).problems), ["domains:1"]);
  }
});

Deno.test("formerNames of a line are the file names of the original, if they differ", () => {
  const former = rows`
    example.com www⏎b.example.com
    Example.com => Example.com
    example.com WWW Mail.example.com => example.com Mail.example.com WWW.example.com
    Example.com b a => Example.com a.Example.com b.Example.com
    example.com www example.com => example.com example.com www.example.com
    a.com B b => a.com B.a.com b.a.com
    a.com b⏎A.com b => A.com b.A.com
    BÜCHER.de`; // not possible in the original
  for (const [domains, names] of former) {
    const found = load({ domains: domains! }).lines.flatMap(({ formerNames }) => formerNames);
    same(found.map((names) => names.join(" ")), names ? [names] : []);
  }
});

Deno.test("a line has the keyTypes of its sections, and those of [every] add none", () => {
  const { lines, sections } = load({
    settings: "keyTypes: ec\nverifyWait: 7\n",
    domains: "a.com\nb.com a.b.com\nc.com\n",
    actions:
      "[a]\ndomains: a.com a.b.com\nkeyTypes: rsa\nverifyWait: 3\n[b]\ndomains: b.com\nrehearse: yes\n" +
      "dnsParallel: on\n[every]\nkeyTypes: rsa ec\n",
  });
  same(lines.map(({ keyTypes }) => keyTypes), [["rsa"], ["rsa", "ec"], ["ec"]]);
  same(sections.map(({ keyTypes }) => keyTypes), [["rsa"], ["ec"], ["rsa", "ec"]]);
  same(sections.map(({ verifyWaitSeconds }) => verifyWaitSeconds), [3, 7, 7]);
  same(sections.map(({ rehearse, dnsParallel }) => rehearse && dnsParallel), [false, true, false]);
});

Deno.test("the profile of a line is that of its sections, otherwise of [every], otherwise of [config]", () => {
  const { lines } = load({
    settings: "profile: of-config\n",
    domains: "a.com\nb.com\nc.com a.com\nd.com\n",
    actions: "[a]\ndomains: a.com\nprofile: of-a\n[d]\ndomains: d.com\n[every]\nprofile: of-every\n",
  });
  same(lines.map(({ profile }) => profile), ["of-a", "of-every", "of-a", "of-every"]);
  same(load({ settings: "profile: of-config\n" }).lines[0]!.profile, "of-config");
  ok(!("profile" in load({}).lines[0]!));
});

Deno.test("sectionsOf() returns the sections of a name, or [default], then [every]; sections may be named like members of Object", () => {
  const config = load({
    domains: "b.com a.com d.com\na.com\nd.com\n*.a.com\n",
    actions: '[every]\nchallenge: dns-01\ndnsPresent: ["x"]\n[constructor]\ndomains: A.com b.com\n' +
      "challenge: http-01\n[default]\n[__proto__]\ndomains: a.com *.a.com\n",
  });
  const named = (name: string) => sectionsOf(config, name).map(({ name }) => name);
  same(named("a.com"), ["constructor", "__proto__", "every"]);
  same(named("b.com"), ["constructor", "every"]);
  same(named("toString"), ["default", "every"]);
  same(named("*.a.com"), ["__proto__", "every"]);
  const ofLines = config.lines.map(({ sections }) => sections.map(({ name }) => name).join(" "));
  same(ofLines.slice(0, 2), ["constructor __proto__ default every", "constructor __proto__ every"]);
  same(ofLines.slice(2), ["default every", "__proto__ every"]);
  same(["a.com", "d.com", "*.a.com"].map((name) => challengeOf(config, name)), list`http-01 dns-01 dns-01`);
  same([sectionsOf(load({}), "a.com"), challengeOf(load({}), "a.com")], [[], "http-01"]);
});

Deno.test("loadConfig() reads the endpoints of verify, and rejects invalid ones", () => {
  const valid = rows`
    mail.Example.com:465 => {"host":"mail.example.com","port":465}
    mail.example.com:25/smtp => {"host":"mail.example.com","port":25,"starttls":"smtp"}
    [2001:DB8::7]:443#www.example.com => {"host":"2001:db8::7","port":443,"sni":"www.example.com"}
    192.0.2.7:5432/postgres#DOMAIN => {"host":"192.0.2.7","port":5432,"starttls":"postgres","sni":"DOMAIN"}
    DOMAINS_ALL:443 => {"host":"DOMAINS_ALL","port":443}
    mailhost:993 => {"host":"mailhost","port":993}`;
  const verifying = (texts: string[]) =>
    `[default]\nverify: ["a.com:1",\n  ${texts.map((text) => JSON.stringify(text)).join(",\n  ")}]\n`;
  const { verify } = load({ actions: verifying(valid.map(([text]) => text!)) }).sections[0]!;
  same(verify.slice(1), valid.map(([text, expected]) => ({ text, ...JSON.parse(expected!) })));
  const invalid = list`
    mail.example.com mail.example.com/smtp 2001:db8::7:443 mail.example.com:smtp mail.example.com:65536
    mail.example.com:465/smtps [x]:443 *.example.com:443 -oProxy:22 mail.example.com:443#
    mail.example.com:443#192.0.2.1`;
  for (const text of [...invalid, "a b:22"]) {
    const { problems } = refusal(() => load({ actions: verifying([text]) }));
    matches(problems, [`actions.conf:3 ${JSON.stringify(text)}`]);
  }
});

// ---- errors ----------------------------------------------------------------------------------------------

const invalidSettings = rows`
  reauthorizeDays => soon => -1 => inf => 15 # days => 15⏎ curve: P-256
  keyBitsRSA => 2049 => 512 => 8200
  curve => secp256k1
  rsaTag => a/b => a b => r%(prefix)s
  alwaysGenerateNewKeys => maybe
  preflight => ask
  keyTypes => rsa dsa
  parallel => 1.5 => 101
  commandTimeout => 0
  directory => http://ca.test/⏎testDirectory: https://b/
  contact => a@example.com, b@example.com
  profile => a b
  caBundle => nowhere.pem => ../account.key => ~/ca.pem`;
Deno.test("loadConfig() rejects an invalid value, with its line", () => {
  for (const [key, ...values] of invalidSettings) {
    for (const value of values) {
      matches(refusal(() => load({ settings: `${key}: ${value}` })).problems, [`lematt.conf:4 ${key}`]);
    }
  }
});

Deno.test("loadConfig() rejects each invalid name, with its line and the name", () => {
  const invalid = list`
    $(reboot).example.com a.example.com,b.example.com https://example.com ../example.com example.com:443
    -rf.example.com a.example-.com a_b.example.com example.com. a..b.com .example.com localhost example.123
    192.0.2.256 192.0.2.01 2001:db8::1::2 a.*.b.com [2001:db8::1] ::ffff:192.0.2.1 ｅxample.com a／b.com xn--a.com`;
  matches(
    refusal(() => load({ domains: invalid.join("\n") })).problems,
    invalid.map((name, index) => `domains:${index + 1} ${name}`),
  );
  const more = "exam\u200dple.com\n\x1b[31mexample.com\n192.0.2.1 www\nexample.com # mine\na.com *\n";
  const expected = "domains:1 u{200d}|domains:2 u{1b}|domains:3|domains:4 comment|domains:5 dns-01";
  matches(refusal(() => load({ domains: more })).problems, expected.split("|"));
});

/** The behaviour, the files, and the place and a part of each problem. */
const invalid = rows`
  a setting without a value => S: reauthorizeDays: => lematt.conf:4 reauthorizeDays
  rsaTag and curveTag that differ only in case => S: rsaTag: x⏎curveTag: X => lematt.conf:5
  eabKeyId without eabHmacKey => S: eabKeyId: kid => lematt.conf:1 eabHmacKey
  an eabHmacKey that is not base64 => S: eabKeyId: kid⏎eabHmacKey: ../not-eab
    => lematt.conf:5 BASE/not-eab
  a mistyped setting => S: reautorizeDays: 15 => lematt.conf:4 did you mean reauthorizeDays
  a duplicate setting => S: parallel: 1⏎Parallel: 2 => lematt.conf:5 line 4
  a line that is neither section nor setting => S: what => lematt.conf:4
  keys without a section => C: # nothing => lematt.conf: [config]
  a section without domains => A: [a]⏎update: [] => actions.conf:1 "domains"
  a section that is almost [default] => A: [Default]⏎update: [] => actions.conf:1 did you mean [default]
  a percent sign for the shell => A: [default]⏎update: ["date +%Y"] => actions.conf:2 "%%"
  ocspStapleRequired, which CAs no longer support => A: [DEFAULT]⏎ocspStapleRequired: yes⏎[default]⏎[every] => actions.conf:2 ocspStapleRequired
  an unknown challenge => A: [default]⏎challenge: dns => actions.conf:2 dns-persist-01
  dns-01 without its commands => A: [default]⏎challenge: dns-01 => actions.conf:2 "dnsPresent"
  conflicting challenges => A: [a]⏎domains: x.com⏎challenge: http-01⏎[b]⏎domains: x.com⏎challenge: dns-persist-01
    => actions.conf:4 http-01 in [a]
  a mistyped key => A: [default]⏎updat: [] => actions.conf:2 did you mean update
  a duplicate section => A: [a]⏎domains: example.com⏎[a]⏎domains: x.com => actions.conf:3 line 1
  a section name with a control character => A: [a\u{1b}[2J]⏎domains: example.com => actions.conf:1 control character
  more names than a profile allows => D: a.com 1 2 3 4 5 6 7 8 9 a b c d e f g h i j k l m n o p
    => S: profile: tlsserver => domains:1 26 names
  sections with different profiles => D: a.com b.com
    => A: [a]⏎domains: a.com⏎profile: one⏎[b]⏎domains: b.com⏎profile: two⏎[every]⏎profile: three
    => domains:1 one in [a], two in [b]
  a wildcard whose parent alone is in a section with a DNS challenge => D: example.com *
    => A: [dns]⏎domains: example.com⏎challenge: dns-persist-01 => domains:1 "domains" of [dns]
  an IP address with a DNS challenge => D: 192.0.2.1 => A: [every]⏎challenge: dns-persist-01
    => domains:1 http-01
  a name with http-01 but without a drop directory => C: [config]⏎accountKey: ../account.key
    => D: *.a.com⏎b.com => A: [a]⏎domains: *.a.com⏎challenge: dns-persist-01 => lematt.conf:1 http://b.com/
  a drop directory that does not exist => C: [config]⏎accountKey: ../account.key⏎challengeDropDir: ../it's
    => lematt.conf:3 mkdir -p 'BASE/it'\''s'`;
Deno.test("loadConfig() rejects incomplete or contradictory files, with the line of each problem", async (t) => {
  for (const [behaviour, ...cells] of invalid) {
    const [files, problems] = filesOf(cells.map((cell) => cell.replace("\\u{1b}", "\x1b")));
    await t.step(behaviour!, () => matches(refusal(() => load(files)).problems, problems));
  }
});

Deno.test("loadConfig() reads lists as JSON, and rejects others with the line of the error and a corrected list", () => {
  const actions = '[default]\nupdate: ["printf \'a\\nb\'", "", " ", "\\u00e9 \\"x\\" \\\\"]\n';
  same(load({ actions }).sections[0]!.update, ["printf 'a\nb'", "", " ", 'é "x" \\']);
  const lists = rows`
    true => 2 => ["true"]
    "cmd %% x" => 2 => ["cmd % x"]
    ⏎  one⏎  'two' => 2 => ["one", "two"]
    ["a",⏎⏎  # no⏎  "b"⏎  "c"] => 6
    ["a",] => 2
    ["a" => 2
    ['a'] => 2
    ["b",⏎  "a⏎  b"] => 3
    ["a\q"] => 2
    ["a", 1] => 2
    ["a"] # why => 2
    ["b",⏎ "\u0000"] => 3
    ["b",⏎ "\ud800"] => 3`;
  for (const [list, line, corrected] of lists) {
    const { problems } = refusal(() => load({ actions: `[default]\nupdate: ${list}\n` }));
    same(places(problems), [`actions.conf:${line}`]);
    if (!corrected) continue;
    const [, hint] = /write (\[.*\])/.exec(problems[0]!.hint!)!;
    same(load({ actions: `[default]\nupdate: ${hint}\n` }).sections[0]!.update, JSON.parse(corrected));
  }
});

Deno.test("loadConfig() reports which of the three files are missing, with a hint how to begin", () => {
  matches(refusal(() => load({ conf: null, domains: null, actions: null })).problems, [
    ...["lematt.conf: BASE/CONF/lematt.conf", "domains: BASE/CONF/domains"],
    "actions.conf: touch BASE/CONF/actions.conf",
  ]);
});

Deno.test("no message contains a secret from a file", () => {
  const secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA";
  const texts = [
    ...[
      `eabHmacKey: ${secret}=`,
      `eabHmacKey:\n${secret}==`,
      `eabHmacKey:\n${secret}`,
      `eabHmacKey: ~${secret}`,
    ],
    ...[`eabHmacKey: ${secret}\n${secret}: 1\n`, `directory: https://me:${secret}@ca.test/`],
  ];
  for (const settings of texts.map((text) => `eabKeyId: kid\n${text}`)) {
    const { problems } = refusal(() => load({ settings }));
    ok(problems.length && !JSON.stringify(problems).includes(secret.slice(0, 12)), JSON.stringify(problems));
  }
});

// ---- warnings --------------------------------------------------------------------------------------------

const warned = rows`
  rotation beyond the weekly limit of a pair => S: generateNewCertsAfterDays: 3.4 => lematt.conf:4 3.5
  rotation beyond the limit of one key type => S: generateNewCertsAfterDays: 1.3⏎keyTypes: ec => lematt.conf:4 1.4
  two settings for renewal => S: generateNewCertsAfterDays: 7⏎reauthorizeDays: 60 => lematt.conf:5 generateNewCertsAfterDays
  renewal after expiry => S: reauthorizeDays: 0 => lematt.conf:4 expired
  keys that Let's Encrypt refuses => S: keyBitsRSA: 8192⏎curve: P-521 => lematt.conf:4 => lematt.conf:5
  RSA keys that are too short => S: keyBitsRSA: 1024⏎directory: https://b/⏎testDirectory: https://b/ => lematt.conf:4 1024
  a private CA without testDirectory, so --test would send its names to Let's Encrypt => S: directory: https://ca.test/
    => lematt.conf:4 testDirectory
  IP addresses with a profile without IP addresses => D: a.com⏎192.0.2.1 ::1 => domains:2 profile: shortlived
  a name that is also in another line => D: a.com⏎b.com a.com => domains:2 line 1
  an unknown key => S: nonsense: 1⏎[DEFAULT]⏎what: 2 => lematt.conf:4 "nonsense" => lematt.conf:6 "what"
  keys of the other file => S: update: [] => A: [every]⏎parallel: 5 => lematt.conf:4 actions.conf
    => actions.conf:2 lematt.conf
  an unknown section => S: [default]⏎x: 1 => lematt.conf:4 [default]
  a duplicate line => D: a.com b⏎A.com b.a.com => domains:2 line 1
  the same names in another order => D: a.com b⏎b.a.com a.com => domains:2 line 1 in another order
  a comma and a short name in a section => A: [a]⏎domains: example.com, www
    => actions.conf:2 "example.com," => actions.conf:2 "www"
  a section without names => A: [a]⏎domains: => actions.conf:2
  a name of a section that is in no line => D: a.com => A: [x]⏎domains: a.com⏎  ww.a.com => actions.conf:3 "ww.a.com"
  a name of a section that only a wildcard covers => D: *.b.com
    => A: [every]⏎challenge: dns-persist-01⏎[x]⏎domains: www.b.com => actions.conf:4 *.b.com
  [DEFAULT] instead of [default] => A: [DEFAULT]⏎update: ["true"] => actions.conf:1 [default]
  a prepare that is never run => A: [default]⏎challenge: dns-persist-01⏎prepare: ["x"]
    => actions.conf:3 dns-persist-01
  dnsPresent that is never run => A: [default]⏎dnsPresent: ["x"] => actions.conf:2 dns-01
  a word that update does not replace => A: [default]⏎update: ["DOMAIN DOMAINS_CN MY_DOMAIN $LEMATT_CERTS \\KEYS"]
    => actions.conf:2 update: "DOMAIN"
  a placeholder written as a shell variable, and one of other commands
    => A: [default]⏎uploadCerts: ["a CERTS",⏎  "b $CERTS KEYS"]
    => actions.conf:3 $LEMATT_CERTS => actions.conf:3 "KEYS"
  an endpoint whose name is in no line => D: a.com⏎b.com
    => A: [every]⏎verify: ["192.0.2.1:443", "192.0.2.1:443#a.com", "DOMAIN:443", "web1:443#DOMAIN"]
    => actions.conf:1 192.0.2.1:443#a.com
  DOMAIN in an endpoint for a line of wildcards alone => D: *.b.com
    => A: [every]⏎challenge: dns-persist-01⏎verify: ["DOMAIN:443", "lb:443#DOMAIN"] => actions.conf:1 www.b.com:443
  a name for which the prepare of its line does not run => D: a.com b.a.com c.a.com
    => A: [x]⏎domains: a.com⏎prepare: ["x"]⏎[y]⏎domains: c.a.com => actions.conf:1 "b.a.com"`;
Deno.test("loadConfig() accepts harmless mistakes, with a warning that names the line", async (t) => {
  for (const [behaviour, ...cells] of warned) {
    const [files, warnings] = filesOf(cells);
    await t.step(behaviour!, () => matches(load(files).warnings, warnings));
  }
});

Deno.test("a correct configuration has no warnings", () => {
  const correct: Files[] = [
    { settings: "generateNewCertsAfterDays: 3.5\n", actions: "[default]\n[every]\n" },
    // prepare is used by other sections or names
    { actions: '[DEFAULT]\nprepare: ["x"]\n[default]\nchallenge: dns-persist-01\n' },
    { actions: '[default]\nchallenge: http-01\n[every]\nchallenge: dns-persist-01\nprepare: ["x"]\n' },
    { actions: '[default]\nupdate: ["printf \'a\\n\' x | y\\nz", ""]\nverify: ["192.0.2.1:443"]\n' },
    // the limits of Let's Encrypt do not apply to a private CA, even with the same profile names
    {
      settings: "directory: https://a\ntestDirectory: https://a\nkeyBitsRSA: 8192\nprofile: tlsserver\n" +
        "generateNewCertsAfterDays: 0.25\n",
      domains: `a.com${words(60)}\n192.0.2.1\n`,
    },
  ];
  for (const files of correct) {
    const { warnings, advice } = load(files);
    same(printed([...warnings, ...advice]), []);
  }
});

// ---- files and their owners ------------------------------------------------------------------------------

Deno.test("loadConfig() accepts an account key in each format, and rejects one that the CA or lematt cannot use", () => {
  const rsa = generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey;
  const small = generateKeyPairSync("rsa", { modulusLength: 1024 }).privateKey;
  const ec = (namedCurve: string) => generateKeyPairSync("ec", { namedCurve }).privateKey;
  const sec1 = ec("secp384r1").export({ type: "sec1", format: "pem" });
  const begin = (label: string, body: string) =>
    `-----BEGIN ${label}-----\n${body}\n-----END ${label}-----\n`;
  const keys: [text: string | Uint8Array, accepted: boolean][] = [
    [rsa.export(pem), true],
    [rsa.export({ type: "pkcs1", format: "pem" }), true],
    [ec("secp384r1").export(pem), true],
    [begin("EC PARAMETERS", "BgUrgQQAIg==") + sec1, true], // written by openssl ecparam
    ["", false],
    [begin("PUBLIC KEY", "c2VjcmV0"), false],
    [generateKeyPairSync("ed25519").privateKey.export(pem), false],
    [ec("secp256k1").export(pem), false],
    [small.export(pem), false],
    [rsa.export({ ...pem, cipher: "aes-256-cbc", passphrase: "x" }), false],
    [begin("RSA PRIVATE KEY", "Proc-Type: 4,ENCRYPTED\nDEK-Info: X\n\nc2VjcmV0"), false],
    [begin("PRIVATE KEY", "-a".repeat(5e6)), false],
    [begin("PRIVATE KEY", "c2VjcmV0"), false],
  ];
  const files = { conf: "[config]\naccountKey: ../key\nchallengeDropDir: ../drop\n" };
  for (const [text, accepted] of keys) {
    write("key", String(text));
    if (accepted) same(load(files).accountKey, join(base, "key"));
    else matches(refusal(() => load(files)).problems, ["lematt.conf:2 BASE/key"]);
  }
});

Deno.test("loadConfig() checks the account key of --test only with --test", () => {
  const directory = directoryOf({ conf: "[config]\naccountKey: ../shared.key\nchallengeDropDir: ../drop\n" });
  write("shared.key", accountKey);
  write("shared.key.test", "");
  matches(refusal(() => loadConfig("test", directory)).problems, ["lematt.conf:2 BASE/shared.key.test"]);
  loadConfig("prod", directory);
});

Deno.test("loadConfig() reads only the certificates of caBundle", () => {
  const args = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout -";
  const { stdout } = new Deno.Command("openssl", { args: args.split(" "), stderr: "null" }).outputSync();
  const text = new TextDecoder().decode(stdout);
  write("bundle.pem", text);
  const { caBundle } = load({ settings: "caBundle: ../bundle.pem\n" });
  ok(text.includes("PRIVATE KEY") && text.includes(caBundle!));
  same(caBundle!.match(/BEGIN .*?-/g), ["BEGIN CERTIFICATE-"]);
  write("bundle.pem", text.replace(/(BEGIN CERTIFICATE-----\n)..../, "$1AAAA"));
  matches(refusal(() => load({ settings: "caBundle: ../bundle.pem\n" })).problems, [
    "lematt.conf:4 bundle.pem",
  ]);
});

Deno.test("a path relative to the working directory, as in the original, is rejected with the correct path", () => {
  const conf = "[config]\naccountKey: account.key\nchallengeDropDir: drop\n";
  const { isValid, notices } = loadElsewhere(["prod", directoryOf({ conf })], { cwd: base });
  same(isValid, false);
  matches(notices, ["lematt.conf:2 write BASE/account.key", "lematt.conf:3 write BASE/drop"]);
});

/** What a process of its own finds, since all test files share one working directory and one user. */
interface Loaded {
  readonly directory?: string;
  readonly file?: string;
  /** Warnings of a valid configuration, else its errors. */
  readonly notices: readonly Notice[];
  readonly isValid: boolean;
}

function loadElsewhere(
  parameters: Parameters<typeof loadConfig>,
  { cwd, as = [] }: { cwd?: string; as?: readonly string[] },
): Loaded {
  const url = new URL("../lib/config.ts", import.meta.url);
  const written = Array.from(parameters, (one) => one === undefined ? "undefined" : JSON.stringify(one));
  const code = `const { loadConfig } = await import("${url}");
    const loaded = () => {
      try {
        const { directory, file, warnings } = loadConfig(${written});
        return { directory, file, notices: warnings, isValid: true };
      } catch (error) {
        return { notices: error.problems, isValid: false };
      }
    };
    console.log(JSON.stringify(loaded()));`;
  const [command, ...args] = [...as, Deno.execPath(), "eval", "--no-check", code];
  const { stdout } = new Deno.Command(command!, { args, cwd, stderr: "inherit" }).outputSync();
  return JSON.parse(new TextDecoder().decode(stdout));
}

/** The notices of loadConfig() for another user. This user may read all files, since it needs Deno and this file. */
function noticesForOtherUser(conf: string): string[] {
  const otherUser =
    "--reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search";
  const as = Deno.uid() === 0 ? ["setpriv", ...otherUser.split(" ")] : [];
  return printed(loadElsewhere(["prod", conf], { as }).notices);
}

Deno.test("loadConfig() rejects directories that its user cannot write to", () => {
  const closed = join(base, "closed");
  Deno.mkdirSync(closed);
  Deno.chmodSync(closed, 0o555);
  const conf = directoryOf({ conf: `[config]\naccountKey: ${closed}/x/key\nchallengeDropDir: ${closed}\n` });
  const found = noticesForOtherUser(conf);
  same(found.map((text) => text.split(/[ :]+/).slice(0, 4).join(" ")), [
    'lematt.conf 2 accountKey "BASE/closed"',
    'lematt.conf 3 challengeDropDir "BASE/closed"',
  ]);
});

/** What is changed; its path, mode, user and group; and the expected notice, if any. */
const open = rows`
  actions.conf writable by all => conf/actions.conf 646 0 0 => actions.conf: chmod go-w
  actions.conf writable by a group => conf/actions.conf 664 0 1234 => actions.conf: others may write
  actions.conf writable by the group of root => conf/actions.conf 664 0 0
  actions.conf of another user => conf/actions.conf 664 1234 1234 => actions.conf: user 1234
  lematt.conf of another user => conf/lematt.conf 644 1234 1234 => lematt.conf: chown root
  domains of another user => conf/domains 644 1234 1234
  domains writable by all => conf/domains 666 0 0 => domains: others may write
  a directory of another user => conf 755 1234 1234 => BASE/CONF/prod: user 1234
  a directory writable by all => conf 1777 0 0 => BASE/CONF/prod: 1777
  a tree writable by all => conf/prod/key 777 0 0 => BASE/CONF/prod: CONF/prod/key
  a tree of another user => conf/prod/state.json 600 1234 1234 => BASE/CONF/prod: user 1234
  a drop directory writable by all => drop 1777 33 33 => lematt.conf:3 chmod o-w
  a drop directory writable by its group => drop 2775 33 33
  an account key writable by all => key 602 0 0 => lematt.conf:2 others may write
  an account key readable by others => key 640 0 0 => lematt.conf:2 chmod 600`;
Deno.test({
  name:
    "loadConfig() reports to root which files others may change, and takes no alert commands from such files",
  ignore: Deno.uid() !== 0,
  async fn(t) {
    for (const [what, change, ...expected] of open) {
      const conf = directoryOf({ actions: '[every]\nalert: ["mail x"]\n' });
      const home = `${conf}-home`;
      for (const directory of [home, `${home}/drop`, `${conf}/prod`, `${conf}/prod/key`]) {
        Deno.mkdirSync(directory);
      }
      const settings = `[config]\naccountKey: ${home}/key\nchallengeDropDir: ${home}/drop\n`;
      Deno.writeTextFileSync(`${conf}/lematt.conf`, settings);
      Deno.writeTextFileSync(`${conf}/prod/state.json`, "{}");
      Deno.writeTextFileSync(`${home}/key`, accountKey, { mode: 0o600 });
      const [path, mode, uid, gid] = change!.split(" ") as [string, string, string, string];
      const changed = path.startsWith("conf") ? path.replace("conf", conf) : join(home, path);
      Deno.chownSync(changed, Number(uid), Number(gid));
      Deno.chmodSync(changed, parseInt(mode, 8));
      await t.step(what!, () => {
        let notices: readonly Notice[];
        try {
          notices = loadConfig("prod", conf).warnings;
        } catch (error) {
          const { problems, alerts } = error as ConfigError;
          notices = problems;
          same(alerts?.length, path === "conf" ? undefined : path === "conf/actions.conf" ? 0 : 1);
        }
        matches(notices, expected);
      });
    }
  },
});

Deno.test({
  name:
    "loadConfig() reports a tree that belongs to root to another user, but not files of the user's own group",
  ignore: Deno.uid() !== 0,
  fn() {
    const conf = directoryOf({ conf: "[config]\naccountKey: key\nchallengeDropDir: ../drop\n" });
    for (const name of ["", "lematt.conf", "domains", "actions.conf"]) {
      Deno.chownSync(join(conf, name), 65534, 65534);
      Deno.chmodSync(join(conf, name), name ? 0o664 : 0o775);
    }
    Deno.chmodSync(join(base, "drop"), 0o775);
    Deno.chownSync(join(base, "drop"), 0, 65534);
    same(noticesForOtherUser(conf), []);
    Deno.mkdirSync(join(conf, "prod"));
    const [text, ...more] = noticesForOtherUser(conf);
    ok(text!.startsWith("BASE/CONF/prod:") && text!.includes("chown -R 65534 BASE/CONF/prod"), text);
    same(more, []);
    Deno.chownSync(join(base, "drop"), 0, 0);
    Deno.chmodSync(join(base, "drop"), 0o755);
  },
});

Deno.test("loadConfig() rejects a directory whose path has characters special to the shell", () => {
  for (const name of ["with blank", "it's", "ünicode", "$HOME", "a*"]) {
    const directory = join(base, name);
    Deno.renameSync(directoryOf(), directory);
    same(refusal(() => loadConfig("prod", directory)).problems.length, 1, name);
  }
  const directory = join(base, "a-Z.0_@+,:%");
  Deno.renameSync(directoryOf(), directory);
  same(loadConfig("prod", directory).directory, directory);
});

Deno.test("loadConfig() rejects directories, FIFOs and binary files, without blocking", () => {
  const directory = directoryOf({ domains: null, actions: null });
  Deno.mkdirSync(join(directory, "domains"));
  new Deno.Command("mkfifo", { args: [join(directory, "actions.conf")] }).outputSync();
  matches(refusal(() => loadConfig("prod", directory)).problems, [
    ...["domains: BASE/CONF/domains", "actions.conf: BASE/CONF/actions.conf"],
  ]);
  Deno.removeSync(join(directory, "domains"));
  Deno.writeFileSync(join(directory, "domains"), Uint8Array.of(0x61, 0x2e, 0x62, 0x0a, 0x23, 0xe4));
  ok(
    printed(refusal(() => loadConfig("prod", directory)).problems).some((text) =>
      text.startsWith("domains:2 ")
    ),
  );
});

Deno.test("loadConfig() reads files with a byte order mark and CRLF", () => {
  const { lines, sections } = load({
    domains: "\ufeffa.com www\r\nb.com\r\n",
    actions: '\ufeff[default]\r\nupdate: ["true"]\r\n',
  });
  same(lines.map(({ names }) => names.join()), ["a.com,www.a.com", "b.com"]);
  same(sections[0]!.update, ["true"]);
});

Deno.test("loadConfig() accepts lematt.conf, its directory or a link; by default ./conf of the same user, else conf beside lematt", () => {
  const directory = directoryOf();
  const home = join(base, "home");
  Deno.mkdirSync(home);
  Deno.symlinkSync(directory, join(base, "link"));
  Deno.symlinkSync(join(directory, "lematt.conf"), join(home, "linked.conf"));
  const inHome = (path?: string, beside?: string) => loadElsewhere(["prod", path, beside], { cwd: home });
  const rejected = (path?: string, beside?: string) => {
    const { isValid, notices } = inHome(path, beside);
    same(isValid, false);
    return notices;
  };
  for (
    const path of [directory, `${directory}/lematt.conf`, "../link", "../link/lematt.conf", "linked.conf"]
  ) {
    const config = inHome(path, "/nowhere");
    same([config.directory, config.file], [directory, join(directory, "lematt.conf")]);
  }
  matches(rejected(undefined, "/nowhere"), ["lematt.conf: /nowhere"]);
  matches(rejected("missing.conf", directory), ["lematt.conf: missing.conf"]);
  same(inHome(undefined, directory).directory, directory);
  Deno.mkdirSync(join(home, "conf"));
  same(inHome(undefined, directory).directory, directory);
  for (const { name } of Deno.readDirSync(directory)) {
    Deno.copyFileSync(join(directory, name), join(home, "conf", name));
  }
  write("home/account.key", accountKey);
  Deno.mkdirSync(join(home, "drop"));
  same(inHome(undefined, directory).directory, join(home, "conf"));
  if (Deno.uid() !== 0) return;
  Deno.chownSync(join(home, "conf"), 65534, 65534);
  const beside = inHome(undefined, directory);
  same(beside.directory, directory);
  matches(beside.notices, ["BASE/home/conf: user 65534"]);
  Deno.writeTextFileSync(join(directory, "domains"), "");
  ok(printed(rejected(undefined, directory)).join().includes("--config"));
});

Deno.test("the samples in conf/ have every key", () => {
  for (const [table, sample] of [[SETTINGS, "lematt.conf"], [SECTION_KEYS, "actions.conf"]] as const) {
    const text = Deno.readTextFileSync(join(import.meta.dirname!, "..", "conf", sample));
    const keys = Object.entries(table).map(([name, { spelling = name }]) => spelling);
    same(
      keys.filter((key) => !new RegExp(`\\b${key}\\b`).test(text)),
      sample === "lematt.conf" ? [] : ["ocspStapleRequired"],
    );
  }
});

Deno.test("the samples in conf/ need only names and the drop directory, and their examples are valid", () => {
  const read = (name: string) => Deno.readTextFileSync(new URL(`../conf/${name}`, import.meta.url));
  const directory = join(base, "samples");
  Deno.mkdirSync(directory);
  const put = (name: string, text: string) => write(`samples/${name}`, text);
  for (const name of ["lematt.conf", "domains", "actions.conf"]) put(name, read(name));
  const problems = printed(refusal(() => loadConfig("prod", directory)).problems);
  ok(problems.at(-1)!.startsWith("domains: no names"));
  ok(problems.slice(0, -1).every((text) => text.includes("challengeDropDir")), problems.join());

  // all examples at once, except for files that do not exist here
  const settings = read("lematt.conf").replace(/^# (?=[a-zA-Z]+: \S+( \S+ \S+)?$)/gm, "")
    .replace(/^(caBundle|eabKeyId|eabHmacKey):/gm, "# $1:");
  put("lematt.conf", settings.replaceAll("/srv/web/challenges/", join(base, "drop")));
  put("domains", read("domains").replace(/^# (?=([a-z0-9.]+\.(com|org|10)\b.*)$)/gm, ""));
  put("actions.conf", read("actions.conf").replace(/^# (?=\[|\w+: )/gm, ""));
  const config = loadConfig("prod", directory);
  same(config.lines.map(({ names }) => names[0]), [
    ..."example.com mail.example.com git.example.com example.org 192.0.2.10".split(" "),
  ]);
  same(config.sections.map(({ name }) => name).slice(0, 4), ["default", "every", "mail", "intranet"]);
  same(
    config.sections[3]!.dnsPresent,
    [`printf 'update add %s 60 TXT "%s"\\nsend\\n' RECORD VALUE | nsupdate -k /etc/lematt/tsig.key`],
  );
  same([config.preferredChain, config.dnsWaitSeconds, config.profile], ["ISRG Root X1", 120, "tlsserver"]);
  ok(
    !printed(config.warnings).some((text) => /unknown|not replaced/.test(text)),
    printed(config.warnings).join("\n"),
  );
});

// ---- hostile input ---------------------------------------------------------------------------------------

Deno.test("loadConfig() reads hostile values in linear time", () => {
  const long = (unit: string) => unit.repeat(200_000);
  const units = '9 a - . _ 1_ " \\ \\" "", [ DOMAIN $ a@ ::';
  for (const unit of [" ", ...units.split(" ")]) {
    refusal(() =>
      load({
        settings: ["reauthorizeDays", "contact", "rsaTag"].map((key) => `${key}: ${long(unit)}!\n`).join(""),
        domains: `${long(unit)}!\n`,
        actions: `[default]\nupdate: ["${long(unit)}\nverify: ["${long(unit)}"]\nalert: ${long(unit)}]x\n`,
      })
    );
  }
});

Deno.test("isIP() agrees with node:net, except for zone identifiers", () => {
  const parts = ["", ..."0 1 09 255 256 ffff g 00000 1.2.3.4 :: : . %1".split(" "), " "];
  const texts = "1.2.3.4.5 01.2.3.4 1.2.3.256 ::1.2.3.04 1:2:3:4:5:6:7:8 1:2:3:4:5:6:7:8:9".split(" ");
  for (const a of parts) {
    for (const b of parts) {
      for (const c of parts) texts.push(`${a}:${b}:${c}`, `${a}.${b}.${c}`, `::${a}${b}${c}`);
    }
  }
  for (const text of texts) same(isIP(text), text.includes("%") ? 0 : nodeIsIP(text), JSON.stringify(text));
});
