"""Pairs that are encoded while a model trains: those that would be stored, each as often as asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.seeded import TINY
from training.data.encoded import EncodedPairs
from training.data.pairs import Pair, PairRules
from training.data.view_pairs import DrawnPairs
from training.network.modules import AnyDoor
from training.small.encoding import encode_hints, encode_pairs
from training.small.fresh_samples import FreshSamples

SIDE, CHUNK = 32, 4
CPU = torch.device("cpu")


class Noise(DrawnPairs):
    """Pairs of noise around a box, which are made faster than views are drawn."""

    def draw(self, numbers: Sequence[int]) -> list[Pair]:
        return [self._pair(np.random.default_rng([self.seed, number])) for number in numbers]

    def _pair(self, rng: np.random.Generator) -> Pair:
        hint = rng.uniform(-1, 1, (4, SIDE, SIDE)).astype(np.float32)
        hint[3] = 0
        hint[3, 8:24, 8:24] = 1
        picture = rng.uniform(-1, 1, (3, SIDE, SIDE)).astype(np.float32)
        kind = "image" if rng.random() < 0.5 else "multi-view"
        return Pair(rng.integers(0, 256, (224, 224, 3), np.uint8), hint, picture, 0, kind)  # type: ignore[arg-type]


NOISE = Noise(PairRules(resolution=SIDE, timesteps="paper"))


@pytest.fixture(scope="module")
def model() -> AnyDoor:
    torch.manual_seed(0)
    return AnyDoor(TINY).eval()


def fresh(model: AnyDoor, **changes: Any) -> FreshSamples:
    return FreshSamples(model, NOISE, 0, **{"chunk": CHUNK, **changes})


def pictures_of(batch: dict[str, Tensor]) -> list[bytes]:
    """What tells pairs apart."""
    return [features.numpy().tobytes() for features in batch["features"]]


@pytest.mark.parametrize("ahead", [False, True], ids=["hints", "hint features"])
def test_what_is_learned_is_what_would_be_stored(tmp_path: Path, model: AnyDoor, ahead: bool) -> None:
    encode_pairs(model, NOISE, tmp_path, count=CHUNK, batch=CHUNK)
    encode_hints(model, tmp_path)
    rules = {"drop": 0.25, "kind": "video", "hint_features": ahead, "places": True}
    stored = EncodedPairs(tmp_path, 0, NOISE.rules, **rules)  # type: ignore[arg-type]
    expected = stored.batch(range(64), CPU)
    found = fresh(model, repeats=16, **rules).batch(range(64), CPU)
    assert found.keys() == expected.keys()
    rows = dict(zip(pictures_of(expected), range(64), strict=True))
    assert len(rows) == CHUNK + 1  # and the black one
    for name, values in found.items():
        assert (values.shape[1:], values.dtype) == (expected[name].shape[1:], expected[name].dtype)
    black = torch.from_numpy(np.load(tmp_path / "black.npy")).float().numpy().tobytes()
    for number, picture in enumerate(pictures_of(found)):
        row = rows[picture]
        if picture != black:  # a black reference may be that of any pair
            assert torch.equal(found["hint"][number], expected["hint"][row])
        np.testing.assert_array_equal(found["places"][number], expected["places"][row])


def test_every_pair_is_learned_from_as_often_as_asked_for(model: AnyDoor) -> None:
    samples = fresh(model, repeats=3)
    rounds = [pictures_of(samples.batch(range(start, start + CHUNK), CPU)) for start in range(0, 24, CHUNK)]
    assert [len(set(each)) for each in rounds] == [CHUNK] * 6
    assert set(rounds[0]) == set(rounds[1]) == set(rounds[2])
    assert set(rounds[3]) == set(rounds[4]) == set(rounds[5])
    assert not set(rounds[0]) & set(rounds[3])
    assert len({tuple(each) for each in rounds}) > 2  # in other orders


def test_which_pair_is_a_sample_does_not_depend_on_the_batch(model: AnyDoor) -> None:
    whole = pictures_of(fresh(model, repeats=2).batch(range(12), CPU))
    samples = fresh(model, repeats=2)
    parts = (pictures_of(samples.batch(range(start, start + 3), CPU)) for start in range(0, 12, 3))
    assert list(chain.from_iterable(parts)) == whole


def test_a_training_that_goes_on_sees_what_it_would_have_seen(model: AnyDoor) -> None:
    samples = fresh(model, repeats=2)
    through = [samples.batch(range(start, start + 3), CPU) for start in range(0, 18, 3)]
    resumed = fresh(model, repeats=2)
    for number in (4, 5):
        again = resumed.batch(range(3 * number, 3 * number + 3), CPU)
        assert all(torch.equal(values, through[number][name]) for name, values in again.items())


@pytest.mark.slow
def test_other_processes_draw_the_same_pairs(model: AnyDoor) -> None:
    alone, together = (fresh(model, repeats=2, workers=workers) for workers in (0, 2))
    # the second chunk is encoded while the first is learned from; then on, and from somewhere else
    for start in (0, 3, 6, 9, 30, 33, 12):
        expected, found = (samples.batch(range(start, start + 3), CPU) for samples in (alone, together))
        assert all(torch.equal(values, found[name]) for name, values in expected.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_other_processes_draw_on_a_card() -> None:
    torch.manual_seed(0)
    card, model = torch.device("cuda"), AnyDoor(TINY).eval()
    pairs = DrawnPairs(NOISE.rules, device=card)
    batches = [FreshSamples(model, pairs, 0, workers=2, chunk=CHUNK).batch(range(9), card) for _ in range(2)]
    for name, values in batches[0].items():
        assert values.device.type == "cuda"
        assert torch.equal(values, batches[1][name])
