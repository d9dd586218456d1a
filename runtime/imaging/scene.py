"""Reads the scene for the networks, and keeps its own pixels, colours and metadata for the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field, warn
from runtime.imaging.boxes import Box
from runtime.imaging.colour_profile import ProfileError, from_srgb
from runtime.imaging.decoding import MAX_PIXELS, UPRIGHT
from runtime.imaging.masks import MaskedPicture, load_mask
from runtime.imaging.picture import Metadata, Picture
from runtime.imaging.pictures import load_picture, seen
from runtime.imaging.sources import PictureLike
from runtime.imaging.target import SCENE_MASK

ShareOf = Callable[[Box], NDArray[np.float32]]
"""Gives how much of a part of a scene is what was drawn, (H, W) of that part, 0..1."""


def load_scene(
    source: PictureLike, max_pixels: int = MAX_PIXELS, size: tuple[int, int] | None = None
) -> tuple[NDArray[np.uint8], Picture]:
    """Decodes a scene.

    Args:
        source: where the picture is.
        max_pixels: a larger picture is refused before it is decoded.
        size: (width, height) that it must have; any if None.

    Returns:
        What the networks see, (H, W, 3) in sRGB, on white where the scene is transparent; and the scene.

    Raises:
        InputError: it is not a picture, is damaged, is too large, or of another size.
    """
    picture = load_picture(source, "the scene", max_pixels)
    height, width = picture.rgb.shape[:2]
    if size not in (None, (width, height)):
        raise InputError(f"the scene is {width} x {height} pixels, and the result has its size")
    if picture.kind:
        warn(f"the scene is {picture.kind}: the result is in sRGB")
    if picture.deep:
        warn("the scene has more than 8 bits for each value: the result has 8")
    if picture.own is not picture.rgb:
        picture = _checked(picture)
    if picture.alpha is not None:
        warn("the scene is partly transparent: the model sees it on white, and drawn pixels are opaque")
    return seen(picture), picture


def upright_mask(mask: PictureLike, scene: Picture, max_pixels: int = MAX_PIXELS) -> PictureLike:
    """Returns the mask of a scene, turned as the scene was, if it was made of that unturned.

    Raises:
        InputError: the scene was turned, and it is no mask of it.
    """
    if scene.orientation == UPRIGHT:
        return mask
    with in_field("mask"):
        of = MaskedPicture("the scene", scene.rgb.shape, scene.orientation)
        return load_mask(mask, SCENE_MASK, max_pixels, of)


def with_own_pixels(
    image: NDArray[np.uint8],
    scene: Picture,
    regions: Sequence[tuple[Box, ShareOf | None]],
) -> NDArray[np.uint8]:
    """Returns the result as the scene is: what was drawn in the scene's colours and opaque, all else
    untouched.

    Args:
        image: (H, W, 3) in sRGB, drawn into what the networks see of the scene.
        scene: the scene that it was drawn into.
        regions: the only parts of it that may have changed, and what gives the share of such a part that was
            pasted, (H, W), if that is not all of it.

    Returns:
        (H, W, 3) in the colours of the scene's profile, or (H, W, 4) with the scene's transparency.
    """
    if scene.own is scene.rgb and scene.alpha is None:
        return image
    result: NDArray[np.uint8] = scene.pixels.copy()
    for region, share_of in regions:
        inside = np.ones((region.height, region.width), bool) if share_of is None else share_of(region) > 0
        drawn = image[region.slices][inside]
        if scene.own is not scene.rgb and drawn.size:
            assert scene.metadata.icc_profile
            drawn = from_srgb(drawn[None], scene.metadata.icc_profile)[0]
        part = result[region.slices]
        part[inside, :3] = drawn
        part[inside, 3:] = 255
    return result


def _checked(picture: Picture) -> Picture:
    """Returns the picture; in sRGB if its profile leads from its own colours and not back."""
    assert picture.metadata.icc_profile
    try:
        from_srgb(picture.rgb[:1, :1], picture.metadata.icc_profile)
    except ProfileError:
        warn("the scene has a colour profile that cannot be converted back from sRGB: the result is in sRGB")
        metadata = Metadata(None, picture.metadata.exif, picture.metadata.dpi)
        return replace(picture, own=picture.rgb, metadata=metadata)
    return picture
