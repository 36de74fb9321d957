/**
 * Everything about the test CA that a test can set. Only words and their defaults live here; what they do is
 * done where it belongs.
 */
import type { Fault } from "./ca-wire.ts";

const SECOND = 1000, HOUR = 3600 * SECOND, DAY = 24 * HOUR;

/** What a certificate of a profile is like. */
export interface Profile {
  readonly description: string;
  readonly lifetimeMs: number;
  readonly maxNames: number;
  readonly ipAddresses: boolean;
  /** Whether the common name of the CSR is taken over. */
  readonly commonName: boolean;
}

/** What is issued by a CA that offers no profiles. */
export const NO_PROFILE: Profile = {
  description: "",
  lifetimeMs: 90 * DAY,
  maxNames: 100,
  ipAddresses: true,
  commonName: true,
};

/** Like those of Let's Encrypt in the second half of 2026 (https://letsencrypt.org/docs/profiles/). */
export const LETS_ENCRYPT_PROFILES: Readonly<Record<string, Profile>> = {
  classic: { ...NO_PROFILE, description: "https://localhost/profiles#classic", ipAddresses: false },
  tlsserver: {
    description: "https://localhost/profiles#tlsserver",
    lifetimeMs: 45 * DAY,
    maxNames: 25,
    ipAddresses: false,
    commonName: false,
  },
  shortlived: {
    description: "https://localhost/profiles#shortlived",
    lifetimeMs: 160 * HOUR,
    maxNames: 25,
    ipAddresses: true,
    commonName: false,
  },
};

/**
 * At most `count` in any `windowMs` of the CA's clock. Retry-After is when the oldest leaves, unless set
 * here.
 */
export interface Limit {
  readonly count: number;
  readonly windowMs: number;
  readonly retryAfterSeconds?: number;
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
  | "orders"
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

/**
 * How the CA behaves. It keeps the very object: a test may change it while the CA runs, unless it says so
 * here.
 */
export interface Switches {
  /** Port to listen on; fixed at start. Default: a free one. */
  port?: number;
  /** Certificates of authorities between root and leaf, 1 or more; fixed at start. Default 1. */
  chainLength?: number;
  /**
   * Further roots that sign the same intermediate, offered as alternate chains; fixed at start. Default 0.
   */
  alternateRoots?: number;

  /** Port on which http-01 is fetched instead of 80. */
  httpPort?: number;
  /**
   * Where a name is found on loopback; throws if the name does not resolve. Default: 127.0.0.1 and
   * `httpPort`.
   */
  resolve?: (hostname: string) => { hostname: string; port: number };
  /** The TXT records at a name, for dns-01 and dns-persist-01. Default: none. */
  txt?: (name: string) => Promise<readonly string[]>;
  /** The target of the CNAME at a name. Default: none. */
  cname?: (name: string) => Promise<string | undefined>;
  /** Wait before each validation. Default 0. */
  validationDelayMs?: number;
  /**
   * How far a failed validation goes: to the order (default), to the authorization and no further (acme2certifier), or to
   * the challenge, which stays pending with its error and may be responded to again (step-ca, Caddy).
   */
  failure?: "order" | "authorization" | "challenge";
  /** How long a validation may wait for an answer. Default 10 s. */
  validationTimeoutMs?: number;
  /**
   * Which authorizations of the account a new order takes over: none, valid ones (default), or pending ones
   * too.
   */
  reuse?: "none" | "valid" | "pending";
  /** How long a valid authorization can be taken over. Default 30 days. */
  authorizationLifetimeMs?: number;

  /**
   * How long an order is `processing` after finalize; Infinity for ever. Default 0: finalize answers `valid`.
   */
  processingMs?: number;
  /** Retry-After of resources that are being worked on; polling sooner is a violation. Default: not sent. */
  retryAfterSeconds?: number;
  /** Sends that Retry-After as an HTTP date. */
  retryAfterAsDate?: boolean;

  /** Profiles offered, the first being the default; {} for none. Default: as Let's Encrypt. */
  profiles?: Readonly<Record<string, Profile>>;
  /** MAC keys (base64url) by key identifier. If set, new accounts must be bound to one of them. */
  externalAccounts?: Readonly<Record<string, string>>;
  /** Issuer domain names, for CAA and dns-persist-01. Default ca.example. */
  caaIdentities?: readonly string[];
  /** Whether the directory offers renewalInfo. Default true. */
  renewalInfo?: boolean;
  /** Retry-After of renewalInfo; asking sooner is a violation. Default 6 hours, as Let's Encrypt. */
  renewalInfoRetryAfterSeconds?: number;
  /** Refuses every `replaces` with this problem. */
  refuseReplaces?: "alreadyReplaced" | "unauthorized" | "malformed";
  /** Refuses P-521 in certificates, as Let's Encrypt does. Default false. */
  refuseP521?: boolean;
  /** The CA's policy about a name: the reason why it is rejected, or undefined. */
  reject?: (name: string) => string | undefined;
  limits?: {
    /** Orders of an account. */
    newOrder?: Limit;
    /** Failed validations of a name in an account. */
    failedValidations?: Limit;
    /** Certificates for exactly the same names. */
    sameNames?: Limit;
    /** Requests to a resource within a second, from everybody together. */
    requestsPerSecond?: Partial<Record<Resource, number>>;
  };
  /** Asked about every exchange before it is handled. Whether there is one is fixed at start. */
  fault?: (exchange: Exchange) => Fault | undefined;
}
