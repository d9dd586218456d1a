"""IMPRINT's changes of shape and colour: what no change leaves, and what a change may not do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from training.data.augment import (
    LUT_NODES,
    Augmentation,
    augment_object,
    homography,
    random_lut,
    transform_object,
)
from training.data.pairs import Shot

NO_CHANGE = Augmentation(rotation=0.0, perspective=0.0, colour=0.0)


def shot() -> Shot:
    """A red upper and a blue lower half, 40 x 30, in a green picture."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[..., 1] = 200
    image[10:25, 20:60], image[25:40, 20:60] = (220, 30, 30), (30, 30, 220)
    mask = np.zeros((60, 80), bool)
    mask[10:40, 20:60] = True
    return Shot(image, mask)


def test_no_change_is_the_object_in_its_box() -> None:
    changed = augment_object(shot(), NO_CHANGE, np.random.default_rng(0))
    # the last row and column are outside of the box, as the original's boxes are
    assert np.array_equal(changed.image, shot().image[10:39, 20:59])
    assert changed.mask.all()


@given(st.integers(0, 2**32 - 1))
def test_a_homography_takes_four_points_to_four_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = np.array([[0, 0], [40, 0], [40, 30], [0, 30]], float)
    moved = corners + rng.uniform(-8, 8, (4, 2))
    a, b, c, d, e, f, g, h = homography(moved, corners)
    x, y = moved.T
    found = np.stack([a * x + b * y + c, d * x + e * y + f], 1) / (g * x + h * y + 1)[:, None]
    np.testing.assert_allclose(found, corners, atol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_a_turned_object_keeps_its_area(seed: int) -> None:
    turned = transform_object(shot(), Augmentation(perspective=0.0), np.random.default_rng(seed))
    assert turned.mask.sum() == pytest.approx(39 * 29, rel=0.05)
    assert turned.image.shape[:2] == turned.mask.shape


def test_a_quarter_turn_stands_the_object_on_its_side() -> None:
    rules = Augmentation(rotation=90.0, perspective=0.0)

    class Most:
        def uniform(self, low: float, high: float) -> float:
            return high

        def random(self) -> float:
            return 1.0

    turned = transform_object(shot(), rules, Most())  # type: ignore[arg-type]
    assert turned.mask.shape == (39, 29)
    # clockwise, as rows count downwards: what was above is on the right
    assert turned.image[20, -4, 0] > 200
    assert turned.image[20, 3, 2] > 200


def test_moved_corners_move_the_object_s_outline() -> None:
    rules = Augmentation(rotation=0.0, perspective=1.0, corners=(0.1, 0.1))
    shapes = {transform_object(shot(), rules, np.random.default_rng(seed)).mask.shape for seed in range(6)}
    assert len(shapes) > 1


# --- colours ----------------------------------------------------------------------------------------------


def test_a_table_of_strength_0_changes_nothing() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    table = ImageFilter.Color3DLUT(LUT_NODES, random_lut(np.random.default_rng(1), 0.0).ravel())
    changed = np.asarray(Image.fromarray(colours).filter(table))
    assert np.abs(changed.astype(int) - colours).max() <= 1


@given(st.integers(0, 2**32 - 1))
def test_grey_stays_in_order_and_in_range(seed: int) -> None:
    """A brighter grey never becomes a darker one."""
    table = random_lut(np.random.default_rng(seed))
    assert table.shape == (LUT_NODES,) * 3 + (3,)
    assert 0 <= table.min() <= table.max() <= 1
    greys = table[range(LUT_NODES), range(LUT_NODES), range(LUT_NODES)] @ [0.299, 0.587, 0.114]
    assert (np.diff(greys) >= -1e-9).all()


def test_red_is_the_table_s_last_axis() -> None:
    """Pillow counts it first, so it changes fastest."""
    table = random_lut(np.random.default_rng(0), 0.0)
    assert table[0, 0, -1].tolist() == pytest.approx([1, 0, 0])
    assert table[-1, 0, 0].tolist() == pytest.approx([0, 0, 1])


def test_colours_change_and_shape_does_not() -> None:
    rules = Augmentation(rotation=0.0, perspective=0.0)
    changed = augment_object(shot(), rules, np.random.default_rng(3))
    assert changed.mask.all()
    assert np.abs(changed.image.astype(int) - shot().image[10:39, 20:59]).mean() > 3
