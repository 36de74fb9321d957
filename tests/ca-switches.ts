/** All that a test can set in the test CA. */
import type { Fault } from "./ca-wire.ts";

const DAY = 24 * 3600_000;

/** What a certificate of a profile is like. */
export interface Profile {
  readonly lifetimeMs: number;
  readonly maxNames: number;
  readonly ipAddresses: boolean;
  /** Whether the common name of the CSR is taken over. */
  readonly commonName: boolean;
}

/** What is issued by a CA that offers no profiles. */
export const NO_PROFILE: Profile = {
  lifetimeMs: 90 * DAY,
  maxNames: 100,
  ipAddresses: true,
  commonName: true,
};

/** As at Let's Encrypt in the second half of 2026 (https://letsencrypt.org/docs/profiles/). */
const LETS_ENCRYPT: Readonly<Record<string, Profile>> = {
  classic: { ...NO_PROFILE, ipAddresses: false },
  tlsserver: { lifetimeMs: 45 * DAY, maxNames: 25, ipAddresses: false, commonName: false },
  shortlived: { lifetimeMs: 160 / 24 * DAY, maxNames: 25, ipAddresses: true, commonName: false },
};

/** At most `count` in any `windowMs` of the CA's clock. */
export interface Limit {
  readonly count: number;
  readonly windowMs: number;
}

/** The resources, named as in the directory or by what they hold. */
export type Resource =
  | "directory"
  | "newNonce"
  | "newAccount"
  | "newOrder"
  | "revokeCert"
  | "keyChange"
  | "renewalInfo"
  | "account"
  | "authz"
  | "challenge"
  | "order"
  | "finalize"
  | "certificate"
  | "unknown";

/** A request: the n-th of the CA's life, n = 1, 2, … */
export interface Exchange {
  readonly n: number;
  readonly method: string;
  readonly url: string;
  readonly resource: Resource;
}

/** How the CA behaves; a test may change all but `alternateRoots` while it runs. */
export interface Switches {
  /** How many further roots sign the same intermediate, offered as alternate chains. */
  alternateRoots?: number;

  /** Port on which http-01 is fetched instead of 80. */
  httpPort?: number;
  /** Where a name is found on loopback; throws if it does not resolve. Default: 127.0.0.1 and `httpPort`. */
  resolve?: (hostname: string) => { hostname: string; port: number };
  /** The TXT records at a name, for dns-01 and dns-persist-01. */
  txt?: (name: string) => Promise<readonly string[]>;
  /** The target of the CNAME at a name. */
  cname?: (name: string) => Promise<string | undefined>;
  /** Wait before each validation. */
  validationDelayMs?: number;
  /**
   * How far a failed validation goes: to the order (default), to the authorization and no further (acme2certifier), or
   * to the challenge, which stays pending with its error and may be responded to again (step-ca, Caddy).
   */
  failure?: "order" | "authorization" | "challenge";
  /** Which authorizations of the account a new order takes over: none, valid ones (default), or pending ones too. */
  reuse?: "none" | "valid" | "pending";
  /** How long a valid authorization can be taken over. Default 30 days. */
  authorizationLifetimeMs?: number;

  /** How long an order is `processing` after finalize. Default 0: finalize answers `valid`. */
  processingMs?: number;
  /** Retry-After of what is being worked on; polling sooner is a violation. Default: not sent. */
  retryAfterSeconds?: number;
  /** Sends that Retry-After as an HTTP date. */
  retryAfterAsDate?: boolean;

  /** Profiles offered, the first being the default; {} for none. */
  profiles?: Readonly<Record<string, Profile>>;
  /** Issuer domain names, for dns-persist-01. Default ca.example. */
  caaIdentities?: readonly string[];
  /** Whether the directory offers renewalInfo. Default true. */
  renewalInfo?: boolean;
  /** The CA's policy about a name: the reason why it is rejected, or undefined. */
  reject?: (name: string) => string | undefined;
  limits?: {
    /** Orders of an account. */
    newOrder?: Limit;
    /** Requests to a resource within a second, from everybody together. */
    requestsPerSecond?: Partial<Record<Resource, number>>;
  };
  /** Asked about every exchange before it is handled. Whether there is one is fixed at start. */
  fault?: (exchange: Exchange) => Fault | undefined;
}

export const profilesOf = ({ profiles = LETS_ENCRYPT }: Switches) => profiles;
export const issuersOf = ({ caaIdentities = ["ca.example"] }: Switches) => caaIdentities;
