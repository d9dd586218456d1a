"""Pairs from several data sets: how often each is drawn from, by which rules, and what is passed over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import TINY
from training.data.mixture import Mixture
from training.data.pairs import PairRules, Shot
from training.data.sources import Source, SourceError
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.systems.anydoor import Denoising, DiffusionTask


class TwoDiscs(Source):
    """A data set of one object, which every third time has an empty mask."""

    kind = "video"

    def __len__(self) -> int:
        return 3

    def pair(self, index: int, rng: np.random.Generator) -> tuple[Shot, Shot]:
        row, column = np.mgrid[:48, :48]
        mask = (np.hypot(row - 24, column - 24) < 12) & (index > 0)
        images = rng.integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
        return Shot(images[0], mask), Shot(images[1], mask)


def test_a_mixture_is_trained_on(tmp_path: Path) -> None:
    pairs = Mixture([(TwoDiscs(tmp_path), 1.0)], PairRules(resolution=32), (4, 4, 4), drop=0.5)
    samples = [pairs[number] for number in range(12)]
    assert np.array_equal(samples[3]["hint"], pairs[3]["hint"])
    assert {bool(sample["reference"].any()) for sample in samples} == {True, False}
    torch.manual_seed(0)
    task = DiffusionTask(AnyDoor(TINY), pairs, Denoising())
    train(task, LoopSettings(steps=1, batch=2), tmp_path)
    assert (tmp_path / "mean.pt").exists()


class Counted(TwoDiscs):
    """Counts how often it is asked."""

    asked = 0

    def pair(self, index: int, rng: np.random.Generator) -> tuple[Shot, Shot]:
        self.asked += 1
        return super().pair(index, rng)


def test_data_sets_are_asked_as_often_as_they_weigh(tmp_path: Path) -> None:
    """Chi-square with two degrees of freedom; 13.8 is its 99.9 % quantile."""
    weights = np.array([6.0, 3.0, 1.0])
    sources = [Counted(tmp_path) for _ in weights]
    pairs = Mixture(list(zip(sources, weights, strict=True)), PairRules(resolution=8), (4, 1, 1))
    rng = np.random.default_rng(0)
    for _ in range(150):
        pairs.draw(rng)
    asked = np.array([source.asked for source in sources])
    expected = asked.sum() * weights / weights.sum()
    assert asked.sum() >= 150
    assert ((asked - expected) ** 2 / expected).sum() < 13.8


class Lopsided(TwoDiscs):
    """The object is a bar from edge to edge; the released code takes the set for another kind."""

    released_kind = "multi-view"

    def pair(self, index: int, rng: np.random.Generator) -> tuple[Shot, Shot]:
        mask = np.zeros((48, 48), bool)
        mask[16:32] = True
        return Shot(np.zeros((48, 48, 3), np.uint8), mask), Shot(np.zeros((48, 48, 3), np.uint8), mask)


def test_a_data_set_s_own_rules_are_followed(tmp_path: Path) -> None:
    source, rng = Lopsided(tmp_path), np.random.default_rng(0)
    for rule, kind in (("paper", "video"), ("code", "multi-view")):
        pairs = Mixture([(source, 1.0)], PairRules(resolution=8, timesteps=rule), (4, 1, 1))  # type: ignore[arg-type]
        source.either_side = True
        with pytest.raises(SourceError, match="more than 80% of its picture"):
            pairs.draw(rng)
        source.either_side = False
        assert pairs.draw(rng).kind == kind


def test_damaged_pairs_are_passed_over(tmp_path: Path) -> None:
    """Of three pairs one has no mask, and one a picture that is not as large as its mask."""

    class Damaged(TwoDiscs):
        def pair(self, index: int, rng: np.random.Generator) -> tuple[Shot, Shot]:
            reference, target = super().pair(index, rng)
            return (Shot(reference.image[:40], reference.mask) if index == 1 else reference), target

    pairs = Mixture([(Damaged(tmp_path), 1.0)], PairRules(resolution=8), (4, 1, 1))
    for number in range(10):
        assert pairs[number]["picture"].shape == (3, 8, 8)


def test_a_hopeless_mixture_says_why(tmp_path: Path) -> None:
    class Empty(TwoDiscs):
        def __len__(self) -> int:
            return 1

    pairs = Mixture([(Empty(tmp_path), 1.0)], PairRules(resolution=32), (4, 4, 4))
    with pytest.raises(SourceError, match=r"no fit pair.*mask covers 0\.0%"):
        pairs[0]
