"""Text to tokens: writes the train.bin, val.bin, vocab.txt and tokenizer.json that testv2.py reads.

    python data/prepare.py                                    # sample corpus: Python's own library
    python data/prepare.py --input book.txt --tokenizer byte  # the end of the book is validation
    python data/prepare.py --input texts/ more.jsonl.gz --vocab_size 16384 --output_dir ./data/mine
    python data/prepare.py --input rows.parquet --text_key body --tokenizer path/to/tokenizer.json
    python data/prepare.py --input train.txt --val_input val.txt
    python data/prepare.py --dataset roneneldan/TinyStories --val_split validation
    python data/prepare.py --input texts/ --tokenizer gpt2    # needs tiktoken, and once the network
    python data/prepare.py --chat chats.jsonl                 # conversations or preferences
    python data/prepare.py --teacher tinymamba_model_best.pt  # adds train.teacher.bin to the data

Documents. A text file is one document, and so is each row of .jsonl, .json and .parquet files. In a
text file, <|endoftext|> (--document_separator) ends a document wherever it stands; it is not kept,
nor is a line break directly behind it. In rows it is text, as other special tokens are everywhere.
An end-of-text token follows every document.

Conversations. With --chat each row is a conversation, or a chosen and a rejected one. The chat
template (--chat_template, else the tokenizer's own, else ChatML) writes them, as in the server.
.mask.bin says which tokens are targets: what the assistant says (--train_on), and .index.bin where
conversations begin.

Validation. Whole documents go to training or validation, by a hash of the row, of the beginning of
the document in a file, or of the file's path. With fewer than 20 text files without separators,
the end of each file is validation instead; a file counts as one if it has fewer than 20 separators.
With --val_input or --val_split, nothing else is validation.

Interruptions. Until everything is written, all is in OUTPUT_DIR/.prepare-unfinished. After a kill,
the same command with --resume goes on there; the result is the same.

Beside each .bin file, a .json file has its dtype, vocabulary size, end-of-text id, counts, and the
hash of the tokenizer. Memory does not grow with the input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from tokenizers import Tokenizer

if not __package__:  # run as a script: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.chat import ConversationEncoder, Marks, add_template
from data.console import progress_bar
from data.encoding import Encoder, encoding_with
from data.merges import KnownWords
from data.processes import Crew
from data.sides import Split, Text
from data.unfinished import TOKENIZER, Progress, Unfinished, file_hash, open_at, sync
from data.vocabulary import Learning, local_tokenizer, make_tokenizer, tokenizer_text, vocab_text
from tinymamba.archives import LeftOut
from tinymamba.chat_rows import ConversationRows, contents
from tinymamba.cli import UserError, parse_flags, require, run_cli, say
from tinymamba.documents import Corpus, Reading
from tinymamba.lock import hold_lock
from tinymamba.tokenizer import EOS_TOKEN, SimpleTokenizer, read_utf8

OUTPUTS = ("val.bin", "val.json", "vocab.txt", "tokenizer.json", "train.json", "train.bin")
MARKS = ("val.mask.bin", "val.index.bin", "train.mask.bin", "train.index.bin")  # of conversations
TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")  # copied if beside a tokenizer.json
OWN_TOKENIZERS = ("byte", "bpe", "gpt2")
LOCK = ".prepare.lock"
SAVE_SECONDS = 5.0  # between two saves of the progress
SIDES = ("train", "val")
CHANGED = "is not what it was when the run began"
RESTORE = "restore it, or pass --force without --resume to start again"


@dataclass
class Options:
    """The command line."""

    # Input
    input: list[str] | None = None  # text, .jsonl, .json, .parquet, archives, folders, - [library]
    text_key: str = "text"  # key or column with the text, as a.b if nested, or "{title} {body}"
    document_separator: str = EOS_TOKEN  # ends a document within a text file; "" is nothing
    encoding_errors: str = "strict"  # what to do about invalid UTF-8
    strict: bool = False  # reject input of which anything is left out
    # Conversations
    chat: list[str] | None = None  # tables of conversations or preferences, instead of --input
    chat_template: str | None = None  # Jinja file [the tokenizer's own, else ChatML]
    train_on: str = "assistant"  # whose tokens are targets
    # Input from the library `datasets`
    dataset: str | None = None  # name on the Hugging Face Hub, or a local folder
    config: str | None = None  # its configuration
    split: str = "train"  # its split
    max_tokens: int | None = None  # read about so many tokens of each split
    # Validation
    val_fraction: float = 0.05  # share of the documents or the text; 0 writes no val.bin
    val_input: list[str] | None = None  # files for validation, instead of a share
    val_split: str | None = None  # split for validation, instead of a share
    # Tokenizer
    tokenizer: str = "bpe"  # byte, bpe, gpt2, or a tokenizer.json or its folder
    vocab_size: int = 4096  # number of tokens that bpe learns
    bpe_sample_bytes: int = 200_000_000  # bytes of text that bpe learns from
    eos_token: str | None = None  # end-of-text token, if the tokenizer.json names none
    # Teacher, for distillation
    teacher: str | None = None  # model that reads output_dir's train.bin: writes train.teacher.bin
    top_k: int = 32  # likeliest next ids that are kept of each token
    temperature: float = 2.0  # of their probabilities
    block_size: int = 512  # tokens that it reads at once, as the training will
    # Output
    output_dir: str = "./data/text"  # folder for the files written
    dtype: str = "int32"  # of the tokens in the .bin files
    force: bool = False  # replace files that exist
    resume: bool = False  # go on with a run that was interrupted, if there is one
    workers: int = 0  # processes that count words and encode; 0 means one for each core

    CHOICES: ClassVar = {
        "dtype": ("int32", "uint16"),
        "encoding_errors": ("strict", "replace"),
        "train_on": ("assistant", "all"),
    }
    LIMITS: ClassVar = {
        "workers": (0, 60),
        "max_tokens": (1, math.inf),
        "bpe_sample_bytes": (1, math.inf),
        "top_k": (1, math.inf),
        "temperature": (0.01, math.inf),
        "block_size": (1, math.inf),
    }
    OF_CHATS: ClassVar = ("chat_template", "train_on")
    TEACHER: ClassVar = ("teacher", "top_k", "temperature", "block_size")
    NOT_RESULT: ClassVar = ("strict", "output_dir", "force", "resume", "workers", *TEACHER)

    def deciding(self) -> dict[str, Any]:
        """Those that decide what is written: a run goes on with the same ones only."""
        others = {*self.NOT_RESULT, *(() if self.chat else ("chat", *self.OF_CHATS))}
        facts = dataclasses.asdict(self)
        return {name: value for name, value in facts.items() if name not in others}

    def changed(self) -> list[str]:
        """Those that are not as they are by default."""
        return [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]

    @property
    def input_flag(self) -> str:
        """The flag that names the inputs."""
        return "--input" if self.chat is None else "--chat"

    def tokenizer_folder(self) -> Path | None:
        """The folder with the tokenizer, unless it is one of our own."""
        if self.tokenizer in OWN_TOKENIZERS:
            return None
        path = Path(self.tokenizer)
        return path if path.is_dir() else path.parent

    def sides(self) -> tuple[str, ...]:
        """The sides that are written."""
        has_val = self.val_fraction or self.val_input or self.val_split
        return SIDES if has_val else SIDES[:1]


def check(options: Options) -> None:
    """Reject options that cannot work."""
    if not 0 <= options.val_fraction < 1:
        raise UserError("--val_fraction", f"{options.val_fraction} is not in [0, 1)", "try 0.05")
    if options.tokenizer == "bpe":
        check_fits(options.vocab_size, options.dtype)
        if options.vocab_size < 257:
            problem = f"{options.vocab_size} cannot hold the 256 bytes and {EOS_TOKEN}"
            raise UserError("--vocab_size", problem, "use 257 or more")
    if options.dataset is None:
        for name in ("config", "val_split", "max_tokens"):
            given = getattr(options, name) is not None
            require(not given, f"--{name}", "is of a dataset", "pass --dataset NAME too")
    flags = [n for n in ("dataset", "chat", "input") if getattr(options, n) is not None]
    if len(flags) > 1:
        raise UserError(f"--{flags[0]}", f"is given beside --{flags[1]}", "leave one out")
    is_chat = options.chat is not None
    for name in ("text_key", "document_separator") if is_chat else Options.OF_CHATS:
        is_default = getattr(options, name) == getattr(Options, name)
        problem = "is of text, not of conversations" if is_chat else "is of conversations"
        require(is_default, f"--{name}", problem, "leave it out" if is_chat else "pass --chat too")
    if of_teacher := [name for name in options.changed() if name in Options.TEACHER]:
        raise UserError(f"--{of_teacher[0]}", "is of a teacher", "pass --teacher too")
    if (file := options.chat_template) is not None:
        require(Path(file).is_file(), "--chat_template", f"no file {file}", "pass a Jinja file")
    both = options.val_input is not None and options.val_split is not None
    require(not both, "--val_split", "is given beside --val_input", "leave one out")
    same = options.val_split == options.split
    require(not same, "--val_split", f"{options.split} is the training split", "name another")


def check_fits(vocab_size: int, dtype: str) -> None:
    """Reject a vocabulary with ids that the dtype cannot hold."""
    if vocab_size > np.iinfo(dtype).max + 1:
        raise UserError("--dtype", f"{vocab_size} tokens do not fit in {dtype}", "use int32")


def check_outputs(options: Options) -> None:
    """Reject a folder that has the files already, or a template of another tokenizer."""
    for path in (Path(options.output_dir, name) for name in (*OUTPUTS, *MARKS, *TEMPLATES)):
        if path.exists() and not options.force:
            raise UserError(str(path), "exists", "pass --force or another --output_dir")


def templates(folder: Path | None) -> list[Path]:
    """The files of a chat template that stand beside a tokenizer.json."""
    paths = [folder / name for name in TEMPLATES] if folder else []
    return [path for path in paths if path.is_file()]


# ------------------------------------------------------------------------------------- input


class Source(NamedTuple):
    """A corpus and the rule that gives its documents their sides."""

    corpus: Corpus
    split: Split

    def texts(self, label: str) -> Iterator[Text]:
        """All documents, with a progress bar."""
        with progress_bar(label, self.corpus.total_bytes) as bar:
            yield from self.split.texts(self.corpus.documents(bar.update))

    def report(self) -> dict[str, Any]:
        """What the last pass left out, and the separators in it."""
        return {**dataclasses.asdict(self.corpus.left_out), "separators": self.split.found}


def open_sources(options: Options, work: Unfinished, rows: ConversationRows | None) -> list[Source]:
    """What is read: one corpus for both sides, or one for each."""
    reading = Reading(options.text_key, options.encoding_errors, rows=rows)
    of_dataset = dataclasses.replace(
        reading, dataset=options.dataset, config=options.config, split=options.split
    )
    outputs = [*(work.target / name for name in (*OUTPUTS, *MARKS, *TEMPLATES, LOCK)), work.folder]
    spool = work.folder / "copies"
    shutil.rmtree(spool, ignore_errors=True)
    fraction, rest = options.val_fraction, []
    if options.val_input:
        fraction, rest = 0, [Corpus(options.val_input, reading, outputs, spool)]
    elif options.val_split:
        val = dataclasses.replace(of_dataset, split=options.val_split)
        fraction, rest = 0, [Corpus(None, val, outputs, spool)]
    corpora = [Corpus(options.chat or options.input, of_dataset, outputs, spool), *rest]
    if options.val_input:
        corpora[0].leave_to(corpora[1])
    if options.strict:
        for corpus in corpora:
            corpus.left_out.refuse()
    splits = (Split(share, options.document_separator) for share in (fraction, 1))
    return [Source(corpus, split) for corpus, split in zip(corpora, splits, strict=False)]


def training_parts(source: Source, of_chats: bool) -> Iterator[str]:
    """The training text that bpe learns from; of conversations, what the messages say."""
    for side, parts, _ in source.texts("learning bpe"):
        for part in parts:
            if side == "train":
                yield from contents(part) if of_chats else (part,)


def report_input(progress: Progress, options: Options) -> None:
    """Say what was left out and what was taken for a separator; with --strict, reject it."""
    for report in progress.reports:
        left_out, found = LeftOut(report["counts"], report["names"]), report["separators"]
        if options.strict:
            left_out.refuse()
        for line in left_out.lines():
            say(line)
        if found:
            remedy = "--document_separator '' keeps it as text"
            say(f"{options.document_separator} ended {found:,} documents within files; {remedy}")


# ------------------------------------------------------------------------------------ output


@dataclass
class Side:
    """The files of a side while they are written."""

    tokens: IO[bytes]
    marks: Marks | None  # of conversations

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.tokens.close()
        if self.marks:
            self.marks.close()

    def write(self, encoded: Any) -> None:
        """Write what an encoder gives."""
        self.tokens.write(encoded.ids)
        if self.marks:
            self.marks.add(encoded)

    def sync(self) -> None:
        """See to it that all is on disk."""
        sync(self.tokens)
        if self.marks:
            self.marks.sync()


class Run:
    """One preparation, from its beginning or from where an earlier one was interrupted."""

    def __init__(self, options: Options, work: Unfinished, progress: Progress | None):
        self.options, self.work = options, work
        self.rows = ConversationRows(progress.kind if progress else "") if options.chat else None
        self.sources = open_sources(options, work, self.rows)
        prints = [source.corpus.fingerprint() for source in self.sources]
        self.progress = progress or Progress(options.deciding(), prints)
        require(self.progress.inputs == prints, options.input_flag, CHANGED, RESTORE)
        self.known: KnownWords | None = None  # words that the tokenizer was learned from
        self.itemsize = np.dtype(options.dtype).itemsize

    def write(self) -> None:
        """Write all files into the folder of the work."""
        for source in self.sources:
            source.split.survey(source.corpus)
        with Crew() as crew:
            if self.work.check_tokenizer(self.progress):
                self.check_given_tokenizer()
            else:
                self.write_tokenizer(crew)
            self.encode(crew)
        report_input(self.progress, self.options)
        self.write_facts()

    def check_given_tokenizer(self) -> None:
        """Reject a file of --tokenizer or --chat_template that is not what it was."""
        name, folder = self.options.tokenizer, self.work.folder
        tokenizer = Tokenizer.from_str((folder / TOKENIZER).read_text(encoding="utf-8"))
        if name not in OWN_TOKENIZERS:
            tokenizer = local_tokenizer(name, self.options.eos_token)[0]
        files = self.add_template(tokenizer, self.progress.eos_id)
        if name not in OWN_TOKENIZERS:
            text = tokenizer_text(tokenizer)
            same = hashlib.sha256(text.encode()).hexdigest() == self.progress.tokenizer
            require(same, "--tokenizer", CHANGED, RESTORE)
        for file, text in files.items():
            same = (folder / file).is_file() and read_utf8(folder / file) == text
            require(same, "--chat_template", CHANGED, RESTORE)

    def add_template(self, tokenizer: Tokenizer, eos: int) -> dict[str, str]:
        """Give a tokenizer the chat template, if it is for conversations; its files."""
        options = self.options
        if not self.rows:
            return {}
        return add_template(tokenizer, eos, options.chat_template, options.tokenizer_folder())

    def write_tokenizer(self, crew: Crew) -> None:
        """Write tokenizer.json and vocab.txt."""
        options, folder = self.options, self.work.folder
        size, sample = options.vocab_size, options.bpe_sample_bytes
        learning = Learning(size, sample, options.workers, crew)
        if options.tokenizer in OWN_TOKENIZERS:
            parts = training_parts(self.sources[0], of_chats=bool(self.rows))
            tokenizer, eos, self.known = make_tokenizer(options.tokenizer, parts, learning)
        else:
            tokenizer, eos = local_tokenizer(options.tokenizer, options.eos_token)
            for path in () if self.rows else templates(options.tokenizer_folder()):
                shutil.copyfile(path, folder / path.name)
                with open(folder / path.name, "rb+") as file:
                    sync(file)
                self.progress.templates.append(path.name)
        texts = self.add_template(tokenizer, eos)
        self.progress.templates += texts
        tokens = {i: token for token, i in tokenizer.get_vocab().items()}
        check_fits(max(tokens) + 1, options.dtype)
        texts |= {TOKENIZER: tokenizer_text(tokenizer), "vocab.txt": vocab_text(tokens)}
        for name, text in texts.items():
            with open(folder / name, "w", encoding="utf-8", newline="\n") as output:
                output.write(text)
                sync(output)
        self.progress.tokenizer, self.progress.eos_id = file_hash(folder / TOKENIZER), eos
        self.work.save(self.progress)

    def encode(self, crew: Crew) -> None:
        """Write the .bin files, from where the progress says."""
        folder, eos, dtype = self.work.folder, self.progress.eos_id, self.options.dtype
        if self.rows:
            encoder: Any = ConversationEncoder(folder, eos, dtype, self.options.train_on)
        else:
            encoder = Encoder(folder / TOKENIZER, eos, dtype, self.known)
        with contextlib.ExitStack() as stack:
            encode = stack.enter_context(encoding_with(encoder, self.options.workers, crew))
            files = {side: stack.enter_context(self.open_side(side)) for side in SIDES}
            while self.progress.source < len(self.sources):
                source = self.sources[self.progress.source]
                chunks = encoder.chunks(source.texts("encoding"))
                self.write_ids(encode(islice(chunks, self.progress.chunks, None)), files)
                del chunks  # ends a pass that --max_tokens has cut short
                self.progress.reports.append(source.report())
                self.progress.source += 1
                self.progress.chunks = self.progress.taken = 0
                self.save(files)

    def open_side(self, side: str) -> Side:
        """The files of a side, with what the progress knows of."""
        size = self.progress.tokens[side] * self.itemsize
        tokens = open_at(self.work.folder / f"{side}.bin", size)
        return Side(tokens, Marks(self.work.folder, side, self.progress) if self.rows else None)

    def write_ids(self, stream: Iterable[Any], files: dict[str, Side]) -> None:
        """Write the ids of one source, and save the progress every few seconds."""
        progress, limit = self.progress, self.options.max_tokens or math.inf
        if progress.taken >= limit:
            return
        saved = time.monotonic()
        for encoded in stream:
            side = encoded.side
            files[side].write(encoded)
            count = len(encoded.ids) // self.itemsize
            progress.tokens[side] += count
            progress.bytes[side] += encoded.text_bytes
            progress.taken += count
            progress.chunks += 1
            if encoded.last and progress.taken >= limit:
                return
            if time.monotonic() - saved >= SAVE_SECONDS:
                self.save(files)
                saved = time.monotonic()

    def save(self, files: dict[str, Side]) -> None:
        """Save the progress, after the ids."""
        for file in files.values():
            file.sync()
        self.progress.kind = self.rows.kind if self.rows else ""
        self.work.save(self.progress)

    def write_facts(self) -> None:
        """Write the .json files; everything is complete then."""
        folder, progress = self.work.folder, self.progress
        tokenizer = SimpleTokenizer(folder / TOKENIZER)
        shared = {
            "dtype": self.options.dtype,
            "vocab_size": max(Tokenizer.from_str(tokenizer.content).get_vocab().values()) + 1,
            "eos_id": progress.eos_id,
            "tokenizer": tokenizer.sha256,
        }
        facts: dict[str, dict] = {}
        for side in self.options.sides():
            counts = {"tokens": progress.tokens[side], "bytes": progress.bytes[side]}
            remedy = "give more text, --val_input, or --val_fraction 0 for no validation"
            flag = self.options.input_flag
            require(counts["tokens"], flag, f"nothing is left for {side}.bin", remedy)
            if self.rows:
                of_chats: dict[str, Any] = {"kind": progress.kind}
                of_chats |= {"conversations": progress.conversations[side]}
                counts |= {**of_chats, "counted": progress.counted[side]}
            facts[side] = {**shared, **counts}
            with open(folder / f"{side}.json", "w", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(facts[side]) + "\n")
                sync(file)
        progress.facts = facts
        self.work.save(progress)


def prepare_locked(options: Options, work: Unfinished) -> dict[str, dict]:
    """Write all OUTPUTS, or none: they are moved into place once all are complete."""
    progress = work.find(options.deciding(), options.resume, options.force)
    if progress is None:
        check_outputs(options)
    if progress is None or not progress.facts:
        progress = write_all(options, work, progress)
    else:
        report_input(progress, options)
    stems = (*progress.facts, "vocab", "tokenizer")
    outputs = (*(MARKS if options.chat else ()), *OUTPUTS)
    written = [*progress.templates, *(n for n in outputs if n.partition(".")[0] in stems)]
    work.publish(written, {*OUTPUTS, *MARKS, *TEMPLATES} - set(written))
    return progress.facts


def write_all(options: Options, work: Unfinished, earlier: Progress | None) -> Progress:
    """Write everything into the folder of the work, which is kept if much is lost without it."""
    began = time.monotonic()
    try:
        work.folder.mkdir(exist_ok=True)
        run = Run(options, work, earlier)
        run.write()
    except BaseException as error:
        if not earlier and (time.monotonic() - began < SAVE_SECONDS or not work.has_tokens()):
            work.remove()
        elif "--force" not in str(error):  # else it says that nothing can go on
            say(f"{work.folder} is kept: the same command with --resume goes on")
        raise
    return run.progress


@contextlib.contextmanager
def signals_as_exits() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the process as Ctrl-C does, unless they are ignored."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(options: Options) -> dict[str, dict]:
    """Write all OUTPUTS, or go on where an interrupted run was; returns the facts of each side."""
    check(options)
    target = Path(options.output_dir)
    try:
        is_other = target.exists() and not target.is_dir()
        require(not is_other, str(target), "is not a folder", "pass another --output_dir")
        target.mkdir(parents=True, exist_ok=True)
        remedy = "wait for it, or pass another --output_dir"
        with hold_lock(target / LOCK, str(target), remedy):
            facts = prepare_locked(options, Unfinished(target))
    except OSError as error:
        where, problem = str(error.filename or target), error.strerror or str(error)
        raise UserError(where, problem, "check its permissions and the free space") from None
    for side, fact in facts.items():
        tokens, count = fact["tokens"], fact["bytes"]
        said = f"{count:,} bytes, {count / tokens:.2f} bytes per token"
        if options.chat:
            said = f"{fact['conversations']:,} conversations, {fact['counted']:,} tokens count"
        say(f"{target / side}.bin: {tokens:,} tokens, {said}")
    if "val" not in facts:
        say("no val.bin was asked for: train with --enable_validation false")
    return facts


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    usage = "python data/prepare.py [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    with signals_as_exits():
        if options.teacher:
            from data.teacher import prepare_lessons  # it needs PyTorch

            prepare_lessons(options)
        else:
            prepare(options)
    return 0


if __name__ == "__main__":
    run_cli(main)
