"""Writes files and folders atomically."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LONGEST_NAME = 40
"""Characters of a name that the names beside it begin with: of its 255 bytes, each may take 4."""

_UMASK = os.umask(0o077)
os.umask(_UMASK)
"""What is taken from the rights of new files. Asked for once: asking sets it, also for other threads."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2: <fcntl.h>, <linux/fs.h>."""

_PARTIAL = r"\d+-[0-9a-f]{8}\.partial"
"""What the names of `partial_path` end with; a regular expression."""

_HELD: set[int] = set()
"""Open files whose locks this process holds."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path`; what is written there takes its place when the block ends without an
    error.

    Works for a file and for a folder. A file keeps the rights that it has; what is new gets those of any new
    file. After an error `path` is as it was before; a folder that is complete and cannot take its place is
    kept beside it, and the error says where. Where `path` is a symbolic link, what the link leads to is
    replaced. The folder that holds it is made if it does not exist.

    Args:
        path: the file or folder to write.

    Raises:
        OSError: the place cannot be written.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    rights = stat.S_IMODE(path.stat().st_mode) if path.is_file() else 0o666 & ~_UMASK
    try:
        yield partial
        for each in partial.rglob("*") if partial.is_dir() else [partial]:
            if each.is_file() and not each.is_symlink():
                # as any file: ONNX and safetensors would let its owner alone read it
                each.chmod(rights)
        if partial.is_dir():
            _replace_folder(partial, path)
        else:
            partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextmanager
def only_writer(path: str | Path) -> Iterator[None]:
    """Keeps other processes that ask for it from writing a folder, and removes what killed ones have left.

    That is what `replacing` was writing: in place of the folder, or of a file in it. The lock ends with the
    process, however that ends.

    Raises:
        BlockingIOError: another process writes it; says which.
        OSError: there can be no lock file beside it.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        _put_back(path)
        _remove_partials(path.parent, re.escape(_beside(path)))
        if path.is_dir():
            _remove_partials(path, r"\..+\.")
        yield


def put_back(path: str | Path) -> None:
    """Puts back the old folder where a process was killed between taking it away and placing the new one."""
    path = Path(os.path.realpath(path))
    if _old(path).is_dir():
        with suppress(OSError), _lock(path):
            _put_back(path)


def partial_path(path: Path) -> Path:
    """Returns a path beside a file or folder that no other process and no other call has."""
    return path.with_name(f"{_beside(path)}{os.getpid()}-{os.urandom(4).hex()}.partial")


def is_partial(name: str) -> bool:
    """Returns whether a name is that of what a killed process was writing; see `partial_path`."""
    return re.fullmatch(r"\..+\." + _PARTIAL, name, re.DOTALL) is not None


def write_bytes(path: str | Path, content: bytes | memoryview) -> None:
    """Writes a file as a whole; see `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file as a whole, in UTF-8; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


def _beside(path: Path) -> str:
    """Returns the prefix of the hidden files beside a path."""
    name = path.name
    if len(name) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME - 9] + "-" + hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f".{name}."


def _old(path: Path) -> Path:
    """Returns the path of a folder while another takes its place."""
    return path.with_name(f"{_beside(path)}old")


def _put_back(path: Path) -> None:
    if path.exists():
        shutil.rmtree(_old(path), ignore_errors=True)
    elif _old(path).is_dir():
        _old(path).rename(path)


def _remove_partials(folder: Path, prefix: str) -> None:
    """Removes what `partial_path` has named in a folder; `prefix` is a regular expression."""
    partial = re.compile(prefix + _PARTIAL, re.DOTALL)
    for left in filter(lambda left: partial.fullmatch(left.name), folder.iterdir()):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _replace_folder(partial: Path, path: Path) -> None:
    """Puts a complete folder in the place of another.

    Raises:
        OSError: the other cannot be moved away: it is a mount point, or belongs to a lower layer of
            overlayfs, as in a container's image. The new one is kept; says where.
    """
    try:
        if not path.exists():
            partial.rename(path)
        elif not _exchange(partial, path):
            shutil.rmtree(_old(path), ignore_errors=True)
            path.rename(_old(path))
            try:
                partial.rename(path)
            except OSError:
                _old(path).rename(path)
                raise
            shutil.rmtree(_old(path), ignore_errors=True)
    except OSError as error:
        # under another name: the next writer removes what is named like an unfinished folder
        kept = path.with_name(partial.name.removeprefix(".").removesuffix("partial") + "new")
        partial.rename(kept)
        what = f"{error.strerror}; the new one is complete, at '{kept}'"
        raise OSError(error.errno, what, str(path)) from error


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two paths, so that there is something at each at all times; False where that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    return rename is not None and rename(*arguments) == 0


def _is_open_as(path: Path, file: int) -> bool:
    """Returns whether an open file is the one that is at a path."""
    with suppress(FileNotFoundError):
        return file >= 0 and os.path.samestat(os.stat(path), os.fstat(file))
    return False


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # not a POSIX system: nothing is locked
        yield
        return
    lock = path.with_name(f"{_beside(path)}lock")
    file = -1
    # the one before removes the file when it is done: whoever waits with that one has no lock
    while not _is_open_as(lock, file):
        if file >= 0:
            os.close(file)
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            flock(file, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(file, 20).decode() or "another process"
            os.close(file)
            raise BlockingIOError(error.errno, f"{owner} is writing there", str(path)) from error
    _HELD.add(file)
    try:
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()}".encode())
        yield
    finally:
        lock.unlink(missing_ok=True)
        _HELD.discard(file)
        os.close(file)


def _let_go() -> None:
    """Closes the locks of a parent in a process that it forked: they are to end with the parent."""
    for file in _HELD:
        os.close(file)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
