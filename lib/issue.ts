/**
 * One line of `domains` becomes its certificates, in the order of RFC 8555 §7.4: order, authorizations, finalize,
 * download.
 *
 * The names of a line are proven once. Its key types follow each other to the point where their order is ready and then
 * go on side by side; their keys and CSRs are made while the CA is waited for. What it returns has been checked against
 * what was asked for; putting it in place is not done here.
 */

import {
  type AcmeClient,
  AcmeError,
  type Authorization,
  describe,
  type Order,
  ORDER_DEADLINE_MS,
} from "./acme.ts";
import type { Challenges } from "./challenge.ts";
import type { Line } from "./config.ts";
import { type Context, settled } from "./context.ts";
import type { Due, Task } from "./plan.ts";
import type { Issued } from "./store.ts";
import { ChainError, checkChain, rootOf } from "./x509.ts";

/** A private key in PEM and the CSR that it signed. */
export interface KeyAndCsr {
  readonly keyPem: string;
  readonly csr: { readonly der: Uint8Array; readonly pem: string };
}

/** What issuing needs of the run. */
export interface Issuing {
  readonly client: AcmeClient;
  readonly challenges: Challenges;
  readonly context: Context;
  /** What is handed to the CA for a certificate. */
  request(due: Due): Promise<KeyAndCsr>;
  /** Identifier of the certificate that this one replaces (RFC 9773 §5), where the same account ordered it. */
  replaces(due: Due): string | undefined;
  /** Common name of the root whose chain is wanted; without it the CA's default. */
  readonly preferredChain?: string;
}

/** Starts the certificates of one line; one promise for each that is due, in that order. */
export function issueLine(task: Task, issuing: Issuing): Promise<Issued>[] {
  let proven: Promise<unknown> = Promise.resolve();
  return task.due.map((due) => {
    const request = issuing.request(due);
    request.catch(() => {}); // looked at when the order is ready, if ever
    const ready = proven.then(async () => {
      await Promise.race([request, undefined]); // that a key is there and cannot be read shows at once, before an order is made
      return await readyOrder(task.line, due, issuing);
    });
    proven = ready;
    return ready.then(async (order) => await certificate(task.line, order, await request, issuing));
  });
}

/** An order whose names have all been proven. */
async function readyOrder(
  line: Line,
  due: Due,
  { client, challenges, context, replaces }: Issuing,
): Promise<Order> {
  let order = await client.newOrder(line.names, { profile: line.profile, replaces: replaces(due) });
  if (order.status !== "pending") return order;
  const account = { key: client.key, url: await client.account() };
  const authorizations = await settled(order.authorizations.map((url) => client.getAuthorization(url)));
  let pending: readonly Authorization[] = authorizations.filter((authorization) =>
    isPending(authorization, line)
  );
  do {
    // the CA is told of none before all are there: where one cannot be made so, the others vanish with it, and a CA
    // that was looking for them by then would count failures
    await using presented = await challenges.present(pending, account);
    const { answers, later } = presented;
    await settled(
      answers.map(({ authorization, challenge }) => client.respondToChallenge(authorization, challenge)),
    );
    if (later.length === 0) order = await client.awaitValidation(order);
    else await settled(answers.map(({ authorization }) => validated(authorization, client, context)));
    pending = later;
  } while (pending.length > 0);
  if (order.status === "invalid") throw await validationError(order, client);
  return order;
}

/** Waits until an authorization is valid, with others of its order still to be proven. */
async function validated({ url, name }: Authorization, client: AcmeClient, context: Context): Promise<void> {
  const deadline = context.now().getTime() + ORDER_DEADLINE_MS;
  for (let pause = 250;; pause = Math.min(2 * pause, 5_000)) {
    const { status, challenges } = await client.getAuthorization(url);
    if (status === "valid") return;
    const { error } = challenges.find(({ error }) => error !== undefined) ?? {};
    if (status !== "pending" || context.now().getTime() > deadline) {
      const why = error ? describe(error) : `the authorization is ${status}`;
      throw new AcmeError("validate", `${name}: ${why}`, url, { problem: error, spent: true });
    }
    await context.sleep(pause);
  }
}

function isPending(authorization: Authorization, line: Line): boolean {
  const { name, status, url } = authorization;
  if (!line.names.includes(name)) {
    throw new AcmeError("read an authorization", `the CA asks for ${name}, which was not ordered`, url);
  }
  switch (status) {
    case "pending":
      return true;
    case "valid": // proven before and remembered by the CA
      return false;
    case "invalid":
    case "deactivated":
    case "expired":
    case "revoked":
      throw new AcmeError("read an authorization", `the authorization of ${name} is ${status}`, url);
    default:
      return status satisfies never;
  }
}

/** Why an order became invalid: the errors of its challenges, which say more than the order does. */
async function validationError(order: Order, client: AcmeClient): Promise<AcmeError> {
  const authorizations = await settled(order.authorizations.map((url) => client.getAuthorization(url)));
  const failures = authorizations.flatMap(({ name, challenges }) =>
    challenges.flatMap(({ error }) => error === undefined ? [] : [`${name}: ${describe(error)}`])
  );
  const [first] = authorizations.flatMap(({ challenges }) => challenges.map(({ error }) => error))
    .filter((error) => error !== undefined);
  const problem = first ?? order.error;
  const message = failures.join("; ") || (order.error ? describe(order.error) : "the order became invalid");
  return new AcmeError("validate", message, order.url, { problem, spent: true });
}

async function certificate(
  line: Line,
  ready: Order,
  { keyPem, csr }: KeyAndCsr,
  issuing: Issuing,
): Promise<Issued> {
  const { client, context } = issuing;
  let order = ready;
  if (order.status === "ready") order = await client.finalizeOrder(order, csr.der);
  switch (order.status) {
    case "valid":
      break;
    case "invalid": {
      const message = order.error ? describe(order.error) : "the order became invalid";
      throw new AcmeError("issue", message, order.url, { problem: order.error, spent: true });
    }
    case "pending":
    case "ready":
    case "processing":
      throw new AcmeError("issue", `the order is ${order.status} after it was finalized`, order.url);
    default:
      order.status satisfies never;
  }
  const received = await chainOf(order, line, issuing);
  try {
    const { leaf, chainPem } = checkChain(received, line.names, keyPem, context.now());
    return { keyPem, csrPem: csr.pem, chainPem, certificate: leaf };
  } catch (error) {
    if (!(error instanceof ChainError)) throw error;
    throw new AcmeError("check the certificate", error.message, order.url, { spent: true });
  }
}

/** The chain that leads to the preferred root, or the default one. */
async function chainOf(
  order: Order,
  line: Line,
  { client, preferredChain, context }: Issuing,
): Promise<string> {
  let first: string | undefined;
  let why = "";
  try {
    for await (const chain of client.downloadChains(order)) {
      first ??= chain;
      if (preferredChain === undefined || rootOf(chain) === preferredChain) return chain;
    }
  } catch (error) {
    // a certificate in hand is not given up for an alternate that cannot be had
    if (first === undefined || !(error instanceof AcmeError)) throw error;
    why = ` (${error.message})`;
  }
  const wanted = JSON.stringify(preferredChain);
  context.warn(`no chain of ${line.names[0]} leads to ${wanted}${why}: the default one is taken`);
  return first!;
}
