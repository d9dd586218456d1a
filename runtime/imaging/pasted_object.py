"""Pastes the object itself into its place: the picture that sampling starts from below full strength.

Source: SDEdit (Meng et al., 2022), section 4: noise and sampling make a pasted patch a part of the picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.imaging.boxes import Box, bounding_box, box_in_box, smallest_box
from runtime.imaging.geometry import Geometry
from runtime.imaging.resize import resize_linear


def object_pixels(picture: NDArray[np.uint8], mask: NDArray[np.bool_], side: int) -> NDArray[np.uint8]:
    """Cuts an object out, and makes it smaller if it is larger than a side.

    Args:
        picture: (H, W, 3) RGB.
        mask: (H, W), where the object is.
        side: most pixels of a side of the result.

    Returns:
        (h, w, 4): RGB multiplied by the opacity, and the opacity.
    """
    crop = bounding_box(mask).slices
    inside = mask[crop].astype(np.uint8)[..., None]
    pixels = np.concatenate([picture[crop] * inside, inside * np.uint8(255)], axis=2)
    height, width = pixels.shape[:2]
    scale = side / max(width, height)
    if scale >= 1:
        return pixels
    # each band alone: Pillow would multiply by the opacity again
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    bands = [Image.fromarray(pixels[..., band]).resize(size, Image.Resampling.BOX) for band in range(4)]
    return np.stack([np.asarray(band) for band in bands], axis=2)


def place_of(target: Box | NDArray[np.bool_]) -> Box:
    """Returns the place that was asked for: the box, or the smallest one around a mask (H, W)."""
    return target if isinstance(target, Box) else smallest_box(target)


def paste_object(
    scene: NDArray[np.uint8], geometry: Geometry, place: Box, pixels: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Pastes an object as large as it fits into its place, in the middle of the lower edge.

    Args:
        scene: (H, W, 3) RGB.
        geometry: of the zoom-in crop.
        place: of the object in the scene; it may cross the border.
        pixels: the object, as `object_pixels` returns it.

    Returns:
        The crop with the object, (crop height, crop width, 3).
    """
    crop = geometry.crop
    result: NDArray[np.uint8] = scene[crop.slices].copy()
    height, width = pixels.shape[:2]
    scale = min(place.width / width, place.height / height)
    width, height = max(round(width * scale), 1), max(round(height * scale), 1)
    left, top = place.x0 + (place.width - width) // 2, place.y1 - height
    box = Box(left, top, left + width, top + height)
    covered = box.intersection(crop)
    if covered.is_empty:
        return result
    resized = resize_linear(pixels, (width, height), window=box_in_box(covered, box)).astype(np.float32)
    under = result[box_in_box(covered, crop).slices]
    over = resized[..., :3] + under * (1 - resized[..., 3:] / 255)
    under[:] = np.rint(over.clip(0, 255)).astype(np.uint8)
    return result
