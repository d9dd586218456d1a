"""Where this package keeps what the next start need not work out again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """`anydoor` in ANYDOOR_CACHE, in XDG_CACHE_HOME, or in ~/.cache; it need not exist.

    None if nobody can tell where the user's home is.
    """
    root = os.environ.get("ANYDOOR_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "anydoor"
    except RuntimeError:
        return None
