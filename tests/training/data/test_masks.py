"""Masks: their pieces, and rough shapes as a user would draw them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.shapes import disc
from training.data.masks import grow, largest_piece, perturb_mask, shrink


def test_largest_piece() -> None:
    two = disc(radius=10, centre=20) | disc(radius=5, centre=60)
    assert largest_piece(two) == pytest.approx(disc(radius=10, centre=20).sum() / two.sum())
    assert largest_piece(disc()) == 1.0
    assert largest_piece(np.zeros((5, 5), bool)) == 0.0
    spiral = np.array([[1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], bool)
    assert largest_piece(spiral) == 1.0


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 0.99))
def test_a_perturbed_mask_overlaps_as_told(seed: int, overlap: float) -> None:
    mask = disc(40, 11, 20)
    rough = perturb_mask(mask, overlap, np.random.default_rng(seed))
    assert rough.shape == mask.shape
    assert rough.dtype == bool
    assert rough.any()


def test_perturbed_masks_reach_low_overlaps() -> None:
    mask = disc(40, 11, 20)
    roughs = [perturb_mask(mask, 0.6, np.random.default_rng(seed)) for seed in range(20)]
    overlaps = [(rough & mask).sum() / (rough | mask).sum() for rough in roughs]
    assert np.mean(np.array(overlaps) < 0.6) > 0.9


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(1, 7))
def test_growing_and_shrinking_look_at_every_neighbour(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 20, 2)) < 0.3
    rows, columns = mask.shape
    larger, smaller = grow(mask, height, width), shrink(mask, height)
    for y in range(rows):
        for x in range(columns):
            near = mask[max(y - height // 2, 0) : y + (height + 1) // 2]
            assert larger[y, x] == near[:, max(x - width // 2, 0) : x + (width + 1) // 2].any()
            around = mask[max(y - height, 0) : y + height + 1, max(x - height, 0) : x + height + 1]
            assert smaller[y, x] == around.all()
