/**
 * Goal: no renewed certificate expires unnoticed on the host that uses it. Each cause is simulated night by night with a
 * real nginx: it is reported by --cron, by the exit status and by an alert until it is last.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { settled } from "../lib/context.ts";
import { status } from "../lib/run.ts";
import { exitStatus, statusMetrics } from "../lib/status.ts";
import { RELOAD, type Site, siteTest, startSite, UPLOAD } from "./site.ts";

const DAY = 86_400_000;
/** Certificates of 90 days that are due in the second night. */
const AGE = 58.5;

const actionsOf = (upload: string, update = RELOAD) =>
  `[default]\n${upload}\n${update}\nverify: ["127.0.0.1:PORT#DOMAIN"]\nalert: ["{ echo SUBJECT; cat; } >> HERE/alerts"]`;
/** The list, with `command` failing while `<home>/down` exists. */
const failing = (list: string, command: string, how: string) =>
  list.replace(command, `test ! -e HERE/down || { ${how}; }; ${command}`);
const FAILING_UPLOAD = failing(UPLOAD, "cp", "echo no route to host >&2; exit 255");

const down = ({ bed }: Site) => Deno.writeTextFileSync(join(bed.home, "down"), "");
const up = ({ bed }: Site) => Deno.removeSync(join(bed.home, "down"));
const configure = ({ bed, port }: Site, actions: string) => bed.act(actions.replaceAll("PORT", String(port)));
const correct = (site: Site) => configure(site, actionsOf(UPLOAD));

/** The next night's run, under --cron. */
async function night({ bed, run }: Site, options: Parameters<Site["run"]>[0] = {}) {
  bed.ca.advance(DAY - 60_000);
  const { code, stdout, stderr } = await run({ cron: true, ...options });
  return { code, output: stdout + stderr, alerts: bed.take("alerts").join("\n") };
}

/** Waits in real time, which a reload needs to take effect. */
const REAL_TIME = { sleep: (ms: number) => delay(ms / 5) };

/** Waits until nginx serves the newest certificate. */
async function serves({ bed, save, settle }: Site): Promise<void> {
  await settle();
  const newest = bed.text("prod/cert/www.example.com-cert-combined.prime256v1.pem");
  assert.equal(save()["www.example.com.ec.pem"], newest);
}

interface Way {
  readonly actions?: string;
  readonly settings?: string;
  /** What goes wrong before the night of the renewal, and in the day after it. */
  readonly before?: (site: Site) => void;
  readonly after?: (site: Site) => void;
  /** Options of the runs in these nights. */
  readonly options?: (site: Site) => Parameters<Site["run"]>[0];
  /** What --cron prints in each night. */
  readonly output: RegExp;
  /** Called after three nights. */
  readonly repair: (site: Site) => void | Promise<void>;
}

const OLDER = /^(WRONG|problem) .*serves an older certificate at 127\.0\.0\.1, valid until /m;

const WAYS: Readonly<Record<string, Way>> = {
  "the host is down": {
    actions: actionsOf(FAILING_UPLOAD),
    before: down,
    output: /^FAILED .*\n.*exit status 255\n +\| no route to host$/m,
    repair: up,
  },
  "the reload fails": {
    actions: actionsOf(UPLOAD, failing(RELOAD, "kill", "echo job failed >&2; exit 1")),
    before: down,
    output: /^FAILED .*\n.*exit status 1\n +\| job failed$/m,
    repair: up,
  },
  "the reload does nothing, and exits with 0": {
    actions: actionsOf(UPLOAD, `update: ["true"]`),
    output: OLDER,
    repair: ({ reload }) => reload(),
  },
  "the key comes without its certificate": {
    settings: "alwaysGenerateNewKeys: yes",
    actions: actionsOf(`uploadEach: ["cp KEY_FILE HERE/web/DOMAIN.KEY_TYPE.key"]`),
    output: OLDER,
    repair: correct,
  },
  "the certificate comes without its key": {
    settings: "alwaysGenerateNewKeys: yes",
    actions: actionsOf(`uploadEach: ["cp CERT_FILE HERE/web/DOMAIN.KEY_TYPE.pem"]`),
    output: OLDER,
    repair: correct,
  },
  "R2: its section is renamed while the delivery is pending": {
    actions: actionsOf(FAILING_UPLOAD),
    before: down,
    after: (site) =>
      configure(site, actionsOf(FAILING_UPLOAD).replace("[default]", "[web]\ndomains: www.example.com")),
    output: OLDER,
    repair: up,
  },
  "R2: the state is lost while the delivery is pending": {
    actions: actionsOf(FAILING_UPLOAD),
    before: down,
    after: ({ bed }) => Deno.removeSync(bed.path("prod", "state.json")),
    output: OLDER,
    repair: up,
  },
  "the clock is a year behind": {
    options: ({ bed }) => ({ now: () => new Date(bed.ca.now.getTime() - 365 * DAY) }),
    output: /this host's clock says .*, but a certificate is valid from /,
    repair: () => {},
  },
};

async function play({ actions = actionsOf(UPLOAD), settings = "", ...way }: Way): Promise<void> {
  await using site = await startSite({ age: AGE, actions, settings: `verifyWait: 20\n${settings}` });
  const first = await night(site);
  assert.deepEqual([first.code, first.alerts], [0, ""], first.output);
  way.before?.(site);
  let alerts = "";
  for (let n = 1; n <= 3; n++) {
    const ran = await night(site, way.options?.(site));
    assert.equal(ran.code, 1, `${n}: ${ran.output}`);
    assert.match(ran.output, way.output, `${n}`);
    alerts += ran.alerts;
    if (n === 1) way.after?.(site);
  }
  assert.match(alerts, /^\d problems?: .*\n.*(pending since|serves an older certificate|clock)/);
  await way.repair(site);
  const last = await night(site, REAL_TIME);
  assert.equal(last.code, 0, last.output);
  assert.match(last.alerts, /^well again/);
  await serves(site);
  assert.deepEqual(await night(site), { code: 0, output: "", alerts: "" });
}

siteTest(
  "a new certificate that is not served is reported every night, and delivered once it can be",
  async () => {
    await settled(
      Object.entries(WAYS).map(async ([what, way]) => {
        await play(way).catch((cause) => {
          throw new Error(what, { cause });
        });
      }),
    );
  },
);

siteTest(
  "R14: a month without runs is shown by --status and --metrics, and reported by the next run",
  async () => {
    await using site = await startSite({ age: AGE, actions: actionsOf(UPLOAD) });
    const { bed } = site;
    await night(site);
    bed.ca.advance(29 * DAY);
    const found = await status(bed.config("prod"), true, bed.context(), () => {});
    assert.equal(exitStatus(found), 1);
    assert.match(statusMetrics(found), /^lematt_problems\{.*kind="not run"\} 1$/m);
    assert.match(statusMetrics(found), /^lematt_endpoint_not_after_seconds\{/m);
    const { code, output } = await night(site, REAL_TIME);
    assert.equal(code, 0);
    assert.match(output, /has not run since .*\n(.*\n)*issued .*\n(.*\n)*verified /);
    await serves(site);
  },
);
