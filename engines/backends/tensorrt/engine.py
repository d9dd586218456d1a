"""TensorRT and TensorRT for RTX: runs a bundle's plans on an NVIDIA card. See `engines.engine.Engine`.

All device memory but the weights is one arena: a fixed part (`engines.memory_plan`) and a pool for the
tensors that come and go. All work goes into one stream, so a piece of the pool may be taken again as soon as
nobody holds its tensor: whatever still reads it comes first in the stream. Nothing is allocated after
warm-up.

The denoise graph runs at every step. Its inputs have fixed places, to which they are copied unless they are
there already, so that the call can be captured as a CUDA graph, one per set of shapes. Several steps that
nothing comes in between (`TensorRTEngine.run_steps`) are captured as one CUDA graph, per set of shapes and
number of steps: what differs from step to step is small and lies in tables on the card, from which the graph
itself takes it. A server has no use for that, since requests join and leave between any two of its steps.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.arena import Pool, PoolExhaustedError
from engines.backends.tensorrt.library import Context, Library, Plan, Shape, load_library
from engines.bundle import Bundle
from engines.cuda import Device, OutOfDeviceMemoryError
from engines.engine import Array, require_shape, run_step_by_step, step_count
from engines.errors import BackendError
from engines.memory_plan import (
    MOST_STEPS,
    GraphMemory,
    ResidencyPlan,
    plan_residency,
    scratch_name,
    table_name,
)
from engines.spec import DENOISE, GRAPHS, STEP_INPUTS

CAPTURED = DENOISE
"""The graph that is captured and whose inputs have fixed places."""

MOST_CAPTURED = 16
"""Kinds of calls that stay captured: sets of shapes, each with a number of steps."""

STAGING_BYTES = 16 << 20
"""Pinned host memory that everything on its way to or from the card passes through."""

SHARE_OF_FREE_MEMORY = 0.9
"""What is used of the card's free memory without a budget; kernels and contexts take some as well."""


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
    """Pinned host memory, used round and round."""

    def __init__(self, device: Device, nbytes: int = STAGING_BYTES) -> None:
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

    def download(self, source: int, nbytes: int) -> NDArray[np.uint8]:
        """Copies device memory to a new host array; waits until it is there."""
        content = np.empty(nbytes, np.uint8)
        for start in range(0, nbytes, len(self._memory)):
            piece = content[start : start + len(self._memory)]
            offset = self._reserve(len(piece))
            self._device.copy(self._address + offset, source + start, len(piece))
            self._device.synchronize()
            piece[:] = self._memory[offset : offset + len(piece)]
        return content

    def _reserve(self, nbytes: int) -> int:
        if self._next + nbytes > len(self._memory):
            # copies that still read from the front must be through
            self._device.synchronize()
            self._next = 0
        offset, self._next = self._next, self._next + nbytes
        return offset


@dataclass(frozen=True)
class _Kind:
    """What calls have in common that one CUDA graph can stand for."""

    graph: str
    shapes: tuple[Shape, ...]
    """Of the inputs, in one step."""
    steps: int = 1
    feedback: tuple[tuple[str, str], ...] = ()
    """Inputs that have the values of an output of the step before, and of which."""


@dataclass(eq=False)
class _Call:
    """How calls of one kind are made."""

    context: Context
    runs: int = 0
    captured: Any = None


class TensorRTEngine:
    """Runs plans; see `engines.engine.Engine`. It may be used from several threads, one call at a time."""

    device = "cuda"

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        open_plan: Callable[[str], Plan],
        residency: ResidencyPlan,
    ) -> None:
        """Allocates the arena; `open_engine` is the way to get one.

        Args:
            bundle: holds the plans.
            device: where to run.
            open_plan: loads the plan of a graph onto the device.
            residency: what lives where.
        """
        self.backend = bundle.manifest.graphs[DENOISE].backend
        self.residency = residency
        self.cache_bytes: int | None = residency.cache
        self._bundle = bundle
        self._device = device
        self._open_plan = open_plan
        self._specs = bundle.manifest.specs
        self._plans: dict[str, Plan] = {}
        self._calls: OrderedDict[_Kind, _Call] = OrderedDict()
        self._lock = threading.RLock()
        self._arena = device.allocate(residency.arena)
        self._pool_start = self._arena + residency.fixed.nbytes
        self._pool = Pool(residency.arena - residency.fixed.nbytes)
        self._staging = Staging(device)
        self._in_place: dict[str, int] = {}
        """Input of the captured graph -> serial number of the tensor whose values are in its place."""
        self._own_scratch: dict[str, int] = {}
        """Graph -> scratch memory outside the arena, if it needs more here than where it was built."""

    def describe(self) -> str:
        """What lives where, as a table."""
        return self.residency.table()

    def load(self, graph: str) -> None:
        """Loads a graph's weights; graphs of other groups leave. See `Engine.load`."""
        with self._lock:
            if graph in self._plans:
                return
            for other in self._plans.keys() - set(self.residency.group_of(graph)):
                self.unload(other)
            self._bundle.verify(graph)
            plan = self._open_plan(graph)
            if plan.scratch > self.residency.graphs[graph].scratch and graph not in self._own_scratch:
                self._own_scratch[graph] = self._device.allocate(plan.scratch)
            self._plans[graph] = plan

    def unload(self, graph: str) -> None:
        """Frees a graph's weights; see `Engine.unload`."""
        with self._lock:
            self._device.synchronize()
            for kind in [kind for kind in self._calls if kind.graph == graph]:
                self._forget(kind)
            self._plans.pop(graph, None)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceArray | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceArray]:
        """Runs a graph; see `Engine.run`."""
        with self._lock:
            self.load(graph)
            given = self._as_specified(graph, inputs)
            run = self._run_in_place if graph == CAPTURED else self._run_anywhere
            results = run(graph, given, self._output_shapes(graph, given))
            # the scratch memory may lie where inputs of the captured graph were
            for name in self.residency.fixed.overlaps[scratch_name(graph)]:
                self._in_place.pop(name, None)
            return {name: results[name] for name in outputs or results}

    def run_steps(
        self,
        graph: str,
        inputs: Mapping[str, DeviceArray | Array],
        per_step: Mapping[str, Array],
        feedback: Mapping[str, str],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceArray]:
        """Runs a graph several times; see `Engine.run_steps`.

        From the second time on that is one CUDA graph: for at most `MOST_STEPS` steps of the graph that is
        captured, if exactly `STEP_INPUTS` are given per step.
        """
        with self._lock:
            steps = step_count(per_step)
            has_tables = graph == CAPTURED and per_step.keys() == set(STEP_INPUTS)
            if steps == 1 or steps > MOST_STEPS or not has_tables:
                return run_step_by_step(self, graph, inputs, per_step, feedback, outputs)
            self.load(graph)
            first = self._as_specified(graph, {**inputs, **{name: v[0] for name, v in per_step.items()}})
            output_shapes = self._output_shapes(graph, first)
            call = self._call(replace(_kind(graph, first), steps=steps, feedback=tuple(feedback.items())))
            # the first time goes step by step, which makes the step itself ready to be captured
            if call.runs == 1 and call.context.capturable(self._device.stream):
                sizes = {name: value.nbytes for name, value in first.items()}
                call.captured = self._device.capture(
                    lambda: self._enqueue_steps(call.context, sizes, steps, feedback)
                )
            if call.captured is None:
                results = run_step_by_step(self, graph, inputs, per_step, feedback, outputs)
            else:
                self._launch_steps(call.captured, first, per_step)
                results = self._take_outputs(graph, output_shapes)
                for name in feedback:
                    self._in_place.pop(name, None)
            call.runs += 1
            return {name: results[name] for name in outputs or results}

    def to_device(self, array: Array) -> DeviceArray:
        """See `Engine.to_device`."""
        with self._lock:
            tensor = self._new_tensor(array.shape, array.dtype)
            self._staging.upload(tensor.address, np.ascontiguousarray(array))
            return tensor

    def to_host(self, tensor: DeviceArray) -> Array:
        """See `Engine.to_host`."""
        with self._lock:
            content = self._staging.download(tensor.address, tensor.nbytes)
        return content.view(tensor.dtype).reshape(tensor.shape)

    def concatenate(self, pieces: Sequence[tuple[DeviceArray, int, int]]) -> DeviceArray:
        """See `Engine.concatenate`; nothing leaves the device."""
        with self._lock:
            first = pieces[0][0]
            rows = sum(stop - start for _, start, stop in pieces)
            joined = self._new_tensor((rows, *first.shape[1:]), first.dtype)
            row_bytes = math.prod(first.shape[1:]) * first.dtype.itemsize
            destination = joined.address
            for tensor, start, stop in pieces:
                nbytes = (stop - start) * row_bytes
                self._device.copy(destination, tensor.address + start * row_bytes, nbytes)
                destination += nbytes
            return joined

    def nbytes(self, tensor: DeviceArray) -> int:
        """See `Engine.nbytes`."""
        return tensor.nbytes

    def _run_anywhere(
        self, graph: str, inputs: Mapping[str, DeviceArray | Array], output_shapes: Mapping[str, Shape]
    ) -> dict[str, DeviceArray]:
        """Reads inputs where they are, and leaves outputs in new tensors."""
        tensors = {
            name: value if isinstance(value, DeviceArray) else self.to_device(value)
            for name, value in inputs.items()
        }
        results = self._new_outputs(graph, output_shapes)
        addresses = {name: tensor.address for name, tensor in (tensors | results).items()}
        call = self._call(_kind(graph, inputs))
        self._prepare(call, graph, inputs, addresses)
        call.context.enqueue(self._device.stream)
        self._count_run(call, graph)
        return results

    def _run_in_place(
        self, graph: str, inputs: Mapping[str, DeviceArray | Array], output_shapes: Mapping[str, Shape]
    ) -> dict[str, DeviceArray]:
        """Brings inputs to their places, runs or replays the graph, and copies outputs to new tensors."""
        for name, value in inputs.items():
            self._put_in_place(name, value)
        call = self._call(_kind(graph, inputs))
        stream = self._device.stream
        if call.runs == 0:
            places = {t.name: self._place(t.name) for t in self._specs[graph].tensors}
            self._prepare(call, graph, inputs, places)
        # the first run compiles and settles what a capture must not contain
        if call.runs == 1 and call.context.capturable(stream):
            call.captured = self._device.capture(lambda: call.context.enqueue(stream))
        if call.captured is None:
            call.context.enqueue(stream)
        else:
            self._device.launch(call.captured)
        self._count_run(call, graph)
        return self._take_outputs(graph, output_shapes)

    def _enqueue_steps(
        self, context: Context, sizes: Mapping[str, int], steps: int, feedback: Mapping[str, str]
    ) -> None:
        """Puts steps into the stream that take their small inputs from the tables.

        Args:
            context: of a step, whose tensors are at their places.
            sizes: bytes of every input.
            steps: how many.
            feedback: input -> the output of the step before that it has.
        """
        for step in range(steps):
            for name in STEP_INPUTS:
                values = self._place(table_name(name)) + step * sizes[name]
                self._device.copy(self._place(name), values, sizes[name])
            if step > 0:
                for name, output in feedback.items():
                    self._device.copy(self._place(name), self._place(output), sizes[name])
            context.enqueue(self._device.stream)

    def _launch_steps(
        self, captured: Any, first: Mapping[str, DeviceArray | Array], per_step: Mapping[str, Array]
    ) -> None:
        """Fills the places and the tables, and runs what `_enqueue_steps` put into a CUDA graph."""
        for name, value in first.items():
            if name not in per_step:
                self._put_in_place(name, value)
            else:
                table = require_shape(name, per_step[name], str(value.dtype))
                self._staging.upload(self._place(table_name(name)), table)
                self._in_place.pop(name, None)
        self._device.launch(captured)

    def _take_outputs(self, graph: str, shapes: Mapping[str, Shape]) -> dict[str, DeviceArray]:
        """Copies outputs from their places to new tensors."""
        results = self._new_outputs(graph, shapes)
        for name, tensor in results.items():
            self._device.copy(tensor.address, self._place(name), tensor.nbytes)
        return results

    def _put_in_place(self, name: str, value: DeviceArray | Array) -> None:
        if not isinstance(value, DeviceArray):
            self._in_place.pop(name, None)
            self._staging.upload(self._place(name), value)
        elif self._in_place.get(name) != value.serial:
            self._device.copy(self._place(name), value.address, value.nbytes)
            self._in_place[name] = value.serial

    def _place(self, name: str) -> int:
        return self._arena + self.residency.fixed.offsets[name]

    def _prepare(
        self,
        call: _Call,
        graph: str,
        inputs: Mapping[str, DeviceArray | Array],
        addresses: Mapping[str, int],
    ) -> None:
        scratch = self._own_scratch.get(graph, self._place(scratch_name(graph)))
        shapes = {name: value.shape for name, value in inputs.items()}
        call.context.prepare(shapes, addresses, scratch, self._plans[graph].scratch)

    def _call(self, kind: _Kind) -> _Call:
        if kind not in self._calls:
            # several steps use the context of one
            step = self._call(replace(kind, steps=1, feedback=())) if kind.steps > 1 else None
            if len(self._calls) >= MOST_CAPTURED:
                self._device.synchronize()
                self._forget(next(iter(self._calls)))
            self._calls[kind] = _Call(step.context if step else self._plans[kind.graph].new_context())
        self._calls.move_to_end(kind)
        return self._calls[kind]

    def _count_run(self, call: _Call, graph: str) -> None:
        call.runs += 1
        if call.runs == 1:
            self._plans[graph].keep_compiled_kernels()

    def _forget(self, kind: _Kind) -> None:
        call = self._calls.pop(kind)
        if call.captured is not None:
            self._device.forget(call.captured)

    def _as_specified(
        self, graph: str, inputs: Mapping[str, DeviceArray | Array]
    ) -> dict[str, DeviceArray | Array]:
        """The inputs of a graph in their order; arrays as it wants them."""
        return {
            tensor.name: value
            if isinstance(value := inputs[tensor.name], DeviceArray)
            else require_shape(tensor.name, value, tensor.dtype)
            for tensor in self._specs[graph].inputs
        }

    def _output_shapes(self, graph: str, inputs: Mapping[str, DeviceArray | Array]) -> dict[str, Shape]:
        """Shapes of the outputs.

        Raises:
            BackendError: an input has a shape that the graph cannot take.
        """
        sizes: dict[str, int] = {}
        for tensor in self._specs[graph].inputs:
            shape = inputs[tensor.name].shape
            if len(shape) == len(tensor.shape):
                for dimension, size in zip(tensor.shape, shape):
                    if isinstance(dimension, str):
                        sizes.setdefault(dimension, size)
            if len(shape) != len(tensor.shape) or shape != tensor.resolve(sizes):
                raise BackendError(
                    f"the input '{tensor.name}' of the graph '{graph}' has shape {shape} instead of "
                    f"{tensor.shape}"
                )
        return {tensor.name: tensor.resolve(sizes) for tensor in self._specs[graph].outputs}

    def _new_outputs(self, graph: str, shapes: Mapping[str, Shape]) -> dict[str, DeviceArray]:
        return {
            tensor.name: self._new_tensor(shapes[tensor.name], np.dtype(tensor.dtype))
            for tensor in self._specs[graph].outputs
        }

    def _new_tensor(self, shape: Shape, dtype: np.dtype[Any]) -> DeviceArray:
        try:
            offset = self._pool.take(math.prod(shape) * dtype.itemsize)
        except PoolExhaustedError as error:
            raise OutOfDeviceMemoryError(
                f"no room for a tensor of {error.nbytes / 1e6:.1f} MB: {error.free / 1e6:.1f} of "
                f"{self._pool.nbytes / 1e6:.1f} MB for tensors are free, {error.largest / 1e6:.1f} MB in one "
                "piece; ask for fewer pictures at once, or give a larger --memory-budget"
            ) from error
        tensor = DeviceArray(self._pool_start + offset, tuple(shape), dtype)
        weakref.finalize(tensor, self._pool.give_back, offset).atexit = False
        return tensor


def _kind(graph: str, inputs: Mapping[str, DeviceArray | Array]) -> _Kind:
    return _Kind(graph, tuple(value.shape for value in inputs.values()))


def open_engine(
    bundle: Bundle, device: str, threads: int | None, memory_budget: int | None = None
) -> TensorRTEngine:
    """The engine for a bundle of plans; see `engines.engine.open_engine`. It has no use for `threads`."""
    backend = bundle.manifest.graphs[DENOISE].backend
    if device == "cpu":
        raise BackendError(
            f"the bundle at '{bundle.path}' holds plans for an NVIDIA card: for the CPU build one with "
            "'python export/build_engines.py CHECKPOINT --backend onnxruntime'"
        )
    library = check_plans(bundle, backend)
    cuda_device = Device()
    card = cuda_device.card()
    library.check_card(bundle, card)
    budget = int(card.free * SHARE_OF_FREE_MEMORY) if memory_budget is None else memory_budget
    residency = residency_of(bundle, budget)
    return TensorRTEngine(bundle, cuda_device, lambda graph: library.open_plan(bundle, graph), residency)


def check_plans(bundle: Bundle, backend: str) -> Library:
    """The library for a bundle, after refusing what can be refused without a card.

    Raises:
        BackendError: the library is not installed.
        BundleError: a plan is of another version, damaged or foreign.
    """
    library = load_library(backend)
    for graph in GRAPHS:
        library.check_version(bundle, graph)
        library.check_header(bundle, graph)
    return library


def residency_of(bundle: Bundle, budget: int) -> ResidencyPlan:
    """What of a bundle would live where, within a budget of bytes; see `plan_residency`."""
    manifest = bundle.manifest
    graphs = {
        name: GraphMemory(sum(file.bytes for file in record.files), record.scratch_bytes)
        for name, record in manifest.graphs.items()
    }
    return plan_residency(graphs, manifest.specs, manifest.max_batch, budget)
