"""A server finds objects: as an answer of its own, and in the references of requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from runtime.errors import InputError, MissingModelError
from runtime.request import Placement, Sampling, Where
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.segmentation import Segmenter
from tests.support.segmenters import bright_things
from tests.support.serving import BOX, OBJECT, PATIENCE, SCENE, ServerThread, message, png, refusal

SHELF = png(bright_things())
CLICKS = [(20, 20), (70, 30, False)]


@pytest.fixture(scope="module")
def server(example_bundle: Path, segmenter_bundles: tuple[Path, Path]) -> Iterator[ServerThread]:
    with ServerThread(example_bundle, segmenter=tuple(map(str, segmenter_bundles))) as running:
        yield running


@pytest.fixture(scope="module")
def bare_server(example_bundle: Path) -> Iterator[ServerThread]:
    with ServerThread(example_bundle) as running:
        yield running


@pytest.mark.parametrize("where", [Where(), Where(clicks=CLICKS), Where(box=(56, 14, 88, 40))])
def test_the_mask_is_that_of_the_segmenter(
    server: ServerThread, segmenter_bundles: tuple[Path, Path], where: Where
) -> None:
    with server.client() as client:
        found = client.find(bright_things(), where)
    expected = Segmenter.load(*segmenter_bundles).segment(bright_things(), where.clicks, where.box)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.score == expected.score
    assert (found.score is None) == (where.clicks is where.box)


def test_a_reference_is_cut_out(server: ServerThread, segmenter_bundles: tuple[Path, Path]) -> None:
    segmenter, sampling = Segmenter.load(*segmenter_bundles), Sampling(steps=1)
    with server.client() as client:
        for how, mask in (
            ({"reference_clicks": CLICKS}, segmenter.mask(bright_things(), CLICKS)),
            ({"reference_mask": "auto"}, segmenter.mask(bright_things())),
        ):
            asked, expected = (
                client.composite(SCENE, Placement(SHELF, box=BOX, **given), seed=3, sampling=sampling)
                for given in (how, {"reference_mask": mask})
            )
            assert asked.tobytes() == expected.tobytes()


def test_the_model_says_what_it_can_find(server: ServerThread, bare_server: ServerThread) -> None:
    for running, can in ((server, True), (bare_server, False)):
        with running.client() as client:
            info = client.model_info()
            assert (info.automatic_masks, info.clicks) == (can, can)


def test_what_is_missing_is_named(bare_server: ServerThread) -> None:
    with bare_server.client() as client:
        for where, option in ((Where(clicks=CLICKS), "like SAM, with"), (Where(), "transparency, or")):
            with pytest.raises(MissingModelError, match=f"{option} --segmenter BUNDLE"):
                client.segment(SCENE, where)
        with pytest.raises(MissingModelError, match="--segmenter BUNDLE") as caught:
            client.composite(SCENE, Placement(SHELF, box=BOX, reference_clicks=CLICKS))
        assert caught.value.field == "placements[0].reference_clicks"
    placement = pb.Placement(reference=OBJECT, reference_clicks=[pb.Point(x=3, y=3)], box=pb.Box(x1=9, y1=9))
    with grpc.insecure_channel(bare_server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        error = refusal(stub.Composite, message(placements=[placement]))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("request_", "field", "reason"),
    [
        (pb.SegmentRequest(), "picture", "the picture is empty"),
        (pb.SegmentRequest(picture=b"GIF89a"), "picture", "the picture is"),
        (
            pb.SegmentRequest(picture=SHELF, where=pb.Where(mask=SHELF)),
            "where",
            "a mask already selects the object",
        ),
        (
            pb.SegmentRequest(picture=SHELF, where=pb.Where(clicks=pb.Clicks(points=[pb.Point(x=500, y=2)]))),
            "where.clicks",
            "the click 500,2 lies outside the picture",
        ),
        (
            pb.SegmentRequest(picture=SHELF, where=pb.Where(clicks=pb.Clicks())),
            "where.clicks",
            "no click is on the object",
        ),
    ],
)
def test_refusals(server: ServerThread, request_: pb.SegmentRequest, field: str, reason: str) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        error = refusal(stub.Segment, request_)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"{field}: ")
    assert reason in error.details()


def test_a_mask_beside_an_automatic_one_is_refused(server: ServerThread) -> None:
    placement = pb.Placement(
        reference=OBJECT, reference_mask=OBJECT, automatic_mask=True, box=pb.Box(x1=9, y1=9)
    )
    with grpc.insecure_channel(server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        error = refusal(stub.Composite, message(placements=[placement]))
    assert error.details() == (
        "placements[0].automatic_mask: automatic_mask cannot be used with a reference mask: leave one out"
    )


def test_the_queue_is_empty_after_it(server: ServerThread) -> None:
    with server.client() as client, pytest.raises(InputError):
        client.segment(bright_things(), Where(clicks=[(500, 2)]), timeout=PATIENCE)
    assert not server.batcher.tickets
