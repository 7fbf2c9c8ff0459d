"""The models that quality.py, memory.py and ladder.py compare: TinyMamba and peers of transformers.

llama        Llama.
llama_conv   Llama with what a Transformer gains most from for little: norms of queries and keys
             (that is Qwen3), and a short convolution before attention and before the MLP in every
             layer, in the residual form of Canon layers (arXiv 2512.17351).
llama_canon  llama_conv with such a convolution of queries, keys and values too (Canon B).
llama_start  llama_conv with one of keys, and with TinyMamba's start: see initial_values.
             No published model has it; it is the strongest Transformer that we know of here.
mamba2       Mamba2 (arXiv 2405.21060).
gated_delta  OlmoHybrid: layers of the gated delta rule (arXiv 2412.06464) whose eigenvalues may be
             negative (arXiv 2411.12537); every fourth layer, or the last, is full attention.

All are float32, with one matrix for embedding and output layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from testv2 import FOLDER_FIELDS, Config, TinyMambaModel, to_autocast
from tinymamba.cli import need, parse_words, require
from tinymamba.initial_weights import begin_as_shift
from tinymamba.kernels import ResidualConv

WIDTH = 4  # tokens of llama_conv's convolutions
TRANSFORMERS = "5.23.0"  # has all of them


class Shape(NamedTuple):
    """The size of a peer."""

    vocab: int
    width: int
    layers: int
    heads: int  # of attention and of the delta rule; of mamba2, those of the state
    mlp: int = 0  # hidden width of the MLP; mamba2 has none
    state: int = 0  # size of mamba2's state


class WithConv(nn.Module):
    """A module, and then u plus a causal depthwise convolution of its output u."""

    def __init__(self, module: nn.Module, dim: int):
        super().__init__()
        self.module = module
        self.conv_weight = nn.Parameter(torch.empty(dim, WIDTH).uniform_(-0.25, 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """x (b, l, ...) -> (b, l, d)."""
        u = to_autocast(self.module(x))
        return ResidualConv.apply(u, None, self.conv_weight.to(u.dtype))


# ------------------------------------------------------------------------------------ models


def transformer_settings(shape: Shape) -> dict[str, Any]:
    """What the configurations of all peers with attention have in common.

    No token is padding: the embedding of one would not be trained.
    """
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.mlp,
        "tie_word_embeddings": True,
        "use_cache": False,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }


def make_llama(hf: Any, shape: Shape) -> nn.Module:
    """Llama."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**transformer_settings(shape)))


def make_llama_conv(hf: Any, shape: Shape) -> nn.Module:
    """Llama with norms of queries and keys, and with convolutions before attention and MLP."""
    heads = {"num_key_value_heads": shape.heads, "head_dim": shape.width // shape.heads}
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**transformer_settings(shape), **heads))
    for layer in model.model.layers:
        layer.input_layernorm = WithConv(layer.input_layernorm, shape.width)
        layer.post_attention_layernorm = WithConv(layer.post_attention_layernorm, shape.width)
    return model


def make_llama_canon(hf: Any, shape: Shape) -> nn.Module:
    """llama_conv with convolutions of queries, keys and values."""
    model = make_llama_conv(hf, shape)
    for attention in (layer.self_attn for layer in model.model.layers):
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, WithConv(getattr(attention, name), shape.width))
    return model


@torch.no_grad()
def make_llama_start(hf: Any, shape: Shape) -> nn.Module:
    """llama_conv whose keys equal the queries of the token before at first."""
    model = make_llama_conv(hf, shape)
    for attention in (layer.self_attn for layer in model.model.layers):
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.k_proj = WithConv(attention.k_proj, shape.width)
        begin_as_shift(attention.k_proj.conv_weight)
    return model


def make_mamba2(hf: Any, shape: Shape) -> nn.Module:
    """Mamba2."""
    config = hf.Mamba2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_heads=shape.heads,
        head_dim=2 * shape.width // shape.heads,
        state_size=shape.state,
        n_groups=1,
        chunk_size=64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return hf.Mamba2ForCausalLM(config)


def make_gated_delta(hf: Any, shape: Shape) -> nn.Module:
    """Gated delta rule and full attention."""
    found, problem = hasattr(hf, "OlmoHybridForCausalLM"), f"{hf.__version__} has no OlmoHybrid"
    require(found, "transformers", problem, f"pip install transformers=={TRANSFORMERS}")
    return hf.OlmoHybridForCausalLM(hf.OlmoHybridConfig(**transformer_settings(shape)))


PEERS = {
    "llama": make_llama,
    "llama_conv": make_llama_conv,
    "llama_canon": make_llama_canon,
    "llama_start": make_llama_start,
    "mamba2": make_mamba2,
    "gated_delta": make_gated_delta,
}
MODELS = ("tinymamba", *PEERS)


def build_peer(name: str, shape: Shape) -> nn.Module:
    """A peer with random weights."""
    hf = need("transformers")
    hf.logging.set_verbosity_error()  # Mamba2 warns at length of missing CUDA kernels
    return PEERS[name](hf, shape)


def build_tinymamba(config: Config, words: str = "") -> TinyMambaModel:
    """TinyMamba with random weights; FIELD=VALUE words change model fields of its Config."""
    remedy = "write --variant 'FIELD=VALUE ...'"
    values = parse_words(words.split(), Config, FOLDER_FIELDS, remedy, "testv2.py")
    return TinyMambaModel(dataclasses.replace(config, **values))


def require_variant_of_ours(models: list[str], words: str) -> None:
    """Reject a variant of a peer."""
    problem = "variants are of TinyMamba only"
    require(not words or models == ["tinymamba"], "--variant", problem, "pass --models tinymamba")


# -------------------------------------------------------------------------------- equal sizes


def count(model: nn.Module) -> int:
    """Parameters of a model, shared ones once."""
    return sum(p.numel() for p in model.parameters())


def fit(name: str, shape: Shape, target: int) -> Shape:
    """The shape whose MLP (of mamba2: whose state) comes nearest to `target` parameters."""

    def resized(size: int) -> Shape:
        return shape._replace(state=size) if name == "mamba2" else shape._replace(mlp=size)

    def parameters(size: int) -> int:
        with torch.device("meta"):
            return count(build_peer(name, resized(size)))

    one = parameters(1)
    each = parameters(2) - one
    size = 1 + round((target - one) / each)
    near = size >= 1 and each <= 0.02 * target  # then it is at most 1% off
    problem = f"width {shape.width} and {shape.layers} layers cannot have {target:,} parameters"
    require(near, name, problem, "change --d_model or --n_layer, or name others with --models")
    return resized(size)


def peer_shape(name: str, config: Config) -> Shape:
    """The shape of a peer as large as TinyMamba with that Config, of 1.5 layers for each block.

    Mamba2 has two layers for each block, as it has no MLP.
    """
    with torch.device("meta"):
        target = count(TinyMambaModel(config))
    blocks, heads = config.n_layer, config.num_heads
    layers = 2 * blocks if name == "mamba2" else blocks + (blocks + 1) // 2
    heads = 2 * config.d_model // config.ssm_head_dim if name == "mamba2" else heads
    return fit(name, Shape(config.vocab_size, config.d_model, layers, heads), target)
