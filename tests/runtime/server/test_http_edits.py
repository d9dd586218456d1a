"""Edits and objects over HTTP: every one of the RPCs, as JSON, as a form, as events, and as a job."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.edits import Editor
from runtime.edits.fillers import GUESS
from runtime.request import (
    Action,
    Edit,
    Move,
    Placement,
    Remove,
    Reshape,
    Sampling,
    Swap,
    SwapPlaces,
    TryOn,
    Where,
)
from runtime.segmentation import Segmenter
from tests.runtime.server.test_http import http_address, in_base64, pixels
from tests.runtime.server.test_http_jobs import ended
from tests.support.http import get, post, post_form
from tests.support.segmenters import bright_things
from tests.support.serving import OBJECT, ServerThread, png, wait_until

SCENE = png(np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8))
SHELF = png(bright_things())
TO = (40, 10, 80, 40)


def outline(rows: slice, columns: slice) -> bytes:
    mask = np.zeros((48, 96), np.uint8)
    mask[rows, columns] = 255
    return png(mask)


CUP, VASE, TALL = (
    outline(slice(12, 30), slice(10, 28)),
    outline(slice(8, 40), slice(60, 70)),
    outline(slice(4, 34), slice(12, 26)),
)


@pytest.fixture(scope="module")
def server(example_bundle: Path, segmenter_bundles: tuple[Path, Path]) -> Iterator[ServerThread]:
    segmenters = tuple(map(str, segmenter_bundles))
    with ServerThread(example_bundle, segmenter=segmenters, http="127.0.0.1:0") as running:
        yield running


@pytest.fixture(scope="module")
def address(server: ServerThread) -> str:
    return http_address(server)


def fields(**more: Any) -> dict[str, Any]:
    """An edit of the cup, without what is done to it."""
    return {"scene": in_base64(SCENE), "mask": in_base64(CUP), "seed": 3, **more}


def edited(server: ServerThread, action: Action) -> Any:
    sampling = Sampling() if isinstance(action, Remove) else Sampling(steps=1)
    (result,) = Editor(server.compositor).run(Edit(SCENE, Where(mask=CUP), action, seed=3, sampling=sampling))
    return result


OBJECT_64 = in_base64(OBJECT)


@pytest.mark.parametrize(
    ("action", "more"),
    [
        (Remove(), {"remove": {}}),
        (Move(TO), {"move": {"to": list(TO)}}),
        (Move(TO, refine=0, strength=1), {"move": {"to": list(TO), "refine": 0, "strength": 1.0}}),
        (Reshape(TALL), {"reshape": {"to": in_base64(TALL)}}),
        (
            Swap(Placement(OBJECT)),
            {"swap": {"placement": {"reference": OBJECT_64}, "strength": 1, "refine": 0}},
        ),
        (SwapPlaces(Where(mask=VASE)), {"swap": {"other": {"mask": in_base64(VASE)}}}),
        (TryOn(Placement(OBJECT)), {"try_on": {"reference": OBJECT_64}}),
    ],
    ids=["remove", "move", "move-with-strength", "reshape", "swap", "swap-places", "try-on"],
)
def test_the_picture_is_that_of_the_editor(
    server: ServerThread, address: str, action: Action, more: dict[str, Any]
) -> None:
    steps = {} if "remove" in more else {"sampling": {"steps": 1}}
    answer = post(address, "/v1/edit", fields(**more, **steps)).json
    expected = edited(server, action)
    (image,) = answer["images"]
    assert (pixels(base64.b64decode(image["image"])) == expected.image).all()
    assert image["regions"] == [list(region) for region in expected.regions]
    assert answer.get("filler", "") == expected.filler


def test_a_form_asks_for_the_same(server: ServerThread, address: str) -> None:
    given: list[tuple[str, str | bytes]] = [("scene", SCENE), ("where.mask", CUP), ("seed", "3")]
    removed = post_form(address, "/v1/edit", [*given, ("remove", "true")], accept="image/png")
    assert (pixels(removed.content) == edited(server, Remove()).image).all()
    to = ("move.to", ",".join(map(str, TO)))
    moved = post_form(address, "/v1/edit", [*given, to, ("sampling.steps", "1")], accept="image/png")
    assert (pixels(moved.content) == edited(server, Move(TO)).image).all()
    assert moved.headers["x-seed"] == "3"


@pytest.mark.parametrize("how", [{"stream": True}, {"accept": "text/event-stream"}], ids=["field", "header"])
def test_events_come_on_the_way(address: str, how: dict[str, Any]) -> None:
    accept = {"accept": how.pop("accept")} if "accept" in how else {}
    asked = fields(move={"to": list(TO)}, sampling={"steps": 3}, preview_every=2, **how)
    events = post(address, "/v1/edit", asked, **accept).events
    assert events[0][0] == "queued"
    assert [fields for name, fields in events if name == "step_done"] == [
        {"done": done, "total": 3} for done in (1, 2, 3)
    ]
    assert [name for name, _ in events].count("preview") == 1
    assert events[-1][0] == "result"
    assert events[-1][1]["filler"] == GUESS


def test_an_edit_is_a_job(server: ServerThread, address: str) -> None:
    job = post(address, "/v1/jobs", fields(remove=True)).json
    assert ended(address, job)["status"] == "succeeded"
    found = get(address, f"/v1/jobs/{job['id']}/result", accept="image/png")
    assert (pixels(found.content) == edited(server, Remove()).image).all()
    wait_until(lambda: not server.batcher.tickets)


def test_the_object_is_found(address: str) -> None:
    answer = post_form(
        address,
        "/v1/edit",
        [("scene", SHELF), ("clicks", "20,20"), ("remove", "true")],
        accept="image/png",
    )
    found = pixels(answer.content)
    assert found[24, 24].max() < 40
    assert found[24, 70].min() == 160


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ([], Where()),
        ([("clicks", "20,20"), ("clicks", "!70,30")], Where(clicks=[(20, 20), (70, 30, False)])),
        ([("box", "56,14,88,40")], Where(box=(56, 14, 88, 40))),
    ],
    ids=["main object", "clicks", "box"],
)
def test_a_mask_is_that_of_the_segmenter(
    address: str, segmenter_bundles: tuple[Path, Path], given: list[Any], where: Where
) -> None:
    answer = post_form(address, "/v1/segment", [("picture", SHELF), *given], accept="image/png")
    assert answer.headers["content-type"] == "image/png"
    expected = Segmenter.load(*segmenter_bundles).segment(bright_things(), where.clicks, where.box)
    np.testing.assert_array_equal(pixels(answer.content) > 0, expected.mask)
    score = answer.headers.get("x-score")
    assert score == (None if expected.score is None else f"{expected.score:g}")


def test_a_mask_in_json(address: str) -> None:
    for clicks in ([[20, 20]], ["20,20"], {"points": [{"x": 20, "y": 20}]}, "20,20"):
        answer = post(address, "/v1/segment", {"picture": in_base64(SHELF), "where": {"clicks": clicks}})
        assert answer.json["request_id"] == answer.headers["x-request-id"]
        assert answer.json["seconds"].keys() >= {"read", "segment"}
        assert answer.json["score"] > 0
        mask = Image.open(io.BytesIO(base64.b64decode(answer.json["mask"])))
        assert mask.size == (96, 48)


@pytest.mark.parametrize(
    ("path", "more", "param", "text"),
    [
        ("edit", {"move": {"to": [200, 0, 240, 40]}}, "move.to", "outside"),
        ("edit", {"reshape": {"to": OBJECT_64}}, "reshape.to", "they must have the same size"),
        ("edit", {"swap": {"other": {"box": [1, 2, 1, 4]}}}, "swap.other.box", "no area"),
        ("edit", {"move": {"to": list(TO), "strength": 2}}, "move.strength", "a number above 0"),
        ("edit", {"reshape": {"to": in_base64(TALL), "refine": 1000}}, "reshape.refine", "from 1 to 999"),
        (
            "edit",
            {"swap": {"placement": {"reference": OBJECT_64}, "strength": 0.5}},
            "swap.strength",
            "set placement.strength",
        ),
        ("edit", {"swap": {"placement": {"reference": "AAAA"}}}, "swap.placement.reference", "not a picture"),
        ("edit", {"try_on": {"reference": OBJECT_64, "prompt": "a hat"}}, "try_on.prompt", "takes no prompt"),
        ("edit", {"try_on": {"reference": OBJECT_64, "box": [1, 2, 3, 4]}}, "try_on", "leave out box"),
        ("edit", {}, "action", "no edit is given"),
        ("edit", {"remove": {}, "move": {"to": list(TO)}}, None, "give either remove or move"),
        ("edit", {"remove": {}, "box": [1, 2, 3, 4]}, "where", "give either box or mask"),
        ("edit", {"remove": {}, "num_images": 100}, "num_images", "from 1 to"),
        ("edit", {"remove": 3}, "remove", "true or false"),
        ("edit", {"remove": {}, "stream": "perhaps"}, "stream", "true or false"),
        ("segment", {}, "picture", "the picture is empty"),
        ("segment", {"picture": in_base64(b"GIF89a")}, "picture", "the picture is"),
        (
            "segment",
            {"picture": in_base64(SHELF), "clicks": "500,2"},
            "where.clicks",
            "lies outside the picture",
        ),
        ("segment", {"picture": in_base64(SHELF), "clicks": "20"}, "where.clicks.points[0]", "2 numbers"),
        ("segment", {"picture": in_base64(SHELF), "clicks": []}, "where.clicks", "no click is on the object"),
        (
            "segment",
            {"picture": in_base64(SHELF), "mask": in_base64(SHELF)},
            "where",
            "a mask already selects the object",
        ),
    ],
)
def test_what_cannot_be_used_is_named(
    address: str, path: str, more: dict[str, Any], param: str | None, text: str
) -> None:
    answer = post(address, f"/v1/{path}", fields(**more) if path == "edit" else more)
    assert answer.status == 400, answer.content
    assert text in answer.error["message"]
    assert answer.error["param"] == param


def test_a_model_that_is_missing_is_named(address: str, tiny_bundle: Path) -> None:
    answer = post(address, "/v1/edit", fields(remove={}, fill={"prompt": "a desk"}))
    assert answer.status == 409
    assert "--filler BUNDLE" in answer.error["message"]
    with ServerThread(tiny_bundle, http="127.0.0.1:0") as bare:
        given = {"picture": in_base64(SHELF), "clicks": [[20, 20]]}
        answer = post(http_address(bare), "/v1/segment", given)
    assert answer.status == 409
    assert "--segmenter BUNDLE" in answer.error["message"]
