"""Parameter-efficient fine-tuning: LoRA, prefix tuning and state offsets beside a frozen model.

    python peft.py --checkpoint ./tinymamba_model_latest.pt --method lora --lora_rank 8 \\
        --lora_alpha 16.0 --output_dir ./lora_model
    python peft.py --checkpoint ./tinymamba_model_latest.pt --method prefix --prefix_length 16 \\
        --output_dir ./prefix_model
    python peft.py --checkpoint ... --train_data mine.bin --val_data held_out.bin --steps 500
    python peft.py --checkpoint ... --output_dir ./lora_model --resume
    python peft.py --checkpoint ... --adapter ./lora_model --merge --output_dir ./merged_model
    python peft.py --checkpoint ... --method full --output_dir ./full_model  # every weight
    python peft.py --checkpoint ... --objective dpo --beta 0.1 --train_data pairs.bin

An adapter is a folder with adapter_model.safetensors and adapter_config.json. LoRA adapters have
the format of Hugging Face's package `peft`, and can be read from it and written for it.

As a library:

    model = apply_lora_to_model(load_model("tinymamba_model_latest.pt"), rank=8, alpha=16.0)
    optimizer = torch.optim.AdamW(get_trainable_parameters(model), lr=1e-3)
    save_adapter(model, "lora_model")
    load_adapter(model, "other_model", "other"); set_adapter(model, "other")

This file has the name of Hugging Face's package. tinymamba/namesake.py lets both be imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from testv2 import (
    SHAPE_FIELDS,
    Config,
    LayerState,
    TinyMambaModel,
    TokenAdaptiveGating,
    Trainer,
    load_model,
    prepare_default_data,
    resumed_config,
    to_autocast,
)
from tinymamba.checkpoint import (
    find_saved,
    is_checkpoint,
    load_checkpoint,
    read_all_tensors,
    require_writable,
    run_lock,
    save_model,
    sibling,
    write_json,
    write_tensors,
)
from tinymamba.cli import (
    CliParser,
    UserError,
    add_flags,
    check_fields,
    given_fields,
    make_options,
    require,
    require_plain_name,
    run_cli,
)
from tinymamba.conversations import open_training_data
from tinymamba.data_order import ShardedBatches
from tinymamba.distributed import all_reduce
from tinymamba.kernels import QuantizedLinear, quantize_like
from tinymamba.namesake import share_name
from tinymamba.preferences import (
    IGNORED,
    EveryPair,
    Objective,
    PairDataset,
    flatten_pairs,
    score_rows,
)
from tinymamba.progress import report_validation
from tinymamba.runtime import gate_statistics, make_loader, take_batches
from tinymamba.tokenizer import open_tokenizer
from tinymamba.vocabulary import count_before, data_vocabulary, inherited_weights

METHODS = ("lora", "prefix", "state_offset", "full")
# The linear layers of the branches: the default of target_modules.
PROJECTIONS = r"blocks\.\d+\.(ssm|attention|mlp)\.(in_proj|qkv|out_proj)(\.down|\.up)?"

# ------------------------------------------------------------------------------------ config


@dataclass
class AdapterConfig:
    """The settings of an adapter."""

    # Adapter
    method: str = "lora"  # what to train; full trains every weight of the model
    lora_rank: int = 8  # rank of the LoRA update
    lora_alpha: float = 16.0  # the LoRA update is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # dropout rate on the input of the LoRA update
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_rank) (arXiv 2312.03732)
    use_dora: bool = False  # train magnitude and direction separately (DoRA, arXiv 2402.09353)
    target_modules: list[str] | None = None  # layer names or patterns; None is all projections
    prefix_length: int = 16  # keys and values that every token attends to, besides its window

    CHOICES: ClassVar = {"method": METHODS}
    LIMITS: ClassVar = {
        "lora_rank": (1, math.inf),
        "lora_alpha": (1e-9, math.inf),
        "lora_dropout": (0, 0.9999),
        "prefix_length": (1, math.inf),
    }

    def validate(self) -> AdapterConfig:
        """Reject ill-typed and impossible values with a UserError; return self."""
        check_fields(self)
        return self


# ------------------------------------------------------------------------------------ slots
#
# testv2.py, section "branches", says what a slot is.


class AdapterState:
    """What all slots of a model share: its adapters, and which of them are active."""

    def __init__(self, model: TinyMambaModel):
        self.base = model.fingerprint()  # of the base model
        self.configs: dict[str, AdapterConfig] = {}
        self.active: str | None | tuple[str | None, ...] = None  # in all rows, or in each row
        self.merged: str | None = None  # name of the adapter that is merged into the weights


class AdapterSlot(nn.Module):
    """The adapters at one place of the model, by name."""

    def __init__(self, state: AdapterState):
        super().__init__()
        self.state, self.adapters = state, nn.ModuleDict()

    def active(self) -> Iterator[tuple[Any, slice | list[int]]]:
        """The active adapters here, each with the rows that use it; a slice stands for all rows."""
        names = self.state.active
        if names is None or isinstance(names, str):
            if names in self.adapters:
                yield self.adapters[names], slice(None)
            return
        for name in dict.fromkeys(names):
            if name in self.adapters:
                yield self.adapters[name], [i for i, other in enumerate(names) if other == name]


def replace_rows(x: Tensor, rows: list[int], new: Tensor) -> Tensor:
    """A copy of x (b, ...) with `new` in these rows."""
    return x.index_copy(0, torch.tensor(rows, device=x.device), new)


class LoRALinear(AdapterSlot):
    """A linear layer whose weight W becomes W + s B A (Hu et al., arXiv 2106.09685, eq. 3)."""

    def __init__(self, base_layer: nn.Linear | QuantizedLinear, state: AdapterState):
        super().__init__(state)
        self.base_layer = base_layer
        self.unmerged: Tensor | None = None  # the base layer's weight before merge_adapter
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """The full weight (out, in), with the update of the active adapter."""
        weight = self.base_layer.weight
        for adapter, rows in self.active():
            problem, remedy = "rows have different weights", "activate one adapter for all rows"
            require(isinstance(rows, slice), "adapter", problem, remedy)
            weight = adapter.merge(weight)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias (out,)."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (b, ..., in) -> (b, ..., out)."""
        y = self.base_layer(x)
        for adapter, rows in self.active():
            if isinstance(rows, slice):
                return adapter(x, y, self.base_layer)
            y = replace_rows(y, rows, adapter(x[rows], y[rows], self.base_layer))
        return y


class LoRA(nn.Module):
    """A low-rank update s B A of a weight, zero at first. DoRA also learns the rows' norms."""

    def __init__(self, base: nn.Linear | QuantizedLinear, config: AdapterConfig):
        super().__init__()
        rank, like = config.lora_rank, base.weight
        self.A = nn.Parameter(like.new_empty(rank, base.in_features))
        self.B = nn.Parameter(like.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
        self.dropout = nn.Dropout(config.lora_dropout)
        dora = config.use_dora
        self.magnitude = nn.Parameter(like.detach().norm(dim=1)) if dora else None  # (out,)

    def forward(self, x: Tensor, y: Tensor, base: nn.Linear | QuantizedLinear) -> Tensor:
        """x (..., in) and the base layer's output y (..., out) -> y with the update."""
        update = self.scale * F.linear(F.linear(self.dropout(x), self.A), self.B)
        if self.magnitude is None:
            return y + update
        bias = 0.0 if base.bias is None else base.bias
        return (y - bias + update) * self.row_scale(base.weight).to(y.dtype) + bias

    def row_scale(self, weight: Tensor) -> Tensor:
        """DoRA's factors of the rows (out,): learned norm / actual norm, which has no gradient."""
        return self.magnitude / (weight + self.scale * self.B @ self.A).detach().norm(dim=1)

    def merge(self, weight: Tensor) -> Tensor:
        """The base layer's weight (out, in) -> the weight with the update."""
        updated = weight + self.scale * self.B @ self.A
        return updated if self.magnitude is None else updated * self.row_scale(weight)[:, None]


class AdditiveSlot(AdapterSlot):
    """Adapters whose output is added to that of a branch."""

    def forward(self, x: Tensor) -> Tensor:
        """The input of the slot -> what is added; a zero without dimensions for nothing."""
        total = x.new_zeros(())
        for adapter, rows in self.active():
            if isinstance(rows, slice):
                return adapter(x)
            term = adapter(x[rows])
            if total.dim() == 0:
                total = term.new_zeros(len(x), *term.shape[1:])
            total = replace_rows(total, rows, term)
        return total


class Prefix(nn.Module):
    """Keys and values that every token attends to (Li & Liang, arXiv 2101.00190).

    They have no position and a softmax of their own. The values are zero at first, so that the
    model starts out unchanged, as with LLaMA-Adapter's gate (Zhang et al., arXiv 2303.16199).
    """

    def __init__(self, heads: int, width: int, config: AdapterConfig):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(heads, config.prefix_length, width))
        self.values = nn.Parameter(torch.zeros(heads, config.prefix_length, width))

    def forward(self, q: Tensor) -> Tensor:
        """Queries before RoPE (b, a, l, f) -> (b, a, l, f)."""
        keys, values = (t.to(q.dtype) for t in (self.keys, self.values))
        return (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1).to(q.dtype) @ values


class InitialStateSlot(AdapterSlot):
    """Adapters that give a sequence a learned initial state."""

    def forward(self, layers: list[LayerState]) -> list[LayerState]:
        """Zero states of b rows -> the initial states."""
        for adapter, rows in self.active():
            for i, layer in enumerate(layers):
                conv, ssm = layer.conv.clone(), layer.ssm.clone()
                conv[rows] += adapter.conv[i].to(conv.dtype)
                ssm[rows] += adapter.ssm[i].to(ssm.dtype)
                layers[i] = layer._replace(conv=conv, ssm=ssm)
        return layers


class InitialState(nn.Module):
    """Learned states of the convolutions and SSMs before the first token, zero at first."""

    def __init__(self, model: TinyMambaModel):
        super().__init__()
        layers = model.init_state(1).layers
        self.conv = nn.Parameter(
            torch.stack([layer.conv[0] for layer in layers])
        )  # (n_layer, k-1, d + 2n + d)
        self.ssm = nn.Parameter(
            torch.stack([layer.ssm[0] for layer in layers])
        )  # (n_layer, h, p, n)


class StateOffset(nn.Module):
    """A learned state, read at every token beside the SSM's (Kang et al., arXiv 2503.03499)."""

    def __init__(self, heads: int, width: int, d_state: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(heads, width, d_state))

    def forward(self, C: Tensor) -> Tensor:
        """C before rotation (b, l, n) -> (b, l, h, p)."""
        return torch.einsum("bln,hpn->blhp", C, self.offset.to(C.dtype))


# ------------------------------------------------------------------------------------ attaching


def adapter_state(model: TinyMambaModel) -> AdapterState:
    """The AdapterState of a model, made at its first use."""
    if not hasattr(model, "adapter_state"):
        model.adapter_state = AdapterState(model)
    return model.adapter_state


def linear_layers(model: TinyMambaModel) -> list[str]:
    """The names of all linear layers, with or without adapters."""
    kinds = nn.Linear | QuantizedLinear | LoRALinear
    named = model.named_modules()
    return [n for n, m in named if isinstance(m, kinds) and not n.endswith(".base_layer")]


def find_targets(model: TinyMambaModel, patterns: list[str] | None) -> list[str]:
    """The linear layers whose name or end of name is a pattern, or that a pattern matches."""
    names = linear_layers(model)
    chosen: dict[str, None] = {}
    for pattern in patterns or [PROJECTIONS]:
        try:
            regex = re.compile(pattern)
        except re.error as e:
            problem = f"{pattern!r} is not a regular expression ({e})"
            raise UserError("target_modules", problem, "use a name") from None
        found = [n for n in names if f".{n}".endswith(f".{pattern}") or regex.fullmatch(n)]
        kinds = sorted({re.sub(r"^blocks\.\d+\.", "", n) for n in names})
        problem = f"{pattern!r} matches no linear layer"
        require(found, "target_modules", problem, f"there are {', '.join(kinds)}")
        chosen |= dict.fromkeys(found)
    return list(chosen)


def attach(model: TinyMambaModel, config: AdapterConfig, name: str = "default") -> TinyMambaModel:
    """Add a new adapter to the model, activate it, and freeze everything else; return `model`."""
    config.validate()
    problem = "full is not an adapter"
    require(config.method != "full", "method", problem, "train the model itself")
    require_plain_name(name, "adapter")
    state = adapter_state(model)
    require(name not in state.configs, "adapter", f"{name} exists already", "use another name")
    require_unmerged(state)
    if config.method == "lora":
        targets = find_targets(model, config.target_modules)
        config = dataclasses.replace(config, target_modules=targets)
    model.requires_grad_(False)
    add = {"lora": add_lora, "prefix": add_prefix, "state_offset": add_state_offset}
    add[config.method](model, state, config, name)
    model.to(model.embedding.weight.device)
    state.configs[name], state.active = config, name
    return model


def require_unmerged(state: AdapterState) -> None:
    """Reject a model with a merged adapter."""
    problem, remedy = f"{state.merged} is merged", "call unmerge_adapter first"
    require(not state.merged, "adapter", problem, remedy)


def add_lora(model: TinyMambaModel, state: AdapterState, config: AdapterConfig, name: str) -> None:
    """Add LoRA to the layers of config.target_modules."""
    for target in config.target_modules or []:
        layer = model.get_submodule(target)
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer, state)
            model.set_submodule(target, layer)
        layer.adapters[name] = LoRA(layer.base_layer, config)


def add_prefix(
    model: TinyMambaModel, state: AdapterState, config: AdapterConfig, name: str
) -> None:
    """Add keys and values to every attention, and an initial state to the model."""
    active, state.active = state.active, None  # so that a new initial state is zero
    initial = InitialState(model)
    state.active = active
    model.start = model.start or InitialStateSlot(state)
    model.start.adapters[name] = initial
    for block in model.blocks:
        attention = block.attention
        attention.prefix = attention.prefix or AdditiveSlot(state)
        attention.prefix.adapters[name] = Prefix(attention.n_heads, attention.head_dim, config)


def add_state_offset(
    model: TinyMambaModel, state: AdapterState, config: AdapterConfig, name: str
) -> None:
    """Add a state offset to every SSM."""
    head_dim, d_state = model.config.ssm_head_dim, model.config.d_state
    for block in model.blocks:
        ssm = block.ssm
        ssm.offset = ssm.offset or AdditiveSlot(state)
        ssm.offset.adapters[name] = StateOffset(ssm.n_heads, head_dim, d_state)


def apply_lora_to_model(
    model: TinyMambaModel,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    name: str = "default",
) -> TinyMambaModel:
    """Add LoRA to linear layers, by default to all projections of the branches; return `model`.

    `target_modules`: names of layers, ends of names, or regular expressions for whole names. All
    other weights are frozen. The model's outputs do not change until the adapter is trained.
    """
    lora = AdapterConfig("lora", rank, alpha, dropout, use_rslora, use_dora, target_modules)
    return attach(model, lora, name)


def apply_prefix_tuning_to_model(
    model: TinyMambaModel, prefix_length: int = 16, name: str = "default"
) -> TinyMambaModel:
    """Add keys and values that every token attends to, and an initial state; return `model`."""
    return attach(model, AdapterConfig("prefix", prefix_length=prefix_length), name)


def apply_state_offset_to_model(model: TinyMambaModel, name: str = "default") -> TinyMambaModel:
    """Add a learned state that is read at every token; return `model`."""
    return attach(model, AdapterConfig("state_offset"), name)


def get_trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def set_adapter(model: TinyMambaModel, names: str | None | Sequence[str | None]) -> None:
    """Activate an adapter by name; None is the base model, and a list has one of these per row.

    It costs nothing: no weight is changed.
    """
    state = adapter_state(model)
    require_unmerged(state)
    active = names if names is None or isinstance(names, str) else tuple(names)
    for name in active if isinstance(active, tuple) else (active,):
        remedy = f"there are {', '.join(state.configs) or 'none'}"
        known = name is None or name in state.configs
        require(known, "adapter", f"there is no {name!r}", remedy)
    state.active = active


# ------------------------------------------------------------------------------------ merging


@torch.no_grad()
def merge_adapter(model: TinyMambaModel, name: str = "default") -> None:
    """Add a LoRA adapter to the weights. The original weights are kept for unmerge_adapter."""
    state = adapter_state(model)
    require_unquantized(model)
    require_unmerged(state)
    require(name in state.configs, "adapter", f"there is no {name!r}", "load it first")
    method, remedy = state.configs[name].method, "use it as an adapter"
    problem = f"{method} does not change weights and cannot be merged"
    require(method == "lora", "adapter", problem, remedy)
    layers = [m for m in model.modules() if isinstance(m, LoRALinear) and name in m.adapters]
    tied = model.config.tie_embeddings and model.head in layers
    problem = "the output layer shares its weight with the embedding"
    require(not tied, "adapter", problem, remedy)
    for layer in layers:
        layer.unmerged = layer.base_layer.weight.data
        layer.base_layer.weight.data = layer.adapters[name].merge(layer.unmerged)
    state.merged, state.active = name, None


def require_unquantized(
    model: TinyMambaModel,
    problem: str = "no adapter can be merged into it",
    remedy: str = "use the adapter without --merge, or merge it into the float model with --force",
) -> None:
    """Reject a quantized model."""
    require(not model.quantization, "checkpoint", f"is quantized: {problem}", remedy)


def unmerge_adapter(model: TinyMambaModel) -> None:
    """Undo merge_adapter exactly, and activate the adapter."""
    state = adapter_state(model)
    require(state.merged, "adapter", "none is merged", "call merge_adapter first")
    for layer in model.modules():
        if isinstance(layer, LoRALinear) and layer.unmerged is not None:
            layer.base_layer.weight.data, layer.unmerged = layer.unmerged, None
    state.active, state.merged = state.merged, None


def plain_weights(model: TinyMambaModel) -> dict[str, Tensor]:
    """The weights without adapters, under the names of a plain model."""
    return {
        name.replace(".base_layer.", "."): t
        for name, t in model.state_dict().items()
        if ".adapters." not in name
    }


# ------------------------------------------------------------------------------------ files

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
LORA_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# Settings of Hugging Face's LoRA that change the result, and that this file does not support.
UNSUPPORTED = [
    "alora_invocation_tokens", "alpha_pattern", "arrow_config", "fan_in_fan_out", "kasa_config",
    "layer_replication", "lora_bias", "modules_to_save", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
]  # fmt: skip


def adapter_tensors(model: TinyMambaModel, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter, by their names in its file."""
    found, mark, method = {}, f".adapters.{name}.", adapter_state(model).configs[name].method
    for key, t in model.state_dict(keep_vars=True).items():
        slot, _, part = key.partition(mark)
        if part and method == "lora":
            found[f"base_model.model.{slot}.{LORA_NAMES[part]}"] = t
        elif part:
            found[f"{slot}.{part}"] = t
    return found


def save_adapter(
    model: TinyMambaModel, folder: str | Path, name: str = "default", base: str | None = None
) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    The former has a hash of the base model, and one of its tokenizer.

    `base`: the path of the base model, for the reader of adapter_config.json.
    """
    state, folder = adapter_state(model), Path(folder)
    require(name in state.configs, "adapter", f"there is no {name!r}", "attach it first")
    require_writable(folder, "output_dir")
    notes = {"base": state.base}
    if hash := (model.tokenizer or {}).get("sha256"):
        notes["tokenizer"] = hash
    write_tensors(folder / WEIGHTS_FILE, adapter_tensors(model, name), notes)
    write_json(folder / CONFIG_FILE, config_to_json(state.configs[name], base))


def config_to_json(config: AdapterConfig, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json; for LoRA, in the format of Hugging Face's package."""
    if config.method == "lora":
        return {
            "peft_type": "LORA",
            "task_type": None,
            "inference_mode": True,
            "bias": "none",
            "base_model_name_or_path": base,
            "r": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "fan_in_fan_out": False,
            "target_modules": config.target_modules,
        }
    values: dict[str, Any] = {"tinymamba_method": config.method}
    values["base_model_name_or_path"] = base
    if config.method == "prefix":
        values["prefix_length"] = config.prefix_length
    return values


def read_config(folder: Path) -> AdapterConfig:
    """The config of an adapter's folder, of either format."""
    path = folder / CONFIG_FILE
    require(path.is_file(), str(path), "no such file", "pass the folder of an adapter")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(values, dict), str(path), "is not an adapter config", "use another")
        read = config_from_json if "tinymamba_method" in values else config_from_peft
        return read(values, str(path)).validate()
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(str(path), f"is not an adapter config ({e!r})", "save it again") from None


def config_from_json(values: dict[str, Any], path: str) -> AdapterConfig:
    """The config of a prefix or a state offset."""
    method = values["tinymamba_method"]
    length = values.get("prefix_length", AdapterConfig.prefix_length)
    known = method in ("prefix", "state_offset")
    require(known, path, f"method {method!r} is unknown", "use a newer release")
    return AdapterConfig(method, prefix_length=length)


def config_from_peft(values: dict[str, Any], path: str) -> AdapterConfig:
    """The config of a LoRA adapter, in the format of Hugging Face's package."""
    kind = values.get("peft_type")
    require(kind == "LORA", path, f"is of type {kind}", "only LoRA is supported")
    unsupported = [name for name in UNSUPPORTED if values.get(name)]
    unsupported += ["bias"] * (values["bias"] != "none")
    init = values.get("init_lora_weights", True)  # the others change the base model's weights
    unsupported += ["init_lora_weights"] * (init not in (True, False, "gaussian", "orthogonal"))
    require(not unsupported, path, f"uses {', '.join(unsupported)}", "train it without")
    return AdapterConfig(
        "lora",
        values["r"],
        values["lora_alpha"],
        values["lora_dropout"],
        values.get("use_rslora", False),
        values.get("use_dora", False),
    )


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, str]]:
    """The config, the tensors by name, and the file's metadata."""
    config = read_config(folder)
    # Hugging Face's files have no checksum.
    return config, *read_all_tensors(folder / WEIGHTS_FILE, "save it again", unsigned="")


def load_adapter(
    model: TinyMambaModel, folder: str | Path, name: str = "default", force: bool = False
) -> None:
    """Attach a saved adapter, of save_adapter or Hugging Face's package, and activate it.

    An adapter of another base model, or one that does not fit, is a UserError, and the model stays
    as it was. With `force`, another base is a warning: a quantized form of this one, for example.
    """
    folder, state = Path(folder), adapter_state(model)
    config, tensors, metadata = read_adapter(folder)
    path, remedy = str(folder / WEIGHTS_FILE), "use the checkpoint that it was trained on"
    same, foreign = metadata.get("base", state.base) == state.base, "belongs to another base model"
    require(same or force, path, foreign, f"{remedy}, or pass --force")
    said, own = metadata.get("tokenizer"), (model.tokenizer or {}).get("sha256")
    problem = f"has another tokenizer ({said!s:.12}) than the model ({own!s:.12})"
    require(said == own or None in (said, own), path, problem, remedy)
    if config.method == "lora":
        outer = re.compile(r"^base_model\.model\.(.*?)(?=blocks\.\d|head\.)")
        tensors = {outer.sub("", n): t for n, t in tensors.items()}
        config.target_modules = lora_targets(model, config, tensors, path)
    active, trainable = state.active, get_trainable_parameters(model)
    attach(model, config, name)
    try:
        load_values(model, name, tensors, path)
    except UserError:
        detach(model, name)
        state.active = active
        for p in trainable:
            p.requires_grad_(True)
        raise
    if not same:
        warnings.warn(f"{path}: {foreign}; its effect may differ on this one", stacklevel=2)


def lora_targets(
    model: TinyMambaModel, config: AdapterConfig, tensors: dict[str, Tensor], path: str
) -> list[str]:
    """The layers that a file has updates for; checks that the model has them, and their rank."""
    layers, known = {n.rpartition(".lora_")[0] for n in tensors}, set(linear_layers(model))
    problem = f"has layers that the model lacks: {', '.join(sorted(layers - known)[:3])}"
    require(layers and layers <= known, path, problem, "use the base that it was trained on")
    ranks = {t.shape[0] for n, t in tensors.items() if n.endswith(".lora_A.weight")}
    problem = f"has updates of ranks {sorted(ranks)}, but its config says {config.lora_rank}"
    require(ranks == {config.lora_rank}, path, problem, "train it with one rank")
    return sorted(layers)


@torch.no_grad()
def load_values(model: TinyMambaModel, name: str, tensors: dict[str, Tensor], path: str) -> None:
    """Copy the tensors of a file into an adapter, and freeze it."""
    own = {n.removeprefix("base_model.model."): t for n, t in adapter_tensors(model, name).items()}
    fits = own.keys() == tensors.keys() and all(
        t.shape == tensors[n].shape and tensors[n].is_floating_point() for n, t in own.items()
    )
    problem, remedy = "has other tensors than such an adapter", "use its own base and config"
    require(fits, path, problem, remedy)
    finite = all(t.isfinite().all() for t in tensors.values())
    require(finite, path, "has values that are not finite", "train it again")
    for n, t in own.items():
        t.requires_grad_(False).copy_(tensors[n])


def detach(model: TinyMambaModel, name: str) -> None:
    """Remove an adapter, and activate the base model."""
    state = adapter_state(model)
    for slot in [m for m in model.modules() if isinstance(m, AdapterSlot)]:
        if name in slot.adapters:
            del slot.adapters[name]
    del state.configs[name]
    state.active = None


# ------------------------------------------------------------------------------------ training

DEFAULTS = {  # where they differ from Config's own
    "max_steps": 500,
    "warmup_steps": 20,
    "gradient_accumulation_steps": 1,
    "dropout": 0.0,
    "weight_decay": 0.0,
    "validation_interval": 100,
    "checkpoint_interval": 100,
    "generation_interval": 250,
    "use_compile": False,
    "num_epochs": 1000,
}
LEARNING_RATES = {"lora": 8e-3, "prefix": 3e-2, "state_offset": 1e-1, "full": 4e-3}
# Fields that a run takes from the base model's config, unless a flag sets them.
BASE_FIELDS = [
    *SHAPE_FIELDS, "block_size", "batch_size", "data_dtype", "eos_id", "generation_prompt",
    "deepnet", "scan", "chunk_size",
]  # fmt: skip
# Each process trains a whole model on whole texts, also where it resumes a run that did not.
WHOLE = {"parallel": "ddp", "context_parallel": 1}
NOT_FLAGS = [
    *SHAPE_FIELDS, "deepnet", "checkpoint_path", "init_from", "shard_group", *WHOLE,
]  # fmt: skip


class FineTuner(Trainer):
    """A training run of an adapter. Its checkpoints hold the adapter's weights only."""

    MODEL = TinyMambaModel

    def __init__(
        self,
        config: Config,
        base: TinyMambaModel,
        adapter: AdapterConfig,
        tokenizer: Any = None,
        saved: dict | None = None,
    ):
        """An `adapter` of method full trains all weights, starting from those of the base."""
        self.base, self.adapter = base, adapter
        super().__init__(config, tokenizer, saved)

    def open_source(self, *args: Any, **settings: Any) -> Any:
        """As Trainer.open_source; a learned initial state is that of one conversation alone."""
        packed = self.adapter.method != "prefix"
        return open_training_data(*args, **settings, packed=packed)

    def open_data(self, tokenizer: Any) -> None:
        """As Trainer.open_data; an adapter needs data with the tokenizer of the base model."""
        super().open_data(tokenizer)
        if self.adapter.method == "full":
            return
        added = count_before(self.tokenizer, self.base.tokenizer)
        if added is not None:
            reject_larger(self.adapter.method, len(self.tokenizer), added)
        cut = self.config.document_mask and self.train_data.has_inside(self.config.eos_id)
        problem = "its conversations go on after eos_id, where the base begins anew (document_mask)"
        require(not cut, "train_data_path", problem, "pass --method full, which turns that off")
        self.run_tokenizer.inherit(self.base.tokenizer, "the base model")

    def build(self) -> TinyMambaModel:
        """A copy of the base model, with a new adapter."""
        model = self.MODEL(self.config, filled=False)
        if self.base.quantization:
            quantize_like(model, self.base.quantization)
        is_full, weights = self.adapter.method == "full", self.base.state_dict()
        if is_full:
            named = (self.config.vocab_size, "the base model")
            weights = inherited_weights(self.base, self.run_tokenizer, *named)
        model.load_state_dict(weights)
        model.tokenizer = self.run_tokenizer.record
        return model if is_full else attach(model, self.adapter)

    def weights(self) -> dict[str, Tensor]:
        """The weights that a checkpoint holds."""
        if self.adapter.method == "full":
            return super().weights()
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: t for n, t in self.model.state_dict().items() if n in trained}

    def describe_adapter(self) -> dict[str, Any]:
        """What a checkpoint says about the adapter; empty for a plain model."""
        if self.adapter.method == "full":
            return {}
        fields = dataclasses.asdict(self.adapter)
        return {"adapter": {**fields, "base": adapter_state(self.model).base}}

    def describe_objective(self) -> dict[str, Any]:
        """What a checkpoint says about the loss; empty for the usual one."""
        return {}

    def state(self, val_loss: float | None = None) -> dict[str, Any]:
        """As Trainer.state, with the adapter and the objective."""
        return {**super().state(val_loss), **self.describe_adapter(), **self.describe_objective()}

    def restore(self, saved: dict[str, Any]) -> None:
        """As Trainer.restore; a changed adapter or objective is a UserError."""
        runs = saved, {**self.describe_adapter(), **self.describe_objective()}
        plain = {"method": "full"}
        old, new = ({**run.get("adapter", plain), **run.get("objective", {})} for run in runs)
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        problem = f"changed since {self.config.checkpoint_path} was saved"
        remedy = "leave the flags out, or start a new run"
        require(not changed, ", ".join(changed), problem, remedy)
        super().restore(saved)

    def announce(self) -> None:
        """As Trainer.announce, with the number of trained parameters."""
        super().announce()
        trained = sum(p.numel() for p in get_trainable_parameters(self.model))
        total = self.model.count_parameters()["total"]
        self.log.say(f"{trained:,} of {total:,} parameters are trained, {trained / total:.2%}")

    def restore_best(self) -> None:
        """Load the weights of the best validation."""
        best = sibling(self.config.checkpoint_path, "best")
        if self.val_data is not None and is_checkpoint(best):
            self.model.load_state_dict(load_checkpoint(best)["model"], strict=False)


# -------------------------------------------------------------------------------- preferences

# Defaults of --objective dpo and simpo. Noise would be in the model and not in its reference.
PAIR_DEFAULTS = {"state_noise": 0.0}
PAIR_RATES = {"lora": 1e-3, "prefix": 1e-2, "state_offset": 1e-2, "full": 2e-4}


class ScoringModel(TinyMambaModel):
    """A model whose `forward` with targets (r, l) gives their log-probability in each row, (r,)."""

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """In place of the mean loss: the scores (r,)."""
        return score_rows(to_autocast(hidden), targets, self.head, self.LOSS_CHUNK)


class PreferenceTuner(FineTuner):
    """A training run on pairs of answers, with the loss of an Objective.

    The reference of DPO is the base: the model without its adapter. With method full no base is
    left after the first step, so the scores of all pairs are computed before it, and kept.
    """

    MODEL = ScoringModel
    open_source = PairDataset

    def __init__(self, objective: Objective, *args: Any, **settings: Any):
        """The other arguments are those of FineTuner."""
        self.objective = objective
        self.references: dict[str, dict[str, Any]] = {}  # of train and val: "data" and "scores"
        super().__init__(*args, **settings)
        self.seen = torch.zeros(3, device=self.device)  # pairs, right ones, sum of the margins
        self.tokens_per_step *= 2  # at most: a pair has two rows

    @functools.cached_property
    def base_hash(self) -> str:
        """The fingerprint of the base."""
        return self.base.fingerprint()

    @property
    def keeps_scores(self) -> bool:
        """Whether the scores of the reference are computed before the first step."""
        return self.objective.objective == "dpo" and self.adapter.method == "full"

    def batches(self, loader: Any) -> Iterator:
        """Of each batch inputs, targets and ends (r, l), and the numbers of its pairs (b,)."""
        for batch in take_batches(loader):
            rows = flatten_pairs(batch, self.config.block_size if self.config.use_compile else 64)
            yield [t.to(self.device, non_blocking=True) for t in rows]

    def accumulate(self, micro_batches: list) -> Tensor:
        """As Trainer.accumulate; the tokens of a step are those of both rows of its pairs."""
        self.tokens_per_step = self.world * sum(batch[0].numel() for batch in micro_batches)
        return super().accumulate(micro_batches)

    def count(self, batch: list[Tensor]) -> int:
        """How many losses the mean of a micro-batch is over: its pairs."""
        return len(batch[-1])

    def score(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        """The log-probabilities of both answers of each pair, (b, 2)."""
        ids, targets, ends, _ = batch
        learned_start = self.adapter.method == "prefix"  # which `ends` would erase
        return model(ids, targets, ends=None if learned_start else ends).view(-1, 2)

    def score_reference(self, batch: list[Tensor]) -> Tensor | None:
        """The same under the reference; None if the objective has none."""
        if self.objective.objective == "simpo":
            return None
        if self.keeps_scores:
            data = "train" if self.model.training else "val"
            return self.references[data]["scores"][batch[-1]]
        with self.without_adapter():
            return self.score(self.model, batch)

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base model as it is: in eval mode, not compiled, no adapter is active."""
        state, training = adapter_state(self.model), self.model.training
        active, state.active = state.active, None
        self.model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            state.active = active
            self.model.train(training)

    def pair_losses(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The losses of all pairs (b,); the sums of pairs, of right ones, and of margins (3,)."""
        lengths = (batch[1] != IGNORED).sum(-1).view(-1, 2)  # (b, 2)
        reference = self.score_reference(batch)
        rewards = self.objective.rewards(self.score(model, batch), lengths, reference)
        margins = (rewards[:, 0] - rewards[:, 1]).detach()
        pairs = torch.ones_like(margins)
        counts = torch.stack([pairs.sum(), (margins > 0).sum(), margins.sum()])
        return self.objective.losses(rewards), counts

    def micro_loss(self, batch: list[Tensor], i: int = 0) -> Tensor:
        """The mean loss of the pairs of micro-batch i of a step."""
        losses, counts = self.pair_losses(self.forward, batch)
        self.seen += counts
        return losses.mean()

    def report_rewards(self, counts: Tensor, name: str) -> None:
        """Log how often the chosen answer has the higher reward, and by how much."""
        pairs, right, margin = all_reduce(list(counts), self.device)
        values = {"reward_accuracy": right / pairs, "reward_margin": margin / pairs}
        self.log.say(f"{name}: reward accuracy {right / pairs:.3f}, margin {margin / pairs:.4f}")
        self.log.record({f"{name}/{key}": value for key, value in values.items()}, self.step)

    def report(self, loss: float, norm: float, seconds_per_step: float) -> None:
        """As Trainer.report, with the rewards since the last report."""
        super().report(loss, norm, seconds_per_step)
        self.report_rewards(self.seen, "train")
        self.seen.zero_()

    def validate(self) -> float | None:
        """The mean loss on the first `validation_steps` batches; None if a signal ended it."""
        c, last = self.config, len(self.val_data)
        if c.validation_steps:
            last = min(last, c.validation_steps * c.batch_size * self.world)
        if self.val_loader is None:
            self.val_loader = self.loader(self.val_data, 0, last)
        total, counts = torch.zeros((), device=self.device), torch.zeros(3, device=self.device)
        gates: dict[str, float] = {}
        with self.evaluating(), self.autocast():
            for batch in self.evaluation_batches(self.val_loader, last):
                losses, seen = self.pair_losses(self.model, batch)
                total, counts = total + losses.sum(), counts + seen
                shares = None if gates else self.model(batch[0][:1], return_gates=True)[1]
                gates = gates or gate_statistics(shares, TokenAdaptiveGating.BRANCHES)
        if self.stopped_by:
            return None
        loss, pairs = all_reduce([total, counts[0]], self.device)
        report_validation(self, loss / pairs, gates)
        self.report_rewards(counts, "val")
        return loss / pairs

    def evaluation_batches(self, loader: Any, count: int) -> Iterator[list[Tensor]]:
        """This process's batches of `count` pairs; fewer if a signal ends the run."""
        batches = self.batches(loader)
        for _ in range(math.ceil(count / (self.config.batch_size * self.world))):
            if self.check_signals():
                return
            yield from islice(batches, 1)

    def loop(self) -> None:
        """As Trainer.loop; the reference comes first."""
        if self.keeps_scores and "train" not in self.references:
            self.log.say("computing the log-probabilities of all pairs under the base")
        self.keep_scores()
        if not self.stopped_by:
            super().loop()

    def keep_scores(self) -> None:
        """Compute the scores of the reference that are due. The model must still be the base."""
        sources = {"train": self.train_data, "val": self.val_data}
        for name, data in sources.items() if self.keeps_scores else ():
            if data is None or name in self.references:
                continue
            scores = self.score_all(data)
            if self.stopped_by:
                return
            self.references[name] = {"data": data.fingerprint(), "scores": scores}

    def score_all(self, data: PairDataset) -> Tensor:
        """The scores of all pairs of a dataset, by number (pairs, 2)."""
        pairs, pinned = EveryPair(data), self.device.type == "cuda"
        plan = ShardedBatches(0, len(pairs), self.config.batch_size, self.rank, self.world)
        scores = torch.zeros(len(pairs), 2, device=self.device)
        with self.evaluating(), self.autocast():
            loader = make_loader(pairs, plan, 0, pinned)
            for batch in self.evaluation_batches(loader, len(pairs)):
                scores[batch[-1]] = self.score(self.model, batch)
        if self.world > 1:
            dist.all_reduce(scores)
        return scores

    def describe_objective(self) -> dict[str, Any]:
        """What a checkpoint says about the loss."""
        return {"objective": {**dataclasses.asdict(self.objective), "base": self.base_hash}}

    def state(self, val_loss: float | None = None) -> dict[str, Any]:
        """As FineTuner.state, with the scores of the reference."""
        kept = {"references": self.references} if self.references else {}
        return {**super().state(val_loss), **kept}

    def restore(self, saved: dict[str, Any]) -> None:
        """As FineTuner.restore; scores of data that have changed are computed anew."""
        for name, data in (("train", self.train_data), ("val", self.val_data)):
            kept = saved.get("references", {}).get(name)
            if kept and data is not None and kept["data"] == data.fingerprint():
                scores = kept["scores"].to(self.device)
                self.references[name] = {**kept, "scores": scores}
        self.keep_scores()  # before the weights are no longer the base's
        super().restore(saved)


# ------------------------------------------------------------------------------- command line


@dataclass
class Options:
    """Files. The other flags are the fields of AdapterConfig and Config."""

    checkpoint: str = "tinymamba_model_latest.pt"  # the base model: a checkpoint or a folder
    output_dir: str = "./adapter"  # folder to write to
    adapter: str | None = None  # folder of an adapter to merge, instead of training
    merge: bool = False  # write merged.pt, a plain checkpoint with the LoRA adapter in it
    force: bool = False  # replace files in output_dir; let --adapter be one of another base model


SPELLING: dict[str, tuple[str, ...]] = {  # fields with a shorter flag
    "train_data_path": ("train_data_path", "train_data"),
    "val_data_path": ("val_data_path", "val_data"),
    "max_steps": ("max_steps", "steps"),
}


def parse(argv: list[str] | None) -> tuple[Options, list[dict[str, Any]]]:
    """The Options of a command line; the fields of AdapterConfig, Objective, Config it gives."""
    usage = "python peft.py --checkpoint FILE [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=str(__doc__).split("As a library")[0])
    add_flags(parser, Options)
    add_flags(parser, AdapterConfig)
    add_flags(parser, Objective)
    defaults = {**DEFAULTS, "lr": "by method", "optimizer": "adamw"}
    add_flags(parser, Config, defaults, NOT_FLAGS, SPELLING)
    args = parser.parse_args(argv)
    options = make_options(Options, args)
    for cls in (AdapterConfig, Objective):
        make_options(cls, args)  # an invalid flag is rejected by name
    return options, [given_fields(cls, args) for cls in (AdapterConfig, Objective, Config)]


def settings(options: Options, method: str, fields: dict[str, Any], base: TinyMambaModel) -> Config:
    """The Config of a run: the base model's shape, defaults of fine-tuning, then `fields`."""
    full, folder = method == "full", Path(options.output_dir)
    values = {name: getattr(base.config, name) for name in BASE_FIELDS}
    values |= {**DEFAULTS, "optimizer": base.config.optimizer if full else "adamw"}
    size = data_vocabulary(fields.get("train_data_path", Config.train_data_path))
    if full:
        values["vocab_size"] = max(base.config.vocab_size, size)
    else:
        reject_larger(method, size, base.config.vocab_size)
    values |= {"lr": LEARNING_RATES[method], "log_dir": str(folder / "logs")}
    values |= {"checkpoint_path": str(folder / checkpoint_name(method)), **fields}
    adamw, remedy = values["optimizer"] == "adamw", "leave it out, or use --method full"
    require(full or adamw, "optimizer", "does not fit the shapes of adapters", remedy)
    return Config(**values).validate()


def reject_larger(method: str, wanted: int, have: int) -> None:
    """Reject an adapter for data with more tokens than its base has: it has no rows for them."""
    problem = f"{method} cannot learn new tokens: the data have {wanted} ids, the base {have}"
    require(wanted <= have, "method", problem, "pass --method full")


def checkpoint_name(method: str) -> str:
    """The file of a run's newest state."""
    return "tinymamba_model_latest.pt" if method == "full" else "adapter_latest.pt"


def train(options: Options, fields: list[dict[str, Any]]) -> int:
    """Start a run, or resume one; returns the exit code."""
    adapter_fields, objective_fields, config_fields = fields
    folder, adapter = Path(options.output_dir), AdapterConfig(**adapter_fields).validate()
    objective = Objective(**objective_fields).validate()
    base = load_model(options.checkpoint)
    open_tokenizer(None, base, [options.checkpoint])  # which an old checkpoint does not hold
    if adapter.method == "full":
        require_unquantized(base, "only adapters can be trained on it", "use --method lora")
    if options.merge:
        require_unquantized(base)
    own_defaults = {**PAIR_DEFAULTS, "lr": PAIR_RATES[adapter.method]} if objective.of_pairs else {}
    config = settings(options, adapter.method, {**own_defaults, **config_fields}, base)
    saved, source = find_saved(config)
    if saved is not None:
        own = {"checkpoint_path": config.checkpoint_path, "resume_from": source, **WHOLE}
        own |= {"log_dir": config.log_dir} if source else {}
        config = resumed_config(saved, {**config_fields, **own})
        adapter = resumed_fields(AdapterConfig, saved.get("adapter", {}), adapter_fields)
        objective = resumed_objective(saved.get("objective", {}), objective_fields)
    lora = adapter.method == "lora"
    if lora:
        find_targets(base, adapter.target_modules)  # rejects unknown layers before any file changes
    require(not options.merge or lora, "--merge", "is for --method lora", "leave it out")
    found = [f for f in (WEIGHTS_FILE, CONFIG_FILE, "merged.pt") if (folder / f).exists()]
    free, remedy = not found, "pass --force, --resume or another --output_dir"
    allowed = options.force or saved is not None or free
    require(allowed, str(folder), f"holds {', '.join(found)}", remedy)
    if not objective.of_pairs:
        prepare_default_data(config, config_fields)
    tuner = make_tuner(objective, config, base, adapter, saved=saved)
    code = tuner.run()
    if code or not tuner.main or adapter.method == "full":
        return code
    tuner.restore_best()
    save_adapter(tuner.model, folder, base=options.checkpoint)
    size = (folder / WEIGHTS_FILE).stat().st_size
    print(f"{folder / WEIGHTS_FILE}: {size:,} bytes")
    if options.merge:
        write_merged(tuner.model, folder / "merged.pt")
    return 0


def resumed_fields(cls: type, saved: dict[str, Any], fields: dict[str, Any]) -> Any:
    """The settings of a saved run in a dataclass, with the fields of the command line."""
    kept = {name: value for name, value in saved.items() if name != "base"}
    return cls(**{**kept, **fields}).validate()


def resumed_objective(saved: dict[str, Any], fields: dict[str, Any]) -> Objective:
    """The objective of a saved run; another one has settings of its own."""
    same = fields.get("objective") in (None, saved.get("objective"))
    return resumed_fields(Objective, saved if same else {}, fields)


def make_tuner(objective: Objective, *run: Any, **settings: Any) -> FineTuner:
    """The training run for an objective."""
    if objective.of_pairs:
        problem, remedy = f"has no meaning with --objective {objective.objective}", "leave it out"
        require(not run[0].teacher, "teacher", problem, remedy)
        require(not run[0].carry_state, "carry_state", problem, remedy)
        return PreferenceTuner(objective, *run, **settings)
    return FineTuner(*run, **settings)


def write_merged(model: TinyMambaModel, path: Path) -> None:
    """Merge the adapter `default` and write a plain checkpoint."""
    merge_adapter(model)
    save_model(path, model, plain_weights(model))
    print(f"{path}: the model with the adapter merged into it")


def merge(options: Options) -> int:
    """Merge a saved adapter into its base model; returns the exit code."""
    problem, remedy = "is for --merge; a run starts from the base", "pass --merge, or leave it out"
    require(options.merge, "--adapter", problem, remedy)
    path = Path(options.output_dir) / "merged.pt"
    free, remedy = options.force or not path.exists(), "pass --force or another --output_dir"
    require(free, str(path), "exists", remedy)
    model = load_model(options.checkpoint)
    open_tokenizer(None, model, [options.checkpoint])
    require_unquantized(model)
    load_adapter(model, str(options.adapter), force=options.force)
    require_writable(path.parent, "output_dir")
    write_merged(model, path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options, fields = parse(argv)
    if options.adapter:
        return merge(options)
    name = checkpoint_name(AdapterConfig(**fields[0]).method)
    with run_lock(Path(options.output_dir) / name):
        return train(options, fields)


if __name__ == "peft":  # imported in place of Hugging Face's package; see tinymamba/namesake.py
    __getattr__ = share_name(sys.modules[__name__], stand_ins=("PeftModel", "PeftMixedModel"))

if __name__ == "__main__":
    run_cli(main)
