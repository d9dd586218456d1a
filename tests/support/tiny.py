"""The network that the tests of training train: it has every kind of part, and learns on one core."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from training.network.architecture import Architecture
from training.network.modules import AnyDoor

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


def open_zero_convolutions(model: AnyDoor) -> None:
    """Lets the control have a say from the first step on."""
    for convolution in (*model.control.controlnet_down_blocks, model.control.controlnet_mid_block):
        nn.init.normal_(convolution.weight, std=0.02)


class RandomPairs:
    """Encoded pairs for it that follow from their number; the first `different` of them, over and over."""

    def __init__(self, different: int = 10**9) -> None:
        self.different = different

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng(number % self.different)
        return {
            "latents": rng.standard_normal((4, 4, 4), np.float32),
            "noise": rng.standard_normal((4, 4, 4), np.float32),
            "timestep": int(rng.integers(1000)),
            "features": rng.standard_normal((9, 64), np.float32),
            "hint": rng.uniform(-1, 1, (4, 32, 32)).astype(np.float32),
        }
