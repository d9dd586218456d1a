"""Loads ONNX graphs into ONNX Runtime's CUDA provider, on an NVIDIA card. `engines.card.engine` runs them.

The provider works in our stream, on our addresses, and does not wait for what it put there. Two things it
does itself, and this is what is known of them (source: onnxruntime/core/providers/cuda and core/framework):

    memory    It asks us for weights and scratch memory (`provider_memory`): a session takes the allocator
              that was registered last when it was made. The sessions of all engines of a process share
              scratch memory, and so never run at the same time (`SharedStream`).
    captures  It captures a call itself, one CUDA graph per `gpu_graph_id`, and keeps it as long as the
              session. A captured graph belongs to the thread that ran it, so all calls come from one thread.
              Whatever another thread allocates or copies meanwhile spoils a capture. It reads pinned memory
              that versions before 1.30 give to the next call, whose results are then wrong.

A captured graph uses scratch memory that its session has given back. So what a session keeps must never lie
there: weights do not, and what goes in and out is in our arena.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import weakref
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends.onnxruntime.cuda_refusals import (
    NOT_STARTED,
    loading_refusal,
    reason,
    running_refusal,
    scratch_refusal,
)
from engines.backends.onnxruntime.provider_memory import ProviderMemory
from engines.backends.onnxruntime.session_check import check_session
from engines.bundle import Bundle
from engines.card.engine import CardEngine
from engines.card.graph import Shape
from engines.cuda import Device, OutOfDeviceMemoryError
from engines.errors import BackendError
from engines.manifest import CUDA, ONNX
from engines.memory_plan import DeviceMemoryPlan, plan_for_card
from engines.options import EngineOptions
from engines.spec import CAPTURED_ROLES, GraphSpec

PROVIDER = "CUDAExecutionProvider"

FIRST_VERSION = (1, 30)
"""Before, a replayed graph reads memory that other calls have overwritten (pull request 32121)."""

MOST_CAPTURED = 16
"""Sets of shapes of a graph that are captured; the provider keeps each until the graph is unloaded."""

NOT_CAPTURED = -1
"""The `gpu_graph_id` that runs a graph without capture."""

MAPPED_FILES = Path("/proc/self/maps")
"""The file in which Linux lists the loaded libraries."""

_FATAL = 4
"""Severity of what the library logs."""

_SMALL_WORKSPACES = ":4096:2:16:8"
"""Workspaces of cuBLAS: two of 4 MB and eight of 16 KB, and not 32 MB. Each session has its own. On an H200
they took 0.29 GB less in all, and no time (docs/studies/h100.md)."""


def preload(library: Any) -> None:
    """Loads the CUDA and cuDNN libraries of pip packages, if they are installed.

    Without them the system's are used, where its loader finds them.
    """
    # it prints what it does not find, although the system may have it
    with contextlib.redirect_stdout(io.StringIO()):
        library.preload_dlls()


def loaded_libraries(maps: Path = MAPPED_FILES) -> str:
    """Returns the CUDA and cuDNN libraries of this process and the folders that they lie in; empty where the
    system does not say."""
    try:
        lines = maps.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    found: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        match = re.search(r"(/\S*)/lib(cudart|cublas|cudnn|cufft|curand|nvrtc)\.so", line)
        if match:
            found[match[1]].add(match[2])
    return "; ".join(f"{', '.join(sorted(names))} in {folder}" for folder, names in sorted(found.items()))


def provider_options(stream: int, tf32: bool, capture: bool) -> dict[str, str]:
    """Returns the provider's options for a session.

    Args:
        stream: where it puts its work.
        tf32: whether products of float32 numbers may be computed in TF32.
        capture: whether calls are captured as CUDA graphs.
    """
    return {
        "user_compute_stream": str(stream),
        "use_tf32": str(int(tf32)),
        "enable_cuda_graph": str(int(capture)),
        # a search would take whichever algorithm was fastest today: other bits after the next start
        "cudnn_conv_algo_search": "HEURISTIC",
        # sums in float32, not in the precision of the graph
        "enable_skip_layer_norm_strict_mode": "1",
    }


def session_options(library: Any, bundle: Bundle) -> Any:
    """Returns the session options.

    Args:
        library: the onnxruntime package.
        bundle: holds the graphs and their weights.
    """
    options = library.SessionOptions()
    options.use_deterministic_compute = True
    # what a set of shapes needs as one block is more than what single pieces need
    options.enable_mem_pattern = False
    # results that nobody needs any more would be held for later ones of their shape: at full size, 900 MB for
    # four samples instead of 434
    options.enable_mem_reuse = False
    for key, value in {
        "session.use_env_allocators": "1",
        "session.model_external_initializers_file_folder_path": str(bundle.path),
    }.items():
        options.add_session_config_entry(key, value)
    return options


def register(library: Any, memory: ProviderMemory) -> None:
    """Makes the sessions to come take their memory from ours, and has them take less beside it.

    Args:
        library: the onnxruntime package.
        memory: where from.

    Raises:
        BackendError: the provider does not start.
    """
    # whoever has set it knows better
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _SMALL_WORKSPACES)
    kind = library.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    where = library.OrtMemoryInfo("Cuda", kind, 0, library.OrtMemType.DEFAULT)
    # an arena that is not made: the library wants its configuration all the same
    arena = library.OrtArenaCfg({})
    try:
        library.create_and_register_allocator_v2(PROVIDER, where, memory.options(), arena)
    except Exception as error:  # the library raises classes of its own, all derived from Exception
        raise BackendError(f"{NOT_STARTED} ({reason(error)})") from error


class SharedStream:
    """What all engines of a process share, because their sessions may share scratch memory.

    Everything goes into one stream, so no two graphs run at the same time. Everything is done under one lock,
    since a capture in one engine must not see what another one does.
    """

    def __init__(self) -> None:
        """Shares nothing yet."""
        self.lock = threading.RLock()
        """Held around everything that is done with the card."""
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="cuda-provider")
        """Makes and runs all sessions: captured graphs belong to a thread."""
        self.memory: ProviderMemory | None = None
        """What all sessions take theirs from; None before there is one."""
        self._stream: int | None = None
        self._plans = weakref.WeakKeyDictionary[Sessions, DeviceMemoryPlan]()

    def new_device(self) -> Device:
        """Returns memory of its own on the card, with the common stream."""
        device = Device(self._stream)
        self._stream = device.stream
        return device

    def provide_memory(self, sessions: Sessions, library: Any, plan: DeviceMemoryPlan) -> ProviderMemory:
        """Allocates scratch memory for the sessions of one more engine, and returns where they take it from.

        They share it with those of the other engines. So it has to suffice for each engine, and its limit for
        the weights of all of them.

        Raises:
            BackendError: the provider does not start, or there is not enough memory.
        """
        if self.memory is None:
            memory = ProviderMemory(self.new_device())
            register(library, memory)
            self.memory = memory
        if not self._plans:
            # no captured graph uses it any more
            self.memory.scratch.drop_unused()
        self._plans[sessions] = plan
        plans = list(self._plans.values())
        self.memory.limit = sum(each.library_limit for each in plans)
        try:
            self.memory.reserve_scratch(max(each.library for each in plans))
        except OutOfDeviceMemoryError as error:
            raise scratch_refusal(error) from error
        return self.memory


class Sessions:
    """Loads graphs of a bundle with the CUDA provider, and runs them."""

    def __init__(
        self,
        library: Any,
        bundle: Bundle,
        shared: SharedStream,
        stream: int,
        plan: DeviceMemoryPlan,
        options: EngineOptions,
    ) -> None:
        """Allocates scratch memory.

        Args:
            library: the onnxruntime package.
            bundle: holds the graphs.
            shared: with the other engines of the process.
            stream: where their work goes; that of `shared`.
            plan: how much memory they may take.
            options: precision, and whether calls are captured.
        """
        self.library = library
        self.bundle = bundle
        self.stream = stream
        self.thread = shared.thread
        self._plan = plan
        self._options = options
        preload(library)
        self.memory = shared.provide_memory(self, library, plan)

    def open_graph(self, graph: str) -> LoadedSession:
        """Loads a graph's weights onto the card.

        Raises:
            BackendError: the provider does not start, or there is not enough memory.
            BundleError: the library cannot load the graph, or it is another than in the manifest.
        """
        spec = self.bundle.manifest.specs[graph]
        capture = self._options.cuda_graphs and spec.role in CAPTURED_ROLES
        provider = provider_options(self.stream, self._options.inference_precision == "tf32", capture)
        try:
            with self.memory.loading(self._plan.graphs[graph].weights):
                session = self.thread.submit(
                    self.library.InferenceSession,
                    str(self.bundle.graph_file(graph, CUDA)),
                    session_options(self.library, self.bundle),
                    [(PROVIDER, provider)],
                    # on the CPU it would fail later, for another reason
                    enable_fallback=0,
                ).result()
        except Exception as error:
            raise loading_refusal(graph, capture, self.memory.refusal() or error) from error
        # where the provider's own library cannot be loaded, the session has none
        if PROVIDER not in session.get_providers():
            raise BackendError(NOT_STARTED)
        check_session(spec, session)
        return LoadedSession(self, session, spec, capture)


class LoadedSession:
    """A graph whose weights are on the card; see `engines.card.graph.LoadedGraph`."""

    scratch = 0

    def __init__(self, sessions: Sessions, session: Any, spec: GraphSpec, capture: bool) -> None:
        """Takes over a session; `Sessions.open_graph` is the way to get one."""
        self.sessions = sessions
        self.session = session
        self.spec = spec
        self._capture = capture
        self._numbers: dict[tuple[Shape, ...], int] = {}
        """Shapes of a call that is captured -> its `gpu_graph_id`."""

    def new_context(self) -> BoundCall:
        """Returns the resources for calls of one set of shapes."""
        return BoundCall(self)

    def number(self, shapes: tuple[Shape, ...]) -> int:
        """Returns the `gpu_graph_id` of shapes: the one they had before, a new one, or none if there are too
        many."""
        if self._capture and len(self._numbers) < MOST_CAPTURED:
            self._numbers.setdefault(shapes, len(self._numbers) + 1)
        return self._numbers.get(shapes, NOT_CAPTURED)

    def keep_compiled_kernels(self) -> None:
        """Does nothing: the provider brings its kernels."""


class BoundCall:
    """Runs a session on addresses of the arena; see `engines.card.graph.Context`."""

    def __init__(self, loaded: LoadedSession) -> None:
        """Binds nothing yet.

        Args:
            loaded: the graph.
        """
        self._loaded = loaded
        self._binding = loaded.session.io_binding()
        self._options = loaded.sessions.library.RunOptions()
        # whoever wants the results waits for the stream
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def prepare(
        self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], scratch: int, scratch_size: int
    ) -> None:
        """Binds inputs and outputs; the provider has scratch memory of its own."""
        spec, binding = self._loaded.spec, self._binding
        sizes = spec.sizes(shapes)
        for tensors, bind in ((spec.inputs, binding.bind_input), (spec.outputs, binding.bind_output)):
            for of in tensors:
                bind(
                    of.stored_name,
                    "cuda",
                    0,
                    np.dtype(of.dtype),
                    list(of.resolve(sizes)),
                    addresses[of.name],
                )
        number = self._loaded.number(tuple(shapes[of.name] for of in spec.inputs))
        self._options.add_run_config_entry("gpu_graph_id", str(number))

    def enqueue(self, stream: int) -> None:
        """Runs the session; the first time that a captured call is made, the provider runs it twice."""
        run = self._loaded.session.run_with_iobinding
        try:
            self._loaded.sessions.thread.submit(run, self._binding, self._options).result()
        except Exception as error:
            refusal = self._loaded.sessions.memory.refusal()
            raise running_refusal(self._loaded.spec.name, refusal or error) from error

    def capturable(self, stream: int) -> bool:
        """Returns False: the provider launches its own captured graph, which no other may contain."""
        return False


_OF_THIS_PROCESS = SharedStream()


def open_card_engine(
    library: Any, bundle: Bundle, options: EngineOptions, most_cache: int | None = None
) -> CardEngine:
    """Returns the engine for a bundle of ONNX graphs on a card; see `engines.engine.open_engine`."""
    # for some convolutions cuDNN has no plan without tensor cores; they run with another, and every one is
    # logged as an error. What really fails is raised, too
    library.set_default_logger_severity(_FATAL)
    shared = _OF_THIS_PROCESS
    with shared.lock:
        device = shared.new_device()
        plan = plan_for_card(bundle.manifest, options.memory_budget, device.card().free, most_cache)
        sessions = Sessions(library, bundle, shared, device.stream, plan, options)
        opened = sessions.open_graph
        return CardEngine(ONNX, bundle, device, opened, plan, options.cuda_graphs, shared.lock)


def scratch_memory() -> tuple[int, int]:
    """Returns the bytes of scratch memory of all sessions of this process, and the most that were in use."""
    memory = _OF_THIS_PROCESS.memory
    return (memory.scratch.nbytes, memory.scratch.most_used) if memory else (0, 0)
