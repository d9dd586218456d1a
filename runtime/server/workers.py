"""What a request needs beside the engine: decoded and prepared before it joins the batch, pasted and encoded
after it left."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from runtime.compositor import Compositor
from runtime.drawing import Picture
from runtime.errors import collecting_warnings, in_field
from runtime.imaging.pictures import check_format, encode_picture
from runtime.job import ImageJob
from runtime.request import Request
from runtime.server.events import Failed, Finished, FinishedImage, Preview
from runtime.server.queue import SharedQueue
from runtime.server.ticket import Ticket
from runtime.validation import Limits

PREVIEW_FORMAT = "JPEG"


class Workers:
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
        height, width = ticket.job.images[0].image.shape[:2]
        with in_field("output_format"):
            check_format((width, height), ticket.file_format)
        if ticket.preview_every:
            with in_field("preview_every"):
                check_format((width, height), PREVIEW_FORMAT)
        self._queue.put(ticket, ticket.job.images)

    def preview(
        self, ticket: Ticket, index: int, overlay: Callable[[Picture], Picture], drawn: Picture
    ) -> None:
        """Delivers what a picture looks like so far."""
        content = encode_picture(overlay(drawn), PREVIEW_FORMAT)
        with self._queue.changed:
            self._queue.tell(ticket, Preview(index, content))
            ticket.previews -= 1
            if ticket.finished and not ticket.previews:
                self._queue.end(ticket, ticket.finished)

    def finish(self, ticket: Ticket, image: ImageJob, drawn: Picture) -> None:
        """Pastes what was drawn; then the next placement waits, or the picture is done."""
        image.paste(drawn)
        if not image.done:
            self._queue.put(ticket, [image])
            return
        job = image.job
        with job.watch.measure("encode"), collecting_warnings() as warnings:
            content = encode_picture(image.finished(), ticket.file_format, job.scene.metadata)
        with self._queue.changed:
            job.warnings += [text for text in warnings if text not in job.warnings]
            ticket.encoded[image.index] = content
            if len(ticket.encoded) == len(job.images):
                images = [
                    FinishedImage(ticket.encoded[of.index], of.seed, tuple(of.regions)) for of in job.images
                ]
                ticket.finished = Finished(images, job.watch.seconds, job.warnings)
                # else the last preview, which another worker encodes, ends it
                if not ticket.previews:
                    self._queue.end(ticket, ticket.finished)
