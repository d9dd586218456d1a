"""Which part of the reference belongs to a cell of the latent."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.shapes import box_mask
from training.data.matching_places import matching_places


def test_the_middle_of_the_box_is_the_middle_of_the_reference() -> None:
    places = matching_places(box_mask(96, (20, 76), (32, 64)), cells=12, tokens=16)
    middle = places[5:7, 5:7].mean((0, 1))
    np.testing.assert_allclose(middle, [8, 8], atol=1e-5)


def test_the_object_s_edges_are_its_edges() -> None:
    """The box is 1.1 times as large as the object, the reference 1.2 times as large as its object."""
    side, cells = 96, 96  # a cell per pixel
    places = matching_places(box_mask(side, (4, 92), (26, 70)), cells, tokens=16)
    top = 48 - 88 / 1.1 / 2
    expected = 8 - 16 / 1.2 / 2
    at_top = np.interp(top, np.arange(4, 92) + 0.5, places[4:92, 48, 0])
    assert at_top == pytest.approx(expected, abs=1e-3)
    # the same scale across, for a box half as wide
    assert np.nanmax(places[48, :, 1]) - np.nanmin(places[48, :, 1]) == pytest.approx(
        16 / 1.2 * 43 / 80, rel=1e-3
    )


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((96, 96), bool),
        box_mask(96, (0, 50), (20, 60)),
        box_mask(96, (20, 60), (40, 96)),
        np.tril(box_mask(96, (20, 60), (20, 60))),
    ],
    ids=["nothing", "cut above", "cut on the right", "a shape"],
)
def test_places_are_unknown_where_the_box_is(mask: np.ndarray) -> None:
    assert np.isnan(matching_places(mask, 12, 16)).all()


def test_places_are_unknown_outside_the_box() -> None:
    places = matching_places(box_mask(96, (24, 72), (16, 80)), 12, 16)
    known = np.isfinite(places).all(2)
    assert known.sum() == 6 * 8
    assert known[3:9, 2:10].all()
