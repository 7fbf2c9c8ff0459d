// Runs methods of Engine under node, one for each line of input: node web_engine.mjs FOLDER
//
// A line is [method, ...arguments], and the answer a line {result} or {error}. The result of
// `generate` is the list of its events; with "stop_after" among its settings, `stop` ends it after
// as many. Bytes are {"base64": ...}.

import { readFileSync, readdirSync } from "node:fs";
import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";

const folder = process.argv[2];
const address = (name) => pathToFileURL(`${folder}/${name}`).href;
globalThis.fetch = async (url) => new Response(readFileSync(new URL(url)));

const { Engine } = await import(address("engine.js"));
const names = readdirSync(folder), files = Object.fromEntries(names.map((name) => [name, address(name)]));
const engine = await Engine.open(files);

const decode = (value) => (value?.base64 ? new Uint8Array(Buffer.from(value.base64, "base64")) : value);

const METHODS = {
  async generate(id, { stop_after, ...settings }) {
    const events = [];
    for await (const event of engine.generate(id, settings)) {
      events.push(event);
      if (events.length === stop_after) engine.stop(id);
    }
    return events;
  },
  together: (...calls) => Promise.all(calls.map(([method, ...args]) => METHODS[method](...args))),
  heap: () => (globalThis.gc(), process.memoryUsage()),
};

for await (const line of createInterface({ input: process.stdin })) {
  const [method, ...args] = JSON.parse(line);
  const run = METHODS[method] ?? ((...rest) => engine[method](...rest));
  let answer;
  try {
    const result = (await run(...args.map(decode))) ?? null;
    const bytes = result instanceof Uint8Array && { base64: Buffer.from(result).toString("base64") };
    answer = { result: bytes || result };
  } catch (error) {
    answer = { error: error.message };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
process.exit();
