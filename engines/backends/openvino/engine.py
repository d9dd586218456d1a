"""Runs a bundle's ONNX graphs with OpenVINO on the CPU.

Each graph is compiled once, with its variable dimensions left open: a call of another batch costs no new
compilation. What compiling found out is kept for the next start, without the weights and with its hash: a few
MB, for a fifth of the time. Tensors are NumPy arrays in the host's memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.backends.openvino import BACKENDS
from engines.bundle import Bundle
from engines.cache_folder import cache_folder, keep, kept
from engines.engine import (
    Array,
    Observer,
    concatenate_rows,
    observed,
    require_shape,
    run_step_by_step,
    running_refusal,
)
from engines.errors import BackendError, BundleError
from engines.graph_check import LoadedTensor, check_loaded
from engines.host_memory import HostMemoryPlan, needed_host_bytes, plan_host_memory, trim
from engines.memory_plan import Groups, groupings
from engines.options import EngineOptions
from engines.spec import GraphSpec

if TYPE_CHECKING:
    import openvino

NAME = "openvino"

INSTALL = f"install it with: {BACKENDS[0].install}"

_CONVERTERS = "openvino.tools"
"""The package's model converters: of no use to a runtime, and half of the time that importing it takes."""

_COPIES = 1.0
"""Memory that a loaded graph takes, as a multiple of its file: the weights in their final layout. The file
stays mapped beside them, but it was only read, and the system may take its pages back at any time. To count
them too would swap graphs, which costs seconds at each new reference, where all of them fit."""

_RESIDENT_COPIES = 2.0
"""The same with the pages of the file. A budget is a promise of how large the process will be seen to be, and
pages that nobody takes back are part of that."""

_LOAD_FACTOR = 0.4
"""Additional memory of loading, as a multiple of the file; measured on the largest graph."""

_PROCESSOR = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
"""Distinguishes processors for which graphs are compiled differently."""

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def load_library() -> Any:
    """Returns the openvino package, without its model converters.

    Raises:
        BackendError: it is not installed.
    """
    converters_wanted = _CONVERTERS in sys.modules or "openvino" in sys.modules
    if not converters_wanted:
        # the package takes a missing converter for one that is not installed
        sys.modules[_CONVERTERS] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise BackendError(f"OpenVINO is not installed; {INSTALL}") from error
    finally:
        if not converters_wanted:
            del sys.modules[_CONVERTERS]
    return openvino


_ONE_AT_A_TIME = threading.Lock()


def core() -> openvino.Core:
    """Returns the library's core, one for all engines of the process, and until it ends.

    With its first use, a core gives the calling thread a new stack for signal handlers; when it is freed, it
    unmaps that stack and puts back the one that it found. Two of them whose lives overlap, or one that
    another thread frees, leave a thread with a stack that is no more: the next Ctrl-C would kill the process.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    with _ONE_AT_A_TIME:
        return _core()


@functools.cache
def _core() -> openvino.Core:
    return load_library().Core()


def precisions() -> list[str]:
    """Returns the precisions that this machine's processor has fast arithmetic for.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [name for name in _PRECISIONS if name.upper() in capabilities]


class OpenVinoEngine:
    """Runs graphs with OpenVINO. Threads may share it; one runs at a time."""

    device = "cpu"
    backend = NAME

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions = EngineOptions(),
        plan: HostMemoryPlan | None = None,
    ) -> None:
        """Loads nothing yet.

        Args:
            bundle: holds ONNX graphs.
            options: threads, and the inference precision: bf16 for matrix products and convolutions in
                bfloat16.
            plan: which graphs are loaded together; all if None.
        """
        self.observer: Observer | None = None
        self.plan = plan
        self.cache_bytes: int | None = plan.cache if plan else None
        self._bundle = bundle
        self._specs = bundle.manifest.specs
        self._core = core()
        self._requests: dict[str, openvino.InferRequest] = {}
        self._phases: Groups = groupings(self._specs)[-1] if options.memory_budget is not None else ()
        """Graphs that run by turns, each time one picture: what others keep between two runs is freed."""
        self._phase: tuple[str, ...] = ()
        self._lock = threading.RLock()
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": _PRECISIONS[options.inference_precision],
            # what is exported leaves the weights in the bundle's file
            "CACHE_MODE": "OPTIMIZE_SIZE",
        }
        if options.threads:
            self._options["INFERENCE_NUM_THREADS"] = options.threads

    def describe(self) -> str:
        """Returns the groups of graphs that are loaded together, if not all are."""
        return self.plan.table() if self.plan else ""

    def load(self, graph: str) -> None:
        """Loads and compiles a graph; graphs of other groups are evicted."""
        with self._lock:
            if graph in self._requests:
                return
            with observed(self, "load", graph):
                if self.plan:
                    for other in self.plan.evicted_by(graph, self._requests):
                        self.unload(other)
                self._bundle.verify(graph)
                try:
                    compiled = self._compile(graph)
                except RuntimeError as error:
                    reason = str(error).strip().splitlines()[-1]
                    raise BundleError(f"OpenVINO cannot load the graph '{graph}': {reason}") from error
                spec = self._specs[graph]
                check_loaded(spec, _described(compiled.inputs, spec), _described(compiled.outputs, spec))
                self._requests[graph] = compiled.create_infer_request()

    def _compile(self, graph: str) -> openvino.CompiledModel:
        """Compiles a graph, or takes what an earlier start has compiled."""
        options, place = self._options, self._place(graph)
        if place and (known := kept(place)):
            weights = str(self._bundle.path / self._bundle.manifest.graphs[graph].files[1].path)
            # what another version wrote in the same form may still not be what this one reads
            with contextlib.suppress(RuntimeError):
                return self._core.import_model(io.BytesIO(known), "CPU", options | {"WEIGHTS_PATH": weights})
        compiled = self._core.compile_model(str(self._bundle.graph_file(graph)), "CPU", options)
        if place:
            blob = io.BytesIO()
            compiled.export_model(blob)
            keep(place, blob.getbuffer())
        return compiled

    def _place(self, graph: str) -> Path | None:
        """Returns where a compiled graph is kept: a file that is named after all that the result depends on.

        None if there is no place, or if weights that have no file of their own would be kept with it.
        """
        files, root = self._bundle.manifest.graphs[graph].files, cache_folder()
        if root is None or len(files) != 2:
            return None
        processor = [self._core.get_property("CPU", name) for name in _PROCESSOR]
        hashes = [file.sha256 for file in files]
        depends_on = repr((hashes, load_library().get_version(), processor, sorted(self._options.items())))
        return root / "openvino" / f"{hashlib.sha256(depends_on.encode()).hexdigest()[:16]}.blob"

    def unload(self, graph: str) -> None:
        """Frees a graph's weights."""
        with self._lock:
            self._requests.pop(graph, None)

    def close(self) -> None:
        """Frees the weights of all graphs."""
        with self._lock:
            self._requests.clear()

    def _begin_phase(self, graph: str) -> None:
        """Frees the scratch memory of loaded graphs, which the library keeps for the next run, but for those
        that run by turns with this one: a plan counts the largest of them alone."""
        phase = next((phase for phase in self._phases if graph in phase), self._phase)
        if phase != self._phase:
            self._phase = phase
            for other in self._requests.keys() - phase:
                self._requests[other].get_compiled_model().release_memory()
            trim()

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Runs a graph."""
        library = load_library()
        spec = self._specs[graph]
        with self._lock:
            self.load(graph)
            self._begin_phase(graph)
            with observed(self, "run", graph, inputs):
                request = self._requests[graph]
                # the request only points into the arrays: they live until it has run
                arrays = [require_shape(of.name, inputs[of.name], of.dtype) for of in spec.inputs]
                try:
                    for of, array in zip(spec.inputs, arrays):
                        request.set_tensor(of.stored_name, library.Tensor(array, shared_memory=True))
                    request.infer()
                except RuntimeError as error:
                    raise running_refusal("OpenVINO", graph, error) from error
                wanted = [spec.tensor(name) for name in outputs] if outputs else spec.outputs
                # the next call writes into the same memory
                return {of.name: np.array(request.get_tensor(of.stored_name).data) for of in wanted}

    def run_steps(
        self,
        graph: str,
        inputs: Mapping[str, Array],
        per_step: Mapping[str, Array],
        feedback: Mapping[str, str],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Runs a graph several times."""
        return run_step_by_step(self, graph, inputs, per_step, feedback, outputs)

    def to_device(self, array: Array) -> Array:
        """Copies an array: tensors are arrays in the host's memory."""
        return np.array(array)

    def to_host(self, tensor: Array) -> Array:
        """Copies a tensor."""
        return np.array(tensor)

    def concatenate(self, pieces: Sequence[tuple[Array, int, int]]) -> Array:
        """Joins rows of tensors."""
        return concatenate_rows(pieces)

    def nbytes(self, tensor: Array) -> int:
        """Returns the memory that a tensor occupies."""
        return tensor.nbytes


def _described(ports: Sequence[Any], spec: GraphSpec) -> list[LoadedTensor]:
    """Returns inputs or outputs of a compiled graph, which may have several names: that of the signature."""
    promised = {of.stored_name for of in spec.tensors}
    return [
        LoadedTensor(
            next(iter(sorted(promised & port.get_names())), port.get_any_name()),
            port.get_element_type().to_dtype().name,
            tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape()),
        )
        for port in ports
    ]


def plan_memory(bundle: Bundle, memory_budget: int | None) -> HostMemoryPlan:
    """Returns which graphs are loaded together; see `plan_host_memory`."""
    copies = _COPIES if memory_budget is None else _RESIDENT_COPIES
    return plan_host_memory(bundle, NAME, memory_budget, copies=copies, load_factor=_LOAD_FACTOR)


def usable_devices() -> dict[str, str]:
    """Returns the CPU, with the inference precisions that it has fast arithmetic for."""
    return {"cpu": f"inference precision {' or '.join(precisions())}"}


def fits(bundle: Bundle, options: EngineOptions) -> bool:
    """Returns whether the host has the memory: loading a graph takes more of it than running it."""
    try:
        return plan_memory(bundle, options.memory_budget).fits
    except BackendError:
        return False


def needed_bytes(bundle: Bundle, options: EngineOptions) -> int:
    """Returns the memory that a bundle needs, all graphs loaded; see `engines.engine.needed_bytes`."""
    return needed_host_bytes(bundle, NAME, _RESIDENT_COPIES, _LOAD_FACTOR)


def examine(bundle: Bundle, options: EngineOptions) -> tuple[str, str]:
    """Returns the device that would run a bundle, and the memory plan.

    Raises:
        BackendError: there is no such device, or not enough memory.
    """
    engine = open_engine(bundle, options)
    if engine.plan:
        engine.plan.require_fit()
    return engine.device, engine.describe()


def open_engine(bundle: Bundle, options: EngineOptions, most_cache: int | None = None) -> OpenVinoEngine:
    """Returns the engine for a bundle; see `engines.engine.open_engine`."""
    available = precisions()
    if options.device == "cuda":
        raise BackendError(
            "OpenVINO does not run on NVIDIA cards: use --backend onnxruntime, or --device cpu"
        )
    if options.inference_precision not in available:
        raise BackendError(
            f"this processor has no {options.inference_precision} arithmetic: run with "
            "--inference-precision fp32"
        )
    return OpenVinoEngine(bundle, options, plan_memory(bundle, options.memory_budget))
