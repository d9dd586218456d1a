"""Masked patch similarity: how well the patches of a drawn object are found in its reference.

For every patch inside the object's mask in the drawn picture, the largest cosine to a patch inside the
object's mask in the reference; the mean of these. Patches are described by DINOv2's tokens, which tell parts
of objects apart wherever they are (Oquab et al., 2023): a pose may change, and a detail that is lost counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.imaging.reference import prepare_reference
from training.network.checkpoint import read_checkpoint

Picture = NDArray[np.uint8]

SIDE = 224
"""Of the pictures that are described, in pixels."""

_INSIDE = 128


class PatchSimilarity:
    """Compares an object in two pictures."""

    def __init__(self, name: str, describe: Callable[[Tensor], Tensor]) -> None:
        """Keeps the network.

        Args:
            name: of the network, for the report.
            describe: (N, 3, 224, 224) in 0..1 -> (N, 1 + P * P, width); the class token comes first.
        """
        self.name = name
        self._describe = describe

    def __call__(self, found: Picture, found_mask: Picture, object_: Picture, object_mask: Picture) -> float:
        """Return the similarity, at most 1; pictures (H, W, 3), masks (H, W) of 0..255."""
        return self.to_patches(found, found_mask, self.patches(object_, object_mask))

    def to_patches(self, found: Picture, found_mask: Picture, theirs: Tensor) -> float:
        """Return the similarity to an object whose patches are known."""
        return float((self.patches(found, found_mask) @ theirs.T).max(dim=1).values.mean())

    @torch.no_grad()
    def patches(self, picture: Picture, mask: Picture) -> Tensor:
        """Describe the patches that are mostly the object, at least one: unit vectors (M, width)."""
        prepared = prepare_reference(picture, mask > _INSIDE, expand_ratio=1.0, size=SIDE)
        pixels = torch.from_numpy(prepared.image.transpose(2, 0, 1).astype(np.float32) / 255)[None]
        tokens = torch.nn.functional.normalize(self._describe(pixels)[0, 1:], dim=-1)
        side = round(len(tokens) ** 0.5)
        share = prepared.mask.reshape(side, SIDE // side, side, SIDE // side).mean(axis=(1, 3)).ravel()
        return tokens[torch.from_numpy(share >= min(_INSIDE, share.max()))]


def load_dinov2(folder: Path) -> PatchSimilarity:
    """Load DINOv2 from a folder like that of facebook/dinov2-base.

    Raises:
        AnyDoorError: the folder does not hold such a model.
    """
    from transformers import Dinov2Model

    from benchmarks.support.embeddings import load_network
    from training.network.modules import IMAGENET_MEAN, IMAGENET_STD

    model, _ = load_network("DINOv2", "dinov2", Dinov2Model, folder)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return PatchSimilarity("DINOv2", lambda pixels: model((pixels - mean) / std).last_hidden_state)


def own_dinov2(checkpoint: Path) -> PatchSimilarity:
    """Take the small DINOv2 of a checkpoint of AnyDoor or IMPRINT, where no published weights are given.

    Raises:
        CheckpointError: it cannot be read.
    """
    encoder: Any = read_checkpoint(checkpoint).load_part("id_encoder", torch.float32).id_encoder
    return PatchSimilarity("own DINOv2", encoder.features)
