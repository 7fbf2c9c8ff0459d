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

from tinymamba.kernels import is_in_graph, is_writing_graph, lower_triangle, sum_of_products


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
    if is_in_graph():
        return sum_of_values(window_weights(q, keys, hidden), values)
    return WindowAttention.apply(q, keys, values, hidden)


def window_weights(q: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """The softmax of scores, (n, b*a, w, w); shapes as in `attend_to_window`."""
    own = q @ keys[1:].mT
    scores = torch.where(lower_triangle(own), own, q @ keys[:-1].mT)
    rows = scores.unflatten(1, (hidden.shape[1], -1))  # (n, b or 1, a or b*a, w, w)
    rows[: hidden.shape[0]].masked_fill_(hidden[:, :, None], -math.inf)
    return scores.softmax(-1).to(q.dtype)


def sum_of_values(weights: Tensor, values: Tensor) -> Tensor:
    """What weights (n, b*a, w, w) find in values (n+1, b*a, w, f): (n, b*a, w, f)."""
    own, before = halves(weights)
    return sum_of_products((own, values[1:]), (before, values[:-1]))


class WindowAttention(torch.autograd.Function):
    """`attend_to_window`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        """The values that each query has found, (n, b*a, w, f)."""
        weights = window_weights(q, keys, hidden)
        ctx.save_for_backward(q, keys, values, weights)
        return sum_of_values(weights, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, keys and values."""
        q, keys, values, weights = ctx.saved_tensors
        dy = dy.contiguous()
        dweights = dy @ values[1:].mT
        triangle = lower_triangle(dweights).to(dy.dtype)
        dweights.mul_(triangle).addcmul_(dy @ values[:-1].mT, 1 - triangle)
        dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, dy.dtype)
        dkeys = gradient_of_pairs(dscores, q, keys)
        dvalues = gradient_of_pairs(weights, dy, values)
        return sum_of_values(dscores, keys), dkeys, dvalues, None


def halves(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weights (..., w, w) of keys of a query's own block, and of the block before."""
    own = weights.tril()
    return own, weights - own


def gradient_of_pairs(weights: Tensor, dy: Tensor, like: Tensor) -> Tensor:
    """The gradient of values like (n+1, b*a, w, f) from that of their `sum_of_values`."""
    own, before = halves(weights)
    total = torch.empty_like(like)
    total[0] = 0
    total[1:] = own.mT @ dy
    total[:-1] += before.mT @ dy
    return total
