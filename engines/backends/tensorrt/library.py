"""TensorRT in both flavours: finding the library, refusing a plan that cannot run here, opening one that can.

TensorRT for RTX (`tensorrt_rtx`) and TensorRT (`tensorrt`) have the same API. What differs is in `FLAVOURS`
and in the few branches on what the library offers.
"""

from __future__ import annotations

import functools
import importlib
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.bundle import Bundle, GraphRecord
from engines.cache_folder import cache_folder, mark_used
from engines.cuda import Card, OutOfDeviceMemoryError
from engines.errors import BackendError, BundleError
from engines.spec import GraphSpec, TensorSpec, largest_sizes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Flavour:
    """What sets one TensorRT apart from the other."""

    title: str
    install: str
    targets: tuple[str, ...]
    """GPU architectures whose plans are built on any machine; none if only for the card that is there."""
    builder_flags: tuple[str, ...] = ()
    times_kernels: bool = False
    """Whether building tries kernels out on the card, and so has timings worth keeping."""


FLAVOURS: Mapping[str, Flavour] = {
    "tensorrt_rtx": Flavour(
        title="TensorRT for RTX",
        install="pip install 'anydoor-runtime[tensorrt]'",
        targets=("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
        # without it the runtime allocates by itself, and a CUDA graph cannot be captured
        builder_flags=("REQUIRE_USER_ALLOCATION",),
    ),
    "tensorrt": Flavour(
        title="TensorRT",
        install="pip install tensorrt (on a Jetson: sudo apt install python3-libnvinfer)",
        targets=(),
        times_kernels=True,
    ),
}
"""Backend and name of the package -> its flavour."""

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "UINT8": "uint8"}
"""TensorRT's name of a dtype -> NumPy's."""

_DIAGNOSTICS = {
    "MALFORMED_ENGINE": "it is damaged, or is not a plan of {title}: copy the bundle again, or rebuild it "
    "with {rebuild}",
    "VERSION_MISMATCH": "another version of {title} built it: rebuild it with {rebuild}",
    "UNSUPPORTED_CC": "it is for {target} and this card is another: rebuild it with {rebuild} and the card's "
    "architecture in --targets, or with --backend tensorrt on this machine",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it: install a current one (on Ubuntu: "
    "sudo ubuntu-drivers install)",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: pip install -U cuda-python {package}",
    "INSUFFICIENT_GPU_MEMORY": "the card has too little memory for it: rebuild it with {rebuild} and "
    "--max-batch 1",
    "CUDA_ERROR": "the NVIDIA driver does not work: check it with 'anydoor doctor'",
}
"""What the library says of a plan's header -> what it means, and what to do."""


class Library:
    """One flavour, loaded. There is one per process: TensorRT keeps the first logger it is given."""

    def __init__(self, backend: str) -> None:
        """Imports the package; `load_library` is the way to get one."""
        self.backend = backend
        self.flavour = FLAVOURS[backend]
        try:
            self.module = importlib.import_module(backend)
        except ImportError as error:
            raise BackendError(
                f"{self.flavour.title} is not installed; install it with: {self.flavour.install}"
            ) from error
        self.messages: list[tuple[str, str]] = []
        """Severity (ERROR, WARNING, INFO) and text of what the library said since `forget_messages`."""
        self.logger = self._make_logger()
        self.version: str = self.module.__version__

    @functools.cached_property
    def runtime(self) -> Any:
        """TensorRT's runtime."""
        return self.module.Runtime(self.logger)

    def forget_messages(self) -> None:
        """Empties `messages`."""
        self.messages.clear()

    def reason(self) -> str:
        """The last error that the library logged, on one line."""
        errors = [text for severity, text in self.messages if severity.endswith("ERROR")]
        return " ".join(errors[-1].split()) if errors else "it does not say why"

    def rebuild_command(self, target: str) -> str:
        """How to make such a bundle anew."""
        targets = f" --targets {target}" if self.flavour.targets else ""
        return f"'python export/build_engines.py CHECKPOINT --backend {self.backend}{targets}'"

    def check_version(self, bundle: Bundle, graph: str) -> None:
        """Refuses a plan that another version of the library built. Needs no card.

        Raises:
            BundleError: it did.
        """
        record = bundle.manifest.graphs[graph]
        if record.backend_version != self.version:
            raise BundleError(
                f"the bundle at '{bundle.path}' was built with {self.flavour.title} {record.backend_version} "
                f"and {self.version} is installed: install that version (pip install "
                f"{self.backend}=={record.backend_version}), or rebuild the bundle with "
                f"{self.rebuild_command(record.target)}"
            )

    def check_card(self, bundle: Bundle, card: Card) -> None:
        """Refuses plans that were built on another kind of card. TensorRT for RTX tells by the header.

        Raises:
            BundleError: they were.
        """
        others = {record.target for record in bundle.manifest.graphs.values()} - {card.architecture}
        if others and not self.flavour.targets:
            raise BundleError(
                f"the bundle at '{bundle.path}' is for {', '.join(sorted(others))} and this card, "
                f"{card.name}, is {card.architecture}: build plans on this machine with 'python "
                f"export/build_engines.py ONNX_BUNDLE --backend {self.backend}'"
            )

    def check_header(self, bundle: Bundle, graph: str) -> None:
        """Refuses a plan that the library finds unfit for this machine by its first bytes.

        TensorRT has no such check; it says the same when the plan is opened.

        Raises:
            BundleError: the plan is damaged, foreign, of another version, or for another card.
        """
        if not hasattr(self.runtime, "get_engine_validity"):
            return
        with bundle.graph_file(graph).open("rb") as file:
            header = file.read(self.runtime.engine_header_size)
        validity, diagnostics = self.runtime.get_engine_validity(header)
        # without a driver the library says "invalid" and gives no reason; what follows says it better
        if validity == self.module.EngineValidity.INVALID and diagnostics:
            raise self.header_refusal(bundle, graph, diagnostics)

    def header_refusal(self, bundle: Bundle, graph: str, diagnostics: int) -> BundleError:
        """The refusal for the diagnostic bits of a plan's header."""
        record = bundle.manifest.graphs[graph]
        bits = self.module.EngineInvalidityDiagnostics
        found = [name for name in _DIAGNOSTICS if diagnostics & int(getattr(bits, name))]
        text = "; ".join(_DIAGNOSTICS[name] for name in found) or f"the library says {diagnostics:#x}"
        details = {
            "title": self.flavour.title,
            "package": self.backend,
            "target": record.target,
            "rebuild": self.rebuild_command(record.target),
        }
        file = bundle.graph_file(graph)
        return BundleError(f"the plan '{file}' cannot be used: {text.format(**details)}")

    def open_plan(self, bundle: Bundle, graph: str) -> Plan:
        """Loads a plan's weights onto the card.

        Raises:
            OutOfDeviceMemoryError: there is not enough memory.
            BundleError: the plan is unusable, or is not the graph that the manifest describes.
        """
        self.check_header(bundle, graph)
        record = bundle.manifest.graphs[graph]
        self.forget_messages()
        path = bundle.graph_file(graph)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self.loading_refusal(bundle, graph)
        check_signature(read_signature(engine), bundle.manifest.specs[graph], bundle.manifest.max_batch)
        return Plan(self, engine, record)

    def loading_refusal(self, bundle: Bundle, graph: str) -> BackendError | BundleError:
        """The refusal for a plan that the library did not open, from what it logged."""
        reason, record = self.reason(), bundle.manifest.graphs[graph]
        said = reason.lower()
        if "out of memory" in said or "outofmemory" in said:
            return OutOfDeviceMemoryError(
                f"the card has no room for the graph '{graph}': give a smaller --memory-budget, close other "
                "programs that use it (see 'nvidia-smi'), or build with --max-batch 1"
            )
        file = bundle.graph_file(graph)
        return BundleError(
            f"{self.flavour.title} cannot open the plan '{file}', built for {record.target}: {reason}; "
            f"if it is for another card or version, rebuild it on this machine with "
            f"{self.rebuild_command(record.target)}"
        )

    def _make_logger(self) -> Any:
        module, messages = self.module, self.messages
        kept = {severity: severity.name for severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR)}
        kept |= {severity: severity.name for severity in (module.ILogger.WARNING, module.ILogger.INFO)}

        class Logger(module.ILogger):  # type: ignore[misc, name-defined]
            """Keeps what the library says, for refusals and for the sizes that only its log tells."""

            def log(self, severity: Any, text: str) -> None:
                if severity in kept:
                    messages.append((kept[severity], text))

        return Logger()


@functools.cache
def load_library(backend: str) -> Library:
    """The library of a backend, one of `FLAVOURS`.

    Raises:
        BackendError: it is not installed.
    """
    return Library(backend)


class Plan:
    """A graph whose weights are on the card."""

    def __init__(self, library: Library, engine: Any, record: GraphRecord) -> None:
        self._library = library
        self._engine = engine
        self._jit_cache = JitCache(library, engine, record.files[0].sha256)
        self.scratch = int(engine.device_memory_size_v2)
        """Bytes that a call needs for intermediate results."""

    def new_context(self) -> Context:
        """What one kind of call needs; scratch memory is lent to each call."""
        strategy = self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        config = self._jit_cache.config(strategy)
        context = self._engine.create_execution_context(strategy if config is None else config)
        if context is None:
            raise OutOfDeviceMemoryError(
                f"the card has no room to run a graph ({self._library.reason()}): give a smaller "
                "--memory-budget"
            )
        return Context(self._library, context)

    def keep_compiled_kernels(self) -> None:
        """Saves what was compiled for this card, so that the next start need not compile it again."""
        self._jit_cache.save()


class Context:
    """Runs a graph with inputs of one set of shapes."""

    def __init__(self, library: Library, context: Any) -> None:
        self._library = library
        self._context = context

    def prepare(
        self, inputs: Mapping[str, Shape], addresses: Mapping[str, int], scratch: int, scratch_size: int
    ) -> None:
        """Says where everything is.

        Args:
            inputs: name -> shape.
            addresses: name of every input and output -> address.
            scratch: address of memory for intermediate results.
            scratch_size: its bytes.
        """
        self._context.set_device_memory(scratch, scratch_size)
        for name, shape in inputs.items():
            self._require(self._context.set_input_shape(name, shape), f"takes no {name} of {shape}")
        for name, address in addresses.items():
            self._require(self._context.set_tensor_address(name, address), f"takes no address for {name}")

    def enqueue(self, stream: int) -> None:
        """Puts the graph into a stream."""
        self._require(self._context.execute_async_v3(stream), "did not run")

    def capturable(self, stream: int) -> bool:
        """Whether `enqueue` may be captured. TensorRT can always; TensorRT for RTX says."""
        check = getattr(self._context, "is_stream_capturable", None)
        return check is None or bool(check(stream))

    def _require(self, success: bool, what: str) -> None:
        if not success:
            raise BackendError(f"{self._library.flavour.title} {what}: {self._library.reason()}")


class JitCache:
    """Kernels that TensorRT for RTX compiled for this card at run time. TensorRT has none.

    Kept per plan in `cache_folder`; without one that can be written it does nothing.
    """

    def __init__(self, library: Library, engine: Any, plan_hash: str) -> None:
        folder = cache_folder()
        self._path = folder / "tensorrt" / f"{plan_hash[:16]}-{library.version}.jit" if folder else None
        self._library = library
        self._engine = engine
        self._cache: Any = None

    def config(self, strategy: Any) -> Any:
        """What a context is created with, or None if this flavour has no such thing."""
        if not hasattr(self._engine, "create_runtime_config"):
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):
            # compile for the shapes at hand in the first call, so that the next one can be captured
            kinds = self._library.module.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
            if self._cache is None:
                self._cache = config.create_runtime_cache()
                if self._path and self._path.is_file():
                    self._cache.deserialize(self._path.read_bytes())
                    mark_used(self._path)
            config.set_runtime_cache(self._cache)
        return config

    def save(self) -> None:
        """Writes the cache beside its place and renames it."""
        if self._cache is None or self._path is None:
            return
        partial = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._cache.serialize() as content:
                partial.write_bytes(content)
            partial.replace(self._path)
        except OSError:
            partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class PlanTensor:
    """An input or output as a plan or a network describes it."""

    spec: TensorSpec
    """Its shape has -1 for a variable size."""
    is_input: bool
    largest: Shape | None = None
    """Largest shape of an input, if known."""


def read_signature(engine: Any) -> list[PlanTensor]:
    """The inputs and outputs of an opened plan."""
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        dtype = engine.get_tensor_dtype(name).name
        spec = TensorSpec(name, DTYPES.get(dtype, dtype), tuple(engine.get_tensor_shape(name)))
        largest = tuple(engine.get_tensor_profile_shape(name, 0)[2]) if is_input else None
        tensors.append(PlanTensor(spec, is_input, largest))
    return tensors


def check_signature(tensors: list[PlanTensor], spec: GraphSpec, max_batch: int) -> None:
    """Compares a plan, or the network it is built from, with the signature that the manifest promises.

    Raises:
        BundleError: a name, dtype, shape or largest size differs.
    """
    found = {tensor.spec.name: tensor for tensor in tensors}
    if found.keys() != {tensor.name for tensor in spec.tensors}:
        raise BundleError(f"the plan of '{spec.name}' has other inputs and outputs than the manifest says")
    sizes = largest_sizes(max_batch)
    for expected in spec.tensors:
        tensor = found[expected.name]
        shape = tuple(-1 if isinstance(d, str) else d for d in expected.shape)
        same = tensor.spec.dtype == expected.dtype and tensor.spec.shape == shape
        fits = tensor.largest is None or math.prod(tensor.largest) >= math.prod(expected.resolve(sizes))
        if not same or not fits or tensor.is_input != (expected in spec.inputs):
            raise BundleError(
                f"'{expected.name}' of the plan of '{spec.name}' is {tensor.spec.dtype} {tensor.spec.shape} "
                f"up to {tensor.largest}, and the manifest says {expected.dtype} {shape} up to "
                f"{expected.resolve(sizes)}"
            )
