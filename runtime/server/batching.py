"""Many requests on one engine, by step-level continuous batching.

    workers   decode, check, prepare   |   paste, encode
                        \\             |  /
    engine thread        join -> step -> leave        one call of the step graph per step

Every picture of a request becomes one sample. Between any two steps, samples that are finished, cancelled or
too late leave the running batch and waiting ones take their slots, whatever step the others are at;
`runtime.server.queue` says which.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np

from engines.cuda import OutOfDeviceMemoryError
from runtime.compositor import Compositor
from runtime.drawing import Picture
from runtime.imaging.pictures import encode_picture
from runtime.job import ImageJob
from runtime.request import Request
from runtime.sampling.running_batch import Sample
from runtime.server.events import (
    DeadlineError,
    EngineLostError,
    Failed,
    Finished,
    FinishedImage,
    Preview,
    ShuttingDownError,
    StepDone,
)
from runtime.server.queue import SharedQueue
from runtime.server.ticket import Ticket
from runtime.validation import LARGEST, Limits

Observe = Callable[[float], object]
"""Told a value that was measured."""

_OLD_STEPS = 0.9
"""Weight of the steps before in the mean time of a step."""

logger = logging.getLogger(__name__)


class Batcher:
    """Accepts requests, and has them done on a Compositor's engine by threads of its own."""

    def __init__(
        self,
        compositor: Compositor,
        limits: Limits = LARGEST,
        queue: int = 16,
        max_batch: int | None = None,
        workers: int = 2,
        batching: str = "continuous",
        on_samples: Observe | None = None,
        on_seconds: Observe | None = None,
    ) -> None:
        """Starts loading the graphs; requests are accepted at once and wait for that.

        Args:
            compositor: what to run; nobody else may use it from now on.
            limits: what a request may ask for.
            queue: requests accepted beyond as many as the batch has slots.
            max_batch: most samples that share a call; the bundle's limit if None.
            workers: threads that decode, prepare, paste and encode.
            batching: "continuous", or "static" to admit only into an empty batch, for comparison.
            on_samples: called after every step with the number of samples that took it.
            on_seconds: called after every step with the seconds that it took.
        """
        self.compositor = compositor
        self.max_batch = min(max_batch or compositor.max_batch, compositor.max_batch)
        self._queue = SharedQueue(queue + self.max_batch)
        self._workers = _Workers(compositor, limits, self._queue, workers)
        is_static = batching == "static"
        self._engine = _EngineThread(
            compositor, self._queue, self._workers, self.max_batch, is_static, on_samples, on_seconds
        )
        self.loaded = self._engine.loaded
        """Done when all graphs are loaded; holds the error if they cannot be."""
        self.lost = self._engine.lost
        """Done when the engine has failed for good, as a card after a fault; then nothing is accepted."""

    @property
    def tickets(self) -> list[Ticket]:
        """The requests that are accepted and not over."""
        with self._queue.changed:
            return list(self._queue.requests.tickets)

    @property
    def is_open(self) -> bool:
        """Whether new requests are accepted, as long as there is room."""
        return self._queue.refusal is None

    def submit(self, request: Request, ticket: Ticket) -> None:
        """Accepts a request; `ticket.notify` hears of it until `Finished` or `Failed`.

        Raises:
            QueueFullError: says when to try again.
            ShuttingDownError: for good.
            EngineLostError: likewise.
        """
        queue = self._queue
        with queue.changed:
            if queue.refusal:
                raise queue.refusal
            queue.requests.add(ticket, queue.seconds_per_step)
            queue.announce()
            # under the lock, so that the workers are not stopped in between
            self._workers.run(ticket, self._workers.prepare, request)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request without a further event; its samples leave the batch before the next step."""
        self._queue.end(ticket)

    def drain(self, seconds: float) -> bool:
        """Refuses new requests, finishes the accepted ones, then stops.

        Requests not finished after `seconds` fail with `ShuttingDownError`. Returns whether there were none.
        """
        queue = self._queue
        with queue.changed:
            queue.refusal = queue.refusal or ShuttingDownError
            clean = queue.changed.wait_for(lambda: not queue.requests.tickets, seconds)
            for ticket in self.tickets:
                queue.end(ticket, Failed(ShuttingDownError()))
        self._engine.stop()
        self._workers.stop()
        return clean


class _Workers:
    """Do what needs no engine: before a picture joins the batch, and after it left."""

    def __init__(self, compositor: Compositor, limits: Limits, queue: SharedQueue, threads: int) -> None:
        self._compositor = compositor
        self._limits = limits
        self._queue = queue
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="worker")
        submit: Callable[..., object] = self._pool.submit
        self.run = partial(submit, self._run)
        """Starts a task of a request: (ticket, task, arguments of the task after the ticket)."""

    def stop(self) -> None:
        """Waits for the tasks that were started."""
        self._pool.shutdown()

    def _run(self, ticket: Ticket, task: Callable[..., None], *arguments: object) -> None:
        """Runs a task, unless the request is over; whatever it raises ends the request."""
        if not ticket.open:
            return
        try:
            task(ticket, *arguments)
        except Exception as error:
            self._queue.end(ticket, Failed(error))

    def prepare(self, ticket: Ticket, request: Request) -> None:
        """Decodes, checks and prepares a request."""
        ticket.job = self._compositor.accept(request, self._limits)
        self._queue.put(ticket, ticket.job.images)

    def preview(
        self, ticket: Ticket, index: int, overlay: Callable[[Picture], Picture], drawn: Picture
    ) -> None:
        """Delivers what a picture looks like so far."""
        self._queue.tell(ticket, Preview(index, encode_picture(overlay(drawn), "JPEG")))

    def finish(self, ticket: Ticket, image: ImageJob, drawn: Picture) -> None:
        """Pastes what was drawn; then the next placement waits, or the picture is done."""
        image.paste(drawn)
        if not image.done:
            self._queue.put(ticket, [image])
            return
        job = image.job
        with job.watch.measure("encode"):
            content = encode_picture(image.image, ticket.file_format)
        with self._queue.changed:
            ticket.encoded[image.index] = content
            if len(ticket.encoded) == len(job.images):
                images = [
                    FinishedImage(ticket.encoded[of.index], of.seed, tuple(of.regions)) for of in job.images
                ]
                self._queue.end(ticket, Finished(images, job.watch.seconds))


class _EngineThread:
    """Lets pictures join the batch, takes its steps, and hands on what was drawn."""

    def __init__(
        self,
        compositor: Compositor,
        queue: SharedQueue,
        workers: _Workers,
        max_batch: int,
        is_static: bool,
        on_samples: Observe | None,
        on_seconds: Observe | None,
    ) -> None:
        self.loaded: Future[None] = Future()
        self.lost: Future[EngineLostError] = Future()
        self._compositor = compositor
        self._queue = queue
        self._workers = workers
        self._max_batch = max_batch
        self._is_static = is_static
        self._on_samples = on_samples
        self._on_seconds = on_seconds
        self._drawing = compositor.new_drawing()
        self._tickets: dict[Sample, Ticket] = {}
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Waits until the step that was begun is over, and takes no other."""
        with self._queue.changed:
            self._stopped = True
            self._queue.changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            for _ in self._compositor.load_graphs():
                pass
            self.loaded.set_result(None)
        except Exception as error:
            self.loaded.set_exception(error)
            return
        while self._wait_for_work():
            try:
                self._admit()
                if self._tickets:
                    self._step()
            except EngineLostError as error:
                self._give_up(error)
                return
            except Exception as error:
                # a fault of ours, as the batch isolates those of single samples: end what is running, go on
                logger.exception("the batch failed")
                for ticket in self._tickets.values():
                    self._queue.end(ticket, Failed(error))

    def _wait_for_work(self) -> bool:
        """Drops what nobody wants any more, and sleeps until there is a step to take; False when stopped."""
        queue = self._queue
        with queue.changed:
            while True:
                now = time.monotonic()
                for ticket in list(queue.requests.tickets):
                    if ticket.deadline is not None and now >= ticket.deadline:
                        queue.end(ticket, Failed(DeadlineError()))
                for sample, ticket in list(self._tickets.items()):
                    if not ticket.open:
                        del self._tickets[sample], self._drawing.running[sample]
                if self._stopped:
                    return False
                if self._tickets or any(ticket.waiting for ticket in queue.requests.tickets):
                    return True
                queue.changed.wait()

    def _admit(self) -> None:
        """Fills the free slots of the batch."""
        if self._is_static and self._tickets:
            return
        while len(self._tickets) < self._max_batch:
            with self._queue.changed:
                taken = self._queue.requests.next()
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
            # the picture itself comes after the last step
            sample.wants_clean_latent = (
                every > 0 and (sample.step + 1) % every == 0 and not sample.is_last_step
            )
        started = time.perf_counter()
        samples = self._drawing.step()
        self._note_step(samples, time.perf_counter() - started)
        if any(sample.clean_latent is not None for sample in samples):
            self._send_previews(samples)
        for sample, drawn in self._drawing.finished(samples):
            ticket, image = self._tickets.pop(sample), self._drawing.running.pop(sample)
            ticket.running -= 1
            self._workers.run(ticket, self._workers.finish, image, drawn)
        for sample in samples:
            if sample.error:
                self._fail(self._tickets[sample], sample.error)

    def _note_step(self, samples: Sequence[Sample], seconds: float) -> None:
        """Tells metrics and requests of a step."""
        queue = self._queue
        of_one = seconds / self._max_batch
        mean = queue.seconds_per_step or of_one
        queue.seconds_per_step = _OLD_STEPS * mean + (1 - _OLD_STEPS) * of_one
        if self._on_samples:
            self._on_samples(len(samples))
        if self._on_seconds:
            self._on_seconds(seconds)
        steps = Counter(self._tickets[sample] for sample in samples if not sample.error)
        for ticket, count in steps.items():
            job = ticket.job
            assert job is not None
            job.watch.add("sample", seconds)
            ticket.steps_done += count
            queue.tell(ticket, StepDone(ticket.steps_done, job.total_steps))

    def _send_previews(self, samples: Sequence[Sample]) -> None:
        for sample, drawn in self._drawing.previews(samples):
            image = self._drawing.running[sample]
            self._workers.run(
                self._tickets[sample], self._workers.preview, image.index, image.overlay(), drawn
            )

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        """Ends a request that the engine failed on.

        Raises:
            EngineLostError: no other request will fare better.
        """
        if not self._engine_works():
            raise EngineLostError from error
        self._queue.end(ticket, Failed(error))

    def _engine_works(self) -> bool:
        """Whether a number still gets to the device and back: after a fault, a card refuses everything."""
        engine = self._compositor.engine
        try:
            return bool(engine.to_host(engine.to_device(np.ones(1, np.float32)))[0] == 1)
        except OutOfDeviceMemoryError:
            return True
        except Exception:
            return False

    def _give_up(self, error: EngineLostError) -> None:
        logger.error("the engine is lost", exc_info=error)
        with self._queue.changed:
            self._queue.refusal = EngineLostError
            for ticket in list(self._queue.requests.tickets):
                self._queue.end(ticket, Failed(error))
        self._tickets.clear()
        self._drawing.running.clear()
        self.lost.set_result(error)
