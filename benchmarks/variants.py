"""Forms of the state-space branch that were tried: what makes a state remember.

    python -m benchmarks.memory far_copy --lr 1.6e-2 --seeds 0 --variant "rotating=1 bc_conv=false"
    python -m benchmarks.memory far_copy --d_state 64 --variant "write=beta keys=l2 start=memory"
    python -m benchmarks.quality M-small --seeds 0 --variant "write=delta d_state=64"

Words are FIELD=VALUE of `Variant` below, or of testv2.Config. What is not named is as in testv2.py.
docs/ablations.md has the results.
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
    MIN_DT,
    MIN_LOG_DECAY,
    Config,
    LayerState,
    MambaSSM,
    SequenceContext,
    TinyMambaModel,
    begin_as_shift,
    init_ssm,
    rotate_channels,
    running_phase,
    selective_scan,
    upcast,
)
from tinymamba.cli import UserError, check_fields, parse_as, require
from tinymamba.delta_rule import run_delta_rule

SHIFT = 0.88  # how much of B comes from the token before at first, with start=memory


@dataclass
class Variant:
    """What a variant changes in the branch."""

    rotate: bool = True  # as Config.rotating says, or not at all
    write: str = "dt"  # strength: dt, as the decay; beta, a projection of its own; delta rule
    keys: str = "free"  # B and C: as they are, of length 1, or with an RMS norm and a bias
    out_norm: bool = False  # a norm of y per head
    beta: str = "sigmoid"  # from 0 to 1; flat: from 0 to 2, flat at 0, 1 and 2
    start: str = "mamba2"  # initial weights; memory: C equal to B, and B that of the token before
    slowest: float = 1.0  # least A at first; below 1 A is log-uniform up to 16

    CHOICES: ClassVar = {
        "write": ("dt", "beta", "delta"),
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
    config = replace(config, **values).validate()
    require(not config.low_rank, "low_rank", "is not for variants", "leave it out")
    problem, remedy = "needs keys of length 1", "add keys=l2"
    require(variant.write != "delta" or variant.keys == "l2", "write", problem, remedy)
    problem, remedy = "needs bc_conv, and d_conv of 2 or more", "leave it out"
    able = config.bc_conv and config.d_conv > 1
    require(variant.start != "memory" or able, "start", problem, remedy)
    return config, variant


class VariantSSM(MambaSSM):
    """The branch with the settings of `variant`; slots of adapters are left out."""

    def __init__(self, config: Config, variant: Variant):
        super().__init__(config)
        self.variant = variant
        if variant.write != "dt":
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
        init_ssm(self)
        if self.variant.slowest < 1:
            self.A_log.uniform_(math.log(self.variant.slowest), math.log(16))
        if self.variant.start == "memory":
            _, _, B, C, _ = self.in_proj.weight.split(self.sizes)
            C.copy_(B)
            begin_as_shift(self.conv.weight[: len(B)], SHIFT)
        if self.config.deepnet:
            self.out_proj.weight.mul_((4 * self.config.n_layer) ** -0.25)

    def forward(
        self, u: Tensor, context: SequenceContext, past: LayerState | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As MambaSSM.forward, for texts without padding and documents."""
        c, v, tail = self.config, self.variant, None
        z, x, B, C, dt = self.in_proj(u).split(self.sizes, dim=-1)
        if self.conv is not None:
            tail = None if past is None else past.conv[..., c.d_model :][..., : 2 * c.d_state]
            BC, tail = self.conv(upcast(torch.cat((B, C), dim=-1)), context, tail)
            B, C = BC.chunk(2, dim=-1)
        x = x.unflatten(-1, (self.n_heads, c.ssm_head_dim))
        dt = F.threshold(F.softplus(upcast(dt) + upcast(self.dt_bias)), MIN_DT, 0.0)
        half_turns = F.hardtanh(F.softshrink(self.angle_proj(u), 0.5))
        phase = running_phase(half_turns * v.rotate, None if past is None else past.phase)
        if v.keys == "l2":
            B, C = F.normalize(upcast(B), dim=-1), F.normalize(upcast(C), dim=-1)
        elif v.keys == "rms":
            B, C = (
                F.rms_norm(t, t.shape[-1:]) + b for t, b in zip((B, C), self.key_bias, strict=True)
            )
        B, C = rotate_channels(B, phase), rotate_channels(C, phase)
        A, state = -upcast(self.A_log).exp(), None if past is None else past.ssm
        if v.write == "dt":
            y, state = selective_scan(x, dt, A, B, C, self.D, state, None, c.scan, c.chunk_size)
        else:
            y, state = self.write_by_beta(u, x, dt, A, B, C, state)
        if v.out_norm:
            y = F.rms_norm(y, y.shape[-1:]) * self.norm_weight.view(self.n_heads, -1)
        return self.out_proj(y.flatten(2).to(z.dtype) * F.silu(z)), state, phase[:, -1], tail

    def write_by_beta(
        self, u: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Any
    ) -> tuple[Tensor, Tensor]:
        """y and the new state, where x is written with the strength beta."""
        size, beta = self.config.chunk_size, upcast(self.beta_proj(u))  # (b, l, h)
        if self.variant.beta == "sigmoid":
            beta = beta.sigmoid()
        else:
            beta = F.hardtanh(F.softshrink(beta, 0.5)) + 1
        if self.variant.write == "beta":
            dt = dt.clamp(min=MIN_DT)
            x_scaled, no_skip = (x * (beta / dt)[..., None]).to(x.dtype), torch.zeros_like(self.D)
            y, state = selective_scan(x_scaled, dt, A, B, C, no_skip, state, chunk_size=size)
        else:
            if state is None:
                state = dt.new_zeros(len(x), *x.shape[2:], B.shape[-1])
            log_decay = (dt * A).clamp(min=MIN_LOG_DECAY)
            with torch.autocast(x.device.type, enabled=False):
                y, state = run_delta_rule(x, beta, log_decay, B, C, state, size, x.shape[1] == 1)
        return y + self.D[:, None].to(x.dtype) * x, state


def build(config: Config, words: str) -> TinyMambaModel:
    """A model whose state-space branches are the variant that `words` describe."""
    config, variant = parse(config, words)
    model = TinyMambaModel(config)
    if variant != Variant():
        for block in model.blocks:
            block.ssm = VariantSSM(config, variant)
    return model
