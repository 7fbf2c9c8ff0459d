// The worker of the page: it runs the methods of Engine that the page calls.
//
// page -> worker: {call, method, args}; the first is open(files)
// worker -> page: {call, result} or {call, error}; before the result of `generate`, {call, events}

import { Engine } from "./engine.js";

const FRAME = 16; // milliseconds of events that are sent together: a page draws no faster
const METHODS = "about sessions create fork rollback remove stop save load".split(" ");
let engine = null; // a promise: calls that come while it opens wait

async function run(call, method, args) {
  if (method === "open") engine = Engine.open(...args);
  const own = await engine;
  if (method === "open") return own.about();
  if (method === "generate") return send(call, own.generate(...args));
  if (!METHODS.includes(method))
    throw new Error(`${method}: the engine has no such method; load the page again`);
  return own[method](...args);
}

async function send(call, answer) {
  let events = [], sent = -Infinity;
  const flush = () => {
    if (events.length) self.postMessage({ call, events });
    [events, sent] = [[], performance.now()];
  };
  try {
    for await (const event of answer) {
      events.push(event);
      if (performance.now() - sent >= FRAME) flush();
    }
  } finally {
    flush();
  }
  return null;
}

self.onmessage = async ({ data: { call, method, args } }) => {
  try {
    const result = await run(call, method, args);
    self.postMessage({ call, result }, result instanceof Uint8Array ? [result.buffer] : []);
  } catch (error) {
    self.postMessage({ call, error: error.message });
  }
};
