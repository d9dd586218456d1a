"""Files that are never seen half written, whenever the program is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a place beside `path` to write to. What is there at the end takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.part")
    yield beside
    beside.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in place of the one that was there."""
    with replacing(path) as beside:
        beside.write_text(text)
