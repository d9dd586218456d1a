"""Builds the ControlNet's hint: the zoomed-in scene with the high-frequency map in the box, and the shape
mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box, Padding, box_in_box
from runtime.imaging.geometry import Geometry, Ratios, zoom_in
from runtime.imaging.modes import Mode
from runtime.imaging.reference import PreparedReference
from runtime.imaging.resize import resize_linear, resize_nearest


@dataclass(frozen=True, eq=False)
class Hint:
    """The ControlNet's input and where it was cut from the scene; R is the resolution."""

    hint: NDArray[np.float32]  # (4, R, R): RGB -1..1, then the mask channel, 0 or 1 (-1 in a padding)
    geometry: Geometry

    @property
    def nbytes(self) -> int:
        """Its memory."""
        return self.hint.nbytes


def make_hint(
    scene: NDArray[np.uint8],
    target: NDArray[Any] | Box,
    reference: PreparedReference,
    ratios: Ratios,
    mode: Mode,
    resolution: int = 512,
) -> Hint:
    """Returns the whole way from a scene and a place in it to the hint. Source: `process_pairs` of both
    scripts.

    scene: (H, W, 3) uint8 RGB. target: see `zoom_in`.
    """
    geometry = zoom_in(target, (scene.shape[1], scene.shape[0]), ratios)
    mask = shape_mask(target, geometry, mode)
    return hint_at(geometry, scene, mask, reference, mode, resolution)


def hint_at(
    geometry: Geometry,
    scene: NDArray[np.uint8],
    mask: NDArray[np.uint8],
    reference: PreparedReference,
    mode: Mode,
    resolution: int = 512,
) -> Hint:
    """Returns the hint of a crop that is chosen.

    scene: (H, W, 3) uint8 RGB; what is outside the crop does not matter. mask: see `shape_mask`.
    """
    return Hint(collage(scene, geometry, reference.high_frequency_map, mask, mode, resolution), geometry)


def shape_mask(target: NDArray[Any] | Box, geometry: Geometry, mode: Mode) -> NDArray[np.uint8]:
    """Returns the mask of the shape to fill, (crop height, crop width) uint8, 0 or 1."""
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
    """Returns the hint: the crop whose target box is covered by the stretched high-frequency map, and the
    mask.

    The map's black parts cover the scene too. Padding is -1 in the RGB channels.

    scene: (H, W, 3) uint8 RGB. geometry: of a tile, the box may reach beyond the crop.
    hf_map: (S, S, 3) uint8 RGB, of any size.
    mask: (crop height, crop width) uint8, 0 or 1. Returns (4, R, R) float32.
    """
    box, crop = geometry.box, geometry.crop
    picture = scene[crop.slices].copy()
    covered = box.intersection(crop)
    if not covered.is_empty:
        part = box_in_box(covered, box)
        picture[box_in_box(covered, crop).slices] = resize_linear(
            hf_map, (box.width, box.height), window=part
        )
    rgb = to_network(picture, geometry.padding, resolution)
    channel = _mask_channel(mask, geometry.padding, mode, resolution)
    return np.concatenate([rgb, channel[None]])


def crop_scene(scene: NDArray[np.uint8], geometry: Geometry, resolution: int = 512) -> NDArray[np.float32]:
    """Returns the zoomed-in scene without the collage, as the VAE encoder takes it: (3, R, R) float32,
    -1..1."""
    return to_network(scene[geometry.crop.slices], geometry.padding, resolution)


def to_network(picture: NDArray[np.uint8], padding: Padding, resolution: int) -> NDArray[np.float32]:
    """Returns a crop of the scene, (H, W, 3), as the networks take it: (3, R, R) float32, -1..1."""
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
