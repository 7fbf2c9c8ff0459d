"""ONNX Runtime in the place of TinyMambaModel.run: the graphs that export_model.py makes for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinymamba.cli import UserError, need, require

ENGINES = ("torch", "onnx")
GRAPHS = ("prefill", "step")
GRAPH_FILES = ("prefill.onnx", "step.onnx", "weights.data")  # the last is of both
OUTPUTS = ("hidden", "logits", "gates")  # of each graph, before the tensors of the new state


class OnnxEngine:
    """Two graphs: step reads a token of each text, prefill several tokens of one text."""

    def __init__(self, folder: Path, threads: int):
        """`folder` has prefill.onnx, step.onnx and weights.data; `threads` of the CPU."""
        runtime: Any = need("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads would compete with PyTorch's between two steps.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        paths = [str(folder / f"{name}.onnx") for name in GRAPHS]
        try:
            self.prefill, self.step = (
                runtime.InferenceSession(path, options, ["CPUExecutionProvider"]) for path in paths
            )
        except Exception as e:  # onnxruntime raises no narrower class
            problem = f"ONNX Runtime cannot read it ({' '.join(str(e).split())})"
            remedy = "delete the folder, or use another version of onnxruntime"
            raise UserError(str(folder), problem, remedy) from None
        self.names = [output.name for output in self.step.get_outputs()]

    def run(self, ids: Tensor, state: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        """ids (b, l) and a ModelState -> hidden (b, l, d), logits (b, v), gates, new state.

        b is 1 unless l is. The logits and the gates (n_layer, b, 1, 3) are those of the last
        column. Tensors and NumPy's arrays share their memory, so no state is copied.
        """
        session = self.step if ids.shape[1] == 1 else self.prefill
        inputs = {name: t.numpy() for name, t in {"ids": ids, **state.tensors()}.items()}
        outputs = map(torch.from_numpy, session.run(self.names, inputs))
        hidden, logits, gates = (next(outputs) for _ in OUTPUTS)
        return hidden, logits, gates, state.map(lambda _: next(outputs))


def check_engine(
    engine: str, device: torch.device, dtype: torch.dtype, compiled: bool, adapters: Any
) -> None:
    """Reject an engine that is unknown, or that cannot do what is asked."""
    problem, remedy = f"there is no {engine!r}", f"use {' or '.join(ENGINES)}"
    require(engine in ENGINES, "engine", problem, remedy)
    if engine == "torch":
        return
    need("onnxruntime")
    remedy = "leave it out, or use the engine torch"
    require(not compiled, "compile", "is of no use to the engine onnx", remedy)
    problem = "the engine onnx takes none"
    require(not adapters, "adapter", problem, "merge it with peft.py, or use the engine torch")
    require(dtype == torch.float32, "dtype", "the engine onnx computes in float32", remedy)
    problem = f"the engine onnx runs on the CPU, not on {device}"
    require(device.type == "cpu", "device", problem, "pass cpu, or use the engine torch")


def reject_onnx_folder(path: str | Path) -> None:
    """Say what a folder of export_model.py's format onnx lacks, instead of a missing file."""
    exported = (Path(path) / "step.onnx").is_file()
    remedy = "pass the checkpoint that it was made from, with --engine onnx"
    require(not exported, str(path), "has neither gates nor hidden states", remedy)


def default_cache() -> Path:
    """The folder of this user in which exported graphs are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    remedy = "pass the folder for exported graphs"
    require(root.is_absolute(), "onnx_folder", "this user has no home folder", remedy)
    return root / "tinymamba" / "onnx"
