/**
 * lematt with step-ca: a CA that leaves orders pending after a failed validation, offers neither key change nor renewal
 * information, and issues for a day.
 */

import { lifeCycle } from "./cas.ts";
import { lackOf } from "./programs.ts";
import { freePort } from "./tls.ts";

const lack = lackOf("step-ca", "openssl");
const name = "certificates are issued, renewed and revoked by step-ca, and a failed validation is reported";
if (lack !== undefined) console.log(`${name} is not tested: ${lack}`);
Deno.test({ name, ignore: lack !== undefined }, async () => {
  await lifeCycle("step-ca", { ca: freePort(), dns: 0, http: 0 });
});
