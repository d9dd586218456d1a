"""Numbers of command lines that must be above zero."""

from __future__ import annotations

import argparse
import math

import pytest

from benchmarks.support.numbers import positive


@pytest.mark.parametrize(("kind", "text", "number"), [(int, "3", 3), (float, "0.5", 0.5)])
def test_what_is_above_zero_is_taken(kind: type, text: str, number: float) -> None:
    assert positive(kind)(text) == number


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf"])
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a finite number above 0"):
        positive(float)(text)


def test_a_command_says_which_flag(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=positive(int))
    for text in ("0", "1.5"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--count", text])
    told = capsys.readouterr().err
    assert "argument --count: '0' is not a finite number above 0" in told
    assert "argument --count: invalid int value: '1.5'" in told
    assert math.isfinite(parser.parse_args(["--count", "2"]).count)
