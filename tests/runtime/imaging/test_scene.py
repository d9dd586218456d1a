"""A scene keeps what is its own: transparency, colour profile, EXIF, resolution, and its untouched pixels."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from runtime.errors import InputWarning
from runtime.imaging.boxes import Box
from runtime.imaging.formats import HAS_AVIF
from runtime.imaging.pictures import contact_sheet, encode_picture, load_picture
from runtime.imaging.scene import load_scene, with_own_pixels
from tests.support.picture_files import encoded, icc_profile, one_way_profile
from tests.support.pictures import picture

SCENE = picture(40, 60)
REGION = Box(10, 8, 30, 28)
ADOBE_RGB = icc_profile()
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

Pixels = NDArray[np.uint8]


def drawn_into(seen: Pixels) -> Pixels:
    """With the region painted."""
    image = seen.copy()
    image[REGION.slices] = (200, 60, 30)
    return image


def outside() -> NDArray[np.bool_]:
    mask = np.ones(SCENE.shape[:2], np.bool_)
    mask[REGION.slices] = False
    return mask


@pytest.mark.parametrize("options", [{}, {"icc_profile": SRGB}])
def test_srgb_scene_is_taken_as_it_is(options: dict[str, bytes], recwarn: pytest.WarningsRecorder) -> None:
    seen, scene = load_scene(encoded(SCENE, **options))
    np.testing.assert_array_equal(seen, SCENE)
    image = drawn_into(seen)
    assert with_own_pixels(image, scene, [(REGION, None)]) is image
    assert scene.metadata.icc_profile == options.get("icc_profile")
    assert not recwarn.list


# --- transparency -----------------------------------------------------------------------------------------


def transparent() -> Pixels:
    """Magenta is hidden in the transparent half, and a quarter is half opaque."""
    rgba = np.dstack([SCENE, np.full(SCENE.shape[:2], 255, np.uint8)])
    rgba[:20] = (255, 0, 255, 0)
    rgba[:20, :30, 3] = 128
    return rgba


def test_networks_see_a_transparent_scene_on_white() -> None:
    with pytest.warns(InputWarning, match="the scene is partly transparent: the model sees it on white"):
        seen, _ = load_scene(encoded(transparent()))
    assert seen[0, 0].tolist() == [255, 127, 255]
    assert seen[0, -1].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(seen[20:], SCENE[20:])


@pytest.mark.filterwarnings("ignore:the scene is partly transparent")
@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparency_is_kept_and_what_is_drawn_is_opaque(file_format: str) -> None:
    seen, scene = load_scene(encoded(transparent()))
    result = with_own_pixels(drawn_into(seen), scene, [(REGION, None)])
    np.testing.assert_array_equal(result[outside()], transparent()[outside()])
    assert (result[REGION.slices] == (200, 60, 30, 255)).all()
    written = Image.open(io.BytesIO(encode_picture(result, file_format)))
    np.testing.assert_array_equal(np.asarray(written.getchannel("A")), result[..., 3])
    assert contact_sheet([result, result]).shape == (40, 128, 4)


@pytest.mark.filterwarnings("ignore:the scene is partly transparent")
@pytest.mark.parametrize("options", [{}, {"icc_profile": ADOBE_RGB}], ids=["srgb", "adobe"])
def test_what_a_mask_leaves_of_its_region_is_untouched(options: dict[str, Any]) -> None:
    """A fifth of the region is drawn, and fades; its other pixels keep colour and transparency."""

    def share_of(part: Box) -> NDArray[np.float32]:
        rows = np.arange(part.y0, part.y1)[:, None] - REGION.y0
        columns = np.arange(part.x0, part.x1)[None] - REGION.x0
        share = (REGION.width / 2 - rows - columns) / 4
        return np.clip(share, 0, 1).astype(np.float32)

    seen, scene = load_scene(encoded(transparent(), **options))
    drawn = np.zeros(seen.shape[:2], bool)
    drawn[REGION.slices] = share_of(REGION) > 0
    assert 0 < drawn.sum() < REGION.width * REGION.height / 2
    result = with_own_pixels(drawn_into(seen), scene, [(REGION, share_of)])
    np.testing.assert_array_equal(result[~drawn], transparent()[~drawn])
    assert (result[drawn][:, 3] == 255).all()
    whole = with_own_pixels(drawn_into(seen), scene, [(REGION, None)])
    np.testing.assert_array_equal(result[drawn], whole[drawn])


def test_jpeg_of_a_transparent_picture_is_on_white() -> None:
    rgba = np.full((16, 16, 4), (255, 0, 255, 0), np.uint8)
    with pytest.warns(InputWarning, match="a JPEG has no transparency: the picture is put on white"):
        content = encode_picture(rgba, "JPEG")
    assert (np.asarray(Image.open(io.BytesIO(content))) == 255).all()


# --- colours ----------------------------------------------------------------------------------------------


def test_networks_see_srgb_and_the_result_has_the_scenes_profile(recwarn: pytest.WarningsRecorder) -> None:
    seen, scene = load_scene(encoded(SCENE, icc_profile=ADOBE_RGB))
    expected = ImageCms.profileToProfile(
        Image.fromarray(SCENE),
        ImageCms.ImageCmsProfile(io.BytesIO(ADOBE_RGB)),
        ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    np.testing.assert_array_equal(seen, np.asarray(expected))
    assert np.abs(seen.astype(int) - SCENE).max() > 20
    result = with_own_pixels(drawn_into(seen), scene, [(REGION, None)])
    np.testing.assert_array_equal(result[outside()], SCENE[outside()])
    # what is drawn is shown as it was drawn: read again, it is the same colour
    again = load_picture(encode_picture(result, "PNG", scene.metadata), "the result")
    assert again.metadata.icc_profile == ADOBE_RGB
    assert np.abs(again.rgb[REGION.slices].astype(int) - (200, 60, 30)).max() <= 2
    assert not recwarn.list


def test_reference_in_another_profile_is_brought_to_srgb() -> None:
    flat = np.full((9, 9, 4), (180, 90, 60, 255), np.uint8)
    flat[0, 0, 3] = 0
    reference = load_picture(encoded(flat, icc_profile=ADOBE_RGB), "the reference")
    assert reference.alpha is not None
    seen, _ = load_scene(encoded(flat[..., :3], icc_profile=ADOBE_RGB))
    np.testing.assert_array_equal(reference.rgb, seen)
    assert seen[5, 5, 0] > 190


@pytest.mark.parametrize("mode", ["L", "CMYK", "LAB", "1"])
def test_other_colours_come_out_as_srgb_and_are_told_so(mode: str) -> None:
    image = Image.fromarray(SCENE)
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB") or image
    content = encoded(image if mode == "LAB" else image.convert(mode), "TIFF")
    with pytest.warns(InputWarning, match=r"the scene is .*: the result is in sRGB"):
        seen, scene = load_scene(content)
    assert with_own_pixels(seen, scene, []) is seen
    assert seen.shape == SCENE.shape
    assert scene.metadata.icc_profile is None


def test_grey_profile_is_applied() -> None:
    grey = Image.new("L", (9, 9), 128)
    with pytest.warns(InputWarning, match="the scene is grey"):
        seen, _ = load_scene(encoded(grey, icc_profile=icc_profile((), gamma=1.0)))
    assert seen[0, 0].tolist() == [188, 188, 188]  # half of the light in sRGB


@pytest.mark.parametrize("profile", [b"no profile", ADOBE_RGB[:200], icc_profile((), gamma=1.0)])
def test_profile_that_cannot_be_used_is_told_and_dropped(profile: bytes) -> None:
    with pytest.warns(InputWarning, match="the scene has a colour profile that cannot be used"):
        seen, scene = load_scene(encoded(SCENE, icc_profile=profile))
    np.testing.assert_array_equal(seen, SCENE)
    assert scene.metadata.icc_profile is None


def test_a_scene_whose_profile_leads_only_from_its_colours_becomes_srgb() -> None:
    with pytest.warns(InputWarning, match="a colour profile that cannot be converted back from sRGB"):
        seen, scene = load_scene(encoded(SCENE, icc_profile=one_way_profile(), dpi=(300, 300)))
    assert np.abs(seen.astype(int) - SCENE).max() > 20
    image = drawn_into(seen)
    assert with_own_pixels(image, scene, [(REGION, None)]) is image
    assert scene.metadata.icc_profile is None
    assert scene.metadata.dpi


@pytest.mark.parametrize(("brighter", "is_srgb"), [(1.01, True), (1.02, False)])
def test_a_profile_is_srgb_if_it_changes_no_colour_by_more_than_a_level(
    brighter: float, is_srgb: bool
) -> None:
    """Whoever wrote it, and however it was rounded; here its green is a little brighter."""
    profile = bytearray(SRGB)
    place = int.from_bytes(profile[profile.index(b"gXYZ") + 4 :][:4], "big") + 8
    values = np.frombuffer(bytes(profile[place : place + 12]), ">i4")
    profile[place : place + 12] = np.rint(values * brighter).astype(">i4").tobytes()
    seen, scene = load_scene(encoded(SCENE, icc_profile=bytes(profile)))
    assert (scene.own is scene.rgb) == (seen == SCENE).all() == is_srgb


def test_a_grey_picture_with_a_profile_for_colours_looks_as_it_does_in_them() -> None:
    grey = Image.fromarray(SCENE).convert("L")
    seen = [
        load_picture(encoded(image, icc_profile=icc_profile(gamma=1.0)), "the picture").rgb
        for image in (grey, grey.convert("RGB"))
    ]
    np.testing.assert_array_equal(*seen)
    assert np.abs(seen[0][..., 0].astype(int) - np.asarray(grey)).max() > 20


# --- EXIF and resolution ----------------------------------------------------------------------------------


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    tags[ExifTags.Base.Make], tags[ExifTags.Base.Copyright] = "maker", "(c) someone"
    tags[ExifTags.IFD.Exif] = {ExifTags.Base.ExifImageWidth: 40, ExifTags.Base.ExifImageHeight: 60}
    tags[ExifTags.IFD.GPSInfo] = {1: "N"}
    return tags.tobytes()


@pytest.mark.parametrize("to", ["PNG", "JPEG", "WEBP"] + ["AVIF"] * HAS_AVIF)
def test_exif_is_kept_without_its_orientation(to: str) -> None:
    turned = Image.fromarray(SCENE).transpose(Image.Transpose.ROTATE_90)
    scene = load_scene(encoded(turned, "JPEG", exif=exif(6), dpi=(300, 150)))[1]
    assert scene.rgb.shape == SCENE.shape
    kept = Image.open(io.BytesIO(encode_picture(scene.rgb, to, scene.metadata)))
    tags = kept.getexif()
    assert ExifTags.Base.Orientation not in tags
    assert (tags[ExifTags.Base.Make], tags[ExifTags.Base.Copyright]) == ("maker", "(c) someone")
    assert tags.get_ifd(ExifTags.IFD.GPSInfo)[1] == "N"
    assert tags.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExifImageWidth] == 60
    if to in ("PNG", "JPEG"):
        assert kept.info["dpi"] == pytest.approx((150, 300), abs=0.1)


def test_thumbnail_shows_the_old_picture_and_is_dropped() -> None:
    content = encoded(SCENE, "JPEG", exif=with_thumbnail(exif(1)))
    assert b"THUMBNAIL" in content
    scene = load_scene(content)[1]
    written = encode_picture(scene.rgb, "JPEG", scene.metadata)
    assert b"THUMBNAIL" not in written
    assert b"maker" in written


def with_thumbnail(exif_data: bytes) -> bytes:
    """With a second directory: tags 0x201 and 0x202 say where the thumbnail is, and how long."""
    content = bytearray(exif_data[6:])
    count = int.from_bytes(content[8:10], "big")
    after = 10 + 12 * count
    content[after : after + 4] = len(content).to_bytes(4, "big")
    thumbnail, start = b"\xff\xd8THUMBNAIL\xff\xd9", len(content) + 30
    content += struct.pack(">H", 2)
    for tag, value in ((0x201, start), (0x202, len(thumbnail))):
        content += struct.pack(">HHII", tag, 4, 1, value)
    content += struct.pack(">I", 0)
    return b"Exif\0\0" + bytes(content) + thumbnail


def test_exif_too_long_for_a_jpeg_is_told() -> None:
    tags = Image.Exif()
    tags[ExifTags.Base.ImageDescription] = "x" * 70_000
    with pytest.warns(InputWarning, match="bytes of EXIF data, more than a JPEG can hold: they are dropped"):
        assert load_scene(encoded(SCENE, exif=tags.tobytes()))[1].metadata.exif is None


def test_tiff_keeps_what_its_tags_say_of_the_picture() -> None:
    tags = {ExifTags.Base.Make: "maker", ExifTags.Base.Artist: "someone"}
    scene = load_scene(encoded(SCENE, "TIFF", tiffinfo=tags, dpi=(300, 300)))[1]
    written = Image.open(io.BytesIO(encode_picture(scene.rgb, "PNG", scene.metadata)))
    assert dict(written.getexif()) == tags
    assert written.info["dpi"] == pytest.approx((300, 300), abs=0.1)


@pytest.mark.skipif(not HAS_AVIF, reason="this Pillow has no AVIF")
def test_avif_is_read_and_written() -> None:
    flat = np.full((16, 24, 3), (200, 60, 30), np.uint8)
    content = encode_picture(flat, "AVIF", load_scene(encoded(flat, icc_profile=ADOBE_RGB))[1].metadata)
    scene = load_scene(content)[1]
    assert scene.metadata.icc_profile == ADOBE_RGB
    assert np.abs(scene.own.astype(int) - flat).max() <= 3
