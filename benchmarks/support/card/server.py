"""A server under open load at four rates, batching continuously, statically, and not at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from statistics import fmean

from benchmarks.support.card.task import BACKEND, Row, Task
from benchmarks.support.graphs import CONTROL, DECODE, DENOISE, ID_ENCODER
from benchmarks.support.open_load import BATCHING, LoadTest

_LOADS = (0.5, 1.0, 1.5, 2.5)
"""Arrivals, as multiples of the rate of one request at a time."""
_STEPS = {"cuda": (10, 20, 30), "cpu": (2, 3)}
_START_SECONDS = {"cuda": 10.0, "cpu": 3.0}
"""What starting a server takes, about."""


def server(task: Task) -> Iterator[Row]:
    """Offer load to a server of every way of batching."""
    steps = _STEPS[task.device]
    left = task.deadline - time.monotonic() - len(BATCHING) * _START_SECONDS[task.device]
    test = LoadTest(
        bundle=task.bundle,
        loads=_LOADS,
        steps=steps,
        seconds=max(left / len(BATCHING) / len(_LOADS), 0.5),
        flags=[f"--device={task.device}", f"--backend={BACKEND}"],
    )
    # of a picture in the mean, with guidance
    mean = 2 * fmean(steps)
    rows = {ID_ENCODER: 1, CONTROL: mean, DENOISE: mean, DECODE: 1}
    for row in test.rows():
        yield {**asdict(row), "alone": test.alone, "deadline": test.deadline, "rows": rows}
