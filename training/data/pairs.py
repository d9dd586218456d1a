"""Makes image pairs (section 3.4, figure 4): one object in two pictures, a reference and a target to
reproduce.

All geometry goes through the runtime's pre-processing, so that training and serving see the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor

from runtime.diffusion.noise_schedule import TRAIN_TIMESTEPS
from runtime.errors import InputError
from runtime.imaging.boxes import Box, box_in_box, expand, mask_extent
from runtime.imaging.collage import collage, crop_scene
from runtime.imaging.geometry import Geometry, Ratios, zoom_in
from runtime.imaging.modes import MODES
from runtime.imaging.reference import prepare_reference
from training.data.masks import Mask, largest_piece, perturb_mask
from training.ranges import check_least, check_shares

Picture = NDArray[np.uint8]

Kind = Literal["video", "image", "multi-view", "try-on"]
TimestepRule = Literal["uniform", "paper", "code"]

SMALLEST_AREA, LARGEST_AREA = 0.01, 0.64
"""Share of its picture that an object's mask must cover."""
WHOLE = 0.9
"""Share of a mask's area that must be in one piece."""
SHORTEST_SIDE = 0.1
"""Least width or height of a reference's object, as a share of its picture's."""
LARGEST_BOX, LARGEST_BOX_OF_CLOTHES = 0.8, 1.0
"""Largest width or height of a target's box, enlarged, as a share of its picture's."""
_HALF = TRAIN_TIMESTEPS // 2
_PREFERRED: Mapping[str, tuple[int, int]] = {"video": (_HALF, TRAIN_TIMESTEPS), "image": (0, _HALF)}
"""Kind -> the half of the timesteps that it learns more from: first, and behind the last."""
# among all: 0.3 * 0.5 + 0.7 = 0.85 of the preferred half in the code, 0.75 in the paper
_FOCUS: Mapping[TimestepRule, float] = {"uniform": 0.0, "paper": 0.5, "code": 0.7}
"""Rule -> probability that a timestep is of the preferred half for sure."""
LIGHT = 0.2
"""Most by which contrast and brightness of a reference change, as a share of their range."""
ROUGHEST, FINEST = 0.3, 0.99
"""Overlap (intersection over union) of a simulated rough shape with the mask."""


@dataclass(frozen=True, eq=False)
class Shot:
    """A picture and where the object is in it."""

    image: Picture  # (H, W, 3) RGB
    mask: Mask  # (H, W)


@dataclass(frozen=True)
class CommonRules:
    """How the pictures of a pair are prepared. The defaults are AnyDoor's (datasets/base.py)."""

    resolution: int = 512
    flip: float = 0.5
    """Probability that the reference is mirrored."""
    mirror: float = 0.0
    """Probability that both pictures are: as good as another object."""
    brighten: float = 0.5
    """Probability that brightness and contrast of the reference change."""
    reference_ratios: tuple[float, float] = (1.1, 1.4)
    box_ratio: float = 1.1
    crop_ratios: tuple[float, float] = (1.3, 2.9)

    def __post_init__(self) -> None:
        """Refuses numbers that no pair can have.

        Raises:
            InputError: names the setting.
        """
        check_least(self, 1, "resolution", "box_ratio")
        for name in ("reference_ratios", "crop_ratios"):
            low, high = getattr(self, name)
            if not 1 <= low <= high < math.inf:
                raise InputError(
                    f"{name} is [{low:g}, {high:g}]; expected two numbers from 1, the lower first"
                )
        check_shares(self, "flip", "mirror", "brighten")

    def ratios(self, rng: Generator) -> Ratios:
        """Draws the ratios of a pair, as the original does in steps of 0.1."""
        return Ratios(tenths(self.reference_ratios, rng), self.box_ratio, tenths(self.crop_ratios, rng))


@dataclass(frozen=True)
class PairRules(CommonRules):
    """How AnyDoor's pairs are made. The defaults are the released code's (datasets/base.py)."""

    box_masks: float = 0.3
    """Probability that the mask channel is the filled box, not a simulated rough shape."""
    timesteps: TimestepRule = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "box_masks")


@dataclass(frozen=True, eq=False)
class Pair:
    """One training sample; R is the resolution."""

    reference: Picture  # (224, 224, 3), for the ID encoder
    hint: NDArray[np.float32]  # (4, R, R), see runtime.imaging.collage
    picture: NDArray[np.float32]  # (3, R, R), -1..1, what the model is to draw
    timestep: int  # 0..999
    kind: Kind


class UnfitPairError(ValueError):
    """The masks are not worth learning from; the text says why. Take another pair."""


def make_pair(
    reference: Shot, target: Shot, kind: Kind, rules: PairRules, rng: Generator, either_side: bool = False
) -> Pair:
    """Makes a training sample of two pictures of one object.

    Args:
        reference, target: the two pictures, of any size.
        kind: decides the timestep, and how large the target may be.
        rules: how pairs are made.
        rng: source of randomness.
        either_side: how strict the filter of sizes is, see `check_masks`.

    Raises:
        UnfitPairError: a mask is too small, too large, in pieces or of another size than its picture.
    """
    check_sizes(reference, target)
    largest_box = LARGEST_BOX_OF_CLOTHES if kind == "try-on" else LARGEST_BOX
    check_masks(reference.mask, target.mask, largest_box, either_side)
    if rng.random() < rules.mirror:
        reference, target = mirrored(reference), mirrored(target)
    ratios = rules.ratios(rng)
    augmented = augment_reference(reference, rules, rng)
    prepared = prepare_reference(augmented.image, augmented.mask, ratios.reference)
    height, width = target.mask.shape
    geometry = zoom_in(target.mask, (width, height), ratios)
    shape = target_shape(target.mask, geometry, rules.box_masks, rng)
    hint = collage(
        target.image, geometry, prepared.high_frequency_map, shape, MODES["shape"], rules.resolution
    )
    picture = crop_scene(target.image, geometry, rules.resolution)
    # the original pads its target with -1, which is what black becomes
    timestep = sample_timestep(kind, rules.timesteps, rng)
    return Pair(prepared.image, hint, picture, timestep, kind)


def check_sizes(reference: Shot, target: Shot) -> None:
    """Refuses masks that are of another size than their picture.

    Raises:
        UnfitPairError: says whose.
    """
    for name, shot in (("reference", reference), ("target", target)):
        if shot.image.shape[:2] != shot.mask.shape:
            sizes = f"{shot.image.shape[:2]} and {shot.mask.shape}"
            raise UnfitPairError(f"picture and mask of the {name} are not of one (height, width): {sizes}")


def mirrored(shot: Shot) -> Shot:
    """Mirrors a picture and its mask left to right."""
    return Shot(shot.image[:, ::-1], shot.mask[:, ::-1])


def tenths(limits: tuple[float, float], rng: Generator) -> float:
    """Draws a number between the limits, both included, in steps of 0.1."""
    return int(rng.integers(round(limits[0] * 10), round(limits[1] * 10) + 1)) / 10


def check_masks(reference: Mask, target: Mask, largest_box: float, either_side: bool = False) -> None:
    """Refuses all but whole objects of reasonable size, as the released code does (datasets/base.py).

    Unlike there, the target must be in one piece, too.

    Args:
        reference, target: (H, W) each.
        largest_box: how much of the picture's sides the target's box, enlarged by 1.1, may take.
        either_side: whether one side that is too short or too long is enough to refuse a pair. Otherwise both
            have to be: a pencil may be thin and a table may go from edge to edge.

    Raises:
        UnfitPairError: and why.
    """
    for name, mask in (("reference", reference), ("target", target)):
        share = float(mask.mean())
        if not SMALLEST_AREA <= share <= LARGEST_AREA:
            limits = f"{SMALLEST_AREA:.0%} to {LARGEST_AREA:.0%}"
            raise UnfitPairError(f"the {name}'s mask covers {share:.1%} of the picture, not {limits}")
        if largest_piece(mask) < WHOLE:
            raise UnfitPairError(f"the {name}'s mask is in pieces")
    out_of_size = any if either_side else all
    if out_of_size(side < SHORTEST_SIDE for side in _sides(mask_extent(reference), reference)):
        raise UnfitPairError("the reference is less than a tenth of its picture")
    height, width = target.shape
    box = expand(mask_extent(target), Ratios().box, (width, height))
    if out_of_size(side > largest_box for side in _sides(box, target)):
        raise UnfitPairError(f"the target takes more than {largest_box:.0%} of its picture")


def _sides(box: Box, mask: Mask) -> tuple[float, float]:
    """Width and height of a box as parts of the picture's."""
    return box.width / mask.shape[1], box.height / mask.shape[0]


def augment_reference(reference: Shot, rules: CommonRules, rng: Generator) -> Shot:
    """Mirrors the reference and changes its light, each with its probability.

    The ID encoder and the high-frequency map both see the result (aug_data_mask in datasets/base.py).
    """
    image, mask = reference.image, reference.mask
    if rng.random() < rules.flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if rng.random() < rules.brighten:
        contrast, brightness = 1 + rng.uniform(-LIGHT, LIGHT), 255 * rng.uniform(-LIGHT, LIGHT)
        image = np.clip(image * contrast + brightness, 0, 255).astype(np.uint8)
    return Shot(image, mask)


def target_shape(mask: Mask, geometry: Geometry, box_share: float, rng: Generator) -> NDArray[np.uint8]:
    """Draws the mask channel of a crop, (crop height, crop width) uint8 0/1: a rough shape or the box."""
    if rng.random() < box_share:
        shape = np.zeros((geometry.crop.height, geometry.crop.width), np.uint8)
        shape[box_in_box(geometry.box, geometry.crop).slices] = 1
        return shape
    rough = perturb_mask(mask[geometry.crop.slices], rng.uniform(ROUGHEST, FINEST), rng)
    return rough.astype(np.uint8)


def sample_timestep(kind: Kind, rule: TimestepRule, rng: Generator) -> int:
    """Draws a timestep adaptively: videos learn more from noisy steps (structure), images from clean ones.

    Args:
        kind: where the pair comes from; multi-view and try-on pairs are uniform under every rule.
        rule: "paper" raises the probability of the preferred half by 50 % (0.5 to 0.75), as section 3.4 says.
            "code" is datasets/base.py: with probability 0.3 uniform, else from the preferred half only.
            "uniform" prefers nothing.
        rng: source of randomness.

    Returns:
        A timestep, 0..999; the halves part at 500.
    """
    preferred = _PREFERRED.get(kind)
    if preferred is not None and rng.random() < _FOCUS[rule]:
        return int(rng.integers(*preferred))
    return int(rng.integers(TRAIN_TIMESTEPS))


def sample_timesteps(images: Tensor, kind: Kind, rule: TimestepRule, rng: torch.Generator) -> Tensor:
    """Draws timesteps (N,) int64 as `sample_timestep` does, where `images` (N,), bool, lies.

    Args:
        images: which pairs are "image".
        kind: what the others are.
        rule: see `sample_timestep`.
        rng: source of randomness on that device.
    """
    focus, place = torch.rand(2, len(images), generator=rng, device=images.device)
    (low, high), (image_low, image_high) = (
        _PREFERRED.get(each, (0, TRAIN_TIMESTEPS)) for each in (kind, "image")
    )
    focused = focus < _FOCUS[rule]
    first = focused * (low + images * (image_low - low))
    end = TRAIN_TIMESTEPS - focused * (TRAIN_TIMESTEPS - high - images * (image_high - high))
    drawn: Tensor = first + (place * (end - first)).long()
    return drawn


def as_reference(picture: Picture) -> NDArray[np.float32]:
    """Gives a prepared reference as the ID encoder takes it: (3, 224, 224) float32 0..1."""
    planes = np.ascontiguousarray(picture.transpose(2, 0, 1)).astype(np.float32)
    planes /= 255
    return planes


def as_sample(pair: Pair) -> dict[str, Any]:
    """Gives a pair as the network takes it: reference (3, 224, 224) float32 0..1, hint, picture, timestep."""
    reference = as_reference(pair.reference)
    return {"reference": reference, "hint": pair.hint, "picture": pair.picture, "timestep": pair.timestep}
