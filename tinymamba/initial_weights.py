"""Initial weights: the values of each parameter are a function of a seed, its name and its shape.

So they depend on no other parameter, no order and no number of processes, and a process that holds
a part of the model makes the whole of one parameter at a time.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from tinymamba.distributed import fill_parameter

TABLES = ("embedding.weight", "head.weight")  # (vocabulary, d_model) each
FORM: Any = {"dtype": torch.float32, "device": "cpu"}


@torch.no_grad()
def init_weights(model: Any, seed: int | None = None) -> None:
    """Fill all parameters of a TinyMambaModel; nothing changes the values afterwards.

    Without a `seed` one is drawn from PyTorch's global generator. A parameter that is sharded over
    the processes takes this process's part. Those on the meta device stay as they are.
    """
    parameters = {name: p for name, p in model.named_parameters() if not p.is_meta}
    if seed is None and parameters:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    for name, p in parameters.items():
        fill_parameter(p, initial_values(name, p.shape, model.config, seed))


def initial_values(name: str, shape: Any, config: Any, seed: Any) -> Tensor:
    """The first values of the parameter `name` of a model, float32 on the CPU.

    - Projections: normal, variance 2/(5 d_in) (Nguyen & Salazar, arXiv 1910.05895), biases zero;
      of a low-rank pair the first keeps the variance of its input, 1/d_in.
    - Convolutions: uniform within 1/sqrt(4 k), half of PyTorch's default, as its input is added.
    - Attention with k_conv and k > 1: W_k is W_q, and the taps of keys are a shift by one token
      plus the above: keys are like the queries of the token before.
    - Embedding: normal, deviation 0.02. Norms and D: one.
    - Gate: zero, so that every branch starts with a third. For gate=top_k tiny noise breaks the
      tie differently for each token; otherwise one branch would never be chosen, and never learn.
    - SSM: dt log-uniform in [1e-3, 1e-1], A uniform in [1, 16], as in Mamba-2.
    - Memory: half of a token is written and half of it read; it fades by half in 100 to 10,000.
    - DeepNet (arXiv 2203.00555, table 1, decoder-only, one sublayer per block): its stream is
      norm(alpha x + f) with alpha = n_layer^(1/4), and values and output projections are scaled
      by beta = (4 n_layer)^(-1/4). Only the ratio of x to f counts before a norm, so the stream
      here is x + f / alpha, with 1/alpha as the initial value of the learned residual_scale.
    """
    owner, _, kind = name.rpartition(".")
    draw = Draw(f"{seed} {name}", shape)
    if name in TABLES:
        return draw.normal(0.02)
    if kind == "bias" or owner.endswith("token_proj"):
        return torch.zeros(shape, **FORM)
    if kind == "D" or owner.endswith("norm"):
        return torch.ones(shape, **FORM)
    if kind == "residual_scale":
        return torch.full(shape, config.n_layer**-0.25 if config.deepnet else 1.0, **FORM)
    if kind == "A_log" and owner.endswith("memory"):
        return draw.uniform(math.log(1e-4), math.log(1e-2))
    if kind == "A_log":
        return draw.uniform(1, 16).log()
    if kind == "dt_bias":
        A_log = initial_values(f"{owner}.A_log", shape, config, seed)
        dt = draw.uniform(math.log(1e-3), math.log(1e-1)).exp()
        dt = dt + config.min_decay * (-A_log).exp()
        return dt + torch.log(-torch.expm1(-dt))  # softplus(dt_bias) = dt
    if kind != "weight":
        raise ValueError(f"there is no rule for the first values of {name}")
    if owner.endswith("controller"):
        return draw.normal(1e-3 * config.d_model**-0.5 if config.gate == "top_k" else 0.0)
    if owner.endswith("conv"):
        return convolution(owner, draw, config)
    return projection(owner, draw, config)


class Draw:
    """Random values of one shape, from a generator that `key` alone determines."""

    def __init__(self, key: str, shape: Any):
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
        self.random = torch.Generator().manual_seed(number)  # which takes 32 bits of it
        self.shape = shape

    def normal(self, deviation: float) -> Tensor:
        """Normal values of mean 0."""
        return torch.empty(self.shape, **FORM).normal_(0.0, deviation, generator=self.random)

    def uniform(self, low: float, high: float) -> Tensor:
        """Uniform values."""
        return torch.empty(self.shape, **FORM).uniform_(low, high, generator=self.random)


def convolution(owner: str, draw: Draw, config: Any) -> Tensor:
    """Taps (channels, k): of attention those of keys, or of queries, keys and values."""
    bound = 0.5 * config.d_conv**-0.5
    taps = draw.uniform(-bound, bound)
    if owner.endswith("attention.conv") and config.d_conv > 1:
        begin_as_shift(taps.chunk(3)[1] if config.qv_conv else taps)
    return taps


def begin_as_shift(taps: Tensor, share: float = 1.0) -> None:
    """Make taps (d, k) of u plus a convolution take a share of the token before instead of u."""
    taps[:, -1] -= share
    taps[:, -2] += share


def projection(owner: str, draw: Draw, config: Any) -> Tensor:
    """The matrix (d_out, d_in) of a linear map, or one of the two that make it of low rank."""
    first, layer = owner.endswith(".down"), owner.removesuffix(".up")
    weight = draw.normal(math.sqrt((1.0 if first else 0.4) / draw.shape[1]))
    beta = (4 * config.n_layer) ** -0.25 if config.deepnet else 1.0
    if layer.endswith("out_proj"):
        weight *= beta
    elif layer.endswith("qkv"):
        q, k, v = weight.chunk(3)
        if config.k_conv and config.d_conv > 1:
            k.copy_(q)
        v *= beta
    return weight
