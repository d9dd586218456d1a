"""Checks that an output can be written before the work; if writing fails afterwards, no picture is lost."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.files import partial_path
from runtime.cli.standard_streams import STREAM, write_standard_output
from runtime.errors import InputError
from runtime.imaging.pictures import encode_picture, save_picture


def check_place(path: Path) -> None:
    """Refuses a file that could not be written, by writing beside it. Makes no folder yet.

    Raises:
        InputError: says why.
    """
    try:
        _try_place(path)
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror}") from error


def _try_place(path: Path) -> None:
    real = Path(os.path.realpath(path))
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        pass
    else:
        if not stat.S_ISREG(mode):
            raise OSError(errno.EISDIR, "it is a folder" if stat.S_ISDIR(mode) else "it is not a file")
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, "it may not be written to")
    folder = next(folder for folder in real.parents if os.path.lexists(folder))
    if not folder.is_dir():
        raise OSError(errno.ENOTDIR, f"'{folder}' is not a folder")
    for name in real.relative_to(folder).parts:
        with suppress(FileNotFoundError):
            os.lstat(folder / name)  # refuses a name that is too long
    trial = partial_path(folder / real.name)
    os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    trial.unlink()


def save_pictures(
    pictures: Iterable[tuple[NDArray[np.uint8], Path]],
    *metadata: Any,
    on_saved: Callable[[Path], object] = lambda path: None,
) -> None:
    """Writes every picture: at its place, whose folder is made, or else at another.

    Args:
        pictures: with their places, of which one may be standard output.
        metadata: see `save_picture`.
        on_saved: called with each place as soon as its picture is there.

    Raises:
        InputError: one could not be written at its place; says why, and where it is.
    """
    failed = []
    for image, path in pictures:
        try:
            if path == STREAM:
                write_standard_output(encode_picture(image, "PNG", *metadata))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_picture(image, path, *metadata)
        except Exception as error:
            # an encoder raises almost any class there is
            reason = error if isinstance(error, InputError) else f"cannot write '{path}': {error}"
            kept = _keep(image, path, *metadata)
            where = f"the picture is kept as '{kept}'" if kept else "no other place could keep the picture"
            failed.append(f"{reason}; {where}")
        else:
            on_saved(path)
    if failed:
        raise InputError("; ".join(failed))


def _keep(image: NDArray[np.uint8], path: Path, *metadata: Any) -> Path | None:
    """Writes a picture where it can be, as a PNG; None if that is nowhere."""
    import tempfile

    for folder in (tempfile.gettempdir, Path.cwd, Path.home):
        try:
            kept = partial_path(Path(folder()) / path.stem).with_suffix(".png")
            kept = kept.with_name(f"anydoor{kept.name}")
            save_picture(image, kept, *metadata)
            return kept
        except Exception:
            continue  # the next place
    return None
