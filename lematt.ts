#!/usr/bin/env -S deno run -q -P=lematt
/**
 * lematt: Let's Encrypt automation from one place. Command line, help and exit status; the story is in lib/run.ts.
 */

import { join } from "node:path";
import { parseArgs } from "node:util";
import { type Config, ConfigError, loadConfig, type Mode } from "./lib/config.ts";
import { systemRoute } from "./lib/preflight.ts";
import { noticeText, Report } from "./lib/report.ts";
import { preview, run, type World } from "./lib/run.ts";

const VERSION = "0.1.0";

const HELP = `lematt ${VERSION}: Let's Encrypt certificates from one place, for all hosts

  lematt.ts --test                    rehearse with the CA's staging service
  lematt.ts --prod                    issue and renew what is due, deliver what is owed
  lematt.ts --check                   look for faults in the configuration, nothing else

  --config PATH    lematt.conf or its directory (default: ./conf, then the conf beside the program)
  --plan           say what a run would do and why; touch neither the CA nor the disk
  --cron           not a word unless something changed or failed
  --json           one JSON document instead of lines
  --parallel N     lines of domains at once (default: parallel in lematt.conf, 10)
  --help, --version

For the line "example.com www" of the file domains, a run with --prod makes, below the configuration:

  prod/key/example.com_www.example.com-key.rsa2048.pem              private key (-key.prime256v1.pem: EC)
  prod/cert/example.com_www.example.com-cert-combined.rsa2048.pem   certificate and chain
  prod/csr/example.com_www.example.com-csr.rsa2048.csr              signing request
  prod/cert/www.example.com-cert-combined.rsa2048.pem               link to the above; one for each name

and with --test the same below test/, each name with .test before its ending.

Exit status: 0 all is well; 1 a certificate or a delivery failed or is owed; 2 usage or configuration;
3 another run holds the lock.
`;

/** Usage errors, in one line. */
class UsageError extends Error {}

interface Arguments {
  readonly mode?: Mode;
  readonly config?: string;
  readonly check: boolean;
  readonly plan: boolean;
  readonly cron: boolean;
  readonly json: boolean;
  readonly parallel?: number;
  readonly print?: string;
}

function parse(args: readonly string[]): Arguments {
  const { values, positionals } = parseArgs({
    args: [...args],
    allowPositionals: true,
    options: {
      test: { type: "boolean" },
      prod: { type: "boolean" },
      check: { type: "boolean" },
      plan: { type: "boolean" },
      cron: { type: "boolean" },
      json: { type: "boolean" },
      config: { type: "string" },
      parallel: { type: "string" },
      help: { type: "boolean", short: "h" },
      version: { type: "boolean" },
    },
  });
  const { test, prod, check = false, plan = false, cron = false, json = false, parallel } = values;
  const print = values.help ? HELP : values.version ? `lematt ${VERSION}\n` : undefined;
  const paths = [...positionals, ...values.config === undefined ? [] : [values.config]];
  if (paths.length > 1) throw new UsageError(`one configuration at a time, not ${paths.join(" and ")}`);
  if (parallel !== undefined && !/^([1-9]\d?|100)$/.test(parallel)) {
    throw new UsageError(`--parallel takes a number from 1 to 100, not ${JSON.stringify(parallel)}`);
  }
  if (print === undefined && Number(test ?? 0) + Number(prod ?? 0) !== 1 && !(check && !test && !prod)) {
    throw new UsageError("say either --test or --prod");
  }
  return {
    mode: test ? "test" : prod ? "prod" : undefined,
    config: paths[0],
    check,
    plan,
    cron,
    json,
    parallel: parallel === undefined ? undefined : Number(parallel),
    print,
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
  if (options.print !== undefined) {
    out(options.print);
    return 0;
  }

  let config: Config;
  try {
    config = loadConfig(options.config, join(import.meta.dirname ?? ".", "conf"));
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    for (const fault of error.faults) err(`${noticeText(fault)}\n`);
    return 2;
  }
  const { mode, json, cron, check, plan } = options;
  if (mode === undefined || check) {
    for (const warning of config.warnings) out(`${noticeText(warning)}\n`);
    out(`${config.file}: ${config.lines.length} lines of domains, no faults\n`);
    return 0;
  }

  const terminal = Deno.stdout.isTerminal();
  const color = terminal && !Deno.noColor;
  const now = world.now ?? (() => new Date());
  const report = new Report({ mode, cron, json, terminal: terminal && !json, color, now, out, err });
  for (const warning of config.warnings) report.tell({ kind: "notice", text: noticeText(warning) });
  const tell = report.tell.bind(report);
  if (plan) return report.finish(preview(config, mode, { now }, tell)) && 0;

  const stop = new AbortController();
  const interrupt = () => stop.abort(new DOMException("interrupted", "AbortError"));
  const signals = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  for (const signal of signals) Deno.addSignalListener(signal, interrupt);
  try {
    const summary = await run(config, mode, options.parallel ?? config.parallel, {
      fetch: httpClient(config),
      now,
      random: Math.random,
      route: systemRoute,
      userAgent: `lematt/${VERSION}`,
      signal: stop.signal,
      ...world,
    }, tell);
    return report.finish(summary);
  } catch (error) {
    const { name, message, code } = error as Error & { code?: string };
    if (name !== "LockedError" && code === undefined) throw error;
    err(`lematt: ${message}\n`);
    return name === "LockedError" ? 3 : 1;
  } finally {
    for (const signal of signals) Deno.removeSignalListener(signal, interrupt);
  }
}

/** fetch() that also trusts the roots of `caBundle`. */
function httpClient({ caBundle }: Config): World["fetch"] {
  if (caBundle === undefined) return fetch;
  const client = Deno.createHttpClient({ caCerts: [caBundle] });
  return (url, init) => fetch(url, { ...init, client });
}

function writeAll(stream: { writeSync(bytes: Uint8Array): number }, text: string): void {
  const bytes = new TextEncoder().encode(text);
  for (let written = 0; written < bytes.length;) written += stream.writeSync(bytes.subarray(written));
}

if (import.meta.main) Deno.exit(await main(Deno.args));
