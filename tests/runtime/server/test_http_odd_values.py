"""Values of another kind than a field's, in every field of every POST: refused, and the field is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import InputError
from runtime.rpc import compositor_pb2 as pb
from runtime.server.http.messages import message_of
from tests.runtime.server.test_http import fields, http_address, in_base64
from tests.support.http import post, request
from tests.support.serving import BOX, OBJECT, SCENE, ServerThread

ODD = ([["a"]], {"a": [1]}, True, 1.5, 10**30, float("inf"), "\ud800", "\0")

PLACEMENT = (
    *("reference", "reference_mask", "box", "mode", "mask_level", "reference_clicks", "automatic_mask"),
    *("prompt", "negative_prompt", "keep_specks", "views", "edge", "refine", "strength"),
    *("ratios", "ratios.reference", "ratios.box", "ratios.crop"),
)
SAMPLING = (
    *("steps", "guidance_scale", "control_scale", "eta", "quality", "sampler", "guidance_interval"),
    "map_steps",
)
COMMON = ("seed", "num_images", "output_format", "model")
OPENAI = ("n", "size", "quality", "output_format", "model", "stream", "partial_images", "response_format")

EDIT = {"scene": in_base64(SCENE), "mask": in_base64(SCENE)}
OPENAI_EDIT = {"image": in_base64(SCENE), "reference_image": in_base64(OBJECT), "box": list(BOX), "steps": 1}
POSTS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("composite", fields(), ("scene", "preview_every", "stream", "sampling", *PLACEMENT, *COMMON)),
    ("composite", fields(), tuple(f"sampling.{name}" for name in SAMPLING)),
    ("draw", {}, ("prompt", "negative_prompt", "width", "height", "sampling", *COMMON)),
    ("edit", {**EDIT, "remove": True}, ("scene", "mask", "fill", "fill.prompt", "fill.sampling", *COMMON)),
    ("edit", EDIT, ("remove", "move", "move.to", "reshape.to", "swap", "swap.placement", "swap.other.box")),
    ("edit", EDIT, ("try_on", "try_on.reference", "try_on.views")),
    ("segment", {}, ("picture", "where", "where.box", "box", "mask", "clicks")),
    ("jobs", {"scene": in_base64(SCENE)}, ("placements", *COMMON)),
    ("images/edits", OPENAI_EDIT, ("mask", *OPENAI, *SAMPLING[:4])),
    ("images/edits", OPENAI_EDIT, ("image", "reference_image", *PLACEMENT)),
    ("images/generations", {"prompt": "a cat"}, ("prompt", "negative_prompt", *OPENAI)),
)
NAMED_OTHERWISE = {"n": "num_images", "reference_image": "reference"}


@pytest.fixture(scope="module")
def address(tiny_bundle: Path) -> Iterator[str]:
    with (
        pytest.MonkeyPatch.context() as patch,
        ServerThread(tiny_bundle, http="127.0.0.1:0", max_steps=3, max_images=2) as server,
    ):
        # who is refused often is answered late
        patch.setattr("runtime.server.gate._REFUSALS", (1e9, 1e9))
        yield http_address(server)


def fits(name: str, value: Any) -> bool:
    """Whether an odd value is one of the field's own."""
    last = name.rpartition(".")[2]
    if value is True:
        return last in ("automatic_mask", "keep_specks", "stream", "remove")
    if value == 1.5:
        return name.startswith("ratios.") or last in ("guidance_scale", "control_scale")
    return value == "\0" and last in ("prompt", "negative_prompt")


@pytest.mark.parametrize(("path", "given", "names"), POSTS)
def test_a_value_of_another_kind_is_refused(
    address: str, path: str, given: dict[str, Any], names: tuple[str, ...]
) -> None:
    for name in names:
        *outer, last = name.split(".")
        for value in ODD:
            if fits(name, value):
                continue
            body = within = json.loads(json.dumps(given))
            for each in outer:
                within = within.setdefault(each, {})
            within[last] = value
            answer = post(address, f"/v1/{path}", body)
            assert answer.status == (404 if (name, value) == ("model", "\0") else 400), (name, value)
            assert NAMED_OTHERWISE.get(last, last) in answer.error["param"], (name, value)


@pytest.mark.parametrize("name", ["scene", "mode", "box", "seed", "output_format", "model"])
def test_a_value_that_is_too_deep_to_be_shown(name: str) -> None:
    deep: Any = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(InputError) as caught:
        message_of(fields(**{name: deep}), pb.CompositeRequest)
    assert name in caught.value.field


@pytest.mark.parametrize(
    ("body", "headers", "text"),
    [
        (b'{"\\ud800": 1, "scene": "AAAA"}', {}, "there is no field '\ud800'"),
        (b'{"scene": "AAAA", "seed": 1, "seed": 2}', {}, "has the field 'seed' twice"),
        (b"\x1f\x8b", {"content-encoding": "gzip"}, "a body that is encoded (gzip) is not read"),
    ],
)
def test_bodies_that_say_no_field_once(address: str, body: bytes, headers: dict[str, str], text: str) -> None:
    answer = request(address, "POST", "/v1/composite", body, {"content-type": "application/json", **headers})
    assert answer.status == 400
    assert text in answer.error["message"]


@pytest.mark.parametrize("level", [2, "2", 2.0, "2.0", " 2 ", "blob", "Blob"])
def test_a_mask_level_has_a_name_and_a_number(level: Any) -> None:
    message, _ = message_of({"scene": "", "mask_level": level}, pb.CompositeRequest)
    assert message.placements[0].mask_level == pb.MASK_LEVEL_BLOB


@pytest.mark.parametrize("level", [4, -1, "4", 2.5, "2.5", "", "nan", True, 1e300, "9" * 5000])
def test_what_is_no_mask_level(level: Any) -> None:
    with pytest.raises(InputError, match="choose one of") as caught:
        message_of({"scene": "", "mask_level": level}, pb.CompositeRequest)
    assert caught.value.field == "placements[0].mask_level"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(("given", "steps"), [("3", 3), (3.0, 3), ("3.0", 3), (" 3 ", 3), ("3e0", 3)])
def test_whole_numbers_come_as_text_and_in_floating_point(given: Any, steps: int) -> None:
    message, _ = message_of({"scene": "", "sampling": {"steps": given}}, pb.CompositeRequest)
    assert message.sampling.steps == steps


@pytest.mark.parametrize("given", ["1_0", "\u0662", "0x2", "", "three", "nan", "inf", "9" * 5000, [3]])
def test_what_is_no_number(given: Any) -> None:
    for name in ("steps", "guidance_scale"):
        with pytest.raises(InputError, match=r"number.* is expected") as caught:
            message_of({"scene": "", "sampling": {name: given}}, pb.CompositeRequest)
        assert caught.value.field == f"sampling.{name}"


@pytest.mark.parametrize("given", [3, True, 2.5])
def test_a_single_value_for_several_numbers(given: Any) -> None:
    with pytest.raises(InputError, match="2 numbers are expected"):
        message_of({"scene": "", "sampling": {"guidance_interval": given}}, pb.CompositeRequest)
