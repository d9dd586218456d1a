"""The server under load, over a real socket: full, cancelled, late, draining, with an engine that fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.process import run
from runtime.server.serve import Server
from runtime.server.settings import Settings
from tests.support.serving import (
    PATIENCE,
    ServerThread,
    held_compositor,
    message,
    refusal,
    trailing,
    wait_until,
)

HEALTH = health_pb2.HealthCheckRequest(service="anydoor.v1.CompositorService")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(tiny_bundle) as server:
        yield server


@pytest.fixture
def stub(server: ServerThread) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield CompositorServiceStub(channel)


def test_full_queue_says_when_to_come_back(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, max_batch=1, queue=1) as server:
        server.engine.hold()
        with grpc.insecure_channel(server.address) as channel:
            stub: Any = CompositorServiceStub(channel)
            accepted = [stub.Composite.future(message(seed=seed), timeout=PATIENCE) for seed in range(2)]
            server.engine.wait_for_steps(1)
            wait_until(lambda: len(server.batcher.tickets) == 2)
            error = refusal(stub.Composite, message())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 0 < int(trailing(error)["grpc-retry-pushback-ms"]) <= 60_000
            server.engine.release()
            assert all(call.result().images for call in accepted)


def test_cancelling_frees_the_slot(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, max_batch=1) as server:
        server.engine.hold()
        with grpc.insecure_channel(server.address) as channel:
            stub: Any = CompositorServiceStub(channel)
            cancelled = stub.CompositeStream(pb.CompositeStreamRequest(request=message(steps=50)))
            server.engine.wait_for_steps(1)
            waiting = stub.Composite.future(message(steps=2), timeout=PATIENCE)
            wait_until(lambda: len(server.batcher.tickets) == 2)
            cancelled.cancel()
            wait_until(lambda: len(server.batcher.tickets) == 1)
            server.engine.release()
            assert waiting.result().images
            # the step that had begun, and the two of the request that waited
            assert len(server.engine.steps) == 3


@pytest.mark.parametrize("method", ["Composite", "CompositeStream"])
def test_deadline_frees_the_slot(tiny_bundle: Path, method: str) -> None:
    with ServerThread(tiny_bundle, max_batch=1) as server:
        server.engine.hold()
        with grpc.insecure_channel(server.address) as channel:
            stub: Any = CompositorServiceStub(channel)
            request: Any = message(steps=50)
            if method == "CompositeStream":
                request = pb.CompositeStreamRequest(request=request)
            error: Any = refusal(getattr(stub, method), request, timeout=0.5)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            wait_until(lambda: len(server.batcher.tickets) == 0)
            server.engine.release()
            assert stub.Composite(message(steps=2), timeout=PATIENCE).images
            # at most the step that had begun, and the two of the next request
            assert len(server.engine.steps) <= 3


def test_engine_failure_is_one_requests_problem(server: ServerThread, stub: Any) -> None:
    server.engine.fails = lambda graph, inputs: graph == "denoise" and 9.5 in inputs["guidance_scale"]
    server.engine.hold()
    begun = len(server.engine.steps)
    good = stub.Composite.future(message(steps=6), timeout=PATIENCE)
    server.engine.wait_for_steps(begun + 1)
    bad = stub.Composite.future(message(sampling=pb.Sampling(steps=6, guidance_scale=9.5)), timeout=PATIENCE)
    wait_until(lambda: any(ticket.waiting for ticket in server.batcher.tickets))
    server.engine.release()
    error: Any = bad.exception()
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "caught fire" not in error.details()
    assert len(trailing(error)["request-id"]) == 32
    assert good.result().images[0].image == stub.Composite(message(steps=6), timeout=PATIENCE).images[0].image


def test_draining_under_load_loses_no_accepted_request(tiny_bundle: Path) -> None:
    with (
        ServerThread(tiny_bundle, max_batch=2, queue=8) as server,
        grpc.insecure_channel(server.address) as channel,
        grpc.insecure_channel(server.address) as other,
    ):
        stub: Any = CompositorServiceStub(channel)
        health = health_pb2_grpc.HealthStub(other)
        request = health_pb2.HealthCheckRequest(service="anydoor.v1.CompositorService")
        assert health.Check(request).status == SERVING
        server.engine.hold()
        calls = [stub.Composite.future(message(seed=seed), timeout=PATIENCE) for seed in range(6)]
        wait_until(lambda: len(server.batcher.tickets) == 6)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop)
        wait_until(lambda: not server.batcher.is_open)
        assert health.Check(request).status == NOT_SERVING
        assert refusal(stub.Composite, message()).code() is grpc.StatusCode.UNAVAILABLE
        server.engine.release()
        assert stopping.result(PATIENCE) is True
        assert all(len(call.result().images) == 1 for call in calls)


def test_what_cannot_be_finished_is_refused_not_dropped(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, max_batch=1, drain_seconds=0.1) as server:
        server.engine.hold()
        with grpc.insecure_channel(server.address) as channel:
            stub: Any = CompositorServiceStub(channel)
            call = stub.Composite.future(message(steps=50), timeout=PATIENCE)
            server.engine.wait_for_steps(1)
            stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server.loop)
            threading.Timer(0.5, server.engine.release).start()
            assert stopping.result(PATIENCE) is False
            error: Any = call.exception()
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the server is shutting down"


def test_a_lost_engine_is_told_to_probes_and_callers(tiny_bundle: Path) -> None:
    """A card that refuses everything after a fault: no request can succeed until the process starts again."""
    with (
        ServerThread(tiny_bundle, max_batch=1) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = CompositorServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(HEALTH).status == SERVING
        server.engine.hold()
        calls = [stub.Composite.future(message(seed=seed), timeout=PATIENCE) for seed in range(3)]
        wait_until(lambda: len(server.batcher.tickets) == 3)
        server.engine.lose()
        server.engine.release()
        for call in calls:
            error: Any = call.exception()
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "failed for good" in error.details()
        wait_until(lambda: health.Check(HEALTH).status == NOT_SERVING)
        assert refusal(stub.Composite, message()).code() is grpc.StatusCode.UNAVAILABLE
        assert stub.GetModelInfo(pb.GetModelInfoRequest()).resolution == 64


def test_a_lost_engine_ends_the_process_for_its_supervisor(tiny_bundle: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/anydoor.sock"
    compositor, engine = held_compositor(tiny_bundle)
    codes: list[grpc.StatusCode] = []

    def call() -> None:
        with grpc.insecure_channel(address) as channel:
            stub: Any = CompositorServiceStub(channel)
            assert stub.Composite(message(), timeout=PATIENCE, wait_for_ready=True).images
            engine.lose()
            codes.append(refusal(stub.Composite, message()).code())

    caller = threading.Thread(target=call)
    caller.start()

    async def serve() -> int:
        settings = Settings(listen=(address,), drain_seconds=5.0)
        return await run(Server(compositor, settings), stop=asyncio.Event())

    assert asyncio.run(serve()) == 1
    caller.join(PATIENCE)
    assert codes == [grpc.StatusCode.UNAVAILABLE]
