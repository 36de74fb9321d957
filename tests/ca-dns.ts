/**
 * A DNS server on loopback (RFC 1035), for dns-01. It answers over UDP and TCP from a table that tests change, and is
 * authoritative for every name. It ignores messages that it cannot read.
 */
import { Buffer } from "node:buffer";
import { createSocket } from "node:dgram";
import { once } from "node:events";

const TYPES = { A: 1, NS: 2, CNAME: 5, SOA: 6, TXT: 16, AAAA: 28 } as const;
const IN = 1, NXDOMAIN = 3, RESPONSE = 0x8000, AUTHORITATIVE = 0x0400, TRUNCATED = 0x0200;
/** Longer answers are truncated, and the client asks again over TCP (dnsflagday.net/2020). */
const MAX_UDP_BYTES = 1232;

export type RecordType = keyof typeof TYPES;

/** A running DNS server. `txt` and `cname` fit the switches of the test CA. */
export interface Dns extends AsyncDisposable {
  readonly port: number;
  /** The questions: `TXT _acme-challenge.example.com`. */
  readonly log: readonly string[];
  /** Replaces the records of one type at a name, or removes them if there are no values. The value of SOA is the primary. */
  set(name: string, type: RecordType, ...values: string[]): void;
  txt(name: string): Promise<readonly string[]>;
  cname(name: string): Promise<string | undefined>;
}

/** Further records, for example from files that a hook command writes. Called for every question. */
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

  /** The answer to a message, truncated to no records if it is longer than `maxBytes`; undefined for an unreadable message. */
  function answer(message: Buffer, maxBytes = Infinity): Buffer | undefined {
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
    const fits = Buffer.concat([text, ...answers]).length + 12 <= maxBytes;
    const recursionDesired = message[2]! << 8 & 0x0100;
    const status = recursionDesired | (exists ? 0 : NXDOMAIN) | (fits ? 0 : TRUNCATED);
    const head = numbers(
      message.readUInt16BE(),
      RESPONSE | AUTHORITATIVE | status,
      1,
      fits ? answers.length : 0,
      0,
      0,
    );
    return Buffer.concat([head, text, ...(fits ? answers : [])]);
  }

  const listener = Deno.listen({ hostname: "127.0.0.1", port: wanted });
  const { port } = listener.addr;
  const serving = new Set<Promise<void>>();
  const open = new Set<Deno.Conn>();
  async function serve(connection: Deno.Conn): Promise<void> {
    open.add(connection);
    let received = Buffer.alloc(0);
    try {
      for await (const chunk of connection.readable) {
        received = Buffer.concat([received, chunk]);
        for (let end; received.length >= 2 && received.length >= (end = 2 + received.readUInt16BE());) {
          const reply = answer(received.subarray(2, end));
          received = received.subarray(end);
          if (reply !== undefined) await connection.write(Buffer.concat([numbers(reply.length), reply]));
        }
      }
    } catch {
      // the client has closed the connection, or the server is closing
    }
    open.delete(connection);
  }
  const accepting = (async () => {
    for await (const connection of listener) {
      const done = serve(connection).finally(() => serving.delete(done));
      serving.add(done);
    }
  })();

  const socket = createSocket("udp4");
  socket.on("message", (message, from) => {
    const reply = answer(message, MAX_UDP_BYTES);
    if (reply !== undefined) socket.send(reply, from.port, from.address);
  });
  socket.bind(port, "127.0.0.1");
  await once(socket, "listening");

  return {
    port,
    log,
    set(name, type, ...values) {
      const at = records.get(key(name)) ?? new Map<RecordType, readonly string[]>();
      if (values.length > 0) records.set(key(name), at.set(type, values));
      else if (at.delete(type) && at.size === 0) records.delete(key(name));
    },
    txt: (name) => Promise.resolve(get(name, "TXT")),
    cname: (name) => Promise.resolve(get(name, "CNAME")[0]),
    async [Symbol.asyncDispose]() {
      socket.close();
      listener.close();
      for (const connection of open) connection.close();
      await Promise.all([accepting, ...serving, once(socket, "close")]);
    },
  };
}

/** The name, the type, and the bytes of the question in the message. */
function readQuestion(message: Buffer): { name: string; type: RecordType; text: Buffer } | undefined {
  const labels: string[] = [];
  let at = 12;
  for (let length; (length = message[at]) !== 0; at += 1 + length) {
    if (length === undefined || length > 63) return undefined;
    labels.push(message.subarray(at + 1, at + 1 + length).toString("latin1"));
  }
  const code = message.readUInt16BE(at + 1);
  const type = (Object.keys(TYPES) as RecordType[]).find((known) => TYPES[known] === code);
  return type && { name: labels.join("."), type, text: message.subarray(12, at + 5) };
}

/** Big-endian, 16 bits each. */
const numbers = (...values: number[]) => Buffer.from(values.flatMap((value) => [value >> 8, value & 0xff]));

function writeName(name: string): Buffer {
  const labels = name.split(".").filter((label) => label !== "");
  return Buffer.from(
    [...labels, ""].map((label) => String.fromCharCode(label.length) + label).join(""),
    "latin1",
  );
}

/** With a time to live of 0, since tests change records. */
function writeRecord(name: string, type: RecordType, value: string): Buffer {
  const data = writeData(type, value);
  return Buffer.concat([writeName(name), numbers(TYPES[type], IN, 0, 0, data.length), data]);
}

function writeData(type: RecordType, value: string): Uint8Array {
  switch (type) {
    case "A":
      return Uint8Array.from(value.split("."), Number);
    case "TXT": {
      const parts = value.match(/[^]{1,255}/g) ?? [""];
      return Buffer.from(parts.map((part) => String.fromCharCode(part.length) + part).join(""), "latin1");
    }
    case "AAAA":
      throw new Error("not needed so far");
    case "SOA":
      return Buffer.concat([writeName(value), writeName(`hostmaster.${value}`), Buffer.alloc(20)]);
    case "NS":
    case "CNAME":
      return writeName(value);
  }
}
