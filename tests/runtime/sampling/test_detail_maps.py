"""Detail maps are computed once: shared by samples, kept for re-rolls, never beyond the budget."""

from __future__ import annotations

import contextvars
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.bundle import Bundle
from engines.engine import Array, Engine, open_engine
from engines.options import EngineOptions
from runtime.sampling.conditions import OWNER, BankRows
from runtime.sampling.detail_maps import DetailMapCache, DetailMaps, MapWindow, shared_timesteps
from tests.support.anydoor import CONTROL
from tests.support.observers import RunCounter

TIMESTEPS = [801, 601, 401, 201, 1]


@pytest.fixture
def engine(tiny_bundle: Path) -> Engine:
    return open_engine(Bundle.open(tiny_bundle), EngineOptions(backend="onnxruntime", device="cpu"))


@pytest.fixture
def counter(engine: Engine) -> RunCounter:
    engine.observer = counter = RunCounter()
    return counter


def inputs(seed: int, guided: bool = True) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    hint = rng.standard_normal((4, 64, 64), dtype=np.float32)
    return hint, rng.standard_normal((2 if guided else 1, 257, 32), dtype=np.float32)


def values(engine: Engine, maps: DetailMaps, step: int) -> tuple[Array, Array]:
    """The last map of a step, for both halves; the first one depends on the hint alone."""
    here = maps.at(step)
    tensor = engine.to_host(list(here.tensors.values())[-1])
    return tensor[here.conditional], tensor[here.unconditional]


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_any_window_gives_the_same_maps(engine: Engine, counter: RunCounter, window: int) -> None:
    hint, tokens = inputs(0)
    maps = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, tokens, TIMESTEPS, window)
    single = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, tokens, TIMESTEPS, 1)
    for step in range(len(TIMESTEPS)):
        for found, expected in zip(values(engine, maps, step), values(engine, single, step)):
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert max(counter.rows[CONTROL]) == 2 * min(window, len(TIMESTEPS))


def test_windows_share_the_hint_on_the_device(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, to_device = list[tuple[int, ...]](), engine.to_device

    def noted(array: Array) -> object:
        sent.append(array.shape)
        return to_device(array)

    monkeypatch.setattr(engine, "to_device", noted)
    hint, tokens = inputs(0)
    maps = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, tokens, TIMESTEPS, 2)
    for step in range(len(TIMESTEPS)):
        maps.at(step)
    assert sent.count((1, *hint.shape)) == 1


def test_what_is_kept_for_one_owner_does_not_serve_another(engine: Engine, counter: RunCounter) -> None:
    cache, (hint, tokens) = DetailMapCache(1 << 30), inputs(0)
    for owner, runs in (("one", 1), ("one", 1), ("another", 2)):
        context = contextvars.copy_context()
        context.run(OWNER.set, owner)
        maps = context.run(DetailMaps, engine, CONTROL, cache, hint, tokens, TIMESTEPS, 1)
        maps.at(0)
        assert counter.runs[CONTROL] == runs


def test_without_guidance_the_unconditional_half_is_not_computed(engine: Engine, counter: RunCounter) -> None:
    hint, tokens = inputs(0, guided=False)
    here = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, tokens, TIMESTEPS, 1).at(0)
    assert here.conditional == here.unconditional == 0
    assert counter.rows[CONTROL] == [1]


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_unconditional_maps_are_computed_where_they_are_needed(
    engine: Engine, counter: RunCounter, window: int
) -> None:
    hint, tokens = inputs(0)
    guided = [False, True, True, False, False]
    maps = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, tokens, TIMESTEPS, window, guided)
    full = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, tokens, TIMESTEPS, 1)
    for step in range(len(TIMESTEPS)):
        found, expected = values(engine, maps, step), values(engine, full, step)
        np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
        np.testing.assert_allclose(found[1], expected[1] if guided[step] else expected[0], atol=1e-4)
    assert sum(counter.rows[CONTROL]) == 7 + 10


@pytest.mark.parametrize("window", [1, 2, 9])
def test_neighbours_with_one_timestep_share_its_maps(
    engine: Engine, counter: RunCounter, window: int
) -> None:
    hint, tokens = inputs(0)
    timesteps, guided = [701, 701, 101, 101, 101], [False, True, False, False, False]
    maps = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, tokens, timesteps, window, guided)
    here = [maps.at(step) for step in range(5)]
    assert sum(counter.rows[CONTROL]) == 2 + 1
    # the first step has no guidance, but its maps have both halves, as the second needs them
    assert [each.unconditional - each.conditional for each in here] == [1, 1, 0, 0, 0]


def test_steps_whose_maps_are_in_the_same_tensors(engine: Engine) -> None:
    timesteps = [801, 801, 401, 201, 1]  # of which the first two share theirs
    for window, expected in ((1, [2, 1, 1, 1, 1]), (2, [3, 2, 1, 2, 1]), (9, [5, 4, 3, 2, 1])):
        maps = DetailMaps(engine, CONTROL, DetailMapCache(0), *inputs(0), timesteps, window)
        assert [maps.steps_ready(step) for step in range(5)] == expected
        for step, count in enumerate(expected):
            assert len({id(maps.at(ahead).tensors) for ahead in range(step, step + count)}) == 1


def test_steps_share_the_mean_timestep_of_their_run() -> None:
    assert shared_timesteps([901, 701, 501, 301, 101], 2) == [701, 701, 701, 201, 201]
    assert shared_timesteps([901, 701, 501], 1) == [701] * 3
    assert shared_timesteps([9, 8, 6], 1) == [8] * 3  # of 7.7
    for count in (None, 3, 9):
        assert shared_timesteps([901, 701, 501], count) == [901, 701, 501]


def test_kept_maps_need_no_control_graph(engine: Engine, counter: RunCounter) -> None:
    hint, tokens = inputs(0)
    cache = DetailMapCache(1 << 30)
    for _ in range(3):
        maps = DetailMaps(engine, CONTROL, cache, hint, tokens, TIMESTEPS, 2)
        for step in range(len(TIMESTEPS)):
            maps.at(step)
    assert counter.runs[CONTROL] == 3


@pytest.mark.parametrize("changed", ["hint", "tokens", "timesteps"])
def test_other_inputs_are_other_maps(engine: Engine, counter: RunCounter, changed: str) -> None:
    cache = DetailMapCache(1 << 30)
    hint, tokens = inputs(0)
    first = values(engine, DetailMaps(engine, CONTROL, cache, hint, tokens, TIMESTEPS, 1), 0)[0]
    other_hint, other_tokens = inputs(1)
    arguments = (
        other_hint if changed == "hint" else hint,
        other_tokens if changed == "tokens" else tokens,
        [t + 7 for t in TIMESTEPS] if changed == "timesteps" else TIMESTEPS,
    )
    second = values(engine, DetailMaps(engine, CONTROL, cache, *arguments, 1), 0)[0]
    assert np.abs(first - second).max() > 1e-3
    assert counter.runs[CONTROL] == 2


def test_budget_keeps_what_fits_and_computes_the_rest(engine: Engine, counter: RunCounter) -> None:
    """A re-roll with room for two of five windows computes three."""
    hint, tokens = inputs(0)
    maps = DetailMaps(engine, CONTROL, DetailMapCache(0), hint, tokens, TIMESTEPS, 1)
    size = sum(engine.nbytes(tensor) for tensor in maps.at(0).tensors.values())
    counter.clear()
    cache = DetailMapCache(2 * size)
    for expected in (5, 5 + 3):
        maps = DetailMaps(engine, CONTROL, cache, hint, tokens, TIMESTEPS, 1)
        for step in range(len(TIMESTEPS)):
            maps.at(step)
        assert counter.runs[CONTROL] == expected


def window_of(nbytes: int) -> MapWindow:
    return MapWindow({}, nbytes)


@given(
    st.integers(0, 100),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(1, 40)), max_size=60),
)
def test_cache_never_exceeds_its_budget(budget: int, puts: list[tuple[int, int, int]]) -> None:
    cache = DetailMapCache(budget)
    for placement, step, nbytes in puts:
        key = ((step, True),)
        if cache.get(bytes([placement]), key) is None:
            cache.put(bytes([placement]), key, window_of(nbytes))
        assert 0 <= cache.nbytes <= budget


def test_the_placement_used_longest_ago_makes_room() -> None:
    cache = DetailMapCache(30)
    for name in (b"a", b"b", b"c"):
        cache.put(name, ((1, True),), window_of(10))
    cache.get(b"a", ((1, True),))
    cache.put(b"d", ((1, True),), window_of(10))
    kept = [name for name in (b"a", b"b", b"c", b"d") if cache.get(name, ((1, True),))]
    assert kept == [b"a", b"c", b"d"]


def test_a_placement_makes_no_room_for_itself() -> None:
    cache = DetailMapCache(30)
    for step in range(5):
        cache.put(b"a", ((step, True),), window_of(10))
    assert [step for step in range(5) if cache.get(b"a", ((step, True),))] == [0, 1, 2]


class Uncomputed:
    """A tensor without values."""


class UncomputedMaps:
    """An engine whose tensors have no values."""

    def __init__(self) -> None:
        self.alive = weakref.WeakSet[Uncomputed]()
        self.most = 0
        """Tensors that were there at the same time."""

    def to_device(self, array: Any) -> Any:
        return array

    def concatenate(self, pieces: Any) -> None:
        return None

    def nbytes(self, tensor: Any) -> int:
        return 10

    def run(self, graph: str, inputs: Any) -> dict[str, Any]:
        tensor = Uncomputed()
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return {"maps": tensor}


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=40), st.integers(2, 6))
def test_what_is_kept_takes_no_room_from_what_is_in_use(events: list[tuple[int, bool]], windows: int) -> None:
    """Three placements are drawn at once, in any order and again and again, with room for one window more."""
    engine, cache = UncomputedMaps(), DetailMapCache(10 * windows)
    hint, tokens = np.zeros((4, 8, 8), np.float32), np.zeros((1, 3, 8), np.float32)
    running: dict[int, Iterator[BankRows]] = {}

    def drawn(placement: int, keeps: bool) -> Iterator[BankRows]:
        key = bytes([placement])
        maps = DetailMaps(
            engine,
            CONTROL,
            cache,
            hint,
            tokens,
            TIMESTEPS,
            1,
            None,
            key,
            keeps,  # type: ignore[arg-type]
        )
        return (maps.at(step) for step in range(len(TIMESTEPS)))

    for placement, keeps in events:
        if next(running.setdefault(placement, drawn(placement, keeps)), None) is None:
            del running[placement]
    assert engine.most <= windows + 1


def test_one_placement_alone_keeps_as_much_as_there_is_room_for() -> None:
    engine, cache = UncomputedMaps(), DetailMapCache(30)
    hint, tokens = np.zeros((4, 8, 8), np.float32), np.zeros((1, 3, 8), np.float32)
    for _ in range(2):
        maps = DetailMaps(engine, CONTROL, cache, hint, tokens, TIMESTEPS, 1)  # type: ignore[arg-type]
        for step in range(len(TIMESTEPS)):
            maps.at(step)
        assert cache.nbytes == 30
    assert engine.most == 4


def test_cleared_cache_is_empty() -> None:
    cache = DetailMapCache(30)
    cache.put(b"a", ((1, True),), window_of(10))
    cache.clear()
    assert cache.nbytes == 0
    assert cache.get(b"a", ((1, True),)) is None
