"""The clients against a real server: errors, asyncio, the command line, and a server that dies."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from runtime.cli import main
from runtime.client import AsyncClient, Client, ServerError
from runtime.errors import InputError
from runtime.imaging.pictures import load_picture
from runtime.request import Placement, Request, Sampling
from runtime.result import Composite
from runtime.server.events import Preview, Queued, StepDone
from tests.support.serving import (
    BOX,
    OBJECT,
    PATIENCE,
    SCENE,
    ServerThread,
    held_compositor,
    object_array,
    png,
    scene_array,
    wait_until,
)

PLACEMENT = Placement(OBJECT, box=BOX)
REQUEST = Request(SCENE, [PLACEMENT], 7, Sampling(steps=3))
NOBODY = "127.0.0.1:1"
EXAMPLES = Path(__file__).parents[2] / "examples"
UNUSED_BY_CLIENTS = (
    "engines.bundle",
    "engines.engine",
    "engines.manifest",
    "runtime.compositor",
    "runtime.diffusion.ddim",
    "runtime.drawing",
    "runtime.job",
    "runtime.sampling",
    "runtime.systems",
)
"""Modules that draw pictures, and packages of such modules."""


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle) as server:
        yield server


@pytest.fixture
def client(server: ServerThread) -> Iterator[Client]:
    with server.client() as client:
        yield client


def test_importing_the_client_imports_nothing_that_draws() -> None:
    code = (
        f"import sys, runtime.client; print([name for name in sys.modules for unused in {UNUSED_BY_CLIENTS} "
        "if name == unused or name.startswith(unused + '.')])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=EXAMPLES.parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# --- the same calls give the same pictures ----------------------------------------------------------------


def test_client_is_a_compositor(client: Client, tiny_bundle: Path) -> None:
    local = held_compositor(tiny_bundle)[0]
    placement = Placement(object_array(), box=BOX, mode="keep_background")
    here, there = (
        each.composite(scene_array(), placement, seed=5, sampling=Sampling(steps=2))
        for each in (local, client)
    )
    np.testing.assert_array_equal(np.asarray(here), np.asarray(there))


def test_run_returns_seeds_regions_and_times(client: Client, tiny_bundle: Path) -> None:
    request = Request(SCENE, [PLACEMENT], 7, Sampling(steps=2), num_images=2)
    results = client.run(request)
    expected = held_compositor(tiny_bundle)[0].run(request)
    assert [(result.seed, result.regions) for result in results] == [(e.seed, e.regions) for e in expected]
    assert results[0].seconds["sample"] > 0


def test_stream_ends_with_the_pictures(client: Client) -> None:
    events = list(client.stream(Request(SCENE, [PLACEMENT], 7, Sampling(steps=4)), preview_every=2))
    assert isinstance(events[0], Queued)
    assert [(step.done, step.total) for step in events if isinstance(step, StepDone)] == [
        (done, 4) for done in range(1, 5)
    ]
    assert sum(isinstance(each, Preview) for each in events) == 1
    assert isinstance(events[-1], list)
    assert isinstance(events[-1][0], Composite)


def test_model_info(client: Client) -> None:
    assert client.model_info().resolution == 64


def test_asyncio(server: ServerThread, client: Client) -> None:
    async def talk() -> tuple[list[Composite], Composite, int]:
        async with AsyncClient(server.address, timeout=PATIENCE) as other:
            heard: list[int] = []
            first, second, third = await asyncio.gather(
                other.run(REQUEST),
                other.composite(SCENE, PLACEMENT, seed=7),
                other.composite(SCENE, PLACEMENT, num_images=1, on_step=lambda done, _: heard.append(done)),
            )
            assert heard == list(range(1, 51))
            assert len(third) == 1
            streamed = None
            async with aclosing(other.stream(REQUEST)) as stream:
                async for event in stream:
                    streamed = event
            assert isinstance(streamed, list)
            assert second.size == (80, 64)
            return first, streamed[0], (await other.model_info()).resolution

    (first,), streamed, resolution = asyncio.run(talk())
    np.testing.assert_array_equal(first.image, client.run(REQUEST)[0].image)
    np.testing.assert_array_equal(first.image, streamed.image)
    assert resolution == 64


def test_several_pictures_with_progress(client: Client, tiny_bundle: Path) -> None:
    local = held_compositor(tiny_bundle)[0]
    heard: list[list[tuple[int, int]]] = [[], []]
    here, there = (
        each.composite(
            *(SCENE, PLACEMENT),
            seed=5,
            sampling=Sampling(steps=3),
            num_images=2,
            on_step=lambda *step, steps=steps: steps.append(step),
        )
        for each, steps in zip((local, client), heard)
    )
    assert len(here) == 2
    for ours, theirs in zip(here, there):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    # pictures may join the server's batch at different times, so it may take more and smaller steps
    assert heard[0] == [(2, 6), (4, 6), (6, 6)]
    assert heard[1] == sorted(set(heard[1]))
    assert heard[1][-1] == (6, 6)


def test_one_picture_of_a_list_is_a_list(client: Client) -> None:
    assert len(client.composite(SCENE, PLACEMENT, sampling=Sampling(steps=1), num_images=1)) == 1


def test_qualities_mean_the_same_on_both_sides(client: Client, tiny_bundle: Path) -> None:
    request = Request(SCENE, [PLACEMENT], 7, Sampling(quality="fast", steps=3))
    (here,) = held_compositor(tiny_bundle)[0].run(request)
    np.testing.assert_array_equal(client.run(request)[0].image, here.image)


# --- errors -----------------------------------------------------------------------------------------------


def test_initial_noise_is_refused(client: Client) -> None:
    with pytest.raises(InputError, match="a server does not take initial noise"):
        client.composite(SCENE, PLACEMENT, initial_noise=np.zeros((1, 4, 8, 8), np.float32))


def test_input_error_names_the_field(client: Client) -> None:
    with pytest.raises(InputError, match=r"placements\[0\].box") as refusal:
        client.composite(SCENE, Placement(OBJECT, box=(5, 5, 5, 5)))
    assert refusal.value.field == "placements[0].box"


def test_nobody_there() -> None:
    with (
        Client(NOBODY, timeout=PATIENCE) as client,
        pytest.raises(ServerError, match="cannot be reached") as error,
    ):
        client.model_info()
    assert error.value.code == "UNAVAILABLE"


def test_timeout(server: ServerThread, client: Client) -> None:
    server.engine.hold()
    try:
        with pytest.raises(ServerError, match="did not finish in time") as error:
            client.run(REQUEST, timeout=0.2)
        assert error.value.code == "DEADLINE_EXCEEDED"
    finally:
        server.engine.release()


def test_leaving_the_stream_cancels(server: ServerThread, client: Client) -> None:
    server.engine.hold()
    stream = client.stream(Request(SCENE, [PLACEMENT], 7, Sampling(steps=50)))
    assert isinstance(next(stream), Queued)
    stream.close()  # type: ignore[attr-defined]
    wait_until(lambda: not server.batcher.tickets)
    server.engine.release()
    begun = len(server.engine.steps)
    assert client.run(REQUEST)
    assert len(server.engine.steps) <= begun + 1 + 3


def test_failure_inside_tells_the_request_id(server: ServerThread, client: Client) -> None:
    server.engine.fails = lambda graph, inputs: True
    try:
        with pytest.raises(ServerError, match=r"INTERNAL, request [0-9a-f]{32}") as error:
            client.run(REQUEST)
        assert len(error.value.request_id) == 32
    finally:
        server.engine.fails = lambda graph, inputs: False


# --- a server in a process of its own ---------------------------------------------------------------------


class ServerProcess:
    """`anydoor serve`."""

    def __init__(self, bundle: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "runtime", "serve", f"--bundle={bundle}", "--listen=127.0.0.1:0"]
        self.process = subprocess.Popen(
            [*command, *flags], stderr=subprocess.PIPE, text=True, cwd=EXAMPLES.parent, env=dict(os.environ)
        )
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if '"serving"' in line:
                break
        found = re.search(r'"addresses": \["(127[^"]*)"', "".join(self.lines))
        assert found, self.lines
        self.address = found[1]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        assert self.process.stderr is not None
        self.lines += self.process.stderr.readlines()
        return self.process.wait(PATIENCE)


def test_the_shipped_bundle_is_served_with_one_command(tmp_path: Path) -> None:
    """Listed by reflection, healthy, and its picture is that of the command line."""
    bundle, box = EXAMPLES / "anydoor-small", (EXAMPLES / "scene_box.txt").read_text().strip()
    command = ["composite", f"--scene={EXAMPLES}/scene.png", f"--reference={EXAMPLES}/object.png", "--quiet"]
    command += [f"--box={box}", "--steps=1", "--seed=7"]
    server = ServerProcess(bundle)
    try:
        with grpc.insecure_channel(server.address) as channel:
            services = ProtoReflectionDescriptorDatabase(channel).get_services()
            request = health_pb2.HealthCheckRequest(service="anydoor.v1.CompositorService")
            health = health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE)
        assert "anydoor.v1.CompositorService" in services
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert main([*command, f"--server={server.address}", f"--output={tmp_path}/there.png"]) == 0
    finally:
        server.end(signal.SIGTERM)
    assert main([*command, f"--bundle={bundle}", f"--output={tmp_path}/here.png"]) == 0
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_sigterm_finishes_what_was_accepted(tiny_bundle: Path) -> None:
    server = ServerProcess(tiny_bundle)
    with Client(server.address, timeout=PATIENCE) as client:
        stream = client.stream(Request(SCENE, [PLACEMENT], 7, Sampling(steps=90)))
        assert isinstance(next(stream), Queued)
        ended: list[int] = []
        thread = threading.Thread(target=lambda: ended.append(server.end(signal.SIGTERM)))
        thread.start()
        *_, last = stream
        assert isinstance(last, list)
        thread.join(PATIENCE)
    assert ended == [0]
    assert '"all_finished": true' in server.lines[-1]


def test_killed_server_is_a_clean_error(tiny_bundle: Path) -> None:
    server = ServerProcess(tiny_bundle)
    with Client(server.address, timeout=PATIENCE) as client:
        stream = client.stream(Request(SCENE, [PLACEMENT], 7, Sampling(steps=100), num_images=8))
        assert isinstance(next(stream), Queued)
        server.end(signal.SIGKILL)
        with pytest.raises(ServerError, match="cannot be reached") as error:
            list(stream)
        assert error.value.code == "UNAVAILABLE"


def test_command_line_makes_the_same_file_with_and_without_a_server(
    server: ServerThread, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scene.png").write_bytes(SCENE)
    (tmp_path / "object.png").write_bytes(OBJECT)
    command = ["composite", f"--scene={tmp_path}/scene.png", f"--reference={tmp_path}/object.png", "--quiet"]
    command += ["--box=10,8,60,50", "--steps=3", "--seed=7"]
    assert main([*command, f"--server={server.address}", f"--output={tmp_path}/there.png"]) == 0
    assert main([*command, f"--bundle={tiny_bundle}", f"--output={tmp_path}/here.png"]) == 0
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()
    assert main([*command, f"--server={NOBODY}", f"--output={tmp_path}/never.png"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    assert not (tmp_path / "never.png").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--bundle=none"], "there is no bundle at 'none'"),
        (["--bundle=none", "--bundle=other/none"], "are both called 'none'"),
        (["--queue=-1"], "queue must be at least 0"),
        (["--listen=nowhere.invalid:1", "--insecure"], "cannot listen at"),
        (["--listen=127.0.0.1:{taken}"], "cannot listen at '127.0.0.1:{taken}': Address already in use"),
        (["--listen=unix:/nowhere/socket"], "cannot listen at 'unix:/nowhere/socket': No such file"),
        (["--metrics=nonsense"], "metrics must be host:port"),
        (["--metrics=localhost:²"], "metrics must be host:port"),
        (["--tokens=none"], "cannot read 'none'"),
        (["--tls-certificate=none", "--tls-key=none"], "cannot read 'none'"),
    ],
)
def test_server_that_cannot_start(
    server: ServerThread,
    tiny_bundle: Path,
    flags: list[str],
    sentence: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    taken = server.address.rpartition(":")[2]
    given = [flag.format(taken=taken) for flag in flags]
    if "--bundle=none" not in given:
        given.append(f"--bundle={tiny_bundle}")
    assert main(["serve", "--listen=127.0.0.1:0", *given]) == 2
    assert sentence.format(taken=taken) in capfd.readouterr().err


def test_longest_side_is_bounded() -> None:
    with pytest.raises(InputError, match="a side may have at most 65,535 pixels"):
        load_picture(png(np.zeros((1, 65_536, 3), np.uint8)), "the scene")
