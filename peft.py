"""Fine-tuning with few weights: LoRA, prefixes and first states that are learned beside a model.

    python peft.py --checkpoint ./tinymamba_model_latest.pt --method lora --lora_rank 8 \\
        --lora_alpha 16.0 --output_dir ./lora_model
    python peft.py --checkpoint ./tinymamba_model_latest.pt --method prefix --prefix_length 16 \\
        --output_dir ./prefix_model
    python peft.py --checkpoint ... --train_data mine.bin --val_data held_out.bin --steps 500
    python peft.py --checkpoint ... --output_dir ./lora_model --resume
    python peft.py --checkpoint ... --adapter ./lora_model --merge --output_dir ./merged_model
    python peft.py --checkpoint ... --method full --output_dir ./full_model  # every weight

An adapter is a folder with adapter_model.safetensors and adapter_config.json. LoRA's are in the
format of Hugging Face's package of the same name, both ways.

As a library:

    model = apply_lora_to_model(load_model("tinymamba_model_latest.pt"), rank=8, alpha=16.0)
    optimizer = torch.optim.AdamW(get_trainable_parameters(model), lr=1e-3)
    save_adapter(model, "lora_model")
    load_adapter(model, "other_model", "other"); set_adapter(model, "other")

The last section lets this file stand where `import peft` looks first, without getting in the way of
Hugging Face's package.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import math
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testv2 import (
    SHAPE_FIELDS,
    Config,
    LayerState,
    TinyMambaModel,
    Trainer,
    load_model,
    prepare_default_data,
    resumed_config,
)
from tinymamba.checkpoint import (
    load_checkpoint,
    load_newest,
    read_all_tensors,
    require_writable,
    save_checkpoint,
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
    require,
    require_plain_name,
    run_cli,
)
from tinymamba.kernels import QuantizedLinear, quantize_like
from tinymamba.runtime import from_launcher

METHODS = ("lora", "prefix", "state_offset", "full")
BRANCHES = r"blocks\.\d+\.(ssm|attention|mlp)\.(in_proj|qkv|out_proj)(\.down|\.up)?"

# ------------------------------------------------------------------------------------ config


@dataclass
class AdapterConfig:
    """The parameters that are trained beside the model."""

    # Adapter
    method: str = "lora"  # what to train; full trains every weight of the model
    lora_rank: int = 8  # rank of a LoRA update
    lora_alpha: float = 16.0  # a LoRA update is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # dropout rate on the input of a LoRA update
    use_rslora: bool = False  # scale by lora_alpha / sqrt(lora_rank) (arXiv 2312.03732)
    use_dora: bool = False  # train magnitude and direction separately (DoRA, arXiv 2402.09353)
    target_modules: list[str] | None = None  # ends of names or patterns; None is all projections
    prefix_length: int = 16  # keys and values that every token sees, besides its window

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


# ------------------------------------------------------------------------------------ places


class AdapterState:
    """Which adapter of a model serves: one name for all rows of a batch, or one for each row."""

    def __init__(self, model: TinyMambaModel):
        self.base = model.fingerprint()
        self.names: str | None | tuple[str | None, ...] = None
        self.configs: dict[str, AdapterConfig] = {}
        self.merged: str | None = None


class AdapterSlot(nn.Module):
    """The adapters of one place in a model, by name."""

    def __init__(self, state: AdapterState):
        super().__init__()
        self.state, self.adapters = state, nn.ModuleDict()

    def serving(self) -> Iterator[tuple[nn.Module, slice | list[int]]]:
        """Adapters that serve here, each with its rows."""
        names = self.state.names
        if names is None or isinstance(names, str):
            if names in self.adapters:
                yield self.adapters[names], slice(None)
            return
        for name in dict.fromkeys(names):
            if name in self.adapters:
                yield self.adapters[name], [i for i, other in enumerate(names) if other == name]


class LoRALinear(AdapterSlot):
    """A linear layer whose weight W becomes W + s B A (Hu et al., arXiv 2106.09685, eq. 3)."""

    def __init__(self, base_layer: nn.Linear | QuantizedLinear, state: AdapterState):
        super().__init__(state)
        self.base_layer, self.kept = base_layer, None
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features

    @property
    def weight(self) -> Tensor:
        """(out, in), as it serves."""
        weight = self.base_layer.weight
        for adapter, rows in self.serving():
            require(
                rows == slice(None),
                "adapter",
                "a weight that is read whole cannot differ by row",
                "let one adapter serve all rows",
            )
            weight = adapter.weight(weight)
        return weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (b, ..., in) -> (b, ..., out)."""
        y = self.base_layer(x)
        for adapter, rows in self.serving():
            if rows == slice(None):
                return adapter(x, y, self.base_layer)
            y = y.index_copy(
                0, torch.tensor(rows, device=x.device), adapter(x[rows], y[rows], self.base_layer)
            )
        return y


class LoRA(nn.Module):
    """One update of low rank, zero at first; with DoRA, of rows of a learned length."""

    def __init__(self, base: nn.Linear, config: AdapterConfig):
        super().__init__()
        r, like = config.lora_rank, base.weight
        self.A = nn.Parameter(like.new_empty(r, base.in_features))
        self.B = nn.Parameter(like.new_zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.dropout = nn.Dropout(config.lora_dropout)
        dora = config.use_dora
        self.magnitude = nn.Parameter(like.detach().norm(dim=1)) if dora else None  # (out,)

    def forward(self, x: Tensor, y: Tensor, base: nn.Linear) -> Tensor:
        """x (..., in) and y = base(x) (..., out) -> what y is to be."""
        update = self.scale * F.linear(F.linear(self.dropout(x), self.A), self.B)
        if self.magnitude is None:
            return y + update
        bias = 0.0 if base.bias is None else base.bias
        return (y - bias + update) * self.lengths(base.weight).to(y.dtype) + bias

    def lengths(self, weight: Tensor) -> Tensor:
        """(out,) by what DoRA multiplies the rows; no gradient through their own length."""
        return self.magnitude / (weight + self.scale * self.B @ self.A).detach().norm(dim=1)

    def weight(self, weight: Tensor) -> Tensor:
        """(out, in) -> the same with the update in it."""
        updated = weight + self.scale * self.B @ self.A
        return updated if self.magnitude is None else updated * self.lengths(weight)[:, None]


class AdditiveSlot(AdapterSlot):
    """Adapters whose output is added to something of the model's."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for adapter, rows in self.serving():
            if rows == slice(None):
                return adapter(x)
            made = adapter(x[rows])
            if total.dim() == 0:
                total = made.new_zeros(len(x), *made.shape[1:])
            total = total.index_copy(0, torch.tensor(rows, device=x.device), made)
        return total


class Prefix(nn.Module):
    """Keys and values that every token sees, wherever it stands (Li & Liang, arXiv 2101.00190).

    They have a softmax of their own, and values from zero, so that the model is at first what it
    was (as LLaMA-Adapter's gate does, Zhang et al., arXiv 2303.16199). They have no position.
    """

    def __init__(self, heads: int, width: int, config: AdapterConfig):
        super().__init__()
        self.keys = nn.Parameter(torch.randn(heads, config.prefix_length, width))
        self.values = nn.Parameter(torch.zeros(heads, config.prefix_length, width))

    def forward(self, q: Tensor) -> Tensor:
        """q (b, a, l, f), before RoPE -> (b, a, l, f)."""
        keys, values = (t.to(q.dtype) for t in (self.keys, self.values))
        return (q @ keys.mT * q.shape[-1] ** -0.5).softmax(-1).to(q.dtype) @ values


class InitialStateSlot(AdapterSlot):
    """Adapters that give sessions a first state."""

    def forward(self, layers: list[LayerState]) -> list[LayerState]:
        """`layers`: zeros, of B rows."""
        for adapter, rows in self.serving():
            for i, layer in enumerate(layers):
                conv, ssm = layer.conv.clone(), layer.ssm.clone()
                conv[rows] += adapter.conv[i].to(conv.dtype)
                ssm[rows] += adapter.ssm[i].to(ssm.dtype)
                layers[i] = layer._replace(conv=conv, ssm=ssm)
        return layers


class FirstState(nn.Module):
    """What convolutions and SSMs hold before the first token, zero at first."""

    def __init__(self, model: TinyMambaModel):
        super().__init__()
        layers = model.init_state(1).layers
        self.conv = nn.Parameter(torch.stack([layer.conv[0] for layer in layers]))  # (n, k-1, d)
        self.ssm = nn.Parameter(torch.stack([layer.ssm[0] for layer in layers]))  # (n, h, p, n)


class StateOffset(nn.Module):
    """A state read beside the running one at every token (Kang et al., arXiv 2503.03499)."""

    def __init__(self, heads: int, width: int, d_state: int):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(heads, width, d_state))

    def forward(self, C: Tensor) -> Tensor:
        """C (b, l, n), before it turns -> (b, l, h, p)."""
        return torch.einsum("bln,hpn->blhp", C, self.offset.to(C.dtype))


# ------------------------------------------------------------------------------------ attaching


def adapter_state(model: TinyMambaModel) -> AdapterState:
    """The model's state; its first adapter brings it."""
    if not hasattr(model, "adapter_state"):
        model.adapter_state = AdapterState(model)
    return model.adapter_state


def linears(model: TinyMambaModel) -> dict[str, nn.Module]:
    """Every linear layer by name, those with adapters included."""
    kinds = nn.Linear | QuantizedLinear | LoRALinear
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, kinds) and not name.endswith(".base_layer")
    }


def targets(model: TinyMambaModel, patterns: list[str] | None) -> list[str]:
    """Names of the linear layers that end as, or match, one of the patterns."""
    names = list(linears(model))
    chosen = {}
    for pattern in patterns or [BRANCHES]:
        try:
            found = [
                n
                for n in names
                if n == pattern or n.endswith(f".{pattern}") or re.fullmatch(pattern, n)
            ]
        except re.error as e:
            raise UserError(
                "target_modules", f"{pattern!r} is no pattern ({e})", "use a name"
            ) from None
        kinds = sorted({re.sub(r"^blocks\.\d+\.", "", n) for n in names})
        require(
            found,
            "target_modules",
            f"{pattern!r} matches no linear layer",
            f"there are {', '.join(kinds)}",
        )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def attach(model: TinyMambaModel, config: AdapterConfig, name: str = "default") -> TinyMambaModel:
    """Give the model a new adapter, let it serve, and freeze all else. Changes `model` itself."""
    config.validate()
    require(config.method != "full", "method", "full is no adapter", "train the model as it is")
    require_plain_name(name, "adapter")
    state = adapter_state(model)
    require(name not in state.configs, "adapter", f"{name} is there already", "use another name")
    require(not state.merged, "adapter", f"{state.merged} is merged", "unmerge_adapter first")
    found = targets(model, config.target_modules) if config.method == "lora" else []
    model.requires_grad_(False)
    device = model.embedding.weight.device
    if config.method == "lora":
        config = dataclasses.replace(config, target_modules=found)
        for target in found:
            layer = model.get_submodule(target)
            if not isinstance(layer, LoRALinear):
                layer = LoRALinear(layer, state)
                model.set_submodule(target, layer)
            layer.adapters[name] = LoRA(layer.base_layer, config)
    elif config.method == "prefix":
        add_prefix(model, state, config, name)
    else:
        for block in model.blocks:
            ssm, c = block.ssm, model.config
            ssm.offset = ssm.offset or AdditiveSlot(state)
            ssm.offset.adapters[name] = StateOffset(ssm.n_heads, c.ssm_head_dim, c.d_state)
    model.to(device)
    state.configs[name], state.names = config, name
    return model


def add_prefix(
    model: TinyMambaModel, state: AdapterState, config: AdapterConfig, name: str
) -> None:
    names, state.names = state.names, None  # first states are added to zeros
    first = FirstState(model)
    state.names = names
    model.start = model.start or InitialStateSlot(state)
    model.start.adapters[name] = first
    for block in model.blocks:
        attention = block.attention
        attention.prefix = attention.prefix or AdditiveSlot(state)
        attention.prefix.adapters[name] = Prefix(attention.n_heads, attention.head_dim, config)


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
    """Put LoRA into linear layers of the model, by default all projections of the branches.

    `target_modules`: names, ends of names or regular expressions of whole names. Everything else is
    frozen; the model itself is changed, and returned. Its outputs are at first what they were.
    """
    return attach(
        model,
        AdapterConfig("lora", rank, alpha, dropout, use_rslora, use_dora, target_modules),
        name,
    )


def apply_prefix_tuning_to_model(
    model: TinyMambaModel, prefix_length: int = 16, name: str = "default"
) -> TinyMambaModel:
    """Give the model keys and values that every token sees, and a first state for SSM and conv."""
    return attach(model, AdapterConfig("prefix", prefix_length=prefix_length), name)


def apply_state_offset_to_model(model: TinyMambaModel, name: str = "default") -> TinyMambaModel:
    return attach(model, AdapterConfig("state_offset"), name)


def get_trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def set_adapter(model: TinyMambaModel, names) -> None:
    """Let an adapter serve: its name, None for the base, or a list with one of these for each row.

    Costs nothing: no weight is moved.
    """
    state = adapter_state(model)
    require(not state.merged, "adapter", f"{state.merged} is merged", "unmerge_adapter first")
    for name in [names] if names is None or isinstance(names, str) else names:
        require(
            name is None or name in state.configs,
            "adapter",
            f"there is no {name!r}",
            f"there are {', '.join(state.configs) or 'none'}",
        )
    state.names = names if names is None or isinstance(names, str) else tuple(names)


# ------------------------------------------------------------------------------------ merging


@torch.no_grad()
def merge_adapter(model: TinyMambaModel, name: str = "default") -> None:
    """Write a LoRA adapter into the weights; the old ones are kept for unmerge_adapter."""
    state = adapter_state(model)
    require_whole(model)
    require(
        not state.merged, "adapter", f"{state.merged} is merged already", "unmerge_adapter first"
    )
    require(name in state.configs, "adapter", f"there is no {name!r}", "load it first")
    method = state.configs[name].method
    require(
        method == "lora",
        "adapter",
        f"{method} is no change of weights, and cannot be merged",
        "keep it as an adapter",
    )
    layers = [m for m in model.modules() if isinstance(m, LoRALinear) and name in m.adapters]
    require(
        not (model.config.tie_embeddings and model.head in layers),
        "adapter",
        "the head's weight is the embedding's, too",
        "keep it as an adapter",
    )
    for layer in layers:
        layer.kept = layer.base_layer.weight.data
        layer.base_layer.weight.data = layer.adapters[name].weight(layer.kept)
    state.merged, state.names = name, None


def require_whole(
    model: TinyMambaModel,
    problem: str = "no adapter can be merged into it",
    remedy: str = "keep the adapter, without --merge",
) -> None:
    """Refuse a quantized model."""
    require(not model.quantization, "checkpoint", f"is quantized: {problem}", remedy)


def unmerge_adapter(model: TinyMambaModel) -> None:
    """Take back merge_adapter, bit for bit; the adapter serves again."""
    state = adapter_state(model)
    require(state.merged, "adapter", "none is merged", "merge_adapter first")
    for layer in model.modules():
        if isinstance(layer, LoRALinear) and layer.kept is not None:
            layer.base_layer.weight.data, layer.kept = layer.kept, None
    state.names, state.merged = state.merged, None


def plain_weights(model: TinyMambaModel) -> dict[str, Tensor]:
    """The weights by the names that they have in a model without adapters."""
    return {
        name.replace(".base_layer.", "."): t
        for name, t in model.state_dict().items()
        if ".adapters." not in name
    }


# ------------------------------------------------------------------------------------ files

WEIGHTS, ABOUT = "adapter_model.safetensors", "adapter_config.json"
LORA_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# Settings of Hugging Face's LoRA that change what is computed, and are not known here.
FOREIGN = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def adapter_tensors(model: TinyMambaModel, name: str) -> dict[str, Tensor]:
    """Every tensor of an adapter, by its name in a file."""
    found, mark, method = {}, f".adapters.{name}.", adapter_state(model).configs[name].method
    for key, t in model.state_dict(keep_vars=True).items():
        place, _, part = key.partition(mark)
        if not part:
            continue
        if method == "lora":
            found[f"base_model.model.{place}.{LORA_NAMES[part]}"] = t
        else:
            found[f"{place}.{part}"] = t
    return found


def save_adapter(
    model: TinyMambaModel, folder: str | Path, name: str = "default", base: str | None = None
) -> None:
    """Write adapter_model.safetensors, which carries a hash of the base, and adapter_config.json.

    `base`: the path of the base, as a note for readers.
    """
    state, folder = adapter_state(model), Path(folder)
    require(name in state.configs, "adapter", f"there is no {name!r}", "attach it first")
    config = state.configs[name]
    if config.method == "lora":
        about = {
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
    else:
        about = {"tinymamba_method": config.method, "base_model_name_or_path": base}
        if config.method == "prefix":
            about["prefix_length"] = config.prefix_length
    require_writable(folder, "output_dir")
    write_tensors(folder / WEIGHTS, adapter_tensors(model, name), {"base": state.base})
    write_json(folder / ABOUT, about)


def read_config(folder: Path) -> AdapterConfig:
    path = folder / ABOUT
    require(path.is_file(), str(path), "no such file", "name the folder of an adapter")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(about, dict), str(path), "is no adapter's", "name another")
        if "tinymamba_method" in about:
            length = about.get("prefix_length", AdapterConfig.prefix_length)
            config = AdapterConfig(about["tinymamba_method"], prefix_length=length)
            require(
                config.method in ("prefix", "state_offset"),
                str(path),
                f"method {config.method!r} is unknown",
                "use a newer release",
            )
            return config.validate()
        kind = about.get("peft_type")
        require(kind == "LORA", str(path), f"is of type {kind}", "only LoRA can be read")
        foreign = [n for n in FOREIGN if about.get(n)] + ["bias"] * (about["bias"] != "none")
        first = about.get("init_lora_weights", True)
        foreign += ["init_lora_weights"] * (first not in (True, False, "gaussian", "orthogonal"))
        require(not foreign, str(path), f"uses {', '.join(foreign)}", "train it without")
        return AdapterConfig(
            "lora",
            about["r"],
            about["lora_alpha"],
            about["lora_dropout"],
            about.get("use_rslora", False),
            about.get("use_dora", False),
        ).validate()
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(str(path), f"is no adapter's ({e!r})", "save it anew") from None


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, str]]:
    """The config, the tensors by name, and the notes of an adapter's folder."""
    config = read_config(folder)
    # Hugging Face's files have no checksum.
    return config, *read_all_tensors(folder / WEIGHTS, "save it anew", unsigned="")


def load_adapter(model: TinyMambaModel, folder: str | Path, name: str = "default") -> None:
    """Attach an adapter from its folder and let it serve, as save_adapter or Hugging Face wrote it.

    One of another base, or that does not fit, is a UserError, and leaves the model as it was.
    """
    folder, state = Path(folder), adapter_state(model)
    config, tensors, notes = read_adapter(folder)
    path = str(folder / WEIGHTS)
    require(
        notes.get("base", state.base) == state.base,
        path,
        "belongs to another base",
        "use the checkpoint that it was trained on",
    )
    if config.method == "lora":
        tensors = {
            re.sub(r"^base_model\.model\.(.*?)(?=blocks\.\d|head\.)", "", n): t
            for n, t in tensors.items()
        }
        places, known = {n.rpartition(".lora_")[0] for n in tensors}, set(linears(model))
        require(
            places and places <= known,
            path,
            f"has layers that the model lacks: {', '.join(sorted(places - known)[:3])}",
            "use the base that it was trained on",
        )
        config.target_modules = sorted(places)
        ranks = {
            place: tensors[f"{place}.lora_A.weight"].shape[0]
            for place in places
            if f"{place}.lora_A.weight" in tensors
        }
        require(
            set(ranks.values()) == {config.lora_rank},
            path,
            f"has updates of ranks {sorted(set(ranks.values()))}, its config says "
            f"{config.lora_rank}",
            "train it with one rank",
        )
    before, trained = state.names, get_trainable_parameters(model)
    attach(model, config, name)
    try:
        fill(model, name, tensors, path)
    except UserError:
        detach(model, name)
        state.names = before
        for p in trained:
            p.requires_grad_(True)
        raise


@torch.no_grad()
def fill(model: TinyMambaModel, name: str, tensors: dict[str, Tensor], path: str) -> None:
    """Give an adapter the values of a file, and freeze it."""
    own = {n.removeprefix("base_model.model."): t for n, t in adapter_tensors(model, name).items()}
    fits = own.keys() == tensors.keys() and all(
        t.shape == tensors[n].shape and tensors[n].is_floating_point() for n, t in own.items()
    )
    require(fits, path, "has other tensors than such an adapter", "use its own base and config")
    require(
        all(t.isfinite().all() for t in tensors.values()),
        path,
        "has values that are not finite",
        "train it anew",
    )
    for n, t in own.items():
        t.requires_grad_(False).copy_(tensors[n])


def detach(model: TinyMambaModel, name: str) -> None:
    """Remove an adapter; the base serves."""
    state = adapter_state(model)
    for place in [m for m in model.modules() if isinstance(m, AdapterSlot)]:
        if name in place.adapters:
            del place.adapters[name]
    del state.configs[name]
    state.names = None


# ------------------------------------------------------------------------------------ training

FIRST = {  # values that differ from Config's own
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
RATES = {"lora": 8e-3, "prefix": 3e-2, "state_offset": 1e-1, "full": 4e-3}
FROM_BASE = [
    *SHAPE_FIELDS,
    "block_size",
    "batch_size",
    "data_dtype",
    "eos_id",
    "generation_prompt",
    "deepnet",
    "scan",
    "chunk_size",
]
NOT_FLAGS = [*SHAPE_FIELDS, "deepnet", "checkpoint_path", "parallel"]


class FineTuner(Trainer):
    """A training run of an adapter: its checkpoints hold the adapter's weights and no others."""

    def __init__(
        self,
        config: Config,
        base: TinyMambaModel,
        adapter: AdapterConfig,
        tokenizer=None,
        saved: dict | None = None,
    ):
        """`adapter` of method full trains every weight, from those of the base."""
        self.base, self.adapter = base, adapter
        super().__init__(config, tokenizer, saved)

    def build(self) -> TinyMambaModel:
        model = TinyMambaModel(self.config)
        if self.base.quantization:
            quantize_like(model, self.base.quantization)
        model.load_state_dict(self.base.state_dict())
        if self.adapter.method == "full":
            return model
        return attach(model, self.adapter)

    def weights(self) -> dict[str, Tensor]:
        if self.adapter.method == "full":
            return super().weights()
        trained = {n for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: t for n, t in self.model.state_dict().items() if n in trained}

    def about(self) -> dict:
        """What a checkpoint says of the adapter; nothing of a plain model."""
        if self.adapter.method == "full":
            return {}
        asked = dataclasses.asdict(self.adapter)
        return {"adapter": {**asked, "base": adapter_state(self.model).base}}

    def state(self, val_loss: float | None = None) -> dict:
        return {**super().state(val_loss), **self.about()}

    def restore(self, saved: dict) -> None:
        old, new = (about.get("adapter", {"method": "full"}) for about in (saved, self.about()))
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        require(
            not changed,
            ", ".join(changed),
            f"changed since {self.config.checkpoint_path} was saved",
            "leave the flags out, or start a new run",
        )
        super().restore(saved)

    def announce(self) -> None:
        super().announce()
        trained = sum(p.numel() for p in get_trainable_parameters(self.model))
        whole = self.model.count_parameters()["total"]
        self.log.say(f"{trained:,} of {whole:,} parameters are trained, {trained / whole:.2%}")

    def take_best(self) -> None:
        """Go back to the weights of the best validation."""
        best = sibling(self.config.checkpoint_path, "best")
        if self.val_data is not None and best.is_file():
            self.model.load_state_dict(load_checkpoint(best)["model"], strict=False)


# ------------------------------------------------------------------------------------ main


@dataclass
class Options:
    """Files; Config and AdapterConfig have the rest of the command line."""

    checkpoint: str = "tinymamba_model_latest.pt"  # the base model: a checkpoint or a folder
    output_dir: str = "./adapter"  # folder to write to
    adapter: str | None = None  # folder of an adapter to merge, instead of training
    merge: bool = False  # write merged.pt, a plain checkpoint with the LoRA adapter in it
    force: bool = False  # replace files in output_dir


SHORT = {  # flags beside their longer names
    "train_data_path": ("train_data_path", "train_data"),
    "val_data_path": ("val_data_path", "val_data"),
    "max_steps": ("max_steps", "steps"),
}


def parse(argv: list[str] | None) -> tuple[Options, dict, dict]:
    """The command line: Options, and the fields of AdapterConfig and Config that were given."""
    usage = "python peft.py --checkpoint FILE [--FLAG VALUE ...]"
    parser = CliParser(usage=usage, description=str(__doc__).split("As a library")[0])
    add_flags(parser, Options)
    add_flags(parser, AdapterConfig)
    defaults = {**FIRST, "lr": "by method", "optimizer": "adamw"}
    add_flags(parser, Config, defaults, NOT_FLAGS, SHORT)
    args = parser.parse_args(argv)
    options = Options(**given_fields(Options, args))
    asked = given_fields(AdapterConfig, args)
    for given in (options, AdapterConfig(**asked)):
        check_fields(given, dashes="--")
    return options, asked, given_fields(Config, args)


def settings(options: Options, method: str, named: dict, base: TinyMambaModel) -> Config:
    """The Config of a run: the base's shape, defaults of fine-tuning, and the flags over it."""
    full, folder = method == "full", Path(options.output_dir)
    values = {name: getattr(base.config, name) for name in FROM_BASE}
    values |= {**FIRST, "optimizer": base.config.optimizer if full else "adamw"}
    values |= {"lr": RATES[method], "log_dir": str(folder / "logs")}
    values |= {"checkpoint_path": str(folder / checkpoint_name(method)), **named}
    adamw, remedy = values["optimizer"] == "adamw", "leave it out, or use --method full"
    require(full or adamw, "optimizer", "is for matrices of full size", remedy)
    return Config(**values).validate()


def checkpoint_name(method: str) -> str:
    """The file of a run's newest state."""
    return "tinymamba_model_latest.pt" if method == "full" else "adapter_latest.pt"


def train(options: Options, asked: dict, named: dict) -> int:
    """Start a run, or resume one; returns the exit code."""
    folder, adapter = Path(options.output_dir), AdapterConfig(**asked).validate()
    base = load_model(options.checkpoint)
    if adapter.method == "full":
        require_whole(base, "only adapters can be trained on it", "use --method lora")
    if options.merge:
        require_whole(base)
    config, saved = settings(options, adapter.method, named, base), None
    if config.resume:
        saved = load_newest(
            config.checkpoint_path, print if from_launcher("RANK", 0) == 0 else None
        )
        config = resumed_config(saved, {**named, "checkpoint_path": config.checkpoint_path})
        kept = {name: value for name, value in saved.get("adapter", {}).items() if name != "base"}
        adapter = AdapterConfig(**{**kept, **asked}).validate()
    lora = adapter.method == "lora"
    if lora:
        targets(base, adapter.target_modules)  # rejected before anything is written
    require(not options.merge or lora, "--merge", "is for --method lora", "leave it out")
    there = [f for f in (WEIGHTS, ABOUT, "merged.pt") if (folder / f).exists()]
    free, remedy = not there, "pass --force, --resume or another --output_dir"
    allowed = options.force or config.resume or free
    require(allowed, str(folder), f"holds {', '.join(there)}", remedy)
    prepare_default_data(config, named)
    tuner = FineTuner(config, base, adapter, saved=saved)
    code = tuner.run()
    if code or not tuner.main or adapter.method == "full":
        return code
    tuner.take_best()
    save_adapter(tuner.model, folder, base=options.checkpoint)
    size = (folder / WEIGHTS).stat().st_size
    print(f"{folder / WEIGHTS}: {size:,} bytes")
    if options.merge:
        write_merged(tuner.model, folder / "merged.pt")
    return 0


def write_merged(model: TinyMambaModel, path: Path) -> None:
    """Merge the active adapter and write a plain checkpoint."""
    merge_adapter(model)
    save_checkpoint(path, {"model": plain_weights(model), "config": model.config.to_dict()})
    print(f"{path}: the model with the adapter in it")


def merge(options: Options) -> int:
    """Merge a saved adapter into its base; returns the exit code."""
    problem, remedy = "is for --merge; a run starts from the base", "pass --merge, or leave it out"
    require(options.merge, "--adapter", problem, remedy)
    path = Path(options.output_dir) / "merged.pt"
    free, remedy = options.force or not path.exists(), "pass --force or another --output_dir"
    require(free, str(path), "exists", remedy)
    model = load_model(options.checkpoint)
    require_whole(model)
    load_adapter(model, options.adapter)
    require_writable(path.parent, "output_dir")
    write_merged(model, path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options, asked, named = parse(argv)
    return merge(options) if options.adapter else train(options, asked, named)


# ---------------------------------------------------------------- beside Hugging Face's package


def installed_package() -> importlib.machinery.ModuleSpec | None:
    """The spec of the package of this name that is installed elsewhere."""
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("peft", elsewhere)
    return spec if spec and spec.loader and spec.submodule_search_locations else None


def placeholder(name: str) -> type:
    """A class of which nothing is an instance: what others ask `isinstance` for."""

    def refuse(self, *args, **kwargs):
        raise ImportError(f"{name} needs Hugging Face's package: pip install peft")

    return type(name, (), {"__init__": refuse, "__module__": "peft"})


PACKAGE, LOADING, LOADED = None, threading.RLock(), []


def load_package() -> None:
    """Execute the package's own __init__ in this module, once; names of this file stay."""
    with LOADING:
        if LOADED:  # or loading: what asks from within finds what is there so far
            return
        LOADED.append(True)
        own = {n: v for n, v in globals().items() if not n.startswith("__")}
        try:
            exec(PACKAGE.loader.get_code("peft"), globals())
        except BaseException:
            LOADED.clear()
            raise
        globals().update(own)


class Submodules:
    """Finder for peft.x: a package's __init__ runs before its submodules do."""

    def find_spec(self, name: str, path, target=None):
        if LOADED or not name.startswith("peft."):
            return None
        load_package()
        module = sys.modules.get(name)
        if module is None:
            return None
        # Imported along the way. It would be executed once more, by the loader of its own spec.
        module.__spec__ = importlib.machinery.ModuleSpec(name, Imported(module))
        return module.__spec__


class Imported:
    """Loader of a module that is imported already."""

    def __init__(self, module):
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec):
        return self.module

    def exec_module(self, module) -> None:
        module.__spec__ = self.spec


def __getattr__(name: str):
    """Names that this file lacks are Hugging Face's, whose package is loaded on the first one."""
    private = name.startswith("__") and name not in ("__version__", "__all__")
    if PACKAGE and not private:
        load_package()
        if name in globals():
            return globals()[name]
    elif __name__ == "peft" and name in ("PeftModel", "PeftMixedModel"):
        return globals().setdefault(name, placeholder(name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "peft":  # not as a script, nor within a package
    PACKAGE = installed_package()
    if PACKAGE:
        __path__ = list(PACKAGE.submodule_search_locations)
        __package__, __spec__.submodule_search_locations = "peft", __path__
        sys.meta_path.insert(0, Submodules())

if __name__ == "__main__":
    run_cli(main)
