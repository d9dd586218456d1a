"""Validates requests: checks every range and limit of their parameters before any work.

Pictures, masks and boxes are checked where they are read: `runtime.imaging.decoding`, `masks`,
`reference` and `target`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.diffusion.ddim import MAX_STEPS, exact_timesteps
from runtime.diffusion.samplers import SAMPLERS
from runtime.errors import InputError, in_field
from runtime.imaging.decoding import MAX_PIXELS
from runtime.imaging.geometry import Ratios
from runtime.imaging.mask_levels import check_mask_level
from runtime.imaging.modes import check_mode
from runtime.imaging.paste_back import check_edge
from runtime.imaging.target import is_integer
from runtime.parameters import (
    PLACEMENT_PARAMETERS,
    SAMPLING_PARAMETERS,
    SamplingParameters,
    is_neutral,
    sampling_parameters,
)
from runtime.request import Blank, Placement, Request, Sampling, View, check_prompt

MAX_IMAGES = 64
MAX_PLACEMENTS = 16
MAX_GUIDANCE_SCALE = 100.0
MAX_CONTROL_SCALE = 10.0
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Limits:
    """Limits of a request. A server sets lower ones."""

    steps: int = MAX_STEPS
    images: int = MAX_IMAGES
    placements: int = MAX_PLACEMENTS
    pixels: int = MAX_PIXELS
    """Most pixels of each picture and mask, checked before decoding."""


LARGEST = Limits()
"""The limits of this package."""


_CONDITIONS = {
    "reference": ("reference", "places what a reference shows", ("prompt", "negative_prompt")),
    "text": (
        "prompt",
        "draws what a prompt says",
        ("reference", "reference_mask", "reference_clicks", "views"),
    ),
}
"""Maps conditions to their field, to what the model does with it, and to the fields of the other
condition."""


@dataclass(frozen=True)
class Abilities:
    """What the models of a system support."""

    title: str
    """Their name in errors."""
    condition: Literal["reference", "text"]
    """Their condition: a reference or a prompt."""
    parameters: Collection[str]
    """Parameters that have an effect, of sampling and of placements."""
    qualities: Collection[str]
    """Presets that are offered: they were measured on these models, and kept their limits."""
    fills: bool = False
    """Whether they also draw without a condition, continuing the scene."""
    views: int = 0
    """Most pictures of an object per placement; 0 if references are not taken, or only one."""


def check_usable(request: Request, abilities: Abilities) -> None:
    """Checks that a model can use a request. Decodes nothing.

    Raises:
        InputError: it cannot; the message says what the model takes instead.
    """
    title = abilities.title
    if isinstance(request.scene, Blank) and abilities.condition != "text":
        with in_field("prompt"):
            raise InputError(
                f"{title} puts objects from pictures into scenes, and does not draw from prompts: give a "
                "scene and a reference"
            )
    with in_field("sampling"):
        quality = request.sampling.quality
        with in_field("quality"):
            if quality is not None and quality not in abilities.qualities:
                raise InputError(
                    f"the quality '{quality}' is not offered for {title}: choose "
                    f"{' or '.join(abilities.qualities)}, or set steps and sampler"
                )
        _check_parameters(request.sampling, SAMPLING_PARAMETERS, abilities)
    for index, placement in enumerate(request.placements):
        with in_placement(request, index):
            _check_parameters(placement, PLACEMENT_PARAMETERS, abilities)
            _check_condition(placement, abilities)


def check_blank(blank: Blank, size: tuple[int, int]) -> None:
    """Checks that a drawing has the bundle's size, (height, width).

    Raises:
        InputError: it has another size; the message names both.
    """
    height, width = size
    asked = (width if blank.width is None else blank.width, height if blank.height is None else blank.height)
    for name, own, other in (("width", width, asked[0]), ("height", height, asked[1])):
        with in_field(name):
            if other != own:
                raise InputError(
                    f"this bundle draws pictures of {width} x {height} pixels and not of {asked[0]} x "
                    f"{asked[1]}: build one with --resolution {asked[0]}x{asked[1]}"
                )


def in_placement(request: Request, index: int) -> AbstractContextManager[None]:
    """`in_field` for a placement. A drawing has a single one, and its fields are the request's."""
    is_drawing = isinstance(request.scene, Blank) and len(request.placements) == 1
    return nullcontext() if is_drawing else in_field(f"placements[{index}]")


def _check_parameters(given: object, names: Sequence[str], abilities: Abilities) -> None:
    for name in names:
        if name not in abilities.parameters and not is_neutral(name, getattr(given, name)):
            with in_field(f"ratios.{name.removesuffix('_ratio')}" if name.endswith("_ratio") else name):
                raise InputError(f"{abilities.title} has no {name}: leave it out")


def _check_condition(placement: Placement, abilities: Abilities) -> None:
    title = abilities.title
    wanted, instead, unusable = _CONDITIONS[abilities.condition]
    for name in unusable:
        if not is_neutral(name, getattr(placement, name)):
            with in_field(name):
                raise InputError(f"{title} {instead} and takes no {name.replace('_', ' ')}: leave it out")
    with in_field(wanted):
        if getattr(placement, wanted) is None and not abilities.fills:
            raise InputError(f"{title} {instead}: give a {wanted}")
    _check_views(placement, abilities)
    for name in ("prompt", "negative_prompt"):
        with in_field(name):
            if (prompt := getattr(placement, name)) is not None:
                check_prompt(prompt)


def _check_views(placement: Placement, abilities: Abilities) -> None:
    """Refuses views of an object that are too many, or of none; and what says twice where the object is."""
    views, most = placement.views or (), max(abilities.views, 1)
    with in_field("views"):
        if not isinstance(views, Sequence) or not all(isinstance(view, View) for view in views):
            raise InputError("a list of View is expected, each with a picture of the object")
        if views and placement.reference is None:
            raise InputError("views need a reference: give the first of them as the reference")
        if len(views) >= most:
            raise InputError(
                f"{len(views) + 1} pictures of an object are given, but this bundle takes {most}: "
                f"build one with --references {len(views) + 1}, or give every object a place of its own"
            )
    said = [("reference_clicks", placement.reference_mask, placement.reference_clicks)]
    said += [(f"views[{index}].clicks", view.mask, view.clicks) for index, view in enumerate(views)]
    for name, mask, clicks in said:
        with in_field(name):
            if mask is not None and clicks is not None:
                raise InputError("a reference takes either a mask or clicks, not both")


def check_defaults(defaults: Mapping[str, Any]) -> None:
    """Checks a bundle's defaults.

    Args:
        defaults: parameter -> value if a request does not set it.

    Raises:
        InputError: a value is invalid; the message names the parameter.
    """
    unknown = sorted(defaults.keys() - {*SAMPLING_PARAMETERS, *PLACEMENT_PARAMETERS})
    if unknown:
        raise InputError(f"there is no parameter '{unknown[0]}'")
    check_sampling(sampling_parameters(Sampling(), defaults))
    ratios = {name: defaults.get(f"{name}_ratio") for name in ("reference", "box", "crop")}
    Ratios(**{name: ratio for name, ratio in ratios.items() if ratio is not None})
    for name, check in (("mode", check_mode), ("edge", check_edge), ("mask_level", check_mask_level)):
        if (value := defaults.get(name)) is not None:
            check(value)
    if (refine := defaults.get("refine")) is not None:
        _check_integer("refine", refine, 0, MAX_STEPS)
    if (strength := defaults.get("strength")) is not None:
        _check_number("strength", strength, 0.0, 1.0)
        if not strength:
            raise InputError("strength must be above 0: nothing would be drawn")


def check_sampling(sampling: SamplingParameters, limits: Limits = LARGEST) -> None:
    """Checks the ranges of sampling parameters.

    Raises:
        InputError: a value is out of range; the message names parameter, value and range.
    """
    _check_integer("steps", sampling.steps, 1, limits.steps)
    _check_number("guidance_scale", sampling.guidance_scale, 0.0, MAX_GUIDANCE_SCALE)
    if sampling.control_scale is not None:
        _check_number("control_scale", sampling.control_scale, 0.0, MAX_CONTROL_SCALE)
    _check_number("eta", sampling.eta, 0.0, 1.0)
    with in_field("sampler"):
        if sampling.sampler not in tuple(SAMPLERS):
            raise InputError(f"there is no sampler '{sampling.sampler}': choose one of {', '.join(SAMPLERS)}")
    with in_field("eta"):
        if sampling.eta > 0 and sampling.sampler != "ddim":
            raise InputError(
                f"the sampler {sampling.sampler} adds no noise: eta must be 0 with it, not {sampling.eta:g}"
            )
    if sampling.timesteps is not None:
        with in_field("timesteps"):
            if not isinstance(sampling.timesteps, tuple | list):
                raise InputError(f"timesteps must be a list of whole numbers, not {sampling.timesteps!r}")
        for timestep in sampling.timesteps:
            _check_integer("timesteps", timestep, 0, MAX_STEPS)
        exact_timesteps(sampling.timesteps)
    interval = sampling.guidance_interval
    with in_field("guidance_interval"):
        if not isinstance(interval, tuple | list) or len(interval) != 2:
            given = ", ".join(map(str, interval)) if isinstance(interval, tuple | list) else repr(interval)
            raise InputError(f"guidance_interval must be a lower and a higher timestep, not {given}")
    for timestep in interval:
        _check_integer("guidance_interval", timestep, 0, MAX_STEPS)
    with in_field("guidance_interval"):
        if interval[0] > interval[1]:
            given = ", ".join(map(str, interval))
            raise InputError(f"guidance_interval must be a lower and a higher timestep, not {given}")
    if sampling.map_steps is not None:
        _check_integer("map_steps", sampling.map_steps, 1, MAX_STEPS)


def check_seeds(seed: int, num_images: int, limits: Limits = LARGEST) -> None:
    """Checks the ranges of the seed and the number of pictures.

    Raises:
        InputError: a value is out of range; the message names parameter, value and range.
    """
    _check_integer("num_images", num_images, 1, limits.images)
    _check_integer("seed", seed, 0, MAX_SEED - num_images)


def check_placement_count(count: int, limits: Limits = LARGEST) -> None:
    """Checks the number of placements.

    Raises:
        InputError: there are none, or too many.
    """
    with in_field("placements"):
        if not count:
            raise InputError("nothing to place: give at least one placement")
        if count > limits.placements:
            raise InputError(f"{count} placements are given; at most {limits.placements} are allowed")


def check_initial_noise(noise: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Returns the noise as float32 of the given shape.

    Raises:
        InputError: it has another shape, or values that are not finite.
    """
    try:
        with np.errstate(over="ignore"):  # what is too large is not finite
            latents = np.array(noise, np.float32)
    except (ValueError, TypeError) as error:
        raise InputError("initial_noise must be an array of numbers") from error
    if latents.shape != shape:
        raise InputError(f"initial_noise must have the shape {shape}, not {latents.shape}")
    if not np.isfinite(latents).all():
        raise InputError("initial_noise has values that are not finite numbers")
    return latents


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    with in_field(name):
        if not is_integer(value) or not low <= value <= high:
            raise InputError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _check_number(name: str, value: float, low: float, high: float) -> None:
    valid = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    with in_field(name):
        if not valid or not low <= value <= high:  # nor is NaN
            raise InputError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}")
