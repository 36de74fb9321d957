/** Tests that mostly wait, each with its own servers, run in parallel as steps of one test of their file. */

import assert from "node:assert/strict";
import { limit } from "../lib/context.ts";
import { which } from "./bench-measure.ts";

/** Returns a replacement for Deno.test(): at most `most` tests run at once; one that is `lacking` something is skipped. */
export function together(name: string, most = 4) {
  const steps: Deno.TestStepDefinition[] = [];
  const inTurn = limit(most);
  const sanitizers = { sanitizeOps: false, sanitizeResources: false, sanitizeExit: false };
  Deno.test({
    name,
    ...sanitizers,
    async fn(t) {
      const passed = await Promise.all(steps.map((step) => t.step(step)));
      assert(passed.every((ok, index) => ok || steps[index]!.ignore));
    },
  });
  return (name: string, fn: () => Promise<void>, lacking?: string): void => {
    if (lacking !== undefined) console.log(`${name} is not tested: ${lacking}`);
    steps.push({ name, ignore: lacking !== undefined, fn: () => inTurn(fn), ...sanitizers });
  };
}

/** What of these programs is not installed, in words. */
export function lackOf(...programs: readonly string[]): string | undefined {
  const missing = programs.filter((program) => which(program) === undefined);
  return missing.length === 0 ? undefined : `${missing.join(", ")} not installed`;
}
