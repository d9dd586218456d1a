"""The one reader of masks: of scenes and of references, from files and from arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import InputError
from runtime.imaging.decoding import MAX_PIXELS, Decoded, decode
from runtime.imaging.sources import PictureLike

MASK_THRESHOLD = 128
"""A pixel of a mask or of an alpha channel (0..255) is covered above this value, as in the original."""
_MOST_LABELS = 32
_MOST_NAMED = 6
"""Values that a refusal lists; of more it says the range."""


def load_mask(source: PictureLike, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.bool_]:
    """A mask (H, W), read by the first of these rules that applies.

    1. Transparency with pixels on both sides of 128: what is more opaque than that.
    2. No value above 1, but 1 itself, in no lossy format: what is not 0.
    3. Labels - a palette with colours or without anything brighter than 128, or at most 32 different colours
       of at most 128 in no lossy format: everything but the most frequent value of the border.
    4. Whose largest channel is above 128. Where that is everything, whose first channel is, as in the
       original.

    Args:
        source: a picture or an array; bool is taken as it is.
        name: what to call it in an error.
        max_pixels: a larger one is refused before it is decoded.

    Raises:
        InputError: it is not a picture, is damaged or too large, or no pixel is inside by the rule that
            applies; says which rule that is, and the values.
    """
    return read_mask(decode(source, name, max_pixels), name)


def read_mask(decoded: Decoded, name: str) -> NDArray[np.bool_]:
    """`load_mask` of an image that is decoded already."""
    image = decoded.image
    hint = ""
    if has_transparency(image):
        alpha = opacity(image)
        inside = mask_from_alpha(alpha)
        if inside.any() and not inside.all():
            return inside
        hint = f" (its opacity is {alpha.min()} to {alpha.max()}, and decides nothing)"
    if image.mode == "1":
        inside, rule = np.asarray(image), "no pixel is set"
    else:
        inside, rule = _from_colours(decoded)
    if not inside.any():
        raise InputError(f"{name} is empty: {rule}{hint}")
    return inside


def has_transparency(image: Image.Image) -> bool:
    """Whether an image has an alpha channel, a transparent palette entry or a transparent colour."""
    return "A" in image.getbands() or "transparency" in image.info


def opacity(image: Image.Image) -> NDArray[np.uint8]:
    """(H, W), 0 to 255."""
    return np.asarray(image.convert("RGBA").getchannel("A"))


def mask_from_alpha(alpha: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The mask of a picture's opaque part, as the original takes it: more than 128."""
    return alpha > MASK_THRESHOLD


def values_of(values: NDArray[np.uint8]) -> str:
    """The values of a mask, for a refusal."""
    found = np.flatnonzero(np.bincount(values.reshape(-1), minlength=256)).tolist()
    if len(found) > _MOST_NAMED:
        return f"its {len(found)} values go from {found[0]} to {found[-1]}"
    return (
        f"its values are {', '.join(map(str, found))}" if len(found) > 1 else f"it is {found[0]} everywhere"
    )


def _from_colours(decoded: Decoded) -> tuple[NDArray[np.bool_], str]:
    """What is inside by the colours, and why nothing is, if that is so."""
    image = decoded.image
    colours = image.convert("RGB")
    rgb = np.asarray(colours)
    value = rgb.max(axis=2)
    is_coloured = bool((rgb.min(axis=2) != value).any())
    one_colour = f"it is {tuple(rgb[0, 0].tolist())} everywhere"
    if decoded.exact and value.max() == 1:
        return value > 0, one_colour
    is_dark = value.max() <= MASK_THRESHOLD
    if image.mode == "P" and (is_coloured or is_dark):
        return _from_labels(np.asarray(image)), one_colour
    if is_dark and decoded.exact and colours.getcolors(_MOST_LABELS):
        labels = rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        return _from_labels(labels), one_colour
    inside = value > MASK_THRESHOLD
    if is_coloured and inside.all() and not (red := rgb[..., 0] > MASK_THRESHOLD).all():
        inside = red
    channel = "largest channel" if is_coloured else "value"
    return inside, f"inside is where the {channel} is above {MASK_THRESHOLD}, and {values_of(value)}"


def _from_labels(labels: NDArray[np.uint8] | NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Everything but the most frequent value of the border."""
    border = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    values, counts = np.unique(border, return_counts=True)
    inside: NDArray[np.bool_] = labels != values[counts.argmax()]
    return inside
