"""Repairs picture files that Pillow refuses although all of the picture is there.

Sources: PNG specification, third edition, sections 5.3 and 11.3; ITU-T T.81 (JPEG), annexes B and G.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START = b"\xff\xd8"
MAX_PROFILE_BYTES = 4 * 1024 * 1024
"""Largest colour profile; displays' take kilobytes, presses' one or two megabytes."""

_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_JPEG_END = b"\xff\xd9"
_MORE_MCUS = b"\x5a\x3c\x96\x0f\xa7\xe1\x4b\xd2" * 8
"""Bits that no decoder takes for zeros."""
_SCAN = 0xDA
_FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive."""
_COEFFICIENTS = 64


def without_text(png: bytes) -> tuple[bytes, bytes | None]:
    """Returns a PNG without its texts and its colour profile, and that profile, if it is not too long.

    Pillow refuses a PNG with a text or a profile of more than a megabyte.
    """
    kept: list[bytes | memoryview] = [PNG_SIGNATURE]
    profile = None
    for kind, content, chunk in _chunks(png):
        if kind == b"iCCP":
            profile = _inflated(content.partition(b"\0")[2][1:])
        elif kind not in _TEXT:
            kept.append(chunk)
    return b"".join(kept), profile


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes, memoryview]]:
    """Yields (kind, content, whole chunk) of a PNG, up to where it is cut; the content of a profile alone."""
    view, at = memoryview(png), len(PNG_SIGNATURE)
    while at + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, at)
        end = at + 12 + length
        content = bytes(view[at + 8 : end - 4]) if kind == b"iCCP" else b""
        yield kind, content, view[at:end]
        at = end


def _inflated(content: bytes) -> bytes | None:
    inflate = zlib.decompressobj()
    try:
        profile = inflate.decompress(content, MAX_PROFILE_BYTES)
    except zlib.error:
        return None
    return profile if inflate.eof else None


def jpegs_with_end(jpeg: bytes) -> tuple[bytes, bytes] | None:
    """Returns two JPEGs of one that lacks its end: with the end, and with more picture before the end.

    Decoded, they are the same picture if all rows are there: what is too much is skipped. Where rows are
    missing, it fills them.

    Returns:
        None if a scan is missing that the picture needs, so that it would be blurred.
    """
    cut = jpeg.removesuffix(b"\xff")
    if not _has_all_scans(cut):
        return None
    return cut + _JPEG_END, cut + _MORE_MCUS + _JPEG_END


def _has_all_scans(jpeg: bytes) -> bool:
    """Returns whether the scans of a JPEG bring every coefficient of every component to its last bit."""
    components: set[int] = set()
    complete: set[tuple[int, int]] = set()
    for marker, content in _segments(jpeg):
        if marker in _FRAMES:
            components = {content[6 + 3 * i] for i in range(content[5]) if 6 + 3 * i < len(content)}
        elif marker == _SCAN and len(content) >= 4 + 2 * content[0]:
            first, last, bits = content[1 + 2 * content[0] :][:3]
            if bits & 0x0F == 0:
                ids = content[1 : 1 + 2 * content[0] : 2]
                complete |= {(of, k) for of in ids for k in range(first, min(last + 1, _COEFFICIENTS))}
    return bool(components) and len(complete) >= len(components) * _COEFFICIENTS


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (marker, content) of the segments of a JPEG; the compressed data between them is skipped."""
    at = len(JPEG_START)
    while (at := jpeg.find(b"\xff", at)) >= 0 and at + 4 <= len(jpeg):
        marker = jpeg[at + 1]
        # filling, stuffed bytes, restart markers and the start have no content
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:
            at += 1 if marker == 0xFF else 2
            continue
        length = struct.unpack_from(">H", jpeg, at + 2)[0]
        yield marker, jpeg[at + 4 : at + 2 + length]
        at += 2 + max(length, 2)
