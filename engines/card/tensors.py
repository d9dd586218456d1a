"""Tensors on the card: one arena for all of them, and pinned host memory on the way there and back.

The arena has a fixed part (`engines.memory_plan`) and a pool for the tensors that come and go. All work goes
into one stream, so a piece of the pool may be taken again as soon as nobody holds its tensor: whatever still
reads it comes first in the stream.
"""

from __future__ import annotations

import gc
import itertools
import math
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.arena import Pool, PoolExhaustedError
from engines.card.graph import Shape
from engines.cuda import Device, OutOfDeviceMemoryError
from engines.engine import Array, require_shape
from engines.errors import BackendError
from engines.memory_plan import DeviceMemoryPlan
from engines.spec import GraphSpec

STAGING_BYTES = 16 << 20
"""Pinned host memory that everything on its way to the card passes through, and as much for the way back."""

POLL_SECONDS = 0.0002
"""Between two looks whether a tensor has arrived."""


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A tensor in the arena. Its memory is free again when nobody holds it."""

    address: int
    shape: Shape
    dtype: np.dtype[Any]
    serial: int = field(default_factory=itertools.count().__next__)
    """Tells it from every other tensor, also from one that had the same memory before."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Staging:
    """Pinned host memory for arrays on their way to the card, used round and round."""

    def __init__(self, device: Device, nbytes: int = STAGING_BYTES) -> None:
        """Allocates it.

        Args:
            device: copies to and from it.
            nbytes: its size; larger arrays go through it in pieces.
        """
        self._device = device
        self._address, self._memory = device.allocate_pinned(nbytes)
        self._next = 0

    def upload(self, destination: int, array: Array) -> None:
        """Copies a contiguous host array to the device."""
        content = array.reshape(-1).view(np.uint8)
        for start in range(0, len(content), len(self._memory)):
            piece = content[start : start + len(self._memory)]
            offset = self._reserve(len(piece))
            self._memory[offset : offset + len(piece)] = piece
            self._device.copy(destination + start, self._address + offset, len(piece))

    def _reserve(self, nbytes: int) -> int:
        if self._next + nbytes > len(self._memory):
            # copies that still read from the front must be through
            self._device.synchronize()
            self._next = 0
        offset, self._next = self._next, self._next + nbytes
        return offset


class Downloads:
    """Pinned host memory for tensors on their way to the host, one after the other.

    Whoever waits for one lets others use the card meanwhile.
    """

    def __init__(
        self, device: Device, lock: AbstractContextManager[object], nbytes: int = STAGING_BYTES
    ) -> None:
        """Allocates it.

        Args:
            device: copies to it.
            lock: held around everything that is done with the device.
            nbytes: its size; larger tensors go through it in pieces.
        """
        self._device = device
        self._lock = lock
        self._turn = threading.Lock()
        self._arrived = device.new_event()
        self._address, self._memory = device.allocate_pinned(nbytes)

    def fetch(self, tensor: DeviceArray) -> Array:
        """Copies a tensor to a new host array; waits until it is there."""
        content = np.empty(tensor.nbytes, np.uint8)
        with self._turn:
            for start in range(0, len(content), len(self._memory)):
                piece = content[start : start + len(self._memory)]
                with self._lock:
                    self._device.copy(self._address, tensor.address + start, len(piece))
                    self._device.record(self._arrived)
                while not self._has_arrived():
                    time.sleep(POLL_SECONDS)
                piece[:] = self._memory[: len(piece)]
        return content.view(tensor.dtype).reshape(tensor.shape)

    def _has_arrived(self) -> bool:
        # asking would spoil a capture in another thread
        with self._lock:
            return self._device.reached(self._arrived)


class TensorStore:
    """The arena of an engine. Nothing else is allocated for tensors."""

    def __init__(self, device: Device, plan: DeviceMemoryPlan) -> None:
        """Allocates the arena and the staging memory.

        Args:
            device: where the arena is.
            plan: sizes, and what lies where in the fixed part.
        """
        self._device = device
        self._offsets = plan.fixed.offsets
        self._arena = device.allocate(plan.arena)
        self._pool_start = self._arena + plan.fixed.nbytes
        self._pool = Pool(plan.arena - plan.fixed.nbytes)
        self._staging = Staging(device)

    @property
    def pool_bytes(self) -> int:
        """Memory for tensors that come and go."""
        return self._pool.nbytes

    @property
    def free_bytes(self) -> int:
        """What of it is free, in however many pieces."""
        return self._pool.free_bytes

    def address(self, buffer: str) -> int:
        """Returns where a buffer of the fixed part lies, by its name in the memory plan."""
        return self._arena + self._offsets[buffer]

    def new(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        """Returns a tensor whose values are not set.

        Raises:
            OutOfDeviceMemoryError: the pool has no room for it.
        """
        try:
            offset = self._take(math.prod(shape) * dtype.itemsize)
        except PoolExhaustedError as error:
            raise OutOfDeviceMemoryError(
                f"no room for a tensor of {error.nbytes / 1e6:.1f} MB: {error.free / 1e6:.1f} of "
                f"{self.pool_bytes / 1e6:.1f} MB for tensors are free, {error.largest / 1e6:.1f} MB in one "
                "piece; ask for fewer pictures at once, or give a larger --memory-budget"
            ) from error
        tensor = DeviceArray(self._pool_start + offset, tuple(shape), dtype)
        weakref.finalize(tensor, self._pool.give_back, offset).atexit = False
        return tensor

    def _take(self, nbytes: int) -> int:
        try:
            return self._pool.take(nbytes)
        except PoolExhaustedError:
            # tensors that objects in a cycle hold, like an exception and its frames, are still taken
            gc.collect()
            return self._pool.take(nbytes)

    def new_outputs(self, spec: GraphSpec, shapes: Mapping[str, Shape]) -> dict[str, DeviceArray]:
        """Returns a tensor for every output of a graph.

        Args:
            spec: its signature.
            shapes: output -> its shape.
        """
        return {of.name: self.new(shapes[of.name], np.dtype(of.dtype)) for of in spec.outputs}

    def upload(self, destination: int, array: Array) -> None:
        """Copies a contiguous host array to an address on the device."""
        self._staging.upload(destination, array)

    def to_device(self, array: Array) -> DeviceArray:
        """Copies a host array to a new tensor."""
        tensor = self.new(array.shape, array.dtype)
        self.upload(tensor.address, np.ascontiguousarray(array))
        return tensor

    def concatenate(self, pieces: Sequence[tuple[DeviceArray, int, int]]) -> DeviceArray:
        """Returns rows of tensors as a new one, see `engines.engine.Engine`; nothing leaves the device."""
        first = pieces[0][0]
        rows = sum(stop - start for _, start, stop in pieces)
        joined = self.new((rows, *first.shape[1:]), first.dtype)
        row_bytes = math.prod(first.shape[1:]) * first.dtype.itemsize
        destination = joined.address
        for tensor, start, stop in pieces:
            nbytes = (stop - start) * row_bytes
            self._device.copy(destination, tensor.address + start * row_bytes, nbytes)
            destination += nbytes
        return joined


def as_specified(
    spec: GraphSpec, inputs: Mapping[str, DeviceArray | Array]
) -> dict[str, DeviceArray | Array]:
    """Returns the inputs of a graph in their order; host arrays contiguous, and of the dtype that it
    takes."""
    return {
        tensor.name: value
        if isinstance(value := inputs[tensor.name], DeviceArray)
        else require_shape(tensor.name, value, tensor.dtype)
        for tensor in spec.inputs
    }


def output_shapes(
    spec: GraphSpec, inputs: Mapping[str, DeviceArray | Array], largest: Mapping[str, int]
) -> dict[str, Shape]:
    """Returns output -> its shape in a call.

    Args:
        spec: signature of the graph.
        inputs: of the call.
        largest: variable dimension -> its size in the largest call.

    Raises:
        BackendError: an input has a shape that the graph cannot take, or is larger than its place.
    """
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        shape = inputs[tensor.name].shape
        if len(shape) == len(tensor.shape):
            for dimension, size in zip(tensor.shape, shape):
                if isinstance(dimension, str):
                    sizes.setdefault(dimension, size)
        if len(shape) != len(tensor.shape) or shape != tensor.resolve(sizes):
            raise BackendError(
                f"the input '{tensor.name}' of the graph '{spec.name}' has shape {shape} instead of "
                f"{tensor.shape}"
            )
    for dimension, size in sizes.items():
        if size > largest[dimension]:
            raise BackendError(
                f"the graph '{spec.name}' takes up to {largest[dimension]} {dimension} in a call, not {size}"
            )
    return {tensor.name: tensor.resolve(sizes) for tensor in spec.outputs}
