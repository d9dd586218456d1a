"""What a network needs that is small and starts from nothing; the published one is large and inherits."""

from __future__ import annotations

from typing import TypeVar

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import nn

from training.architecture import Architecture
from training.model import AnyDoor, DetailControlNet, build_vae

NORM_GROUPS = 8
"""Groups of every group normalisation; Stable Diffusion has 32.

A group's mean and scale are taken away from it. With the 32 to 128 channels of a small network, 32 groups of
1 to 4 channels would lose colours and noise levels. The number goes into the checkpoint's metadata, as the
widths of attention heads do.
"""

_Module = TypeVar("_Module", bound=ModelMixin)


def regrouped(module: _Module) -> _Module:
    """A fresh module of the same kind and size with `NORM_GROUPS` groups."""
    fresh: _Module = type(module).from_config({**module.config, "norm_num_groups": NORM_GROUPS})
    return fresh


def build_small_vae(architecture: Architecture) -> AutoencoderKL:
    """The autoencoder of Stable Diffusion with `NORM_GROUPS` groups."""
    return regrouped(build_vae(architecture))


def build_small(architecture: Architecture) -> AnyDoor:
    """A network whose parts have `NORM_GROUPS` groups, ready to be trained from nothing."""
    model = AnyDoor(architecture)
    for part in ("vae", "unet", "control"):
        setattr(model, part, regrouped(getattr(model, part)))
    open_control(model.control)
    return model


@torch.no_grad()
def open_control(control: DetailControlNet) -> None:
    """Lets the hint through from the first step on.

    Zero convolutions protect a trained UNet from an untrained ControlNet. Here nothing is trained: they would
    only hold the hint back, and so would a hint block without normalisation whose default weights shrink the
    signal with every layer.
    """
    for layer in control.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.orthogonal_(layer.weight, gain=0.5)
