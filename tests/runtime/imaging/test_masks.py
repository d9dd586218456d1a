"""Masks as people have them: each is read as its owner means it, or refused with how it was read."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from runtime.errors import InputError, InputWarning, collecting_warnings
from runtime.imaging.masks import MaskedPicture, load_mask

PLACE = np.zeros((30, 40), np.bool_)
PLACE[8:20, 10:25] = True
PAINT = PLACE.astype(np.uint8)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def grey(inside: int, outside: int = 0) -> Image.Image:
    return Image.fromarray(np.where(PLACE, np.uint8(inside), np.uint8(outside)))


def painted(inside: tuple[int, ...], outside: tuple[int, ...] = (0, 0, 0)) -> Image.Image:
    return Image.fromarray(np.where(PLACE[..., None], np.uint8(inside), np.uint8(outside)))


def indexed(colours: list[int], index: NDArray[np.uint8] = PAINT) -> Image.Image:
    image = Image.fromarray(index, "P")
    image.putpalette(colours)
    return image


MEANT: dict[str, Image.Image] = {
    "white on black": grey(255),
    "1 on 0": grey(1),
    "half strength": grey(127),
    "exactly 128": grey(128),
    "label 7 on label 3": grey(7, 3),
    "1 bit": Image.fromarray(PLACE),
    "16 bits, white": Image.fromarray(PAINT * np.uint16(65535)),
    "16 bits, label 2": Image.fromarray(PAINT * np.uint16(2)),
    "floating point, 0 to 1": Image.fromarray(PAINT.astype(np.float32)),
    "floating point, 0 to 255": Image.fromarray(PAINT * np.float32(255)),
    "alpha in white": painted((255, 255, 255, 255), (255, 255, 255, 0)),
    "alpha in black": painted((0, 0, 0, 255), (0, 0, 0, 0)),
    "alpha around a picture": painted((90, 120, 30, 255), (200, 9, 9, 10)),
    "grey with alpha": painted((0, 255), (0, 0)),
    "opaque, white on black": painted((255, 255, 255, 255), (0, 0, 0, 255)),
    "red paint": painted((255, 0, 0)),
    "green paint": painted((0, 255, 0)),
    "blue paint": painted((10, 20, 200)),
    "dark red paint": painted((128, 0, 0)),
    "red on blue": painted((255, 0, 0), (0, 0, 255)),
    "palette of DAVIS": indexed([0, 0, 0, 128, 0, 0]),
    "palette, white on black": indexed([0, 0, 0, 255, 255, 255]),
    "palette, red on white": indexed([255, 255, 255, 255, 0, 0]),
    "palette that is black": indexed([0, 0, 0, 0, 0, 0]),
}


@pytest.mark.filterwarnings("ignore:the mask has values from 0 to 255")
@pytest.mark.parametrize("kind", MEANT)
def test_what_is_painted_is_inside(kind: str) -> None:
    np.testing.assert_array_equal(load_mask(MEANT[kind], "the mask"), PLACE)
    if MEANT[kind].mode != "F":
        np.testing.assert_array_equal(load_mask(encoded(MEANT[kind]), "the mask"), PLACE)


def test_transparent_entry_of_a_palette_is_outside() -> None:
    content = encoded(indexed([9, 9, 9, 200, 10, 10]), transparency=0)
    np.testing.assert_array_equal(load_mask(content, "the mask"), PLACE)


def test_all_labels_but_that_of_the_border_are_inside() -> None:
    labels = np.full((30, 40), 4, np.uint8)
    labels[5:10, 5:10], labels[15:20, 0:20] = 0, 9
    np.testing.assert_array_equal(load_mask(encoded(Image.fromarray(labels)), "the mask"), labels != 4)


def test_what_is_1_is_inside_wherever_it_lies() -> None:
    frame = np.ones((30, 40), np.uint8)
    frame[10:20, 10:20] = 0
    np.testing.assert_array_equal(load_mask(frame, "the mask"), frame == 1)
    np.testing.assert_array_equal(load_mask(frame.astype(bool), "the mask"), frame == 1)


def test_more_than_32_grey_values_are_no_labels() -> None:
    values = np.linspace(0, 128, 1200).astype(np.uint8).reshape(30, 40)
    with pytest.raises(InputError, match="the value is above 128, and its 129 values go from 0 to 128"):
        load_mask(values, "the mask")


@pytest.mark.parametrize("stray", [0, 300], ids=["alone", "beside a large label"])
def test_labels_of_16_bits_are_told_apart_by_all_of_them(stray: int) -> None:
    labels = np.where(PLACE, 3, 0).astype(np.uint16)
    labels[0, 0] = stray
    with collecting_warnings():
        inside = load_mask(Image.fromarray(labels), "the mask")
    np.testing.assert_array_equal(inside, labels != 0)


@pytest.mark.parametrize("own", [True, False], ids=["its own EXIF", "its picture's EXIF"])
def test_labels_of_16_bits_that_are_turned(own: bool) -> None:
    labels = np.where(PLACE, 3, 0).astype(np.uint16)
    labels[12, 20] = 300
    stored = Image.fromarray(labels).transpose(Image.Transpose.ROTATE_90)  # what orientation 6 undoes
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = encoded(stored, exif=exif) if own else stored
    with collecting_warnings():
        inside = load_mask(mask, "the mask", of=MaskedPicture("the scene", (30, 40, 3), orientation=6))
    np.testing.assert_array_equal(inside, labels != 0)


def test_jpeg_is_read_by_its_brightness_alone() -> None:
    bright = encoded(grey(255), "JPEG", quality=95)
    assert np.count_nonzero(load_mask(bright, "the mask") != PLACE) < 20
    with pytest.raises(InputError, match=r"the mask is empty.* is where the value is above 128"):
        load_mask(encoded(grey(100), "JPEG", quality=100), "the mask")
    with pytest.raises(InputError, match="empty"):
        load_mask(Image.open(io.BytesIO(encoded(grey(100), "JPEG", quality=100))), "the mask")


@pytest.mark.parametrize(
    ("mask", "how"),
    [
        (grey(0), "labels, of which the most frequent of the border is outside, and it is 0 everywhere"),
        (painted((9, 9, 9, 100), (9, 9, 9, 20)), "its opacity goes from 20 to 100, not to both sides of 128"),
        (painted((255, 255, 255, 127), (255, 255, 255, 0)), "its opacity goes from 0 to 127"),
        (indexed([0, 0, 90] * 2, np.full((9, 9), 1, np.uint8)), "labels, .* and it is 1 everywhere"),
        (Image.fromarray(np.zeros((9, 9), np.bool_)), "inside is what is white"),
    ],
)
def test_empty_mask_says_how_it_was_read(mask: Image.Image, how: str) -> None:
    with pytest.raises(InputError, match=f"the mask is empty.*{how}"):
        load_mask(mask, "the mask")


def test_mask_must_have_its_pictures_size() -> None:
    with pytest.raises(InputError, match="the mask is 40 x 30 and the scene is 41 x 30 pixels"):
        load_mask(PLACE, "the mask", of=MaskedPicture("the scene", (30, 41, 3)))


# --- pictures that a camera has stored turned --------------------------------------------------------------


def test_mask_of_the_stored_picture_is_turned_with_it() -> None:
    stored = Image.fromarray(PLACE).transpose(Image.Transpose.ROTATE_90)  # what orientation 6 undoes
    with pytest.warns(InputWarning, match="has the size before rotation, and is rotated too"):
        mask = load_mask(stored, "the mask", of=MaskedPicture("the scene", (30, 40, 3), orientation=6))
    np.testing.assert_array_equal(mask, PLACE)


def test_upright_mask_of_a_turned_picture_stays(recwarn: pytest.WarningsRecorder) -> None:
    mask = load_mask(PLACE, "the mask", of=MaskedPicture("the scene", (30, 40, 3), orientation=6))
    np.testing.assert_array_equal(mask, PLACE)
    assert not recwarn.list


def test_mask_that_may_lie_either_way_is_warned_of() -> None:
    with pytest.warns(InputWarning, match="the scene is rotated by its EXIF, but the mask is not"):
        mask = load_mask(PLACE, "the mask", of=MaskedPicture("the scene", (30, 40, 3), orientation=3))
    np.testing.assert_array_equal(mask, PLACE)


def test_mask_of_a_square_picture_may_lie_either_way() -> None:
    """Its size says nothing, so it is not turned."""
    place = PLACE[:30, :30]
    with pytest.warns(InputWarning, match="the scene is rotated by its EXIF, but the mask is not"):
        mask = load_mask(place, "the mask", of=MaskedPicture("the scene", (30, 30, 3), orientation=6))
    np.testing.assert_array_equal(mask, place)


def test_mask_with_the_same_exif_is_turned_like_its_picture(recwarn: pytest.WarningsRecorder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    stored = encoded(Image.fromarray(PLACE).transpose(Image.Transpose.ROTATE_180), exif=exif)
    mask = load_mask(stored, "the mask", of=MaskedPicture("the scene", (30, 40, 3), orientation=3))
    np.testing.assert_array_equal(mask, PLACE)
    assert not recwarn.list
