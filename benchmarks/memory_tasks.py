"""The texts of memory.py: ids and targets (b, l), where IGNORE is no target.

mqar         multi-query associative recall (Zoology, arXiv 2312.04927, appendix E.1): pairs of a
             key and a value, then the keys again far apart, among zeros; the answer to each key is
             its value.
induction    a marker somewhere, a token after it, the marker again at the very end; the answer is
             the token (Mamba, arXiv 2312.00752, section 4.1.2).
counting     elements of a group; the answer to each is the product so far. parity and mod5 are sums
             (as in Mamba-3, arXiv 2603.15569, section 4.3). s5 is the word problem of arXiv
             2404.08819: each token is any of the 120 permutations of five things. s5_swaps has only
             the ten that swap two things and the one that changes nothing, the easier form of
             arXiv 2411.12537, which one step of a delta rule can make.
far copy     a passage of a text that is repeated some hundreds of tokens later.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
PASSAGE, HINT = 64, 4  # tokens that are repeated; the first of them that do not count
GAP = (200, 800)  # tokens from a passage to its repetition


# ------------------------------------------------------------------------------------ recall


def mqar(
    batch: int, length: int, pairs: int, vocab: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids and targets (b, l): the second half of the vocabulary are values."""
    half, space = vocab // 2, (length - 2 * pairs) // 2
    keys = 1 + torch.rand(batch, half - 1, generator=random).argsort(1)[:, :pairs]
    values = half + torch.rand(batch, half, generator=random).argsort(1)[:, :pairs]
    ids = torch.zeros(batch, length + 1, dtype=torch.int64)
    ids[:, : 2 * pairs] = torch.stack((keys, values), dim=2).flatten(1)
    gaps = torch.arange(1, space + 1) ** (0.01 - 1.0)  # most keys come again soon, some late
    at = 2 * pairs + 2 * torch.multinomial(gaps.expand(batch, -1), pairs, generator=random)
    ids.scatter_(1, at, keys)
    targets = torch.full_like(ids, IGNORE).scatter_(1, at, values)
    return ids[:, :length], targets[:, :length]


def distances_to_answers(ids: Tensor, targets: Tensor) -> Tensor:
    """How many tokens back the value of each key that is asked for stands: (n,)."""
    first = (ids[:, :, None] == ids[:, None, :]).float().argmax(2)  # (b, l) of each id
    back = torch.arange(ids.shape[1]) - first - 1
    return back[targets != IGNORE]


def reach(n_layer: int, window_size: int, d_conv: int) -> int:
    """How many tokens back a model of that many blocks reads without the state of its SSM, at most.

    In a block a window of attention follows two convolutions: of the input, then of the keys.
    """
    return n_layer * (window_size - 1 + 2 * (d_conv - 1))


def induction(
    batch: int, length: int, vocab: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids and targets (b, l): the marker is id 0, the only target is at the end."""
    ids = torch.randint(1, vocab, (batch, length), generator=random)
    at = torch.randint(length - 2, (batch, 1), generator=random)
    ids.scatter_(1, at, 0)
    ids[:, -1] = 0
    targets = torch.full_like(ids, IGNORE)
    targets[:, -1:] = ids.gather(1, at + 1)
    return ids, targets


# ------------------------------------------------------------------------------------ counting


class Group(NamedTuple):
    """A finite group whose elements are numbers, and the elements that texts consist of."""

    product: Tensor  # (n, n): of the row's element and then the column's
    drawn: Tensor  # (k,)


def cyclic(order: int) -> Group:
    """Numbers that are added."""
    numbers = torch.arange(order)
    return Group((numbers[:, None] + numbers) % order, numbers)


def permutations(most_moved: int) -> Group:
    """Permutations of five things; those are drawn that move at most so many."""
    each = list(itertools.permutations(range(5)))
    number = {p: i for i, p in enumerate(each)}
    product = [[number[tuple(q[i] for i in p)] for q in each] for p in each]
    moved = [sum(i != j for i, j in enumerate(p)) for p in each]
    drawn = [i for i, count in enumerate(moved) if count <= most_moved]
    return Group(torch.tensor(product), torch.tensor(drawn))


GROUPS = {
    "parity": cyclic(2),
    "mod5": cyclic(5),
    "s5": permutations(5),
    "s5_swaps": permutations(2),
}


def running_product(elements: Tensor, group: Group) -> Tensor:
    """The product of each element of (b, l) and of all before it."""
    done, span = elements.clone(), 1
    while span < elements.shape[1]:  # done[i] is the product of up to `span` elements that end at i
        done[:, span:] = group.product[done[:, :-span], done[:, span:]]
        span *= 2
    return done


def counting(
    batch: int, length: int, group: Group, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids and targets (b, 1+l): an id that is no element, then elements."""
    index = torch.randint(len(group.drawn), (batch, length), generator=random)
    elements = group.drawn[index]
    ids = F.pad(elements, (1, 0), value=len(group.product))
    return ids, F.pad(running_product(elements, group), (1, 0), value=IGNORE)


# ------------------------------------------------------------------------------------ far copy


def repeat_passage(window: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The window (b, l) with a passage repeated in each row; True (b, l) at tokens that count."""
    batch, length = window.shape
    gap = torch.randint(GAP[0], GAP[1] + 1, (batch, 1), generator=random)
    room = length - PASSAGE - gap + 1  # places where the passage can begin
    begin = (torch.rand(batch, 1, generator=random) * room).long()
    passage = begin + torch.arange(PASSAGE)  # (b, PASSAGE)
    new = window.scatter(1, passage + gap, window.gather(1, passage))
    counts = torch.zeros_like(window, dtype=torch.bool)
    return new, counts.scatter(1, (passage + gap)[:, HINT:], True)
