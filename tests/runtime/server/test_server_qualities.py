"""The qualities and their parameters on the wire: a server does with them what the Compositor does."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engines.options import EngineOptions
from runtime import Compositor, Placement, Request, Sampling
from runtime.diffusion.presets import QUALITIES
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.wire import message_from_request, request_from_message
from runtime.server.wire_values import QUALITIES as WIRE_QUALITIES
from runtime.server.wire_values import SAMPLERS as WIRE_SAMPLERS
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, message, refusal, trailing

PLACEMENT = Placement(OBJECT, box=BOX)


def spelt_out(quality: str, **others: int) -> Sampling:
    """The parameters that a quality stands for."""
    return Sampling(**{**QUALITIES[quality], **others})


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle) as server:
        yield server


@pytest.fixture(scope="module")
def compositor(tiny_bundle: Path) -> Compositor:
    return Compositor.load(tiny_bundle, EngineOptions(device="cpu", threads=1))


def check_close(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> None:
    """Up to the last level of rounding."""
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("quality", QUALITIES)
def test_client(server: ServerThread, compositor: Compositor, quality: str) -> None:
    request = Request(SCENE, [PLACEMENT], 7, Sampling(quality=quality, steps=4))
    with server.client() as client:
        (found,) = client.run(request)
    (expected,) = compositor.run(request)
    check_close(found.image, expected.image)
    (expected,) = compositor.run(Request(SCENE, [PLACEMENT], 7, spelt_out(quality, steps=4)))
    check_close(found.image, expected.image)


@pytest.mark.parametrize("quality", QUALITIES)
def test_any_other_client_names_the_quality(
    server: ServerThread, compositor: Compositor, quality: str
) -> None:
    sampling = pb.Sampling(quality=WIRE_QUALITIES[quality], steps=4)
    with grpc.insecure_channel(server.address) as channel:
        response = CompositorServiceStub(channel).Composite(message(sampling=sampling), timeout=PATIENCE)
    found = np.asarray(Image.open(io.BytesIO(response.images[0].image)))
    (expected,) = compositor.run(Request(SCENE, [PLACEMENT], 7, spelt_out(quality, steps=4)))
    check_close(found, expected.image)


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("sampling.quality", pb.Sampling(quality=9)),
        ("sampling.sampler", pb.Sampling(sampler=9)),
        ("sampling.eta", pb.Sampling(quality=pb.QUALITY_FAST, eta=0.5)),
        ("sampling.map_steps", pb.Sampling(map_steps=0)),
        ("sampling.guidance_interval", pb.Sampling(guidance_interval=pb.TimestepInterval(first=5))),
    ],
)
def test_what_a_server_refuses(server: ServerThread, field: str, sampling: pb.Sampling) -> None:
    with grpc.insecure_channel(server.address) as channel:
        error = refusal(CompositorServiceStub(channel).Composite, message(sampling=sampling))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailing(error)["field"] == field


def test_the_wire_knows_every_quality_and_sampler() -> None:
    from runtime.diffusion.samplers import SAMPLERS

    assert WIRE_QUALITIES.keys() == QUALITIES.keys()
    assert WIRE_SAMPLERS.keys() == SAMPLERS.keys()


@pytest.mark.parametrize("quality", QUALITIES)
def test_parameters_survive_the_wire(quality: str) -> None:
    for sampling in (Sampling(quality=quality), spelt_out(quality), spelt_out(quality, steps=9)):
        request = Request(SCENE, [PLACEMENT], 7, sampling)
        content = message_from_request(request).SerializeToString()
        back, _ = request_from_message(pb.CompositeRequest.FromString(content))
        assert back.sampling == sampling
