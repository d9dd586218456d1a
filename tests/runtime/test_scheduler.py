"""The scheduler on the smallest network. Steps are held where a test needs to know who is in the batch."""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from serving import BOX, OBJECT, PATIENCE, SCENE, HeldEngine, held_compositor, object_array, scene_array

from engines.graphs import CONTROL, DECODE, ID_ENCODER
from runtime.compositor import Compositor
from runtime.errors import InputError
from runtime.order import (
    DeadlineError,
    Event,
    Failed,
    Finished,
    Order,
    Preview,
    Queued,
    QueueFullError,
    ShuttingDownError,
    StepDone,
    Ticket,
)
from runtime.request import Placement, Request, Sampling
from runtime.scheduler import Scheduler

PLACEMENT = Placement(OBJECT, box=BOX)
TOLERANCE = 1
"""Grey levels by which sharing a batch may change a picture: rounding, as sums are taken in another order."""


class Follower:
    """Submits an order and keeps what is heard of it."""

    def __init__(self, scheduler: Scheduler, request: Request, **order: Any) -> None:
        self._events: queue.Queue[Event] = queue.Queue()
        self.events: list[Event] = []
        self.ticket: Ticket = scheduler.submit(request, Order(self._events.put, **order))

    def end(self) -> Event:
        """Waits for the last event."""
        while not self.events or not isinstance(self.events[-1], Finished | Failed):
            self.events.append(self._events.get(timeout=PATIENCE))
        return self.events[-1]

    def pictures(self) -> list[NDArray[np.uint8]]:
        end = self.end()
        assert isinstance(end, Finished), end
        return [np.asarray(Image.open(io.BytesIO(image.image))) for image in end.images]

    def error(self) -> BaseException:
        end = self.end()
        assert isinstance(end, Failed), end
        return end.error


def request(steps: int = 3, seed: int = 7, placement: Placement = PLACEMENT, **fields: Any) -> Request:
    return Request(SCENE, [placement], seed, Sampling(steps=steps), **fields)


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Compositor:
    """Makes the pictures that the scheduler's are compared with."""
    return held_compositor(tiny_bundle)[0]


class Bench:
    """A scheduler with an engine that can be held."""

    def __init__(self, bundle: Path, cache_bytes: int | None = None, **settings: Any) -> None:
        self.compositor, self.engine = held_compositor(bundle, cache_bytes)
        self.scheduler = Scheduler(self.compositor, **settings)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self.engine.release()
        self.scheduler.drain(0)

    def submit(self, *arguments: Any, **order: Any) -> Follower:
        return Follower(self.scheduler, *arguments, **order)

    def wait_until(self, condition: Any) -> None:
        """Polls, because readiness of a request is nobody's event."""
        give_up = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < give_up
            time.sleep(0.002)


@pytest.fixture
def bench(tiny_bundle: Path) -> Iterator[Bench]:
    with Bench(tiny_bundle) as bench:
        yield bench


# --- a result does not depend on who shared the batch -----------------------------------------------------


def test_pictures_are_those_of_the_compositor(bench: Bench, alone: Compositor) -> None:
    second = Placement(object_array(3), box=(30, 2, 78, 40), mode="shape")
    requests = [
        Request(SCENE, [PLACEMENT], 1, Sampling(steps=5)),
        Request(SCENE, [PLACEMENT], 2, Sampling(steps=3, guidance=1.0), num_images=2),
        Request(scene_array(9), [PLACEMENT], 3, Sampling(steps=4, eta=0.7)),
        Request(SCENE, [PLACEMENT, second], 4, Sampling(steps=3, strength=0.5), num_images=3),
        Request(
            scene_array(5, 50, 90), [Placement(object_array(4), box=(-5, 60, 20, 99))], 5, Sampling(steps=2)
        ),
    ]
    bench.engine.hold()
    followers = [bench.submit(each) for each in requests]
    bench.wait_until(lambda: all(follower.ticket.job for follower in followers))
    bench.engine.release()
    for each, follower in zip(requests, followers):
        pictures, expected = follower.pictures(), alone.run(**vars(each))
        assert len(pictures) == len(expected)
        for picture, result in zip(pictures, expected):
            assert np.abs(picture.astype(int) - result.image).max() <= TOLERANCE
    shared = [timesteps for timesteps in bench.engine.steps if len(set(timesteps)) > 1]
    assert shared, "no call was shared by samples at different steps"


def test_result_tells_seeds_regions_and_stages(bench: Bench, alone: Compositor) -> None:
    end = bench.submit(request(seed=40, num_images=2)).end()
    assert isinstance(end, Finished)
    assert [image.seed for image in end.images] == [40, 41]
    (expected,) = alone.run(**vars(request(seed=40)))
    assert end.images[0].regions == expected.regions
    stages = {"read", "prepare", "queue", ID_ENCODER, "sample", DECODE, "paste", "encode"}
    assert end.seconds.keys() == stages


# --- joining and leaving ----------------------------------------------------------------------------------


def test_a_request_joins_between_two_steps(bench: Bench) -> None:
    bench.engine.hold()
    first = bench.submit(request(steps=6))
    bench.engine.wait_for_steps(1)
    bench.engine.allow(2)
    bench.engine.wait_for_steps(3)  # the third has begun and is held
    second = bench.submit(request(steps=2, seed=8))
    bench.wait_until(lambda: second.ticket.waiting)
    bench.engine.release()
    assert second.pictures()
    assert first.pictures()
    assert [len(samples) for samples in bench.engine.steps] == [1, 1, 1, 2, 2, 1]


def test_static_batching_waits_for_an_empty_batch(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, batching="static") as bench:
        bench.engine.hold()
        first = bench.submit(request(steps=3))
        bench.engine.wait_for_steps(1)
        second = bench.submit(request(steps=2, seed=8))
        bench.wait_until(lambda: second.ticket.waiting)
        bench.engine.release()
        assert first.pictures()
        assert second.pictures()
        assert [len(samples) for samples in bench.engine.steps] == [1] * 5


def test_cancelling_frees_the_slot_within_a_step(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1) as bench:
        bench.engine.hold()
        cancelled = bench.submit(request(steps=50))
        bench.engine.wait_for_steps(1)
        waiting = bench.submit(request(steps=2, seed=8))
        bench.wait_until(lambda: waiting.ticket.waiting)
        bench.scheduler.cancel(cancelled.ticket)
        bench.engine.release()
        assert waiting.pictures()
        # the step that had begun, and the two of the request that waited
        assert len(bench.engine.steps) == 3
        assert not any(isinstance(event, Finished | Failed) for event in cancelled.events)


def test_deadline_ends_a_running_request_within_a_step(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1) as bench:
        bench.engine.hold()
        late = bench.submit(request(steps=50), deadline=time.monotonic() + PATIENCE)
        bench.engine.wait_for_steps(1)
        waiting = bench.submit(request(steps=2, seed=8))
        bench.wait_until(lambda: waiting.ticket.waiting)
        late.ticket.order = replace(late.ticket.order, deadline=time.monotonic())
        bench.engine.release()
        assert isinstance(late.error(), DeadlineError)
        assert waiting.pictures()
        assert len(bench.engine.steps) == 3


def test_deadline_ends_a_waiting_request(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1) as bench:
        bench.engine.hold()
        running = bench.submit(request(steps=3))
        bench.engine.wait_for_steps(1)
        late = bench.submit(request(steps=2), deadline=time.monotonic() + 0.1)
        bench.wait_until(lambda: late.ticket.late)
        bench.engine.release()
        assert isinstance(late.error(), DeadlineError)
        assert running.pictures()


# --- the queue --------------------------------------------------------------------------------------------


def test_full_queue_refuses_with_a_hint(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1, queue=2) as bench:
        bench.engine.hold()
        accepted = [bench.submit(request(steps=2, seed=seed)) for seed in range(3)]
        with pytest.raises(QueueFullError, match="try again in") as refusal:
            bench.submit(request())
        assert 0 < refusal.value.retry_seconds <= 60
        bench.engine.release()
        assert all(follower.pictures() for follower in accepted)
        assert bench.submit(request(steps=1)).pictures()


def test_clients_take_turns(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1) as bench:
        bench.engine.hold()
        greedy = [bench.submit(request(steps=1, seed=seed), client="greedy") for seed in range(3)]
        bench.engine.wait_for_steps(1)
        modest = bench.submit(request(steps=1, seed=9), client="modest")
        bench.wait_until(lambda: all(f.ticket.job for f in [*greedy, modest]))
        finished: list[str] = []
        threads = [
            threading.Thread(target=lambda f=f, n=n: (f.end(), finished.append(n)))  # type: ignore[misc]
            for n, f in [
                ("greedy 0", greedy[0]),
                ("greedy 1", greedy[1]),
                ("greedy 2", greedy[2]),
                ("modest", modest),
            ]
        ]
        for thread in threads:
            thread.start()
        for count in range(1, 5):
            bench.engine.wait_for_steps(count)
            bench.engine.allow(1)
            bench.wait_until(lambda count=count: len(finished) == count)
        assert finished == ["greedy 0", "modest", "greedy 1", "greedy 2"]


def test_position_in_the_queue_only_falls(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1) as bench:
        bench.engine.hold()
        followers = [bench.submit(request(steps=1, seed=seed)) for seed in range(4)]
        bench.engine.release()
        for follower in followers:
            follower.end()
        last = [event.position for event in followers[-1].events if isinstance(event, Queued)]
        assert last == sorted(last, reverse=True)
        assert len(set(last)) == len(last)
        assert last[-1] == 0
        assert last[0] >= 2


# --- news -------------------------------------------------------------------------------------------------


def test_events_come_in_order(bench: Bench) -> None:
    follower = bench.submit(request(steps=5, num_images=2), preview_every=2)
    follower.end()
    kinds = [type(event) for event in follower.events if not isinstance(event, Preview)]
    assert kinds == sorted(kinds, key=[Queued, StepDone, Finished].index)
    steps = [event for event in follower.events if isinstance(event, StepDone)]
    assert {step.total for step in steps} == {10}
    assert [step.done for step in steps] == sorted({step.done for step in steps})
    assert steps[-1].done == 10


def test_previews_approach_the_picture(bench: Bench) -> None:
    follower = bench.submit(request(steps=6), preview_every=2)
    (picture,) = follower.pictures()
    previews = [event for event in follower.events if isinstance(event, Preview)]
    assert [preview.image_index for preview in previews] == [0, 0]
    decoded = [np.asarray(Image.open(io.BytesIO(preview.image))) for preview in previews]
    distances = [np.abs(each.astype(int) - picture).mean() for each in decoded]
    assert distances[1] < distances[0]


# --- failures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [ID_ENCODER, CONTROL, "denoise", DECODE])
def test_a_failure_does_not_hurt_the_batch_mates(bench: Bench, alone: Compositor, graph: str) -> None:
    """A call fails that a certain request has a part in; the others get what they would have got alone."""
    marked = Placement(object_array(77), box=(2, 2, 30, 60))
    bench.engine.hold()
    good = [bench.submit(request(steps=4, seed=seed)) for seed in (1, 2)]
    bench.engine.wait_for_steps(1)
    bench.engine.fails = fault(bench.engine, alone, marked, graph)
    bad = bench.submit(Request(SCENE, [marked], 3, Sampling(steps=3, guidance=9.5)))
    bench.wait_until(lambda: bad.ticket.waiting)
    bench.engine.release()
    assert "caught fire" in str(bad.error())
    for seed, follower in zip((1, 2), good):
        (expected,) = alone.run(**vars(request(steps=4, seed=seed)))
        assert np.abs(follower.pictures()[0].astype(int) - expected.image).max() <= TOLERANCE
    assert bench.submit(request(steps=1)).pictures()


def fault(engine: HeldEngine, alone: Compositor, marked: Placement, graph: str) -> Any:
    """Recognises calls of a graph in which the request with the marked placement takes part."""
    job = alone.accept(Request(SCENE, [marked], 3, Sampling(steps=3, guidance=9.5)))
    job.canvases[0].prepare()
    hint = job.canvases[0].hint.hint
    reference = job.placements[0].reference.image.astype(np.float32).transpose(2, 0, 1)[None] / 255
    done = {"steps": 0, "decodes": 0}

    def fails(name: str, inputs: Any) -> bool:
        if name == "denoise" and 9.5 in inputs["guidance"]:
            done["steps"] += 1
        if name != graph:
            return False
        if graph == ID_ENCODER:
            return np.allclose(inputs["reference"], reference)
        if graph == CONTROL:
            return np.array_equal(inputs["hint"].reshape(hint.shape), hint)
        if graph == DECODE:
            # all three end together, and the marked one is the last when each is tried alone
            done["decodes"] += 1
            return done["steps"] == 3 and done["decodes"] in (1, 4)
        return 9.5 in inputs["guidance"]

    return fails


def test_input_errors_name_the_field(bench: Bench) -> None:
    error = bench.submit(request(placement=Placement(OBJECT, box=(500, 500, 600, 600)))).error()
    assert isinstance(error, InputError)
    assert error.field == "placements[0].box"


# --- detail maps ------------------------------------------------------------------------------------------


def test_requests_for_one_placement_share_their_detail_maps(bench: Bench) -> None:
    assert bench.submit(request(steps=3, seed=1)).pictures()
    assert bench.submit(request(steps=3, seed=2, num_images=2)).pictures()
    assert bench.engine.count(CONTROL) == 3
    assert bench.engine.count(ID_ENCODER) == 1


def test_detail_maps_keep_to_their_budget(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, cache_bytes=200_000) as bench:
        kept = []
        for seed in range(5):
            assert bench.submit(request(placement=Placement(object_array(seed), box=BOX))).pictures()
            kept.append(bench.compositor.cache.nbytes)
        assert 0 < max(kept) <= 200_000


# --- the end ----------------------------------------------------------------------------------------------


def test_draining_finishes_what_was_accepted(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=2) as bench:
        bench.engine.hold()
        followers = [bench.submit(request(steps=2, seed=seed)) for seed in range(5)]
        drained: list[bool] = []
        thread = threading.Thread(target=lambda: drained.append(bench.scheduler.drain(PATIENCE)))
        thread.start()

        def refuses() -> bool:
            try:
                bench.scheduler.cancel(bench.scheduler.submit(request(), Order(lambda event: None)))
            except ShuttingDownError:
                return True
            return False

        bench.wait_until(refuses)
        bench.engine.release()
        thread.join(PATIENCE)
        assert drained == [True]
        assert all(len(follower.pictures()) == 1 for follower in followers)


def test_draining_refuses_what_it_cannot_finish(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1) as bench:
        bench.engine.hold()
        followers = [bench.submit(request(steps=50, seed=seed)) for seed in range(2)]
        bench.engine.wait_for_steps(1)
        threading.Timer(0.2, bench.engine.release).start()
        assert bench.scheduler.drain(0.05) is False
        assert all(isinstance(follower.error(), ShuttingDownError) for follower in followers)
