"""Loads ONNX graphs into ONNX Runtime's CUDA provider, on an NVIDIA card. `engines.card.engine` runs them.

The provider works in our stream, on our addresses, and does not wait for what it put there. Two things it
does itself, and this is what is known of them (source: onnxruntime/core/providers/cuda and core/framework):

    memory    Weights and scratch memory are its own. Weights are allocated one by one, and freed with the
              session. Scratch memory is an arena of the whole process: a session takes from the arena that
              was registered last when it was made. So the sessions of all engines of a process may share
              one, and never run at the same time (`SharedStream`).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.backends.onnxruntime.cuda_refusals import (
    NOT_STARTED,
    loading_refusal,
    reason,
    running_refusal,
)
from engines.backends.onnxruntime.provider_memory import ProviderMemory
from engines.backends.onnxruntime.session_check import check_session
from engines.bundle import Bundle
from engines.card.engine import CardEngine
from engines.card.graph import Shape
from engines.cuda import Device
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

_LARGEST_CHUNK = 2**31 - 1
"""The library takes the size of its first allocation as a 32-bit number."""


@dataclass(frozen=True)
class Allocation:
    """How the provider takes memory, where it leaves a choice."""

    largest_rest: int = 1 << 20
    """A piece that is larger than what is asked for by more than these bytes is divided. Unless told
    otherwise, the library lets up to 128 MB of a piece lie idle."""
    reuse: bool = False
    """Whether the library holds an intermediate result that nobody needs any more for a later one of the same
    shape. For a step of four samples at full size that is 900 MB instead of 434, by simulation."""
    own: bool = True
    """Whether the provider asks us for memory."""
    half_as_tf32: bool = False
    """Whether `use_tf32` is set for graphs in half precision. It changes no product of theirs, but without it
    the library looks for convolutions without tensor cores first, in half precision, too."""


ALLOCATION = Allocation()
"""Simulated, but not measured on a card (docs/studies/h100.md)."""


def preload(library: Any) -> None:
    """Loads the CUDA and cuDNN libraries of pip packages, if they are installed.

    Without them the system's are used, where its loader finds them.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
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


def provider_options(stream: int, tf32: bool, capture: bool, limit: int) -> dict[str, str]:
    """Returns the provider's options for a session.

    Args:
        stream: where it puts its work.
        tf32: whether products of float32 numbers may be computed in TF32.
        capture: whether calls are captured as CUDA graphs.
        limit: bytes that it may allocate.
    """
    return {
        "user_compute_stream": str(stream),
        "use_tf32": str(int(tf32)),
        "enable_cuda_graph": str(int(capture)),
        "gpu_mem_limit": str(limit),
        # a search would take whichever algorithm was fastest today: other bits after the next start
        "cudnn_conv_algo_search": "HEURISTIC",
        # sums in float32, not in the precision of the graph
        "enable_skip_layer_norm_strict_mode": "1",
    }


def session_options(library: Any, bundle: Bundle, allocation: Allocation) -> Any:
    """Returns the session options.

    Args:
        library: the onnxruntime package.
        bundle: holds the graphs and their weights.
        allocation: how the session takes memory.
    """
    options = library.SessionOptions()
    options.use_deterministic_compute = True
    # what a set of shapes needs as one block is more than what single pieces need
    options.enable_mem_pattern = False
    options.enable_mem_reuse = allocation.reuse
    for key, value in {
        "session.use_env_allocators": "1",
        "session.use_device_allocator_for_initializers": "1",
        "session.model_external_initializers_file_folder_path": str(bundle.path),
    }.items():
        options.add_session_config_entry(key, value)
    return options


def share_scratch(
    library: Any, nbytes: int, limit: int, allocation: Allocation, options: dict[str, str] | None = None
) -> None:
    """Makes the arena that the sessions to come take scratch memory from, in place of the one before.

    Args:
        library: the onnxruntime package.
        nbytes: what it allocates first, and unless a graph needs more, at all. It grows by a gigabyte or by
            all that is left: CUDA's arena takes no other size.
        limit: most that it allocates, the weights of the sessions included.
        allocation: how it does that.

    Raises:
        BackendError: the provider does not start.
    """
    arena = {
        "max_mem": limit,
        "arena_extend_strategy": 0,
        "initial_chunk_size_bytes": min(nbytes, limit, _LARGEST_CHUNK),
        "max_dead_bytes_per_chunk": allocation.largest_rest,
    }
    kind = library.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    where = library.OrtMemoryInfo("Cuda", kind, 0, library.OrtMemType.DEFAULT)
    try:
        library.create_and_register_allocator_v2(PROVIDER, where, options or {}, library.OrtArenaCfg(arena))
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
        self._stream: int | None = None
        self.memory: ProviderMemory | None = None
        self._plans = weakref.WeakKeyDictionary[Sessions, DeviceMemoryPlan]()

    def new_device(self) -> Device:
        """Returns memory of its own on the card, with the common stream."""
        device = Device(self._stream)
        self._stream = device.stream
        return device

    def share_scratch(
        self, sessions: Sessions, library: Any, plan: DeviceMemoryPlan, allocation: Allocation
    ) -> None:
        """Makes the arena that sessions take scratch memory from, of whichever engine.

        So it has to suffice for each engine that is there, and its limit for the weights of all of them.
        """
        self._plans[sessions] = plan
        plans = list(self._plans.values())
        nbytes, limit = max(each.library for each in plans), sum(each.library_limit for each in plans)
        if allocation.own:
            self.memory = self.memory or ProviderMemory(self.new_device())
            self.memory.limit = limit
            self.memory.scratch.reserve(nbytes)
            share_scratch(library, nbytes, limit, allocation, self.memory.options())
        else:
            share_scratch(library, nbytes, limit, allocation)


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
        allocation: Allocation = ALLOCATION,
    ) -> None:
        """Allocates scratch memory.

        Args:
            library: the onnxruntime package.
            bundle: holds the graphs.
            shared: with the other engines of the process.
            stream: where their work goes; that of `shared`.
            plan: how much memory they may take.
            options: precision, and whether calls are captured.
            allocation: how memory is taken.
        """
        self.library = library
        self.bundle = bundle
        self.stream = stream
        self._limit = plan.library_limit
        self._options = options
        self._allocation = allocation
        self.thread = shared.thread
        self._shared = shared
        preload(library)
        shared.share_scratch(self, library, plan, allocation)

    def open_graph(self, graph: str) -> LoadedSession:
        """Loads a graph's weights onto the card.

        Raises:
            BackendError: the provider does not start, or there is not enough memory.
            BundleError: the library cannot load the graph, or it is another than in the manifest.
        """
        spec = self.bundle.manifest.specs[graph]
        capture = self._options.cuda_graphs and spec.role in CAPTURED_ROLES
        is_half = self.bundle.manifest.precision == "fp16"
        tf32 = self._options.inference_precision == "tf32" or (is_half and self._allocation.half_as_tf32)
        provider = provider_options(self.stream, tf32, capture, self._limit)
        memory = self._shared.memory
        loading = memory.loading(self.bundle.manifest.graphs[graph].nbytes) if memory else contextlib.nullcontext()
        try:
            with loading:
                session = self.thread.submit(
                    self.library.InferenceSession,
                    str(self.bundle.graph_file(graph, CUDA)),
                    session_options(self.library, self.bundle, self._allocation),
                    [(PROVIDER, provider)],
                    # on the CPU it would fail later, for another reason
                    enable_fallback=0,
                ).result()
        except Exception as error:
            raise loading_refusal(graph, capture, error) from error
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
            raise running_refusal(self._loaded.spec.name, error) from error

    def capturable(self, stream: int) -> bool:
        """Returns False: the provider launches its own captured graph, which no other may contain."""
        return False


_OF_THIS_PROCESS = SharedStream()


def open_card_engine(
    library: Any,
    bundle: Bundle,
    options: EngineOptions,
    most_cache: int | None = None,
    allocation: Allocation = ALLOCATION,
) -> CardEngine:
    """Returns the engine for a bundle of ONNX graphs on a card; see `engines.engine.open_engine`."""
    # for some convolutions cuDNN has no plan without tensor cores; they run with another, and every one is
    # logged as an error. What really fails is raised, too
    library.set_default_logger_severity(_FATAL)
    shared = _OF_THIS_PROCESS
    with shared.lock:
        device = shared.new_device()
        plan = plan_for_card(bundle.manifest, options.memory_budget, device.card().free, most_cache)
        sessions = Sessions(library, bundle, shared, device.stream, plan, options, allocation)
        opened = sessions.open_graph
        return CardEngine(ONNX, bundle, device, opened, plan, options.cuda_graphs, shared.lock)
