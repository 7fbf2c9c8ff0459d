"""Generate text from an ONNX folder of export_model.py. Needs neither PyTorch nor this project.

    pip install numpy onnxruntime tokenizers
    python onnx_generate.py --prompt "Once upon a time" --max_tokens 100
    python onnx_generate.py --model ./exported_models/onnx --prompt "..." --temperature 0.8 --seed 1

As a library:

    model = OnnxModel("exported_models/onnx")
    logits, state = model.advance(ids)  # any number of tokens at a time
    logits, state = model.advance(more, state)  # as often as you like: the state does not grow
"""

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnxruntime
from numpy.typing import ArrayLike
from tokenizers import Tokenizer

HERE = Path(__file__).absolute().parent  # of a link, where the other files are linked too
FILES = ("prefill.onnx", "step.onnx", "weights.data", "tokenizer.json")


class OnnxModel:
    """Two graphs: prefill.onnx reads several tokens at once, step.onnx one."""

    def __init__(self, folder: str | Path = HERE, threads: int = 0):
        """`threads`: how many CPU threads to use; 0 uses all cores."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = onnxruntime.get_available_providers()
        self.prefill, self.step = (
            onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", options, providers)
            for name in ("prefill", "step")
        )
        self.names = ["logits", *(f"new.{name}" for name in self.start())]

    def start(self, batch: int = 1) -> dict[str, np.ndarray]:
        """The state of `batch` rows before any token; its size never changes."""
        types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        return {
            i.name: np.zeros((batch, *i.shape[1:]), types[i.type])
            for i in self.step.get_inputs()
            if i.name != "ids"
        }

    def advance(self, ids: ArrayLike, state: dict | None = None) -> tuple[np.ndarray, dict]:
        """Integers (b, l), l >= 1 -> logits (b, v) after the last id, and the new state."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu" or ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must be integers (b, l), l >= 1, not {ids.dtype} {ids.shape}")
        state = state or self.start(len(ids))
        session = self.step if ids.shape[1] == 1 else self.prefill
        logits, *tensors = session.run(self.names, {"ids": ids.astype(np.int64), **state})
        return logits, {
            n.removeprefix("new."): t for n, t in zip(self.names[1:], tensors, strict=True)
        }

    def generate(
        self, ids: ArrayLike, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> Iterator[int]:
        """Yield what follows ids (l), one by one; temperature 0 always takes the most likely.

        It yields `max_tokens` ids: if an id ends a text, the caller has to stop there.
        """
        random, state, unread = np.random.default_rng(seed), None, np.asarray(ids)
        for _ in range(max_tokens):
            logits, state = self.advance(unread[None], state)
            scores = logits[0].astype(np.float64)  # (v,)
            if temperature > 0:  # the largest of logits plus Gumbel noise is a sample
                scores = scores / temperature + random.gumbel(size=scores.shape)
            unread = scores.argmax(keepdims=True)
            yield int(unread[0])


def fail(problem: str) -> NoReturn:
    """Print one line and exit with code 2."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, which must be the one that config.json was written for."""
    config = folder / "config.json"
    try:
        content = (folder / "tokenizer.json").read_text(encoding="utf-8-sig")
        facts = json.loads(config.read_bytes()) if config.is_file() else {}
        said = facts.get("tokenizer_sha256")
        tokenizer = Tokenizer.from_str(content)
    except Exception as e:  # the library raises no narrower class
        fail(f"{folder}: its config.json or tokenizer.json cannot be read ({e})")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    own = hash_content(content)
    if said not in (None, own):
        problem = f"({own[:12]}) is not the tokenizer of config.json ({said[:12]})"
        fail(f"{folder / 'tokenizer.json'}: {problem}; export the model again")
    return tokenizer


def hash_content(content: str) -> str:
    """SHA-256 of what decides the ids, as in tinymamba/tokenizer.py."""
    parts = json.loads(Tokenizer.from_str(content).to_str(), object_hook=drop_defaults)
    for key in ("version", "truncation", "padding", "post_processor"):
        parts.pop(key, None)
    added = parts["added_tokens"]
    parts["added_tokens"] = [t for t in added if t["content"] != "<|tinymamba_pad|>"]
    if merges := parts["model"].get("merges"):
        parts["model"]["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    plain = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def drop_defaults(fields: dict) -> dict:
    """The fields that are not null or false, which some versions of `tokenizers` leave out."""
    return {n: value for n, value in fields.items() if value is not None and value is not False}


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=HERE, help="the ONNX folder [that of this file]")
    parser.add_argument("--prompt", default="import", help="text to continue [import]")
    parser.add_argument("--max_tokens", type=int, default=100, help="tokens to generate [100]")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 always takes the most likely token [0]"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same text [random]")
    args = parser.parse_args()
    for path in (Path(args.model) / name for name in FILES):
        if not path.is_file():
            fail(f"{path}: no such file; export the model again, with a tokenizer")
    return args


def main() -> None:
    """Print the prompt and its continuation."""
    args = parse()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some characters
    tokenizer = open_tokenizer(Path(args.model))
    tokenizer.encode_special_tokens = True  # read special tokens in the prompt as plain text
    prompt = args.prompt.encode("utf-8", "replace").decode()  # "?" for a byte that is no text
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not ids:
        fail("--prompt: holds no token; pass some text")
    generated, shown = [], ""
    print(prompt, end="")
    model = OnnxModel(args.model)
    for i in model.generate(ids, args.max_tokens, args.temperature, args.seed):
        generated.append(i)
        text = tokenizer.decode(generated)
        if not text.endswith("\ufffd"):  # otherwise the last character is incomplete
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(generated)[len(shown) :])


if __name__ == "__main__":
    main()
