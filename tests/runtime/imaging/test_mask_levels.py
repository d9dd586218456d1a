"""Mask levels: each holds all of the one before, and nothing beyond the box."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from runtime.errors import InputError
from runtime.imaging.boxes import Box, bounding_box, expand, mask_extent
from runtime.imaging.mask_levels import MASK_LEVELS, MaskLevel, check_mask_level, coarsen_mask

Mask = NDArray[np.bool_]


def ellipse(size: tuple[int, int], box: tuple[int, int, int, int]) -> Mask:
    canvas = Image.new("1", size)
    ImageDraw.Draw(canvas).ellipse(box, fill=1)
    return np.asarray(canvas)


def levels(mask: Mask, box: Box, spread: float = 1.0) -> list[Mask]:
    return [coarsen_mask(mask, level, box, spread) for level in MASK_LEVELS]


@st.composite
def masks(draw: st.DrawFn) -> tuple[Mask, Box]:
    """Ellipses, half of them with a hole or a piece apart, and the box around what is there."""
    width, height = draw(st.integers(12, 90)), draw(st.integers(12, 90))
    x0, y0 = draw(st.integers(0, width - 6)), draw(st.integers(0, height - 6))
    x1, y1 = draw(st.integers(x0 + 4, width - 1)), draw(st.integers(y0 + 4, height - 1))
    mask = ellipse((width, height), (x0, y0, x1, y1)).copy()
    if draw(st.booleans()):
        mask[draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] ^= True
    return mask, expand(mask_extent(mask), draw(st.sampled_from([1.0, 1.1, 1.5])), (width, height))


@given(masks(), st.floats(0.7, 1.3))
def test_each_level_holds_the_one_before(case: tuple[Mask, Box], spread: float) -> None:
    mask, box = case
    exact, outline, blob, whole = levels(mask, box, spread)
    assert np.array_equal(exact, mask)
    assert (exact <= outline).all()
    assert (outline <= blob).all()
    assert (blob <= whole).all()


@given(masks())
def test_no_level_goes_beyond_mask_and_box(case: tuple[Mask, Box]) -> None:
    mask, box = case
    allowed = mask.copy()
    allowed[box.slices] = True
    assert np.array_equal(coarsen_mask(mask, "box", box), allowed)
    for level in levels(mask, box):
        assert not (level & ~allowed).any()


@given(masks())
def test_a_mirrored_mask_gives_mirrored_levels(case: tuple[Mask, Box]) -> None:
    mask, box = case
    width = mask.shape[1]
    mirrored = Box(width - box.x1, box.y0, width - box.x0, box.y1)
    for one, other in zip(levels(mask, box), levels(mask[:, ::-1], mirrored), strict=True):
        assert (one[:, ::-1] != other).mean() < 0.02  # Pillow rounds each pass of its blur


@pytest.mark.parametrize(("most", "accuracy"), [(1 << 24, 2.5), (1 << 15, 5)], ids=["whole", "reduced"])
@pytest.mark.parametrize(("level", "reach"), [("outline", 0.026), ("blob", 0.132)])
def test_a_straight_edge_moves_by_the_quantile_of_the_gaussian(
    level: MaskLevel, reach: float, most: int, accuracy: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sigma times 1.28, where a tenth of the mask is left, and 1.64, where a twentieth is."""
    monkeypatch.setattr("runtime.imaging.mask_levels._MOST_BLURRED", most)
    mask = np.zeros((400, 1000), bool)
    mask[:, 300:700] = True
    coarse = coarsen_mask(mask, level, Box(0, 0, 1000, 400))
    grown = (np.count_nonzero(coarse[200]) - 400) / 2
    assert grown == pytest.approx(400 * reach, abs=accuracy)


def test_a_wider_spread_draws_a_coarser_outline() -> None:
    mask = ellipse((200, 200), (50, 60, 150, 140))
    areas = [coarsen_mask(mask, "blob", Box(0, 0, 200, 200), spread).sum() for spread in (0.7, 1.0, 1.3)]
    assert areas == sorted(set(areas))


def test_levels_have_names_and_numbers() -> None:
    assert [check_mask_level(number) for number in range(4)] == list(MASK_LEVELS)
    assert [check_mask_level(name) for name in MASK_LEVELS] == list(MASK_LEVELS)
    for level in (4, -1, 1.0, True, "Blob", "2", None, np.zeros(3)):
        with pytest.raises(InputError, match=r"choose one of 0 \(exact\), 1 \(outline\)"):
            check_mask_level(level)


def test_the_mask_itself_is_left_as_it_is() -> None:
    mask = ellipse((60, 40), (10, 10, 40, 30)).copy()
    before = mask.copy()
    levels(mask, Box(0, 0, 60, 40))
    assert np.array_equal(mask, before)


def test_a_box_is_itself_at_every_level() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[10:30, 5:25] = 1
    assert all(np.array_equal(level, mask == 1) for level in levels(mask, Box(5, 10, 25, 30)))


def written_out(mask: Mask, level: MaskLevel, box: Box) -> Mask:
    """A level as it is defined: the whole mask is blurred, and goes on beyond the picture."""
    box_of_it = bounding_box(mask)
    side = max(box_of_it.width, box_of_it.height)
    width, share = {"outline": (0.02, 0.1), "blob": (0.08, 0.05)}[level]
    frame = 4 * side
    picture = Image.fromarray(np.pad(mask.astype(np.uint8) * 255, frame, "edge"))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(width * side)))[frame:-frame, frame:-frame]
    inside = np.zeros(mask.shape, bool)
    inside[box.slices] = True
    return (blurred > 255 * share) & inside


@given(masks())
def test_blurring_around_the_object_alone_changes_nothing(case: tuple[Mask, Box]) -> None:
    mask, box = case
    outline, blob = (written_out(mask, level, box) for level in ("outline", "blob"))
    assert np.array_equal(coarsen_mask(mask, "outline", box), mask | outline)
    assert np.array_equal(coarsen_mask(mask, "blob", box), mask | outline | blob)


@pytest.mark.parametrize("level", ["outline", "blob", "box"])
def test_a_mask_as_long_as_a_panorama_is_reduced_before_it_is_blurred(level: MaskLevel) -> None:
    """Pillow would refuse what it would have to blur; a small copy of the mask has the same outline."""
    small, box = np.zeros((40, 1000), bool), Box(20, 0, 980, 40)
    small[10:30, 60:940] = True
    small[18:22, 400:600] = False
    coarse = coarsen_mask(small.repeat(20, 0).repeat(20, 1), level, Box(400, 0, 19600, 800))
    expected = coarsen_mask(small, level, box).repeat(20, 0).repeat(20, 1)
    assert (coarse != expected).mean() < 0.03
    assert not (small.repeat(20, 0).repeat(20, 1) & ~coarse).any()


@pytest.mark.parametrize("level", ["outline", "blob"])
@pytest.mark.parametrize("turns", range(4))
def test_an_object_that_the_border_cuts_off_has_the_same_outline_there(level: MaskLevel, turns: int) -> None:
    """Its outline is the one that it has within the picture."""
    whole = np.zeros((200, 200), bool)
    whole[:140, 60:140] = True  # a strip, which leaves the picture at the top
    coarse = coarsen_mask(np.rot90(whole, turns), level, Box(0, 0, 200, 200))
    coarse = np.rot90(coarse, -turns)
    assert (coarse[:60] == coarse[60]).all()
    assert coarse[60].sum() > 80
