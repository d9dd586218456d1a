"""The ControlNet's hint: the zoomed-in scene with the high-frequency map in the box, and the shape mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.imaging.boxes import (
    Box,
    Padding,
    box_extent,
    box_in_box,
    expand,
    mask_extent,
    square,
    square_padding,
)
from runtime.imaging.reference import PreparedReference
from runtime.imaging.resize import resize_linear, resize_nearest

_LARGEST_RATIO = 100


@dataclass(frozen=True)
class Ratios:
    """How much room is left around things, each 1 to 100.

    The original draws them at random, in steps of 0.1. run_inference.py: reference 1.2, box 1.1,
    crop 1.5..2.9. run_gradio_demo.py and training: reference 1.1..1.4, box 1.1, crop 1.3..2.9.
    """

    reference: float = 1.2  # white around the reference object
    box: float = 1.1  # target box around the mask
    crop: float = 2.0  # zoom-in crop around the target box

    def __post_init__(self) -> None:
        for name, ratio in vars(self).items():
            if not 1 <= ratio <= _LARGEST_RATIO:
                raise InputError(f"the {name} ratio is {ratio}; expected 1 to {_LARGEST_RATIO}")


@dataclass(frozen=True)
class Mode:
    """What the original's two entry scripts do differently."""

    shape_control: bool  # the mask channel is the target mask itself, not the filled box
    smooth_mask: bool  # linear and 1 in the padding, instead of nearest and -1 in the padding
    margin: int  # pixels at the crop's border that are never pasted
    keep_background: bool  # paste only the target box, not the whole crop


MODES: Mapping[str, Mode] = MappingProxyType(
    {
        # run_inference.py
        "crop": Mode(shape_control=False, smooth_mask=True, margin=5, keep_background=False),
        # run_gradio_demo.py with shape control
        "shape": Mode(shape_control=True, smooth_mask=False, margin=3, keep_background=True),
        # run_gradio_demo.py without shape control
        "keep_background": Mode(shape_control=False, smooth_mask=False, margin=3, keep_background=True),
    }
)


@dataclass(frozen=True)
class Geometry:
    """Where the picture that the networks see lies in the scene."""

    crop: Box  # the zoom-in crop, in scene coordinates
    box: Box  # the expanded target box, in scene coordinates; always inside the crop

    @property
    def crop_size(self) -> tuple[int, int]:
        """(width, height) of the crop before padding."""
        return self.crop.width, self.crop.height

    @property
    def padding(self) -> Padding:
        """What makes the crop square."""
        return square_padding(*self.crop_size)

    @property
    def padded_size(self) -> tuple[int, int]:
        """(width, height) of the crop after padding to a square."""
        side = max(self.crop_size)
        return side, side


@dataclass(frozen=True, eq=False)
class Hint:
    """The ControlNet's input and where it was cut from the scene; R is the resolution."""

    hint: NDArray[np.float32]  # (4, R, R): RGB -1..1, then the mask channel, 0 or 1 (-1 in a padding)
    geometry: Geometry


def make_hint(
    scene: NDArray[np.uint8],
    target: NDArray[Any] | Box,
    reference: PreparedReference,
    ratios: Ratios,
    mode: Mode,
    resolution: int = 512,
) -> Hint:
    """The whole way from a scene and a place in it to the hint. Source: `process_pairs` of both scripts.

    scene: (H, W, 3) uint8 RGB. target: see `zoom_in`.
    """
    geometry = zoom_in(target, (scene.shape[1], scene.shape[0]), ratios)
    mask = shape_mask(target, geometry, mode)
    hint = collage(scene, geometry, reference.high_frequency_map, mask, mode, resolution)
    return Hint(hint, geometry)


def zoom_in(target: NDArray[Any] | Box, size: tuple[int, int], ratios: Ratios) -> Geometry:
    """Target box and zoom-in crop for a place in a scene of `size` (width, height).

    target: (H, W) mask, bool or 0/1, of which fewer than 10 pixels stand for the whole scene; or a box in
    scene coordinates, which is clipped to the scene and then treated like its filled mask, however small.
    """
    extent = box_extent(_clip(target, size)) if isinstance(target, Box) else mask_extent(target)
    box = expand(extent, ratios.box, size)
    crop = square(expand(box, ratios.crop, size), size)
    # Ratios near 1 and odd sides can cost the crop a column or row of the box, which the original fails on.
    return Geometry(crop.union(box), box)


def shape_mask(target: NDArray[Any] | Box, geometry: Geometry, mode: Mode) -> NDArray[np.uint8]:
    """The mask of the shape to fill, (crop height, crop width) uint8, 0 or 1."""
    crop, filled = geometry.crop, geometry.box
    if mode.shape_control:
        if not isinstance(target, Box):
            return target[crop.slices].astype(bool).astype(np.uint8)
        filled = target.intersection(crop)
    mask = np.zeros((crop.height, crop.width), np.uint8)
    mask[box_in_box(filled, crop).slices] = 1
    return mask


def collage(
    scene: NDArray[np.uint8],
    geometry: Geometry,
    hf_map: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    mode: Mode,
    resolution: int = 512,
) -> NDArray[np.float32]:
    """The hint: the crop whose target box is covered by the stretched high-frequency map, and the mask.

    The map's black parts cover the scene too. Padding is -1 in the RGB channels.

    scene: (H, W, 3) uint8 RGB. hf_map: (S, S, 3) uint8 RGB, of any size.
    mask: (crop height, crop width) uint8, 0 or 1. Returns (4, R, R) float32.
    """
    box = geometry.box
    picture = scene[geometry.crop.slices].copy()
    picture[box_in_box(box, geometry.crop).slices] = resize_linear(hf_map, (box.width, box.height))
    rgb = _to_network(picture, geometry.padding, resolution)
    channel = _mask_channel(mask, geometry.padding, mode, resolution)
    return np.concatenate([rgb, channel[None]])


def crop_scene(scene: NDArray[np.uint8], geometry: Geometry, resolution: int = 512) -> NDArray[np.float32]:
    """The zoomed-in scene without the collage, as the VAE encoder takes it: (3, R, R) float32, -1..1."""
    return _to_network(scene[geometry.crop.slices], geometry.padding, resolution)


def _clip(box: Box, size: tuple[int, int]) -> Box:
    clipped = box.clip(size)
    if clipped.is_empty:
        raise InputError(f"the box {tuple(box)} has no pixel inside the scene of {size[0]}x{size[1]} pixels")
    return clipped


def _to_network(picture: NDArray[np.uint8], padding: Padding, resolution: int) -> NDArray[np.float32]:
    resized = resize_linear(picture, (resolution, resolution), padding).transpose(2, 0, 1)
    values = np.ascontiguousarray(resized, np.float32)
    values /= 127.5
    values -= 1
    return values


def _mask_channel(
    mask: NDArray[np.uint8], padding: Padding, mode: Mode, resolution: int
) -> NDArray[np.float32]:
    size = (resolution, resolution)
    if mode.smooth_mask:
        # run_inference.py pads with -1 and casts to uint8: 255, which ends up as inside the shape.
        return (resize_linear(mask, size, padding, fill=255) > 0).astype(np.float32)
    return resize_nearest(mask.astype(np.float32), size, padding, fill=-1)
