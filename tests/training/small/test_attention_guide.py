"""Showing cross-attention where to look: the network computes the same, and learns to look there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests.support.shapes import box_mask
from tests.support.tiny import TINY, RandomPairs
from training.data.matching_places import matching_places
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.small.attention_guide import SPREAD, AttentionGuide
from training.systems.anydoor import Denoiser, Denoising, DiffusionTask


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


def picked_out(looks: Tensor, places: Tensor) -> Tensor:
    """The loss as it is defined: the mean over the cells whose place is known, which are picked out."""
    total = 0 * looks.sum()
    wanted = F.avg_pool2d(places.permute(0, 3, 1, 2), places.shape[1] // round(looks.shape[1] ** 0.5))
    wanted = wanted.flatten(2).transpose(1, 2)
    known = wanted.isfinite().all(2)
    for place, look in zip(wanted[known], looks[known], strict=True):
        grid = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij"), 2) + 0.5
        distance = (grid - place).square().sum(2).flatten()
        total = total - ((-distance / (2 * SPREAD**2)).softmax(0) * look[1:]).sum()
    return total / max(int(known.sum()), 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_the_loss_is_the_mean_over_the_cells_whose_place_is_known(share: float) -> None:
    generator = torch.Generator().manual_seed(int(10 * share))
    guide, places = AttentionGuide([]), 16 * torch.rand(2, 8, 8, 2, generator=generator)
    places[torch.rand(2, 8, 8, generator=generator) < share] = float("nan")
    looks = [torch.randn(2, cells, 257, generator=generator).log_softmax(2) for cells in (64, 16)]
    for look in looks:
        guide._seen.append(look.requires_grad_())
    loss, expected = guide.loss(places), sum(picked_out(look, places) for look in looks) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, looks), torch.autograd.grad(expected, looks))


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
    train(task, LoopSettings(steps=20, batch=4, learning_rate=4e-3), tmp_path)
    with torch.no_grad():
        after = task.loss(task.module, batch)
    assert float(after["guide"]) < float(before["guide"]) - 0.5
    torch.testing.assert_close(after["loss"], after["denoising"] + after["guide"])
