"""Unusual files: deep ones, with a transparent colour, with several pictures, or read by threads."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.support.attacker import scan_bomb
from runtime.errors import InputError, InputWarning, collecting_warnings
from runtime.imaging.decoding import size_in_head
from runtime.imaging.decoding_cost import MAX_SCANS, check_cost
from runtime.imaging.formats import HAS_AVIF
from runtime.imaging.pictures import encode_picture, load_picture
from runtime.imaging.scene import load_scene
from tests.support.picture_files import (
    encoded,
    png_chunk,
    png_of_16_bits,
    png_of_rows,
    png_with,
    tiff,
    tiff_of_16_bits,
)
from training.data.sources.base import read_picture

PATIENCE = 60


# --- depth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 16_000, 17_000], ids=["black", "dark", "grey"])
def test_grey_with_opacity_of_16_bits(level: int) -> None:
    values = np.full((8, 9, 2), level, np.uint16)
    values[..., 1] = 65_535
    values[2:5, 2:5, 1] = 0
    picture = load_picture(png_of_16_bits(values), "the reference")
    assert (picture.rgb == level >> 8).all()
    assert picture.alpha is not None
    np.testing.assert_array_equal(picture.alpha, values[..., 1] >> 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_scene_of_16_bits_is_told_that_its_result_has_8(channels: int) -> None:
    deep = np.full((8, 9, channels), 65_535, np.uint16)
    for content in [png_of_16_bits(deep)] + [tiff_of_16_bits(deep)] * (channels == 3):
        with pytest.warns(InputWarning, match="has more than 8 bits for each value: the result has 8"):
            assert load_scene(content)[1].rgb.dtype == np.uint8


# --- transparent colours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_one_of_the_files_own_values(depth: int) -> None:
    """Half of each row has the largest value, half the smallest; either may be the transparent one."""
    largest = 2**depth - 1
    row = b"\xff" * depth + b"\0" * depth
    for clear in (0, largest):
        chunk = png_chunk(b"tRNS", struct.pack(">H", clear))
        picture = load_picture(png_of_rows([row] * 4, 16, depth, 0, chunk), "the reference")
        assert picture.rgb[0, [0, -1], 0].tolist() == [255, 0]
        assert picture.alpha is not None
        assert picture.alpha[0, [0, -1]].tolist() == ([0, 255] if clear else [255, 0])


def test_one_grey_of_16_bits_is_transparent_and_not_its_neighbour() -> None:
    values = np.array([[[0x1234], [0x1235], [0xFFFF]]], np.uint16)
    content = png_with(png_of_16_bits(values), png_chunk(b"tRNS", struct.pack(">H", 0x1234)))
    picture = load_picture(content, "the reference")
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[0, 255, 255]]


@pytest.mark.parametrize("brightest", [0xFFFF, 0x3334], ids=["bright", "dark"])
def test_a_transparent_colour_of_16_bits(brightest: int) -> None:
    values = np.array([[[0x1221, 0, 0], [brightest, 0, 0]]], np.uint16)
    content = png_with(png_of_16_bits(values), png_chunk(b"tRNS", struct.pack(">HHH", 0x1221, 0, 0)))
    picture = load_picture(content, "the reference")
    assert picture.alpha is not None
    assert picture.alpha.tolist() == [[0, 255]]


# --- several pictures in a file ---------------------------------------------------------------------------


def several(file_format: str, count: int) -> bytes:
    frames = [Image.new("RGB", (12, 9), (80 * index, 0, 0)) for index in range(count)]
    buffer = io.BytesIO()
    frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "TIFF", "PNG"] + ["AVIF"] * HAS_AVIF)
def test_of_several_pictures_the_first_is_used_with_a_warning(file_format: str) -> None:
    with pytest.warns(InputWarning, match="the scene has more than one picture: the first is used"):
        assert load_picture(several(file_format, 3), "the scene").rgb.max() < 8
    with collecting_warnings() as found:
        load_picture(several(file_format, 1), "the scene")
    assert not found


def test_previews_in_a_photograph_are_not_told(recwarn: pytest.WarningsRecorder) -> None:
    load_picture(several("MPO", 2), "the scene")
    assert not recwarn.list


# --- what Pillow warns of -----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [14, 16, 28, 52])
def test_pillow_says_nothing_of_exif_that_is_cut_short(left: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "a cup on a desk", {0x9003: "2026:11:28 05:00:00"}
    path = tmp_path / "cup.jpg"
    Image.new("RGB", (60, 40), "teal").save(path, exif=exif.tobytes()[:left])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen, scene = load_scene(path)
        encode_picture(scene.rgb, "JPEG", scene.metadata)
        assert size_in_head(path) == seen.shape[1::-1]
        assert read_picture(path).shape == (40, 60, 3)


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [b"", b"workflow\0\0" + zlib.compress(bytes(2 << 20))], ids=["plain", "mended"]
)
def test_a_picture_may_have_as_many_pixels_as_are_decoded(text: bytes) -> None:
    """Also one that Pillow does not read before it is mended."""
    content = png_with(encoded(np.zeros((8, 9, 3), np.uint8)), png_chunk(b"zTXt", text) * bool(text))
    assert load_picture(content, "the scene", max_pixels=72).rgb.shape == (8, 9, 3)
    with pytest.raises(InputError, match="the scene is 9 x 8: more than 71 pixels"):
        load_picture(content, "the scene", max_pixels=71)


def test_a_side_may_have_as_many_pixels_as_that_of_a_jpeg() -> None:
    assert load_picture(encoded(np.zeros((1, 65_535), np.uint8)), "the scene").rgb.shape == (1, 65_535, 3)
    with pytest.raises(InputError, match="a side may have at most 65,535 pixels"):
        load_picture(encoded(np.zeros((65_536, 1), np.uint8)), "the scene")


def test_a_picture_may_have_sixty_four_scans() -> None:
    """A progressive grey one has six, of which the last is repeated."""
    assert load_picture(scan_bomb(8, MAX_SCANS - 5), "the scene").rgb.shape == (8, 8, 3)
    with pytest.raises(InputError, match="the scene has more than 64 scans"):
        load_picture(scan_bomb(8, MAX_SCANS - 4), "the scene")


@pytest.mark.parametrize("file_format", ["JPEG", "MPO"])
def test_scans_are_counted_with_previews_and_without(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.imaging.decoding_cost.MAX_SCANS", 3)
    picture = Image.new("RGB", (12, 9))
    options = {"save_all": True, "append_images": [picture]} if file_format == "MPO" else {}
    with pytest.raises(InputError, match="the scene has more than 3 scans"):
        load_picture(encoded(picture, file_format, progressive=True, **options), "the scene")


@pytest.mark.parametrize(
    ("size", "largest"), [((80, 64), (1024, 1024)), ((2000, 1000), (2000, 2000))], ids=["small", "large"]
)
def test_tiles_may_be_twice_the_picture_or_a_million_pixels(
    size: tuple[int, int], largest: tuple[int, int]
) -> None:
    def check(width: int, height: int) -> None:
        tags = [
            *((256, size[0]), (257, size[1]), (258, 8), (259, 8), (262, 1), (277, 1)),
            *((322, width), (323, height), (324, 8), (325, 4)),
        ]
        content = tiff(b"data", [(tag, 4, 1, value) for tag, value in tags])
        check_cost(Image.open(io.BytesIO(content)), content, "the scene")

    check(*largest)
    with pytest.raises(InputError, match="the scene has tiles of"):
        check(largest[0] + 1, largest[1])


# --- threads ----------------------------------------------------------------------------------------------


class SlowFile(io.BytesIO):
    """A file that is being read until it is told to go on."""

    def __init__(self) -> None:
        super().__init__(several("PNG", 1))
        self.begun, self.go_on = threading.Event(), threading.Event()

    def read(self, size: int | None = -1, /) -> bytes:
        self.begun.set()
        assert self.go_on.wait(PATIENCE)
        return super().read(size)


def test_the_filters_of_warnings_outlive_reading_in_threads() -> None:
    """Of two that begin one after the other, the first ends first; meanwhile somebody adds a filter."""
    with warnings.catch_warnings():
        before = list(warnings.filters)
        files = [SlowFile(), SlowFile()]
        threads = [threading.Thread(target=load_picture, args=(file, "the scene")) for file in files]
        for file, thread in zip(files, threads):
            thread.start()
            assert file.begun.wait(PATIENCE)
        warnings.simplefilter("error", InputWarning)
        for file, thread in zip(files, threads):
            file.go_on.set()
            thread.join(PATIENCE)
        assert list(warnings.filters) == [("error", None, InputWarning, None, 0), *before]
