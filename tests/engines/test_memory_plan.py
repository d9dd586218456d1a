"""What lives where, on a card or on the host: fits the budget, keeps what it can, says what is missing."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import memory_plan as residency
from engines.bundle import Bundle
from engines.engine import choose_backend, open_engine
from engines.errors import BackendError
from engines.memory_plan import (
    GROUPINGS,
    GraphMemory,
    ResidencyPlan,
    plan_host_residency,
    plan_residency,
    scratch_name,
)
from engines.spec import GRAPHS, ModelShape, graph_specs, largest_sizes
from export.systems.anydoor import example_inputs
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ID_ENCODER

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


# ---- in the host's memory


def large_bundle(tiny_bundle: Path) -> Bundle:
    """A bundle that says of itself that it has the sizes of the full-size network."""
    bundle = Bundle.open(tiny_bundle)
    sizes = {ID_ENCODER: 4545 * MB, CONTROL: 1457 * MB, DENOISE: 3464 * MB, DECODE: 198 * MB}
    graphs = {
        name: replace(record, files=(replace(record.files[0], bytes=sizes[name]),))
        for name, record in bundle.manifest.graphs.items()
    }
    architecture = {
        "unet_channels": [320, 640, 1280, 1280],
        "unet_head_width": 64,
        "vae_channels": [128, 256, 512, 512],
        "dino_width": 1536,
        "dino_mlp_ratio": 4,
    }
    manifest = replace(bundle.manifest, graphs=graphs, model=SHAPE, architecture=architecture)
    return Bundle(bundle.path, manifest)


def test_full_size_fits_into_8_gb_by_turns(tiny_bundle: Path) -> None:
    plan = plan_host_residency(large_bundle(tiny_bundle), 8000 * MB)
    assert len(plan.groups) > 1
    assert plan.total <= 8000 * MB
    assert plan.cache == 8000 * MB - plan.total
    assert plan.leaving(CONTROL, [ID_ENCODER]) == [ID_ENCODER]
    assert plan.leaving(DENOISE, [CONTROL]) == []
    assert "of a budget of 8000.0 MB" in plan.table()


def test_attention_without_its_scores_takes_less(tiny_bundle: Path) -> None:
    bundle = large_bundle(tiny_bundle)
    fused, plain = (plan_host_residency(bundle, 24_000 * MB, fused).total for fused in (True, False))
    assert fused < plain


def test_where_there_is_room_all_graphs_stay(tiny_bundle: Path) -> None:
    plan = plan_host_residency(large_bundle(tiny_bundle), 24_000 * MB)
    assert plan.groups == GROUPINGS[0]
    assert plan.table() == ""


def test_budget_that_no_plan_fits(tiny_bundle: Path) -> None:
    with pytest.raises(
        BackendError, match=r"needs about \d+ MB of memory and 4000 MB may be used: raise --mem"
    ):
        plan_host_residency(large_bundle(tiny_bundle), 4000 * MB)


@pytest.mark.parametrize(("free", "groups"), [(10**12, 1), (9 * 10**9, 2), (10**9, 3)])
def test_without_a_budget_graphs_take_turns_only_where_memory_is_short(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, free: int, groups: int
) -> None:
    monkeypatch.setattr(residency, "free_host_memory", lambda: free)
    plan = plan_host_residency(large_bundle(tiny_bundle), None)
    assert len(plan.groups) == groups
    assert plan.budget == int(0.9 * free)
    assert plan.cache == max(0, plan.budget - plan.total)


@pytest.mark.parametrize("budget", [None, 8000 * MB, 16_000 * MB])
@pytest.mark.parametrize("free", [16, 200])
def test_graphs_and_what_is_kept_stay_within_the_budget(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None, free: int
) -> None:
    monkeypatch.setattr(residency, "free_host_memory", lambda: free * 10**9)
    plan = plan_host_residency(large_bundle(tiny_bundle), budget)
    assert plan.fits
    assert plan.total + plan.cache <= plan.budget == (budget or int(0.9 * free * 10**9))


def test_openvino_needs_more_than_8_gb_and_is_not_taken_there(tiny_bundle: Path) -> None:
    bundle = large_bundle(tiny_bundle)
    assert choose_backend(bundle, "cpu", memory_budget=8000 * MB) == "onnxruntime"
    with pytest.raises(BackendError, match="needs about"):
        open_engine(bundle, "cpu", backend="openvino", memory_budget=8000 * MB)
    if find_spec("openvino"):
        assert choose_backend(bundle, "cpu", memory_budget=12_000 * MB) == "openvino"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_picture_made_by_turns_is_the_same(tiny_bundle: Path, backend: str) -> None:
    """With room for one group at a time, loading one makes the other leave, and nothing else changes."""
    pytest.importorskip(backend)
    bundle = Bundle.open(tiny_bundle)
    engine = open_engine(bundle, "cpu", backend=backend)
    turns: Any = open_engine(bundle, "cpu", backend=backend)
    turns.residency = replace(turns.residency, groups=GROUPINGS[2])
    sizes = {"samples": 1, "rows": 1, "conditions": 1, "maps": 1}
    for graph in (ID_ENCODER, CONTROL, DENOISE, DECODE, ID_ENCODER):
        inputs = example_inputs(bundle.manifest.specs[graph], sizes)
        expected, found = engine.run(graph, inputs), turns.run(graph, inputs)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(turns.to_host(found[name]), engine.to_host(tensor))
        assert loaded(turns) <= set(turns.residency.groups[[graph in g for g in GROUPINGS[2]].index(True)])


def loaded(engine: Any) -> set[str]:
    return set(engine._sessions if engine.backend == "onnxruntime" else engine._requests)
