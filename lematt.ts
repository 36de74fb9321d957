#!/usr/bin/env -S DENO_NO_UPDATE_CHECK=1 deno run -q --no-prompt --cached-only -P=lematt --v8-flags=--max-semi-space-size=4
/**
 * lematt: Let's Encrypt automation from one place. Arguments, help and exit status; the commands are in lib/run.ts.
 */

import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import type { Config, Mode } from "./lib/config.ts";
import type { Context } from "./lib/context.ts";

/** The oldest that can read lib/ (`import defer`), and that the tests have seen. */
const OLDEST_DENO = [2, 9] as const;
const [major = 0, minor = 0] = Deno.version.deno.split(".").map(Number);
if (major < OLDEST_DENO[0] || (major === OLDEST_DENO[0] && minor < OLDEST_DENO[1])) {
  err(`lematt: Deno ${OLDEST_DENO.join(".")} or newer is needed; this is ${Deno.version.deno}\n`);
  Deno.exit(2);
}
// imported after the check above, so that an older Deno reaches it
const { ConfigError, loadConfig } = await import("./lib/config.ts");
const { systemContext } = await import("./lib/context.ts");
const { alertConfigError } = await import("./lib/deliver.ts");
const { killAll } = await import("./lib/hooks.ts");
const { checkPackages } = await import("./lib/http.ts");
const { planJson, planText, Report } = await import("./lib/report.ts");
const {
  accept,
  advice,
  preview,
  prunable,
  prune,
  records,
  revocable,
  revoke,
  rollover,
  run,
  select,
  status,
  tryChallenges,
} = await import("./lib/run.ts");
const { exitStatus, statusJson, statusMetrics, statusTable } = await import("./lib/status.ts");
const { count, errorText, isExpected, noticeText } = await import("./lib/text.ts");

const VERSION = "0.2.0";

const HELP = `lematt ${VERSION}: Let's Encrypt certificates for all hosts from one of them

  lematt.ts --test             rehearsal with the CA's staging service; runs the
                               commands in actions.conf for real
  lematt.ts --prod             issue and renew what is due, deliver what is
                               pending, check what is served
  lematt.ts --check            validate the configuration of both modes, or of
                               the one that is given; --challenges also checks
                               that the CA will find a challenge for each name
                               (of --prod if no mode is given)

with --test or --prod, instead of a run:
  --plan [--json]              what a run would do and why; changes nothing
  --status [--offline]         certificates, endpoints, problems; --json, or
                               --metrics for Prometheus (exit status 0 whatever
                               the problems)
  --accept WHAT [--plan]       note as delivered without running commands
  --prune [--yes]              move files that belong to no line to orphaned/
  --revoke WHAT [--yes]        revoke the certificates of a line, or the one in
                               a file; --reason unspecified, keyCompromise,
                               affiliationChanged, superseded or
                               cessationOfOperation
  --rollover [--yes]           give the account a new key

restrict a run, or its --plan (may be repeated):
  --renew NAME [--new-key]     issue the certificates of this line now
  --deliver WHAT               deliver again now
  --only NAME                  this line alone, if it is due or pending

  --retry                      try now what waits after a failure or a limit
  --cron                       print nothing unless something changed or failed
  --verbose                    in a run: print the output of all commands
  --json                       one JSON document instead of lines
  --parallel N                 lines of domains at once (default: "parallel" in
                               lematt.conf, or 10)
  --config PATH                lematt.conf or its directory; default: ./conf,
                               then the conf beside the program
  --help, --version

NAME is a name in "domains", WHAT a name or a section: --deliver '[mail]'

From the line "example.com www" --prod makes, below the configuration directory,
  prod/key/example.com_www.example.com-key.rsa2048.pem             private key
  prod/cert/example.com_www.example.com-cert-combined.rsa2048.pem  with chain
  prod/csr/example.com_www.example.com-csr.rsa2048.csr             request
the same with prime256v1 (EC) for rsa2048, and links to them by single names
(prod/key/www.example.com-key.rsa2048.pem); --test: test/…-key.rsa2048.test.pem

Exit status: 0 no problem; 1 a problem (--status lists them), or interrupted;
2 usage or configuration, or "no" to a question; 3 another run holds the lock
`;

/** Usage errors, in one line. */
class UsageError extends Error {}

const OPTIONS = {
  test: { type: "boolean" },
  prod: { type: "boolean" },
  check: { type: "boolean" },
  challenges: { type: "boolean" },
  plan: { type: "boolean" },
  status: { type: "boolean" },
  offline: { type: "boolean" },
  metrics: { type: "boolean" },
  revoke: { type: "string" },
  reason: { type: "string" },
  rollover: { type: "boolean" },
  prune: { type: "boolean" },
  yes: { type: "boolean" },
  renew: { type: "string", multiple: true },
  "new-key": { type: "boolean" },
  deliver: { type: "string", multiple: true },
  accept: { type: "string", multiple: true },
  only: { type: "string", multiple: true },
  retry: { type: "boolean" },
  cron: { type: "boolean" },
  verbose: { type: "boolean" },
  json: { type: "boolean" },
  parallel: { type: "string" },
  config: { type: "string" },
  help: { type: "boolean", short: "h" },
  version: { type: "boolean" },
} as const;

type Option = keyof typeof OPTIONS;

/** What takes the place of a run; one at a time. */
const COMMANDS = ["check", "plan", "status", "revoke", "rollover", "prune", "accept"] as const;

type Command = typeof COMMANDS[number] | "run";

/** The commands that an option goes with; "run" is a run. */
const GOES_WITH: Partial<Record<Option, readonly Command[]>> = {
  challenges: ["check"],
  offline: ["status"],
  metrics: ["status"],
  reason: ["revoke"],
  yes: ["revoke", "rollover", "prune"],
  renew: ["run", "plan"],
  "new-key": ["run", "plan"],
  deliver: ["run", "plan"],
  only: ["run", "plan"],
  retry: ["run", "plan"],
  cron: ["run"],
  verbose: ["run"],
  json: ["run", "plan", "status"],
  parallel: ["run", "plan"],
};

/** RFC 5280 §5.3.1, as far as subscribers may use it (Baseline Requirements §4.9.1.1). */
const REASONS: ReadonlyMap<string, number> = new Map([
  ["unspecified", 0],
  ["keyCompromise", 1],
  ["affiliationChanged", 3],
  ["superseded", 4],
  ["cessationOfOperation", 5],
]);

type Arguments = ReturnType<typeof parse>;

function parse(args: readonly string[]) {
  const { values, positionals } = parseArgs({ args: [...args], allowPositionals: true, options: OPTIONS });
  const { test, prod, parallel, reason, json, metrics } = values;
  const paths = [...positionals, ...values.config === undefined ? [] : [values.config]];
  if (paths.length > 1) throw new UsageError(`one configuration at a time, not ${paths.join(" and ")}`);
  if (parallel !== undefined && !/^([1-9]\d?|100)$/.test(parallel)) {
    throw new UsageError(`--parallel takes a number from 1 to 100, not ${JSON.stringify(parallel)}`);
  }
  if (reason !== undefined && !REASONS.has(reason)) {
    throw new UsageError(`--reason takes one of ${[...REASONS.keys()].join(", ")}`);
  }
  const commands = COMMANDS.filter((command) => values[command] !== undefined)
    .filter((command) => command !== "accept" || values.plan === undefined); // it has a plan like a run
  if (commands.length > 1) throw new UsageError(`--${commands[0]} does not go with --${commands[1]}`);
  const command: Command = commands[0] ?? "run";
  for (const [option, allowed] of Object.entries(GOES_WITH)) {
    if (values[option as Option] === undefined || allowed.includes(command)) continue;
    const names = allowed.map((one) => one === "run" ? "a run" : `--${one}`);
    throw new UsageError(`--${option} goes with ${names.join(" or ")}`);
  }
  const restriction = (["renew", "deliver", "only"] as const).find((option) => values[option] !== undefined);
  if (values.accept !== undefined && restriction !== undefined) { // with --plan, too
    throw new UsageError(`--accept does not go with --${restriction}`);
  }
  if (values["new-key"] && values.renew === undefined) throw new UsageError("--new-key goes with --renew");
  if (json && metrics) throw new UsageError("--json does not go with --metrics");
  const modes = [test, prod].filter((mode) => mode).length;
  if (!values.help && !values.version && modes !== 1 && !(command === "check" && modes === 0)) {
    throw new UsageError(modes === 0 ? "--test or --prod is needed" : "--test does not go with --prod");
  }
  const mode: Mode | undefined = test ? "test" : prod ? "prod" : undefined;
  return {
    ...values,
    command,
    mode,
    config: paths[0],
    parallel: parallel === undefined ? undefined : Number(parallel),
    reason: REASONS.get(reason ?? "unspecified")!,
  };
}

/** The exit status that an error leads to, if it is not 1. */
const EXIT_STATUS: Readonly<Record<string, number>> = { LockedError: 3, SelectionError: 2, StateError: 2 };

/** The program. Tests replace parts of its context by `outside`. Returns the exit status. */
export async function main(args: readonly string[], outside: Partial<Context> = {}): Promise<number> {
  let options: Arguments;
  try {
    options = parse(args);
  } catch (error) {
    const { message } = error as Error;
    // parseArgs() adds advice after a full stop
    err(`lematt: ${error instanceof UsageError ? message : message.split(/\. |\n/)[0]}\ntry --help\n`);
    return 2;
  }
  if (options.help || options.version) {
    out(options.help ? HELP : `lematt ${VERSION}\n`);
    return 0;
  }

  const stop = new AbortController();
  const interrupt = () => {
    if (stop.signal.aborted) killAll(); // the second time: does not wait for clean-up commands
    stop.abort(new DOMException("interrupted", "AbortError"));
  };
  const signals = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  for (const signal of signals) Deno.addSignalListener(signal, interrupt);
  const program = Deno.build.standalone ? dirname(Deno.execPath()) : import.meta.dirname!;
  try {
    if (["check", "revoke", "rollover"].includes(options.command)) await checkPackages();
    const load = (mode: Mode) => loadConfig(mode, options.config, join(program, "conf"));
    const context = (config: Config) => contextFor(config, stop.signal, outside);
    if (options.command === "check") return await check(options, load, context);
    const config = load(options.mode!);
    return await act(options, config, context(config));
  } catch (error) {
    if (error instanceof ConfigError) return await configurationFailed(error, options);
    if ((error as { code?: string }).code === "ERR_MODULE_NOT_FOUND") {
      err(`lematt: packages are missing or broken; as this user: cd ${program} && deno install --frozen\n`);
      return 2;
    }
    if (!isExpected(error as Error)) throw error; // a bug, which shows its stack
    err(`lematt: ${errorText(error as Error)}\n`);
    return EXIT_STATUS[(error as Error).name] ?? 1;
  } finally {
    for (const signal of signals) Deno.removeSignalListener(signal, interrupt);
  }
}

/** Validates the configuration, for one mode or both. */
async function check(
  { mode, challenges = false }: Arguments,
  load: (mode: Mode) => Config,
  contextOf: (config: Config) => Context,
): Promise<number> {
  const configs = (mode === undefined ? ["prod", "test"] as const : [mode]).map(load);
  const texts = new Set<string>();
  for (const config of configs) {
    for (const notice of [...config.warnings, ...config.advice]) texts.add(noticeText(notice));
    for (const text of await advice(config, contextOf(config))) texts.add(text);
  }
  for (const text of texts) out(`${text}\n`);
  const { file, lines } = configs[0]!;
  out(`${file}: ${count(lines.length, "line")} of domains, no errors\n`);
  if (!challenges) return 0;
  const findings = await tryChallenges(configs[0]!, contextOf(configs[0]!));
  for (const { name, challenge, problem, note } of findings) {
    out(`${name}: ${challenge} ${problem ?? "found"}${note === undefined ? "" : ` (${note})`}\n`);
  }
  return findings.some(({ problem }) => problem !== undefined) ? 1 : 0;
}

/** Prints the errors of the configuration; under --cron they are alerted, too, and both once in 20 hours. */
async function configurationFailed(
  error: InstanceType<typeof ConfigError>,
  { cron, mode }: Arguments,
): Promise<number> {
  const { problems, directory } = error;
  const where = directory === undefined ? "" : `${count(problems.length, "error")} in ${directory}\n`;
  const text = problems.map((problem) => `${noticeText(problem)}\n`).join("") + where;
  const errors = cron ? await alertConfigError(error, text, mode!) : [];
  if (errors === undefined) return 2;
  err(text);
  for (const error of errors) err(`lematt: ${errorText(error)}\n`);
  return 2;
}

function contextFor(config: Config, signal: AbortSignal, outside: Partial<Context>): Context {
  return systemContext({
    fetch: httpClient(config),
    userAgent: `lematt/${VERSION}`,
    signal,
    warn: (text) => err(`lematt: ${text}\n`),
    ...outside,
  });
}

/** Runs the command in one mode, and returns the exit status. */
async function act(options: Arguments, config: Config, outside: Context): Promise<number> {
  const { json = false, retry = false } = options;
  const command = options.command as Exclude<Command, "check">;
  const columns = Deno.stdout.isTerminal() ? Deno.consoleSize().columns || 80 : undefined; // 0: unknown
  const report = new Report({
    mode: config.mode,
    cron: options.cron ?? false,
    json,
    columns: json ? undefined : columns,
    color: Deno.stderr.isTerminal() && !Deno.noColor,
    now: outside.now,
    out,
    err,
  });
  const emit = report.emit.bind(report);
  const context: Context = {
    ...outside,
    warn: (text) => emit({ kind: "notice", text }),
    onOutput: options.verbose ? (text, whose) => emit({ kind: "output", text, whose }) : undefined,
  };
  if (command !== "status") {
    for (const warning of config.warnings) emit({ kind: "notice", text: noticeText(warning) });
  }
  const selection = select(config, { ...options, newKey: options["new-key"] });
  const runOptions = { parallel: options.parallel ?? config.parallel, retry, selection };

  switch (command) {
    case "run":
      try {
        return report.finish(await run(config, runOptions, context, emit));
      } catch (error) {
        report.interrupted();
        throw error;
      }
    case "plan": {
      const plan = preview(config, runOptions, context, emit);
      const toPlace = await records(config, context);
      const accepts = options.accept !== undefined;
      out(json ? planJson(config.mode, plan, toPlace) : planText(plan, toPlace, context.now(), accepts));
      return 0;
    }
    case "status": {
      const found = await status(config, options.offline ?? false, context, (event) => {
        if (event.kind === "notice") err(`lematt: ${event.text}\n`); // not into a document
      });
      out(json ? statusJson(found) : options.metrics ? statusMetrics(found) : statusTable(found, columns));
      return options.metrics ? 0 : exitStatus(found);
    }
    case "accept": {
      const accepted = await accept(config, selection!, context, emit);
      out(`${count(accepted, "certificate")} noted as delivered; no command was run\n`);
      return 0;
    }
    case "prune": {
      const paths = prunable(config);
      if (paths.length === 0) {
        out("nothing to move: every file belongs to a line\n");
        return 0;
      }
      out(`Files in ${config.base} that belong to no line; a service may still use them:\n`);
      out(paths.map((path) => `  ${path}\n`).join(""));
      if (!agreed("Move them to orphaned/?", options)) return 2;
      await prune(config, paths, context, emit);
      out(`moved to ${join(config.base, "orphaned")}\n`);
      return 0;
    }
    case "revoke": {
      const found = revocable(config, options.revoke!);
      out(`Certificates of --${config.mode} to be revoked permanently:\n`);
      for (const { path, certificate: { fingerprint, notAfter, names } } of found) {
        out(`  ${path}\n    ${fingerprint}, valid until ${notAfter.toISOString()}\n`);
        out(`    for ${names.join(" ")}\n`);
      }
      if (!agreed("Revoke them?", options)) return 2;
      await revoke(config, found, options.reason, context, emit);
      out(`revoked; the next run with --${config.mode} replaces them under new keys\n`);
      return 0;
    }
    case "rollover":
      if (!agreed(`Give the account at ${config.directoryUrl} a new key?`, options)) return 2;
      await rollover(config, context, emit);
      return 0;
    default:
      return command satisfies never;
  }
}

/** Whether the user agrees, on a terminal or by --yes. No lock is held while this asks. */
function agreed(question: string, { yes }: Arguments): boolean {
  if (yes || (Deno.stdin.isTerminal() && confirm(question))) return true;
  err("lematt: nothing was done; add --yes to skip the question\n");
  return false;
}

/** fetch() that also trusts the roots of `caBundle`; its client is made when it is first used. */
function httpClient({ caBundle }: Config): Context["fetch"] {
  let client: Deno.HttpClient | undefined;
  return (url, init) => {
    client ??= Deno.createHttpClient({ caCerts: caBundle === undefined ? [] : [caBundle] });
    return fetch(url, { ...init, client });
  };
}

function out(text: string): void {
  writeAll(Deno.stdout, text);
}

function err(text: string): void {
  writeAll(Deno.stderr, text);
}

/**
 * Writes the whole text. A reader that is gone (`lematt.ts --prod | head`) does not stop a run; a log on a full
 * disk does not, either, but sets the exit status.
 */
function writeAll(stream: { writeSync(bytes: Uint8Array): number }, text: string): void {
  const bytes = new TextEncoder().encode(text);
  try {
    for (let written = 0; written < bytes.length;) written += stream.writeSync(bytes.subarray(written));
  } catch (error) {
    if (error instanceof Deno.errors.BrokenPipe || Deno.exitCode !== 0) return;
    Deno.exitCode = 1;
    writeAll(Deno.stderr, `lematt: cannot write its output: ${errorText(error as Error)}\n`);
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args) || Deno.exitCode);
