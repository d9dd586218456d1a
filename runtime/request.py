"""What a caller asks for: what goes where, and how the picture is sampled.

A field that is None is open. It then comes from the quality preset, from the bundle's manifest, or from the
system, in this order; see `runtime.parameters`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError, in_field
from runtime.imaging.sources import PictureLike

AUTOMATIC = "auto"
"""The reference mask of an object that is to be found; a file of that name is "./auto"."""


REFINE_TIMESTEP = 200
"""For `Placement.refine` where nobody says another."""


class _Numbers:
    """Has numbers of NumPy's become Python's, whose arithmetic does not overflow."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())


@dataclass(frozen=True, eq=False)
class View:
    """Another picture of the object of a placement."""

    picture: PictureLike
    mask: PictureLike | None = None
    """As `Placement.reference_mask`."""
    clicks: Sequence[Sequence[int]] | None = None
    """As `Placement.reference_clicks`."""


@dataclass(frozen=True, eq=False)
class Placement(_Numbers):
    """What is drawn, and its place in the scene. Models take either a reference or a prompt."""

    reference: PictureLike | None = None
    """Picture of the object. Without it, a model that fills holes goes on with the scene."""
    reference_mask: PictureLike | None = None
    """Where the object is in it; `AUTOMATIC` to have it found; its transparency if None."""
    box: Sequence[float] | None = None
    """Place: x0, y0, x1, y1 in whole pixels of the scene, x1 and y1 exclusive. May cross the scene's
    border."""
    mask: PictureLike | None = None
    """Place: a mask of the scene's size, instead of a box."""
    mode: str | None = None
    """How it is placed, one of `runtime.imaging.modes.MODES`: "crop" generates the surroundings of the place
    anew; "shape" fills the mask; "keep_background" changes nothing outside the place but its soft edge, where
    it has one."""
    reference_ratio: float | None = None
    """White around the reference object, a factor from 1 to 100."""
    box_ratio: float | None = None
    """Target box around the place, likewise."""
    crop_ratio: float | None = None
    """Zoom-in crop around the target box, likewise."""
    prompt: str | None = None
    """What to draw, in words, instead of a reference."""
    negative_prompt: str | None = None
    """What guidance leads away from, in words; nothing in particular if None."""
    keep_specks: bool = False
    """Whether pixels of a mask that lie far from the rest belong to it, as in the original; if not, they are
    left out with a warning (`runtime.imaging.specks`)."""
    mask_level: str | int | None = None
    """How coarse `mask` is made before it is drawn into, for models that draw inside of one: a name of
    `runtime.imaging.mask_levels.MASK_LEVELS` or its number, from 0 ("exact") to 3 ("box"). A coarse mask
    leaves room for another pose and for shadows."""
    edge: str | None = None
    """How the place ends in the scene, for models that do not always fade: one of
    `runtime.imaging.paste_back.EDGES`, "hard" as the original pastes, or "soft", which also changes a few
    pixels around the place."""
    refine: int | None = None
    """Draws a place that is larger than the networks' picture a second time, in tiles, for detail: the
    timestep of the noise that the second pass starts from, 1 (next to none) to 999; 0 for one pass. See
    `runtime.imaging.tiles`; `REFINE_TIMESTEP` is the usual one."""
    reference_clicks: Sequence[Sequence[int]] | None = None
    """What says where the object is in the reference, instead of a mask: (x, y) on it, or (x, y, False)
    beside it, in pixels of the upright picture; see `runtime.segmentation`."""
    views: Sequence[View] | None = None
    """More views of the object, for a bundle that takes several. Their order does not matter; the details of
    `reference` are what AnyDoor puts into its place."""


@dataclass(frozen=True, eq=False)
class Where:
    """Where an object is in a picture: one of these says it; the main object if none does."""

    box: Sequence[float] | None = None
    """x0, y0, x1, y1 around it, as of a placement."""
    mask: PictureLike | None = None
    """A mask of the picture's size."""
    clicks: Sequence[Sequence[int]] | None = None
    """(x, y) on it, or (x, y, False) beside it."""


@dataclass(frozen=True)
class Sampling(_Numbers):
    """How pictures are sampled."""

    quality: str | None = None
    """A preset, one of `runtime.diffusion.presets.QUALITIES`: values for the fields that are open."""
    steps: int | None = None
    """Steps, 1 to 999."""
    guidance_scale: float | None = None
    """Classifier-free guidance scale, 0 to 100; 1 is without guidance and half the work."""
    control_scale: float | None = None
    """Factor of the detail maps, 0 to 10; 0 ignores the scene's details and the high-frequency map."""
    eta: float | None = None
    """0 is deterministic DDIM, 1 adds as much noise as DDPM."""
    sampler: str | None = None
    """What takes the steps, one of `runtime.diffusion.samplers.SAMPLERS`: "ddim", or "dpm_solver_2m", which
    needs fewer of them and has no `eta`."""
    guidance_interval: tuple[int, int] | None = None
    """Lowest and highest timestep with guidance, of 0 (picture) to 999 (noise); a step outside of them has
    none, and half the work. Source: Kynkäänniemi et al., 2024."""
    map_steps: int | None = None
    """At how many timesteps detail maps are computed; neighbouring steps share them."""
    timesteps: tuple[int, ...] | None = None
    """Exact timesteps to visit, rising, to follow another implementation; overrides `steps`."""


@dataclass(frozen=True)
class Blank(_Numbers):
    """No scene: a picture is drawn from nothing. A placement without a place then takes all of it."""

    width: int | None = None
    """In pixels; that of the bundle if None, and no other."""
    height: int | None = None
    """Likewise."""


@dataclass(frozen=True, eq=False)
class Request(_Numbers):
    """Everything that makes a picture."""

    scene: PictureLike | Blank
    """File, bytes, Pillow image, array or tensor; or none."""
    placements: Sequence[Placement]
    """What goes where; placed one after the other, each into the result of the one before."""
    seed: int | None = None
    """The same seed gives the same picture bit for bit on one machine; random if None. Picture i of several
    has the seed `seed + i`."""
    sampling: Sampling = field(default_factory=Sampling)
    num_images: int = 1
    """How many pictures to make."""
    initial_noise: NDArray[np.float32] | None = None
    """(N, C, h, w) standard normal latents to start from instead of those of the seeds."""
    scene_size: tuple[int, int] | None = None
    """(width, height) that the scene must have, and so the result; any if None."""

    @classmethod
    def of(
        cls,
        scene: PictureLike | Blank,
        placements: Placement | Sequence[Placement],
        seed: int | None = None,
        sampling: Sampling | None = None,
        num_images: int | None = None,
        initial_noise: NDArray[np.float32] | None = None,
    ) -> Request:
        """A request from loose arguments: one placement or several, and None for what is left to the
        defaults.

        Raises:
            InputError: something that is no placement stands for one.
        """
        listed = [placements] if isinstance(placements, Placement) else list(placements)
        for index, each in enumerate(listed):
            if not isinstance(each, Placement):
                with in_field(f"placements[{index}]"):
                    raise InputError(f"a Placement is expected, not {type(each).__name__}")
        count = 1 if num_images is None else num_images
        return cls(scene, listed, seed, sampling or Sampling(), count, initial_noise)

    @classmethod
    def drawing(
        cls,
        prompt: str,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        **others: Any,
    ) -> Request:
        """A request for a picture from nothing.

        Args:
            prompt: what to draw.
            negative_prompt: see `Placement`.
            size: (width, height) in pixels; that of the bundle if None, and no other.
            others: as of `of`, after the placements.
        """
        placement = Placement(prompt=prompt, negative_prompt=negative_prompt)
        return cls.of(Blank(*size or ()), placement, **others)


@dataclass(frozen=True)
class Remove:
    """Takes the object out of the scene."""


@dataclass(frozen=True)
class Move:
    """Takes the object to another place."""

    to: Sequence[float]
    """x0, y0, x1, y1, as of a placement."""


@dataclass(frozen=True, eq=False)
class Reshape:
    """Draws the object again in another outline."""

    to: PictureLike
    """A mask of the scene's size."""


@dataclass(frozen=True, eq=False)
class Swap:
    """Puts another object in the place of the object: in its box, or with the mode shape in its outline."""

    placement: Placement
    """The other one, without a place."""


@dataclass(frozen=True, eq=False)
class SwapPlaces:
    """Lets two objects of the scene change places; each keeps its proportions and gets the other's height."""

    other: Where


@dataclass(frozen=True, eq=False)
class TryOn:
    """Puts a garment in the place of what a person wears there."""

    placement: Placement
    """The garment, without a place."""


Action = Remove | Move | Reshape | Swap | SwapPlaces | TryOn


@dataclass(frozen=True)
class Fill:
    """How a network fills a hole."""

    prompt: str = ""
    """What is there, in words, for a model that takes a prompt."""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, eq=False)
class Edit(_Numbers):
    """What is done to an object of a scene."""

    scene: PictureLike
    where: Where
    """Where the object is."""
    action: Action
    fill: Fill = field(default_factory=Fill)
    seed: int | None = None
    """See `Request`."""
    sampling: Sampling = field(default_factory=Sampling)
    """Of what is placed."""
    num_images: int = 1


def is_automatic(mask: PictureLike | None) -> bool:
    """Whether a reference mask says that the object is to be found."""
    return isinstance(mask, str) and mask == AUTOMATIC


def check_prompt(prompt: object) -> str:
    """Refuses what is no text, or cannot be sent as one.

    Raises:
        InputError: it is no string, or has half of a surrogate pair.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt is text, not {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        code = ord(prompt[error.start])
        raise InputError(
            f"the prompt's character {error.start + 1} is U+{code:04X}, half of a surrogate pair, which "
            "stands for nothing: leave it out"
        ) from error
    return prompt
