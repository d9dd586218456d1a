"""How many processes prepare data, and where they draw."""

from __future__ import annotations

import os

import pytest
import torch

from training import workers
from training.data.sources import SourceError
from training.workers import CARD_DRAWERS, drawer_count, drawing_device, load_samples, worker_count


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


class Numbers:
    """Number n is the sample n, up to 5."""

    def __getitem__(self, number: int) -> int:
        if number > 5:
            raise SourceError(f"there is no {number}")
        return number


@pytest.mark.parametrize("processes", [0, 2])
def test_samples_come_in_batches_and_an_error_as_it_was_raised(processes: int) -> None:
    """From other processes, too, from where PyTorch sends the text of its traceback instead."""
    batches = load_samples(Numbers(), 3, range(9), processes)
    assert [next(batches).tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(SourceError, match=r"^there is no 6$"):
        next(batches)
