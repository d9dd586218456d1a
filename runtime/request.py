"""Defines requests: what goes where, and how the picture is sampled.

The value of a field that is None comes from the quality preset, the bundle's manifest or the system, in this
order; see `runtime.parameters`.
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
"""The reference mask that has the object found by a segmenter; a file of that name is "./auto"."""


REFINE_TIMESTEP = 200
"""The default timestep of `Placement.refine` and --refine."""


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
    """See `Placement.reference_mask`."""
    clicks: Sequence[Sequence[int]] | None = None
    """See `Placement.reference_clicks`."""


@dataclass(frozen=True, eq=False)
class Placement(_Numbers):
    """What to draw, and its place in the scene. A model takes either a reference or a prompt."""

    reference: PictureLike | None = None
    """Picture of the object. Without it, a model that fills holes continues the scene."""
    reference_mask: PictureLike | None = None
    """Mask of the object in the reference; `AUTOMATIC` to have it found; its transparency if None."""
    box: Sequence[float] | None = None
    """Place of the object: x0, y0, x1, y1 in whole pixels of the scene, x1 and y1 exclusive. It may cross the
    scene's border."""
    mask: PictureLike | None = None
    """Place of the object: a mask of the scene's size, instead of a box."""
    mode: str | None = None
    """How it is placed, one of `runtime.imaging.modes.MODES`: "crop" redraws the surroundings of the place;
    "shape" fills the mask; "keep_background" changes nothing outside the place, except for a soft edge."""
    reference_ratio: float | None = None
    """White margin around the reference object, a factor from 1 to 100."""
    box_ratio: float | None = None
    """Enlargement of the place to the target box, a factor from 1 to 100."""
    crop_ratio: float | None = None
    """Enlargement of the target box to the zoom-in crop, a factor from 1 to 100."""
    prompt: str | None = None
    """Text prompt, instead of a reference."""
    negative_prompt: str | None = None
    """What not to draw: guidance leads away from it. The empty prompt if None."""
    keep_specks: bool = False
    """Whether to keep stray pixels of masks, far from the rest, as the original does. Otherwise they are
    dropped with a warning (`runtime.imaging.specks`)."""
    mask_level: str | int | None = None
    """How much `mask` is coarsened first, for models that draw inside a mask: a name of
    `runtime.imaging.mask_levels.MASK_LEVELS` or its number, from 0 ("exact") to 3 ("box"). A coarse mask
    leaves room for another pose and for shadows."""
    edge: str | None = None
    """How the result is pasted into the scene, for models with a choice: one of
    `runtime.imaging.paste_back.EDGES`, "hard" as in the original, or "soft", which also changes a few pixels
    around the place."""
    refine: int | None = None
    """Draws a place that is larger than the networks' picture a second time, in tiles, for more detail: the
    timestep of the noise that the second pass starts from, 1 (almost none) to 999; 0 turns it off. See
    `runtime.imaging.tiles`; `REFINE_TIMESTEP` is a usual value."""
    strength: float | None = None
    """Share of the noise that sampling starts from, above 0, at most 1. 1 starts from noise alone; less
    starts from the object pasted into its place (`runtime.imaging.pasted_object`), keeps more of its markings
    and its pose, and takes fewer steps."""
    reference_clicks: Sequence[Sequence[int]] | None = None
    """Clicks that select the object in the reference, instead of a mask: (x, y) on it, or (x, y, False) for a
    point that is not on it, in pixels of the upright picture; see `runtime.segmentation`."""
    views: Sequence[View] | None = None
    """More views of the object, for a bundle that takes several. Their order does not matter; AnyDoor takes
    the HF map from `reference`."""


@dataclass(frozen=True, eq=False)
class Where:
    """Selects an object in a picture, by one of these; without any, the main object."""

    box: Sequence[float] | None = None
    """x0, y0, x1, y1 around it, like that of a placement."""
    mask: PictureLike | None = None
    """A mask of the picture's size."""
    clicks: Sequence[Sequence[int]] | None = None
    """(x, y) on it, or (x, y, False) for a point that is not on it."""


@dataclass(frozen=True)
class Sampling(_Numbers):
    """How pictures are sampled."""

    quality: str | None = None
    """A preset, one of `runtime.diffusion.presets.QUALITIES`, for the fields that are None."""
    steps: int | None = None
    """Number of steps, 1 to 999."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance, 0 to 100; 1 turns it off and halves the work."""
    control_scale: float | None = None
    """Factor of the detail maps, 0 to 10; 0 ignores the scene's details and the high-frequency map."""
    eta: float | None = None
    """Noise per step: 0 is deterministic DDIM, 1 adds as much noise as DDPM."""
    sampler: str | None = None
    """One of `runtime.diffusion.samplers.SAMPLERS`: "ddim", or "dpm_solver_2m", which needs fewer steps and
    has no `eta`."""
    guidance_interval: tuple[int, int] | None = None
    """Lowest and highest timestep with guidance, from 0 (picture) to 999 (noise). Steps outside take half the
    work. Source: Kynkäänniemi et al., 2024."""
    map_steps: int | None = None
    """Number of timesteps at which detail maps are computed; neighbouring steps share them."""
    timesteps: tuple[int, ...] | None = None
    """Exact timesteps, in increasing order, to follow another implementation; overrides `steps`."""


@dataclass(frozen=True)
class Blank(_Numbers):
    """Stands for a missing scene. A placement without a place then takes the whole picture."""

    width: int | None = None
    """In pixels; must be the bundle's, which is the default."""
    height: int | None = None
    """In pixels; must be the bundle's, which is the default."""


@dataclass(frozen=True, eq=False)
class Request(_Numbers):
    """A request for pictures."""

    scene: PictureLike | Blank
    """File, bytes, Pillow image, array or tensor; or `Blank`."""
    placements: Sequence[Placement]
    """Objects and their places, drawn one after the other, each into the result of the one before."""
    seed: int | None = None
    """The same seed gives the same picture bit for bit on one machine; random if None. Picture i of several
    has the seed `seed + i`."""
    sampling: Sampling = field(default_factory=Sampling)
    num_images: int = 1
    """Number of pictures."""
    initial_noise: NDArray[np.float32] | None = None
    """(N, C, h, w) standard normal latents to start from instead of those of the seeds."""
    scene_size: tuple[int, int] | None = None
    """(width, height) that the scene must have; any if None."""

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
        """Builds a request from arguments: one placement or several, and None for defaults.

        Raises:
            InputError: a placement is of another type.
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
        """Builds a request for a picture without a scene.

        Args:
            prompt: what to draw.
            negative_prompt: see `Placement`.
            size: (width, height) in pixels; must be the bundle's, which is the default.
            others: the arguments of `of` after the placements.

        Raises:
            InputError: the size is no width and height.
        """
        placement = Placement(prompt=prompt, negative_prompt=negative_prompt)
        if size is not None and not (isinstance(size, tuple | list) and len(size) == 2):
            with in_field("size"):
                raise InputError(f"a width and a height in pixels are expected, not {size!r}")
        return cls.of(Blank(*size or ()), placement, **others)


@dataclass(frozen=True)
class Remove:
    """Removes the object from the scene."""


@dataclass(frozen=True)
class Move(_Numbers):
    """Moves the object to another place."""

    to: Sequence[float]
    """x0, y0, x1, y1, like the box of a placement."""
    refine: int | None = None
    """See `Placement`."""
    strength: float | None = None
    """See `Placement`."""


@dataclass(frozen=True, eq=False)
class Reshape(_Numbers):
    """Redraws the object in another outline."""

    to: PictureLike
    """A mask of the scene's size."""
    refine: int | None = None
    """See `Placement`."""
    strength: float | None = None
    """See `Placement`."""


@dataclass(frozen=True, eq=False)
class Swap:
    """Replaces the object by another: in its box, or with the mode shape in its outline."""

    placement: Placement
    """The other object, without a place."""


@dataclass(frozen=True, eq=False)
class SwapPlaces(_Numbers):
    """Exchanges two objects of the scene; each keeps its proportions and gets the other's height."""

    other: Where
    refine: int | None = None
    """See `Placement`."""
    strength: float | None = None
    """See `Placement`."""


@dataclass(frozen=True, eq=False)
class TryOn:
    """Puts a garment in the place of the selected clothes."""

    placement: Placement
    """The garment, without a place."""


Action = Remove | Move | Reshape | Swap | SwapPlaces | TryOn
Rearrangement = Move | Reshape | SwapPlaces
"""What places objects of the scene itself."""


@dataclass(frozen=True)
class Fill:
    """How a network fills a hole."""

    prompt: str = ""
    """What to draw in the hole, for a model that takes prompts."""
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, eq=False)
class Edit(_Numbers):
    """A request for an edit of an object in a scene."""

    scene: PictureLike
    where: Where
    """Where the object is."""
    action: Action
    fill: Fill = field(default_factory=Fill)
    seed: int | None = None
    """See `Request`. Where an object is placed, a network fills the hole once, with this seed, for all
    pictures: picture i alone, with the seed `seed + i`, has another hole."""
    sampling: Sampling = field(default_factory=Sampling)
    """For the object that is placed."""
    num_images: int = 1


def is_automatic(mask: PictureLike | None) -> bool:
    """Returns whether a reference mask asks for the object to be found."""
    return isinstance(mask, str) and mask == AUTOMATIC


def check_prompt(prompt: object) -> str:
    """Checks that a prompt is text that can be encoded.

    Raises:
        InputError: it is not a string, or has half of a surrogate pair.
    """
    if not isinstance(prompt, str):
        raise InputError(f"a prompt is text, not {prompt!r}")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        code = ord(prompt[error.start])
        raise InputError(
            f"the prompt's character {error.start + 1} is U+{code:04X}, half of a surrogate pair, which "
            "is not a character: remove it"
        ) from error
    return prompt
