/**
 * Goal: after migration from another program by the commands of conf/migrate/README.md, certificates, keys and account are
 * the same, and services read the files that they read before. With the real programs, as far as they are installed.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { settled } from "../lib/context.ts";
import { readCertificate } from "../lib/x509.ts";
import { testBed } from "./bed.ts";
import { which } from "./bench-measure.ts";
import { adapt, blocks, ROOT, shell } from "./documents.ts";
import { makeCertificate } from "./tls.ts";
import { type Pebble, pebbleTest, startPebble } from "./pebble.ts";

const README = "conf/migrate/README.md";

/** Another program with certificates for example.com and www.example.com (EC key) and for mail.example.com (RSA key). */
interface Way {
  readonly program: string;
  /**
   * Issues both certificates with everything below `home`, whose `web` is served, and returns the URL of the account. RELOAD
   * is to be run after a renewal, if the program remembers such commands.
   */
  readonly issue: (home: string, pebble: Pebble) => Promise<string>;
  /** Where services find the EC certificate, its key, and the RSA certificate, below the directory. */
  readonly places: readonly [string, string, string];
  readonly reloads: boolean;
}

const names = ["example.com", "www.example.com"].map((name) => `-d ${name}`).join(" ");

const certbot: Way = {
  program: "certbot",
  places: ["live/example.com/fullchain.pem", "live/example.com/privkey.pem", "live/mail/fullchain.pem"],
  reloads: true,
  async issue(home, { directoryUrl, caBundleFile }) {
    const common = "certbot certonly -n --agree-tos -m root@example.com --no-eff-email --webroot -w web " +
      `--server ${directoryUrl} --config-dir old --work-dir work --logs-dir log`;
    await shell(
      `${common} ${names} --key-type ecdsa --deploy-hook 'echo reloaded >> ${home}/reloads'
      ${common} -d mail.example.com --cert-name mail --key-type rsa
      rm ${home}/reloads`,
      home,
      { REQUESTS_CA_BUNDLE: caBundleFile },
    );
    // a copy works as well, if the original cannot be read
    const copy = adapt(blocks(README, "From hosts")[0]!, {
      "web:/etc/letsencrypt": "old",
      "/root/web-letsencrypt": "copy",
    });
    const domains = await shell(
      `${copy}mv old away; ${ROOT}/conf/migrate/migrate.ts certbot copy --domains; mv away old`,
      home,
    );
    assert.equal(domains, "example.com www.example.com\nmail.example.com\n");
    return JSON.parse(await shell("cat old/accounts/*/*/*/regr.json", home)).uri;
  },
};

const dehydrated: Way = {
  program: "dehydrated",
  places: ["certs/example.com/fullchain.pem", "certs/example.com/privkey.pem", "certs/mail/fullchain.pem"],
  reloads: false,
  async issue(home, { directoryUrl, caBundleFile }) {
    const config = [
      `CA=${directoryUrl}`,
      `BASEDIR=${home}/old`,
      `WELLKNOWN=${home}/drop`,
      "KEY_ALGO=prime256v1",
    ];
    await Deno.writeTextFile(
      join(home, "config"),
      config.concat(`CURL_OPTS="--cacert ${caBundleFile}"\n`).join("\n"),
    );
    await shell(
      `mkdir old
      dehydrated -f config --register --accept-terms
      dehydrated -f config -c -d "example.com www.example.com"
      dehydrated -f config -c -d mail.example.com --alias mail --algo rsa`,
      home,
    );
    return JSON.parse(await shell("cat old/accounts/*/account_id.json", home)).url;
  },
};

const lego: Way = {
  program: "lego",
  places: [
    "certificates/example.com.crt",
    "certificates/example.com.key",
    "certificates/mail.example.com.crt",
  ],
  reloads: false,
  async issue(home, { directoryUrl, caBundleFile }) {
    const common = `lego -s ${directoryUrl} -a -m root@example.com --path old --http --http.webroot web`;
    const env = { LEGO_CA_CERTIFICATES: caBundleFile };
    await shell(`${common} ${names} -k ec256 run\n${common} -d mail.example.com -k rsa2048 run`, home, env);
    return JSON.parse(await shell("cat old/accounts/*/*/account.json", home)).registration.uri;
  },
};

/** acme.sh's files as its documentation and its source have them, made of lego's. */
const acmeSh: Way = {
  program: "acme.sh",
  places: ["../ssl/cert.pem", "../ssl/key.pem", "../ssl/mail.pem"],
  reloads: true,
  async issue(home, pebble) {
    const account = await lego.issue(home, pebble);
    const conf = (lines: Record<string, string>) =>
      Object.entries({ Webroot: `${home}/web`, API: pebble.directoryUrl, ...lines })
        .map(([key, value]) => `Le_${key}='${value}'\n`).join("");
    const reload = `__ACME_BASE64__START_${btoa(`echo reloaded >> ${home}/reloads`)}__ACME_BASE64__END_`;
    const [key, cert, mail] = ["key", "cert", "mail"].map((name) => `${home}/ssl/${name}.pem`);
    await shell(
      `mkdir ssl; mv old lego; cd lego/certificates
      for name in example.com mail.example.com; do
        to=../../old/$name; [ $name = mail.example.com ] || to=\${to}_ecc
        mkdir -p $to
        cp $name.crt $to/fullchain.cer
        cp $name.key $to
      done
      cp example.com.crt ${cert}; cp example.com.key ${key}; cp mail.example.com.crt ${mail}
      cd ../../old
      mkdir -p ca/127.0.0.1/dir
      cp ../lego/accounts/*/*/keys/*.key ca/127.0.0.1/dir/account.key
      touch http.header
      printf %s "$EC" > example.com_ecc/example.com.conf
      printf %s "$RSA" > mail.example.com/mail.example.com.conf`,
      home,
      {
        EC: conf({
          ...{ Domain: "example.com", Alt: "www.example.com", ReloadCmd: reload },
          ...{ RealKeyPath: key!, RealFullChainPath: cert! },
        }),
        RSA: conf({ Domain: "mail.example.com", Alt: "no", RealFullChainPath: mail! }),
      },
    );
    return account;
  },
};

/** Commands of README below a heading, for one program and this bed. */
function commands(heading: string, home: string, words: Record<string, string> = {}): string {
  const text = adapt(blocks(README, heading).join(""), { ...words, "/etc/lematt": "conf" });
  return text.replaceAll("cd /opt/lematt\n", "").replaceAll("editor", ": editor")
    .replaceAll("/opt/lematt/", `${ROOT}/`).replaceAll("conf/migrate/", `${ROOT}/conf/migrate/`)
    .replace(/^/, `cd ${home}\nlematt() { ${ROOT}/lematt.ts --config conf "$@"; }\n`);
}

/** Issues with the other program, migrates, and renews. */
async function migrateAndRenew({ program, places, issue, reloads }: Way): Promise<void> {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({}));
  // dehydrated 0.7.0 gives up on a nonce that is refused
  const env = { PEBBLE_WFE_NONCEREJECT: "0" };
  const pebble = stack.use(await startPebble({ httpPort: bed.web.port, env }));
  for (const name of ["example.com", "www.example.com", "mail.example.com"]) {
    pebble.dns.set(name, "A", "127.0.0.1");
  }
  const { home } = bed;
  await shell("mkdir -p web/.well-known && ln -s ../../drop web/.well-known/acme-challenge", home);
  const account = await issue(home, pebble);
  const [chain, key, mail] = places.map((place) => join(home, "old", place)) as [string, string, string];
  const before = [chain, key, mail].map((path) => Deno.readTextFileSync(path));

  bed.configure({ settings: `directory: ${pebble.directoryUrl}\ncaBundle: ${pebble.caBundleFile}` });
  const printed = await shell(
    commands("Moving in", home, { certbot: program, "/etc/letsencrypt": `${home}/old` }),
    home,
  );
  assert.match(printed, /^copied: account key to /m);
  assert.match(printed, /^copied: example\.com www\.example\.com \(ec\)$/m);
  assert.match(printed, /^copied: mail\.example\.com \(rsa\)$/m);
  assert.match(printed, /^ {2}directory: .*127\.0\.0\.1/m);

  const idle = await bed.lematt("--prod");
  assert.deepEqual([idle.code, idle.stderr], [0, ""]);
  assert.match(idle.stdout, /^nothing due, 2 kept/m);
  assert.deepEqual([chain, key, mail].map((path) => Deno.readTextFileSync(path)), before);

  const renewed = await bed.lematt("--prod", "--renew", "example.com", "--renew", "mail.example.com");
  assert.deepEqual([renewed.code, renewed.stderr], [0, ""]);
  const after = [chain, key, mail].map((path) => Deno.readTextFileSync(path));
  assert.deepEqual(before.map((text, index) => text === after[index]), [false, true, false]);
  assert.deepEqual(readCertificate(after[2]!).names, ["mail.example.com"]);
  if (reloads) assert.equal(await shell("cat reloads", home), "reloaded\n");
  assert.equal(
    Object.values<{ url: string }>(JSON.parse(bed.text("prod", "state.json")).accounts)[0]!.url,
    account,
  );
}

const ways = [certbot, dehydrated, lego, acmeSh].filter((way) => {
  const needed = way === acmeSh ? "lego" : way.program;
  if (which(needed) !== undefined) return true;
  console.log(`migration from ${way.program} is not tested: ${needed} is not installed`);
  return false;
});

pebbleTest("migration from another program issues nothing again, and keeps the account", async () => {
  await settled(ways.map(async (way) => {
    await migrateAndRenew(way).catch((cause) => {
      throw new Error(way.program, { cause });
    });
  }));
});

Deno.test("migrate.ts reports that a wildcard needs dns-01, and leaves a name of two certificates out of `domains`", async () => {
  await using bed = await testBed({});
  const { home } = bed;
  const directory = join(home, "lego/certificates");
  await Deno.mkdir(directory, { recursive: true });
  const files = {
    "_.example.com": ["*.example.com", "example.com"],
    "example.com": ["example.com", "www.example.com"],
  };
  for (const [file, names] of Object.entries(files)) {
    await makeCertificate(directory, file, "ec", names);
    await Deno.rename(join(directory, `${file}.pem`), join(directory, `${file}.crt`));
  }
  const migrate = (...args: string[]) =>
    shell(`${ROOT}/conf/migrate/migrate.ts lego lego ${args.join(" ")}`, home);
  assert.match(await migrate(), /^- \*\.example\.com needs challenge: dns-01 /m);
  assert.equal(await migrate("--domains"), "*.example.com example.com\nexample.com www.example.com\n");
  const actions = await migrate("--actions");
  assert.deepEqual(actions.match(/^domains: .*|(?<="cp KEY_FILE .*\/)[^/"]*(?=")/gm), [
    "domains: *.example.com",
    "_.example.com.key",
    "domains: www.example.com",
    "DOMAIN.key",
  ]);
});

Deno.test("migration from the Python original issues and delivers nothing again", async () => {
  const domains = "example.com www.example.com";
  const actions = `[default]\nuploadCerts: ["echo delivered >> delivered"]\n`;
  await using bed = await testBed({ domains, actions, settings: "keyTypes: ec\nari: no" });
  await bed.plant({ mode: "prod" });
  const { home } = bed;
  await shell("mkdir python && mv conf python && mkdir conf && rm python/conf/prod/.lock", home);
  const printed = await shell(commands("Python", home, { "/opt/lematt-python": "python" }), home);
  assert.match(printed, /^1 certificate noted as delivered/m);
  assert.equal((await bed.lematt("--prod")).stdout.match(/^nothing due, 1 kept/m)?.length, 1);
  assert.equal(await shell("ls", home), "conf\ndrop\npython\n");
});
