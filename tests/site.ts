/**
 * A site: a bed with an nginx that serves the certificates of www.example.com, by the files that lematt delivers.
 */

import { connect } from "node:net";
import { join } from "node:path";
import type { KeyType, Mode } from "../lib/config.ts";
import { readCertificate } from "../lib/x509.ts";
import { which } from "./bench-measure.ts";
import { type Bed, type Ran, testBed, until } from "./bed.ts";
import { output } from "./programs.ts";
import { freePort, startNginx, tcpServer } from "./tls.ts";

/** Deno.test() if nginx is installed. */
export function siteTest(name: string, fn: () => Promise<void>): void {
  const ignore = which("nginx") === undefined;
  if (ignore) console.log(`nginx is not installed, so this is not tested: ${name}`);
  Deno.test({ name, ignore, fn });
}

/** Uploads to the service's own file names, and a reload of nginx. */
export const UPLOAD = `rehearse: yes
uploadEach: ["cp CERT_FILE HERE/web/DOMAIN.KEY_TYPE.pem && cp KEY_FILE HERE/web/DOMAIN.KEY_TYPE.key"]`;
export const RELOAD = `update: ["kill -HUP $(cat HERE/web/pid)"]`;

export interface Site extends AsyncDisposable {
  readonly bed: Bed;
  readonly port: number;
  /** The files that nginx serves, by name. */
  save(): Record<string, string>;
  /** Writes such files and reloads nginx. */
  restore(files: Readonly<Record<string, string>>): Promise<void>;
  reload(): Promise<void>;
  /** Waits until the present files are served. */
  settle(): Promise<void>;
  /** Starts another nginx, which keeps serving the present files; returns its port. */
  startStale(): Promise<number>;
  run(options?: Parameters<Bed["run"]>[0]): Promise<Ran>;
}

/** Starts a site. PORT in the actions is replaced by the port of nginx; the first certificates are `age` days old. */
export async function startSite({
  actions = `[default]\n${UPLOAD}\n${RELOAD}\nverify: ["127.0.0.1:PORT#DOMAIN"]`,
  domains = "www.example.com",
  settings = "verifyWait: 30",
  keyTypes = ["ec"],
  age = 0,
}: {
  actions?: string;
  domains?: string;
  settings?: string;
  keyTypes?: readonly KeyType[];
  age?: number;
} = {}): Promise<Site> {
  const mode: Mode = "prod";
  await using stack = new AsyncDisposableStack();
  const own = `keyTypes: ${keyTypes.join(" ")}\nari: no\ncommandTimeout: 10\n`;
  const bed = stack.use(await testBed({ domains, settings: own + settings }));
  const web = join(bed.home, "web");
  await Deno.mkdir(web);
  await bed.plant({ mode, age });
  const names = keyTypes.map((type) => `www.example.com.${type}`);
  const tag = { rsa: "rsa2048", ec: "prime256v1" };
  for (const type of keyTypes) {
    for (const [directory, what, end] of [["cert", "cert-combined", "pem"], ["key", "key", "key"]]) {
      const from = bed.path(mode, directory!, `www.example.com-${what}.${tag[type]}.pem`);
      await Deno.copyFile(from, join(web, `www.example.com.${type}.${end}`));
    }
  }
  const start = async (directory: string, port: number) => {
    const listen = `listen 127.0.0.1:${port} ssl; listen 127.0.0.2:${port} ssl;`;
    return await startNginx(directory, port, (pair) => `server { ${listen} ${pair(...names)} }`);
  };
  const port = freePort();
  const { child } = stack.use(await start(web, port));
  await Deno.writeTextFile(join(web, "pid"), String(child.pid));
  bed.act(actions.replaceAll("PORT", String(port)));
  const open = stack.move();
  const site: Site = {
    bed,
    port,
    save() {
      const files = names.flatMap((name) => [`${name}.pem`, `${name}.key`]);
      return Object.fromEntries(files.map((name) => [name, Deno.readTextFileSync(join(web, name))]));
    },
    async restore(texts) {
      for (const [name, text] of Object.entries(texts)) await Deno.writeTextFile(join(web, name), text);
      await site.reload();
    },
    async reload() {
      child.kill("SIGHUP");
      await site.settle();
    },
    async settle() {
      const { fingerprint } = readCertificate(await Deno.readTextFile(join(web, `${names.at(-1)}.pem`)));
      await until("nginx has the new file", async () => await shown(port) === fingerprint, 30);
      // a worker with the old file takes connections for 100 ms more
      const children = `cat /proc/${child.pid}/task/*/children`;
      await until("one worker", async () => {
        return (await output(["/bin/sh", "-c", children])).stdout.trim().split(" ").length === 1;
      });
    },
    async startStale() {
      const [directory, stale] = [join(bed.home, "stale"), freePort()];
      await Deno.mkdir(directory);
      for (const [name, text] of Object.entries(site.save())) {
        await Deno.writeTextFile(join(directory, name), text);
      }
      open.use(await start(directory, stale));
      return stale;
    },
    run: (options) => bed.run({ mode, ...options }),
    [Symbol.asyncDispose]: () => open.disposeAsync(),
  };
  return site;
}

/** A server that forwards each connection to the next of the ports in turn, and counts them. */
export async function startBalancer(...ports: readonly number[]) {
  const counts = { connections: 0 };
  const server = await tcpServer((client) => {
    const upstream = connect(ports[counts.connections++ % ports.length]!, "127.0.0.1");
    upstream.on("error", () => client.destroy());
    client.on("error", () => upstream.destroy());
    client.pipe(upstream).pipe(client);
  });
  return Object.assign(server, { counts });
}

/** The fingerprint of the certificate that openssl gets at a port of loopback; the EC one if there are two. */
async function shown(port: number): Promise<string> {
  const options = ["-connect", `127.0.0.1:${port}`, "-servername", "www.example.com"];
  const { stdout } = await output(["openssl", "s_client", ...options]);
  const pem = /-----BEGIN[^-]*-----[^-]*-----END[^-]*-----/.exec(stdout)?.[0];
  return pem === undefined ? "" : readCertificate(pem).fingerprint;
}
