"""Requests that nobody would send: the server answers each with a status of the caller's, and lives on.

300 of them in the usual test run; the nightly command asks for more:

    ANYDOOR_FUZZ_REQUESTS=5000 python -m pytest tests/runtime/server/test_server_fuzz.py

One third each are made from the contract, have flipped bits, and have flipped bits in a picture.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.rpc import compositor_pb2 as pb
from tests.support.serving import OBJECT, PATIENCE, SCENE, ServerThread, message, png, scene_array

REQUESTS = int(os.environ.get("ANYDOOR_FUZZ_REQUESTS", "300"))
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
METHOD = "/anydoor.v1.CompositorService/"
FUZZ = settings(
    max_examples=REQUESTS // 3,
    database=None,
    derandomize="ANYDOOR_FUZZ_REQUESTS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def send(tiny_bundle: Path) -> Iterator[Any]:
    """Sends bytes to a method and returns the status; at the end, the server must still make pictures."""
    limits = {"max_steps": 3, "max_images": 2, "max_pixels": 1 << 14, "max_message_bytes": 1 << 18}
    with ServerThread(tiny_bundle, **limits) as server, grpc.insecure_channel(server.address) as channel:

        def call(content: bytes, method: str = "Composite") -> grpc.StatusCode:
            try:
                if method == "CompositeStream":
                    list(channel.unary_stream(METHOD + method)(content, timeout=PATIENCE))
                else:
                    channel.unary_unary(METHOD + method)(content, timeout=PATIENCE)
            except grpc.RpcError as error:
                code: grpc.StatusCode = error.code()
                return code
            return grpc.StatusCode.OK

        yield call
        assert call(message(steps=1).SerializeToString()) is grpc.StatusCode.OK
        assert server.batcher.tickets == []


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
