"""Several bundles in one server: named in requests, loaded when asked for, under one budget, and reloaded."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engines.bundle import Bundle
from engines.engine import needed_bytes
from engines.manifest import MANIFEST
from engines.options import EngineOptions
from runtime import Compositor, InputError, Placement, Sampling
from runtime.cli import main
from runtime.client import ServerError
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.segmentation import Segmenter
from runtime.server.bundles import Bundles
from runtime.server.settings import Settings
from tests.support.http import get, post
from tests.support.serving import (
    BOX,
    OBJECT,
    PATIENCE,
    SCENE,
    ServerThread,
    message,
    refusal,
    trailing,
    wait_until,
)
from tests.support.stable_diffusion import tiny_stable_diffusion_bundle

CPU = EngineOptions("onnxruntime", "cpu", threads=1)
PLACEMENT = Placement(OBJECT, box=BOX)
TWO_STEPS = Sampling(steps=2)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@contextmanager
def serving(first: Path, budget: int | None = None, **others: Any) -> Iterator[ServerThread]:
    """A server of two models, `cup` and `bear`, unless `bundle` says others."""
    engine = EngineOptions("onnxruntime", "cpu", threads=1, memory_budget=budget)
    given = {"bundle": (f"cup={first}", f"bear={first}"), "engine": engine, **others}
    with ServerThread(first, **given) as server:
        yield server


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Lets no model be loaded, but for the first one of a server, until it is set."""
    event, real, seen = threading.Event(), Compositor.load_graphs, set()

    def load_graphs(compositor: Compositor) -> Iterator[str]:
        if seen:
            assert event.wait(PATIENCE)
        seen.add(compositor)
        return real(compositor)

    monkeypatch.setattr(Compositor, "load_graphs", load_graphs)
    yield event
    event.set()


def one_fits(bundle: Path) -> int:
    """A budget for one of two models."""
    return int(1.5 * needed_bytes(Bundle.open(bundle), CPU))


def draw(server: ServerThread, model: str, **settings: Any) -> np.ndarray[Any, Any]:
    with server.client(model=model, **settings) as client:
        return np.asarray(client.composite(SCENE, PLACEMENT, seed=7, sampling=TWO_STEPS))


def status(server: ServerThread, model: str) -> str:
    return server.server.models.status(model)


def health(server: ServerThread, service: str) -> int:
    with grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE).status)


# --- names ------------------------------------------------------------------------------------------------


def test_a_request_names_its_model(tiny_bundle: Path) -> None:
    """By every door; without a name it is for the first. A model is loaded when it is asked for."""
    painter = tiny_stable_diffusion_bundle(9)
    given = {"bundle": (f"cup={tiny_bundle}", f"painter={painter}"), "http": "127.0.0.1:0"}
    with serving(tiny_bundle, **given) as server, server.client(model="painter") as client:
        assert [status(server, name) for name in ("cup", "painter")] == ["loaded", "unloaded"]
        drawn = client.draw("a cat", seed=7, sampling=TWO_STEPS)
        alone = Compositor.load(painter, CPU).draw("a cat", seed=7, sampling=TWO_STEPS)
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(alone))
        infos = [server.client(model=name).model_info() for name in ("", "cup", "painter")]
        assert [info.model for info in infos] == ["cup", "cup", "painter"]
        assert [info.condition for info in infos] == [pb.CONDITION_REFERENCE] * 2 + [pb.CONDITION_TEXT]
        assert list(infos[0].models) == ["cup", "painter"]
        np.testing.assert_array_equal(draw(server, ""), draw(server, "cup"))
        with pytest.raises(InputError, match="does not draw from prompts"):
            server.client().draw("a cat")

        address = server.server.http_address
        assert address
        models = get(address, "/v1/models").json["data"]
        assert [(model["id"], model["status"]) for model in models] == [
            ("cup", "loaded"),
            ("painter", "loaded"),
        ]
        assert get(address, "/v1/models/painter").json["created"] > 0
        assert get(address, "/v1/model?model=painter").json["condition"] == "text"
        fields = {"prompt": "a cat", "model": "painter", "sampling": {"steps": 1}}
        assert post(address, "/v1/draw", fields).json["images"]
        theirs = {"prompt": "a cat", "model": "painter", "steps": 1}
        assert post(address, "/v1/images/generations", theirs).json["data"]


def test_the_command_line_names_a_model(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"bundle": (f"cup={tiny_bundle}", f"painter={tiny_stable_diffusion_bundle(9)}")}
    with serving(tiny_bundle, **given) as server:
        command = ["draw", "--prompt=a cat", "--steps=1", f"--server={server.address}", "--quiet"]
        assert main([*command, "--model=painter", f"-o={tmp_path / 'cat.png'}"]) == 0
        assert (tmp_path / "cat.png").exists()
        assert main([*command, "--model=sculptor", f"-o={tmp_path / 'dog.png'}"]) == 2
        error = capsys.readouterr().err
        assert error == "anydoor: there is no model 'sculptor' here: choose one of cup, painter\n"
    assert main(["draw", "--prompt=a cat", "--model=painter", f"-o={tmp_path / 'dog.png'}"]) == 2
    assert "--model needs --server" in capsys.readouterr().err


def test_a_model_that_is_not_there(tiny_bundle: Path) -> None:
    with (
        serving(tiny_bundle, http="127.0.0.1:0") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = CompositorServiceStub(channel)
        for call, request in (
            (stub.Composite, message(model="dog")),
            (stub.CompositeStream, pb.CompositeStreamRequest(request=message(model="dog"))),
            (stub.GetModelInfo, pb.GetModelInfoRequest(model="dog")),
        ):
            error = refusal(call, request)
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert error.details() == "there is no model 'dog' here: choose one of cup, bear"
            assert trailing(error)["field"] == "model"
        address = server.server.http_address
        assert address
        for path in ("/v1/models/dog", "/v1/model?model=dog"):
            assert get(address, path).status == 404
        answer = post(address, "/v1/draw", {"prompt": "a cat", "model": "dog"})
        assert (answer.status, answer.error["param"]) == (404, "model")
        assert "choose one of cup, bear" in answer.error["message"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("/srv/anydoor", ["anydoor"]),
        (("cup=/srv/a", "/srv/bear"), ["cup", "bear"]),
        (("/srv/a=b",), ["a=b"]),
        (("./a=b",), ["a=b"]),
    ],
)
def test_names_of_bundles(given: Any, names: list[str]) -> None:
    assert list(Settings(bundle=given).bundles) == names


def test_two_bundles_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"'/a/cup' and '/b/cup' are both called 'cup': .*like other=/b/cup"):
        Settings(bundle=("/a/cup", "/b/cup")).check()


# --- one budget -------------------------------------------------------------------------------------------


def test_models_take_turns_where_one_fits(tiny_bundle: Path) -> None:
    """Alternating requests all get their picture, and what is loaded never takes more than the budget."""
    budget = one_fits(tiny_bundle)
    with serving(tiny_bundle, budget) as server:
        expected, taken = draw(server, "cup"), []
        models = server.server.models
        for model in ("bear", "cup", "bear"):
            np.testing.assert_array_equal(draw(server, model), expected)
            taken.append(sum(map(models.bytes_taken, models.names)))
            assert [name for name in models.names if status(server, name) == "loaded"] == [model]
        assert all(0 < nbytes <= budget for nbytes in taken)
        loads = server.server.metrics.registry.get_sample_value
        assert [loads("anydoor_model_loads_total", {"model": name}) for name in models.names] == [2, 2]
        assert loads("anydoor_model_loaded", {"model": "cup"}) == 0


def test_who_was_not_asked_for_longest_leaves(tiny_bundle: Path) -> None:
    bundles = tuple(f"{name}={tiny_bundle}" for name in ("a", "b", "c"))
    needed = needed_bytes(Bundle.open(tiny_bundle), CPU)
    with serving(tiny_bundle, int(2.7 * needed), bundle=bundles) as server:
        for model in ("b", "a", "c"):
            draw(server, model)
        assert [status(server, name) for name in ("a", "b", "c")] == ["loaded", "unloaded", "loaded"]


def test_work_is_finished_before_a_model_leaves(tiny_bundle: Path) -> None:
    """Who waits for room does so within its deadline. What is asked for meanwhile comes after it."""
    with serving(tiny_bundle, one_fits(tiny_bundle)) as server, ThreadPoolExecutor(3) as pool:
        expected = draw(server, "cup")
        server.engine.hold()
        begun = pool.submit(draw, server, "cup")
        server.engine.wait_for_steps(3)
        late = pool.submit(draw, server, "bear", timeout=0.3)
        with pytest.raises(ServerError, match="did not finish in time"):
            late.result(PATIENCE)
        wait_until(lambda: server.server.gate.at_work == 1)  # the late one is gone
        waits, after = (pool.submit(draw, server, model) for model in ("bear", "cup"))
        wait_until(lambda: server.server.gate.at_work == 3)
        assert [waits.done(), after.done()] == [False, False]
        server.engine.release()
        for each in (begun, waits, after):
            np.testing.assert_array_equal(each.result(PATIENCE), expected)
        assert status(server, "cup") == "loaded"


def test_loading_holds_up_nobody_else(tiny_bundle: Path, loading: threading.Event) -> None:
    """Requests for the model that is loaded wait; a job is answered at once."""
    with serving(tiny_bundle, http="127.0.0.1:0") as server, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(draw, server, "bear")
        wait_until(lambda: status(server, "bear") == "loading")
        expected = draw(server, "cup")
        address = server.server.http_address
        assert address
        fields = {"prompt": "a cat", "model": "bear"}
        assert post(address, "/v1/jobs", fields).status == 202
        assert not waits.done()
        loading.set()
        np.testing.assert_array_equal(waits.result(PATIENCE), expected)


def test_memory_is_given_back(tiny_bundle: Path) -> None:
    """A model that left has no threads and no graphs."""
    with serving(tiny_bundle, one_fits(tiny_bundle)) as server:
        draw(server, "bear")
        bear = server.server.models.alive[0]
        assert bear.name == "bear"
        draw(server, "cup")
        assert not bear.batcher.is_busy
        assert not vars(bear.compositor.engine)["_sessions"]
        assert bear.compositor.system.kept_bytes() == 0


def test_a_budget_is_shared_by_graphs_and_caches(tiny_bundle: Path) -> None:
    needed = needed_bytes(Bundle.open(tiny_bundle), CPU)

    def costs(budget: int | None, count: int, cache_bytes: int = -1) -> set[int]:
        names = tuple(f"{number}={tiny_bundle}" for number in range(count))
        options = EngineOptions("onnxruntime", "cpu", memory_budget=budget)
        bundles = Bundles(Settings(bundle=names, cache_bytes=cache_bytes), options, Segmenter())
        return {bundles.cost(bundles.open(name)) for name in bundles.names}

    # all fit: what is left is for the caches
    assert costs(2 * needed + 1000, 2) == {needed + 500}
    assert costs(2 * needed + 1000, 2, cache_bytes=600) == {needed + 300}
    # not all fit: an eighth is for the caches
    assert costs(3 * needed, 4) == {needed + 3 * needed // 32}
    # one is larger than the budget: its graphs take turns
    assert costs(needed // 2, 2) == {needed // 2}
    assert costs(needed // 2, 1) == {needed // 2}
    assert costs(None, 2) == {0}


# --- failures and changes ---------------------------------------------------------------------------------


def test_a_bundle_that_cannot_be_used_fails_alone(
    tiny_bundle: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its requests are refused, its health says so, and the log says why; when it is mended it works."""
    weights = next(copy.glob("*.onnx.data"))
    content = weights.read_bytes()
    weights.write_bytes(bytes(len(content)))
    given = {"bundle": (f"cup={tiny_bundle}", f"bear={copy}", f"ghost={copy / 'none'}")}
    with caplog.at_level("INFO"), serving(tiny_bundle, **given) as server:
        for model in ("bear", "ghost"):
            error = refused(server, model)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the model cannot be loaded; the server's log says why"
            wait_until(lambda: health(server, f"models/{model}") == NOT_SERVING)  # noqa: B023
            assert status(server, model) == "failed"
        reasons = [fields(record) for record in caplog.records if record.message == "model not loaded"]
        assert {each["model"] for each in reasons} == {"bear", "ghost"}
        assert health(server, "models/cup") == health(server, "") == SERVING
        expected = draw(server, "cup")

        weights.write_bytes(content)
        server.loop.call_soon_threadsafe(server.server.reload)
        wait_until(lambda: status(server, "bear") == "unloaded")
        np.testing.assert_array_equal(draw(server, "bear"), expected)
        wait_until(lambda: health(server, "models/bear") == SERVING)


def test_a_bundle_that_failed_is_tried_again_later(
    tiny_bundle: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.server.models._AGAIN_SECONDS", 3600.0)
    weights = next(copy.glob("*.onnx.data"))
    content = weights.read_bytes()
    weights.write_bytes(bytes(len(content)))
    with serving(tiny_bundle, bundle=(f"cup={tiny_bundle}", f"bear={copy}")) as server:
        refused(server, "bear")
        weights.write_bytes(content)
        refused(server, "bear")  # too early
        monkeypatch.setattr("runtime.server.models._AGAIN_SECONDS", 0.0)
        np.testing.assert_array_equal(draw(server, "bear"), draw(server, "cup"))


def refused(server: ServerThread, model: str) -> Any:
    """The error of a request, which is not sent again."""
    with grpc.insecure_channel(server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        return refusal(stub.Composite, message(model=model))


def fields(record: Any) -> dict[str, Any]:
    found: dict[str, Any] = record.fields
    return found


def test_a_bundle_that_changed_is_loaded_again(tiny_bundle: Path, copy: Path) -> None:
    """A request that runs ends on the old one; none is lost."""
    with serving(tiny_bundle, bundle=str(copy)) as server, ThreadPoolExecutor(1) as pool:
        before = draw(server, "")
        old = server.server.models.first
        server.engine.hold()
        begun = pool.submit(draw, server, "")
        server.engine.wait_for_steps(3)
        manifest = json.loads((copy / MANIFEST).read_text())
        manifest["defaults"]["guidance_scale"] = 9.0
        (copy / MANIFEST).write_text(json.dumps(manifest))
        server.loop.call_soon_threadsafe(server.server.reload)
        wait_until(lambda: server.server.models.first is not old)
        after = draw(server, "")
        assert not np.array_equal(before, after)
        assert old.users == 1
        server.engine.release()
        np.testing.assert_array_equal(begun.result(PATIENCE), before)
        wait_until(lambda: old not in server.server.models.alive and not server.server.models._tasks)

        async def begun_by_another_reload() -> int:
            server.server.models.reload()
            return len(server.server.models._tasks)

        assert server.run(begun_by_another_reload()) == 0  # nothing has changed since


def test_a_bundle_that_was_damaged_changes_nothing(
    tiny_bundle: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), serving(tiny_bundle, bundle=str(copy)) as server:
        before = draw(server, "")
        (copy / MANIFEST).write_text("{")
        server.loop.call_soon_threadsafe(server.server.reload)
        wait_until(lambda: "model not reloaded" in caplog.messages)
        np.testing.assert_array_equal(draw(server, ""), before)


def test_a_server_stops_while_a_model_waits(tiny_bundle: Path, loading: threading.Event) -> None:
    with serving(tiny_bundle, drain_seconds=0.2) as server, ThreadPoolExecutor(1) as pool:
        waits = pool.submit(refused, server, "bear")
        wait_until(lambda: status(server, "bear") == "loading")
        server.run(server.server.stop())
        assert waits.result(PATIENCE).code() is grpc.StatusCode.UNAVAILABLE
        loading.set()
        wait_until(lambda: not server.server.is_busy)
        server.server.stop = _stopped  # type: ignore[method-assign]


async def _stopped() -> bool:
    return True
