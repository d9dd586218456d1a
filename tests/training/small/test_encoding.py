"""Pairs that were encoded ahead are the pairs; those of other weights are refused elsewhere (test_train)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from benchmarks.seeded import TINY
from training.data.encoded import PACKED_INSIDE, PAIRS_DONE, EncodedPairs, pack_hint
from training.data.pairs import PairRules
from training.network.modules import AnyDoor
from training.small.encoding import encode_hints
from training.small.stored import StoredSamples

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


def check_batch(single: list[dict[str, Any]], batch: dict[str, torch.Tensor]) -> None:
    """Names, shapes and dtypes are those of the samples, stacked."""
    expected = default_collate(single)
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype), name


@pytest.mark.parametrize("ahead", [False, True], ids=["hints", "hint features"])
def test_a_batch_in_a_device_s_memory_has_the_same_pairs(encoded_folder: Path, ahead: bool) -> None:
    """Every item of it is that of one row; only the noises and timesteps are drawn differently."""
    if ahead:
        torch.manual_seed(0)
        encode_hints(AnyDoor(TINY).eval(), encoded_folder)
    hints = np.load(encoded_folder / "hints.npy")
    hints[:, 3] = 0
    hints[:2, 3, 8:40, 16:48] = PACKED_INSIDE  # the last one has no box
    np.save(encoded_folder / "hints.npy", hints)
    rules = PairRules(resolution=RESOLUTION, timesteps="paper")
    pairs = EncodedPairs(encoded_folder, 0, rules, 0.25, "video", hint_features=ahead, places=True)
    batch = pairs.batch(range(64, 464), torch.device("cpu"))
    singly = [pairs[number] for number in range(400)]
    check_batch(singly, batch)
    stored = np.load(encoded_folder / "features.npy")
    known = {sample["features"].tobytes(): sample for sample in singly}
    for index in range(400):
        same = known[batch["features"][index].numpy().tobytes()]
        if batch["features"][index].any():  # the features of a dropped one are black, its row is not known
            torch.testing.assert_close(batch["hint"][index], torch.from_numpy(same["hint"]))
        np.testing.assert_array_equal(batch["places"][index], same["places"])
    dropped = ~batch["features"].flatten(1).any(1)
    assert float(dropped.float().mean()) == pytest.approx(0.25, abs=0.08)
    row = torch.tensor([np.abs(stored - each.numpy()).sum((1, 2)).argmin() for each in batch["features"]])
    moments = torch.from_numpy(np.load(encoded_folder / "moments.npy"))
    mean, spread = moments[row[~dropped]].unbind(1)
    normal = (batch["latents"][~dropped] - mean) / spread
    for noise in (normal, batch["noise"]):
        assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 1), abs=0.02)
    again = pairs.batch(range(64, 464), torch.device("cpu"))
    assert all(torch.equal(value.nan_to_num(), again[name].nan_to_num()) for name, value in batch.items())


def test_a_batch_of_stored_samples_has_the_same_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"moments": (2, 4, 6, 6), "scene": (5, 6, 6), "places": (6, 6, 2)}
    for name, shape in shapes.items():
        np.save(tmp_path / f"{name}.npy", rng.random((3, *shape)).astype(np.float16))
    np.save(tmp_path / "counts.npy", rng.random((3, 1, 6, 6)) < 0.5)
    np.save(tmp_path / "dropped.npy", np.arange(3) == 1)
    np.save(tmp_path / "ids.npy", rng.integers(0, 99, (3, 77), np.int32))
    samples = StoredSamples(tmp_path, 0, rows=3)
    batch, singly = samples.batch(range(60), torch.device("cpu")), [samples[n] for n in range(60)]
    check_batch(singly, batch)
    rows = {sample["ids"].numpy().tobytes(): sample for sample in singly}
    for index in range(60):
        same = rows[batch["ids"][index].numpy().tobytes()]
        for name in (*shapes, "counts", "dropped"):
            assert torch.equal(batch[name][index], same[name])
    assert batch["timestep"].min() >= 0
    assert len(batch["timestep"].unique()) > 40
