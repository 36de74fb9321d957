/**
 * Makes the deliveries that plan.ts finds pending: runs the commands of a section, has its endpoints probed, and
 * remembers the results. Sends alerts of problems.
 */

import type { Config, ConfigError, Line, Mode, Section } from "./config.ts";
import { type Context, limit, settled } from "./context.ts";
import { drifted, type EndpointStatus, groupBy, isRight, recordOf } from "./endpoints.ts";
import { giveTo, makeDirectory, removeIfPresent } from "./files.ts";
import { CommandError, type CommandOptions, optionsFor, runCommand, type Values } from "./hooks.ts";
import { type Delivery, listsOf, type Plan, planSection, type Problem } from "./plan.ts";
import { probe, type Probed, ProbeError } from "./probe.ts";
import { writeReceipts } from "./receipts.ts";
import { type Basis, expiryOf, LONGEST_PAUSE_MS, retryDeliveryAt } from "./renewal.ts";
import { record, type Sight, type State } from "./state.ts";
import { configErrorPath, type Entry, type Store } from "./store.ts";
import { count, problemLines, problemName } from "./text.ts";
import { join } from "node:path";

/** The result of a delivery. */
export interface Delivered {
  readonly delivery: Delivery;
  /** The certificates for which all commands succeeded. */
  readonly entries: readonly Entry[];
  /** The commands that succeeded, as written in actions.conf. */
  readonly commands: readonly { readonly template: string; readonly seconds: number }[];
  readonly errors: readonly CommandError[];
  /** What the endpoints serve. */
  readonly endpoints: readonly EndpointStatus[];
}

/** What delivering needs of the run. */
export interface Delivering {
  readonly store: Store;
  readonly context: Context;
  /** With the certificates that are on disk now, and the time. */
  readonly basis: () => Basis;
}

/** What happens while sections are delivered. */
export type DeliverEvent =
  | { readonly kind: "drift"; readonly section: string; readonly endpoints: readonly EndpointStatus[] }
  | { readonly kind: "delivery"; readonly delivered: Delivered };

/** How many sections are delivered in parallel at most. */
const MOST_SECTIONS = 8;
/** Probes of each address in the round that counts: one server behind a balancer may be right and another wrong. */
const PROBES = 3;
/** Pauses between rounds of probes. Most services reload within a second, some restart for a minute. */
const FIRST_ROUND_PAUSE_MS = 500;
const LONGEST_ROUND_PAUSE_MS = 8_000;
/** A rehearsal cannot see from a certificate that a service has been reloaded, so it waits a little. */
const REHEARSAL_PAUSE_MS = 2_000;
/** How much of the output of a failed command goes into alerts and the state. */
const OUTPUT_LINES = 5;
const OUTPUT_CHARACTERS = 500;

/** The sections of a run: each is delivered and probed as soon as its own lines are done. */
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

  /** Delivers what is pending and probes what is due. `[every]` is last, others start when their lines are done. */
  async run({ tasks, deliveries, endpoints }: Plan): Promise<void> {
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
    await settled([
      this.#runSections(now),
      ...later.map(async (section) => {
        await Promise.all(linesOf.get(section)!.map((line) => this.#issuing.get(line)!.promise));
        await this.#runSections([section]);
      }),
    ]);
    await Promise.all([...this.#issuing.values()].map(({ promise }) => promise));
    await this.#runSections([...busy].filter(({ name }) => name === "every"));
  }

  /** Urgent deliveries start when their section is probed; rollouts wait for all sections, and for each other. */
  async #runSections(sections: readonly Section[]): Promise<void> {
    const rollouts: Delivery[] = [];
    const urgent: Promise<unknown>[] = [];
    const found = await Promise.allSettled(sections.map(async (section) => {
      const delivery = await this.#probeAndPlan(section);
      if (delivery === undefined || delivery.until !== undefined) return;
      if (!delivery.urgent) return void rollouts.push(delivery);
      const started = this.#urgent(() => this.#deliver(delivery));
      started.catch(() => {}); // awaited below
      urgent.push(started);
    }));
    // sections that failed before come last
    rollouts.sort((a, b) => (a.failure?.count ?? 0) - (b.failure?.count ?? 0));
    this.#rollout = this.#rollout.then(async () => {
      for (const delivery of rollouts) {
        if (!this.#rolloutFailed) this.#rolloutFailed = !await this.#deliver(delivery);
      }
    });
    for (const result of [...found, ...await Promise.allSettled([...urgent, this.#rollout])]) {
      if (result.status === "rejected") throw result.reason;
    }
  }

  /** Probes the endpoints of a section that are due, and returns what is pending then. */
  async #probeAndPlan(section: Section): Promise<Delivery | undefined> {
    this.delivering.context.signal.throwIfAborted();
    const { delivery, endpoints } = this.#plan(section);
    // endpoints are probed after every delivery, so not before it, unless an earlier repair of drift did not help
    const isDeliveredNow = delivery?.urgent && delivery.until === undefined &&
      delivery.pending.some(({ reason }) => reason !== "drift");
    const lines = new Set(isDeliveredNow ? delivery.entries.map(({ line }) => line) : []);
    const due = endpoints.filter(({ due, wanted }) => due && !wanted.some(({ line }) => lines.has(line)));
    if (due.length === 0) return delivery;
    await this.#probe(due);
    const probed = this.#plan(section);
    const keys = new Set(due.map(({ key }) => key));
    const { config } = this.delivering.basis();
    const wrong = drifted(probed.endpoints.filter(({ key }) => keys.has(key)), config);
    if (wrong.length > 0) this.emit({ kind: "drift", section: section.name, endpoints: wrong });
    return probed.delivery;
  }

  /** Each endpoint is probed once in a run, whichever sections name it. */
  async #probe(endpoints: readonly EndpointStatus[]): Promise<void> {
    const others = endpoints.filter(({ key }) => !this.#probing.has(key));
    if (others.length > 0) {
      const probing = probeAll(others, this.delivering.basis, this.delivering.context);
      for (const { key } of others) this.#probing.set(key, probing);
    }
    await Promise.all(endpoints.map(({ key }) => this.#probing.get(key)));
  }

  /** Makes a delivery; false if it failed or its endpoints are not right. */
  async #deliver(delivery: Delivery): Promise<boolean> {
    this.delivering.context.signal.throwIfAborted();
    const delivered = await deliver(delivery, this.delivering);
    this.emit({ kind: "delivery", delivered });
    if (delivered.errors.length === 0) this.delivered++;
    else await this.#probe(this.#plan(delivery.section).endpoints.filter(({ due }) => due));
    return delivered.errors.length === 0 && delivered.endpoints.every(isRight);
  }

  #plan(section: Section) {
    return planSection(this.delivering.basis(), section);
  }
}

/** Runs the lists of a section, whole and in order, then waits until its endpoints serve what was delivered. */
async function deliver(delivery: Delivery, delivering: Delivering): Promise<Delivered> {
  const { section } = delivery;
  const { store, context } = delivering;
  const { config } = delivering.basis();
  const [uploadCerts, uploadKeys, uploadEach, update] = listsOf(section, config.mode);
  const ran: { template: string; seconds: number }[] = [];
  const run = async (template: string, values: Values) => {
    if (template.trim() === "") return;
    const { seconds } = await runCommand(template, values, optionsFor(section, config, context));
    ran.push({ template, seconds });
  };
  const errors: CommandError[] = [];
  let entries: readonly Entry[] = [];
  try {
    const all = valuesOf(delivery.entries, store);
    for (const template of [...uploadCerts, ...uploadKeys]) await run(template, all);
    entries = await runForEach(uploadEach, delivery.entries, run, errors);
    if (entries.length > 0) {
      const values = entries.length === delivery.entries.length ? all : valuesOf(entries, store);
      for (const template of update) await run(template, values);
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
async function runForEach(
  templates: readonly string[],
  entries: readonly Entry[],
  run: (template: string, values: Values) => Promise<void>,
  errors: CommandError[],
): Promise<Entry[]> {
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

function valuesOf(entries: readonly Entry[], store: Store): Values {
  const paths = entries.map((entry) => store.pathsOf(entry));
  return {
    CERTS: paths.flatMap(({ certs }) => certs),
    KEYS: paths.flatMap(({ keys }) => keys),
    DOMAINS_CN: [...new Set(entries.map(({ line }) => line.names[0]!))],
    DOMAINS_ALL: [...new Set(entries.flatMap(({ line }) => line.names))],
  };
}

/** Remembers what succeeded, and why the rest failed. */
function remember(
  delivery: Delivery,
  entries: readonly Entry[],
  error: CommandError | undefined,
  delivering: Delivering,
): void {
  const { section, pending, failure } = delivery;
  const basis = delivering.basis();
  const { config, state, now, options } = basis;
  writeReceipts(section, entries, delivery, config, state, now);
  for (const { file } of entries) options.delivered?.add(`${section.name}/${file}`);
  const last = state.deliveries[section.name];
  delete state.deliveries[section.name];
  // an earlier failure stays while anything is pending, even outside the selection, and gets the key of that rest
  const rest = planSection({ ...basis, options: { ...options, selection: undefined } }, section).delivery;
  const { key } = rest ?? delivery;
  if (error === undefined) {
    if (last !== undefined && rest !== undefined) state.deliveries[section.name] = { ...last, key };
    return;
  }
  const count = (failure?.count ?? 0) + 1;
  state.deliveries[section.name] = {
    key,
    count,
    // another certificate or another command starts without back-off, but the failure is as old as before
    since: last?.since ?? now.toISOString(),
    at: now.toISOString(),
    error: error.message,
    output: error.output.trimEnd().split("\n").slice(-OUTPUT_LINES).join("\n").slice(-OUTPUT_CHARACTERS),
    retryAt: retryDeliveryAt(count, now, expiryOf(pending))?.toISOString(),
    urgent: delivery.urgent,
  };
}

// ---- endpoints --------------------------------------------------------------------------------------------

/** Probes the endpoints of these certificates until all are right in one round, or `verifyWait` is over. */
async function verify(
  section: Section,
  entries: readonly Entry[],
  { store, context, basis }: Delivering,
): Promise<readonly EndpointStatus[]> {
  const { config, state } = basis();
  const concerned = () =>
    planSection(basis(), section).endpoints
      .filter(({ wanted }) => wanted.some(({ line }) => entries.some((entry) => entry.line === line)));
  const deadline = context.now().getTime() + section.verifyWaitSeconds * 1000;
  if (config.mode === "test" && concerned().length > 0) {
    await context.sleep(Math.min(REHEARSAL_PAUSE_MS, section.verifyWaitSeconds * 1000));
  }
  for (let pause = FIRST_ROUND_PAUSE_MS;; pause = Math.min(pause * 2, LONGEST_ROUND_PAUSE_MS)) {
    const endpoints = concerned();
    if (endpoints.length === 0) return [];
    const sights = await sightsOf(endpoints, context, PROBES);
    const probedAt = basis();
    const isLast = probedAt.now.getTime() + pause > deadline;
    for (const endpoint of endpoints) {
      const found = recordOf(endpoint, sights.get(endpoint.key)!, probedAt, {
        confirmed: true,
        afterDelivery: true,
      });
      // not yet right is not wrong: a service may still be reloading
      if (found.badSince === undefined || isLast) state.probes[endpoint.key] = found;
    }
    const probed = concerned();
    const allRight = probed.every((one) => one.record?.at === probedAt.now.toISOString() && isRight(one));
    if (!allRight && !isLast) {
      await context.sleep(pause);
      continue;
    }
    if (allRight) { for (const { file } of entries) delete state.receipts[section.name]?.[file]?.repairs; }
    await store.saveState();
    return probed;
  }
}

/** Probes endpoints and remembers what they serve. What looks wrong is probed again: a repair needs certainty. */
export async function probeAll(
  endpoints: readonly EndpointStatus[],
  basis: () => Basis,
  context: Context,
): Promise<void> {
  // one good answer does not make right what was wrong: another server of a balancer may have given it
  const { wrong = [], others = [] } = Object.groupBy(
    endpoints,
    ({ record }) => record?.badSince === undefined ? "others" : "wrong",
  );
  const probes = await settled([sightsOf(others, context, 1), sightsOf(wrong, context, PROBES)]);
  const first = new Map(probes.flatMap((sights) => [...sights]));
  const judge = (endpoint: EndpointStatus, sights: readonly Sight[], confirmed: boolean) =>
    recordOf(endpoint, sights, basis(), { confirmed, afterDelivery: false });
  const suspects = endpoints.filter((endpoint) => {
    const found = judge(endpoint, first.get(endpoint.key)!, false);
    return found.badSince !== undefined &&
      found.sights.some(({ kind }) => kind !== "unreachable" && kind !== "passed over");
  });
  const second = suspects.length > 0 ? await sightsOf(suspects, context, PROBES) : new Map<string, Sight[]>();
  for (const endpoint of endpoints) {
    const [once, again] = [first.get(endpoint.key)!, second.get(endpoint.key)];
    const found = judge(endpoint, again ?? once, again !== undefined);
    // wrong, then right: one server of several, or one that is being reloaded
    const isMixed = again !== undefined && found.badSince === undefined;
    basis().state.probes[endpoint.key] = isMixed ? judge(endpoint, union(again, once), false) : found;
  }
}

/** What was served in the second probe, or in the first. */
function union(again: readonly Sight[], once: readonly Sight[]): Sight[] {
  const keyOf = ({ address, certificate }: Sight) => `${address} ${certificate?.fingerprint}`;
  const known = new Set(again.map(keyOf));
  return [...again, ...once.filter((sight) => sight.kind === "served" && !known.has(keyOf(sight)))];
}

/** Key of an endpoint -> what its addresses serve. Without openssl all are unreachable, and the run continues. */
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

// ---- alerts -------------------------------------------------------------------------------------------

/** One alert of one section. */
export interface Alert {
  readonly section: Section;
  /** Those of which this section was not alerted in the last 20 hours. */
  readonly problems: readonly Problem[];
  /** What is no longer a problem. */
  readonly resolved: readonly string[];
}

/** An alert was sent, or failed. */
export interface AlertEvent {
  readonly kind: "alert";
  readonly alert: Alert;
  readonly subject: string;
  readonly text: string;
  readonly error?: Error;
}

/** The alerts that are to be sent now: each problem once in 20 hours, and once when it is resolved. */
export function dueAlerts(
  { sections }: Config,
  problems: readonly Problem[],
  state: State,
  now: Date,
): Alert[] {
  const present = new Set(problems.map(({ key }) => key));
  return sections.filter(({ alert }) => alert.some((command) => command.trim() !== "")).flatMap((section) => {
    const sent = state.alerts[section.name] ?? {};
    const due = problems.filter(({ key, alert, sections }) => {
      const last = sent[key];
      return alert && (section.name === "every" || sections.includes(section.name)) &&
        (last === undefined || now.getTime() - Date.parse(last.at) >= LONGEST_PAUSE_MS);
    });
    const resolved = Object.entries(sent).filter(([key]) => !present.has(key)).map(([, { what }]) => what);
    return due.length + resolved.length > 0 ? [{ section, problems: due, resolved }] : [];
  });
}

/**
 * Sends the alerts that are due and remembers them. An alert counts as sent if one of its commands succeeded: whom
 * that one reached is not alerted again because another one failed.
 */
export async function sendAlerts(
  { problems }: Plan,
  config: Config,
  state: State,
  context: Context,
  emit: (event: AlertEvent) => void,
): Promise<void> {
  const names = new Map(problems.map((problem) => [problem.key, problemName(problem)]));
  for (const alert of dueAlerts(config, problems, state, context.now())) {
    const { section } = alert;
    const { subject, text } = alertText(config, alert);
    const at = context.now().toISOString();
    const lines = alert.problems.flatMap(({ lines }) => lines);
    const options = { ...optionsFor(section, config, context), stdin: text };
    const { errors, isSent } = await runAlertCommands(section.alert, subject, lines, options);
    if (isSent) {
      const sent = state.alerts[section.name] ??= record({});
      for (const key of Object.keys(sent)) if (!names.has(key)) delete sent[key];
      for (const { key } of alert.problems) sent[key] = { at, what: names.get(key)! };
    }
    emit({ kind: "alert", alert, subject: subject.join(" "), text, error: errors[0] });
  }
}

/**
 * Sends the errors of a configuration with the `alert` commands that could be read. Returns the errors of these
 * commands; undefined if the same text was printed and alerted in the last 20 hours. The last one is in a file beside
 * the state, which is not read then; it is not written if no alert could be sent.
 */
export async function alertConfigError(
  { directory, alerts }: ConfigError,
  text: string,
  mode: Mode,
): Promise<CommandError[] | undefined> {
  if (directory === undefined || alerts === undefined) return [];
  const base = join(directory, mode);
  const path = configErrorPath(base);
  if (isRecent(path, text)) return undefined;
  const options = { mode, timeoutSeconds: 60, stdin: text };
  const results = await Promise.all(
    alerts.map(({ commands }) => runAlertCommands(commands, ["configuration", "not", "valid"], [], options)),
  );
  if (results.length === 0 || results.some(({ isSent }) => isSent)) {
    try {
      makeDirectory(base, 0o755, Deno.statSync(directory));
      removeIfPresent(path); // it may be a link
      Deno.writeTextFileSync(path, text, { createNew: true, mode: 0o600 });
      giveTo(path, Deno.statSync(base));
    } catch { /* then the next run prints and sends it again */ }
  }
  return results.flatMap(({ errors }) => errors);
}

/** Whether a file was written with this text in the last 20 hours. */
function isRecent(path: string, text: string): boolean {
  try {
    return Deno.readTextFileSync(path) === text &&
      Date.now() - Deno.statSync(path).mtime!.getTime() < LONGEST_PAUSE_MS;
  } catch {
    return false;
  }
}

/** Subject (as words) and text of an alert. */
function alertText({ mode }: Config, { problems, resolved }: Alert): { subject: string[]; text: string } {
  const first = problems[0];
  const subject = first === undefined
    ? ["resolved"]
    : [...`${count(problems.length, "problem")}:`.split(" "), first.lines[0]?.names[0] ?? "lematt"];
  const texts = problems.map((problem) => problemLines(problem).join("\n  "));
  const lines = [...texts, ...resolved.map((what) => `resolved: ${what}`)];
  return { subject, text: `${lines.join("\n")}\n\nlematt --${mode} --status shows all of it.\n` };
}

/** Runs each of these commands, with the text of the alert on its standard input. */
async function runAlertCommands(
  commands: readonly string[],
  subject: readonly string[],
  lines: readonly Line[],
  options: CommandOptions,
): Promise<{ errors: CommandError[]; isSent: boolean }> {
  const values = {
    SUBJECT: subject,
    DOMAINS_CN: [...new Set(lines.map(({ names }) => names[0]!))],
    DOMAINS_ALL: [...new Set(lines.flatMap(({ names }) => names))],
  };
  const errors: CommandError[] = [];
  const templates = commands.filter((command) => command.trim() !== "");
  for (const template of templates) {
    try {
      await runCommand(template, values, options);
    } catch (error) {
      if (!(error instanceof CommandError)) throw error;
      errors.push(error);
    }
  }
  return { errors, isSent: errors.length < templates.length };
}
