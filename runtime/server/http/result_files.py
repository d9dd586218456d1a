"""Keeps results of jobs in files."""

from __future__ import annotations

import asyncio
import os
import re
from contextlib import suppress
from pathlib import Path

from runtime.server.events import BusyError

_NAME = re.compile(r"job-[0-9a-f]{32}\.json")
"""Of the file of a job, by its id."""


def results_in(spool: Path) -> dict[Path, tuple[int, float]]:
    """Finds results in a folder: file -> bytes, and when it was written."""
    found = {}
    for file in filter(lambda file: _NAME.fullmatch(file.name), spool.iterdir()):
        with suppress(OSError):
            state = file.stat()
            found[file] = state.st_size, state.st_mtime
    return found


def remove(file: Path) -> None:
    """Removes a file, if it can be."""
    with suppress(OSError):
        file.unlink(missing_ok=True)


async def write_result(file: Path, content: bytes) -> None:
    """Writes a result that nobody else may read.

    Raises:
        BusyError: the folder takes nothing more.
    """

    def write() -> None:
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
            opened.write(content)

    writing = asyncio.ensure_future(asyncio.to_thread(write))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        raise
    except OSError as error:
        raise BusyError(f"the result cannot be stored: {error.strerror}") from error
