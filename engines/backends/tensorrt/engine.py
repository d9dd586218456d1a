"""TensorRT and TensorRT for RTX: runs a bundle's plans on an NVIDIA card. See `engines.engine.Engine`.

All device memory but the weights is one arena (`tensors`), and nothing is allocated after warm-up.

The step graph runs at every step, so its call is captured as a CUDA graph, one per set of shapes (`capture`).
Several steps that nothing comes in between (`TensorRTEngine.run_steps`) are captured as one CUDA graph, per
set of shapes and number of steps. A server has no use for that, since requests join and leave between any two
of its steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from engines.backends.tensorrt.capture import Call, CallCache, CallSignature, StepPlaces
from engines.backends.tensorrt.library import VARIANTS, Library, check_card, check_plans, usable_library
from engines.backends.tensorrt.plans import Plan, Shape, open_plan
from engines.backends.tensorrt.tensors import DeviceArray, TensorStore, as_specified, output_shapes
from engines.bundle import Bundle
from engines.cuda import Card, Device
from engines.engine import Array, Observer, observed, require_shape, run_step_by_step, step_count
from engines.errors import BackendError
from engines.manifest import BUILD_COMMAND
from engines.memory_plan import MOST_STEPS, DeviceMemoryPlan, plan_device_memory, scratch_name
from engines.options import EngineOptions
from engines.spec import GraphSpec

SHARE_OF_FREE_MEMORY = 0.9
"""What is used of the card's free memory without a budget; kernels and contexts take some as well."""


class TensorRTEngine:
    """Runs plans. It may be used from several threads, one call at a time."""

    device = "cuda"

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        open_plan: Callable[[str], Plan],
        plan: DeviceMemoryPlan,
    ) -> None:
        """Allocates the arena; `open_engine` is the way to get one.

        Args:
            bundle: holds the plans.
            device: where to run.
            open_plan: loads the plan of a graph onto the device.
            plan: what of the device's memory is for what.
        """
        self.backend = bundle.manifest.backend
        self.observer: Observer | None = None
        self.plan = plan
        self.cache_bytes: int | None = plan.cache
        self._bundle = bundle
        self._device = device
        self._open_plan = open_plan
        self._specs = bundle.manifest.specs
        self._step = bundle.manifest.step
        self._plans: dict[str, Plan] = {}
        self._lock = threading.RLock()
        self._store = TensorStore(device, plan)
        self._calls = CallCache(device)
        self._places = StepPlaces(device, self._store, self._step)
        self._own_scratch: dict[str, int] = {}
        """Graph -> scratch memory outside the arena, if it needs more here than where it was built."""

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
        """The memory plan as a table."""
        return self.plan.table()

    def load(self, graph: str) -> None:
        """Loads a graph's weights; graphs of other groups are evicted."""
        with self._lock:
            if graph in self._plans:
                return
            with observed(self, "load", graph):
                for other in self._plans.keys() - set(self.plan.group_of(graph)):
                    self.unload(other)
                self._bundle.verify(graph)
                plan = self._open_plan(graph)
                if plan.scratch > self.plan.graphs[graph].scratch and graph not in self._own_scratch:
                    self._own_scratch[graph] = self._device.allocate(plan.scratch)
                self._plans[graph] = plan

    def unload(self, graph: str) -> None:
        """Frees a graph's weights."""
        with self._lock:
            self._calls.evict_graph(graph)
            self._plans.pop(graph, None)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceArray | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceArray]:
        """Runs a graph."""
        with self._lock:
            self.load(graph)
            with observed(self, "run", graph, inputs):
                spec = self._specs[graph]
                given = as_specified(spec, inputs)
                run = self._run_in_place if graph == self._step.name else self._run_anywhere
                results = run(spec, given, output_shapes(spec, given))
                # the scratch memory may lie where inputs of the step graph were
                self._places.overwritten(self.plan.fixed.overlaps[scratch_name(graph)])
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

        From the second time on that is one CUDA graph: for at most `MOST_STEPS` steps of the step graph, if
        exactly its `per_step` inputs are given per step. The observer is told of it once, with `per_step` in
        place of the inputs of one step.
        """
        with self._lock:
            steps = step_count(per_step)
            has_tables = graph == self._step.name and per_step.keys() == set(self._step.per_step)
            if steps == 1 or steps > MOST_STEPS or not has_tables:
                return run_step_by_step(self, graph, inputs, per_step, feedback, outputs)
            self.load(graph)
            first = as_specified(self._step, {**inputs, **{name: v[0] for name, v in per_step.items()}})
            shapes = output_shapes(self._step, first)
            call = self._loop(first, steps, feedback)
            if call.captured is None:
                results = run_step_by_step(self, graph, inputs, per_step, feedback, outputs)
            else:
                with observed(self, "run", graph, {**inputs, **per_step}):
                    self._launch_loop(call, first, per_step)
                    results = self._places.take_outputs(shapes)
                    self._places.overwritten(feedback)
            call.runs += 1
            return {name: results[name] for name in outputs or results}

    def to_device(self, array: Array) -> DeviceArray:
        """Copies a host array to the device."""
        with self._lock:
            return self._store.to_device(array)

    def to_host(self, tensor: DeviceArray) -> Array:
        """Copies a tensor to the host; waits until it is there."""
        with self._lock:
            return self._store.to_host(tensor)

    def concatenate(self, pieces: Sequence[tuple[DeviceArray, int, int]]) -> DeviceArray:
        """Joins rows of tensors; nothing leaves the device."""
        with self._lock:
            return self._store.concatenate(pieces)

    def nbytes(self, tensor: DeviceArray) -> int:
        """The memory that a tensor occupies."""
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
        call = self._call(CallSignature.of(spec.name, inputs))
        self._prepare(call, spec.name, inputs, addresses)
        call.context.enqueue(self._device.stream)
        self._count_run(call, spec.name)
        return results

    def _run_in_place(
        self, spec: GraphSpec, inputs: Mapping[str, DeviceArray | Array], shapes: Mapping[str, Shape]
    ) -> dict[str, DeviceArray]:
        """Brings inputs to their places, runs or replays the graph, and copies outputs to new tensors."""
        for name, value in inputs.items():
            self._places.put(name, value)
        call = self._call(CallSignature.of(spec.name, inputs))
        if call.runs == 0:
            self._prepare(call, spec.name, inputs, self._places.addresses)
        call.capture_second(self._device, lambda: call.context.enqueue(self._device.stream))
        if call.captured is None:
            call.context.enqueue(self._device.stream)
        else:
            self._device.launch(call.captured)
        self._count_run(call, spec.name)
        return self._places.take_outputs(shapes)

    def _loop(
        self, first: Mapping[str, DeviceArray | Array], steps: int, feedback: Mapping[str, str]
    ) -> Call:
        """The call for several steps, captured if it is made for the second time.

        The first time goes step by step, which makes the step itself ready to be captured.

        Args:
            first: inputs of the first step.
            steps: how many.
            feedback: input -> the output of the step before that it has.
        """
        signature = CallSignature.of(self._step.name, first)
        call = self._call(replace(signature, steps=steps, feedback=tuple(feedback.items())))
        sizes = {name: value.nbytes for name, value in first.items()}

        def enqueue() -> None:
            for step in range(steps):
                self._places.advance(step, sizes, feedback)
                call.context.enqueue(self._device.stream)

        call.capture_second(self._device, enqueue)
        return call

    def _launch_loop(
        self, call: Call, first: Mapping[str, DeviceArray | Array], per_step: Mapping[str, Array]
    ) -> None:
        """Fills the places and the tables, and runs the CUDA graph of several steps."""
        for name, value in first.items():
            if name in per_step:
                self._places.fill_table(name, require_shape(name, per_step[name], str(value.dtype)))
            else:
                self._places.put(name, value)
        self._device.launch(call.captured)

    def _call(self, signature: CallSignature) -> Call:
        return self._calls.get(signature, self._plans[signature.graph].new_context)

    def _prepare(
        self,
        call: Call,
        graph: str,
        inputs: Mapping[str, DeviceArray | Array],
        addresses: Mapping[str, int],
    ) -> None:
        scratch = self._own_scratch.get(graph, self._store.address(scratch_name(graph)))
        shapes = {name: value.shape for name, value in inputs.items()}
        call.context.prepare(shapes, addresses, scratch, self._plans[graph].scratch)

    def _count_run(self, call: Call, graph: str) -> None:
        call.runs += 1
        if call.runs == 1:
            self._plans[graph].keep_compiled_kernels()


def usable_devices() -> dict[str, str]:
    """The card, with the variants of the library that are installed and support it, and their versions.

    Raises:
        BackendError: there is none.
    """
    libraries, refusals = [], []
    for backend in VARIANTS:
        try:
            libraries.append(usable_library(backend))
        except BackendError as error:
            refusals.append(error)
    if not libraries:
        raise refusals[0]
    return {"cuda": ", ".join(f"{library.variant.title} {library.version}" for library in libraries)}


def fits(bundle: Bundle, options: EngineOptions) -> bool:
    """Whether the card has the memory for a bundle; graphs are swapped if it is short."""
    try:
        _plan_memory(bundle, options, Device().card())
    except BackendError:
        return False
    return True


def examine(bundle: Bundle, options: EngineOptions) -> tuple[str, str]:
    """The card that would run a bundle, and the memory plan.

    Raises:
        BackendError: the library or the card is missing, or has not enough memory.
        BundleError: a plan is unusable here.
    """
    library = _check(bundle, options)
    card = Device().card()
    check_card(library, bundle, card)
    return card.name, _plan_memory(bundle, options, card).table()


def open_engine(bundle: Bundle, options: EngineOptions) -> TensorRTEngine:
    """The engine for a bundle of plans; see `engines.engine.open_engine`. It has no use for `threads`."""
    library = _check(bundle, options)
    device = Device()
    card = device.card()
    check_card(library, bundle, card)
    plan = _plan_memory(bundle, options, card)
    return TensorRTEngine(bundle, device, partial(open_plan, library, bundle), plan)


def _check(bundle: Bundle, options: EngineOptions) -> Library:
    """The library for a bundle, after refusing what can be refused without a card."""
    if options.device == "cpu":
        raise BackendError(
            f"the bundle at '{bundle.path}' holds plans for an NVIDIA card: for the CPU build one with "
            f"'{BUILD_COMMAND} --backend onnxruntime'"
        )
    library = check_plans(bundle)
    if options.memory_budget is not None:
        plan_device_memory(bundle.manifest, options.memory_budget)
    return library


def _plan_memory(bundle: Bundle, options: EngineOptions, card: Card) -> DeviceMemoryPlan:
    budget = options.memory_budget or int(card.free * SHARE_OF_FREE_MEMORY)
    return plan_device_memory(bundle.manifest, budget)
