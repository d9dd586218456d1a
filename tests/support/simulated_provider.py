"""ONNX Runtime's CUDA provider on a simulated card, as far as our code meets it.

It keeps what the provider promises and no more: a run reads and writes bound addresses when the stream gets
there, a captured run is replayed with the addresses and shapes that it was captured with, whatever is bound
by then, a capture belongs to a thread and cannot be dropped, and every run fills the scratch memory that all
sessions share with not-a-numbers. The options of a session and of its runs are the library's own.

Not simulated: anything else of CUDA or the provider. The numbers are the CPU provider's.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from engines.backends.onnxruntime.cuda import NOT_CAPTURED, PROVIDER
from engines.backends.onnxruntime.engine import OnnxRuntimeEngine
from engines.bundle import Bundle
from tests.support.simulated_card import GARBAGE, Shape, SimulatedDevice

Bound = dict[str, tuple[str, Shape, int]]
"""Name in the graph's file -> dtype, shape and address."""


class SimulatedLibrary:
    """The onnxruntime package, built for cards."""

    __version__ = "1.31.1"
    OrtAllocatorType = onnxruntime.OrtAllocatorType
    OrtMemType = onnxruntime.OrtMemType
    RunOptions = onnxruntime.RunOptions
    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, bundle: Bundle, device: SimulatedDevice) -> None:
        self.device = device
        self.bundle = bundle
        self.engine = OnnxRuntimeEngine(bundle)
        self.arenas: list[dict[str, int]] = []
        self.scratch = (0, 0)
        """Address and size of the memory that sessions to come share with those that were made since it is
        there."""
        self.opened: list[str] = []
        self.sessions: list[SimulatedSession] = []
        self.bindings = 0

    def set_default_logger_severity(self, severity: int) -> None:
        pass

    def preload_dlls(self) -> None:
        print("Failed to load libcublasLt.so.13")

    def OrtMemoryInfo(self, name: str, kind: Any, device: int, where: Any) -> str:  # noqa: N802
        assert (kind, where) == (self.OrtAllocatorType.ORT_ARENA_ALLOCATOR, self.OrtMemType.DEFAULT)
        return f"{name}:{device}"

    def OrtArenaCfg(self, content: dict[str, int]) -> dict[str, int]:  # noqa: N802
        onnxruntime.OrtArenaCfg(content)  # knows the keys
        return content

    def create_and_register_allocator_v2(
        self, provider: str, where: str, options: Mapping[str, str], arena: dict[str, int]
    ) -> None:
        assert (provider, where, options) == (PROVIDER, "Cuda:0", {})
        nbytes = arena["initial_chunk_size_bytes"]
        self.arenas.append(arena)
        self.scratch = self.device.allocate(nbytes), nbytes

    def InferenceSession(  # noqa: N802
        self,
        path: str,
        options: onnxruntime.SessionOptions,
        providers: Sequence[tuple[str, dict[str, str]]],
        enable_fallback: int,
    ) -> SimulatedSession:
        assert not enable_fallback
        graph = Path(path).stem
        self.opened.append(graph)
        self.sessions.append(SimulatedSession(self, graph, options, *providers))
        return self.sessions[-1]


class SimulatedSession:
    """A session whose graph is on the card."""

    def __init__(
        self,
        library: SimulatedLibrary,
        graph: str,
        options: onnxruntime.SessionOptions,
        provider: tuple[str, dict[str, str]],
    ) -> None:
        name, self.provider_options = provider
        assert name == PROVIDER
        assert self.provider_options["user_compute_stream"] == str(library.device.stream)
        assert options.get_session_config_entry("session.use_env_allocators") == "1"
        self.graph = graph
        self.options = options
        self.captured: dict[tuple[int, str], Bound] = {}
        """Thread and `gpu_graph_id` -> what was bound when it was captured."""
        self.replays = 0
        self.scratch = library.scratch
        self._library = library

    def get_providers(self) -> list[str]:
        return [PROVIDER, "CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    @property
    def _session(self) -> Any:
        """The same graph on the CPU."""
        self._library.engine.load(self.graph)
        return self._library.engine._sessions[self.graph]

    def io_binding(self) -> SimulatedBinding:
        self._library.bindings += 1
        return SimulatedBinding()

    def run_with_iobinding(self, binding: SimulatedBinding, options: onnxruntime.RunOptions) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        number = options.get_run_config_entry("gpu_graph_id")
        if self.provider_options["enable_cuda_graph"] == "0" or number == str(NOT_CAPTURED):
            self._submit(binding.bound)
            return
        key = threading.get_ident(), number
        if key not in self.captured:
            # once to allocate, once to capture
            self._submit(binding.bound)
            self.captured[key] = dict(binding.bound)
        else:
            self.replays += 1
        self._submit(self.captured[key])

    def _submit(self, bound: Bound) -> None:
        self._library.device.submit(lambda bound=dict(bound): self._run(bound))

    def _run(self, bound: Bound) -> None:
        """Computes the graph from memory to memory."""
        device, engine = self._library.device, self._library.engine
        device.view(self.scratch[0], (self.scratch[1],), "uint8")[:] = GARBAGE
        spec = self._library.bundle.manifest.specs[self.graph]
        arrays = {}
        for of in spec.inputs:
            dtype, shape, address = bound[of.stored_name]
            arrays[of.name] = device.view(address, shape, dtype).copy()
        for name, value in engine.run(self.graph, arrays).items():
            dtype, shape, address = bound[spec.tensor(name).stored_name]
            array = engine.to_host(value)
            assert (array.dtype, array.shape) == (np.dtype(dtype), shape)
            device.view(address, shape, dtype)[...] = array


class SimulatedBinding:
    """ONNX Runtime's IOBinding."""

    def __init__(self) -> None:
        self.bound: Bound = {}

    def bind_input(
        self, name: str, kind: str, device: int, dtype: np.dtype[Any], shape: list[int], address: int
    ) -> None:
        assert (kind, device) == ("cuda", 0)
        self.bound[name] = (str(np.dtype(dtype)), tuple(shape), address)

    bind_output = bind_input
