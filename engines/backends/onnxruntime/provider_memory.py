"""Device memory that ONNX Runtime's CUDA provider asks us for, and does not take itself.

The provider can be told two C functions that take and free device memory: its options `gpu_external_alloc`
and `gpu_external_free` (source: onnxruntime/core/providers/cuda/cuda_allocator.cc). Ours give out pieces of
a few blocks. Left to itself, it allocates every weight alone, in pages of 2 MB, and lets its scratch memory
grow by a gigabyte at a time.

There are two heaps. Weights are what it asks for while a session is made, and stay until that session is
gone. Everything else is scratch memory, which a session gives back before its run ends. A captured graph uses
its scratch memory again at every replay, so no weights may ever lie there.
"""

from __future__ import annotations

import atexit
import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from engines.arena import PAGE, Pool, PoolExhaustedError, aligned
from engines.cuda import OutOfDeviceMemoryError
from engines.errors import BackendError

LEAST_BLOCK = 32 << 20
"""Bytes of a block that is allocated because no other has room, at least."""

LARGE = 8 << 20
"""Bytes of a piece that lies apart from smaller ones. At full size four samples then fit into 464 MB, where
434 MB are in use at the same time, and not into less than 516 MB otherwise (docs/studies/h100.md)."""

_TAKE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
_GIVE_BACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class BlockSource(Protocol):
    """What allocates device memory; see `engines.cuda.Device`."""

    def allocate(self, nbytes: int) -> int:
        """Returns the address of new memory."""
        ...

    def free(self, address: int) -> None:
        """Frees what `allocate` returned."""
        ...


class Heap:
    """Gives out pieces of blocks of device memory, and takes them back in any thread at any time."""

    def __init__(self, source: BlockSource, room: Callable[[], int], keep: bool) -> None:
        """Has no block yet.

        Args:
            source: allocates blocks.
            room: returns how many bytes all blocks may have.
            keep: whether a block stays when nothing lies in it any more.
        """
        self.most_used = 0
        """Most bytes that were given out at the same time."""
        self._source = source
        self._room = room
        self._keep = keep
        self._used = 0
        self._blocks: dict[int, Pool] = {}
        """Address of a block -> what is free in it."""
        self._taken: dict[int, tuple[int, int]] = {}
        """Address of a piece -> the address of its block, and its bytes."""
        self._returned: deque[int] = deque()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(pool.nbytes for pool in list(self._blocks.values()))

    @property
    def largest_block(self) -> int:
        """Bytes of the largest block; 0 if there is none."""
        return max((pool.nbytes for pool in list(self._blocks.values())), default=0)

    def add_block(self, nbytes: int) -> None:
        """Allocates a block.

        Raises:
            OutOfDeviceMemoryError: there is no room for it.
        """
        with self._lock:
            self._add_block(nbytes)
        self._free_returned()

    def drop_unused(self) -> None:
        """Frees the blocks in which nothing lies."""
        with self._lock:
            for start in list(self._blocks):
                self._drop_if_unused(start)
        self._free_returned()

    def take(self, nbytes: int) -> int:
        """Returns the address of a piece.

        Raises:
            OutOfDeviceMemoryError: no block has room, and there is no room for another.
        """
        self._free_returned()
        with self._lock:
            address = self._find(nbytes)
            if address is None:
                self._add_block(max(nbytes, LEAST_BLOCK))
                address = self._find(nbytes)
            assert address is not None
            self._used += self._taken[address][1]
            self.most_used = max(self.most_used, self._used)
        # what came back meanwhile
        self._free_returned()
        return address

    def owns(self, address: int) -> bool:
        """Returns whether an address is that of a piece of this heap."""
        return address in self._taken

    def give_back(self, address: int) -> None:
        """Takes a piece back."""
        # Python collects sessions in any thread at any time, also while that thread changes the heap
        self._returned.append(address)
        self._free_returned()

    def _free_returned(self) -> None:
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._free(self._returned.popleft())
            finally:
                self._lock.release()

    def _free(self, address: int) -> None:
        start, size = self._taken.pop(address)
        self._used -= size
        self._blocks[start].give_back(address - start)
        if not self._keep:
            self._drop_if_unused(start)

    def _drop_if_unused(self, start: int) -> None:
        pool = self._blocks[start]
        if pool.free_bytes == pool.nbytes:
            del self._blocks[start]
            self._source.free(start)

    def _find(self, nbytes: int) -> int | None:
        # the newest first: so the weights of a graph lie together, and their block goes with them
        for start, pool in reversed(self._blocks.items()):
            try:
                address = start + pool.take(nbytes)
            except PoolExhaustedError:
                continue
            self._taken[address] = (start, aligned(max(nbytes, 1)))
            return address
        return None

    def _add_block(self, nbytes: int) -> None:
        size = aligned(nbytes, PAGE)
        room = self._room() - self.nbytes
        if size > room:
            raise OutOfDeviceMemoryError(
                f"{size / 1e6:.0f} MB are needed, {max(room, 0) / 1e6:.0f} MB are left of the memory budget"
            )
        try:
            address = self._source.allocate(size)
        except OutOfDeviceMemoryError as error:
            raise OutOfDeviceMemoryError(f"{size / 1e6:.0f} MB are needed, fewer are free") from error
        self._blocks[address] = Pool(size, LARGE)


class ProviderMemory:
    """All device memory that the provider has in this process."""

    def __init__(self, source: BlockSource) -> None:
        """Has none yet.

        Args:
            source: allocates it.
        """
        self.limit = 0
        """Most bytes of both heaps."""
        self.weights = Heap(source, lambda: self.limit - self.scratch.nbytes, keep=False)
        self.scratch = Heap(source, lambda: self.limit - self.weights.nbytes, keep=True)
        self._loading = False
        self._ended = False
        self._refusal: BackendError | None = None
        self._functions = _TAKE(self._take), _GIVE_BACK(self._give_back)
        _IN_USE.add(self)

    def options(self) -> dict[str, str]:
        """Returns the provider's options that make it ask here."""
        take, give_back = (ctypes.cast(function, ctypes.c_void_p).value for function in self._functions)
        return {"gpu_external_alloc": str(take), "gpu_external_free": str(give_back)}

    @contextmanager
    def loading(self, nbytes: int) -> Iterator[None]:
        """What is taken inside are weights.

        Args:
            nbytes: how many, at most. There may be more, which then do not lie together.

        Raises:
            OutOfDeviceMemoryError: there is no room for them.
        """
        self.weights.add_block(nbytes)
        self._loading = True
        try:
            yield
        finally:
            self._loading = False
            # where nothing was loaded
            self.weights.drop_unused()

    def reserve_scratch(self, nbytes: int) -> None:
        """Allocates a block of scratch memory of that size, unless there is one.

        Raises:
            OutOfDeviceMemoryError: there is no room for it.
        """
        if self.scratch.largest_block < nbytes:
            self.scratch.add_block(nbytes)

    def refusal(self) -> BackendError | None:
        """Returns why the provider got no memory since the last time that this was asked, if it got none."""
        refusal, self._refusal = self._refusal, None
        return refusal

    def _take(self, nbytes: int) -> int | None:
        heap = self.weights if self._loading else self.scratch
        try:
            return heap.take(nbytes)
        except BackendError as error:
            # an exception cannot pass through the library
            self._refusal = error
            return None

    def _give_back(self, address: int | None) -> None:
        if self._ended or address is None:
            return
        for heap in (self.weights, self.scratch):
            if heap.owns(address):
                heap.give_back(address)

    def end(self) -> None:
        """Prepares for the end of the process: what comes back from now on is left to the driver."""
        # while Python shuts down, modules lose their names, but the provider still calls our functions
        self._ended = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))


_IN_USE = weakref.WeakSet[ProviderMemory]()


@atexit.register
def _end_all() -> None:
    for memory in list(_IN_USE):
        memory.end()
