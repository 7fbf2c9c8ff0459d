"""Attention to a window of w tokens, in products of w x w: both passes by hand.

Query r of a block sees keys c <= r of its own block and keys c > r of the block before: together
one full row, so one softmax over w columns serves both. Blocks come first in memory, so that the
blocks of keys and those before them are both contiguous: a product would copy them otherwise.

Dimension letters in the comments on shapes:
    b batch      a attention heads            f attention head width
    w window_size                             n blocks
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinymamba.fused import is_in_graph
from tinymamba.kernels import is_writing_graph, lower_triangle


def to_blocks(t: Tensor, blocks: int, window: int) -> Tensor:
    """(b, a, l, f) -> (n, b*a, w, f), with zeros at the end."""
    pad = blocks * window - t.shape[2]
    if is_writing_graph() or pad > 0:
        t = F.pad(t, (0, 0, 0, pad))
    return t.flatten(0, 1).unflatten(1, (blocks, window)).transpose(0, 1).contiguous()


def attend_to_window(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """Attention of q (n, b*a, w, f), scaled, to keys and values (n+1, b*a, w, f).

    hidden (at most n, b or 1, w, w) of bool: what the queries of the first blocks do not see.
    """
    if not is_in_graph():
        return WindowAttention.apply(q, keys, values, hidden)
    weights = window_weights(q, keys, hidden)
    return weights.tril() @ values[1:] + weights.triu(1) @ values[:-1]


def window_weights(q: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """The softmax of scores, (n, b*a, w, w); shapes as in `attend_to_window`."""
    own = lower_triangle(q[0, 0] @ q[0, 0].mT)
    scores = torch.where(own, q @ keys[1:].mT, q @ keys[:-1].mT)
    rows = scores.unflatten(1, (hidden.shape[1], -1))  # (n, b or 1, a or b*a, w, w)
    rows[: hidden.shape[0]].masked_fill_(hidden[:, :, None], -math.inf)
    return scores.softmax(-1).to(q.dtype)


class WindowAttention(torch.autograd.Function):
    """`attend_to_window`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        """The values that each query has found, (n, b*a, w, f)."""
        weights = window_weights(q, keys, hidden)
        ctx.save_for_backward(q, keys, values, weights)
        own, before = halves(weights.flatten(0, 1))
        [own_values], [values_before] = pairs(values)
        return torch.baddbmm(own @ own_values, before, values_before).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, keys and values."""
        q, keys, values, weights = ctx.saved_tensors
        shape, dy = q.shape, dy.contiguous().flatten(0, 1)
        q, weights = q.flatten(0, 1), weights.flatten(0, 1)
        (own_keys, own_values), (keys_before, values_before) = pairs(keys, values)
        dweights = dy @ own_values.mT
        triangle = lower_triangle(dweights).to(dy.dtype)
        dweights.mul_(triangle).addcmul_(dy @ values_before.mT, 1 - triangle)
        dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, dy.dtype)
        (own, before), (down, dbefore) = halves(weights), halves(dscores)
        dq = torch.baddbmm(down @ own_keys, dbefore, keys_before)
        dkeys = sum_of_pairs(down.mT @ q, dbefore.mT @ q, keys)
        dvalues = sum_of_pairs(own.mT @ dy, before.mT @ dy, values)
        return dq.view(shape), dkeys, dvalues, None


def halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (..., w, w) of keys of a query's own block, and of the block before."""
    own = weights.tril()
    return own, weights - own


def pairs(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of each tensor (n+1, b*a, w, f) the queries' own blocks and those before (n*b*a, w, f)."""
    return [t[1:].flatten(0, 1) for t in tensors], [t[:-1].flatten(0, 1) for t in tensors]


def sum_of_pairs(own: Tensor, before: Tensor, like: Tensor) -> Tensor:
    """The gradient of a tensor like (n+1, b*a, w, f) from those of its `pairs`."""
    total = torch.empty_like(like)
    total[0] = 0
    total[1:] = own.view_as(like[1:])
    total[:-1] += before.view_as(like[1:])
    return total
