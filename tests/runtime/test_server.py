"""The server over a real socket: what callers see when all goes well, and when it does not."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import struct
import threading
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, held_compositor, message, png

from runtime.request import Placement, Sampling
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.logs import JsonFormatter

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    limits = {"max_message_bytes": 1 << 20, "max_pixels": 1 << 16, "max_steps": 60}
    with ServerThread(tiny_bundle, metrics="127.0.0.1:0", **limits) as server:
        yield server


@pytest.fixture
def stub(server: ServerThread) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield CompositorServiceStub(channel)


def refusal(call: Any, *arguments: Any, **options: Any) -> Any:
    """The error of a call that must fail."""

    def outcome() -> object:
        result = call(*arguments, **{"timeout": PATIENCE, **options})
        return list(result) if hasattr(result, "__next__") else result

    with pytest.raises(grpc.RpcError) as caught:
        outcome()
    return caught.value


def trailing(error: Any) -> dict[str, str]:
    return dict(error.trailing_metadata())


# --- when all goes well -----------------------------------------------------------------------------------


def test_picture_is_the_compositors(server: ServerThread, stub: Any, tiny_bundle: Path) -> None:
    response = stub.Composite(message(steps=4, num_images=2), timeout=PATIENCE)
    expected = held_compositor(tiny_bundle)[0].run(
        SCENE, Placement(OBJECT, box=BOX), 7, Sampling(steps=4), num_images=2
    )
    assert [image.seed for image in response.images] == [7, 8]
    for image, result in zip(response.images, expected):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.image))), result.image)
        assert [(r.x0, r.y0, r.x1, r.y1) for r in image.regions] == list(result.regions)
    assert {"queue", "sample", "decode", "encode"} <= response.seconds.keys()


@pytest.mark.parametrize(
    ("number", "name"),
    [(pb.IMAGE_FORMAT_UNSPECIFIED, "PNG"), (pb.IMAGE_FORMAT_JPEG, "JPEG"), (pb.IMAGE_FORMAT_WEBP, "WEBP")],
)
def test_output_format(stub: Any, number: pb.ImageFormat, name: str) -> None:
    response = stub.Composite(message(output_format=number), timeout=PATIENCE)
    assert Image.open(io.BytesIO(response.images[0].image)).format == name


def test_stream_tells_queue_then_steps_then_result(stub: Any) -> None:
    request = pb.CompositeStreamRequest(request=message(steps=6), preview_every=3)
    events = list(stub.CompositeStream(request, timeout=PATIENCE))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "queued"
    assert kinds[-1] == "result"
    assert kinds.count("result") == kinds.count("preview") == 1
    assert [kind for kind in kinds if kind != "preview"] == sorted(
        (kind for kind in kinds if kind != "preview"), key=["queued", "step_done", "result"].index
    )
    steps = [event.step_done for event in events if event.HasField("step_done")]
    assert [(step.done, step.total) for step in steps] == [(done, 6) for done in range(1, 7)]
    (preview,) = (event.preview for event in events if event.HasField("preview"))
    assert Image.open(io.BytesIO(preview.image)).size == Image.open(io.BytesIO(SCENE)).size
    assert len({event.request_id for event in events}) == 1


def test_unset_seed_is_random_and_reported(stub: Any) -> None:
    request = message()
    request.ClearField("seed")
    first, second = (stub.Composite(request, timeout=PATIENCE).images[0] for _ in range(2))
    assert first.seed != second.seed
    again = stub.Composite(message(seed=first.seed), timeout=PATIENCE).images[0]
    assert again.image == first.image


def test_model_info_tells_the_limits(stub: Any) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE)
    assert (info.resolution, info.precision, info.backend, info.device) == (64, "fp32", "onnxruntime", "cpu")
    assert (info.limits.message_bytes, info.limits.pixels, info.limits.steps) == (1 << 20, 1 << 16, 60)
    assert len(info.checkpoint_sha256) == 64


def test_reflection_lists_the_service(server: ServerThread) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        file = database.FindFileContainingSymbol("anydoor.v1.CompositorService")
    assert {"anydoor.v1.CompositorService", "grpc.health.v1.Health"} <= services
    assert [method.name for method in file.service[0].method] == [
        "Composite",
        "CompositeStream",
        "GetModelInfo",
    ]


def test_unix_socket(tiny_bundle: Path, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/anydoor.sock"
    with ServerThread(tiny_bundle, listen=(address,)), grpc.insecure_channel(address) as channel:
        response = CompositorServiceStub(channel).Composite(message(), timeout=PATIENCE)
    assert len(response.images) == 1


def test_metrics_tell_outcomes_stages_and_occupancy(server: ServerThread, stub: Any) -> None:
    stub.Composite(message(), timeout=PATIENCE)
    refusal(stub.Composite, pb.CompositeRequest())
    url = f"http://127.0.0.1:{server.server.metrics_port}/metrics"
    with urllib.request.urlopen(url, timeout=PATIENCE) as page:
        text = page.read().decode()
    assert 'anydoor_requests_total{code="OK",method="Composite"}' in text
    assert 'anydoor_requests_total{code="INVALID_ARGUMENT",method="Composite"}' in text
    assert 'anydoor_stage_seconds_count{stage="sample"}' in text
    assert "anydoor_batch_samples_count" in text
    assert "anydoor_queued_requests 0.0" in text


def test_log_lines_carry_the_request_id(stub: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        response, call = stub.Composite.with_call(message(), timeout=PATIENCE)
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    ended = [line for line in lines if line["event"] == "request ended"]
    assert ended[-1]["request_id"] == response.request_id == dict(call.trailing_metadata())["request-id"]
    assert ended[-1]["code"] == "OK"
    assert ended[-1]["stages"]["sample"] > 0


def test_spans_tell_status_and_stages(stub: Any) -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    response = stub.Composite(message(), timeout=PATIENCE, metadata=(("traceparent", parent),))
    (span,) = (
        span
        for span in exporter.get_finished_spans()
        if (span.attributes or {}).get("anydoor.request_id") == response.request_id
    )
    assert span.name == "anydoor.v1.CompositorService/Composite"
    assert span.context is not None
    assert f"{span.context.trace_id:032x}" == parent.split("-")[1]
    assert (span.attributes or {})["anydoor.seconds.sample"] > 0  # type: ignore[operator]


# --- what is refused --------------------------------------------------------------------------------------


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
    "placements[0].mode": [message(placements=[placement(mode=99)])],
    "placements[0].ratios": [
        message(placements=[placement(ratios=pb.Ratios(reference=0.5))]),
        message(placements=[placement(ratios=pb.Ratios(box=1e9))]),
        message(placements=[placement(ratios=pb.Ratios(crop=NAN))]),
    ],
    "placements[1].box": [message(placements=[placement(), placement(box=pb.Box())])],
    "sampling.steps": [message(steps=0), message(steps=61), message(steps=2**32 - 1)],
    "sampling.guidance": [
        message(sampling=pb.Sampling(guidance=value)) for value in (-1, 101, NAN, float("inf"))
    ],
    "sampling.strength": [message(sampling=pb.Sampling(strength=value)) for value in (-0.1, 11, NAN)],
    "sampling.eta": [message(sampling=pb.Sampling(eta=value)) for value in (-0.1, 1.1, NAN)],
    "seed": [message(seed=2**63 - 1), message(seed=2**64 - 1)],
    "num_images": [message(num_images=0), message(num_images=9), message(num_images=2**32 - 1)],
    "output_format": [message(output_format=77)],
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
        (pb.Sampling.DESCRIPTOR, "sampling."),
    ]:
        fields |= {prefix + field.name for field in descriptor.fields}
    assert fields - {"sampling"} <= MALFORMED.keys()


def test_too_many_previews(stub: Any) -> None:
    error = refusal(
        stub.CompositeStream, pb.CompositeStreamRequest(request=message(steps=20), preview_every=1)
    )
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailing(error)["field"] == "request.preview_every"


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


# --- under load -------------------------------------------------------------------------------------------


def test_full_queue_says_when_to_come_back(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle, max_batch=1, queue=1) as server:
        server.engine.hold()
        with grpc.insecure_channel(server.address) as channel:
            stub: Any = CompositorServiceStub(channel)
            accepted = [stub.Composite.future(message(seed=seed), timeout=PATIENCE) for seed in range(2)]
            server.engine.wait_for_steps(1)
            wait_until(lambda: server.server.scheduler.accepted == 2)
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
            wait_until(lambda: server.server.scheduler.accepted == 2)
            cancelled.cancel()
            wait_until(lambda: server.server.scheduler.accepted == 1)
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
            wait_until(lambda: server.server.scheduler.accepted == 0)
            server.engine.release()
            assert stub.Composite(message(steps=2), timeout=PATIENCE).images
            # at most the step that had begun, and the two of the next request
            assert len(server.engine.steps) <= 3


def test_engine_failure_is_one_requests_problem(server: ServerThread, stub: Any) -> None:
    server.engine.fails = lambda graph, inputs: graph == "denoise" and 9.5 in inputs["guidance"]
    server.engine.hold()
    begun = len(server.engine.steps)
    good = stub.Composite.future(message(steps=6), timeout=PATIENCE)
    server.engine.wait_for_steps(begun + 1)
    bad = stub.Composite.future(message(sampling=pb.Sampling(steps=6, guidance=9.5)), timeout=PATIENCE)
    wait_until(lambda: any(ticket.waiting for ticket in server.server.scheduler._tickets))
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
        wait_until(lambda: server.server.scheduler.accepted == 6)
        stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server._loop)
        wait_until(lambda: server.server.scheduler._draining)
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
            stopping = asyncio.run_coroutine_threadsafe(server.server.stop(), server._loop)
            threading.Timer(0.5, server.engine.release).start()
            assert stopping.result(PATIENCE) is False
            error: Any = call.exception()
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the server is shutting down"


def wait_until(condition: Any) -> None:
    """Polls, because what the server has received is nobody's event."""
    waited = threading.Event()
    for _ in range(int(PATIENCE / 0.005)):
        if condition():
            return
        waited.wait(0.005)
    raise AssertionError("it never happened")
