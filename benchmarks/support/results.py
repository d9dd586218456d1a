"""Results files: JSON, refused before the work if they could not be written after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from engines.files import write_text
from runtime.errors import InputError


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
