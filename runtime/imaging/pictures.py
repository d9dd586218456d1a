"""Reads and writes pictures: any common file or array to RGB uint8 and back, with metadata."""

from __future__ import annotations

import errno
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from engines.files import write_bytes
from runtime.errors import InputError, warn
from runtime.imaging.colour_profile import ProfileError, to_srgb
from runtime.imaging.decoding import FIRST_SWAPPED, MAX_PIXELS, QUIET, Decoded, decode
from runtime.imaging.formats import HAS_AVIF
from runtime.imaging.masks import has_transparency, in_rgb, opacity
from runtime.imaging.mending import MAX_PROFILE_BYTES
from runtime.imaging.picture import MAX_EXIF_BYTES, NO_METADATA, Metadata, Picture
from runtime.imaging.sources import PictureLike

WRITABLE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"} | (
    {".avif": "AVIF"} if HAS_AVIF else {}
)
_LARGEST_SIDES = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 32_768}
"""In pixels, as libjpeg, the WebP container and libavif's readers have it; a PNG has no such limit in
practice."""
_SETTINGS: dict[str, dict[str, Any]] = {
    "PNG": {"compress_level": 6},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}

BACKGROUND = 255
"""White: what lies behind a transparent picture where there is no transparency."""

_MAX_DPI = 65_535
_NEARLY_BLACK = 8
_KINDS = {"1": "black and white", "L": "grey", "LA": "grey", "CMYK": "CMYK", "LAB": "Lab", "YCbCr": "YCbCr"}
_TIFF_TAGS = (
    *(ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Software),
    *(ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright),
)
"""Tags of a TIFF that describe the picture, not the file."""


def load_picture(source: PictureLike, name: str, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decodes a picture: greyscale, palette, 16-bit, CMYK, transparent, with a profile, or turned by EXIF.

    Args:
        source: where the picture is.
        name: what to call it in an error, as the caller named it.
        max_pixels: a larger picture is refused before it is decoded.

    Raises:
        InputError: it is not a picture, is damaged, or is too large.
    """
    if isinstance(source, Picture):
        return source
    decoded = decode(source, name, max_pixels)
    image = decoded.image
    kind = _KINDS.get(image.mode, "")
    alpha = opacity(image) if has_transparency(image) else None
    if alpha is not None and (alpha == 255).all():
        alpha = None
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("L") if image.mode.startswith("L") else in_rgb(image)
    profile = decoded.stored.info.get("icc_profile")
    srgb = _in_srgb(image, profile, name) if isinstance(profile, bytes) and profile else None
    if kind:
        own = rgb = np.asarray(image.convert("RGB") if srgb is None else srgb)
    else:
        own = np.asarray(image)
        rgb = own if srgb is None or srgb is image else np.asarray(srgb)
    if 0 < rgb.max() < _NEARLY_BLACK:
        warn(f"{name} is nearly black: the largest of its values is {rgb.max()} of 255")
    metadata = Metadata(
        profile if srgb is not None and not kind else None, _exif(decoded, name), _dpi(decoded)
    )
    return Picture(rgb, alpha, own, metadata, kind, decoded.orientation, decoded.deep)


def encode_picture(image: NDArray[np.uint8], file_format: str, metadata: Metadata = NO_METADATA) -> bytes:
    """Returns the bytes of a picture file. Where the format has no transparency, the picture is put on white.

    Args:
        image: (H, W, 3) uint8 RGB or (H, W, 4) RGBA.
        file_format: PNG, JPEG, WEBP or AVIF.
        metadata: what the file says of it.
    """
    if file_format == "JPEG" and image.shape[2] == 4:
        warn("a JPEG has no transparency: the picture is put on white; PNG and WebP keep transparency")
        image = on_white(image[..., :3], image[..., 3])
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format, **_SETTINGS[file_format], **metadata.info)
    return buffer.getvalue()


def encode_mask(mask: NDArray[np.bool_]) -> bytes:
    """Returns the bytes of a PNG file, white where a mask (H, W) is set."""
    buffer = io.BytesIO()
    Image.fromarray(mask * np.uint8(255)).save(buffer, "PNG")
    return buffer.getvalue()


def seen(picture: Picture) -> NDArray[np.uint8]:
    """Returns what networks see of a picture, (H, W, 3) in sRGB: its transparent parts are white."""
    return picture.rgb if picture.alpha is None else on_white(picture.rgb, picture.alpha)


def on_white(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns a transparent picture on `BACKGROUND`: (H, W, 3) of (H, W, 3) and its opacity (H, W)."""
    result = Image.new("RGB", (rgb.shape[1], rgb.shape[0]), (BACKGROUND,) * 3)
    result.paste(
        Image.fromarray(np.ascontiguousarray(rgb)), mask=Image.fromarray(np.ascontiguousarray(alpha))
    )
    return np.asarray(result)


def format_of(path: Path) -> str:
    """Returns the format that a file name asks for.

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
    try:
        check_format(size, format_of(path))
    except InputError as error:
        raise InputError(f"cannot write '{path}': {error}: write a .png") from error


def check_format(size: tuple[int, int], file_format: str) -> None:
    """Refuses a format that cannot hold a picture of some size, (width, height) in pixels.

    Raises:
        InputError: the picture is too large for it.
    """
    largest = _LARGEST_SIDES.get(file_format, max(size))
    if max(size) > largest:
        raise InputError(
            f"the picture has {size[0]} x {size[1]} pixels, but {file_format} allows sides of at most "
            f"{largest:,}"
        )


def save_picture(image: NDArray[np.uint8], path: str | Path, metadata: Metadata = NO_METADATA) -> None:
    """Writes a picture beside its place, then renames it: nobody sees half a file.

    Raises:
        InputError: the name has no known ending, its format cannot hold the picture, or the place cannot be
            written to.
    """
    path = Path(path)
    check_size((image.shape[1], image.shape[0]), path)
    content = encode_picture(image, format_of(path), metadata)
    if not path.parent.is_dir():
        raise InputError(f"cannot write '{path}': {os.strerror(errno.ENOENT)}")
    try:
        write_bytes(path, content)
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror}") from error


def sheet_size(size: tuple[int, int], count: int, gap: int = 8) -> tuple[int, int]:
    """Returns (width, height) of the contact sheet of so many pictures of a size (width, height)."""
    columns = _columns(count)
    rows = -(-count // columns)
    return columns * (size[0] + gap) - gap, rows * (size[1] + gap) - gap


def contact_sheet(images: list[NDArray[np.uint8]], gap: int = 8) -> NDArray[np.uint8]:
    """Returns pictures of one size, all RGB or all RGBA, in a near-square grid on white."""
    columns = _columns(len(images))
    height, width, channels = images[0].shape
    sheet_width, sheet_height = sheet_size((width, height), len(images), gap)
    sheet = np.full((sheet_height, sheet_width, channels), 255, np.uint8)
    for index, image in enumerate(images):
        y, x = (index // columns) * (height + gap), (index % columns) * (width + gap)
        sheet[y : y + height, x : x + width] = image
    return sheet


def _columns(count: int) -> int:
    """Columns of a near-square grid."""
    return int(np.ceil(np.sqrt(count)))


def _in_srgb(image: Image.Image, profile: bytes, name: str) -> Image.Image | None:
    """Returns the image by its profile; None, with a warning, if that cannot be used."""
    try:
        if len(profile) > MAX_PROFILE_BYTES:
            raise ProfileError(f"it has more than {MAX_PROFILE_BYTES} bytes")
        return to_srgb(image, profile)
    except ProfileError as error:
        warn(f"{name} has a colour profile that cannot be used ({error}): its colours are taken as sRGB")
        return None


def _exif(decoded: Decoded, name: str) -> bytes | None:
    """EXIF of the upright picture, without its thumbnail."""
    try:
        with QUIET:
            content = _upright_exif(decoded)
    except Exception:
        # in damaged EXIF data Pillow raises almost any class there is
        return None
    if content and len(content) > MAX_EXIF_BYTES:
        warn(f"{name} has {len(content):,} bytes of EXIF data, more than a JPEG can hold: they are dropped")
        return None
    return content


def _upright_exif(decoded: Decoded) -> bytes | None:
    stored, exif = decoded.stored, Image.Exif()
    if "exif" in stored.info:
        exif.load(stored.info["exif"])
    else:
        tags = stored.getexif()
        exif.update({tag: tags[tag] for tag in _TIFF_TAGS if tag in tags})
    exif.pop(ExifTags.Base.Orientation, None)
    if decoded.orientation >= FIRST_SWAPPED and ExifTags.IFD.Exif in exif:
        _swap_sides(exif.get_ifd(ExifTags.IFD.Exif))
    # the thumbnail is in a directory of its own, which Pillow does not write
    return exif.tobytes() if len(exif) else None


def _swap_sides(tags: dict[int, Any]) -> None:
    """Width for height, where EXIF says them."""
    sides = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
    if all(side in tags for side in sides):
        tags.update(zip(sides, [tags[side] for side in reversed(sides)]))


def _dpi(decoded: Decoded) -> tuple[float, float] | None:
    """Returns pixels per inch, if the file has any that make sense."""
    try:
        x, y = (float(value) for value in decoded.stored.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    # files that say nothing have 1 or 0 there
    if not all(math.isfinite(value) and 1 < value <= _MAX_DPI for value in (x, y)):
        return None
    return (y, x) if decoded.orientation >= FIRST_SWAPPED else (x, y)
