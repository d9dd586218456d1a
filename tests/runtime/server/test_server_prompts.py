"""A server whose model takes prompts, over a real socket: Draw, DrawStream, and prompts of placements."""

from __future__ import annotations

import asyncio
import io
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from runtime import Compositor, EngineOptions, InputError, Placement, Request, Sampling
from runtime.client import AsyncClient
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, message, refusal, trailing
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

FAST = Sampling(steps=2)
WIRE_BOX = pb.Box(x0=10, y0=8, x1=60, y1=50)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    limits = {"max_steps": 60, "max_images": 3, "metrics": "127.0.0.1:0"}
    with ServerThread(tiny_stable_diffusion_bundle(9), **limits) as server:
        yield server


@pytest.fixture
def stub(server: ServerThread) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield CompositorServiceStub(channel)


@pytest.fixture(scope="module")
def alone() -> Compositor:
    return Compositor.load(tiny_stable_diffusion_bundle(9), EngineOptions(device="cpu", threads=1))


def drawing(**fields: Any) -> pb.DrawRequest:
    """A request that the server accepts."""
    return pb.DrawRequest(**{"prompt": "a cat", "sampling": pb.Sampling(steps=2), "seed": 7, **fields})


def placement(**fields: Any) -> pb.Placement:
    return pb.Placement(**{"prompt": "a cat", "box": WIRE_BOX, **fields})


def difference(first: Any, second: Any) -> int:
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second)).max())


def test_a_drawing_is_the_compositors(stub: Any, alone: Compositor) -> None:
    response = stub.Draw(drawing(negative_prompt="the castle", num_images=2), timeout=PATIENCE)
    request = Request.drawing("a cat", "the castle", seed=7, sampling=FAST, num_images=2)
    for image, expected in zip(response.images, alone.run(request), strict=True):
        assert image.seed == expected.seed
        assert list(image.regions) == [pb.Box(x1=64, y1=64)]
        assert difference(Image.open(io.BytesIO(image.image)), expected.image) <= 1
    assert {"queue", "condition", "sample", "decode", "encode"} <= response.seconds.keys()


def test_events_come_on_the_way(stub: Any) -> None:
    request = drawing(sampling=pb.Sampling(steps=4), output_format=pb.IMAGE_FORMAT_JPEG)
    events = list(stub.DrawStream(pb.DrawStreamRequest(request=request, preview_every=2), timeout=PATIENCE))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "queued"
    assert kinds.count("step_done") == 4
    assert kinds.count("preview") == 1
    assert kinds[-1] == "result"
    assert events[-1].result.images[0].image.startswith(b"\xff\xd8")
    assert len({event.request_id for event in events}) == 1


def test_clients_draw_and_composite_by_prompt(server: ServerThread, alone: Compositor) -> None:
    placement = Placement(prompt="a cat", negative_prompt="the castle", box=BOX)
    expected = (
        alone.draw("a cat", seed=7, sampling=FAST),
        alone.composite(SCENE, placement, seed=7, sampling=FAST),
    )
    steps: list[tuple[int, int]] = []
    with server.client() as client:
        found = (
            client.draw("a cat", seed=7, sampling=FAST),
            client.composite(SCENE, placement, seed=7, sampling=FAST),
        )
        several = client.draw(
            "a cat", seed=7, sampling=FAST, num_images=2, on_step=lambda *step: steps.append(step)
        )
    assert max(difference(*of) for of in zip(found, expected)) <= 1
    assert difference(several[0], expected[0]) <= 1
    assert steps[-1] == (4, 4)

    async def draw() -> Any:
        async with AsyncClient(server.address, timeout=PATIENCE) as client:
            return await client.draw("a cat", seed=7, sampling=FAST)

    assert difference(asyncio.run(draw()), expected[0]) <= 1


def test_what_the_model_is(stub: Any) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE)
    assert (info.system, info.condition) == ("stable_diffusion", pb.CONDITION_TEXT)
    assert (info.picture_width, info.picture_height, info.resolution, info.scene_channels) == (64, 64, 64, 5)
    assert list(info.qualities) == [pb.QUALITY_EXACT, pb.QUALITY_BALANCED]
    defaults = info.defaults
    assert (defaults.sampling.steps, defaults.sampling.guidance_scale) == (50, 7.5)
    assert not defaults.sampling.HasField("control_scale")
    assert not defaults.ratios.HasField("reference")
    assert defaults.mode == pb.PLACEMENT_MODE_KEEP_BACKGROUND


def test_the_resolution_of_wide_pictures_is_their_longer_side() -> None:
    wide = tiny_stable_diffusion_bundle(4, version="1.x", resolution=(32, 48))
    with ServerThread(wide) as server, server.client() as client:
        info = client.model_info()
    assert {info.picture_width, info.picture_height} == {32, 48}
    assert info.resolution == 48


REFUSED = {
    "prompt": drawing(prompt="cat " * 76),
    "negative_prompt": drawing(negative_prompt="cat " * 76),
    "width": drawing(width=96),
    "height": drawing(width=64, height=0),
    "num_images": drawing(num_images=4),
    "output_format": drawing(output_format=9),
    "sampling.steps": drawing(sampling=pb.Sampling(steps=61)),
    "sampling.quality": drawing(sampling=pb.Sampling(quality=pb.QUALITY_FAST)),
    "sampling.map_steps": drawing(sampling=pb.Sampling(map_steps=3)),
    "seed": drawing(seed=2**63),
}


def test_every_field_of_a_drawing_has_an_example_that_is_refused() -> None:
    """A field that is added to the contract must be added here."""
    fields = {field.name for field in pb.DrawRequest.DESCRIPTOR.fields}
    # a model that is not there is refused in another way
    assert {name.partition(".")[0] for name in REFUSED} == fields - {"model"}


@pytest.mark.parametrize("field", REFUSED)
def test_drawings_that_are_refused_say_which_field_is_to_blame(stub: Any, field: str) -> None:
    error = refusal(stub.Draw, REFUSED[field])
    assert (error.code(), trailing(error)["field"]) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert error.details().startswith(f"{field}: ")
    error = refusal(stub.DrawStream, pb.DrawStreamRequest(request=REFUSED[field]))
    assert trailing(error)["field"] == f"request.{field}"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"reference": OBJECT}, "reference"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "cat " * 76}, "prompt"),
        ({"negative_prompt": "cat " * 76}, "negative_prompt"),
        ({"ratios": pb.Ratios(reference=1.2)}, "ratios.reference"),
        ({"box": None}, "target"),
    ],
)
def test_placements_that_are_refused(stub: Any, fields: dict[str, Any], field: str) -> None:
    error = refusal(stub.Composite, message(placements=[placement(**fields)]))
    assert (error.code(), trailing(error)["field"]) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"placements[0].{field}",
    )


def test_messages_that_cannot_be_parsed(server: ServerThread) -> None:
    """Text that is no UTF-8, among others."""
    with grpc.insecure_channel(server.address) as channel:
        for method in ("Draw", "DrawStream"):
            kind = channel.unary_stream if method.endswith("Stream") else channel.unary_unary
            call = kind(f"/anydoor.v1.CompositorService/{method}", lambda content: content, bytes)
            for content in (b"\x0a\x02\xff\xfe", b"\xff"):
                error = refusal(call, content)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_drawing_counts_like_a_composite(server: ServerThread, stub: Any) -> None:
    stub.Draw(drawing(), timeout=PATIENCE)
    url = f"http://127.0.0.1:{server.server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        assert 'anydoor_requests_total{code="OK",method="Draw",model=' in answer.read().decode()


def test_a_model_that_takes_references_draws_nothing(tiny_bundle: Any) -> None:
    with ServerThread(tiny_bundle) as server, server.client() as client:
        with pytest.raises(InputError, match="AnyDoor puts objects from pictures into scenes") as caught:
            client.draw("a cat")
        assert caught.value.field == "prompt"
        with pytest.raises(InputError, match="takes no prompt") as caught:
            client.composite(SCENE, Placement(prompt="a cat", box=BOX))
        assert caught.value.field == "placements[0].prompt"
        info = client.model_info()
        assert (info.condition, info.scene_channels) == (pb.CONDITION_REFERENCE, 0)
        assert len(info.qualities) == 3
