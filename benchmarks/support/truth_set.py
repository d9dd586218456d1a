"""Held-out objects in held-out rooms, drawn by our own renderer: the true picture is known.

    for pair in truth_pairs(100):
        picture = compositor.composite(pair.guessed, pair.placement(), seed=7)
        region_ssim(np.asarray(picture), pair.truth, pair.box)

The pictures are computed from the numbers of objects and views: the set is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count as numbers

import numpy as np
from numpy.typing import NDArray

from benchmarks.support.baselines import empty_box, exact_box
from runtime import Placement
from runtime.imaging.boxes import Box
from runtime.imaging.geometry import Ratios, zoom_in
from runtime.imaging.guess_background import guess_background
from training.data.pairs import UnfitPairError, check_masks
from training.data.synthetic.views import HELD_OUT, VIEW_SIZE, View, reference_view, scene_view

Picture = NDArray[np.uint8]

OTHER_VIEWS = (1, 2)
"""Numbers of the views that are used for recognition alone; methods are given view 0."""

_INSIDE = 128


@dataclass(frozen=True, eq=False)
class TruthPair:
    """An object, a scene with a place for it, and the true picture of the scene with the object."""

    seed: int
    """Of the object."""
    reference: View
    """The object on black, from another side and in another light."""
    target: View
    """The object in the scene."""

    @property
    def truth(self) -> Picture:
        """The true picture, (S, S, 3) RGB."""
        return self.target.image

    @cached_property
    def box(self) -> Box:
        """The object's exact extent in the scene; the region in which pictures are compared."""
        return exact_box(self.target.mask)

    @cached_property
    def hidden(self) -> Box:
        """What the networks do not see of the scene: the box, enlarged by 1.1."""
        return zoom_in(self.box, self.target.mask.shape[::-1], Ratios()).box

    @cached_property
    def emptied(self) -> Picture:
        """The scene, black where it is hidden."""
        return empty_box(self.truth, self.hidden)

    @cached_property
    def guessed(self) -> Picture:
        """`emptied` with a guess of the background in the hidden part, blended from the colours around it."""
        return guess_background(self.emptied, self.hidden)

    def placement(self, mode: str | None = "keep_background") -> Placement:
        """Return the placement of the object in `guessed`; the networks see no more of it than `emptied`."""
        box = (self.box.x0, self.box.y0, self.box.x1, self.box.y1)
        return Placement(self.reference.image, self.reference.mask > _INSIDE, box=box, mode=mode)


def truth_pairs(count: int, size: int = VIEW_SIZE, first: int = HELD_OUT) -> Iterator[TruthPair]:
    """Yield the first `count` held-out objects whose masks pass the filters of training pairs.

    A box may take 0.88 of the side of its scene, a tenth more than in training. `size` is the side of scenes
    and references, in pixels; `first` the number of the first object.
    """
    found = 0
    for seed in numbers(first):
        if found == count:
            return
        pair = TruthPair(seed, reference_view(seed, 0, size), scene_view(seed, 0, size))
        try:
            check_masks(pair.reference.mask > _INSIDE, pair.target.mask > _INSIDE, largest_box=0.88)
        except UnfitPairError:
            continue
        found += 1
        yield pair


def other_views(seed: int) -> list[View]:
    """Return views of an object that no method was given: alone, and in other rooms."""
    alone = [reference_view(seed, number) for number in OTHER_VIEWS]
    return alone + [scene_view(seed, number) for number in OTHER_VIEWS]
