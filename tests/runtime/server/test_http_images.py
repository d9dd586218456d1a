"""Image edits by the official client of OpenAI's API, against the HTTP door."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from runtime import Compositor, Placement, Sampling
from runtime.errors import InputError
from runtime.rpc import compositor_pb2 as pb
from runtime.server.http.messages import message_of
from tests.support.http import post, post_form
from tests.support.serving import (
    BOX,
    OBJECT,
    PATIENCE,
    SCENE,
    ServerThread,
    held_compositor,
    scene_array,
)
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

TWO_STEPS = {"steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle, http="127.0.0.1:0") as server:
        yield server


def client_of(server: ServerThread) -> openai.OpenAI:
    base = f"http://{server.server.http_address}/v1"
    return openai.OpenAI(base_url=base, api_key="none", timeout=PATIENCE, max_retries=0)


@pytest.fixture
def client(server: ServerThread) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Compositor:
    return held_compositor(tiny_bundle)[0]


def file(content: bytes, name: str = "picture.png") -> tuple[str, bytes, str]:
    return name, content, "image/png"


def with_hole(array: Any, box: tuple[int, int, int, int]) -> bytes:
    """A picture that is transparent in a box, as the mask of an edit."""
    x0, y0, x1, y1 = box
    alpha = np.full((*array.shape[:2], 1), 255, np.uint8)
    alpha[y0:y1, x0:x1] = 0
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([array, alpha], axis=2)).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(data: str | None) -> Any:
    assert data
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def place_of(box: tuple[int, int, int, int]) -> Any:
    inside = np.zeros((64, 80), bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    return inside


def test_what_is_transparent_in_the_mask_is_the_place(client: openai.OpenAI, alone: Compositor) -> None:
    answer = client.images.edit(
        image=[file(SCENE), file(OBJECT)],
        mask=file(with_hole(scene_array(), BOX)),
        prompt="",
        extra_body=TWO_STEPS,
    )
    expected = alone.composite(
        SCENE, Placement(reference=OBJECT, mask=place_of(BOX)), seed=7, sampling=Sampling(steps=2)
    )
    assert answer.data
    assert (pixels(answer.data[0].b64_json) == np.asarray(expected)).all()


def test_a_transparent_scene_is_its_own_mask(client: openai.OpenAI) -> None:
    scene = with_hole(scene_array(), BOX)
    answer = client.images.edit(image=[file(scene), file(OBJECT)], prompt="", extra_body=TWO_STEPS)
    assert answer.data
    result = pixels(answer.data[0].b64_json)
    changed = (result != np.asarray(Image.open(io.BytesIO(scene)))).any(axis=2)
    assert changed[20:40, 20:50].mean() > 0.9


def test_the_object_and_its_place_may_come_by_extra_body(client: openai.OpenAI, alone: Compositor) -> None:
    extra = {
        "reference_image": base64.b64encode(OBJECT).decode(),
        "box": list(BOX),
        "mode": "keep_background",
    }
    answer = client.images.edit(
        image=file(SCENE), prompt="", n=2, size="80x64", extra_body={**extra, **TWO_STEPS}
    )
    assert answer.data
    assert len(answer.data) == 2
    expected = alone.composite(
        SCENE,
        Placement(reference=OBJECT, box=BOX, mode="keep_background"),
        seed=7,
        sampling=Sampling(steps=2),
    )
    assert (pixels(answer.data[0].b64_json) == np.asarray(expected)).all()


def test_several_pictures_of_the_object_are_views(client: openai.OpenAI, server: ServerThread) -> None:
    """This bundle takes one picture of an object, and counts those that it is given."""
    both = [base64.b64encode(OBJECT).decode()] * 2
    images = [file(each) for each in (SCENE, OBJECT, OBJECT)]
    refused = r"placements\[0\].views: 2 pictures of an object are given, but this bundle takes 1"
    for image, more in ((file(SCENE), {"reference_image": both}), (images, {})):
        with pytest.raises(openai.BadRequestError, match=refused):
            client.images.edit(image=image, prompt="", extra_body={"box": list(BOX), **more})  # type: ignore[arg-type]
    client.images.edit(
        image=file(SCENE), prompt="", extra_body={"box": list(BOX), "reference_image": both[:1], **TWO_STEPS}
    )
    box: list[tuple[str, str | bytes]] = [("box", ",".join(map(str, BOX))), ("scene", SCENE)]
    for names in (("reference", "reference"), ("reference[]", "reference[]"), ("reference", "views[]")):
        form = [*box, *((name, OBJECT) for name in names)]
        answer = post_form(str(server.server.http_address), "/v1/composite", form)
        assert re.match(refused, answer.error["message"])


def test_a_list_of_references_is_the_first_and_its_views() -> None:
    place = {"box": list(BOX), "reference": [b"front", b"left", b"right"]}
    message, _ = message_of({"scene": SCENE, **place}, pb.CompositeRequest)
    (placement,) = message.placements
    assert placement.reference == b"front"
    assert [view.picture for view in placement.views] == [b"left", b"right"]
    for more, text in (({"reference": []}, "the list is empty"), ({"views": [b"left"]}, "not in both")):
        with pytest.raises(InputError, match=text) as caught:
            message_of({"scene": SCENE, **place, **more}, pb.CompositeRequest)
        assert caught.value.field == "placements[0].reference"


def test_the_format_of_the_files_is_theirs_to_choose(client: openai.OpenAI) -> None:
    given = {"image": [file(SCENE), file(OBJECT)], "prompt": "", "output_format": "webp"}
    answer: Any = client.images.edit(**given, extra_body={"box": list(BOX), **TWO_STEPS})
    assert answer.output_format == "webp"
    assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).format == "WEBP"


def test_qualities_are_the_presets(client: openai.OpenAI, server: ServerThread) -> None:
    steps = {}
    for quality in ("low", "medium"):
        before = len(server.engine.steps)
        client.images.edit(
            image=[file(SCENE), file(OBJECT)],
            prompt="",
            quality=quality,
            extra_body={"box": list(BOX)},  # type: ignore[arg-type]
        )
        steps[quality] = len(server.engine.steps) - before
    assert 0 < steps["low"] < steps["medium"] < 50


def test_partial_images_are_streamed(client: openai.OpenAI) -> None:
    stream: Any = client.images.edit(
        image=[file(SCENE), file(OBJECT)],
        prompt="",
        stream=True,
        partial_images=2,
        extra_body={"box": list(BOX), "seed": 7, "steps": 6},
    )
    events = list(stream)
    assert [event.type for event in events] == [
        "image_edit.partial_image",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert pixels(events[-1].b64_json).shape == (64, 80, 3)


@pytest.mark.parametrize(
    ("given", "param", "text"),
    [
        ({"quality": "best"}, "quality", "choose one of auto, high"),
        ({"quality": ["low", "high"]}, "quality", "there is no such value: choose one of auto, high"),
        ({"sampling": {"steps": 2}, "steps": 2}, "sampling", "another field of the request says this, too"),
        ({"reference_image": "AAAA"}, "reference", "another field of the request says this, too"),
        ({"reference": "AAAA"}, "reference", "another field of the request says this, too"),
        ({"scene": "AAAA"}, "scene", "another field of the request says this, too"),
        ({"placements": ["x"]}, "placements", "another field of the request says this, too"),
        ({"n": 1, "num_images": 2}, "num_images", "another field of the request says this, too"),
        ({"size": "512x512"}, "scene", "the scene is 80 x 64 pixels, and the result has its size"),
        ({"size": "big"}, "size", "a size like 1024x1024 is expected"),
        ({"response_format": "url"}, "response_format", "only b64_json is offered"),
        ({"response_format": "json"}, "response_format", "only b64_json is offered"),
        ({"background": "transparent"}, "background", "only auto is offered"),
        ({"output_format": "tiff"}, "output_format", "choose one of png, jpeg, webp"),
        ({"n": 0}, "num_images", "from 1 to"),
        ({"prompt": "a cat"}, "placements[0].prompt", "takes no prompt"),
        ({"box": [1, 2]}, "placements[0].box", "4 numbers are expected"),
        ({"partial_images": 9}, "partial_images", "from 0 to 3"),
    ],
)
def test_what_cannot_be_used_is_named(
    client: openai.OpenAI, given: dict[str, Any], param: str, text: str
) -> None:
    extra = {"box": list(BOX), **given}
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(image=[file(SCENE), file(OBJECT)], prompt="", extra_body=extra)
    assert text in caught.value.message
    assert caught.value.param == param


def test_a_mask_that_marks_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="inside is what is transparent, and nothing is"):
        client.images.edit(image=[file(SCENE), file(OBJECT)], mask=file(SCENE), prompt="")


def test_a_model_that_is_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-image-1' here") as caught:
        client.images.edit(image=file(SCENE), prompt="", model="gpt-image-1")
    assert caught.value.param == "model"


def test_models_are_listed(client: openai.OpenAI, tiny_bundle: Path) -> None:
    assert [model.id for model in client.models.list()] == [tiny_bundle.name]


def test_pictures_are_drawn_from_words() -> None:
    bundle = tiny_stable_diffusion_bundle(9)
    with ServerThread(bundle, http="127.0.0.1:0") as server, client_of(server) as client:
        answer = client.images.generate(prompt="a cat", size="64x64", extra_body=TWO_STEPS)  # type: ignore[call-overload]
        alone, _ = held_compositor(bundle)
        expected = alone.draw("a cat", seed=7, sampling=Sampling(steps=2))
        assert (pixels(answer.data[0].b64_json) == np.asarray(expected)).all()
        filled = client.images.edit(
            image=file(SCENE), mask=file(with_hole(scene_array(), BOX)), prompt="a cat", extra_body=TWO_STEPS
        )
        place = Placement(prompt="a cat", mask=place_of(BOX))
        expected = alone.composite(SCENE, place, seed=7, sampling=Sampling(steps=2))
        assert filled.data
        assert (pixels(filled.data[0].b64_json) == np.asarray(expected)).all()
        with pytest.raises(openai.BadRequestError, match="draws pictures of 64 x 64"):
            client.images.generate(prompt="a cat", size="1024x1024")
        answer = post(
            str(server.server.http_address), "/v1/draw", {"prompt": "a cat", "sampling": {"steps": 1}}
        )
        assert answer.status == 200
