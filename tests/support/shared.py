"""What tests make once and share, in build/: whoever comes first makes it while the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.support.fingerprint import fingerprint

ROOT = Path(__file__).parents[2]


def shared_folder() -> Path:
    """A folder for this version of the code."""
    return ROOT / "build" / "tests" / fingerprint()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Lets one of the parallel test processes build while the others wait."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
