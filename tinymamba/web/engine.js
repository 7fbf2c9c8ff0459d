// A model in the browser: what StreamingServer of streaming.py is in Python, on onnxruntime-web.
//
// A session is a snapshot and those before its last turns. Snapshots are never changed, so any
// number of sessions may share one.

import { Runtime } from "./runtime.js";
import { choose } from "./sampling.js";
import { packSession, parsePythonJson, pythonJson, unpackSession } from "./session_file.js";
import { TextStream, Tokenizer, appendText, require } from "./tokenizer.js";

const RECENT = 512; // last ids that a session keeps
const CONTEXT = 8; // last ids that a tokenizer may need to decode the next ones
const PIECE = 512; // ids of a prompt that are read at once
const FEW = 16; // ids that are read one by one while the graph for prompts is not there yet
const MAX_REPLAY = 1024; // after this many ids of an answer, its start moves forward
const TURNS = 64; // turns of a session that can be undone
const CHAT_BYTES = 2 ** 26; // of states that chats may go back to
const PAUSE = 8; // milliseconds of work after which messages are read
const LARGE = 32e6; // parameters; in smaller models, threads mostly wait for each other
// A module of one function, which makes a vector: what the runtime needs of a browser.
const SIMD = Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0,
  10, 8, 1, 6, 0, 65, 0, 253, 15, 11,
);

const LIMITS = {
  max_new_tokens: [0, Infinity], temperature: [0, Infinity], top_k: [0, Infinity], top_p: [0, 1],
  min_p: [0, 1], repetition_penalty: [1e-3, 1e3],
};
const WHOLE = ["max_new_tokens", "top_k"];

// ------------------------------------------------------------------------------------ files

// The file of this name, or an error that says which one is missing.
async function load(files, name) {
  const problem = (why) => `cannot be loaded (${why})`, remedy = "load the page again";
  const response = await fetch(new URL(files[name], import.meta.url)).catch((e) =>
    require(false, name, problem(e.message), remedy),
  );
  require(response.ok, name, problem(`status ${response.status}`), remedy);
  if (response.headers.get("content-type") !== "application/gzip") return response;
  return new Response(response.body.pipeThrough(new DecompressionStream("gzip"))); // single_file.js
}

// What `work` makes of a file. An error that names no file yet names this one, or the runtime.
async function naming(name, work) {
  try {
    return await work();
  } catch ({ message }) {
    if (/^\S+: .+; /.test(message)) throw new Error(message);
    const file = /wasm/i.test(message) || message.includes("WebAssembly") ? "ort.wasm" : name;
    const remedy = "load the page again; if that does not help, export the model again";
    return require(false, file, `cannot be used (${message.split("\n")[0].slice(0, 160)})`, remedy);
  }
}

function parseConfig(text) {
  const site = JSON.parse(text);
  require(site.web, "config.json", "is not that of a site", "export the model again");
  return site;
}

const loadText = async (files, name) => (await load(files, name)).text();
async function loadBytes(files, name) {
  return new Uint8Array(await (await load(files, name)).arrayBuffer());
}

// ------------------------------------------------------------------------------------ model

// A state of the model: {name: tensor} as the graphs take and return it, after `position` ids.
//
// What a graph returns is live: it lies in WebAssembly's memory, and the next run uses it up. A
// frozen one stays as it is. So an answer copies its state when it ends, not at every token.
class State {
  constructor(runtime, tensors, position, isLive = false) {
    Object.assign(this, { runtime, tensors, position, isLive });
  }

  freeze() {
    if (!this.isLive) return;
    for (const name in this.tensors) this.tensors[name] = this.runtime.download(this.tensors[name]);
    this.isLive = false;
  }

  // The end of a live state.
  release() {
    if (!this.isLive) return;
    for (const pointer of Object.values(this.tensors)) this.runtime.free(pointer);
    Object.assign(this, { isLive: false, tensors: null });
  }
}

// The two graphs: step reads one id, prefill any number. Prefill is only made when it is needed.
class Model {
  // `site`, a promise of config.json, comes while the large files load.
  static async open(files, site) {
    const wasm = load(files, "ort.wasm"), weights = loadBytes(files, "weights.data");
    const step = loadBytes(files, "step.onnx"), prefill = loadBytes(files, "prefill.onnx");
    // Their errors are shown where they are awaited.
    for (const file of [wasm, weights, step, prefill]) file.catch(() => {});
    const { state, web } = await site;
    const pays = globalThis.crossOriginIsolated && web.parameters >= LARGE;
    const threads = pays ? Math.min(4, navigator.hardwareConcurrency) : 1;
    const script = new URL(files["ort-wasm.js"], import.meta.url).href;
    const runtime = await Runtime.open(wasm, script, threads);
    const create = async (bytes) => runtime.graph(await bytes, { "weights.data": await weights });
    const own = { state, runtime, threads, create, prefill };
    return Object.assign(new Model(), own, { step: await create(step) });
  }

  // The state before any id.
  start() {
    const tensors = {};
    for (const [name, [shape, type]] of Object.entries(this.state)) {
      const dims = [1, ...shape], size = dims.reduce((product, n) => product * n, 1);
      const data = type === "int64" ? new BigInt64Array(size) : new Float32Array(size);
      tensors[name] = { type, dims, data };
    }
    return new State(this.runtime, tensors, 0);
  }

  // The graph for these ids.
  async graphFor(ids) {
    if (ids.length === 1) return this.step;
    this.reader ??= this.create(this.prefill);
    return this.reader;
  }

  // ids and a state -> the new state, which is live, and after its last id: logits (v,), gates
  // (n_layer, 3) and norms of the heads, layer after layer.
  async run(ids, state) {
    try {
      const graph = await this.graphFor(ids), { runtime } = this;
      const input = { type: "int64", dims: [1, ids.length], data: BigInt64Array.from(ids, BigInt) };
      const made = graph.run({ ids: input, ...state.tensors }), tensors = {};
      for (const name in state.tensors) tensors[name] = made[`new.${name}`];
      const results = ["logits", "gates", "norms"].map((name) => runtime.download(made[name]).data);
      const [logits, gates, norms] = results, position = state.position + ids.length;
      return { state: new State(runtime, tensors, position, true), logits, gates, norms };
    } finally {
      state.release();
    }
  }
}

// --------------------------------------------------------------------------------- snapshots

// {state, logits, gates, norms, recent, unread}: logits, gates and norms are those after all ids,
// null if the state has not read them; `recent` are the last ids, `unread` those not read.
const position = ({ state, unread }) => state.position + unread.length;

// The snapshot after more ids, which the state has not read yet.
function followedBy(snapshot, ids) {
  if (!ids.length) return snapshot;
  const recent = [...snapshot.recent, ...ids].slice(-RECENT);
  const unknown = { logits: null, gates: null, norms: null };
  return { ...snapshot, ...unknown, recent, unread: [...snapshot.unread, ...ids] };
}

// How many ids two lists have in common at their beginning.
function countEqual(a, b) {
  const size = Math.min(a.length, b.length);
  let same = 0;
  while (same < size && a[same] === b[same]) same++;
  return same;
}

// A pause in which a worker reads its messages.
function pause() {
  return new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), done());
    port2.postMessage(0);
  });
}

// ------------------------------------------------------------------------------------ answers

// One answer. After `chunks` the session goes on from `final`.
class Answer {
  constructor(engine, origin, prompt, config, ends) {
    Object.assign(this, { engine, origin, config, ends });
    this.start = this.final = followedBy(origin, prompt); // what `ids` follow
    this.ids = []; // all that were drawn since then
    this.clean = 0; // those of them whose text is complete and given out
    this.partial = ""; // text given out after the clean ones
    this.reason = null;
    this.stopped = false;
  }

  // {text, tokens}: text that is certain, and the tokens since the last such text.
  async *chunks() {
    try {
      const start = await this.engine.read(this.start, () => this.stopped);
      this.start = this.final = start;
      if (start.unread.length) return; // it was stopped meanwhile
      const context = start.recent.slice(-CONTEXT), stops = this.config.stop ?? [];
      const stream = new TextStream(this.engine.tokenizer, context, stops);
      yield* this.draw(start, stream);
    } catch (error) {
      this.failed = true;
      throw error;
    } finally {
      this.settle();
    }
  }

  async *draw(start, stream) {
    const { config, engine } = this, counts = new Map();
    let tokens = [], text = "", drawn = 0;
    this.now = start;
    while (!this.stopped && !this.isOver(drawn)) {
      if (this.now.unread.length) this.now = await engine.readSome(this.now, 1);
      if (this.stopped) break;
      const id = choose(this.now.logits, this.now.recent, config, counts, position(this.now));
      if (this.ends.has(id)) {
        [this.reason, this.endedBy] = ["stop", id];
        break;
      }
      tokens.push(engine.token(id, this.now));
      drawn++;
      counts.set(id, (counts.get(id) ?? 0) + 1);
      this.now = followedBy(this.now, [id]);
      this.ids.push(id);
      text = this.textAfter(stream, id);
      if (stream.stopped) break;
      this.noteStart();
      if (!text) continue;
      yield { text, tokens };
      [tokens, text] = [[], ""];
      this.moveStart();
    }
    if (stream.stopped) {
      this.reason = "stop";
    } else {
      text = stream.finish();
      this.partial = stream.pendingText.replaceAll("\ufffd", "");
      this.clean = this.ids.length - stream.pending.length;
    }
    if (text || tokens.length) yield { text, tokens };
  }

  isOver(drawn) {
    if (drawn < this.config.max_new_tokens) return false;
    this.reason = "length";
    return true;
  }

  textAfter(stream, id) {
    const text = stream.push(id);
    if (stream.isClean()) [this.clean, this.partial] = [this.ids.length, ""];
    else this.partial += text;
    return text;
  }

  // A long answer moves its start, so that `ids` stay few, once their text is given out.
  noteStart() {
    if (this.next || this.ids.length < MAX_REPLAY) return;
    this.now.state.freeze();
    this.next = [this.ids.length, this.now];
  }

  moveStart() {
    if (!this.next || this.clean < this.next[0]) return;
    const [count, start] = this.next;
    const ids = this.ids.slice(count), clean = this.clean - count;
    Object.assign(this, { start, ids, clean, next: null });
  }

  // Decide what the session goes on from: exactly the text that was given out.
  settle() {
    if (this.failed) this.final = this.origin;
    else if (this.now && this.clean === this.ids.length && !this.partial) {
      this.now.state.freeze();
      this.final = this.now;
    } else if (this.now) {
      const ids = appendText(this.engine.tokenizer, this.ids.slice(0, this.clean), this.partial);
      this.final = followedBy(this.start, ids);
    }
    this.now?.state.release();
  }
}

// ------------------------------------------------------------------------------------ engine

export class Engine {
  // files: {name: url}
  static async open(files) {
    const engine = new Engine();
    require(WebAssembly.validate(SIMD), "browser", "has no WebAssembly SIMD", "use a newer one");
    const text = loadText(files, "config.json");
    const described = naming("config.json", async () => parseConfig(await text));
    const model = Model.open(files, described);
    model.catch(() => {}); // shown where it is awaited
    const site = await described, own = site.web;
    const tokenizer = own.tokenizer_file && loadText(files, own.tokenizer_file);
    const chat = own.chat && import("./chat.js");
    const config = parsePythonJson(own.config), name = own.tokenizer_file;
    Object.assign(engine, { site, own, config, chats: [], all: new Map() });
    engine.tokenizer = await naming(name, async () => new Tokenizer(await tokenizer, name));
    if (chat) engine.template = await (await chat).ChatTemplate.open(
      engine.tokenizer, own.chat.template, own.chat.special_tokens,
    );
    engine.model = await naming("model", () => model);
    const start = { state: engine.model.start(), logits: null, gates: null, norms: null };
    engine.initial = { ...start, recent: [], unread: [] };
    const sizes = Object.values(start.state.tensors).map(({ data }) => data.byteLength);
    engine.stateBytes = sizes.reduce((sum, size) => sum + size, 0);
    return engine;
  }

  about() {
    const { own, site, model, stateBytes } = this;
    const most = (i) => Math.max(...own.heads.map((heads) => heads[i]));
    return {
      name: own.name, chat: !!this.template, layers: own.heads.length, heads: [most(0), most(1)],
      vocabulary: site.vocab_size, state_bytes: stateBytes, parameters: own.parameters,
      eos_id: own.eos_id, threads: model.threads,
    };
  }

  // Sessions --------------------------------------------------------------------------------

  sessions() {
    return [...this.all.values()].map((session) => this.info(session));
  }

  info({ id, now, turns, seed, isChat, past }) {
    const counts = { tokens: position(now), turns, undo: past.length };
    return { id, seed, chat: isChat, ...counts, state_bytes: this.stateBytes };
  }

  create({ seed, system = "", chat = false } = {}) {
    require(!chat || this.template, "chat", "the model has no chat template", "begin a text");
    require(!system || chat, "system", "is only for a chat", "leave it out");
    const messages = system ? [{ role: "system", content: system }] : [];
    if (system) this.requireWritten(messages[0]);
    const now = this.initial, talk = system ? { messages, ids: [] } : null;
    const { config } = this, isNew = { turns: 0, past: [] };
    return this.info(this.insert({ now, config, seed, isChat: chat, chat: talk, ...isNew }));
  }

  insert(session) {
    const id = session.id ?? randomId();
    const whole = { ...session, id, seed: checkedSeed(session.seed), answer: null };
    this.all.set(id, whole);
    return whole;
  }

  find(id, idle = true) {
    const session = this.all.get(id);
    require(session, "session", `there is no ${JSON.stringify(id)}`, "create it first");
    const remedy = "wait until it is done, or stop it";
    require(!idle || !session.answer, "session", "is answering", remedy);
    return session;
  }

  fork(id, { seed } = {}) {
    const old = this.find(id);
    const copy = { ...old, id: null, seed: seed ?? old.seed, past: [...old.past] };
    return this.info(this.insert(copy));
  }

  rollback(id) {
    const session = this.find(id);
    require(session.past.length, "session", "has no turn to undo", "generate something first");
    Object.assign(session, session.past.pop());
    return this.info(session);
  }

  remove(id) {
    this.stop(id);
    this.all.delete(id);
  }

  stop(id) {
    const { answer } = this.find(id, false);
    if (answer) answer.stopped = true;
  }

  // Generation --------------------------------------------------------------------------------

  async *generate(id, { prompt = "", max_tokens, ...settings } = {}) {
    const session = this.find(id), given = { ...settings, max_new_tokens: max_tokens };
    const config = this.configured(session, given);
    require(typeof prompt === "string", "prompt", "is no text", "pass some");
    const before = { now: session.now, chat: session.chat, turns: session.turns };
    const turn = { stopped: false };
    session.answer = turn;
    try {
      const chunks = session.isChat ? this.chatTurn : this.textTurn;
      yield* chunks.call(this, session, prompt, config, turn);
    } finally {
      session.answer = null;
      if (turn.kept) session.past = [...session.past, before].slice(-TURNS);
      else Object.assign(session, before);
    }
    const info = this.info(session);
    yield { text: "", tokens: [], finish_reason: turn.reason ?? "stop", session: info };
  }

  // The settings of an answer: the session's, and over them those that are given.
  configured(session, given) {
    const config = {};
    for (const [name, value] of Object.entries(session.config)) {
      config[name] = value instanceof Number ? Number(value) : value; // a float of Python
    }
    for (const [name, value] of Object.entries(given)) {
      if (value === undefined || value === null) continue;
      const known = name === "seed" || Object.hasOwn(LIMITS, name);
      require(known, name, "is not a setting", `use ${Object.keys(LIMITS)}`);
      config[name] = value;
    }
    for (const [name, [least, most]] of Object.entries(LIMITS)) {
      const value = config[name], fits = value >= least && value <= most;
      const whole = !WHOLE.includes(name) || Number.isInteger(value);
      require(typeof value === "number" && fits && whole, name, `${value} is out of range`,
        `pass ${WHOLE.includes(name) ? "a whole number" : "a number"} from ${least} to ${most}`);
    }
    config.seed = given.seed ?? config.seed ?? session.seed;
    checkedSeed(config.seed);
    return config;
  }

  // The text goes on. Its turn is kept unless it fails.
  async *textTurn(session, prompt, config, turn) {
    const ids = this.withFirst(this.tokenizer.encode(prompt), session.now, config);
    const eos = config.eos_token_id ?? this.own.eos_id;
    const ends = new Set([eos, ...(config.stop_ids ?? [])]);
    const answer = this.begin(session, turn, ids, config, ends);
    try {
      yield* answer.chunks();
    } finally {
      Object.assign(turn, { kept: !answer.failed, reason: answer.reason });
      const ended = config.reset_on_eos && answer.endedBy === eos;
      session.now = ended ? this.initial : answer.final;
      session.chat = null;
      session.turns += 1;
    }
  }

  // The answer to these ids, which `stop` can end.
  begin(session, turn, ids, config, ends) {
    const answer = new Answer(this, session.now, ids, config, ends);
    answer.stopped = session.answer.stopped;
    session.answer = answer;
    return answer;
  }

  // The ids of a prompt; in a new session, after the token that begins it.
  withFirst(ids, now, config) {
    if (position(now) > 0) return ids;
    const eos = config.eos_token_id ?? this.own.eos_id;
    const first = config.bos_token_id ?? (ids.length ? null : eos);
    const problem = "is empty, and the model has no bos or eos to begin with";
    require(first === null || first >= 0, "prompt", problem, "pass some text");
    return first === null ? ids : [first, ...ids];
  }

  // The snapshot after its state has read all ids, or those until it is stopped.
  async read(snapshot, isStopped = () => false) {
    let now = snapshot;
    while (now.unread.length && !isStopped()) {
      const few = !this.model.reader && now.unread.length <= FEW;
      now = await this.readSome(now, few ? 1 : PIECE);
    }
    now.state.freeze();
    return now;
  }

  // The snapshot after its state, which is live then, has read the next ids.
  async readSome(snapshot, count) {
    const out = await this.model.run(snapshot.unread.slice(0, count), snapshot.state);
    if (performance.now() - (this.paused ?? 0) > PAUSE) {
      await pause();
      this.paused = performance.now();
    }
    return { ...snapshot, ...out, unread: snapshot.unread.slice(count) };
  }

  // A token, as the page shows it.
  token(id, { gates, norms }) {
    let at = 0;
    const layers = this.own.heads.map(([ssm, memory]) => {
      return norms && [...norms.slice(at, (at += ssm + memory))];
    });
    return {
      id,
      text: this.tokenizer.decode([id], false),
      gates: gates && layers.map((_, i) => [...gates.slice(3 * i, 3 * i + 3)]),
      norms: norms && layers,
    };
  }

  // Chats -----------------------------------------------------------------------------------

  // The turn of a user, as Turn of chat_session.py: before it answers, the session has read exactly
  // the ids of the whole chat. A turn that fails, or is stopped before its first text, is undone.
  async *chatTurn(session, prompt, config, turn) {
    const talk = session.chat ?? { messages: [], ids: [] };
    const fits = session.chat || !position(session.now);
    require(fits, "chat", "the session has text that is no chat", "begin another");
    const messages = [...talk.messages, { role: "user", content: prompt }];
    const ids = this.template.encode(messages, true), end = this.template.turnEnd;
    const eos = config.eos_token_id ?? this.own.eos_id;
    const ends = new Set([eos, ...(end === null ? [] : [end])]);
    const settings = { ...config, bos_token_id: null, reset_on_eos: false };
    this.place(session, talk.messages, ids);
    const rest = ids.slice(session.chat.ids.length);
    const before = followedBy(session.now, rest.slice(0, -1));
    session.now = await this.read(before, () => session.answer.stopped);
    if (session.now.unread.length) return;
    session.chat = { messages: talk.messages, ids: ids.slice(0, -1) };
    this.keep(session);
    const answer = this.begin(session, turn, rest.slice(-1), settings, ends), drawn = [];
    let text = "";
    try {
      for await (const chunk of answer.chunks()) {
        text += chunk.text;
        for (const { id } of chunk.tokens) drawn.push(id);
        yield chunk;
      }
    } finally {
      turn.reason = answer.reason;
      turn.kept = !answer.failed && !!(text || answer.reason);
      if (turn.kept) {
        session.now = answer.final;
        const read = [...ids, ...drawn], { recent } = session.now;
        const same = `${recent}` === `${read.slice(-RECENT)}`;
        const exact = position(session.now) === read.length && same;
        session.chat = exact ? { messages, ids: read } : null;
        this.place(session, [...messages, { role: "assistant", content: text }], read);
      }
    }
  }

  // Let a session hold these messages, after the longest prefix of `ids` whose state is kept.
  place(session, messages, ids) {
    this.keep(session);
    const read = session.chat?.ids ?? [];
    let found = { ids: [], now: this.initial };
    for (const kept of [...this.chats, { ids: read, now: session.now }]) {
      const size = kept.ids.length, isLonger = size > found.ids.length;
      if (isLonger && countEqual(kept.ids, ids) === size) found = kept;
    }
    session.now = found.now;
    session.chat = { messages, ids: ids.slice(0, found.ids.length) };
    session.turns = messages.filter(({ role }) => role === "user").length;
  }

  // Keep the state of a session, to go back to; the oldest are dropped.
  keep({ chat, now }) {
    if (!chat?.ids.length) return;
    const size = chat.ids.length;
    const same = ({ ids }) => ids.length === size && countEqual(ids, chat.ids) === size;
    this.chats = [...this.chats.filter((kept) => !same(kept)), { ids: chat.ids, now }];
    const most = Math.max(2, Math.floor(CHAT_BYTES / this.stateBytes));
    this.chats = this.chats.slice(-most);
  }

  requireWritten(system) {
    const asked = { role: "user", content: "0" };
    const ids = (messages) => `${this.template.encode(messages, true)}`;
    const written = ids([system, asked]) !== ids([asked]);
    require(written, "system", "the chat template leaves it out", "say it in the first message");
  }

  // Files -----------------------------------------------------------------------------------

  async save(id) {
    const session = this.find(id), { seed, turns, config, chat } = session;
    const now = await this.read(session.now), vocabulary = this.site.vocab_size;
    const tokenizer = this.site.tokenizer_sha256 ?? null;
    const about = { seed: BigInt(seed), turns, config, tokenizer, chat };
    const blank = new Array(RECENT - now.recent.length).fill(-1n);
    const recent = BigInt64Array.from([...blank, ...now.recent.map(BigInt)]);
    const logits = now.logits ?? new Float32Array(vocabulary);
    const tensors = {
      ...now.state.tensors,
      logits: { type: "float32", dims: [1, vocabulary], data: logits },
      recent: { type: "int64", dims: [1, RECENT], data: recent },
    };
    const notes = { model: this.own.fingerprint, session: pythonJson(about) };
    return packSession({ tensors, notes });
  }

  load(bytes) {
    const logitsLike = { type: "float32", dims: [1, this.site.vocab_size] };
    const recentLike = { type: "int64", dims: [1, RECENT] };
    const like = { ...this.initial.state.tensors, logits: logitsLike, recent: recentLike };
    const { fingerprint: model } = this.own, { tokenizer_sha256: tokenizer } = this.site;
    const { tensors, about } = unpackSession(bytes, { model, tokenizer, like });
    const config = this.readConfig(about.config);
    const names = Object.keys(this.initial.state.tensors);
    const own = Object.fromEntries(names.map((name) => [name, tensors[name]]));
    const state = new State(this.model.runtime, own, Number(own.position.data[0]));
    const recent = [...tensors.recent.data].filter((id) => id >= 0n).map(Number);
    const logits = state.position ? tensors.logits.data : null;
    const now = { ...this.initial, state, logits, recent };
    const { seed, turns, chat } = about, isChat = !!(chat && this.template);
    const session = { now, seed: String(seed), turns, config, chat: chat ?? null, isChat, past: [] };
    return this.info(this.insert(session));
  }

  // The settings in a file; one of an earlier version lacks some, which have their defaults.
  readConfig(given) {
    const unknown = Object.keys(given).find((name) => !Object.hasOwn(this.config, name));
    require(!unknown, "file", `the session has the setting ${unknown}`, "export the model again");
    const config = { ...this.config, ...given };
    for (const name of ["adapter", "structured_outputs"]) {
      require(config[name] === null, "file", `the session has ${name}`, "open it in Python");
    }
    return config;
  }
}

function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// A seed of at most 2^63 - 1: a number if it is exact, else its digits. None is drawn at random.
function checkedSeed(seed) {
  if (seed === undefined || seed === null) {
    const [high, low] = crypto.getRandomValues(new Uint32Array(2));
    return (high >>> 11) * 2 ** 32 + low;
  }
  const valid = /^\d+$/.test(seed) && (typeof seed !== "number" || Number.isSafeInteger(seed));
  const fits = valid && BigInt(seed) < 2n ** 63n;
  require(fits, "seed", `${seed} is invalid`, "it must be from 0 to 2^63 - 1");
  return Number.isSafeInteger(Number(seed)) ? Number(seed) : String(seed);
}
