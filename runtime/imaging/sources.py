"""Reads picture sources: a file, its bytes, an open file, a Pillow image, an array, a tensor, or a decoded
picture."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import InputError, warn
from runtime.imaging.picture import Picture
from runtime.imaging.value_range import to_8_bits

MAX_FILE_BYTES = 256 * 1024 * 1024

_CHANNELS = (1, 3, 4)


class OpenFile(Protocol):
    """A file opened for reading bytes, or an `io.BytesIO`."""

    def read(self, size: int = ..., /) -> bytes:
        """At most `size` bytes."""


class Tensor(Protocol):
    """A `torch.Tensor`, on any device; torch itself is not needed."""

    def detach(self) -> Any:
        """Returns the values without their history."""


PictureLike = (
    str
    | os.PathLike[str]
    | bytes
    | bytearray
    | memoryview
    | OpenFile
    | Image.Image
    | NDArray[Any]
    | Tensor
    | Picture
)
"""A file's name, its bytes, an open file, a Pillow image, a decoded picture, or an array or tensor (H, W),
(H, W, C) or (C, H, W) with C of 1, 3 or 4: bool, integers of 8 or 16 bits, or floating point from 0 to 1 (see
`runtime.imaging.value_range`)."""


def read_source(source: PictureLike, name: str) -> bytes | Image.Image:
    """Reads a source: returns the bytes of a file, still encoded, or an image.

    Args:
        source: where the picture is.
        name: what to call it in an error.

    Raises:
        InputError: it cannot be read, or is nothing that a picture could come from.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Picture):
        image = Image.fromarray(source.pixels)
        image.info.update(source.metadata.info)
        return image
    if isinstance(source, bytes | bytearray | memoryview):
        return _bounded(bytes(source), name)
    if isinstance(source, str | os.PathLike):
        return _bounded(_read_file(Path(source), name), f"{name} '{os.fspath(source)}'")
    if hasattr(source, "read"):
        return _bounded(_read_open_file(source, name), name)
    if hasattr(source, "detach"):
        source = _array_of_tensor(source)
    if isinstance(source, np.ndarray):
        return _image_of_array(source, name)
    raise InputError(
        f"{name} must be a file, its bytes, a Pillow image, an array or a tensor, not {type(source).__name__}"
    )


def described(source: PictureLike, name: str) -> str:
    """Returns the name of a source for errors: its role and its file."""
    return f"{name} '{os.fspath(source)}'" if isinstance(source, str | os.PathLike) else name


def _bounded(content: bytes, where: str) -> bytes:
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{where} has {len(content)} bytes; at most {MAX_FILE_BYTES} are read")
    return content


def _read_file(path: Path, name: str) -> bytes:
    if web := re.match(r"(https?):/+(.*)", str(path)):
        address = "://".join(web.groups())
        raise InputError(f"{name} '{address}' is an address on the web: download it, and name the file")
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read {name} '{path}': {reason}") from error


def _read_open_file(file: Any, name: str) -> bytes:
    try:
        if file.seekable():
            file.seek(0)
        content = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"cannot read {name} from {type(file).__name__}: {error}") from error
    if not isinstance(content, bytes):
        raise InputError(f"{name} is a file opened as text: open it with mode 'rb'")
    return content


def _array_of_tensor(tensor: Any) -> NDArray[Any]:
    """Returns the values of a `torch.Tensor`; NumPy has no bfloat16."""
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor.float() if "bfloat16" in str(tensor.dtype) else tensor).numpy()
    return array


def _image_of_array(array: NDArray[Any], name: str) -> Image.Image:
    pixels = array
    if pixels.ndim == 3 and pixels.shape[0] in _CHANNELS and pixels.shape[2] > max(_CHANNELS):
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.shape[2:] == (1,):
        pixels = pixels[..., 0]
    if (
        pixels.shape[2:] not in ((), (3,), (4,))
        or pixels.ndim < 2
        or not pixels.size
        or pixels.dtype.kind not in "biuf"
    ):
        raise InputError(
            f"{name} must be an array (H, W), (H, W, 3) or (H, W, 4) of numbers, "
            f"not {array.dtype} of shape {array.shape}"
        )
    if pixels.dtype == np.bool_ and pixels.ndim == 3:
        pixels = pixels * np.uint8(255)
    if pixels.dtype not in (np.uint8, np.bool_):
        pixels, guess = to_8_bits(pixels, name)
        if guess:
            warn(f"{name} {guess}")
    return Image.fromarray(np.ascontiguousarray(pixels))
