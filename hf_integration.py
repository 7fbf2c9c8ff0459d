"""Configuration, model and tokenizer of TinyMamba for Hugging Face's `transformers`.

    python hf_integration.py convert --checkpoint tinymamba_model_best.pt --output_dir ./hf_model
    python hf_integration.py convert --checkpoint ./hf_model --output_dir tuned.pt   # and back
    python hf_integration.py push --model_dir ./hf_model --repo_id me/my-model --private

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("./hf_model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("./hf_model")

AutoModel gives hidden states, AutoModelForSequenceClassification scores for each row.
After `import hf_integration`, trust_remote_code is not needed. The blocks are those of testv2.py.
This file passes them what `transformers` has prepared, and keeps their state in its cache.
Dimension letters in the comments on shapes are those of testv2.py; m is the number of keys that a
cache holds.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    from tinymamba.cli import begin

    begin(__file__, __spec__)

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import (
    Cache,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as INDEX
from transformers.utils import SAFE_WEIGHTS_NAME as WEIGHTS
from transformers.utils import cached_file, is_tracing
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import get_checkpoint_shard_files

from testv2 import (
    BEFORE,
    FOLDER_FIELDS,
    FOLDER_FORMAT,
    Config,
    LayerState,
    ModelState,
    SequenceContext,
    TinyMambaBlock,
    TinyMambaModel,
    describe_model,
    load_folder,
    load_model,
    padding_last,
    save_folder,
    take_tokens,
)
from tinymamba.checkpoint import new_folder, read_all_tensors, replace_files, save_model, write_json
from tinymamba.cli import CliParser, UserError, add_flags, make_options, require, run_cli
from tinymamba.decode import PLAIN_MODULES
from tinymamba.kernels import (
    QuantizedLinear,
    complete_tensors,
    quantize_like,
    quantized_layers,
    settle_ties,
    stored_tensors,
    unpack_codes,
)
from tinymamba.tokenizer import EOS_NAMES, PAD_TOKEN, SimpleTokenizer, find_turn_end, open_tokenizer

# ------------------------------------------------------------------------------ configuration

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class TinyMambaConfig(PreTrainedConfig):
    """The architecture: the fields of testv2.Config that a saved model keeps.

    `TinyMambaConfig(d_model=256, n_layer=4)`. The names of other models (`hidden_size`,
    `num_hidden_layers`, ...) work as well. An impossible value is a ValueError.
    """

    model_type = "tinymamba"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "hidden_act": "activation",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_heads",
        "sliding_window": "window_size",
        "tie_word_embeddings": "tie_embeddings",
        "state_size": "d_state",
        "conv_kernel": "d_conv",
        "hidden_dropout": "dropout",
    }
    # For each block the cache holds three windows of inputs: those of the convolutions, the phase,
    # and (position, start of the document). Of the last two, only the newest entry is used. It also
    # holds two recurrent states: those of the SSM and of a memory.
    number_of_conv_states = 3

    def __post_init__(self, **kwargs: Any) -> None:
        """Set the fields; the values of `kwargs` may come from a config.json."""
        given: dict[str, Any] = {}
        for name, value in kwargs.items():
            own = self.attribute_map.get(name, name)
            if given.setdefault(own, value) != value:
                problem = f"is {given[own]} under one of its names and {value} under another"
                raise ValueError(f"{own}: {problem}; make them equal")
        before = BEFORE if "format_version" in given else {}
        for name in FOLDER_FIELDS:
            default = before.get(name, getattr(Config, name))
            setattr(self, name, given.pop(name, default))
        given.pop("layer_types", None)  # a property here, and written to config.json for readers
        self.quantization = given.pop("quantization", None)
        self.format_version = given.pop("format_version", FOLDER_FORMAT)
        self.use_cache = given.pop("use_cache", True)
        eos = self.eos_id if self.eos_id >= 0 else None
        for name in SPECIAL_IDS:
            setattr(self, name, given.pop(name, eos))
        super().__post_init__(**given)
        self.to_native()

    def to_dict(self) -> dict[str, Any]:
        """As for every configuration; other libraries look for `tie_word_embeddings` in it."""
        return {**super().to_dict(), "tie_word_embeddings": self.tie_embeddings}

    @property
    def layer_types(self) -> list[str]:
        """Every block has a sliding window and a recurrent state."""
        return ["hybrid_sliding"] * self.n_layer

    def to_native(self) -> Config:
        """This configuration as a testv2.Config."""
        try:
            config = Config.from_dict({name: getattr(self, name) for name in FOLDER_FIELDS})
        except UserError as e:
            raise ValueError(str(e)) from None
        config.use_flash_attn = self._attn_implementation != "eager"
        return config


def config_of(native: TinyMambaModel, **changes: Any) -> TinyMambaConfig:
    """The configuration of a native model, with changes."""
    described = {n: v for n, v in describe_model(native).items() if n != "model_type"}
    return TinyMambaConfig(**{**described, **changes})


# ------------------------------------------------------------------------------------ cache

CONV, PHASE, POSITION = range(3)  # the windows of inputs; see number_of_conv_states
SSM, MEMORY = range(2)  # the recurrent states
TAIL = 32  # tokens that are cheaper to read twice than to read in a call of their own
SNAPSHOTS = 32  # states that a cache keeps to go back to; of older calls it keeps the tokens


class Tokens(NamedTuple):
    """What a call reads, in the order of TinyMambaModel.run; None is the plain case."""

    ids: Tensor  # (b, l)
    padding: Tensor | None = None  # (b, l), 0 at padding
    embedded: Tensor | None = None  # (b, l, d), in place of the embeddings of ids
    ends: Tensor | None = None  # (b, l) of bool: tokens that end a document
    begins: Tensor | None = None  # (b,) of bool: rows whose first token begins a document

    def map(self, f: Callable[[Tensor], Tensor]) -> Tokens:
        """Apply `f` to all tensors."""
        return Tokens._make(t if t is None else f(t) for t in self)

    def cut(self, begin: int, end: int) -> Tokens:
        """The tokens from `begin` to before `end`.

        What follows them decides whether its first token begins a document: the last token of the
        part ends none, and that of the part before may have been said to end one.
        """
        ids, padding, embedded, ends = (t if t is None else t[:, begin:end] for t in self[:4])
        begins = None if begin else self.begins
        if self.ends is not None and ends is not None:
            ends = ends & ~self.last_before(end)[:, begin:end]
            if begin:
                after = (self.ends & self.last_before(begin)).any(1)  # (b,)
                begins = after if bool(after.any()) else None
        return Tokens(ids, padding, embedded, ends, begins)

    def last_before(self, end: int) -> Tensor:
        """(b, l) of bool: each row's last token before the column `end` that is no padding."""
        real = torch.ones_like(self.ids) if self.padding is None else self.padding
        index = torch.arange(real.shape[1], device=real.device)
        real = (real != 0) & (index < end)
        return real & (index == last_index(real)[:, None])


def last_index(real: Tensor) -> Tensor:
    """Index (b,) of each row's last token for which real (b, l) is not 0; 0 if it has none."""
    return (torch.arange(real.shape[1], device=real.device) * (real != 0)).argmax(1)


def join(parts: list[Tokens], embedding: nn.Module) -> Tokens:
    """Parts that follow each other, of which only the first may begin a document."""
    plain = (torch.ones_like, torch.ones_like, embedding, lambda ids: torch.zeros_like(ids) > 0)
    fields = zip(*(part[:4] for part in parts), strict=True)
    joined = [
        None
        if all(t is None for t in field)
        else torch.cat([f(p.ids) if t is None else t for t, p in zip(field, parts, strict=True)], 1)
        for f, field in zip(plain, fields, strict=True)
    ]
    return Tokens._make([*joined, parts[0].begins])


def count_tokens(parts: list[Tokens]) -> int:
    """How many columns the parts have."""
    return sum(part.ids.shape[1] for part in parts)


class Snapshot(NamedTuple):
    """The text before a call, and what the call has read."""

    read: int  # columns before the call
    state: ModelState | None  # None before the first token, or if it is not kept any more
    tokens: Tokens


class CachedText:
    """What a DynamicCache has read. The tensors of its state are never written to.

    A call replaces them, so a copy costs nothing. While `record_past` is set, the states before the
    last calls are kept. `crop` goes back to one of them, and the next call first reads again what
    is left of the tokens after it.
    """

    def __init__(self) -> None:
        self.state: ModelState | None = None
        self.read = 0  # columns of all calls
        self.unread: list[Tokens] = []  # those of the last columns that the state has not seen
        self.past: list[Snapshot] = []
        self.record_past = False

    def replace(self, state: ModelState, tokens: Tokens) -> None:
        """Hold the state after `tokens`, which include those that were unread."""
        before, length = self.read - count_tokens(self.unread), tokens.ids.shape[1]
        if self.record_past:
            self.past.append(Snapshot(before, self.state, tokens))
            if len(self.past) > SNAPSHOTS:
                self.past[-SNAPSHOTS] = self.past[-SNAPSHOTS]._replace(state=None)
        elif self.past:
            self.past = []
        if length > state.layers[0].keys.shape[2] + 1:  # views would keep all of a long call alive
            state = state.clone()
        self.state, self.unread, self.read = state, [], before + length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove columns; 0 only drops the earlier states."""
        if tokens_to_remove > 0:
            raise ValueError("tokens_to_remove: is positive; pass the number to remove as -n")
        length, base = self.read + tokens_to_remove, self.read - count_tokens(self.unread)
        base = base if length >= base else self.go_back(length)
        unread = []
        for part in self.unread:
            unread += [part.cut(0, length - base)] if length > base else []
            base += part.ids.shape[1]
        self.unread, self.past, self.read = unread, [], length

    def go_back(self, length: int) -> int:
        """Hold the newest kept state of at most `length` columns; returns its number of columns."""
        kept = [
            i
            for i, s in enumerate(self.past)
            if s.read <= length and (i == 0 or s.state is not None)
        ]
        if not kept:
            raise RuntimeError(
                "past_key_values: the state before the removed tokens was not kept; "
                "call activate_past_recording() before they are read"
            )
        self.state = self.past[kept[-1]].state
        self.unread = [s.tokens for s in self.past[kept[-1] :]]
        return self.past[kept[-1]].read

    def map(self, f: Callable[[Tensor], Tensor]) -> None:
        """Apply `f`, which selects or repeats rows, to all tensors."""
        states = [s if s is None else s.map(f) for s in (self.state, *(s.state for s in self.past))]
        self.state, past = states[0], zip(self.past, states[1:], strict=True)
        self.past = [Snapshot(s.read, state, s.tokens.map(f)) for s, state in past]
        self.unread = [tokens.map(f) for tokens in self.unread]

    def __deepcopy__(self, memo: dict) -> CachedText:
        other = memo[id(self)] = CachedText()
        other.__dict__.update({**self.__dict__, "past": [*self.past]})
        return other


class StateLayer(LinearAttentionAndSlidingWindowAttentionLayer):
    """A block's part of a CachedText, as a layer of a DynamicCache. The first acts for all.

    A saved layer has the base class, which loads without this file.
    """

    is_croppable = True

    def __init__(self, text: CachedText, index: int, sliding_window: int):
        self.text, self.index, self.sliding_window = text, index, sliding_window
        self._sliding_window_tensor = torch.tensor(sliding_window)  # of an iteration over a cache

    def __getattr__(self, name: str) -> Any:
        """An attribute of the base class: nobody but a reader from outside needs one."""
        if name.startswith("__") or name not in (values := self.base_values()):
            raise AttributeError(name)
        return values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        """`record_past`, which transformers sets on every layer, is one of the text."""
        if name == "record_past":
            self.text.record_past = value
        else:
            super().__setattr__(name, value)

    def base_values(self) -> dict[str, Any]:
        """What the base class has in its attributes for the same state."""
        text, states = self.text, TinyMambaConfig.number_of_conv_states
        base = LinearAttentionAndSlidingWindowAttentionLayer(self.sliding_window, states)
        values = {**base.__dict__, "cumulative_length": text.read, "record_past": text.record_past}
        if text.state is None:
            return values
        layer, ready = text.state.layers[self.index], dict.fromkeys(range(states), True)
        unfilled = max(0, layer.keys.shape[2] - text.read + count_tokens(text.unread))
        position = torch.stack((text.state.position, text.state.document_start), dim=1)
        recurrent = {SSM: layer.ssm, MEMORY: layer.memory, POSITION: None}
        return {
            **values,
            "keys": layer.keys[:, :, unfilled:],
            "values": layer.values[:, :, unfilled:],
            "conv_states": {CONV: layer.conv.mT, PHASE: layer.phase[..., None],
                            POSITION: position[..., None]},
            "recurrent_states": recurrent,
            "has_previous_state": ready,
            "is_conv_states_initialized": {**ready},
            "is_recurrent_states_initialized": {i: t is not None for i, t in recurrent.items()},
            "is_initialized": True,
            "device": layer.keys.device,
            "dtype": layer.keys.dtype,
        }  # fmt: skip

    def get_seq_length(self) -> int:
        """How many columns have been read."""
        return self.text.read

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens; 0 only drops the earlier states."""
        if not self.index:
            self.text.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, for beam search."""
        if not self.index:
            self.text.map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if not self.index:
            self.text.map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        if not self.index:
            self.text.map(lambda t: t[indices])

    def reset(self) -> None:
        """Forget all tokens."""
        if not self.index:
            self.text.__dict__.update({**CachedText().__dict__, "record_past": self.record_past})

    def __deepcopy__(self, memo: dict) -> StateLayer:
        return StateLayer(copy.deepcopy(self.text, memo), self.index, self.sliding_window)

    def __reduce__(self) -> tuple:
        unread = [tuple(tokens) for tokens in self.text.unread]
        values = {**self.base_values(), "unread": unread, "record_past": False}
        return LinearAttentionAndSlidingWindowAttentionLayer, (self.sliding_window,), values


def read_cache(cache: Cache, model: TinyMambaModel, batch: int, new: int = 0) -> ModelState:
    """The state of b sequences in `cache`, which must have room for `new` more tokens.

    It has not seen the tokens that a crop has left unread.
    """
    layers: list[Any] = cache.layers if isinstance(cache, Cache) else []
    first = layers[0] if len(layers) == len(model.blocks) else None
    if not isinstance(first, LinearAttentionCacheLayerMixin):
        raise ValueError(
            "past_key_values: cannot hold recurrent states; "
            "pass DynamicCache(config=model.config) or a StaticCache with this config"
        )
    window, static = model.config.window_size, isinstance(first, StaticLayer)
    if static and first.max_cache_len < min(first.get_seq_length() + new, window - 1):
        raise ValueError(
            f"past_key_values: a static cache of {first.max_cache_len} tokens is full; "
            "use a larger max_cache_len"
        )
    if not static and not hasattr(first, "text"):  # of DynamicCache(config=...), or of a file
        text = CachedText()
        text.state = state_of(layers, model)
        text.unread = [Tokens._make(tokens) for tokens in getattr(first, "unread", [])]
        text.read, text.record_past = first.cumulative_length, first.record_past
        layers[:] = [StateLayer(text, i, window) for i in range(len(layers))]
    state = state_of(layers, model) if static else layers[0].text.state
    if state is None:
        return model.init_state(batch)
    rows = state.position.shape[0]
    if rows != batch:
        raise ValueError(f"past_key_values: has {rows} sequences, but the input has {batch}")
    return state


def state_of(layers: list[Any], model: TinyMambaModel) -> ModelState | None:
    """The state in the layers that transformers makes; None before the first token."""
    if not all(layers[0].has_previous_state.values()):
        return None
    kernel, window, states = model.config.d_conv, model.config.window_size, []
    for layer in layers:
        tail = layer.conv_states[CONV][:, :, : kernel - 1].mT  # (b, k-1, d + 2n + d)
        phase = layer.conv_states[PHASE].squeeze(-1)  # (b, r)
        ssm, memory = (layer.recurrent_states[i] for i in (SSM, MEMORY))
        keys, values = (
            last_keys(t, layer.get_seq_length(), window - 1) for t in (layer.keys, layer.values)
        )
        states.append(LayerState(tail, ssm, phase, keys, values, memory))
    position = layers[0].conv_states[POSITION].squeeze(-1)  # (b, 2)
    return ModelState(states, *position.unbind(1))


def last_keys(cached: Tensor, read: int, count: int) -> Tensor:
    """The last `count` keys of cached (b, a, m, f) after `read` tokens.

    Keys from before the first token are arbitrary: attention masks them. In a static cache, unused
    entries follow the filled ones.
    """
    filled = min(read, cached.shape[2])
    if filled == count == cached.shape[2]:
        return cached
    index = torch.arange(count, device=cached.device) + (filled - count)
    return cached.index_select(2, index.clamp(min=0))


def write_cache(cache: Cache, state: ModelState, tokens: Tokens) -> None:
    """Store the state after `tokens` in `cache`."""
    if not isinstance(cache.layers[0], StaticLayer):
        cache.layers[0].text.replace(state, tokens)
        return
    position = torch.stack((state.position, state.document_start), dim=1)[..., None]  # (b, 2, 1)
    for i, layer in enumerate(state.layers):
        tail = layer.conv.mT  # (b, d + 2n + d, k-1)
        cache.update_conv_state(tail if tail.shape[2] else F.pad(tail, (1, 0)), i, CONV)
        cache.update_conv_state(layer.phase[..., None], i, PHASE)
        cache.update_conv_state(position, i, POSITION)
        cache.update_recurrent_state(layer.ssm, i, SSM)
        if layer.memory is not None:
            cache.update_recurrent_state(layer.memory, i, MEMORY)
        write_keys(cache, layer, i, tokens.ids.shape[1], tokens.padding is not None)


def write_keys(cache: Cache, layer: LayerState, i: int, length: int, padded: bool) -> None:
    """Append keys and values for `length` tokens. Only those of the last w-1 are known."""
    tails = layer.keys, layer.values  # (b, a, w-1, f)
    count = tails[0].shape[2]
    if length > count:
        tails = tuple(F.pad(t, (0, 0, length - count, 0)) for t in tails)
    cache.update(*(t[:, :, -length:] for t in tails), i)
    if padded:  # `update` has shifted a row's older keys by its padding as well: write all again
        stored = cache.layers[i]
        filled = min(cache.get_seq_length(i), stored.keys.shape[2])
        kept = min(filled, count)
        for cached, tail in zip((stored.keys, stored.values), tails, strict=True):
            cached[:, :, filled - kept : filled] = tail[:, :, tail.shape[2] - kept :]


# ------------------------------------------------------------------------------------ model

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
)


class Recorder:
    """Records the inputs of all blocks and, if `attentions`, their attention weights.

    Weights are (b, a, l, keys): up to w-1 keys from before the call, then the l keys of the call.
    """

    def __init__(self, model: TinyMambaModel, attentions: bool, padding: Tensor | None, read: int):
        self.attentions, self.window = attentions, model.config.window_size
        self.blocks, self.past = len(model.blocks), min(read, self.window - 1)
        self.hidden: list[Tensor] = []
        self.weights: list[Tensor] = []
        # The blocks see a row's padding last. What is recorded has the order of the input.
        self.order: Tensor | None = None
        self.back: Tensor | None = None
        if padding is not None:
            self.order, self.back, _ = padding_last(padding)

    def record(self, records: list[Tensor], new: Tensor) -> Tensor:
        """Append `new`, except when a block is recomputed in the backward pass."""
        if len(records) < self.blocks:
            records.append(new)
        return new

    def record_hidden(self, x: Tensor) -> Tensor:
        """Record a block's input, and return it so that gradients pass through the record."""
        if self.back is None:
            return self.record(self.hidden, x)
        return take_tokens(self.record(self.hidden, take_tokens(x, self.back)), self.order)

    def __call__(
        self, default: Callable, q: Tensor, keys: Tensor, values: Tensor, context: SequenceContext
    ) -> Tensor:
        """As SequenceContext.attend: the result of `default`, computed from recorded weights.

        q (b, a, l, f), keys and values (b, a, w+l, f) -> (b, a, l, f).
        """
        if not self.attentions:
            return default(q, keys, values, context.mask)
        length, cached = q.shape[2], self.window - 1
        keys, values = keys[:, :, 1:], values[:, :, 1:]  # (b, a, w-1+l, f)
        token = torch.arange(length, device=q.device)[:, None]
        key = torch.arange(-cached, length, device=q.device)
        begin = 0 if context.starts is None else context.starts[:, None, :, None]
        visible = (key <= token) & (key >= token - cached) & (key >= begin)  # (b, 1, l, w-1+l)
        scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1).to(values.dtype)[..., cached - self.past :]
        recorded = self.record(self.weights, self.reorder(weights, self.back))
        return self.reorder(recorded, self.order) @ values[:, :, cached - self.past :]

    def reorder(self, weights: Tensor, order: Tensor | None) -> Tensor:
        """Weights (b, a, l, past+l) with the call's tokens in another order, on both sides."""
        if order is None:
            return weights
        past = torch.arange(self.past, device=order.device).expand(len(order), -1)
        columns = torch.cat((past, order + self.past), dim=1)
        rows = take_tokens(weights.transpose(1, 2), order)  # (b, l, a, past+l)
        return take_tokens(rows.transpose(1, 3), columns).permute(0, 2, 3, 1)


class TinyMambaHFBlock(GradientCheckpointingLayer, TinyMambaBlock):
    """The native block, with the activation checkpointing of `transformers`."""

    def forward(
        self, x: Tensor, context: SequenceContext, past: LayerState | None
    ) -> tuple[Tensor, LayerState | None, Tensor]:
        """As TinyMambaBlock.forward."""
        if isinstance(context.attend, Recorder):
            x = context.attend.record_hidden(x)
        return TinyMambaBlock.forward(self, x, context, past)


PLAIN_MODULES.add(TinyMambaHFBlock)  # a recorder is an argument, for which `run` looks itself


class TinyMambaHFBackbone(TinyMambaModel):
    """The native model, called as `transformers` calls a model without its head."""

    BLOCK = TinyMambaHFBlock

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        **ignored: Any,
    ) -> BaseModelOutputWithPast:
        """As TinyMambaHFModel.forward; gives last_hidden_state (b, l, d)."""
        input_ids = self.require_input(input_ids, inputs_embeds)
        padding = mask_of_new_tokens(attention_mask, *input_ids.shape)
        ends, begins = split_documents(position_ids, padding, len(input_ids))
        tokens, state = Tokens(input_ids, padding, inputs_embeds, ends, begins), None
        if past_key_values is not None:
            state = read_cache(past_key_values, self, *input_ids.shape)
            if state.position.is_meta:  # accelerate has offloaded the embedding
                state = self.init_state(len(input_ids), input_ids.device)
        recorder = None
        if output_attentions or output_hidden_states:
            read = 0 if past_key_values is None else past_key_values.get_seq_length()
            recorder = Recorder(self, output_attentions, padding, read)
        if state is None:
            hidden, _, _ = self.run(input_ids, None, padding, inputs_embeds, ends, recorder)
        else:
            hidden = self.read(tokens, state, past_key_values, recorder)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*recorder.hidden, hidden) if recorder and output_hidden_states else None,
            attentions=tuple(recorder.weights) if recorder and output_attentions else None,
        )

    def read(
        self, tokens: Tokens, state: ModelState, cache: Cache, recorder: Recorder | None
    ) -> Tensor:
        """Continue the text of a cache, of this state, by tokens (b, l) -> hidden (b, l, d)."""
        length = tokens.ids.shape[1]
        parts, outputs = self.parts_to_read(tokens, cache.layers[0], recorder is None), []
        for part in parts:
            ids, padding, embedded, ends, begins = part
            attend = recorder if part is parts[-1] else None
            state = begin_documents(state, begins)
            hidden, state, _ = self.run(ids, state, padding, embedded, ends, attend)
            write_cache(cache, state, part)
            outputs.append(hidden)
        hidden = outputs[0] if len(parts) == 1 else torch.cat(outputs, dim=1)
        return hidden[:, -length:]

    def parts_to_read(self, tokens: Tokens, layer: Any, together: bool) -> list[Tokens]:
        """What to read, call by call: tokens that a crop has left unread, then the new ones.

        All in one call if `together` and few are unread: one call costs little more for TAIL tokens
        than for 2. While the cache can be cropped, the tail of a long call is a call of its own, so
        that a crop goes back to the state before the tail.
        """
        text = getattr(layer, "text", None)  # a static cache has none
        if text is None or not (text.unread or text.record_past):
            return [tokens]
        join_new = together and count_tokens(text.unread) <= TAIL
        parts: list[Tokens] = []
        for part in (*text.unread, tokens):
            if parts and part.begins is None and (join_new or part is not tokens):
                parts[-1] = join([parts[-1], part], self.embedding)
            else:
                parts.append(part)
        length = parts[-1].ids.shape[1]
        if together and text.record_past and length > 2 * TAIL:
            last = parts.pop()
            parts += [last.cut(0, length - TAIL), last.cut(length - TAIL, length)]
        return parts

    def require_input(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The ids (b, l) of a call; zeros if embeddings replace them. Rejects a call without."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: pass exactly one of them")
        if inputs_embeds is not None:
            if self.config.document_mask:
                raise ValueError("inputs_embeds: a model with document_mask needs the ids")
            shape, device = inputs_embeds.shape[:2], inputs_embeds.device
            input_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        assert input_ids is not None
        if input_ids.shape[1] == 0:
            raise ValueError(
                "input_ids: have no new token; with a cache, pass the whole text, or its "
                "new tokens and the attention_mask of the whole text"
            )
        return input_ids


class TinyMambaPreTrainedModel(PreTrainedModel):
    """What the classes below share.

    `model.model` is the native model, whose weights have the same names in every class's files.
    """

    config_class = TinyMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["TinyMambaHFBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D", "angle_proj"]
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}

    def __init__(self, config: TinyMambaConfig):
        super().__init__(config)
        self.model = TinyMambaHFBackbone(config.to_native())
        if config.quantization is not None:
            quantize_like(self.model, config.quantization)
        if isinstance(self.model.head, QuantizedLinear):
            self._tied_weights_keys = {}
        elif config.tie_embeddings:  # untie: post_init or from_pretrained ties them again
            self.model.head.weight = nn.Parameter(self.model.head.weight.detach().clone())
        for p in self.model.parameters():  # TinyMambaModel has initialized them
            p._is_hf_initialized = p.device.type != "meta"

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give weights that a file lacks the initial values of a new TinyMambaModel."""
        missing = {
            name: p
            for name, p in self.model.named_parameters()
            if not getattr(p, "_is_hf_initialized", False) and p.device.type != "meta"
        }
        fresh = TinyMambaModel(self.model.config).state_dict() if missing else {}
        if "embedding.weight" not in missing:  # the folder of a tied model, loaded as an untied one
            fresh["head.weight"] = self.model.embedding.weight
        for name, p in missing.items():
            p.copy_(fresh[name])
            p._is_hf_initialized = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As for every model. A quantized folder is loaded in its own dtypes."""
        name, config = pretrained_model_name_or_path, kwargs.get("config")
        hub, rest = {n: kwargs[n] for n in HUB_ARGUMENTS if n in kwargs}, dict(kwargs)
        if not isinstance(config, TinyMambaConfig):
            config, rest = TinyMambaConfig.from_pretrained(
                config or name, return_unused_kwargs=True, **kwargs
            )
        if config.quantization is None:
            loaded = super().from_pretrained(name, *args, **kwargs)
            align_weights(model_of(loaded))
            return loaded
        require_own_dtypes(kwargs)
        settings = {n: v for n, v in rest.items() if n not in (*HUB_ARGUMENTS, "torch_dtype")}
        settings |= {"config": config, "dtype": torch.float32}
        tensors = read_quantized(config, name, hub)
        loaded = super().from_pretrained(None, *args, state_dict=tensors, **settings)
        model = model_of(loaded)
        model.settle_ties()
        for layer in quantized_layers(model.model).values():
            if not hasattr(layer, "_hf_hook"):  # by which accelerate moves buffers between devices
                layer.tile()
        model.name_or_path = model.config.name_or_path = str(name)
        if model.can_generate():  # a folder of quantize.py has no generation_config.json
            with contextlib.suppress(OSError):
                model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As for every model, with the code that the Auto classes need to load it.

        The hash of the tokenizer is left out: what is saved beside the model may be another one.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub: would upload the model without its code; "
                "use model.push_to_hub(repo_id)"
            )
        for layer in quantized_layers(self.model).values():
            if layer.bits == 4 and not layer.is_tiled and layer.codes.is_meta:
                raise ValueError(
                    "save_pretrained: cannot pack 4-bit codes that are offloaded; "
                    "load the model without offload_buffers"
                )
        self.settle_ties()
        head, embedding = self.get_output_embeddings(), self.get_input_embeddings()
        shared = head is not None and head.weight is embedding.weight
        if self.config.quantization is not None or (shared and not self.config.tie_embeddings):
            stored = {f"model.{name}": t for name, t in stored_tensors(self.model).items()}
            own = {n: t for n, t in self.state_dict().items() if not n.startswith("model.")}
            kwargs.setdefault("state_dict", {**stored, **own})
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if path.is_file():  # not an adapter's folder
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("tokenizer_sha256", None)
            write_json(path, {**config, "auto_map": complete_auto_map(config.get("auto_map", {}))})
            write_code(path.parent)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the output layer."""
        self.model.head = value

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """As for every model; if a file has a head and another embedding, the config says so."""
        super().tie_weights(*args, **kwargs)
        if self._tied_weights_keys:  # else the head is quantized, and may not be loaded yet
            self.settle_ties()

    def settle_ties(self) -> None:
        """Let this config and the native one say whether head and embedding are tied."""
        self.model.config.tie_embeddings = self.config.tie_embeddings
        settle_ties(self.model)
        self.config.tie_embeddings = self.model.config.tie_embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As for every model; sets vocab_size of the native config, too."""
        self.settle_ties()
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config.vocab_size = self.config.vocab_size
        for table in filter(None, (embedding, self.model.head)):
            table.weight._is_hf_initialized = True
        return embedding

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """As for every model: `eager` is plain attention, everything else is fused."""
        super().set_attn_implementation(*args, **kwargs)
        for block in self.model.blocks:
            block.attention.use_flash_attn = self.config._attn_implementation != "eager"

    def run_backbone(
        self,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **inputs: Any,
    ) -> BaseModelOutputWithPast:
        """The backbone's output, with the defaults of the config and a new cache if one is used."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        out = self.model(
            past_key_values=past_key_values,
            output_attentions=bool(output_attentions),
            output_hidden_states=bool(output_hidden_states),
            **inputs,
        )
        if not use_cache:
            out.past_key_values = None
        return out


class TinyMambaHFModel(TinyMambaPreTrainedModel, GenerationMixin):
    """TinyMambaModel as a causal language model of `transformers`.

    With a cache, the input continues the text of the cache. Padding, on either side, leaves a row
    exactly as if it were not there.
    """

    def __init__(self, config: TinyMambaConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.has_checked_ends = False
        self.post_init()

    @staticmethod
    def of(native: TinyMambaModel, **changes: Any) -> TinyMambaHFModel:
        """A copy of a native model in eval mode, with changes of its configuration."""
        model = TinyMambaHFModel(config_of(native, **changes))
        model.model.load_state_dict(native.state_dict())
        return model.eval()

    @staticmethod
    def create_masks_for_generate(
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The padding mask of the new tokens (b, l), or None: blocks need no other mask."""
        batch, length = inputs_embeds.shape[:2]
        return mask_of_new_tokens(attention_mask, batch, length)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As for every model; a single token after the first call is prepared at less cost."""
        rest = {**kwargs, "past_key_values": past_key_values}
        static = not isinstance(past_key_values, Cache) or past_key_values.is_compileable
        if next_sequence_length != 1 or is_first_iteration or static:
            rest.update(inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration)
            return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **rest)
        rest.pop("labels", None)
        positions = rest.get("position_ids")
        position = None if positions is None else positions[:, -1:]
        return {**rest, "input_ids": input_ids[:, -1:], "position_ids": position}

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        """As for every model. Without this, a class name with `mamba` would get `cache_params`."""
        if "past_key_values" in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if "cache_params" in model_kwargs:
            model_kwargs["past_key_values"] = model_kwargs.pop("cache_params")

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: GenerationConfig, *args: Any
    ) -> None:
        """As for every model. Without this, an early exit would end in an AttributeError."""
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit: no block but the last was trained to predict a token; "
                "pass an assistant_model"
            )
        super()._validate_generation_mode(generation_mode, generation_config, *args)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids (b, l) or inputs_embeds (b, l, d) -> logits (b, l, v).

        attention_mask (b, l) is 0 at padding; it may also cover the tokens in past_key_values.
        Where position_ids (b, l) do not increase by one, a new document begins, which sees nothing
        of the one before. A compiled step of one token ignores both: the token is not padding and
        continues its document. labels (b, l) are shifted here; kwargs go to the loss.
        logits_to_keep is how many of the last logits to compute, or the indices of some.
        """
        out = self.run_backbone(
            past_key_values,
            use_cache,
            output_attentions,
            output_hidden_states,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(out.last_hidden_state[:, kept])
        loss, size = None, self.config.vocab_size
        if labels is not None:
            self.check_ends(input_ids, attention_mask, labels)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def check_ends(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor
    ) -> None:
        """Warn if the first eos tokens (b, l) of a training all have the label of padding.

        Collators of `transformers` do that to them if eos is the pad token as well.
        """
        eos, pad = self.config.eos_token_id, self.config.pad_token_id
        shared = eos is not None and eos == pad and input_ids is not None
        if not shared or self.has_checked_ends or not self.training or is_tracing(labels):
            return
        ends = input_ids == eos
        if attention_mask is not None:
            ends = ends & (attention_mask[:, -ends.shape[1] :] != 0)
        if not bool(ends.any()):
            return
        self.has_checked_ends = True
        if bool((labels[ends] == -100).all()):
            warnings.warn(
                f"labels: the ends of texts (id {eos}) are left out of the loss, so that the model "
                "does not learn to end a text: eos is the pad token, too; add a pad token to the "
                "tokenizer, and call model.resize_token_embeddings(len(tokenizer))",
                stacklevel=3,
            )


def mask_of_new_tokens(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The part of attention_mask for the last `length` tokens (b, l); None without padding.

    While a graph is traced, a single token never counts as padding, as in `transformers`.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(
            f"attention_mask: has shape {shape}; pass ({batch}, {length}), with 0 at padding, "
            "or more columns for the tokens in the cache"
        )
    mask = attention_mask[:, -length:]
    if is_tracing(mask):
        return None if length == 1 else mask
    return None if bool((mask != 0).all()) else mask


def split_documents(
    position_ids: Tensor | None, padding: Tensor | None, batch: int
) -> tuple[Tensor | None, Tensor | None]:
    """Documents, from position_ids: tokens (b, l) that end one, rows (b,) that begin with one.

    Input that begins with position 0 begins a document, whatever the cache holds. None stands for
    no such token or row.
    """
    if position_ids is None:
        return None, None
    tracing, single = is_tracing(position_ids), position_ids.shape[-1] == 1
    if single and (tracing or [0] not in position_ids.tolist()):
        return None, None
    positions, back, lengths = position_ids.expand(batch, -1), None, None
    if padding is not None:
        order, back, lengths = padding_last(padding)
        positions = positions.gather(1, order)
    begins = positions[:, 0] == 0  # (b,)
    jumps = positions[:, 1:] != positions[:, :-1] + 1  # (b, l-1)
    if lengths is not None:
        begins = begins & (lengths > 0)
        index = torch.arange(1, positions.shape[1], device=positions.device)
        jumps = jumps & (index < lengths[:, None])
    some_begin, some_end = (tracing or bool(t.any()) for t in (begins, jumps))
    ends = F.pad(jumps, (0, 1))
    ends = ends if back is None else ends.gather(1, back)
    return ends if some_end else None, begins if some_begin else None


def begin_documents(state: ModelState, begins: Tensor | None) -> ModelState:
    """The state as of a new document in the rows (b,) of `begins` that have one already."""
    if begins is None:
        return state
    restarts = begins & (state.position > state.document_start)
    if not is_tracing(restarts) and not bool(restarts.any()):
        return state
    return state.begin_document(restarts)


# `generate` asks for it at every token.
vars(TinyMambaHFModel.forward)["__signature__"] = inspect.signature(TinyMambaHFModel.forward)
TinyMambaForCausalLM = TinyMambaHFModel


class HeadlessModel(TinyMambaPreTrainedModel):
    """A model without the output layer."""

    _keys_to_ignore_on_load_missing = (r"^model\.head\.",)

    def __init__(self, config: TinyMambaConfig):
        super().__init__(config)
        # A file may hold tied matrices as the head's only: from_pretrained removes it afterwards.
        if not self.model.embedding.weight.is_meta:
            self.drop_head()

    def drop_head(self) -> None:
        """Remove the output layer."""
        self.settle_ties()
        self.model.head = None
        self._tied_weights_keys = {}
        self.all_tied_weights_keys: dict[str, str] = {}
        if scheme := self.config.quantization:
            layers = {name: bits for name, bits in scheme["layers"].items() if name != "head"}
            self.config.quantization = self.model.quantization = {**scheme, "layers": layers}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As for every model."""
        loaded = super().from_pretrained(*args, **kwargs)
        model_of(loaded).drop_head()
        return loaded


class TinyMambaHFBaseModel(HeadlessModel):
    """TinyMambaModel for AutoModel: its output is the hidden state of each token."""

    _keys_to_ignore_on_load_unexpected = (r"^score\.",)

    def __init__(self, config: TinyMambaConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As TinyMambaHFModel.forward, but gives last_hidden_state (b, l, d)."""
        return self.run_backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class TinyMambaForSequenceClassification(HeadlessModel):
    """A linear layer on the hidden state of each row's last token: a classifier or reward model."""

    accepts_loss_kwargs = False  # the loss is a mean over rows, whatever the number of tokens

    def __init__(self, config: TinyMambaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.score = nn.Linear(config.d_model, config.num_labels, bias=False)
        self.post_init()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As for every model of this file; `score` begins as the head of a language model does."""
        super().initialize_weights()
        weight = self.score.weight
        if not getattr(weight, "_is_hf_initialized", False) and not weight.is_meta:
            nn.init.normal_(weight, std=0.02)
            weight._is_hf_initialized = True

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """input_ids (b, l) or inputs_embeds (b, l, d) -> logits (b, num_labels).

        They are those of a row's last token that is not padding: by attention_mask, or without
        one, as for other models of `transformers`, by pad_token_id. labels (b,), or (b, num_labels)
        for a regression or several labels per row.
        """
        out = self.run_backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden = out.last_hidden_state  # (b, l, d)
        real, pad = mask_of_new_tokens(attention_mask, *hidden.shape[:2]), self.config.pad_token_id
        if attention_mask is None and input_ids is not None and pad is not None:
            real = input_ids != pad
        logits = self.score(take_last(hidden, real))  # (b, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


def take_last(hidden: Tensor, real: Tensor | None) -> Tensor:
    """The vectors (b, d) of the last tokens of hidden (b, l, d) for which real (b, l) is not 0."""
    if real is None:
        return hidden[:, -1]
    return take_tokens(hidden, last_index(real.to(hidden.device))[:, None])[:, 0]


def require_own_dtypes(kwargs: dict[str, Any]) -> None:
    """Reject what from_pretrained cannot do with a quantized folder."""
    if kwargs.get("quantization_config"):
        problem = "is not supported for a quantized model; leave it out"
        raise ValueError(f"quantization_config: {problem}")
    for name in ("dtype", "torch_dtype"):
        if kwargs.get(name) not in (None, "auto", "float32", torch.float32):
            raise ValueError(f"{name}: a quantized model computes in float32; leave it out")


def read_quantized(config: TinyMambaConfig, name: Any, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The state_dict of the quantized model in a folder or repository, with codes unpacked."""
    index = None
    if cached_file(name, WEIGHTS, _raise_exceptions_for_missing_entries=False, **hub) is None:
        index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **hub)
    if index is None:
        files = [cached_file(name, WEIGHTS, **hub)]
    else:
        files = get_checkpoint_shard_files(name, index, **hub)[0]
    remedy, tensors = "export the model again", dict[str, Tensor]()
    with torch.device("meta"):
        native = TinyMambaModel(config.to_native())
        quantize_like(native, config.quantization)
    try:
        for file in files:
            tensors |= read_all_tensors(file, remedy, unsigned=("model.", "score."))[0]
        tensors = {n.removeprefix("model."): t for n, t in tensors.items()}
        unpack_codes(native, tensors)
        complete_tensors(native, tensors, str(files[0]))
    except UserError as e:
        raise ValueError(str(e)) from None
    except (RuntimeError, KeyError):
        raise ValueError(f"{files[0]}: does not fit its config.json; {remedy}") from None
    own = native.state_dict().keys()
    return {f"model.{n}" if n in own else n: t for n, t in tensors.items()}


# ------------------------------------------------------------------------------------ tokenizer

PAD_NAMES = (PAD_TOKEN, "<|pad|>", "<pad>", "<|padding|>", "[PAD]")


class TinyMambaHFTokenizer(PreTrainedTokenizerFast):
    """The tokenizer.json of data/prepare.py, with padding on the left, and eos as bos.

    A pad token of its own pads, if there is one, else eos. It is saved as a
    PreTrainedTokenizerFast, so that it loads without this file.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("padding_side", "left")
        super().__init__(*args, **kwargs)
        vocabulary = self.get_vocab()
        eos = self.eos_token or next((name for name in EOS_NAMES if name in vocabulary), None)
        special = {str(t) for t in self.added_tokens_decoder.values() if t.special}
        pad = next((name for name in PAD_NAMES if name in special), eos)
        for role, token in (("eos_token", eos), ("bos_token", eos), ("pad_token", pad)):
            if token is not None and getattr(self, role) is None:
                setattr(self, role, token)

    @staticmethod
    def of(tokenizer: SimpleTokenizer, vocab_size: int = 0) -> TinyMambaHFTokenizer:
        """The tokenizer that gives the ids of a SimpleTokenizer; a vocab.txt is a UserError.

        If eos would pad, and a model of vocab_size ids has one to spare, PAD_TOKEN is added: data
        collators leave padding out of the loss, and a model would never learn to end a text.
        """
        problem = "matches the longest token, which no fast tokenizer does"
        remedy = "pass a tokenizer.json as --tokenizer_file"
        source, record = str(tokenizer.path or tokenizer.name), tokenizer.to_dict()
        require(record["name"] == "tokenizer.json", source, problem, remedy)
        fast = TinyMambaHFTokenizer(tokenizer_object=Tokenizer.from_str(record["content"]))
        fast.add_template(record["chat_template"], record.get("special_tokens") or {})
        spare = max(fast.get_vocab().values()) + 1 < vocab_size
        if spare and fast.pad_token_id in (None, fast.eos_token_id):
            fast.add_special_tokens({"pad_token": PAD_TOKEN})
        return fast

    def add_template(self, template: str | None, tokens: dict[str, str]) -> None:
        """Take over a chat template, for which bos_token and so on are these tokens."""
        other = {n: t for n, t in tokens.items() if self.special_tokens_map.get(n) != t}
        used = [n for n in other if template and re.search(rf"\b{re.escape(n)}\b", template)]
        begin = "".join(f"{{% set {name} = {json.dumps(other[name])} %}}\n" for name in used)
        self.chat_template = template and begin + template

    @property
    def turn_end(self) -> int | None:
        """The id of the special token that ends an answer of a chat, if there is one."""
        special = {str(t): i for i, t in self.added_tokens_decoder.items() if t.special}
        write = functools.partial(self.apply_chat_template, tokenize=False)
        try:
            return find_turn_end(write, special) if self.chat_template else None
        except Exception:  # a template may raise anything, for example on roles it rejects
            return None

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict:
        """Let `__init__` read tokenizer.json: else it is rebuilt from its vocabulary alone."""
        return kwargs

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As for every tokenizer, under the class that loads without this file."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**values, "tokenizer_class": "PreTrainedTokenizerFast"})
        return files


TinyMambaConfig.register_for_auto_class()
AutoConfig.register(TinyMambaConfig.model_type, TinyMambaConfig, exist_ok=True)
AUTO_CLASSES: dict[Any, Any] = {
    AutoModel: TinyMambaHFBaseModel,
    AutoModelForCausalLM: TinyMambaHFModel,
    AutoModelForSequenceClassification: TinyMambaForSequenceClassification,
}
AUTO_MAP = {"AutoConfig": "hf_integration.TinyMambaConfig"}  # of config.json
for auto, made in AUTO_CLASSES.items():
    made.register_for_auto_class(auto.__name__)
    auto.register(TinyMambaConfig, made, exist_ok=True)
    AUTO_MAP[auto.__name__] = f"hf_integration.{made.__name__}"


def complete_auto_map(written: dict[str, Any]) -> dict[str, Any]:
    """The auto_map that `transformers` has written, with the other classes of this file.

    The code is in the folder: what a repository before it had is not fetched from there again.
    """
    other = {n: v for n, v in written.items() if str(v).rpartition("--")[2] != AUTO_MAP.get(n)}
    return {**AUTO_MAP, **other}


def model_of(loaded: Any) -> Any:
    """The model of what from_pretrained returns, with loading information beside it or without."""
    return loaded[0] if isinstance(loaded, tuple) else loaded


def align_weights(model: nn.Module) -> None:
    """Give weights on a CPU memory of their own.

    As parts of a file they begin at any byte; products are slower then, and rounded differently.
    """
    for p in model.parameters():
        if p.device.type == "cpu" and p.data_ptr() % 64:
            p.data = p.data.clone()


# ------------------------------------------------------------------------------------ convert


# The code of a model folder, and all files that `convert` may write.
CODE = (
    "hf_integration.py", "testv2.py", "attention.py", "carried_state.py", "checkpoint.py", "cli.py",
    "context_parallel.py", "conversations.py", "data_order.py", "dataset.py", "decode.py",
    "delta_rule.py", "distillation.py", "distributed.py", "four_bit.py", "fused.py",
    "initial_weights.py", "kernels.py", "lock.py", "muon.py", "optimizer.py", "packing.py",
    "profiling.py", "progress.py", "runtime.py", "schedule.py", "shard_files.py",
    "sharded_checkpoint.py", "token_file.py", "token_shards.py", "tokenizer.py", "vocabulary.py",
)  # fmt: skip
OUTPUTS = (
    "model.safetensors", "config.json", "generation_config.json", "README.md", "vocab.txt",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *CODE,
    "ssm_kernels.py",  # of folders that the first release wrote
)  # fmt: skip


def write_code(folder: Path) -> None:
    """Copy the code into a model folder, where the files import each other with `from .`."""
    here = Path(__file__).parent
    package = here if (here / "cli.py").is_file() else here / "tinymamba"
    modules = "|".join(name.removesuffix(".py") for name in CODE)
    absolute = re.compile(rf"^( *)from (?:tinymamba\.)?({modules}) import", re.MULTILINE)
    for name in CODE:
        file = here / name if (here / name).is_file() else package / name
        text = absolute.sub(r"\1from .\2 import", file.read_text(encoding="utf-8"))
        (folder / name).write_text(text, encoding="utf-8")


def convert(
    checkpoint: str, output_dir: str, tokenizer_file: str | None = None, force: bool = False
) -> None:
    """Write a checkpoint or a folder as a folder for `transformers`, which every script can read.

    An output_dir that ends in .pt is a checkpoint to write: the way back.
    """
    folder, model = Path(output_dir).resolve(), load_model(checkpoint)
    if folder.suffix == ".pt":
        write_checkpoint(model, folder, force)
        return
    require(not folder.is_file(), "--output_dir", f"{folder} is a file", "pass a folder")
    code, problem = Path(__file__).resolve().parent, "holds the code itself"
    own = folder in (code, code / "tinymamba")
    require(not own, "--output_dir", problem, "pass another folder")
    found = [name for name in OUTPUTS if (folder / name).exists()]
    problem, remedy = f"{folder} holds {', '.join(found)}", "pass another folder, or --force"
    require(force or not found, "--output_dir", problem, remedy)
    tokenizer = open_tokenizer(tokenizer_file, model, [checkpoint])
    fast, config, generation = prepare_folder(model, tokenizer, Path(checkpoint))
    with new_folder(folder / "made") as made:  # complete before any file is replaced
        save_folder(made, model)
        generation.save_pretrained(made)
        if fast is not None:
            fast.save_pretrained(made)
            config.tokenizer_sha256 = SimpleTokenizer(made / "tokenizer.json").sha256
        config.save_pretrained(made)
        card = model_card(model, folder.name, fast)
        (made / "README.md").write_text(card, encoding="utf-8")
        write_code(made)
    replace_files(folder / "made", folder, OUTPUTS)


def write_checkpoint(model: TinyMambaModel, path: Path, force: bool) -> None:
    """Write a plain checkpoint, as testv2.py does."""
    problem, remedy = f"{path} exists", "pass another name, or --force"
    require(force or not path.exists(), "--output_dir", problem, remedy)
    problem = "is quantized and cannot be converted back"
    remedy = "convert the model that it was quantized from"
    require(model.quantization is None, "--checkpoint", problem, remedy)
    save_model(path, model)


def prepare_folder(
    model: TinyMambaModel, tokenizer: SimpleTokenizer | None, source: Path
) -> tuple[TinyMambaHFTokenizer | None, TinyMambaConfig, GenerationConfig]:
    """The tokenizer, the model's and the generation configuration of a new folder.

    Generation settings in the folder `source` are kept.
    """
    generation, fast, special = GenerationConfig(), None, {}
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
    if tokenizer is not None:
        fast = TinyMambaHFTokenizer.of(tokenizer, model.config.vocab_size)
        require_same_ids(model, fast)
        special = {name: getattr(fast, name) for name in SPECIAL_IDS}
    config = config_of(model, **special, dtype="float32")
    config.architectures = ["AutoModelForCausalLM"]  # a name that `transformers serve` can look up
    config.auto_map = dict(AUTO_MAP)
    before = generation.eos_token_id
    for name in SPECIAL_IDS:
        setattr(generation, name, getattr(config, name))
    ends = [config.eos_token_id, fast.turn_end if fast is not None else None]
    ends += before if isinstance(before, list) else []
    known = [*dict.fromkeys(i for i in ends if i is not None)]
    if len(known) > 1:
        generation.eos_token_id = known
    return fast, config, generation


def require_same_ids(model: TinyMambaModel, tokenizer: TinyMambaHFTokenizer) -> None:
    """Reject a tokenizer that the model was not trained with, as far as can be told."""
    size, eos = model.config.vocab_size, model.config.eos_id
    remedy = "pass the tokenizer that the model was trained with"
    problem = f"has {len(tokenizer)} ids, but the model has {size}"
    require(len(tokenizer) <= size, "--tokenizer_file", problem, remedy)
    problem = f"ends a text with id {tokenizer.eos_token_id}, but the model expects {eos}"
    require(eos in (-1, tokenizer.eos_token_id), "--tokenizer_file", problem, remedy)


def encode_prompt(tokenizer: TinyMambaHFTokenizer | None) -> str:
    """The lines of a model card that make a prompt's ids."""
    if tokenizer is None:
        return "inputs = {'input_ids': torch.tensor([[0]])}"
    call = 'tokenizer("Once", return_tensors="pt")'
    if tokenizer.chat_template:
        call = """tokenizer.apply_chat_template(
    [{"role": "user", "content": "Hello"}],
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)"""
    return f"tokenizer = AutoTokenizer.from_pretrained(name)\ninputs = {call}"


def model_card(model: TinyMambaModel, name: str, tokenizer: TinyMambaHFTokenizer | None) -> str:
    """README.md of a converted model: what it is and how to use it."""
    c, count = model.config, model.count_parameters()["total"]
    scheme = f", quantized ({model.quantization['mode']})" if model.quantization else ""
    shape = (
        f"{count:,} parameters{scheme}: {c.n_layer} blocks of width {c.d_model}, in each a "
        f"selective state-space branch ({c.d_state} states per channel), attention to the last "
        f"{c.window_size} tokens ({c.num_heads} heads) and a SwiGLU MLP, mixed for each token "
        f"by a learned gate ({c.gate}). {c.vocab_size:,} ids; trained on sequences of "
        f"{c.block_size} tokens, without a limit on length."
    )
    encode = encode_prompt(tokenizer)
    decode = "tokenizer.decode(ids[0])" if tokenizer is not None else "ids[0].tolist()"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- tinymamba
- state-space-model
- custom_code
---

# {name}

A TinyMamba language model. {shape}

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"  # the folder, or the repository
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
{encode}
ids = model.generate(**inputs, max_new_tokens=50)
print({decode})
```

The code is in this folder: `hf_integration.py`, and `testv2.py`, which it imports. The cache has a
constant size, whatever the length of the text.
"""


# ------------------------------------------------------------------------------------ push


def push(
    model_dir: str, repo_id: str, commit_message: str, private: bool, token: str | None
) -> str:
    """Upload a folder of `convert` to the Hugging Face Hub as one commit; returns its address.

    Without a token, that of HF_TOKEN or `hf auth login` is used. No token is ever printed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    folder, used = Path(model_dir), token or os.environ.get("HF_TOKEN", "")
    printable = used.isascii() and used.isprintable()
    require(printable, "--token", "has a character that no token has", "copy it again")
    for name in ("config.json", "hf_integration.py"):
        problem = f"{folder} has no {name}"
        remedy = "write the folder with python hf_integration.py convert"
        require((folder / name).is_file(), "--model_dir", problem, remedy)
    load_folder(folder)
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message)
        return str(commit.commit_url)
    except HFValidationError as e:
        raise UserError("--repo_id", str(e).split("\n")[0], "write it as name/model") from None
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else "no answer"
        remedy = "check --repo_id and try again"
        if status in (401, 403):
            remedy = "log in, or pass a --token with write access"
        raise UserError("--repo_id", f"the hub rejected {repo_id} ({status})", remedy) from None
    except (OSError, HTTPError) as e:
        problem = f"the hub cannot be reached ({type(e).__name__})"
        raise UserError("--repo_id", problem, "check the network, or HF_ENDPOINT") from None


# ------------------------------------------------------------------------------- command line


@dataclass
class ConvertOptions:
    """The flags of `convert`; an empty default is a required flag."""

    checkpoint: str = ""  # a checkpoint, or a folder with a model
    output_dir: str = ""  # folder to write to, or a checkpoint if it ends in .pt
    tokenizer_file: str | None = None  # tokenizer.json; None takes the checkpoint's
    force: bool = False  # replace files of a model in output_dir


@dataclass
class PushOptions:
    """The flags of `push`; an empty default is a required flag."""

    model_dir: str = ""  # folder that `convert` has written
    repo_id: str = ""  # repository, as name/model
    commit_message: str = "Upload a TinyMamba model"  # message of the commit
    private: bool = False  # make a new repository private
    token: str | None = None  # access token; None takes that of HF_TOKEN or `hf auth login`


COMMANDS: dict[str, tuple[type, str]] = {
    "convert": (ConvertOptions, "write a folder for transformers, or convert one back"),
    "push": (PushOptions, "upload such a folder to the Hugging Face Hub"),
}


def parse(argv: list[str] | None) -> ConvertOptions | PushOptions:
    """The flags of the command that a command line names."""
    parser = CliParser(description=str(__doc__).split("\n\n    from")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CliParser)
    for name, (cls, text) in COMMANDS.items():
        add_flags(
            commands.add_parser(name, help=text), cls, dict.fromkeys(required(cls), "required")
        )
    args = parser.parse_args(argv)
    cls, _ = COMMANDS[args.command]
    options: Any = make_options(cls, args)
    for name in required(cls):
        require(getattr(options, name), f"--{name}", "is missing", "--help lists every flag")
    return options


def required(cls: type) -> list[str]:
    """The names of the flags that must be given."""
    return [field.name for field in dataclasses.fields(cls) if field.default == ""]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(argv)
    if isinstance(options, ConvertOptions):
        convert(**vars(options))
        print(f"{options.output_dir}: made of {options.checkpoint}")
    else:
        print(push(**vars(options)))
    return 0


if __name__ == "__main__":  # run the module by its name: classes of __main__ cannot be saved
    run_cli(importlib.import_module(__spec__.name if __spec__ else "hf_integration").main)
