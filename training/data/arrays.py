"""Keeps arrays on disk that are written row by row, and files that count the rows that are written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from engines.errors import AnyDoorError
from engines.files import replacing
from training.data.device import MAPPED


class ArrayError(AnyDoorError):
    """An array or a count on disk is damaged; the text says which."""


def make_array(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """Makes an array of zeros, to be written row by row.

    Raises:
        OSError: there is no room for it.
    """
    with replacing(path) as partial:
        nbytes = open_memmap(partial, "w+", dtype, shape).nbytes
        if nbytes and hasattr(os, "posix_fallocate"):
            # the file has no blocks yet: where the disk is full, the first write into them ends the process
            with partial.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return writable_array(path)


def writable_array(path: Path) -> NDArray[Any]:
    """Opens an array to go on writing it.

    Raises:
        ArrayError: it is damaged.
    """
    mapped_array(path)  # where a part of the file is lost, opening it to write would put zeros there
    return _opened(path, "r+")


def mapped_array(path: Path) -> NDArray[Any]:
    """Opens an array to read it, see `MAPPED`.

    Raises:
        ArrayError: it is damaged.
    """
    return _opened(path, MAPPED)


def read_count(path: Path) -> int:
    """Reads how many rows are written; 0 if there is no file.

    Raises:
        ArrayError: the file holds no count.
    """
    if not path.exists():
        return 0
    text = path.read_text("utf-8", "replace").strip()
    if not (text.isascii() and text.isdigit()):
        raise ArrayError(f"'{path}' holds {text[:20]!r}, expected a number of rows: delete it to begin anew")
    return int(text)


def _opened(path: Path, mode: str) -> NDArray[Any]:
    try:
        return open_memmap(path, mode)  # type: ignore[arg-type]
    except (ValueError, EOFError) as error:
        raise ArrayError(
            f"'{path}' is no array, or only a part of one: delete '{path.parent}' to make it again"
        ) from error
