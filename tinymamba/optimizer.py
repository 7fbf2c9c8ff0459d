"""The optimizers: Muon for matrices and AdamW for all other parameters, or AdamW for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinymamba.distributed import local_tensor, shard_like
from tinymamba.muon import Matrix, Round, find_layout, list_matrices, orthogonalize_all, plan_rounds

SPIKE_RATE = 0.01  # weight of one step in the running mean of the gradient norm
SPIKE_WARMUP = 20  # steps that the mean must have seen


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices and AdamW for all else, as one optimizer.

    A matrix that gives several outputs, such as queries, keys and values, is split into as many
    matrices for Muon. Updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982,
    eq. 4), so that one learning rate serves both. Several processes divide the matrices among
    them (see muon.py). They must call `step` together, with gradients for the same parameters.
    """

    MOMENTUM = 0.95

    def __init__(self, matrices: dict[Tensor, list[int]], others: list, config: Any):
        """`matrices` maps each to the rows of its parts; `config` gives lr, betas and decay."""
        parameters = list(matrices)
        self.layout = find_layout(parameters)
        self.rounds = plan_rounds(list_matrices(matrices), self.layout.size)
        betas = (config.beta1, config.beta2)
        self.adamw = torch.optim.AdamW(others, config.lr, betas, weight_decay=0.0, fused=True)
        muon = {"params": parameters, "lr": config.lr, "weight_decay": config.weight_decay}
        super().__init__([muon, *self.adamw.param_groups], {})
        self.link_adamw()

    def link_adamw(self) -> None:
        """Let the inner AdamW use this optimizer's groups and state."""
        self.adamw.param_groups, self.adamw.state = self.param_groups[1:], self.state

    def __setstate__(self, state: dict) -> None:  # load_state_dict replaces groups and state
        super().__setstate__(state)
        self.link_adamw()

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> Any:
        """One update; `closure`, if given, computes the loss again."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.adamw.step()
        group = self.param_groups[0]
        live = {i: p for i, p in enumerate(group["params"]) if p.grad is not None}
        for p in live.values():
            if p not in self.state:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            mean = local_tensor(self.state[p]["momentum_buffer"])
            mean.lerp_(local_tensor(p.grad), 1 - self.MOMENTUM)
        if live:
            weights = [local_tensor(p) for p in live.values()]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for owners in self.rounds:
            owners = [[matrix for matrix in own if matrix.parameter in live] for own in owners]
            if any(owners):
                self.update(owners)
        return loss

    def update(self, owners: Round) -> None:
        """Update the matrices of a round, a list for each process that owns them."""
        mine = orthogonalize_all(self.layout.collect(owners, self.momentum))
        for matrices, results in zip(owners, self.layout.share(owners, mine), strict=True):
            if matrices:
                self.apply(matrices, results)

    def momentum(self, matrix: Matrix) -> Tensor:
        """What this process has of a matrix of Nesterov momentum, in bfloat16."""
        p = self.param_groups[0]["params"][matrix.parameter]
        tensors = p.grad, self.state[p]["momentum_buffer"]
        grad, mean = (self.layout.held(t, matrix) for t in tensors)
        return grad.lerp(mean, self.MOMENTUM).bfloat16()

    def apply(self, matrices: Sequence[Matrix], results: list[Tensor]) -> None:
        """Add orthogonalized momentum to what this process has of the matrices."""
        group = self.param_groups[0]
        weights = [self.layout.held(group["params"][m.parameter], m) for m in matrices]
        updates = []
        for matrix, weight, new in zip(matrices, weights, results, strict=True):
            # The result for a tall matrix lies in memory column by column.
            new = new.to(weight.dtype, memory_format=torch.contiguous_format)
            updates.append(new.mul_(0.2 * max(matrix.shape) ** 0.5))
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def make_optimizer(model: nn.Module, config: Any) -> torch.optim.Optimizer:
    """Muon or AdamW with weight decay for the matrices of linear projections; AdamW for the rest.

    The rest are norms, biases, A_log, D, dt_bias, convolutions and scales, the few rows that give
    weights of branches and angles, and the embedding: weight decay would shrink its rows of rare
    tokens between their uses.
    """
    not_matrices = ("head", "controller", "angle_proj")
    linear = {
        m.weight: getattr(m, "parts", [m.out_features])
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and not name.endswith(not_matrices) and m.weight.requires_grad
    }
    others = [p for p in model.parameters() if p.requires_grad and p not in linear]
    if config.optimizer == "muon":
        return MuonAdamW(linear, others, config)
    groups = [
        {"params": list(linear), "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.lr, (config.beta1, config.beta2), fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict, config: Any) -> None:
    """Continue with a saved state; weight decay and betas are those of now."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for p, kept in optimizer.state.items():
        kept |= {name: shard_like(t, p) for name, t in kept.items() if isinstance(t, Tensor)}
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
        if "betas" in group:
            group["betas"] = (config.beta1, config.beta2)


def judge_step(progress: dict, loss: float, norm: float, limit: float) -> tuple[bool, str]:
    """Whether a step may change the weights, and what to say of a spike.

    Loss and gradient norm must be finite, and the norm no more than `limit` deviations above its
    running mean in `progress`, which takes it in. A `limit` of 0 is none.
    """
    p = progress
    if not math.isfinite(loss + norm):
        p["bad_steps"], p["skipped"] = p["bad_steps"] + 1, p["skipped"] + 1
        return False, ""
    p["bad_steps"] = 0
    (mean, variance, steps), deviation = p["norm"], p["norm"][1] ** 0.5
    spike = limit > 0 and steps >= SPIKE_WARMUP and norm > mean + limit * deviation
    # Spikes count too, so that the mean follows norms that stay high.
    seen = min(norm, mean + limit * deviation) if spike else norm
    rate = max(SPIKE_RATE, 1 / (steps + 1))
    change = seen - mean
    p["norm"] = [mean + rate * change, (1 - rate) * (variance + rate * change**2), steps + 1]
    p["skipped"] += spike
    line = f"gradient norm {norm:.2f} is a spike (mean {mean:.2f}, deviation {deviation:.2f})"
    return not spike, line if spike else ""
