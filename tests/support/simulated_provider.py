"""ONNX Runtime's CUDA provider on a simulated card, as far as our code meets it.

It keeps what the provider promises and no more: a run reads and writes bound addresses when the stream gets
there, a captured run is replayed with the addresses and shapes that it was captured with, whatever is bound
by then, a capture belongs to a thread and cannot be dropped. It takes all memory through the C functions that
it was given: weights when a session is made, which must be untouched at every run, and scratch memory in a
run, which is given back before the run ends, and which every replay of it fills with not-a-numbers again. The
options of a session and of its runs are the library's own.

Not simulated: anything else of CUDA or the provider. The numbers are the CPU provider's.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
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

Pieces = dict[int, int]
"""Address -> bytes."""

WEIGHT = 0x55
"""What all bytes of weights are."""


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
        self.registered = 0
        """How often an allocator was registered."""
        self.weights = [1 << 20, 3 << 10, 100]
        """Bytes of the weights of each graph."""
        self.scratch = [1 << 19, 1 << 20]
        """Bytes of scratch memory that each run takes."""
        self.take: Callable[[int], int | None] = lambda nbytes: None
        self.give_back: Callable[[int], None] = lambda address: None
        self.opened: list[str] = []
        self.bindings = 0
        self._sessions: list[weakref.ref[SimulatedSession]] = []

    @property
    def sessions(self) -> list[SimulatedSession]:
        """Those that somebody still has, the oldest first."""
        return [session for reference in self._sessions if (session := reference())]

    def set_default_logger_severity(self, severity: int) -> None:
        pass

    def preload_dlls(self) -> None:
        print("Failed to load libcublasLt.so.13")

    def OrtMemoryInfo(self, name: str, kind: Any, device: int, where: Any) -> str:  # noqa: N802
        assert (kind, where) == (self.OrtAllocatorType.ORT_ARENA_ALLOCATOR, self.OrtMemType.DEFAULT)
        return f"{name}:{device}"

    def OrtArenaCfg(self, content: dict[str, int]) -> dict[str, int]:  # noqa: N802
        assert content == {}, "of no arena"
        return content

    def create_and_register_allocator_v2(
        self, provider: str, where: str, options: Mapping[str, str], arena: dict[str, int]
    ) -> None:
        assert (provider, where) == (PROVIDER, "Cuda:0")
        self.registered += 1
        self.take = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(int(options["gpu_external_alloc"]))
        self.give_back = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(int(options["gpu_external_free"]))

    def taken(self, sizes: Sequence[int]) -> Pieces:
        """Returns memory from whom it was registered."""
        pieces = {}
        for nbytes in sizes:
            address = self.take(nbytes)
            if address is None:
                self.given_back(pieces)
                raise RuntimeError("p != nullptr was false")
            pieces[address] = nbytes
        return pieces

    def given_back(self, pieces: Pieces) -> None:
        """Gives it back."""
        for address in pieces:
            self.give_back(address)

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
        session = SimulatedSession(self, graph, options, *providers)
        self._sessions.append(weakref.ref(session))
        return session


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
        self.captured: dict[tuple[int, str], tuple[Bound, Pieces]] = {}
        """Thread and `gpu_graph_id` -> what was bound when it was captured, and scratch memory."""
        self.replays = 0
        self.weights = library.taken(library.weights)
        self._library = library
        for address, nbytes in self.weights.items():
            library.device.view(address, (nbytes,), "uint8")[:] = WEIGHT
        weakref.finalize(self, library.given_back, self.weights)

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
            self._submit(binding.bound, self._scratch())
            return
        key = threading.get_ident(), number
        if key not in self.captured:
            # once to allocate, once to capture
            self._submit(binding.bound, self._scratch())
            self.captured[key] = dict(binding.bound), self._scratch()
        else:
            self.replays += 1
        self._submit(*self.captured[key])

    def _scratch(self) -> Pieces:
        """Returns scratch memory that was taken and given back."""
        pieces = self._library.taken(self._library.scratch)
        self._library.given_back(pieces)
        return pieces

    def _submit(self, bound: Bound, scratch: Pieces) -> None:
        self._library.device.submit(lambda bound=dict(bound): self._run(bound, scratch))

    def _run(self, bound: Bound, scratch: Pieces) -> None:
        """Computes the graph from memory to memory."""
        device, engine = self._library.device, self._library.engine
        for address, nbytes in scratch.items():
            device.view(address, (nbytes,), "uint8")[:] = GARBAGE
        for address, nbytes in self.weights.items():
            assert np.all(device.view(address, (nbytes,), "uint8") == WEIGHT), "weights were overwritten"
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
