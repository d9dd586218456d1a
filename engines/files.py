"""Files and folders that nobody ever sees half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path`; what is written there takes its place when the block ends without an
    error.

    Works for a file and for a folder. After an error `path` is as it was before. The folder that holds `path`
    is made if it does not exist.

    Args:
        path: the file or folder to write.

    Raises:
        OSError: the place cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # of one process and call: several may write the same file at once, and the last one to finish wins
    partial = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial")
    try:
        yield partial
        if partial.is_dir():
            _replace_folder(partial, path)
        else:
            partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Writes a file as a whole; see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file as a whole, in UTF-8; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


def _replace_folder(partial: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
