"""Reads JSON files that come from elsewhere."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any


def read_limited(path: Path, most: int) -> bytes:
    """Reads a file that is not larger than it may be.

    Args:
        path: of the file.
        most: bytes.

    Raises:
        OSError: it cannot be read, or is not a file.
        ValueError: it is larger.
    """
    if path.exists() and not path.is_file():
        # reading a pipe would wait for a writer
        raise OSError(errno.EINVAL, "it is not a file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return content


def parse_json(content: bytes) -> Any:
    """Parses JSON as the standard has it: no key twice, and no number that is none or too large.

    Raises:
        ValueError: it is not JSON, or one of these.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
        return table

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text[:60]} is not a finite number")
        return float(text)

    return json.loads(
        content.decode("utf-8"), object_pairs_hook=once, parse_float=finite, parse_constant=finite
    )
