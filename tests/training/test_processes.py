"""Two processes train as one with twice the batch, whether each has all weights (DDP) or a part (FSDP).

A killed run goes on as if it had not been.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, time
from pathlib import Path
import numpy as np, torch
from training.loop import LoopSettings, train

folder, batch, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
shard = sys.argv[5] == "True"

class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 16), torch.nn.Linear(16, 2)
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(16, 16), torch.nn.SiLU(), torch.nn.Linear(16, 16)])
        self.blocks[2].requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

class Task:
    def __init__(self):
        torch.manual_seed(0)
        self.module = Blocks()

    def dataset(self):
        return self

    def __getitem__(self, number):
        time.sleep(pause)
        values = np.random.default_rng(number).standard_normal(8, np.float32)
        return {"x": values[:6], "y": values[6:]}

    def loss(self, module, batch):
        return {"loss": (module(batch["x"]) - batch["y"]).square().mean()}

def draw(weights):
    assert all(type(weight) is torch.Tensor for weight in weights.values())
    return np.zeros((4, 4, 3), np.uint8)

torch.set_num_threads(1)
settings = LoopSettings(steps, batch, learning_rate=1e-2, ema=0.9, save_every=1, shard=shard)
train(Task(), settings, folder, draw)
"""


def start(
    folder: Path, batch: int, steps: int, pause: float = 0.0, shard: bool = False, **environment: str
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(batch), str(steps), str(pause), str(shard)]
    everything = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.Popen(command, env=everything, cwd=ROOT, stderr=subprocess.DEVNULL)


def start_two(folder: Path, batch: int, steps: int, shard: bool) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        start(folder, batch, steps, shard=shard, RANK=str(rank), LOCAL_RANK=str(rank), **place)
        for rank in range(2)
    ]


def weights(folder: Path, file: str = "last.pt") -> dict[str, torch.Tensor]:
    state = torch.load(folder / file, weights_only=True)
    found: dict[str, torch.Tensor] = state["module"] if file == "last.pt" else state
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of one process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    assert start(folder, batch=4, steps=5).wait(240) == 0
    return folder


def test_two_processes_are_one_with_twice_the_batch(alone: Path, tmp_path: Path) -> None:
    both = start_two(tmp_path, batch=2, steps=5, shard=False)
    assert [process.wait(240) for process in both] == [0, 0]
    for file in ("last.pt", "mean.pt"):
        assert_close(weights(tmp_path, file), weights(alone, file))


def test_whoever_holds_the_weights_they_are_the_same(alone: Path, tmp_path: Path) -> None:
    """Two steps in one process, two in two that share the weights, and the last alone again."""
    assert start(tmp_path, batch=4, steps=2).wait(240) == 0
    both = start_two(tmp_path, batch=2, steps=4, shard=True)
    assert [process.wait(240) for process in both] == [0, 0]
    assert start(tmp_path, batch=4, steps=5).wait(240) == 0
    for file in ("last.pt", "mean.pt"):
        assert_close(weights(tmp_path, file), weights(alone, file))


def test_sharding_needs_several_processes(tmp_path: Path) -> None:
    from training.loop import LoopSettings, train

    with pytest.raises(RuntimeError, match="needs several processes"):
        train(OneLayer(), LoopSettings(steps=1, shard=True), tmp_path)


class OneLayer:
    def __init__(self) -> None:
        self.module = torch.nn.Linear(1, 1)

    def dataset(self) -> OneLayer:
        return self

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"x": np.ones(1, np.float32)}

    def loss(self, module: torch.nn.Module, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": module(batch["x"]).mean()}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", batch=2, steps=30)
    killed = start(tmp_path / "killed", batch=2, steps=30, pause=0.05)
    while not (tmp_path / "killed" / "log.csv").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] < 30
    assert start(tmp_path / "killed", batch=2, steps=30).wait(240) == 0
    assert whole.wait(240) == 0
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "killed")[name], value)
