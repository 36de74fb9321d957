/**
 * Which endpoints to probe, and what it means that an endpoint serves this certificate: the newest one, drift, or a
 * problem for a person.
 *
 * Pure; the probes are made by probe.ts.
 */

import type { Config, Endpoint, Line, Section } from "./config.ts";
import { covers, isIP, wildcardOf } from "./names.ts";
import type { Target } from "./probe.ts";
import { type Basis, HOUR_MS, type Selection } from "./renewal.ts";
import type { ProbeRecord, Sight } from "./state.ts";
import type { Entry } from "./store.ts";

/** An endpoint to probe for one key type, and what is known of it. */
export interface EndpointStatus extends Target {
  /** What it is remembered by: `host:port/starttls#name keyType`. */
  readonly key: string;
  /** The sections that name it. */
  readonly sections: readonly Section[];
  /** The certificates of which one must be served. */
  readonly wanted: readonly Entry[];
  readonly record?: ProbeRecord;
  /** What each address served when it was last probed. */
  readonly sights: readonly JudgedSight[];
  /** Whether this run has to probe it. */
  readonly due: boolean;
}

export type JudgedSight = Sight & { readonly verdict: Verdict };

/** What a sight means. The first three are drift: certainly ours and certainly wrong. */
export type Verdict =
  /** an earlier certificate of the line, from the same CA */
  | "older"
  /** expired or self-signed, for the right names */
  | "invalid"
  /** lematt's own staging certificate */
  | "staging"
  | "current"
  /** a finished handshake, which is all that a rehearsal asks for */
  | "answers"
  /** valid for the name, but newer or from elsewhere */
  | "foreign"
  /** for other names */
  | "mismatched"
  /** the server has no certificate of this key type */
  | "refused"
  /** the server showed a certificate and did not finish the handshake */
  | "unfinished"
  | "unreachable"
  /** this host lacks the address family */
  | "passed over";

const GOOD: readonly Verdict[] = ["current", "answers", "passed over"];
const DRIFT: readonly Verdict[] = ["older", "invalid", "staging"];
/** No finished handshake for this key type. */
const SILENT: readonly Verdict[] = ["refused", "unfinished", "unreachable"];

/** A good probe is repeated after this time: in every run, if runs are six hours apart. */
const GOOD_PROBE_MS = 5 * HOUR_MS;

// ---- which endpoints ------------------------------------------------------------------------------------

/** The endpoints of these sections, each once. */
export function planEndpoints(basis: Basis, sections: readonly Section[]): EndpointStatus[] {
  const { config, certificates, state, now, options: { selection, rehearsedAt } } = basis;
  const { byName } = indexOf(config);
  const ownersOf = (name: string) => [name, wildcardOf(name)].flatMap((known) => byName.get(known) ?? []);
  const found = new Map<string, { target: Target; sections: Set<Section>; wanted: Set<Entry> }>();
  for (const section of sections.filter(({ verify }) => verify.length > 0)) {
    const own = linesOf(config, section).filter((line) => inScope(selection, line, section));
    for (const { endpoint, lines } of own.flatMap((line) => placesOf(section, line, ownersOf))) {
      for (const keyType of section.keyTypes) {
        const wanted = lines.flatMap((line) => certificates.get(line) ?? [])
          .filter((entry) => entry.keyType === keyType && inUse(entry) !== undefined);
        if (wanted.length === 0) continue;
        const key = `${endpoint.text} ${keyType}`;
        const known = found.get(key) ??
          { target: { endpoint, keyType }, sections: new Set(), wanted: new Set() };
        found.set(key, known);
        known.sections.add(section);
        for (const entry of wanted) known.wanted.add(entry);
      }
    }
  }
  return [...found].map(([key, { target, ...sets }]) => {
    const [sections, wanted] = [[...sets.sections], [...sets.wanted]];
    const record = state.probes[key];
    const sights = (record?.sights ?? []).map((sight) => ({
      ...sight,
      verdict: verdictOn(sight, { ...target, wanted }, basis),
    }));
    const status = { ...target, key, sections, wanted, record, sights };
    const probedAt = new Date(record?.at ?? 0);
    const isOld = now.getTime() - probedAt.getTime() > GOOD_PROBE_MS || (rehearsedAt?.() ?? 0) > probedAt;
    return { ...status, due: isOld || !isRight(status) };
  });
}

/** Whether a run that is restricted delivers this line in this section. */
export function inScope(selection: Selection | undefined, line: Line, section: Section): boolean {
  return selection === undefined || selection.lines.has(line) || selection.sections.has(section.name);
}

/** Where to probe, and the lines of which a certificate must be served there. */
interface Place {
  readonly endpoint: Endpoint;
  readonly lines: readonly Line[];
}

/**
 * The endpoints of a section with the names of a line for DOMAIN and DOMAINS_ALL. An endpoint whose name is on no line
 * is probed with the first name of this line.
 */
function placesOf(section: Section, line: Line, ownersOf: (name: string) => readonly Line[]): Place[] {
  const names = line.names.filter((name) => !name.startsWith("*."));
  const namesFor = (word: string) => {
    if (word === "DOMAIN") return names.slice(0, 1);
    return word === "DOMAINS_ALL" ? names : [word];
  };
  const serverNames = ({ host: word, sni }: Endpoint, host: string) => {
    if (sni === undefined) return [undefined];
    return sni === word ? [host] : namesFor(sni); // the same word on both sides is the same name
  };
  return section.verify.flatMap((endpoint) =>
    namesFor(endpoint.host).flatMap((host) =>
      serverNames(endpoint, host).map((given) => {
        const owners = ownersOf(given ?? host);
        if (owners.length > 0) return { endpoint: withNames(endpoint, host, given), lines: owners };
        const name = serverNameFor(line);
        return {
          endpoint: withNames(endpoint, host, name),
          lines: name === undefined ? [line] : ownersOf(name),
        };
      })
    )
  );
}

function withNames(endpoint: Endpoint, host: string, name: string | undefined): Endpoint {
  const { port, starttls } = endpoint;
  const sni = name === undefined || isIP(name) ? undefined : name; // RFC 6066 §3
  const bracketed = isIP(host) === 6 ? `[${host}]` : host;
  const protocol = starttls === undefined ? "" : `/${starttls}`;
  const text = `${bracketed}:${port}${protocol}${sni === undefined ? "" : `#${sni}`}`;
  return { ...endpoint, text, host, sni };
}

/** A name by which a server finds the certificate of a line; undefined if the line has addresses alone. */
function serverNameFor({ names }: Line): string | undefined {
  const all = names.filter((name) => !isIP(name));
  return all.find((name) => !name.startsWith("*.")) ?? all[0]?.replace("*", "www");
}

interface Index {
  readonly byName: ReadonlyMap<string, readonly Line[]>;
  readonly bySection: ReadonlyMap<Section, readonly Line[]>;
}

/** Of each configuration, which never changes: a search through thousands of lines takes too long. */
const indexes = new WeakMap<Config["lines"], Index>();

function indexOf({ lines }: Config): Index {
  const known = indexes.get(lines);
  if (known !== undefined) return known;
  const index = {
    byName: groupBy(lines.flatMap((line) => line.names.map((name) => [name, line] as const))),
    bySection: groupBy(lines.flatMap((line) => line.sections.map((section) => [section, line] as const))),
  };
  indexes.set(lines, index);
  return index;
}

export function linesOf(config: Config, section: Section): readonly Line[] {
  return indexOf(config).bySection.get(section) ?? [];
}

/** Map.groupBy() of pairs: key and member. */
export function groupBy<K, V>(pairs: Iterable<readonly [K, V]>): Map<K, V[]> {
  const groups = new Map<K, V[]>();
  for (const [key, value] of pairs) {
    const group = groups.get(key);
    if (group === undefined) groups.set(key, [value]);
    else group.push(value);
  }
  return groups;
}

// ---- what is served -------------------------------------------------------------------------------------

/** What it means that an endpoint serves this. */
function verdictOn(
  sight: Sight,
  { endpoint, wanted }: Pick<EndpointStatus, "endpoint" | "wanted">,
  { config: { mode }, now, options: { counterpart = () => [] } }: Basis,
): Verdict {
  if (sight.kind !== "served") return sight.kind;
  const served = sight.certificate!;
  const right = wanted.map(inUse).filter((certificate) => certificate !== undefined);
  const isOurs = right.some(({ fingerprint }) => fingerprint === served.fingerprint);
  const lines = wanted.map(({ line }) => line);
  if (mode === "test") {
    if (!isOurs) return "answers"; // endpoints keep serving production
    const ours = new Set(lines.map(({ names }) => names.join()));
    const isProduced = counterpart().some((entry) => ours.has(entry.line.names.join()) && inUse(entry));
    return isProduced ? "staging" : "current";
  }
  if (isOurs) return "current";
  if (counterpart().some((entry) => inUse(entry)?.fingerprint === served.fingerprint)) return "staging";
  const name = endpoint.sni ?? endpoint.host;
  const names = lines.some((line) => covers(new Set(line.names), name))
    ? [name]
    : lines.flatMap(({ names }) => names);
  const covered = new Set(served.names);
  if (!names.some((name) => covers(covered, name))) return "mismatched";
  if (served.selfSigned || new Date(served.notAfter) <= now) return "invalid";
  const isOlder = right.some((certificate) =>
    certificate.issuer === served.issuer && new Date(served.notBefore) < certificate.notBefore
  );
  return isOlder ? "older" : "foreign";
}

/** The certificate that may be served for an entry: not one that is revoked, for other names or without its key. */
export function inUse({ finding, former }: Entry) {
  return finding.kind === "present" ? finding.certificate : former?.certificate;
}

export function isGood({ verdict }: JudgedSight): boolean {
  return GOOD.includes(verdict);
}

/** Whether every address was right when it was last probed. */
export function isRight({ sights }: Pick<EndpointStatus, "sights">): boolean {
  return sights.length > 0 && sights.every(isGood);
}

/** What is remembered of a probe; `confirmed`: what is not right was seen twice. */
export function recordOf(
  endpoint: EndpointStatus,
  sights: readonly Sight[],
  basis: Basis,
  { confirmed, afterDelivery }: { confirmed: boolean; afterDelivery: boolean },
): ProbeRecord {
  const { record } = endpoint;
  const at = basis.now.toISOString();
  const judged = sights.map((sight) => ({ ...sight, verdict: verdictOn(sight, endpoint, basis) }));
  if (judged.every(isGood)) return { at, sights: [...sights] };
  const wasRight = record !== undefined && record.badSince === undefined;
  const isSilent = judged.some(({ verdict }) => SILENT.includes(verdict));
  const broken = record?.brokenByDelivery === true || (afterDelivery && wasRight && isSilent);
  return {
    at,
    badSince: record?.badSince ?? at,
    ...(confirmed && { confirmed }),
    ...(broken && { brokenByDelivery: true }),
    sights: [...sights],
  };
}

/** One thing that is wrong at one address. */
export interface WrongSight {
  /** Names the problem for as long as it lasts. */
  readonly key: string;
  /** One endpoint; or, of an address that cannot be reached, the same endpoint for every key type. */
  readonly endpoints: readonly EndpointStatus[];
  readonly sight: JudgedSight;
}

/** What is wrong at these endpoints. */
export function wrongSights(endpoints: readonly EndpointStatus[]): WrongSight[] {
  const found = new Map<string, { key: string; endpoints: EndpointStatus[]; sight: JudgedSight }>();
  for (const endpoint of endpoints) {
    for (const sight of endpoint.sights.filter((sight) => !isGood(sight))) {
      const isUnreachable = sight.verdict === "unreachable";
      const what = isUnreachable ? endpoint.endpoint.text : endpoint.key;
      const key = `endpoint ${what} ${sight.address}`;
      const group = isUnreachable ? key : `${key} ${found.size}`;
      const known = found.get(group);
      if (known === undefined) found.set(group, { key, endpoints: [endpoint], sight });
      else known.endpoints.push(endpoint);
    }
  }
  return [...found.values()];
}

/** Endpoints that certainly serve what is ours and wrong, seen twice. A rehearsal repairs nothing. */
export function drifted(endpoints: readonly EndpointStatus[], { mode }: Config): EndpointStatus[] {
  return endpoints.filter(({ record, sights }) =>
    mode === "prod" && record?.confirmed === true && sights.some(({ verdict }) => DRIFT.includes(verdict))
  );
}
