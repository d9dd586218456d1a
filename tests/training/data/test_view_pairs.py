"""Pairs whose views are drawn for them: pair n follows from n, and none is unfit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from training.data import view_pairs
from training.data.pairs import Pair, PairRules, UnfitPairError, make_pair
from training.data.synthetic.views import HELD_OUT
from training.data.view_pairs import OBJECTS, VIEWS, DrawnPairs

PAIRS = DrawnPairs(PairRules(resolution=32), seed=1, single=0.4)


def test_a_pair_is_the_same_alone_and_among_others() -> None:
    together = PAIRS.__getitems__([3, 1, 2])
    for number, pair in zip([3, 1, 2], together, strict=True):
        alone = PAIRS[number]
        assert alone.keys() == pair.keys()
        for name, value in alone.items():
            np.testing.assert_array_equal(pair[name], value)
    assert len({pair["picture"].tobytes() for pair in together}) == 3


def test_other_seeds_give_other_pairs() -> None:
    one, other = (replace(PAIRS, seed=seed)[0] for seed in (1, 2))
    assert not np.array_equal(one["picture"], other["picture"])


def test_one_view_twice_is_a_single_picture() -> None:
    """As many as the rules say, and no reference is drawn for them."""
    drawn = PAIRS.draw(range(8))
    assert {pair.kind for pair in drawn} == {"image", "multi-view"}
    assert all(pair.kind == "image" for pair in replace(PAIRS, single=1.0).draw(range(2)))


def test_an_unfit_pair_is_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def refuses_two(reference: Any, target: Any, *rest: Any) -> Pair:
        tried.append(target.image.tobytes())
        if len(tried) <= 2:
            raise UnfitPairError("too small")
        return make_pair(reference, target, *rest)

    monkeypatch.setattr(view_pairs, "make_pair", refuses_two)
    assert len(PAIRS.draw([0, 1])) == 2
    assert len(set(tried)) >= 4  # other objects the second time


def test_no_object_is_held_out() -> None:
    """Nor is one that stands around: its seed is that of the object and the view, and half of `HELD_OUT`."""
    assert OBJECTS + VIEWS + HELD_OUT // 2 < HELD_OUT
