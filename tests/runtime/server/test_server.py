"""The server over a real socket: what callers, operators and probes see when all goes well."""

from __future__ import annotations

import io
import json
import logging
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image

from engines.bundle import Bundle
from engines.engine import choose_backend
from engines.options import EngineOptions
from runtime.request import Placement, Request, Sampling
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.logs import JsonFormatter
from runtime.version import version
from tests.support.serving import (
    BOX,
    OBJECT,
    PATIENCE,
    SCENE,
    ServerThread,
    held_compositor,
    message,
    refusal,
    wait_until,
)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[ServerThread]:
    limits = {"max_message_bytes": 1 << 20, "max_pixels": 1 << 16, "max_steps": 60}
    with ServerThread(tiny_bundle, metrics="127.0.0.1:0", **limits) as server:
        yield server


@pytest.fixture
def stub(server: ServerThread) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield CompositorServiceStub(channel)


def test_picture_is_the_compositors(server: ServerThread, stub: Any, tiny_bundle: Path) -> None:
    response = stub.Composite(message(steps=4, num_images=2), timeout=PATIENCE)
    request = Request(SCENE, [Placement(OBJECT, box=BOX)], 7, Sampling(steps=4), num_images=2)
    expected = held_compositor(tiny_bundle)[0].run(request)
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


def test_model_info_tells_the_limits(stub: Any, tiny_bundle: Path) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE)
    assert (info.resolution, info.precision, info.device) == (64, "fp32", "cpu")
    assert info.backend == choose_backend(Bundle.open(tiny_bundle), EngineOptions(device="cpu"))
    assert (info.limits.message_bytes, info.limits.pixels, info.limits.steps) == (1 << 20, 1 << 16, 60)
    assert len(info.checkpoint_sha256) == 64


def test_model_info_tells_system_and_defaults(server: ServerThread, stub: Any) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE)
    assert info.system == "anydoor"
    assert info.version == version()
    defaults = server.compositor.defaults
    assert info.defaults.sampling.steps == defaults["steps"]
    assert info.defaults.sampling.guidance_scale == defaults["guidance_scale"]
    assert info.defaults.sampling.sampler == pb.SAMPLER_DDIM
    assert info.defaults.mode == pb.PLACEMENT_MODE_CROP
    assert info.defaults.ratios == pb.Ratios(reference=1.2, box=1.1, crop=2.0)


def test_what_is_open_comes_from_the_model(tiny_bundle: Path) -> None:
    """A request that sets nothing and one that sets the model's defaults give one picture."""
    with ServerThread(tiny_bundle) as server, grpc.insecure_channel(server.address) as channel:
        server.compositor.defaults = {
            **server.compositor.defaults,
            **{"steps": 2, "guidance_scale": 2.0, "mode": "keep_background", "crop_ratio": 1.3},
        }
        stub: Any = CompositorServiceStub(channel)
        defaults = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE).defaults
        given = message(sampling=defaults.sampling)
        given.placements[0].mode = defaults.mode
        given.placements[0].ratios.CopyFrom(defaults.ratios)
        left_open = message(sampling=pb.Sampling())
        pictures = [stub.Composite(each, timeout=PATIENCE).images[0].image for each in (given, left_open)]
        assert pictures[0] == pictures[1]
        assert [len(steps) for steps in server.engine.steps] == [1] * 4


def test_files_that_are_sent_are_kept_by_nobody_else(server: ServerThread, stub: Any) -> None:
    server.engine.hold()
    call = stub.Composite.future(message(), timeout=PATIENCE)
    wait_until(lambda: server.batcher.tickets)
    (ticket,) = server.batcher.tickets
    server.engine.release()
    assert call.result().images
    assert not ticket.encoded


def test_reflection_lists_the_service(server: ServerThread) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = set(database.get_services())
        file = database.FindFileContainingSymbol("anydoor.v1.CompositorService")
    assert {"anydoor.v1.CompositorService", "grpc.health.v1.Health"} <= services
    assert [method.name for method in file.service[0].method] == [
        "Composite",
        "CompositeStream",
        "Draw",
        "DrawStream",
        "Edit",
        "EditStream",
        "Segment",
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
    assert 'anydoor_requests_total{code="OK",method="Composite",model="tiny-fp32"}' in text
    assert 'anydoor_requests_total{code="INVALID_ARGUMENT",method="Composite",model="tiny-fp32"}' in text
    assert 'anydoor_stage_seconds_count{model="tiny-fp32",stage="sample"}' in text
    assert "anydoor_batch_samples_count" in text
    assert 'anydoor_queued_requests{model="tiny-fp32"} 0.0' in text


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
