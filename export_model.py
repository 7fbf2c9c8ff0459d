"""Export: a trained model as files that work without the training code.

    python export_model.py --checkpoint ./tinymamba_model_latest.pt --format all --verify --generate
    python export_model.py --format onnx --optimize --benchmark --output_dir ./exported_models
    python export_model.py --format torch_export --aoti  # compiled ahead of time
    python export_model.py --format onnx --quantize both --calibration_data data/text/train.bin
    python exported_models/onnx/onnx_generate.py --prompt "Once upon a time"  # no PyTorch needed

Each format is a folder of its own below --output_dir, with config.json and the tokenizer:

    pytorch       model.safetensors, which load_model, streaming.py and all other tools take, and
                  inference.pt, the same as a checkpoint without the state of training
    torchscript   model.pt for torch.jit.load, which PyTorch has deprecated: use torch_export
    onnx          prefill.onnx and step.onnx, which share weights.data, and onnx_generate.py
    torch_export  prefill.pt2 and step.pt2 for torch.export.load; with --aoti compiled, for
                  torch._inductor.aoti_load_package

With --quantize, pytorch and onnx become pytorch_int8, onnx_int4 and so on, by way of quantize.py.

Every graph is a function of ids and the state's tensors to logits after the last token and the
state's tensors: prefill takes ids (b, l) of any l >= 1, step ids (b, 1). The state begins as zeros;
their shapes stand in config.json. Compiled graphs want contiguous tensors.

Letters in the comments on shapes:
    B batch      l length      v vocabulary
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from testv2 import LayerState, ModelState, TinyMambaModel, describe_model, load_model, save_folder
from tinymamba.checkpoint import new_folder, require_writable, save_checkpoint, write_json
from tinymamba.cli import CliParser, need, require, run_cli
from tinymamba.kernels import QuantizedLinear, pack
from tinymamba.runtime import pick_device, why_no_compile
from tinymamba.tokenizer import copy_tokenizer, open_tokenizer

# By how much values up to 1 may differ, and by what share larger ones; what share of the likeliest
# tokens must be the same. A state holds sums over the whole text, in which what rounds differently
# adds up: of quantized models, only logits can be compared.
EXACT = {"logits": 1e-4, "state": 1e-3, "same": 1.0}
ROUNDED = {"logits": 0.1, "state": math.inf, "same": 0.95}
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 513, 4096)  # that --verify tries
STREAMED = 2000  # tokens that --verify streams
ROUNDS, STEPS = 7, 32  # of --benchmark, and of a round
MODEL = "the model"  # itself, as a row of --benchmark

# ------------------------------------------------------------------------------------ graphs


class Graph(nn.Module):
    """The model as functions of tensors alone: ids and a state to last logits and a state."""

    def __init__(self, model: TinyMambaModel):
        super().__init__()
        self.model = model
        self.programs: dict[str, torch.export.ExportedProgram] = {}

    def prefill(self, ids: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """ids (b, l) and those of ModelState.tensors() -> logits (b, v) and the same after it."""
        per_layer = len(LayerState._fields)
        layers = [
            LayerState(*tensors[i : i + per_layer]) for i in range(0, len(tensors) - 2, per_layer)
        ]
        state = ModelState(layers, *tensors[-2:])
        logits, state = self.model.advance(ids, state, last_only=True)
        return logits[:, -1], *(t.contiguous() for t in state.tensors().values())

    step = forward = prefill

    def start(self, batch: int) -> list[Tensor]:
        return list(self.model.init_state(batch).tensors().values())


def load_graph(path: str | Path, device: torch.device) -> Graph:
    """Of a checkpoint or folder, as it is to be written down."""
    return Graph(load_model(path, device).requires_grad_(False))


@contextlib.contextmanager
def chunked(graph: Graph) -> Iterator[None]:
    """The scan in its parallel form: the other would become a loop over one length."""
    config = graph.model.config
    scan, config.scan = config.scan, "chunked"
    try:
        yield
    finally:
        config.scan = scan


def examples(graph: Graph, args) -> dict[str, tuple[Tensor, ...]]:
    """Inputs to trace the graphs with; any sizes do, but a 1 would be taken for a constant."""
    batch, length = max(2, args.batch_size), max(2, args.seq_length)
    state = graph.start(batch)
    return {
        "prefill": (random_ids(graph, batch, length), *state),
        "step": (random_ids(graph, batch, 1), *state),
    }


def random_ids(graph: Graph, batch: int, length: int, seed: int = 0) -> Tensor:
    """(b, l), the same ones for the same arguments."""
    ids = torch.randint(
        0, graph.model.config.vocab_size, (batch, length), generator=torch.manual_seed(seed)
    )
    return ids.to(next(graph.model.parameters()).device)


def programs(graph: Graph, args) -> dict[str, torch.export.ExportedProgram]:
    """What torch.export makes of prefill and of step, once for all formats."""
    batch, length = (torch.export.Dim(name, min=1) for name in ("batch", "length"))
    for name, example in {} if graph.programs else examples(graph, args).items():
        dims = {0: batch, 1: length} if name == "prefill" else {0: batch}
        shapes = (dims, tuple({0: batch} for _ in example[1:]))
        with chunked(graph):
            graph.programs[name] = torch.export.export(
                graph,
                example,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    return graph.programs


# ------------------------------------------------------------------------------------ writing


def write_pytorch(folder: Path, graph: Graph, args) -> None:
    save_folder(folder, graph.model)
    if graph.model.quantization:  # which only such a folder holds
        return
    save_checkpoint(
        folder / "inference.pt",
        {"config": graph.model.config.to_dict(), "model": graph.model.state_dict()},
    )


def write_torchscript(folder: Path, graph: Graph, args) -> None:
    print("torchscript: PyTorch has deprecated TorchScript; torch_export takes its place")
    # PyTorch warns that it is deprecated, and of every constant.
    with warnings.catch_warnings(action="ignore"), chunked(graph):
        module = torch.jit.trace_module(graph, examples(graph, args), check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    (folder / "model.pt").write_bytes(buffer.getbuffer())


def write_torch_export(folder: Path, graph: Graph, args) -> None:
    for name, program in programs(graph, args).items():
        path, buffer = folder / f"{name}.pt2", io.BytesIO()
        if args.aoti:
            with warnings.catch_warnings(action="ignore"):  # PyTorch's, of its own parts
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        else:
            torch.export.save(program, buffer)
            path.write_bytes(buffer.getbuffer())


def write_onnx(folder: Path, graph: Graph, args) -> None:
    names, protos = list(graph.model.init_state(1).tensors()), {}
    graph = with_onnx_layers(graph)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torchvision's absence is no news
    for name, program in programs(graph, args).items():
        with warnings.catch_warnings(action="ignore"):
            made = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["ids", *names],
                output_names=["logits", *(f"new.{n}" for n in names)],
            )
        protos[name] = made.model_proto
        for node in protos[name].graph.node:
            del node.metadata_props[:]  # which line of which file it comes from
        if args.optimize:
            protos[name] = optimize_onnx(name, protos[name], folder)
    share_weights(protos, folder)
    shutil.copy(Path(__file__).with_name("onnx_generate.py"), folder)


class OnnxLinear(nn.Module):
    """A quantized layer as ONNX Runtime's own operator: groups of whole numbers from 0, and scales.

    Of 8 bits, it is fast with activations of bytes only, which it rounds group by group; of 4 bits,
    also with whole ones.
    """

    def __init__(self, layer: QuantizedLinear, size: int):
        super().__init__()
        out, self.bits = layer.out_features, layer.bits
        if self.bits == 4:
            packed, scales = pack(layer.codes, layer.factors), layer.factors * layer.scale[:, None]
        else:
            packed = (layer.codes.int() + 128).to(torch.uint8)  # (out, in)
            packed = nn.functional.pad(packed, (0, -packed.shape[1] % size), value=128)
            scales = layer.scale[:, None].repeat(1, packed.shape[1] // size)
        self.register_buffer("packed", packed.view(out, -1, size * self.bits // 8))
        self.register_buffer("scales", scales)
        self.bias = layer.bias
        bytewise = layer.dynamic or self.bits == 8
        self.about = {
            "K": layer.in_features,
            "N": out,
            "bits": self.bits,
            "block_size": size,
            "accuracy_level": 4 if bytewise else 0,
        }

    def forward(self, x: Tensor) -> Tensor:
        """A place in the graph: only ONNX Runtime computes it."""
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scales),
            attrs=self.about,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.about["N"]),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class OnnxEmbedding(nn.Module):
    """The rows of a quantized head."""

    def __init__(self, head: OnnxLinear):
        super().__init__()
        self.width = head.about["K"]
        self.register_buffer("rows", head.packed.flatten(1))
        self.register_buffer("scale", head.scales[:, :1])

    def forward(self, ids: Tensor) -> Tensor:
        """ids (b, l) -> (b, l, d)."""
        return ((self.rows[ids].float() - 128) * self.scale[ids])[..., : self.width]


def require_onnx_layers(model: TinyMambaModel) -> None:
    """Refuse a quantized model that ONNX Runtime has no operators for."""
    scheme = model.quantization or {"layers": {}}
    if 4 in scheme["layers"].values():
        size = scheme["group_size"]
        require(
            size >= 16 and size & (size - 1) == 0,
            "group_size",
            f"{size} is nothing that ONNX Runtime knows",
            "use a power of 2 from 16 on",
        )
    require(
        not model.config.tie_embeddings or scheme["layers"].get("head", 8) == 8,
        "checkpoint",
        "has a tied head of 4 bits",
        "quantize the head to 8",
    )


def with_onnx_layers(graph: Graph) -> Graph:
    """The graph, if quantized with layers that ONNX Runtime knows."""
    if not graph.model.quantization:
        return graph
    require_onnx_layers(graph.model)
    model, size = copy.deepcopy(graph.model), graph.model.quantization["group_size"]
    for name, bits in model.quantization["layers"].items():
        layer = OnnxLinear(model.get_submodule(name), size if bits == 4 else 64)
        model.set_submodule(name, layer)
    if model.config.tie_embeddings and isinstance(model.head, OnnxLinear):
        model.embedding = OnnxEmbedding(model.head)
    made = Graph(model)
    made.start = graph.start
    return made


def share_weights(protos: dict, folder: Path) -> None:
    """Write the graphs, and beside them, once each, all tensors that take room."""
    onnx = need("onnx")
    places = {}
    with open(folder / "weights.data", "wb") as file:
        for name, proto in protos.items():
            for tensor in proto.graph.initializer:
                data = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(data) < 1024:
                    continue
                key = hashlib.sha256(data).digest()
                if key not in places:
                    places[key] = file.seek(-(-file.tell() // 64) * 64)  # aligned, to be mapped
                    file.write(data)
                tensor.raw_data = data  # so that the library finds it where it puts the note
                onnx.external_data_helper.set_external_data(
                    tensor, "weights.data", places[key], len(data)
                )
                tensor.ClearField("raw_data")
            (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
            onnx.checker.check_model(str(folder / f"{name}.onnx"))


def optimize_onnx(name: str, proto, folder: Path):
    """The graph as ONNX Runtime rewrites it, once and for all instead of at every start."""
    onnx, runtime = need("onnx"), need("onnxruntime")
    paths = {kind: str(folder / f"{kind}.onnx") for kind in ("plain", "better")}
    onnx.save(proto, paths["plain"])
    options = runtime.SessionOptions()
    options.optimized_model_filepath = paths["better"]
    # More would write down what suits this very processor.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    runtime.InferenceSession(paths["plain"], options, ["CPUExecutionProvider"])
    better, seconds = onnx.load(paths["better"]), {}
    for kind, path in paths.items():
        began = time.perf_counter()
        runtime.InferenceSession(path, None, ["CPUExecutionProvider"])
        seconds[kind] = time.perf_counter() - began
        Path(path).unlink()
    print(
        f"onnx: {name}: {len(proto.graph.node)} nodes became {len(better.graph.node)}, "
        f"{seconds['plain']:.2f} s to start became {seconds['better']:.2f}"
    )
    return better


# ------------------------------------------------------------------------------------ running

Step = Callable[..., tuple[Tensor, ...]]  # ids, state's tensors -> logits, state's tensors


def open_pytorch(folder: Path, args) -> tuple[Step, Step]:
    graph = load_graph(folder, args.device)
    return graph.prefill, graph.step


def open_torchscript(folder: Path, args) -> tuple[Step, Step]:
    module = torch.jit.load(folder / "model.pt", map_location=args.device)
    return module.prefill, module.step


def open_torch_export(folder: Path, args) -> tuple[Step, Step]:
    paths = (str(folder / f"{name}.pt2") for name in ("prefill", "step"))
    if args.aoti:
        return tuple(map(torch._inductor.aoti_load_package, paths))
    return tuple(torch.export.load(path).module() for path in paths)


def open_onnx(folder: Path, args) -> tuple[Step, Step]:
    from onnx_generate import OnnxModel

    model = OnnxModel(folder, torch.get_num_threads())
    names = list(model.start())

    def run(ids: Tensor, *state: Tensor) -> list[Tensor]:
        arrays = dict(zip(names, (t.numpy() for t in state), strict=True))
        logits, after = model.advance(ids.numpy(), arrays)
        return [torch.from_numpy(array) for array in (logits, *after.values())]

    return run, run


class Runner:
    """A model at work, as two graphs and the shapes of its state."""

    def __init__(self, prefill: Step, step: Step, state: dict, device: torch.device):
        self.prefill, self.step, self.state, self.device = prefill, step, state, device

    @staticmethod
    def open(name: str, folder: Path, args) -> Runner:
        """An exported model, of which nothing is known but its folder."""
        state = json.loads((folder / "config.json").read_bytes())["state"]
        device = torch.device("cpu") if name == "onnx" else args.device
        return Runner(*FORMATS[name].open(folder, args), state, device)

    def start(self, batch: int) -> list[Tensor]:
        """The state before any token."""
        return [
            torch.zeros(batch, *shape, dtype=getattr(torch, dtype), device=self.device)
            for shape, dtype in self.state.values()
        ]

    @torch.no_grad()
    def advance(self, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """ids (b, l) -> logits (b, v) after the last, and the state."""
        graph = self.step if ids.shape[1] == 1 else self.prefill
        # Compiled graphs take the layout of memory for granted.
        inputs = (t.to(self.device).contiguous() for t in (ids, *state))
        logits, *state = graph(*inputs)
        return logits, state

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The `count` likeliest ids after `ids`, one after another."""
        piece, state, made = torch.tensor([ids]), self.start(1), []
        for _ in range(count):
            logits, state = self.advance(piece, state)
            piece = logits.argmax(-1, keepdim=True)
            made.append(piece.item())
        return made


class Format(NamedTuple):
    write: Callable[[Path, Graph, argparse.Namespace], None]
    open: Callable[[Path, argparse.Namespace], tuple[Step, Step]]


FORMATS = {
    "pytorch": Format(write_pytorch, open_pytorch),
    "torchscript": Format(write_torchscript, open_torchscript),
    "onnx": Format(write_onnx, open_onnx),
    "torch_export": Format(write_torch_export, open_torch_export),
}

# ------------------------------------------------------------------------------------ verifying


class Mismatch(Exception):
    """Where an exported model gives something else than the model."""


class Gap:
    """How far what a model gives is from what it should give, at most."""

    def __init__(self, names: list[str], tolerance: dict[str, float]):
        self.names, self.tolerance = names, tolerance
        self.worst = dict.fromkeys(tolerance, 0.0)

    def add(self, got: list[Tensor], want: list[Tensor], where: str) -> None:
        """Logits, and the state's tensors if they come; a Mismatch if they are too far apart."""
        for name, g, w in zip(["logits", *self.names], got, want, strict=False):
            g, w = g.cpu().double(), w.cpu().double()
            if g.shape != w.shape:
                raise Mismatch(f"{name} is {tuple(g.shape)} and not {tuple(w.shape)} {where}")
            gap = (g - w).abs()
            if name.endswith("phase"):  # a circle of 2
                gap = torch.minimum(gap, 2 - gap)
            share = gap.max().item() / max(1.0, w.abs().max().item())
            kind = "logits" if name == "logits" else "state"
            if not share <= self.tolerance[kind]:  # nor if it is no number
                raise Mismatch(f"{name} differs by {gap.max():.1e} {where}")
            self.worst[kind] = max(self.worst[kind], share)


def verify(runner: Runner, graph: Graph, text: list[int]) -> str:
    """Compare an exported model with the model it was made from; what was found.

    On random ids and on a real text, in pieces of LENGTHS tokens after 70 others, and token by
    token. A Mismatch says where they differ.
    """
    tolerance = ROUNDED if graph.model.quantization else EXACT
    gap = Gap(list(runner.state), tolerance)
    for batch in (1, 3):
        state = graph.prefill(random_ids(graph, batch, 70), *graph.start(batch))[1:]
        for length in LENGTHS:
            where = f"at length {length}, batch {batch}"
            real = [
                [text[(row * 97 + i) % len(text)] for i in range(length)] for row in range(batch)
            ]
            for ids in (random_ids(graph, batch, length, seed=length), torch.tensor(real)):
                logits, after = runner.advance(ids, state)
                want = graph.prefill(ids.to(state[0].device), *state)
                gap.add([logits, *after], want, where)
    same = count_same(runner, graph, text, gap)
    if same < STREAMED * tolerance["same"]:
        raise Mismatch(f"only {same:,} of {STREAMED:,} streamed tokens are the same")
    shown = [
        f"{kind} within {gap.worst[kind]:.1e}"
        for kind in ("logits", "state")
        if tolerance[kind] < math.inf
    ]
    return (
        f"{', '.join(shown)} of the model's; the likeliest token is the same for {same:,} of "
        f"{STREAMED:,} in a row"
    )


def count_same(runner: Runner, graph: Graph, text: list[int], gap: Gap) -> int:
    """Of STREAMED tokens, one at a time, for how many both find the same one likeliest.

    They read what the model itself writes after the first 32 of the text.
    """
    piece, state, own, same = torch.tensor([text[:32]]), runner.start(1), graph.start(1), 0
    for number in range(STREAMED):
        logits, state = runner.advance(piece, state)
        want, *own = graph.prefill(piece.to(own[0].device), *own)
        gap.add([logits], [want], f"at token {number} of a stream")
        piece = want.argmax(-1, keepdim=True).cpu()
        same += torch.equal(logits.argmax(-1, keepdim=True).cpu(), piece)
    return same


# ------------------------------------------------------------------------------------ timing


def measure(runners: dict[str, Runner], graph: Graph, args) -> list[dict]:
    """A row for each exported model and for the model itself; medians of turns."""
    from benchmark import interleave, timed

    runners = {MODEL: Runner(graph.prefill, graph.step, {}, args.device), **runners}
    ids, start = random_ids(graph, args.batch_size, args.seq_length), graph.start(args.batch_size)

    def make(runner: Runner, pieces: list[Tensor]):
        def run() -> None:
            state = start
            for piece in pieces:
                _, state = runner.advance(piece, state)

        return lambda: timed(run, args.device)

    pieces = {"prefill": [ids], "step": [ids[:, :1]] * STEPS}
    timings = interleave(
        {
            (name, kind): functools.partial(make, runner, pieces[kind])
            for name, runner in runners.items()
            for kind in pieces
        },
        1,
        ROUNDS,
    )
    rows = []
    for name in runners:
        prefill, step = (timings[name, kind] for kind in pieces)
        reason = prefill.reason or step.reason
        require(not reason, f"--benchmark: {name}", f"failed ({reason})", "see --verify")
        rows.append(
            {
                "format": name,
                "step_ms": round(1e3 * statistics.median(step.seconds) / STEPS, 3),
                "prefill_tokens_per_second": round(
                    ids.numel() / statistics.median(prefill.seconds)
                ),
                "mb": None if name == MODEL else round(megabytes(args.output_dir / name), 1),
            }
        )
    return rows


def report(rows: list[dict], args) -> None:
    """Print the table, and write it as benchmark.json."""
    from benchmark import table

    about = {name: getattr(args, name) for name in ("batch_size", "seq_length")}
    write_json(
        args.output_dir / "benchmark.json",
        {**about, "threads": torch.get_num_threads(), "device": str(args.device), "rows": rows},
    )
    lines = [["", "prefill, tokens a second", "a step, ms", "times as fast", "MB on disk"]]
    lines += [
        [
            row["format"],
            f"{row['prefill_tokens_per_second']:,}",
            f"{row['step_ms']:.2f}",
            f"{rows[0]['step_ms'] / row['step_ms']:.2f}",
            str(row["mb"] or ""),
        ]
        for row in rows
    ]
    print(table(lines), end="")


# ------------------------------------------------------------------------------------ main


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CliParser(
        usage="python export_model.py --checkpoint FILE [--FLAG VALUE ...]", description=__doc__
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        default="tinymamba_model_latest.pt",
        metavar="FILE",
        help="a checkpoint, or a folder of weights [tinymamba_model_latest.pt]",
    )
    add(
        "--output_dir",
        type=Path,
        default=Path("exported_models"),
        metavar="DIR",
        help="of a folder for each format [exported_models]",
    )
    add("--format", choices=[*FORMATS, "all"], default="all", help="[all]")
    add("--optimize", action="store_true", help="onnx: rewrite the graphs for a faster start")
    add("--aoti", action="store_true", help="torch_export: compile ahead of time")
    add(
        "--quantize",
        choices=("int8", "int4", "both"),
        help="pytorch and onnx: linear layers of so many bits instead of float32",
    )
    add("--calibration_data", metavar="FILE", help="a .bin of tokens, which int4 needs")
    add(
        "--group_size",
        type=int,
        default=64,
        metavar="INT",
        help="of int4: inputs that share a factor [64]",
    )
    add("--calibration_tokens", type=int, default=65_536, metavar="INT", help="of it [65536]")
    add(
        "--batch_size",
        type=int,
        default=1,
        metavar="INT",
        help="texts that --benchmark runs side by side; exported models take any number [1]",
    )
    add(
        "--seq_length",
        type=int,
        default=128,
        metavar="INT",
        help="tokens of its prompt; exported models take any number [128]",
    )
    add("--device", default="cpu", help="auto, cpu, cuda or mps: where the graphs are to run [cpu]")
    add(
        "--vocab_file",
        metavar="FILE",
        help="tokenizer.json or vocab.txt to take along; else beside checkpoint or training data",
    )
    add("--verify", action="store_true", help="compare with the model; exit 1 where they differ")
    add("--benchmark", action="store_true", help="time the exported models, and the model itself")
    add("--generate", action="store_true", help="continue --prompt with the exported models")
    add("--prompt", default="import os\n", help="[import os]")
    add("--max_tokens", type=int, default=40, metavar="INT", help="of --generate [40]")
    add("--force", action="store_true", help="replace what is in --output_dir")
    args = parser.parse_args(argv)
    args.formats = list(FORMATS) if args.format == "all" else [args.format]
    args.schemes = [""]
    if args.quantize:
        args.schemes = ["_int8", "_int4"] if args.quantize == "both" else [f"_{args.quantize}"]
        args.formats = ["pytorch", "onnx"] if args.format == "all" else args.formats
    for name in ("batch_size", "seq_length", "max_tokens"):
        value = getattr(args, name)
        require(value >= 1, f"--{name}", f"{value} is not legal", "pass 1 or more")
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is made."""
    for flag, name in (("optimize", "onnx"), ("aoti", "torch_export")):
        require(
            not getattr(args, flag) or name in args.formats,
            f"--{flag}",
            f"does nothing for {args.format}",
            f"leave it out, or pass --format {name}",
        )
    require(
        not args.quantize or {*args.formats} <= {"pytorch", "onnx"},
        "--quantize",
        f"makes {args.format} smaller, but not faster",
        "pass --format pytorch or onnx",
    )
    needed = "_int4" in args.schemes
    require(
        bool(args.calibration_data) == needed,
        "--calibration_data",
        "int4 needs it" if needed else "only int4 needs it",
        "pass a .bin of tokens, such as data/text/train.bin" if needed else "leave it out",
    )
    args.device = pick_device(args.device)
    problem = why_no_compile(args.device) if args.aoti else None
    require(not problem, "--aoti", f"{problem}", "leave it out")
    if "onnx" in args.formats:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            need(package)
    names = ["".join(pair) for pair in itertools.product(args.formats, args.schemes)]
    for path in (args.output_dir / name for name in names + ["benchmark.json"] * args.benchmark):
        require(
            args.force or not path.exists(),
            str(path),
            "is there already",
            "pass --force or another --output_dir",
        )
        ours = not path.is_dir() or (path / "config.json").exists()
        require(ours, str(path), "is no exported model", "pass another --output_dir")


def export(name: str, scheme: str, graph: Graph, tokenizer, args) -> str:
    """Write one format, verified if asked for; what is to be said of it."""
    tensors = graph.model.init_state(1).tensors().items()
    shapes = {n: [list(t.shape[1:]), str(t.dtype).removeprefix("torch.")] for n, t in tensors}
    with new_folder(args.output_dir / (name + scheme)) as folder:
        FORMATS[name].write(folder, graph, args)
        write_json(folder / "config.json", {**describe_model(graph.model), "state": shapes})
        copy_tokenizer(tokenizer, folder)
        if name == "onnx" and not (folder / "tokenizer.json").exists():
            print("onnx: there is no tokenizer.json, so that onnx_generate.py takes ids only")
        said = f"{megabytes(folder):.1f} MB"
        if args.verify:
            text = real_text(graph, tokenizer, args.prompt)
            said += "; " + verify(Runner.open(name, folder, args), graph, text)
        return said


def make_graphs(graph: Graph, args) -> dict[str, Graph]:
    """By the ending of their folders: the graph itself, or those of quantized models."""
    if not args.quantize:
        return {"": graph}
    from quantize import quantize_model, read_blocks

    graphs = {}
    for scheme in args.schemes:
        if scheme == "_int8":
            model = quantize_model(graph.model, 8, "dynamic")
        else:
            blocks = read_blocks(args.calibration_data, graph.model, args.calibration_tokens)
            model = quantize_model(graph.model, 4, "weight_only", args.group_size, blocks)
        graphs[scheme] = Graph(model)
    return graphs


def read_prompt(tokenizer, graph: Graph, args) -> list[int]:
    """The ids of --prompt."""
    require(tokenizer, "--vocab_file", "no tokenizer was found", "name one")
    ids, size = tokenizer.encode(args.prompt), graph.model.config.vocab_size
    require(ids, "--prompt", "holds no token", "pass some text")
    require(
        max(ids) < size,
        "--vocab_file",
        f"gives ids beyond the model's {size}",
        "pass the one it was trained with",
    )
    return ids


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


def real_text(graph: Graph, tokenizer, prompt: str) -> list[int]:
    """Ids of the prompt and of this file, or of its bytes, where there is no tokenizer."""
    text, size = prompt + Path(__file__).read_text(encoding="utf-8"), graph.model.config.vocab_size
    return [i % size for i in (tokenizer.encode(text) if tokenizer else text.encode())]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    graph, failed, runners = load_graph(args.checkpoint, args.device), False, {}
    tokenizer = open_tokenizer(args.vocab_file, graph.model, [args.checkpoint])
    prompt = read_prompt(tokenizer, graph, args) if args.generate else []
    graphs = make_graphs(graph, args)
    for made in graphs.values() if "onnx" in args.formats else ():
        require_onnx_layers(made.model)
    require_writable(args.output_dir, "--output_dir")
    for scheme, name in itertools.product(graphs, args.formats):
        folder = args.output_dir / (name + scheme)
        try:
            print(f"{folder}: {export(name, scheme, graphs[scheme], tokenizer, args)}", flush=True)
        except Mismatch as e:
            print(f"error: {folder.name}: {e}; nothing is kept of it", file=sys.stderr)
            failed = True
            continue
        if args.generate or args.benchmark:
            runners[folder.name] = Runner.open(name, folder, args)
    for name, runner in runners.items() if args.generate else ():
        text = tokenizer.decode(runner.generate(prompt, args.max_tokens))
        print(f"--- {name}\n{args.prompt}{text}")
    if args.benchmark:
        report(measure(runners, graph, args), args)
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
