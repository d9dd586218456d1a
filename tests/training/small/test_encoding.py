"""Pairs that were encoded ahead are the pairs; those of other weights are refused elsewhere (test_train)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.seeded import TINY
from training.data.encoded import PAIRS_DONE, EncodedPairs, pack_hint
from training.data.pairs import PairRules
from training.network.modules import AnyDoor
from training.small.encoding import encode_hints

RESOLUTION, PAIRS = 64, 3


@pytest.fixture
def encoded_folder(tmp_path: Path) -> Path:
    rng, side = np.random.default_rng(0), RESOLUTION // 8
    hints = rng.uniform(-1, 1, (PAIRS, 4, RESOLUTION, RESOLUTION)).astype(np.float32)
    hints[:, 3] = np.rint(hints[:, 3])
    np.save(tmp_path / "hints.npy", np.stack([pack_hint(hint) for hint in hints]))
    np.save(tmp_path / "features.npy", rng.standard_normal((PAIRS, 5, TINY.dino_width), np.float32))
    np.save(tmp_path / "black.npy", np.zeros((5, TINY.dino_width), np.float32))
    np.save(tmp_path / "moments.npy", rng.random((PAIRS, 2, TINY.latent_channels, side, side), np.float32))
    np.save(tmp_path / "single.npy", np.arange(PAIRS) == 1)
    (tmp_path / PAIRS_DONE).write_text(str(PAIRS))
    return tmp_path


@torch.no_grad()
def test_hints_encoded_ahead_are_hints(encoded_folder: Path) -> None:
    """Only the half precision that they are stored in distinguishes them from whole hints."""
    torch.manual_seed(0)
    model = AnyDoor(TINY).eval()
    encode_hints(model, encoded_folder, batch=2)
    whole = EncodedPairs(encoded_folder, 0, PairRules(resolution=RESOLUTION))
    ahead = EncodedPairs(encoded_folder, 0, PairRules(resolution=RESOLUTION), hint_features=True)
    for number in range(4):
        first, second = whole[number], ahead[number]
        assert first.keys() == second.keys()
        for name in first.keys() - {"hint"}:
            np.testing.assert_array_equal(first[name], second[name])
        timestep, tokens = torch.tensor([first["timestep"]]), torch.randn(1, 5, TINY.token_width)
        maps = [
            model.control(torch.from_numpy(sample["hint"])[None], timestep, tokens)
            for sample in (first, second)
        ]
        for expected, found in zip(*maps, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_one_picture_twice_counts_as_an_image_and_two_as_frames(encoded_folder: Path) -> None:
    """A video prefers noisy timesteps and an image clean ones: 0.85 of either under the code's rule."""
    pairs = EncodedPairs(encoded_folder, 0, PairRules(resolution=RESOLUTION, timesteps="code"), kind="video")
    means = np.load(encoded_folder / "features.npy")
    noisy: dict[bool, list[bool]] = {True: [], False: []}
    for number in range(600):
        sample = pairs[number]
        single = np.array_equal(sample["features"], means[1])
        noisy[single].append(sample["timestep"] >= 500)
    assert np.mean(noisy[False]) == pytest.approx(0.85, abs=0.07)
    assert np.mean(noisy[True]) == pytest.approx(0.15, abs=0.07)
