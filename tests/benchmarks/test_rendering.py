"""The renderer's speed: every kind of view is measured, and operators are counted."""

from __future__ import annotations

import pytest
import torch

from benchmarks.rendering import count_operators, main


def test_operators_that_compute_are_counted() -> None:
    numbers = torch.arange(6.0)
    assert count_operators(lambda: numbers.view(2, 3).T) == 0
    assert count_operators(lambda: (numbers + 1).view(2, 3).mul_(2)[0]) == 2


def test_every_kind_of_view_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the tests that follow, too
    assert main(["--views", "2", "--at-once", "2"]) == 0
    printed = capsys.readouterr()
    names = [line.partition(":")[0] for line in printed.out.splitlines()[:5]]
    assert names == [
        "parameters of an object",
        "parameters of a room",
        "views in rooms",
        "views alone",
        "views in rooms and alone",
    ]
    assert "drawing views alone" in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--device", "cuda"])
    assert "PyTorch sees no card on this machine" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--views", "3"])
