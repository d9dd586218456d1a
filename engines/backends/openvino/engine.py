"""OpenVINO: runs a bundle's ONNX graphs on the CPU. See `engines.engine.Engine`.

Each graph is compiled once, with its variable dimensions left open: a call of another batch costs no new
compilation. What compiling found out is kept for the next start, without the weights: a few MB, for a fifth
of the time. Tensors are NumPy arrays in the host's memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.bundle import Bundle
from engines.cache_folder import cache_folder, mark_used
from engines.engine import Array, concatenate_rows, require_shape, run_step_by_step
from engines.errors import BackendError, BundleError
from engines.memory_plan import HostResidency, plan_host_residency

if TYPE_CHECKING:
    import openvino

INSTALL = "install it with: pip install 'anydoor-runtime[openvino]'"

_CONVERTERS = "openvino.tools"
"""The package's model converters: of no use to a runtime, and half of the time that importing it takes."""

_COPIES = 1.0
"""Memory that a loaded graph takes, as a multiple of its file: the weights in their final layout. The file
stays mapped beside them, but it was only read, and the system may take its pages back at any time. To count
them too would make graphs take turns, which costs seconds at each new reference, where all of them fit."""

_RESIDENT_COPIES = 2.0
"""The same with the pages of the file. A budget is a promise of how large the process will be seen to be, and
pages that nobody takes back are part of that."""

_LOAD_FACTOR = 0.4
"""What loading takes beside that (the ID encoder's)."""

_PROCESSOR = ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
"""What tells processors apart for which graphs are compiled differently."""

_PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def load_library() -> Any:
    """The openvino package, without its model converters.

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
    """The library's core, one for all engines of the process, and until it ends.

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
    """The precisions that this machine's processor has fast arithmetic for.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    capabilities = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return [name for name in _PRECISIONS if name.upper() in capabilities]


class OpenVinoEngine:
    """Runs graphs with OpenVINO; see `engines.engine.Engine`. Threads may share it; they take turns."""

    device = "cpu"
    backend = "openvino"

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        residency: HostResidency | None = None,
        inference_precision: str = "fp32",
    ) -> None:
        """Loads nothing yet.

        Args:
            bundle: holds ONNX graphs.
            threads: CPU threads of one call; as many as there are cores if None.
            residency: which graphs are loaded together; all if None.
            inference_precision: fp32, or bf16 for matrix products and convolutions in bfloat16.
        """
        self.residency = residency
        self.cache_bytes: int | None = residency.cache if residency else None
        self._bundle = bundle
        self._specs = bundle.manifest.specs
        self._core = core()
        self._requests: dict[str, openvino.InferRequest] = {}
        self._lock = threading.RLock()
        self._options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": _PRECISIONS[inference_precision],
        }
        if threads:
            self._options["INFERENCE_NUM_THREADS"] = threads

    def describe(self) -> str:
        """What is loaded together, if not everything is."""
        return self.residency.table() if self.residency else ""

    def load(self, graph: str) -> None:
        """Loads and compiles a graph; graphs of other groups leave. See `Engine.load`."""
        with self._lock:
            if graph in self._requests:
                return
            if self.residency:
                for other in self.residency.leaving(graph, self._requests):
                    self.unload(other)
            self._bundle.verify(graph)
            try:
                compiled = self._compile(graph)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise BundleError(f"OpenVINO cannot load the graph '{graph}': {reason}") from error
            self._requests[graph] = compiled.create_infer_request()

    def _compile(self, graph: str) -> openvino.CompiledModel:
        file = str(self._bundle.graph_file(graph))
        if kept := self._kept_options(graph):
            # the library makes a file anew that was cut short; nothing else there may matter either
            with contextlib.suppress(RuntimeError):
                return self._core.compile_model(file, "CPU", self._options | kept)
        return self._core.compile_model(file, "CPU", self._options)

    def _kept_options(self, graph: str) -> dict[str, str]:
        """Options with which the library keeps what it compiles, and takes what it kept; empty if it cannot.

        Each graph has a folder of its own that is named after all that the result depends on. The library
        looks at names and times of files, not at those of the weights, and has no hash of what it keeps.
        """
        files = self._bundle.manifest.graphs[graph].files
        root = cache_folder()
        if root is None or len(files) != 2:
            return {}
        processor = [self._core.get_property("CPU", name) for name in _PROCESSOR]
        hashes = [file.sha256 for file in files]
        depends_on = repr((hashes, load_library().get_version(), processor, sorted(self._options.items())))
        folder = root / "openvino" / hashlib.sha256(depends_on.encode()).hexdigest()[:16]
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return {}
        mark_used(folder)
        weights = self._bundle.path / files[1].path
        return {"CACHE_DIR": str(folder), "CACHE_MODE": "OPTIMIZE_SIZE", "WEIGHTS_PATH": str(weights)}

    def unload(self, graph: str) -> None:
        """Frees a graph's weights; see `Engine.unload`."""
        with self._lock:
            self._requests.pop(graph, None)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Runs a graph; see `Engine.run`."""
        library = load_library()
        with self._lock:
            self.load(graph)
            request = self._requests[graph]
            # the request only points into the arrays: they live until it has run
            arrays = [require_shape(s.name, inputs[s.name], s.dtype) for s in self._specs[graph].inputs]
            for spec, array in zip(self._specs[graph].inputs, arrays):
                request.set_tensor(spec.name, library.Tensor(array, shared_memory=True))
            request.infer()
            names = outputs or [spec.name for spec in self._specs[graph].outputs]
            # the next call writes into the same memory
            return {name: np.array(request.get_tensor(name).data) for name in names}

    def run_steps(
        self,
        graph: str,
        inputs: Mapping[str, Array],
        per_step: Mapping[str, Array],
        feedback: Mapping[str, str],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Array]:
        """Runs a graph several times; see `Engine.run_steps`."""
        return run_step_by_step(self, graph, inputs, per_step, feedback, outputs)

    def to_device(self, array: Array) -> Array:
        """See `Engine.to_device`."""
        return np.array(array)

    def to_host(self, tensor: Array) -> Array:
        """See `Engine.to_host`."""
        return np.array(tensor)

    def concatenate(self, pieces: Sequence[tuple[Array, int, int]]) -> Array:
        """See `Engine.concatenate`."""
        return concatenate_rows(pieces)

    def nbytes(self, tensor: Array) -> int:
        """See `Engine.nbytes`."""
        return tensor.nbytes


def plan_residency(bundle: Bundle, memory_budget: int | None) -> HostResidency:
    """Which graphs are loaded together; see `plan_host_residency`."""
    copies = _COPIES if memory_budget is None else _RESIDENT_COPIES
    return plan_host_residency(
        bundle, memory_budget, fused_attention=True, copies=copies, load_factor=_LOAD_FACTOR
    )


def open_engine(
    bundle: Bundle,
    device: str,
    threads: int | None,
    memory_budget: int | None = None,
    inference_precision: str = "fp32",
) -> OpenVinoEngine:
    """The engine for a bundle; see `engines.engine.open_engine`."""
    available = precisions()
    if device == "cuda":
        raise BackendError(
            "OpenVINO does not run on NVIDIA cards: use --backend onnxruntime, or --device cpu"
        )
    if inference_precision not in available:
        raise BackendError(
            f"this processor has no {inference_precision} arithmetic: run with --inference-precision fp32"
        )
    residency = plan_residency(bundle, memory_budget)
    return OpenVinoEngine(bundle, threads, residency, inference_precision)
