"""The user's cache folder: what is no longer used leaves it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from engines.cache_folder import UNUSED_DAYS, mark_used

DAY = 24 * 3600.0


def keep(place: Path, days_ago: float) -> Path:
    """A file, or a folder with one in it, last used so long ago."""
    if place.suffix:
        place.write_bytes(b"kernels")
    else:
        place.mkdir()
        (place / "graph.blob").write_bytes(b"graph")
    then = time.time() - days_ago * DAY
    os.utime(place, (then, then))
    return place


def test_what_nobody_used_for_long_is_thrown_away(tmp_path: Path) -> None:
    unused = [keep(tmp_path / name, UNUSED_DAYS + 1) for name in ("folder", "file.jit")]
    recent = [keep(tmp_path / name, UNUSED_DAYS - 1) for name in ("other", "other.jit")]
    used = keep(tmp_path / "used", days_ago=2 * UNUSED_DAYS)
    before = time.time()
    mark_used(used)
    assert used.stat().st_mtime >= before - 1
    assert sorted(tmp_path.iterdir()) == sorted([*recent, used])
    assert not any(place.exists() for place in unused)


def test_a_folder_that_is_gone_does_no_harm(tmp_path: Path) -> None:
    mark_used(tmp_path / "gone" / "graph")
    assert not list(tmp_path.iterdir())
