"""LPIPS: how different two pictures look to AlexNet.

Source: Zhang et al., CVPR 2018, equation 1, version 0.1 with linear weights; the package lpips, which has the
linear weights in weights/v0.1/alex.pth. Those of AlexNet are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.support.feature_distance import Features, mean_distance, normalise
from engines.errors import AnyDoorError

Picture = NDArray[np.uint8]

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of pictures in -1..1, as AlexNet was trained."""

_LAYERS = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}
"""Number of each convolution among AlexNet's `features` -> stride and padding."""

_POOLED = {3, 6}
"""Convolutions with a 3 x 3 maximum of stride 2 before them."""


class Lpips:
    """The distance, with the weights of a folder."""

    def __init__(self, weights: dict[int, tuple[Tensor, Tensor]], linear: Sequence[Tensor]) -> None:
        """Takes weight and bias of each convolution, and the weight (1, C, 1, 1) of each layer's channels."""
        self._weights, self._linear = weights, linear

    @torch.no_grad()
    def features(self, picture: Picture, side: int) -> Features:
        """Computes the five layers of a picture, scaled to `side` pixels; each pixel has the norm 1."""
        image = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        hidden, found = (values - shift) / scale, []
        for number, (stride, padding) in _LAYERS.items():
            if number in _POOLED:
                hidden = F.max_pool2d(hidden, 3, 2)
            hidden = F.relu(F.conv2d(hidden, *self._weights[number], stride, padding))
            found.append(normalise(hidden))
        return found

    def diversity(self, pictures: Sequence[Picture], side: int = 256) -> float:
        """Computes the mean distance over all pairs of pictures (H, W, 3) uint8; at least two."""
        return mean_distance([self.features(picture, side) for picture in pictures], self._linear)


def load_lpips(folder: Path) -> Lpips:
    """Reads a folder with torchvision's AlexNet, `alexnet*.pth`, and the linear weights, `alex.pth`.

    Raises:
        AnyDoorError: one of them is missing, or is not what it should be.
    """
    found = sorted(folder.glob("alexnet*.pth"))
    if not found or not (folder / "alex.pth").is_file():
        raise AnyDoorError(
            f"'{folder}' lacks alexnet*.pth (torchvision's AlexNet) or alex.pth (linear weights of LPIPS 0.1)"
        )
    try:
        network, linear = (
            torch.load(path, "cpu", weights_only=True) for path in (found[0], folder / "alex.pth")
        )
        weights = {n: (network[f"features.{n}.weight"], network[f"features.{n}.bias"]) for n in _LAYERS}
        return Lpips(weights, [linear[f"lin{n}.model.1.weight"] for n in range(len(_LAYERS))])
    except (KeyError, RuntimeError, OSError, ValueError, TypeError) as error:
        raise AnyDoorError(f"cannot read LPIPS from '{folder}': {error!r}") from error
