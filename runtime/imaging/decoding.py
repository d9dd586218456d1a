"""Decodes sources into upright images: checks limits first, and repairs damage where that is safe.

While it is read, a picture takes at most 40 bytes of memory for each of its pixels (10 where it is plain
RGB), twice the size of its file, and 128 MB for texts and tables. Pixels are counted before they are decoded.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from runtime.errors import InputError, warn
from runtime.imaging.decoding_cost import check_cost
from runtime.imaging.formats import READABLE_FORMATS, refusal_of_format
from runtime.imaging.mending import JPEG_START, PNG_SIGNATURE, jpegs_with_end, without_text
from runtime.imaging.sources import PictureLike, described, read_source
from runtime.imaging.value_range import to_8_bits

MAX_PIXELS = 100_000_000
"""Largest picture that is decoded; 100 megapixels take 300 MB."""
MAX_SIDE = 65_535
"""Longest side, that of a JPEG: making a picture square takes memory by its side, not by its area."""

UPRIGHT = 1
"""The EXIF orientation of a picture that is stored as it is shown."""
FIRST_SWAPPED = 5
"""EXIF orientations from this one on swap width and height."""

_UNDONE, _DEEP = "orientation that was undone", "more than 8 bits for each value"
"""Keys of an image's `info`."""

_16_BITS = ";16"
"""Part of the name that Pillow gives to such values in a file."""
_COLOURS = ("RGB", "RGBX", "RGBA", "RGBa")
"""Those of them that can be read in either byte order."""
_FACTORS = {"1": 255, "L;2": 85, "L;4": 17}
"""By which Pillow multiplies the values of a grey picture, and not its transparent one."""

_LOSSY_FORMATS = ("JPEG", "MPO", "AVIF")
_LOSSLESS_WEBP = b"VP8L"
_PREVIEWS = "MPO"
"""Format whose further pictures are previews, or the depth, of its first."""
_DARK = 64
"""High bytes of 16-bit colours below it: the picture fills 14 bits at most."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class Decoded:
    """A loaded image of 8 bits for each channel, upright."""

    image: Image.Image
    stored: Image.Image
    """The image as it lies in the file, whose EXIF is untouched."""
    orientation: int
    """In which it is stored, as EXIF counts."""
    exact: bool
    """Whether no lossy format has changed the values."""
    deep: bool
    """Whether the file has more than 8 bits for each value."""


class _Quiet:
    """Ignores Pillow's warnings while any thread is inside; `warnings.catch_warnings` is for one thread.

    They are of large pictures, which have a limit of their own, and of damage that can be read over.
    """

    _FILTER = ("ignore", None, Warning, re.compile(r"PIL\.\w"), 0)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                warnings.filterwarnings("ignore", module=self._FILTER[3].pattern)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            filters: Any = warnings.filters
            if not self._inside and self._FILTER in filters:
                filters.remove(self._FILTER)


QUIET = _Quiet()
"""Goes around everything that has Pillow read a file."""


def decode(source: PictureLike, name: str, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decodes an image: of any mode and depth, lacking its end, or turned by EXIF.

    Args:
        source: where the picture is.
        name: what to call it in an error.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        InputError: it is not a picture, is damaged, or is too large.
    """
    with QUIET:
        return _decode(source, name, max_pixels)


def size_in_head(source: Path | bytes) -> tuple[int, int] | None:
    """Returns the size (width, height) of an upright picture, from the head of its file; None if that cannot
    be read."""
    try:
        with QUIET, Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            turned = _orientation(image) >= FIRST_SWAPPED
            return (image.height, image.width) if turned else image.size
    except Exception:
        # on a damaged file Pillow's readers raise almost any class there is
        return None


def _decode(source: PictureLike, name: str, max_pixels: int) -> Decoded:
    where, found = described(source, name), read_source(source, name)
    if isinstance(found, Image.Image):
        stored, lossy_webp = _loaded(found, where), False
    else:
        stored = _decode_file(found, where, max_pixels)
        lossy_webp = stored.format == "WEBP" and _LOSSLESS_WEBP not in found[:64]
        if _has_several(found):
            warn(f"{where} has more than one picture: the first is used")
    exact = not lossy_webp and stored.format not in _LOSSY_FORMATS
    image = stored
    if image.mode.startswith("I") or image.mode == "F":
        levels, clear = np.asarray(image), stored.info.get("transparency")
        values, guess = to_8_bits(levels, where)
        if guess:
            warn(f"{where} {guess}")
        image = Image.fromarray(values)
        if isinstance(clear, int):
            image.putalpha(Image.fromarray((levels != clear) * np.uint8(255)))
    elif image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    orientation, undone = _orientation(stored), stored.info.get(_UNDONE, UPRIGHT)
    return Decoded(
        turned(image, orientation),
        stored,
        undone if orientation == UPRIGHT else orientation,
        exact,
        stored.info.get(_DEEP, False),
    )


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Returns the image upright, of one that is stored in an EXIF orientation."""
    return image if orientation == UPRIGHT else image.transpose(_TURNS[orientation])


def upright(image: Image.Image) -> Image.Image:
    """Returns a loaded image turned as its EXIF says."""
    return turned(image, _orientation(image))


def _loaded(image: Image.Image, where: str) -> Image.Image:
    """Returns a caller's own image, which may not be loaded yet."""
    try:
        _load_pixels(image)
    except Exception as error:
        raise InputError(f"{where} is a Pillow image that is closed, damaged or cut short") from error
    if not image.width or not image.height:
        raise InputError(f"{where} has no pixels: it is {image.width} x {image.height}")
    return image


def _decode_file(content: bytes, where: str, max_pixels: int) -> Image.Image:
    try:
        return _load(content, where, max_pixels)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{where} needs more memory to decode than there is") from error
    except Exception as error:
        # on a damaged file Pillow's readers raise almost any class there is
        mended = _mended(content, where, max_pixels)
        if mended is None:
            raise InputError(f"{where} {refusal_of_format(content)}") from error
        return mended


def _load(content: bytes, where: str, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=READABLE_FORMATS)
    except Image.DecompressionBombError as error:
        raise InputError(f"{where} has more than {max_pixels:,} pixels, the most that are decoded") from error
    _check_size(image, where, max_pixels)
    check_cost(image, content, where)
    kind = _kind_in_file(image)
    _load_pixels(image)
    _scale_transparent_colour(image, kind)
    return _with_all_bits(image, content, where)


def _has_several(content: bytes) -> bool:
    """Returns whether a file has frames or pages after its first picture."""
    try:
        with Image.open(io.BytesIO(content), formats=READABLE_FORMATS) as image:
            return image.format != _PREVIEWS and getattr(image, "is_animated", False)
    except Exception:
        # damage behind the first picture, or before it in a file that was mended
        return False


def _kind_in_file(image: Image.Image) -> str:
    """Returns what the values of an image that is not loaded are in its file, as Pillow calls it, like
    "RGB;16B"; empty if unknown."""
    tiles = getattr(image, "tile", [])
    return _kind_of(tiles[0]) if tiles else ""


def _kind_of(tile: Any) -> str:
    kind = tile[3] if isinstance(tile[3], str) else (tile[3] or ("",))[0]
    return kind if isinstance(kind, str) else ""


def _scale_transparent_colour(image: Image.Image, kind: str) -> None:
    """Scales the transparent colour of a PNG to 8 bits, as its pixels are."""
    colour = image.info.get("transparency")
    if isinstance(colour, int) and kind in _FACTORS:
        image.info["transparency"] = min(colour * _FACTORS[kind], 255)
    elif isinstance(colour, tuple) and _16_BITS in kind:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _load_pixels(image: Image.Image) -> None:
    """Loads an image, and notes its depth, and the orientation that Pillow undoes by itself: that of a
    TIFF."""
    deep = _16_BITS in _kind_in_file(image)
    orientation = _orientation(image)
    image.load()
    if deep:
        image.info[_DEEP] = True
    if _orientation(image) != orientation:
        image.info[_UNDONE] = orientation


def _check_size(image: Image.Image, where: str, max_pixels: int) -> None:
    """Refuses an image before it is decoded; so that one small file cannot take all memory.

    Raises:
        InputError: it has too many pixels, or a side that is too long.
    """
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"{where} is {width} x {height}: more than {max_pixels:,} pixels, the most that are decoded"
        )
    if max(width, height) > MAX_SIDE:
        raise InputError(f"{where} is {width} x {height}: a side may have at most {MAX_SIDE:,} pixels")


def _mended(content: bytes, where: str, max_pixels: int) -> Image.Image | None:
    """Returns the picture of a file that Pillow refuses, if all of it is there."""
    try:
        if content.startswith(PNG_SIGNATURE):
            lean, profile = without_text(content)
            if len(lean) == len(content):
                return None
            image = _load(lean, where, max_pixels)
            if profile:
                image.info["icc_profile"] = profile
            return image
        ended = jpegs_with_end(content) if content.startswith(JPEG_START) else None
        if ended is None:
            return None
        image, filled = (_load(jpeg, where, max_pixels) for jpeg in ended)
    except InputError:
        raise
    except Exception:
        return None
    if not np.array_equal(np.asarray(image), np.asarray(filled)):
        return None
    warn(f"{where} is truncated, but all of the picture is there, and it is read")
    return image


def _with_all_bits(image: Image.Image, content: bytes, where: str) -> Image.Image:
    """Returns the image with a range found by rule, if its colours have 16 bits and fill far fewer.

    Of such colours Pillow keeps the high bytes. Read in the other byte order, it keeps the low ones. A
    picture with a transparent colour stays as it is, as that is known by the high bytes alone.
    """
    high = np.asarray(image)
    if image.mode not in ("RGB", "RGBA") or "transparency" in image.info:
        return image
    if high[..., :3].max(initial=0) >= _DARK:
        return image
    with Image.open(io.BytesIO(content), formats=READABLE_FORMATS) as again:
        swapped = [_in_other_order(tile) for tile in getattr(again, "tile", [])]
        if not swapped or None in swapped:
            return image
        again.tile = swapped
        low = np.asarray(again)
    values, guess = to_8_bits(high[..., :3] * np.uint16(256) + low[..., :3], where)
    if guess:
        warn(f"{where} {guess}")
    image.paste(Image.fromarray(np.concatenate([values, high[..., 3:]], axis=2)))
    return image


def _in_other_order(tile: Any) -> Any:
    """Returns a tile of 16-bit colours that is read in the other byte order; None if it is another."""
    colours, sixteen, order = _kind_of(tile).partition(_16_BITS)
    if not sixteen or colours not in _COLOURS:
        return None
    other = f"{colours}{_16_BITS}{'L' if order == 'B' else 'B'}"
    swapped = (*tile[:3], other if isinstance(tile[3], str) else (other, *tile[3][1:]))
    # a named tuple from Pillow 11 on
    return type(tile)(*swapped) if hasattr(tile, "_fields") else swapped


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        # damaged EXIF data does not make the pixels unusable; Pillow raises almost any class there is on it
        return UPRIGHT
    return orientation if orientation in _TURNS else UPRIGHT
