// The chat template of a model: messages to the token ids of a prompt, those of chat_template.py.

const STAND_INS = 0xf0000, SIGNS = 0x100000; // private use: for characters of messages, for tokens
const MOST_IN_RANGE = 100_000;
const ROLES = ["system", "developer", "user", "assistant"];
const MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August",
  "September", "October", "November", "December"];
const DAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

const oneLine = (error) => String(error.message ?? error).split(/\s+/).filter(Boolean).join(" ");

function require(condition, problem) {
  if (!condition) throw new Error(problem);
}

// What finds any of these texts, the longest first.
function either(texts) {
  const sorted = [...texts].sort((a, b) => b.length - a.length);
  const escaped = sorted.map((text) => text.replace(/[\^$\\.*+?()[\]{}|]/g, "\\$&"));
  return new RegExp(escaped.join("|") || "(?!)", "gu");
}

const findAll = (pattern, text) => Array.from(text.matchAll(pattern), ([found]) => found);

// The text with each character that is in the Map changed.
function translate(text, changes) {
  return Array.from(text, (character) => changes.get(character) ?? character).join("");
}

// The time as Python writes it: in English, and not in the language of the browser.
function strftimeNow(format) {
  const now = new Date(), pad = (number, filling = "0") => String(number).padStart(2, filling);
  const month = MONTHS[now.getMonth()], day = DAYS[now.getDay()];
  const parts = {
    Y: now.getFullYear(), y: pad(now.getFullYear() % 100), m: pad(now.getMonth() + 1),
    B: month, b: month.slice(0, 3), d: pad(now.getDate()), e: pad(now.getDate(), " "),
    A: day, a: day.slice(0, 3), H: pad(now.getHours()), I: pad(now.getHours() % 12 || 12),
    p: now.getHours() < 12 ? "AM" : "PM", M: pad(now.getMinutes()), S: pad(now.getSeconds()),
    "%": "%",
  };
  return format.replace(/%(.)/g, (code, letter) => {
    require(letter in parts, `strftime_now: ${code} is not known`);
    return parts[letter];
  });
}

// `range` of Jinja's sandbox.
function range(...ends) {
  const [start, stop, step = 1] = ends.length === 1 ? [0, ends[0]] : ends;
  const size = Math.max(0, Math.ceil((stop - start) / step));
  require(size <= MOST_IN_RANGE, "range() is too long");
  return Array.from({ length: size }, (_, i) => start + i * step);
}

function raiseException(problem) {
  throw new Error(problem);
}

const GLOBALS = {
  true: true, false: false, none: null, True: true, False: false, None: null,
  range, raise_exception: raiseException, strftime_now: strftimeNow,
};

// ------------------------------------------------------------------------ Python's strings

// White space, as it stands in a class of a regular expression.
const SPACE = "\\p{White_Space}\\x1c-\\x1f";

// `str.lstrip`.
function lstrip(text, characters) {
  const set = characters?.replace(/[\\\]^-]/g, "\\$&") ?? SPACE;
  return set ? text.replace(new RegExp(`^[${set}]+`, "u"), "") : text;
}

const reverse = (text) => Array.from(text).reverse().join("");
const rstrip = (text, characters) => reverse(lstrip(reverse(text), characters));
const strip = (text, characters) => rstrip(lstrip(text, characters), characters);

function capitalize(text) {
  const [first = "", ...rest] = text, upper = first.toUpperCase();
  return upper.slice(0, 1) + (upper.slice(1) + rest.join("")).toLowerCase();
}

// Jinja's filter `title`, which is not `str.title`.
function title(text) {
  const words = text.split(/([-\s({[<]+)/u).map(([first = "", ...rest]) => {
    return first.toUpperCase() + rest.join("").toLowerCase();
  });
  return words.join("");
}

function indent(text, width = 4, first = false, blank = false) {
  const by = typeof width === "number" ? " ".repeat(width) : width;
  const lines = text.split(/\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]/);
  return lines.map((line, i) => ((i ? line || blank : first) ? by + line : line)).join("\n");
}

const countCharacters = (text) => Array.from(text).length;

const splitAtSpace = (text) => text.split(new RegExp(`[${SPACE}]+`, "u")).filter(Boolean);

// Methods and filters of strings that @huggingface/jinja has with other results.
const METHODS = {
  strip, lstrip, rstrip, capitalize,
  title: (text) => text.replace(/\p{L}+/gu, capitalize),
};
const FILTERS = {
  trim: strip,
  length: countCharacters,
  count: countCharacters,
  title,
  capitalize,
  indent,
};
const PARAMETERS = { trim: ["chars"], indent: ["width", "first", "blank"] };

// ------------------------------------------------------------------------------- templates

const SILENT = ["Set", "Macro", "Comment"]; // they write nothing
const ANSWER = "is_an_answer"; // the condition in the place of {% generation %}
const known = (value) => ({ type: "Known", value }); // a part of a template that has its value

// What a template writes of a value.
function written(value) {
  switch (value.type) {
    case "NullValue":
      return "None";
    case "UndefinedValue":
      return "";
    case "BooleanValue":
      return value.value ? "True" : "False";
    case "StringValue":
    case "IntegerValue":
    case "FloatValue":
      return value.toString();
    default:
      throw new Error(`${value.type} is not written as in Python`);
  }
}

// Whether two values are equal in Python: "" is not false, but 1 is true.
function isEqual(left, right) {
  const [a, b] = [left, right].map(({ type, value }) => {
    if (type === "NullValue") return null;
    return type === "BooleanValue" ? Number(value) : value;
  });
  if (Array.isArray(a) && Array.isArray(b)) {
    return a.length === b.length && a.every((each, i) => isEqual(each, b[i]));
  }
  if (a instanceof Map && b instanceof Map) {
    return a.size === b.size && [...a].every(([k, v]) => b.has(k) && isEqual(v, b.get(k)));
  }
  return a === b;
}

// A template with the line ends of Python, and with conditions in the place of statements that mark
// answers to learn from: the library would leave out white space around these.
function prepare(source) {
  const statement = /(\{%-?\s*)(end)?generation(\s*-?%\})/g;
  const replaced = (_, begin, end, rest) => begin + (end ? "endif" : `if ${ANSWER}`) + rest;
  return source.replace(/\r\n?/g, "\n").replace(statement, replaced);
}

// A function from the names that a template may use to its text. The library's interpreter has
// JavaScript's semantics in places; here it has Python's, or throws an error.
function makeWriter({ Environment, Interpreter, Template }, source) {
  const { parsed } = new Template(prepare(source));
  const wrap = (value) => new Environment().set("value", value);

  // The names of a round of a loop.
  function bind({ loopvar }, item, scope) {
    const inner = new Environment(scope), isOne = loopvar.type === "Identifier";
    const names = isOne ? [loopvar] : loopvar.value, values = isOne ? [item] : item.value;
    require(values.length === names.length, "a loop has more or fewer names than values");
    names.forEach((name, i) => inner.setVariable(name.value, values[i]));
    return inner;
  }

  function itemsOf(value) {
    if (value.type === "UndefinedValue") return [];
    if (value.type === "StringValue") return Array.from(value.value, wrap);
    const list = value.type === "ObjectValue" ? value.keys() : value;
    require(Array.isArray(list.value), `${value.type} has no items`);
    return list.value;
  }

  function makeLoop(items, i) {
    const length = items.length, counts = { index: i + 1, index0: i, length };
    const ends = { first: i === 0, last: i === length - 1 };
    const loop = wrap({ ...counts, ...ends, revindex: length - i, revindex0: length - i - 1 });
    if (i > 0) loop.value.set("previtem", items[i - 1]);
    if (i < length - 1) loop.value.set("nextitem", items[i + 1]);
    return loop;
  }

  class PythonInterpreter extends Interpreter {
    evaluate(node, scope) {
      switch (node?.type) {
        case "Known":
          return node.value;
        case "BinaryExpression":
          return this.evaluateOperator(node, scope);
        case "MemberExpression":
          return this.evaluateMember(node, scope);
        case "CallExpression":
          return this.evaluateCall(node, scope);
        case "TestExpression":
          return this.evaluateTest(node, scope);
        case "If":
          if (node.test.type !== "Identifier" || node.test.value !== ANSWER) break;
          return this.evaluateBlock(node.body, new Environment(scope));
        case "Break":
        case "Continue":
          throw Object.assign(new Error("not in a loop"), { leaves: node.type, text: "" });
      }
      return super.evaluate(node, scope);
    }

    evaluateOperator(node, scope) {
      const operator = node.operator.value;
      if (["and", "or"].includes(operator)) return super.evaluate(node, scope);
      const left = this.evaluate(node.left, scope), right = this.evaluate(node.right, scope);
      if (operator === "==" || operator === "!=") {
        return wrap(isEqual(left, right) === (operator === "=="));
      }
      if (operator === "~") return wrap(written(left) + written(right));
      const hasText = [left.type, right.type].includes("StringValue");
      const fits = operator !== "+" || !hasText || left.type === right.type;
      require(fits, `${left.type} and ${right.type} cannot be added`);
      const isDivision = ["/", "//", "%"].includes(operator);
      require(!isDivision || right.value, "division by zero");
      return super.evaluate({ ...node, left: known(left), right: known(right) }, scope);
    }

    evaluateMember(node, scope) {
      const object = this.evaluate(node.object, scope);
      require(object.type !== "UndefinedValue", "an undefined value has no fields");
      const isItem = node.computed && node.property.type !== "SliceExpression";
      if (object.type === "StringValue" && isItem) {
        const index = this.evaluate(node.property, scope);
        if (index.type === "IntegerValue") return wrap(Array.from(object.value).at(index.value));
      }
      return super.evaluate({ ...node, object: known(object) }, scope);
    }

    // The values of arguments, in the order of the parameters' names.
    positional(args, scope, names = []) {
      const [given, named] = this.evaluateArguments(args, scope);
      for (const [name, value] of named) {
        require(names.includes(name), `the argument ${name} is not known here`);
        given[names.indexOf(name)] = value;
      }
      return Array.from(given, (each) => each?.value);
    }

    makeDict(args, scope) {
      const [given, named] = this.evaluateArguments(args, scope), made = wrap({});
      require(!given.length, "dict() only knows arguments with names");
      for (const [name, value] of named) made.value.set(name, value);
      return made;
    }

    evaluateCall(node, scope) {
      const { callee } = node;
      if (callee.type === "Identifier" && callee.value === "dict") {
        return this.makeDict(node.args, scope);
      }
      if (callee.type !== "MemberExpression") return super.evaluate(node, scope);
      const object = this.evaluate(callee.object, scope), name = callee.property.value;
      if (object.type === "StringValue" && name === "split" && !node.args.length) {
        return wrap(splitAtSpace(object.value));
      }
      if (object.type !== "StringValue" || !Object.hasOwn(METHODS, name)) {
        const method = { ...callee, object: known(object) };
        return super.evaluate({ ...node, callee: method }, scope);
      }
      return wrap(METHODS[name](object.value, ...this.positional(node.args, scope)));
    }

    // Text without letters is neither upper nor lower.
    evaluateTest(node, scope) {
      const value = this.evaluate(node.operand, scope), { value: test } = node.test;
      if (value.type !== "StringValue" || !["upper", "lower"].includes(test)) {
        return super.evaluate({ ...node, operand: known(value) }, scope);
      }
      const text = value.value, [upper, lower] = [text.toUpperCase(), text.toLowerCase()];
      const holds = upper !== lower && text === (test === "upper" ? upper : lower);
      return wrap(holds !== node.negate);
    }

    applyFilter(value, filter, scope) {
      const name = filter.callee?.value ?? filter.value;
      if (name === "string") return wrap(written(value));
      if (name === "join" && value.type === "ArrayValue") {
        const [separator = ""] = this.positional(filter.args ?? [], scope);
        return wrap(value.value.map(written).join(separator));
      }
      if (value.type !== "StringValue" || !Object.hasOwn(FILTERS, name)) {
        return super.applyFilter(value, filter, scope);
      }
      const given = this.positional(filter.args ?? [], scope, PARAMETERS[name]);
      return wrap(FILTERS[name](value.value, ...given));
    }

    // Each round has variables of its own. The text of a round that is left early is kept; if all
    // are, the text of {% else %} follows, as in Jinja.
    evaluateFor(node, scope) {
      const { iterable, body, defaultBlock } = node;
      const { lhs, test } = iterable.type === "SelectExpression" ? iterable : { lhs: iterable };
      const isChosen = (item) => this.evaluate(test, bind(node, item, scope)).__bool__().value;
      const all = itemsOf(this.evaluate(lhs, scope)), items = test ? all.filter(isChosen) : all;
      let text = "", left = null, isWhole = false;
      for (let i = 0; i < items.length && left !== "Break"; i++) {
        const inner = bind(node, items[i], scope);
        inner.setVariable("loop", makeLoop(items, i));
        try {
          text += this.evaluateBlock(body, inner).value;
          isWhole = true;
        } catch (error) {
          if (!error.leaves) throw error;
          text += error.text;
          left = error.leaves;
        }
      }
      return isWhole ? wrap(text) : wrap(text + this.evaluateBlock(defaultBlock, scope).value);
    }

    // A macro knows the names where it is defined, and not those where it is called.
    evaluateMacro(node, scope) {
      const nothing = super.evaluateMacro(node, scope);
      const macro = scope.lookupVariable(node.name.value), call = macro.value;
      macro.value = (args, from) => {
        const inner = new Environment(scope), caller = from.variables.get("caller");
        if (caller) inner.setVariable("caller", caller);
        return call(args, inner);
      };
      return nothing;
    }

    evaluateBlock(statements, scope) {
      let text = "";
      for (const statement of statements) {
        try {
          const value = this.evaluate(statement, scope);
          if (!SILENT.includes(statement.type)) text += written(value);
        } catch (error) {
          if (error.leaves) error.text = text + error.text;
          throw error;
        }
      }
      return wrap(text);
    }
  }

  return (names) => {
    const scope = new Environment();
    for (const [name, value] of Object.entries({ ...GLOBALS, ...names })) scope.set(name, value);
    return new PythonInterpreter(scope).run(parsed).value;
  };
}

// ----------------------------------------------------------------------------------- chats

export class ChatTemplate {
  // The template of a model, whose special tokens tokenizer_config.json names.
  static async open(tokenizer, text, specialTokens = {}) {
    const jinja = await import("./jinja.js");
    try {
      return new ChatTemplate(tokenizer, makeWriter(jinja, text), specialTokens);
    } catch (error) {
      const problem = `the model's chat template cannot be read (${oneLine(error)})`;
      throw new Error(`chat: ${problem}; export the model with another`);
    }
  }

  // write  a function from the names that a template may use to the text
  constructor(tokenizer, write, specialTokens) {
    this.write = write;
    this.specialTokens = specialTokens;
    this.tokenizer = tokenizer.withSpecial(Object.values(specialTokens));
    const special = Array.from(this.tokenizer.special).filter(([token]) => token.trim());
    this.special = new Map(special); // ids, by token
    this.reserved = new Set(this.special.values());
    this.tokens = either(this.special.keys());
    this.letters = new Set(Array.from(this.special.keys()).join(""));
    const visible = [...this.letters].filter((letter) => /\S/u.test(letter));
    const signs = visible.filter((letter) => !/[\p{L}\p{N}]/u.test(letter));
    this.patterns = [either(visible), either([...this.special.keys(), ...signs]), this.tokens];
  }

  // The id of the special token that ends an answer, or null.
  get turnEnd() {
    if (this.end === undefined) this.end = this.findTurnEnd();
    return this.end;
  }

  findTurnEnd() {
    const said = "Said 1";
    const asked = { role: "user", content: "Hi" }, answer = { role: "assistant", content: said };
    let text = "";
    try {
      text = this.fill([asked, answer], false);
    } catch {
      return null; // a template may reject such a chat
    }
    const at = text.lastIndexOf(said);
    const after = at < 0 ? "" : lstrip(text.slice(at + said.length));
    const ends = [...this.special.keys()].filter((token) => after.startsWith(token));
    return ends.length ? this.special.get(ends.sort((a, b) => b.length - a.length)[0]) : null;
  }

  // The token ids of the messages, and unless `reply` is false, of what begins an answer.
  encode(messages, reply = true) {
    messages.forEach(({ role, content }, i) => {
      const roles = "system, developer, user or assistant";
      require(ROLES.includes(role), `messages.${i}.role: is not ${roles}; pass one of them`);
      require(typeof content === "string", `messages.${i}.content: is not a text; pass one`);
    });
    const plain = messages.map(({ role, content }) => ({ role, content }));
    return this.idsOf(this.render(plain, reply));
  }

  // The text of a chat, and the same with stand-ins for special tokens of messages.
  //
  // A template may join parts to a token, so all characters of tokens have stand-ins. If it looks
  // for them and so writes another text, only those like < have, or else whole tokens.
  render(messages, reply) {
    const used = new Set(JSON.stringify(messages.map((m) => [m.role, m.content])));
    const standIns = new Map(), back = new Map();
    let next = STAND_INS;
    for (const letter of this.letters) {
      while (used.has(String.fromCodePoint(next))) next++;
      const standIn = String.fromCodePoint(next++);
      standIns.set(letter, standIn);
      back.set(standIn, letter);
    }
    for (const pattern of this.patterns) {
      const changed = messages.map(({ role, content }) => {
        return { role, content: content.replace(pattern, (found) => translate(found, standIns)) };
      });
      const text = this.fill(messages, reply); // anew: it may have the time
      const isSame = changed.every(({ content }, i) => content === messages[i].content);
      const marked = isSame ? text : this.tryToFill(changed, reply);
      if (marked !== null && translate(marked, back) === text) return { text, marked, back };
    }
    throw new Error("messages: the chat template looks for a special token in them; leave it out");
  }

  // The text that the template makes of messages.
  fill(messages, reply) {
    const names = { ...this.specialTokens, messages, tools: null, documents: null };
    names.add_generation_prompt = reply;
    try {
      return this.write(names);
    } catch (error) {
      throw new Error(`messages: the chat template rejects them (${oneLine(error)})`);
    }
  }

  // The same, or null if the template rejects them, as it may what stands in.
  tryToFill(messages, reply) {
    try {
      return this.fill(messages, reply);
    } catch {
      return null;
    }
  }

  // The ids of a text, in which special tokens of messages are plain text.
  idsOf({ text, marked, back }) {
    const written = findAll(this.tokens, marked); // by the template, not by a message
    let ids = this.tokenizer.encode(text, true);
    const same = JSON.stringify(findAll(this.tokens, text)) === JSON.stringify(written);
    if (!same || this.hasMore(ids, written)) {
      this.guard ??= makeGuard(this.tokenizer);
      const signed = marked.replace(this.tokens, (token) => this.guard.signs.get(token));
      ids = this.guard.tokenizer.encode(translate(signed, back));
    }
    const problem = "messages: the tokenizer reads a special token in them; leave it out";
    require(!this.hasMore(ids, written), problem);
    return ids;
  }

  // Whether there are special tokens in `ids` that the template has not written.
  hasMore(ids, written) {
    const left = new Map();
    for (const token of written) {
      const id = this.special.get(token);
      left.set(id, (left.get(id) ?? 0) + 1);
    }
    return ids.some((id) => {
      if (!this.reserved.has(id)) return false;
      left.set(id, (left.get(id) ?? 0) - 1);
      return left.get(id) < 0;
    });
  }
}

// A tokenizer that reads special tokens as plain text, and the signs that stand for them instead.
function makeGuard(tokenizer) {
  const special = tokenizer.added.filter((token) => token.special);
  const signs = special.map((_, i) => String.fromCodePoint(SIGNS + i));
  const added = special.map((token, i) => ({ ...token, content: signs[i], special: false }));
  return {
    tokenizer: tokenizer.withAdded(added),
    signs: new Map(special.map((token, i) => [token.content, signs[i]])),
  };
}
