"""Image pairs (section 3.4, figure 4): one object in two pictures, a reference and a target to reproduce.

All geometry goes through the runtime's pre-processing, so that training and serving see the same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.random import Generator
from numpy.typing import NDArray

from runtime.diffusion.noise_schedule import TRAIN_TIMESTEPS
from runtime.imaging.boxes import Box, box_in_box, expand, mask_extent
from runtime.imaging.collage import MODES, Geometry, Ratios, collage, crop_scene, zoom_in
from runtime.imaging.reference import prepare_reference

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]

Kind = Literal["video", "image", "multi-view", "try-on"]
TimestepRule = Literal["uniform", "paper", "code"]


@dataclass(frozen=True, eq=False)
class Shot:
    """A picture and where the object is in it."""

    image: Picture  # (H, W, 3) RGB
    mask: Mask  # (H, W)


@dataclass(frozen=True)
class PairRules:
    """How pairs are made. The defaults are the released code's (datasets/base.py)."""

    resolution: int = 512
    flip: float = 0.5
    """Probability that the reference is mirrored."""
    mirror: float = 0.0
    """Probability that both pictures are: as good as another object."""
    brighten: float = 0.5
    """Probability that brightness and contrast of the reference change."""
    box_masks: float = 0.3
    """Probability that the mask channel is the filled box, not a simulated rough shape."""
    reference_ratios: tuple[float, float] = (1.1, 1.4)
    box_ratio: float = 1.1
    crop_ratios: tuple[float, float] = (1.3, 2.9)
    timesteps: TimestepRule = "code"


@dataclass(frozen=True, eq=False)
class Pair:
    """One training sample; R is the resolution."""

    reference: Picture  # (224, 224, 3), for the ID encoder
    hint: NDArray[np.float32]  # (4, R, R), see runtime.imaging.collage
    picture: NDArray[np.float32]  # (3, R, R), -1..1, what the model shall draw
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
        kind: decides over the timestep and over how large the target may be.
        rules: how pairs are made.
        rng: source of randomness.
        either_side: how strict the filter of sizes is, see `check_masks`.

    Raises:
        UnfitPairError: a mask is too small, too large, in pieces or of another size than its picture.
    """
    for name, shot in (("reference", reference), ("target", target)):
        if shot.image.shape[:2] != shot.mask.shape:
            sizes = f"{shot.image.shape[:2]} and {shot.mask.shape}"
            raise UnfitPairError(f"picture and mask of the {name} are not of one (height, width): {sizes}")
    largest_box = 1.0 if kind == "try-on" else 0.8
    check_masks(reference.mask, target.mask, largest_box, either_side)
    if rng.random() < rules.mirror:
        reference, target = (Shot(shot.image[:, ::-1], shot.mask[:, ::-1]) for shot in (reference, target))
    ratios = Ratios(_tenths(rules.reference_ratios, rng), rules.box_ratio, _tenths(rules.crop_ratios, rng))
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


def _tenths(limits: tuple[float, float], rng: Generator) -> float:
    """A number between the limits, both included, in steps of 0.1 as the original draws them."""
    return int(rng.integers(round(limits[0] * 10), round(limits[1] * 10) + 1)) / 10


def check_masks(reference: Mask, target: Mask, largest_box: float, either_side: bool = False) -> None:
    """The filters of the released code (datasets/base.py): whole objects of reasonable size.

    Ours is that the target has to be in one piece, too.

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
        if not 0.01 <= share <= 0.64:
            raise UnfitPairError(f"the {name}'s mask covers {share:.1%} of the picture, not 1% to 64%")
        if largest_piece(mask) < 0.9:
            raise UnfitPairError(f"the {name}'s mask is in pieces")
    out_of_size = any if either_side else all
    if out_of_size(side < 0.1 for side in _sides(mask_extent(reference), reference)):
        raise UnfitPairError("the reference is less than a tenth of its picture")
    height, width = target.shape
    box = expand(mask_extent(target), Ratios().box, (width, height))
    if out_of_size(side > largest_box for side in _sides(box, target)):
        raise UnfitPairError(f"the target takes more than {largest_box:.0%} of its picture")


def _sides(box: Box, mask: Mask) -> tuple[float, float]:
    """Width and height of a box as parts of the picture's."""
    return box.width / mask.shape[1], box.height / mask.shape[0]


def largest_piece(mask: Mask) -> float:
    """Share of the mask's area in its largest connected piece (pixels that touch by a side), 0 if empty."""
    left, total, largest = mask.copy(), int(mask.sum()), 0
    while 2 * largest < total and left.any():
        piece = np.zeros_like(mask)
        piece.flat[int(left.argmax())] = True
        piece = _flood(piece, left)
        largest = max(largest, int(piece.sum()))
        left &= ~piece
        if int(left.sum()) <= largest:
            break
    return largest / total if total else 0.0


def _flood(seed: Mask, inside: Mask) -> Mask:
    """All of `inside` that can be reached from `seed`: sweeps along rows and columns to a standstill."""
    reached, before = seed, -1
    while (count := int(reached.sum())) != before:
        before = count
        for axis in (0, 1):
            reached = _fill_runs(reached, inside, axis)
    return reached


def _fill_runs(reached: Mask, inside: Mask, axis: int) -> Mask:
    """Every run of `inside` along the axis that holds a reached pixel, as a whole."""
    inside, reached = np.moveaxis(inside, axis, 1), np.moveaxis(reached, axis, 1)
    starts = inside & ~np.pad(inside, ((0, 0), (1, 0)))[:, :-1]
    runs = np.where(inside, np.cumsum(starts.ravel()).reshape(starts.shape), 0)
    filled: Mask = inside & np.isin(runs, runs[reached])
    return np.moveaxis(filled, 1, axis)


def augment_reference(reference: Shot, rules: PairRules, rng: Generator) -> Shot:
    """Mirrors the reference and changes its light, each with its probability.

    The ID encoder and the high-frequency map both see the result (aug_data_mask in datasets/base.py).
    """
    image, mask = reference.image, reference.mask
    if rng.random() < rules.flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if rng.random() < rules.brighten:
        contrast, brightness = 1 + rng.uniform(-0.2, 0.2), 255 * rng.uniform(-0.2, 0.2)
        image = np.clip(image * contrast + brightness, 0, 255).astype(np.uint8)
    return Shot(image, mask)


def target_shape(mask: Mask, geometry: Geometry, box_share: float, rng: Generator) -> NDArray[np.uint8]:
    """The mask channel of a crop, (crop height, crop width) uint8 0/1: a rough shape or the filled box."""
    if rng.random() < box_share:
        shape = np.zeros((geometry.crop.height, geometry.crop.width), np.uint8)
        shape[box_in_box(geometry.box, geometry.crop).slices] = 1
        return shape
    rough = perturb_mask(mask[geometry.crop.slices], rng.uniform(0.3, 0.99), rng)
    return rough.astype(np.uint8)


def perturb_mask(mask: Mask, overlap: float, rng: Generator) -> Mask:
    """A hand-drawn-like version of a mask: grown, shrunk and coarsened until it overlaps only so much.

    Section 3.3 simulates user shapes so. Stops at the first step whose intersection over union with the mask
    is below `overlap`, at the latest after 30.

    mask: (H, W). overlap: 0..1. Returns (H, W), never empty where the mask is not.
    """
    box = mask_extent(mask)
    reach = max(2, max(box.width, box.height) // 10)
    # whoever draws too large keeps drawing too large: growing and shrinking would cancel
    grow = 0.7 * rng.choice([0.1, 0.9])
    rough, changed = mask, mask
    for _ in range(30):
        height, width = (int(rng.integers(1, reach + 1)) for _ in range(2))
        operation = rng.choice(["grow", "shrink", "coarsen", "patch"], p=[grow, 0.7 - grow, 0.15, 0.15])
        if operation == "grow":
            changed = _grow(rough, height, width)
        elif operation == "shrink":
            changed = np.logical_not(_grow(~rough, height, width)).astype(bool)
        elif operation == "coarsen":
            changed = _coarsen(rough, max(height, width))
        else:
            changed = _patch(rough, box, reach, rng)
        if not changed.any():
            continue
        rough = changed
        if (rough & mask).sum() / max((rough | mask).sum(), 1) < overlap:
            break
    return rough


def _grow(mask: Mask, height: int, width: int) -> Mask:
    """Dilation by a rectangle, one axis after the other."""
    for axis, length in ((0, height), (1, width)):
        pads = [(0, 0), (0, 0)]
        pads[axis] = (length // 2, (length - 1) // 2)
        windows = sliding_window_view(np.pad(mask, pads), length, axis=axis)
        mask = np.any(windows, axis=-1)
    return mask


def _coarsen(mask: Mask, cell: int) -> Mask:
    """The mask as seen on a grid of cells: each takes the value of its middle."""
    rows, columns = (np.minimum(np.arange(n) // cell * cell + cell // 2, n - 1) for n in mask.shape)
    coarse: Mask = mask[rows][:, columns]
    return coarse


def _patch(mask: Mask, box: Box, reach: int, rng: Generator) -> Mask:
    """Sets or clears a small rectangle somewhere in the object's box."""
    patched: Mask = mask.copy()
    x, y = int(rng.integers(box.x0, box.x1 + 1)), int(rng.integers(box.y0, box.y1 + 1))
    width, height = (int(rng.integers(1, 2 * reach + 1)) for _ in range(2))
    patched[y : y + height, x : x + width] = bool(rng.random() < 0.5)
    return patched


def sample_timestep(kind: Kind, rule: TimestepRule, rng: Generator) -> int:
    """Adaptive timestep sampling: videos learn more from noisy steps (structure), images from clean ones.

    Args:
        kind: where the pair comes from; multi-view and try-on pairs are uniform under every rule.
        rule: "paper" raises the probability of the preferred half by 50 % (0.5 to 0.75), as section 3.4 says.
            "code" is datasets/base.py: with probability 0.3 uniform, else from the preferred half only.
            "uniform" prefers nothing.
        rng: source of randomness.

    Returns:
        A timestep, 0..999; the halves part at 500.
    """
    half = TRAIN_TIMESTEPS // 2
    preferred = {"video": (half, TRAIN_TIMESTEPS), "image": (0, half)}.get(kind)
    # among all: 0.3 * 0.5 + 0.7 = 0.85 of the preferred half in the code, 0.75 in the paper
    focus = {"uniform": 0.0, "paper": 0.5, "code": 0.7}[rule]
    if preferred is not None and rng.random() < focus:
        return int(rng.integers(*preferred))
    return int(rng.integers(TRAIN_TIMESTEPS))


def as_sample(pair: Pair) -> dict[str, Any]:
    """The pair as the network takes it: reference (3, 224, 224) float32 0..1, hint, picture, timestep."""
    reference = np.ascontiguousarray(pair.reference.transpose(2, 0, 1)).astype(np.float32) / 255
    return {"reference": reference, "hint": pair.hint, "picture": pair.picture, "timestep": pair.timestep}
