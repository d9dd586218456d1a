"""Files that Pillow refuses: read where all of the picture is there, else named."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from runtime.errors import InputError, collecting_warnings
from runtime.imaging.pictures import load_picture
from tests.support.picture_files import encoded, icc_profile, png_chunk, png_with, tiff
from tests.support.pictures import picture

SCENE = picture(48, 64)
SMOOTH = Image.fromarray(SCENE).resize((160, 120), Image.Resampling.BICUBIC)
LONG = b"workflow " * 200_000


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"tEXt", b"workflow\0" + LONG),
        png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
        png_chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG)),
        b"".join(png_chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(b" " * 1_000_000)) for i in range(70)),
    ],
    ids=["plain", "compressed", "international", "many"],
)
def test_long_texts_do_not_hide_the_picture(chunk: bytes) -> None:
    np.testing.assert_array_equal(load_picture(png_with(encoded(SCENE), chunk), "the scene").rgb, SCENE)


def test_profile_of_more_than_a_megabyte_is_used() -> None:
    profile = icc_profile(more=1_500_000)
    content = png_with(encoded(SCENE), png_chunk(b"iCCP", b"Adobe RGB\0\0" + zlib.compress(profile)))
    read, small = load_picture(content, "the scene"), encoded(SCENE, icc_profile=icc_profile())
    assert read.metadata.icc_profile == profile
    np.testing.assert_array_equal(read.rgb, load_picture(small, "the scene").rgb)


def test_profile_bomb_is_left_out() -> None:
    bomb = png_chunk(b"iCCP", b"bomb\0\0" + zlib.compress(b"\0" * 30_000_000))
    read = load_picture(png_with(encoded(SCENE), bomb), "the scene")
    np.testing.assert_array_equal(read.rgb, SCENE)
    assert read.metadata.icc_profile is None


JPEGS = {
    "baseline": encoded(SMOOTH, "JPEG", quality=90),
    "progressive": encoded(SMOOTH, "JPEG", quality=90, progressive=True),
    "grey": encoded(SMOOTH.convert("L"), "JPEG", quality=90),
    "CMYK": encoded(SMOOTH.convert("CMYK"), "JPEG", quality=90),
    "restarts": encoded(SMOOTH, "JPEG", quality=90, restart_marker_rows=1),
}


@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_without_its_end_is_read_with_a_warning(kind: str, missing: int) -> None:
    whole = load_picture(JPEGS[kind], "the scene").rgb
    # a decoder may need no end: then there is nothing to warn of
    read, told = warned(JPEGS[kind][:-missing])
    np.testing.assert_array_equal(read, whole)
    assert not told or "the scene is truncated, but all of the picture is there" in told[0]


def test_the_warning_comes() -> None:
    assert warned(JPEGS["baseline"][:-2])[1]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_that_lacks_more_is_refused(kind: str, share: float) -> None:
    with pytest.raises(InputError, match="the scene is damaged or cut short: it begins as JPEG"):
        load_picture(JPEGS[kind][: int(len(JPEGS[kind]) * share)], "the scene")


def test_progressive_jpeg_that_lacks_its_last_scan_is_refused() -> None:
    content = JPEGS["progressive"]
    with pytest.raises(InputError, match="damaged or cut short"):
        load_picture(content[: content.rindex(b"\xff\xda")], "the scene")


def warned(content: bytes) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], list[str]]:
    with collecting_warnings() as told:
        return load_picture(content, "the scene").rgb, told


# --- formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"<!DOCTYPE html><title>404</title>", r"a web page \(HTML\)"),
        (b"%PDF-1.7", "PDF"),
        (b"8BPS\0\1", r"a Photoshop document \(PSD\)"),
        (b"v/1\x01\2\0\0\0", "OpenEXR"),
        (b"\x93NUMPY\1\0", r"a NumPy array \(.npy\)"),
        (b"P6 2 2 255 ............", "a portable map"),
        (b"\0\0\0\x18ftypisom", "a film"),
    ],
)
def test_formats_that_are_not_read_are_named(head: bytes, name: str) -> None:
    with pytest.raises(InputError, match=f"the scene is {name}.*, which is not read: convert it"):
        load_picture(head + bytes(200), "the scene")


def test_tiff_of_colours_in_floating_point_is_told_what_it_is() -> None:
    data = np.zeros((4, 4, 3), "<f4").tobytes()
    tags = [
        *((256, 4), (257, 4), (258, 32), (259, 1), (262, 2)),
        *((273, 8), (277, 3), (278, 4), (279, len(data)), (339, 3)),
    ]
    with pytest.raises(InputError, match="a TIFF of a kind that is not read, like colours in floating point"):
        load_picture(tiff(data, [(tag, 4, 1, value) for tag, value in tags]), "the scene")


def test_tiles_far_larger_than_the_picture_are_refused() -> None:
    data = zlib.compress(b"\0" * 1000)
    tags = [
        *((256, 80), (257, 64), (258, 8), (259, 8), (262, 1), (277, 1)),
        *((322, 26_752), (323, 26_752), (324, 8), (325, len(data))),
    ]
    with pytest.raises(
        InputError, match="the scene has tiles of 26752 x 26752, more than the picture itself"
    ):
        load_picture(tiff(data, [(tag, 4, 1, value) for tag, value in tags]), "the scene")


def test_open_file_of_a_damaged_picture() -> None:
    with pytest.raises(InputError, match="the scene is damaged or cut short: it begins as PNG"):
        load_picture(io.BytesIO(encoded(SCENE)[:500]), "the scene")
