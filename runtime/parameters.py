"""Which value a parameter has: the request's, else the preset's, else the manifest's, else the system's."""

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
    """`runtime.request.Sampling` with nothing left open."""

    steps: int
    guidance_scale: float
    control_scale: float | None
    """None: the system has no detail maps."""
    eta: float
    sampler: str
    guidance_interval: tuple[int, int]
    map_steps: int | None
    """None: detail maps at every step."""
    timesteps: tuple[int, ...] | None

    def guided_at(self, timestep: int) -> bool:
        """Whether the unconditional half is needed; at a scale of exactly 1 it cancels out."""
        first, last = self.guidance_interval
        return self.guidance_scale != 1.0 and first <= timestep <= last


@dataclass(frozen=True)
class PlacementParameters:
    """The parameters of a `runtime.request.Placement` with nothing left open."""

    mode: str
    reference_ratio: float | None
    """None: the system takes no reference."""
    box_ratio: float
    crop_ratio: float
    mask_level: str | int | None
    """None: the system draws in no mask."""
    edge: str | None
    """None: the system always fades."""
    refine: int | None
    """0: one pass; None: the system has no other."""

    @property
    def ratios(self) -> Ratios:
        """The three ratios.

        Raises:
            InputError: one is out of range.
        """
        reference = {} if self.reference_ratio is None else {"reference": self.reference_ratio}
        with in_field("ratios"):
            return Ratios(**reference, box=self.box_ratio, crop=self.crop_ratio)


SAMPLING_PARAMETERS = tuple(field.name for field in fields(SamplingParameters))
PLACEMENT_PARAMETERS = tuple(field.name for field in fields(PlacementParameters))


def sampling_parameters(sampling: Sampling, defaults: Mapping[str, Any]) -> SamplingParameters:
    """The parameters of a sampling run.

    Args:
        sampling: as the caller gave it.
        defaults: parameter -> value, of the manifest and the system.

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
            preset = QUALITIES[sampling.quality]
    given = {name: getattr(sampling, name) for name in SAMPLING_PARAMETERS}
    return SamplingParameters(**_filled(given, {**defaults, **preset}))


def placement_parameters(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> PlacementParameters:
    """The parameters of a placement.

    Args:
        given: parameter -> the placement's value; None where it is open.
        defaults: parameter -> value, of the manifest and the system.
    """
    return PlacementParameters(**_filled(given, defaults))


def _filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: defaults.get(name) if value is None else value for name, value in given.items()}
