"""Pictures and masks, in and out: any common file or array to RGB uint8, bounded before it is decoded."""

from __future__ import annotations

import errno
import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from engines.files import write_bytes
from runtime.errors import InputError
from runtime.imaging.decoding_cost import check_cost

MAX_FILE_BYTES = 256 * 1024 * 1024
MAX_PIXELS = 100_000_000
"""Largest picture that is decoded; 100 megapixels take 300 MB."""
MAX_SIDE = 65_535
"""Longest side, that of a JPEG: making a picture square takes memory by its side, not by its area."""

READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
WRITABLE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LARGEST_SIDES = {"JPEG": 65_500, "WEBP": 16_383}
"""In pixels, as libjpeg and the WebP container have it; a PNG has no such limit in practice."""

MASK_THRESHOLD = 128
"""A pixel of a mask or of an alpha channel (0..255) is covered above this value, as in the original."""

PictureLike = str | Path | bytes | Image.Image | NDArray[np.uint8]
"""A file, the bytes of one, a Pillow image, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture."""

    rgb: NDArray[np.uint8]
    """(H, W, 3), upright."""
    alpha: NDArray[np.uint8] | None
    """(H, W) opacity, if the picture has any transparency."""


def load_picture(source: PictureLike, name: str, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decodes a picture: greyscale, palette, 16-bit, CMYK, transparent or turned by EXIF.

    Args:
        source: where the picture is.
        name: what to call it in an error, as the caller named it.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        InputError: it is not a picture, is damaged, or is too large.
    """
    image = _upright(_decode(source, name, max_pixels))
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if not has_alpha:
        return Picture(np.asarray(image.convert("RGB")), None)
    rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3]
    return Picture(np.ascontiguousarray(rgba[..., :3]), None if (alpha == 255).all() else alpha)


def load_mask(
    source: PictureLike | NDArray[Any], name: str, max_pixels: int = MAX_PIXELS
) -> NDArray[np.bool_]:
    """A mask (H, W): first channel above 128, or not 0 where no value exceeds 1.

    Args:
        source: a picture, or an array of bool or of 0 and 1.
        name: what to call it in an error.
        max_pixels: see `load_picture`.

    Raises:
        InputError: it is not a picture, is damaged, or is too large.
    """
    if isinstance(source, np.ndarray) and source.dtype == np.bool_:
        source = source.astype(np.uint8)
    values = load_picture(source, name, max_pixels).rgb[..., 0]
    return values > (MASK_THRESHOLD if values.max() > 1 else 0)


def mask_from_alpha(alpha: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The mask of a picture's opaque part, as the original takes it: more than 128."""
    return alpha > MASK_THRESHOLD


def encode_picture(image: NDArray[np.uint8], file_format: str) -> bytes:
    """The bytes of a picture file.

    Args:
        image: (H, W, 3) uint8 RGB.
        file_format: PNG, JPEG or WEBP.
    """
    buffer = io.BytesIO()
    settings = {
        "PNG": {"compress_level": 6},
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"quality": 95},
    }
    Image.fromarray(image).save(buffer, file_format, **settings[file_format])
    return buffer.getvalue()


def format_of(path: Path) -> str:
    """The format that a file name asks for.

    Raises:
        InputError: none that can be written.
    """
    if path.suffix.lower() not in WRITABLE_FORMATS:
        raise InputError(f"cannot write '{path}': its name must end in {', '.join(WRITABLE_FORMATS)}")
    return WRITABLE_FORMATS[path.suffix.lower()]


def check_size(size: tuple[int, int], path: Path) -> None:
    """Refuses a file name whose format cannot hold a picture of some size, (width, height) in pixels.

    Raises:
        InputError: the picture is too large for the format, or the name has no known ending.
    """
    largest = _LARGEST_SIDES.get(format_of(path), max(size))
    if max(size) > largest:
        raise InputError(
            f"cannot write '{path}': the picture has {size[0]} x {size[1]} pixels, and {format_of(path)} "
            f"holds sides of {largest:,} at most: write a .png"
        )


def save_picture(image: NDArray[np.uint8], path: str | Path) -> None:
    """Writes a picture beside its place, then renames it: nobody sees half a file.

    Raises:
        InputError: the name has no known ending, its format cannot hold the picture, or the place cannot be
            written to.
    """
    path = Path(path)
    check_size((image.shape[1], image.shape[0]), path)
    content = encode_picture(image, format_of(path))
    if not path.parent.is_dir():
        raise InputError(f"cannot write '{path}': {os.strerror(errno.ENOENT)}")
    try:
        write_bytes(path, content)
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror}") from error


def sheet_size(size: tuple[int, int], count: int, gap: int = 8) -> tuple[int, int]:
    """(width, height) of the contact sheet of so many pictures of a size (width, height)."""
    columns = _columns(count)
    rows = -(-count // columns)
    return columns * (size[0] + gap) - gap, rows * (size[1] + gap) - gap


def contact_sheet(images: list[NDArray[np.uint8]], gap: int = 8) -> NDArray[np.uint8]:
    """Pictures of one size in a near-square grid on white."""
    columns = _columns(len(images))
    height, width = images[0].shape[:2]
    sheet_width, sheet_height = sheet_size((width, height), len(images), gap)
    sheet = np.full((sheet_height, sheet_width, 3), 255, np.uint8)
    for index, image in enumerate(images):
        y, x = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet


def _columns(count: int) -> int:
    """Columns of a near-square grid."""
    return int(np.ceil(np.sqrt(count)))


def _decode(source: PictureLike, name: str, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    where = name if isinstance(source, bytes) else f"{name} '{source}'"
    content = source if isinstance(source, bytes) else _read(Path(source), where)
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{where} has {len(content)} bytes; at most {MAX_FILE_BYTES} are read")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures; the limit below is the one that counts
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=READABLE_FORMATS)
    except Image.DecompressionBombError as error:
        raise InputError(f"{where} has more than {max_pixels:,} pixels, the most that are decoded") from error
    except Exception as error:
        # on a damaged file Pillow's readers raise almost any class there is
        raise InputError(f"{where} is not a picture ({', '.join(READABLE_FORMATS)} are read)") from error
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"{where} is {width} x {height}: more than {max_pixels:,} pixels, the most that are decoded"
        )
    if max(width, height) > MAX_SIDE:
        raise InputError(f"{where} is {width} x {height}: a side may have at most {MAX_SIDE:,} pixels")
    check_cost(image, content, where)
    try:
        image.load()
    except MemoryError as error:
        raise InputError(f"{where} takes more memory to decode than there is") from error
    except Exception as error:
        raise InputError(f"{where} is damaged or cut short") from error
    return image


def _read(path: Path, where: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {where}: {error.strerror}") from error


def _from_array(array: NDArray[np.uint8], name: str) -> Image.Image:
    channels = array.shape[2:]
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or channels not in ((), (3,), (4,))
        or not array.size
    ):
        raise InputError(
            f"{name} must be an array (H, W), (H, W, 3) or (H, W, 4) of uint8, "
            f"not {array.dtype} of shape {array.shape}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # damaged EXIF data, for which Pillow raises almost any class, does not make the pixels unusable
        return image


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit greyscale keeps its top 8 bits; Pillow would clip it to white."""
    values = values.astype(np.float64)
    scale = 257.0 if values.max(initial=0) > 255 else 1.0
    return np.clip(values / scale, 0, 255).astype(np.uint8)
