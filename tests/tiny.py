"""The network that the tests of training train: it has every kind of part, and learns on one core."""

from __future__ import annotations

from training.architecture import Architecture

TINY = Architecture(
    unet_channels=(32, 64),
    unet_attention=(False, True),
    unet_layers=1,
    unet_head_width=32,
    unet_norm_groups=8,
    token_width=32,
    vae_channels=(32, 32, 32, 32),
    vae_layers=1,
    dino_width=64,
    dino_depth=1,
    dino_heads=1,
    dino_grid=16,
)
