/**
 * How the test CA says no: problem documents (RFC 7807, RFC 8555 §6.7).
 *
 * Two kinds of refusal are kept apart. A `mistake` is something a correct client never does; the CA notes it
 * in `ca.violations`, which tests expect to be empty. A `refusal` is the CA's own decision (limits, policy, a
 * lost nonce, a name that does not validate) and befalls correct clients too.
 */

/** An identifier as it stands in orders and authorizations (RFC 8555 §9.7.7, RFC 8738). */
export interface Identifier {
  readonly type: "dns" | "ip";
  readonly value: string;
}

/** The JSON form of a problem, as it stands in answers, orders and challenges. */
export interface ProblemDocument {
  type: string;
  detail: string;
  status?: number;
  identifier?: Identifier;
  subproblems?: ProblemDocument[];
  algorithms?: string[];
}

const URN = "urn:ietf:params:acme:error:";

/** A refusal on its way to the client; `headers` go with the answer. */
export class Problem extends Error {
  override readonly name = "Problem";
  readonly document: ProblemDocument;
  constructor(
    readonly clientsFault: boolean,
    readonly status: number,
    /** Without the URN prefix. */
    readonly type: string,
    detail: string,
    extra: Partial<ProblemDocument> = {},
    readonly headers: Readonly<Record<string, string>> = {},
  ) {
    super(`${type}: ${detail}`);
    this.document = { type: URN + type, detail, status, ...extra };
  }
}

/** What a correct client never provokes. `type` without the URN prefix. */
export function mistake(
  status: number,
  type: string,
  detail: string,
  extra?: Partial<ProblemDocument>,
): Problem {
  return new Problem(true, status, type, detail, extra);
}

/** What can happen to a correct client as well. `type` without the URN prefix. */
export function refusal(
  status: number,
  type: string,
  detail: string,
  extra?: Partial<ProblemDocument>,
  headers?: Record<string, string>,
): Problem {
  return new Problem(false, status, type, detail, extra, headers);
}
