"""Drives the engine in a thread: pictures join the batch, take their steps and leave.

A CPU's engine has done its work when it returns; a card's has only put it into the card's stream. There a
second thread waits for what comes out, in the order of the stream, while this one puts in the next step: at
most one ahead of the step that the card is at, so that whoever joins or leaves does so at the next step but
one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import numpy as np

from engines.card.engine import CardEngine
from engines.cuda import OutOfDeviceMemoryError
from engines.engine import DeviceTensor
from runtime.compositor import Compositor
from runtime.drawing import Drawn
from runtime.sampling.running_batch import Sample, StepCall
from runtime.server.events import EngineLostError, Failed, LoadFailedError, StepDone
from runtime.server.queue import SharedQueue
from runtime.server.ticket import Ticket
from runtime.server.workers import Workers

Observe = Callable[[float], object]
"""Told a value that was measured."""

_OLD_STEPS = 0.9
"""Weight of the steps before in the mean time of a step."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """A step of the batch that the engine was given."""

    began: float
    """`time.perf_counter()`."""
    call: StepCall
    """Its last call of the step graph."""
    samples: int
    """Number of samples that take it."""
    of_tickets: Mapping[Ticket, int]
    """Request -> its samples that take it."""
    latent: DeviceTensor
    """What it leaves, when it is taken."""


class EngineThread:
    """Lets pictures join the batch, takes its steps, and hands on what was drawn."""

    def __init__(
        self,
        compositor: Compositor,
        queue: SharedQueue,
        workers: Workers,
        max_batch: int,
        is_static: bool,
        warms_up: bool,
        on_samples: Observe | None,
        on_seconds: Observe | None,
    ) -> None:
        """Starts; see `runtime.server.batching.Batcher`."""
        self.loaded: Future[None] = Future()
        self.lost: Future[EngineLostError] = Future()
        self._compositor = compositor
        self._engine = compositor.engine
        self._is_card = compositor.engine.device != "cpu"
        self._queue = queue
        self._workers = workers
        self._max_batch = max_batch
        self._is_static = is_static
        self._warms_up = warms_up
        self._on_samples = on_samples
        self._on_seconds = on_seconds
        self._drawing = compositor.new_drawing()
        self.most_in_a_call = min(max_batch, self._drawing.samples_per_call or max_batch)
        """Most samples that share a call of the step graph."""
        self._tickets: dict[Sample, Ticket] = {}
        self._warming: Iterator[str] | None = None
        """Calls of the warm-up that are left; None if there are none."""
        self._stopped = False
        self._results: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        """Tasks that wait for a card; None ends their thread."""
        self._awaited = threading.Semaphore(1)
        """Taken while a step is waited for."""
        self._last_result = 0.0
        """`time.perf_counter()` when the last result was there."""
        targets = {"engine": self._run} | ({"results": self._run_results} if self._is_card else {})
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True) for name, target in targets.items()
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Takes no other step, and waits a second for the end of those that were begun, or of loading."""
        with self._queue.changed:
            self._stopped = True
            self._queue.changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=1.0 / len(self._threads))

    @property
    def is_busy(self) -> bool:
        """Whether a thread runs, and so may use the engine."""
        return any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        try:
            self._drive()
        finally:
            self._results.put(None)

    def _drive(self) -> None:
        try:
            for _ in self._compositor.load_graphs():
                pass
            self.loaded.set_result(None)
        except Exception as error:
            self._queue.close(LoadFailedError)
            self.loaded.set_exception(error)
            return
        if self._warms_up and isinstance(self._engine, CardEngine):
            self._warming = self._engine.warm_up(self.most_in_a_call, self._compositor.model.control_window)
        while self._wait_for_work():
            try:
                self._admit()
                if self._tickets:
                    self._step()
                else:
                    self._warm_up()
            except Exception as error:
                # a fault of ours, as the batch isolates those of single samples: end what is running, go on
                logger.exception("the batch failed")
                for ticket in set(self._tickets.values()):
                    self._fail(ticket, error)
        self._tickets.clear()
        self._drawing.running.clear()

    def _wait_for_work(self) -> bool:
        """Drops what nobody wants any more, and sleeps until there is a step to take; False when stopped."""
        queue = self._queue
        with queue.changed:
            while True:
                for ticket in list(queue.requests.tickets):
                    if late := queue.missed(ticket):
                        queue.end(ticket, Failed(late))
                for sample, ticket in list(self._tickets.items()):
                    if not ticket.open:
                        del self._tickets[sample], self._drawing.running[sample]
                if self._stopped or self.lost.done():
                    return False
                if self._tickets or any(ticket.waiting for ticket in queue.requests.tickets):
                    return True
                if self._warming:
                    return True
                queue.changed.wait()

    def _warm_up(self) -> None:
        """Makes a call that the next requests will make: while nobody waits, so none of them waits for it."""
        try:
            if self._warming and next(self._warming, None) is None:
                logger.info("warmed up")
                self._warming = None
        except Exception as error:
            # whoever needs that call will be told
            logger.warning("the warm-up has stopped: %s", error)
            self._warming = None

    def _admit(self) -> None:
        """Fills the free slots of the batch."""
        if self._is_static and self._tickets:
            return
        while len(self._tickets) < self._max_batch:
            is_last = len(self._tickets) == self._max_batch - 1 and not self._is_static
            with self._queue.changed:
                taken = self._queue.requests.next(is_last, time.monotonic())
                if taken is None:
                    return
                ticket, image = taken
                if ticket.starts == 1:
                    seconds = image.job.watch.seconds
                    busy = seconds.get("read", 0.0) + seconds.get("prepare", 0.0)
                    image.job.watch.add("queue", max(time.monotonic() - ticket.accepted - busy, 0.0))
                    self._queue.announce()
            try:
                self._tickets[self._drawing.start(image)] = ticket
            except Exception as error:
                self._fail(ticket, error)

    def _step(self) -> None:
        """Takes a step with every picture in the batch; hands on previews and what is drawn."""
        for sample, ticket in self._tickets.items():
            every = ticket.preview_every
            is_due = every > 0 and (sample.step + 1) % every == 0
            # the picture itself comes after the last step; tiles would make more previews than are allowed
            is_shown = not sample.is_last_step and not self._drawing.running[sample].is_refining
            sample.wants_clean_latent = is_due and is_shown
        began = time.perf_counter()
        samples = self._drawing.step()
        self._follow(samples, began)
        if any(sample.clean_latent is not None for sample in samples):
            self._send_previews(samples)
        for sample, drawn in self._drawing.finished(samples):
            ticket, image = self._tickets.pop(sample), self._drawing.running.pop(sample)
            ticket.running -= 1
            self._when_done(self._deliver, ticket, drawn, self._workers.finish, image)
        for sample in samples:
            if sample.error:
                self._fail(self._tickets[sample], sample.error)

    def _send_previews(self, samples: Sequence[Sample]) -> None:
        for sample, drawn in self._drawing.previews(samples):
            ticket, image = self._tickets[sample], self._drawing.running[sample]
            with self._queue.changed:
                ticket.previews += 1
            self._when_done(self._deliver, ticket, drawn, self._workers.preview, image.index, image.overlay())

    # --- what comes out of the engine ---------------------------------------------------------------------

    def _when_done(self, task: Callable[..., None], *arguments: object) -> None:
        """Runs a task that waits for the device; on a card in the other thread, after those before it."""
        if self._is_card:
            self._results.put(partial(task, *arguments))
        else:
            task(*arguments)

    def _run_results(self) -> None:
        while task := self._results.get():
            try:
                task()
            except Exception:
                logger.exception("a result was not handed on")
            del task  # it holds tensors

    def _follow(self, samples: Sequence[Sample], began: float) -> None:
        """Has it told when a step is taken; waits until the step before is."""
        taking = [sample for sample in samples if not sample.error]
        if taking:
            self._awaited.acquire()
            of_tickets = Counter(self._tickets[sample] for sample in taking)
            # a stream is through with a step when it is through with what was put in last
            latent = taking[-1].latent.tensor
            step = _Step(began, self._drawing.last_call, len(samples), of_tickets, latent)
            self._when_done(self._await_step, step)

    def _await_step(self, step: _Step) -> None:
        try:
            if self._is_card:
                self._engine.to_host(step.latent)
            self._note_step(step)
        except Exception as error:
            for ticket in step.of_tickets:
                self._fail(ticket, error)
        finally:
            self._awaited.release()

    def _note_step(self, step: _Step) -> None:
        """Tells metrics and requests of a step that is taken."""
        queue, free, now = self._queue, self._last_result, time.perf_counter()
        # who notes the step before late makes this one look shorter, never longer
        seconds, of_call = now - max(free, step.began), now - max(free, step.call.began)
        self._last_result = now
        of_one = seconds / self._max_batch
        with queue.changed:
            mean = queue.seconds_per_step or of_one
            queue.seconds_per_step = _OLD_STEPS * mean + (1 - _OLD_STEPS) * of_one
            if not self._is_card or (step.call.has_banks and step.call.samples == step.samples):
                queue.fastest.note(step.call.guided, of_call)
        if self._on_samples:
            self._on_samples(step.samples)
        if self._on_seconds:
            self._on_seconds(seconds)
        for ticket, count in step.of_tickets.items():
            job = ticket.job
            assert job is not None
            job.watch.add("sample", seconds)
            ticket.steps_done += count
            queue.tell(ticket, StepDone(ticket.steps_done, job.total_steps))

    def _deliver(self, ticket: Ticket, drawn: Drawn, task: Callable[..., None], *arguments: object) -> None:
        """Gives a picture to the workers when it is there."""
        try:
            picture = drawn()
            self._last_result = time.perf_counter()
        except Exception as error:
            self._fail(ticket, error)
        else:
            self._workers.run(ticket, task, *arguments, picture)

    # --- failures -----------------------------------------------------------------------------------------

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """Ends a request that the engine failed on; all of them, if no other will fare better."""
        if self._engine_works():
            self._queue.end(ticket, Failed(error))
        else:
            self._give_up(error)

    def _engine_works(self) -> bool:
        """Returns whether a number still gets to the device and back: after a fault, a card refuses
        everything."""
        try:
            number = self._engine.to_host(self._engine.to_device(np.ones(1, np.float32)))
            return bool(number[0] == 1)
        except OutOfDeviceMemoryError:
            return True
        except Exception:
            return False

    def _give_up(self, cause: Exception) -> None:
        """Ends all requests, and accepts no other."""
        with self._queue.changed:
            if self.lost.done():
                return
            logger.error("the engine is lost", exc_info=cause)
            self._queue.close(EngineLostError)
            self.lost.set_result(EngineLostError())
