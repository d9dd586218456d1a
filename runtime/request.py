"""What a caller asks for: where an object goes, and how the picture is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.imaging.collage import Ratios
from runtime.imaging.pictures import PictureLike


@dataclass(frozen=True, eq=False)
class Placement:
    """An object and its place in the scene."""

    reference: PictureLike
    """Picture of the object."""
    reference_mask: PictureLike | NDArray[np.bool_] | None = None
    """Where the object is in it; its transparency if None."""
    box: tuple[int, int, int, int] | None = None
    """Place: x0, y0, x1, y1 in pixels of the scene, x1 and y1 exclusive. May cross the scene's border."""
    mask: PictureLike | NDArray[np.bool_] | None = None
    """Place: a mask of the scene's size, instead of a box."""
    mode: str = "crop"
    """How it is placed, one of `runtime.imaging.collage.MODES`: "crop" generates the surroundings of the box
    anew; "shape" makes the object fill the mask; "keep_background" changes nothing outside the box."""
    ratios: Ratios = field(default_factory=Ratios)


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled. The defaults are the original's (run_inference.py).

    `runtime.diffusion.presets` has named sets that trade some likeness to those pictures for speed.
    """

    steps: int = 50
    """Steps, 1 to 999."""
    guidance_scale: float = 5.0
    """Classifier-free guidance scale; 1 is without guidance and half the work."""
    control_scale: float = 1.0
    """Factor of the detail maps; 0 ignores the scene's details and the high-frequency map."""
    eta: float = 0.0
    """0 is deterministic DDIM, 1 adds as much noise as DDPM."""
    timesteps: tuple[int, ...] | None = None
    """Exact timesteps to visit, rising, to follow another implementation; overrides `steps`."""
    sampler: str = "ddim"
    """What takes the steps, one of `runtime.diffusion.samplers.SAMPLERS`: "ddim", or "dpm_solver_2m", which
    needs fewer of them and has no `eta`."""
    guidance_interval: tuple[int, int] = (0, 999)
    """Lowest and highest timestep with guidance, of 0 (picture) to 999 (noise); a step outside of them has
    none, and half the work. Source: Kynkäänniemi et al., 2024."""
    map_steps: int | None = None
    """At how many timesteps detail maps are computed; neighbouring steps share them. None: at every step."""

    def guided_at(self, timestep: int) -> bool:
        """Whether the unconditional half is needed; at a scale of exactly 1 it cancels out."""
        first, last = self.guidance_interval
        return self.guidance_scale != 1.0 and first <= timestep <= last


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that makes a picture; `Compositor.composite` describes the fields."""

    scene: PictureLike
    placements: Sequence[Placement]
    seed: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    num_images: int = 1
    initial_noise: NDArray[np.float32] | None = None


@dataclass(frozen=True, eq=False)
class ResolvedPlacement:
    """A placement whose pictures are decoded and checked; see `runtime.validation`."""

    reference: NDArray[np.uint8]
    reference_mask: NDArray[np.bool_]
    target: Any
    """A `Box`, or a mask (H, W) of bool."""
    mode: str
    ratios: Ratios
