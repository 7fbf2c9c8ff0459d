"""Text to token ids and back, and where a tokenizer's file is found.

tokenizer = find_tokenizer("data/text/train.bin") or SimpleTokenizer()
ids = tokenizer.encode("import os")
text = tokenizer.decode(ids)
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinymamba.cli import UserError

if TYPE_CHECKING:
    from torch import nn

EOS_TOKEN = "<|endoftext|>"
EOS_NAMES = (EOS_TOKEN, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]")


def byte_alphabet() -> list[str]:
    """A printable character for each byte value, as GPT-2's vocabulary files write bytes."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


class SimpleTokenizer:
    """Text to ids and back: a `tokenizer.json`, a `vocab.txt` by longest match, or plain bytes.

    Every string survives the round trip: a byte that `vocab.txt` has no token for gets a new id
    after the last one. Text that looks like a special token is encoded as plain text, unless
    `encode(..., allow_special=True)`.
    """

    def __init__(self, path: str | Path | None = None):
        self.path, self.library = path, None
        if path is None:
            self._read_vocabulary([*byte_alphabet(), EOS_TOKEN])
        elif not Path(path).is_file():
            raise UserError(str(path), "no such file", "pass tokenizer.json or vocab.txt")
        elif Path(path).suffix == ".json":
            self._read_library(str(path))
        else:
            self._read_vocabulary(self._lines(Path(path)))
        self.bos_token_id = self.pad_token_id = self.eos_token_id  # eos alone separates documents

    @staticmethod
    def _lines(path: Path) -> list[str]:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise UserError(str(path), f"is not UTF-8 ({e.reason})", "convert it") from None
        # A lone carriage return may be a token; a file written on Windows has one on every line.
        end = "\r\n" if text.count("\r\n") == text.count("\n") > 0 else "\n"
        return text.removesuffix(end).split(end)

    def _read_library(self, path: str) -> None:
        from tokenizers import Tokenizer

        try:
            self.library = Tokenizer.from_file(path)
        except Exception as e:  # the library raises no narrower class
            remedy = "make it with python data/prepare.py"
            raise UserError(path, f"is not a tokenizer ({e})", remedy) from None
        ids = map(self.library.token_to_id, EOS_NAMES)
        self.eos_token_id = next((i for i in ids if i is not None), None)

    def _read_vocabulary(self, tokens: list[str]) -> None:
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


def find_tokenizer(data_path: str) -> SimpleTokenizer | None:
    """The tokenizer beside a file, or in a folder, or None."""
    folder = Path(data_path) if Path(data_path).is_dir() else Path(data_path).parent
    files = (folder / name for name in ("tokenizer.json", "vocab.txt"))
    return next((SimpleTokenizer(file) for file in files if file.is_file()), None)


def open_tokenizer(given: Any, model: nn.Module, beside: list) -> Any:
    """The tokenizer that is `given`, as a path or an object, or else one that is found.

    It is looked for beside the files of `beside`, then beside the model's training data.
    """
    if given is not None:
        return SimpleTokenizer(given) if isinstance(given, str | Path) else given
    data: Any = model.config.train_data_path
    beside = [*beside, *([data] if isinstance(data, str) else data)]
    return next(filter(None, (find_tokenizer(str(path)) for path in beside)), None)


def copy_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Copy the file of a SimpleTokenizer, if it has one, to where find_tokenizer looks for it."""
    path = Path(getattr(tokenizer, "path", None) or "")
    if path.is_file():
        name = "tokenizer.json" if path.suffix == ".json" else "vocab.txt"
        shutil.copyfile(path, folder / name)
