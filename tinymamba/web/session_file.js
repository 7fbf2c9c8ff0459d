// Session files: the bytes that `pack_session` of streaming.py writes, and what is read from them.
//
// A file is a safetensors file: 8 bytes with the length of a JSON header, the header, the tensors,
// all little-endian. Its notes are the model's fingerprint, the rest of the session as JSON, and a
// checksum. A tensor is {type: "float32" or "int64", dims, data}, as those of onnxruntime-web are.

const FORMAT = "tinymamba-state-2";
const TYPES = {
  int64: { code: "I64", array: BigInt64Array, size: 8 },
  float32: { code: "F32", array: Float32Array, size: 4 },
};

// Errors read as those of Python do.
function check(condition, name, problem, remedy = "save it again") {
  if (!condition) throw new Error(`${name}: ${problem}; ${remedy}`);
}

// ------------------------------------------------------------------------------- writing

// The file of {tensors: {name: tensor}, notes: {model, session}}. Notes that were read from a file
// keep their order, so that the bytes are the same again.
export function packSession({ tensors, notes }) {
  const said = "format" in notes ? { ...notes } : { format: FORMAT, ...notes };
  said.checksum = checksum(tensors, said);
  const header = { __metadata__: said }, parts = [];
  let end = 0;
  for (const name of fileOrder(tensors)) {
    const { type, dims, data } = tensors[name], start = end;
    parts.push(bytesOf(data));
    end += data.byteLength;
    header[name] = { dtype: TYPES[type].code, shape: dims, data_offsets: [start, end] };
  }
  const text = new TextEncoder().encode(JSON.stringify(header));
  const size = Math.ceil(text.length / 8) * 8, length = new Uint8Array(8);
  new DataView(length.buffer).setUint32(0, size, true);
  return joined([length, text, new Uint8Array(size - text.length).fill(32), ...parts]);
}

// safetensors puts larger types first, then names in order.
function fileOrder(tensors) {
  const size = (name) => TYPES[tensors[name].type].size;
  return Object.keys(tensors).sort((a, b) => size(b) - size(a) || (a < b ? -1 : 1));
}

// `digest([tensors, notes])` of checkpoint.py: SHA-256 over names, types, shapes and content.
function checksum(tensors, { checksum: _, ...notes }) {
  const encoder = new TextEncoder(), parts = [];
  const say = (text) => parts.push(encoder.encode(text));
  say(`[2[${Object.keys(tensors).length}`);
  for (const name of Object.keys(tensors).sort()) {
    const { type, dims, data } = tensors[name];
    say(`[2${described(name)}torch.${type}(${dims.join(", ")}${dims.length === 1 ? "," : ""})`);
    parts.push(bytesOf(data));
  }
  say(`[${Object.keys(notes).length}`);
  for (const key of Object.keys(notes).sort()) say(`[2${described(key)}${described(notes[key])}`);
  return sha256(joined(parts));
}

// f"str {text!r};" of Python, for ASCII: no session has other notes.
function described(text) {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  const short = { "\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\" };
  const escape = (c) => short[c] ?? `\\x${hex(c.charCodeAt(0), 2)}`;
  const inside = text.replace(/[^ -~]|\\/g, escape).replaceAll(quote, `\\${quote}`);
  return `str ${quote}${inside}${quote};`;
}

const hex = (number, digits) => number.toString(16).padStart(digits, "0");

const bytesOf = (data) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);

function joined(parts) {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

// ------------------------------------------------------------------------------- reading

// {tensors, notes, about} of a file's bytes; `about` is notes.session as a value.
//   name       of the file, for errors
//   model      the fingerprint that the session's model must have
//   tokenizer  SHA-256 of the tokenizer, if that is known
//   like       {name: {type, dims}}: the tensors of a session of the model
export function unpackSession(bytes, { name = "file", model, tokenizer, like } = {}) {
  const { header, data } = readHeader(bytes, name);
  const { __metadata__: notes, ...places } = header;
  const texts = Object.values(notes ?? {}).every((note) => typeof note === "string");
  check(texts && notes?.session, name, "is not a session", "choose another file");
  const tensors = readTensors(places, data, name);
  check(notes.checksum === checksum(tensors, notes), name, "is damaged");
  const own = notes.format === FORMAT && (model ?? notes.model) === notes.model;
  check(own, name, "is of another model", "load the model that it belongs to");
  check(!like || shapes(tensors) === shapes(like), name, "has other tensors than this model");
  const about = readAbout(notes.session, tensors);
  check(about, name, "is not a valid session");
  const its = about.tokenizer ?? tokenizer ?? null, given = tokenizer ?? its;
  const short = (sha) => String(sha).slice(0, 12);
  const problem = `was saved with another tokenizer (${short(its)}) than this (${short(given)})`;
  check(its === given, name, problem, "start with the tokenizer of the session");
  return { tensors, notes, about };
}

// The header of a safetensors file, and the bytes after it.
function readHeader(bytes, name) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const size = bytes.length > 8 ? Number(view.getBigUint64(0, true)) : 0;
  const begins = size > 1 && size < 1e8 && bytes[8] === 123; // with "{"
  check(begins, name, "is not a session", "choose another file");
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, 8 + size));
    return { header: JSON.parse(text), data: bytes.subarray(8 + size) };
  } catch {
    throw new Error(`${name}: is damaged; save it again`);
  }
}

// Copies of the tensors at these places, which must fill the data without a gap.
function readTensors(places, data, name) {
  const tensors = {}, offset = ([, place], i) => place?.data_offsets?.[i];
  const order = (a, b) => offset(a, 0) - offset(b, 0) || offset(a, 1) - offset(b, 1);
  let end = 0;
  for (const [key, place] of Object.entries(places).sort(order)) {
    const { dtype, shape, data_offsets: offsets } = place ?? {};
    const [start, stop] = Array.isArray(offsets) ? offsets : [];
    const type = Object.keys(TYPES).find((key) => TYPES[key].code === dtype);
    const whole = Array.isArray(shape) && shape.every((n) => Number.isSafeInteger(n) && n >= 0);
    check(type && whole && start === end && stop <= data.length, name, "is damaged");
    end = start + shape.reduce((product, n) => product * n, TYPES[type].size);
    check(stop === end, name, "is damaged");
    const content = data.slice(start, stop).buffer;
    tensors[key] = { type, dims: shape, data: new TYPES[type].array(content) };
  }
  check(end === data.length, name, "is damaged");
  return tensors;
}

const shapes = (tensors) =>
  Object.keys(tensors).sort().map((key) => [key, tensors[key].type, ...tensors[key].dims]).join();

// What the session's JSON says, if it is valid and fits the tensors.
function readAbout(text, { position, document_start: start, recent, logits }) {
  try {
    const about = parsePythonJson(text), { seed, turns, config, chat } = about;
    const ids = recent.data.filter((id) => id >= 0n), count = position.data[0];
    const valid =
      [seed, turns].every((n) => (typeof n === "bigint" || Number.isSafeInteger(n)) && n >= 0) &&
      seed < 2n ** 63n && typeof config === "object" && config !== null && position.dims[0] === 1 &&
      ids.every((id) => id < logits.data.length) && logits.data.every(Number.isFinite) &&
      ids.length <= count && 0n <= start.data[0] && start.data[0] <= count;
    return valid && (chat == null || fitsChat(chat, ids, count)) && about;
  } catch (error) {
    if (error instanceof TypeError || error instanceof SyntaxError) return null; // what it lacks
    throw error;
  }
}

// Whether a chat has messages, and as its ids what the session has read.
function fitsChat({ messages, ids }, recent, count) {
  const isMessage = (m) =>
    Object.keys(m).sort().join() === "content,role" && typeof m.content === "string" &&
    ["system", "user", "assistant"].includes(m.role);
  const last = ids.slice(ids.length - recent.length);
  return messages.every(isMessage) && ids.every(Number.isSafeInteger) &&
    BigInt(ids.length) === count && last.every((id, i) => BigInt(id) === recent[i]);
}

// ------------------------------------------------------------------------- JSON of Python

// A float of Python that would look like an int, as 1.0, or that JSON lacks, as -Infinity.
export class PythonFloat extends Number {}

// The text of Python's json.dumps. A whole number is an int; from 2^53 on it must be a BigInt.
export function pythonJson(value) {
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "string") return quoted(value);
  if (typeof value === "bigint" || Number.isSafeInteger(value)) return BigInt(value).toString();
  if (value instanceof PythonFloat) return floatText(Number(value));
  if (Number.isFinite(value) && !Number.isInteger(value)) return floatText(value);
  if (Array.isArray(value)) return `[${value.map(pythonJson).join(", ")}]`;
  check(typeof value === "object", "JSON", `cannot hold ${String(value)}`, "pass another value");
  const items = value instanceof Map ? [...value] : Object.entries(value);
  return `{${items.map(([key, item]) => `${quoted(key)}: ${pythonJson(item)}`).join(", ")}}`;
}

// A string in ASCII; a character beyond the first 2^16 becomes two surrogates.
function quoted(text) {
  const short = { "\n": "\\n", "\r": "\\r", "\t": "\\t", "\f": "\\f", "\b": "\\b" };
  const escape = (c) => short[c] ?? `\\u${hex(c.charCodeAt(0), 4)}`;
  return `"${text.replace(/["\\]/g, "\\$&").replace(/[^ -~]/g, escape)}"`;
}

// Python's repr of a float: the fewest digits that give it back, and an exponent below 1e-4 and
// from 1e16 on.
function floatText(x) {
  if (!Number.isFinite(x)) return String(x);
  const sign = x < 0 || Object.is(x, -0) ? "-" : "";
  const [mantissa, power] = Math.abs(x).toExponential().split("e");
  const digits = mantissa.replace(".", ""), e = Number(power), size = String(Math.abs(e));
  if (e < -4 || e > 15) return `${sign}${mantissa}e${power[0]}${size.padStart(2, "0")}`;
  if (e < 0) return `${sign}0.${"0".repeat(-e - 1)}${digits}`;
  return `${sign}${digits.slice(0, e + 1).padEnd(e + 1, "0")}.${digits.slice(e + 1) || "0"}`;
}

const WORDS = { null: null, true: true, false: false };
const MOST_DEPTH = 500;

// The value of such a text, of which `pythonJson` makes the same text again: 1.0 is a PythonFloat,
// a large int a BigInt. An object with keys that JavaScript would sort, as the ids of logit_bias,
// is a Map; others are plain.
export function parsePythonJson(text) {
  let at = 0;
  const expect = (condition) => {
    if (!condition) throw new SyntaxError(`JSON: is invalid at character ${at}`);
    return condition;
  };
  const match = (pattern) => {
    pattern.lastIndex = at;
    const found = pattern.exec(text)?.[0];
    at += found?.length ?? 0;
    return found;
  };
  const accept = (sign) => {
    skip();
    return text[at] === sign && ++at;
  };
  const skip = () => match(/[ \t\n\r]*/y);
  const string = () => {
    const start = at - 1;
    for (; text[at] !== '"'; at++) if (expect(at < text.length) && text[at] === "\\") at++;
    return JSON.parse(text.slice(start, ++at));
  };
  const number = () => {
    const digits = expect(match(/-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?/y));
    const x = Number(digits);
    if (!/[.e]/i.test(digits)) return Number.isSafeInteger(x) ? x : BigInt(digits);
    return Number.isFinite(x) && !Number.isInteger(x) ? x : new PythonFloat(x);
  };
  const items = (end, read) => {
    const list = [];
    if (accept(end)) return list;
    do list.push(read());
    while (accept(","));
    expect(accept(end));
    return list;
  };
  const value = (depth) => {
    expect(depth < MOST_DEPTH);
    if (accept('"')) return string();
    if (accept("[")) return items("]", () => value(depth + 1));
    if (accept("{")) {
      const key = () => expect(accept('"')) && string();
      return object(items("}", () => [key(), expect(accept(":")) && value(depth + 1)]));
    }
    const word = match(/null|true|false|NaN|-?Infinity/y);
    if (!word) return number();
    return word in WORDS ? WORDS[word] : new PythonFloat(word);
  };
  const read = value(0);
  skip();
  expect(at === text.length);
  return read;
}

function object(pairs) {
  return pairs.some(([key]) => /^\d+$/.test(key)) ? new Map(pairs) : Object.fromEntries(pairs);
}

// ------------------------------------------------------------------------- SHA-256 (FIPS 180-4)

// The first 32 bits of the fractional parts of roots of the first primes.
const PRIMES = [2];
for (let n = 3; PRIMES.length < 64; n++) if (PRIMES.every((p) => n % p)) PRIMES.push(n);
const START = Int32Array.from(PRIMES.slice(0, 8), (p) => (Math.sqrt(p) % 1) * 2 ** 32);
const ROUND = Int32Array.from(PRIMES, (p) => (Math.cbrt(p) % 1) * 2 ** 32);

// The hash of bytes, in hex. The browser's own is missing in pages without https.
export function sha256(bytes) {
  const size = bytes.length, padded = new Uint8Array(Math.ceil((size + 9) / 64) * 64);
  const view = new DataView(padded.buffer), h = START.slice(), w = new Int32Array(64);
  padded.set(bytes);
  padded[size] = 128;
  view.setBigUint64(padded.length - 8, 8n * BigInt(size));
  for (let block = 0; block < padded.length; block += 64) {
    for (let i = 0; i < 16; i++) w[i] = view.getInt32(block + 4 * i);
    mix(h, w);
  }
  return Array.from(h, (word) => hex(word >>> 0, 8)).join("");
}

// Section 6.2.2: mix a block, the first 16 words of w, into h.
function mix(h, w) {
  for (let i = 16; i < 64; i++) {
    const x = w[i - 15], y = w[i - 2];
    const s0 = rotate(x, 7) ^ rotate(x, 18) ^ (x >>> 3);
    const s1 = rotate(y, 17) ^ rotate(y, 19) ^ (y >>> 10);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  let a = h[0], b = h[1], c = h[2], d = h[3], e = h[4], f = h[5], g = h[6], last = h[7];
  for (let i = 0; i < 64; i++) {
    const s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25), choice = (e & f) ^ (~e & g);
    const s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22), most = (a & b) ^ (a & c) ^ (b & c);
    const t = (last + s1 + choice + ROUND[i] + w[i]) | 0;
    last = g, g = f, f = e, e = (d + t) | 0, d = c, c = b, b = a, a = (t + s0 + most) | 0;
  }
  h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e, h[5] += f, h[6] += g, h[7] += last;
}

const rotate = (x, n) => (x >>> n) | (x << (32 - n));
