"""Samples of IMPRINT's two stages: what is known, what is to be drawn, and what follows from a number."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.random import Generator

from runtime.imaging.boxes import SMALLEST_MASK_AREA, Box
from runtime.imaging.geometry import Ratios, zoom_in
from runtime.imaging.mask_levels import MASK_LEVELS, coarsen_mask
from tests.runtime.imaging.test_mask_levels import ellipse
from training.data.augment import Augmentation
from training.data.composites import SPREADS, Composite, CompositeMaker, Composites, ViewMaker, beside
from training.data.pairs import CommonRules, Shot, UnfitPairError
from training.data.sources import Source, SourceError

SIDE = 64
RULES = CommonRules(resolution=SIDE, flip=0.0, brighten=0.0)
NO_CHANGE = Augmentation(rotation=0.0, perspective=0.0, colour=0.0)


class Pictures(Source):
    """Two pictures of one object: random pixels, and ellipses."""

    kind = "multi-view"

    def __init__(self, box: tuple[int, int, int, int] = (50, 30, 90, 70)) -> None:
        super().__init__(Path())
        self.box = box

    def __len__(self) -> int:
        return 5

    def pair(self, index: int, rng: Generator) -> tuple[Shot, Shot]:
        image = np.random.default_rng(index).integers(0, 256, (100, 160, 3), np.uint8)
        return Shot(image, ellipse((160, 100), (40, 20, 80, 80))), Shot(image, ellipse((160, 100), self.box))


def composite(seed: int, source: Source | None = None, hole: bool = False) -> Composite:
    source, rng = source or Pictures(), np.random.default_rng(seed)
    return CompositeMaker(RULES, NO_CHANGE)(source, *source.pair(0, rng), rng, hole)


def samples(**changes: object) -> Composites:
    return replace(
        Composites([(Pictures(), 1.0)], CompositeMaker(RULES, NO_CHANGE), (4, 8, 8), seed=1), **changes
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_scene_is_the_picture_with_grey_where_the_mask_is(seed: int) -> None:
    made = composite(seed)
    assert not made.scene[:, made.mask].any()
    assert np.array_equal(made.scene[:, ~made.mask], made.picture[:, ~made.mask])


@pytest.mark.parametrize("seed", range(6))
def test_beyond_the_scene_all_is_drawn_and_nothing_counts(seed: int) -> None:
    """The crop of an object in a corner reaches far beyond the picture, which is wider than high."""
    made = composite(seed, Pictures((0, 0, 100, 60)))
    beyond = made.mask & ~made.counts
    assert beyond.any()
    assert not made.picture[:, beyond].any()
    assert (made.counts <= made.mask).all()


def test_every_mask_level_is_drawn() -> None:
    areas = {round(float(composite(seed).counts.sum() / composite(seed).box.sum()), 1) for seed in range(24)}
    assert max(areas) == 1.0  # the box
    assert min(areas) < 0.9  # the ellipse


@pytest.mark.parametrize("box", [(50, 30, 90, 70), (30, 15, 130, 85)])
@pytest.mark.parametrize("seed", range(6))
def test_a_hole_shows_nothing_of_the_object_however_coarse_its_mask_is(
    seed: int, box: tuple[int, int, int, int]
) -> None:
    """Not even of an object that has room in no other place of its picture, unless the hole is smaller."""
    mask, ratios = ellipse((160, 100), box), Ratios(box=1.1)
    hole = beside(mask, ratios.box, np.random.default_rng(seed))
    assert SMALLEST_MASK_AREA <= hole.sum() <= mask.sum()
    place = zoom_in(hole, (160, 100), ratios).box
    for level in MASK_LEVELS:
        assert not (coarsen_mask(hole, level, place, max(SPREADS)) & mask).any()


def test_where_there_is_no_room_another_picture_is_taken() -> None:
    with pytest.raises(UnfitPairError, match="no room beside the object"):
        beside(np.ones((60, 60), bool), 1.1, np.random.default_rng(0))


def test_a_view_is_drawn_on_white_and_wholly() -> None:
    rng, source = np.random.default_rng(0), Pictures()
    made = ViewMaker(RULES)(source, *source.pair(0, rng), rng, hole=False)
    assert made.mask.all()
    assert made.counts.all()
    assert not made.scene.any()
    assert (made.picture[:, 0] == 1).all()  # the room around the object
    assert (made.picture[:, SIDE // 2, SIDE // 2] != 1).any()


def test_a_mask_of_another_size_is_refused() -> None:
    wrong = Shot(np.zeros((10, 10, 3), np.uint8), np.ones((9, 10), bool))
    for maker in (ViewMaker(RULES), CompositeMaker(RULES)):
        with pytest.raises(UnfitPairError, match="are not of one"):
            maker(Pictures(), wrong, wrong, np.random.default_rng(0), False)


def test_an_item_follows_from_its_number() -> None:
    first, again, other = samples()[7], samples()[7], samples()[8]
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["noise"], other["noise"])
    assert {name: np.shape(value) for name, value in first.items()} == {
        "reference": (3, 224, 224),
        "picture": (3, SIDE, SIDE),
        "mask": (1, SIDE, SIDE),
        "counts": (1, SIDE, SIDE),
        "dropped": (),
        "timestep": (),
        "noise": (4, 8, 8),
        "posterior_noise": (4, 8, 8),
    }


def test_references_are_dropped_as_often_as_asked() -> None:
    dropped = [samples(drop=0.25).draw(np.random.default_rng([1, number]))[1] for number in range(200)]
    assert 0.15 < np.mean(dropped) < 0.35


def test_half_of_those_without_a_reference_show_no_object() -> None:
    """The object is in the middle of its crop, unless what is drawn is a hole beside it."""
    same = samples(
        drop=1.0, empty=1.0, make=CompositeMaker(replace(RULES, crop_ratios=(1.3, 1.3)), NO_CHANGE)
    )
    holes = [same.draw(np.random.default_rng([1, number]))[0].picture for number in range(3)]
    usual = [
        replace(same, empty=0.0).draw(np.random.default_rng([1, number]))[0].picture for number in range(3)
    ]
    assert not any(np.array_equal(one, other) for one, other in zip(holes, usual, strict=True))


def test_places_are_known_in_the_object_s_box_alone() -> None:
    whole = samples(token_grid=16, make=CompositeMaker(replace(RULES, crop_ratios=(2.0, 2.0)), NO_CHANGE))
    places = whole[0]["places"]
    assert places.shape == (8, 8, 2)
    assert 0 < np.isfinite(places[..., 0]).sum() < 64
    assert not np.isfinite(replace(whole, drop=1.0)[0]["places"]).any()


def test_what_is_never_fit_is_told() -> None:
    with pytest.raises(SourceError, match="no fit pair in 100 attempts"):
        samples(sources=[(Pictures((0, 0, 3, 3)), 1.0)])[0]


def test_boxes_are_boxes() -> None:
    rows, columns = np.nonzero(composite(0).box)
    box = Box(columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert box.width * box.height == composite(0).box.sum()


def test_references_lie_on_the_background_that_the_network_is_trained_with() -> None:
    for maker in (ViewMaker(RULES, background=0), CompositeMaker(RULES, NO_CHANGE, background=0)):
        source, rng = Pictures(), np.random.default_rng(0)
        made = maker(source, *source.pair(0, rng), rng, hole=False)
        assert not made.reference[[0, -1]].any()
