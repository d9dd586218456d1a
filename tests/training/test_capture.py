"""Steps that a card captures: on a simulated card, which records and replays operators, and on a real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny import TINY, RandomPairs, open_zero_convolutions
from training.capture import WARM_UP, CapturedStep
from training.loop import train
from training.loop_settings import LoopSettings
from training.network.modules import AnyDoor
from training.systems.anydoor import Denoising, DiffusionTask


class Recording(TorchDispatchMode):
    """Like a CUDA graph: operators, and the tensors that they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Tensor]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operator(*arguments, **(named or {}))
        self.calls.append((operator, arguments, named or {}, result))
        return result

    def replay(self) -> None:
        for operator, arguments, named, result in self.calls:
            result.copy_(operator(*arguments, **named))


class Stream:
    def wait_stream(self, other: Stream) -> None:
        """Nothing on this card takes time."""


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def graph(recording: Recording, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        with recording:
            yield

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr("torch.cuda.CUDAGraph", Recording)
    monkeypatch.setattr("torch.cuda.graph", graph)


class Squares:
    """A step that counts how often it was called; the calls from `fails` on cannot be captured."""

    def __init__(self, fails: int = 1000) -> None:
        self.calls, self.fails, self.forgotten = 0, fails, 0

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return {"loss": batch["values"].square().sum()}

    def forget(self) -> None:
        self.forgotten += 1


def losses(step: CapturedStep, count: int) -> list[float]:
    return [float(step({"values": torch.full((2,), float(n))})["loss"]) for n in range(count)]


@pytest.mark.usefixtures("card")
def test_a_step_is_recorded_after_a_few_and_replayed_with_each_batch() -> None:
    squares = Squares()
    assert losses(CapturedStep(squares, squares.forget), 8) == [2.0 * n * n for n in range(8)]
    assert squares.calls == WARM_UP + 1
    assert squares.forgotten == 0


@pytest.mark.usefixtures("card")
def test_a_step_that_cannot_be_recorded_is_taken_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    squares = Squares(fails=WARM_UP + 1)
    assert losses(CapturedStep(squares, squares.forget), 8) == [2.0 * n * n for n in range(8)]
    assert squares.forgotten == 1
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "train: steps are not captured as a CUDA graph, and slower: "
        "RuntimeError: operation not permitted when stream is capturing"
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_captured_training_is_one_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    for captured in (True, False):
        if not captured:
            monkeypatch.setattr("training.loop._Stepper._can_be_captured", False)
        torch.manual_seed(0)
        model = AnyDoor(TINY)
        open_zero_convolutions(model)
        task = DiffusionTask(model, RandomPairs(), Denoising())
        settings = LoopSettings(12, batch=2, learning_rate=1e-3, final_rate=0.1, ema=0.9)
        train(task, settings, tmp_path / str(captured))
        kept[captured] = torch.load(tmp_path / str(captured) / "mean.pt", weights_only=True)
    for name, value in kept[True].items():
        torch.testing.assert_close(value, kept[False][name], rtol=1e-3, atol=1e-3)
