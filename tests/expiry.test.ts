/**
 * Goal: no renewed certificate expires unseen on the host that uses it. Each way in which that happens is played night by
 * night with a real nginx: what is not mended is said by --cron, by the exit status and by an alert, until it is mended.
 */

import assert from "node:assert/strict";
import { connect } from "node:net";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { status } from "../lib/run.ts";
import { exitStatus, statusMetrics } from "../lib/status.ts";
import { readCertificate } from "../lib/x509.ts";
import { until } from "./bed.ts";
import { NEEDS_NGINX, RELOAD, shown, type Site, UPLOAD, withSite } from "./site.ts";
import { freePort, startNginx, tcpServer } from "./tls.ts";

const DAY = 86_400_000;
/** Certificates of 90 days that are due in the second night. */
const AGE = 58.5;
const CERTIFICATE = ["prod", "cert", "www.example.com-cert-combined.prime256v1.pem"];

const VERIFY = `verify: ["127.0.0.1:PORT#DOMAIN"]`;
const ALERT = `alert: ["{ echo SUBJECT; cat; } >> HERE/alerts"]`;
const all = (upload: string, update = RELOAD, rest = `${VERIFY}\n${ALERT}`) =>
  `[default]\n${upload}\n${update}\n${rest}`;
/** The same, but its first `command` fails as long as `<home>/down` is there. */
const failing = (list: string, command: string, how: string) =>
  list.replace(command, `test ! -e HERE/down || { ${how}; }; ${command}`);
const FAILING_UPLOAD = failing(UPLOAD, "cp", "echo no route to host >&2; exit 255");

const down = ({ bed }: Site) => Deno.writeTextFileSync(join(bed.home, "down"), "");
const up = ({ bed }: Site) => Deno.removeSync(join(bed.home, "down"));
const configure = ({ bed, port }: Site, actions: string) => bed.act(actions.replaceAll("PORT", String(port)));
const repair = (site: Site) => configure(site, all(UPLOAD));

/** One more night, with its run under cron, and what came of it. */
async function night({ bed, port, run }: Site, options: Parameters<Site["run"]>[0] = {}) {
  bed.ca.advance(DAY - 60_000);
  const { code, stdout, stderr } = await run({ cron: true, ...options });
  const newest = readCertificate(bed.text(...CERTIFICATE)).fingerprint;
  // after a reload, a worker of nginx with the old files accepts connections for a moment more
  let isServed = false;
  for (const deadline = Date.now() + 2000; !isServed && Date.now() < deadline;) {
    isServed = await shown(port) === newest;
  }
  return { code, said: stdout + stderr, alerts: bed.take("alerts").join("\n"), isServed };
}

/** For nights in which a reload has to take effect: it takes time that is not the bed's. */
const PATIENT = { sleep: (ms: number) => delay(ms / 5) };

interface Way {
  readonly what: string;
  readonly actions?: string;
  readonly settings?: string;
  /** Before the night of the renewal. */
  readonly befall?: (site: Site) => void;
  /** In the day after it. */
  readonly further?: (site: Site) => void;
  /** How the world differs in these nights. */
  readonly world?: (site: Site) => Parameters<Site["run"]>[0];
  /** By --cron, in each night. */
  readonly said: RegExp;
  /** After three nights. */
  readonly relent: (site: Site) => void | Promise<void>;
}

const OLDER = /^(WRONG|problem) .*serves an older certificate at 127\.0\.0\.1, valid until /m;

const ways: readonly Way[] = [
  {
    what: "the host is down for three nights",
    actions: all(FAILING_UPLOAD),
    befall: down,
    said: /^FAILED .*\n +cannot run .*: exit status 255\n +\| no route to host$/m,
    relent: up,
  },
  {
    what: "the disk of the target is full",
    actions: all(failing(UPLOAD, "cp", "cat CERT_FILE > /dev/full; exit 1")),
    befall: down,
    said: /^FAILED .*\n.*\n +\| .*No space left on device$/m,
    relent: up,
  },
  {
    what: "the reload fails",
    actions: all(UPLOAD, failing(RELOAD, "kill", "echo job failed >&2; exit 1")),
    befall: down,
    said: /^FAILED .*\n.*exit status 1\n +\| job failed$/m,
    relent: up,
  },
  {
    what: "the reload does nothing, and exits with 0",
    actions: all(UPLOAD, `update: ["true"]`),
    said: OLDER,
    relent: ({ reload }) => reload(),
  },
  { what: "no reload is configured", actions: all(UPLOAD, ""), said: OLDER, relent: repair },
  {
    what: "the service reads another file",
    actions: all(UPLOAD.replaceAll("web/DOMAIN", "web/other")),
    said: OLDER,
    relent: repair,
  },
  {
    what: "the key comes without its certificate",
    settings: "alwaysGenerateNewKeys: yes",
    actions: all(`uploadEach: ["cp KEY_FILE HERE/web/DOMAIN.KEY_TYPE.key"]`),
    said: OLDER,
    relent: repair,
  },
  {
    what: "the certificate comes without its key",
    settings: "alwaysGenerateNewKeys: yes",
    actions: all(`uploadEach: ["cp CERT_FILE HERE/web/DOMAIN.KEY_TYPE.pem"]`),
    said: OLDER,
    relent: repair,
  },
  {
    what: "its section is renamed while the delivery is pending",
    actions: all(FAILING_UPLOAD),
    befall: down,
    further: (site) =>
      configure(site, all(FAILING_UPLOAD).replace("[default]", "[web]\ndomains: www.example.com")),
    said: OLDER,
    relent: up,
  },
  {
    what: "the state is lost while the delivery is pending",
    actions: all(FAILING_UPLOAD),
    befall: down,
    further: ({ bed }) => Deno.removeSync(bed.path("prod", "state.json")),
    said: OLDER,
    relent: up,
  },
  {
    what: "the clock is a year behind",
    world: ({ bed }) => ({ now: () => new Date(bed.ca.now.getTime() - 365 * DAY) }),
    said: /this host's clock says .*, but a certificate is valid from /,
    relent: () => {},
  },
];

for (const { what, actions = all(UPLOAD), settings = "", befall, further, world, said, relent } of ways) {
  Deno.test(`said every night, and mended as soon as that is possible: ${what}`, NEEDS_NGINX, async () => {
    await withSite({ age: AGE, actions, settings: `verifyWait: 5\n${settings}` }, async (site) => {
      const calm = await night(site);
      assert.deepEqual([calm.code, calm.isServed, calm.alerts], [0, true, ""], calm.said);
      befall?.(site);
      let alerts = "";
      for (let n = 1; n <= 3; n++) {
        const bad = await night(site, world?.(site));
        assert.equal(bad.code, 1, `${n}: ${bad.said}`);
        assert.match(bad.said, said, `${n}`);
        alerts += bad.alerts;
        if (n === 1) further?.(site);
      }
      assert.match(alerts, /^\d problems?: .*\n.*(pending since|serves an older certificate|clock)/);
      await relent(site);
      const good = await night(site, PATIENT);
      assert.deepEqual([good.code, good.isServed], [0, true], good.said);
      assert.match(good.alerts, /^well again/);
      const quiet = await night(site);
      assert.deepEqual([quiet.code, quiet.said, quiet.alerts], [0, "", ""]);
    });
  });
}

Deno.test(
  "a service that was started from an old image is given the newest certificate by the next run",
  NEEDS_NGINX,
  async () => {
    await withSite({ age: AGE, actions: all(UPLOAD) }, async (site) => {
      const old = await site.save();
      await night(site);
      assert.equal((await night(site, PATIENT)).isServed, true);
      for (const [name, text] of Object.entries(old)) Deno.writeTextFileSync(join(site.web, name), text);
      await site.restart();
      const { code, said, isServed } = await night(site, PATIENT);
      assert.deepEqual([code, isServed], [0, true], said);
      assert.match(said, /^drift .*serves an older certificate/m);
    });
  },
);

Deno.test(
  "a run that is killed between a certificate and its delivery is made up for by the next",
  NEEDS_NGINX,
  async () => {
    const actions = all(UPLOAD, failing(RELOAD, "kill", "kill -KILL $PPID; sleep 5"));
    await withSite({ age: 60.5, actions, settings: "verifyWait: 9\npreflight: no" }, async (site) => {
      down(site);
      assert.equal((await site.bed.lematt("--prod", "--cron")).code, 128 + 9);
      up(site);
      const { code, said, isServed } = await night(site, PATIENT);
      assert.deepEqual([code, isServed], [0, true], said);
      assert.match(said, /^delivered /m);
    });
  },
);

Deno.test(
  "a balancer with one stale server of three is said every night, and not taken to be well by luck",
  NEEDS_NGINX,
  async () => {
    await withSite({ age: AGE, settings: "verifyWait: 2" }, async (site) => {
      const { bed, port, web } = site;
      const third = join(bed.home, "third");
      const copy = () => {
        for (const { name } of Deno.readDirSync(web)) {
          if (/\.(pem|key)$/.test(name)) Deno.copyFileSync(join(web, name), join(third, name));
        }
      };
      await Deno.mkdir(third);
      copy();
      const stale = freePort();
      await using nginx = await startNginx(
        third,
        stale,
        (pair) => `server { listen 127.0.0.1:${stale} ssl; ${pair("www.example.com.ec")} }`,
      );
      let turn = 0;
      await using balancer = await tcpServer((client) => {
        const server = connect([port, port, stale][turn++ % 3]!, "127.0.0.1");
        for (const socket of [client, server]) socket.on("error", () => (client.destroy(), server.destroy()));
        client.pipe(server).pipe(client);
      });
      bed.act(all(UPLOAD, RELOAD, `verify: ["127.0.0.1:${balancer.port}#DOMAIN"]\n${ALERT}`));
      assert.equal((await night(site)).code, 0);
      for (let n = 1; n <= 4; n++) {
        const { code, said } = await night(site);
        assert.equal(code, 1, `${n}: ${said}`);
        assert.match(said, OLDER);
      }
      copy();
      nginx.child.kill("SIGHUP");
      await until("all three are well", async () => (await night(site)).code === 0);
    });
  },
);

Deno.test(
  "a month without runs is seen by --status and --metrics, and said by the next run",
  NEEDS_NGINX,
  async () => {
    await withSite({ age: AGE, actions: all(UPLOAD) }, async (site) => {
      const { bed } = site;
      await night(site);
      bed.ca.advance(29 * DAY);
      const found = await status(bed.config("prod"), true, bed.world(), () => {});
      assert.equal(exitStatus(found), 1);
      assert.match(statusMetrics(found), /^lematt_problems\{.*kind="not run"\} 1$/m);
      assert.match(statusMetrics(found), /^lematt_endpoint_not_after_seconds\{/m);
      const { code, said, isServed } = await night(site, PATIENT);
      assert.deepEqual([code, isServed], [0, true]);
      assert.match(said, /has not run since .*\n(.*\n)*issued .*\n(.*\n)*verified /);
    });
  },
);

Deno.test(
  "an alert that cannot be sent is said by every run, and sent as soon as it can be",
  NEEDS_NGINX,
  async () => {
    const actions = all(
      UPLOAD,
      `update: ["true"]`,
      `${VERIFY}\n${failing(ALERT, "{ echo SUBJECT", "exit 75")}`,
    );
    await withSite({ age: AGE, actions, settings: "verifyWait: 2" }, async (site) => {
      await night(site);
      await night(site);
      down(site);
      for (let n = 1; n <= 2; n++) {
        const { code, said, alerts } = await night(site);
        assert.deepEqual([code, alerts], [1, ""]);
        assert.match(said, /^FAILED +\[default\] alert\n +cannot run .*: exit status 75$/m);
      }
      up(site);
      assert.match((await night(site)).alerts, /serves an older certificate/);
    });
  },
);
