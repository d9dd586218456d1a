"""Training in processes of its own, which can be several and can be killed.

They are forked from one that has imported everything and done nothing, because importing takes longer than
what the tests train.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.support.tiny import TINY, RandomPairs, open_zero_convolutions
from training.loop import part_processes, train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.systems.anydoor import Denoising, DiffusionTask

PATIENCE = 600
"""Seconds."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__, "training.train"])


def start(work: Callable[..., Any], *arguments: Any, **environment: str) -> BaseProcess:
    """Calls a function that can be imported, in a process of its own."""
    # what the first process is forked from has to find this module, too
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    # two processes on one card would be something else
    processor = {"ACCELERATE_USE_CPU": "true"} if torch.cuda.is_available() else {}
    process = _CONTEXT.Process(target=_run, args=({**processor, **environment}, work, arguments))
    process.start()
    return process


def start_two(work: Callable[..., Any], *arguments: Any) -> list[BaseProcess]:
    """Calls it in two processes that know of each other, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [start(work, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), **place) for rank in range(2)]


def finish(*processes: BaseProcess) -> None:
    """Waits until all have ended well, or one has not: the others would wait for it."""
    end = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(processes)


def _run(environment: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    sys.exit(work(*arguments))


class SlowPairs(RandomPairs):
    """Takes its time, so that training can be killed in the middle."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def __getitem__(self, number: int) -> dict[str, Any]:
        time.sleep(self.pause)
        return super().__getitem__(number)


def train_tiny(folder: Path, batch: int, steps: int, pause: float = 0.0, shard: bool = False) -> None:
    """Trains the tiny AnyDoor network, the published model's way."""
    torch.manual_seed(0)
    model = AnyDoor(TINY)
    open_zero_convolutions(model)
    task = DiffusionTask(model, SlowPairs(pause), Denoising())

    def draw(weights: Any) -> NDArray[np.uint8]:
        assert all(type(weight) is torch.Tensor for weight in weights.values())
        return np.zeros((4, 4, 3), np.uint8)

    train(
        task, LoopSettings(steps, batch, learning_rate=1e-3, ema=0.9, save_every=1, shard=shard), folder, draw
    )
    part_processes()
