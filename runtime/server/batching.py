"""Serves many requests on one engine, by step-level continuous batching.

    workers   decode, check, prepare   |   paste, encode
                        \\             |  /
    engine thread        join -> step -> leave        one call of the step graph per step

Every picture of a request becomes one sample. Between any two steps, samples that are finished, cancelled or
too late leave the running batch and waiting ones take their slots, whatever step the others are at;
`runtime.server.queue` says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.compositor import Compositor
from runtime.edits.editor import check_edit
from runtime.edits.plan import Plan
from runtime.errors import InputError, in_field
from runtime.imaging.sources import PictureLike
from runtime.request import Edit, Request, Where
from runtime.result import Stopwatch
from runtime.server.deadlines import Work
from runtime.server.decoding import Decoder, decoder_bytes
from runtime.server.engine_thread import EngineThread, Observe
from runtime.server.events import Failed, FinishedImage, ShuttingDownError
from runtime.server.queue import SharedQueue
from runtime.server.ticket import Ticket
from runtime.server.workers import Workers
from runtime.validation import LARGEST, Limits

_ENOUGH_FOR_A_CARD = 4
"""Samples in a call. On an H100 the step graph at full size takes 8.00 ms per sample for 1, 6.07 for 2, 5.34
for 4, 5.03 for 8 and 4.95 for 16 (docs/studies/h100.md): with 8 a step takes 1.9 times as long, for 6 %."""


class Batcher:
    """Accepts requests, and has them done on a Compositor's engine by threads of its own."""

    def __init__(
        self,
        compositor: Compositor,
        limits: Limits = LARGEST,
        queue: int = 16,
        max_batch: int | None = None,
        workers: int = 2,
        decode_seconds: float = 10.0,
        max_message_bytes: int = 32 << 20,
        batching: str = "continuous",
        share_caches: bool = False,
        warms_up: bool = False,
        on_samples: Observe | None = None,
        on_seconds: Observe | None = None,
    ) -> None:
        """Starts loading the graphs; requests are accepted at once and wait for that.

        Args:
            compositor: what to run; nobody else may use it from now on.
            limits: what a request may ask for.
            queue: requests accepted beyond as many as the batch has slots.
            max_batch: most samples in the batch; the bundle's limit if None, on a card at most 4.
            workers: threads that prepare, paste and encode, each with a process that decodes.
            decode_seconds: of a processor's time, for the pictures of a request.
            max_message_bytes: of a request.
            batching: "continuous", or "static" to admit only into an empty batch, for comparison.
            share_caches: what is kept of one client's requests also serves others.
            warms_up: on a card, calls are made while nobody waits, since the first of each kind is slow.
            on_samples: called after every step with the number of samples that took it.
            on_seconds: called after every step with the seconds that it took.
        """
        self.compositor = compositor
        if max_batch is None and compositor.engine.device != "cpu":
            max_batch = _ENOUGH_FOR_A_CARD
        self.max_batch = min(max_batch or compositor.max_batch, compositor.max_batch)
        self.limits = limits
        self._queue = SharedQueue(queue + self.max_batch)
        memory = decoder_bytes(limits.pixels, max_message_bytes)
        decoders = [Decoder(limits.pixels, memory, decode_seconds) for _ in range(workers)]
        self._workers = Workers(compositor, limits, self._queue, decoders, share_caches)
        is_static = batching == "static"
        self._engine = EngineThread(
            compositor,
            self._queue,
            self._workers,
            self.max_batch,
            is_static,
            warms_up,
            on_samples,
            on_seconds,
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

    @property
    def is_busy(self) -> bool:
        """Whether a thread runs."""
        return self._engine.is_busy or self._workers.is_busy

    def submit(self, request: Request, ticket: Ticket) -> None:
        """Accepts a request; `ticket.notify` hears of it until `Finished` or `Failed`.

        Raises:
            QueueFullError: says when to try again. A client that has fewer requests waiting than another
                gets the place of the other's last one.
            ShuttingDownError: for good.
            EngineLostError: likewise.
            DeadlineError: the deadline is over, or certainly cannot be met.
            InputError: a number of the request cannot be used.
        """
        guided, unguided = self.compositor.steps_of(request, self.limits)
        ticket.work = Work(guided, unguided, min(request.num_images, self._engine.most_in_a_call))
        self._accept(ticket, self._workers.prepare, request)

    def segment(self, picture: PictureLike, where: Where, ticket: Ticket) -> None:
        """Accepts a picture in which an object is to be found. The result is its mask, as a PNG.

        Raises:
            MissingModelError: it needs a segmenter that is not there.
            AnyDoorError: otherwise as `submit`.
        """
        with in_field("where"):
            self.compositor.segmenter.check(where)
            if where.mask is not None:
                raise InputError("a mask already selects the object: give a box, clicks, or nothing")
        self._accept(ticket, self._workers.segment, picture, where)

    def plan(self, edit: Edit, filler: Compositor | None, ticket: Ticket) -> None:
        """Accepts an edit to be read; without a filler its holes are filled, too. The result is `Planned`.

        Raises:
            AnyDoorError: as `submit`, or as `runtime.edits.editor.check_edit`.
        """
        check_edit(edit, self.compositor, filler, self.limits)
        self._accept(ticket, self._workers.plan, edit, filler is None)

    def fill(self, plan: Plan, drawn: Sequence[FinishedImage], ticket: Ticket) -> None:
        """Accepts an edit whose holes a filler has drawn. The result is `Planned`. Raises as `submit`."""
        self._accept(ticket, self._workers.fill, plan, drawn, Stopwatch(), [])

    def _accept(self, ticket: Ticket, task: Callable[..., None], *arguments: object) -> None:
        """Lets the workers begin with a request, if there is room."""
        queue = self._queue
        with queue.changed:
            if queue.refusal:
                raise queue.refusal
            if late := queue.missed(ticket):
                raise late
            if yielding := queue.requests.yielding(ticket.client):
                queue.end(yielding, Failed(queue.requests.full(queue.seconds_per_step)))
            queue.requests.add(ticket, queue.seconds_per_step)
            queue.announce()
            # under the lock, so that the workers are not stopped in between
            self._workers.run(ticket, task, *arguments)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request without a further event; its samples leave the batch before the next step."""
        self._queue.end(ticket)

    def drain(self, seconds: float) -> bool:
        """Refuses new requests, finishes the accepted ones, then stops.

        Requests not finished after `seconds` fail with `ShuttingDownError`. Returns whether there were none.
        What a thread is at then is not waited for longer than a second: it may be loading for minutes.
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
