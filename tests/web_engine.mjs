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
const files = Object.fromEntries(readdirSync(folder).map((name) => [name, address(name)]));
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
  async together(...calls) {
    const results = calls.map((call) => run(...call));
    await Promise.allSettled(results);
    return Promise.all(results);
  },
  heap() {
    globalThis.gc();
    const { wasm } = engine.model.runtime, end = wasm._malloc(2 ** 20); // no gap is as large
    wasm._free(end);
    return { ...process.memoryUsage(), wasm: end, stack: wasm.stackSave() };
  },
};

const run = async (method, ...args) =>
  METHODS[method] ? METHODS[method](...args) : engine[method](...args);

for await (const line of createInterface({ input: process.stdin })) {
  const [method, ...args] = JSON.parse(line);
  let answer;
  try {
    const result = (await run(method, ...args.map(decode))) ?? null;
    const bytes = result instanceof Uint8Array && { base64: Buffer.from(result).toString("base64") };
    answer = { result: bytes || result };
  } catch (error) {
    answer = { error: error.message };
  }
  process.stdout.write(`${JSON.stringify(answer)}\n`);
}
process.exit();
