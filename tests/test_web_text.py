"""The page's tokenizer and chat template, run under node: ids and texts equal those of Python."""

import datetime
import json
import random
import re
import shutil
import subprocess

import pytest
from chat_helpers import CHATS, KINDS, NAMES, SHAPES, TALK, messages_of, template_of
from helpers import NPM_PACKAGES, ROOT, lacking, npm_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from data.chat import CHATML
from data.vocabulary import bounded_byte_level
from streaming import CONTEXT, TextStream, append_text
from tinymamba.chat_template import ChatTemplate
from tinymamba.cli import UserError
from tinymamba.openai_api import ApiError
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_alphabet, byte_tokenizer
from tinymamba.web_tokenizer import find_problem, require_readable

WEB = ROOT / "tinymamba" / "web"
JINJA = "@huggingface/jinja/dist/index.js"
READ = """
import { readFileSync } from "node:fs";
import { TextStream, Tokenizer, appendText } from "./tokenizer.js";
import { ChatTemplate } from "./chat.js";
const given = JSON.parse(readFileSync(0, "utf8"));
const told = async (work) => {
  try { return await work(); } catch (error) { return error.message; }
};
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Runs JavaScript beside the page's own; it returns a value made from `given`."""
    if not shutil.which("node"):
        lacking("node")
    folder = tmp_path_factory.mktemp("web")
    for file in WEB.glob("*.js"):
        shutil.copy(file, folder)
    if (NPM_PACKAGES / JINJA).is_file():
        shutil.copy(NPM_PACKAGES / JINJA, folder / "jinja.js")
    (folder / "package.json").write_text('{"type": "module"}')

    def run(body: str, given):
        work = f"console.log(JSON.stringify(await (async () => {{{body}}})()));\n"
        (folder / "run.js").write_text(READ + work)
        done = subprocess.run(
            ["node", folder / "run.js"],
            input=json.dumps(given),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="module")
def jinja():
    npm_file(JINJA)


# ----------------------------------------------------------------------------------- texts

WORDS = ["the", "and", " of", "'s", "'LL", "don't", "I'VE", "'ſ", "12345", "３", "½", "²"]
WORDS += ["Ⅷ", "é", "e\u0301", "日本", "🙂", "👩\u200d👧", "\r\n", "\n", "\t", "  ", " "]
WORDS += ["\xa0", "\x85", "\ufeff", "\u200b", "\u2028", "\u180e", "\0", "\x1c", "ſ", "K"]
WORDS += ["İ", "ß", "ﬁ", "\u0338", "가", "ᄀ", "ᅡ", "ʕAb", "ǅ", "\u088f", "\U00011de1"]
WORDS += ["\U000105d2\u0307", "\U00010efd", "_", "=", "->", "http://", EOS_TOKEN, "<|"]
WORDS += ["|>", "<a>", "<b>", "\udc00", "x\ud800 "]


def any_character(rng: random.Random) -> str:
    code = rng.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)


def nasty(count: int, seed: int = 0) -> list[str]:
    """Texts of all of Unicode, words, scripts, long runs and white space in turn."""
    rng, made = random.Random(seed), []
    for i in range(count):
        size, some = rng.randint(0, 12), [any_character(rng) for _ in range(5)]
        alphabet = [WORDS + some, some, WORDS, " \n\t\ra1.\u3000"][i % 4]
        if i % 8 == 7:
            made.append(rng.choice(WORDS + some) * rng.randint(1, 99))
        else:
            made.append("".join(rng.choices(alphabet, k=size)))
    return made


LLAMA = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"""
LLAMA += r""" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
TIKTOKEN = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}|"""
TIKTOKEN += r""" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
CASES = r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
CASES += r"""(?i:'s|'t)?|[\p{Lu}\p{M}]+|\p{Han}|\d{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/\-]*|\s+(?!\S)|\s"""
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def divided(*steps, last=BYTES) -> pre_tokenizers.Sequence:
    return pre_tokenizers.Sequence([*steps, last])


def at(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


SPLITS = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "Llama 3": divided(at(LLAMA)),
    "tiktoken": divided(at(TIKTOKEN, "removed", invert=True)),
    "cases": divided(at(CASES)),
    "possessive": divided(at(r"\p{N}?+\p{N}|\P{N}+", "removed", invert=True)),
    "digits": divided(pre_tokenizers.Digits(True), last=pre_tokenizers.ByteLevel(False)),
    "several": divided(
        at(r"\p{N}+"), at("[^\\S\n]|[<>|a-c-]+"), pre_tokenizers.Split("'", "isolated")
    ),
}


def learn(texts: list[str]) -> str:
    """A tokenizer.json whose merges join anything, so that every wrong word gives other ids."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = BYTES, decoders.ByteLevel()
    alphabet = byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=[EOS_TOKEN], show_progress=False
    )
    library.train_from_iterator((t.encode(errors="ignore").decode() for t in texts), trainer)
    return library.to_str()


def make_kinds() -> dict[str, str]:
    """A tokenizer.json of every kind that the page reads."""
    base, kinds = learn(nasty(400, seed=1)), {}
    for name, split in SPLITS.items():
        library = Tokenizer.from_str(base)
        library.pre_tokenizer = split
        kinds[name] = library
    kinds["ours"] = bounded_byte_level(kinds["GPT-2"].model)
    kinds["ours"].add_special_tokens([EOS_TOKEN])
    kinds["NFC"] = Tokenizer.from_str(kinds["Llama 3"].to_str())
    kinds["NFC"].normalizer = normalizers.NFC()
    kinds["added"] = Tokenizer.from_str(kinds["NFC"].to_str())
    kinds["added"].add_special_tokens([AddedToken("<a>", lstrip=True, rstrip=True), "|><"])
    more = [AddedToken("é ", normalized=True), AddedToken("of", single_word=True)]
    more += [AddedToken("<b>", rstrip=True, normalized=False)]
    kinds["added"].add_tokens([*more, "\n\n", "x|>", "x"])
    kinds["bytes"] = byte_tokenizer()
    made = {name: library.to_str() for name, library in kinds.items()}
    whole = json.loads(made["Llama 3"])
    whole["model"] |= {"ignore_merges": True, "merges": whole["model"]["merges"][:99]}
    old = json.loads(made["GPT-2"])  # as the library wrote them once
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    del old["model"]["type"], old["normalizer"], old["post_processor"], old["truncation"]
    return {**made, "whole words": json.dumps(whole), "old": json.dumps(old)}


@pytest.fixture(scope="module")
def kinds() -> dict[str, SimpleTokenizer]:
    def opened(content: str) -> SimpleTokenizer:
        return SimpleTokenizer.from_dict({"name": "tokenizer.json", "content": content})

    return {name: opened(content) for name, content in make_kinds().items()}


@pytest.fixture(scope="module")
def vocabularies(tokenizers) -> dict[str, SimpleTokenizer]:
    """A vocab.txt in each notation."""
    return {name: each for name, each in tokenizers.items() if each.name == "vocab.txt"}


def record_of(tokenizer: SimpleTokenizer) -> dict:
    return {name: tokenizer.to_dict()[name] for name in ("name", "content")}


# ------------------------------------------------------------------------------- tokenizers

ENCODE = """
return given.map(({ content, name, texts }) => {
  const tokenizer = new Tokenizer(content, name);
  return [false, true].map((special) => texts.map((text) => tokenizer.encode(text, special)));
});
"""


def assert_same_ids(node, tokenizers: dict[str, SimpleTokenizer], texts: list[str]) -> None:
    given = [{**record_of(each), "texts": texts} for each in tokenizers.values()]
    for (name, tokenizer), got in zip(tokenizers.items(), node(ENCODE, given), strict=True):
        for special, ids in zip((False, True), got, strict=True):
            for text, found in zip(texts, ids, strict=True):
                assert found == tokenizer.encode(text, special), (name, special, text)


def test_ids_of_ten_thousand_texts_equal_those_of_the_library(node, kinds):
    texts = nasty(10_000)
    tokenizer = kinds["ours"]
    [[got, _]] = node(ENCODE, [{**record_of(tokenizer), "texts": texts}])
    assert len({*texts}) > 8000
    for text, ids in zip(texts, got, strict=True):
        assert ids == tokenizer.encode(text), text


def test_ids_of_every_kind_equal_those_of_the_library(node, kinds):
    assert_same_ids(node, kinds, nasty(500, seed=2))


def test_ids_of_vocabularies_equal_those_of_the_longest_match(node, vocabularies, tmp_path):
    """Also of one with line ends of Windows, and with tokens that it has twice."""
    lines = [*byte_alphabet(), "<|im_start|>", "the", "the", "</s>", "<|x\ry|>", "<0x0A>", "é\r"]
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*lines, "<|im_start|>", ""]).encode())
    made = {**vocabularies, "windows": SimpleTokenizer(tmp_path / "vocab.txt")}
    texts = [*nasty(300, seed=3), "<|im_start|>the</s> <|x\ry|>\n", "theme word é\r日本"]
    assert_same_ids(node, made, texts)


def test_texts_of_any_ids_equal_those_of_the_library(node, kinds, vocabularies):
    """Also of ids that break characters, special ones and ids that there are not."""
    rng, every, given = random.Random(0), {**kinds, **vocabularies}, []
    for tokenizer in every.values():
        ids = [
            [rng.randrange(len(tokenizer) + 3) for _ in range(rng.randint(0, 9))]
            for _ in range(150)
        ]
        given.append({**record_of(tokenizer), "ids": ids})
    got = node(
        """
        return given.map(({ content, name, ids }) => {
          const tokenizer = new Tokenizer(content, name);
          const texts = (some) => [true, false].map((skip) => tokenizer.decode(some, skip));
          return [tokenizer.eosId, ids.map(texts)];
        });
        """,
        given,
    )
    for (name, tokenizer), each, (eos, texts) in zip(every.items(), given, got, strict=True):
        assert eos == tokenizer.eos_token_id, name
        for ids, both in zip(each["ids"], texts, strict=True):
            assert both == [tokenizer.decode(ids, skip) for skip in (True, False)], (name, ids)


def test_long_runs_take_time_in_proportion(node, kinds):
    """Merging that takes the square of a word's length would need minutes."""
    runs = ["a" * 100_000, " " * 100_000 + "x", "日" * 20_000, " \n" * 10_000, "".join(nasty(3000))]
    tokenizer = kinds["Llama 3"]
    [[got, _]] = node(ENCODE, [{**record_of(tokenizer), "texts": runs}])
    assert got == [tokenizer.encode(text) for text in runs]


BYTE_BPE = json.loads(byte_tokenizer().to_str())
OTHERS = {
    "the model Unigram": {"model": {"type": "Unigram", "vocab": [["a", 0]], "unk_id": 0}},
    "the model WordPiece": {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
    "the model's byte_fallback": {"model": {**BYTE_BPE["model"], "byte_fallback": True}},
    "the model's dropout": {"model": {**BYTE_BPE["model"], "dropout": 0.1}},
    "the model's unk_token": {"model": {"vocab": {"a": 0}, "merges": [], "unk_token": "a"}},
    "the pre-tokenizer Metaspace": {"pre_tokenizer": {"type": "Metaspace"}},
    "the pre-tokenizer null": {"pre_tokenizer": None},
    "the decoder null": {"decoder": None},
    "the normalizer NFKC": {"normalizer": {"type": "NFKC"}},
}  # fmt: skip
PATTERNS = ["[a&&b]", "a(?>b)", r"\h", "^a", "(a", "a)", "[a", r"[\p{L}-x]", "(?i:[a-z])", "a{1}+"]


def test_a_tokenizer_that_the_page_cannot_read_is_refused_in_a_line(node):
    splits = {f"the pattern {each}": json.loads(byte_tokenizer().to_str()) for each in PATTERNS}
    for (_, file), pattern in zip(splits.items(), PATTERNS, strict=True):
        step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, file["pre_tokenizer"]]}
    merged = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    merged = {"type": "Sequence", "pretokenizers": [merged, BYTE_BPE["pre_tokenizer"]]}
    cases = {**{problem: {**BYTE_BPE, **part} for problem, part in OTHERS.items()}, **splits}
    cases["the pre-tokenizer Split MergedWithPrevious"] = {**BYTE_BPE, "pre_tokenizer": merged}
    several = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    cases["the normalizer Lowercase"] = {**BYTE_BPE, "normalizer": several}
    body = "return Promise.all(given.map((file) => told(() => new Tokenizer(file).eosId)));"
    got = node(body, [json.dumps(file) for file in cases.values()])
    remedy = "export a model with a byte-level BPE, such as data/prepare.py makes"
    for (problem, file), said in zip(cases.items(), got, strict=True):
        assert said == f"tokenizer.json: {problem} does not work in a browser; {remedy}"
        if problem in splits:
            continue
        with pytest.raises(UserError) as error:
            require_readable({"name": "tokenizer.json", "content": json.dumps(file)}, "a.json")
        assert str(error.value) == said.replace("tokenizer.json", "a.json")
    empty = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}
    assert find_problem({**BYTE_BPE, **empty}) == "the pre-tokenizer null"


def test_a_tokenizer_that_the_page_reads_may_be_exported(kinds, vocabularies):
    for tokenizer in [*kinds.values(), *vocabularies.values(), SimpleTokenizer()]:
        require_readable(tokenizer.to_dict(), "a")


# ---------------------------------------------------------------------------- streamed text

STOPS = [[], ["the"], [" of", "é"], ["日本", "\n\n", "a"]]


def test_streamed_text_equals_that_of_python(node, kinds, vocabularies):
    """After each id, at the end, and with ids before; also if characters are never whole."""
    rng, given, wanted = random.Random(0), [], []
    for tokenizer in [kinds["added"], kinds["bytes"], *vocabularies.values()]:
        texts = nasty(80, seed=4)
        cases = [tokenizer.encode(text, allow_special=True) for text in texts if len(text) < 30]
        cases += [[rng.randrange(len(tokenizer)) for _ in range(20)] for _ in range(40)]
        cases = [[ids[:n], ids[n:], STOPS[n]] for i, ids in enumerate(cases) for n in [i % 4]]
        given.append({**record_of(tokenizer), "cases": cases})
        wanted.append([streamed(tokenizer, *case) for case in cases])
    got = node(
        """
        return given.map(({ content, name, cases }) => {
          const tokenizer = new Tokenizer(content, name);
          return cases.map(([before, ids, stops]) => {
            const stream = new TextStream(tokenizer, before, stops);
            const push = (id) => [stream.push(id), stream.isClean(), stream.pending.length,
              stream.pendingText];
            return [ids.map(push), stream.finish(), stream.stopped];
          });
        });
        """,
        given,
    )
    assert got == wanted


def streamed(tokenizer, before: list[int], ids: list[int], stops: list[str]) -> list:
    stream, texts = TextStream(tokenizer, before, stops), []
    for i in ids:
        text = stream.push(i)
        texts.append([text, stream.is_clean(), len(stream.pending), stream.pending_text])
    return [texts, stream.finish(), stream.stopped]


def test_text_is_appended_as_in_python(node, kinds, vocabularies):
    """Ids before that the text changes, that it does not, and that encoding would not give."""
    rng, given, wanted = random.Random(1), [], []
    for tokenizer in [kinds["ours"], kinds["added"], *vocabularies.values()]:
        pairs = zip(nasty(200, seed=5), nasty(200, seed=6), strict=True)
        cases = [[tokenizer.encode(before)[:-1], text] for before, text in pairs]
        cases += [
            [[rng.randrange(len(tokenizer)) for _ in range(rng.randint(0, 2 * CONTEXT))], text]
            for text in nasty(50, seed=7)
        ]
        given.append({**record_of(tokenizer), "cases": cases})
        wanted.append([append_text(tokenizer, *case) for case in cases])
    got = node(
        """
        return given.map(({ content, name, cases }) => {
          const tokenizer = new Tokenizer(content, name);
          return cases.map(([ids, text]) => appendText(tokenizer, ids, text));
        });
        """,
        given,
    )
    assert got == wanted


# ------------------------------------------------------------------------------------- chats

CHAT = """
const made = [];
for (const { content, name, template, names, chats } of given) {
  const tokenizer = new Tokenizer(content, name);
  const chat = await told(() => ChatTemplate.open(tokenizer, template, names));
  const ids = (each) => told(() => chat.encode(...each));
  if (typeof chat === "string") made.push([chat, null]);
  else made.push([await Promise.all(chats.map(ids)), chat.turnEnd]);
}
return made;
"""
PARTS = ["a", "b", " ", "\n", "\n\n", '"', "'", "é", "<", "|", ">", "end", "\\", "[INST]"]
PARTS += ["<|end|>", "<|im_end|>", "</s>", "\ue000\ue001", "</think>", "<think>"]
PARTS += ["\U000f0000", "the other", "12", "\t", "日本", "🙂", "e\u0301", "<b>&x"]
PARTS += ["{{ x }}", "{% if %}", "\r\n", "\xa0", "\ufeff", "\x1c"]


def random_chats(count: int, seed: int = 0) -> list[list[tuple[str, str]]]:
    """Chats whose texts have special tokens, white space of all kinds and what Jinja writes."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        roles = ["system"] * (rng.random() < 0.4) + ["user", "assistant"] * 2
        said = ["".join(rng.choices(PARTS, k=rng.randint(0, 7))) for _ in roles]
        turns = list(zip(roles, said, strict=True))[: rng.randint(1, len(roles))]
        made.append(turns)
    return made


def as_json(chat) -> list[dict]:
    return [{"role": role, "content": content} for role, content in chat]


def encoded(template, chat, reply: bool) -> list[int] | str:
    """The ids, or the error."""
    try:
        return template.encode(messages_of(chat), reply)
    except ApiError as e:
        return str(e).removeprefix("400: ")


def rendered_in_page(node, templates: list, chats: list) -> list:
    """For each template: the ids of the chats with the beginning of an answer and without, or
    errors; and the id that ends a turn."""
    both = [[as_json(chat), reply] for chat in chats for reply in (True, False)]
    given = [
        {
            **record_of(each.tokenizer),
            "template": each.tokenizer.chat_template,
            "names": each.tokenizer.special_tokens,
            "chats": both,
        }
        for each in templates
    ]
    return node(CHAT, given)


def test_ids_of_chats_equal_those_of_python(node, jinja):
    """For all shapes of templates; where Python rejects a chat, the page does."""
    chats = [*CHATS, [("assistant", "a"), ("user", "b")], *random_chats(12)]
    sources = {**SHAPES, "ours": CHATML}
    templates = {name: template_of(text) for name, text in sources.items()}
    made = rendered_in_page(node, list(templates.values()), chats)
    both = [(chat, reply) for chat in chats for reply in (True, False)]
    rejected = 0
    for (name, template), (got, end) in zip(templates.items(), made, strict=True):
        assert end == template.turn_end, name
        for (chat, reply), ids in zip(both, got, strict=True):
            want = encoded(template, chat, reply)
            if isinstance(want, str):
                rejected += 1
                assert isinstance(ids, str) and ids.startswith("messages: the chat template "), ids
                assert "\n" not in ids
            else:
                assert ids == want, (name, chat, reply)
    assert 0 < rejected < 100


SAID = ["", " \x1c\u3000a b\ufeff\x85", "🙂é<|end|>", "xxaXx", "hello WORLD-fine (it's)", "ß ßX\n"]
SAID += ["é</s>", "\na\r\n\nb"]
EXPRESSIONS = [
    "('' == false) ~ (0 == false) ~ (1 == true) ~ (none == false) ~ ('1' == 1) ~ (x == '')",
    "([1, 'a'] == [1, 'a']) ~ ([1] != [2]) ~ ({'a': [1]} == {'a': [1]}) ~ (nothing == none)",
    "none ~ true ~ 1 ~ 1.5 ~ nothing ~ x",
    "none",
    "true",
    "x + 1",
    "x + none",
    "1 / 0",
    "1 // 0",
    "7 % 0",
    "x.strip() + '|' + x.lstrip() + '|' + x.rstrip()",
    "x.strip('x') + '|' + x.lstrip('🙂x') + '|' + x.rstrip('>-^]a')",
    "(x | trim) + '|' + (x | trim('x'))",
    "(x | length) ~ (x | count) ~ (messages | length) ~ ({'a': 1} | length)",
    "x[:2] ~ '|' ~ x[-1:] ~ '|' ~ x[::-1]",
    "x[0] ~ x[-1] ~ x[99] ~ x['strip']()",
    "x | trim(chars='x') ~ x.strip(chars='x')",
    "x | trim(chars='x')",
    "(x | capitalize) ~ '|' ~ x.capitalize() ~ '|' ~ (x | title) ~ (x | upper) ~ (x | lower)",
    "x.split() | join('|') ~ ['a', 1, true] | join ~ [1, none] | join('-')",
    "(x is upper) ~ (x is lower) ~ (x is not upper) ~ x.title()",
    "(x | indent) ~ ('a\\n\\nb' | indent(2, true))",
    "x | indent(1, first=true) ~ x | indent('>', blank=true)",
    "x.split('x') | join('|') ~ x.split(' ', 1)[-1]",
    "x | string ~ (1 | string) ~ (true | string) ~ (none | string)",
    "dict(a=1, b=x).b ~ dict(a=1).a ~ dict().a ~ dict(a=[x]).a[0]",
    "x.nothing",
    "x.nothing.here",
    "nothing.here",
    "messages[5]",
    "messages[5].content",
    "messages.append(1)",
    "range(10 ** 9)",
    "range(3) | join ~ range(1, 9, 3) | join ~ range(3, 0, -1) | join",
    "x | tojson ~ [x, 1, none, true] | tojson ~ {'a': {'b': x}} | tojson(indent=2)",
    "x | replace('x', '<') ~ x.replace('a', '')",
    "(x in ['', 'é</s>']) ~ ('x' in x) ~ ('a' not in x)",
    "x is string and x is defined and nothing is not defined and none is none",
    "'a' if x else 'b'",
    "x or 'empty'",
    "x | default('none') ~ nothing | default('none')",
    "messages | map(attribute='role') | join(',')",
    "messages | selectattr('role', 'equalto', 'user') | list | length",
    "messages | last",
    "[x]",
    "raise_exception('no\n way')",
    "x.isascii()",
    "add_generation_prompt ~ (tools is none) ~ bos_token ~ pad_token ~ sep_token",
]  # fmt: skip
# What the page rejects.
ONLY_PYTHON = {"messages | last", "[x]", "x.isascii()"}
STATEMENTS = """{% set n = namespace(k=0) %}{% for m in messages if m.role != 'x' %}
{% set n.k = n.k + 1 %}
  {%- if loop.first %}first{% elif loop.last %} last {% else %}{{ loop.index }}{% endif -%}
{% for part in m.content.split('<') %}{{ loop.index0 }}{{ part }}{% else %}none{% endfor %}
{% if n.k > 2 %}{% break %}{% endif %}{% generation %} {{ m.content }} {% set kept = 1 %}
{% endgeneration %}{{ kept is defined }}
{%- filter trim %}  {{ m.content }}\x1c {% endfilter %}{# a comment #}
{% endfor %}{{ n.k }}{% macro one(a, b='B') %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}
{{ one('a') }}{% call one('c', b=n.k) %}inside{% endcall %}
"""


LOOPS = """{% macro who(x) %}{{ x }}{{ m is defined }}{{ later is defined }}{% endmacro %}
{% for m in messages %}{{ later is defined }}{% set later = m.role %}[{{ who(later) }}
{%- for c in m.content %}{{ c }}{% if loop.index == 3 %}{{ later }}{% break %}{% endif %}!
{%- if c == 'a' %}A{% continue %}{% endif %}{% if c == 'b' %}{% set hidden = 1 %}{% endif %}
{%- endfor %}{{ hidden is defined }}]{% if loop.index0 > 1 %}stop{% break %}{% endif %}
{%- for x in nothing %}x{% else %}{{ loop.index }}{{ loop.length }}{% endfor %}
{%- for x in [1, 2] %}{% continue %}{% else %}none whole{% endfor %}
{%- for k, v in m.items() %}{{ k }}:{{ v | length }};{% endfor %}{% for k in m %}{{ k }}{% endfor %}
{%- if loop.previtem is defined %}<{{ loop.previtem.role }}{% endif %}{{ loop.revindex }}
{%- endfor %}{{ later is defined }}{{ loop is defined }}"""


def test_templates_mean_what_they_mean_in_python(node, jinja):
    chats = [[("user", said)] for said in SAID] + [[("system", "s"), ("user", "🙂")], TALK]
    sources = ["{% set x = messages[0].content %}{{ " + each + " }}" for each in EXPRESSIONS]
    statements = [STATEMENTS, STATEMENTS.replace("\n", "\r\n"), LOOPS]
    templates = [template_of(source) for source in [*sources, *statements]]
    made = rendered_in_page(node, templates, chats)
    both = [(chat, reply) for chat in chats for reply in (True, False)]
    wrong = []
    for name, template, (got, _) in zip([*EXPRESSIONS, *statements], templates, made, strict=True):
        wanted = [encoded(template, *each) for each in both]
        for each, ids, want in zip(both, got, wanted, strict=True):
            rejects = isinstance(ids, str) and "\n" not in ids
            if ids != want and not (rejects and (isinstance(want, str) or name in ONLY_PYTHON)):
                wrong.append((name, each, decoded(template, ids), decoded(template, want)))
    assert not wrong


def decoded(template, ids):
    """What shows a difference."""
    return ids if isinstance(ids, str) else template.tokenizer.decode(ids, False)


GUARDED = {
    "looks": "{{ 'x' if messages[0].content == '</s>' else messages[0].content }}",
    "upper": "{{ messages[0].content | upper }}<|end|>",
    "joins": "<|im_end{{ messages[0].content }}{{ messages[0].content | replace('-', '') }}<|end|>",
    "needs": "{{ messages[0].content if '<' in messages[0].content else raise_exception('no') }}",
    "begins": "{{ messages[0].content if messages[0].content.startswith('end') }}<|end|>",
    "length": "{{ messages[0].content | length }}{{ messages[0].content }}</s>",
}
QUESTIONS = ["</s>", "|>", "<|im_-end|>", "<|im_end|>x", "end < it > é", "for<|end|>the"]
QUESTIONS += ["".join(map(chr, range(0xF0000, 0xF0040))) + "</s>", "\U00100000<|end|>"]
QUESTIONS += ["<|end|>" * 3, "[INST]</s>"]


def test_special_tokens_in_messages_are_text_as_in_python(node, jinja, tmp_path):
    """Or the chat is rejected. Of a tokenizer.json, also if only its settings call a token special
    and if another stands for unknown text, and of a vocab.txt."""
    lines = [*byte_alphabet(), EOS_TOKEN, "<|im_start|>", "<|im_end|>", "<|end|>", "</s>", "for"]
    (tmp_path / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text(SHAPES["ChatML"], encoding="utf-8")
    library = Tokenizer.from_str(KINDS["byte_bpe"])
    library.add_tokens(["for"])
    library.add_special_tokens([AddedToken("<|x|>", lstrip=True, rstrip=True), "  "])
    unknown = json.loads(library.to_str())
    unknown["model"]["unk_token"] = "<unk>"
    names = {**NAMES, "mask_token": "for", "image_token": "nowhere"}
    templates = [template_of(text) for text in GUARDED.values()]
    templates += [template_of(text, json.dumps(unknown), names) for text in GUARDED.values()]
    templates += [template_of("{{ bos_token }} {{ messages[0].content }} <|x|> ", library.to_str())]
    own = SimpleTokenizer(tmp_path / "vocab.txt")
    templates += [ChatTemplate(own)]
    chats = [[("user", said)] for said in [*QUESTIONS, "<unk>", "for <|x|> a", " <|x|>  <|x|>"]]
    made = rendered_in_page(node, templates, chats)
    both = [(chat, reply) for chat in chats for reply in (True, False)]
    rejected = 0
    for template, (got, end) in zip(templates, made, strict=True):
        assert end == template.turn_end
        for each, ids in zip(both, got, strict=True):
            want = encoded(template, *each)
            assert ids == want, (template.template, each, decoded(template, ids), want)
            rejected += isinstance(want, str)
    assert rejected


def test_a_chat_that_the_page_cannot_write_is_an_error_of_a_line(node, jinja):
    broken = template_of(SHAPES["ChatML"])
    broken.tokenizer.chat_template = "{% if %}"
    [[said, _]] = rendered_in_page(node, [broken], [])
    problem, remedy = "the model's chat template cannot be read", "export the model with another"
    assert re.fullmatch(rf"chat: {problem} \(.+\); {remedy}", said)
    given = [{**record_of(broken.tokenizer), "template": SHAPES["ChatML"], "names": {}}]
    given[0]["chats"] = [
        [[{"role": "tool", "content": "a"}]],
        [[{"role": "user", "content": "a"}, {"role": "user", "content": None}]],
    ]
    [[got, _]] = node(CHAT, given)
    assert got == [
        "messages.0.role: is not system, developer, user or assistant; pass one of them",
        "messages.1.content: is not a text; pass one",
    ]


def test_the_time_is_written_as_in_python(node, jinja):
    """In English, whatever the language of the browser; a code that is not known is an error."""
    times = [datetime.datetime(2024, 2, 9, 0, 5, 7), datetime.datetime(2031, 12, 31, 12, 59, 0)]
    codes = ["%Y-%m-%d %H:%M:%S", "%d %b %Y", "%A, %B %d, %y %I:%M %p %a%%", "%e %Q"]
    body = """
    const Now = Date, made = [];
    for (const time of given.times) {
      globalThis.Date = class extends Now { constructor() { super(time); } };
      const tokenizer = new Tokenizer(given.content);
      for (const code of given.codes) {
        const source = `{{ strftime_now('${code}') }}`;
        const chat = await ChatTemplate.open(tokenizer, source);
        made.push(await told(() => tokenizer.decode(chat.encode([]))));
      }
    }
    return made;
    """
    given = {"content": byte_tokenizer().to_str(), "codes": codes}
    given["times"] = [time.strftime("%Y-%m-%dT%H:%M:%S") for time in times]
    got = node(body, given)
    unknown = "messages: the chat template rejects them (strftime_now: %Q is not known)"
    known = [[*(time.strftime(code) for code in codes[:-1]), unknown] for time in times]
    assert got == sum(known, [])
