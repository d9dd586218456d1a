"""Runs graphs on an NVIDIA card, whichever backend loads them. See `engines.engine.Engine`.

All device memory but the weights, and the scratch memory of a backend that has its own, is one arena
(`tensors`), and nothing is allocated after warm-up.

Graphs that run at every step, or for every picture, have fixed places for inputs and outputs, so that their
calls can be captured as CUDA graphs, one per set of shapes (`capture`). Several steps that nothing comes in
between (`CardEngine.run_steps`) are one CUDA graph too, where the backend lets its calls be captured. A
server has no use for that, since requests join and leave between any two of its steps.

Of a bank, a call reads the rows that its index names. So a captured call is given every bank as large as it
can be, whatever lies in the rest of its place, and one capture serves any number of requests that share it.

Everything goes into one stream, and nothing waits for it but `to_host`. So graphs may share scratch memory
and places: no two run at the same time. What a caller keeps never lies there: results are copied out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from engines.bundle import Bundle
from engines.card.capture import Call, CallCache, CallSignature, Places
from engines.card.graph import LoadedGraph, Shape
from engines.card.tensors import DeviceArray, Downloads, TensorStore, as_specified, output_shapes
from engines.cuda import Device
from engines.engine import Array, Observer, observed, require_shape, run_step_by_step, step_count
from engines.memory_plan import MOST_STEPS, DeviceMemoryPlan, scratch_name
from engines.spec import CAPTURED_ROLES, ROWS, SAMPLES, GraphSpec, sizes_for

_CALLS_PER_SAMPLE = 4
"""Calls of a graph that a server keeps for each sample of its batch: those that it warms up, with guidance
and without, and as many where some samples have it and others do not."""


class CardEngine:
    """Runs graphs on a card. It may be used from several threads, one call at a time."""

    device = "cuda"

    def __init__(
        self,
        backend: str,
        bundle: Bundle,
        device: Device,
        open_graph: Callable[[str], LoadedGraph],
        plan: DeviceMemoryPlan,
        capture: bool = True,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Allocates the arena.

        Args:
            backend: name of the backend that loads the graphs.
            bundle: holds the graphs.
            device: where to run.
            open_graph: loads a graph onto the device.
            plan: what of the device's memory is for what.
            capture: whether calls become CUDA graphs.
            lock: held around everything that is done with the device, may be taken again by the thread that
                has it; None for one of its own.
        """
        self.backend = backend
        self.observer: Observer | None = None
        self.plan = plan
        self.cache_bytes: int | None = plan.cache
        self._bundle = bundle
        self._device = device
        self._open_graph = open_graph
        self._specs = bundle.manifest.specs
        self._largest = bundle.manifest.largest_sizes
        self._bank_shapes = {
            graph: {name: spec.tensor(name).resolve(self._largest) for name in spec.banked}
            for graph, spec in self._specs.items()
        }
        self._graphs: dict[str, LoadedGraph] = {}
        self._lock = lock or threading.RLock()
        try:
            self._store = TensorStore(device, plan)
            self._downloads = Downloads(device, self._lock)
        except BaseException:
            device.free_all()
            raise
        self._calls = CallCache(device, capture)
        self._places = Places(device, self._store, self._specs, plan.fixed)
        self._own_scratch: dict[str, int] = {}
        """Graph -> scratch memory outside the arena, if it needs more here than where it was built."""

    @cached_property
    def _step(self) -> GraphSpec:
        return self._bundle.manifest.step

    @property
    def cached_calls(self) -> int:
        """Calls that are kept, with their contexts and CUDA graphs."""
        return len(self._calls)

    @property
    def pool_bytes(self) -> int:
        """Device memory for tensors that come and go."""
        return self._store.pool_bytes

    @property
    def free_bytes(self) -> int:
        """What of `pool_bytes` no tensor has."""
        return self._store.free_bytes

    def describe(self) -> str:
        """Returns the memory plan as a table."""
        return self.plan.table()

    def load(self, graph: str) -> None:
        """Loads a graph's weights; graphs of other groups are evicted."""
        with self._lock:
            if graph in self._graphs:
                return
            with observed(self, "load", graph):
                for other in self._graphs.keys() - set(self.plan.group_of(graph)):
                    self.unload(other)
                self._bundle.verify(graph)
                loaded = self._open_graph(graph)
                if loaded.scratch > self.plan.graphs[graph].scratch and graph not in self._own_scratch:
                    self._own_scratch[graph] = self._device.allocate(loaded.scratch)
                self._graphs[graph] = loaded

    def unload(self, graph: str) -> None:
        """Frees a graph's weights."""
        with self._lock:
            self._calls.evict_graph(graph)
            self._graphs.pop(graph, None)

    def close(self) -> None:
        """Frees the weights of all graphs, the arena, and the memory of transfers."""
        with self._lock:
            self._device.synchronize()
            for graph in list(self._graphs):
                self.unload(graph)
            self._device.free_all()

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceArray | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceArray]:
        """Runs a graph; does not wait for the results."""
        with self._lock:
            self.load(graph)
            with observed(self, "run", graph, inputs):
                spec = self._specs[graph]
                given = as_specified(spec, inputs)
                run = self._run_in_place if spec.role in CAPTURED_ROLES else self._run_anywhere
                shapes = output_shapes(spec, given, self._largest)
                try:
                    results = run(spec, given, shapes)
                finally:
                    # also a call that failed may have written to its buffers
                    self._places.ran(graph)
                return {name: results[name] for name in outputs or results}

    def run_steps(
        self,
        graph: str,
        inputs: Mapping[str, DeviceArray | Array],
        per_step: Mapping[str, Array],
        feedback: Mapping[str, str],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceArray]:
        """Runs a graph several times.

        If exactly the `per_step` inputs of the step graph are given per step, for at most `MOST_STEPS` steps,
        their values lie in tables on the card, and the host neither copies nor waits between two steps. From
        the second time on that is one CUDA graph, where the backend lets its calls be captured. The observer
        is told of it once, with `per_step` in place of the inputs of one step.
        """
        with self._lock:
            steps = step_count(per_step)
            has_tables = graph == self._step.name and per_step.keys() == set(self._step.per_step)
            if steps == 1 or steps > MOST_STEPS or not has_tables:
                return run_step_by_step(self, graph, inputs, per_step, feedback, outputs)
            self.load(graph)
            with observed(self, "run", graph, {**inputs, **per_step}):
                first = as_specified(self._step, {**inputs, **{name: v[0] for name, v in per_step.items()}})
                shapes = output_shapes(self._step, first, self._largest)
                try:
                    for name, value in first.items():
                        if name in per_step:
                            values = require_shape(name, per_step[name], str(value.dtype))
                            self._places.fill_table(graph, name, values)
                        else:
                            self._places.put(graph, name, value)
                    self._run_loop(first, steps, feedback)
                    results = self._places.take_outputs(graph, shapes)
                finally:
                    self._places.ran(graph)
                    self._places.overwritten(graph, feedback)
                return {name: results[name] for name in outputs or results}

    def warm_up(self, samples: int, window: int) -> Iterator[str]:
        """Makes the calls that take longer the first time than ever after: kernels are chosen, loaded and
        compiled, and calls captured; they are kept. Nothing if graphs are swapped, as that would load them
        all again.

        Args:
            samples: most that will share a call of the step graph.
            window: steps in one call of a window graph.

        Yields:
            Name of the graph, after each call of it is done: others may use the engine in between.
        """
        if len(self.plan.groups) > 1:
            return
        self._calls.most = max(self._calls.most, _CALLS_PER_SAMPLE * samples)
        dimensions = self._bundle.manifest.dimensions
        typical = sizes_for(dimensions, 1)
        step = self._step.name
        calls = [
            (name, sizes_for(dimensions, window) if spec.role == "window" else typical)
            for name, spec in self._specs.items()
            if name != step
        ]
        calls += [
            # with guidance, and without
            (step, typical | {SAMPLES: count, ROWS: rows})
            for count in range(1, samples + 1)
            for rows in (2 * count, count)
        ]
        for name, sizes in calls:
            inputs = {of.name: np.zeros(of.resolve(sizes), of.dtype) for of in self._specs[name].inputs}
            # the second call is captured
            for _ in range(2):
                self.run(name, inputs)
            with self._lock:
                self._device.synchronize()
            yield name

    def to_device(self, array: Array) -> DeviceArray:
        """Copies a host array to the device."""
        with self._lock:
            return self._store.to_device(array)

    def to_host(self, tensor: DeviceArray) -> Array:
        """Copies a tensor to the host; waits until it is there, while others may use the engine."""
        return self._downloads.fetch(tensor)

    def concatenate(self, pieces: Sequence[tuple[DeviceArray, int, int]]) -> DeviceArray:
        """Joins rows of tensors; nothing leaves the device."""
        with self._lock:
            return self._store.concatenate(pieces)

    def nbytes(self, tensor: DeviceArray) -> int:
        """Returns the memory that a tensor occupies."""
        return tensor.nbytes

    def _run_anywhere(
        self, spec: GraphSpec, inputs: Mapping[str, DeviceArray | Array], shapes: Mapping[str, Shape]
    ) -> dict[str, DeviceArray]:
        """Reads inputs where they are, and leaves outputs in new tensors."""
        tensors = {
            name: value if isinstance(value, DeviceArray) else self._store.to_device(value)
            for name, value in inputs.items()
        }
        results = self._store.new_outputs(spec, shapes)
        addresses = {name: tensor.address for name, tensor in (tensors | results).items()}
        shapes_given = {name: value.shape for name, value in inputs.items()}
        call = self._call(CallSignature.of(spec.name, shapes_given))
        self._prepare(call, spec.name, shapes_given, addresses)
        call.context.enqueue(self._device.stream)
        self._count_run(call, spec.name)
        return results

    def _run_in_place(
        self, spec: GraphSpec, inputs: Mapping[str, DeviceArray | Array], shapes: Mapping[str, Shape]
    ) -> dict[str, DeviceArray]:
        """Brings inputs to their places, runs or replays the graph, and copies outputs to new tensors."""
        for name, value in inputs.items():
            self._places.put(spec.name, name, value)
        bound = self._bound_shapes(spec, inputs)
        call = self._call(CallSignature.of(spec.name, bound))
        if call.runs == 0:
            self._prepare(call, spec.name, bound, self._places.addresses(spec.name))
        self._calls.run(call, partial(call.context.enqueue, self._device.stream))
        self._count_run(call, spec.name)
        return self._places.take_outputs(spec.name, shapes)

    def _run_loop(
        self, first: Mapping[str, DeviceArray | Array], steps: int, feedback: Mapping[str, str]
    ) -> None:
        """Runs or replays several steps of the step graph, whose tables and places are filled.

        Args:
            first: inputs of the first step.
            steps: how many.
            feedback: input -> the output of the step before that it has.
        """
        graph = self._step.name
        bound = self._bound_shapes(self._step, first)
        signature = CallSignature.of(graph, bound)
        call = self._call(replace(signature, steps=steps, feedback=tuple(feedback.items())))
        if call.runs == 0:
            self._prepare(call, graph, bound, self._places.addresses(graph))
        sizes = {name: value.nbytes for name, value in first.items()}

        def enqueue() -> None:
            for step in range(steps):
                self._places.advance(graph, step, sizes, feedback)
                call.context.enqueue(self._device.stream)

        self._calls.run(call, enqueue)
        self._count_run(call, graph)

    def _bound_shapes(self, spec: GraphSpec, inputs: Mapping[str, DeviceArray | Array]) -> dict[str, Shape]:
        """Returns the shapes that places of inputs are bound with: those of banks as large as they get."""
        banks = self._bank_shapes[spec.name]
        return {name: banks.get(name, value.shape) for name, value in inputs.items()}

    def _call(self, signature: CallSignature) -> Call:
        return self._calls.get(signature, self._graphs[signature.graph].new_context)

    def _prepare(
        self,
        call: Call,
        graph: str,
        shapes: Mapping[str, Shape],
        addresses: Mapping[str, int],
    ) -> None:
        scratch = self._own_scratch.get(graph, self._store.address(scratch_name(graph)))
        call.context.prepare(shapes, addresses, scratch, self._graphs[graph].scratch)

    def _count_run(self, call: Call, graph: str) -> None:
        call.runs += 1
        if call.runs == 1:
            self._graphs[graph].keep_compiled_kernels()
