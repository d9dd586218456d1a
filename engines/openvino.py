"""OpenVINO: runs a bundle's ONNX graphs on the CPU. See `engines.engine.Engine`.

Each graph is compiled once, with its variable dimensions left open: a call of another batch costs no new
compilation. Tensors are NumPy arrays in the host's memory.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.bundle import Bundle
from engines.engine import Array, concatenate_rows, require_shape, run_step_by_step
from engines.errors import BackendError, BundleError
from engines.residency import HostResidency, plan_host_residency

if TYPE_CHECKING:
    import openvino

INSTALL = "install it with: pip install 'anydoor-runtime[openvino]'"

_CONVERTERS = "openvino.tools"
"""The package's model converters: of no use to a runtime, and half of the time that importing it takes."""

_COPIES = 2.0
"""Memory that a loaded graph takes, as a multiple of its file: that stays mapped beside the weights in their
final layout."""

_LOAD_FACTOR = 0.4
"""What loading takes beside that (the ID encoder's)."""

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


def precisions() -> list[str]:
    """The precisions that this machine's processor has fast arithmetic for.

    Raises:
        BackendError: OpenVINO is not installed.
    """
    capabilities = load_library().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
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
        self._core = load_library().Core()
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
                compiled = self._core.compile_model(str(self._bundle.graph_file(graph)), "CPU", self._options)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1]
                raise BundleError(f"OpenVINO cannot load the graph '{graph}': {reason}") from error
            self._requests[graph] = compiled.create_infer_request()

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
    return plan_host_residency(
        bundle, memory_budget, fused_attention=True, copies=_COPIES, load_factor=_LOAD_FACTOR
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
