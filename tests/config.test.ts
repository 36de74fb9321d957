/** Goal: the three files are read; every error and warning names its line; files of the original are accepted. */

import { deepStrictEqual as same, ok } from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { generateKeyPairSync } from "node:crypto";
import { isIP as nodeIsIP } from "node:net";
import { join } from "node:path";
import { challengeOf, type Config, ConfigError, loadConfig, type Notice, sectionsOf } from "../lib/config.ts";
import { SECTION_KEYS, SETTINGS } from "../lib/settings.ts";
import { isIP } from "../lib/names.ts";
import { AS_ROOT, LEMATT, output } from "./programs.ts";

const base = await Deno.realPath(await Deno.makeTempDir({ prefix: "lematt-config-" }));
globalThis.addEventListener("unload", () => Deno.removeSync(base, { recursive: true }));

const pem = { type: "pkcs8", format: "pem" } as const;
const accountKey = generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey.export(pem) as string;
Deno.mkdirSync(join(base, "drop"));
const write = (name: string, text: string) => Deno.writeTextFileSync(join(base, name), text, { mode: 0o600 });
write("account.key", accountKey);
for (const [name, text] of [["eab", "c2VjcmV0"], ["eab-standard", "+///\n"], ["no-eab", "!"]]) {
  write(name!, text!);
}

let count = 0;
/**
 * A new configuration directory with these files: "S: " lines of [config], from line 4, or "C: " lematt.conf as a whole,
 * "D: " domains, "A: " actions.conf; and with minimal ones for the others.
 */
function directoryOf(...files: readonly string[]): string {
  const directory = join(base, `conf${count++}`);
  Deno.mkdirSync(directory);
  const text = (kind: string) => files.find((file) => file.startsWith(`${kind}: `))?.slice(3);
  const needed = "[config]\naccountKey: ../account.key\nchallengeDropDir: ../drop\n";
  Deno.writeTextFileSync(join(directory, "lematt.conf"), text("C") ?? needed + (text("S") ?? ""));
  Deno.writeTextFileSync(join(directory, "domains"), text("D") ?? "example.com\n");
  Deno.writeTextFileSync(join(directory, "actions.conf"), text("A") ?? "");
  return directory;
}

const load = (...files: readonly string[]): Config => loadConfig("prod", directoryOf(...files));
const errors = (...files: readonly string[]) => errorsIn(directoryOf(...files));

/** The errors of a configuration, which has some. */
function errorsIn(directory: string, mode: "test" | "prod" = "prod"): readonly Notice[] {
  try {
    loadConfig(mode, directory);
  } catch (error) {
    if (error instanceof ConfigError) return error.problems;
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

/** Throws unless each notice begins with the first word of its pattern and contains the rest, at least one word. */
function matches(notices: readonly Notice[], patterns: readonly string[], what = "") {
  const found = printed(notices);
  const right = found.length === patterns.length && patterns.every((pattern, i) => {
    const [place, ...words] = pattern.split(" ");
    ok(words.join(""), `no words after the place: ${pattern}`);
    return found[i]!.startsWith(`${place} `) && found[i]!.includes(words.join(" "));
  });
  ok(right, `${what}: ${JSON.stringify(found, null, 1)} is not ${JSON.stringify(patterns, null, 1)}`);
}

/** Rows of a table, with cells between " => ". ⏎ and ␛ stand for these characters; a line that begins with "=>" goes on. */
function rows({ raw }: TemplateStringsArray): string[][] {
  const text = raw[0]!.trim().replaceAll("⏎", "\v").replaceAll("␛", "\x1b");
  return text.split(/\n(?! *=>)/).map((row) =>
    row.trim().split(/\s+=> /).map((cell) => cell.replaceAll("\v", "\n"))
  );
}

/** The cells of a row that are no files. */
const expectedOf = (cells: readonly string[]) => cells.filter((cell) => !/^[SDAC]: /.test(cell));

// ---- reading ---------------------------------------------------------------------------------------------

const settings = rows`
  #generateNewCertsAfterDays: 7 => {"mode":"prod","generateNewCertsAfterDays":0,"alwaysGenerateNewKeys":false}
    => {"keyTypes":["rsa","ec"],"keyBitsRSA":2048,"curve":"P-256","rsaTag":"rsa2048","curveTag":"prime256v1","contact":[]}
    => {"parallel":10,"preflight":"yes","ari":true,"commandTimeoutSeconds":600,"dnsWaitSeconds":120,"verifyWaitSeconds":60}
    => {"directoryUrl":"https://acme-v02.api.letsencrypt.org/directory"}
  reauthorizeDays = .5 => {"reauthorizeDays":0.5}
  reauthorizeDays: +1_5. => {"reauthorizeDays":15}
  GENERATENEWCERTSAFTERDAYS: 1e1 => {"generateNewCertsAfterDays":10}
  keyBitsRSA: 1024 => {"keyBitsRSA":1024,"rsaTag":"rsa1024"}
  curve: SECP384R1 => {"curve":"P-384","curveTag":"SECP384R1"}
  rsaTag: r-%(keyBitsRSA)s.x⏎curveTag: ec_1@a+b => {"rsaTag":"r-2048.x","curveTag":"ec_1@a+b"}
  curveTag: %(curve)s⏎[DEFAULT]⏎curve: p-521 => {"curve":"P-521","curveTag":"p-521"}
  alwaysGenerateNewKeys: On⏎keyTypes: ec rsa => {"alwaysGenerateNewKeys":true,"keyTypes":["ec","rsa"]}
  directory: https://ca.test:14000/dir⏎testDirectory: https://b => {"directoryUrl":"https://ca.test:14000/dir"}
  contact: a+b@c.com⏎  mailto:c@d.org => {"contact":["mailto:a+b@c.com","mailto:c@d.org"]}
  preflight: WARN⏎ari: 0⏎commandTimeout: 1.5 => {"preflight":"warn","ari":false,"commandTimeoutSeconds":1.5}
  preferredChain: ISRG Root X1⏎profile: tlsserver => {"preferredChain":"ISRG Root X1","profile":"tlsserver"}`;
Deno.test("loadConfig() reads each setting, or has its default", () => {
  for (const [text, ...expected] of settings) {
    const config = load(`S: ${text}`);
    const own = { accountKey: `${base}/account.key`, reauthorizeDays: undefined };
    const values: object = Object.assign(own, ...expected.map((cell) => JSON.parse(cell)));
    const found = Object.keys(values).map((key) => [key, config[key as keyof Config]]);
    same(Object.fromEntries(found), values, text);
  }
  const eab = (file: string) => load(`S: eabKeyId: kid-1\neabHmacKey: ../${file}`).eab;
  same(eab("eab"), { keyId: "kid-1", hmacKey: new TextEncoder().encode("secret") });
  same(eab("eab-standard")!.hmacKey, new Uint8Array([251, 255, 255]));
});

Deno.test("loadConfig() normalizes names, removes duplicates, and knows the file names of the original", () => {
  const accepted = rows`
    Example.COM WWW => example.com www.example.com => Example.COM WWW.Example.COM
    example.com www www.example.com example.com => example.com www.example.com
      => example.com example.com www.example.com
    b.org z.a.com a.org c.b.org b.a.com a.com a.net => b.org a.com a.net a.org b.a.com z.a.com c.b.org
    a.com b⏎A.com b.a.com => a.com b.a.com => A.com b.a.com
    Exämple.com ÄPFEL faß.de => xn--exmple-cua.com xn--pfel-koa.xn--exmple-cua.com xn--fa-hia.de
    2001:DB8:0:0:1:0:0:1 => 2001:db8::1:0:0:1 => 2001:DB8:0:0:1:0:0:1
    a-b.c--d.x1 3com => a-b.c--d.x1 3com.a-b.c--d.x1`;
  const label = "a".repeat(63);
  const long = `${"a".repeat(49)}.`.repeat(5) + "com";
  accepted.push([`${label}.com`, `${label}.com`], [long, long]);
  accepted.push(["example.com\twww mail \r\n", "example.com mail.example.com www.example.com"]);
  for (const [domains, ...expected] of accepted) {
    const [line] = load(`D: # names\n\n${domains}`).lines;
    same(line!.line, 3);
    same([line!.names, ...line!.formerNames].map((names) => names.join(" ")), expected);
  }
  const many = Array.from({ length: 101 }, (_, n) => `${n}.com`).join(" ");
  const tooLong = [[`a${label}.com`, "63 characters"], [`a.${long}`, "253 characters"], [many, "101 names"]];
  const ca = "S: directory: https://ca.example/x\ntestDirectory: https://ca.example/x\n"; // any CA
  for (const [line, words] of tooLong) matches(errors(ca, `D: ${line}`), [`domains:1 ${words}`]);
  same(load(`D: ${many.replace(" 100.com", "")}`).lines[0]!.names.length, 100);
});

Deno.test("a line has the sections of its names, or [default], then [every], with their key types, challenges and profiles", () => {
  const config = load(
    "S: keyTypes: ec\nverifyWait: 7\nprofile: of-config\n",
    "D: b.com a.com d.com\na.com\nd.com\n*.a.com\n",
    `A: [every]\nkeyTypes: rsa ec\nprofile: of-every\nchallenge: dns-01\ndnsPresent: ["x"]
[constructor]\ndomains: A.com b.com\nchallenge: http-01\nkeyTypes: rsa\nverifyWait: 3\nprofile: of-constructor
[default]\nrehearse: yes\ndnsParallel: on
[toString]\ndomains: a.com *.a.com\n`,
  );
  const { lines, sections } = config;
  same(lines.map((line) => [line.sections.map(({ name }) => name).join(" "), line.keyTypes, line.profile]), [
    ["constructor toString default every", ["rsa", "ec"], "of-constructor"],
    ["constructor toString every", ["rsa", "ec"], "of-constructor"],
    ["default every", ["ec"], "of-every"],
    ["toString every", ["ec"], "of-every"],
  ]);
  same(sections.map(({ keyTypes, verifyWaitSeconds }) => `${keyTypes} ${verifyWaitSeconds}`), [
    ...["rsa,ec 7", "rsa 3", "ec 7", "ec 7"],
  ]);
  same(sections.map(({ rehearse, dnsParallel }) => rehearse && dnsParallel), [false, false, true, false]);
  same(sectionsOf(config, "hasOwnProperty").map(({ name }) => name), ["default", "every"]);
  const challenges = ["a.com", "d.com", "*.a.com"].map((name) => challengeOf(config, name));
  same(challenges, ["http-01", "dns-01", "dns-01"]);
  const usual = load("S: profile: of-config\n");
  same([usual.lines[0]!.profile, challengeOf(usual, "a.com")], ["of-config", "http-01"]);
});

Deno.test("loadConfig() reads the endpoints of verify, and rejects invalid ones", () => {
  const valid = rows`
    mail.Example.com:25/smtp => {"host":"mail.example.com","port":25,"starttls":"smtp"}
    [2001:DB8::7]:443#www.example.com => {"host":"2001:db8::7","port":443,"sni":"www.example.com"}
    192.0.2.7:5432/postgres#DOMAIN => {"host":"192.0.2.7","port":5432,"starttls":"postgres","sni":"DOMAIN"}
    DOMAINS_ALL:443 => {"host":"DOMAINS_ALL","port":443}
    mailhost:993 => {"host":"mailhost","port":993}`;
  const verifying = (texts: string[]) =>
    `A: [default]\nverify: ["a.com:1",\n  ${texts.map((text) => JSON.stringify(text)).join(",\n  ")}]\n`;
  const { verify } = load(verifying(valid.map(([text]) => text!))).sections[0]!;
  same(verify.slice(1), valid.map(([text, expected]) => ({ text, ...JSON.parse(expected!) })));
  const invalid =
    ("mail.example.com 2001:db8::7:443 mail.example.com:65536 mail.example.com:465/smtps [x]:443 " +
      "*.example.com:443 -oProxy:22 mail.example.com:443#192.0.2.1 a\xa0b:22").split(" ");
  const expected = invalid.map((text, index) => `actions.conf:${index + 3} ${JSON.stringify(text)}`);
  matches(errors(verifying(invalid)), expected);
});

// ---- errors ----------------------------------------------------------------------------------------------

Deno.test("loadConfig() rejects each invalid name, with its line and the name", () => {
  const invalid =
    ("$(reboot).example.com a.com,b.com https://example.com ../example.com example.com:443 -rf.com " +
      "a_b.example.com example.com. a..b.com localhost example.123 192.0.2.256 192.0.2.01 2001:db8::1::2 " +
      "a.*.b.com ::ffff:192.0.2.1 a／b.com xn--a.com").split(" ");
  const named = invalid.map((name, index) => `domains:${index + 1} ${name}`);
  matches(errors(`D: ${invalid.join("\n")}`), named);
  const more = "exam\u200dple.com\n\x1b[31mexample.com\n192.0.2.1 www\nexample.com # mine\na.com *\n";
  const expected =
    "domains:1 u{200d}|domains:2 u{1b}|domains:3 cannot be below|domains:4 comment|domains:5 dns-01";
  matches(errors(`D: ${more}`), expected.split("|"));
});

/** The behaviour, the files, and the place and a part of each problem. */
const invalid = rows`
  no number => S: reauthorizeDays: soon => lematt.conf:4 reauthorizeDays
  no value, and a number out of range => S: reauthorizeDays:⏎parallel: 101 => lematt.conf:4 no value => lematt.conf:5 parallel
  a comment behind a value => S: reauthorizeDays: 15 # days => lematt.conf:4 a comment needs a line of its own
  an indented line => S: reauthorizeDays: 15⏎ curve: P-256 => lematt.conf:4 line 5 is indented
  no multiple of 8, and no curve => S: keyBitsRSA: 2049⏎curve: secp256k1 => lematt.conf:4 2049 => lematt.conf:5 curve
  no tags => S: rsaTag: a/b⏎curveTag: r%(prefix)s => lematt.conf:4 rsaTag => lematt.conf:5 curveTag
  no key types, no profile => S: keyTypes: rsa dsa⏎profile: a b => lematt.conf:4 keyTypes => lematt.conf:5 profile
  a URL without TLS => S: directory: http://ca.test/⏎testDirectory: https://b/ => lematt.conf:4 directory
  a comma between addresses => S: contact: a@example.com, b@example.com => lematt.conf:4 contact
  a bundle that is missing => S: caBundle: nowhere.pem => lematt.conf:4 caBundle
  a bundle without certificates => S: caBundle: ../account.key => lematt.conf:4 caBundle
  a path for the shell => S: caBundle: ~/ca.pem => lematt.conf:4 caBundle
  rsaTag and curveTag that differ only in case => S: rsaTag: x⏎curveTag: X => lematt.conf:5 same names
  eabKeyId without eabHmacKey => S: eabKeyId: kid => lematt.conf:1 eabHmacKey
  an eabHmacKey that is not base64 => S: eabKeyId: kid⏎eabHmacKey: ../no-eab
    => lematt.conf:5 BASE/no-eab
  a mistyped setting, and no setting => S: reautorizeDays: 15⏎what => lematt.conf:4 did you mean reauthorizeDays => lematt.conf:5 neither
  keys without a section => C: # nothing => lematt.conf: [config]
  a section that is almost [config] => S: [confg]⏎x: 1 => lematt.conf:4 did you mean [config]
  domains of [every] => A: [every]⏎domains: a.com => actions.conf:2 every name
  a section without domains => A: [a]⏎update: [] => actions.conf:1 "domains"
  a section that is almost [default] => A: [Default]⏎update: [] => actions.conf:1 did you mean [default]
  a percent sign for the shell => A: [default]⏎update: ["date +%Y"] => actions.conf:2 "%%"
  ocspStapleRequired, which CAs no longer support => A: [DEFAULT]⏎ocspStapleRequired: yes⏎[default]⏎[every] => actions.conf:2 ocspStapleRequired
  dns-01 without its commands => A: [default]⏎challenge: dns-01 => actions.conf:2 "dnsPresent"
  conflicting challenges => A: [a]⏎domains: x.com⏎challenge: http-01⏎[b]⏎domains: x.com⏎challenge: dns-persist-01
    => actions.conf:4 http-01 in [a]
  a section name with a control character => A: [a␛[2J]⏎domains: example.com => actions.conf:1 control character
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
Deno.test("loadConfig() rejects invalid, incomplete or contradictory values, with the line of each problem", () => {
  for (const [behaviour, ...cells] of invalid) {
    matches(errors(...cells), expectedOf(cells), behaviour);
  }
});

Deno.test("loadConfig() reads lists as JSON, and rejects others with the line of the error and a corrected list", () => {
  const actions = 'A: [default]\nupdate: ["printf \'a\\nb\'", "", " ", "\\u00e9 \\"x\\" \\\\"]\n';
  const { sections, warnings } = load(actions);
  same([sections[0]!.update, warnings], [["printf 'a\nb'", "", " ", 'é "x" \\'], []]); // T1
  const lists = rows`
    "cmd %% x" => 2 no "[" => ["cmd % x"]
    ⏎  one⏎  'two' => 2 no "[" => ["one", "two"]
    ["a",⏎⏎  # no⏎  "b"⏎  "c"] => 6 unexpected ""c
    ["a",] => 2 unexpected "]"
    ["a"] # why => 2 a comment needs a line of its own
    ["b",⏎  "a⏎  b"] => 3 unexpected ""a
    ["b",⏎ "\u0000"] => 3 NUL
    ["b",⏎ "\ud800"] => 3 unpaired surrogate`;
  for (const [list, problem, corrected] of lists) {
    const problems = errors(`A: [default]\nupdate: ${list}\n`);
    matches(problems, [`actions.conf:${problem}`], list);
    if (!corrected) continue;
    const [, hint] = /write (\[.*\])/.exec(problems[0]!.hint!)!;
    same(load(`A: [default]\nupdate: ${hint}\n`).sections[0]!.update, JSON.parse(corrected));
  }
});

Deno.test("T9: no message contains a secret from a file", () => {
  const secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA";
  const texts = "eabHmacKey: X=|eabHmacKey:\nX==|eabHmacKey: ~X|X\nX: 1\nX: 1|directory: https://a:X@b/";
  for (const text of texts.split("|")) {
    const problems = JSON.stringify(errors(`S: eabKeyId: kid\n${text.replaceAll("X", secret)}`));
    ok(!problems.includes(secret.slice(0, 12)), problems);
  }
});

// ---- warnings --------------------------------------------------------------------------------------------

const warned = rows`
  rotation beyond the weekly limit of a pair => S: generateNewCertsAfterDays: 3.4 => lematt.conf:4 3.5
  keys that Let's Encrypt refuses => S: keyBitsRSA: 8192⏎curve: P-521 => lematt.conf:4 RSA of 2048 => lematt.conf:5 P-256
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
  a section without names => A: [a]⏎domains: => actions.conf:2 no names
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
    => A: [x]⏎domains: a.com⏎prepare: ["x"]⏎[y]⏎domains: c.a.com => actions.conf:1 "b.a.com"
  no mistake: rotation within the limit => S: generateNewCertsAfterDays: 3.5 => A: [default]⏎[every]
  no mistake: prepare is used by other sections => A: [DEFAULT]⏎prepare: ["x"]⏎[default]⏎challenge: dns-persist-01
  no mistake: prepare is used by other names => A: [default]⏎challenge: http-01⏎[every]⏎challenge: dns-persist-01⏎prepare: ["x"]
  no mistake: a key that another value uses => A: [DEFAULT]⏎host: web1⏎[default]⏎update: ["ssh %(host)s reload"]
  no mistake: ocspStapleRequired: no => A: [every]⏎ocspStapleRequired: no
  C19, no mistake: Let's Encrypt's limits are not those of a private CA, whatever its profiles are called
    => S: directory: https://a⏎testDirectory: https://a⏎keyBitsRSA: 8192⏎profile: tlsserver⏎generateNewCertsAfterDays: 0.25
    => D: a.com 1 2 3 4 5 6 7 8 9 a b c d e f g h i j k l m n o p⏎192.0.2.1`;
Deno.test("loadConfig() accepts harmless mistakes with a warning that names the line, and warns of nothing else", () => {
  for (const [behaviour, ...cells] of warned) {
    matches(load(...cells).warnings, expectedOf(cells), behaviour);
  }
});

Deno.test("a section that delivers without verify is no warning, but advice of --check", () => {
  const { warnings, advice } = load('A: [default]\nupdate: ["true"]\n[every]\nupdate: ["true"]\n');
  matches(warnings, []);
  matches(advice, ["actions.conf:1 DOMAIN:443"]);
});

// ---- files and their owners ------------------------------------------------------------------------------

Deno.test("loadConfig() accepts an account key in each format, and rejects one that the CA or lematt cannot use", () => {
  const rsa = (modulusLength: number) => generateKeyPairSync("rsa", { modulusLength }).privateKey;
  const ec = (namedCurve: string) => generateKeyPairSync("ec", { namedCurve }).privateKey;
  const block = (label: string, body = "c2VjcmV0") =>
    `-----BEGIN ${label}-----\n${body}\n-----END ${label}-----\n`;
  const sec1 = ec("secp384r1").export({ type: "sec1", format: "pem" });
  const conf = "C: [config]\naccountKey: ../key\nchallengeDropDir: ../drop\n";
  const fromOpenssl = block("EC PARAMETERS", "BgUrgQQAIg==") + sec1;
  for (const key of [rsa(2048).export({ type: "pkcs1", format: "pem" }), fromOpenssl]) {
    write("key", String(key));
    same(load(conf).accountKey, join(base, "key"));
  }
  const directory = directoryOf(conf);
  write("key.test", ""); // that of --test
  loadConfig("prod", directory);
  matches(errorsIn(directory, "test"), ["lematt.conf:2 BASE/key.test"]);
  const encrypted = block("RSA PRIVATE KEY", "Proc-Type: 4,ENCRYPTED\nDEK-Info: X\n\nc2VjcmV0");
  const unusable = [rsa(1024), ec("secp256k1"), generateKeyPairSync("ed25519").privateKey].map((key) =>
    String(key.export(pem))
  );
  for (const key of ["", block("PUBLIC KEY"), block("PRIVATE KEY"), encrypted, ...unusable]) {
    write("key", key);
    matches(errors(conf), ["lematt.conf:2 BASE/key"]);
  }
});

Deno.test("loadConfig() reads only the certificates of caBundle", () => {
  const settings = "S: caBundle: ../bundle.pem\n";
  const args = "req -x509 -newkey rsa:2048 -nodes -subj /CN=x -keyout -".split(" ");
  const text = execFileSync("openssl", args, { stdio: "pipe" }).toString(); // key and certificate
  write("bundle.pem", text);
  same(load(settings).caBundle!.match(/BEGIN .*?-/g), ["BEGIN CERTIFICATE-"]);
  write("bundle.pem", text.replace(/(BEGIN CERTIFICATE-----\n)..../, "$1AAAA"));
  matches(errors(settings), ["lematt.conf:4 bundle.pem"]);
});

/** A user who is not root, but may read all files, since deno and the packages may be root's. */
const OTHER = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"]
  .concat(["inh", "ambient"].map((kind) => `--${kind}-caps=+dac_read_search`));

Deno.test("T6, T11: paths of another working directory, and files of another user, are reported", async () => {
  const notices = async (directory: string) => {
    const command = [...Deno.uid() === 0 ? OTHER : [], ...LEMATT, "--prod", "--plan", directory];
    const { stdout, stderr } = await output(command, { cwd: base });
    return `${stdout}${stderr}`.replaceAll(base, "BASE");
  };
  const confOf = (key: string, drop: string) =>
    directoryOf(`C: [config]\naccountKey: ${key}\nchallengeDropDir: ${drop}\n`);
  const elsewhere = await notices(confOf("account.key", "drop"));
  same(elsewhere.match(/write BASE\S+/g), ["write BASE/account.key", "write BASE/drop"]);
  Deno.mkdirSync(join(base, "closed"), { mode: 0o555 });
  const closed = await notices(confOf("../closed/x/key", "../closed"));
  same(closed.match(/^lematt.*: "BASE\/closed"/gm)?.length, 2, closed);
  if (Deno.uid() !== 0) return;
  const directory = confOf("own/key", "own");
  Deno.mkdirSync(join(directory, "own"));
  for (const name of ["", "lematt.conf", "domains", "actions.conf", "own"]) {
    Deno.chownSync(join(directory, name), 1234, 1234);
    Deno.chmodSync(join(directory, name), 0o775);
  }
  Deno.mkdirSync(join(directory, "prod"));
  const tree = await notices(directory);
  same(tree.match(/hint: .*/g), [`hint: chown -R 1234 ${directory.replace(base, "BASE")}/prod`]);
});

/** What is changed; its path, mode, user and group; and the expected notice, if any. */
const open = rows`
  actions.conf writable by all => actions.conf 646 0 0 => actions.conf: chmod go-w
  domains of another user, writable by the group of root => domains 664 1234 0
  lematt.conf of another user => lematt.conf 644 1234 1234 => lematt.conf: chown root
  domains writable by all => domains 666 0 0 => domains: others may write
  a directory of another user => . 755 1234 1234 => BASE/CONF/prod: user 1234
  a directory writable by all => . 1777 0 0 => BASE/CONF/prod: 1777
  a tree writable by all => prod/key 777 0 0 => BASE/CONF/prod: CONF/prod/key
  a tree of another user => prod/state.json 600 1234 1234 => BASE/CONF/prod: user 1234
  a drop directory writable by all => drop 1777 33 33 => lematt.conf:3 chmod o-w
  a drop directory writable by its group => drop 2775 33 33
  an account key writable by all => key 602 0 0 => lematt.conf:2 others may write
  an account key readable by others => key 640 0 0 => lematt.conf:2 chmod 600`;
Deno.test("S5: root reads no files that others may change, nor alert commands in them", AS_ROOT, () => {
  for (const [what, change, ...expected] of open) {
    const conf = directoryOf(
      "C: [config]\naccountKey: key\nchallengeDropDir: drop\n",
      'A: [every]\nalert: ["mail x"]\n',
    );
    for (const directory of ["drop", "prod", "prod/key"]) Deno.mkdirSync(join(conf, directory));
    Deno.writeTextFileSync(join(conf, "prod/state.json"), "{}");
    Deno.writeTextFileSync(join(conf, "key"), accountKey, { mode: 0o600 });
    const [path, mode, uid, gid] = change!.split(" ") as [string, string, string, string];
    Deno.chownSync(join(conf, path), Number(uid), Number(gid));
    Deno.chmodSync(join(conf, path), parseInt(mode, 8));
    try {
      matches(loadConfig("prod", conf).warnings, expected, what);
    } catch (error) {
      if (!(error instanceof ConfigError)) throw error;
      matches(error.problems, expected, what);
      same(error.alerts?.length, path === "." ? undefined : path === "actions.conf" ? 0 : 1, what);
    }
  }
});

Deno.test("loadConfig() rejects paths special to the shell, and missing, special and binary files, without blocking", () => {
  const directory = directoryOf();
  for (const { name } of Deno.readDirSync(directory)) Deno.removeSync(join(directory, name));
  const path = (name: string) => `${name}: BASE/CONF/${name}`;
  matches(errorsIn(directory), [
    path("lematt.conf"),
    path("domains"),
    "actions.conf: touch BASE/CONF/actions.conf",
  ]);
  Deno.mkdirSync(join(directory, "lematt.conf"));
  execFileSync("mkfifo", [join(directory, "actions.conf")]);
  Deno.writeFileSync(join(directory, "domains"), Uint8Array.of(0x61, 0x2e, 0x62, 0x0a, 0x23, 0xe4));
  matches(errorsIn(directory), [path("lematt.conf"), "domains:2 UTF-8", path("actions.conf")]);
  const names = { "with blank": 1, "ünicode": 1, "$HOME": 1, "a-Z.0_@+,:%": 0 };
  for (const [name, count] of Object.entries(names)) {
    Deno.renameSync(directoryOf("S: curve: x"), join(base, name));
    same(errorsIn(join(base, name)).length, 1 + count, name);
  }
});

// ---- samples and addresses ---------------------------------------------------------------------------

Deno.test("the samples in conf/ have every key, need only names and the drop directory, and their examples are valid", () => {
  const read = (name: string) => Deno.readTextFileSync(new URL(`../conf/${name}`, import.meta.url));
  const directory = join(base, "samples");
  Deno.mkdirSync(directory);
  const put = (name: string, text = read(name)) => write(`samples/${name}`, text);
  for (const name of ["lematt.conf", "domains", "actions.conf"]) put(name);
  for (const [table, name] of [[SETTINGS, "lematt.conf"], [SECTION_KEYS, "actions.conf"]] as const) {
    const keys = Object.entries(table).map(([key, { spelling = key }]) => spelling);
    const missing = keys.filter((key) => !new RegExp(`\\b${key}\\b`).test(read(name)));
    same(missing, name === "lematt.conf" ? [] : ["ocspStapleRequired"]);
  }
  matches(errorsIn(directory), ["lematt.conf:23 challengeDropDir", "domains: no names"]);

  // all examples at once, except for files that do not exist here
  const settings = read("lematt.conf").replace(/^# (?=[a-zA-Z]+: \S+( \S+ \S+)?$)/gm, "")
    .replace(/^(caBundle|eabKeyId|eabHmacKey):/gm, "# $1:");
  put("lematt.conf", settings.replaceAll("/srv/web/challenges/", join(base, "drop")));
  put("domains", read("domains").replace(/^# (?=([a-z0-9.]+\.(com|org|10)\b.*)$)/gm, ""));
  put("actions.conf", read("actions.conf").replace(/^# (?=\[|\w+: )/gm, ""));
  const config = loadConfig("prod", directory);
  const names = config.lines.map(({ names }) => names[0]).join(" ");
  same(names, "example.com mail.example.com git.example.com example.org 192.0.2.10");
  same(config.sections.map(({ name }) => name).slice(0, 4), ["default", "every", "mail", "intranet"]);
  const warnings = printed(config.warnings).join("\n");
  ok(!/unknown|not replaced/.test(warnings), warnings);
});

Deno.test("isIP() agrees with node:net, except for zone identifiers", () => {
  const parts = ["", ..."0 1 09 255 256 ffff g 00000 1.2.3.4 :: : . %1".split(" "), " "];
  const triples = parts.flatMap((a) => parts.flatMap((b) => parts.map((c) => [a, b, c] as const)));
  const texts = triples.flatMap(([a, b, c]) => [`${a}:${b}:${c}`, `${a}.${b}.${c}`, `::${a}${b}${c}`]);
  texts.push(..."1.2.3.4.5 01.2.3.4 1.2.3.256 ::1.2.3.04 1:2:3:4:5:6:7:8 1:2:3:4:5:6:7:8:9".split(" "));
  for (const text of texts) same(isIP(text), text.includes("%") ? 0 : nodeIsIP(text), JSON.stringify(text));
});
