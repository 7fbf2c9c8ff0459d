"""TinyMamba in Hugging Face's world: configuration, model and tokenizer for `transformers`.

    python hf_integration.py convert --checkpoint tinymamba_model_best.pt --output_dir ./hf_model
    python hf_integration.py convert --checkpoint ./hf_model --output_dir tuned.pt   # and back
    python hf_integration.py push --model_dir ./hf_model --repo_id me/my-model --private

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("./hf_model", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("./hf_model")

After `import hf_integration` no remote code needs to be trusted. The blocks are those of testv2.py;
what is here hands them what `transformers` has prepared, and keeps their state in its cache.
Letters in the comments on shapes are testv2.py's; M is the number of keys that a cache has.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import cached_file, is_tracing
from transformers.utils.generic import can_return_tuple

from testv2 import (
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
    stored_tensors,
    take_tokens,
)
from tinymamba.checkpoint import new_folder, replace_files, save_checkpoint, write_json
from tinymamba.cli import CliParser, UserError, require, run_cli
from tinymamba.kernels import QuantizedLinear, quantize_like
from tinymamba.tokenizer import EOS_NAMES, SimpleTokenizer, byte_tokenizer, open_tokenizer

# ------------------------------------------------------------------------------ configuration

ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


class TinyMambaConfig(PreTrainedConfig):
    """The architecture: the fields of testv2.Config that a model keeps, under the same names.

    `TinyMambaConfig(d_model=256, n_layer=4)`; the names that other models use (`hidden_size`,
    `num_hidden_layers`, ...) are understood. An impossible value is a ValueError.
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
    # Of each block the cache holds three states with a window: the convolution's inputs, and two
    # of which only the newest counts, the phase and (position, start of the document).
    number_of_conv_states = 3

    def __post_init__(self, **kwargs):
        given = {self.attribute_map.get(name, name): value for name, value in kwargs.items()}
        for name in FOLDER_FIELDS:
            setattr(self, name, given.pop(name, getattr(Config, name)))
        given.pop("layer_types", None)  # a property here, written for those who read config.json
        self.quantization = given.pop("quantization", None)
        self.format_version = given.pop("format_version", FOLDER_FORMAT)
        self.use_cache = given.pop("use_cache", True)
        eos = self.eos_id if self.eos_id >= 0 else None
        for role in ROLES:
            setattr(self, role, given.pop(role, eos))
        super().__post_init__(**given)
        self.native()

    @property
    def layer_types(self) -> list[str]:
        """Every block has a sliding window and a recurrent state."""
        return ["hybrid_sliding"] * self.n_layer

    def native(self) -> Config:
        """The same as testv2.Config."""
        try:
            config = Config.from_dict({name: getattr(self, name) for name in FOLDER_FIELDS})
        except UserError as e:
            raise ValueError(str(e)) from None
        config.use_flash_attn = self._attn_implementation != "eager"
        return config


def config_of(native: TinyMambaModel, **changes) -> TinyMambaConfig:
    """The configuration of a native model."""
    described = {n: v for n, v in describe_model(native).items() if n != "model_type"}
    return TinyMambaConfig(**{**described, **changes})


# ------------------------------------------------------------------------------------ cache

CONV, PHASE, WHERE = range(3)  # the states with a window


def read_cache(cache: Cache, model: TinyMambaModel, batch: int, more: int = 0) -> ModelState:
    """What `cache` remembers of B texts, as the blocks want it; it must have room for `more`."""
    layers = cache.layers if isinstance(cache, Cache) else []
    slots = layers[0] if len(layers) == len(model.blocks) else None
    if not isinstance(slots, LinearAttentionCacheLayerMixin):
        raise ValueError(
            "past_key_values: has no place for recurrent states; make it as "
            "DynamicCache(config=model.config), or a StaticCache of it"
        )
    K, W = model.config.d_conv, model.config.window_size
    if isinstance(slots, StaticLayer) and slots.max_cache_len < min(
        slots.get_seq_length() + more, W - 1
    ):
        raise ValueError(
            f"past_key_values: a static cache of {slots.max_cache_len} tokens is "
            "full; make it with a larger max_cache_len"
        )
    if not cache.has_previous_state(0):
        return model.init_state(batch)
    where = cache.get_conv_state(0, WHERE).squeeze(-1)  # (b, 2)
    if where.shape[0] != batch:
        raise ValueError(f"past_key_values: is of {where.shape[0]} texts, the input of {batch}")
    layers = []
    for i in range(len(model.blocks)):
        tail = cache.get_conv_state(i, CONV)[:, :, : K - 1].mT  # (b, k-1, d)
        phase = cache.get_conv_state(i, PHASE).squeeze(-1)  # (b, n/2)
        ssm = cache.get_recurrent_state(i)  # (b, h, p, n)
        keys, values = (
            last_keys(t, cache.get_seq_length(i), W - 1)
            for t in (cache.layers[i].keys, cache.layers[i].values)
        )
        layers.append(LayerState(tail, ssm, phase, keys, values))
    return ModelState(layers, *where.unbind(1))


def last_keys(cached: Tensor, read: int, count: int) -> Tensor:
    """The last `count` of cached (b, a, m, f) after `read` tokens; what is before them is hidden.

    A static cache has places that are still empty behind those that were filled.
    """
    filled = min(read, cached.shape[2])
    if filled == count == cached.shape[2]:
        return cached
    index = torch.arange(count, device=cached.device) + (filled - count)
    return cached.index_select(2, index.clamp(min=0))


def write_cache(cache: Cache, state: ModelState, length: int, padded: bool) -> None:
    """Give `cache` the state after `length` more tokens."""
    where = torch.stack((state.position, state.document_start), dim=1)[..., None]  # (b, 2, 1)
    for i, layer in enumerate(state.layers):
        tail = layer.conv.mT  # (b, d, k-1)
        cache.update_conv_state(tail if tail.shape[2] else F.pad(tail, (1, 0)), i, CONV)
        cache.update_conv_state(layer.phase[..., None], i, PHASE)
        cache.update_conv_state(where, i, WHERE)
        cache.update_recurrent_state(layer.ssm, i)
        write_keys(cache, layer, i, length, padded)


def write_keys(cache: Cache, layer: LayerState, i: int, length: int, padded: bool) -> None:
    """Append the keys and values of `length` tokens, of which only the last w-1 are there."""
    tails = layer.keys, layer.values  # (b, a, w-1, f)
    count = tails[0].shape[2]
    if length > count:
        tails = tuple(F.pad(t, (0, 0, length - count, 0)) for t in tails)
    cache.update(*(t[:, :, -length:] for t in tails), i)
    if padded:  # what is padding in a row was not to move its older keys
        slots = cache.layers[i]
        filled = min(cache.get_seq_length(i), slots.keys.shape[2])
        kept = min(filled, count)
        for cached, tail in zip((slots.keys, slots.values), tails, strict=True):
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
    """Takes down what the blocks are given and, if asked to, how their attention weighs.

    Weights are (b, a, l, keys), with the keys of the last w-1 tokens before the piece first, as far
    as there were any.
    """

    def __init__(self, model: TinyMambaModel, attentions: bool, padding: Tensor | None, read: int):
        self.attentions, self.window = attentions, model.config.window_size
        self.blocks, self.past = len(model.blocks), min(read, self.window - 1)
        self.hidden, self.weights = [], []
        self.order, self.back = (None, None) if padding is None else padding_last(padding)[:2]

    def note(self, notes: list[Tensor], new: Tensor) -> Tensor:
        """Take it down, unless a block is made again for its gradients."""
        if len(notes) < self.blocks:
            notes.append(new)
        return new

    def take(self, x: Tensor) -> Tensor:
        """What a block is given goes through what is taken down, so that gradients reach it."""
        if self.back is None:
            return self.note(self.hidden, x)
        return take_tokens(self.note(self.hidden, take_tokens(x, self.back)), self.order)

    def __call__(
        self, usual: Callable, q: Tensor, keys: Tensor, values: Tensor, context: SequenceContext
    ) -> Tensor:
        """SequenceContext.attend: the result of `usual`, by way of all weights if they are wanted.

        q (b, a, l, f), keys and values (b, a, w+l, f) -> (b, a, l, f).
        """
        if not self.attentions:
            return usual(q, keys, values, context.mask)
        length, cached = q.shape[2], self.window - 1
        keys, values = keys[:, :, 1:], values[:, :, 1:]  # (b, a, w-1+l, f)
        token = torch.arange(length, device=q.device)[:, None]
        key = torch.arange(-cached, length, device=q.device)
        begin = 0 if context.starts is None else context.starts[:, None, :, None]
        visible = (key <= token) & (key >= token - cached) & (key >= begin)  # (b, 1, l, w-1+l)
        scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
        weights = scores.softmax(-1).to(values.dtype)[..., cached - self.past :]
        given = self.note(self.weights, self.reorder(weights, self.back))
        return self.reorder(given, self.order) @ values[:, :, cached - self.past :]

    def reorder(self, weights: Tensor, order: Tensor | None) -> Tensor:
        """Rows, and columns but for those of the past, of (b, a, l, past+l) in another order."""
        if order is None:
            return weights
        past = torch.arange(self.past, device=order.device).expand(len(order), -1)
        columns = torch.cat((past, order + self.past), dim=1)
        rows = take_tokens(weights.transpose(1, 2), order)  # (b, l, a, past+l)
        return take_tokens(rows.transpose(1, 3), columns).permute(0, 2, 3, 1)


class TinyMambaHFBlock(GradientCheckpointingLayer, TinyMambaBlock):
    """The native block, which the trainers of `transformers` can tell to keep no activations."""

    def forward(
        self, x: Tensor, context: SequenceContext, past: LayerState | None
    ) -> tuple[Tensor, LayerState, Tensor]:
        """As TinyMambaBlock.forward."""
        if context.attend is not None:
            x = context.attend.take(x)
        return TinyMambaBlock.forward(self, x, context, past)


class TinyMambaHFBackbone(TinyMambaModel):
    """The native model, called as `transformers` calls what lies below a head."""

    BLOCK = TinyMambaHFBlock

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        **ignored,
    ) -> BaseModelOutputWithPast:
        """As TinyMambaHFModel.forward; gives last_hidden_state (b, l, d)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: pass exactly one of them")
        if inputs_embeds is not None and self.config.document_mask:
            raise ValueError("inputs_embeds: a model with document_mask must see the ids")
        if input_ids is None:
            shape, device = inputs_embeds.shape[:2], inputs_embeds.device
            input_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        batch, length = input_ids.shape
        if length == 0:
            raise ValueError(
                "input_ids: hold no new token; after a cache, pass the whole text, or "
                "what is new of it and the attention_mask of the whole"
            )
        padding, read, state = this_piece(attention_mask, batch, length), 0, None
        if past_key_values is not None:
            state = read_cache(past_key_values, self, batch, length)
            read = past_key_values.get_seq_length()
        ends, state = part_documents(position_ids, padding, state)
        recorder = None
        if output_attentions or output_hidden_states:
            recorder = Recorder(self, output_attentions, padding, read)
        hidden, state, _ = self.run(input_ids, state, padding, inputs_embeds, ends, recorder)
        if state is not None:
            write_cache(past_key_values, state, length, padding is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*recorder.hidden, hidden) if output_hidden_states else None,
            attentions=tuple(recorder.weights) if output_attentions else None,
        )


class TinyMambaHFModel(PreTrainedModel, GenerationMixin):
    """TinyMambaModel as a causal language model of `transformers`.

    `model.model` is the native one. A piece that is read after a cache goes on with its text;
    padding, on whichever side, leaves a row as if it were not there.
    """

    config_class = TinyMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # a state cannot go back by some tokens, as assisted generation asks
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["TinyMambaHFBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D", "angle_proj"]
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}

    def __init__(self, config: TinyMambaConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = TinyMambaHFBackbone(config.native())
        if config.quantization is not None:
            quantize_like(self.model, config.quantization)
        if isinstance(self.model.head, QuantizedLinear):
            self._tied_weights_keys = {}
        elif config.tie_embeddings:  # post_init does it, or from_pretrained when the file is read
            self.model.head.weight = nn.Parameter(self.model.head.weight.detach().clone())
        for p in self.model.parameters():  # TinyMambaModel has given them their values
            p._is_hf_initialized = p.device.type != "meta"
        self.post_init()

    @staticmethod
    def of(native: TinyMambaModel, **changes) -> TinyMambaHFModel:
        """A copy of a native model in eval mode; `changes` go to its configuration."""
        model = TinyMambaHFModel(config_of(native, **changes))
        model.model.load_state_dict(native.state_dict())
        return model.eval()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Values for what a file lacks: those that a new TinyMambaModel would have there."""
        missing = {
            name: p
            for name, p in self.model.named_parameters()
            if not getattr(p, "_is_hf_initialized", False) and p.device.type != "meta"
        }
        fresh = TinyMambaModel(self.model.config).state_dict() if missing else {}
        for name, p in missing.items():
            p.copy_(fresh[name])
            p._is_hf_initialized = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As every model's. A quantized folder is read whole, on the CPU, as it is."""
        name, config = pretrained_model_name_or_path, kwargs.get("config")
        hub, rest = {n: kwargs[n] for n in HUB_ARGUMENTS if n in kwargs}, dict(kwargs)
        if not isinstance(config, TinyMambaConfig):
            config, rest = TinyMambaConfig.from_pretrained(
                config or name, return_unused_kwargs=True, **kwargs
            )
        if config.quantization is None:
            return super().from_pretrained(name, *args, **kwargs)
        for refused in ("device_map", "output_loading_info", "quantization_config"):
            if rest.get(refused):
                raise ValueError(f"{refused}: is not for a quantized model; leave it out")
        if kwargs.get("dtype") not in (None, "auto", "float32", torch.float32):
            raise ValueError("dtype: a quantized model has float32 beside its codes; leave it out")
        weights = cached_file(name, "model.safetensors", **hub)
        model = cls(config)
        try:
            model.model.load_state_dict(load_folder(Path(weights).parent).state_dict())
        except UserError as e:
            raise ValueError(str(e)) from None
        model.name_or_path = model.config.name_or_path = str(name)
        with contextlib.suppress(OSError):  # a folder of quantize.py has none
            model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        return model.eval()

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As every model's, with the code that AutoModelForCausalLM needs to read it again."""
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub: would send a folder without its code; use model.push_to_hub(repo_id)"
            )
        if self.config.quantization is not None:
            stored = stored_tensors(self.model)
            kwargs.setdefault("state_dict", {f"model.{name}": t for name, t in stored.items()})
        super().save_pretrained(save_directory, *args, **kwargs)
        if (Path(save_directory) / "config.json").is_file():  # not an adapter's folder
            write_code(Path(save_directory))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.model.config.vocab_size = self.config.vocab_size
        for table in (embedding, self.model.head):
            table.weight._is_hf_initialized = True
        return embedding

    def set_attn_implementation(self, *args, **kwargs) -> None:
        super().set_attn_implementation(*args, **kwargs)
        for block in self.model.blocks:
            block.attention.use_flash_attn = self.config._attn_implementation != "eager"

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values=None, **kwargs
    ):
        """The padding among the tokens to be read, (b, l) or None: blocks need no other mask."""
        return this_piece(attention_mask, *inputs_embeds.shape[:2])

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args) -> None:
        """As every model's, where a class with mamba in its name would get `cache_params`."""
        if "past_key_values" in model_kwargs:
            model_kwargs["cache_params"] = model_kwargs.pop("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if "cache_params" in model_kwargs:
            model_kwargs["past_key_values"] = model_kwargs.pop("cache_params")

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
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """input_ids (b, l) or inputs_embeds (b, l, d) -> logits (b, l, v).

        attention_mask (b, l), or with the tokens in past_key_values before them, is 0 at padding.
        position_ids (b, l) that do not go up by one from a token to the next begin a new document
        there, which sees nothing of the one before. In a compiled step of one token, neither is
        looked at: the token is of the text. labels (b, l) are shifted here; kwargs go to
        the loss. logits_to_keep is how many of the last logits to make, or which.
        """
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        asked = (
            getattr(self.config, name) if given is None else given
            for name, given in (
                ("output_attentions", output_attentions),
                ("output_hidden_states", output_hidden_states),
            )
        )
        out = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            *map(bool, asked),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(out.last_hidden_state[:, kept])
        loss = (
            None
            if labels is None
            else self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )


def this_piece(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The part of attention_mask that is about the last `length` tokens; None if none is padding.

    While a graph is made, a single token counts as one of the text, as in `transformers`.
    """
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(
            f"attention_mask: of shape {shape}; make it ({batch}, {length}), with 0 "
            "at padding, or longer by the tokens that were read before"
        )
    mask = attention_mask[:, -length:]
    if is_tracing(mask):
        return None if length == 1 else mask
    return None if bool((mask != 0).all()) else mask


def part_documents(position_ids: Tensor | None, padding: Tensor | None, state: ModelState | None):
    """Where positions start anew: tokens (b, l) after which they do, or None; the state, parted.

    A piece that begins with position 0 begins a document, whatever was read before.
    """
    if position_ids is None or (position_ids.shape[-1] == 1 and is_tracing(position_ids)):
        return None, state
    places, lengths = position_ids, None
    if padding is not None:
        order, back, lengths = padding_last(padding)
        places = position_ids.expand_as(order).gather(1, order)
    jumps = places[:, 1:] != places[:, :-1] + 1  # (b, l-1)
    if padding is not None:
        index = torch.arange(1, order.shape[1], device=order.device)
        jumps = jumps & (index < lengths[:, None])
    ends, tracing = F.pad(jumps, (0, 1)), is_tracing(position_ids)
    if state is not None:
        anew = (places[:, 0] == 0) & (state.position > state.document_start)
        anew = anew if lengths is None else anew & (lengths > 0)
        if tracing or bool(anew.any()):
            state = state.begin_document(anew)
    if not tracing and not bool(ends.any()):
        return None, state
    return ends if padding is None else ends.gather(1, back), state


TinyMambaForCausalLM = TinyMambaHFModel

# ------------------------------------------------------------------------------------ tokenizer


class TinyMambaHFTokenizer(PreTrainedTokenizerFast):
    """The tokenizer.json of data/prepare.py: padding on the left, eos in every special role.

    It is saved as a PreTrainedTokenizerFast, so that it loads without this file.
    """

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("padding_side", "left")
        super().__init__(*args, **kwargs)
        vocabulary = self.get_vocab()
        eos = self.eos_token or next((name for name in EOS_NAMES if name in vocabulary), None)
        for role in ("eos_token", "bos_token", "pad_token"):
            if eos is not None and getattr(self, role) is None:
                setattr(self, role, eos)

    @staticmethod
    def of(tokenizer: SimpleTokenizer) -> TinyMambaHFTokenizer:
        """The same for a testv2.SimpleTokenizer; a vocab.txt alone is a UserError."""
        if tokenizer.path is None:
            return TinyMambaHFTokenizer(tokenizer_object=byte_tokenizer())
        require(
            tokenizer.library is not None,
            str(tokenizer.path),
            "matches the longest token, which no fast tokenizer does",
            "pass a tokenizer.json as --tokenizer_file",
        )
        return TinyMambaHFTokenizer(tokenizer_file=str(tokenizer.path))

    def save_pretrained(self, save_directory, *args, **kwargs):
        files = super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        about = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, {**about, "tokenizer_class": "PreTrainedTokenizerFast"})
        return files


TinyMambaConfig.register_for_auto_class()
TinyMambaHFModel.register_for_auto_class("AutoModelForCausalLM")
AutoConfig.register(TinyMambaConfig.model_type, TinyMambaConfig, exist_ok=True)
AutoModelForCausalLM.register(TinyMambaConfig, TinyMambaHFModel, exist_ok=True)

# ------------------------------------------------------------------------------------ convert


def write_code(folder: Path) -> None:
    """Copy the code beside a model, as one flat folder whose files import each other."""
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
    """Write a checkpoint or a folder for `transformers`; if output_dir ends in .pt, a checkpoint.

    The folder is one of testv2.py's as well: every script takes it as --checkpoint.
    """
    folder, model = Path(output_dir).resolve(), load_model(checkpoint)
    there = [name for name in OUTPUTS if (folder / name).exists()]
    if folder.suffix == ".pt":
        require(
            force or not folder.exists(),
            "--output_dir",
            f"{folder} is there already",
            "name another, or pass --force",
        )
        require(
            model.quantization is None,
            "--checkpoint",
            "is quantized, and cannot go back",
            "convert the model that it was made of",
        )
        save_checkpoint(folder, {"model": model.state_dict(), "config": model.config.to_dict()})
        return
    require(not folder.is_file(), "--output_dir", f"{folder} is a file", "name a folder")
    require(
        folder != Path(__file__).resolve().parent,
        "--output_dir",
        "holds the code itself",
        "name another folder",
    )
    require(
        force or not there,
        "--output_dir",
        f"{folder} holds {', '.join(there)}",
        "name another, or pass --force",
    )
    tokenizer = open_tokenizer(tokenizer_file, model, [checkpoint])
    fast, config, generation = prepare_folder(model, tokenizer, Path(checkpoint))
    with new_folder(folder / "made") as made:  # all is on disk before anything is replaced
        save_folder(made, model)
        config.save_pretrained(made)
        generation.save_pretrained(made)
        if fast is not None:
            fast.save_pretrained(made)
        card = model_card(model, folder.name, fast)
        (made / "README.md").write_text(card, encoding="utf-8")
        write_code(made)
    replace_files(folder / "made", folder, OUTPUTS)


CODE = ("hf_integration.py", "testv2.py")
CODE += ("checkpoint.py", "cli.py", "kernels.py", "runtime.py", "tokenizer.py")
OUTPUTS = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "README.md",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    *CODE,
)


def prepare_folder(model: TinyMambaModel, tokenizer: SimpleTokenizer | None, source: Path):
    """The fast tokenizer, the configuration and that of `generate`; of a folder, they go on."""
    generation, fast, roles = GenerationConfig(), None, {}
    if (source / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(source)
    if tokenizer is not None:
        fast = TinyMambaHFTokenizer.of(tokenizer)
        if (source / "chat_template.jinja").is_file():
            fast.chat_template = (source / "chat_template.jinja").read_text(encoding="utf-8")
        size, eos = model.config.vocab_size, model.config.eos_id
        require(
            len(fast) <= size,
            "--tokenizer_file",
            f"has {len(fast)} ids, the model {size}",
            "pass the one that it was trained with",
        )
        require(
            eos in (-1, fast.eos_token_id),
            "--tokenizer_file",
            f"ends a text by id {fast.eos_token_id}, the model by {eos}",
            "pass the one that it was trained with",
        )
        roles = {role: getattr(fast, role) for role in ROLES}
    config = config_of(model, **roles, dtype="float32")
    config.architectures = ["AutoModelForCausalLM"]  # a name that `transformers serve` can look up
    config.auto_map = {
        "AutoConfig": "hf_integration.TinyMambaConfig",
        "AutoModelForCausalLM": "hf_integration.TinyMambaHFModel",
    }
    for role in ROLES:
        setattr(generation, role, getattr(config, role))
    return fast, config, generation


def model_card(model: TinyMambaModel, name: str, tokenizer: TinyMambaHFTokenizer | None) -> str:
    """README.md of a converted model: what it is, and how to use it."""
    c, count = model.config, model.count_parameters()["total"]
    scheme = f", quantized ({model.quantization['mode']})" if model.quantization else ""
    shape = (
        f"{count:,} parameters{scheme}: {c.n_layer} blocks of width {c.d_model}, in each a "
        f"selective state-space branch ({c.d_state} states a channel), attention to the last "
        f"{c.window_size} tokens ({c.num_heads} heads) and a SwiGLU MLP, mixed for each token "
        f"by a learned gate ({c.gate}). {c.vocab_size:,} ids; trained on pieces of "
        f"{c.block_size} tokens, without a limit on length."
    )
    prompt = '"Once"' if tokenizer is not None else "[[0]]"
    encode = (
        "tokenizer = AutoTokenizer.from_pretrained(name)\n"
        f'inputs = tokenizer({prompt}, return_tensors="pt")'
        if tokenizer is not None
        else f"inputs = {{'input_ids': torch.tensor({prompt})}}"
    )
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

The code is in this folder: `hf_integration.py` over `testv2.py` and `ssm_kernels.py`. The cache has
a constant size, however long the text.
"""


# ------------------------------------------------------------------------------------ push


def push(
    model_dir: str, repo_id: str, commit_message: str, private: bool, token: str | None
) -> str:
    """Upload a folder of `convert` to the hub, as one commit; its address. All else: a UserError.

    Without a token the one of `hf auth login` or of HF_TOKEN is used. No token is ever printed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    folder, given = Path(model_dir), token or os.environ.get("HF_TOKEN", "")
    require(
        given.isascii() and given.isprintable(),
        "--token",
        "has a character that no token has",
        "copy it again",
    )
    for name in ("config.json", "hf_integration.py"):
        require(
            (folder / name).is_file(),
            "--model_dir",
            f"{folder} has no {name}",
            "make it with python hf_integration.py convert",
        )
    load_folder(folder)
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        return str(
            api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=commit_message
            ).commit_url
        )
    except HFValidationError as e:
        raise UserError("--repo_id", str(e).split("\n")[0], "write it as name/model") from None
    except HfHubHTTPError as e:
        status = e.response.status_code if e.response is not None else "no answer"
        remedy = (
            "log in, or pass a --token that may write there"
            if status in (401, 403)
            else ("check --repo_id and try again")
        )
        raise UserError("--repo_id", f"the hub refused {repo_id} ({status})", remedy) from None
    except (OSError, HTTPError) as e:
        problem = f"the hub cannot be reached ({type(e).__name__})"
        raise UserError("--repo_id", problem, "check the network, or HF_ENDPOINT") from None


def parse(argv: list[str] | None):
    parser = CliParser(description=__doc__.split("\n\n    from")[0])
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CliParser)
    make = commands.add_parser("convert", help="write a folder for transformers, or go back")
    make.add_argument("--checkpoint", required=True, help="a .pt, or a folder with a model")
    make.add_argument("--output_dir", required=True, help="folder to make; x.pt: a checkpoint")
    make.add_argument("--tokenizer_file", help="tokenizer.json [beside the checkpoint or its data]")
    make.add_argument("--force", action="store_true", help="replace what is at output_dir")
    send = commands.add_parser("push", help="upload such a folder to the Hugging Face hub")
    send.add_argument("--model_dir", required=True, help="folder made by convert")
    send.add_argument("--repo_id", required=True, help="where to: name/model")
    send.add_argument(
        "--commit_message",
        default="Upload a TinyMamba model",
        help="of the commit [Upload a TinyMamba model]",
    )
    send.add_argument("--private", action="store_true", help="make a new repository a private one")
    send.add_argument("--token", help="access token [HF_TOKEN, or that of hf auth login]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.command == "convert":
        convert(args.checkpoint, args.output_dir, args.tokenizer_file, args.force)
        print(f"{args.output_dir}: made of {args.checkpoint}")
    else:
        print(push(args.model_dir, args.repo_id, args.commit_message, args.private, args.token))
    return 0


if __name__ == "__main__":  # as a module, for what __main__ defines cannot be saved
    run_cli(importlib.import_module(__spec__.name if __spec__ else "hf_integration").main)
