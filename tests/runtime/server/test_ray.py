"""The server on Ray Serve: the same clients, pictures and statuses; replicas that end, come and leave.

ANYDOOR_RAY_REQUESTS=500 python -m pytest tests/runtime/server/test_ray.py -m nightly
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
from tests.runtime.server.test_http import fields, form, pixels
from tests.support.http import get, post, post_form
from tests.support.serving import (
    BOX,
    OBJECT,
    PATIENCE,
    SCENE,
    held_compositor,
    message,
    refusal,
    trailing,
    wait_until,
)

pytest.importorskip("ray")
pytestmark = pytest.mark.nightly

PLACEMENT = Placement(OBJECT, box=BOX)
TOKEN = (("authorization", "Bearer open-sesame"),)
OURS = dict(TOKEN)
REQUESTS = int(os.environ.get("ANYDOOR_RAY_REQUESTS", "60"))
CALLERS = 6
MODELS = ["cup", "bear", "pen"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Fleet:
    """Ray on this machine, with one application, deployed as a config file would."""

    def __init__(self, bundle: Path, tokens: Path, logs: Path) -> None:
        self.ports = {"grpc": free_port(), "http": free_port()}
        self.address, self.http = (f"127.0.0.1:{self.ports[door]}" for door in ("grpc", "http"))
        self._logs = logs
        models = [f"{name}={bundle}" for name in MODELS]
        self.settings = {"bundle": models, "threads": 1, "tokens": str(tokens)}

    def deploy(self, **options: Any) -> None:
        """Starts it, or changes the options of its replicas; returns when they run."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        replicas = {"name": "AnyDoor", "ray_actor_options": {"num_cpus": 1}, **options}
        application = {"name": "anydoor", "import_path": "runtime.server.ray:app", "args": self.settings}
        config = {"applications": [{**application, "deployments": [replicas]}]}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)

    def loads(self, model: str) -> list[int]:
        """How often each replica that has loaded a model did, by the log of its process."""
        found: Counter[Path] = Counter()
        for log in self._logs.glob("worker-*.err"):
            lines = [json.loads(line) for line in log.read_text("utf-8").splitlines() if line.startswith("{")]
            found[log] += sum((line["event"], line.get("model")) == ("model loaded", model) for line in lines)
        return [count for count in found.values() if count]

    @property
    def replicas(self) -> list[str]:
        """Names of those that run."""
        import ray

        actors = ray.util.list_named_actors(all_namespaces=True)
        return [each["name"] for each in actors if "#AnyDoor#" in each["name"]]

    @property
    def running(self) -> int:
        """How many take calls."""
        from ray import serve

        status = serve.status().applications["anydoor"].deployments["AnyDoor"]
        return int(status.replica_states.get("RUNNING", 0))


@pytest.fixture(scope="module")
def fleet(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    import ray
    from ray import serve

    tokens = tmp_path_factory.mktemp("ray") / "tokens"
    tokens.write_text("open-sesame\n")
    tokens.chmod(0o600)
    head = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    fleet = Fleet(tiny_bundle, tokens, Path(head.address_info["session_dir"], "logs"))
    methods = {"port": fleet.ports["grpc"], "grpc_servicer_functions": ["runtime.server.ray.add_methods"]}
    serve.start(http_options={"port": fleet.ports["http"]}, grpc_options=methods)
    fleet.deploy(num_replicas=1)
    yield fleet
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def address(fleet: Fleet) -> str:
    return fleet.address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, token="open-sesame", timeout=PATIENCE) as client:
        yield client


def test_pictures_are_the_compositors(client: Client, tiny_bundle: Path) -> None:
    sampling = Sampling(steps=2)
    alone = held_compositor(tiny_bundle)[0].composite(SCENE, PLACEMENT, seed=7, sampling=sampling)
    drawn = client.composite(SCENE, PLACEMENT, seed=7, sampling=sampling)
    assert np.abs(np.asarray(drawn).astype(int) - np.asarray(alone)).max() <= 1
    assert list(client.model_info().models) == MODELS


def test_events_come_on_the_way(client: Client) -> None:
    events = list(client.stream(Request(SCENE, [PLACEMENT], 7, Sampling(steps=4)), preview_every=2))
    assert [type(event) for event in events if not isinstance(event, Queued)] == [
        *(StepDone, StepDone, Preview, StepDone, StepDone),
        list,
    ]


def test_refusals_are_the_servers(address: str, client: Client) -> None:
    with grpc.insecure_channel(address) as channel:
        stub: Any = CompositorServiceStub(channel)
        for fields, code, field in (
            ({"model": "dog"}, grpc.StatusCode.NOT_FOUND, "model"),
            ({"scene": b""}, grpc.StatusCode.INVALID_ARGUMENT, "scene"),
        ):
            error = refusal(stub.Composite, message(**fields), metadata=TOKEN)
            assert (error.code(), trailing(error)["field"]) == (code, field)
            assert trailing(error)["request-id"]
        assert refusal(stub.Composite, message()).code() is grpc.StatusCode.UNAUTHENTICATED
    with pytest.raises(InputError, match="the scene"):
        list(client.stream(Request(b"no picture", [PLACEMENT])))
    with pytest.raises(ServerError, match="does not let you in"), Client(address, timeout=PATIENCE) as other:
        other.model_info()


def test_http_is_the_servers(fleet: Fleet, client: Client) -> None:
    expected = np.asarray(client.composite(SCENE, PLACEMENT, seed=7, sampling=Sampling(steps=2)))
    drawn = post_form(fleet.http, "/v1/composite", form(), accept="image/png", **OURS)
    assert (pixels(drawn.content) == expected).all()
    assert drawn.headers["x-seed"] == "7"
    events = post(fleet.http, "/v1/composite", fields(stream=True), **OURS).events
    assert [name for name, _ in events if name != "queued"] == ["step_done", "step_done", "result"]
    answer = post(fleet.http, "/v1/composite", fields(seed=-1), **OURS)
    assert (answer.status, answer.error["param"]) == (400, "seed")
    assert post(fleet.http, "/v1/composite", fields()).status == 401
    answer = post(fleet.http, "/v1/jobs", fields(), **OURS)
    assert (answer.status, "jobs are not available here" in answer.error["message"]) == (404, True)
    described = get(fleet.http, "/openapi.json").json["paths"]
    assert "/v1/edit" in described
    assert not any(path.startswith("/v1/jobs") for path in described)
    assert get(fleet.http, "/readyz").status == 200


def test_a_request_names_its_model(fleet: Fleet, client: Client) -> None:
    with Client(fleet.address, token="open-sesame", timeout=PATIENCE, model="bear") as bear:
        assert bear.model_info().model == "bear"
        drawn = bear.composite(SCENE, PLACEMENT, seed=7, sampling=Sampling(steps=2))
    same = client.composite(SCENE, PLACEMENT, seed=7, sampling=Sampling(steps=2))
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(same))
    answer = post(fleet.http, "/v1/composite", fields(model="bear"), **OURS)
    assert answer.status == 200
    models = {each["id"]: each["status"] for each in get(fleet.http, "/v1/models", **OURS).json["data"]}
    assert models == {"cup": "loaded", "bear": "loaded", "pen": "unloaded"}
    assert post(fleet.http, "/v1/composite", fields(model="dog"), **OURS).status == 404


def test_a_cold_model_is_loaded_once_by_each_replica(fleet: Fleet) -> None:
    """Asked for by more calls at once than one replica takes."""
    fleet.deploy(num_replicas=2, max_ongoing_requests=4)
    wait_until(lambda: fleet.running == 2)
    assert not fleet.loads("pen")
    named = {"token": "open-sesame", "timeout": PATIENCE, "model": "pen"}
    with Client(fleet.address, **named) as client, ThreadPoolExecutor(12) as pool:

        def draw(seed: int) -> Any:
            return client.composite(SCENE, PLACEMENT, seed=seed, sampling=Sampling(steps=2))

        assert len(list(pool.map(draw, range(12)))) == 12
    wait_until(lambda: len(fleet.loads("pen")) == 2)
    assert fleet.loads("pen") == [1, 1]


def test_calls_of_a_replica_that_is_killed_go_to_another(fleet: Fleet) -> None:
    """All of them end in a picture, by both doors; how often one was sent again is told."""
    import ray

    fleet.deploy(num_replicas=2)
    done = threading.Semaphore(0)

    def ask(stub: Any, index: int) -> int:
        if index % 4:
            asked = message(steps=3, seed=index)
            answer, call = stub.Composite.with_call(asked, timeout=PATIENCE, metadata=TOKEN)
            images, resent = answer.images, dict(call.trailing_metadata()).get("resent", 0)
        else:
            found = post(fleet.http, "/v1/composite", fields(seed=index), **OURS)
            images, resent = found.json["images"], found.headers.get("x-resent", 0)
        assert len(images) == 1
        done.release()
        return int(resent)

    with grpc.insecure_channel(fleet.address) as channel, ThreadPoolExecutor(CALLERS) as pool:
        stub: Any = CompositorServiceStub(channel)
        asked = [pool.submit(ask, stub, index) for index in range(REQUESTS)]
        for _ in range(REQUESTS // 3):
            assert done.acquire(timeout=PATIENCE)
        ray.kill(ray.get_actor(fleet.replicas[0], namespace="serve"))
        resent = [each.result(10 * PATIENCE) for each in asked]
    print(f"{len(resent)} pictures, {sum(resent)} calls sent again")
    assert len(resent) == REQUESTS
    wait_until(lambda: fleet.running == 2)


def test_replicas_come_with_the_load_and_leave(fleet: Fleet, client: Client) -> None:
    often = {
        "metrics_interval_s": 0.5,
        "look_back_period_s": 1,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 2,
    }
    fleet.deploy(
        num_replicas="auto",
        autoscaling_config={"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, **often},
    )
    wait_until(lambda: fleet.running == 1)
    over = threading.Event()

    def ask(seed: int) -> int:
        pictures = 0
        while not over.is_set():
            client.composite(SCENE, PLACEMENT, seed=seed, sampling=Sampling(steps=20))
            pictures += 1
        return pictures

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, seed) for seed in range(4)]
        try:
            wait_until(lambda: fleet.running == 2)
        finally:
            over.set()
        assert all(each.result(PATIENCE) for each in asked)
    wait_until(lambda: fleet.running == 1)
    assert client.composite(SCENE, PLACEMENT, seed=7, sampling=Sampling(steps=1))
