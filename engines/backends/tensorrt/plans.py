"""Opens plans, checks that they match the manifest, and runs them.

What an input or output is called in the plan (`TensorSpec.stored_name`) is known here and nowhere above.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engines.backends.tensorrt.library import Library, check_header, loading_refusal
from engines.bundle import Bundle
from engines.cache_folder import cache_folder, keep, kept
from engines.cuda import OutOfDeviceMemoryError
from engines.errors import BackendError, BundleError
from engines.manifest import GraphRecord
from engines.spec import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt

Shape = tuple[int, ...]

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "UINT8": "uint8"}
"""TensorRT's name of a dtype -> NumPy's."""


def open_plan(library: Library, bundle: Bundle, graph: str) -> Plan:
    """Loads a plan's weights onto the card.

    Raises:
        OutOfDeviceMemoryError: there is not enough memory.
        BundleError: the plan is unusable, or is not the graph that the manifest describes.
    """
    check_header(library, bundle, graph)
    library.clear_messages()
    path = bundle.graph_file(graph)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = library.runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise loading_refusal(library, bundle, graph)
    record = bundle.manifest.graphs[graph]
    check_signature(read_signature(engine), record.spec, bundle.manifest.largest_sizes)
    return Plan(library, engine, record)


class Plan:
    """A graph whose weights are on the card."""

    def __init__(self, library: Library, engine: tensorrt.ICudaEngine, record: GraphRecord) -> None:
        """Takes over an opened plan; `open_plan` is the way to get one.

        Args:
            library: what opened it.
            engine: what it was opened as.
            record: the graph's entry in the manifest.
        """
        self._library = library
        self._engine = engine
        self._spec = record.spec
        self._jit_cache = JitCache(library, engine, record.files[0].sha256)
        self.scratch = int(engine.device_memory_size_v2)
        """Bytes that a call needs for intermediate results."""

    def new_context(self) -> Context:
        """Returns the resources for calls of one set of shapes; scratch memory is lent to each call.

        Raises:
            OutOfDeviceMemoryError: the card has no room for it.
        """
        strategies: type[tensorrt.ExecutionContextAllocationStrategy]
        strategies = self._library.module.ExecutionContextAllocationStrategy
        config = self._jit_cache.config(strategies.USER_MANAGED)
        context = self._engine.create_execution_context(config or strategies.USER_MANAGED)
        if context is None:
            raise OutOfDeviceMemoryError(
                f"the card has no room to run a graph ({self._library.reason()}): give a smaller "
                "--memory-budget"
            )
        return Context(self._library, context, self._spec)

    def keep_compiled_kernels(self) -> None:
        """Saves what was compiled for this card, so that the next start need not compile it again."""
        self._jit_cache.save()


class Context:
    """Runs a plan with inputs of one set of shapes; see `engines.card.graph.Context`."""

    def __init__(self, library: Library, context: tensorrt.IExecutionContext, spec: GraphSpec) -> None:
        """Takes over an execution context; `Plan.new_context` is the way to get one."""
        self._library = library
        self._context = context
        self._spec = spec

    def prepare(
        self, shapes: Mapping[str, Shape], addresses: Mapping[str, int], scratch: int, scratch_size: int
    ) -> None:
        """Says where everything is."""
        self._context.set_device_memory(scratch, scratch_size)
        for tensor in self._spec.inputs:
            name, shape = tensor.stored_name, shapes[tensor.name]
            self._require(self._context.set_input_shape(name, shape), f"takes no {name} of {shape}")
        for tensor in self._spec.tensors:
            name, address = tensor.stored_name, addresses[tensor.name]
            self._require(self._context.set_tensor_address(name, address), f"takes no address for {name}")

    def enqueue(self, stream: int) -> None:
        """Puts the graph into a stream."""
        self._require(self._context.execute_async_v3(stream), "did not run")

    def capturable(self, stream: int) -> bool:
        """Returns whether `enqueue` may be captured. TensorRT can always; TensorRT for RTX says."""
        check = getattr(self._context, "is_stream_capturable", None)
        return check is None or bool(check(stream))

    def _require(self, success: bool, what: str) -> None:
        if not success:
            raise BackendError(f"{self._library.variant.title} {what}: {self._library.reason()}")


class JitCache:
    """Kernels that TensorRT for RTX compiled for this card at run time. TensorRT has no such thing.

    Kept per plan in `cache_folder`; does nothing where that cannot be written.
    """

    def __init__(self, library: Library, engine: tensorrt.ICudaEngine, plan_hash: str) -> None:
        """Reads nothing yet.

        Args:
            library: what opened the plan.
            engine: the plan.
            plan_hash: of the plan's file, hexadecimal.
        """
        folder = cache_folder()
        self._path = folder / "tensorrt" / f"{plan_hash[:16]}-{library.version}.jit" if folder else None
        self._library = library
        self._engine = engine
        self._cache: Any = None

    def config(self, strategy: tensorrt.ExecutionContextAllocationStrategy) -> Any:
        """Returns what a context is created with, or None if this variant has no such thing."""
        if not hasattr(self._engine, "create_runtime_config"):
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):
            self._add_cache(config)
        return config

    def _add_cache(self, config: Any) -> None:
        kinds = self._library.module.DynamicShapesKernelSpecializationStrategy
        # compile for the present shapes in the first call, so that the next one can be captured
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            if self._path and (content := kept(self._path)):
                self._cache.deserialize(content)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the kernels, if there is a place for them."""
        if self._cache is None or self._path is None:
            return
        with self._cache.serialize() as content:
            keep(self._path, content)


@dataclass(frozen=True)
class PlanTensor:
    """An input or output as a plan or a network describes it."""

    spec: TensorSpec
    """Its name is that in the plan; its shape has -1 for a variable size."""
    is_input: bool
    largest: Shape | None = None
    """Largest shape of an input, if known."""


def read_signature(engine: tensorrt.ICudaEngine) -> list[PlanTensor]:
    """Returns the inputs and outputs of an opened plan."""
    tensors = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name).name == "INPUT"
        dtype = engine.get_tensor_dtype(name).name
        spec = TensorSpec(name, DTYPES.get(dtype, dtype), tuple(engine.get_tensor_shape(name)))
        largest = tuple(engine.get_tensor_profile_shape(name, 0)[2]) if is_input else None
        tensors.append(PlanTensor(spec, is_input, largest))
    return tensors


def check_signature(tensors: Sequence[PlanTensor], spec: GraphSpec, largest: Mapping[str, int]) -> None:
    """Compares a plan, or the network it is built from, with the signature that the manifest promises.

    Args:
        tensors: of the plan.
        spec: the signature.
        largest: variable dimension -> its size in the largest call.

    Raises:
        BundleError: a name, dtype, shape or largest size differs.
    """
    found = {tensor.spec.name: tensor for tensor in tensors}
    if found.keys() != {tensor.stored_name for tensor in spec.tensors}:
        raise BundleError(
            f"the plan of '{spec.name}' has other inputs and outputs than those in the manifest"
        )
    for expected in spec.tensors:
        tensor = found[expected.stored_name]
        shape = tuple(-1 if isinstance(d, str) else d for d in expected.shape)
        same = tensor.spec.dtype == expected.dtype and tensor.spec.shape == shape
        fits = tensor.largest is None or math.prod(tensor.largest) >= math.prod(expected.resolve(largest))
        if not same or not fits or tensor.is_input != (expected in spec.inputs):
            raise BundleError(
                f"'{expected.stored_name}' of the plan of '{spec.name}' is {tensor.spec.dtype} "
                f"{tensor.spec.shape} up to {tensor.largest}, and the manifest says {expected.dtype} {shape} "
                f"up to {expected.resolve(largest)}"
            )
