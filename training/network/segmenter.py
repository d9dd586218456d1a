"""Defines a small U-Net that segments the main object of a picture.

Source: U-Net (Ronneberger et al., 2015), with sums in place of concatenations; residual blocks with group
normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from training.network.architecture import ArchitectureError, check_sizes

PATCH = 2
"""Side of the square of pixels that the network takes as one."""


@dataclass(frozen=True)
class SegmenterArchitecture:
    """Sizes of the network."""

    side: int = 128
    """Side of its pictures, in pixels."""
    channels: tuple[int, ...] = (16, 32, 64, 96, 96)
    """Channels of each level; each level halves width and height."""
    norm_groups: int = 8

    def __post_init__(self) -> None:
        """Refuses sizes that do not go together.

        Raises:
            ArchitectureError: names them.
        """
        check_sizes(self)
        if not self.channels:
            raise ArchitectureError("channels must name the width of at least one level")
        if any(width % self.norm_groups for width in self.channels):
            raise ArchitectureError(f"channels must be multiples of norm_groups, {self.norm_groups}")
        if self.side % (step := PATCH * 2 ** (len(self.channels) - 1)):
            raise ArchitectureError(f"side is {self.side}; expected a multiple of {step}")


class _Block(nn.Module):
    """Two convolutions beside the way through."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, width), nn.GroupNorm(groups, width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, value: Tensor) -> Tensor:
        """Maps (N, C, h, w) to the same shape."""
        inner = self.conv1(F.silu(self.norm1(value)))
        return value + self.conv2(F.silu(self.norm2(inner)))  # type: ignore[no-any-return]


class Segmenter(nn.Module):
    """Pictures (N, 3, S, S), -1..1 RGB -> logits of the main object (N, 1, S, S)."""

    def __init__(self, architecture: SegmenterArchitecture) -> None:
        super().__init__()
        channels, groups = architecture.channels, architecture.norm_groups
        steps = list(pairwise(channels))
        self.enter = nn.Conv2d(3 * PATCH**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(wide, deep, 3, 2, 1) for wide, deep in steps)
        self.encoder = nn.ModuleList(_Block(width, groups) for width in channels)
        self.up = nn.ModuleList(nn.Conv2d(deep, wide, 1) for wide, deep in steps)
        self.decoder = nn.ModuleList(_Block(width, groups) for width in channels[:-1])
        self.leave = nn.Conv2d(channels[0], PATCH**2, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """See the class."""
        value = self.enter(F.pixel_unshuffle(picture, PATCH))
        passed = []
        for block, down in zip(self.encoder, self.down):
            passed.append(value := block(value))
            value = down(value)
        value = self.encoder[-1](value)
        for block, up, beside in zip(reversed(self.decoder), reversed(self.up), reversed(passed)):
            value = block(beside + F.interpolate(up(value), beside.shape[2:]))
        return F.pixel_shuffle(self.leave(value), PATCH)


def overlap(mask: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks (N, 1, H, W), 0..1, one for each (N,); 1 where both are empty."""
    both = torch.minimum(mask, truth).sum((1, 2, 3))
    either = torch.maximum(mask, truth).sum((1, 2, 3))
    return torch.where(either > 0, both / either.clamp(min=1e-6), 1.0)
