"""Sampling: what a batch asks the graphs for while its samples are at different steps."""

from __future__ import annotations

from pathlib import Path

from runtime.request import Request, Sampling
from tests.support.anydoor import CONTROL
from tests.support.scheduling import PLACEMENT
from tests.support.serving import SCENE, held_compositor


def test_samples_of_a_placement_at_different_steps_compute_no_map_twice(tiny_bundle: Path) -> None:
    """Nothing is kept but the maps of the last step that was asked for, and one sample is a step ahead."""
    compositor, engine = held_compositor(tiny_bundle, cache_bytes=0)
    job = compositor.accept(Request(SCENE, [PLACEMENT], 7, Sampling(steps=5), num_images=2))
    for canvas in job.canvases:
        canvas.prepare()
    behind, ahead = (compositor.start(canvas) for canvas in job.canvases)
    assert behind.conditions.maps is ahead.conditions.maps
    batch = compositor.new_batch()
    batch.samples = [ahead]
    batch.step()
    batch.samples = [behind, ahead]
    while not ahead.done:
        batch.step()
    batch.samples = [behind]
    batch.step()
    assert behind.done
    assert [sample.error for sample in (behind, ahead)] == [None, None]
    assert [len(timesteps) for timesteps in engine.steps] == [1, 2, 2, 2, 2, 1]
    assert engine.count(CONTROL) == 5
