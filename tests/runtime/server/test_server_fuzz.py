"""Requests that nobody would send, by both doors: the server answers each with a status of the caller's, and
lives on.

300 of them in the usual test run; the nightly command asks for more:

    ANYDOOR_FUZZ_REQUESTS=5000 python -m pytest tests/runtime/server/test_server_fuzz.py

Over gRPC and over HTTP: made from the contract, with flipped bits, and with flipped bits in a picture.
"""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.rpc import compositor_pb2 as pb
from runtime.server.http.messages import ACTIONS as ACTION_NAMES
from runtime.server.http.messages import PLACEMENT, WHERE
from tests.runtime.server.test_http import form, http_address, in_base64
from tests.support.http import multipart, request
from tests.support.serving import OBJECT, PATIENCE, SCENE, ServerThread, message, png, scene_array, wait_until

REQUESTS = int(os.environ.get("ANYDOOR_FUZZ_REQUESTS", "300"))
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.NOT_FOUND,  # flipped bits may name a model
}
ALLOWED_OVER_HTTP = {200, 202, 400, 404, 409, 429}
METHOD = "/anydoor.v1.CompositorService/"
FUZZ = settings(
    max_examples=REQUESTS // 6,  # the tests, of which one sends two at a time
    database=None,
    derandomize="ANYDOOR_FUZZ_REQUESTS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    """At the end no request, and no job, has failed inside, and nothing is left of them."""
    limits = {"max_steps": 3, "max_images": 2, "max_pixels": 1 << 14, "max_message_bytes": 1 << 18}
    with (
        pytest.MonkeyPatch.context() as patch,
        ServerThread(tiny_bundle, http="127.0.0.1:0", **limits) as server,
    ):
        # who is refused often is answered late
        patch.setattr("runtime.server.gate._REFUSALS", (1e9, 1e9))
        yield server
        wait_until(lambda: server.batcher.tickets == [])
        ends = [sample for metric in server.server.metrics.requests.collect() for sample in metric.samples]
        assert any(sample.labels["code"] == "OK" for sample in ends)
        assert [sample for sample in ends if sample.labels["code"] in ("INTERNAL", "UNKNOWN")] == []


@pytest.fixture(scope="module")
def send(server: ServerThread) -> Iterator[Any]:
    """Sends bytes to a method and returns the status; at the end, the server must still make pictures."""
    with grpc.insecure_channel(server.address) as channel:

        def call(content: bytes, method: str = "Composite") -> grpc.StatusCode:
            try:
                if method.endswith("Stream"):
                    list(channel.unary_stream(METHOD + method)(content, timeout=PATIENCE))
                else:
                    channel.unary_unary(METHOD + method)(content, timeout=PATIENCE)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
            return grpc.StatusCode.OK

        yield call
        assert call(message(steps=1).SerializeToString()) is grpc.StatusCode.OK


@pytest.fixture(scope="module")
def send_http(server: ServerThread) -> Iterator[Any]:
    """Posts a body and returns the status; likewise."""

    def post(path: str, body: bytes, kind: str = "application/json", accept: str = "") -> int:
        return request(
            http_address(server), "POST", path, body, {"content-type": kind, "accept": accept}
        ).status

    yield post
    assert post("/v1/composite", *multipart(form())) == 200


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 2**31, 2**32 - 1]), st.integers(min_value=0, max_value=2**32 - 1)
)
DOUBLES = st.one_of(st.sampled_from([0.0, 1.0, 1.5, 5.0]), st.floats(width=64))
COORDINATES = st.one_of(st.integers(-20, 100), st.integers(-(2**31), 2**31 - 1))
PICTURES = st.one_of(
    st.sampled_from([SCENE, OBJECT, png(scene_array(1, 1, 1)), png(scene_array(2, 1, 900))]),
    st.binary(max_size=64),
)


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


BOXES = st.builds(
    lambda fields: pb.Box(**fields), optional(**dict.fromkeys(("x0", "y0", "x1", "y1"), COORDINATES))
)
GOOD_BOXES = st.just(pb.Box(x0=10, y0=8, x1=60, y1=50))
PLACEMENTS = st.builds(
    lambda fields: pb.Placement(**fields),
    st.fixed_dictionaries(
        {"reference": st.one_of(st.just(OBJECT), PICTURES)},
        optional={
            "reference_mask": PICTURES,
            "box": st.one_of(GOOD_BOXES, BOXES),
            "mask": PICTURES,
            "mode": st.integers(-1, 5),
            "ratios": st.builds(
                lambda fields: pb.Ratios(**fields),
                optional(**dict.fromkeys(("reference", "box", "crop"), DOUBLES)),
            ),
        },
    ),
)
SAMPLINGS = st.builds(
    lambda steps, fields: pb.Sampling(steps=steps, **fields),
    st.one_of(st.integers(1, 2), NUMBERS),
    optional(
        guidance_scale=DOUBLES,
        control_scale=DOUBLES,
        eta=DOUBLES,
        quality=st.integers(-1, 5),
        sampler=st.integers(-1, 4),
        map_steps=NUMBERS,
        guidance_interval=st.builds(
            lambda fields: pb.TimestepInterval(**fields), optional(first=NUMBERS, last=NUMBERS)
        ),
    ),
)
REQUEST_MESSAGES = st.builds(
    lambda fields: pb.CompositeRequest(**fields),
    st.fixed_dictionaries(
        {
            "scene": st.one_of(st.just(SCENE), PICTURES),
            "placements": st.lists(PLACEMENTS, max_size=3),
            "sampling": SAMPLINGS,
        },
        optional={
            "seed": st.integers(0, 2**64 - 1),
            "num_images": NUMBERS,
            "output_format": st.integers(-1, 5),
        },
    ),
)


@FUZZ
@given(request=REQUEST_MESSAGES, preview_every=NUMBERS)
def test_requests_made_from_the_contract(send: Any, request: pb.CompositeRequest, preview_every: int) -> None:
    assert send(request.SerializeToString()) in ALLOWED
    streamed = pb.CompositeStreamRequest(request=request, preview_every=preview_every)
    assert send(streamed.SerializeToString(), "CompositeStream") in ALLOWED


WHERES = st.builds(
    lambda fields: pb.Where(**fields),
    st.one_of(
        optional(box=BOXES),
        optional(mask=PICTURES),
        optional(
            clicks=st.builds(
                lambda points: pb.Clicks(points=points),
                st.lists(
                    st.builds(pb.Point, x=COORDINATES, y=COORDINATES, outside=st.booleans()), max_size=3
                ),
            )
        ),
    ),
)
ACTIONS = st.one_of(
    st.fixed_dictionaries({"remove": st.just(pb.Remove())}),
    st.fixed_dictionaries({"move": st.builds(pb.Move, to=BOXES)}),
    st.fixed_dictionaries({"reshape": st.builds(pb.Reshape, to=PICTURES)}),
    st.fixed_dictionaries({"swap": st.builds(pb.Swap, placement=PLACEMENTS)}),
    st.fixed_dictionaries({"swap": st.builds(pb.Swap, other=WHERES)}),
    st.fixed_dictionaries({"try_on": PLACEMENTS}),
    st.just({}),
)
CUP = png(np.pad(np.full((20, 20), 255, np.uint8), ((20, 24), (30, 30))))
"""A mask for `SCENE`."""


@FUZZ
@given(
    action=ACTIONS,
    where=st.one_of(st.just(pb.Where(mask=CUP)), WHERES),
    sampling=st.one_of(st.just(pb.Sampling(steps=1)), SAMPLINGS),
    method=st.sampled_from(["Edit", "EditStream", "Segment"]),
)
def test_edits_made_from_the_contract(
    send: Any, action: dict[str, Any], where: pb.Where, sampling: pb.Sampling, method: str
) -> None:
    edit = pb.EditRequest(
        scene=SCENE, where=where, sampling=None if "remove" in action else sampling, **action
    )
    asked = {
        "Edit": edit,
        "EditStream": pb.EditStreamRequest(request=edit),
        "Segment": pb.SegmentRequest(picture=SCENE, where=where),
    }[method]
    # without a segmenter, nothing is found
    assert send(asked.SerializeToString(), method) in {*ALLOWED, grpc.StatusCode.FAILED_PRECONDITION}


def flip(content: bytes, seed: int, flips: int) -> bytes:
    """The bytes with some bits turned over, and sometimes cut short."""
    source, flipped = random.Random(seed), bytearray(content)
    for _ in range(flips):
        flipped[source.randrange(len(flipped))] ^= 1 << source.randrange(8)
    return bytes(flipped[: source.randrange(len(flipped))] if source.random() < 0.1 else flipped)


@FUZZ
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 20))
def test_flipped_bits(send: Any, seed: int, flips: int) -> None:
    # small pictures, so that most bits belong to the message around them
    placement = pb.Placement(reference=OBJECT[:60], box=pb.Box(x0=1, y0=2, x1=50, y1=60))
    request = message(steps=1, scene=SCENE[:60], placements=[placement], num_images=2)
    assert send(flip(request.SerializeToString(), seed, flips)) in ALLOWED


@FUZZ
@given(
    seed=st.integers(0, 2**32),
    flips=st.integers(1, 8),
    file_format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]),
)
def test_flipped_bits_in_pictures(send: Any, seed: int, flips: int, file_format: str) -> None:
    request = message(steps=1, scene=flip(SCENES[file_format], seed, flips))
    assert send(request.SerializeToString()) in ALLOWED


def _scenes() -> dict[str, bytes]:
    scenes = {}
    for file_format in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        buffer = io.BytesIO()
        settings = {"compression": "tiff_lzw"} if file_format == "TIFF" else {}
        Image.fromarray(scene_array(3, 40, 40)).save(buffer, file_format, **settings)
        scenes[file_format] = buffer.getvalue()
    return scenes


SCENES = _scenes()


# --- over HTTP --------------------------------------------------------------------------------------------

SCENE_64, OBJECT_64, CUP_64 = map(in_base64, (SCENE, OBJECT, CUP))
PLACED = {"scene": SCENE_64, "reference": OBJECT_64, "box": [10, 8, 60, 50], "sampling": {"steps": 1}}
EDITED = {"scene": SCENE_64, "mask": CUP_64}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/composite", PLACED),
    ("/v1/draw", {"prompt": "a cat"}),
    ("/v1/edit", {**EDITED, "remove": True}),
    ("/v1/edit", {**EDITED, "move": {"to": [5, 5, 40, 40]}, "sampling": {"steps": 1}}),
    ("/v1/edit", {**EDITED, "swap": {"placement": {"reference": OBJECT_64}}, "sampling": {"steps": 1}}),
    ("/v1/segment", {"picture": SCENE_64, "clicks": ["3,4", "!5,6"]}),
    ("/v1/images/edits", {"image": [SCENE_64, OBJECT_64], "box": [10, 8, 60, 50], "prompt": "", "steps": 1}),
    ("/v1/images/generations", {"prompt": "a cat"}),
    ("/v1/jobs", PLACED),
    ("/v1/jobs", {**EDITED, "remove": {}}),
]
NAMES = sorted(
    {name for _, body in BODIES for name in body}
    | {
        *PLACEMENT,
        *WHERE,
        *ACTION_NAMES,
        "where",
        "fill",
        "seed",
        "num_images",
        "n",
        "output_format",
        "model",
    }
    | {"preview_every", "stream", "partial_images", "size", "quality", "reference_image", "placements"}
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
VALUES = st.one_of(
    SCALARS,
    st.sampled_from(
        [SCENE_64, OBJECT_64, CUP_64, "1", "0", "!1,2", "1,2,30,40", "png", "shape", "true", "auto"]
    ),
    st.lists(st.one_of(SCALARS, st.integers(0, 80)), max_size=4),
    st.recursive(
        st.dictionaries(st.sampled_from(NAMES), SCALARS, max_size=3),
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner)),
        max_leaves=4,
    ),
)


@FUZZ
@given(
    asked=st.sampled_from(BODIES),
    changes=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3),
    accept=st.sampled_from(["", "image/png", "text/event-stream"]),
)
def test_bodies_made_from_the_contract(
    send_http: Any, asked: tuple[str, dict[str, Any]], changes: dict[str, Any], accept: str
) -> None:
    path, body = asked
    content = json.dumps({**body, **changes}).encode()
    assert send_http(path, content, accept=accept) in ALLOWED_OVER_HTTP


@FUZZ
@given(
    seed=st.integers(0, 2**32), flips=st.integers(1, 20), asked=st.sampled_from(BODIES), is_form=st.booleans()
)
def test_flipped_bits_in_bodies(
    send_http: Any, seed: int, flips: int, asked: tuple[str, dict[str, Any]], is_form: bool
) -> None:
    path, body = asked
    content, kind = multipart(form()) if is_form else (json.dumps(body).encode(), "application/json")
    assert send_http(path, flip(content, seed, flips), kind) in ALLOWED_OVER_HTTP
