"""Reads the arrays of an .npz file that nobody vouches for: nothing is read before its size is known."""

from __future__ import annotations

import io
import math
import zipfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGEST = 64 << 20
_MOST = 64


def read_arrays(content: bytes) -> dict[str, NDArray[Any]]:
    """Returns name -> array, of finite numbers.

    Args:
        content: of the file.

    Raises:
        ValueError: it is damaged, has more than 64 arrays or 64 MiB, or holds something else than numbers.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) > _MOST or sum(member.file_size for member in members) > _LARGEST:
                raise ValueError(f"it has more than {_MOST} arrays or {_LARGEST >> 20} MiB")
            return {member.filename.removesuffix(".npy"): _read(archive, member) for member in members}
    except Exception as error:  # of zipfile, zlib, and of Python's tokenizer, which numpy reads headers with
        raise ValueError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{member.filename} is not in version 1.0 of numpy's format")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        stored = member.file_size - file.tell()
        if dtype.kind not in "fiu" or math.prod(shape) * dtype.itemsize != stored:
            raise ValueError(f"{member.filename} does not hold the numbers that its header tells of")
        array = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran_order else "C")
    if not np.isfinite(array).all():
        raise ValueError(f"{member.filename} has numbers that are not finite")
    return np.array(array)
