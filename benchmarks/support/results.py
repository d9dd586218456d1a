"""Results files: JSON, refused before the work if they could not be written after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from engines.files import write_text
from runtime.errors import InputError

RESULTS = Path(__file__).resolve().parents[1] / "results"
"""The results that are kept with the code."""

_EARLIER_WORDS = {
    '"solver"': '"sampler"',
    '"dpm2m': '"dpm_solver_2m',
    '"subject"': '"contender"',
    '"dtype"': '"precision"',
    '"float32"': '"fp32"',
    '"float16"': '"fp16"',
    '"bfloat16"': '"bf16"',
}
"""Word of an earlier results file -> the word of today."""


def require_writable(path: Path) -> None:
    """Make the folder of a file that is to be written.

    Raises:
        InputError: the file could not be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror or error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write '{path}': it is a folder, or its folder is read-only")


def write_results(path: Path, content: Any) -> None:
    """Write a results file as a whole.

    Args:
        path: a .json file.
        content: what `json` can write.
    """
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_results(name: str) -> dict[str, Any]:
    """Read a kept results file, in the words of today, by its name without the suffix."""
    text = (RESULTS / f"{name}.json").read_text("utf-8")
    for before, now in _EARLIER_WORDS.items():
        text = text.replace(before, now)
    found: dict[str, Any] = json.loads(text)
    return found
