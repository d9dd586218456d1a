"""Handles `-` among a command's files: a picture from standard input, or to standard output."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.imaging.sources import read_source
from runtime.standard_output import forget_output

STREAM = Path("-")


def read_standard_input(*groups: Sequence[Any]) -> list[list[Any]]:
    """Returns the same lists of arguments, with the bytes of standard input in place of `-`.

    Raises:
        InputError: several of them are `-`, nothing comes, or it is closed.
    """
    wanted = sum(argument == STREAM for group in groups for argument in group)
    if wanted > 1:
        raise InputError("standard input holds one picture, but several are -")
    if wanted and sys.stdin is None:
        raise InputError("standard input is closed, but a picture is -")
    content = read_source(sys.stdin.buffer, "standard input") if wanted else b""
    return [[content if argument == STREAM else argument for argument in group] for group in groups]


def check_standard_output(pictures: int) -> None:
    """Refuses to write to standard output what does not belong there.

    Raises:
        InputError: there are several pictures, they would be seen as text, or it is closed.
    """
    if sys.stdout is None:
        raise InputError("standard output is closed: write to a file")
    if pictures > 1:
        raise InputError("standard output holds one picture: write one, or a contact sheet with --grid")
    if sys.stdout.isatty():
        raise InputError("the picture would be written to the terminal: redirect standard output")


def write_standard_output(content: bytes) -> None:
    """Writes a picture's file to standard output.

    Raises:
        InputError: nobody reads it, or it cannot be written.
    """
    try:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
    except OSError as error:
        forget_output()
        raise InputError(f"cannot write to standard output: {error.strerror}") from error
