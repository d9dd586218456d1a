"""The PyTorch pipeline draws what the runtime draws from the same noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.support.pytorch_pipeline import PyTorchPipeline
from benchmarks.support.similarity import psnr
from runtime import Compositor, Placement, Request, Sampling
from training.network.checkpoint import CheckpointError, read_checkpoint, write_checkpoint

SAMPLING = Sampling(steps=3, guidance_scale=4.0)


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
    ours = Compositor.load(tiny_bundle).run(Request(scene, [placement(90)], None, SAMPLING, 2, noise))
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


@pytest.mark.parametrize("control_scale", [1.0, 0.0])
def test_every_step_runs_the_controlnet(
    tiny_checkpoint: Path,
    scene: np.ndarray,  # type: ignore[type-arg]
    control_scale: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For both halves, and even where strength 0 makes nothing of it: it is the baseline's way."""
    pipeline = PyTorchPipeline(tiny_checkpoint, resolution=64)
    control, rows = pipeline._models["control"], []
    detail_maps = control.detail_maps

    def counted(hint: torch.Tensor, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows.append(len(hint))
        return detail_maps(hint, *arguments)

    monkeypatch.setattr(control, "detail_maps", counted)
    noise = np.random.default_rng(1).standard_normal((1, *pipeline.latent_shape), dtype=np.float32)
    sampling = Sampling(steps=3, guidance_scale=4.0, control_scale=control_scale)
    for _ in range(2):  # and nothing is kept for the next picture
        pipeline.run(scene, [placement(90)], noise, sampling)
    assert rows == [2] * 3 * 2


def test_strength_draws_another_picture(tiny_checkpoint: Path, scene: np.ndarray) -> None:  # type: ignore[type-arg]
    pipeline = PyTorchPipeline(tiny_checkpoint, resolution=64)
    noise = np.random.default_rng(1).standard_normal((1, *pipeline.latent_shape), dtype=np.float32)
    full = pipeline.run(scene, [placement(90)], noise, SAMPLING)[0]
    without = pipeline.run(
        scene, [placement(90)], noise, Sampling(steps=3, guidance_scale=4.0, control_scale=0.0)
    )[0]
    assert not np.array_equal(full.image, without.image)
    stages = {"read", "prepare", "id_encoder", "sample", "control", "denoise", "decode", "paste"}
    assert full.seconds.keys() == without.seconds.keys() == stages


def test_its_start_does_not_look_at_every_weight(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """No pipeline in use does: it would be charged with reading the checkpoint once more."""
    checkpoint = read_checkpoint(tiny_checkpoint)
    tensors = load_file(tiny_checkpoint)
    tensors["model.diffusion_model.out.2.bias"][0] = float("nan")
    write_checkpoint(tmp_path / "broken.safetensors", tensors, checkpoint.architecture)
    with pytest.raises(CheckpointError, match="not finite"):
        read_checkpoint(tmp_path / "broken.safetensors").load_part("unet")
    PyTorchPipeline(tmp_path / "broken.safetensors", resolution=64)
