"""A card made of host memory, for tests on machines without one.

It keeps the promises that `engines.cuda.Device` makes and no more: what is put into the stream happens when
the stream is waited for, in order, and reads memory as it is at that moment. New memory, and the scratch
memory of every call, is filled with not-a-numbers, so that what is read from the wrong place shows. Graphs
are those of an ONNX bundle, computed by ONNX Runtime. Contexts take the names of the graph's file, and no
others.

Not simulated: anything else of CUDA or TensorRT.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.onnxruntime.engine import OnnxRuntimeEngine
from engines.backends.tensorrt.library import VARIANTS
from engines.backends.tensorrt.plans import Plan
from engines.bundle import Bundle
from engines.cuda import Card, OutOfDeviceMemoryError
from engines.spec import GraphSpec

Operation = Callable[[], None]
Shape = tuple[int, ...]

GARBAGE = 0xFF
"""As a float32 or float16 it is not a number, as an int32 it is -1."""


class SimulatedDevice:
    """See `engines.cuda.Device`."""

    stream = 1

    def __init__(self, memory: int = 1 << 40, architecture: str = "sm89") -> None:
        self.memory = memory
        self.architecture = architecture
        self.allocations = 0
        self.captures = 0
        self.launches = 0
        self.kept_graphs = 0
        """That were captured and not freed."""
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._pending: list[Operation] = []
        self._recording: list[Operation] | None = None

    def card(self) -> Card:
        return Card("simulated", self.architecture, self.memory, self.memory, "13.0")

    def allocate(self, nbytes: int) -> int:
        if nbytes > self.memory:
            raise OutOfDeviceMemoryError(f"{nbytes} bytes")
        self.allocations += 1
        block = np.full(nbytes, GARBAGE, np.uint8)
        self._blocks[block.ctypes.data] = block
        return block.ctypes.data

    def allocate_pinned(self, nbytes: int) -> tuple[int, NDArray[np.uint8]]:
        address = self.allocate(nbytes)
        return address, self._blocks[address]

    @property
    def allocated(self) -> int:
        """Bytes, pinned ones among them."""
        return sum(block.nbytes for block in self._blocks.values())

    def free(self, address: int) -> None:
        del self._blocks[address]

    def free_all(self) -> None:
        self._blocks.clear()

    def copy(self, destination: int, source: int, nbytes: int) -> None:
        for address in (destination, source):
            self.check(address, nbytes)
        self.submit(lambda: ctypes.memmove(destination, source, nbytes))

    def synchronize(self) -> None:
        assert self._recording is None, "a captured stream cannot be waited for"
        pending, self._pending = self._pending, []
        for operation in pending:
            operation()

    def new_event(self) -> list[bool]:
        return []

    def record(self, event: list[bool]) -> None:
        assert self._recording is None
        event.clear()
        self.submit(lambda: event.append(True))

    def reached(self, event: list[bool]) -> bool:
        """Time passes only for who asks: everything in the stream gets done, and the next answer is yes."""
        if not event:
            self.synchronize()
            return False
        return True

    def capture(self, work: Operation) -> list[Operation]:
        self._recording = recorded = []
        try:
            work()
        finally:
            self._recording = None
        self.captures += 1
        self.kept_graphs += 1
        return recorded

    def launch(self, captured: Sequence[Operation]) -> None:
        self.launches += 1

        def replay() -> None:
            for operation in captured:
                operation()

        self.submit(replay)

    def free_captured(self, captured: list[Operation]) -> None:
        """What is in the stream of it is lost."""
        self.kept_graphs -= 1
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
    """Opens plans of an ONNX bundle; see `engines.backends.tensorrt.plans.open_plan`.

    The plans and contexts are the real ones, on a library that is simulated.
    """

    backend = "tensorrt"
    variant = VARIANTS[backend]
    version = "simulated"
    module = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="ours"))

    def __init__(self, bundle: Bundle, device: SimulatedDevice, scratch: Mapping[str, int]) -> None:
        self.opened: list[str] = []
        self.contexts = 0
        self.device = device
        self._bundle = bundle
        self._engine = OnnxRuntimeEngine(bundle)
        self._scratch = scratch

    def open_plan(self, graph: str) -> Plan:
        self.opened.append(graph)
        engine = SimulatedCudaEngine(self, graph, self._scratch[graph])
        return Plan(self, engine, self._bundle.manifest.graphs[graph])  # type: ignore[arg-type]

    def reason(self) -> str:
        return "it is only simulated"

    def spec(self, graph: str) -> GraphSpec:
        return self._bundle.manifest.specs[graph]

    def run(
        self, graph: str, shapes: Mapping[str, Shape], addresses: Mapping[str, int], scratch: int, size: int
    ) -> None:
        """Computes a graph from memory to memory; names are those of its file."""
        self.device.view(scratch, (size,), "uint8")[:] = GARBAGE
        spec = self.spec(graph)
        arrays = {
            of.name: self.device.view(addresses[of.stored_name], shapes[of.stored_name], of.dtype).copy()
            for of in spec.inputs
        }
        for name, value in self._engine.run(graph, arrays).items():
            array = self._engine.to_host(value)
            address = addresses[spec.tensor(name).stored_name]
            self.device.view(address, array.shape, str(array.dtype))[...] = array


class SimulatedCudaEngine:
    """TensorRT's ICudaEngine."""

    def __init__(self, plans: SimulatedPlans, graph: str, scratch: int) -> None:
        self.device_memory_size_v2 = scratch
        self._plans = plans
        self._graph = graph

    def create_execution_context(self, strategy: str) -> SimulatedExecutionContext:
        assert strategy == "ours"
        self._plans.contexts += 1
        return SimulatedExecutionContext(self._plans, self._graph)


class SimulatedExecutionContext:
    """TensorRT's IExecutionContext."""

    def __init__(self, plans: SimulatedPlans, graph: str) -> None:
        self._plans = plans
        self._graph = graph
        self._inputs = {tensor.stored_name for tensor in plans.spec(graph).inputs}
        self._tensors = {tensor.stored_name for tensor in plans.spec(graph).tensors}
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._scratch = (0, 0)

    def set_device_memory(self, address: int, nbytes: int) -> None:
        self._scratch = (address, nbytes)

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        self._shapes[name] = tuple(shape)
        return name in self._inputs

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._tensors

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self._plans.device.stream
        ready = self._shapes.keys() == self._inputs and self._addresses.keys() == self._tensors
        call = (self._graph, dict(self._shapes), dict(self._addresses), *self._scratch)
        self._plans.device.submit(lambda: self._plans.run(*call))
        return ready
