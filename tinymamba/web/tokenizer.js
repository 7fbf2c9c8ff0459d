// Text to token ids and back: the ids of `SimpleTokenizer` of tokenizer.py, and the text pieces of
// `TextStream` of streaming.py.
//
// It reads byte-level BPE from a tokenizer.json, and a vocab.txt by longest match.

const EOS_NAMES = ["<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]"];
const CONTEXT = 8; // last ids that a tokenizer may need to decode the next ones
const MARK = "\ufffd"; // what bytes that are not a character become
const CACHED_WORDS = 20_000;
const CACHED_LENGTH = 64; // of a word

// Errors read as those of Python do.
export function require(condition, name, problem, remedy) {
  if (!condition) throw new Error(`${name}: ${problem}; ${remedy}`);
}

function refuse(part, kind) {
  const remedy = "export a model with a byte-level BPE, such as data/prepare.py makes";
  require(false, "tokenizer.json", `${part} ${kind ?? null} does not work in a browser`, remedy);
}

// --------------------------------------------------------------------------------- bytes

// A printable character for each byte, as GPT-2's vocabulary files write bytes.
const ALPHABET = Array.from({ length: 256 }, (_, byte) => byte);
const isPlain = (b) => (b > 32 && b < 127) || (b > 160 && b < 256 && b !== 173);
ALPHABET.filter((b) => !isPlain(b)).forEach((b, i) => (ALPHABET[b] = 256 + i));
ALPHABET.forEach((code, byte) => (ALPHABET[byte] = String.fromCharCode(code)));
const BYTE_OF = new Map(ALPHABET.map((character, byte) => [character, byte]));

const encodeUtf8 = (text) => new TextEncoder().encode(text);
const decodeUtf8 = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes);

// The bytes of a token: those that its characters stand for, or else its own.
function bytesOf(token) {
  const bytes = Array.from(token, (character) => BYTE_OF.get(character));
  return bytes.includes(undefined) ? encodeUtf8(token) : Uint8Array.from(bytes);
}

// ------------------------------------------------------------------------------- Unicode

// Sets of code points: the lengths of the runs outside and inside of a set, in turn, each written
// in base 32, the lowest digit first, with 32 added to all digits but the last.

// What Unicode 16 does not assign. The library `tokenizers` finds classes such as \p{L} as in that
// version, a browser as in its own.
const UNASSIGNED_RUNS =
  "4bCGEHBBBUBtMBmBCyBCDB3BIbEGLuIB8BClDO7BCxBCPBcCBBLFfBCFtHBICCCWBHBBDECJCCCEIBECBFCZCDBGECCWBH" +
  "BCBCBCCBBFECCDDBHEBBHRKDBJBDBWBHBCBFCKBDBDCBPECMHHBDBICCCWBHBCBFCJCCCDHDECBFCSKCBGDDBEDCBBBCDC" +
  "DDDMEFDDBECBGBOVFNBDBXBQCJBDBEHCBDCBCECKHWBDBXBKBFCJBDBEHCGCBECKBDMNBDBzBBDBGEQCaBDBSDYBJBBCHD" +
  "BEGBBBIGKCDM6BEdlBCBBBFBYBBBXCFBBBHBKCEgBoCBkBEnBBkBBPBNlBmGBBFBC5LBECHBBBECpBBEChBBECHBBBECPB" +
  "5BBECjCCgBDaG2CCGC9UD5CHWJYJUMNBDBCM+CCKGKGaG5CHrBFmCKfBMEMEBDqBCFLsBEaGLD+BChCBdCLGKGOCfxBtCB" +
  "mFI8BDPD+BFrBCLIrBF2QCGCmBCGCIBBBBBBBfC1BBPBOCGBTCDBJBlDBMCbBNDhBPhBPsEE6UWLV04BCgBB9KFtBBBFBC" +
  "4BHCOYJHBHBHBHBHBHBHBHB+DiBaB5CM2GawCB2CCnDFrBB+CB2CJwBBtzcD3BJ8KU4FIuGCCBBBIV7BDKG4BImCIMG0DL" +
  "eDuCBLEhBB3BJOCKCnDYcKGCGCGJHBHB8BE+DCKGk9KMXExBEuzICqDmBHMFFaBFBBBCBCB9DQ9NC2BHBgBqBGzBBTBEEF" +
  "BnECBB+FDGCGCGCDDHBHKFCMBaBTBCBPCOiB7DFDEtBD4CBNDBvBuBiEdDxBPcEkBJeFrBFeBlBEOqB+ECKGkBEkBEoBI0" +
  "BLMBPBHBCBLBPBHBCD0BM3JJWKIYGBqBBJlCGCBBsBBCDBCXBoCIJwBTBCFhBDbFBgC4BEUCyBBCFIBDBdCDEKHJHgCgBn" +
  "BEMJ2BDdCbFaHEMHwCpC3BzBNzBHuBIKGmBDdICwGfBqBBDCCQD3BsBIqBWamBcUXJuCEkBJkCKBCZHKG1BBSInBJgDBUL" +
  "SBvB+BHBBBEBPBLG7BFKGEBICCCWBHBCBFBKCCCDCBGBFHCHDFLKBBCBBmBBKBBCBBEBKBCICd8CBFeoCIKmF2BCmBiBlC" +
  "LKGNT6BGKGUcbCPEX5F8BkDzCMICBCIBCBeBCCMJKmCICuBCLboCIzCNpCHK2FiBOKGJBtBBOKdDgBCWBOpCHBCBsBDBBC" +
  "BJIKGGBCBlBBCBGHK2JZHRBpBDd1CBPyBN7cmDvDBFLkGsyCjDN2iBK78DFnS51G6Bm2B5RHfBKExCBKGeCGKmCKKBHBVF" +
  "TwN6BmG7ClDrCE5BHRgCFLCO4/FI2mBpBKn3IEBHBCBjJPBdDCBOEIsMkoCrDFNDJHKCI86D6HG0NsCuBCXJ0D8B2HKnBC" +
  "iGVmC6DUMUM3CJZnE1CBnCBCCBCCCEBMBBBHBhCBECIBHBcBEBFBBDHB0KCkJC+VPFBPwiBfGG1GHBRCHBCBFF+BhBBwDt" +
  "BDOCKECgKfR6BFBwOqB2GrBEBgPHBEBCBPBlGCQpBsCEKECxYkCsC9BiGEBbBCBBCBBKBEBBBBGBEBBBBBBDBCBBCBBBBB" +
  "BBBBBCBBCEBHBEBEBBBKBRFDBFBR0BCuIsBEkDMPCPBPBlBKuF4BdNsBEJHCOG6E4eERDND3DE/CGMEBPME4BIKGoBIeCM" +
  "EC+B0KMOCNDKF4BHPCLGJHzEBmDmgBg3pBgB6hEG+GCi0FOxpHPuTitC+QivBr6EFgjExi3VBegDgEwHww/B+//BC+//BC";

// What later versions than Unicode 10 compose or order. The library does neither.
const COMPOSED_LATER_RUNS =
  "9/BB5EJqBKqJB9RB+HC9LB6iCBpdQnZFxxiBBltXBHBp6BEhCF9JCwCDmCLxBEqHBqWBmCBBBGBEBxBBLDtEB6eC6HBHCE" +
  "B8EBzCBSBxCBoVBBCxCBpNC7uQBKBFBzhDBDBoUC9kcBgFH3LB9BE8PE+HC";

// The ranges of a set, as they stand in a class of a regular expression.
function readRuns(runs) {
  const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const hex = (code) => `\\u{${code.toString(16)}}`;
  let ranges = "", at = 0, inside = false;
  for (const [run] of runs.matchAll(/[g-z0-9+/]*[A-Za-f]/g)) {
    const length = [...run].reduceRight((sum, c) => sum * 32 + (digits.indexOf(c) % 32), 0);
    if (inside) ranges += `${hex(at)}-${hex(at + length - 1)}`;
    at += length;
    inside = !inside;
  }
  return ranges;
}

const UNASSIGNED = new RegExp(`[${readRuns(UNASSIGNED_RUNS)}]`, "gu");
const UNCHANGED = new RegExp(
  `[${readRuns(UNASSIGNED_RUNS)}${readRuns(COMPOSED_LATER_RUNS)}]+`, "gu",
);

// A text as long as this one, in which a pattern finds what it finds in the library: what is not
// assigned becomes what no version will ever assign, and U+0295 is a small letter.
function asUnicode16(text) {
  const known = text.replace(UNASSIGNED, (c) => (c.length === 1 ? "\uffff" : "\u{1ffff}"));
  return known.replaceAll("\u0295", "\u0250");
}

// The text in Unicode's composed form NFC, as the library makes it.
function compose(text) {
  let done = "", at = 0;
  for (const { 0: kept, index } of text.matchAll(UNCHANGED)) {
    done += text.slice(at, index).normalize("NFC") + kept;
    at = index + kept.length;
  }
  return done + text.slice(at).normalize("NFC");
}

// ------------------------------------------------------------------------------ patterns

const escapePattern = (text) => text.replace(/[\^$\\.*+?()[\]{}|]/g, "\\$&");
const SHORTHANDS = { s: "\\p{White_Space}", S: "\\P{White_Space}", d: "\\p{Nd}", D: "\\P{Nd}" };
const THIRD_CASES = { s: "\u017f", k: "\u212a" }; // the long s, and the sign of kelvin

// Translates a regular expression of Oniguruma, the library's, into one of JavaScript.
class PatternReader {
  constructor(source) {
    this.source = source;
    this.at = 0;
    this.groups = 0; // those added for what is possessive
  }

  read() {
    const out = this.alternatives(false);
    if (this.at < this.source.length) throw new SyntaxError("unbalanced");
    return new RegExp(out, "gu");
  }

  // What stands at the place, if this matches there; the place moves behind it.
  take(expression) {
    const found = new RegExp(expression, "suy");
    found.lastIndex = this.at;
    const text = found.exec(this.source)?.[0];
    this.at += text?.length ?? 0;
    return text;
  }

  alternatives(folded) {
    let out = "";
    while (this.at < this.source.length && this.source[this.at] !== ")") {
      out += this.take("\\|") ?? this.repeated(this.atom(folded));
    }
    return out;
  }

  // An atom and how often it stands there. What is possessive gives nothing back.
  repeated(atom) {
    const times = this.take("[*+?]|\\{\\d+(,\\d*)?\\}") ?? "";
    if (times.length === 1 && this.take("\\+")) {
      const name = `kept${this.groups++}`;
      return `(?=(?<${name}>${atom}${times}))\\k<${name}>`;
    }
    return atom + times + (times && (this.take("\\?") ?? ""));
  }

  atom(folded) {
    const group = this.take("\\((\\?(i:|:|=|!|<=|<!))?");
    if (group) {
      const inside = this.alternatives(folded || group === "(?i:");
      if (!this.take("\\)")) throw new SyntaxError("unbalanced");
      return `${group === "(?i:" ? "(?:" : group}${inside})`;
    }
    if (this.take("\\[")) return this.characterClass(folded);
    if (this.take("\\.")) return "[^\\n]";
    const character = this.character("[^\\\\^$*+?{}]"), cases = allCases(character, folded);
    return cases === character ? cases : `[${cases}]`;
  }

  characterClass(folded) {
    let out = "[" + (this.take("\\^") ?? "");
    while (!this.take("\\]")) {
      const first = this.member();
      if (this.take("-(?!\\])")) {
        if (folded) throw new SyntaxError("a range of letters of both cases");
        out += `${first}-${this.member()}`;
      } else out += allCases(first, folded);
    }
    return out + "]";
  }

  member() {
    if (this.take("&&")) throw new SyntaxError("an intersection");
    return this.take("\\\\?-") ? "\\-" : this.character("[^\\\\[]");
  }

  // A character as it is, if `plain` matches it, or an escape that stands for one of several.
  character(plain) {
    const property = this.take("\\\\[pP]\\{\\w+\\}") ?? this.take(plain);
    if (property) return property.replace("{Han}", "{Script=Han}");
    const escaped = this.take("\\\\.")?.slice(1);
    if (/^[rntfv]$/.test(escaped)) return `\\${escaped}`;
    if (/^[^a-zA-Z0-9]$/u.test(escaped)) {
      return /[\^$\\.*+?()[\]{}|/]/.test(escaped) ? `\\${escaped}` : escaped;
    }
    if (!(escaped in SHORTHANDS)) throw new SyntaxError("unknown");
    return SHORTHANDS[escaped];
  }
}

// A character of a pattern, and if it is an ASCII letter that is `folded`, its other cases.
function allCases(character, folded) {
  if (!folded || !/^[a-zA-Z]$/.test(character)) return character;
  const small = character.toLowerCase();
  return small + small.toUpperCase() + (THIRD_CASES[small] ?? "");
}

function readPattern(source) {
  try {
    return new PatternReader(source).read();
  } catch {
    return refuse("the pattern", source);
  }
}

const GPT2 = readPattern(
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
);

// The parts of a text that a pattern finds and, unless `matchesOnly`, those between them. It is
// searched as `known`.
function* split(text, pattern, matchesOnly = false, known = asUnicode16(text)) {
  let at = 0;
  for (const { 0: found, index } of known.matchAll(pattern)) {
    if (index > at && !matchesOnly) yield text.slice(at, index);
    at = index + found.length;
    if (found) yield text.slice(index, at);
  }
  if (at < text.length && !matchesOnly) yield text.slice(at);
}

// ------------------------------------------------------------- the parts of tokenizer.json

// A function from a text to a text.
function makeNormalizer(settings) {
  switch (settings?.type) {
    case undefined:
      return (text) => text;
    case "NFC":
      return compose;
    case "Sequence": {
      const steps = settings.normalizers.map(makeNormalizer);
      return (text) => steps.reduce((done, step) => step(done), text);
    }
    default:
      return refuse("the normalizer", settings.type);
  }
}

// A function from a text to its words: no merge reaches beyond one.
function makeSplitter(settings) {
  const steps = settings?.type === "Sequence" ? settings.pretokenizers : [settings];
  const last = steps.at(-1), before = steps.slice(0, -1).map(makeStep);
  if (last?.type !== "ByteLevel") refuse("the pre-tokenizer", last?.type);
  const pad = (text) => (last.add_prefix_space && !text.startsWith(" ") ? ` ${text}` : text);
  const end = (text) => (last.use_regex ?? true ? [...split(pad(text), GPT2)] : [pad(text)]);
  return (text) => [...before, end].reduce((words, step) => words.flatMap(step), [text]);
}

function makeStep({ type, pattern, behavior, invert, individual_digits }) {
  if (type === "Digits") {
    const digits = readPattern(individual_digits ? "\\p{N}" : "\\p{N}+");
    return (text) => [...split(text, digits, false, text)];
  }
  const kind = type === "Split" ? `${type} ${behavior}${invert ? ", inverted" : ""}` : type;
  if (!["Split Isolated", "Split Removed, inverted"].includes(kind)) {
    refuse("the pre-tokenizer", kind);
  }
  const expression = readPattern(pattern.Regex ?? escapePattern(pattern.String));
  return (text) => [...split(text, expression, invert)];
}

// ------------------------------------------------------------------------------- merging

// The smallest of many numbers, again and again.
class Heap {
  constructor() {
    this.items = [];
  }

  push(item) {
    const { items } = this;
    let at = items.length;
    while (at > 0 && items[(at - 1) >> 1] > item) {
      items[at] = items[(at - 1) >> 1];
      at = (at - 1) >> 1;
    }
    items[at] = item;
  }

  pop() {
    const { items } = this, least = items[0], last = items.pop(), size = items.length;
    if (size === 0) return least;
    let at = 0;
    for (let child = 1; child < size; child = 2 * at + 1) {
      if (child + 1 < size && items[child + 1] < items[child]) child++;
      if (items[child] >= last) break;
      items[at] = items[child];
      at = child;
    }
    items[at] = last;
    return least;
  }
}

// Byte-level BPE (Sennrich et al., arXiv 1508.07909): of all pairs of neighbours, the one whose
// merge was learned first is merged first, and of equal ones the leftmost.
class BytePairs {
  constructor({ vocab, merges, ...settings }) {
    const kinds = ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"];
    for (const kind of kinds) if (settings[kind]) refuse("the model's", kind);
    this.vocab = new Map(Object.entries(vocab));
    this.tokens = []; // by id
    for (const [token, id] of this.vocab) this.tokens[id] = token;
    this.whole = settings.ignore_merges ?? false; // a word that is a token is not merged from bytes
    this.ofByte = ALPHABET.map((character) => this.vocab.get(character));
    const hasAll = !this.ofByte.includes(undefined);
    if (settings.unk_token && !hasAll) refuse("the model's", "unk_token");
    this.base = this.tokens.length;
    this.ranks = new Map(); // of pairs of ids, as one number
    this.merged = []; // ids, by rank
    merges.forEach((merge, rank) => {
      const pair = typeof merge === "string" ? merge.split(" ") : merge;
      const [left, right] = pair.map((token) => this.vocab.get(token));
      this.ranks.set(left * this.base + right, rank);
      this.merged.push(this.vocab.get(pair.join("")));
    });
    this.cache = new Map();
  }

  pieceOf(id) {
    return bytesOf(this.tokens[id] ?? "");
  }

  encode(word) {
    const known = this.cache.get(word);
    if (known) return known;
    const ids = this.merge(word);
    if (word.length > CACHED_LENGTH) return ids;
    if (this.cache.size >= CACHED_WORDS) this.cache.clear();
    this.cache.set(word, ids);
    return ids;
  }

  merge(word) {
    const bytes = Array.from(encodeUtf8(word));
    if (this.whole) {
      const id = this.vocab.get(bytes.map((byte) => ALPHABET[byte]).join(""));
      if (id !== undefined) return [id];
    }
    const ids = bytes.map((byte) => this.ofByte[byte]).filter((id) => id !== undefined);
    const size = ids.length, heap = new Heap();
    const before = ids.map((_, i) => i - 1), after = ids.map((_, i) => i + 1);
    const rankAt = (i) => this.ranks.get(ids[i] * this.base + ids[after[i]]);
    const note = (i) => {
      const rank = rankAt(i);
      if (rank !== undefined) heap.push(rank * size + i);
    };
    for (let i = 0; i < size; i++) note(i);
    while (heap.items.length) {
      const least = heap.pop(), i = least % size, rank = (least - i) / size;
      if (rankAt(i) !== rank) continue; // one of the two has been merged meanwhile
      const other = after[i];
      ids[i] = this.merged[rank];
      ids[other] = undefined;
      after[i] = after[other];
      before[after[i]] = i;
      if (i > 0) note(before[i]);
      note(i);
    }
    return ids.filter((id) => id !== undefined);
  }
}

// --------------------------------------------------------------------------- a vocab.txt

// The longest token at each place, as `SimpleTokenizer` finds it. Bytes are characters here.
class LongestMatch {
  constructor(content) {
    const lines = content.split("\r\n").length, ends = content.split("\n").length;
    const end = lines === ends && ends > 1 ? "\r\n" : "\n";
    const tokens = (content.endsWith(end) ? content.slice(0, -end.length) : content).split(end);
    const listed = new Set(tokens), gpt2 = ALPHABET.every((character) => listed.has(character));
    this.ids = new Map();
    this.pieces = []; // bytes of each id
    this.special = new Map();
    tokens.forEach((token, id) => this.add(token, id, gpt2));
    for (let byte = 0; byte < 256; byte++) {
      const character = String.fromCharCode(byte);
      if (this.ids.has(character)) continue;
      this.ids.set(character, this.pieces.length);
      this.pieces.push(Uint8Array.of(byte));
    }
    this.longest = 0;
    for (const piece of this.ids.keys()) this.longest = Math.max(this.longest, piece.length);
  }

  add(token, id, gpt2) {
    const escaped = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
    const isSpecial = !escaped && (EOS_NAMES.includes(token) || /^<\|.*\|>$/s.test(token));
    let bytes = encodeUtf8(token);
    if (escaped) bytes = Uint8Array.of(parseInt(escaped[1], 16));
    else if (gpt2 && !isSpecial) bytes = bytesOf(token);
    this.pieces.push(bytes);
    if (isSpecial && !this.special.has(token)) this.special.set(token, id);
    const piece = latin(bytes);
    if (piece && !this.special.has(token) && !this.ids.has(piece)) this.ids.set(piece, id);
  }

  pieceOf(id) {
    return this.pieces[id] ?? Uint8Array.of(255);
  }

  encode(text) {
    const data = latin(encodeUtf8(text)), ids = [];
    for (let at = 0, size; at < data.length; at += size) {
      size = Math.min(this.longest, data.length - at);
      while (!this.ids.has(data.slice(at, at + size))) size--;
      ids.push(this.ids.get(data.slice(at, at + size)));
    }
    return ids;
  }
}

const latin = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");

// ----------------------------------------------------------------------------- tokenizer

const SPACE = /\p{White_Space}/u;
const IN_WORD = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]/u;

// Whether there is a word right before the place `begin` of a text, or right after `end`.
function touchesWord(text, begin, end) {
  const before = Array.from(text.slice(Math.max(0, begin - 2), begin)).at(-1) ?? "";
  const after = Array.from(text.slice(end, end + 2))[0] ?? "";
  return IN_WORD.test(asUnicode16(before + after));
}

// Ids and texts, with a list in the place of each text.
function mapTexts(parts, change) {
  return parts.flatMap((part) => (typeof part === "number" ? part : change(part)));
}

export class Tokenizer {
  // content  the text of a tokenizer.json or a vocab.txt, as `name` says
  constructor(content, name = "tokenizer.json") {
    this.normalize = (text) => text;
    this.words = (text) => [text];
    this.pieces = new Map(); // bytes, by id
    if (name === "vocab.txt") this.readVocabulary(content);
    else this.readLibrary(JSON.parse(content));
  }

  readVocabulary(text) {
    this.model = new LongestMatch(text);
    const special = Array.from(this.model.special);
    this.setAdded(special.map(([content, id]) => ({ content, id, special: true })));
    this.eosId = special.find(([content]) => EOS_NAMES.includes(content))?.[1] ?? null;
  }

  readLibrary(settings) {
    const { model, decoder } = settings;
    if ((model.type ?? "BPE") !== "BPE") refuse("the model", model.type);
    if (decoder?.type !== "ByteLevel") refuse("the decoder", decoder?.type);
    this.normalize = makeNormalizer(settings.normalizer);
    this.words = makeSplitter(settings.pre_tokenizer);
    this.model = new BytePairs(model);
    const added = (settings.added_tokens ?? []).filter((token) => token.content);
    this.setAdded(added.map((token) => ({ ...token, id: this.idOf(token.content) ?? token.id })));
    for (const { id, content } of this.added) this.model.tokens[id] = content;
    this.eosId = EOS_NAMES.map((eos) => this.idOf(eos)).find((id) => id !== undefined) ?? null;
  }

  // The tokens that are found in text before it is divided into words.
  setAdded(added) {
    const normalized = added.filter((token) => token.normalized);
    const raw = added.filter((token) => !token.normalized);
    this.added = added;
    this.special = new Map(); // ids, by content
    for (const token of added) if (token.special) this.special.set(token.content, token.id);
    this.hidden = new Set(this.special.values());
    this.finders = [this.finder(raw, (text) => text), this.finder(normalized, this.normalize)];
  }

  // A pattern for tokens, and the tokens by what it finds.
  finder(tokens, normalize) {
    const named = new Map(tokens.map((token) => [normalize(token.content), token]));
    const names = Array.from(named.keys());
    if (this.model instanceof BytePairs) names.sort((a, b) => b.length - a.length);
    const pattern = names.map(escapePattern).join("|") || "(?!)";
    return { pattern: new RegExp(pattern, "gu"), named };
  }

  // The same tokenizer, in which these tokens are special, as far as it has them.
  withSpecial(contents) {
    const named = contents.filter((content) => !this.special.has(content));
    const tokens = named.map((content) => ({ content, id: this.idOf(content), special: true }));
    return this.withAdded(tokens.filter(({ id }) => id !== undefined));
  }

  // The same tokenizer with more added tokens, or others of the same content.
  withAdded(more) {
    const other = Object.assign(Object.create(Tokenizer.prototype), this);
    const contents = new Set(more.map((token) => token.content));
    other.setAdded([...this.added.filter((token) => !contents.has(token.content)), ...more]);
    return other;
  }

  // The id of a token, or undefined.
  idOf(token) {
    const added = this.added?.find((each) => each.content === token);
    return added?.id ?? this.model.vocab?.get(token);
  }

  // The ids of a text; a lone surrogate is read as "?". Special tokens in it are plain text, unless
  // they are allowed.
  encode(text, allowSpecial = false) {
    const [raw, normalized] = this.finders, wellFormed = text.replace(/\p{Cs}/gu, "?");
    const parts = mapTexts([...sections(wellFormed, raw, allowSpecial)], (part) => {
      return [...sections(this.normalize(part), normalized, allowSpecial)];
    });
    return mapTexts(parts, (part) => this.words(part).flatMap((word) => this.model.encode(word)));
  }

  // The text of ids; bytes that are no character become U+FFFD.
  decode(ids, skipSpecial = true) {
    const shown = skipSpecial ? ids.filter((id) => !this.hidden.has(id)) : ids;
    const pieces = shown.map((id) => this.pieceOf(id));
    const bytes = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
    let at = 0;
    for (const piece of pieces) {
      bytes.set(piece, at);
      at += piece.length;
    }
    return decodeUtf8(bytes);
  }

  pieceOf(id) {
    if (!this.pieces.has(id)) this.pieces.set(id, this.model.pieceOf(id));
    return this.pieces.get(id);
  }
}

// The ids of the added tokens in a text, and the text between them. What is found is not searched
// again, even if it stays text.
function* sections(text, { pattern, named }, allowSpecial) {
  let at = 0;
  for (const { 0: found, index } of text.matchAll(pattern)) {
    const token = named.get(found);
    let begin = index, end = index + found.length;
    if (token.special && !allowSpecial) continue;
    if (token.single_word && touchesWord(text, begin, end)) continue;
    while (token.lstrip && begin > at && SPACE.test(text[begin - 1])) begin--;
    while (token.rstrip && end < text.length && SPACE.test(text[end])) end++;
    if (at < begin) yield text.slice(at, begin);
    yield token.id;
    at = end;
  }
  if (at < text.length) yield text.slice(at);
}

// ---------------------------------------------------------------------------- streamed text

// Decodes ids one by one: returns whole characters only, and no part of a stop string.
export class TextStream {
  // context  the ids before; some tokenizers decode an id differently after other ids
  constructor(tokenizer, context = [], stops = []) {
    Object.assign(this, { tokenizer, context, stops });
    this.pending = []; // ids since the last one that ended with a whole character
    this.pendingText = ""; // the whole characters in `pending`
    this.held = ""; // text that may be the start of a stop string
    this.stopped = false;
  }

  // The text that is certain after one more id; `stopped` says if a stop string ended it.
  push(id) {
    this.pending.push(id);
    const before = this.tokenizer.decode(this.context);
    const both = this.tokenizer.decode([...this.context, ...this.pending]);
    const text = Array.from(both).slice(Array.from(before).length).join("");
    const certain = text.replace(/\ufffd+$/, "");
    this.held += certain.slice(this.pendingText.length).replaceAll(MARK, "");
    this.pendingText = certain;
    // No character needs as many as 8 ids.
    if (!text.endsWith(MARK) || this.pending.length === 8) this.dropPending(text);
    return this.release();
  }

  // Move the pending ids to the context, except the last ones if they begin a character.
  dropPending(text) {
    let kept = text.endsWith(MARK) ? this.pending.slice(-3) : [];
    while (kept.length && /[^\ufffd]/.test(this.tokenizer.decode(kept))) kept = kept.slice(1);
    const done = this.pending.slice(0, this.pending.length - kept.length);
    this.context = text ? done : [...this.context, ...done]; // special tokens have no text
    this.pending = kept;
    this.pendingText = "";
  }

  // The part of the held text that cannot become a stop string any more.
  release() {
    const found = this.stops.map((stop) => this.held.indexOf(stop)).filter((at) => at >= 0);
    this.stopped ||= found.length > 0;
    const end = found.length ? Math.min(...found) : this.held.length - this.begunLength();
    const text = this.held.slice(0, end);
    this.held = found.length ? "" : this.held.slice(end);
    return text;
  }

  // The length of the end of the held text that may begin a stop string.
  begunLength() {
    let most = 0;
    for (const stop of this.stops) {
      for (let n = Math.min(stop.length - 1, this.held.length); n > most; n--) {
        if (this.held.endsWith(stop.slice(0, n))) most = n;
      }
    }
    return most;
  }

  // The held text, at the end of an answer; an incomplete character is left out.
  finish() {
    const text = this.held;
    this.held = "";
    return text;
  }

  // Is all text of all ids returned?
  isClean() {
    return !(this.pending.length || this.held || this.stopped);
  }
}

// `ids` and then the ids of `text`, encoded as a continuation of theirs.
export function appendText(tokenizer, ids, text) {
  if (!text) return ids;
  const before = tokenizer.decode(ids.slice(-CONTEXT));
  const alone = tokenizer.encode(before), both = tokenizer.encode(before + text);
  let same = 0;
  while (same < Math.min(alone.length, both.length) && alone[same] === both[same]) same++;
  const merged = alone.slice(same); // last ids of `before`, which the text changes
  const kept = ids.length - merged.length;
  const isEnd = kept >= 0 && merged.every((id, i) => id === ids[kept + i]);
  return isEnd ? [...ids.slice(0, kept), ...both.slice(same)] : [...ids, ...tokenizer.encode(text)];
}
