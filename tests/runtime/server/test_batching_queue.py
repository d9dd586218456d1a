"""Requests that wait for a slot: refused when too many, taken in fair order, finished at the end."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from runtime.server.events import Queued, QueueFullError, ShuttingDownError
from runtime.server.ticket import Ticket
from tests.support.scheduling import Bench, request
from tests.support.serving import PATIENCE, wait_until


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
        wait_until(lambda: all(f.ticket.job for f in [*greedy, modest]))
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
            wait_until(lambda count=count: len(finished) == count)
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


def test_draining_finishes_what_was_accepted(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=2) as bench:
        bench.engine.hold()
        followers = [bench.submit(request(steps=2, seed=seed)) for seed in range(5)]
        drained: list[bool] = []
        thread = threading.Thread(target=lambda: drained.append(bench.batcher.drain(PATIENCE)))
        thread.start()

        def refuses() -> bool:
            try:
                ticket = Ticket(lambda event: None)
                bench.batcher.submit(request(), ticket)
                bench.batcher.cancel(ticket)
            except ShuttingDownError:
                return True
            return False

        wait_until(refuses)
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
        assert bench.batcher.drain(0.05) is False
        assert all(isinstance(follower.error(), ShuttingDownError) for follower in followers)
