"""Plans which graphs are in the host's memory together. See `engines.memory_plan` for cards."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from engines.bundle import Bundle
from engines.errors import BackendError
from engines.memory_limit import free_host_memory
from engines.memory_plan import UNLIMITED, GraphMemory, Groups, groupings, megabytes

HOST_PROGRAM = 300_000_000
"""Bytes for what is not a graph: the interpreter, the libraries, pictures."""

SHARE_OF_FREE_HOST_MEMORY = 0.9
"""Share of the host's free memory that is used without a budget."""


@dataclass(frozen=True)
class HostMemoryPlan:
    """A plan of the graphs that are loaded together in the host's memory. All sizes are in bytes."""

    graphs: Mapping[str, GraphMemory]
    groups: Groups
    cache: int
    """Memory left for cached tensors."""
    budget: int

    @property
    def fits(self) -> bool:
        """Whether it stays within the budget."""
        return self.total <= self.budget

    @property
    def total(self) -> int:
        """Most memory in use at any time, without what is kept."""
        return HOST_PROGRAM + max(_group_bytes(self.graphs, group) for group in self.groups)

    def require_fit(self) -> None:
        """Checks that the plan stays within the budget.

        Raises:
            BackendError: says how much is missing.
        """
        if not self.fits:
            raise BackendError(
                f"it needs {self.total / 1e9:.1f} GB of memory, but {self.budget / 1e9:.1f} GB of it are free"
            )

    def evicted_by(self, graph: str, loaded: Iterable[str]) -> list[str]:
        """Returns the loaded graphs that make room for another."""
        group = next(group for group in self.groups if graph in group)
        return [other for other in loaded if other not in group]

    def table(self) -> str:
        """Returns the plan as it is printed before loading; empty if everything is loaded together."""
        if len(self.groups) == 1:
            return ""
        lines = [f"{'loaded in turn':<32} {'weights MB':>11} {'scratch MB':>11}"]
        for group in self.groups:
            weights = sum(self.graphs[graph].weights for graph in group) / 1e6
            scratch = max(self.graphs[graph].scratch for graph in group) / 1e6
            lines.append(f"{', '.join(group):<32} {weights:>11.1f} {scratch:>11.1f}")
        lines.append(f"{'in all':<32} {self.total / 1e6:>11.1f} MB of a budget of {self.budget / 1e6:.1f} MB")
        return "\n".join(lines)


def plan_host_memory(
    bundle: Bundle,
    backend: str,
    budget: int | None,
    copies: float = 1.0,
    load_factor: float = 0.0,
) -> HostMemoryPlan:
    """Returns the plan with the fewest groups that fits the host's memory, for one picture at a time.

    Args:
        bundle: its files are the weights.
        backend: whose scratch memory counts.
        budget: bytes to use at most, kept tensors included; nearly all that is free if None. Then the plan
            with the most groups is taken if none fits: files that are mapped into memory may leave it.
        copies: memory that a loaded graph takes, as a multiple of its file.
        load_factor: what loading it takes beside that, likewise.

    Raises:
        BackendError: even the smallest plan does not fit the budget.
    """
    graphs = {}
    for name, record in bundle.manifest.graphs.items():
        # nothing runs while a graph is loaded
        scratch = max(record.scratch_bytes.get(backend, 0), int(record.nbytes * load_factor))
        graphs[name] = GraphMemory(int(record.nbytes * copies), scratch)
    available = int(free_host_memory() * SHARE_OF_FREE_HOST_MEMORY) if budget is None else budget
    plans = [HostMemoryPlan(graphs, groups, 0, available) for groups in groupings(bundle.manifest.specs)]
    plan = next((plan for plan in plans if plan.fits), plans[-1])
    if budget is not None and not plan.fits:
        raise BackendError(
            f"the bundle at '{bundle.path}' needs about {megabytes(plan.total)} MB of memory, but "
            f"{budget // 1_000_000} MB may be used: raise --memory-budget"
        )
    return replace(plan, cache=max(0, available - plan.total))


def needed_host_bytes(bundle: Bundle, backend: str, copies: float = 1.0, load_factor: float = 0.0) -> int:
    """Returns what the host needs for a bundle whose graphs are all loaded, without what is kept; arguments
    as of `plan_host_memory`."""
    return plan_host_memory(bundle, backend, UNLIMITED, copies, load_factor).total


def trim() -> None:
    """Gives memory that is no longer used back to the system.

    glibc's allocator keeps it otherwise, between what is still used; see malloc_trim(3).
    """
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)


def _group_bytes(graphs: Mapping[str, GraphMemory], group: Sequence[str]) -> int:
    return sum(graphs[name].weights for name in group) + max(graphs[name].scratch for name in group)
