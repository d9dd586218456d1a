"""ONNX Runtime: runs a bundle's graphs on the CPU, or on an NVIDIA card through the CUDA execution provider.

Both go the same way: inputs and outputs are values on the device, bound to the call, so what one graph leaves
there the next one takes without a copy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.bundle import Bundle
from engines.engine import Array, DeviceTensor, require_shape
from engines.errors import BackendError, BundleError
from engines.graphs import TensorSpec

if TYPE_CHECKING:
    import onnxruntime

INSTALL = "install it with: pip install 'anydoor-runtime[cpu]' (or [cuda] for an NVIDIA card)"

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_SHARE_FOR_KEPT_TENSORS = 8
"""Part of a card's memory for tensors that are kept; the rest is for weights and intermediate results."""


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


@functools.cache
def _share_host_memory() -> None:
    """Lets all graphs take their intermediate results from one arena, since they never run at once.

    By default every session keeps an arena of its own. At 512 px that is several gigabytes each, mostly for
    the attention of the largest feature maps.
    """
    library = load_library()
    kind = library.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    host = library.OrtMemoryInfo("Cpu", kind, 0, library.OrtMemType.DEFAULT)
    library.create_and_register_allocator(host, None)


def devices() -> list[str]:
    """The devices that the installed ONNX Runtime was built for, best first."""
    available = load_library().get_available_providers()
    return [device for device in ("cuda", "cpu") if _PROVIDERS[device] in available]


class OnnxRuntimeEngine:
    """Runs graphs with ONNX Runtime; see `engines.engine.Engine`."""

    cache_bytes: int | None = None

    def __init__(
        self, bundle: Bundle, device: str, threads: int | None = None, memory_budget: int | None = None
    ) -> None:
        self.device = device
        self._provider_options = {}
        if device == "cuda":
            # grow by what is asked for: doubling would take twice what a graph needs
            self._provider_options["arena_extend_strategy"] = "kSameAsRequested"
            if memory_budget is not None:
                self._provider_options["gpu_mem_limit"] = str(memory_budget)
                self.cache_bytes = memory_budget // _SHARE_FOR_KEPT_TENSORS
        self._library = load_library()
        self._bundle = bundle
        self._specs = bundle.manifest.specs
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self._options = self._library.SessionOptions()
        # idle threads sleep at once: a server, or the other graphs, need the cores more than a spinning loop
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        _share_host_memory()
        self._options.add_session_config_entry("session.use_env_allocators", "1")
        # where a model that is not loaded from its file finds its weights
        self._options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(bundle.path)
        )
        if threads:
            self._options.intra_op_num_threads = threads

    def describe(self) -> str:
        """Nothing to tell: ONNX Runtime keeps what was loaded."""
        return ""

    def load(self, graph: str) -> None:
        """Loads a graph's weights; see `Engine.load`."""
        if graph in self._sessions:
            return
        self._bundle.verify(graph)
        try:
            session = self._library.InferenceSession(
                self.model(graph, self._bundle.graph_file(graph)),
                self._options,
                providers=[(_PROVIDERS[self.device], self._provider_options)],
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
        self._sessions[graph] = session

    def model(self, graph: str, path: Path) -> str | bytes:
        """What to run for a graph: the file, or a model in memory whose weights lie beside the file."""
        return str(path)

    def unload(self, graph: str) -> None:
        """Frees a graph's weights; see `Engine.unload`."""
        self._sessions.pop(graph, None)

    def run(
        self,
        graph: str,
        inputs: Mapping[str, DeviceTensor | Array],
        outputs: Sequence[str] | None = None,
    ) -> dict[str, DeviceTensor]:
        """Runs a graph; see `Engine.run`."""
        self.load(graph)
        session = self._sessions[graph]
        binding = session.io_binding()
        # a value on the CPU only points into its array, and the binding keeps neither alive
        values = {spec.name: self._value(spec, inputs[spec.name]) for spec in self._specs[graph].inputs}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        names = list(outputs or (spec.name for spec in self._specs[graph].outputs))
        for name in names:
            binding.bind_output(name, self.device)
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs()))

    def _value(self, spec: TensorSpec, given: DeviceTensor | Array) -> DeviceTensor:
        if isinstance(given, np.ndarray):
            return self.to_device(require_shape(spec.name, given, spec.dtype))
        return given

    def to_device(self, array: Array) -> DeviceTensor:
        """See `Engine.to_device`."""
        return self._library.OrtValue.ortvalue_from_numpy(array, self.device)

    def to_host(self, tensor: DeviceTensor) -> Array:
        """See `Engine.to_host`."""
        return tensor.numpy()  # type: ignore[no-any-return]

    def concatenate(self, pieces: Sequence[tuple[DeviceTensor, int, int]]) -> DeviceTensor:
        """See `Engine.concatenate`. ONNX Runtime copies between tensors through the host only."""
        host = {id(tensor): self.to_host(tensor) for tensor, _, _ in pieces}
        return self.to_device(
            np.concatenate([host[id(tensor)][start:stop] for tensor, start, stop in pieces])
        )

    def nbytes(self, tensor: DeviceTensor) -> int:
        """See `Engine.nbytes`."""
        return int(tensor.tensor_size_in_bytes())


def open_engine(
    bundle: Bundle, device: str, threads: int | None, memory_budget: int | None = None
) -> OnnxRuntimeEngine:
    """The engine for a bundle; see `engines.engine.open_engine`."""
    available = devices()
    if device == "auto":
        device = available[0]
    if device not in available:
        raise BackendError(f"the installed ONNX Runtime has no {device} provider; {INSTALL}")
    return OnnxRuntimeEngine(bundle, device, threads, memory_budget)
