"""Objects drawn inside masks by a server: composites and events, levels, holes, and what the model is."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from runtime import Compositor, EngineOptions, Placement, Request, Sampling
from runtime.cli import main
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from tests.runtime.server.test_http import http_address, in_base64
from tests.support.http import post
from tests.support.imprint import tiny_imprint_bundle
from tests.support.serving import (
    OBJECT,
    PATIENCE,
    SCENE,
    ServerThread,
    message,
    refusal,
    scene_array,
    trailing,
)

MASK = np.zeros(scene_array().shape[:2], bool)
MASK[20:45, 15:55] = MASK[10:30, 30:40] = True


@pytest.fixture(scope="module")
def server() -> Iterator[ServerThread]:
    with ServerThread(tiny_imprint_bundle(), http="127.0.0.1:0") as server:
        yield server


@pytest.fixture
def stub(server: ServerThread) -> Iterator[Any]:
    with grpc.insecure_channel(server.address) as channel:
        yield CompositorServiceStub(channel)


@pytest.fixture(scope="module")
def alone() -> Compositor:
    return Compositor.load(tiny_imprint_bundle(), EngineOptions("onnxruntime", "cpu"))


def difference(first: Any, second: Any) -> int:
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second)).max())


def test_events_come_on_the_way_to_the_compositors_picture(stub: Any, alone: Compositor) -> None:
    wanted = message(steps=4)
    events = list(
        stub.CompositeStream(pb.CompositeStreamRequest(request=wanted, preview_every=2), timeout=PATIENCE)
    )
    kinds = [event.WhichOneof("event") for event in events]
    assert (kinds[0], kinds[-1]) == ("queued", "result")
    assert (kinds.count("step_done"), kinds.count("preview")) == (4, 1)
    (image,) = events[-1].result.images
    placement = Placement(OBJECT, box=(10, 8, 60, 50))
    (expected,) = alone.run(Request(SCENE, [placement], 7, Sampling(steps=4)))
    assert difference(Image.open(io.BytesIO(image.image)), expected.image) <= 1


def test_levels_and_holes_travel(server: ServerThread, alone: Compositor) -> None:
    masked = Placement(OBJECT, mask=MASK)
    placements = [replace(masked, mask_level=level) for level in (None, 1, "blob", 3)]
    placements.append(Placement(mask=MASK, mask_level="outline"))
    with server.client() as client:
        for placement in placements:
            request = Request(SCENE, [placement], 7, Sampling(steps=2))
            (found,), (expected,) = client.run(request), alone.run(request)
            assert difference(found.image, expected.image) <= 1
            assert found.regions == expected.regions


def test_what_the_model_is(stub: Any) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=PATIENCE)
    assert (info.system, info.condition) == ("imprint", pb.CONDITION_REFERENCE)
    assert (info.scene_channels, info.fills) == (5, True)
    assert list(info.qualities) == [pb.QUALITY_EXACT, pb.QUALITY_BALANCED]
    defaults = info.defaults
    assert (defaults.sampling.guidance_scale, defaults.ratios.reference) == (3.0, 1.2)
    assert not defaults.sampling.HasField("control_scale")
    assert defaults.mask_level == pb.MASK_LEVEL_EXACT


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mask_level": 9}, "mask_level"),
        ({"mask_level": pb.MASK_LEVEL_BLOB}, "mask_level"),
        ({"prompt": "a cup"}, "prompt"),
        ({"strength": 0.5}, "strength"),
        ({"refine": 200}, "refine"),
        ({"edge": pb.EDGE_HARD}, "edge"),
        ({"reference": b"", "reference_mask": OBJECT}, "reference_mask"),
    ],
)
def test_placements_that_are_refused(stub: Any, fields: dict[str, Any], field: str) -> None:
    placement = pb.Placement(**{"reference": OBJECT, "box": pb.Box(x0=10, y0=8, x1=60, y1=50), **fields})
    error = refusal(stub.Composite, message(placements=[placement]))
    assert (error.code(), trailing(error)["field"]) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"placements[0].{field}",
    )


def test_values_that_change_nothing_are_taken(
    server: ServerThread, stub: Any, alone: Compositor, tmp_path: Path
) -> None:
    """Those of parameters that only AnyDoor has, or only Stable Diffusion."""
    placement = pb.Placement(
        **{
            "reference": OBJECT,
            "box": pb.Box(x0=10, y0=8, x1=60, y1=50),
            "prompt": "",
            "negative_prompt": "",
        },
        **{"strength": 1, "refine": 0, "edge": pb.EDGE_SOFT, "mask_level": pb.MASK_LEVEL_EXACT},
    )
    wanted = message(placements=[placement], steps=2)
    wanted.sampling.control_scale = 1
    (over_grpc,) = stub.Composite(wanted, timeout=PATIENCE).images
    fields = {
        **{"scene": in_base64(SCENE), "reference": in_base64(OBJECT), "box": [10, 8, 60, 50], "seed": 7},
        **{"strength": 1, "refine": "0", "edge": "soft", "mask_level": "exact", "prompt": ""},
        "sampling": {"steps": 2, "control_scale": 1.0, "map_steps": None},
    }
    over_http = post(http_address(server), "/v1/composite", fields, accept="image/png")
    assert over_http.status == 200
    (tmp_path / "scene.png").write_bytes(SCENE)
    (tmp_path / "object.png").write_bytes(OBJECT)
    pictures = ["--reference", str(tmp_path / "object.png"), "--scene", str(tmp_path / "scene.png")]
    place = ["--box", "10,8,60,50", "--seed", "7", "--steps", "2", "--quiet", "--server", server.address]
    neutral = ["--strength", "1", "--refine", "0", "--edge", "soft", "--control-scale", "1"]
    by_command = tmp_path / "out.png"
    assert main(["composite", *pictures, *place, *neutral, "-o", str(by_command)]) == 0
    (expected,) = alone.run(Request(SCENE, [Placement(OBJECT, box=(10, 8, 60, 50))], 7, Sampling(steps=2)))
    for content in (over_grpc.image, over_http.content, by_command.read_bytes()):
        assert difference(Image.open(io.BytesIO(content)), expected.image) <= 1
