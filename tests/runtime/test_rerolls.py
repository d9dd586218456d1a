"""What one picture leaves for the next with another seed, and what it does not."""

from __future__ import annotations

import contextvars
import gc
from dataclasses import replace
from pathlib import Path

import pytest

from engines.options import EngineOptions
from runtime import Compositor, Placement, Request, Sampling
from runtime.sampling.conditions import OWNER
from runtime.sampling.detail_maps import DetailMaps, MapWindow
from tests.support.pictures import PLACEMENT, SCENE

FAST = Sampling(steps=2)


@pytest.fixture(scope="module")
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, EngineOptions(backend="onnxruntime", device="cpu"))


def request(seed: int, placement: Placement = PLACEMENT) -> Request:
    return Request.of(SCENE, placement, seed=seed, sampling=FAST)


def alive(kind: type) -> list[object]:
    return [thing for thing in gc.get_objects() if type(thing) is kind]


@pytest.mark.parametrize("pictures", [1, 3])
def test_a_finished_request_leaves_its_detail_maps_to_the_cache(
    compositor: Compositor, pictures: int
) -> None:
    """They are large, and on a card Python would look for cycles long after memory has run out."""
    compositor.clear()
    gc.collect()
    gc.disable()
    before = len(alive(MapWindow))  # other compositors of this process
    try:
        compositor.composite(SCENE, PLACEMENT, sampling=FAST, num_images=pictures)
        assert len(alive(MapWindow)) == before + FAST.steps
        compositor.clear()
        assert len(alive(MapWindow)) == before
        assert not alive(DetailMaps)
    finally:
        gc.enable()


def test_another_seed_prepares_nothing_anew(compositor: Compositor) -> None:
    compositor.clear()
    requests = [request(seed) for seed in (1, 2)]
    first, second = (compositor.accept(each).placements[0] for each in requests)
    assert second.hint is first.hint
    assert second.reference is first.reference
    moved = request(1, replace(PLACEMENT, box=(2, 2, 30, 40)))
    assert compositor.accept(moved).placements[0].hint is not first.hint
    context = contextvars.copy_context()
    context.run(OWNER.set, "somebody else")
    assert context.run(compositor.accept, requests[0]).placements[0].hint is not first.hint
