/**
 * A DNS server on loopback (RFC 1035), for dns-01. It answers over UDP and TCP from a table that tests change, and
 * authoritatively for every name; what it does not understand it ignores.
 */
import { Buffer } from "node:buffer";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { ipOctets } from "./ca-x509.ts";

const TYPES = { A: 1, NS: 2, CNAME: 5, SOA: 6, TXT: 16, AAAA: 28 } as const;
const IN = 1, NXDOMAIN = 3, RESPONSE = 0x8000, AUTHORITATIVE = 0x0400, TRUNCATED = 0x0200;
/** Longer answers are truncated, so that they are asked for again over TCP (dnsflagday.net/2020). */
const MAX_UDP_BYTES = 1232;

export type RecordType = keyof typeof TYPES;

/** A running DNS server. `txt` and `cname` fit the switches of the test CA. */
export interface Dns extends AsyncDisposable {
  readonly port: number;
  /** The questions asked, `TXT _acme-challenge.example.com`. */
  readonly log: readonly string[];
  /**
   * Replaces the records of one type at a name; without values they are gone. SOA takes the primary's name.
   */
  set(name: string, type: RecordType, ...values: string[]): void;
  get(name: string, type: RecordType): readonly string[];
  txt(name: string): Promise<readonly string[]>;
  cname(name: string): Promise<string | undefined>;
  close(): Promise<void>;
}

/** Further records: what a hook command has put into a file, say. Asked anew with every question. */
export type Further = (name: string, type: RecordType) => readonly string[];

/** Starts a DNS server on 127.0.0.1; port 0 takes a free one. */
export async function startDns(further: Further = () => [], wanted = 0): Promise<Dns> {
  const records = new Map<string, Map<RecordType, readonly string[]>>();
  const log: string[] = [];
  const key = (name: string) => name.toLowerCase().replace(/\.$/, "");
  const get = (name: string, type: RecordType) => [
    ...records.get(key(name))?.get(type) ?? [],
    ...further(key(name), type),
  ];

  /** The answer to a message, without records where it would be longer; undefined if it cannot be answered. */
  function answer(message: Uint8Array, maxBytes = Infinity): Buffer | undefined {
    const question = readQuestion(message);
    if (question === undefined) return undefined;
    const { type, text } = question;
    let { name } = question;
    log.push(`${type} ${name}`);
    const answers: Buffer[] = [];
    for (let links = 0; links < 10; links++) {
      for (const value of get(name, type)) answers.push(writeRecord(name, type, value));
      const [target] = type === "CNAME" ? [] : get(name, "CNAME");
      if (target === undefined) break;
      answers.push(writeRecord(name, "CNAME", target));
      name = target;
    }
    const asked = key(question.name);
    const exists = answers.length > 0 ||
      [...records.keys()].some((known) => known === asked || known.endsWith(`.${asked}`));
    const size = answers.reduce((sum, { length }) => sum + length, 12 + text.length);
    const fits = size <= maxBytes;
    const recursionDesired = message[2]! << 8 & 0x0100;
    const status = recursionDesired | (exists ? 0 : NXDOMAIN) | (fits ? 0 : TRUNCATED);
    const head = Buffer.alloc(12);
    head.set(message.subarray(0, 2));
    head.writeUInt16BE(RESPONSE | AUTHORITATIVE | status, 2);
    head.writeUInt16BE(1, 4);
    head.writeUInt16BE(fits ? answers.length : 0, 6);
    return Buffer.concat([head, text, ...(fits ? answers : [])]);
  }

  const listener = Deno.listen({ hostname: "127.0.0.1", port: wanted });
  const { port } = listener.addr;
  const conversations = new Set<Promise<void>>();
  const open = new Set<Deno.Conn>();
  async function converse(connection: Deno.Conn): Promise<void> {
    open.add(connection);
    let received = Buffer.alloc(0);
    try {
      for await (const chunk of connection.readable) {
        received = Buffer.concat([received, chunk]);
        for (let end; received.length >= 2 && received.length >= (end = 2 + received.readUInt16BE());) {
          const reply = answer(received.subarray(2, end));
          received = received.subarray(end);
          if (reply !== undefined) {
            await connection.write(Buffer.from([reply.length >> 8, reply.length & 0xff, ...reply]));
          }
        }
      }
    } catch {
      // A client that went away in the middle, or the end of the server.
    }
    open.delete(connection);
  }
  const accepting = (async () => {
    for await (const connection of listener) {
      const done = converse(connection).finally(() => conversations.delete(done));
      conversations.add(done);
    }
  })();

  const socket = createSocket("udp4");
  socket.on("message", (message, from) => {
    const reply = answer(message, MAX_UDP_BYTES);
    if (reply !== undefined) socket.send(reply, from.port, from.address);
  });
  socket.bind(port, "127.0.0.1");
  await once(socket, "listening");

  async function close(): Promise<void> {
    socket.close();
    listener.close();
    for (const connection of open) connection.close();
    await Promise.all([accepting, ...conversations, once(socket, "close")]);
  }
  return {
    port,
    log,
    get,
    set(name, type, ...values) {
      const at = records.get(key(name)) ?? new Map<RecordType, readonly string[]>();
      if (values.length > 0) records.set(key(name), at.set(type, values));
      else if (at.delete(type) && at.size === 0) records.delete(key(name));
    },
    txt: (name) => Promise.resolve(get(name, "TXT")),
    cname: (name) => Promise.resolve(get(name, "CNAME")[0]),
    close,
    [Symbol.asyncDispose]: close,
  };
}

interface Question {
  readonly name: string;
  readonly type: RecordType;
  /** As in the message. */
  readonly text: Uint8Array;
}

function readQuestion(message: Uint8Array): Question | undefined {
  const labels: string[] = [];
  let at = 12;
  for (let length; (length = message[at]) !== 0; at += 1 + length) {
    if (length === undefined || length > 63) return undefined;
    labels.push(Buffer.from(message.subarray(at + 1, at + 1 + length)).toString("latin1"));
  }
  const code = Buffer.from(message.subarray(at + 1, at + 3)).readUInt16BE();
  const type = (Object.keys(TYPES) as RecordType[]).find((known) => TYPES[known] === code);
  return type && { name: labels.join("."), type, text: message.subarray(12, at + 5) };
}

function writeName(name: string): Buffer {
  const labels = name.replace(/\.$/, "").split(".").filter((label) => label !== "");
  return Buffer.concat(
    [...labels, ""].map((label) => Buffer.from(String.fromCharCode(label.length) + label)),
  );
}

function writeRecord(name: string, type: RecordType, value: string): Buffer {
  const data = writeData(type, value);
  const head = Buffer.alloc(10);
  head.writeUInt16BE(TYPES[type], 0);
  head.writeUInt16BE(IN, 2); // and a time to live of 0, so that nobody remembers what a test changes
  head.writeUInt16BE(data.length, 8);
  return Buffer.concat([writeName(name), head, data]);
}

function writeData(type: RecordType, value: string): Buffer {
  switch (type) {
    case "A":
    case "AAAA":
      return Buffer.from(ipOctets(value));
    case "TXT": {
      const parts = value.match(/[^]{1,255}/g) ?? [""];
      return Buffer.concat(parts.flatMap((part) => [Buffer.of(part.length), Buffer.from(part, "latin1")]));
    }
    case "SOA":
      return Buffer.concat([writeName(value), writeName(`hostmaster.${value}`), Buffer.alloc(20)]);
    case "NS":
    case "CNAME":
      return writeName(value);
  }
}
