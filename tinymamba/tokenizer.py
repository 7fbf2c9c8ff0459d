"""Text to token ids and back, and the tokenizer of a model, a folder or data.

tokenizer = SimpleTokenizer("data/text/tokenizer.json")
tokenizer = SimpleTokenizer.from_dict(model.tokenizer)  # of load_model
ids = tokenizer.encode("import os")
text = tokenizer.decode(ids)
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymamba.cli import UserError, require
from tinymamba.token_file import read_sidecar
from tinymamba.token_shards import files_of

if TYPE_CHECKING:
    from torch import nn

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|tinymamba_pad|>"  # which hf_integration.py adds where a model has ids to spare
FILES = ("tokenizer.json", "vocab.txt")  # the first that is there is the tokenizer
TEMPLATE_FILE, SETTINGS_FILE = "chat_template.jinja", "tokenizer_config.json"
RECORD = ("name", "content", "chat_template", "special_tokens", "sha256")
EOS_NAMES = (EOS_TOKEN, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]")


def byte_alphabet() -> list[str]:
    """A printable character for each byte value, as GPT-2's vocabulary files write bytes."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark; line ends stay as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(str(path), f"is not UTF-8 ({e.reason})", "convert it") from None


def split_lines(text: str) -> list[str]:
    """The tokens of a vocab.txt, one a line."""
    # A lone carriage return may be a token; a file written on Windows has one on every line.
    end = "\r\n" if text.count("\r\n") == text.count("\n") > 0 else "\n"
    return text.removesuffix(end).split(end)


def begun_length(text: str, words: Iterable[str]) -> int:
    """How many characters at the end of a text may begin one of these words, none of them whole."""
    sizes = [
        n
        for word in words
        for n in range(1, min(len(word), len(text) + 1))
        if text.endswith(word[:n])
    ]
    return max(sizes, default=0)


def hash_content(name: str, content: str) -> str:
    """SHA-256 of what decides the ids that a tokenizer gives.

    Line ends, white space, the order of keys, truncation, padding, PAD_TOKEN and the tokens to add
    around a text do not count; neither do the fields that a version of `tokenizers` leaves out, nor
    how it writes a merge. onnx_generate.py does the same.
    """
    if name == FILES[1]:
        parts: Any = split_lines(content)
    else:
        from tokenizers import Tokenizer

        library = Tokenizer.from_str(content) if content else byte_tokenizer()
        parts = json.loads(library.to_str(), object_hook=drop_defaults)
        for key in ("version", "truncation", "padding", "post_processor"):
            parts.pop(key, None)
        parts["added_tokens"] = [t for t in parts["added_tokens"] if t["content"] != PAD_TOKEN]
        if merges := parts["model"].get("merges"):
            parts["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    plain = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def drop_defaults(fields: dict) -> dict:
    """The fields of a tokenizer.json that are not null or false, which may be left out."""
    return {n: value for n, value in fields.items() if value is not None and value is not False}


def read_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The chat template in a folder, or None, and the special tokens that it may name."""
    file, settings_file = folder / TEMPLATE_FILE, folder / SETTINGS_FILE
    settings, text = {}, None
    try:
        if settings_file.is_file():
            settings = json.loads(read_utf8(settings_file))
            text = settings.get("chat_template")
        if file.is_file():
            text = read_utf8(file)
        if isinstance(text, list):  # several templates, by name
            text = {each["name"]: each["template"] for each in text}["default"]
        tokens = {name: t for name, t in settings.items() if name.endswith("_token")}
        more = settings.get("extra_special_tokens")  # of a model that names its own
        tokens |= more if isinstance(more, dict) else {}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        problem = f"its chat template cannot be read ({e})"
        raise UserError(str(folder), problem, "fix it or remove it") from None
    if text is None:
        return None, {}
    plain = {n: t.get("content") if isinstance(t, dict) else t for n, t in tokens.items()}
    return str(text), {name: t for name, t in plain.items() if t and isinstance(t, str)}


class SimpleTokenizer:
    """Text to ids and back: a `tokenizer.json`, a `vocab.txt` by longest match, or plain bytes.

    Every string survives the round trip: a byte that `vocab.txt` has no token for gets a new id
    after the last one. Text that looks like a special token is encoded as plain text, unless
    `encode(..., allow_special=True)`. The file is read once: it may be replaced afterwards.

    name             "tokenizer.json", "vocab.txt" or "bytes"
    content          the text of that file
    chat_template    of chat_template.jinja or tokenizer_config.json beside the file, or None
    special_tokens   bos_token, eos_token and so on of tokenizer_config.json, for the chat template
    sha256           the same for two files that give the same ids, however they are formatted
    """

    def __init__(self, path: str | Path | None = None):
        self.path, self.name, self.content = path, "bytes", ""
        self.chat_template, self.special_tokens = None, {}  # type: str | None, dict[str, str]
        if path is not None:
            require(Path(path).is_file(), str(path), "no such file", f"pass {' or '.join(FILES)}")
            self.name = FILES[0] if Path(path).suffix == ".json" else FILES[1]
            self.content = read_utf8(Path(path))
            self.chat_template, self.special_tokens = read_template(Path(path).parent)
        self._read(str(path))

    @staticmethod
    def from_dict(record: dict | None, source: str = "tokenizer") -> SimpleTokenizer:
        """The opposite of `to_dict`; `source` is the file that holds the record, for errors.

        A record of a model without the content of a tokenizer is a UserError.
        """
        if record is None or "content" not in record:
            raise UserError(source, describe_lack(record), f"pass {' or '.join(FILES)}")
        made = SimpleTokenizer.__new__(SimpleTokenizer)
        made.path, made.chat_template, made.special_tokens = None, None, {}
        made.__dict__ |= {name: record[name] for name in RECORD if record.get(name) is not None}
        made._read(source)
        return made

    def to_dict(self) -> dict:
        """Everything about it as plain values; bytes become a tokenizer.json of the same ids."""
        record = {name: getattr(self, name) for name in RECORD}
        if self.name == "bytes":
            record |= {"name": FILES[0], "content": byte_tokenizer().to_str()}
        return record

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of what decides the ids."""
        return hash_content(self.name, self.content)

    def _read(self, source: str) -> None:
        self.library = None
        if self.name == FILES[0]:
            self._read_library(source)
        else:
            tokens = [*byte_alphabet(), EOS_TOKEN]
            self._read_vocabulary(split_lines(self.content) if self.name == FILES[1] else tokens)
        self.bos_token_id = self.pad_token_id = self.eos_token_id  # eos alone separates documents

    def _read_library(self, source: str) -> None:
        from tokenizers import Tokenizer

        try:
            self.library = Tokenizer.from_str(self.content)
        except Exception as e:  # the library raises no narrower class
            remedy = "make it with python data/prepare.py"
            raise UserError(source, f"is not a tokenizer ({e})", remedy) from None
        self.library.no_truncation()  # data/prepare.py cuts no text either
        self.library.no_padding()
        ids = map(self.library.token_to_id, EOS_NAMES)
        self.eos_token_id = next((i for i in ids if i is not None), None)

    def _read_vocabulary(self, tokens: list[str]) -> None:
        self.listed = len(tokens)
        byte_of = {c: b for b, c in enumerate(byte_alphabet())}
        gpt2_notation = set(byte_of) <= set(tokens)  # else a token is literal text
        self.pieces: list[bytes] = []
        self.special: dict[str, int] = {}
        self.ids: dict[bytes, int] = {}
        for i, token in enumerate(tokens):
            piece = token.encode()
            if escaped := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
                piece = bytes([int(escaped[1], 16)])
            elif token in EOS_NAMES or re.fullmatch(r"<\|.*\|>", token):
                self.special.setdefault(token, i)
            elif gpt2_notation and set(token) <= set(byte_of):
                piece = bytes(byte_of[c] for c in token)
            self.pieces.append(piece)
            if piece and token not in self.special:
                self.ids.setdefault(piece, i)
        for piece in (bytes([b]) for b in range(256)):
            if piece not in self.ids:
                self.ids[piece] = len(self.pieces)
                self.pieces.append(piece)
        self.longest = max(map(len, self.ids))
        self.eos_token_id = next((i for t, i in self.special.items() if t in EOS_NAMES), None)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`; an unpaired surrogate is read as "?"."""
        text = text.encode(errors="replace").decode()
        if self.library is not None:
            self.library.encode_special_tokens = not allow_special
            return self.library.encode(text, add_special_tokens=False).ids
        if allow_special and self.special:
            parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text)
            special, encode = self.special, self.encode
            return [i for p in parts for i in ([special[p]] if p in special else encode(p))]
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            size = min(self.longest, len(data) - at)
            while data[at : at + size] not in self.ids:
                size -= 1
            ids.append(self.ids[data[at : at + size]])
            at += size
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD, unknown ids that or nothing."""
        ids = [int(i) for i in ids]
        if self.library is not None:
            return self.library.decode(ids, skip_special_tokens=skip_special_tokens)
        hidden = set(self.special.values()) if skip_special_tokens else ()
        pieces = (self.pieces[i] if 0 <= i < len(self) else b"\xff" for i in ids if i not in hidden)
        return b"".join(pieces).decode(errors="replace")

    def __len__(self) -> int:
        """Number of ids, special ones included."""
        return len(self.pieces) if self.library is None else self.library.get_vocab_size()


def find_turn_end(
    write: Callable[[list[dict[str, str]]], str], special: Mapping[str, int]
) -> int | None:
    """The id of the special token that a chat template writes after an assistant's content.

    `write` gives the text of messages, `special` the ids of the special tokens.
    """
    asked, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Said 1"}
    _, found, after = write([asked, said]).rpartition(said["content"])
    ends = [token for token in special if found and after.lstrip().startswith(token)]
    return special[max(ends, key=len)] if ends else None


def copy_tokenizer(tokenizer: Any) -> Any:
    """Another one of the same ids, if its kind is known: encoding changes its settings."""
    known = isinstance(tokenizer, SimpleTokenizer)
    return SimpleTokenizer.from_dict(tokenizer.to_dict()) if known else tokenizer


def byte_level(model: Any, use_regex: bool = True) -> Any:
    """A `tokenizers.Tokenizer` over a `tokenizers` model whose tokens are written as bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_tokenizer() -> Any:
    """SimpleTokenizer() as a `tokenizers.Tokenizer`: an id per byte, and eos."""
    from tokenizers.models import BPE

    tokenizer = byte_level(BPE({c: i for i, c in enumerate(byte_alphabet())}, []), use_regex=False)
    tokenizer.add_special_tokens([EOS_TOKEN])
    return tokenizer


def find_tokenizer(data_path: str | Path) -> SimpleTokenizer | None:
    """The tokenizer beside a file, or in a folder, or None."""
    folder = Path(data_path) if Path(data_path).is_dir() else Path(data_path).parent
    files = (folder / name for name in FILES)
    return next((SimpleTokenizer(file) for file in files if file.is_file()), None)


# ------------------------------------------------------------- the tokenizer of a model
#
# `model.tokenizer` and the key "tokenizer" of a checkpoint hold a record, which is one of these:
#
#     None                      not known: the checkpoint is older than these records
#     {}                        there is none: not in the folder, or not beside the data
#     SimpleTokenizer.to_dict(), with "assumed" if a path may replace it without comparison, and
#                               with "data_sha256" for a vocab.txt whose data have a hash
#     {"sha256": ...}           the tokenizer is not among the files of the folder or the data
#     {"class", "vocab_size"}   an object of another class, with the "sha256" of the data if known


def describe_tokenizer(tokenizer: Any) -> dict | None:
    """The record of a tokenizer."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.to_dict()
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else getattr(tokenizer, "vocab_size", 0)
    return {"class": type(tokenizer).__name__, "vocab_size": size if type(size) is int else 0}


def open_tokenizer(given: Any, model: nn.Module, beside: list) -> Any:
    """The tokenizer that is `given`, as a path or an object, or else the model's own, or None.

    A file of other ids than the model's own is a UserError. A model without a record has the one
    beside the files of `beside`, or beside its training data. What is opened from a file becomes
    the model's record, so that everything saved from the model has it.
    """
    record: Any = getattr(model, "tokenizer", None)
    if given is not None and not isinstance(given, str | Path):
        return given
    if given is not None:
        opened: Any = SimpleTokenizer(given)
        require_own_ids(opened, record or {})
    elif record is not None:
        return SimpleTokenizer.from_dict(record) if "content" in record else None
    else:
        opened = next(filter(None, map(find_tokenizer, beside)), None)
        opened = opened or find_beside_data(model.config)
    if opened is not None:
        model.tokenizer = opened.to_dict()
    return opened


def require_own_ids(given: SimpleTokenizer, record: dict) -> None:
    """Reject a file with other ids than the record says; it may take over the chat template."""
    remedy = "leave it out" if "content" in record else "pass that one"
    wanted, size = record.get("sha256"), record.get("vocab_size")
    if not record.get("assumed") and wanted not in (None, given.sha256):
        pair = f"({given.sha256[:12]}) than the model's own ({wanted[:12]})"
        problem = f"is another tokenizer {pair}"
        require(replaces(given, record), str(given.path), problem, remedy)
    elif wanted is None and size:
        problem = f"has {len(given)} ids, but {describe_lack(record)}"
        require(len(given) == size, str(given.path), problem, remedy)
    if given.chat_template is None:
        given.chat_template = record.get("chat_template")
        given.special_tokens = record.get("special_tokens") or {}


def replaces(given: SimpleTokenizer, record: dict) -> bool:
    """Whether a tokenizer.json may stand for the vocab.txt of a record, or the other way round.

    Each id must stand for the same text. A vocab.txt matches the longest token, which divides text
    otherwise than a tokenizer.json does, unless its tokens are single bytes.
    """
    other_kind = record.get("name") not in (given.name, None)
    if not other_kind or (given.name == FILES[1] and given.longest > 1):
        return False
    own = SimpleTokenizer.from_dict(record)
    ids = range(max(len(own), len(given)))
    return all(own.decode([i], False) == given.decode([i], False) for i in ids)


def find_beside_data(config: Any) -> SimpleTokenizer | None:
    """The tokenizer beside the training data of an old checkpoint, or None.

    The path may be relative, and other data may be there by now: what their .json says must fit.
    """
    try:
        paths = [file for path in listed(config.train_data_path) for file in files_of(path)]
    except UserError:  # the shards are elsewhere
        return None
    facts, found = read_tokenizer_facts(paths)
    size, eos = facts.get("vocab_size", 0), facts.get("eos_id", config.eos_id)
    problem = f"is of another tokenizer than the model ({size} ids, eos_id {eos})"
    remedy = "put the model's tokenizer beside its checkpoint, or pass its path"
    fits = size <= config.vocab_size and config.eos_id in (-1, eos)
    require(found is None or fits, paths[0], problem, remedy)
    return found


def why_no_tokenizer(model: nn.Module, otherwise: str = "none was found") -> str:
    """The problem to report if `open_tokenizer` has returned None."""
    record: Any = getattr(model, "tokenizer", None)
    return describe_lack(record, otherwise)


def describe_lack(record: dict | None, otherwise: str = "none was found") -> str:
    """Why a record has no content."""
    record = record or {}
    if name := record.get("class"):
        size = f" of {record['vocab_size']} ids" if record.get("vocab_size") else ""
        return f"the model was trained with a {name}{size}"
    return "the file that belongs to the model is missing" if "sha256" in record else otherwise


# ------------------------------------------------------------------ the tokenizer of a folder


def write_tokenizer(record: dict | None, folder: Path) -> None:
    """Write the files of a record into a folder; no file if the record has no content."""
    if not record or "content" not in record:
        return
    (folder / record["name"]).write_bytes(record["content"].encode())
    if record.get("chat_template"):
        (folder / TEMPLATE_FILE).write_bytes(record["chat_template"].encode())
        if record.get("special_tokens"):
            settings = json.dumps(record["special_tokens"], indent=2) + "\n"
            (folder / SETTINGS_FILE).write_bytes(settings.encode())


def note_tokenizer(record: dict | None) -> dict:
    """What config.json says of the tokenizer in its folder."""
    if not record:
        return {}
    if "class" in record:
        return {"custom_tokenizer": record}
    return {"tokenizer_sha256": record["sha256"]}


def read_folder_tokenizer(folder: Path, config: dict) -> dict:
    """The record of a folder's tokenizer, which must be the one that config.json was written for.

    Folders of the first release do not say which one that is, so it is only assumed.
    """
    found, said = find_tokenizer(folder), config.get("tokenizer_sha256")
    if found is None:
        return {"sha256": said} if said else config.get("custom_tokenizer") or {}
    problem = f"({found.sha256[:12]}) is not the tokenizer of {folder / 'config.json'} "
    remedy = "restore it, or export the model again"
    require(said in (None, found.sha256), str(found.path), f"{problem}({said!s:.12})", remedy)
    return found.to_dict() if said else {**found.to_dict(), "assumed": True}


# ------------------------------------------------------------------------ the tokenizer of data

FACTS = ("tokenizer", "eos_id", "vocab_size")  # of a .json beside a .bin; the first is a hash


def listed(paths: str | list[str]) -> list[str]:
    """One path or several, as a list."""
    return [paths] if isinstance(paths, str | Path) else list(paths)


def read_tokenizer_facts(*sources: str | list[str]) -> tuple[dict, SimpleTokenizer | None]:
    """What the .json files of some data say of their tokenizer, and the one that lies beside them.

    Files of different tokenizers are a UserError, and so is a tokenizer beside a file that the
    file was not made with. A .json without a hash has that of the tokenizer.json beside it. Of
    several tokenizers, the one with that hash is taken, or the first.
    """
    paths = [file for source in sources for path in listed(source) for file in files_of(path)]
    beside: dict[Path, SimpleTokenizer | None] = {}
    said: dict[str, tuple[Any, str]] = {}
    for path in paths:
        folder = Path(path).parent
        if folder not in beside:
            beside[folder] = find_tokenizer(folder)
        own = read_sidecar(path)
        if own and (found := beside[folder]):
            require_made_with(found, path, own)
            own = {**own, **({"tokenizer": found.sha256} if found.name == FILES[0] else {})}
        for name in (n for n in FACTS if own.get(n) is not None):
            value, first = said.setdefault(name, (own[name], path))
            pair = f"{name} {own[name]:.12}" if name == "tokenizer" else f"{name} {own[name]}"
            problem = f"has another tokenizer than {first} ({pair}, not {value!s:.12})"
            require(value == own[name], path, problem, "prepare both with one tokenizer")
    facts = {name: value for name, (value, _) in said.items()}
    if "tokenizer" in said:
        facts["file"] = said["tokenizer"][1]
    lying = [tokenizer for tokenizer in beside.values() if tokenizer]
    return facts, choose_tokenizer(lying, facts)


def choose_tokenizer(found: list[SimpleTokenizer], facts: dict) -> SimpleTokenizer | None:
    """The tokenizer that the data were made with, of those beside them, or None."""
    said = facts.get("tokenizer")
    fitting = [each for each in found if said in (None, each.sha256)]
    chosen = next(iter([*fitting, *found]), None)
    if chosen and not fitting and chosen.name == FILES[0]:
        problem = f"({chosen.sha256[:12]}) is not the tokenizer of {facts['file']} ({said:.12})"
        raise UserError(str(chosen.path), problem, "remove it, or prepare all data with one")
    return chosen


def require_made_with(found: SimpleTokenizer, path: str, facts: dict) -> None:
    """Reject a tokenizer beside a .bin whose .json says that it was made with another one.

    The hash is that of a tokenizer.json. A vocab.txt beside it has another, so its size must do.
    """
    said, remedy = facts.get("tokenizer"), "restore it, or prepare the data again"
    problem = f"({found.sha256[:12]}) is not the tokenizer of {path} ({said!s:.12})"
    same = said in (None, found.sha256) or found.name == FILES[1]
    require(same, str(found.path), problem, remedy)
    size, known = facts.get("vocab_size"), len(found) if found.library else found.listed
    problem = f"has {known} ids, but the .json of {path} says {size}"
    require(size is None or known <= size, str(found.path), problem, remedy)


def require_data_of(record: dict | None, facts: dict, owner: str) -> None:
    """Reject data of another tokenizer than that of a model; `owner` is the model's file."""
    kept = record or {}
    key = "data_sha256" if kept.get("name") == FILES[1] else "sha256"
    wanted, said = kept.get(key), facts.get("tokenizer")
    problem = f"has another tokenizer ({said!s:.12}) than {owner} ({wanted!s:.12})"
    same = said == wanted or None in (said, wanted)
    require(same, str(facts.get("file")), problem, "prepare it with the tokenizer of the model")


class RunTokenizer:
    """The tokenizer of a training run.

    opened    for samples: the object that was given, or the file beside the data, or None
    record    for checkpoints
    facts     what the data say of it, see `read_tokenizer_facts`
    """

    def __init__(self, given: Any, sources: list, vocab_size: int):
        """`sources`: the paths of all data; they must have one tokenizer, of no more ids."""
        self.facts, found = read_tokenizer_facts(*sources)
        size = self.facts.get("vocab_size", 0)
        remedy = f"pass --vocab_size {size}, or prepare the data with fewer tokens"
        require(size <= vocab_size, "vocab_size", f"{vocab_size}, but the data has {size}", remedy)
        self.is_given = given is not None
        self.opened: Any = given if self.is_given else found
        self.record: dict | None = self.describe()

    def describe(self) -> dict:
        """The record, with the hash in the .json of the data if the tokenizer itself has none."""
        record, said = describe_tokenizer(self.opened) or {}, self.facts.get("tokenizer")
        if said is None or record.get("name") == FILES[0]:
            return record
        return {**record, "data_sha256" if "name" in record else "sha256": said}

    def inherit(self, record: dict | None, owner: str) -> None:
        """Go on with the tokenizer of the model in the file `owner`; other data are a UserError.

        A tokenizer with the same ids that was found beside the data may bring a new chat template.
        """
        require_data_of(record, self.facts, owner)
        if record is None and not self.record:
            self.record = None  # it may still lie beside the old model
        if not record:
            return
        own, has_file = self.opened, "content" in record
        same = isinstance(own, SimpleTokenizer) and own.sha256 == record.get("sha256")
        if same and "class" not in record and (own.chat_template or not has_file):
            return
        self.record = record
        if has_file and not self.is_given:
            self.opened = SimpleTokenizer.from_dict(record, owner)
