"""Runs a bundle's graphs with ONNX Runtime on the CPU. On an NVIDIA card, `cuda` loads them for
`engines.card`.

Inputs and outputs are values bound to the call, so what one graph leaves the next one takes without a copy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.backends.onnxruntime import BACKENDS
from engines.backends.onnxruntime.session_check import check_session
from engines.bundle import Bundle
from engines.engine import (
    Array,
    DeviceTensor,
    Engine,
    Observer,
    concatenate_rows,
    observed,
    refuse_card_graphs,
    require_shape,
    run_step_by_step,
    running_refusal,
)
from engines.errors import BackendError, BundleError
from engines.host_memory import HostMemoryPlan, needed_host_bytes, plan_host_memory
from engines.manifest import ONNX
from engines.memory_plan import needed_device_bytes, plan_for_card
from engines.options import AUTO, EngineOptions
from engines.spec import SAMPLING_ROLES, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

INSTALL = f"install it with: {BACKENDS[0].install}"

NAME = ONNX

FIRST_VERSION = (1, 23)
"""The first whose values say how large they are."""

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def load_library() -> Any:
    """Returns the onnxruntime package, which reports to nobody: since 1.31 it tells its makers how it is
    used, unless that is switched off (microsoft/onnxruntime, pull request 27379).

    Raises:
        BackendError: it is not installed, or too old.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read once, when it is imported
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime is not installed; {INSTALL}") from error
    check_version(onnxruntime.__version__)
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def check_version(version: str, first: tuple[int, int] = FIRST_VERSION, why: str = "") -> None:
    """Checks that the library is recent enough.

    Raises:
        BackendError: says which one is needed.
    """
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < first:
        raise BackendError(
            f"ONNX Runtime {version} is too old{why}, it must be {first[0]}.{first[1]} or later: add "
            f"--upgrade to pip install '.[{'cuda' if why else 'cpu'}]'"
        )


def devices() -> list[str]:
    """Returns the devices that the installed ONNX Runtime was built for, best first."""
    available = load_library().get_available_providers()
    return [device for device in ("cuda", "cpu") if _PROVIDERS[device] in available]


class OnnxRuntimeEngine:
    """Runs graphs on the CPU with ONNX Runtime."""

    backend = NAME
    device = "cpu"

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions = EngineOptions(),
        plan: HostMemoryPlan | None = None,
    ) -> None:
        """Loads nothing yet.

        Args:
            bundle: holds ONNX graphs.
            options: threads.
            plan: which graphs are loaded together; all if None.
        """
        self.observer: Observer | None = None
        self.plan = plan
        self.cache_bytes: int | None = plan.cache if plan else None
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
        """Returns the groups of graphs that are loaded together, if not all are."""
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
            session = self._new_session(graph)
            check_session(self._specs[graph], session)
            self._sessions[graph] = session

    def _new_session(self, graph: str) -> onnxruntime.InferenceSession:
        # the library would hold results that nobody needs any more for later ones of the same shape: of a
        # U-shaped network that is a third more memory, of which a call finds none in the caches
        self._options.enable_mem_reuse = self._specs[graph].role not in SAMPLING_ROLES
        try:
            return self._library.InferenceSession(
                self.model(graph, self._bundle.graph_file(graph, self.device)),
                self._options,
                providers=[_PROVIDERS["cpu"]],
            )
        except Exception as error:  # the library raises classes of its own, all derived from Exception
            reason = str(error).splitlines()[0]
            raise BundleError(f"ONNX Runtime cannot load the graph '{graph}': {reason}") from error

    def model(self, graph: str, path: Path) -> str | bytes:
        """Returns what to run for a graph: the file, or a model in memory whose weights lie beside the
        file."""
        return str(path)

    def unload(self, graph: str) -> None:
        """Frees a graph's weights."""
        self._sessions.pop(graph, None)

    def close(self) -> None:
        """Frees the weights of all graphs."""
        self._sessions.clear()

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
            session = self._sessions[graph]
            binding = session.io_binding()
            # a value on the CPU only points into its array, and the binding keeps neither alive
            values = {of.stored_name: self._value(of, inputs[of.name]) for of in spec.inputs}
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            for name in names:
                binding.bind_output(self._stored_names[graph].get(name, name))
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # the library raises classes of its own, all derived from Exception
                raise running_refusal("ONNX Runtime", graph, error) from error
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

    def _value(self, spec: TensorSpec, given: DeviceTensor | Array) -> DeviceTensor:
        if isinstance(given, np.ndarray):
            return self.to_device(require_shape(spec.name, given, spec.dtype))
        return given

    def to_device(self, array: Array) -> DeviceTensor:
        """Returns a value that points into the array."""
        return self._library.OrtValue.ortvalue_from_numpy(array)

    def to_host(self, tensor: DeviceTensor) -> Array:
        """Copies a tensor to the host."""
        # numpy() gives a view that does not keep the memory of an array that `to_device` pointed into
        return tensor.numpy().copy()  # type: ignore[no-any-return]

    def concatenate(self, pieces: Sequence[tuple[DeviceTensor, int, int]]) -> DeviceTensor:
        """Joins rows of tensors."""
        host = {id(tensor): tensor.numpy() for tensor, _, _ in pieces}
        return self.to_device(concatenate_rows([(host[id(t)], start, stop) for t, start, stop in pieces]))

    def nbytes(self, tensor: DeviceTensor) -> int:
        """Returns the memory that a tensor occupies."""
        return int(tensor.tensor_size_in_bytes())


def usable_devices() -> dict[str, str]:
    """Returns device -> a remark, for each that the installed ONNX Runtime was built for.

    Of a card it is which CUDA and cuDNN libraries were found where.
    """
    found = dict.fromkeys(devices(), "")
    if "cuda" in found:
        from engines.backends.onnxruntime import cuda, cuda_refusals

        library = load_library()
        check_version(library.__version__, cuda.FIRST_VERSION, " for a card")
        cuda.preload(library)
        found["cuda"] = cuda.loaded_libraries() or f"no CUDA libraries from pip; {cuda_refusals.INSTALL}"
    return found


def fits(bundle: Bundle, options: EngineOptions) -> bool:
    """Returns whether the host has the memory for a bundle; graphs are swapped if it is short."""
    return plan_host_memory(bundle, NAME, options.memory_budget).fits


def needed_bytes(bundle: Bundle, options: EngineOptions) -> int:
    """Returns the memory that a bundle needs, all graphs loaded; see `engines.engine.needed_bytes`."""
    if _device(bundle, options) == "cuda":
        return needed_device_bytes(bundle.manifest)
    return needed_host_bytes(bundle, NAME)


def examine(bundle: Bundle, options: EngineOptions) -> tuple[str, str]:
    """Returns the device that would run a bundle, and the memory plan.

    Raises:
        BackendError: there is no such device, or not enough memory.
    """
    if _device(bundle, options) == "cuda":
        from engines.cuda import Device

        card = Device().card()
        return card.name, plan_for_card(bundle.manifest, options.memory_budget, card.free).table()
    plan = plan_host_memory(bundle, NAME, options.memory_budget)
    plan.require_fit()
    return "cpu", plan.table()


def open_engine(bundle: Bundle, options: EngineOptions, most_cache: int | None = None) -> Engine:
    """Returns the engine for a bundle; see `engines.engine.open_engine`."""
    if _device(bundle, options) == "cuda":
        from engines.backends.onnxruntime import cuda

        library = load_library()
        check_version(library.__version__, cuda.FIRST_VERSION, " for a card")
        return cuda.open_card_engine(library, bundle, options, most_cache)
    return OnnxRuntimeEngine(bundle, options, plan_host_memory(bundle, NAME, options.memory_budget))


def _device(bundle: Bundle, options: EngineOptions) -> str:
    """Returns the device that would run a bundle.

    Raises:
        BackendError: the library has no such device, or the device cannot run the bundle as asked.
    """
    available = devices()
    device = available[0] if options.device == AUTO else options.device
    if device not in available:
        raise BackendError(f"the installed ONNX Runtime has no {device} provider; {INSTALL}")
    if device == "cpu":
        refuse_card_graphs(bundle)
        if options.inference_precision == "tf32":
            raise BackendError("tf32 needs a card: leave out --inference-precision tf32")
    return device
