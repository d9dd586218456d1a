"""Lays out buffers in one block of device memory. Pure functions of sizes, without a device.

Buffers that are never needed in the same phase share their place (`layout`). Tensors that come and go take
their place from a `Pool`, and give it back.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes; what cudaMalloc guarantees, and TensorRT expects of scratch memory."""


PAGE = 2 << 20
"""Bytes; cudaMalloc takes as many, or a multiple of them."""


def aligned(nbytes: int, to: int = ALIGNMENT) -> int:
    """Returns the size rounded up to a multiple of `to` bytes."""
    return -(-nbytes // to) * to


@dataclass(frozen=True)
class Buffer:
    """Memory that is needed in some phases of the work."""

    name: str
    nbytes: int
    phases: frozenset[str]
    """Two buffers may share their place if they have no phase in common."""


@dataclass(frozen=True)
class Layout:
    """Positions of buffers."""

    offsets: Mapping[str, int]
    """Name -> first byte."""
    nbytes: int
    """Size of the whole."""
    overlaps: Mapping[str, frozenset[str]]
    """Name -> the buffers whose contents are lost when this one is written."""


def layout(buffers: Sequence[Buffer]) -> Layout:
    """Places buffers so that the whole is small.

    The largest comes first, and each takes the lowest place where no buffer lies that is needed in a phase
    of its own. That is not always the smallest whole, but it is never less than the largest phase needs,
    and never more than all buffers side by side.
    """
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.name)):
        offset = 0
        for start, other in sorted(placed, key=lambda p: (p[0], p[1].name)):
            if not buffer.phases & other.phases:
                continue
            if offset + aligned(buffer.nbytes) <= start:
                break
            offset = max(offset, start + aligned(other.nbytes))
        placed.append((offset, buffer))
    return Layout(
        offsets={buffer.name: offset for offset, buffer in placed},
        nbytes=max((offset + aligned(buffer.nbytes) for offset, buffer in placed), default=0),
        overlaps={
            buffer.name: frozenset(
                other.name
                for start, other in placed
                if other is not buffer
                and start < offset + aligned(buffer.nbytes)
                and offset < start + aligned(other.nbytes)
            )
            for offset, buffer in placed
        },
    )


class PoolExhaustedError(Exception):
    """No free piece is large enough."""

    def __init__(self, nbytes: int, free: int, largest: int) -> None:
        super().__init__(f"{nbytes} bytes wanted, {free} free, {largest} in one piece")
        self.nbytes = nbytes
        self.free = free
        self.largest = largest


class Pool:
    """Gives out pieces of a block, and takes them back in any order and from any thread."""

    def __init__(self, nbytes: int, large: int | None = None) -> None:
        """Starts with one free piece.

        Args:
            nbytes: its size.
            large: bytes from which on a piece is taken from the end of a free one, apart from the small ones;
                None for never.
        """
        self.nbytes = nbytes
        self._large = nbytes + 1 if large is None else large
        self._free = [(0, nbytes)] if nbytes else []
        self._taken: dict[int, int] = {}
        self._returned: deque[int] = deque()
        """Offsets of pieces that are not free yet."""
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """What is left, in however many pieces."""
        with self._lock:
            self._free_returned()
            return self._free_bytes()

    def take(self, nbytes: int) -> int:
        """Returns offset of a piece of at least `nbytes`: the smallest that is large enough.

        Raises:
            PoolExhaustedError: there is none.
        """
        size = max(aligned(nbytes), ALIGNMENT)
        with self._lock:
            self._free_returned()
            fitting = [(free, offset) for offset, free in self._free if free >= size]
            if not fitting:
                largest = max((free for _, free in self._free), default=0)
                raise PoolExhaustedError(size, self._free_bytes(), largest)
            free, offset = min(fitting)
            self._free.remove((offset, free))
            rest = free - size
            if rest and size >= self._large:
                insort(self._free, (offset, rest))
                offset += rest
            elif rest:
                insort(self._free, (offset + size, rest))
            self._taken[offset] = size
            return offset

    def give_back(self, offset: int) -> None:
        """Takes a piece back."""
        # Python collects tensors in any thread at any time, also while that thread changes the pool
        self._returned.append(offset)

    def _free_bytes(self) -> int:
        return sum(size for _, size in self._free)

    def _free_returned(self) -> None:
        """Joins the pieces that came back with their free neighbours."""
        while self._returned:
            offset = self._returned.popleft()
            size = self._taken.pop(offset)
            insort(self._free, (offset, size))
            index = self._free.index((offset, size))
            for left in (index, index - 1):
                if 0 <= left < len(self._free) - 1:
                    (a, a_size), (b, b_size) = self._free[left : left + 2]
                    if a + a_size == b:
                        self._free[left : left + 2] = [(a, a_size + b_size)]
