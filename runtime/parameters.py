"""Resolves parameters: from the request, else the preset, else the manifest, else the system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from runtime.diffusion.presets import QUALITIES
from runtime.errors import InputError, in_field
from runtime.imaging.geometry import Ratios
from runtime.request import Sampling


@dataclass(frozen=True)
class SamplingParameters:
    """`runtime.request.Sampling` with all values set."""

    steps: int
    guidance_scale: float
    control_scale: float | None
    """None if the system has no detail maps."""
    eta: float
    sampler: str
    guidance_interval: tuple[int, int]
    map_steps: int | None
    """None for detail maps at every step."""
    timesteps: tuple[int, ...] | None

    def guided_at(self, timestep: int) -> bool:
        """Returns whether the unconditional half is needed; at a scale of exactly 1 it cancels out."""
        first, last = self.guidance_interval
        return self.guidance_scale != 1.0 and first <= timestep <= last


@dataclass(frozen=True)
class PlacementParameters:
    """The parameters of a `runtime.request.Placement` with all values set."""

    mode: str
    reference_ratio: float | None
    """None if the system takes no reference."""
    box_ratio: float
    crop_ratio: float
    mask_level: str | int | None
    """None if the system does not draw inside masks."""
    edge: str | None
    """None if the system always uses a soft edge."""
    refine: int | None
    """0 for one pass; None if the system has no second one."""
    strength: float | None
    """None if the system always starts from noise."""

    @property
    def ratios(self) -> Ratios:
        """Returns the three ratios.

        Raises:
            InputError: one is out of range.
        """
        reference = {} if self.reference_ratio is None else {"reference": self.reference_ratio}
        with in_field("ratios"):
            return Ratios(**reference, box=self.box_ratio, crop=self.crop_ratio)


SAMPLING_PARAMETERS = tuple(field.name for field in fields(SamplingParameters))
PLACEMENT_PARAMETERS = tuple(field.name for field in fields(PlacementParameters))

_NEUTRAL: Mapping[str, tuple[str | float, ...]] = {
    "control_scale": (1,),
    "strength": (1,),
    "refine": (0,),
    "mask_level": ("exact", 0),
    "edge": ("soft",),
    "reference_ratio": (1,),
    "prompt": ("",),
    "negative_prompt": ("",),
}
"""Maps parameters to the values that ask for what models without the parameter do anyway."""


def is_neutral(name: str, value: object) -> bool:
    """Returns whether a value asks for nothing that a model without the parameter does not do."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return True
    plain = isinstance(value, str | int | float) and not isinstance(value, bool)
    return plain and value in _NEUTRAL.get(name, ())


def sampling_parameters(sampling: Sampling, defaults: Mapping[str, Any]) -> SamplingParameters:
    """Resolves the parameters of a sampling run.

    Args:
        sampling: the caller's values.
        defaults: parameter -> value, from the manifest and the system.

    Raises:
        InputError: there is no such quality.
    """
    preset: Mapping[str, Any] = {}
    if sampling.quality is not None:
        with in_field("quality"):
            if sampling.quality not in tuple(QUALITIES):  # also what has no hash
                raise InputError(
                    f"there is no quality '{sampling.quality}': choose one of {', '.join(QUALITIES)}"
                )
            # detail maps are AnyDoor's alone
            preset = {name: v for name, v in QUALITIES[sampling.quality].items() if name in defaults}
    given = {name: getattr(sampling, name) for name in SAMPLING_PARAMETERS}
    if sampling.steps is not None or "steps" in preset:
        # a number of steps takes the place of the timesteps that a manifest names
        defaults = {name: value for name, value in defaults.items() if name != "timesteps"}
    return SamplingParameters(**_filled(given, {**defaults, **preset}))


def placement_parameters(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> PlacementParameters:
    """Resolves the parameters of a placement.

    Args:
        given: parameter -> the placement's value, or None.
        defaults: parameter -> value, from the manifest and the system.
    """
    return PlacementParameters(**_filled(given, defaults))


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}
