#!/usr/bin/env -S DENO_NO_UPDATE_CHECK=1 deno run -q --no-prompt --allow-read --allow-write --allow-env --allow-sys=uid,gid
/**
 * migrate.ts: copies certificates, keys and the account key from certbot, acme.sh, dehydrated or lego, so that nothing is
 * issued again. It changes nothing of the other program. README.md shows how to use it.
 */

import { createPrivateKey } from "node:crypto";
import { basename, dirname, join, relative } from "node:path";
import { parseArgs } from "node:util";
import { ConfigError, type KeyType, loadConfig } from "../../lib/config.ts";
import { readIfPresent } from "../../lib/files.ts";
import { type Entry, readInventory, Store } from "../../lib/store.ts";
import { type Certificate, coversExactly, createCsr, isKeyOf, readCertificate } from "../../lib/x509.ts";

const USAGE = `usage, PROGRAM being certbot, acme.sh, dehydrated or lego:

  migrate.ts PROGRAM DIRECTORY               list certificates, and what to write into lematt.conf
  migrate.ts PROGRAM DIRECTORY --domains     print lines for domains
  migrate.ts PROGRAM DIRECTORY --actions     print sections for actions.conf, which write into the existing files
  migrate.ts PROGRAM DIRECTORY --into CONF   copy certificates, keys and the account key into CONF

  --ca TEXT    only certificates of CAs whose directory URL contains TEXT
`;

const LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory";

/** A certificate of the other program. */
interface Found {
  readonly certificate: Certificate;
  /** Primary first. */
  readonly names: readonly string[];
  readonly keyType: KeyType;
  readonly chainPem: string;
  readonly keyPem: string;
  /** Directory URL of its CA, if known. */
  readonly ca?: string;
  /** The root directory of its web server, if known. */
  readonly webroot?: string;
  /** How its names are validated, in the words of the other program. */
  readonly validation?: string;
  readonly places: Places;
  /** The command that reloads services. */
  readonly reload?: string;
}

/** Paths of the files that services read. */
interface Places {
  readonly chain?: string;
  /** The certificate only. */
  readonly leaf?: string;
  /** The chain without the certificate. */
  readonly issuers?: string;
  readonly key?: string;
}

interface Account {
  /** Directory URL of its CA; with lego host and port, as `host_port`. */
  readonly ca: string;
  readonly file: string;
}

interface Source {
  readonly found: readonly Found[];
  readonly accounts: readonly Account[];
  /** The directory of challenge files, if known. */
  readonly dropDir?: string;
  /** What the user has to do. */
  readonly left: readonly string[];
}

// ---- the programs -----------------------------------------------------------------------------------------------

/** `renewal/NAME.conf` has paths, account and hooks of a certificate; accounts are below host and path of the CA. */
function certbot(home: string): Source {
  const accounts: Account[] = [];
  const found = list(join(home, "renewal"), ".conf").flatMap((file) => {
    const conf = assignments(Deno.readTextFileSync(file));
    const { server = LETS_ENCRYPT, account, authenticator, webroot_path, installer, renew_hook } = conf;
    const { host, pathname } = new URL(server);
    const key = join(home, "accounts", host, pathname, account ?? "", "private_key.json");
    if (account !== undefined && !accounts.some(({ file }) => file === key)) {
      accounts.push({ ca: server, file: key });
    }
    const places = { chain: conf.fullchain, leaf: conf.cert, issuers: conf.chain, key: conf.privkey };
    // the directory may be a copy
    const root = dirname(dirname(conf.archive_dir!));
    const [chain, privkey] = [conf.fullchain!, conf.privkey!].map((path) => join(home, relative(root, path)));
    return read(chain!, privkey!, basename(file, ".conf"), {
      ca: server,
      webroot: webroot_path?.split(",")[0],
      validation: authenticator,
      places,
      reload: renew_hook ?? (installer && installer !== "None" ? `service ${installer} reload` : undefined),
    });
  });
  const hooks = ["pre", "deploy", "post"].flatMap((kind) => list(join(home, "renewal-hooks", kind)));
  return {
    found,
    accounts,
    left: [
      ...hooks.map((hook) => `${hook} is run by certbot; write what you still need into update:`),
      "switch certbot off: systemctl disable --now certbot.timer; its line in /etc/cron.d/certbot, if there is one",
    ],
  };
}

/** `NAME/NAME.conf`, `NAME_ecc/NAME.conf`; `ca/HOST/PATH/account.key`. */
function acmeSh(home: string): Source {
  const accounts: Account[] = [];
  const found = list(home).filter(isDirectory).flatMap((directory) => {
    const name = basename(directory).replace(/_ecc$/, "");
    const text = readIfPresent(join(directory, `${name}.conf`));
    if (text === undefined) return [];
    const conf = assignments(text);
    const { Le_API: ca, Le_Webroot: way = "no" } = conf;
    if (ca !== undefined && !accounts.some((account) => account.ca === ca)) {
      const { hostname, pathname } = new URL(ca);
      accounts.push({ ca, file: join(home, "ca", hostname, pathname, "account.key") });
    }
    return read(join(directory, "fullchain.cer"), join(directory, `${name}.key`), name, {
      ca,
      webroot: way.startsWith("/") ? way.split(",")[0] : undefined,
      validation: way === "no" ? "standalone" : way,
      places: {
        chain: conf.Le_RealFullChainPath,
        leaf: conf.Le_RealCertPath,
        issuers: conf.Le_RealCACertPath,
        key: conf.Le_RealKeyPath,
      },
      reload: conf.Le_ReloadCmd,
    });
  });
  return { found, accounts, left: ["switch acme.sh off: acme.sh --uninstall-cronjob"] };
}

/** `certs/NAME/` with links to the newest files; `accounts/` has the CA's URL in base64. */
function dehydrated(home: string): Source {
  const accounts = list(join(home, "accounts")).map((directory) => ({
    ca: atob(basename(directory).replaceAll("-", "+").replaceAll("_", "/")).trim(),
    file: join(directory, "account_key.pem"),
  }));
  const found = list(join(home, "certs")).flatMap((directory) => {
    const path = (name: string) => join(directory, `${name}.pem`);
    const places = {
      chain: path("fullchain"),
      leaf: path("cert"),
      issuers: path("chain"),
      key: path("privkey"),
    };
    const ca = accounts.length === 1 ? accounts[0]!.ca : undefined;
    return read(places.chain, places.key, basename(directory), { ca, places });
  });
  const dropDir = join(home, "acme-challenges");
  return {
    found,
    accounts,
    dropDir: isDirectory(dropDir) ? dropDir : undefined,
    left: [
      "write what deploy_cert of dehydrated's HOOK does into update:",
      "switch dehydrated off: its line in cron, or its timer",
    ],
  };
}

/** `certificates/NAME.crt`; `accounts/HOST_PORT/MAIL/keys/MAIL.key`. */
function lego(home: string): Source {
  const accounts = list(join(home, "accounts")).flatMap((host) =>
    list(host).flatMap((mail) =>
      list(join(mail, "keys"), ".key").map((file) => ({ ca: basename(host), file }))
    )
  );
  const found = list(join(home, "certificates"), ".crt").filter((file) => !file.endsWith(".issuer.crt"))
    .flatMap(
      (chain) => {
        const key = chain.replace(/crt$/, "key");
        const issuers = chain.replace(/crt$/, "issuer.crt");
        const name = basename(chain, ".crt").replace(/^_(?=\.)/, "*");
        const ca = accounts.length === 1 ? accounts[0]!.ca : undefined;
        return read(chain, key, name, { ca, places: { chain, issuers, key } });
      },
    );
  return {
    found,
    accounts,
    left: [
      "write what lego's --renew-hook does into update:",
      "switch lego off: your line in cron, or your timer",
    ],
  };
}

const PROGRAMS: Record<string, (home: string) => Source> = { certbot, "acme.sh": acmeSh, dehydrated, lego };

// ---- reading ----------------------------------------------------------------------------------------------------

/** The certificate in these files, if both exist. Its primary name is `name`, if the certificate has it. */
function read(
  chainFile: string,
  keyFile: string,
  name: string,
  more: Pick<Found, "ca" | "webroot" | "validation" | "places" | "reload">,
): Found[] {
  const [chainPem, keyPem] = [chainFile, keyFile].map(readIfPresent);
  if (!chainPem || !keyPem) {
    console.error(`no certificate and key in ${chainFile} and ${keyFile}`);
    return [];
  }
  const certificate = readCertificate(chainPem);
  const keyType = certificate.keySpec?.type;
  if (keyType === undefined || !isKeyOf(keyPem, chainPem)) {
    console.error(`${keyFile} is not the key of ${chainFile}`);
    return [];
  }
  // certbot appends -0001 to the name of a second certificate
  const primary = [name, name.replace(/-\d{4}$/, "")].find((one) => certificate.names.includes(one)) ??
    certificate.names[0]!;
  const names = [primary, ...certificate.names.filter((one) => one !== primary)];
  return [{ certificate, names, keyType, chainPem, keyPem, ...more }];
}

/** Lines `key = value` and `key='value'`; base64 of acme.sh is decoded, empty values are left out. */
function assignments(text: string): Record<string, string | undefined> {
  const found: Record<string, string> = Object.create(null);
  for (const [, key, quoted, plain] of text.matchAll(/^(\w+) ?= ?(?:'(.*)'|(.*))$/gm)) {
    const value = (quoted ?? plain)!.replace(
      /^__ACME_BASE64__START_(.*)__ACME_BASE64__END_$/,
      (_, base64) => new TextDecoder().decode(Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))),
    );
    if (value !== "") found[key!] = value;
  }
  return found;
}

/** Paths in a directory, sorted; none if it does not exist. */
function list(directory: string, ending = ""): string[] {
  try {
    return [...Deno.readDirSync(directory)].map(({ name }) => name)
      .filter((name) => name.endsWith(ending) && name !== "README").sort().map((name) =>
        join(directory, name)
      );
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotADirectory) return [];
    throw error;
  }
}

function isDirectory(path: string): boolean {
  try {
    return Deno.statSync(path).isDirectory;
  } catch {
    return false;
  }
}

// ---- what is printed --------------------------------------------------------------------------------------------

/** One line for each set of names, as `domains` has them. */
function domainsText(found: readonly Found[]): string {
  return [...new Set(found.map(({ names }) => `${names.join(" ")}\n`))].join("");
}

/** Sections that write new certificates to where services read them; certificates with the same commands share one. */
function actionsText(program: string, found: readonly Found[]): string {
  const groups = Map.groupBy(
    found,
    ({ keyType, ...rest }) => JSON.stringify([keyType, commands(rest), update(rest)]),
  );
  const numbers: Record<KeyType, number> = { rsa: 0, ec: 0 };
  return [...groups.values()].flatMap((group) => {
    const [first] = group;
    const { keyType } = first!;
    const number = ++numbers[keyType];
    // with a name of several lines, all of their certificates would be delivered here
    const lines = new Set(found.map(({ names }) => names.join(" ")));
    const own = (name: string) => [...lines].filter((line) => line.split(" ").includes(name)).length === 1;
    const names = [...new Set(group.flatMap(({ names }) => names))].filter(own);
    if (names.length === 0) return [];
    const list = (key: string, values: readonly string[]) => {
      const texts = values.map((value) => JSON.stringify(value).replaceAll("%", "%%"));
      return texts.length === 0 ? [] : [`${key}: [${texts.join(",\n  ")}]`];
    };
    return [
      `[${program}-${keyType}${number === 1 ? "" : `-${number}`}]`,
      `domains: ${names.join(" ")}`,
      `keyTypes: ${keyType}`,
      ...list("uploadEach", commands(first!)),
      ...list("update", update(first!)),
      "",
    ].join("\n");
  }).join("\n");
}

/** Commands for `uploadEach`: they write into the existing files, so that owner, mode and links stay. */
function commands({ names, places }: Pick<Found, "names" | "places">): string[] {
  const primary = names[0]!;
  const place = (path: string) => {
    const word = shellWord(path);
    return primary.startsWith("*") ? word : word.replaceAll(`/${primary}/`, "/DOMAIN/").replace(
      new RegExp(`/${RegExp.escape(primary)}(?=\\.[\\w.]+$)`),
      "/DOMAIN",
    );
  };
  const { chain, leaf, issuers, key } = places;
  return [
    ...(chain ? [`cp CERT_FILE ${place(chain)}`] : []),
    ...(leaf ? [`openssl x509 -in CERT_FILE -out ${place(leaf)}`] : []),
    ...(issuers ? [`awk '/BEGIN/ { n++ } n > 1' CERT_FILE > ${place(issuers)}`] : []),
    ...(key ? [`cp KEY_FILE ${place(key)}`] : []),
  ];
}

function update({ reload }: Pick<Found, "reload">): string[] {
  return reload === undefined ? [] : [reload];
}

function shellWord(path: string): string {
  return /^[\w@%+=:,./-]+$/.test(path) ? path : `'${path.replaceAll("'", `'\\''`)}'`;
}

/** What was found, and the settings of lematt.conf that keep it as it is. */
function overview({ found, accounts, dropDir, left }: Source): string {
  const specs = found.map(({ certificate }) => certificate.keySpec!);
  const curves = [...new Set(specs.flatMap((spec) => spec.type === "ec" ? [spec.curve] : []))];
  const bits = [...new Set(specs.flatMap((spec) => spec.type === "rsa" ? [spec.bits] : []))];
  const cas = [...new Set(found.flatMap(({ ca }) => ca === undefined || isHost(ca) ? [] : [ca]))];
  const hosts = accounts.map(({ ca }) => ca).filter((ca) => isHost(ca) && ca !== new URL(LETS_ENCRYPT).host);
  const webroots = [...new Set(found.flatMap(({ webroot }) => webroot ?? []))];
  const setting = (key: string, values: readonly (string | number)[], usual: string | number) =>
    values.length === 0 || (values.length === 1 && values[0] === usual)
      ? []
      : [`  ${key}: ${values.join(`   # or `)}`];
  const settings = [
    ...setting(
      "challengeDropDir",
      dropDir ? [dropDir] : webroots.map((root) => join(root, ".well-known/acme-challenge")),
      "",
    ),
    ...setting("directory", cas, LETS_ENCRYPT),
    ...setting("directory", hosts.map((host) => `the CA's URL at ${host.replace("_", ":")}`), ""),
    ...setting("keyBitsRSA", bits, 2048),
    ...setting(
      "curve",
      curves.map((curve) => ({ "P-256": "prime256v1", "P-384": "secp384r1", "P-521": "secp521r1" })[curve]),
      "prime256v1",
    ),
  ];
  const others = found.flatMap(({ names, validation = "webroot", webroot }) => {
    const wildcard = names.find((name) => name.startsWith("*"));
    if (wildcard !== undefined) {
      return [`${wildcard} needs challenge: dns-01 and hooks in its section, before --into`];
    }
    return validation === "webroot" || webroot ? [] : [`${names[0]} was validated by ${validation}`];
  });
  return [
    ...found.map(({ names, keyType, certificate, ca }) =>
      `${names.join(" ")} (${keyType}), until ${certificate.notAfter.toISOString().slice(0, 10)}${
        ca ? `, from ${ca}` : ""
      }`
    ),
    "",
    ...accounts.map(({ ca, file }) => `account at ${ca}: ${file}`),
    "",
    ...(settings.length > 0 ? ["in lematt.conf, before --into:", ...settings, ""] : []),
    "left to do:",
    ...new Set(others.map((text) => `- ${text}: see conf/recipes`)),
    ...found.some(({ reload }) => reload?.includes("RENEWED_"))
      ? ["- update: uses certbot's variables RENEWED_…; write names and paths instead"]
      : [],
    ...left.map((text) => `- ${text}`),
    "- CAA records with accounturi remain valid if the account key was copied",
    "",
  ].join("\n");
}

/** lego has host and port of a CA, no URL. */
function isHost(ca: string): boolean {
  return !ca.includes("/");
}

// ---- copying ----------------------------------------------------------------------------------------------------

/** Copies what is missing in the configuration directory. */
async function copyInto(path: string, { found, accounts }: Source): Promise<string> {
  const config = loadConfig("prod", path);
  using store = await Store.open(config, new Date());
  const lines: string[] = [];
  const { host } = new URL(config.directoryUrl);
  const [account] = accounts.filter(({ ca }) => ca === config.directoryUrl || ca === host.replace(":", "_"));
  if (readIfPresent(config.accountKey) !== undefined) lines.push(`kept: ${config.accountKey}`);
  else if (account === undefined) lines.push(`not found: an account at ${config.directoryUrl}`);
  else {
    await store.createSecret(config.accountKey, accountKeyPem(account.file));
    lines.push(`copied: account key to ${config.accountKey}`);
  }
  for (const entry of readInventory(config)) {
    const what = `${entry.line.names.join(" ")} (${entry.keyType})`;
    const newest = entry.finding.kind === "missing" ? newestFor(entry, found) : undefined;
    if (newest !== undefined) {
      const { chainPem, keyPem, certificate } = newest;
      const { pem: csrPem } = await createCsr(keyPem, entry.line.names);
      await store.commit(entry, { chainPem, keyPem, csrPem, certificate });
      lines.push(`copied: ${what}`);
    } else lines.push(`${entry.finding.kind === "present" ? "kept" : "not found"}: ${what}`);
  }
  return lines.map((line) => `${line}\n`).join("");
}

function newestFor({ line, keyType }: Entry, found: readonly Found[]): Found | undefined {
  return found.filter((one) => one.keyType === keyType && coversExactly(one.certificate, line.names))
    .sort((a, b) => b.certificate.notAfter.getTime() - a.certificate.notAfter.getTime())[0];
}

/** The account key as PEM; that of certbot is a JWK (RFC 7517). */
function accountKeyPem(file: string): string {
  const text = Deno.readTextFileSync(file);
  const key = file.endsWith(".json")
    ? createPrivateKey({ key: JSON.parse(text), format: "jwk" })
    : createPrivateKey(text);
  return key.export({ type: "pkcs8", format: "pem" }) as string;
}

// ---- arguments --------------------------------------------------------------------------------------------------

async function main(args: readonly string[]): Promise<number> {
  const options = {
    domains: { type: "boolean" },
    actions: { type: "boolean" },
    into: { type: "string" },
    ca: { type: "string" },
  } as const;
  const { values, positionals } = parseArgs({ args: [...args], allowPositionals: true, options });
  const [program = "", directory] = positionals;
  if (!Object.hasOwn(PROGRAMS, program) || directory === undefined) {
    console.error(USAGE);
    return 2;
  }
  const all = PROGRAMS[program]!(Deno.realPathSync(directory));
  if (all.found.length === 0) throw new Error(`no certificates of ${program} in ${directory}`);
  const { ca = "" } = values;
  const source = { ...all, found: all.found.filter((one) => (one.ca ?? "").includes(ca)) };
  const text = values.domains
    ? domainsText(source.found)
    : values.actions
    ? actionsText(program, source.found)
    : values.into !== undefined
    ? await copyInto(values.into, source)
    : overview(source);
  Deno.stdout.writeSync(new TextEncoder().encode(text));
  return 0;
}

try {
  Deno.exit(await main(Deno.args));
} catch (error) {
  console.error(error instanceof ConfigError ? error.message : `migrate.ts: ${(error as Error).message}`);
  Deno.exit(1);
}
