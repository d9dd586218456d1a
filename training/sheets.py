"""Sheets to look at: pictures of pairs, one pair per column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.files import replacing
from training.data.pairs import Picture


def to_picture(values: NDArray[np.float32]) -> Picture:
    """Converts a picture (3, R, R), about -1..1, to uint8 (R, R, 3)."""
    picture: Picture = np.clip(values.transpose(1, 2, 0) * 127.5 + 127.5, 0, 255).astype(np.uint8)
    return picture


def column(reference: Picture, hint: NDArray[np.float32], *pictures: NDArray[np.float32]) -> Picture:
    """Stacks a pair from top to bottom: reference, the hint's collage, its mask, and further pictures.

    Args:
        reference: (S, S, 3) uint8.
        hint: (4, R, R), see `runtime.imaging.collage`.
        pictures: (3, R, R) each, -1..1.

    Returns:
        uint8 (rows * R, R, 3).
    """
    side = hint.shape[-1]
    shown = np.asarray(Image.fromarray(reference).resize((side, side)))
    mask = np.repeat(hint[3:], 3, axis=0)
    return np.concatenate([shown, *(to_picture(picture) for picture in (hint[:3], mask, *pictures))])


def write_sheet(columns: Sequence[Picture], path: Path) -> None:
    """Writes columns side by side as a PNG."""
    with replacing(path) as partial:
        Image.fromarray(np.concatenate(columns, axis=1)).save(partial, "PNG")
