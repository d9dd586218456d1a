"""What `anydoor doctor` says of a bundle of TensorRT plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.cli import main
from tests.support.cards import no_card


def test_doctor_tells_what_would_live_where(
    tiny_plan_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", str(tiny_plan_bundle), "--memory-budget", "8G"])
    printed = capsys.readouterr().out
    assert "made by tensorrt_rtx" in printed
    assert "for sm86,sm89,sm120" in printed
    assert "of a budget of 8000.0 MB" in printed
    assert code == (2 if no_card() else 0)
    assert not no_card() or f"unusable: {no_card()}" in printed


@pytest.mark.parametrize("size", ["6X", "G", "-1G", "nan", "inf"])
def test_a_budget_that_is_no_size_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", f"--memory-budget={size}"])
    assert "is not a size" in capsys.readouterr().err
