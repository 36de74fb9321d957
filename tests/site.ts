/** A site: a bed with an nginx that serves the certificates of www.example.com, by the files that lematt delivers. */

import { join } from "node:path";
import { probe } from "../lib/probe.ts";
import { readCertificate } from "../lib/x509.ts";
import { type Bed, testBed, until } from "./bed.ts";
import { output } from "./programs.ts";
import { startHttps } from "./tls.ts";

export const NAME = "www.example.com";

export const UPLOAD =
  `uploadEach: ["cp CERT_FILE HERE/web/DOMAIN.KEY_TYPE.pem && cp KEY_FILE HERE/web/DOMAIN.KEY_TYPE.key"]`;
export const RELOAD = `update: ["kill -HUP $(cat HERE/web/pid)"]`;
export const VERIFY = `verify: ["127.0.0.1:PORT#${NAME}"]`;
export const ACTIONS = `[default]\n${UPLOAD}\n${RELOAD}\n${VERIFY}\n`;

export type Options = Parameters<Bed["run"]>[0];
export type Site = Awaited<ReturnType<typeof startSite>>;

/**
 * A bed with an nginx that serves the certificate of www.example.com by the files that lematt delivers; the first one is
 * `age` days old. PORT in actions is replaced by its port. Whenever a run waits, nginx finishes its reload.
 */
export async function startSite({ actions = ACTIONS, age = 0, domains = NAME } = {}) {
  await using stack = new AsyncDisposableStack();
  const bed = stack.use(await testBed({ domains, settings: "keyTypes: ec\nari: no" }));
  const web = join(bed.home, "web");
  await Deno.mkdir(web);
  await bed.plant({ mode: "prod", age });
  const [cert, key] = [`cert/${NAME}-cert-combined`, `key/${NAME}-key`];
  await Deno.copyFile(bed.path(`prod/${cert}.prime256v1.pem`), join(web, `${NAME}.ec.pem`));
  await Deno.copyFile(bed.path(`prod/${key}.prime256v1.pem`), join(web, `${NAME}.ec.key`));
  const { child, port } = stack.use(await startHttps(web, `${NAME}.ec`));
  await Deno.writeTextFile(join(web, "pid"), `${child.pid}`);
  const served = () => Deno.readTextFileSync(join(web, `${NAME}.ec.pem`));
  const copy = (from: string, to: string) => {
    for (const end of ["pem", "key"]) {
      Deno.copyFileSync(join(web, `${from}.${end}`), join(web, `${to}.${end}`));
    }
  };
  const settle = async () => {
    const { fingerprint } = readCertificate(served());
    const endpoint = { text: "nginx", host: "127.0.0.1", port, sni: NAME };
    await until("nginx has the new file", async () => {
      const [sight] = await probe([{ endpoint, keyType: "ec" }], bed.context());
      return sight!.certificate?.fingerprint === fingerprint;
    });
    // a worker with the old file takes connections for 100 ms more
    const children = ["/bin/sh", "-c", `cat /proc/${child.pid}/task/*/children`];
    await until("one worker", async () => /^\d+ ?$/.test((await output(children)).stdout));
  };
  const act = (text: string) => bed.act(text.replaceAll("PORT", `${port}`));
  const sleep = async (ms: number) => {
    await settle();
    bed.ca.advance(ms);
  };
  const run = (options: Options = {}) => bed.run({ mode: "prod", sleep, ...options });
  const restore = async (file: string) => {
    copy(file, `${NAME}.ec`);
    child.kill("SIGHUP");
    await settle();
  };
  const save = (file: string) => copy(`${NAME}.ec`, file);
  act(actions);
  const open = stack.move();
  const close = () => open.disposeAsync();
  return { bed, port, web, act, run, served, save, restore, settle, [Symbol.asyncDispose]: close };
}
