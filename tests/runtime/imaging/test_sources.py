"""Pictures from wherever people have them: open files, buffers, arrays and tensors of every kind."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.errors import InputError, InputWarning
from runtime.imaging.pictures import load_picture
from runtime.imaging.sources import PictureLike
from runtime.imaging.target import whole_box
from runtime.imaging.value_range import to_8_bits
from tests.support.picture_files import png_of_16_bits, tiff_of_16_bits
from tests.support.pictures import picture

RGB = picture(20, 30)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    return buffer.getvalue()


def read_to_its_end() -> io.BytesIO:
    file = io.BytesIO(png())
    file.read()
    return file


class PathOf:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


AS_THEY_ARE: dict[str, PictureLike] = {
    "bytearray": bytearray(png()),
    "memoryview": memoryview(png()),
    "BytesIO": io.BytesIO(png()),
    "BytesIO that was read": read_to_its_end(),
    "floating point": RGB / 255,
    "half precision": (RGB / 255).astype(np.float16),
    "16 bits": RGB * np.uint16(257),
    "int64": RGB.astype(np.int64),
    "mirrored view": RGB[:, ::-1][:, ::-1],
    "tensor (H, W, 3)": torch.from_numpy(RGB),
    "tensor (3, H, W), 0 to 1": torch.from_numpy(RGB).permute(2, 0, 1) / 255,
    "tensor with a gradient": (torch.from_numpy(RGB) / 255).requires_grad_(),
}


@pytest.mark.parametrize("kind", AS_THEY_ARE)
def test_every_kind_is_the_same_picture(kind: str) -> None:
    np.testing.assert_array_equal(load_picture(AS_THEY_ARE[kind], "the scene").rgb, RGB)


def test_bfloat16_has_8_bits_of_precision() -> None:
    read = load_picture(torch.from_numpy(RGB).to(torch.bfloat16) / 255, "the scene").rgb
    assert np.abs(read.astype(int) - RGB).max() <= 1


def test_open_file_and_path_like(tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(png())
    with (tmp_path / "scene.png").open("rb") as file:
        np.testing.assert_array_equal(load_picture(file, "the scene").rgb, RGB)
        np.testing.assert_array_equal(load_picture(file, "the scene").rgb, RGB)
    np.testing.assert_array_equal(load_picture(PathOf(tmp_path / "scene.png"), "the scene").rgb, RGB)


@pytest.mark.parametrize("channels", [(), (1,)])
def test_grey_arrays(channels: tuple[int, ...]) -> None:
    grey = RGB[..., 0].reshape(20, 30, *channels)
    np.testing.assert_array_equal(load_picture(grey, "the scene").rgb[..., 1], RGB[..., 0])


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (None, "the scene must be a file, .* not NoneType"),
        ([[1, 2], [3, 4]], "the scene must be a file, .* not list"),
        (io.StringIO("text"), "the scene is a file opened as text: open it with mode 'rb'"),
        (RGB.astype(str), "the scene must be an array"),
        (np.zeros((2, 20, 30, 3), np.uint8), "the scene must be an array"),
        (RGB / 127.5 - 1, "the scene has values from -1 to 1; floating point is read from 0 to 1"),
        (np.full((4, 4), np.nan), "the scene has values that are not finite"),
        (RGB.astype(np.float32) * 70_000, "floating point is read from 0 to 1, 0 to 255 or 0 to 65535"),
        (RGB.astype(np.int32) * 70_000, "integers from 0 to 65535 are read"),
        (-RGB.astype(np.int32), "the scene has values from -255 to 0; integers from 0 to 65535 are read"),
        (Image.new("RGB", (0, 5)), "the scene has no pixels"),
        (
            "https://example.com/desk.jpg",
            "'https://example.com/desk.jpg' is an address on the web",
        ),
        (Path("https://example.com/desk.jpg"), "'https://example.com/desk.jpg' is an address on the web"),
        ("a\0b.png", "cannot read the scene"),
    ],
)
def test_what_cannot_be_read_is_named(source: PictureLike, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        load_picture(source, "the scene")


def test_pillow_images_that_are_closed_or_cut_short() -> None:
    closed = Image.open(io.BytesIO(png()))
    closed.close()
    for image in (closed, Image.open(io.BytesIO(png()[:900]))):
        with pytest.raises(InputError, match="is a Pillow image that is closed, damaged or cut short"):
            load_picture(image, "the scene")


# --- ranges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "told"), [(10, True), (12, True), (14, True), (16, False)])
def test_16_bit_files_are_as_bright_as_their_bits(bits: int, told: bool) -> None:
    top = 2**bits - 1
    values = np.array([[0, top // 2, top]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    if told:
        with pytest.warns(InputWarning, match=f"16-bit values up to {top}, which are read as {bits}-bit"):
            read = load_picture(buffer.getvalue(), "the scene").rgb
    else:
        read = load_picture(buffer.getvalue(), "the scene").rgb
    assert read[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_colours_that_fill_12_bits_are_as_bright(file_format: str) -> None:
    colours = np.array([[[0, 2047, 4095], [4095, 0, 1024]]], np.uint16)
    content = png_of_16_bits(colours) if file_format == "PNG" else tiff_of_16_bits(colours)
    with pytest.warns(InputWarning, match="16-bit values up to 4095, which are read as 12-bit"):
        assert load_picture(content, "the scene").rgb.tolist() == [[[0, 127, 255], [255, 0, 63]]]


def test_floating_point_by_its_largest_value() -> None:
    for top in (1, 255, 65535):
        values = np.array([[0, 0.5, 1]], np.float32) * top
        with pytest.warns(InputWarning) if top > 1 else contextlib.nullcontext():
            read = load_picture(Image.fromarray(values), "the scene").rgb[0, :, 0]
        assert read[[0, 2]].tolist() == [0, 255]
        assert read[1] in (127, 128)


def test_overshoot_of_sharpening_is_clipped() -> None:
    values = np.linspace(0, 1, 1000, dtype=np.float32).reshape(20, 50)
    values[0, 0], values[-1, -1] = -0.02, 1.3
    with pytest.warns(InputWarning, match=r"values from -0\.02 to 1\.3, which are read as 0 to 1"):
        read = load_picture(values, "the scene").rgb
    assert read[0, 0, 0] == 0
    assert read[-1, -1, 0] == 255
    assert read[10, 0, 0] == 128


@pytest.mark.parametrize(
    ("high", "bits"),
    [(255, 8), (256, 10), (1023, 10), (1024, 12), (4095, 12), (4096, 14), (16_383, 14), (16_384, 16)],
)
def test_integers_fill_the_fewest_bits_that_hold_the_largest(high: int, bits: int) -> None:
    """What is told is a guess: of 8 bits and of 16 there is none."""
    values, told = to_8_bits(np.array([0, high]), "the scene")
    assert values.tolist() == [0, 255 * high // (2**bits - 1)]
    assert told == (
        "" if bits in (8, 16) else f"has 16-bit values up to {high}, which are read as {bits}-bit"
    )


def test_fractions_are_rounded_in_a_range_of_1_and_dropped_in_a_range_of_255() -> None:
    """As images in floating point are made of 8 bits, and as NumPy makes integers of them."""
    assert to_8_bits(np.array([0, 100.7 / 255, 1]), "the scene")[0].tolist() == [0, 101, 255]
    assert to_8_bits(np.array([0, 100.7, 255]), "the scene")[0].tolist() == [0, 100, 255]


def test_undershoot_is_told() -> None:
    values = np.linspace(0, 1, 1000, dtype=np.float32)
    values[0] = -0.02
    assert to_8_bits(values, "the scene")[1] == "has values from -0.02 to 1, which are read as 0 to 1"


def test_nearly_black_is_told() -> None:
    with pytest.warns(InputWarning, match="the scene is nearly black: the largest of its values is 1 of 255"):
        load_picture((RGB > 128).astype(np.uint8), "the scene")


# --- boxes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "box",
    [
        (1.0, 2.0, 3.0, 4.0),
        [1, 2, 3, 4],
        np.array([1, 2, 3, 4], np.float32),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_boxes_of_whole_numbers(box: tuple[float, ...]) -> None:
    assert whole_box(box) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "box",
    [(1, 2, 3), (1, 2, 3, 4.5), (1, 2, 3, float("nan")), ((1, 2), (3, 4)), (1, 2, 3, True), "1,2,3,4", 7],
)
def test_boxes_of_anything_else(box: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="a box is four whole numbers x0,y0,x1,y1, not"):
        whole_box(box)
