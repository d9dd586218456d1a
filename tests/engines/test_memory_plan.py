"""What lives where, on a card or on the host: fits the budget, keeps what it can, says what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import host_memory
from engines.arena import ALIGNMENT, PAGE
from engines.bundle import Bundle
from engines.engine import choose_backend, needed_bytes, open_engine
from engines.errors import BackendError
from engines.format_1 import host_scratch
from engines.host_memory import plan_host_memory
from engines.manifest import FileRecord, GraphRecord, Manifest
from engines.memory_plan import (
    CONTEXT,
    LARGEST_CACHE,
    LEAST_LIBRARY_MARGIN,
    LIBRARY_MARGIN,
    UNASKED_CACHE,
    DeviceMemoryPlan,
    GraphMemory,
    buffers_of,
    further_windows,
    groupings,
    needed_device_bytes,
    place_name,
    plan_device_memory,
    plan_for_card,
)
from engines.options import EngineOptions
from engines.spec import BankSpec, GraphSpec, TensorSpec
from export.example_inputs import example_inputs
from tests.support.anydoor import CONTROL, DECODE, DENOISE, ENCODE, GRAPHS, ID_ENCODER

MB = 1_000_000
ORT = "onnxruntime"
MEMORY = {
    ID_ENCODER: GraphMemory(2281 * MB, 38 * MB),
    CONTROL: GraphMemory(743 * MB, 189 * MB),
    DENOISE: GraphMemory(1755 * MB, 280 * MB),
    ENCODE: GraphMemory(68 * MB, 1200 * MB),
    DECODE: GraphMemory(103 * MB, 1636 * MB),
}
"""About the full-size network."""


def tensors(dtype: str, **shapes: Sequence[int | str]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, dtype, tuple(shape)) for name, shape in shapes.items())


def specs() -> dict[str, GraphSpec]:
    """Graphs with every role of sampling, and the sizes of the full-size network."""
    latent, tokens = (4, 64, 64), (257, 1024)
    maps = tensors("float16", a=("maps", 320, 64, 64), b=("maps", 640, 32, 32), c=("maps", 1280, 8, 8))
    numbers = tensors("float32", timestep=("samples",), scale=("samples",), coefficients=("samples", 3))
    rows = tensors("int32", row_sample=("rows",), row_condition=("rows",), row_map=("rows",))
    (latents, carry) = tensors("float32", latent=("samples", *latent), carry=("samples", *latent))
    return {
        ID_ENCODER: GraphSpec(
            ID_ENCODER,
            "condition",
            tensors("float32", reference=("samples", 3, 224, 224)),
            tensors("float32", tokens=("samples", *tokens)),
        ),
        CONTROL: GraphSpec(
            CONTROL,
            "window",
            tensors("float32", hint=(1, 4, 512, 512), timestep=("maps",), tokens=("maps", *tokens)),
            maps,
        ),
        DENOISE: GraphSpec(
            DENOISE,
            "step",
            (latents, carry, *numbers, *rows, *tensors("float32", tokens=("conditions", *tokens)), *maps),
            tensors("float32", next_latent=("samples", *latent), epsilon=("samples", *latent)),
            banks=(BankSpec("tokens", ("tokens",), "row_condition"),),
            per_step=tuple(tensor.name for tensor in (*numbers, *rows)),
            feedback={"latent": "next_latent"},
        ),
        ENCODE: GraphSpec(
            ENCODE,
            "scene",
            tensors("float32", picture=(1, 3, 512, 512)),
            tensors("float32", latent=(1, *latent)),
        ),
        DECODE: GraphSpec(
            DECODE,
            "decode",
            tensors("float32", latent=(1, *latent)),
            tensors("uint8", image=(1, 512, 512, 3)),
        ),
    }


SPECS = specs()


def manifest(memory: Mapping[str, GraphMemory] = MEMORY, batch: int = 4) -> Manifest:
    """Plans of these sizes."""
    graphs = {
        name: GraphRecord(
            spec,
            (FileRecord(f"{name}.plan", memory[name].weights, ""),),
            scratch_bytes={"tensorrt": memory[name].scratch, "onnxruntime": 1},
        )
        for name, spec in SPECS.items()
    }
    return Manifest(
        system="anydoor",
        backend="tensorrt",
        backend_version="10",
        target="sm89",
        precision="fp16",
        max_batch=batch,
        dimensions={"samples": 1, "rows": 2, "conditions": 2, "maps": 2},
        graphs=graphs,
        constants=FileRecord("constants.npz", 0, ""),
    )


sizes = st.integers(0, 4000).map(lambda megabytes: megabytes * MB)
memories = st.fixed_dictionaries({graph: st.builds(GraphMemory, sizes, sizes) for graph in GRAPHS})


def smallest(memory: dict[str, GraphMemory], batch: int = 4) -> int:
    """The least budget that has a plan."""
    low, high = 0, 100_000 * MB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_device_memory(manifest(memory, batch), middle)
            high = middle
        except BackendError:
            low = middle
    return high


@given(memories, st.integers(1, 8), st.integers(0, 40_000))
def test_a_plan_fits_its_budget_or_is_refused(
    memory: dict[str, GraphMemory], batch: int, budget: int
) -> None:
    try:
        plan = plan_device_memory(manifest(memory, batch), budget * MB)
    except BackendError as error:
        assert f"{budget} MB may be used" in str(error)  # noqa: PT017  either outcome may be right
        return
    assert plan.total <= plan.budget == budget * MB
    assert sorted(graph for group in plan.groups for graph in group) == sorted(GRAPHS)
    assert plan.cache >= 0


@given(memories, st.integers(1, 8))
def test_more_memory_never_makes_more_groups(memory: dict[str, GraphMemory], batch: int) -> None:
    least = smallest(memory, batch)
    plans = [
        plan_device_memory(manifest(memory, batch), least + extra * MB) for extra in (0, 500, 2000, 40_000)
    ]
    counts = [len(plan.groups) for plan in plans]
    assert counts == sorted(counts, reverse=True)
    assert plans[-1].groups == groupings(SPECS)[0]


def test_the_refusal_names_the_least_budget() -> None:
    least = smallest(MEMORY)
    with pytest.raises(BackendError, match=f"at least {-(-least // MB)} MB .*--max-batch 1"):
        plan_device_memory(manifest(), least - 1)
    assert plan_device_memory(manifest(), least).cache == further_windows(manifest())


@given(memories, st.integers(1, 8), st.integers(0, 40_000), st.integers(0, 40_000))
def test_every_sample_of_a_batch_has_room_for_a_window_and_no_more_is_kept_than_asked_for(
    memory: dict[str, GraphMemory], batch: int, budget: int, most: int
) -> None:
    windows = further_windows(manifest(memory, batch))
    assert windows == (batch - 1) * sum(of.nbytes({"maps": 2 * batch}) for of in SPECS[CONTROL].outputs)
    try:
        plan = plan_device_memory(manifest(memory, batch), budget * MB, most * MB)
    except BackendError:
        return
    assert windows <= plan.cache <= max(windows, most * MB)


def test_the_id_encoder_is_evicted_first_and_sampling_is_never_parted() -> None:
    roomy = plan_device_memory(manifest(), 24_000 * MB)
    assert roomy.groups == ((CONTROL, DENOISE, DECODE, ID_ENCODER, ENCODE),)
    tight = plan_device_memory(manifest(), roomy.total - roomy.cache - 1)
    assert tight.groups == ((CONTROL, DENOISE, DECODE), (ID_ENCODER, ENCODE))
    assert tight.weights == (1755 + 743 + 103) * MB
    assert all(plan.group_of(CONTROL) == plan.group_of(DENOISE) for plan in (roomy, tight))


def test_without_a_budget_one_placement_is_kept() -> None:
    free = 80_000 * MB
    asked, unasked = plan_for_card(manifest(), 24_000 * MB, free), plan_for_card(manifest(), None, free)
    assert unasked.budget == int(0.9 * free)
    assert (unasked.cache, asked.cache) == (UNASKED_CACHE // ALIGNMENT * ALIGNMENT, LARGEST_CACHE)


def test_a_library_with_memory_of_its_own_takes_some_for_itself() -> None:
    """And for weights whole pages of the card's memory."""
    of = manifest()
    plan = plan_device_memory(replace(of, backend=ORT), 24_000 * MB)
    assert plan.context == CONTEXT
    for name in GRAPHS:
        rounded = plan.graphs[name].weights - of.graphs[name].nbytes
        assert plan.graphs[name].weights % PAGE == 0
        assert PAGE <= rounded < 2 * PAGE
    assert plan.library % PAGE == 0
    most = max(graph.scratch for graph in plan.graphs.values())
    assert plan.library >= max(LIBRARY_MARGIN * most, most + LEAST_LIBRARY_MARGIN)
    assert plan.library_limit == plan.budget - plan.arena - CONTEXT


def places(plan: DeviceMemoryPlan, graph: str) -> set[str]:
    """The fixed buffers that hold something while a graph runs."""
    kept = [place_name(DENOISE, tensor.name) for tensor in SPECS[DENOISE].tensors] if graph == CONTROL else []
    return {*buffers_of(SPECS[graph]), *kept}


def test_nothing_that_a_running_graph_needs_is_overwritten() -> None:
    plan = plan_device_memory(manifest(), 24_000 * MB)
    for graph in GRAPHS:
        for name in places(plan, graph):
            assert not plan.fixed.overlaps[name] & places(plan, graph)


def test_scratch_memory_is_shared() -> None:
    plan = plan_device_memory(manifest(), 24_000 * MB)
    inputs = sum(tensor.nbytes(manifest().largest_sizes) for tensor in SPECS[DENOISE].tensors)
    assert plan.fixed.nbytes < (1636 + 1) * MB  # the decoder's alone; all the rest lies inside
    assert inputs + 280 * MB < plan.fixed.nbytes


def test_a_larger_batch_takes_more() -> None:
    pools = [plan_device_memory(manifest(batch=batch), 24_000 * MB).pool for batch in (1, 2, 8)]
    assert pools == sorted(pools)
    assert pools[0] < pools[-1]


def test_the_table_names_every_graph_and_the_whole() -> None:
    table = plan_device_memory(manifest(), 6_000 * MB).table()
    assert all(graph in table for graph in GRAPHS)
    assert "group 2; evicts the other groups" in table
    assert "of a budget of 6000.0 MB" in table


# ---- in the host's memory


def large_bundle(tiny_bundle: Path) -> Bundle:
    """A bundle that says of itself that it has the sizes of the full-size network."""
    bundle = Bundle.open(tiny_bundle)
    sizes = {ID_ENCODER: 4545 * MB, CONTROL: 1457 * MB, DENOISE: 3464 * MB}
    sizes |= {ENCODE: 137 * MB, DECODE: 198 * MB}
    content = {
        "model": {"resolution": 512, "latent_size": 64, "token_count": 257},
        "architecture": {
            "unet_channels": [320, 640, 1280, 1280],
            "unet_head_width": 64,
            "vae_channels": [128, 256, 512, 512],
            "dino_width": 1536,
            "dino_mlp_ratio": 4,
        },
    }
    fused = {"onnxruntime": False, "openvino": True}
    scratch = {backend: host_scratch(content, fuses) for backend, fuses in fused.items()}
    graphs = {
        name: replace(
            record,
            files=(replace(record.files[0], bytes=sizes[name]),),
            scratch_bytes={backend: of.get(name, of[DECODE]) for backend, of in scratch.items()},
        )
        for name, record in bundle.manifest.graphs.items()
    }
    return Bundle(bundle.path, replace(bundle.manifest, graphs=graphs))


def test_full_size_fits_into_8_gb_by_swapping(tiny_bundle: Path) -> None:
    plan = plan_host_memory(large_bundle(tiny_bundle), ORT, 8000 * MB)
    assert len(plan.groups) > 1
    assert plan.total <= 8000 * MB
    assert plan.cache == 8000 * MB - plan.total
    assert plan.evicted_by(CONTROL, [ID_ENCODER]) == [ID_ENCODER]
    assert plan.evicted_by(DENOISE, [CONTROL]) == []
    assert "of a budget of 8000.0 MB" in plan.table()


def test_attention_without_its_scores_takes_less(tiny_bundle: Path) -> None:
    bundle = large_bundle(tiny_bundle)
    fused, plain = (plan_host_memory(bundle, backend, 24_000 * MB).total for backend in ("openvino", ORT))
    assert fused < plain


def test_where_there_is_room_all_graphs_stay(tiny_bundle: Path) -> None:
    plan = plan_host_memory(large_bundle(tiny_bundle), ORT, 24_000 * MB)
    assert plan.groups == groupings(SPECS)[0]
    assert plan.table() == ""


@pytest.mark.parametrize("backend", [ORT, "openvino"])
def test_what_a_bundle_needs_is_the_least_without_swapping(tiny_bundle: Path, backend: str) -> None:
    pytest.importorskip(backend)
    bundle, options = Bundle.open(tiny_bundle), EngineOptions(backend, "cpu")
    needed = needed_bytes(bundle, options)
    assert not open_engine(bundle, replace(options, memory_budget=needed)).describe()
    assert "loaded in turn" in open_engine(bundle, replace(options, memory_budget=needed - 1)).describe()


def test_what_a_bundle_needs_on_a_card() -> None:
    needed = needed_device_bytes(manifest())
    plans = [plan_device_memory(manifest(), nbytes) for nbytes in (needed, needed - 1)]
    assert [len(plan.groups) for plan in plans] == [1, 2]
    assert plans[0].cache == further_windows(manifest())


def test_budget_that_no_plan_fits(tiny_bundle: Path) -> None:
    with pytest.raises(
        BackendError, match=r"needs about \d+ MB of memory, but 4000 MB may be used: raise --mem"
    ):
        plan_host_memory(large_bundle(tiny_bundle), ORT, 4000 * MB)


@pytest.mark.parametrize(("free", "groups"), [(10**12, 1), (9 * 10**9, 2), (10**9, 4)])
def test_without_a_budget_graphs_are_swapped_only_where_memory_is_short(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, free: int, groups: int
) -> None:
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: free)
    plan = plan_host_memory(large_bundle(tiny_bundle), ORT, None)
    assert len(plan.groups) == groups
    assert plan.budget == int(0.9 * free)
    assert plan.cache == max(0, plan.budget - plan.total)


@pytest.mark.parametrize("budget", [None, 8000 * MB, 16_000 * MB])
@pytest.mark.parametrize("free", [16, 200])
def test_graphs_and_what_is_kept_stay_within_the_budget(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None, free: int
) -> None:
    monkeypatch.setattr(host_memory, "free_host_memory", lambda: free * 10**9)
    plan = plan_host_memory(large_bundle(tiny_bundle), ORT, budget)
    assert plan.fits
    assert plan.total + plan.cache <= plan.budget == (budget or int(0.9 * free * 10**9))


def test_openvino_needs_more_than_8_gb_and_is_not_taken_there(tiny_bundle: Path) -> None:
    bundle = large_bundle(tiny_bundle)
    options = EngineOptions(device="cpu", memory_budget=8000 * MB)
    assert choose_backend(bundle, options) == ORT
    pytest.importorskip("openvino")
    with pytest.raises(BackendError, match="needs about"):
        open_engine(bundle, replace(options, backend="openvino"))
    assert choose_backend(bundle, replace(options, memory_budget=12_000 * MB)) == "openvino"


@pytest.mark.parametrize("backend", [ORT, "openvino"])
def test_a_picture_made_with_swapped_graphs_is_the_same(tiny_bundle: Path, backend: str) -> None:
    """With room for one group at a time, loading one evicts the other, and nothing else changes."""
    pytest.importorskip(backend)
    bundle = Bundle.open(tiny_bundle)
    options = EngineOptions(backend=backend, device="cpu")
    engine = open_engine(bundle, options)
    swapping: Any = open_engine(bundle, options)
    smallest_groups = groupings(bundle.manifest.specs)[2]
    swapping.plan = replace(swapping.plan, groups=smallest_groups)
    sizes = {"samples": 1, "rows": 1, "conditions": 1, "maps": 1}
    for graph in (ID_ENCODER, CONTROL, DENOISE, DECODE, ID_ENCODER):
        inputs = example_inputs(bundle.manifest.specs[graph], sizes)
        expected, found = engine.run(graph, inputs), swapping.run(graph, inputs)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(swapping.to_host(found[name]), engine.to_host(tensor))
        assert loaded(swapping) <= set(next(group for group in smallest_groups if graph in group))


def loaded(engine: Any) -> set[str]:
    return set(engine._sessions if engine.backend == ORT else engine._requests)
