"""A card made of host memory, for tests on machines without one.

It keeps the promises that `engines.cuda.Device` makes and no more: what is put into the stream happens when
the stream is waited for, in order, and reads memory as it is at that moment. New memory, and the scratch
memory of every call, is filled with not-a-numbers, so that what is read from the wrong place shows. Graphs
are those of an ONNX bundle, computed by ONNX Runtime.

Not simulated: anything of CUDA or TensorRT itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.onnxruntime.engine import OnnxRuntimeEngine
from engines.bundle import Bundle
from engines.cuda import Card, OutOfDeviceMemoryError
from engines.spec import TensorSpec

Operation = Callable[[], None]
Shape = tuple[int, ...]

GARBAGE = 0xFF
"""As a float32 or float16 it is not a number, as an int32 it is -1."""


class SimulatedDevice:
    """See `engines.cuda.Device`."""

    stream = 1

    def __init__(self, memory: int = 1 << 40) -> None:
        self.memory = memory
        self.allocations = 0
        self.captures = 0
        self.launches = 0
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._pending: list[Operation] = []
        self._recording: list[Operation] | None = None

    def card(self) -> Card:
        return Card("simulated", "sm89", self.memory, self.memory, "13.0")

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.memory:
            raise OutOfDeviceMemoryError(f"{nbytes} bytes")
        self.allocations += 1
        block = np.full(nbytes, GARBAGE, np.uint8)
        self._blocks[block.ctypes.data] = block
        return block.ctypes.data

    def free(self, address: int) -> None:
        del self._blocks[address]

    def allocate_pinned(self, nbytes: int) -> tuple[int, NDArray[np.uint8]]:
        address = self.allocate(nbytes)
        return address, self._blocks[address]

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        for address in (destination, source):
            self.check(address, nbytes)
        self.submit(lambda: ctypes.memmove(destination, source, nbytes))

    def synchronize(self) -> None:
        assert self._recording is None, "a captured stream cannot be waited for"
        pending, self._pending = self._pending, []
        for operation in pending:
            operation()

    def capture(self, work: Operation) -> list[Operation]:
        self._recording = recorded = []
        try:
            work()
        finally:
            self._recording = None
        self.captures += 1
        return recorded

    def launch(self, captured: Sequence[Operation]) -> None:
        self.launches += 1
        for operation in captured:
            self.submit(operation)

    def forget(self, captured: list[Operation]) -> None:
        captured.clear()

    def submit(self, operation: Operation) -> None:
        (self._pending if self._recording is None else self._recording).append(operation)

    def check(self, address: int, nbytes: int) -> None:
        """Fails for memory that was not allocated."""
        assert any(
            start <= address and address + nbytes <= start + len(b) for start, b in self._blocks.items()
        )

    def view(self, address: int, shape: Shape, dtype: str) -> NDArray[Any]:
        """Memory as an array."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.check(address, nbytes)
        content = (ctypes.c_uint8 * nbytes).from_address(address)
        return np.frombuffer(content, dtype).reshape(shape)


class SimulatedPlans:
    """Opens plans of an ONNX bundle; see `engines.backends.tensorrt.library.Library.open_plan`."""

    def __init__(self, bundle: Bundle, device: SimulatedDevice, scratch: Mapping[str, int]) -> None:
        self.opened: list[str] = []
        self.contexts = 0
        self._bundle = bundle
        self._engine = OnnxRuntimeEngine(bundle, "cpu")
        self._device = device
        self._scratch = scratch

    def open_plan(self, graph: str) -> SimulatedPlan:
        self.opened.append(graph)
        return SimulatedPlan(self, graph, self._scratch[graph])

    def run(
        self, graph: str, inputs: Mapping[str, Shape], addresses: Mapping[str, int], scratch: int, size: int
    ) -> None:
        """Computes a graph from memory to memory."""
        self._device.view(scratch, (size,), "uint8")[:] = GARBAGE
        spec = self._bundle.manifest.specs[graph]
        shapes = {t.name: inputs[t.name] for t in spec.inputs}
        arrays = {t.name: self._read(t, shapes[t.name], addresses[t.name]) for t in spec.inputs}
        for name, value in self._engine.run(graph, arrays).items():
            array = self._engine.to_host(value)
            self._device.view(addresses[name], array.shape, str(array.dtype))[...] = array

    def _read(self, tensor: TensorSpec, shape: Shape, address: int) -> NDArray[Any]:
        return self._device.view(address, shape, tensor.dtype).copy()

    @property
    def device(self) -> SimulatedDevice:
        return self._device


class SimulatedPlan:
    """See `engines.backends.tensorrt.library.Plan`."""

    def __init__(self, plans: SimulatedPlans, graph: str, scratch: int) -> None:
        self.scratch = scratch
        self._plans = plans
        self._graph = graph

    def new_context(self) -> SimulatedContext:
        self._plans.contexts += 1
        return SimulatedContext(self._plans, self._graph)

    def keep_compiled_kernels(self) -> None:
        pass


class SimulatedContext:
    """See `engines.backends.tensorrt.library.Context`."""

    def __init__(self, plans: SimulatedPlans, graph: str) -> None:
        self._plans = plans
        self._graph = graph

    def prepare(
        self, inputs: Mapping[str, Shape], addresses: Mapping[str, int], scratch: int, scratch_size: int
    ) -> None:
        self._call = (self._graph, dict(inputs), dict(addresses), scratch, scratch_size)

    def capturable(self, stream: int) -> bool:
        return True

    def enqueue(self, stream: int) -> None:
        call = self._call
        self._plans.device.submit(lambda: self._plans.run(*call))
