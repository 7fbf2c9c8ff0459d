"""Questions about Python's own library, with their answers, for fine-tuning a model to a chat.

    python -m data.instructions
    python -m data.instructions --folder src/ --output_dir ./data/mine --max_answer_bytes 600

Writes train.jsonl and val.jsonl, which `data/prepare.py --chat` reads. A row has `messages`, its
`task`, and the dotted name and the signature of the `function` that it is about. The tasks are:

    body        signature and docstring -> the body of the function, from column 0
    docstring   the name with its parameters -> the first paragraph of the docstring
    name        the first paragraph of the docstring -> the name

A function is on the side of its file, which is the side that `data/prepare.py` gives the file: a
model that was trained on the sample corpus has never seen a function of val.jsonl. What stands in
train.jsonl too, such as a copied helper, is not in val.jsonl. The same version of Python gives the
same bytes.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from data.sides import Split, hash_fraction
from tinymamba.cli import UserError, parse_flags, require, run_cli, say
from tinymamba.documents import Corpus, Reading
from tinymamba.tokenizer import EOS_TOKEN

Node = ast.FunctionDef | ast.AsyncFunctionDef
INDENT = "    "
SIDES = ("train", "val")
DECORATORS = {"staticmethod", "classmethod", "contextmanager"}  # others may change the call
WORDINGS = {
    "body": (
        "Write the {kind} `{name}` of `{owner}`.",
        "Complete this {kind} of `{owner}`.",
        "What is the body of `{owner}.{name}`?",
        "Please implement `{name}` of `{owner}`.",
    ),
    "docstring": (
        "What does `{call}` do?",
        "What is `{call}` for?",
        "Describe the {kind} `{call}`.",
        "Write a docstring for `{call}`.",
    ),
    "name": (
        "Which {kind} of `{owner}` does this? {summary}",
        "What is the name of this {kind} of `{owner}`? {summary}",
        "I am looking for a {kind} of `{owner}`. {summary}",
        "{summary} Which {kind} of `{owner}` is that?",
    ),
}


@dataclass
class Options:
    """The command line."""

    # Input
    folder: str | None = None  # folder of Python files [Python's own library]
    val_fraction: float = 0.05  # share of validation, as in data/prepare.py; 0 writes no val.jsonl
    # Rows
    max_question_bytes: int = 360  # longer questions are left out
    max_answer_bytes: int = 320  # longer answers are left out
    # Output
    output_dir: str = "./data/assistant"  # folder for the files written
    force: bool = False  # replace files that exist

    LIMITS: ClassVar = {
        "val_fraction": (0, 0.5),
        "max_question_bytes": (1, 1 << 20),
        "max_answer_bytes": (1, 1 << 20),
    }

    def sides(self) -> tuple[str, ...]:
        """The sides that are written."""
        return SIDES if self.val_fraction else SIDES[:1]

    def files(self) -> list[Path]:
        """Those of both sides, and what they are until they are complete."""
        names = [side + end for side in SIDES for end in (".jsonl", ".jsonl.tmp")]
        return [Path(self.output_dir, name) for name in names]


class Function(NamedTuple):
    """What the rows say about a function."""

    owner: str  # "shlex" of a function, "shlex.shlex" of a method
    name: str
    kind: str  # "function" or "method"
    call: str  # "shlex.quote(s)", without self
    signature: str  # decorators and the statement `def`, as source
    paragraph: str  # first of the docstring
    body: str  # as source from column 0, without the docstring

    @property
    def dotted(self) -> str:
        """Its full name."""
        return f"{self.owner}.{self.name}"

    @property
    def summary(self) -> str:
        """The paragraph on one line."""
        return " ".join(self.paragraph.split())

    @property
    def head(self) -> str:
        """The source up to the body."""
        return with_body(self.signature, f'"""{self.paragraph}"""')


class Row(NamedTuple):
    """A question and its answer; `content` is what a row of the other side must not share."""

    task: str
    function: Function
    question: str
    answer: str
    content: str

    def to_json(self) -> str:
        """A line of the file."""
        messages = [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]
        facts = {"function": self.function.dotted, "signature": self.function.signature}
        return json.dumps({"messages": messages, "task": self.task, **facts}, ensure_ascii=False)


# ------------------------------------------------------------------------------ from source


def functions_of(module: str, text: str) -> Iterator[Function]:
    """The documented functions and methods of a module, without those inside functions."""
    lines = re.split(r"\r\n?|\n", text)  # as Python counts them; splitlines knows more breaks

    def walk(owner: str, nodes: list[ast.stmt], kind: str) -> Iterator[Function]:
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                yield from walk(f"{owner}.{node.name}", node.body, "method")
            elif isinstance(node, Node) and (found := describe(owner, node, kind, lines)):
                yield found

    yield from walk(module, ast.parse(text).body, "function")


def describe(owner: str, node: Node, kind: str, lines: list[str]) -> Function | None:
    """A function with a docstring of sentences and a body beside it, or None."""
    paragraph = first_paragraph(node)
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    if not paragraph or not names <= DECORATORS or is_empty(node.body[1:]):
        return None
    start = min(n.lineno for n in (node, *node.decorator_list)) - 1
    docstring = node.body[0]
    signature = dedent(lines[start : docstring.lineno - 1])
    body = dedent(lines[docstring.end_lineno : node.end_lineno])
    if body[:1].isspace() or not has_statements(with_body(signature, body), node.body[1:]):
        return None
    call = f"{owner}.{node.name}({parameters(node, kind, names)})"
    return Function(owner, node.name, kind, call, signature, paragraph, body)


def first_paragraph(node: Node) -> str:
    """The first paragraph of a docstring, or "" if it is not plain sentences."""
    paragraph = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")[0].strip()
    is_prose = re.match(r"[A-Z][\w-]* ", paragraph) and paragraph.endswith(".")
    has_code = re.search(r'>>>|->|::|"""|\\|^\s|^[-*:@]|\S  +\S', paragraph, re.M)
    return paragraph if is_prose and not has_code else ""


def is_empty(body: list[ast.stmt]) -> bool:
    """Whether a body does nothing but to say that it is missing."""
    code = [ast.unparse(statement) for statement in body]
    return all(re.match(r"pass$|\.\.\.$|raise NotImplementedError", each) for each in code)


def dedent(lines: list[str]) -> str:
    """Lines from column 0: a tokenizer would join the spaces that begin an answer to the prompt."""
    return textwrap.dedent("\n".join(line.rstrip() for line in lines)).strip("\n")


def with_body(signature: str, body: str) -> str:
    """The source of a function."""
    return f"{signature}\n{textwrap.indent(body, INDENT)}"


def has_statements(code: str, wanted: list[ast.stmt]) -> bool:
    """Whether a function parses to these statements: to indent it may change its strings."""
    try:
        found = ast.parse(code).body
    except SyntaxError:
        return False
    return len(found) == 1 and isinstance(found[0], Node) and dump(found[0].body) == dump(wanted)


def dump(body: list[ast.stmt]) -> list[str]:
    """Statements as text, without their places."""
    return [ast.dump(statement) for statement in body]


def parameters(node: Node, kind: str, decorators: set[str]) -> str:
    """The parameters that a caller gives."""
    arguments = copy.deepcopy(node.args)
    if kind == "method" and "staticmethod" not in decorators:
        del (arguments.posonlyargs or arguments.args)[:1]
    return ast.unparse(arguments)


def module_name(key: str) -> str:
    """The module of a path: "os/__init__.py" -> "os"."""
    return key.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# ------------------------------------------------------------------------------------- rows


def read_functions(options: Options) -> dict[str, list[Function]]:
    """The functions of each side, those of a name once."""
    corpus = Corpus([options.folder] if options.folder else None, Reading(), options.files())
    split = Split(options.val_fraction, EOS_TOKEN).survey(corpus)
    remedy = "give more files, or --val_fraction 0 for no validation"
    require(not split.tails, "--folder", "has too few files for a side each", remedy)
    found: dict[str, dict[str, Function]] = {side: {} for side in options.sides()}
    unread = []
    for document in corpus.documents():
        if document.is_row or not document.key.endswith(".py"):
            continue
        functions = found[split.side(document.key)]
        try:
            for function in functions_of(module_name(document.key), "".join(document.parts)):
                functions.setdefault(function.dotted, function)
        except (SyntaxError, ValueError):  # ValueError: null bytes
            unread.append(document.place)
    if unread:
        say(f"left out: {len(unread)} files that this Python cannot parse, such as {unread[0]}")
    return {side: [*functions.values()] for side, functions in found.items()}


def ask(task: str, function: Function) -> str:
    """The question of a task, in the wording that a hash chooses."""
    wordings = WORDINGS[task]
    chosen = wordings[int(hash_fraction(f"{task} {function.dotted}") * len(wordings))]
    fields = {**function._asdict(), "summary": function.summary}
    return chosen.format(**fields) + (f"\n\n{function.head}" if task == "body" else "")


def rows_of(functions: list[Function]) -> Iterator[Row]:
    """All rows of one side; a name is asked for only where nothing else has its summary."""
    summaries = Counter((each.owner, each.summary) for each in functions)
    for each in functions:
        yield Row("body", each, ask("body", each), each.body, each.body)
        if each.name.startswith("_"):
            continue
        yield Row("docstring", each, ask("docstring", each), each.summary, each.summary)
        if summaries[each.owner, each.summary] == 1:
            yield Row("name", each, ask("name", each), f"`{each.dotted}`", each.summary)


def choose(rows: Iterable[Row], options: Options, elsewhere: set[tuple[str, str]]) -> list[Row]:
    """The rows within the limits, each once and none of `elsewhere`, in the order of a hash."""
    chosen: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        fits = len(row.question.encode()) <= options.max_question_bytes
        fits = fits and len(row.answer.encode()) <= options.max_answer_bytes
        if fits and (row.task, row.content) not in elsewhere:
            chosen.setdefault((row.task, row.function.name, row.content), row)
    return sorted(chosen.values(), key=lambda row: hash_fraction(row.question))


def make_rows(options: Options) -> dict[str, list[Row]]:
    """The rows of each side."""
    functions, made = read_functions(options), dict[str, list[Row]]()
    known: set[tuple[str, str]] = set()
    for side in options.sides():
        every = [*rows_of(functions[side])]
        made[side] = choose(every, options, known)
        known |= {(row.task, row.content) for row in every}
        remedy = "give more functions with docstrings, or raise --max_answer_bytes"
        require(made[side], "--folder", f"nothing is left for {side}.jsonl", remedy)
    return made


# ----------------------------------------------------------------------------------- output


def write(options: Options) -> None:
    """Write the files, or none: they are moved into place once all are complete."""
    folder = Path(options.output_dir)
    for path in (folder / f"{side}.jsonl" for side in SIDES):
        remedy = "pass --force or another --output_dir"
        require(options.force or not os.path.lexists(path), str(path), "exists", remedy)
    made = make_rows(options)
    folder.mkdir(parents=True, exist_ok=True)
    for side, rows in made.items():
        text = "".join(row.to_json() + "\n" for row in rows)
        (folder / f"{side}.jsonl.tmp").write_text(text, encoding="utf-8", newline="\n")
    for side in SIDES:
        if side in made:
            os.replace(folder / f"{side}.jsonl.tmp", folder / f"{side}.jsonl")
        else:
            (folder / f"{side}.jsonl").unlink(missing_ok=True)  # of an earlier run
    for side, rows in made.items():
        counts = Counter(row.task for row in rows)
        listed = ", ".join(f"{counts[task]:,} {task}" for task in WORDINGS)
        say(f"{folder / side}.jsonl: {len(rows):,} rows ({listed})")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python -m data.instructions [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    try:
        write(options)
    except OSError as error:
        where, problem = str(error.filename or options.output_dir), error.strerror or str(error)
        raise UserError(where, problem, "check its permissions and the free space") from None
    return 0


if __name__ == "__main__":
    run_cli(main)
