"""Pictures and requests on their way to a server: what a file can hold, and what a server does not take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.errors import InputError
from runtime.imaging.pictures import load_picture
from runtime.request import Placement, Request, Sampling
from runtime.server.wire import message_from_request
from runtime.server.wire_values import file_of
from tests.support.pictures import SCENE

MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "I",
    "F",
)


@pytest.mark.parametrize("mode", MODES)
def test_every_pillow_image_is_what_it_is_without_a_server(mode: str) -> None:
    grey = mode in ("I", "F")
    image = Image.fromarray(SCENE).convert("L" if grey or mode == "La" else "RGB")
    image = image.convert("LA").convert(mode) if mode in ("La", "PA") else image.convert(mode)
    sent, direct = load_picture(file_of(image, "the scene"), "sent"), load_picture(image, "direct")
    difference = np.abs(sent.rgb.astype(int) - direct.rgb)
    # Pillow rounds from HSV as it converts
    assert difference.max() <= (1 if mode == "HSV" else 0)


def asked(**fields: Any) -> Request:
    return Request(SCENE, [Placement(SCENE, box=(1, 1, 9, 9))], **fields)


def test_a_server_does_not_check_the_size_of_a_scene() -> None:
    with pytest.raises(InputError, match="size that a scene must have") as caught:
        message_from_request(asked(scene_size=(5, 5)))
    assert caught.value.field == "scene_size"


@pytest.mark.parametrize("interval", [(5,), (1, 2, 3), 7])
def test_an_interval_that_is_none_is_named(interval: Any) -> None:
    with pytest.raises(InputError, match="a lower and a higher timestep") as caught:
        message_from_request(asked(sampling=Sampling(guidance_interval=interval)))
    assert caught.value.field == "sampling.guidance_interval"


@pytest.mark.parametrize("size", ["64x64", 64, (1, 2, 3)])
def test_a_size_that_is_none_is_named(size: Any) -> None:
    with pytest.raises(InputError, match="a width and a height") as caught:
        Request.drawing("a cup", size=size)
    assert caught.value.field == "size"
