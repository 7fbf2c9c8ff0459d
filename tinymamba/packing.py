"""Padding and documents in a batch: where each row ends, and where each document begins.

Dimension letters in the comments on shapes: b batch, l length, k width of a window of inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinymamba.kernels import running_max


def keep_last(history: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The `count` entries of history (b, count + l, ...) that end at each row's last token."""
    if lengths is None:
        return history[:, history.shape[1] - count :]
    index = lengths[:, None] + torch.arange(count, device=history.device)  # (b, count)
    index = index.view(*index.shape, *(1,) * (history.dim() - 2))
    return history.gather(1, index.expand(-1, -1, *history.shape[2:]))


def padding_last(attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(order, back, lengths): indices (b, l) that put padding last, and undo it; tokens per row."""
    order = (attention_mask == 0).long().argsort(dim=1, stable=True)
    return order, order.argsort(dim=1), (attention_mask != 0).sum(1)


def take_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x (b, l, ...) in another order (b, l)."""
    index = order.view(*order.shape, *(1,) * (x.dim() - 2))
    return x.gather(1, index.expand_as(x))


def find_documents(
    ids: Tensor, ends: Tensor | None, state: Any, lengths: Tensor | None, before: Any = None
) -> tuple[Tensor | None, Any]:
    """The index at which the document of each token begins (b, l), and of the next one (b,).

    `state` is the ModelState before ids (b, l), or None; `before` are the PiecesBefore, or None. A
    result of None stands for 0 everywhere.
    """
    if state is None and ends is None and before is None:
        return None, None
    first = ids.new_zeros(ids.shape[0])  # negative if it began in an earlier call, or piece
    if before is not None:
        first = before.document_start(ids, ends)
    elif state is not None:
        first = state.document_start - state.position
    if ends is None:
        return first[:, None].expand_as(ids), first
    index = torch.arange(ids.shape[1], device=ids.device)
    if lengths is not None:
        ends = ends & (index < lengths[:, None])
    begins = running_max(torch.where(ends, index + 1, first[:, None]))  # (b, l)
    starts = torch.cat((first[:, None], begins), dim=1)[:, : ids.shape[1]]
    return starts, begins[:, -1]


def erase_states(layers: list, rows: Tensor) -> list:
    """The LayerStates with zeros for the states of SSM and memory in the rows (b,) of bool."""
    rows = rows[:, None, None, None]
    return [
        layer._replace(
            ssm=layer.ssm.masked_fill(rows, 0.0),
            memory=None if layer.memory is None else layer.memory.masked_fill(rows, 0.0),
        )
        for layer in layers
    ]
