"""The batch on a simulated card: the host puts work into its stream and goes on, and results come later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.engine import Array, DeviceTensor
from runtime.compositor import Compositor
from runtime.server.batching import Batcher
from runtime.server.events import EngineLostError, Finished, StepDone
from tests.support.anydoor import DECODE, DENOISE
from tests.support.scheduling import PATIENCE, TOLERANCE, Follower, request
from tests.support.serving import HeldEngine, wait_until
from tests.support.simulated_engine import Simulation, fill


class Card:
    """A batcher on a simulated card; a test may delay what comes from the card."""

    def __init__(self, bundle: Bundle, is_held: bool = False, **settings: Any) -> None:
        simulation = Simulation(bundle)
        self.delay: Callable[[DeviceTensor], object] = lambda tensor: None
        """Called before a tensor is brought to the host."""
        self._to_host = simulation.engine.to_host
        simulation.engine.to_host = self._delayed_to_host  # type: ignore[method-assign]
        self.card = simulation.engine
        self.engine = HeldEngine(simulation.engine, DENOISE)
        if is_held:
            self.engine.hold()
        self.batcher = Batcher(Compositor(bundle, simulation.engine), **settings)

    def _delayed_to_host(self, tensor: DeviceTensor) -> Array:
        self.delay(tensor)
        return self._to_host(tensor)

    @property
    def begun(self) -> int:
        """Steps that were put into the stream."""
        return len(self.engine.steps)


@contextmanager
def card(path: Path, max_batch: int | None = None, of_bundle: int = 4, **settings: bool) -> Iterator[Card]:
    bundle = Bundle.open(path)
    manifest = replace(bundle.manifest, max_batch=of_bundle)
    made = Card(Bundle(path, manifest), max_batch=max_batch, **settings)
    try:
        yield made
    finally:
        made.engine.release()
        made.batcher.drain(0)


def is_picture(tensor: DeviceTensor) -> bool:
    return bool(tensor.dtype == np.uint8)


def is_latent(tensor: DeviceTensor) -> bool:
    return bool(tensor.dtype == np.float32 and len(tensor.shape) == 4)


def test_pictures_are_those_of_a_cpu(tiny_bundle: Path, alone: Compositor) -> None:
    with card(tiny_bundle) as made:
        followers = [Follower(made.batcher, request(steps, seed=steps)) for steps in (3, 4, 6)]
        for steps, follower in zip((3, 4, 6), followers):
            (expected,) = alone.run(request(steps, seed=steps))
            assert np.abs(follower.pictures()[0].astype(int) - expected.image).max() <= TOLERANCE


def test_the_batch_is_one_step_ahead_of_the_card_and_no_more(tiny_bundle: Path) -> None:
    """So the card need not wait, and whoever comes has two steps to wait for at the most."""
    steps, in_stream = 8, list[int]()
    with card(tiny_bundle) as made:

        def delay(tensor: DeviceTensor) -> None:
            if is_latent(tensor):
                # the card is slow: as much as may be is put into its stream before a result comes
                over = len(in_stream)
                wait_until(lambda: made.begun >= min(over + 2, steps))
                in_stream.append(made.begun - over)

        made.delay = delay
        follower = Follower(made.batcher, request(steps))
        end = follower.end()
    assert isinstance(end, Finished)
    assert in_stream == [2] * (steps - 1) + [1]
    told = [event.done for event in follower.events if isinstance(event, StepDone)]
    assert told == list(range(1, steps + 1))


def test_steps_go_on_while_a_picture_is_decoded(tiny_bundle: Path) -> None:
    """A short request is finished; two more steps of the long one are put in before its picture is there."""
    begun = []

    def pictures(is_slow: bool) -> list[NDArray[np.uint8]]:
        with card(tiny_bundle) as made:

            def delay(tensor: DeviceTensor) -> None:
                if is_slow and is_picture(tensor) and not begun:
                    wait_until(lambda: made.begun == 5)
                    begun.append(made.begun)

            made.delay = delay
            made.engine.hold()
            short = Follower(made.batcher, request(steps=3))
            made.engine.wait_for_steps(1)
            long = Follower(made.batcher, request(steps=6, seed=8))
            wait_until(lambda: long.ticket.waiting)
            made.engine.release()
            found = [follower.pictures()[0] for follower in (short, long)]
            assert [len(samples) for samples in made.engine.steps] == [1, 2, 2, 1, 1, 1, 1]
            return found

    np.testing.assert_array_equal(pictures(is_slow=True), pictures(is_slow=False))
    assert begun == [5]


def test_a_request_joins_while_another_is_sampled(tiny_bundle: Path) -> None:
    with card(tiny_bundle) as made:
        made.engine.hold()
        first = Follower(made.batcher, request(steps=9))
        made.engine.wait_for_steps(1)
        made.engine.allow(2)
        made.engine.wait_for_steps(3)  # the third is held
        second = Follower(made.batcher, request(steps=2, seed=8))
        wait_until(lambda: second.ticket.waiting)
        made.engine.release()
        assert second.pictures()
        assert first.pictures()
        assert [len(samples) for samples in made.engine.steps] == [1, 1, 1, 2, 2, 1, 1, 1, 1]


def test_a_picture_that_never_comes_fails_alone(tiny_bundle: Path) -> None:
    with card(tiny_bundle) as made:

        def delay(tensor: DeviceTensor) -> None:
            if is_picture(tensor):
                made.delay = lambda tensor: None
                raise RuntimeError("the picture got lost")

        made.delay = delay
        assert "got lost" in str(Follower(made.batcher, request(steps=2)).error())
        assert Follower(made.batcher, request(steps=2)).pictures()


def test_a_card_whose_memory_is_full_is_not_lost(tiny_bundle: Path) -> None:
    """Nothing gets to the card when a request has failed, and everything when others gave memory back."""
    with card(tiny_bundle) as made:
        kept: list[Any] = []

        def delay(tensor: DeviceTensor) -> None:
            if is_picture(tensor):
                made.delay = lambda tensor: None
                kept.extend(fill(made.card))
                raise RuntimeError("the picture got lost")

        made.delay = delay
        assert "got lost" in str(Follower(made.batcher, request(steps=2)).error())
        kept.clear()
        assert Follower(made.batcher, request(steps=2)).pictures()


@pytest.mark.parametrize("what", [is_latent, is_picture])
def test_a_batch_whose_request_left_is_busy_until_the_card_has_answered(
    tiny_bundle: Path, what: Callable[[DeviceTensor], bool]
) -> None:
    """Who frees the card's memory waits for that, and who ends the process does not."""
    asked, answered = threading.Event(), threading.Event()
    with card(tiny_bundle) as made:

        def delay(tensor: DeviceTensor) -> None:
            if what(tensor):
                asked.set()
                assert answered.wait(PATIENCE)

        made.delay = delay
        follower = Follower(made.batcher, request(steps=1))
        assert asked.wait(PATIENCE)
        made.batcher.cancel(follower.ticket)
        made.batcher.drain(0)
        assert made.batcher.is_busy
        answered.set()
        wait_until(lambda: not made.batcher.is_busy)


@pytest.mark.parametrize("what", [is_latent, is_picture])
def test_a_card_that_fails_after_it_was_asked_is_lost(
    tiny_bundle: Path, what: Callable[[DeviceTensor], bool]
) -> None:
    with card(tiny_bundle) as made:

        def delay(tensor: DeviceTensor) -> None:
            if what(tensor):
                made.engine.lose()
                made.engine._refuse()

        made.delay = delay
        assert isinstance(Follower(made.batcher, request(steps=3)).error(), EngineLostError)
        assert isinstance(made.batcher.lost.result(PATIENCE), EngineLostError)
        assert not made.batcher.is_open


def test_a_card_has_batches_of_four_unless_told_otherwise(tiny_bundle: Path) -> None:
    for of_bundle, wanted, expected in ((16, None, 4), (16, 8, 8), (2, None, 2), (2, 8, 2)):
        with card(tiny_bundle, wanted, of_bundle) as made:
            assert made.batcher.max_batch == expected
            assert made.engine.count(DECODE) == 0


def test_a_server_warms_up_while_nobody_waits(tiny_bundle: Path, alone: Compositor) -> None:
    with card(tiny_bundle, warms_up=True) as made:
        # all batch sizes, with guidance and without
        wait_until(lambda: len(made.engine.steps) == 2 * (2 * 4))
        assert [len(samples) for samples in made.engine.steps[-4:]] == [4] * 4
        (picture,) = Follower(made.batcher, request(steps=3)).pictures()
        assert made.begun == 16 + 3
    (expected,) = alone.run(request(steps=3))
    assert np.abs(picture.astype(int) - expected.image).max() <= TOLERANCE


def test_a_request_goes_before_the_rest_of_the_warm_up(tiny_bundle: Path) -> None:
    with card(tiny_bundle, warms_up=True, is_held=True) as made:
        made.engine.wait_for_steps(1)
        follower = Follower(made.batcher, request(steps=3))
        wait_until(lambda: follower.ticket.waiting)
        made.engine.release()
        assert isinstance(follower.end(), Finished)
        # the call that was begun, twice, and the request's
        steps = [len(samples) for samples in made.engine.steps[:5]]
        assert steps == [1, 1, 1, 1, 1]
        wait_until(lambda: made.begun == 16 + 3)


def test_a_warm_up_that_fails_is_logged_and_nothing_else(
    tiny_bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with card(tiny_bundle, warms_up=True, is_held=True) as made:
        made.engine.wait_for_steps(1)
        made.engine.fails = lambda graph, inputs: graph == DENOISE
        made.engine.release()
        wait_until(lambda: "the warm-up has stopped: the device caught fire" in caplog.text)
        made.engine.fails = lambda graph, inputs: False
        assert isinstance(Follower(made.batcher, request(steps=3)).end(), Finished)
