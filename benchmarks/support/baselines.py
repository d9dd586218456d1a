"""Baselines without a network: an empty place, copy-paste; another is `runtime.imaging.guess_background`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.imaging.boxes import Box, smallest_box

Picture = NDArray[np.uint8]

_INSIDE = 128


def exact_box(mask: Picture) -> Box:
    """Return the smallest box around an object; mask: (H, W), 0..255, not empty."""
    return smallest_box(mask > _INSIDE)


def empty_box(scene: Picture, box: Box) -> Picture:
    """Return the scene (H, W, 3), black in the box."""
    result: Picture = scene.copy()
    result[box.slices] = 0
    return result


def copy_paste(image: Picture, mask: Picture, scene: Picture, box: Box) -> Picture:
    """Paste an object into a scene: cut out along its mask and stretched to the box.

    image: (H, W, 3). mask: (H, W), 0..255, how much of each pixel is the object. Inside the box, the scene
    remains around the object.
    """
    cutout = Image.fromarray(np.dstack([image, mask])).crop(exact_box(mask))
    canvas = Image.fromarray(scene)
    resized = cutout.resize((box.width, box.height), Image.Resampling.BILINEAR)
    canvas.paste(resized, (box.x0, box.y0), resized)
    return np.asarray(canvas)


def on_white(image: Picture, mask: Picture) -> Picture:
    """Return a picture (H, W, 3) with everything but the object white; mask: (H, W), 0..255."""
    share = mask[..., None] / 255
    result: Picture = np.rint(image * share + 255 * (1 - share)).astype(np.uint8)
    return result


def fitted(picture: Picture, side: int) -> Picture:
    """Fit a picture (H, W, 3) into the middle of a white square (side, side, 3)."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(Image.fromarray(picture).resize(size), ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(canvas)
