"""How different pictures look to a network: the distance of LPIPS over features of any network.

The published LPIPS needs weights that not everybody has. `AutoencoderDistance` is the same formula over the
encoder of the model that draws: it was trained to keep what is in a picture, wherever it is, and DreamBooth
leaves it as it was, so all checkpoints of a model are judged by one network. Its values are not those of
LPIPS.

Source: Zhang et al., CVPR 2018, equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

Picture = NDArray[np.uint8]

Features = Sequence[Tensor]
"""Layers of a network for one picture, (1, C, h, w) each, of norm 1 at every position."""


def normalise(layer: Tensor) -> Tensor:
    """Scale a layer (N, C, h, w) to the norm 1 at every position."""
    norm: Tensor = layer.norm(dim=1, keepdim=True)
    return layer / (norm + 1e-10)


def mean_distance(pictures: Sequence[Features], weights: Sequence[Tensor]) -> float:
    """Compute the mean distance over all pairs of pictures.

    Args:
        pictures: features of at least two.
        weights: of the channels, (1, C, 1, 1) for each layer.
    """
    distances = [_distance(*pair, weights) for pair in combinations(pictures, 2)]
    return sum(distances) / len(distances)


def _distance(first: Features, second: Features, weights: Sequence[Tensor]) -> float:
    layers = zip(first, second, weights, strict=True)
    return float(sum(F.conv2d((a - b).square(), weight).mean() for a, b, weight in layers))


class AutoencoderDistance:
    """The distance over the levels of an autoencoder's encoder, with the same weight for all channels."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        """Take an autoencoder of Stable Diffusion's kind."""
        self._encoder = autoencoder.encoder
        widths = [block.resnets[-1].out_channels for block in self._encoder.down_blocks]
        self._weights = [torch.full((1, width, 1, 1), 1 / len(widths)) for width in widths]

    @torch.no_grad()
    def features(self, picture: Picture) -> Features:
        """Compute what each level makes of a picture (H, W, 3), before the bottleneck."""
        values = torch.from_numpy(picture.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        hidden, found = self._encoder.conv_in(values), []
        for block in self._encoder.down_blocks:
            hidden = block(hidden)
            found.append(normalise(hidden))
        return found

    def diversity(self, pictures: Sequence[Picture]) -> float:
        """Compute the mean distance over all pairs of pictures (H, W, 3) uint8; at least two.

        Returns:
            0 for equal pictures, at most 4: the mean over the levels of twice 1 minus the cosine of features
            at the same place.
        """
        return mean_distance([self.features(picture) for picture in pictures], self._weights)
