"""The running batch on the smallest network: who is in it, what comes out, what is heard on the way.

Steps are held where a test needs to know who is in the batch.
"""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime.compositor import Compositor
from runtime.request import Placement, Request, Sampling
from runtime.server.events import DeadlineError, Failed, Finished, Preview, Queued, StepDone
from runtime.server.ticket import Ticket
from runtime.server.workers import Workers
from runtime.systems.anydoor import CONTROL, ID_ENCODER
from tests.support.scheduling import PLACEMENT, TOLERANCE, Bench, request
from tests.support.serving import BOX, PATIENCE, SCENE, object_array, scene_array, wait_until

# --- a result does not depend on who shared the batch -----------------------------------------------------


def test_pictures_are_those_of_the_compositor(bench: Bench, alone: Compositor) -> None:
    second = Placement(object_array(3), box=(30, 2, 78, 40), mode="shape")
    requests = [
        Request(SCENE, [PLACEMENT], 1, Sampling(steps=5)),
        Request(SCENE, [PLACEMENT], 2, Sampling(steps=3, guidance_scale=1.0), num_images=2),
        Request(scene_array(9), [PLACEMENT], 3, Sampling(steps=4, eta=0.7)),
        Request(SCENE, [PLACEMENT, second], 4, Sampling(steps=3, control_scale=0.5), num_images=3),
        Request(SCENE, [PLACEMENT], 6, Sampling(steps=5, sampler="dpm_solver_2m", map_steps=2), num_images=2),
        Request(
            SCENE, [PLACEMENT], 8, Sampling(steps=4, sampler="dpm_solver_2m", guidance_interval=(300, 800))
        ),
        Request(
            scene_array(5, 50, 90), [Placement(object_array(4), box=(-5, 60, 20, 99))], 5, Sampling(steps=2)
        ),
    ]
    bench.engine.hold()
    followers = [bench.submit(each) for each in requests]
    wait_until(lambda: all(follower.ticket.job for follower in followers))
    bench.engine.release()
    for each, follower in zip(requests, followers):
        pictures, expected = follower.pictures(), alone.run(each)
        assert len(pictures) == len(expected)
        for picture, result in zip(pictures, expected):
            assert np.abs(picture.astype(int) - result.image).max() <= TOLERANCE
    shared = [timesteps for timesteps in bench.engine.steps if len(set(timesteps)) > 1]
    assert shared, "no call was shared by samples at different steps"


def test_result_tells_seeds_regions_and_stages(bench: Bench, alone: Compositor) -> None:
    end = bench.submit(request(seed=40, num_images=2)).end()
    assert isinstance(end, Finished)
    assert [image.seed for image in end.images] == [40, 41]
    (expected,) = alone.run(request(seed=40))
    assert end.images[0].regions == expected.regions
    stages = {"read", "prepare", "queue", "condition", "sample", "decode", "paste", "encode"}
    assert end.seconds.keys() == stages


# --- joining and leaving ----------------------------------------------------------------------------------


def test_a_request_joins_between_two_steps(bench: Bench) -> None:
    bench.engine.hold()
    first = bench.submit(request(steps=6))
    bench.engine.wait_for_steps(1)
    bench.engine.allow(2)
    bench.engine.wait_for_steps(3)  # the third has begun and is held
    second = bench.submit(request(steps=2, seed=8))
    wait_until(lambda: second.ticket.waiting)
    bench.engine.release()
    assert second.pictures()
    assert first.pictures()
    assert [len(samples) for samples in bench.engine.steps] == [1, 1, 1, 2, 2, 1]


def test_pictures_that_are_drawn_have_left_the_batch(bench: Bench) -> None:
    """They no longer count when others of their client want to join."""
    follower = bench.submit(request(steps=1, num_images=2))
    assert len(follower.pictures()) == 2
    assert (follower.ticket.starts, follower.ticket.running) == (2, 0)


def test_static_batching_waits_for_an_empty_batch(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, batching="static") as bench:
        bench.engine.hold()
        first = bench.submit(request(steps=3))
        bench.engine.wait_for_steps(1)
        second = bench.submit(request(steps=2, seed=8))
        wait_until(lambda: second.ticket.waiting)
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
        wait_until(lambda: waiting.ticket.waiting)
        bench.batcher.cancel(cancelled.ticket)
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
        wait_until(lambda: waiting.ticket.waiting)
        late.ticket.deadline = time.monotonic()
        bench.engine.release()
        assert isinstance(late.error(), DeadlineError)
        assert waiting.pictures()
        assert len(bench.engine.steps) == 3


def test_deadline_ends_a_waiting_request(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1) as bench:
        bench.engine.hold()
        running = bench.submit(request(steps=3))
        bench.engine.wait_for_steps(1)
        deadline = time.monotonic() + 0.1
        late = bench.submit(request(steps=2), deadline=deadline)
        wait_until(lambda: time.monotonic() >= deadline)
        bench.engine.release()
        assert isinstance(late.error(), DeadlineError)
        assert running.pictures()


# --- events -----------------------------------------------------------------------------------------------


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


def test_a_preview_that_is_late_comes_before_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    preview = Workers.preview

    def preview_after_the_picture(workers: object, ticket: Ticket, *arguments: Any) -> None:
        wait_until(lambda: ticket.encoded)
        preview(workers, ticket, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Workers, "preview", preview_after_the_picture)
    follower = bench.submit(request(steps=4), preview_every=2)
    assert isinstance(follower.end(), Finished)
    assert [type(event) for event in follower.events[-2:]] == [Preview, Finished]


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
            kept.append(bench.compositor.system.kept_bytes())
        assert 0 < max(kept) <= 200_000
