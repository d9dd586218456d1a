"""Which graphs stay in memory together, on a card or on the host. Pure functions of sizes.

Every picture calls the denoise and the control graph at every step, the VAE once, and the ID encoder once per
new reference. Where memory is short the graphs take turns in groups: loading one group makes the other leave.
That costs a second or two per turn, so as few groups as fit are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engines.arena import ALIGNMENT, Buffer, Layout, aligned, layout
from engines.bundle import Bundle, Manifest
from engines.errors import BackendError
from engines.spec import (
    CONTROL,
    DECODE,
    DENOISE,
    GRAPHS,
    ID_ENCODER,
    STEP_INPUTS,
    GraphSpec,
    largest_sizes,
)

GROUPINGS = (
    ((DENOISE, CONTROL, DECODE, ID_ENCODER),),
    ((DENOISE, CONTROL, DECODE), (ID_ENCODER,)),
    ((DENOISE, CONTROL), (DECODE,), (ID_ENCODER,)),
)
"""Groups of graphs that are loaded together, best first. The ID encoder is the largest graph and is needed
least; denoise and control graph alternate at every step and never part."""

LARGEST_CACHE = 4 << 30
"""Bytes of detail maps worth keeping: three placements of 50 steps at full size."""

MOST_STEPS = 64
"""Steps whose small inputs have room on the card at once, and so can be one CUDA graph."""


@dataclass(frozen=True)
class GraphMemory:
    """What one graph takes."""

    weights: int
    """Bytes, as long as it is loaded."""
    scratch: int
    """Bytes of intermediate results, while it runs at the largest batch."""


@dataclass(frozen=True)
class ResidencyPlan:
    """What lives where. All sizes are in bytes."""

    graphs: Mapping[str, GraphMemory]
    groups: tuple[tuple[str, ...], ...]
    """Graphs that are loaded together; every graph is in one group."""
    fixed: Layout
    """The part of the arena whose use never changes: scratch memory, the places of the denoise inputs, and
    the tables of those that are others at every step."""
    pool: int
    """The part of the arena where tensors come and go, without those that are kept for re-rolls."""
    cache: int
    """What is left for tensors that are kept."""
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
        return self.weights + self.arena

    def group_of(self, graph: str) -> tuple[str, ...]:
        """The graphs that may be loaded at the same time as this one."""
        return next(group for group in self.groups if graph in group)

    def table(self) -> str:
        """The plan as it is printed before loading."""
        lines = [f"{'graph':<12} {'weights MB':>11} {'scratch MB':>11}  loaded"]
        for group in self.groups:
            others = "; the other groups leave" if len(self.groups) > 1 else ", all the time"
            for name in group:
                memory = self.graphs[name]
                loaded = f"as group {self.groups.index(group) + 1}{others}"
                lines.append(
                    f"{name:<12} {memory.weights / 1e6:>11.1f} {memory.scratch / 1e6:>11.1f}  {loaded}"
                )
        lines += [
            f"{'weights':<12} {self.weights / 1e6:>11.1f} MB in the largest group",
            f"{'shared':<12} {self.fixed.nbytes / 1e6:>11.1f} MB scratch and inputs of the denoise graph",
            f"{'tensors':<12} {self.pool / 1e6:>11.1f} MB in use, and {self.cache / 1e6:.1f} MB kept",
            f"{'in all':<12} {self.total / 1e6:>11.1f} MB of a budget of {self.budget / 1e6:.1f} MB",
        ]
        return "\n".join(lines)


def plan_residency(
    graphs: Mapping[str, GraphMemory], specs: Mapping[str, GraphSpec], max_batch: int, budget: int
) -> ResidencyPlan:
    """The plan with the fewest groups that fits a budget.

    Args:
        graphs: what each graph takes.
        specs: their signatures.
        max_batch: most samples in one call.
        budget: bytes of device memory to use at the most.

    Raises:
        BackendError: even the smallest plan does not fit; says what would.
    """
    fixed = layout(fixed_buffers(graphs, specs, max_batch))
    pool = working_bytes(specs, max_batch)
    for groups in GROUPINGS:
        needed = _largest_group(graphs, groups) + fixed.nbytes + aligned(pool)
        if needed <= budget:
            cache = min(budget - needed, LARGEST_CACHE) // ALIGNMENT * ALIGNMENT
            return ResidencyPlan(dict(graphs), groups, fixed, pool, cache, budget)
    raise BackendError(
        f"the bundle needs at least {megabytes(needed)} MB of device memory and {budget // 1_000_000} MB may "
        "be used: free some, raise --memory-budget, or build a bundle that needs less with "
        "'python export/build_engines.py CHECKPOINT --max-batch 1'"
    )


def fixed_buffers(
    graphs: Mapping[str, GraphMemory], specs: Mapping[str, GraphSpec], max_batch: int
) -> list[Buffer]:
    """Scratch memory of every graph, one place for every input and output of the denoise graph, and tables.

    Graphs run one after the other, so each is a phase of its own. What the denoise graph is given stays in
    place while the control graph runs for the next step; encoding or decoding in between may overwrite it.
    A table holds the values of a small input for all steps of a loop, and is filled anew for each loop.
    """
    scratch = [Buffer(scratch_name(g), graphs[g].scratch, frozenset({g})) for g in GRAPHS]
    sizes = largest_sizes(max_batch)
    sampling = frozenset({DENOISE, CONTROL})
    places = [Buffer(tensor.name, tensor.nbytes(sizes), sampling) for tensor in specs[DENOISE].tensors]
    tables = [
        Buffer(table_name(tensor.name), MOST_STEPS * tensor.nbytes(sizes), frozenset({DENOISE}))
        for tensor in specs[DENOISE].inputs
        if tensor.name in STEP_INPUTS
    ]
    return scratch + places + tables


def scratch_name(graph: str) -> str:
    """Name of the buffer for a graph's intermediate results."""
    return f"{graph} scratch"


def table_name(tensor: str) -> str:
    """Name of the buffer for an input's values at all steps of a loop."""
    return f"{tensor} table"


def working_bytes(specs: Mapping[str, GraphSpec], max_batch: int) -> int:
    """Tensors in use at the worst moment of sampling or decoding.

    That is the outputs of all graphs, and once more the inputs of the denoise graph: detail maps of several
    requests are gathered while the window that they come from still exists.
    """
    sizes = largest_sizes(max_batch)
    tensors = [tensor for spec in specs.values() for tensor in spec.outputs]
    return sum(aligned(tensor.nbytes(sizes)) for tensor in (*tensors, *specs[DENOISE].inputs))


def megabytes(nbytes: int) -> int:
    """Rounded up."""
    return -(-nbytes // 1_000_000)


def _largest_group(graphs: Mapping[str, GraphMemory], groups: Sequence[Sequence[str]]) -> int:
    return max(sum(graphs[name].weights for name in group) for group in groups)


HOST_PROGRAM = 300_000_000
"""Bytes for what is not a graph: the interpreter, the libraries, pictures."""

_MAPS_AT_ONCE = 8

_SCORES_AT_ONCE = 3

_FLOAT = 4
"""Bytes of a float32."""

SHARE_OF_FREE_HOST_MEMORY = 0.9
"""What is used of the host's free memory without a budget."""


@dataclass(frozen=True)
class HostResidency:
    """Which graphs are loaded together in the host's memory. All sizes are in bytes."""

    graphs: Mapping[str, GraphMemory]
    groups: tuple[tuple[str, ...], ...]
    """Graphs that are loaded together; every graph is in one group."""
    cache: int
    """What is left for tensors that are kept, however much that is."""
    budget: int

    @property
    def fits(self) -> bool:
        """Whether it stays within the budget."""
        return self.total <= self.budget

    @property
    def total(self) -> int:
        """Most memory in use at any time, without what is kept."""
        return HOST_PROGRAM + max(_group_bytes(self.graphs, group) for group in self.groups)

    def leaving(self, graph: str, loaded: Iterable[str]) -> list[str]:
        """The loaded graphs that make room for another."""
        group = next(group for group in self.groups if graph in group)
        return [other for other in loaded if other not in group]

    def table(self) -> str:
        """The plan as it is printed before loading; empty if everything is loaded together."""
        if len(self.groups) == 1:
            return ""
        lines = [f"{'loaded in turn':<32} {'weights MB':>11} {'scratch MB':>11}"]
        for group in self.groups:
            weights = sum(self.graphs[graph].weights for graph in group) / 1e6
            scratch = max(self.graphs[graph].scratch for graph in group) / 1e6
            lines.append(f"{', '.join(group):<32} {weights:>11.1f} {scratch:>11.1f}")
        lines.append(f"{'in all':<32} {self.total / 1e6:>11.1f} MB of a budget of {self.budget / 1e6:.1f} MB")
        return "\n".join(lines)


def plan_host_residency(
    bundle: Bundle,
    budget: int | None,
    fused_attention: bool = False,
    copies: float = 1.0,
    load_factor: float = 0.0,
) -> HostResidency:
    """The plan with the fewest groups that fits the host's memory, for one picture at a time.

    Args:
        bundle: its files are the weights.
        budget: bytes to use at the most, kept tensors included; nearly all that is free if None. Then the
            plan with the most groups is taken if none fits: files that are mapped into memory may leave it.
        fused_attention: whether the backend computes attention without its matrix of scores.
        copies: memory that a loaded graph takes, as a multiple of its file.
        load_factor: what loading it takes beside that, likewise.

    Raises:
        BackendError: even the smallest plan does not fit the budget.
    """
    scratch = host_scratch(bundle.manifest, fused_attention)
    graphs = {}
    for name, record in bundle.manifest.graphs.items():
        size = sum(file.bytes for file in record.files)
        # nothing runs while a graph is loaded
        graphs[name] = GraphMemory(int(size * copies), max(scratch[name], int(size * load_factor)))
    available = int(free_host_memory() * SHARE_OF_FREE_HOST_MEMORY) if budget is None else budget
    for groups in GROUPINGS:
        plan = HostResidency(graphs, groups, 0, available)
        if plan.fits:
            break
    else:
        if budget is not None:
            raise BackendError(
                f"the bundle at '{bundle.path}' needs about {megabytes(plan.total)} MB of memory and "
                f"{budget // 1_000_000} MB may be used: raise --memory-budget"
            )
    return replace(plan, cache=max(0, available - plan.total))


def host_scratch(manifest: Manifest, fused_attention: bool) -> dict[str, int]:
    """Estimate of the intermediate results of each graph for one picture with guidance, in bytes.

    The largest are the feature maps at the full size, of which a few are needed at once, and the scores of
    the attention there, several times over around the softmax.
    """
    model, network = manifest.model, manifest.architecture
    rows, pixels = 2, model.latent_size**2
    heads = network["unet_channels"][0] // network["unet_head_width"]
    maps = _MAPS_AT_ONCE * rows * pixels * max(network["unet_channels"]) * _FLOAT
    picture = _MAPS_AT_ONCE * model.resolution**2 * max(network["vae_channels"][:2]) * _FLOAT
    tokens = _MAPS_AT_ONCE * model.token_count * network["dino_width"] * network["dino_mlp_ratio"] * _FLOAT
    scores = 0 if fused_attention else _SCORES_AT_ONCE * pixels**2 * _FLOAT
    return {
        ID_ENCODER: tokens,
        CONTROL: maps + rows * heads * scores,
        DENOISE: maps + rows * heads * scores,
        DECODE: picture + scores,
    }


def free_host_memory() -> int:
    """Bytes that programs can still take, as Linux estimates it; a great many where nobody tells."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        return 1 << 50


def _group_bytes(graphs: Mapping[str, GraphMemory], group: Sequence[str]) -> int:
    return sum(graphs[name].weights for name in group) + max(graphs[name].scratch for name in group)
