/**
 * Carries out what the plan says of deliveries: runs the commands of a section, probes endpoints, sends alerts, and
 * remembers what came of it. What is pending, what a probe means and which alerts are due is decided in plan.ts.
 */

import type { Config, Line, Section } from "./config.ts";
import { type Context, limit, settled } from "./context.ts";
import { CommandError, runCommand, type Values } from "./hooks.ts";
import {
  type Alert,
  type ByLine,
  type Delivery,
  drifted,
  type EndpointStatus,
  groupBy,
  isGood,
  listsDigest,
  type Plan,
  type PlanOptions,
  planSection,
  recordOf,
  retryDeliveryAt,
} from "./plan.ts";
import { probe, ProbeError, type Sight as Probed } from "./probe.ts";
import { record, type Sight, type State } from "./state.ts";
import type { Entry, Store } from "./store.ts";

/** What came of a delivery. */
export interface Delivered {
  readonly delivery: Delivery;
  /** Those whose commands have succeeded. */
  readonly entries: readonly Entry[];
  /** Commands that succeeded, with the text that they have in actions.conf. */
  readonly commands: readonly { readonly template: string; readonly seconds: number }[];
  readonly errors: readonly CommandError[];
  /** What the endpoints serve. */
  readonly endpoints: readonly EndpointStatus[];
}

/** What delivering needs of the run. */
export interface Delivering {
  readonly config: Config;
  readonly store: Store;
  readonly context: Context;
  /** As they are on disk at any moment. */
  readonly certificates: ByLine;
  readonly options: PlanOptions;
}

/** What happens while sections are delivered. */
export type DeliverEvent =
  | { readonly kind: "drift"; readonly section: string; readonly endpoints: readonly EndpointStatus[] }
  | { readonly kind: "delivered"; readonly delivered: Delivered };

/** Sections that are delivered side by side. */
const MOST_SECTIONS = 8;
/** Probes of each address in the round that counts: a balancer must not be right by luck. */
const PROBES = 3;
/** Pauses between rounds. Most services reload within a second, some restart for a minute. */
const FIRST_PAUSE_MS = 500;
/** A rehearsal cannot see from a certificate that a service has been reloaded, so it waits a little. */
const REHEARSAL_PAUSE_MS = 2_000;
const LONGEST_PAUSE_MS = 8_000;
/** How much of what a failed command printed goes into alerts and the state. */
const OUTPUT_LINES = 5;
const OUTPUT_CHARACTERS = 500;

/** The sections of a run: each is attended to as soon as its own lines are done. */
export class Sections {
  delivered = 0;
  readonly #issuing = new Map<Line, PromiseWithResolvers<void>>();
  readonly #urgent = limit(MOST_SECTIONS);
  readonly #probing = new Map<string, Promise<void>>();
  /** Rollouts go one section at a time, and end for this run at the first failure. */
  #rollout: Promise<void> = Promise.resolve();
  #rolloutFailed = false;

  constructor(
    private readonly delivering: Delivering,
    private readonly emit: (event: DeliverEvent) => void,
  ) {}

  /** A line has been issued, or failed. */
  lineDone(line: Line): void {
    this.#issuing.get(line)?.resolve();
  }

  /** No further line will be issued. */
  allDone(): void {
    for (const { resolve } of this.#issuing.values()) resolve();
  }

  /** Delivers what is pending and probes what is due; `[every]` when all others are done. */
  async attend({ tasks, deliveries, endpoints }: Plan): Promise<void> {
    for (const { line } of tasks) this.#issuing.set(line, Promise.withResolvers<void>());
    const linesOf = groupBy(
      tasks.flatMap(({ line }) => line.sections.map((section) => [section, line] as const)),
    );
    const busy = new Set<Section>([
      ...linesOf.keys(),
      ...deliveries.map(({ section }) => section),
      ...endpoints.filter(({ due }) => due).flatMap(({ sections }) => sections),
    ]);
    const others = [...busy].filter(({ name }) => name !== "every");
    const now = others.filter((section) => !linesOf.has(section));
    const later = others.filter((section) => linesOf.has(section));
    const settled = await Promise.allSettled([
      this.#attendAll(now),
      ...later.map(async (section) => {
        await Promise.all(linesOf.get(section)!.map((line) => this.#issuing.get(line)!.promise));
        await this.#attendAll([section]);
      }),
    ]);
    await Promise.allSettled([...this.#issuing.values()].map(({ promise }) => promise));
    for (const result of settled) if (result.status === "rejected") throw result.reason;
    const every = [...busy].filter(({ name }) => name === "every");
    await this.#attendAll(every);
  }

  async #attendAll(sections: readonly Section[]): Promise<void> {
    const rollouts: Delivery[] = [];
    const urgent: Promise<unknown>[] = [];
    const looked = await Promise.allSettled(sections.map(async (section) => {
      const delivery = await this.#pendingOf(section);
      if (delivery === undefined || delivery.until !== undefined) return;
      if (!delivery.urgent) return void rollouts.push(delivery);
      const started = this.#urgent(() => this.#deliver(delivery));
      started.catch(() => {}); // awaited below
      urgent.push(started);
    }));
    // what failed before comes last
    rollouts.sort((a, b) => (a.failure?.count ?? 0) - (b.failure?.count ?? 0));
    this.#rollout = this.#rollout.then(async () => {
      for (const delivery of rollouts) {
        if (!this.#rolloutFailed) this.#rolloutFailed = !await this.#deliver(delivery);
      }
    });
    for (const result of [...looked, ...await Promise.allSettled([...urgent, this.#rollout])]) {
      if (result.status === "rejected") throw result.reason;
    }
  }

  /** Probes the endpoints of a section that are due, and returns what is pending then. */
  async #pendingOf(section: Section): Promise<Delivery | undefined> {
    this.delivering.context.signal.throwIfAborted();
    const first = this.#plan(section);
    const { delivery } = first;
    // endpoints are probed after a delivery anyway; where an earlier one has not helped, before it is repeated
    const certain = delivery?.urgent && delivery.until === undefined &&
      delivery.pending.some(({ reason }) => reason !== "drift");
    const delivered = new Set(certain ? delivery.entries.map(({ line }) => line) : []);
    const due = first.endpoints.filter(({ due, wanted }) =>
      due && !wanted.some(({ line }) => delivered.has(line))
    );
    if (due.length === 0) return delivery;
    await this.#probe(due);
    const then = this.#plan(section);
    const wrong = drifted(
      then.endpoints.filter(({ key }) => due.some((one) => one.key === key)),
      this.delivering.config,
    );
    if (wrong.length > 0) this.emit({ kind: "drift", section: section.name, endpoints: wrong });
    return then.delivery;
  }

  /** Each endpoint is probed once in a run, whichever sections name it. */
  async #probe(endpoints: readonly EndpointStatus[]): Promise<void> {
    const anew = endpoints.filter(({ key }) => !this.#probing.has(key));
    if (anew.length > 0) {
      const probing = probeAll(anew, this.delivering);
      for (const { key } of anew) this.#probing.set(key, probing);
    }
    await Promise.all(endpoints.map(({ key }) => this.#probing.get(key)));
  }

  /** Carries out a delivery; false where it failed, or its endpoints are not right. */
  async #deliver(delivery: Delivery): Promise<boolean> {
    this.delivering.context.signal.throwIfAborted();
    const delivered = await deliver(delivery, this.delivering);
    this.emit({ kind: "delivered", delivered });
    if (delivered.errors.length === 0) this.delivered++;
    else await this.#probe(this.#plan(delivery.section).endpoints.filter(({ due }) => due));
    return delivered.errors.length === 0 &&
      delivered.endpoints.every(({ sights }) => sights.every(({ verdict }) => isGood(verdict)));
  }

  #plan(section: Section) {
    const { config, store: { state }, context, options, certificates } = this.delivering;
    return planSection(section, certificates, config, state, context.now(), options);
  }
}

/** Runs the lists of a section, whole and in order, then waits until its endpoints serve what was delivered. */
async function deliver(delivery: Delivery, delivering: Delivering): Promise<Delivered> {
  const { section } = delivery;
  const { store } = delivering;
  const ran: { template: string; seconds: number }[] = [];
  const run = async (template: string, values: Values) => {
    if (template.trim() === "") return;
    const { seconds } = await runCommand(template, values, commandOptions(section, delivering));
    ran.push({ template, seconds });
  };
  const errors: CommandError[] = [];
  let entries: readonly Entry[] = [];
  try {
    const all = valuesOf(delivery.entries, store);
    for (const template of [...section.uploadCerts, ...section.uploadKeys]) await run(template, all);
    entries = await uploadEach(delivery, delivering, run, errors);
    if (entries.length > 0) {
      const values = entries.length === delivery.entries.length ? all : valuesOf(entries, store);
      for (const template of section.update) await run(template, values);
    }
  } catch (error) {
    if (!(error instanceof CommandError)) throw error;
    errors.push(error);
    entries = [];
  }
  remember(delivery, entries, errors[0], delivering);
  await store.saveState();
  const endpoints = errors.length > 0 ? [] : await verify(section, entries, delivering);
  return { delivery, entries, commands: ran, errors, endpoints };
}

/** Runs `uploadEach` for each certificate; returns those for which it succeeded. */
async function uploadEach(
  { section, entries }: Delivery,
  { config }: Delivering,
  run: (template: string, values: Values) => Promise<void>,
  errors: CommandError[],
): Promise<Entry[]> {
  // it chooses its own target names, so a rehearsal could put the staging certificate into production
  const templates = config.mode === "prod" || section.rehearse ? section.uploadEach : [];
  const done: Entry[] = [];
  for (const entry of entries) {
    const { files, keyType, line } = entry;
    const values = { CERT_FILE: files.cert, KEY_FILE: files.key, KEY_TYPE: keyType, DOMAIN: line.names[0]! };
    try {
      for (const template of templates) await run(template, values);
      done.push(entry);
    } catch (error) {
      if (!(error instanceof CommandError)) throw error;
      errors.push(error);
    }
  }
  return done;
}

function commandOptions({ name }: Section, { config, context }: Pick<Delivering, "config" | "context">) {
  const { signal, onOutput } = context;
  return {
    ...{ mode: config.mode, timeoutSeconds: config.commandTimeoutSeconds, signal },
    onOutput: (text: string) => onOutput?.(text, `[${name}]`),
  };
}

function valuesOf(entries: readonly Entry[], store: Store): Values {
  const paths = entries.map((entry) => store.pathsOf(entry));
  return {
    CERTS: paths.flatMap(({ certs }) => certs),
    KEYS: paths.flatMap(({ keys }) => keys),
    DOMAINS_CN: [...new Set(entries.map(({ line }) => line.names[0]!))],
    DOMAINS_ALL: [...new Set(entries.flatMap(({ line }) => line.names))],
  };
}

/** Writes the receipts of what succeeded, and why the rest did not. */
function remember(
  delivery: Delivery,
  entries: readonly Entry[],
  error: CommandError | undefined,
  { config, store: { state }, context, certificates, options }: Delivering,
): void {
  const { section, pending, failure } = delivery;
  const now = context.now();
  writeReceipts(section, entries, delivery, config, state, now);
  for (const { entry } of pending) {
    if (entries.includes(entry)) {
      options.delivered?.add(`${section.name}/${entry.file}`);
    }
  }
  const last = state.deliveries[section.name];
  delete state.deliveries[section.name];
  // also what a restricted run leaves aside
  const left = planSection(section, certificates, config, state, now, { ...options, selection: undefined });
  const { key } = left.delivery ?? delivery;
  if (error === undefined) {
    if (last !== undefined && left.delivery !== undefined) state.deliveries[section.name] = { ...last, key };
    return;
  }
  const count = (failure?.count ?? 0) + 1;
  state.deliveries[section.name] = {
    key,
    count,
    // another certificate or another command begins without back-off, but it fails no less long
    since: last?.since ?? now.toISOString(),
    at: now.toISOString(),
    error: error.message,
    output: error.output.trimEnd().split("\n").slice(-OUTPUT_LINES).join("\n").slice(-OUTPUT_CHARACTERS),
    retryAt: retryDeliveryAt(count, now, soonestExpiry(delivery.entries))?.toISOString(),
    urgent: delivery.urgent,
  };
}

/** Says that the lists of a section have run for these certificates, as they are on disk now. */
export function writeReceipts(
  section: Section,
  entries: readonly Entry[],
  delivery: Pick<Delivery, "pending"> | undefined,
  config: Config,
  state: State,
  now: Date,
): void {
  if (entries.length === 0) return;
  const receipts = state.receipts[section.name] ??= record({});
  const digest = listsDigest(section, config.mode);
  for (const entry of entries) {
    if (entry.finding.kind !== "present") continue;
    const drifted = delivery?.pending.some((one) => one.entry === entry && one.reason === "drift");
    const repairs = drifted ? (receipts[entry.file]?.repairs ?? 0) + 1 : 0;
    const { fingerprint, notAfter } = entry.finding.certificate;
    receipts[entry.file] = {
      digest,
      fingerprint,
      notAfter: notAfter.toISOString(),
      at: now.toISOString(),
      ...(repairs > 0 && { repairs }),
    };
  }
}

function soonestExpiry(entries: readonly Entry[]): Date | undefined {
  const ends = entries.flatMap(({ finding }) =>
    "certificate" in finding ? [finding.certificate.notAfter] : []
  );
  return ends.length === 0 ? undefined : ends.reduce((a, b) => a < b ? a : b);
}

// ---- endpoints --------------------------------------------------------------------------------------------

/** Probes the endpoints of these certificates until all are right in one complete round, or `verifyWait` is over. */
async function verify(
  section: Section,
  entries: readonly Entry[],
  delivering: Delivering,
): Promise<readonly EndpointStatus[]> {
  const { config, store: { state }, context, certificates, options } = delivering;
  const concerned = () =>
    planSection(section, certificates, config, state, context.now(), options).endpoints
      .filter(({ wanted }) => wanted.some(({ line }) => entries.some((entry) => entry.line === line)));
  const deadline = context.now().getTime() + section.verifyWaitSeconds * 1000;
  if (config.mode === "test" && concerned().length > 0) {
    await context.sleep(Math.min(REHEARSAL_PAUSE_MS, section.verifyWaitSeconds * 1000));
  }
  for (let pause = FIRST_PAUSE_MS;; pause = Math.min(pause * 2, LONGEST_PAUSE_MS)) {
    const endpoints = concerned();
    if (endpoints.length === 0) return [];
    const sights = await sightsOf(endpoints, context, PROBES);
    const now = context.now();
    const isLast = now.getTime() + pause > deadline;
    for (const endpoint of endpoints) {
      const found = recordOf(endpoint, sights.get(endpoint.key)!, config, now, {
        confirmed: true,
        afterDelivery: true,
        counterpart: options.counterpart,
      });
      if (found.badSince === undefined || isLast) state.probes[endpoint.key] = found;
    }
    const seen = concerned();
    const wrong = seen.filter(({ record, sights }) =>
      record?.at !== now.toISOString() || !sights.every(({ verdict }) => isGood(verdict))
    );
    if (wrong.length > 0 && !isLast) {
      await context.sleep(pause);
      continue;
    }
    if (wrong.length === 0) {
      const receipts = state.receipts[section.name] ?? {};
      for (const { file } of entries) {
        const receipt = receipts[file];
        if (receipt === undefined) continue;
        receipt.servedSince ??= now.toISOString();
        delete receipt.repairs;
      }
    }
    await delivering.store.saveState();
    return seen;
  }
}

/** Probes endpoints and remembers what they serve; what looks wrong is probed again, since a repair needs certainty. */
export async function probeAll(
  endpoints: readonly EndpointStatus[],
  { config, store: { state }, context, options }: Pick<Delivering, "config" | "context" | "options"> & {
    store: Pick<Store, "state">;
  },
): Promise<void> {
  const { counterpart } = options;
  // what was wrong is not right for one good answer: it may be a balancer's
  const { wrong = [], others = [] } = Object.groupBy(
    endpoints,
    ({ record }) => record?.badSince === undefined ? "others" : "wrong",
  );
  const looks = await settled([sightsOf(others, context, 1), sightsOf(wrong, context, PROBES)]);
  const first = new Map(looks.flatMap((sights) => [...sights]));
  const judge = (endpoint: EndpointStatus, sights: readonly Sight[], confirmed: boolean) =>
    recordOf(endpoint, sights, config, context.now(), { confirmed, afterDelivery: false, counterpart });
  const doubtful = endpoints.filter((endpoint) => {
    const found = judge(endpoint, first.get(endpoint.key)!, false);
    return found.badSince !== undefined &&
      found.sights.some(({ kind }) => kind !== "unreachable" && kind !== "passed over");
  });
  const second = doubtful.length > 0 ? await sightsOf(doubtful, context, PROBES) : new Map<string, Sight[]>();
  for (const endpoint of endpoints) {
    const [once, again] = [first.get(endpoint.key)!, second.get(endpoint.key)];
    const found = judge(endpoint, again ?? once, again !== undefined);
    // a certificate that was served, and then was not: one server of several, or one that is being reloaded
    const isDoubtful = again !== undefined && found.badSince === undefined;
    state.probes[endpoint.key] = isDoubtful ? judge(endpoint, union(again, once), false) : found;
  }
}

/** What was served at the second look, or at the first. */
function union(again: readonly Sight[], once: readonly Sight[]): Sight[] {
  const keyOf = ({ address, certificate }: Sight) => `${address} ${certificate?.fingerprint}`;
  const known = new Set(again.map(keyOf));
  return [...again, ...once.filter((sight) => sight.kind === "served" && !known.has(keyOf(sight)))];
}

/** Key of an endpoint -> what its addresses serve. Without openssl nothing can be seen, and all else goes on. */
async function sightsOf(
  endpoints: readonly EndpointStatus[],
  context: Context,
  times: number,
): Promise<Map<string, Sight[]>> {
  let found: readonly Probed[];
  try {
    found = await probe(endpoints, context, times);
  } catch (error) {
    if (!(error instanceof ProbeError)) throw error;
    const sight = { address: "", kind: "unreachable", detail: error.message } as const;
    return new Map(endpoints.map(({ key }) => [key, [sight]]));
  }
  return new Map(endpoints.map(({ key, endpoint, keyType }) => [
    key,
    found.filter((one) => one.endpoint === endpoint.text && one.keyType === keyType).map(sightOf),
  ]));
}

function sightOf({ address, kind, certificate, detail }: Probed): Sight {
  return {
    address,
    kind,
    ...(certificate !== undefined && {
      certificate: {
        fingerprint: certificate.fingerprint,
        names: certificate.names.slice(0, 100),
        notBefore: certificate.notBefore.toISOString(),
        notAfter: certificate.notAfter.toISOString(),
        selfSigned: certificate.selfSigned,
        issuer: certificate.issuer,
      },
    }),
    ...(detail !== undefined && { detail }),
  };
}

// ---- alerts -----------------------------------------------------------------------------------------------

/**
 * Runs the alert commands of a section with `text` on their standard input, and remembers what was sent unless all of
 * them failed: who was reached is not alerted again because another could not be. Returns the first failure.
 */
export async function sendAlert(
  alert: Alert,
  { subject, text, whats }: { subject: readonly string[]; text: string; whats: ReadonlyMap<string, string> },
  { config, store: { state }, context }: Pick<Delivering, "config" | "context"> & {
    store: Pick<Store, "state">;
  },
): Promise<CommandError | undefined> {
  const { section, problems } = alert;
  const now = context.now();
  const lines = problems.flatMap(({ lines }) => lines);
  const values = {
    SUBJECT: subject,
    DOMAINS_CN: [...new Set(lines.map(({ names }) => names[0]!))],
    DOMAINS_ALL: [...new Set(lines.flatMap(({ names }) => names))],
  };
  const failures: CommandError[] = [];
  const templates = section.alert.filter((template) => template.trim() !== "");
  for (const template of templates) {
    try {
      await runCommand(template, values, {
        ...commandOptions(section, { config, context }),
        stdin: text,
      });
    } catch (error) {
      if (!(error instanceof CommandError)) throw error;
      failures.push(error);
    }
  }
  if (failures.length < templates.length) {
    const sent = state.alerts[section.name] ??= record({});
    const present = new Set(whats.keys());
    for (const key of Object.keys(sent)) if (!present.has(key)) delete sent[key];
    for (const { key } of problems) sent[key] = { at: now.toISOString(), what: whats.get(key) ?? key };
  }
  return failures[0];
}
