"""Deadlines that cannot be met: refused at once, and never wrongly."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.rpc.compositor_pb2_grpc import CompositorServiceStub
from runtime.server import deadlines
from runtime.server.deadlines import FastestCalls, Work
from runtime.server.events import UnmeetableDeadlineError
from tests.support.scheduling import Bench, request
from tests.support.serving import PATIENCE, HeldEngine, ServerThread, message, refusal, wait_until

FASTEST = {True: 2.0, False: 1.0}
"""Seconds of a call of the step graph with guidance and without, when nothing disturbs."""

ENOUGH = deadlines._ENOUGH_CALLS


def seen(*kinds: bool, slower: Sequence[float] = ()) -> FastestCalls:
    """What is known when calls of some kinds, with guidance or without, were seen often enough."""
    fastest = FastestCalls()
    for guided in kinds:
        for seconds in [*slower, *[0.0] * ENOUGH]:
            fastest.note(guided, FASTEST[guided] + seconds)
    return fastest


# --- the bound --------------------------------------------------------------------------------------------


def test_the_least_time_is_that_of_the_own_steps() -> None:
    both = seen(True, False)
    assert both.least_seconds(Work(guided=10, unguided=0, at_once=1)) == 20.0
    assert both.least_seconds(Work(guided=10, unguided=5, at_once=1)) == 25.0
    # eight pictures of five steps, four of them in a call
    assert both.least_seconds(Work(guided=40, unguided=0, at_once=4)) == 20.0


def test_nothing_is_known_of_a_kind_that_was_not_seen_often_enough() -> None:
    fastest, work = seen(False), Work(guided=10, unguided=5, at_once=1)
    for _ in range(ENOUGH - 1):
        fastest.note(True, 2.0)
        assert fastest.least_seconds(work) == 5.0
    fastest.note(True, 2.0)
    assert fastest.least_seconds(work) == 25.0
    assert FastestCalls().least_seconds(work) == 0.0
    assert seen(True).least_seconds(Work(guided=0, unguided=5, at_once=1)) == 0.0


def test_a_step_without_guidance_may_be_as_fast_as_one_with_it() -> None:
    """They may share a call; what is slower than the fastest changes nothing."""
    fastest = seen(True)
    for seconds in [3.0] * ENOUGH:
        fastest.note(False, seconds)
        fastest.note(True, 2 * seconds)
    assert fastest.least_seconds(Work(guided=10, unguided=0, at_once=1)) == 20.0
    assert fastest.least_seconds(Work(guided=0, unguided=10, at_once=1)) == 20.0


@dataclass(eq=False)
class Wish:
    """A request of a simulated server."""

    pictures: int
    guided: list[bool]
    """For every step of a picture, whether it has guidance."""
    deadline: float
    given_up: float
    """When its caller gives up."""
    started: bool = False
    refused: bool = False
    steps_done: int = 0

    def work(self, slots: int) -> Work:
        guided = self.pictures * sum(self.guided)
        return Work(guided, self.pictures * len(self.guided) - guided, min(self.pictures, slots))


@dataclass
class Schedule:
    """Continuous batching as the server does it, first come, first served."""

    slots: int
    wishes: list[Wish]
    delays: list[float]
    """What steps take longer than the fastest of their kind, in turn."""
    fastest: FastestCalls
    now: float = 0.0
    running: list[tuple[Wish, list[bool]]] = field(default_factory=list)
    """Pictures in the batch, each with the steps that it still takes."""

    def finish(self, watched: Wish) -> float:
        """When the last picture of a request has taken its last step, whether or not it is refused."""
        waiting = deque((wish, list(wish.guided)) for wish in self.wishes for _ in range(wish.pictures))
        number = 0
        while watched.steps_done < watched.pictures * len(watched.guided):
            for wish in self.wishes:
                least = self.fastest.least_seconds(wish.work(self.slots))
                if not wish.started and least > wish.deadline - self.now:
                    wish.refused = True
            gone = {w for w in self.wishes if w is not watched and (w.refused or w.given_up <= self.now)}
            self.running = [of for of in self.running if of[0] not in gone]
            while waiting and len(self.running) < self.slots:
                of = waiting.popleft()
                if of[0] not in gone:
                    of[0].started = True
                    self.running.append(of)
            guided = any(steps[0] for _, steps in self.running)
            self.now += FASTEST[guided] + self.delays[number % len(self.delays)]
            number += 1
            for wish, steps in self.running:
                steps.pop(0)
                wish.steps_done += 1
            self.running = [of for of in self.running if of[1]]
        return self.now


seconds = st.floats(0, 60)
wishes = st.builds(
    Wish,
    pictures=st.integers(1, 5),
    guided=st.lists(st.booleans(), min_size=1, max_size=10),
    deadline=seconds,
    given_up=seconds,
)


@given(
    slots=st.integers(1, 4),
    wishes=st.lists(wishes, min_size=1, max_size=6),
    watched=st.integers(0, 5),
    delays=st.lists(st.sampled_from([0.0, 0.0, 0.5, 7.0]), min_size=1, max_size=8),
    kinds=st.sets(st.booleans()),
)
def test_whoever_is_refused_would_have_been_late(
    slots: int, wishes: list[Wish], watched: int, delays: list[float], kinds: set[bool]
) -> None:
    """Others are refused, give up and are delayed; the one that is watched stays, to see how it ends."""
    wish = wishes[watched % len(wishes)]
    end = Schedule(slots, wishes, delays, seen(*kinds, slower=delays)).finish(wish)
    if wish.refused:
        assert end > wish.deadline


def test_a_request_that_could_be_in_time_with_some_luck_is_not_refused() -> None:
    """It is behind a long one, whose caller gives up."""
    long = Wish(1, [True] * 50, deadline=1000.0, given_up=3.0)
    lucky = Wish(1, [True] * 5, deadline=14.0, given_up=1000.0)
    end = Schedule(1, [long, lucky], [0.0], seen(True)).finish(lucky)
    assert (lucky.refused, end) == (False, 14.0)


# --- in the server ----------------------------------------------------------------------------------------


def slow(engine: HeldEngine) -> None:
    """Makes a step take a fiftieth of a second at least."""

    def fails(graph: str, inputs: object) -> bool:
        time.sleep(0.02 if graph == "denoise" else 0.0)
        return False

    engine.fails = fails


@pytest.fixture
def two_calls_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_ENOUGH_CALLS", 2)


@pytest.mark.usefixtures("two_calls_are_enough")
def test_a_hopeless_request_is_refused_when_it_comes(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle) as bench:
        slow(bench.engine)
        # nothing is known yet
        first = bench.submit(request(steps=3), deadline=time.monotonic() + PATIENCE)
        assert first.pictures()
        # 900 steps of a fiftieth of a second
        with pytest.raises(UnmeetableDeadlineError, match=r"are left, .* need at least"):
            bench.submit(request(steps=900), deadline=time.monotonic() + 10)
        assert bench.batcher.tickets == []
        assert bench.submit(request(steps=2), deadline=time.monotonic() + PATIENCE).pictures()


@pytest.mark.usefixtures("two_calls_are_enough")
def test_a_request_that_became_hopeless_leaves_the_queue(tiny_bundle: Path) -> None:
    with Bench(tiny_bundle, max_batch=1) as bench:
        slow(bench.engine)
        assert bench.submit(request(steps=3)).pictures()
        bench.engine.hold()
        running = bench.submit(request(steps=3))
        bench.engine.wait_for_steps(4)
        waiting = bench.submit(request(steps=900), deadline=time.monotonic() + 10 * PATIENCE)
        wait_until(lambda: waiting.ticket.waiting)
        # as if it had waited nearly that long
        waiting.ticket.deadline = time.monotonic() + 10
        bench.engine.allow(1)
        assert isinstance(waiting.error(), UnmeetableDeadlineError)
        assert waiting.ticket.starts == 0
        bench.engine.release()
        assert running.pictures()


@pytest.mark.usefixtures("two_calls_are_enough")
def test_callers_are_told_and_metrics_count(tiny_bundle: Path) -> None:
    with ServerThread(tiny_bundle) as server, grpc.insecure_channel(server.address) as channel:
        stub = CompositorServiceStub(channel)  # type: ignore[no-untyped-call]
        slow(server.engine)
        assert stub.Composite(message(steps=3), timeout=PATIENCE).images
        steps = len(server.engine.steps)
        error = refusal(stub.Composite, message(steps=100, num_images=8), timeout=1.5)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the deadline cannot be met" in error.details()
        assert len(server.engine.steps) == steps
        counted = server.server.metrics.registry.get_sample_value
        assert counted("anydoor_deadline_refusals_total", {"model": tiny_bundle.name}) == 1
