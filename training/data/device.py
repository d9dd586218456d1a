"""Draws whole batches in a device's memory, without waiting for the host.

The random numbers of a batch follow from its first number, so a training that goes on sees what it would have
seen; another device or another size of batch draws others.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from training.data.pairs import LIGHT

WHITE = 255.0

MAPPED: Literal["c"] = "c"
"""How arrays on disk are opened: writing would not change the file. PyTorch warns of arrays that cannot be
written."""


def resident(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copies an array, see `MAPPED`, into a device's memory as it is; on a processor it stays where it is."""
    return torch.from_numpy(array).to(device)


def generator(seed: int, numbers: range, device: torch.device) -> torch.Generator:
    """Makes the source of randomness of the batch of samples `numbers`."""
    mixed = np.random.SeedSequence([seed, numbers.start]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def flipped(pictures: Tensor, which: Tensor) -> Tensor:
    """Mirrors those of the pictures (N, C, H, W) left to right that `which` (N,), bool, says."""
    return torch.where(which.view(-1, 1, 1, 1), pictures.flip(3), pictures)


def crop_squares(pictures: Tensor, left: Tensor, top: Tensor, sides: Tensor, size: int) -> Tensor:
    """Cuts a square out of each picture and resizes it like `runtime.imaging.resize.resize_linear`.

    Args:
        pictures: (N, C, H, W) float32.
        left, top, sides: (N,), of the squares, in pixels. Beyond its picture a square is 0.
        size: pixels per side of the result.

    Returns:
        (N, C, size, size) float32, before it is rounded.
    """
    middles = (torch.arange(size, device=pictures.device) + 0.5) / size
    inner = torch.minimum((middles * sides[:, None] - 0.5).clamp(min=0), sides[:, None] - 1)
    height, width = pictures.shape[2:]
    # as grid_sample counts: from -1 at the first pixel's outer edge to 1 at the last one's
    x, y = ((2 * (low[:, None] + inner) + 1) / length - 1 for low, length in ((left, width), (top, height)))
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    return F.grid_sample(pictures, grid, align_corners=False)


def draw_tenths(limits: tuple[float, float], shares: Tensor) -> Tensor:
    """Makes numbers between the limits, both included, in steps of 0.1, float64, of shares 0..1 (below 1)."""
    first, last = (round(limit * 10) for limit in limits)
    return (first + (shares * (last + 1 - first)).long()).double() / 10


def change_light(pictures: Tensor, which: Tensor, shares: Tensor) -> Tensor:
    """Changes contrast and brightness of pictures, as `training.data.pairs.augment_reference` does.

    Args:
        pictures: (N, 3, H, W) float32, whole numbers 0..255.
        which: (N,) bool, those that change.
        shares: (2, N), 0..1, how much contrast and brightness change: 0.5 is not at all.
    """
    contrast, brightness = (LIGHT * (2 * shares - 1)).view(2, -1, 1, 1, 1)
    changed = (pictures * (1 + contrast) + 255 * brightness).clamp(0, 255).floor()
    return torch.where(which.view(-1, 1, 1, 1), changed, pictures)


def prepare_references(pictures: Tensor, inside: Tensor, ratios: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cuts objects out, puts them on white and centres them, as `runtime.imaging.reference` does with one.

    Args:
        pictures: (N, 3, H, W) float32, 0..255.
        inside: (N, H, W) bool, at least 10 pixels of each.
        ratios: (N,) float64, of the room around each object to its box.
        size: pixels per side of the result.

    Returns:
        Pictures (N, 3, size, size) and masks (N, size, size), float32, whole numbers 0..255.
    """
    columns, left, width = span(inside.any(1))
    rows, top, height = span(inside.any(2))
    roomy = [(length * ratios).long() for length in (width, height)]
    sides = torch.maximum(*roomy)
    left, top = (
        low - (room - length) // 2 - (sides - room) // 2
        for low, length, room in zip((left, top), (width, height), roomy, strict=True)
    )
    shown = (inside & rows[:, :, None] & columns[:, None, :])[:, None]
    below_white = torch.cat([(pictures - WHITE) * shown, WHITE * shown], 1)
    prepared = crop_squares(below_white, left, top, sides, size)
    return (prepared[:, :3] + WHITE).round(), prepared[:, 3].round()


def span(covered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `bounding_box` takes of an axis (N, L): which pixels, the first one, and how many."""
    counted, last = covered.int(), covered.shape[1] - 1
    first = counted.argmax(1)
    length = (last - counted.flip(1).argmax(1) - first).clamp(min=1)
    place = torch.arange(last + 1, device=covered.device) - first[:, None]
    return (place >= 0) & (place < length[:, None]), first, length
