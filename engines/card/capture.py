"""Calls that are kept for the next time, and the fixed places that let a call be captured as a CUDA graph.

A captured call reads and writes the same addresses every time. The inputs and outputs of such graphs have
places of their own for that, to which inputs are copied unless they are there already. For several steps at
once, what differs from step to step lies in tables on the card.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engines.arena import Layout
from engines.card.graph import Context, Shape
from engines.card.tensors import DeviceArray, TensorStore
from engines.cuda import Device
from engines.engine import Array
from engines.errors import BackendError
from engines.memory_plan import buffers_of, place_name, table_name
from engines.spec import GraphSpec

MOST_CALLS = 16
"""Calls of a graph that are kept: sets of shapes, each with a number of steps."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallSignature:
    """The signature that calls share if one CUDA graph can replay them."""

    graph: str
    shapes: tuple[Shape, ...]
    """Shapes of the inputs in one step."""
    steps: int = 1
    feedback: tuple[tuple[str, str], ...] = ()
    """Inputs that have the values of an output of the step before, and of which."""

    @classmethod
    def of(cls, graph: str, shapes: Mapping[str, Shape]) -> CallSignature:
        """Returns the signature of one step whose inputs, in the order of the graph, have these shapes."""
        return cls(graph, tuple(shapes.values()))


@dataclass(eq=False)
class Call:
    """A call of one signature, captured or not."""

    context: Context
    runs: int = 0
    captured: Any = None


class CallCache:
    """The calls of each graph that were made last. What comes after `most` of a graph evicts its oldest."""

    def __init__(self, device: Device, capture: bool = True) -> None:
        """Starts empty.

        Args:
            device: captures the calls.
            capture: whether it does.
        """
        self.most = MOST_CALLS
        """Calls of a graph that are kept."""
        self._device = device
        self._capture = capture
        self._calls: OrderedDict[CallSignature, Call] = OrderedDict()

    def __len__(self) -> int:
        return len(self._calls)

    def get(self, signature: CallSignature, new_context: Callable[[], Context]) -> Call:
        """Returns the call of a signature: the one that is kept, or a new one.

        Args:
            signature: of the call. Several steps use the context of one.
            new_context: makes the context of a new call.
        """
        if signature not in self._calls:
            one = replace(signature, steps=1, feedback=())
            step = self.get(one, new_context) if signature.steps > 1 else None
            kept = self._of_graph(signature.graph)
            if len(kept) >= self.most:
                self._device.synchronize()
                self._evict(kept[0])
            self._calls[signature] = Call(step.context if step else new_context())
        self._calls.move_to_end(signature)
        return self._calls[signature]

    def run(self, call: Call, work: Callable[[], None]) -> None:
        """Puts the work of a call into the stream: captures it the second time, and replays it from then on.

        The first run compiles, and settles what a capture must not contain. A call that cannot be captured
        runs without.
        """
        if self._capture and call.runs == 1 and call.context.capturable(self._device.stream):
            try:
                call.captured = self._device.capture(work)
            except BackendError as error:
                # a card may have the memory for the call, and not for its CUDA graph
                logger.warning("a call runs without a CUDA graph: %s", error)
        if call.captured is None:
            work()
        else:
            self._device.launch(call.captured)

    def evict_graph(self, graph: str) -> None:
        """Frees the calls of a graph; waits until none is running."""
        self._device.synchronize()
        for signature in self._of_graph(graph):
            self._evict(signature)

    def _of_graph(self, graph: str) -> list[CallSignature]:
        """Returns the signatures of a graph's calls, the oldest first."""
        return [signature for signature in self._calls if signature.graph == graph]

    def _evict(self, signature: CallSignature) -> None:
        call = self._calls.pop(signature)
        if call.captured is not None:
            self._device.free_captured(call.captured)


class Places:
    """The places of the inputs and outputs of captured graphs, and whose values are in them."""

    def __init__(
        self, device: Device, store: TensorStore, specs: Mapping[str, GraphSpec], fixed: Layout
    ) -> None:
        """Starts with nothing in place.

        Args:
            device: copies.
            store: has the places and the tables in the fixed part of its arena.
            specs: graph -> its signature, for all graphs.
            fixed: what lies where in that part.
        """
        self._device = device
        self._store = store
        self._specs = specs
        self._serials: dict[str, int] = {}
        """Place of an input -> serial number of the tensor whose values are there."""
        self._lost = {
            graph: frozenset().union(*(fixed.overlaps[name] for name in buffers_of(spec)))
            for graph, spec in specs.items()
        }
        """Graph -> buffers whose contents are lost when it runs."""

    def addresses(self, graph: str) -> dict[str, int]:
        """Returns input or output of a graph -> its place."""
        return {tensor.name: self._place(graph, tensor.name) for tensor in self._specs[graph].tensors}

    def put(self, graph: str, name: str, value: DeviceArray | Array) -> None:
        """Brings an input to its place, unless it is there."""
        place = place_name(graph, name)
        address = self._store.address(place)
        if not isinstance(value, DeviceArray):
            self._serials.pop(place, None)
            self._store.upload(address, value)
        elif self._serials.get(place) != value.serial:
            self._device.copy(address, value.address, value.nbytes)
            self._serials[place] = value.serial

    def fill_table(self, graph: str, name: str, values: Array) -> None:
        """Brings the values of an input at every step, (S, ...), to its table."""
        self._store.upload(self._store.address(table_name(graph, name)), values)
        # `advance` writes to its place
        self.overwritten(graph, [name])

    def advance(self, graph: str, step: int, sizes: Mapping[str, int], feedback: Mapping[str, str]) -> None:
        """Puts copies into the stream that make the places ready for a step of several.

        Args:
            graph: the step graph.
            step: counted from 0.
            sizes: bytes of every input.
            feedback: input -> the output of the step before that it has.
        """
        for name in self._specs[graph].per_step:
            values = self._store.address(table_name(graph, name)) + step * sizes[name]
            self._device.copy(self._place(graph, name), values, sizes[name])
        if step > 0:
            for name, output in feedback.items():
                self._device.copy(self._place(graph, name), self._place(graph, output), sizes[name])

    def take_outputs(self, graph: str, shapes: Mapping[str, Shape]) -> dict[str, DeviceArray]:
        """Copies outputs from their places to new tensors."""
        results = self._store.new_outputs(self._specs[graph], shapes)
        for name, tensor in results.items():
            self._device.copy(tensor.address, self._place(graph, name), tensor.nbytes)
        return results

    def overwritten(self, graph: str, names: Iterable[str]) -> None:
        """Notes that something else was written to the places of these inputs."""
        for name in names:
            self._serials.pop(place_name(graph, name), None)

    def ran(self, graph: str) -> None:
        """Notes that a graph used its buffers, and so whatever lay there is lost."""
        for place in self._lost[graph]:
            self._serials.pop(place, None)

    def _place(self, graph: str, name: str) -> int:
        return self._store.address(place_name(graph, name))
