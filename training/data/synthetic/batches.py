"""Things side by side: trees of frozen dataclasses whose tensors count things along their last axis.

One thing is a batch of one. An axis of length 1 stands for any number of equal things, as PyTorch
broadcasts it, so that the numbers of a single object need not be copied for each of its rays.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

_Tree = TypeVar("_Tree")


@dataclass(frozen=True)
class Table:
    """Numbers that are looked up: each thing of a batch has its own places in common columns."""

    values: Tensor  # (C, T) float32
    first: Tensor  # (B,) int64, the column where the places of a thing begin

    def read(self, places: Tensor) -> Tensor:
        """Reads columns (C, N) at the places (N,), which count from the beginning of the thing's own."""
        return self.values.index_select(1, self.first + places)


def table(values: Tensor) -> Table:
    """Makes the table (C, T) of one thing."""
    return Table(values, torch.zeros(1, dtype=torch.int64))


def stack(things: Sequence[_Tree]) -> _Tree:
    """Puts batches of one structure one after the other."""
    return things[0] if len(things) == 1 else _mapped(_joined, *things)


def abreast(things: Sequence[_Tree]) -> _Tree:
    """Puts batches of one structure side by side: their tensors get an axis (..., K, B)."""
    return _mapped(lambda *leaves: torch.stack(leaves, -2), *things)


def take(things: _Tree, which: Tensor) -> _Tree:
    """Gives the things of these numbers (N,)."""

    def taken(leaf: Any) -> Any:
        if isinstance(leaf, Table):
            return replace(leaf, first=taken(leaf.first))
        return leaf if leaf.shape[-1] == 1 else leaf.index_select(-1, which)

    return _mapped(taken, things)


def moved(things: _Tree, device: torch.device) -> _Tree:
    """Gives the things in a device's memory."""

    def there(leaf: Any) -> Any:
        if isinstance(leaf, Table):
            return Table(leaf.values.to(device), leaf.first.to(device))
        return leaf.to(device)

    return _mapped(there, things)


def structure(tree: Any) -> Hashable:
    """Gives all of a tree but its numbers: what has to be equal in a batch."""
    if isinstance(tree, (Tensor, Table)):
        return tree.shape[:-1] if isinstance(tree, Tensor) else None
    if isinstance(tree, tuple):
        return tuple(map(structure, tree))
    names = getattr(tree, "__match_args__", ())  # the names of a dataclass's fields
    return (
        (type(tree), *(structure(getattr(tree, name)) for name in names)) if names else cast(Hashable, tree)
    )


def chosen(mask: Tensor) -> Tensor:
    """Finds the places (N,) of what a mask (M,) chooses."""
    if mask.device.type == "cpu":  # where PyTorch's own takes three times as long
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]


def _joined(*leaves: Any) -> Any:
    if isinstance(leaves[0], Tensor):
        return torch.cat(leaves, -1)
    ends = np.cumsum([leaf.values.shape[1] for leaf in leaves]).tolist()
    firsts = [leaf.first + start for leaf, start in zip(leaves, [0, *ends[:-1]], strict=True)]
    return Table(torch.cat([leaf.values for leaf in leaves], 1), torch.cat(firsts))


def _mapped(change: Callable[..., Any], first: _Tree, *others: _Tree) -> _Tree:
    """Makes a tree like the first of what `change` makes of the tensors and tables at each place."""
    tree: Any = first
    if isinstance(tree, (Tensor, Table)):
        return cast(_Tree, change(tree, *others))
    if isinstance(tree, tuple):
        parts = zip(tree, *cast(Any, others), strict=True)
        return cast(_Tree, tuple(_mapped(change, *each) for each in parts))
    names = getattr(tree, "__match_args__", ())  # the names of a dataclass's fields
    if not names:
        return first
    values = [_mapped(change, *[getattr(each, name) for each in (tree, *others)]) for name in names]
    return cast(_Tree, type(tree)(*values))
