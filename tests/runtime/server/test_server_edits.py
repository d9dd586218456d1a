"""A server edits scenes as `Editor` does, tells how far it is, and can be stopped in each phase."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from runtime.client import AsyncClient
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
from runtime.server.edit_wire import message_from_edit
from runtime.server.events import Preview, Queued, StepDone
from tests.support.segmenters import bright_things
from tests.support.serving import OBJECT, PATIENCE, ServerThread, message, refusal, wait_until

SCENE = np.random.default_rng(0).integers(0, 256, (48, 96, 3), np.uint8)
CUP, VASE, TALL = np.zeros((3, 48, 96), bool)
CUP[12:30, 10:28] = VASE[8:40, 60:70] = TALL[4:34, 12:26] = True
TO = (40, 10, 80, 40)


@pytest.fixture(scope="module")
def server(example_bundle: Path, segmenter_bundles: tuple[Path, Path]) -> Iterator[ServerThread]:
    with ServerThread(example_bundle, segmenter=tuple(map(str, segmenter_bundles))) as running:
        yield running


def edit(action: Action, steps: int = 2, **others: object) -> Edit:
    sampling = Sampling() if isinstance(action, Remove) else Sampling(steps=steps)
    given = {"where": Where(mask=CUP), "seed": 3, "sampling": sampling, **others}
    return Edit(SCENE, action=action, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "action",
    [
        Remove(),
        Move(TO),
        Move(TO, strength=0.5),
        Reshape(TALL),
        Reshape(TALL, strength=0.5),
        Swap(Placement(OBJECT)),
        SwapPlaces(Where(mask=VASE)),
        SwapPlaces(Where(mask=VASE), strength=0.5),
        TryOn(Placement(OBJECT)),
    ],
    ids=[
        *("remove", "move", "move-with-strength", "reshape", "reshape-with-strength"),
        *("swap", "swap-places", "swap-places-with-strength", "try-on"),
    ],
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


def test_edits_of_one_client_do_not_keep_others_waiting(
    example_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole of a large scene takes seconds to be guessed; who leaves meanwhile leaves nothing to do."""
    guessing, go_on = threading.Event(), threading.Event()

    def guess(scene: Any, hole: Any) -> Any:
        guessing.set()
        assert go_on.wait(PATIENCE)
        return scene

    monkeypatch.setattr("runtime.edits.plan.guess_background", guess)
    (tmp_path / "tokens").write_text("open-sesame\nshazam\n")
    settings = {"tokens": str(tmp_path / "tokens"), "queue": 100}
    with (
        ServerThread(example_bundle, **settings) as server,
        grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel,
        grpc.insecure_channel(server.address) as other,
    ):
        stub: Any = CompositorServiceStub(channel)
        theirs = {"timeout": PATIENCE, "metadata": (("authorization", "Bearer shazam"),)}
        asked = message_from_edit(edit(Remove()))
        edits = [stub.Edit.future(asked, **theirs) for _ in range(20 + (os.cpu_count() or 1))]
        assert guessing.wait(PATIENCE)
        ours = (("authorization", "Bearer open-sesame"),)
        honest: Any = CompositorServiceStub(other)
        assert honest.Composite(message(steps=1), timeout=PATIENCE, metadata=ours).images
        assert not any(call.done() for call in edits)
        for call in edits:
            call.cancel()
        wait_until(lambda: not server.batcher.tickets)
        go_on.set()
        wait_until(lambda: not server.server.ledger.taken)


def test_an_edit_for_which_there_is_no_memory_is_refused(example_bundle: Path) -> None:
    """It takes what any request for as many pictures takes."""
    scene = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    asked = Edit(scene, Where(mask=np.arange(500 * 500).reshape(500, 500) < 50_000), Remove(), num_images=8)
    limits = {"max_message_bytes": 1 << 20, "request_memory": 12 << 20}
    with ServerThread(example_bundle, **limits) as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = CompositorServiceStub(channel)
        error = refusal(stub.Edit, message_from_edit(asked))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "memory" in error.details()
        assert len(stub.Edit(message_from_edit(replace(asked, num_images=1)), timeout=PATIENCE).images) == 1


def test_the_object_is_found(server: ServerThread) -> None:
    with server.client() as client:
        asked = Edit(bright_things(), Where(clicks=[(20, 20)]), Remove())
        (answer,) = client.edit(asked)
    assert answer.image[24, 24].max() < 40
    assert answer.image[24, 70].min() == 160


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (edit(Move((200, 0, 240, 40))), "move.to"),
        (edit(Move(TO), where=Where(clicks=[(500, 3)])), "where.clicks"),
        (edit(Move(TO), where=Where(mask=np.ones((9, 9), bool))), "where.mask"),
        (edit(Reshape(np.ones((9, 9), bool))), "reshape.to"),
        (edit(SwapPlaces(Where(mask=CUP))), "swap.other"),
        (edit(Move(TO, strength=2)), "move.strength"),
        (edit(Move(TO, refine=1000)), "move.refine"),
        (edit(Reshape(TALL, refine=1000)), "reshape.refine"),
        (edit(SwapPlaces(Where(mask=VASE), strength=0)), "swap.strength"),
        (edit(Swap(Placement(SCENE))), "swap.placement.reference_mask"),
        (edit(Move(TO), num_images=100), "num_images"),
    ],
)
def test_refusals(server: ServerThread, asked: Edit, field: str) -> None:
    with server.client() as client, pytest.raises(InputError) as caught:
        client.edit(asked)
    assert caught.value.field == field
    assert not str(caught.value).startswith("request.")


def test_what_is_missing_is_named(server: ServerThread) -> None:
    with server.client() as client, pytest.raises(MissingModelError, match="--filler BUNDLE"):
        client.edit(edit(Remove(), fill=Fill("a desk")))
    with grpc.insecure_channel(server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        error = refusal(stub.Edit, pb.EditRequest(scene=OBJECT))
    assert error.details() == "action: no edit is given: set one of the fields"


def test_an_asyncio_client_does_the_same(server: ServerThread) -> None:
    async def talk() -> Any:
        async with AsyncClient(server.address, timeout=PATIENCE) as client:
            (found,) = await client.edit(edit(Remove()))
            mask = await client.segment(bright_things(), Where(clicks=[(20, 20)]))
            server.engine.hold()
            try:
                async with aclosing(client.stream_edit(edit(Move(TO), steps=5))) as events:
                    assert isinstance(await anext(events), Queued)
                await asyncio.to_thread(wait_until, lambda: not server.batcher.tickets)
            finally:
                server.engine.release()
            return found.image, mask

    image, mask = asyncio.run(talk())
    np.testing.assert_array_equal(image, Editor(server.compositor).run(edit(Remove()))[0].image)
    with server.client() as client:
        np.testing.assert_array_equal(mask, client.segment(bright_things(), Where(clicks=[(20, 20)])))
