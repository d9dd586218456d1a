"""The autoencoder of a small model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import TINY
from training.data.synthetic.views import VIEW_SIZE
from training.data.view_store import SCENES, ViewStore, draw_views
from training.network.architecture import LATENT_SCALE
from training.network.modules import build_vae
from training.systems.autoencoder import SceneCrops, normalise_latents


def test_latents_get_unit_variance_and_the_decoder_does_not_notice() -> None:
    torch.manual_seed(0)
    vae = build_vae(TINY).eval()
    pictures = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before = vae(pictures).sample
        normalise_latents(vae, pictures)
        after = vae(pictures).sample
        posterior = vae.encode(pictures).latent_dist
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    scaled = posterior.mean * LATENT_SCALE
    torch.testing.assert_close(scaled.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(posterior.std * LATENT_SCALE, torch.full_like(posterior.std, 0.01))


def test_a_batch_in_a_device_s_memory_shows_pieces_of_the_same_scenes(tmp_path: Path) -> None:
    """The geometry is compared in test_device.py; here: whole levels, every scene, some as in the picture."""
    draw_views(tmp_path, 2)
    crops = SceneCrops(ViewStore(tmp_path), VIEW_SIZE, seed=0)  # as large as the scene: nothing to draw
    found = crops.batch(range(64), torch.device("cpu"))["picture"]
    assert (found.shape, found.dtype) == ((64, 3, VIEW_SIZE, VIEW_SIZE), torch.float32)
    possible = {crops[number]["picture"].tobytes() for number in range(200)}
    assert {picture.numpy().tobytes() for picture in found} == possible
    assert len(possible) == 2 * SCENES * 2

    small = SceneCrops(ViewStore(tmp_path), 48, seed=0)
    batch, singly = small.batch(range(400), torch.device("cpu"))["picture"], [small[n] for n in range(400)]
    for measure in (torch.mean, torch.std):
        expected = measure(torch.from_numpy(np.stack([sample["picture"] for sample in singly])))
        assert float(measure(batch)) == pytest.approx(float(expected), abs=0.05)
