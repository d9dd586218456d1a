"""Showing cross-attention where to look: places are right, the network stays the same, and it learns to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tiny import TINY, RandomPairs
from training.loop import LoopSettings, train
from training.network.modules import AnyDoor
from training.small.attention_guide import matching_places
from training.systems.anydoor import Denoiser, Denoising, DiffusionTask

pytestmark = pytest.mark.usefixtures("one_thread")


def box_mask(side: int, rows: tuple[int, int], columns: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[slice(*rows), slice(*columns)] = True
    return mask


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


@torch.no_grad()
def test_a_guided_network_computes_the_same() -> None:
    torch.manual_seed(0)
    model = AnyDoor(TINY)
    batch = (
        torch.randn(2, 4, 4, 4),
        torch.tensor([3, 800]),
        torch.randn(2, 257, 64),
        torch.rand(2, 4, 32, 32),
    )
    estimate, nothing = Denoiser(model)(*batch)
    places = torch.full((2, 4, 4, 2), float("nan"))
    unguided, no_place = Denoiser(model, guided=True)(*batch, places)
    torch.testing.assert_close(unguided, estimate, rtol=1e-4, atol=1e-5)
    assert float(nothing) == float(no_place) == 0
    places[0, :2, 2:] = torch.tensor([3.0, 9.0])  # one cell of the level that attends
    _, off = Denoiser(model, guided=True)(*batch, places)
    # fresh attention looks everywhere
    assert float(off) == pytest.approx(np.log(257), rel=0.15)


class PlacedPairs(RandomPairs):
    """With tokens that tell their place, and cells that are to look there."""

    def __getitem__(self, number: int) -> dict[str, object]:
        tokens = np.zeros((257, 64), np.float32)
        tokens[1:, :32] = np.repeat(np.eye(16), 16, axis=0).repeat(2, axis=1)
        tokens[1:, 32:] = np.tile(np.eye(16), (16, 1)).repeat(2, axis=1)
        places = matching_places(box_mask(32, (2, 30), (2, 30)), 4, 16)
        return {**super().__getitem__(number), "features": tokens, "places": places}


def test_it_learns_to_look_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rules = Denoising(unet_encoder=True, attention_guide=1.0)
    task = DiffusionTask(AnyDoor(TINY), PlacedPairs(different=4), rules)
    batch = {
        name: torch.stack([torch.as_tensor(task.dataset()[n][name]) for n in range(4)])
        for name in task.dataset()[0]
    }
    with torch.no_grad():
        before = task.loss(task.module, batch)
    train(task, LoopSettings(steps=60, batch=4, learning_rate=2e-3), tmp_path)
    with torch.no_grad():
        after = task.loss(task.module, batch)
    assert float(after["guide"]) < float(before["guide"]) - 0.5
    torch.testing.assert_close(after["loss"], after["denoising"] + after["guide"])
