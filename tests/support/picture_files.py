"""Files of pictures that Pillow does not write: 16-bit colours, colour profiles, oversized chunks."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image | NDArray[np.uint8], file_format: str = "PNG", **options: object) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, file_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(png: bytes, *chunks: bytes) -> bytes:
    """A PNG with chunks after its header."""
    end = len(PNG_SIGNATURE) + 25
    return png[:end] + b"".join(chunks) + png[end:]


def png_of_16_bits(colours: NDArray[np.uint16]) -> bytes:
    """A PNG of (H, W, C): grey, grey with opacity, RGB or RGBA."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[colours.shape[2]]
    return png_of_rows([row.astype(">u2").tobytes() for row in colours], colours.shape[1], 16, kind)


def png_of_rows(rows: Sequence[bytes], width: int, depth: int, kind: int, *chunks: bytes) -> bytes:
    """A PNG of rows as they are packed, with its bits for each value and its colour type; chunks come before
    the pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return PNG_SIGNATURE + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def tiff_of_16_bits(colours: NDArray[np.uint16]) -> bytes:
    """A TIFF of (H, W, 3)."""
    height, width = colours.shape[:2]
    data, start = colours.astype("<u2").tobytes(), 8
    depths = start + len(data)
    return tiff(
        data + struct.pack("<3H", 16, 16, 16),
        [
            *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, depths), (259, 4, 1, 1), (262, 4, 1, 2)),
            *((273, 4, 1, start), (277, 4, 1, 3), (278, 4, 1, height), (279, 4, 1, len(data))),
        ],
    )


def tiff(data: bytes, tags: Sequence[tuple[int, int, int, int]]) -> bytes:
    """A TIFF of data, which begins at byte 8, and of tags: number, type, count, value."""
    directory = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + directory + struct.pack("<I", 0)


ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""X, Y, Z of the primaries in the light D50 that profiles use."""


def icc_profile(primaries: Sequence[Sequence[float]] = ADOBE_RGB, gamma: float = 2.2, more: int = 0) -> bytes:
    """A profile of a display (of a grey one without primaries), with so many bytes that say nothing."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": _xyz((0.9642, 1, 0.8249))}
    for channel, primary in zip(b"rgb", primaries):
        tags[b"%cXYZ" % channel], tags[b"%cTRC" % channel] = _xyz(primary), curve
    if not primaries:
        tags[b"kTRC"] = curve
    if more:
        tags[b"cprt"] = b"text\0\0\0\0" + bytes(more)
    table, content, start = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(content), len(tag))
        content += tag + b"\0" * (-len(tag) % 4)
    space = b"RGB " if primaries else b"GRAY"
    head = struct.pack(">I4sI4s4s4s", start + len(content), b"\0" * 4, 0x02200000, b"mntr", space, b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + _xyz((0.9642, 1, 0.8249))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def one_way_profile() -> bytes:
    """A profile of a scanner, whose table leads from its colours to XYZ and not back."""
    table = np.stack(np.meshgrid(*3 * [np.linspace(0, 200, 2)], indexing="ij"), axis=-1)
    identity = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    curves = 3 * bytes(range(256))
    tag = (
        b"mft1"
        + bytes(4)
        + bytes((3, 3, 2, 0))
        + identity
        + curves
        + table.astype(np.uint8).tobytes()
        + curves
    )
    start = 132 + 12
    head = struct.pack(">I4sI4s4s4s", start + len(tag), bytes(4), 0x02200000, b"scnr", b"RGB ", b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + _xyz((0.9642, 1, 0.8249))[8:]
    return head.ljust(128, b"\0") + struct.pack(">I4sII", 1, b"A2B0", start, len(tag)) + tag


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))
