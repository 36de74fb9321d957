/**
 * Goal: the commands of conf/operations.md do what that page says. Only paths differ, and systemctl is a script that
 * records its arguments.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { usualInterval } from "../lib/renewal.ts";
import { readCertificate } from "../lib/x509.ts";
import { testBed, type Texts } from "./bed.ts";
import { adapt, blocks, ROOT, shell } from "./documents.ts";
import { freePort, makeCertificate, startNginx } from "./tls.ts";
import { lackOf, together } from "./together.ts";

const PAGE = "conf/operations.md";
const LEMATT = blocks(PAGE)[0]!;

/** A host with lematt in `opt/lematt` and its configuration in `etc/lematt`, below the home of a bed. */
async function startHost(texts: Texts) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({ settings: "keyTypes: ec", ...texts }));
  const { home } = bed;
  const files = ["deno.json", "deno.lock", "lematt.ts", "lib"].map((name) => join(ROOT, name)).join(" ");
  await shell(
    `mkdir -p opt/lematt etc/systemd/system etc/cron.d bin var/tmp && cp -r ${files} opt/lematt
    mv conf etc/lematt && ln -s etc/lematt conf && chmod 700 etc/lematt`,
    home,
  );
  await Deno.writeTextFile(join(home, "bin/systemctl"), `#!/bin/sh\necho systemctl "$@"\n`, { mode: 0o755 });
  const open = stack.move();
  return {
    bed,
    /** Runs commands of the page with paths replaced, and returns their output; `etc` is the configuration's parent. */
    sh: (commands: string, etc = "etc") =>
      shell(
        `PATH=${home}/bin:$PATH\n${LEMATT}${commands}`.replaceAll("su - certmaint -c", "sh -c")
          .replaceAll("/etc/", `${home}/${etc}/`).replaceAll("-C /etc ", `-C ${home}/${etc} `).replaceAll(
            "/opt/",
            `${home}/opt/`,
          )
          .replaceAll("/var/tmp", `${home}/var/tmp`),
        home,
      ),
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
}

/** The block below a heading that begins with `start`. */
function block(heading: string, start: string): string {
  const found = blocks(PAGE, heading).find((text) => text.startsWith(start));
  assert(found !== undefined, `no block below ${heading} begins with ${start}`);
  return found;
}

const DELIVERY = `[default]\nuploadCerts: ["echo delivered >> HOME/log"]\n`;

const test = together("conf/operations.md");

test(
  "a second host takes over from a copy: nothing is issued or delivered again, and the first host does no harm",
  async () => {
    await using host = await startHost({ domains: "example.com" });
    const { bed, sh } = host;
    await makeCertificate(bed.home, "site", "ec", ["example.com"]);
    const port = freePort();
    await using nginx = await startNginx(
      bed.home,
      port,
      (pair) => `server { listen 127.0.0.1:${port} ssl; ${pair("site")} }`,
    );
    bed.configure({
      actions: `[default]
uploadCerts: ["cat CERTS > ${bed.home}/site.pem; echo delivered >> ${bed.home}/log"]
uploadKeys: ["cat KEYS > ${bed.home}/site.key"]
update: ["kill -HUP ${nginx.child.pid}"]
verify: ["127.0.0.1:${port}#example.com"]\n`,
    });
    const deliveries = () => Deno.readTextFileSync(join(bed.home, "log")).split("\n").length - 1;
    assert.match(await sh("lematt --prod"), /^issued /m);
    assert.equal(deliveries(), 1);
    await Deno.mkdir(join(bed.home, "standby", "lematt"), { recursive: true });
    const copy = block("central burns", "ExecStopPost=");
    // ssh to a key with the forced command of the page
    const [, forced] = /command="(rrsync [^"]*)"/.exec(Deno.readTextFileSync(join(ROOT, PAGE)))!;
    const confined = adapt(forced!, { "/etc/lematt": join(bed.home, "standby/lematt") });
    const ssh = `#!/bin/sh\nshift\nSSH_ORIGINAL_COMMAND="$*" exec ${confined}\n`;
    await Deno.writeTextFile(join(bed.home, "bin/ssh"), ssh, { mode: 0o755 });
    await sh(adapt(copy, { "ExecStopPost=": "", "rsync -a": `rsync -e ${bed.home}/bin/ssh -a` }));

    assert.equal(
      await sh(block("central burns", "systemctl disable")),
      "systemctl disable --now lematt.timer\n",
    );
    const orders = bed.ca.orders.length;
    const printed = await sh(block("central burns", "lematt --prod --rollover"), "standby");
    assert.doesNotMatch(printed, /^(issue|deliver|roll out|wait)\b/m);
    assert.match(await sh("lematt --prod", "standby"), /^nothing due, 1 kept/m);
    assert.deepEqual([bed.ca.orders.length, deliveries()], [orders, 1]);

    await sh("lematt --prod --renew example.com", "standby");
    assert.equal(deliveries(), 2);
    const ours = bed.ca.orders.length;

    // the first host comes back
    await assert.rejects(() => sh("lematt --prod --status"), /127\.0\.0\.1/);
    await assert.rejects(
      () => sh("lematt --prod --renew example.com"),
      /cannot create an order: .*signature/,
    );
    assert.deepEqual([bed.ca.orders.length, deliveries()], [ours, 2]);
    bed.ca.violations.splice(0);
  },
  lackOf("nginx", "openssl", "rrsync"),
);

test("a backup is taken between runs, and after it is restored nothing is due", async () => {
  await using host = await startHost({ domains: "example.com" });
  const { bed, sh } = host;
  bed.configure({ actions: DELIVERY.replace("HOME", bed.home) });
  await sh("lematt --prod");
  await sh(block("Backup", "umask"));
  await Deno.remove(bed.path(), { recursive: true });
  await Deno.remove(join(bed.home, "etc", "lematt"), { recursive: true }).catch(() => {});
  const printed = await sh(block("Backup", "tar"));
  assert.match(printed, /^keep +example/m);
  assert.doesNotMatch(printed, /^(issue|deliver|roll out)/m);
});

test("the commands for upgrading, handing over and uninstalling work", async () => {
  await using host = await startHost({
    domains: "example.com",
    settings: "keyTypes: ec\nreauthorizeDays: 15",
  });
  const { bed, sh } = host;
  await sh("lematt --prod");
  const upgraded = await sh(block("Upgrade", "cp -a"));
  assert.match(upgraded, /no errors[^]*^issued [^]*^keep +example/m);
  assert.match(await sh(block("Handing over", "lematt --check")), /no errors/);

  const files = ["etc/systemd/system/lematt.service", "etc/systemd/system/lematt.timer", "etc/cron.d/lematt"];
  for (const file of files) await Deno.writeTextFile(join(bed.home, file), "");
  await shell(`rm conf && cp -r etc/lematt conf`, bed.home); // the bed removes it
  await sh(block("Uninstall", "systemctl"));
  for (const path of [...files, "etc/lematt", "opt/lematt"]) assert(!existsSync(join(bed.home, path)), path);
});

test("after a configuration is moved out of /opt/lematt, installing a new version changes nothing", async () => {
  await using host = await startHost({ domains: "example.com" });
  const { bed, sh } = host;
  bed.configure({ actions: DELIVERY.replace("HOME", bed.home) });
  await shell("mv etc/lematt opt/lematt/conf", bed.home);
  await sh("/opt/lematt/lematt.ts --test; /opt/lematt/lematt.ts --prod");
  await sh(adapt(block("Upgrade", "install -d"), { "-o certmaint ": "", "account-key.pem": "account.key" }));
  await shell(`cp -r ${join(ROOT, "conf")} opt/lematt`, bed.home);
  assert.match(await sh("lematt --prod"), /^nothing due, 1 kept/m);
  assert.equal(bed.ca.orders.length, 2);
  assert.equal(Deno.readTextFileSync(join(bed.home, "log")), "delivered\n".repeat(2));
});

test("a host is removed: its certificate is revoked, its files move to orphaned/, nothing else is due", async () => {
  await using host = await startHost({ domains: "example.com\nold.example.com" });
  const { bed, sh } = host;
  await sh("lematt --prod");
  await sh(block("Removing a host", "lematt --prod --revoke"));
  bed.configure({ domains: "example.com" });
  const printed = await sh(block("Removing a host", "lematt --prod --plan"));
  assert.doesNotMatch(printed, /^issue/m);
  assert.deepEqual([...Deno.readDirSync(bed.path("prod", "cert"))].map(({ name }) => name), [
    "example.com-cert-combined.prime256v1.pem",
  ]);
  assert.match(await sh("lematt --prod"), /^nothing due, 1 kept/m);
});

test("a compromised key is replaced and delivered, then revoked, and never used again", async () => {
  await using host = await startHost({ domains: "www.example.com" });
  const { bed, sh } = host;
  bed.configure({ actions: DELIVERY.replace("HOME", bed.home) });
  await sh("lematt --prod");
  const file = "www.example.com-cert-combined.prime256v1.pem";
  const old = readCertificate(bed.text("prod", "cert", file)).fingerprint;
  const printed = await sh(block("compromised key", "cp -p"));
  assert.match(printed, /^issued [^]*^delivered [^]*^revoked/m);
  assert.notEqual(readCertificate(bed.text("prod", "cert", file)).fingerprint, old);
  assert.equal(bed.text("prod", "revoked-keys").split("\n").length, 2);
  assert.match(await sh("lematt --prod"), /^nothing due, 1 kept/m);
});

test(
  "the timer for maintenance hours runs twice a night, and lematt takes the day between for its usual interval",
  async () => {
    const calendar = block("Maintenance", "[Timer]").match(/(?<=OnCalendar=).+/)![0];
    const printed = await shell(`systemd-analyze calendar --iterations=6 '${calendar}'`, "/");
    const runs = Array.from(
      printed.matchAll(/(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d) UTC/g),
      ([, day, time]) => `${day}T${time}Z`,
    );
    assert.deepEqual([runs.length, usualInterval(runs.map((at) => ({ at })))], [6, 22 * 3_600_000]);
  },
  lackOf("systemd-analyze"),
);
