"""Small operations of a block, each with a backward pass by hand.

PyTorch's autograd makes several passes over memory for each of them, and keeps what it need not.
A compiled or exported graph uses the plain formula. Time them with

    python -m benchmarks.parts

Dimension letters in the comments on shapes:
    b batch      l length        d channels            f attention head width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinymamba.kernels import is_in_graph, promoted


def sum_tokens(x: Tensor, like: Tensor) -> Tensor:
    """The sum over all tokens of x (..., d), in the shape and dtype of `like` (d,)."""
    return x.reshape(-1, x.shape[-1]).sum(0).to(like.dtype)


# ------------------------------------------------------------------------------------ norm


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension of x (..., d)."""
    if is_in_graph():
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return RootMeanSquareNorm.apply(x, weight, eps)


class RootMeanSquareNorm(torch.autograd.Function):
    """`rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The norm, in the dtype of x."""
        wide = x.to(promoted(x))
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        normal = (wide * scale).to(x.dtype)
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and weight."""
        normal, scale, weight = ctx.saved_tensors
        dweight = sum_tokens(dy * normal, weight)
        dnormal = (dy * weight.to(dy.dtype)).to(scale.dtype)
        normal = normal.to(scale.dtype)
        along = (dnormal * normal).mean(-1, keepdim=True)  # (..., 1)
        dx = dnormal.addcmul_(normal, along, value=-1).mul_(scale)
        return dx.to(dy.dtype), dweight, None


# ------------------------------------------------------------------------------------ rotation


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + f/2) of x (..., l, f); cos and sin (..., l, f/2) have its dtype."""
    if not is_in_graph():
        return Rotation.apply(x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Rotation(torch.autograd.Function):
    """`rotate`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The rotated pairs, in contiguous memory."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, cos, sin)
        return rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, which is the opposite rotation, and of cos and sin."""
        x, cos, sin = ctx.saved_tensors
        dx = rotated(dy, cos, sin, -1)
        if x is None:
            return dx, None, None
        (first, second), (dfirst, dsecond) = x.chunk(2, dim=-1), dy.chunk(2, dim=-1)
        dcos = (first * dfirst + second * dsecond).sum_to_size(cos.shape)
        dsin = (first * dsecond - second * dfirst).sum_to_size(sin.shape)
        return dx, dcos, dsin


def rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """`rotate` by the angles times `sign`, half by half into new memory."""
    y = x.new_empty(x.shape)
    first, second = x.chunk(2, dim=-1)
    to_first, to_second = y.chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=to_second).addcmul_(first, sin, value=sign)
    return y


# ------------------------------------------------------------------------------------ gates


def silu_product(both: Tensor) -> Tensor:
    """silu(gate) * x of both = (gate, x) (..., 2e): (..., e)."""
    if not is_in_graph():
        return SiluProduct.apply(both)
    gate, x = both.chunk(2, dim=-1)
    return F.silu(gate) * x


class SiluProduct(torch.autograd.Function):
    """`silu_product`."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        """The product."""
        gate, x = both.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(both, active)
        return active * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """The gradient of both, whose halves are written to their place at once."""
        both, active = ctx.saved_tensors
        gate, x = both.chunk(2, dim=-1)
        dboth = torch.empty_like(both)
        dgate, dx = dboth.chunk(2, dim=-1)
        torch.mul(dy, active, out=dx)
        torch.ops.aten.silu_backward.grad_input(dy * x, gate, grad_input=dgate)
        return dboth


def weighted_sum(gates: Tensor, branches: list[Tensor]) -> Tensor:
    """The sum of three branches (b, l, d) times gates (b, l, 3) of their dtype."""
    return sum_branches(gates, branches) if is_in_graph() else WeightedSum.apply(gates, *branches)


def sum_branches(gates: Tensor, branches: Any) -> Tensor:
    """`weighted_sum`."""
    first, second, third = gates.unsqueeze(-2).unbind(-1)  # (b, l, 1) each
    mix = torch.addcmul(first * branches[0], second, branches[1])
    return torch.addcmul(mix, third, branches[2])


class WeightedSum(torch.autograd.Function):
    """`weighted_sum`."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, *branches: Tensor) -> Tensor:
        """The sum."""
        ctx.save_for_backward(gates, *branches)
        return sum_branches(gates, branches)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        """The gradients of gates and branches."""
        gates, *branches = ctx.saved_tensors
        dgates = torch.stack([(dy * branch).sum(-1) for branch in branches], dim=-1)
        return dgates, *(dy * gate for gate in gates.unsqueeze(-2).unbind(-1))


def add_scaled(x: Tensor, scale: Tensor, update: Tensor) -> Tensor:
    """x + scale * update: x (..., d), scale (d,), and an update that may have a narrower dtype."""
    return x + scale * update if is_in_graph() else ScaledAddition.apply(x, scale, update)


class ScaledAddition(torch.autograd.Function):
    """`add_scaled`, with the products of its backward pass in the dtype of the update."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, update: Tensor) -> Tensor:
        """The sum, in the dtype of x."""
        ctx.save_for_backward(scale, update)
        return torch.addcmul(x, scale, update)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, scale and update."""
        scale, update = ctx.saved_tensors
        narrow = dy.to(update.dtype)
        return dy, sum_tokens(narrow * update, scale), narrow * scale.to(update.dtype)
