"""Stages that end in time, on a clock that the test moves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.tiny import TINY, RandomPairs
from training.clock import Clock, TimeLimit, program_start
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.systems.anydoor import Denoising, DiffusionTask
from training.train_state import save_atomically


class Time:
    """Stands still unless it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Time]:
    made = Time()
    monkeypatch.setattr("training.clock.time", SimpleNamespace(monotonic=made))
    return made


class SlowPairs(RandomPairs):
    """Each takes a second."""

    def __init__(self, clock: Time) -> None:
        super().__init__()
        self.clock = clock

    def __getitem__(self, number: int) -> dict[str, Any]:
        self.clock.now += 1
        return super().__getitem__(number)


def test_a_clock_without_a_limit_is_never_over(clock: Time) -> None:
    endless = Clock(None, spent=5)
    clock.now = 1e9
    endless.lap()
    assert not endless.is_over
    assert endless.progress == 0
    assert endless.spent == 1e9 + 5
    assert endless.may_save(True)
    assert not endless.may_save(False)


def test_a_limited_clock_leaves_room_for_a_step_and_a_save_of_twice_the_length(clock: Time) -> None:
    limited = Clock(TimeLimit(100, began=0))
    assert limited.may_save(False)  # the first step is saved, to see how long that takes
    with limited.saving():
        clock.now += 2
    assert not limited.may_save(True)  # that would be most of the time
    clock.now += 3
    limited.lap()
    for now, over in ((89.0, False), (91.0, True)):  # 2 x (3 + 2) seconds before the end
        clock.now = now
        assert limited.is_over is over
    assert limited.may_save(True)
    assert limited.progress == 0.91


@pytest.fixture
def saved_at(clock: Time, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When last.pt was written; each file takes two seconds."""
    times: list[float] = []

    def save(state: Any, path: Path) -> None:
        clock.now += 2
        save_atomically(state, path)
        times.append(clock.now)

    monkeypatch.setattr("training.train_state.save_atomically", save)
    return times


def run(folder: Path, clock: Time, seconds: float | None, steps: int = 1000) -> dict[str, Any]:
    limit = None if seconds is None else TimeLimit(seconds, clock.now)
    task = DiffusionTask(AnyDoor(TINY), SlowPairs(clock), Denoising())
    settings = LoopSettings(steps, batch=2, learning_rate=1e-3, final_rate=0.1, save_every=5, limit=limit)
    train(task, settings, folder)
    state: dict[str, Any] = torch.load(folder / "last.pt", weights_only=True)
    return state


def test_a_stage_ends_and_saves_before_its_limit(tmp_path: Path, clock: Time, saved_at: list[float]) -> None:
    clock.now = 50
    state = run(tmp_path, clock, 60)
    assert 5 < state["step"] < 30
    assert 100 < saved_at[-1] <= 110
    # the schedule went by the clock: of 1000 steps, the rate would hardly have moved
    assert state["optimizer"]["param_groups"][0]["lr"] < 4e-4


def test_what_earlier_calls_took_counts(tmp_path: Path, clock: Time, saved_at: list[float]) -> None:
    first = run(tmp_path, clock, 60)
    assert run(tmp_path, clock, 60)["step"] == first["step"]  # it is over
    began = clock.now
    longer = run(tmp_path, clock, 100)
    assert longer["step"] > first["step"]
    assert clock.now <= began + 40
    assert run(tmp_path, clock, None, steps=longer["step"] + 2)["step"] == longer["step"] + 2


def test_the_exchange_of_rates_goes_by_the_clock_too() -> None:
    settings = LoopSettings(100, rates={"adapter": 4.0, "unet": 1.0}, swap=0.5)
    assert settings.part_rate("adapter", 10, progress=0.4) == 4.0
    assert settings.part_rate("adapter", 10, progress=0.5) == 1.0
    assert settings.part_rate("adapter", 50) == 1.0
    decaying = replace(settings, final_rate=0.0, warmup=20)
    assert decaying.rate(10, progress=0.9) == 11 / 20  # warm-up stays in steps
    assert decaying.rate(60, progress=0.2) == pytest.approx(0.5)
    assert decaying.rate(60, progress=1.0) == pytest.approx(0.0)


def test_the_exchange_of_rates_is_at_the_step_that_is_told() -> None:
    """0.55 of 100 is a little more than 55 in floating point."""
    settings = LoopSettings(100, rates={"adapter": 4.0, "unet": 1.0}, swap=0.55)
    assert [settings.part_rate("adapter", step) for step in (54, 55)] == [4.0, 1.0]
    assert settings.swap_step == 55
    assert replace(settings, steps=1, swap=0.5).swap_step == 1


def test_the_program_was_started_before_its_tests() -> None:
    assert program_start() < time.monotonic()
