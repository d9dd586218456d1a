"""Plans a card's memory: which graphs are loaded together, and which buffers exist. Pure functions of sizes.

Every picture calls the step and window graphs at every step, the decoder once, and a condition graph once per
new reference or prompt. Where memory is short the graphs are swapped in groups: loading one group evicts the
other. That costs a second or two per swap, so as few groups as fit are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engines.arena import ALIGNMENT, PAGE, Buffer, Layout, aligned, layout
from engines.errors import BackendError
from engines.manifest import BUILD_COMMAND, CUDA, ONNX, Manifest
from engines.spec import CAPTURED_ROLES, SAMPLING_ROLES, GraphSpec

Groups = tuple[tuple[str, ...], ...]
"""Graphs that are loaded together; every graph is in one group."""

LARGEST_CACHE = 4 << 30
"""Bytes of kept tensors worth having: at full size, three placements of 50 steps."""

UNASKED_CACHE = 1_345_000_000
"""As many of them are kept on a card without a budget: at full size, one placement of 50 steps."""

CONTEXT = 700_000_000
"""Bytes of a card that the driver and a library's kernels and handles take: what is left of the 8.15 GB that
were measured on an H200, after all else (docs/studies/h100.md)."""

LIBRARY_MARGIN = 1.1
"""What a library's scratch memory takes, as a multiple of the estimated intermediate results of the largest
graph, with the gaps between its pieces: at full size 1.00 for one sample, 1.01 for four and 1.03 for eight,
without the workspaces of convolutions (docs/studies/h100.md)."""

LEAST_LIBRARY_MARGIN = 48_000_000
"""Bytes that it is more than these results, at least."""

SHARE_OF_FREE_DEVICE_MEMORY = 0.9
"""Share of a card's free memory that is used without a budget."""

UNLIMITED = 1 << 62

MOST_STEPS = 64
"""Steps whose small inputs have room on the card at once, and so can be one CUDA graph."""


@dataclass(frozen=True)
class GraphMemory:
    """The memory of one graph."""

    weights: int
    """Bytes, as long as it is loaded."""
    scratch: int
    """Bytes of intermediate results, while it runs at the largest batch."""


def card_memory(manifest: Manifest) -> dict[str, GraphMemory]:
    """Returns the memory of each graph on a card.

    A bundle of ONNX graphs may not say it of the card, but of one sample on a CPU: then it is as much for
    each sample of the largest call.
    """
    if manifest.backend != ONNX:
        kind, samples = manifest.backend, 1
    elif all(CUDA in record.scratch_bytes for record in manifest.graphs.values()):
        kind, samples = CUDA, 1
    else:
        kind, samples = ONNX, manifest.max_batch
    return {
        name: GraphMemory(record.nbytes, samples * record.scratch_bytes.get(kind, 0))
        for name, record in manifest.graphs.items()
    }


def groupings(specs: Mapping[str, GraphSpec]) -> list[Groups]:
    """Ways to group graphs, best first.

    The graphs of sampling alternate and are never parted. The decoder is needed once per picture. The others
    are the largest and are needed least."""
    names = list(specs)
    sampling = tuple(name for name in names if specs[name].role in SAMPLING_ROLES)
    decoders = tuple(name for name in names if specs[name].role == "decode")
    others = tuple(name for name in names if name not in sampling + decoders)
    ways: list[Groups] = [
        (sampling + decoders + others,),
        (sampling + decoders, others),
        (sampling, decoders, *((name,) for name in others)),
    ]
    return list(dict.fromkeys(tuple(group for group in way if group) for way in ways))


@dataclass(frozen=True)
class DeviceMemoryPlan:
    """A plan of a card's memory. All sizes are in bytes."""

    graphs: Mapping[str, GraphMemory]
    groups: Groups
    fixed: Layout
    """The part of the arena whose use never changes: scratch memory, the places of the inputs and outputs of
    captured graphs, and tables of the inputs that change at every step."""
    context: int
    """Memory of the backend's library before it loads anything, if known."""
    library: int
    """Scratch memory that the backend's library allocates for all graphs; 0 if it lies in the arena."""
    pool: int
    """The part of the arena where tensors come and go, without those that are kept for re-rolls."""
    cache: int
    """Memory for detail maps, beyond one window of them: those in use and those that are kept for re-rolls.
    At least so much that each sample of a batch can have a window of its own."""
    budget: int

    @property
    def weights(self) -> int:
        """Weights of the largest group."""
        return _largest_group(self.graphs, self.groups)

    @property
    def arena(self) -> int:
        """Size of the arena."""
        return self.fixed.nbytes + aligned(self.pool + self.cache)

    @property
    def total(self) -> int:
        """Most memory in use at any time."""
        return self.context + self.weights + self.library + self.arena

    @property
    def library_limit(self) -> int:
        """Most that the backend's library may allocate, weights included: all that is not the arena's."""
        return self.budget - self.arena - self.context

    def group_of(self, graph: str) -> tuple[str, ...]:
        """Returns the graphs that may be loaded at the same time as this one."""
        return next(group for group in self.groups if graph in group)

    def table(self) -> str:
        """Returns the plan as it is printed before loading."""
        lines = [f"{'graph':<12} {'weights MB':>11} {'scratch MB':>11}  loaded"]
        for number, group in enumerate(self.groups, 1):
            swap = "; evicts the other groups" if len(self.groups) > 1 else ", all the time"
            for name in group:
                memory = self.graphs[name]
                sizes = f"{memory.weights / 1e6:>11.1f} {memory.scratch / 1e6:>11.1f}"
                lines.append(f"{name:<12} {sizes}  as group {number}{swap}")
        lines += [
            f"{'weights':<12} {self.weights / 1e6:>11.1f} MB in the largest group",
            f"{'shared':<12} {self.fixed.nbytes / 1e6:>11.1f} MB scratch, and places of captured graphs",
            f"{'library':<12} {self.library / 1e6:>11.1f} MB scratch that the library shares among graphs, "
            f"and {self.context / 1e6:.1f} MB for itself",
            f"{'tensors':<12} {self.pool / 1e6:>11.1f} MB in use, and {self.cache / 1e6:.1f} MB kept or for "
            "several placements",
            f"{'in all':<12} {self.total / 1e6:>11.1f} MB of a budget of {self.budget / 1e6:.1f} MB",
        ]
        return "\n".join(line for line in lines if self.library or not line.startswith("library"))


def plan_for_card(
    manifest: Manifest, wanted: int | None, free: int, most_cache: int | None = None
) -> DeviceMemoryPlan:
    """Returns the plan for a card.

    Args:
        manifest: see `plan_device_memory`.
        wanted: bytes that the user allows; most of what is free if None, since kernels and contexts take some
            too, and then less is kept for re-rolls.
        free: bytes of the card's memory that are free.
        most_cache: bytes that anybody would keep for re-rolls; if None, as many as are worth it.

    Raises:
        BackendError: see `plan_device_memory`.
    """
    most = LARGEST_CACHE if most_cache is None else most_cache
    if wanted is not None:
        return plan_device_memory(manifest, wanted, most)
    return plan_device_memory(
        manifest, int(free * SHARE_OF_FREE_DEVICE_MEMORY), UNASKED_CACHE if most_cache is None else most
    )


def plan_device_memory(manifest: Manifest, budget: int, most_cache: int = LARGEST_CACHE) -> DeviceMemoryPlan:
    """Returns the plan with the fewest groups that fits a card.

    Args:
        manifest: of a bundle of plans, whose scratch memory lies in the arena, or of ONNX graphs, whose
            library has an allocator of its own.
        budget: bytes of device memory to use at most.
        most_cache: bytes to keep for re-rolls at most.

    Raises:
        BackendError: even the smallest plan does not fit; says what would.
    """
    graphs = card_memory(manifest)
    in_arena, context, library = graphs, 0, 0
    if manifest.backend == ONNX:
        graphs = {
            # a block of its own, where the smallest weights are rounded up
            name: replace(memory, weights=aligned(memory.weights, PAGE) + PAGE)
            for name, memory in graphs.items()
        }
        in_arena = {name: replace(memory, scratch=0) for name, memory in graphs.items()}
        context = CONTEXT
        most = max(memory.scratch for memory in graphs.values())
        library = aligned(max(int(LIBRARY_MARGIN * most), most + LEAST_LIBRARY_MARGIN), PAGE)
    fixed = layout(fixed_buffers(in_arena, manifest))
    pool, least_cache = working_bytes(manifest), further_windows(manifest)
    rest = context + library + fixed.nbytes + aligned(pool) + least_cache
    needed = 0
    for groups in groupings(manifest.specs):
        needed = rest + _largest_group(graphs, groups)
        if needed <= budget:
            more = 0 if manifest.is_segmenter else max(most_cache - least_cache, 0)
            cache = least_cache + min(budget - needed, more) // ALIGNMENT * ALIGNMENT
            return DeviceMemoryPlan(graphs, groups, fixed, context, library, pool, cache, budget)
    raise BackendError(
        f"the bundle needs at least {megabytes(needed)} MB of device memory, but {budget // 1_000_000} MB "
        "may be used: free some, raise --memory-budget, or build a bundle that needs less with "
        f"'{BUILD_COMMAND} --max-batch 1'"
    )


def needed_device_bytes(manifest: Manifest) -> int:
    """Returns what a card needs for a bundle whose graphs are all loaded, without what is kept for
    re-rolls."""
    return plan_device_memory(manifest, UNLIMITED, most_cache=0).total


def fixed_buffers(graphs: Mapping[str, GraphMemory], manifest: Manifest) -> list[Buffer]:
    """Returns scratch memory of every graph, a place for every input and output of a captured graph, and
    tables.

    Graphs run one after the other, so each is a phase of its own. What the step graph is given stays in place
    while a window graph runs for the next step; other graphs may overwrite it. A table holds the values of a
    small input for all steps of a loop, and is filled anew for each loop.
    """
    sizes = manifest.largest_sizes
    sampling = frozenset(spec.name for spec in manifest.specs.values() if spec.role in SAMPLING_ROLES)
    scratch = [Buffer(scratch_name(name), graphs[name].scratch, frozenset({name})) for name in graphs]
    places = [
        Buffer(
            place_name(spec.name, tensor.name),
            tensor.nbytes(sizes),
            sampling if spec.role == "step" else frozenset({spec.name}),
        )
        for spec in manifest.specs.values()
        if spec.role in CAPTURED_ROLES
        for tensor in spec.tensors
    ]
    tables = [
        Buffer(
            table_name(step.name, name),
            MOST_STEPS * step.tensor(name).nbytes(sizes),
            frozenset({step.name}),
        )
        for step in manifest.with_role("step")
        for name in step.per_step
    ]
    return scratch + places + tables


def buffers_of(spec: GraphSpec) -> list[str]:
    """Returns names of the buffers in `fixed_buffers` that a run of a graph writes to."""
    tensors = spec.tensors if spec.role in CAPTURED_ROLES else ()
    return [
        scratch_name(spec.name),
        *(place_name(spec.name, tensor.name) for tensor in tensors),
        *(table_name(spec.name, name) for name in spec.per_step),
    ]


def scratch_name(graph: str) -> str:
    """Returns name of the buffer for a graph's intermediate results."""
    return f"{graph} scratch"


def place_name(graph: str, tensor: str) -> str:
    """Returns name of the buffer for an input or output of a captured graph."""
    return f"{graph}.{tensor}"


def table_name(graph: str, tensor: str) -> str:
    """Returns name of the buffer for an input's values at all steps of a loop."""
    return f"{graph}.{tensor} table"


def working_bytes(manifest: Manifest) -> int:
    """Tensors in use at the worst moment of sampling or decoding.

    That is the outputs of all graphs; once more the inputs of the step graph, since banks of several requests
    are gathered while the windows that they come from still exist; and the inputs of the window graphs for
    every sample, each of which may belong to a request of its own. The inputs of graphs that see a picture
    are large, too. Windows of other samples are not counted here: see `further_windows`."""
    sizes = manifest.largest_sizes
    outputs = [tensor for spec in manifest.specs.values() for tensor in spec.outputs]
    inputs = {
        role: [tensor for spec in manifest.with_role(role) for tensor in spec.inputs]
        for role in ("step", "window", "segment", "condition", "scene")
    }
    windows = inputs.pop("window") * manifest.max_batch
    tensors = (*outputs, *windows, *(tensor for of_role in inputs.values() for tensor in of_role))
    return sum(aligned(tensor.nbytes(sizes)) for tensor in tensors)


def further_windows(manifest: Manifest) -> int:
    """Returns bytes of the largest windows of detail maps, for all samples of a batch but one."""
    sizes = manifest.largest_sizes
    window = [tensor for spec in manifest.with_role("window") for tensor in spec.outputs]
    return (manifest.max_batch - 1) * sum(aligned(tensor.nbytes(sizes)) for tensor in window)


def megabytes(nbytes: int) -> int:
    """Rounded up."""
    return -(-nbytes // 1_000_000)


def _largest_group(graphs: Mapping[str, GraphMemory], groups: Sequence[Sequence[str]]) -> int:
    return max(sum(graphs[name].weights for name in group) for group in groups)
