"""Sampling: what a batch asks the graphs for while its samples are at different steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.options import EngineOptions
from runtime import Compositor, Placement, Request, Sampling
from runtime.sampling.running_batch import RunningBatch, Sample
from tests.support.anydoor import CONTROL
from tests.support.observers import RunCounter
from tests.support.pictures import PLACEMENT, SCENE, cutout


@pytest.fixture
def compositor(tiny_bundle: Path) -> Compositor:
    """Keeps no detail maps."""
    return Compositor.load(
        tiny_bundle, EngineOptions(backend="onnxruntime", device="cpu", threads=1), cache_bytes=0
    )


@pytest.fixture
def counter(compositor: Compositor) -> RunCounter:
    compositor.engine.observer = counter = RunCounter()
    return counter


def start(compositor: Compositor, sampling: Sampling, num_images: int = 1) -> list[Sample]:
    """Samples at their first step."""
    drawing = compositor.new_drawing()
    job = compositor.accept(Request(SCENE, [PLACEMENT], 7, sampling, num_images))
    return [drawing.start(image) for image in job.images]


def batch_of(compositor: Compositor, samples: list[Sample]) -> RunningBatch:
    batch = RunningBatch(compositor.engine, compositor.bundle.manifest.step)
    batch.samples = samples
    return batch


def test_samples_of_a_placement_at_different_steps_compute_no_map_twice(
    compositor: Compositor, counter: RunCounter
) -> None:
    """Nothing is kept but the maps of the last step that was asked for, and one sample is a step ahead."""
    behind, ahead = start(compositor, Sampling(steps=5), num_images=2)
    assert behind.conditions is ahead.conditions
    batch = batch_of(compositor, [ahead])
    batch.step()
    batch.samples = [behind, ahead]
    for _ in range(4):
        batch.step()
    batch.samples = [behind]
    batch.step()
    assert behind.done
    assert [sample.error for sample in (behind, ahead)] == [None, None]
    assert counter.samples == [1, 2, 2, 2, 2, 1]
    assert counter.runs[CONTROL] == 5


def test_unlike_samples_that_share_their_calls_end_as_they_do_alone(compositor: Compositor) -> None:
    """With and without guidance, another sampler, another placement, and one that starts two steps late."""
    placements = [PLACEMENT, Placement(cutout(seed=5), box=(10, 10, 50, 60), mode="shape")]
    settings = [
        (placements[0], Sampling(steps=4)),
        (placements[0], Sampling(steps=3, guidance_scale=1.0)),
        (placements[1], Sampling(steps=4, sampler="dpm_solver_2m", control_scale=0.5)),
        (placements[1], Sampling(steps=3, eta=1.0)),
    ]

    def started() -> list[Sample]:
        drawing = compositor.new_drawing()
        jobs = [
            compositor.accept(Request(SCENE, [placement], seed, sampling))
            for seed, (placement, sampling) in enumerate(settings)
        ]
        return [drawing.start(job.images[0]) for job in jobs]

    alone, together = started(), started()
    for sample in alone:
        batch = batch_of(compositor, [sample])
        for _ in range(sample.schedule.steps):
            batch.step()
    batch = batch_of(compositor, together[:3])
    batch.step()
    batch.step()
    batch.samples = list(together)
    for _ in range(3):
        batch.step()
        batch.samples = [sample for sample in batch.samples if not sample.done]
    for found, expected in zip(together, alone):
        assert (found.done, found.error, expected.error) == (True, None, None)
        latents = (
            compositor.engine.to_host(sample.latent.tensor)[sample.latent.row] for sample in (found, expected)
        )
        np.testing.assert_allclose(*latents, atol=1e-4)


def test_a_step_without_guidance_has_one_row(compositor: Compositor, counter: RunCounter) -> None:
    sampling = Sampling(timesteps=(101, 501, 901), guidance_interval=(300, 700))
    batch = batch_of(compositor, start(compositor, sampling, num_images=2))
    for _ in range(3):
        batch.step()
    assert counter.rows["denoise"] == [2, 4, 2]
    assert counter.samples == [2, 2, 2]


def test_a_clean_latent_is_told_when_it_is_asked_for(compositor: Compositor) -> None:
    first, second = start(compositor, Sampling(steps=4), num_images=2)
    batch = batch_of(compositor, [first, second])
    first.wants_clean_latent = True
    assert batch.steps_alike() == 1
    batch.step()
    assert not first.wants_clean_latent
    assert first.clean_latent is not None
    assert first.clean_latent.shape == compositor.bundle.manifest.latent_shape
    assert second.clean_latent is None


def test_steps_are_taken_at_once_by_samples_that_are_at_the_same_one(compositor: Compositor) -> None:
    """Whose detail maps are the same at all of them, and of which nobody wants to see anything meanwhile."""
    first, second = start(compositor, Sampling(steps=4, map_steps=1), num_images=2)
    batch = batch_of(compositor, [first, second])
    assert batch.steps_alike() == 4
    second.wants_clean_latent = True
    assert batch.steps_alike() == 1
    second.wants_clean_latent = False
    batch.samples = [first]
    batch.step()
    batch.samples = [first, second]
    assert batch.steps_alike() == 1


def test_latents_come_in_the_order_in_which_they_are_asked_for(compositor: Compositor) -> None:
    """Also where they lie in one tensor, the other way round."""
    first, second = start(compositor, Sampling(steps=2), num_images=2)
    batch = batch_of(compositor, [first, second])
    batch.step()
    straight, turned = (
        compositor.engine.to_host(batch.latents(samples)) for samples in ([first, second], [second, first])
    )
    np.testing.assert_array_equal(turned, straight[::-1])
    assert (turned != straight).any()


def test_samples_at_different_steps_find_their_own_maps_in_one_window(tiny_bundle: Path) -> None:
    """All maps lie in the same tensors, and each step has rows of its own; a third sample has other maps."""
    options = EngineOptions(backend="onnxruntime", device="cpu", threads=1)
    compositor = Compositor.load(tiny_bundle, options, control_window=4)
    other = Request(SCENE, [Placement(cutout(seed=5), box=(10, 10, 50, 60))], 9, Sampling(steps=4))
    alone, together = (
        [
            *start(compositor, Sampling(steps=4), num_images=2),
            compositor.new_drawing().start(compositor.accept(other).images[0]),
        ]
        for _ in range(2)
    )
    for sample in alone:
        batch = batch_of(compositor, [sample])
        for _ in range(4):
            batch.step()
    behind, ahead, third = together
    for samples in ([ahead], *3 * [[behind, ahead, third]], [behind, third]):
        batch.samples = samples
        batch.step()
    for found, expected in zip(together, alone):
        assert (found.done, found.error) == (True, None)
        latents = (
            compositor.engine.to_host(sample.latent.tensor)[sample.latent.row] for sample in (found, expected)
        )
        np.testing.assert_allclose(*latents, atol=1e-4)


@pytest.mark.parametrize(("window", "expected"), [(1, 4 * [False]), (2, [False, True, False, True])])
def test_a_step_has_its_maps_if_the_one_before_is_of_the_same_window(
    tiny_bundle: Path, window: int, expected: list[bool]
) -> None:
    options = EngineOptions(backend="onnxruntime", device="cpu", threads=1)
    compositor = Compositor.load(tiny_bundle, options, control_window=window)
    (sample,) = start(compositor, Sampling(steps=4))
    batch, found = batch_of(compositor, [sample]), []
    for _ in range(4):
        found.append(sample.has_banks)
        batch.step()
    assert found == expected


def test_a_sample_that_fails_alone_tells_its_own_reason(
    compositor: Compositor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not that of the call which it shared."""
    samples = start(compositor, Sampling(steps=2), num_images=2)
    batch, run = batch_of(compositor, samples), compositor.engine.run

    def fail(graph: str, inputs: Any, *others: Any) -> Any:
        if graph == compositor.bundle.manifest.step.name:
            raise RuntimeError(f"{len(inputs['timestep'])} at once")
        return run(graph, inputs, *others)

    monkeypatch.setattr(compositor.engine, "run", fail)
    batch.step()
    assert [str(sample.error) for sample in samples] == ["1 at once", "1 at once"]
