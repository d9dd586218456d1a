"""Two processes train as one with twice the batch; a killed run goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys, time
from pathlib import Path
import numpy as np, torch
from training.loop import LoopSettings, train

folder, batch, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

class Task:
    def __init__(self):
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2))

    def dataset(self):
        return self

    def __getitem__(self, number):
        time.sleep(pause)
        values = np.random.default_rng(number).standard_normal(8, np.float32)
        return {"x": values[:6], "y": values[6:]}

    def loss(self, module, batch):
        return {"loss": (module(batch["x"]) - batch["y"]).square().mean()}

torch.set_num_threads(1)
train(Task(), LoopSettings(steps, batch, learning_rate=1e-2, ema=0.9, save_every=1), folder)
"""


def start(
    folder: Path, batch: int, steps: int, pause: float = 0.0, **environment: str
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PROGRAM, str(folder), str(batch), str(steps), str(pause)]
    everything = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", **environment}
    return subprocess.Popen(command, env=everything, cwd=ROOT, stderr=subprocess.DEVNULL)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "last.pt", weights_only=True)["module"]
    return state


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    alone = start(tmp_path / "alone", batch=4, steps=5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [
        start(
            tmp_path / "both",
            batch=2,
            steps=5,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            WORLD_SIZE="2",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in (alone, *both)] == [0, 0, 0]
    for name, value in weights(tmp_path / "alone").items():
        torch.testing.assert_close(weights(tmp_path / "both")[name], value, rtol=1e-5, atol=1e-6)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole", batch=2, steps=30)
    killed = start(tmp_path / "killed", batch=2, steps=30, pause=0.05)
    while not (tmp_path / "killed" / "log.csv").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] < 30
    assert start(tmp_path / "killed", batch=2, steps=30).wait(120) == 0
    assert whole.wait(120) == 0
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "killed")[name], value)
