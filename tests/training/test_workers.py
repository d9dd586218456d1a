"""How many processes prepare data."""

from __future__ import annotations

import os

from training.workers import worker_count


def test_as_many_as_are_asked_for() -> None:
    assert [worker_count(asked) for asked in (0, 1, 7)] == [0, 1, 7]


def test_minus_one_leaves_a_core() -> None:
    assert worker_count(-1) == max(len(os.sched_getaffinity(0)) - 1, 1)
