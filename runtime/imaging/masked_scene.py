"""Prepares the scene for an inpainting network: the zoomed-in crop, the part to draw, and how it is blended
with the rest.

Sources: diffusers' `StableDiffusionInpaintPipeline` (mask and masked picture); Blended Latent Diffusion
(Avrahami et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.boxes import Box, Padding, box_in_box, smallest_box
from runtime.imaging.geometry import Geometry, Ratios, zoom_in
from runtime.imaging.mask_levels import MaskLevel, coarsen_mask
from runtime.imaging.paste_back import FEATHER
from runtime.imaging.resize import resize_linear

_GREY = 128
"""Grey level of the padding, before it becomes exactly 0."""

_SEAM = np.exp(-0.5 * np.arange(-3, 4, dtype=np.float32) ** 2)
"""Weights of a Gaussian whose sigma is one cell of the latent."""


@dataclass(frozen=True, eq=False)
class MaskedScene:
    """A scene and what is drawn of it, at the networks' size: H x W pixels, h x w cells of a latent."""

    geometry: Geometry
    picture: NDArray[np.float32]
    """(3, H, W) RGB -1..1; 0, which is grey, where the crop leaves the scene."""
    mask: NDArray[np.bool_]
    """(H, W), what is drawn. Also where the crop leaves the scene: that is drawn, and never pasted."""
    blend: NDArray[np.float32]
    """(1, h, w), share of the drawn latent, 0..1; the rest is the scene's."""
    paste: NDArray[np.float32]
    """(H, W), share of the drawn picture that is pasted; see `feather`."""

    @property
    def masked_picture(self) -> NDArray[np.float32]:
        """The picture with grey, 0, where it is drawn, (3, H, W)."""
        return np.where(self.mask, np.float32(0), self.picture)

    @property
    def latent_mask(self) -> NDArray[np.float32]:
        """The mask at latent size, (1, h, w), 0 or 1: the nearest neighbour, as networks are trained."""
        (height, width), (_, h, w) = self.mask.shape, self.blend.shape
        return self.mask[None, :: height // h, :: width // w].astype(np.float32)

    def in_scene(self, scene: NDArray[np.uint8]) -> MaskedScene:
        """Returns the same place in another scene of the same size."""
        return replace(self, picture=_to_network(scene, self.geometry, self.mask.shape))


def mask_scene(
    scene: NDArray[np.uint8],
    target: NDArray[np.bool_] | Box,
    ratios: Ratios,
    mode: str,
    picture_size: tuple[int, int],
    latent_size: tuple[int, int],
    level: MaskLevel = "exact",
) -> MaskedScene:
    """Returns the whole way from a scene and a place in it to what the networks get.

    Args:
        scene: (H, W, 3) RGB.
        target: what is drawn: a mask (H, W), or a box, around which the box ratio leaves room.
        ratios: around the place; see `zoom_in`.
        mode: "keep_background": what is drawn fades into the scene over a few cells of the latent. "shape":
            it ends at the mask, or at the box as it is given. "crop": the scene may change anywhere in the
            crop.
        picture_size: (height, width) of the networks' picture.
        latent_size: (height, width) of their latent.
        level: how coarse a mask is made before it is used, as far as the target box; a box stays as it is.
    """
    size = (scene.shape[1], scene.shape[0])
    geometry = zoom_in(target, size, ratios, aspect=picture_size[::-1])
    place = target.clip(size) if isinstance(target, Box) else smallest_box(target)
    geometry = replace(geometry, crop=geometry.crop.union(place))
    crop = geometry.crop
    if isinstance(target, Box):
        filled = place if mode == "shape" else place.union(geometry.box)
        inside = _in_crop(filled, crop)
    else:
        # of the whole mask: what ends at the crop's border does not go on there, as at the picture's
        inside = coarsen_mask(target, level, geometry.box)[crop.slices]
    mask = _shrink(inside, geometry.padding, picture_size, fill=True)
    pasted = _shrink(inside, geometry.padding, picture_size, fill=False)
    return MaskedScene(
        geometry=geometry,
        picture=_to_network(scene, geometry, picture_size),
        mask=mask,
        blend=_blend(mask, mode, latent_size)[None],
        paste=np.ones(picture_size, np.float32) if mode == "crop" else feather(pasted),
    )


def feathered_box(box: Box, geometry: Geometry, picture_size: tuple[int, int]) -> NDArray[np.float32]:
    """Returns how much of the networks' picture is pasted around a box, (H, W) in 0..1; see `feather`.

    Args:
        box: in scene coordinates; what lies outside of the crop does not count.
        geometry: of the crop.
        picture_size: (H, W).
    """
    inside = _in_crop(box.intersection(geometry.crop), geometry.crop)
    return feather(_shrink(inside, geometry.padding, picture_size, fill=False))


def feather(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Returns how much of the networks' picture is pasted around what they drew, (H, W) in 0..1.

    1 in the mask and up to 8 pixels of 512 beyond, then falls to 0 over as many; distances are the longer one
    of both axes.

    mask: (H, W), what was drawn.
    """
    margin = max(1, round(min(mask.shape) * FEATHER))
    half = max(1, round(margin / 2))
    grown: NDArray[np.float32] = mask.astype(np.float32)
    for axis in (0, 1):
        grown = np.asarray(_windows(grown, margin + half, axis).max(axis=-1), np.float32)
    for axis in (0, 1):
        grown = np.asarray(_windows(grown, half, axis).mean(axis=-1), np.float32)
    return grown


def _blend(mask: NDArray[np.bool_], mode: str, latent_size: tuple[int, int]) -> NDArray[np.float32]:
    """Returns share of the drawn latent, (h, w): 1 in every cell of which something is drawn."""
    if mode == "crop":
        return np.ones(latent_size, np.float32)
    (height, width), (h, w) = mask.shape, latent_size
    cells = mask.reshape(h, height // h, w, width // w)
    drawn: NDArray[np.float32] = np.asarray(cells.any(axis=(1, 3)), np.float32)
    if mode == "shape":
        return drawn
    share: NDArray[np.float32] = drawn
    for axis in (0, 1):
        share = np.asarray(_windows(share, 1, axis).max(axis=-1), np.float32)
    for axis in (0, 1):
        share = _windows(share, len(_SEAM) // 2, axis) @ (_SEAM / _SEAM.sum())
    return np.maximum(share, drawn).clip(0, 1)


def _windows(values: NDArray[np.float32], radius: int, axis: int) -> NDArray[np.float32]:
    """For each value those up to `radius` away along an axis, in a last axis; the outermost ones go on."""
    around = [(radius, radius) if of == axis else (0, 0) for of in (0, 1)]
    return np.lib.stride_tricks.sliding_window_view(np.pad(values, around, "edge"), 2 * radius + 1, axis)


def _in_crop(box: Box, crop: Box) -> NDArray[np.bool_]:
    """Returns a crop's mask of a box inside of it."""
    inside = np.zeros((crop.height, crop.width), np.bool_)
    inside[box_in_box(box, crop).slices] = True
    return inside


def _shrink(
    inside: NDArray[np.bool_], padding: Padding, size: tuple[int, int], fill: bool
) -> NDArray[np.bool_]:
    """Returns a crop's mask, padded, at the size (height, width): the nearest neighbour; where several pixels
    become one, any of them."""
    left, top, right, bottom = padding
    result = np.pad(inside, ((top, bottom), (left, right)), constant_values=fill)
    for axis in (0, 1):
        first = np.arange(size[axis]) * result.shape[axis] // size[axis]
        result = np.logical_or.reduceat(result, first, axis=axis)
    return result


def _to_network(scene: NDArray[np.uint8], geometry: Geometry, size: tuple[int, int]) -> NDArray[np.float32]:
    """Returns the crop of a scene, (3, height, width) RGB -1..1, with padding of 0."""
    crop, padding = geometry.crop, geometry.padding
    pixels = resize_linear(scene[crop.slices], size[::-1], padding, fill=_GREY).astype(np.float32)
    pixels /= 127.5
    pixels -= 1
    everything = np.ones((crop.height, crop.width), np.bool_)
    pixels[~_shrink(everything, padding, size, fill=False)] = 0
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
