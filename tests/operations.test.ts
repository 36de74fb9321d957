/** Goal: the commands of conf/operations.md do what it says; only paths differ, and systemctl prints its arguments. */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { usualInterval } from "../lib/renewal.ts";
import { readCertificate } from "../lib/x509.ts";
import { type Bed, testBed, together } from "./bed.ts";
import { adapt, blockOf, blocks, install, lackOf, ROOT, shell } from "./programs.ts";
import { RELOAD, startSite, UPLOAD } from "./site.ts";

const PAGE = "conf/operations.md";
const block = (heading: string, start: string) => blockOf(PAGE, start, heading);
const LOGGED = `uploadCerts: ["echo delivered >> HERE/log"]\n`;

/** lematt, and its configuration in etc/lematt, below the home of a bed; returns how to run commands of the page there. */
async function installHost({ home }: Bed) {
  const { program } = await install(home, undefined, { packages: false });
  await shell(
    `mkdir -p etc/systemd/system etc/cron.d var/tmp standby/lematt
    mv conf etc/lematt && ln -s etc/lematt conf && chmod 700 etc/lematt`,
    home,
  );
  await Deno.writeTextFile(join(home, "bin/systemctl"), `#!/bin/sh\necho systemctl "$@"\n`, { mode: 0o755 });
  return (commands: string, etc = "etc") => {
    const here = `PATH=${home}/bin:$PATH\n${blocks(PAGE)[0]}${commands}`
      .replaceAll("su - certmaint -c", "sh -c").replaceAll("-C /etc ", `-C ${home}/${etc} `)
      .replaceAll("/etc/", `${home}/${etc}/`).replaceAll("/opt/lematt", program)
      .replaceAll("/var/tmp", `${home}/var/tmp`);
    return shell(here, home);
  };
}

const test = together(PAGE);

test("central burns down: a second host repeats nothing, and the first does no harm", async () => {
  const actions = `[default]\n${LOGGED}${UPLOAD}\n${RELOAD}\nverify: ["127.0.0.1:PORT#DOMAIN"]\n`;
  await using site = await startSite({ actions });
  const { bed } = site;
  const sh = await installHost(bed);
  await sh("lematt --prod --renew www.example.com");
  assert.deepEqual(bed.take(), ["delivered"]);

  // ssh to a key with the forced command of the page
  const [, forced] = /command="(rrsync [^"]*)"/.exec(Deno.readTextFileSync(join(ROOT, PAGE)))!;
  const confined = forced!.replace("/etc/lematt", join(bed.home, "standby/lematt"));
  const ssh = `#!/bin/sh\nshift\nSSH_ORIGINAL_COMMAND="$*" exec ${confined}\n`;
  await Deno.writeTextFile(join(bed.home, "bin/ssh"), ssh, { mode: 0o755 });
  const copy = block("central burns", "ExecStopPost=");
  await sh(adapt(copy, { "ExecStopPost=": "", "rsync -a": `rsync -e ${bed.home}/bin/ssh -a` }));

  const stopped = await sh(block("central burns", "systemctl disable"));
  assert.equal(stopped, "systemctl disable --now lematt.timer\n");
  const planned = await sh(block("central burns", "lematt --prod --rollover"), "standby");
  assert.doesNotMatch(planned, /^(issue|deliver|roll out|wait)\b/m);
  assert.match(await sh("lematt --prod", "standby"), /^nothing due, 1 kept/m);
  assert.deepEqual([bed.ca.orders.length, bed.take()], [1, []]);
  await sh("lematt --prod --renew www.example.com", "standby");
  assert.deepEqual([bed.ca.orders.length, bed.take()], [2, ["delivered"]]);

  // the first host comes back
  await assert.rejects(() => sh("lematt --prod --status"), /127\.0\.0\.1/);
  await assert.rejects(
    () => sh("lematt --prod --renew www.example.com"),
    /cannot create an order: .*signature/,
  );
  assert.deepEqual([bed.ca.orders.length, bed.take()], [2, []]);
  assert.deepEqual(bed.takeViolations(), ["malformed newOrder"]);
}, lackOf("nginx", "openssl", "rrsync"));

test("a host is moved to /etc/lematt, upgraded, restored, freed of a key and of a name, handed over, uninstalled", async () => {
  const [domains, actions] = ["www.example.com\nold.example.com", `[default]\n${LOGGED}`];
  await using bed = await testBed({ domains, actions, settings: "keyTypes: ec\nari: no" });
  const { home } = bed;
  const sh = await installHost(bed);
  const assertIdle = async () => {
    assert.match(await sh("lematt --prod"), /^nothing due/m);
    assert.deepEqual(bed.take(), []);
  };

  // the configuration of 0.1.0 was where unpacking replaces it
  await shell("mv etc/lematt program/conf", home);
  await sh("/opt/lematt/lematt.ts --test; /opt/lematt/lematt.ts --prod");
  assert.deepEqual(bed.take(), ["delivered", "delivered"]);
  await sh(adapt(block("Upgrade", "install -d"), { "-o certmaint ": "", "account-key.pem": "account.key" }));
  await shell(`cp -r ${join(ROOT, "conf")} program`, home);
  await assertIdle();

  const upgraded = await sh(block("Upgrade", "cp -a"));
  assert.match(upgraded, /no errors[^]*^nothing due, 2 kept[^]*^keep +2 /m);

  await sh(block("Backup", "umask"));
  await Deno.remove(join(home, "etc/lematt"), { recursive: true });
  const restored = await sh(block("Backup", "tar"));
  assert.match(restored, /^keep +2 /m);
  assert.doesNotMatch(restored, /^(issue|deliver|roll out)/m);

  const served = () => readCertificate(bed.text("prod/cert/www.example.com-cert-combined.prime256v1.pem"));
  const { fingerprint } = served();
  assert.match(await sh(block("compromised key", "cp -p")), /^issued [^]*^delivered [^]*^revoked/m);
  assert.notEqual(served().fingerprint, fingerprint);
  assert.equal(bed.text("prod", "revoked-keys").split("\n").length, 2);
  assert.deepEqual(bed.take(), ["delivered"]);

  await sh(block("Removing a host", "lematt --prod --revoke"));
  bed.configure({ domains: "www.example.com" });
  assert.doesNotMatch(await sh(block("Removing a host", "lematt --prod --plan")), /^issue/m);
  const kept = [...Deno.readDirSync(bed.path("prod/cert"))];
  assert.deepEqual(kept.map(({ name }) => name), ["www.example.com-cert-combined.prime256v1.pem"]);
  await assertIdle();

  assert.match(await sh(block("Handing over", "lematt --check")), /no errors/);
  const files = ["etc/systemd/system/lematt.service", "etc/systemd/system/lematt.timer", "etc/cron.d/lematt"];
  for (const file of files) await Deno.writeTextFile(join(home, file), "");
  await sh(block("Uninstall", "systemctl"));
  for (const path of [...files, "etc/lematt", "program"]) assert(!existsSync(join(home, path)), path);
});

test("the maintenance timer runs twice a night, and the day between is the usual interval", async () => {
  const calendar = block("Maintenance", "[Timer]").match(/(?<=OnCalendar=).+/)![0];
  const printed = await shell(`systemd-analyze calendar --iterations=6 '${calendar}'`, "/");
  const times = printed.matchAll(/(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d) UTC/g);
  const runs = Array.from(times, ([, day, time]) => ({ at: `${day}T${time}Z` }));
  assert.deepEqual([runs.length, usualInterval(runs)], [6, 22 * 3_600_000]);
}, lackOf("systemd-analyze"));
