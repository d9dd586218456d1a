"""Image pairs: geometry, masks and timesteps of section 3.4."""

from __future__ import annotations

import numpy as np
import pytest

from runtime.imaging.geometry import Ratios, zoom_in
from tests.support.shapes import disc
from training.data.encoded import pack_hint, unpack_hint
from training.data.pairs import (
    Kind,
    PairRules,
    Shot,
    TimestepRule,
    UnfitPairError,
    augment_reference,
    check_masks,
    make_pair,
    sample_timestep,
    target_shape,
)

RULES = PairRules(resolution=64)


def shot(mask: np.ndarray | None = None, seed: int = 0) -> Shot:  # type: ignore[type-arg]
    mask = disc() if mask is None else mask
    image = np.random.default_rng(seed).integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
    return Shot(image, mask)


def test_a_pair_has_the_network_s_shapes_and_ranges() -> None:
    pair = make_pair(shot(), shot(seed=1), "video", RULES, np.random.default_rng(0))
    assert pair.reference.shape == (224, 224, 3)
    assert pair.reference.dtype == np.uint8
    assert pair.hint.shape == (4, 64, 64)
    assert pair.picture.shape == (3, 64, 64)
    assert np.abs(pair.picture).max() <= 1
    assert set(np.unique(pair.hint[3])) <= {-1.0, 0.0, 1.0}


def test_the_same_generator_gives_the_same_pair() -> None:
    first, second = (
        make_pair(shot(), shot(seed=1), "video", RULES, np.random.default_rng(3)) for _ in range(2)
    )
    assert np.array_equal(first.hint, second.hint)
    assert first.timestep == second.timestep


def test_the_scene_around_the_box_is_in_hint_and_picture() -> None:
    rules = PairRules(resolution=64, box_masks=1.0, flip=0.0, brighten=0.0)
    pair = make_pair(shot(), shot(seed=1), "image", rules, np.random.default_rng(0))
    outside = pair.hint[3] < 0.5
    # two pixels around the box are a mixture of both, by resizing
    same = np.abs(pair.hint[:3] - pair.picture).max(0) < 1e-6
    assert same[outside].mean() > 0.85
    inside = pair.hint[3] > 0.5
    assert same[inside].mean() < 0.1


@pytest.mark.parametrize(
    ("reference", "target", "text"),
    [
        (np.zeros((80, 80), bool), disc(), "reference's mask covers"),
        (disc(), disc(radius=3), "target's mask covers"),
        (disc(), disc(radius=45), "target's mask covers"),
        (disc(), disc(radius=8, centre=12) | disc(radius=8, centre=60), "in pieces"),
        (disc(), disc(radius=33.5), "more than 80%"),
    ],
)
def test_bad_masks_are_refused(reference, target, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UnfitPairError, match=text):
        make_pair(shot(reference), shot(target), "image", RULES, np.random.default_rng(0))


def test_clothes_may_fill_the_picture() -> None:
    for either_side in (False, True):
        make_pair(shot(), shot(disc(radius=33.5)), "try-on", RULES, np.random.default_rng(0), either_side)


def rectangle(height: int, width: int) -> np.ndarray:  # type: ignore[type-arg]
    """A mask of 100 x 100 with a rectangle in its middle."""
    mask = np.zeros((100, 100), bool)
    y, x = (100 - height) // 2, (100 - width) // 2
    mask[y : y + height, x : x + width] = True
    return mask


@pytest.mark.parametrize(
    ("reference", "target", "text"),
    [
        (rectangle(60, 6), rectangle(40, 40), "less than a tenth"),
        (rectangle(6, 60), rectangle(40, 40), "less than a tenth"),
        (rectangle(40, 40), rectangle(30, 100), "more than 80%"),
        (rectangle(40, 40), rectangle(100, 30), "more than 80%"),
        # 76 pixels, enlarged by 1.1, are 83
        (rectangle(40, 40), rectangle(30, 76), "more than 80%"),
    ],
)
def test_one_side_out_of_size_is_enough_where_either_counts(reference, target, text) -> None:  # type: ignore[no-untyped-def]
    check_masks(reference, target, 0.8)
    with pytest.raises(UnfitPairError, match=text):
        check_masks(reference, target, 0.8, either_side=True)
    with pytest.raises(UnfitPairError, match=text):
        make_pair(shot(reference), shot(target), "video", RULES, np.random.default_rng(0), either_side=True)


def test_sizes_are_measured_as_the_original_does() -> None:
    """Of the reference the last row less the first, of the target the box enlarged by 1.1 and cut short."""
    fit = rectangle(40, 40)
    check_masks(rectangle(60, 11), fit, 0.8, either_side=True)
    with pytest.raises(UnfitPairError):
        check_masks(rectangle(60, 10), fit, 0.8, either_side=True)
    check_masks(fit, rectangle(72, 72), 0.8, either_side=True)
    with pytest.raises(UnfitPairError):
        check_masks(fit, rectangle(76, 76), 0.8)
    check_masks(rectangle(10, 10) | rectangle(12, 8), fit, 0.8)


@pytest.mark.parametrize("which", ["reference", "target"])
def test_a_picture_and_a_mask_of_different_size_are_refused(which: str) -> None:
    shots = {"reference": shot(), "target": shot(seed=1)}
    # as large, but lying on its side; and one that merely lacks a row
    for cut in (np.s_[:, :40], np.s_[:-1]):
        damaged = shots | {which: Shot(shots[which].image[cut], shots[which].mask)}
        with pytest.raises(UnfitPairError, match=f"picture and mask of the {which}"):
            make_pair(damaged["reference"], damaged["target"], "video", RULES, np.random.default_rng(0))


def test_mirroring_takes_picture_and_mask_together() -> None:
    reference = shot(disc(centre=30.0))
    mirrored = augment_reference(reference, PairRules(flip=1.0, brighten=0.0), np.random.default_rng(0))
    assert np.array_equal(mirrored.image, reference.image[:, ::-1])
    assert np.array_equal(mirrored.mask, reference.mask[:, ::-1])


def test_the_share_of_box_masks() -> None:
    """Boxes come with the probability that is asked for: 400 draws, five standard deviations."""
    mask, rng = disc(24, 6, 12), np.random.default_rng(0)
    geometry = zoom_in(mask, (24, 24), Ratios())
    box = target_shape(mask, geometry, 1.0, rng)
    filled = np.mean([np.array_equal(target_shape(mask, geometry, 0.3, rng), box) for _ in range(400)])
    assert abs(filled - 0.3) < 5 * 0.023


# probabilities of timesteps below 500, from the formulas in sample_timestep's docstring
EXPECTED: dict[tuple[Kind, TimestepRule], float] = {
    ("video", "code"): 0.15,
    ("image", "code"): 0.85,
    ("multi-view", "code"): 0.5,
    ("try-on", "code"): 0.5,
    ("video", "paper"): 0.25,
    ("image", "paper"): 0.75,
    ("multi-view", "paper"): 0.5,
    ("video", "uniform"): 0.5,
    ("image", "uniform"): 0.5,
}


@pytest.mark.parametrize(("kind", "rule"), EXPECTED)
def test_timesteps_follow_their_distribution(kind: Kind, rule: TimestepRule) -> None:
    """Chi-square over 20 bins of 50 timesteps; 43.8 is its 99.9 % quantile with 19 degrees of freedom."""
    rng = np.random.default_rng(5)
    count = 20000
    drawn = np.array([sample_timestep(kind, rule, rng) for _ in range(count)])
    low = EXPECTED[kind, rule]
    expected = np.repeat([low / 10, (1 - low) / 10], 10) * count
    observed = np.bincount(drawn // 50, minlength=20)
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    assert ((observed - expected) ** 2 / expected).sum() < 43.8


def test_hints_are_packed_without_loss() -> None:
    pair = make_pair(shot(), shot(seed=1), "video", RULES, np.random.default_rng(0))
    assert np.array_equal(unpack_hint(pack_hint(pair.hint))[3], pair.hint[3])
    np.testing.assert_allclose(unpack_hint(pack_hint(pair.hint)), pair.hint, atol=1e-6)
