"""Amounts of memory as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cli import main
from runtime.sizes import parse_size, size_text

SIZES = {0: "0", 999: "999", 64_000: "64K", 999_999: "1000K", 33_554_432: "33.6M", 10 * 2**30: "10.7G"}


@pytest.mark.parametrize(("size", "text"), SIZES.items())
def test_bytes_are_written_to_one_decimal(size: int, text: str) -> None:
    assert size_text(size) == text


@given(st.integers(0, 10**12))
def test_what_is_written_is_read_within_five_percent(size: int) -> None:
    assert parse_size(size_text(size)) == pytest.approx(size, rel=0.05)


def test_the_help_of_the_server_names_sizes_as_they_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "largest request, like 32M (default: 33.6M)" in text
