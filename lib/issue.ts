/**
 * One line of `domains` becomes its certificates, in the order of RFC 8555 §7.4: order, authorizations, finalize,
 * download.
 *
 * The names of a line are proven once. Its key types follow each other to the point where their order is ready and then
 * go on side by side; their keys and CSRs are made while the CA is waited for. What it returns has been checked against
 * what was asked for; putting it in place is not done here.
 */

import { type AcmeClient, AcmeError, type Authorization, describe, type Order } from "./acme.ts";
import type { Challenges } from "./challenge.ts";
import type { Line } from "./config.ts";
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
  now(): Date;
  /** What is handed to the CA for a certificate. */
  request(due: Due): Promise<KeyAndCsr>;
  /** Identifier of the certificate that this one replaces (RFC 9773 §5), where the same account ordered it. */
  replaces(due: Due): string | undefined;
  /** Common name of the root whose chain is wanted; without it the CA's default. */
  readonly preferredChain?: string;
  /** Told of what is odd but stops nothing. */
  warn(text: string): void;
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
async function readyOrder(line: Line, due: Due, { client, challenges, replaces }: Issuing): Promise<Order> {
  let order = await client.newOrder(line.names, { profile: line.profile, replaces: replaces(due) });
  if (order.status === "pending") {
    await using answers = new AsyncDisposableStack();
    const account = await client.account();
    const authorizations = await settled(order.authorizations.map((url) => client.getAuthorization(url)));
    const pending = authorizations.filter((authorization) => isPending(authorization, line));
    // the CA is told of none before all are there: where one cannot be made so, the others vanish with it, and a CA
    // that was looking for them by then would count failures
    const answered = await settled(pending.map(async (authorization) => {
      const { challenge } = answers.use(await challenges.present(authorization, client.key, account));
      return { authorization, challenge };
    }));
    await settled(
      answered.map(({ authorization, challenge }) => client.respondToChallenge(authorization, challenge)),
    );
    order = await client.awaitValidation(order);
    if (order.status === "invalid") throw await validationError(order, client);
  }
  return order;
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
  const { client, now } = issuing;
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
    const { leaf, chainPem } = checkChain(received, line.names, keyPem, now());
    return { keyPem, csrPem: csr.pem, chainPem, certificate: leaf };
  } catch (error) {
    if (!(error instanceof ChainError)) throw error;
    throw new AcmeError("check the certificate", error.message, order.url, { spent: true });
  }
}

/** The chain that leads to the preferred root, or the default one. */
async function chainOf(order: Order, line: Line, { client, preferredChain, warn }: Issuing): Promise<string> {
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
  warn(`no chain of ${line.names[0]} leads to ${wanted}${why}: the default one is taken`);
  return first!;
}

/** All of the values, or the first error once every promise has come to its end, so that nothing goes on behind it. */
async function settled<T>(promises: readonly Promise<T>[]): Promise<T[]> {
  const results = await Promise.allSettled(promises);
  return results.map((result) => {
    if (result.status === "rejected") throw result.reason;
    return result.value;
  });
}
