/** Goal: by the commands of conf/migrate, certificates, keys, account and the files of services stay the same. */

import assert from "node:assert/strict";
import { join } from "node:path";
import { readCertificate } from "../lib/x509.ts";
import { testBed, together } from "./bed.ts";
import { startPebble } from "./pebble.ts";
import { adapt, blocks, lackOf, ROOT, shell, temporaryDirectory } from "./programs.ts";
import { makeCertificate } from "./tls.ts";

const README = "conf/migrate/README.md";
const MIGRATE = `${ROOT}/conf/migrate/migrate.ts`;

/**
 * Programs, and how each issues certificates for example.com and www.example.com (EC key) and for mail.example.com (RSA key),
 * by the CA at $URL with the root $CA, with $RELOAD after a renewal if it can. Below `old` it has a file with the URL of
 * the account, and services find the EC certificate, its key, and the RSA certificate there.
 */
const WAYS = {
  certbot: {
    script: `
certbot() {
  REQUESTS_CA_BUNDLE=$CA command certbot certonly -n --agree-tos -m root@example.com --no-eff-email --webroot -w web \\
    --server $URL --config-dir old --work-dir work --logs-dir log "$@"
}
certbot -d example.com -d www.example.com --key-type ecdsa --deploy-hook "$RELOAD"
certbot -d mail.example.com --cert-name mail --key-type rsa
rm reloads`,
    account: "accounts/*/*/*/regr.json",
    places: "live/example.com/fullchain.pem live/example.com/privkey.pem live/mail/fullchain.pem",
  },
  dehydrated: {
    script: `
mkdir old
echo "CA=$URL BASEDIR=$PWD/old WELLKNOWN=$PWD/drop KEY_ALGO=prime256v1 CURL_OPTS='--cacert $CA'" > config
dehydrated -f config --register --accept-terms
dehydrated -f config -c -d "example.com www.example.com"
dehydrated -f config -c -d mail.example.com --alias mail --algo rsa`,
    account: "accounts/*/account_id.json",
    places: "certs/example.com/fullchain.pem certs/example.com/privkey.pem certs/mail/fullchain.pem",
  },
  lego: {
    script: `
lego() { LEGO_CA_CERTIFICATES=$CA command lego -s $URL -a -m root@example.com --path old --http --http.webroot web "$@" run; }
lego -d example.com -d www.example.com -k ec256
lego -d mail.example.com -k rsa2048`,
    account: "accounts/*/*/account.json",
    places: "certificates/example.com.crt certificates/example.com.key certificates/mail.example.com.crt",
  },
};

/** Runs the commands of README below a heading, with other words, in a directory with the configuration in `conf`. */
async function follow(heading: string, home: string, words: Record<string, string>): Promise<string> {
  const text = adapt(blocks(README, heading).join(""), { ...words, "/etc/lematt": "conf" })
    .replaceAll("cd /opt/lematt\n", "").replaceAll("editor", ": editor")
    .replaceAll("/opt/lematt/", `${ROOT}/`).replaceAll("conf/migrate/migrate.ts", MIGRATE);
  return await shell(`lematt() { ${ROOT}/lematt.ts --config conf "$@"; }\n${text}`, home);
}

type Way = typeof WAYS[keyof typeof WAYS];

async function migrateAndRenew(program: string, { script, account, places }: Way): Promise<void> {
  await using bed = await testBed({});
  // dehydrated 0.7.0 gives up on a nonce that is refused
  await using pebble = await startPebble({ httpPort: bed.web.port, env: { PEBBLE_WFE_NONCEREJECT: "0" } });
  for (const name of ["", "www.", "mail."]) pebble.dns.set(`${name}example.com`, "A", "127.0.0.1");
  const { home } = bed;
  await shell("mkdir -p web/.well-known && ln -s ../../drop web/.well-known/acme-challenge", home);
  const { directoryUrl: URL, caBundleFile: CA } = pebble;
  await shell(script, home, { URL, CA, RELOAD: `echo reloaded >> ${home}/reloads` });
  const [, accountUrl] = /"ur[il]": *"([^"]*)"/.exec(await shell(`cat old/${account}`, home))!;
  const read = () => places.split(" ").map((place) => Deno.readTextFileSync(join(home, "old", place)));
  const before = read();

  bed.configure({ settings: `directory: ${URL}\ncaBundle: ${CA}` });
  const words = { certbot: program, "/etc/letsencrypt": `${home}/old` };
  const printed = await follow("Moving in", home, words);
  const copied = ["account key to .*", "example.com www.example.com \\(ec\\)", "mail.example.com \\(rsa\\)"];
  assert.match(printed, new RegExp(copied.map((what) => `^copied: ${what}\n`).join(""), "m"));
  assert.match(printed, /^ {2}directory: .*127\.0\.0\.1/m);

  const idle = await bed.lematt("--prod");
  assert.deepEqual([idle.code, idle.stderr], [0, ""]);
  assert.match(idle.stdout, /^nothing due, 2 kept/m);
  assert.deepEqual(read(), before);

  const renewed = await bed.lematt("--prod", "--renew", "example.com", "--renew", "mail.example.com");
  assert.deepEqual([renewed.code, renewed.stderr], [0, ""]);
  const after = read();
  assert.deepEqual(before.map((text, index) => text === after[index]), [false, true, false]);
  assert.deepEqual(readCertificate(after[2]!).names, ["mail.example.com"]);
  assert.deepEqual(bed.take("reloads"), program === "certbot" ? ["reloaded"] : []);
  const [known] = Object.values<{ url: string }>(JSON.parse(bed.text("prod", "state.json")).accounts);
  assert.equal(known!.url, accountUrl);

  if (program !== "certbot") return;
  // a copy from another host works as well
  const remote = { "web:/etc/letsencrypt": "old", "/root/web-letsencrypt": "copy" };
  const copy = adapt(blocks(README, "From hosts")[0]!, remote);
  const domains = await shell(`${copy}mv old away\n${MIGRATE} certbot copy --domains`, home);
  assert.equal(domains, "example.com www.example.com\nmail.example.com\n");
}

const test = together("migration from another program issues nothing again, and keeps the account");
for (const [program, way] of Object.entries(WAYS)) {
  test(`migration from ${program}`, () => migrateAndRenew(program, way), lackOf(program, "pebble"));
}

Deno.test("migration from acme.sh keeps places and reloads, a wildcard needs dns-01, and a name of two certificates is in no section", async () => {
  await using temporary = await temporaryDirectory();
  const home = temporary.path;
  const reload = `__ACME_BASE64__START_${btoa("service nginx reload")}__ACME_BASE64__END_`;
  const installed =
    `Le_ReloadCmd='${reload}'\nLe_RealKeyPath='/ssl/key.pem'\nLe_RealFullChainPath='/ssl/cert.pem'`;
  const certificates = [
    ["*.example.com", "rsa", "Le_Webroot='dns_cf'\nLe_RealFullChainPath='/ssl/*.example.com.pem'"],
    ["www.example.com_ecc", "ec", `Le_Webroot='/srv/web'\n${installed}`],
  ] as const;
  for (const [name, keyType, conf] of certificates) {
    const [directory, primary] = [join(home, name), name.replace("_ecc", "")];
    await Deno.mkdir(directory);
    await makeCertificate(directory, primary, keyType, [primary, "example.com"]);
    await Deno.rename(join(directory, `${primary}.pem`), join(directory, "fullchain.cer"));
    const text = `Le_API='https://ca.example/dir'\n${conf}\n`;
    await Deno.writeTextFile(join(directory, `${primary}.conf`), text);
  }
  const migrate = (option = "") => shell(`${MIGRATE} acme.sh . ${option}`, home);
  const overview = await migrate();
  assert.match(overview, /^account at https:\/\/ca\.example\/dir: .*\/ca\/ca\.example\/dir\/account\.key$/m);
  assert.match(overview, /^- \*\.example\.com needs challenge: dns-01 /m);
  assert.equal(await migrate("--domains"), "*.example.com example.com\nwww.example.com example.com\n");
  assert.equal(
    await migrate("--actions"),
    `[acme.sh-rsa]
domains: *.example.com
keyTypes: rsa
uploadEach: ["cp CERT_FILE '/ssl/*.example.com.pem'"]

[acme.sh-ec]
domains: www.example.com
keyTypes: ec
uploadEach: ["cp CERT_FILE /ssl/cert.pem",
  "cp KEY_FILE /ssl/key.pem"]
update: ["service nginx reload"]
`,
  );
});

Deno.test("migration from the Python original issues and delivers nothing again", async () => {
  const actions = `[default]\nuploadCerts: ["echo delivered >> HERE/log"]\n`;
  const settings = "keyTypes: ec\nari: no";
  await using bed = await testBed({ domains: "example.com www.example.com", actions, settings });
  await bed.plant({ mode: "prod" });
  await shell("mkdir python && mv conf python && mkdir conf && rm python/conf/prod/.lock", bed.home);
  const printed = await follow("Python", bed.home, { "/opt/lematt-python": "python" });
  assert.match(printed, /^1 certificate noted as delivered/m);
  assert.match((await bed.lematt("--prod")).stdout, /^nothing due, 1 kept/m);
  assert.deepEqual(bed.take(), []);
});
