"""Trains the hint block of a small model's ControlNet alone. (The published model trains it with the rest.)

The block works at full resolution and costs as much as the rest of the network together, so a small model
learns it first: a convolution must tell the latents of a picture from what it makes of the hint. Afterwards
the hints are taken through it once (`training.small.encoding.encode_hints`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from training.loop import AnyDataset, Batch
from training.network.architecture import HINT_BLOCK_CHANNELS
from training.network.modules import DetailControlNet


class HintBlockModule(nn.Module):
    """The hint block, except for its last convolution, and a head that only its training needs."""

    def __init__(self, control: DetailControlNet) -> None:
        super().__init__()
        self.block = control.controlnet_cond_embedding
        self.block.conv_out.requires_grad_(False)  # learned with the diffusion part
        self.latent = nn.Conv2d(HINT_BLOCK_CHANNELS[-1], control.config.in_channels, 3, padding=1)
        # a plain reference: the rest of the ControlNet does not learn here
        self._features = control.hint_features

    def forward(self, hint: Tensor) -> Tensor:
        """Estimates the picture's latents (N, C, h, w) from its hint (N, 4, H, W)."""
        latent: Tensor = self.latent(self._features(hint))
        return latent


class HintBlockTask:
    """Mean squared error of the latents."""

    def __init__(self, control: DetailControlNet, pairs: AnyDataset) -> None:
        self.module = self.network = HintBlockModule(control)
        self._data = pairs

    def dataset(self) -> AnyDataset:
        """Gives pairs whose latents are encoded."""
        return self._data

    @staticmethod
    def load(control: DetailControlNet, weights: Mapping[str, Tensor]) -> None:
        """Puts what this task trained into a ControlNet."""
        HintBlockModule(control).load_state_dict(weights)

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Computes the loss of a batch of `EncodedPairs`."""
        return {"loss": F.mse_loss(module(batch["hint"]), batch["latents"])}
