"""Forms of the state-space branch that were tried: what makes a state remember.

    python -m benchmarks.memory far_copy --lr 1.6e-2 --seeds 0 --variant "rotate=none"
    python -m benchmarks.memory far_copy --d_state 64 --variant "write=beta keys=l2 start=memory"
    python -m benchmarks.quality M-small --seeds 0 --variant "rule=delta d_state=64"

Words are FIELD=VALUE of `Variant` below, or of testv2.Config with `ssm_rule` shortened to `rule`.
What is not named is as in testv2.py. docs/ablations.md has the results.
"""

from __future__ import annotations

import argparse
import math
import typing
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testv2 import (
    Config,
    LayerState,
    MambaSSM,
    SequenceContext,
    TinyMambaModel,
    init_ssm,
    rotate_channels,
    running_phase,
    selective_scan,
    upcast,
)
from tinymamba.cli import UserError, check_fields, parse_as, require


@dataclass
class Variant:
    """What a variant changes in the branch."""

    rotate: str = "quarter"  # pairs of state channels that rotate
    write: str = "dt"  # strength of writing: dt, as the decay, or a projection of its own, beta
    keys: str = "free"  # B and C: as they are, of length 1, or with an RMS norm and a bias
    out_norm: bool = False  # a norm of y per head
    beta: str = "sigmoid"  # of the delta rule; flat: 0 to 2, flat at 0, 1 and 2
    start: str = "mamba2"  # initial weights; memory: those of the delta rule
    slowest: float = 1.0  # least A at first; below 1 A is log-uniform up to 16

    CHOICES: ClassVar = {
        "rotate": ("none", "quarter", "all"),
        "write": ("dt", "beta"),
        "keys": ("free", "l2", "rms"),
        "beta": ("sigmoid", "flat"),
        "start": ("mamba2", "memory"),
    }
    LIMITS: ClassVar = {"slowest": (1e-6, 1)}


def parse(config: Config, words: str) -> tuple[Config, Variant]:
    """FIELD=VALUE words -> the settings of the model, and of the branch."""
    values: dict[str, Any] = {}
    remedy = "write --variant 'FIELD=VALUE ...'"
    for word in words.split():
        name, equals, value = word.partition("=")
        name = {"rule": "ssm_rule"}.get(name, name)
        owner = Variant if name in {f.name for f in fields(Variant)} else Config
        hints = typing.get_type_hints(owner)
        require(equals and name in hints, word, "is no setting of a variant or of Config", remedy)
        try:
            values[name] = parse_as(hints[name], value)
        except argparse.ArgumentTypeError as e:
            raise UserError(name, *str(e).split("; ")) from None
    branch = {f.name: values.pop(f.name) for f in fields(Variant) if f.name in values}
    variant = Variant(**branch)
    check_fields(variant)
    return replace(config, **values).validate(), variant


class VariantSSM(MambaSSM):
    """The branch with the settings of `variant`; slots of adapters are left out."""

    def __init__(self, config: Config, variant: Variant):
        super().__init__(config)
        self.variant, pairs = variant, config.d_state // 2
        if variant.rotate == "all":
            self.n_rotating = pairs
            self.angle_proj = type(self.angle_proj)(config.d_model, pairs, config.bias)
        if variant.write == "beta":
            self.beta_proj = nn.Linear(config.d_model, self.n_heads)
        if variant.keys == "rms":
            self.key_bias = nn.Parameter(torch.ones(2, config.d_state))
        if variant.out_norm:
            self.norm_weight = nn.Parameter(torch.ones(self.d_inner))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As init_weights of testv2.py, which has seen another branch in this place."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(0.4 / module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        delta, variant = self.delta, self.variant
        self.delta = delta or variant.start == "memory"
        init_ssm(self)
        self.delta = delta
        if variant.slowest < 1:
            self.A_log.uniform_(math.log(variant.slowest), math.log(16))
        if self.config.deepnet:
            self.out_proj.weight.mul_((4 * self.config.n_layer) ** -0.25)

    def forward(
        self, u: Tensor, context: SequenceContext, past: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As MambaSSM.forward, for texts without padding and documents."""
        c, v, tail = self.config, self.variant, None
        z, x, B, C, dt, *beta = self.in_proj(u).split(self.sizes, dim=-1)
        if self.conv is not None:
            tail = None if past is None else past.conv[..., c.d_model :]
            BC, tail = self.conv(torch.cat((B, C), dim=-1), context, tail)
            B, C = BC.chunk(2, dim=-1)
        x = x.unflatten(-1, (self.n_heads, c.ssm_head_dim))
        dt = F.threshold(F.softplus(upcast(dt) + upcast(self.dt_bias)), 1e-3, 0.0)
        half_turns = F.hardtanh(F.softshrink(self.angle_proj(u), 0.5))
        phase = running_phase(
            half_turns * (v.rotate != "none"), None if past is None else past.phase
        )
        if v.keys == "l2" or self.delta:
            B, C = F.normalize(upcast(B), dim=-1), F.normalize(upcast(C), dim=-1)
        elif v.keys == "rms":
            B, C = (
                F.rms_norm(t, t.shape[-1:]) + b for t, b in zip((B, C), self.key_bias, strict=True)
            )
        B, C = rotate_channels(B, phase), rotate_channels(C, phase)
        A, state = -upcast(self.A_log).exp(), None if past is None else past.ssm
        rest = (state, None, c.scan, c.chunk_size)
        if self.delta:
            beta = [self.strength(upcast(t)) for t in beta]
            y, state = selective_scan(x, dt, A, B, C, self.D, *rest, *beta)
        elif v.write == "beta":
            y, state = self.write_by_beta(u, x, dt, A, B, C, rest)
        else:
            y, state = selective_scan(x, dt, A, B, C, self.D, *rest)
        if self.delta or v.out_norm:
            y = F.rms_norm(y, y.shape[-1:]) * self.norm_weight.view(self.n_heads, -1)
        return self.out_proj(y.flatten(2).to(z.dtype) * F.silu(z)), state, phase[:, -1], tail

    def strength(self, b: Tensor) -> Tensor:
        """beta of the delta rule."""
        if self.variant.beta == "sigmoid":
            return b.sigmoid()
        return F.hardtanh(F.softshrink(b, 0.5)) + 1

    def write_by_beta(
        self, u: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, rest: tuple
    ) -> tuple[Tensor, Tensor]:
        """Mamba-2's rule with x scaled so that dt x is beta x."""
        beta = upcast(self.beta_proj(u)).sigmoid()
        dt = dt.clamp(min=1e-3)
        scaled = (x * (beta / dt)[..., None]).to(x.dtype)
        y, state = selective_scan(scaled, dt, A, B, C, torch.zeros_like(self.D), *rest)
        return y + self.D[:, None].to(x.dtype) * x, state


def build(config: Config, words: str) -> TinyMambaModel:
    """A model whose state-space branches are the variant that `words` describe."""
    config, variant = parse(config, words)
    model = TinyMambaModel(config)
    if variant != Variant():
        for block in model.blocks:
            block.ssm = VariantSSM(config, variant)
    return model
