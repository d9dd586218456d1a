"""Steps that are compiled learn what others learn."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from runtime.errors import InputError
from training.loop import Batch, NumberedDataset, train
from training.loop_settings import LoopSettings


class Points:
    """Points near a line."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        x = np.random.default_rng(number).normal(size=2).astype(np.float32)
        return {"x": x, "y": np.float32(3 * x[0] - x[1])}


class LineTask:
    """Finds the line."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = self.network = nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 1))

    def dataset(self) -> NumberedDataset:
        return Points()

    def loss(self, module: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (module(batch["x"])[:, 0] - batch["y"]).square().mean()}


def settings(compile: bool) -> LoopSettings:
    return LoopSettings(steps=6, batch=4, learning_rate=1e-2, ema=0.9, compile=compile)


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
def test_compiled_steps_learn_the_same(tmp_path: Path) -> None:
    for name, compiled in (("eager", False), ("compiled", True)):
        train(LineTask(), settings(compiled), tmp_path / name)
    eager, found = (torch.load(tmp_path / name / "mean.pt") for name in ("eager", "compiled"))
    assert found.keys() == eager.keys()
    for name in eager:
        torch.testing.assert_close(found[name], eager[name], rtol=1e-5, atol=1e-6)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        train(LineTask(), settings(compile=True), tmp_path)
