"""Pictures of every kind are read upright as RGB; what is not a picture, or too large, is refused."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from runtime.errors import InputError
from runtime.imaging import sources
from runtime.imaging.masks import load_mask, mask_from_alpha
from runtime.imaging.pictures import contact_sheet, load_picture, save_picture


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def gradient(height: int = 6, width: int = 9) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rng = np.random.default_rng(height * 100 + width)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_come_back_exactly(file_format: str) -> None:
    picture = load_picture(encoded(Image.fromarray(gradient()), file_format), "the scene")
    np.testing.assert_array_equal(picture.rgb, gradient())
    assert picture.alpha is None


def test_greyscale_becomes_grey_rgb() -> None:
    grey = gradient()[..., 0]
    picture = load_picture(encoded(Image.fromarray(grey)), "the scene")
    np.testing.assert_array_equal(picture.rgb, np.repeat(grey[..., None], 3, axis=-1))


def test_sixteen_bit_greyscale_keeps_its_top_bits() -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    picture = load_picture(encoded(Image.fromarray(values)), "the scene")
    assert picture.rgb[0, :, 0].tolist() == [0, 1, 128, 255]


def test_palette_with_transparency() -> None:
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    picture = load_picture(encoded(image, transparency=1), "the reference")
    assert picture.rgb[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert picture.alpha is not None
    assert picture.alpha[0].tolist() == [255, 0]


def test_opaque_alpha_channel_says_nothing() -> None:
    rgba = np.dstack([gradient(), np.full((6, 9), 255, np.uint8)])
    assert load_picture(encoded(Image.fromarray(rgba)), "the reference").alpha is None


def test_alpha_is_a_mask_above_128() -> None:
    assert mask_from_alpha(np.array([[127, 128, 129]], np.uint8)).tolist() == [[False, False, True]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation: int) -> None:
    upright = Image.fromarray(gradient())
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for picture_format in ("PNG", "TIFF"):  # Pillow turns a TIFF by itself
        picture = load_picture(encoded(stored, picture_format, exif=exif), "the scene")
        np.testing.assert_array_equal(picture.rgb, gradient())
        assert picture.orientation == orientation


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode != "LAB":
        return image.convert(mode)
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr"])
def test_other_colour_spaces_are_converted(mode: str) -> None:
    stored = encoded(in_mode(Image.new("RGB", (5, 4), (200, 30, 60)), mode), "TIFF")
    assert Image.open(io.BytesIO(stored)).mode == mode
    picture = load_picture(stored, "the scene")
    assert np.abs(picture.rgb.astype(int) - [200, 30, 60]).max() <= 4


def test_arrays_and_pillow_images_are_taken_as_they_are() -> None:
    array = gradient()
    np.testing.assert_array_equal(load_picture(array, "the scene").rgb, array)
    np.testing.assert_array_equal(load_picture(Image.fromarray(array), "the scene").rgb, array)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.complex64), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_arrays_that_are_no_pictures(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    with pytest.raises(InputError, match=r"the scene must be an array \(H, W\)"):
        load_picture(array, "the scene")


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_bytes_that_are_no_picture(content: bytes) -> None:
    with pytest.raises(InputError, match=r"is not a picture|damaged|is empty"):
        load_picture(content, "the scene")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_cut_short_png(kept: float) -> None:
    content = encoded(Image.fromarray(gradient(60, 60)))
    with pytest.raises(InputError, match="the scene is damaged or cut short"):
        load_picture(content[: int(len(content) * kept)], "the scene")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a single byte of pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(40_000, 40_000), (20_000, 6_000), (2**31 - 1, 1)])
def test_picture_with_too_many_pixels_is_refused_by_its_header(width: int, height: int) -> None:
    with pytest.raises(InputError, match="more than 100,000,000 pixels"):
        load_picture(png_header(width, height), "the scene")


def test_file_with_too_many_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10)
    (tmp_path / "x.png").write_bytes(encoded(Image.fromarray(gradient())))
    with pytest.raises(InputError, match="at most 10 are read"):
        load_picture(tmp_path / "x.png", "the scene")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the scene '.*none\.png': No such file"):
        load_picture(tmp_path / "none.png", "the scene")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_picture_or_refused(content: bytes) -> None:
    try:
        picture = load_picture(content, "the scene")
    except InputError:
        return
    assert picture.rgb.ndim == 3


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_damaged_pictures_are_read_or_refused(position: int, value: int) -> None:
    content = bytearray(encoded(Image.fromarray(gradient(20, 20)), "PNG"))
    content[position % len(content)] = value
    with contextlib.suppress(InputError):
        load_picture(bytes(content), "the scene")


def test_masks_are_bool_01_or_0255() -> None:
    expected = np.array([[True, False]])
    for source in (expected, np.array([[1, 0]], np.uint8), np.array([[255, 0]], np.uint8)):
        np.testing.assert_array_equal(load_mask(source, "the mask"), expected)
    np.testing.assert_array_equal(load_mask(np.array([[129, 128]], np.uint8), "the mask"), expected)


# --- writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.png", "out.PNG"])
def test_saved_png_is_read_back_exactly(tmp_path: Path, name: str) -> None:
    save_picture(gradient(), tmp_path / name)
    np.testing.assert_array_equal(load_picture(tmp_path / name, "the picture").rgb, gradient())
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["out.jpg", "out.webp"])
def test_lossy_formats_are_close(tmp_path: Path, name: str) -> None:
    flat = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    save_picture(flat, tmp_path / name)
    assert np.abs(load_picture(tmp_path / name, "the picture").rgb.astype(int) - flat).max() <= 4


def test_unknown_ending(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"its name must end in \.png"):
        save_picture(gradient(), tmp_path / "out.txt")


def test_place_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory"):
        save_picture(gradient(), tmp_path / "none" / "out.png")


@pytest.mark.parametrize(("count", "shape"), [(1, (6, 9)), (2, (6, 26)), (3, (20, 26)), (4, (20, 26))])
def test_contact_sheet_is_nearly_square(count: int, shape: tuple[int, int]) -> None:
    assert contact_sheet([gradient()] * count).shape == (*shape, 3)


def test_lab_has_no_opacity_although_a_channel_is_called_so() -> None:
    lab = Image.merge("LAB", Image.fromarray(gradient()).split())
    assert np.asarray(lab.convert("RGBA").getchannel("A")).min() == 0
    assert load_picture(lab, "the scene").alpha is None


@pytest.mark.filterwarnings("error")
def test_nothing_that_pillow_warns_of_reaches_the_caller(tmp_path: Path) -> None:
    """Opacities of a palette's entries; EXIF that is cut short."""
    rgba = Image.fromarray(np.dstack([gradient(), gradient()[..., 0]]))
    palette = rgba.quantize(16)
    assert isinstance(palette.info.get("transparency"), bytes | None)
    palette.save(tmp_path / "palette.png")
    found = load_picture(tmp_path / "palette.png", "the reference")
    np.testing.assert_array_equal(found.rgb, np.asarray(palette.convert("RGBA"))[..., :3])
    Image.fromarray(gradient()).save(
        tmp_path / "exif.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x09"
    )
    assert load_picture(tmp_path / "exif.jpg", "the scene").rgb.shape == gradient().shape
