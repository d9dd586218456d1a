"""How many processes prepare data, and where they draw."""

from __future__ import annotations

import os

import pytest
import torch

from training import workers
from training.workers import CARD_DRAWERS, drawer_count, drawing_device, worker_count


def test_as_many_as_are_asked_for() -> None:
    assert [worker_count(asked) for asked in (0, 1, 7)] == [0, 1, 7]


def test_minus_one_leaves_a_core() -> None:
    assert worker_count(-1) == max(len(os.sched_getaffinity(0)) - 1, 1)


def test_a_card_draws_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many processes as share its memory."""
    assert drawing_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(workers, "drawing_device", lambda: torch.device("cpu"))
    assert drawer_count(40) == 40
    monkeypatch.setattr(workers, "drawing_device", lambda: torch.device("cuda"))
    assert [drawer_count(asked) for asked in (1, 40)] == [1, CARD_DRAWERS]
