/** Goal: a test fails if lematt sends a request that a correct client never sends. */
import assert from "node:assert/strict";
import { setTimeout as delay } from "node:timers/promises";
import type { Context } from "../lib/context.ts";
import { testBed } from "./bed.ts";

const ca = { processingMs: 100, retryAfterSeconds: 9 };
const WRONG: Record<string, (context: Context) => Partial<Context>> = {
  badNonce: ({ fetch }) => ({
    async fetch(url, init) {
      if (init.method === "POST") await (await fetch(url, init)).text();
      return await fetch(url, init);
    },
  }),
  malformed: ({ fetch }) => ({
    fetch: (url, { body, ...init }) =>
      fetch(url, { ...init, body: body && `${body}`.replace('"payload":"', "$&e30") }),
  }),
  tooSoon: () => ({ sleep: () => delay(5) }),
};

Deno.test("a bed fails on a nonce that is used twice, a broken JWS, and polling before Retry-After", async () => {
  for (const [violation, changes] of Object.entries(WRONG)) {
    await assert.rejects(async () => {
      await using bed = await testBed({ domains: "example.com", settings: "keyTypes: ec", ca });
      await bed.run(changes(bed.context()));
    }, new RegExp(`type: '${violation}'`));
  }
});
