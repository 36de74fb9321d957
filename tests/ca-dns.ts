/** A DNS server on loopback (RFC 1035), which answers for every name from a table that tests change. */
import { Buffer } from "node:buffer";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { type AddressInfo, createServer } from "node:net";

const TYPES = { A: 1, NS: 2, CNAME: 5, SOA: 6, TXT: 16 } as const;
export type RecordType = keyof typeof TYPES;

export type Dns = Awaited<ReturnType<typeof startDns>>;

/** Further records, for example from files that a hook command writes. Called for every question. */
export type Further = (name: string, type: RecordType) => readonly string[];

/** Starts a DNS server on 127.0.0.1; port 0 takes a free one. */
export async function startDns(further: Further = () => [], port = 0) {
  const records = new Map<string, readonly string[]>();
  const canonical = (name: string) => name.toLowerCase().replace(/\.$/, "");
  const get = (name: string, type: RecordType) => [
    ...records.get(`${type} ${canonical(name)}`) ?? [],
    ...further(canonical(name), type),
  ];

  function answer(message: Buffer): Buffer {
    const labels: string[] = [];
    let end = 12;
    for (let length; (length = message[end]!) > 0; end += 1 + length) {
      labels.push(message.toString("latin1", end + 1, end + 1 + length));
    }
    const question = message.subarray(12, end + 5);
    const code = message.readUInt16BE(end + 1);
    const type = (Object.keys(TYPES) as RecordType[]).find((known) => TYPES[known] === code);
    const answers: Buffer[] = [];
    for (let name: string | undefined = labels.join("."); type !== undefined && name !== undefined;) {
      for (const value of get(name, type)) answers.push(recordOf(name, type, value));
      const target: string | undefined = type === "CNAME" ? undefined : get(name, "CNAME")[0];
      if (target !== undefined) answers.push(recordOf(name, "CNAME", target));
      name = target;
    }
    const flags = 0x8400 | message[2]! << 8 & 0x0100; // an authoritative answer; recursion desired, as in the question
    const head = numbers(message.readUInt16BE(), flags, 1, answers.length, 0, 0);
    return Buffer.concat([head, question, ...answers]);
  }

  const tcp = createServer((connection) => {
    connection.on("error", () => {}).on("data", (data) => { // small messages arrive whole
      const reply = answer(data.subarray(2, 2 + data.readUInt16BE()));
      connection.write(Buffer.concat([numbers(reply.length), reply]));
    });
  });
  tcp.listen(port, "127.0.0.1");
  await once(tcp, "listening");
  const udp = createSocket("udp4");
  udp.on("message", (message, from) => udp.send(answer(message), from.port, from.address));
  udp.bind((tcp.address() as AddressInfo).port, "127.0.0.1");
  await once(udp, "listening");
  return {
    port: udp.address().port,
    /** Replaces the records of one type at a name, or removes them if there are no values. The value of SOA is the primary. */
    set(name: string, type: RecordType, ...values: string[]) {
      records.set(`${type} ${canonical(name)}`, values);
    },
    async [Symbol.asyncDispose]() {
      tcp.close();
      udp.close();
      await once(udp, "close");
    },
  };
}

const numbers = (...values: number[]) => Buffer.from(values.flatMap((value) => [value >> 8, value & 0xff]));
/** Character strings, each after its length. */
const strings = (...texts: string[]) =>
  Buffer.from(texts.map((text) => String.fromCharCode(text.length) + text).join(""), "latin1");
const nameOf = (name: string) => strings(...name.split(".").filter((label) => label !== ""), "");

const DATA: Readonly<Record<RecordType, (value: string) => Uint8Array>> = {
  A: (value) => Uint8Array.from(value.split("."), Number),
  NS: nameOf,
  CNAME: nameOf,
  SOA: (value) => Buffer.concat([nameOf(value), nameOf(`hostmaster.${value}`), Buffer.alloc(20)]),
  TXT: (value) => strings(...value.match(/[^]{1,255}/g) ?? [""]),
};

/** With a time to live of 0, since tests change records. */
function recordOf(name: string, type: RecordType, value: string): Buffer {
  const data = DATA[type](value);
  return Buffer.concat([nameOf(name), numbers(TYPES[type], 1, 0, 0, data.length), data]);
}
