"""The server on Ray Serve: the same clients, pictures and statuses."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from runtime.client import Client, ServerError
from runtime.errors import InputError
from runtime.request import Placement, Request, Sampling
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.events import Preview, Queued, StepDone
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, held_compositor, message, refusal, trailing

pytest.importorskip("ray")
pytestmark = pytest.mark.nightly

PLACEMENT = Placement(OBJECT, box=BOX)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def address(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray
    from ray import serve

    from runtime.server.ray import app

    tokens = tmp_path_factory.mktemp("ray") / "tokens"
    tokens.write_text("open-sesame\n")
    tokens.chmod(0o600)
    port = free_port()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    methods = ["runtime.server.ray.add_methods"]
    serve.start(
        http_options={"port": free_port()}, grpc_options={"port": port, "grpc_servicer_functions": methods}
    )
    serve.run(app({"bundle": f"cup={tiny_bundle}", "threads": 1, "tokens": str(tokens)}))
    yield f"127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, token="open-sesame", timeout=PATIENCE) as client:
        yield client


def test_pictures_are_the_compositors(client: Client, tiny_bundle: Path) -> None:
    sampling = Sampling(steps=2)
    alone = held_compositor(tiny_bundle)[0].composite(SCENE, PLACEMENT, seed=7, sampling=sampling)
    drawn = client.composite(SCENE, PLACEMENT, seed=7, sampling=sampling)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(alone)).max() <= 1
    assert list(client.model_info().models) == ["cup"]


def test_events_come_on_the_way(client: Client) -> None:
    events = list(client.stream(Request(SCENE, [PLACEMENT], 7, Sampling(steps=4)), preview_every=2))
    assert [type(event) for event in events if not isinstance(event, Queued)] == [
        *(StepDone, StepDone, Preview, StepDone, StepDone),
        list,
    ]


def test_refusals_are_the_servers(address: str, client: Client) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = CompositorServiceStub(channel)
        ours = (("authorization", "Bearer open-sesame"),)
        for fields, code, field in (
            ({"model": "dog"}, grpc.StatusCode.NOT_FOUND, "model"),
            ({"scene": b""}, grpc.StatusCode.INVALID_ARGUMENT, "scene"),
        ):
            error = refusal(stub.Composite, message(**fields), metadata=ours)
            assert (error.code(), trailing(error)["field"]) == (code, field)
            assert trailing(error)["request-id"]
        assert refusal(stub.Composite, message()).code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(InputError, match="the scene"):
        list(client.stream(Request(b"no picture", [PLACEMENT])))
    with pytest.raises(ServerError, match="does not let you in"), Client(address, timeout=PATIENCE) as other:
        other.model_info()
