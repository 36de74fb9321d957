/** Goal: a test fails if lematt sends a request that a correct client never sends. */
import assert from "node:assert/strict";
import type { Context } from "../lib/context.ts";
import { testBed } from "./bed.ts";

/** Sends matching requests twice. */
const twice = (matches: RegExp) => ({ fetch }: Context): Partial<Context> => ({
  async fetch(url, init) {
    if (matches.test(`${init.method} ${url}`)) await (await fetch(url, init)).text();
    return await fetch(url, init);
  },
});

const WRONG: Record<string, (context: Context) => Partial<Context>> = {
  badNonce: twice(/^POST/),
  tooSoon: twice(/renewalInfo/),
  malformed: ({ fetch }) => ({
    fetch: (url, { body, ...init }) =>
      fetch(url, { ...init, body: body && `${body}`.replace('"payload":"', "$&e30") }),
  }),
};

Deno.test("a bed fails on a nonce that is used twice, a broken JWS, and a request before Retry-After", async () => {
  for (const [violation, changes] of Object.entries(WRONG)) {
    await assert.rejects(async () => {
      await using bed = await testBed({ domains: "example.com", settings: "keyTypes: ec" });
      for (let n = 0; n < 2; n++) await bed.run(changes(bed.context()));
    }, new RegExp(`type: '${violation}'`));
  }
});
