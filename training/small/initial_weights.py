"""Initialises a small ControlNet from scratch; the published one starts as a copy of the UNet."""

from __future__ import annotations

import torch
from torch import nn

from training.network.modules import DetailControlNet


@torch.no_grad()
def open_control(control: DetailControlNet) -> None:
    """Lets the hint through from the first step on.

    Zero convolutions protect a trained UNet from an untrained ControlNet. Here nothing is trained yet: they
    would only hold the hint back, and so would a hint block without normalisation whose default weights
    shrink the signal with every layer.
    """
    for layer in control.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for layer in (*control.controlnet_down_blocks, control.controlnet_mid_block):
        nn.init.orthogonal_(layer.weight, gain=0.5)
