"""Calls that are kept for the next time, and the fixed places that let a call be captured as a CUDA graph.

A captured call reads and writes the same addresses every time. The step graph's inputs and outputs have
places of their own for that, to which inputs are copied unless they are there already. For several steps in
one CUDA graph, what differs from step to step lies in tables on the card, from which the graph itself takes
it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engines.backends.tensorrt.plans import Context, Shape
from engines.backends.tensorrt.tensors import DeviceArray, TensorStore
from engines.cuda import Device
from engines.engine import Array
from engines.memory_plan import table_name
from engines.spec import GraphSpec

MOST_CALLS = 16
"""Calls that are kept: sets of shapes, each with a number of steps."""


@dataclass(frozen=True)
class CallSignature:
    """What calls have in common that one CUDA graph can stand for."""

    graph: str
    shapes: tuple[Shape, ...]
    """Of the inputs, in one step."""
    steps: int = 1
    feedback: tuple[tuple[str, str], ...] = ()
    """Inputs that have the values of an output of the step before, and of which."""

    @classmethod
    def of(cls, graph: str, inputs: Mapping[str, DeviceArray | Array]) -> CallSignature:
        """The signature of one step with these inputs, which are in the order of the graph."""
        return cls(graph, tuple(value.shape for value in inputs.values()))


@dataclass(eq=False)
class Call:
    """How calls of one signature are made."""

    context: Context
    runs: int = 0
    captured: Any = None

    def capture_second(self, device: Device, work: Callable[[], None]) -> None:
        """Captures the work if this is the second run, and if it can be captured.

        The first run compiles, and settles what a capture must not contain.
        """
        if self.runs == 1 and self.context.capturable(device.stream):
            self.captured = device.capture(work)


class CallCache:
    """The calls that were made last. What comes after `MOST_CALLS` evicts the oldest."""

    def __init__(self, device: Device) -> None:
        """Starts empty.

        Args:
            device: captured the calls.
        """
        self._device = device
        self._calls: OrderedDict[CallSignature, Call] = OrderedDict()

    def __len__(self) -> int:
        return len(self._calls)

    def get(self, signature: CallSignature, new_context: Callable[[], Context]) -> Call:
        """The call of a signature: the one that is kept, or a new one.

        Args:
            signature: of the call. Several steps use the context of one.
            new_context: makes the context of a new call.
        """
        if signature not in self._calls:
            one = replace(signature, steps=1, feedback=())
            step = self.get(one, new_context) if signature.steps > 1 else None
            if len(self._calls) >= MOST_CALLS:
                self._device.synchronize()
                self._evict(next(iter(self._calls)))
            self._calls[signature] = Call(step.context if step else new_context())
        self._calls.move_to_end(signature)
        return self._calls[signature]

    def evict_graph(self, graph: str) -> None:
        """Frees the calls of a graph; waits until none is running."""
        self._device.synchronize()
        for signature in [signature for signature in self._calls if signature.graph == graph]:
            self._evict(signature)

    def _evict(self, signature: CallSignature) -> None:
        call = self._calls.pop(signature)
        if call.captured is not None:
            self._device.free_captured(call.captured)


class StepPlaces:
    """The places of the step graph's inputs and outputs, and whose values are in them."""

    def __init__(self, device: Device, store: TensorStore, spec: GraphSpec) -> None:
        """Starts with nothing in place.

        Args:
            device: copies.
            store: has the places and the tables in the fixed part of its arena.
            spec: signature of the step graph.
        """
        self._device = device
        self._store = store
        self._spec = spec
        self._serials: dict[str, int] = {}
        """Input -> serial number of the tensor whose values are in its place."""

    @property
    def addresses(self) -> dict[str, int]:
        """Input or output -> its place."""
        return {tensor.name: self._store.address(tensor.name) for tensor in self._spec.tensors}

    def put(self, name: str, value: DeviceArray | Array) -> None:
        """Brings an input to its place, unless it is there."""
        place = self._store.address(name)
        if not isinstance(value, DeviceArray):
            self._serials.pop(name, None)
            self._store.upload(place, value)
        elif self._serials.get(name) != value.serial:
            self._device.copy(place, value.address, value.nbytes)
            self._serials[name] = value.serial

    def fill_table(self, name: str, values: Array) -> None:
        """Brings the values of an input at every step, (S, ...), to its table."""
        self._store.upload(self._store.address(table_name(name)), values)
        # `advance` writes to its place
        self._serials.pop(name, None)

    def advance(self, step: int, sizes: Mapping[str, int], feedback: Mapping[str, str]) -> None:
        """Puts copies into the stream that make the places ready for a step of several.

        Args:
            step: counted from 0.
            sizes: bytes of every input.
            feedback: input -> the output of the step before that it has.
        """
        for name in self._spec.per_step:
            values = self._store.address(table_name(name)) + step * sizes[name]
            self._device.copy(self._store.address(name), values, sizes[name])
        if step > 0:
            for name, output in feedback.items():
                self._device.copy(self._store.address(name), self._store.address(output), sizes[name])

    def take_outputs(self, shapes: Mapping[str, Shape]) -> dict[str, DeviceArray]:
        """Copies outputs from their places to new tensors."""
        results = self._store.new_outputs(self._spec, shapes)
        for name, tensor in results.items():
            self._device.copy(tensor.address, self._store.address(name), tensor.nbytes)
        return results

    def overwritten(self, names: Iterable[str]) -> None:
        """Notes that something else was written to the places of these."""
        for name in names:
            self._serials.pop(name, None)
