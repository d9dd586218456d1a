"""Showing cross-attention where to look: the network computes the same, and learns to look there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from runtime.errors import InputError
from tests.support.shapes import box_mask
from tests.support.tiny import TINY, RandomPairs
from training.data.matching_places import matching_places
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.small.attention_guide import QUARTER_SPREAD, SPREAD, AttentionGuide, cross_attention
from training.systems.anydoor import Denoiser, Denoising, DiffusionTask, guided_parts


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
    unguided, no_place = Denoiser(model, guided=1)(*batch, places)
    torch.testing.assert_close(unguided, estimate, rtol=1e-4, atol=1e-5)
    assert float(nothing) == float(no_place) == 0
    places[0, :2, 2:] = torch.tensor([3.0, 9.0])  # one cell of the level that attends
    _, off = Denoiser(model, guided=1)(*batch, places)
    # fresh attention looks everywhere
    assert float(off) == pytest.approx(np.log(257), rel=0.15)


def off_target(look: Tensor, place: Tensor, spread: float) -> Tensor:
    """The cross-entropy of where a head looks (257,) with a round blob of tokens."""
    grid = torch.stack(torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij"), 2) + 0.5
    distance = (grid - place).square().sum(2).flatten()
    return -((-distance / (2 * spread**2)).softmax(0) * look[1:]).sum()


def picked_out(looks: Tensor, places: Tensor) -> Tensor:
    """The loss as it is defined: the mean over the cells whose place is known, which are picked out."""
    wanted = F.avg_pool2d(places.permute(0, 3, 1, 2), places.shape[1] // round(looks.shape[2] ** 0.5))
    wanted = wanted.flatten(2).transpose(1, 2)
    known = wanted.isfinite().all(2)
    found = zip(wanted[known], looks[:, 0][known], strict=True)
    total = sum((off_target(look, place, SPREAD) for place, look in found), 0 * looks.sum())
    return total / max(int(known.sum()), 1)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_the_loss_is_the_mean_over_the_cells_whose_place_is_known(share: float) -> None:
    generator = torch.Generator().manual_seed(int(10 * share))
    guide, places = AttentionGuide([]), 16 * torch.rand(2, 8, 8, 2, generator=generator)
    places[torch.rand(2, 8, 8, generator=generator) < share] = float("nan")
    looks = [torch.randn(2, 1, cells, 257, generator=generator).log_softmax(3) for cells in (64, 16)]
    for level, look in enumerate(looks):
        guide.seen[str(level)] = look.requires_grad_()
    loss, expected = guide.loss(places), sum(picked_out(look, places) for look in looks) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, looks), torch.autograd.grad(expected, looks))


def test_four_heads_look_at_the_quarters_of_a_cell() -> None:
    guide, places = AttentionGuide([], heads=4), torch.full((1, 4, 4, 2), float("nan"))
    # cells are two tokens wide, and the object starts at the second
    places[0, 1:, 1:] = 2 * torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(3, 3, 2) + 3.0
    looks = torch.randn(1, 4, 16, 257, generator=torch.Generator().manual_seed(0)).log_softmax(3)
    guide.seen["layer"] = looks
    quarters = [(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]
    expected = [
        off_target(looks[0, head, cell], place + torch.tensor(quarter), 2 * QUARTER_SPREAD)
        for head, quarter in enumerate(quarters)
        for cell, place in enumerate(places[0].flatten(0, 1))
        if place.isfinite().all()
    ]
    torch.testing.assert_close(guide.loss(places), torch.stack(expected).mean())


def test_a_cell_is_as_wide_as_it_is_high() -> None:
    """Of an object that covers one row of cells the width is known all the same."""
    places = torch.full((2, 4, 4, 2), float("nan"))
    places[0, 1, 1:] = torch.tensor([[5.0, 3.0], [5.0, 5.0], [5.0, 7.0]])
    places[1] = places[0].transpose(0, 1).flip(-1)
    looks = torch.randn(1, 4, 4, 4, 257, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    losses = []
    for number in range(2):
        guide = AttentionGuide([], heads=4)
        # what lies, and what stands: cells, quarters and tokens change rows for columns
        turned = looks if number == 0 else looks.transpose(2, 3)[:, [0, 2, 1, 3]]
        tokens = turned[..., 1:].unflatten(-1, (16, 16))
        tokens = tokens if number == 0 else tokens.transpose(-1, -2)
        guide.seen["layer"] = torch.cat([turned[..., :1], tokens.flatten(-2)], -1).flatten(2, 3)
        losses.append(guide.loss(places[number : number + 1]))
    torch.testing.assert_close(losses[0], losses[1])


def test_a_layer_with_too_few_heads_is_refused() -> None:
    model = AnyDoor(TINY)
    with pytest.raises(InputError, match=r"4 heads are to be guided, and '.*' has 2"):
        Denoiser(model, guided=4)


def test_what_does_not_see_the_hint_is_not_guided() -> None:
    names = cross_attention(guided_parts(AnyDoor(TINY)))
    assert names
    assert not any("mid_block" in name for name in names)
    assert {name.split(".")[0] for name in names} == {"0", "1"}
    unet = AnyDoor(TINY).unet
    assert len(cross_attention([unet])) > len(cross_attention([unet.up_blocks]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_guide": 0.1, "guided_heads": 3}, "guided_heads is 3; expected 1 or 4"),
        ({"place_keys": True}, "place_keys needs an attention_guide above 0"),
    ],
)
def test_settings_that_no_guide_has_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Denoising(**settings)


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
