/**
 * A site: a bed with an nginx that serves the certificates of www.example.com, by the files that lematt delivers.
 */

import { join } from "node:path";
import type { KeyType, Mode } from "../lib/config.ts";
import { readCertificate } from "../lib/x509.ts";
import { which } from "./bench-measure.ts";
import { type Bed, type Ran, testBed, until } from "./bed.ts";
import { freePort, startNginx } from "./tls.ts";

export const NEEDS_NGINX = { ignore: which("nginx") === undefined };

/** Uploads that a service finds under names of its own, and nginx reading them anew. */
export const UPLOAD = `rehearse: yes
uploadEach: ["cp CERT_FILE HERE/web/DOMAIN.KEY_TYPE.pem && cp KEY_FILE HERE/web/DOMAIN.KEY_TYPE.key"]`;
export const RELOAD = `update: ["kill -HUP $(cat HERE/web/pid)"]`;

export interface Site {
  readonly bed: Bed;
  readonly port: number;
  /** `<home>/web` */
  readonly web: string;
  /** What is in `<home>/web`, by name. */
  save(): Promise<Record<string, string>>;
  restore(files: Record<string, string>): Promise<void>;
  reload(): Promise<void>;
  restart(): Promise<void>;
  run(options?: Parameters<Bed["run"]>[0]): Promise<Ran>;
}

/**
 * nginx, which serves the certificates of www.example.com at a port of loopback; PORT in the actions is that port. Its first
 * certificates are of `age` days.
 */
export async function withSite(
  { actions = `[default]\n${UPLOAD}\n${RELOAD}\nverify: ["127.0.0.1:PORT#DOMAIN"]`, ...options }: {
    domains?: string;
    actions?: string;
    settings?: string;
    keyTypes?: readonly KeyType[];
    age?: number;
    mode?: Mode;
  },
  test: (site: Site) => Promise<void>,
): Promise<void> {
  const {
    domains = "www.example.com",
    settings = "verifyWait: 30",
    keyTypes = ["ec"],
    age = 0,
    mode = "prod",
  } = options;
  await using bed = await testBed({
    domains,
    settings: `keyTypes: ${keyTypes.join(" ")}\nari: no\ncommandTimeout: 10\n${settings}`,
  });
  const port = freePort();
  const web = join(bed.home, "web");
  await Deno.mkdir(web);
  await bed.plant({ mode, age });
  const tag = { rsa: "rsa2048", ec: "prime256v1" };
  const end = mode === "test" ? ".test.pem" : ".pem";
  for (const type of keyTypes) {
    const from = (what: string) =>
      bed.path(mode, what.slice(0, 4).replace("-", ""), `www.example.com-${what}.${tag[type]}${end}`);
    await Deno.copyFile(from("cert-combined"), join(web, `www.example.com.${type}.pem`));
    await Deno.copyFile(from("key"), join(web, `www.example.com.${type}.key`));
  }
  const start = async () => {
    const nginx = await startNginx(
      web,
      port,
      (pair) =>
        `server { listen 127.0.0.1:${port} ssl; listen 127.0.0.2:${port} ssl; ${
          pair(...keyTypes.map((type) => `www.example.com.${type}`))
        } }`,
    );
    await Deno.writeTextFile(join(web, "pid"), String(nginx.child.pid));
    return nginx;
  };
  let nginx = await start();
  await using ending = new AsyncDisposableStack();
  ending.defer(() => nginx[Symbol.asyncDispose]());
  bed.act(actions.replaceAll("PORT", String(port)));
  const files = () => [...Deno.readDirSync(web)].filter(({ name }) => /\.(pem|key)$/.test(name));
  const site: Site = {
    bed,
    port,
    web,
    async save() {
      const texts = files().map(async ({ name }) =>
        [name, await Deno.readTextFile(join(web, name))] as const
      );
      return Object.fromEntries(await Promise.all(texts));
    },
    async restore(texts) {
      for (const [name, text] of Object.entries(texts)) await Deno.writeTextFile(join(web, name), text);
      await site.reload();
    },
    async reload() {
      nginx.child.kill("SIGHUP");
      const type = keyTypes.at(-1)!;
      const { fingerprint } = readCertificate(
        await Deno.readTextFile(join(web, `www.example.com.${type}.pem`)),
      );
      await until("nginx has the new file", async () => await shown(port) === fingerprint);
      // a worker with the old file takes connections for 100 ms more
      const children = `cat /proc/${nginx.child.pid}/task/*/children`;
      const workers = async () => await new Deno.Command("/bin/sh", { args: ["-c", children] }).output();
      await until(
        "one worker",
        async () => new TextDecoder().decode((await workers()).stdout).trim().split(" ").length === 1,
      );
    },
    async restart() {
      await nginx[Symbol.asyncDispose]();
      nginx = await start();
    },
    run: (options) => bed.run({ mode, ...options }),
  };
  await test(site);
}

/** The fingerprint of the certificate that openssl is shown at a port of loopback; an EC one where there are two. */
export async function shown(port: number): Promise<string> {
  const { stdout } = await new Deno.Command("openssl", {
    args: ["s_client", "-connect", `127.0.0.1:${port}`, "-servername", "www.example.com"],
    stdin: "null",
    stderr: "null",
  }).output();
  const pem = /-----BEGIN[^-]*-----[^-]*-----END[^-]*-----/.exec(new TextDecoder().decode(stdout))?.[0];
  return pem === undefined ? "" : readCertificate(pem).fingerprint;
}
