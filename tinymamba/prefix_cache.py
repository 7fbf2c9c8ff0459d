"""States after prefixes of prompts, so that a prefix that many prompts begin with is read once.

cache = PrefixCache(max_bytes=2**29)
cache.store("base", ids, state, state.nbytes)
found = cache.find("base", other_ids)  # found.value is the state after found.length ids

The ids are edges of a radix tree, as in SGLang's RadixAttention (Zheng et al., arXiv 2312.07104,
section 3). Attention keeps keys and values of every token, which a prefix of any length can use. A
recurrent state is the state after one length only, so values are stored at nodes of the tree.
"""

from __future__ import annotations

import collections
from typing import Any, NamedTuple

import numpy as np


class Found(NamedTuple):
    """The longest stored prefix of some ids."""

    length: int  # of that prefix; 0 if none is stored
    value: Any  # what is stored for it, or None
    common: int  # of these ids, how many the stored prefixes begin with, too


class Node:
    """A prefix: that of the parent, and then `ids`."""

    __slots__ = ("children", "ids", "nbytes", "parent", "value")

    def __init__(self, ids: np.ndarray):
        self.ids = ids
        self.parent: Any = None  # another Node; a root has none
        self.children: dict[int, Node] = {}  # by their first id
        self.value: Any = None
        self.nbytes = 0  # of the value

    def adopt(self, child: Node) -> None:
        """Make `child` a child of this node."""
        self.children[int(child.ids[0])], child.parent = child, self


def count_equal(a: np.ndarray, b: np.ndarray) -> int:
    """The number of equal ids at the beginning of two arrays."""
    size = min(len(a), len(b))
    different = (a[:size] != b[:size]).nonzero()[0]
    return int(different[0]) if len(different) else size


class PrefixCache:
    """A bounded number of bytes; the value that was not used for longest is dropped first.

    Prefixes of different `root` names have nothing in common. The ids count as bytes, too. Not
    thread-safe.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.nbytes = max_bytes, 0
        self.roots: dict[Any, Node] = {}
        self.used: collections.OrderedDict[Node, None] = collections.OrderedDict()  # newest last

    def __len__(self) -> int:
        """The number of stored values."""
        return len(self.used)

    def find(self, root: Any, ids: np.ndarray) -> Found:
        """The longest prefix of ids (l,) that has a value, which counts as used."""
        node, length, common = self.descend(root, ids)
        while node.value is None and node.parent is not None:
            length, node = length - len(node.ids), node.parent
        if node.value is not None:
            self.used.move_to_end(node)
        return Found(length, node.value, common)

    def store(self, root: Any, ids: np.ndarray, value: Any, nbytes: int) -> None:
        """Keep the value after ids (l,), l > 0, unless it has more than `max_bytes` itself."""
        if nbytes + ids.nbytes > self.max_bytes:
            return
        node, length, common = self.descend(root, ids)
        if common > length:
            node = self.split(node.children[int(ids[length])], common - length)
        if common < len(ids):
            parent, node = node, Node(ids[common:].copy())
            parent.adopt(node)
            self.nbytes += node.ids.nbytes
        self.nbytes += nbytes - node.nbytes
        node.value, node.nbytes = value, nbytes
        self.used[node] = None
        self.used.move_to_end(node)
        while self.nbytes > self.max_bytes:
            self.drop(next(iter(self.used)))

    def drop_early(self, root: Any, ids: np.ndarray) -> None:
        """Make the value after exactly these ids, if there is one, the next to be dropped."""
        node, length, _ = self.descend(root, ids)
        if length == len(ids) and node.value is not None:
            self.used.move_to_end(node, last=False)

    def descend(self, root: Any, ids: np.ndarray) -> tuple[Node, int, int]:
        """The last node on the path of ids, its length, and how many ids the tree knows."""
        node = self.roots.setdefault(root, Node(ids[:0]))
        length = 0
        while length < len(ids) and (child := node.children.get(int(ids[length]))):
            same = count_equal(child.ids, ids[length:])
            if same < len(child.ids):
                return node, length, length + same
            node, length = child, length + same
        return node, length, length

    def split(self, child: Node, count: int) -> Node:
        """A new node after the first `count` ids of `child`, between it and its parent."""
        middle = Node(child.ids[:count].copy())
        child.parent.adopt(middle)
        child.ids = child.ids[count:].copy()
        middle.adopt(child)
        return middle

    def drop(self, node: Node) -> None:
        """Forget a value, and the nodes that only led to it."""
        self.nbytes -= node.nbytes
        node.value, node.nbytes = None, 0
        del self.used[node]
        while node.value is None and not node.children and node.parent:
            self.nbytes -= node.ids.nbytes
            del node.parent.children[int(node.ids[0])]
            node = node.parent
        if node.value is None and len(node.children) == 1 and node.parent:
            [child] = node.children.values()
            child.ids = np.concatenate((node.ids, child.ids))
            node.parent.adopt(child)
