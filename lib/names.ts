/**
 * What a host name, a wildcard and an IP address are: text as written -> the one form in which it is compared, stored
 * and sent to the CA, or why it is none of them.
 *
 * Pure; knows no file and asks no DNS. Whatever it accepts may stand in a file name and in a request to the CA.
 *
 * Host names: RFC 1123 §2.1, A-labels by UTS 46; IP addresses: RFC 8738, RFC 5952.
 */
import defer * as node from "node:process";
import { isMistake, type Mistake, quote } from "./text.ts";

/** For names beyond ASCII; it takes longer to load than a run with nothing due, and does not let itself be deferred. */
const nodeUrl = () => node.getBuiltinModule("node:url");

const OCTET = "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
const IPV4 = new RegExp(`^(?:${OCTET}\\.){3}${OCTET}$`);
const LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?";
const LABEL_ALONE = new RegExp(`^(?![0-9]+$)${LABEL}$`, "i");
/** Two labels at least, the last not a number: it would be taken for an IPv4 address. */
const HOST = new RegExp(`^(?:${LABEL}\\.)+(?![0-9]+$)${LABEL}$`);

/**
 * A host name, wildcard or IP address in the one form in which it is compared, stored and sent to the CA: lower case,
 * A-labels, RFC 5952 text; or why it is none. A trailing dot is refused rather than dropped: one name, one spelling.
 */
export function toIdentifier(written: string): string | Mistake {
  // Before the conversion too, which takes quadratic time.
  const name = written.length > 253 || !/[^!-~]/.test(written) ? written.toLowerCase() : toAscii(written);
  if (isMistake(name)) return name;
  if (name.length > 253) return { why: "it has more than 253 characters" };
  const host = name.startsWith("*.") ? name.slice(2) : name;
  if (HOST.test(host)) {
    if (!host.includes("xn--") || nodeUrl().domainToASCII(host) === host) return name;
    return { why: `it has an "xn--" label that stands for nothing` };
  }
  if (isIP(name) === 4) return name;
  const address = toIPv6(name);
  if (address?.startsWith("::ffff:")) {
    return { why: "it is an IPv4 address in IPv6 clothes", hint: "write it as IPv4" };
  }
  return address ?? whyNoHost(host);
}

/** A-labels for what is not ASCII, if and only if the way back leads to the same name. */
function toAscii(written: string): string | Mistake {
  if (/[\p{C}\p{Z}]/u.test(written)) return { why: "it has a character that cannot be seen" };
  const labels = written.normalize("NFC").split(".");
  for (const [index, label] of labels.entries()) {
    const foreign = /[^!-~]/.test(label);
    const ascii = foreign ? nodeUrl().domainToASCII(label) : label.toLowerCase();
    if (!ascii) return { why: `${quote(label)} has no form in the DNS` };
    const back = nodeUrl().domainToUnicode(ascii);
    if (foreign && (back === ascii || back !== label.toLowerCase())) {
      return { why: `${quote(label)} would become ${quote(back)}`, hint: "write that if you mean it" };
    }
    labels[index] = ascii;
  }
  return labels.join(".");
}

/** 4 or 6 for the text of an IP address, 0 for all else. */
export function isIP(text: string): 0 | 4 | 6 {
  return IPV4.test(text) ? 4 : toIPv6(text) === undefined ? 0 : 6;
}

/** An IPv6 address in its canonical text by RFC 5952, which is what URLs have too; undefined if it is none. */
export function toIPv6(text: string): string | undefined {
  return /^[0-9a-f:.]*:[0-9a-f:.]*$/i.test(text)
    ? URL.parse(`http://[${text}]/`)?.hostname.slice(1, -1)
    : undefined;
}

function whyNoHost(name: string): Mistake {
  const odd = name.includes("/") ? "/" : /[^a-z0-9.-]/.exec(name)?.[0];
  if (odd === "*") return { why: `"*" may only be the whole first label` };
  if (odd === "," || odd === ";") {
    return { why: `${quote(odd)} cannot stand in a name`, hint: "separate names by blanks" };
  }
  if (odd === "#") return { why: `"#" cannot stand in a name`, hint: "a comment needs a line of its own" };
  if (odd === "/") return { why: `"/" cannot stand in a name`, hint: "write the name alone, not a URL" };
  if (odd) return { why: `${quote(odd)} cannot stand in a ${odd === ":" ? "name or IP address" : "name"}` };
  if (name.endsWith(".")) return { why: "it ends in a dot", hint: "leave the dot out" };
  const labels = name.split(".");
  if (labels.includes("")) return { why: "an empty label, where two dots meet or a dot begins it" };
  const long = labels.find((label) => label.length > 63);
  if (long) return { why: `the label ${quote(long)} has more than 63 characters` };
  const dash = labels.find((label) => /^-|-$/.test(label));
  if (dash) return { why: `the label ${quote(dash)} begins or ends with a dash` };
  if (labels.length < 2) return { why: "it has no dot", hint: "write the name in full" };
  return { why: "its last label is a number, but it is no IP address" };
}

/** Where a service is reached, or why that is nowhere: a placeholder, an IPv4 address or a name, which may be one without a dot. */
export function toHost(text: string): string | Mistake {
  if (text === "DOMAIN" || text === "DOMAINS_ALL") return text;
  if (text === "") return { why: "there is no name" };
  if (LABEL_ALONE.test(text)) return text.toLowerCase();
  return text.startsWith("*") ? { why: "a wildcard is no host" } : toIdentifier(text);
}
