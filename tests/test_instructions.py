"""Questions about Python's library: what is asked, of whom, and how answers are scored."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, flags, run_main, tiny_config, train_bpe

from benchmarks import assistant
from data import instructions, prepare
from data.sides import Split
from testv2 import TinyMambaModel
from tinymamba import documents
from tinymamba.checkpoint import save_model
from tinymamba.documents import Corpus, Reading
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer

CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

SHAPES = '''"""Shapes."""


def area(width, height=1):
    """Return the area
    of a rectangle.

    Both sides count.
    """
    # A square has one side.
    return width * height


class Circle:
    """A circle."""

    @classmethod
    def of(cls, radius, *, unit="m"):
        """Make a circle of a radius."""
        return cls(radius)

    @property
    def size(self):
        """Give the size of it."""
        return 1

    def __len__(self):
        """Give the number of its corners."""
        return 0

    def text(self):
        """Write it as text that cutting would change."""
        return """
    o"""


def later(x):
    """Do nothing for now, but tell so."""
    raise NotImplementedError


def listed(x):
    """listed(x) -> a list"""
    return [x]


def outer():
    def inner():
        """Stay inside of another one."""
        return 1

    return inner
'''

ROWS = {  # task and function: question, answer, signature
    ("body", "area"): (
        "Write the function `area` of `shapes`.\n\ndef area(width, height=1):\n"
        '    """Return the area\n    of a rectangle."""',
        "# A square has one side.\nreturn width * height",
    ),
    ("docstring", "area"): (
        "What is `shapes.area(width, height=1)` for?",
        "Return the area of a rectangle.",
    ),
    ("name", "area"): (
        "Return the area of a rectangle. Which function of `shapes` is that?",
        "`shapes.area`",
    ),
    ("body", "Circle.of"): (
        "Complete this method of `shapes.Circle`.\n\n@classmethod\n"
        'def of(cls, radius, *, unit="m"):\n    """Make a circle of a radius."""',
        "return cls(radius)",
    ),
    ("docstring", "Circle.of"): (
        "Write a docstring for `shapes.Circle.of(radius, *, unit='m')`.",
        "Make a circle of a radius.",
    ),
    ("name", "Circle.of"): (
        "Which method of `shapes.Circle` does this? Make a circle of a radius.",
        "`shapes.Circle.of`",
    ),
    ("body", "Circle.__len__"): (
        "Please implement `__len__` of `shapes.Circle`.\n\ndef __len__(self):\n"
        '    """Give the number of its corners."""',
        "return 0",
    ),
}


def read_rows(path: Path) -> list[dict]:
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    return [json.loads(line) for line in lines]


def make(folder: Path, *words) -> dict[str, list[dict]]:
    """The rows of each side that the command writes to a folder."""
    done = run_main(instructions.main, *words, *flags(output_dir=folder))
    assert done.returncode == 0, done.stderr
    return {path.stem: read_rows(path) for path in folder.glob("*.jsonl")}


def texts_of(row: dict) -> tuple[str, str]:
    """The question and the answer."""
    user, answer = row["messages"]
    assert (user["role"], answer["role"]) == ("user", "assistant")
    return user["content"], answer["content"]


@pytest.fixture(scope="module")
def sample():
    """A third of the files of Python's own library, in the place of all."""
    files = Corpus(None, Reading(), []).files[::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "sample_files", lambda _: files)
        yield


@pytest.fixture(scope="module")
def library(sample, tmp_path_factory) -> dict[str, list[dict]]:
    """The rows of that library."""
    return make(tmp_path_factory.mktemp("library"))


@pytest.fixture
def package(tmp_path) -> Path:
    """A folder of Python files, enough for both sides."""
    folder = tmp_path / "package"
    folder.mkdir()
    for i in range(60):
        code = f'def number{i}(x):\n    """Add {i} to a number."""\n    return x + {i}\n'
        (folder / f"m{i}.py").write_text(code)
    return folder


# --------------------------------------------------------------------------------------- rows


def test_the_rows_of_a_package(tmp_path):
    (tmp_path / "shapes.py").write_text(SHAPES)
    rows = make(tmp_path / "out", *flags(folder=tmp_path, val_fraction=0))
    assert rows.keys() == {"train"}
    found = {(r["task"], r["function"].removeprefix("shapes.")): texts_of(r) for r in rows["train"]}
    assert found == ROWS and len(rows["train"]) == len(ROWS)
    signatures = {row["function"]: row["signature"] for row in rows["train"]}
    assert signatures["shapes.Circle.of"] == '@classmethod\ndef of(cls, radius, *, unit="m"):'


def test_a_function_is_on_the_side_that_prepare_gives_its_file(library):
    corpus = Corpus(None, Reading(), [])
    source = prepare.Source(corpus, Split(prepare.Options.val_fraction, EOS_TOKEN).survey(corpus))
    texts = {"train": set(), "val": set()}
    for side, parts, *_ in source.texts("reading"):
        texts[side].add("".join(parts))
    asked = {side: {row["function"] for row in rows} for side, rows in library.items()}
    for document in corpus.documents():
        text = "".join(document.parts)
        found = instructions.functions_of(instructions.module_name(document.key), text)
        names = {function.dotted for function in found}
        for side in ("train", "val"):
            assert not names & asked[side] or text in texts[side], document.place


def test_nothing_of_val_is_in_train(library):
    def contents(side: str, task: str) -> set[str]:
        where = {"body": 1, "docstring": 1, "name": 0}[task]
        return {texts_of(row)[where] for row in library[side] if row["task"] == task}

    for task in instructions.WORDINGS:
        assert contents("val", task) and not contents("val", task) & contents("train", task)
    functions = {side: {row["function"] for row in rows} for side, rows in library.items()}
    assert not functions["train"] & functions["val"]


def test_a_copied_function_is_not_in_val(package, tmp_path):
    rows = make(tmp_path / "out", *flags(folder=package))
    [first, *_] = [row["function"] for row in rows["val"]]
    [train, *_] = [row["function"] for row in rows["train"]]
    copy, original = (package / f"{name.partition('.')[0]}.py" for name in (first, train))
    copy.write_text(copy.read_text() + "\n\n" + original.read_text())
    again = make(tmp_path / "again", *flags(folder=package))
    assert {"train": again["train"], "val": again["val"]} == rows


def test_bodies_parse_after_their_signatures(library):
    rows = [row for side in library.values() for row in side if row["task"] == "body"]
    assert len(rows) > 500
    for row in rows:
        [function] = ast.parse(instructions.with_body(row["signature"], texts_of(row)[1])).body
        assert function.name == row["function"].rpartition(".")[2]


def test_rows_keep_the_limits_and_are_there_once(library, sample, tmp_path):
    small = make(tmp_path, *flags(max_question_bytes=100, max_answer_bytes=60))
    limits = {"default": (360, 320), "small": (100, 60)}
    for name, sides in {"default": library, "small": small}.items():
        pairs = [texts_of(row) for rows in sides.values() for row in rows]
        longest = tuple(
            max(len(text.encode()) for text in texts) for texts in zip(*pairs, strict=True)
        )
        assert all(0.8 * limit < n <= limit for n, limit in zip(longest, limits[name], strict=True))
        assert len({question for question, _ in pairs}) == len(pairs)


def test_every_wording_is_used(library):
    for task, wordings in instructions.WORDINGS.items():
        asked = [texts_of(row)[0] for row in library["train"] if row["task"] == task]
        for wording in wordings:
            fixed = max(re.split(r"\{\w+\}", wording), key=len)
            assert 0.1 < sum(fixed in question for question in asked) / len(asked) < 0.7, wording


def test_a_second_run_writes_the_same_bytes(package, tmp_path):
    folder = package / "out"  # inside of what is read
    make(folder, *flags(folder=package))
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert first.keys() == {"train.jsonl", "val.jsonl"}
    make(folder, "--force", *flags(folder=package))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    make(folder, "--force", *flags(folder=package, val_fraction=0))
    assert not (folder / "val.jsonl").exists()


def test_bad_words_are_one_line(package, tmp_path):
    out = flags(output_dir=tmp_path / "out")

    def run(*words):
        return run_main(instructions.main, *out, *words)

    assert_refused(run(*flags(folder="nowhere")), "nowhere: no such file or folder")
    assert_refused(run(*flags(folder=package, max_answer_bytes=2)), "nothing is left")
    assert not (tmp_path / "out").exists()
    assert run(*flags(folder=package)).returncode == 0
    assert_refused(run(*flags(folder=package)), "train.jsonl: exists", "--force")
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.py").write_text(SHAPES)
    assert_refused(run("--force", *flags(folder=tmp_path / "few")), "--folder", "too few files")
    (tmp_path / "few" / "old.py").write_text("print 'two'\n")
    done = run("--force", *flags(folder=tmp_path / "few", val_fraction=0))
    assert done.returncode == 0 and "old.py" in done.stdout


# ------------------------------------------------------------------------------------ the score


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> SimpleTokenizer:
    """A small tokenizer with the ChatML template."""
    folder = tmp_path_factory.mktemp("chatml")
    train_bpe(EOS_TOKEN, "<|im_start|>", "<|im_end|>").save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS_TOKEN}))
    return SimpleTokenizer(folder / "tokenizer.json")


class Scripted(torch.nn.Module):
    """A model that writes for each prompt what `script` says."""

    def __init__(self, tokenizer: SimpleTokenizer, script: dict[tuple[int, ...], list[int]]):
        super().__init__()
        self.tokenizer, self.script = tokenizer.to_dict(), script

    def init_state(self, rows):
        return []

    def advance(self, ids, state, last_only):
        state = state or [None, *self.script[tuple(ids[0].tolist())]]
        logits = torch.nn.functional.one_hot(torch.tensor([[state[1]]]), 400).float()
        return logits, state[1:]


def write_questions(folder: Path) -> Path:
    """The rows of ROWS as a file of --data."""
    (folder / "package").mkdir()
    (folder / "package" / "shapes.py").write_text(SHAPES)
    make(folder / "out", *flags(folder=folder / "package", val_fraction=0))
    return folder / "out" / "train.jsonl"


ANSWERS = {  # task and function: the answer, whether it solves the task
    ("body", "area"): ("return 2 * width<|im_end|>", True),
    ("body", "Circle.of"): ("return cls(radius", False),
    ("body", "Circle.__len__"): ("  return 0\n\nprint(1)<|endoftext|>", False),
    ("name", "area"): ("`shapes.area`<|im_end|>", True),
    ("name", "Circle.of"): ("`shapes.Circle.off`<|im_end|>", False),
}


def test_the_score_of_a_scripted_model(chatml, tmp_path, monkeypatch):
    script = {}
    for key, (answer, _) in ANSWERS.items():
        prompt = f"<|im_start|>user\n{ROWS[key][0]}<|im_end|>\n<|im_start|>assistant\n"
        asked = tuple(chatml.encode(prompt, allow_special=True))
        script[asked] = [*chatml.encode(answer, allow_special=True), *chatml.encode("," * 400)]
    monkeypatch.setattr(assistant, "load_model", lambda path: Scripted(chatml, script))
    data = write_questions(tmp_path)
    words = flags(checkpoints=["a", "b", "a"], data=data, max_tokens=64, answers="answers.jsonl")
    done = run_main(assistant.main, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "assistant.jsonl")
    assert [(row["checkpoint"], row["task"]) for row in rows] == [
        (name, task) for name in "ab" for task in ("body", "name")
    ]
    body, name = rows[:2]
    assert (body["questions"], body["parses"], body["exact"], body["ended"]) == (
        3,
        0.3333,
        0,
        0.6667,
    )
    assert (name["questions"], name["right"], name["exact"], name["ended"]) == (2, 0.5, 0.5, 1)
    written = {row["question"]: row for row in read_rows(tmp_path / "answers.jsonl")}
    for key, (_, solved) in ANSWERS.items():
        assert written[ROWS[key][0]]["solved"] is solved
        assert written[ROWS[key][0]]["library"] == ROWS[key][1]
    table = done.stdout.splitlines()[-7:]
    assert table[0].split() == ["a", "b"] and table[1].split() == [
        "body",
        "parses",
        "33.3%",
        "33.3%",
    ]


def test_a_model_without_a_template_ends_before_the_next_user(chatml, monkeypatch):
    plain = SimpleTokenizer.from_dict({**chatml.to_dict(), "chat_template": None})
    prompt = tuple(plain.encode("user: Who?\n\nassistant:"))
    script = {prompt: plain.encode(" I.\n\nuser: And who else?")}
    monkeypatch.setattr(assistant, "load_model", lambda path: Scripted(plain, script))
    answer = assistant.Assistant("a").answer("Who?", 20)
    assert (answer.text, answer.ended, answer.tokens) == (" I.", True, 20)


@pytest.mark.parametrize(
    ("answer", "parses"),
    [
        ("return 1", True),
        ("x = 1\n\nif x:\n  return x\n", True),
        ("", False),
        ("return (1", False),
        ("  return 1\nprint(2)", False),
        ("return '\x00'", False),
        ("return " + "(" * 5000, False),
    ],
)
def test_an_answer_parses_as_the_body_alone(answer, parses):
    question = assistant.Question("body", "?", "", "m.f", "def f():")
    assert question.is_solved_by(answer) is parses


@pytest.mark.parametrize(
    ("answer", "right"),
    [("`m.C.f`", True), ("m.C.f()", True), ("`f`.", True), (" f\n", True), ("g", False),
     ("m.f", False), ("`m.C.f` or `m.C.g`", False), ("", False)],
)  # fmt: skip
def test_a_name_is_right_alone_or_with_its_module(answer, right):
    question = assistant.Question("name", "?", "`m.C.f`", "m.C.f", "def f():")
    assert question.is_solved_by(answer) is right


def test_a_row_may_hold_any_character(tmp_path):
    """JSON leaves some line breaks of Unicode as they are."""
    messages = [{"role": "user", "content": "a\u2028b"}, {"role": "assistant", "content": "c\x85"}]
    rows = [{"messages": messages, "task": task, "function": "m.f", "signature": "def f():"}
            for task in assistant.TASKS]  # fmt: skip
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
    asked = assistant.read_questions(str(tmp_path / "rows.jsonl"), 9)
    assert [(q.text, q.answer) for q in asked] == [("a\u2028b", "c\x85")] * 2


def test_a_template_that_cannot_be_read_is_one_line(chatml, tmp_path):
    broken = SimpleTokenizer.from_dict({**chatml.to_dict(), "chat_template": "{% for"})
    model = TinyMambaModel(tiny_config(vocab_size=400))
    model.tokenizer = broken.to_dict()
    save_model(tmp_path / "a.pt", model)
    words = flags(checkpoints="a.pt", data=write_questions(tmp_path))
    done = run_main(assistant.main, *words, cwd=tmp_path)
    assert_refused(done, "a.pt: the model's chat template cannot be read")


def test_models_before_and_after_are_asked_in_their_own_way(chatml, tmp_path):
    """The first has no template, the second has ChatML."""
    plain = SimpleTokenizer.from_dict({**chatml.to_dict(), "chat_template": None})
    for name, tokenizer in (("before", plain), ("after", chatml)):
        model = TinyMambaModel(tiny_config(vocab_size=400))
        model.tokenizer = tokenizer.to_dict()
        save_model(tmp_path / f"{name}.pt", model)
    words = flags(checkpoints=["before.pt", "after.pt"], data=write_questions(tmp_path))
    done = run_main(assistant.main, *words, *flags(max_tokens=4, rows=1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "assistant.jsonl")
    assert [row["questions"] for row in rows] == [1] * 4
    assert all(0 < row["tokens"] <= 4 for row in rows)
    before, after = (assistant.Assistant(str(tmp_path / f"{n}.pt")) for n in ("before", "after"))
    assert before.template.template is None and after.template.template == CHATML
    assert before.ends == {0} and after.ends == {0, 2}


def test_the_score_refuses_bad_words(tmp_path):
    def run(*words):
        return run_main(assistant.main, *words, cwd=tmp_path)

    assert_refused(run(), "--checkpoints: names none")
    assert_refused(run(*flags(checkpoints="a.pt")), "val.jsonl: no such file", "data.instructions")
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    words = flags(checkpoints="a.pt", data="rows.jsonl")
    assert_refused(run(*words), "rows.jsonl:1: is no question")
    data = write_questions(tmp_path)
    assert_refused(run(*flags(checkpoints="a.pt", data=data)), "a.pt: no such checkpoint")
