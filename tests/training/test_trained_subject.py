"""A subject that was trained on an inpainting model is placed into a scene by prompt, through a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.build_engines import main as build
from runtime import Placement, Request, Sampling
from runtime.imaging.boxes import Box
from tests.support.serving import ServerThread, held_compositor
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle
from tests.training.test_train_dreambooth import recipe
from training.train import main as train

BOX = Box(30, 20, 70, 60)


@pytest.mark.nightly
def test_a_trained_subject_is_placed_into_a_scene(tmp_path: Path) -> None:
    path = recipe(tmp_path, inpaint=True, prior_weight=0.0, steps=1, text_encoder="true")
    assert train([str(path), "--folder", str(tmp_path / "run")]) == 0
    checkpoint, tokenizer = tmp_path / "run" / "model.safetensors", tmp_path / "start" / "tokenizer"
    bundle = tmp_path / "bundle"
    how = ["--tokenizer", str(tokenizer), "--resolution", "64", "--precision", "fp32"]
    assert build([str(checkpoint), *how, "--output", str(bundle)]) == 0

    scene = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    request = Request(scene, [Placement(prompt="a mat cat", box=tuple(BOX))], 3, Sampling(steps=2))
    with ServerThread(bundle) as server, server.client() as client:
        found = np.asarray(client.run(request)[0].image)
    alone = held_compositor(bundle)[0].run(request)[0]
    before = held_compositor(tiny_stable_diffusion_bundle(9, version="1.x"))[0].run(request)[0].image

    assert np.abs(found.astype(int) - alone.image).max() <= 1
    [region] = alone.regions
    outside = np.ones(scene.shape[:2], bool)
    outside[region.slices] = False
    np.testing.assert_array_equal(found[outside], scene[outside])
    inside = BOX.slices
    assert (found[inside] != scene[inside]).mean() > 0.5
    # with the weights that were trained, not with those of the start
    assert np.abs(found[inside].astype(int) - before[inside]).max() > 3
