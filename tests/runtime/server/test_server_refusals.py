"""Requests that a server must refuse, over a real socket: which status, and which field is to blame."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from tests.support.serving import OBJECT, PATIENCE, SCENE, ServerThread, message, png, refusal, trailing


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    limits = {"max_message_bytes": 1 << 20, "max_pixels": 1 << 16, "max_steps": 60}
    with ServerThread(tiny_bundle, **limits) as server:
        yield server


@pytest.fixture
def stub(server: ServerThread) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield CompositorServiceStub(channel)


def placement(**fields: Any) -> pb.Placement:
    given = {"reference": OBJECT, "box": pb.Box(x0=10, y0=8, x1=60, y1=50), **fields}
    if "mask" in fields:
        del given["box"]
    return pb.Placement(**given)


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be huge."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def black(width: int, height: int) -> bytes:
    return png(np.zeros((height, width, 3), np.uint8))


def wide(width: int) -> bytes:
    """A scene that is one pixel high."""
    return png(np.zeros((1, width, 3), np.uint8))


IN_A_ROW = placement(box=pb.Box(x0=9, y0=0, x1=99, y1=1))
NAN = float("nan")
MALFORMED = {
    "scene": [
        message(scene=b""),
        message(scene=b"no picture"),
        message(scene=SCENE[:200]),
        message(scene=huge_png(40_000, 40_000)),
        message(scene=huge_png(2**31 - 1, 2**31 - 1)),
        message(scene=black(512, 512)),
    ],
    "placements": [message(placements=[]), message(placements=[placement()] * 5)],
    "placements[0].reference": [
        message(placements=[placement(reference=b"")]),
        message(placements=[placement(reference=huge_png(40_000, 40_000))]),
    ],
    "placements[0].reference_mask": [
        message(placements=[placement(reference=black(40, 40))]),
        message(placements=[placement(reference_mask=b"no picture")]),
        message(placements=[placement(reference_mask=black(7, 7))]),
        message(placements=[placement(reference_mask=black(36, 40))]),
    ],
    "placements[0].target": [message(placements=[pb.Placement(reference=OBJECT)])],
    "placements[0].box": [
        message(placements=[placement(box=pb.Box())]),
        message(placements=[placement(box=pb.Box(x0=500, y0=500, x1=600, y1=600))]),
        message(placements=[placement(box=pb.Box(x0=50, y0=8, x1=10, y1=50))]),
    ],
    "placements[0].mask": [
        message(placements=[placement(mask=b"")]),
        message(placements=[placement(mask=black(9, 9))]),
        message(placements=[placement(mask=black(80, 64))]),
    ],
    "placements[0].reference_clicks": [
        message(placements=[placement(reference_clicks=[pb.Point(x=1, y=1, outside=True)])]),
    ],
    "placements[0].views": [message(placements=[placement(views=[pb.View(picture=OBJECT)])])],
    "placements[0].mode": [message(placements=[placement(mode=99)])],
    "placements[0].edge": [message(placements=[placement(edge=99)])],
    "placements[0].refine": [message(placements=[placement(refine=1000)])],
    "placements[0].strength": [message(placements=[placement(strength=of)]) for of in (0, 1.5)],
    "placements[0].mask_level": [
        message(placements=[placement(mask_level=99)]),
        message(placements=[placement(mask_level=pb.MASK_LEVEL_BLOB)]),
    ],
    "placements[0].ratios.reference": [message(placements=[placement(ratios=pb.Ratios(reference=0.5))])],
    "placements[0].ratios.box": [message(placements=[placement(ratios=pb.Ratios(box=1e9))])],
    "placements[0].ratios.crop": [message(placements=[placement(ratios=pb.Ratios(crop=NAN))])],
    "placements[0].prompt": [message(placements=[placement(prompt="a cup")])],
    "placements[0].negative_prompt": [message(placements=[placement(negative_prompt="blurry")])],
    "placements[1].box": [message(placements=[placement(), placement(box=pb.Box())])],
    "sampling.steps": [message(steps=0), message(steps=61), message(steps=2**32 - 1)],
    "sampling.guidance_scale": [
        message(sampling=pb.Sampling(guidance_scale=value)) for value in (-1, 101, NAN, float("inf"))
    ],
    "sampling.control_scale": [
        message(sampling=pb.Sampling(control_scale=value)) for value in (-0.1, 11, NAN)
    ],
    "sampling.eta": [message(sampling=pb.Sampling(eta=value)) for value in (-0.1, 1.1, NAN)],
    "sampling.quality": [message(sampling=pb.Sampling(quality=99))],
    "sampling.sampler": [message(sampling=pb.Sampling(sampler=99))],
    "sampling.guidance_interval": [
        message(sampling=pb.Sampling(guidance_interval=pb.TimestepInterval(first=first, last=last)))
        for first, last in ((500, 200), (0, 1000), (2**31 - 1, 2**32 - 1))
    ],
    "sampling.map_steps": [message(sampling=pb.Sampling(map_steps=count)) for count in (0, 1000, 2**32 - 1)],
    "seed": [message(seed=2**63 - 1), message(seed=2**64 - 1)],
    "num_images": [message(num_images=0), message(num_images=9), message(num_images=2**32 - 1)],
    "output_format": [
        message(output_format=77),
        message(scene=wide(16_384), placements=[IN_A_ROW], output_format=pb.IMAGE_FORMAT_WEBP),
        message(scene=wide(65_501), placements=[IN_A_ROW], output_format=pb.IMAGE_FORMAT_JPEG),
    ],
}


@pytest.mark.parametrize("field", MALFORMED)
def test_malformed_field_is_named(stub: Any, field: str) -> None:
    for request in MALFORMED[field]:
        error = refusal(stub.Composite, request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details().startswith(f"{field}: ")
        assert trailing(error)["field"] == field
        streamed = refusal(stub.CompositeStream, pb.CompositeStreamRequest(request=request))
        assert streamed.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert trailing(streamed)["field"] == f"request.{field}"


def test_every_field_of_a_request_has_a_malformed_example() -> None:
    """A field that is added to the contract must be added here."""
    fields: set[str] = set()
    for descriptor, prefix in [
        (pb.CompositeRequest.DESCRIPTOR, ""),
        (pb.Placement.DESCRIPTOR, "placements[0]."),
        (pb.Ratios.DESCRIPTOR, "placements[0].ratios."),
        (pb.Sampling.DESCRIPTOR, "sampling."),
    ]:
        fields |= {prefix + field.name for field in descriptor.fields}
    # two have fields of their own, another is refused in another way, the others have no value that is wrong
    without = {"sampling", "placements[0].ratios", "model"}
    without |= {"placements[0].keep_specks", "placements[0].automatic_mask"}
    assert fields - without <= MALFORMED.keys()


def test_too_many_previews(stub: Any) -> None:
    error = refusal(
        stub.CompositeStream, pb.CompositeStreamRequest(request=message(steps=20), preview_every=1)
    )
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailing(error)["field"] == "request.preview_every"


def test_as_many_previews_as_are_allowed(stub: Any) -> None:
    """Four; there is none of the last step, after which the picture itself comes."""
    request = pb.CompositeStreamRequest(request=message(steps=10), preview_every=2)
    events = [event.WhichOneof("event") for event in stub.CompositeStream(request, timeout=PATIENCE)]
    assert events.count("preview") == 4
    assert events[-1] == "result"


def test_previews_of_a_scene_that_no_preview_can_show(stub: Any) -> None:
    request = message(scene=wide(65_501), placements=[IN_A_ROW])
    error = refusal(stub.CompositeStream, pb.CompositeStreamRequest(request=request, preview_every=1))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailing(error)["field"] == "request.preview_every"
    assert "JPEG allows sides of at most 65,500" in error.details()


def test_message_that_cannot_be_parsed(server: ServerThread) -> None:
    with grpc.insecure_channel(server.address) as channel:
        error = refusal(channel.unary_unary("/anydoor.v1.CompositorService/Composite"), b"\xff" * 20)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_unknown_method(server: ServerThread) -> None:
    with grpc.insecure_channel(server.address) as channel:
        error = refusal(channel.unary_unary("/anydoor.v1.CompositorService/Paint"), b"")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_oversized_message(stub: Any) -> None:
    error = refusal(stub.Composite, message(scene=b"x" * (1 << 20)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert stub.Composite(message(), timeout=PATIENCE).images
