"""A hash of the code that makes checkpoints and bundles; when it changes, older ones are out of date."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHECKPOINT_SOURCES = ("benchmarks/seeded.py", "training/network/**/*.py", "runtime/diffusion/**/*.py")
"""Globs, relative to the repository, of what determines a seeded checkpoint."""

BUNDLE_SOURCES = (*CHECKPOINT_SOURCES, "engines/**/*.py", "export/**/*.py")
"""The same for a bundle of it."""


def fingerprint(patterns: tuple[str, ...] = BUNDLE_SOURCES, root: Path = ROOT) -> str:
    """Hash the files that some globs match, names and content.

    Args:
        patterns: globs relative to `root`.
        root: folder of the repository.

    Returns:
        12 hexadecimal digits that change with every file that is added, removed, renamed or edited.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]
