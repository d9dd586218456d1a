"""Where a request is refused: every check of a placement and of sampling parameters, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.ddim import MAX_STEPS
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError, in_field
from runtime.imaging.boxes import Box
from runtime.imaging.collage import MODES
from runtime.imaging.pictures import MAX_PIXELS, load_mask, load_picture, mask_from_alpha
from runtime.request import Placement, ResolvedPlacement, Sampling

MAX_IMAGES = 64
MAX_PLACEMENTS = 16
MAX_GUIDANCE_SCALE = 100.0
MAX_CONTROL_SCALE = 10.0
MAX_SEED = 2**63 - 1
MIN_MASK_PIXELS = 10
"""The original takes a smaller mask for the whole picture; that is a mistake more often than a wish."""


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for. A server sets lower ones."""

    steps: int = MAX_STEPS
    images: int = MAX_IMAGES
    placements: int = MAX_PLACEMENTS
    pixels: int = MAX_PIXELS
    """Of each picture and mask, checked before it is decoded."""


LARGEST = Limits()
"""What this package accepts at all."""


def check_sampling(sampling: Sampling, limits: Limits = LARGEST) -> None:
    """Refuses sampling parameters out of range.

    Raises:
        InputError: names the parameter, its value and its range.
    """
    _check_integer("steps", sampling.steps, 1, limits.steps)
    _check_number("guidance_scale", sampling.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
    _check_number("control_scale", sampling.control_scale, 0.0, MAX_CONTROL_SCALE)
    _check_number("eta", sampling.eta, 0.0, 1.0)
    with in_field("sampler"):
        if sampling.sampler not in SAMPLERS:
            raise InputError(f"there is no sampler '{sampling.sampler}': choose one of {', '.join(SAMPLERS)}")
    with in_field("eta"):
        if sampling.eta > 0 and sampling.sampler != "ddim":
            raise InputError(
                f"the sampler {sampling.sampler} adds no noise: eta must be 0 with it, not {sampling.eta:g}"
            )
    interval = sampling.guidance_interval
    for timestep in interval:
        _check_integer("guidance_interval", timestep, 0, MAX_STEPS)
    with in_field("guidance_interval"):
        if len(interval) != 2 or interval[0] > interval[1]:
            given = ", ".join(map(str, interval))
            raise InputError(f"guidance_interval must be a lower and a higher timestep, not {given}")
    if sampling.map_steps is not None:
        _check_integer("map_steps", sampling.map_steps, 1, MAX_STEPS)


def check_seeds(seed: int, num_images: int, limits: Limits = LARGEST) -> None:
    """Refuses a seed or a number of pictures out of range.

    Raises:
        InputError: names the parameter, its value and its range.
    """
    _check_integer("num_images", num_images, 1, limits.images)
    _check_integer("seed", seed, 0, MAX_SEED - num_images)


def check_placements(placements: Sequence[Placement], limits: Limits = LARGEST) -> None:
    """Refuses a request with nothing to place, or with too many placements.

    Raises:
        InputError: says how many may be given.
    """
    with in_field("placements"):
        if not placements:
            raise InputError("there is nothing to place: give at least one placement")
        if len(placements) > limits.placements:
            raise InputError(f"{len(placements)} placements are given; at most {limits.placements} are done")


def check_initial_noise(noise: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The noise as float32 of the given shape.

    Raises:
        InputError: it has another shape, or values that are not finite.
    """
    if noise.shape != shape:
        raise InputError(f"initial_noise must have the shape {shape}, not {noise.shape}")
    if not np.isfinite(noise).all():
        raise InputError("initial_noise has values that are not finite numbers")
    return noise.astype(np.float32)


def resolve_placement(
    placement: Placement, scene: NDArray[np.uint8], max_pixels: int = MAX_PIXELS
) -> ResolvedPlacement:
    """Decodes a placement's pictures and checks that everything fits.

    Args:
        placement: as the caller gave it.
        scene: (H, W, 3) uint8 RGB.
        max_pixels: of each picture.

    Raises:
        InputError: one sentence: what was wrong, what was expected, where.
    """
    with in_field("mode"):
        if placement.mode not in MODES:
            raise InputError(f"there is no mode '{placement.mode}': choose one of {', '.join(MODES)}")
    reference, reference_mask = _reference(placement, max_pixels)
    target = _target(placement, scene, max_pixels)
    return ResolvedPlacement(reference, reference_mask, target, placement.mode, placement.ratios)


def _reference(placement: Placement, max_pixels: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    with in_field("reference"):
        reference = load_picture(placement.reference, "the reference", max_pixels)
    with in_field("reference_mask"):
        if placement.reference_mask is not None:
            mask = load_mask(placement.reference_mask, "the reference mask", max_pixels)
            _check_mask(mask, reference.rgb, "the reference mask", "the reference")
        elif reference.alpha is not None:
            mask = mask_from_alpha(reference.alpha)
            _check_mask(mask, reference.rgb, "the reference's opaque part", "the reference")
        else:
            raise InputError(
                "the reference has no transparency, so where the object is must be said: "
                "give a reference mask"
            )
    return reference.rgb, mask


def _target(placement: Placement, scene: NDArray[np.uint8], max_pixels: int) -> Box | NDArray[np.bool_]:
    if (placement.box is None) == (placement.mask is None):
        with in_field("target"):
            raise InputError(
                "a placement needs either a box or a mask that says where the object goes, and not both"
            )
    if placement.box is not None:
        with in_field("box"):
            return check_box(placement.box, (scene.shape[1], scene.shape[0]))
    assert placement.mask is not None
    with in_field("mask"):
        mask = load_mask(placement.mask, "the scene mask", max_pixels)
        _check_mask(mask, scene, "the scene mask", "the scene")
    return mask


def check_box(box: Sequence[int], size: tuple[int, int]) -> Box:
    """The box, if any of it lies in a scene of `size` (width, height).

    Raises:
        InputError: it is not four whole numbers, has no area, or lies outside.
    """
    if len(box) != 4 or any(not _is_integer(value) for value in box):
        raise InputError(f"a box is four whole numbers x0,y0,x1,y1, not {tuple(box)}")
    checked = Box(*(int(value) for value in box))
    if checked.is_empty:
        raise InputError(f"the box {tuple(checked)} has no area: x1 must exceed x0, and y1 exceed y0")
    if checked.clip(size).is_empty:
        raise InputError(f"the box {tuple(checked)} lies outside the scene of {size[0]} x {size[1]} pixels")
    return checked


def _check_mask(mask: NDArray[np.bool_], picture: NDArray[np.uint8], name: str, of: str) -> None:
    if mask.shape != picture.shape[:2]:
        raise InputError(
            f"{name} is {mask.shape[1]} x {mask.shape[0]} and {of} is "
            f"{picture.shape[1]} x {picture.shape[0]} pixels: they must have the same size"
        )
    pixels = int(np.count_nonzero(mask))
    if pixels < MIN_MASK_PIXELS:
        what = "is empty" if pixels == 0 else f"has only {pixels} pixels set"
        raise InputError(f"{name} {what}; at least {MIN_MASK_PIXELS} pixels must be")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    with in_field(name):
        if not _is_integer(value) or not low <= value <= high:
            raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _check_number(name: str, value: float, low: float, high: float) -> None:
    valid = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    with in_field(name):
        if not valid or not math.isfinite(value) or not low <= value <= high:
            raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
