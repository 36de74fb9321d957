/** Goal: what the three files mean, and the line and the words of every fault in them. */

import { deepStrictEqual as same, ok } from "node:assert/strict";
import { generateKeyPairSync } from "node:crypto";
import { isIP as nodeIsIP } from "node:net";
import { join } from "node:path";
import { challengeOf, type Config, ConfigError, loadConfig, type Notice, sectionsOf } from "../lib/config.ts";
import { isIP } from "../lib/names.ts";

const base = await Deno.realPath(await Deno.makeTempDir({ prefix: "lematt-config-" }));
globalThis.addEventListener("unload", () => Deno.removeSync(base, { recursive: true }));

const pem = { type: "pkcs8", format: "pem" } as const;
const accountKey = generateKeyPairSync("ec", { namedCurve: "P-256" }).privateKey.export(pem) as string;
await Deno.mkdir(join(base, "drop"));
await Deno.writeTextFile(join(base, "account.key"), accountKey, { mode: 0o600 });
await Deno.writeTextFile(join(base, "eab"), "c2VjcmV0LXNlY3JldA\n", { mode: 0o600 });
await Deno.writeTextFile(join(base, "not-eab"), "not/base64url=!\n", { mode: 0o600 });

interface Files {
  settings?: string; // lines below those that every lematt.conf needs, from line 4 on
  conf?: string | null; // or all of lematt.conf; null: there is none
  domains?: string | null;
  actions?: string | null;
}

let count = 0;
/** A new configuration directory of these files; what is not given is as plain as can be. */
function directoryOf({ settings = "", conf, domains = "example.com\n", actions = "" }: Files): string {
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

function load(files: Files): Config {
  return loadConfig("prod", directoryOf(files));
}

/** `line text [hint]` of each fault. */
function faultsOf(files: Files): string[] {
  return tell(refused(() => load(files)));
}

function refused(action: () => unknown): readonly Notice[] {
  try {
    action();
  } catch (error) {
    if (error instanceof ConfigError) return error.problems;
    throw error;
  }
  throw new Error("It was accepted");
}

function tell(notices: readonly Notice[], withFile = false): string[] {
  return notices.map(({ file, line, text, hint }) =>
    `${withFile ? `${file}:` : ""}${line ?? ""} ${text}${hint ? ` [${hint}]` : ""}`
      .replaceAll(base, "BASE").replace(/conf\d+/g, "CONF")
  );
}

Deno.test("loadConfig() loads the three files of the original as its users have them", () => {
  const { directory, file, warnings, sections, lines, ...rest } = loadConfig(
    "prod",
    directoryOf({
      conf: `[config]
# days, with fractions if need be
reauthorizeDays: 42.42
#generateNewCertsAfterDays: 7
challengeDropDir: ${base}/drop/
alwaysGenerateNewKeys: no
accountKey: ${base}/account.key
keyBitsRSA: 2048
curve: prime256v1
# rsaTag: rsa2048
`,
      domains: `# names
example.com www
mail.example.com

dev.example.com dev2.example.com dev3.example.com
corp.example.com internal hr chat git web pikachu
`,
      actions: `# commands
[default]
update: ["sudo service nginx reload"]
uploadCerts: ["rsync -avz --chmod=F644 CERTS /etc/ssl/"]
uploadKeys: ["rsync -avz --chmod=F640 KEYS /etc/ssl/private/"]


[every]
uploadCerts: ["rsync -avz --chmod=F644 CERTS manager:/srv/tls/"]

[override-mail]
domains: mail.example.com
prepare: ["ssh -t forward http://example.com"]
ocspStapleRequired: no
update: ["ssh reload-postfix", "ssh reload-dovecot"]`,
    }),
  );
  same(file, join(directory, "lematt.conf"));
  same(rest, {
    mode: "prod",
    base: join(directory, "prod"),
    reauthorizeDays: 42.42,
    generateNewCertsAfterDays: 0,
    challengeDropDir: `${base}/drop`,
    accountKey: `${base}/account.key`,
    keyTypes: ["rsa", "ec"],
    keyBitsRSA: 2048,
    curve: "P-256",
    rsaTag: "rsa2048",
    curveTag: "prime256v1",
    alwaysGenerateNewKeys: false,
    directoryUrl: "https://acme-v02.api.letsencrypt.org/directory",
    contact: [],
    parallel: 10,
    preflight: "yes",
    commandTimeoutSeconds: 600,
    ari: true,
    dnsWaitSeconds: 120,
    verifyWaitSeconds: 60,
  });
  same(tell(warnings), [
    `3 "reauthorizeDays": more than two thirds of a 45-day certificate's life, so such a one is renewed ` +
    "when 30 days are left [15 is right for certificates of 45 days]",
  ]);
  const none = {
    domains: [],
    prepare: [],
    uploadCerts: [],
    uploadKeys: [],
    update: [],
    verify: [],
    alert: [],
  };
  const section = {
    ...none,
    uploadEach: [],
    rehearse: false,
    keyTypes: ["rsa", "ec"],
    verifyWaitSeconds: 60,
    dnsPresent: [],
    dnsCleanup: [],
    dnsParallel: false,
  };
  const [fallback, every, mail] = sections;
  same(sections, [
    {
      ...section,
      name: "default",
      line: 2,
      update: ["sudo service nginx reload"],
      uploadCerts: ["rsync -avz --chmod=F644 CERTS /etc/ssl/"],
      uploadKeys: ["rsync -avz --chmod=F640 KEYS /etc/ssl/private/"],
    },
    { ...section, name: "every", line: 8, uploadCerts: ["rsync -avz --chmod=F644 CERTS manager:/srv/tls/"] },
    {
      ...section,
      name: "override-mail",
      line: 11,
      domains: ["mail.example.com"],
      prepare: ["ssh -t forward http://example.com"],
      update: ["ssh reload-postfix", "ssh reload-dovecot"],
    },
  ]);
  same(lines.map(({ line, names, sections }) => ({ line, names, sections })), [
    { line: 2, names: ["example.com", "www.example.com"], sections: [fallback, every] },
    { line: 3, names: ["mail.example.com"], sections: [mail, every] },
    {
      line: 5,
      names: ["dev.example.com", "dev2.example.com", "dev3.example.com"],
      sections: [fallback, every],
    },
    {
      line: 6,
      names: ["corp", "chat.corp", "git.corp", "hr.corp", "internal.corp", "pikachu.corp", "web.corp"]
        .map((name) => `${name}.example.com`),
      sections: [fallback, every],
    },
  ]);
});

Deno.test("loadConfig() gives a frozen Config", () => {
  const config = load({ actions: "[default]\n" });
  for (const frozen of [config, config.sections, config.lines, config.warnings]) ok(Object.isFrozen(frozen));
  for (const frozen of [...config.sections, ...config.lines, config.lines[0]!.names]) {
    ok(Object.isFrozen(frozen));
  }
});

const settings: [line: string, expected: Partial<Config>][] = [
  ["reauthorizeDays = .5", { reauthorizeDays: 0.5 }],
  ["GENERATENEWCERTSAFTERDAYS: 3.5", { generateNewCertsAfterDays: 3.5 }],
  ["keyBitsRSA: 3072", { keyBitsRSA: 3072, rsaTag: "rsa3072" }],
  ["curve: secp256r1", { curve: "P-256", curveTag: "secp256r1" }],
  ["curve: SECP384R1", { curve: "P-384", curveTag: "SECP384R1" }],
  ["curve: P-521", { curve: "P-521", curveTag: "P-521" }],
  ["rsaTag: r-%(keyBitsRSA)s.x\ncurveTag: ec_1", { rsaTag: "r-2048.x", curveTag: "ec_1" }],
  ["[DEFAULT]\ncurve: p-384", { curve: "P-384" }],
  ["alwaysGenerateNewKeys: On", { alwaysGenerateNewKeys: true }],
  ["alwaysGenerateNewKeys: 0", { alwaysGenerateNewKeys: false }],
  ["keyTypes: ec", { keyTypes: ["ec"] }],
  ["keyTypes: ec rsa", { keyTypes: ["ec", "rsa"] }],
  ["directory: https://ca.test:14000/dir\ntestDirectory: https://ca.test/?x=1", {
    directoryUrl: "https://ca.test:14000/dir",
  }],
  ["contact: a+b@example.com\n  mailto:c@example.org", {
    contact: ["mailto:a+b@example.com", "mailto:c@example.org"],
  }],
  ["parallel: 100", { parallel: 100 }],
  ["preflight: WARN", { preflight: "warn" }],
  ["preflight: off", { preflight: "no" }],
  ["commandTimeout: 1.5", { commandTimeoutSeconds: 1.5 }],
  ["ari: no", { ari: false }],
  ["profile: tlsserver", { profile: "tlsserver" }],
  ["preferredChain: ISRG Root X1", { preferredChain: "ISRG Root X1" }],
  ["dnsWait: 0\nverifyWait: 5", { dnsWaitSeconds: 0, verifyWaitSeconds: 5 }],
  ["eabKeyId: kid-1\neabHmacKey: ../eab", {
    eab: { keyId: "kid-1", hmacKey: new TextEncoder().encode("secret-secret") },
  }],
];
for (const [line, expected] of settings) {
  Deno.test(`loadConfig() reads ${JSON.stringify(line)}`, () => {
    const config = load({ settings: line });
    for (const [key, value] of Object.entries(expected)) same(config[key as keyof Config], value);
  });
}

const faultySettings: [line: string, ...faults: string[]][] = [
  ["reauthorizeDays: soon", '4 Cannot read "reauthorizeDays": "soon" is not a number from 0 to 36500'],
  ["reauthorizeDays: -1", '4 Cannot read "reauthorizeDays": "-1" is not a number from 0 to 36500'],
  ["reauthorizeDays: 1e1", '4 Cannot read "reauthorizeDays": "1e1" is not a number from 0 to 36500'],
  ["ReauthorizeDays: nan", '4 Cannot read "reauthorizeDays": "nan" is not a number from 0 to 36500'],
  [
    "reauthorizeDays:",
    '4 Cannot read "reauthorizeDays": there is no value [take the line out, or write one]',
  ],
  [
    "reauthorizeDays: 15 # days",
    '4 Cannot read "reauthorizeDays": "15 # days" is not a number from 0 to 36500 [a comment needs a line of its own]',
  ],
  [
    "reauthorizeDays: 15\n curve: P-256",
    '4 Cannot read "reauthorizeDays": it goes over several lines [line 5 is indented, so it continues this one]',
  ],
  ["keyBitsRSA: 1024", '4 Cannot read "keyBitsRSA": "1024" is not a multiple of 8 from 2048 to 8192'],
  ["keyBitsRSA: 2049", '4 Cannot read "keyBitsRSA": "2049" is not a multiple of 8 from 2048 to 8192'],
  [
    "curve: secp256k1",
    '4 Cannot read "curve": "secp256k1" is no curve that is known here [prime256v1, secp384r1 or secp521r1]',
  ],
  [
    "rsaTag: a/b",
    '4 Cannot read "rsaTag": "a/b" cannot stand in a file name [up to 64 letters, digits, dots, dashes, underscores]',
  ],
  [
    "rsaTag: x\ncurveTag: X",
    '5 Cannot read "curveTag": the files of both key types would have the same names [make rsaTag and curveTag differ]',
  ],
  ["alwaysGenerateNewKeys: maybe", '4 Cannot read "alwaysGenerateNewKeys": "maybe" is neither yes nor no'],
  ["preflight: ask", '4 Cannot read "preflight": "ask" is neither yes nor no, or warn'],
  ["keyTypes: rsa dsa", '4 Cannot read "keyTypes": "dsa" is neither "rsa" nor "ec"'],
  ["parallel: 0", '4 Cannot read "parallel": "0" is not a whole number from 1 to 100'],
  ["parallel: 1.5", '4 Cannot read "parallel": "1.5" is not a whole number from 1 to 100'],
  ["commandTimeout: 0", '4 Cannot read "commandTimeout": "0" is not a number above 0 to 2147483'],
  ["directory: http://ca.test/", '4 Cannot read "directory": "http://ca.test/" is not a plain https URL'],
  [
    "directory: https://me:secret@ca.test/",
    '4 Cannot read "directory": what is there is not a plain https URL',
  ],
  [
    "directory: https://ca.test/#x",
    '4 Cannot read "directory": "https://ca.test/#x" is not a plain https URL',
  ],
  [
    "contact: a@example.com, b@example.com",
    '4 Cannot read "contact": "a@example.com," is no mail address [write addresses with blanks between them]',
  ],
  [
    "contact: tel:1",
    '4 Cannot read "contact": "tel:1" is no mail address [write addresses with blanks between them]',
  ],
  ["profile: a b", '4 Cannot read "profile": "a b" is more than one word'],
  ["caBundle: nowhere.pem", '4 Cannot read "caBundle": "BASE/CONF/nowhere.pem": it does not exist'],
  ["caBundle: ../account.key", '4 Cannot read "caBundle": "BASE/account.key" holds no certificate in PEM'],
  ["eabKeyId: kid", '4 Cannot read "eabKeyId": it needs "eabHmacKey" beside it'],
  ["eabHmacKey: ../eab", '4 Cannot read "eabHmacKey": it needs "eabKeyId" beside it'],
  [
    "eabKeyId: kid\neabHmacKey: ../not-eab",
    '5 Cannot read "eabHmacKey": "BASE/not-eab" holds no base64url text [copy the key as the CA shows it]',
  ],
  [
    "eabKeyId: kid\neabHmacKey: ~/key",
    '5 Cannot read "eabHmacKey": no shell reads "~/key" [write the path in full]',
  ],
  ["profile: a\tb\x1b[31m", '4 Cannot read "profile": a control character in it'],
  [
    "profile: %(prefix)s",
    '4 Cannot read "profile": no key "prefix" for "%(prefix)s" ' +
    '[write it in this section or in [DEFAULT], or "%%" for a percent sign]',
  ],
  [
    "reautorizeDays: 15",
    '4 Cannot use key "reautorizeDays": it is unknown [did you mean "reauthorizeDays"?]',
  ],
  [
    "challenge_drop_dir: /x",
    '4 Cannot use key "challenge_drop_dir": it is unknown [did you mean "challengeDropDir"?]',
  ],
  ["nonsense: 1", '4 Cannot use key "nonsense": it is unknown'],
  ["update: []", '4 Cannot use key "update": it is unknown [it belongs in a section of actions.conf]'],
  ["[DEFAULT]\nnonsense: 1", '5 Cannot use key "nonsense": it is unknown'],
  [
    "[default]\nupdate: []",
    "4 Cannot use section [default]: the only one here is [config] [sections of commands belong in actions.conf]",
  ],
  ["parallel: 1\nParallel: 2", '5 Cannot use key "Parallel" twice in one section: it is in line 4 already'],
  [
    "what",
    '4 Cannot read "what": neither a [section] nor a "key: value" ' +
    '[indent it if it continues "challengeDropDir" of line 3]',
  ],
];
for (const [line, ...faults] of faultySettings) {
  Deno.test(`loadConfig() refuses ${JSON.stringify(line)}`, () => {
    same(faultsOf({ settings: line }), faults);
  });
}

const names: [line: string, names: string[]][] = [
  ["Example.COM WWW", ["example.com", "www.example.com"]],
  ["example.com www www.example.com example.com www", ["example.com", "www.example.com"]],
  ["b.org z.a.com a.org c.b.org b.a.com a.com a.net", [
    "b.org",
    "a.com",
    "a.net",
    "a.org",
    "b.a.com",
    "z.a.com",
    "c.b.org",
  ]],
  ["  example.com\twww\u00a0mail  ", ["example.com", "mail.example.com", "www.example.com"]],
  ["Exämple.com ÄPFEL b\u0075\u0308cher.de", [
    "xn--exmple-cua.com",
    "xn--bcher-kva.de",
    "xn--pfel-koa.xn--exmple-cua.com",
  ]],
  ["faß.de xn--fa-hia.de", ["xn--fa-hia.de"]],
  ["xn--exmple-cua.com ä", ["xn--exmple-cua.com", "xn--4ca.xn--exmple-cua.com"]],
  ["192.0.2.1 2001:DB8:0:0:1:0:0:1", ["192.0.2.1", "2001:db8::1:0:0:1"]],
  ["2001:db8:0:1:1:1:1:1", ["2001:db8:0:1:1:1:1:1"]],
  ["a-b.c--d.x1 3com", ["a-b.c--d.x1", "3com.a-b.c--d.x1"]],
  ["\u212Aelvin.com", ["kelvin.com"]],
  [`${"a".repeat(63)}.com`, [`${"a".repeat(63)}.com`]],
  [`${`${"a".repeat(49)}.`.repeat(5)}com`, [`${`${"a".repeat(49)}.`.repeat(5)}com`]],
];
for (const [line, expected] of names) {
  Deno.test(`loadConfig() takes ${JSON.stringify(line.slice(0, 60))} in domains`, () => {
    same(load({ domains: line }).lines.map(({ names }) => names), [expected]);
  });
}

const faultyNames: [line: string, ...faults: string[]][] = [
  ["$(reboot).example.com", 'name "$(reboot).example.com": "$" cannot stand in a name'],
  ["a;b.example.com", 'name "a;b.example.com": ";" cannot stand in a name [separate names by blanks]'],
  [
    "a.example.com,b.example.com",
    'name "a.example.com,b.example.com": "," cannot stand in a name [separate names by blanks]',
  ],
  ["../example.com", 'name "../example.com": "/" cannot stand in a name [write the name alone, not a URL]'],
  [
    "https://example.com",
    'name "https://example.com": "/" cannot stand in a name [write the name alone, not a URL]',
  ],
  ["example.com:443", 'name "example.com:443": ":" cannot stand in a name or IP address'],
  ["-rf.example.com", 'name "-rf.example.com": the label "-rf" begins or ends with a dash'],
  ["a.example-.com", 'name "a.example-.com": the label "example-" begins or ends with a dash'],
  ["a_b.example.com", 'name "a_b.example.com": "_" cannot stand in a name'],
  ["example.com.", 'name "example.com.": it ends in a dot [leave the dot out]'],
  ["a..example.com", 'name "a..example.com": an empty label, where two dots meet or a dot begins it'],
  [".example.com", 'name ".example.com": an empty label, where two dots meet or a dot begins it'],
  ["localhost", 'name "localhost": it has no dot [write the name in full]'],
  ["example.123", 'name "example.123": its last label is a number, but it is no IP address'],
  ["192.0.2.256", 'name "192.0.2.256": its last label is a number, but it is no IP address'],
  ["192.0.2.01", 'name "192.0.2.01": its last label is a number, but it is no IP address'],
  ["2001:db8::1::2", 'name "2001:db8::1::2": ":" cannot stand in a name or IP address'],
  ["[2001:db8::1]", 'name "[2001:db8::1]": "[" cannot stand in a name'],
  ["fe80::1%eth0", 'name "fe80::1%eth0": ":" cannot stand in a name or IP address'],
  ["::ffff:192.0.2.1", 'name "::ffff:192.0.2.1": it is an IPv4 address in IPv6 clothes [write it as IPv4]'],
  [
    `${"a".repeat(64)}.com`,
    `name "${"a".repeat(64)}.com": the label "${"a".repeat(64)}" has more than 63 characters`,
  ],
  [`${"a.".repeat(126)}com`, `name "${"a.".repeat(126).slice(0, 79)}…": it has more than 253 characters`],
  ["example.com # mine", 'name "#": "#" cannot stand in a name [a comment needs a line of its own]'],
  ["a.*.example.com", 'name "a.*.example.com": "*" may only be the whole first label'],
  ["*", 'name "*": "*" may only be the whole first label'],
  ["*.com", 'name "*.com": it has no dot [write the name in full]'],
  ["192.0.2.1 www", 'name "www": "192.0.2.1" has no subdomains to be short for [write the name in full]'],
  ["exam\u200dple.com", 'name "exam\\u{200d}ple.com": it has a character that cannot be seen'],
  ["\x1b[31mexample.com", 'name "\\u{1b}[31mexample.com": it has a character that cannot be seen'],
  ["ｅxample.com", 'name "ｅxample.com": "ｅxample" would become "example" [write that if you mean it]'],
  [
    "example。com",
    'name "example。com": "example。com" would become "example.com" [write that if you mean it]',
  ],
  ["a／b.com", 'name "a／b.com": "a／b" would become "a/b" [write that if you mean it]'],
  ["xn--a.com", 'name "xn--a.com": it has an "xn--" label that stands for nothing'],
  ["-x.com www mail", 'name "-x.com": the label "-x" begins or ends with a dash'],
];
for (const [line, ...faults] of faultyNames) {
  Deno.test(`loadConfig() refuses ${JSON.stringify(line.slice(0, 60))} in domains`, () => {
    same(faultsOf({ domains: line }), faults.map((fault) => `1 Cannot use the ${fault}`));
  });
}

const sectionFaults: [actions: string, ...faults: string[]][] = [
  ["[a]\nupdate: []\n", '1 Cannot find "domains" in [a] [such as "domains: www.example.com"]'],
  ["[Default]\nupdate: []\n", '1 Cannot find "domains" in [Default] [did you mean [default]?]'],
  ["[every]\ndomains: example.com\n", '2 Cannot use "domains" in [every]: it is for every name'],
  [
    "[default]\ndomains: example.com\n",
    '2 Cannot use "domains" in [default]: it is for the names of no other section',
  ],
  ["[a]\ndomains:\n", '2 Cannot read "domains": there is no value [take the line out, or write one]'],
  [
    "[a]\ndomains: example.com\n  # no\n  www a,b\n",
    '4 Cannot read "domains": "www": it has no dot [write the name in full]',
    '4 Cannot read "domains": "a,b": "," cannot stand in a name [separate names by blanks]',
  ],
  [
    "[default]\nupdate: true\n",
    '2 Cannot read list "update": not JSON, it does not begin with "[" [write ["true"]]',
  ],
  ["[default]\nupdate:\n", '2 Cannot read list "update": not JSON, it does not begin with "[" [write []]'],
  [
    '[default]\nupdate: ["a",\n\n  # no\n  "b"\n  "c"]\n',
    '6 Cannot read list "update": not JSON, no "," or "]" before ""c"]"',
  ],
  ['[default]\nupdate: ["a",]\n', '2 Cannot read list "update": not JSON, a "," before its "]"'],
  ['[default]\nupdate: ["a"\n', '2 Cannot read list "update": not JSON, no "," or "]" at its end'],
  [
    "[default]\nupdate: ['a']\n",
    `2 Cannot read list "update": not JSON, no string in double quotes before "'a']"`,
  ],
  [
    '[default]\nupdate: ["a\n  b"]\n',
    '2 Cannot read list "update": not JSON, the string ""a\\nb"" has a line break ' +
    'or an unknown "\\" in it',
  ],
  [
    '[default]\nupdate: ["a\\q"]\n',
    '2 Cannot read list "update": not JSON, the string ""a\\q"" has a line break ' +
    'or an unknown "\\" in it',
  ],
  ['[default]\nupdate: ["a]\n', '2 Cannot read list "update": not JSON, the string ""a]" does not end'],
  [
    '[default]\nupdate: ["a", 1]\n',
    '2 Cannot read list "update": not JSON, no string in double quotes before "1]"',
  ],
  [
    '[default]\nupdate: ["a"] # why\n',
    '2 Cannot read list "update": not JSON, text behind its "]" [a comment needs a line of its own]',
  ],
  [
    '[default]\nupdate: ["a", " ", "b\\nc", "\\u0000", "\\ud800"]\n',
    '2 Cannot read list "update": an empty string in it [take it out]',
    '2 Cannot read list "update": a line break or NUL in "b\\nc"',
    '2 Cannot read list "update": a line break or NUL in "\\u{0}"',
    '2 Cannot read list "update": a line break or NUL in "\ufffd"',
  ],
  [
    '[default]\nupdate: ["date +%Y"]\n',
    '2 Cannot read "update": a lone "%" in it [write "%%" for a percent sign]',
  ],
  [
    "[default]\nocspStapleRequired: yes\n[a]\ndomains: example.com\nocspStapleRequired: on\n",
    ...[2, 5].map((line) =>
      `${line} Cannot read "ocspStapleRequired": CAs have ended OCSP, and refuse to issue a certificate that ` +
      "demands a staple [take the line out]"
    ),
  ],
  [
    "[DEFAULT]\nocspStapleRequired: yes\n[default]\n[every]\n",
    '2 Cannot read "ocspStapleRequired": CAs have ended OCSP, and refuse to issue a certificate that demands a staple ' +
    "[take the line out]",
  ],
  [
    "[default]\nchallenge: dns\n",
    '2 Cannot read "challenge": "dns" is none of http-01, dns-01, dns-persist-01',
  ],
  [
    "[default]\nchallenge: dns-01\n",
    '2 Cannot read "challenge": "dns-01" needs "dnsPresent" in the same section [dnsPresent: ["…"]]',
  ],
  [
    '[a]\ndomains: example.com\nchallenge: dns-persist-01\n[b]\ndomains: example.com\nchallenge: dns-01\ndnsPresent: ["x"]',
    '4 Cannot tell how to prove "example.com": by dns-persist-01 in [a] or by dns-01 in [b]',
  ],
  ["[default]\nupdat: []\n", '2 Cannot use key "updat": it is unknown [did you mean "update"?]'],
  [
    "[default]\nparallel: 5\n",
    '2 Cannot use key "parallel": it is unknown [it belongs in [config] of lematt.conf]',
  ],
  [
    "[a]\ndomains: example.com\n[a]\n",
    "3 Cannot use section [a] twice: it began in line 1 [give each section a name of its own]",
    '3 Cannot find "domains" in [a] [such as "domains: www.example.com"]',
  ],
  ["[a\x1b[2J]\ndomains: example.com", "1 Cannot use section [a\\u{1b}[2J]: a control character in its name"],
];
for (const [actions, ...faults] of sectionFaults) {
  Deno.test(`loadConfig() refuses ${JSON.stringify(actions.slice(0, 70))} in actions.conf`, () => {
    same(faultsOf({ actions }), faults);
  });
}

const endpoints: [text: string, expected: object | string][] = [
  ["mail.Example.com:465", { host: "mail.example.com", port: 465 }],
  ["mail.example.com:25/smtp", { host: "mail.example.com", port: 25, starttls: "smtp" }],
  ["[2001:DB8::7]:443#www.example.com", { host: "2001:db8::7", port: 443, sni: "www.example.com" }],
  ["192.0.2.7:5432/postgres#DOMAIN", { host: "192.0.2.7", port: 5432, starttls: "postgres", sni: "DOMAIN" }],
  ["DOMAINS_ALL:443", { host: "DOMAINS_ALL", port: 443 }],
  ["mailhost:993", { host: "mailhost", port: 993 }],
  ["bücher.de:443", { host: "xn--bcher-kva.de", port: 443 }],
  ["mail.example.com", 'it has no port [such as "mail.example.com:443"]'],
  ["mail.example.com/smtp", 'it has no port [such as "mail.example.com:443"]'],
  ["[2001:db8::7]", 'it has no port [such as "[2001:db8::7]:443"]'],
  ["2001:db8::7:443", "not host:port [an IPv6 address stands in brackets: [2001:db8::7]:443]"],
  ["mail.example.com:smtp", '"smtp" is no port'],
  ["mail.example.com:65536", '"65536" is no port'],
  ["mail.example.com:", '"" is no port'],
  [
    "mail.example.com:465/smtps",
    '"smtps" is no protocol with STARTTLS that is known here ' +
    "[smtp, imap, pop3, ldap, ftp, postgres; none for TLS from the start]",
  ],
  ["[x]:443", "no IPv6 address in its brackets"],
  ["*.example.com:443", "a wildcard is no host"],
  ["-oProxy:22", 'the label "-oproxy" begins or ends with a dash'],
  ["a b:22", "it has a character that cannot be seen"],
  ["mail.example.com:443#", 'behind "#", there is no name'],
  ["mail.example.com:443#192.0.2.1", 'behind "#", an address cannot be a server name'],
];
for (const [text, expected] of endpoints) {
  Deno.test(`loadConfig() ${typeof expected === "string" ? "refuses" : "takes"} ${JSON.stringify(text)} in verify`, () => {
    const actions = `[default]\nverify: ["ok.example.com:443",\n  ${JSON.stringify(text)}]\n`;
    if (typeof expected === "string") {
      same(faultsOf({ actions }), [`3 Cannot read "verify": ${JSON.stringify(text)}: ${expected}`]);
    } else same(load({ actions }).sections[0]!.verify[1], { text, ...expected });
  });
}

const lineFaults: [behaviour: string, files: Files, faults: string[]][] = [
  ["a line that is there twice", { domains: "a.com b\na.com\nA.com b.a.com\nb.a.com a.com\n" }, [
    "3 Cannot use the names of line 1 twice [take one of the lines out]",
  ]],
  ["more than 100 names on a line", { domains: `a.com ${words(100)}\n` }, [
    "1 Cannot put 101 names into one certificate: 100 is the most [make it two lines]",
  ]],
  [
    "more names than a profile allows",
    { settings: "profile: tlsserver\n", domains: `a.com ${words(25)}\n` },
    [
      '1 Cannot put 26 names into one certificate: 25 is the most of profile "tlsserver"',
    ],
  ],
  ["more names than a section's profile allows", {
    domains: `a.com ${words(25)}\n`,
    actions: "[default]\nprofile: shortlived\n",
  }, ['1 Cannot put 26 names into one certificate: 25 is the most of profile "shortlived"']],
  ["a line whose sections want different profiles", {
    domains: "a.com b.com\n",
    actions:
      "[a]\ndomains: a.com\nprofile: one\n[b]\ndomains: b.com\nprofile: two\n[every]\nprofile: three\n",
  }, [`1 Cannot choose a profile: its names' sections say "one" and "two"`]],
  ["a wildcard that is proven by http-01", { domains: "example.com *\n" }, [
    '1 Cannot prove "*.example.com" by http-01: a wildcard needs dns-01 or dns-persist-01 ' +
    '[name it in a section of actions.conf with "challenge: dns-01"]',
  ]],
  ["a wildcard that only its parent's section would prove", {
    domains: "example.com *\n",
    actions: "[dns]\ndomains: example.com\nchallenge: dns-persist-01\n",
  }, [
    '1 Cannot prove "*.example.com" by http-01: a wildcard needs dns-01 or dns-persist-01 ' +
    '[add *.example.com to "domains" of [dns]]',
  ]],
  ["an IP address that is proven through the DNS", {
    domains: "192.0.2.1\n",
    actions: "[every]\nchallenge: dns-persist-01\n",
  }, [
    '1 Cannot prove "192.0.2.1" by dns-persist-01: an IP address needs http-01 ' +
    '[name it in a section of actions.conf with "challenge: http-01"]',
  ]],
  ["a file without names", { domains: "# none\n\n   # none\n" }, [
    " Cannot find a name in it [one line a certificate, such as: example.com www]",
  ]],
];
for (const [behaviour, files, faults] of lineFaults) {
  Deno.test(`loadConfig() refuses ${behaviour}`, () => same(faultsOf(files), faults));
}

function words(many: number): string {
  return Array.from({ length: many }, (_, index) => `w${index}`).join(" ");
}

Deno.test("loadConfig() counts names once", () => {
  same(load({ domains: `a.com ${words(99)} ${words(99)} a.com\n` }).lines[0]!.names.length, 100);
});

Deno.test("loadConfig() takes a line's profile from its sections, then [every], then [config]", () => {
  const { lines } = load({
    settings: "profile: of-config\n",
    domains: "a.com\nb.com\nc.com a.com\nd.com\n",
    actions: "[a]\ndomains: a.com\nprofile: of-a\n[d]\ndomains: d.com\n[every]\nprofile: of-every\n",
  });
  same(lines.map(({ profile }) => profile), ["of-a", "of-every", "of-a", "of-every"]);
  same(load({ settings: "profile: of-config\n" }).lines[0]!.profile, "of-config");
  ok(!("profile" in load({}).lines[0]!));
});

Deno.test("sectionsOf() finds the overrides of a name, else default; every comes last", () => {
  const config = load({
    domains: "b.com a.com d.com\na.com\nd.com\n*.a.com\n",
    actions: `[every]
challenge: dns-01
dnsPresent: ["x"]
[one]
domains: A.com b.com
challenge: http-01
[default]
[two]
domains: a.com *.a.com
`,
  });
  const named = (name: string) => sectionsOf(config, name).map(({ name }) => name);
  same(named("a.com"), ["one", "two", "every"]);
  same(named("b.com"), ["one", "every"]);
  same(named("d.com"), ["default", "every"]);
  same(named("*.a.com"), ["two", "every"]);
  same(named("constructor"), ["default", "every"]);
  same(config.lines.map(({ sections }) => sections.map(({ name }) => name)), [
    ["one", "two", "default", "every"],
    ["one", "two", "every"],
    ["default", "every"],
    ["two", "every"],
  ]);
  same(["a.com", "d.com", "*.a.com"].map((name) => challengeOf(config, name)), [
    "http-01",
    "dns-01",
    "dns-01",
  ]);
});

Deno.test("sectionsOf() and challengeOf() do without any section", () => {
  const config = load({});
  same([sectionsOf(config, "a.com"), challengeOf(config, "a.com")], [[], "http-01"]);
});

const noDropDir = "[config]\naccountKey: ../account.key\n";
Deno.test("loadConfig() needs a drop directory if a name is proven by http-01, and only then", () => {
  same(
    faultsOf({
      conf: noDropDir,
      domains: "*.a.com\nb.com\n",
      actions: "[a]\ndomains: *.a.com\nchallenge: dns-persist-01",
    }),
    [
      '1 Cannot find "challengeDropDir" in [config] [name the directory that is served as ' +
      "http://b.com/.well-known/acme-challenge/]",
    ],
  );
  const config = load({
    conf: noDropDir,
    domains: "*.a.com\n",
    actions: "[every]\nchallenge: dns-persist-01",
  });
  ok(!("challengeDropDir" in config));
});

Deno.test("loadConfig() refuses a drop directory that is none", () => {
  const withDropDir = (path: string) => faultsOf({ conf: `${noDropDir}challengeDropDir: ${path}\n` });
  same(withDropDir("../it's/missing"), [
    `3 Cannot read "challengeDropDir": "BASE/it's/missing": it does not exist [mkdir -p 'BASE/it'\\''s/missing']`,
  ]);
  same(withDropDir("../account.key"), [
    '3 Cannot read "challengeDropDir": "BASE/account.key": it is not a directory ' +
    "[lematt, as the user that runs it, must be able to write files there]",
  ]);
});

/** The faults that another user would be told of; one who may read everything, so that Deno and this file are found. */
function faultsForNobody(conf: string): Notice[] {
  const url = new URL("../lib/config.ts", import.meta.url);
  const code = `try { (await import("${url}")).loadConfig("prod", "${conf}"); console.log("[]"); }
    catch (error) { console.log(JSON.stringify(error.problems)); }`;
  const nobody =
    "--reuid=65534 --regid=65534 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search";
  const as = Deno.uid() === 0 ? ["setpriv", ...nobody.split(" ")] : [];
  const [command, ...args] = [...as, Deno.execPath(), "eval", "--no-check", code];
  const { stdout } = new Deno.Command(command!, { args, stderr: "inherit" }).outputSync();
  return JSON.parse(new TextDecoder().decode(stdout));
}

Deno.test("loadConfig() refuses directories that its user cannot write to", () => {
  const closed = join(base, "closed");
  Deno.mkdirSync(closed);
  Deno.chmodSync(closed, 0o555);
  const conf = directoryOf({ conf: `[config]\naccountKey: ${closed}/x/key\nchallengeDropDir: ${closed}\n` });
  const hint = "lematt, as the user that runs it, must be able to write files there";
  same(tell(faultsForNobody(conf)), [
    '2 Cannot read "accountKey": "BASE/closed/x/key" does not exist and cannot be made: "BASE/closed": permission denied',
    `3 Cannot read "challengeDropDir": "BASE/closed": permission denied [${hint}]`,
  ]);
});

Deno.test("loadConfig() accepts directories that a group may write to, which may be the user's, and everything from root", () => {
  const shared = join(base, "shared");
  Deno.mkdirSync(shared);
  Deno.chmodSync(shared, 0o770);
  const conf = directoryOf({ conf: `[config]\naccountKey: ${shared}/key\nchallengeDropDir: ${shared}\n` });
  same(faultsForNobody(conf), []);
  if (Deno.uid() !== 0) return;
  Deno.chownSync(shared, 65534, 65534);
  Deno.chmodSync(shared, 0o500);
  loadConfig("prod", conf);
});

const warned: [behaviour: string, files: Files, warnings: string[]][] = [
  ["rotation beyond the weekly limit of a pair", { settings: "generateNewCertsAfterDays: 3.4\n" }, [
    '4 "generateNewCertsAfterDays": fewer than 3.5 days: Let\'s Encrypt issues 5 certificates a week for one set of ' +
    "names, and a pair of RSA and EC takes two",
  ]],
  ["rotation beyond the weekly limit of one key type", {
    settings: "generateNewCertsAfterDays: 1.3\nkeyTypes: ec\n",
  }, [
    '4 "generateNewCertsAfterDays": fewer than 1.4 days: Let\'s Encrypt issues 5 certificates a week for one set of names',
  ]],
  ["two rules of renewal", { settings: "generateNewCertsAfterDays: 7\nreauthorizeDays: 60\n" }, [
    '4 "generateNewCertsAfterDays": certificates are renewed at this age, "reauthorizeDays" is passed over',
  ]],
  ["renewal after expiry", { settings: "reauthorizeDays: 0\n" }, [
    '4 "reauthorizeDays": with 0, a certificate is renewed only when it has expired',
  ]],
  ["keys that Let's Encrypt refuses", { settings: "keyBitsRSA: 8192\ncurve: P-521\n" }, [
    '4 "keyBitsRSA": Let\'s Encrypt takes RSA keys of 2048, 3072 and 4096 bits, P-256 and P-384, not 8192',
    '5 "curve": Let\'s Encrypt takes RSA keys of 2048, 3072 and 4096 bits, P-256 and P-384, not P-521',
  ]],
  ["IP addresses in a profile of Let's Encrypt that has none", { domains: "a.com\n192.0.2.1 ::1\n" }, [
    '2 Let\'s Encrypt certifies IP addresses in its profile "shortlived" alone [profile: shortlived]',
  ]],
  ["a name that is alone and among others", { domains: "a.com\nb.com a.com\na.com c.com\nc.com x.org\n" }, [
    `2 "a.com" is also alone in line 1: its files are that line's, not links to this one's`,
    `3 "a.com" is also alone in line 1: its files are that line's, not links to this one's`,
  ]],
  ["a section's name that is issued nowhere", {
    domains: "a.com\n*.b.com\n",
    actions: "[every]\nchallenge: dns-persist-01\n[x]\ndomains: a.com\n  ww.a.com www.b.com\n",
  }, [
    '5 "ww.a.com" is in no line of "domains", so this section does nothing for it',
    '5 "www.b.com" is in no line of "domains", so this section does nothing for it [name *.b.com, which is]',
  ]],
  ["commands in [DEFAULT] where [default] is meant", { actions: '[DEFAULT]\nupdate: ["true"]\n' }, [
    "1 [DEFAULT] is what all sections fall back to, and none by itself " +
    "[write [default] for what is to be run for names of no other section]",
  ]],
  ["dnsPresent that is never run", { actions: '[default]\ndnsPresent: ["x"]\n' }, [
    '2 "dnsPresent": it is not used without "challenge: dns-01" in the same section',
  ]],
];
for (const [behaviour, files, warnings] of warned) {
  Deno.test(`loadConfig() warns of ${behaviour}`, () => same(tell(load(files).warnings), warnings));
}

Deno.test("loadConfig() says nothing of what is right", () => {
  same(load({ settings: "generateNewCertsAfterDays: 3.5\n", actions: "[default]\n[every]\n" }).warnings, []);
  const other = "directory: https://ca.test/dir\nkeyBitsRSA: 8192\n";
  same(load({ settings: other, domains: "192.0.2.1\n" }).warnings, []);
});

const rsa = generateKeyPairSync("rsa", { modulusLength: 2048 }).privateKey;
const ec = generateKeyPairSync("ec", { namedCurve: "secp384r1" }).privateKey;
const accountKeys: [behaviour: string, text: string, fault?: string][] = [
  ["RSA in PKCS#8", rsa.export(pem) as string],
  ["RSA in PKCS#1", rsa.export({ type: "pkcs1", format: "pem" }) as string],
  ["EC in PKCS#8", ec.export(pem) as string],
  ["EC in SEC1", ec.export({ type: "sec1", format: "pem" }) as string],
  [
    "EC in SEC1 behind its parameters, as openssl ecparam writes it",
    "-----BEGIN EC PARAMETERS-----\nBgUrgQQAIg==\n-----END EC PARAMETERS-----\n" +
    ec.export({ type: "sec1", format: "pem" }),
  ],
  ["nothing", "", "holds nothing in PEM, but no private key"],
  [
    "a public key",
    generateKeyPairSync("ed25519").publicKey.export({ type: "spki", format: "pem" }) as string,
    "holds a PUBLIC KEY, but no private key",
  ],
  [
    "Ed25519",
    generateKeyPairSync("ed25519").privateKey.export(pem) as string,
    "is a key of type ed25519; an account needs RSA, P-256, P-384 or P-521",
  ],
  [
    "secp256k1",
    generateKeyPairSync("ec", { namedCurve: "secp256k1" }).privateKey.export(pem) as string,
    "is a key of type secp256k1; an account needs RSA, P-256, P-384 or P-521",
  ],
  [
    "RSA of 1024 bits",
    generateKeyPairSync("rsa", { modulusLength: 1024 }).privateKey.export(pem) as string,
    "is an RSA key of 1024 bits; 2048 are the least",
  ],
  [
    "encrypted PKCS#8",
    "-----BEGIN ENCRYPTED PRIVATE KEY-----\nc2VjcmV0\n-----END ENCRYPTED PRIVATE KEY-----\n",
    "is encrypted [openssl pkey -in BASE/key -out FILE]",
  ],
  [
    "encrypted PKCS#1",
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: X\n\nc2VjcmV0\n-----END RSA PRIVATE KEY-----\n",
    "is encrypted [openssl pkey -in BASE/key -out FILE]",
  ],
  [
    "ten megabytes of dashes",
    `-----BEGIN PRIVATE KEY-----${"-a".repeat(5e6)}-----END PRIVATE KEY-----`,
    "holds a private key that cannot be decoded",
  ],
  [
    "damaged",
    "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n",
    "holds a private key that cannot be decoded",
  ],
];
for (const [behaviour, text, fault] of accountKeys) {
  Deno.test(`loadConfig() ${fault ? "refuses" : "takes"} an account key: ${behaviour}`, () => {
    Deno.writeTextFileSync(join(base, "key"), text, { mode: 0o600 });
    const files = { conf: "[config]\naccountKey: ../key\nchallengeDropDir: ../drop\n" };
    if (fault) same(faultsOf(files), [`2 Cannot read "accountKey": "BASE/key" ${fault}`]);
    else same(load(files).accountKey, join(base, "key"));
  });
}

Deno.test("loadConfig() takes an account key that is still to be made, and warns of one that others may read", () => {
  const conf = (path: string) => `[config]\naccountKey: ${path}\nchallengeDropDir: ../drop\n`;
  same(
    load({ conf: conf("new/account.key") }).accountKey.replace(/conf\d+/, "CONF"),
    join(base, "CONF/new/account.key"),
  );
  same(faultsOf({ conf: conf("../account.key/x") }), [
    '2 Cannot read "accountKey": "BASE/account.key/x" does not exist and cannot be made: "BASE/account.key": ' +
    "it is not a directory",
  ]);
  Deno.writeTextFileSync(join(base, "open.key"), accountKey);
  Deno.chmodSync(join(base, "open.key"), 0o644);
  same(tell(load({ conf: conf("../open.key") }).warnings), [
    '2 "accountKey": others may read "BASE/open.key", its mode is 0644 [chmod 600 BASE/open.key]',
  ]);
});

Deno.test("loadConfig() takes only the certificates of caBundle", () => {
  const made = new Deno.Command("openssl", {
    args: "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout -".split(" "),
    stderr: "null",
  }).outputSync();
  const text = new TextDecoder().decode(made.stdout);
  Deno.writeTextFileSync(join(base, "bundle.pem"), text);
  const { caBundle } = load({ settings: "caBundle: ../bundle.pem\n" });
  ok(text.includes("PRIVATE KEY") && text.includes(caBundle!));
  same(caBundle!.match(/BEGIN .*?-/g), ["BEGIN CERTIFICATE-"]);
  Deno.writeTextFileSync(join(base, "bundle.pem"), text.replace(/(BEGIN CERTIFICATE-----\n)..../, "$1AAAA"));
  same(faultsOf({ settings: "caBundle: ../bundle.pem\n" }), [
    '4 Cannot read "caBundle": certificate 1 in "BASE/bundle.pem" cannot be decoded',
  ]);
});

Deno.test("loadConfig() tells every fault of all three files at once, in the order of files and lines", () => {
  const directory = directoryOf({
    conf: "[config]\nparallel: 0\nnonsense: 1\n[other]\nx\n",
    domains: "ok.com\n\na_b.com -c.com\n# x\nok.com\n*.ok.com\n",
    actions:
      'x: 1\n[every]\ndomains: a.com\nupdate: x\n[a]\nverify: [\n  "a.com:443",\n  "a.com"]\ndomains: a.com\n',
  });
  const faults = refused(() => loadConfig("prod", directory));
  same(tell(faults, true).map((fault) => fault.replace(/ \[.*/, "")), [
    'lematt.conf:1 Cannot find "accountKey" in',
    'lematt.conf:1 Cannot find "challengeDropDir" in',
    'lematt.conf:2 Cannot read "parallel": "0" is not a whole number from 1 to 100',
    'lematt.conf:3 Cannot use key "nonsense": it is unknown',
    "lematt.conf:4 Cannot use section",
    'lematt.conf:5 Cannot read "x": neither a',
    'domains:3 Cannot use the name "a_b.com": "_" cannot stand in a name',
    'domains:3 Cannot use the name "-c.com": the label "-c" begins or ends with a dash',
    "domains:5 Cannot use the names of line 1 twice",
    'domains:6 Cannot prove "*.ok.com" by http-01: a wildcard needs dns-01 or dns-persist-01',
    'actions.conf:1 Cannot read "x: 1": it stands before any',
    'actions.conf:3 Cannot use "domains" in',
    'actions.conf:4 Cannot read list "update": not JSON, it does not begin with "["',
    'actions.conf:8 Cannot read "verify": "a.com": it has no port',
  ]);
  const { message, name } = new ConfigError(faults.slice(0, 1));
  same([name, message], ["ConfigError", 'lematt.conf:1: Cannot find "accountKey" in [config]']);
});

Deno.test("loadConfig() tells what is missing and how to begin", () => {
  same(
    tell(refused(() => loadConfig("prod", directoryOf({ conf: null, domains: null, actions: null }))), true),
    [
      'lematt.conf: Cannot read "BASE/CONF/lematt.conf": it does not exist ' +
      "[copy the conf/lematt.conf that comes with lematt, and adapt it]",
      'domains: Cannot read "BASE/CONF/domains": it does not exist [one line a certificate, such as: example.com www]',
      'actions.conf: Cannot read "BASE/CONF/actions.conf": it does not exist ' +
      "[an empty file will do to begin with: touch BASE/CONF/actions.conf]",
    ],
  );
  same(faultsOf({ conf: "# nothing\n" }), [
    " Cannot find section [config] [put [config] in a line above the keys]",
  ]);
});

Deno.test("loadConfig() refuses what is no text file, without waiting for it", () => {
  const directory = directoryOf({ domains: null, actions: null });
  Deno.mkdirSync(join(directory, "domains"));
  new Deno.Command("mkfifo", { args: [join(directory, "actions.conf")] }).outputSync();
  same(tell(refused(() => loadConfig("prod", directory)), true), [
    'domains: Cannot read "BASE/CONF/domains": it is not a file',
    'actions.conf: Cannot read "BASE/CONF/actions.conf": it is not a file',
  ]);
  Deno.removeSync(join(directory, "domains"));
  Deno.writeFileSync(join(directory, "domains"), Uint8Array.of(0x61, 0x2e, 0x62, 0x0a, 0x23, 0xe4));
  same(tell(refused(() => loadConfig("prod", directory)), true)[0], "domains:2 Cannot read it: not UTF-8");
});

Deno.test("loadConfig() reads files with a byte order mark and CRLF", () => {
  const crlf = (text: string) => "\ufeff" + text.replaceAll("\n", "\r\n");
  const { lines, sections } = load({
    conf: crlf("[config]\naccountKey: ../account.key\nchallengeDropDir: ../drop\n"),
    domains: crlf("a.com www\nb.com\n"),
    actions: crlf('[default]\nupdate: ["true"]\n'),
  });
  same(lines.map(({ names }) => names), [["a.com", "www.a.com"], ["b.com"]]);
  same(sections[0]!.update, ["true"]);
});

Deno.test("loadConfig() takes lematt.conf, its directory or a link to it; else ./conf, else the one beside", () => {
  const directory = directoryOf({});
  const here = Deno.cwd();
  const home = join(base, "home");
  Deno.mkdirSync(home);
  Deno.symlinkSync(directory, join(base, "link"));
  Deno.symlinkSync(join(directory, "lematt.conf"), join(home, "linked.conf"));
  try {
    Deno.chdir(home);
    for (
      const path of [
        directory,
        join(directory, "lematt.conf"),
        "../link",
        "../link/lematt.conf",
        "linked.conf",
      ]
    ) {
      const config = loadConfig("prod", path, "/nowhere");
      same([config.directory, config.file], [directory, join(directory, "lematt.conf")]);
    }
    same(tell(refused(() => loadConfig("prod", undefined, "/nowhere")), true), [
      'lematt.conf: Cannot find it in "conf": it does not exist, or in "/nowhere": it does not exist ' +
      "[name lematt.conf, or its directory, with --config]",
    ]);
    same(tell(refused(() => loadConfig("prod", "missing.conf", directory)), true), [
      'lematt.conf: Cannot find it in "missing.conf": it does not exist [name lematt.conf, or its directory, with --config]',
    ]);
    same(loadConfig("prod", undefined, directory).directory, directory);
    Deno.mkdirSync("conf");
    same(loadConfig("prod", undefined, directory).directory, directory);
    for (const { name } of Deno.readDirSync(directory)) {
      Deno.copyFileSync(join(directory, name), join("conf", name));
    }
    Deno.copyFileSync(join(base, "account.key"), "account.key");
    Deno.mkdirSync("drop");
    same(loadConfig("prod", undefined, directory).directory, join(home, "conf"));
  } finally {
    Deno.chdir(here);
  }
});

Deno.test("the samples in conf/ lack only names and the drop directory, and their examples are right", () => {
  const read = (name: string) => Deno.readTextFileSync(new URL(`../conf/${name}`, import.meta.url));
  const directory = join(base, "samples");
  Deno.mkdirSync(directory);
  const write = (name: string, text: string) => Deno.writeTextFileSync(join(directory, name), text);
  for (const name of ["lematt.conf", "domains", "actions.conf"]) write(name, read(name));
  const faults = refused(() => loadConfig("prod", directory)).map((
    { file, text },
  ) => [file, text.replace(/:.*/, "")]);
  same(faults.at(-1), ["domains", "Cannot find a name in it"]);
  ok(
    faults.length === 1 || faults.length === 2 && faults[0]![1] === 'Cannot read "challengeDropDir"',
    `${faults}`,
  );

  // All examples at once, but for files that only their owner has.
  const settings = read("lematt.conf").replace(/^# (?=[a-zA-Z]+: \S+( \S+ \S+)?$)/gm, "")
    .replace(/^(caBundle|eabKeyId|eabHmacKey):/gm, "# $1:");
  write("lematt.conf", settings.replaceAll("/srv/web/challenges/", join(base, "drop")));
  write("domains", read("domains").replace(/^# (?=([a-z0-9.]+\.(com|org|10)\b.*)$)/gm, ""));
  write("actions.conf", read("actions.conf").replace(/^# (?=\[|\w+: )/gm, ""));
  const config = loadConfig("prod", directory);
  same(config.lines.map(({ names }) => names[0]), [
    ..."example.com mail.example.com git.example.com example.org 192.0.2.10".split(" "),
  ]);
  same(config.sections.map(({ name }) => name), ["default", "every", "mail", "intranet", "persistent"]);
  same(
    config.sections[3]!.dnsPresent,
    [`printf 'update add %s 60 TXT "%s"\\nsend\\n' RECORD VALUE | nsupdate -k /etc/lematt/tsig.key`],
  );
  same([config.preferredChain, config.dnsWaitSeconds, config.profile], ["ISRG Root X1", 120, "tlsserver"]);
});

Deno.test("loadConfig() reads 50,000 lines and 2,000 sections without quadratic work", () => {
  const some = (length: number, text: (index: number) => string) =>
    Array.from({ length }, (_, i) => text(i)).join("");
  const directory = directoryOf({
    domains: some(50_000, (i) => `host${i}.example.com${i % 2 ? " www mail" : ""}\n`),
    actions: "[default]\n[every]\n" +
      some(
        2000,
        (i) => `[s${i}]\ndomains: ${some(20, (j) => `\n  host${20 * i + j}.example.com`)}\nupdate: ["x"]\n`,
      ),
  });
  const start = performance.now();
  const config = loadConfig("prod", directory);
  const seconds = (performance.now() - start) / 1000;
  same([config.lines.length, config.sections.length], [50_000, 2002]);
  same(config.lines[39_999]!.sections.map(({ name }) => name), ["s1999", "default", "every"]);
  ok(seconds < 5, `${seconds} s`); // some 0.4 s here; quadratic work takes minutes
});

Deno.test("loadConfig() answers any text with a Config or a ConfigError", () => {
  const seed = Number(Deno.env.get("LEMATT_SEED") ?? Date.now() % 2 ** 31);
  let state = seed;
  const random = (below: number) => { // a linear congruence is random enough to choose where to hit
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor(state / 2 ** 32 * below);
  };
  const directory = directoryOf({});
  const texts = {
    "lematt.conf": Deno.readTextFileSync(join(directory, "lematt.conf")) +
      "reauthorizeDays: 15\ncurve: P-256\nrsaTag: r%(curve)s\ncontact: a@b.c\ndirectory: https://x.y/z\nprofile: classic\n",
    "domains": "example.com www *\n\u00e4.example.org 192.0.2.1 2001:db8::1\n# x\n",
    "actions.conf":
      '[default]\nupdate: ["a %%",\n  "b"]\n[x]\ndomains: example.com www.example.com *.example.com\n' +
      'challenge: dns-01\ndnsPresent: ["x RECORD"]\nverify: ["[::1]:443/smtp#a.b", "a.b:25"]\n',
  };
  const pieces = [
    ...'[]":,=%#;\\*./\n\r\t\0 \x1b\u00e4\u202e\ud800',
    "\n ",
    "%(x)s",
    "xn--",
    "::",
    "[DEFAULT]\n",
    "__proto__: 1\n",
    "9".repeat(400),
  ];
  for (let round = 0; round < 2000; round++) {
    for (const [name, text] of Object.entries(texts)) {
      let changed = text;
      for (let times = random(4); times > 0; times--) {
        const at = random(changed.length);
        changed = changed.slice(0, at) + pieces[random(pieces.length)] + changed.slice(at + random(3));
      }
      Deno.writeTextFileSync(join(directory, name), changed);
    }
    try {
      loadConfig("prod", directory);
    } catch (error) {
      ok(error instanceof ConfigError, `seed ${seed}, round ${round}: ${error}`);
      for (const { text, hint = "" } of error.problems) {
        ok(
          !/[\p{C}]/u.test(text + hint),
          `seed ${seed}, round ${round}: ${JSON.stringify(text)}`,
        );
      }
    }
  }
});

Deno.test("isIP() tells addresses from all else as node:net does, but for zones", () => {
  const parts = [
    "0",
    "1",
    "09",
    "255",
    "256",
    "ffff",
    "g",
    "00000",
    "",
    "1.2.3.4",
    "::",
    ":",
    ".",
    "%1",
    " ",
  ];
  const texts = ["1.2.3.4.5", "01.2.3.4", "1.2.3.256", "::1.2.3.04", "1:2:3:4:5:6:7:8", "1:2:3:4:5:6:7:8:9"];
  for (const a of parts) {
    for (const b of parts) {
      for (const c of parts) texts.push(`${a}:${b}:${c}`, `${a}.${b}.${c}`, `::${a}${b}${c}`);
    }
  }
  for (const text of texts) same(isIP(text), text.includes("%") ? 0 : nodeIsIP(text), JSON.stringify(text));
});
