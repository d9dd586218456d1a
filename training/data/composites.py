"""Makes training samples of IMPRINT's two stages from two pictures of one object.

Stage 1 draws the second view of an object, on white, from the tokens of the first: no scene is known. Stage 2
draws an object back into its picture, inside a mask. Both see the same: a reference, the picture to draw, and
a mask of what is to be drawn, all of it in stage 1. All geometry goes through the runtime's pre-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from runtime.diffusion.noise_schedule import TRAIN_TIMESTEPS
from runtime.imaging.boxes import expand, mask_extent, smallest_box
from runtime.imaging.collage import crop_scene
from runtime.imaging.geometry import Geometry, zoom_in
from runtime.imaging.mask_levels import MASK_LEVELS, coarsen_mask
from runtime.imaging.masks import MASK_THRESHOLD
from runtime.imaging.reference import WHITE, prepare_reference
from runtime.imaging.resize import resize_nearest
from training.data.augment import Augmentation, augment_object
from training.data.masks import Mask
from training.data.matching_places import matching_places
from training.data.mixture import draw_fit
from training.data.pairs import (
    LARGEST_BOX,
    SMALLEST_AREA,
    CommonRules,
    Picture,
    Shot,
    UnfitPairError,
    as_reference,
    augment_reference,
    check_masks,
    check_sizes,
    mirrored,
    tenths,
)
from training.data.sources import Source

SPREADS = (0.7, 1.3)
"""Factor on the widths of the blurs that make a mask coarse; drawn between these."""

PLACES_TRIED = 20
"""Places that are tried for a hole beside the object, each for a smaller one than the last."""

SMALLEST_HOLE = 0.1
"""Least sides of such a hole, as a share of the object's."""


@dataclass(frozen=True, eq=False)
class Composite:
    """One training sample; R is the resolution."""

    reference: Picture  # (224, 224, 3), for the ID encoder
    picture: NDArray[np.float32]  # (3, R, R), -1..1, what the model is to draw; grey beyond the scene
    mask: Mask  # (R, R), where it is to draw; all that lies beyond the scene, too
    counts: Mask  # (R, R), where its error counts: the mask inside the scene
    box: Mask  # (R, R), the place of the object

    @property
    def scene(self) -> NDArray[np.float32]:
        """(3, R, R), what is known of the picture: grey where it is to be drawn."""
        known: NDArray[np.float32] = self.picture * ~self.mask
        return known


@dataclass(frozen=True)
class ViewMaker:
    """Makes samples of stage 1 (section 3.1): the object of another view, without background."""

    rules: CommonRules
    background: int = WHITE
    """Grey level around the objects of references, and of the pictures to draw."""

    def __call__(
        self, source: Source, reference: Shot, target: Shot, rng: Generator, hole: bool
    ) -> Composite:
        """Makes a sample of two views; there are no holes in this stage.

        Raises:
            UnfitPairError: a mask is too small, or of another size than its picture.
        """
        check_sizes(reference, target)
        for name, shot in (("first", reference), ("second", target)):
            if shot.mask.mean() < SMALLEST_AREA:
                raise UnfitPairError(f"the {name} view shows next to nothing of its object")
        if rng.random() < self.rules.mirror:
            reference, target = mirrored(reference), mirrored(target)
        augmented = augment_reference(reference, self.rules, rng)
        ratios = [tenths(self.rules.reference_ratios, rng) for _ in range(2)]
        side, background = self.rules.resolution, self.background
        shown = prepare_reference(augmented.image, augmented.mask, ratios[0], background=background)
        drawn = prepare_reference(target.image, target.mask, ratios[1], side, background)
        picture = drawn.image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        everything, box = np.ones((side, side), bool), np.zeros((side, side), bool)
        box[expand(mask_extent(drawn.mask > MASK_THRESHOLD), self.rules.box_ratio, (side, side)).slices] = (
            True
        )
        return Composite(shown.image, picture, everything, everything, box)


@dataclass(frozen=True)
class CompositeMaker:
    """Makes samples of stage 2 (section 3.2): an object that is put back into its picture."""

    rules: CommonRules
    augmentation: Augmentation = field(default_factory=Augmentation)
    background: int = WHITE
    """Grey level around the objects of references."""

    def __call__(
        self, source: Source, reference: Shot, target: Shot, rng: Generator, hole: bool
    ) -> Composite:
        """Makes a sample of two pictures of an object.

        Args:
            source: where they come from.
            reference, target: the two pictures, or one twice.
            rng: source of randomness.
            hole: draw beside the object, so that there is none where the model draws.

        Raises:
            UnfitPairError: see `make_pair`, and `beside`.
        """
        check_sizes(reference, target)
        check_masks(reference.mask, target.mask, LARGEST_BOX, source.either_side)
        if rng.random() < self.rules.mirror:
            reference, target = mirrored(reference), mirrored(target)
        if rng.random() < self.rules.flip:
            reference = mirrored(reference)
        changed = augment_object(reference, self.augmentation, rng)
        ratios = self.rules.ratios(rng)
        shown = prepare_reference(changed.image, changed.mask, ratios.reference, background=self.background)
        place = beside(target.mask, ratios.box, rng) if hole else target.mask
        height, width = place.shape
        geometry = zoom_in(place, (width, height), ratios)
        level = MASK_LEVELS[int(rng.integers(len(MASK_LEVELS)))]
        coarse = coarsen_mask(place, level, geometry.box, rng.uniform(*SPREADS))
        filled = np.zeros_like(place)
        filled[geometry.box.slices] = True
        return self._cut_out(shown.image, target.image, geometry, coarse, filled)

    def _cut_out(
        self, reference: Picture, scene: Picture, geometry: Geometry, mask: Mask, box: Mask
    ) -> Composite:
        """Takes the zoomed-in crop of everything."""
        side = self.rules.resolution

        def crop(plane: Mask) -> Mask:
            inside = plane[geometry.crop.slices].astype(np.uint8)
            seen: Mask = resize_nearest(inside, (side, side), geometry.padding) == 1
            return seen

        known, counts = crop(np.ones_like(mask)), crop(mask)
        picture = crop_scene(scene, geometry, side) * known
        return Composite(reference, picture, counts | ~known, counts, crop(box))


def beside(mask: Mask, box_ratio: float, rng: Generator) -> Mask:
    """Moves the shape of an object to where the object is not, and makes it smaller until there is room.

    Args:
        mask: (H, W), the object.
        box_ratio: enlargement of the box around the shape, which no level of coarseness leaves.
        rng: source of randomness.

    Returns:
        (H, W), a shape in whose box no pixel of the object lies.

    Raises:
        UnfitPairError: no place was found.
    """
    height, width = mask.shape
    shape = mask[smallest_box(mask).slices]
    for share in np.linspace(1, SMALLEST_HOLE, PLACES_TRIED):
        rows, columns = (max(round(share * side), 1) for side in shape.shape)
        x, y = int(rng.integers(width - columns + 1)), int(rng.integers(height - rows + 1))
        place = np.zeros_like(mask)
        place[y : y + rows, x : x + columns] = resize_nearest(shape, (columns, rows))
        # at a ratio near 1 without the last row and column of the place itself
        around = expand(mask_extent(place), box_ratio, (width, height))
        if not mask[place].any() and not mask[around.slices].any():
            return place
    raise UnfitPairError("there is no room beside the object")


@dataclass(frozen=True)
class Composites:
    """The endless dataset of either stage: item n follows from n alone."""

    sources: Sequence[tuple[Source, float]]
    """Data sets, and how often each is drawn from in relation to the others."""
    make: ViewMaker | CompositeMaker
    latent_shape: tuple[int, int, int]
    seed: int
    drop: float = 0.0
    """Probability that there is no reference, for classifier-free guidance."""
    empty: float = 0.0
    """Share of those in which there is no object either: the model is to continue the scene."""
    token_grid: int = 0
    """ID tokens per side of the reference, to give `matching_places` as well; 0 for none."""

    def draw(self, rng: Generator) -> tuple[Composite, bool]:
        """Draws a sample, and whether it is one without a reference.

        Raises:
            SourceError: see `draw_fit`.
        """
        dropped = bool(rng.random() < self.drop)
        hole = dropped and bool(rng.random() < self.empty)

        def make(source: Source, reference: Shot, target: Shot) -> Composite:
            return self.make(source, reference, target, rng, hole)

        return draw_fit(self.sources, make, rng), dropped

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Gives reference (3, 224, 224), picture (3, R, R), mask and counts (1, R, R), dropped, noises."""
        rng = np.random.default_rng([self.seed, number])
        composite, dropped = self.draw(rng)
        sample = {
            "reference": as_reference(composite.reference),
            "picture": composite.picture,
            "mask": composite.mask[None].astype(np.float32),
            "counts": composite.counts[None].astype(np.float32),
            "dropped": np.float32(dropped),
            "timestep": int(rng.integers(TRAIN_TIMESTEPS)),
        }
        for name in ("noise", "posterior_noise"):
            sample[name] = rng.standard_normal(self.latent_shape, np.float32)
        if self.token_grid:
            box = composite.box & (not dropped)
            sample["places"] = matching_places(box, self.latent_shape[-1], self.token_grid)
        return sample


def token_grid(token_count: int) -> int:
    """Computes the tokens per side of the reference from their number, the class token included."""
    return math.isqrt(token_count - 1)
