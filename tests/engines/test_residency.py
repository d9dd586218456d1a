"""What lives where in a card's memory: fits the budget, keeps what it can, and says what is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import BackendError
from engines.graphs import (
    CONTROL,
    DECODE,
    DENOISE,
    GRAPHS,
    ID_ENCODER,
    ModelShape,
    graph_specs,
    largest_sizes,
)
from engines.residency import GROUPINGS, GraphMemory, ResidencyPlan, plan_residency, scratch_name

MB = 1_000_000
SHAPE = ModelShape(512, 4, 64, 257, 1024, 224, ((320, 64, 64), (640, 32, 32), (1280, 8, 8)), "float16")
SPECS = graph_specs(SHAPE)
MEMORY = {
    ID_ENCODER: GraphMemory(2281 * MB, 38 * MB),
    CONTROL: GraphMemory(743 * MB, 189 * MB),
    DENOISE: GraphMemory(1755 * MB, 280 * MB),
    DECODE: GraphMemory(103 * MB, 1636 * MB),
}
"""About the full-size network."""

sizes = st.integers(0, 4000).map(lambda megabytes: megabytes * MB)
memories = st.fixed_dictionaries({graph: st.builds(GraphMemory, sizes, sizes) for graph in GRAPHS})


def smallest(memory: dict[str, GraphMemory], batch: int = 4) -> int:
    """The least budget that has a plan."""
    low, high = 0, 100_000 * MB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_residency(memory, SPECS, batch, middle)
            high = middle
        except BackendError:
            low = middle
    return high


@given(memories, st.integers(1, 8), st.integers(0, 40_000))
def test_a_plan_fits_its_budget_or_is_refused(
    memory: dict[str, GraphMemory], batch: int, budget: int
) -> None:
    try:
        plan = plan_residency(memory, SPECS, batch, budget * MB)
    except BackendError as error:
        assert f"{budget} MB may be used" in str(error)  # noqa: PT017  either outcome may be right
        return
    assert plan.total <= plan.budget == budget * MB
    assert sorted(graph for group in plan.groups for graph in group) == sorted(GRAPHS)
    assert plan.cache >= 0


@given(memories, st.integers(1, 8))
def test_more_memory_never_makes_more_groups(memory: dict[str, GraphMemory], batch: int) -> None:
    least = smallest(memory, batch)
    plans = [plan_residency(memory, SPECS, batch, least + extra * MB) for extra in (0, 500, 2000, 40_000)]
    counts = [len(plan.groups) for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert plans[-1].groups == GROUPINGS[0]


def test_the_refusal_names_the_least_budget() -> None:
    least = smallest(MEMORY)
    with pytest.raises(BackendError, match=f"at least {-(-least // MB)} MB .*--max-batch 1"):
        plan_residency(MEMORY, SPECS, 4, least - 1)
    assert plan_residency(MEMORY, SPECS, 4, least).cache == 0


def test_the_id_encoder_leaves_first_and_sampling_never_parts() -> None:
    roomy = plan_residency(MEMORY, SPECS, 4, 24_000 * MB)
    assert roomy.groups == ((DENOISE, CONTROL, DECODE, ID_ENCODER),)
    tight = plan_residency(MEMORY, SPECS, 4, roomy.total - roomy.cache - 1)
    assert tight.groups == ((DENOISE, CONTROL, DECODE), (ID_ENCODER,))
    assert tight.weights == (1755 + 743 + 103) * MB
    assert all(plan.group_of(CONTROL) == plan.group_of(DENOISE) for plan in (roomy, tight))


def places(plan: ResidencyPlan, graph: str) -> set[str]:
    """The fixed buffers that hold something while a graph runs."""
    inputs = {tensor.name for tensor in SPECS[DENOISE].tensors} if graph in (CONTROL, DENOISE) else set()
    return {scratch_name(graph), *inputs}


def test_nothing_that_a_running_graph_needs_is_overwritten() -> None:
    plan = plan_residency(MEMORY, SPECS, 4, 24_000 * MB)
    for graph in GRAPHS:
        for name in places(plan, graph):
            assert not plan.fixed.overlaps[name] & places(plan, graph)


def test_scratch_memory_is_shared() -> None:
    plan = plan_residency(MEMORY, SPECS, 4, 24_000 * MB)
    inputs = sum(tensor.nbytes(largest_sizes(4)) for tensor in SPECS[DENOISE].tensors)
    assert plan.fixed.nbytes < (1636 + 1) * MB  # the decoder's alone; all the rest lies inside
    assert inputs + 280 * MB < plan.fixed.nbytes


def test_a_larger_batch_takes_more() -> None:
    pools = [plan_residency(MEMORY, SPECS, batch, 24_000 * MB).pool for batch in (1, 2, 8)]
    assert pools == sorted(pools)
    assert pools[0] < pools[-1]


def test_the_table_names_every_graph_and_the_whole() -> None:
    table = plan_residency(MEMORY, SPECS, 4, 6_000 * MB).table()
    assert all(graph in table for graph in GRAPHS)
    assert "group 2; the other groups leave" in table
    assert "of a budget of 6000.0 MB" in table
