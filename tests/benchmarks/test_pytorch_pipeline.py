"""The PyTorch pipeline draws what the runtime draws from the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison import psnr
from benchmarks.pytorch_pipeline import PyTorchPipeline
from runtime import Compositor, Placement, Sampling

SAMPLING = Sampling(steps=3, guidance=4.0)


@pytest.fixture
def scene() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)


def placement(shade: int) -> Placement:
    cutout = np.full((40, 40, 4), shade, np.uint8)
    cutout[:4, :, 3] = 0
    cutout[4:, :, 3] = 255
    return Placement(cutout, box=(20, 30, 70, 80))


def test_samples_of_one_placement(tiny_bundle: Path, tiny_checkpoint: Path, scene: np.ndarray) -> None:  # type: ignore[type-arg]
    pipeline = PyTorchPipeline(tiny_checkpoint, resolution=64)
    noise = np.random.default_rng(1).standard_normal((2, *pipeline.latent_shape), dtype=np.float32)
    theirs = pipeline.run(scene, [placement(90)], noise, SAMPLING)
    ours = Compositor.load(tiny_bundle).run(
        scene, placement(90), sampling=SAMPLING, num_images=2, initial_noise=noise
    )
    assert not np.array_equal(theirs[0].image, theirs[1].image)
    for their, our in zip(theirs, ours):
        assert psnr(our.image, their.image, peak=255) > 50
        assert their.regions == our.regions


def test_different_placements_in_a_batch(tiny_checkpoint: Path, scene: np.ndarray) -> None:  # type: ignore[type-arg]
    """Each is what it is alone."""
    pipeline = PyTorchPipeline(tiny_checkpoint, resolution=64)
    noise = np.random.default_rng(1).standard_normal((2, *pipeline.latent_shape), dtype=np.float32)
    placements = [placement(90), placement(200)]
    together = pipeline.run(scene, placements, noise, SAMPLING)
    for index, composite in enumerate(together):
        alone = pipeline.run(scene, [placements[index]], noise[index : index + 1], SAMPLING)[0]
        assert psnr(composite.image, alone.image, peak=255) > 50


def test_every_step_runs_the_controlnet(tiny_checkpoint: Path, scene: np.ndarray) -> None:  # type: ignore[type-arg]
    """Strength 0 draws another picture, at the same cost: it is the baseline's way."""
    pipeline = PyTorchPipeline(tiny_checkpoint, resolution=64)
    noise = np.random.default_rng(1).standard_normal((1, *pipeline.latent_shape), dtype=np.float32)
    full = pipeline.run(scene, [placement(90)], noise, SAMPLING)[0]
    without = pipeline.run(scene, [placement(90)], noise, Sampling(steps=3, guidance=4.0, strength=0.0))[0]
    assert not np.array_equal(full.image, without.image)
    stages = {"read", "prepare", "id_encoder", "sample", "control", "denoise", "decode", "paste"}
    assert full.seconds.keys() == without.seconds.keys() == stages
