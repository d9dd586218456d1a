"""ONNX Runtime: runs a bundle's graphs on the CPU, or on an NVIDIA card through the CUDA execution provider.

Both go the same way: inputs and outputs are values on the device, bound to the call, so what one graph leaves
there the next one takes without a copy. On a card the graph that runs at every step can be captured as a CUDA
graph and replayed; its inputs and outputs then have fixed places, for each set of shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.bundle import Bundle
from engines.engine import (
    Array,
    DeviceTensor,
    Observer,
    concatenate_rows,
    observed,
    require_shape,
    run_step_by_step,
)
from engines.errors import BackendError, BundleError
from engines.memory_plan import HostMemoryPlan, plan_host_memory
from engines.options import AUTO, EngineOptions
from engines.spec import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

INSTALL = "install it with: pip install '.[cpu]' (or '.[cuda]' for an NVIDIA card)"

NAME = "onnxruntime"

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_SHARE_FOR_KEPT_TENSORS = 8
"""Part of a card's memory for tensors that are kept; the rest is for weights and intermediate results."""

MOST_CAPTURED = 16
"""Sets of shapes that are captured; ONNX Runtime keeps each until the graph is unloaded."""

_NOT_CAPTURED = -1


def load_library() -> Any:
    """The onnxruntime package.

    Raises:
        BackendError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime is not installed; {INSTALL}") from error
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def devices() -> list[str]:
    """The devices that the installed ONNX Runtime was built for, best first."""
    available = load_library().get_available_providers()
    return [device for device in ("cuda", "cpu") if _PROVIDERS[device] in available]


def provider_options(
    device: str, memory_budget: int | None = None, cuda_graphs: bool = False
) -> dict[str, str]:
    """What an execution provider is started with.

    Args:
        device: cpu or cuda.
        memory_budget: bytes of a card's memory to use at the most.
        cuda_graphs: whether calls are captured.
    """
    if device != "cuda":
        return {}
    # grow by what is asked for: doubling would take twice what a graph needs
    options = {"arena_extend_strategy": "kSameAsRequested"}
    if memory_budget is not None:
        options["gpu_mem_limit"] = str(memory_budget)
    if cuda_graphs:
        options["enable_cuda_graph"] = "1"
    return options


class FixedCall:
    """Calls a graph with inputs of one set of shapes, at the same places each time: so it can be captured."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        spec: GraphSpec,
        shapes: Mapping[str, Sequence[int]],
        device: str,
        number: int,
    ) -> None:
        """Takes memory for every input and output.

        Args:
            session: the loaded graph.
            spec: its signature.
            shapes: shape of every input.
            device: cpu or cuda; on the CPU nothing is captured.
            number: tells it from other calls of this session; negative for one that is not captured.
        """
        self._library = load_library()
        self._session = session
        self._device = device
        self._specs = {tensor.name: tensor for tensor in spec.tensors}
        self._inputs = {t.name: self._new(t.name, shapes[t.name]) for t in spec.inputs}
        sizes = spec.sizes(shapes)
        self._outputs = {t.name: self._new(t.name, t.resolve(sizes)) for t in spec.outputs}
        self._values: dict[str, DeviceTensor | Array] = {}
        """Input -> the tensor or array whose values were brought to its place."""
        self._binding = session.io_binding()
        for name, place in self._inputs.items():
            self._binding.bind_ortvalue_input(self._specs[name].stored_name, place)
        for name, place in self._outputs.items():
            self._binding.bind_ortvalue_output(self._specs[name].stored_name, place)
        self._options = self._library.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(number))

    def run(
        self, inputs: Mapping[str, DeviceTensor | Array], outputs: Sequence[str]
    ) -> dict[str, DeviceTensor]:
        """Brings inputs to their places, runs or replays the graph, and copies outputs to new tensors."""
        for name, value in inputs.items():
            # tensors do not change, arrays may
            if self._values.get(name) is not value or isinstance(value, np.ndarray):
                self._inputs[name].update_inplace(value)
                self._values[name] = value
        self._session.run_with_iobinding(self._binding, self._options)
        results = {name: self._new(name, self._outputs[name].shape()) for name in outputs}
        for name, result in results.items():
            result.update_inplace(self._outputs[name])
        return results

    def _new(self, name: str, shape: Sequence[int]) -> DeviceTensor:
        dtype = np.dtype(self._specs[name].dtype)
        return self._library.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, self._device)


class OnnxRuntimeEngine:
    """Runs graphs with ONNX Runtime."""

    backend = NAME

    def __init__(
        self,
        bundle: Bundle,
        device: str,
        options: EngineOptions = EngineOptions(),
        plan: HostMemoryPlan | None = None,
    ) -> None:
        """Loads nothing yet.

        Args:
            bundle: holds ONNX graphs.
            device: cpu or cuda.
            options: threads, memory budget of a card, and whether the step graph is captured there.
            plan: on the CPU, which graphs are loaded together; all if None.
        """
        self.device = device
        self.observer: Observer | None = None
        self.plan = plan
        self.cache_bytes: int | None = plan.cache if plan else None
        if device == "cuda" and options.memory_budget is not None:
            self.cache_bytes = options.memory_budget // _SHARE_FOR_KEPT_TENSORS
        self._memory_budget = options.memory_budget
        self._captured = frozenset({bundle.manifest.step.name} if options.cuda_graphs else ())
        self._fixed_calls: dict[tuple[str, tuple[tuple[int, ...], ...]], FixedCall] = {}
        self._numbers = itertools.count(1)
        self._library = load_library()
        self._bundle = bundle
        self._specs = bundle.manifest.specs
        self._stored_names = {
            graph: {of.name: of.stored_name for of in spec.outputs} for graph, spec in self._specs.items()
        }
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._options = self._library.SessionOptions()
        # idle threads sleep at once: a server, or the other graphs, need the cores more than a spinning loop
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # an arena keeps what it ever took, here twice what the graphs need, and is no faster
        self._options.enable_cpu_mem_arena = False
        # where a model that is not loaded from its file finds its weights
        self._options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(bundle.path)
        )
        if options.threads:
            self._options.intra_op_num_threads = options.threads

    def describe(self) -> str:
        """What is loaded together, if not everything is."""
        return self.plan.table() if self.plan else ""

    def load(self, graph: str) -> None:
        """Loads a graph's weights; graphs of other groups are evicted."""
        if graph in self._sessions:
            return
        with observed(self, "load", graph):
            if self.plan:
                for other in self.plan.evicted_by(graph, self._sessions):
                    self.unload(other)
            self._bundle.verify(graph)
            self._sessions[graph] = self._new_session(graph)

    def _new_session(self, graph: str) -> onnxruntime.InferenceSession:
        options = provider_options(self.device, self._memory_budget, graph in self._captured)
        try:
            session = self._library.InferenceSession(
                self.model(graph, self._bundle.graph_file(graph, self.device)),
                self._options,
                providers=[(_PROVIDERS[self.device], options)],
            )
        except Exception as error:  # the library raises classes of its own, all derived from Exception
            reason = str(error).splitlines()[0]
            raise BundleError(f"ONNX Runtime cannot load the graph '{graph}': {reason}") from error
        # the library falls back to the CPU with a warning when a provider does not start
        if _PROVIDERS[self.device] not in session.get_providers():
            raise BackendError(
                f"ONNX Runtime could not start its {self.device} provider: the NVIDIA driver or the CUDA and "
                "cuDNN libraries are missing; check with 'anydoor doctor', or run with --device cpu"
            )
        return session

    def model(self, graph: str, path: Path) -> str | bytes:
        """What to run for a graph: the file, or a model in memory whose weights lie beside the file."""
        return str(path)

    def unload(self, graph: str) -> None:
        """Frees a graph's weights."""
        for key in [key for key in self._fixed_calls if key[0] == graph]:
            del self._fixed_calls[key]
        self._sessions.pop(graph, None)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceTensor | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceTensor]:
        """Runs a graph."""
        self.load(graph)
        spec = self._specs[graph]
        names = list(outputs or (output.name for output in spec.outputs))
        with observed(self, "run", graph, inputs):
            if graph in self._captured:
                return self._run_in_place(graph, inputs, names)
            session = self._sessions[graph]
            binding = session.io_binding()
            # a value on the CPU only points into its array, and the binding keeps neither alive
            values = {of.stored_name: self._value(of, inputs[of.name]) for of in spec.inputs}
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(self._stored_names[graph].get(name, name), self.device)
            session.run_with_iobinding(binding)
            return dict(zip(names, binding.get_outputs()))

    def run_steps(
        self,
        graph: str,
        inputs: Mapping[str, DeviceTensor | Array],
        per_step: Mapping[str, Array],
        feedback: Mapping[str, str],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceTensor]:
        """Runs a graph several times."""
        return run_step_by_step(self, graph, inputs, per_step, feedback, outputs)

    def _run_in_place(
        self, graph: str, inputs: Mapping[str, DeviceTensor | Array], outputs: Sequence[str]
    ) -> dict[str, DeviceTensor]:
        given: dict[str, DeviceTensor | Array] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for spec in self._specs[graph].inputs:
            value = inputs[spec.name]
            if isinstance(value, np.ndarray):
                value = require_shape(spec.name, value, spec.dtype)
                shapes[spec.name] = value.shape
            else:
                shapes[spec.name] = tuple(value.shape())
            given[spec.name] = value
        key = (graph, tuple(shapes.values()))
        if key not in self._fixed_calls:
            number = next(self._numbers) if len(self._fixed_calls) < MOST_CAPTURED else _NOT_CAPTURED
            call = FixedCall(self._sessions[graph], self._specs[graph], shapes, self.device, number)
            if number == _NOT_CAPTURED:
                return call.run(given, outputs)
            self._fixed_calls[key] = call
        return self._fixed_calls[key].run(given, outputs)

    def _value(self, spec: TensorSpec, given: DeviceTensor | Array) -> DeviceTensor:
        if isinstance(given, np.ndarray):
            return self.to_device(require_shape(spec.name, given, spec.dtype))
        return given

    def to_device(self, array: Array) -> DeviceTensor:
        """Copies a host array to the device; on the CPU the value points into it."""
        return self._library.OrtValue.ortvalue_from_numpy(array, self.device)

    def to_host(self, tensor: DeviceTensor) -> Array:
        """Copies a tensor to the host."""
        return tensor.numpy()  # type: ignore[no-any-return]

    def concatenate(self, pieces: Sequence[tuple[DeviceTensor, int, int]]) -> DeviceTensor:
        """Joins rows of tensors. ONNX Runtime copies between tensors through the host only."""
        host = {id(tensor): self.to_host(tensor) for tensor, _, _ in pieces}
        return self.to_device(concatenate_rows([(host[id(t)], start, stop) for t, start, stop in pieces]))

    def nbytes(self, tensor: DeviceTensor) -> int:
        """The memory that a tensor occupies."""
        return int(tensor.tensor_size_in_bytes())


def usable_devices() -> dict[str, str]:
    """Device -> a remark, for each that the installed ONNX Runtime was built for."""
    return dict.fromkeys(devices(), "")


def fits(bundle: Bundle, options: EngineOptions) -> bool:
    """Whether the host has the memory for a bundle; graphs are swapped if it is short."""
    return plan_host_memory(bundle, NAME, options.memory_budget).fits


def examine(bundle: Bundle, options: EngineOptions) -> tuple[str, str]:
    """The device that would run a bundle, and the memory plan.

    Raises:
        BackendError: there is no such device, or not enough memory.
    """
    engine = open_engine(bundle, options)
    if engine.plan:
        engine.plan.require_fit()
    return engine.device, engine.describe()


def open_engine(bundle: Bundle, options: EngineOptions) -> OnnxRuntimeEngine:
    """The engine for a bundle; see `engines.engine.open_engine`."""
    available = devices()
    device = available[0] if options.device == AUTO else options.device
    if device not in available:
        raise BackendError(f"the installed ONNX Runtime has no {device} provider; {INSTALL}")
    plan = plan_host_memory(bundle, NAME, options.memory_budget) if device == "cpu" else None
    return OnnxRuntimeEngine(bundle, device, options, plan)
