"""The set whose true pictures are known, and the measures of likeness."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.support.similarity import region_psnr, region_ssim, ssim_map
from benchmarks.support.truth_set import Picture, TruthPair, truth_pairs
from runtime.imaging.boxes import Box
from runtime.imaging.guess_background import guess_background
from training.data.synthetic.views import HELD_OUT

EVERYTHING = Box(0, 0, 24, 20)


@pytest.fixture(scope="module")
def pair() -> TruthPair:
    return next(truth_pairs(1))


def noise(seed: int) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)


def flat(value: int) -> Picture:
    return np.full((20, 24, 3), value, np.uint8)


def test_pairs_are_held_out_and_always_the_same(pair: TruthPair) -> None:
    again = next(truth_pairs(1))
    assert again.seed == pair.seed >= HELD_OUT
    assert np.array_equal(again.truth, pair.truth)
    assert np.array_equal(again.reference.image, pair.reference.image)


def test_the_box_holds_the_object_and_nothing_of_it_is_left(pair: TruthPair) -> None:
    inside = pair.target.mask > 128
    cropped = inside[pair.box.slices]
    assert cropped.sum() == inside.sum()
    for border in (cropped[0], cropped[-1], cropped[:, 0], cropped[:, -1]):
        assert border.any()
    assert not pair.emptied[inside].any()
    elsewhere = np.ones(inside.shape, bool)
    elsewhere[pair.hidden.slices] = False
    assert np.array_equal(pair.emptied[elsewhere], pair.truth[elsewhere])
    assert np.array_equal(pair.guessed[elsewhere], pair.truth[elsewhere])


def test_the_guessed_background_goes_from_side_to_side() -> None:
    ramp = np.tile(np.arange(40, 64, dtype=np.uint8)[None, :, None], (20, 1, 3))
    box = Box(8, 0, 15, 20)  # from the top to the bottom of the picture: only left and right are known
    holed = ramp.copy()
    holed[box.slices] = 0
    assert np.abs(guess_background(holed, box).astype(int) - ramp).max() <= 2
    assert np.array_equal(guess_background(flat(9), Box(3, 4, 10, 11)), flat(9))


def test_psnr_in_a_region() -> None:
    other = flat(100)
    other[2:4, 2:4] = 110
    # 4 of 16 pixels are off by 10: the mean square is 25
    assert region_psnr(other, flat(100), Box(0, 0, 4, 4)) == pytest.approx(10 * math.log10(255**2 / 25))
    assert region_psnr(other, flat(100), Box(4, 4, 8, 8)) == math.inf


def test_ssim_of_flat_pictures_is_that_of_their_lightness() -> None:
    c1 = (0.01 * 255) ** 2
    expected = (2 * 60 * 90 + c1) / (60**2 + 90**2 + c1)
    assert region_ssim(flat(60), flat(90), EVERYTHING) == pytest.approx(expected)


def test_ssim_is_the_formula_written_out() -> None:
    """One window in the middle of the picture, summed pixel by pixel."""
    x, y, row, column = noise(1), noise(2), 9, 12
    weights, total = {}, 0.0
    for i in range(-5, 6):
        for j in range(-5, 6):
            weights[i, j] = math.exp(-(i * i + j * j) / (2 * 1.5**2))
            total += weights[i, j]
    for channel in range(3):
        samples = [
            (w / total, float(x[row + i, column + j, channel]), float(y[row + i, column + j, channel]))
            for (i, j), w in weights.items()
        ]
        mean_x, mean_y = sum(w * a for w, a, _ in samples), sum(w * b for w, _, b in samples)
        var_x = sum(w * (a - mean_x) ** 2 for w, a, _ in samples)
        var_y = sum(w * (b - mean_y) ** 2 for w, _, b in samples)
        cov = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in samples)
        c1, c2 = 2.55**2, 7.65**2
        expected = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
        expected /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
        assert ssim_map(x, y)[row, column, channel] == pytest.approx(expected)


def test_ssim_orders_pictures_as_one_would() -> None:
    picture = noise(3)
    dimmed = (picture * 0.8).astype(np.uint8)
    values = [region_ssim(other, picture, EVERYTHING) for other in (picture, dimmed, noise(4), 255 - picture)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert region_ssim(noise(4), picture, EVERYTHING) == pytest.approx(
        region_ssim(picture, noise(4), EVERYTHING)
    )
