"""Caches files between runs, like hashes and compiled graphs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from pathlib import Path

from engines.files import write_bytes

UNUSED_DAYS = 90
"""Entries of bundles that were not opened for so long are removed."""


def cache_folder() -> Path | None:
    """`anydoor` in ANYDOOR_CACHE, in XDG_CACHE_HOME, or in ~/.cache; it need not exist.

    None if nobody can tell where the user's home is.
    """
    root = os.environ.get("ANYDOOR_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "anydoor"
    except RuntimeError:
        return None


def keep(path: Path, content: bytes | memoryview) -> None:
    """Writes a file for `kept` to read, with its hash; does nothing where that cannot be written."""
    with contextlib.suppress(OSError):
        write_bytes(path, hashlib.sha256(content).digest() + content)
        mark_used(path)


def kept(path: Path) -> bytes | None:
    """Reads what `keep` wrote; None if it is missing or damaged."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    if hashlib.sha256(stored[size:]).digest() != stored[:size]:
        return None
    mark_used(path)
    return stored[size:]


def mark_used(kept: Path) -> None:
    """Notes that a file or folder is of use, and throws away those beside it that were not for long.

    Does nothing where nothing can be written.

    Args:
        kept: one of several of its kind, which have a folder of the cache for themselves.
    """
    with contextlib.suppress(OSError):
        os.utime(kept)
        oldest = time.time() - UNUSED_DAYS * 24 * 3600
        for other in kept.parent.iterdir():
            if other.stat().st_mtime >= oldest:
                continue
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink()
