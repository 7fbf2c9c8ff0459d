"""Text from the ONNX folder that export_model.py writes; it stands alone, without PyTorch.

    pip install numpy onnxruntime tokenizers
    python onnx_generate.py --prompt "Once upon a time" --max_tokens 100
    python onnx_generate.py --model ./exported_models/onnx --prompt "..." --temperature 0.8 --seed 1

As a library:

    model = OnnxModel("exported_models/onnx")
    logits, state = model.advance(ids)  # any number of tokens at a time, for ever
    logits, state = model.advance(more, state)
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent


class OnnxModel:
    """Two graphs: prefill.onnx reads pieces of a text, step.onnx single tokens."""

    def __init__(self, folder: str | Path = HERE, threads: int = 0):
        """`threads` of the CPU; 0 takes all cores."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        providers = onnxruntime.get_available_providers()
        self.prefill, self.step = (
            onnxruntime.InferenceSession(Path(folder) / f"{name}.onnx", options, providers)
            for name in ("prefill", "step")
        )
        self.names = [output.name for output in self.step.get_outputs()]

    def start(self, batch: int = 1) -> dict[str, np.ndarray]:
        """The state before any token, of `batch` rows; its size never changes."""
        types = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        return {
            i.name: np.zeros((batch, *i.shape[1:]), types[i.type])
            for i in self.step.get_inputs()
            if i.name != "ids"
        }

    def advance(self, ids: np.ndarray, state: dict | None = None) -> tuple[np.ndarray, dict]:
        """ids (B, L) of int64, L >= 1 -> logits (B, V) after the last one, and the new state."""
        state = state or self.start(len(ids))
        session = self.step if ids.shape[1] == 1 else self.prefill
        logits, *tensors = session.run(self.names, {"ids": ids, **state})
        return logits, {
            n.removeprefix("new."): t for n, t in zip(self.names[1:], tensors, strict=True)
        }

    def generate(
        self, ids: list[int], max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ):
        """The ids that follow, one by one; temperature 0 takes the likeliest every time.

        Nothing ends it early: stop at the id that ends a text, if there is one.
        """
        draw, state, piece = np.random.default_rng(seed), None, ids
        for _ in range(max_tokens):
            logits, state = self.advance(np.array([piece], np.int64), state)
            weights = logits[0].astype(np.float64)
            if temperature > 0:
                weights = weights / temperature + draw.gumbel(size=weights.shape)
            piece = [int(weights.argmax())]
            yield piece[0]


def fail(problem: str) -> None:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=HERE, help="the folder [that of this file]")
    parser.add_argument("--prompt", default="import", help="what to continue [import]")
    parser.add_argument("--max_tokens", type=int, default=100, help="[100]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a terminal need not know every character
    for name in ("prefill.onnx", "step.onnx", "weights.data", "tokenizer.json"):
        if not (Path(args.model) / name).is_file():
            fail(f"{Path(args.model) / name}: no such file; export the model with it")
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # text is never a special token
    ids = tokenizer.encode(args.prompt, add_special_tokens=False).ids
    if not ids:
        fail("--prompt: holds no token; pass some text")
    made, shown = [], ""
    print(args.prompt, end="")
    model = OnnxModel(args.model)
    for i in model.generate(ids, args.max_tokens, args.temperature, args.seed):
        made.append(i)
        text = tokenizer.decode(made)
        if not text.endswith("\ufffd"):  # else a character is not complete yet
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(tokenizer.decode(made)[len(shown) :])


if __name__ == "__main__":
    main()
