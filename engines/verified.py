"""Remembers which files were verified: reading a bundle of 10 GB to compare its hashes takes 10 s.

A small record in the user's cache folder says of every file what it was when its hash was compared: size,
times of its last change, inode, and the hash. Where all of that is as it was, the file is not read again.

The hashes are for what they always were for: they find copies that were cut short and files that were mixed
up. They do not protect from somebody who can write the bundle, since the manifest with the hashes lies in
it, and neither does the record. What the record cannot see is a disk that loses bits without a write, or a
program that keeps writing to a file that it has mapped. `anydoor doctor BUNDLE` reads all files anew, and so
does every load of a signed bundle (`engines.signature`), or where ANYDOOR_VERIFY is set.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.cache_folder import cache_folder
from engines.files import write_text

ALWAYS_VARIABLE = "ANYDOOR_VERIFY"
"""Set to anything, the record is not believed."""

RECORD = "verified.json"


@dataclass(frozen=True)
class FileState:
    """The identity of a file, and its expected hash."""

    path: str
    """Absolute, without symbolic links."""
    bytes: int
    modified_ns: int
    changed_ns: int
    """Change time of the inode. Copying programs can set the modification time, but not this one."""
    inode: int
    sha256: str

    @classmethod
    def of(cls, file: Path, sha256: str) -> FileState:
        """Returns a file as it is now.

        Take it before the file is read: if it changes meanwhile, what is recorded is no longer what it is.

        Args:
            file: which one.
            sha256: the hash it should have, hexadecimal.

        Raises:
            OSError: there is no such file, or it cannot be looked at.
        """
        path = file.resolve(strict=True)
        found = path.stat()
        return cls(str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, sha256)

    def is_verified(self) -> bool:
        """Returns whether exactly this was found sound before, and the file need not be read."""
        if os.environ.get(ALWAYS_VARIABLE):
            return False
        return _read(_record()).get(self.path) == asdict(self)

    def remember(self) -> None:
        """Records that this was found sound; does nothing where that cannot be written.

        Of what two programs record at the same time, one may get lost: that file is read once more.
        """
        record = _record()
        if record is None:
            return
        # what was removed or moved away would stay forever
        known = {path: entry for path, entry in _read(record).items() if os.path.exists(path)}
        known[self.path] = asdict(self)
        with contextlib.suppress(OSError):
            write_text(record, json.dumps(known, indent=1) + "\n")


def _record() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / RECORD


def _read(record: Path | None) -> dict[str, Any]:
    """Returns path -> what was recorded of it; empty if there is no record, or what is there is none."""
    try:
        content = json.loads(record.read_text("utf-8")) if record else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
