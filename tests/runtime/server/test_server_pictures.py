"""What a scene keeps and what is warned of is the same here and over the wire."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.client import Client
from runtime.compositor import Compositor
from runtime.errors import InputWarning
from runtime.imaging.boxes import Box
from runtime.request import Placement, Request, Sampling
from tests.support.picture_files import encoded, icc_profile
from tests.support.serving import BOX, OBJECT, ServerThread, held_compositor, object_array, scene_array

STEPS = Sampling(steps=2)


@pytest.fixture(scope="module")
def here(tiny_bundle: Path) -> Compositor:
    return held_compositor(tiny_bundle)[0]


@pytest.fixture(scope="module")
def there(tiny_bundle: Path) -> Iterator[Client]:
    with ServerThread(tiny_bundle) as server, Client(server.address) as client:
        yield client


def transparent_scene() -> bytes:
    """In a profile of its own, with EXIF and a resolution."""
    rgba = np.dstack([scene_array(), np.full((64, 80), 255, np.uint8)])
    rgba[:20] = (255, 0, 255, 0)
    exif = Image.Exif()
    exif[0x010F] = "maker"
    return encoded(rgba, icc_profile=icc_profile(), exif=exif.tobytes(), dpi=(300, 300))


def test_everything_of_the_scene_comes_back(here: Compositor, there: Client) -> None:
    request = Request(transparent_scene(), [Placement(OBJECT, box=BOX)], 7, STEPS)
    (ours,), (theirs,) = here.run(request), there.run(request)
    assert ours.image.shape == (64, 80, 4)
    assert ours.metadata.icc_profile == icc_profile()
    assert ours.metadata.exif
    np.testing.assert_array_equal(theirs.image, ours.image)
    assert theirs.metadata.info.keys() == ours.metadata.info.keys()
    assert (theirs.metadata.icc_profile, theirs.metadata.exif) == (
        ours.metadata.icc_profile,
        ours.metadata.exif,
    )
    assert theirs.warnings == ours.warnings
    assert "the scene is partly transparent" in ours.warnings[0]


def test_jpeg_without_transparency_is_told_by_the_server(there: Client) -> None:
    request = Request(transparent_scene(), [Placement(OBJECT, box=BOX)], 7, STEPS, num_images=2)
    results = there.run(request, file_format="JPEG")
    assert [result.image.shape for result in results] == [(64, 80, 3)] * 2
    assert sum("a JPEG has no transparency" in text for text in results[0].warnings) == 1


def test_pillow_images_carry_it_and_python_warns(here: Compositor, there: Client) -> None:
    for compositor in (here, there):
        with pytest.warns(InputWarning, match="the scene is partly transparent"):
            image = compositor.composite(
                transparent_scene(), Placement(OBJECT, box=BOX), seed=7, sampling=STEPS
            )
        assert image.mode == "RGBA"
        assert image.info["icc_profile"] == icc_profile()


def test_specks_travel(here: Compositor, there: Client) -> None:
    stray = np.zeros((64, 80), np.bool_)
    stray[2:38, 2:38] = stray[63, 79] = True
    for compositor in (here, there):
        regions = {}
        for keep_specks in (False, True):
            placement = Placement(OBJECT, mask=stray, mode="keep_background", keep_specks=keep_specks)
            (result,) = compositor.run(Request(scene_array(), [placement], 7, STEPS))
            regions[keep_specks] = result.regions[0]
            assert any("specks" in text for text in result.warnings) == (not keep_specks)
        assert regions[False].x1 < 45
        assert regions[True].x1 > 70


def test_mask_of_a_turned_scene_is_turned(here: Compositor, there: Client) -> None:
    exif, place = Image.Exif(), np.zeros((64, 80), np.bool_)
    exif[0x0112] = 6
    place[8:50, 10:60] = True
    turn = Image.Transpose.ROTATE_90
    scene = encoded(Image.fromarray(scene_array()).transpose(turn), exif=exif.tobytes())
    for compositor in (here, there):
        stored = encoded(Image.fromarray(place).transpose(turn))
        (turned,) = compositor.run(Request(scene, [Placement(OBJECT, mask=stored)], 7, STEPS))
        (upright,) = compositor.run(Request(scene_array(), [Placement(OBJECT, mask=place)], 7, STEPS))
        np.testing.assert_array_equal(turned.image, upright.image)
        assert "is rotated too" in turned.warnings[0]
        assert not any("turned" in text for text in upright.warnings)


@pytest.mark.parametrize("mode", ["F", "I;16", "CMYK", "HSV", "LA", "RGBa"])
def test_pillow_images_of_any_mode_travel(here: Compositor, there: Client, mode: str) -> None:
    rgb = Image.fromarray(scene_array())
    scene = {
        "F": lambda: Image.fromarray(np.asarray(rgb.convert("L")) / np.float32(255)),
        "I;16": lambda: Image.fromarray(np.asarray(rgb.convert("L")) * np.uint16(257)),
        "RGBa": lambda: rgb.convert("RGBA").convert("RGBa"),
    }.get(mode, lambda: rgb.convert(mode))()
    request = Request(scene, [Placement(object_array(), box=BOX)], 7, STEPS)
    (ours,), (theirs,) = here.run(request), there.run(request)
    np.testing.assert_array_equal(theirs.image, ours.image)


def test_scene_without_anything_is_not_warned_of(here: Compositor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the object has 24 x 24 pixels in the reference")
        image = here.composite(
            io.BytesIO(encoded(scene_array())), Placement(OBJECT, box=Box(*BOX)), sampling=STEPS
        )
    assert (image.mode, image.info) == ("RGB", {})
