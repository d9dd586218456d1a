"""Which graphs stay in device memory together. A pure function of sizes.

Every picture calls the denoise and the control graph at every step, the VAE once, and the ID encoder once per
new reference. Where memory is short the graphs take turns in groups: loading one group makes the other leave.
That costs a second or two per turn, so as few groups as fit are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.arena import ALIGNMENT, Buffer, Layout, aligned, layout
from engines.errors import BackendError
from engines.graphs import CONTROL, DECODE, DENOISE, GRAPHS, ID_ENCODER, GraphSpec, largest_sizes

GROUPINGS = (
    ((DENOISE, CONTROL, DECODE, ID_ENCODER),),
    ((DENOISE, CONTROL, DECODE), (ID_ENCODER,)),
    ((DENOISE, CONTROL), (DECODE,), (ID_ENCODER,)),
)
"""Groups of graphs that are loaded together, best first. The ID encoder is the largest graph and is needed
least; denoise and control graph alternate at every step and never part."""

LARGEST_CACHE = 4 << 30
"""Bytes of detail maps worth keeping: three placements of 50 steps at full size."""


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
    """The part of the arena whose use never changes: scratch memory, and the places of the denoise inputs."""
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
    """Scratch memory of every graph, and one place for every input and output of the denoise graph.

    Graphs run one after the other, so each is a phase of its own. What the denoise graph is given stays in
    place while the control graph runs for the next step; encoding or decoding in between may overwrite it.
    """
    scratch = [Buffer(scratch_name(g), graphs[g].scratch, frozenset({g})) for g in GRAPHS]
    sizes = largest_sizes(max_batch)
    sampling = frozenset({DENOISE, CONTROL})
    return scratch + [
        Buffer(tensor.name, tensor.nbytes(sizes), sampling) for tensor in specs[DENOISE].tensors
    ]


def scratch_name(graph: str) -> str:
    """Name of the buffer for a graph's intermediate results."""
    return f"{graph} scratch"


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
