/** Renewal information (RFC 9773): asks the CA when certificates should be renewed. renewal.ts decides. */

import type { AccountOptions, CaAccount } from "./account.ts";
import type { AcmeClient } from "./acme.ts";
import { type Context, limit } from "./context.ts";
import { AcmeError, isProblem, messageOf } from "./http.ts";
import type { Entry, Store } from "./store.ts";

const MINUTE_MS = 60_000, HOUR_MS = 60 * MINUTE_MS, DAY_MS = 24 * HOUR_MS;
/** RFC 9773 §4.3.2: bounds of Retry-After. Its default is ours (the RFC's is six hours): runs every six hours meet it. */
const SOONEST_ASK_MS = MINUTE_MS, LATEST_ASK_MS = DAY_MS, USUAL_ASK_MS = 5 * HOUR_MS;

/** The identifier of the certificate on disk (RFC 9773 §4.1), if it has one. */
export function certificateIdOf({ finding }: Entry): string | undefined {
  return "certificate" in finding ? finding.certificate.id : undefined;
}

/**
 * Asks for the renewal window of each certificate, unless it is too early to ask again, and puts a random time within it in
 * the state. Errors are warnings: then the earlier window or the dates of the certificate decide.
 */
export async function askRenewalWindows(
  inventory: readonly Entry[],
  account: CaAccount,
  { config, store, context, parallel }: AccountOptions,
): Promise<void> {
  const { state } = store;
  const now = context.now();
  const without = state.withoutRenewalInfo[config.directoryUrl];
  if (!config.ari || (without !== undefined && now.getTime() - Date.parse(without) < DAY_MS)) return;
  const valid = inventory.filter(({ finding }) =>
    finding.kind === "present" && finding.certificate.notAfter > now
  );
  const nameless = valid.filter((entry) => certificateIdOf(entry) === undefined);
  const due = valid.filter((entry) => {
    const id = certificateIdOf(entry);
    const { account: orderedBy, askAt } = state.renewals[id ?? ""] ?? {};
    const isOurs = orderedBy === undefined || orderedBy.startsWith(`${config.directoryUrl} `); // not another CA's
    return id !== undefined && isOurs && !(new Date(askAt ?? 0) > now);
  });
  if (due.length + nameless.length === 0) return;
  let client: AcmeClient;
  try {
    client = await account.connect(true);
  } catch (error) {
    context.signal.throwIfAborted();
    return context.warn(`cannot ask the CA when to renew: ${messageOf(error)}`);
  }
  if (client.directory.renewalInfo === undefined) {
    state.withoutRenewalInfo[config.directoryUrl] = now.toISOString();
    return await store.saveState();
  }
  delete state.withoutRenewalInfo[config.directoryUrl];
  const warn = ({ line, keyType }: Entry, text: string) =>
    context.warn(`${line.names[0]} (${keyType}): ${text}`);
  for (const entry of nameless) {
    warn(entry, "cannot ask when to renew: it has no authority key identifier; its dates decide");
  }
  let isUp = true;
  const slot = limit(parallel);
  await Promise.all(due.map((entry) =>
    slot(async () => {
      if (!isUp || context.signal.aborted) return;
      const id = certificateIdOf(entry)!;
      try {
        await askRenewalWindow(id, client, store, context);
      } catch (error) {
        if (!isUp || context.signal.aborted) return;
        const isKnown = state.renewals[id]?.window !== undefined;
        warn(entry, `${messageOf(error)}; ${isKnown ? "the earlier answer decides" : "its dates decide"}`);
        // a service that is down is not asked about every certificate; the next run does
        isUp = !(error instanceof AcmeError && error.isTransient) && !isProblem(error, "rateLimited");
      }
    })
  ));
  await store.saveState();
}

/** Throws AcmeError; the state has the time of the next request then, and keeps the earlier window. */
async function askRenewalWindow(
  id: string,
  client: AcmeClient,
  { state }: Store,
  context: Context,
): Promise<void> {
  const renewal = state.renewals[id] ??= {};
  const later = (ms: number) => new Date(context.now().getTime() + ms).toISOString();
  renewal.askAt = later(USUAL_ASK_MS);
  const { start, end, explanationUrl, retryAfter } = await client.renewalInfo(id);
  const wait = retryAfter === undefined ? USUAL_ASK_MS : retryAfter.getTime() - context.now().getTime();
  renewal.askAt = later(Math.min(Math.max(wait, SOONEST_ASK_MS), LATEST_ASK_MS));
  const window = { start: start.toISOString(), end: end.toISOString() };
  // drawn once for each window: drawn in every run, the times would gather at its end
  const drawn = renewal.window?.start === window.start && renewal.window.end === window.end
    ? renewal.window.at
    : new Date(start.getTime() + context.random() * (end.getTime() - start.getTime())).toISOString();
  renewal.window = { ...window, at: drawn, explanationUrl };
}
