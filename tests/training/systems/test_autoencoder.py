"""The autoencoder of a small model."""

from __future__ import annotations

import torch

from tests.support.tiny import TINY
from training.network.architecture import LATENT_SCALE
from training.network.modules import build_vae
from training.systems.autoencoder import normalise_latents


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
