"""Flags of dataclasses: what their fields say, and None where nothing is given."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import pytest

from engines.errors import BackendError
from engines.options import EngineOptions
from runtime.cli.flags import add_engine_flags, add_flags, engine_options, field_names, given


@dataclass(frozen=True)
class Inner:
    most: int | None = field(default=None, metadata={"help": "of memory", "is_size": True})


@dataclass(frozen=True)
class Outer:
    word: str = field(default="a", metadata={"help": "one of them", "choices": ("a", "b")})
    inner: Inner = Inner()
    seconds: float = field(default=1.5, metadata={"help": "to wait"})
    places: tuple[str, ...] = field(default=("x", "y"), metadata={"help": "may be repeated"})
    loud: bool = field(default=False, metadata={"help": "or not"})


def parser(kind: type) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser()
    add_flags(result, kind)
    return result


def test_every_field_has_a_flag_of_its_type() -> None:
    flags = ["--word", "b", "--most", "6G", "--seconds", "2", "--places", "p", "--places", "q", "--loud"]
    assert given(parser(Outer).parse_args(flags), field_names(Outer)) == {
        "word": "b",
        "most": 6 * 10**9,
        "seconds": 2.0,
        "places": ["p", "q"],
        "loud": True,
    }


def test_what_is_not_given_stays_open() -> None:
    assert given(parser(Outer).parse_args([]), field_names(Outer)) == {}


def test_help_tells_the_defaults() -> None:
    text = " ".join(parser(Outer).format_help().split())
    for part in ("one of them (default: a)", "to wait (default: 1.5)", "may be repeated (default: x, y)"):
        assert part in text
    assert "or not (" not in text


def test_engine_options_there_and_back() -> None:
    command = argparse.ArgumentParser()
    add_engine_flags(command)
    assert engine_options(command.parse_args([])) == EngineOptions()
    flags = [
        "--backend=onnxruntime",
        "--device=cpu",
        "--threads=3",
        "--memory-budget=1.5G",
        "--no-cuda-graphs",
    ]
    assert engine_options(command.parse_args(flags)) == EngineOptions(
        "onnxruntime", "cpu", threads=3, memory_budget=1_500_000_000, cuda_graphs=False
    )
    with pytest.raises(BackendError, match="threads must be at least 1, not 0"):
        engine_options(command.parse_args(["--threads=0"]))
