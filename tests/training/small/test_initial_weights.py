"""What a small network starts with."""

from __future__ import annotations

import torch

from tests.support.tiny import TINY
from training.network.modules import AnyDoor
from training.small.initial_weights import open_control


def test_an_open_control_lets_the_hint_through() -> None:
    torch.manual_seed(0)
    control = AnyDoor(TINY, parts=["control"]).control
    open_control(control)
    hints, tokens = torch.rand(2, 4, 32, 32) * 2 - 1, torch.randn(2, 5, 32)
    with torch.no_grad():
        maps = control(hints, torch.tensor([5, 5]), tokens)
        others = control(hints.flip(0), torch.tensor([5, 5]), tokens)
    for detail, other in zip(maps, others, strict=True):
        assert (detail - other).std() > 0.05 * detail.std() > 0
