"""Many requests on one engine, by step-level continuous batching.

    workers   decode, check, prepare   |   paste, encode
                        \\             |  /
    engine thread        join -> step -> leave        one call of the denoise graph per step

Every request becomes one sample per picture. Between any two steps, samples that are finished, cancelled or
too late leave the running batch and waiting ones take their slots, whatever step the others are at. The next
slot goes to the client with the fewest samples in the batch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from engines.cuda import OutOfDeviceMemoryError
from engines.engine import DeviceTensor
from engines.spec import DECODE
from runtime.compositor import Compositor
from runtime.imaging.pictures import encode_picture
from runtime.job import Canvas, Job
from runtime.request import Request
from runtime.sampling.running_batch import Sample
from runtime.server.ticket import (
    DeadlineError,
    EngineLostError,
    Failed,
    Finished,
    FinishedImage,
    Order,
    Preview,
    Queued,
    QueueFullError,
    ShuttingDownError,
    StepDone,
    Ticket,
)
from runtime.validation import LARGEST, Limits

_REMEMBERED_CLIENTS = 1024
_SHORTEST_RETRY = 0.1  # seconds
_LONGEST_RETRY = 60.0

logger = logging.getLogger(__name__)


class Scheduler:
    """Runs orders on a Compositor's engine, in threads of its own."""

    def __init__(
        self,
        compositor: Compositor,
        limits: Limits = LARGEST,
        queue: int = 16,
        max_batch: int | None = None,
        workers: int = 2,
        batching: str = "continuous",
        on_batch: Callable[[int, float], object] | None = None,
    ) -> None:
        """Starts loading the graphs; orders are accepted at once and wait for that.

        Args:
            compositor: what to run; nobody else may use it from now on.
            limits: what a request may ask for.
            queue: orders accepted beyond as many as the batch has slots.
            max_batch: most samples that share a call; the bundle's limit if None.
            workers: threads that decode, prepare, paste and encode.
            batching: "continuous", or "static" to admit only into an empty batch, for comparison.
            on_batch: called after every step with the number of samples and the seconds it took.
        """
        self.loaded: Future[None] = Future()
        """Done when all graphs are loaded; holds the error if they cannot be."""
        self.lost: Future[EngineLostError] = Future()
        """When the engine has failed for good, as a card does after a fault; then nothing is accepted."""
        self.compositor = compositor
        self.limits = limits
        self.max_batch = min(max_batch or compositor.max_batch, compositor.max_batch)
        self._capacity = queue + self.max_batch
        self._static = batching == "static"
        self._on_batch = on_batch
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._tickets: list[Ticket] = []  # accepted and not over, first come first
        self._batch = compositor.new_batch()
        self._running: dict[Sample, tuple[Ticket, Canvas]] = {}
        self._served: OrderedDict[str, int] = OrderedDict()
        self._turn = 0
        self._step_seconds = 0.0
        self._draining = False
        self._stopped = False
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        self._engine_thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._engine_thread.start()

    @property
    def accepted(self) -> int:
        """Orders that are accepted and not over."""
        return len(self._tickets)

    @property
    def queued(self) -> int:
        """Orders of which no sample has started."""
        with self._lock:
            return sum(not ticket.started for ticket in self._tickets)

    @property
    def running(self) -> int:
        """Samples in the batch."""
        return len(self._running)

    def submit(self, request: Request, order: Order) -> Ticket:
        """Accepts an order; `order.notify` hears of it until `Finished` or `Failed`.

        Raises:
            QueueFullError: with a hint when to try again.
            ShuttingDownError: for good.
            EngineLostError: for good as well.
        """
        with self._lock:
            if self.lost.done():
                raise self.lost.result()
            if self._draining:
                raise ShuttingDownError
            if len(self._tickets) >= self._capacity:
                raise QueueFullError(self._seconds_until_a_place())
            steps = request.sampling.steps * request.num_images * len(request.placements)
            ticket = Ticket(order, steps)
            self._tickets.append(ticket)
            self._announce_positions()
            self._workers.submit(self._guard, ticket, self._prepare, ticket, request)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends an order, of which nothing more is heard; its samples leave the batch before the next step."""
        with self._lock:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                ticket.waiting.clear()
                self._announce_positions()
                self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Refuses new orders, finishes the accepted ones, then stops.

        Orders not finished after `seconds` fail with `ShuttingDownError`. Returns whether there were none.
        """
        with self._lock:
            self._draining = True
            clean = self._changed.wait_for(lambda: not self._tickets, seconds)
            for ticket in list(self._tickets):
                self._fail(ticket, ShuttingDownError())
            self._stopped = True
            self._changed.notify_all()
        self._engine_thread.join()
        self._workers.shutdown()
        return clean

    # ---- workers

    def _guard(self, ticket: Ticket, work: Callable[..., None], *arguments: object) -> None:
        """Runs a worker's task; whatever it raises ends the order."""
        try:
            work(*arguments)
        except Exception as error:
            self._fail(ticket, error)

    def _prepare(self, ticket: Ticket, request: Request) -> None:
        if not self._is_open(ticket):
            return
        job = self.compositor.accept(request, self.limits)
        for canvas in job.canvases:
            canvas.prepare()
        with self._lock:
            ticket.job = job
            if self._is_open(ticket):
                ticket.waiting.extend(job.canvases)
                self._changed.notify_all()

    def _finish(self, ticket: Ticket, canvas: Canvas, picture: NDArray[np.uint8]) -> None:
        if not self._is_open(ticket):
            return
        canvas.paste(picture)
        if not canvas.done:
            canvas.prepare()
            with self._lock:
                if self._is_open(ticket):
                    ticket.waiting.append(canvas)
                    self._changed.notify_all()
            return
        with canvas.job.watch.measure("encode"):
            content = encode_picture(canvas.image, ticket.order.file_format)
        with self._lock:
            ticket.encoded[canvas.index] = content
            if len(ticket.encoded) == len(canvas.job.canvases) and self._is_open(ticket):
                self._deliver(ticket, canvas.job)

    def _deliver(self, ticket: Ticket, job: Job) -> None:
        images = [
            FinishedImage(ticket.encoded[canvas.index], canvas.seed, tuple(canvas.regions))
            for canvas in job.canvases
        ]
        ticket.order.notify(Finished(images, job.watch.seconds))
        self.cancel(ticket)

    def _preview(
        self,
        ticket: Ticket,
        index: int,
        overlay: Callable[[NDArray[np.uint8]], NDArray[np.uint8]],
        picture: NDArray[np.uint8],
    ) -> None:
        preview = Preview(index, encode_picture(overlay(picture), "JPEG"))
        with self._lock:
            if self._is_open(ticket):
                ticket.order.notify(preview)

    # ---- the engine thread

    def _run(self) -> None:
        try:
            for _ in self.compositor.load_graphs():
                pass
            self.loaded.set_result(None)
        except Exception as error:
            self.loaded.set_exception(error)
            return
        while self._wait_for_work():
            try:
                self._admit()
                if self._running:
                    self._step()
            except EngineLostError as error:
                self._give_up(error)
                return
            except Exception as error:
                # a fault of ours, as the batch isolates those of single samples: end what is running, go on
                logger.exception("the batch failed")
                for ticket, _ in list(self._running.values()):
                    self._fail(ticket, error)

    def _wait_for_work(self) -> bool:
        """Sleeps until there is a step to take; False when the scheduler stopped."""
        with self._lock:
            while True:
                self._drop_unwanted()
                if self._stopped:
                    return False
                if self._running or any(ticket.waiting for ticket in self._tickets):
                    return True
                self._changed.wait()

    def _drop_unwanted(self) -> None:
        for ticket in list(self._tickets):
            if ticket.late:
                self._fail(ticket, DeadlineError())
        for sample, (ticket, _) in list(self._running.items()):
            if not self._is_open(ticket):
                del self._running[sample]

    def _admit(self) -> None:
        """Fills the free slots of the batch."""
        if self._static and self._running:
            return
        while len(self._running) < self.max_batch:
            with self._lock:
                ready = [ticket for ticket in self._tickets if ticket.waiting]
                if not ready:
                    return
                ticket = _fairest(ready, self._samples_of_clients(), self._served)
                canvas = ticket.waiting.popleft()
                self._note_served(ticket)
            try:
                sample = self.compositor.start(canvas)
            except Exception as error:
                self._fail_in_engine(ticket, error)
                continue
            self._running[sample] = (ticket, canvas)

    def _step(self) -> None:
        self._batch.samples = samples = list(self._running)
        for sample in samples:
            every = self._running[sample][0].order.preview_every
            due = bool(every) and (sample.step + 1) % every == 0
            sample.wants_clean_latent = due and not sample.is_last_step
        started = time.perf_counter()
        self._batch.step()
        self._note_step(time.perf_counter() - started)
        self._send_previews([sample for sample in samples if sample.clean_latent is not None])
        self._leave([sample for sample in samples if sample.done])
        for sample in samples:
            if sample.error:
                self._fail_in_engine(self._running.pop(sample)[0], sample.error)

    def _note_step(self, seconds: float) -> None:
        samples = self._batch.samples
        self._step_seconds = 0.9 * self._step_seconds + 0.1 * seconds if self._step_seconds else seconds
        if self._on_batch:
            self._on_batch(len(samples), seconds)
        taken = Counter(self._running[sample][0] for sample in samples if not sample.error)
        for ticket, steps in taken.items():
            assert ticket.job is not None
            ticket.job.watch.add("sample", seconds)
            ticket.steps_done += steps
            with self._lock:
                if self._is_open(ticket):
                    ticket.order.notify(StepDone(ticket.steps_done, ticket.total_steps))

    def _leave(self, samples: Sequence[Sample]) -> None:
        """Decodes finished samples and hands them to the workers."""
        for sample, picture in self._decode(samples, lambda sample: self._batch.latents([sample])):
            ticket, canvas = self._running.pop(sample)
            self._workers.submit(self._guard, ticket, self._finish, ticket, canvas, picture)

    def _send_previews(self, samples: Sequence[Sample]) -> None:
        for sample, picture in self._decode(samples, _clean_latent):
            ticket, canvas = self._running[sample]
            sample.clean_latent = None
            arguments = (canvas.index, canvas.overlay(), picture)
            self._workers.submit(self._guard, ticket, self._preview, ticket, *arguments)

    def _decode(
        self, samples: Sequence[Sample], latent_of: Callable[[Sample], DeviceTensor]
    ) -> Iterator[tuple[Sample, NDArray[np.uint8]]]:
        """Samples and their pictures; one that cannot be decoded gets its error."""
        for sample in samples:
            with self._running[sample][1].job.watch.measure(DECODE):
                try:
                    picture = self.compositor.decode(latent_of(sample))
                except Exception as error:
                    sample.error = error
                    continue
            yield sample, picture

    def _fail_in_engine(self, ticket: Ticket, error: Exception) -> None:
        """Ends an order that the engine failed on.

        Raises:
            EngineLostError: no other order will fare better.
        """
        if not self._engine_answers():
            raise EngineLostError from error
        self._fail(ticket, error)

    def _engine_answers(self) -> bool:
        """Whether a number still gets to the device and back: after a fault, a card refuses everything."""
        engine = self.compositor.engine
        try:
            return bool(engine.to_host(engine.to_device(np.ones(1, np.float32)))[0] == 1)
        except OutOfDeviceMemoryError:
            return True
        except Exception:
            return False

    def _give_up(self, error: EngineLostError) -> None:
        logger.error("the engine is lost", exc_info=error)
        with self._lock:
            self.lost.set_result(error)
            self._running.clear()
            for ticket in list(self._tickets):
                self._fail(ticket, error)

    # ---- what both sides share, under the lock

    def _is_open(self, ticket: Ticket) -> bool:
        with self._lock:
            return ticket in self._tickets

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        with self._lock:
            if self._is_open(ticket):
                ticket.order.notify(Failed(error))
                self.cancel(ticket)

    def _samples_of_clients(self) -> Counter[str]:
        return Counter(ticket.order.client for ticket, _ in self._running.values())

    def _note_served(self, ticket: Ticket) -> None:
        self._turn += 1
        self._served[ticket.order.client] = self._turn
        self._served.move_to_end(ticket.order.client)
        if len(self._served) > _REMEMBERED_CLIENTS:
            self._served.popitem(last=False)
        if not ticket.started:
            ticket.started = True
            assert ticket.job is not None
            before = ticket.job.watch.seconds
            waited = time.monotonic() - ticket.accepted - before["read"] - before["prepare"]
            ticket.job.watch.add("queue", max(waited, 0.0))
            self._announce_positions()

    def _announce_positions(self) -> None:
        """Tells every order that has not started how many start before it, if that changed."""
        queue = [ticket for ticket in self._tickets if not ticket.started]
        running, served = self._samples_of_clients(), dict(self._served)
        for position in range(len(queue)):
            ticket = _fairest(queue, running, served)
            queue.remove(ticket)
            running[ticket.order.client] += 1
            served[ticket.order.client] = self._turn + 1 + position
            if ticket.position is None or position < ticket.position:
                ticket.position = position
                ticket.order.notify(Queued(position))

    def _seconds_until_a_place(self) -> float:
        """The time in which the accepted work shrinks by one order, as far as known."""
        steps = sum(ticket.total_steps - ticket.steps_done for ticket in self._tickets)
        seconds = steps / self.max_batch * self._step_seconds / max(len(self._tickets), 1)
        return min(max(seconds, _SHORTEST_RETRY), _LONGEST_RETRY)


def _fairest(tickets: Sequence[Ticket], running: Counter[str], served: Mapping[str, int]) -> Ticket:
    """The ticket whose client has the fewest samples in the batch, among these the one served longest ago.

    A client's own tickets come in their order.
    """
    return min(tickets, key=lambda ticket: (running[ticket.order.client], served.get(ticket.order.client, 0)))


def _clean_latent(sample: Sample) -> NDArray[np.float32]:
    assert sample.clean_latent is not None
    return sample.clean_latent[None]
