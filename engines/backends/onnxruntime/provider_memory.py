"""Device memory that ONNX Runtime's CUDA provider asks us for, and does not take itself.

The provider can be told two C functions that take and free device memory (its options `gpu_external_alloc`
and `gpu_external_free`; source: onnxruntime/core/providers/cuda/cuda_allocator.cc). Ours give out pieces of few
large blocks. Left to itself, it allocates every weight alone, in pages of 2 MB, and its own arena grows by a
gigabyte at a time.

There are two heaps. Weights are what it asks for while a session is made, and stay until that session is gone.
Everything else is scratch memory, which a session gives back before its run ends. A captured graph uses its
scratch memory again at every replay, so no weights may ever lie there.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from engines.arena import Pool, PoolExhaustedError, aligned
from engines.cuda import OutOfDeviceMemoryError
from engines.errors import BackendError

LEAST_BLOCK = 32 << 20
"""Bytes of a block that is allocated because no other has room."""

_PAGE = 2 << 20
"""Bytes; cudaMalloc takes as many or a multiple of them."""

_ALLOCATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)
_FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Blocks(Protocol):
    """What allocates device memory; see `engines.cuda.Device`."""

    def allocate(self, nbytes: int) -> int:
        """Returns the address of new memory."""
        ...

    def free(self, address: int) -> None:
        """Frees what `allocate` returned."""
        ...


class Heap:
    """Gives out pieces of blocks of device memory, and takes them back from any thread at any time."""

    def __init__(self, device: Blocks, keep: bool, room: Callable[[], int]) -> None:
        """Has no block yet.

        Args:
            device: allocates blocks.
            keep: whether a block stays although nothing lies in it any more.
            room: returns how many bytes another block may have.
        """
        self._device = device
        self._keep = keep
        self._room = room
        self._blocks: dict[int, Pool] = {}
        """Address of a block -> what is free in it."""
        self._taken: dict[int, tuple[int, int]] = {}
        """Address of a piece -> the address of its block, and its bytes."""
        self._returned: deque[int] = deque()
        self._lock = threading.Lock()
        self.used = 0
        """Bytes of the pieces that are given out."""
        self.most_used = 0
        """Most that `used` ever was."""

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        with self._lock:
            return self._nbytes()

    def reserve(self, nbytes: int) -> None:
        """Allocates a block, if there are fewer free bytes than that.

        Raises:
            OutOfDeviceMemoryError: there is no room for it.
        """
        self._settle()
        with self._lock:
            missing = nbytes - (self._nbytes() - self.used)
            if missing > 0:
                self._add_block(missing)
        self._settle()

    def take(self, nbytes: int) -> int:
        """Returns the address of a piece.

        Raises:
            OutOfDeviceMemoryError: no block has room, nor is there room for another.
        """
        self._settle()
        with self._lock:
            address = self._take(nbytes)
            self.used += self._taken[address][1]
            self.most_used = max(self.most_used, self.used)
        self._settle()
        return address

    def owns(self, address: int) -> bool:
        """Returns whether an address is that of a piece given out here."""
        return address in self._taken

    def give_back(self, address: int) -> None:
        """Takes a piece back. Python may collect a session in any thread, also while this heap is changed."""
        self._returned.append(address)
        self._settle()

    def _settle(self) -> None:
        # whoever has the lock does this for those who cannot wait for it
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._free(self._returned.popleft())
            finally:
                self._lock.release()

    def _free(self, address: int) -> None:
        start, size = self._taken.pop(address)
        self.used -= size
        pool = self._blocks[start]
        pool.give_back(address - start)
        if not self._keep and pool.free_bytes == pool.nbytes:
            del self._blocks[start]
            self._device.free(start)

    def _take(self, nbytes: int) -> int:
        for start, pool in self._blocks.items():
            try:
                address = start + pool.take(nbytes)
            except PoolExhaustedError:
                continue
            self._taken[address] = (start, aligned(max(nbytes, 1)))
            return address
        self._add_block(max(nbytes, LEAST_BLOCK))
        return self._take(nbytes)

    def _add_block(self, nbytes: int) -> None:
        size = -(-nbytes // _PAGE) * _PAGE
        room = self._room() - self._nbytes()
        if size > room:
            raise OutOfDeviceMemoryError(f"{size / 1e6:.0f} MB are needed and {room / 1e6:.0f} MB are left")
        self._blocks[self._device.allocate(size)] = Pool(size)

    def _nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._blocks.values())


class ProviderMemory:
    """All device memory of the provider in this process."""

    def __init__(self, device: Blocks) -> None:
        """Has none yet.

        Args:
            device: allocates it.
        """
        self.limit = 0
        """Most bytes of both heaps."""
        self.weights = Heap(device, keep=False, room=lambda: self.limit - self.scratch.nbytes)
        self.scratch = Heap(device, keep=True, room=lambda: self.limit - self.weights.nbytes)
        self.refusal: BackendError | None = None
        """Why there was no memory, the last time that there was none."""
        self._loading = False
        # the provider has their addresses, so they must stay
        self._functions = _ALLOCATE(self._take), _FREE(self._give_back)

    def options(self) -> dict[str, str]:
        """Returns the provider's options that make it ask here."""
        addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in self._functions]
        return {"gpu_external_alloc": str(addresses[0]), "gpu_external_free": str(addresses[1])}

    @contextmanager
    def loading(self, nbytes: int) -> Iterator[None]:
        """What is taken inside are weights.

        Args:
            nbytes: about as many.

        Raises:
            OutOfDeviceMemoryError: there is no room for them.
        """
        self.weights.reserve(nbytes)
        self._loading = True
        try:
            yield
        finally:
            self._loading = False

    def _take(self, nbytes: int) -> int | None:
        heap = self.weights if self._loading else self.scratch
        try:
            return heap.take(nbytes)
        except BackendError as error:
            # nothing may be raised through the library
            self.refusal = error
            return None

    def _give_back(self, address: int | None) -> None:
        for heap in (self.weights, self.scratch):
            if address is not None and heap.owns(address):
                heap.give_back(address)
