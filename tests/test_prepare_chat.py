"""data/prepare.py --chat: conversations and preferences as ids, masks and indices."""

import gzip
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from helpers import POSIX, assert_refused, examples, killed_before, run_main, run_script, train_bpe
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from data import chat, encoding, prepare, unfinished
from data.chat import CHATML, ConversationEncoder, add_template
from tinymamba.chat_eval import find_questions
from tinymamba.chat_rows import ConversationRows, Row
from tinymamba.chat_template import ChatTemplate
from tinymamba.cli import UserError
from tinymamba.openai_api import Message
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, byte_tokenizer

PreTrainedTokenizerFast = pytest.importorskip("transformers").PreTrainedTokenizerFast

EOS, START, END = 256, 257, 258  # of bytes with ChatML
FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt"}
OF_SIDE = {"bin", "mask.bin", "index.bin", "json"}
MARKED = CHATML.replace(
    "message['content'] + '<|im_end|>\\n' }}",
    "'' }}{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
    "{%- endgeneration %}{{ '\\n' }}{% else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}",
)
LLAMA_2 = """{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content }}
{{- ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"""
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
PLAIN += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")


def turns(*contents, system=None):
    """Messages of a user and an assistant in turn."""
    roles = [("user", "assistant")[i % 2] for i in range(len(contents))]
    before = [{"role": "system", "content": system}] if system else []
    pairs = zip(roles, contents, strict=True)
    return before + [{"role": role, "content": content} for role, content in pairs]


CHATS = [
    turns("Hello", "Hi."),
    turns("Grüße aus Köln", "日本語 🙂", "And\n\nnow?", "  two  spaces\n"),
    turns("a", "b", "c", "d", "e", "f", system="Be kind.\nÀ bientôt"),
    turns("It ends with a question", "yes", "why?"),
    turns("a < b", "<think>\n1\n</think>\n\n1 | 2"),
]
ROWS = [{"messages": each} for each in CHATS]


def many(count=30):
    return [{"messages": turns(f"What is {i} + 1?", f"{i + 1}, é.")} for i in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder, rows, *flags):
    """The command on a.jsonl with bytes as tokens; what it wrote."""
    write(folder / "a.jsonl", rows)
    return run_again(folder, *flags)


def run_again(folder, *flags):
    done = run_main(
        prepare.main, *f"--chat a.jsonl --tokenizer byte --output_dir out --force {COMMON}".split(),
        *flags, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Prepared(folder / "out")


COMMON = "--val_fraction 0 --workers 1"


class Prepared:
    """What a run left in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.tokenizer = SimpleTokenizer(folder / "tokenizer.json")

    def facts(self, side="train"):
        return json.loads((self.folder / f"{side}.json").read_text())

    def conversations(self, side="train"):
        """The ids and the mask of each, after a check of all that the files say of each other."""
        facts = self.facts(side)
        ids = np.fromfile(self.folder / f"{side}.bin", facts["dtype"])
        packed = np.fromfile(self.folder / f"{side}.mask.bin", np.uint8)
        index = np.fromfile(self.folder / f"{side}.index.bin", np.int64)
        mask = np.unpackbits(packed, bitorder="little")
        assert len(packed) == -(-len(ids) // 8) and not mask[len(ids) :].any()
        assert index[0] == 0 and index[-1] == len(ids) == facts["tokens"]
        assert (np.diff(index) > 0).all() and len(index) == facts["conversations"] + 1
        assert facts["counted"] == mask.sum() > 0
        bounds = zip(index, index[1:], strict=False)
        return [(ids[a:b].tolist(), mask[a:b].tolist()) for a, b in bounds]

    def counted(self, ids, mask):
        """The text of the tokens that count."""
        return self.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], False)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


# ---------------------------------------------------------------------------- ids and masks


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a learned tokenizer, which has no template."""
    folder = tmp_path_factory.mktemp("learned")
    bpe = train_bpe(EOS_TOKEN)
    bpe.add_tokens(["\n\n"])
    bpe.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", ["byte", "learned"])
def test_ids_and_mask_are_those_of_transformers(tmp_path, learned, kind):
    (tmp_path / "t.jinja").write_text(MARKED)
    flags = ["--tokenizer", learned if kind == "learned" else "byte"]
    made = run(tmp_path, ROWS, *flags, "--chat_template", "t.jinja")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(made.folder / "tokenizer.json"))
    how = {"return_assistant_tokens_mask": True, "return_dict": True, "chat_template": MARKED}
    for row, (ids, mask) in zip(ROWS, made.conversations(), strict=True):
        expected = theirs.apply_chat_template(row["messages"], **how)
        assert ids == [*expected["input_ids"], made.tokenizer.eos_token_id]
        assert mask == [*expected["assistant_masks"], 0]
    before = contents(made.folder)
    after = contents(run(tmp_path, ROWS, *flags).folder)  # ChatML, by the prompts of each answer
    assert {n for n in after if before[n] != after[n]} == {"chat_template.jinja"}


def test_the_tokens_of_one_conversation(tmp_path):
    """Written out: header, content and end of each turn, then the end of the text."""
    ids, mask = run(tmp_path, [{"messages": turns("q", "ab", "r", "<|im_end|>c")}]).conversations()[
        0
    ]
    parts = [
        ([START, *b"user\nq", END, *b"\n", START, *b"assistant\n"], 0),
        ([*b"ab", END], 1),
        ([*b"\n", START, *b"user\nr", END, *b"\n", START, *b"assistant\n"], 0),
        ([*b"<|im_end|>c", END], 1),
        ([*b"\n", EOS], 0),
    ]
    alphabet = SimpleTokenizer()
    expected = [i if i > 255 else alphabet.encode(chr(i))[0] for part, _ in parts for i in part]
    assert ids == expected
    assert mask == [counts for part, counts in parts for _ in part]


def test_train_on_all_leaves_out_the_first_token_alone(tmp_path):
    some, every = (run(tmp_path, ROWS, "--train_on", who) for who in ("assistant", "all"))
    assert all(mask == [0] + [1] * (len(ids) - 1) for ids, mask in every.conversations())


def test_every_file_is_there_and_the_facts_are_true(tmp_path):
    made = run(tmp_path, many(), "--val_fraction", "0.2")
    names = {f"{side}.{suffix}" for side in ("train", "val") for suffix in OF_SIDE}
    assert contents(made.folder).keys() == names | FILES
    both = [made.conversations(side) for side in ("train", "val")]
    assert len(both[0]) + len(both[1]) == 30 and len(both[1]) == 6
    said = [made.counted(*each) for side in both for each in side]
    assert sorted(said) == sorted(f"{i + 1}, é.<|im_end|>" for i in range(30))
    facts = made.facts()
    assert facts["kind"] == "chat" and facts["tokenizer"] == made.tokenizer.sha256
    assert (facts["eos_id"], facts["vocab_size"]) == (EOS, 259)
    shown = (made.folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert shown[EOS:] == [EOS_TOKEN, "<|im_start|>", "<|im_end|>"]


def test_the_server_and_transformers_read_the_folder(tmp_path):
    made = run(tmp_path, ROWS)
    template = ChatTemplate(made.tokenizer)
    assert template.turn_end == END
    theirs = PreTrainedTokenizerFast.from_pretrained(made.folder)
    assert theirs.eos_token_id == EOS
    for row, (ids, _) in zip(ROWS, made.conversations(), strict=True):
        messages = [Message(**m) for m in row["messages"]]
        assert template.encode(messages, reply=False) == ids[:-1]
        prompt = template.encode(messages[:1])
        asked = theirs.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
        assert prompt == asked["input_ids"]


def test_the_token_that_ends_a_text_is_not_written_twice(tmp_path):
    """Llama 2's template: eos ends each answer, and counts."""
    (tmp_path / "t.jinja").write_text(LLAMA_2)
    flags = "--chat_template", "t.jinja"
    made = run(tmp_path, [{"messages": turns("q", "a", "r", "b")}], *flags)
    ((ids, mask),) = made.conversations()
    assert made.counted(ids, mask) == f" a {EOS_TOKEN} b {EOS_TOKEN}"
    assert ids[-1] == EOS != ids[-2] and ChatTemplate(made.tokenizer).turn_end == EOS


def test_without_a_token_for_it_the_end_of_the_text_ends_the_last_answer(tmp_path):
    (tmp_path / "t.jinja").write_text(PLAIN)
    made = run(tmp_path, [{"messages": turns("q", "a", "r", "b")}], "--chat_template", "t.jinja")
    assert made.counted(*made.conversations()[0]) == f"ab\n{EOS_TOKEN}"
    assert ChatTemplate(made.tokenizer).turn_end is None


PIECES = [EOS_TOKEN, "<|im_start|>", "<|im_end|>", "assistant", "\n", " ", "é", "日", "🙂", "<|"]
SAID = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), min_size=1, max_size=5).map("".join)
SAID = SAID.map(lambda text: f"a{text}.")  # neither empty, nor with white space at its ends


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, learned):
    made = []
    for tokenizer in (byte_tokenizer(), Tokenizer.from_file(str(learned / "tokenizer.json"))):
        eos, folder = tokenizer.token_to_id(EOS_TOKEN), tmp_path_factory.mktemp("encoder")
        for name, text in add_template(tokenizer, eos, None, None).items():
            (folder / name).write_text(text)
        tokenizer.save(str(folder / "tokenizer.json"))
        made.append(ConversationEncoder(folder, eos, "int32", "assistant"))
    return made


@given(st.lists(SAID, min_size=2, max_size=6), st.none() | SAID)
@examples(40)
def test_what_counts_are_the_answers(encoders, said, system):
    messages = turns(*said, system=system)
    for encoder in encoders:
        tokenizer = encoder.template.tokenizer
        ids, mask = encoder.encode("a.jsonl:1", messages, last_only=False)
        ends = np.flatnonzero(np.diff(mask.astype(int), append=0) == -1) + 1
        begins = np.flatnonzero(np.diff(mask.astype(int), prepend=0) == 1)
        answers = [ids[a:b] for a, b in zip(begins, ends, strict=True)]
        assert {answer[-1] for answer in answers} == {encoder.template.turn_end}
        assert [tokenizer.decode(answer[:-1], False) for answer in answers] == said[1::2]
        sent = [Message(**m) for m in messages]
        assert ids == [*encoder.template.encode(sent, reply=False), encoder.eos]
        for i, begin in enumerate(begins):  # the server would have been given just this
            first = 2 * i + 1 + (system is not None)
            assert encoder.template.encode(sent[:first]) == ids[:begin]


# --------------------------------------------------------------------------------- tokenizers


def test_bpe_learns_from_what_is_said_and_then_gets_the_special_tokens(tmp_path):
    rows = [{"messages": turns("to be or not", f"to bee {i % 3}")} for i in range(20)]
    made = run(tmp_path, rows, "--tokenizer", "bpe", "--vocab_size", 265)
    assert len(made.tokenizer) == made.facts()["vocab_size"] == 267
    added = [made.tokenizer.library.token_to_id(f"<|im_{n}|>") for n in ("start", "end")]
    assert added == [265, 266]
    said = [
        {"text": content} for row in rows for m in row["messages"] for content in [m["content"]]
    ]
    write(tmp_path / "b.jsonl", said)
    flags = f"--input b.jsonl --vocab_size 265 --output_dir plain {COMMON}".split()
    assert run_main(prepare.main, *flags, cwd=tmp_path).returncode == 0
    plain = json.loads((tmp_path / "plain" / "tokenizer.json").read_text())
    assert json.loads(made.tokenizer.content)["model"] == plain["model"]


def test_a_template_that_comes_with_the_tokenizer_is_used(tmp_path):
    (tmp_path / "t").mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    settings = {"chat_template": LLAMA_2, "eos_token": "</s>", "model_max_length": 9}
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings))
    made = run(tmp_path, ROWS[:1], "--tokenizer", "t")
    assert made.counted(*made.conversations()[0]) == " Hi. </s>"
    assert (made.folder / "chat_template.jinja").read_text() == LLAMA_2
    assert len(made.tokenizer) == 258  # it has all its tokens
    kept = json.loads((made.folder / "tokenizer_config.json").read_text())
    assert kept["eos_token"] == "</s>" and kept["model_max_length"] == 9
    assert "chat_template" not in kept
    (tmp_path / "other.jinja").write_text(CHATML.replace("im_", "say_"))
    made = run(tmp_path, ROWS[:1], "--tokenizer", "t", "--chat_template", "other.jinja")
    assert made.counted(*made.conversations()[0]) == "Hi.<|say_end|>"
    assert made.tokenizer.library.token_to_id("<|say_start|>") == 258
    assert made.tokenizer.chat_template == CHATML.replace("im_", "say_")


# --------------------------------------------------------------------------------------- rows


CHAT = turns("q", "a")
FORMS = {
    "messages": {"messages": CHAT, "id": 7},
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "parts": {"messages": [CHAT[0], {"role": "assistant", "content": [
        {"type": "text", "text": "a"}]}]},
    "Alpaca": {"instruction": "q", "input": "", "output": "a"},
    "prompt": {"prompt": "q", "completion": "a"},
    "prompt of messages": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "columns of other forms": {"messages": CHAT, "instruction": None, "prompt": None},
    "null columns of messages": {"messages": [
        {"role": None, "content": None, "from": "human", "value": "q"},
        {**CHAT[1], "from": None, "value": None}]},
    "no tool calls": {"messages": [CHAT[0], {**CHAT[1], "tool_calls": None, "weight": 1}]},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_row(name):
    assert Row("a", FORMS[name], "strict").conversations() == [CHAT]


def test_forms_with_more_than_a_question():
    both = {"instruction": "q", "input": "r", "output": "a", "system": "s"}
    assert Row("a", both, "strict").conversations() == [turns("q\n\nr", "a", system="s")]
    system = {"system": "s", "conversations": turns("q", "a", system="t")}
    assert Row("a", system, "strict").conversations() == [turns("q", "a", system="t")]


PAIR = [turns("q", "a"), turns("q", "b")]
PAIRS = {
    "whole": {"chosen": PAIR[0], "rejected": PAIR[1]},
    "beside the prompt": {"prompt": "q", "chosen": PAIR[0], "rejected": PAIR[1], "messages": CHAT},
    "text": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "text after messages": {"prompt": PAIR[0][:1], "chosen": "a", "rejected": "b"},
    "answers": {"prompt": PAIR[0][:1], "chosen": PAIR[0][1:], "rejected": PAIR[1][1:]},
    "answers to text": {"prompt": "q", "chosen": PAIR[0][1:], "rejected": PAIR[1][1:]},
    "prompt twice": {"prompt": PAIR[0][:1], "chosen": PAIR[0], "rejected": PAIR[1]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_every_form_of_a_pair(name):
    assert Row("a", PAIRS[name], "strict").conversations() == PAIR


@pytest.mark.parametrize("name", ["CHATML", "MARKED", "LLAMA_2", "PLAIN"])
def test_a_benchmark_scores_what_training_counts(tmp_path, name):
    """Of chats with one answer; an answer within a chat is asked as if it were the last one."""
    (tmp_path / "t.jinja").write_text(globals()[name])
    chats = [turns(f"What is {i}?", f"{i}, é.") for i in range(3)]
    made = run(tmp_path, [{"messages": c} for c in chats], "--chat_template", "t.jinja")
    template = ChatTemplate(made.tokenizer)
    for (ids, mask), messages in zip(made.conversations(), chats, strict=True):
        (asked,) = find_questions(template, messages, EOS)
        begin = mask.index(1)
        assert asked.prompt == ids[:begin]
        assert asked.answer == [i for i, counts in zip(ids, mask, strict=True) if counts]
    assert len(find_questions(template, turns("a", "b", "c", "d"), EOS)) == 2


def test_preferences_alternate_and_only_the_last_answer_counts(tmp_path):
    rows = [
        {"prompt": turns("q", "a", f"r{i}"), "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(9)
    ]
    made = run(tmp_path, rows)
    facts, both = made.facts(), made.conversations()
    assert (facts["kind"], facts["conversations"]) == ("preferences", 18)
    assert facts["bytes"] == 9 * len("qar0" + "good 0" + "bad 0")
    said = [f"{how} {i}<|im_end|>" for i in range(9) for how in ("good", "bad")]
    assert [made.counted(*each) for each in both] == said
    for (ids, mask), (others, _) in zip(both[::2], both[1::2], strict=True):
        begin = mask.index(1)
        assert ids[:begin] == others[:begin] and ids[-1] == EOS


def test_rows_of_every_kind_of_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps({"messages": turns("q", "single")}, indent=1))
    (folder / "b.json").write_text(json.dumps([{"prompt": "q", "completion": "array"}]))
    line = json.dumps({"instruction": "q", "output": "packed"}).encode()
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(line))
    table = pyarrow.Table.from_pylist([{"id": 1, "messages": turns("q", "column")}])
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    with tarfile.open(folder / "e.tar", "w") as archive:
        for name, data in (("README.md", b"about"), ("f.jsonl", line.replace(b"pack", b"arch"))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    flags = f"--chat in --tokenizer byte --output_dir out {COMMON}".split()
    done = run_main(prepare.main, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"text, not a table: 1 \(in/e\.tar/README\.md\)", done.stdout)
    made = Prepared(tmp_path / "out")
    said = [made.counted(*each) for each in made.conversations()]
    answers = ["single", "array", "packed", "column", "arched"]
    assert said == [f"{answer}<|im_end|>" for answer in answers]
    assert "5 conversations" in done.stdout
    flags[1:2] = ["in", "--force", "--strict"]
    assert_refused(run_main(prepare.main, *flags, cwd=tmp_path), "--strict", "README.md")


def test_validation_from_files_of_its_own(tmp_path):
    write(tmp_path / "b.jsonl", many(3))
    made = run(tmp_path, ROWS, "--val_input", "b.jsonl")
    assert len(made.conversations()) == len(ROWS) and len(made.conversations("val")) == 3


def test_equal_rows_fall_on_one_side_whatever_their_form(tmp_path):
    rows = [{"messages": turns(f"q{i % 10}", "a")} for i in range(20)]
    rows += [{"prompt": f"q{i}", "completion": "a"} for i in range(10)]
    made = run(tmp_path, rows, "--val_fraction", 0.3)
    sides = [{tuple(ids) for ids, _ in made.conversations(side)} for side in ("train", "val")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 10


# ------------------------------------------------------------------------------------- errors


def said(**message):
    """A row with one wrong answer."""
    return {"messages": [CHAT[0], {**CHAT[1], **message}]}


OTHER = "--chat_template t.jinja"
ERRORS = {
    "no answer": ({"messages": CHAT[:1]}, "", r"a\.jsonl:2: no turn of assistant; give an answer"),
    "no messages": ({"messages": []}, "", r"a\.jsonl:2: messages is no list of messages; give"),
    "two turns": (
        {"messages": [*CHAT, CHAT[1]]},
        "",
        r":2: turns 2 and 3 are both of assistant; j",
    ),
    "empty": (said(content=" \n"), "", r"a\.jsonl:2: turn 2, of assistant, is empty; remove"),
    "null": (said(content=None), "", r"a\.jsonl:2: turn 2, of assistant, is empty; remove"),
    "number": (said(content=3), "", r":2: messages\.1 is int; make it text"),
    "picture": (said(content=[{"type": "image"}]), "", r"messages\.1 has a part that is no text; "),
    "role": (said(role="bot"), "", r":2: messages\.1 has the role 'bot'; use one of human, gpt"),
    "no role": ({"messages": [{"content": "a"}]}, "", r"messages\.0 has the role 'None'; use"),
    "text": ({"messages": ["q", "a"]}, "", r":2: messages\.0 is no message; give role and"),
    "tool calls": (said(tool_calls=[{"id": "x"}]), "", r"messages\.1 has tool_calls, which is not"),
    "weight": (said(weight=0), "", r"messages\.1 has weight, which is not read; remove"),
    "train": (said(train=False), "", r"messages\.1 has train, which is not read; remove"),
    "tools": ({"messages": CHAT, "tools": [{}]}, "", r":2: has tools, which are not read; remove"),
    "label": (
        {"prompt": "q", "completion": "a", "label": False},
        "",
        r":2: has a label, which is not read; keep the rows whose label is true",
    ),
    "surrogate": (said(content="\ud800"), "", r":2: half a surrogate pair in messages\.1; correct"),
    "form": ({"text": "a"}, "", r"a\.jsonl:2: is no conversation \(keys: 'text'\); give messages,"),
    "no object": (3, "", r"a\.jsonl:2: not a JSON object; give messages,"),
    "null row": (None, "", r"a\.jsonl:2: not a JSON object; give messages,"),
    "other kind": (PAIRS["whole"], "", r":2: a row of preferences after rows of chat; prepare"),
    "text, no prompt": (
        {"chosen": "a", "rejected": "b"},
        "",
        r":2: chosen is text without a prompt",
    ),
    "equal": ({"chosen": CHAT, "rejected": CHAT}, "", r":2: rejected is equal to chosen; remove"),
    "prompts": (
        {"chosen": turns("q", "a"), "rejected": turns("r", "b")},
        "",
        r":2: chosen and rejected differ before the last answer; give both the same prompt",
    ),
    "no last answer": (
        {"chosen": turns("q", "a"), "rejected": turns("q", "b", "c")},
        "",
        r":2: rejected ends with a turn of user; end it with an answer",
    ),
    "cut": (
        said(content="a "),
        OTHER,
        r"a\.jsonl:2: messages\.1\.content: the chat template cuts or changes it; strip it or",
    ),
    "template rejects": (
        {"messages": turns("q", "a", system="s")},
        OTHER,
        r"a\.jsonl:2: the chat template rejects them \(no system\); correct the row, or pass",
    ),
    "no such template": (
        ROWS[0],
        "--chat_template no",
        r"--chat_template: no file no; pass a Jinja",
    ),
    "bad template": (
        ROWS[0],
        "--chat_template bad.jinja",
        r"--chat_template: .* read \(.*\); corr",
    ),
    "not rows": (ROWS[0], "--chat t.jinja", r"--chat: nothing is left for train\.bin; "),
    "damaged": (ROWS[0], "--chat bad.json", r"bad\.json:1: not JSON \(.*\); "),
    "no rows": (ROWS[0], "--chat n.json", r"n\.json.* 1: not a JSON object; give messages,"),
    "two inputs": (ROWS[0], "--input a.jsonl", r"--chat: is given beside --input; leave one out"),
    "text key": (ROWS[0], "--text_key body", r"--text_key: is of text, not of conversations; "),
    "preferences": (
        None,
        "--chat b.jsonl --train_on all",
        r"--train_on: is for chats; leave it out",
    ),
    "who": (ROWS[0], "--train_on user", r"--train_on: user is not a choice; use"),
    "ids": (
        ROWS[0],
        "--tokenizer big --dtype uint16",
        r"--dtype: 65537 tokens do not fit in uint16; use int32",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line(tmp_path, name):
    row, flags, message = ERRORS[name]
    write(tmp_path / "a.jsonl", [ROWS[0], row])
    write(tmp_path / "b.jsonl", [PAIRS["whole"]])
    reject = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (tmp_path / "t.jinja").write_text(reject + TRIMMED)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "bad.json").write_text('{"messages": [}')
    (tmp_path / "n.json").write_text("[1, 2]")
    if name == "ids":
        words = {EOS_TOKEN: 0, **{f"w{i}": i for i in range(1, 65535)}}
        words = Tokenizer(models.WordLevel(words, EOS_TOKEN))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        (tmp_path / "big").mkdir()
        words.save(str(tmp_path / "big" / "tokenizer.json"))
    flags = f"--chat a.jsonl --tokenizer byte {COMMON} {flags}".split()
    done = run_main(prepare.main, *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", done.stderr), done.stderr
    assert not list(tmp_path.glob("data/text/*"))


@pytest.mark.parametrize("package", ["fastapi", "transformers.utils.chat_template_utils"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    write(tmp_path / "a.jsonl", ROWS)
    flags = ["--chat", "a.jsonl", "--tokenizer", "byte", *COMMON.split()]
    name = package.split(".")[0]
    assert_refused(run_main(prepare.main, *flags, cwd=tmp_path), f"{name}: is not installed; pip")


def test_flags_of_conversations_need_conversations(tmp_path):
    for flag in ("--chat_template t", "--train_on all"):
        done = run_main(prepare.main, "--input", "a.txt", *flag.split(), cwd=tmp_path)
        assert_refused(done, f"{flag.split()[0]}: is of conversations; pass --chat too")


def test_a_prompt_must_begin_the_whole_in_text_and_in_ids(tmp_path, learned):
    """As when an earlier answer is shortened, or a tokenizer joins prompt and answer."""
    shortened = CHATML.replace("message['content']", "(message['content'] if loop.last else '')")
    (tmp_path / "t.jinja").write_text(shortened)
    write(tmp_path / "a.jsonl", [ROWS[0]])
    flags = ["--chat", "a.jsonl", "--tokenizer", learned, *COMMON.split()]
    done = run_main(prepare.main, *flags, "--chat_template", "t.jinja", cwd=tmp_path)
    assert_refused(done, "a.jsonl:1: ", "the chat template cuts or changes it")
    later = "{% if loop.last %}{{ '.' }}{% endif %}"
    (tmp_path / "t.jinja").write_text(CHATML.replace("{%- endfor", later + "{%- endfor"))
    done = run_main(prepare.main, *flags, "--chat_template", "t.jinja", cwd=tmp_path)
    assert_refused(done, "a.jsonl:1: ", "prompt of messages.1 in another way than the same turns")
    write(tmp_path / "a.jsonl", [{"messages": turns("q", "\n\nHi")}])
    done = run_main(prepare.main, *flags, cwd=tmp_path)
    assert_refused(
        done, "a.jsonl:1: the tokenizer joins ", "assistant\\n' and '\\n\\nHi", "strip the answer"
    )


def test_the_real_command_and_its_processes_end_with_one_line(tmp_path):
    """The error of another process is that of the row; without it, the files are as from one."""
    write(tmp_path / "a.jsonl", [*many(40), {"messages": turns("q", "a ")}])
    (tmp_path / "t.jinja").write_text(TRIMMED)
    flags = ["--chat", "a.jsonl", "--tokenizer", "byte", "--workers", "2"]
    done = run_script("data/prepare.py", *flags, "--chat_template", "t.jinja", cwd=tmp_path)
    assert_refused(done, "a.jsonl:41: messages.1.content: the chat template cuts or changes it")


# ------------------------------------------------------------- resuming, processes, memory


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Rows that are encoded a few at a time, of which each is saved at once."""
    monkeypatch.setattr(encoding, "BATCH_CHARS", 600)
    monkeypatch.setattr(encoding, "WORKER_CHARS", 600)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", many(12))
    write(tmp_path / "p.jsonl", [
        {"prompt": f"q{i}", "chosen": "a" * i, "rejected": "b"} for i in range(1, 9)
    ])  # fmt: skip
    (tmp_path / "t.jinja").write_text(CHATML)
    return tmp_path


def options(name="a.jsonl", **changes):
    values = {"chat": [name], "tokenizer": "byte", "output_dir": "out", "val_fraction": 0.3}
    return prepare.Options(**{**values, "workers": 1, **changes})


WRITES = [
    (prepare, "sync"), (unfinished, "sync"), (chat, "sync"), (os, "replace"), (Path, "unlink"),
    (ConversationEncoder, "encoded"),
]  # fmt: skip


def run_and_kill(chosen, after):
    """Run until one of its writes, with `killed_before`; the writes, if it ended first."""
    killed = killed_before(lambda: prepare.prepare(chosen), after, WRITES)
    return None if killed else int(Path("writes").read_text())


@POSIX
@pytest.mark.parametrize("name", ["a.jsonl", "p.jsonl"])
def test_a_run_killed_at_any_point_goes_on_to_the_same_bits(corpus, name):
    writes = run_and_kill(options(name, output_dir="whole"), -1)
    files = contents(corpus / "whole")
    assert writes > 80 and len(files) == 12
    for after in [*range(9, writes - 26, 31), *range(writes - 26, writes, 6)]:
        out = f"out{after}"
        assert run_and_kill(options(name, output_dir=out), after) is None
        if contents(corpus / out) != files:
            prepare.prepare(options(name, output_dir=out, resume=True))
        assert contents(corpus / out) == files


@POSIX
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_on": "all"}, "--train_on: all now, but assistant in the run to go on with; "),
        ("template", "--chat_template: is not what it was when the run began; restore it"),
        ("train.mask.bin", "train.mask.bin: has lost what was written; start again"),
        ("train.index.bin", "train.index.bin: has lost what was written; start again"),
    ],
)
def test_a_run_does_not_go_on_with_something_else(corpus, change, message):
    assert run_and_kill(options(chat_template="t.jinja"), 60) is None
    if change == "template":
        (corpus / "t.jinja").write_text(CHATML + " ")
    elif isinstance(change, str):
        (corpus / "out" / ".prepare-unfinished" / change).write_bytes(b"")
    changes = change if isinstance(change, dict) else {}
    with pytest.raises(UserError) as caught:
        prepare.prepare(options(chat_template="t.jinja", resume=True, **changes))
    assert message in str(caught.value)


def test_several_processes_write_the_same(corpus):
    prepare.prepare(options())
    prepare.prepare(options(output_dir="two", workers=2))
    assert contents(corpus / "two") == contents(corpus / "out")


def test_rows_are_read_only_as_far_as_they_are_encoded(corpus, monkeypatch):
    """So memory does not grow with the input."""
    read, encoded, ahead = [], [], []

    def counted(call, calls):
        def act(*args):
            calls.append(1)
            ahead.append(len(read) - len(encoded))
            return call(*args)

        return act

    monkeypatch.setattr(
        ConversationEncoder, "encoded", counted(ConversationEncoder.encoded, encoded)
    )
    monkeypatch.setattr(ConversationRows, "text", counted(ConversationRows.text, read))
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 60.0)
    write(corpus / "a.jsonl", many(60))
    prepare.prepare(options(val_fraction=0.0))
    assert len(read) == len(encoded) == 60 and max(ahead) <= 5


def test_what_an_earlier_run_left_goes_with_force(corpus):
    prepare.prepare(options())
    for name in ("train.mask.bin", "val.index.bin"):
        with pytest.raises(UserError, match="exists; pass --force"):
            prepare.prepare(options())
        assert (corpus / "out" / name).exists()
    (corpus / "a.txt").write_text("one two three\n" * 50)
    text = prepare.Options(input=["a.txt"], tokenizer="byte", output_dir="out", force=True)
    prepare.prepare(text)
    assert {name.split(".", 1)[1] for name in contents(corpus / "out")} == {"bin", "json", "txt"}


def test_an_old_preparation_of_text_has_the_same_options():
    """A run begun before there was --chat can go on."""
    assert not {"chat", "chat_template", "train_on"} & prepare.Options().deciding().keys()
