// How the next token is drawn: from the same logits, the same ids as `choose` of streaming.py.
//
// All numbers are float64, and sums are rounded as NumPy rounds them. Only the last bit of an
// exponential may differ, as it does between processors in NumPy, too. It could change an id only
// where a random number or a limit falls upon that bit.

// The defaults of StreamingConfig.
const DEFAULTS = {
  temperature: 0.8, top_k: 50, top_p: 1, min_p: 0, repetition_penalty: 1, repetition_window: 64,
  presence_penalty: 0, frequency_penalty: 0, logit_bias: null, pad_token_id: null,
};

const isGreedy = (settings) => settings.temperature === 0 || settings.top_k === 1;

// Settings may come from a session file, where 1.0 is a PythonFloat.
const withDefaults = (settings) => {
  const c = { ...settings };
  for (const [name, value] of Object.entries(DEFAULTS)) {
    c[name] ??= value;
    if (c[name] instanceof Number) c[name] = Number(c[name]);
  }
  return c;
};

// Probabilities (v,) of the next token, after all settings, in a new Float64Array.
//   logits    (v,) Float32Array
//   recent    the last ids of the session, at least repetition_window of them if there are
//   settings  fields of StreamingConfig, logit_bias as a Map or an object; the rest has its default
//   counts    Map: how often the answer has each of its ids
export function probabilities(logits, recent, settings, counts) {
  const c = withDefaults(settings);
  const p = adjusted(logits, recent, c, counts);
  const best = argmax(p), most = p[best], temperature = c.temperature;
  if (isGreedy(c)) return p.fill(0).fill(1, best, best + 1);
  for (let i = 0; i < p.length; i++) p[i] = (p[i] - most) / temperature;
  const least = kthLargest(p, c.top_k);
  for (let i = 0; i < p.length; i++) p[i] = p[i] < least ? 0 : Math.exp(p[i]);
  normalize(p);
  if (c.top_p < 1) keepTopP(p, c.top_p);
  const floor = c.min_p * p[best];
  for (let i = 0; i < p.length; i++) if (p[i] < floor) p[i] = 0;
  return normalize(p);
}

// The next id: the likeliest one, or one drawn by settings.seed at this position of the session.
export function choose(logits, recent, settings, counts, position) {
  const c = withDefaults(settings);
  if (isGreedy(c)) return argmax(adjusted(logits, recent, c, counts));
  return draw(probabilities(logits, recent, c, counts), c.seed, position);
}

// Sample an id from probabilities (v,): a pure function of them, the seed and the position.
export function draw(p, seed, position) {
  let total = 0, last = 0, sum = 0;
  for (let i = 0; i < p.length; i++) {
    total += p[i];
    if (p[i] > 0) last = i;
  }
  const target = uniform(seed, position) * total;
  for (let i = 0; i < last; i++) {
    sum += p[i];
    if (sum > target) return i;
  }
  return last;
}

// A number in [0, 1). A seed from 2^53 on is a BigInt, or its decimal digits.
function uniform(seed, position) {
  const rounded = typeof seed === "number" && !Number.isSafeInteger(seed);
  if (rounded || !/^\d+$/.test(seed))
    throw new Error(`seed: ${seed} is invalid; pass a whole number, from 2^53 on as a BigInt`);
  const bytes = blake2b(new TextEncoder().encode(`${BigInt(seed)} ${position}`), 8);
  const view = new DataView(bytes.buffer);
  return (view.getUint32(0) * 2 ** 21 + (view.getUint32(4) >>> 11)) / 2 ** 53;
}

// The logits (v,) in float64 after bias and penalties, of which at least one is finite.
function adjusted(logits, recent, c, counts) {
  const x = new Float64Array(logits), bias = c.logit_bias ?? [];
  for (const [id, b] of bias[Symbol.iterator] ? bias : Object.entries(bias)) x[id] += Number(b);
  if (c.pad_token_id !== null) x[c.pad_token_id] = -Infinity;
  const window = recent.slice(Math.max(0, recent.length - c.repetition_window));
  if (c.repetition_penalty !== 1)
    for (const id of new Set(window))
      x[id] = x[id] > 0 ? x[id] / c.repetition_penalty : x[id] * c.repetition_penalty;
  if (c.presence_penalty || c.frequency_penalty)
    for (const [id, times] of counts ?? [])
      x[id] -= c.presence_penalty + c.frequency_penalty * times;
  const most = x[argmax(x)];
  if (!(most < Infinity)) throw new Error("logits: are not finite; use another checkpoint");
  if (most === -Infinity) throw new Error("logit_bias: every token is banned; allow at least one");
  return x;
}

// The first index of the largest value, or of a NaN.
function argmax(x) {
  let best = 0;
  for (let i = 0; i < x.length; i++) {
    if (x[i] !== x[i]) return i;
    if (x[i] > x[best]) best = i;
  }
  return best;
}

// The k-th largest value; -Infinity if all are to be kept.
function kthLargest(x, k) {
  if (!(k > 0 && k < x.length)) return -Infinity;
  const smaller = (a, b) => x[a] < x[b];
  const heap = heapOf(Int32Array.from({ length: k }, (_, i) => i), smaller);
  for (let i = k; i < x.length; i++) {
    if (x[i] <= x[heap[0]]) continue;
    heap[0] = i;
    siftDown(heap, k, 0, smaller);
  }
  return x[heap[0]];
}

// Keep the fewest likeliest ids whose probabilities reach topP; of equal ones, the first.
function keepTopP(p, topP) {
  const likelier = (a, b) => p[a] > p[b] || (p[a] === p[b] && a < b);
  const margin = 1e-9; // rounding is less: what is beyond it is not kept
  const rare = Math.max(0, 1 - topP - margin) / p.length; // all of these are less than 1 - topP
  const ids = new Int32Array(p.length), kept = [];
  let size = 0, total = 0;
  for (let i = 0; i < p.length; i++) if (p[i] > rare) ids[size++] = i;
  const heap = heapOf(ids.subarray(0, size), likelier);
  while (size > 0 && total < topP + margin) {
    const id = heap[0], value = p[id];
    total += value;
    if (kept.length === 0 || total - value < topP) kept.push([id, value]);
    heap[0] = heap[--size];
    siftDown(heap, size, 0, likelier);
  }
  p.fill(0);
  for (const [id, value] of kept) p[id] = value;
}

// Order ids so that none is before its parent: that of i is (i - 1) >> 1.
function heapOf(ids, before) {
  for (let i = ids.length >> 1; i >= 0; i--) siftDown(ids, ids.length, i, before);
  return ids;
}

function siftDown(heap, size, at, before) {
  const id = heap[at];
  for (let child; (child = 2 * at + 1) < size; at = child) {
    if (child + 1 < size && before(heap[child + 1], heap[child])) child++;
    if (!before(heap[child], id)) break;
    heap[at] = heap[child];
  }
  heap[at] = id;
}

function normalize(p) {
  const sum = pairwiseSum(p, 0, p.length);
  for (let i = 0; i < p.length; i++) p[i] /= sum;
  return p;
}

// The sum of n numbers, rounded as NumPy rounds it: eight sums at once, and halves of halves.
export function pairwiseSum(p, start, n) {
  if (n > 128) {
    const half = (n >> 1) - ((n >> 1) % 8);
    return pairwiseSum(p, start, half) + pairwiseSum(p, start + half, n - half);
  }
  let a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0, i = start;
  for (const end = start + n - (n % 8); i < end; i += 8) {
    (a += p[i]), (b += p[i + 1]), (c += p[i + 2]), (d += p[i + 3]);
    (e += p[i + 4]), (f += p[i + 5]), (g += p[i + 6]), (h += p[i + 7]);
  }
  let sum = a + b + (c + d) + (e + f + (g + h));
  for (; i < start + n; i++) sum += p[i];
  return sum;
}

// ------------------------------------------------------------------------- BLAKE2b (RFC 7693)

// 64-bit words lie as two of 32 bits, the low one first.
const IV = new Uint32Array([
  0xf3bcc908, 0x6a09e667, 0x84caa73b, 0xbb67ae85, 0xfe94f82b, 0x3c6ef372, 0x5f1d36f1, 0xa54ff53a,
  0xade682d1, 0x510e527f, 0x2b3e6c1f, 0x9b05688c, 0xfb41bd6b, 0x1f83d9ab, 0x137e2179, 0x5be0cd19,
]);
const SIGMA = [
  "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8",
  "905724afe1bc683d", "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a",
  "6fe9b308c2d714a5", "a2847615fb9e3cd0", "0123456789abcdef", "ea489fd61c02b753",
].map((row) => [...row].map((digit) => parseInt(digit, 16)));

// The hash of bytes, `size` bytes long, without a key.
export function blake2b(bytes, size) {
  const h = IV.slice(), block = new Uint8Array(128), out = new DataView(new ArrayBuffer(64));
  h[0] ^= 0x01010000 ^ size;
  let done = 0;
  do {
    const part = bytes.subarray(done, done + 128);
    block.fill(0).set(part);
    done += part.length;
    compress(h, new DataView(block.buffer), done, done === bytes.length);
  } while (done < bytes.length);
  h.forEach((word, i) => out.setUint32(4 * i, word, true));
  return new Uint8Array(out.buffer, 0, size);
}

// Section 3.2: mix a block into h; with it, `done` bytes have been read.
function compress(h, block, done, isLast) {
  const v = new Uint32Array(32), m = Uint32Array.from(v, (_, i) => block.getUint32(4 * i, true));
  v.set(h);
  v.set(IV, 16);
  v[24] ^= done;
  if (isLast) v[28] = ~v[28], v[29] = ~v[29];
  for (const s of SIGMA) {
    for (let i = 0; i < 4; i++) mix(v, i, i + 4, i + 8, i + 12, m, s[2 * i], s[2 * i + 1]);
    for (let i = 0; i < 4; i++)
      mix(v, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4, m, s[2 * i + 8], s[2 * i + 9]);
  }
  for (let i = 0; i < 16; i++) h[i] ^= v[i] ^ v[i + 16];
}

// Section 3.1, on the words a, b, c, d of v, with the words x and y of m.
function mix(v, a, b, c, d, m, x, y) {
  add(v, a, v, b), add(v, a, m, x), rotate(v, d, a, 32), add(v, c, v, d), rotate(v, b, c, 24);
  add(v, a, v, b), add(v, a, m, y), rotate(v, d, a, 16), add(v, c, v, d), rotate(v, b, c, 63);
}

// v[a] += w[b]
function add(v, a, w, b) {
  const low = v[2 * a] + w[2 * b];
  v[2 * a] = low;
  v[2 * a + 1] += w[2 * b + 1] + (low >= 2 ** 32 ? 1 : 0);
}

// v[a] = (v[a] ^ v[b]) rotated right by n bits
function rotate(v, a, b, n) {
  const swap = n >> 5, k = n & 31;
  const low = v[2 * a + swap] ^ v[2 * b + swap], high = v[2 * a + 1 - swap] ^ v[2 * b + 1 - swap];
  v[2 * a] = k ? (low >>> k) | (high << (32 - k)) : low;
  v[2 * a + 1] = k ? (high >>> k) | (low << (32 - k)) : high;
}
