/**
 * What is remembered of deliveries: receipts are written, taken over and forgotten. Unlike the decisions in
 * plan.ts, these functions change the state that they are given.
 */

import type { Config, Section } from "./config.ts";
import { delivers, type Delivery, listsDigest, plan } from "./plan.ts";
import { type Basis, inventoryOf } from "./renewal.ts";
import { record, type State } from "./state.ts";
import type { Entry } from "./store.ts";

/** Remembers that the lists of a section have run for these certificates, as they are on disk now. */
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

/** Takes over the receipts of earlier versions, and of sections that have another name now. */
export function takeOverReceipts(
  config: Config,
  inventory: readonly Entry[],
  state: State,
  now: Date,
): void {
  receiptsFromVersion1(config, inventory, state, now);
  adoptReceipts(config, state);
}

/** Gives each section the newer receipts of sections that are gone and had the same lists: it was renamed. */
export function adoptReceipts(config: Config, state: State): void {
  const names = new Set(config.sections.map(({ name }) => name));
  const gone = Object.entries(state.receipts).filter(([name]) => !names.has(name));
  if (gone.length === 0) return;
  const byDigest = Map.groupBy(
    gone.flatMap(([, receipts]) => Object.entries(receipts)),
    ([, { digest }]) => digest,
  );
  for (const section of config.sections) {
    for (const [file, receipt] of byDigest.get(listsDigest(section, config.mode)) ?? []) {
      const receipts = state.receipts[section.name] ??= record({});
      const own = receipts[file];
      if (own === undefined || own.at < receipt.at) receipts[file] = { ...receipt };
    }
  }
}

/**
 * Makes receipts of what version 1 of the state remembered: everything had been delivered but what it listed as
 * undelivered.
 */
function receiptsFromVersion1(
  config: Config,
  inventory: readonly Entry[],
  state: State,
  now: Date,
): void {
  const { undelivered } = state;
  if (undelivered === undefined) return;
  delete state.undelivered;
  for (const { line, file, finding } of inventory) {
    for (const section of line.sections) {
      if (finding.kind !== "present" || !delivers(section, config.mode)) continue;
      const { name } = section;
      if (Object.hasOwn(undelivered, name) && Object.hasOwn(undelivered[name]!, file)) continue;
      const receipts = state.receipts[name] ??= record({});
      const digest = listsDigest(section, config.mode);
      receipts[file] = { digest, fingerprint: finding.certificate.fingerprint, at: now.toISOString() };
    }
  }
}

/**
 * Forgets what is remembered of lines, certificates, sections and endpoints that are gone, and failures of what is
 * no longer due or pending. Receipts stay for as long as their certificate is on disk: a line or section that is
 * missing for one run is not delivered again. `orphans` lists the base names of certificates that belong to no
 * line.
 */
export function forgetUnknown(basis: Basis, orphans: () => ReadonlySet<string>): void {
  const { config, state } = basis;
  const inventory = inventoryOf(basis);
  const { tasks, waiting, deliveries, endpoints } = plan(basis);
  const keep = (entries: Record<string, unknown>, isKnown: (key: string) => boolean) => {
    for (const key of Object.keys(entries)) if (!isKnown(key)) delete entries[key];
  };
  const ids = new Set(
    inventory.map(({ finding }) => finding.kind === "present" ? finding.certificate.id : undefined),
  );
  keep(state.renewals, (id) => ids.has(id));
  const due = new Set([...tasks, ...waiting].flatMap(({ due }) => due.map(({ entry }) => entry.stem)));
  keep(state.failures, (stem) => due.has(stem));
  const files = new Set(
    inventory.flatMap(({ file, former }) => former === undefined ? file : [file, former.file]),
  );
  keep(state.orders, (file) => files.has(file));
  for (const receipts of Object.values(state.receipts)) {
    keep(receipts, (file) => files.has(file) || orphans().has(file));
  }
  keep(state.receipts, (name) => Object.keys(state.receipts[name]!).length > 0);
  const pending = new Set(deliveries.map(({ section }) => section.name)); // by other commands, too
  keep(state.deliveries, (name) => pending.has(name));
  const sections = new Map(config.sections.map((section) => [section.name, section]));
  keep(state.alerts, (name) => (sections.get(name)?.alert.length ?? 0) > 0);
  const places = new Set(endpoints.map(({ endpoint }) => endpoint.text));
  for (const sent of Object.values(state.alerts)) {
    keep(sent, (key) => !key.startsWith("endpoint ") || places.has(key.split(" ")[1]!));
  }
  const keys = new Set(endpoints.map(({ key }) => key));
  keep(state.probes, (key) => keys.has(key));
}
