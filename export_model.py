"""Export: a trained model as files that work without the training code.

    python export_model.py --checkpoint ./tinymamba_model_latest.pt --format all --verify --generate
    python export_model.py --format onnx --optimize --benchmark --output_dir ./exported_models
    python export_model.py --format torch_export --aoti  # compiled ahead of time
    python export_model.py --format onnx --quantize both --calibration_data data/text/train.bin
    python exported_models/onnx/onnx_generate.py --prompt "Once upon a time"  # no PyTorch needed

Each format is a folder below --output_dir, with config.json and the tokenizer:

    pytorch       model.safetensors, which load_model, streaming.py and all other tools read, and
                  inference.pt, a checkpoint without the training state
    torchscript   model.pt for torch.jit.load, which PyTorch has deprecated: use torch_export
    onnx          prefill.onnx and step.onnx, which share weights.data, and onnx_generate.py
    torch_export  prefill.pt2 and step.pt2 for torch.export.load; with --aoti compiled, for
                  torch._inductor.aoti_load_package

The format web is a site, or with --single_file one page, that runs the model in the browser:

    npm install --no-package-lock onnxruntime-web@1.30.0 @huggingface/jinja@0.5.11
    python export_model.py --format web --output_dir site [--quantize int8] [--single_file]

With --quantize the folders are pytorch_int8, onnx_int4 and so on, and quantize.py does the work.

Every graph is a function from ids and a state to the logits of the last token and the new state.
prefill takes ids (b, l) with any l >= 1, step takes ids (b, 1). A state is a list of tensors:
config.json has their shapes, and the first state is all zeros. Compiled graphs need contiguous
tensors.

Letters in the comments on shapes:
    b batch      l length      d width of the model      v vocabulary
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
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
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
from torch import Tensor, nn

from testv2 import (
    FOLDER_FIELDS,
    LayerState,
    ModelState,
    TinyMambaModel,
    describe_model,
    load_model,
    save_folder,
)
from tinymamba.checkpoint import (
    digest,
    name_of,
    new_folder,
    require_writable,
    save_model,
    write_json,
)
from tinymamba.cli import UserError, need, parse_flags, require, run_cli
from tinymamba.kernels import QuantizedLinear
from tinymamba.live import matrix_norms
from tinymamba.lock import hold_lock
from tinymamba.onnx_engine import GRAPH_FILES, GRAPHS, OUTPUTS, OnnxEngine
from tinymamba.runtime import pick_device, why_no_compile
from tinymamba.streaming_config import StreamingConfig
from tinymamba.tokenizer import open_tokenizer, why_no_tokenizer, write_tokenizer
from tinymamba.web_site import (
    find_files,
    find_foreign,
    find_runtime,
    is_site,
    write_single_file,
    write_site,
)

# --verify: the largest difference of values up to 1, and the largest relative one of larger values;
# the share of streamed tokens that must be the same. A state sums over the whole text, and so do
# its rounding errors: of quantized models only the logits are compared.
EXACT = {"logits": 1e-4, "state": 1e-3, "same": 1.0}
ROUNDED = {"logits": 0.1, "state": math.inf, "same": 0.95}
LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 513, 4096)  # of the ids that --verify compares
STREAMED = 2000  # tokens that --verify streams one by one
ROUNDS, STEPS = 7, 32  # of --benchmark: how often it runs, and tokens of a run of step
MODEL = "the model"  # its row in the table of --benchmark
PAGE = Path(__file__).resolve().parent / "page.html"

# ------------------------------------------------------------------------------------ graphs


class Graph(nn.Module):
    """The model as functions of tensors: ids and a state -> last logits and the new state."""

    OUTPUTS: tuple[str, ...] = ("logits",)
    BATCHED: tuple[str, ...] = GRAPHS  # those that take any number of texts; others take one

    def __init__(self, model: TinyMambaModel):
        super().__init__()
        self.model = model
        kinds = len(LayerState._fields)
        self.sizes = [kinds - (block.attention.memory is None) for block in model.blocks]
        self.programs: dict[str, torch.export.ExportedProgram] = {}

    def prefill(self, ids: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """ids (b, l) and ModelState.tensors() -> OUTPUTS and the new state's tensors."""
        rest = iter(tensors)  # `size` of them for each block, then two
        layers = [LayerState(*itertools.islice(rest, size)) for size in self.sizes]
        *outputs, state = self.advance(ids, ModelState(layers, *rest))
        return *outputs, *(t.contiguous() for t in state.tensors().values())

    step = forward = prefill

    def advance(self, ids: Tensor, state: ModelState) -> tuple[Any, ...]:
        """ids (b, l) and a state -> logits (b, v) of the last token and the new state."""
        logits, state = self.model.advance(ids, state, last_only=True)  # (b, 1, v)
        return logits[:, -1], state

    def start(self, batch: int) -> list[Tensor]:
        """The state before any token."""
        return list(self.model.init_state(batch).tensors().values())


class EngineGraph(Graph):
    """What a StreamingServer uses of the model, for OnnxEngine."""

    OUTPUTS = OUTPUTS
    BATCHED = ("step",)  # the server reads prompts one by one; traced so in half the time

    def advance(self, ids: Tensor, state: ModelState) -> tuple[Any, ...]:
        """The same, with hidden (b, l, d) before and gates (n_layer, b, 1, 3) after the logits."""
        hidden, state, gates = self.model.run(ids, state)
        return hidden, self.model.head(hidden[:, -1]), gates[:, :, -1:], state


class WebGraph(Graph):
    """What engine.js uses of the model: one text, and what its page shows of every token."""

    OUTPUTS = ("logits", "gates", "norms")
    BATCHED = ()  # shapes that are known keep the graphs small, and steps short

    def advance(self, ids: Tensor, state: ModelState) -> tuple[Any, ...]:
        """The same, with gates (n_layer, 3) and the norms of the new state's heads after it.

        norms (n,) has for each layer those of the SSM state's heads, then of its memory's, if any.
        """
        hidden, state, gates = self.model.run(ids, state)
        parts = [part for layer in state.layers for part in (layer.ssm, layer.memory)]
        norms = [matrix_norms(part)[0] for part in parts if part is not None]
        return self.model.head(hidden[:, -1]), gates[:, 0, -1], torch.cat(norms), state


def load_graph(path: str | Path, device: str) -> Graph:
    """The graph of a checkpoint or a folder."""
    return Graph(load_model(path, device).requires_grad_(False))


@contextlib.contextmanager
def chunked(graph: Graph) -> Iterator[None]:
    """The scan in chunks: a sequential one would be unrolled to one length."""
    config = graph.model.config
    scan, config.scan = config.scan, "chunked"
    try:
        yield
    finally:
        config.scan = scan


def random_ids(graph: Graph, batch: int, length: int, seed: int = 0) -> Tensor:
    """Ids (b, l), the same ones for the same arguments."""
    size, random = graph.model.config.vocab_size, torch.Generator().manual_seed(seed)
    ids = torch.randint(0, size, (batch, length), generator=random)
    return ids.to(next(graph.model.parameters()).device)


def examples(graph: Graph, options: Options) -> dict[str, tuple[Tensor, ...]]:
    """Inputs to trace the graphs with; a size of 1 would become a constant."""
    length, inputs = max(2, options.seq_length), {}
    for name, count in zip(GRAPHS, (length, 1), strict=True):
        texts = max(2, options.batch_size) if name in graph.BATCHED else 1
        inputs[name] = (random_ids(graph, texts, count), *graph.start(texts))
    return inputs


def programs(graph: Graph, options: Options) -> dict[str, torch.export.ExportedProgram]:
    """prefill and step as torch.export makes them, once for all formats."""
    batch, length = (torch.export.Dim(name, min=1) for name in ("batch", "length"))
    for name, inputs in {} if graph.programs else examples(graph, options).items():
        rows = {0: batch} if name in graph.BATCHED else {}
        dims = {**rows, 1: length} if name == "prefill" else rows
        shapes = (dims, tuple(rows for _ in inputs[1:]))
        # Comparing sizes that are symbols takes longer than what PyTorch's cache of shapes saves.
        with chunked(graph), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            graph.programs[name] = torch.export.export(
                graph,
                inputs,
                dynamic_shapes=shapes,
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    return graph.programs


# ------------------------------------------------------------------------------------ writing


def write_pytorch(folder: Path, graph: Graph, options: Options) -> None:
    """model.safetensors and config.json; inference.pt unless quantized."""
    model = graph.model
    save_folder(folder, model)
    if not model.quantization:  # a checkpoint cannot hold quantized layers
        save_model(folder / "inference.pt", model)


def write_torchscript(folder: Path, graph: Graph, options: Options) -> None:
    """model.pt, with methods prefill and step."""
    print("torchscript: PyTorch has deprecated TorchScript; torch_export takes its place")
    # PyTorch warns that it is deprecated, and about every constant.
    with warnings.catch_warnings(action="ignore"), chunked(graph):
        module = torch.jit.trace_module(graph, examples(graph, options), check_trace=False)
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    (folder / "model.pt").write_bytes(buffer.getbuffer())


def write_torch_export(folder: Path, graph: Graph, options: Options) -> None:
    """prefill.pt2 and step.pt2."""
    for name, program in programs(graph, options).items():
        path, buffer = folder / f"{name}.pt2", io.BytesIO()
        if options.aoti:
            show_sizes_to_scans(program)
            with warnings.catch_warnings(action="ignore"):  # PyTorch warns about its own code
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        else:
            torch.export.save(program, buffer)
            path.write_bytes(buffer.getbuffer())
    if options.aoti:
        graph.programs.clear()  # other formats cannot use the changed ones


def show_sizes_to_scans(program: torch.export.ExportedProgram) -> None:
    """Give batch and length to every `scan` of a graph, as inputs that it does not use.

    The compiler allocates the outputs of a scan, and knows no other sizes than those among its
    inputs (PyTorch 2.13).
    """
    graph, module = program.graph, program.graph_module
    ids = next(node for node in graph.nodes if node.name == "ids")
    for node in graph.find_nodes(op="call_function", target=torch.ops.higher_order.scan):
        body, first, parts, rest = node.args
        inside = getattr(module, body.target)
        for dim, size in enumerate(ids.meta["val"].shape):
            with graph.inserting_before(node):
                rest = (*rest, graph.call_function(torch.ops.aten.sym_size.int, (ids, dim)))
            last = inside.graph.find_nodes(op="placeholder")[-1]
            with inside.graph.inserting_after(last):
                unused = inside.graph.placeholder(f"size_{dim}")
            unused.meta["val"] = rest[-1].meta["val"] = size
        node.args = (body, first, parts, rest)
        inside.recompile()
    module.recompile()


def write_onnx(folder: Path, graph: Graph, options: Options) -> None:
    """prefill.onnx, step.onnx, weights.data and onnx_generate.py."""
    write_onnx_graphs(folder, graph, options)
    shutil.copy(Path(__file__).with_name("onnx_generate.py"), folder)


def write_web(folder: Path, graph: Graph, options: Options) -> None:
    """A site: its page, and in a folder the graphs, the tokenizer and ONNX Runtime."""
    model, optimized = graph.model, dataclasses.replace(options, optimize=True)
    write_onnx_graphs(folder, WebGraph(model), optimized)
    write_tokenizer(model.tokenizer, folder)
    site = describe_site(graph, options.site_name())
    config = {**describe_model(model), "state": describe_state(graph), "web": site}
    write_site(folder, PAGE, find_runtime(options.runtime), config)


def describe_site(graph: Graph, name: str) -> dict[str, Any]:
    """What engine.js has to know of a model, besides the content of config.json."""
    model, record = graph.model, graph.model.tokenizer or {}
    tokenizer = open_tokenizer(None, model, [])
    eos = model.config.eos_id if model.config.eos_id >= 0 else tokenizer.eos_token_id
    layers = model.init_state(1).layers
    heads = [[t.shape[1] if t is not None else 0 for t in (x.ssm, x.memory)] for x in layers]
    chat = {"template": record["chat_template"], "special_tokens": record["special_tokens"] or {}}
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    sizes = [p.numel() for p in model.parameters()]
    sizes += [layer.in_features * layer.out_features for layer in packed]
    return {
        "name": name,
        "fingerprint": model.fingerprint(),
        "parameters": sum(sizes),
        "heads": heads,  # of each layer: of the SSM state, and of the memory
        "eos_id": -1 if eos is None else eos,
        "config": json.dumps(dataclasses.asdict(StreamingConfig())),  # of new sessions
        "tokenizer_file": record["name"],
        "chat": chat if record["chat_template"] else None,
    }


def write_onnx_graphs(folder: Path, graph: Graph, options: Options) -> None:
    """prefill.onnx, step.onnx and weights.data."""
    names, protos = list(graph.model.init_state(1).tensors()), {}
    graph = with_onnx_layers(graph)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    for name, program in programs(graph, options).items():
        with warnings.catch_warnings(action="ignore"):
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["ids", *names],
                output_names=[*graph.OUTPUTS, *(f"new.{n}" for n in names)],
                custom_translation_table={torch.ops.aten.cos.default: cosine_as_sine},
            )
        protos[name] = exported.model_proto
        for node in protos[name].graph.node:
            del node.metadata_props[:]  # the source file and line of each node
        if options.optimize:
            protos[name] = optimize_onnx(name, protos[name], folder)
    write_onnx_files(protos, folder)


# --------------------------------------------------------------------------------------- onnx


def cosine_as_sine(angle: Any) -> Any:
    """cos(x) as sin(x + pi/2): ONNX Runtime before 1.29 has no cosine in float64."""
    onnx, operators = need("onnx"), need("onnxscript").opset18
    quarter = onnx.helper.make_tensor("quarter", onnx.TensorProto.DOUBLE, [], [math.pi / 2])
    quarter = operators.CastLike(operators.Constant(value=quarter), angle)
    return operators.Sin(operators.Add(angle, quarter))


class OnnxLinear(nn.Module):
    """A quantized layer as ONNX Runtime's MatMulNBits: unsigned codes in groups, with scales.

    For 8 bits that operator is fast only if it rounds activations to 8 bits, too (accuracy_level
    4); for 4 bits it is also fast with float32 activations.
    """

    def __init__(self, layer: QuantizedLinear, size: int):
        super().__init__()
        out, self.bits = layer.out_features, layer.bits
        if self.bits == 4:
            packed, scales = layer.pack(), layer.get_factors() * layer.scale[:, None]
        else:
            packed = (layer.codes.int() + 128).to(torch.uint8)  # (out, in)
            packed = nn.functional.pad(packed, (0, -packed.shape[1] % size), value=128)
            scales = layer.scale[:, None].repeat(1, packed.shape[1] // size)
        self.register_buffer("packed", packed.view(out, -1, size * self.bits // 8))
        self.register_buffer("scales", scales)  # (out, groups)
        self.bias = layer.bias
        self.attributes = {
            "K": layer.in_features,
            "N": out,
            "bits": self.bits,
            "block_size": size,
            "accuracy_level": 4 if layer.dynamic or self.bits == 8 else 0,
        }

    def forward(self, x: Tensor) -> Tensor:
        """A node of the graph, which only ONNX Runtime can compute."""
        y = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.packed, self.scales),
            attrs=self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.attributes["N"]),
            version=1,
        )
        return y if self.bias is None else y + self.bias


class OnnxEmbedding(nn.Module):
    """The embedding that is tied to a quantized head."""

    def __init__(self, head: OnnxLinear):
        super().__init__()
        self.width = head.attributes["K"]
        self.register_buffer("rows", head.packed.flatten(1))
        self.register_buffer("scale", head.scales[:, :1])

    def forward(self, ids: Tensor) -> Tensor:
        """ids (b, l) -> (b, l, d)."""
        return ((self.rows[ids].float() - 128) * self.scale[ids])[..., : self.width]


def require_onnx_layers(model: TinyMambaModel) -> None:
    """Reject a quantized model that ONNX Runtime has no operators for."""
    scheme = model.quantization or {"layers": {}}
    if 4 in scheme["layers"].values():
        size = scheme["group_size"]
        problem, remedy = f"ONNX Runtime has no groups of {size}", "use a power of 2 from 16 on"
        require(size >= 16 and size & (size - 1) == 0, "group_size", problem, remedy)
    fits = not model.config.tie_embeddings or scheme["layers"].get("head", 8) == 8
    require(fits, "checkpoint", "has a tied head of 4 bits", "quantize the head to 8 bits")


def with_onnx_layers(graph: Graph) -> Graph:
    """The graph with its quantized layers, if any, as ONNX Runtime's."""
    if not graph.model.quantization:
        return graph
    require_onnx_layers(graph.model)
    model, size = copy.deepcopy(graph.model), graph.model.quantization["group_size"]
    for name, bits in model.quantization["layers"].items():
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, OnnxLinear(layer, size if bits == 4 else 64))
    if model.config.tie_embeddings and isinstance(model.head, OnnxLinear):
        model.embedding = OnnxEmbedding(model.head)
    converted: Any = type(graph)(model)
    converted.start = graph.start  # init_state needs the weight that OnnxEmbedding lacks
    return converted


def write_onnx_files(protos: dict[str, Any], folder: Path) -> None:
    """Write the graphs, and their large tensors once for both to weights.data."""
    onnx: Any = need("onnx")
    offsets: dict[bytes, int] = {}
    with open(folder / "weights.data", "wb") as file:
        for name, proto in protos.items():
            for tensor in proto.graph.initializer:
                data = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(data) < 1024:
                    continue
                key = hashlib.sha256(data).digest()
                if key not in offsets:
                    offsets[key] = file.seek(-(-file.tell() // 64) * 64)  # aligned, for mmap
                    file.write(data)
                tensor.raw_data = data  # set_external_data works on raw_data only
                place = offsets[key], len(data)
                onnx.external_data_helper.set_external_data(tensor, "weights.data", *place)
                tensor.ClearField("raw_data")
            (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
            onnx.checker.check_model(str(folder / f"{name}.onnx"))


def optimize_onnx(name: str, proto: Any, folder: Path) -> Any:
    """The graph as ONNX Runtime optimizes it: done once here instead of at every start."""
    onnx: Any = need("onnx")
    runtime: Any = need("onnxruntime")
    paths = {kind: str(folder / f"{kind}.onnx") for kind in ("plain", "optimized")}
    onnx.save(proto, paths["plain"])
    options = runtime.SessionOptions()
    options.optimized_model_filepath = paths["optimized"]
    # A higher level would optimize for this processor only.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    runtime.InferenceSession(paths["plain"], options, ["CPUExecutionProvider"])
    optimized, seconds = onnx.load(paths["optimized"]), {}
    for kind, path in paths.items():
        began = time.perf_counter()
        runtime.InferenceSession(path, None, ["CPUExecutionProvider"])
        seconds[kind] = time.perf_counter() - began
        Path(path).unlink()
    counts = f"{len(proto.graph.node)} nodes became {len(optimized.graph.node)}"
    start = f"{seconds['plain']:.2f} s to start became {seconds['optimized']:.2f}"
    print(f"onnx: {name}: {counts}, {start}")
    return optimized


# ------------------------------------------------------------------------------------ running

Step = Callable[..., Sequence[Tensor]]  # ids, state's tensors -> logits, state's tensors


def open_pytorch(folder: Path, options: Options) -> tuple[Step, Step]:
    """prefill and step of a folder in the format pytorch."""
    graph = load_graph(folder, options.device)
    return graph.prefill, graph.step


def open_torchscript(folder: Path, options: Options) -> tuple[Step, Step]:
    """prefill and step of a folder in the format torchscript."""
    module = torch.jit.load(folder / "model.pt", map_location=options.device)
    return module.prefill, module.step


def open_torch_export(folder: Path, options: Options) -> tuple[Step, Step]:
    """prefill and step of a folder in the format torch_export."""
    prefill, step = (str(folder / f"{name}.pt2") for name in ("prefill", "step"))
    if options.aoti:
        load = torch._inductor.aoti_load_package
        return load(prefill), load(step)
    return torch.export.load(prefill).module(), torch.export.load(step).module()


def open_onnx(folder: Path, options: Options) -> tuple[Step, Step]:
    """prefill and step of a folder in the format onnx, or of the graphs of a site."""
    from onnx_generate import OnnxModel

    model = OnnxModel(folder, torch.get_num_threads())
    names = list(model.start())

    def run(ids: Tensor, *state: Tensor) -> list[Tensor]:
        arrays = dict(zip(names, (t.numpy() for t in state), strict=True))
        logits, after = model.advance(ids.numpy(), arrays)
        return [torch.from_numpy(array) for array in (logits, *after.values())]

    return run, run


class Runner:
    """Runs a model that is two graphs, from the shapes of its state."""

    def __init__(self, prefill: Step, step: Step, state: dict, device: str):
        """`state`: the shape and the dtype of each tensor by name, as in config.json."""
        self.prefill, self.step, self.state, self.device = prefill, step, state, device

    @staticmethod
    def open(name: str, folder: Path, options: Options) -> Runner:
        """An exported model, from its folder alone."""
        folder = find_files(folder) if name == WEB else folder
        state = json.loads((folder / "config.json").read_bytes())["state"]
        device = "cpu" if name in ONNX else options.device
        return Runner(*FORMATS.get(name, SITE).open(folder, options), state, device)

    def start(self, batch: int) -> list[Tensor]:
        """The state before any token."""
        return [
            torch.zeros(batch, *shape, dtype=getattr(torch, dtype), device=self.device)
            for shape, dtype in self.state.values()
        ]

    @torch.no_grad()
    def advance(self, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """ids (b, l) -> logits (b, v) of the last token, and the new state."""
        graph = self.step if ids.shape[1] == 1 else self.prefill
        # Compiled graphs do not check the memory layout of their inputs.
        inputs = (t.to(self.device).contiguous() for t in (ids, *state))
        logits, *state = graph(*inputs)
        return logits, state

    def generate(self, ids: list[int], count: int) -> list[int]:
        """The `count` ids that follow, each the likeliest one."""
        unread, state, generated = torch.tensor([ids]), self.start(1), []
        for _ in range(count):
            logits, state = self.advance(unread, state)
            unread = logits.argmax(-1, keepdim=True)
            generated.append(int(unread))
        return generated


class Format(NamedTuple):
    """How a format is written to a folder, and opened from it."""

    write: Callable[[Path, Graph, Options], None]
    open: Callable[[Path, Options], tuple[Step, Step]]


FORMATS = {
    "pytorch": Format(write_pytorch, open_pytorch),
    "torchscript": Format(write_torchscript, open_torchscript),
    "onnx": Format(write_onnx, open_onnx),
    "torch_export": Format(write_torch_export, open_torch_export),
}
WEB = "web"  # not one of --format all, which writes folders
SITE = Format(write_web, open_onnx)
ONNX = ("onnx", WEB)

# ------------------------------------------------------------------------------------ verifying


class Mismatch(Exception):
    """An exported model differs from the model: where, and by how much."""


class Comparison:
    """Compares outputs with those of the model, and keeps the largest differences."""

    def __init__(self, names: list[str], tolerance: dict[str, float]):
        """`names` of the state's tensors."""
        self.names, self.tolerance = names, tolerance
        self.worst = dict.fromkeys(tolerance, 0.0)

    def add(self, got: Sequence[Tensor], want: Sequence[Tensor], where: str) -> None:
        """Compare logits, and tensors of the state if given; a large difference is a Mismatch."""
        for name, g, w in zip(["logits", *self.names], got, want, strict=False):
            g, w = g.cpu().double(), w.cpu().double()
            if g.shape != w.shape:
                raise Mismatch(f"{name} is {tuple(g.shape)} and not {tuple(w.shape)} {where}")
            difference = (g - w).abs()
            if name.endswith("phase"):  # in half turns: 0 and 2 are the same
                difference = torch.minimum(difference, 2 - difference)
            relative = difference.max().item() / max(1.0, w.abs().max().item())
            kind = "logits" if name == "logits" else "state"
            if not relative <= self.tolerance[kind]:  # true for NaN, too
                raise Mismatch(f"{name} differs by {difference.max():.1e} {where}")
            self.worst[kind] = max(self.worst[kind], relative)


def verify(runner: Runner, graph: Graph, text: list[int], batches: Sequence[int] = (1, 3)) -> str:
    """Compare an exported model with the model itself; returns a summary, or raises a Mismatch.

    It reads random ids and real text of every length in LENGTHS, after 70 other tokens, as many
    texts at once as `batches` says, and then STREAMED tokens one by one.
    """
    tolerance = ROUNDED if graph.model.quantization else EXACT
    comparison = Comparison(list(runner.state), tolerance)
    states = {}
    for batch in batches:
        ids = random_ids(graph, batch, 70)
        states[batch] = list(graph.prefill(ids, *graph.start(batch))[1:])
    for batch, length in itertools.product(states, LENGTHS):
        where, state = f"at length {length}, batch {batch}", states[batch]
        rows = [[text[(row * 97 + i) % len(text)] for i in range(length)] for row in range(batch)]
        for ids in (random_ids(graph, batch, length, seed=length), torch.tensor(rows)):
            logits, after = runner.advance(ids, state)
            want = graph.prefill(ids.to(state[0].device), *state)
            comparison.add([logits, *after], want, where)
    same = count_same(runner, graph, text, comparison)
    if same < STREAMED * tolerance["same"]:
        raise Mismatch(f"only {same:,} of {STREAMED:,} streamed tokens are the same")
    compared = [kind for kind in ("logits", "state") if tolerance[kind] < math.inf]
    within = ", ".join(f"{kind} within {comparison.worst[kind]:.1e}" for kind in compared)
    likeliest = f"the likeliest token is the same for {same:,} of {STREAMED:,} in a row"
    return f"{within} of the model's; {likeliest}"


def count_same(runner: Runner, graph: Graph, text: list[int], comparison: Comparison) -> int:
    """For how many of STREAMED tokens in a row the likeliest token is the model's.

    Both read what the model itself generates after the first 32 tokens of the text.
    """
    unread, state, own, same = torch.tensor([text[:32]]), runner.start(1), graph.start(1), 0
    for number in range(STREAMED):
        logits, state = runner.advance(unread, state)
        want, *own = graph.prefill(unread.to(own[0].device), *own)
        comparison.add([logits], [want], f"at token {number} of a stream")
        unread = want.argmax(-1, keepdim=True).cpu()
        same += torch.equal(logits.argmax(-1, keepdim=True).cpu(), unread)
    return same


# ------------------------------------------------------------------------------------ engine


def open_engine(model: TinyMambaModel, cache: Path) -> OnnxEngine:
    """ONNX Runtime for a StreamingServer: graphs that are exported once and kept in `cache`.

    They are compared with the model, so that graphs of another version of its code are not used.
    """
    require_onnx_layers(model)
    require_writable(cache, "onnx_folder")
    graph, remedy = EngineGraph(model), "use the engine torch"
    config = {name: getattr(model.config, name) for name in FOLDER_FIELDS}
    folder = cache / digest({"model": model.fingerprint(), "config": config})[:32]
    with hold_lock(cache / f"{folder.name}.lock", "onnx_folder", remedy, wait=True):
        with contextlib.suppress(Mismatch):
            return open_checked(folder, graph)
        for rest in cache.glob(f"{folder.name}.*/"):  # of an export that was killed
            shutil.rmtree(rest)
        write_engine(folder, graph)
        try:
            return open_checked(folder, graph)
        except Mismatch as e:
            raise UserError(str(folder), str(e), remedy) from None


def write_engine(folder: Path, graph: EngineGraph) -> None:
    """The graphs of a model, and the hash of each file."""
    for package in ("onnx", "onnxscript"):
        need(package)
    message = f"exporting the model to {folder}: this takes minutes, but only once"
    print(message, file=sys.stderr, flush=True)
    with new_folder(folder) as made:
        write_onnx_graphs(made, graph, Options(batch_size=2))
        write_json(made / "config.json", {"files": hash_files(made)})


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the graphs and their weights."""
    hashes = {}
    for name in GRAPH_FILES:
        with open(folder / name, "rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


@torch.no_grad()
def open_checked(folder: Path, graph: EngineGraph) -> OnnxEngine:
    """The engine of a folder; a Mismatch if it is missing or damaged, or differs from the model."""
    try:
        whole = json.loads((folder / "config.json").read_bytes())["files"] == hash_files(folder)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise Mismatch("is damaged")
    engine, state = OnnxEngine(folder, torch.get_num_threads()), graph.model.init_state(1)
    names = ["hidden", "gates", *state.tensors()]
    comparison = Comparison(names, ROUNDED if graph.model.quantization else EXACT)
    for ids in (random_ids(graph, 1, 9), random_ids(graph, 2, 1)):
        got, want = engine.run(ids, state), graph.advance(ids, state)
        comparison.add(logits_first(*got), logits_first(*want), f"at length {ids.shape[1]}")
        state = ModelState.join([want[-1]] * 2)
    return engine


def logits_first(hidden: Tensor, logits: Tensor, gates: Tensor, state: ModelState) -> list[Tensor]:
    """What EngineGraph.advance returns, in the order of Comparison."""
    return [logits, hidden, gates, *state.tensors().values()]


# ------------------------------------------------------------------------------------ timing


def measure(runners: dict[str, Runner], graph: Graph, options: Options) -> list[dict]:
    """A row for the model itself and for each exported one: medians of ROUNDS runs."""
    from benchmark import interleave, timed

    runners = {MODEL: Runner(graph.prefill, graph.step, {}, options.device), **runners}
    ids = random_ids(graph, options.batch_size, options.seq_length)
    start, device = graph.start(options.batch_size), torch.device(options.device)
    inputs = {"prefill": [ids], "step": [ids[:, :1]] * STEPS}

    def make(runner: Runner, chunks: list[Tensor]) -> Callable[[], float]:
        def run() -> None:
            state = start
            for chunk in chunks:
                _, state = runner.advance(chunk, state)

        return lambda: timed(run, device)

    makers = {
        (name, kind): functools.partial(make, runner, chunks)
        for name, runner in runners.items()
        for kind, chunks in inputs.items()
    }
    timings, rows = interleave(makers, 1, ROUNDS), []
    for name in runners:
        prefill, step = (timings[name, kind] for kind in inputs)
        reason = prefill.reason or step.reason
        require(not reason, f"--benchmark: {name}", f"failed ({reason})", "see --verify")
        tokens = ids.numel() / statistics.median(prefill.seconds)
        row = {
            "format": name,
            "step_ms": round(1e3 * statistics.median(step.seconds) / STEPS, 3),
            "prefill_tokens_per_second": round(tokens),
            "mb": None if name == MODEL else round(megabytes(options.folder(name)), 1),
        }
        rows.append(row)
    return rows


def report(rows: list[dict], options: Options) -> None:
    """Print the table, and write benchmark.json."""
    from benchmark import table

    facts = {
        "batch_size": options.batch_size,
        "seq_length": options.seq_length,
        "threads": torch.get_num_threads(),
        "device": options.device,
        "rows": rows,
    }
    write_json(options.output_dir / "benchmark.json", facts)
    lines = [["", "prefill, tokens/s", "step, ms", "speedup of a step", "MB on disk"]]
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


def megabytes(path: Path) -> float:
    """Size of a file, or of all files in a folder."""
    files = [path, *path.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


# ------------------------------------------------------------------------------------ main


@dataclass
class Options:
    """The command line."""

    checkpoint: str = "tinymamba_model_latest.pt"  # a checkpoint of testv2.py, or a folder
    vocab_file: str | None = None  # tokenizer.json or vocab.txt; else the checkpoint's
    output_dir: Path = Path("exported_models")  # folder for one folder per format; web: the site
    force: bool = False  # replace what exists in output_dir
    format: str = "all"  # what to write
    optimize: bool = False  # onnx: optimize the graphs now, for a faster start
    aoti: bool = False  # torch_export: compile ahead of time
    device: str = "cpu"  # auto, cpu, cuda or mps: where the graphs will run
    single_file: bool = False  # web: one page that holds everything, named after the checkpoint
    runtime: str | None = None  # web: the folder node_modules; else that here or of this checkout
    # Quantization
    quantize: str | None = None  # pytorch, onnx and web: bits of the linear layers
    calibration_data: str | None = None  # a .bin of tokens, required by int4
    calibration_tokens: int = 65_536  # number of tokens to read from it
    group_size: int = 64  # int4: inputs that share a factor
    # Checks
    verify: bool = False  # compare with the model; exit code 1 if an exported model differs
    generate: bool = False  # continue the prompt with each exported model
    prompt: str = "import os\n"  # the text to continue
    max_tokens: int = 40  # tokens to generate
    benchmark: bool = False  # time each exported model, and the model itself
    batch_size: int = 1  # texts at once in the benchmark; exported models take any number
    seq_length: int = 128  # prompt tokens in the benchmark; exported models take any number

    CHOICES: ClassVar = {"format": (*FORMATS, WEB, "all"), "quantize": ("int8", "int4", "both")}
    LIMITS: ClassVar = {
        "max_tokens": (1, math.inf),
        "batch_size": (1, math.inf),
        "seq_length": (1, math.inf),
    }

    def formats(self) -> list[str]:
        """The formats to write."""
        if self.format != "all":
            return [self.format]
        return ["pytorch", "onnx"] if self.quantize else list(FORMATS)

    def folder(self, name: str) -> Path:
        """Where an exported model is; `name` is that of its format and the kind of quantization."""
        return self.output_dir if name.startswith(WEB) else self.output_dir / name

    def site_name(self) -> str:
        """The name of a site's model: that of the checkpoint."""
        return name_of(self.checkpoint)

    def single_page(self) -> Path:
        """The file of --single_file."""
        return self.output_dir / f"{self.site_name()}.html"

    def schemes(self) -> list[str]:
        """Endings of the folders' names: one per kind of quantization."""
        both = ["_int8", "_int4"]
        return both if self.quantize == "both" else [f"_{self.quantize}" if self.quantize else ""]


def parse(argv: list[str] | None) -> Options:
    """The command line, checked; its device is the name of one that is available."""
    usage = "python export_model.py --checkpoint FILE [--FLAG VALUE ...]"
    options = parse_flags(Options, argv, usage, __doc__)
    check_formats(options)
    if options.format == WEB and options.output_dir == Options.output_dir:
        options.output_dir = Path("site")
    options.device = str(pick_device(options.device))
    problem = why_no_compile(torch.device(options.device)) if options.aoti else None
    require(not problem, "--aoti", str(problem), "leave it out")
    if {*ONNX} & {*options.formats()}:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            need(package)
    if options.format == WEB:
        find_runtime(options.runtime)
    check_outputs(options)
    return options


def check_formats(options: Options) -> None:
    """Reject flags that do not fit the formats."""
    formats, chosen = options.formats(), options.format
    for flag, name in (("optimize", "onnx"), ("aoti", "torch_export")):
        problem, remedy = f"does nothing for {chosen}", f"leave it out, or pass --format {name}"
        require(not getattr(options, flag) or name in formats, f"--{flag}", problem, remedy)
    for flag, given in (("single_file", options.single_file), ("runtime", options.runtime)):
        problem, remedy = f"does nothing for {chosen}", f"leave it out, or pass --format {WEB}"
        require(not given or chosen == WEB, f"--{flag}", problem, remedy)
    both = chosen == WEB and options.quantize == "both"
    require(not both, "--quantize", "a site has one model", "pass int8 or int4")
    timed = options.single_file and options.benchmark
    problem = "times the files of a folder"
    require(not timed, "--benchmark", problem, "leave out --single_file")
    one = chosen != WEB or options.batch_size == 1
    require(one, "--batch_size", "the graphs of a site read one text", "leave it out")
    problem, remedy = f"makes {chosen} smaller, but not faster", "pass --format pytorch or onnx"
    fits = not options.quantize or {*formats} <= {"pytorch", *ONNX}
    require(fits, "--quantize", problem, remedy)
    int4, data = "_int4" in options.schemes(), options.calibration_data
    remedy = "pass a .bin of tokens, such as data/text/train.bin"
    require(data or not int4, "--calibration_data", "int4 needs it", remedy)
    require(int4 or not data, "--calibration_data", "only int4 needs it", "leave it out")


def check_outputs(options: Options) -> None:
    """Reject what exists in the output folder, unless --force may replace it."""
    pairs = itertools.product(options.formats(), options.schemes())
    paths = [options.folder("".join(pair)) for pair in pairs]
    if options.single_file:
        paths = [options.single_page()]
    is_own = is_site if options.format == WEB else lambda path: (path / "config.json").exists()
    for path in paths + [options.output_dir / "benchmark.json"] * options.benchmark:
        remedy = "pass --force or another --output_dir"
        require(options.force or not path.exists(), str(path), "exists already", remedy)
        exported = not path.is_dir() or is_own(path)
        require(exported, str(path), "is not an exported model", "pass another --output_dir")
    replaces = options.format == WEB and not options.single_file
    foreign = find_foreign(options.output_dir) if replaces else None
    problem = f"has {foreign}, which is of no export and would be deleted"
    require(not foreign, str(options.output_dir), problem, "move it, or pass another --output_dir")


def make_graphs(graph: Graph, options: Options) -> dict[str, Graph]:
    """The graphs to export, by the ending of their folders' names."""
    if not options.quantize:
        return {"": graph}
    from quantize import quantize_model, read_blocks

    graphs = {}
    for scheme in options.schemes():
        if scheme == "_int8":
            model = quantize_model(graph.model, 8, "dynamic")
        else:
            data = str(options.calibration_data)
            blocks = read_blocks(data, graph.model, options.calibration_tokens)
            model = quantize_model(graph.model, 4, "weight_only", options.group_size, blocks)
        graphs[scheme] = Graph(model)
    return graphs


def describe_state(graph: Graph) -> dict[str, list]:
    """The shape of a row and the dtype of each tensor of the state."""
    tensors = graph.model.init_state(1).tensors().items()
    return {n: [list(t.shape[1:]), str(t.dtype).removeprefix("torch.")] for n, t in tensors}


def export(name: str, scheme: str, graph: Graph, tokenizer: Any, options: Options) -> str:
    """Write one format, and verify it if --verify is given; returns what that has found."""
    with new_folder(options.folder(name + scheme)) as folder:
        FORMATS.get(name, SITE).write(folder, graph, options)
        if name != WEB:
            state = {"state": describe_state(graph)}
            write_json(folder / "config.json", {**describe_model(graph.model), **state})
            write_tokenizer(graph.model.tokenizer, folder)
        if name == "onnx" and not (folder / "tokenizer.json").exists():
            print("onnx: there is no tokenizer.json, so onnx_generate.py takes only ids")
        if not options.verify:
            return ""
        text, batches = real_text(graph, tokenizer, options.prompt), (1,) if name == WEB else (1, 3)
        return f"; {verify(Runner.open(name, folder, options), graph, text, batches)}"


def real_text(graph: Graph, tokenizer: Any, prompt: str) -> list[int]:
    """Ids of the prompt and of this file; without a tokenizer, their bytes."""
    text, size = prompt + Path(__file__).read_text(encoding="utf-8"), graph.model.config.vocab_size
    return [i % size for i in (tokenizer.encode(text) if tokenizer else text.encode())]


def read_prompt(tokenizer: Any, graph: Graph, options: Options) -> list[int]:
    """The ids of --prompt."""
    problem = why_no_tokenizer(graph.model, "no tokenizer was found")
    require(tokenizer, "--vocab_file", problem, "pass one")
    ids, size = tokenizer.encode(options.prompt), graph.model.config.vocab_size
    require(ids, "--prompt", "holds no token", "pass some text")
    problem, remedy = f"gives ids beyond the model's {size}", "pass the one it was trained with"
    require(max(ids) < size, "--vocab_file", problem, remedy)
    return ids


def require_site_tokenizer(model: TinyMambaModel, tokenizer: Any) -> None:
    """Reject a model whose tokenizer a site cannot have."""
    from tinymamba.web_tokenizer import require_readable

    problem, record = why_no_tokenizer(model, "no tokenizer was found"), model.tokenizer or {}
    require(tokenizer and "content" in record, "--vocab_file", problem, "pass one")
    require_readable(record, "--vocab_file")


def run(options: Options, page: Path | None = None) -> int:
    """Export, and check what was asked for; `page` is the file of --single_file.

    Returns the exit code, which is 1 if --verify has found a difference.
    """
    graph, failed, runners = load_graph(options.checkpoint, options.device), False, {}
    tokenizer = open_tokenizer(options.vocab_file, graph.model, [options.checkpoint])
    prompt = read_prompt(tokenizer, graph, options) if options.generate else []
    if options.format == WEB:
        require_site_tokenizer(graph.model, tokenizer)
    graphs = make_graphs(graph, options)
    for quantized in graphs.values() if {*ONNX} & {*options.formats()} else ():
        require_onnx_layers(quantized.model)
    require_writable(options.output_dir, "--output_dir")
    for scheme, name in itertools.product(graphs, options.formats()):
        folder = options.folder(name + scheme)
        try:
            found = export(name, scheme, graphs[scheme], tokenizer, options)
        except Mismatch as e:
            print(f"error: {folder.name}: {e}; the folder is not kept", file=sys.stderr)
            failed = True
            continue
        if page:
            write_single_file(page, folder, PAGE)
        print(f"{page or folder}: {megabytes(page or folder):.1f} MB{found}", flush=True)
        if options.generate or options.benchmark:
            runners[name + scheme] = Runner.open(name, folder, options)
    if options.generate:
        for name, runner in runners.items():
            text = tokenizer.decode(runner.generate(prompt, options.max_tokens))
            print(f"--- {name}\n{options.prompt}{text}")
    if options.benchmark:
        report(measure(runners, graph, options), options)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = parse(argv)
    if not options.single_file:
        return run(options)
    require_writable(options.output_dir, "--output_dir")
    with tempfile.TemporaryDirectory(prefix="tinymamba-") as scratch:
        folder = Path(scratch) / WEB
        return run(dataclasses.replace(options, output_dir=folder), options.single_page())


if __name__ == "__main__":
    run_cli(main)
