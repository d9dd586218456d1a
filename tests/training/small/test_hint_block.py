"""The hint block, trained by itself."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.tiny import TINY, RandomPairs
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.small.hint_block import HintBlockTask


def test_the_hint_block_learns_what_a_hint_became_and_nothing_else_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    control = AnyDoor(TINY, parts=["control"]).control
    before = {name: value.clone() for name, value in control.state_dict().items()}
    task = HintBlockTask(control, RandomPairs(different=2))
    batch = {
        name: torch.stack([torch.as_tensor(task.dataset()[n][name]) for n in (0, 1)])
        for name in ("hint", "latents")
    }
    with torch.no_grad():
        at_first = float(task.loss(task.module, batch)["loss"])
    train(task, LoopSettings(steps=60, batch=2, learning_rate=3e-3, ema=0.5), tmp_path)
    with torch.no_grad():
        assert float(task.loss(task.module, batch)["loss"]) < 0.2 * at_first
    for name, value in control.state_dict().items():
        learns = name.startswith("controlnet_cond_embedding.") and "conv_out" not in name
        assert torch.equal(value, before[name]) != learns, name

    again = AnyDoor(TINY, parts=["control"]).control
    HintBlockTask.load(again, torch.load(tmp_path / "mean.pt", weights_only=True))
    kept = again.controlnet_cond_embedding.blocks[0].weight
    torch.testing.assert_close(kept, control.controlnet_cond_embedding.blocks[0].weight, rtol=0.1, atol=1e-2)
