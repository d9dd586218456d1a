"""Files that look like pictures: headers of PNG, JPEG, WebP and TIFF after a grammar, and flipped bits."""

from __future__ import annotations

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from runtime.imaging.formats import HAS_AVIF

_SIDES = (0, 1, 2, 7, 8, 17, 64, 255, 256, 1000, 4096, 16_384, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1)
_LARGE = 3_000_000
"""Bytes of a text that is more than Pillow reads."""


def picture_file(rng: random.Random) -> bytes:
    """A file that is a picture, nearly one, or none."""
    made = rng.choice(_GRAMMAR)(rng)
    if rng.random() < 0.25:
        made = _flipped(rng, made)
    return made[: rng.randrange(len(made) + 1)] if rng.random() < 0.1 else made


@functools.cache
def _samples() -> tuple[bytes, ...]:
    """Small pictures of every format and many modes."""
    noise = np.random.default_rng(0)
    rgba = Image.fromarray(noise.integers(0, 256, (24, 30, 4), dtype=np.uint8))
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    more = {"icc_profile": profile, "exif": exif.tobytes()}
    wide = Image.fromarray(noise.integers(0, 4096, (24, 30), dtype=np.uint16))
    kinds = [
        *((image, "PNG", more) for image in (rgba, rgb, grey, wide, rgb.quantize(16), grey.convert("1"))),
        *((image, "JPEG", more) for image in (rgb, grey, rgb.convert("CMYK"))),
        (rgb, "JPEG", {"progressive": True}),
        *((rgba, "WEBP", {"lossless": lossless, **more}) for lossless in (True, False)),
        *((image, "TIFF", {}) for image in (rgba, wide, grey.convert("F"), rgb.convert("LAB"))),
        *((rgb, "TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        *((rgb, name, {}) for name in ("BMP", "GIF")),
        *([(rgba, "AVIF", {"speed": 10, **more})] if HAS_AVIF else []),
    ]
    return tuple(_encoded(*kind) for kind in kinds)


def _encoded(image: Image.Image, file_format: str, options: dict[str, object]) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _sample(rng: random.Random, start: bytes = b"") -> bytes:
    return rng.choice([sample for sample in _samples() if sample.startswith(start)])


def _flipped(rng: random.Random, content: bytes) -> bytes:
    """With a few bits flipped; most of them in the head, where the structure is."""
    result = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20)) if result else 0):
        at = rng.randrange(min(len(result), rng.choice((64, 400, len(result)))))
        result[at] ^= 1 << rng.randrange(8)
    return bytes(result)


def _noise(rng: random.Random, most: int = 300) -> bytes:
    return rng.randbytes(rng.randrange(most))


def _png(rng: random.Random) -> bytes:
    width, height = (rng.choice(_SIDES[:12] if rng.random() < 0.7 else _SIDES) for _ in range(2))
    depth, colour = rng.choice((1, 2, 4, 8, 16)), rng.choice((0, 2, 3, 4, 6))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + (min(width, 5000) * depth * channels + 7) // 8
    rows = b"\0" * min(row * min(height, 100), 100_000) + _noise(rng)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 0, 0, 1))))
    ]
    chunks += [rng.choice(_PNG_CHUNKS)(rng) for _ in range(rng.randrange(4))]
    chunks += [(b"PLTE", rng.randbytes(3 * rng.randrange(1, 257)))] * (colour == 3)
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


_PNG_CHUNKS: tuple[Callable[[random.Random], tuple[bytes, bytes]], ...] = (
    lambda rng: (b"tRNS", _noise(rng, 10)),
    lambda rng: (b"tRNS", b"\0" * rng.choice((2, 6, 256))),
    lambda rng: (b"eXIf", rng.choice((b"II*\0", b"MM\0*", b"")) + _noise(rng)),
    lambda rng: (b"pHYs", rng.randbytes(9)),
    lambda rng: (b"iCCP", b"p\0\0" + zlib.compress(rng.choice((_noise(rng), b"\0" * _LARGE)))),
    lambda rng: (b"zTXt", b"k\0\0" + zlib.compress(rng.choice((_noise(rng), b"x" * _LARGE)))),
    lambda rng: (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(rng.choice((_noise(rng), b"x" * _LARGE)))),
    lambda rng: (b"tEXt", b"Raw profile type exif\0\nexif\n    10\n" + _noise(rng).hex().encode()),
    lambda rng: (b"acTL", struct.pack(">II", rng.choice(_SIDES), 0)),
    lambda rng: (b"fcTL", rng.randbytes(26)),
    lambda rng: (rng.randbytes(4), _noise(rng)),
)


def _jpeg(rng: random.Random) -> bytes:
    """A real JPEG with segments put in after its start, and now and then other sides."""
    jpeg = bytearray(_sample(rng, b"\xff\xd8"))
    frame = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    if rng.random() < 0.25:
        struct.pack_into(">HH", jpeg, frame + 5, *(rng.choice(_SIDES[:13]) for _ in range(2)))
    segments = b""
    for _ in range(rng.randrange(3)):
        head = rng.choice(
            (b"Exif\0\0II*\0", b"Exif\0\0MM\0*", b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\3\2", b"JFIF\0")
        )
        content = head + _noise(rng)
        length = len(content) + 2 if rng.random() < 0.8 else rng.randrange(0x10000)
        segments += bytes((0xFF, rng.choice((0xE0, 0xE1, 0xE2, 0xE2, 0xDB, 0xC4, 0xDD)))) + struct.pack(
            ">H", length
        )
        segments += content
    return bytes(jpeg[:2]) + segments + bytes(jpeg[2:])


def _webp(rng: random.Random) -> bytes:
    canvas = [rng.choice((0, 1, 29, 30, 16_382, 16_383, 0xFFFFFF)) for _ in range(2)]
    size = b"".join(struct.pack("<I", side)[:3] for side in canvas)
    inner = _sample(rng, b"RIFF")[12:]
    chunks = [(b"VP8X", bytes((rng.randrange(256), 0, 0, 0)) + size)]
    for _ in range(rng.randrange(3)):
        chunks.append(
            (
                rng.choice((b"ICCP", b"EXIF", b"XMP ", b"ALPH", b"ANIM", b"ANMF", b"VP8 ", b"VP8L")),
                _noise(rng),
            )
        )
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
        for kind, content in chunks
    )
    body += inner[rng.choice((0, 18)) :]
    return b"RIFF" + struct.pack("<I", rng.choice((len(body), 0, 2**32 - 2))) + body


def _tiff(rng: random.Random) -> bytes:
    """A directory of tags that matter, with values that do not fit together, and some data."""
    order = rng.choice("<>")
    side = rng.choice((1, 8, 40))
    values = {
        **{
            256: side,
            257: side,
            258: rng.choice((1, 8, 16, 32)),
            259: rng.choice((1, 2, 3, 4, 5, 7, 8, 32773)),
        },
        **{262: rng.choice((0, 1, 2, 3, 5, 6, 8)), 273: 8, 277: rng.choice((1, 3, 4)), 278: side, 279: 2000},
    }
    if rng.random() < 0.25:
        tile = rng.choice((16, 64, 30_000, 65_536, 2**31))
        values |= {322: tile, 323: rng.choice((16, tile)), 324: 8, 325: 2000}
    for tag in rng.sample(sorted(values), rng.randrange(3)):
        values[tag] = rng.choice(_SIDES)
    for _ in range(rng.randrange(3)):
        values[rng.choice((284, 317, 320, 338, 339, 530, 34665, 34675, 700))] = rng.choice(_SIDES)
    data = rng.choice((zlib.compress(b"\0" * 5000), _noise(rng, 5000), b"\0" * 5000))
    data += b"\0" * (len(data) % 2)
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 4, 1 if rng.random() < 0.9 else rng.choice(_SIDES), value)
        for tag, value in sorted(values.items())
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return (
        head
        + data
        + struct.pack(f"{order}H", len(values))
        + entries
        + struct.pack(f"{order}I", rng.choice((0, 8)))
    )


_GRAMMAR: tuple[Callable[[random.Random], bytes], ...] = (
    _png,
    _jpeg,
    _webp,
    _tiff,
    lambda rng: _flipped(rng, _sample(rng)),
)
