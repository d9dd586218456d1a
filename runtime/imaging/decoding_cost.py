"""Estimates the cost of decoding from a file's header: a small file can take hours."""

from __future__ import annotations

import re

from PIL import Image

from runtime.errors import InputError

MAX_SCANS = 64
"""Most scans of a JPEG. Each visits all pixels; encoders write about ten (libjpeg's standard script has
10)."""
SMALL_TILE = 1 << 20
"""Pixels of a tile that are decoded whatever the size of the picture."""

_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF 6.0, section 15
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""A marker that ends coded data or begins a segment: no stuffed or fill byte, restart or start of image."""


def check_cost(image: Image.Image, content: bytes, where: str) -> None:
    """Refuses a picture that takes far more work or memory than its size tells.

    Args:
        image: opened, not decoded.
        content: its file.
        where: what to call it in an error.

    Raises:
        InputError: it has too many scans, or tiles that are larger than the picture.
    """
    if image.format in ("JPEG", "MPO"):
        scans = count_scans(content)
        if scans > MAX_SCANS:
            raise InputError(f"{where} has more than {MAX_SCANS} scans, the most that are decoded")
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH), tags.get(_TILE_LENGTH)
    of_tile = width * height if isinstance(width, int) and isinstance(height, int) else 0
    if of_tile > max(SMALL_TILE, 2 * image.width * image.height):
        raise InputError(f"{where} has tiles of {width} x {height}, more than the picture itself")


def count_scans(content: bytes) -> int:
    """Returns the scans of a JPEG file, at most one more than `MAX_SCANS`. Source: ITU-T T.81, annex B."""
    scans, place = 0, 0
    while scans <= MAX_SCANS and (found := _MARKER.search(content, place)):
        marker = content[found.end() - 1]
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        place = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return scans
