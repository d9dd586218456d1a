"""Where the noise of pictures comes from: seed and placement, or the caller, whoever shares the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.options import EngineOptions
from runtime import Compositor, Request, Sampling
from runtime.sampling.running_batch import RunningBatch
from tests.support.pictures import PLACEMENT, SCENE


@pytest.fixture(scope="module")
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, EngineOptions(backend="onnxruntime", device="cpu", threads=1))


def test_every_placement_of_every_seed_has_noise_of_its_own(compositor: Compositor) -> None:
    job = compositor.accept(Request(SCENE, 2 * [PLACEMENT], 7, Sampling(steps=1), num_images=2))
    drawn = set()
    for image in job.images:
        for image.drawn in range(2):
            noise = image.new_generator().standard_normal(4)
            np.testing.assert_array_equal(image.new_generator().standard_normal(4), noise)
            drawn.add(tuple(noise))
    assert len(drawn) == 4


def test_every_step_adds_noise_of_its_own(compositor: Compositor) -> None:
    """It follows the noise that the picture starts from. Who asks again before the step is taken, as when a
    call has failed, gets the same."""
    job = compositor.accept(Request(SCENE, [PLACEMENT], 7, Sampling(steps=3, eta=1.0)))
    shape = compositor.bundle.manifest.latent_shape
    sample = compositor.new_drawing().start(job.images[0])
    batch = RunningBatch(compositor.engine, compositor.bundle.manifest.step)
    batch.samples = [sample]
    generator = job.images[0].new_generator()
    generator.standard_normal(shape, np.float32)
    for _ in range(3):
        expected = generator.standard_normal(shape, np.float32)
        for _ in range(2):
            np.testing.assert_array_equal(sample.noise(shape), expected)
        batch.step()
    assert sample.done


def test_each_picture_has_its_own_part_of_the_initial_noise(compositor: Compositor) -> None:
    noise = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    sampling = Sampling(steps=2)
    together = compositor.composite(
        SCENE, PLACEMENT, seed=1, sampling=sampling, num_images=2, initial_noise=noise
    )
    for image, own in zip(together, noise):
        alone = compositor.composite(SCENE, PLACEMENT, seed=1, sampling=sampling, initial_noise=own[None])
        assert np.abs(np.asarray(image).astype(int) - np.asarray(alone)).max() <= 1
    assert (np.asarray(together[0]) != np.asarray(together[1])).any()
