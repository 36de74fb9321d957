/**
 * Host names, wildcards and IP addresses: text as written -> the form in which names are compared, stored, sent to the
 * CA and put in file names. And text from outside, made safe to print. Pure.
 *
 * Host names: RFC 1123 §2.1, A-labels by UTS 46; IP addresses: RFC 8738, RFC 5952.
 */
import defer * as node from "node:process";

/** Why a text is invalid. */
export interface Invalid {
  readonly why: string;
  readonly hint?: string;
}

export function isInvalid(value: unknown): value is Invalid {
  return typeof value === "object" && value !== null && "why" in value;
}

// ---------------------------------------------------------------------------------------------------- names

/** For names beyond ASCII. Loading it takes longer than a run with nothing due; `import defer` does not defer it. */
const nodeUrl = () => node.getBuiltinModule("node:url");

const OCTET = "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
const IPV4 = new RegExp(`^(?:${OCTET}\\.){3}${OCTET}$`);
const LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?";
const LABEL_ALONE = new RegExp(`^(?![0-9]+$)${LABEL}$`, "i");
/** At least two labels; the last is not a number, which would be read as an IPv4 address. */
const HOST = new RegExp(`^(?:${LABEL}\\.)+(?![0-9]+$)${LABEL}$`);

/** Why a name that is not HOST is invalid: the first match. `$` is replaced by the matched text. */
const REASONS: readonly (readonly [pattern: RegExp, why: string, hint?: string])[] = [
  [/\//, "$ is not allowed in a name", "write the name alone, not a URL"],
  [/[,;]/, "$ is not allowed in a name", "separate names by blanks"],
  [/#/, "$ is not allowed in a name", "a comment needs a line of its own"],
  [/\*/, "$ is only allowed as the whole first label"],
  [/:/, "$ is not allowed in a name or IP address"],
  [/[^a-z0-9.-]/, "$ is not allowed in a name"],
  [/\.$/, "trailing dot", "remove the dot"],
  [/^\.|\.\./, "empty label"],
  [/[^.]{64,}/, "label $ is longer than 63 characters"],
  [/(?<![^.])-[^.]*|[^.]*-(?![^.])/, "label $ begins or ends with a dash"],
  [/^[^.]*$/, "no dot in it", "write the name in full"],
  [/\d+$/, "neither an IP address nor a host name, whose last label cannot be a number"],
];

/** A host name, wildcard or IP address in its one form: lower case, A-labels, RFC 5952 text. No trailing dot. */
export function toIdentifier(written: string): string | Invalid {
  // the length is checked before the conversion, too, which takes quadratic time
  const name = written.length > 253 || !/[^!-~]/.test(written) ? written.toLowerCase() : toAscii(written);
  if (isInvalid(name)) return name;
  if (name.length > 253) return { why: "longer than 253 characters" };
  const host = name.startsWith("*.") ? name.slice(2) : name;
  if (HOST.test(host)) {
    const valid = !host.includes("xn--") || nodeUrl().domainToASCII(host) === host;
    return valid ? name : { why: `invalid "xn--" label` };
  }
  if (isIP(name) === 4) return name;
  const address = toIPv6(name);
  if (address?.startsWith("::ffff:")) return { why: "IPv4-mapped IPv6 address", hint: "write it as IPv4" };
  if (address !== undefined) return address;
  for (const [pattern, why, hint] of REASONS) {
    const found = pattern.exec(host);
    if (found) return { why: why.replace("$", () => quote(found[0])), hint };
  }
  return { why: "not a host name" };
}

/** A-labels for labels beyond ASCII, if converting them back gives the same labels. */
function toAscii(written: string): string | Invalid {
  if (/[\p{C}\p{Z}]/u.test(written)) return { why: "invisible character" };
  const labels = written.normalize("NFC").split(".");
  for (const [index, label] of labels.entries()) {
    const foreign = /[^!-~]/.test(label);
    const ascii = foreign ? nodeUrl().domainToASCII(label) : label.toLowerCase();
    if (!ascii) return { why: `label ${quote(label)} cannot be written in ASCII` };
    const back = nodeUrl().domainToUnicode(ascii);
    if (foreign && (back === ascii || back !== label.toLowerCase())) {
      return {
        why: `label ${quote(label)} is another spelling of ${quote(back)}`,
        hint: `write ${quote(back)}`,
      };
    }
    labels[index] = ascii;
  }
  return labels.join(".");
}

/** The wildcard that covers a host name (RFC 9525 §6.3). */
export function wildcardOf(name: string): string {
  return name.replace(/^[^.]*/, "*");
}

/** Whether one of these names is `name`, or the wildcard that covers it. */
export function covers(names: ReadonlySet<string>, name: string): boolean {
  return names.has(name) || names.has(wildcardOf(name));
}

/** 4 or 6 for an IP address, 0 for any other text. */
export function isIP(text: string): 0 | 4 | 6 {
  return IPV4.test(text) ? 4 : toIPv6(text) === undefined ? 0 : 6;
}

/** An IPv6 address in the text of RFC 5952, which URLs have, too; undefined for any other text. */
export function toIPv6(text: string): string | undefined {
  return /^[0-9a-f:.]*:[0-9a-f:.]*$/i.test(text)
    ? URL.parse(`http://[${text}]/`)?.hostname.slice(1, -1)
    : undefined;
}

/** Host of an endpoint: a placeholder, an IP address, or a name, which need not have a dot. */
export function toHost(text: string): string | Invalid {
  if (text === "DOMAIN" || text === "DOMAINS_ALL") return text;
  if (text === "") return { why: "no name" };
  if (LABEL_ALONE.test(text)) return text.toLowerCase();
  return text.startsWith("*") ? { why: "a wildcard is not a host" } : toIdentifier(text);
}

// ----------------------------------------------------------------------------------------------------- text

/** Text from a file as messages show it: `printable`, in double quotes. */
export function quote(text: string): string {
  return `"${printable(text)}"`;
}

/** Text from a file, shortened, with invisible characters and those that a terminal might act on escaped. */
export function printable(text: string, most = 80): string {
  const shown = text.length > most ? `${text.slice(0, most - 1)}…` : text;
  return shown.toWellFormed().replaceAll("\n", "\\n").replaceAll("\t", "\\t")
    .replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (char) => `\\u{${char.codePointAt(0)!.toString(16)}}`);
}

/** Text from a CA or another host on one line of bounded length, without control, format or direction characters. */
export function oneLine(text: string): string {
  const clean = text.slice(0, 4000).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]+/gu, " ").trim();
  return clean.length > 2000 ? `${clean.slice(0, 2000)}…` : clean; // room for Let's Encrypt's links to unpause
}

/** The output of a command with its line breaks, without escapes (ECMA-48), controls or changes of direction. */
export function ownLines(text: string): string {
  return text
    // deno-lint-ignore no-control-regex
    .replace(/\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/]*[0-~])?/g, "")
    .replace(/\r\n?/g, "\n")
    // deno-lint-ignore no-control-regex
    .replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g, "");
}

/** A path as a word of a command line that users may copy. */
export function shellWord(path: string): string {
  return /^[\w@%+=:,./-]+$/.test(path) ? path : `'${printable(path, 200).replaceAll("'", `'\\''`)}'`;
}
