#!/usr/bin/env -S DENO_NO_UPDATE_CHECK=1 deno run -q --no-prompt -P=lematt --v8-flags=--max-semi-space-size=4
/**
 * lematt: Let's Encrypt automation from one place. Command line, help and exit status; the story is in lib/run.ts.
 */

import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { type Config, ConfigError, loadConfig, type Mode } from "./lib/config.ts";
import { systemQuery, systemRoute } from "./lib/context.ts";
import { errorText, isSystemError, noticeText, Report, revocationText } from "./lib/report.ts";
import {
  adviceFor,
  preview,
  revocable,
  revoke,
  rollover,
  run,
  status,
  type Tell,
  type World,
} from "./lib/run.ts";
import { exitStatus, statusJson, statusMetrics, statusTable } from "./lib/status.ts";

const VERSION = "0.1.0";

const HELP = `lematt ${VERSION}: Let's Encrypt certificates from one place, for all hosts

  lematt.ts --test             rehearse everything with the CA's staging service
  lematt.ts --prod             issue and renew what is due, deliver what is owed
  lematt.ts --check            look for faults in the configuration, no more

with --test or --prod:
  --plan                       say what a run would do and why; touch nothing
  --status [--offline]         how all stands, also at the endpoints of verify;
                               --json or --metrics (Prometheus) for machines
  --revoke NAME                revoke the certificates of NAME's line [--yes];
                               --reason keyCompromise, superseded, …
  --rollover                   give the account a new key
  --retry                      try again now what should wait
  --cron                       not a word unless something changed or failed
  --json                       one JSON document instead of lines
  --parallel N                 lines of domains at once (default 10)
  --config PATH                lematt.conf or its directory; default: ./conf,
                               then the conf beside the program

Of the line "example.com www" --prod makes, below the configuration directory,
  prod/key/example.com_www.example.com-key.rsa2048.pem             private key
  prod/cert/example.com_www.example.com-cert-combined.rsa2048.pem  with chain
  prod/csr/example.com_www.example.com-csr.rsa2048.csr             request
the same with prime256v1 (EC) for rsa2048, and links to them by single names
(prod/key/www.example.com-key.rsa2048.pem); --test: test/…-key.rsa2048.test.pem

Exit status: 0 all is well; 1 something failed, waits or is owed; 2 usage or
configuration; 3 another run holds the lock
`;

/** Usage errors, in one line. */
class UsageError extends Error {}

const OPTIONS = {
  test: { type: "boolean" },
  prod: { type: "boolean" },
  check: { type: "boolean" },
  plan: { type: "boolean" },
  status: { type: "boolean" },
  offline: { type: "boolean" },
  metrics: { type: "boolean" },
  revoke: { type: "string" },
  rollover: { type: "boolean" },
  reason: { type: "string" },
  yes: { type: "boolean" },
  retry: { type: "boolean" },
  cron: { type: "boolean" },
  json: { type: "boolean" },
  parallel: { type: "string" },
  config: { type: "string" },
  help: { type: "boolean", short: "h" },
  version: { type: "boolean" },
} as const;

/** What each option goes with; one that stands alone is not here. */
const NEEDS: Readonly<Record<string, string>> = {
  offline: "status",
  metrics: "status",
  reason: "revoke",
  yes: "revoke",
};

/** RFC 5280 §5.3.1, as far as subscribers may say it (Baseline Requirements §4.9.1.1). */
const REASONS: Readonly<Record<string, number>> = {
  unspecified: 0,
  keyCompromise: 1,
  affiliationChanged: 3,
  superseded: 4,
  cessationOfOperation: 5,
};

type Arguments = ReturnType<typeof parse>;

function parse(args: readonly string[]) {
  const { values, positionals } = parseArgs({ args: [...args], allowPositionals: true, options: OPTIONS });
  const { test, prod, check, parallel, reason, plan, status, revoke, rollover, json, metrics } = values;
  const paths = [...positionals, ...values.config === undefined ? [] : [values.config]];
  if (paths.length > 1) throw new UsageError(`one configuration at a time, not ${paths.join(" and ")}`);
  if (parallel !== undefined && !/^([1-9]\d?|100)$/.test(parallel)) {
    throw new UsageError(`--parallel takes a number from 1 to 100, not ${JSON.stringify(parallel)}`);
  }
  if (reason !== undefined && !Object.hasOwn(REASONS, reason)) {
    throw new UsageError(`--reason takes one of ${Object.keys(REASONS).join(", ")}`);
  }
  for (const [option, needed] of Object.entries(NEEDS)) {
    if (option in values && !(needed in values)) throw new UsageError(`--${option} goes with --${needed}`);
  }
  if ([check, plan, status, revoke, rollover].filter((one) => one !== undefined).length > 1) {
    throw new UsageError("one of --check, --plan, --status, --revoke and --rollover at a time");
  }
  if (json && (check || rollover || revoke !== undefined)) {
    throw new UsageError("--json goes with a run, --plan or --status");
  }
  if (json && metrics) throw new UsageError("one of --json and --metrics at a time");
  const modes = [test, prod].filter((mode) => mode).length;
  if (!values.help && !values.version && modes !== 1 && !(check && modes === 0)) {
    throw new UsageError("say either --test or --prod");
  }
  const mode: Mode | undefined = test ? "test" : prod ? "prod" : undefined;
  return {
    ...values,
    mode,
    config: paths[0],
    parallel: parallel === undefined ? undefined : Number(parallel),
    reason: REASONS[reason ?? "unspecified"]!,
  };
}

/** The program; `world` stands in for parts of the outside in tests. Returns the exit status. */
export async function main(args: readonly string[], world: Partial<World> = {}): Promise<number> {
  const out = (text: string) => writeAll(Deno.stdout, text);
  const err = (text: string) => writeAll(Deno.stderr, text);
  let options: Arguments;
  try {
    options = parse(args);
  } catch (error) {
    err(`lematt: ${(error as Error).message.split("\n")[0]}\ntry --help\n`);
    return 2;
  }
  if (options.help || options.version) {
    out(options.help ? HELP : `lematt ${VERSION}\n`);
    return 0;
  }

  const program = Deno.build.standalone ? dirname(Deno.execPath()) : import.meta.dirname!;
  const modes = options.mode === undefined ? ["prod", "test"] as const : [options.mode];
  let configs: Config[];
  try {
    configs = modes.map((mode) => loadConfig(mode, options.config, join(program, "conf")));
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    for (const problem of error.problems) err(`${noticeText(problem)}\n`);
    return 2;
  }
  const config = configs[0]!;
  if (options.mode === undefined || options.check) {
    const warnings = configs.flatMap(({ warnings }) => warnings.map(noticeText));
    for (const warning of new Set(warnings)) out(`${warning}\n`);
    for (const config of configs) for (const text of await adviceFor(config)) out(`${text}\n`);
    const count = config.lines.length;
    out(`${config.file}: ${count} ${count === 1 ? "line" : "lines"} of domains, no faults\n`);
    return 0;
  }

  const stop = new AbortController();
  const interrupt = () => stop.abort(new DOMException("interrupted", "AbortError"));
  const signals = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  for (const signal of signals) Deno.addSignalListener(signal, interrupt);
  try {
    return await act(options, config, {
      fetch: httpClient(config),
      now: () => new Date(),
      random: Math.random,
      route: systemRoute,
      query: systemQuery,
      userAgent: `lematt/${VERSION}`,
      signal: stop.signal,
      ...world,
    }, { out, err });
  } catch (error) {
    const { name } = error as Error;
    const known: Record<string, number> = {
      LockedError: 3,
      SelectionError: 2,
      AcmeError: 1,
      AbortError: 1,
      CommandError: 1, // no openssl to look at endpoints with
    };
    // what the system refused is said in a line, too; anything else is a bug and shows its stack
    if (!(name in known) && !isSystemError(error as Error)) throw error;
    err(`lematt: ${errorText(error as Error)}\n`);
    return known[name] ?? 1;
  } finally {
    for (const signal of signals) Deno.removeSignalListener(signal, interrupt);
  }
}

/** Does what the arguments ask for in one mode, and returns the exit status. */
async function act(
  options: Arguments,
  config: Config,
  world: World,
  { out, err }: { out: (text: string) => void; err: (text: string) => void },
): Promise<number> {
  const { json = false, plan = false, retry = false } = options;
  const cron = options.cron === true && !plan; // who asks for a plan wants to see it
  const terminal = Deno.stdout.isTerminal();
  const { now } = world;
  const { mode } = config;
  const report = new Report({
    mode,
    cron,
    json,
    terminal: terminal && !json,
    color: Deno.stderr.isTerminal() && !Deno.noColor,
    now,
    out,
    err,
  });
  const tell: Tell = (event) => report.tell(event);

  if (options.status) {
    const found = await status(config, options.offline ?? false, world, (event) => {
      if (event.kind === "notice") err(`lematt: ${event.text}\n`); // not into a document
    });
    out(json ? statusJson(found) : options.metrics ? statusMetrics(found) : statusTable(found));
    return exitStatus(found);
  }
  for (const warning of config.warnings) tell({ kind: "notice", text: noticeText(warning) });
  if (plan) {
    report.finish(await preview(config, retry, world, tell));
    return 0;
  }
  if (options.revoke !== undefined) {
    const entries = revocable(config, options.revoke);
    out(revocationText(mode, entries));
    if (!options.yes && !(Deno.stdin.isTerminal() && confirm("Revoke?"))) {
      err("lematt: nothing was revoked; --yes revokes without asking\n");
      return 2;
    }
    await revoke(config, entries, options.reason, world, tell);
    out(`revoked; the next run with --${mode} replaces them under new keys\n`);
    return 0;
  }
  if (options.rollover) {
    await rollover(config, world, tell);
    return 0;
  }
  return report.finish(
    await run(config, { parallel: options.parallel ?? config.parallel, retry }, world, tell),
  );
}

/** fetch() that also trusts the roots of `caBundle`; made ready when it is first used. */
function httpClient({ caBundle }: Config): World["fetch"] {
  let client: Deno.HttpClient | undefined;
  return (url, init) => {
    client ??= Deno.createHttpClient({ caCerts: caBundle === undefined ? [] : [caBundle] });
    return fetch(url, { ...init, client });
  };
}

/**
 * Writes the whole text. That nobody reads it any more (`lematt.ts --prod | head`) is no reason to stop a run; nor is a
 * log on a full disk, but then the exit status tells.
 */
function writeAll(stream: { writeSync(bytes: Uint8Array): number }, text: string): void {
  const bytes = new TextEncoder().encode(text);
  try {
    for (let written = 0; written < bytes.length;) written += stream.writeSync(bytes.subarray(written));
  } catch (error) {
    if (error instanceof Deno.errors.BrokenPipe || Deno.exitCode !== 0) return;
    Deno.exitCode = 1;
    writeAll(Deno.stderr, `lematt: cannot write what there is to say: ${errorText(error as Error)}\n`);
  }
}

if (import.meta.main) Deno.exit(await main(Deno.args) || Deno.exitCode);
