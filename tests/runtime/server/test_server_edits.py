"""A server edits scenes as `Editor` does, tells how far it is, and can be stopped in each phase."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from runtime.edits import Editor
from runtime.edits.fillers import GUESS
from runtime.errors import InputError, MissingModelError
from runtime.request import (
    Action,
    Edit,
    Fill,
    Move,
    Placement,
    Remove,
    Reshape,
    Sampling,
    Swap,
    SwapPlaces,
    TryOn,
    Where,
)
from runtime.rpc import compositor_pb2 as pb
from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server.events import Preview, Queued, StepDone
from tests.support.segmenters import bright_things
from tests.support.serving import OBJECT, ServerThread, refusal, wait_until

SCENE = np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)
CUP, VASE, TALL = np.zeros((3, 48, 96), bool)
CUP[12:30, 10:28] = VASE[8:40, 60:70] = TALL[4:34, 12:26] = True
TO = (40, 10, 80, 40)


@pytest.fixture(scope="module")
def server(example_bundle: Path, segmenter_bundles: tuple[Path, Path]) -> Iterator[ServerThread]:
    with ServerThread(example_bundle, segmenter=tuple(map(str, segmenter_bundles))) as running:
        yield running


def edit(action: Action, steps: int = 1, **others: object) -> Edit:
    sampling = Sampling() if isinstance(action, Remove) else Sampling(steps=steps)
    given = {"where": Where(mask=CUP), "seed": 3, "sampling": sampling, **others}
    return Edit(SCENE, action=action, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "action",
    [
        Remove(),
        Move(TO),
        Reshape(TALL),
        Swap(Placement(OBJECT)),
        SwapPlaces(Where(mask=VASE)),
        TryOn(Placement(OBJECT)),
    ],
    ids=["remove", "move", "reshape", "swap", "swap-places", "try-on"],
)
def test_the_picture_is_that_of_the_editor(server: ServerThread, action: Action) -> None:
    with server.client() as client:
        (answer,) = client.edit(edit(action))
    (expected,) = Editor(server.compositor).run(edit(action))
    np.testing.assert_array_equal(answer.image, expected.image)
    assert (answer.regions, answer.seed, answer.filler) == (expected.regions, 3, expected.filler)


def test_events_come_on_the_way(server: ServerThread) -> None:
    with server.client() as client:
        events = list(client.stream_edit(edit(Move(TO), steps=3), preview_every=2))
    assert isinstance(events[0], Queued)
    assert [event for event in events if isinstance(event, StepDone)] == [StepDone(i, 3) for i in (1, 2, 3)]
    assert sum(isinstance(event, Preview) for event in events) == 1
    assert isinstance(events[-1], list)
    assert events[-1][0].filler == GUESS
    assert {"read", "segment", "fill", "sample"} <= events[-1][0].seconds.keys()


def test_an_edit_that_is_left_ends(server: ServerThread) -> None:
    server.engine.hold()
    with server.client() as client:
        for event in client.stream_edit(edit(Move(TO), steps=5)):
            server.engine.allow(1)
            if isinstance(event, StepDone):
                break
    wait_until(lambda: not server.batcher.tickets)
    server.engine.release()


def test_the_object_is_found(server: ServerThread) -> None:
    with server.client() as client:
        asked = Edit(bright_things(), Where(clicks=[(20, 20)]), Remove())
        (answer,) = client.edit(asked)
    assert answer.image[24, 24].max() < 40
    assert answer.image[24, 70].min() == 160


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (edit(Move((200, 0, 240, 40))), "to"),
        (edit(Move(TO), where=Where(clicks=[(500, 3)])), "where"),
        (edit(Move(TO), where=Where(mask=np.ones((9, 9), bool))), "where.mask"),
        (edit(Reshape(np.ones((9, 9), bool))), "reshape.to"),
        (edit(SwapPlaces(Where(mask=CUP))), "other"),
        (edit(Swap(Placement(SCENE))), "placements[0].reference_mask"),
        (edit(Move(TO), num_images=100), "num_images"),
    ],
)
def test_refusals(server: ServerThread, asked: Edit, field: str) -> None:
    with server.client() as client, pytest.raises(InputError) as caught:
        client.edit(asked)
    assert caught.value.field in (field, f"request.{field}")


def test_what_is_missing_is_named(server: ServerThread) -> None:
    with server.client() as client, pytest.raises(MissingModelError, match="--filler BUNDLE"):
        client.edit(edit(Remove(), fill=Fill("a desk")))
    with grpc.insecure_channel(server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        error = refusal(stub.Edit, pb.EditRequest(scene=OBJECT))
    assert error.details() == "action: nothing says what is done to the object: set one of the fields"
